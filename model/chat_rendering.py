"""Run a chat template: Jinja in its immutable sandbox, with what transformers gives to templates.

The names that a template may use (raise_exception, strftime_now, tojson without HTML escapes,
break and continue, {% generation %}) are the ones that published templates are written for;
tests compare with transformers' own rendering.

The sandbox keeps a template from reaching Python's insides. It does not bound its time or its
memory: call this in a process that can be killed (service/template_worker.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils
from jinja2.exceptions import SecurityError

from model.chat_template import ChatTemplateError

_MAX_REASON_CHARS = 300


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} marks what the model says, for training; here its
    contents are text like any other."""

    tags = {"generation"}  # noqa: RUF012 - the name and the type are Jinja's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's, without names that mean something to Python itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def compile_template(source: str) -> jinja2.Template:
    """Raises `ChatTemplateError` with the line when it is no valid template."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(_short(f"line {error.lineno}: {error.message}")) from error
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        raise ChatTemplateError(_short(f"{type(error).__name__}: {error}")) from error


def render(
    template: jinja2.Template,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    *,
    max_chars: int,
) -> str:
    """The prompt for these messages, up to where the assistant's next one begins.

    Raises `ChatTemplateError`: the template refuses the messages, breaks on them, or writes more
    than `max_chars` characters.
    """
    variables = {
        **special_tokens,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    pieces: list[str] = []
    num_chars = 0
    try:
        for piece in template.generate(variables):
            num_chars += len(piece)
            if num_chars > max_chars:
                raise ChatTemplateError(f"it writes more than {max_chars} characters")
            pieces.append(piece)
    except ChatTemplateError:
        raise
    except jinja2.TemplateError as error:
        raise ChatTemplateError(_short(error.message or type(error).__name__)) from error
    except MemoryError as error:
        raise ChatTemplateError("it takes too much memory") from error
    except Exception as error:  # whatever its expressions can raise
        raise ChatTemplateError(_short(f"{type(error).__name__}: {error}")) from error
    return "".join(pieces)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace has no {name!r}: no leading underscores")


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_REASON_CHARS else line[:_MAX_REASON_CHARS] + "..."
