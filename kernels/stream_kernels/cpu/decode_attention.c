/* Attention of one decode step: each row's query over its group's prefix and then over its own
 * suffix, in one softmax. Keys and values are float32 or bfloat16; all sums are float32.
 *
 * A task is some query rows of one group that share a key head. They read the prefix together,
 * KEYS keys at a time: the block is transposed, so that a vector holds one element of 16 keys, and
 * serves up to ROWS query rows from registers. What a row computes, and in which order, depends on
 * its own keys alone: not on the rows beside it, nor on the number of threads.
 *
 * A vector of values holds, of bfloat16, every second element: 32 are read as 16 pairs, of which
 * the upper halves are one vector and the lower ones, shifted, the other. Sums keep that order, and
 * so do transposed keys and queries.
 *
 * Only AVX-512 (F, BW, DQ, VL) is used, and only after `runs_here` has said yes. No file of Python
 * or torch is needed. Threads are those of the OpenMP that the caller has loaded: it hands over
 * GOMP_parallel, and tasks are taken from a counter.
 */
#include "vectors.h"

#include <stdatomic.h>

#define KEYS 64       /* keys of a block */
#define ROWS 6        /* query rows that share registers */
#define MOST_ROWS 64  /* query rows of a task */
#define MOST_SIZE 256 /* elements of a head */
#define FETCHES 1     /* lines fetched ahead each time */
#define LINE 64       /* bytes that are fetched together */
#define LOWEST (-1e38f)

/* Strides are in elements; the last dimension of every tensor is dense. */
typedef struct {
    const void *query, *prefix_key, *prefix_value, *new_key, *new_value;
    void *suffix_key, *suffix_value, *out;
    const int32_t *spans, *group_rows, *slots, *lengths;
    int64_t num_groups, widest, heads, kv_heads, size, is_bfloat16;
    int64_t query_row, query_head, prefix_head, suffix_slot, suffix_head, new_row, new_head;
    int64_t num_threads;
    double scale; /* of the scores, times log2(e): exponentials are powers of two */
} Arguments;

/* Memory that is wanted next: fetched line by line while sums run, which hides its latency. */
typedef struct {
    const char *next;
    const char *end;
} Ahead;

typedef struct {
    float keys[MOST_SIZE * KEYS];        /* transposed */
    float query[MOST_ROWS * MOST_SIZE];  /* scaled */
    float sums[MOST_ROWS * MOST_SIZE];   /* of weights times values */
    float weights[MOST_ROWS * KEYS];
    float lane_totals[MOST_ROWS * WIDTH];
    float peaks[MOST_ROWS];
} __attribute__((aligned(64))) Scratch;

INLINE void fetch(Ahead *ahead, int64_t lines) {
    for (; lines > 0 && ahead->next < ahead->end; lines--, ahead->next += LINE)
        _mm_prefetch(ahead->next, _MM_HINT_T0);
}

/* Up to KEYS keys of `size` elements: into[place][key]. Keys beyond `count` are 0. */
INLINE void transpose_keys(const void *from, int64_t count, int64_t size, int is_bfloat16,
                           float *into) {
    int64_t units = words_of(size, is_bfloat16);
    for (int64_t first = 0; first < count; first += WIDTH)
        for (int64_t unit = 0; unit < units; unit += WIDTH) {
            __mmask16 mask = mask_of(units - unit);
            __m512i r[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                r[i] = words(from, (first + i) * units + unit, first + i < count ? mask : 0);
            transpose(r);
            float *to = into + (is_bfloat16 ? 2 * unit : unit) * KEYS + first;
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) {
                if (is_bfloat16) {
                    _mm512_store_ps(to + i * KEYS, lower(r[i]));
                    _mm512_store_ps(to + (WIDTH + i) * KEYS, upper(r[i]));
                } else
                    _mm512_store_ps(to + i * KEYS, _mm512_castsi512_ps(r[i]));
            }
        }
}

/* weights[row][key] = query[row] . key, for `rows` rows and `vectors` vectors of keys. */
INLINE void scores(const float *keys, const float *query, int64_t places, int rows, int vectors,
                   float *weights, Ahead *ahead) {
    __m512 sums[ROWS][KEYS / WIDTH];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_setzero_ps();
    for (int64_t place = 0; place < places; place++) {
        fetch(ahead, FETCHES);
        __m512 key[KEYS / WIDTH];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) key[v] = _mm512_load_ps(keys + place * KEYS + v * WIDTH);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512 element = _mm512_set1_ps(query[r * MOST_SIZE + place]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sums[r][v] = _mm512_fmadd_ps(element, key[v], sums[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            _mm512_store_ps(weights + r * KEYS + v * WIDTH, sums[r][v]);
}

/* Scores of one row become weights under its highest score so far; what it has summed up under a
 * lower one is scaled down. */
INLINE void soften(Scratch *s, int64_t row, int64_t count, int64_t places) {
    float *weights = s->weights + row * KEYS;
    __m512 highest = _mm512_set1_ps(s->peaks[row]);
    for (int64_t key = 0; key < count; key += WIDTH)
        highest = _mm512_mask_max_ps(highest, mask_of(count - key), highest,
                                     _mm512_load_ps(weights + key));
    float peak = _mm512_reduce_max_ps(highest);
    __m512 totals = _mm512_load_ps(s->lane_totals + row * WIDTH);
    if (peak != s->peaks[row]) {
        __m512 shrink = power_of_two(_mm512_set1_ps(s->peaks[row] - peak));
        totals = _mm512_mul_ps(totals, shrink);
        float *sums = s->sums + row * MOST_SIZE;
        for (int64_t place = 0; place < places; place += WIDTH)
            _mm512_store_ps(sums + place, _mm512_mul_ps(_mm512_load_ps(sums + place), shrink));
        s->peaks[row] = peak;
    }
    for (int64_t key = 0; key < count; key += WIDTH) {
        __m512 below = _mm512_sub_ps(_mm512_load_ps(weights + key), _mm512_set1_ps(peak));
        __m512 weight = _mm512_maskz_mov_ps(mask_of(count - key), power_of_two(below));
        totals = _mm512_add_ps(totals, weight);
        _mm512_store_ps(weights + key, weight);
    }
    _mm512_store_ps(s->lane_totals + row * WIDTH, totals);
}

/* sums[row] += weights[row] @ values, for `rows` rows and `vectors` vectors of a head's elements,
 * of which the first word is `unit`. */
INLINE void add_values(const void *values, int64_t count, int64_t units, int64_t unit, int rows,
                       int vectors, int is_bfloat16, const float *weights, float *sums,
                       Ahead *ahead) {
    __m512 total[ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            total[r][v] = _mm512_load_ps(sums + r * MOST_SIZE + v * WIDTH);
    int loads = is_bfloat16 ? vectors / 2 : vectors;
    for (int64_t key = 0; key < count; key++) {
        fetch(ahead, FETCHES);
        __m512 value[4];
#pragma GCC unroll 4
        for (int v = 0; v < loads; v++) {
            int64_t first = unit + v * WIDTH;
            __m512i read = words(values, key * units + first, mask_of(units - first));
            if (is_bfloat16) {
                value[2 * v] = lower(read);
                value[2 * v + 1] = upper(read);
            } else
                value[v] = _mm512_castsi512_ps(read);
        }
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            __m512 weight = _mm512_set1_ps(weights[r * KEYS + key]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                total[r][v] = _mm512_fmadd_ps(weight, value[v], total[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            _mm512_store_ps(sums + r * MOST_SIZE + v * WIDTH, total[r][v]);
}

/* As many rows and vectors as there are, each number of them unrolled. */
#define EACH_ROWS(CALL, V)            \
    switch (rows) {                   \
        case 1: CALL(1, V); break;    \
        case 2: CALL(2, V); break;    \
        case 3: CALL(3, V); break;    \
        case 4: CALL(4, V); break;    \
        case 5: CALL(5, V); break;    \
        default: CALL(6, V); break;   \
    }
#define EACH(CALL)                            \
    switch (vectors) {                        \
        case 1: EACH_ROWS(CALL, 1) break;     \
        case 2: EACH_ROWS(CALL, 2) break;     \
        case 3: EACH_ROWS(CALL, 3) break;     \
        default: EACH_ROWS(CALL, 4) break;    \
    }

TARGET static void some_scores(const float *keys, const float *query, int64_t places, int64_t rows,
                               int64_t vectors, float *weights, Ahead *ahead) {
#define CALL(R, V) scores(keys, query, places, R, V, weights, ahead)
    EACH(CALL)
#undef CALL
}

TARGET static void add_float32(const void *values, int64_t count, int64_t units, int64_t unit,
                               int64_t rows, int64_t vectors, const float *weights, float *sums,
                               Ahead *ahead) {
#define CALL(R, V) add_values(values, count, units, unit, R, V, 0, weights, sums, ahead)
    EACH(CALL)
#undef CALL
}

TARGET static void add_bfloat16(const void *values, int64_t count, int64_t units, int64_t unit,
                                int64_t rows, int64_t vectors, const float *weights, float *sums,
                                Ahead *ahead) {
#define CALL(R, V) add_values(values, count, units, unit, R, V, 1, weights, sums, ahead)
    if (vectors == 2) EACH_ROWS(CALL, 2) else EACH_ROWS(CALL, 4)
#undef CALL
}

/* Keys and values that lie together. */
typedef struct {
    const void *key, *value;
    int64_t count;
} Span;

INLINE Ahead lines_of(const void *from, int64_t units, int64_t first, int64_t count) {
    const char *next = (const char *)((const int32_t *)from + first * units);
    return (Ahead){next, next + smaller(KEYS, count - first) * units * 4};
}

/* Rows first .. first + rows of a task attend to a span; the one after it is fetched meanwhile. */
TARGET static void attend(const Arguments *a, Scratch *s, Span span, Span after, int64_t first,
                          int64_t rows) {
    int is_bfloat16 = (int)a->is_bfloat16;
    int64_t units = words_of(a->size, is_bfloat16), vectors = (units + WIDTH - 1) / WIDTH;
    int64_t places = vectors * WIDTH;
    if (is_bfloat16) vectors *= 2, places *= 2;
    for (int64_t start = 0; start < span.count; start += KEYS) {
        int64_t block = smaller(KEYS, span.count - start);
        int is_last = start + KEYS >= span.count;
        Span next = is_last ? after : span;
        int64_t from = is_last ? 0 : start + KEYS;
        Ahead keys = lines_of(next.key, units, from, next.count);
        Ahead values = lines_of(next.value, units, from, next.count);
        transpose_keys((const int32_t *)span.key + start * units, block, a->size, is_bfloat16,
                       s->keys);
        for (int64_t row = first; row < first + rows;) {
            int64_t left = first + rows - row, sets = (left + ROWS - 1) / ROWS;
            int64_t some = (left + sets - 1) / sets;
            some_scores(s->keys, s->query + row * MOST_SIZE, places, some,
                        (block + WIDTH - 1) / WIDTH, s->weights + row * KEYS, &keys);
            for (int64_t r = row; r < row + some; r++) soften(s, r, block, places);
            for (int64_t v = 0; v < vectors; v += 4)
                (is_bfloat16 ? add_bfloat16 : add_float32)(
                    (const int32_t *)span.value + start * units, block, units,
                    is_bfloat16 ? v / 2 * WIDTH : v * WIDTH, some, smaller(4, vectors - v),
                    s->weights + row * KEYS, s->sums + row * MOST_SIZE + v * WIDTH, &values);
            row += some;
        }
    }
}

/* The query row `flat` of a group: its rows one after the other, each with the heads that share
 * the key head. */
static inline int64_t row_of(const Arguments *a, int64_t group, int64_t flat, int64_t repeats) {
    return a->group_rows[group * a->widest + flat / repeats];
}

static inline const void *at(const Arguments *a, const void *from, int64_t element) {
    return (const char *)from + element * (a->is_bfloat16 ? 2 : 4);
}

TARGET static void load_query(const Arguments *a, Scratch *s, int64_t row, int64_t head,
                              int64_t place) {
    const void *from = at(a, a->query, row * a->query_row + head * a->query_head);
    float *to = s->query + place * MOST_SIZE;
    __m512 scale = _mm512_set1_ps((float)a->scale);
    int64_t units = words_of(a->size, (int)a->is_bfloat16);
    for (int64_t unit = 0; unit < units; unit += WIDTH) {
        __m512i read = words(from, unit, mask_of(units - unit));
        if (a->is_bfloat16) {
            _mm512_store_ps(to + 2 * unit, _mm512_mul_ps(lower(read), scale));
            _mm512_store_ps(to + 2 * unit + WIDTH, _mm512_mul_ps(upper(read), scale));
        } else
            _mm512_store_ps(to + unit, _mm512_mul_ps(_mm512_castsi512_ps(read), scale));
    }
    float *sums = s->sums + place * MOST_SIZE;
    for (int64_t i = 0; i < MOST_SIZE; i += WIDTH) _mm512_store_ps(sums + i, _mm512_setzero_ps());
    _mm512_store_ps(s->lane_totals + place * WIDTH, _mm512_setzero_ps());
    s->peaks[place] = LOWEST;
}

TARGET static void store_out(const Arguments *a, const Scratch *s, int64_t row, int64_t head,
                             int64_t place) {
    int32_t *to = (int32_t *)at(a, a->out, (row * a->heads + head) * a->size);
    const float *sums = s->sums + place * MOST_SIZE;
    float total = _mm512_reduce_add_ps(_mm512_load_ps(s->lane_totals + place * WIDTH));
    __m512 divisor = _mm512_set1_ps(total);
    int64_t units = words_of(a->size, (int)a->is_bfloat16);
    for (int64_t unit = 0; unit < units; unit += WIDTH) {
        __mmask16 mask = mask_of(units - unit);
        if (a->is_bfloat16) {
            __m512i low = rounded(_mm512_div_ps(_mm512_load_ps(sums + 2 * unit), divisor));
            __m512i high = rounded(_mm512_div_ps(_mm512_load_ps(sums + 2 * unit + WIDTH), divisor));
            high = _mm512_and_si512(high, _mm512_set1_epi32((int)0xffff0000));
            low = _mm512_or_si512(high, _mm512_srli_epi32(low, 16));
            _mm512_mask_storeu_epi32(to + unit, mask, low);
        } else {
            __m512 out = _mm512_div_ps(_mm512_load_ps(sums + unit), divisor);
            _mm512_mask_storeu_ps((float *)to + unit, mask, out);
        }
    }
}

TARGET static Span suffix_of(const Arguments *a, int64_t row, int64_t kv_head) {
    int64_t begin = a->slots[row] * a->suffix_slot + kv_head * a->suffix_head;
    return (Span){at(a, a->suffix_key, begin), at(a, a->suffix_value, begin), a->lengths[row]};
}

/* The step's own key and value take the last valid place of the row's slot. */
static void keep_new(const Arguments *a, int64_t row, int64_t kv_head, Span suffix) {
    int64_t bytes = a->size * (a->is_bfloat16 ? 2 : 4), to = (suffix.count - 1) * bytes;
    int64_t from = row * a->new_row + kv_head * a->new_head;
    __builtin_memcpy((char *)suffix.key + to, at(a, a->new_key, from), (size_t)bytes);
    __builtin_memcpy((char *)suffix.value + to, at(a, a->new_value, from), (size_t)bytes);
}

/* Query rows first .. last of a group under one key head. */
TARGET static void run_task(const Arguments *a, Scratch *s, int64_t group, int64_t kv_head,
                            int64_t first, int64_t last) {
    int64_t repeats = a->heads / a->kv_heads;
    for (int64_t flat = first; flat < last; flat++)
        load_query(a, s, row_of(a, group, flat, repeats), kv_head * repeats + flat % repeats,
                   flat - first);
    int64_t begin = kv_head * a->prefix_head + a->spans[2 * group] * a->size;
    Span prefix = {at(a, a->prefix_key, begin), at(a, a->prefix_value, begin),
                   a->spans[2 * group + 1]};
    Span suffix = suffix_of(a, row_of(a, group, first, repeats), kv_head);
    attend(a, s, prefix, suffix, 0, last - first);
    for (int64_t flat = first; flat < last;) {
        int64_t row = row_of(a, group, flat, repeats);
        int64_t end = smaller(last, (flat / repeats + 1) * repeats);
        Span after = {0, 0, 0};
        if (end < last) after = suffix_of(a, row_of(a, group, end, repeats), kv_head);
        if (a->new_key) keep_new(a, row, kv_head, suffix);
        attend(a, s, suffix, after, flat - first, end - flat);
        suffix = after;
        for (; flat < end; flat++)
            store_out(a, s, row, kv_head * repeats + flat % repeats, flat - first);
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

/* 1. `parallel` is GOMP_parallel, or null for one thread. */
int64_t decode_attention(const Arguments *a,
                         void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
    int64_t rows = rows_of_a_task(a), all = a->widest * (a->heads / a->kv_heads);
    Work work = {a, rows, (all + rows - 1) / rows, 0, 0};
    work.num_tasks = a->num_groups * a->kv_heads * work.chunks;
    if (parallel && a->num_threads > 1 && work.num_tasks > 1)
        parallel(take_tasks, &work, (unsigned)a->num_threads, 0);
    else
        take_tasks(&work);
    return 1;
}
