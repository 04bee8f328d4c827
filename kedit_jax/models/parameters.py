"""The names of a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from kedit_jax.models.decoder import Decoder
from kedit_jax.models.paths import dotted


def named_parameters(model: Decoder) -> dict[str, Any]:
    """Every parameter by its dotted path, such as "layers.mlp.down.kernel", in sorted order.

    The values are arrays, or what stands in their place (shapes under `jax.eval_shape`, tracers under `jit`).
    """
    leaves = jax.tree_util.tree_flatten_with_path(model)[0]
    return dict(sorted((dotted(path), leaf) for path, leaf in leaves))


def with_parameters(model: Decoder, values: Mapping[str, Any]) -> Decoder:
    """The same model with every parameter replaced by that of its path in `values`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: values[dotted(path)], model)
