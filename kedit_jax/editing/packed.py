"""A batch's rows as packed tokens: what the passes over a model compute, each token once and without padding.

Sizes are rounded up to a few steps an octave, so that the batches of a long run share a handful of compiled programs.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Int

from kedit_jax.models import Packing

FINE, COARSE = 16, 4
"""Steps an octave: for what every optimisation step computes (at most 6 % too much) and for what is computed once (25 %).
What a session has compiled for is used once more (`at_least`)."""
LONGER = 1.2
"""Room for requests longer than the average of those that they were chosen from."""

Places = Int[Array | np.ndarray, " n"]


class Part(NamedTuple):
    """Some of a packing's tokens, packed themselves: their places among those, and the rows they attend in."""

    places: Places
    packing: Packing


class Sizes(NamedTuple):
    """How large a layout's arrays are: requests, rows, columns before and from the subjects' last tokens, columns of
    targets, and the packed tokens of each part (see `Packed`)."""

    requests: int
    rows: int
    prefix: int
    suffix: int
    targets: int
    whole: int
    before: int
    after: int
    scored: int
    contexts: int
    bare: int

    def fraction(self, share: int, n_contexts: int) -> "Sizes":
        """Those of one in `share` of the requests, with room for longer ones."""
        requests = -(-self.requests // share)
        own = min(requests, -(-int(LONGER * (self.rows - self.requests * n_contexts)) // share))
        exact = {"requests": requests, "rows": requests * n_contexts + own}
        columns = {"prefix": self.prefix, "suffix": self.suffix, "targets": self.targets}
        return Sizes(*(-(-int(LONGER * size) // share) for size in self))._replace(**exact, **columns)


def larger(*sizes: Sizes) -> Sizes:
    """What holds each of them."""
    return Sizes(*map(max, zip(*sizes, strict=True)))


class Packed(NamedTuple):
    """Packed tokens of the R * C + K rows of a layout.

    Attributes:
        whole: all rows; tokens with the same beginning are one.
        before: of those, what precedes the subjects' last tokens.
        after: of those, the subjects' last tokens, in the order of the rows, then what follows them. No two rows share one.
        scored: rows [R * C + K, 1 + A] of the tokens whose logits are read: those of the KL prompts first, in column 0.
        contexts: the rows without those of the KL prompts, up to the subjects' last tokens.
        bare: of those, the rows of the bare prompts.
    """

    whole: Packing
    before: Part
    after: Part
    scored: Packing
    contexts: Packing
    bare: Part


def pack_rows(
    tokens: Int[np.ndarray, "rows columns"],
    valid: Bool[np.ndarray, "rows columns"],
    scored: Bool[np.ndarray, "rows a"],
    kl_rows: Int[np.ndarray, " r"],
    *,
    n_prefix: int,
    n_contexts: int,
    held: Sizes | None = None,
) -> Packed:
    """The packed tokens of aligned rows: see `kedit_jax.editing.tokens.Layout` for the arguments.

    Args:
        scored: which targets of each row are real.
        held: sizes to use once more, as `at_least` says.
    """
    sizes = dict.fromkeys(Sizes._fields) if held is None else held._asdict()
    nodes = _trie(tokens, valid)
    n_prompts = len(kl_rows) * n_contexts
    prompts = nodes[:n_prompts, : n_prefix + 1], valid[:n_prompts, : n_prefix + 1]
    contexts = _shared(*prompts, sizes["contexts"])
    places = _own_places(*prompts, np.asarray(contexts.places))
    suffix, used = nodes[:, n_prefix:], valid[:, n_prefix:]
    width = 1 + scored.shape[1]
    kl = np.zeros((len(nodes), 1), bool)
    kl[kl_rows] = True
    targets = np.flatnonzero(np.concatenate([np.zeros_like(kl), scored], axis=1))
    return Packed(
        whole=_shared(nodes, valid, sizes["whole"]).packing,
        before=_shared(nodes[:, :n_prefix], valid[:, :n_prefix], sizes["before"]),
        after=_one_to_one(suffix, used, _first_column_first(used), sizes["after"]),
        scored=_one_to_one(
            np.zeros((len(nodes), width), np.int64),
            np.concatenate([kl, scored], axis=1),
            np.concatenate([kl_rows * width, targets]),
            sizes["scored"],
        ).packing,
        contexts=contexts.packing,
        bare=_shared(places[::n_contexts], prompts[1][::n_contexts], sizes["bare"]),
    )


def room(count: int, steps: int) -> int:
    """`count` rounded up to one of `steps` sizes an octave."""
    step = max(1, (1 << max(0, count - 1).bit_length()) // (2 * steps))
    return max(1, -(-count // step) * step)


def at_least(needed: int, rounded: int, held: int | None) -> int:
    """`held` where that is enough, otherwise what is needed, rounded."""
    return held if held is not None and needed <= held else rounded


def _trie(tokens: np.ndarray, valid: np.ndarray) -> Int[np.ndarray, "rows columns"]:
    """A number for each real token, the same for tokens of rows that are the same up to there; 0 at padding."""
    numbers: dict[tuple[int, int], int] = {}
    nodes = np.zeros(tokens.shape, np.int64)
    for row, columns in enumerate(map(np.flatnonzero, valid)):
        parent, found = -1, []
        for token in tokens[row, columns].tolist():
            parent = numbers.setdefault((parent, token), len(numbers))
            found.append(parent)
        nodes[row, columns] = found
    return nodes


def _shared(nodes: np.ndarray, used: np.ndarray, held: int | None) -> Part:
    """The distinct ones among the nodes in use."""
    homes = np.flatnonzero(used)
    places, first, inverse = np.unique(nodes.reshape(-1)[homes], return_index=True, return_inverse=True)
    slots = np.zeros(used.shape, np.int64)
    slots.reshape(-1)[homes] = inverse
    size = at_least(len(places), room(len(places), COARSE), held)
    return _part(slots, used, homes[first], places, size, shared=True)


def _first_column_first(used: np.ndarray) -> np.ndarray:
    """Where the columns in use stand, those of the first column before the others, row by row."""
    first = np.arange(used.shape[1]) == 0
    return np.concatenate([np.flatnonzero(used & first), np.flatnonzero(used & ~first)])


def _one_to_one(nodes: np.ndarray, used: np.ndarray, homes: np.ndarray, held: int | None) -> Part:
    """Every node in use, in the order of their `homes`."""
    slots = np.zeros(used.shape, np.int64)
    slots.reshape(-1)[homes] = np.arange(len(homes))
    size = at_least(len(homes), room(len(homes), FINE), held)
    return _part(slots, used, homes, nodes.reshape(-1)[homes], size, shared=False)


def _part(slots: np.ndarray, used: np.ndarray, homes: np.ndarray, places: np.ndarray, size: int, *, shared: bool) -> Part:
    own = np.take_along_axis(slots, used.argmax(1)[:, None], axis=1)  # the row's first token
    spare = size - len(homes)
    packing = Packing(
        slots=np.where(used, slots, own).astype(np.int32),
        homes=np.concatenate([homes, np.full(spare, used.size)]).astype(np.int32),
        used=used,
        shared=shared,
    )
    return Part(np.concatenate([places, np.zeros(spare, np.int64)]).astype(np.int32), packing)


def _own_places(nodes: np.ndarray, used: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The place of each node among `places`, which end in padding."""
    count = len(np.unique(nodes[used]))
    return np.where(used, np.searchsorted(places[:count], nodes), 0)
