"""Names to directories, against a small hub on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from model.checkpoint_files import bundled_checkpoint
from model.hub import HubError, resolve_model
from model.tokenizer import Tokenizer
from tests.model.fake_hub import FakeHub, serve

TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
REPOSITORIES = {
    "org/tiny": {
        "main": {
            "config.json": b'{"at": "main"}',
            "generation_config.json": b"{}",
            "model.safetensors": b"weights",
            "pytorch_model.bin": b"the same, pickled",
            "modeling_tiny.py": b"raise SystemExit",
            "README.md": b"text",
            "consolidated.safetensors": b"the same once more",
            "onnx/config.json": b"{}",
            "original/model.safetensors": b"and again",
            **TOKENIZER,
        },
        "v2": {"config.json": b'{"at": "v2"}', "model.safetensors": b"others", **TOKENIZER},
    },
    "org/sharded": {
        "main": {
            "config.json": b"{}",
            "model-00001-of-00002.safetensors": b"1",
            "model-00002-of-00002.safetensors": b"2",
            "model.safetensors.index.json": (
                b'{"weight_map": {"a": "model-00001-of-00002.safetensors",'
                b' "b": "model-00002-of-00002.safetensors"}}'
            ),
        }
    },
    "org/pickled": {"main": {"config.json": b"{}", "pytorch_model.bin": b"pickle"}},
    "org/gpt2": {
        "main": {
            "config.json": b"{}",
            "model.safetensors": b"weights",
            "vocab.json": b'{"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}',
            "merges.txt": b"#version: 0.2\na b\n",
        }
    },
    "org/empty": {"main": {"config.json": b"{}", "model.gguf": b"another format"}},
    "org/gated": {"main": {"config.json": b"{}"}},
}


@pytest.fixture(autouse=True)
def _no_progress_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serve(FakeHub(REPOSITORIES, gated=frozenset({"org/gated"}))) as running:
        yield running


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_no_name_is_the_bundled_checkpoint() -> None:
    if bundled_checkpoint().is_dir():
        assert resolve_model(None) == bundled_checkpoint()
    else:
        with pytest.raises(HubError, match="no bundled checkpoint"):
            resolve_model(None)


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_fetches_data_and_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    directory = resolve_model("org/tiny", endpoint=hub.url, cache_dir=tmp_path)
    assert names(directory) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        *TOKENIZER,
    }
    assert (directory / "config.json").read_bytes() == b'{"at": "main"}'
    assert not set(hub.fetched) & {"modeling_tiny.py", "pytorch_model.bin"}


def test_fetches_the_revision_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    directory = resolve_model("org/tiny", "v2", endpoint=hub.url, cache_dir=tmp_path)
    assert (directory / "config.json").read_bytes() == b'{"at": "v2"}'
    commit = hub.commit("org/tiny", "v2")
    assert resolve_model("org/tiny", commit, endpoint=hub.url, cache_dir=tmp_path) == directory


def test_fetches_every_shard(hub: FakeHub, tmp_path: Path) -> None:
    directory = resolve_model("org/sharded", endpoint=hub.url, cache_dir=tmp_path)
    assert names(directory) == set(REPOSITORIES["org/sharded"]["main"])


def test_fetches_pickles_only_where_there_is_nothing_else(hub: FakeHub, tmp_path: Path) -> None:
    directory = resolve_model("org/pickled", endpoint=hub.url, cache_dir=tmp_path)
    assert names(directory) == {"config.json", "pytorch_model.bin"}


def test_a_complete_download_needs_no_network_any_more(hub: FakeHub, tmp_path: Path) -> None:
    directory = resolve_model("org/tiny", "v2", endpoint=hub.url, cache_dir=tmp_path)
    nowhere = f"http://127.0.0.1:{unused_port()}"
    assert resolve_model("org/tiny", "v2", endpoint=nowhere, cache_dir=tmp_path) == directory


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("org/absent", None, "org/absent: no such directory, and no such repository on the hub"),
        ("org/tiny", "v9", "org/tiny has no revision v9"),
        ("org/gated", None, "org/gated is gated: accept its terms on the hub and set HF_TOKEN"),
        ("org/empty", None, "org/empty holds no weights that can be read"),
        ("org/--bad", None, "'org/--bad' is no name of a hub repository"),
        ("tiny", None, "'tiny' is neither a directory nor the org/name of a hub repository"),
        ("or g/tiny", None, "'or g/tiny' is neither"),
        ("", None, "'' is neither"),
        ("./org/tiny", None, "./org/tiny: no such directory"),
        ("/no/such", None, "/no/such: no such directory"),
        ("~/models", None, "~/models: no such directory"),
        ("models/tiny/", None, "models/tiny/: no such directory"),
        ("runs/tiny/last", None, "runs/tiny/last: no such directory"),
    ],
)
def test_says_in_one_line_why_there_is_no_model(
    hub: FakeHub, tmp_path: Path, model: str, revision: str | None, message: str
) -> None:
    with pytest.raises(HubError) as caught:
        resolve_model(model, revision, endpoint=hub.url, cache_dir=tmp_path)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(HubError, match="is a file; name the directory it lies in"):
        resolve_model(str(path))


def test_a_directory_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(HubError, match="revision v2 was given, but only a hub model has"):
        resolve_model(str(tmp_path), "v2")


def test_without_a_network_says_so(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{unused_port()}"
    with pytest.raises(HubError, match=r"^org/tiny is not in the local cache.*Connect") as caught:
        resolve_model("org/tiny", endpoint=nowhere, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_follows_the_librarys_environment_and_imports_no_torch(
    hub: FakeHub, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "from model.hub import resolve_model\n"
        "print(resolve_model('org/tiny', 'v2'))\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    assert (directory / "config.json").read_bytes() == b'{"at": "v2"}'


def unused_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def test_a_tokenizer_of_vocabulary_and_merges_comes_along(hub: FakeHub, tmp_path: Path) -> None:
    """GPT-2's layout, without a tokenizer.json."""
    directory = resolve_model("org/gpt2", endpoint=hub.url, cache_dir=tmp_path)
    assert Tokenizer.from_directory(directory).encode("aba") == [2, 0]
