"""`python -m experiments.paper`: compute what is not stored yet, or rebuild the report from what is."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.paper.config import FOLDER, read_config
from experiments.paper.registry import EXPERIMENTS
from experiments.paper.report import write_report
from experiments.paper.results import Log, Say
from experiments.paper.running import Run, Tick
from experiments.paper.stage import EMBEDDED, Sources, Stage, open_stage, read_choices
from kedit_jax.cli.cache import compiled_programs_kept
from kedit_jax.errors import KeditError

RESULTS = FOLDER / "results"
RUNS = FOLDER.parents[1] / "runs"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    names: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(EXPERIMENTS)}; all by default")] = None,
    only: Annotated[list[str] | None, typer.Option(help="of an experiment's runs those of this name")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="of the config's seeds these")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny runs of one seed, to test the pipeline")] = False,
    out: Annotated[Path | None, typer.Option(help="results (default: results/ here; of --quick: runs/paper-quick)")] = None,
    report: Annotated[bool, typer.Option("--report", help="compute nothing: tables, figures and REPORT.md anew")] = False,
    model: Annotated[str, typer.Option(help="a name in configs/models.yaml, as llama-3-8b")] = EMBEDDED,
    model_dir: Annotated[Path | None, typer.Option(help="weights, in Hugging Face layout")] = None,
    records: Annotated[Path | None, typer.Option(help="records, in CounterFact's schema or another that is known")] = None,
    corpus: Annotated[Path | None, typer.Option(help="text for the second moments, a document a line")] = None,
    heldout: Annotated[Path | None, typer.Option(help="text for the perplexity, a document a line")] = None,
    ability: Annotated[list[Path] | None, typer.Option(help="files of multiple-choice tasks (SST-2, MMLU ...)")] = None,
    cache: Annotated[Path, typer.Option(help="moments and factored priors")] = RUNS / "paper",
) -> None:
    """Run experiments, or continue them; what is complete is kept."""
    folder = out or (RUNS / "paper-quick" if quick else RESULTS)
    console = Console()
    try:
        if report:
            console.print(f"written: {write_report(folder, FOLDER.parent if folder == RESULTS else folder)}", soft_wrap=True)
            return
        with compiled_programs_kept():
            sources = Sources(model_dir, records, corpus, heldout, tuple(ability or ()))
            part = Part(frozenset(only or ()), frozenset(seed or ()))
            run_all(names or list(EXPERIMENTS), folder, model, sources, cache, quick=quick, console=console, part=part)
    except KeditError as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@dataclass(frozen=True)
class Part:
    """What is computed of an experiment: runs of these names, of these seeds; all where none is named."""

    runs: frozenset[str] = frozenset()
    seeds: frozenset[int] = frozenset()


def run_all(
    names: list[str],
    out: Path,
    model: str,
    sources: Sources,
    cache: Path,
    *,
    quick: bool,
    console: Console,
    part: Part = Part(),
) -> None:
    """Read all configs, load the model, and run each experiment for each of its seeds.

    Raises:
        KeditError: names or configs that cannot be used, before anything is loaded; results of something else.
    """
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise KeditError(f"there is no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    configs = {
        name: read_config(EXPERIMENTS[name].config, FOLDER / "configs" / f"{name}.yaml", quick=quick) for name in names
    }
    choices = read_choices()
    if model not in choices:
        raise KeditError(f"model {model!r} is not in configs/models.yaml; there are {', '.join(choices)}")
    computed = [name for name in names if EXPERIMENTS[name].runs is not None]
    for name in names:
        if name not in computed:
            console.print(f"{name}: a report on the results of {configs[name].source}")
    if not computed:
        return
    with console.status(f"loading {model}"):
        stage = open_stage(model, choices[model], sources, cache / model)
    for name in computed:
        run_experiment(name, configs[name], stage, out, console, part)


def run_experiment(name: str, config: Any, stage: Stage, out: Path, console: Console, part: Part = Part()) -> None:
    """All runs of one experiment, or of a part of it, that are not complete.

    Raises:
        KeditError: runs or seeds that the experiment does not have, and as `run_all`; files of something else are found
            before anything is computed.
    """
    make, todo = EXPERIMENTS[name].runs, []
    assert make is not None  # noqa: S101
    if unknown := part.seeds - set(config.seeds):
        raise KeditError(f"{name} has no seed {min(unknown)}; there are {', '.join(map(str, config.seeds))}")
    done = 0
    say: Say = partial(console.print, highlight=False, soft_wrap=True)
    for seed in config.seeds:
        if part.seeds and seed not in part.seeds:
            continue
        made = make(config, stage, seed)
        if unknown_runs := part.runs - {run.name for run in made}:
            raise KeditError(f"{name} has no run {min(unknown_runs)}; there are {', '.join(run.name for run in made)}")
        for run in made:
            if part.runs and run.name not in part.runs:
                continue
            path = out / name / stage.name / f"seed-{seed}" / f"{run.name}.jsonl"
            header = {"experiment": name, "model": stage.name, "seed": seed, "run": run.name, "what": run.what}
            log = Log.open(path, _header(header), say)
            done += log.complete
            if not log.complete:
                todo.append((seed, run, log))
    if done:
        console.print(f"{name}: {done} runs are complete")
    if not todo:
        return
    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        TextColumn("{task.completed:>6.0f}/{task.total:.0f} edits"),
    )
    began = time.process_time()
    with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(name, total=sum(run.work for _, run, _ in todo))
        for number, (seed, run, log) in enumerate(todo, start=1):
            progress.update(task, description=f"{name}: seed {seed} {run.name} ({number} of {len(todo)})")
            _Counted(run, lambda edits: progress.advance(task, edits))(log)
    console.print(f"{name}: {len(todo)} runs, {time.process_time() - began:.0f} CPU-s")


def _header(header: dict[str, Any]) -> dict[str, Any]:
    """Versions and hardware stand at the top of a header: they may differ when a run is continued."""
    what = dict(header["what"])
    return {**header, "what": what, "versions": what.pop("versions"), "hardware": what.pop("hardware")}


@dataclass
class _Counted:
    """A run whose progress comes to exactly its work, wherever it begins or ends."""

    run: Run
    tick: Tick
    counted: int = 0

    def __call__(self, log: Log) -> None:
        def tick(edits: int) -> None:
            self.counted += edits
            self.tick(edits)

        log.begin()
        self.run.go(log, tick)
        self.tick(self.run.work - self.counted)


if __name__ == "__main__":
    app()
