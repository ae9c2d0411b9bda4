/* What a log-softmax needs of rows of logits: of each stretch of columns its largest logit and where
 * it stands, the sum of exponentials below it, and the logit of the row's target.
 *
 * `sums_of_logits` takes logits that are there; `sums_of_products` those of bfloat16 rows with a
 * weight, which are computed in AMX tiles and never stored. A stretch's sums are the same whatever
 * rows stand beside it and however many threads there are.
 */
#include "tiles.h"
#include "threads.h"

#include <math.h>

#define LOG2_E 1.44269504f
#define LOWEST (-1e38f)
#define ROWS_OF_A_TASK 8
#define VECTORS_OF_A_SUM 32 /* summed in float32 before they are added up in float64 */
#define CACHED_BYTES (768 << 10) /* of a weight, that several rows of x read in turn */

typedef struct {
    const void *x;      /* logits, or rows for a product */
    const void *weight; /* null, or [columns, size] */
    const int64_t *targets; /* [rows] */
    float *peaks, *totals, *chosen; /* [stretches, rows] twice, and [rows]: untouched without target */
    int32_t *places;    /* [stretches, rows]: the peak's column */
    int64_t rows, columns, first_column; /* of which column of all these are the first */
    int64_t row_stride; /* of logits, in elements */
    int64_t size, stretch, num_threads; /* of products: elements of a row, columns of a stretch */
    double scale; /* of products */
} LogSums;

typedef struct {
    const LogSums *sums;
    const char *x;
    int64_t num_tasks;
    atomic_long next;
} Work;

INLINE __m512 power_of_e(__m512 x) {
    return power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E)));
}

/* -- logits that are there ---------------------------------------------------------------------- */

TARGET static void one_row(const LogSums *s, int64_t row) {
    const float *logits = (const float *)s->x + row * s->row_stride;
    int64_t columns = s->columns, local = s->targets[row] - s->first_column;
    if (local >= 0 && local < columns) s->chosen[row] = logits[local];
    __m512 highest[4];
    for (int i = 0; i < 4; i++) highest[i] = _mm512_set1_ps(-INFINITY);
    int64_t column = 0;
    for (; column + 4 * WIDTH <= columns; column += 4 * WIDTH)
        for (int i = 0; i < 4; i++)
            highest[i] = _mm512_max_ps(highest[i], _mm512_loadu_ps(logits + column + i * WIDTH));
    for (; column < columns; column += WIDTH) {
        __mmask16 mask = mask_of(columns - column);
        highest[0] = _mm512_mask_max_ps(highest[0], mask, highest[0],
                                        _mm512_maskz_loadu_ps(mask, logits + column));
    }
    for (int i = 1; i < 4; i++) highest[0] = _mm512_max_ps(highest[0], highest[i]);
    float peak = _mm512_reduce_max_ps(highest[0]);
    __m512 top = _mm512_set1_ps(peak), below = _mm512_set1_ps(isinf(peak) && peak < 0 ? 0 : peak);
    int64_t place = 0;
    for (column = 0; column < columns; column += WIDTH) {
        __mmask16 mask = mask_of(columns - column);
        mask = _mm512_mask_cmp_ps_mask(mask, top, _mm512_maskz_loadu_ps(mask, logits + column),
                                       _CMP_EQ_OQ);
        if (mask) {
            place = column + __builtin_ctz(mask);
            break;
        }
    }
    __m512d total = _mm512_setzero_pd();
    for (column = 0; column < columns;) {
        int64_t end = smaller(columns, column + VECTORS_OF_A_SUM * WIDTH);
        __m512 some = _mm512_setzero_ps(), more = _mm512_setzero_ps();
        for (; column + 2 * WIDTH <= end; column += 2 * WIDTH) {
            __m512 a = _mm512_loadu_ps(logits + column), b = _mm512_loadu_ps(logits + column + WIDTH);
            some = _mm512_add_ps(some, power_of_e(_mm512_sub_ps(a, below)));
            more = _mm512_add_ps(more, power_of_e(_mm512_sub_ps(b, below)));
        }
        for (; column < end; column += WIDTH) {
            __mmask16 mask = mask_of(end - column);
            __m512 a = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, logits + column), below);
            some = _mm512_mask_add_ps(some, mask, some, power_of_e(a));
        }
        some = _mm512_add_ps(some, more);
        total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_castps512_ps256(some)));
        total = _mm512_add_pd(total, _mm512_cvtps_pd(_mm512_extractf32x8_ps(some, 1)));
    }
    s->peaks[row] = peak;
    s->places[row] = (int32_t)(s->first_column + place);
    s->totals[row] = (float)_mm512_reduce_add_pd(total);
}

static void take_rows(void *data) {
    Work *work = data;
    for (int64_t task; (task = atomic_fetch_add(&work->next, 1)) < work->num_tasks;) {
        int64_t first = task * ROWS_OF_A_TASK;
        int64_t last = smaller(first + ROWS_OF_A_TASK, work->sums->rows);
        for (int64_t row = first; row < last; row++) one_row(work->sums, row);
    }
}

/* 1. One stretch: all columns that are given. */
int64_t sums_of_logits(const LogSums *s, Parallel *parallel) {
    Work work = {s, 0, (s->rows + ROWS_OF_A_TASK - 1) / ROWS_OF_A_TASK, 0};
    share_out(take_rows, &work, work.num_tasks, s->num_threads, parallel);
    return 1;
}

/* -- logits in tiles, a row a lane -------------------------------------------------------------- */

/* Takes in COLUMNS columns of 16 rows, from `skip` on: one column a vector. */
TARGET static void absorb(const LogSums *s, const float *sums, int64_t row, int64_t stretch,
                          int64_t column, int64_t skip) {
    int64_t count = smaller(SIDE, s->rows - row), at = stretch * s->rows + row;
    __mmask16 mask = mask_of(count);
    __m512 scale = _mm512_set1_ps((float)s->scale);
    __m512 before = _mm512_maskz_loadu_ps(mask, s->peaks + at), peak = before;
    __m512 total = _mm512_maskz_loadu_ps(mask, s->totals + at);
    for (int64_t i = skip; i < COLUMNS; i++)
        peak = _mm512_max_ps(_mm512_mul_ps(_mm512_load_ps(sums + i * WIDTH), scale), peak);
    __mmask16 grown = _mm512_mask_cmp_ps_mask(mask, peak, before, _CMP_GT_OQ);
    if (grown) {
        total = _mm512_mul_ps(total, power_of_e(_mm512_sub_ps(before, peak)));
        __m512i places = _mm512_maskz_loadu_epi32(mask, s->places + at);
        for (int64_t i = COLUMNS - 1; i >= skip; i--) {
            __m512 logit = _mm512_mul_ps(_mm512_load_ps(sums + i * WIDTH), scale);
            __mmask16 here = _mm512_mask_cmp_ps_mask(grown, logit, peak, _CMP_EQ_OQ);
            places = _mm512_mask_mov_epi32(places, here, _mm512_set1_epi32((int32_t)(column + i)));
        }
        _mm512_mask_storeu_epi32(s->places + at, mask, places);
        _mm512_mask_storeu_ps(s->peaks + at, mask, peak);
    }
    __m512 more = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int64_t i = skip; i < COLUMNS; i++) {
        __m512 logit = _mm512_mul_ps(_mm512_load_ps(sums + i * WIDTH), scale);
        more = _mm512_add_ps(more, power_of_e(_mm512_sub_ps(logit, peak)));
    }
    _mm512_mask_storeu_ps(s->totals + at, mask, _mm512_add_ps(total, more));
    for (int64_t i = 0; i < count; i++) {
        int64_t local = s->targets[row + i] - column;
        if (local >= skip && local < COLUMNS)
            s->chosen[row + i] = sums[local * WIDTH + i] * (float)s->scale;
    }
}

/* Columns first .. last, of which a cache holds the weight, by all rows. */
TILES static void some_columns(const Work *work, int64_t stretch, int64_t first, int64_t last) {
    const LogSums *s = work->sums;
    const uint16_t *weight = s->weight;
    int64_t row_tiles = tiles_of(s->rows), bytes = s->size / STEP * TILE_BYTES;
    float sums[4][SIDE * SIDE] __attribute__((aligned(64)));
    for (int64_t tile = 0; tile < row_tiles; tile += 2)
        for (int64_t column = first; column < last; column += COLUMNS) {
            int64_t from = smaller(column, s->columns - COLUMNS);
            int has_two = tile + 1 < row_tiles;
            int fetches = tile == 0 && column + 2 * COLUMNS <= s->columns;
            multiply(weight + from * s->size, s->size, work->x + tile * bytes, has_two,
                     fetches ? weight + (column + COLUMNS) * s->size : 0, sums);
            absorb(s, sums[0], tile * SIDE, stretch, from, column - from);
            if (has_two) absorb(s, sums[2], (tile + 1) * SIDE, stretch, from, column - from);
        }
}

TILES static void take_stretches(void *data) {
    Work *work = data;
    const LogSums *s = work->sums;
    Configuration before = take_tiles();
    int64_t cached = CACHED_BYTES / (2 * s->size) / COLUMNS * COLUMNS;
    if (cached < COLUMNS) cached = COLUMNS;
    for (int64_t task; (task = atomic_fetch_add(&work->next, 1)) < work->num_tasks;) {
        int64_t end = smaller((task + 1) * s->stretch, s->columns);
        for (int64_t row = task * s->rows; row < (task + 1) * s->rows; row++) {
            s->peaks[row] = LOWEST;
            s->totals[row] = 0;
            s->places[row] = 0;
        }
        for (int64_t first = task * s->stretch; first < end; first += cached)
            some_columns(work, task, first, smaller(first + cached, end));
    }
    give_tiles_back(before);
}

/* 0 where memory ran out. `columns` >= COLUMNS, `size` a multiple of STEP, `stretch` of COLUMNS. */
int64_t sums_of_products(const LogSums *s, Parallel *parallel) {
    char *x = laid_out(s->x, s->rows, s->size);
    if (!x) return 0;
    Work work = {s, x, (s->columns + s->stretch - 1) / s->stretch, 0};
    share_out(take_stretches, &work, work.num_tasks, s->num_threads, parallel);
    free(x);
    return 1;
}
