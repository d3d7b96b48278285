// Packed matrices back to weights.
#include "matrix.h"

#include <algorithm>
#include <cstring>

namespace lissom {

const uint8_t *decode_tile(const View &v, const uint8_t *tile, int16_t *w, float *scale, int from, int to) {
    const int G = v.G;
    int16_t zero[ROWS];
    for (int r = 0; r < ROWS; r++) {
        uint16_t half;
        std::memcpy(&half, tile + 2 * r, 2);
        scale[r] = half_to_float(half);
        zero[r] = (int16_t)(v.zeros ? tile[32 + r] : v.zero);
    }
    const uint8_t *p = tile + 32 + (v.zeros ? 16 : 0);
    std::memset(w + (size_t)from * G, 0, sizeof(int16_t) * (to - from) * G);
    for (int r = from; r < to; r++) {
        int16_t *row = w + (size_t)r * G;
        const int half = r / 8 * 32, byte4 = 4 * (r % 8);
        switch (v.kind) {
        case D8:
            for (int c = 0; c < G; c++) row[c] = (int16_t)((int8_t)p[c / 4 * 64 + half + byte4 + c % 4] + 128 - zero[r]);
            break;
        case D4:
            for (int c = 0; c < G; c++) row[c] = (int16_t)((p[c / 8 * 64 + half + byte4 + c % 4] >> (c % 8 / 4 * 4) & 15) - zero[r]);
            break;
        case D6:
            for (int c = 0; c < G; c++) {
                const uint8_t *block = p + c / 32 * 384;
                const int low = block[c % 32 / 8 * 64 + half + byte4 + c % 4] >> (c % 8 / 4 * 4) & 15;
                const int high = block[256 + c % 32 / 16 * 64 + half + byte4 + c % 4] >> (c % 16 / 4 * 2) & 3;
                row[c] = (int16_t)((low | high << 4) - zero[r]);
            }
            break;
        case D2:
            for (int c = 0; c < G; c++) row[c] = (int16_t)((p[c / 16 * 64 + half + byte4 + c % 4] >> (c % 16 / 4 * 2) & 3) - zero[r]);
            break;
        case D3:
            for (int c = 0; c < G; c++) {
                const uint8_t *block = p + c / 32 * 192;
                const int low = block[c % 32 / 16 * 64 + half + byte4 + c % 4] >> (c % 16 / 4 * 2) & 3;
                const int high = block[128 + half + byte4 + c % 4] >> (c % 32 / 4) & 1;
                row[c] = (int16_t)((low | high << 2) - zero[r]);
            }
            break;
        case NM4:
            for (int g = 0; g < G / 16; g++)
                for (int i = 0; i < v.N; i++) {
                    const uint8_t b = p[g * v.N * 16 + i / 2 * 32 + 2 * r + i % 2];
                    row[16 * g + (b & 15)] += (int16_t)((b >> 4) - zero[r]);
                }
            break;
        case NM8:
            for (int g = 0; g < G / 16; g++)
                for (int i = 0; i < v.N; i++) {
                    const uint8_t *block = p + g * v.N * 24 + i / 4 * 96;
                    const int position = block[byte4 + i % 4] >> (r / 8 * 4) & 15;
                    row[16 * g + position] += (int16_t)((int8_t)block[32 + half + byte4 + i % 4] + 128 - zero[r]);
                }
            break;
        case N24:
            for (int g = 0; g < G / 16; g++)
                for (int quad = 0; quad < 4; quad++)
                    for (int s = 0; s < 2; s++) {
                        const uint8_t *block = p + g * 96;
                        const int position = block[2 * r + s] >> (2 * quad) & 3;
                        const int code = block[32 + quad / 2 * 32 + 2 * r + s] >> (quad % 2 * 4) & 15;
                        row[16 * g + 4 * quad + position] += (int16_t)(code - zero[r]);
                    }
            break;
        }
    }
    const uint8_t *end = tile + v.tile_bytes;
    if (!v.spill) return end;
    uint16_t count, e;
    std::memcpy(&count, end, 2), end += 2;
    for (int i = 0; i < count; i++, end += 2) {
        std::memcpy(&e, end, 2);
        const int r = e & 15;
        if (r >= from && r < to) w[(size_t)r * G + (e >> 4 & 127)] += (int16_t)((e >> 11) - zero[r]);
    }
    return end;
}

void decode_row(const View &v, int row, float *out) {
    int16_t w[ROWS * 128];
    float scale[ROWS];
    const int at = v.order ? (int)(std::find(v.order, v.order + v.rows, row) - v.order) : row;
    const View one = of_strip(v, at / ROWS);
    const uint8_t *tile = v.data + v.offset[at / ROWS];
    const int r = at % ROWS;
    for (int t = 0; t < v.tiles; t++) {
        tile = decode_tile(one, tile, w, scale, r, r + 1);
        for (int c = 0; c < v.G && t * v.G + c < v.columns; c++) out[t * v.G + c] = (float)w[r * v.G + c] * scale[r];
    }
}

} // namespace lissom
