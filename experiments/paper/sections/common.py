"""What sections share: means over seeds, Markdown tables, claims, and figures that look alike."""

import contextlib
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from experiments.paper.measures import COLUMNS
from experiments.paper.results import Result

SCIENTIFIC = {"distance", "drift", "inconsistency"}

COLOURS = {
    "unedited": "#000000",
    "memit": "#0072B2",
    "alphaedit": "#E69F00",
    "prune": "#009E73",
    "rect": "#CC79A7",
    "ridge": "#D55E00",
}
"""Okabe and Ito's, which people tell apart whatever their colour vision; lines differ in dashes and marks, too."""
LINES = {
    "aligned": ("-", "o"),
    "one-time": ("-.", "D"),
    "uncompensated": (":", "^"),
    "unaligned": ("--", "s"),
    "latest": ("-", "o"),
    "latest-simplified": ("--", "s"),
}


@dataclass(frozen=True)
class Place:
    """Where a section's figures go, and how the report names them.

    Attributes:
        folder: of the figures.
        link: the folder as seen from the report.
        stem: begins every file name.
    """

    folder: Path
    link: str
    stem: str

    def image(self, name: str, caption: str) -> str:
        return f"![{caption}]({self.link}/{self.stem}-{name}.png)\n\n*{caption}*"

    @contextlib.contextmanager
    def figure(self, name: str, title: str, *, rows: int = 1, columns: int = 1, height: float = 3.6) -> Iterator[list[Any]]:
        """Axes side by side, written as a PNG in the end."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        self.folder.mkdir(parents=True, exist_ok=True)
        size = (max(6.4, 3.9 * columns), height * rows + 0.4)
        made, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        made.suptitle(title, fontsize="medium")
        try:
            yield list(axes.flat)
            path = self.folder / f"{self.stem}-{name}.png"
            made.savefig(path, dpi=80, metadata={"Software": None}, pil_kwargs={"optimize": True})
        finally:
            pyplot.close(made)


class Spread(NamedTuple):
    """Mean and sample standard deviation over n seeds; the latter None for one."""

    mean: float
    deviation: float | None
    n: int


def spread_of(values: Iterable[float | None]) -> Spread | None:
    """Over the values that are there; None for none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def text_of(spread: Spread | None, column: str) -> str:
    """A table's cell: mean ± standard deviation, in the column's own style."""
    if spread is None:
        return "-"
    if column in SCIENTIFIC:
        return f"{spread.mean:.1e}"
    style = ".1f" if COLUMNS[column].unit == "%" else ".3g"
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:{style}}"
    return f"{spread.mean:{style}}{deviation}"


def by_name(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Runs of all seeds by name: the unedited model first, then by editor and by how the sequence is run."""
    found: dict[str, list[Result]] = {}

    def place(result: Result) -> tuple[int, int]:
        named = (result.what.get("editor"), COLOURS), (result.what.get("variant"), LINES)
        editor, variant = (list(known).index(str(name)) if name in known else len(known) for name, known in named)
        return editor, variant

    for result in sorted(results, key=place):
        found.setdefault(result.name, []).append(result)
    return found


def last(runs: Sequence[Result], column: str) -> Spread | None:
    """A measure at the end, over seeds; runs that stopped before have none."""
    return spread_of(run.last(column) for run in runs if failure(run) is None)


def mean(runs: Sequence[Result] | None, column: str) -> float | None:
    """Its mean."""
    found = last(runs or (), column)
    return None if found is None else found.mean


def measured_table(rows: Mapping[str, Sequence[Result]], columns: Sequence[str], heading: str = "run") -> str:
    """A line a run: each measure at its end, mean ± standard deviation over seeds; failed runs say so."""
    there = [name for name in columns if any(last(runs, name) for runs in rows.values())]
    head = [heading, "seeds", *(f"{COLUMNS[name].label}{', %' if COLUMNS[name].unit else ''}" for name in there)]
    lines = []
    for name, runs in rows.items():
        failures = [reason for run in runs if (reason := failure(run)) is not None]
        if len(failures) == len(runs):
            lines.append([name, str(len(runs)), f"no result: {failures[0]}", *[""] * (len(there) - 1)])
            continue
        told = f" ({len(failures)} of {len(runs)} without a result: {failures[0]})" if failures else ""
        lines.append([name + told, str(len(runs)), *(text_of(last(runs, column), column) for column in there)])
    return table(head, lines)


def failure(run: Result) -> str | None:
    """Why a run stopped before its end."""
    return next((str(line["failed"]) for line in run.lines if "failed" in line), None)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


@dataclass(frozen=True)
class Claim:
    """What is claimed, by whom, and what was measured; `holds` None where nothing was measured."""

    source: str
    text: str
    measured: str
    holds: bool | None


def claims_table(claims: Sequence[Claim]) -> str:
    """The claims beside what was measured."""
    said = {True: "yes", False: "**no**", None: "not measured"}
    rows = [[claim.source, claim.text, claim.measured, said[claim.holds]] for claim in claims]
    return table(["said by", "claim", "measured here", "agrees"], rows)


def at_edits(runs: Sequence[Result], column: str) -> dict[float, Spread]:
    """A measure over the number of edits: mean and deviation over the seeds that have it."""
    points: dict[float, list[float]] = {}
    for run in runs:
        for x, y in zip(*run.series(column), strict=True):
            points.setdefault(x, []).append(y)
    return {x: found for x, ys in sorted(points.items()) if (found := spread_of(ys)) is not None}


BASELINES = ("specificity", "same_subject", "untouched", "type", "ability", "perplexity")
"""Beginnings of the measures whose unedited value is shown as a line; of the others it is next to 0."""


def draw(
    axes: Any, runs: Sequence[Result], column: str, *, label: str, colour: str, variant: str, marks: bool = True
) -> None:
    """A line over the number of edits, with a band of one standard deviation; across the axes for the unedited model."""
    if variant == "unedited":
        before = mean(runs, column)
        if before is not None and column.startswith(BASELINES):
            axes.axhline(before, color="#888888", linestyle=(0, (1, 3)), label=label)
        return
    points = at_edits(runs, column)
    if not points:
        return
    dashes, mark = LINES.get(variant, ("-", "o"))
    x, y = list(points), [point.mean for point in points.values()]
    axes.plot(x, y, dashes, marker=mark if marks else None, markersize=4, color=colour, label=label)
    low = [point.mean - (point.deviation or 0) for point in points.values()]
    high = [point.mean + (point.deviation or 0) for point in points.values()]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def label_axes(axes: Any, column: str, x: str = "edits so far", *, log: bool = False, legend: bool = True) -> None:
    """The measure's name and unit at the side, a grid, a legend where there is something to tell apart."""
    item = COLUMNS[column]
    axes.set_xlabel(x)
    axes.set_ylabel(f"{item.label}{' (%)' if item.unit == '%' else ''}")
    if log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small")


def shared_legend(all_axes: Sequence[Any], columns: int) -> None:
    """One legend below all panels, where every one has the same lines."""
    named: dict[str, Any] = {}
    for axes in all_axes:
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    all_axes[0].figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns, fontsize="small")


def editor_of(run: Result) -> str:
    return str(run.what["editor"])


def variant_of(run: Result) -> str:
    return str(run.what["variant"])


def colour_of(editor: str) -> str:
    return COLOURS.get(editor, "#56B4E9")


def points(value: float) -> str:
    """A difference of percentages in words."""
    return f"{value:+.1f}"
