// Strips of binary-coded weights in plain C++.
#pragma once
#include "packed.h"

namespace lissom {
namespace {

// Binary-coded weights: see linear.h for the layout.
void bcq_strip(const uint8_t *p, int tiles, int G, int bits, const int8_t *, const Acts &x, int token, float *out) {
    for (int r = 0; r < ROWS; r++) out[r] = 0;
    for (int t = 0; t < tiles; t++) {
        const uint8_t *head = p;
        p += 32 * (bits + 1);
        const int8_t *q = x.q + (int64_t)token * x.stride + t * G;
        const float sx = x.scale[(int64_t)token * x.tiles + t], total = x.sum[(int64_t)token * x.tiles + t];
        for (int r = 0; r < ROWS; r++) {
            uint16_t half;
            __builtin_memcpy(&half, head + 32 * bits + 2 * r, 2);
            out[r] += half_to_float(half) * sx * total;
        }
        for (int b = 0; b < bits; b++, p += G * ROWS / 8)
            for (int r = 0; r < ROWS; r++) {
                int32_t sum = 0;
                for (int c = 0; c < G; c++) {
                    const int quad = c / 4, byte = quad / 4 * 32 + quad % 2 * 16 + r;
                    const int bit = p[byte] >> (quad % 4 / 2 * 4 + c % 4) & 1;
                    sum += bit ? q[c] : -q[c];
                }
                uint16_t half;
                __builtin_memcpy(&half, head + 32 * b + 2 * r, 2);
                out[r] += (float)sum * (half_to_float(half) * sx);
            }
    }
}

} // namespace
} // namespace lissom
