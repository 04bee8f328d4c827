"""A step that breaks a bound is not kept: the session before it stands, says why, and goes on."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedit_jax.checkpoint import load_session, save_session
from kedit_jax.editing.algebra import undo
from kedit_jax.editing.guard import Probe, edit_guarded, finite, relative_norm
from kedit_jax.editing.moments import Moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import KeditError, NonFiniteError
from kedit_jax.evaluation import retention_probe, text_probe

Batches = list[list[EditRequest]]


def same(one: EditSession, other: EditSession) -> bool:
    return all(np.array_equal(one.layers[layer].update, other.layers[layer].update) for layer in one.layers)


def test_a_step_within_bounds_is_the_plain_edit(history: list[EditSession], batches: Batches, texts: list[str]) -> None:
    probes = [finite(), relative_norm(1e3), retention_probe(0.0), text_probe(history[1], texts[:3], 1e6)]
    after, delta, breaches = edit_guarded(history[1], [batches[1]], probes)
    assert breaches == ()
    assert same(after, history[2])
    assert after.events == history[2].events
    address, update = next(iter(delta.updates.items()))
    assert np.asarray(update.dense()).any(), address


@pytest.mark.parametrize("what", ["norm", "retention", "perplexity", "nan", "raised"])
def test_a_step_out_of_bounds_is_rolled_back(
    history: list[EditSession], batches: Batches, texts: list[str], moments: Moments, tmp_path: Path, what: str
) -> None:
    """The negative control is the same step without a guard, which is kept, and which the probe objects to."""

    def raise_it(_: EditSession) -> float:
        raise NonFiniteError("text 1 has no finite score")

    before = history[1]
    probe = {
        "norm": lambda: relative_norm(1e-6),
        "retention": lambda: retention_probe(1.0),
        "perplexity": lambda: dataclasses.replace(text_probe(before, texts[:3], 1.0), at_most=0.5),
        "nan": lambda: Probe("a number", lambda _: math.nan),
        "raised": lambda: Probe("perplexity", raise_it),
    }[what]()
    kept, delta, breaches = edit_guarded(before, [batches[1]], [finite(), probe])
    assert len(breaches) == 1
    assert probe.name in breaches[0]
    assert probe.breach(history[2]) is not None, "without a guard the step is kept, bad as it is"
    assert same(kept, before)
    assert not delta.updates
    event = kept.events[-1]
    assert (event.kind, event.ids, event.skipped, event.reason) == (
        "rollback",
        (),
        ("fact-4", "fact-5", "fact-6"),
        breaches[0],
    )
    assert [fact.id for fact in kept.skipped] == list(event.skipped)
    # The session is as usable as the one before: stored, loaded, edited, undone.
    save_session(before, tmp_path)
    save_session(kept, tmp_path)
    loaded = load_session(tmp_path, before.base, before.tokenizer, moments)
    assert loaded.events == kept.events
    on, _ = loaded.edit(batches[2])
    assert same(on, before.edit(batches[2])[0])
    assert [event.undoes for event in undo(undo(on)[0])[0].events[-2:]] == [3, 1], "there is nothing to undo in a rollback"


def test_several_steps_stay_or_go_together(history: list[EditSession], batches: Batches) -> None:
    after, _, _ = edit_guarded(history[0], batches[:2], [finite()])
    assert same(after, history[2])
    assert after.events == history[2].events
    kept, _, _ = edit_guarded(history[0], batches[:2], [relative_norm(1e-6)])
    assert same(kept, history[0])
    assert len(kept.events[-1].skipped) == 6


def test_values_that_are_not_finite_are_a_breach(
    history: list[EditSession], batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NonFiniteError("target values are not finite for fact-4")

    with monkeypatch.context() as patch:
        patch.setattr(EditSession, "_values", fail)
        with pytest.raises(NonFiniteError):
            history[1].edit(batches[1])
        kept, _, breaches = edit_guarded(history[1], [batches[1]], [finite()])
    assert breaches == ("target values are not finite for fact-4",)
    assert same(kept, history[1])
    layer, held = next(iter(history[1].layers.items()))
    update = held.update.copy()
    update[0, 0] = math.inf
    broken = dataclasses.replace(held, sequence=dataclasses.replace(held.sequence, update=update))
    found = finite().breach(dataclasses.replace(history[1], layers={**history[1].layers, layer: broken}))
    assert found == "values of the update that are not finite is 1, and must be at most 0"
    assert finite().breach(history[1]) is None


def test_bounds_that_make_no_sense(history: list[EditSession], texts: list[str]) -> None:
    with pytest.raises(KeditError, match=r"above 0, not -1\.0"):
        relative_norm(-1.0)
    with pytest.raises(KeditError, match=r"is 1\.5; give a number from 0 to 1"):
        retention_probe(1.5)
    with pytest.raises(KeditError, match=r"not 0\.5"):
        text_probe(history[0], texts, 0.5)
