"""GPT-J: attention and MLP side by side on one norm, interleaved rotary positions on part of each head."""

from __future__ import annotations

from typing import Any

from kedit_jax.models.config import Biases, ModelConfig, RotaryConfig
from kedit_jax.models.family import Family, Weight, head, linear, norm, special_ids
from kedit_jax.models.fields import ACTIVATION_NAMES, ACTIVATIONS, Fields

_THETA = 10000.0  # GPT-J's files do not name it


def read_config(fields: Fields) -> ModelConfig:
    """What this family computes, from the fields of its config.json; what is not implemented is refused."""
    fields.must_be("scale_attn_weights", True, why="scores are divided by sqrt(head_dim)")
    fields.must_be("rotary", True, why="positions are rotary")
    d_model, n_heads = fields.integer("n_embd"), fields.integer("n_head")
    if d_model % n_heads:
        fields.problem(f"n_embd is {d_model}: it must be a multiple of n_head, {n_heads}")
    return ModelConfig(
        family="gptj",
        vocab_size=fields.integer("vocab_size"),
        n_layers=fields.layers("n_layer"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=fields.integer("n_inner", 4 * d_model),
        max_positions=fields.integer("n_positions"),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon"),
        activation=fields.choice("activation_function", ACTIVATIONS),
        parallel_block=True,
        rotary=RotaryConfig(dim=fields.integer("rotary_dim"), theta=_THETA, interleaved=True),
        biases=Biases(mlp=True, head=True),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        bos_id=fields.token_id("bos_token_id"),
        eos_ids=fields.token_ids("eos_token_id"),
        pad_id=fields.token_id("pad_token_id"),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_config` reads this configuration back from."""
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.n_layers,
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "n_positions": config.max_positions,
        "rotary_dim": None if config.rotary is None else config.rotary.dim,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        **special_ids(config),
    }


def weights(config: ModelConfig) -> list[Weight]:
    """Where each tensor of this family's checkpoints goes."""
    block = "transformer.h.{layer}"
    return [
        Weight("transformer.wte.weight", ("embedding",)),
        *norm(f"{block}.ln_1", "layers.attn_norm", bias=True),
        *linear(f"{block}.attn.q_proj", "layers.attn.q", bias=False),
        *linear(f"{block}.attn.k_proj", "layers.attn.k", bias=False),
        *linear(f"{block}.attn.v_proj", "layers.attn.v", bias=False),
        *linear(f"{block}.attn.out_proj", "layers.attn.o", bias=False),
        *linear(f"{block}.mlp.fc_in", "layers.mlp.up", bias=True),
        *linear(f"{block}.mlp.fc_out", "layers.mlp.down", bias=True),
        *norm("transformer.ln_f", "final_norm", bias=True),
        *head(config),
    ]


GPTJ = Family(
    model_type="gptj",
    architecture="GPTJForCausalLM",
    prefix="transformer.",
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    buffers=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
)
