"""Chat templates: read as transformers reads them, rendered as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from model.chat_rendering import compile_template, render
from model.chat_template import ChatTemplateError, read_chat_template

CHATML = """{% for message in messages %}
{%- if loop.first and message.role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""
HEADERS = """{{- bos_token }}
{%- set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
TOOLS = """{%- if tools %}
{{- 'Tools: ' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
{%- elif tools is not none %}no tools{% endif %}
{%- set ns = namespace(system='', turns=0, last=none) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = ns.system ~ message.content %}{% continue %}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {%- set ns.last = message %}
{%- endfor %}
{%- if ns.system %}[SYS]{{ ns.system | trim }}[/SYS]{% endif %}
{%- for message in messages if message.role != 'system' %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate, got ' ~ message.role) }}
    {%- endif %}
    {%- if message.role == 'user' %}{{ '[INST] ' ~ message.content ~ ' [/INST]' }}
    {%- else %}{% generation %}{{ ' ' ~ message.content ~ eos_token }}{% endgeneration %}
    {%- endif %}
    {%- if loop.index > 50 %}{% break %}{% endif %}
{%- endfor %}
{{- ns.last | tojson(indent=2) }}{{ ns.turns }}{{ documents is none }}{{ pad_token }}"""
MACROS = """{%- macro turn(role, content, end=true) -%}
<{{ role }}>{{ content }}{% if end %}</{{ role }}>{% endif %}
{%- endmacro %}
{%- for message in messages %}
{{ turn(message.role, message.content) }}
{%- if message.name is defined %}({{ message.name }}){% endif %}
{%- endfor %}
{{ messages[-1]['content'].split(' ')[0] | upper }}
{{ messages | map(attribute='role') | join(',') }}
{{ strftime_now('%Y') | length }}{{ dict(a=1).a }}{{ range(3) | list }}
"""
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "tools": TOOLS, "macros": MACROS}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "  Hello <b>&amp;</b> 東京 \U0001f600\n"}],
    "system": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "{{ 1 + 1 }} {% if %}"},
    ],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def ours(source: str, talk: list[dict[str, Any]], max_chars: int = 10_000) -> str:
    return render(compile_template(source), talk, SPECIAL, max_chars=max_chars)


@pytest.mark.parametrize("talk", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_it_renders_what_transformers_renders(source: str, talk: list[dict[str, Any]]) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
    expected = oracle.apply_chat_template(
        talk, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert ours(source, talk) == expected
    assert len(expected) > 20


def test_a_template_may_refuse_a_conversation() -> None:
    talk = [{"role": "assistant", "content": "Hi"}]
    with pytest.raises(ChatTemplateError, match=r"^roles must alternate, got assistant$"):
        ours(TOOLS, talk)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.x.y }}", "has no attribute 'x'"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{{ namespace(__html__=1) }}", "no leading underscores"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'abc' * 5 }}", "more than 10 characters"),
        ("{{ 'a'.__class__.__mro__ }}", "unsafe"),
        ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
    ],
)
def test_what_a_template_may_not_do(source: str, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        ours(source, [{"role": "user", "content": "Hi"}], max_chars=10)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\n{% if %}", "line 2"),
        ("{% include 'x' %}{% nonsense %}", "nonsense"),
        ("{{ " + "-" * 5000 + "1 }}", "RecursionError"),
    ],
)
def test_what_is_no_template(source: str, words: str) -> None:
    with pytest.raises(ChatTemplateError, match=words):
        compile_template(source)


def write(folder: Path, **config: Any) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_where_a_template_is_found(tmp_path: Path) -> None:
    def source(override: Path | None = None) -> str | None:
        found = read_chat_template(tmp_path, override)
        return None if found is None else found.source

    assert source() is None
    write(tmp_path, chat_template="one")
    assert source() == "one"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    write(tmp_path, chat_template=named)
    assert source() == "b"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert source() == "file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert source(tmp_path / "mine.jinja") == "mine"


def test_the_special_tokens_that_a_template_may_name(tmp_path: Path) -> None:
    older = {"bos_token": "<old>", "eos_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(older))
    write(tmp_path, chat_template="x", bos_token={"content": "<s>"}, pad_token=None)
    found = read_chat_template(tmp_path)
    assert found is not None
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (5, "is a int, not a string"),
        ([{"name": "rag", "template": "x"}], "no chat_template is named 'default', only 'rag'"),
        ([], "not of named templates"),
        (["x"], "not of named templates"),
        ("x" * (2**20 + 1), "1048577 bytes; the limit is 1048576"),
    ],
)
def test_what_is_no_template_in_the_config(tmp_path: Path, template: Any, words: str) -> None:
    write(tmp_path, chat_template=template)
    with pytest.raises(ChatTemplateError, match=words):
        read_chat_template(tmp_path)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ChatTemplateError, match="cannot be read"):
        read_chat_template(tmp_path)
