"""How an experiment's runs are computed: step by step, stored as they come, continued where a kill stopped them."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.paper.results import Log
from experiments.paper.stage import Stage
from kedit_jax.checkpoint import has_session, load_session, save_session
from kedit_jax.delta import EditDelta
from kedit_jax.editing import EditRequest, EditSession, EditSettings
from kedit_jax.errors import NonFiniteError, RequestError, SolverError
from kedit_jax.evaluation import Record

Tick = Callable[[int], None]
"""Called with the number of edits that were done since the call before."""

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One file of results.

    Attributes:
        what: all that decides the result beside the stage: goes into the header.
        work: edits that it makes, for the progress.
        go: computes it, from wherever its log stands.
    """

    name: str
    what: Mapping[str, Any]
    work: int
    go: Callable[[Log, Tick], None]


@dataclass(frozen=True)
class Step:
    """What one step of a sequence does: facts are taken back, then others are written."""

    requests: tuple[EditRequest, ...] = ()
    retracted: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return len(self.requests)


UNEDITED = "unedited"


def unedited(what: Line, measure: Callable[[], Line]) -> Run:
    """The model before any edit, as every table shows it."""

    def go(log: Log, tick: Tick) -> None:
        if not log.lines:
            log.append({"step": 0, "edits": 0, **measure()})
        log.finish()

    return Run(UNEDITED, {**what, "editor": UNEDITED, "variant": UNEDITED}, 0, go)


Measure = Callable[[EditSession, EditDelta, int], Line]
"""(session after a step, the step, its number from 1) -> what is stored of it."""


def in_batches(records: Sequence[Record], size: int) -> list[Step]:
    """The records' edits, `size` a step."""
    requests = [record.request() for record in records]
    return [Step(tuple(requests[start : start + size])) for start in range(0, len(requests), size)]


def run_steps(
    stage: Stage,
    settings: EditSettings,
    steps: Sequence[Step],
    log: Log,
    measure: Measure,
    tick: Tick,
    *,
    save_every: int = 0,
    kept: bool = True,
) -> EditSession | None:
    """Edit step by step, and store a line for each.

    A run that stops because a step cannot be solved, or gives numbers that are not finite, says so in its last line.

    Args:
        log: of this run; lines that it holds are not measured again.
        measure: makes a step's line.
        save_every: steps after which the session is stored beside the log, so that a continued run begins there; 0 never.
        kept: see `Stage.start`.

    Returns:
        The session at the end, or None where the run failed.
    """
    try:
        session, done = _resumed(stage, settings, log, kept)
    except SolverError as error:  # a prior that cannot be factored
        if not log.lines:
            log.append({"step": 0, "edits": 0, "failed": _first_line(error)})
        return None
    tick(sum(step.size for step in steps[:done]))
    edits = sum(step.size for step in steps[:done])
    for number, step in enumerate(steps[done:], start=done + 1):
        told = number <= len(log.lines)
        edits += step.size
        try:
            if told and "failed" in log.lines[number - 1]:
                return None
            session, delta = taken(session, step)
            if not told:
                log.append({"step": number, "edits": edits, **measure(session, delta, number)})
        except (NonFiniteError, SolverError) as error:
            log.append({"step": number, "edits": edits, "failed": _first_line(error)})
            return None
        if save_every and number % save_every == 0 and number < len(steps):
            _save(session, log.session, number)
        tick(step.size)
    return session


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def taken(session: EditSession, step: Step) -> tuple[EditSession, EditDelta]:
    """The session after a step, and what the step added; under policy `reject`, without the facts that it refuses."""
    delta = EditDelta({})
    if step.retracted:
        session, delta = session.retract(list(step.retracted))
    if not step.requests:
        return session, delta
    requests = list(step.requests)
    if session.settings.policy == "reject":
        requests = accepted(session, requests)
        if not requests:
            return session, delta
    session, written = session.edit(requests)
    return session, written if not delta.addresses else delta + written


def accepted(session: EditSession, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """What a caller would still write who drops every fact that `reject` names: the first of each contradiction."""
    try:
        session.plan(requests)
    except RequestError:
        return list(session.plan(requests, conflicts="first").written)
    return list(requests)


def _resumed(stage: Stage, settings: EditSettings, log: Log, kept: bool) -> tuple[EditSession, int]:
    """The newest stored session of the run with the number of its steps, or a new one."""
    for folder in reversed(_saved(log.session)):
        if has_session(folder) and int(folder.name) <= len(log.lines):
            priors = stage.folder if kept else None
            return load_session(folder, stage.model, stage.tokenizer, stage.moments, priors=priors), int(folder.name)
    return stage.start(settings, kept=kept), 0


def _save(session: EditSession, folder: Path, number: int) -> None:
    """Store a session under the number of its step; older ones go once it is complete."""
    before = _saved(folder)
    save_session(session, folder / f"{number:06d}", overwrite=True)
    for old in before:
        if old.name != f"{number:06d}":
            shutil.rmtree(old, ignore_errors=True)


def _saved(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.name.isdigit())
