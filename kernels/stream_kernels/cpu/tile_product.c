/* Products of bfloat16 rows with a weight that lies row by row, in AMX tiles: float32 as they are, or
 * rounded once to bfloat16. With few rows each weight is read once.
 */
#include "tiles.h"
#include "threads.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define CACHED_BYTES (384 << 10) /* of x, and of the weight, that a task works on */
#define MOST_ROWS 256            /* rows or columns of a task */
#define FEW_COLUMNS 64           /* of a task where rows are few: enough tasks for all threads */
#define ARCH_REQ_XCOMP_PERM 0x1023 /* asm/prctl.h */
#define XFEATURE_XTILEDATA 18

typedef struct {
    const uint16_t *x, *weight; /* [rows, size] and [columns, size], dense */
    void *out;                  /* [rows, columns] */
    const uint16_t *bias;       /* [columns], or null */
    const uint16_t *to;         /* [rows, columns] that a rounded product is added to, or null */
    int64_t rows, columns, size, is_bfloat16, num_threads;
} Product;

typedef struct {
    const Product *product;
    const char *x; /* tiles [rows / SIDE][size / STEP] */
    int64_t rows_each, columns_each, row_blocks, num_tasks;
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
    __m512 bias = p->bias ? widened(p->bias + column, 0xffff) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
        if (i >= count) continue;
        int64_t at = (row + i) * p->columns + column;
        __m512 x = _mm512_castsi512_ps(r[i]);
        if (p->bias) x = _mm512_add_ps(x, bias);
        if (p->is_bfloat16) {
            __m512i bits = rounded(x);
            if (p->to) bits = rounded(_mm512_add_ps(widened(p->to + at, 0xffff), upper(bits)));
            __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
            _mm256_storeu_si256((__m256i *)((uint16_t *)p->out + at), half);
        } else
            _mm512_storeu_ps((float *)p->out + at, x);
    }
}

/* The first of a task's columns; `columns`, where there is no such task. */
static int64_t columns_of(const Work *work, int64_t task) {
    return smaller(task / work->row_blocks * work->columns_each, work->product->columns);
}

/* A block of rows by a block of columns; caches hold what both read. The weight from `following` on
 * is wanted next. */
TILES static void multiply_blocks(const Work *work, int64_t task, int64_t following) {
    const Product *p = work->product;
    int64_t rows_from = task % work->row_blocks * work->rows_each;
    int64_t columns_from = columns_of(work, task);
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    int64_t row_tiles = tiles_of(p->rows), bytes = p->size / STEP * TILE_BYTES;
    int64_t first = rows_from / SIDE, end = smaller(row_tiles, first + work->rows_each / SIDE);
    int64_t last = smaller(columns_from + work->columns_each, p->columns);
    for (int64_t tile = first; tile < end; tile += 2)
        for (int64_t column = columns_from; column < last; column += COLUMNS) {
            /* the last ones may be fewer: some are then computed twice */
            int64_t from = smaller(column, p->columns - COLUMNS);
            int64_t next = column + COLUMNS < last ? column + COLUMNS : following;
            int has_two = tile + 1 < end, fetches = tile == first && next + COLUMNS <= p->columns;
            multiply(p->weight + from * p->size, p->size, work->x + tile * bytes, has_two,
                     fetches ? p->weight + next * p->size : 0, sums);
            for (int64_t i = 0; i < (has_two ? 4 : 2); i++)
                give(p, sums[i], (tile + i / 2) * SIDE, from + i % 2 * SIDE);
        }
}

TILES static void take_blocks(void *data) {
    Work *work = data;
    Configuration before = take_tiles();
    int64_t task = atomic_fetch_add(&work->next, 1);
    while (task < work->num_tasks) {
        int64_t next = atomic_fetch_add(&work->next, 1), following = columns_of(work, next);
        int is_other = following != columns_of(work, task);
        multiply_blocks(work, task, is_other ? following : work->product->columns);
        task = next;
    }
    give_tiles_back(before);
}

/* 0 where memory ran out. `columns` >= COLUMNS, `size` a multiple of STEP. */
int64_t tile_product(const Product *p, Parallel *parallel) {
    char *x = laid_out(p->x, p->rows, p->size);
    if (!x) return 0;
    int64_t each = smaller(CACHED_BYTES / (2 * p->size), MOST_ROWS) / COLUMNS * COLUMNS;
    if (each < COLUMNS) each = COLUMNS;
    int64_t columns_each = p->rows <= 2 * COLUMNS ? smaller(each, FEW_COLUMNS) : each;
    Work work = {p, x, each, columns_each, (p->rows + each - 1) / each, 0, 0};
    work.num_tasks = work.row_blocks * ((p->columns + columns_each - 1) / columns_each);
    share_out(take_blocks, &work, work.num_tasks, p->num_threads, parallel);
    free(x);
    return 1;
}
