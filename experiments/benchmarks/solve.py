"""(b) The solve alone: one layer's step against the number of constraints before it, for several key widths.

Ours is what a session does for one layer once keys and values are known: residuals against the original kernel, the step,
the update's sum, the kernel's sum and rounding, and its place in the model's stack. The published procedure forms
lambda C0 + K_hist'K_hist + K'K in float64 from float32 statistics, solves the n x n system by LU (torch.linalg.solve), and
adds update and history up, once a layer and step; its cost does not depend on the history. Both on one thread, in turn.
"""

import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from kedit_jax import solve
from kedit_jax.delta import add_on_host, write_kernels
from kedit_jax.editing import history as histories
from kedit_jax.editing.settings import Procedure
from kedit_jax.solve import host

WIDTHS = ((1408, 512), (3072, 768), (6400, 1600), (14336, 4096))
"""Key and value widths: of a small model, GPT-2 small, GPT-2 XL, Llama-3-8B."""

BATCHES = {1: 9, 20: 7, 100: 5}
"""Constraints of a step, and how many such steps a median is taken of."""

POINTS = (0, 10, 100, 500, 1000, 2000, 3000, 5000, 10000)
"""Constraints before the step."""

TRUNK = 100
"""Rows of the steps that lead from one point to the next."""

OFTEN_UP_TO, PUBLISHED_UP_TO = 3072, 6400
"""Widths at which the published step is taken in turn with each of ours, and is taken at all, then at the points `RARELY`.
It costs the same with every history. Wider ones are estimated by n^3: at 14336 one takes over a minute, and 10 GB."""

RARELY = (0, 2000)

WEIGHT, RIDGE = 150.0, 1.0


def measure(*, quick: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """CPU seconds of a step, ours and as published, for every width, batch size and history; small widths only if quick."""
    widths = WIDTHS[:2] if quick else WIDTHS
    points = tuple(point for point in POINTS if not quick or point <= 3000)
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    with threadpool_limits(1), solve.float64():
        for n, v in widths:
            rows += _width(n, v, points, quick, report)
            gc.collect()
    return {"weight": WEIGHT, "rows": rows, "summary": _summary(rows)}


class _Layer:
    """One layer of a session: a prior, a stack of kernels, and the history so far."""

    def __init__(self, n: int, v: int) -> None:
        self.n, self.v, self.rng = n, v, np.random.default_rng(n)
        self.moment: np.ndarray | None = None
        if n <= PUBLISHED_UP_TO:
            self.moment = _moment(n, self.rng)
            prior = solve.memit(self.moment, WEIGHT, RIDGE)
        else:
            prior = solve.Prior(_factor(n, self.rng))
        self.kernel = self.rng.standard_normal((n, v), np.float32) / np.float32(math.sqrt(n))
        self.site = histories.Site(prior, 1.0, self.kernel, Procedure("aligned", None, False))
        self.history = histories.empty_history(self.site)
        self.params = write_kernels({"stack": jnp.zeros((2, n, v), jnp.float32)}, {"stack[0]": self.kernel})

    def batch(self, u: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys, and residuals against the kernel as it is."""
        return self.rng.standard_normal((u, self.n), np.float32), self.rng.standard_normal((u, self.v))

    def step(self, keys: np.ndarray, residuals: np.ndarray, history: histories.LayerHistory) -> histories.LayerHistory:
        """What a session does for a layer."""
        block = solve.Constraints(keys, residuals + keys @ history.update, np.ones(len(keys)))
        history, _ = histories.extended(history, self.site, block)
        kernel = add_on_host(self.kernel, history.update)
        self.params = write_kernels(self.params, {"stack[1]": kernel}, donate=True)
        self.params["stack"].block_until_ready()
        return history


class _Published:
    """The same layer by the procedure as published."""

    def __init__(self, layer: _Layer) -> None:
        self.moment = torch.from_numpy(np.asarray(layer.moment, np.float32))
        self.history = torch.zeros(layer.n, layer.n, dtype=torch.float64)
        self.weight = torch.from_numpy(layer.kernel.T.copy())

    def step(self, keys: np.ndarray, residuals: np.ndarray) -> torch.Tensor:
        k, r = torch.from_numpy(keys).T.double(), torch.from_numpy(residuals).T
        outer = k @ k.T
        system = WEIGHT * self.moment.double() + RIDGE * torch.eye(len(k), dtype=torch.float64) + self.history + outer
        update = r @ torch.linalg.solve(system, k).T
        self.weight += update.float()
        self.history += outer
        return update


def _width(n: int, v: int, points: tuple[int, ...], quick: bool, report: Callable[[str], None]) -> list[dict[str, Any]]:
    layer, rows = _Layer(n, v), []
    published = None if layer.moment is None else _Published(layer)
    layer.step(*layer.batch(1), layer.history)  # programs are compiled, libraries loaded
    sizes = {u: times for u, times in BATCHES.items() if not quick or u > 1}
    agreement = None if published is None else _agreement(layer, published)
    trunk: list[float] = []
    for point in points:
        while layer.history.constraints.size < point:
            batch = layer.batch(min(TRUNK, point - layer.history.constraints.size))
            seconds, layer.history = _timed(layer.step, *batch, layer.history)
            trunk.append(seconds / len(batch[0]))
        for u, times in sizes.items():
            ours, history = [], layer.history
            for _ in range(times):
                seconds, history = _timed(layer.step, *layer.batch(u), history)
                ours.append(seconds)
            taken = published is not None and (n <= OFTEN_UP_TO or point in RARELY)
            theirs = _timed(published.step, *layer.batch(u))[0] if taken else None
            solver = layer.history.sequence.solver
            rows.append(
                {
                    "n": n,
                    "v": v,
                    "batch": u,
                    "before": point,
                    "ours": float(np.median(ours)),
                    "published": theirs,
                    "multiplied out": solver.base is not None,
                    "agreement": agreement,
                    "state bytes": host.state_size(n, v, point),
                    "workspace bytes": host.workspace(n, n, v, point, u),
                    "trunk per constraint": float(np.mean(trunk[-10:])) if trunk else None,
                }
            )
        last = rows[-1]
        report(f"n {n}, {point} before, batch {last['batch']}: {last['ours']:.3f} s, published {_shown(last['published'])}")
    return rows


def _agreement(layer: _Layer, published: _Published) -> float:
    """Relative distance of the two first steps of 20, the statistics rounded as the published procedure has them."""
    keys, residuals = layer.batch(20)
    exact = histories.Site(
        solve.memit(published.moment.numpy().astype(np.float64), WEIGHT, RIDGE), 1.0, layer.kernel, layer.site.procedure
    )
    block = solve.Constraints(keys, residuals, np.ones(20))
    ours = histories.extended(histories.empty_history(exact), exact, block)[0].update
    theirs = _Published(layer).step(keys, residuals).numpy().T
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    begin = time.process_time()
    result = function(*arguments)
    return time.process_time() - begin, result


def _moment(n: int, rng: np.random.Generator) -> np.ndarray:
    """A second moment with a falling spectrum and 64 strong directions; float32 numbers, as published files hold."""
    strong = rng.standard_normal((n, 64)) / 8
    moment = strong @ strong.T + np.diag(np.logspace(0, -4, n))
    return ((moment + moment.T) / 2).astype(np.float32).astype(np.float64)


def _factor(n: int, rng: np.random.Generator) -> np.ndarray:
    """A lower factor, where a moment and its n^3 would say nothing about the step."""
    factor = np.zeros((n, n))
    for row in range(n):
        factor[row, :row] = rng.standard_normal(row, np.float32) / n
        factor[row, row] = 3.0
    return factor


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each width and batch size: the first step, one after 2,000, and the ratios to the published one."""
    found = []
    pairs = sorted({(row["n"], row["batch"]) for row in rows})
    measured = {(row["n"], row["batch"]): row for row in rows if row["published"] is not None}
    for n, u in pairs:
        mine = [row for row in rows if (row["n"], row["batch"]) == (n, u)]
        theirs = [row["published"] for row in mine if row["published"] is not None]
        widest = max(width for width, size in measured if size == u)
        estimated = not theirs
        if estimated:
            taken = [row["published"] for row in rows if (row["n"], row["batch"]) == (widest, u) and row["published"]]
            theirs = [seconds * (n / widest) ** 3 for seconds in taken]
        published = float(np.median(theirs))
        first, late = mine[0]["ours"], next((row["ours"] for row in mine if row["before"] == 2000), None)
        ratios = [(row["published"] or published) / row["ours"] for row in mine]
        crossed = [row["before"] for row in mine if row["multiplied out"]]
        found.append(
            {
                "n": n,
                "batch": u,
                "first": first,
                "after 2000": late,
                "after 2000 over first": None if late is None else late / first,
                "last": mine[-1]["ours"],
                "crossover": math.ceil(solve.CROSSOVER * n),
                "first point past the crossover": crossed[0] if crossed else None,
                "published": published,
                "published is estimated": estimated,
                "published over first": ratios[0],
                "published over after 2000": None if late is None else published / late,
                "published over ours, median": float(np.median(ratios)),
            }
        )
    return found


def _shown(seconds: float | None) -> str:
    return "not run" if seconds is None else f"{seconds:.2f} s"


def plot(result: dict[str, Any], folder: Path) -> None:
    """`solve.png`: a panel for each width, CPU seconds of a step over the constraints before it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = sorted({row["n"] for row in result["rows"]})
    size = (max(6.0, 4.2 * len(widths)), 4.6)
    figure, axes = pyplot.subplots(1, len(widths), figsize=size, squeeze=False, sharey=True, layout="constrained")
    named: dict[str, Any] = {}
    for axis, n in zip(axes[0], widths, strict=True):
        for colour, u in zip(("tab:green", "tab:blue", "tab:orange"), BATCHES, strict=True):
            mine = [row for row in result["rows"] if (row["n"], row["batch"]) == (n, u)]
            about = [line for line in result["summary"] if (line["n"], line["batch"]) == (n, u)]
            if not mine:
                continue
            before = [max(1, row["before"]) for row in mine]
            axis.plot(before, [row["ours"] for row in mine], "o-", color=colour, label=f"ours, {u} at once")
            style = ":" if about[0]["published is estimated"] else "--"
            what = "published, estimated" if about[0]["published is estimated"] else "published"
            axis.plot(before, [about[0]["published"]] * len(before), style, color=colour, label=f"{what}, {u} at once")
        axis.axvline(math.ceil(solve.CROSSOVER * n), color="0.7", linewidth=1, label="crossover")
        axis.set(xscale="log", yscale="log", title=f"keys of width {n}", xlabel="constraints before the step")
        axis.grid(which="major", alpha=0.3)
        named |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=4, fontsize=8)
    axes[0][0].set_ylabel("CPU seconds of one layer's step, one core")
    figure.savefig(folder / "solve.png", dpi=120)
    pyplot.close(figure)
