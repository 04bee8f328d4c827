"""Language models: one decoder for all families, in Hugging Face's checkpoint layout."""

from kedit_jax.models.config import (
    Biases,
    LinearScaling,
    Llama3Scaling,
    LocalAttention,
    LongRope,
    ModelConfig,
    RotaryConfig,
)
from kedit_jax.models.decoder import Decoder, Keep, causal_mask, down_kernel_address, positions_of
from kedit_jax.models.generation import generate
from kedit_jax.models.gpt2 import gpt2_config
from kedit_jax.models.layers import KV, Past, Projections
from kedit_jax.models.loading import (
    abstract_decoder,
    load,
    load_model,
    load_tokenizer,
    model_fingerprint,
    on_mesh,
    read_config,
)
from kedit_jax.models.packing import Packing, pack, single_tokens, unpack
from kedit_jax.models.parameters import named_parameters, with_parameters
from kedit_jax.models.saving import save_model
from kedit_jax.models.spread import Spread, make_mesh

__all__ = [
    "KV",
    "Biases",
    "Decoder",
    "Keep",
    "LinearScaling",
    "Llama3Scaling",
    "LocalAttention",
    "LongRope",
    "ModelConfig",
    "Packing",
    "Past",
    "Projections",
    "RotaryConfig",
    "Spread",
    "abstract_decoder",
    "causal_mask",
    "down_kernel_address",
    "generate",
    "gpt2_config",
    "load",
    "load_model",
    "load_tokenizer",
    "make_mesh",
    "model_fingerprint",
    "named_parameters",
    "on_mesh",
    "pack",
    "positions_of",
    "read_config",
    "save_model",
    "single_tokens",
    "unpack",
    "with_parameters",
]
