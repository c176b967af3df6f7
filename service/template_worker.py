"""`python -m service.template_worker`: runs a chat template for the API process.

A template is a program by whoever made the checkpoint, and a Python thread cannot be stopped.
A process can: the kernel ends this one when a rendering takes too long (an alarm without a
handler, which holds even if the API process is gone) and refuses it memory beyond a bound.

Frames of JSON (service/frames.py) go over standard input and output. The first is `Start`,
answered by `Started` or `Refused`; then `Render` by `Rendered` or `Refused`.
It ends when its input does.
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from model.chat_template import ChatTemplateError
from service.frames import frame, read_frame

if TYPE_CHECKING:
    import jinja2

# Messages are at most a request's body, and an answer is at most MAX_RENDERED_CHARS.
MAX_RENDERED_CHARS = 8 * 2**20
MAX_FRAME_BYTES = 64 * 2**20
MAX_MEMORY_BYTES = 512 * 2**20  # of address space, of which the interpreter takes some 40 MiB


class Start(msgspec.Struct, frozen=True, tag=True):
    """The template to run from now on."""

    source: str
    special_tokens: dict[str, str]
    time_limit_s: float  # of compiling, and of each rendering


class Render(msgspec.Struct, frozen=True, tag=True):
    """Messages to make a prompt of."""

    messages: list[dict[str, str]]


class Started(msgspec.Struct, frozen=True, tag=True):
    """The template is compiled. `memory_limited` is False where the system knows no limit."""

    memory_limited: bool


class Rendered(msgspec.Struct, frozen=True, tag=True):
    """The prompt."""

    text: str


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The template is broken, or does not take these messages; and why."""

    reason: str


Question = Start | Render
Answer = Started | Rendered | Refused

encode = msgspec.json.encode
question_decoder = msgspec.json.Decoder(Question)
answer_decoder = msgspec.json.Decoder(Answer)


def framed(message: Question | Answer) -> bytes:
    """A message as a frame. Raises `ValueError` (of which `UnicodeEncodeError` is one) when it
    has text that is no Unicode."""
    return frame(encode(message))


def main() -> int:
    """Answer until the input ends."""
    # Jinja comes in before the limits do; the API process imports this module without it.
    from model.chat_rendering import compile_template

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the API process decides when this one ends
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default is to end
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    memory_limited = _limit_memory()
    start = _receive(incoming)
    if not isinstance(start, Start):
        return 1
    signal.setitimer(signal.ITIMER_REAL, start.time_limit_s)
    try:
        template = compile_template(start.source)
    except ChatTemplateError as error:
        _send(outgoing, Refused(str(error)))
        return 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    _send(outgoing, Started(memory_limited))
    while isinstance(question := _receive(incoming), Render):
        signal.setitimer(signal.ITIMER_REAL, start.time_limit_s)
        answer = _answer(template, question, start.special_tokens)
        signal.setitimer(signal.ITIMER_REAL, 0)
        outgoing.write(answer)
        outgoing.flush()
    return 0


def _answer(template: jinja2.Template, question: Render, special_tokens: dict[str, str]) -> bytes:
    from model.chat_rendering import render

    messages: list[dict[str, Any]] = list(question.messages)
    try:
        text = render(template, messages, special_tokens, max_chars=MAX_RENDERED_CHARS)
        return framed(Rendered(text))
    except ChatTemplateError as error:
        return framed(Refused(str(error).encode("utf-8", "replace").decode()))
    except UnicodeEncodeError:
        return framed(Refused("it writes text that is no valid Unicode"))


def _limit_memory() -> bool:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        return False
    return True


def _receive(stream: BinaryIO) -> Question | None:
    """The next question; None at the end of the input."""
    data = read_frame(stream)
    return None if data is None else question_decoder.decode(data)


def _send(stream: BinaryIO, message: Answer) -> None:
    stream.write(framed(message))
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
