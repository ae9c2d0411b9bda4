/* One token a row by inverse CDF, of the likeliest ones where that is asked for, and what its
 * log-prob needs: see `sample`.
 *
 * A row is read into cache once. Its probabilities are summed in blocks; the block in which the
 * uniform number falls is found by the blocks' sums and computed again for the column. All sums of
 * more than a block are float64, and a row's are the same whatever rows stand beside it.
 */
#include "vectors.h"
#include "threads.h"

#include <math.h>
#include <stdlib.h>

#define BLOCK 128
#define LOG2_E 1.44269504f

typedef struct {
    const float *logits;     /* [rows, columns] */
    const float *scores;     /* the same: what is drawn from */
    const double *uniforms;  /* [rows] */
    const int64_t *suppress; /* [num_suppressed] columns, each in range */
    int64_t *tokens;         /* [rows] */
    float *chosen, *peaks;   /* [rows]: the token's logit, and the row's largest */
    double *totals;          /* [rows]: sums of exp(logit - peak); NaN where nothing can be drawn */
    int64_t rows, columns, row_stride, score_stride, num_suppressed, top_k, num_threads;
    double temperature, top_p; /* 0: the likeliest; top_k 0 and top_p 1: all */
} Sampling;

typedef struct {
    const Sampling *sampling;
    atomic_long next, failed;
} Work;

/* A row that may be drawn from: padded to whole blocks with -infinity. */
typedef struct {
    int64_t blocks;
    float *scores;
    double *sums;            /* of each block */
    float *maxima;           /* of each block */
    float *some, *of_some;   /* scores, and their weights */
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

/* Copies a row of scores and returns the largest. */
TARGET static float take_row(const Sampling *s, int64_t row, const Scratch *scratch) {
    const float *scores = s->scores + row * s->score_stride;
    __m512 lowest = _mm512_set1_ps(-INFINITY), highest = lowest;
    for (int64_t column = 0; column < scratch->blocks * BLOCK; column += WIDTH) {
        __m512 x = _mm512_mask_loadu_ps(lowest, mask_of(s->columns - column), scores + column);
        _mm512_store_ps(scratch->scores + column, x);
    }
    for (int64_t i = 0; i < s->num_suppressed; i++) scratch->scores[s->suppress[i]] = -INFINITY;
    for (int64_t block = 0; block < scratch->blocks; block++) {
        __m512 largest = lowest;
        for (int64_t i = 0; i < BLOCK; i += WIDTH)
            largest = _mm512_max_ps(_mm512_load_ps(scratch->scores + block * BLOCK + i), largest);
        scratch->maxima[block] = _mm512_reduce_max_ps(largest);
        highest = _mm512_max_ps(largest, highest);
    }
    return _mm512_reduce_max_ps(highest);
}

/* The sum of a row's exp(logit - peak); NaN where a logit is no number. */
TARGET static double whole(const Sampling *s, int64_t row, float *peak) {
    const float *logits = s->logits + row * s->row_stride;
    __m512 lowest = _mm512_set1_ps(-INFINITY), highest = lowest;
    for (int64_t column = 0; column < s->columns; column += WIDTH) {
        __m512 x = _mm512_mask_loadu_ps(lowest, mask_of(s->columns - column), logits + column);
        highest = _mm512_max_ps(x, highest);
    }
    *peak = _mm512_reduce_max_ps(highest);
    __m512 top = _mm512_set1_ps(*peak), factor = _mm512_set1_ps(LOG2_E);
    double total = 0;
    for (int64_t from = 0; from < s->columns; from += BLOCK) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = from; i < smaller(from + BLOCK, s->columns); i += WIDTH) {
            __mmask16 mask = mask_of(s->columns - i);
            __m512 weights = weight_of(_mm512_maskz_loadu_ps(mask, logits + i), top, factor);
            sum = _mm512_mask_add_ps(sum, mask, sum, weights);
        }
        total += sum_of_lanes(sum);
    }
    return total;
}

/* Weights of a row by block, and their sum. */
TARGET static double weigh(const Scratch *scratch, float best, float factor) {
    double total = 0;
    for (int64_t block = 0; block < scratch->blocks; block++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < BLOCK; i += WIDTH) {
            __m512 score = _mm512_load_ps(scratch->scores + block * BLOCK + i);
            sum = _mm512_add_ps(
                sum, weight_of(score, _mm512_set1_ps(best), _mm512_set1_ps(factor)));
        }
        total += scratch->sums[block] = sum_of_lanes(sum);
    }
    return total;
}

/* Collects the scores that are at least `bound` in `some`; how many. */
TARGET static int64_t collect(const Scratch *scratch, float bound) {
    int64_t count = 0;
    for (int64_t i = 0; i < scratch->blocks * BLOCK; i += WIDTH) {
        __m512 score = _mm512_load_ps(scratch->scores + i);
        __mmask16 mask = _mm512_cmp_ps_mask(score, _mm512_set1_ps(bound), _CMP_GE_OQ);
        _mm512_mask_compressstoreu_ps(scratch->some + count, mask, score);
        count += __builtin_popcount(mask);
    }
    return count;
}

/* Takes out the scores below `bound`. */
TARGET static void keep_from(const Scratch *scratch, float bound) {
    __m512 lowest = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < scratch->blocks * BLOCK; i += WIDTH) {
        __m512 score = _mm512_load_ps(scratch->scores + i);
        __mmask16 mask = _mm512_cmp_ps_mask(score, _mm512_set1_ps(bound), _CMP_GE_OQ);
        _mm512_store_ps(scratch->scores + i, _mm512_mask_mov_ps(lowest, mask, score));
    }
}

static void swap(float *a, float *b) {
    float kept = *a;
    *a = *b;
    *b = kept;
}

static float middle_of(float a, float b, float c) {
    if (a > b) swap(&a, &b);
    if (b > c) b = c;
    return a > b ? a : b;
}

/* [first, end) in three: larger than the middle of three, equal, smaller; weights, where there are
 * any, go along. */
typedef struct {
    float pivot;
    int64_t equal, smaller;
} Parts;

static Parts part(float *x, float *weights, int64_t first, int64_t end) {
    float pivot = middle_of(x[first], x[(first + end) / 2], x[end - 1]);
    int64_t larger = first, at = first, smallest = end;
    while (at < smallest) {
        if (x[at] == pivot) {
            at++;
            continue;
        }
        int64_t other = x[at] > pivot ? larger++ : --smallest;
        swap(x + at, x + other);
        if (weights) swap(weights + at, weights + other);
        if (other < smallest) at++; /* an equal one came from there */
    }
    return (Parts){pivot, larger, smallest};
}

/* The k-th largest of x [count], k >= 1; the order of x is lost. */
static float kth_largest(float *x, int64_t count, int64_t k) {
    int64_t first = 0, end = count;
    for (;;) {
        Parts parts = part(x, 0, first, end);
        if (k <= parts.equal)
            end = parts.equal;
        else if (k <= parts.smaller)
            return parts.pivot;
        else
            first = parts.smaller;
    }
}

/* The k largest stay, and all ties with the k-th: k blocks' maxima are k scores, so that the k-th
 * largest of all is no smaller than the k-th largest of these. */
static void keep_largest(const Scratch *scratch, int64_t k) {
    float bound = -INFINITY;
    if (k <= scratch->blocks) {
        __builtin_memcpy(scratch->some, scratch->maxima, scratch->blocks * sizeof(float));
        bound = kth_largest(scratch->some, scratch->blocks, k);
    }
    int64_t count = collect(scratch, bound);
    if (k <= count) keep_from(scratch, kth_largest(scratch->some, count, k));
}

/* Scores stay while the weight of all larger ones is below a share of `total`. A score whose weight
 * times the number of columns is less than what the share leaves cannot stay. */
TARGET static void keep_share(const Scratch *scratch, int64_t columns, double share, double total,
                              float best, float factor) {
    double least = (1 - share) * total / (double)columns * 0.999;
    float bound = least > 0 ? best + (float)(log2(least) / factor) : -INFINITY;
    int64_t first = 0, end = collect(scratch, bound < best ? bound : best);
    for (int64_t i = 0; i < end; i += WIDTH) {
        __m512 score = _mm512_loadu_ps(scratch->some + i);
        __m512 weights = weight_of(score, _mm512_set1_ps(best), _mm512_set1_ps(factor));
        _mm512_storeu_ps(scratch->of_some + i, weights);
    }
    float cutoff = best;
    double above = 0;
    while (first < end) {
        Parts parts = part(scratch->some, scratch->of_some, first, end);
        double larger = 0, equal = 0;
        for (int64_t i = first; i < parts.equal; i++) larger += scratch->of_some[i];
        for (int64_t i = parts.equal; i < parts.smaller; i++) equal += scratch->of_some[i];
        if (above + larger < share * total) {
            cutoff = parts.pivot;
            above += larger + equal;
            first = parts.smaller;
        } else
            end = parts.equal;
    }
    keep_from(scratch, cutoff);
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
TARGET static int64_t find(const Scratch *scratch, double uniform, double total, float best,
                           float factor) {
    double level = less_of(uniform * total, below(total)), before = 0;
    int64_t block = 0;
    while (block < scratch->blocks - 1 && before + scratch->sums[block] <= level)
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

static int64_t first_of(const Scratch *scratch, float best) {
    int64_t column = 0;
    while (scratch->scores[column] != best) column++;
    return column;
}

static int64_t drawn(const Sampling *s, const Scratch *scratch, double uniform, float best) {
    if (s->temperature == 0) return isfinite(best) ? first_of(scratch, best) : -1;
    float factor = LOG2_E / (float)s->temperature;
    if (s->top_k) keep_largest(scratch, s->top_k);
    double total = weigh(scratch, best, factor);
    if (!isfinite(best) || !isfinite(total)) return -1;
    if (s->top_p < 1) {
        keep_share(scratch, s->columns, s->top_p, total, best, factor);
        total = weigh(scratch, best, factor);
    }
    return find(scratch, uniform, total, best, factor);
}

static void draw(const Sampling *s, int64_t row, const Scratch *scratch) {
    double total = whole(s, row, s->peaks + row);
    int64_t token = -1;
    float best = take_row(s, row, scratch);
    if (isfinite(total)) token = drawn(s, scratch, s->uniforms[row], best);
    s->tokens[row] = token < 0 ? 0 : token;
    s->chosen[row] = s->logits[row * s->row_stride + s->tokens[row]];
    s->totals[row] = token < 0 ? NAN : total;
}

static void take_rows(void *data) {
    Work *work = data;
    const Sampling *s = work->sampling;
    int64_t blocks = (s->columns + BLOCK - 1) / BLOCK, width = blocks * BLOCK;
    int64_t padded = width + WIDTH; /* the last of `some` are read as a vector */
    size_t bytes = (size_t)(blocks * 8 + (width + 2 * padded + blocks + 1) * 4);
    char *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) {
        atomic_store(&work->failed, 1);
        return;
    }
    float *scores = (float *)memory, *some = scores + width, *of_some = some + padded;
    float *maxima = of_some + padded;
    Scratch scratch = {blocks, scores, (double *)(maxima + blocks + blocks % 2), maxima, some, of_some};
    for (int64_t row; (row = atomic_fetch_add(&work->next, 1)) < s->rows;) draw(s, row, &scratch);
    free(memory);
}

/* 0 where memory ran out. */
int64_t draw_tokens(const Sampling *s, Parallel *parallel) {
    Work work = {s, 0, 0};
    share_out(take_rows, &work, s->rows, s->num_threads, parallel);
    return !work.failed;
}
