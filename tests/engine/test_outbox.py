"""What the engine tells, and when: nothing lost, nothing twice, nobody kept waiting."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine.explain_messages import Sight
from service.engine.messages import (
    EngineStats,
    SequenceOutput,
    StepOutput,
    StepRecord,
    TokenLogprob,
)
from service.engine.outbox import Outbox, merged
from tests.api.test_quotas import Clock


def token(id_: int, token_id: int, finish_reason: str | None = None) -> SequenceOutput:
    return SequenceOutput(id_, [token_id], finish_reason=finish_reason)  # type: ignore[arg-type]


def taken(box: Outbox, num_running: int) -> list[SequenceOutput]:
    return box.take(box.due(num_running), EngineStats()).outputs


def outbox(clock: Clock, max_events_s: float = 640.0) -> Outbox:
    box = Outbox(max_events_s, clock)
    box.add([token(id_, 0) for id_ in range(32)])
    assert len(taken(box, 32)) == 32, "somebody waits for a first token"
    return box


def test_with_many_sequences_the_tokens_of_a_pause_share_an_event() -> None:
    clock = Clock()
    box = outbox(clock)
    told: dict[int, list[int]] = {}
    given_at: dict[int, float] = {}
    records = 0
    for step in range(1, 101):
        clock.now_s += 0.006
        given_at[step] = clock.now_s
        record = StepRecord(num_sequences=32, num_decodes=32, num_tokens=32, step_s=0.006)
        box.add([token(id_, step) for id_ in range(32)], record)
        due = box.due(32)
        assert len(due) == (0 if step % 9 else 32), "640 events a second, in steps of 6 ms"
        if not due:
            continue
        message = box.take(due, EngineStats(steps=step))
        records += len(message.steps)
        assert message.stats.steps == step
        for one in message.outputs:
            assert clock.now_s - given_at[one.token_ids[0]] < 0.057
            assert len(one.token_ids) == 9
            told.setdefault(one.id, []).extend(one.token_ids)
    clock.now_s += 0.06
    last = box.take(box.due(32), EngineStats())
    assert records + len(last.steps) == 100
    for one in last.outputs:
        told[one.id].extend(one.token_ids)
    assert len(told) == 32
    assert all(tokens == list(range(1, 101)) for tokens in told.values())
    assert box.take([], EngineStats()) == StepOutput([], EngineStats())


def test_with_few_sequences_each_step_is_told() -> None:
    clock = Clock()
    box = outbox(clock)
    box.add([token(0, 1), token(1, 1)])
    assert box.due(2) == [0, 1]


def test_a_reader_never_waits_longer_than_he_would_see() -> None:
    clock = Clock()
    box = outbox(clock, max_events_s=1)
    box.add([token(0, 1)])
    clock.now_s += 0.0501
    assert box.due(1000)


def test_a_first_token_and_an_end_do_not_wait() -> None:
    clock = Clock()
    box = outbox(clock)
    box.add([token(3, 1)])
    assert not box.due(32)
    box.add([token(99, 7)])
    assert [(one.id, one.token_ids) for one in taken(box, 32)] == [(99, [7])], "3 can wait"
    box.add([token(3, 2, "stop")])
    [ended] = taken(box, 32)
    assert (ended.id, ended.token_ids, ended.finish_reason) == (3, [1, 2], "stop")
    assert not box.due(32)


def test_the_parts_of_an_output_are_kept() -> None:
    logprobs = [TokenLogprob(5, -1.0, 1, []), TokenLogprob(6, -2.0, 2, [])]
    seen = [Sight(b"1", b"", b"", b""), Sight(b"2", b"", b"", b"")]
    times = {"queue_s": 0.25, "prefill_s": 0.5}
    first = SequenceOutput(
        1, [5], logprobs[:1], cached_prompt_tokens=32, explained=seen[:1], **times
    )
    last = SequenceOutput(
        1, [6], logprobs[1:], "stop", 6, cached_prompt_tokens=32, explained=seen[1:]
    )
    assert merged(first, last) == SequenceOutput(
        1, [5, 6], logprobs, "stop", 6, cached_prompt_tokens=32, explained=seen, **times
    )
    failed = SequenceOutput(1, [], None, "error", None, "why", is_grammar_error=True)
    both = merged(first, failed)
    assert (both.token_ids, both.logprobs) == ([5], logprobs[:1])
    assert (both.finish_reason, both.error, both.is_grammar_error) == ("error", "why", True)


@given(
    st.lists(
        st.tuples(
            st.sets(st.integers(0, 5)),  # who gets a token
            st.floats(0, 0.1),  # how long the step takes
            st.sets(st.integers(0, 5), max_size=1),  # who is aborted
        ),
        max_size=40,
    )
)
def test_every_token_comes_once_and_in_order(
    steps: list[tuple[set[int], float, set[int]]],
) -> None:
    clock = Clock()
    box = Outbox(100.0, clock)
    given_: dict[int, list[int]] = {}
    told: dict[int, list[int]] = {}
    gone: set[int] = set()
    since: dict[int, float] = {}  # when the oldest token was given that was not told
    for number, (ids, took_s, aborted) in enumerate(steps):
        for id_ in aborted - gone:
            gone.add(id_)
            since.pop(id_, None)
            box.forget(id_)
        clock.now_s += took_s
        fresh = [token(id_, number) for id_ in sorted(ids - gone)]
        for one in fresh:
            given_.setdefault(one.id, []).append(number)
            since.setdefault(one.id, clock.now_s)
        box.add(fresh)
        for one in taken(box, 6):
            del since[one.id]  # nobody who is gone, nobody twice
            told.setdefault(one.id, []).extend(one.token_ids)
        assert all(clock.now_s - then < 0.06 for then in since.values())
    clock.now_s += 1
    for one in taken(box, 6):
        told.setdefault(one.id, []).extend(one.token_ids)
    for id_, ids_told in told.items():
        assert ids_told == given_[id_][: len(ids_told)]
        assert id_ in gone or ids_told == given_[id_]
    assert set(given_) - set(told) <= gone
