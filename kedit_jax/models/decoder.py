"""One decoder for all families: an immutable pytree of parameters, run whole or in segments of layers."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from kedit_jax.errors import KeditError
from kedit_jax.models.config import ModelConfig
from kedit_jax.models.layers import (
    INIT_STD,
    KV,
    Block,
    HeadKV,
    LayerNorm,
    Past,
    Projections,
    Rotation,
    View,
    at_least_float32,
    pick,
    rotation_of,
    soft_capped,
    windowed,
)
from kedit_jax.models.packing import Packing, unpack
from kedit_jax.models.spread import Spread

Keep = Literal["inputs", "products"]
"""What a segment keeps of each layer for the backward pass: its input alone, or all that matrices were multiplied to."""


class Head(nnx.Module):
    """The output projection's own parameters: no kernel when it is tied to the embedding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        kernel_shape = (config.d_model, config.vocab_size)
        self.kernel = None if config.tie_embeddings else nnx.Param(_normal(rngs, kernel_shape, dtype))
        self.bias = nnx.Param(jnp.zeros(config.vocab_size, dtype)) if config.biases.head else None


class Decoder(nnx.Module):
    """A decoder-only transformer.

    The parameters of all blocks are stacked on a leading layer axis; a segment of layers is scanned by index over the
    stack. A block returns the input of its down projection (the key of an edit) beside the residual stream.

    Shapes: B sequences, T tokens, S attended tokens (past, then these), d = d_model.

    Args:
      config: what to compute.
      rngs: source of the random initial parameters (GPT-2's scheme: normal, std 0.02, residual projections smaller by
        sqrt(2 n_layers), norms one, biases zero).
      dtype: of all parameters and of the residual stream.
      spread: how it lies on a mesh of devices; None where it lies on one.
    """

    def __init__(
        self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, spread: Spread | None = None
    ) -> None:
        self.config = config
        self.spread = spread
        self.embedding = nnx.Param(_normal(rngs, (config.vocab_size, config.d_model), dtype))
        table = (config.max_positions, config.d_model)
        self.position_embedding = nnx.Param(_normal(rngs, table, dtype)) if config.rotary is None else None
        self.layers = Block(config, stack=config.n_layers, rngs=rngs, dtype=dtype)
        self.final_norm = LayerNorm(config, dtype=dtype)
        self.head = Head(config, rngs=rngs, dtype=dtype)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the residual stream."""
        return self.embedding.dtype

    def __call__(self, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
        """Logits of whole sequences, compiled once a shape; `valid` is False at padding, on either side."""
        return _logits(self, tokens, jnp.ones(tokens.shape, bool) if valid is None else valid)

    def embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T d"]:
        """The residual stream before the first layer.

        A token or learned position past its table gives NaN, which the caller can see, rather than its neighbour's row.
        """
        h = jnp.take(self._outside("embedding", self.embedding[...]), tokens, axis=0)
        if self.config.embedding_scale is not None:
            h = h * jnp.asarray(self.config.embedding_scale, h.dtype)
        if self.position_embedding is None:
            return h
        return h + jnp.take(self.position_embedding[...], positions, axis=0)

    def run_layers(
        self,
        h: Float[Array, "B T d"],
        start: int,
        stop: int,
        *,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#R Q S"],
        past: Past | None = None,
        packing: Packing | None = None,
        causal: bool = False,
        keep: Keep = "inputs",
    ) -> tuple[Float[Array, "B T d"], Float[Array, "layers B T d_ff"]]:
        """Layers start <= i < stop (static integers) on the residual stream h.

        To be called under `jit`: outside of it, every call compiles its loop anew.

        Args:
          h: the residual stream before layer `start`.
          positions: of the tokens, for rotary models and sliding windows.
          mask: which tokens each one attends to: those of `past` first, then these. Layers with a sliding window take
            away what lies outside of it by themselves.
          past: attention keys and values of earlier tokens in these layers, as `prefill` returned them.
          packing: the tokens are packed ones, [1, N, d]; `mask` and `past` are those of its rows.
          causal: the mask lets no token attend to one behind it (not checked): long rows without `past` then take less.
          keep: for the gradient; "products" saves half a forward pass in three and takes the memory of the activations.

        Returns:
          The residual stream after layer `stop - 1`, and the inputs of the layers' down projections. Under `jit` either
          costs nothing when unused.

        Raises:
          KeditError: no such layers, or shapes that do not fit together.
        """
        attended = _Attended(positions, mask, past, packing, packing, causal)
        h, keys, _ = self._scan(h, start, stop, attended, keep_kv=False, keep=keep)
        return h, keys

    def prefill(
        self,
        h: Float[Array, "B T d"],
        start: int,
        stop: int,
        *,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#R Q S"],
        past: Past | None = None,
        packing: Packing | None = None,
    ) -> tuple[Float[Array, "B T d"], Float[Array, "layers B T d_ff"], Past]:
        """`run_layers`, and the attention keys and values of these tokens in these layers, each [layers, B, T, n_kv, hd].

        Those of packed tokens are given as rows with heads first, zero at padding.
        """
        attended = _Attended(positions, mask, past, packing, packing)
        h, keys, kv = self._scan(h, start, stop, attended, keep_kv=True)
        return h, keys, kv if packing is None else _cache_rows(kv, packing)

    def run_last(
        self,
        h: Float[Array, "B T d"],
        *,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#R Q S"],
        at: Int[Array, "B A"],
        past: Past | None = None,
        packing: Packing | None = None,
        queries: Packing | None = None,
    ) -> Float[Array, "B A d"]:
        """The last layer for the tokens in columns `at` alone, all a caller needs who reads logits there.

        Arguments as for `run_layers(h, n_layers - 1, n_layers)`, whose output it gives in those columns, without the
        queries and the MLP of all others. Of packed tokens, `queries` leads from those at `at` to the rows of `mask`.
        """
        last = self.config.n_layers - 1
        rest, key = self.before_down(
            h, last, positions=positions, mask=mask, at=at, past=past, packing=packing, queries=queries
        )
        return self.after_down(rest, key, last)

    def projections(self, h: Float[Array, "B T d"], layer: int, *, positions: Int[Array, "B T"]) -> Projections:
        """What a layer's attention makes of each token by itself, for `run_one`."""
        block, (local,) = self._block(layer), self._kinds(layer, layer + 1)
        return block.attn.project(block.attn_norm(h), self._rotation(positions, local=local))

    def run_one(
        self,
        h: Float[Array, "B T d"],
        layer: int,
        *,
        known: Projections,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#R Q S"],
        past: Past | None = None,
        packing: Packing | None = None,
        keep: Keep = "inputs",
    ) -> Float[Array, "B T d"]:
        """The residual stream after one layer, given the `projections` of its last tokens, however many.

        Arguments as for `run_layers`, `past` of this layer alone. It has the gradient in the other tokens, and in those
        whose projections are given only where they do not pass through the attention.
        """

        def run(h: Array, past: Past | None, known: Projections) -> Array:
            rest, key = self.before_down(h, layer, positions=positions, mask=mask, past=past, packing=packing, known=known)
            return self.after_down(rest, key, layer)

        return jax.checkpoint(run, policy=_policy(keep))(h, past, known)

    def before_down(
        self,
        h: Float[Array, "B T d"],
        layer: int,
        *,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "#R Q S"],
        at: Int[Array, "B A"] | None = None,
        past: Past | None = None,
        packing: Packing | None = None,
        queries: Packing | None = None,
        known: Projections | None = None,
    ) -> tuple[Float[Array, "B A d"], Float[Array, "B A d_ff"]]:
        """A layer up to its down projection: what the projection's output is added to, and its input (an edit's key).

        `after_down` finishes the layer, with the kernel as it then is. Arguments as for `run_last`
        and `run_one`.
        """
        _check_segment(self.config, h, layer, layer + 1, mask, past, packing)
        attended = _Attended(positions, mask, past, packing, packing if at is None else queries)
        kinds = self._kinds(layer, layer + 1)
        view = self._views(attended, kinds, at)[kinds[0]]
        kv = jax.tree.map(lambda layers: layers[0], past)
        rest, key, _ = self._block(layer).before_down(h, view=view, past=kv, at=at, known=known)
        return rest, key

    def after_down(self, rest: Float[Array, "B T d"], key: Float[Array, "B T d_ff"], layer: int) -> Float[Array, "B T d"]:
        """The residual stream after a layer that `before_down` began."""
        return self._block(layer).after_down(rest, key)

    def logits(self, h: Float[Array, "*B d"]) -> Float[Array, "*B V"]:
        """Final norm and output projection, in at least float32."""
        normed = self.final_norm(h)
        wide = at_least_float32(normed.dtype)
        if self.head.kernel is None:
            embedding = self._outside("embedding", self.embedding[...])
            logits = jnp.einsum("...d,vd->...v", normed, embedding, preferred_element_type=wide)
        else:
            kernel = self._outside("head.kernel", self.head.kernel[...])
            logits = jnp.matmul(normed, kernel, preferred_element_type=wide)
        if self.head.bias is not None:
            logits = logits + self.head.bias[...]
        cap = self.config.logit_soft_cap
        return logits if cap is None else soft_capped(logits, cap)

    def _block(self, layer: int) -> Block:
        """One layer's parameters."""
        block: Block = jax.tree.map(lambda stack: stack[layer], self.layers)
        return block if self.spread is None else self.spread.in_use(block)

    def _outside(self, name: str, parameter: Array) -> Array:
        """A parameter that belongs to no layer, as it is computed with."""
        if self.spread is None:
            return parameter
        (laid,) = jax.tree.leaves(self.spread.in_use({name: parameter}))
        return laid

    def _scan(
        self, h: Array, start: int, stop: int, attended: _Attended, *, keep_kv: bool, keep: Keep = "inputs"
    ) -> tuple[Array, Array, Any]:
        positions, mask, past, packing = attended[:4]
        _check_segment(self.config, h, start, stop, mask, past, packing)
        kinds = self._kinds(start, stop)
        views = self._views(attended, kinds)
        kept = None if self.config.local is None else jnp.broadcast_to(positions, h.shape[:2])

        def layer(h: Array, xs: tuple[Array, Past | None]) -> tuple[Array, tuple[Array, KV | None]]:
            index, past = xs
            block = jax.tree.map(lambda stack: lax.dynamic_index_in_dim(stack, index, keepdims=False), self.layers)
            block = block if self.spread is None else self.spread.in_use(block)
            h, key, kv = block(h, view=_view(views, kinds, index - start), past=past)
            return h, (key, kv._replace(positions=kept) if keep_kv else None)

        # Recomputing a layer in the backward pass keeps one residual stream per layer in place of every activation and
        # every indexed weight. Measured with 6 layers, d 128, d_ff 2048, 768 tokens on 2 CPU cores: gradient in the
        # parameters 113 ms and 41 MB against 231 ms and 297 MB; in h, layers 2:6, 39 ms and 25 MB against 83 ms and 172 MB.
        # Scanning a slice of the stack instead of indexing it was no faster (116 ms), and it copies the weights.
        # Keeping the products leaves out of the recomputation what is dear, and of the memory what is indexed.
        layer = jax.checkpoint(layer, prevent_cse=False, policy=_policy(keep))  # a scan keeps the two passes apart by itself
        h, (keys, kv) = lax.scan(layer, h, (jnp.arange(start, stop), past))
        return h, keys, kv

    def _kinds(self, start: int, stop: int) -> tuple[bool, ...]:
        """Whether each of these layers has a sliding window."""
        local = self.config.local
        return (False,) * (stop - start) if local is None else local.layers[start:stop]

    def _views(self, attended: _Attended, kinds: tuple[bool, ...], at: Int[Array, "B A"] | None = None) -> tuple[View, View]:
        """What layers without and with a sliding window see, made once for all of them."""
        positions, mask, past, packing, queries, causal = attended
        local = self.config.local
        view = View(self._rotation(positions, local=False), mask, packing, queries, causal)
        if local is None or not any(kinds):
            return view, view
        rows = positions if packing is None else unpack(packing, positions)
        asking = rows if queries is packing or queries is None else unpack(queries, pick(positions, at))
        seen = rows
        if past is not None:
            if past.positions is None:
                raise KeditError("`past` holds no positions, which sliding windows need: take it from `prefill`")
            before = past.positions[0]
            seen = jnp.concatenate([before, jnp.broadcast_to(rows, (len(before), rows.shape[1]))], axis=1)
        near = windowed(mask, asking, seen, local.window)
        return view, view._replace(rotation=self._rotation(positions, local=True), mask=near)

    def _rotation(self, positions: Int[Array, "B T"], *, local: bool) -> Rotation | None:
        """The rotary angles of layers with or without a sliding window."""
        rotary = self.config.rotary
        if local and self.config.local is not None and self.config.local.rotary is not None:
            rotary = self.config.local.rotary
        return None if rotary is None else rotation_of(rotary, positions, self.dtype)


class _Attended(NamedTuple):
    """What the tokens of a segment attend to, as the arguments of `Decoder.run_layers` say it."""

    positions: Array
    mask: Array
    past: Past | None
    packing: Packing | None
    queries: Packing | None
    causal: bool = False


def _policy(keep: Keep) -> Any:
    """Of `jax.checkpoint`."""
    return None if keep == "inputs" else jax.checkpoint_policies.dots_saveable


def _cache_rows(kv: KV, packing: Packing) -> HeadKV:
    """Attention keys and values [layers, 1, N, ...] of packed tokens as those of rows, zero at padding."""
    slots, used = jnp.asarray(packing.slots), jnp.asarray(packing.used)

    def rows(packed: Array) -> Array:
        return packed[:, 0].at[:, slots].get(mode="promise_in_bounds")

    k, v = (jnp.where(used[:, None, :, None], jnp.swapaxes(rows(part), 2, 3), 0) for part in (kv.k, kv.v))
    return HeadKV(k, v, None if kv.positions is None else jnp.where(used, rows(kv.positions), 0))


def _view(views: tuple[View, View], kinds: tuple[bool, ...], place: Array) -> View:
    """The view of the layer at `place` of a segment with layers of these kinds; chosen in tracing where all are alike."""
    if len(set(kinds)) <= 1:
        return views[any(kinds)]
    local = jnp.asarray(kinds)[place]
    far, near = views
    differ = (far.rotation, far.mask), (near.rotation, near.mask)
    rotation, mask = jax.tree.map(lambda a, b: jnp.where(local, b, a), *differ)
    return far._replace(rotation=rotation, mask=mask)


def positions_of(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Position of each token among the valid ones of its sequence; padding before the first one gets 0."""
    return jnp.maximum(jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1, 0)


def causal_mask(valid: Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
    """[b, t, s]: may token t attend to token s: s is not after t and not padding."""
    length = valid.shape[-1]
    return jnp.tril(jnp.ones((length, length), bool)) & valid[:, None, :]


def down_kernel_address(layer: int) -> str:
    """Address of one layer's down projection among the parameters of a `Decoder`."""
    return f"layers.mlp.down.kernel[{layer}]"


@jax.jit
def _logits(model: Decoder, tokens: Array, valid: Array) -> Array:
    positions = positions_of(valid)
    h = model.embed(jnp.where(valid, tokens, 0), positions)  # a padding id may lie outside the vocabulary
    h, _ = model.run_layers(h, 0, model.config.n_layers, positions=positions, mask=causal_mask(valid), causal=True)
    return model.logits(h)


def _check_segment(
    config: ModelConfig, h: Array, start: int, stop: int, mask: Array, past: Past | None, packing: Packing | None = None
) -> None:
    """Structural errors, raised at trace time."""
    if not 0 <= start <= stop <= config.n_layers:
        raise KeditError(
            f"layers {start}:{stop} do not exist: 0 <= start <= stop <= {config.n_layers} must hold for this model"
        )
    length = 0 if past is None else past.length
    if past is not None and past.k.shape[0] != stop - start:
        raise KeditError(f"`past` holds {past.k.shape[0]} layers, but layers {start}:{stop} run")
    new = h.shape[1] if packing is None else packing.slots.shape[1]
    if mask.shape[-1] != length + new:
        raise KeditError(f"the mask covers {mask.shape[-1]} attended tokens, but there are {length} past and {new} new ones")


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    return (INIT_STD * jax.random.normal(rngs.params(), shape, at_least_float32(dtype))).astype(dtype)
