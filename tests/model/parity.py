"""Our logits against those of transformers, family by family, on tiny random checkpoints.

    python -m tests.model.parity

prints the largest absolute difference of any logit for every family, shape, forward and
prompt length, each computed whole, in chunks and token by token through the paged cache.
tests/model/test_parity.py holds the same figures under a bound.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from model import compiled
from model.backends.cpu import CpuBackend
from model.backends.cuda import CudaBackend
from model.backends.reference import ReferenceBackend
from model.batch import single_sequence
from model.checkpoint import Checkpoint, load_checkpoint
from model.compiled import CompiledForward
from model.config import ModelConfig
from model.forward import EagerForward, Forward
from model.fused import FusedForward
from model.kv_cache import KVCache
from model.transformer import Transformer

BOUND = 1e-4
PROMPT_LENGTHS = (1, 17, 200)
CHUNKS = {"whole": 10_000, "chunks of 48": 48, "token by token": 1}
NUM_GREEDY = 64
BLOCK_SIZE = 16
VOCAB_SIZE = 199
FORWARDS: dict[str, Callable[[Transformer, KVCache], Forward]] = {
    "reference": lambda model, cache: EagerForward(model, ReferenceBackend(model.config, cache)),
    "cpu-torch": lambda model, cache: EagerForward(model, CpuBackend(model.config, cache)),
    "cpu-compiled": lambda model, cache: CompiledForward(copy.deepcopy(model), cache),
}
# In Triton's interpreter some hundred times slower than the others: for a few prompts only.
FORWARDS["cuda"] = lambda model, cache: FusedForward(
    model, CudaBackend(model.config, cache, model.max_positions)
)


def forwards_for(config: ModelConfig) -> list[str]:
    """The forwards that can run a model: the compiled one takes sizes of 16, 32, ..."""
    cache = KVCache.allocate(config, num_blocks=1, block_size=BLOCK_SIZE, dtype=torch.float32)
    can_run_compiled = compiled.unsupported(config, cache) is None
    return [n for n in FORWARDS if n != "cuda" and (n != "cpu-compiled" or can_run_compiled)]


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint. `config` goes to the family's configuration class; `rewrite`
    replaces fields of the config.json that it saved (None removes one). `seed` draws the
    weights; a case has its own where the usual one makes greedy text repeat itself."""

    family: str
    shape: str
    config: dict[str, Any]
    rewrite: dict[str, Any] = field(default_factory=dict)
    max_shard_size: str = "1GB"
    seed: int = 7

    @property
    def name(self) -> str:
        return f"{self.family}: {self.shape}"


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
OLD_LINEAR = {
    "rope_parameters": None,
    "rope_theta": 7777.0,
    "rope_scaling": {"type": "linear", "factor": 2.5},
}

CASES = (
    Case("gpt2", "tied", {}),
    Case("gpt2", "exact GELU", {"activation_function": "gelu"}),
    Case(
        "gpt2",
        "untied, n_inner 100, exact GELU",
        {"tie_word_embeddings": False, "n_inner": 100, "activation_function": "gelu"},
    ),
    Case("gpt2", "3 shards, epsilon 1e-3", {"layer_norm_epsilon": 1e-3}, max_shard_size="120KB"),
    Case("llama", "multi-head, untied", {}),
    Case("llama", "grouped-query, head_dim 24", {"num_key_value_heads": 2, "head_dim": 24}),
    Case(
        "llama",
        "multi-query, tied, shards",
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        max_shard_size="60KB",
    ),
    Case("llama", "biases everywhere", {"attention_bias": True, "mlp_bias": True}),
    Case(
        "llama",
        "linear rope",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    Case(
        "llama",
        "linear rope, old form",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 7777.0, "factor": 2.5}},
        rewrite=OLD_LINEAR,
    ),
    Case("llama", "llama3 rope", {"rope_parameters": LLAMA3, "num_key_value_heads": 2}),
    Case("llama", "yarn rope", {"rope_parameters": YARN}),
    Case(
        "llama",
        "yarn rope, mscale, not truncated",
        {
            "rope_parameters": YARN
            | {"mscale": 0.8, "mscale_all_dim": 1.3, "truncate": False, "beta_fast": 16.0}
        },
    ),
    Case("mistral", "window 16", {"sliding_window": 16}),
    Case("mistral", "window 100, head_dim 8", {"sliding_window": 100, "head_dim": 8}),
    Case("mistral", "no window, 3 query heads a KV head", {"num_attention_heads": 6}),
    Case("qwen2", "qkv bias, multi-head", {"num_key_value_heads": 4}),
    Case(
        "qwen2",
        "tied, multi-query",
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        seed=9,
    ),
    Case(
        "qwen2",
        "window 24 in the last layer, yarn",
        {
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 2,
            "rope_parameters": YARN | {"attention_factor": 1.2},
        },
    ),
    Case("qwen3", "qk norm, head_dim 32", {"head_dim": 32}),
    Case("qwen3", "tied, head_dim 8, biases", {"head_dim": 8, "attention_bias": True}),
    Case(
        "qwen3",
        "window 32 in every other layer, shards",
        {
            "use_sliding_window": True,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        max_shard_size="60KB",
        seed=9,
    ),
)

_LLAMA_LIKE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 320,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE | {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": _LLAMA_LIKE | {"num_key_value_heads": 2},
    "qwen3": _LLAMA_LIKE | {"num_key_value_heads": 2},
}


@dataclass(frozen=True)
class Oracle:
    """A random model of transformers and the checkpoint it saved."""

    model: Any
    directory: Path

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """(num_tokens, vocab_size), float32."""
        logits: Tensor = self.model(torch.tensor([token_ids])).logits[0]
        return logits

    @torch.inference_mode()
    def greedy(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """The likeliest token again and again, through transformers' own cache."""
        chosen: list[int] = []
        inputs, cache = torch.tensor([token_ids]), None
        for _ in range(num_tokens):
            step = self.model(inputs, past_key_values=cache, use_cache=True)
            inputs, cache = step.logits[:, -1:].argmax(-1), step.past_key_values
            chosen.append(int(inputs))
        return chosen


def make_oracle(case: Case, directory: Path) -> Oracle:
    """Build, randomise and save the model of a case."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(
        case.family, attn_implementation="eager", **(DEFAULTS[case.family] | case.config)
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomise(model, case.seed)
    model.save_pretrained(directory, max_shard_size=case.max_shard_size)
    if case.rewrite:
        path = directory / "config.json"
        fields = json.loads(path.read_text()) | case.rewrite
        path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return Oracle(model, directory)


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that the logits spread: under the usual 0.02 every token is
    about as likely as any other, and two different models would look alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            is_norm_weight = name.endswith("weight")
            parameter.copy_(noise * 0.2 + (1.0 if is_norm_weight else 0.0))
        else:
            parameter.copy_(noise * 0.2)


class PagedRun:
    """One sequence through our model and a paged cache, whose blocks lie in disorder."""

    def __init__(self, checkpoint: Checkpoint, forward: str, max_tokens: int) -> None:
        num_blocks = -(-max_tokens // BLOCK_SIZE)
        cache = KVCache.allocate(
            checkpoint.config,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            by_token=forward == "cuda",
        )
        self._forward = FORWARDS[forward](checkpoint.model, cache)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(num_blocks))
        self._block_table = order.tolist()
        self._length = 0

    @torch.inference_mode()
    def feed(self, token_ids: list[int]) -> Tensor:
        """Logits of the next tokens of the sequence, (num_tokens, vocab_size)."""
        batch = single_sequence(
            token_ids, start=self._length, block_table=self._block_table, block_size=BLOCK_SIZE
        )
        self._length += len(token_ids)
        return self._forward(batch).clone()


def our_logits(checkpoint: Checkpoint, forward: str, token_ids: list[int], chunk: int) -> Tensor:
    """Every token's logits, `chunk` tokens a forward."""
    run = PagedRun(checkpoint, forward, len(token_ids))
    parts = [token_ids[i : i + chunk] for i in range(0, len(token_ids), chunk)]
    return torch.cat([run.feed(part) for part in parts])


def our_greedy(
    checkpoint: Checkpoint, forward: str, token_ids: list[int], num_tokens: int
) -> list[int]:
    """The likeliest token again and again."""
    run = PagedRun(checkpoint, forward, len(token_ids) + num_tokens)
    chosen: list[int] = []
    logits = run.feed(token_ids)
    while True:
        chosen.append(int(logits[-1].argmax()))
        if len(chosen) == num_tokens:
            return chosen
        logits = run.feed(chosen[-1:])


def prompt(length: int) -> list[int]:
    """Random token ids, the same for the same length."""
    generator = torch.Generator().manual_seed(length)
    ids: list[int] = torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()
    return ids


def differences(
    oracle: Oracle, checkpoint: Checkpoint, forward: str
) -> Iterator[tuple[int, str, float]]:
    """(prompt length, how it was fed, largest absolute difference of any logit)."""
    for length in PROMPT_LENGTHS:
        ids = prompt(length)
        theirs = oracle.logits(ids)
        for how, chunk in CHUNKS.items():
            ours = our_logits(checkpoint, forward, ids, chunk)
            yield length, how, float((ours - theirs).abs().max())


def table() -> Table:
    """Every case and forward, worst of the three ways to feed a prompt."""
    shown = Table(title="largest absolute difference from transformers' logits, float32")
    for heading in ("family", "shape", "forward"):
        shown.add_column(heading)
    for length in PROMPT_LENGTHS:
        shown.add_column(f"{length} tokens", justify="right")
    shown.add_column("logits within", justify="right")
    shown.add_column(f"{NUM_GREEDY} greedy tokens")
    for case in CASES:
        with tempfile.TemporaryDirectory() as directory:
            oracle = make_oracle(case, Path(directory))
            checkpoint = load_checkpoint(Path(directory))
            expected = oracle.greedy(prompt(17), NUM_GREEDY)
            largest = float(oracle.logits(prompt(200)).abs().max())
            for forward in forwards_for(checkpoint.config):
                worst = dict.fromkeys(PROMPT_LENGTHS, 0.0)
                for length, _, difference in differences(oracle, checkpoint, forward):
                    worst[length] = max(worst[length], difference)
                same = our_greedy(checkpoint, forward, prompt(17), NUM_GREEDY) == expected
                shown.add_row(
                    case.family,
                    case.shape,
                    forward,
                    *(f"{worst[length]:.1e}" for length in PROMPT_LENGTHS),
                    f"+-{largest:.1f}",
                    f"same, {len(set(expected))} distinct" if same else "DIFFERENT",
                )
    return shown


def main() -> None:
    """Print the parity table."""
    warnings.simplefilter("ignore")
    Console(width=None if sys.stdout.isatty() else 130).print(table())


if __name__ == "__main__":
    main()
