/* y = x W^T + b with what follows it: activation, residual, rounding.
 *
 * Each output is one chain of additions over the inputs in order, in one lane of one
 * register, whatever else is computed beside it. So a row's bits depend neither on how many
 * rows there are nor on how they are cut into tiles or given to threads: what deterministic
 * serving asks of a matrix product, for nothing.
 *
 * A tile is up to 6 rows by 4 units of 16 outputs: 24 AVX-512 registers of sums, 4 of weights. With
 * few rows the time is that of reading the weights, which lie in the order they are read;
 * with many, that of the multiplications.
 */
#include "kernels.h"
#include "vectors.h"


#if defined(__AVX512F__)
#define TILE_ROWS 6
#define TILE_UNITS 4
#else /* a vec is several registers, and there are fewer of them */
#define TILE_ROWS 3
#define TILE_UNITS 2
#endif
#define ROW_BLOCK_BYTES (512 * 1024) /* of x: stays in a core's cache while panels pass */
#define STRETCH 32 /* inputs between two looks ahead */

/* Weights that this thread is likely to want next, fetched from memory while it multiplies what is
 * in its cache: `lines` of them in each stretch of inputs. */
typedef struct {
    const char *at, *end;
    int64_t lines;
} Ahead;

INLINE void fetch(Ahead *ahead) {
    for (int64_t i = 0; i < ahead->lines && ahead->at < ahead->end; i++, ahead->at += LINE)
        __builtin_prefetch(ahead->at, 0, 2); /* into the second level of cache */
}

/* sum + x0 w0 + x1 w1 for pairs of bfloat16, low half first */
INLINE vec add_pairs(vec sum, uint32_t x, uvec w) {
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)w);
#else
    sum += splat(from_bf16((uint16_t)x)) * (vec)(w << 16);
    return sum + splat(from_bf16((uint16_t)(x >> 16))) * (vec)(w & 0xffff0000u);
#endif
}

#if defined(__AVX512BF16__)
#define HAS_INT8_TILES 1
/* 16 pairs of int8 as bfloat16, exactly: what `dequantise` does, without the way over memory */
INLINE uvec load_pairs_int8(const int8_t *w) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)w)));
    const __m512 high =
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(w + LANES))));
    return (uvec)_mm512_cvtne2ps_pbh(high, low);
}
#else
#define HAS_INT8_TILES 0
INLINE uvec load_pairs_int8(const int8_t *w) { /* never called */
    (void)w;
    return (uvec){0};
}
#endif

#define UNROLL _Pragma("GCC unroll 8")

/* rows, units and kind (of the weights) are compile-time numbers. The arrays have fixed sizes, not
 * these: an array sized by a parameter would live in memory, not in registers. */
INLINE void tile(const int rows, const int units, const int kind, const void *x, int64_t x_stride,
                 const void *w, int64_t size, Ahead *ahead, vec sums[TILE_ROWS][TILE_UNITS]) {
    vec sum[TILE_ROWS][TILE_UNITS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int u = 0; u < units; u++) sum[r][u] = splat(0);
    for (int64_t begin = 0; begin < size; begin += STRETCH) {
        const int64_t end = begin + STRETCH < size ? begin + STRETCH : size;
        fetch(ahead);
        if (kind != FLOAT32)
            for (int64_t k = begin; k < end; k += 2) {
                uvec weight[TILE_UNITS];
                UNROLL for (int u = 0; u < units; u++) {
                    const int64_t at = u * size * LANES + k * LANES;
                    if (kind == INT8) weight[u] = load_pairs_int8((const int8_t *)w + at);
                    else memcpy(&weight[u], (const uint16_t *)w + at, 64);
                }
                UNROLL for (int r = 0; r < rows; r++) {
                    uint32_t pair;
                    memcpy(&pair, (const uint16_t *)x + r * x_stride + k, 4);
                    UNROLL for (int u = 0; u < units; u++)
                        sum[r][u] = add_pairs(sum[r][u], pair, weight[u]);
                }
            }
        else
            for (int64_t k = begin; k < end; k++) {
                vec weight[TILE_UNITS];
                UNROLL for (int u = 0; u < units; u++)
                    weight[u] = load(w, u * size * LANES + k * LANES, 0);
                UNROLL for (int r = 0; r < rows; r++) {
                    const vec value = splat(((const float *)x)[r * x_stride + k]);
                    UNROLL for (int u = 0; u < units; u++) sum[r][u] += value * weight[u];
                }
            }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int u = 0; u < units; u++) sums[r][u] = sum[r][u];
}

#define CASE(ROWS, UNITS)                                                                    \
    case ROWS * 8 + UNITS:                                                                   \
        if (kind == FLOAT32) tile(ROWS, UNITS, FLOAT32, x, x_stride, w, size, ahead, sums);  \
        else if (kind == BFLOAT16)                                                           \
            tile(ROWS, UNITS, BFLOAT16, x, x_stride, w, size, ahead, sums);                  \
        else tile(ROWS, UNITS, INT8, x, x_stride, w, size, ahead, sums);                     \
        return
#if TILE_ROWS == 6
#define CASES(UNITS)                                                                         \
    CASE(1, UNITS); CASE(2, UNITS); CASE(3, UNITS); CASE(4, UNITS); CASE(5, UNITS); CASE(6, UNITS)
#else
#define CASES(UNITS) CASE(1, UNITS); CASE(2, UNITS); CASE(3, UNITS)
#endif

static void run_tile(int64_t rows, int64_t units, int64_t kind, const void *x, int64_t x_stride,
                     const void *w, int64_t size, Ahead *ahead,
                     vec sums[TILE_ROWS][TILE_UNITS]) {
    switch (rows * 8 + units) {
        CASES(1);
        CASES(2);
#if TILE_UNITS == 4
        CASES(4);
#endif
    }
}

/* One unit of one row on its way out. */
INLINE void finish(const Linear *l, const Output *o, int64_t row, int64_t unit, vec v) {
    const int64_t at = unit * LANES;
    if (at + LANES <= l->out_features) {
        if (l->scale) v *= load(l->scale, at, 0);
        if (l->bias) v += load(l->bias, at, 0);
        if (o->activation == GELU_TANH) v = gelu_tanh(v);
        else if (o->activation == GELU) v = gelu(v);
        if (o->residual)
            v += load(o->residual, row * l->out_features + at, (int)o->is_bf16);
        store(o->out, row * l->out_features + at, v, (int)o->is_bf16);
        return;
    }
    for (int64_t i = 0; at + i < l->out_features; i++) { /* the head's last unit: float32, bare */
        const float scaled = l->scale ? v[i] * l->scale[at + i] : v[i];
        ((float *)o->out)[row * l->out_features + at + i] =
            l->bias ? scaled + l->bias[at + i] : scaled;
    }
}

/* A unit of the gate and the unit of what it gates. */
INLINE void finish_gated(const Linear *l, const Output *o, int64_t row, int64_t unit, vec gate,
                         vec up) {
    const int64_t at = unit * LANES;
    if (l->scale) gate *= load(l->scale, at, 0), up *= load(l->scale, at + LANES, 0);
    if (l->bias) gate += load(l->bias, at, 0), up += load(l->bias, at + LANES, 0);
    store(o->out, (row * l->out_features + at) / 2, silu(gate) * up, (int)o->is_bf16);
}

/* int8 -> bfloat16, exactly; the scale comes after the product. */
static void dequantise(const int8_t *w, int64_t count, uint16_t *out) {
#if HAS_INT8_TILES
    for (int64_t i = 0; i < count; i += 2 * LANES) {
        const uvec pairs = load_pairs_int8(w + i);
        memcpy(out + i, &pairs, sizeof pairs);
    }
#else
    for (int64_t i = 0; i < count; i += LANES) {
        typedef int8_t bvec __attribute__((vector_size(16), aligned(1)));
        bvec b;
        memcpy(&b, w + i, sizeof b);
        uvec bits = (uvec)__builtin_convertvector(__builtin_convertvector(b, ivec), vec);
        hvec h = narrow(bits >> 16); /* 8 bits of mantissa: exact */
        memcpy(out + i, &h, sizeof h);
    }
#endif
}

/* What will be added to a tile, fetched from where other threads left it while the tile is
 * multiplied. */
static void fetch_residual(const Linear *l, const Output *o, int64_t row, int64_t rows,
                           int64_t unit, int64_t units) {
    const int64_t width = o->is_bf16 ? 2 : 4;
    for (int64_t r = row; r < row + rows; r++) {
        const char *at = (const char *)o->residual + (r * l->out_features + unit * LANES) * width;
        for (int64_t i = 0; i < units * LANES * width; i += LINE) __builtin_prefetch(at + i, 1, 2);
    }
}

/* `units` units from `unit` on, for rows [begin, end); w and kind are those of their weights. The
 * first tile waits for them; the others find them in the cache, and fetch what comes next. */
static void panel(const Linear *l, const void *x, const Output *o, int64_t unit, int64_t units,
                  const void *w, int64_t kind, int64_t begin, int64_t end, Ahead ahead) {
    const int64_t size = l->in_features, width = kind == FLOAT32 ? 4 : 2;
    int64_t tiles = (end - begin + TILE_ROWS - 1) / TILE_ROWS;
    /* With fewer tiles there is too little to hide it behind: measured, 7 percent slower at 8 rows. */
    const int64_t stretches = tiles < 4 ? 0 : (tiles - 1) * ((size + STRETCH - 1) / STRETCH);
    const int64_t lines = stretches ? ((ahead.end - ahead.at) / LINE + stretches - 1) / stretches : 0;
    for (int64_t row = begin; row < end; tiles--) {
        const int64_t rows = (end - row + tiles - 1) / tiles; /* 8 rows are 4 and 4, not 6 and 2 */
        vec sums[TILE_ROWS][TILE_UNITS];
        ahead.lines = row > begin ? lines : 0;
        if (o->residual) fetch_residual(l, o, row, rows, unit, units);
        run_tile(rows, units, kind, (const char *)x + row * size * width, size, w, size, &ahead,
                 sums);
        for (int64_t r = 0; r < rows; r++) {
            if (o->activation == SWIGLU)
                for (int64_t u = 0; u < units; u += 2)
                    finish_gated(l, o, row + r, unit + u, sums[r][u], sums[r][u + 1]);
            else
                for (int64_t u = 0; u < units; u++) finish(l, o, row + r, unit + u, sums[r][u]);
        }
        row += rows;
    }
}

void linear(Member *me, const Linear *l, const void *x, int64_t rows, int64_t x_is_bf16,
            const Output *o, void *panels) {
    const int64_t size = l->in_features, units = (l->out_features + LANES - 1) / LANES;
    const int64_t width = x_is_bf16 ? 2 : 4;
    const int64_t weight_width = l->kind == INT8 ? 1 : width;
    int64_t row_block = ROW_BLOCK_BYTES / (size * width) / TILE_ROWS * TILE_ROWS;
    if (row_block < 8 * TILE_ROWS) row_block = 8 * TILE_ROWS;
    /* small products in smaller pieces, so that all threads have their share */
    const int64_t piece = units >= 8 * me->size ? 4 : 2;
    const int64_t pieces = (units + piece - 1) / piece;
    const int64_t items = pieces * ((rows + row_block - 1) / row_block);
    for (int64_t item = take(me, items, 1); item < items; item = take(me, items, 1)) {
        const int64_t begin = item / pieces * row_block, first = item % pieces * piece;
        const int64_t end = begin + row_block < rows ? begin + row_block : rows;
        const int64_t last = first + piece < units ? first + piece : units;
        /* The item that this thread takes next, if the others are as fast. */
        const int64_t next_item = item + me->size;
        const int64_t unit_bytes = size * LANES * weight_width;
        for (int64_t unit = first; unit < last;) {
            const int64_t left = last - unit < TILE_UNITS ? last - unit : TILE_UNITS;
            const int64_t count = left == 3 ? 2 : left;
            const char *w = (const char *)l->weight + unit * unit_bytes;
            int64_t kind = l->kind;
            Ahead ahead = {NULL, NULL, 0};
            if (unit + count < last || next_item < items) {
                const int64_t next = unit + count < last ? unit + count : next_item % pieces * piece;
                const int64_t next_end = next + TILE_UNITS < units ? next + TILE_UNITS : units;
                ahead.at = (const char *)l->weight + next * unit_bytes;
                ahead.end = (const char *)l->weight + next_end * unit_bytes;
            }
            if (kind == INT8 && (end - begin > 2 * TILE_ROWS || !HAS_INT8_TILES)) {
                /* once for all tiles of rows */
                uint16_t *wide = (uint16_t *)panels + me->rank * size * 4 * LANES;
                dequantise((const int8_t *)w, count * size * LANES, wide);
                w = (const char *)wide;
                kind = BFLOAT16;
            }
            panel(l, x, o, unit, count, w, kind, begin, end, ahead);
            unit += count;
        }
    }
    meet(me, items);
}

typedef struct {
    const Linear *weights;
    const void *x;
    int64_t rows, x_is_bf16;
    const Output *output;
    void *panels;
} Product;

static void product(Member *me, const void *task) {
    const Product *p = task;
    linear(me, p->weights, p->x, p->rows, p->x_is_bf16, p->output, p->panels);
}

/* One product alone, as float32: for what explains an answer with the weights that made it. */
void vitrine_product(const Linear *l, const void *x, int64_t rows, int64_t x_is_bf16, float *out,
                     void *panels, int64_t num_threads) {
    const Output output = {out, NULL, NO_ACTIVATION, 0};
    const Product task = {l, x, rows, x_is_bf16, &output, panels};
    work_together(num_threads, product, &task);
}
