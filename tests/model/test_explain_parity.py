"""Recorded attention is what transformers computes, in every family and shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.checkpoint import load_checkpoint
from tests.model.explaining import recorded
from tests.model.parity import BOUND, CASES, Case, make_oracle, prompt

NUM_TOKENS = 130  # beyond every window of CASES but one, and no multiple of a piece of work


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.inference_mode()
def test_attention_residuals_and_logits_equal(case: Case, tmp_path: Path) -> None:
    oracle = make_oracle(case, tmp_path)
    ids = prompt(NUM_TOKENS)
    theirs = oracle.model(
        torch.tensor([ids]), output_attentions=True, output_hidden_states=True, use_cache=False
    )
    ours = recorded(load_checkpoint(tmp_path).model, ids)
    attention = torch.cat(theirs.attentions)
    assert ours.attention.shape == attention.shape
    assert (ours.attention - attention).abs().max() <= BOUND
    assert (ours.attention.sum(dim=-1) - 1).abs().max() <= 1e-5
    assert (ours.logits - theirs.logits[0]).abs().max() <= BOUND
    # Their last hidden state has gone through the final norm already.
    residuals = torch.cat(theirs.hidden_states[:-1])
    assert (ours.residuals[:-1] - residuals).abs().max() <= BOUND
