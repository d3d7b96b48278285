// y = x Wᵀ for packed matrices, on a pool.
#pragma once
#include <vector>

#include "matrix.h"
#include "pool.h"

namespace lissom {

// The instruction sets that this processor and this build have, the best first; the last is "portable".
const std::vector<const Ops *> &all_ops();
// The first of them, or the one that LISSOM_ISA names. Throws std::invalid_argument when there is none of that name.
const Ops *best_ops();

// Quantized activations of some tokens, for one tile width.
struct Quantized {
    int G = 0, columns = 0, tiles = 0;
    int64_t stride = 0; // bytes of a token: an odd number of cache lines, so that tokens do not share the same few places of a cache
    std::vector<int8_t> q;
    std::vector<float> scale, sum;

    void reserve(int tokens, int width, int tile) {
        G = tile, columns = width, tiles = (width + tile - 1) / tile;
        stride = ((tiles * G + 63) / 64 | 1) * 64;
        q.resize((size_t)(tokens * stride) + 64);
        scale.resize((size_t)tokens * tiles), sum.resize((size_t)tokens * tiles);
    }
    void set(const Ops *ops, int token, const float *x) {
        const size_t at = (size_t)token * tiles;
        ops->quantize(x, columns, G, q.data() + token * stride, scale.data() + at, sum.data() + at);
    }
    Acts acts() const { return {q.data(), scale.data(), sum.data(), stride, tiles}; }
};

// x (tokens, columns) fp32, y (tokens, rows) fp32
void linear(const Ops *ops, Pool &pool, const View &v, const float *x, int tokens, float *y);

// Binary-coded weights w = offset + sum_b alpha_b * sign_b (LUT-GEMM, 2206.09557 §3), strips of 16 rows:
//   tile = bits x [16 x fp16 alpha] [16 x fp16 offset] then per bit, per 16 columns 32 bytes:
//   byte r (+16 for odd quads) holds quads 0/1 in its low and quads 2/3 in its high nibble; a set bit is +1.
struct Bcq {
    int rows = 0, columns = 0, G = 0, bits = 0, strips = 0, tiles = 0;
    const uint8_t *data = nullptr;
    std::vector<uint8_t> own; // what `data` points to, unless the bytes belong to somebody else
    size_t strip_bytes() const { return (size_t)tiles * (32 * (bits + 1) + (size_t)bits * G * ROWS / 8); }
};
// The weights of one linear layer: packed codes or binary-coded weights.
struct Layer {
    const Matrix *matrix = nullptr;
    const Bcq *binary = nullptr;
    int rows() const { return binary ? binary->rows : matrix->view.rows; }
    int columns() const { return binary ? binary->columns : matrix->view.columns; }
    int strips() const { return binary ? binary->strips : matrix->view.strips; }
    int G() const { return binary ? binary->G : matrix->view.G; }
    // the rows of strip `s`
    Where where(int s) const { return {s * ROWS, rows() - s * ROWS < ROWS ? rows() - s * ROWS : ROWS, binary ? nullptr : matrix->view.order}; }
};

// Sums of all 16 sign patterns of each four activations. Of each pair of quads 64 bytes: the low bytes of the sums of both, then
// their high bytes; so 8 bytes for each column.
void sign_sums(const int8_t *q, int columns, int8_t *table);

// signs (bits, rows, columns) u8 0/1; alpha (bits, rows, groups); offset (rows, groups)
std::unique_ptr<Bcq> pack_bcq(int rows, int columns, int width, int bits, const uint8_t *signs, const float *alpha,
                              const float *offset, int G);
std::unique_ptr<Bcq> borrow_bcq(int rows, int columns, int G, int bits, const uint8_t *data, size_t size);
void linear_bcq(const Ops *ops, Pool &pool, const Bcq &m, const float *x, int tokens, float *y);

} // namespace lissom
