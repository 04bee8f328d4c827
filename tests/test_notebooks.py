"""Every notebook runs from top to bottom, shows numbers that hold and pictures that can be read, and is stored as it ran."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
LARGEST = 600_000
"""Bytes of a notebook with its pictures."""

PLACES = re.compile(r"/(?:home|root|tmp|work|Users)/\w*")
"""Paths that are one machine's."""

Names = Mapping[str, Any]


def quickstart(names: Names, printed: str) -> None:
    assert "original again: True" in printed
    assert names["kj"].equivalence_error(names["second"]) <= 1e-10
    assert names["kj"].equivalence_error(names["forgetful"]) > 1e-2
    assert names["kj"].relative_error(names["fewer"].delta, names["fewer"].one_time()) <= 1e-11
    new = {name: found[:, 1] for name, found in names["probability"].items()}
    start, first, second, fewer, none = new.values()
    assert (
        max(start.max(), first[20:].max(), fewer[:30].max(), none.max()) < 0.2 < 0.8 < min(first[:20].mean(), second.mean())
    )
    assert fewer[30:].mean() > 0.8, "what was not taken back is still there"


def argument(names: Names, printed: str) -> None:
    _equivalence_and_counter_examples(names)
    _compensation_and_regularizers(names)
    _language_model(names)


def _equivalence_and_counter_examples(names: Names) -> None:
    assert set(names["parameters"]) == set(names["solve"].EDITORS)
    for (name, mode), error in names["equivalence"].items():
        assert error <= 1e-10 if mode == "aligned" else error > 1e-2, (name, mode)
    drift = {mode: run.series("drift") for mode, run in names["runs"].items()}
    assert max(*drift["aligned"], *drift["latest"]) <= 1e-11
    assert min(*drift["unaligned"][1:], *drift["latest-simplified"][1:]) > 1e-2
    assert drift["latest-simplified"][-1] > 3 * drift["latest-simplified"][4], "the drift grows"
    assert names["dropped_term"] <= 1e-10
    missing = {mode: names["missing"](run.update) for mode, run in names["runs"].items()}
    assert missing["aligned"].max() < 0.4 < 0.8 < missing["unaligned"][:5].min(), "what was forgotten is the old facts"


def _compensation_and_regularizers(names: Names) -> None:
    for (name, compensated), run in names["processed"].items():
        excess, invariant = max(run.series("excess")), max(run.series("invariant"))
        assert max(excess, invariant) <= 1e-10 if compensated else min(excess, invariant) > 1e-2, (name, compensated)
        exact = names["processed"][name, True].series("distance")[-1]
        assert compensated or run.series("distance")[-1] > 2 * exact, name
    for name, (steps, alone) in names["regularized"].items():
        assert steps <= 1e-6, name
        assert alone > 1e-2, name


def _language_model(names: Names) -> None:
    far = names["from_one_time"]
    assert max(far["aligned"]) <= 1e-10
    assert min(far["unaligned"][1:]) > 1e-2
    assert far["unaligned"][0] <= 1e-10, "one batch has no history to leave out"
    means = [drift.mean for drift in names["drift"].values()]
    assert means[0] < 1e-5 < 1e-3 < means[1] < means[2] < 5e-2, "keys drift above the lowest edited layer"
    assert names["at_once"].mean() > 0.9
    assert names["said"][-1, names["at_once"]].mean() > 0.9
    sizes = [[names["size"](then, layer) for then in names["sequences"]["aligned"]] for layer in names["settings"].layers]
    assert (np.diff(sizes) > 0).all(), "updates grow with what they hold"


def conflicts(names: Names, printed: str) -> None:
    error = names["kj"].equivalence_error
    assert names["restored"] <= 1e-11
    assert max(error(names["mixed"]), *names["stands"].values()) <= 1e-10
    winners = [int(np.argmax(row)) for row in names["shown"].values()]
    assert winners == [0, 1, 1, 2, 0, 1], "original, first edit, first edit, contradiction, original, first edit"
    assert min(max(row) for row in names["shown"].values()) > 0.8
    merged = np.diff(names["averaged"], axis=0)
    assert (merged[:, 1] < 0).all(), "the more the contradiction weighs, the less likely the first edit"
    assert (merged[:, 2] > 0).all()
    history = names["history"]
    assert history["latest"].argmax(1).tolist() == [0, 1, 2, 3, 4]
    assert history["first"].argmax(1).tolist() == [0, 1, 1, 1, 1]
    assert history["latest"][4, 4] > 0.9 > history["keep"][4, 4]
    assert [len(some[-1].facts) for some in names["streams"].values()] == [4, 4, 16]
    assert names["apart"] <= 1e-10
    assert names["original"]
    assert "undone, the same again: True" in printed
    originals = {name: found[:2, 0].min() for name, found in names["per_fact"].items()}
    assert min(originals["two taken\nback"], originals["all taken\nback"]) > 0.8
    assert max(originals["corrected"], originals["undone"]) < 0.2


def bring_your_own(names: Names, printed: str) -> None:
    assert names["kj"].equivalence_error(names["session"]) <= 1e-10
    before, after = names["likely"].values()
    assert before[:, 0].min() > 0.8 > 0.2 > before[:, 1].max()
    assert after[:, 1].min() > 0.8 > 0.2 > after[:, 0].max()
    assert "has 0 slots; put exactly one {}" in printed
    assert "'target' is empty" in printed
    assert "(asked for" not in printed, "every fact and paraphrase is said freely"
    assert names["same"]
    assert printed.rstrip().endswith("henrik taken back: Yennic")


CHECKS: Mapping[str, Callable[[Names, str], None]] = {
    "argument": argument,
    "bring_your_own": bring_your_own,
    "conflicts": conflicts,
    "quickstart": quickstart,
}
"""Notebook -> what must hold for its names and what it printed."""


def code_cells(content: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [("".join(cell["source"]), cell) for cell in content["cells"] if cell["cell_type"] == "code"]


def unreadable(figure: Figure) -> list[str]:
    """What a reader would miss in the picture."""
    problems = []
    for number, axes in enumerate(figure.axes, start=1):
        problems += [f"axes {number}: no {name} label" for name in "xy" if not getattr(axes, f"get_{name}label")()]
        several = len({artist.get_label() for artist in axes.lines if not artist.get_label().startswith("_")}) > 1
        if several and axes.get_legend() is None:
            problems.append(f"axes {number}: several lines and no legend")
    return problems


def not_as_it_ran(content: Mapping[str, Any]) -> list[str]:
    """What shows that the stored notebook was not executed from top to bottom, or where it was executed."""
    problems = []
    for number, (source, cell) in enumerate(code_cells(content), start=1):
        outputs = cell["outputs"]
        if cell["execution_count"] != number:
            problems.append(f"code cell {number} was not executed in order")
        if any(out["output_type"] == "error" or out.get("name") == "stderr" for out in outputs):
            problems.append(f"code cell {number} shows an error or a warning")
        if "plt.show()" in source and not any("image/png" in out.get("data", {}) for out in outputs):
            problems.append(f"code cell {number} shows no picture")
    shown = [out for _, cell in code_cells(content) for out in cell["outputs"] if "image/png" not in out.get("data", {})]
    text = json.dumps([shown, [cell["source"] for cell in content["cells"]]])
    problems += [
        f"names a place on one machine: {place}" for place in re.findall(r"/(?:home|root|tmp|work|Users)/\w*", text)
    ]
    return problems


@pytest.fixture(autouse=True)
def pictures() -> Iterator[None]:
    """Pictures are drawn into memory, with no window, and nothing of their style remains."""
    backend = mpl.get_backend()
    plt.switch_backend("agg")
    with plt.rc_context({"figure.max_open_warning": 0}):
        yield
        plt.close("all")
    plt.switch_backend(backend)


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert notebook.stem in CHECKS, f"{notebook.name} shows numbers that nothing checks: add it to CHECKS"
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = code_cells(json.loads(notebook.read_text(encoding="utf-8")))
    for number, (source, _) in enumerate(cells, start=1):
        exec(compile(source, f"{notebook.name}, code cell {number}", "exec"), names)
    CHECKS[notebook.stem](names, capsys.readouterr().out)
    assert len(plt.get_fignums()) == sum("plt.show()" in source for source, _ in cells)
    assert [problem for number in plt.get_fignums() for problem in unreadable(plt.figure(number))] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_as_it_ran(notebook: Path) -> None:
    assert notebook.stat().st_size < LARGEST
    assert not_as_it_ran(json.loads(notebook.read_text(encoding="utf-8"))) == []


def test_every_check_has_its_notebook() -> None:
    assert set(CHECKS) == {notebook.stem for notebook in NOTEBOOKS}


def test_the_argument_has_its_pictures() -> None:
    content = json.loads(next(path for path in NOTEBOOKS if path.stem == "argument").read_text(encoding="utf-8"))
    drawn: dict[str, int] = {}
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and source.startswith("## "):
            section = source.splitlines()[0]
            drawn[section] = 0
        elif "plt.show()" in source:
            drawn[section] += 1
    assert drawn == {
        "## A world to edit": 0,
        "## 1. The equivalence": 1,
        "## 2. The counter-example": 2,
        "## 3. Post-processing, and its compensation": 1,
        "## 4. Any convex regulariser": 0,
        "## 5. In a language model": 2,
    }


def test_negative_control_a_picture_without_labels_is_noticed() -> None:
    figure, axes = plt.subplots()
    axes.plot([1, 2], label="a")
    axes.plot([2, 1], label="b")
    assert unreadable(figure) == ["axes 1: no x label", "axes 1: no y label", "axes 1: several lines and no legend"]
    axes.set(xlabel="x", ylabel="y")
    axes.legend()
    assert unreadable(figure) == []


def test_negative_control_a_notebook_that_was_not_executed_is_noticed() -> None:
    place = "/".join(["", "home", "me"])
    warning = {"output_type": "stream", "name": "stderr", "text": [f"{place}: a warning"]}
    cells = [
        {"cell_type": "code", "execution_count": 1, "outputs": [warning], "source": ["plt.show()"]},
        {"cell_type": "code", "execution_count": None, "outputs": [], "source": ["1"]},
    ]
    assert not_as_it_ran({"cells": cells}) == [
        "code cell 1 shows an error or a warning",
        "code cell 1 shows no picture",
        "code cell 2 was not executed in order",
        "names a place on one machine: /home/me",
    ]
