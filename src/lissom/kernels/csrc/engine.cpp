#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace lissom {

Engine::Engine(const Spec &spec, int threads, const Ops *ops) : spec_(spec), pool_(threads), ops_(ops) {
    blocks.resize(spec.layers);
    cache.configure(spec.layers, spec.kv_heads, spec.head_dim, spec.blocks, spec.slots, spec.cache_bits);
    attention_.configure(spec.heads, spec.kv_heads, spec.head_dim, spec.attention_scale, spec.window);
    tickets_ = std::make_unique<Ticket[]>(5 * (size_t)spec.layers + 1);
    scratch_.resize(threads), strip_.resize(threads);
}

int Engine::Input::at(int G) const {
    int j = 0;
    while (j + 1 < count && by[j].G != G) j++;
    return j;
}

void Engine::Input::prepare(const std::vector<Layer> &layers, int tokens, int columns) {
    count = 0;
    for (bool &t : tables) t = false;
    for (const Layer &layer : layers) {
        const int G = layer.G();
        if (!count || by[at(G)].G != G) by[count++].reserve(tokens, columns, G);
        tables[at(G)] |= layer.binary != nullptr;
    }
    for (int j = 0; j < count; j++)
        if (tables[j]) sums[j].resize((size_t)tokens * columns * 8);
}

void round_input(float *x, int n, const InputGrid &grid) {
    float scale = grid.scale;
    if (scale == 0) {
        float top = 0;
        for (int i = 0; i < n; i++) top = std::max(top, std::fabs(x[i]));
        scale = top / ((float)((1 << grid.bits) - 1) / 2);
        if (scale == 0) return;
    }
    const float half = (float)(1 << (grid.bits - 1));
    for (int i = 0; i < n; i++) x[i] = std::nearbyint(std::min(std::max(x[i] / scale, -half), half - 1)) * scale;
}

void Engine::Input::set(const Ops *ops, int token, float *x, int columns, const InputGrid &grid) {
    if (grid.bits) round_input(x, columns, grid);
    for (int j = 0; j < count; j++) {
        by[j].set(ops, token, x);
        if (tables[j]) sign_sums(by[j].q.data() + token * by[j].stride, by[j].columns, sums[j].data() + (size_t)token * by[j].columns * 8);
    }
}

void Engine::Input::strip(const Ops *ops, const Layer &layer, int s, int tokens, float *out) const {
    const int j = at(layer.G());
    const Acts acts = by[j].acts();
    if (layer.matrix) return ops->strip(layer.matrix->view, s, acts, 0, tokens, out);
    const Bcq &m = *layer.binary; // columns are whole tiles there, so rows of codes have no padding
    for (int t = 0; t < tokens; t++)
        ops->bcq(m.data + s * m.strip_bytes(), m.tiles, m.G, m.bits, sums[j].data() + (size_t)t * m.columns * 8, acts, t, out + t * ROWS);
}

// sink(layer index, its rows, out (tokens, 16)) for every strip of the layers
template <class Sink>
void Engine::multiply(Ticket &ticket, const Layer *layers, int count, const Input &in, int tokens, int thread, Sink sink) {
    int total = 0;
    for (int i = 0; i < count; i++) total += layers[i].strips();
    float *out = strip_[thread].data();
    for (int from, to; ticket.guided(total, pool_.threads(), from, to);)
        for (int s = from; s < to; s++) {
            int i = 0, strip = s;
            while (strip >= layers[i].strips()) strip -= layers[i++].strips();
            in.strip(ops_, layers[i], strip, tokens, out);
            sink(i, layers[i].where(strip), out);
        }
}

void Engine::rotate(float *x, int token, const std::vector<float> &gain) {
    if (!gain.empty()) ops_->rmsnorm(x, gain.data(), spec_.head_dim, spec_.epsilon, x);
    const int half = spec_.rotary / 2;
    const float *c = &cosine_[(size_t)token * half], *s = &sine_[(size_t)token * half];
    for (int i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * c[i] - b * s[i], x[i + half] = b * c[i] + a * s[i];
    }
}

// Rotates the queries that share key/value head `head`, rotates its key and stores key and value.
void Engine::heads_of(int layer, int token, int head) {
    const Spec &m = spec_;
    const Block &w = blocks[layer];
    float *q = &qkv_[(size_t)token * (m.heads + 2 * m.kv_heads) * m.head_dim];
    float *k = q + (size_t)(m.heads + head) * m.head_dim, *v = k + (size_t)m.kv_heads * m.head_dim;
    const int share = m.heads / m.kv_heads;
    for (int g = 0; g < share; g++) rotate(q + (size_t)(head * share + g) * m.head_dim, token, w.q_norm);
    rotate(k, token, w.k_norm);
    cache.prefetch(layer, slots_[token], cache.first(slots_[token]), head); // attention comes next
    cache.put(layer, slots_[token], positions_[token], head, k, v);
}

void Engine::run(int thread, float *logits) {
    const Spec &m = spec_;
    const int threads = pool_.threads(), row = (m.heads + 2 * m.kv_heads) * m.head_dim;
    float *tmp = scratch_[thread].data();
    Ticket *ticket = tickets_.get();

    for (int t = thread; t < n_; t += threads) {
        decode_row(embedding->view, tokens_[t], &x_[(size_t)t * m.width]);
        for (int i = 0; i < m.rotary / 2; i++) {
            const double angle = (double)positions_[t] * frequency[i];
            cosine_[(size_t)t * (m.rotary / 2) + i] = (float)std::cos(angle) * m.rotary_scale;
            sine_[(size_t)t * (m.rotary / 2) + i] = (float)std::sin(angle) * m.rotary_scale;
        }
    }
    for (int layer = 0; layer < m.layers; layer++, ticket += 5) {
        const Block &w = blocks[layer];
        for (int t = thread; t < n_; t += threads) { // a token stays with its thread from here to the next product
            ops_->rmsnorm(&x_[(size_t)t * m.width], w.norm1.data(), m.width, m.epsilon, tmp);
            in_.set(ops_, t, tmp, m.width, w.grid[0]);
        }
        pool_.barrier();
        const int first[3] = {0, m.heads * m.head_dim, (m.heads + m.kv_heads) * m.head_dim};
        multiply(ticket[0], w.qkv, 3, in_, n_, thread, [&](int i, Where where, const float *out) {
            const float *bias = w.bias.empty() ? nullptr : &w.bias[first[i]];
            for (int t = 0; t < n_; t++) {
                float *to = &qkv_[(size_t)t * row + first[i]];
                where.each([=, one = out + t * ROWS](int j, int r) { to[r] = one[j] + (bias ? bias[r] : 0.0f); });
            }
        });
        pool_.barrier();
        for (int i = thread; i < n_ * m.kv_heads; i += threads) heads_of(layer, i / m.kv_heads, i % m.kv_heads);
        pool_.barrier();
        for (int from, to; ticket[1].take(attention_.tasks(), 1, from, to);)
            attention_.run(ops_, cache, layer, from, qkv_.data(), row);
        pool_.barrier();
        for (int t = thread; t < n_; t += threads) {
            attention_.merge(t, tmp);
            o_in_.set(ops_, t, tmp, m.heads * m.head_dim, w.grid[1]);
        }
        pool_.barrier();
        const auto add = [&](const std::vector<float> &bias) {
            return [&, b = bias.empty() ? nullptr : bias.data()](int, Where where, const float *out) {
                for (int t = 0; t < n_; t++) {
                    float *to = &x_[(size_t)t * m.width];
                    where.each([=, one = out + t * ROWS](int j, int r) { to[r] += one[j] + (b ? b[r] : 0.0f); });
                }
            };
        };
        multiply(ticket[2], &w.o, 1, o_in_, n_, thread, add(w.o_bias));
        pool_.barrier();
        for (int t = thread; t < n_; t += threads) {
            ops_->rmsnorm(&x_[(size_t)t * m.width], w.norm2.data(), m.width, m.epsilon, tmp);
            in_.set(ops_, t, tmp, m.width, w.grid[2]);
        }
        pool_.barrier();
        multiply(ticket[3], w.gate_up, 2, in_, n_, thread, [&](int i, Where where, const float *out) {
            for (int t = 0; t < n_; t++) {
                float *to = &gate_up_[(size_t)(2 * t + i) * m.inner];
                where.each([=, one = out + t * ROWS](int j, int r) { to[r] = one[j]; });
            }
        });
        pool_.barrier();
        for (int t = thread; t < n_; t += threads) {
            float *gate = &gate_up_[2 * (size_t)t * m.inner];
            ops_->silu_mul(gate, gate + m.inner, m.inner);
            down_in_.set(ops_, t, gate, m.inner, w.grid[3]);
        }
        pool_.barrier();
        const std::vector<float> none;
        multiply(ticket[4], &w.down, 1, down_in_, n_, thread, add(none));
        pool_.barrier();
    }
    const int wanted = (int)wanted_.size();
    for (int i = thread; i < wanted; i += threads) {
        ops_->rmsnorm(&x_[(size_t)wanted_[i] * m.width], norm.data(), m.width, m.epsilon, tmp);
        head_in_.set(ops_, i, tmp, m.width);
    }
    pool_.barrier();
    const Layer last{head};
    multiply(*ticket, &last, 1, head_in_, wanted, thread, [&](int, Where where, const float *out) {
        for (int i = 0; i < wanted; i++) {
            float *to = logits + (size_t)i * m.vocabulary;
            where.each([=, one = out + i * ROWS](int j, int r) { to[r] = one[j]; });
        }
    });
}

// Gives back the blocks that no later token can see. RETURN positions are kept for drafts that turn out wrong.
void Engine::slide(const int *slots, const int *positions, int n) {
    for (int t = 0; t < n; t++) {
        if (t && slots[t] == slots[t - 1] && positions[t] > positions[t - 1]) continue; // the first of a run has the lowest
        const int oldest = std::max(0, positions[t] - spec_.window + 1);
        if (cache.first(slots[t]) > oldest / POSITIONS) throw std::invalid_argument("a position that the sliding window left behind");
        bool lowest = true; // of its slot in this step
        for (int i = 0; i < n; i++) lowest &= slots[i] != slots[t] || positions[i] >= positions[t];
        if (lowest) cache.forget(slots[t], std::max(0, oldest - RETURN) / POSITIONS);
    }
}

void Engine::step(const int *tokens, const int *slots, const int *positions, const uint8_t *want, int n, float *logits) {
    const Spec &m = spec_;
    tokens_ = tokens, slots_ = slots, positions_ = positions, n_ = n;
    if (m.window > 0) slide(slots, positions, n);
    for (int t = 0; t < n; t++) cache.reserve(slots[t], positions[t]);
    attention_.plan(slots, positions, n, cache);
    wanted_.clear();
    for (int t = 0; t < n; t++)
        if (want[t]) wanted_.push_back(t);
    const auto grow = [](std::vector<float> &v, size_t size) {
        if (v.size() < size) v.resize(size);
    };
    grow(x_, (size_t)n * m.width), grow(gate_up_, 2 * (size_t)n * m.inner);
    grow(qkv_, (size_t)n * (m.heads + 2 * m.kv_heads) * m.head_dim);
    grow(cosine_, (size_t)n * m.rotary / 2), grow(sine_, (size_t)n * m.rotary / 2);
    for (int i = 0; i < pool_.threads(); i++)
        grow(strip_[i], (size_t)n * ROWS), grow(scratch_[i], (size_t)std::max(m.width, m.heads * m.head_dim));
    // one table for all layers: every tile width that occurs gets its own copy of the activations
    std::vector<Layer> in, o, down;
    for (const Block &b : blocks) {
        in.insert(in.end(), {b.qkv[0], b.qkv[1], b.qkv[2], b.gate_up[0], b.gate_up[1]});
        o.push_back(b.o), down.push_back(b.down);
    }
    in_.prepare(in, n, m.width), o_in_.prepare(o, n, m.heads * m.head_dim), down_in_.prepare(down, n, m.inner);
    head_in_.prepare({Layer{head}}, (int)wanted_.size(), m.width);
    for (int i = 0; i < 5 * m.layers + 1; i++) tickets_[i].next.store(0, std::memory_order_relaxed);
    pool_.run([&](int thread) { run(thread, logits); });
}

} // namespace lissom
