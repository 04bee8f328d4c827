"""`python -m experiments.benchmarks`: measure, keep the numbers, draw them."""

import importlib
import inspect
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from experiments.benchmarks.measuring import machine, pin

FOLDER = Path(__file__).resolve().parent
PARTS = ("edits", "solve", "moments", "scaling", "roofline", "profiles")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(PARTS)}; all of them by default")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="tiny shapes in a minute, to test the pipeline")] = False,
    again: Annotated[bool, typer.Option("--again", help="measure parts anew whose numbers are there")] = False,
    shape: Annotated[str | None, typer.Option(help="of `experiments.benchmarks.problem.SHAPES`; for `edits` alone")] = None,
    out: Annotated[Path | None, typer.Option(help="where numbers and pictures go (default: results/ here)")] = None,
    core: Annotated[int, typer.Option(help="the one that everything is held to")] = 0,
) -> None:
    """Measure parts that were not measured before. An interrupted run continues behind the last part that it finished."""
    unknown = [name for name in names or () if name not in PARTS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {', '.join(PARTS)}")
    pin(core)
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # two processes share an accelerator
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # the only bar is the one below
    folder = out or FOLDER / ("results-quick" if quick else "results")
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        for name in names or PARTS:
            path = folder / f"{name}.json"
            if path.exists() and not again:
                console.print(f"{name}: kept from {path}")
                continue
            task = progress.add_task(name)

            def report(text: str, task: TaskID = task, name: str = name) -> None:
                progress.update(task, description=f"{name}: {text}")

            found = measured(name, quick, shape, report)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            part(name).plot(found["result"], folder)
            progress.update(task, description=f"{name}: written to {path}")
            progress.stop_task(task)


def part(name: str) -> Any:
    return importlib.import_module(f"experiments.benchmarks.{name}")


def measured(name: str, quick: bool, shape: str | None, report: Any) -> dict[str, Any]:
    """A part's numbers, and how to get them again."""
    if shape and "shape" not in inspect.signature(part(name).measure).parameters:
        raise typer.BadParameter(f"{name} takes no shape; name `edits`")
    begin = time.perf_counter()
    result = part(name).measure(quick=quick, report=report, **({"shape": shape} if shape else {}))
    given = [*(["--quick"] if quick else []), *(["--shape", shape] if shape else [])]
    return {
        "command": " ".join(["python -m experiments.benchmarks", name, *given]),
        "machine": machine(),
        "wall_seconds": round(time.perf_counter() - begin, 1),
        "result": result,
    }


if __name__ == "__main__":
    app()
