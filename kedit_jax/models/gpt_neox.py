"""GPT-NeoX and Pythia: attention and MLP side by side on norms of their own, rotary positions on part of each head."""

from __future__ import annotations

from typing import Any

from kedit_jax.models.config import Biases, ModelConfig, RotaryConfig
from kedit_jax.models.family import Family, Weight, head, linear, norm, special_ids
from kedit_jax.models.fields import ACTIVATION_NAMES, ACTIVATIONS, Fields
from kedit_jax.models.rotary import rope_section, rotary_of, rotated_share, write_rotary

_ROTATED_SHARE = 0.25  # where a file does not name it


def read_config(fields: Fields) -> ModelConfig:
    """What this family computes, from the fields of its config.json; what is not implemented is refused."""
    d_model, n_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if d_model % n_heads:
        fields.problem(f"hidden_size is {d_model}: it must be a multiple of num_attention_heads, {n_heads}")
    parallel = fields.flag("use_parallel_residual", True)
    attention_bias = fields.flag("attention_bias", True)
    return ModelConfig(
        family="gpt_neox",
        vocab_size=fields.integer("vocab_size"),
        n_layers=fields.layers("num_hidden_layers"),
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=fields.integer("intermediate_size"),
        max_positions=fields.integer("max_position_embeddings"),
        norm="layer",
        norm_eps=fields.number("layer_norm_eps"),
        activation=fields.choice("hidden_act", ACTIVATIONS),
        parallel_block=parallel,
        parallel_norms=parallel,
        rotary=read_rotary(fields, d_model // n_heads),
        biases=Biases(qkv=attention_bias, attn_out=attention_bias, mlp=True),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        bos_id=fields.token_id("bos_token_id"),
        eos_ids=fields.token_ids("eos_token_id"),
        pad_id=fields.token_id("pad_token_id"),
    )


def read_rotary(fields: Fields, head_dim: int) -> RotaryConfig:
    """Before transformers 5 this family had names of its own, `rotary_emb_base` and `rotary_pct`."""
    rope = rope_section(fields)
    if rope.has("partial_rotary_factor"):
        share = rope.number("partial_rotary_factor", maximum=1.0)
    else:
        share = fields.number("rotary_pct", _ROTATED_SHARE, maximum=1.0)
    return rotary_of(fields, rope, int(head_dim * share), theta_field="rotary_emb_base")


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `read_config` reads this configuration back from."""
    share = 1.0 if config.rotary is None else rotated_share(config.rotary, config.head_dim)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "max_position_embeddings": config.max_positions,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": ACTIVATION_NAMES[config.activation],
        "use_parallel_residual": config.parallel_block,
        "attention_bias": config.biases.qkv,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_parameters": {**write_rotary(config.rotary), "partial_rotary_factor": share},
        **special_ids(config),
    }


def weights(config: ModelConfig) -> list[Weight]:
    """Where each tensor of this family's checkpoints goes."""
    block, bias = "gpt_neox.layers.{layer}", config.biases.qkv
    return [
        Weight("gpt_neox.embed_in.weight", ("embedding",)),
        *norm(f"{block}.input_layernorm", "layers.attn_norm", bias=True),
        *fused_heads(f"{block}.attention.query_key_value", config.n_heads, bias=bias),
        *linear(f"{block}.attention.dense", "layers.attn.o", bias=bias),
        *norm(f"{block}.post_attention_layernorm", "layers.mlp_norm", bias=True),
        *linear(f"{block}.mlp.dense_h_to_4h", "layers.mlp.up", bias=True),
        *linear(f"{block}.mlp.dense_4h_to_h", "layers.mlp.down", bias=True),
        *norm("gpt_neox.final_layer_norm", "final_norm", bias=True),
        *head(config, "embed_out", alias="lm_head.weight"),
    ]


def fused_heads(name: str, n_heads: int, *, bias: bool) -> list[Weight]:
    """Query, key and value of the first head, then of the second ..."""
    paths = [f"layers.attn.{part}" for part in ("q", "k", "v")]
    rows = [Weight(f"{name}.weight", tuple(f"{path}.kernel" for path in paths), transpose=True, groups=n_heads)]
    return [*rows, Weight(f"{name}.bias", tuple(f"{path}.bias" for path in paths), groups=n_heads)] if bias else rows


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    buffers=tuple("gpt_neox.layers.{layer}.attention." + name for name in ("bias", "masked_bias", "rotary_emb.inv_freq")),
)
