"""The edited model as a Hugging Face checkpoint, streamed from the original one.

An edited kernel is the original, in float64, plus its update, rounded once to the stored dtype. Every other byte of the
weights is the original's: the files keep their names, headers and order, unless another dtype or shard size is asked for.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import DTypeLike

from kedit_jax.delta import Update
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import ExportError, NonFiniteError
from kedit_jax.export.model_delta import ModelDelta, down_tensors, model_delta
from kedit_jax.export.original import Original, cast, open_original
from kedit_jax.export.staging import MANIFEST, check_folder, new_folder
from kedit_jax.export.tensors import FLOATS, Content, Tensor, ordered, size_of, storable, tensor_of, write_content
from kedit_jax.models import Decoder
from kedit_jax.models.checkpoint_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_json
from kedit_jax.models.registry import config_to_json
from kedit_jax.models.table import Slot

BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
"""What is copied: configuration, tokenizer, licence. Neither other weights nor code nor the model card of another model."""


@dataclass(frozen=True)
class Merged:
    """A checkpoint that was written.

    Attributes:
        folder: where it lies.
        files: of the weights.
        size: of the tensors, in bytes.
        dtype: that was asked for; None where every tensor kept its own.
        rounding: by address, |stored - (original + update)| / |update|: the share of each update that the dtype lost.
    """

    folder: Path
    files: tuple[str, ...]
    size: int
    dtype: str | None
    rounding: Mapping[str, float]


def export_merged(
    checkpoint: str | os.PathLike[str] | Decoder,
    edited: EditSession | ModelDelta,
    folder: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Merged:
    """Write the edited model where transformers, vLLM and `kedit_jax.models.load` open it.

    Args:
        checkpoint: directory or hub id of the ORIGINAL model, whose configuration and tokenizer are copied; or that model
            itself, where there is no such directory.
        edited: a session, or a delta with what it belongs to.
        folder: made by this call; it appears whole or not at all.
        dtype: float32, float16 or bfloat16 for all weights; None keeps each tensor's own.
        max_shard_bytes: begin another file before one is larger; None keeps the original's files.
        tokenizer: written beside a model given in memory; a checkpoint brings its own.
        overwrite: replace an earlier merged export; a folder that holds anything else is still refused.

    Raises:
        ExportError: `checkpoint` is not the model that was edited, the folder exists or is the checkpoint's own, there is
            too little space, or writing failed. Nothing is left behind.
        CheckpointError: the checkpoint cannot be read.
        NonFiniteError: a weight is NaN or infinite, perhaps only in the dtype asked for.
    """
    edited = model_delta(edited)
    original = open_original(checkpoint)
    target = _target_dtype(dtype, original)
    _check_apart(original, Path(folder))
    folder = check_folder(folder, "merged", overwrite=overwrite)
    original.check(edited)
    rounding: dict[str, float] = {}
    files = _files(original, edited, target, max_shard_bytes, rounding)
    needed = sum(map(size_of, files.values())) + sum(path.stat().st_size for path in _beside(original.directory))
    with new_folder(folder, form="merged", needed=needed, overwrite=overwrite) as partial:
        for name, content in files.items():
            write_content(partial / name, content)
        _write_beside(partial, original, target, tokenizer)
        _write_index(partial, files, original, changed=target is not None or max_shard_bytes is not None)
    size = sum(tensor.size for content in files.values() for tensor in content.tensors)
    return Merged(folder, tuple(files), size, None if target is None else str(target), rounding)


def _target_dtype(dtype: DTypeLike | None, original: Original) -> np.dtype | None:
    if dtype is None:
        for content in original.files.values():
            for tensor in content.tensors:
                if tensor.dtype == "F64":  # a model in memory alone; kedit_jax loads no such file, and nobody serves one
                    storable(np.float64, "weights")
        return None
    return storable(dtype, "weights")


def _check_apart(original: Original, folder: Path) -> None:
    """The original is read while the edited model is written, and is not to be lost with a folder that is replaced."""
    if original.directory is None:
        return
    source, target = original.directory.resolve(), folder.expanduser().resolve()
    if target == source or target in source.parents:
        raise ExportError(f"{folder} holds the original checkpoint, {original.directory}: give another folder")


def _files(
    original: Original,
    edited: ModelDelta,
    target: np.dtype | None,
    max_shard_bytes: int | None,
    rounding: dict[str, float],
) -> dict[str, Content]:
    """The files to write; `rounding` is filled as their edited tensors are read."""
    updates = {
        original.names[down.name]: (address, down.slot, edited.delta[address])
        for address, down in down_tensors(original.config).items()
        if address in edited.delta.updates
    }

    def changed(tensor: Tensor) -> Tensor:
        if tensor.name in updates:
            return _edited(tensor, *updates[tensor.name], target, rounding)
        return tensor if target is None else _cast(tensor, target)

    files = {name: tuple(map(changed, content.tensors)) for name, content in original.files.items()}
    metadata = next(iter(original.files.values())).metadata
    if max_shard_bytes is not None:
        return _sharded([tensor for held in files.values() for tensor in held], max_shard_bytes, metadata)
    if target is None:
        return {name: replace(content, tensors=files[name]) for name, content in original.files.items()}
    return {name: Content(ordered(files[name]), content.metadata) for name, content in original.files.items()}


def _edited(
    tensor: Tensor, address: str, slot: Slot, update: Update, target: np.dtype | None, rounding: dict[str, float]
) -> Tensor:
    """The tensor with the update added in float64 and rounded once."""
    dtype = FLOATS[tensor.dtype] if target is None else target

    def read() -> np.ndarray:
        (kernel,) = slot.unpack(tensor.read())
        change = np.asarray(update.dense(), np.float64)
        wanted = kernel.astype(np.float64)
        wanted += change
        stored = _finite(cast(wanted, dtype), tensor.name)
        size = float(np.linalg.norm(change))
        wanted -= stored.astype(np.float64)  # in place: three arrays of float64 are as much as six of the tensor
        rounding[address] = float(np.linalg.norm(wanted)) / size if size else 0.0
        return np.ascontiguousarray(stored.T if slot.row.transpose else stored)

    return tensor_of(tensor.name, dtype, tensor.shape, read)


def _cast(tensor: Tensor, target: np.dtype) -> Tensor:
    """The tensor in another dtype; what is not floating-point stays as it is."""
    if tensor.dtype not in FLOATS:
        return tensor
    return tensor_of(tensor.name, target, tensor.shape, lambda: _finite(cast(tensor.read(), target), tensor.name))


def _finite(array: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name} holds NaN or infinite values as {array.dtype}: choose a wider dtype")
    return array


def _sharded(tensors: Sequence[Tensor], limit: int, metadata: Mapping[str, str]) -> dict[str, Content]:
    """Files of at most `limit` bytes of tensors, in the original's order; a larger tensor has one to itself."""
    if limit < 1:
        raise ExportError(f"max_shard_bytes is {limit}: it must be positive")
    shards = list(_runs(tensors, limit))
    if len(shards) == 1:
        return {SINGLE_FILE: Content(ordered(shards[0]), metadata)}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": Content(ordered(held), metadata)
        for number, held in enumerate(shards, start=1)
    }


def _runs(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    run: list[Tensor] = []
    for tensor in tensors:
        if run and sum(one.size for one in run) + tensor.size > limit:
            yield run
            run = []
        run.append(tensor)
    yield run


def _write_index(folder: Path, files: Mapping[str, Content], original: Original, *, changed: bool) -> None:
    """Which file holds each tensor, unless one file holds them all; the original's own where nothing in it changed."""
    if set(files) == {SINGLE_FILE}:
        return
    before = None if original.directory is None else original.directory / INDEX_FILE
    if before is not None and before.is_file() and not changed:
        shutil.copyfile(before, folder / INDEX_FILE)
        return
    places = {tensor.name: name for name, content in files.items() for tensor in content.tensors}
    total = sum(tensor.size for content in files.values() for tensor in content.tensors)
    _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _write_beside(folder: Path, original: Original, target: np.dtype | None, tokenizer: Any) -> None:
    """Configuration and tokenizer."""
    if original.directory is None:
        dtype = target or next(FLOATS[tensor.dtype] for content in original.files.values() for tensor in content.tensors)
        _write_json(folder / CONFIG_FILE, {**config_to_json(original.config), "dtype": str(dtype)})
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        return
    for path in _beside(original.directory):
        shutil.copyfile(path, folder / path.name)
    if target is not None:
        config = read_json(folder / CONFIG_FILE)
        fields = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        _write_json(folder / CONFIG_FILE, config | dict.fromkeys(fields, str(target)))


def _beside(directory: Path | None) -> list[Path]:
    """What is copied from a checkpoint beside its weights; not the manifest of one that was itself exported."""
    if directory is None:
        return []
    found = {path for pattern in BESIDE for path in directory.glob(pattern)}
    kept = (path for path in found if not path.name.endswith(".index.json") and path.name != MANIFEST)
    return sorted(path for path in kept if path.is_file() and _leads_within(path, directory))


def _leads_within(path: Path, directory: Path) -> bool:
    """Whether a file is the checkpoint's own: a link to another place would have a private file published with the export.

    A snapshot of the hub's cache is made of links to `blobs`, two folders above it.
    """
    homes = [directory.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parent.parent / "blobs")
    return any(path.resolve().is_relative_to(home) for home in homes)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
