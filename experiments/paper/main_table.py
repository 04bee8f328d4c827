"""Main table [a]: every editor, aligned, without compensation, unaligned, and all at once.

Norms [f], key drift [i], other facts of the subject [j] and general ability [c] are columns of the same lines.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from experiments.paper.config import check
from experiments.paper.measures import Norms, Quality, check_columns, cost, drifted, freely, unmet
from experiments.paper.results import Log
from experiments.paper.running import Run, Step, Tick, in_batches, run_steps, unedited
from experiments.paper.stage import Stage
from kedit_jax import solve
from kedit_jax.delta import Dense, EditDelta, apply_edits
from kedit_jax.editing import EditSession, EditSettings, equivalence_error
from kedit_jax.editing.drift import keys_now
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import Record
from kedit_jax.models import down_kernel_address

VARIANTS = {
    "aligned": {"history": "aligned", "compensate": True},
    "uncompensated": {"history": "aligned", "compensate": False},
    "unaligned": {"history": "unaligned", "compensate": False},
    "one-time": {"history": "aligned", "compensate": True},
}


@dataclass(frozen=True)
class MainConfig:
    """Of the main table.

    Attributes:
        evaluate_at: numbers of edits after which quality is measured, beside the end.
        sample, sample_at_end: how many records quality is measured on.
        free_records: how many records the model is left to speak about at the end.
        retention: how many of the first edits make it up.
        variants: of `VARIANTS`; `uncompensated` applies to editors with post-processing alone.
        drift_of: editors whose aligned and unaligned runs read all keys again at the end.
        save_every: steps between stored sessions.
        columns: of the table.
    """

    seeds: tuple[int, ...]
    edits: int
    batch: int
    evaluate_at: tuple[int, ...]
    sample: int
    sample_at_end: int
    free_records: int
    retention: int
    editors: tuple[str, ...]
    variants: tuple[str, ...]
    drift_of: tuple[str, ...]
    save_every: int
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        off = [at for at in self.evaluate_at if self.batch >= 1 and at % self.batch]
        check(
            (not unknown, f"variants {', '.join(unknown)} are none of {', '.join(VARIANTS)}"),
            (not off, f"evaluate_at {off} falls between steps of {self.batch}"),
            (self.edits >= self.batch >= 1, f"edits {self.edits} must be at least one batch of {self.batch}"),
            (self.free_records >= 0, f"free_records is {self.free_records}; give 0 or more"),
            (self.retention >= 1, f"retention is {self.retention}; it needs at least one edit"),
        )
        check_columns(self.columns)


def runs(config: MainConfig, stage: Stage, seed: int) -> list[Run]:
    """The unedited model, and every editor in every variant that it has."""
    records = stage.chosen(seed, config.edits)
    quality = Quality(stage, records, config.retention)
    made = [_unedited(config, stage, records, quality, seed)]
    for editor in config.editors:
        for variant in config.variants:
            settings = stage.settings(editor, seed)
            if variant == "uncompensated" and settings.post is None:
                continue
            settings = stage.settings(editor, seed, **VARIANTS[variant])
            size = len(records) if variant == "one-time" else config.batch
            go = partial(_edited, config, stage, records, quality, settings, f"{editor}-{variant}", size)
            what = {"editor": editor, "variant": variant, **_protocol(config), **stage.header(settings, records)}
            made.append(Run(f"{editor}-{variant}", what, len(records), go))
    return made


def _protocol(config: MainConfig) -> dict[str, Any]:
    return {
        "edits": config.edits,
        "batch": config.batch,
        "evaluate_at": list(config.evaluate_at),
        "sample": [config.sample, config.sample_at_end, config.free_records],
        "retention": config.retention,
    }


def _unedited(config: MainConfig, stage: Stage, records: Sequence[Record], quality: Quality, seed: int) -> Run:
    def measure() -> dict[str, Any]:
        measured = {**quality(stage.model, len(records), config.sample_at_end), **cost(stage, stage.model)}
        return measured | freely(stage, stage.model, records, config.free_records)

    return unedited({**_protocol(config), **stage.header(stage.settings("memit", seed), records)}, measure)


def _edited(
    config: MainConfig,
    stage: Stage,
    records: Sequence[Record],
    quality: Quality,
    settings: EditSettings,
    name: str,
    size: int,
    log: Log,
    tick: Tick,
) -> None:
    steps: list[Step] = in_batches(records, size)
    norms = Norms(stage.model, settings.layers)

    def measure(session: EditSession, step: EditDelta, number: int) -> dict[str, Any]:
        edits, end = min(number * size, len(records)), number == len(steps)
        line: dict[str, Any] = norms(step, session.delta)
        if end or edits in config.evaluate_at:
            line |= quality(session.model, edits, config.sample_at_end if end else config.sample) | cost(
                stage, session.model
            )
        if end:
            line |= {
                "distance": equivalence_error(session),
                "drift": unmet(session),
                **freely(stage, session.model, records, config.free_records),
            }
            if name in {f"{editor}-{variant}" for editor in config.drift_of for variant in ("aligned", "unaligned")}:
                line |= drifted(session)
            if name in {f"{editor}-aligned" for editor in config.drift_of}:
                line |= _reread(config, session, quality, len(records))
        return line

    run_steps(stage, settings, steps, log, measure, tick, save_every=config.save_every)
    log.finish()


def _reread(config: MainConfig, session: EditSession, quality: Quality, edits: int) -> dict[str, Any]:
    """What changes when every recorded key is replaced by what the edited model now makes, and all is solved anew."""
    delta = reread(session)
    wanted = ("efficacy_accuracy", "specificity_accuracy")
    found = quality(apply_edits(session.base, delta), edits, config.sample)
    total = session.delta
    moved = [np.asarray(delta[name].dense()) - np.asarray(total[name].dense()) for name in total.addresses]
    size = np.sqrt(sum(np.sum(np.square(np.asarray(total[name].dense()))) for name in total.addresses))
    change = float(np.sqrt(sum(np.sum(np.square(part)) for part in moved)) / size)
    return {"reread_change": change, **{f"reread_{name}": found[name] for name in wanted}}


def reread(session: EditSession) -> EditDelta:
    """The one-time edit of the session's facts at the keys that the edited model makes now, under unchanged targets.

    With V fixed, residuals against the original kernel become R0 + (K - K_now) W0.

    Raises:
        KeditError: a session without facts, or with compacted ones.
    """
    if not session.facts or session.compacted:
        raise KeditError("keys can be read again for sessions that record all their facts")
    updates = {}
    for layer, now in keys_now(session).items():
        site, held = session.site(layer), session.layers[layer].constraints
        residuals = held.residuals + (np.asarray(held.keys, np.float64) - now) @ np.asarray(site.kernel, np.float64)
        with solve.float64():
            solution = solve.one_time(site.prior, solve.Constraints(now, residuals, held.noise))
            solve.check(solution.status)
            updates[down_kernel_address(layer)] = Dense(np.asarray(solution.update))
    return EditDelta(updates)
