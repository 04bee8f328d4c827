"""Sessions: sequential equals one-time, nothing changes in place, the same seed gives the same bits, facts go back."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kedit_jax import solve
from kedit_jax.delta import Dense, EditDelta, LowRank, apply_edits
from kedit_jax.editing import history as histories
from kedit_jax.editing.moments import Moments
from kedit_jax.editing.presets import PUBLISHED
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, equivalence_error, relative_error, start_session
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.tokens import lay_out
from kedit_jax.editing.values import ValueSettings
from kedit_jax.errors import KeditError, NonFiniteError, RequestError, SessionError, SolverError
from kedit_jax.models import Decoder, down_kernel_address, named_parameters, with_parameters

Another = Callable[..., EditSession]
Batches = Sequence[Sequence[EditRequest]]


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def numbers(session: EditSession) -> list[bytes]:
    """Every number of a session, as bytes."""
    histories = [(h.constraints, h.sequence) for h in session.layers.values()]
    return bits((session.base, session.model, histories, session.delta, session.reports))


def edit_all(session: EditSession, batches: Batches) -> EditSession:
    for batch in batches:
        session, _ = session.edit(batch)
    return session


# --- one edit after another -----------------------------------------------------------------------------------------


def test_all_batches_share_one_layout(fresh: EditSession, batches: Batches) -> None:
    """What keeps these tests fast: one layout, one compilation."""
    shapes = set()
    for batch in batches:
        layout = lay_out(fresh.tokenizer, batch, fresh.prefixes, max_positions=64)
        shapes.add((layout.tokens.shape, layout.targets.shape, layout.n_prefix))
    assert len(shapes) == 1


def test_the_sequence_equals_the_one_time_edit(history: list[EditSession]) -> None:
    solver = history[-1].layers[0].sequence.solver
    assert isinstance(solver, solve.HostState)
    assert solver.base is None, "the small float64 model covers the primal form"
    assert equivalence_error(history[-1]) < 1e-10
    assert equivalence_error(history[-1], "float32") < 1e-5
    assert equivalence_error(history[0]) == 0


def test_fresh_fits_of_histories_of_any_length_share_a_handful_of_programs(
    history: list[EditSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is asked for after every step would otherwise compile each time, and keep the program."""
    session, sizes = history[-1], set()
    site, held = session.site(0), session.layers[0]
    exact = solve.one_time

    def watched(prior: solve.Prior, constraints: solve.Constraints, **how: Any) -> solve.Solution:
        sizes.add(constraints.size)
        return exact(prior, constraints, **how)

    monkeypatch.setattr(histories.solve, "one_time", watched)
    with solve.float64():
        for count in (1, 5, 12):
            some = solve.take(held.constraints, np.arange(count))
            found = histories.one_time(dataclasses.replace(held, constraints=some), site)
            alone = np.asarray(exact(site.prior, some).update)
            assert np.linalg.norm(found - alone) <= 1e-13 * np.linalg.norm(alone)
    assert sizes == {histories.LEAST}
    rows = {histories._few_sizes(solve.take(held.constraints, np.zeros(n, int))).size for n in range(1, 513)}
    assert len(rows) <= 1 + 3 * histories.STEPS


def test_negative_control_an_unaligned_sequence_is_another_edit(
    fresh: EditSession, batches: Batches, another: Another
) -> None:
    unaligned = edit_all(another(fresh, history="unaligned"), batches)
    assert equivalence_error(unaligned) > 1e-2
    with pytest.raises(SessionError, match="cannot retract"):
        unaligned.retract([str(unaligned.facts[0].id)])


def test_the_first_batch_is_the_same_with_and_without_history(
    fresh: EditSession, history: list[EditSession], batches: Batches, another: Another
) -> None:
    unaligned, _ = another(fresh, history="unaligned").edit(batches[0])
    assert relative_error(unaligned.delta, history[1].delta) < 1e-11


def test_the_delta_takes_the_base_to_the_model(history: list[EditSession], model: Decoder) -> None:
    session = history[-1]
    assert bits(apply_edits(model, session.delta)) == bits(session.model)
    jitted = jax.jit(apply_edits)(model, session.delta)
    for mine, theirs in zip(jax.tree.leaves(jitted), jax.tree.leaves(session.model), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)
    assert history[0].delta.addresses == ()
    assert set(session.delta.addresses) == {down_kernel_address(0), down_kernel_address(2)}


def test_steps_are_low_rank_and_sum_to_the_delta(fresh: EditSession, history: list[EditSession], batches: Batches) -> None:
    session, total = fresh, EditDelta({})
    for batch, expected in zip(batches[:2], history[1:], strict=False):
        before = session
        session, step = session.edit(batch)
        assert all(isinstance(step[address], LowRank) for address in step.addresses)
        assert all(step[address].left.shape[1] == len(batch) for address in step.addresses)
        total = total + step
        assert bits(session.model) == bits(expected.model), "the same as in the fixture, bit for bit"
        for mine, theirs in zip(
            jax.tree.leaves(apply_edits(before.model, step)), jax.tree.leaves(session.model), strict=True
        ):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert relative_error(total, session.delta) < 1e-14


def test_edits_do_what_they_are_for(history: list[EditSession]) -> None:
    """Values move, within the clamp, and of the model the edited kernels alone."""
    session = history[1]
    assert session.reports is not None
    assert session.reports.updates.tolist() == [5, 5, 5], "n steps make n - 1 updates"
    assert (session.reports.moved > 0.01).all()
    assert (session.reports.moved <= 0.75 + 1e-6).all()
    assert bits(session.model) != bits(history[0].model)
    untouched = named_parameters(session.base)
    for name, leaf in named_parameters(session.model).items():
        if name != "layers.mlp.down.kernel":
            np.testing.assert_array_equal(leaf, untouched[name])
        else:
            np.testing.assert_array_equal(leaf[jnp.array([1, 3])], untouched[name][jnp.array([1, 3])])


def test_old_sessions_stay_as_they_were(fresh: EditSession, batches: Batches, model: Decoder) -> None:
    original = bits(model)
    first, _ = fresh.edit(batches[0])
    seen = [numbers(session) for session in (fresh, first)]
    second, _ = first.edit(batches[1])
    third, _ = second.retract([str(first.facts[0].id)])
    first.edit(batches[3])
    third.edit(batches[2])
    assert [numbers(session) for session in (fresh, first)] == seen
    assert bits(model) == original
    assert first.base is model
    assert (len(fresh.facts), len(first.facts), len(second.facts), len(third.facts)) == (0, 3, 6, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.facts = ()  # type: ignore[misc]


def test_the_same_seed_gives_the_same_bits(
    model: Decoder, tokenizer: Any, moments: Moments, settings: EditSettings, batches: Batches, history: list[EditSession]
) -> None:
    again = edit_all(start_session(model, tokenizer, moments, settings), batches)
    assert again.prefixes == history[-1].prefixes
    assert again.facts == history[-1].facts
    assert numbers(again) == numbers(history[-1])
    other = start_session(model, tokenizer, moments, dataclasses.replace(settings, seed=4))
    assert other.prefixes != again.prefixes


# --- other editors --------------------------------------------------------------------------------------------------


def test_alphaedit_stays_in_the_null_space(fresh: EditSession, batches: Batches, moments: Moments, another: Another) -> None:
    session = edit_all(another(fresh, editor="alphaedit"), batches)
    assert equivalence_error(session) < 1e-10
    for layer, history in session.layers.items():
        values, vectors = np.linalg.eigh(moments.by_layer[layer])
        null = vectors[:, values < session.settings.null_threshold]
        assert 0 < null.shape[1] < len(vectors)
        outside = history.update - null @ (null.T @ history.update)
        assert np.linalg.norm(outside) < 1e-12 * np.linalg.norm(history.update)


def test_noise_zero_asks_for_equality(fresh: EditSession, batches: Batches, another: Another) -> None:
    session, _ = another(fresh, noise=0.0).edit(batches[0])
    for history in session.layers.values():
        kept = history.constraints.keys @ history.update
        assert np.abs(kept - history.constraints.residuals).max() < 1e-9 * np.abs(history.constraints.residuals).max()
    assert equivalence_error(session) < 1e-9


def test_plain_ridge_needs_no_moments_to_be_regular(fresh: EditSession, batches: Batches, another: Another) -> None:
    session = edit_all(another(fresh, editor="ridge", ridge=0.5), batches[:2])
    for history in session.layers.values():
        keys, residuals = np.asarray(history.constraints.keys, np.float64), history.constraints.residuals
        fit = np.linalg.solve(keys.T @ keys + 0.5 * np.eye(160), keys.T @ residuals)
        assert np.linalg.norm(history.update - fit) < 1e-11 * np.linalg.norm(fit)


# --- taking facts back ----------------------------------------------------------------------------------------------


def test_retraction_equals_a_fresh_fit_of_what_stays(history: list[EditSession], moments: Moments) -> None:
    session = history[-1]
    gone = np.random.default_rng(5).permutation(12)[:5]
    after, step = session.retract([str(session.facts[i].id) for i in gone])
    stay = np.setdiff1d(np.arange(12), gone)
    assert after.facts == tuple(session.facts[i] for i in stay)
    assert sum(after.batches) == 7
    for layer, now in after.layers.items():
        constraints = session.layers[layer].constraints
        kept = solve.Constraints(constraints.keys[stay], constraints.residuals[stay], constraints.noise[stay])
        prior = solve.memit(moments.by_layer[layer], session.settings.moment_weight, session.settings.ridge)
        fresh_fit = np.asarray(solve.one_time(prior, kept).update)
        assert np.linalg.norm(now.update - fresh_fit) < 1e-11 * np.linalg.norm(fresh_fit)
        assert np.linalg.norm(session.layers[layer].update - fresh_fit) > 1e-2 * np.linalg.norm(fresh_fit)
    assert equivalence_error(after) < 1e-11
    assert relative_error(session.delta + step, after.delta) < 1e-12
    assert bits(apply_edits(session.base, after.delta)) == bits(after.model)


def test_retraction_in_parts_equals_retraction_at_once(history: list[EditSession]) -> None:
    ids = [str(history[-1].facts[i].id) for i in (1, 4, 10)]
    at_once, _ = history[-1].retract(ids)
    in_parts = history[-1]
    for one in ids[::-1]:
        in_parts, _ = in_parts.retract([one])
    assert numbers(in_parts) == numbers(at_once)


def test_retracting_everything_gives_the_original_bits(history: list[EditSession], model: Decoder) -> None:
    session = history[-1]
    empty, step = session.retract([str(fact.id) for fact in session.facts])
    assert bits(empty.model) == bits(model)
    assert empty.delta.addresses == ()
    assert empty.facts == empty.batches == ()
    assert relative_error(step.scaled(-1.0), session.delta) == 0
    assert all(not history.update.any() for history in empty.layers.values())
    assert [event.kind for event in empty.events] == ["edit"] * 4 + ["retract"]


def test_an_emptied_session_goes_on_like_a_new_one(history: list[EditSession], batches: Batches) -> None:
    empty, _ = history[2].retract([str(fact.id) for fact in history[2].facts])
    again, _ = empty.edit(batches[0])
    assert bits(again.model) == bits(history[1].model)
    assert [fact.id for fact in again.facts] == ["fact-7", "fact-8", "fact-9"], "ids are never used twice"


def test_what_cannot_be_retracted_is_named(history: list[EditSession]) -> None:
    with pytest.raises(SessionError, match=r"nobody, nothing: not among the session's 12 facts"):
        history[-1].retract(["nothing", str(history[-1].facts[0].id), "nobody"])
    with pytest.raises(SessionError, match="none given"):
        history[-1].retract([])
    with pytest.raises(SessionError, match="fact-1: not among the session's 0 facts"):
        history[0].retract(["fact-1"])


# --- ids, progress --------------------------------------------------------------------------------------------------


def test_facts_without_an_id_get_one_that_is_free(fresh: EditSession, batches: Batches) -> None:
    one, two, three = batches[0]
    named = [dataclasses.replace(one, id="fact-2"), two, dataclasses.replace(three, id="mine")]
    session, _ = fresh.edit(named)
    assert [fact.id for fact in session.facts] == ["fact-2", "fact-3", "mine"]
    session, _ = session.edit([one, dataclasses.replace(two, id="fact-5"), three])
    assert [fact.id for fact in session.facts][3:] == ["fact-4", "fact-5", "fact-6"]
    assert session.facts[3] == dataclasses.replace(one, id="fact-4")
    assert [event.ids for event in session.events] == [("fact-2", "fact-3", "mine"), ("fact-4", "fact-5", "fact-6")]
    with pytest.raises(RequestError, match="'mine' is already used") as caught:
        session.edit([dataclasses.replace(one, id="mine"), dataclasses.replace(two, id="fact-4"), three])
    assert "'fact-4' is already used" in str(caught.value)


def test_progress_names_the_stages(fresh: EditSession, batches: Batches) -> None:
    calls: list[tuple[str, int, int]] = []
    fresh.edit(batches[0], progress=lambda *call: calls.append(call))
    assert calls == [("target values", 3, 3), ("layers", 1, 2), ("layers", 2, 2)]


# --- bad input, nothing lost ----------------------------------------------------------------------------------------


def test_no_requests_are_an_error(fresh: EditSession) -> None:
    with pytest.raises(KeditError, match="no requests"):
        fresh.edit([])


def test_moments_of_another_model_or_layer_are_refused(
    model: Decoder, tokenizer: Any, moments: Moments, settings: EditSettings
) -> None:
    values = named_parameters(model)
    other = with_parameters(model, {**values, "final_norm.bias": values["final_norm.bias"] + 1e-3})
    with pytest.raises(SessionError, match="not of this one"):
        start_session(other, tokenizer, moments, settings)
    with pytest.raises(SessionError, match=r"no moments for layers \[3\], only for \[0, 1, 2\]"):
        start_session(model, tokenizer, moments, dataclasses.replace(settings, layers=(0, 3), prefixes=0))
    with pytest.raises(KeditError, match="from 0 to 3"):
        start_session(model, tokenizer, moments, dataclasses.replace(settings, layers=(0, 4)))


def test_layers_are_edited_from_the_lowest(
    fresh: EditSession, batches: Batches, history: list[EditSession], another: Another
) -> None:
    session, step = another(fresh, layers=(2, 0)).edit(batches[0])
    assert step.addresses == (down_kernel_address(0), down_kernel_address(2))
    assert bits(session.model) == bits(history[1].model)


def test_moments_that_make_no_prior_are_refused(
    model: Decoder, tokenizer: Any, moments: Moments, settings: EditSettings
) -> None:
    flat = dataclasses.replace(moments, by_layer={n: np.zeros((160, 160)) for n in range(3)})
    with pytest.raises(SolverError, match="ridge"):
        start_session(model, tokenizer, flat, dataclasses.replace(settings, ridge=0.0, prefixes=0))


def test_values_that_are_not_finite_name_their_requests(history: list[EditSession], batches: Batches) -> None:
    """A NaN in the position that only the longest row reaches: the third request's, in one of its contexts."""
    session = history[1]
    layout = lay_out(session.tokenizer, batches[1], session.prefixes, max_positions=64)
    lengths = layout.valid[: layout.n_prompts].sum(1).reshape(3, -1).max(1)
    assert lengths[2] > lengths[:2].max()
    values = named_parameters(session.model)
    table = values["position_embedding"].at[lengths[2] - 1].set(np.nan)
    broken = dataclasses.replace(session, model=with_parameters(session.model, {**values, "position_embedding": table}))
    with pytest.raises(NonFiniteError, match="target values are not finite for fact-6;"):
        broken.edit(batches[1])
    assert len(broken.facts) == 3
    good, _ = session.edit(batches[1])
    assert bits(good.model) == bits(history[2].model), "the session itself goes on"


def test_keys_that_are_not_finite_name_their_requests(
    fresh: EditSession, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kedit_jax.editing import session as module

    honest = module.reading.read

    def spoiled(*args: Any) -> Any:
        stream, reading = honest(*args)
        return stream, reading._replace(keys=reading.keys.at[1, 7].set(jnp.inf))

    monkeypatch.setattr(module.reading, "read", spoiled)
    with pytest.raises(NonFiniteError, match="keys of layer 0 are not finite for fact-2;"):
        fresh.edit(batches[0])


def test_equalities_that_contradict_each_other_are_refused(fresh: EditSession, batches: Batches, another: Another) -> None:
    """The same key twice with noise 0: no solution. The session goes on as if nothing had been tried."""
    session, _ = another(fresh, noise=0.0).edit(batches[0])
    before = numbers(session)
    twice = [batches[1][2], batches[1][1], dataclasses.replace(batches[1][2], target=batches[3][2].target)]
    with pytest.raises(SolverError, match="noise"):
        session.edit(twice)
    assert numbers(session) == before


def test_requests_that_cannot_be_tokenized_are_all_named(fresh: EditSession, batches: Batches, another: Another) -> None:
    """Also those of later micro-batches."""
    long = [EditRequest("{} was born in " + "Oslo " * 70, person, "Rome") for person in ("Alice Smith", "Bob Jones")]
    with pytest.raises(RequestError, match="the model takes 64") as caught:
        another(fresh, micro_batch=2).edit([long[0], *batches[0][:2], long[1]])
    assert "Alice Smith was born in Oslo" in str(caught.value)
    assert "Bob Jones was born in Oslo" in str(caught.value)


# --- settings -------------------------------------------------------------------------------------------------------


def test_unusable_settings_are_all_named() -> None:
    with pytest.raises(KeditError) as caught:
        EditSettings(
            layers=(), editor="meme", history="past", noise=-1.0, ridge=float("nan"), micro_batch=0, prefixes=-1,
            values=ValueSettings(steps=0, learning_rate=0.0, clamp=-1.0, kl_factor=-0.1, decay=float("nan")),
        )  # fmt: skip
    message = str(caught.value)
    for words in (
        "must be whole numbers", "'meme' is unknown", "'past' is unknown", "noise is -1", "ridge is nan", "micro_batch is 0",
        "prefixes is -1", "values.steps is 0", "values.learning_rate is 0", "values.clamp is -1",
        "values.kl_factor is -0.1", "values.decay is nan",
    ):  # fmt: skip
        assert words in message, words


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_settings_survive_storing(name: str) -> None:
    import json

    settings = PUBLISHED[name]
    assert settings.editor in solve.EDITORS
    assert EditSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("stored", [{"layers": [1], "colour": "red"}, {"layers": [1], "values": {"colour": 1}}, {"seed": 1}])
def test_settings_with_other_names_are_refused(stored: dict[str, Any]) -> None:
    with pytest.raises(KeditError, match=r"colour|layers"):
        EditSettings.from_dict(stored)


def test_relative_error_measures_over_all_kernels() -> None:
    one = EditDelta({"a": Dense(np.eye(2)), "b": Dense(np.zeros((2, 2)))})
    two = EditDelta({"a": Dense(np.eye(2)), "b": Dense(np.ones((2, 2)))})
    assert relative_error(one, one) == 0
    assert relative_error(one, two) == pytest.approx((4 / 6) ** 0.5)
    assert relative_error(two.scaled(1 + 1e-9), two) == pytest.approx(1e-9)


def test_relative_error_counts_what_only_one_delta_has() -> None:
    update = EditDelta({"w": Dense(np.ones((2, 3)))})
    assert relative_error(update, EditDelta({})) == 1.0
    assert relative_error(EditDelta({}), update) == 1.0
    assert relative_error(EditDelta({}), EditDelta({})) == 0.0
