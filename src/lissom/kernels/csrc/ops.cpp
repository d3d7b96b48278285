// Operations that depend on the instruction set. This file is compiled once for each set, with
// LISSOM_OPS naming the table it fills; nothing here may use inline functions of the standard library,
// or the linker could keep a copy that older processors cannot run.
#include "packed.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LISSOM_AVX2 1
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
inline __m256 load8(const int8_t *p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p))); }

template <int R, class B> void block_rows(int k, const float *a, int64_t lda, const B *b, int64_t ldb, float *c, int64_t ldc, bool add) {
    __m256 acc[R][4];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 4; j++) acc[r][j] = add ? _mm256_loadu_ps(c + r * ldc + 8 * j) : _mm256_setzero_ps();
    for (int i = 0; i < k; i++)
        for (int j = 0; j < 4; j++) {
            const __m256 v = load8(b + i * ldb + 8 * j);
            for (int r = 0; r < R; r++) acc[r][j] = _mm256_fmadd_ps(_mm256_broadcast_ss(a + r * lda + i), v, acc[r][j]);
        }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < 4; j++) _mm256_storeu_ps(c + r * ldc + 8 * j, acc[r][j]);
}

template <class B> void block(int r, int k, const float *a, int64_t lda, const B *b, int64_t ldb, float *c, int64_t ldc, bool add) {
    for (; r >= 3; r -= 3, a += 3 * lda, c += 3 * ldc) block_rows<3>(k, a, lda, b, ldb, c, ldc, add);
    if (r == 2) block_rows<2>(k, a, lda, b, ldb, c, ldc, add);
    if (r == 1) block_rows<1>(k, a, lda, b, ldb, c, ldc, add);
}
#else
inline float load1(const uint16_t *p) { return half_to_float(*p); }
inline float load1(const int8_t *p) { return (float)*p; }

template <class B> void block(int rows, int k, const float *a, int64_t lda, const B *b, int64_t ldb, float *c, int64_t ldc, bool add) {
    if (!add)
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < 32; j++) c[r * ldc + j] = 0;
    for (int i = 0; i < k; i++) {
        float row[32];
        for (int j = 0; j < 32; j++) row[j] = load1(b + i * ldb + j);
        for (int r = 0; r < rows; r++)
            for (int j = 0; j < 32; j++) c[r * ldc + j] += a[r * lda + i] * row[j];
    }
}
#endif

} // namespace
} // namespace lissom

#include "columns_ops.h"
#ifdef LISSOM_AVX2
#include "strip_avx2.h"
#else
#include "strip_portable.h"
#endif

namespace lissom {
const Ops *LISSOM_OPS() {
#if defined(LISSOM_WANT_AVX2) && !defined(LISSOM_AVX2)
    return nullptr; // the compiler has no AVX2 for this target
#else
    static const Ops table = {LISSOM_OPS_NAME, strip, quantize, block<uint16_t>, block<int8_t>, nibbles, exps, rmsnorm, silu_mul, bcq_strip, decide};
    return &table;
#endif
}
} // namespace lissom
