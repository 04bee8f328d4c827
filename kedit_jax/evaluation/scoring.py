"""The one primitive of the measures: how likely a model finds a target after a prompt.

For a pair (prompt, target), NLL is the mean per-token negative log-likelihood of " " + target after the prompt,
teacher-forced, and the pair is correct when every one of these tokens is the argmax of the next-token distribution.

Pairs are tokenised once (`prepare_pairs`) and scored on any number of models (`score_pairs`). Three things make it cheap:
- The last target token is never an input, so a target of one token adds nothing to the prompt's row, and the new and the
  true object are read from one forward pass.
- What several rows begin with is computed once, and rows stand side by side in arrays of one shape (`packing`). The 14,887
  pairs of the demo's 1,000 records have 18,851 target tokens and 8,506 rows of 74,080 tokens, 49,911 of them distinct; rows
  padded to a few lengths took 87,808.
- The last block's queries and MLP, and the head, run at scored tokens only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kedit_jax.errors import KeditError, NonFiniteError
from kedit_jax.evaluation.batching import check_fits, encode
from kedit_jax.evaluation.packing import BATCH_TOKENS, CANDIDATES, Batch, Packed, Wanted, pack
from kedit_jax.hosts import to_host
from kedit_jax.models import Decoder

TOKENS_PER_HEAD = 1024
"""Bounds the logits: 0.5 GB in float32 at a vocabulary of 128k."""


class Pair(NamedTuple):
    """A prompt and the target that may follow it, without the space between them."""

    prompt: str
    target: str


@dataclass(frozen=True)
class PreparedPairs:
    """Tokenised pairs, for any model that the tokenizer belongs to.

    Attributes:
        pairs: as given, repetitions included.
        packed: the targets of the distinct pairs, laid out.
        wanted_of: which of `packed.wanted` is each pair's target.
    """

    pairs: tuple[Pair, ...]
    packed: Packed
    wanted_of: Int[np.ndarray, "n"]


@dataclass(frozen=True)
class PairScores:
    """Scores of n pairs, in the order of the pairs.

    Attributes:
        nll: mean negative log-likelihood per target token, in nats.
        correct: whether every target token is the argmax.
    """

    nll: Float[np.ndarray, "n"]
    correct: Bool[np.ndarray, "n"]


def prepare_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Any, *, batch_tokens: int = BATCH_TOKENS) -> PreparedPairs:
    """Tokenise pairs and lay them out in forward passes of about `batch_tokens` tokens.

    `prompt + " " + target` is encoded as one text and split by offsets; the tokenizer's own special tokens (such as the
    one that begins a text) belong to the prompt. Braces are literal.

    Raises:
        KeditError: listing every pair whose target cannot be told from its prompt by tokens, or a slow tokenizer.
    """
    named = tuple(Pair(*pair) for pair in pairs)
    number = {pair: i for i, pair in enumerate(dict.fromkeys(named))}
    packed = pack(_tokenise(list(number), tokenizer), batch_tokens=batch_tokens)
    return PreparedPairs(named, packed, np.array([number[pair] for pair in named], np.int64))


def _tokenise(pairs: Sequence[Pair], tokenizer: Any) -> list[Wanted]:
    """The target tokens of every pair, after the row of tokens that it needs as input."""
    if not pairs:
        return []
    encoding = encode(tokenizer, [f"{pair.prompt} {pair.target}" for pair in pairs])
    wanted, problems = [], []
    for pair, ids, offsets in zip(pairs, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        # Special tokens have the offsets (0, 0), so one that ends the text is left out here.
        places = [i for i, (_, end) in enumerate(offsets) if end > len(pair.prompt)]
        problem = _boundary_problem(pair, places, offsets)
        if problem:
            problems.append(f"prompt {pair.prompt!r}, target {pair.target!r}: {problem}")
        else:
            first, last = places[0], places[-1]
            wanted.append(Wanted(tuple(ids[:last]), first - 1, tuple(ids[first : last + 1])))
    if problems:
        raise KeditError.listing("these pairs cannot be scored:", problems)
    return wanted


def _boundary_problem(pair: Pair, places: Sequence[int], offsets: Sequence[tuple[int, int]]) -> str | None:
    """Why the target's tokens are not a run behind the prompt's, or None."""
    if not pair.target.strip():
        return "the target is empty; give the object's text"
    nothing = "the target has no tokens; use text the tokenizer knows"
    if not places:
        return nothing
    if places[0] == 0:
        return "no token stands before the target; give a prompt"
    start, end = offsets[places[0]]
    if start < len(pair.prompt):
        return (
            f"one token covers {(pair.prompt + ' ' + pair.target)[start:end]!r}, the end of the prompt and the "
            "beginning of the target; remove blanks at the end of the prompt"
        )
    if offsets[places[-1]][1] <= len(pair.prompt) + 1:
        return nothing  # but the space that joins it
    return None


@jax.jit
def _score_batch(model: Decoder, batch: Batch) -> tuple[Float[Array, "RA C"], Bool[Array, "RA C"]]:
    """NLL of every candidate, and whether it is the argmax. The model is an argument: edited weights need no compiling."""
    places, positions = jnp.arange(batch.tokens.shape[1]), jnp.asarray(batch.positions)
    mask = (places <= places[:, None]) & (places[:, None] < jnp.asarray(batch.end)[:, None])
    h = model.embed(jnp.asarray(batch.tokens), positions)
    h, _ = model.run_layers(h, 0, model.config.n_layers - 1, positions=positions, mask=mask)
    h = model.run_last(h, positions=positions, mask=mask, at=jnp.asarray(batch.at))

    slots = h.reshape(-1, h.shape[-1]), jnp.asarray(batch.candidates).reshape(-1, CANDIDATES)

    def head(slot: tuple[Float[Array, "d"], Int[Array, "C"]]) -> tuple[Float[Array, "C"], Bool[Array, "C"]]:
        h, candidates = slot
        logits = model.logits(h)
        return jax.nn.logsumexp(logits) - logits[candidates], candidates == jnp.argmax(logits)

    return jax.lax.map(head, slots, batch_size=min(TOKENS_PER_HEAD, len(slots[0])))


def score(model: Decoder, packed: Packed) -> tuple[Float[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    """Of each of the m things wanted: the NLL of its tokens together, and how many of them are not the argmax.

    Log-probabilities in float32, sums in float64. What is not finite was scored apart from everything else, so that the
    prompts and texts to blame can be named.
    """
    if not packed.batches:
        return np.zeros(0), np.zeros(0, np.int64)
    found = [to_host(_score_batch(model, batch)) for batch in packed.batches]
    nll, hit = (np.concatenate([part.ravel() for part in parts])[packed.place] for parts in zip(*found, strict=True))
    begins = np.cumsum([0, *(len(tokens) for _, _, tokens in packed.wanted[:-1])])
    total, misses = np.add.reduceat(nll, begins, dtype=np.float64), np.add.reduceat(~hit, begins, dtype=np.int64)
    broken = np.flatnonzero(~np.isfinite(total))
    if broken.size and not packed.apart:
        alone = pack([packed.wanted[i] for i in broken], batch_tokens=packed.batches[0].tokens.size, apart=True)
        total[broken], misses[broken] = score(model, alone)
    return total, misses


def score_pairs(model: Decoder, prepared: PreparedPairs) -> PairScores:
    """Score pairs on a model.

    Raises:
        KeditError: a row is too long for the model, or the tokenizer is not the model's.
        NonFiniteError: naming prompts whose score is NaN or infinite, so that a broken model is no mere low percentage.
    """
    packed = prepared.packed
    check_fits(model, packed.longest, packed.largest_token, "shorten the prompts")
    total, misses = score(model, packed)
    nll = (total / [len(tokens) for _, _, tokens in packed.wanted])[prepared.wanted_of]
    _check_finite(prepared.pairs, nll)
    return PairScores(nll=nll, correct=(misses == 0)[prepared.wanted_of])


def _check_finite(pairs: Sequence[Pair], nll: Float[np.ndarray, "n"], shown: int = 5) -> None:
    broken = np.flatnonzero(~np.isfinite(nll))
    if broken.size:
        named = [f"prompt {pairs[i].prompt!r}, target {pairs[i].target!r}: NLL {nll[i]}" for i in broken[:shown]]
        more = f" ({shown} shown)" if broken.size > shown else ""
        raise NonFiniteError.listing(
            f"{broken.size} of {len(pairs)} scores are not finite{more}; look for NaN, infinite or huge weights:", named
        )
