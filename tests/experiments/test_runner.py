"""A run that was killed at any step goes on to the same result; results of something else, and damage, are noticed."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from experiments.paper import main_table, running
from experiments.paper.__main__ import run_experiment
from experiments.paper.main_table import MainConfig
from experiments.paper.results import TIMES, Log, parse, read_results
from experiments.paper.running import Run
from experiments.paper.stage import Stage
from kedit_jax.errors import KeditError

CONFIG = MainConfig(
    seeds=(0,),
    edits=12,
    batch=3,
    evaluate_at=(3,),
    sample=4,
    sample_at_end=6,
    free_records=0,
    retention=3,
    editors=("memit", "rect"),
    variants=("aligned", "unaligned"),
    drift_of=("memit",),
    save_every=2,
    columns=("efficacy",),
)


class Killed(BaseException):
    """As a signal would."""


@pytest.fixture(scope="module")
def by_name(stage: Stage) -> Callable[[str], Run]:
    made = {run.name: run for run in main_table.runs(CONFIG, stage, 0)}
    return made.__getitem__


def lines_of(path: Path) -> list[str]:
    """A file's lines without what differs in time."""
    kept = []
    for line in path.read_text().splitlines():
        read = json.loads(line)
        kept.append(json.dumps({name: value for name, value in read.items() if name not in TIMES}))
    return kept


def computed(run: Run, path: Path, *, kill_after: int | None = None, messages: list[str] | None = None) -> None:
    """Run, killed after this many edits of this process if that is said."""
    done = 0

    def tick(edits: int) -> None:
        nonlocal done
        done += edits
        if kill_after is not None and done >= kill_after:
            raise Killed

    header = {"experiment": "main", "model": "small", "seed": 0, "run": run.name, "what": run.what}
    run.go(Log.open(path, header, (messages if messages is not None else []).append), tick)


@pytest.fixture(scope="module")
def whole(by_name: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing interrupted."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for name in ("memit-aligned", "rect-aligned", "memit-unaligned"):
        found[name] = folder / f"{name}.jsonl"
        computed(by_name(name), found[name])
    return found


@pytest.mark.parametrize("name", ["memit-aligned", "rect-aligned", "memit-unaligned"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_lines(
    name: str, step: int, whole: dict[str, Path], by_name: Callable[[str], Run], tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.jsonl"
    with pytest.raises(Killed):
        computed(by_name(name), path, kill_after=3 * step)
    assert len(lines_of(path)) == 1 + step
    computed(by_name(name), path)
    assert lines_of(path) == lines_of(whole[name])
    assert not path.with_suffix(".session").exists()


def test_killed_twice_and_with_half_a_line(whole: dict[str, Path], by_name: Callable[[str], Run], tmp_path: Path) -> None:
    path, messages = tmp_path / "run.jsonl", []
    for kill_after in (6, 9):
        with pytest.raises(Killed):
            computed(by_name("memit-aligned"), path, kill_after=kill_after)
    path.write_text(path.read_text()[:-25])  # what a kill in the middle of writing leaves
    computed(by_name("memit-aligned"), path, messages=messages)
    assert "half-written" in messages[0]
    assert lines_of(path) == lines_of(whole["memit-aligned"])


def test_negative_control_a_session_of_another_step_gives_other_lines(
    whole: dict[str, Path], by_name: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the session not restored as it was, the lines would differ."""
    path = tmp_path / "run.jsonl"
    with pytest.raises(Killed):
        computed(by_name("memit-aligned"), path, kill_after=6)
    begin = running._resumed
    monkeypatch.setattr(
        running, "_resumed", lambda stage, settings, log, kept: (stage.start(settings), begin(stage, settings, log, kept)[1])
    )
    computed(by_name("memit-aligned"), path)
    assert lines_of(path) != lines_of(whole["memit-aligned"])


def test_lines_hold_what_the_tables_need(whole: dict[str, Path]) -> None:
    (result,) = [r for r in read_results(whole["memit-aligned"].parent) if r.name == "memit-aligned"]
    assert result.complete
    assert [line["edits"] for line in result.lines] == [3, 6, 9, 12]
    assert {"step_norm", "update_norm", "kernel_growth"} <= set(result.lines[1])
    wanted = {"efficacy", "specificity", "retention", "perplexity", "distance", "drift", "key_drift", "reread_change"}
    assert wanted <= set(result.lines[-1])
    assert {"efficacy", "perplexity"} <= set(result.lines[0])
    assert result.lines[-1]["distance"] < 1e-10
    header = result.header["what"]
    assert {"weights", "data", "moments", "settings", "prefixes", "versions", "hardware"} <= set(header)


def test_the_unaligned_sequence_is_not_the_one_time_edit(whole: dict[str, Path]) -> None:
    """The measure that says 0 for aligned sequences can say something else."""
    last = parse(whole["memit-unaligned"].read_text(), "").lines[-1]
    assert last["distance"] > 1e-3
    assert last["drift"] > 1e-3


def test_results_of_another_config_are_refused(
    whole: dict[str, Path], by_name: Callable[[str], Run], tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(whole["memit-aligned"].read_text())
    before = path.read_text()
    with pytest.raises(
        KeditError, match=r"(?s)something else.*run: stored 'memit-aligned'.*history: stored 'aligned', given"
    ):
        computed(by_name("memit-unaligned"), path)
    assert path.read_text() == before


def test_another_machine_may_continue(whole: dict[str, Path], tmp_path: Path) -> None:
    header = parse(whole["memit-aligned"].read_text(), "").header
    given = {name: value for name, value in header.items() if name != "format"}
    path = tmp_path / "run.jsonl"
    Log.open(path, given | {"versions": {"jax": "0"}, "hardware": {"cores": 1}})
    assert not Log.open(path, given | {"versions": {"jax": "1"}, "hardware": {"cores": 2}}).lines
    with pytest.raises(KeditError, match="seed: stored 0, given 1"):
        Log.open(path, given | {"seed": 1})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format":1}\n{"step":\n{"step":2}\n', "line 2 is damaged"),
        ('{"format":1}\n[3]\n', "line 2 holds"),
        ('{"step":1}\n', "does not begin with a header"),
    ],
)
def test_damage_is_named(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(KeditError, match=words):
        Log.open(path, {"seed": 0})


def test_an_experiment_runs_once_and_is_kept(stage: Stage, tmp_path: Path) -> None:
    told: list[Any] = []
    for _ in range(2):
        out = io.StringIO()
        few = MainConfig(**{**vars(CONFIG), "editors": ("memit",), "variants": ("unaligned",), "edits": 3})
        run_experiment("main", few, stage, tmp_path, Console(file=out, width=200))
        told.append(out.getvalue())
    assert "2 runs," in told[0]
    assert "2 runs are complete" in told[1]
    assert {result.name for result in read_results(tmp_path)} == {"unedited", "memit-unaligned"}
    assert all(result.complete for result in read_results(tmp_path))
