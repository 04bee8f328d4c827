"""Sections of the experiments that have results of their own beside the main table."""

from collections.abc import Sequence

from experiments.paper.results import Result
from experiments.paper.sections.common import (
    Claim,
    Place,
    at_edits,
    by_name,
    claims_table,
    colour_of,
    draw,
    editor_of,
    failure,
    label_axes,
    last,
    mean,
    measured_table,
    points,
    shared_legend,
    variant_of,
)

Runs = dict[str, list[Result]]


def latest(place: Place, results: Sequence[Result], columns: Sequence[str]) -> list[str]:
    """Memorize-the-Latest [b]."""
    rows = by_name(results)
    exact = {name: runs for name, runs in rows.items() if variant_of(runs[0]) == "latest"}
    simplified = {name: runs for name, runs in rows.items() if variant_of(runs[0]) == "latest-simplified"}
    worst = [max(run.series("drift")[1]) for runs in exact.values() for run in runs if run.series("drift")[1]]
    claims = [
        Claim(
            "paper",
            "under the full normal equations the sum of steps is the one-time edit of the last batch",
            f"unmet part of the normal equations at most {max(worst):.1e}" if worst else "-",
            max(worst) <= 1e-8 if worst else None,
        ),
        _accumulates(simplified),
        _collapses(rows, exact, simplified),
    ]
    shown = ("drift", "efficacy_accuracy", "perplexity")
    with place.figure(
        "course", "Memorize-the-Latest: full normal equations and their simplification", columns=3
    ) as all_axes:
        for axes, column in zip(all_axes, shown, strict=True):
            for name, runs in rows.items():
                marks = len(at_edits(runs, column)) < 12
                colour = colour_of(editor_of(runs[0]))
                draw(axes, runs, column, label=name, colour=colour, variant=variant_of(runs[0]), marks=marks)
            label_axes(axes, column, log=column == "drift")
    caption = "Drift at every step, exact match of the last batch, and perplexity: solid in full, dashed simplified"
    return [claims_table(claims), measured_table(rows, columns), place.image("course", caption)]


def _accumulates(runs: Runs) -> Claim:
    text = "what the simplification leaves out (-sum D C0) accumulates"
    told, grows = [], []
    for name, many in runs.items():
        course = [point.mean for point in at_edits(many, "drift").values()]
        if len(course) > 2:
            told.append(f"{name} {course[1]:.2g} after two steps, {course[-1]:.2g} after {len(course)}")
            grows.append(course[-1] > 1.5 * course[1])
    return Claim("paper", text, "; ".join(told) or "-", all(grows) if grows else None)


def _collapses(rows: Runs, exact: Runs, simplified: Runs) -> Claim:
    text = "the model collapses under it"
    told, collapsed = [], []
    for name, many in simplified.items():
        full = exact.get(name.replace("latest-simplified", "latest"))
        if any(failure(run) for run in many):
            told.append(f"{name} stopped: {next(failure(run) for run in many if failure(run))}")
            collapsed.append(True)
            continue
        both = [(mean(which, "perplexity"), mean(which, "efficacy_accuracy")) for which in (many, full)]
        (perplexity, met), (full_perplexity, full_met) = both
        if None in (perplexity, met, full_perplexity, full_met):
            continue
        told.append(
            f"{name}: perplexity {perplexity:.2f} (in full {full_perplexity:.2f}), exact match {met:.1f} ({full_met:.1f})"
        )
        collapsed.append(met < full_met / 2 or perplexity > 2 * full_perplexity)  # type: ignore[operator]
    measured = "; ".join(told) + " (collapse: half the exact match, or twice the perplexity)" if told else "-"
    return Claim("paper", text, measured, all(collapsed) if collapsed else None)


def necessity(place: Place, results: Sequence[Result], columns: Sequence[str]) -> list[str]:
    """Necessity of regularisation [g]."""
    rows = by_name(results)
    sweeps = [name for name in dict.fromkeys(str(runs[0].what["sweep"]) for runs in rows.values()) if name]
    before = {name: runs for name, runs in rows.items() if name == "unedited"}
    blocks = [claims_table([claim for sweep in sweeps for claim in _swept(sweep, rows)])]
    for sweep in sweeps:
        own = {_named(runs[0]): runs for runs in rows.values() if runs[0].what["sweep"] == sweep}
        blocks.append(measured_table(before | own, columns, heading=sweep))
    blocks.append(_sweeps_figure(place, rows, sweeps))
    return blocks


def _named(run: Result) -> str:
    value = run.what["value"]
    return f"{'off' if value is None else value}, {variant_of(run)}"


def _strengths(rows: Runs, sweep: str, variant: str, column: str) -> dict[str, float]:
    """By value of the setting, a measure; runs without a result are left out."""
    chosen = [runs for runs in rows.values() if runs[0].what["sweep"] == sweep and variant_of(runs[0]) == variant]
    found = {str(runs[0].what["value"]): mean(runs, column) for runs in chosen}
    return {value: measure for value, measure in found.items() if measure is not None}


def _swept(sweep: str, rows: Runs) -> list[Claim]:
    aligned = _strengths(rows, sweep, "aligned", "score")
    if not aligned:
        return [Claim("here", f"{sweep}: the strength matters under alignment", "-", None)]
    best, worst = max(aligned, key=aligned.__getitem__), min(aligned, key=aligned.__getitem__)
    claims = [
        Claim(
            "here",
            f"{sweep}: the strength matters under alignment (more than 2 points of S over the sweep)",
            f"S from {aligned[worst]:.1f} (at {worst}) to {aligned[best]:.1f} (at {best})",
            aligned[best] - aligned[worst] > 2,
        )
    ]
    met, met_unaligned = (_strengths(rows, sweep, variant, "efficacy_accuracy") for variant in ("aligned", "unaligned"))
    gaps = {value: met_unaligned[value] - met[value] for value in met if value in met_unaligned}
    if gaps:
        told = ", ".join(f"{points(gap)} at {value}" for value, gap in gaps.items())
        claims.append(
            Claim(
                "here",
                f"{sweep}: what leaving the history out costs depends on it",
                f"points of exact match: {told}",
                max(gaps.values()) - min(gaps.values()) > 2,
            )
        )
    return claims


def _sweeps_figure(place: Place, rows: Runs, sweeps: Sequence[str]) -> str:
    columns = min(3, len(sweeps))
    lines = -(-len(sweeps) // columns)
    with place.figure(
        "sweeps", "Strength of each regulariser: S and exact match of the edits", rows=lines, columns=columns
    ) as all_axes:
        for axes, sweep in zip(all_axes, sweeps, strict=False):
            for column, colour, what in (("score", "#0072B2", "S"), ("efficacy_accuracy", "#D55E00", "exact match")):
                for variant, style in (("aligned", "-o"), ("unaligned", "--s")):
                    found = _strengths(rows, sweep, variant, column)
                    if found:
                        axes.plot(
                            list(found), list(found.values()), style, color=colour, markersize=4, label=f"{what}, {variant}"
                        )
            axes.set_title(sweep, fontsize="small")
            axes.set_xlabel(f"{sweep} (as set)")
            axes.set_ylabel("%")
            axes.tick_params(axis="x", rotation=30)
            axes.grid(alpha=0.3)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize="x-small")
        for axes in all_axes[len(sweeps) :]:
            axes.set_visible(False)
    return place.image("sweeps", "A panel a regulariser: blue S, orange exact match, solid aligned, dashed unaligned")


def conflicts(place: Place, results: Sequence[Result], columns: Sequence[str]) -> list[str]:
    """Conflicts [d]."""
    rows = by_name(results)
    policies = {name: runs for name, runs in rows.items() if name not in ("unaligned", "unedited")}
    errors = {name: found.mean for name, runs in policies.items() if (found := last(runs, "inconsistency"))}
    wrong = [
        line.get("wrong_facts") for runs in policies.values() for run in runs for line in run.lines if "wrong_facts" in line
    ]
    worst = max(errors, key=errors.__getitem__, default=None)
    claims = [
        Claim(
            "paper",
            "the final state is the one-time edit of what should hold, as if nothing else had been edited (Prop. 3.5)",
            f"relative difference at most {errors[worst]:.1e} ({worst})" if worst else "-",
            errors[worst] <= 1e-10 if worst else None,
        ),
        Claim(
            "here",
            "each policy leaves exactly the facts that it should",
            f"{sum(x or 0 for x in wrong)} facts too many or too few in {len(wrong)} runs" if wrong else "-",
            not any(wrong) if wrong else None,
        ),
        _naive(rows),
    ]
    shown = ("holding_accuracy", "outdated_accuracy", "restored_accuracy")
    with place.figure("policies", "After corrections, contradictions and retractions, by policy") as (axes,):
        names = list(rows)
        for number, (column, colour, hatch) in enumerate(
            zip(shown, ("#0072B2", "#D55E00", "#009E73"), ("", "//", ".."), strict=True)
        ):
            bars = [(at, value) for at, name in enumerate(names) if (value := last(rows[name], column))]
            where = [at + 0.27 * (number - 1) for at, _ in bars]
            axes.bar(
                where,
                [v.mean for _, v in bars],
                0.25,
                yerr=[v.deviation or 0 for _, v in bars],
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=column.split("_")[0],
                capsize=2,
            )
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("policy")
        axes.set_ylabel("facts answered so, exact match (%)")
        shared_legend([axes], 3)
        axes.grid(alpha=0.3, axis="y")
    caption = "Answers that should hold, answers that no longer should, and original objects of facts taken back"
    return [claims_table(claims), measured_table(rows, columns, heading="policy"), place.image("policies", caption)]


def _naive(rows: Runs) -> Claim:
    text = "naive repetition leaves a state that is no edit of what should hold"
    found = mean(rows.get("unaligned"), "inconsistency")
    return Claim(
        "paper", text, "-" if found is None else f"relative difference {found:.2f}", None if found is None else found > 0.01
    )


def horizon(place: Place, results: Sequence[Result], columns: Sequence[str]) -> list[str]:
    """Horizon [h]."""
    rows = by_name(results)
    solver = {name: runs for name, runs in rows.items() if runs[0].what["part"] == "solver"}
    model = {name: runs for name, runs in rows.items() if runs[0].what["part"] != "solver"}
    claims = [_collapse(name, runs) for name, runs in solver.items()]
    claims += [_apart(solver, "first_residual", "less of the first constraints is unmet when aligned, at every step")]
    blocks = [claims_table(claims), measured_table(solver, columns)]
    if solver:
        with place.figure("solver", "One edit a step on stored constraints: solver alone", columns=3) as all_axes:
            for axes, column in zip(all_axes, ("first_residual", "all_residual", "kernel_growth"), strict=True):
                for runs in solver.values():
                    variant = variant_of(runs[0])
                    label = "unaligned = latest-simplified" if variant == "unaligned" else variant
                    draw(
                        axes,
                        runs,
                        column,
                        label=label,
                        colour="#0072B2" if variant == "aligned" else "#D55E00",
                        variant=variant,
                        marks=False,
                    )
                label_axes(axes, column, "steps of one edit")
        blocks.append(
            place.image(
                "solver",
                "What is unmet of the first constraints and of all so far, and the kernel's norm: solid aligned, dashed "
                "unaligned",
            )
        )
    if model:
        blocks.append(
            measured_table(
                model,
                ("efficacy", "specificity", "score", "efficacy_accuracy", "retention_accuracy", "perplexity", "update_norm"),
            )
        )
        with place.figure("model", "Small steps end to end", columns=3) as all_axes:
            for axes, column in zip(all_axes, ("efficacy_accuracy", "retention_accuracy", "perplexity"), strict=True):
                for runs in model.values():
                    variant = variant_of(runs[0])
                    draw(
                        axes,
                        runs,
                        column,
                        label=variant,
                        colour="#0072B2" if variant == "aligned" else "#D55E00",
                        variant=variant,
                    )
                label_axes(axes, column)
        blocks.append(
            place.image(
                "model",
                "Exact match of the edits so far, of the first ones, and perplexity: solid aligned, dashed unaligned",
            )
        )
    return blocks


COLLAPSE = 50.0
"""Percent of the first constraints' residuals unmet from which on a variant counts as collapsed."""


def _collapse(name: str, runs: Sequence[Result]) -> Claim:
    course = at_edits(runs, "first_residual")
    text = f"{name}: the first constraints stay met (less than {COLLAPSE:.0f} % of their residuals unmet) to the last step"
    if not course:
        return Claim("here", text, "-", None)
    over = next((int(step) for step, point in course.items() if point.mean >= COLLAPSE), None)
    final = list(course)[-1]
    told = f"{course[final].mean:.0f} % unmet after {int(final):,} steps"
    return Claim("here", text, f"{told}; past it from step {over:,} on" if over else told, over is None)


def _apart(rows: Runs, column: str, text: str) -> Claim:
    courses = {variant_of(runs[0]): at_edits(runs, column) for runs in rows.values()}
    if not {"aligned", "unaligned"} <= set(courses):
        return Claim("paper", text, "-", None)
    both = [
        (step, courses["aligned"][step].mean, courses["unaligned"][step].mean)
        for step in courses["aligned"]
        if step in courses["unaligned"]
    ]
    better = [step for step, a, b in both if a < b]
    return Claim(
        "paper", text, f"at {len(better)} of {len(both)} measured steps", len(better) == len(both) if both else None
    )


def shift(place: Place, results: Sequence[Result], columns: Sequence[str]) -> list[str]:
    """Representation shift [e]."""
    rows = by_name(results)
    gaps = {}
    for editor in dict.fromkeys(editor_of(runs[0]) for runs in rows.values()):
        pair = [mean(rows.get(f"{editor}-{variant}"), "shift_prompt") for variant in ("unaligned", "aligned")]
        if None not in pair:
            gaps[editor] = (pair[0], pair[1])
    told = ", ".join(f"{editor} {a:.3f} against {b:.3f}" for editor, (a, b) in gaps.items())
    claim = Claim(
        "here",
        "hidden states of prompts that no edit is about shift more without the history",
        f"mean relative shift at the prompt's last token, unaligned against aligned: {told}" if told else "-",
        all(a > b for a, b in gaps.values()) if gaps else None,  # type: ignore[operator]
    )
    blocks = [claims_table([claim]), measured_table(rows, columns)]
    for method, name in (("pca", "principal components of the states before"), ("tsne", "t-SNE of both together")):
        there = [runs[0] for runs in rows.values() if any(f"{method}_before_prompt" in line for line in runs[0].lines)]
        if not there:
            continue
        width = min(3, len(there))
        title = f"Hidden states at the prompt's last token, {name}"
        with place.figure(method, title, rows=-(-len(there) // width), columns=width) as all_axes:
            for axes, run in zip(all_axes, there, strict=False):
                line = next(line for line in run.lines if f"{method}_before_prompt" in line)
                for when, colour, mark in (("before", "#0072B2", "o"), ("after", "#D55E00", "x")):
                    x, y = zip(*line[f"{method}_{when}_prompt"], strict=True)
                    axes.scatter(x, y, s=14, color=colour, marker=mark, label=when, alpha=0.7)
                axes.set_title(run.name, fontsize="small")
                axes.set_xlabel("first axis")
                axes.set_ylabel("second axis")
                axes.legend(fontsize="x-small")
            for axes in all_axes[len(there) :]:
                axes.set_visible(False)
        blocks.append(place.image(method, f"{title}: circles before, crosses after (seed {there[0].seed})"))
    return blocks
