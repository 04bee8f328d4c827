"""Sampling from a decoder, with the attention's keys and values kept between tokens."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from kedit_jax.errors import KeditError
from kedit_jax.models.decoder import Decoder, causal_mask, positions_of
from kedit_jax.models.layers import KV, Past


def generate(
    model: Decoder,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    n_new: int,
    *,
    key: Key[Array, ""],
    temperature: float = 1.0,
    top_k: int | None = None,
    stop_ids: tuple[int, ...] = (),
) -> Int[Array, "B n_new"]:
    """Continue each sequence by `n_new` tokens.

    Args:
      model: the decoder.
      tokens: prompts, padded on either side.
      valid: False at padding.
      n_new: how many tokens to add.
      key: `jax.random.key(seed)`; the same key gives the same tokens.
      temperature: divides the logits before sampling; 0 takes the likeliest token.
      top_k: sample among the k likeliest tokens (and those tied with the last of them); None among all.
      stop_ids: a sequence that has produced one of them repeats it to the end; once all have, nothing more is computed.

    Returns:
      The new tokens alone.

    Raises:
      KeditError: an empty prompt, a token outside the vocabulary, more positions than the model has learned, or settings
        without a meaning. The first three need values and are not checked under `jit`.
    """
    _check_settings(model, n_new, temperature, top_k)
    if not isinstance(valid, jax.core.Tracer) and not isinstance(tokens, jax.core.Tracer):
        _check_prompts(model, np.asarray(tokens), np.asarray(valid), n_new)
    if n_new == 0:
        return jnp.zeros((tokens.shape[0], 0), jnp.int32)
    return _generate(
        model, tokens, valid, key, temperature or 1.0,
        n_new=n_new, greedy=temperature == 0, top_k=top_k, stop_ids=stop_ids,
    )  # fmt: skip


class _Sampler(NamedTuple):
    """How logits become tokens. All but the temperature are fixed when compiled."""

    temperature: Float[Array, ""]
    greedy: bool
    top_k: int | None
    stop_ids: tuple[int, ...]

    def __call__(self, logits: Float[Array, "B V"], key: Key[Array, ""], last: Int[Array, " B"] | None) -> Int[Array, " B"]:
        if self.greedy:
            chosen = jnp.argmax(logits, axis=-1)
        else:
            if self.top_k is not None:
                least = lax.top_k(logits, self.top_k)[0][:, -1:]
                logits = jnp.where(logits >= least, logits, -jnp.inf)
            chosen = jax.random.categorical(key, logits / self.temperature)
        chosen = chosen.astype(jnp.int32)
        if last is None or not self.stop_ids:
            return chosen
        return jnp.where(jnp.isin(last, jnp.asarray(self.stop_ids)), last, chosen)


@functools.partial(jax.jit, static_argnames=("n_new", "greedy", "top_k", "stop_ids"))
def _generate(
    model: Decoder,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    key: Key[Array, ""],
    temperature: Float[Array, ""] | float,
    *,
    n_new: int,
    greedy: bool,
    top_k: int | None,
    stop_ids: tuple[int, ...],
) -> Int[Array, "B n_new"]:
    sample = _Sampler(jnp.asarray(temperature), greedy, top_k, stop_ids)
    keys = jax.random.split(key, n_new)
    n_layers, length = model.config.n_layers, tokens.shape[1]
    logits, kv = _prefill_prompts(model, tokens, valid)
    first = sample(logits, keys[0], None)

    # One slot for each prompt and new token; the last new token is never fed back. A slot's place means nothing: its
    # position is in its rotated key, so prompts padded on the right may stay where they are.
    cache = jax.tree.map(lambda part: jnp.pad(part, [(0, n_new - 1 if axis == 2 else 0) for axis in range(part.ndim)]), kv)
    readable = jnp.pad(valid, ((0, 0), (0, n_new)))
    readable = readable.at[:, -1].set(True)  # the token of the step itself stands behind the cache
    n_prompt = valid.sum(axis=-1, dtype=jnp.int32)

    def going(state: _State) -> Array:
        """One more token is wanted, and some sequence has not stopped: those that have would only repeat themselves."""
        stopped = jnp.isin(state.last, jnp.asarray(stop_ids)).all() if stop_ids else False
        return (state.number < n_new) & ~jnp.asarray(stopped)

    def step(state: _State) -> _State:
        index = state.number - 1
        positions = (n_prompt + index)[:, None]
        h = model.embed(state.last[:, None], positions)
        mask = state.readable[:, None]
        h, _, new = model.prefill(h, 0, n_layers, positions=positions, mask=mask, past=state.cache)
        slot = length + index
        cache = jax.tree.map(lambda old, one: lax.dynamic_update_slice_in_dim(old, one, slot, 2), state.cache, new)
        chosen = sample(model.logits(h[:, 0]), keys[state.number], state.last)
        told = state.told.at[:, state.number].set(chosen)
        return _State(state.number + 1, cache, state.readable.at[:, slot].set(True), chosen, told)

    told = jnp.zeros((len(tokens), n_new), jnp.int32).at[:, 0].set(first)
    end = lax.while_loop(going, step, _State(jnp.int32(1), cache, readable, first, told))
    return jnp.where(jnp.arange(n_new) < end.number, end.told, end.last[:, None])


class _State(NamedTuple):
    """A generation after `number` new tokens."""

    number: Int[Array, ""]
    cache: KV
    readable: Bool[Array, "B S"]
    last: Int[Array, " B"]
    told: Int[Array, "B n_new"]


def _prefill_prompts(model: Decoder, tokens: Array, valid: Array) -> tuple[Array, Past]:
    """Logits after the last valid token of each prompt, and the keys and values of all."""
    positions = positions_of(valid)
    h = model.embed(jnp.where(valid, tokens, 0), positions)  # a padding id may lie outside the vocabulary
    h, _, kv = model.prefill(h, 0, model.config.n_layers, positions=positions, mask=causal_mask(valid))
    final = tokens.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    return model.logits(jnp.take_along_axis(h, final[:, None, None], axis=1)[:, 0]), kv


def _check_settings(model: Decoder, n_new: int, temperature: float, top_k: int | None) -> None:
    problems = []
    if n_new < 0:
        problems.append(f"n_new is {n_new}: it must be at least 0")
    if not 0 <= temperature < float("inf"):
        problems.append(f"temperature is {temperature}: it must be finite and not negative")
    if top_k is not None and not 1 <= top_k <= model.config.vocab_size:
        problems.append(f"top_k is {top_k}: it must lie between 1 and the vocabulary's {model.config.vocab_size}")
    if problems:
        raise KeditError.listing("cannot generate:", problems)


def _check_prompts(model: Decoder, tokens: np.ndarray, valid: np.ndarray, n_new: int) -> None:
    config, problems = model.config, []
    lengths = valid.sum(axis=-1)
    if (lengths == 0).any():
        problems.append(f"prompts {np.flatnonzero(lengths == 0).tolist()} are empty: give each at least one token")
    outside = valid & ((tokens < 0) | (tokens >= config.vocab_size))
    if outside.any():
        problems.append(f"tokens {sorted(set(tokens[outside].tolist()))} lie outside the vocabulary of {config.vocab_size}")
    longest = int(lengths.max(initial=0)) + n_new - 1
    if config.position_limit is not None and longest > config.position_limit:
        which = "has learned" if config.rotary is None else "computes LongRoPE for"
        problems.append(f"{longest} positions are needed, but the model {which} {config.position_limit}")
    if problems:
        raise KeditError.listing("cannot generate:", problems)
