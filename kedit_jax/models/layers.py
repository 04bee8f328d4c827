"""The parts of a block. Every module holds either one layer's parameters or, in a decoder, those of all layers stacked.

Norms, attention weights and logits are computed in at least float32 (`at_least_float32`); projections multiply in their
kernel's dtype, accumulate in at least float32 and round once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Shaped

from kedit_jax.models.config import Activation, LinearScaling, LongRope, ModelConfig, RotaryConfig
from kedit_jax.models.packing import Packing, pack_heads, unpack_heads

INIT_STD = 0.02  # GPT-2's; all families here were trained from about this scale


class KV(NamedTuple):
    """Keys and values of the attention, already rotated; stacked over layers in the decoder's interface.

    `positions` are those of the tokens, kept by models with sliding windows alone.
    """

    k: Float[Array, "*L B S n_kv hd"]
    v: Float[Array, "*L B S n_kv hd"]
    positions: Int[Array, "*L B S"] | None = None

    @property
    def length(self) -> int:
        """S."""
        return self.k.shape[-3]


class HeadKV(NamedTuple):
    """The same with heads before tokens, which is how scores are multiplied: for a past that is attended to many times.

    Of 140 rows, 24 past and 8 new tokens, attention and its gradient took 27 ms on a CPU core, against 46 with `KV`, which
    is transposed each time.
    """

    k: Float[Array, "*L B n_kv S hd"]
    v: Float[Array, "*L B n_kv S hd"]
    positions: Int[Array, "*L B S"] | None = None

    @property
    def length(self) -> int:
        """S."""
        return self.k.shape[-2]


Past = KV | HeadKV


class Projections(NamedTuple):
    """Queries, keys and values of the attention, the first two rotated."""

    q: Float[Array, "B T H hd"]
    k: Float[Array, "B T n_kv hd"]
    v: Float[Array, "B T n_kv hd"]


class Rotation(NamedTuple):
    """Cosine and sine of every position's rotary angles."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


CAUSAL_BLOCK, CAUSAL_BLOCKS = 128, 8
"""Queries that attend at once where none sees what is behind it, at least, and how many such blocks a row has at most: each
is a piece of program."""


class View(NamedTuple):
    """How the tokens of one kind of layers see each other: their rotary angles, and which ones they attend to.

    Where tokens are packed, `keys` and `queries` lead to the rows in which they attend, and `mask` is that of the queries'
    rows; the two differ where a layer runs for some of its tokens alone. `causal` says of the mask that no token attends to
    one behind it.
    """

    rotation: Rotation | None
    mask: Bool[Array, "#B T S"]
    keys: Packing | None = None
    queries: Packing | None = None
    causal: bool = False


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """float32 for the 16-bit types, otherwise the dtype itself: a float64 model stays float64 throughout."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nnx.Module):
    """y = x @ kernel + bias, with kernel[k, v] mapping key rows to value rows."""

    def __init__(self, k: int, v: int, *, stack: int, bias: bool, std: float, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.kernel = nnx.Param(_normal(rngs, (stack, k, v), std, dtype))
        self.bias = nnx.Param(jnp.zeros((stack, v), dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B k"]) -> Float[Array, "*B v"]:
        kernel = self.kernel[...]
        y = jnp.matmul(x, kernel, preferred_element_type=at_least_float32(kernel.dtype))
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis; without the mean and the bias for "rms".

    With `one_plus_scale` the factor is 1 + scale, a sum made in at least float32: in bfloat16 it would lose what the
    parameter holds below 2^-8.
    """

    def __init__(self, config: ModelConfig, *, width: int | None = None, stack: int | None = None, dtype: DTypeLike) -> None:
        width = config.d_model if width is None else width
        shape = (width,) if stack is None else (stack, width)
        self.scale = nnx.Param(jnp.zeros(shape, dtype) if config.one_plus_scale else jnp.ones(shape, dtype))
        self.bias = nnx.Param(jnp.zeros(shape, dtype)) if config.norm == "layer" else None
        self.eps = config.norm_eps
        self.one_plus = config.one_plus_scale

    def __call__(self, x: Float[Array, "*B d"]) -> Float[Array, "*B d"]:
        wide = x.astype(at_least_float32(x.dtype))
        if self.bias is not None:
            wide = wide - wide.mean(-1, keepdims=True)
        scale = 1 + self.scale[...].astype(wide.dtype) if self.one_plus else self.scale[...]
        wide = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps) * scale
        if self.bias is not None:
            wide = wide + self.bias[...]
        return wide.astype(x.dtype)


def pick(rows: Shaped[Array, "#B T *rest"], at: Int[Array, "B A"] | None) -> Shaped[Array, "#B A *rest"]:
    """The columns `at` of each row; all of them where `at` is None."""
    if at is None:
        return rows
    rows = jnp.broadcast_to(rows, (at.shape[0], *rows.shape[1:]))
    return jnp.take_along_axis(rows, at.reshape(*at.shape, *(1,) * (rows.ndim - 2)), axis=1)


class Attention(nnx.Module):
    """Causal (by its mask) attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig, *, stack: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        d, hd = config.d_model, config.head_dim
        bias = config.biases.qkv
        self.q = Linear(d, config.n_heads * hd, stack=stack, bias=bias, std=INIT_STD, rngs=rngs, dtype=dtype)
        self.k = Linear(d, config.n_kv_heads * hd, stack=stack, bias=bias, std=INIT_STD, rngs=rngs, dtype=dtype)
        self.v = Linear(d, config.n_kv_heads * hd, stack=stack, bias=bias, std=INIT_STD, rngs=rngs, dtype=dtype)
        self.o = Linear(
            config.n_heads * hd, d, stack=stack, bias=config.biases.attn_out,
            std=_residual_std(config), rngs=rngs, dtype=dtype,
        )  # fmt: skip
        self.q_norm = LayerNorm(config, width=hd, stack=stack, dtype=dtype) if config.qk_norm else None
        self.k_norm = LayerNorm(config, width=hd, stack=stack, dtype=dtype) if config.qk_norm else None
        self.head_dim = hd
        self.query_width = float(hd) if config.query_width is None else config.query_width
        self.soft_cap = config.attention_soft_cap
        self.interleaved = config.rotary is not None and config.rotary.interleaved

    def __call__(
        self,
        x: Float[Array, "B T d"],
        *,
        view: View,
        past: Past | None,
        at: Int[Array, "B A"] | None = None,
        known: Projections | None = None,
    ) -> tuple[Float[Array, "B A d"], KV]:
        """The attended values of all tokens, or of those at `at`, and the keys and values of x itself.

        `known` are the projections of the last tokens, where they need not be computed.
        """
        if known is None:
            q, k, v = self.project(x, view.rotation, at)
        else:
            first = self.project(x[:, : x.shape[1] - known.k.shape[1]], view.rotation)
            q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(first, known, strict=True))
        new = KV(k, v)
        if view.keys is None or view.queries is None:
            if view.causal and past is None and at is None:
                attended = attend_causally(q, new, view.mask, width=self.query_width, soft_cap=self.soft_cap)
            else:
                attended = self._attend(q, new, past, pick(view.mask, at))
        else:
            rows = HeadKV(unpack_heads(view.keys, k), unpack_heads(view.keys, v))
            asking = unpack_heads(view.queries, q)
            attended = pack_heads(view.queries, self._attend(asking, rows, past, view.mask, heads_first=True))
        return self.o(attended.reshape(*q.shape[:2], -1)), new

    def project(
        self, x: Float[Array, "B T d"], rotation: Rotation | None, at: Int[Array, "B A"] | None = None
    ) -> Projections:
        """Of tokens from the first on that `rotation` holds; queries of those at `at` alone."""
        k, v = self._heads(self.k(x)), self._heads(self.v(x))
        q = self._heads(self.q(pick(x, at)))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            rotation = Rotation(*(part[:, : x.shape[1]] for part in rotation))
            q = rotate(q, Rotation(*(pick(part, at) for part in rotation)), self.interleaved)
            k = rotate(k, rotation, self.interleaved)
        return Projections(q, k, v)

    def _attend(
        self,
        q: Float[Array, "B _ _ hd"],
        new: Past,
        past: Past | None,
        mask: Bool[Array, "#B T S"],
        *,
        heads_first: bool = False,
    ) -> Float[Array, "B _ _ hd"]:
        sources = (new,) if past is None else (past, new)
        return attend(q, sources, mask, heads_first=heads_first, width=self.query_width, soft_cap=self.soft_cap)

    def _heads(self, x: Float[Array, "B T width"]) -> Float[Array, "B T heads hd"]:
        return x.reshape(*x.shape[:2], -1, self.head_dim)


def attend(
    q: Float[Array, "B _ _ hd"],
    sources: tuple[Past, ...],
    mask: Bool[Array, "#B T S"],
    *,
    heads_first: bool = False,
    width: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B _ _ hd"]:
    """softmax(q k' / sqrt(width)) v over the sources one after another on the attended axis; width is hd unless given.

    Queries, and what they are answered with, are [B, T, H, hd], or [B, H, T, hd] with `heads_first`. `soft_cap` bounds the
    scores before the softmax. Only the scores are concatenated, never the keys and values: a cache is read where it lies.
    A query whose row of the mask is all False (padding) attends to nothing and gets zeros.
    """
    wide = at_least_float32(q.dtype)
    axes = ["bskh" if isinstance(kv, KV) else "bksh" for kv in sources]
    n_kv = sources[0].k.shape[axes[0].index("k")]
    asking, head_axis = ("bkgth", 1) if heads_first else ("btkgh", 2)
    grouped = q.reshape(*q.shape[:head_axis], n_kv, -1, *q.shape[head_axis + 1 :])
    scores = [
        jnp.einsum(f"{asking},{names}->bkgts", grouped, kv.k, preferred_element_type=wide)
        for names, kv in zip(axes, sources, strict=True)
    ]
    scaled = jnp.concatenate(scores, axis=-1) / np.sqrt(q.shape[-1] if width is None else width).astype(wide)
    if soft_cap is not None:
        scaled = soft_capped(scaled, soft_cap)
    mask = mask[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask, scaled, jnp.finfo(wide).min), axis=-1)
    weights = jnp.where(mask, weights, 0).astype(q.dtype)
    bounds = np.cumsum([kv.length for kv in sources])[:-1].tolist()
    parts = jnp.split(weights, bounds, axis=-1)
    attended = [
        jnp.einsum(f"bkgts,{names}->{asking}", part, kv.v, preferred_element_type=wide)
        for part, names, kv in zip(parts, axes, sources, strict=True)
    ]
    return sum(attended[1:], attended[0]).astype(q.dtype).reshape(q.shape)


def attend_causally(
    q: Float[Array, "B T H hd"],
    kv: KV,
    mask: Bool[Array, "#B T T"],
    *,
    width: float | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "B T H hd"]:
    """`attend` where the mask lets no token attend to one behind it, which is not checked.

    Queries attend in blocks, each to what stands before the block's end. Half the scores of long rows are never made; the
    others stay in a CPU's caches: at 512 tokens a row, seven layers of GPT-2-small shape took 1.37 ms a token, 1.60 by
    `attend` (one core).
    """
    length = q.shape[1]
    block = max(CAUSAL_BLOCK, -(-length // CAUSAL_BLOCKS))
    parts = []
    for begin in range(0, length, block):
        rows, seen = slice(begin, begin + block), slice(0, begin + block)
        source = KV(kv.k[:, seen], kv.v[:, seen])
        parts.append(attend(q[:, rows], (source,), mask[:, rows, seen], width=width, soft_cap=soft_cap))
    return jnp.concatenate(parts, axis=1)


def soft_capped(x: Float[Array, "*n"], cap: float) -> Float[Array, "*n"]:
    """cap tanh(x / cap): x itself near 0, never beyond the cap."""
    return cap * jnp.tanh(x / cap)


def windowed(
    mask: Bool[Array, "#B T S"], positions: Int[Array, "#B T"], attended: Int[Array, "#B S"], window: int
) -> Bool[Array, "#B T S"]:
    """The mask without what lies `window` or more positions before the token."""
    return mask & (positions[:, :, None] - attended[:, None, :] < window)


class Mlp(nnx.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated. The input of `down` is what editors call the key."""

    def __init__(self, config: ModelConfig, *, stack: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        d, d_ff, bias = config.d_model, config.d_ff, config.biases.mlp

        def expand() -> Linear:
            return Linear(d, d_ff, stack=stack, bias=bias, std=INIT_STD, rngs=rngs, dtype=dtype)

        self.up = expand()
        self.gate = expand() if config.gated_mlp else None
        self.down = Linear(d_ff, d, stack=stack, bias=bias, std=_residual_std(config), rngs=rngs, dtype=dtype)
        self.activation = config.activation

    def key(self, x: Float[Array, "B T d"]) -> Float[Array, "B T d_ff"]:
        """The input of the down projection."""
        act = activation_function(self.activation)
        return act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)


class Block(nnx.Module):
    """One layer: attention and MLP on the residual stream, in sequence or side by side (`parallel_block`).

    The output of the down projection joins the residual stream as it is, or through `mlp_post_norm` (`post_norms`).
    """

    def __init__(self, config: ModelConfig, *, stack: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.attn_norm = LayerNorm(config, stack=stack, dtype=dtype)
        self.attn = Attention(config, stack=stack, rngs=rngs, dtype=dtype)
        one_norm = config.parallel_block and not config.parallel_norms
        self.mlp_norm = None if one_norm else LayerNorm(config, stack=stack, dtype=dtype)
        self.mlp = Mlp(config, stack=stack, rngs=rngs, dtype=dtype)
        self.attn_post_norm = LayerNorm(config, stack=stack, dtype=dtype) if config.post_norms else None
        self.mlp_post_norm = LayerNorm(config, stack=stack, dtype=dtype) if config.post_norms else None
        self.parallel = config.parallel_block

    def __call__(
        self,
        h: Float[Array, "B T d"],
        *,
        view: View,
        past: Past | None,
        at: Int[Array, "B A"] | None = None,
    ) -> tuple[Float[Array, "B A d"], Float[Array, "B A d_ff"], KV]:
        """(residual stream after the layer, input of the down projection, attention keys and values of these tokens).

        With `at`, the first two are those of the tokens in these columns alone; all tokens are still attended to.
        """
        rest, key, kv = self.before_down(h, view=view, past=past, at=at)
        return self.after_down(rest, key), key, kv

    def before_down(
        self,
        h: Float[Array, "B T d"],
        *,
        view: View,
        past: Past | None,
        at: Int[Array, "B A"] | None = None,
        known: Projections | None = None,
    ) -> tuple[Float[Array, "B A d"], Float[Array, "B A d_ff"], KV]:
        """(what the output of the down projection will be added to, its input, attention keys and values)."""
        normed = self.attn_norm(h)
        attended, kv = self.attn(normed, view=view, past=past, at=at, known=known)
        if self.attn_post_norm is not None:
            attended = self.attn_post_norm(attended)
        h = pick(h, at)
        rest = h + attended
        if self.parallel:
            return rest, self.mlp.key(pick(normed, at) if self.mlp_norm is None else self.mlp_norm(h)), kv
        return rest, self.mlp.key(rest if self.mlp_norm is None else self.mlp_norm(rest)), kv

    def after_down(self, rest: Float[Array, "B T d"], key: Float[Array, "B T d_ff"]) -> Float[Array, "B T d"]:
        """The residual stream after the layer."""
        value = self.mlp.down(key)
        return rest + (value if self.mlp_post_norm is None else self.mlp_post_norm(value))


def activation_function(name: Activation) -> Callable[[Array], Array]:
    """The function that a configuration names."""
    match name:
        case "gelu":
            return lambda x: jax.nn.gelu(x, approximate=False)
        case "gelu_tanh":
            return lambda x: jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu
        case "silu":
            return jax.nn.silu


def rotary_frequencies(rotary: RotaryConfig) -> np.ndarray:
    """Radians per position of each rotated pair, float64 [dim / 2]: theta^(-2 i / dim), scaled.

    With Llama 3.1's scaling, wavelengths beyond original / low_freq_factor are stretched by `factor`, those below
    original / high_freq_factor are kept, and in between the frequency is interpolated.
    """
    frequencies = rotary.theta ** (-np.arange(0, rotary.dim, 2, dtype=np.float64) / rotary.dim)
    scaling = rotary.scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, LongRope):
        return frequencies / np.asarray(scaling.short, np.float64)
    turns = scaling.original_max_positions * frequencies / (2 * np.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotation_of(rotary: RotaryConfig, positions: Int[Array, "B T"], dtype: DTypeLike) -> Rotation:
    """Angles in at least float32, whatever the dtype of the model. Beyond LongRoPE's short sequences they are NaN."""
    wide = at_least_float32(dtype)
    angles = positions[..., None].astype(wide) * jnp.asarray(rotary_frequencies(rotary), wide)
    if not isinstance(rotary.scaling, LongRope):
        return Rotation(jnp.cos(angles), jnp.sin(angles))
    known = positions[..., None] < rotary.scaling.original_max_positions
    stretch = jnp.where(known, jnp.asarray(rotary.scaling.stretch, wide), jnp.nan)
    return Rotation(stretch * jnp.cos(angles), stretch * jnp.sin(angles))


def rotate(x: Float[Array, "B T heads hd"], rotation: Rotation, interleaved: bool) -> Float[Array, "B T heads hd"]:
    """Turn the leading components of each head by their position's angles; the rest pass unchanged."""
    cos, sin = (part[:, :, None, :] for part in rotation)
    half = cos.shape[-1]
    wide = x[..., : 2 * half].astype(cos.dtype)
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
    else:
        a, b = wide[..., :half], wide[..., half:]
    turned = (a * cos - b * sin, b * cos + a * sin)
    joined = jnp.stack(turned, -1).reshape(wide.shape) if interleaved else jnp.concatenate(turned, -1)
    return jnp.concatenate([joined.astype(x.dtype), x[..., 2 * half :]], axis=-1)


def _residual_std(config: ModelConfig) -> float:
    """GPT-2's: 2 L projections add into the residual stream, so each starts smaller by sqrt(2 L)."""
    return INIT_STD / float(np.sqrt(2 * config.n_layers))


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> Array:
    return (std * jax.random.normal(rngs.params(), shape, at_least_float32(dtype))).astype(dtype)
