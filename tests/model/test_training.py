"""The script that made the bundled checkpoint, on a corpus of a few stories."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint import load_checkpoint
from model.config import ModelConfig
from model.training import loop
from model.training.data import END_OF_TEXT, epoch_windows, read_stories, train_tokenizer
from model.training.evaluate import evaluate
from model.training.export import draw_loss_curve, write_checkpoint
from model.training.loop import Recipe, learning_rate, train
from model.transformer import Transformer

STORIES = [
    f"Once upon a time, {name} had a {thing}. {name} liked the {thing} very much.\nThe end."
    for name in ("Tim", "Lily", "Max", "Sue")
    for thing in ("ball", "cat", "big red car", "kite")
]
RECIPE = Recipe(
    steps=60,
    batch_tokens=128,
    context=32,
    short_context=16,
    warmup_steps=5,
    short_share=0.5,
    peak_learning_rate=1e-2,
)


def small_config(vocab_size: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_positions=32,
        tie_embeddings=True,
        family="llama",
    )


def run(out: Path, recipe: Recipe, save_every: int) -> Transformer:
    out.mkdir(exist_ok=True)
    tokenizer = train_tokenizer(STORIES, 300)
    config = small_config(tokenizer.get_vocab_size())
    return train(config, recipe, tokenizer, STORIES, STORIES[:2], out, save_every=save_every)


def records(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_it_learns_and_the_checkpoint_it_writes_is_the_model(tmp_path: Path) -> None:
    model = run(tmp_path, RECIPE, save_every=30)
    log = records(tmp_path)
    assert log[0]["loss"] == pytest.approx(math.log(model.config.vocab_size), rel=0.1)
    assert log[-1]["held_out_loss"] < 0.5 * log[0]["loss"]

    tokenizer = train_tokenizer(STORIES, 300)
    write_checkpoint(model, tokenizer, tmp_path / "checkpoint")
    draw_loss_curve(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
    loaded = load_checkpoint(tmp_path / "checkpoint", dtype=torch.float32)
    assert loaded.eos_token_ids == (tokenizer.token_to_id(END_OF_TEXT),)
    for name, parameter in loaded.model.state_dict().items():
        assert torch.equal(parameter, model.state_dict()[name].bfloat16().float()), name
    before = evaluate(model, tokenizer, STORIES, context=32)
    after = evaluate(loaded.model, tokenizer, STORIES, context=32)
    assert after.loss == pytest.approx(before.loss, rel=0.02)


def test_an_interrupted_run_goes_on_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C two steps after a save: state holds weights, optimizer and place in the data."""
    recipe = replace(RECIPE, steps=24)
    whole = run(tmp_path / "whole", recipe, save_every=100)

    original, calls = loop.batch_loss, 0

    def interrupting(model: Transformer, windows: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise KeyboardInterrupt
        return original(model, windows)

    monkeypatch.setattr(loop, "batch_loss", interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "interrupted", recipe, save_every=8)
    monkeypatch.setattr(loop, "batch_loss", original)
    resumed = run(tmp_path / "interrupted", recipe, save_every=100)
    for name, parameter in resumed.state_dict().items():
        assert torch.equal(parameter, whole.state_dict()[name]), name


def test_the_learning_rate_warms_up_and_falls_to_its_end() -> None:
    recipe = Recipe(steps=100, warmup_steps=10, peak_learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(step, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_windows_cover_the_stream_and_targets_are_shifted_inputs() -> None:
    stream = torch.arange(100)
    windows = epoch_windows(stream, 9, torch.Generator().manual_seed(0))
    assert windows.shape[1] == 10
    for window in windows:
        assert torch.equal(window[1:], window[:-1] + 1)
    assert len(set(windows[:, 0].tolist())) == len(windows)


def test_bits_per_byte_of_a_model_that_knows_nothing_is_arithmetic() -> None:
    """Uniform predictions cost log2(vocabulary) bits a token, whatever the text."""
    tokenizer = train_tokenizer(STORIES, 300)
    vocab_size = tokenizer.get_vocab_size()
    model = Transformer(small_config(vocab_size)).eval()
    torch.nn.init.zeros_(model.embedding.weight)
    result = evaluate(model, tokenizer, STORIES, context=32)
    assert result.loss == pytest.approx(math.log(vocab_size), rel=1e-5)
    num_bytes = sum(len(story.encode()) for story in STORIES)
    expected = result.num_tokens * math.log2(vocab_size) / num_bytes
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-5)
    num_tokens = sum(len(tokenizer.encode(story).ids) + 1 for story in STORIES)
    assert result.num_tokens == num_tokens, "every token and every end of text is predicted once"


def test_stories_are_read_without_their_separators(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt.gz"
    path.write_bytes(
        gzip.compress("One.\nTwo.\n<|endoftext|>\nThree “é”.\n<|endoftext|>\n".encode())
    )
    assert read_stories(path) == ["One.\nTwo.", "Three “é”."]
