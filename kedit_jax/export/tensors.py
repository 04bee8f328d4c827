"""The safetensors format, written tensor by tensor: safetensors' own writer wants a whole file in memory.

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of every tensor), and
the tensors' bytes without gaps.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import DTypeLike

from kedit_jax.errors import CheckpointError, ExportError

FLOATS: Mapping[str, np.dtype] = MappingProxyType(
    {
        "F64": np.dtype(np.float64),
        "F32": np.dtype(np.float32),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
    }
)
"""The format's names of the floating-point dtypes that NumPy can work with."""

STORABLE: Mapping[str, np.dtype] = MappingProxyType({str(FLOATS[kind]): FLOATS[kind] for kind in ("F32", "BF16", "F16")})
"""The dtypes that a user may ask for, by name: those that models are served in."""

_ALIGNMENT = 8
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: what the header says of it, and how to get it.

    Attributes:
        dtype: in the format's own spelling, such as BF16.
        size: in bytes.
        read: the array; of a dtype that is not in `FLOATS`, its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Content:
    """What a file holds, in the order of its bytes; `header` only if it is written as it was read."""

    tensors: tuple[Tensor, ...]
    metadata: Mapping[str, str]
    header: bytes | None = None


def tensor_of(name: str, dtype: np.dtype, shape: Sequence[int], read: Callable[[], np.ndarray]) -> Tensor:
    """A tensor of one of the dtypes in `FLOATS`."""
    kind = next(kind for kind, known in FLOATS.items() if known == dtype)
    return Tensor(name, kind, tuple(shape), math.prod(shape) * dtype.itemsize, read)


def storable(dtype: DTypeLike, what: str) -> np.dtype:
    """The dtype, or an ExportError that names those which `what` can be stored in."""
    try:
        return STORABLE[str(np.dtype(dtype))]
    except (TypeError, KeyError):
        raise ExportError(f"{what} cannot be stored as {dtype}: give dtype as one of {', '.join(STORABLE)}") from None


def read_content(path: Path) -> Content:
    """The tensors of a file, which is opened anew for each one that is read."""
    try:
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        fields = json.loads(header)
        metadata = fields.pop(_METADATA, {})
        begin = 8 + len(header)
        ordered = sorted(fields.items(), key=lambda item: item[1]["data_offsets"])
        return Content(tuple(_stored(path, begin, name, about) for name, about in ordered), metadata, header)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _stored(path: Path, begin: int, name: str, about: Mapping[str, Any]) -> Tensor:
    first, last = about["data_offsets"]
    dtype, shape = FLOATS.get(about["dtype"]), tuple(about["shape"])

    def read() -> np.ndarray:
        with path.open("rb") as file:
            file.seek(begin + first)
            data = bytearray(last - first)
            if file.readinto(data) != len(data):
                raise CheckpointError(f"{path} ends before the last byte of {name}: copy or download it again")
        return np.frombuffer(data, np.uint8) if dtype is None else np.frombuffer(data, dtype).reshape(shape)

    return Tensor(name, about["dtype"], shape, last - first, read)


def write_content(path: Path, content: Content) -> None:
    """Write a file; one tensor at a time is in memory."""
    header = content.header or _header(content)
    with path.open("xb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in content.tensors:
            file.write(raw_bytes(tensor.read()))
        file.flush()
        os.fsync(file.fileno())


def raw_bytes(array: np.ndarray) -> memoryview:
    """The array's bytes in order of its axes, not copied where they lie so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def size_of(content: Content) -> int:
    """Bytes of the file, within some KiB."""
    return sum(tensor.size + 128 + len(tensor.name) for tensor in content.tensors)


def ordered(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Widest dtypes first, as safetensors itself does: so each tensor begins at a multiple of its item size."""
    return tuple(sorted(tensors, key=lambda tensor: -(tensor.size // max(1, math.prod(tensor.shape)))))


def _header(content: Content) -> bytes:
    fields: dict[str, Any] = {_METADATA: dict(content.metadata)} if content.metadata else {}
    for tensor, (begin, end) in zip(content.tensors, _places(content.tensors), strict=True):
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % _ALIGNMENT)


def _places(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    at = 0
    for tensor in tensors:
        yield at, at + tensor.size
        at += tensor.size
