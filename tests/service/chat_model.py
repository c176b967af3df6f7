"""The bundled checkpoint with a chat template, which it does not have itself."""

from __future__ import annotations

import json
from pathlib import Path

from model.checkpoint_files import bundled_checkpoint

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' and loop.first %}"
    "{{ raise_exception('the user speaks first') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_chat_model(folder: Path) -> Path:
    """A checkpoint directory with `TEMPLATE` in its tokenizer_config.json."""
    directory = folder / "chatty"
    directory.mkdir()
    for file in bundled_checkpoint().iterdir():
        (directory / file.name).symlink_to(file)
    config = {"bos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def rendered(*messages: tuple[str, str]) -> str:
    """What `TEMPLATE` makes of (role, content) pairs, without the BOS."""
    return "".join(f"{role}: {content}\n" for role, content in messages) + "assistant: "
