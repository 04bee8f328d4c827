"""(c) What an edit's cost grows with: edits so far, the batch's size, the model's depth.

The long run, to 10,000 edits, is of the solve alone, on generated constraints of one layer; whole edits stand beside it as
far as a few hundred. Whole edits are measured the second time round, when every layout's program is compiled.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.edits import PARTS, Ours, Preparation
from experiments.benchmarks.measuring import Child, Clock, medians
from experiments.benchmarks.plots import figure, lines
from experiments.benchmarks.problem import SHAPES, Shape, read, start
from kedit_jax import solve
from kedit_jax.editing import session as editing_session

SEED = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How far each series goes.

    Attributes:
        shape: of the model.
        depths: layers of the model, the edited ones staying where they are, with a batch of `depth_batch`.
        batches: sizes of a batch.
        edits, step: whole edits so far, `step` at a time.
        solves, solve_step: the same for the solve alone.
        repeats: of each batch size and depth; the median counts.
    """

    shape: str
    depths: tuple[int, ...]
    depth_batch: int
    batches: tuple[int, ...]
    edits: int
    step: int
    solves: int
    solve_step: int
    repeats: int


PLAN = Plan("gpt2-small", (9, 12, 18, 24), 10, (1, 5, 20, 50, 100), 200, 20, 10_000, 100, 3)
QUICK_PLAN = Plan("tiny-gpt2", (3, 4), 2, (1, 3), 6, 2, 200, 20, 2)


def measure(*, quick: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """All series, in CPU seconds; where an edit is whole, by part."""
    plan = QUICK_PLAN if quick else PLAN
    shape = SHAPES[plan.shape]
    with tempfile.TemporaryDirectory() as folder:
        made = _prepared(Path(folder) / "problem", shape, max(plan.edits, *plan.batches))
        with Child(Ours, made) as ours:
            report("batch sizes")
            batches = [_a_request(ours, size, plan.repeats) for size in plan.batches]
            report("edits so far")
            so_far = _so_far(ours, plan)
        depths = []
        for depth in plan.depths:
            report(f"{depth} layers")
            deep = _prepared(Path(folder) / f"depth-{depth}", dataclasses.replace(shape, n_layers=depth), plan.depth_batch)
            with Child(Ours, deep) as ours:
                depths.append(_a_request(ours, plan.depth_batch, plan.repeats))
        report(f"{plan.solves} solves")
        one = dataclasses.replace(shape, n_layers=shape.layers[0] + 1, layers=shape.layers[:1])
        with Child(LongRun, _prepared(Path(folder) / "solves", one, 1)) as run:
            solves = run("seconds", plan.solves, plan.solve_step)
    return {
        "seed": SEED,
        "plan": dataclasses.asdict(plan),
        "batch": [{"size": size, **row} for size, row in zip(plan.batches, batches, strict=True)],
        "depth": [{"layers": depth, **row} for depth, row in zip(plan.depths, depths, strict=True)],
        "edits_so_far": [{"edits": plan.step * i, **row} for i, row in enumerate(so_far)],
        "solves_so_far": [{"edits": plan.solve_step * i, "seconds": second} for i, second in enumerate(solves)],
    }


def _prepared(folder: Path, shape: Shape, count: int) -> Path:
    with Child(Preparation) as preparation:
        preparation("run", folder, shape, count, SEED)
    return folder


def _a_request(ours: Child, size: int, repeats: int) -> dict[str, float]:
    """Median seconds a request, by part, of batches of one size; the first compiles and does not count."""
    ours("edit", size)
    return _by_request(medians([ours("edit", size) for _ in range(repeats)]), size)


def _so_far(ours: Child, plan: Plan) -> list[dict[str, float]]:
    """Seconds a request of each batch of one session, at the second run of the same."""
    for _ in range(2):
        rows = [ours("edit", plan.step, number > 0) for number in range(plan.edits // plan.step)]
    return [_by_request(row, plan.step) for row in rows]


def _by_request(row: Mapping[str, float], count: int) -> dict[str, float]:
    return {**{part: row[part] / count for part in PARTS}, "total": sum(row[part] for part in PARTS) / count}


class LongRun:
    """One layer's history, extended by generated constraints."""

    def __init__(self, folder: Path) -> None:
        problem = read(folder)
        (self._layer,) = problem.shape.layers
        self._session = start(problem)
        self._scale = np.sqrt(np.diag(problem.moments()[self._layer]))

    def seconds(self, count: int, step: int) -> list[float]:
        """Of each step of `step` edits, divided by it; the second time round where programs are compiled."""
        rows: list[float] = []
        for _ in range(2):
            rng, held = np.random.default_rng(SEED), self._session.layers[self._layer]
            rows = []
            for _ in range(count // step):
                clock, block = Clock(), self._block(rng, step)
                with clock.part("solve"):
                    held, _ = editing_session._extended(self._layer, held, self._session.site(self._layer), block)
                rows.append(clock.seconds["solve"] / step)
        return rows

    def _block(self, rng: np.random.Generator, size: int) -> solve.Constraints:
        """Keys as large as the corpus's, residuals as large as a hundredth of the stream."""
        keys = (rng.normal(size=(size, len(self._scale))) * self._scale).astype(np.float32)
        width = self._session.layers[self._layer].update.shape[1]
        return solve.Constraints(keys, 0.01 * rng.normal(size=(size, width)), np.ones(size))


def plot(result: Mapping[str, Any], folder: Path) -> None:
    """Four pictures side by side."""
    with figure(folder / "scaling.png", f"What an edit of kedit_jax costs ({result['plan']['shape']})", columns=4) as axes:
        for place, name, x, label in (
            (axes[0], "batch", "size", "requests of a batch"),
            (axes[1], "depth", "layers", "layers of the model"),
            (axes[2], "edits_so_far", "edits", "edits so far"),
        ):
            rows: Sequence[Mapping[str, float]] = result[name]
            series = {part: [row[part] for row in rows] for part in ("total", *PARTS)}
            lines(place, [row[x] for row in rows], series, x_label=label, y_label="CPU seconds a request")
        solves = result["solves_so_far"]
        points = {"solve of one layer": [row["seconds"] for row in solves]}
        lines(axes[3], [row["edits"] for row in solves], points, x_label="edits so far", y_label="CPU seconds an edit")
