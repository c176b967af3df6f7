"""The engine without its process: add sequences, step, read what came out.

`loop.py` puts it behind a socket; `vitrine generate` and the offline benchmarks call it
directly.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from model.sampling import SampledTokens
from service.engine.grammars import GrammarQueue
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
from service.engine.runner import Runner
from service.engine.scheduler import Scheduled, Scheduler
from service.engine.sequence import Sequence
from service.engine.traffic import Traffic
from service.grammars import MISSING, GrammarError

# How long a step that has nothing to run waits for a grammar.
GRAMMAR_WAIT_S = 0.01


@dataclass(slots=True)
class EngineCore:
    """Scheduler and runner, and the books about them."""

    scheduler: Scheduler
    runner: Runner
    grammars: GrammarQueue | None = None  # None: none can be followed here
    pace: PromptPace = field(default_factory=lambda: PromptPace(0.0))
    sequences: dict[int, Sequence] = field(default_factory=dict)
    last_step: StepProfile = field(default_factory=StepProfile)
    recorder: Recorder | None = None
    traffic: Traffic | None = None  # None: nobody asks what steps had to read and to do
    _refused: list[SequenceOutput] = field(default_factory=list)
    _steps: int = 0
    _prompt_tokens: int = 0
    _generated_tokens: int = 0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._refused) or bool(self.grammars)

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
        """Run one step over what the scheduler chooses."""
        self._take_compiled()
        outputs, self._refused = self._refused, []
        profile = self.last_step = StepProfile()
        began = time.monotonic()
        scheduled = self.scheduler.schedule(self.pace.prompt_tokens)
        num_decodes = sum(item.num_tokens == 1 for item in scheduled)
        profile.num_sequences, profile.num_decodes = len(scheduled), num_decodes
        profile.num_tokens = sum(item.num_tokens for item in scheduled)
        profile.referenced_blocks = self.scheduler.pool.num_referenced
        profile.schedule_s = time.monotonic() - began
        for item in scheduled:
            if item.sequence.started_at is None:
                item.sequence.started_at = began
        if self.traffic is not None and scheduled:
            profile.num_bytes, profile.flops = _needs(self.traffic, scheduled, num_decodes)
        outputs += self._run(scheduled)
        if self.recorder is not None:
            self.recorder.end()
        self._steps += 1
        profile.step_s = time.monotonic() - began
        self.pace.stepped(profile.step_s, num_decodes, profile.num_tokens - num_decodes)
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
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            cache_queries=self.scheduler.num_cache_queries,
            cache_hits=self.scheduler.num_cache_hits,
        )

    def step_record(self) -> StepRecord | None:
        """The last step for whoever keeps the books of all; None when it computed nothing."""
        last = self.last_step
        if not last.num_sequences:
            return None
        return StepRecord(
            last.num_sequences,
            last.num_decodes,
            last.num_tokens,
            last.step_s,
            last.schedule_s,
            last.build_s,
            last.forward_s,
            last.sample_s,
            last.num_bytes,
            last.flops,
        )

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

    def _run(self, scheduled: list[Scheduled]) -> list[SequenceOutput]:
        """Forward and book. When the forward raises, each half runs by itself, and so on, so
        that only the sequence that is at fault ends with an error (law 6), and a step that did
        not fit the memory runs in parts. Computing again what was computed changes nothing."""
        if not scheduled:
            return []
        if self.recorder is not None:
            self.recorder.begin([item.sequence.id for item in scheduled])
        try:
            sampled = self.runner.run(scheduled, self.last_step)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must cost one sequence only
            if len(scheduled) > 1:
                middle = len(scheduled) // 2
                return self._run(scheduled[:middle]) + self._run(scheduled[middle:])
            return [self._fail(scheduled[0].sequence, f"{type(error).__name__}: {error}")]
        return self._book(scheduled, sampled)

    def _book(self, scheduled: list[Scheduled], sampled: SampledTokens) -> list[SequenceOutput]:
        token_ids = sampled.token_ids.tolist()
        outputs = []
        row = 0
        for item in scheduled:
            sequence = item.sequence
            samples = item.samples
            prompt_before = min(sequence.num_computed, sequence.num_prompt)
            self.scheduler.computed(item)
            self._prompt_tokens += min(sequence.num_computed, sequence.num_prompt) - prompt_before
            if not samples:
                continue
            if row in sampled.bad_rows:
                outputs.append(self._fail(sequence, sampled.bad_rows[row]))
            else:
                chosen = sampled.logprobs[row] if sampled.logprobs is not None else None
                logprob = None if chosen is None else TokenLogprob(*chosen[:3], list(chosen.top))
                outputs.append(self._append(sequence, token_ids[row], logprob))
            row += 1
        return outputs

    def _append(
        self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None
    ) -> SequenceOutput:
        first = sequence.num_output == 0
        matcher = sequence.matcher
        stop_ids = sequence.sampling.stop_token_ids
        is_eos = not sequence.sampling.ignore_eos and token_id in self.runner.eos_token_ids
        finish_reason: EngineFinish | None = None
        stop_token_id: int | None = None
        if matcher is not None and not is_eos:
            matcher.advance([token_id])
            if matcher.error is not None:
                return self._fail(sequence, matcher.error)
        sequence.token_ids.append(token_id)
        self._generated_tokens += 1
        if sequence.num_output > sequence.sampling.min_tokens and (is_eos or token_id in stop_ids):
            finish_reason, stop_token_id = "stop", token_id
        elif matcher is not None and matcher.is_complete:
            finish_reason = "stop"
        elif sequence.num_output >= sequence.sampling.max_tokens:
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
        )

    def _fail(self, sequence: Sequence, reason: str) -> SequenceOutput:
        self._forget(sequence)
        matcher, spec = sequence.matcher, sequence.sampling.grammar
        if matcher is not None and matcher.error is not None:  # then that is why
            if self.grammars is not None and spec is not None:
                self.grammars.give_up(spec)
            return _failure(sequence, matcher.error, is_grammar_error=True)
        return _failure(sequence, reason)

    def _forget(self, sequence: Sequence) -> None:
        del self.sequences[sequence.id]
        self.scheduler.remove(sequence)


def _needs(traffic: Traffic, scheduled: list[Scheduled], num_decodes: int) -> tuple[float, float]:
    """Bytes and operations of a step that has not been booked yet."""
    if num_decodes == len(scheduled):  # most steps, and short ones
        return traffic.decode([item.sequence.num_computed + 1 for item in scheduled])
    spans = [(item.sequence.num_computed, item.num_tokens) for item in scheduled]
    return traffic.step(spans, sum(item.samples for item in scheduled))


def _failure(sequence: Sequence, reason: str, *, is_grammar_error: bool = False) -> SequenceOutput:
    return SequenceOutput(
        sequence.id,
        [],
        finish_reason="error",
        error=reason,
        is_grammar_error=is_grammar_error,
    )
