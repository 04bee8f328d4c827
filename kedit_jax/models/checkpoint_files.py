"""The safetensors files of a Hugging Face directory, read as one mapping of names to tensors."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from kedit_jax.errors import CheckpointError, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
MAX_JSON = 2**26
"""Bytes of a JSON file; the index of a model of 100,000 tensors has 10 MB."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

STORED_DTYPES: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
    }
)
"""What weights may be stored as, by the format's own names."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `kind` is its dtype in the format's own spelling, such as BF16, `offset` counts from the
    beginning of the file."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def rows(self) -> int:
        """Along the first axis; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start <= i < stop of the first axis, copied into memory of their own.

        Memory maps, as safetensors has them, would keep the pages of whole files in this process's memory.

        Raises:
          CheckpointError: the file ends before them, as it may since it was opened.
        """
        dtype, stop = STORED_DTYPES[self.kind], self.rows if stop is None else stop
        width = int(np.prod(self.shape[1:]))
        offset = self.offset + start * width * dtype.itemsize
        with self.file.open("rb") as file:
            file.seek(offset)
            values = np.fromfile(file, dtype, (stop - start) * width)
        if values.size != (stop - start) * width:
            raise self._ended()
        return values.reshape(stop - start, *self.shape[1:]) if self.shape else values.reshape(())

    def read_part(self, index: tuple[slice, ...]) -> np.ndarray:
        """A part of it, copied; of other rows and columns nothing but what shares a page of the file is read.

        Raises:
          CheckpointError: as `read`.
        """
        try:
            mapped = np.memmap(self.file, STORED_DTYPES[self.kind], mode="r", offset=self.offset, shape=self.shape)
        except ValueError as error:
            raise self._ended() from error
        return np.array(mapped[index])

    def _ended(self) -> CheckpointError:
        return CheckpointError(f"{self.file} ends before its last tensor: download it again")


class TensorFiles:
    """The tensors of a directory, known from the headers of its files alone; a context like an open file, and as safe to
    use outside of `with`, because files are opened for one read at a time.

    Files that cannot be read, and an index that does not agree with them, are among the `problems`, so that they are
    reported together with what the weights lack.

    Attributes:
      tensors: by name.
      unknown: names of tensors that the index places in files which lack them or cannot be read.
      problems: why those are unknown, and what else is wrong with the files.

    Raises:
      CheckpointError: no safetensors at all (pickled weights are never opened: unpickling runs code), or no usable index.
    """

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.unknown: set[str] = set()
        self.problems: list[str] = []
        for file, promised in _files(directory).items():
            self._add(directory, file, promised)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def names(self) -> set[str]:
        return {*self.tensors, *self.unknown}

    def _add(self, directory: Path, file: str, promised: set[str] | None) -> None:
        """One file; `promised` is what the index places in it, where there is one."""
        try:
            held = _held(directory, file, promised)
        except CheckpointError as error:
            self.problems.append(str(error))
            self.unknown |= promised or set()
            return
        if promised is None:
            self.tensors = held
            return
        lacking, extra = sorted(promised - set(held)), sorted(set(held) - promised)
        self.problems += [f"{file} lacks {name}, which the index places there" for name in lacking]
        self.problems += [f"{file} holds {name}, which the index does not place there" for name in extra]
        self.tensors |= {name: held[name] for name in promised & set(held)}
        self.unknown |= set(lacking)


def locate_tensors(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor.

    Raises:
      CheckpointError: as `TensorFiles`, and everything that is wrong with the files.
    """
    files = TensorFiles(directory)
    if files.problems:
        raise CheckpointError.listing(f"the files of {directory} are damaged:", files.problems)
    return {name: tensor.file for name, tensor in files.tensors.items()}


def _files(directory: Path) -> dict[str, set[str] | None]:
    """The files with tensors, and what the index places in each of them; None without an index."""
    if (directory / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if (directory / INDEX_FILE).is_file():
        weight_map = read_json(directory / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{directory / INDEX_FILE} has no weight_map of tensor names to file names")
        files = sorted(set(weight_map.values()))
        return {file: {name for name, where in weight_map.items() if where == file} for file in files}
    pickled = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickled:
        raise CheckpointError(how_to_convert(str(directory), pickled))
    raise CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def how_to_convert(source: str, pickled: list[str]) -> str:
    """What to do with a model that has pickled weights only."""
    shown = ", ".join(pickled[:3]) + (f" and {len(pickled) - 3} more" if len(pickled) > 3 else "")
    return (
        f"{source} holds pickled weights alone ({shown}), which can run code when opened. If you trust their origin, "
        f"convert them once, with torch installed:\n"
        f'  python -c "from transformers import AutoModelForCausalLM as A, AutoTokenizer as T; '
        f"[each.from_pretrained({source!r}).save_pretrained('converted') for each in (A, T)]\"\n"
        f"and load the folder 'converted', which holds safetensors"
    )


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises CheckpointError where it is no complete safetensors file."""
    try:
        with safetensors.safe_open(str(path), framework="numpy"):
            pass  # checks the header, that tensors do not overlap, and that the file is as long as they need
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error})") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds, or a CheckpointError that names the file."""
    try:
        if path.exists() and not path.is_file():  # a device has no end, and a pipe may have no writer
            raise ValueError("it is no regular file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_JSON:
                raise ValueError(f"it has more than {MAX_JSON:,} bytes")
            text = file.read()
        content = json.loads(text.decode())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of numbers with thousands of digits, too
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return content


def _held(directory: Path, file: str, promised: set[str] | None) -> dict[str, StoredTensor]:
    if Path(file).name != file:
        raise CheckpointError(f"{file}: shards must lie beside the index")
    try:
        there = (directory / file).is_file()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(file)} is no name of a file: {error}") from error
    if not there:
        raise CheckpointError(
            f"{file} does not exist, but {INDEX_FILE} places {len(promised or ())} tensors in it: download it again"
        )
    try:
        return read_header(directory / file)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: download it again") from error
