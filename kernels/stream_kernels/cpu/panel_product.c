/* Products of rows of float32 or bfloat16 with weights in oneDNN's layout, several of one x in one
 * call.
 *
 * A word is an element of float32, or two of bfloat16 side by side. A weight lies in panels of PANEL
 * of its rows: word by word of these, the panel's rows beside each other, zeros where a last panel
 * has fewer rows or words than oneDNN gives it. GROUP rows of x are multiplied by a panel at a time;
 * a panel that caches would not hold is taken in spans of its words. While one is worked on the next
 * is fetched, in parts, by the first groups. Sums are float32, made word by word, so that a row's
 * are the same whatever rows stand beside it.
 */
#include "vectors.h"
#include "threads.h"

#include <cpuid.h>

#define PANEL 64
#define VECTORS (PANEL / WIDTH)
#define GROUP 6         /* rows: with VECTORS sums each, as many as registers hold */
#define MOST_WORDS 2048 /* of a span: half a megabyte of the weight */
#define PIECE 128       /* words that are summed by themselves: long sums err more */
#define MOST_ROWS 192   /* of a task */
#define FETCHING_GROUPS 8
#define LINE 64
#define MOST_PRODUCTS 4
#define PADDED 16 /* words of a panel of bfloat16 are a multiple of this */

typedef struct {
    const void *weight; /* panels [columns / PANEL][words][PANEL] */
    const void *bias;   /* [columns], or null */
    const void *to;     /* [rows, columns] that the product is added to, or null */
    void *out;          /* [rows, columns] */
    int64_t columns;
} Product;

typedef struct {
    Product products[MOST_PRODUCTS];
    const void *x; /* [rows, size], dense */
    int64_t num_products, rows, size, num_threads;
    int64_t is_bfloat16, is_rounded; /* x, weights, biases; and what is added to and comes out */
} Products;

typedef struct {
    const Products *all;
    int64_t words, panel_words, row_blocks, rows_each, span, num_tasks;
    atomic_long next;
} Work;

/* A panel of a product by a block of rows. */
typedef struct {
    const Product *product;
    const int32_t *panel;
    int64_t column, row, end;
} Task;

/* Words of a panel, and what is fetched meanwhile: `eighths` of a line with each. */
typedef struct {
    int64_t from, size;
    const char *next; /* null: nothing is fetched */
    int64_t eighths;
} Span;

/* Whether the processor multiplies bfloat16. */
int64_t bfloat16_runs_here(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

static Task task_of(const Work *work, int64_t index) {
    int64_t panel = index / work->row_blocks, row = index % work->row_blocks * work->rows_each;
    const Product *product = work->all->products;
    for (int64_t own; panel >= (own = (product->columns + PANEL - 1) / PANEL); product++)
        panel -= own;
    const int32_t *from = (const int32_t *)product->weight + panel * work->panel_words * PANEL;
    int64_t end = smaller(row + work->rows_each, work->all->rows);
    return (Task){product, from, panel * PANEL, row, end};
}

/* What a row's sums with a panel come to, with bias and what they are added to. */
TARGET static void give(const Products *all, const Task *task, int64_t row, const float *totals) {
    const Product *p = task->product;
    for (int64_t j = 0; j < PANEL; j += WIDTH) {
        int64_t column = task->column + j, at = row * p->columns + column;
        __mmask16 mask = mask_of(p->columns - column);
        __m512 total = _mm512_load_ps(totals + j);
        if (p->bias)
            total = _mm512_add_ps(total, elements(p->bias, column, mask, all->is_bfloat16));
        __m512i bits = rounded(total);
        if (p->to && all->is_rounded) total = upper(bits);
        if (p->to) total = _mm512_add_ps(elements(p->to, at, mask, all->is_rounded), total);
        if (all->is_rounded) {
            if (p->to) bits = rounded(total);
            __m256i half = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
            _mm256_mask_storeu_epi16((uint16_t *)p->out + at, mask, half);
        } else
            _mm512_mask_storeu_ps((float *)p->out + at, mask, total);
    }
}

/* The products of 16 words by the same of a row, added to `sum`. */
INLINE __m512 added(__m512 sum, __m512i word, __m512i weights, const int is_bfloat16) {
    if (!is_bfloat16)
        return _mm512_fmadd_ps(_mm512_castsi512_ps(word), _mm512_castsi512_ps(weights), sum);
    /* not the compiler's own function, which only code for such processors alone could call */
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(word), "v"(weights));
    return sum;
}

/* `count` rows from `row` by a span of the panel, added to `totals` [count, PANEL] unless the span is
 * the first. */
INLINE void group(const int count, const int is_bfloat16, const Work *work, const Task *task,
                  int64_t row, Span span, float *totals) {
    int64_t stride = work->words, fetched = 0;
    const int32_t *panel = task->panel + span.from * PANEL;
    const int32_t *x = (const int32_t *)work->all->x + row * stride + span.from;
    for (int64_t from = 0; from < span.size; from += PIECE) {
        int64_t end = smaller(from + PIECE, span.size);
        __m512 sums[GROUP][VECTORS];
#pragma GCC unroll 6
        for (int i = 0; i < count; i++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sums[i][j] = _mm512_setzero_ps();
        for (int64_t d = from; d < end; d++, panel += PANEL) {
            __m512i weights[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) weights[j] = _mm512_load_si512(panel + j * WIDTH);
            if (span.next) {
                const char *line = span.next + fetched / 8 * LINE;
                _mm_prefetch(line, _MM_HINT_T1);
                if (span.eighths > 8) _mm_prefetch(line + LINE, _MM_HINT_T1);
                if (span.eighths > 16) {
                    _mm_prefetch(line + 2 * LINE, _MM_HINT_T1);
                    _mm_prefetch(line + 3 * LINE, _MM_HINT_T1);
                }
                fetched += span.eighths;
            }
#pragma GCC unroll 6
            for (int i = 0; i < count; i++) {
                __m512i word = _mm512_set1_epi32(x[i * stride + d]);
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; j++)
                    sums[i][j] = added(sums[i][j], word, weights[j], is_bfloat16);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < count; i++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) {
                float *total = totals + i * PANEL + j * WIDTH;
                if (from || span.from)
                    sums[i][j] = _mm512_add_ps(_mm512_load_ps(total), sums[i][j]);
                _mm512_store_ps(total, sums[i][j]);
            }
    }
}

typedef void Group(const Work *, const Task *, int64_t, Span, float *);

#define GROUP_OF(KIND, IS_BFLOAT16, N)                                                          \
    TARGET static void KIND##_##N(const Work *work, const Task *task, int64_t row, Span span,   \
                                  float *totals) {                                              \
        group(N, IS_BFLOAT16, work, task, row, span, totals);                                   \
    }
#define GROUPS_OF(KIND, IS_BFLOAT16) \
    GROUP_OF(KIND, IS_BFLOAT16, 1)   \
    GROUP_OF(KIND, IS_BFLOAT16, 2)   \
    GROUP_OF(KIND, IS_BFLOAT16, 3)   \
    GROUP_OF(KIND, IS_BFLOAT16, 4)   \
    GROUP_OF(KIND, IS_BFLOAT16, 5)   \
    GROUP_OF(KIND, IS_BFLOAT16, 6)
GROUPS_OF(float32, 0)
GROUPS_OF(bfloat16, 1)

static Group *const groups[2][GROUP + 1] = {
    {0, float32_1, float32_2, float32_3, float32_4, float32_5, float32_6},
    {0, bfloat16_1, bfloat16_2, bfloat16_3, bfloat16_4, bfloat16_5, bfloat16_6},
};

/* A task; `following` is the panel that is wanted after it, or null. */
TARGET static void multiply(const Work *work, const Task *task, const int32_t *following) {
    float totals[MOST_ROWS][PANEL] __attribute__((aligned(64)));
    int64_t words = work->words, rows = task->end - task->row;
    int64_t num_groups = (rows + GROUP - 1) / GROUP;
    int64_t fetching = smaller(num_groups, FETCHING_GROUPS);
    Group *const *kind = groups[work->all->is_bfloat16];
    for (int64_t from = 0; from < words; from += work->span) {
        int64_t own = smaller(work->span, words - from), row = 0;
        int64_t left = words - from - own; /* of the panel, else the next one's beginning */
        const int32_t *next = left ? task->panel + (from + own) * PANEL : following;
        int64_t lines = (left ? smaller(left, work->span) : work->span) * VECTORS;
        int64_t each = (lines + fetching - 1) / fetching;
        for (int64_t i = 0; i < num_groups; i++) {
            int64_t count = rows / num_groups + (i < rows % num_groups);
            Span span = {from, own, 0, (each * 8 + own - 1) / own};
            if (next && i < fetching) span.next = (const char *)next + i * each * LINE;
            kind[count](work, task, task->row + row, span, totals[row]);
            row += count;
        }
    }
    for (int64_t row = 0; row < rows; row++) give(work->all, task, task->row + row, totals[row]);
}

static void take_tasks(void *data) {
    Work *work = data;
    int64_t task = atomic_fetch_add(&work->next, 1);
    while (task < work->num_tasks) {
        int64_t next = atomic_fetch_add(&work->next, 1);
        Task own = task_of(work, task);
        const int32_t *following = next < work->num_tasks ? task_of(work, next).panel : 0;
        multiply(work, &own, following == own.panel ? 0 : following);
        task = next;
    }
}

/* 1. `rows` and `size` are at least 1, `size` even for bfloat16; panels begin at multiples of 64
 * bytes. */
int64_t panel_products(const Products *all, Parallel *parallel) {
    int64_t words = all->is_bfloat16 ? all->size / 2 : all->size, panels = 0;
    int64_t panel_words = all->is_bfloat16 ? (words + PADDED - 1) / PADDED * PADDED : words;
    int64_t spans = (words + MOST_WORDS - 1) / MOST_WORDS;
    int64_t row_blocks = (all->rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t i = 0; i < all->num_products; i++)
        panels += (all->products[i].columns + PANEL - 1) / PANEL;
    Work work = {all, words, panel_words, row_blocks, (all->rows + row_blocks - 1) / row_blocks,
                 (words + spans - 1) / spans, panels * row_blocks, 0};
    share_out(take_tasks, &work, work.num_tasks, all->num_threads, parallel);
    return 1;
}
