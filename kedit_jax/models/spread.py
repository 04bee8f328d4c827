"""Where a model and its batches lie on a mesh of devices: the one place that says so.

A mesh has two axes. Requests and texts are spread over `data`, kernels over `model`: heads, key width and vocabulary. At
rest kernels are cut along both axes; a layer is gathered over `data` just before it runs, so that a chip holds
1 / (data * model) of the model and one layer more. Axes have the type Auto: the compiler carries the layout from parameters
and batches through a program, and says what it made of it (`experiments/scale`).

What the solver keeps in float64 (moments, factors of priors, constraints, updates) lies on no device: every process holds
it in its own memory, and the same steps give each the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from kedit_jax.errors import KeditError
from kedit_jax.hosts import laid_out, to_host
from kedit_jax.models.config import ModelConfig
from kedit_jax.models.paths import dotted

DATA, MODEL = "data", "model"

Tree = TypeVar("Tree")
Axes = tuple[str | None, ...]

_QUERIES: dict[str, Axes] = {"attn.q.kernel": (DATA, MODEL), "attn.q.bias": (MODEL,), "attn.o.kernel": (MODEL, DATA)}
_KEYS: dict[str, Axes] = {
    name: axes for kv in "kv" for name, axes in ((f"attn.{kv}.kernel", (DATA, MODEL)), (f"attn.{kv}.bias", (MODEL,)))
}
_OTHERS: dict[str, Axes] = {
    "mlp.up.kernel": (DATA, MODEL),
    "mlp.up.bias": (MODEL,),
    "mlp.gate.kernel": (DATA, MODEL),
    "mlp.gate.bias": (MODEL,),
    "mlp.down.kernel": (MODEL, DATA),
    "embedding": (MODEL, DATA),
    "head.kernel": (DATA, MODEL),
    "head.bias": (MODEL,),
}
"""The axes of each parameter's dimensions, in blocks without the leading one of layers; all others are on every chip."""


def make_mesh(data: int = 1, model: int | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices; `model` is what `data` leaves of them unless given.

    Neighbours along `model` talk in every layer: by default they are those whose numbers follow each other, as on one host.

    Raises:
        KeditError: another number of devices than there are.
    """
    devices = jax.devices() if devices is None else devices
    model = max(1, len(devices) // max(1, data)) if model is None else model
    if data < 1 or model < 1 or data * model != len(devices):
        raise KeditError(
            f"a mesh data={data}, model={model} has {data * model} devices, but there are {len(devices)}: "
            "make the product that number"
        )
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


@dataclass(frozen=True)
class Spread:
    """How one model lies on a mesh: pass it to `load_model` as its placement.

    Attributes:
        mesh: with the axes `data` and `model`; an abstract one will do to plan for it.
        config: of the model.
    """

    mesh: Any
    config: ModelConfig

    @property
    def data(self) -> int:
        """Parts that requests and texts are dealt to."""
        return int(self.mesh.shape[DATA])

    @property
    def model(self) -> int:
        """Parts that kernels are cut into."""
        return int(self.mesh.shape[MODEL])

    def __call__(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Where a parameter lies at rest."""
        return NamedSharding(self.mesh, self.at_rest(path, shape))

    def at_rest(self, path: str, shape: tuple[int, ...]) -> P:
        """How a parameter is cut; along dimensions that the axis does not divide, not at all."""
        inside = path.startswith("layers.")
        return self._dividing((None, *_axes(path.removeprefix("layers."))) if inside else _axes(path), shape)

    def in_use(self, tree: Tree) -> Tree:
        """Parameters of one layer, or of what is outside of layers, as they are computed with: whole along `data`.

        Whole along `model`, too, where it does not divide the heads: half a head would be gathered in every product.
        """

        def laid(path: tuple[Any, ...], leaf: Array) -> Array:
            name = dotted(path)
            axes = tuple(None if axis == DATA else axis for axis in _axes(name, self._heads_divide()))
            # As it rests first: what is asked of a layer would else be asked of the stack that it is taken from, and all of
            # that be gathered before the loop over layers (Llama-3-8B on 16 chips: 4.1 GiB a chip beside the model's 0.9).
            for spec in (self._dividing(_axes(name), leaf.shape), self._dividing(axes, leaf.shape)):
                leaf = jax.lax.with_sharding_constraint(leaf, NamedSharding(self.mesh, spec))
            return leaf

        return jax.tree_util.tree_map_with_path(laid, tree)

    def everywhere(self, tree: Tree) -> Tree:
        """Results that every process reads."""
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, P()))

    def put(self, tree: Tree, *axes: Any) -> Tree:
        """Host arrays on the mesh, the leading dimensions along these axes; each process hands over its own part alone."""

        def place(leaf: Any) -> Array:
            host = np.asarray(leaf)
            return laid_out(host, NamedSharding(self.mesh, P(*axes[: host.ndim])))

        return jax.tree.map(place, tree)

    def _heads_divide(self) -> tuple[bool, bool]:
        """Whether queries, and keys and values, can be cut between heads."""
        return self.config.n_heads % self.model == 0, self.config.n_kv_heads % self.model == 0

    def _dividing(self, axes: Axes, shape: Sequence[int]) -> P:
        return P(
            *(axis if axis and size % self.mesh.shape[axis] == 0 else None for axis, size in zip(axes, shape, strict=False))
        )


def _axes(name: str, heads: tuple[bool, bool] = (True, True)) -> Axes:
    for table, divide in ((_QUERIES, heads[0]), (_KEYS, heads[1]), (_OTHERS, True)):
        if name in table:
            return tuple(axis if divide or axis != MODEL else None for axis in table[name])
    return ()


def together(spread: Spread | None, parts: Sequence[Tree]) -> list[Tree]:
    """Parts of one shape as programs take them: one by one, or stacked, as many as `data` says, each on its share of the
    mesh. The last stack is filled up with copies of the last part."""
    if spread is None:
        return list(parts)
    stacks = []
    for begin in range(0, len(parts), spread.data):
        some = list(parts[begin : begin + spread.data])
        full = some + some[-1:] * (spread.data - len(some))
        stacks.append(spread.put(jax.tree.map(lambda *leaves: np.stack(leaves), *full), DATA))
    return stacks


def apart(spread: Spread | None, stacks: Sequence[Any], count: int) -> list[Any]:
    """On the host, the results for each of `count` parts that `together` put into stacks."""
    if spread is None:
        return [to_host(part) for part in stacks]
    found = []
    for stack in map(to_host, stacks):
        found += [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(spread.data)]
    return found[:count]


def on_shares(spread: Spread | None, run: Callable[..., Tree], *stacked: Any, read: bool = True) -> Tree:
    """`run` of each part of what `together` stacked, on its share of the mesh. To be called under `jit`.

    Args:
        read: whether processes read the results, which then are on every device; if not, they stay on their shares.
    """
    if spread is None:
        raise KeditError("the model lies on no mesh; load it with one")
    found = jax.vmap(run)(*stacked)  # no `spmd_axis_name`: it forbids to say of parameters that they rest along `data`
    return spread.everywhere(found) if read else found


def share(mesh: Any, spec: P, shape: Sequence[int]) -> int:
    """How many numbers of an array of this shape one device holds."""
    cuts = [axis for axes in spec if axes is not None for axis in ((axes,) if isinstance(axes, str) else axes)]
    return math.prod(shape) // math.prod(mesh.shape[axis] for axis in cuts)


def leading(rows: Shaped[np.ndarray, "b *rest"], multiple: int) -> Shaped[np.ndarray, "_ *rest"]:
    """Rows of zeros added until their number is such a multiple."""
    return np.pad(rows, [(0, -len(rows) % multiple), *[(0, 0)] * (rows.ndim - 1)])
