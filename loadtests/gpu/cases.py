"""What is measured: shapes with random weights, token ids for prompts, no end of text.

The roofs are those of one H200 (4.8 TB/s and 989 TFLOP/s nominal, less what its memory gives in
practice); on another GPU they are only a scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Case:
    """`decode` counts the tokens of steps that only decode; `offline` output tokens from the
    first request to the last token; `prefill` prompt tokens over the same time. Lengths are
    uniform in (low, high)."""

    name: str
    shape: str
    kind: Literal["decode", "offline", "prefill"]
    num_requests: int
    prompt_len: tuple[int, int]
    output_len: tuple[int, int]
    roof: float
    goal: float
    stretch: float
    deterministic: bool = False
    limit_s: float = 60.0


CASES = (
    Case("llama-3.1-8b decode, batch 1, context 512", "llama-3.1-8b", "decode",
         1, (448, 448), (128, 128), 285, 230, 255),
    Case("qwen3-0.6b decode, batch 1, context 512", "qwen3-0.6b", "decode",
         1, (448, 448), (128, 128), 3436, 900, 1400),
    Case("qwen3-8b, 256 requests of 1,024 in and out", "qwen3-8b", "offline",
         256, (1024, 1024), (1024, 1024), 11123, 8500, 9500, limit_s=100),
    Case("qwen3-0.6b, 256 requests of 100-1,024 in and out", "qwen3-0.6b", "offline",
         256, (100, 1024), (100, 1024), 35985, 22000, 28000),
    Case("llama-2-7b decode, batch 32, context 1,024", "llama-2-7b", "decode",
         32, (960, 960), (128, 128), 4524, 3900, 4300),
    Case("gpt2 decode, batch 256, context 512", "gpt2", "decode",
         256, (448, 448), (128, 128), 210197, 120000, 170000),
    Case("llama-3.1-8b prefill, prompts of 1,024", "llama-3.1-8b", "prefill",
         64, (1024, 1024), (1, 1), 55500, 40000, 48000),
)  # fmt: skip
# What deterministic mode costs: these, once more.
DETERMINISTIC = tuple(
    replace(case, name=f"deterministic: {case.name}", deterministic=True, limit_s=45.0)
    for case in CASES
    if case.shape == "qwen3-0.6b"
)
# What transformers is given too: it takes one number of output tokens for all requests.
COMPARED = (
    Case("compared: qwen3-0.6b, 256 requests of 100-1,024 in, 200 out", "qwen3-0.6b", "offline",
         256, (100, 1024), (200, 200), 0, 0, 0, limit_s=45.0),
)  # fmt: skip


def tiny(case: Case) -> Case:
    """The same with a model and numbers that a CPU is done with in a second."""
    output = min(case.output_len[0], 4), min(case.output_len[1], 6)
    return replace(
        case,
        shape="stories15m",
        num_requests=min(case.num_requests, 3),
        prompt_len=(8, 12) if case.prompt_len[0] != case.prompt_len[1] else (10, 10),
        output_len=output,
        limit_s=60,
    )
