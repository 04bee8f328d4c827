"""The supported families, by the `model_type` of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from kedit_jax.errors import CheckpointError, KeditError, shown
from kedit_jax.models.config import ModelConfig
from kedit_jax.models.family import Family
from kedit_jax.models.fields import Fields
from kedit_jax.models.gemma2 import GEMMA2
from kedit_jax.models.gemma3 import GEMMA3
from kedit_jax.models.gpt2 import GPT2
from kedit_jax.models.gpt_neox import GPT_NEOX
from kedit_jax.models.gptj import GPTJ
from kedit_jax.models.llama import LLAMA
from kedit_jax.models.mistral import MISTRAL
from kedit_jax.models.phi3 import PHI3
from kedit_jax.models.qwen2 import QWEN2
from kedit_jax.models.qwen3 import QWEN3

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.model_type: family for family in (GPT2, GPTJ, GPT_NEOX, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3)}
)

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")


def config_from_json(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Translate the content of a Hugging Face config.json.

    Raises:
      CheckpointError: an unknown `model_type`, or everything that is missing, malformed or not implemented.
    """
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{source}: it is {shown(raw)}, not an object")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{source}: model_type is {shown(model_type)}{_what_it_is(raw)}; supported are {', '.join(sorted(FAMILIES))}"
        )
    fields = Fields(raw, source)
    for name in ("quantization_config", "compression_config"):
        fields.must_be(name, why="load the unquantized checkpoint, stored as float32, bfloat16 or float16")
    for name in _EXPERTS:
        fields.must_be(name, 0, 1, why="a layer must have one down projection to edit; load a dense model")
    fields.must_be("pruned_heads", {}, why="load a checkpoint with all its heads")
    try:
        config = FAMILIES[model_type].read_config(fields)
    except KeditError as error:
        fields.finish()  # a problem of single fields explains why they do not fit together
        raise CheckpointError(f"{source}: {error}") from error
    fields.finish()
    return config


def config_to_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers opens as this model."""
    family = FAMILIES[config.family]
    return {"architectures": [family.architecture], "model_type": family.model_type, **family.write_config(config)}


def _what_it_is(raw: Mapping[str, Any]) -> str:
    """Why a model of another family is not among those supported, where its fields tell."""
    experts = [name for name in _EXPERTS if raw.get(name) not in (None, 0, 1)]
    if experts:
        told = f"{experts[0]} is {shown(raw[experts[0]])}"
        return f", a mixture of experts ({told}): its layers have no one down projection to edit"
    text = raw.get("text_config")
    if isinstance(text, Mapping):
        return f", a model of more than text: save its language model alone (text_config is {shown(text.get('model_type'))})"
    return ""
