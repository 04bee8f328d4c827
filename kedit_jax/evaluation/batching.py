"""Shapes for rows of tokens: few enough that a run over thousands of rows compiles a handful of programs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from kedit_jax.errors import KeditError
from kedit_jax.models import Decoder

SHORTEST = 4


def bucket(length: int) -> int:
    """The padded length of a row of `length` tokens: at most four buckets an octave, at most 25 % above 16 tokens."""
    step = max(SHORTEST, 2 ** ((length - 1).bit_length() - 3)) if length > 1 else SHORTEST
    return -(-length // step) * step


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def stack_rows(rows: Sequence[Sequence[int]], n_rows: int) -> Int[np.ndarray, "B T"]:
    """Rows padded on the right with token 0 to the bucket of the longest, and rows of token 0 up to `n_rows`.

    With a causal mask nothing to the left of a padding slot reads it, so padded rows need no mask of their own.
    """
    tokens = np.zeros((n_rows, bucket(max(map(len, rows)))), np.int32)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = row
    return tokens


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
