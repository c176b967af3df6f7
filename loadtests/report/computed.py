"""The arithmetic of the roof: what a model needs, and the least time a device could need for it.

No implementation can be faster than this: every weight is read once a step, every key and value a
query sees once, every product done once, and reading and computing overlap perfectly. Nothing is
counted for activations, launches or the host.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

import torch

from loadtests.report.records import Roof
from model.families import read_config
from model.inspection import inspect
from service.engine.traffic import Traffic, traffic_of

BYTES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def needs_of(config: Mapping[str, object], dtype: str) -> Traffic:
    """What a step of an architecture (its config.json) must read and compute."""
    return _needs(json.dumps(config), dtype)


def parameters_of(config: Mapping[str, object]) -> int:
    """Parameters, shared ones once."""
    return _parameters(json.dumps(config))


# Counting builds the modules without memory for them: a tenth of a second for many layers.
@cache
def _needs(config: str, dtype: str) -> Traffic:
    return traffic_of(read_config(json.loads(config)), BYTES[dtype])


@cache
def _parameters(config: str) -> int:
    return inspect(read_config(json.loads(config))).num_parameters


def decode_step_s(needs: Traffic, roof: Roof, batch: int, context: int) -> float:
    """Least seconds of a step that gives each of `batch` sequences a token."""
    return roof.least_s(*needs.decode([context] * batch))


def decode_tokens_per_s(needs: Traffic, roof: Roof, batch: int, context: int) -> float:
    """Most tokens/s of such steps."""
    return batch / decode_step_s(needs, roof, batch, context)


def decode_intensity(needs: Traffic, batch: int, context: int) -> float:
    """Operations for each byte read."""
    num_bytes, flops = needs.decode([context] * batch)
    return flops / num_bytes


def prefill(needs: Traffic, prompt_len: int, batch: int = 1) -> tuple[float, float]:
    """(bytes, operations) of `batch` prompts in one step: the weights once, each prompt's keys and
    values once."""
    num_bytes = needs.weight_bytes + batch * prompt_len * needs.kv_bytes_per_token
    return num_bytes, batch * needs.prefill_flops(0, prompt_len)


def prefill_intensity(needs: Traffic, prompt_len: int, batch: int = 1) -> float:
    """Operations for each byte read or written."""
    num_bytes, flops = prefill(needs, prompt_len, batch)
    return flops / num_bytes


def served_tokens_per_s(
    needs: Traffic, roof: Roof, users: int, prompt_len: int, output_len: int
) -> float:
    """Most output tokens/s for `users` who send one request after the other: each computes its
    prompt and then shares `output_len` steps with the others."""
    prompts_s = users * roof.least_s(*prefill(needs, prompt_len))
    step_s = decode_step_s(needs, roof, users, prompt_len + output_len // 2)
    return users * output_len / (prompts_s + output_len * step_s)


def ridge(roof: Roof) -> float:
    """Operations a byte from which on a device computes as fast as it can."""
    return roof.flops_per_s / roof.read_bytes_per_s


def sequences_that_fit(needs: Traffic, memory_bytes: float, context: int) -> int:
    """Whose keys and values fit beside the weights."""
    left = memory_bytes - needs.weight_bytes
    return max(0, int(left / (needs.kv_bytes_per_token * context)))


def cost_per_million(dollars_per_hour: float, tokens_per_s: float) -> float:
    """Dollars for a million tokens on a device that does nothing else."""
    return dollars_per_hour / 3600 / tokens_per_s * 1e6


def energy_per_million_kwh(watts: float, tokens_per_s: float) -> float:
    """Kilowatt hours for a million tokens."""
    return watts / tokens_per_s * 1e6 / 3.6e6
