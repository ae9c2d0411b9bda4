/* Attention of query rows to keys and values that lie together, block by block, in one softmax; keys
 * and values are float32 or bfloat16, and all sums float32.
 *
 * KEYS keys at a time are transposed, so that a vector holds one element of 16 keys, and serve up to
 * ROWS query rows from registers. What a row computes, and in which order, depends on its own keys
 * alone: not on the rows beside it.
 *
 * A vector of values holds, of bfloat16, every second element: 32 are read as 16 pairs, of which
 * the upper halves are one vector and the lower ones, shifted, the other. Sums keep that order, and
 * so do transposed keys and queries.
 */
#pragma once
#include "vectors.h"

#define KEYS 64       /* keys of a block */
#define ROWS 6        /* query rows that share registers */
#define MOST_ROWS 64  /* query rows of a task */
#define MOST_SIZE 256 /* elements of a head */
#define LINE 64       /* bytes that are fetched together */
#define WORK_OF_A_TILE 64    /* to transpose 16 x 16 words, in multiplications of vectors */
#define WORK_OF_A_VECTOR 8   /* to make a vector of scores weights */
#define LOWEST (-1e38f)

/* What the heads of queries, keys and values have in common. */
typedef struct {
    int64_t size, is_bfloat16;
    double scale; /* of the scores, times log2(e): exponentials are powers of two */
} Heads;

/* Keys and values of one head; the elements of each are dense. */
typedef struct {
    const void *key, *value;
    int64_t count, stride; /* words of 32 bits from one to the next */
} Span;

/* Row r of a task sees `first` + r / `repeats` keys of a span, or all if `repeats` is 0. */
typedef struct {
    int64_t first, repeats;
} Sight;

/* Memory that is wanted next, keys and then values: fetched while sums run, which hides its latency.
 * Every so many vectors of work a line is asked for, so that memory has as much to do at all times. */
typedef struct {
    const char *next, *end;             /* keys, when they are through values */
    const char *values, *end_of_values;
    int64_t work_of_a_line, done; /* vectors, times 16 */
} Ahead;

typedef struct {
    float keys[MOST_SIZE * KEYS];        /* transposed */
    float query[MOST_ROWS * MOST_SIZE];  /* scaled */
    float sums[MOST_ROWS * MOST_SIZE];   /* of weights times values */
    float weights[MOST_ROWS * KEYS];
    float lane_totals[MOST_ROWS * WIDTH];
    float peaks[MOST_ROWS];
} __attribute__((aligned(64))) Scratch;

INLINE void fetch(Ahead *ahead, int64_t vectors) {
    for (ahead->done += vectors * 16; ahead->done >= ahead->work_of_a_line && ahead->next;) {
        ahead->done -= ahead->work_of_a_line;
        _mm_prefetch(ahead->next, _MM_HINT_T0);
        ahead->next += LINE;
        if (ahead->next >= ahead->end) {
            ahead->next = ahead->values;
            ahead->end = ahead->end_of_values;
            ahead->values = 0;
        }
    }
}

/* Up to KEYS keys of `size` elements: into[place][key]. Keys beyond `count` are 0. */
INLINE void transpose_keys(const int32_t *from, int64_t stride, int64_t count, int64_t size,
                           int is_bfloat16, float *into, Ahead *ahead) {
    int64_t units = words_of(size, is_bfloat16);
    for (int64_t first = 0; first < count; first += WIDTH)
        for (int64_t unit = 0; unit < units; unit += WIDTH) {
            __mmask16 mask = mask_of(units - unit);
            __m512i r[WIDTH];
            fetch(ahead, WORK_OF_A_TILE);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++)
                r[i] = words(from, (first + i) * stride + unit, first + i < count ? mask : 0);
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

/* The sums of 16 vectors. */
INLINE __m512 sums_of(__m512 r[WIDTH]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        r[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]),
                             _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(r[2 * i]), b = _mm512_castps_pd(r[2 * i + 1]);
        r[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        r[i] = _mm512_add_ps(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(r[0], r[1], 0x88),
                         _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
}

/* weights[key] = query . key, of one row, to whom keys are not worth a transposition. */
TARGET static void scores_of_one(const int32_t *keys, int64_t stride, int64_t count, int64_t units,
                                 int is_bfloat16, const float *query, float *weights,
                                 Ahead *ahead) {
    for (int64_t first = 0; first < count; first += WIDTH) {
        __m512 r[WIDTH];
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++) r[i] = _mm512_setzero_ps();
        for (int64_t unit = 0; unit < units; unit += WIDTH) {
            __mmask16 mask = mask_of(units - unit);
            fetch(ahead, WIDTH);
            const float *part = query + (is_bfloat16 ? 2 * unit : unit);
            __m512 q = _mm512_load_ps(part), more = _mm512_load_ps(part + WIDTH);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) {
                __m512i read = words(keys, (first + i) * stride + unit, first + i < count ? mask : 0);
                if (is_bfloat16) {
                    r[i] = _mm512_fmadd_ps(lower(read), q, r[i]);
                    r[i] = _mm512_fmadd_ps(upper(read), more, r[i]);
                } else
                    r[i] = _mm512_fmadd_ps(_mm512_castsi512_ps(read), q, r[i]);
            }
        }
        _mm512_store_ps(weights + first, sums_of(r));
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
        fetch(ahead, rows * vectors);
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

/* The first `seen` scores of a row, of `count`, become weights under its highest score so far, and
 * the others 0; what it has summed up under a lower one is scaled down. */
INLINE void soften(Scratch *s, int64_t row, int64_t seen, int64_t count, int64_t places,
                   Ahead *ahead) {
    float *weights = s->weights + row * KEYS;
    __m512 highest = _mm512_set1_ps(s->peaks[row]);
    for (int64_t key = 0; key < seen; key += WIDTH)
        highest = _mm512_mask_max_ps(highest, mask_of(seen - key), highest,
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
        fetch(ahead, WORK_OF_A_VECTOR);
        __m512 below = _mm512_sub_ps(_mm512_load_ps(weights + key), _mm512_set1_ps(peak));
        __m512 weight = _mm512_maskz_mov_ps(mask_of(seen - key), power_of_two(below));
        totals = _mm512_add_ps(totals, weight);
        _mm512_store_ps(weights + key, weight);
    }
    _mm512_store_ps(s->lane_totals + row * WIDTH, totals);
}

/* sums[row] += weights[row] @ values, for `rows` rows and `vectors` vectors of a head's elements,
 * of which the first word is `unit`. */
INLINE void add_values(const Span *values, int64_t from, int64_t count, int64_t units, int64_t unit,
                       int rows, int vectors, int is_bfloat16, const float *weights, float *sums,
                       Ahead *ahead) {
    __m512 total[ROWS][4];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            total[r][v] = _mm512_load_ps(sums + r * MOST_SIZE + v * WIDTH);
    int loads = is_bfloat16 ? vectors / 2 : vectors;
    for (int64_t key = 0; key < count; key++) {
        fetch(ahead, rows * vectors);
        __m512 value[4];
#pragma GCC unroll 4
        for (int v = 0; v < loads; v++) {
            int64_t first = unit + v * WIDTH;
            __m512i read =
                words(values->value, (from + key) * values->stride + first, mask_of(units - first));
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

TARGET static void add_float32(const Span *values, int64_t from, int64_t count, int64_t units,
                               int64_t unit, int64_t rows, int64_t vectors, const float *weights,
                               float *sums, Ahead *ahead) {
#define CALL(R, V) add_values(values, from, count, units, unit, R, V, 0, weights, sums, ahead)
    EACH(CALL)
#undef CALL
}

TARGET static void add_bfloat16(const Span *values, int64_t from, int64_t count, int64_t units,
                                int64_t unit, int64_t rows, int64_t vectors, const float *weights,
                                float *sums, Ahead *ahead) {
#define CALL(R, V) add_values(values, from, count, units, unit, R, V, 1, weights, sums, ahead)
    if (vectors == 2) EACH_ROWS(CALL, 2) else EACH_ROWS(CALL, 4)
#undef CALL
}

/* A block of a span that lies densely, to be fetched during so much work. */
INLINE Ahead block_of(const Span *span, int64_t units, int64_t first, int64_t work) {
    int64_t bytes = smaller(KEYS, span->count - first) * units * 4;
    if (span->stride != units || bytes <= 0) return (Ahead){0};
    const char *keys = (const char *)((const int32_t *)span->key + first * units);
    const char *values = (const char *)((const int32_t *)span->value + first * units);
    return (Ahead){keys, keys + bytes, values, values + bytes, work * 16 / (2 * bytes / LINE + 2), 0};
}

/* Rows first .. first + rows of a task attend to a span; the one after it is fetched meanwhile.
 * `is_one`: it is one row whatever rows there are, so that its sums may be made in an order that
 * suits one. */
TARGET static void attend(const Heads *h, Scratch *s, Span span, Span after, Sight sight,
                          int64_t first, int64_t rows, int is_one) {
    int is_bfloat16 = (int)h->is_bfloat16;
    int64_t units = words_of(h->size, is_bfloat16), vectors = (units + WIDTH - 1) / WIDTH;
    int64_t places = vectors * WIDTH;
    if (is_bfloat16) vectors *= 2, places *= 2;
    for (int64_t start = 0; start < span.count; start += KEYS) {
        int64_t block = smaller(KEYS, span.count - start);
        int is_last = start + KEYS >= span.count;
        const Span *next = is_last ? &after : &span;
        int64_t from = is_last ? 0 : start + KEYS;
        int64_t key_vectors = (block + WIDTH - 1) / WIDTH;
        int64_t tiles = (units + WIDTH - 1) / WIDTH;
        int64_t to_score = is_one ? tiles * WIDTH : tiles * WORK_OF_A_TILE + rows * places;
        int64_t work = key_vectors * (to_score + rows * WORK_OF_A_VECTOR) + rows * vectors * block;
        Ahead ahead = block_of(next, units, from, work);
        const int32_t *from_key = (const int32_t *)span.key + start * span.stride;
        if (!is_one)
            transpose_keys(from_key, span.stride, block, h->size, is_bfloat16, s->keys, &ahead);
        for (int64_t row = first; row < first + rows;) {
            int64_t left = first + rows - row, sets = (left + ROWS - 1) / ROWS;
            int64_t some = (left + sets - 1) / sets, count = block;
            if (sight.repeats)
                count = smaller(block, sight.first + (row + some - 1) / sight.repeats - start);
            if (count > 0) {
                if (is_one)
                    scores_of_one(from_key, span.stride, count, units, is_bfloat16,
                                  s->query + row * MOST_SIZE, s->weights + row * KEYS, &ahead);
                else
                    some_scores(s->keys, s->query + row * MOST_SIZE, places, some,
                            (count + WIDTH - 1) / WIDTH, s->weights + row * KEYS, &ahead);
                for (int64_t r = row; r < row + some; r++) {
                    int64_t seen = count;
                    if (sight.repeats)
                        seen = smaller(count, sight.first + r / sight.repeats - start);
                    soften(s, r, seen, count, places, &ahead);
                }
                for (int64_t v = 0; v < vectors; v += 4)
                    (is_bfloat16 ? add_bfloat16 : add_float32)(
                        &span, start, count, units, is_bfloat16 ? v / 2 * WIDTH : v * WIDTH, some,
                        smaller(4, vectors - v), s->weights + row * KEYS,
                        s->sums + row * MOST_SIZE + v * WIDTH, &ahead);
            }
            row += some;
        }
    }
}

static inline const void *at(const Heads *h, const void *from, int64_t element) {
    return (const char *)from + element * (h->is_bfloat16 ? 2 : 4);
}

/* Row `place` of a task begins, with the query that lies at `from`. */
TARGET static void load_query(const Heads *h, Scratch *s, const void *from, int64_t place) {
    float *to = s->query + place * MOST_SIZE;
    __m512 scale = _mm512_set1_ps((float)h->scale);
    int64_t units = words_of(h->size, (int)h->is_bfloat16);
    for (int64_t unit = 0; unit < units; unit += WIDTH) {
        __m512i read = words(from, unit, mask_of(units - unit));
        if (h->is_bfloat16) {
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

/* What row `place` of a task comes to goes to `into`. */
TARGET static void store_out(const Heads *h, const Scratch *s, const void *into, int64_t place) {
    int32_t *to = (int32_t *)into;
    const float *sums = s->sums + place * MOST_SIZE;
    float total = _mm512_reduce_add_ps(_mm512_load_ps(s->lane_totals + place * WIDTH));
    __m512 divisor = _mm512_set1_ps(total);
    int64_t units = words_of(h->size, (int)h->is_bfloat16);
    for (int64_t unit = 0; unit < units; unit += WIDTH) {
        __mmask16 mask = mask_of(units - unit);
        if (h->is_bfloat16) {
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
