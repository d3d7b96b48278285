// The innermost loop of the error-feedback sweep (lissom/core/columns.py is its definition): some columns are decided one after
// the other, for many rows at once. Everything is transposed: a column of W is contiguous, its rows are the lanes.
//
// Rows are independent, so how they are cut into tiles changes nothing. A tile is copied to the stack, since columns
// stand a power of two apart in memory often enough to fall into the same few lines of the cache.
#pragma once
#include <cstdint>

namespace lissom {

constexpr int TILE_ROWS = 64;    // rows decided together: 16 KiB for 64 columns
constexpr int MOST_COLUMNS = 64; // that one call may reach over

struct ColumnRun {
    float *w;            // (span, rows): as updated so far; `begin … reach - 1` is read, `end … reach - 1` written
    const float *u;      // (span, span)
    const uint8_t *keep; // (span, rows) or null
    const float *scale, *zero, *levels; // (rows) or null
    float *q, *errors;   // (span, rows)
    uint8_t *codes;      // (span, rows) or null
    int64_t rows, span;
    int begin, end, reach;
};

// Error feedback over inputs and outputs (lissom/core/two_sided.py is its definition): column by column and down each column.
struct EntryRun {
    const float *w;      // (span, rows)
    float *left;         // (span, rows): what earlier columns left, summed with u; later columns are added to
    const float *u, *v;  // (span, span), (rows, rows)
    const uint8_t *keep; // (span, rows) or null
    const float *scale, *zero, *levels; // (span, rows)
    uint8_t *codes;      // (span, rows)
    float *errors;       // (span, rows)
    float *above;        // (rows): scratch
    int64_t rows, span;
};

} // namespace lissom
