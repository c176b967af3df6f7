"""Where the time of a step goes. Five readings of the clock, always on."""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.messages import StepRecord


@dataclass(slots=True)
class StepProfile:
    """The engine's latest step. Times are seconds; on a GPU, `forward_s` is the time to
    launch the kernels and `sample_s` holds the wait for them."""

    num_tokens: int = 0  # computed: decodes and prompt chunks
    num_sequences: int = 0  # that had tokens computed
    num_decodes: int = 0  # of them, those with one token
    num_bytes: float = 0.0  # that had to be read (traffic.py)
    flops: float = 0.0  # operations that had to be done
    referenced_blocks: int = 0  # at the step's height, before the finished gave theirs back
    schedule_s: float = 0.0  # who runs, and blocks for them
    build_s: float = 0.0  # batch and sampling parameters as tensors
    forward_s: float = 0.0  # embedding to logits
    sample_s: float = 0.0  # logits to tokens
    look_s: float = 0.0  # what tokens looked at, for streams that tell
    step_s: float = 0.0  # all of it

    @property
    def host_s(self) -> float:
        """What the engine adds to the model's own work."""
        return self.step_s - self.forward_s - self.sample_s - self.look_s

    @property
    def book_s(self) -> float:
        """The rest: tokens appended, ends found, outputs made."""
        return self.host_s - self.schedule_s - self.build_s

    def record(self) -> StepRecord:
        """What of it is told to whoever keeps the books of all steps."""
        return StepRecord(
            self.num_sequences,
            self.num_decodes,
            self.num_tokens,
            self.step_s,
            self.schedule_s,
            self.build_s,
            self.forward_s,
            self.sample_s,
            self.num_bytes,
            self.flops,
        )
