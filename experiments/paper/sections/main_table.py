"""The main table, and what is read off its lines: norms, ripple, drift, ability."""

from collections.abc import Sequence

from experiments.paper.results import Result
from experiments.paper.sections.common import (
    LINES,
    Claim,
    Place,
    at_edits,
    by_name,
    claims_table,
    colour_of,
    draw,
    editor_of,
    label_axes,
    last,
    mean,
    measured_table,
    points,
    shared_legend,
    variant_of,
)

Runs = dict[str, list[Result]]


def section(place: Place, results: Sequence[Result], columns: Sequence[str]) -> list[str]:
    """The main table [a]."""
    rows = by_name(results)
    return [
        claims_table(_claims(rows)),
        measured_table(rows, columns),
        _editors_figure(place, rows),
        _course_figure(place, rows),
    ]


def _claims(rows: Runs) -> list[Claim]:
    sequences = {name: runs for name, runs in rows.items() if variant_of(runs[0]) == "aligned"}
    # What a sequence is compared with is D*(S): one-time edits that are post-processed are something else (Algorithm 1).
    once = {name: runs for name, runs in rows.items() if variant_of(runs[0]) == "one-time" and _is_plain(runs[0])}
    aligned = sequences | once
    return [
        _same(aligned, "every aligned editor and every one-time edit that is not post-processed"),
        _same(
            {name: runs for name, runs in aligned.items() if editor_of(runs[0]) != "ridge"}, "the same without plain ridge"
        ),
        _equivalence(sequences),
        _unaligned(rows, "score"),
        _unaligned(rows, "efficacy_accuracy"),
        _compensation(rows),
        _quality(sequences),
        _retention(sequences),
    ]


def _is_plain(run: Result) -> bool:
    return run.what["settings"]["post"] is None


def _same(runs: Runs, which: str) -> Claim:
    scores = {name: found for name, many in runs.items() if (found := mean(many, "score")) is not None}
    text = f"{which}: within 2 points of each other on S"
    if len(scores) < 2:
        return Claim("issue", text, "-", None)
    low, high = min(scores, key=scores.__getitem__), max(scores, key=scores.__getitem__)
    width = scores[high] - scores[low]
    return Claim("issue", text, f"{width:.1f} points: {low} {scores[low]:.1f}, {high} {scores[high]:.1f}", width <= 2)


def _equivalence(runs: Runs) -> Claim:
    exact = [run.last("distance") for many in runs.values() for run in many if _is_plain(run)]
    found = [value for value in exact if value is not None]
    text = "the sum of aligned steps is the one-time edit of the same constraints (Lemma 3.1, Prop. 3.2)"
    if not found:
        return Claim("paper", text, "-", None)
    return Claim("paper", text, f"relative difference at most {max(found):.1e}, {len(found)} runs", max(found) <= 1e-10)


def _pairs(rows: Runs, left: str, right: str, column: str) -> dict[str, float]:
    """By editor, the measure of one variant less that of another."""
    found = {}
    for editor in dict.fromkeys(editor_of(runs[0]) for runs in rows.values()):
        a, b = (mean(rows.get(f"{editor}-{variant}"), column) for variant in (left, right))
        if a is not None and b is not None:
            found[editor] = a - b
    return found


def _unaligned(rows: Runs, column: str) -> Claim:
    what = {"score": "S", "efficacy_accuracy": "exact match of the edits"}[column]
    text = f"unaligned editors end clearly below aligned ones ({what}; the paper reports 40 points on Llama-3)"
    gaps = _pairs(rows, "unaligned", "aligned", column)
    if not gaps:
        return Claim("paper", text, "-", None)
    told = ", ".join(f"{editor} {points(gap)}" for editor, gap in gaps.items())
    failed = sorted(name for name, runs in rows.items() if name.endswith("-unaligned") and mean(runs, column) is None)
    told += f"; without result: {', '.join(failed)}" if failed else ""
    return Claim("paper", text, f"points, unaligned less aligned: {told}", max(gaps.values()) < -2)


def _compensation(rows: Runs) -> Claim:
    text = "compensation is worth more for RECT than for PRUNE"
    worth = {column: _pairs(rows, "aligned", "uncompensated", column) for column in ("score", "efficacy_accuracy")}
    if not {"rect", "prune"} <= set(worth["score"]):
        return Claim("paper", text, "-", None)
    told = "; ".join(
        f"{what}: RECT {points(worth[column]['rect'])}, PRUNE {points(worth[column]['prune'])}"
        for column, what in (("score", "S"), ("efficacy_accuracy", "exact match"))
    )
    holds = worth["score"]["rect"] > worth["score"]["prune"]
    return Claim("paper", text, f"points gained by it, {told}", holds)


def _quality(runs: Runs) -> Claim:
    text = "aligned sequences: efficacy >= 98, generalization >= 95, specificity >= 90"
    bounds = {"efficacy": 98, "generalization": 95, "specificity": 90}
    short = []
    for name, many in runs.items():
        found = {column: value for column in bounds if (value := mean(many, column)) is not None}
        low = [f"{column} {value:.1f}" for column, value in found.items() if value < bounds[column]]
        if low or len(found) < len(bounds):
            short.append(f"{name}: {', '.join(low) or 'no result'}")
    if not runs:
        return Claim("issue", text, "-", None)
    return Claim("issue", text, "short of it: " + "; ".join(short) if short else f"all {len(runs)} editors", not short)


def _retention(runs: Runs) -> Claim:
    text = "aligned sequences: efficacy of the first edits after all of them within 1 point of what it was at first"
    losses = {}
    for name, many in runs.items():
        course = at_edits(many, "retention")
        if len(course) > 1:
            values = [point.mean for point in course.values()]
            losses[name] = values[0] - values[-1]
    if not losses:
        return Claim("issue", text, "-", None)
    worst = max(losses, key=losses.__getitem__)
    return Claim("issue", text, f"largest loss {losses[worst]:.1f} points ({worst})", losses[worst] <= 1)


def _editors_figure(place: Place, rows: Runs) -> str:
    editors = list(dict.fromkeys(editor_of(runs[0]) for runs in rows.values() if editor_of(runs[0]) != "unedited"))
    shown = ("score", "efficacy_accuracy", "specificity_accuracy")
    with place.figure(
        "editors", "Every editor after all edits: mean over seeds, bars of one standard deviation", columns=3
    ) as all_axes:
        for axes, column in zip(all_axes, shown, strict=True):
            for number, variant in enumerate(("aligned", "one-time", "uncompensated", "unaligned")):
                there = [
                    (at, found)
                    for at, editor in enumerate(editors)
                    if (found := last(rows.get(f"{editor}-{variant}", []), column))
                ]
                if there:
                    axes.errorbar(
                        [at + 0.16 * (number - 1.5) for at, _ in there],
                        [found.mean for _, found in there],
                        [found.deviation or 0 for _, found in there],
                        fmt=LINES[variant][1],
                        color=("#0072B2", "#009E73", "#E69F00", "#D55E00")[number],
                        capsize=2,
                        label=variant,
                    )
            axes.set_xticks(range(len(editors)), editors, rotation=20)
            axes.set_xlim(-0.5, len(editors) - 0.5)
            label_axes(axes, column, "editor")
    return place.image("editors", "Quality after all edits, by editor and by how the sequence is run")


def _course_figure(place: Place, rows: Runs) -> str:
    editors = list(dict.fromkeys(editor_of(runs[0]) for runs in rows.values() if editor_of(runs[0]) != "unedited"))
    with place.figure("course", "Exact match of the edits so far", columns=max(1, len(editors))) as all_axes:
        for axes, editor in zip(all_axes, editors, strict=False):
            for variant in ("aligned", "uncompensated", "unaligned"):
                runs = rows.get(f"{editor}-{variant}", [])
                draw(axes, runs, "efficacy_accuracy", label=variant, colour=colour_of(editor), variant=variant)
            axes.set_title(editor, fontsize="small")
            label_axes(axes, "efficacy_accuracy")
    return place.image(
        "course", "Exact match of the edits so far: solid aligned, dotted without compensation, dashed unaligned"
    )


def _sequences(results: Sequence[Result]) -> Runs:
    rows = by_name(results)
    return {name: runs for name, runs in rows.items() if variant_of(runs[0]) != "one-time"}


def _courses(
    place: Place, results: Sequence[Result], columns: Sequence[str], name: str, title: str, log: Sequence[str] = ()
) -> str:
    rows = {key: runs for key, runs in _sequences(results).items() if variant_of(runs[0]) != "uncompensated"}
    shown = [column for column in columns if any(len(at_edits(runs, column)) > 1 for runs in rows.values())]
    if not shown:
        return ""
    with place.figure(name, title, columns=len(shown), height=4.4) as all_axes:
        for axes, column in zip(all_axes, shown, strict=True):
            for key, runs in rows.items():
                editor, variant = editor_of(runs[0]), variant_of(runs[0])
                marks = len(at_edits(runs, column)) < 12
                draw(axes, runs, column, label=key, colour=colour_of(editor), variant=variant, marks=marks)
            label_axes(axes, column, log=column in log, legend=False)
        shared_legend(all_axes, columns=max(2, 2 * len(shown)))
    return place.image(name, f"{title}: solid aligned, dashed unaligned, a colour an editor")


def norms(place: Place, results: Sequence[Result], columns: Sequence[str]) -> list[str]:
    """Norms [f]."""
    rows = _sequences(results)
    grown = _pairs(rows, "unaligned", "aligned", "update_norm")
    sums = {editor: mean(rows.get(f"{editor}-aligned"), "update_norm") for editor in grown}
    told = ", ".join(f"{editor} x{1 + grown[editor] / sums[editor]:.2f}" for editor in grown if sums[editor])  # type: ignore[operator]
    claim = Claim(
        "here",
        "norms of unaligned updates outgrow those of aligned ones",
        f"|sum of updates| at the end, unaligned over aligned: {told}" if told else "-",
        min(grown.values()) > 0 if grown else None,
    )
    return [
        claims_table([claim]),
        measured_table(rows, columns),
        _courses(place, results, columns, "course", "Norms over the sequence", ("step_norm", "update_norm")),
    ]


def ripple(place: Place, results: Sequence[Result], columns: Sequence[str]) -> list[str]:
    """Other facts of the edited subject [j]."""
    rows = by_name(results)
    gaps = _pairs(rows, "aligned", "one-time", "same_subject_accuracy")
    before = mean(rows.get("unedited"), "same_subject_accuracy")
    told = ", ".join(f"{editor} {points(gap)}" for editor, gap in gaps.items())
    claim = Claim(
        "here",
        "an edit leaves the other facts of its subject alone",
        f"unedited {before:.1f} %; in points, sequence less one-time edit: {told}" if before is not None and told else "-",
        None
        if before is None or not gaps
        else min(mean(r, "same_subject_accuracy") or 0 for r in rows.values()) > before - 2,
    )
    return [
        claims_table([claim]),
        measured_table(rows, columns),
        _courses(place, results, columns[:1], "course", "Other facts of the edited subjects"),
    ]


def drift(place: Place, results: Sequence[Result], columns: Sequence[str]) -> list[str]:
    """Key drift [i]."""
    rows = {name: runs for name, runs in by_name(results).items() if last(runs, "key_drift")}
    changed = {name: value for name, runs in rows.items() if (value := mean(runs, "reread_change")) is not None}
    gains = {
        name: (mean(rows[name], "reread_efficacy_accuracy") or 0) - (mean(rows[name], "efficacy_accuracy") or 0)
        for name in changed
    }
    told = "; ".join(
        f"{name}: the update changes by {changed[name]:.2f}, exact match by {points(gains[name])}" for name in changed
    )
    claim = Claim(
        "here",
        "keys recorded once can stand for the keys that the edited model makes (reading them again gains under 1 point)",
        told or "-",
        None if not gains else max(gains.values()) < 1,
    )
    return [claims_table([claim]), measured_table(rows, columns) if rows else "No run measured the drift of its keys."]


def ability(place: Place, results: Sequence[Result], columns: Sequence[str]) -> list[str]:
    """General ability [c]."""
    rows = _sequences(results)
    gaps = _pairs(rows, "unaligned", "aligned", "untouched_accuracy")
    told = ", ".join(f"{editor} {points(gap)}" for editor, gap in gaps.items())
    claim = Claim(
        "paper",
        "leaving the history out costs general ability, until the model collapses",
        f"facts of unedited subjects, in points, unaligned less aligned: {told}" if told else "-",
        max(gaps.values()) < 0 if gaps else None,
    )
    return [
        claims_table([claim]),
        measured_table(rows, columns),
        _courses(place, results, columns, "course", "What editing costs the rest"),
    ]
