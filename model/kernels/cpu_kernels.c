/* What a layer does between its matrix products, on the CPU: query/key norm, rotary
 * positions, cache write and softmax(Q K^T / sqrt(d)) V over pages in one call; RMSNorm and
 * LayerNorm; SiLU(gate) * up.
 *
 * The PyTorch twins are model/backends/cpu.py and model/layers.py;
 * tests/model/test_cpu_kernels.py compares them.
 * Every (query, head) row goes through the same operations in the same order whatever else
 * is in the batch: keys in tiles of one block from position 0 (or from the block where a
 * sliding window begins, which depends on the position alone), lanes of 16 keys, then of 16
 * dimensions. Rows are computed four at a time or alone with the same operations, so a
 * query's bits do not depend on its neighbours. No -ffast-math: nothing may be reordered.
 *
 * Cache layout (model/kv_cache.py), one layer:
 *   keys   (num_blocks, num_kv_heads, head_dim, block_size)   transposed: lanes are keys
 *   values (num_blocks, num_kv_heads, block_size, head_dim)
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define MAX_HEAD_DIM 256
#define MAX_BLOCK 128

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4)));
typedef uint16_t hvec __attribute__((vector_size(32), aligned(2)));
typedef uint32_t uvec __attribute__((vector_size(64), aligned(4)));

typedef struct {
    int64_t num_seqs, num_heads, num_kv_heads, head_dim, block_size, max_blocks;
    int64_t window;     /* 0: none */
    int64_t is_bf16;    /* of cache, queries, keys, values and output; else float32 */
    int64_t qkv_stride; /* elements between two tokens' rows of [queries | keys | values] */
    float scale, norm_eps;
    /* Optional, all (head_dim): weights of query and key norm, in the model's type. */
    const void *query_norm, *key_norm;
    /* Optional: float32 (max_positions, head_dim), and each token's position. */
    const float *cos, *sin;
    const int64_t *positions;
} Shape;

static inline vec splat(float x) { return x - (vec){0}; }

static inline float from_bf16(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t to_bf16(float f) { /* round to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

static inline __attribute__((always_inline)) vec load(const void *base, int64_t at, int is_bf16) {
    if (is_bf16) {
        hvec h;
        memcpy(&h, (const uint16_t *)base + at, sizeof h);
        uvec bits = __builtin_convertvector(h, uvec) << 16;
        return (vec)bits;
    }
    vec v;
    memcpy(&v, (const float *)base + at, sizeof v);
    return v;
}

static inline float load1(const void *base, int64_t at, int is_bf16) {
    return is_bf16 ? from_bf16(((const uint16_t *)base)[at]) : ((const float *)base)[at];
}

/* exp(x) for x <= 0: 2^n * p(r), r = x - n ln 2, |r| <= ln 2 / 2; polynomial and split of
 * ln 2 as in Cephes' expf (S. Moshier). Below -87 the result is 0, as it should be for a
 * masked key (-inf). */
static inline vec exp_vec(vec x) {
    ivec dead = x < splat(-87.0f);
    x = (vec)((ivec)x & ~dead);
    vec shifted = x * splat(1.44269504088896341f) + splat(12582912.0f); /* 1.5 * 2^23: rounds */
    vec n = shifted - splat(12582912.0f);
    vec r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
    return (vec)((ivec)(p * (vec)power) & ~dead);
}

static inline float max_lane(vec v) {
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
}

static inline float sum_lanes(vec v) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) v[i] += v[i + half];
    return v[0];
}

/* `rows` queries of one KV head (compile-time 1 or 4) against a sequence's keys.
 * q: (rows, head_dim) float32, already scaled. limit[r]: keys that row r sees, from first[r]. */
static inline __attribute__((always_inline)) void attend_rows(
    const int rows, const int dim_lanes, const int block_lanes, const int is_bf16,
    const Shape *s, int64_t head, const void *keys, const void *values, const int64_t *table,
    const float *q, const int64_t *first, const int64_t *limit, float *out) {
    const int64_t d = s->head_dim, size = s->block_size;
    const int nd = dim_lanes ? dim_lanes : (int)(d / LANES);
    const int nb = block_lanes ? block_lanes : (int)(size / LANES);
    vec acc[rows][dim_lanes ? dim_lanes : MAX_HEAD_DIM / LANES];
    vec total[rows];
    float highest[rows];
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
        vec score[rows][block_lanes ? block_lanes : MAX_BLOCK / LANES];
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < nb; b++) score[r][b] = splat(0);
        for (int64_t i = 0; i < d; i++)
            for (int b = 0; b < nb; b++) {
                vec k = load(keys, page + i * size + b * LANES, is_bf16);
                for (int r = 0; r < rows; r++) score[r][b] += q[r * d + i] * k;
            }
        for (int r = 0; r < rows; r++) {
            vec top = splat(-INFINITY);
            for (int b = 0; b < nb; b++) {
                vec position = lane + splat((float)(tile * size + b * LANES));
                ivec hidden = (position >= splat((float)limit[r])) |
                              (position < splat((float)first[r]));
                score[r][b] = (vec)(((ivec)score[r][b] & ~hidden) |
                                    ((ivec)splat(-INFINITY) & hidden));
                ivec above = score[r][b] > top;
                top = (vec)(((ivec)score[r][b] & above) | ((ivec)top & ~above));
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
        for (int b = 0; b < nb; b++)
            for (int j = 0; j < LANES; j++) {
                const int64_t row = page + (b * LANES + j) * d;
                for (int n = 0; n < nd; n++) {
                    vec v = load(values, row + n * LANES, is_bf16);
                    for (int r = 0; r < rows; r++) acc[r][n] += score[r][b][j] * v;
                }
            }
    }
    for (int r = 0; r < rows; r++) {
        vec share = splat(1.0f / sum_lanes(total[r]));
        for (int n = 0; n < nd; n++) {
            vec v = acc[r][n] * share;
            memcpy(out + r * d + n * LANES, &v, sizeof v);
        }
    }
}

#define CASE(ROWS, ND, NB, BF16)                                                             \
    attend_rows(ROWS, ND, NB, BF16, s, head, keys, values, table, q, first, limit, out)
#define BY_DIM(ROWS, BF16)                                                                   \
    do {                                                                                     \
        if (s->block_size == 32 && s->head_dim == 32) CASE(ROWS, 2, 2, BF16);                \
        else if (s->block_size == 32 && s->head_dim == 64) CASE(ROWS, 4, 2, BF16);           \
        else if (s->block_size == 32 && s->head_dim == 128) CASE(ROWS, 8, 2, BF16);          \
        else CASE(ROWS, 0, 0, BF16);                                                         \
    } while (0)

static __attribute__((noinline)) void attend_four(
    const Shape *s, int64_t head, const void *keys, const void *values, const int64_t *table,
    const float *q, const int64_t *first, const int64_t *limit, float *out) {
    if (s->is_bf16) BY_DIM(4, 1); else BY_DIM(4, 0);
}

static __attribute__((noinline)) void attend_one(
    const Shape *s, int64_t head, const void *keys, const void *values, const int64_t *table,
    const float *q, const int64_t *first, const int64_t *limit, float *out) {
    if (s->is_bf16) BY_DIM(1, 1); else BY_DIM(1, 0);
}

/* sum of squares in a fixed order: 16 lanes, then the lanes; d is a multiple of 16 */
static inline float mean_square(const float *x, int64_t d) {
    vec sum = splat(0);
    for (int64_t i = 0; i < d; i += LANES) {
        vec v = load(x, i, 0);
        sum += v * v;
    }
    return sum_lanes(sum) / (float)d;
}

/* One head of one token as float32: norm, then rotary position (x cos + rotate_half(x) sin). */
static inline void prepare_head(const Shape *s, const void *qkv, int64_t at, const void *norm,
                                int64_t token, float *head) {
    const int64_t d = s->head_dim, half = d / 2;
    for (int64_t i = 0; i < d; i++) head[i] = load1(qkv, at + i, (int)s->is_bf16);
    if (norm) {
        const float share = 1.0f / sqrtf(mean_square(head, d) + s->norm_eps);
        for (int64_t i = 0; i < d; i++) head[i] = head[i] * share * load1(norm, i, (int)s->is_bf16);
    }
    if (s->cos) {
        const float *cos = s->cos + s->positions[token] * d, *sin = s->sin + s->positions[token] * d;
        for (int64_t i = 0; i < half; i++) {
            const float a = head[i], b = head[i + half];
            head[i] = a * cos[i] - b * sin[i];
            head[i + half] = b * cos[i + half] + a * sin[i + half];
        }
    }
}

static inline void store1(void *base, int64_t at, float x, int is_bf16) {
    if (is_bf16) ((uint16_t *)base)[at] = to_bf16(x);
    else ((float *)base)[at] = x;
}

/* Put each token's key and value at its slot. slots[t] = block * block_size + offset. */
static void write_cache(const Shape *s, int64_t num_tokens, const void *qkv, void *keys,
                        void *values, const int64_t *slots) {
    const int64_t d = s->head_dim, size = s->block_size;
    const size_t width = s->is_bf16 ? 2 : 4;
#pragma omp parallel for schedule(static) if (num_tokens > 4)
    for (int64_t t = 0; t < num_tokens; t++) {
        const int64_t block = slots[t] / size, offset = slots[t] % size;
        for (int64_t h = 0; h < s->num_kv_heads; h++) {
            const int64_t page = (block * s->num_kv_heads + h) * d * size;
            const int64_t key_at = t * s->qkv_stride + (s->num_heads + h) * d;
            const int64_t value_at = key_at + s->num_kv_heads * d;
            float head[MAX_HEAD_DIM];
            prepare_head(s, qkv, key_at, s->key_norm, t, head);
            for (int64_t i = 0; i < d; i++)
                store1(keys, page + i * size + offset, head[i], (int)s->is_bf16);
            memcpy((char *)values + (page + offset * d) * width,
                   (const char *)qkv + value_at * width, (size_t)d * width);
        }
    }
}

/* One layer of one step.
 *
 * qkv (num_tokens, (num_heads + 2 num_kv_heads) head_dim), qkv_stride between tokens; out
 * (num_tokens, num_heads, head_dim) without gaps. jobs (num_jobs, 3): sequence, first row in
 * the batch, number of queries. */
void vitrine_attention(const Shape *s, const void *qkv, void *keys, void *values,
                       const int64_t *slots, int64_t num_tokens, const int64_t *jobs,
                       int64_t num_jobs, const int64_t *query_start,
                       const int64_t *context_lens, const int64_t *tables, void *out) {
    write_cache(s, num_tokens, qkv, keys, values, slots);
    const int64_t d = s->head_dim, group = s->num_heads / s->num_kv_heads;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < num_jobs * s->num_kv_heads; item++) {
        const int64_t *job = jobs + item / s->num_kv_heads * 3;
        const int64_t head = item % s->num_kv_heads, seq = job[0];
        const int64_t num_rows = job[2] * group;
        const int64_t *table = tables + seq * s->max_blocks;
        /* position of the query in batch row r: context - queries + (r - start) */
        const int64_t base = context_lens[seq] - query_start[seq + 1];
        for (int64_t row = 0; row < num_rows;) {
            const int count = num_rows - row >= 4 ? 4 : 1;
            float q[4 * MAX_HEAD_DIM], mixed[4 * MAX_HEAD_DIM];
            int64_t first[4], limit[4], token[4], query_head[4];
            for (int r = 0; r < count; r++) {
                token[r] = job[1] + (row + r) / group;
                query_head[r] = head * group + (row + r) % group;
                limit[r] = base + token[r] + 1;
                first[r] = s->window && limit[r] > s->window ? limit[r] - s->window : 0;
                const int64_t at = token[r] * s->qkv_stride + query_head[r] * d;
                prepare_head(s, qkv, at, s->query_norm, token[r], q + r * d);
                for (int64_t i = 0; i < d; i++) q[r * d + i] *= s->scale;
            }
            if (count == 4)
                attend_four(s, head, keys, values, table, q, first, limit, mixed);
            else
                attend_one(s, head, keys, values, table, q, first, limit, mixed);
            for (int r = 0; r < count; r++) {
                const int64_t at = (token[r] * s->num_heads + query_head[r]) * d;
                for (int64_t i = 0; i < d; i++)
                    store1(out, at + i, mixed[r * d + i], (int)s->is_bf16);
            }
            row += count;
        }
    }
}

static inline __attribute__((always_inline)) void store(void *base, int64_t at, vec v,
                                                        int is_bf16) {
    if (!is_bf16) {
        memcpy((float *)base + at, &v, sizeof v);
        return;
    }
    uvec bits = (uvec)v;
    bits += 0x7fffu + ((bits >> 16) & 1); /* a NaN's payload may change; it stays a NaN */
    hvec h = __builtin_convertvector(bits >> 16, hvec);
    memcpy((uint16_t *)base + at, &h, sizeof h);
}

/* x / sqrt(mean(x^2) + eps) * weight, row by row; size is a multiple of 16. */
void vitrine_rms_norm(const void *x, const void *weight, void *out, int64_t rows, int64_t size,
                      float eps, int64_t is_bf16) {
#pragma omp parallel for schedule(static) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * size;
        vec sum = splat(0);
        for (int64_t i = 0; i < size; i += LANES) {
            vec v = load(x, at + i, (int)is_bf16);
            sum += v * v;
        }
        const vec share = splat(1.0f / sqrtf(sum_lanes(sum) / (float)size + eps));
        for (int64_t i = 0; i < size; i += LANES)
            store(out, at + i,
                  load(x, at + i, (int)is_bf16) * share * load(weight, i, (int)is_bf16),
                  (int)is_bf16);
    }
}

/* (x - mean) / sqrt(variance + eps) * weight + bias, row by row; size is a multiple of 16. */
void vitrine_layer_norm(const void *x, const void *weight, const void *bias, void *out,
                        int64_t rows, int64_t size, float eps, int64_t is_bf16) {
#pragma omp parallel for schedule(static) if (rows > 8)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * size;
        vec sum = splat(0), squares = splat(0);
        for (int64_t i = 0; i < size; i += LANES) sum += load(x, at + i, (int)is_bf16);
        const vec mean = splat(sum_lanes(sum) / (float)size);
        for (int64_t i = 0; i < size; i += LANES) {
            vec v = load(x, at + i, (int)is_bf16) - mean;
            squares += v * v;
        }
        const vec share = splat(1.0f / sqrtf(sum_lanes(squares) / (float)size + eps));
        for (int64_t i = 0; i < size; i += LANES) {
            vec v = (load(x, at + i, (int)is_bf16) - mean) * share;
            store(out, at + i,
                  v * load(weight, i, (int)is_bf16) + load(bias, i, (int)is_bf16), (int)is_bf16);
        }
    }
}

/* out = gate / (1 + exp(-gate)) * up for gate_up (rows, [gate | up]); size a multiple of 16. */
void vitrine_silu_mul(const void *gate_up, void *out, int64_t rows, int64_t size,
                      int64_t is_bf16) {
#pragma omp parallel for schedule(static) if (rows * size > 16384)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < size; i += LANES) {
            vec gate = load(gate_up, row * 2 * size + i, (int)is_bf16);
            vec up = load(gate_up, row * 2 * size + size + i, (int)is_bf16);
            /* 1 / (1 + e^-g) = e^min(g, 0) / (1 + e^-|g|): exp_vec takes x <= 0 */
            ivec negative = gate < splat(0);
            vec magnitude = (vec)((ivec)gate & 0x7fffffff);
            vec small = exp_vec(splat(0) - magnitude);
            vec top = (vec)(((ivec)small & negative) | ((ivec)splat(1.0f) & ~negative));
            store(out, row * size + i, gate * top / (splat(1.0f) + small) * up, (int)is_bf16);
        }
}
