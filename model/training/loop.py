"""Next-token prediction by cross-entropy and backpropagation.

State after every `save_every` steps lies in OUT/state.pt, so that an interrupted run goes
on where it was. The learning rate is a function of (step, total steps) alone: resuming
with another total only bends the rest of the curve.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor, nn

from model.backends.dense import DenseAttention
from model.config import ModelConfig
from model.training.data import encode_stories, epoch_windows, one_stream
from model.training.evaluate import evaluate
from model.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result, besides the data."""

    steps: int = 3900
    batch_tokens: int = 4096
    context: int = 512
    # Attention costs grow with the window, and most of what a small model learns early
    # needs no long one: the first part of the run uses short windows.
    short_context: int = 256
    short_share: float = 0.7
    peak_learning_rate: float = 2e-3
    final_learning_rate: float = 1e-4
    warmup_steps: int = 150
    weight_decay: float = 0.1
    beta2: float = 0.98
    gradient_clip: float = 1.0
    seed: int = 1


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to the final rate."""
    if step < recipe.warmup_steps:
        return recipe.peak_learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    span = recipe.peak_learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + span * cosine


def initialise(model: Transformer) -> None:
    """Normal(0, 0.02); the products that end a residual branch shrunk by
    1/sqrt(2 * num_layers), so that the sum of branches starts at unit scale (GPT-2)."""
    shrink = 1 / math.sqrt(2 * model.config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            ends_branch = name.endswith(("attention.out.weight", "mlp.down.weight"))
            nn.init.normal_(parameter, std=0.02 * (shrink if ends_branch else 1.0))


def make_optimizer(model: Transformer, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only (norms and biases keep their scale)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=recipe.peak_learning_rate, betas=(0.9, recipe.beta2), fused=True
    )


def batch_loss(model: Transformer, windows: Tensor) -> Tensor:
    """Mean cross-entropy of every next token of (batch, context + 1) windows, bf16 products."""
    batch_size, length = windows.shape[0], windows.shape[1] - 1
    positions = torch.arange(length).repeat(batch_size)
    with torch.autocast("cpu", torch.bfloat16):
        attend = DenseAttention(model.config, batch_size)
        hidden = model(windows[:, :-1].reshape(-1), positions, attend)
        logits = model.logits(hidden)
    return F.cross_entropy(logits, windows[:, 1:].reshape(-1))


class WindowSource:
    """An endless supply of batches; its state is the step it stands at and the epoch's rest."""

    def __init__(self, stream: Tensor, seed: int) -> None:
        self.stream = stream
        self.generator = torch.Generator().manual_seed(seed)
        self.windows = torch.empty(0, 0, dtype=torch.int64)
        self.taken = 0

    def next_batch(self, batch_size: int, context: int) -> Tensor:
        """(batch_size, context + 1) token ids; begins a new epoch when one is used up."""
        exhausted = self.taken + batch_size > self.windows.shape[0]
        if exhausted or self.windows.shape[1] != context + 1:
            self.windows = epoch_windows(self.stream, context, self.generator)
            self.taken = 0
        self.taken += batch_size
        return self.windows[self.taken - batch_size : self.taken]

    def state(self) -> dict[str, object]:
        return {
            "generator": self.generator.get_state(),
            "windows": self.windows.to(torch.int32),
            "taken": self.taken,
        }

    def restore(self, state: dict[str, object]) -> None:
        generator, windows, taken = state["generator"], state["windows"], state["taken"]
        if not (isinstance(generator, Tensor) and isinstance(windows, Tensor)):
            raise ValueError("state.pt holds no data-source state")
        self.generator.set_state(generator)
        self.windows, self.taken = windows.long(), int(str(taken))


def save_state(
    path: Path, step: int, model: Transformer, optimizer: torch.optim.Optimizer, data: WindowSource
) -> None:
    """Written beside and renamed, so that an interruption leaves the old state whole."""
    beside = path.with_suffix(".new")
    torch.save(
        {
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "data": data.state(),
        },
        beside,
    )
    beside.replace(path)


def train(
    config: ModelConfig,
    recipe: Recipe,
    tokenizer: Tokenizer,
    stories: list[str],
    held_out: list[str],
    out: Path,
    *,
    save_every: int = 200,
) -> Transformer:
    """Train, logging to OUT/log.jsonl; resumes from OUT/state.pt when there is one."""
    torch.manual_seed(recipe.seed)
    model = Transformer(config).train()
    initialise(model)
    optimizer = make_optimizer(model, recipe)
    data = WindowSource(one_stream(encode_stories(tokenizer, stories)), recipe.seed)
    start, state_path = 0, out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        data.restore(state["data"])
        start = state["step"]

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bars, (out / "log.jsonl").open("a") as log:
        task = bars.add_task("training", total=recipe.steps, completed=start)
        began = time.monotonic()
        for step in range(start, recipe.steps):
            is_short = step < recipe.short_share * recipe.steps
            context = recipe.short_context if is_short else recipe.context
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            loss = batch_loss(model, data.next_batch(recipe.batch_tokens // context, context))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            done = step + 1
            record: dict[str, float] = {"step": done, "loss": loss.item()}
            if done % save_every == 0 or done == recipe.steps:
                model.eval()
                result = evaluate(model, tokenizer, held_out, context=recipe.context)
                model.train()
                record |= {
                    "held_out_loss": result.loss,
                    "bits_per_byte": result.bits_per_byte,
                    "tokens_per_s": (done - start)
                    * recipe.batch_tokens
                    / (time.monotonic() - began),
                }
                save_state(state_path, done, model, optimizer, data)
                bars.console.print(
                    f"step {done}: held-out loss {result.loss:.4f}, perplexity "
                    f"{result.perplexity:.2f}, {result.bits_per_byte:.4f} bits per byte"
                )
            log.write(json.dumps(record) + "\n")
            log.flush()
            bars.update(task, completed=done, description=f"loss {record['loss']:.3f}")
    return model.eval()
