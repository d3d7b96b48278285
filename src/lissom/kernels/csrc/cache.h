// The key/value cache: blocks of 32 positions, handed to sequences ("slots") as they grow.
//
// Keys lie transposed, (head_dim, 32) for each block and head, so that one product gives 32 scores without
// sums across lanes; values lie (32, head_dim). Elements are half precision, or int8 with one scale for each
// position and head.
#pragma once
#include <cstring>
#include <stdexcept>
#include <vector>

#include "packed.h"

namespace lissom {

struct CacheFull : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Cache {
  public:
    void configure(int layers, int kv_heads, int head_dim, int blocks, int slots, int bits) {
        heads_ = kv_heads, dim_ = head_dim, wide_ = (head_dim + 31) / 32 * 32, blocks_ = blocks, bits_ = bits;
        const size_t element = bits == 8 ? 1 : 2;
        key_bytes_ = (size_t)dim_ * POSITIONS * element, value_bytes_ = (size_t)wide_ * POSITIONS * element;
        scale_bytes_ = bits == 8 ? 2 * POSITIONS * sizeof(float) : 0;
        unit_ = key_bytes_ + value_bytes_ + scale_bytes_;
        data_.assign(unit_ * heads_ * blocks * layers + 64, 0); // unwritten positions must be finite
        table_.assign(slots, {});
        for (int b = blocks - 1; b >= 0; b--) free_.push_back(b);
    }

    int bits() const { return bits_; }
    int wide() const { return wide_; }
    int free_blocks() const { return (int)free_.size(); }
    size_t bytes() const { return data_.size(); }

    // makes room for `position` in `slot`
    void reserve(int slot, int position) {
        auto &t = table_.at(slot);
        while ((int)t.size() <= position / POSITIONS) {
            if (free_.empty()) throw CacheFull("the key/value cache is full");
            t.push_back(free_.back()), free_.pop_back();
        }
    }
    void release(int slot) {
        auto &t = table_.at(slot);
        free_.insert(free_.end(), t.rbegin(), t.rend());
        t.clear();
    }

    uint8_t *keys(int layer, int slot, int block, int head) { return at(layer, table_[slot][block], head); }
    uint8_t *values(int layer, int slot, int block, int head) { return keys(layer, slot, block, head) + key_bytes_; }
    // scales of 32 keys, then of 32 values (int8 only)
    float *scales(int layer, int slot, int block, int head) { return (float *)(values(layer, slot, block, head) + value_bytes_); }

    void put(int layer, int slot, int position, int head, const float *key, const float *value) {
        const int block = position / POSITIONS, j = position % POSITIONS;
        uint8_t *k = keys(layer, slot, block, head), *v = values(layer, slot, block, head);
        if (bits_ == 16) {
            for (int d = 0; d < dim_; d++) ((uint16_t *)k)[d * POSITIONS + j] = float_to_half(key[d]);
            for (int d = 0; d < dim_; d++) ((uint16_t *)v)[j * wide_ + d] = float_to_half(value[d]);
            return;
        }
        float *scale = scales(layer, slot, block, head);
        scale[j] = round8(key, (int8_t *)k + j, POSITIONS);
        scale[POSITIONS + j] = round8(value, (int8_t *)v + j * wide_, 1);
    }

  private:
    float round8(const float *x, int8_t *out, int step) const {
        float top = 0;
        for (int d = 0; d < dim_; d++) top = __builtin_fmaxf(top, __builtin_fabsf(x[d]));
        const float inverse = top > 0 ? 127.0f / top : 0.0f;
        for (int d = 0; d < dim_; d++) out[d * step] = (int8_t)__builtin_lrintf(x[d] * inverse);
        return top / 127.0f;
    }
    uint8_t *at(int layer, int block, int head) { return data_.data() + unit_ * (((size_t)layer * blocks_ + block) * heads_ + head); }

    int heads_ = 0, dim_ = 0, wide_ = 0, blocks_ = 0, bits_ = 16;
    size_t key_bytes_ = 0, value_bytes_ = 0, scale_bytes_ = 0, unit_ = 0;
    std::vector<uint8_t> data_;
    std::vector<std::vector<int>> table_;
    std::vector<int> free_;
};

} // namespace lissom
