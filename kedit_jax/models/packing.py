"""Packed tokens: rows of different lengths with no padding between them, and with their common beginnings once.

What is computed token by token (norms, projections, MLPs) runs over N packed tokens [1, N, ...]; only the attention needs
rows [B, T, ...]. A `Packing` leads from one to the other. Both ways are gathers, in the backward pass too: the transpose of
a gather is a scatter, which CPUs and TPUs are slow at, and which would add the gradients of padding to some token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped


@partial(jax.tree_util.register_dataclass, data_fields=["slots", "homes", "used"], meta_fields=["shared"])
@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of B rows of T columns stand among N packed ones.

    Attributes:
        slots: the packed place of each column's token; at padding some token of the same row. A NaN in a row spreads no
            further than to the tokens whose home that row is.
        homes: row * T + column of each packed token, in one of the rows that have it; B * T for places that are not used.
        used: False at padding.
        shared: whether several columns may be one packed token, as common beginnings of rows are. Such gathers are
            transposed by scattering, as always; one-to-one gathers by the opposite gather.
    """

    slots: Int[Array | np.ndarray, "B T"]
    homes: Int[Array | np.ndarray, " N"]
    used: Bool[Array | np.ndarray, "B T"]
    shared: bool


def unpack(packing: Packing, tokens: Shaped[Array, "1 N *rest"]) -> Shaped[Array, "B T *rest"]:
    """The rows of packed tokens; padding holds copies of other tokens of its row."""
    to_rows = _to_rows if packing.shared else _unpack
    return to_rows(tokens, *map(jnp.asarray, (packing.slots, packing.homes, packing.used)))


def pack(packing: Packing, rows: Shaped[Array, "B T *rest"]) -> Shaped[Array, "1 N *rest"]:
    """The packed tokens of rows; places that are not used hold 0."""
    to_tokens = _to_tokens if packing.shared else _pack
    return to_tokens(rows, *map(jnp.asarray, (packing.slots, packing.homes, packing.used)))


def single_tokens(count: int) -> Packing:
    """Packed tokens each of which is a row of its own."""
    places = np.arange(count, dtype=np.int32)
    return Packing(places[:, None], places, np.ones((count, 1), bool), shared=False)


# The arrays one by one: `jax.custom_vjp` rebuilds its arguments' trees with placeholders, which a typed record refuses.


def _to_rows(tokens: Array, slots: Array, homes: Array, used: Array) -> Array:
    return tokens[0].at[slots].get(mode="promise_in_bounds")


def _to_tokens(rows: Array, slots: Array, homes: Array, used: Array) -> Array:
    return rows.reshape(-1, *rows.shape[2:]).at[homes].get(mode="fill", fill_value=0)[None]


def _to_masked_rows(tokens: Array, slots: Array, homes: Array, used: Array) -> Array:
    real = used.reshape(*used.shape, *(1,) * (tokens.ndim - 2))
    return jnp.where(real, _to_rows(tokens, slots, homes, used), 0)


Places = tuple[Array, Array, Array]
Slopes = tuple[Array, None, None, None]


def _keep_places(x: Array, *places: Array) -> tuple[Array, tuple[Array, ...]]:
    return _to_rows(x, *places), places


def _keep_places_packed(x: Array, *places: Array) -> tuple[Array, tuple[Array, ...]]:
    return _to_tokens(x, *places), places


def _slope_of_tokens(places: Places, slope: Array) -> Slopes:
    return _to_tokens(slope, *places), None, None, None


def _slope_of_rows(places: Places, slope: Array) -> Slopes:
    return _to_masked_rows(slope, *places), None, None, None


_unpack, _pack = jax.custom_vjp(_to_rows), jax.custom_vjp(_to_tokens)
_unpack.defvjp(_keep_places, _slope_of_tokens)
_pack.defvjp(_keep_places_packed, _slope_of_rows)
