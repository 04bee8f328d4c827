"""`kedit verify`: the solver's invariants on generated problems, or a stored session against its own constraints."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from kedit_jax import hosts
from kedit_jax.cli import show
from kedit_jax.cli.common import Context, Dtype, MomentsDir, load_for, open_session
from kedit_jax.editing.drift import Drift, key_drift
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import KeditError
from kedit_jax.verification import CONTROL, Check, finite, is_exact, verify_session, verify_solver


def verify(
    context: Context,
    model: Annotated[str | None, typer.Argument(help="model of a session: a Hugging Face directory or hub id")] = None,
    session: Annotated[Path | None, typer.Option(help="the folder of a session to check against its constraints")] = None,
    moments: MomentsDir = None,
    dtype: Dtype = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here, too")] = None,
) -> None:
    """Check the solver's 15 invariants on generated problems; with MODEL and --session, a stored session.

    Of a session: that the stored update of each layer is the one-time edit of the stored constraints, and how far keys have
    moved since they were recorded. Exit status 1 if any check fails.
    """
    console = Console(quiet=not hosts.is_first())
    if (model is None) != (session is None):
        raise KeditError("a session is checked with its model: kedit verify MODEL --session DIR; neither checks the solver")
    if json_file is not None:
        show.check_writable(json_file)
    content: dict[str, Any] = {}
    if model is None or session is None:
        with show.bar(console, "invariants x problems") as move:
            checks = verify_solver(move)
    else:
        decoder, tokenizer = load_for(context, session, model, dtype)
        opened = open_session(session, decoder, tokenizer, moments)
        checks = _verify_session(console, opened)
        content["drift"] = _drift(console, opened)
    console.print(checks_table(checks))
    _conclude(console, checks)
    if json_file is not None and hosts.is_first():
        written = {"checks": [check.to_dict() for check in checks]} | content
        json_file.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if not all(check.holds for check in checks):
        raise typer.Exit(1)


def checks_table(checks: Sequence[Check]) -> Table:
    """A row a check; fits 80 columns."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("#", no_wrap=True)
    table.add_column("invariant")
    table.add_column("dtype", no_wrap=True)
    for heading in ("error", "allowed", "control"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for check in checks:
        verdict = "[green]holds[/]" if check.holds else "[bold red]FAILS[/]"
        numbers = (_number(x) for x in (check.error, check.tolerance, check.control))
        table.add_row(check.id, check.name, check.dtype, *numbers, verdict)
    return table


def drift_table(drift: Mapping[int, Drift]) -> Table:
    """How far the keys of each layer have moved, over the length that they had."""
    table = Table(title="keys since they were recorded", title_justify="left", box=box.SIMPLE)
    for heading in ("layer", "facts", "mean", "largest"):
        table.add_column(heading, justify="right")
    for layer, found in drift.items():
        table.add_row(str(layer), str(len(found.ids)), _number(found.mean), _number(found.largest))
    return table


def _verify_session(console: Console, session: EditSession) -> list[Check]:
    if not is_exact(session):
        settings = session.settings
        post = f", post-processing {settings.post}" if settings.post else ""
        console.print(
            f"This session was run with history {settings.history!r}{post}: a baseline, which does not promise the one-time "
            "edit of its facts."
        )
    with show.bar(console, "layers") as move:
        return verify_session(session, move)


def _drift(console: Console, session: EditSession) -> list[dict[str, Any]]:
    """Shows how far keys have moved, for information: nothing promises that they stay."""
    if session.compacted == len(session.facts):
        console.print("All facts were compacted: no keys are recorded that could have moved.")
        return []
    drift = key_drift(session)
    console.print(drift_table(drift))
    return [
        {"layer": layer, "facts": len(found.ids), "mean": finite(found.mean), "largest": finite(found.largest)}
        for layer, found in drift.items()
    ]


def _conclude(console: Console, checks: Sequence[Check]) -> None:
    failed = [f"{check.id} ({check.dtype})" for check in checks if not check.holds]
    console.print(
        "error: relative, the worst of all problems. control: the same comparison with what it protects taken away, the "
        f"weakest of all problems; it must exceed {CONTROL:g}.",
        style="dim",
        highlight=False,
    )
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(checks)} checks fail:[/] {', '.join(failed)}", highlight=False)
    else:
        console.print(f"[green]all {len(checks)} checks hold[/]", highlight=False)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}" if math.isfinite(value) else str(value)
