"""What explanations say, against the model run by hand; and that nobody else notices them."""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch

from model.explain.record import record
from model.explain.recording import Ablation, Recording
from service.engine.explain_messages import (
    NUM_POSITIONS,
    AblationWish,
    Explain,
    Explained,
    ExplainPart,
    ExplainWish,
    Sight,
)
from service.engine.explaining import PART_BYTES, explain
from service.engine.guests import ExplainRefusedError, Guests
from service.engine.messages import SequenceOutput, Submit
from tests.engine.engines import EOS, TINY, VOCAB_SIZE, make_core, random_model, submit

IDS = [(7 * i * i + 3 * i + 1) % VOCAB_SIZE for i in range(45)]
LAST = len(IDS) - 1


def wish(**changes: Any) -> ExplainWish:
    """Everything there is to ask for, but for these."""
    asked = ExplainWish(
        layers=[0, 2],
        heads=[1, 5],
        attention="full",
        top_k=3,
        lens=4,
        lens_positions=[3, LAST],
        candidates=5,
        head=(2, 5, 9),
        ablate=AblationWish([(1, 2)], [(LAST, 0)]),
        max_tokens=3,
    )
    return msgspec.structs.replace(asked, **changes)


def run(request: Explain) -> tuple[Explained, list[ExplainPart]]:
    parts: list[ExplainPart] = []
    work = explain(random_model(), (EOS,), request, parts.append)
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value, parts


def recorded(ablation: Ablation | None = None) -> Recording:
    work = record(random_model(), torch.tensor(IDS), ablate=ablation or Ablation())
    while True:
        try:
            next(work)
        except StopIteration as end:
            recording: Recording = end.value
            return recording


def attention_of(parts: list[ExplainPart]) -> Any:
    return json.loads(b"".join(part.attention for part in parts))


def test_full_attention_is_that_of_the_model() -> None:
    _, parts = run(Explain(1, IDS, wish()))
    assert {part.id for part in parts} == {1}
    found, recording = attention_of(parts), recorded()
    for layer, of_layer in zip([0, 2], found, strict=True):
        for head, rows in zip([1, 5], of_layer, strict=True):
            assert [len(row) for row in rows] == list(range(1, len(IDS) + 1))
            for query, row in enumerate(rows):
                expected = recording.weights(layer)[head, query, : query + 1].tolist()
                assert row == pytest.approx(expected, abs=1e-6)
                assert sum(row) == pytest.approx(1, abs=1e-4)


def test_mean_and_top_attention_follow_from_the_full() -> None:
    full = attention_of(run(Explain(1, IDS, wish()))[1])
    mean = attention_of(run(Explain(1, IDS, wish(attention="mean")))[1])
    top = attention_of(run(Explain(1, IDS, wish(attention="top")))[1])
    for query, row in enumerate(mean):
        rows = [full[layer][head][query] for layer in range(2) for head in range(2)]
        assert row == pytest.approx([sum(keys) / 4 for keys in zip(*rows, strict=True)], abs=2e-6)
    for layer in range(2):
        for head in range(2):
            for query, one in enumerate(top[layer][head]):
                row = full[layer][head][query]
                assert one["weights"] == sorted(row, reverse=True)[:3]
                assert [row[key] for key in one["keys"]] == one["weights"]
    assert run(Explain(1, IDS, wish(attention="none", lens=0)))[1] == []


def test_long_attention_comes_in_parts() -> None:
    ids = (IDS * 5)[:220]
    everything = wish(layers=[0, 1, 2], heads=list(range(6)), head=None, ablate=None, max_tokens=0)
    _, parts = run(Explain(1, ids, everything))
    sizes = [len(part.attention) for part in parts if part.attention]
    assert len(sizes) > 3
    assert max(sizes) < 1.5 * PART_BYTES
    assert len(attention_of(parts)) == 3


def test_scores_lens_and_candidates_are_the_model_s() -> None:
    answer, parts = run(Explain(1, IDS, wish()))
    recording = recorded()
    logprobs = torch.log_softmax(recording.logits, dim=-1)
    assert len(answer.token_scores) == LAST
    for position, (logprob, rank) in enumerate(answer.token_scores, start=1):
        row = logprobs[position - 1]
        assert logprob == pytest.approx(float(row[IDS[position]]), abs=2e-6)
        assert rank == int((row > row[IDS[position]]).sum()) + 1
    lens = [row for part in parts for row in part.lens]
    assert [(row.layer, row.position) for row in lens] == [
        (layer, position) for layer in range(4) for position in (3, LAST)
    ]
    assert {len(row.candidates) for row in lens} == {4}
    # The last layer's lens is the model's own answer.
    same = [(token, pytest.approx(logprob, abs=1e-5)) for token, logprob in answer.next[:4]]
    assert lens[-1].candidates == same
    best = [
        (int(i), pytest.approx(float(logprobs[-1, i]), abs=2e-6))
        for i in logprobs[-1].topk(5).indices
    ]
    assert answer.next == best


def test_entropy_is_that_of_the_rows() -> None:
    answer, parts = run(Explain(1, IDS, wish()))
    full = attention_of(parts)
    for layer in range(2):
        for head in range(2):
            rows = full[layer][head]
            spread = [-sum(w * math.log(w) for w in row if w > 0) for row in rows]
            assert answer.entropy[layer][head] == pytest.approx(sum(spread) / len(rows), abs=1e-3)


def test_one_head_s_steps_lead_to_its_weights() -> None:
    answer, parts = run(Explain(1, IDS, wish()))
    head = answer.head
    assert head is not None
    assert (head.layer, head.head, head.kv_head, head.query) == (2, 5, 1, 9)
    scores = [sum(q * k for q, k in zip(head.q, key, strict=True)) for key in head.keys]
    assert head.scores == pytest.approx(scores, abs=1e-3)
    assert head.scaled == pytest.approx([s * head.scale for s in head.scores], abs=1e-5)
    assert head.weights == pytest.approx(attention_of(parts)[1][1][9], abs=1e-5)
    mixed = [
        sum(w * v for w, v in zip(head.weights, column, strict=True))
        for column in zip(*head.values, strict=True)
    ]
    assert head.output == pytest.approx(mixed, abs=1e-3)


def test_an_ablation_says_what_it_changed() -> None:
    answer, _ = run(Explain(1, IDS, wish()))
    ablation = Ablation(frozenset({(1, 2)}), frozenset({(LAST, 0)}))
    before = torch.log_softmax(recorded().logits[-1], dim=-1)
    after = torch.log_softmax(recorded(ablation).logits[-1], dim=-1)
    ablated = answer.ablated
    assert ablated is not None
    assert ablated.kl == pytest.approx(float((before.exp() * (before - after)).sum()), abs=1e-5)
    assert ablated.kl > 0.01
    for token_id, one, other in ablated.changes:
        assert one == pytest.approx(float(before[token_id]), abs=2e-6)
        assert other == pytest.approx(float(after[token_id]), abs=2e-5)
    assert [token for token, _ in ablated.next] == after.topk(5).indices.tolist()
    assert ablated.continuation[0] == int(after.argmax())
    assert answer.continuation[0] == int(before.argmax())
    assert len(answer.continuation) <= 3


def test_the_continuation_is_what_the_engine_generates() -> None:
    answer, _ = run(Explain(1, IDS, wish(max_tokens=8)))
    core = make_core(random_model())
    core.add(submit(1, IDS, temperature=0.0, max_tokens=8))
    tokens: list[int] = []
    while core.has_work:
        tokens += [token for output in core.step() for token in output.token_ids]
    assert answer.continuation == tokens


def test_what_leaves_a_query_without_a_key_is_refused() -> None:
    with pytest.raises(ExplainRefusedError, match="query 0 no key"):
        run(Explain(1, IDS, wish(ablate=AblationWish([], [(0, 0)]))))


@dataclass
class Told:
    """A `Sight`, decoded: (position, weight) each."""

    mean: list[tuple[int, float]]
    heads: list[list[tuple[int, float]]]
    top: list[tuple[int, float]]


def seen_by(outputs: list[SequenceOutput]) -> list[Told]:
    return [told(one) for output in outputs for one in output.explained or []]


def told(sight: Sight) -> Told:
    seen = list(zip(array("i", sight.places), array("d", sight.weights), strict=True))
    next_tokens = zip(array("i", sight.tokens), array("d", sight.logprobs), strict=True)
    mean, *heads = (
        [pair for pair in seen[start : start + NUM_POSITIONS] if pair[0] >= 0]
        for start in range(0, len(seen), NUM_POSITIONS)
    )
    return Told(mean, heads, list(next_tokens))


def stepped(requests: list[Submit], core: Any = None) -> dict[int, list[SequenceOutput]]:
    core = core or make_core(random_model())
    for request in requests:
        core.add(request)
    found: dict[int, list[SequenceOutput]] = {request.id: [] for request in requests}
    while core.has_work:
        for output in core.step():
            found[output.id].append(output)
    return found


def explaining(request: Submit, heads: list[tuple[int, int]]) -> Submit:
    return msgspec.structs.replace(request, explain=heads)


def test_a_stream_tells_where_the_query_looked_that_chose_each_token() -> None:
    heads = [(0, 3), (2, 0)]
    plain = submit(2, IDS[:20], max_tokens=12, seed=3)
    found = stepped([explaining(submit(1, IDS[:20], max_tokens=12, seed=3), heads), plain])
    seen = seen_by(found[1])
    assert len(seen) == 12
    assert not seen_by(found[2])
    tokens = [token for output in found[1] for token in output.token_ids]
    assert tokens == [token for output in found[2] for token in output.token_ids]
    ids = torch.tensor(IDS[:20] + tokens)
    work = record(random_model(), ids)
    try:
        while True:
            next(work)
    except StopIteration as end:
        attention, logits = end.value.attention, end.value.logits
    for place, one in enumerate(seen):
        query = 19 + place
        check_strongest(one.mean, attention[:, :, query].mean(dim=(0, 1)))
        best = torch.log_softmax(logits[query], dim=-1).topk(5)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        for (layer, head), told in zip(heads, one.heads, strict=True):
            check_strongest(told, attention[layer, head, query])


def check_strongest(told: list[tuple[int, float]], weights: torch.Tensor) -> None:
    assert 0 < len(told) <= 8
    expected = sorted((w for w in weights.tolist() if w > 0), reverse=True)[:8]
    assert [weight for _, weight in told] == pytest.approx(expected, abs=1e-4)
    for position, weight in told:
        assert float(weights[position]) == pytest.approx(weight, abs=1e-4)


def test_a_sequence_that_goes_on_elsewhere_tells_the_rest() -> None:
    """As after the death of an engine: the tokens before are not told of again."""
    whole = stepped([explaining(submit(1, IDS[:20], max_tokens=12, seed=3), [(1, 1)])])[1]
    tokens = [token for output in whole for token in output.token_ids]
    rest = explaining(submit(1, IDS[:20], max_tokens=12, seed=3), [(1, 1)])
    rest = msgspec.structs.replace(rest, output_token_ids=tokens[:5])
    again = stepped([rest])[1]
    assert [token for output in again for token in output.token_ids] == tokens[5:]
    for one, other in zip(seen_by(whole)[5:], seen_by(again), strict=True):
        assert [p for p, _ in one.mean] == [p for p, _ in other.mean]
        assert [w for _, w in one.mean] == pytest.approx([w for _, w in other.mean], abs=1e-5)


def test_streams_get_the_same_bits_beside_a_guest() -> None:
    requests = [submit(i, IDS[i : i + 20], max_tokens=30, seed=i) for i in range(6)]
    alone = stepped(requests)
    model = random_model()
    core = make_core(model)
    sent: list[ExplainPart | Explained] = []
    guests = Guests(lambda request, send: explain(model, (EOS,), request, send), sent.append)
    guests.add(Explain(9, IDS, wish()))
    beside: dict[int, list[SequenceOutput]] = {request.id: [] for request in requests}
    for request in requests:
        core.add(request)
    while core.has_work:
        for output in core.step():
            beside[output.id].append(output)
        guests.alone(is_wanted=iter([False] * 5 + [True]).__next__)  # five pieces a step
    assert sent, "it did not work beside the streams"
    while guests.has_work:
        guests.alone(is_wanted=lambda: False)
    assert isinstance(sent[-1], Explained)
    for i in alone:
        for one, other in zip(alone[i], beside[i], strict=True):
            assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
    assert TINY.num_layers == 3
