"""Recordings, ablations and what is read off them, against the plain ways to compute each."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import cpu
from model.attention import SelfAttention
from model.backends.reference import ReferenceBackend
from model.batch import single_sequence
from model.compiled import CompiledForward
from model.config import ModelConfig
from model.explain.record import ROWS, complete, continue_greedily, record
from model.explain.recording import NONE, Ablation, ExplainError
from model.explain.views import (
    candidates,
    effect,
    entropy,
    head_steps,
    lens,
    token_scores,
    top_attention,
)
from model.forward import EagerForward, Forward
from model.kv_cache import KVCache
from model.positions import RotaryPositions
from model.transformer import Transformer
from tests.engine.engines import TINY, TINY_COMPILED, TINY_GPT2, eager_forward, random_model
from tests.model.explaining import recorded

SHAPES = {
    "grouped-query, window 40, head_dim 20": TINY,
    "query/key norm, multi-query": TINY_COMPILED,
    "layer norm, biases, learned positions": TINY_GPT2,
    "sinusoidal": dataclasses.replace(TINY_GPT2, position="sinusoidal"),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def text(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(TINY.vocab_size, (num_tokens,), generator=generator).tolist()
    return ids


def calm_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Smaller weights: a difference in rounding does not grow from layer to layer."""
    model = random_model(config, seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(0.5)
    return model


def cache_for(config: ModelConfig, num_tokens: int, dtype: torch.dtype) -> KVCache:
    num_blocks = -(-num_tokens // 16)
    return KVCache.allocate(config, num_blocks=num_blocks, block_size=16, dtype=dtype)


def served_logits(forward: Forward, ids: list[int]) -> Tensor:
    table = list(range(-(-len(ids) // 16)))
    return forward(single_sequence(ids, block_table=table, block_size=16)).clone()


class MaskedAttention:
    """torch's own attention with an explicit mask."""

    def __init__(self, config: ModelConfig, num_tokens: int, edges: frozenset[tuple[int, int]]):
        self.config = config
        position = torch.arange(num_tokens)
        self.distance = position[:, None] - position
        self.kept = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
        for query, key in edges:
            self.kept[query, key] = False

    def visible(self, layer: int) -> Tensor:
        window = self.config.window(layer) or len(self.kept)
        return self.kept & (self.distance >= 0) & (self.distance < window)

    def __call__(
        self, attention: SelfAttention, qkv: Tensor, rotary: RotaryPositions | None
    ) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in attention.heads(qkv, rotary))
        mask = self.visible(attention.layer)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


@torch.inference_mode()
def masked_logits(model: Transformer, ids: list[int], edges: frozenset[tuple[int, int]]) -> Tensor:
    attend = MaskedAttention(model.config, len(ids), edges)
    return model.logits(model(torch.tensor(ids), torch.arange(len(ids)), attend))


@every_shape
@torch.inference_mode()
def test_equals_the_reference_backend(shape: ModelConfig) -> None:
    """In float32 both, and torch sums in another order on another processor: with weights twice as
    large the rounding of one layer grows in the next to more than 1e-6."""
    model, ids = calm_model(shape), text(75)
    weights: list[Tensor] = []
    cache = cache_for(shape, len(ids), torch.float32)
    logits = served_logits(EagerForward(model, ReferenceBackend(shape, cache, weights)), ids)
    ours = recorded(model, ids)
    assert (ours.attention - torch.stack(weights)).abs().max() <= 1e-6
    assert (ours.logits - logits).abs().max() <= 1e-5
    assert (ours.attention.sum(-1) - 1).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name, shape in SHAPES.items()
        for kind in ("float32", "bfloat16", "int8", "onednn")
        if kind == "onednn" or shape is not TINY  # compiled code takes no head_dim of 20
    ],
)
@torch.inference_mode()
def test_runs_on_the_weights_that_serve(name: str, kind: str) -> None:
    """A recording's logits are the engine's, to the tolerance of its type."""
    shape = SHAPES[name]
    dtype = torch.bfloat16 if kind in ("bfloat16", "int8") else torch.float32
    model, ids = calm_model(shape).to(dtype), text(50)
    cache = cache_for(shape, len(ids), dtype)
    forward: Forward
    if kind == "onednn":
        assert cpu.pack_weights(model) is None
        forward = eager_forward(model, cache)
    else:
        forward = CompiledForward(model, cache, int8=kind == "int8")
    served = served_logits(forward, ids)
    ours = recorded(model, ids)
    bound = (2e-5 if dtype == torch.float32 else 3e-2) * (1 + float(served.abs().max()))
    assert (ours.logits - served).abs().max() <= bound
    assert (ours.attention.sum(-1) - 1).abs().max() <= 1e-5


@every_shape
@given(
    num_tokens=st.integers(2, 2 * ROWS + 3),
    density=st.sampled_from([0.02, 0.3, 0.9]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_an_edge_ablation_is_a_mask(
    shape: ModelConfig, num_tokens: int, density: float, seed: int
) -> None:
    """Switched off is what an explicit mask hides, in every layer and head: what the model looks at
    and what it would say next are the same to 1e-6. That what is left of a difference is float32's
    rounding, the next test shows."""
    model, ids = calm_model(shape, seed), text(num_tokens, seed)
    edges = some_edges(num_tokens, density, seed)
    ours = recorded(model, ids, Ablation(edges=edges))
    for query, key in edges:
        assert (ours.attention[:, :, query, key] == 0).all()
    mask = MaskedAttention(shape, num_tokens, edges)
    for layer in range(shape.num_layers):
        queries, keys = (
            heads[layer].double().transpose(0, 1) for heads in (ours.queries, ours.keys)
        )
        keys = keys.repeat_interleave(shape.num_heads // shape.num_kv_heads, dim=0)
        scores = queries @ keys.transpose(1, 2) / math.sqrt(shape.head_dim)
        weights = scores.masked_fill(~mask.visible(layer), -math.inf).softmax(dim=-1)
        assert (ours.attention[layer] - weights).abs().max() <= 1e-6
    theirs = masked_logits(model, ids, edges)  # float32 as well: their rounding and ours
    assert (ours.logits.softmax(-1) - theirs.softmax(-1)).abs().max() <= 1e-6
    assert (ours.logits - theirs).abs().max() <= 5e-6 * (1 + float(theirs.abs().max()))


@every_shape
@pytest.mark.parametrize(("num_tokens", "density"), [(5, 0.3), (67, 0.02), (67, 0.9)])
def test_an_edge_ablation_is_a_mask_to_the_last_bits_of_float64(
    shape: ModelConfig, num_tokens: int, density: float
) -> None:
    """The same two ways in float64: nothing but rounding was between them. The masked way is
    another program (torch's own attention, all rows at once, no recording)."""
    model, ids = calm_model(shape).double(), text(num_tokens)
    edges = some_edges(num_tokens, density, seed=1)
    ours = recorded(model, ids, Ablation(edges=edges))
    theirs = masked_logits(model, ids, edges)
    assert (ours.logits.dtype, theirs.dtype) == (torch.float64, torch.float64)
    assert (ours.logits - theirs).abs().max() <= 1e-12
    assert (ours.logits - recorded(model, ids).logits).abs().max() > 1e-3, "nothing was cut"
    # float32 rounds an ablated run no more than a whole one.
    single = calm_model(shape)
    rounding = [
        (recorded(single, ids, cut).logits - recorded(model, ids, cut).logits).abs().max()
        for cut in (NONE, Ablation(edges=edges))
    ]
    assert rounding[1] <= 2 * rounding[0]


def some_edges(num_tokens: int, density: float, seed: int) -> frozenset[tuple[int, int]]:
    """At random; never from a token to itself: somebody must be left."""
    chosen = torch.rand(num_tokens, num_tokens, generator=torch.Generator().manual_seed(seed))
    return frozenset(
        (query, key)
        for query in range(num_tokens)
        for key in range(query)
        if chosen[query, key] < density
    )


@every_shape
@torch.inference_mode()
def test_a_head_ablation_is_a_projection_without_the_heads_columns(shape: ModelConfig) -> None:
    model, ids = random_model(shape), text(45)
    heads = frozenset({(0, 1), (1, 0), (1, 2)})
    ours = recorded(model, ids, Ablation(heads=heads))
    without = copy.deepcopy(model)
    for layer, head in heads:
        attention = without.blocks[layer].attention
        assert isinstance(attention, SelfAttention)
        columns = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
        attention.out.weight[:, columns] = 0
    theirs = recorded(without, ids)
    assert (ours.logits - theirs.logits).abs().max() <= 1e-6 * (1 + theirs.logits.abs().max())
    assert (ours.logits - recorded(model, ids).logits).abs().max() > 0.1, "nothing was switched off"
    # The head still looks; only its answer is not used.
    assert (ours.attention[0] - recorded(model, ids).attention[0]).abs().max() == 0


@pytest.mark.parametrize(
    ("ablation", "message"),
    [
        (Ablation(heads=frozenset({(3, 0)})), "no head 0 in layer 3: the model has 3 layers"),
        (Ablation(heads=frozenset({(0, 6)})), "no head 6 in layer 0"),
        (Ablation(edges=frozenset({(2, 3)})), "no edge from query 2 to key 3"),
        (Ablation(edges=frozenset({(60, 0)})), "these 60 tokens"),
        (Ablation(edges=frozenset({(0, 0)})), "leave query 0 no key that it sees"),
        (Ablation(edges=frozenset({(1, 0), (1, 1)})), "leave query 1 no key that it sees"),
        # Layer 1 sees 40 positions: of 0 .. 10 only the other layers do.
        (
            Ablation(edges=frozenset((50, key) for key in range(11, 51))),
            "leave query 50 no key that it sees in its window of 40",
        ),
    ],
)
def test_what_is_not_there_cannot_be_switched_off(ablation: Ablation, message: str) -> None:
    with pytest.raises(ExplainError, match=message):
        recorded(random_model(TINY), text(60), ablation)


def test_edges_up_to_the_last_key_may_go() -> None:
    """The self edge too, while another key is left."""
    edges = frozenset({(1, 1), (2, 0), (2, 2)})
    ours = recorded(random_model(TINY), text(3), Ablation(edges=edges))
    assert (ours.attention[:, :, 1, 0] == 1).all()
    assert (ours.attention[:, :, 2, 1] == 1).all()


@pytest.mark.parametrize("num_tokens", [0, 257])
def test_a_text_must_fit_the_positions(num_tokens: int) -> None:
    with pytest.raises(ExplainError, match=f"{num_tokens} tokens were given; between 1 and 256"):
        recorded(random_model(TINY), [1] * num_tokens)


def test_pieces_are_small_and_counted() -> None:
    pieces = list(record(random_model(TINY), torch.tensor(text(70))))
    assert [piece.done for piece in pieces] == list(range(1, 3 * 3 + 9 + 1))
    assert {piece.total for piece in pieces} == {18}


def test_only_what_is_wanted_is_kept() -> None:
    model, ids = random_model(TINY), torch.tensor(text(40))
    everything = recorded(model, ids.tolist())
    little = complete(record(model, ids, attention_layers=(2,), every_logit=False))
    assert (little.logits - everything.logits[-1:]).abs().max() <= 1e-5
    assert torch.equal(little.weights(2), everything.attention[2])
    with pytest.raises(ExplainError, match="attention of layer 0 was not kept"):
        little.weights(0)
    with pytest.raises(ExplainError, match="every position"):
        token_scores(little, range(1, 40))
    with pytest.raises(ExplainError, match=r"layers \[0, 3\] were asked for of 3"):
        complete(record(model, ids, attention_layers=(0, 3)))


def test_token_scores_are_log_probabilities_and_ranks() -> None:
    model, ids = random_model(TINY), text(20)
    recording = recorded(model, ids)
    scores = token_scores(recording, range(1, 15)) + token_scores(recording, range(15, 99))
    assert len(scores) == 19
    distribution = torch.log_softmax(recording.logits, dim=-1)
    for position, score in enumerate(scores, start=1):
        assert score.logprob == pytest.approx(float(distribution[position - 1, ids[position]]))
        order = recording.logits[position - 1].argsort(descending=True).tolist()
        assert order[score.rank - 1] == ids[position]
    with pytest.raises(ExplainError, match="token 0 was asked for"):
        token_scores(recording, range(3))


@torch.inference_mode()
def test_the_lens_of_the_last_layer_is_the_models_own_answer() -> None:
    model, ids = random_model(TINY), text(30)
    recording = recorded(model, ids)
    positions = list(range(0, 30, 3))
    seen = complete(lens(model, recording, positions, 7))
    assert len(seen) == TINY.num_layers + 1
    # and of another layer, what a model without the later layers would say
    shorter = copy.deepcopy(model)
    shorter.blocks = shorter.blocks[:2]
    own = masked_logits(shorter, ids, frozenset())
    for layer, logits in ((-1, recording.logits), (2, own)):
        for i, position in enumerate(positions):
            for ours, theirs in zip(seen[layer][i], candidates(logits[position], 7), strict=True):
                assert ours.token_id == theirs.token_id
                assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    with pytest.raises(ExplainError, match="position 30 was asked for; there are 30"):
        complete(lens(model, recording, [30], 7))


def test_top_attention_and_entropy() -> None:
    recording = recorded(random_model(TINY), text(20))
    weights = recording.weights(0)
    keys, strongest = top_attention(weights, 4)
    for head in range(TINY.num_heads):
        for query in range(20):
            row = weights[head, query].tolist()
            best = sorted(range(20), key=lambda key: -row[key])[:4]
            assert strongest[head, query].tolist() == [row[key] for key in best]
            assert [row[key] for key in keys[head, query]] == [row[key] for key in best]
    by_hand = [
        sum(-w * math.log(w) for row in head for w in row if w) / 20 for head in weights.tolist()
    ]
    assert entropy(weights).tolist() == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("edges", [frozenset(), frozenset({(49, 20), (49, 48)})])
def test_the_steps_of_a_head_are_the_equation_by_hand(edges: frozenset[tuple[int, int]]) -> None:
    recording = recorded(random_model(TINY), text(55), Ablation(edges=edges))
    for layer, head in ((0, 5), (1, 0)):  # layer 1 has a window of 40
        steps = head_steps(TINY, recording, layer=layer, head=head, query=49)
        assert steps.kv_head == head // 3
        assert len(steps.keys) == len(steps.values) == len(steps.weights) == 50
        scores = [sum(q * k for q, k in zip(steps.q, key, strict=True)) for key in steps.keys]
        assert steps.scores == pytest.approx(scores, abs=1e-4)
        assert steps.scaled == pytest.approx([s / math.sqrt(20) for s in scores], abs=1e-4)
        seen = [(49, key) not in edges and (layer == 0 or key > 9) for key in range(50)]
        assert steps.visible == seen
        powers = [
            math.exp(score) if ok else 0.0 for score, ok in zip(steps.scaled, seen, strict=True)
        ]
        weights = [power / sum(powers) for power in powers]
        assert steps.weights == pytest.approx(weights, abs=1e-5)
        row = recording.weights(layer)[head, 49, :50].tolist()
        assert steps.weights == pytest.approx(row, abs=1e-6)
        output = [
            sum(w * value[i] for w, value in zip(weights, steps.values, strict=True))
            for i in range(20)
        ]
        assert steps.output == pytest.approx(output, abs=1e-4)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"layer": 3}, "no head 0 in layer 3"),
        ({"head": 6}, "no head 6 in layer 0"),
        ({"query": 5}, "query 5 was asked for; there are 5"),
    ],
)
def test_steps_of_what_is_not_there(place: dict[str, int], message: str) -> None:
    recording = recorded(random_model(TINY), text(5))
    with pytest.raises(ExplainError, match=message):
        head_steps(TINY, recording, **({"layer": 0, "head": 0, "query": 0} | place))


def test_effect_is_the_divergence_and_the_largest_changes() -> None:
    before = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    after = torch.tensor([0.125, 0.25, 0.125, 0.5]).log()
    seen = effect(before, after, 2)
    assert seen.kl == pytest.approx(0.5 * math.log(4) + 0.125 * math.log(0.25))
    assert {change.token_id for change in seen.changes} == {0, 3}
    assert seen.changes[0].logprob != seen.changes[0].logprob_ablated
    assert effect(before, before, 2).kl == 0


@pytest.mark.parametrize("heads", [frozenset(), frozenset({(0, 1), (2, 3)})])
def test_a_continuation_is_recomputing_everything_each_time(
    heads: frozenset[tuple[int, int]],
) -> None:
    model, ids = random_model(TINY), text(40)
    ablation = Ablation(heads=heads, edges=frozenset({(30, 2)}))
    chosen = complete(continue_greedily(model, recorded(model, ids, ablation), 6))
    for token in chosen:
        assert token == int(recorded(model, ids, ablation).logits[-1].argmax())
        ids = [*ids, token]
    stopped = complete(
        continue_greedily(model, recorded(model, text(40), ablation), 6, stop=chosen[2:3])
    )
    assert stopped == chosen[: chosen.index(chosen[2]) + 1]


def test_a_continuation_ends_with_the_positions() -> None:
    model = random_model(TINY)
    recording = recorded(model, text(250), NONE)
    assert len(complete(continue_greedily(model, recording, 6))) == 6
    with pytest.raises(ExplainError, match="257 tokens"):
        complete(continue_greedily(model, recording, 7))
