/* Attention of one decode step: each row's query over its group's prefix and then over its own
 * suffix, in one softmax. A task is some query rows of one group that share a key head, and read the
 * prefix together.
 *
 * Only AVX-512 (F, BW, DQ, VL) is used, and only after `runs_here` has said yes. No file of Python
 * or torch is needed.
 */
#include "attention.h"
#include "threads.h"

/* Strides are in elements; the last dimension of every tensor is dense. */
typedef struct {
    const void *query, *prefix_key, *prefix_value, *new_key, *new_value;
    void *suffix_key, *suffix_value, *out;
    const int32_t *spans, *group_rows, *slots, *lengths;
    int64_t num_groups, widest, heads, kv_heads, size, is_bfloat16;
    int64_t query_row, query_head, prefix_head, suffix_slot, suffix_head, new_row, new_head;
    int64_t num_threads;
    double scale; /* see Heads */
} Arguments;

static inline Heads heads_of(const Arguments *a) {
    return (Heads){a->size, a->is_bfloat16, a->scale};
}

/* The query row `flat` of a group: its rows one after the other, each with the heads that share
 * the key head. */
static inline int64_t row_of(const Arguments *a, int64_t group, int64_t flat, int64_t repeats) {
    return a->group_rows[group * a->widest + flat / repeats];
}

/* `count` keys and values that lie densely from an element on. */
static Span span_of(const Heads *h, const void *key, const void *value, int64_t begin,
                    int64_t count) {
    return (Span){at(h, key, begin), at(h, value, begin), count,
                  words_of(h->size, (int)h->is_bfloat16)};
}

static Span suffix_of(const Arguments *a, int64_t row, int64_t kv_head) {
    Heads h = heads_of(a);
    int64_t begin = a->slots[row] * a->suffix_slot + kv_head * a->suffix_head;
    return span_of(&h, a->suffix_key, a->suffix_value, begin, a->lengths[row]);
}

/* The step's own key and value take the last valid place of the row's slot. */
static void keep_new(const Arguments *a, int64_t row, int64_t kv_head, Span suffix) {
    int64_t bytes = a->size * (a->is_bfloat16 ? 2 : 4), to = (suffix.count - 1) * bytes;
    int64_t from = row * a->new_row + kv_head * a->new_head;
    Heads h = heads_of(a);
    __builtin_memcpy((char *)suffix.key + to, at(&h, a->new_key, from), (size_t)bytes);
    __builtin_memcpy((char *)suffix.value + to, at(&h, a->new_value, from), (size_t)bytes);
}

/* Query rows first .. last of a group under one key head. */
TARGET static void run_task(const Arguments *a, Scratch *s, int64_t group, int64_t kv_head,
                            int64_t first, int64_t last) {
    int64_t repeats = a->heads / a->kv_heads;
    Heads h = heads_of(a);
    Sight all = {0, 0};
    for (int64_t flat = first; flat < last; flat++) {
        int64_t row = row_of(a, group, flat, repeats), head = kv_head * repeats + flat % repeats;
        const void *from = at(&h, a->query, row * a->query_row + head * a->query_head);
        load_query(&h, s, from, flat - first);
    }
    int64_t begin = kv_head * a->prefix_head + a->spans[2 * group] * a->size;
    Span prefix = span_of(&h, a->prefix_key, a->prefix_value, begin, a->spans[2 * group + 1]);
    Span suffix = suffix_of(a, row_of(a, group, first, repeats), kv_head);
    attend(&h, s, prefix, suffix, all, 0, last - first, 0);
    for (int64_t flat = first; flat < last;) {
        int64_t row = row_of(a, group, flat, repeats);
        int64_t end = smaller(last, (flat / repeats + 1) * repeats);
        Span after = {0};
        if (end < last) after = suffix_of(a, row_of(a, group, end, repeats), kv_head);
        if (a->new_key) keep_new(a, row, kv_head, suffix);
        attend(&h, s, suffix, after, all, flat - first, end - flat, repeats == 1);
        suffix = after;
        for (; flat < end; flat++) {
            int64_t head = kv_head * repeats + flat % repeats;
            const void *to = at(&h, a->out, (row * a->heads + head) * a->size);
            store_out(&h, s, to, flat - first);
        }
    }
}

typedef struct {
    const Arguments *arguments;
    int64_t rows_each, chunks, num_tasks;
    atomic_long next;
} Work;

static void take_tasks(void *data) {
    Work *work = data;
    const Arguments *a = work->arguments;
    int64_t repeats = a->heads / a->kv_heads;
    Scratch scratch;
    for (int64_t task; (task = atomic_fetch_add(&work->next, 1)) < work->num_tasks;) {
        int64_t chunk = task % work->chunks, head = task / work->chunks % a->kv_heads;
        int64_t group = task / (work->chunks * a->kv_heads), members = 0;
        while (members < a->widest && a->group_rows[group * a->widest + members] >= 0) members++;
        int64_t first = chunk * work->rows_each;
        int64_t last = smaller(first + work->rows_each, members * repeats);
        if (first < last) run_task(a, &scratch, group, head, first, last);
    }
}

/* Query rows of a task: as many as share a block's transposition, but several tasks a thread. */
static int64_t rows_of_a_task(const Arguments *a) {
    int64_t repeats = a->heads / a->kv_heads, all = a->widest * repeats;
    int64_t rows = smaller(all, MOST_ROWS), each = a->num_groups * a->kv_heads;
    while (rows > 2 * ROWS && each * ((all + rows - 1) / rows) < 2 * a->num_threads)
        rows = (rows + 1) / 2;
    return rows < repeats ? rows : rows - rows % repeats;
}

int64_t runs_here(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

/* 1: nothing here can fail. */
int64_t decode_attention(const Arguments *a, Parallel *parallel) {
    int64_t rows = rows_of_a_task(a), all = a->widest * (a->heads / a->kv_heads);
    Work work = {a, rows, (all + rows - 1) / rows, 0, 0};
    work.num_tasks = a->num_groups * a->kv_heads * work.chunks;
    share_out(take_tasks, &work, work.num_tasks, a->num_threads, parallel);
    return 1;
}
