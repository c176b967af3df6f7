"""The journal under random outputs, deaths and cancels: no token lost, none doubled, one end each.

Played against an engine that computes as the real one does: token number i of a sequence is a
function of the sequence and i, and what it was not given it does not compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from model.sampling_params import SamplingParams
from service.backlog import Backlog
from service.engine.messages import (
    Abort,
    MessageTooLargeError,
    SequenceOutput,
    Submit,
    ToEngine,
)
from service.engine_record import EngineRecord
from service.in_flight import MAX_DEATHS, MAX_KILLS, InFlight, Loss
from service.journal import JournalEntry, SequenceRequest


def token(prompt: int, index: int) -> int:
    """What any engine draws there."""
    return 1000 * prompt + index


@dataclass
class PlayedEngine:
    """One life: what it was given, and what it has computed of that."""

    running: dict[int, Submit] = field(default_factory=dict)
    computed: dict[int, int] = field(default_factory=dict)  # tokens, those it was given included

    def take(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            assert message.id not in self.running, "given twice"
            prompt = message.prompt_token_ids[0]
            count = len(message.output_token_ids)
            assert message.output_token_ids == [token(prompt, i) for i in range(count)]
            assert count < message.sampling.max_tokens, "nothing is left to compute"
            self.running[message.id] = message
            self.computed[message.id] = count
        elif isinstance(message, Abort):
            assert message.id in self.running, "aborted though never given"
            del self.running[message.id]

    def compute(self, sequence_id: int) -> SequenceOutput:
        message, index = self.running[sequence_id], self.computed[sequence_id]
        self.computed[sequence_id] += 1
        is_last = index + 1 == message.sampling.max_tokens
        if is_last:
            del self.running[sequence_id]
        return SequenceOutput(
            sequence_id,
            [token(message.prompt_token_ids[0], index)],
            finish_reason="length" if is_last else None,
        )


@dataclass
class Reader:
    """What a client of one sequence has."""

    entry: JournalEntry
    prompt: int
    token_ids: list[int] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    is_cancelled: bool = False
    num_dead: int = 0  # engines that died computing it since its last token
    num_killed: int = 0


class Journal(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.engine: PlayedEngine | None = None
        self.readers: list[Reader] = []
        self.in_flight = InFlight(self._send, Backlog(), EngineRecord())

    def _send(self, message: ToEngine) -> None:
        assert self.engine is not None, "a message to nobody"
        self.engine.take(message)

    def teardown(self) -> None:
        """With a healthy engine and nothing more in the way, everything comes to its end."""
        if self.engine is None:
            self.engine_starts()
        assert self.engine is not None
        while self.engine.running:
            self.steps(list(self.engine.running))
        for reader in self.readers:
            self._read(reader)
            assert reader.is_cancelled or len(reader.ends) == 1
        assert len(self.in_flight) == 0
        assert self.in_flight.nothing.is_set()

    def _read(self, reader: Reader) -> None:
        output = reader.entry.take()
        if output is None:
            return
        assert not reader.ends, "something after the end"
        reader.token_ids += output.token_ids
        if output.finish_reason is not None:
            reader.ends.append(output.finish_reason)

    @rule(count=st.integers(1, 3), max_tokens=st.integers(1, 4))
    def submit(self, count: int, max_tokens: int) -> None:
        prompts = [len(self.readers) + i + 1 for i in range(count)]
        params = SamplingParams(max_tokens=max_tokens)
        entries = self.in_flight.add([SequenceRequest([p], params) for p in prompts])
        self.readers += [Reader(e, p) for e, p in zip(entries, prompts, strict=True)]

    @precondition(lambda self: self.engine is None)
    @rule()
    def engine_starts(self) -> None:
        self.engine = PlayedEngine()
        self.in_flight.engine_ready()

    @precondition(lambda self: self.engine is not None and self.engine.running)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        assert self.engine is not None
        self.steps(data.draw(st.sets(st.sampled_from(sorted(self.engine.running)))))

    def steps(self, ids: object) -> None:
        assert self.engine is not None
        outputs = [self.engine.compute(i) for i in sorted(ids)]  # type: ignore[call-overload]
        for output in outputs:
            reader = next(r for r in self.readers if r.entry.id == output.id)
            reader.num_dead = reader.num_killed = 0
            self.in_flight.deliver(output, 0.0)

    @precondition(lambda self: self.engine is not None)
    @rule(data=st.data(), outside=st.booleans(), knows=st.booleans(), unheard=st.booleans())
    def engine_dies(self, data: st.DataObject, outside: bool, knows: bool, unheard: bool) -> None:
        """With some of its sequences in the step; perhaps what it computed last never came."""
        assert self.engine is not None
        running = sorted(self.engine.running)
        in_step = data.draw(st.sets(st.sampled_from(running))) if running and knows else set()
        if unheard:
            for sequence_id in running:
                self.engine.compute(sequence_id)
        for reader in self.readers:
            if reader.entry.id in (in_step or running):
                reader.num_killed += outside
                reader.num_dead += not outside
        self.engine = None
        self.in_flight.engine_lost(Loss(frozenset(in_step), outside))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        reader.is_cancelled = True
        reader.entry.cancel()

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        self._read(data.draw(st.sampled_from(self.readers)))

    @invariant()
    def every_reader_has_a_prefix_of_what_there_is(self) -> None:
        for reader in self.readers:
            count = len(reader.token_ids)
            assert reader.token_ids == [token(reader.prompt, i) for i in range(count)]

    @invariant()
    def only_the_guilty_end_with_an_error(self) -> None:
        for reader in self.readers:
            is_guilty = reader.num_dead >= MAX_DEATHS or reader.num_killed >= MAX_KILLS
            if reader.ends == ["error"]:
                assert is_guilty
            elif is_guilty and not reader.is_cancelled:
                assert reader.entry not in list(self.in_flight)

    @invariant()
    def a_suspect_is_tried_alone(self) -> None:
        if self.engine is None:
            return
        suspects = [
            r
            for r in self.readers
            if r.entry in list(self.in_flight) and r.num_dead + r.num_killed >= 2
        ]
        tried = [r for r in suspects if r.entry.id in self.engine.running]
        assert len(tried) == min(1, len(suspects)), "one suspect at a time, and never none"


TestJournal = Journal.TestCase
TestJournal.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # says something of a busy machine only
)


def test_what_cannot_be_sent_ends_with_the_numbers() -> None:
    def refuse(message: ToEngine) -> None:
        raise MessageTooLargeError("a Submit message of 9 bytes was to be sent; the limit is 8")

    in_flight = InFlight(refuse, Backlog(), EngineRecord())
    in_flight.engine_ready()
    (entry,) = in_flight.add([SequenceRequest([1], SamplingParams())])
    output = entry.take()
    assert output is not None
    assert output.finish_reason == "error"
    assert "limit is 8" in str(output.error)
    assert len(in_flight) == 0
