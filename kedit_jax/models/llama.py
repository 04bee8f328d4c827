"""Llama 3.x (3.2 ties its embeddings), and what its relatives share with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from kedit_jax.models.config import Biases, ModelConfig, RotaryConfig
from kedit_jax.models.family import Family, Weight, head, linear, norm, special_ids
from kedit_jax.models.fields import ACTIVATION_NAMES, ACTIVATIONS, Fields
from kedit_jax.models.rotary import read_rotary, write_rotary

INVERSE_FREQUENCIES = ("model.layers.{layer}.self_attn.rotary_emb.inv_freq",)
"""Old files hold what follows from theta."""


def read_config(fields: Fields) -> ModelConfig:
    """What this family computes, from the fields of its config.json; what is not implemented is refused."""
    biases = dataclasses.replace(attention_biases(fields), mlp=fields.flag("mlp_bias", False))
    return read_gated(fields, "llama", biases)


def attention_biases(fields: Fields) -> Biases:
    """`attention_bias` speaks of all four projections of the attention."""
    given = fields.flag("attention_bias", False)
    return Biases(qkv=given, attn_out=given)


def read_gated(
    fields: Fields,
    family: str,
    biases: Biases,
    *,
    activation: str = "hidden_act",
    tied: bool = False,
    rotary: Callable[[Fields, int], RotaryConfig] = read_rotary,
    **more: Any,
) -> ModelConfig:
    """The fields shared by the families with RMSNorm, rotary positions and a gated MLP.

    Args:
      fields: of the config.json.
      family: its `model_type`.
      biases: which the family has.
      activation: the name of the field that holds it.
      tied: whether embeddings are tied where the file does not say.
      rotary: reads the positions of heads of a given size.
      **more: further fields of the configuration, read before this is called: what is missing here keeps it from building.
    """
    d_model, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = read_head_dim(fields, d_model, n_heads)
    return ModelConfig(
        family=family,
        vocab_size=fields.integer("vocab_size"),
        n_layers=fields.layers("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        d_ff=fields.integer("intermediate_size"),
        max_positions=fields.integer("max_position_embeddings"),
        norm="rms",
        norm_eps=fields.number("rms_norm_eps"),
        activation=fields.choice(activation, ACTIVATIONS),
        gated_mlp=True,
        rotary=rotary(fields, head_dim),
        biases=biases,
        tie_embeddings=fields.flag("tie_word_embeddings", tied),
        bos_id=fields.token_id("bos_token_id"),
        eos_ids=fields.token_ids("eos_token_id"),
        pad_id=fields.token_id("pad_token_id"),
        **more,
    )


def read_head_dim(fields: Fields, d_model: int, n_heads: int) -> int:
    """The width of a head: as given, or the model's shared among the heads."""
    if d_model % n_heads and not fields.has("head_dim"):
        fields.problem(f"hidden_size is {d_model}: without head_dim it must be a multiple of the {n_heads} heads")
    return fields.integer("head_dim", d_model // n_heads)


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_config` reads this configuration back from."""
    return {**write_gated(config), "attention_bias": config.biases.qkv, "mlp_bias": config.biases.mlp}


def write_gated(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that all families with a gated MLP have."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": write_rotary(config.rotary),
        **special_ids(config),
    }


def weights(config: ModelConfig) -> list[Weight]:
    """Where each tensor of this family's checkpoints goes."""
    block, biases = "model.layers.{layer}", config.biases
    return [
        *outside(config),
        *norm(f"{block}.input_layernorm", "layers.attn_norm", bias=False),
        *attention(config),
        *norm(f"{block}.post_attention_layernorm", "layers.mlp_norm", bias=False),
        *linear(f"{block}.mlp.gate_proj", "layers.mlp.gate", bias=biases.mlp),
        *linear(f"{block}.mlp.up_proj", "layers.mlp.up", bias=biases.mlp),
        *linear(f"{block}.mlp.down_proj", "layers.mlp.down", bias=biases.mlp),
    ]


def outside(config: ModelConfig) -> list[Weight]:
    """What lies before and behind the blocks."""
    return [
        Weight("model.embed_tokens.weight", ("embedding",)),
        *norm("model.norm", "final_norm", bias=False),
        *head(config),
    ]


def attention(config: ModelConfig) -> list[Weight]:
    """The attention of one block, with the norms of query and key heads where the family has them."""
    block, biases = "model.layers.{layer}.self_attn", config.biases
    rows = [
        *linear(f"{block}.q_proj", "layers.attn.q", bias=biases.qkv),
        *linear(f"{block}.k_proj", "layers.attn.k", bias=biases.qkv),
        *linear(f"{block}.v_proj", "layers.attn.v", bias=biases.qkv),
        *linear(f"{block}.o_proj", "layers.attn.o", bias=biases.attn_out),
    ]
    for name in ("q_norm", "k_norm") if config.qk_norm else ():
        rows += norm(f"{block}.{name}", f"layers.attn.{name}", bias=False)
    return rows


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    buffers=INVERSE_FREQUENCIES,
)
