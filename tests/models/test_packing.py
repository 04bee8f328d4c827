"""Packed tokens against padded rows, float64: the same outputs, keys, caches and gradients, token by token."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle_models import quick_jit

from kedit_jax.models import KV, Decoder, Packing, causal_mask, load_model, pack, positions_of, single_tokens, unpack
from kedit_jax.models.layers import HeadKV, attend

FAMILIES = {"gpt2": "products", "llama-3.1": "inputs", "gptj": "inputs", "gemma3": "products"}
"""Plain; with grouped heads; with parallel blocks; with sliding windows. And what is kept for the backward pass."""
ROWS = [("abc", "def"), ("abc", "dg"), ("ab", "hijk"), ("", "ab"), ("abcx", "e")]  # before the cut, and from it on
CUT, COLUMNS = 4, 8
SPARE = 3  # packed places that are not used
SCORED = [(2, 0), (1, 1), (3, 2), (0, 0), (0, 0)]  # columns from the cut on, two a row; the second may be padding
REAL = np.array([(1, 1), (1, 0), (1, 1), (1, 0), (1, 0)], bool)


def rows_of() -> tuple[np.ndarray, np.ndarray]:
    """Tokens of `ROWS` [5, 8], padded on both sides, and which are real."""
    tokens, valid = np.zeros((len(ROWS), COLUMNS), np.int32), np.zeros((len(ROWS), COLUMNS), bool)
    for row, (before, after) in enumerate(ROWS):
        where = slice(CUT - len(before), CUT + len(after))
        tokens[row, where] = [ord(letter) for letter in before + after]
        valid[row, where] = True
    return tokens, valid


def packing_of(valid: np.ndarray, names: dict[tuple[int, int], Any], *, shared: bool) -> Packing:
    """A place for each name, in the order of the rows; padding points at the row's last token."""
    places: dict[Any, int] = {}
    homes, slots = [], np.zeros(valid.shape, np.int32)
    for row, column in np.argwhere(valid).tolist():
        name = names[row, column]
        if name not in places:
            places[name] = len(places)
            homes.append(row * valid.shape[1] + column)
        slots[row, column] = places[name]
    for row in range(len(valid)):
        slots[row, ~valid[row]] = slots[row, valid[row]][-1] if valid[row].any() else 0
    return Packing(slots, np.array([*homes, *[valid.size] * SPARE], np.int32), valid, shared)


def names_of(begin: int, end: int) -> dict[tuple[int, int], str]:
    """What each real token of these columns is, all before it included."""
    tokens, valid = rows_of()
    return {
        (row, column - begin): "".join(map(chr, tokens[row, : column + 1][valid[row, : column + 1]]))
        for row, column in np.argwhere(valid).tolist()
        if begin <= column < end
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packings:
    """All rows, what precedes the cut, what follows it, and the scored tokens behind the cut."""

    whole: Packing
    before: Packing
    after: Packing
    scored: Packing


@pytest.fixture(scope="module", autouse=True)
def wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def packings() -> Packings:
    _, valid = rows_of()
    own = {place: place for place in np.ndindex(valid.shape)}
    return Packings(
        packing_of(valid, names_of(0, COLUMNS), shared=True),
        packing_of(valid[:, :CUT], names_of(0, CUT), shared=True),
        packing_of(valid[:, CUT:], own, shared=False),
        packing_of(REAL, own, shared=False),
    )


def moved(packing: Packing, row: int, column: int) -> Packing:
    """With one column pointing at the token next to its own."""
    slots = np.array(packing.slots)
    slots[row, column] = (slots[row, column] + 1) % (len(packing.homes) - SPARE)
    return dataclasses.replace(packing, slots=slots)


# --- one program a family, of everything that is compared -----------------------------------------------------------


def halves(cache: Any) -> tuple[Any, Any]:
    """The caches of the first two layers, and of the last."""
    return jax.tree.map(lambda part: part[:2], cache), jax.tree.map(lambda part: part[2:], cache)


@quick_jit
def padded(model: Decoder, h: jax.Array, pull: jax.Array) -> dict[str, Any]:
    """Rows: all layers up to the cut, then two and the last one behind their cache; h: [rows, columns, d]."""
    valid = jnp.asarray(rows_of()[1])
    positions, mask = positions_of(valid), causal_mask(valid)
    early: dict[str, Any] = {"positions": positions[:, :CUT], "mask": mask[:, :CUT, :CUT]}
    late: dict[str, Any] = {"positions": positions[:, CUT:], "mask": mask[:, CUT:]}
    out, keys, cache = model.prefill(h[:, :CUT], 0, 3, **early)
    past, last = halves(cache)

    def tail(suffix: jax.Array) -> tuple[jax.Array, jax.Array]:
        upper, _ = model.run_layers(suffix, 0, 2, **late, past=past)
        return (upper * pull).sum(), upper

    slope, upper = jax.grad(tail, has_aux=True)(h[:, CUT:])
    whole, _ = model.run_layers(upper, 2, 3, **late, past=last)
    end = jnp.take_along_axis(whole, jnp.array(SCORED)[:, :, None], axis=1)
    cache = HeadKV(jnp.swapaxes(cache.k, 2, 3), jnp.swapaxes(cache.v, 2, 3), cache.positions)
    return {"out": out, "keys": keys, "cache": cache, "upper": upper, "slope": slope, "end": end}


@partial(quick_jit, static_argnames="keep")
def packed(model: Decoder, p: Packings, tokens: jax.Array, pull: jax.Array, keep: Any) -> dict[str, Any]:
    """The same of packed tokens [1, N, d]."""
    valid = jnp.asarray(rows_of()[1])
    positions, mask = positions_of(valid), causal_mask(valid)
    h, cut = unpack(p.whole, tokens), mask[:, :CUT, :CUT]
    early: dict[str, Any] = {"positions": pack(p.before, positions[:, :CUT]), "mask": cut, "packing": p.before}
    out, keys, cache = model.prefill(pack(p.before, h[:, :CUT]), 0, 3, **early)
    past, last = halves(cache)
    late: dict[str, Any] = {"positions": pack(p.after, positions[:, CUT:]), "packing": p.after}

    def tail(suffix: jax.Array) -> tuple[jax.Array, jax.Array]:
        upper, _ = model.run_layers(suffix, 0, 2, **late, mask=mask[:, CUT:], past=past, keep=keep)
        return (upper * pack(p.after, pull)).sum(), upper

    slope, upper = jax.grad(tail, has_aux=True)(pack(p.after, h[:, CUT:]))
    columns = jnp.array(SCORED)
    at = pack(p.scored, jnp.take_along_axis(jnp.asarray(p.after.slots), columns, axis=1))
    seen = jnp.take_along_axis(mask[:, CUT:], columns[:, :, None], axis=1)
    two_steps: dict[str, Any] = {"mask": seen, "at": at, "past": last, "queries": p.scored}
    rest, key = model.before_down(upper, 2, **late, **two_steps)
    end = model.after_down(rest, key, 2)
    return {"out": out, "keys": keys, "cache": cache, "upper": upper, "slope": slope, "end": end}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its packed tokens, what pulls at the output, and both results."""

    model: Decoder
    tokens: np.ndarray
    pull: np.ndarray
    keep: str
    rows: dict[str, Any]
    found: dict[str, Any]

    def again(self, packings: Packings, tokens: np.ndarray | None = None) -> dict[str, Any]:
        """The packed result with other packings or tokens."""
        given = self.tokens if tokens is None else tokens
        return packed(self.model, packings, jnp.asarray(given), jnp.asarray(self.pull), self.keep)


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, wide: None, pairs: dict[str, Any], packings: Packings) -> Case:
    model = load_model(pairs[request.param].directory, dtype=jnp.float64)
    rng, d = np.random.default_rng(0), model.config.d_model
    tokens = rng.normal(size=(1, len(packings.whole.homes), d))
    pull = rng.normal(size=(len(ROWS), COLUMNS - CUT, d)) * packings.after.used[:, :, None]
    rows = padded(model, jnp.asarray(tokens[0][packings.whole.slots]), jnp.asarray(pull))
    keep = FAMILIES[request.param]
    return Case(model, tokens, pull, keep, rows, packed(model, packings, jnp.asarray(tokens), jnp.asarray(pull), keep))


def as_rows(packing: Packing, tokens: Any) -> np.ndarray:
    """[..., 1, N, d] as rows, zero at padding; by hand."""
    found = np.asarray(tokens)[..., 0, :, :][..., packing.slots, :]
    return np.where(packing.used[:, :, None], found, 0)


def real(packing: Packing, rows: Any) -> np.ndarray:
    return np.where(packing.used[:, :, None], np.asarray(rows), 0)


def largest(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# --- layers ---------------------------------------------------------------------------------------------------------


def test_packed_layers_give_each_token_what_rows_give(case: Case, packings: Packings) -> None:
    for name in ("out", "keys"):
        assert largest(as_rows(packings.before, case.found[name]), real(packings.before, case.rows[name])) < 1e-12
    assert len(packings.before.homes) - SPARE < packings.before.used.sum(), "nothing is shared: the test shows less"


def test_the_cache_of_packed_tokens_is_that_of_rows(case: Case, packings: Packings) -> None:
    used = packings.before.used[:, None, :, None]
    for part in ("k", "v"):
        found, expected = (np.asarray(getattr(one["cache"], part)) for one in (case.found, case.rows))
        assert largest(found, np.where(used, expected, 0)) < 1e-12
    assert (case.found["cache"].positions is None) == (case.model.config.local is None)
    if case.model.config.local is not None:
        expected = np.where(packings.before.used, case.rows["cache"].positions, 0)
        np.testing.assert_array_equal(case.found["cache"].positions, expected)


def test_behind_a_cache(case: Case, packings: Packings) -> None:
    """One-to-one tokens behind shared ones; the last layer for the scored ones alone, in two steps."""
    assert largest(as_rows(packings.after, case.found["upper"]), real(packings.after, case.rows["upper"])) < 1e-12
    assert largest(as_rows(packings.scored, case.found["end"]), real(packings.scored, case.rows["end"])) < 1e-12


def test_the_gradient_in_packed_tokens_is_that_in_rows(case: Case, packings: Packings) -> None:
    """In the first token, too, where the gradients of padding would go; none in places that are not used.

    Rows keep the layers' inputs, packed tokens those or all products, by family: the gradients are the same.
    """
    slope = np.asarray(case.found["slope"])
    assert largest(as_rows(packings.after, slope), np.asarray(case.rows["slope"])) < 1e-12
    np.testing.assert_allclose(slope[0, 0], case.rows["slope"][0, 0], rtol=1e-10)
    assert not slope[0, -SPARE:].any()


@pytest.mark.parametrize(("row", "column"), [(2, CUT + 3), (4, CUT - 1)])
def test_a_nan_stays_in_its_row(case: Case, packings: Packings, row: int, column: int) -> None:
    """Also where the row begins like others: common beginnings attend in the first row that has them."""
    tokens = case.tokens.copy()
    tokens[0, packings.whole.slots[row, column]] = np.nan
    found = case.again(packings, tokens)
    for name, packing in (("upper", packings.after), ("slope", packings.after)):
        broken = np.isnan(as_rows(packing, found[name])).any(axis=(1, 2))
        np.testing.assert_array_equal(np.flatnonzero(broken), [row], err_msg=name)


# --- negative controls ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "row", "column", "name"), [
    ("before", 0, 2, "out"), ("before", 0, 1, "upper"), ("after", 2, 1, "upper"), ("scored", 0, 1, "end"),
])  # fmt: skip
def test_negative_control_a_wrong_slot_is_noticed(
    case: Case, packings: Packings, part: str, row: int, column: int, name: str
) -> None:
    if part == "scored":  # the packed tokens are found by their homes alone
        homes = np.array(packings.scored.homes)
        homes[[0, 1]] = homes[[1, 0]]
        wrong = dataclasses.replace(packings.scored, homes=homes)
    else:
        wrong = moved(getattr(packings, part), row, column)
    found = case.again(dataclasses.replace(packings, **{part: wrong}))
    packing = getattr(packings, {"out": "before", "upper": "after", "end": "scored"}[name])
    assert largest(as_rows(packing, found[name]), real(packing, case.rows[name])) > 1e-3


def test_shared_tokens_add_up_their_gradients(packings: Packings) -> None:
    """Negative control: taken for one-to-one, a shared token gets the gradient of one row alone."""
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(1, len(packings.whole.homes), 3))
    pull = rng.normal(size=(*packings.whole.slots.shape, 3)) * packings.whole.used[:, :, None]
    expected = np.zeros_like(tokens)
    np.add.at(expected[0], packings.whole.slots, pull)
    slope = quick_jit(jax.grad(lambda x, p: (unpack(p, x) * pull).sum()))
    found, wrong = (slope(tokens, p) for p in (packings.whole, dataclasses.replace(packings.whole, shared=False)))
    assert largest(np.asarray(found), expected) < 1e-14
    assert largest(np.asarray(wrong), expected) > 1e-2


# --- gathers --------------------------------------------------------------------------------------------------------


def test_one_to_one_gathers_are_each_others_transpose(packings: Packings) -> None:
    """Against JAX's own transpose of the plain gather; padding and places that are not used get nothing."""
    p, rng = packings.after, np.random.default_rng(2)
    x, y = rng.normal(size=(1, len(p.homes), 2)), rng.normal(size=(*p.slots.shape, 2))
    real_places, real_columns = (np.arange(len(p.homes)) < len(p.homes) - SPARE)[None, :, None], p.used[:, :, None]

    @quick_jit
    def both(x: jax.Array, y: jax.Array) -> Any:
        plainly = jax.grad(lambda x: (x[0][p.slots] * y * real_columns).sum())(x)
        ours = jax.grad(lambda x: (unpack(p, x) * y).sum())(x)
        return plainly, ours, jax.grad(lambda y: (pack(p, y) * x).sum())(y), pack(p, unpack(p, x))

    plainly, ours, back, same = both(x, y)
    np.testing.assert_array_equal(ours, plainly)
    np.testing.assert_array_equal(back, np.where(real_columns, x[0][p.slots], 0))
    np.testing.assert_array_equal(same, np.where(real_places, x, 0))


def test_single_tokens_are_rows_of_their_own() -> None:
    x = np.arange(6.0).reshape(1, 3, 2)
    rows, same = quick_jit(lambda x: (unpack(single_tokens(3), x), pack(single_tokens(3), unpack(single_tokens(3), x))))(x)
    np.testing.assert_array_equal(rows, x[0][:, None])
    np.testing.assert_array_equal(same, x)


def test_attention_reads_a_cache_with_heads_first_alike() -> None:
    rng = np.random.default_rng(3)
    q, mask = rng.normal(size=(2, 3, 4, 5)), rng.random((2, 3, 7)) < 0.7
    past, new = (KV(*rng.normal(size=(2, 2, n, 2, 5))) for n in (4, 3))
    heads = HeadKV(past.k.swapaxes(1, 2), past.v.swapaxes(1, 2))
    assert heads.length == past.length == 4
    attended = quick_jit(lambda past: attend(jnp.asarray(q), (past, new), jnp.asarray(mask)))
    expected = np.asarray(attended(past))
    assert largest(np.asarray(attended(heads)), expected) < 1e-14
    assert largest(np.asarray(attended(heads._replace(v=heads.v[:, ::-1]))), expected) > 1e-2


SPREAD = """
import json, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from kedit_jax.models.packing import Packing, pack_heads, unpack_heads
mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
packing = Packing(np.arange(12).reshape(3, 4), np.arange(12), np.ones((3, 4), bool), shared=False)
spread = NamedSharding(mesh, PartitionSpec(None, None, "model"))
tokens = jax.ShapeDtypeStruct((1, 12, 6, 8), jnp.float32, sharding=spread)

def there_and_back(tokens):
    return pack_heads(packing, 2 * unpack_heads(packing, tokens))

def with_heads_as_an_index(tokens):
    return tokens[0].at[jnp.asarray(packing.slots)[:, None, :], jnp.arange(6)[None, :, None]].get()

def moved(work):
    text = jax.jit(work).lower(tokens).compile().as_text()
    return sum(text.count(kind + "(") for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))

def slope(tokens):
    return jax.grad(lambda tokens: (there_and_back(tokens) ** 2).sum())(tokens)

print(json.dumps([moved(work) for work in (there_and_back, slope, with_heads_as_an_index)]))
"""


def test_heads_that_are_spread_over_devices_stay_where_they_are() -> None:
    forced = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", SPREAD], env=os.environ | forced, capture_output=True, text=True, check=True)
    there, slope, control = json.loads(run.stdout)
    assert there == slope == 0
    assert control, "heads as an index of the gather move between devices: the test notices"
