"""Rotary positions in a config.json, in the spelling of transformers 5 and in those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kedit_jax.models.config import LinearScaling, Llama3Scaling, LongRope, RotaryConfig
from kedit_jax.models.fields import Fields

ROPE_TYPES: Mapping[str, str] = MappingProxyType({"default": "default", "linear": "linear", "llama3": "llama3"})


def read_rotary(fields: Fields, head_dim: int) -> RotaryConfig:
    """Rotation of the whole head.

    transformers 5 writes `rope_parameters`; before it, `rope_theta` and `rope_scaling` stood side by side. Without any of
    them theta is 10000, as in the first Llama models, whose files do not name it.
    """
    rope = rope_section(fields)
    for where in (fields, rope):
        where.must_be("partial_rotary_factor", 1, why="the whole head is rotated")
    return rotary_of(fields, rope, head_dim)


def rope_section(fields: Fields) -> Fields:
    """The nested object that says how positions are rotated; an empty one where there is none."""
    if fields.has("rope_parameters") and fields.has("rope_scaling"):
        fields.problem("both rope_parameters and rope_scaling are given: keep the one that the model was trained with")
    return fields.section("rope_parameters") or fields.section("rope_scaling") or Fields({}, "rope")


def rope_type(rope: Fields, types: Mapping[str, str] = ROPE_TYPES) -> str:
    """The kind of scaling; `type` in old files."""
    return rope.choice("rope_type" if rope.has("rope_type") or not rope.has("type") else "type", types, "default")


def rotary_of(
    fields: Fields,
    rope: Fields,
    dim: int,
    *,
    theta_field: str = "rope_theta",
    theta: float = 10000.0,
    by_layer: bool = False,
) -> RotaryConfig:
    """Rotation of `dim` components; theta stands in the section, in the field of that name beside it, or is the default.

    As in transformers 5, `original_max_position_embeddings` beside the section overrides the one in it, unless the
    section is one of several by kind of layer (`by_layer`).
    """
    kind = rope_type(rope)
    original = "original_max_position_embeddings"
    found = rope.number("rope_theta") if rope.has("rope_theta") else fields.number(theta_field, theta)
    scaling: Llama3Scaling | LinearScaling | None = None
    if kind == "linear":
        scaling = LinearScaling(rope.number("factor"))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_positions=(fields if fields.has(original) and not by_layer else rope).integer(original),
        )
    return RotaryConfig(dim=dim, theta=found, scaling=scaling)


def write_rotary(rotary: RotaryConfig | None) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 reads them."""
    if rotary is None:
        return {}
    scaling = rotary.scaling
    match scaling:
        case None:
            scaled: dict[str, Any] = {"rope_type": "default"}
        case LinearScaling():
            scaled = {"rope_type": "linear", "factor": scaling.factor}
        case Llama3Scaling():
            scaled = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
        case LongRope():
            scaled = {
                "rope_type": "longrope",
                "factor": scaling.factor,
                "attention_factor": scaling.attention_factor,
                "short_factor": list(scaling.short),
                "long_factor": list(scaling.long),
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    return {"rope_theta": rotary.theta, **{name: value for name, value in scaled.items() if value is not None}}


def rotated_share(rotary: RotaryConfig, head_dim: int) -> float:
    """The `partial_rotary_factor` of which transformers makes int(head_dim * factor) components."""
    share = rotary.dim / head_dim
    return share if int(head_dim * share) == rotary.dim else math.nextafter(share, 2.0)
