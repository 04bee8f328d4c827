"""Faults in the middle of things: processes killed, disks that fill, and what a session, moments and exports are then.

    python -m experiments.scale.faults [--kills N] [--seed S]      tables and numbers in this folder
    python -m experiments.scale.faults --quick                     a dozen faults of saving and exporting, nothing written

Children are killed (SIGKILL) at random moments of a stage, or may not write files beyond a random size. After each fault
the stage is looked at from another process: a session must be the one before the step or the one after, hold its checks
(`kedit verify`), and lead, once the step is repeated, to the very arrays of a run without faults.

Two processes fork the children. One has imported everything and nothing more: a child of it loads the embedded model,
computes moments or edits, and stores. The other has two sessions ready, so that a child of it saves or exports at once; it
has neither run a program of XLA's since nor opened a checkpoint, whose threads would not survive the fork.
"""

import argparse
import dataclasses
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kedit_jax import assets, checkpoint, solve
from kedit_jax.checkpoint import load_session, lock_session, newest_version, save_session
from kedit_jax.cli.cache import compiled_programs_kept
from kedit_jax.editing import history
from kedit_jax.editing.moments import Moments, compute_moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, Event, start_session
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.values import ValueSettings
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import parse_records
from kedit_jax.export import export_merged
from kedit_jax.models import Decoder, load, model_fingerprint
from kedit_jax.verification import verify_session

HERE = Path(__file__).parent
SETTINGS = EditSettings(layers=(2, 3), moment_weight=500.0, prefixes=0, values=ValueSettings(steps=8, learning_rate=0.5))
FACTS = 4  # a step
TOKENS = 6000
QUICK = 5  # kills a stage
DISKS = 3  # kills for a disk that fills
LATER = 1.3  # of the length of a stage: kills that come after its last moment, too
REFUSED, BROKEN = 3, 4  # exit statuses of a child: an error for the user, and one that is none
Mark = Callable[[str], None]
Stage = Callable[[Path, Mark], None]


# --- what children do -------------------------------------------------------------------------------------------------


def moments_stage(home: Path, mark: Mark) -> None:
    """Second moments, what is unfinished stored after every block."""
    model, tokenizer = load(assets.model_dir(), dtype=np.float32)
    mark("moments")
    _moments(model, tokenizer, home / "moments", save_every=0)


def edit_stage(home: Path, mark: Mark) -> None:
    """What `kedit edit` does in a session that was begun before."""
    with lock_session(home / "session") as lock:
        session = _opened(home / "session", home / "kept", *load(assets.model_dir(), dtype=np.float32))
        mark("values")
        session, _ = session.edit(
            _facts()[FACTS:],
            progress=lambda what, done, of: mark("solve") if (what, done) == ("target values", of) else None,
        )
        mark("saving after an edit")
        save_session(session, lock.folder, lock=lock)


def ready_stages(stages: dict[str, Stage], kept: Path) -> None:
    """Stages of a process that holds the sessions before and after a step already."""
    before, after = _ready_sessions(kept)

    def saving(home: Path, mark: Mark) -> None:
        mark("saving")
        save_session(after, home / "session")

    def exporting(home: Path, mark: Mark) -> None:
        mark("export")
        export_merged(assets.model_dir(), after, home / "merged", overwrite=True)

    stages |= {"saving": saving, "export": exporting, "begin": lambda home, mark: save_session(before, home / "session")}


def _moments(model: Decoder, tokenizer: Any, cache: Path, save_every: float = 60) -> Moments:
    return compute_moments(
        model, tokenizer, assets.corpus(), SETTINGS.layers, max_tokens=TOKENS, cache=cache, save_every=save_every
    )


def _facts() -> list[EditRequest]:
    return [record.request() for record in parse_records(assets.records())[: 2 * FACTS]]


def _opened(folder: Path, kept: Path, model: Decoder, tokenizer: Any) -> EditSession:
    return load_session(folder, model, tokenizer, _moments(model, tokenizer, kept), priors=kept)


def _ready_sessions(kept: Path) -> tuple[EditSession, EditSession]:
    """Without a program of XLA's: moments and constraints are drawn, and the solver is NumPy's."""
    model, tokenizer = load(assets.model_dir(), dtype=np.float32)
    before = ready_step(start_session(model, tokenizer, _drawn_moments(model), SETTINGS, priors=kept))
    return before, ready_step(before)


def _drawn_moments(model: Decoder) -> Moments:
    """The same ones every time."""
    width, rng = model.config.d_ff, np.random.default_rng(0)
    keys = rng.normal(size=(300, width))
    moment = keys.T @ keys / len(keys) + np.eye(width)
    return Moments(dict.fromkeys(SETTINGS.layers, moment), len(keys), model_fingerprint(model), "drawn", str(model.dtype))


def ready_step(session: EditSession) -> EditSession:
    """The session with the next facts written under keys and residuals that are drawn; the same ones every time."""
    rng, layers = np.random.default_rng(len(session.facts)), {}
    facts = [dataclasses.replace(fact, id=f"fact-{number}") for number, fact in enumerate(_facts())]
    facts = facts[len(session.facts) :][:FACTS]
    with solve.float64():
        for layer, held in session.layers.items():
            site = session.site(layer)
            shapes = [(FACTS, size) for size in site.kernel.shape]
            drawn = rng.normal(size=shapes[0]).astype(np.float32), 0.01 * rng.normal(size=shapes[1])
            layers[layer], _ = history.extended(held, site, solve.Constraints(*drawn, np.full(FACTS, site.noise)))
    return dataclasses.replace(
        session,
        layers=layers,
        facts=(*session.facts, *facts),
        batches=(*session.batches, FACTS),
        events=(*session.events, Event("edit", tuple(str(fact.id) for fact in facts))),
    )._with_model()


# --- killing them -----------------------------------------------------------------------------------------------------


class Forker:
    """A process that forks a child a fault, from the state that `prepare` leaves it in. Make it before JAX runs anything."""

    def __init__(self, prepare: Callable[[dict[str, Stage]], None]) -> None:
        self.asked, other = Pipe()
        self.pid = os.fork()
        if not self.pid:
            stages: dict[str, Stage] = {}
            with compiled_programs_kept():
                prepare(stages)
                while (order := other.recv()) is not None:
                    other.send(_faulty(stages[order.pop("stage")], **order))
            os._exit(0)

    def run(self, stage: str, home: Path, **fault: Any) -> dict[str, Any]:
        """Run a stage in a child; see `_faulty`."""
        self.asked.send({"stage": stage, "home": home} | fault)
        outcome: dict[str, Any] = self.asked.recv()
        if outcome["status"] == BROKEN:
            raise RuntimeError(f"{stage} under {fault} ended in what is no error for users:\n{outcome['said']}")
        return outcome

    def close(self) -> None:
        self.asked.send(None)
        os.waitpid(self.pid, 0)


def _faulty(
    stage: Stage, home: Path, at: str = "", delay: float | None = None, limit: int | None = None, unforeseen: bool = False
) -> dict[str, Any]:
    """Fork a child that runs a stage; when it was at `at`, and how long that took.

    Args:
        at: the mark that the fault counts from.
        delay: seconds after which the child is killed.
        limit: bytes that no file may exceed from there on.
        unforeseen: do not let the session look for room before it writes.
    """
    mine, childs = Pipe()
    pid = os.fork()
    if not pid:
        _child(stage, home, childs, at, limit, unforeseen)
    childs.close()
    marks, said, deadline = {}, "", None
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not wait([mine], left):
            os.kill(pid, signal.SIGKILL)
            break
        try:
            what, when = mine.recv()
        except EOFError:
            break
        if isinstance(when, str):
            said = when
            continue
        marks[what] = when
        if what == at and delay is not None:
            deadline = when + delay
    _, status = os.waitpid(pid, 0)
    mine.close()
    return {"status": os.waitstatus_to_exitcode(status), "marks": marks, "said": said}


def _child(stage: Stage, home: Path, pipe: Connection, at: str, limit: int | None, unforeseen: bool) -> None:
    def mark(what: str) -> None:
        pipe.send((what, time.monotonic()))
        if what == at and limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    code = BROKEN
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Orbax prints a traceback for each of its threads
    try:
        if unforeseen:
            checkpoint._check_space = lambda folder, size: None
        stage(home, mark)
        mark("end")
        code = 0
    except KeditError as error:
        code = REFUSED
        pipe.send(("said", str(error)))
    except BaseException:
        pipe.send(("said", traceback.format_exc()))
    os._exit(code)


# --- looking at what is left ------------------------------------------------------------------------------------------


def numbers(session: EditSession) -> list[bytes]:
    """All that a session is made of."""
    layers = [(held.constraints, held.retired, held.sequence) for held in session.layers.values()]
    texts = repr((session.facts, session.batches, session.events, session.retired))
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((session.model, layers))] + [texts.encode()]


def state_of(folder: Path, states: dict[str, list[bytes]], opened: Callable[[Path], EditSession]) -> str:
    """Which of the states a stored session is in. Raises where it is in none, fails its checks, or is still locked."""
    with lock_session(folder):
        session = opened(folder)
    found = [name for name, content in states.items() if content == numbers(session)]
    if not found:
        raise RuntimeError(f"{folder} is in neither of {', '.join(states)}")
    failed = [check.id for check in verify_session(session) if not check.holds]
    if failed:
        raise RuntimeError(f"{folder} is {found[0]}, and fails the checks {failed}")
    return found[0]


def files_of(folder: Path) -> dict[str, bytes]:
    """An export's files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclasses.dataclass
class Tally:
    """What came of one kind of fault."""

    stage: str
    fault: str
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    resumed_exactly: int = 0

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


# --- the experiment ---------------------------------------------------------------------------------------------------


def ready_faults(forker: Forker, home: Path, times: int, rng: random.Random, say: Callable[[str], None]) -> list[Tally]:
    """Saving and exporting, interrupted and without room."""
    before, after = _ready_sessions(home / "kept")
    states, moments = {"before": numbers(before), "after": numbers(after)}, _drawn_moments(before.base)

    def opened(folder: Path) -> EditSession:
        return load_session(folder, before.base, before.tokenizer, moments, priors=home / "kept")

    forker.run("begin", home)
    forker.run("saving", home, at="saving")  # the first one warms up
    shutil.rmtree(home / "session")
    forker.run("begin", home)
    shutil.copytree(home / "session", home / "begun")
    lasts = _length(forker.run("saving", home, at="saving"), "saving")
    largest = max(path.stat().st_size for path in newest_version(home / "session").rglob("*"))
    tallies = []
    for fault in ("SIGKILL", "full disk, seen in advance", "full disk, met while writing"):
        tallies.append(tally := Tally("saving", fault))
        for _ in range(times if fault == "SIGKILL" else max(1, times // DISKS)):
            shutil.rmtree(home / "session")
            shutil.copytree(home / "begun", home / "session")
            how = (
                {"delay": rng.uniform(0, LATER * lasts)}
                if fault == "SIGKILL"
                else {"limit": int(largest ** rng.uniform(0.3, 1))}
            )
            outcome = forker.run("saving", home, at="saving", unforeseen="writing" in fault, **how)
            state = state_of(home / "session", states, opened)
            if (state == "before") != bool(outcome["status"]) and outcome["status"] != -signal.SIGKILL:
                raise RuntimeError(f"saving ended with {outcome}, but the session is {state}")
            tally.count(state)
            save_session(ready_step(opened(home / "session")) if state == "before" else after, home / "session")
            tally.resumed_exactly += numbers(opened(home / "session")) == states["after"]
        say(f"{tally}")
    export_merged(assets.model_dir(), before, home / "merged")
    was = files_of(home / "merged")
    shutil.copytree(home / "merged", home / "exported")
    lasts = _length(forker.run("export", home, at="export"), "export")
    new = files_of(home / "merged")
    for fault in ("SIGKILL", "full disk, met while writing"):
        tallies.append(tally := Tally("export over an earlier one", fault))
        for _ in range(times if fault == "SIGKILL" else max(1, times // DISKS)):
            shutil.rmtree(home / "merged", ignore_errors=True)
            shutil.copytree(home / "exported", home / "merged")
            largest = max(map(len, new.values()))
            how = (
                {"delay": rng.uniform(0, LATER * lasts)}
                if fault == "SIGKILL"
                else {"limit": int(largest ** rng.uniform(0.3, 1))}
            )
            outcome = forker.run("export", home, at="export", **how)
            found = files_of(home / "merged")
            state = "before" if found == was else "after" if found == new else "nothing" if not found else "between"
            if state == "between":
                raise RuntimeError(f"export ended with {outcome}, and left {sorted(found)}")
            tally.count(state)
            export_merged(assets.model_dir(), after, home / "merged", overwrite=True)
            tally.resumed_exactly += files_of(home / "merged") == new
        say(f"{tally}")
    return tallies


def edit_faults(forker: Forker, home: Path, times: int, rng: random.Random, say: Callable[[str], None]) -> list[Tally]:
    """Moments, target values and the solve, by children that do the whole of it."""
    model, tokenizer = load(assets.model_dir(), dtype=np.float32)
    moments = _moments(model, tokenizer, home / "kept")
    first, _ = start_session(model, tokenizer, moments, SETTINGS, priors=home / "kept").edit(_facts()[:FACTS])
    save_session(first, home / "session")
    before = _opened(home / "session", home / "kept", model, tokenizer)
    after, _ = before.edit(_facts()[FACTS:])
    states = {"before": numbers(before), "after": numbers(after)}

    def opened(folder: Path) -> EditSession:
        return load_session(folder, model, tokenizer, moments, priors=home / "kept")

    tallies = [tally := Tally("moments", "SIGKILL")]
    forker.run("moments", home, at="moments")  # compiles
    shutil.rmtree(home / "moments")
    lasts = _length(forker.run("moments", home, at="moments"), "moments")
    for _ in range(times):
        shutil.rmtree(home / "moments", ignore_errors=True)
        forker.run("moments", home, at="moments", delay=rng.uniform(0, LATER * lasts))
        left = sorted(path.name.split("-")[0] for path in (home / "moments").glob("*.safetensors"))
        tally.count(" and ".join(left) or "nothing yet")
        found = _moments(model, tokenizer, home / "moments")
        same = all(np.array_equal(found.by_layer[layer], c0) for layer, c0 in moments.by_layer.items())
        tally.resumed_exactly += same and found.errors == moments.errors
    say(f"{tally}")
    shutil.copytree(home / "session", home / "begun")
    forker.run("edit", home)  # compiles
    shutil.rmtree(home / "session")
    shutil.copytree(home / "begun", home / "session")
    marks = forker.run("edit", home)["marks"]
    order = ["values", "solve", "saving after an edit", "end"]
    for stage, then in itertools.pairwise(order):
        tallies.append(tally := Tally(stage, "SIGKILL"))
        for _ in range(times):
            shutil.rmtree(home / "session")
            shutil.copytree(home / "begun", home / "session")
            forker.run("edit", home, at=stage, delay=rng.uniform(0, marks[then] - marks[stage]))
            tally.count(state_of(home / "session", states, opened))
            resumed = opened(home / "session")
            if len(resumed.facts) == FACTS:
                resumed, _ = resumed.edit(_facts()[FACTS:])
            save_session(resumed, home / "session")
            tally.resumed_exactly += numbers(opened(home / "session")) == states["after"]
        say(f"{tally}")
    return tallies


def _length(outcome: dict[str, Any], stage: str) -> float:
    return float(outcome["marks"]["end"] - outcome["marks"][stage])


def table(tallies: list[Tally]) -> str:
    """Markdown."""
    lines = ["| while | fault | times | found afterwards | resumed with the same arrays |", "|---|---|---:|---|---:|"]
    for tally in tallies:
        found = ", ".join(f"{name} {count}" for name, count in sorted(tally.outcomes.items()))
        times = sum(tally.outcomes.values())
        lines.append(f"| {tally.stage} | {tally.fault} | {times} | {found} | {tally.resumed_exactly} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="saving and exporting alone; writes no results")
    parser.add_argument("--kills", type=int, default=20, help="faults of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "os.fork")
    times, rng = QUICK if options.quick else options.kills, random.Random(options.seed)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def cold(stages: dict[str, Stage]) -> None:
        stages |= {"moments": moments_stage, "edit": edit_stage}

    with tempfile.TemporaryDirectory() as folder, compiled_programs_kept():
        home = Path(folder)
        (home / "ready").mkdir()
        forkers = [Forker(lambda stages: ready_stages(stages, home / "ready" / "kept"))] + (
            [] if options.quick else [Forker(cold)]
        )
        tallies = ready_faults(forkers[0], home / "ready", times, rng, say)
        forkers[0].close()
        if not options.quick:
            (home / "edit").mkdir()
            tallies = edit_faults(forkers[1], home / "edit", times, rng, say) + tallies
            forkers[1].close()
    print(table(tallies))
    if any(tally.resumed_exactly != sum(tally.outcomes.values()) for tally in tallies):
        sys.exit("a run that was interrupted did not lead to the arrays of one that was not")
    if not options.quick:
        content = {"kills": times, "seed": options.seed, "faults": [dataclasses.asdict(tally) for tally in tallies]}
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "faults.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (HERE / "FAULTS.md").write_text(REPORT.format(table=table(tallies)), encoding="utf-8")


REPORT = """# Faults

Written by `python -m experiments.scale.faults` (numbers in `results/faults.json`). Children are killed (SIGKILL) at random
moments of a stage, or may not write files beyond a random size. Then another process looks: a session must be the one before
the step or the one after, unlocked, and pass `kedit verify`; an export must be the earlier one, the new one, or none. The
step is repeated on what is left, and must lead to the very arrays, bit for bit, of a run without faults.

{table}
Of moments, there is nothing yet, or sums to go on with (partial), or what was asked for (moments). Nothing of an export
would be left by a kill between the two renames that replace an earlier one: both then lie beside it under hidden names.
"""

if __name__ == "__main__":
    main()
