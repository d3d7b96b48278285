// Strips with AVX2. T tokens share each unpacked vector of weights.
//
// Overflow: maddubs adds two products u8 x s8 in 16 bits. Activations are within +-127, so one step adds
// at most 2 * 127 * top; `acc` takes eight steps for top = 15 (30480) before it moves to 32 bits.
#pragma once
#include "packed.h"
#include <immintrin.h>

namespace lissom {
namespace {

template <int> struct Constant {};

inline __m256i load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
inline __m256i four(const int8_t *q) { // four activations to every 32-bit lane
    int32_t v;
    __builtin_memcpy(&v, q, 4);
    return _mm256_set1_epi32(v);
}

struct Head { // scales and zero points of a tile, rows 0-7 and 8-15
    __m256 scale[2], zero[2];
    __m256i bytes; // zero of row r in bytes 2r, 2r+1
};

inline Head head(const View &v, const uint8_t *tile) {
    Head h;
    h.scale[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)tile));
    h.scale[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(tile + 16)));
    if (v.zeros) {
        const __m128i z = _mm_loadu_si128((const __m128i *)(tile + 32));
        h.zero[0] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(z));
        h.zero[1] = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(z, 8)));
        h.bytes = _mm256_set_m128i(_mm_unpackhi_epi8(z, z), _mm_unpacklo_epi8(z, z));
    } else {
        h.zero[0] = h.zero[1] = _mm256_set1_ps((float)v.zero);
        h.bytes = _mm256_set1_epi8((char)v.zero);
    }
    return h;
}

inline __m256i widen(__m256i sum, __m256i acc) { // acc32 += pairs of 16-bit sums
    return _mm256_add_epi32(acc, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
}

// Asks for the bytes that are read a page later, when single tokens are decoded: on a Zen 3 worth a third with one thread, a quarter
// with two (benchmarks/RUNTIME.md). A Zen 4 loses a quarter by it, and runs the kernels of strip_avx512.h, which do not.
constexpr int AHEAD = 4096;
template <int T> inline void ahead(const uint8_t *tile, int bytes) {
    if constexpr (T == 1)
        for (int i = 0; i < bytes; i += 64) _mm_prefetch((const char *)tile + AHEAD + i, _MM_HINT_T0);
}

inline void finish(__m256i a, __m256 scale, float sx, float *out) {
    _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), _mm256_mul_ps(scale, _mm256_set1_ps(sx)), _mm256_loadu_ps(out)));
}

// Codes (0 ... 15) of one quad of columns inside a block of 32, eight rows x four columns.
template <int K> inline __m256i codes(const uint8_t *block, int half, int step);
template <> inline __m256i codes<D4>(const uint8_t *b, int half, int step) {
    const __m256i v = load(b + step / 2 * 64 + half * 32);
    return _mm256_and_si256(step % 2 ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
}
template <> inline __m256i codes<D2>(const uint8_t *b, int half, int step) {
    return _mm256_and_si256(_mm256_srli_epi16(load(b + step / 4 * 64 + half * 32), step % 4 * 2), _mm256_set1_epi8(3));
}
template <> inline __m256i codes<D3>(const uint8_t *b, int half, int step) {
    const __m256i h = load(b + 128 + half * 32);
    const __m256i high = step < 2 ? _mm256_slli_epi16(h, 2 - step) : _mm256_srli_epi16(h, step - 2);
    return _mm256_or_si256(codes<D2>(b, half, step), _mm256_and_si256(high, _mm256_set1_epi8(4)));
}

template <> inline __m256i codes<D6>(const uint8_t *b, int half, int step) {
    const __m256i h = load(b + 256 + step / 4 * 64 + half * 32);
    const int k = step % 4; // bits 2k, 2k + 1 go to bits 4, 5
    const __m256i high = k < 2 ? _mm256_slli_epi16(h, 4 - 2 * k) : _mm256_srli_epi16(h, 2 * k - 4);
    return _mm256_or_si256(codes<D4>(b, half, step), _mm256_and_si256(high, _mm256_set1_epi8(48)));
}

template <int K, int T, int FROM, int COUNT> struct Quads { // unrolls the quads of a block at compile time
    static inline void run(const uint8_t *b, const int8_t *q, int64_t stride, __m256i (&acc)[T][2]) {
        constexpr int S = FROM + COUNT;
        Quads<K, T, FROM, COUNT - 1>::run(b, q, stride, acc);
        const __m256i w0 = codes<K>(b, 0, S - 1), w1 = codes<K>(b, 1, S - 1);
#pragma GCC unroll 8
        for (int i = 0; i < T; i++) {
            const __m256i x = four(q + i * stride + 4 * (S - 1));
            acc[i][0] = _mm256_add_epi16(acc[i][0], _mm256_maddubs_epi16(w0, x));
            acc[i][1] = _mm256_add_epi16(acc[i][1], _mm256_maddubs_epi16(w1, x));
        }
    }
};
template <int K, int T, int FROM> struct Quads<K, T, FROM, 0> {
    static inline void run(const uint8_t *, const int8_t *, int64_t, __m256i (&)[T][2]) {}
};

// The eight quads of a block, as many at a time as 16 bits can sum: 63 · 127 · 2 fits twice, 15 · 127 · 2 eight times.
template <int K, int T, int FROM> struct Eight {
    static inline void run(const uint8_t *b, const int8_t *q, int64_t stride, __m256i (&sum)[T][2]) {
        constexpr int COUNT = K == D6 ? 2 : 8;
        __m256i acc[T][2];
        for (int i = 0; i < T; i++) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
        Quads<K, T, FROM, COUNT>::run(b, q, stride, acc);
        for (int i = 0; i < T; i++)
            for (int half = 0; half < 2; half++) sum[i][half] = widen(acc[i][half], sum[i][half]);
        Eight<K, T, FROM + COUNT>::run(b, q, stride, sum);
    }
};
template <int K, int T> struct Eight<K, T, 8> {
    static inline void run(const uint8_t *, const int8_t *, int64_t, __m256i (&)[T][2]) {}
};

template <int K, int T> void dense(const View &v, const uint8_t *tile, const Acts &x, int t0, float *out) {
    const int block = payload_bytes((Kind)K, 32, 0), header = 32 + (v.zeros ? 16 : 0);
    const int8_t *q = x.q + (int64_t)t0 * x.stride;
    for (int t = 0; t < v.tiles; t++, tile += v.tile_bytes) {
        ahead<T>(tile, v.tile_bytes);
        __m256i sum[T][2];
        for (int i = 0; i < T; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        const uint8_t *p = tile + header;
        for (int c = 0; c < v.G; c += 32, p += block, q += 32) {
            Eight<K, T, 0>::run(p, q, x.stride, sum);
        }
        const Head h = head(v, tile);
        for (int i = 0; i < T; i++) {
            const int64_t at = (int64_t)(t0 + i) * x.tiles + t;
            const __m256 total = _mm256_set1_ps(x.sum[at]), sx = _mm256_set1_ps(x.scale[at]);
            for (int half = 0; half < 2; half++) {
                float *o = out + i * ROWS + 8 * half;
                const __m256 y = _mm256_fnmadd_ps(h.zero[half], total, _mm256_cvtepi32_ps(sum[i][half]));
                _mm256_storeu_ps(o, _mm256_fmadd_ps(y, _mm256_mul_ps(h.scale[half], sx), _mm256_loadu_ps(o)));
            }
        }
    }
}

template <int T> void dense8(const View &v, const uint8_t *tile, const Acts &x, int t0, float *out) {
    const int header = 32 + (v.zeros ? 16 : 0);
    const int8_t *q = x.q + (int64_t)t0 * x.stride;
    const __m256 middle = _mm256_set1_ps(128);
    for (int t = 0; t < v.tiles; t++, tile += v.tile_bytes) {
        ahead<T>(tile, v.tile_bytes);
        __m256i sum[T][2];
        for (int i = 0; i < T; i++) sum[i][0] = sum[i][1] = _mm256_setzero_si256();
        const uint8_t *p = tile + header;
        for (int c = 0; c < v.G; c += 4, p += 64, q += 4) {
            const __m256i w0 = load(p), w1 = load(p + 32), a0 = _mm256_abs_epi8(w0), a1 = _mm256_abs_epi8(w1);
#pragma GCC unroll 8
            for (int i = 0; i < T; i++) {
                const __m256i y = four(q + i * x.stride);
                sum[i][0] = widen(_mm256_maddubs_epi16(a0, _mm256_sign_epi8(y, w0)), sum[i][0]);
                sum[i][1] = widen(_mm256_maddubs_epi16(a1, _mm256_sign_epi8(y, w1)), sum[i][1]);
            }
        }
        const Head h = head(v, tile);
        for (int i = 0; i < T; i++) {
            const int64_t at = (int64_t)(t0 + i) * x.tiles + t;
            const __m256 total = _mm256_set1_ps(x.sum[at]), sx = _mm256_set1_ps(x.scale[at]);
            for (int half = 0; half < 2; half++) {
                float *o = out + i * ROWS + 8 * half;
                const __m256 zero = _mm256_sub_ps(h.zero[half], middle);
                const __m256 y = _mm256_fnmadd_ps(zero, total, _mm256_cvtepi32_ps(sum[i][half]));
                _mm256_storeu_ps(o, _mm256_fmadd_ps(y, _mm256_mul_ps(h.scale[half], sx), _mm256_loadu_ps(o)));
            }
        }
    }
}

inline __m256i sixteen(const int8_t *q) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)q)); }

// Position and code of slot pair `k` of sixteen columns; N24 addresses inside its quad.
template <int K> inline void slot(const uint8_t *p, int k, __m256i &position, __m256i &code) {
    const __m256i low = _mm256_set1_epi8(15);
    if (K == N24) {
        const __m256i two = _mm256_and_si256(_mm256_srli_epi16(load(p), 2 * k), _mm256_set1_epi8(3));
        const __m256i c = load(p + 32 + k / 2 * 32);
        position = _mm256_or_si256(two, _mm256_set1_epi8((char)(4 * k)));
        code = _mm256_and_si256(k % 2 ? _mm256_srli_epi16(c, 4) : c, low);
    } else {
        const __m256i b = load(p + 32 * k);
        position = _mm256_and_si256(b, low);
        code = _mm256_and_si256(_mm256_srli_epi16(b, 4), low);
    }
}

// P = slot pairs of sixteen columns.
template <int K, int P, int T> void gathered(const View &v, const uint8_t *tile, const Acts &x, int t0, float *out) {
    constexpr int FLUSH = 8 / P > 0 ? 8 / P : 1; // groups of sixteen columns whose sums fit 16 bits
    const int header = 32 + (v.zeros ? 16 : 0), step = K == N24 ? 96 : 32 * P;
    const int8_t *q = x.q + (int64_t)t0 * x.stride;
    for (int t = 0; t < v.tiles; t++) {
        ahead<T>(tile, v.tile_bytes);
        const Head h = head(v, tile);
        __m256i sum[T][2], acc[T];
        for (int i = 0; i < T; i++) sum[i][0] = sum[i][1] = acc[i] = _mm256_setzero_si256();
        const uint8_t *p = tile + header;
        const int groups = v.G / 16;
        for (int g = 0; g < groups; g++, p += step, q += 16) {
#pragma GCC unroll 8
            for (int k = 0; k < P; k++) {
                __m256i position, code;
                slot<K>(p, k, position, code);
                const __m256i w = _mm256_sub_epi8(code, h.bytes), a = _mm256_abs_epi8(w);
#pragma GCC unroll 8
                for (int i = 0; i < T; i++) {
                    const __m256i y = _mm256_shuffle_epi8(sixteen(q + i * x.stride), position);
                    acc[i] = _mm256_add_epi16(acc[i], _mm256_maddubs_epi16(a, _mm256_sign_epi8(y, w)));
                }
            }
            if ((g + 1) % FLUSH == 0 || g + 1 == groups)
                for (int i = 0; i < T; i++) {
                    sum[i][0] = _mm256_add_epi32(sum[i][0], _mm256_cvtepi16_epi32(_mm256_castsi256_si128(acc[i])));
                    sum[i][1] = _mm256_add_epi32(sum[i][1], _mm256_cvtepi16_epi32(_mm256_extracti128_si256(acc[i], 1)));
                    acc[i] = _mm256_setzero_si256();
                }
        }
        const uint8_t *end = tile + v.tile_bytes;
        if (v.spill) {
            uint16_t count, e;
            __builtin_memcpy(&count, end, 2), end += 2;
            for (int i = 0; i < T && count; i++) {
                const int8_t *here = q - v.G + i * x.stride;
                alignas(32) int32_t part[ROWS];
                _mm256_store_si256((__m256i *)part, sum[i][0]), _mm256_store_si256((__m256i *)(part + 8), sum[i][1]);
                for (int j = 0; j < count; j++) {
                    __builtin_memcpy(&e, end + 2 * j, 2);
                    const int r = e & 15, zero = v.zeros ? tile[32 + r] : v.zero;
                    part[r] += ((e >> 11) - zero) * here[e >> 4 & 127];
                }
                sum[i][0] = _mm256_load_si256((__m256i *)part), sum[i][1] = _mm256_load_si256((__m256i *)(part + 8));
            }
            end += 2 * count;
        }
        for (int i = 0; i < T; i++) {
            const float sx = x.scale[(int64_t)(t0 + i) * x.tiles + t];
            finish(sum[i][0], h.scale[0], sx, out + i * ROWS), finish(sum[i][1], h.scale[1], sx, out + i * ROWS + 8);
        }
        tile = end;
    }
}

template <int T> void gathered8(const View &v, const uint8_t *tile, const Acts &x, int t0, float *out) {
    const int header = 32 + (v.zeros ? 16 : 0), fours = v.N / 4;
    const int8_t *q = x.q + (int64_t)t0 * x.stride;
    const bool shifted = v.zeros || v.zero != 128; // then the sum of gathered activations is needed too
    const __m256i low = _mm256_set1_epi8(15), one = _mm256_set1_epi8(1);
    for (int t = 0; t < v.tiles; t++, tile += v.tile_bytes) {
        ahead<T>(tile, v.tile_bytes);
        __m256i sum[T][2], plain[T][2];
        for (int i = 0; i < T; i++) sum[i][0] = sum[i][1] = plain[i][0] = plain[i][1] = _mm256_setzero_si256();
        const uint8_t *p = tile + header;
        for (int g = 0; g < v.G / 16; g++, q += 16)
            for (int k = 0; k < fours; k++, p += 96) {
                const __m256i both = load(p);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const __m256i position = _mm256_and_si256(half ? _mm256_srli_epi16(both, 4) : both, low);
                    const __m256i w = load(p + 32 + 32 * half), a = _mm256_abs_epi8(w);
#pragma GCC unroll 8
                    for (int i = 0; i < T; i++) {
                        const __m256i y = _mm256_shuffle_epi8(sixteen(q + i * x.stride), position);
                        sum[i][half] = widen(_mm256_maddubs_epi16(a, _mm256_sign_epi8(y, w)), sum[i][half]);
                        if (shifted) plain[i][half] = widen(_mm256_maddubs_epi16(one, y), plain[i][half]);
                    }
                }
            }
        const Head h = head(v, tile);
        for (int i = 0; i < T; i++) {
            const __m256 sx = _mm256_set1_ps(x.scale[(int64_t)(t0 + i) * x.tiles + t]);
            for (int half = 0; half < 2; half++) {
                float *o = out + i * ROWS + 8 * half;
                const __m256 zero = _mm256_sub_ps(h.zero[half], _mm256_set1_ps(128));
                const __m256 y = _mm256_fnmadd_ps(zero, _mm256_cvtepi32_ps(plain[i][half]), _mm256_cvtepi32_ps(sum[i][half]));
                _mm256_storeu_ps(o, _mm256_fmadd_ps(y, _mm256_mul_ps(h.scale[half], sx), _mm256_loadu_ps(o)));
            }
        }
    }
}

using Tokens = void (*)(const View &, const uint8_t *, const Acts &, int, float *);

template <int K, int T> Tokens gather_by_pairs(int pairs) {
    switch (pairs) {
    case 1: return gathered<K, 1, T>;
    case 2: return gathered<K, 2, T>;
    case 3: return gathered<K, 3, T>;
    case 4: return gathered<K, 4, T>;
    case 5: return gathered<K, 5, T>;
    case 6: return gathered<K, 6, T>;
    case 7: return gathered<K, 7, T>;
    default: return gathered<K, 8, T>;
    }
}

template <int T> Tokens kernel(const View &v) {
    switch (v.kind) {
    case D2: return dense<D2, T>;
    case D3: return dense<D3, T>;
    case D4: return dense<D4, T>;
    case D6: return dense<D6, T>;
    case D8: return dense8<T>;
    case NM4: return gather_by_pairs<NM4, T>(v.N / 2);
    case NM8: return gathered8<T>;
    default: return gathered<N24, 4, T>;
    }
}

void strip(const View &v, int s, const Acts &x, int t0, int n, float *out) {
    const uint8_t *p = v.data + v.offset[s];
    for (int i = 0; i < n * ROWS; i++) out[i] = 0;
    int t = 0;
    if (v.kind == NM4 || v.kind == N24) // the gather leaves registers for eight tokens
        for (const Tokens f = kernel<8>(v); t + 8 <= n; t += 8) f(v, p, x, t0 + t, out + t * ROWS);
    for (const Tokens f = kernel<4>(v); t + 4 <= n; t += 4) f(v, p, x, t0 + t, out + t * ROWS);
    if (n - t >= 2) kernel<2>(v)(v, p, x, t0 + t, out + t * ROWS), t += 2;
    if (n - t >= 1) kernel<1>(v)(v, p, x, t0 + t, out + t * ROWS);
}

} // namespace
} // namespace lissom
