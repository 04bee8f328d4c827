"""From a Hugging Face directory or hub id to a `Decoder` and its tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from kedit_jax.errors import CheckpointError
from kedit_jax.hosts import laid_out, one_of, to_host
from kedit_jax.models.checkpoint_files import (
    CONFIG_FILE,
    PICKLES,
    STORED_DTYPES,
    StoredTensor,
    TensorFiles,
    how_to_convert,
    read_json,
)
from kedit_jax.models.config import ModelConfig, as_record
from kedit_jax.models.decoder import Decoder
from kedit_jax.models.parameters import named_parameters, with_parameters
from kedit_jax.models.reading import Placement, read_parameters
from kedit_jax.models.registry import FAMILIES, config_from_json
from kedit_jax.models.spread import Spread
from kedit_jax.models.table import Slot, buffer_names, slots

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_HUB_NOT_NEEDED = ["*/*", "consolidated*"]  # folders, and Mistral's second copy of the weights
_HUB_FILES = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "LICENSE",
    "LICENSE.md",
    "NOTICE",
]  # nothing executable


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    placement: Placement | None = None,
    mesh: Mesh | None = None,
) -> Decoder:
    """Load a decoder from a directory with config.json and safetensors, or from a hub id.

    Args:
      source: the directory, or a hub id such as "openai-community/gpt2".
      dtype: of all parameters; None keeps the stored one (the widest, where a checkpoint mixes them).
      placement: a device or sharding for all parameters, or a function of a parameter's path and shape that gives one;
        None is JAX's default device. The host holds no more than a few tensors at a time beside what is placed on it.
      mesh: from `make_mesh`; the model is cut along its axes, its programs run on all its devices, and each process reads
        what its own devices hold. Not together with a placement.

    Raises:
      CheckpointError: nothing there, a model that is not implemented, pickled weights, or everything that is missing,
        extra, misshapen, of another type or not finite among the weights, in one error.
    """
    if mesh is not None and placement is not None:
        raise CheckpointError("a model lies on a mesh or where a placement says: give one of them")
    directory = locate(source)
    config = config_from_json(read_json(directory / CONFIG_FILE), str(directory / CONFIG_FILE))
    _check_dtype(dtype)
    spread = None if mesh is None else Spread(mesh, config)
    abstract = abstract_decoder(config, spread=spread)
    shapes = {path: value.shape for path, value in named_parameters(abstract).items()}
    expected = slots(config, shapes)
    files = TensorFiles(directory)
    names = match_tensors(files, expected, config)
    sources = {stored: (expected[name], files.tensors[stored]) for name, stored in names.items()}
    kinds = [STORED_DTYPES[tensor.kind] for _, tensor in sources.values()]
    target = np.dtype(jnp.result_type(*kinds)) if dtype is None else np.dtype(dtype)
    return with_parameters(abstract, read_parameters(sources, shapes, target, spread or placement))


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The fast tokenizer beside a model; "fast" because edits find the subject's tokens by character offsets.

    Raises:
      CheckpointError: no tokenizer there, or only a slow one.
    """
    from transformers import AutoTokenizer  # takes seconds to import, and models without text do not need it

    directory = locate(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), use_fast=True, trust_remote_code=False)
    except BaseException as error:  # tokenizers raises Exception itself; a panic of its Rust code is not even one
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{directory} holds no tokenizer that transformers can open: {error}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the tokenizer of {directory} is slow and gives no character offsets: save it with a tokenizer.json"
        )
    return tokenizer


def load(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    placement: Placement | None = None,
    mesh: Mesh | None = None,
) -> tuple[Decoder, Any]:
    """The model and its tokenizer."""
    return load_model(source, dtype=dtype, placement=placement, mesh=mesh), load_tokenizer(source)


def read_config(source: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a directory or hub id alone; of a hub repository nothing else is fetched.

    Raises:
      CheckpointError: as `load_model`, as far as config.json goes.
    """
    path = Path(source)
    if path.exists() or not _HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
        file = locate(source) / CONFIG_FILE
    else:
        file = _download(str(source), only=CONFIG_FILE) / CONFIG_FILE
    return config_from_json(read_json(file), str(file))


def locate(source: str | os.PathLike[str]) -> Path:
    """The directory itself, or the local copy of a hub repository, downloaded when needed.

    Raises:
      CheckpointError: neither a directory nor a hub id that can be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{source} is a file: give the directory that holds {CONFIG_FILE}")
    if not _HUB_ID.fullmatch(str(source)) or str(source).startswith("."):
        raise CheckpointError(f"there is no directory {source}")
    return _download(str(source))


def abstract_decoder(config: ModelConfig, dtype: DTypeLike = jnp.float32, spread: Spread | None = None) -> Decoder:
    """The decoder with shapes and dtypes in place of arrays, at no memory."""
    return jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, spread=spread))


def on_mesh(model: Decoder, mesh: Mesh) -> Decoder:
    """A model that is in memory, laid out on a mesh; every process holds all of it before. `load_model` reads one there."""
    spread = Spread(mesh, model.config)
    laid = {path: laid_out(np.asarray(value), spread(path, value.shape)) for path, value in named_parameters(model).items()}
    return with_parameters(abstract_decoder(model.config, model.dtype, spread), laid)


def model_fingerprint(model: Decoder) -> str:
    """Hexadecimal SHA-256 over the configuration and every parameter's path, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(as_record(model.config), sort_keys=True).encode())
    for path, value in named_parameters(model).items():
        digest.update(f"\n{path} {value.dtype} {value.shape}\n".encode())
        if model.spread is None or value.ndim < 3:
            digest.update(to_host(value).tobytes())
            continue
        for layer in range(len(value)):  # of a model on a mesh, a host may hold no more
            digest.update(to_host(one_of(value, layer)).tobytes())
    return digest.hexdigest()


def _download(hub_id: str, only: str | None = None) -> Path:
    import huggingface_hub  # only for hub ids
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    failures = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)
    try:
        found = huggingface_hub.snapshot_download(hub_id, allow_patterns=only or _HUB_FILES, ignore_patterns=_HUB_NOT_NEEDED)
    except failures as error:
        raise CheckpointError(
            f"{hub_id!r} is no directory here, and it could not be fetched from the Hugging Face hub: {error}"
        ) from error
    if only is None and not any(Path(found).glob("*.safetensors")):
        try:
            files = huggingface_hub.list_repo_files(hub_id)
        except failures:
            files = []
        pickled = sorted(name for name in files if any(Path(name).match(pattern) for pattern in PICKLES) and "/" not in name)
        raise CheckpointError(how_to_convert(hub_id, pickled) if pickled else f"{hub_id} holds no safetensors")
    return Path(found)


def _check_dtype(dtype: DTypeLike | None) -> None:
    if dtype is None:
        return
    if not jnp.issubdtype(dtype, jnp.floating):
        raise CheckpointError(f"dtype is {np.dtype(dtype)}: parameters must be floating-point")
    if jax.dtypes.canonicalize_dtype(dtype) != np.dtype(dtype):
        raise CheckpointError(f"dtype is {np.dtype(dtype)}: load the model inside `with jax.enable_x64(True):`")


def match_tensors(files: TensorFiles, expected: Mapping[str, Slot], config: ModelConfig) -> dict[str, str]:
    """The stored name of every expected tensor, checked both ways against the headers of the files."""
    prefix = FAMILIES[config.family].prefix
    bare = not any(name.startswith(prefix) for name in files.names)

    def stored(name: str) -> str:
        return name.removeprefix(prefix) if bare else name

    problems, found = list(files.problems), {}
    for name, slot in expected.items():
        given = slot.row.alias if slot.row.alias in files.names else stored(name)
        if given not in files.names:
            problems += [] if slot.row.copy else [f"{given} {list(slot.shape)} is missing"]
            continue
        found[name] = given
        if given not in files.unknown:
            problems += _misfits(given, files.tensors[given], slot)
    known = set(found.values()) | {stored(name) for name in buffer_names(config)}
    extra = sorted(files.names - files.unknown - known)
    problems += [f"{name} {list(files.tensors[name].shape)} belongs to no parameter" for name in extra]
    if problems:
        raise CheckpointError.listing(f"the weights do not fit the {config.family} model of config.json:", problems)
    return found


def _misfits(name: str, tensor: StoredTensor, slot: Slot) -> list[str]:
    problems = []
    if tensor.shape != slot.shape:
        problems.append(f"{name} has shape {list(tensor.shape)}, but config.json asks for {list(slot.shape)}")
    if tensor.kind not in STORED_DTYPES:
        supported = ", ".join(STORED_DTYPES)
        problems.append(
            f"{name} is stored as {tensor.kind}: supported are {supported}; of a quantized model load the original"
        )
    return problems
