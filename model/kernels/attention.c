/* One layer's attention: query/key norm, rotary positions, cache write and
 * softmax(Q K^T / sqrt(d)) V over pages, every block read once where it lies.
 *
 * The PyTorch twin is model/backends/cpu.py. Every (query, head) row goes through the same
 * operations in the same order whatever else is in the batch: keys in tiles of one block from
 * position 0 (or from the block where a sliding window begins, which depends on the position
 * alone), lanes of 16 keys, then of 16 dimensions. Rows are computed one to four at a time
 * with the same operations, so a query's bits do not depend on its neighbours.
 */
#include "kernels.h"
#include "vectors.h"

#include <math.h>

#define ROWS_MAX SCORE_ROWS
#define DIM_MAX (MAX_HEAD_DIM / LANES)
#define BLOCK_MAX (MAX_BLOCK / LANES)
/* Of decodes, which take about as long as each other: shares that a thread takes, and the most of
 * them in one. */
#define SHARES 8
#define MOST_IN_A_ROW 8

/* What others will read again goes into the second level of cache; the rest passes it by. */
INLINE void prefetch(const void *base, int64_t at, int is_bf16, const int once) {
    const char *line = (const char *)base + at * (is_bf16 ? 2 : 4);
    if (once) __builtin_prefetch(line, 0, 0);
    else __builtin_prefetch(line, 0, 2);
}

/* A row's scores, -infinity where it sees nothing, and what makes weights of them. */
typedef struct {
    float *scores, highest, share; /* weight: e^(score - highest) * share */
} Kept;

/* `rows` queries of one KV head (compile-time, 1 to 4) against a sequence's keys.
 * q: (rows, head_dim) float32, already scaled. limit[r]: keys that row r sees, from first[r].
 * after: where the block lies that this thread is likely to read when it is done here.
 * once: whether no other queries of the job follow, who would see the same keys (compile-time).
 * kept: NULL, or what is to be left of each row whose `scores` is not NULL. */
INLINE void attend_rows(
    const int rows, const int once, const int dim_lanes, const int block_lanes, const int is_bf16,
    const Model *s, int64_t head, const void *keys, const void *values, const int64_t *table,
    const float *q, const int64_t *first, const int64_t *limit, int64_t after, Kept *kept,
    float *out) {
    const int64_t d = s->head_dim, size = s->block_size;
    const int nd = dim_lanes ? dim_lanes : (int)(d / LANES);
    const int nb = block_lanes ? block_lanes : (int)(size / LANES);
    /* fixed sizes: arrays sized by a parameter would live in memory, not in registers */
    vec acc[ROWS_MAX][DIM_MAX], total[ROWS_MAX];
    float highest[ROWS_MAX];
    int64_t begin = first[0], end = limit[0];
    for (int r = 0; r < rows; r++) {
        for (int n = 0; n < nd; n++) acc[r][n] = splat(0);
        total[r] = splat(0);
        highest[r] = -INFINITY;
        begin = first[r] < begin ? first[r] : begin;
        end = limit[r] > end ? limit[r] : end;
    }
    vec lane;
    for (int i = 0; i < LANES; i++) lane[i] = (float)i;

    for (int64_t tile = begin / size; tile * size < end; tile++) {
        const int64_t page = (table[tile] * s->num_kv_heads + head) * d * size;
        /* Blocks lie anywhere: the processor cannot guess where the next one is. */
        const int64_t next =
            (tile + 1) * size < end ? (table[tile + 1] * s->num_kv_heads + head) * d * size : after;
        /* Even and odd dimensions apart: two chains of additions, each half as long. */
        vec score[ROWS_MAX][BLOCK_MAX], odd[ROWS_MAX][BLOCK_MAX];
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < nb; b++) score[r][b] = splat(0), odd[r][b] = splat(0);
        for (int64_t i = 0; i < d; i += 2)
            for (int b = 0; b < nb; b++) {
                if (!is_bf16 || b % 2 == 0) { /* a cache line each */
                    prefetch(keys, next + i * size + b * LANES, is_bf16, once);
                    prefetch(keys, next + (i + 1) * size + b * LANES, is_bf16, once);
                }
                vec k = load(keys, page + i * size + b * LANES, is_bf16);
                for (int r = 0; r < rows; r++) score[r][b] += q[r * d + i] * k;
                k = load(keys, page + (i + 1) * size + b * LANES, is_bf16);
                for (int r = 0; r < rows; r++) odd[r][b] += q[r * d + i + 1] * k;
            }
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < nb; b++) score[r][b] += odd[r][b];
        for (int r = 0; r < rows; r++) {
            vec top = splat(-INFINITY);
            for (int b = 0; b < nb; b++) {
                vec position = lane + splat((float)(tile * size + b * LANES));
                ivec hidden = (position >= splat((float)limit[r])) |
                              (position < splat((float)first[r]));
                score[r][b] = choose(hidden, splat(-INFINITY), score[r][b]);
                top = choose(score[r][b] > top, score[r][b], top);
                if (kept && kept[r].scores)
                    store(kept[r].scores, tile * size + b * LANES, score[r][b], 0);
            }
            float tile_top = max_lane(top);
            if (tile_top > highest[r]) {
                /* exp(-inf) is 0: the first tile starts from nothing */
                vec shrink = exp_vec(splat(highest[r] - tile_top));
                total[r] *= shrink;
                for (int n = 0; n < nd; n++) acc[r][n] *= shrink;
                highest[r] = tile_top;
            }
            if (highest[r] == -INFINITY) { /* this row sees nothing of this tile yet */
                for (int b = 0; b < nb; b++) score[r][b] = splat(0);
                continue;
            }
            for (int b = 0; b < nb; b++) {
                score[r][b] = exp_vec(score[r][b] - splat(highest[r]));
                total[r] += score[r][b];
            }
        }
        float weight[ROWS_MAX][MAX_BLOCK];
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < nb; b++) store(weight[r], b * LANES, score[r][b], 0);
        /* Only values that somebody sees: another place may hold a NaN of a block's last owner,
         * and 0 * NaN is not 0. */
        const int64_t from = begin > tile * size ? begin - tile * size : 0;
        const int64_t to = end < (tile + 1) * size ? end - tile * size : size;
        for (int64_t j = from; j < to; j++)
            for (int n = 0; n < nd; n++) {
                if (!is_bf16 || n % 2 == 0) prefetch(values, next + j * d + n * LANES, is_bf16, once);
                vec v = load(values, page + j * d + n * LANES, is_bf16);
                for (int r = 0; r < rows; r++) acc[r][n] += weight[r][j] * v;
            }
    }
    for (int r = 0; r < rows; r++) {
        vec share = splat(1.0f / sum_lanes(total[r]));
        for (int n = 0; n < nd; n++) {
            vec v = acc[r][n] * share;
            memcpy(out + r * d + n * LANES, &v, sizeof v);
        }
        if (kept) kept[r].highest = highest[r], kept[r].share = share[0];
    }
}

#define BY_DIM(ROWS, ONCE, BF16)                                                             \
    switch (s->block_size == 32 ? s->head_dim : 0) {                                         \
        case 32: CASE(ROWS, ONCE, 2, 2, BF16); break;                                        \
        case 48: CASE(ROWS, ONCE, 3, 2, BF16); break;                                        \
        case 64: CASE(ROWS, ONCE, 4, 2, BF16); break;                                        \
        case 128: CASE(ROWS, ONCE, 8, 2, BF16); break;                                       \
        default: CASE(ROWS, ONCE, 0, 0, BF16);                                               \
    }

#define CASE(ROWS, ONCE, ND, NB, BF16)                                                       \
    attend_rows(ROWS, ONCE, ND, NB, BF16, s, head, keys, values, table, q, first, limit,     \
                after, kept, out)

typedef void Attend(const Model *s, int64_t head, const void *keys, const void *values,
                    const int64_t *table, const float *q, const int64_t *first,
                    const int64_t *limit, int64_t after, Kept *kept, float *out);

#define ATTEND(NAME, ROWS, ONCE)                                                             \
    static __attribute__((noinline)) void NAME(                                              \
        const Model *s, int64_t head, const void *keys, const void *values,                  \
        const int64_t *table, const float *q, const int64_t *first, const int64_t *limit,    \
        int64_t after, Kept *kept, float *out) {                                             \
        if (s->is_bf16) BY_DIM(ROWS, ONCE, 1) else BY_DIM(ROWS, ONCE, 0)                     \
    }
ATTEND(attend_four, 4, 0)
ATTEND(attend_last_four, 4, 1)
ATTEND(attend_last_three, 3, 1)
ATTEND(attend_last_two, 2, 1)
ATTEND(attend_last, 1, 1)
static Attend *const attend_rest[] = {attend_last, attend_last_two, attend_last_three,
                                      attend_last_four};

/* One head of one token as float32: norm, then rotary position (x cos + rotate_half(x) sin). */
static void prepare_head(const Model *m, const Step *s, const void *qkv, int64_t at,
                         const float *norm, int64_t token, float *head) {
    const int64_t d = m->head_dim, half = d / 2;
    vec squares = splat(0);
    for (int64_t i = 0; i < d; i += LANES) {
        const vec v = load(qkv, at + i, (int)m->is_bf16);
        squares += v * v;
        store(head, i, v, 0);
    }
    if (norm) {
        const vec share = splat(1.0f / sqrtf(sum_lanes(squares) / (float)d + m->norm_eps));
        for (int64_t i = 0; i < d; i += LANES)
            store(head, i, load(head, i, 0) * share * load(norm, i, 0), 0);
    }
    if (m->cos) {
        const float *cos = m->cos + s->positions[token] * d, *sin = m->sin + s->positions[token] * d;
        for (int64_t i = 0; i < half; i++) {
            const float a = head[i], b = head[i + half];
            head[i] = a * cos[i] - b * sin[i];
            head[i + half] = b * cos[i + half] + a * sin[i + half];
        }
    }
}

/* Put a token's key and value of one head at its slot: block * block_size + offset. */
static void write_cache(const Model *m, const Layer *l, const Step *s, int64_t token,
                        int64_t head) {
    const int64_t d = m->head_dim, size = m->block_size;
    const int64_t block = s->slots[token] / size, offset = s->slots[token] % size;
    const int64_t page = (block * m->num_kv_heads + head) * d * size;
    const int64_t row = token * (m->num_heads + 2 * m->num_kv_heads);
    float key[MAX_HEAD_DIM];
    prepare_head(m, s, s->qkv, (row + m->num_heads + head) * d, l->key_norm, token, key);
    for (int64_t i = 0; i < d; i++) {
        if (m->is_bf16) ((uint16_t *)l->keys)[page + i * size + offset] = to_bf16(key[i]);
        else ((float *)l->keys)[page + i * size + offset] = key[i];
    }
    const int64_t value = (row + m->num_heads + m->num_kv_heads + head) * d;
    const int64_t width = m->is_bf16 ? 2 : 4;
    memcpy((char *)l->values + (page + offset * d) * width, (const char *)s->qkv + value * width,
           (size_t)(d * width));
}

/* A watched query's scores become weights, which are added to those of its row's other heads and
 * layers. A row's heads of one KV head are one thread's, and layers follow each other: the sums do
 * not depend on who else is there. */
static void add_weights(const Model *m, const Layer *l, const Watch *w, int64_t row, int64_t head,
                        int64_t first, int64_t limit, const Kept *kept) {
    const int64_t size = m->block_size, begin = first / size * size;
    const int64_t end = (limit + size - 1) / size * size;
    const int64_t kv_head = head / (m->num_heads / m->num_kv_heads);
    float *sums = w->sums + (row * m->num_kv_heads + kv_head) * w->stride;
    float *scores = kept->scores;
    const vec highest = splat(kept->highest), share = splat(kept->share);
    for (int64_t j = begin; j < end; j += LANES) {
        const vec weight = exp_vec(load(scores, j, 0) - highest) * share;
        store(scores, j, weight, 0);
        store(sums, j, load(sums, j, 0) + weight, 0);
    }
    for (int64_t i = w->chosen_start[row]; i < w->chosen_start[row + 1]; i++)
        if (w->chosen[i * 2] == l - m->layers && w->chosen[i * 2 + 1] == head)
            memcpy(w->chosen_weights + i * w->stride + begin, scores + begin,
                   (size_t)(end - begin) * sizeof *scores);
}

/* An item is the queries of a job, item / num_kv_heads, that use one KV head, item % num_kv_heads.
 * Where the block lies that it reads first: */
static int64_t first_page(const Model *m, const Layer *l, const Step *s, const int64_t *jobs,
                          int64_t item) {
    const int64_t *job = jobs + item / m->num_kv_heads * 3, seq = job[0];
    const int64_t limit = s->context_lens[seq] - s->query_start[seq + 1] + job[1] + 1;
    const int64_t first = l->window && limit > l->window ? limit - l->window : 0;
    const int64_t block = s->tables[seq * s->max_blocks + first / m->block_size];
    return (block * m->num_kv_heads + item % m->num_kv_heads) * m->head_dim * m->block_size;
}

/* Of the queries of KV head `head` from batch row `token` on, those from `row` on, which this thread
 * takes next: fetched from where other threads left them while it computes. */
static void fetch_queries(const Model *m, const Step *s, int64_t token, int64_t head, int64_t row,
                          int64_t end) {
    const int64_t bytes = m->head_dim * (m->is_bf16 ? 2 : 4);
    const int64_t heads = m->num_heads + 2 * m->num_kv_heads, group = m->num_heads / m->num_kv_heads;
    for (; row < end; row++) {
        const int64_t query = (token + row / group) * heads + head * group + row % group;
        for (int64_t i = 0; i < bytes; i += LINE)
            __builtin_prefetch((const char *)s->qkv + query * bytes + i, 0, 2);
    }
}

/* One of `items`. */
static void attend(const Member *me, const Model *m, const Layer *l, const Step *s,
                   const int64_t *jobs, int64_t item, int64_t items) {
    const int64_t *job = jobs + item / m->num_kv_heads * 3, head = item % m->num_kv_heads;
    const int64_t d = m->head_dim, group = m->num_heads / m->num_kv_heads, seq = job[0];
    const int64_t num_rows = job[2] * group;
    const int64_t *table = s->tables + seq * s->max_blocks;
    /* position of the query in batch row r: context - queries + (r - start) */
    const int64_t base = s->context_lens[seq] - s->query_start[seq + 1];
    const Watch *w = s->watch;
    const int64_t watched = w ? w->rows[seq] : -1;
    for (int64_t row = 0; row < num_rows;) {
        const int count = (int)(num_rows - row < ROWS_MAX ? num_rows - row : ROWS_MAX);
        float q[ROWS_MAX * MAX_HEAD_DIM], mixed[ROWS_MAX * MAX_HEAD_DIM];
        int64_t first[ROWS_MAX], limit[ROWS_MAX], at[ROWS_MAX];
        Kept kept[ROWS_MAX] = {{NULL, 0, 0}};
        for (int r = 0; r < count; r++) {
            const int64_t token = job[1] + (row + r) / group;
            const int64_t query = head * group + (row + r) % group;
            limit[r] = base + token + 1;
            first[r] = l->window && limit[r] > l->window ? limit[r] - l->window : 0;
            at[r] = (token * m->num_heads + query) * d;
            prepare_head(m, s, s->qkv, at[r] + token * 2 * m->num_kv_heads * d, l->query_norm, token,
                         q + r * d);
            for (int64_t i = 0; i < d; i++) q[r * d + i] *= m->scale;
            if (watched >= 0 && token + 1 == s->query_start[seq + 1])
                kept[r].scores = w->scores + (me->rank * ROWS_MAX + r) * w->stride;
        }
        const int64_t later = row + count + ROWS_MAX;
        fetch_queries(m, s, job[1], head, row + count, later < num_rows ? later : num_rows);
        Kept *keep = watched >= 0 ? kept : NULL;
        const int64_t next = row + count < num_rows || item + 1 == items ? item : item + 1;
        const int64_t after = first_page(m, l, s, jobs, next);
        Attend *const rows = row + count < num_rows ? attend_four : attend_rest[count - 1];
        rows(m, head, l->keys, l->values, table, q, first, limit, after, keep, mixed);
        for (int r = 0; r < count; r++)
            for (int64_t i = 0; i < d; i += LANES)
                store(s->mixed, at[r] + i, load(mixed, r * d + i, 0), (int)m->is_bf16);
        for (int r = 0; r < count; r++)
            if (kept[r].scores)
                add_weights(m, l, w, watched, head * group + (row + r) % group, first[r], limit[r],
                            &kept[r]);
        row += count;
    }
}

void attention(Member *me, const Model *m, const Layer *l, const Step *s, const int64_t *jobs,
               int64_t num_jobs) {
    /* A chunk's queries see keys of the same chunk that another thread may have to write. */
    const int64_t written = s->num_tokens * m->num_kv_heads;
    const int64_t share = share_of(me, written);
    for (int64_t at = take(me, written, share); at < written; at = take(me, written, share))
        for (int64_t item = at; item < at + share && item < written; item++)
            write_cache(m, l, s, item / m->num_kv_heads, item % m->num_kv_heads);
    meet(me, written);
    /* Several in a row for a thread, so that it knows what it will read next; not with prompts,
     * whose items take so long that the threads would wait for the one with the last share. */
    const int64_t items = num_jobs * m->num_kv_heads;
    int64_t in_a_row = num_jobs == s->num_tokens ? items / (SHARES * me->size) : 1;
    in_a_row = in_a_row < 1 ? 1 : in_a_row > MOST_IN_A_ROW ? MOST_IN_A_ROW : in_a_row;
    for (int64_t at = take(me, items, in_a_row); at < items; at = take(me, items, in_a_row))
        for (int64_t item = at; item < at + in_a_row && item < items; item++)
            attend(me, m, l, s, jobs, item, items);
    meet(me, items);
}
