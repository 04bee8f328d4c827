"""REPORT.md, its tables and its figures, from stored results and a person's comments alone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.paper.config import FOLDER, read_config
from experiments.paper.registry import EXPERIMENTS
from experiments.paper.results import Result, read_results
from experiments.paper.sections import main_table, others
from experiments.paper.sections.common import Place, failure
from experiments.paper.stage import EMBEDDED
from kedit_jax.errors import KeditError


class Chapter(NamedTuple):
    """An experiment in the report: its heading, what it asks, and what turns its results into Markdown."""

    title: str
    asks: str
    section: Callable[[Place, Sequence[Result], Sequence[str]], list[str]]


CHAPTERS: Mapping[str, Chapter] = {
    "main": Chapter(
        "Main table",
        "Every editor is run aligned (its sequence is the one-time edit of all constraints), aligned without making up "
        "for its post-processing, unaligned (history left out), and with all facts at once.",
        main_table.section,
    ),
    "half": Chapter(
        "Half as many edits",
        "The main table with half as many edits: of the embedded model, each of another subject.",
        main_table.section,
    ),
    "necessity": Chapter(
        "Is regularisation necessary?",
        "The strength of each regulariser from off to strong, and beside it what leaving the history out costs there. "
        "No figure of the paper is known here; `rho` is C0 replaced by a scaled identity, for which a prototype saw "
        "unaligned editing lose 20 to 40 points of exact match.",
        others.necessity,
    ),
    "norms": Chapter("Norms", "Frobenius norms over all edited kernels, at every step.", main_table.norms),
    "ripple": Chapter(
        "Other facts of the subject",
        "Facts of edited subjects that are not edited themselves. No figure of the paper is known here.",
        main_table.ripple,
    ),
    "drift": Chapter(
        "Key drift",
        "Keys of upper layers move when lower layers are edited. How far, relative to the recorded keys, and what "
        "changes when all keys are read again in the edited model and everything is solved anew. No figure of the paper "
        "is known here.",
        main_table.drift,
    ),
    "latest": Chapter(
        "Memorize-the-Latest",
        "Each batch replaces the one before: by the full normal equations, or leaving A0 D out as if the prior kept D "
        "where C0 does not see it. Measures are those of the last batch alone.",
        others.latest,
    ),
    "conflicts": Chapter(
        "Conflicts and retraction",
        "Facts are stated one to five times with another object each time, some of them twice in a batch, and a tenth "
        "is taken back at the end. `holding`: an answer that should hold; `outdated`: one that should not; `restored`: "
        "the original object of a fact taken back. Under `merge` and `keep` all statements stand, and any of them "
        "counts.",
        others.conflicts,
    ),
    "horizon": Chapter(
        "Horizon",
        "One edit a step. The constraints are those that a session stored in its last layer, and once they are used up, "
        "others drawn from them: Gaussian keys with their mean and covariance, residuals of random ones. Past the key "
        "width no editor can meet all of them.",
        others.horizon,
    ),
    "ability": Chapter(
        "General ability",
        "What no edit is about: facts of subjects that are never edited, what subjects are, and the perplexity on "
        "held-out text.",
        main_table.ability,
    ),
    "shift": Chapter(
        "Representation shift",
        "What the head reads at the last token of prompts about subjects that were not edited, before and after.",
        others.shift,
    ),
}


def write_report(results: Path, folder: Path, comments: Path = FOLDER / "comments") -> Path:
    """Write REPORT.md into `folder`, and its figures into `results`/figures.

    Raises:
        KeditError: no results, or damaged ones.
    """
    stored = {name: _by_model(read_results(results / name)) for name in EXPERIMENTS if EXPERIMENTS[name].runs is not None}
    if not any(stored.values()):
        raise KeditError(f"no results in {str(results)!r}; run `python -m experiments.paper` first, or give --out")
    configs = {name: read_config(EXPERIMENTS[name].config, FOLDER / "configs" / f"{name}.yaml") for name in CHAPTERS}
    figures = results / "figures"
    link = figures.resolve().relative_to(folder.resolve()).as_posix()
    blocks = [_head(stored)]
    for name, chapter in CHAPTERS.items():
        source = configs[name].source if EXPERIMENTS[name].runs is None else name
        if not stored[source]:
            continue
        blocks += [f"## {chapter.title}", chapter.asks]
        for model, runs in stored[source].items():
            complete = [run for run in runs if run.complete]
            blocks += [f"### {model}, {_measured_on(complete or runs)}"]
            if len(complete) < len(runs):
                blocks.append(f"{len(runs) - len(complete)} runs are not complete, and left out.")
            if complete:
                blocks += chapter.section(Place(figures, link, f"{name}-{model}"), complete, configs[name].columns)
        note = comments / f"{name}.md"
        if note.exists():
            blocks += ["### Comment", note.read_text(encoding="utf-8").strip()]
    path = folder / "REPORT.md"
    path.write_text("\n\n".join(block for block in blocks if block) + "\n", encoding="utf-8")
    return path


def _by_model(runs: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for run in runs:
        found.setdefault(str(run.header["model"]), []).append(run)
    return found


def _head(stored: Mapping[str, Mapping[str, Sequence[Result]]]) -> str:
    models = sorted({model for runs in stored.values() for model in runs})
    every = [run for by_model in stored.values() for runs in by_model.values() for run in runs]
    stand_in = (
        "The embedded model is a stand-in: a small model of an invented world, trained so that it recalls facts the way "
        "large models do. What it shows is how the methods compare on it, not how well they do on another model. "
        if EMBEDDED in models
        else ""
    )
    machines = sorted({_machine(run.header["hardware"]) for run in every})
    failed = sorted({f"{run.header['experiment']}/{run.name}" for run in every if failure(run)})
    return "\n\n".join(
        [
            "# The paper's evidence, measured again",
            "Written by `python -m experiments.paper --report` from the stored results, and by nobody's hand but for "
            'what stands under "Comment". The paper is "The Labyrinth and the Thread" (arXiv 2605.26670); claims are '
            "its own, of the issue that asked for these experiments, or what an experiment here asks. Cells are means "
            "over seeds (which facts, their order, and the prefixes) ± one standard deviation.",
            f"{stand_in}Models: {', '.join(models)}. Measured on: {'; '.join(machines)}."
            + (f" Runs that ended without a result: {', '.join(failed)}." if failed else ""),
        ]
    )


def _machine(hardware: Mapping[str, Any]) -> str:
    return f"{hardware['processor']}, {hardware['cores']} cores, {hardware['device']}"


def _measured_on(runs: Sequence[Result]) -> str:
    """Edits, layers and seeds of a chapter's runs in a line."""
    settings = runs[0].what["settings"]
    seeds = len({run.seed for run in runs})
    seconds = sum(float(line.get("cpu_seconds", 0)) for run in runs for line in run.lines)
    layers = ", ".join(map(str, settings["layers"]))
    time = f"{seconds:.0f} CPU-s" if seconds < 120 else f"{seconds / 60:.0f} CPU-minutes"
    return f"layers {layers}, {seeds} seed{'s' * (seeds != 1)}, {time}"
