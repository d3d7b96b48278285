// A decoder of the Llama family: one call runs any mix of tokens (chunks of prompts, single tokens of many
// sequences) through all layers. Tokens are a flat list, so that batches of unequal length have no padding
// (ByteTransformer, 2210.03052); only attention sees which tokens belong together.
#pragma once
#include <memory>
#include <vector>

#include "attention.h"
#include "linear.h"

namespace lissom {

constexpr int RETURN = 64; // positions that stay in the cache behind a sliding window

struct Spec {
    int layers = 0, width = 0, heads = 0, kv_heads = 0, head_dim = 0, inner = 0, vocabulary = 0;
    int rotary = 0;  // rotated dimensions of a head
    int window = 0;  // sliding window, 0 = none
    float epsilon = 1e-5f, attention_scale = 1, rotary_scale = 1;
    int blocks = 0, slots = 0, cache_bits = 16;
};

// Inputs that are rounded to codes of `bits` before a product, because the checkpoint says so; 0: not.
struct InputGrid {
    int bits = 0;
    float scale = 0; // 0: from the largest magnitude of the token
};
// x (n) of one token to the nearest of the codes -2^(b-1) ... 2^(b-1) - 1 and back, as methods/quantize/activations.py defines it.
void round_input(float *x, int n, const InputGrid &grid);

struct Block {
    std::vector<float> norm1, norm2, q_norm, k_norm; // q_norm, k_norm: (head_dim) or empty
    std::vector<float> bias;                         // of q, k, v rows, or empty
    std::vector<float> o_bias;
    Layer qkv[3], o, gate_up[2], down;
    InputGrid grid[4]; // of the inputs of qkv, o, gate and up, down
};

class Engine {
  public:
    Engine(const Spec &spec, int threads, const Ops *ops);

    std::vector<Block> blocks;
    std::vector<float> norm, frequency; // final norm; inverse frequencies (rotary / 2)
    const Matrix *embedding = nullptr, *head = nullptr;

    // Runs n tokens; position p of a slot must follow positions 0 ... p - 1 of it, now or in earlier calls.
    // logits (number of set flags, vocabulary): after the tokens whose `want` is set.
    void step(const int *tokens, const int *slots, const int *positions, const uint8_t *want, int n, float *logits);

    const Spec &spec() const { return spec_; }
    Cache cache;

  private:
    // Activations of a product, quantized once for each tile width that its layers use.
    struct Input {
        Quantized by[3];
        bool tables[3] = {};            // whether binary-coded layers of this width occur
        std::vector<int8_t> sums[3];    // their sign_sums, for each token
        int count = 0;
        void prepare(const std::vector<Layer> &layers, int tokens, int columns);
        // x (columns) of one token, which is changed where there is a grid
        void set(const Ops *ops, int token, float *x, int columns, const InputGrid &grid = {});
        int at(int G) const;
        // out (tokens, 16) = strip `s` of the layer times all tokens
        void strip(const Ops *ops, const Layer &layer, int s, int tokens, float *out) const;
    };
    template <class Sink> void multiply(Ticket &ticket, const Layer *layers, int count, const Input &in, int tokens, int thread, Sink sink);
    void rotate(float *x, int token, const std::vector<float> &gain);
    void heads_of(int layer, int token, int head);
    void run(int thread, float *logits);
    void slide(const int *slots, const int *positions, int n);

    Spec spec_;
    Pool pool_;
    const Ops *ops_;
    Attention attention_;
    std::unique_ptr<Ticket[]> tickets_;
    const int *tokens_ = nullptr, *slots_ = nullptr, *positions_ = nullptr;
    int n_ = 0; // tokens of this step
    std::vector<int> wanted_;
    std::vector<float> x_, qkv_, gate_up_, cosine_, sine_;
    std::vector<std::vector<float>> scratch_, strip_; // of each thread
    Input in_, o_in_, down_in_, head_in_;
};

struct Sampling {
    float temperature = 0, top_p = 1, min_p = 0, repetition_penalty = 1;
    int top_k = 0;
};
// Draws from logits (n), which are changed. `seen`: tokens for the repetition penalty. `uniform` in [0, 1).
int sample(float *logits, int n, const Sampling &how, const int *seen, size_t seen_count, double uniform);

} // namespace lissom
