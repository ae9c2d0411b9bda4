/* float32 products of bfloat16 rows with a weight that lies row by row, in AMX tiles: each weight is
 * read once, and nothing is rounded to bfloat16.
 */
#include "tiles.h"

#include <cpuid.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PIECES 8 /* of COLUMNS columns each: a task */
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
    int64_t num_tasks;
    atomic_long next;
} Work;

/* Whether there are tiles, and the system lets this process use them. */
int64_t tiles_run_here(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    int has_tiles = (d >> 24 & 1) && (d >> 22 & 1);
    return has_tiles && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
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

/* COLUMNS columns of every row. */
TILES static void columns_of(const Work *work, int64_t column, int has_next) {
    const Product *p = work->product;
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    int64_t row_tiles = tiles_of(p->rows), bytes = p->size / STEP * TILE_BYTES;
    for (int64_t tile = 0; tile < row_tiles; tile += 2) {
        int has_two = tile + 1 < row_tiles;
        multiply(p->weight + column * p->size, p->size, work->x + tile * bytes, has_two,
                 has_next && tile == 0, sums);
        for (int64_t i = 0; i < (has_two ? 4 : 2); i++)
            give(p, sums[i], (tile + i / 2) * SIDE, column + i % 2 * SIDE);
    }
}

TILES static void take_columns(void *data) {
    Work *work = data;
    const Product *p = work->product;
    Configuration before = take_tiles();
    for (int64_t task; (task = atomic_fetch_add(&work->next, 1)) < work->num_tasks;) {
        int64_t first = task * COLUMNS * PIECES;
        int64_t last = smaller(first + COLUMNS * PIECES, p->columns);
        for (int64_t column = first; column < last; column += COLUMNS) {
            /* the last ones may be fewer: some are then computed twice */
            int64_t from = smaller(column, p->columns - COLUMNS);
            columns_of(work, from, column + 2 * COLUMNS <= p->columns);
        }
    }
    give_tiles_back(before);
}

/* 0 where memory ran out. `columns` >= COLUMNS, `size` a multiple of STEP. */
int64_t tile_product(const Product *p,
                     void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    char *x = laid_out(p->x, p->rows, p->size);
    if (!x) return 0;
    Work work = {p, x, (p->columns + COLUMNS * PIECES - 1) / (COLUMNS * PIECES), 0};
    if (parallel && p->num_threads > 1)
        parallel(take_columns, &work, (unsigned)p->num_threads, 0);
    else
        take_columns(&work);
    free(x);
    return 1;
}
