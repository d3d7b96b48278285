// Strips of binary-coded weights with AVX2, for AVX-512 too.
#pragma once
#include "packed.h"
#include <immintrin.h>

namespace lissom {
namespace {

// Binary-coded weights by table look-up: see linear.h.
void bcq_strip(const uint8_t *p, int tiles, int G, int bits, const int8_t *table, const Acts &x, int token, float *out) {
    __m256 y0 = _mm256_setzero_ps(), y1 = _mm256_setzero_ps();
    const __m256i low = _mm256_set1_epi8(15);
    for (int t = 0; t < tiles; t++, table += (int64_t)G * 8) {
        const uint8_t *head = p;
        p += 32 * (bits + 1);
        const __m256 sx = _mm256_set1_ps(x.scale[(int64_t)token * x.tiles + t]);
        const __m256 total = _mm256_mul_ps(sx, _mm256_set1_ps(x.sum[(int64_t)token * x.tiles + t]));
        y0 = _mm256_fmadd_ps(load8((const uint16_t *)(head + 32 * bits)), total, y0);
        y1 = _mm256_fmadd_ps(load8((const uint16_t *)(head + 32 * bits + 16)), total, y1);
        for (int b = 0; b < bits; b++) {
            __m256i first = _mm256_setzero_si256(), last = first; // rows 0-7 and 8-15, two quads in two lanes
            for (int c = 0; c < G / 16; c++, p += 32) {
                const __m256i both = _mm256_loadu_si256((const __m256i *)p);
#pragma GCC unroll 2
                for (int k = 0; k < 2; k++) { // quads 4c + 2k and 4c + 2k + 1
                    const int8_t *lut = table + (4 * c + 2 * k) * 32;
                    const __m256i index = _mm256_and_si256(k ? _mm256_srli_epi16(both, 4) : both, low);
                    const __m256i lo = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)lut), index), hi = _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i *)(lut + 32)), index);
                    first = _mm256_add_epi16(first, _mm256_unpacklo_epi8(lo, hi));
                    last = _mm256_add_epi16(last, _mm256_unpackhi_epi8(lo, hi));
                }
            }
            const __m128i f = _mm_add_epi16(_mm256_castsi256_si128(first), _mm256_extracti128_si256(first, 1));
            const __m128i l = _mm_add_epi16(_mm256_castsi256_si128(last), _mm256_extracti128_si256(last, 1));
            const __m256 a0 = _mm256_mul_ps(load8((const uint16_t *)(head + 32 * b)), sx);
            const __m256 a1 = _mm256_mul_ps(load8((const uint16_t *)(head + 32 * b + 16)), sx);
            y0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(f)), a0, y0);
            y1 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(l)), a1, y1);
        }
    }
    _mm256_storeu_ps(out, y0), _mm256_storeu_ps(out + 8, y1);
}

} // namespace
} // namespace lissom
