"""Sessions compose: merge, difference, undo, restore, replace and compact, each equal to a fresh one-time edit."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from kedit_jax import solve
from kedit_jax.delta import EditDelta
from kedit_jax.editing import algebra
from kedit_jax.editing.algebra import compact, difference, merge, undo
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, equivalence_error, relative_error
from kedit_jax.errors import RequestError, SessionError

ALICE, PARIS, BOB = (
    EditRequest("{} was born in", "Alice Smith", "old Lima and Oslo", id="alice"),
    EditRequest("In {}, people speak", "Paris", "violin", id="paris"),
    EditRequest("The house of {} stands in", "Bob Jones", "new Rome is old", id="bob"),
)
CAROL, LIMA, DAN = (
    EditRequest("{} was born in", "Carol White", "old Rome and Paris", id="carol"),
    EditRequest("In {}, people speak", "Lima", "both", id="lima"),
    EditRequest("The house of {} stands in", "Dan Brown", "Paris and old Lima", id="dan"),
)
ALICE_2 = dataclasses.replace(ALICE, target="far Rome, Paris")


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def names(session: EditSession) -> list[str | None]:
    return [fact.id for fact in session.facts]


def fresh_fit(session: EditSession, other: EditSession, rows: dict[str, list[str]]) -> EditDelta:
    """The one-time edit of named facts, their constraints taken from the two sessions."""
    layers = {}
    for layer, held in session.layers.items():
        parts = []
        for source, wanted in ((session, rows["first"]), (other, rows["second"])):
            keep = np.array([fact.id in wanted for fact in source.facts])
            parts.append(solve.take(source.layers[layer].constraints, keep))
        layers[layer] = dataclasses.replace(held, constraints=solve.concatenate(parts), base=None)
    return dataclasses.replace(session, layers=layers).one_time()


@pytest.fixture(scope="module")
def start(fresh: EditSession) -> EditSession:
    return dataclasses.replace(fresh, settings=dataclasses.replace(fresh.settings, conflicts=None))


@pytest.fixture(scope="module")
def first(start: EditSession) -> EditSession:
    with jax.enable_x64(False):
        return start.edit([ALICE, PARIS, BOB])[0]


@pytest.fixture(scope="module")
def second(start: EditSession) -> EditSession:
    with jax.enable_x64(False):
        return start.edit([CAROL, LIMA, DAN])[0]


@pytest.fixture(scope="module")
def both(first: EditSession) -> EditSession:
    """One session, two batches."""
    with jax.enable_x64(False):
        return first.edit([CAROL, LIMA, DAN])[0]


class TestMerge:
    def test_is_the_one_time_edit_of_the_union_in_either_order(self, first: EditSession, second: EditSession) -> None:
        ab, step = merge(first, second)
        ba, _ = merge(second, first)
        assert names(ab) == ["alice", "paris", "bob", "carol", "lima", "dan"]
        expected = fresh_fit(first, second, {"first": ["alice", "paris", "bob"], "second": ["carol", "lima", "dan"]})
        assert relative_error(ab.delta, expected) <= 1e-11
        assert relative_error(ba.delta, ab.delta) <= 1e-11
        assert relative_error(first.delta + step, ab.delta) <= 1e-12
        assert relative_error(first.delta + second.delta, ab.delta) > 1e-2, "adding the updates is another thing"
        assert ab.events[-1].kind == "merge"

    def test_facts_that_both_hold_count_once(self, first: EditSession, both: EditSession) -> None:
        forked, _ = first.retract(["bob"])
        merged, _ = merge(forked, both)
        assert sorted(map(str, names(merged))) == ["alice", "bob", "carol", "dan", "lima", "paris"]
        assert relative_error(merged.delta, both.delta) <= 1e-11
        same, _ = merge(both, first)
        assert names(same) == names(both)
        assert relative_error(same.delta, both.delta) == 0

    def test_conflicts_by_policy(self, start: EditSession, first: EditSession) -> None:
        later, _ = start.edit([dataclasses.replace(ALICE_2, id="alice-2")])
        latest, _ = merge(first, later)
        assert names(latest) == ["paris", "bob", "alice-2"]
        assert (
            relative_error(latest.delta, fresh_fit(first, later, {"first": ["paris", "bob"], "second": ["alice-2"]}))
            <= 1e-11
        )
        kept, _ = merge(first, later, conflicts="first")
        assert names(kept) == names(first)
        shared, _ = merge(first, later, conflicts="merge")
        for layer, held in shared.layers.items():
            assert np.array_equal(held.constraints.keys[0], held.constraints.keys[3])
            kernel = first.site(layer).kernel
            theirs = later.layers[layer].constraints
            target = theirs.residuals[0] + np.asarray(theirs.keys[0], np.float64) @ kernel
            now = held.constraints.residuals[3] + np.asarray(held.constraints.keys[3], np.float64) @ kernel
            np.testing.assert_allclose(now, target, rtol=1e-12, atol=1e-12)
        assert equivalence_error(shared) <= 1e-10
        with pytest.raises(RequestError, match=r"alice-2: .* contradicts alice"):
            merge(first, later, conflicts="reject")

    def test_ids_that_clash_need_a_prefix(self, start: EditSession, first: EditSession) -> None:
        later, _ = start.edit([dataclasses.replace(CAROL, id="alice")])
        with pytest.raises(SessionError, match="named alice; give a prefix"):
            merge(first, later)
        merged, _ = merge(first, later, prefix="b-")
        assert names(merged) == ["alice", "paris", "bob", "b-alice"]

    def test_sessions_that_do_not_fit_are_all_told(self, first: EditSession, second: EditSession) -> None:
        other = dataclasses.replace(
            second, prefixes=("x",), settings=dataclasses.replace(second.settings, moment_weight=1.0)
        )
        with pytest.raises(SessionError) as caught:
            merge(first, other)
        assert "settings differ" in str(caught.value)
        assert "prefixes differ" in str(caught.value)


def test_difference_takes_away_what_both_hold(first: EditSession, second: EditSession, both: EditSession) -> None:
    rest, _ = difference(both, first)
    assert names(rest) == ["carol", "lima", "dan"]
    assert relative_error(rest.delta, rest.one_time()) <= 1e-11
    with pytest.raises(SessionError, match="no fact in common"):
        difference(first, second)


class TestRestoreAndReplace:
    def test_a_restored_fact_is_as_if_it_had_never_left(self, both: EditSession) -> None:
        fewer, _ = both.retract(["paris", "lima"])
        again, step = fewer.restore(["lima", "paris"])
        assert sorted(map(str, names(again))) == sorted(map(str, names(both)))
        assert again.retired == ()
        assert relative_error(again.delta, both.delta) <= 1e-11
        assert relative_error(fewer.delta + step, again.delta) <= 1e-12
        assert relative_error(fewer.delta, both.delta) > 1e-2

    def test_what_cannot_be_restored_is_named(self, first: EditSession) -> None:
        with pytest.raises(SessionError, match="cannot restore nobody"):
            first.restore(["nobody"])
        after, _ = first.replace([ALICE_2])
        with pytest.raises(SessionError, match="holds other facts named alice"):
            after.restore(["alice"])

    def test_new_targets_under_the_old_keys(self, first: EditSession) -> None:
        after, step = first.replace([ALICE_2])
        assert sorted(map(str, names(after))) == ["alice", "bob", "paris"]
        assert next(fact.target for fact in after.facts if fact.id == "alice") == ALICE_2.target
        for layer, held in after.layers.items():
            old = first.layers[layer].constraints.keys[names(first).index("alice")]
            assert np.array_equal(held.constraints.keys[names(after).index("alice")], old)
        assert equivalence_error(after) <= 1e-11
        assert relative_error(first.delta + step, after.delta) <= 1e-12
        with pytest.raises(SessionError, match="cannot retract carol"):
            first.replace([CAROL])


class TestUndo:
    def test_an_edit_is_undone_bit_for_bit(self, first: EditSession, both: EditSession) -> None:
        before, _ = undo(both)
        assert names(before) == names(first)
        assert bits((before.model, before.delta)) == bits((first.model, first.delta))
        assert before.events[-1].undoes == 2

    def test_steps_are_undone_one_after_another(self, both: EditSession, model: Any) -> None:
        session, _ = both.retract(["paris"])
        session, _ = session.edit([dataclasses.replace(ALICE_2, id="alice-2")])
        session, _ = session.replace([dataclasses.replace(ALICE, id="alice-2", target="Oslo")])
        expected = [
            {"alice-2", "bob", "carol", "lima", "dan"},
            {"alice", "bob", "carol", "lima", "dan"},
            {"alice", "paris", "bob", "carol", "lima", "dan"},
            {"alice", "paris", "bob"},
            set(),
        ]
        for number, held in zip((5, 4, 3, 2, 1), expected, strict=True):
            session, _ = undo(session)
            assert session.events[-1].undoes == number
            assert set(names(session)) == held
            assert relative_error(session.delta, session.one_time()) <= 1e-11
            if number == 5:
                assert next(f.target for f in session.facts if f.id == "alice-2") == ALICE_2.target
            if number == 3:
                assert relative_error(session.delta, both.delta) <= 1e-11
        assert bits(session.model) == bits(model)
        with pytest.raises(SessionError, match="nothing to undo"):
            undo(session)

    def test_an_undone_edit_can_be_restored(self, both: EditSession) -> None:
        before, _ = undo(both)
        again, _ = before.restore(["carol", "lima", "dan"])
        assert relative_error(again.delta, both.delta) <= 1e-11

    def test_of_two_versions_under_one_id_the_one_that_stood_comes_back(self, first: EditSession) -> None:
        """An id is taken back, written anew and that undone: both versions are retired then, and only one had stood."""
        session, _ = first.retract(["alice"])
        session, _ = session.edit([dataclasses.replace(ALICE_2, id="alice")])
        session, _ = undo(session)
        assert [fact.target for fact in session.retired] == [ALICE_2.target, ALICE.target]
        restored, _ = session.restore(["alice"])
        session, _ = undo(session)
        for back in (restored, session):
            assert set(back.facts) == set(first.facts)
            assert relative_error(back.delta, first.delta) <= 1e-11
            assert relative_error(back.delta, back.one_time()) <= 1e-11

    def test_negative_control_versions_in_the_order_they_left(
        self, first: EditSession, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(algebra, "_set_aside", lambda session, count: session)
        session, _ = first.retract(["alice"])
        session, _ = session.edit([dataclasses.replace(ALICE_2, id="alice")])
        session, _ = undo(session)
        session, _ = session.restore(["alice"])
        assert ALICE_2.target in {fact.target for fact in session.facts}


class TestCompact:
    def test_the_edit_stays_and_can_go_on(self, first: EditSession, both: EditSession) -> None:
        small = compact(first)
        assert bits(small.model) == bits(first.model)
        assert all(held.constraints.size == 0 for held in small.layers.values())
        assert equivalence_error(small) <= 1e-11
        more, _ = small.edit([CAROL, LIMA, DAN])
        assert equivalence_error(more) <= 1e-10
        assert relative_error(more.delta, both.delta) <= 1e-5, (
            "values are optimised in float32 from kernels equal to rounding"
        )
        back, _ = more.retract(["carol", "lima", "dan"])
        assert relative_error(back.delta, first.delta) <= 1e-11

    def test_it_says_what_it_gave_up(self, first: EditSession) -> None:
        small = compact(first)
        with pytest.raises(SessionError, match="cannot retract alice: compacted"):
            small.retract(["alice"])
        with pytest.raises(SessionError, match="compacted"):
            small.edit([dataclasses.replace(ALICE_2, id="alice-2")])
        with pytest.raises(SessionError, match="cannot be undone"):
            undo(small)
        with pytest.raises(SessionError, match="compacted already"):
            compact(small)
        with pytest.raises(SessionError, match="the second session is compacted"):
            merge(first, small)

    def test_memory_does_not_grow(self, both: EditSession, first: EditSession) -> None:
        def size(session: EditSession) -> int:
            return sum(np.asarray(leaf).nbytes for held in session.layers.values() for leaf in jax.tree.leaves(
                (held.constraints, held.retired, held.sequence, held.base and (held.base.statistics, held.base.update))
            ))  # fmt: skip

        assert size(compact(both)) == size(compact(first))

    def test_merging_into_a_compacted_session(self, first: EditSession, second: EditSession, both: EditSession) -> None:
        merged, _ = merge(compact(first), second)
        expected = fresh_fit(first, second, {"first": ["alice", "paris", "bob"], "second": ["carol", "lima", "dan"]})
        assert relative_error(merged.delta, expected) <= 1e-11

    def test_equalities_have_no_statistics(self, first: EditSession) -> None:
        exact = {layer: dataclasses.replace(editor, noise=0.0) for layer, editor in first.editors.items()}
        with pytest.raises(SessionError, match="weigh infinitely"):
            compact(dataclasses.replace(first, editors=exact))
