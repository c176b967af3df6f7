/* Where some sequences' newest queries looked: softmax(q K^T / sqrt(d)) again, after a step, over
 * the pages that the step has just read, for the few rows that somebody watches.
 *
 * The step itself only keeps those rows' queries (attention.c), so that the other rows pay
 * nothing. The PyTorch twin is model/explain/attended.py. Every (row, layer) is summed by one
 * thread and the layers are added in order: the weights do not depend on how many threads there
 * are, nor on which other rows are watched.
 */
#include "kernels.h"
#include "vectors.h"

#include <math.h>
#include <omp.h>
#include <string.h>

#define BLOCK_MAX (MAX_BLOCK / LANES)

/* The weights of keys 0 .. limit - 1 for one query, already scaled; keys before `first` are not
 * seen. Weights up to the end of the last key's block are written, those beyond with 0. */
INLINE void weigh(const int block_lanes, const int is_bf16, const Model *m, const void *keys,
                  int64_t head, const int64_t *table, const float *q, int64_t first, int64_t limit,
                  float *weights) {
    const int64_t d = m->head_dim, size = m->block_size, begin = first / size;
    const int nb = block_lanes ? block_lanes : (int)(size / LANES);
    vec lane, top = splat(-INFINITY), sum = splat(0);
    for (int i = 0; i < LANES; i++) lane[i] = (float)i;
    memset(weights, 0, (size_t)(begin * size) * sizeof *weights);
    for (int64_t tile = begin; tile * size < limit; tile++) {
        const int64_t page = (table[tile] * m->num_kv_heads + head) * d * size;
        vec score[BLOCK_MAX], odd[BLOCK_MAX]; /* even and odd dimensions: two chains of sums */
        for (int b = 0; b < nb; b++) score[b] = splat(0), odd[b] = splat(0);
        for (int64_t i = 0; i < d; i += 2)
            for (int b = 0; b < nb; b++) {
                score[b] += q[i] * load(keys, page + i * size + b * LANES, is_bf16);
                odd[b] += q[i + 1] * load(keys, page + (i + 1) * size + b * LANES, is_bf16);
            }
        for (int b = 0; b < nb; b++) {
            const vec position = lane + splat((float)(tile * size + b * LANES));
            const ivec hidden = (position >= splat((float)limit)) | (position < splat((float)first));
            const vec seen = choose(hidden, splat(-INFINITY), score[b] + odd[b]);
            top = choose(seen > top, seen, top);
            store(weights, tile * size + b * LANES, seen, 0);
        }
    }
    const vec highest = splat(max_lane(top));
    const int64_t end = (limit + size - 1) / size * size;
    for (int64_t j = begin * size; j < end; j += LANES) {
        const vec power = exp_vec(load(weights, j, 0) - highest);
        sum += power;
        store(weights, j, power, 0);
    }
    const vec share = splat(1.0f / sum_lanes(sum));
    for (int64_t j = begin * size; j < end; j += LANES)
        store(weights, j, load(weights, j, 0) * share, 0);
}

static __attribute__((noinline)) void weigh_keys(const Model *m, const void *keys, int64_t head,
                                                 const int64_t *table, const float *q,
                                                 int64_t first, int64_t limit, float *weights) {
#define CASE(NB, BF16) weigh(NB, BF16, m, keys, head, table, q, first, limit, weights)
    if (m->block_size == 2 * LANES) {
        if (m->is_bf16) CASE(2, 1);
        else CASE(2, 0);
    } else if (m->is_bf16) CASE(0, 1);
    else CASE(0, 0);
#undef CASE
}

/* One layer of one watched row: the sum of its heads' weights, and the weights of chosen heads. */
static void attend_layer(const Model *m, const Watch *w, int64_t row, int64_t layer,
                         float *weights) {
    const Layer *l = &m->layers[layer];
    const int64_t limit = w->contexts[row], heads = m->num_heads;
    const int64_t first = l->window && limit > l->window ? limit - l->window : 0;
    const float *q = w->queries + (row * m->num_layers + layer) * heads * m->head_dim;
    float *sum = w->partial + (row * m->num_layers + layer) * w->stride;
    memset(sum, 0, (size_t)w->stride * sizeof *sum);
    for (int64_t head = 0; head < heads; head++) {
        weigh_keys(m, l->keys, head / (heads / m->num_kv_heads), w->tables + row * w->max_blocks,
                   q + head * m->head_dim, first, limit, weights);
        for (int64_t j = 0; j < limit; j += LANES)
            store(sum, j, load(sum, j, 0) + load(weights, j, 0), 0);
        for (int64_t i = 0; i < w->num_chosen; i++) {
            const int64_t *chosen = w->chosen + i * 3;
            if (chosen[0] == row && chosen[1] == layer && chosen[2] == head)
                memcpy(w->heads + i * w->stride, weights, (size_t)limit * sizeof *weights);
        }
    }
}

void vitrine_attended(const Model *m, const Watch *w) {
    const int64_t layers = m->num_layers;
#pragma omp parallel num_threads((int)w->num_threads)
    {
        float *weights = w->weights + omp_get_thread_num() * w->stride;
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < w->num_rows * layers; item++)
            attend_layer(m, w, item / layers, item % layers, weights);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < w->num_rows; row++)
            for (int64_t j = 0; j < w->stride; j += LANES) {
                vec sum = splat(0);
                for (int64_t layer = 0; layer < layers; layer++)
                    sum += load(w->partial, (row * layers + layer) * w->stride + j, 0);
                store(w->mean, row * w->stride + j,
                      sum / splat((float)(layers * m->num_heads)), 0);
            }
    }
}
