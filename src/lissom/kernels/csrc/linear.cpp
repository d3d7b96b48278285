#include "linear.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace lissom {

const std::vector<const Ops *> &all_ops() {
    static const std::vector<const Ops *> all = [] {
        std::vector<const Ops *> out;
        const auto add = [&](bool has, const Ops *ops) {
            if (has && ops) out.push_back(ops);
        };
#if defined(__x86_64__)
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
        add(avx512, ops_avx512());
        add(avx2, ops_avx2());
#elif defined(__aarch64__)
#if defined(__linux__)
        const bool dot = getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
        const bool dot = true; // every Apple processor with this instruction set in 64 bits since 2019
#endif
        add(dot, ops_neon_dot());
        add(true, ops_neon());
#endif
        add(true, ops_portable());
        return out;
    }();
    return all;
}

const Ops *best_ops() {
    const char *wish = std::getenv("LISSOM_ISA");
    if (!wish || !*wish) return all_ops().front();
    std::string names;
    for (const Ops *ops : all_ops()) {
        if (std::strcmp(wish, ops->name) == 0) return ops;
        names += (names.empty() ? "" : ", ") + std::string(ops->name);
    }
    throw std::invalid_argument("LISSOM_ISA is " + std::string(wish) + ": this processor and this build have " + names);
}

void linear(const Ops *ops, Pool &pool, const View &v, const float *x, int tokens, float *y) {
    Quantized a;
    a.reserve(tokens, v.columns, v.G);
    Ticket rows;
    pool.run([&](int thread) {
        for (int t = thread; t < tokens; t += pool.threads()) a.set(ops, t, x + (size_t)t * v.columns);
        pool.barrier();
        const Acts acts = a.acts();
        std::vector<float> out((size_t)tokens * ROWS);
        for (int from, to; rows.take(v.strips, 2, from, to);)
            for (int s = from; s < to; s++) {
                ops->strip(v, s, acts, 0, tokens, out.data());
                const Where row = {s * ROWS, std::min(ROWS, v.rows - s * ROWS), v.order};
                for (int t = 0; t < tokens; t++) {
                    float *to = y + (size_t)t * v.rows;
                    row.each([&, one = &out[(size_t)t * ROWS]](int j, int r) { to[r] = one[j]; });
                }
            }
    });
}

std::unique_ptr<Bcq> pack_bcq(int rows, int columns, int width, int bits, const uint8_t *signs, const float *alpha,
                              const float *offset, int G) {
    const int groups = (columns + width - 1) / width;
    if ((G != 32 && G != 64 && G != 128) || (groups > 1 && width % G) || columns % G)
        throw std::invalid_argument("tiles of 32, 64 or 128 columns must divide the columns and the groups");
    auto m = std::make_unique<Bcq>();
    m->rows = rows, m->columns = columns, m->G = G, m->bits = bits;
    m->strips = (rows + ROWS - 1) / ROWS, m->tiles = columns / G;
    m->own.assign((size_t)m->strips * m->strip_bytes() + SLACK, 0);
    m->data = m->own.data();
    uint8_t *p = m->own.data();
    for (int s = 0; s < m->strips; s++)
        for (int t = 0; t < m->tiles; t++) {
            const int group = t * G / width;
            for (int b = 0; b <= bits; b++)
                for (int r = 0; r < ROWS && s * ROWS + r < rows; r++) {
                    const size_t at = (size_t)(s * ROWS + r) * groups + group;
                    const uint16_t half = float_to_half(b < bits ? alpha[(size_t)b * rows * groups + at] : offset[at]);
                    std::memcpy(p + 32 * b + 2 * r, &half, 2);
                }
            p += 32 * (bits + 1);
            for (int b = 0; b < bits; b++, p += G * ROWS / 8)
                for (int r = 0; r < ROWS && s * ROWS + r < rows; r++)
                    for (int c = 0; c < G; c++)
                        if (signs[((size_t)b * rows + s * ROWS + r) * columns + t * G + c]) {
                            const int quad = c / 4;
                            p[quad / 4 * 32 + quad % 2 * 16 + r] |= (uint8_t)(1 << (quad % 4 / 2 * 4 + c % 4));
                        }
        }
    return m;
}

std::unique_ptr<Bcq> borrow_bcq(int rows, int columns, int G, int bits, const uint8_t *data, size_t size) {
    if (rows < 1 || columns < 1 || bits < 1 || bits > 8 || (G != 32 && G != 64 && G != 128) || columns % G)
        throw std::invalid_argument("no such binary-coded matrix");
    auto m = std::make_unique<Bcq>();
    m->rows = rows, m->columns = columns, m->G = G, m->bits = bits;
    m->strips = (rows + ROWS - 1) / ROWS, m->tiles = columns / G, m->data = data;
    if ((size_t)m->strips * m->strip_bytes() + SLACK > size) throw std::invalid_argument("the data of a matrix is cut short");
    return m;
}

void sign_sums(const int8_t *q, int columns, int8_t *table) {
    for (int quad = 0; quad < columns / 4; quad++, q += 4) {
        int sum[16];
        sum[0] = -q[0] - q[1] - q[2] - q[3];
        int8_t *entry = table + (size_t)quad / 2 * 64 + quad % 2 * 16;
        for (int i = 0; i < 16; i++) {
            if (i) sum[i] = sum[i & (i - 1)] + 2 * q[__builtin_ctz(i)];
            entry[i] = (int8_t)(sum[i] & 255), entry[32 + i] = (int8_t)(sum[i] >> 8);
        }
    }
}

void linear_bcq(const Ops *ops, Pool &pool, const Bcq &m, const float *x, int tokens, float *y) {
    Quantized a;
    a.reserve(tokens, m.columns, m.G);
    const size_t table_bytes = (size_t)m.columns * 8;
    std::vector<int8_t> table((size_t)tokens * table_bytes);
    Ticket work;
    pool.run([&](int thread) {
        for (int t = thread; t < tokens; t += pool.threads()) {
            a.set(ops, t, x + (size_t)t * m.columns);
            sign_sums(a.q.data() + t * a.stride, m.columns, table.data() + t * table_bytes);
        }
        pool.barrier();
        const Acts acts = a.acts();
        float out[ROWS];
        for (int from, to; work.take(m.strips, 2, from, to);)
            for (int s = from; s < to; s++)
                for (int t = 0; t < tokens; t++) {
                    ops->bcq(m.data + s * m.strip_bytes(), m.tiles, m.G, m.bits, table.data() + t * table_bytes, acts, t, out);
                    const int n = m.rows - s * ROWS < ROWS ? m.rows - s * ROWS : ROWS;
                    std::memcpy(y + (size_t)t * m.rows + s * ROWS, out, n * sizeof(float));
                }
    });
}

} // namespace lissom
