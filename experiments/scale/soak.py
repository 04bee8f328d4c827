"""A long run of a session, looked at as it goes: does what should stay flat stay flat?

    python -m experiments.scale.soak [--seed S]       both parts; numbers, picture and SOAK.md in this folder
    python -m experiments.scale.soak --quick          a few hundred steps and thirty operations, nothing written here

Part `steps` makes 10,000 steps of one edit each on the embedded model's own constraints (`experiments.scale.steps`), part
`day` some hundred operations on a stored session (`experiments.scale.day`). Both are kept in --cache line by line, and go on
where they were interrupted, even killed; --again starts anew.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.paper.results import Log
from experiments.paper.stage import EMBEDDED, Sources, Stage, hardware, open_stage, read_choices, versions
from experiments.scale import day, steps
from kedit_jax.cli.cache import compiled_programs_kept

HERE = Path(__file__).parent
RUNS = HERE.parents[1] / "runs"
EDITOR = "memit"
NOT_CURVES = ("at most", "at least")
"""Claims that hold for a run of any length; that a curve is flat says something of a long one alone."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Both parts."""

    steps: steps.Plan
    day: day.Plan


FULL, QUICK = Plan(steps.FULL, day.FULL), Plan(steps.QUICK, day.QUICK)
Bar = Callable[[str, int], Callable[[int], None]]


def soak(
    stage: Stage, plan: Plan, seed: int, home: Path, say: Callable[[str], None], bar: Bar, *, until: int = 0
) -> dict[str, Any]:
    """Both parts, from wherever they stand; what was measured, and what is said of it.

    Args:
        bar: (what, how much) -> what is called with each bit done.
        until: see `day.run`.
    """
    logs = {}
    for name in ("steps", "day"):
        part = getattr(plan, name)
        header = {
            "run": name,
            "seed": seed,
            "what": {
                "plan": dataclasses.asdict(part),
                "weights": stage.weights,
                "moments": stage.moments.fingerprint(stage.base.layers),
                "settings": stage.settings(EDITOR, 0).to_dict() | {"layers": list(stage.base.layers)},
            },
            "versions": versions(),
            "hardware": hardware(),
        }
        log = logs[name] = Log.open(home / name / "log.jsonl", header, say)
        if log.complete:
            say(f"{name}: complete")
        elif name == "steps":
            steps.run(stage, part, EDITOR, home / name, log, bar(name, part.steps), say)
        else:
            day.run(stage, part, EDITOR, seed, home / name, log, bar(name, part.day + part.night), until=until)
    return summary(stage, plan, seed, logs)


def summary(stage: Stage, plan: Plan, seed: int, logs: Mapping[str, Log]) -> dict[str, Any]:
    """What is stored."""
    layer = stage.base.layers[-1]
    rank = len(stage.moments.by_layer[layer])
    lines = {name: log.lines for name, log in logs.items()}
    found = {
        "steps": steps.verdicts(lines["steps"], rank, plan.steps.save_every),
        "day": day.verdicts(lines["day"]) if logs["day"].complete else [],
    }
    return {
        "seed": seed,
        "plan": dataclasses.asdict(plan),
        "hardware": hardware(),
        "versions": versions(),
        "key_width": rank,
        "records": len(stage.records),
        "verdicts": {name: [verdict.to_dict() for verdict in part] for name, part in found.items()},
        "operations": operations(lines["day"]),
        "cpu_seconds": {name: sum(line["cpu_seconds"] for line in part) for name, part in lines.items()},
        **lines,
    }


def operations(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By part and kind of operation: how many there were, and median CPU seconds of one and of storing it."""
    told: dict[str, dict[str, Any]] = {}
    for part in ("day", "night"):
        own = [line for line in lines if line.get("part") == part]
        kinds = Counter(line["kind"] for line in own)
        told[part] = {}
        for kind, count in sorted(kinds.items(), key=lambda pair: -pair[1]):
            timed = [line for line in own if line["kind"] == kind and "operation_s" in line]
            row: dict[str, Any] = {"count": count}
            for name in ("operation_s", "save_s"):
                row[name] = statistics.median([line[name] for line in timed]) if timed else None
            told[part][kind] = row
    return told


def holds(result: Mapping[str, Any], claims: Sequence[str] = ("flat", *NOT_CURVES)) -> bool:
    """Whether all verdicts of these claims hold, and there are some of each part."""
    parts = result["verdicts"].values()
    return all(parts) and all(verdict["holds"] for part in parts for verdict in part if verdict["claim"] in claims)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Eight pictures: four of the steps, four of the day and the night."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, ((a, b, c, d), (e, f, g, h)) = pyplot.subplots(2, 4, figsize=(18, 8.4), layout="constrained")
    told = [line for line in result["steps"] if "step" in line]
    x = [line["step"] for line in told]
    for name, label in (
        ("error_naive", "history left out"),
        ("error_float32", "steps rounded to float32"),
        ("error", "float64"),
    ):
        a.loglog(x, [line[name] for line in told], marker="o", markersize=3, label=label)
    _titled(a, "Distance from a fresh one-time fit", "single-edit steps", "relative error of the update")
    a.legend(fontsize="small", loc="center", bbox_to_anchor=(0.6, 0.3))
    crossover = 0.83 * result["key_width"]
    b.plot(x, [1000 * line["mean_s"] for line in told], marker="o", markersize=3, label="mean since the point before")
    b.plot(x, [1000 * line["median_s"] for line in told], marker="o", markersize=3, label="median")
    b.axvline(crossover, color="grey", linestyle=":", label=f"crossover, {crossover:.0f} steps")
    _titled(b, "Time of a step", "single-edit steps", "CPU milliseconds")
    b.set_ylim(bottom=0)
    b.legend(fontsize="small")
    c.plot(x, [line["peak_mib"] for line in told], marker="o", markersize=3, label="peak of the process")
    beyond = [line["peak_mib"] - line["recorded_mib"] for line in told]
    c.plot(x, beyond, marker="o", markersize=3, label="less recorded keys and residuals")
    _titled(c, "Memory while stepping", "single-edit steps", "MiB resident")
    c.set_ylim(bottom=0)
    c.legend(fontsize="small", loc="lower right")
    saved = [line for line in told if "disk_bytes" in line]
    places = [line["step"] for line in saved]
    d.plot(places, [line["disk_bytes"] / 2**20 for line in saved], marker="s", markersize=4, label="session on disk")
    d.plot(x, [line["recorded_mib"] for line in told], label="recorded keys and residuals")
    d.plot(x, [line["state_mib"] for line in told], label="solver's state")
    d.plot(x, [line["promised_mib"] for line in told], linestyle=":", color="black", label="state_size")
    _titled(d, "What is kept, one layer", "single-edit steps", "MiB")
    d.legend(fontsize="small", loc="upper left")
    _plot_day(result, (e, f, g, h))
    made.suptitle(
        "Soak: 10,000 single-edit steps on the embedded model's constraints (top); a day of mixed operations on a stored "
        "session, and a night with compaction (bottom)"
    )
    made.savefig(path, dpi=110)
    pyplot.close(made)


def _plot_day(result: Mapping[str, Any], axes: Sequence[Any]) -> None:
    e, f, g, h = axes
    day_length = result["plan"]["day"]["day"]
    told = [line for line in result["day"] if "error" in line]
    x = [line["operation"] + (day_length if line["part"] == "night" else 0) for line in told]
    for place in axes:
        place.axvline(day_length, color="grey", linestyle=":")

    def curve(place: Any, name: str, label: str, scale: float = 1.0) -> None:
        place.plot(x, [scale * line[name] for line in told], marker="o", markersize=2.5, label=label)

    e.semilogy(x, [line["error"] for line in told], marker="o", markersize=2.5, label="worst layer")
    e.axhline(1e-10, color="black", linestyle="--", linewidth=1, label="tolerance")
    _titled(e, "Distance from a fresh one-time fit", "operations (dotted: night begins)", "relative error of the update")
    e.legend(fontsize="small")
    curve(f, "rss_mib", "process")
    curve(f, "rows_mib", "recorded rows, all layers")
    curve(f, "live_mib", "JAX's arrays")
    _titled(f, "Memory", "operations (dotted: night begins)", "MiB")
    f.set_ylim(bottom=0)
    f.legend(fontsize="small", loc="center right")
    curve(g, "edit_programs", "programs compiled for edits")
    curve(g, "live_arrays", "JAX's arrays")
    curve(g, "open_files", "open files")
    curve(g, "leftovers", "names left in the folders")
    curve(g, "maps", "memory mappings / 100", 0.01)
    _titled(g, "Counts", "operations (dotted: night begins)", "")
    g.set_ylim(bottom=-2)
    g.legend(fontsize="small")
    curve(h, "disk_bytes", "session on disk, MiB", 2**-20)
    curve(h, "facts", "facts held")
    curve(h, "retired", "facts taken back, kept for restore")
    _titled(h, "The session", "operations (dotted: night begins)", "")
    h.set_ylim(bottom=0)
    h.legend(fontsize="small", loc="upper left")


def _titled(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def table(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = ["| | claim | found | limit | rise | holds |", "|---|---|---:|---:|---:|---|"]
    for verdict in verdicts:
        share = verdict["claim"] == "flat"
        measured, limit = (
            "not finite" if value is None else f"{100 * value:.1f} %" if share else f"{value:.3g}"
            for value in (verdict["measured"], verdict["limit"])
        )
        rise = "" if verdict["rise"] is None else f"{verdict['rise']:.3g} {verdict['unit']}".strip()
        claim = "flat: rise over the median" if share else verdict["claim"]
        lines.append(
            f"| {verdict['curve']} | {claim} | {measured} | {limit} | {rise} | {'yes' if verdict['holds'] else '**no**'} |"
        )
    return "\n".join(lines) + "\n"


def operations_table(counts: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown."""
    lines = ["| part | operation | times | CPU s, median | of storing it |", "|---|---|---:|---:|---:|"]
    for part, kinds in counts.items():
        for kind, row in kinds.items():
            times = ["" if row[name] is None else f"{row[name]:.2f}" for name in ("operation_s", "save_s")]
            lines.append(f"| {part} | {kind} | {row['count']} | {times[0]} | {times[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short; writes no results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="what is kept while it runs (default: runs/soak, or runs/soak-quick)")
    parser.add_argument("--again", action="store_true", help="start anew")
    options = parser.parse_args()
    console, plan = Console(stderr=True), QUICK if options.quick else FULL
    home = options.cache or RUNS / ("soak-quick" if options.quick else "soak")
    if options.again:
        for name in ("steps", "day"):
            shutil.rmtree(home / name, ignore_errors=True)
    say = partial(console.print, highlight=False, soft_wrap=True)
    began = time.process_time()
    with compiled_programs_kept():
        with console.status("loading the embedded model"):
            stage = open_stage(EMBEDDED, read_choices()[EMBEDDED], Sources(), home / "moments")
        columns = (TextColumn("{task.description:<6}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:

            def bar(what: str, work: int) -> Callable[[int], None]:
                task = progress.add_task(what, total=work)
                return lambda count: progress.advance(task, count)

            result = soak(stage, plan, options.seed, home, say, bar)
    for name, part in result["verdicts"].items():
        print(f"{name}\n\n{table(part)}")
    print(operations_table(result["operations"]))
    say(f"{time.process_time() - began:.0f} CPU-s")
    if not options.quick:
        write(result, HERE)
    if not holds(result, NOT_CURVES if options.quick else ("flat", *NOT_CURVES)):
        sys.exit("something that should hold does not: see the tables")


def write(result: Mapping[str, Any], folder: Path) -> None:
    """The numbers, the picture and the report."""
    (folder / "results").mkdir(exist_ok=True)
    text = json.dumps(result, ensure_ascii=False, separators=(",", ":"))
    (folder / "results" / "soak.json").write_text(text.replace('{"', '\n{"') + "\n", encoding="utf-8")
    plot(result, folder / "results" / "soak.png")
    (folder / "SOAK.md").write_text(report(result), encoding="utf-8")


def report(result: Mapping[str, Any]) -> str:
    """SOAK.md."""
    steps_, day_ = result["steps"], result["day"]
    told = [line for line in steps_ if "step" in line]
    loaded = next(line for line in steps_ if "loaded_s" in line)
    evening = next(line for line in day_ if line.get("part") == "evening")
    plan = result["plan"]
    cosines = loaded["cosines"]
    left = [v["measured"] * told[-1]["recorded_mib"] for v in result["verdicts"]["steps"] if v["curve"] == steps.LEFT]
    return REPORT.format(
        n=f"{plan['steps']['steps']:,}",
        records=f"{result['records']:,}",
        rounds=-(-plan["steps"]["steps"] // result["records"]),
        day=plan["day"]["day"],
        night=plan["day"]["night"],
        compact=plan["day"]["compact_every"],
        hardware=f"{result['hardware']['processor']}, one core",
        minutes=round(sum(result["cpu_seconds"].values()) / 60),
        seed=result["seed"],
        steps=table(result["verdicts"]["steps"]),
        session=table(result["verdicts"]["day"]),
        operations=operations_table(result["operations"]),
        last=f"{told[-1]['error']:.1e}",
        naive=f"{told[-1]['error_naive']:.2f}",
        float32=f"{told[-1]['error_float32']:.1e}",
        left=sum(left),
        largest=told[-1]["recorded_mib"],
        disk=f"{told[-1]['disk_bytes'] / 2**20:.0f}",
        load=f"{loaded['loaded_s']:.0f}",
        same="bit for bit" if loaded["loaded_same"] else "NOT bit for bit",
        cosine=f"{cosines['median']:.3f}" if cosines else "none",
        taken=evening["taken_back"],
    )


REPORT = """# Soak

Written by `python -m experiments.scale.soak` (numbers in `results/soak.json`; seed {seed}; {hardware}; {minutes} CPU
minutes, without the fresh fits of the other process and the target values, where those were kept). A run that is
interrupted goes on where it was.

![curves](results/soak.png)

## {n} single-edit steps

The solver as sessions run it (`kedit_jax.editing.history.extended`), on keys and residuals that sessions of the embedded
model stored in their last edited layer. The world has {records} facts that can be edited; they are told in {rounds} rounds,
each with other prefixes before the prompts and, from the second on, other targets, all of them optimised. So later rounds
contradict earlier ones under similar keys (median cosine with the first round's {cosine}), and all stand.

{steps}
After the last step the update is {last} from a fresh one-time fit of all constraints ({float32} where every step and the sum
are rounded to float32); without the history it would be off by {naive} of its size.

What grows, as it must: recorded keys and residuals, one row a fact, in memory and on disk ({disk} MiB at the end, one
layer). What that costs: loading the session makes its steps again, {load} CPU seconds at the end, and gives the same
session {same}. The error of rounded steps grows with their number, as each is rounded once.

What falls short: memory rises when a session is stored that is larger than those stored before ({left:.0f} MiB in all for
one of {largest:.0f}), and stays, so that the process as a whole is not flat; between two savings it is. Nothing says that
arrays are held: nine savings of one session of 70 MiB left 45 MiB, the last seven of them 3, and collecting garbage freed
nothing. Probably the storage layer's threads' allocators keep it, beside what glibc gave back after each saving.

## A day and a night

The session is stored under its lock after every operation and loaded anew every few. {day} operations by day; in the
evening all {taken} facts are taken back on a copy, which must give the original kernels bit for bit; {night} operations by
night, on the same facts, compacting every {compact}.

{session}
{operations}
What grows by day, as it must: facts taken back are kept for `restore`, and so are the lines of the history. Compaction
drops both the rows and what was taken back: by night the session has a constant size, that of its statistics.

The curves count from the second half of each part on: before that, programs are compiled (the last ones at operation 90 of
the day), and memory climbs to a plateau. From a quarter on, the day's memory would rise by 6.8 % and its mappings by 10.8 %,
more than their limits. By night the plateau takes some fifty operations, each storing statistics of 114 MiB; loading and
dropping such a session again and again climbs, too, by 170 MiB in six times and 20 in the next eight. A first night of 48
operations was too short to tell (5.2 % in its second half). The one shown was run by a process of its own, behind the
day's, so that it begins with less memory and fewer programs.

## What was found on the way, and mended

- Batches of one to five facts in turn compiled for nearly every batch: 126 sizes for 200 batches, five programs each and
  280 memory mappings a program, of which Linux gives a process 65,530. Small batches now share sizes (7 for the same 200).
- A fresh fit compiled for every number of constraints, and the programs stayed. There are eight sizes an octave now.
- Undoing the retraction of a fact whose id was since written anew, with that undone, brought back the wrong version.
"""

if __name__ == "__main__":
    main()
