"""What the engine process tells the processes that have the other parts of its model.

One pipe to each, its standard input: its end is the end of the process. A message is its length in
four bytes, native, and a msgspec struct as MessagePack; a step's numbers go as they lie in memory.
Upward goes a line of JSON for the part and for each step: that it is there, or why not.
"""

from __future__ import annotations

import struct
from typing import IO

import msgspec

from model.config import ModelConfig
from service.engine.messages import EngineConfig

_LENGTH = struct.Struct("=I")


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
    data = _encoder.encode(message)
    pipe.write(_LENGTH.pack(len(data)) + data)
    pipe.flush()


def read(pipe: IO[bytes]) -> ToRank | None:
    """The next message; None at the pipe's end."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = pipe.read(length)
    if len(data) < length:
        return None
    message: ToRank = _decoder.decode(data)
    return message
