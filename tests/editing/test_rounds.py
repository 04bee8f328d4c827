"""Values in rounds: requests that go on in a smaller batch come out as in one program, and few programs are needed."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from editing_reference import largest_error
from editing_world import PEOPLE

from kedit_jax.editing import values as module
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.tokens import Encoded, align, encode_requests
from kedit_jax.editing.values import FEW, SHARE, Values, ValueSettings, optimise_in_rounds
from kedit_jax.models import Decoder

LAYER = 2
PREFIXES = ("New people. ",)
PROMPTS = ("{} was born in", "The house of {} stands in", "{} likes", "{} plays", "In {}, people speak")
REQUESTS = [EditRequest(prompt, person, "old Lima") for person in PEOPLE for prompt in PROMPTS]

# Losses begin between 6.27 and 6.66 and fall by about 0.1: the requests end one after another.
SETTINGS = ValueSettings(steps=9, learning_rate=0.1, clamp=3.0, kl_factor=0.01, decay=0.0, stop_loss=6.5)

QUICK = jax.jit(
    module._advance, static_argnames=("layer", "settings", "keep", "dtype", "leave"),
    compiler_options={"xla_backend_optimization_level": 0},
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[list[Encoded]]:
    assert len(REQUESTS) > FEW
    return encode_requests(tokenizer, REQUESTS, PREFIXES, max_positions=64)


@pytest.fixture(scope="module")
def whole(wide_model: Decoder, rows: list[list[Encoded]], wide: None) -> Values:
    return QUICK(wide_model, align(rows), None, LAYER, SETTINGS, "products", None, 0)[0]


def test_rounds_change_nothing(
    wide_model: Decoder, rows: list[list[Encoded]], whole: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def counted(model: Decoder, layout: Any, *others: Any) -> Any:
        sizes.append(layout.n_requests)
        return QUICK(model, layout, *others)

    monkeypatch.setattr(module, "_advanced", counted)
    (found,) = optimise_in_rounds(wide_model, [rows], [align(rows)], LAYER, SETTINGS)
    assert sizes == [len(REQUESTS), -(-len(REQUESTS) // SHARE)], "the last ones went on by themselves"
    assert len(set(np.asarray(whole.updates).tolist())) > 2
    assert found.updates.tolist() == whole.updates.tolist()
    assert largest_error(found.z, whole.z) < 1e-10
    for mine, theirs in zip(found[1:], whole[1:], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)


def test_negative_control_a_round_that_begins_anew_is_noticed(
    wide_model: Decoder, rows: list[list[Encoded]], whole: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = module._Progress.of

    def forgetful(state: Any, places: Any) -> Any:
        kept = honest(state, places)
        return kept._replace(adam=jax.tree.map(np.zeros_like, kept.adam))

    monkeypatch.setattr(module._Progress, "of", forgetful)
    monkeypatch.setattr(module, "_advanced", QUICK)
    (found,) = optimise_in_rounds(wide_model, [rows], [align(rows)], LAYER, SETTINGS)
    assert largest_error(found.z, whole.z) > 1e-4


def test_sizes_are_used_once_more(rows: list[list[Encoded]]) -> None:
    """A batch that fits into an earlier one's arrays needs no program of its own; one that does not grows what it must."""
    first = align(rows[:5])
    assert align(rows[5:10], held=first.sizes).sizes == first.sizes
    larger = first.sizes._replace(after=first.sizes.after + 8, whole=first.sizes.whole + 8)
    assert align(rows[:5], held=larger).sizes == larger
    small = first.sizes._replace(after=1)
    assert align(rows[:5], held=small).sizes == first.sizes
