/* What the compiled forward is told: a model whose weights are packed, and one step of it.
 *
 * model/kernels/structs.py holds the same structs field by field. Small vectors (norms,
 * biases, scales) are float32; hidden states, keys and values are float32 or, with is_bf16,
 * bfloat16.
 */
#ifndef VITRINE_KERNELS_H
#define VITRINE_KERNELS_H

#include "team.h"

#include <stdint.h>

#define MAX_HEAD_DIM 256
#define MAX_BLOCK 128
#define SCORE_ROWS 4 /* queries whose scores a thread keeps at once */

enum { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
enum { NO_ACTIVATION = 0, GELU = 1, GELU_TANH = 2, SWIGLU = 3 };

/* y = x W^T + b. Packed: units of 16 outputs; within a unit, inputs in order (float32) or in
 * pairs (bfloat16, int8), the 16 outputs' values of each input or pair side by side:
 *   float32         (units, in_features, 16)
 *   bfloat16, int8  (units, in_features / 2, 16, 2)
 * The last unit is filled up with zeros. For SWIGLU units of the gate and units of what it
 * gates alternate. */
typedef struct {
    int64_t in_features, out_features, kind;
    const void *weight;
    const float *scale; /* INT8: what each output is multiplied with */
    const float *bias;  /* or NULL */
} Linear;

/* With a bias it is LayerNorm, without RMSNorm. */
typedef struct {
    const float *weight, *bias;
} Norm;

typedef struct {
    Norm attention_norm, mlp_norm;
    const float *query_norm, *key_norm; /* (head_dim) each, or NULL */
    Linear qkv, out, up, down;
    void *keys;   /* (num_blocks, num_kv_heads, head_dim, block_size): lanes are keys */
    void *values; /* (num_blocks, num_kv_heads, block_size, head_dim) */
    int64_t window; /* 0: none */
} Layer;

typedef struct {
    int64_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, block_size;
    int64_t is_bf16, activation;
    float norm_eps, scale;
    const float *cos, *sin; /* (max_positions, head_dim), or NULL: positions are not rotary */
    const Layer *layers;
    Norm final_norm;
    Linear lm_head;
} Model;

/* Sequences whose last query somebody watches. Weights go to rows `stride` apart: the longest
 * context of a watched sequence, rounded up to whole blocks. */
typedef struct {
    int64_t stride, num_rows;
    const int64_t *seqs;         /* (num_rows): the sequence of each row */
    const int64_t *rows;         /* (num_seqs): which row of sums; -1: not watched */
    float *sums;                 /* (rows, num_kv_heads, stride): of weights, over layers and heads */
    const int64_t *chosen_start; /* (rows + 1): where a row's chosen heads begin */
    const int64_t *chosen;       /* (num_chosen, 2): layer, head */
    float *chosen_weights;       /* (num_chosen, stride) */
    float *scores;               /* scratch, (num_threads, SCORE_ROWS, stride) */
    /* Found after the logits, largest first: where each row's mean is largest, and then each of
     * its chosen heads, (num_rows + num_chosen, num_places); and each row's likeliest next
     * tokens, (num_rows, num_tokens). -1 where there are no more, or no weight. */
    int64_t num_places, num_tokens;
    int32_t *places;
    float *weights;
    int32_t *tokens;
    float *logprobs;
} Watch;

typedef struct {
    int64_t num_threads, num_tokens, max_blocks, num_jobs, num_last_jobs, num_logits;
    const int64_t *positions, *slots;   /* (num_tokens) */
    const int64_t *jobs;                /* (num_jobs, 3): sequence, first row, queries */
    const int64_t *last_jobs;           /* likewise, of the last layer: queries that count */
    const int64_t *query_start;         /* (num_seqs + 1) */
    const int64_t *context_lens;        /* (num_seqs) */
    const int64_t *tables;              /* (num_seqs, max_blocks) */
    const int64_t *logits_rows;         /* (num_logits) */
    void *hidden;                       /* (num_tokens, hidden_size): embeddings in; overwritten */
    /* Scratch, (num_tokens, ...) each; in the end qkv and normed hold the wanted rows alone. */
    void *normed, *qkv, *mixed, *gated;
    void *panels;                       /* INT8: scratch, (num_threads, 64 max in_features) bf16 */
    float *logits;                      /* (num_logits, vocab_size) */
    const Watch *watch;                 /* or NULL */
    void (*heartbeat)(void);            /* called between layers now and then, or NULL */
} Step;

/* Where a product goes. */
typedef struct {
    void *out; /* (rows, out_features), half as wide for SWIGLU */
    const void *residual; /* added, in the same type and shape as out; or NULL */
    int64_t activation, is_bf16;
} Output;

/* Called by every member of the team; each ends when all are done. */
void linear(Member *me, const Linear *weights, const void *x, int64_t rows,
            int64_t x_is_bf16, const Output *output, void *panels);
void attention(Member *me, const Model *model, const Layer *layer, const Step *step,
               const int64_t *jobs, int64_t num_jobs);
void glances(Member *me, const Model *model, const Step *step);

#endif
