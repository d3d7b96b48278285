// Python bindings of the engine. Matrices are borrowed: the Python side keeps them alive.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "engine.h"

namespace nb = nanobind;
using namespace lissom;

namespace {

template <class T, int D> using In = nb::ndarray<const T, nb::ndim<D>, nb::c_contig, nb::device::cpu>;
template <class T, int D> using Out = nb::ndarray<T, nb::ndim<D>, nb::c_contig, nb::device::cpu>;

using Weights = std::variant<const Matrix *, const Bcq *>;

Layer shaped(const Weights &w, int rows, int columns, const char *name) {
    Layer layer;
    if (const auto *m = std::get_if<const Matrix *>(&w)) layer.matrix = *m;
    if (const auto *m = std::get_if<const Bcq *>(&w)) layer.binary = *m;
    if ((!layer.matrix && !layer.binary) || layer.rows() != rows || layer.columns() != columns)
        throw nb::value_error((std::string(name) + " must be (" + std::to_string(rows) + ", " + std::to_string(columns) + ")").c_str());
    return layer;
}

std::vector<float> sized(std::vector<float> v, size_t size, const char *name) {
    if (!v.empty() && v.size() != size) throw nb::value_error((std::string(name) + " must have " + std::to_string(size) + " values").c_str());
    return v;
}

// splitmix64: one draw for each (seed, index), so that a stream does not depend on how it is batched
double uniform(uint64_t seed, uint64_t index) {
    uint64_t z = seed * 0x9e3779b97f4a7c15ull + (index + 1) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (double)((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

void check(const Engine &e, const int *tokens, const int *slots, const int *positions, size_t n) {
    for (size_t i = 0; i < n; i++) {
        if (tokens[i] < 0 || tokens[i] >= e.spec().vocabulary) throw nb::value_error("token id outside the vocabulary");
        if (slots[i] < 0 || slots[i] >= e.spec().slots) throw nb::value_error("no such slot");
        if (positions[i] < 0) throw nb::value_error("negative position");
    }
}

} // namespace

void bind_engine(nb::module_ &m) {
    nb::exception<CacheFull>(m, "CacheFull");
    nb::class_<Spec>(m, "Spec")
        .def(nb::init<>())
        .def_rw("layers", &Spec::layers)
        .def_rw("width", &Spec::width)
        .def_rw("heads", &Spec::heads)
        .def_rw("kv_heads", &Spec::kv_heads)
        .def_rw("head_dim", &Spec::head_dim)
        .def_rw("inner", &Spec::inner)
        .def_rw("vocabulary", &Spec::vocabulary)
        .def_rw("rotary", &Spec::rotary)
        .def_rw("window", &Spec::window)
        .def_rw("epsilon", &Spec::epsilon)
        .def_rw("attention_scale", &Spec::attention_scale)
        .def_rw("rotary_scale", &Spec::rotary_scale)
        .def_rw("blocks", &Spec::blocks)
        .def_rw("slots", &Spec::slots)
        .def_rw("cache_bits", &Spec::cache_bits);
    nb::class_<Engine>(m, "Engine")
        .def("__init__", [](Engine *self, const Spec &s, int threads) {
            if (s.layers < 1 || s.heads < 1 || s.kv_heads < 1 || s.heads % s.kv_heads || s.rotary % 2 || s.rotary > s.head_dim ||
                (s.cache_bits != 4 && s.cache_bits != 8 && s.cache_bits != 16) || threads < 1 || s.blocks < 1 || s.slots < 1)
                throw nb::value_error("inconsistent engine specification");
            new (self) Engine(s, threads, best_ops());
        })
        .def("set_outer", [](Engine &e, const Matrix *embedding, const Matrix *head, std::vector<float> norm, std::vector<float> frequency) {
            const Spec &s = e.spec();
            e.embedding = shaped(embedding, s.vocabulary, s.width, "embedding").matrix, e.head = shaped(head, s.vocabulary, s.width, "head").matrix;
            e.norm = sized(norm, s.width, "norm"), e.frequency = sized(frequency, s.rotary / 2, "frequency");
        })
        .def("set_block",
             [](Engine &e, int i, Weights q, Weights k, Weights v, Weights o, Weights gate, Weights up, Weights down, std::vector<float> norm1, std::vector<float> norm2,
                std::vector<float> q_norm, std::vector<float> k_norm, std::vector<float> bias, std::vector<float> o_bias) {
                 const Spec &s = e.spec();
                 const int queries = s.heads * s.head_dim, keys = s.kv_heads * s.head_dim;
                 Block &b = e.blocks.at(i);
                 b.qkv[0] = shaped(q, queries, s.width, "q"), b.qkv[1] = shaped(k, keys, s.width, "k");
                 b.qkv[2] = shaped(v, keys, s.width, "v"), b.o = shaped(o, s.width, queries, "o");
                 b.gate_up[0] = shaped(gate, s.inner, s.width, "gate"), b.gate_up[1] = shaped(up, s.inner, s.width, "up");
                 b.down = shaped(down, s.width, s.inner, "down");
                 b.norm1 = sized(norm1, s.width, "norm1"), b.norm2 = sized(norm2, s.width, "norm2");
                 b.q_norm = sized(q_norm, s.head_dim, "q_norm"), b.k_norm = sized(k_norm, s.head_dim, "k_norm");
                 b.bias = sized(bias, queries + 2 * keys, "bias"), b.o_bias = sized(o_bias, s.width, "o_bias");
             })
        // Grids of the inputs of qkv, o, gate and up, down of block i: bits (0: none) and scales (0: of each token).
        .def("set_grids",
             [](Engine &e, int i, std::vector<int> bits, std::vector<float> scales) {
                 if (bits.size() != 4 || scales.size() != 4) throw nb::value_error("four grids, one for each stage");
                 for (int j = 0; j < 4; j++) {
                     if (bits[j] && (bits[j] < 2 || bits[j] > 8 || !(scales[j] >= 0))) throw nb::value_error("a grid has 2 to 8 bits and a scale");
                     e.blocks.at(i).grid[j] = {bits[j], scales[j]};
                 }
             })
        .def("step",
             [](Engine &e, In<int, 1> tokens, In<int, 1> slots, In<int, 1> positions, In<uint8_t, 1> want, Out<float, 2> logits) {
                 const size_t n = tokens.shape(0);
                 if (!n || slots.shape(0) != n || positions.shape(0) != n || want.shape(0) != n) throw nb::value_error("arrays differ in length");
                 size_t wanted = 0;
                 for (size_t i = 0; i < n; i++) wanted += want.data()[i] != 0;
                 if (logits.shape(0) < wanted || (int)logits.shape(1) != e.spec().vocabulary) throw nb::value_error("logits too small");
                 check(e, tokens.data(), slots.data(), positions.data(), n);
                 nb::gil_scoped_release release;
                 e.step(tokens.data(), slots.data(), positions.data(), want.data(), (int)n, logits.data());
             })
        // Decodes up to `count` tokens of one slot without returning to Python; ends after a token of `stops`.
        .def("decode",
             [](Engine &e, int slot, int token, int position, int count, const Sampling &how, uint64_t seed, uint64_t index,
                std::vector<int> seen, std::vector<int> stops) {
                 check(e, &token, &slot, &position, 1);
                 std::vector<int> out;
                 std::vector<float> logits(e.spec().vocabulary);
                 nb::gil_scoped_release release;
                 for (int i = 0; i < count; i++) {
                     const uint8_t want = 1;
                     e.step(&token, &slot, &position, &want, 1, logits.data());
                     token = sample(logits.data(), (int)logits.size(), how, seen.data(), seen.size(), uniform(seed, index + i));
                     out.push_back(token), seen.push_back(token), position++;
                     if (std::find(stops.begin(), stops.end(), token) != stops.end()) break;
                 }
                 return out;
             })
        .def("release", [](Engine &e, int slot) { e.cache.release(slot); })
        .def_prop_ro("free_blocks", [](const Engine &e) { return e.cache.free_blocks(); })
        .def_prop_ro("cache_bytes", [](const Engine &e) { return e.cache.bytes(); });
    // Attention of the last `tokens` positions alone: q (tokens, heads, dim), k and v (positions, kv heads, dim) of positions
    // 0 ... in a cache of `bits`; out (tokens, heads * dim).
    m.def("attention", [](In<float, 3> q, In<float, 3> k, In<float, 3> v, int bits, int window, float scale, Out<float, 2> out) {
        const int n = (int)q.shape(0), heads = (int)q.shape(1), dim = (int)q.shape(2), all = (int)k.shape(0), kv = (int)k.shape(1);
        if ((int)k.shape(2) != dim || v.shape(0) != k.shape(0) || v.shape(1) != k.shape(1) || v.shape(2) != k.shape(2) || n < 1 || n > all ||
            heads % kv || (int)out.shape(0) != n || (int)out.shape(1) != heads * dim || (bits != 4 && bits != 8 && bits != 16))
            throw nb::value_error("shapes do not fit");
        Cache cache;
        cache.configure(1, kv, dim, all / POSITIONS + 1, 1, bits);
        cache.reserve(0, all - 1);
        for (int p = 0; p < all; p++)
            for (int h = 0; h < kv; h++) cache.put(0, 0, p, h, k.data() + ((size_t)p * kv + h) * dim, v.data() + ((size_t)p * kv + h) * dim);
        Attention attention;
        attention.configure(heads, kv, dim, scale, window);
        std::vector<int> slots(n, 0), positions(n);
        for (int t = 0; t < n; t++) positions[t] = all - n + t;
        attention.plan(slots.data(), positions.data(), n, cache);
        for (int i = 0; i < attention.tasks(); i++) attention.run(best_ops(), cache, 0, i, q.data(), heads * dim);
        for (int t = 0; t < n; t++) attention.merge(t, out.data() + (size_t)t * heads * dim);
    });
    m.def("round_input", [](Out<float, 1> x, int bits, float scale) { round_input(x.data(), (int)x.shape(0), {bits, scale}); });
    nb::class_<Sampling>(m, "Sampling")
        .def("__init__", [](Sampling *self, float temperature, int top_k, float top_p, float min_p, float repetition_penalty) {
            new (self) Sampling{temperature, top_p, min_p, repetition_penalty, top_k};
        })
        .def_prop_ro("penalised", [](const Sampling &s) { return s.repetition_penalty != 1; });
    m.def("sample", [](Out<float, 1> logits, const Sampling &how, std::vector<int> seen, uint64_t seed, uint64_t index) {
        nb::gil_scoped_release release;
        return sample(logits.data(), (int)logits.shape(0), how, seen.data(), seen.size(), uniform(seed, index));
    });
}
