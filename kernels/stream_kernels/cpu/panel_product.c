/* Products of float32 rows with weights in oneDNN's layout, several of one x in one call.
 *
 * A weight lies in panels of PANEL of its rows: element by element of these, the panel's rows beside
 * each other, zeros where a last panel has fewer. GROUP rows of x are multiplied by a panel at a
 * time; a panel that caches would not hold is taken in spans of its elements. While one is worked on
 * the next is fetched, in parts, by the first groups. Sums are made element by element, so that a
 * row's are the same whatever rows stand beside it.
 */
#include "vectors.h"

#include <stdatomic.h>

#define PANEL 64
#define VECTORS (PANEL / WIDTH)
#define GROUP 6            /* rows: with VECTORS sums each, as many as registers hold */
#define MOST_ELEMENTS 2048 /* of a span: half a megabyte of the weight */
#define PIECE 256          /* elements that are summed by themselves: long sums err more */
#define MOST_ROWS 192      /* of a task */
#define FETCHING_GROUPS 8
#define LINE 64
#define MOST_PRODUCTS 4

typedef struct {
    const float *weight; /* panels [columns / PANEL][size][PANEL] */
    const float *bias;   /* [columns], or null */
    const float *to;     /* [rows, columns] that the product is added to, or null */
    float *out;          /* [rows, columns] */
    int64_t columns;
} Product;

typedef struct {
    Product products[MOST_PRODUCTS];
    const float *x; /* [rows, size], dense */
    int64_t num_products, rows, size, num_threads;
} Products;

typedef struct {
    const Products *all;
    int64_t row_blocks, rows_each, span, num_tasks;
    atomic_long next;
} Work;

/* A panel of a product by a block of rows. */
typedef struct {
    const Product *product;
    const float *panel;
    int64_t column, row, end;
} Task;

/* Elements of a panel, and what is fetched meanwhile: `eighths` of a line with each. */
typedef struct {
    int64_t from, size;
    const char *next; /* null: nothing is fetched */
    int64_t eighths;
} Span;

static Task task_of(const Work *work, int64_t index) {
    int64_t panel = index / work->row_blocks, row = index % work->row_blocks * work->rows_each;
    const Product *product = work->all->products;
    for (int64_t own; panel >= (own = (product->columns + PANEL - 1) / PANEL); product++)
        panel -= own;
    const float *from = product->weight + panel * work->all->size * PANEL;
    int64_t end = smaller(row + work->rows_each, work->all->rows);
    return (Task){product, from, panel * PANEL, row, end};
}

/* `count` rows, a constant, from `row` by a span of the panel: added to what spans before it gave. */
INLINE void group(const int count, const Work *work, const Task *task, int64_t row, Span span) {
    const Product *product = task->product;
    int64_t stride = work->all->size, fetched = 0;
    const float *panel = task->panel + span.from * PANEL;
    const float *x = work->all->x + row * stride + span.from;
    float totals[GROUP][PANEL] __attribute__((aligned(64)));
    for (int64_t from = 0; from < span.size; from += PIECE) {
        int64_t end = smaller(from + PIECE, span.size);
        __m512 sums[GROUP][VECTORS];
#pragma GCC unroll 6
        for (int i = 0; i < count; i++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) sums[i][j] = _mm512_setzero_ps();
        for (int64_t d = from; d < end; d++, panel += PANEL) {
            __m512 weights[VECTORS];
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) weights[j] = _mm512_load_ps(panel + j * WIDTH);
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
                __m512 element = _mm512_set1_ps(x[i * stride + d]);
#pragma GCC unroll 4
                for (int j = 0; j < VECTORS; j++)
                    sums[i][j] = _mm512_fmadd_ps(element, weights[j], sums[i][j]);
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < count; i++)
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; j++) {
                float *total = totals[i] + j * WIDTH;
                if (from) sums[i][j] = _mm512_add_ps(_mm512_load_ps(total), sums[i][j]);
                _mm512_store_ps(total, sums[i][j]);
            }
    }
    int is_last = span.from + span.size == stride;
    for (int i = 0; i < count; i++) {
        float *out = product->out + (row + i) * product->columns;
        const float *before = span.from ? out : product->bias;
        const float *to = is_last && product->to ? product->to + (row + i) * product->columns : 0;
        for (int64_t j = 0; j < PANEL; j += WIDTH) {
            int64_t at = task->column + j;
            __mmask16 mask = mask_of(product->columns - at);
            __m512 total = _mm512_load_ps(totals[i] + j);
            if (before) total = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, before + at), total);
            if (to) total = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to + at), total);
            _mm512_mask_storeu_ps(out + at, mask, total);
        }
    }
}

#define GROUP_OF(N)                                                                          \
    TARGET static void group_##N(const Work *work, const Task *task, int64_t row, Span span) { \
        group(N, work, task, row, span);                                                     \
    }
GROUP_OF(1)
GROUP_OF(2)
GROUP_OF(3)
GROUP_OF(4)
GROUP_OF(5)
GROUP_OF(6)

typedef void Group(const Work *, const Task *, int64_t, Span);
static Group *const groups[GROUP + 1] = {0,       group_1, group_2, group_3,
                                         group_4, group_5, group_6};

/* A task; `following` is the panel that is wanted after it, or null. */
TARGET static void multiply(const Work *work, const Task *task, const float *following) {
    int64_t size = work->all->size, rows = task->end - task->row;
    int64_t num_groups = (rows + GROUP - 1) / GROUP;
    int64_t fetching = smaller(num_groups, FETCHING_GROUPS);
    for (int64_t from = 0; from < size; from += work->span) {
        int64_t elements = smaller(work->span, size - from), row = task->row;
        int64_t left = size - from - elements; /* of the panel, else the next one's beginning */
        const float *next = left ? task->panel + (from + elements) * PANEL : following;
        int64_t lines = (left ? smaller(left, work->span) : work->span) * VECTORS;
        int64_t each = (lines + fetching - 1) / fetching;
        for (int64_t i = 0; i < num_groups; i++) {
            int64_t count = rows / num_groups + (i < rows % num_groups);
            Span span = {from, elements, 0, (each * 8 + elements - 1) / elements};
            if (next && i < fetching) span.next = (const char *)next + i * each * LINE;
            groups[count](work, task, row, span);
            row += count;
        }
    }
}

static void take_tasks(void *data) {
    Work *work = data;
    int64_t task = atomic_fetch_add(&work->next, 1);
    while (task < work->num_tasks) {
        int64_t next = atomic_fetch_add(&work->next, 1);
        Task own = task_of(work, task);
        const float *following = next < work->num_tasks ? task_of(work, next).panel : 0;
        multiply(work, &own, following == own.panel ? 0 : following);
        task = next;
    }
}

/* 1. `rows` and `size` are at least 1; panels begin at multiples of 64 bytes. */
int64_t panel_products(const Products *all,
                       void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    int64_t spans = (all->size + MOST_ELEMENTS - 1) / MOST_ELEMENTS, panels = 0;
    int64_t row_blocks = (all->rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t i = 0; i < all->num_products; i++)
        panels += (all->products[i].columns + PANEL - 1) / PANEL;
    int64_t rows_each = (all->rows + row_blocks - 1) / row_blocks;
    Work work = {all, row_blocks, rows_each, (all->size + spans - 1) / spans, panels * row_blocks, 0};
    int64_t threads = smaller(all->num_threads, work.num_tasks);
    if (parallel && threads > 1)
        parallel(take_tasks, &work, (unsigned)threads, 0);
    else
        take_tasks(&work);
    return 1;
}
