"""A delta alone, as one safetensors file that says which model it belongs to."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from kedit_jax.delta import Dense, EditDelta, LowRank, Update
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import ExportError
from kedit_jax.export.model_delta import ModelDelta, model_delta
from kedit_jax.export.staging import new_file
from kedit_jax.export.tensors import FLOATS, Content, Tensor, ordered, read_content, size_of, tensor_of, write_content
from kedit_jax.models import Decoder
from kedit_jax.models.registry import config_from_json, config_to_json

_KIND = "kedit_jax delta"
FORMAT = f"{_KIND} 1"
_PARTS: Mapping[type[Update], tuple[str, ...]] = {Dense: ("update",), LowRank: ("left", "right")}


def save_delta(edited: EditSession | ModelDelta, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the updates, bit for bit, and the model's configuration and fingerprint.

    A tensor is named ADDRESS/update, or ADDRESS/left and ADDRESS/right where the update is kept as factors.

    Args:
        overwrite: replace an earlier delta; any other file, and every symbolic link, is still refused.

    Raises:
        ExportError: nothing to export, the file exists, or it cannot be written; nothing is left behind.
    """
    edited = model_delta(edited)
    arrays = {
        f"{address}/{part}": np.asarray(getattr(update, part))
        for address, update in edited.delta.updates.items()
        for part in _PARTS[type(update)]
    }
    strange = sorted({str(array.dtype) for array in arrays.values() if array.dtype not in FLOATS.values()})
    if strange:
        raise ExportError(f"updates of dtype {', '.join(strange)} cannot be stored: give floating-point numbers")
    about = {
        "format": FORMAT,
        "model": edited.fingerprint,
        "dtype": edited.dtype,
        "config": json.dumps(config_to_json(edited.config)),
        "addresses": json.dumps(edited.delta.addresses),
        "arrays": _digest(arrays),
    }
    tensors = [_tensor(name, array) for name, array in arrays.items()]
    content = Content(ordered(tensors), about)
    with new_file(path, ours=is_delta, needed=size_of(content), overwrite=overwrite) as partial:
        write_content(partial, content)
    return Path(path).expanduser()


def load_delta(path: str | os.PathLike[str], model: Decoder | None = None) -> ModelDelta:
    """The delta that a file holds, in the dtypes it was written with, as NumPy arrays.

    Args:
        model: refuse the delta unless this is the model it belongs to, unedited. `apply_edits(model, loaded.delta)` then
            is the edited one.

    Raises:
        ExportError: no such file, one that is damaged or holds something else, or a delta of another model.
    """
    path = Path(path)
    try:
        about, arrays = _read(path)
        found = about["format"]
        if found != FORMAT and found.startswith(_KIND):
            raise ExportError(f"{path} holds a {found!r}, but read here is {FORMAT!r}; upgrade kedit-jax")
        if found != FORMAT:
            raise ValueError(f"its format is {found!r}")
        if about["arrays"] != _digest(arrays):
            raise ValueError("its numbers are not those that were written")
        updates = {address: _update(address, arrays) for address in json.loads(about["addresses"])}
        model_dtype, of_model = str(np.dtype(about["dtype"])), about["model"]  # or a TypeError, or a KeyError
        config = config_from_json(json.loads(about["config"]), f"the configuration in {path}")
    except FileNotFoundError as error:
        raise ExportError(f"there is no file {path}") from error
    except ExportError:
        raise
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} is no delta that `save_delta` wrote, or is damaged: {error}") from error
    loaded = ModelDelta(EditDelta(updates), config, of_model, model_dtype)
    if model is not None:
        loaded.check(model)
    return loaded


def is_delta(path: Path) -> bool:
    """Whether the file's metadata say that `save_delta` wrote it, of this version or another."""
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            return (file.metadata() or {}).get("format", "").startswith(f"{_KIND} ")
    except (safetensors.SafetensorError, OSError):
        return False


def _tensor(name: str, array: np.ndarray) -> Tensor:
    return tensor_of(name, array.dtype, array.shape, lambda: array)


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, np.ndarray]]:
    with safetensors.safe_open(str(path), framework="numpy"):  # checks the header against the file's size
        content = read_content(path)
    return content.metadata, {tensor.name: tensor.read() for tensor in content.tensors}


def _update(address: str, arrays: Mapping[str, np.ndarray]) -> Update:
    if f"{address}/update" in arrays:
        return Dense(arrays[f"{address}/update"])
    return LowRank(arrays[f"{address}/left"], arrays[f"{address}/right"])


def _digest(arrays: Mapping[str, Any]) -> str:
    """sha256 of every array's name, dtype, shape and bytes; safetensors notices a missing byte, not a changed one."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode() + array.tobytes())
    return digest.hexdigest()
