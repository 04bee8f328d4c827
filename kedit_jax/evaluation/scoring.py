"""The one primitive of the measures: how likely a model finds a target after a prompt.

For a pair (prompt, target), NLL is the mean per-token negative log-likelihood of " " + target after the prompt,
teacher-forced, and the pair is correct when every one of these tokens is the argmax of the next-token distribution.

Pairs are tokenised once (`prepare_pairs`) and scored on any number of models (`score_pairs`). Three things make it cheap:
- The last target token is never an input, so a target of one token adds nothing to the prompt's row, and the new and the
  true object are read from one forward pass. A row that begins another row is read from that one too.
- Rows are sorted by length and cut into batches of a fixed number of rows, padded to a few lengths.
- The head runs at scored positions only, once for up to `CANDIDATES` tokens of a position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kedit_jax.errors import KeditError, NonFiniteError
from kedit_jax.evaluation.batching import (
    check_fits,
    encode,
    hidden_states,
    negative_log_likelihood,
    power_of_two,
    stack_rows,
)
from kedit_jax.models import Decoder

CANDIDATES = 4
"""Tokens scored at one position of one slot; a position with more takes more slots."""

Row = tuple[int, ...]


class Pair(NamedTuple):
    """A prompt and the target that may follow it, without the space between them."""

    prompt: str
    target: str


class Entry(NamedTuple):
    """One scored token: the probability of `token` after the first `position + 1` tokens of `row`."""

    row: Row
    position: int
    token: int


@dataclass(frozen=True)
class Batch:
    """Arrays of one forward pass. S slots name a row and a position; each scores C candidate tokens.

    `entry` numbers the scored tokens; -1 marks a candidate that pads its slot.
    """

    tokens: Int[np.ndarray, "B T"]
    row: Int[np.ndarray, "S"]
    position: Int[np.ndarray, "S"]
    candidates: Int[np.ndarray, "S C"]
    entry: Int[np.ndarray, "S C"]

    @property
    def shape(self) -> tuple[int, ...]:
        """What decides whether two batches share a compiled program."""
        return (*self.tokens.shape, *self.candidates.shape)


@dataclass(frozen=True)
class PreparedPairs:
    """Tokenised pairs in batches, for any model that the tokenizer belongs to.

    Attributes:
        pairs: as given, repetitions included.
        batches: the forward passes.
        n_entries: number of distinct scored tokens.
        pair_of: the pair that every scored token of every pair belongs to.
        entry_of: where that token's score stands.
        longest: length of the longest row.
        largest_token: largest token id among inputs and targets.
    """

    pairs: tuple[Pair, ...]
    batches: tuple[Batch, ...]
    n_entries: int
    pair_of: Int[np.ndarray, "N"]
    entry_of: Int[np.ndarray, "N"]
    longest: int
    largest_token: int

    @property
    def shapes(self) -> frozenset[tuple[int, ...]]:
        """The distinct batch shapes: as many programs are compiled for a model."""
        return frozenset(batch.shape for batch in self.batches)


@dataclass(frozen=True)
class PairScores:
    """Scores of n pairs, in the order of the pairs.

    Attributes:
        nll: mean negative log-likelihood per target token, in nats.
        correct: whether every target token is the argmax.
    """

    nll: Float[np.ndarray, "n"]
    correct: Bool[np.ndarray, "n"]


def prepare_pairs(pairs: Sequence[tuple[str, str]], tokenizer: Any, *, row_batch: int = 64) -> PreparedPairs:
    """Tokenise pairs and lay them out in batches of `row_batch` rows (fewer when there are fewer rows in all).

    `prompt + " " + target` is encoded as one text and split by offsets; the tokenizer's own special tokens (such as the
    one that begins a text) belong to the prompt. Braces are literal.

    Raises:
        KeditError: listing every pair whose target cannot be told from its prompt by tokens, or a slow tokenizer.
    """
    named = [Pair(*pair) for pair in pairs]
    entries = _tokenise(list(dict.fromkeys(named)), tokenizer)
    entries = _merge_prefixes(entries)
    number = {entry: i for i, entry in enumerate(dict.fromkeys(entry for found in entries.values() for entry in found))}
    return PreparedPairs(
        pairs=tuple(named),
        batches=tuple(_batches(number, row_batch)),
        n_entries=len(number),
        pair_of=np.array([i for i, pair in enumerate(named) for _ in entries[pair]], np.int64),
        entry_of=np.array([number[entry] for pair in named for entry in entries[pair]], np.int64),
        longest=max((len(entry.row) for entry in number), default=0),
        largest_token=max((max(entry.token, *entry.row) for entry in number), default=0),
    )


def _tokenise(pairs: Sequence[Pair], tokenizer: Any) -> dict[Pair, list[Entry]]:
    """The scored tokens of every pair, each with the whole row of tokens that the pair needs as input."""
    if not pairs:
        return {}
    encoding = encode(tokenizer, [f"{pair.prompt} {pair.target}" for pair in pairs])
    entries, problems = {}, []
    for pair, ids, offsets in zip(pairs, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        # Special tokens have the offsets (0, 0), so one that ends the text is left out here.
        places = [i for i, (_, end) in enumerate(offsets) if end > len(pair.prompt)]
        problem = _boundary_problem(pair, places, offsets)
        if problem:
            problems.append(f"prompt {pair.prompt!r}, target {pair.target!r}: {problem}")
        else:
            row = tuple(ids[: places[-1]])
            entries[pair] = [Entry(row, i - 1, ids[i]) for i in places]
    if problems:
        raise KeditError.listing("these pairs cannot be scored:", problems)
    return entries


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


def _merge_prefixes(entries: dict[Pair, list[Entry]]) -> dict[Pair, list[Entry]]:
    """The same scored tokens, where a row that begins another row is replaced by that one (attention is causal)."""
    whole: dict[Row, Row] = {}
    last: Row = ()
    # In sorted order a row that begins any other row also begins its successor.
    for row in sorted({entry.row for found in entries.values() for entry in found}, reverse=True):
        last = last if last[: len(row)] == row else row
        whole[row] = last
    return {pair: [entry._replace(row=whole[entry.row]) for entry in found] for pair, found in entries.items()}


class _Slot(NamedTuple):
    """Up to `CANDIDATES` scored tokens at one position of one row: (number of the entry, token)."""

    position: int
    candidates: list[tuple[int, int]]


def _slots(number: dict[Entry, int]) -> dict[Row, list[_Slot]]:
    """The slots of every row."""
    tokens: dict[Row, dict[int, list[tuple[int, int]]]] = {}
    for entry, i in number.items():
        tokens.setdefault(entry.row, {}).setdefault(entry.position, []).append((i, entry.token))
    return {
        row: [_Slot(position, chunk) for position, found in at.items() for chunk in _chunks(found, CANDIDATES)]
        for row, at in tokens.items()
    }


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Runs of at most `size` items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _batches(number: dict[Entry, int], row_batch: int) -> Iterator[Batch]:
    """Rows in order of length, cut where either the rows or the slots of a batch are full.

    All batches have the same number of rows and slots. Cutting across lengths instead of within each bucket leaves one
    unfilled batch in all instead of one a bucket. A row with more slots than a batch has comes again in the next one.
    """
    slots = _slots(number)
    if not slots:
        return
    n_rows = min(power_of_two(row_batch), power_of_two(len(slots)))
    n_slots = n_rows * -(-sum(map(len, slots.values())) // len(slots))
    pieces = [(row, piece) for row in sorted(slots, key=len) for piece in _chunks(slots[row], n_slots)]
    batch: list[tuple[Row, list[_Slot]]] = []
    used = 0
    for row, piece in pieces:
        if batch and (len(batch) == n_rows or used + len(piece) > n_slots):
            yield _batch(batch, n_rows, n_slots)
            batch, used = [], 0
        batch.append((row, piece))
        used += len(piece)
    yield _batch(batch, n_rows, n_slots)


def _batch(pieces: Sequence[tuple[Row, list[_Slot]]], n_rows: int, n_slots: int) -> Batch:
    """The arrays of one batch. Slots and candidates that pad it read row 0 and token 0, and are dropped afterwards."""
    row, position = np.zeros(n_slots, np.int32), np.zeros(n_slots, np.int32)
    candidates = np.zeros((n_slots, CANDIDATES), np.int32)
    entry = np.full((n_slots, CANDIDATES), -1, np.int64)
    slot = 0
    for place, (_, found) in enumerate(pieces):
        for position_, candidates_ in found:
            row[slot], position[slot] = place, position_
            for c, (i, token) in enumerate(candidates_):
                candidates[slot, c], entry[slot, c] = token, i
            slot += 1
    return Batch(stack_rows([piece[0] for piece in pieces], n_rows), row, position, candidates, entry)


@jax.jit
def _score_batch(
    model: Decoder,
    tokens: Int[Array, "B T"],
    row: Int[Array, "S"],
    position: Int[Array, "S"],
    candidates: Int[Array, "S C"],
) -> tuple[Float[Array, "S C"], Bool[Array, "S C"]]:
    """NLL of every candidate, and whether it is the argmax. The model is an argument: edited weights need no compiling."""
    logits = model.logits(hidden_states(model, tokens)[row, position])
    return negative_log_likelihood(logits, candidates), candidates == jnp.argmax(logits, axis=-1, keepdims=True)


def score_pairs(model: Decoder, prepared: PreparedPairs) -> PairScores:
    """Score pairs on a model: log-probabilities in float32, means over tokens in float64.

    Raises:
        KeditError: a row is too long for the model, or the tokenizer is not the model's.
        NonFiniteError: naming prompts whose score is NaN or infinite, so that a broken model is no mere low percentage.
    """
    check_fits(model, prepared.longest, prepared.largest_token, "shorten the prompts")
    entry_nll, entry_hit = np.empty(prepared.n_entries), np.empty(prepared.n_entries, bool)
    for batch in prepared.batches:
        nll, hit = _score_batch(model, batch.tokens, batch.row, batch.position, batch.candidates)
        used = batch.entry >= 0
        entry_nll[batch.entry[used]] = np.asarray(nll)[used]
        entry_hit[batch.entry[used]] = np.asarray(hit)[used]
    n = len(prepared.pairs)
    counts = np.bincount(prepared.pair_of, minlength=n)
    nll = np.bincount(prepared.pair_of, weights=entry_nll[prepared.entry_of], minlength=n) / counts
    misses = np.bincount(prepared.pair_of, weights=~entry_hit[prepared.entry_of], minlength=n)
    _check_finite(prepared.pairs, nll)
    return PairScores(nll=nll, correct=misses == 0)


def _check_finite(pairs: Sequence[Pair], nll: Float[np.ndarray, "n"], shown: int = 5) -> None:
    broken = np.flatnonzero(~np.isfinite(nll))
    if broken.size:
        named = [f"prompt {pairs[i].prompt!r}, target {pairs[i].target!r}: NLL {nll[i]}" for i in broken[:shown]]
        more = f" ({shown} shown)" if broken.size > shown else ""
        raise NonFiniteError.listing(
            f"{broken.size} of {len(pairs)} scores are not finite{more}; look for NaN, infinite or huge weights:", named
        )
