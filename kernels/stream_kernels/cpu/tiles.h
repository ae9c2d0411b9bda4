/* AMX tiles of bfloat16: rows laid out for them, and the product of one pair of tiles with another.
 *
 * A tile of a weight, 16 of its rows by 32 elements, is read as it lies; the rows of x are laid out
 * once, pairs of elements by row, as the other operand has to be. Sums are float32; their order is
 * the same whatever rows stand beside it.
 */
#pragma once
#include "vectors.h"

#include <stdlib.h>

#define TILES                                                                       \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl")))
#define SIDE 16       /* rows of a tile, and its words in a row */
#define STEP 32       /* elements of a row that a tile holds */
#define COLUMNS 32    /* rows of the weight that are taken at a time: two tiles */
#define TILE_BYTES 1024

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes_of_a_row[16];
    uint8_t rows[16];
} Configuration;

/* What whoever else uses tiles on this thread finds again after `give_tiles_back`. */
TILES static inline Configuration take_tiles(void) {
    Configuration before, own = {.palette = 1};
    for (int i = 0; i < 8; i++) own.bytes_of_a_row[i] = SIDE * 4, own.rows[i] = SIDE;
    _tile_storeconfig(&before);
    _tile_loadconfig(&own);
    return before;
}

TILES static inline void give_tiles_back(Configuration before) { _tile_loadconfig(&before); }

static inline int64_t tiles_of(int64_t rows) { return (rows + SIDE - 1) / SIDE; }

/* Rows [rows, size] as tiles [rows / SIDE][size / STEP], words become columns; null where memory ran
 * out. The caller frees it. */
TARGET static inline char *laid_out(const uint16_t *x, int64_t rows, int64_t size) {
    int64_t row_tiles = tiles_of(rows), steps = size / STEP;
    char *all = aligned_alloc(64, (size_t)(row_tiles * steps * TILE_BYTES));
    if (!all) return 0;
    for (int64_t tile = 0; tile < row_tiles; tile++)
        for (int64_t step = 0; step < steps; step++) {
            __m512i r[WIDTH];
            int64_t first = tile * SIDE;
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                r[i] = words(x + (first + i) * size + step * STEP, 0, first + i < rows ? 0xffff : 0);
            transpose(r);
            int32_t *into = (int32_t *)(all + (tile * steps + step) * TILE_BYTES);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) _mm512_store_si512(into + i * WIDTH, r[i]);
        }
    return all;
}

/* COLUMNS rows of a weight by one or two tiles of x, over all of their elements: sums[0] and [1] are
 * the first and second tile of the weight by the first of x, sums[2] and [3] by the second. `next`,
 * as many rows, or null, is fetched meanwhile. */
TILES static inline void multiply(const uint16_t *weight, int64_t size, const char *x, int has_two,
                                  const uint16_t *next, float sums[4][SIDE * SIDE]) {
    int64_t steps = size / STEP, stride = size * 2;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < steps; step++, x += TILE_BYTES) {
        const char *from = (const char *)weight + step * STEP * 2;
        if (next)
            for (int64_t i = 0; i < COLUMNS; i++)
                _mm_prefetch((const char *)(next + step * STEP) + i * stride, _MM_HINT_T0);
        _tile_loadd(4, from, stride);
        _tile_loadd(5, from + SIDE * stride, stride);
        _tile_loadd(6, x, SIDE * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (has_two) {
            _tile_loadd(7, x + steps * TILE_BYTES, SIDE * 4);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], SIDE * 4);
    _tile_stored(1, sums[1], SIDE * 4);
    _tile_stored(2, sums[2], SIDE * 4);
    _tile_stored(3, sums[3], SIDE * 4);
}
