"""Representation shift [e]: hidden states of prompts that no edit is about, before and after, as a picture and as a number.

The states are what the head reads (the last block's output) at the subject's last token and at the prompt's last token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments.paper.config import check
from experiments.paper.main_table import VARIANTS
from experiments.paper.measures import Norms, check_columns
from experiments.paper.results import Log
from experiments.paper.running import Run, Tick, in_batches, run_steps
from experiments.paper.stage import Stage, spread
from kedit_jax.delta import EditDelta
from kedit_jax.editing import EditSession, EditSettings
from kedit_jax.editing.tokens import Encoded, encode_requests
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import Record
from kedit_jax.models import Decoder, causal_mask, positions_of

PLACES = ("subject", "prompt")
PICTURE_DIGITS = 3


@dataclass(frozen=True)
class ShiftConfig:
    """Of the shift.

    Attributes:
        prompts: how many rewrite prompts of facts whose subjects are not edited.
        editors, variants: as in the main table.
        tsne: whether to embed with t-SNE, too, which needs scikit-learn.
    """

    seeds: tuple[int, ...]
    edits: int
    batch: int
    prompts: int
    editors: tuple[str, ...]
    variants: tuple[str, ...]
    tsne: bool
    save_every: int
    columns: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        check(
            (not unknown, f"variants {', '.join(unknown)} are none of {', '.join(VARIANTS)}"),
            (self.prompts >= 3, f"prompts is {self.prompts}; a plane needs three"),
        )
        check_columns(self.columns)


def runs(config: ShiftConfig, stage: Stage, seed: int) -> list[Run]:
    """Every editor in every variant. Raises KeditError where t-SNE is asked for and scikit-learn is missing."""
    if config.tsne:
        _tsne()
    records, made = stage.chosen(seed, config.edits), []
    asked = bystanders(stage, records, config.prompts)
    for editor in config.editors:
        for variant in config.variants:
            settings = stage.settings(editor, seed, **VARIANTS[variant])
            what = {
                "editor": editor,
                "variant": variant,
                "batch": config.batch,
                "prompts": [record.case_id for record in asked],
                "tsne": config.tsne,
                **stage.header(settings, records),
            }
            go = partial(_edited, config, stage, records, asked, settings)
            made.append(Run(f"{editor}-{variant}", what, len(records), go))
    return made


def bystanders(stage: Stage, records: Sequence[Record], count: int) -> list[Record]:
    """Records about subjects that none of the given ones is about. Raises KeditError where there are too few."""
    edited = {record.subject for record in records}
    others = [record for record in stage.records if record.subject not in edited]
    if len(others) < 3:
        raise KeditError(f"{len(records)} edits leave {len(others)} facts about other subjects; edit fewer")
    return spread(others, count)


def _edited(
    config: ShiftConfig,
    stage: Stage,
    records: Sequence[Record],
    asked: Sequence[Record],
    settings: EditSettings,
    log: Log,
    tick: Tick,
) -> None:
    steps = in_batches(records, config.batch)
    norms = Norms(stage.model, settings.layers)

    def measure(session: EditSession, step: EditDelta, number: int) -> dict[str, Any]:
        line: dict[str, Any] = norms(step, session.delta)
        if number < len(steps):
            return line
        before, after = (hidden_states(model, stage.tokenizer, asked) for model in (session.base, session.model))
        for place in PLACES:
            line |= {f"{name}_{place}": value for name, value in shift(before[place], after[place]).items()}
            pictures = {"pca": principal(before[place], after[place])}
            if config.tsne:
                pictures["tsne"] = neighbours(before[place], after[place])
            for name, (old, new) in pictures.items():
                line |= {f"{name}_before_{place}": _short(old), f"{name}_after_{place}": _short(new)}
        return line

    run_steps(stage, settings, steps, log, measure, tick, save_every=config.save_every)
    log.finish()


def hidden_states(model: Decoder, tokenizer: Any, records: Sequence[Record]) -> dict[str, Float[np.ndarray, "n d"]]:
    """What the head reads at the subject's last token and at the last token of each rewrite prompt."""
    requests = [record.request() for record in records]
    rows: list[Encoded] = [
        contexts[0] for contexts in encode_requests(tokenizer, requests, (), max_positions=model.config.max_positions)
    ]
    length = max(row.n_prompt for row in rows)
    tokens, valid = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        tokens[number, : row.n_prompt] = row.tokens[: row.n_prompt]
        valid[number, : row.n_prompt] = True
    states = np.asarray(_states(model, tokens, valid), np.float64)
    at = {"subject": [row.subject_last for row in rows], "prompt": [row.n_prompt - 1 for row in rows]}
    return {place: states[np.arange(len(rows)), at[place]] for place in PLACES}


@jax.jit
def _states(model: Decoder, tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]) -> Float[Array, "B T d"]:
    positions = positions_of(valid)
    h = model.embed(tokens, positions)
    return model.run_layers(h, 0, model.config.n_layers, positions=positions, mask=causal_mask(valid))[0]


def shift(before: Float[np.ndarray, "n d"], after: Float[np.ndarray, "n d"]) -> dict[str, float]:
    """Mean |after - before| / |before|, and how far the centre moved in units of the root mean square spread before."""
    moved = np.linalg.norm(after - before, axis=1) / np.linalg.norm(before, axis=1)
    spread_before = np.sqrt(np.mean(np.sum(np.square(before - before.mean(0)), axis=1)))
    centre = np.linalg.norm(after.mean(0) - before.mean(0)) / spread_before
    return {"shift": float(moved.mean()), "centre_shift": float(centre)}


Plane = tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, "n 2"]]


def principal(before: Float[np.ndarray, "n d"], after: Float[np.ndarray, "n d"]) -> Plane:
    """Both in the plane of the first two principal components of the states before."""
    centre = before.mean(0)
    axes = np.linalg.svd(before - centre, full_matrices=False)[2][:2]
    axes *= np.sign(axes[np.arange(2), np.abs(axes).argmax(1)])[:, None]  # the sign is free: the largest part is positive
    return (before - centre) @ axes.T, (after - centre) @ axes.T


def neighbours(before: Float[np.ndarray, "n d"], after: Float[np.ndarray, "n d"]) -> Plane:
    """Both embedded together by t-SNE. Raises KeditError without scikit-learn."""
    embedding = _tsne()
    joint = np.concatenate([before, after])
    perplexity = min(30.0, (len(joint) - 1) / 3)
    placed = embedding(init="pca", perplexity=perplexity, random_state=0).fit_transform(joint)
    return placed[: len(before)], placed[len(before) :]


def _tsne() -> Any:
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise KeditError("t-SNE needs scikit-learn: pip install 'kedit-jax[experiments]', or set tsne: false") from error
    return TSNE


def _short(points: Float[np.ndarray, "n 2"]) -> list[list[float]]:
    return [[float(f"{x:.{PICTURE_DIGITS}g}") for x in row] for row in points]
