/* What a decoder layer does between its products, one pass over memory each: RMSNorm, rotary
 * embedding, and SiLU of one half times the other. Rows are float32 or bfloat16; of bfloat16, every
 * value is rounded where torch's own operators round it.
 */
#include "vectors.h"
#include "threads.h"

#define PER_THREAD (1 << 15) /* elements that are worth a thread */

/* Strides are in elements; the last dimension of every tensor is dense. */
typedef struct {
    const void *x, *y; /* norm: rows and their weight; rotary: cosines and sines; SiLU: both halves */
    void *out, *more_out; /* rotary: queries and keys, rotated where they lie */
    int64_t rows, size;   /* elements of a row; rotary: of a head */
    int64_t heads, more_heads, out_stride, more_stride, table_stride; /* of rotary */
    int64_t is_bfloat16, num_threads;
    double epsilon;
} Layer;

typedef struct {
    const Layer *layer;
    void (*row)(const Layer *, int64_t);
    int64_t rows_each, num_tasks;
    atomic_long next;
} Work;

INLINE void store(void *to, int64_t element, __mmask16 mask, int is_bfloat16, __m512 x) {
    if (is_bfloat16) {
        __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(x), 16));
        _mm256_mask_storeu_epi16((uint16_t *)to + element, mask, half);
    } else
        _mm512_mask_storeu_ps((float *)to + element, mask, x);
}

/* What is left of x where its format is. */
INLINE __m512 kept(__m512 x, int is_bfloat16) {
    if (!is_bfloat16) return x;
    __m512i upper_half = _mm512_and_si512(rounded(x), _mm512_set1_epi32((int)0xffff0000));
    return _mm512_castsi512_ps(upper_half);
}

INLINE void norm(const Layer *a, int64_t row, int is_bfloat16) {
    int64_t first = row * a->size;
    __m512d squares = _mm512_setzero_pd();
    for (int64_t i = 0; i < a->size; i += WIDTH) {
        __m512 x = elements(a->x, first + i, mask_of(a->size - i), is_bfloat16);
        __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
        __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
        squares = _mm512_fmadd_pd(low, low, squares);
        squares = _mm512_fmadd_pd(high, high, squares);
    }
    float mean = (float)(_mm512_reduce_add_pd(squares) / (double)a->size) + (float)a->epsilon;
    __m512 root = _mm512_sqrt_ps(_mm512_set1_ps(mean));
    __m512 factor = _mm512_div_ps(_mm512_set1_ps(1), root);
    for (int64_t i = 0; i < a->size; i += WIDTH) {
        __mmask16 mask = mask_of(a->size - i);
        __m512 x = _mm512_mul_ps(elements(a->x, first + i, mask, is_bfloat16), factor);
        x = _mm512_mul_ps(elements(a->y, i, mask, is_bfloat16), kept(x, is_bfloat16));
        store(a->out, first + i, mask, is_bfloat16, x);
    }
}

INLINE void rotate(const Layer *a, int64_t row, void *out, int64_t first, int64_t heads,
                   int is_bfloat16) {
    int64_t half = a->size / 2, table = row * a->table_stride;
    for (int64_t head = 0; head < heads; head++, first += a->size)
        for (int64_t i = 0; i < half; i += WIDTH) {
            __mmask16 mask = mask_of(half - i);
            __m512 low = elements(out, first + i, mask, is_bfloat16);
            __m512 high = elements(out, first + half + i, mask, is_bfloat16);
            __m512 cosine = elements(a->x, table + i, mask, is_bfloat16);
            __m512 sine = elements(a->y, table + i, mask, is_bfloat16);
            __m512 turned = _mm512_sub_ps(kept(_mm512_mul_ps(low, cosine), is_bfloat16),
                                          kept(_mm512_mul_ps(high, sine), is_bfloat16));
            store(out, first + i, mask, is_bfloat16, turned);
            cosine = elements(a->x, table + half + i, mask, is_bfloat16);
            sine = elements(a->y, table + half + i, mask, is_bfloat16);
            turned = _mm512_add_ps(kept(_mm512_mul_ps(high, cosine), is_bfloat16),
                                   kept(_mm512_mul_ps(low, sine), is_bfloat16));
            store(out, first + half + i, mask, is_bfloat16, turned);
        }
}

/* exp(-x): what is lost of -x * log2(e) is made good, so that it is as exact for large x. */
INLINE __m512 exponential(__m512 x) {
    __m512 high = _mm512_set1_ps(-1.44269502f), low = _mm512_set1_ps(-1.925963e-8f);
    __m512 power = _mm512_mul_ps(x, high);
    __m512 lost = _mm512_fmadd_ps(x, low, _mm512_fmsub_ps(x, high, power));
    __m512 more = _mm512_fmadd_ps(lost, _mm512_set1_ps(0.693147181f), _mm512_set1_ps(1));
    return _mm512_mul_ps(power_of_two(power), more);
}

INLINE void gate(const Layer *a, int64_t row, int is_bfloat16) {
    int64_t first = row * a->size;
    __m512 one = _mm512_set1_ps(1);
    for (int64_t i = 0; i < a->size; i += WIDTH) {
        __mmask16 mask = mask_of(a->size - i);
        __m512 x = elements(a->x, first + i, mask, is_bfloat16);
        __m512 below = _mm512_add_ps(one, exponential(x));
        x = kept(_mm512_div_ps(x, below), is_bfloat16);
        x = _mm512_mul_ps(x, elements(a->y, first + i, mask, is_bfloat16));
        store(a->out, first + i, mask, is_bfloat16, x);
    }
}

TARGET static void norm_row(const Layer *a, int64_t row) {
    if (a->is_bfloat16) norm(a, row, 1);
    else norm(a, row, 0);
}

TARGET static void rotate_row(const Layer *a, int64_t row) {
    if (a->is_bfloat16) {
        rotate(a, row, a->out, row * a->out_stride, a->heads, 1);
        rotate(a, row, a->more_out, row * a->more_stride, a->more_heads, 1);
    } else {
        rotate(a, row, a->out, row * a->out_stride, a->heads, 0);
        rotate(a, row, a->more_out, row * a->more_stride, a->more_heads, 0);
    }
}

TARGET static void gate_row(const Layer *a, int64_t row) {
    if (a->is_bfloat16) gate(a, row, 1);
    else gate(a, row, 0);
}

static void take_rows(void *data) {
    Work *work = data;
    for (int64_t task; (task = atomic_fetch_add(&work->next, 1)) < work->num_tasks;) {
        int64_t last = smaller((task + 1) * work->rows_each, work->layer->rows);
        for (int64_t row = task * work->rows_each; row < last; row++) work->row(work->layer, row);
    }
}

/* Rows are shared out where they are many: for few, waking threads takes longer than the work. */
static int64_t run(const Layer *a, int64_t row_elements, void (*row)(const Layer *, int64_t),
                   Parallel *parallel) {
    int64_t each = PER_THREAD / row_elements;
    if (each < 1) each = 1;
    Work work = {a, row, each, (a->rows + each - 1) / each, 0};
    share_out(take_rows, &work, work.num_tasks, a->num_threads, parallel);
    return 1;
}

/* out = weight * (x / root of the mean square of its row) */
int64_t rms_norm(const Layer *a, Parallel *parallel) {
    return run(a, a->size, norm_row, parallel);
}

/* queries and keys [rows, heads, size]: (low, high) = (low cos - high sin, high cos + low sin) */
int64_t rotary(const Layer *a, Parallel *parallel) {
    return run(a, a->size * (a->heads + a->more_heads), rotate_row, parallel);
}

/* out = silu(x) * y */
int64_t silu_and_multiply(const Layer *a, Parallel *parallel) {
    return run(a, a->size, gate_row, parallel);
}
