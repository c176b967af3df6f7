"""From what a user calls a model to a directory: nothing, a directory, or a repository of
the Hugging Face hub.

Only data is fetched: configs, tokenizer files and weights, never code. Pickled weights are
fetched only from a repository that has no others.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from model.checkpoint_files import CheckpointError, bundled_checkpoint, find_weights, one_line

# What model/checkpoint_files.py and the tokenizer read; the same names in subfolders are
# other formats.
DESCRIPTION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SAFETENSORS_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
IN_SUBFOLDERS = "*/*"

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# The HTTP client's own errors, which pass through where the hub library does not catch
# them: its exceptions derive from them, and which client it is depends on its version.
_DOWNLOAD_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)),
)


class HubError(CheckpointError):
    """A model name leads to no directory; one line saying why."""


def resolve_model(
    model: str | None,
    revision: str | None = None,
    *,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
) -> Path:
    """The directory of a model.

    None is the bundled checkpoint; an existing directory is itself; `org/name` is a
    repository of the hub at `revision` (a branch, tag or commit; default: its main branch),
    downloaded into huggingface_hub's cache, and found there without a network once it is
    complete. `endpoint` and `cache_dir` default to the library's own (HF_ENDPOINT, HF_HOME).

    Raises `HubError`: no such directory or repository or revision, no access, no network, a
    malformed name, a repository without weights, or a revision of what has none.
    """
    # The path of the empty string is the working directory, which nobody meant.
    if model is None or (model and Path(model).is_dir()):
        if revision is not None:
            raise HubError(f"revision {revision} was given, but only a hub model has revisions")
        return Path(model) if model is not None else _bundled()
    _check_name(model)
    directory = _download(model, revision, SAFETENSORS_FILES, endpoint, cache_dir)
    if _has_weights(directory):
        return directory
    directory = _download(model, revision, PICKLE_FILES, endpoint, cache_dir)
    if _has_weights(directory):
        return directory
    raise HubError(
        f"{model} holds no weights that can be read "
        f"(looked for {SAFETENSORS_FILES[0]} and {PICKLE_FILES[0]}, whole or in shards)"
    )


def _bundled() -> Path:
    directory = bundled_checkpoint()
    if not directory.is_dir():
        raise HubError("no model was named, and this installation has no bundled checkpoint")
    return directory


def _check_name(model: str) -> None:
    if Path(model).is_file():
        raise HubError(f"{model} is a file; name the directory it lies in")
    looks_like_path = model.startswith((".", "/", "~")) or model.endswith("/")
    if looks_like_path or model.count("/") > 1 or (os.sep != "/" and os.sep in model):
        raise HubError(f"{model}: no such directory")
    if not _REPOSITORY.fullmatch(model):
        raise HubError(f"{model!r} is neither a directory nor the org/name of a hub repository")


def _has_weights(directory: Path) -> bool:
    try:
        find_weights(directory)
    except CheckpointError:
        # A broken index counts as weights: loading will say what is wrong with it.
        return any(directory.glob("*.index.json"))
    return True


def _download(
    model: str,
    revision: str | None,
    weights: tuple[str, ...],
    endpoint: str | None,
    cache_dir: Path | None,
) -> Path:
    at = f" at revision {revision}" if revision else ""
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=[*DESCRIPTION_FILES, *weights],
                ignore_patterns=[IN_SUBFOLDERS],
                endpoint=endpoint,
                cache_dir=cache_dir,
            )
        )
    except HFValidationError as error:
        raise HubError(f"{model!r} is no name of a hub repository ({one_line(error)})") from error
    except GatedRepoError as error:
        raise HubError(f"{model} is gated: accept its terms on the hub and set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{model}: no such directory, and no such repository on the hub "
            "(a private one needs HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{model} has no revision {revision}") from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        reason = f"{type(cause).__name__}: {one_line(cause)}" if cause else "offline mode is set"
        raise HubError(
            f"{model}{at} is not in the local cache, and the hub does not answer ({reason})"
        ) from error
    except _DOWNLOAD_ERRORS as error:
        raise HubError(
            f"{model}{at} could not be downloaded ({type(error).__name__}: {one_line(error)})"
        ) from error
