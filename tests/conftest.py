"""Fixtures that several rooms use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Read when a Triton kernel is defined: without a GPU, its interpreter runs it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.interpreter import sum_products_in_order
from tests.servers import Server, running_server

if os.environ.get("TRITON_INTERPRET") == "1":
    sum_products_in_order()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with the bundled model for all tests that leave it as they found it."""
    folder: Path = tmp_path_factory.mktemp("server")
    with running_server(folder, "--threads", "1") as running:
        yield running
