"""What an editor hands over: updates of named kernels, added to or taken from any tree of parameters.

A kernel is named by its address: the dotted path of a parameter in the tree, with `[i]` behind it where the parameter
stacks several kernels on a leading axis. `layers.mlp.down.kernel[3]` is the down projection of the fourth block of a
`kedit_jax.models.Decoder`; `blocks.3.down` would be a leaf of a plain nested dictionary and list.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from kedit_jax.errors import KeditError
from kedit_jax.hosts import laid_out, one_of, to_host
from kedit_jax.models.paths import dotted

Params = TypeVar("Params")
AnyArray = Array | np.ndarray

_ADDRESS = re.compile(r"(?P<path>[^\[\]]+)(?:\[(?P<index>0|[1-9][0-9]*)\])?")


@partial(jax.tree_util.register_dataclass, data_fields=["left", "right"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class LowRank:
    """The update `left @ right` of a kernel [k, v], kept as its factors: cheaper while r (k + v) < k v."""

    left: Float[AnyArray, "k r"]
    right: Float[AnyArray, "r v"]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.left.shape[0], self.right.shape[1])

    def dense(self) -> Float[AnyArray, "k v"]:
        """The update itself; multiplied at the highest precision the device has, as TPUs default to bfloat16."""
        if _on_host(self.left, self.right):
            return np.matmul(self.left, self.right)
        return jnp.matmul(self.left, self.right, precision=jax.lax.Precision.HIGHEST)

    def scaled(self, factor: float) -> "LowRank":
        return LowRank(self.left * factor, self.right)


@partial(jax.tree_util.register_dataclass, data_fields=["update"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class Dense:
    """The update of a kernel [k, v] written out."""

    update: Float[AnyArray, "k v"]

    @property
    def shape(self) -> tuple[int, int]:
        return (self.update.shape[0], self.update.shape[1])

    def dense(self) -> Float[AnyArray, "k v"]:
        return self.update

    def scaled(self, factor: float) -> "Dense":
        return Dense(self.update * factor)


Update = LowRank | Dense


def _on_host(*arrays: Any) -> bool:
    """Whether NumPy can work on them. `jax.numpy` would round float64 to float32 on the way in, unless x64 is enabled."""
    return all(isinstance(array, np.ndarray) for array in arrays)


@partial(jax.tree_util.register_dataclass, data_fields=["updates"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class EditDelta:
    """Updates of several kernels, by address. A pytree: it passes through jit, grad and checkpoints."""

    updates: Mapping[str, Update]

    def __getitem__(self, address: str) -> Update:
        return self.updates[address]

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(self.updates)

    def scaled(self, factor: float) -> "EditDelta":
        """Every update times `factor`; -1 is the delta that takes this one back."""
        return EditDelta({address: update.scaled(factor) for address, update in self.updates.items()})

    def __add__(self, other: "EditDelta") -> "EditDelta":
        """The delta of one edit after the other."""
        both = dict(self.updates)
        for address, update in other.updates.items():
            both[address] = _sum(both[address], update) if address in both else update
        return EditDelta(both)


def _sum(first: Update, second: Update) -> Update:
    """first + second, as factors where that is the smaller form."""
    if first.shape != second.shape:
        raise KeditError(f"updates of one kernel have shapes {first.shape} and {second.shape}; they must agree")
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        keys, values = first.shape
        rank = first.left.shape[1] + second.left.shape[1]
        if rank * (keys + values) < keys * values:
            factors = (first.left, first.right, second.left, second.right)
            concatenate = np.concatenate if _on_host(*factors) else jnp.concatenate
            return LowRank(concatenate([first.left, second.left], axis=1), concatenate([first.right, second.right], axis=0))
    return Dense(first.dense() + second.dense())


def apply_edits(params: Params, edits: EditDelta) -> Params:
    """The parameters with every update added: `W + D` at each address of `edits`, all else as it was.

    Pure and undecorated: `jax.jit(apply_edits)` is what scripts call, donating `params` if they wish. Each sum is made
    in the wider of the two dtypes and rounded once to the parameter's own, which it keeps. Updates in NumPy's float64 are
    added in float64 on the host; under `jax.jit` they are float32 unless x64 is enabled, as all its arguments are.

    Args:
        params: any pytree of arrays: a `Decoder`, or nested dictionaries and lists.
        edits: updates of shape [k, v] by address.

    Raises:
        KeditError: listing every address that names no parameter, or whose shape does not fit.
    """
    return _add(params, edits, 1.0)


def revert_edits(params: Params, edits: EditDelta) -> Params:
    """The parameters with every update of `edits` taken away, the counterpart of `apply_edits`.

    What was rounded when the update was added stays rounded: the result equals the original up to the last bits of the
    parameter's dtype. To return bit for bit, keep the original parameters; an `EditSession` does.
    """
    return _add(params, edits, -1.0)


def relative_error(delta: EditDelta, reference: EditDelta) -> float:
    """|delta - reference| / |reference| in the Frobenius norm over all kernels; an address that one lacks has update 0."""
    gap = size = 0.0
    for address in {*delta.updates, *reference.updates}:
        with jax.enable_x64(True):
            ours, theirs = (
                np.asarray(each[address].dense(), np.float64) if address in each.updates else 0.0
                for each in (delta, reference)
            )
        gap += float(np.sum((ours - theirs) ** 2))
        size += float(np.sum(np.square(theirs)))
    return (gap / size) ** 0.5 if size else float(gap > 0)


def parameter_paths(params: Any) -> dict[str, Any]:
    """Every leaf of a tree by its dotted path, the name that addresses are made of."""
    return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def read_kernels(params: Any, addresses: Iterable[str]) -> dict[str, AnyArray]:
    """The kernels that stand at the addresses, [k, v] each.

    Raises:
        KeditError: listing every address that names no kernel of the tree.
    """
    leaves, targets = parameter_paths(params), {address: _parse(address) for address in addresses}
    _check(leaves, targets, {})
    return {address: _at(leaves[path], index) for address, (path, index) in targets.items()}


def host_kernel(params: Any, address: str) -> Float[np.ndarray, "k v"]:
    """The kernel at this address on the host, in its own dtype and read-only; not copied where it is in the host's memory.

    Raises:
        KeditError: an address that names no kernel of the tree.
    """
    leaves, (path, index) = parameter_paths(params), _parse(address)
    _check(leaves, {address: (path, index)}, {})
    leaf = leaves[path]
    if isinstance(leaf, jax.Array) and [device.platform for device in leaf.devices()] == ["cpu"]:
        leaf = np.asarray(leaf)  # a view of it, and of one kernel then
    if index is not None and isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
        return to_host(one_of(leaf, index))
    return np.asarray(_at(leaf, index))


def add_on_host(
    kernel: Float[np.ndarray, "k v"], update: Float[np.ndarray, "k v"], sign: float = 1.0
) -> Float[np.ndarray, "k v"]:
    """kernel + sign * update (sign 1 or -1), made in the wider dtype and rounded once to the kernel's, in one pass."""
    wide = jnp.promote_types(kernel.dtype, update.dtype)
    total = np.empty(kernel.shape, kernel.dtype)
    return (np.add if sign > 0 else np.subtract)(kernel, update, out=total, dtype=wide, casting="unsafe")


def write_kernels(params: Params, kernels: Mapping[str, Any], *, donate: bool = False) -> Params:
    """The parameters with these kernels [k, v] at their addresses, cast to the parameters' dtypes; all else as it was.

    Args:
        donate: stacks on a device that kernels are written into are reused, and must not be read again in `params`: a
            stack holds the kernels of every layer, and copying it costs as much as a step of the solver.

    Raises:
        KeditError: listing every address that names no kernel of the tree, or one of another shape.
    """
    targets = {address: _parse(address) for address in kernels}
    _check(parameter_paths(params), targets, {address: kernel.shape for address, kernel in kernels.items()})
    by_path: dict[str, list[tuple[int | None, Any]]] = {}
    put = _put_in_place if donate else _put
    for address, (path, index) in targets.items():
        by_path.setdefault(path, []).append((index, kernels[address]))

    def written(path: tuple[Any, ...], leaf: Any) -> Any:
        for index, kernel in by_path.get(dotted(path), ()):
            kernel = kernel.astype(leaf.dtype)  # before JAX sees it, which may hold no float64
            if isinstance(leaf, np.ndarray) and isinstance(kernel, np.ndarray):
                leaf = kernel if index is None else np.stack([*leaf[:index], kernel, *leaf[index + 1 :]])
            else:
                leaf = _put_whole(kernel, leaf) if index is None else put(leaf, *_beside(leaf, kernel), index)
        return leaf

    return jax.tree_util.tree_map_with_path(written, params)


def _with_kernel(
    stack: Float[AnyArray, "l k v"],
    kernel: Float[AnyArray, "k v"],
    sharding: NamedSharding | None,
    index: Int[AnyArray, ""] | int,
) -> Float[Array, "l k v"]:
    written = jax.lax.dynamic_update_index_in_dim(stack, kernel, index, 0)
    return written if sharding is None else jax.lax.with_sharding_constraint(written, sharding)


_put = jax.jit(_with_kernel, static_argnames="sharding")
_put_in_place = jax.jit(_with_kernel, static_argnames="sharding", donate_argnums=0)


def _mesh_of(leaf: Any) -> NamedSharding | None:
    """How a parameter lies on a mesh of devices, where it does."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1:
        return None
    return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None


def _beside(stack: Any, kernel: Any) -> tuple[Any, NamedSharding | None]:
    """A host's kernel on the devices as the stack's are, each holding its part alone, and how the stack lies."""
    sharding = _mesh_of(stack)
    if sharding is None or not isinstance(kernel, np.ndarray):
        return kernel, sharding
    return laid_out(kernel, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))), sharding


def _put_whole(kernel: Any, leaf: Any) -> Array:
    sharding = _mesh_of(leaf)
    return jnp.asarray(kernel) if sharding is None else laid_out(np.asarray(kernel), sharding)


def _add(params: Params, edits: EditDelta, sign: float) -> Params:
    _check(
        parameter_paths(params),
        {address: _parse(address) for address in edits.updates},
        {address: update.shape for address, update in edits.updates.items()},
    )
    kernels = read_kernels(params, edits.updates)
    return write_kernels(
        params, {address: _add_wide(kernel, edits[address].dense(), sign) for address, kernel in kernels.items()}
    )


def _add_wide(kernel: Any, update: AnyArray, sign: float) -> AnyArray:
    """kernel + sign * update in the wider dtype, cast once to the kernel's."""
    if _on_host(update) and not isinstance(kernel, jax.core.Tracer):
        return add_on_host(np.asarray(kernel), np.asarray(update), sign)
    kernel, update = jnp.asarray(kernel), jnp.asarray(update)
    wide = jnp.promote_types(kernel.dtype, update.dtype)
    return (kernel.astype(wide) + sign * update.astype(wide)).astype(kernel.dtype)


def _parse(address: str) -> tuple[str, int | None]:
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise KeditError(f"{address!r} is no address; write a dotted path, with [i] behind it for a stacked parameter")
    return match["path"], None if match["index"] is None else int(match["index"])


def _at(leaf: Any, index: int | None) -> Any:
    return leaf if index is None else leaf[index]


def _check(
    leaves: Mapping[str, Any],
    targets: Mapping[str, tuple[str, int | None]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise one error for all addresses that name nothing in the tree or whose shapes differ."""
    problems = []
    for address, (path, index) in targets.items():
        leaf = leaves.get(path)
        if leaf is None:
            close = [name for name in leaves if name.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
            problems.append(f"{address}: no such parameter; there are {', '.join((close or list(leaves))[:5])}")
            continue
        shape = np.shape(leaf)
        if index is not None and (len(shape) != 3 or index >= shape[0]):
            problems.append(f"{address}: the parameter has shape {shape}, no kernel number {index}")
        elif index is None and len(shape) != 2:
            problems.append(f"{address}: shape {shape} is no kernel [k, v]; add [i] for one of a stack")
        elif shape[-2:] != tuple(shapes.get(address, shape[-2:])):
            problems.append(f"{address}: the kernel has shape {shape[-2:]}, its update {shapes[address]}")
    if problems:
        raise KeditError.listing("edits that do not fit the parameters:", problems)
