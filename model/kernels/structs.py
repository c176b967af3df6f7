"""The structs of model/kernels/kernels.h, field by field."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int64, c_void_p
from typing import ClassVar

Heartbeat = ctypes.CFUNCTYPE(None)
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
ACTIVATIONS = {"none": 0, "gelu": 1, "gelu_tanh": 2, "swiglu": 3}


class Linear(Structure):
    """A packed product."""

    _fields_: ClassVar = [
        ("in_features", c_int64),
        ("out_features", c_int64),
        ("kind", c_int64),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
    ]


class Norm(Structure):
    """LayerNorm with a bias, RMSNorm without."""

    _fields_: ClassVar = [("weight", c_void_p), ("bias", c_void_p)]


class Layer(Structure):
    """One block of the transformer and its part of the cache."""

    _fields_: ClassVar = [
        ("attention_norm", Norm),
        ("mlp_norm", Norm),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", Linear),
        ("out", Linear),
        ("up", Linear),
        ("down", Linear),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
    ]


class Model(Structure):
    """What does not change between steps."""

    _fields_: ClassVar = [
        ("num_layers", c_int64),
        ("hidden_size", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_size", c_int64),
        ("is_bf16", c_int64),
        ("activation", c_int64),
        ("norm_eps", c_float),
        ("scale", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("layers", POINTER(Layer)),
        ("final_norm", Norm),
        ("lm_head", Linear),
    ]


class Watch(Structure):
    """Sequences whose last query's attention weights are kept."""

    _fields_: ClassVar = [
        ("stride", c_int64),
        ("num_rows", c_int64),
        ("seqs", c_void_p),
        ("rows", c_void_p),
        ("sums", c_void_p),
        ("chosen_start", c_void_p),
        ("chosen", c_void_p),
        ("chosen_weights", c_void_p),
        ("scores", c_void_p),
        ("num_places", c_int64),
        ("num_tokens", c_int64),
        ("places", c_void_p),
        ("weights", c_void_p),
        ("tokens", c_void_p),
        ("logprobs", c_void_p),
    ]


class Step(Structure):
    """One forward."""

    _fields_: ClassVar = [
        ("num_threads", c_int64),
        ("num_tokens", c_int64),
        ("max_blocks", c_int64),
        ("num_jobs", c_int64),
        ("num_last_jobs", c_int64),
        ("num_logits", c_int64),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("jobs", c_void_p),
        ("last_jobs", c_void_p),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("tables", c_void_p),
        ("logits_rows", c_void_p),
        ("hidden", c_void_p),
        ("normed", c_void_p),
        ("qkv", c_void_p),
        ("mixed", c_void_p),
        ("gated", c_void_p),
        ("panels", c_void_p),
        ("logits", c_void_p),
        ("watch", POINTER(Watch)),
        ("heartbeat", Heartbeat),
    ]


FORWARD_ARGUMENTS = (ctypes.POINTER(Model), ctypes.POINTER(Step))
# weights, x, rows, x_is_bf16, out, panels, threads
PRODUCT_ARGUMENTS = (
    ctypes.POINTER(Linear),
    c_void_p,
    c_int64,
    c_int64,
    c_void_p,
    c_void_p,
    c_int64,
)
