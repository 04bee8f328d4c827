"""The names of leaves in trees of parameters."""

from __future__ import annotations

from typing import Any

import jax


def dotted(path: tuple[Any, ...]) -> str:
    """`layers.mlp.down.kernel` for a key path; the `.value` that ends the path of a Flax parameter is left out.

    A dictionary's own key "value" stays: attention weights of plain trees bear that name.
    """
    if len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")
