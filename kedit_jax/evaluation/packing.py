"""Rows of tokens packed into arrays of one shape, where every distinct beginning is computed once.

Rows form trees: a token that follows the same tokens is one node, however many rows pass through it, for attention is
causal. Nodes stand in depth-first order, so that what follows a node in its tree stands behind it without a gap, and the
node at t attends to the one at s exactly where s <= t < end[s]. Trees are packed side by side; a text of its own is a tree
without branches.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from kedit_jax.evaluation.batching import bucket, power_of_two

BATCH_TOKENS = 1024
"""Nodes of a forward pass. On one CPU core an MLP of width 2048 made 108 GFLOP/s with 1,024 rows and 75 with 4,096."""
WIDTHS = tuple(range(64, 257, 32))
"""Nodes side by side in a row of an array, beside the least that the longest row of tokens needs."""
ATTENTION = 512
"""At this width a node costs twice what it costs in a narrow array, for the attention looks at the whole width. Measured
with d 128, d_ff 2048 on one CPU core: 63, 66, 79 and 135 us at 32, 64, 128 and 512; larger models lose less."""
CANDIDATES = 4
"""Tokens scored at one node by one slot; a node with more takes more slots."""

Row = tuple[int, ...]


class Wanted(NamedTuple):
    """Tokens to be scored: `tokens[i]` after the first `start + 1 + i` tokens of `row`."""

    row: Row
    start: int
    tokens: Row


class Batch(NamedTuple):
    """Arrays of one forward pass: R rows of T nodes, and in each row A slots that score C candidates at one node.

    Attributes:
        tokens: 0 where there is no node.
        positions: of the nodes in their own rows of tokens.
        end: one past the last node that attends to this one; where there is no node, it attends to itself alone.
        at: the node that a slot reads; slots and candidates without anything to score read node 0 and token 0.
        candidates: the tokens that are scored there.
    """

    tokens: Int[np.ndarray, "R T"]
    positions: Int[np.ndarray, "R T"]
    end: Int[np.ndarray, "R T"]
    at: Int[np.ndarray, "R A"]
    candidates: Int[np.ndarray, "R A C"]


@dataclass(frozen=True)
class Packed:
    """The forward passes that score what is wanted, all of one shape, so that a model needs one compiled program.

    Attributes:
        wanted: what is scored.
        batches: their candidates are numbered through in this order.
        place: the number of each of the n wanted tokens among the candidates; tokens wanted twice share one.
        nodes: in all batches, padding left out.
        apart: whether every row of an array is left to one row of tokens.
    """

    wanted: tuple[Wanted, ...]
    batches: tuple[Batch, ...]
    place: Int[np.ndarray, "n"]
    nodes: int
    apart: bool

    @property
    def longest(self) -> int:
        """Length of the longest row of tokens."""
        return max((len(row) for row, _, _ in self.wanted), default=0)

    @property
    def largest_token(self) -> int:
        """Largest token id among inputs and candidates."""
        return max((max(*row, *tokens) for row, _, tokens in self.wanted), default=0)


def pack(wanted: Sequence[Wanted], *, batch_tokens: int = BATCH_TOKENS, apart: bool = False) -> Packed:
    """Lay out the forward passes.

    Args:
        wanted: of each at least one token.
        batch_tokens: nodes of a forward pass, more where one row of tokens is longer.
        apart: every row of an array is left to one row of tokens, so that none spoils another with NaN or infinity, which
            a mask does not keep out (0 * NaN).
    """
    items = _items(wanted)
    if not items:
        return Packed((), (), np.zeros(0, np.int64), 0, apart)
    longest = bucket(max(len(item.row) for item in items))
    # An array as narrow as the longest row can leave a half of itself empty: texts of 56 to 81 tokens fill 72 % of arrays 96
    # wide, 61 % of arrays 128 wide, and 86 % of arrays 160 wide.
    widths = {longest} if apart else {longest, *(width for width in WIDTHS if longest < width <= batch_tokens)}
    layouts = {width: _filled(_cut(items, width, apart), width, apart) for width in sorted(widths)}
    width = min(layouts, key=lambda width: len(layouts[width]) * width * (1 + width / ATTENTION))
    rows = [[_tree(items[cut.begin : cut.stop]) for cut in row] for row in layouts[width]]
    n_rows = max(1, min(batch_tokens // width, power_of_two(len(rows))))
    n_slots = bucket(max(sum(tree.slots for tree in row) for row in rows))
    place = np.empty(sum(len(item.wanted) for item in items), np.int64)
    batches = [_batch(chunk, (n_rows, width, n_slots), number, place) for number, chunk in enumerate(_chunks(rows, n_rows))]
    nodes = sum(len(tree.tokens) for row in rows for tree in row)
    return Packed(tuple(wanted), tuple(batches), place, nodes, apart)


class _Token(NamedTuple):
    """A wanted token of a row, and its number among all of them."""

    position: int
    token: int
    number: int


class _Item(NamedTuple):
    """A row of tokens, how many of them the row before it begins with, too, and what is wanted of it."""

    row: Row
    shared: int
    wanted: list[_Token]


def _items(wanted: Sequence[Wanted]) -> list[_Item]:
    """The distinct rows in lexicographic order. One of which more tokens are wanted than it has comes again for the rest."""
    by_row: dict[Row, list[_Token]] = {}
    count = 0
    for row, start, tokens in wanted:
        by_row.setdefault(row, []).extend(_Token(start + i, token, count + i) for i, token in enumerate(tokens))
        count += len(tokens)
    items: list[_Item] = []
    before: Row = ()
    for row in sorted(by_row):
        for chunk in _chunks(by_row[row], len(row)):
            items.append(_Item(row, _shared(row, before), chunk))
            before = row
    return items


def _shared(row: Row, other: Row) -> int:
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(row, other, strict=False)) if a != b), min(len(row), len(other)))


class _Cut(NamedTuple):
    """Items that make one tree, and the room it takes in a row of an array: nodes, or wanted tokens if there are more."""

    begin: int
    stop: int
    room: int


def _cut(items: Sequence[_Item], width: int, apart: bool) -> list[_Cut]:
    """Neighbours that share a beginning, as many as a row of an array has room for, are a tree."""
    cuts: list[_Cut] = []
    begin = nodes = wanted = 0
    for i, item in enumerate(items):
        grown = nodes + len(item.row) - item.shared, wanted + len(item.wanted)
        if i and (apart or not item.shared or max(grown) > width):
            cuts.append(_Cut(begin, i, max(nodes, wanted)))
            begin, grown = i, (len(item.row), len(item.wanted))
        nodes, wanted = grown
    return [*cuts, _Cut(begin, len(items), max(nodes, wanted))]


def _filled(cuts: Sequence[_Cut], width: int, apart: bool) -> list[list[_Cut]]:
    """Trees by row of an array: the largest first, each where it leaves the least room."""
    if apart:
        return [[cut] for cut in cuts]
    rows: list[list[_Cut]] = []
    left: list[tuple[int, int]] = []  # room in a row, number of the row; in rising order
    for cut in sorted(cuts, key=lambda cut: cut.room, reverse=True):
        place = bisect.bisect_left(left, (cut.room, -1))
        room, number = left.pop(place) if place < len(left) else (width, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(cut)
        bisect.insort(left, (room - cut.room, number))
    return rows


class _Tree(NamedTuple):
    """Tokens, positions and ends of nodes, as in `Batch`, and node -> token -> numbers of the wanted tokens that are it."""

    tokens: list[int]
    positions: list[int]
    end: list[int]
    wanted: dict[int, dict[int, list[int]]]

    @property
    def slots(self) -> int:
        return sum(-(-len(tokens) // CANDIDATES) for tokens in self.wanted.values())


def _tree(items: Sequence[_Item]) -> _Tree:
    tree, path = _Tree([], [], [], {}), list[int]()
    for item, shared in zip(items, [0, *(item.shared for item in items[1:])], strict=True):
        path[shared:] = range(len(tree.tokens), len(tree.tokens) + len(item.row) - shared)
        tree.tokens.extend(item.row[shared:])
        tree.positions.extend(range(shared, len(item.row)))
        tree.end.extend(path[shared:])
        for node in path:
            tree.end[node] = len(tree.tokens)
        for position, token, number in item.wanted:
            tree.wanted.setdefault(path[position], {}).setdefault(token, []).append(number)
    return tree


def _batch(rows: Sequence[Sequence[_Tree]], shape: tuple[int, int, int], number: int, place: Int[np.ndarray, "n"]) -> Batch:
    """The arrays of one batch, `number` among all of this shape; where its wanted tokens stand is written into `place`."""
    n_rows, width, n_slots = shape
    tokens, positions = np.zeros((n_rows, width), np.int32), np.zeros((n_rows, width), np.int32)
    end = np.tile(np.arange(1, width + 1, dtype=np.int32), (n_rows, 1))
    at, candidates = np.zeros((n_rows, n_slots), np.int32), np.zeros((n_rows, n_slots, CANDIDATES), np.int32)
    for r, trees in enumerate(rows):
        begin, slot = 0, 0
        for tree in trees:
            span = slice(begin, begin + len(tree.tokens))
            tokens[r, span], positions[r, span], end[r, span] = tree.tokens, tree.positions, np.add(tree.end, begin)
            for node, found in tree.wanted.items():
                for chunk in _chunks(list(found.items()), CANDIDATES):
                    at[r, slot] = begin + node
                    for c, (token, numbers) in enumerate(chunk):
                        candidates[r, slot, c] = token
                        place[numbers] = ((number * n_rows + r) * n_slots + slot) * CANDIDATES + c
                    slot += 1
            begin += len(tree.tokens)
    return Batch(tokens, positions, end, at, candidates)


def _chunks(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Runs of at most `size` items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
