/* One token a row by inverse CDF at a temperature, and what its log-prob needs: see `sample`.
 *
 * A row is read into cache once. Its probabilities are summed in blocks; the block in which the
 * uniform number falls is found by the blocks' sums and computed again for the column. All sums of
 * more than a block are float64, and a row's are the same whatever rows stand beside it.
 */
#include "vectors.h"

#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>

#define BLOCK 128
#define LOG2_E 1.44269504f

typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    const float *logits;     /* [rows, columns] */
    const double *uniforms;  /* [rows] */
    const int64_t *suppress; /* [num_suppressed] columns, each in range */
    int64_t *tokens;         /* [rows] */
    float *chosen, *peaks;   /* [rows]: the token's logit, and the row's largest */
    double *totals;          /* [rows]: sums of exp(logit - peak); NaN where nothing can be drawn */
    int64_t rows, columns, row_stride, num_suppressed, num_threads;
    double temperature;
} Sampling;

typedef struct {
    const Sampling *sampling;
    atomic_long next, failed;
} Work;

/* A row that may be drawn from: padded to whole blocks with -infinity. */
typedef struct {
    float *scores;
    double *sums; /* of each block */
} Scratch;

INLINE __m512 weight_of(__m512 score, __m512 peak, __m512 factor) {
    __m512 x = _mm512_mul_ps(_mm512_sub_ps(score, peak), factor);
    /* far below, all of it is 0; -infinity would be no number */
    return power_of_two(_mm512_max_ps(_mm512_set1_ps(-1000.0f), x));
}

INLINE double sum_of_lanes(__m512 x) {
    __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))));
}

/* Copies a row and returns its largest score. */
TARGET static float take_row(const Sampling *s, int64_t row, Scratch scratch, int64_t blocks) {
    const float *logits = s->logits + row * s->row_stride;
    __m512 lowest = _mm512_set1_ps(-INFINITY), highest = lowest;
    for (int64_t column = 0; column < blocks * BLOCK; column += WIDTH) {
        __m512 x = _mm512_mask_loadu_ps(lowest, mask_of(s->columns - column), logits + column);
        _mm512_store_ps(scratch.scores + column, x);
    }
    for (int64_t i = 0; i < s->num_suppressed; i++) scratch.scores[s->suppress[i]] = -INFINITY;
    for (int64_t column = 0; column < blocks * BLOCK; column += WIDTH)
        highest = _mm512_max_ps(_mm512_load_ps(scratch.scores + column), highest);
    return _mm512_reduce_max_ps(highest);
}

/* The number below a positive one. */
static double below(double x) {
    int64_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    bits--;
    __builtin_memcpy(&x, &bits, sizeof bits);
    return x;
}

static double less_of(double a, double b) { return a < b ? a : b; }

/* The first column at which the cumulative weight exceeds the uniform number's share of it all. */
TARGET static int64_t find(const Scratch *scratch, int64_t blocks, double uniform, double total,
                           float best, float factor) {
    double level = less_of(uniform * total, below(total)), before = 0;
    int64_t block = 0;
    while (block < blocks - 1 && before + scratch->sums[block] <= level)
        before += scratch->sums[block++];
    float weights[BLOCK] __attribute__((aligned(64)));
    double inner = 0, so_far = 0;
    for (int64_t i = 0; i < BLOCK; i += WIDTH) {
        __m512 score = _mm512_load_ps(scratch->scores + block * BLOCK + i);
        _mm512_store_ps(weights + i,
                        weight_of(score, _mm512_set1_ps(best), _mm512_set1_ps(factor)));
    }
    for (int64_t i = 0; i < BLOCK; i++) inner += weights[i];
    /* the block's sum was added up in another order */
    double rest = (level - before) / scratch->sums[block] * inner;
    rest = less_of(rest, below(inner));
    int64_t i = 0;
    while (i < BLOCK - 1 && (so_far += weights[i]) <= rest) i++;
    return block * BLOCK + i;
}

TARGET static void draw(const Sampling *s, int64_t row, Scratch scratch) {
    int64_t blocks = (s->columns + BLOCK - 1) / BLOCK;
    const float *logits = s->logits + row * s->row_stride;
    float best = take_row(s, row, scratch, blocks), peak = best;
    for (int64_t i = 0; i < s->num_suppressed; i++)
        if (logits[s->suppress[i]] > peak) peak = logits[s->suppress[i]];
    float factor = LOG2_E / (float)s->temperature;
    int is_plain = s->temperature == 1 && peak == best;
    __m512 top = _mm512_set1_ps(peak), likeliest = _mm512_set1_ps(best);
    double plain = 0, total = 0;
    for (int64_t block = 0; block < blocks; block++) {
        __m512 some = _mm512_setzero_ps(), more = _mm512_setzero_ps();
        for (int64_t i = 0; i < BLOCK; i += WIDTH) {
            __m512 score = _mm512_load_ps(scratch.scores + block * BLOCK + i);
            more = _mm512_add_ps(more, weight_of(score, likeliest, _mm512_set1_ps(factor)));
            if (!is_plain)
                some = _mm512_add_ps(some, weight_of(score, top, _mm512_set1_ps(LOG2_E)));
        }
        total += scratch.sums[block] = sum_of_lanes(more);
        plain += is_plain ? scratch.sums[block] : sum_of_lanes(some);
    }
    for (int64_t i = 0; i < s->num_suppressed; i++) {
        __m512 x = _mm512_set1_ps(logits[s->suppress[i]]);
        plain += _mm512_cvtss_f32(weight_of(x, top, _mm512_set1_ps(LOG2_E)));
    }
    int can_draw = isfinite(best) && isfinite(total) && isfinite(plain);
    int64_t token = can_draw ? find(&scratch, blocks, s->uniforms[row], total, best, factor) : 0;
    s->tokens[row] = token;
    s->chosen[row] = logits[token];
    s->peaks[row] = peak;
    s->totals[row] = can_draw ? plain : NAN;
}

static void take_rows(void *data) {
    Work *work = data;
    const Sampling *s = work->sampling;
    int64_t blocks = (s->columns + BLOCK - 1) / BLOCK;
    char *memory = aligned_alloc(64, (size_t)((blocks * (BLOCK * 4 + 8) + 63) / 64 * 64));
    if (!memory) {
        atomic_store(&work->failed, 1);
        return;
    }
    Scratch scratch = {(float *)memory, (double *)(memory + blocks * BLOCK * 4)};
    for (int64_t row; (row = atomic_fetch_add(&work->next, 1)) < s->rows;) draw(s, row, scratch);
    free(memory);
}

/* 0 where memory ran out. The temperature is above 0. */
int64_t draw_tokens(const Sampling *s, Parallel *parallel) {
    Work work = {s, 0, 0};
    int64_t threads = smaller(s->num_threads, s->rows);
    if (parallel && threads > 1)
        parallel(take_rows, &work, (unsigned)threads, 0);
    else
        take_rows(&work);
    return !work.failed;
}
