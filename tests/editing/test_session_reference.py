"""A float64 session against the procedure written out plainly: whole-model passes, one prompt at a time, dense solves."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from editing_reference import PlainSession, largest_error
from editing_world import BATCHES

from kedit_jax.delta import EditDelta
from kedit_jax.editing.moments import compute_moments
from kedit_jax.editing.session import EditSession, equivalence_error, start_session
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.values import ValueSettings
from kedit_jax.models import Decoder, down_kernel_address, named_parameters

LAYERS = (0, 1, 2)
PREFIXES = ("The old house of Rome stands. ", "New people in Oslo like. ")
SETTINGS = EditSettings(
    layers=LAYERS,
    moment_weight=3.0,
    ridge=0.1,
    noise=0.5,
    values=ValueSettings(steps=7, learning_rate=0.5, clamp=0.4, kl_factor=1.5, decay=2.0),
    prefixes=0,
    conflicts="keep",
    micro_batch=2,  # of batches of three: the second micro-batch is padded
)


@dataclasses.dataclass(frozen=True)
class Edited:
    """Two batches, by the session and plainly."""

    sessions: list[EditSession]
    steps: list[EditDelta]
    plain: PlainSession
    plain_values: list[np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def wide() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def edited(wide: None, wide_model: Decoder, tokenizer: Any, texts: list[str]) -> Edited:
    moments = compute_moments(wide_model, tokenizer, texts, LAYERS, row_tokens=32, batch_tokens=512)
    start = dataclasses.replace(start_session(wide_model, tokenizer, moments, SETTINGS), prefixes=PREFIXES)
    plain = PlainSession(wide_model, tokenizer, PREFIXES, SETTINGS, dict(moments.by_layer))
    sessions, steps, values = [start], [], []
    for batch in BATCHES[:2]:  # the second contradicts the first
        session, step = sessions[-1].edit(batch)
        sessions.append(session)
        steps.append(step)
        values.append(plain.edit(batch))
    return Edited(sessions, steps, plain, values)


def dense(step: EditDelta, layer: int) -> np.ndarray:
    return np.asarray(step[down_kernel_address(layer)].dense())


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("batch", [0, 1])
def test_target_values_equal_those_of_the_plain_procedure(edited: Edited, batch: int) -> None:
    """The second batch's also, on the model that the first has edited."""
    reports = edited.sessions[batch + 1].reports
    assert reports is not None
    assert largest_error(reports.z, edited.plain_values[batch]) < 1e-8  # 1e-5 is promised


@pytest.mark.parametrize("layer", LAYERS)
def test_keys_and_steps_equal_those_of_the_plain_procedure(edited: Edited, layer: int) -> None:
    history = edited.sessions[-1].layers[layer]
    assert relative(history.constraints.keys, edited.plain.keys[layer]) < 1e-8
    for batch in range(2):
        assert relative(dense(edited.steps[batch], layer), edited.plain.steps[batch][layer]) < 1e-7
    total = edited.plain.steps[0][layer] + edited.plain.steps[1][layer]
    assert relative(history.update, total) < 1e-7


def test_the_models_are_the_same(edited: Edited, wide_model: Decoder) -> None:
    ours, plain = (named_parameters(m) for m in (edited.sessions[-1].model, edited.plain.model))
    for name, original in named_parameters(wide_model).items():
        if name != "layers.mlp.down.kernel":
            np.testing.assert_array_equal(ours[name], original)
            continue
        moved = np.asarray(plain[name]) - np.asarray(original)
        assert relative(np.asarray(ours[name]) - np.asarray(original), moved) < 1e-7
        assert not moved[3].any()


def test_the_second_batch_contradicts_the_first(edited: Edited) -> None:
    """So that an error in the history would show: the step without it is another one."""
    plain, layer = edited.plain, LAYERS[0]
    new = plain.keys[layer][3:]
    alone = SETTINGS.moment_weight * plain.moments[layer] + SETTINGS.ridge * np.eye(24) + new.T @ new / SETTINGS.noise
    old = plain.keys[layer][:3]
    with_history = (alone + old.T @ old / SETTINGS.noise) @ plain.steps[1][layer]
    assert relative(np.linalg.solve(alone, with_history), plain.steps[1][layer]) > 1e-2


@pytest.mark.parametrize("layer", LAYERS)
def test_a_step_has_at_most_the_rank_of_its_batch(edited: Edited, layer: int) -> None:
    for step in edited.steps:
        singular = np.linalg.svd(dense(step, layer), compute_uv=False)
        assert singular[3] < 1e-12 * singular[0]
        assert singular[2] > 1e-9 * singular[0]


def test_the_comparison_has_something_to_compare(edited: Edited) -> None:
    for session in edited.sessions[1:]:
        assert session.reports is not None
        assert (session.reports.moved > 0.02).all()
        assert (session.reports.nll < session.reports.nll_before).any()


def test_sequential_equals_one_time(edited: Edited) -> None:
    assert equivalence_error(edited.sessions[-1]) < 1e-12  # 1e-10 is promised
    assert equivalence_error(edited.sessions[0]) == 0


def test_retraction_equals_a_plain_fit_of_what_stays(edited: Edited) -> None:
    """Normal equations in NumPy on the stored constraints, facts 1, 3 and 5 (of 0 to 5) left out."""
    session = edited.sessions[-1]
    gone = [session.facts[i].id for i in (1, 3, 5)]
    after, _ = session.retract(gone)
    stay = [0, 2, 4]
    for layer in LAYERS:
        constraints = session.layers[layer].constraints
        keys, residuals = constraints.keys[stay], constraints.residuals[stay]
        precision = SETTINGS.moment_weight * edited.plain.moments[layer] + SETTINGS.ridge * np.eye(24)
        fit = np.linalg.solve(precision + keys.T @ keys / SETTINGS.noise, keys.T @ residuals / SETTINGS.noise)
        assert relative(after.layers[layer].update, fit) < 1e-10
        assert relative(session.layers[layer].update, fit) > 1e-2
