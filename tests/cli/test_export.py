"""`kedit export`: each form from the command line, and what it refuses. What the files hold is tested in tests/export."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from test_commands import FACTS, OPTIONS, home, kedit  # noqa: F401  fixtures

from kedit_jax.checkpoint import read_manifest
from kedit_jax.export import load_delta
from kedit_jax.models import load_model

Kedit = Callable[..., str]


@pytest.fixture
def edited(home: Path, kedit: Kedit) -> Path:  # noqa: F811
    if not (home / "e").exists():
        kedit("edit", "model", "facts.jsonl", "--session", "e", "--corpus", "corpus.txt", *OPTIONS)
    return home


def test_each_form(edited: Path, kedit: Kedit) -> None:  # noqa: F811
    said = kedit("export", "model", "merged", "--session", "e")
    assert "MiB in the dtype it was stored in: " in said
    assert "is lost" not in said
    assert "% of the update is lost in bfloat16" in kedit("export", "model", "half", "--session", "e", "--dtype", "bfloat16")
    original, merged = load_model(edited / "model"), load_model(edited / "merged")
    same = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(original), jax.tree.leaves(merged), strict=True)]
    assert same.count(False) == 1, "the stacked down projections alone"

    assert "delta of 3 facts" in kedit("export", "model", "delta.safetensors", "--session", "e", "--as", "delta")
    assert len(load_delta(edited / "delta.safetensors", original).delta.addresses) == 2

    planned = kedit("export", "model", "adapter", "--session", "e", "--as", "adapter", "--dry-run")
    assert "nothing was written" in planned
    assert not (edited / "adapter").exists()
    assert "LoRA adapter of rank 8" in kedit("export", "model", "adapter", "--session", "e", "--as", "adapter")
    config = json.loads((edited / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (8, 8, True)
    assert len(read_manifest(edited / "e")["facts"]) == len(FACTS)


def test_an_existing_export_is_replaced_only_when_told(edited: Path, kedit: Kedit) -> None:  # noqa: F811
    kedit("export", "model", "twice", "--session", "e")
    assert "twice" in kedit("export", "model", "twice", "--session", "e", status=1)
    kedit("export", "model", "twice", "--session", "e", "--overwrite", "--shard", "20KB")
    assert (edited / "twice" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--as", "zip"), "none of merged, adapter, delta"),
        (("--rank", "8"), "--as merged does not use --rank"),
        (("--as", "delta", "--dtype", "float32"), "--as delta does not use --dtype"),
        (("--shard", "big"), "write it as 5GB"),
        (("--as", "adapter", "--shard", "1GB"), "--as adapter does not use --shard"),
        (("--dtype", "int8"), "int8"),
    ],
)
def test_bad_input(edited: Path, kedit: Kedit, args: tuple[str, ...], words: str) -> None:  # noqa: F811
    assert words in kedit("export", "model", "bad", "--session", "e", *args, status=1)
    assert not (edited / "bad").exists()
