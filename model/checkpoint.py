"""Open a checkpoint directory, check it, and fill the module.

The module is built on the meta device, where parameters have a shape and no memory; each
one is then allocated on its device in its dtype and filled from the mapped file. At no
time is there more than about one tensor beside the weights.

Every tensor of the checkpoint must be asked for, every parameter must be there in the
shape the config says, and every number must be finite. Two exceptions: buffers that early
releases saved (rotary frequencies, GPT-2's causal mask), and, with tied embeddings, an
`lm_head.weight` that equals the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from torch import Tensor

from model.checkpoint_files import (
    CheckpointError,
    CheckpointInfo,
    bundled_checkpoint,
    find_weights,
    one_line,
    read_checkpoint_info,
)
from model.checkpoint_tensors import Tensors, open_tensors
from model.config import ConfigError, ModelConfig
from model.families import Source
from model.parallel import HEAD, Group, cut, empty_part, put
from model.transformer import Transformer

__all__ = ["Checkpoint", "CheckpointError", "bundled_checkpoint", "load_checkpoint"]

EMBEDDING = "embedding.weight"
ROWS = 4096  # compared at once, to make no second tensor of an embedding's size


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model ready to run: in eval mode, on its device, taking no gradients."""

    model: Transformer
    config: ModelConfig
    directory: Path
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None


def load_checkpoint(
    directory: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    max_positions: int | None = None,
    progress: bool = False,
    after_tensor: Callable[[], None] | None = None,
    group: Group | None = None,
) -> Checkpoint:
    """The model in `directory`.

    All parameters get one `dtype`; None is the one the token embedding is stored in.
    `max_positions` bounds the position tables (default: the config's). `progress` draws a
    bar on stderr. `after_tensor` is called after each parameter. With a `group` it is this
    process's part of the model, cut tensor by tensor on the CPU; `config` is still the whole's.

    Raises `CheckpointError`, whose message is one line naming the file, tensor or field and
    the values at odds, when a file is missing, truncated or malformed; when the config asks
    for what is not supported; when a tensor is missing, unknown, of another shape than the
    config says, quantized, or holds a NaN or an infinity.
    """
    info = read_checkpoint_info(directory)
    with open_tensors(find_weights(directory)) as tensors:
        sources = _match_names(info, tensors)
        # Shapes first, on a module whose position tables have one row: a corrupt head_dim
        # must not allocate tables for a context of that width.
        whole = _build(info.config, 1)
        _check_shapes(whole, sources, tensors)
        model = _build(info.config, max_positions, group)
        dtype = dtype or tensors.dtype(sources[EMBEDDING].names[0])
        total_bytes = sum(_stored_bytes(source, tensors) for source in sources.values())
        with _bar(total_bytes, visible=progress) as advance:
            for name, source in sources.items():
                filled_on = device if group is None else "cpu"
                filled = _fill(name, whole.get_parameter(name), source, tensors, filled_on, dtype)
                if group is not None:
                    if name == EMBEDDING and info.config.tie_embeddings:
                        put(model, HEAD, cut(HEAD, filled, info.config, group).to(device))
                    filled = cut(name, filled, info.config, group).to(device)
                put(model, name, filled)
                advance(_stored_bytes(source, tensors))
                if after_tensor is not None:
                    after_tensor()
        if info.config.tie_embeddings:
            if group is None:
                model.lm_head.weight = model.embedding.weight
            _check_tied(sources[EMBEDDING].names[0], tensors)
    model.place_position_tables(device)
    return Checkpoint(
        model=model.eval(),
        config=info.config,
        directory=directory,
        dtype=dtype,
        eos_token_ids=info.tokens.eos_token_ids,
        bos_token_id=info.tokens.bos_token_id,
    )


def _build(
    config: ModelConfig, max_positions: int | None, group: Group | None = None
) -> Transformer:
    """The module without memory for its parameters."""
    try:
        if group is not None:
            return empty_part(config, group, max_positions)
        with torch.device("meta"):
            return Transformer(config, max_positions=max_positions)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    except (RuntimeError, OverflowError) as error:  # products of sizes beyond 2^63
        raise CheckpointError(f"no such model can be built ({one_line(error)})") from error


def _match_names(info: CheckpointInfo, tensors: Tensors) -> dict[str, Source]:
    """Where each of our parameters comes from; every tensor must have a place."""
    config, family = info.config, info.family
    sources = family.sources(config, family.prefix(tensors.names))
    wanted = [name for source in sources.values() for name in source.names]
    missing = [name for name in wanted if name not in tensors.names]
    if missing:
        raise CheckpointError(
            f"{info.directory}: {_some(missing)} missing; a {family.model_type} of "
            f"{config.num_layers} layers{' with untied embeddings' * (HEAD in missing)} has "
            f"{len(wanted)} tensors, {len(wanted) - len(missing)} of them are there"
        )
    extra = sorted(
        name
        for name in tensors.names.difference(wanted)
        if not family.harmless_tensors.fullmatch(name)
        and not (config.tie_embeddings and name == HEAD)
    )
    if extra:
        raise CheckpointError(
            f"{info.directory}: {_some(extra)} unknown; nothing in a {family.model_type} of "
            f"{config.num_layers} layers as its config describes it has this name"
        )
    return sources


def _some(names: list[str]) -> str:
    """The first name and how many more."""
    if len(names) == 1:
        return f"tensor {names[0]} is"
    return f"tensor {names[0]} and {len(names) - 1} more are"


def _check_shapes(model: Transformer, sources: dict[str, Source], tensors: Tensors) -> None:
    """Each source must have exactly its share of the parameter's shape, in a known dtype."""
    for name, source in sources.items():
        whole = tuple(model.get_parameter(name).shape)
        for published, rows in zip(source.names, source.rows or whole[:1], strict=True):
            expected = (rows, *whole[1:])
            if source.transposed:
                expected = expected[::-1]
            shape = tensors.shape(published)
            if shape != expected:
                raise CheckpointError(
                    f"tensor {published} has shape {shape}, the config says {expected}"
                )
            tensors.dtype(published)


def _fill(
    name: str,
    parameter: Tensor,
    source: Source,
    tensors: Tensors,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Tensor:
    """The parameter's memory on `device`, filled from its sources and checked."""
    filled = torch.empty(parameter.shape, dtype=dtype, device=device)
    parts = torch.split(filled, list(source.rows or filled.shape[:1]))
    for part, published in zip(parts, source.names, strict=True):
        stored = tensors.read(published)
        part.copy_(stored.t() if source.transposed else stored)
        if not _all_finite(part):
            raise CheckpointError(_not_finite(published, stored, part, name))
    return filled


def _all_finite(tensor: Tensor) -> bool:
    """One pass and no second tensor: the extremes show every infinity and pass on NaN."""
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def _not_finite(published: str, stored: Tensor, part: Tensor, name: str) -> str:
    nan, infinite = int(stored.isnan().sum()), int(stored.isinf().sum())
    if nan or infinite:
        return (
            f"tensor {published} holds {nan} NaN and {infinite} infinite of {stored.numel()} values"
        )
    too_large = int(part.isinf().sum())
    return (
        f"tensor {published} holds {too_large} of {stored.numel()} values beyond "
        f"{torch.finfo(part.dtype).max:g}, the largest of {part.dtype} ({name})"
    )


def _check_tied(embedding: str, tensors: Tensors) -> None:
    """A checkpoint of tied embeddings may repeat the embedding as its head, not differ."""
    if HEAD not in tensors.names:
        return
    if tensors.shape(HEAD) != tensors.shape(embedding):
        raise CheckpointError(
            f"tie_word_embeddings is true, but tensor {HEAD} has shape {tensors.shape(HEAD)} "
            f"and {embedding} {tensors.shape(embedding)}"
        )
    head, table = tensors.read(HEAD), tensors.read(embedding)
    pieces = zip(torch.split(head, ROWS), torch.split(table, ROWS), strict=True)
    different = sum(int((ours != theirs).sum()) for ours, theirs in pieces)
    if different:
        raise CheckpointError(
            f"tie_word_embeddings is true, but tensor {HEAD} differs from {embedding} in "
            f"{different} of {head.numel()} values"
        )


def _stored_bytes(source: Source, tensors: Tensors) -> int:
    return sum(
        torch.Size(tensors.shape(name)).numel() * tensors.dtype(name).itemsize
        for name in source.names
    )


@contextmanager
def _bar(total_bytes: int, *, visible: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr; yields what advances it by a number of bytes."""
    columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not visible) as progress:
        task = progress.add_task("loading", total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)
