"""The memory that is foretold against the arrays of a session."""

import dataclasses

import jax
import numpy as np
import pytest
from editing_world import many_requests

from kedit_jax import solve
from kedit_jax.editing import budget
from kedit_jax.editing.budget import GIB, memory_items, micro_batches, total, values_bytes, what_to_keep
from kedit_jax.editing.moments import Moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.tokens import Encoded, align, encode_requests
from kedit_jax.editing.values import ValueSettings, optimise_values
from kedit_jax.errors import KeditError
from kedit_jax.models import Biases, Keep, ModelConfig, RotaryConfig, abstract_decoder, gpt2_config
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


def test_a_session(history: list[EditSession], moments: Moments) -> None:
    session = history[-1]
    foretold = memory_items(session.base.config, session.settings, facts=len(session.facts), batch=3)
    items = {item.what: item.size for item in foretold}
    layers = session.layers.values()
    assert items["model"] == nbytes(session.base)
    needed = sum(moments.by_layer[layer].nbytes for layer in session.settings.layers)
    assert items["second moments, until their priors are factored"] == needed
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


# --- target values --------------------------------------------------------------------------------------------------

SMALL_GPT2 = gpt2_config(vocab_size=8000, n_layers=12, d_model=256, n_heads=4, max_positions=64)
GATED = ModelConfig(
    family="llama", vocab_size=8000, n_layers=12, d_model=256, n_heads=4, n_kv_heads=2, head_dim=64, d_ff=768,
    max_positions=64, norm="rms", norm_eps=1e-5, activation="silu", gated_mlp=True, biases=Biases(),
    rotary=RotaryConfig(dim=64, theta=777.0),
)  # fmt: skip
TOP = 3


@pytest.mark.parametrize(("config", "keep"), [(SMALL_GPT2, "products"), (GATED, "inputs")], ids=["gpt2", "gated"])
def test_value_optimisation_takes_at_most_what_is_foretold(config: ModelConfig, keep: Keep) -> None:
    """And at least half of it, by XLA's own count; nothing is run. Unoptimised code takes as much and compiles faster."""
    layout = align(many_requests(8, config.vocab_size))
    program = jax.jit(lambda model: optimise_values(model, layout, TOP, ValueSettings(), keep))
    found = (
        program.lower(abstract_decoder(config))
        .compile(compiler_options={"xla_backend_optimization_level": 0})
        .memory_analysis()
        .temp_size_in_bytes
    )
    assert found <= values_bytes(config, layout.sizes, TOP, keep, 4) <= 2 * found


def test_what_is_kept_and_how_much_follow_the_memory() -> None:
    requests = many_requests(24, SMALL_GPT2.vocab_size)
    layout = align(requests)
    most, least = (values_bytes(SMALL_GPT2, layout.sizes, TOP, keep, 4) for keep in ("products", "inputs"))
    assert least < most
    assert values_bytes(SMALL_GPT2, layout.sizes, TOP, "products", 8) == 2 * most
    for memory, keep in ((most, "products"), (most - 1, "inputs")):
        settings = EditSettings((TOP,), memory=memory / GIB)
        assert what_to_keep(SMALL_GPT2, settings, layout, itemsize=4) == keep


@pytest.mark.parametrize("cap", [None, 7, 50])
def test_micro_batches_stay_within_the_memory(cap: int | None) -> None:
    requests = many_requests(24, SMALL_GPT2.vocab_size)
    parts = []
    for memory in (2**30, 2**28, 2**27, 2**26, 2**25, 2**20):
        settings = EditSettings((TOP,), memory=memory / GIB, micro_batch=cap)
        layouts, places = micro_batches(SMALL_GPT2, settings, requests, itemsize=4)
        assert sorted(np.concatenate(places).tolist()) == list(range(24))
        size = layouts[0].n_requests
        assert {layout.n_requests for layout in layouts} == {size}
        assert (len(layouts) - 1) * size < 24 <= len(layouts) * size, "no part is padding alone"
        assert size <= (cap or 24)
        for layout in layouts if size > 1 else []:
            keep = what_to_keep(SMALL_GPT2, settings, layout, itemsize=4)
            assert values_bytes(SMALL_GPT2, layout.sizes, TOP, keep, 4) <= memory
        parts.append(len(layouts))
    assert parts == sorted(parts)
    assert parts[0] == (4 if cap == 7 else 1)
    assert parts[-1] == 24, "one request is taken as it is"
    assert len(set(parts)) > 2, "the memory hardly matters: the test shows nothing"


def test_parts_hold_as_many_tokens_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are computed at the size of the largest, and those that are one request short are padded with their first one."""
    requests, settings = many_requests(100, SMALL_GPT2.vocab_size), EditSettings((TOP,), micro_batch=15)

    def spread() -> float:
        layouts, places = micro_batches(SMALL_GPT2, settings, requests, itemsize=4)
        assert sorted(map(len, places)) == [14] * 5 + [15] * 2
        used = [layout.packed.after.packing.used.sum() for layout in layouts]
        return (max(used) - min(used)) / np.mean(used)

    even = spread()
    assert even <= 0.02
    monkeypatch.setattr(budget, "_dealt", lambda requests, count: np.array_split(np.arange(len(requests)), count))
    assert spread() > 3 * even


def test_little_memory_means_small_micro_batches(fresh: EditSession, batches: list[list[EditRequest]]) -> None:
    """What `micro_batch` cuts, memory cuts alike; `test_session_reference` holds that cutting changes no edit."""
    parts = {}
    for size in (1, 2):
        capped, _ = micro_batches(
            fresh.base.config, dataclasses.replace(fresh.settings, micro_batch=size), _rows(fresh, batches[0]), itemsize=4
        )
        top = fresh.settings.layers[-1]
        needed = max(values_bytes(fresh.base.config, layout.sizes, top, "inputs", 4) for layout in capped)
        little = dataclasses.replace(fresh, settings=dataclasses.replace(fresh.settings, memory=needed / GIB))
        parts[size] = little._micro_batches(batches[0]).layouts
        for mine, theirs in zip(jax.tree.leaves(parts[size]), jax.tree.leaves(capped), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert [len(parts[1]), len(parts[2]), len(fresh._micro_batches(batches[0]).layouts)] == [3, 2, 1]


def _rows(session: EditSession, requests: list[EditRequest]) -> list[list[Encoded]]:
    return encode_requests(session.tokenizer, requests, session.prefixes, max_positions=64)


def test_another_dtype_to_compute_in(
    fresh: EditSession, history: list[EditSession], batches: list[list[EditRequest]]
) -> None:
    narrow = dataclasses.replace(fresh, settings=dataclasses.replace(fresh.settings, compute_dtype="bfloat16"))
    found, _ = narrow.edit(batches[0])
    assert found.reports is not None
    assert history[1].reports is not None
    z, exact = np.asarray(found.reports.z), np.asarray(history[1].reports.z)
    assert z.dtype == exact.dtype == np.float32
    error = np.linalg.norm(z - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert (error < 2e-2).all()
    assert (error > 1e-5).any(), "nothing was computed in bfloat16"
    with pytest.raises(KeditError, match="compute_dtype 'float8' is none; there are bfloat16, float16, float32, float64"):
        dataclasses.replace(fresh.settings, compute_dtype="float8")
