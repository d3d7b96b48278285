// Included by ops.cpp, once for each instruction set.
#pragma once
#include "columns.h"

namespace lissom {
namespace {

// To the nearest integer, ties to even, for |x| < 2^22; larger ones stay larger than any code, and NaN stays NaN.
inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

template <bool GRID> void decide_tile(const ColumnRun &c, int64_t row, int count) {
    alignas(64) float w[MOST_COLUMNS][TILE_ROWS], e[TILE_ROWS];
    const int columns = c.reach - c.begin;
    for (int k = 0; k < columns; k++) {
        const float *from = c.w + (c.begin + k) * c.rows + row;
        for (int r = 0; r < count; r++) w[k][r] = from[r];
        for (int r = count; r < TILE_ROWS; r++) w[k][r] = 0;
    }
    for (int i = 0; i < c.end - c.begin; i++) {
        const int column = c.begin + i;
        const int64_t at = column * c.rows + row;
        const float *u = c.u + column * c.span + c.begin; // u[k] belongs to w[k]
        const float d = u[i];
        for (int r = 0; r < count; r++) {
            const float value = w[i][r];
            float q = !c.keep || c.keep[at + r] ? value : 0.0f;
            if (GRID) {
                const float zero = c.zero[row + r], scale = c.scale[row + r], top = c.levels[row + r] - 1.0f;
                float code = nearest(q / scale) + zero;
                code = code > top ? top : code;
                code = code < 0.0f ? 0.0f : code;
                c.codes[at + r] = (uint8_t)(int)code;
                q = (code - zero) * scale;
            }
            c.q[at + r] = q;
            c.errors[at + r] = e[r] = (value - q) / d;
        }
        for (int r = count; r < TILE_ROWS; r++) e[r] = 0;
        for (int k = i + 1; k < columns; k++) {
            const float f = u[k];
#pragma omp simd
            for (int r = 0; r < TILE_ROWS; r++) w[k][r] -= f * e[r];
        }
    }
    for (int k = c.end - c.begin; k < columns; k++) {
        float *to = c.w + (c.begin + k) * c.rows + row;
        for (int r = 0; r < count; r++) to[r] = w[k][r];
    }
}

void decide(const ColumnRun &c) {
    for (int64_t row = 0; row < c.rows; row += TILE_ROWS) {
        const int count = (int)(c.rows - row < TILE_ROWS ? c.rows - row : TILE_ROWS);
        if (c.scale)
            decide_tile<true>(c, row, count);
        else
            decide_tile<false>(c, row, count);
    }
}

void decide_all(const EntryRun &c) {
    for (int64_t j = 0; j < c.span; j++) {
        const int64_t at = j * c.rows;
        const float *left = c.left + at;
        float *errors = c.errors + at, *above = c.above;
        for (int64_t i = 0; i < c.rows; i++) above[i] = 0;
        for (int64_t i = 0; i < c.rows; i++) {
            const float scale = c.scale[at + i], zero = c.zero[at + i], top = c.levels[at + i] - 1.0f;
            float code = nearest((c.w[at + i] + left[i] + above[i]) / scale) + zero;
            code = code > top ? top : code;
            code = code < 0.0f ? 0.0f : code;
            if (c.keep && !c.keep[at + i]) code = zero;
            c.codes[at + i] = (uint8_t)(int)code;
            errors[i] = c.w[at + i] - (code - zero) * scale;
            const float sum = errors[i] + left[i];
            const float *v = c.v + i * c.rows;
#pragma omp simd
            for (int64_t k = i + 1; k < c.rows; k++) above[k] += v[k] * sum;
        }
        for (int64_t l = j + 1; l < c.span; l++) {
            const float f = c.u[j * c.span + l];
            float *later = c.left + l * c.rows;
#pragma omp simd
            for (int64_t i = 0; i < c.rows; i++) later[i] += f * errors[i];
        }
    }
}

} // namespace
} // namespace lissom
