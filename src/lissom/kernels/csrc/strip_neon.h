// Strips with NEON, with or without the dot product instructions. Sums are the same integers as everywhere else.
#pragma once
#include "packed.h"
#include <arm_neon.h>

namespace lissom {
namespace {

// Each 32-bit lane of acc += four products s8 x s8. Without the instruction two products meet in 16 bits first, which holds
// -128 * 127 * 2.
inline int32x4_t dot(int32x4_t acc, int8x16_t a, int8x16_t b) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(acc, a, b);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
    return vpadalq_s16(acc, vpaddq_s16(low, high));
#endif
}
inline int8x16_t four(const int8_t *q) { // four activations to every 32-bit lane
    int32_t v;
    __builtin_memcpy(&v, q, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(v));
}

struct Tile { // scales and zero points, four rows in each of four vectors
    float32x4_t scale[4];
    int32x4_t zero[4];
};
inline Tile head(const View &v, const uint8_t *tile) {
    Tile h;
    for (int i = 0; i < 4; i++) {
        h.scale[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(tile + 8 * i))));
        if (v.zeros) {
            int32_t z[4];
            for (int r = 0; r < 4; r++) z[r] = tile[32 + 4 * i + r];
            h.zero[i] = vld1q_s32(z);
        } else
            h.zero[i] = vdupq_n_s32(v.zero);
    }
    return h;
}

// Codes of a quad of columns inside a block of 32, rows 4i ... 4i+3: signed for D8 (code - 128), else unsigned and below 64.
template <int K> inline int8x16_t codes(const uint8_t *b, int i, int step) {
    const auto at = [&](int offset) { return vld1q_u8(b + offset + 16 * i); };
    const auto right = [](uint8x16_t v, int n) { return vshlq_u8(v, vdupq_n_s8((int8_t)-n)); };
    const auto bits = [](uint8x16_t v, int mask) { return vandq_u8(v, vdupq_n_u8((uint8_t)mask)); };
    uint8x16_t code;
    switch (K) {
    case D8: return vreinterpretq_s8_u8(at(step * 64));
    case D4: code = bits(right(at(step / 2 * 64), step % 2 * 4), 15); break;
    case D2: code = bits(right(at(step / 4 * 64), step % 4 * 2), 3); break;
    case D3: code = vorrq_u8(bits(right(at(step / 4 * 64), step % 4 * 2), 3), bits(right(at(128), step - 2), 4)); break;
    default: // D6
        code = vorrq_u8(bits(right(at(step / 2 * 64), step % 2 * 4), 15), bits(right(at(256 + step / 4 * 64), step % 4 * 2 - 4), 48));
    }
    return vreinterpretq_s8_u8(code);
}

template <int K, int T> void dense(const View &v, const uint8_t *tile, const Acts &x, int t0, float *out) {
    const int block = payload_bytes((Kind)K, 32, 0), header = 32 + (v.zeros ? 16 : 0);
    const int8_t *q = x.q + (int64_t)t0 * x.stride;
    for (int t = 0; t < v.tiles; t++, tile += v.tile_bytes) {
        int32x4_t sum[T][4];
        for (int i = 0; i < T; i++)
            for (int r = 0; r < 4; r++) sum[i][r] = vdupq_n_s32(0);
        const uint8_t *p = tile + header;
        for (int c = 0; c < v.G; c += 32, p += block, q += 32)
#pragma GCC unroll 8
            for (int s = 0; s < 8; s++)
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    const int8x16_t w = codes<K>(p, r, s);
#pragma GCC unroll 8
                    for (int i = 0; i < T; i++) sum[i][r] = dot(sum[i][r], w, four(q + i * x.stride + 4 * s));
                }
        const Tile h = head(v, tile);
        for (int i = 0; i < T; i++) {
            const int64_t at = (int64_t)(t0 + i) * x.tiles + t;
            for (int r = 0; r < 4; r++) {
                const float32x4_t zero = vcvtq_f32_s32(vsubq_s32(h.zero[r], vdupq_n_s32(K == D8 ? 128 : 0)));
                const float32x4_t y = vfmsq_n_f32(vcvtq_f32_s32(sum[i][r]), zero, x.sum[at]);
                float *o = out + i * ROWS + 4 * r;
                vst1q_f32(o, vfmaq_f32(vld1q_f32(o), y, vmulq_n_f32(h.scale[r], x.scale[at])));
            }
        }
    }
}

struct Slots { // four slots of each of four rows
    uint8x16_t place;
    int8x16_t weight; // code - zero; NM8: code - 128
};

// Slots of 16 columns, four at a time (`k`), rows 4r ... 4r+3; the last two of an N that is not a multiple of four are empty.
inline Slots slots(const View &v, const uint8_t *p, int k, int r, int8x16_t zero) {
    const uint8x16_t low = vdupq_n_u8(15);
    // bytes 2r+s of two vectors to bytes 4r+s and 4r+2+s
    const auto mix = [](const uint8_t *a, const uint8_t *b) {
        return vreinterpretq_u8_u16(vzip1q_u16(vreinterpretq_u16_u8(vcombine_u8(vld1_u8(a), vdup_n_u8(0))),
                                               vreinterpretq_u16_u8(vcombine_u8(vld1_u8(b), vdup_n_u8(0)))));
    };
    if (v.kind == NM8) {
        const uint8x16_t both = vld1q_u8(p + 96 * k + 16 * (r % 2));
        return {r < 2 ? vandq_u8(both, low) : vshrq_n_u8(both, 4), vreinterpretq_s8_u8(vld1q_u8(p + 96 * k + 32 + 16 * r))};
    }
    if (v.kind == N24) { // quads 2k and 2k + 1
        const uint8x16_t two = mix(p + 8 * r, p + 8 * r), code = mix(p + 32 + 32 * k + 8 * r, p + 32 + 32 * k + 8 * r);
        const int8x16_t by = vreinterpretq_s8_u32(vdupq_n_u32(k ? 0xfafafcfcu : 0xfefe0000u)); // right by 2 bits for each quad
        const uint8x16_t base = vreinterpretq_u8_u32(vdupq_n_u32(k ? 0x0c0c0808u : 0x04040000u));
        const uint8x16_t place = vorrq_u8(vandq_u8(vshlq_u8(two, by), vdupq_n_u8(3)), base);
        const uint8x16_t value = vandq_u8(vshlq_u8(code, vreinterpretq_s8_u32(vdupq_n_u32(0xfcfc0000u))), low);
        return {place, vsubq_s8(vreinterpretq_s8_u8(value), zero)};
    }
    const uint8_t *a = p + 64 * k + 8 * r;
    const bool whole = 4 * k + 2 < v.N;
    const uint8x16_t b = mix(a, whole ? a + 32 : a);
    int8x16_t weight = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(b, 4)), zero);
    if (!whole) weight = vandq_s8(weight, vreinterpretq_s8_u32(vdupq_n_u32(0x0000ffffu)));
    return {vandq_u8(b, low), weight};
}

template <int T> void gathered(const View &v, const uint8_t *tile, const Acts &x, int t0, float *out) {
    const int header = 32 + (v.zeros ? 16 : 0), fours = v.kind == N24 ? 2 : (v.N + 3) / 4, step = payload_bytes(v.kind, 16, v.N);
    const int8_t *q = x.q + (int64_t)t0 * x.stride;
    const bool shifted = v.kind == NM8 && (v.zeros || v.zero != 128); // then the sum of gathered activations is needed too
    for (int t = 0; t < v.tiles; t++) {
        const Tile h = head(v, tile);
        int8x16_t zero[4]; // zero of row r in bytes 4r ... 4r + 3
        for (int r = 0; r < 4; r++) zero[r] = vreinterpretq_s8_s32(vmulq_n_s32(h.zero[r], 0x01010101));
        int32x4_t sum[T][4], plain[T][4];
        for (int i = 0; i < T; i++)
            for (int r = 0; r < 4; r++) sum[i][r] = plain[i][r] = vdupq_n_s32(0);
        const uint8_t *p = tile + header;
        for (int g = 0; g < v.G / 16; g++, p += step, q += 16)
            for (int k = 0; k < fours; k++)
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    const Slots s = slots(v, p, k, r, zero[r]);
#pragma GCC unroll 8
                    for (int i = 0; i < T; i++) {
                        const int8x16_t y = vqtbl1q_s8(vld1q_s8(q + i * x.stride), s.place);
                        sum[i][r] = dot(sum[i][r], s.weight, y);
                        if (shifted) plain[i][r] = dot(plain[i][r], vdupq_n_s8(1), y);
                    }
                }
        const uint8_t *end = tile + v.tile_bytes;
        if (v.spill) {
            uint16_t count, e;
            __builtin_memcpy(&count, end, 2), end += 2;
            for (int i = 0; i < T && count; i++) {
                const int8_t *here = q - v.G + i * x.stride;
                int32_t part[ROWS];
                for (int r = 0; r < 4; r++) vst1q_s32(part + 4 * r, sum[i][r]);
                for (int j = 0; j < count; j++) {
                    __builtin_memcpy(&e, end + 2 * j, 2);
                    const int r = e & 15, z = v.zeros ? tile[32 + r] : v.zero;
                    part[r] += ((e >> 11) - z) * here[e >> 4 & 127];
                }
                for (int r = 0; r < 4; r++) sum[i][r] = vld1q_s32(part + 4 * r);
            }
            end += 2 * count;
        }
        for (int i = 0; i < T; i++) {
            const float sx = x.scale[(int64_t)(t0 + i) * x.tiles + t];
            for (int r = 0; r < 4; r++) {
                float32x4_t y = vcvtq_f32_s32(sum[i][r]);
                if (shifted) y = vfmsq_f32(y, vcvtq_f32_s32(vsubq_s32(h.zero[r], vdupq_n_s32(128))), vcvtq_f32_s32(plain[i][r]));
                float *o = out + i * ROWS + 4 * r;
                vst1q_f32(o, vfmaq_f32(vld1q_f32(o), y, vmulq_n_f32(h.scale[r], sx)));
            }
        }
        tile = end;
    }
}

using Tokens = void (*)(const View &, const uint8_t *, const Acts &, int, float *);

template <int T> Tokens kernel(const View &v) {
    switch (v.kind) {
    case D2: return dense<D2, T>;
    case D3: return dense<D3, T>;
    case D4: return dense<D4, T>;
    case D6: return dense<D6, T>;
    case D8: return dense<D8, T>;
    default: return gathered<T>;
    }
}

void strip(const View &v, int s, const Acts &x, int t0, int n, float *out) {
    const uint8_t *p = v.data + v.offset[s];
    for (int i = 0; i < n * ROWS; i++) out[i] = 0;
    int t = 0;
    for (const Tokens f = kernel<4>(v); t + 4 <= n; t += 4) f(v, p, x, t0 + t, out + t * ROWS);
    for (const Tokens f = kernel<1>(v); t < n; t++) f(v, p, x, t0 + t, out + t * ROWS);
}

} // namespace
} // namespace lissom
