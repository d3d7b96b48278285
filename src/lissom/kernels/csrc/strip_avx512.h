// Strips with AVX-512 (VNNI and VBMI: Ice Lake, Zen 4 and later). One vector of codes holds four columns of all sixteen rows, so
// `dpbusd` sums them into sixteen 32-bit rows; nothing can overflow. Sums are the same integers as everywhere else, and
// they meet the scales in the same order as with AVX2: both give the same bits.
//
// dpbusd multiplies u8 with s8. Dense codes are unsigned already. Gathered weights are signed, so there the activations are
// shifted by 128, and 128 times the sum of the weights, which is the same for all tokens, is taken off again.
#pragma once
#include "packed.h"
#include <immintrin.h>

namespace lissom {
namespace {

inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }
inline __m512i four(const int8_t *q) { // four activations to every 32-bit lane
    int32_t v;
    __builtin_memcpy(&v, q, 4);
    return _mm512_set1_epi32(v);
}
inline __m512i bytes(int v) { return _mm512_set1_epi8((char)v); }

inline __m512 scales(const uint8_t *tile) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)tile)); }
inline __m512i zeros(const View &v, const uint8_t *tile) { // one for each row
    return v.zeros ? _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(tile + 32))) : _mm512_set1_epi32(v.zero);
}

// Codes of one quad of columns inside a block of 32, sixteen rows x four columns, unsigned.
template <int K> inline __m512i codes(const uint8_t *block, int step);
template <> inline __m512i codes<D8>(const uint8_t *b, int step) { return _mm512_xor_si512(load(b + step * 64), bytes(128)); }
template <> inline __m512i codes<D4>(const uint8_t *b, int step) {
    const __m512i v = load(b + step / 2 * 64);
    return _mm512_and_si512(step % 2 ? _mm512_srli_epi16(v, 4) : v, bytes(15));
}
template <> inline __m512i codes<D2>(const uint8_t *b, int step) {
    return _mm512_and_si512(_mm512_srli_epi16(load(b + step / 4 * 64), step % 4 * 2), bytes(3));
}
template <> inline __m512i codes<D3>(const uint8_t *b, int step) {
    const __m512i h = load(b + 128), high = step < 2 ? _mm512_slli_epi16(h, 2 - step) : _mm512_srli_epi16(h, step - 2);
    return _mm512_or_si512(codes<D2>(b, step), _mm512_and_si512(high, bytes(4)));
}
template <> inline __m512i codes<D6>(const uint8_t *b, int step) {
    const __m512i h = load(b + 256 + step / 4 * 64);
    const int k = step % 4; // bits 2k, 2k + 1 go to bits 4, 5
    const __m512i high = k < 2 ? _mm512_slli_epi16(h, 4 - 2 * k) : _mm512_srli_epi16(h, 2 * k - 4);
    return _mm512_or_si512(codes<D4>(b, step), _mm512_and_si512(high, bytes(48)));
}

template <int K, int T> void dense(const View &v, const uint8_t *tile, const Acts &x, int t0, float *out) {
    const int block = payload_bytes((Kind)K, 32, 0), header = 32 + (v.zeros ? 16 : 0);
    const int8_t *q = x.q + (int64_t)t0 * x.stride;
    __m512 total[T]; // in registers: through memory each tile would wait for the one before
    for (int i = 0; i < T; i++) total[i] = _mm512_setzero_ps();
    for (int t = 0; t < v.tiles; t++, tile += v.tile_bytes) {
        __m512i sum[T];
        for (int i = 0; i < T; i++) sum[i] = _mm512_setzero_si512();
        const uint8_t *p = tile + header;
        for (int c = 0; c < v.G; c += 32, p += block, q += 32) {
#pragma GCC unroll 8
            for (int s = 0; s < 8; s++) {
                const __m512i w = codes<K>(p, s);
#pragma GCC unroll 16
                for (int i = 0; i < T; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], w, four(q + i * x.stride + 4 * s));
            }
        }
        const __m512 scale = scales(tile), zero = _mm512_cvtepi32_ps(zeros(v, tile));
        for (int i = 0; i < T; i++) {
            const int64_t at = (int64_t)(t0 + i) * x.tiles + t;
            const __m512 y = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x.sum[at]), _mm512_cvtepi32_ps(sum[i]));
            total[i] = _mm512_fmadd_ps(y, _mm512_mul_ps(scale, _mm512_set1_ps(x.scale[at])), total[i]);
        }
    }
    for (int i = 0; i < T; i++) _mm512_storeu_ps(out + i * ROWS, total[i]);
}

struct Bytes {
    alignas(64) uint8_t at[64];
    explicit constexpr Bytes(bool pairs) : at{} { // pairs: bytes 2r+s of two pairs of slots, 32 bytes each, to 4r+s and 4r+2+s;
        for (int i = 0; i < 64; i++) at[i] = (uint8_t)((pairs ? i % 4 / 2 * 32 : 0) + i / 4 * 2 + i % 2); // else of one pair to both
    }
};
constexpr Bytes PAIRED(true), DOUBLED(false);

// Where slots of a vector point to in the 64 columns before it, and 16 times (SYMMETRIC) or once their weight.
struct Slots {
    __m512i index, weight;
};

// Vector `i` of a run of 64 columns (32 when G = 32). PAIRS: pairs of slots of sixteen columns.
template <int K, int PAIRS, bool SYMMETRIC> inline Slots slots(const uint8_t *p, int i, __m512i mix, __m512i zero) {
    __m512i v, place, code;
    if (K == N24) { // vectors 2g and 2g + 1: quads 0, 1 and 2, 3 of sixteen columns
        const uint8_t *group = p + i / 2 * 96;
        const int half = i % 2;
        const __m512i two = _mm512_set1_epi32(half ? 6 << 16 | 4 : 2 << 16); // shifts of the 16-bit halves
        const __m512i spread = load(DOUBLED.at);
        place = _mm512_permutexvar_epi8(spread, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)group)));
        place = _mm512_and_si512(_mm512_srlv_epi16(place, two), bytes(3));
        const int base = i / 2 * 16 + 8 * half;
        place = _mm512_or_si512(place, _mm512_set1_epi32(base * 0x0101 | (base + 4) * 0x01010000));
        v = _mm512_permutexvar_epi8(spread, _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(group + 32 + 32 * half))));
        code = _mm512_and_si512(_mm512_srlv_epi16(v, _mm512_set1_epi32(4 << 16)), bytes(15));
        return {place, _mm512_sub_epi8(code, zero)};
    }
    v = _mm512_permutexvar_epi8(mix, load(p + 64 * i));
    const int first = 2 * i / PAIRS * 16, second = (2 * i + 1) / PAIRS * 16; // columns of the two pairs
    place = _mm512_ternarylogic_epi32(v, bytes(15), _mm512_set1_epi32(first * 0x0101 | second * 0x01010000), 0xEA); // (v & 15) | base
    if (SYMMETRIC) return {place, _mm512_ternarylogic_epi32(v, bytes(0xF0), bytes(0x80), 0x6A)}; // (v & 0xF0) ^ 0x80 = 16 (code - 8)
    code = _mm512_and_si512(_mm512_srli_epi16(v, 4), bytes(15));
    return {place, _mm512_sub_epi8(code, zero)};
}

template <int K, int PAIRS, bool SYMMETRIC, int T> void gathered(const View &v, const uint8_t *tile, const Acts &x, int t0, float *out) {
    const int header = 32 + (v.zeros ? 16 : 0), run = v.G < 64 ? v.G : 64; // columns of one table
    const int step = run / 16 * (K == N24 ? 96 : 32 * PAIRS);
    const int8_t *q = x.q + (int64_t)t0 * x.stride;
    const __m512i mix = load(PAIRED.at), middle = bytes(128);
    __m512 total[T];
    for (int i = 0; i < T; i++) total[i] = _mm512_setzero_ps();
    for (int t = 0; t < v.tiles; t++) {
        const __m512i zero = _mm512_mullo_epi32(zeros(v, tile), _mm512_set1_epi32(0x01010101)); // zero of row r in bytes 4r ... 4r + 3
        __m512i sum[T], shift = _mm512_setzero_si512();
        for (int i = 0; i < T; i++) sum[i] = _mm512_setzero_si512();
        const uint8_t *p = tile + header;
        for (int c = 0; c < v.G; c += run, p += step, q += run) {
            __m512i table[T];
            for (int i = 0; i < T; i++) table[i] = _mm512_xor_si512(load(q + i * x.stride), middle);
            const auto some = [&](int from, int count) __attribute__((always_inline)) {
#pragma GCC unroll 16
                for (int j = 0; j < count; j++) {
                    const Slots s = slots<K, PAIRS, SYMMETRIC>(p, from + j, mix, zero);
                    shift = _mm512_dpbusd_epi32(shift, middle, s.weight);
#pragma GCC unroll 16
                    for (int i = 0; i < T; i++) sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_permutexvar_epi8(s.index, table[i]), s.weight);
                }
            };
            constexpr int HALF = K == N24 ? 4 : PAIRS; // vectors of 32 columns
            some(0, HALF);
            if (run == 64) some(HALF, HALF);
        }
        const uint8_t *end = tile + v.tile_bytes;
        for (int i = 0; i < T; i++) {
            sum[i] = _mm512_sub_epi32(sum[i], shift);
            if (SYMMETRIC) sum[i] = _mm512_srai_epi32(sum[i], 4);
        }
        if (v.spill) {
            uint16_t count, e;
            __builtin_memcpy(&count, end, 2), end += 2;
            for (int i = 0; i < T && count; i++) {
                const int8_t *here = q - v.G + i * x.stride;
                alignas(64) int32_t part[ROWS];
                _mm512_store_si512(part, sum[i]);
                for (int j = 0; j < count; j++) {
                    __builtin_memcpy(&e, end + 2 * j, 2);
                    const int r = e & 15, z = v.zeros ? tile[32 + r] : v.zero;
                    part[r] += ((e >> 11) - z) * here[e >> 4 & 127];
                }
                sum[i] = _mm512_load_si512(part);
            }
            end += 2 * count;
        }
        const __m512 scale = scales(tile);
        for (int i = 0; i < T; i++) {
            const __m512 sx = _mm512_set1_ps(x.scale[(int64_t)(t0 + i) * x.tiles + t]);
            total[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i]), _mm512_mul_ps(scale, sx), total[i]);
        }
        tile = end;
    }
    for (int i = 0; i < T; i++) _mm512_storeu_ps(out + i * ROWS, total[i]);
}

template <int T> void gathered8(const View &v, const uint8_t *tile, const Acts &x, int t0, float *out) {
    const int header = 32 + (v.zeros ? 16 : 0), fours = v.N / 4, run = v.G < 64 ? v.G : 64;
    const int8_t *q = x.q + (int64_t)t0 * x.stride;
    const bool shifted = v.zeros || v.zero != 128; // then the sum of gathered activations is needed too
    const __m512i middle = bytes(128), one = bytes(1);
    __m512 total[T];
    for (int i = 0; i < T; i++) total[i] = _mm512_setzero_ps();
    for (int t = 0; t < v.tiles; t++, tile += v.tile_bytes) {
        __m512i sum[T], plain[T], shift = _mm512_setzero_si512();
        for (int i = 0; i < T; i++) sum[i] = shift, plain[i] = _mm512_set1_epi32(-128 * v.G / 16 * v.N);
        const uint8_t *p = tile + header;
        for (int c = 0; c < v.G; c += run, q += run) {
            __m512i table[T];
            for (int i = 0; i < T; i++) table[i] = _mm512_xor_si512(load(q + i * x.stride), middle);
            for (int g = 0; g < run / 16; g++)
                for (int k = 0; k < fours; k++, p += 96) {
                    const __m256i both = _mm256_loadu_si256((const __m256i *)p), low = _mm256_set1_epi8(15);
                    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
                    __m512i index = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_and_si256(both, low)), high, 1);
                    index = _mm512_or_si512(index, bytes(16 * g));
                    const __m512i w = load(p + 32);
                    shift = _mm512_dpbusd_epi32(shift, middle, w);
#pragma GCC unroll 16
                    for (int i = 0; i < T; i++) {
                        const __m512i y = _mm512_permutexvar_epi8(index, table[i]);
                        sum[i] = _mm512_dpbusd_epi32(sum[i], y, w);
                        if (shifted) plain[i] = _mm512_dpbusd_epi32(plain[i], y, one);
                    }
                }
        }
        const __m512 scale = scales(tile), zero = _mm512_cvtepi32_ps(_mm512_sub_epi32(zeros(v, tile), _mm512_set1_epi32(128)));
        for (int i = 0; i < T; i++) {
            const __m512 sx = _mm512_set1_ps(x.scale[(int64_t)(t0 + i) * x.tiles + t]);
            const __m512 y = _mm512_fnmadd_ps(zero, _mm512_cvtepi32_ps(plain[i]), _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[i], shift)));
            total[i] = _mm512_fmadd_ps(y, _mm512_mul_ps(scale, sx), total[i]);
        }
    }
    for (int i = 0; i < T; i++) _mm512_storeu_ps(out + i * ROWS, total[i]);
}

using Tokens = void (*)(const View &, const uint8_t *, const Acts &, int, float *);

template <int T> Tokens gather_by_pairs(const View &v) {
    const bool symmetric = !v.zeros && v.zero == 8;
#define LISSOM_PAIRS(P) case P: return symmetric ? gathered<NM4, P, true, T> : gathered<NM4, P, false, T>;
    switch (v.N / 2) {
        LISSOM_PAIRS(1)
        LISSOM_PAIRS(2)
        LISSOM_PAIRS(3)
        LISSOM_PAIRS(4)
        LISSOM_PAIRS(5)
        LISSOM_PAIRS(6)
        LISSOM_PAIRS(7)
    default: return symmetric ? gathered<NM4, 8, true, T> : gathered<NM4, 8, false, T>;
    }
#undef LISSOM_PAIRS
}

template <int T> Tokens kernel(const View &v) {
    switch (v.kind) {
    case D2: return dense<D2, T>;
    case D3: return dense<D3, T>;
    case D4: return dense<D4, T>;
    case D6: return dense<D6, T>;
    case D8: return dense<D8, T>;
    case NM4: return gather_by_pairs<T>(v);
    case NM8: return gathered8<T>;
    default: return gathered<N24, 4, false, T>;
    }
}

void strip(const View &v, int s, const Acts &x, int t0, int n, float *out) {
    const uint8_t *p = v.data + v.offset[s];
    int t = 0;
    if (n >= 8)
        for (const Tokens f = kernel<8>(v); t + 8 <= n; t += 8) f(v, p, x, t0 + t, out + t * ROWS);
    if (n - t >= 4) kernel<4>(v)(v, p, x, t0 + t, out + t * ROWS), t += 4;
    if (n - t >= 2) kernel<2>(v)(v, p, x, t0 + t, out + t * ROWS), t += 2;
    if (n - t >= 1) kernel<1>(v)(v, p, x, t0 + t, out + t * ROWS);
}

} // namespace
} // namespace lissom
