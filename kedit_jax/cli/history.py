"""The commands that look at a session's history or change it without optimising anything: log, retract, undo ..."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kedit_jax import hosts
from kedit_jax.checkpoint import SessionLock, lock_session, newest_version, read_events, read_manifest, save_session
from kedit_jax.cli import show
from kedit_jax.cli.common import Conflicts, Context, Dtype, Model, MomentsDir, Session, console, load_for, open_session
from kedit_jax.cli.text import escape
from kedit_jax.editing import algebra
from kedit_jax.editing.session import EditSession
from kedit_jax.editing.settings import EditSettings
from kedit_jax.errors import KeditError

Ids = Annotated[list[str], typer.Argument(help="ids of facts; see `kedit log`")]


def log(
    session: Session,
    every: Annotated[bool, typer.Option("--all", help="every fact of every step, not the first few")] = False,
) -> None:
    """Show what was written and taken back, step by step, the newest first."""
    manifest = read_manifest(session)
    events = read_events(manifest)
    texts = {
        fact["id"]: f"{fact['prompt'].replace('{}', fact['subject'])} -> {fact['target']}" for fact in manifest["facts"]
    }
    times = manifest.get("times", [""] * len(events))
    for line in show.log(events, times, texts, limit=None if every else 4):
        console.print(line, highlight=False, soft_wrap=True)
    about, model = EditSettings.from_dict(manifest["settings"]), manifest["model"]
    compacted = manifest.get("compacted", 0)
    console.print(
        f"{len(manifest['facts'])} facts stand{f', {compacted} of them compacted' if compacted else ''}, written by "
        f"{escape(about.editor)} ({escape(about.history)}) into layers {', '.join(map(str, about.layers))} of model "
        + escape(f"{model['fingerprint'][:12]} ({model['family']}, {model['dtype']})"),
        highlight=False,
    )


def retract(
    context: Context, model: Model, ids: Ids, session: Session, moments: MomentsDir = None, dtype: Dtype = None
) -> None:
    """Take facts back, as if they had never been edited."""
    with _opened(context, model, session, moments, dtype) as (before, lock):
        _store(before.retract(ids)[0], lock, f"took back {len(set(ids))}")


def restore(
    context: Context, model: Model, ids: Ids, session: Session, moments: MomentsDir = None, dtype: Dtype = None
) -> None:
    """Write facts once more that were taken back or replaced, from their recorded constraints."""
    with _opened(context, model, session, moments, dtype) as (before, lock):
        _store(before.restore(ids)[0], lock, f"restored {len(set(ids))}")


def undo(context: Context, model: Model, session: Session, moments: MomentsDir = None, dtype: Dtype = None) -> None:
    """Take the last step back, whatever it was; again, the one before it."""
    with _opened(context, model, session, moments, dtype) as (before, lock):
        current, _ = algebra.undo(before)
        undone = current.events[-1].undoes or 0  # an undo names what it undoes
        _store(current, lock, f"undid step {undone} ({current.events[undone - 1].kind})")


def merge(
    context: Context,
    model: Model,
    other: Annotated[
        Path, typer.Argument(help="folder of the session to merge into this one; its facts count as the later")
    ],
    session: Session,
    conflicts: Conflicts = None,
    prefix: Annotated[
        str | None, typer.Option(help="put before the other's ids where both use one for different facts")
    ] = None,
    moments: MomentsDir = None,
    dtype: Dtype = None,
) -> None:
    """Merge another session of the same model: the one-time edit of the facts of both."""
    with _opened(context, model, session, moments, dtype) as (first, lock):
        second = open_session(other, first.base, first.tokenizer, moments)
        current, _ = algebra.merge(first, second, conflicts=conflicts, prefix=prefix)
        _store(current, lock, f"merged {len(current.events[-1].ids)} facts of {escape(str(other))}")


def compact(
    context: Context,
    model: Model,
    session: Session,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    moments: MomentsDir = None,
    dtype: Dtype = None,
) -> None:
    """Shrink a session to memory that no longer grows with its facts; they can then not be taken back any more."""
    with _opened(context, model, session, moments, dtype) as (before, lock):
        count = len(before.facts) - before.compacted
        if not yes and hosts.count() > 1:
            raise KeditError("several processes cannot be asked: give --yes")
        if not yes:
            typer.confirm(f"{count} facts can then never be retracted, replaced or restored again. Go on?", abort=True)
        _store(algebra.compact(before), lock, f"compacted {count} facts, which can no longer be taken back")


@contextmanager
def _opened(
    context: Context, model: str, session: Path, moments: Path | None, dtype: str | None
) -> Iterator[tuple[EditSession, SessionLock]]:
    """A stored session that nobody else changes until this command has."""
    newest_version(session)  # or locking would make the folder
    with lock_session(session) as lock:
        decoder, tokenizer = load_for(context, session, model, dtype)
        yield open_session(session, decoder, tokenizer, moments), lock


def _store(session: EditSession, lock: SessionLock, what: str) -> None:
    save_session(session, lock.folder, lock=lock)
    console.print(f"{what}; {show.summary(session)}", highlight=False)
