"""Key drift: none in the first edited layer, some above it once lower layers change, and what it is measured against."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kedit_jax.editing.algebra import compact
from kedit_jax.editing.drift import key_drift
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import SessionError
from kedit_jax.models import causal_mask, positions_of

ROUNDING = 1e-5  # of keys read in float32 in another micro-batch


def test_the_first_layer_never_drifts_and_upper_ones_do(history: list[EditSession]) -> None:
    found = key_drift(history[-1])
    assert set(found) == {0, 2}
    assert found[0].largest < ROUNDING
    assert found[2].largest > 1e-3
    assert found[2].mean <= found[2].largest
    assert found[2].ids == tuple(str(fact.id) for fact in history[-1].facts)
    assert (found[2].cosine < 1).all()
    np.testing.assert_allclose(found[0].cosine, 1, atol=ROUNDING)


def test_a_single_batch_has_not_drifted_yet(history: list[EditSession]) -> None:
    """Its upper keys were read after its lower layers were written."""
    assert all(layer.largest < ROUNDING for layer in key_drift(history[1]).values())


def test_negative_control_other_recorded_keys_show(history: list[EditSession]) -> None:
    session = history[1]
    held = session.layers[0]
    moved = dataclasses.replace(held.constraints, keys=held.constraints.keys * np.float32(1.1))
    wrong = dataclasses.replace(session, layers=dict(session.layers) | {0: dataclasses.replace(held, constraints=moved)})
    assert key_drift(wrong)[0].mean == pytest.approx(0.1 / 1.1, rel=1e-4)


def test_without_recorded_keys_there_is_no_drift(fresh: EditSession, history: list[EditSession]) -> None:
    with pytest.raises(SessionError, match="records no keys"):
        key_drift(fresh)
    with pytest.raises(SessionError, match="records no keys"):
        key_drift(compact(history[1]))


def test_drift_equals_keys_of_the_whole_model(history: list[EditSession], fresh: EditSession) -> None:
    """The bare prompt alone, so that one plain pass of the edited model shows the key."""
    bare: Any = dataclasses.replace(fresh, prefixes=())
    for session in history[1:3]:
        bare, _ = bare.edit([dataclasses.replace(f, id=None) for f in session.facts[-3:]])
    found = key_drift(bare)
    for number, fact in enumerate(bare.facts):
        text = fact.text[: fact.text.index(fact.subject) + len(fact.subject)]
        tokens = np.array([bare.tokenizer(text)["input_ids"]])
        valid = np.ones(tokens.shape, bool)
        with jax.enable_x64(False):
            positions, mask = positions_of(jnp.asarray(valid)), causal_mask(jnp.asarray(valid))
            h = bare.model.embed(jnp.asarray(tokens), positions)
            _, keys = bare.model.run_layers(h, 0, 3, positions=positions, mask=mask)
        recorded = bare.layers[2].constraints.keys[number]
        expected = np.linalg.norm(np.asarray(keys)[2, 0, -1] - recorded) / np.linalg.norm(recorded)
        assert found[2].relative[number] == pytest.approx(expected, abs=ROUNDING)
