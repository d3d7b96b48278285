// The key/value cache: blocks of 32 positions, handed to sequences ("slots") as they grow.
//
// Keys lie transposed, (head_dim, 32) for each block and head, so that one product gives 32 scores without
// sums across lanes; values lie (32, head_dim). Elements are half precision; or int8 with one scale for each
// position and head; or int4 with one half-precision scale for each position and 32 elements of a head (codes of
// -8 ... 7, the element of largest size at -8, as in llama.cpp's Q4_0). Two int4 codes of one byte always belong to the same
// position, so that threads that write different positions never share a byte.
#pragma once
#include <cstring>
#include <stdexcept>
#include <vector>

#include "memory.h"
#include "packed.h"

namespace lissom {

struct CacheFull : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Cache {
  public:
    void configure(int layers, int kv_heads, int head_dim, int blocks, int slots, int bits) {
        heads_ = kv_heads, dim_ = head_dim, wide_ = (head_dim + 31) / 32 * 32, blocks_ = blocks, bits_ = bits;
        groups_ = wide_ / 32;
        key_bytes_ = (size_t)(bits == 4 ? wide_ : dim_) * POSITIONS * bits / 8, value_bytes_ = (size_t)wide_ * POSITIONS * bits / 8;
        scale_bytes_ = bits == 8 ? 2 * POSITIONS * sizeof(float) : bits == 4 ? 2 * POSITIONS * groups_ * sizeof(uint16_t) : 0;
        unit_ = key_bytes_ + value_bytes_ + scale_bytes_;
        // unwritten positions must be finite; zero pages of the system take neither time nor memory before they are used
        bytes_ = unit_ * heads_ * blocks * layers + 64;
        data_ = Memory(bytes_);
        table_.assign(slots, {}), first_.assign(slots, 0);
        for (int b = blocks - 1; b >= 0; b--) free_.push_back(b);
    }

    int bits() const { return bits_; }
    int wide() const { return wide_; }
    int free_blocks() const { return (int)free_.size(); }
    size_t bytes() const { return bytes_; }

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
        for (size_t i = t.size(); i-- > (size_t)first_[slot];) free_.push_back(t[i]);
        t.clear(), first_[slot] = 0;
    }
    // gives the blocks before `block` back; first(slot): the first one that is still there
    void forget(int slot, int block) {
        auto &t = table_.at(slot);
        for (int &i = first_[slot]; i < block && i < (int)t.size(); i++) free_.push_back(t[i]);
    }
    int first(int slot) const { return first_.at(slot); }

    uint8_t *keys(int layer, int slot, int block, int head) { return at(layer, table_[slot][block], head); }
    // asks for a block before it is needed: the weights of a step have pushed it out to memory
    void prefetch(int layer, int slot, int block, int head) {
        const uint8_t *p = keys(layer, slot, block, head);
        for (size_t i = 0; i < unit_; i += 64) __builtin_prefetch(p + i);
    }
    uint8_t *values(int layer, int slot, int block, int head) { return keys(layer, slot, block, head) + key_bytes_; }
    // int4: half-precision scales (groups, 32) of keys, then of values
    uint16_t *halves(int layer, int slot, int block, int head) { return (uint16_t *)(values(layer, slot, block, head) + value_bytes_); }
    int groups() const { return groups_; }
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
        if (bits_ == 4) {
            uint16_t *scale = halves(layer, slot, block, head) + j;
            for (int g = 0; g < groups_; g++) {
                const int n = dim_ - 32 * g < 32 ? dim_ - 32 * g : 32;
                // keys: byte (d / 2, j) holds d and d + 1; values: byte (j, g, d % 16) holds d and d + 16
                scale[g * POSITIONS] = round4(key + 32 * g, n, [&](int d) { return k + (16 * g + d / 2) * POSITIONS + j; }, 1);
                scale[(groups_ + g) * POSITIONS] =
                    round4(value + 32 * g, n, [&](int d) { return v + j * (wide_ / 2) + 16 * g + d % 16; }, 16);
            }
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
    // Codes of x (n <= 32) to the bytes at(d); elements whose index has the bit `high` set go to the upper four bits.
    template <class At> uint16_t round4(const float *x, int n, At at, int high) const {
        float top = 0;
        for (int d = 0; d < n; d++)
            if (__builtin_fabsf(x[d]) > __builtin_fabsf(top)) top = x[d];
        const uint16_t half = float_to_half(top / -8);
        const float scale = half_to_float(half), inverse = scale != 0 ? 1 / scale : 0.0f;
        for (int d = 0; d < 32; d++) {
            const int code = 8 + (d < n ? (int)__builtin_lrintf(__builtin_fminf(__builtin_fmaxf(x[d] * inverse, -8.0f), 7.0f)) : 0);
            uint8_t *byte = at(d);
            *byte = (uint8_t)(d & high ? (*byte & 15) | code << 4 : (*byte & 0xf0) | code);
        }
        return half;
    }
    uint8_t *at(int layer, int block, int head) { return data_.get() + unit_ * (((size_t)layer * blocks_ + block) * heads_ + head); }

    int heads_ = 0, dim_ = 0, wide_ = 0, groups_ = 0, blocks_ = 0, bits_ = 16;
    size_t key_bytes_ = 0, value_bytes_ = 0, scale_bytes_ = 0, unit_ = 0;
    size_t bytes_ = 0;
    Memory data_;
    std::vector<std::vector<int>> table_;
    std::vector<int> first_; // of each slot: blocks before it were given back
    std::vector<int> free_;
};

} // namespace lissom
