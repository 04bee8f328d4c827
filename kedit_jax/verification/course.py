"""The course of a session, from what it stores: how its updates grew, and which batches' facts the model still says.

Steps are taken again from the stored constraints, in batches as they stand now: facts that were taken back since are not
among them. A batch is scored on the model as it is now, so that what was forgotten shows in the early ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from kedit_jax import solve
from kedit_jax.editing import history
from kedit_jax.editing.session import EditSession
from kedit_jax.evaluation import prepare_pairs, score_pairs
from kedit_jax.solve import take

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class BatchScores:
    """What the model says now of the facts of each of b batches, on their rewrite prompts.

    Attributes:
        facts: how many a batch has.
        met: share of a batch's facts whose target is met exactly, 0 to 1.
        probability: of the target, per token (the geometric mean within a target), mean over the batch; 0 to 1.
    """

    facts: tuple[int, ...]
    met: Float[np.ndarray, " b"]
    probability: Float[np.ndarray, " b"]


@dataclass(frozen=True, eq=False)
class Norms:
    """One layer's update after each of b batches, as shares of the original kernel's Frobenius norm.

    Attributes:
        update: the sum of all steps so far.
        step: this batch's step alone.
    """

    update: Float[np.ndarray, " b"]
    step: Float[np.ndarray, " b"]


def batch_scores(session: EditSession) -> BatchScores:
    """Score the session's facts, batch by batch; those that were compacted make up the first (errors: see `score_pairs`)."""
    sizes = tuple(size for size in (session.compacted, *session.batches) if size)
    if not sizes:
        return BatchScores((), np.zeros(0), np.zeros(0))
    pairs = [(fact.text, fact.target) for fact in session.facts]
    scores = score_pairs(session.model, prepare_pairs(pairs, session.tokenizer))
    ends = np.cumsum(sizes)[:-1]
    met = [float(part.mean()) for part in np.split(scores.correct, ends)]
    probability = [float(part.mean()) for part in np.split(np.exp(-scores.nll), ends)]
    return BatchScores(sizes, np.array(met), np.array(probability))


def can_be_replayed(session: EditSession) -> bool:
    """Whether the session stores the constraints of all its steps; the histories that know the last batch alone do not."""
    return session.settings.history in ("aligned", "unaligned") and bool(session.batches)


def norms_over_steps(session: EditSession, progress: Progress | None = None) -> Mapping[int, Norms]:
    """The norms of every edited layer after each batch, by taking the steps again in float64.

    Empty for a session that cannot be replayed. What was compacted is the state that the steps begin from.
    """
    if not can_be_replayed(session):
        return {}
    found, total, done = {}, len(session.layers) * len(session.batches), 0
    for layer, held in session.layers.items():
        with solve.float64():
            site = session.site(layer)
            size = float(np.linalg.norm(site.kernel.astype(np.float64)))
            state = history.empty_history(site, held.base)
            before, updates, steps, begin = state.update, [], [], 0
            for count in session.batches:
                state, _ = history.extended(state, site, take(held.constraints, np.arange(begin, begin + count)))
                updates.append(float(np.linalg.norm(state.update)) / size)
                steps.append(float(np.linalg.norm(state.update - before)) / size)
                before, begin, done = state.update, begin + count, done + 1
                if progress is not None:
                    progress(done, total)
        found[layer] = Norms(np.array(updates), np.array(steps))
    return found
