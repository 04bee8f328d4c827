"""A batch's rows as packed tokens: against a naive reading of them, alone and in company, and how few shapes they have."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from editing_reference import largest_error
from editing_world import PEOPLE, many_requests
from hypothesis import given, settings
from hypothesis import strategies as st

from kedit_jax.editing import budget as budget_module
from kedit_jax.editing import keys as reading
from kedit_jax.editing import packed as packing_module
from kedit_jax.editing import tokens as token_module
from kedit_jax.editing import values as value_module
from kedit_jax.editing.budget import micro_batches, sizes_for, values_bytes
from kedit_jax.editing.packed import Packed, Sizes, pack_rows, room
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, relative_error
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.tokens import Encoded, Layout, align, lay_out
from kedit_jax.editing.values import SHARE
from kedit_jax.errors import RequestError
from kedit_jax.models import Decoder, Packing, gpt2_config

# --- against a naive reading ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rows:
    """What `pack_rows` is given."""

    tokens: np.ndarray
    valid: np.ndarray
    scored: np.ndarray
    kl_rows: np.ndarray
    n_prefix: int
    n_contexts: int

    @property
    def n_prompts(self) -> int:
        return len(self.kl_rows) * self.n_contexts

    def pack(self) -> Packed:
        sizes = {"n_prefix": self.n_prefix, "n_contexts": self.n_contexts}
        return pack_rows(self.tokens, self.valid, self.scored, self.kl_rows, **sizes)


@st.composite
def some_rows(draw: st.DrawFn) -> Rows:
    """Few different tokens, so that rows begin alike; KL rows end in the subject's last column, or are the bare prompts'."""
    requests, n_contexts, n_prefix = (draw(st.integers(1, top)) for top in (3, 3, 4))
    suffix, n_scored = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    n_prompts, own = requests * n_contexts, draw(st.lists(st.booleans(), min_size=requests, max_size=requests))
    rows = n_prompts + sum(own)
    kl_rows = [n_prompts + sum(own[:r]) if own[r] else r * n_contexts for r in range(requests)]
    tokens, valid = np.zeros((rows, n_prefix + suffix), int), np.zeros((rows, n_prefix + suffix), bool)
    scored = np.zeros((rows, n_scored), bool)
    for row in range(rows):
        is_kl = row >= n_prompts
        before, after = draw(st.integers(0, n_prefix)), 1 if is_kl else draw(st.integers(1, suffix))
        where = slice(n_prefix - before, n_prefix + after)
        valid[row, where] = True
        tokens[row, where] = draw(st.lists(st.integers(0, 1), min_size=before + after, max_size=before + after))
        scored[row, : 0 if is_kl else draw(st.integers(1, n_scored))] = True
    return Rows(tokens, valid, scored, np.array(kl_rows), n_prefix, n_contexts)


def beginning(rows: Rows, row: int, column: int) -> tuple[int, ...]:
    """All real tokens of the row up to this column."""
    return tuple(rows.tokens[row, : column + 1][rows.valid[row, : column + 1]])


def homes_of(packing: Packing) -> list[tuple[int, int]]:
    """(row, column) of each packed token; those that are not used, which must all stand behind, left out."""
    columns, homes = packing.slots.shape[1], np.asarray(packing.homes)
    unused = homes == packing.slots.size
    assert (np.diff(unused.astype(int)) >= 0).all()
    return [divmod(int(home), columns) for home in homes[~unused]]


def check_slots(packing: Packing, valid: np.ndarray) -> None:
    """Slots and homes agree; padding points at a token of its own row, if there is one."""
    np.testing.assert_array_equal(packing.used, valid)
    homes = homes_of(packing)
    for place, (row, column) in enumerate(homes):
        assert valid[row, column]
        assert packing.slots[row, column] == place
    for row in range(len(valid)):
        own = set(packing.slots[row, valid[row]].tolist()) or {0}
        assert set(packing.slots[row].tolist()) == own
    assert set(packing.slots[valid].tolist()) == set(range(len(homes)))


def check_names(packing: Packing, valid: np.ndarray, name: Callable[[int, int], Any]) -> None:
    """Two columns are one packed token exactly where they have the same name."""
    check_slots(packing, valid)
    named = [(int(packing.slots[row, column]), name(row, column)) for row, column in np.argwhere(valid).tolist()]
    assert len(set(named)) == len({place for place, _ in named}) == len({what for _, what in named})


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(rows=some_rows())
def test_packed_tokens_are_those_of_a_naive_reading(rows: Rows) -> None:
    packed, cut, n_prompts = rows.pack(), rows.n_prefix, rows.n_prompts
    check_names(packed.whole, rows.valid, lambda row, column: beginning(rows, row, column))
    assert packed.whole.shared

    def whole(row: int, column: int) -> int:
        return int(packed.whole.slots[row, column])

    check_names(packed.before.packing, rows.valid[:, :cut], lambda row, column: beginning(rows, row, column))
    for place, (row, column) in enumerate(homes_of(packed.before.packing)):
        assert packed.before.places[place] == whole(row, column)

    check_names(packed.after.packing, rows.valid[:, cut:], lambda row, column: (row, column))
    assert not packed.after.packing.shared
    homes = homes_of(packed.after.packing)
    assert homes[: len(rows.tokens)] == [(row, 0) for row in range(len(rows.tokens))], "subjects' last tokens first"
    for place, (row, column) in enumerate(homes):
        assert packed.after.places[place] == whole(row, column + cut)

    scored = np.pad(rows.scored, ((0, 0), (1, 0)))
    scored[rows.kl_rows, 0] = True
    check_names(packed.scored, scored, lambda row, column: (row, column))
    assert not packed.scored.shared
    kl = [(row, 0) for row in rows.kl_rows.tolist()]
    assert homes_of(packed.scored)[: len(kl)] == kl, "those of the KL prompts first, request by request"

    prompts = dataclasses.replace(rows, tokens=rows.tokens[:n_prompts], valid=rows.valid[:n_prompts, : cut + 1])
    check_names(packed.contexts, prompts.valid, lambda row, column: beginning(prompts, row, column))
    bare = dataclasses.replace(prompts, tokens=prompts.tokens[:: rows.n_contexts], valid=prompts.valid[:: rows.n_contexts])
    check_names(packed.bare.packing, bare.valid, lambda row, column: beginning(bare, row, column))
    for place, (row, column) in enumerate(homes_of(packed.bare.packing)):
        assert packed.bare.places[place] == packed.contexts.slots[row * rows.n_contexts, column]


def test_negative_control_a_wrong_packing_is_noticed() -> None:
    rows = Rows(
        np.array([[0, 5, 6, 7], [0, 5, 8, 0]]), np.array([[0, 1, 1, 1], [0, 1, 1, 0]], bool),
        np.array([[1], [0]], bool), np.array([1]), 2, 1,
    )  # fmt: skip
    packing = rows.pack().whole
    check_names(packing, rows.valid, lambda row, column: beginning(rows, row, column))
    for change in ({"slots": packing.slots[:, ::-1]}, {"homes": packing.homes[::-1]}, {"used": ~rows.valid}):
        wrong = dataclasses.replace(packing, **change)
        with pytest.raises(AssertionError):
            check_names(wrong, rows.valid, lambda row, column: beginning(rows, row, column))
    with pytest.raises(AssertionError):  # "5" begins both rows
        check_names(packing, rows.valid, lambda row, column: (row, column))


def test_room_is_for_at_least_what_is_asked_and_little_more() -> None:
    for steps in (1, 2, 4, 8):
        sizes = [room(count, steps) for count in range(1, 5000)]
        assert all(count <= size <= 1 + count * (1 + 1 / steps) for count, size in enumerate(sizes, 1))
        assert sizes == sorted(sizes)
        assert [room(size, steps) for size in set(sizes)] == list(set(sizes)), "a size has room for itself"
        assert len({size for size in sizes if 1024 < size <= 2048}) == steps


# --- alone and in company -------------------------------------------------------------------------------------------

LAYER = 2
PREFIXES = ("The old house of Rome stands. ", "New people. ")
REQUESTS = [
    EditRequest("{} was born in", person, target)
    for person, target in zip(PEOPLE, ("old Lima", "new Rome", "far Oslo"), strict=False)
]


@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def read_keys(model: Decoder, layout: Layout) -> list[jax.Array]:
    """Keys of layers 0 and 2, and the top's outputs as seen from both."""
    stream, found = reading.enter(model, layout), []
    for at, layer in ((0, 0), (0, LAYER)):
        stream, read = reading.read(model, stream, at, layer, LAYER, layout.n_contexts)
        found += read
    return found


def test_keys_do_not_depend_on_the_company(wide_model: Decoder, tokenizer: Any) -> None:
    """Three at once, sharing prefixes and their prompts' beginnings, against each with copies of itself."""

    def found(requests: Sequence[EditRequest]) -> list[np.ndarray]:
        layout = lay_out(tokenizer, requests, PREFIXES, max_positions=64, size=3)
        return [np.asarray(part) for part in read_keys(wide_model, layout)]

    with jax.enable_x64(True):
        together, alone = found(REQUESTS), [found([request]) for request in REQUESTS]
    for number, single in enumerate(alone):
        for mine, expected in zip(together, single, strict=True):
            assert mine.dtype == np.float64
            assert largest_error(mine[number], expected[0]) < 1e-12
    assert min(largest_error(part[0], part[1]) for part in together) > 1e-3, "all alike: the test shows nothing"


# --- few shapes -----------------------------------------------------------------------------------------------------

BIG = gpt2_config(vocab_size=9, n_layers=2, d_model=4, n_heads=2, max_positions=64)


def shapes_of(batches: Sequence[Sequence[Sequence[Encoded]]], *, hold: bool) -> tuple[set[Any], set[Any]]:
    """The distinct shapes of what goes into value optimisation, and into reading keys, of one batch after another.

    Value optimisation goes on with some of the requests; here each time with those at hand.
    """
    held: Sizes | None = None
    values, keys = set(), set()
    for batch in batches:
        ((layout,), _) = micro_batches(BIG, EditSettings((0,)), batch, itemsize=4, held=held if hold else None)
        held = layout.sizes
        smaller = held.fraction(SHARE, layout.n_contexts)
        rest = align(batch[: smaller.requests], smaller.requests, smaller if hold else None)
        keys.add((held.rows, held.prefix, held.contexts, held.bare))
        values |= {(*sizes[:-2],) for sizes in (held, rest.sizes)}
    return values, keys


def test_a_long_run_needs_a_handful_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 batches; the negative controls are sizes as they come, and rounded but not used once more."""
    requests = many_requests(3000)
    batches = [requests[i : i + 50] for i in range(0, len(requests), 50)]
    values, keys = shapes_of(batches, hold=True)
    assert len(values) <= 10
    assert len(keys) <= 4
    rounded, _ = shapes_of(batches, hold=False)
    assert len(rounded) > len(values)
    for module in (packing_module, token_module):
        monkeypatch.setattr(module, "room", lambda count, steps: max(1, count))
    as_they_come = shapes_of(batches, hold=False)
    assert len(as_they_come[0]) >= 3 * len(values)
    assert len(as_they_come[1]) >= 3 * len(keys)


def test_small_batches_of_mixed_sizes_need_a_handful_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 batches of 1 to 5; the negative control is as sessions did it: each number of requests had sizes of its own."""
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, 6, 200))
    requests = many_requests(int(ends[-1]))
    batches = [requests[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]

    def programs() -> int:
        held, found = None, set()
        for batch in batches:
            ((layout,), (places,)) = micro_batches(BIG, EditSettings((0,)), batch, itemsize=4, held=held)
            assert places.tolist() == list(range(len(batch)))
            held = layout.sizes
            found.add(held)
        return len(found)

    assert programs() <= 12
    monkeypatch.setattr(budget_module, "SMALL", 0)
    assert programs() > 36


def test_a_stream_that_is_known_ahead_needs_one_set_of_programs() -> None:
    """20 batches of 50 and a shorter last one; the negative control finds its sizes as they come."""
    requests = many_requests(1020)
    batches = [requests[i : i + 50] for i in range(0, len(requests), 50)]
    ahead = sizes_for(BIG, EditSettings((0,)), batches, itemsize=4)

    def found(held: Sizes | None) -> list[Sizes]:
        sizes = []
        for batch in batches[:-1]:
            layouts, _ = micro_batches(BIG, EditSettings((0,)), batch, itemsize=4, held=held)
            held = layouts[-1].sizes
            sizes += [layout.sizes for layout in layouts]
        return sizes

    assert set(found(ahead)) == {ahead}
    assert len(set(found(None))) > 1
    least = min(values_bytes(BIG, sizes, 0, "products", 4) for sizes in found(None))
    assert ahead is not None
    assert least < values_bytes(BIG, ahead, 0, "products", 4)
    tight = EditSettings((0,), memory=least / budget_module.GIB)
    fits = sizes_for(BIG, tight, batches, itemsize=4)
    assert fits is not None
    assert values_bytes(BIG, fits, 0, "products", 4) <= least, "no larger than memory allows"


def test_a_session_sized_ahead_makes_the_same_edits(fresh: EditSession, batches: list[list[EditRequest]]) -> None:
    long = EditRequest("In old Rome and far Oslo and new Lima, the house of {} stands in", "Dan Brown", "old Paris")
    ahead = fresh.sized_for([batches[0], [*batches[1][:2], long]])
    assert ahead.sizes is not None
    assert ahead.sizes.prefix > fresh._micro_batches(batches[0]).layouts[0].sizes.prefix
    after, _ = ahead.edit(batches[0])
    assert after.sizes == ahead.sizes
    plain, _ = fresh.edit(batches[0])
    assert relative_error(after.delta, plain.delta) <= 1e-5, "float32, in arrays of another shape"
    endless = [[EditRequest("{}" + " is old" * 60, name, "Paris")] for name in ("Alice Smith", "Dan Brown")]
    with pytest.raises(RequestError, match=r"(?s)Alice Smith.*Dan Brown"):
        fresh.sized_for(endless)


def test_padding_that_does_not_fit_into_memory_is_left_out() -> None:
    requests = many_requests(9)
    ((layout,), _) = micro_batches(BIG, EditSettings((0,)), requests[:8], itemsize=4)
    ((alone,), _) = micro_batches(BIG, EditSettings((0,)), requests[8:], itemsize=4)
    assert alone.n_requests == 1
    ((padded,), _) = micro_batches(BIG, EditSettings((0,)), requests[8:], itemsize=4, held=layout.sizes)
    assert padded.n_requests == 8
    ((tight,), _) = micro_batches(BIG, EditSettings((0,), memory=1e-9), requests[8:], itemsize=4, held=layout.sizes)
    assert tight.sizes == alone.sizes


def test_batches_of_one_shape_share_their_programs(
    fresh: EditSession, history: list[EditSession], batches: list[list[EditRequest]]
) -> None:
    programs = (value_module._advanced, reading.enter, reading.read)
    fresh.edit(batches[0])
    history[1].edit(batches[1])  # has longer rows: what comes behind it is held at its sizes
    compiled = [program._cache_size() for program in programs]
    history[2].edit(batches[2])
    history[2].edit(batches[3])
    assert [program._cache_size() for program in programs] == compiled
    layout = lay_out(fresh.tokenizer, batches[0], fresh.prefixes, max_positions=64, size=5)
    reading.enter(fresh.base, layout)
    assert reading.enter._cache_size() == compiled[1] + 1, "negative control: another shape, another program"
