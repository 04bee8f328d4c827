"""From text to token rows: where the subject ends, where the target begins, found by character offsets.

Offsets hold for any fast tokenizer. Encoding a prefix again and counting its tokens does not: a token may span the seam.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from kedit_jax.editing.packed import Packed, Sizes, at_least, pack_rows, room
from kedit_jax.editing.requests import SLOT, EditRequest
from kedit_jax.errors import RequestError

KL_PROMPT = "{} is a"


@dataclass(frozen=True)
class Passage:
    """A text to encode: `prefix`, then `prompt` with `subject` in its slot, then a space and `target` if there is one."""

    prompt: str
    subject: str
    target: str | None = None
    prefix: str = ""

    @property
    def context(self) -> str:
        """All text before the target."""
        return self.prefix + self.prompt.replace(SLOT, self.subject)

    @property
    def text(self) -> str:
        return self.context if self.target is None else f"{self.context} {self.target.strip()}"

    @property
    def subject_end(self) -> int:
        """The character position just behind the subject."""
        return len(self.prefix) + self.prompt.index(SLOT) + len(self.subject.rstrip())


@dataclass(frozen=True)
class Encoded:
    """The tokens of a passage.

    Attributes:
        tokens: prompt and target, with the tokens that the tokenizer puts in front of every text (BOS) and without those
            it puts behind.
        n_prompt: how many of them stand before the target.
        subject_last: position of the subject's last token.
    """

    tokens: tuple[int, ...]
    n_prompt: int
    subject_last: int

    @property
    def target(self) -> tuple[int, ...]:
        return self.tokens[self.n_prompt :]


def encode(tokenizer: Any, passages: Sequence[Passage]) -> list[Encoded]:
    """Encode passages with a fast tokenizer (one that reports offsets).

    Raises:
        RequestError: listing every passage whose subject or target is not found in its tokens.
    """
    if not passages:
        return []
    batch = tokenizer([passage.text for passage in passages], return_offsets_mapping=True, return_special_tokens_mask=True)
    encoded, problems = [], []
    for passage, tokens, offsets, special in zip(
        passages, batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True
    ):
        while special and special[-1]:
            tokens, offsets, special = tokens[:-1], offsets[:-1], special[:-1]
        found = _locate(passage, offsets, special)
        if isinstance(found, str):
            problems.append(found)
        else:
            encoded.append(Encoded(tuple(tokens), *found))
    if problems:
        raise RequestError.listing("prompts that cannot be edited as tokenized:", problems)
    return encoded


def _locate(passage: Passage, offsets: Sequence[tuple[int, int]], special: Sequence[int]) -> tuple[int, int] | str:
    """(number of prompt tokens, position of the subject's last token), or what is wrong."""
    start = len(passage.context)
    n_prompt = next(
        (i for i, ((_, end), mark) in enumerate(zip(offsets, special, strict=True)) if end > start and not mark),
        len(offsets),
    )
    # The last token ends at the joining space where the tokenizer's normaliser removes the target itself.
    if passage.target is not None and (n_prompt == len(offsets) or offsets[-1][1] <= start + 1):
        return f"target {passage.target!r} has no tokens after {passage.context!r}; use text the tokenizer knows"
    last_char = passage.subject_end - 1
    # the last match: one character of several bytes may be spread over several tokens with the same offsets
    holding = [i for i, (begin, end) in enumerate(offsets[:n_prompt]) if begin <= last_char < end and not special[i]]
    if not holding:
        return f"subject {passage.subject!r} is not found in the tokens of {passage.context!r}; spell it as the prompt does"
    return n_prompt, holding[-1]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "valid", "targets", "target_weights", "target_columns", "kl_rows", "owners", "packed"],
    meta_fields=["n_prefix", "n_contexts"],
)
@dataclass(frozen=True, eq=False)
class Layout:
    """Token rows of a batch of requests, aligned so that every subject ends in the same column.

    Row `r * n_contexts + c` is request r in context c, the bare prompt first. Behind them stand the KL prompts, cut behind
    the subject, of the requests whose bare prompt does not begin with it; the others' subject ends in both alike. Columns
    before `n_prefix` hold what precedes the subject's last token, padded on the left; column `n_prefix` holds that token;
    the columns behind it the rest of the prompt and the target but its last token (nothing follows from it), padded on the
    right.

    Attributes:
        tokens, valid: [rows, columns] token ids and which of them are real.
        targets: [rows, A] the target's tokens, padded with 0.
        target_weights: [rows, A] 1 / (number of target tokens), 0 in padding and in KL rows.
        target_columns: [rows, A] the column, counted from `n_prefix`, whose logits predict each target token; in KL rows 0.
        kl_rows: [R] the row in which each request's KL prompt stands.
        owners: [K] the request of each row behind those of the contexts; the last ones may be padding, of the first request.
        packed: the same rows as packed tokens.
        n_prefix: the column of the subject's last token.
        n_contexts: prompts a request is optimised over: the bare one and one for each prefix.
    """

    tokens: Int[np.ndarray | jax.Array, "rows columns"]
    valid: Bool[np.ndarray | jax.Array, "rows columns"]
    targets: Int[np.ndarray | jax.Array, "rows a"]
    target_weights: Float[np.ndarray | jax.Array, "rows a"]
    target_columns: Int[np.ndarray | jax.Array, "rows a"]
    kl_rows: Int[np.ndarray | jax.Array, " r"]
    owners: Int[np.ndarray | jax.Array, " k"]
    packed: Packed
    n_prefix: int
    n_contexts: int

    @property
    def n_requests(self) -> int:
        """R, those that pad the batch included."""
        return int(self.kl_rows.shape[0])

    @property
    def n_prompts(self) -> int:
        """R * n_contexts: the rows of the prompts, which stand before those of the KL prompts."""
        return self.n_requests * self.n_contexts

    @property
    def sizes(self) -> Sizes:
        """Of the arrays: layouts with the same ones share compiled programs."""
        packed, (rows, columns) = self.packed, self.tokens.shape
        tokens = (part.homes.size for part in (packed.whole, packed.before.packing, packed.after.packing, packed.scored))
        keys = (part.homes.size for part in (packed.contexts, packed.bare.packing))
        shape = (self.n_requests, rows, self.n_prefix, columns - self.n_prefix, self.targets.shape[1])
        return Sizes(*shape, *tokens, *keys)


def _columns(n: int, multiple: int) -> int:
    """n rounded up to a few multiples: 1, 2, 3, 4, 6, 8, 12 ..."""
    return multiple * room(-(-n // multiple), 2)


def lay_out(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    *,
    max_positions: int,
    size: int | None = None,
) -> Layout:
    """Encode requests in all their contexts and align them at the subject's last token.

    Args:
        prefixes: texts put before the prompt; the bare prompt is always the first context.
        max_positions: longest row the model takes; a longer one is a RequestError.
        size: pad the batch to so many requests by repeating the first, so that batches share one compiled program.
    """
    return align(encode_requests(tokenizer, requests, prefixes, max_positions=max_positions), size)


def encode_requests(
    tokenizer: Any, requests: Sequence[EditRequest], prefixes: Sequence[str], *, max_positions: int
) -> list[list[Encoded]]:
    """The rows of each request: its prompt and target bare, behind each prefix, and the KL prompt, cut behind the subject.

    Raises:
        RequestError: listing all requests that cannot be used as tokenized, or whose rows are longer than the model takes.
    """
    passages = []
    for request in requests:
        passages += [Passage(request.prompt, request.subject, request.target, prefix) for prefix in ("", *prefixes)]
        passages.append(Passage(KL_PROMPT, request.subject))
    encoded = encode(tokenizer, passages)
    n_rows = len(prefixes) + 2
    _check_lengths(requests, encoded, n_rows, max_positions)
    rows = [encoded[i : i + n_rows] for i in range(0, len(encoded), n_rows)]
    return [[*contexts, _cut_kl(kl)] for *contexts, kl in rows]


def _check_lengths(requests: Sequence[EditRequest], encoded: Sequence[Encoded], rows: int, limit: int) -> None:
    """Raise for all requests of which one of the `rows` rows is longer than the model."""
    lengths = [max(len(e.tokens) for e in encoded[i : i + rows]) for i in range(0, len(encoded), rows)]
    problems = [
        f"{request.text!r} has {length} tokens with its target and context, the model takes {limit}; shorten the prompt"
        for request, length in zip(requests, lengths, strict=True)
        if length > limit
    ]
    if problems:
        raise RequestError.listing("requests that are too long:", problems)


def _cut_kl(encoded: Encoded) -> Encoded:
    """What follows the subject's last token cannot change the distribution there: leave it out."""
    n = encoded.subject_last + 1
    return Encoded(encoded.tokens[:n], n, encoded.subject_last)


def align(requests: Sequence[Sequence[Encoded]], size: int | None = None, held: Sizes | None = None) -> Layout:
    """The layout of requests from `encode_requests`, padded to `size` of them by repeating the first.

    Lengths are rounded up (8, 16, 24, 32, 48 ... columns before the subject's end, 4, 8, 12, 16, 24 ... behind it, targets
    to powers of two), and sizes that are `held` already used once more, so that batches share compiled programs.
    """
    padding = 0 if size is None else size - len(requests)
    requests, n_contexts = [*requests, *[requests[0]] * padding], len(requests[0]) - 1
    own = [r for r, rows in enumerate(requests) if not _begins(rows[0], rows[-1])]
    owners, kl_rows = _kl_places(own, len(requests), n_contexts, held)
    encoded = [row for rows in requests for row in rows[:-1]] + [requests[r][-1] for r in owners]
    rows = len(encoded)
    inputs = [e.tokens[:-1] if e.target else e.tokens for e in encoded]
    n_prefix = max(1, *(e.subject_last for e in encoded))
    n_suffix = max(len(row) - e.subject_last for e, row in zip(encoded, inputs, strict=True))
    n_target = max(len(e.target) for e in encoded)
    again = (None, None, None) if held is None else (held.prefix, held.suffix, held.targets)
    n_prefix = at_least(n_prefix, _columns(n_prefix, 8), again[0])
    n_suffix = at_least(n_suffix, _columns(n_suffix, 4), again[1])
    n_target = at_least(n_target, room(n_target, 1), again[2])
    tokens = np.zeros((rows, n_prefix + n_suffix), np.int32)
    valid = np.zeros(tokens.shape, bool)
    targets = np.zeros((rows, n_target), np.int32)
    weights = np.zeros(targets.shape)  # float64: 1/3 in float32 would limit a float64 model to 1e-8
    columns = np.zeros(targets.shape, np.int32)
    for row, (e, ids) in enumerate(zip(encoded, inputs, strict=True)):
        begin = n_prefix - e.subject_last
        tokens[row, begin : begin + len(ids)] = ids
        valid[row, begin : begin + len(ids)] = True
        n = len(e.target)
        targets[row, :n] = e.target
        weights[row, :n] = 1 / max(n, 1)
        columns[row, :n] = e.n_prompt - e.subject_last - 1 + np.arange(n)
    packed = pack_rows(tokens, valid, weights > 0, kl_rows, n_prefix=n_prefix, n_contexts=n_contexts, held=held)
    return Layout(tokens, valid, targets, weights, columns, kl_rows, owners, packed, n_prefix, n_contexts)


def _kl_places(
    own: Sequence[int], n_requests: int, n_contexts: int, held: Sizes | None
) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " r"]]:
    """`Layout.owners` and `Layout.kl_rows`, where the KL prompts of the requests `own` are rows of their own."""
    n_prompts = n_requests * n_contexts
    again = None if held is None or held.requests != n_requests else held.rows - n_prompts
    n_own = at_least(len(own), min(room(len(own), 1), n_requests), again)
    kl_rows = n_contexts * np.arange(n_requests, dtype=np.int32)
    kl_rows[own] = n_prompts + np.arange(len(own))
    return np.array([*own, *[0] * (n_own - len(own))], np.int32), kl_rows


def _begins(bare: Encoded, kl: Encoded) -> bool:
    """Whether the bare prompt is the KL prompt up to the end of the subject, as where no text precedes it."""
    return bare.subject_last == kl.subject_last and bare.tokens[: len(kl.tokens)] == kl.tokens
