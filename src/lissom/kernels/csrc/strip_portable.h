// Strips in plain C++: decode a tile to integers, then multiply. Exact in the same way as the vector code.
#pragma once
#include "matrix.h"

namespace lissom {
namespace {

void strip(const View &v, int s, const Acts &x, int t0, int n, float *out) {
    int16_t w[ROWS * 128];
    float scale[ROWS];
    const uint8_t *tile = v.data + v.offset[s];
    for (int i = 0; i < n * ROWS; i++) out[i] = 0;
    for (int t = 0; t < v.tiles; t++) {
        tile = decode_tile(v, tile, w, scale);
        for (int i = 0; i < n; i++) {
            const int8_t *q = x.q + (int64_t)(t0 + i) * x.stride + t * v.G;
            const float sx = x.scale[(int64_t)(t0 + i) * x.tiles + t];
            for (int r = 0; r < ROWS; r++) {
                int32_t sum = 0;
                for (int c = 0; c < v.G; c++) sum += (int32_t)w[r * v.G + c] * q[c];
                out[i * ROWS + r] += (float)sum * (scale[r] * sx);
            }
        }
    }
}

} // namespace
} // namespace lissom
