"""Part `steps` of the soak: 10,000 steps of one edit each, by the solver that sessions run, on the model's own constraints.

A constraint is a key and a residual that a session of the embedded model has stored in its last edited layer. The world has
2,108 facts that can be edited, so they are told in rounds: each round is a session of its own on the unedited model, with
other prefixes before the prompts (so that keys differ), and from the second on with other objects of the same relation as
targets. All target values are optimised; none is drawn. From the second round on, then, every constraint contradicts earlier
ones under nearly the same key, and all of them stand (policy `keep`).

Fresh one-time fits are computed by another process, and what glibc keeps of a session that was stored is given back: what is
measured of this one's memory is that of the steps.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.measuring import Child, forget_peak, memory
from experiments.paper.horizon import stored_constraints
from experiments.paper.results import Log
from experiments.paper.stage import Stage
from experiments.scale.curves import Verdict, array_bytes, at_least, at_most, flat, folder_state, given_back
from experiments.scale.faults import numbers
from kedit_jax import solve
from kedit_jax.checkpoint import load_session, save_session
from kedit_jax.editing import EditSession, Event, history
from kedit_jax.editing.history import LayerHistory, Site
from kedit_jax.editing.session import texts_of
from kedit_jax.evaluation import Record
from kedit_jax.solve import host
from kedit_jax.verification.checks import CONTROL, TOLERANCES

Tick = Callable[[int], None]
FIRST = (1, 2, 5, 10, 20, 50, 100)
"""Steps that are measured beside those evenly spaced."""

LEFT = "memory that savings leave behind, over the largest one's constraints"
SEEN = 10
"""MiB from which on a session shows in the memory of a process."""


@dataclass(frozen=True)
class Plan:
    """How long it goes.

    Attributes:
        steps: of one edit each.
        every: steps between two measurements.
        save_every: steps between two sessions stored.
        batch: edits at once of the sessions that make the constraints.
        apart: fresh fits are computed by another process, which takes seconds to begin.
    """

    steps: int
    every: int
    save_every: int
    batch: int
    apart: bool = True

    @property
    def points(self) -> list[int]:
        """Steps after which is measured."""
        return sorted({*(n for n in FIRST if n < self.every), *range(self.every, self.steps + 1, self.every)})


FULL, QUICK = Plan(10_000, 250, 1000, 100), Plan(240, 20, 120, 12, apart=False)


def retold(records: Sequence[Record], number: int) -> list[Record]:
    """The records of a round: from the second on with another of their relation's objects, never the true one, as target."""
    if number == 0:
        return list(records)
    rng = np.random.default_rng((number, 5))
    objects: dict[str | None, set[str]] = {}
    for record in records:
        objects.setdefault(record.relation_id, set()).add(record.target_new)
    told = []
    for record in records:
        others = sorted(objects[record.relation_id] - {record.target_new, record.target_true})
        told.append(dataclasses.replace(record, target_new=str(rng.choice(others))) if others else record)
    return told


def constraints_of(stage: Stage, plan: Plan, editor: str, home: Path, say: Callable[[str], None]) -> solve.Constraints:
    """The model's own constraints, round after round; each round is kept in `home`."""
    parts: list[solve.Constraints] = []
    rounds = -(-plan.steps // len(stage.records))
    for number in range(rounds):
        path = home / f"round-{number}.npz"
        if not path.exists():
            say(f"constraints: round {number + 1} of {rounds}")
            told = retold(stage.records, number)[: plan.steps - number * len(stage.records)]
            made = stored_constraints(
                stage, stage.settings(editor, stage.base.seed + number, conflicts="keep"), told, plan.batch
            )
            home.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, keys=made.keys, residuals=made.residuals, noise=made.noise)
            partial.rename(path)
        with np.load(path) as held:
            parts.append(solve.Constraints(held["keys"], held["residuals"], held["noise"]))
    return solve.take(solve.concatenate(parts), np.arange(plan.steps))


class Fresh:
    """One-time fits of the first constraints of a stack, in a process of their own."""

    def __init__(self, site: Site, stack: solve.Constraints) -> None:
        self._site, self._stack = site, stack

    def __call__(self, name: str, count: int) -> np.ndarray:
        """As `Child` is asked, for one in this process."""
        found: np.ndarray = getattr(self, name)(count)
        return found

    def fit(self, count: int) -> np.ndarray:
        with solve.float64():
            some = solve.take(self._stack, np.arange(count))
            return history.one_time(dataclasses.replace(history.empty_history(self._site), constraints=some), self._site)


def near_duplicates(stack: solve.Constraints, count: int) -> dict[str, float]:
    """Of keys of the second round: cosines with the same facts' keys of the first; None where there is one round."""
    keys = np.asarray(stack.keys, np.float64)
    pairs = min(count, len(keys) - count)
    if pairs <= 0:
        return {}
    first, second = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (keys[:pairs], keys[count:][:pairs]))
    cosines = (first * second).sum(1)
    return {"median": float(np.median(cosines)), "least": float(cosines.min()), "most": float(cosines.max())}


def state_bytes(held: LayerHistory) -> int:
    """What the solver keeps beside the recorded constraints and the update, without room for more."""
    assert isinstance(held.sequence, host.HostSequence)  # noqa: S101
    return array_bytes(held.sequence.solver)


def session_of(start: EditSession, held: LayerHistory, facts: Sequence[Any]) -> EditSession:
    """The session that has made these steps, one event each."""
    (layer,) = start.layers
    events = tuple(Event("edit", (str(fact.id),), texts=texts_of([fact])) for fact in facts)
    made = dataclasses.replace(
        start, layers={layer: held}, facts=tuple(facts), batches=(1,) * len(facts), events=events
    )  # fmt: skip
    return made._with_model()


def run(stage: Stage, plan: Plan, editor: str, home: Path, log: Log, tick: Tick, say: Callable[[str], None]) -> None:
    """Step after step. A continued run makes its earlier steps again and measures nothing of them."""
    layer = stage.settings(editor, 0).layers[-1]
    start = stage.start(stage.settings(editor, 0, layers=(layer,), conflicts="keep"))
    stack = constraints_of(stage, plan, editor, home, say)
    facts = [
        dataclasses.replace(record.request(), id=f"{number}-{record.case_id}")
        for number in range(-(-plan.steps // len(stage.records)))
        for record in retold(stage.records, number)
    ][: plan.steps]
    site, held = start.site(layer), start.layers[layer]
    plain = dataclasses.replace(site, prior=jax.tree.map(np.asarray, site.prior), kernel=np.array(site.kernel))
    empty = held.sequence
    assert isinstance(empty, host.HostSequence)  # noqa: S101
    rounded, naive = np.zeros(site.kernel.shape, np.float32), np.zeros(site.kernel.shape)
    rank, n_values, rows = site.prior.rank, site.kernel.shape[1], array_bytes(solve.take(stack, np.array([0])))
    done, seconds, points = len(log.lines), [], plan.points
    made_by = Child(Fresh, plain, stack) if plan.apart else contextlib.nullcontext(Fresh(plain, stack))
    with made_by as fresh, solve.float64():
        forget_peak()
        for number in range(1, plan.steps + 1):
            block = solve.take(stack, np.array([number - 1]))
            begin = time.process_time()
            held, step = history.extended(held, site, block)
            seconds.append(time.process_time() - begin)
            # The same step as a float32 model sees it: `history.replayed` in float32 gives this very sum.
            rounded += step.left.astype(np.float32) @ step.right.astype(np.float32)
            against = block.residuals - np.asarray(block.keys, np.float64) @ naive
            _, alone = host.advance(empty, site.prior, solve.Constraints(block.keys, against, block.noise))
            naive += alone.left @ alone.right
            tick(1)
            if number not in points:
                continue
            if points.index(number) < done:
                seconds.clear()
                forget_peak()
                continue
            held_now, reference = memory(), fresh("fit", number)
            size = float(np.linalg.norm(reference))
            line = {
                "step": number,
                "error": float(np.linalg.norm(held.update - reference)) / size,
                "error_float32": float(np.linalg.norm(rounded - reference.astype(np.float32))) / size,
                "error_naive": float(np.linalg.norm(naive - reference)) / size,
                "mean_s": float(np.mean(seconds)),
                "median_s": float(np.median(seconds)),
                "rss_mib": held_now["now"],
                "peak_mib": held_now["peak"],
                "recorded_mib": number * rows / 2**20,
                "state_mib": state_bytes(held) / 2**20,
                "promised_mib": host.state_size(rank, n_values, number) / 2**20,
            }
            if number % plan.save_every == 0:
                begin = time.process_time()
                save_session(session_of(start, held, facts[:number]), home / "session", overwrite=True)
                line |= {"save_s": time.process_time() - begin, **folder_state(home / "session")}
                line |= {"kept_mib": given_back()}  # or each save, larger than the one before, would show in what follows
            log.append(line)
            seconds.clear()
            forget_peak()
    say("steps: loading the stored session, which makes all its steps again")
    made = session_of(start, held, facts)
    begin = time.process_time()
    loaded = load_session(home / "session", stage.model, stage.tokenizer, stage.moments, priors=stage.folder)
    took = time.process_time() - begin
    log.append(
        {
            "loaded_s": took,
            "loaded_same": numbers(loaded) == numbers(made),
            "replayed_same": plan.steps > 1000 or _same_in_float32(loaded, rounded),
            "cosines": near_duplicates(stack, len(stage.records)),
        }
    )
    log.finish()


def _same_in_float32(session: EditSession, rounded: np.ndarray) -> bool:
    """Whether the sum of rounded steps is that which the session itself would give."""
    return all(np.array_equal(part.dense(), rounded) for part in session.replayed("float32").updates.values())


def between_saves(lines: Sequence[dict[str, Any]], save_every: int) -> Verdict:
    """Peak memory beyond recorded constraints while nothing is stored: the stretch that rises most."""
    name, stretches = "peak memory beyond recorded constraints, between two savings", []
    for number in sorted({(line["step"] - 1) // save_every for line in lines}):
        own = [line for line in lines if (line["step"] - 1) // save_every == number]
        beyond = [line["peak_mib"] - line["recorded_mib"] for line in own]
        stretches.append(flat(name, [line["step"] for line in own], beyond, 0.02, "MiB"))
    return max(stretches, key=lambda verdict: verdict.measured)


def verdicts(lines: Sequence[dict[str, Any]], rank: int, save_every: int) -> list[Verdict]:
    """What should be flat, and whether it is."""
    told = [line for line in lines if "step" in line]
    settled = [line for line in told if line["step"] > solve.interface.CROSSOVER * rank]
    late = settled if len(settled) > 3 else told
    steps = [line["step"] for line in late]
    beyond = [line["peak_mib"] - line["recorded_mib"] - late[0]["peak_mib"] + late[0]["recorded_mib"] for line in late]
    largest = max(line["recorded_mib"] for line in late)
    saved = [line for line in told if "disk_bytes" in line]
    tolerance = TOLERANCES["1"]
    ends = [line["loaded_same"] for line in lines if "loaded_same" in line]
    per_fact = [line["disk_bytes"] / line["step"] for line in saved]
    return [
        at_most("error, float64", [line["error"] for line in told], float(tolerance.of("float64", 0.0))),
        at_most("error, steps rounded to float32", [x["error_float32"] for x in told], tolerance.of("float32", 0.0)),
        at_least(
            "negative control: error without history", [x["error_naive"] for x in told if x["step"] >= FIRST[2]], CONTROL
        ),
        flat("CPU s a step, past the crossover", steps, [line["mean_s"] for line in late], 0.25, "s"),
        between_saves(late, save_every),
        *([at_most(LEFT, [max(beyond) / largest], 3)] if largest > SEEN else []),
        at_most("solver's state over what `state_size` promises", [x["state_mib"] / x["promised_mib"] for x in told], 1.0),
        flat("bytes on disk a fact", [line["step"] for line in saved], per_fact, 0.05, "B"),
        *([at_least("loaded as it was stored, bit for bit", ends, 1)] if ends else []),
        at_most("versions and other names left in the folder", [x["versions"] - 1 + x["leftovers"] for x in saved], 0),
    ]
