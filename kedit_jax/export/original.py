"""The model before its edits, as the files of its checkpoint: read tensor by tensor, never as a whole."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kedit_jax.errors import ExportError
from kedit_jax.export.model_delta import ModelDelta, layout
from kedit_jax.export.tensors import Content, Tensor, ordered, raw_bytes, read_content, tensor_of
from kedit_jax.models import Decoder, ModelConfig, named_parameters
from kedit_jax.models.checkpoint_files import CONFIG_FILE, SINGLE_FILE, TensorFiles, locate_tensors, read_json
from kedit_jax.models.config import as_record
from kedit_jax.models.loading import locate, match_tensors
from kedit_jax.models.registry import config_from_json
from kedit_jax.models.table import Slot


@dataclass(frozen=True, eq=False)
class Original:
    """A checkpoint that an edited one is made from.

    Attributes:
        files: the weights, by file name.
        names: by a tensor's name in the weight table, its name in the files.
        shapes: of every parameter, by path.
        slots: how each tensor is stored, by its name in the weight table.
        directory: where it lies; None for a model in memory.
    """

    config: ModelConfig
    files: Mapping[str, Content]
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    slots: Mapping[str, Slot]
    directory: Path | None

    def check(self, edited: ModelDelta) -> None:
        """Raise an ExportError unless this is the model that the delta belongs to; reads everything once."""
        found = self._fingerprint(np.dtype(edited.dtype))
        if found != edited.fingerprint:
            where = "the model given" if self.directory is None else str(self.directory)
            raise ExportError(
                f"{where} is not the model that was edited: read as {edited.dtype} its fingerprint is {found[:16]}, the "
                f"edits are of {edited.fingerprint[:16]}; give the checkpoint that the session was begun with"
            )

    def _fingerprint(self, dtype: np.dtype) -> str:
        """What `model_fingerprint` gives for the model loaded in this dtype, with one tensor at a time in memory."""
        tensors = {tensor.name: tensor for content in self.files.values() for tensor in content.tensors}
        digest = hashlib.sha256(json.dumps(as_record(self.config), sort_keys=True).encode())
        for path, shape in sorted(self.shapes.items()):
            digest.update(f"\n{path} {dtype} {shape}\n".encode())
            for name, slot in self._holding(path):
                part = slot.unpack(tensors[self.names[name]].read())[slot.row.paths.index(path)]
                digest.update(raw_bytes(cast(part, dtype)))
        return digest.hexdigest()

    def _holding(self, path: str) -> Iterator[tuple[str, Slot]]:
        """The tensors that hold a parameter, in order of the layers."""
        found = [(name, slot) for name, slot in self.slots.items() if path in slot.row.paths and not slot.row.copy]
        yield from sorted(found, key=lambda item: item[1].layer or 0)


def open_original(checkpoint: str | os.PathLike[str] | Decoder) -> Original:
    """A directory or hub id as `kedit_jax.models.load` takes it, or a model in memory.

    Raises:
        CheckpointError: what `load_model` would say of its configuration and the names, shapes and dtypes of its weights.
    """
    return _in_memory(checkpoint) if isinstance(checkpoint, Decoder) else _on_disk(locate(checkpoint))


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in this dtype; too large values become infinite, for the caller to find."""
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _on_disk(directory: Path) -> Original:
    config = config_from_json(read_json(directory / CONFIG_FILE), str(directory / CONFIG_FILE))
    shapes, slots = layout(config)
    with TensorFiles(directory) as files:
        names = match_tensors(files, slots, config)
    paths = sorted(set(locate_tensors(directory).values()))
    return Original(config, {path.name: read_content(path) for path in paths}, names, shapes, slots, directory)


def _in_memory(model: Decoder) -> Original:
    shapes, slots = layout(model.config)
    values, dtype = named_parameters(model), np.dtype(model.dtype)
    stored = {name: slot for name, slot in slots.items() if not slot.row.copy}
    tensors = [_packed(name, slot, dtype, values) for name, slot in stored.items()]
    files = {SINGLE_FILE: Content(ordered(tensors), {"format": "pt"})}
    return Original(model.config, files, {name: name for name in stored}, shapes, slots, None)


def _packed(name: str, slot: Slot, dtype: np.dtype, values: Mapping[str, Any]) -> Tensor:
    """The tensor that a table's row makes of parameters on any device; of stacks, only its layer is fetched."""

    def read() -> np.ndarray:
        if slot.layer is None:
            return slot.pack({path: np.asarray(values[path]) for path in slot.row.paths})
        layers = {path: np.asarray(values[path][slot.layer])[None] for path in slot.row.paths}
        return replace(slot, layer=0).pack(layers)

    return tensor_of(name, dtype, slot.shape, read)
