"""The memory that is foretold against the arrays of a session."""

import dataclasses

import jax
import numpy as np
import pytest

from kedit_jax import solve
from kedit_jax.editing.budget import memory_items, total
from kedit_jax.editing.session import EditSession
from kedit_jax.editing.settings import EditSettings
from kedit_jax.models import gpt2_config
from kedit_jax.solve import host


def nbytes(tree: object) -> int:
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("facts", [3, 100, 150, 200, 300, 400, 1000])
def test_the_solvers_state(facts: int) -> None:
    """Exact until rows are multiplied out, and from there on with at most the rows beside what they went into."""
    n, v = 400, 7
    rng = np.random.default_rng(0)
    prior = solve.ridge(n, 1.0)
    sequence = host.begin(prior, v)
    for begin in range(0, facts, 50):
        rows = min(50, facts - begin)
        block = solve.Constraints(rng.normal(size=(rows, n)), rng.normal(size=(rows, v)), np.ones(rows))
        sequence, _ = host.advance(sequence, prior, block)
    slack = 0 if facts <= solve.CROSSOVER * n else host.TAIL * n * (n + v) * 8
    assert nbytes(sequence.solver) <= host.state_size(n, v, facts) <= nbytes(sequence.solver) + slack


def test_a_session(history: list[EditSession]) -> None:
    session = history[-1]
    foretold = memory_items(session.base.config, session.settings, facts=len(session.facts), batch=3)
    items = {item.what: item.size for item in foretold}
    layers = session.layers.values()
    assert items["model"] == nbytes(session.base)
    assert items["second moments"] == sum(session.moments.by_layer[n].nbytes for n in session.settings.layers)
    assert items["factors of the priors"] == sum(nbytes(editor.prior.factor) for editor in session.editors.values())
    assert items["solver's states"] == sum(nbytes(held.sequence.solver) for held in layers)
    assert items["recorded keys and targets"] == sum(nbytes(held.constraints) for held in layers)
    assert items["updates"] == sum(held.update.nbytes for held in layers)
    assert total(foretold) == total(foretold, "host") + total(foretold, "device")


def test_more_facts_take_more_until_the_state_is_primal() -> None:
    config = dataclasses.replace(gpt2_config(vocab_size=9, n_layers=2, d_model=4, n_heads=2, max_positions=8), d_ff=1000)
    sizes = [
        next(i.size for i in memory_items(config, EditSettings((0,)), facts=facts, batch=10) if i.what == "solver's states")
        for facts in (10, 500, 830, 5000, 50000)
    ]
    assert sizes[0] < sizes[1] < sizes[2]
    assert sizes[3] == sizes[4]
