"""Merged checkpoints: what transformers loads is the edited model, and nothing but the edited kernels differs."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from editing_world import random_model
from export_world import (
    LAYERS,
    TOLERANCE,
    jax_logits,
    prompts,
    random_delta,
    raw_tensors,
    read_json,
    snapshot,
    torch_logits,
    torch_model,
)
from safetensors.numpy import load_file, save_file

from kedit_jax.delta import EditDelta, apply_edits, read_kernels
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import CheckpointError, ExportError, NonFiniteError
from kedit_jax.export import Merged, ModelDelta, delta_of, export_merged
from kedit_jax.export.staging import MANIFEST
from kedit_jax.export.tensors import read_content
from kedit_jax.models import (
    down_kernel_address,
    gpt2_config,
    load_model,
    load_tokenizer,
    loading,
    model_fingerprint,
    named_parameters,
    save_model,
)

DOWN = "model.layers.{}.mlp.down_proj.weight"


def test_transformers_loads_the_edited_model(family, tmp_path, record_property):
    export_merged(family.directory, family.edited, tmp_path / "out")
    tokens = prompts(family.model)
    expected = jax_logits(family.edited_model, tokens)
    difference = np.abs(torch_logits(torch_model(tmp_path / "out"), tokens) - expected).max()
    record_property("logits", float(difference))
    assert difference <= TOLERANCE
    assert np.abs(jax_logits(family.model, tokens) - expected).max() > 1e-2, "the edits show"
    assert model_fingerprint(load_model(tmp_path / "out")) == model_fingerprint(family.edited_model)


def test_only_the_edited_bytes_differ(sharded_bfloat16, tmp_path):
    """Of files, headers and index, too."""
    source, out = sharded_bfloat16.directory, tmp_path / "out"
    done = export_merged(source, sharded_bfloat16.edited, out)
    before, after = snapshot(source), snapshot(out)
    assert set(before) - set(after) == {"README.md", "modeling.py"}
    del after[MANIFEST]
    assert set(after) <= set(before)
    different = {name for name in after if before[name] != after[name]}
    index = read_json(source / "model.safetensors.index.json")["weight_map"]
    edited = {DOWN.format(layer) for layer in LAYERS}
    assert different == {index[name] for name in edited}
    assert len(set(index.values())) > 2
    assert done.files == tuple(sorted(set(index.values())))
    for name in different:
        assert len(before[name]) == len(after[name])
        changed = np.flatnonzero(np.frombuffer(before[name], np.uint8) != np.frombuffer(after[name], np.uint8))
        header = int.from_bytes(before[name][:8], "little")
        places = {tensor: about["data_offsets"] for tensor, about in json.loads(before[name][8 : 8 + header]).items()
                  if tensor in edited}  # fmt: skip
        inside = [(changed >= 8 + header + begin) & (changed < 8 + header + end) for begin, end in places.values()]
        assert np.logical_or.reduce(inside).all()


def test_an_edited_kernel_is_rounded_once(sharded_bfloat16, tmp_path):
    """Rounding the update to bfloat16 first, as adding in the stored dtype does, gives another kernel."""
    done = export_merged(sharded_bfloat16.directory, sharded_bfloat16.edited, tmp_path / "out")
    reloaded = load_model(tmp_path / "out")
    assert reloaded.dtype == jnp.bfloat16
    for address, update in sharded_bfloat16.edited.delta.updates.items():
        original, stored = (
            np.asarray(read_kernels(model, [address])[address], np.float64) for model in (sharded_bfloat16.model, reloaded)
        )
        wanted = original + update.dense()
        np.testing.assert_array_equal(stored, np.asarray(jnp.bfloat16(0) + wanted.astype(jnp.bfloat16), np.float64))
        twice = (original + update.dense().astype(jnp.bfloat16).astype(np.float64)).astype(jnp.bfloat16).astype(np.float64)
        assert (twice != stored).any()
        expected = np.linalg.norm(stored - wanted) / np.linalg.norm(update.dense())
        assert done.rounding[address] == pytest.approx(expected)
        assert 1e-4 < done.rounding[address] < 1e-2
    tokens = prompts(reloaded)
    logits = torch_logits(torch_model(tmp_path / "out", "auto").float(), tokens)
    wide = load_model(tmp_path / "out", dtype=jnp.float32)
    assert np.abs(logits - jax_logits(wide, tokens)).max() <= TOLERANCE


def test_a_hub_id_is_found_as_loading_finds_it(gpt2, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_download", {"someone/gpt2": gpt2.directory}.__getitem__)
    export_merged("someone/gpt2", gpt2.edited, tmp_path / "out")
    assert model_fingerprint(load_model(tmp_path / "out")) == model_fingerprint(gpt2.edited_model)


def test_another_dtype(checkpoint, tmp_path):
    given = checkpoint("qwen2")
    done = export_merged(given.directory, given.edited, tmp_path / "out", dtype="bfloat16")
    assert done.dtype == "bfloat16"
    assert done.size * 2 == export_merged(given.directory, given.edited, tmp_path / "wide").size
    config, before = read_json(tmp_path / "out" / "config.json"), read_json(given.directory / "config.json")
    assert config.pop("dtype") == "bfloat16"
    assert before.pop("dtype") == "float32"
    assert config == before
    reloaded = load_model(tmp_path / "out")
    for path, value in named_parameters(given.edited_model).items():
        if path != "layers.mlp.down.kernel":
            np.testing.assert_array_equal(named_parameters(reloaded)[path], value.astype(jnp.bfloat16))
    address = down_kernel_address(LAYERS[1])
    original = np.asarray(read_kernels(given.model, [address])[address], np.float64)
    once = (original + given.edited.delta[address].dense()).astype(jnp.bfloat16)
    np.testing.assert_array_equal(read_kernels(reloaded, [address])[address], once)
    assert torch_model(tmp_path / "out", "auto").dtype == torch.bfloat16


def test_dtypes_that_cannot_be_stored(gpt2, tmp_path):
    for dtype in ("int8", "float64", "eight bits", np.complex64):
        with pytest.raises(ExportError, match="give dtype as one of float32, bfloat16, float16"):
            export_merged(gpt2.directory, gpt2.edited, tmp_path / "out", dtype=dtype)
    huge = delta_of(gpt2.model, gpt2.edited.delta.scaled(1e6))
    with pytest.raises(NonFiniteError, match=r"h\.0\.mlp\.c_proj\.weight holds NaN or infinite values as float16"):
        export_merged(gpt2.directory, huge, tmp_path / "out", dtype="float16")
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("limit", [20_000, 10**9])
def test_shard_size(gpt2, tmp_path, limit):
    done = export_merged(gpt2.directory, gpt2.edited, tmp_path / "out", max_shard_bytes=limit)
    sizes = [sum(tensor.size for tensor in read_content(tmp_path / "out" / name).tensors) for name in done.files]
    if limit > done.size:
        assert done.files == ("model.safetensors",)
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    else:
        assert len(done.files) > 2
        assert max(sizes) <= limit
        assert done.files[-1] == f"model-{len(done.files):05d}-of-{len(done.files):05d}.safetensors"
        assert read_json(tmp_path / "out" / "model.safetensors.index.json")["metadata"]["total_size"] == done.size
    assert sum(sizes) == done.size
    assert model_fingerprint(load_model(tmp_path / "out")) == model_fingerprint(gpt2.edited_model)
    export_merged(gpt2.directory, gpt2.edited, tmp_path / "plain")
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "plain")


def test_a_shard_of_a_sharded_checkpoint_becomes_one_file(sharded_bfloat16, tmp_path):
    export_merged(sharded_bfloat16.directory, sharded_bfloat16.edited, tmp_path / "out", max_shard_bytes=10**9)
    assert not list((tmp_path / "out").glob("*.index.json"))
    assert torch_model(tmp_path / "out", "auto").dtype == torch.bfloat16
    with pytest.raises(ExportError, match="max_shard_bytes is 0: it must be positive"):
        export_merged(sharded_bfloat16.directory, sharded_bfloat16.edited, tmp_path / "no", max_shard_bytes=0)


def test_bare_names_and_old_buffers(gpt2, tmp_path):
    """The layout of the hub's first GPT-2: no prefix, and masks that hold no parameters, here of several dtypes."""
    held = load_file(gpt2.directory / "model.safetensors")
    old = {name.removeprefix("transformer."): value for name, value in held.items()}
    old["h.0.attn.bias"] = np.tri(5, dtype=np.uint8)[None, None]
    old["h.1.attn.bias"] = np.tri(5, dtype=bool)[None, None]
    old["h.2.attn.masked_bias"] = np.asarray(-1e4, np.float32)
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "old" / "config.json").write_bytes((gpt2.directory / "config.json").read_bytes())
    export_merged(tmp_path / "old", gpt2.edited, tmp_path / "out")
    before, after = raw_tensors(tmp_path / "old"), raw_tensors(tmp_path / "out")
    assert {name for name in before if before[name] != after[name]} == {f"h.{n}.mlp.c_proj.weight" for n in LAYERS}
    export_merged(tmp_path / "old", gpt2.edited, tmp_path / "half", dtype="float16")
    assert model_fingerprint(load_model(tmp_path / "out")) == model_fingerprint(gpt2.edited_model)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {str(half[name].dtype) for name in ("h.0.attn.bias", "h.1.attn.bias")} == {"uint8", "bool"}
    np.testing.assert_array_equal(half["h.0.attn.bias"], old["h.0.attn.bias"])
    assert half["h.2.attn.masked_bias"].dtype == np.float16
    assert load_model(tmp_path / "half").dtype == jnp.float16


def test_a_model_in_memory(gpt2, tmp_path, tokenizer):
    done = export_merged(gpt2.model, gpt2.edited, tmp_path / "out", tokenizer=tokenizer, max_shard_bytes=20_000)
    assert len(done.files) > 2
    tokens = prompts(gpt2.model)
    difference = torch_logits(torch_model(tmp_path / "out"), tokens) - jax_logits(gpt2.edited_model, tokens)
    assert np.abs(difference).max() <= TOLERANCE
    assert load_tokenizer(tmp_path / "out")("Alice Smith")["input_ids"] == tokenizer("Alice Smith")["input_ids"]
    export_merged(gpt2.model, gpt2.edited, tmp_path / "half", dtype="float16")
    assert read_json(tmp_path / "half" / "config.json")["dtype"] == "float16"
    from_disk = export_merged(gpt2.directory, gpt2.edited, tmp_path / "disk", dtype="float16")
    assert raw_tensors(tmp_path / "half") == raw_tensors(from_disk.folder)


def test_a_session(history: list[EditSession], tmp_path, tokenizer):
    """The session's own model, bit for bit; from a float16 checkpoint, what that dtype can hold of it."""
    session = history[-1]
    save_model(session.base, tmp_path / "base")
    done = export_merged(tmp_path / "base", session, tmp_path / "out")
    assert isinstance(done, Merged)
    assert model_fingerprint(load_model(tmp_path / "out")) == model_fingerprint(session.model)
    assert max(done.rounding.values()) < 1e-6
    tokens = prompts(session.base)
    difference = torch_logits(torch_model(tmp_path / "out"), tokens) - jax_logits(session.model, tokens)
    assert np.abs(difference).max() <= TOLERANCE


def test_a_session_edited_in_a_wider_dtype(sharded_bfloat16, tmp_path):
    """The fingerprint is that of the model as it was loaded; the files keep the dtype they have."""
    wide = load_model(sharded_bfloat16.directory, dtype=jnp.float32)
    edited = delta_of(wide, sharded_bfloat16.edited.delta)
    assert edited.fingerprint != sharded_bfloat16.edited.fingerprint
    export_merged(sharded_bfloat16.directory, edited, tmp_path / "wide")
    export_merged(sharded_bfloat16.directory, sharded_bfloat16.edited, tmp_path / "out")
    assert raw_tensors(tmp_path / "wide") == raw_tensors(tmp_path / "out")


def test_another_model_is_refused(gpt2, checkpoint, tmp_path):
    """Even one of the same shape whose weights differ in one value, far from the edited kernels."""
    with pytest.raises(ExportError, match="is not the model that was edited: read as float32"):
        export_merged(checkpoint("qwen2").directory, gpt2.edited, tmp_path / "out")
    values = load_file(gpt2.directory / "model.safetensors")
    values["transformer.wte.weight"][3, 3] += 1e-6
    (tmp_path / "near").mkdir()
    save_file(values, tmp_path / "near" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "near" / "config.json").write_bytes((gpt2.directory / "config.json").read_bytes())
    with pytest.raises(ExportError, match="give the checkpoint that the session was begun with"):
        export_merged(tmp_path / "near", gpt2.edited, tmp_path / "out")
    with pytest.raises(ExportError, match="the model given is not the model that was edited"):
        export_merged(gpt2.edited_model, gpt2.edited, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(gpt2, fresh, tmp_path):
    for nothing in (fresh, delta_of(gpt2.model, EditDelta({}))):
        with pytest.raises(ExportError, match="there are no edits to export"):
            export_merged(gpt2.directory, nothing, tmp_path / "out")
    good = gpt2.edited.delta[down_kernel_address(0)]
    bad = {
        "layers.mlp.up.kernel[0]": good,
        down_kernel_address(7): good,
        down_kernel_address(1): type(good)(good.update[:3]),
        down_kernel_address(2): good.scaled(np.nan),
    }
    with pytest.raises(ExportError) as caught:
        export_merged(gpt2.directory, delta_of(gpt2.model, EditDelta(bad)), tmp_path / "out")
    assert [line.split(":")[0].strip(" -") for line in str(caught.value).splitlines()[1:]] == list(bad)
    with pytest.raises(CheckpointError, match="there is no directory"):
        export_merged(tmp_path / "nowhere", gpt2.edited, tmp_path / "out")


def test_the_original_is_never_overwritten(gpt2, tmp_path):
    before = snapshot(gpt2.directory)
    for folder in (gpt2.directory, gpt2.directory.parent):
        with pytest.raises(ExportError, match="holds the original checkpoint"):
            export_merged(gpt2.directory, gpt2.edited, folder, overwrite=True)
    (tmp_path / "link").symlink_to(gpt2.directory)
    with pytest.raises(ExportError, match="holds the original checkpoint"):
        export_merged(gpt2.directory, gpt2.edited, tmp_path / "link", overwrite=True)
    assert snapshot(gpt2.directory) == before


def test_memory_is_that_of_a_tensor(tmp_path):
    """Not that of a file, let alone the model."""
    config = gpt2_config(vocab_size=61, n_layers=16, d_model=128, n_heads=2, d_ff=256, max_positions=40)
    model = random_model(config, 0, scale=0.1)
    save_model(model, tmp_path / "base")
    edited = delta_of(model, random_delta(model))
    total = (tmp_path / "base" / "model.safetensors").stat().st_size
    export_merged(tmp_path / "base", edited, tmp_path / "first")  # imports
    for source, dtype in ((tmp_path / "base", None), (tmp_path / "base", "bfloat16"), (model, "bfloat16")):
        tracemalloc.start()
        export_merged(source, edited, tmp_path / "out", dtype=dtype, overwrite=True)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < total / 3, (source, dtype, peak, total)


class Broken:
    """Writes as `write_content` does until the file of this number, and then fails halfway."""

    def __init__(self, real: Any, at: int, error: BaseException) -> None:
        self.real, self.left, self.error = real, at, error

    def __call__(self, path: Path, content: Any) -> None:
        if self.left == 0:
            path.write_bytes(b"half of it")
            raise self.error
        self.left -= 1
        self.real(path, content)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "killed"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "over another"])
def test_a_failure_leaves_what_was_there(sharded_bfloat16, tmp_path, monkeypatch, error, overwrite):
    from kedit_jax.export import merged

    if overwrite:
        export_merged(sharded_bfloat16.directory, sharded_bfloat16.edited, tmp_path / "out")
    before = snapshot(tmp_path)
    monkeypatch.setattr(merged, "write_content", Broken(merged.write_content, 1, error))
    expected = ExportError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left on device.*nothing was left" if expected is ExportError else None):
        export_merged(sharded_bfloat16.directory, sharded_bfloat16.edited, tmp_path / "out", overwrite=overwrite)
    assert snapshot(tmp_path) == before


def test_an_existing_folder(gpt2, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    export_merged(gpt2.directory, gpt2.edited, tmp_path / "empty")
    before = snapshot(tmp_path)
    with pytest.raises(
        ExportError, match=r"exists and is not empty: give another folder, or pass overwrite=True \(--overwrite\)"
    ):
        export_merged(gpt2.directory, gpt2.edited, tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="is a file: give a folder"):
        export_merged(gpt2.directory, gpt2.edited, tmp_path / "file", overwrite=True)
    (tmp_path / "file").unlink()
    assert snapshot(tmp_path) == before
    other = checkpoint("qwen2")
    (tmp_path / "empty" / "session").mkdir()
    (tmp_path / "empty" / "session" / "manifest.json").touch()
    before = snapshot(tmp_path)
    with pytest.raises(ExportError, match=r"holds more than the earlier export: session, session/manifest\.json; move"):
        export_merged(other.directory, other.edited, tmp_path / "empty", overwrite=True)
    assert snapshot(tmp_path) == before
    shutil.rmtree(tmp_path / "empty" / "session")
    export_merged(other.directory, other.edited, tmp_path / "empty", overwrite=True)
    assert model_fingerprint(load_model(tmp_path / "empty")) == model_fingerprint(other.edited_model)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    shutil.copytree(other.directory, tmp_path / "model")
    with pytest.raises(ExportError, match=r"model holds no kedit_export\.json of this program, so it is no earlier export"):
        export_merged(gpt2.directory, gpt2.edited, tmp_path / "model", overwrite=True)
    assert snapshot(tmp_path / "model") == snapshot(other.directory)


def test_the_manifest_is_the_exports_own(gpt2, tmp_path):
    """Also where the original is itself an export, in other files."""
    export_merged(gpt2.directory, gpt2.edited, tmp_path / "first")
    model = load_model(tmp_path / "first")
    edited = delta_of(model, gpt2.edited.delta)
    export_merged(tmp_path / "first", edited, tmp_path / "second", max_shard_bytes=20_000)
    for name in ("first", "second"):
        manifest = read_json(tmp_path / name / MANIFEST)
        assert manifest["form"] == "merged"
        assert manifest["files"] == sorted(set(snapshot(tmp_path / name)) - {MANIFEST})
    export_merged(tmp_path / "first", edited, tmp_path / "second", overwrite=True)
    assert not list((tmp_path / "second").glob("*.index.json"))


def test_modes_are_those_of_other_files(gpt2, tmp_path):
    """safetensors' own writer lets the owner alone read; a server often runs as someone else."""
    export_merged(gpt2.directory, gpt2.edited, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain" / "file").stat().st_mode}


def test_delta_of_is_what_apply_edits_takes(gpt2):
    assert isinstance(gpt2.edited, ModelDelta)
    gpt2.edited.check(gpt2.model)
    with pytest.raises(ExportError, match="weights: the edited model has"):
        gpt2.edited.check(apply_edits(gpt2.model, gpt2.edited.delta))
