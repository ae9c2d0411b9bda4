/* float32 products of bfloat16 rows with a weight that lies row by row, in AMX tiles.
 *
 * A tile of the weight, 16 of its rows by 32 elements, is read as it lies; the rows of x are laid
 * out once, pairs of elements by row, as the other operand has to be. The sums of a tile are
 * float32 and are stored as such: each weight is read once, and nothing is rounded to bfloat16.
 * A sum's order is the same whatever rows stand beside it.
 */
#include "vectors.h"

#include <cpuid.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define TILES                                                                       \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl")))
#define SIDE 16       /* rows of a tile, and its words in a row */
#define STEP 32       /* elements of a row that a tile holds */
#define COLUMNS 32    /* rows of the weight that a task takes at a time: two tiles */
#define PIECES 8      /* such pieces of a task */
#define TILE_BYTES 1024
#define ARCH_REQ_XCOMP_PERM 0x1023 /* asm/prctl.h */
#define XFEATURE_XTILEDATA 18

typedef struct {
    const uint16_t *x, *weight; /* [rows, size] and [columns, size], dense */
    float *out;                 /* [rows, columns] */
    int64_t rows, columns, size, num_threads;
} Product;

typedef struct {
    const Product *product;
    const char *x; /* tiles [rows / SIDE][size / STEP] */
    int64_t row_tiles, num_tasks;
    atomic_long next;
} Work;

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes_of_a_row[16];
    uint8_t rows[16];
} Configuration;

/* Whether there are tiles, and the system lets this process use them. */
int64_t tiles_run_here(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int has_tiles = (d >> 24 & 1) && (d >> 22 & 1);
    return has_tiles && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

/* 16 rows of x from `first` on, STEP elements each: words become columns. */
TARGET static void lay_out(const Product *p, int64_t first, int64_t element, int32_t *into) {
    __m512i r[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++)
        r[i] = words(p->x + (first + i) * p->size + element, 0, first + i < p->rows ? 0xffff : 0);
    transpose(r);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) _mm512_store_si512(into + i * WIDTH, r[i]);
}

/* A tile of sums, 16 columns by 16 rows, goes to the rows of `out`. */
TARGET static void give(const Product *p, const float *sums, int64_t row, int64_t column) {
    __m512i r[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) r[i] = _mm512_load_si512(sums + i * WIDTH);
    transpose(r);
    int64_t count = smaller(SIDE, p->rows - row);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++)
        if (i < count) _mm512_storeu_si512(p->out + (row + i) * p->columns + column, r[i]);
}

/* COLUMNS columns of every row; the weights of the next ones are fetched meanwhile. */
TILES static void columns_of(const Work *work, int64_t column, int has_next) {
    const Product *p = work->product;
    int64_t steps = p->size / STEP, stride = p->size * 2;
    const char *weight = (const char *)(p->weight + column * p->size);
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    for (int64_t tile = 0; tile < work->row_tiles; tile += 2) {
        int has_two = tile + 1 < work->row_tiles;
        const char *x = work->x + tile * steps * TILE_BYTES;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t step = 0; step < steps; step++, x += TILE_BYTES) {
            const char *from = weight + step * STEP * 2;
            if (has_next && tile == 0)
                for (int64_t i = 0; i < COLUMNS; i++)
                    _mm_prefetch(from + (COLUMNS + i) * stride, _MM_HINT_T0);
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
        for (int64_t i = 0; i < (has_two ? 4 : 2); i++)
            give(p, sums[i], (tile + i / 2) * SIDE, column + i % 2 * SIDE);
    }
}

TILES static void take_columns(void *data) {
    Work *work = data;
    const Product *p = work->product;
    Configuration before, own = {.palette = 1};
    for (int i = 0; i < 8; i++) own.bytes_of_a_row[i] = SIDE * 4, own.rows[i] = SIDE;
    _tile_storeconfig(&before);
    _tile_loadconfig(&own);
    for (int64_t task; (task = atomic_fetch_add(&work->next, 1)) < work->num_tasks;) {
        int64_t first = task * COLUMNS * PIECES;
        int64_t last = smaller(first + COLUMNS * PIECES, p->columns);
        for (int64_t column = first; column < last; column += COLUMNS) {
            /* the last ones may be fewer: some are then computed twice */
            int64_t from = smaller(column, p->columns - COLUMNS);
            columns_of(work, from, column + 2 * COLUMNS <= p->columns);
        }
    }
    _tile_loadconfig(&before); /* whoever else uses tiles on this thread finds his own */
}

/* 0 where memory ran out. `columns` >= COLUMNS, `size` a multiple of STEP. */
int64_t tile_product(const Product *p,
                     void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    int64_t row_tiles = (p->rows + SIDE - 1) / SIDE, steps = p->size / STEP;
    char *x = aligned_alloc(64, (size_t)(row_tiles * steps * TILE_BYTES));
    if (!x) return 0;
    for (int64_t tile = 0; tile < row_tiles; tile++)
        for (int64_t step = 0; step < steps; step++)
            lay_out(p, tile * SIDE, step * STEP,
                    (int32_t *)(x + (tile * steps + step) * TILE_BYTES));
    int64_t tasks = (p->columns + COLUMNS * PIECES - 1) / (COLUMNS * PIECES);
    Work work = {p, x, row_tiles, tasks, 0};
    if (parallel && p->num_threads > 1)
        parallel(take_columns, &work, (unsigned)p->num_threads, 0);
    else
        take_columns(&work);
    free(x);
    return 1;
}
