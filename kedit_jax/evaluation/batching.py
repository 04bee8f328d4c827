"""Shapes for rows of tokens: few enough that a run over thousands of rows compiles a handful of programs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kedit_jax.errors import KeditError
from kedit_jax.models import Decoder, causal_mask

SHORTEST = 4


def bucket(length: int) -> int:
    """The padded length of a row of `length` tokens: at most four buckets an octave, at most 25 % above 16 tokens."""
    step = max(SHORTEST, 2 ** ((length - 1).bit_length() - 3)) if length > 1 else SHORTEST
    return -(-length // step) * step


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def largest_power_of_two(limit: int) -> int:
    """The largest power of two that is not above `limit`, at least 1."""
    return 1 << (max(1, limit).bit_length() - 1)


def stack_rows(rows: Sequence[Sequence[int]], n_rows: int) -> Int[np.ndarray, "B T"]:
    """Rows padded on the right with token 0 to the bucket of the longest, and rows of token 0 up to `n_rows`.

    With a causal mask nothing to the left of a padding slot reads it, so padded rows need no mask of their own.
    """
    tokens = np.zeros((n_rows, bucket(max(map(len, rows)))), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    return tokens


def hidden_states(model: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T d"]:
    """What the last block hands to the head, for rows padded on the right."""
    ones = jnp.ones((1, tokens.shape[1]), bool)
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    limit = model.config.position_limit
    if limit is not None:
        # Only padding can stand past the last position that the model has; looked up there, it answers NaN, and a masked
        # NaN still spoils the attention (0 * NaN).
        places = jnp.minimum(places, limit - 1)
    positions = jnp.broadcast_to(places, tokens.shape)
    h = model.embed(tokens, positions)
    h, _ = model.run_layers(h, 0, model.config.n_layers, positions=positions, mask=causal_mask(ones))
    return h


def negative_log_likelihood(logits: Float[Array, "*n V"], token: Int[Array, "*n c"]) -> Float[Array, "*n c"]:
    """-log softmax(logits)[token] for c tokens at each position, in the logits' dtype (at least float32)."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    return total - jnp.take_along_axis(logits, token, axis=-1)


def check_fits(model: Decoder, longest: int, largest_token: int, mend: str) -> None:
    """Raise a KeditError where rows have more tokens than the model has positions, or tokens it does not know.

    Without the check the model would answer NaN, which says less.
    """
    config, problems = model.config, []
    if config.position_limit is not None and longest > config.position_limit:
        problems.append(f"the longest row has {longest} tokens, the model takes {config.position_limit}; {mend}")
    if largest_token >= config.vocab_size:
        problems.append(
            f"token {largest_token} is past the model's {config.vocab_size}; use the tokenizer that belongs to the model"
        )
    if problems:
        raise KeditError.listing("these rows do not fit this model:", problems)


def encode(tokenizer: Any, texts: Sequence[str]) -> Any:
    """Token ids and character offsets of texts, with the special tokens that the tokenizer adds by itself.

    Raises:
        KeditError: the tokenizer is a slow one and knows no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise KeditError(f"{type(tokenizer).__name__} gives no offsets; load a fast tokenizer (tokenizer.json)")
    return tokenizer(list(texts), return_offsets_mapping=True, return_attention_mask=False, padding=False, truncation=False)
