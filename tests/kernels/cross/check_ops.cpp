// Compares every instruction set of this build with plain C++, without Python: for processors that are only emulated here.
// test_cross.py builds it. Prints what it compared; the exit code is 1 when a result differs.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "linear.h"

using namespace lissom;

namespace {

std::mt19937 draw(1);
int below(int n) { return (int)(draw() % (unsigned)n); }
float normal() { return std::normal_distribution<float>()(draw); }
int problems = 0, compared = 0;

void close(const char *what, const Ops *ops, const std::vector<float> &a, const std::vector<float> &b, float size) {
    compared++;
    for (size_t i = 0; i < a.size(); i++)
        if (!(std::fabs(a[i] - b[i]) <= 2e-6f * size + 1e-4f * std::fabs(b[i]))) {
            std::printf("%s with %s: %g at %zu, not %g\n", what, ops->name, a[i], i, b[i]), problems++;
            return;
        }
}

void strips(const Ops *ops, Kind kind, int G, int N, bool symmetric, bool spill) {
    const int rows = 1 + below(40), columns = G * (1 + below(3)), groups = columns / G, tokens = 1 + below(9);
    const int top = kind == D2 ? 3 : kind == D3 ? 7 : kind == D6 ? 63 : kind == D8 || kind == NM8 ? 255 : 15;
    std::vector<uint8_t> values((size_t)rows * columns), mask(values.size(), 1);
    std::vector<float> scale((size_t)rows * groups), zero(scale.size(), (float)((top + 1) / 2)), x((size_t)tokens * columns);
    for (auto &v : values) v = (uint8_t)below(top + 1);
    for (auto &s : scale) s = half_to_float(float_to_half(0.1f + (float)below(100) / 50));
    if (!symmetric)
        for (auto &z : zero) z = (float)below(top + 1);
    for (auto &v : x) v = normal();
    const bool masked = N || kind == NM4; // NM4 with N = 0: every row has an N of its own
    int n = N;
    if (masked)
        for (size_t i = 0; i < mask.size(); i += 16) {
            if (!N && i % columns == 0) n = below(17);
            for (int j = 0; j < 16; j++) mask[i + j] = spill ? below(16) < N : 0;
            for (int kept = 0; !spill && kept < n;) {
                const int j = kind == N24 ? kept / 2 * 4 + below(4) : below(16);
                if (!mask[i + j]) mask[i + j] = 1, kept++;
            }
        }
    const auto m = pack(kind, rows, columns, G, values.data(), scale.data(), zero.data(), masked ? mask.data() : nullptr, G, N, spill);
    Quantized acts;
    acts.reserve(tokens, columns, G);
    for (int t = 0; t < tokens; t++) acts.set(ops_portable(), t, x.data() + (size_t)t * columns);
    std::vector<float> got((size_t)tokens * ROWS), expected(got.size());
    for (int s = 0; s < m->view.strips; s++) {
        ops->strip(m->view, s, acts.acts(), 0, tokens, got.data());
        ops_portable()->strip(m->view, s, acts.acts(), 0, tokens, expected.data());
        close("a strip", ops, got, expected, 200.0f * (float)top);
    }
}

void products(const Ops *ops) {
    const int k = 1 + below(90), r = 1 + below(9), ldc = 32 + 16 * below(2);
    std::vector<float> a((size_t)r * k), c((size_t)r * ldc, 0.5f), d = c;
    std::vector<uint16_t> b16((size_t)k * 32);
    std::vector<int8_t> b8(b16.size());
    for (auto &v : a) v = normal();
    for (size_t i = 0; i < b16.size(); i++) b16[i] = float_to_half(normal()), b8[i] = (int8_t)(below(256) - 128);
    for (bool add : {false, true}) {
        ops->block16(r, k, a.data(), k, b16.data(), 32, c.data(), ldc, add);
        ops_portable()->block16(r, k, a.data(), k, b16.data(), 32, d.data(), ldc, add);
        close("block16", ops, c, d, 10);
        ops->block8(r, k, a.data(), k, b8.data(), 32, c.data(), ldc, add);
        ops_portable()->block8(r, k, a.data(), k, b8.data(), 32, d.data(), ldc, add);
        close("block8", ops, c, d, 1000);
    }
}

void activations(const Ops *ops) {
    const int n = 32 * (1 + below(6));
    std::vector<float> x(n), s(n / 32), sum(n / 32), s0 = s, sum0 = sum, gain(n, 1.25f), y(n), z(n);
    std::vector<int8_t> q(n), q0(n);
    for (auto &v : x) v = 3 * normal();
    ops->quantize(x.data(), n, 32, q.data(), s.data(), sum.data());
    ops_portable()->quantize(x.data(), n, 32, q0.data(), s0.data(), sum0.data());
    compared++;
    if (q != q0 || s != s0 || sum != sum0) std::printf("quantize with %s differs\n", ops->name), problems++;
    ops->rmsnorm(x.data(), gain.data(), n, 1e-5f, y.data());
    ops_portable()->rmsnorm(x.data(), gain.data(), n, 1e-5f, z.data());
    close("rmsnorm", ops, y, z, 1);
    ops->silu_mul(y.data(), x.data(), n), ops_portable()->silu_mul(z.data(), x.data(), n);
    close("silu_mul", ops, y, z, 1);
    y = z = x;
    ops->exps(y.data(), n, 10), ops_portable()->exps(z.data(), n, 10);
    close("exps", ops, y, z, 1e-3f);
}

} // namespace

int main() {
    for (const Ops *ops : all_ops()) {
        for (int round = 0; round < 2; round++)
            for (int G : {32, 64, 128})
                for (bool symmetric : {true, false}) {
                    for (Kind kind : {D2, D3, D4, D6, D8}) strips(ops, kind, G, 0, symmetric, false);
                    for (int N = 0; N <= 16; N += 2) strips(ops, NM4, G, N, symmetric, false);
                    for (int N = 4; N <= 16; N += 4) strips(ops, NM8, G, N, symmetric, false);
                    strips(ops, NM4, G, 4, symmetric, true);
                    strips(ops, N24, G, 8, symmetric, false);
                }
        for (int round = 0; round < 40; round++) products(ops), activations(ops);
        std::printf("%s: %d comparisons, %d problems\n", ops->name, compared, problems);
        compared = 0;
    }
    return problems ? 1 : 0;
}
