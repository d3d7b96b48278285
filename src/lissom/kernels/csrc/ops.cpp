// Operations that depend on the instruction set. This file is compiled once for each set, with
// LISSOM_OPS naming the table it fills; nothing here may use inline functions of the standard library,
// or the linker could keep a copy that older processors cannot run.
#include "packed.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LISSOM_AVX2 1
#endif
#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(LISSOM_AVX2)
#define LISSOM_AVX512 1
#endif
#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define LISSOM_NEON 1
#endif

namespace lissom {
namespace {

inline float absf(float x) { return x < 0 ? -x : x; }

// exp(x) for x <= 88: 2^n * p(r) with |r| <= ln2/2, relative error below 2e-7; 0 below -87
inline float exp_fast(float x) {
    const float y = x < -87.0f ? -87.0f : x;
    const float n = (y * 1.44269504089f + 12582912.0f) - 12582912.0f; // round to nearest
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return x < -87.0f ? 0.0f : p * power;
}

template <int SPAN> void nibbles_of(const uint8_t *in, int bytes, int8_t *out) {
    for (int i = 0; i < bytes; i += SPAN, in += SPAN, out += 2 * SPAN) {
#pragma omp simd
        for (int j = 0; j < SPAN; j++) out[j] = (int8_t)((in[j] & 15) - 8);
#pragma omp simd
        for (int j = 0; j < SPAN; j++) out[SPAN + j] = (int8_t)((in[j] >> 4) - 8);
    }
}
void nibbles(const uint8_t *in, int bytes, int span, int8_t *out) {
    if (span == 16)
        nibbles_of<16>(in, bytes, out);
    else
        nibbles_of<32>(in, bytes, out);
}

float exps(float *p, int n, float shift) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) {
        p[i] = exp_fast(p[i] - shift);
        sum += p[i];
    }
    return sum;
}

void rmsnorm(const float *x, const float *gain, int n, float eps, float *out) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += x[i] * x[i];
    const float scale = 1.0f / __builtin_sqrtf(sum / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * gain[i];
}

void silu_mul(float *gate, const float *up, int n) {
#pragma omp simd
    for (int i = 0; i < n; i++) {
        const float g = gate[i] < -80.0f ? -80.0f : gate[i];
        gate[i] = g / (1.0f + exp_fast(-g)) * up[i];
    }
}

void quantize(const float *x, int columns, int G, int8_t *q, float *scale, float *sum) {
    for (int at = 0, t = 0; at < columns; at += G, t++) {
        const int n = columns - at < G ? columns - at : G;
        float top = 0;
#pragma omp simd reduction(max : top)
        for (int i = 0; i < n; i++) top = absf(x[at + i]) > top ? absf(x[at + i]) : top;
        const float inverse = top > 0 ? 127.0f / top : 0.0f;
        int32_t total = 0;
#pragma omp simd reduction(+ : total)
        for (int i = 0; i < n; i++) {
            const float y = (x[at + i] * inverse + 12582912.0f) - 12582912.0f;
            q[at + i] = (int8_t)(int32_t)y;
            total += (int32_t)y;
        }
        for (int i = n; i < G; i++) q[at + i] = 0;
        scale[t] = top / 127.0f, sum[t] = (float)total;
    }
}

#ifdef LISSOM_AVX2
inline __m256 load8(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
#endif
// 32 columns of `block16` and `block8` as WIDE vectors, and how many rows of them the registers hold.
#if defined(LISSOM_AVX512)
using Wide = __m512;
constexpr int LANES = 16, MOST = 6;
inline Wide wide(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
inline Wide wide(const int8_t *p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p))); }
inline Wide wide(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, Wide v) { _mm512_storeu_ps(p, v); }
inline Wide multiply_add(float a, Wide b, Wide c) { return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c); }
#elif defined(LISSOM_AVX2)
using Wide = __m256;
constexpr int LANES = 8, MOST = 3;
inline Wide wide(const uint16_t *p) { return load8(p); }
inline Wide wide(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }
inline Wide wide(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, Wide v) { _mm256_storeu_ps(p, v); }
inline Wide multiply_add(float a, Wide b, Wide c) { return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c); }
#elif defined(LISSOM_NEON)
using Wide = float32x4_t;
constexpr int LANES = 4, MOST = 2;
inline Wide wide(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Wide wide(const int8_t *p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8((uint32_t)four)))));
}
inline Wide wide(const float *p) { return vld1q_f32(p); }
inline void store(float *p, Wide v) { vst1q_f32(p, v); }
inline Wide multiply_add(float a, Wide b, Wide c) { return vfmaq_n_f32(c, b, a); }
#else
struct Wide {
    float x;
};
constexpr int LANES = 1, MOST = 1;
inline Wide wide(const uint16_t *p) { return {half_to_float(*p)}; }
inline Wide wide(const int8_t *p) { return {(float)*p}; }
inline Wide wide(const float *p) { return {*p}; }
inline void store(float *p, Wide v) { *p = v.x; }
inline Wide multiply_add(float a, Wide b, Wide c) { return {c.x + a * b.x}; }
#endif

// R rows; a row's sums do not depend on how many rows are taken together.
template <int R, class B> void block_rows(int k, const float *a, int64_t lda, const B *b, int64_t ldb, float *c, int64_t ldc, bool add) {
    constexpr int V = 32 / LANES;
    Wide acc[R][V];
    const float none[32] = {};
    for (int r = 0; r < R; r++)
        for (int j = 0; j < V; j++) acc[r][j] = wide(add ? c + r * ldc + LANES * j : none);
    for (int i = 0; i < k; i++)
#pragma GCC unroll 8
        for (int j = 0; j < V; j++) {
            const Wide v = wide(b + i * ldb + LANES * j);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r][j] = multiply_add(a[r * lda + i], v, acc[r][j]);
        }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < V; j++) store(c + r * ldc + LANES * j, acc[r][j]);
}

// The rows that are left, R at most, in one pass over b.
template <int R, class B> void rest(int r, int k, const float *a, int64_t lda, const B *b, int64_t ldb, float *c, int64_t ldc, bool add) {
    if constexpr (R > 0) {
        if (r == R) return block_rows<R>(k, a, lda, b, ldb, c, ldc, add);
        rest<R - 1>(r, k, a, lda, b, ldb, c, ldc, add);
    }
}

template <class B> void block(int r, int k, const float *a, int64_t lda, const B *b, int64_t ldb, float *c, int64_t ldc, bool add) {
    for (; r > MOST; r -= MOST, a += MOST * lda, c += MOST * ldc) block_rows<MOST>(k, a, lda, b, ldb, c, ldc, add);
    rest<MOST>(r, k, a, lda, b, ldb, c, ldc, add);
}

} // namespace
} // namespace lissom

#include "columns_ops.h"
#if defined(LISSOM_AVX512)
#include "strip_avx512.h"
#elif defined(LISSOM_AVX2)
#include "strip_avx2.h"
#elif defined(LISSOM_NEON)
#include "strip_neon.h"
#else
#include "strip_portable.h"
#endif
#ifdef LISSOM_AVX2
#include "bcq_avx2.h"
#else
#include "bcq_portable.h"
#endif

namespace lissom {
namespace {
void any_strip(const View &v, int s, const Acts &x, int t0, int n, float *out) {
    if (v.slots) return strip(of_strip(v, s), s, x, t0, n, out);
    strip(v, s, x, t0, n, out);
}
} // namespace

// null where the compiler has not what the table is named for
const Ops *LISSOM_OPS() {
#if (defined(LISSOM_WANT_AVX2) && !defined(LISSOM_AVX2)) || (defined(LISSOM_WANT_AVX512) && !defined(LISSOM_AVX512)) || \
    (defined(LISSOM_WANT_NEON) && !defined(LISSOM_NEON))
    return nullptr;
#else
    static const Ops table = {LISSOM_OPS_NAME, any_strip, quantize, block<uint16_t>, block<int8_t>, nibbles, exps, rmsnorm, silu_mul, bcq_strip, decide, decide_all};
    return &table;
#endif
}
} // namespace lissom
