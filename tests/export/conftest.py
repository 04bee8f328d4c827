"""A tiny checkpoint a family, made when it is first asked for, and never written to by a test."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from export_world import FAMILIES, Checkpoint, make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("checkpoints") / name)
        return made[name]

    return get


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint(request.param)


@pytest.fixture
def gpt2(checkpoint: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint("gpt2")


@pytest.fixture(scope="session")
def sharded_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A Llama in bfloat16, in several files with an index."""
    folder = tmp_path_factory.mktemp("checkpoints") / "sharded"
    return make("llama-3.1", folder, dtype=torch.bfloat16, max_shard_size="30KB")
