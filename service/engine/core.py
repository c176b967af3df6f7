"""The engine without its process: add sequences, step, read what came out.

`loop.py` puts it behind a socket; `vitrine generate` and the offline benchmarks call it
directly.

Two orders of the same verbs. Plain, a step is scheduled, launched and booked, and then comes the
next. Overlapped, on a device that works while the host does something else:

    host     schedule 1, launch 1 | schedule 2, launch 2 | book 1 | schedule 3, launch 3 | book 2
    device                          1 1 1 1 1 1 1 1 1 1 1 1 2 2 2 2 2 2 2 2 2 2 2 2 2 2 3 3 3 3 3

Step 2 needs the tokens of step 1, which stay on the device; the host counts them as `UNREAD` until
it books step 1. What it learns then, an end or an abort, comes one step late: step 2 has a token
of that sequence too many, which is thrown away when step 2 is booked.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from model.exchange import ApartError
from model.sampling import SampledTokens
from service.engine.explain_messages import Sight
from service.engine.grammars import GrammarQueue
from service.engine.guests import Begin
from service.engine.messages import (
    EngineFinish,
    EngineStats,
    SequenceOutput,
    StepRecord,
    Submit,
    TokenLogprob,
)
from service.engine.pace import PromptPace
from service.engine.profile import StepProfile
from service.engine.recorder import Recorder
from service.engine.runner import Result, StepRunner, is_out_of_memory
from service.engine.scheduler import Launched, Scheduled, Scheduler
from service.engine.sequence import UNREAD, Sequence
from service.engine.sights import Sights
from service.engine.traffic import Traffic, needs
from service.grammars import MISSING, GrammarError

# How long a step that has nothing to run waits for a grammar.
GRAMMAR_WAIT_S = 0.01


@dataclass(slots=True)
class _Flight:
    """What a step launched and nobody has booked yet: one result, or several when a part of the
    step failed and the rest ran without it."""

    profile: StepProfile
    began: float
    parts: list[tuple[list[Launched], Result]] = field(default_factory=list)

    @property
    def sequence_ids(self) -> list[int]:
        return [item.sequence.id for items, _ in self.parts for item in items]


@dataclass(slots=True)
class EngineCore:
    """Scheduler and runner, and the books about them."""

    scheduler: Scheduler
    runner: StepRunner
    overlap: bool = False  # prepare the next step while one runs; needs a DeviceRunner
    grammars: GrammarQueue | None = None  # None: none can be followed here
    explain: Begin | None = None  # begins the work of a guest; None: there are no guests
    pace: PromptPace = field(default_factory=lambda: PromptPace(0.0))
    sequences: dict[int, Sequence] = field(default_factory=dict)
    last_step: StepProfile = field(default_factory=StepProfile)
    recorder: Recorder | None = None
    traffic: Traffic | None = None  # None: nobody asks what steps had to read and to do
    _refused: list[SequenceOutput] = field(default_factory=list)
    _flight: _Flight | None = None
    _booked_at: float = 0.0  # when the last step was, in seconds of time.monotonic()
    _steps: int = 0
    _prompt_tokens: int = 0
    _generated_tokens: int = 0

    @property
    def has_work(self) -> bool:
        return (
            self.scheduler.has_work
            or self._flight is not None
            or bool(self._refused)
            or bool(self.grammars)
        )

    def add(self, request: Submit) -> None:
        """Queue a sequence. One that could never run is answered with an error instead."""
        reason = self._refusal(request)
        if reason is not None:
            self._refused.append(
                SequenceOutput(request.id, [], finish_reason="error", error=reason)
            )
            return
        sequence = Sequence(
            id=request.id,
            token_ids=request.prompt_token_ids + request.output_token_ids,
            num_prompt=len(request.prompt_token_ids),
            sampling=request.sampling,
            priority=request.priority,
            arrived_at=time.monotonic(),
            explain=request.explain,
        )
        self.sequences[request.id] = sequence
        spec = request.sampling.grammar
        if spec is not None and self.grammars is not None:
            self.grammars.add(sequence, spec)
        else:
            self.scheduler.add(sequence)

    def abort(self, sequence_id: int) -> None:
        """Forget a sequence; unknown ids (already finished) are nothing to do."""
        sequence = self.sequences.pop(sequence_id, None)
        if sequence is None or (self.grammars is not None and self.grammars.remove(sequence_id)):
            return
        self.scheduler.remove(sequence)

    def step(self) -> list[SequenceOutput]:
        """Launch a step over what the scheduler chooses, and book it, or when overlapping the
        one before it."""
        self._take_compiled()
        outputs, self._refused = self._refused, []
        if self.overlap and not self._must_read_first():
            flight = self._launch(outputs)
            outputs += self._land(self._flight)
            self._flight = flight
        else:
            if self._flight is not None:
                outputs += self._land(self._flight)
                self._flight = None
            outputs += self._land(self._launch(outputs))
        if self.recorder is not None:
            self.recorder.begin([] if self._flight is None else self._flight.sequence_ids)
        return outputs

    def stats(self) -> EngineStats:
        """Gauges and counters as of now."""
        pool = self.scheduler.pool
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting) + len(self.grammars or ()),
            free_blocks=pool.num_free,
            referenced_blocks=pool.num_referenced,
            cached_blocks=pool.num_cached,
            total_blocks=pool.num_blocks,
            preemptions=self.scheduler.num_preemptions,
            memory_shortages=self.scheduler.num_shortages,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cache_queries=self.scheduler.num_cache_queries,
            cache_hits=self.scheduler.num_cache_hits,
        )

    def step_record(self) -> StepRecord | None:
        """The last step for whoever keeps the books of all; None when it computed nothing."""
        return self.last_step.record() if self.last_step.num_sequences else None

    def _refusal(self, request: Submit) -> str | None:
        """The API refuses these at the door; the engine does not rely on it."""
        vocab_size = self.runner.config.vocab_size
        ids = request.prompt_token_ids + request.output_token_ids
        if not request.prompt_token_ids:
            return "the prompt is empty"
        if min(ids) < 0 or max(ids) >= vocab_size:
            return f"token ids must lie in 0 .. {vocab_size - 1}"
        if request.sampling.grammar is not None and self.grammars is None:
            return MISSING
        if request.explain is not None and not self.runner.can_watch:
            return "this engine cannot tell what its tokens look at"
        if request.id in self.sequences:
            return f"sequence id {request.id} is already running"
        if len(request.output_token_ids) >= request.sampling.max_tokens:
            return (
                f"{len(request.output_token_ids)} output tokens are already there; "
                f"max_tokens is {request.sampling.max_tokens}"
            )
        return self.scheduler.refusal(len(request.prompt_token_ids), request.sampling.max_tokens)

    def _take_compiled(self) -> None:
        """Let the sequences run whose grammars are ready."""
        if self.grammars is None:
            return
        for sequence, matcher in self.grammars.take_ready(
            0.0 if self.scheduler.has_work or self._refused else GRAMMAR_WAIT_S
        ):
            if isinstance(matcher, GrammarError):
                del self.sequences[sequence.id]
                self._refused.append(_failure(sequence, str(matcher), is_grammar_error=True))
            elif isinstance(matcher, Exception):
                del self.sequences[sequence.id]
                reason = f"{type(matcher).__name__}: {matcher}"
                self._refused.append(_failure(sequence, reason))
            else:
                sequence.matcher = matcher
                self.scheduler.add(sequence)

    def _must_read_first(self) -> bool:
        """Whether the next step cannot be prepared without the tokens of the one that runs: a
        grammar says what may follow a token only when it has seen it."""
        return any(sequence.matcher is not None for sequence in self.scheduler.running)

    def _launch(self, outputs: list[SequenceOutput]) -> _Flight | None:
        """Schedule a step and start it; None when there is nothing to run. Sequences whose
        launch fails end in `outputs`."""
        flight = _Flight(StepProfile(), time.monotonic())
        profile = flight.profile
        scheduled = self._schedule()
        profile.schedule_s = time.monotonic() - flight.began
        while scheduled:
            num_shortages = self.scheduler.num_shortages
            self._profile(scheduled, flight)
            outputs += self._launch_part(scheduled, flight)
            if flight.parts or self.scheduler.num_shortages == num_shortages:
                return flight
            scheduled = self._schedule()  # a smaller one
        return None

    def _schedule(self) -> list[Scheduled]:
        phases = self.scheduler.phases
        if not phases.starting:  # then the pace has nothing to say, and takes its time
            return self.scheduler.schedule()
        return self.scheduler.schedule(self.pace.prompt_tokens(phases))

    def _profile(self, scheduled: list[Scheduled], flight: _Flight) -> None:
        """What a step is about to compute."""
        profile = flight.profile
        profile.num_sequences = len(scheduled)
        profile.num_decodes = sum(item.num_tokens == 1 for item in scheduled)
        profile.num_tokens = sum(item.num_tokens for item in scheduled)
        profile.referenced_blocks = self.scheduler.pool.num_referenced
        for item in scheduled:
            if item.sequence.started_at is None:
                item.sequence.started_at = flight.began
        if self.traffic is not None:
            profile.num_bytes, profile.flops = needs(self.traffic, scheduled)

    def _launch_part(self, scheduled: list[Scheduled], flight: _Flight) -> list[SequenceOutput]:
        """Run and count. When the forward raises, each half runs by itself, and so on, so
        that only the sequence that is at fault ends with an error (law 6). Computing again what
        was computed changes nothing. What finds no memory is not run, and makes steps smaller."""
        # A part before this one may have found no memory, and cost others of the step theirs.
        scheduled = [item for item in scheduled if item.sequence.blocks]
        if not scheduled:
            return []
        if self.recorder is not None:
            running = [] if self._flight is None else self._flight.sequence_ids
            own = [item.sequence.id for item in scheduled]
            self.recorder.begin(list(dict.fromkeys(own + running + flight.sequence_ids)))
        try:
            result = self.runner.launch(scheduled, flight.profile)
        except ApartError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it must cost one sequence only
            reason, has_no_memory = f"{type(error).__name__}: {error}", is_out_of_memory(error)
        else:
            self._count(scheduled, result, flight)
            return []
        # Out of the handler: an exception holds on to the tensors of the step that raised it.
        if has_no_memory:
            self.runner.free_memory()
            if self.scheduler.shrink(sum(item.num_tokens for item in scheduled)):
                return []
        if len(scheduled) > 1:
            middle = len(scheduled) // 2
            outputs = self._launch_part(scheduled[:middle], flight)
            return outputs + self._launch_part(scheduled[middle:], flight)
        return [self._fail(scheduled[0].sequence, reason)]

    def _count(self, scheduled: list[Scheduled], result: Result, flight: _Flight) -> None:
        """A part of a step was launched."""
        self.scheduler.fitted()
        items = [self.scheduler.launched(item) for item in scheduled]
        for item in items:
            if item.samples:
                item.sequence.token_ids.append(UNREAD)
        flight.parts.append((items, result))

    def _land(self, flight: _Flight | None) -> list[SequenceOutput]:
        """Wait for a step's tokens and book them. Its time counts from where the one before it
        ended, if it was launched during that one."""
        if flight is None:
            self.last_step = StepProfile()
            return []
        profile = self.last_step = flight.profile
        outputs = []
        for items, result in flight.parts:
            outputs += self._book(items, result.read(profile), result.sights)
        self._steps += 1
        now = time.monotonic()
        profile.step_s = now - max(flight.began, self._booked_at)
        self._booked_at = now
        self.pace.stepped(
            profile.step_s, profile.num_decodes, profile.num_tokens - profile.num_decodes
        )
        return outputs

    def _book(
        self, items: list[Launched], sampled: SampledTokens, sights: Sights
    ) -> list[SequenceOutput]:
        token_ids = sampled.token_ids.tolist()
        outputs = []
        row = -1
        for item in items:
            sequence = item.sequence
            row += item.samples
            if self.sequences.get(sequence.id) is not sequence:
                continue  # it ended, or was aborted, while this was computed
            num_prompt = sequence.num_prompt
            self._prompt_tokens += min(item.end, num_prompt) - min(item.start, num_prompt)
            self.scheduler.computed(item)
            if not item.samples:
                continue
            if row in sampled.bad_rows:
                outputs.append(self._fail(sequence, sampled.bad_rows[row]))
            else:
                chosen = sampled.logprobs[row] if sampled.logprobs is not None else None
                logprob = None if chosen is None else TokenLogprob(*chosen[:3], list(chosen.top))
                seen = sights.get(sequence.id)
                outputs.append(self._read(sequence, item.end, token_ids[row], logprob, seen))
        return outputs

    def _read(
        self,
        sequence: Sequence,
        place: int,
        token_id: int,
        logprob: TokenLogprob | None,
        seen: Sight | None,
    ) -> SequenceOutput:
        """The token at `place` of the sequence is known. Another may already be drawn."""
        num_output = place + 1 - sequence.num_prompt
        first = num_output == 1
        matcher = sequence.matcher
        stop_ids = sequence.sampling.stop_token_ids
        is_eos = not sequence.sampling.ignore_eos and token_id in self.runner.eos_token_ids
        finish_reason: EngineFinish | None = None
        stop_token_id: int | None = None
        if matcher is not None and not is_eos:
            matcher.advance([token_id])
            if matcher.error is not None:
                return self._fail(sequence, matcher.error)
        sequence.token_ids[place] = token_id
        if sequence.began_at == math.inf:
            sequence.began_at = time.monotonic()
        self._generated_tokens += 1
        if num_output > sequence.sampling.min_tokens and (is_eos or token_id in stop_ids):
            finish_reason, stop_token_id = "stop", token_id
        elif matcher is not None and matcher.is_complete:
            finish_reason = "stop"
        elif num_output >= sequence.sampling.max_tokens:
            finish_reason = "length"
        if finish_reason is not None:
            self._forget(sequence)
        started = sequence.started_at or sequence.arrived_at
        return SequenceOutput(
            id=sequence.id,
            token_ids=[token_id],
            logprobs=None if logprob is None else [logprob],
            finish_reason=finish_reason,
            stop_token_id=stop_token_id,
            cached_prompt_tokens=sequence.cached_prompt_tokens or 0,
            queue_s=started - sequence.arrived_at if first else 0.0,
            prefill_s=time.monotonic() - started if first else 0.0,
            explained=None if seen is None else [seen],
        )

    def _fail(self, sequence: Sequence, reason: str) -> SequenceOutput:
        """End it with an error. What it computed may be the reason, such as NaN, which would go
        on to whoever gets its blocks: a masked position counts 0 times its value."""
        del self.sequences[sequence.id]
        self.runner.clear(self.scheduler.discard(sequence))
        matcher, spec = sequence.matcher, sequence.sampling.grammar
        if matcher is not None and matcher.error is not None:  # then that is why
            if self.grammars is not None and spec is not None:
                self.grammars.give_up(spec)
            return _failure(sequence, matcher.error, is_grammar_error=True)
        return _failure(sequence, reason)

    def _forget(self, sequence: Sequence) -> None:
        del self.sequences[sequence.id]
        self.scheduler.remove(sequence)


def _failure(sequence: Sequence, reason: str, *, is_grammar_error: bool = False) -> SequenceOutput:
    return SequenceOutput(
        sequence.id,
        [],
        finish_reason="error",
        error=reason,
        is_grammar_error=is_grammar_error,
    )
