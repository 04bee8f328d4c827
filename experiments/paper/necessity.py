"""Is regularisation necessary [g]: each regulariser's strength swept from off to strong.

Under alignment, and beside it unaligned, which shows how the difference depends on lambda, and on C0 replaced by an identity
(`ridge`); the main table shows how it depends on the number of edits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from experiments.paper.config import check
from experiments.paper.main_table import VARIANTS
from experiments.paper.measures import Norms, Quality, check_columns, cost
from experiments.paper.results import Log
from experiments.paper.running import Run, Tick, in_batches, run_steps, unedited
from experiments.paper.stage import Stage
from kedit_jax.delta import EditDelta
from kedit_jax.editing import EditSession, EditSettings, equivalence_error
from kedit_jax.evaluation import Record


@dataclass(frozen=True)
class Sweep:
    """One setting of one editor, through these values; the first is off, or next to it."""

    name: str
    editor: str
    setting: str
    values: tuple[Any, ...]
    variants: tuple[str, ...]
    kept: bool = False
    """Whether factored moments are stored: AlphaEdit's null space takes longer than the rest, other priors a second."""


@dataclass(frozen=True)
class NecessityConfig:
    """Of the sweeps."""

    seeds: tuple[int, ...]
    edits: int
    batch: int
    sample: int
    retention: int
    sweeps: tuple[Sweep, ...]
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        names = [sweep.name for sweep in self.sweeps]
        unknown = sorted({name for sweep in self.sweeps for name in sweep.variants if name not in VARIANTS})
        check(
            (len(set(names)) == len(names), f"sweeps {names} must have different names"),
            (not unknown, f"variants {', '.join(unknown)} are none of {', '.join(VARIANTS)}"),
            (bool(names), "sweeps are missing; name one"),
            (self.edits >= self.batch >= 1, f"edits {self.edits} must be at least one batch of {self.batch}"),
        )
        check_columns(self.columns)


def runs(config: NecessityConfig, stage: Stage, seed: int) -> list[Run]:
    """A run for each value of each sweep and variant."""
    records, made = stage.chosen(seed, config.edits), []
    quality = Quality(stage, records, config.retention)
    protocol = {"batch": config.batch, "sample": config.sample, "retention": config.retention}
    about = {"sweep": "", "setting": "", "value": "", **protocol}
    made.append(
        unedited(
            {**about, **stage.header(stage.settings(config.sweeps[0].editor, seed), records)},
            lambda: {**quality(stage.model, len(records), config.sample), **cost(stage, stage.model)},
        )
    )
    for sweep in config.sweeps:
        for number, value in enumerate(sweep.values):
            for variant in sweep.variants:
                changes = {sweep.setting: value, **VARIANTS[variant]}
                settings = stage.settings(sweep.editor, seed, **changes)
                what = {
                    "sweep": sweep.name,
                    "editor": sweep.editor,
                    "setting": sweep.setting,
                    "value": value,
                    "variant": variant,
                    **protocol,
                    **stage.header(settings, records),
                }
                go = partial(_edited, config, stage, records, quality, settings, sweep.kept)
                made.append(Run(f"{sweep.name}-{number:02d}-{variant}", what, len(records), go))
    return made


def _edited(
    config: NecessityConfig,
    stage: Stage,
    records: Sequence[Record],
    quality: Quality,
    settings: EditSettings,
    kept: bool,
    log: Log,
    tick: Tick,
) -> None:
    steps = in_batches(records, config.batch)
    norms = Norms(stage.model, settings.layers)

    def measure(session: EditSession, step: EditDelta, number: int) -> dict[str, Any]:
        if number < len(steps):
            return {}
        line: dict[str, Any] = {**norms(step, session.delta), "distance": equivalence_error(session)}
        return line | quality(session.model, len(records), config.sample) | cost(stage, session.model)

    run_steps(stage, settings, steps, log, measure, tick, kept=kept)
    log.finish()
