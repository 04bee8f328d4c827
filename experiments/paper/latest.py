"""Memorize-the-Latest [b]: the full normal equations against the null-space simplification, which leaves A0 D out.

Either one promises the last batch alone. What the simplification leaves out accumulates (see `kedit_jax.solve.sequences`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from experiments.paper.config import check
from experiments.paper.measures import Norms, Quality, check_columns, cost, unmet
from experiments.paper.results import Log
from experiments.paper.running import Run, Tick, in_batches, run_steps, unedited
from experiments.paper.stage import Stage
from kedit_jax.delta import EditDelta
from kedit_jax.editing import EditSession, EditSettings
from kedit_jax.evaluation import Record

HISTORIES = ("latest", "latest-simplified")


@dataclass(frozen=True)
class LatestConfig:
    """Of Memorize-the-Latest.

    Attributes:
        evaluate_every: steps between two measurements of quality; drift and norms are measured at every step.
        histories: of `HISTORIES`.
    """

    seeds: tuple[int, ...]
    edits: int
    batch: int
    evaluate_every: int
    editors: tuple[str, ...]
    histories: tuple[str, ...]
    save_every: int
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.histories if name not in HISTORIES]
        check(
            (not unknown, f"histories {', '.join(unknown)} are none of {', '.join(HISTORIES)}"),
            (self.evaluate_every >= 1, f"evaluate_every is {self.evaluate_every}; give 1 or more"),
            (self.edits >= self.batch >= 1, f"edits {self.edits} must be at least one batch of {self.batch}"),
        )
        check_columns(self.columns)


def runs(config: LatestConfig, stage: Stage, seed: int) -> list[Run]:
    """Every editor under every history."""
    records, made = stage.chosen(seed, config.edits), []
    batches = [records[start : start + config.batch] for start in range(0, len(records), config.batch)]
    quality = [Quality(stage, batch, len(batch)) for batch in batches]
    protocol = {"batch": config.batch, "evaluate_every": config.evaluate_every}
    size = len(batches[-1])
    made.append(
        unedited(
            {**protocol, **stage.header(stage.settings(config.editors[0], seed), records)},
            lambda: {**quality[-1](stage.model, size, size), **cost(stage, stage.model)},
        )
    )
    for editor in config.editors:
        for history in config.histories:
            settings = stage.settings(editor, seed, history=history, compensate=False)
            what = {
                "editor": editor,
                "variant": history,
                **protocol,
                **stage.header(settings, records),
            }
            go = partial(_edited, config, stage, records, quality, settings)
            made.append(Run(f"{editor}-{history}", what, len(records), go))
    return made


def _edited(
    config: LatestConfig,
    stage: Stage,
    records: list[Record],
    quality: list[Quality],
    settings: EditSettings,
    log: Log,
    tick: Tick,
) -> None:
    steps = in_batches(records, config.batch)
    norms = Norms(stage.model, settings.layers)

    def measure(session: EditSession, step: EditDelta, number: int) -> dict[str, Any]:
        line: dict[str, Any] = {**norms(step, session.delta), "drift": unmet(session)}
        if number % config.evaluate_every == 0 or number in (1, len(steps)):
            size = steps[number - 1].size
            line |= quality[number - 1](session.model, size, size) | cost(stage, session.model)
        return line

    run_steps(stage, settings, steps, log, measure, tick, save_every=config.save_every)
    log.finish()
