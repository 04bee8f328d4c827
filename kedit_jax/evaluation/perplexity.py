"""Perplexity on held-out text: what editing costs the rest of the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from kedit_jax.errors import KeditError, NonFiniteError
from kedit_jax.evaluation.batching import check_fits, encode
from kedit_jax.evaluation.packing import BATCH_TOKENS, Packed, Wanted, pack
from kedit_jax.evaluation.scoring import score
from kedit_jax.models import Decoder


@dataclass(frozen=True)
class PreparedTexts:
    """Tokenised texts, for any model that the tokenizer belongs to.

    Attributes:
        texts: as given.
        packed: windows of the texts, laid out.
        text_of: the text that each window is of.
        n_tokens: number of scored tokens.
    """

    texts: tuple[str, ...]
    packed: Packed
    text_of: Int[np.ndarray, "windows"]
    n_tokens: int


def prepare_texts(
    texts: Sequence[str], tokenizer: Any, *, max_length: int, batch_tokens: int = BATCH_TOKENS
) -> PreparedTexts:
    """Tokenise texts, one document each, in windows of at most `max_length` inputs.

    Windows of a text follow one another without a gap: every token but the text's first is scored exactly once, given the
    tokens of its window before it. A text of one token scores nothing.

    Args:
        texts: documents.
        tokenizer: fast tokenizer of the models that will be scored; its own special tokens are kept.
        max_length: inputs of a window, at least 1 and at most the model's `max_positions`.
        batch_tokens: of a forward pass, more where a window is longer.

    Raises:
        KeditError: `max_length` is below 1, or no text has a token to score.
    """
    if max_length < 1:
        raise KeditError(f"max_length={max_length}: a window needs at least one token; give 1 or more")
    encoded = encode(tokenizer, texts)["input_ids"] if texts else []
    windows = [
        (number, ids[start : start + max_length + 1])
        for number, ids in enumerate(encoded)
        for start in range(0, len(ids) - 1, max_length)
    ]
    if not windows:
        raise KeditError(f"none of the {len(texts)} held-out texts has two tokens; give texts of a sentence or more")
    wanted = [Wanted(tuple(ids[:-1]), 0, tuple(ids[1:])) for _, ids in windows]
    return PreparedTexts(
        texts=tuple(texts),
        packed=pack(wanted, batch_tokens=batch_tokens),
        text_of=np.array([number for number, _ in windows], np.int64),
        n_tokens=sum(len(tokens) for _, _, tokens in wanted),
    )


def perplexity(model: Decoder, prepared: PreparedTexts) -> float:
    """exp(total NLL / number of scored tokens) over all texts; log-probabilities in float32, sums in float64.

    Raises:
        KeditError: a window is too long for the model, or the tokenizer is not the model's.
        NonFiniteError: naming texts with a score that is NaN or infinite.
    """
    packed = prepared.packed
    check_fits(model, packed.longest, packed.largest_token, "give prepare_texts a smaller max_length")
    total = np.bincount(prepared.text_of, weights=score(model, packed)[0], minlength=len(prepared.texts))
    broken = np.flatnonzero(~np.isfinite(total))
    if broken.size:
        named = [f"text {i + 1} {prepared.texts[i]!r:.80}: NLL {total[i]}" for i in broken[:5]]
        raise NonFiniteError.listing(
            f"{broken.size} of {len(total)} held-out texts have no finite score; look for NaN or infinite weights:", named
        )
    return float(np.exp(total.sum() / prepared.n_tokens))
