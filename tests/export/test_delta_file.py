"""A delta on disk: read back bit for bit, for its own model only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from export_world import snapshot
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from kedit_jax.delta import Dense, EditDelta, LowRank, apply_edits
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import ExportError
from kedit_jax.export import delta_of, load_delta, save_delta
from kedit_jax.models import down_kernel_address, load_model, model_fingerprint

MIXED = {
    down_kernel_address(2): Dense(np.random.default_rng(0).normal(size=(45, 35))),
    down_kernel_address(0): LowRank(np.ones((45, 2), np.float32), np.full((2, 35), 1 / 3, np.float32)),
    down_kernel_address(1): Dense(jnp.full((45, 35), 1 / 3, jnp.bfloat16)),
}


def same(first: Any, second: Any) -> bool:
    return first.dtype == second.dtype and np.asarray(first).tobytes() == np.asarray(second).tobytes()


def test_read_back_bit_for_bit(gpt2, tmp_path):
    edited = delta_of(gpt2.model, EditDelta(MIXED))
    assert save_delta(edited, tmp_path / "delta.safetensors") == tmp_path / "delta.safetensors"
    loaded = load_delta(tmp_path / "delta.safetensors", gpt2.model)
    assert loaded.delta.addresses == edited.delta.addresses
    assert (loaded.config, loaded.fingerprint, loaded.dtype) == (edited.config, edited.fingerprint, edited.dtype)
    for address, update in edited.delta.updates.items():
        again = loaded.delta[address]
        assert type(again) is type(update)
        parts = ("left", "right") if isinstance(update, LowRank) else ("update",)
        assert all(same(getattr(update, part), getattr(again, part)) for part in parts)
    applied = apply_edits(gpt2.model, loaded.delta)
    assert model_fingerprint(applied) == model_fingerprint(apply_edits(gpt2.model, edited.delta))


def test_others_can_read_it(gpt2, tmp_path):
    """Plain safetensors, whose metadata say what it is."""
    save_delta(gpt2.edited, tmp_path / "delta.safetensors")
    names = load_file(tmp_path / "delta.safetensors")
    assert set(names) == {"layers.mlp.down.kernel[0]/update", *(f"layers.mlp.down.kernel[2]/{x}" for x in ("left", "right"))}
    with safe_open(tmp_path / "delta.safetensors", framework="numpy") as file:
        about = file.metadata()
    assert about["format"] == "kedit_jax delta 1"
    assert about["model"] == model_fingerprint(gpt2.model)
    assert json.loads(about["addresses"]) == list(gpt2.edited.delta.addresses)
    assert json.loads(about["config"])["model_type"] == "gpt2"


def test_every_family_keeps_its_configuration(family, tmp_path):
    save_delta(family.edited, tmp_path / "delta")
    assert load_delta(tmp_path / "delta", family.model).config == family.model.config


def test_a_session(history: list[EditSession], tmp_path):
    session = history[-1]
    save_delta(session, tmp_path / "delta")
    loaded = load_delta(tmp_path / "delta", session.base)
    assert all(same(loaded.delta[address].update, update.update) for address, update in session.delta.updates.items())
    assert model_fingerprint(apply_edits(session.base, loaded.delta)) == model_fingerprint(session.model)
    with pytest.raises(ExportError, match="belongs to another model"):
        load_delta(tmp_path / "delta", session.model)


def test_another_model_is_refused(gpt2, checkpoint, tmp_path):
    save_delta(gpt2.edited, tmp_path / "delta")
    with pytest.raises(ExportError, match=r"another model:\n  - family.*gpt2, given is qwen2\n  - down.*\n  - weights"):
        load_delta(tmp_path / "delta", checkpoint("qwen2").model)
    with pytest.raises(ExportError, match="dtype: the edited model has float32, given is float16"):
        load_delta(tmp_path / "delta", load_model(gpt2.directory, dtype=jnp.float16))
    assert load_delta(tmp_path / "delta").fingerprint == gpt2.edited.fingerprint


def test_damaged_and_foreign_files(gpt2, tmp_path):
    path = save_delta(gpt2.edited, tmp_path / "delta")
    whole = path.read_bytes()
    with pytest.raises(ExportError, match="there is no file"):
        load_delta(tmp_path / "nothing")
    for number, damaged in enumerate((whole[:-1], whole[:40], b"", whole[:-3] + b"abc")):
        (tmp_path / str(number)).write_bytes(damaged)
        with pytest.raises(ExportError, match="is no delta that `save_delta` wrote, or is damaged"):
            load_delta(tmp_path / str(number))
    with pytest.raises(ExportError, match="is no delta"):
        load_delta(gpt2.directory / "model.safetensors")
    save_file({"a": np.zeros(3)}, tmp_path / "newer", metadata={"format": "kedit_jax delta 2"})
    with pytest.raises(ExportError, match="holds a 'kedit_jax delta 2', but read here is 'kedit_jax delta 1'; upgrade"):
        load_delta(tmp_path / "newer")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "killed"])
def test_a_failure_leaves_what_was_there(gpt2, tmp_path, monkeypatch, error):
    from kedit_jax.export import delta_file

    save_delta(gpt2.edited, tmp_path / "delta")
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match=r"exists: give another name, or pass overwrite=True \(--overwrite\)"):
        save_delta(gpt2.edited, tmp_path / "delta")
    with pytest.raises(ExportError, match="is a folder: give the name of a file"):
        save_delta(gpt2.edited, tmp_path, overwrite=True)

    def fail(path: Path, _: Any) -> None:
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(delta_file, "write_content", fail)
    for name, overwrite in (("new", False), ("delta", True)):
        with pytest.raises((ExportError, KeyboardInterrupt)):
            save_delta(gpt2.edited, tmp_path / name, overwrite=overwrite)
        assert snapshot(tmp_path) == before
    monkeypatch.undo()
    save_delta(delta_of(gpt2.model, EditDelta(MIXED)), tmp_path / "delta", overwrite=True)
    assert load_delta(tmp_path / "delta").delta.addresses == tuple(MIXED)
    assert [path.name for path in tmp_path.iterdir()] == ["delta"]


@pytest.mark.parametrize("kind", ["model", "text", "empty", "damaged"])
def test_only_a_delta_is_replaced(gpt2, tmp_path, kind):
    path = save_delta(gpt2.edited, tmp_path / "file")
    model = (gpt2.directory / "model.safetensors").read_bytes()
    path.write_bytes(
        {"model": model, "text": b"a thesis of many words", "empty": b"", "damaged": path.read_bytes()[:-1]}[kind]
    )
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match="file is no earlier export and is not replaced: give another name"):
        save_delta(gpt2.edited, path, overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("target", ["delta", "missing"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_symbolic_links_are_neither_followed_nor_replaced(gpt2, tmp_path, target, overwrite):
    save_delta(gpt2.edited, tmp_path / "delta")
    (tmp_path / "link").symlink_to(tmp_path / target)
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match="link is a symbolic link, which is neither followed nor replaced"):
        save_delta(delta_of(gpt2.model, EditDelta(MIXED)), tmp_path / "link", overwrite=overwrite)
    assert snapshot(tmp_path) == before
    assert (tmp_path / "link").is_symlink()


def test_a_delta_of_another_version_is_replaced(gpt2, tmp_path):
    save_file({"a": np.zeros(3)}, tmp_path / "delta", metadata={"format": "kedit_jax delta 2"})
    save_delta(gpt2.edited, tmp_path / "delta", overwrite=True)
    assert load_delta(tmp_path / "delta").delta.addresses == gpt2.edited.delta.addresses
