"""(a) End to end: the library against the procedure as published, same model, same requests, same core, in turn.

Each procedure lives in a process of its own, so that its peak memory is its own; only one works at a time. The published one
works through a share of the requests, then the library edits them all, and so on: every such pair gives a ratio, and the
median of the ratios is reported. A session is immutable, so the library's repetitions are the same edit.
"""

import contextlib
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import torch
import transformers

from experiments.benchmarks.measuring import Child, Clock, forget_peak, medians, memory
from experiments.benchmarks.plots import figure, stacked
from experiments.benchmarks.problem import SHAPES, Shape, prepare, read, start
from experiments.benchmarks.published import READ_ROWS, Published, Value
from kedit_jax.editing import keys as editing_keys
from kedit_jax.editing import session as editing_session

SEED = 0
SHAPE_NAMES, QUICK_SHAPE_NAMES = ("gpt2-small", "llama-16"), ("tiny-gpt2", "tiny-llama")
PARTS = ("values", "keys", "solve", "other")
TITLE = "One edit: published procedure and kedit_jax on the same core"
TOLERANCE = 1e-4  # of target values and updates, relative


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        count: requests of a batch.
        subset: how many of them, chosen at random, the published procedure optimises and reads keys of; its solve is timed
            on all.
        pairs: into so many shares the subset is cut; the library edits the whole batch once after each.
    """

    count: int
    subset: int
    pairs: int


PLANS = (Plan(20, 20, 4), Plan(100, 6, 3))
QUICK_PLANS = (Plan(3, 3, 2), Plan(4, 2, 2))


def measure(*, quick: bool, report: Callable[[str], None], shape: str | None = None) -> dict[str, Any]:
    """Every plan for every shape, or for one."""
    names = (shape,) if shape else QUICK_SHAPE_NAMES if quick else SHAPE_NAMES
    plans = QUICK_PLANS if quick else PLANS
    found: dict[str, Any] = {"seed": SEED, "tolerance": TOLERANCE, "shapes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            made = Path(folder) / name
            report(f"{name}: weights, moments, requests")
            with Child(Preparation) as preparation:
                preparation("run", made, SHAPES[name], max(plan.count for plan in plans), SEED)
            found["shapes"][name] = {
                "shape": dataclasses.asdict(SHAPES[name]),
                "plans": [compare(made, plan, lambda text, name=name: report(f"{name}, {text}")) for plan in plans],
            }
    return found


def compare(folder: Path, plan: Plan, report: Callable[[str], None]) -> dict[str, Any]:
    """One plan on a prepared problem, by both procedures in turn."""
    chosen = sorted(random.Random(SEED).sample(range(plan.count), plan.subset))
    with Child(Ours, folder) as ours, Child(AsPublished, folder) as published:
        report(f"{plan.count} requests: compilation")
        first = ours("edit", plan.count)
        values, repeats = [], []
        for number, share in enumerate(np.array_split(chosen, plan.pairs), start=1):
            report(f"{plan.count} requests: pair {number} of {plan.pairs}")
            values.append(published("optimise", share.tolist()))
            repeats.append(ours("edit", plan.count))
        report(f"{plan.count} requests: published keys and solve")
        layers = {part: seconds / plan.subset for part, seconds in published("write", chosen).items()}
        agreement = _agreement(ours, published, chosen)
        if plan.subset == plan.count:
            agreement |= _updates(ours, published)
        else:
            solved, seconds = _solves(ours, published)
            agreement |= solved
            layers["solve"] = seconds / plan.count
            published("read", plan.count)
        memories = {"ours": ours("memory"), "published": published("memory")}
        start_seconds = ours("start_seconds")
    theirs = [{**layers, "values": seconds} for seconds in values]
    mine = [{part: row[part] / plan.count for part in PARTS} for row in repeats]
    for row in (*theirs, *mine):
        row["total"] = sum(row[part] for part in PARTS)
    once = medians(mine)
    return {
        **dataclasses.asdict(plan),
        "subset_requests": chosen,
        "seconds_a_request": {"ours": once, "published": medians(theirs)},
        "pairs": {"ours": mine, "published": theirs},
        "ratios": {
            part: statistics.median(t[part] / m[part] for t, m in zip(theirs, mine, strict=True))
            for part in (*PARTS[:3], "total")
        },
        "compilation_seconds": sum(first.values()) - plan.count * once["total"],
        "session_start_seconds": start_seconds,
        "memory_mib": memories,
        "agreement": agreement,
    }


def _agreement(ours: Child, published: Child, chosen: list[int]) -> dict[str, Any]:
    """How far target values, relative, and the losses reached are apart."""
    (z, losses), (their_z, their_losses) = ours("values", chosen), published("values", chosen)
    errors = np.linalg.norm(z - their_z, axis=-1) / np.linalg.norm(their_z, axis=-1)
    return {
        "z_median": float(np.median(errors)),
        "z_max": float(errors.max()),
        "losses": {"ours": losses, "published": their_losses},
        "loss_max_difference": float(np.abs(np.subtract(losses, their_losses)).max()),
    }


def _updates(ours: Child, published: Child) -> dict[str, Any]:
    """How far the kernels' updates are apart where both wrote the whole batch."""
    errors = {layer: _relative(ours("update", layer), published("update", layer)) for layer in ours("layers")}
    return {"updates": errors, "updates_of": "the whole procedure"}


def _solves(ours: Child, published: Child) -> tuple[dict[str, Any], float]:
    """The same for the published solve of the whole batch, given the library's keys and residuals, and its seconds."""
    errors, seconds = {}, 0.0
    for layer in ours("layers"):
        update, taken = published("solved", layer, *ours("constraints", layer))
        errors[layer] = _relative(ours("update", layer), update)
        seconds += taken
    return {"updates": errors, "updates_of": "the solve, given the library's keys and residuals"}, seconds


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def plot(result: Mapping[str, Any], folder: Path) -> None:
    """Seconds a request by part, one pair of bars for every shape and number of requests."""
    cases = [(name, plan) for name, shape in result["shapes"].items() for plan in shape["plans"]]
    with figure(folder / "edits.png", TITLE, columns=len(cases)) as axes:
        for place, (name, plan) in zip(axes, cases, strict=True):
            bars = {who: {part: plan["seconds_a_request"][who][part] for part in PARTS} for who in ("published", "ours")}
            stacked(place, bars)
            place.set_title(f"{name}, {plan['count']} requests\n{plan['ratios']['total']:.1f} times as fast")
            place.set_ylabel("CPU seconds a request")


class Preparation:
    """Makes problems, in a process that nothing is measured in."""

    def run(self, folder: Path, shape: Shape, count: int, seed: int) -> None:
        prepare(folder, shape, count, seed)


class Ours:
    """The library's session on a problem, with its parts timed from outside."""

    def __init__(self, folder: Path) -> None:
        self._problem = read(folder)
        accelerated = jax.default_backend() != "cpu"
        self._clock = Clock(time.perf_counter) if accelerated else Clock()
        with self._clock.part("start"):
            self._session = self._after = start(self._problem)
        self._held = {"before": memory()["now"]}
        self._start = self._clock.take("start")["other"]
        forget_peak()

    def start_seconds(self) -> float:
        """Of starting the session: reading weights and moments, factoring every layer's prior."""
        return self._start

    def edit(self, count: int, onwards: bool = False) -> dict[str, float]:
        """Write requests, the first ones, or those behind the last edit's into its session; seconds by part."""
        if not onwards:
            self._after = self._session  # what the edit before it wrote is no part of what this one takes
        begin = len(self._after.facts)
        with timed_parts(self._clock), self._clock.part("all"):
            self._after, _ = self._after.edit(self._problem.requests[begin : begin + count])
        if "compiling" not in self._held:
            self._held["compiling"] = memory()["peak"]
            forget_peak()
        return self._clock.take("all")

    def values(self, numbers: Sequence[int]) -> tuple[np.ndarray, list[float]]:
        """Target values and losses of requests of the last edit."""
        reports = self._after.reports
        return np.asarray(reports.z)[numbers], np.asarray(reports.loss, float)[numbers].tolist()

    def layers(self) -> tuple[int, ...]:
        return self._session.settings.layers

    def update(self, layer: int) -> np.ndarray:
        return self._after.layers[layer].update

    def constraints(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """A layer's keys and residuals."""
        held = self._after.layers[layer].constraints
        return np.asarray(held.keys), np.asarray(held.residuals)

    def memory(self) -> dict[str, float]:
        """MiB held before the first edit, at most during it, now, and at most since; the peak of an accelerator's memory."""
        found = jax.devices()[0].memory_stats() or {}
        device = {"device_peak": found["peak_bytes_in_use"] / 2**20} if "peak_bytes_in_use" in found else {}
        return {**self._held, **memory(), **device}


@contextlib.contextmanager
def timed_parts(clock: Clock) -> Iterator[None]:
    """Time what a session calls for its values, keys and solves, waiting for the results."""

    def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with clock.part(part):
                return jax.block_until_ready(work(*args, **options))

        return call

    with contextlib.ExitStack() as stack:
        for part, owner, name in (
            ("values", editing_session, "optimise_in_rounds"),
            ("keys", editing_keys, "enter"),
            ("keys", editing_keys, "read"),
            ("solve", editing_session, "_extended"),
            ("solve", editing_session.EditSession, "_apply"),
        ):
            stack.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        yield


class AsPublished:
    """The published procedure on a problem."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self._problem = problem = read(folder)
        accelerated = torch.cuda.is_available()
        device = "cuda" if accelerated else "cpu"
        clock = Clock(time.perf_counter, torch.cuda.synchronize) if accelerated else Clock()
        model = transformers.AutoModelForCausalLM.from_pretrained(problem.checkpoint, dtype=problem.shape.dtype).to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(problem.checkpoint)
        moments = {layer: torch.as_tensor(moment, device=device) for layer, moment in problem.moments().items()}
        settings = problem.shape.settings()
        self._published = Published(model, tokenizer, problem.prefixes, settings, moments, clock)
        self._values: dict[int, Value] = {}
        self._original = {layer: self._published.kernel(layer).clone() for layer in settings.layers}
        self._held = {"before": memory()["now"]}
        forget_peak()

    def optimise(self, numbers: Sequence[int]) -> float:
        """Optimise these requests' values; seconds a request."""
        clock = self._published.clock
        with clock.part("all"):
            for number in numbers:
                self._values[number] = self._published.value(self._problem.requests[number])
        return sum(clock.take("all").values()) / len(numbers)

    def write(self, numbers: Sequence[int]) -> dict[str, float]:
        """Write these requests as a batch; seconds by part."""
        clock = self._published.clock
        with clock.part("all"):
            self._published.write(
                [self._problem.requests[number] for number in numbers],
                torch.stack([self._values[number].z for number in numbers]),
            )
        return clock.take("all")

    def values(self, numbers: Sequence[int]) -> tuple[np.ndarray, list[float]]:
        """Target values and losses of these requests."""
        found = [self._values[number] for number in numbers]
        return np.stack([value.z.cpu().numpy() for value in found]), [value.loss for value in found]

    def update(self, layer: int) -> np.ndarray:
        return (self._published.kernel(layer).double() - self._original[layer].double()).cpu().numpy()

    def solved(self, layer: int, keys: np.ndarray, residuals: np.ndarray) -> tuple[np.ndarray, float]:
        """The update of the first batch for given keys and residuals, and the seconds that it took."""
        published = self._published
        published.history[layer].zero_()
        given = (torch.as_tensor(array, device=published.model.device) for array in (keys, residuals))
        with published.clock.part("all"):
            update = published.solved(layer, *given)
        return update.cpu().numpy(), published.clock.take("all")["other"]

    def read(self, count: int) -> None:
        """A pass as wide as those that read the keys of so many requests: for the peak of its memory, untimed."""
        contexts = 1 + len(self._problem.prefixes)
        self._published.keys(self._problem.requests[: min(count, READ_ROWS // contexts)], self._problem.shape.layers[0])

    def memory(self) -> dict[str, float]:
        """As the library's."""
        device = {"device_peak": torch.cuda.max_memory_allocated() / 2**20} if torch.cuda.is_available() else {}
        return {**self._held, **memory(), **device}
