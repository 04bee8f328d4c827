"""The soak in a quick form on a small random world, and what its verdicts see."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.paper.stage import Stage
from experiments.scale import day, soak, steps
from experiments.scale.curves import at_least, at_most, flat, folder_state, process_state
from experiments.scale.faults import numbers
from kedit_jax.checkpoint import load_session

PLAN = soak.Plan(
    steps.Plan(steps=12, every=3, save_every=6, batch=3, apart=False),
    day.Plan(day=30, night=6, begin=3, most=2, held=5, every=5, load_every=5, compact_every=3),
)


def silent(what: str, work: int) -> Any:
    return lambda count: None


def told(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def world(stage: Stage) -> Stage:
    """Contradictions are resolved by default, as in the embedded model's settings."""
    return dataclasses.replace(stage, base=dataclasses.replace(stage.base, conflicts=None))


@pytest.fixture(scope="module")
def result(world: Stage, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Interrupted in the middle of the day, and continued."""
    home = tmp_path_factory.mktemp("soak")
    with jax.enable_x64(False):
        first = soak.soak(world, PLAN, 0, home, told, silent, until=11)
        assert first["verdicts"]["day"] == []
        return {"home": home} | soak.soak(world, PLAN, 0, home, told, silent)


def test_steps_and_day_hold(result: dict[str, Any]) -> None:
    missed = [v for part in result["verdicts"].values() for v in part if not v["holds"] and v["claim"] != "flat"]
    assert missed == []
    assert soak.holds(result, soak.NOT_CURVES)
    kinds = {line["kind"] for line in result["day"] if "kind" in line}
    assert kinds >= {"add", "replace", "retract", "restore", "merge", "undo", "compact"}
    assert [line["step"] for line in result["steps"] if "step" in line] == PLAN.steps.points
    (end,) = (line for line in result["steps"] if "loaded_same" in line)
    assert end["loaded_same"]
    assert end["replayed_same"], "the sum of rounded steps is the session's own"


def test_a_run_that_was_interrupted_ends_with_the_same_arrays(world: Stage, result: dict[str, Any], tmp_path: Path) -> None:
    start = world.start(world.settings(soak.EDITOR, world.base.seed))
    with jax.enable_x64(False):
        made = day.Operations(PLAN.day, world.records, start, 0)
        session = start
        for number in range(PLAN.day.day):
            session, _ = made.next(session, number)
        stored = load_session(result["home"] / "day" / "day", world.model, world.tokenizer, world.moments)
    assert numbers(stored) == numbers(session)
    assert len({line["began"] for line in result["day"] if line.get("part") == "day"}) == 2, "two processes' worth"


def test_the_report_is_written(result: dict[str, Any], tmp_path: Path) -> None:
    soak.write({name: value for name, value in result.items() if name != "home"}, tmp_path)
    text = (tmp_path / "SOAK.md").read_text(encoding="utf-8")
    assert "{" not in text
    assert (tmp_path / "results" / "soak.png").stat().st_size > 10_000


class TestVerdicts:
    X = np.arange(50.0)

    @pytest.mark.parametrize(
        ("rises", "y"),
        [
            (False, np.full(50, 700.0)),
            (False, 700 + np.random.default_rng(0).normal(size=50)),
            (False, np.where(np.arange(50) == 20, 5000.0, 700.0)),
            (False, 700 - 3 * X),
            (False, np.zeros(50)),
            (True, 700 + 2 * X),
            (True, np.where(np.arange(50) < 44, 700.0, 900.0)),
            (True, np.floor(10 + X / 20)),
            (True, np.where(X < 40, 0.0, 1.0)),
            (True, np.where(X == 20, np.nan, 700.0)),
        ],
    )
    def test_flat(self, rises: bool, y: np.ndarray) -> None:
        assert flat("", self.X, y, 0.05).holds is not rises

    def test_negative_control_a_leaking_list_is_seen(self) -> None:
        """4 MiB more each time, in a process of hundreds."""
        for leaks in (False, True):
            kept: list[np.ndarray] = []
            told = []
            for _ in range(60):
                made = np.ones(2**19)
                kept = [*kept, made] if leaks else [made]
                told.append(process_state()["rss_mib"])
            assert flat("", range(60), told, 0.01).holds is not leaks

    def test_limits(self) -> None:
        assert at_most("", [1, 2], 2).holds
        assert not at_most("", [1, 3], 2).holds
        assert not at_most("", [1, np.nan], 2).holds
        assert at_least("", [True, True], 1).holds
        assert not at_least("", [True, False], 1).holds
        assert not at_least("", [np.nan], 1).holds

    def test_what_a_kill_leaves_in_a_folder_is_seen(self, tmp_path: Path) -> None:
        for name in ("00000003", "tmp"):
            (tmp_path / name).mkdir()
        (tmp_path / ".lock").touch()
        assert folder_state(tmp_path, tmp_path / "tmp")["leftovers"] == 1
        (tmp_path / "tmp").rename(tmp_path / ".writing-00000004")
        (tmp_path / "00000003" / "part").write_bytes(bytes(100))
        found = folder_state(tmp_path)
        assert (found["leftovers"], found["versions"], found["disk_bytes"]) == (1, 1, 100)


def test_later_rounds_tell_the_same_facts_with_other_objects(world: Stage) -> None:
    rounds = [steps.retold(world.records, number) for number in range(3)]
    assert rounds[0] == list(world.records)
    for told_again in rounds[1:]:
        assert [record.subject for record in told_again] == [record.subject for record in world.records]
        for record, before in zip(told_again, world.records, strict=True):
            assert record.target_new not in (before.target_new, before.target_true)
    assert rounds[1] != rounds[2]
    assert rounds[1] == steps.retold(world.records, 1)
