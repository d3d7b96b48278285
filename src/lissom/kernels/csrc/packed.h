// The packed form of a linear layer and the table of operations on it.
//
// A matrix (rows, columns) is cut into strips of 16 rows and each strip into tiles of G columns
// (G = 32, 64 or 128). Inside a strip everything is read front to back, once:
//
//   tile = [16 x fp16 scale] [16 x u8 zero point, if not all equal] [payload] [spill list, if any]
//
// Payloads (r = row in strip, codes unsigned, contribution of one weight (code - zero) * scale * x):
//   D4   per 8 columns, per half of 8 rows: 32 bytes, byte 4r+j = column j | column 4+j << 4
//   D2   per 16 columns, per half: 32 bytes, byte 4r+j, bits 2k = column 4k+j
//   D3   per 32 columns: the low two bits as D2 (128 bytes), then per half 32 bytes, bit k of byte
//        4r+j = high bit of column 4k+j
//   D6   per 32 columns: the low four bits as D4 (256 bytes), then the high two as D2 (128 bytes)
//   D8   per 4 columns, per half: 32 bytes, byte 4r+j = code - 128, signed
//   NM4  N of each 16 columns: per 16 columns, per pair of slots: 32 bytes, byte 2r+s =
//        position | code << 4. Unused slots hold code = zero, so they add nothing.
//        With N = 0 every strip has a number of slots of its own, and rows stand in the order of what they
//        need: the matrix then begins with [strips x u8 slots] [rows x i32 row of the matrix], each
//        filled up to 64 bytes.
//   NM8  per 16 columns, per 4 slots: 32 bytes of positions (byte 4r+j: row r | row 8+r << 4), then
//        per half 32 bytes of code - 128
//   N24  2 of each 4 columns: per 16 columns 32 bytes of positions (byte 2r+s, bits 2k = position
//        inside quad k), then 64 bytes of codes (byte 2r+s of half i: quad 2i | quad 2i+1 << 4)
// Spill list: u16 count, then u16 entries row | column << 4 | code << 11.
//
// Bytes 4r+j make `maddubs` + `madd` sum four columns into eight 32-bit rows; bytes 2r+s let it sum
// two slots into sixteen 16-bit rows: no sum ever crosses lanes.
#pragma once
#include <cstddef>
#include <cstdint>

#include "columns.h"

namespace lissom {

enum Kind : int32_t { D2 = 2, D3 = 3, D4 = 4, D6 = 6, D8 = 8, NM4 = 104, NM8 = 108, N24 = 124 };
// Functions here are static: this header is compiled with several instruction sets, and copies must not mix.
constexpr int ROWS = 16;      // rows of a strip
constexpr int POSITIONS = 32; // cached positions of a block of the KV cache

struct View { // what a kernel sees of a packed matrix
    Kind kind;
    int32_t rows, columns, G, N, strips, tiles;
    int32_t zeros;     // 1: zero points stored, 0: `zero` everywhere
    int32_t zero;
    int32_t spill;     // 1: tiles end with a spill list
    int32_t tile_bytes; // header and payload (where strips have slots of their own: header), without spill list
    const uint8_t *data;
    const uint64_t *offset; // (strips + 1): byte offset of each strip
    const uint8_t *slots;   // (strips) slots of each strip, null: N
    const int32_t *order;   // (rows) which row of the matrix stands at each row of the strips, null: the same
};

struct Acts { // int8 activations with one scale for each group of G columns
    const int8_t *q;    // (tokens, stride): tiles * G each, zero padded
    const float *scale; // (tokens, tiles)
    const float *sum;   // (tokens, tiles): sum of q over the group
    int64_t stride;     // at least tiles * G
    int64_t tiles;
};

struct Ops { // one table for each instruction set
    const char *name;
    // out (tokens, 16) = strip `s` of the matrix times tokens t0 ... t0 + n - 1
    void (*strip)(const View &, int s, const Acts &, int t0, int n, float *out);
    // one token: x (columns) -> q, scale, sum
    void (*quantize)(const float *x, int columns, int G, int8_t *q, float *scale, float *sum);
    // c (r, 32) = [c +] a (r, k) . b (k, 32), b in half precision or int8, leading dimensions in elements
    void (*block16)(int r, int k, const float *a, int64_t lda, const uint16_t *b, int64_t ldb, float *c, int64_t ldc, bool add);
    void (*block8)(int r, int k, const float *a, int64_t lda, const int8_t *b, int64_t ldb, float *c, int64_t ldc, bool add);
    // 4-bit codes to signed bytes: of every `span` (16 or 32) bytes the low halves - 8, then the high halves - 8
    void (*nibbles)(const uint8_t *in, int bytes, int span, int8_t *out);
    // p = exp(p - shift), returns the sum
    float (*exps)(float *p, int n, float shift);
    void (*rmsnorm)(const float *x, const float *gain, int n, float eps, float *out);
    void (*silu_mul)(float *gate, const float *up, int n); // gate = silu(gate) * up
    // strip of binary-coded weights, see linear.h
    void (*bcq)(const uint8_t *strip, int tiles, int G, int bits, const int8_t *table, const Acts &, int t, float *out);
    // a run of columns of a sweep
    void (*decide)(const ColumnRun &);
    void (*decide_all)(const EntryRun &);
};

// Null when the compiler or the target has none.
const Ops *ops_portable();
const Ops *ops_avx2();
const Ops *ops_avx512();
const Ops *ops_neon();
const Ops *ops_neon_dot();

static inline int payload_bytes(Kind kind, int G, int N) {
    switch (kind) {
    case D2: return G * ROWS / 4;
    case D3: return G * ROWS * 3 / 8;
    case D4: return G * ROWS / 2;
    case D6: return G * ROWS * 3 / 4;
    case D8: return G * ROWS;
    case NM4: return G / 16 * N / 2 * 32;
    case NM8: return G / 16 * N / 4 * 96;
    case N24: return G / 16 * 96;
    }
    return 0;
}

// The view as strip `s` needs it.
static inline View of_strip(const View &v, int s) {
    View out = v;
    if (v.slots) out.N = v.slots[s], out.tile_bytes += payload_bytes(v.kind, v.G, out.N);
    return out;
}

// Which rows of the matrix a strip's rows are.
struct Where {
    int first, count;
    const int32_t *order;
    // f(j, row of the matrix) for the strip's rows j
    template <class F> void each(F f) const {
        if (order)
            for (int j = 0; j < count; j++) f(j, order[first + j]);
        else
            for (int j = 0; j < count; j++) f(j, first + j);
    }
};

static inline float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 1023, bits;
    if (e == 0) { // zero or subnormal: m * 2^-24 is exact
        float f = (float)m * 5.9604644775390625e-8f;
        return sign ? -f : f;
    }
    bits = e == 31 ? (sign | 0x7f800000u | (m << 13)) : (sign | ((e + 112) << 23) | (m << 13));
    float f;
    __builtin_memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t float_to_half(float f) { // round to nearest even, overflow to infinity
    uint32_t x;
    __builtin_memcpy(&x, &f, 4);
    uint32_t sign = (x >> 16) & 0x8000, a = x & 0x7fffffffu;
    if (a >= 0x7f800000u) return (uint16_t)(sign | 0x7c00 | (a > 0x7f800000u ? 0x200 : 0));
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);
    if (a < 0x38800000u) { // subnormal half: add a power of two so that the FPU does the rounding
        float g;
        __builtin_memcpy(&g, &a, 4);
        g += 0.5f;
        __builtin_memcpy(&a, &g, 4);
        return (uint16_t)(sign | (a - 0x3f000000u));
    }
    a += 0xc8000fffu + ((a >> 13) & 1);
    return (uint16_t)(sign | (a >> 13));
}

} // namespace lissom
