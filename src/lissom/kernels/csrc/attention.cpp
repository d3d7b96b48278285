#include "attention.h"

#include <algorithm>
#include <cmath>

namespace lissom {
namespace {
constexpr int SPLIT = 8;      // blocks of one part of a cache; the same cuts for every token, so that a token's
                              // result does not depend on the batch that it is in, bit for bit
constexpr int MAX_ROWS = 24;  // query rows that share a pass over keys and values
constexpr float NEVER = -1e30f;
} // namespace

void Attention::plan(const int *slots, const int *positions, int n, const Cache &cache) {
    slots_ = slots, positions_ = positions, wide_ = cache.wide();
    tasks_.clear();
    place_.resize(n);
    int row = 0;
    const int per_tile = std::max(1, MAX_ROWS / share_);
    for (int start = 0; start < n;) {
        int stop = start + 1;
        while (stop < n && slots[stop] == slots[start] && positions[stop] == positions[stop - 1] + 1) stop++;
        for (int t = start; t < stop; t += per_tile) {
            const int count = std::min(per_tile, stop - t), rows = count * share_;
            const int first = window_ > 0 ? std::max(0, positions[t] - window_ + 1) / POSITIONS : 0;
            const int last = positions[t + count - 1] / POSITIONS + 1;
            const int part0 = first / SPLIT, parts = (last - 1) / SPLIT - part0 + 1;
            for (int i = 0; i < count; i++) place_[t + i] = {row + i * share_, rows, rows * kv_, parts};
            for (int p = 0; p < parts; p++)
                for (int h = 0; h < kv_; h++, row += rows)
                    tasks_.push_back({t, count, h, std::max(first, (part0 + p) * SPLIT), std::min(last, (part0 + p + 1) * SPLIT), row});
        }
        start = stop;
    }
    part_.resize((size_t)row * wide_), top_.resize(row), mass_.resize(row);
}

void Attention::run(const Ops *ops, Cache &cache, int layer, int task, const float *q, int64_t stride) {
    const AttentionTask &w = tasks_[task];
    const int rows = w.tokens * share_, slot = slots_[w.token];
    const bool small = cache.bits() == 8, four = cache.bits() == 4;
    static thread_local std::vector<float> scratch; // a decode step comes here layers x heads times
    static thread_local std::vector<int8_t> codes;
    scratch.resize((size_t)rows * (dim_ + 2 * POSITIONS)); // rows <= max(24, heads per kv head)
    codes.resize(four ? (size_t)wide_ * POSITIONS : 0);
    float *a = scratch.data(), *s = a + (size_t)rows * dim_, *part = s + (size_t)rows * POSITIONS;
    int8_t *wide_codes = codes.data();
    for (int i = 0; i < w.tokens; i++)
        for (int g = 0; g < share_; g++) {
            const float *from = q + (w.token + i) * stride + (w.head * share_ + g) * dim_;
            for (int d = 0; d < dim_; d++) a[(size_t)(i * share_ + g) * dim_ + d] = from[d] * scale_;
        }
    float *out = part_.data() + (size_t)w.row * wide_, *top = top_.data() + w.row, *mass = mass_.data() + w.row;
    std::fill(out, out + (size_t)rows * wide_, 0.0f), std::fill(top, top + rows, NEVER), std::fill(mass, mass + rows, 0.0f);
    for (int b = w.from; b < w.to; b++) {
        const uint8_t *k = cache.keys(layer, slot, b, w.head), *v = cache.values(layer, slot, b, w.head);
        if (b + 1 < w.to) cache.prefetch(layer, slot, b + 1, w.head);
        const float *scale = small ? cache.scales(layer, slot, b, w.head) : nullptr;
        const uint16_t *halves = four ? cache.halves(layer, slot, b, w.head) : nullptr;
        if (four) {
            ops->nibbles(k, wide_ / 2 * POSITIONS, POSITIONS, wide_codes);
            std::fill(s, s + (size_t)rows * POSITIONS, 0.0f);
            for (int g = 0; g < cache.groups(); g++) {
                const int n = std::min(32, dim_ - 32 * g);
                ops->block8(rows, n, a + 32 * g, dim_, wide_codes + 32 * g * POSITIONS, POSITIONS, part, POSITIONS, false);
                for (int j = 0; j < POSITIONS; j++) {
                    const float factor = half_to_float(halves[g * POSITIONS + j]);
                    for (int r = 0; r < rows; r++) s[(size_t)r * POSITIONS + j] += factor * part[(size_t)r * POSITIONS + j];
                }
            }
            ops->nibbles(v, wide_ / 2 * POSITIONS, 16, wide_codes);
        } else if (small)
            ops->block8(rows, dim_, a, dim_, (const int8_t *)k, POSITIONS, s, POSITIONS, false);
        else
            ops->block16(rows, dim_, a, dim_, (const uint16_t *)k, POSITIONS, s, POSITIONS, false);
        for (int r = 0; r < rows; r++) {
            float *p = &s[(size_t)r * POSITIONS];
            const int here = positions_[w.token + r / share_] - b * POSITIONS; // last position that this row may see
            if (small)
                for (int j = 0; j < POSITIONS; j++) p[j] *= scale[j];
            for (int j = std::max(0, here + 1); j < POSITIONS; j++) p[j] = NEVER;
            if (window_ > 0)
                for (int j = 0; j < std::min(POSITIONS, here - window_ + 1); j++) p[j] = NEVER;
            float best = top[r];
            for (int j = 0; j < POSITIONS; j++) best = std::max(best, p[j]);
            if (best > top[r]) { // an earlier all-hidden block leaves mass that this factor 0 removes
                const float shrink = std::exp(top[r] - best);
                for (int d = 0; d < wide_; d++) out[(size_t)r * wide_ + d] *= shrink;
                mass[r] *= shrink, top[r] = best;
            }
            mass[r] += ops->exps(p, POSITIONS, best);
            if (small)
                for (int j = 0; j < POSITIONS; j++) p[j] *= scale[POSITIONS + j];
        }
        for (int d = 0; d < wide_; d += 32) {
            if (four) {
                const uint16_t *of = halves + (cache.groups() + d / 32) * POSITIONS;
                for (int j = 0; j < POSITIONS; j++) {
                    const float factor = half_to_float(of[j]);
                    for (int r = 0; r < rows; r++) part[(size_t)r * POSITIONS + j] = factor * s[(size_t)r * POSITIONS + j];
                }
                ops->block8(rows, POSITIONS, part, POSITIONS, wide_codes + d, wide_, out + d, wide_, true);
            } else if (small)
                ops->block8(rows, POSITIONS, s, POSITIONS, (const int8_t *)v + d, wide_, out + d, wide_, true);
            else
                ops->block16(rows, POSITIONS, s, POSITIONS, (const uint16_t *)v + d, wide_, out + d, wide_, true);
        }
    }
}

void Attention::merge(int token, float *out) const {
    const Place &at = place_[token];
    for (int h = 0; h < heads_; h++) {
        const int row = at.row + h / share_ * at.per_head + h % share_;
        float top = NEVER, mass = 0;
        for (int p = 0; p < at.parts; p++) top = std::max(top, top_[row + p * at.between]);
        for (int p = 0; p < at.parts; p++) mass += mass_[row + p * at.between] * std::exp(top_[row + p * at.between] - top);
        for (int d = 0; d < dim_; d++) out[h * dim_ + d] = 0;
        for (int p = 0; p < at.parts; p++) {
            const int r = row + p * at.between;
            const float weight = std::exp(top_[r] - top) / mass;
            for (int d = 0; d < dim_; d++) out[h * dim_ + d] += weight * part_[(size_t)r * wide_ + d];
        }
    }
}

} // namespace lissom
