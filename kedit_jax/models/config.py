"""What a decoder computes, as data: one frozen record that every family's config.json is translated into."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from kedit_jax.errors import KeditError

Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the slow rotary frequencies (see `layers.rotary_frequencies`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if not self.low_freq_factor < self.high_freq_factor:
            raise KeditError(
                f"low_freq_factor is {self.low_freq_factor}: it must be below high_freq_factor, {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All rotary frequencies divided by `factor`."""

    factor: float


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Phi-3's scaling: every rotary frequency has a divisor of its own, and queries and keys are stretched.

    Sequences of up to `original_max_positions` tokens, the only ones computed here, use `short`. Longer ones would use
    `long` for all of their tokens, the first ones included, which no cache of attention keys survives; `long` is kept so
    that a saved model is whole. `attention_factor` multiplies the rotated queries and keys; None is the value of the
    LongRoPE paper for `factor` (see `stretch`).
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_max_positions: int
    factor: float
    attention_factor: float | None = None

    @property
    def stretch(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_positions)) if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions: the first `dim` components of every query and key head are rotated.

    `interleaved` pairs components (0, 1), (2, 3), ... (GPT-J); otherwise i is paired with i + dim / 2 (Llama).
    """

    dim: int
    theta: float
    interleaved: bool = False
    scaling: Llama3Scaling | LinearScaling | LongRope | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scaling, LongRope):
            return
        for name in ("short", "long"):
            given = len(getattr(self.scaling, name))
            if 2 * given != self.dim:
                raise KeditError(f"{name}_factor has {given} entries: {self.dim} rotary components need half as many")


@dataclasses.dataclass(frozen=True)
class LocalAttention:
    """Sliding windows: in the layers marked, a token attends to itself and the `window` - 1 positions before it.

    `rotary` is that of these layers where they have one of their own (Gemma 3).
    """

    window: int
    layers: tuple[bool, ...]
    rotary: RotaryConfig | None = None


@dataclasses.dataclass(frozen=True)
class Biases:
    """Which projections carry a bias. `mlp` covers all matrices of the MLP."""

    qkv: bool = False
    attn_out: bool = False
    mlp: bool = False
    head: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model.

    `rotary=None` means learned absolute positions. `parallel_block` adds attention and MLP of the same input to the
    residual stream, normed once (GPT-J) or for each of them (GPT-NeoX, `parallel_norms`). `max_positions` is the length
    the model was made for; see `position_limit` for the models that end there. `eos_ids` may be empty or hold several
    ids; `bos_id` and `pad_id` may be None.

    What few families have: `qk_norm` norms every query and key head, `post_norms` the outputs of attention and MLP before
    they join the residual stream, and `one_plus_scale` norms multiply by 1 + scale. Scores are divided by the square root
    of `query_width` (None: of head_dim). `embedding_scale` multiplies the embeddings; a soft cap c replaces x by
    c tanh(x / c), for attention scores and for logits.
    """

    family: str
    vocab_size: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_positions: int
    norm: Norm
    norm_eps: float
    activation: Activation
    gated_mlp: bool = False
    parallel_block: bool = False
    rotary: RotaryConfig | None = None
    biases: Biases = Biases()
    tie_embeddings: bool = False
    parallel_norms: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    one_plus_scale: bool = False
    query_width: float | None = None
    embedding_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    local: LocalAttention | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.n_heads % self.n_kv_heads:
            problems.append(f"{self.n_heads} heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.rotary is not None and (self.rotary.dim % 2 or self.rotary.dim > self.head_dim):
            problems.append(f"{self.rotary.dim} rotary components: it must be even and at most {self.head_dim}, the head's")
        if self.local is not None and len(self.local.layers) != self.n_layers:
            problems.append(
                f"{len(self.local.layers)} entries say which layers are local, but there are {self.n_layers} layers"
            )
        if problems:
            raise KeditError.listing("a model of this shape cannot be built:", problems)

    @property
    def position_limit(self) -> int | None:
        """How many positions a sequence may have; None where rotary positions simply go on."""
        if self.rotary is None:
            return self.max_positions
        return self.rotary.scaling.original_max_positions if isinstance(self.rotary.scaling, LongRope) else None


def as_record(config: ModelConfig) -> dict[str, Any]:
    """The configuration for a fingerprint: fields that are younger than stored fingerprints only where they are set."""
    record = dataclasses.asdict(config)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return {name: value for name, value in record.items() if name not in _YOUNGER or value != defaults[name]}


_YOUNGER = frozenset({
    "parallel_norms", "qk_norm", "post_norms", "one_plus_scale", "query_width", "embedding_scale", "attention_soft_cap",
    "logit_soft_cap", "local",
})  # fmt: skip
