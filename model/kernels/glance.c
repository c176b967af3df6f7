/* What somebody who watches is told: of the few hundred weights and the thousands of logits of a
 * watched sequence the largest, so that a step leaves only those to Python.
 *
 * The PyTorch twin is `find` in model/explain/attended.py.
 */
#include "kernels.h"
#include "vectors.h"

#include <math.h>

/* LANES numbers from x[at] on; lanes past the end count for nothing. */
INLINE vec load_within(const float *x, int64_t at, int64_t width) {
    if (at + LANES <= width) return load(x, at, 0);
    vec v = splat(-INFINITY);
    for (int64_t i = 0; at + i < width; i++) v[i] = x[at + i];
    return v;
}

/* The `num` largest of x over `least`, largest first, of equals the first; -1 where there are no
 * more. */
static void largest(const float *x, int64_t width, float least, int64_t num, int32_t *places,
                    float *values) {
    for (int64_t n = 0; n < num; n++) {
        places[n] = -1;
        values[n] = least;
    }
    for (int64_t at = 0; at < width; at += LANES) {
        const vec v = load_within(x, at, width);
        if (!(max_lane(v) > values[num - 1])) continue; /* nearly always */
        for (int64_t i = 0; i < LANES; i++) {
            if (!(v[i] > values[num - 1])) continue;
            int64_t n = num - 1;
            for (; n > 0 && v[i] > values[n - 1]; n--) {
                places[n] = places[n - 1];
                values[n] = values[n - 1];
            }
            places[n] = (int32_t)(at + i);
            values[n] = v[i];
        }
    }
}

/* ln of the sum of e^x, the largest x being `top`. */
static float log_mass(const float *x, int64_t width, float top) {
    vec total = splat(0);
    for (int64_t at = 0; at < width; at += LANES)
        total += exp_vec(load_within(x, at, width) - splat(top));
    return top + logf(sum_lanes(total));
}

/* The mean over all layers and heads, from the sums of each KV head. */
static void mean_weights(const Model *m, const Watch *w, int64_t row, float *mean) {
    const vec share = splat(1.0f / (float)(m->num_layers * m->num_heads));
    const float *sums = w->sums + row * m->num_kv_heads * w->stride;
    for (int64_t at = 0; at < w->stride; at += LANES) {
        vec sum = splat(0);
        for (int64_t head = 0; head < m->num_kv_heads; head++)
            sum += load(sums, head * w->stride + at, 0);
        store(mean, at, sum * share, 0);
    }
}

static void likeliest(const Model *m, const Step *s, int64_t row) {
    const Watch *w = s->watch;
    const int64_t vocab = m->lm_head.out_features, last = s->query_start[w->seqs[row] + 1] - 1;
    int32_t *tokens = w->tokens + row * w->num_tokens;
    float *logprobs = w->logprobs + row * w->num_tokens;
    int64_t at = 0;
    while (at < s->num_logits && s->logits_rows[at] != last) at++;
    if (at == s->num_logits) { /* nothing is drawn after this query */
        for (int64_t n = 0; n < w->num_tokens; n++) tokens[n] = -1;
        return;
    }
    const float *logits = s->logits + at * vocab;
    largest(logits, vocab, -INFINITY, w->num_tokens, tokens, logprobs);
    const float mass = log_mass(logits, vocab, logprobs[0]);
    for (int64_t n = 0; n < w->num_tokens; n++) logprobs[n] -= mass;
}

void glances(Member *me, const Model *m, const Step *s) {
    const Watch *w = s->watch;
    const int64_t rows = w->num_rows;
    for (int64_t row = take(me, rows, 1); row < rows; row = take(me, rows, 1)) {
        float *mean = w->scores + me->rank * SCORE_ROWS * w->stride;
        mean_weights(m, w, row, mean);
        int64_t to = (w->chosen_start[row] + row) * w->num_places;
        largest(mean, w->stride, 0, w->num_places, w->places + to, w->weights + to);
        for (int64_t i = w->chosen_start[row]; i < w->chosen_start[row + 1]; i++) {
            to += w->num_places;
            largest(w->chosen_weights + i * w->stride, w->stride, 0, w->num_places,
                    w->places + to, w->weights + to);
        }
        likeliest(m, s, row);
    }
    meet(me, rows);
}
