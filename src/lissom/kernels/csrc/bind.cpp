// Python bindings. Arrays come and go as nanobind ndarrays (DLPack), never as torch C++ objects.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string>

#include "linear.h"
#include "memory.h"

namespace nb = nanobind;
using namespace lissom;

namespace {

template <class T, int D> using In = nb::ndarray<const T, nb::ndim<D>, nb::c_contig, nb::device::cpu>;
template <class T, int D> using Out = nb::ndarray<T, nb::ndim<D>, nb::c_contig, nb::device::cpu>;

// One pool for each number of threads, made on first use and kept: kernels called from Python share it.
Pool &shared_pool(int threads) {
    static auto *pools = new std::map<int, std::unique_ptr<Pool>>; // never destroyed: threads may outlive statics
    auto &pool = (*pools)[threads];
    if (!pool) pool = std::make_unique<Pool>(threads);
    return *pool;
}
std::mutex pool_lock;

const Ops *ops_named(const std::string &isa) {
    if (isa.empty()) return best_ops();
    for (const Ops *ops : all_ops())
        if (isa == ops->name) return ops;
    throw nb::value_error(("instruction set '" + isa + "' is not available here").c_str());
}

} // namespace

void bind_engine(nb::module_ &);

NB_MODULE(_C, m) {
    m.def("isa", [] { return std::string(best_ops()->name); });
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Ops *ops : all_ops()) names.push_back(ops->name);
        return names;
    });

    nb::class_<Matrix>(m, "Matrix")
        .def_static(
            "pack",
            [](int kind, In<uint8_t, 2> values, In<float, 2> scale, In<float, 2> zero, std::optional<In<uint8_t, 2>> mask, int width,
               int G, int N, bool spill) {
                const size_t rows = values.shape(0), columns = values.shape(1);
                const size_t groups = width > 0 ? (columns + width - 1) / width : 0;
                if (scale.shape(0) != rows || zero.shape(0) != rows || scale.shape(1) != groups || zero.shape(1) != groups)
                    throw nb::value_error("scale and zero must be (rows, groups)");
                if (mask && (mask->shape(0) != rows || mask->shape(1) != columns)) throw nb::value_error("mask must be (rows, columns)");
                nb::gil_scoped_release release;
                return pack((Kind)kind, (int)rows, (int)columns, width, values.data(), scale.data(), zero.data(),
                            mask ? mask->data() : nullptr, G, N, spill);
            },
            nb::arg("kind"), nb::arg("values"), nb::arg("scale"), nb::arg("zero"), nb::arg("mask").none(), nb::arg("width"), nb::arg("G"), nb::arg("N"),
            nb::arg("spill"))
        .def_static(
            "round",
            [](int bits, In<float, 2> weights, int G) {
                nb::gil_scoped_release release;
                return round(bits, (int)weights.shape(0), (int)weights.shape(1), weights.data(), G);
            },
            nb::arg("bits"), nb::arg("weights"), nb::arg("G"))
        // Over bytes that stay where they are (`data` is kept alive), as `parts` described them.
        .def_static(
            "borrow",
            [](int kind, int rows, int columns, int G, int N, int zeros, int zero, int spill, In<uint8_t, 1> data) {
                return borrow((Kind)kind, rows, columns, G, N, zeros != 0, zero, spill != 0, data.data(), data.shape(0));
            },
            nb::arg("kind"), nb::arg("rows"), nb::arg("columns"), nb::arg("G"), nb::arg("N"), nb::arg("zeros"), nb::arg("zero"), nb::arg("spill"),
            nb::arg("data"), nb::keep_alive<0, 9>())
        .def_prop_ro("parts",
                     [](const Matrix &x) {
                         const View &v = x.view;
                         return std::vector<int>{v.kind, v.rows, v.columns, v.G, v.N, v.zeros, v.zero, v.spill};
                     })
        // The packed bytes, with the slack that `borrow` needs; valid as long as the matrix.
        .def_prop_ro(
            "data", [](const Matrix &x) { return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(x.view.data, {x.bytes + SLACK}); },
            nb::rv_policy::reference_internal)
        .def_prop_ro("kind", [](const Matrix &x) { return (int)x.view.kind; })
        .def_prop_ro("rows", [](const Matrix &x) { return x.view.rows; })
        .def_prop_ro("columns", [](const Matrix &x) { return x.view.columns; })
        .def_prop_ro("G", [](const Matrix &x) { return x.view.G; })
        .def_prop_ro("N", [](const Matrix &x) { return x.view.N; })
        .def_prop_ro("bytes", [](const Matrix &x) { return x.bytes; })
        .def_prop_ro("spilled", [](const Matrix &x) { return x.spilled; })
        .def("decode", [](const Matrix &x, Out<float, 2> out) {
            if ((int)out.shape(0) != x.view.rows || (int)out.shape(1) != x.view.columns) throw nb::value_error("wrong shape");
            for (int r = 0; r < x.view.rows; r++) decode_row(x.view, r, out.data() + (size_t)r * x.view.columns);
        })
        .def(
            "linear",
            [](const Matrix &w, In<float, 2> x, Out<float, 2> y, int threads, const std::string &isa) {
                if ((int)x.shape(1) != w.view.columns || (int)y.shape(1) != w.view.rows || x.shape(0) != y.shape(0))
                    throw nb::value_error("x must be (tokens, columns) and y (tokens, rows)");
                const Ops *ops = ops_named(isa);
                nb::gil_scoped_release release;
                std::lock_guard<std::mutex> guard(pool_lock);
                linear(ops, shared_pool(threads), w.view, x.data(), (int)x.shape(0), y.data());
            },
            nb::arg("x"), nb::arg("y"), nb::arg("threads") = 1, nb::arg("isa") = "");

    nb::class_<Bcq>(m, "Bcq")
        .def_static("pack",
                    [](In<uint8_t, 3> signs, In<float, 3> alpha, In<float, 2> offset, int width, int G) {
                        const size_t bits = signs.shape(0), rows = signs.shape(1), columns = signs.shape(2);
                        const size_t groups = width > 0 ? (columns + width - 1) / width : 0;
                        if (alpha.shape(0) != bits || alpha.shape(1) != rows || offset.shape(0) != rows || alpha.shape(2) != groups ||
                            offset.shape(1) != groups || !bits)
                            throw nb::value_error("alpha must be (bits, rows, groups), offset (rows, groups)");
                        return pack_bcq((int)rows, (int)columns, width, (int)bits, signs.data(), alpha.data(), offset.data(), G);
                    })
        .def_static("borrow",
                    [](int rows, int columns, int G, int bits, In<uint8_t, 1> data) {
                        return borrow_bcq(rows, columns, G, bits, data.data(), data.shape(0));
                    },
                    nb::arg("rows"), nb::arg("columns"), nb::arg("G"), nb::arg("bits"), nb::arg("data"), nb::keep_alive<0, 5>())
        .def_prop_ro("parts", [](const Bcq &x) { return std::vector<int>{x.rows, x.columns, x.G, x.bits}; })
        .def_prop_ro(
            "data", [](const Bcq &x) { return nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>>(x.data, {x.strips * x.strip_bytes() + SLACK}); },
            nb::rv_policy::reference_internal)
        .def_prop_ro("bytes", [](const Bcq &x) { return x.strips * x.strip_bytes(); })
        .def(
            "linear",
            [](const Bcq &w, In<float, 2> x, Out<float, 2> y, int threads, const std::string &isa) {
                if ((int)x.shape(1) != w.columns || (int)y.shape(1) != w.rows || x.shape(0) != y.shape(0))
                    throw nb::value_error("x must be (tokens, columns) and y (tokens, rows)");
                const Ops *ops = ops_named(isa);
                nb::gil_scoped_release release;
                std::lock_guard<std::mutex> guard(pool_lock);
                linear_bcq(ops, shared_pool(threads), w, x.data(), (int)x.shape(0), y.data());
            },
            nb::arg("x"), nb::arg("y"), nb::arg("threads") = 1, nb::arg("isa") = "");
    // Bytes in huge pages, zero until they are written.
    m.def("memory", [](size_t size) {
        auto *memory = new Memory(size);
        nb::capsule owner(memory, [](void *p) noexcept { delete (Memory *)p; });
        return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(memory->get(), {size}, owner);
    });
    // Bytes per second of `threads` threads that read `bytes` of memory, the best of `repeats`: what weights cannot beat.
    m.def(
        "read_bandwidth",
        [](int threads, size_t bytes, int repeats) {
            nb::gil_scoped_release release;
            std::lock_guard<std::mutex> guard(pool_lock);
            Pool &pool = shared_pool(threads);
            const Memory memory(bytes);
            std::memset(memory.get(), 1, bytes);
            std::atomic<uint64_t> keep{0};
            double best = 0;
            for (int i = 0; i < repeats; i++) {
                const auto start = std::chrono::steady_clock::now();
                pool.run([&](int thread) {
                    const size_t part = bytes / 8 / pool.threads() / 32 * 32;
                    const uint64_t *p = (const uint64_t *)memory.get() + part * thread;
                    uint64_t sum[32] = {};
                    for (size_t at = 0; at < part; at += 32)
                        for (int j = 0; j < 32; j++) sum[j] += p[at + j];
                    for (int j = 0; j < 32; j++) keep += sum[j];
                });
                const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
                best = std::max(best, (double)bytes / took.count());
            }
            return keep ? best : 0.0;
        },
        nb::arg("threads"), nb::arg("bytes") = (size_t)256 << 20, nb::arg("repeats") = 5);
    // A run of columns of a sweep, in place.
    m.def(
        "decide_columns",
        [](Out<float, 2> w, In<float, 2> u, std::optional<In<uint8_t, 2>> keep, std::optional<In<float, 1>> scale,
           std::optional<In<float, 1>> zero, std::optional<In<float, 1>> levels, Out<float, 2> q, Out<float, 2> errors,
           std::optional<Out<uint8_t, 2>> codes, int begin, int end, int reach, const std::string &isa) {
            const int64_t span = (int64_t)w.shape(0), rows = (int64_t)w.shape(1);
            auto same = [&](const auto &x) { return (int64_t)x.shape(0) == span && (int64_t)x.shape(1) == rows; };
            auto row = [&](const auto &x) { return x && (int64_t)x->shape(0) == rows; };
            if ((int64_t)u.shape(0) != span || (int64_t)u.shape(1) != span || !same(q) || !same(errors) || (keep && !same(*keep)) ||
                (codes && !same(*codes)))
                throw nb::value_error("u must be (span, span), everything else (span, rows)");
            if (scale && !(row(scale) && row(zero) && row(levels) && codes)) throw nb::value_error("a grid needs scale, zero and levels (rows,), and codes");
            if (begin < 0 || end < begin || reach < end || reach > span || reach - begin > MOST_COLUMNS)
                throw nb::value_error("wrong range of columns");
            const ColumnRun run = {w.data(),
                                   u.data(),
                                   keep ? keep->data() : nullptr,
                                   scale ? scale->data() : nullptr,
                                   scale ? zero->data() : nullptr,
                                   scale ? levels->data() : nullptr,
                                   q.data(),
                                   errors.data(),
                                   scale ? codes->data() : nullptr,
                                   rows,
                                   span,
                                   begin,
                                   end,
                                   reach};
            const Ops *ops = ops_named(isa);
            nb::gil_scoped_release release;
            ops->decide(run);
        },
        nb::arg("w"), nb::arg("u"), nb::arg("keep").none(), nb::arg("scale").none(), nb::arg("zero").none(), nb::arg("levels").none(),
        nb::arg("q"), nb::arg("errors"), nb::arg("codes").none(), nb::arg("begin"), nb::arg("end"), nb::arg("reach"), nb::arg("isa") = "");
    m.def(
        "decide_entries",
        [](In<float, 2> w, Out<float, 2> left, In<float, 2> u, In<float, 2> v, std::optional<In<uint8_t, 2>> keep, In<float, 2> scale,
           In<float, 2> zero, In<float, 2> levels, Out<uint8_t, 2> codes, Out<float, 2> errors, const std::string &isa) {
            const int64_t span = (int64_t)w.shape(0), rows = (int64_t)w.shape(1);
            auto same = [&](const auto &x) { return (int64_t)x.shape(0) == span && (int64_t)x.shape(1) == rows; };
            auto square = [](const auto &x, int64_t n) { return (int64_t)x.shape(0) == n && (int64_t)x.shape(1) == n; };
            if (!square(u, span) || !square(v, rows) || !same(left) || !same(scale) || !same(zero) || !same(levels) || !same(codes) ||
                !same(errors) || (keep && !same(*keep)))
                throw nb::value_error("u must be (span, span), v (rows, rows), everything else (span, rows)");
            std::vector<float> above((size_t)rows);
            const EntryRun run = {w.data(),      left.data(),  u.data(),      v.data(), keep ? keep->data() : nullptr, scale.data(), zero.data(),
                                  levels.data(), codes.data(), errors.data(), above.data(), rows, span};
            const Ops *ops = ops_named(isa);
            nb::gil_scoped_release release;
            ops->decide_all(run);
        },
        nb::arg("w"), nb::arg("left"), nb::arg("u"), nb::arg("v"), nb::arg("keep").none(), nb::arg("scale"), nb::arg("zero"),
        nb::arg("levels"), nb::arg("codes"), nb::arg("errors"), nb::arg("isa") = "");
    bind_engine(m);
}
