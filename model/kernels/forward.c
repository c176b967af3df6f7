/* One step of the whole model in one call of the team: embeddings in, logits out.
 *
 * model/transformer.py is the same in PyTorch, and what every test compares this with. The
 * threads meet after each stage, some 8 times a layer; they are not sent home in
 * between, which would cost tens of microseconds each time (loadtests/NOTES.md).
 */
#include "kernels.h"
#include "vectors.h"

#include <math.h>
#include <stddef.h>
#include <time.h>

#define HEARTBEAT_S 0.2 /* calling Python after each layer of a small model would cost too much */

/* Row i of out is the norm of row which[i] of x, or of row i; of rows `first` to `end`. */
static void norm_some(const Model *m, const Norm *norm, const void *x, const int64_t *which,
                      int64_t first, int64_t end, void *out) {
    const int64_t size = m->hidden_size;
    const int is_bf16 = (int)m->is_bf16;
    for (int64_t row = first; row < end; row++) {
        const int64_t from = (which ? which[row] : row) * size, to = row * size;
        vec sum = splat(0), squares = splat(0), mean = splat(0);
        if (norm->bias) {
            for (int64_t i = 0; i < size; i += LANES) sum += load(x, from + i, is_bf16);
            mean = splat(sum_lanes(sum) / (float)size);
        }
        for (int64_t i = 0; i < size; i += LANES) {
            const vec v = load(x, from + i, is_bf16) - mean;
            squares += v * v;
        }
        const vec share = splat(1.0f / sqrtf(sum_lanes(squares) / (float)size + m->norm_eps));
        for (int64_t i = 0; i < size; i += LANES) {
            vec v = (load(x, from + i, is_bf16) - mean) * share * load(norm->weight, i, 0);
            if (norm->bias) v += load(norm->bias, i, 0);
            store(out, to + i, v, is_bf16);
        }
    }
}

static void norm_rows(Member *me, const Model *m, const Norm *norm, const void *x,
                      const int64_t *which, int64_t rows, void *out) {
    const int64_t share = share_of(me, rows);
    for (int64_t first = take(me, rows, share); first < rows; first = take(me, rows, share))
        norm_some(m, norm, x, which, first, first + share < rows ? first + share : rows, out);
    meet(me, rows);
}

/* What the stages work on: all rows of the step, or the wanted ones side by side. */
typedef struct {
    int64_t count;
    void *hidden, *normed, *mixed;
    const int64_t *wanted; /* where the rows are whose logits are wanted; NULL: all in order */
} Rows;

static void copy_rows(const void *from, const int64_t *which, int64_t row, int64_t bytes,
                      void *to) {
    memcpy((char *)to + row * bytes, (const char *)from + which[row] * bytes, (size_t)bytes);
}

/* Behind the last layer's attention nobody reads a row whose logits nobody wants: of a prompt all
 * but one. The others move together, into buffers that are free by then. */
static void keep_wanted(Member *me, const Model *m, const Step *s, Rows *r) {
    if (s->num_logits >= s->num_tokens) return;
    const int64_t rows = s->num_logits, width = m->is_bf16 ? 2 : 4;
    const int64_t mixed_bytes = m->num_heads * m->head_dim * width;
    for (int64_t row = take(me, rows, 1); row < rows; row = take(me, rows, 1)) {
        copy_rows(s->mixed, s->logits_rows, row, mixed_bytes, s->qkv);
        copy_rows(s->hidden, s->logits_rows, row, m->hidden_size * width, s->normed);
    }
    meet(me, rows);
    *r = (Rows){rows, s->normed, s->hidden, s->qkv, NULL};
}

static void forward_layer(Member *me, const Model *m, const Layer *l, const Step *s, Rows *r) {
    const int is_last = l == m->layers + m->num_layers - 1;
    const int64_t is_bf16 = m->is_bf16;
    const Output qkv = {s->qkv, NULL, NO_ACTIVATION, is_bf16};
    const Output gated = {s->gated, NULL, m->activation, is_bf16};
    norm_rows(me, m, &l->attention_norm, r->hidden, NULL, r->count, r->normed);
    linear(me, &l->qkv, r->normed, r->count, is_bf16, &qkv, s->panels);
    if (is_last) {
        attention(me, m, l, s, s->last_jobs, s->num_last_jobs);
        keep_wanted(me, m, s, r);
    } else {
        attention(me, m, l, s, s->jobs, s->num_jobs);
    }
    const Output hidden = {r->hidden, r->hidden, NO_ACTIVATION, is_bf16};
    linear(me, &l->out, r->mixed, r->count, is_bf16, &hidden, s->panels);
    norm_rows(me, m, &l->mlp_norm, r->hidden, NULL, r->count, r->normed);
    linear(me, &l->up, r->normed, r->count, is_bf16, &gated, s->panels);
    linear(me, &l->down, s->gated, r->count, is_bf16, &hidden, s->panels);
}

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

typedef struct {
    const Model *model;
    const Step *step;
} Task;

static void forward(Member *me, const void *task) {
    const Model *m = ((const Task *)task)->model;
    const Step *s = ((const Task *)task)->step;
    Rows rows = {s->num_tokens, s->hidden, s->normed, s->mixed, s->logits_rows};
    double last = now_s();
    for (int64_t layer = 0; layer < m->num_layers; layer++) {
        forward_layer(me, m, &m->layers[layer], s, &rows);
        if (me->rank == 0 && s->heartbeat && now_s() - last > HEARTBEAT_S) {
            s->heartbeat();
            last = now_s();
        }
    }
    norm_rows(me, m, &m->final_norm, rows.hidden, rows.wanted, s->num_logits, rows.normed);
    const Output logits = {s->logits, NULL, NO_ACTIVATION, 0};
    linear(me, &m->lm_head, rows.normed, s->num_logits, m->is_bf16, &logits, s->panels);
    if (s->watch) glances(me, m, s);
}

void vitrine_forward(const Model *m, const Step *s) {
    const Task task = {m, s};
    work_together(s->num_threads, forward, &task);
}
