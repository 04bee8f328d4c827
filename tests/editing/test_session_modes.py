"""A session under every editor, mode and post-processor: the same procedure, other priors and other steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kedit_jax import solve
from kedit_jax.editing.moments import Moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, equivalence_error, relative_error
from kedit_jax.editing.settings import USES, EditSettings
from kedit_jax.errors import KeditError, SessionError

Another = Callable[..., EditSession]
Batches = list[list[EditRequest]]


def test_every_editor_can_be_named() -> None:
    assert set(USES) == set(solve.EDITORS)


@pytest.mark.parametrize("editor", solve.EDITORS)
def test_every_editor_is_its_own_one_time_edit(
    editor: str, fresh: EditSession, batches: Batches, moments: Moments, another: Another
) -> None:
    """Batches 1 and 3: no conflicts, which equality constraints could not meet."""
    session = another(fresh, editor=editor, ridge=0.5, null_threshold=1e-3)
    for batch in (batches[0], batches[2]):
        session, _ = session.edit(batch)
    assert equivalence_error(session) < 1e-10
    layer = session.layers[0]
    kernel = session.site(0).kernel
    values = layer.constraints.residuals + np.asarray(layer.constraints.keys, np.float64) @ kernel
    made = solve.EDITORS[editor](
        moments.by_layer[0], **{name: getattr(session.settings, own) for name, own in USES[editor].items()}
    )
    with solve.float64():
        stack = made.constraints(kernel, layer.constraints.keys, values)
        expected = np.asarray(solve.one_time(made.prior, stack).update)
    assert np.linalg.norm(layer.update - expected) < 1e-9 * np.linalg.norm(expected)


def test_null_space_rules_reach_the_prior(fresh: EditSession, moments: Moments, another: Another) -> None:
    by_rank = another(fresh, editor="alphaedit", null_threshold=None, null_rank=20)
    assert by_rank.editors[0].prior.rank == 20
    share = another(fresh, editor="alphaedit", null_threshold=None, null_relative=1e-3)
    eigenvalues = np.linalg.eigvalsh(moments.by_layer[0])
    assert share.editors[0].prior.rank == int((eigenvalues < 1e-3 * eigenvalues[-1]).sum())


def test_weights_of_facts_reach_the_constraints(fresh: EditSession, batches: Batches) -> None:
    heavy = [dataclasses.replace(batches[0][0], weight=4.0), *batches[0][1:]]
    session, _ = fresh.edit(heavy)
    np.testing.assert_allclose(session.layers[0].constraints.noise, [0.25, 1, 1])
    plain, _ = fresh.edit(batches[0])
    misfit = [
        np.linalg.norm(h.constraints.residuals[0] - np.asarray(h.constraints.keys[0], np.float64) @ h.update)
        for h in (session.layers[0], plain.layers[0])
    ]
    assert misfit[0] < misfit[1], "more weight, closer fit"


class TestLatest:
    def test_the_last_batch_alone_stands(self, fresh: EditSession, batches: Batches, another: Another) -> None:
        session = another(fresh, history="latest", conflicts=None)
        for batch in (batches[0], batches[2]):
            session, _ = session.edit(batch)
        assert [fact.target for fact in session.facts] == [request.target for request in batches[2]]
        assert equivalence_error(session) < 1e-10
        with pytest.raises(SessionError, match="history 'latest'"):
            session.retract([str(session.facts[0].id)])

    def test_simplified_drifts(self, fresh: EditSession, batches: Batches, another: Another) -> None:
        session = another(fresh, history="latest-simplified", conflicts=None)
        for batch in (batches[0], batches[2]):
            session, _ = session.edit(batch)
        assert equivalence_error(session) > 1e-2


class TestPost:
    def test_compensated_steps_leave_the_last_error_alone(
        self, fresh: EditSession, batches: Batches, another: Another
    ) -> None:
        """Algorithm 1: D - D* is what the last step's post-processing did."""
        errors = {}
        for compensate in (True, False):
            session = another(fresh, post="rect:0.5", compensate=compensate)
            for batch in batches:
                before = session
                session, _ = session.edit(batch)
            assert relative_error(session.delta, session.replayed()) < 1e-11
            gaps = []
            for layer, held in session.layers.items():
                exact = session.one_time()[f"layers.mlp.down.kernel[{layer}]"].dense()
                earlier = before.layers[layer].update
                raw = exact - earlier
                post = solve.postprocess.Rect(0.5)
                with solve.float64():
                    applied = np.asarray(post(raw, session.site(layer).kernel + earlier))
                gaps.append(np.linalg.norm(held.update - exact - (applied - raw)) / np.linalg.norm(exact))
            errors[compensate] = max(gaps)
        assert errors[True] < 1e-10
        assert errors[False] > 1e-2

    def test_a_retracted_fact_leaves_no_trace(self, fresh: EditSession, batches: Batches, another: Another) -> None:
        session = another(fresh, post="prune")
        whole, _ = session.edit(batches[0])
        whole, _ = whole.edit(batches[2])
        fewer, _ = whole.retract([str(fact.id) for fact in whole.facts[3:]])
        once, _ = session.edit(batches[0])
        assert relative_error(fewer.delta, once.delta) == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"post": "blur"}, "post-processor 'blur' is unknown: one of prune, rect"),
        ({"post": "rect:2"}, "'rect:2': share must be in"),
        ({"post": "clip"}, "'clip' is incomplete or says too much: write clip:LIMIT"),
        ({"post": "clip:far"}, "'far' is no float"),
        ({"post": "prune:1"}, "'prune:1' is incomplete or says too much"),
        ({"post": "prune", "history": "unaligned"}, "set compensate=False"),
        ({"conflicts": "newest"}, "'newest' is no policy"),
        ({"conflicts": "latest", "history": "unaligned"}, "needs history 'aligned'"),
        ({"similarity": 1.5}, "a cosine threshold lies in"),
        ({"null_threshold": 0.1, "null_rank": 3}, "null_threshold and null_rank are given"),
        ({"null_rank": 0}, "null_rank is 0; it must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KeditError) as caught:
        EditSettings(layers=(0,), **changes)
    assert words in str(caught.value)


def test_settings_without_weights_of_their_own_take_the_editors_noise() -> None:
    moment = np.diag(np.arange(1.0, 5.0))
    assert EditSettings(layers=(0,), editor="emmet").build(moment).noise == 0
    assert EditSettings(layers=(0,), editor="emmet", noise=0.3).build(moment).noise == 0.3
    assert EditSettings(layers=(0,)).build(moment).noise == 1
