"""Tensors from files to their place on the devices, one after another."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from kedit_jax import hosts
from kedit_jax.errors import CheckpointError, KeditError
from kedit_jax.models.checkpoint_files import StoredTensor
from kedit_jax.models.table import Slot

Where: TypeAlias = jax.Device | jax.sharding.Sharding
Placement: TypeAlias = Where | Callable[[str, tuple[int, ...]], Where]
"""Where parameters go: all to one place, or each where a function of its path and shape says."""

BLOCK_BYTES = 2**24
"""How much of a tensor outside the blocks is read at once, as an embedding may be as large as a shard; and the size up to
which parameters are put together on the host, which spares small models the compilation of a program a shape (0.5 s)."""


def read_parameters(
    sources: Mapping[str, tuple[Slot, StoredTensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    placement: Placement | None = None,
) -> dict[str, Array]:
    """All parameters by path.

    Every tensor is written into its parameter where that lies, layer by layer into stacks; the host holds the tensor, its
    copy where it must be transposed or cast, and small parameters. A model on the CPU is itself in the host's memory. Of
    what is cut among devices, each process reads what its own ones hold; all must take part.

    Args:
      sources: what each tensor of a checkpoint fills and where it is stored, by name.
      shapes: of the parameters, by path.
      dtype: of all parameters.
      placement: where they go; None is JAX's default device.

    Raises:
      CheckpointError: all tensors that are not finite, perhaps only as `dtype`, or differ from their tied parameter.
    """
    values: dict[str, Array | np.ndarray] = {}
    check = _Check(dtype)
    origins = {slot.row.paths[0]: stored for slot, stored in sources.values() if not slot.row.copy}

    def order(item: tuple[str, tuple[Slot, StoredTensor]]) -> tuple[bool, Path, int]:
        slot, stored = item[1]
        return slot.row.copy, stored.file, stored.offset  # as the files lie on the disk, tied tensors last

    for name, (slot, stored) in sorted(sources.items(), key=order):
        cut = _cut(slot, shapes, dtype, placement)
        if cut is not None and not slot.row.copy:
            for path, layer in _laid_out(name, slot, stored, cut, check):
                if slot.layer is None:
                    values[path] = layer
                    continue
                if path not in values:
                    values[path] = jnp.zeros(shapes[path], dtype, device=cut[path])
                at = np.asarray([slot.layer, *[0] * layer.ndim], np.int32)
                values[path] = jax.block_until_ready(_write(values[path], layer[None], at, cut[path]))
            continue
        for start, block in _blocks(slot, stored):
            cast = check.cast(name, block)
            if slot.row.copy:
                check.same(name, cast, origins[slot.row.paths[0]].read(start, start + len(cast)))
                continue
            for path, part in zip(slot.row.paths, slot.unpack(cast), strict=True):
                if path not in values:
                    values[path] = _room(shapes[path], dtype, _where(placement, path, shapes[path]))
                values[path] = _written(values[path], part, slot, start)
    hosts.agree(check.problem())
    return {path: _placed(values.pop(path), _where(placement, path, shapes[path])) for path in list(values)}


def _is_small(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    return int(np.prod(shape)) * dtype.itemsize <= BLOCK_BYTES


def _cut(
    slot: Slot, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, placement: Placement | None
) -> dict[str, NamedSharding] | None:
    """How the parameters of a tensor are cut among devices; None where they are small or lie on one."""
    found = {path: _where(placement, path, shapes[path]) for path in slot.row.paths}
    cut = {path: where for path, where in found.items() if isinstance(where, NamedSharding) and where.num_devices > 1}
    return cut if len(cut) == len(found) and not any(_is_small(shapes[path], dtype) for path in cut) else None


def _laid_out(
    name: str, slot: Slot, stored: StoredTensor, cut: Mapping[str, NamedSharding], check: _Check
) -> Iterator[tuple[str, Array]]:
    """What a tensor holds of its parameters, one layer of them where they are stacked, on the devices."""
    paths = slot.row.paths
    if len(paths) == 1:

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or ()
            part = check.cast(name, stored.read_part(index[::-1] if slot.row.transpose else index))
            return part.T if slot.row.transpose else part

        shape = stored.shape[::-1] if slot.row.transpose else stored.shape
        yield paths[0], jax.make_array_from_callback(shape, _of_layer(cut[paths[0]], slot), read)
        return
    for path, part in zip(paths, slot.unpack(check.cast(name, stored.read())), strict=True):  # interleaved: read whole
        yield path, hosts.laid_out(part, _of_layer(cut[path], slot))


def _of_layer(cut: NamedSharding, slot: Slot) -> NamedSharding:
    """How one layer of a stack lies."""
    return cut if slot.layer is None else NamedSharding(cut.mesh, PartitionSpec(*cut.spec[1:]))


def _room(shape: tuple[int, ...], dtype: np.dtype, where: Where | None) -> Array | np.ndarray:
    """Space for a parameter, where it will stay unless it is small."""
    return np.empty(shape, dtype) if _is_small(shape, dtype) else jnp.zeros(shape, dtype, device=where)


def _placed(value: Array | np.ndarray, where: Where | None) -> Array:
    if not isinstance(value, np.ndarray):
        return value
    if isinstance(where, NamedSharding):
        return hosts.laid_out(value, where)
    return jnp.asarray(value) if where is None else jax.device_put(value, where)


def _blocks(slot: Slot, stored: StoredTensor) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of a stored tensor and the number of the first: all of a layer's tensor, parts of larger ones."""
    size = stored.rows
    if slot.layer is None and len(slot.row.paths) == 1 and len(stored.shape) > 1:
        size = max(1, BLOCK_BYTES // (4 * int(np.prod(stored.shape[1:]))))
    for start in range(0, stored.rows, size):
        yield start, stored.read(start, min(start + size, stored.rows))


def _written(whole: Array | np.ndarray, part: np.ndarray, slot: Slot, row: int) -> Array | np.ndarray:
    """`whole` with the part of a layer, or of a block of stored rows, in its place. The array given is used up."""
    start = [0] * whole.ndim
    if slot.layer is None:
        start[-1 if slot.row.transpose else 0] = row
    else:
        start[0], part = slot.layer, part[None]
    if isinstance(whole, np.ndarray):
        whole[tuple(slice(first, first + size) for first, size in zip(start, part.shape, strict=True))] = part
        return whole
    # Waiting bounds what is on its way: dispatching ahead held six tensors at a time.
    return jax.block_until_ready(_write(whole, part, np.asarray(start, np.int32), None))


@functools.partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _write(whole: Array, part: Array, start: Array, sharding: jax.sharding.Sharding | None) -> Array:
    written = lax.dynamic_update_slice(whole, part, tuple(start))
    return written if sharding is None else lax.with_sharding_constraint(written, sharding)


def _where(placement: Placement | None, path: str, shape: tuple[int, ...]) -> Where | None:
    if placement is None or isinstance(placement, jax.Device | jax.sharding.Sharding):
        return placement
    return placement(path, shape)


class _Check:
    """What is wrong with the values of tensors, counted block by block."""

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._stored: collections.Counter[str] = collections.Counter()
        self._cast: collections.Counter[str] = collections.Counter()
        self._different: dict[str, None] = {}

    def cast(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """The tensor in the dtype of the model."""
        with np.errstate(over="ignore"):  # reported by `problem`, by name
            cast = tensor.astype(self._dtype, copy=False)
        bad = _not_finite(cast)
        if bad:
            stored = _not_finite(tensor)
            self._stored[name] += stored
            self._cast[name] += bad - stored
        return cast

    def same(self, name: str, tensor: np.ndarray, tied: np.ndarray) -> None:
        if not np.array_equal(tensor, tied.astype(self._dtype, copy=False)):
            self._different[name] = None

    def problem(self) -> KeditError | None:
        """Everything that was found, in one error."""
        problems = [f"{name} holds {count} NaN or infinite values" for name, count in self._stored.items() if count]
        problems += [
            f"{name} holds {count} values too large for {self._dtype}" for name, count in self._cast.items() if count
        ]
        problems += [f"{name} differs from the embedding, but config.json ties them" for name in self._different]
        return CheckpointError.listing("the weights cannot be used:", problems) if problems else None


def _not_finite(tensor: np.ndarray) -> int:
    """How many values are NaN or infinite, counted in pieces: the mask of a whole tensor may be half its size."""
    flat, piece = tensor.reshape(-1), 2**22
    return sum(
        part.size - int(np.isfinite(part).sum()) for part in (flat[i : i + piece] for i in range(0, flat.size, piece))
    )
