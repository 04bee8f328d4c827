"""Packed tokens: rows of different lengths with no padding between them, and with their common beginnings once.

What is computed token by token (norms, projections, MLPs) runs over N packed tokens [1, N, ...]; only the attention needs
rows [B, T, ...]. A `Packing` leads from one to the other. Both ways are gathers, in the backward pass too: the transpose of
a gather is a scatter, which CPUs and TPUs are slow at, and which would add the gradients of padding to some token.
"""

from __future__ import annotations

from collections.abc import Callable
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
    return (_to_rows if packing.shared else _unpack)(tokens, *_places(packing))


def pack(packing: Packing, rows: Shaped[Array, "B T *rest"]) -> Shaped[Array, "1 N *rest"]:
    """The packed tokens of rows; places that are not used hold 0."""
    return (_to_tokens if packing.shared else _pack)(rows, *_places(packing))


def unpack_heads(packing: Packing, tokens: Shaped[Array, "1 N H hd"]) -> Shaped[Array, "B H T hd"]:
    """`unpack`, with heads before tokens, as the attention multiplies: no array is transposed for it."""
    return (_to_head_rows if packing.shared else _unpack_heads)(tokens, *_places(packing))


def pack_heads(packing: Packing, rows: Shaped[Array, "B H T hd"]) -> Shaped[Array, "1 N H hd"]:
    """`pack` of rows with heads before tokens."""
    return (_to_head_tokens if packing.shared else _pack_heads)(rows, *_places(packing))


def single_tokens(count: int) -> Packing:
    """Packed tokens each of which is a row of its own."""
    places = np.arange(count, dtype=np.int32)
    return Packing(places[:, None], places, np.ones((count, 1), bool), shared=False)


# The arrays one by one: `jax.custom_vjp` rebuilds its arguments' trees with placeholders, which a typed record refuses.

Gather = Callable[..., Array]


def _places(packing: Packing) -> tuple[Array, Array, Array]:
    slots, homes, used = map(jnp.asarray, (packing.slots, packing.homes, packing.used))
    return slots, homes, used


def _to_rows(tokens: Array, slots: Array, homes: Array, used: Array) -> Array:
    return tokens[0].at[slots].get(mode="promise_in_bounds")


def _to_tokens(rows: Array, slots: Array, homes: Array, used: Array) -> Array:
    return rows.reshape(-1, *rows.shape[2:]).at[homes].get(mode="fill", fill_value=0)[None]


# Heads are no index of these gathers: where they lie spread over devices, each gathers its own.


def _to_head_rows(tokens: Array, slots: Array, homes: Array, used: Array) -> Array:
    return jnp.swapaxes(_to_rows(tokens, slots, homes, used), 1, 2)


def _to_head_tokens(rows: Array, slots: Array, homes: Array, used: Array) -> Array:
    row, column = jnp.divmod(homes, rows.shape[2])  # of places that are not used, a row beyond the last
    return rows.at[row, :, column].get(mode="fill", fill_value=0)[None]


def _to_real_rows(tokens: Array, slots: Array, homes: Array, used: Array) -> Array:
    return jnp.where(used.reshape(*used.shape, *(1,) * (tokens.ndim - 2)), _to_rows(tokens, slots, homes, used), 0)


def _to_real_head_rows(tokens: Array, slots: Array, homes: Array, used: Array) -> Array:
    return jnp.where(used[:, None, :, None], _to_head_rows(tokens, slots, homes, used), 0)


def _one_to_one(forth: Gather, back: Gather) -> Gather:
    """A gather that is transposed by the opposite one."""

    def keep(x: Array, *places: Array) -> tuple[Array, tuple[Array, ...]]:
        return forth(x, *places), places

    def slope(places: tuple[Array, ...], slope: Array) -> tuple[Array, None, None, None]:
        return back(slope, *places), None, None, None

    gather = jax.custom_vjp(forth)
    gather.defvjp(keep, slope)
    return gather


_unpack, _pack = _one_to_one(_to_rows, _to_tokens), _one_to_one(_to_tokens, _to_real_rows)
_unpack_heads = _one_to_one(_to_head_rows, _to_head_tokens)
_pack_heads = _one_to_one(_to_head_tokens, _to_real_head_rows)
