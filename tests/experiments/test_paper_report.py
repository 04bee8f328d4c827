"""The report is made of stored results alone, and says what they say: made-up results give made-up sentences."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.paper.report import write_report
from experiments.paper.results import read_results
from kedit_jax.errors import KeditError

PAPER = Path(__file__).resolve().parents[2] / "experiments" / "paper"
MOST_BYTES = 3 * 2**20

EDITORS = ("memit", "alphaedit", "prune", "rect")


def stored(
    folder: Path, name: str, seed: int, what: dict[str, Any], lines: list[dict[str, Any]], *, end: bool = True
) -> None:
    """A run as the runner stores it."""
    path = folder / "main" / "small" / f"seed-{seed}" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"layers": [1, 2], "post": "rect:0.4" if what["editor"] in ("rect", "prune") else None}
    header = {"format": 1, "experiment": "main", "model": "small", "seed": seed, "run": name}
    header |= {"what": {**what, "settings": settings}, "hardware": {"processor": "P", "cores": 1, "device": "cpu"}}
    rows = [header, *lines, *([{"end": len(lines)}] if end else [])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def line(edits: int, level: float, **more: Any) -> dict[str, Any]:
    names = ("efficacy", "generalization", "specificity", "score", "efficacy_accuracy", "specificity_accuracy", "retention")
    norms = {"update_norm": 2.0 * edits, "kernel_growth": 1.5, "step_norm": 1.0}
    return {
        "step": edits,
        "edits": edits,
        **dict.fromkeys(names, level),
        "perplexity": 7.0,
        **norms,
        "cpu_seconds": 1.0,
        **more,
    }


def results(folder: Path, unaligned: float) -> Path:
    """Two seeds of four editors; unaligned runs end at this level, one editor's fails."""
    for seed in (0, 1):
        stored(folder, "unedited", seed, {"editor": "unedited", "variant": "unedited"}, [line(0, 0.0)])
        for editor in EDITORS:
            for variant, level in (("aligned", 99.0), ("one-time", 99.5), ("unaligned", unaligned)):
                more = {"distance": 3e-15 if variant != "unaligned" else 0.4}
                course = [line(100, 99.0), line(200, level + 0.2 * seed, **more)]
                stored(folder, f"{editor}-{variant}", seed, {"editor": editor, "variant": variant}, course)
        for editor, level in (("rect", 90.0), ("prune", 98.5)):
            stored(
                folder, f"{editor}-uncompensated", seed, {"editor": editor, "variant": "uncompensated"}, [line(200, level)]
            )
    return folder


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are laid out and drawn when they are saved, which takes most of the time."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


def claim(report: str, text: str) -> str:
    """The line of the first claim that holds this text."""
    return next(line for line in report.splitlines() if text in line)


def test_tables_have_means_and_deviations_and_claims_follow_the_numbers(tmp_path: Path) -> None:
    folder = results(tmp_path, 60.0)
    report = write_report(folder, tmp_path).read_text()
    assert "| memit-aligned | 2 | 99.1 ± 0.1 |" in report
    assert report.index("| unedited | 2 |") < report.index("| memit-aligned | 2 |")
    assert claim(report, "unaligned editors end clearly below").endswith("| yes |")
    assert "memit -39.0" in claim(report, "unaligned editors end clearly below")
    assert claim(report, "compensation is worth more").endswith("| yes |")
    assert "RECT +9.1, PRUNE +0.6" in claim(report, "compensation is worth more")
    assert claim(report, "the sum of aligned steps").endswith("| yes |")
    for figure in ("main-small-editors", "main-small-course", "norms-small-course"):
        assert f"(figures/{figure}.png)" in report
        assert (tmp_path / "figures" / f"{figure}.png").stat().st_size > 5000
    before = (folder / "figures" / "main-small-editors.png").read_bytes()
    assert write_report(folder, tmp_path).read_text() == report
    assert (folder / "figures" / "main-small-editors.png").read_bytes() == before


@pytest.mark.usefixtures("unseen")
def test_negative_control_other_results_give_the_other_verdict(tmp_path: Path) -> None:
    report = write_report(results(tmp_path, 99.0), tmp_path).read_text()
    assert claim(report, "unaligned editors end clearly below").endswith("| **no** |")


@pytest.mark.usefixtures("unseen")
def test_unfinished_and_failed_runs_are_told(tmp_path: Path) -> None:
    folder = results(tmp_path, 60.0)
    stored(folder, "memit-unaligned", 0, {"editor": "memit", "variant": "unaligned"}, [line(100, 99.0)], end=False)
    failed = [line(100, 1.0), {"step": 2, "edits": 200, "failed": "the update is not finite"}]
    stored(folder, "rect-unaligned", 1, {"editor": "rect", "variant": "unaligned"}, failed)
    for seed in (0, 1):
        stored(folder, "prune-unaligned", seed, {"editor": "prune", "variant": "unaligned"}, failed[1:])
    report = write_report(folder, tmp_path).read_text()
    assert "1 runs are not complete" in report
    assert "| rect-unaligned (1 of 2 without a result: the update is not finite) | 2 | 60.0 |" in report
    assert "| prune-unaligned | 2 | no result: the update is not finite |" in report
    assert "Runs that ended without a result: main/prune-unaligned, main/rect-unaligned" in report


@pytest.mark.usefixtures("unseen")
def test_comments_are_included_and_nothing_else_is_needed(tmp_path: Path) -> None:
    comments = tmp_path / "comments"
    comments.mkdir()
    (comments / "main.md").write_text("A person's words.")
    report = write_report(results(tmp_path / "r", 60.0), tmp_path, comments).read_text()
    assert "### Comment\n\nA person's words." in report
    with pytest.raises(KeditError, match="no results in"):
        write_report(tmp_path / "empty", tmp_path)


@pytest.mark.usefixtures("unseen")
def test_what_is_recorded_is_small_whole_and_reported(tmp_path: Path) -> None:
    """The recorded results of the embedded model are what the recorded report was made of."""
    files = [path for path in (PAPER / "results").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES
    recorded = read_results(PAPER / "results")
    assert all(result.complete for result in recorded)
    if recorded:
        shutil.copytree(PAPER / "results", tmp_path / "paper" / "results")
        made = write_report(tmp_path / "paper" / "results", tmp_path)
        assert made.read_text() == (PAPER.parent / "REPORT.md").read_text()
