"""Horizon [h]: thousands of steps of one edit each on stored constraints, solver alone, and small steps end to end.

A session of real edits stores constraints (key, residual) in its last edited layer. They are streamed one by one in their
order; once they are used up, further ones are DRAWN from them: a key from a Gaussian with their mean and covariance, with
the residual of a random one. So the first steps are facts of the model, later ones stand for facts that it does not have.
`latest-simplified` takes the very steps of `unaligned`, and is one run with it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from experiments.paper.config import check
from experiments.paper.main_table import VARIANTS
from experiments.paper.measures import Norms, Quality, check_columns, cost
from experiments.paper.results import Log
from experiments.paper.running import Run, Tick, in_batches, run_steps, unedited
from experiments.paper.stage import Stage, spread
from kedit_jax import solve
from kedit_jax.delta import EditDelta, host_kernel
from kedit_jax.editing import EditSession, EditSettings
from kedit_jax.evaluation import Record
from kedit_jax.models import down_kernel_address
from kedit_jax.solve import host

SOLVER_VARIANTS = ("aligned", "unaligned")
SAMPLE = 400
"""Constraints among all so far whose unmet part is measured."""


@dataclass(frozen=True)
class EndToEnd:
    """Small steps on the model itself."""

    edits: int
    batch: int
    evaluate_every: int
    sample: int
    save_every: int


@dataclass(frozen=True)
class HorizonConfig:
    """Of the horizon.

    Attributes:
        source_edits, source_batch: of the session that constraints are stored by.
        steps: of one edit each.
        measure_every: steps between two lines.
        first: constraints whose retention is followed.
    """

    seeds: tuple[int, ...]
    editor: str
    source_edits: int
    source_batch: int
    steps: int
    measure_every: int
    first: int
    variants: tuple[str, ...]
    end_to_end: EndToEnd
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in SOLVER_VARIANTS]
        check(
            (not unknown, f"variants {', '.join(unknown)} are none of {', '.join(SOLVER_VARIANTS)}"),
            (
                self.first <= self.source_edits,
                f"first is {self.first}; only {self.source_edits} constraints are the model's",
            ),
            (self.measure_every >= 1, f"measure_every is {self.measure_every}; give 1 or more"),
        )
        check_columns(self.columns)


def runs(config: HorizonConfig, stage: Stage, seed: int) -> list[Run]:
    """The solver alone in each variant, and small steps end to end."""
    records, made = stage.chosen(seed, config.source_edits), []
    settings = stage.settings(config.editor, seed)
    stored: list[solve.Constraints] = []  # made by the first run that needs them

    def source() -> solve.Constraints:
        if not stored:
            stored.append(stored_constraints(stage, settings, records, config.source_batch))
        return stored[0]

    for variant in config.variants:
        what = {
            "part": "solver",
            "editor": config.editor,
            "variant": variant,
            "steps": config.steps,
            "measure_every": config.measure_every,
            "first": config.first,
            "source_batch": config.source_batch,
            **stage.header(settings, records),
        }
        made.append(
            Run(f"solver-{variant}", what, config.steps, partial(_solved, config, stage, settings, source, seed, variant))
        )
    part = config.end_to_end
    few = records[: part.edits]
    quality = Quality(stage, few, min(config.first, part.edits))
    protocol = {"batch": part.batch, "evaluate_every": part.evaluate_every, "sample": part.sample, "first": config.first}
    made.append(
        unedited(
            {"part": "end to end", **protocol, **stage.header(settings, few)},
            lambda: {**quality(stage.model, len(few), part.sample), **cost(stage, stage.model)},
        )
    )
    for variant in config.variants:
        own = stage.settings(config.editor, seed, **VARIANTS[variant])
        what = {
            "part": "end to end",
            "editor": config.editor,
            "variant": variant,
            **protocol,
            **stage.header(own, few),
        }
        made.append(Run(f"model-{variant}", what, len(few), partial(_edited, config, stage, few, quality, own)))
    return made


def stored_constraints(stage: Stage, settings: EditSettings, records: list[Record], batch: int) -> solve.Constraints:
    """What an aligned session of these edits stores in its last layer."""
    session = stage.start(settings)
    for step in in_batches(records, batch):
        session, _ = session.edit(step.requests)
    return session.layers[settings.layers[-1]].constraints


def streamed(stored: solve.Constraints, count: int, seed: int) -> solve.Constraints:
    """The stored constraints, and as many more drawn from them as make `count` (see the module's docstring)."""
    keys, residuals = np.asarray(stored.keys, np.float64), np.asarray(stored.residuals)
    more = count - len(keys)
    if more <= 0:
        return solve.take(stored, np.arange(count))
    rng = np.random.default_rng((seed, 2))
    mean = keys.mean(0)
    drawn = np.concatenate(
        [
            rng.normal(size=(len(part), len(keys))) @ (keys - mean)
            for part in np.array_split(np.arange(more), -(-more // 1000))
        ]
    )
    drawn = (mean + drawn / np.sqrt(len(keys))).astype(stored.keys.dtype)
    places = rng.integers(len(keys), size=more)
    return solve.concatenate([stored, solve.Constraints(drawn, residuals[places], np.asarray(stored.noise)[places])])


def _solved(
    config: HorizonConfig, stage: Stage, settings: EditSettings, source: Any, seed: int, variant: str, log: Log, tick: Tick
) -> None:
    """One edit a step; a continued run makes its earlier steps again, which takes seconds, and measures nothing of them."""
    layer = settings.layers[-1]
    site = stage.start(settings).site(layer)
    stack = streamed(source(), config.steps, seed)
    kernel = np.asarray(host_kernel(stage.model, down_kernel_address(layer)), np.float64)
    width, size = kernel.shape[1], float(np.linalg.norm(kernel))
    first = np.arange(config.first)
    with solve.float64():
        sequence = host.begin(site.prior, width)
        empty, update = sequence, np.zeros_like(kernel)
        for number in range(1, config.steps + 1):
            block = solve.take(stack, np.array([number - 1]))
            if variant == "aligned":
                sequence, step = host.advance(sequence, site.prior, block)
                update = sequence.update
            else:  # the first step of a new sequence, against the kernel as it is: A(B_t) D_t = K_t' Omega (V_t - K_t W)
                against = block.residuals - np.asarray(block.keys, np.float64) @ update
                _, step = host.advance(empty, site.prior, solve.Constraints(block.keys, against, block.noise))
                update = update + np.asarray(step.left) @ np.asarray(step.right)
            tick(1)
            if number % config.measure_every or number // config.measure_every <= len(log.lines):
                continue
            so_far = np.array(spread(range(number), SAMPLE))
            log.append(
                {
                    "step": number,
                    "edits": number,
                    "first_residual": unmet_part(stack, first[first < number], update),
                    "all_residual": unmet_part(stack, so_far, update),
                    "step_norm": float(np.linalg.norm(np.asarray(step.left) @ np.asarray(step.right))),
                    "update_norm": float(np.linalg.norm(update)),
                    "kernel_growth": float(np.linalg.norm(kernel + update)) / size,
                }
            )
    log.finish()


def unmet_part(stack: solve.Constraints, rows: np.ndarray, update: np.ndarray) -> float:
    """100 |R0 - K D| / |R0| over some constraints: 0 where they are met, 100 where nothing was edited."""
    some = solve.take(stack, rows)
    left = some.residuals - np.asarray(some.keys, np.float64) @ update
    return float(100 * np.linalg.norm(left) / np.linalg.norm(some.residuals))


def _edited(
    config: HorizonConfig,
    stage: Stage,
    records: list[Record],
    quality: Quality,
    settings: EditSettings,
    log: Log,
    tick: Tick,
) -> None:
    part = config.end_to_end
    steps = in_batches(records, part.batch)
    norms = Norms(stage.model, settings.layers)

    def measure(session: EditSession, step: EditDelta, number: int) -> dict[str, Any]:
        if number % part.evaluate_every and number < len(steps):
            return {}
        edits = min(number * part.batch, len(records))
        line: dict[str, Any] = norms(step, session.delta)
        return line | quality(session.model, edits, part.sample) | cost(stage, session.model)

    run_steps(stage, settings, steps, log, measure, tick, save_every=part.save_every)
    log.finish()
