"""Checkpoints of the shapes in Hugging Face format: random weights made with transformers, or
a copy of the bundled model; float32 or as bundled, each contender casts to the dtype asked for.
"""

from __future__ import annotations

import itertools
import json
import shutil
import string
from pathlib import Path

from loadtests.peers.shapes import Shape

END_OF_TEXT = "<|endoftext|>"
BUNDLED_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


def make(shape: Shape, target: Path) -> None:
    """Write the checkpoint of a shape into the new folder `target`."""
    if shape.bundled is None:
        _random_weights(shape, target)
        (target / "tokenizer.json").write_text(json.dumps(tokenizer_of(shape.vocab_size)))
    else:
        target.mkdir(parents=True)
        for name in BUNDLED_FILES:
            shutil.copyfile(shape.bundled / name, target / name)
    # The converters of some peers want to know the class of the tokenizer.
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (target / "tokenizer_config.json").write_text(json.dumps(config))


def _random_weights(shape: Shape, target: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {k: v for k, v in shape.config.items() if k != "model_type"}
    if "n_positions" in fields:
        fields["n_ctx"] = fields["n_positions"]  # llama.cpp's converter reads this one
    model_type = str(shape.config["model_type"])
    config = AutoConfig.for_model(model_type, **fields, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(target)


def tokenizer_of(vocab_size: int) -> dict[str, object]:
    """A valid byte-level BPE of exactly so many tokens: end of text, the bytes, then words of
    two, three and four letters, each merged from the word before its last letter."""
    tokens = [END_OF_TEXT, *_byte_letters()]
    merges = []
    words = (
        "".join(letters)
        for length in (2, 3, 4)
        for letters in itertools.product(string.ascii_lowercase, repeat=length)
    )
    for word in itertools.islice(words, vocab_size - len(tokens)):
        tokens.append(word)
        merges.append([word[:-1], word[-1]])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": 0,
                "content": END_OF_TEXT,
                "special": True,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level | {"use_regex": True},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def _byte_letters() -> list[str]:
    """The printable letters by which byte-level BPE writes the 256 bytes (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
