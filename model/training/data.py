"""Stories in, token ids out.

A corpus is UTF-8 text, perhaps gzip-compressed, each story followed by a line `<|endoftext|>`
(model/training/data/README.md says where it comes from and under which licence).
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
CORPUS = Path(__file__).parent / "data"
TRAINING_FILE = CORPUS / "tinystories.txt.gz"
HELD_OUT_FILE = CORPUS / "tinystories.valid.txt.gz"


def read_stories(path: Path) -> list[str]:
    """The stories of a corpus file, without their separators."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    return [story.strip("\n") for story in text.split(END_OF_TEXT) if story.strip()]


def train_tokenizer(stories: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (every UTF-8 text has ids); id 0 is the end of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return tokenizer


def encode_stories(tokenizer: Tokenizer, stories: list[str]) -> list[list[int]]:
    """Each story as end-of-text, its tokens, end-of-text: the first is the context from
    which the opening is predicted."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"the tokenizer has no {END_OF_TEXT} token")
    return [[end, *encoding.ids, end] for encoding in tokenizer.encode_batch(stories)]


def one_stream(encoded: list[list[int]]) -> Int[Tensor, " num_tokens"]:
    """All stories in a row, one end-of-text between two."""
    parts = [np.asarray(ids[:-1], dtype=np.int64) for ids in encoded]
    return torch.from_numpy(np.concatenate(parts))


def epoch_windows(
    stream: Int[Tensor, " num_tokens"], context: int, generator: torch.Generator
) -> Int[Tensor, "num_windows context_plus_1"]:
    """Cut the stream into windows of context + 1 tokens (inputs and shifted targets
    overlap by one), from a random offset and in random order: no epoch repeats another's."""
    offset = int(torch.randint(context, (1,), generator=generator))
    windows = stream[offset:].unfold(0, context + 1, context)
    return windows[torch.randperm(windows.shape[0], generator=generator)]
