"""From a `Decoder` to a Hugging Face directory, by the weight table run backwards."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import DTypeLike
from safetensors.numpy import save_file

from kedit_jax.errors import CheckpointError, NonFiniteError
from kedit_jax.models.checkpoint_files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, STORED_DTYPES
from kedit_jax.models.decoder import Decoder
from kedit_jax.models.parameters import named_parameters
from kedit_jax.models.registry import config_to_json
from kedit_jax.models.table import slots


def save_model(
    model: Decoder, directory: str | os.PathLike[str], *, dtype: DTypeLike | None = None, overwrite: bool = False
) -> None:
    """Write config.json and model.safetensors, which `load_model` and transformers open.

    The files appear only when complete; a failure leaves what was there before.

    Args:
      model: the decoder.
      directory: created when needed; other files in it (a tokenizer) stay.
      dtype: of the stored weights, float32, float16 or bfloat16; None keeps the model's.
      overwrite: replace a model that is already there.

    Raises:
      CheckpointError: a model is already there, the dtype cannot be stored, or the disk is full or read-only.
      NonFiniteError: a weight is NaN or infinite, perhaps only after the cast.
    """
    directory = Path(directory)
    _check_target(directory, overwrite)
    tensors = checkpoint_tensors(model, dtype=dtype)
    stored = str(next(iter(tensors.values())).dtype)
    config = json.dumps({**config_to_json(model.config), "dtype": stored}, indent=2, sort_keys=True) + "\n"
    staging = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
        save_file(tensors, str(staging / SINGLE_FILE), metadata={"format": "pt"})
        (staging / CONFIG_FILE).write_text(config, encoding="utf-8")
        (staging / SINGLE_FILE).chmod((staging / CONFIG_FILE).stat().st_mode)  # safetensors lets its owner alone read it
        # A directory without config.json is no model: an interruption between these lines cannot pass for one.
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        os.replace(staging / SINGLE_FILE, directory / SINGLE_FILE)
        os.replace(staging / CONFIG_FILE, directory / CONFIG_FILE)
    except Exception as error:
        raise CheckpointError(f"the model could not be written to {directory}: {error}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def checkpoint_tensors(model: Decoder, *, dtype: DTypeLike | None = None) -> dict[str, np.ndarray]:
    """The tensors of the model's checkpoint by name, on the host.

    Raises:
      CheckpointError: the dtype cannot be stored.
      NonFiniteError: a weight is NaN or infinite, perhaps only after the cast.
    """
    target = np.dtype(model.dtype if dtype is None else dtype)
    if target not in STORED_DTYPES.values():
        names = ", ".join(str(one) for one in STORED_DTYPES.values())
        raise CheckpointError(f"weights cannot be stored as {target}: give dtype as one of {names}")
    with np.errstate(over="ignore"):  # reported below, by name
        values = {path: np.asarray(value).astype(target, copy=False) for path, value in named_parameters(model).items()}
    bad = [path for path, value in values.items() if not np.isfinite(value).all()]
    if bad:
        raise NonFiniteError(f"not finite as {target}, so not saved: {', '.join(bad)}")
    layout = slots(model.config, {path: value.shape for path, value in values.items()})
    return {name: slot.pack(values) for name, slot in layout.items() if not slot.row.copy}


def _check_target(directory: Path, overwrite: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: give a directory")
    if (directory / INDEX_FILE).exists():
        raise CheckpointError(f"{directory} holds a sharded model: save to another directory")
    present = [name for name in (CONFIG_FILE, SINGLE_FILE) if (directory / name).exists()]
    if present and not overwrite:
        raise CheckpointError(f"{directory} already holds {', '.join(present)}: pass overwrite=True to replace them")
