/* Attention of several new tokens a row, each to its row's prefix and then to the row's own tokens up
 * to itself, in one softmax; without a prefix, ordinary causal attention of packed sequences.
 *
 * A task is a chunk of a row's tokens under one key head, with all query heads that share it. Tasks
 * that read the same prefix under the same head follow each other.
 */
#include "attention.h"
#include "threads.h"

/* Of a row's tokens. Places are among all tokens, but `prefix`, which is in the prefixes. */
typedef struct {
    int64_t first, count, row_first, prefix, prefix_count;
} Chunk;

/* Strides are in elements; the last dimension of every tensor is dense. */
typedef struct {
    const void *query, *key, *value, *prefix_key, *prefix_value;
    void *out; /* [tokens, heads, size], dense */
    const Chunk *chunks;
    int64_t num_chunks, heads, kv_heads, size, is_bfloat16;
    int64_t query_token, query_head, key_token, key_head, prefix_head;
    int64_t num_threads;
    double scale; /* see Heads */
} Arguments;

typedef struct {
    const Arguments *arguments;
    int64_t num_tasks;
    atomic_long next;
} Work;

TARGET static void run_task(const Arguments *a, Scratch *s, const Chunk *chunk, int64_t kv_head) {
    Heads h = {a->size, a->is_bfloat16, a->scale};
    int is_bfloat16 = (int)a->is_bfloat16;
    int64_t repeats = a->heads / a->kv_heads, rows = chunk->count * repeats;
    for (int64_t row = 0; row < rows; row++) {
        int64_t token = chunk->first + row / repeats, head = kv_head * repeats + row % repeats;
        const void *from = at(&h, a->query, token * a->query_token + head * a->query_head);
        load_query(&h, s, from, row);
    }
    int64_t begin = kv_head * a->prefix_head + chunk->prefix * a->size;
    Span prefix = {at(&h, a->prefix_key, begin), at(&h, a->prefix_value, begin),
                   chunk->prefix_count, words_of(a->size, is_bfloat16)};
    begin = chunk->row_first * a->key_token + kv_head * a->key_head;
    int64_t before = chunk->first - chunk->row_first;
    Span own = {at(&h, a->key, begin), at(&h, a->value, begin), before + chunk->count,
                words_of(a->key_token, is_bfloat16)};
    attend(&h, s, prefix, own, (Sight){0, 0}, 0, rows, 0);
    attend(&h, s, own, (Span){0}, (Sight){before + 1, repeats}, 0, rows, 0);
    for (int64_t row = 0; row < rows; row++) {
        int64_t token = chunk->first + row / repeats, head = kv_head * repeats + row % repeats;
        store_out(&h, s, at(&h, a->out, (token * a->heads + head) * a->size), row);
    }
}

static void take_tasks(void *data) {
    Work *work = data;
    const Arguments *a = work->arguments;
    Scratch scratch;
    for (int64_t task; (task = atomic_fetch_add(&work->next, 1)) < work->num_tasks;)
        run_task(a, &scratch, a->chunks + task % a->num_chunks, task / a->num_chunks);
}

/* The most query rows that a chunk may have: its tokens times the heads that share a key head. */
int64_t rows_of_a_chunk(void) { return MOST_ROWS; }

/* 1: nothing here can fail. */
int64_t extend_attention(const Arguments *a, Parallel *parallel) {
    Work work = {a, a->num_chunks * a->kv_heads, 0};
    share_out(take_tasks, &work, work.num_tasks, a->num_threads, parallel);
    return 1;
}
