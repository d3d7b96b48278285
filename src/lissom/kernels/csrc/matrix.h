// Owner of a packed matrix; packing from neutral arrays and back.
#pragma once
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "packed.h"

namespace lissom {

constexpr size_t SLACK = 64; // readable bytes after the data: kernels may read one vector past the end

struct Free {
    void operator()(uint8_t *p) const { std::free(p); }
};

struct Matrix {
    View view{};
    std::unique_ptr<uint8_t, Free> data; // none when the bytes belong to somebody else
    std::vector<uint64_t> offset;
    size_t bytes = 0;
    size_t spilled = 0; // entries on the spill list
    void allocate(size_t size); // zeros, for `size` bytes and SLACK
};

// values (rows, columns) u8, scale and zero (rows, groups) for groups of `width` columns, the last may be
// shorter; mask (rows, columns) or null, 0 = weight is zero. G divides `width` or there is one group. N counts slots (NM4: even, or 0: what
// each strip of rows with alike needs takes; NM8: a multiple of 4).
std::unique_ptr<Matrix> pack(Kind kind, int rows, int columns, int width, const uint8_t *values, const float *scale,
                             const float *zero, const uint8_t *mask, int G, int N, bool spill);

// Rounds weights (rows, columns) to symmetric codes of 8 or 6 bits with a scale for each G columns, which divides `columns`.
// Throws when a weight is not finite or the scales do not fit half precision.
std::unique_ptr<Matrix> round(int bits, int rows, int columns, const float *weights, int G);

// A matrix over packed bytes that stay where they are, as in a mapped file. `size`: readable bytes, SLACK included. Throws
// when the bytes cannot be such a matrix.
std::unique_ptr<Matrix> borrow(Kind kind, int rows, int columns, int G, int N, int zeros, int zero, bool spill,
                               const uint8_t *data, size_t size);

// w (16, G): code - zero of tile `t` of strip `s`, positions that are not stored are 0; scale (16).
// Of the weights only rows from ... to - 1. Returns the first byte after the tile.
const uint8_t *decode_tile(const View &v, const uint8_t *tile, int16_t *w, float *scale, int from = 0, int to = ROWS);

// fp32 weights of one row
void decode_row(const View &v, int row, float *out);

} // namespace lissom
