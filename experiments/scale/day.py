"""Part `day` of the soak: a session in use, one operation after another, stored after each as `kedit` stores it.

By day, facts are added in small batches, given other targets, taken back, restored, contradicted under each policy, merged
in from other sessions, and steps are undone. By night the same goes on in a session that is compacted every few operations.
Which operation comes, and on which facts, is drawn from the seed, the operation's number and the session as it is: a run
that was interrupted goes on with the same ones. Every operation leaves one event, so the stored session says how many are
done; the log beside it holds what was measured.

A part is one process unless it is interrupted, which is what a service would be. Between the two parts, the day's facts are
all taken back on a copy: that must give the original kernels bit for bit.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.paper.results import Log
from experiments.paper.stage import Stage
from experiments.scale.curves import Verdict, array_bytes, at_least, at_most, flat, folder_state, given_back, process_state
from experiments.scale.faults import numbers
from kedit_jax.checkpoint import has_session, load_session, lock_session, save_session
from kedit_jax.editing import EditRequest, EditSession, compact, merge, undo
from kedit_jax.evaluation import Record
from kedit_jax.verification import verify_session
from kedit_jax.verification.checks import CONTROL, TOLERANCES

Tick = Callable[[int], None]
MIX = {
    "add": 0.30,
    "latest": 0.07,
    "mean": 0.05,
    "first": 0.03,
    "replace": 0.12,
    "retract": 0.17,
    "restore": 0.08,
    "merge": 0.08,
    "undo": 0.10,
}
"""How often which operation comes; `latest`, `mean` and `first` are edits that contradict facts, under these policies."""
SEPARATOR = "~"
"""Between the record's name and the operation's number in the id of a fact that is told once more."""


@dataclass(frozen=True)
class Plan:
    """How long it goes.

    Attributes:
        day, night: operations of each part.
        begin: facts of the first batch.
        most: facts of a batch, otherwise.
        held: facts from which on more are taken back than before.
        every: operations between two measurements.
        load_every: operations after which the session is loaded anew.
        compact_every: operations of the night.
    """

    day: int
    night: int
    begin: int
    most: int
    held: int
    every: int
    load_every: int
    compact_every: int


FULL = Plan(day=240, night=96, begin=40, most=5, held=110, every=6, load_every=5, compact_every=12)
QUICK = Plan(day=22, night=8, begin=4, most=3, held=5, every=4, load_every=5, compact_every=4)


class Operations:
    """What is done to a session, drawn from a seed."""

    def __init__(self, plan: Plan, records: Sequence[Record], start: EditSession, seed: int) -> None:
        self._plan, self._start, self._seed = plan, start, seed
        self._records = {str(record.case_id): record for record in records}
        self._objects: dict[str | None, set[str]] = {}
        for record in records:
            self._objects.setdefault(record.relation_id, set()).add(record.target_new)

    def next(self, session: EditSession, number: int, *, night: bool = False) -> tuple[EditSession, str]:
        """The session after operation `number`, counted from 0, and which kind of operation that was."""
        rng = np.random.default_rng((self._seed, number, int(night)))
        if night and number % self._plan.compact_every == 0 and len(session.facts) > session.compacted:
            return compact(session), "compact"
        if number == 0:
            return session.edit(self._new(session, rng, self._plan.begin))[0], "add"
        single = [str(fact.id) for fact in session.facts[session.compacted :]]
        gone = [str(fact.id) for fact in session.retired]
        there = {str(fact.id) for fact in session.facts}
        back = [name for name in dict.fromkeys(gone) if name not in there]
        last = _last_standing(session)
        about = {(fact.prompt, fact.subject) for fact in session.facts[: session.compacted]}
        # What contradicts a compacted fact can neither take its place nor share its key.
        open_ = [str(f.id) for f in session.facts[session.compacted :] if (f.prompt, f.subject) not in about]
        can = {
            "latest": bool(open_),
            "mean": bool(open_),
            "first": bool(there),
            "replace": bool(single),
            "retract": len(single) > 1,
            "restore": bool(back),
            "undo": last not in (None, "compact"),
        }
        odds = {kind: share for kind, share in MIX.items() if can.get(kind, True)}
        if len(single) > self._plan.held:
            odds["retract"] *= 3
        kind = str(rng.choice(list(odds), p=np.array(list(odds.values())) / sum(odds.values())))
        few = int(rng.integers(1, self._plan.most + 1))

        def some(names: Sequence[str], count: int = few) -> list[str]:
            if not names:
                return []
            return [str(name) for name in rng.choice(names, min(count, len(names)), replace=False)]

        if kind == "add":
            return session.edit(self._new(session, rng, few))[0], kind
        if kind in ("latest", "mean", "first"):
            known = [str(fact.id) for fact in session.facts] if kind == "first" else open_
            about_one = {_record_name(name): name for name in some(known, min(few, 3))}  # a record's facts have one new id
            told = [self._told(session, name, rng, f"{SEPARATOR}{number}") for name in about_one.values()]
            return session.edit(told, conflicts={"mean": "merge"}.get(kind, kind))[0], kind
        if kind == "replace":
            return session.replace([self._told(session, name, rng) for name in some(single, min(few, 3))])[0], kind
        if kind == "retract":
            return session.retract(some(single, min(2 * few, len(single) - 1)))[0], kind
        if kind == "restore":
            return session.restore(some(back))[0], kind
        if kind == "undo":
            return undo(session)[0], kind
        other = dataclasses.replace(self._start, sizes=session.sizes)
        told = self._new(session, rng, few) + [
            self._told(session, name, rng, f"{SEPARATOR}{number}") for name in some(open_, 1)
        ]
        other, _ = other.edit(told, conflicts="keep")
        policy = str(rng.choice(["latest", "merge", "first"]))
        merged, _ = merge(session, other, conflicts=policy, prefix=f"m{number}-")
        return dataclasses.replace(merged, sizes=other.sizes), kind

    def _new(self, session: EditSession, rng: np.random.Generator, count: int) -> list[EditRequest]:
        """Facts that the session does not hold in any version, under their records' names, with a target drawn."""
        there = {_record_name(str(fact.id)) for fact in session.facts}
        free = [name for name in self._records if name not in there] or list(self._records)
        chosen = [str(name) for name in rng.choice(free, min(count, len(free)), replace=False)]
        held = {str(fact.id) for fact in session.facts}
        return [
            dataclasses.replace(self._request(name, rng), id=name if name not in held else None) for name in chosen
        ]  # fmt: skip

    def _told(self, session: EditSession, name: str, rng: np.random.Generator, mark: str = "") -> EditRequest:
        """A fact of the session with another target, under its own id or, with a mark, a new one."""
        fact = next(fact for fact in session.facts if fact.id == name)
        others = self._others(_record_name(name), fact.target)
        base = name.split(SEPARATOR)[0]
        return dataclasses.replace(fact, target=str(rng.choice(others)), id=f"{base}{mark}" if mark else name)

    def _request(self, name: str, rng: np.random.Generator) -> EditRequest:
        return dataclasses.replace(self._records[name].request(), target=str(rng.choice(self._others(name))))

    def _others(self, name: str, target: str | None = None) -> list[str]:
        """Objects of the record's relation, but the true one and this target."""
        record = self._records.get(name)
        relation = record.relation_id if record is not None else next(iter(self._objects))
        true = record.target_true if record is not None else None
        return sorted(self._objects[relation] - {true, target})


def _record_name(name: str) -> str:
    """The record that a fact tells, from its id: its own name, with a prefix where it was merged, and a mark."""
    return name.split("-")[-1].split(SEPARATOR)[0]


def _last_standing(session: EditSession) -> str | None:
    """Kind of the event that `undo` would take back."""
    undone = {event.undoes for event in session.events}
    kinds = [e.kind for n, e in enumerate(session.events, 1) if e.kind != "undo" and n not in undone]
    return kinds[-1] if kinds else None


def run(stage: Stage, plan: Plan, editor: str, seed: int, home: Path, log: Log, tick: Tick, *, until: int = 0) -> None:
    """The day, what is checked in the evening, and the night; from wherever the stored session stands.

    Args:
        until: stop after so many operations, as a kill would; 0 goes to the end.
    """
    start = stage.start(stage.settings(editor, stage.base.seed))
    operations = Operations(plan, stage.records, start, seed)
    temporary = home / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(temporary)  # so that what stays there is seen
    try:
        part = _Part(stage, plan, operations, log, tick, temporary, until)
        day = part.go(start, home / "day", plan.day, night=False)
        if day is None:
            return
        if not any(line.get("part") == "evening" for line in log.lines):
            log.append({"part": "evening", **_evening(day)})
        night = dataclasses.replace(day, events=())  # a session of its own, with the day's facts
        if part.go(night, home / "night", plan.night, night=True) is not None:
            log.finish()
    finally:
        tempfile.tempdir = before


@dataclass
class _Part:
    stage: Stage
    plan: Plan
    operations: Operations
    log: Log
    tick: Tick
    temporary: Path
    until: int

    def go(self, start: EditSession, folder: Path, count: int, *, night: bool) -> EditSession | None:
        """The session after `count` operations, or None where it is to stop before."""
        name = "night" if night else "day"
        session = self._loaded(folder) if has_session(folder) else start
        done = len(session.events)
        self.tick(done)
        logged = sum(line.get("part") == name for line in self.log.lines)
        if logged < done:  # killed between storing the session and its line
            self._note(name, session, done, session.events[-1].kind, {}, folder, began=done)
        began, last = done, session
        stood = {done: _facts(session)}
        for number in range(done, count):
            if self.until and number >= self.until:
                return None
            times, begin = {}, time.process_time()
            same: bool | None = None
            with lock_session(folder) as lock:
                if number > began and number % self.plan.load_every == 0:
                    session = self._loaded(folder)
                    times["load_s"] = time.process_time() - begin
                    same = numbers(session) == numbers(last)
                begin = time.process_time()
                session, kind = self.operations.next(session, number, night=night)
                times["operation_s"] = time.process_time() - begin
                begin = time.process_time()
                save_session(session, folder, lock=lock)
                times["save_s"] = time.process_time() - begin
            last = session
            stood[number + 1] = _facts(session)
            found: dict[str, Any] = times if same is None else {**times, "loaded_same": same}
            undone = session.events[-1].undoes
            if undone is not None and undone - 1 in stood:
                found |= {"undone_same": stood[number + 1] == stood[undone - 1]}
            self._note(name, session, number + 1, kind, found, folder, began)
            self.tick(1)
        return session

    def _loaded(self, folder: Path) -> EditSession:
        stage = self.stage
        return load_session(folder, stage.model, stage.tokenizer, stage.moments, priors=stage.folder)

    def _note(
        self, part: str, session: EditSession, number: int, kind: str, found: dict[str, Any], folder: Path, began: int
    ) -> None:
        line = {"part": part, "operation": number, "kind": kind, "began": began, **found}
        if number % self.plan.every == 0:
            line |= _measured(session) | {"kept_mib": given_back()} | process_state() | folder_state(folder, self.temporary)
        self.log.append(line)


def _facts(session: EditSession) -> frozenset[EditRequest]:
    return frozenset(session.facts)


def _measured(session: EditSession) -> dict[str, Any]:
    """What the session is, and how far from a fresh fit of what it holds."""
    held = session.layers.values()
    checks = verify_session(session)
    controls = [check.control for check in checks if check.control is not None]
    return {
        "facts": len(session.facts),
        "compacted": session.compacted,
        "retired": len(session.retired),
        "rows_mib": sum(array_bytes([layer.constraints, layer.retired]) for layer in held) / 2**20,
        "arrays_mib": sum(_stored(layer) for layer in held) / 2**20,
        "error": max(check.error for check in checks),
        "control": min(controls) if controls else None,
        "verified": all(check.holds for check in checks),
    }


def _stored(layer: Any) -> int:
    """Bytes of the arrays that a checkpoint keeps of a layer."""
    base = [] if layer.base is None else [layer.base.statistics.gram, layer.base.statistics.right, layer.base.update]
    return array_bytes([layer.constraints, layer.retired, layer.update, *base])


def _evening(session: EditSession) -> dict[str, Any]:
    """All facts taken back, at once and fact by fact of what is left of a half."""
    names = [str(fact.id) for fact in session.facts]
    none, _ = session.retract(names)
    half, _ = session.retract(names[::2])
    rest, _ = half.retract([str(fact.id) for fact in half.facts])
    again, _ = none.restore(list(dict.fromkeys(names)))
    verified = [check.holds for part in (session, half, again) for check in verify_session(part)]
    return {
        "taken_back": len(names),
        "original": [_same(one.model, session.base) for one in (none, rest)],
        "verified": all(verified),
    }


def _same(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def _beyond(line: dict[str, Any]) -> float:
    """Bytes on disk that are no arrays: Orbax's own, and a line for each fact and each step of the history."""
    lines = line["operation"] + line["facts"] + line["retired"]
    return float((line["disk_bytes"] - line["arrays_mib"] * 2**20) / 2**10 / (128 + lines))


def verdicts(lines: Sequence[dict[str, Any]]) -> list[Verdict]:
    """What should be flat, and whether it is.

    Curves count from the second half of a part on, when its programs are compiled; of a process that went on behind another,
    what the last one held.
    """
    found = []
    for part in ("day", "night"):
        told = [line for line in lines if line.get("part") == part and "error" in line]
        loads = [line["loaded_same"] for line in lines if line.get("part") == part and "loaded_same" in line] or [np.nan]
        undone = [line["undone_same"] for line in lines if line.get("part") == part and "undone_same" in line] or [1]
        own = [line for line in told if line["began"] == told[-1]["began"]]
        late = [line for line in own if line["operation"] >= told[-1]["operation"] / 2] or own
        x = [line["operation"] for line in late]
        found += [
            at_most(f"{part}: error", [line["error"] for line in told], float(TOLERANCES["session"].of("float64", 0.0))),
            at_least(f"{part}: verified at every measurement", [line["verified"] for line in told], 1),
            at_least(f"{part}: loaded as it was stored, bit for bit", loads, 1),
            at_least(f"{part}: undone, the facts that stood before", undone, 1),
            flat(f"{part}: memory beyond rows", x, [line["rss_mib"] - line["rows_mib"] for line in late], 0.05, "MiB"),
            flat(f"{part}: open files", x, [line["open_files"] for line in late], 0.1),
            flat(f"{part}: JAX arrays", x, [line["live_arrays"] for line in late], 0.05),
            flat(f"{part}: bytes of JAX arrays", x, [line["live_mib"] for line in late], 0.05, "MiB"),
            flat(f"{part}: programs compiled for edits", x, [line["edit_programs"] for line in late], 0.1),
            flat(f"{part}: memory mappings", x, [line["maps"] for line in late], 0.1),
            at_most(f"{part}: bytes on disk beyond arrays, over 128 KiB and 1 KiB a line", [_beyond(x) for x in told], 1),
            at_most(
                f"{part}: versions beside one, and other names left", [x["versions"] - 1 + x["leftovers"] for x in told], 0
            ),
        ]
        if controls := [line["control"] for line in told if line["control"] is not None]:  # compacted facts have none
            found.append(at_least(f"{part}: its negative control", controls, CONTROL))
    for line in lines:
        if line.get("part") == "evening":
            found += [at_least("evening: all taken back, the original kernels bit for bit", line["original"], 1)]
            found += [at_least("evening: verified", [line["verified"]], 1)]
    return found
