"""What a person sees while and after something runs: progress bars and tables."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kedit_jax.cli.text import escape
from kedit_jax.editing.moments import Moments
from kedit_jax.editing.session import EditSession, Event
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import Completion


@contextmanager
def bar(console: Console, what: str, total: int | None = None) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar with the time left; the block gets a function of (done, total or None) that moves it."""
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, of: progress.update(task, completed=done, total=of)


def completions(pairs: Sequence[Completion], wanted: Sequence[str], title: str) -> Table:
    """What the model says to each prompt before and after, beside what it was asked to say."""
    table = Table(title=title, title_justify="left")
    for heading in ("prompt", "before", "after", "wanted"):
        table.add_column(heading)
    for pair, want in zip(pairs, wanted, strict=True):
        table.add_row(*map(escape, (pair.prompt, pair.before, pair.after, want)))
    return table


def log(events: Sequence[Event], times: Sequence[str], texts: Mapping[str, str], limit: int | None = 4) -> list[str]:
    """A session's history as a person reads it, newest step first; + came, - left, ~ was skipped.

    Args:
        texts: what facts say, by id, for those whose event does not.
        limit: facts shown of each kind in a step; None for all.
    """
    known, steps = dict(texts), []
    for number, (event, time) in enumerate(zip(events, times, strict=True), start=1):
        left = {name: known.get(name, "") for name in (*event.replaced, *(event.ids if event.kind == "retract" else ()))}
        known |= dict(zip(event.ids, event.texts, strict=False))
        came = {name: known.get(name, "") for name in event.ids} if event.kind not in ("retract", "compact", "undo") else {}
        what = f"undo of step {event.undoes}" if event.kind == "undo" else escape(event.kind)
        marks = (("[green]+[/]", came), ("[red]-[/]", left), ("[yellow]~[/]", dict.fromkeys(event.skipped, "skipped")))
        steps.append(
            [
                f"[bold]step {number}[/]  {what}  [dim]{escape(time.replace('T', ' '))}[/]  {_counted(event)}",
                *([f"    {escape(event.reason)}"] if event.reason else []),
                *(line for mark, facts in marks if event.kind != "undo" for line in _shown(mark, facts, limit)),
            ]
        )
    return [line for step in reversed(steps) for line in step]


def _counted(event: Event) -> str:
    """How many facts an event touched, in words."""
    parts = [f"{len(event.ids)} fact{'s' * (len(event.ids) != 1)}"]
    parts += [f"{len(names)} {what}" for what, names in (("replaced", event.replaced), ("skipped", event.skipped)) if names]
    return ", ".join(parts)


def _shown(mark: str, facts: Mapping[str, str], limit: int | None) -> list[str]:
    chosen = list(facts.items())[:limit]
    more = len(facts) - len(chosen)
    rows = [f"    {mark} {escape(name)}  {escape(text)}".rstrip() for name, text in chosen]
    return rows + ([f"    {mark} ... and {more} more"] if more else [])


def check_writable(file: Path) -> None:
    """Raise a KeditError now rather than after minutes of work where a result could not be written."""
    try:
        file.open("a", encoding="utf-8").close()
    except OSError as error:
        raise KeditError(f"cannot write {str(file)!r}: {error}; choose another file") from error


def sampling(moments: Moments) -> str:
    """One line on how far the moments of a sample are from those of all such text."""
    known = [f"{error:.1%} (layer {layer})" for layer, error in moments.errors.items() if math.isfinite(error)]
    return f"estimated error of the sample, relative: {', '.join(known) or 'unknown, it is too small to tell'}"


def summary(session: EditSession) -> str:
    """One line on what a session holds."""
    settings = session.settings
    return (
        f"{len(session.facts)} facts in {len(session.batches)} batches, written by {settings.editor} ({settings.history}) "
        f"into layers {', '.join(map(str, settings.layers))}"
    )
