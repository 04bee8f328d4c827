"""Conflicts: found in the history and in the batch, resolved under every policy, always the one-time edit of what stands."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from kedit_jax import solve
from kedit_jax.editing.conflicts import find_conflicts, resolve
from kedit_jax.editing.moments import Moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, equivalence_error, relative_error, start_session
from kedit_jax.errors import RequestError, SessionError

PROMPT, RELATION = "{} was born in", "birthplace"
ALICE = EditRequest(PROMPT, "Alice Smith", "old Lima and Oslo", id="alice")
OTHER = EditRequest("In {}, people speak", "Paris", "violin", id="paris")
BOB = EditRequest("The house of {} stands in", "Bob Jones", "new Rome is old", id="bob")
ALICE_2 = dataclasses.replace(ALICE, target="far Rome, Paris", id="alice-2")
ALICE_3 = dataclasses.replace(ALICE, target="both Paris and Lima", id="alice-3")


def found(batch: list[EditRequest], held: list[EditRequest]) -> list[tuple[str, str]]:
    return [(str(c.new.id), str(c.old.id)) for c in find_conflicts(batch, held)]


class TestFinding:
    def test_the_same_prompt_and_subject_with_another_target(self) -> None:
        assert found([ALICE_2, OTHER], [ALICE, BOB]) == [("alice-2", "alice")]

    def test_inside_a_batch_and_across_the_history(self) -> None:
        assert found([ALICE_2, BOB, ALICE_3], [ALICE]) == [
            ("alice-2", "alice"),
            ("alice-3", "alice"),
            ("alice-3", "alice-2"),
        ]

    def test_a_relation_connects_different_prompts(self) -> None:
        said = EditRequest("The birthplace of {} is", "Alice Smith", "Rome", id="r", relation=RELATION)
        held = dataclasses.replace(ALICE, relation=RELATION)
        assert found([said], [held]) == [("r", "alice")]
        assert found([said], [ALICE]) == [], "another prompt, and the relation of one is not known"
        assert found([dataclasses.replace(said, relation="other")], [held]) == []

    def test_the_same_target_or_another_subject_is_no_conflict(self) -> None:
        assert (
            found([dataclasses.replace(ALICE, id="again"), dataclasses.replace(ALICE_2, subject="Bob Jones")], [ALICE]) == []
        )

    def test_close_keys_conflict_from_the_threshold_on(self) -> None:
        held, batch = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.8, 0.6]])
        for threshold, expected in ((0.79, ["alice"]), (0.81, []), (0.5, ["alice", "paris"])):
            conflicts = find_conflicts([BOB], [ALICE, OTHER], similarity=threshold, batch_keys=batch, held_keys=held)
            assert [c.old.id for c in conflicts] == expected
            assert all(c.cosine == pytest.approx(0.8 if c.old.id == "alice" else 0.6) for c in conflicts)

    def test_close_keys_inside_a_batch(self) -> None:
        batch = np.array([[1.0, 0.0], [0.0, 1.0], [0.99, 0.1]])
        carol = dataclasses.replace(BOB, subject="Carol White", target="Oslo", id="carol")
        nothing = np.zeros((0, 2))
        conflicts = find_conflicts([ALICE, OTHER, carol], [], similarity=0.9, batch_keys=batch, held_keys=nothing)
        assert [(c.new.id, c.old.id, c.in_batch) for c in conflicts] == [("carol", "alice", True)]
        same = dataclasses.replace(carol, target=ALICE.target)
        assert find_conflicts([ALICE, OTHER, same], [], similarity=0.9, batch_keys=batch, held_keys=nothing) == []

    def test_a_threshold_without_keys_is_refused(self) -> None:
        with pytest.raises(RequestError, match="needs the keys"):
            find_conflicts([BOB], [ALICE], similarity=0.9)


class TestResolving:
    def plan(self, policy: str) -> Any:
        batch = [ALICE_2, BOB, ALICE_3]
        return resolve(batch, find_conflicts(batch, [ALICE, OTHER]), policy)

    @pytest.mark.parametrize(
        ("policy", "written", "replaced", "skipped", "shared"),
        [
            ("keep", ["alice-2", "bob", "alice-3"], (), [], {}),
            ("latest", ["bob", "alice-3"], ("alice",), ["alice-2"], {}),
            ("first", ["bob"], (), ["alice-2", "alice-3"], {}),
            ("merge", ["alice-2", "bob", "alice-3"], (), [], {"alice-2": "alice", "alice-3": "alice"}),
        ],
    )
    def test_each_policy(
        self, policy: str, written: list[str], replaced: tuple[str, ...], skipped: list[str], shared: Any
    ) -> None:
        plan = self.plan(policy)
        assert [fact.id for fact in plan.written] == written
        assert plan.replaced == replaced
        assert [fact.id for fact in plan.skipped] == skipped
        assert plan.shared == shared
        assert len(plan.lines()) == 3

    def test_first_skips_only_what_contradicts_something_that_stands(self) -> None:
        """B contradicts A and is skipped; C contradicts B alone, which is not there."""
        a, b, c = (EditRequest(PROMPT, "X", t, id=t, relation=r) for t, r in (("a", "1"), ("b", "1"), ("c", "2")))
        b, c = dataclasses.replace(b, prompt="{} two"), dataclasses.replace(c, prompt="{} two")
        plan = resolve([b, c], find_conflicts([b, c], [a]), "first")
        assert [fact.id for fact in plan.written] == ["c"]

    def test_reject_names_both_facts_of_every_conflict(self) -> None:
        with pytest.raises(RequestError) as caught:
            self.plan("reject")
        for words in (
            "alice-2: 'Alice Smith was born in' -> 'far Rome, Paris'",
            "contradicts alice of",
            "old Lima",
            "same batch",
        ):
            assert words in str(caught.value)
        assert resolve([BOB], [], "reject").written == (BOB,)

    def test_an_unknown_policy_is_refused(self) -> None:
        with pytest.raises(RequestError, match="no policy; there are keep, latest"):
            self.plan("newest")


@pytest.fixture(scope="module")
def started(fresh: EditSession) -> EditSession:
    """Alice, Paris and Bob, in a session that lets the latest fact win."""
    with jax.enable_x64(False):
        return dataclasses.replace(fresh, settings=dataclasses.replace(fresh.settings, conflicts=None)).edit(
            [ALICE, OTHER, BOB]
        )[0]


def names(session: EditSession) -> list[str | None]:
    return [fact.id for fact in session.facts]


class TestSessions:
    def test_the_latest_fact_wins(self, started: EditSession) -> None:
        after, step = started.edit([ALICE_2])
        assert names(after) == ["paris", "bob", "alice-2"]
        assert [fact.id for fact in after.retired] == ["alice"]
        assert equivalence_error(after) <= 1e-11
        assert after.events[-1].replaced == ("alice",)
        assert relative_error(started.delta + step, after.delta) <= 1e-12
        kept, _ = started.edit([ALICE_2], conflicts="keep")
        assert relative_error(kept.delta, after.delta) > 1e-2

    def test_it_equals_retracting_first(self, started: EditSession) -> None:
        directly, _ = started.edit([ALICE_2])
        stepwise, _ = started.retract(["alice"])
        stepwise, _ = stepwise.edit([ALICE_2])
        assert relative_error(directly.delta, stepwise.delta) == 0

    def test_the_first_fact_wins(self, started: EditSession) -> None:
        after, step = started.edit([ALICE_2], conflicts="first")
        assert names(after) == names(started)
        assert step.updates == {}
        assert after.events[-1].skipped == ("alice-2",)
        assert [fact.id for fact in after.skipped] == ["alice-2"]
        assert relative_error(after.delta, started.delta) == 0

    def test_merged_facts_share_a_key_and_their_weighted_mean(self, started: EditSession) -> None:
        after, _ = started.edit([dataclasses.replace(ALICE_2, weight=3.0)], conflicts="merge")
        assert names(after) == ["alice", "paris", "bob", "alice-2"]
        assert equivalence_error(after) <= 1e-10
        for layer, held in after.layers.items():
            keys, residuals, noise = held.constraints.keys, held.constraints.residuals, held.constraints.noise
            assert np.array_equal(keys[0], keys[3])
            assert noise[3] == pytest.approx(noise[0] / 3)
            mean = (residuals[0] + 3 * residuals[3]) / 4
            merged = solve.Constraints(
                np.asarray(keys[:3]),
                np.stack([mean, residuals[1], residuals[2]]),
                np.array([noise[0] / 4, noise[1], noise[2]]),
            )
            with solve.float64():
                expected = np.asarray(solve.one_time(after.editors[layer].prior, merged).update)
            assert np.linalg.norm(held.update - expected) <= 1e-11 * np.linalg.norm(expected)
        back, _ = after.retract(["alice-2"])
        assert relative_error(back.delta, started.delta) <= 1e-11, "the merged facts can still be told apart"

    def test_facts_merged_in_one_batch(self, started: EditSession) -> None:
        emptied, _ = started.retract([str(fact.id) for fact in started.facts])
        after, _ = emptied.edit([ALICE, BOB, ALICE_2], conflicts="merge")
        for held in after.layers.values():
            assert np.array_equal(held.constraints.keys[0], held.constraints.keys[2])
        assert equivalence_error(after) <= 1e-10

    def test_reject_changes_nothing(self, started: EditSession) -> None:
        with pytest.raises(RequestError, match=r"alice-2: .* contradicts alice of the session"):
            started.edit([ALICE_2], conflicts="reject")

    def test_a_dry_run_says_what_would_happen(self, started: EditSession) -> None:
        plan = started.plan([ALICE_2, ALICE_3])
        assert plan.policy == "latest"
        assert plan.replaced == ("alice",)
        assert [fact.id for fact in plan.written] == ["alice-3"]
        after, _ = started.edit([ALICE_2, ALICE_3])
        assert names(after) == ["paris", "bob", "alice-3"]

    def test_conflicts_by_key(self, started: EditSession) -> None:
        """The same subject under the same prompt has the same first key; another subject's is some way off."""
        other_prompt = EditRequest("{} was born in ", "Alice Smith", "far Rome", id="spaced")
        assert started.plan([dataclasses.replace(other_prompt, prompt="{} was born in the")]).conflicts == ()
        plan = started.plan([dataclasses.replace(other_prompt, prompt="{} was born in the")], similarity=0.999)
        assert [(c.old.id, c.cosine is not None) for c in plan.conflicts] == [("alice", True)]
        assert started.plan([EditRequest(PROMPT, "Carol White", "Oslo")], similarity=0.999999).conflicts == ()

    def test_an_unaligned_session_keeps_everything(self, fresh: EditSession, moments: Moments) -> None:
        settings = dataclasses.replace(fresh.settings, history="unaligned", conflicts=None, prefixes=0)
        session = start_session(fresh.base, fresh.tokenizer, moments, settings)
        session, _ = session.edit([ALICE])
        after, _ = session.edit([ALICE_2])
        assert names(after) == ["alice", "alice-2"]
        with pytest.raises(SessionError, match="needs history 'aligned'"):
            session.edit([ALICE_2], conflicts="latest")

    def test_merging_under_equality_is_refused(self, started: EditSession) -> None:
        exact = {layer: dataclasses.replace(editor, noise=0.0) for layer, editor in started.editors.items()}
        with pytest.raises(SessionError, match="set noise > 0"):
            dataclasses.replace(started, editors=exact).edit([ALICE_2], conflicts="merge")

    def test_weights_under_equality_are_refused(self, started: EditSession) -> None:
        exact = {layer: dataclasses.replace(editor, noise=0.0) for layer, editor in started.editors.items()}
        with pytest.raises(RequestError, match="meets every constraint exactly"):
            dataclasses.replace(started, editors=exact).edit([dataclasses.replace(ALICE_2, weight=2.0)])
