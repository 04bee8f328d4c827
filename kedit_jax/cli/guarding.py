"""What `kedit edit --guard` bounds, and the steps that it keeps or rolls back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit_jax.cli.common import lines
from kedit_jax.editing.guard import Probe, edit_guarded, finite, relative_norm
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import retention_probe, text_probe

BOUNDS = ("perplexity", "retention", "norm")


@dataclass(frozen=True)
class Guard:
    """Probes and how many steps are made between them; without probes, steps as they come."""

    probes: tuple[Probe, ...] = ()
    every: int = 1

    def edit(
        self, session: EditSession, batches: Sequence[Sequence[EditRequest]], policy: dict[str, Any]
    ) -> tuple[EditSession, tuple[str, ...]]:
        """The session after these steps, or before them with what was out of bounds."""
        if self.probes:
            session, _, breaches = edit_guarded(session, batches, self.probes, **policy)
            return session, breaches
        for batch in batches:
            session, _ = session.edit(batch, **policy)
        return session, ()


def read_bounds(bounds: Sequence[str], texts: Path | None, every: int) -> dict[str, float]:
    """The options as numbers, before anything is loaded. Raises KeditError that lists what is wrong with them."""
    asked: dict[str, float] = {}
    problems = []
    for bound in bounds:
        name, _, number = bound.partition("=")
        if name not in BOUNDS:
            problems.append(f"{bound!r}: there is no {name!r}, there are {', '.join(BOUNDS)}")
        try:
            asked[name] = float(number)
        except ValueError:
            problems.append(f"{bound!r} is no bound: write a name and a number, as norm=1")
        else:
            if math.isnan(asked[name]):
                problems.append(f"{bound!r} bounds nothing, as every comparison with it fails: write a number, as norm=1")
    if ("perplexity" in asked) != (texts is not None):
        problems.append("perplexity needs --guard-texts, and nothing else does: held-out text, a document a line")
    if every > 1 and not bounds:
        problems.append("--guard-every says how often to probe; say for what, as --guard norm=1")
    if problems:
        raise KeditError.listing("these guards cannot be set:", problems)
    return asked


def guard(session: EditSession, bounds: dict[str, float], texts: Path | None, every: int) -> Guard:
    """The guard of these bounds, beside which everything must be finite; none without bounds. Raises KeditError."""
    probes = [finite()] if bounds else []
    if "norm" in bounds:
        probes.append(relative_norm(bounds["norm"]))
    if "retention" in bounds:
        probes.append(retention_probe(bounds["retention"]))
    if texts is not None:
        probes.append(text_probe(session, list(lines(texts)), bounds["perplexity"]))
    return Guard(tuple(probes), every)
