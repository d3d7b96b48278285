#include "matrix.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace lissom {
namespace {

struct Slot {
    uint8_t position, code;
};

// The weights of one tile before they are laid out: code (16, G) and keep (16, G).
struct Raw {
    std::vector<uint8_t> code, keep;
    uint8_t zero[ROWS];
};

void put_dense(Kind kind, int G, const Raw &raw, uint8_t *out) {
    auto at = [&](int r, int c) { return raw.code[(size_t)r * G + c]; };
    for (int half = 0; half < 2; half++)
        for (int r = 0; r < 8; r++)
            for (int j = 0; j < 4; j++) {
                const int row = 8 * half + r, byte = 32 * half + 4 * r + j;
                switch (kind) {
                case D8:
                    for (int c = 0; c < G; c += 4) out[c / 4 * 64 + byte] = (uint8_t)(at(row, c + j) - 128);
                    break;
                case D4:
                    for (int c = 0; c < G; c += 8) out[c / 8 * 64 + byte] = (uint8_t)(at(row, c + j) | at(row, c + 4 + j) << 4);
                    break;
                case D6:
                    for (int c = 0; c < G; c++)
                        if (c % 4 == j) {
                            uint8_t *block = out + c / 32 * 384;
                            block[c % 32 / 8 * 64 + byte] |= (uint8_t)((at(row, c) & 15) << (c % 8 / 4 * 4));
                            block[256 + c % 32 / 16 * 64 + byte] |= (uint8_t)((at(row, c) >> 4) << (c % 16 / 4 * 2));
                        }
                    break;
                case D2:
                    for (int c = 0; c < G; c++)
                        if (c % 4 == j) out[c / 16 * 64 + byte] |= (uint8_t)(at(row, c) << (c % 16 / 4 * 2));
                    break;
                case D3:
                    for (int c = 0; c < G; c++)
                        if (c % 4 == j) {
                            uint8_t *block = out + c / 32 * 192;
                            block[c % 32 / 16 * 64 + byte] |= (uint8_t)((at(row, c) & 3) << (c % 16 / 4 * 2));
                            block[128 + byte] |= (uint8_t)((at(row, c) >> 2) << (c % 32 / 4));
                        }
                    break;
                default: break;
                }
            }
}

// Lays out the slots of 16 columns; what does not fit goes to `spill`.
void put_slots(Kind kind, int N, int G, int base, const Raw &raw, bool may_spill, uint8_t *out, std::vector<uint16_t> &spill) {
    for (int r = 0; r < ROWS; r++) {
        std::vector<Slot> slots;
        for (int c = 0; c < 16; c++)
            if (raw.keep[(size_t)r * G + base + c]) slots.push_back({(uint8_t)c, raw.code[(size_t)r * G + base + c]});
        if (kind == N24) {
            for (int quad = 0; quad < 4; quad++) {
                std::vector<Slot> two;
                for (auto s : slots)
                    if (s.position / 4 == quad) two.push_back(s);
                if (two.size() > 2) throw std::invalid_argument("more than 2 of 4 inputs are kept");
                while (two.size() < 2) two.push_back({(uint8_t)(4 * quad), raw.zero[r]});
                for (int s = 0; s < 2; s++) {
                    out[2 * r + s] |= (uint8_t)((two[s].position & 3) << (2 * quad));
                    out[32 + quad / 2 * 32 + 2 * r + s] |= (uint8_t)(two[s].code << (quad % 2 * 4));
                }
            }
            continue;
        }
        for (size_t i = N; i < slots.size(); i++) {
            if (!may_spill) throw std::invalid_argument("more than " + std::to_string(N) + " of 16 inputs are kept");
            spill.push_back((uint16_t)(r | (base + slots[i].position) << 4 | slots[i].code << 11));
        }
        slots.resize(N, {0, raw.zero[r]});
        for (int i = 0; i < N; i++) {
            if (kind == NM4) {
                out[i / 2 * 32 + 2 * r + i % 2] = (uint8_t)(slots[i].position | slots[i].code << 4);
            } else {
                uint8_t *block = out + i / 4 * 96;
                block[4 * (r % 8) + i % 4] |= (uint8_t)(slots[i].position << (r / 8 * 4));
                block[32 + r / 8 * 32 + 4 * (r % 8) + i % 4] = (uint8_t)(slots[i].code - 128);
            }
        }
    }
}

// The view of a matrix without its data; refuses sizes that no kernel has.
View shape(Kind kind, int rows, int columns, int G, int N, int zeros, int zero, bool spill) {
    if (rows < 1 || columns < 1) throw std::invalid_argument("empty matrix");
    if (G != 32 && G != 64 && G != 128) throw std::invalid_argument("tiles have 32, 64 or 128 columns");
    const bool by_row = kind == NM4 && N == 0;
    if (by_row && spill) throw std::invalid_argument("slots of each strip have no spill list");
    if ((kind == NM4 && !by_row && (N < 2 || N > 16 || N % 2)) || (kind == NM8 && (N < 4 || N > 16 || N % 4)))
        throw std::invalid_argument("bad number of slots");
    if (spill && kind != NM4) throw std::invalid_argument("only N:16 int4 has a spill list");
    View v{};
    v.kind = kind, v.rows = rows, v.columns = columns, v.G = G;
    v.N = kind == N24 ? 8 : kind == NM4 || kind == NM8 ? N : 0;
    v.strips = (rows + ROWS - 1) / ROWS, v.tiles = (columns + G - 1) / G;
    v.zeros = zeros, v.zero = zero, v.spill = spill;
    const int payload = payload_bytes(kind, G, v.N);
    if (!payload && !by_row) throw std::invalid_argument("no such kind of matrix");
    v.tile_bytes = 32 + (zeros ? 16 : 0) + payload;
    return v;
}

size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes before the first strip.
size_t prefix(const View &v) { return v.kind == NM4 && v.N == 0 ? whole_lines(v.strips) + whole_lines(4 * (size_t)v.rows) : 0; }

// Points `v` to the slots and the order at the start of its data.
void read_prefix(View &v, const uint8_t *data) {
    if (!prefix(v)) return;
    v.slots = data;
    v.order = reinterpret_cast<const int32_t *>(data + whole_lines(v.strips));
}

// Rows by what they need, the most first, and the even number of slots that each strip of them takes.
void arrange(int rows, int columns, int width, const uint8_t *values, const float *zero, const uint8_t *mask, uint8_t *slots, int32_t *order) {
    const int groups = (columns + width - 1) / width;
    std::vector<int> need(rows, 0);
    for (int r = 0; r < rows; r++) {
        order[r] = r;
        for (int from = 0; from < columns; from += 16) {
            int kept = 0;
            for (int c = from; c < std::min(from + 16, columns); c++) {
                const size_t i = (size_t)r * columns + c;
                kept += (!mask || mask[i]) && values[i] != (uint8_t)zero[(size_t)r * groups + c / width];
            }
            need[r] = std::max(need[r], kept);
        }
    }
    std::stable_sort(order, order + rows, [&](int32_t a, int32_t b) { return need[a] > need[b]; });
    for (int r = 0; r < rows; r += ROWS) slots[r / ROWS] = (uint8_t)std::max(2, (need[order[r]] + 1) / 2 * 2);
}

} // namespace

void Matrix::allocate(size_t size) {
    bytes = size;
    const size_t room = (size + SLACK + 63) / 64 * 64;
    data.reset((uint8_t *)std::aligned_alloc(64, room));
    if (!data) throw std::bad_alloc();
    std::memset(data.get(), 0, room);
}

std::unique_ptr<Matrix> borrow(Kind kind, int rows, int columns, int G, int N, int zeros, int zero, bool spill,
                               const uint8_t *data, size_t size) {
    auto m = std::make_unique<Matrix>();
    View &v = m->view;
    v = shape(kind, rows, columns, G, N, zeros, zero, spill);
    m->offset.resize((size_t)v.strips + 1);
    size_t at = 0;
    const auto need = [&](size_t bytes) {
        if (at + bytes + SLACK > size) throw std::invalid_argument("the data of a matrix is cut short");
    };
    if (const size_t before = prefix(v)) {
        need(before);
        if (reinterpret_cast<uintptr_t>(data) % alignof(int32_t)) throw std::invalid_argument("the data of a matrix is not aligned");
        read_prefix(v, data);
        std::vector<bool> seen(rows);
        for (int r = 0; r < rows; r++) {
            if (v.order[r] < 0 || v.order[r] >= rows || seen[v.order[r]]) throw std::invalid_argument("the order of rows is none");
            seen[v.order[r]] = true;
        }
        for (int s = 0; s < v.strips; s++)
            if (v.slots[s] < 2 || v.slots[s] > 16 || v.slots[s] % 2) throw std::invalid_argument("bad number of slots");
        at = before;
    }
    for (int s = 0; s < v.strips; s++) {
        m->offset[s] = at;
        if (!spill) {
            at += (size_t)v.tiles * of_strip(v, s).tile_bytes;
            continue;
        }
        for (int t = 0; t < v.tiles; t++) { // where strips end depends on the lists
            uint16_t count, e;
            need((size_t)v.tile_bytes + 2);
            std::memcpy(&count, data + at + v.tile_bytes, 2);
            at += (size_t)v.tile_bytes + 2;
            need(2 * (size_t)count);
            for (int i = 0; i < count; i++, at += 2) {
                std::memcpy(&e, data + at, 2);
                if ((e >> 4 & 127) >= G) throw std::invalid_argument("an entry of a spill list is out of range");
            }
            m->spilled += count;
        }
    }
    need(0);
    m->offset[v.strips] = m->bytes = at;
    v.data = data, v.offset = m->offset.data();
    return m;
}

std::unique_ptr<Matrix> pack(Kind kind, int rows, int columns, int width, const uint8_t *values, const float *scale,
                             const float *zero, const uint8_t *mask, int G, int N, bool spill) {
    const bool slots = kind == NM4 || kind == NM8 || kind == N24;
    if (width < 1) throw std::invalid_argument("empty group");
    const int groups = (columns + width - 1) / width;
    if (groups > 1 && width % G) throw std::invalid_argument("tiles must not cross quantization groups");
    const int top = kind == D2 ? 3 : kind == D3 ? 7 : kind == D6 ? 63 : kind == D8 || kind == NM8 ? 255 : 15;

    auto m = std::make_unique<Matrix>();
    int zeros = 0;
    for (size_t i = 0; i < (size_t)rows * groups; i++) {
        if (!(zero[i] >= 0 && zero[i] <= top)) throw std::invalid_argument("zero point out of range");
        if (zero[i] != zero[0]) zeros = 1;
    }
    View &v = m->view;
    v = shape(kind, rows, columns, G, N, zeros, (int)zero[0], spill);
    const int header = 32 + (v.zeros ? 16 : 0);
    const size_t before = prefix(v);
    std::vector<int32_t> first((before + 3) / 4); // slots and order until there is a place for them
    uint8_t *const front = reinterpret_cast<uint8_t *>(first.data());
    read_prefix(v, front);
    if (before) arrange(rows, columns, width, values, zero, mask, front, reinterpret_cast<int32_t *>(front + whole_lines(v.strips)));

    std::vector<std::vector<uint16_t>> spills;
    std::vector<size_t> start((size_t)v.strips + 1, 0);
    for (int s = 0; s < v.strips; s++) start[s + 1] = start[s] + (size_t)v.tiles * of_strip(v, s).tile_bytes;
    std::vector<uint8_t> dense(start[v.strips], 0);
    if (spill) spills.resize((size_t)v.strips * v.tiles);
    Raw raw;
    raw.code.resize((size_t)ROWS * G), raw.keep.resize((size_t)ROWS * G);
    for (int s = 0; s < v.strips; s++)
        for (int t = 0; t < v.tiles; t++) {
            const View one = of_strip(v, s);
            uint8_t *tile = dense.data() + start[s] + (size_t)t * one.tile_bytes;
            const int group = t * G / width;
            for (int r = 0; r < ROWS; r++) {
                const bool inside = s * ROWS + r < rows;
                const int row = inside && v.order ? v.order[s * ROWS + r] : s * ROWS + r;
                const size_t g = (size_t)row * groups + group;
                const uint16_t half = inside ? float_to_half(scale[g]) : 0;
                std::memcpy(tile + 2 * r, &half, 2);
                raw.zero[r] = inside ? (uint8_t)zero[g] : (uint8_t)v.zero;
                if (v.zeros) tile[32 + r] = raw.zero[r];
                for (int c = 0; c < G; c++) {
                    const int column = t * G + c;
                    const size_t i = (size_t)row * columns + column;
                    const bool keep = inside && column < columns && (!mask || mask[i]);
                    const uint8_t code = keep ? values[i] : raw.zero[r];
                    if (code > top) throw std::invalid_argument("code out of range");
                    raw.code[(size_t)r * G + c] = code;
                    raw.keep[(size_t)r * G + c] = keep && code != raw.zero[r];
                }
            }
            if (!slots) {
                put_dense(kind, G, raw, tile + header);
                continue;
            }
            std::vector<uint16_t> list;
            const int step = payload_bytes(kind, 16, one.N);
            for (int c = 0; c < G; c += 16) put_slots(kind, one.N, G, c, raw, spill, tile + header + c / 16 * step, list);
            if (list.size() > 65535) throw std::invalid_argument("spill list too long");
            m->spilled += list.size();
            if (spill) spills[(size_t)s * v.tiles + t] = std::move(list);
        }

    m->allocate(before + dense.size() + (spill ? 2 * (spills.size() + m->spilled) : 0));
    uint8_t *out = m->data.get();
    if (before) std::memcpy(out, front, before), out += before;
    m->offset.resize(v.strips + 1);
    for (int s = 0; s < v.strips; s++) {
        m->offset[s] = (uint64_t)(out - m->data.get());
        const int bytes = of_strip(v, s).tile_bytes;
        for (int t = 0; t < v.tiles; t++) {
            const size_t i = (size_t)s * v.tiles + t;
            std::memcpy(out, dense.data() + start[s] + (size_t)t * bytes, bytes), out += bytes;
            if (!spill) continue;
            const uint16_t count = (uint16_t)spills[i].size();
            std::memcpy(out, &count, 2), out += 2;
            std::memcpy(out, spills[i].data(), 2 * (size_t)count), out += 2 * (size_t)count;
        }
    }
    m->offset[v.strips] = (uint64_t)(out - m->data.get());
    v.data = m->data.get(), v.offset = m->offset.data();
    read_prefix(v, m->data.get());
    return m;
}

std::unique_ptr<Matrix> round(int bits, int rows, int columns, const float *weights, int G) {
    const int middle = 1 << (bits - 1), top = middle - 1;
    const Kind kind = bits == 8 ? D8 : D6;
    if ((bits != 6 && bits != 8) || columns % G) throw std::invalid_argument("8 or 6 bits and whole tiles only");
    auto m = std::make_unique<Matrix>();
    m->view = shape(kind, rows, columns, G, 0, 0, middle, false);
    View &v = m->view;
    m->allocate((size_t)v.strips * v.tiles * v.tile_bytes);
    m->offset.resize((size_t)v.strips + 1);
    for (int s = 0; s <= v.strips; s++) m->offset[s] = (uint64_t)s * v.tiles * v.tile_bytes;
    v.data = m->data.get(), v.offset = m->offset.data();
    Raw raw;
    raw.code.assign((size_t)ROWS * G, (uint8_t)middle);
    for (int s = 0; s < v.strips; s++)
        for (int t = 0; t < v.tiles; t++) {
            uint8_t *tile = m->data.get() + m->offset[s] + (size_t)t * v.tile_bytes;
            for (int r = 0; r < ROWS && s * ROWS + r < rows; r++) {
                const float *w = weights + (size_t)(s * ROWS + r) * columns + (size_t)t * G;
                int32_t bits_of_most = 0; // magnitudes order like their bits, Inf and NaN above all
                for (int c = 0; c < G; c++) {
                    int32_t x;
                    std::memcpy(&x, w + c, 4);
                    bits_of_most = std::max(bits_of_most, x & 0x7fffffff);
                }
                float most;
                std::memcpy(&most, &bits_of_most, 4);
                const uint16_t half = float_to_half(most / (float)top);
                const float scale = half_to_float(half), inverse = scale > 0 ? 1 / scale : 0.0f;
                if (!(scale <= 65504.0f)) throw std::invalid_argument("weights are not finite or too large for half-precision scales");
                std::memcpy(tile + 2 * r, &half, 2);
                for (int c = 0; c < G; c++) { // to the nearest, ties to even
                    const float y = (w[c] * inverse + 12582912.0f) - 12582912.0f;
                    raw.code[(size_t)r * G + c] = (uint8_t)(middle + (int)std::min(std::max(y, (float)-top), (float)top));
                }
            }
            if (s == v.strips - 1)
                for (int r = rows - s * ROWS; r < ROWS; r++) std::fill_n(raw.code.begin() + (size_t)r * G, G, (uint8_t)middle);
            put_dense(kind, G, raw, tile + 32);
        }
    return m;
}

} // namespace lissom
