// Causal attention of a flat list of tokens over the cache of their slots.
#pragma once
#include <vector>

#include "cache.h"

namespace lissom {

// Some tokens of one sequence against a range of its cache, for one key/value head.
struct AttentionTask {
    int token, tokens;    // in the flat list; consecutive positions of one slot
    int head;             // key/value head
    int from, to;         // blocks of the cache
    int row;              // first row of the partial results
};

class Attention {
  public:
    void configure(int heads, int kv_heads, int head_dim, float scale, int window) {
        heads_ = heads, kv_ = kv_heads, dim_ = head_dim, share_ = heads / kv_heads, scale_ = scale, window_ = window;
    }

    // Cuts the work along tokens, heads and fixed parts of the cache, which are merged by softmax weight.
    void plan(const int *slots, const int *positions, int n, const Cache &cache);
    int tasks() const { return (int)tasks_.size(); }

    // q (tokens, stride): queries of token t, head h at q + t * stride + h * head_dim
    void run(const Ops *ops, Cache &cache, int layer, int task, const float *q, int64_t stride);
    // out (heads * head_dim): the attention output of one token
    void merge(int token, float *out) const;

  private:
    int heads_ = 0, kv_ = 0, dim_ = 0, share_ = 1, window_ = 0;
    float scale_ = 1;
    int wide_ = 0;
    const int *slots_ = nullptr, *positions_ = nullptr;
    std::vector<AttentionTask> tasks_;
    struct Place {
        int row, per_head, between, parts; // row of (head 0, part 0), rows between heads and between parts
    };
    std::vector<Place> place_; // of each token
    std::vector<float> part_;  // (rows, wide): unnormalized outputs
    std::vector<float> top_, mass_; // (rows): largest score, sum of exponentials
};

} // namespace lissom
