"""GPT-2: learned positions, fused query-key-value projections, kernels stored as [in, out]."""

from __future__ import annotations

from typing import Any

from kedit_jax.errors import KeditError
from kedit_jax.models.config import Biases, ModelConfig
from kedit_jax.models.family import Family, Weight, head, norm, special_ids
from kedit_jax.models.fields import ACTIVATION_NAMES, ACTIVATIONS, Fields


def read_config(fields: Fields) -> ModelConfig:
    """What this family computes, from the fields of its config.json; what is not implemented is refused."""
    fields.must_be("scale_attn_weights", True, why="scores are divided by sqrt(head_dim)")
    fields.must_be("scale_attn_by_inverse_layer_idx", False, why="scores are not scaled by layer")
    fields.must_be("add_cross_attention", False, why="there is no encoder")
    d_model, n_heads = fields.integer("n_embd"), fields.integer("n_head")
    if d_model % n_heads:
        fields.problem(f"n_embd is {d_model}: it must be a multiple of n_head, {n_heads}")
    return ModelConfig(
        family="gpt2",
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
        biases=Biases(qkv=True, attn_out=True, mlp=True),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
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
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": ACTIVATION_NAMES[config.activation],
        "tie_word_embeddings": config.tie_embeddings,
        **special_ids(config),
    }


def conv1d(name: str, *paths: str) -> list[Weight]:
    """GPT-2's own linear layer, whose weight is [in, out]."""
    return [
        Weight(f"{name}.weight", tuple(f"{path}.kernel" for path in paths)),
        Weight(f"{name}.bias", tuple(f"{path}.bias" for path in paths)),
    ]


def weights(config: ModelConfig) -> list[Weight]:
    """Where each tensor of this family's checkpoints goes."""
    block = "transformer.h.{layer}"
    return [
        Weight("transformer.wte.weight", ("embedding",)),
        Weight("transformer.wpe.weight", ("position_embedding",)),
        *norm(f"{block}.ln_1", "layers.attn_norm", bias=True),
        *conv1d(f"{block}.attn.c_attn", "layers.attn.q", "layers.attn.k", "layers.attn.v"),
        *conv1d(f"{block}.attn.c_proj", "layers.attn.o"),
        *norm(f"{block}.ln_2", "layers.mlp_norm", bias=True),
        *conv1d(f"{block}.mlp.c_fc", "layers.mlp.up"),
        *conv1d(f"{block}.mlp.c_proj", "layers.mlp.down"),
        *norm("transformer.ln_f", "final_norm", bias=True),
        *head(config),
    ]


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    read_config=read_config,
    write_config=write_config,
    weights=weights,
    buffers=("transformer.h.{layer}.attn.bias", "transformer.h.{layer}.attn.masked_bias"),
)


def gpt2_config(
    *,
    vocab_size: int,
    n_layers: int,
    d_model: int,
    n_heads: int,
    max_positions: int,
    d_ff: int | None = None,
    eos_id: int | None = None,
) -> ModelConfig:
    """A GPT-2 of any size; d_ff is 4 d_model unless given.

    Raises:
      KeditError: the heads do not share d_model evenly.
    """
    if d_model % n_heads:
        raise KeditError(f"d_model is {d_model}: it must be a multiple of n_heads, {n_heads}")
    return ModelConfig(
        family="gpt2",
        vocab_size=vocab_size,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=d_model // n_heads,
        d_ff=4 * d_model if d_ff is None else d_ff,
        max_positions=max_positions,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu_tanh",
        biases=Biases(qkv=True, attn_out=True, mlp=True),
        tie_embeddings=True,
        bos_id=eos_id,
        eos_ids=() if eos_id is None else (eos_id,),
    )
