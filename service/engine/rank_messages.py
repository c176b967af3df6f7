"""What the engine process tells the processes that have the other parts of its model.

One pipe to each, its standard input: its end is the end of the process. A message is a frame
(service/frames.py) with a msgspec struct as MessagePack; a step's numbers go as they lie in memory.
Upward goes a line of JSON for the part and for each step: that it is there, or why not.
"""

from __future__ import annotations

from typing import IO

import msgspec

from model.config import ModelConfig
from service.engine.messages import EngineConfig
from service.frames import frame, read_frame


class RandomWeights(msgspec.Struct, frozen=True):
    """Weights that are drawn instead of loaded."""

    model: ModelConfig  # the whole one
    seed: int


class Lead(msgspec.Struct, frozen=True, tag=True):
    """The first message: load part `rank`, and meet the others in `folder`."""

    config: EngineConfig
    rank: int
    folder: str
    random: RandomWeights | None = None


class LaunchStep(msgspec.Struct, frozen=True, tag=True):
    """Do this step; see `StepPlan`."""

    layout: tuple[int, ...]  # the fields of a `Layout`
    starts: tuple[int, ...]
    is_adjusted: bool
    numbers: bytes


class ClearBlocks(msgspec.Struct, frozen=True, tag=True):
    """Zero these blocks."""

    blocks: list[int]


class FreeMemory(msgspec.Struct, frozen=True, tag=True):
    """Give back what torch keeps."""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """To `Lead`, when the part is there, and to `LaunchStep`, when the step was launched; `failure`
    is empty when all went well."""

    failure: str = ""
    is_out_of_memory: bool = False


ToRank = Lead | LaunchStep | ClearBlocks | FreeMemory

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ToRank)


def write(pipe: IO[bytes], message: ToRank) -> None:
    """Put a message into a pipe. Raises `BrokenPipeError` when nobody reads it any more."""
    pipe.write(frame(_encoder.encode(message)))
    pipe.flush()


def read(pipe: IO[bytes]) -> ToRank | None:
    """The next message; None at the pipe's end."""
    data = read_frame(pipe)
    if data is None:
        return None
    message: ToRank = _decoder.decode(data)
    return message
