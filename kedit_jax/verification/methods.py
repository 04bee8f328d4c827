"""Invariants 12 and 15: Algorithm 1 leaves one step's post-processing error; history left out, or compensation, is seen."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from kedit_jax import solve
from kedit_jax.solve.postprocess import ClipNorm, Prune, Quantized, Rect, Truncate
from kedit_jax.verification.checks import Measured, worst
from kedit_jax.verification.problems import Problem, relative
from kedit_jax.verification.runs import FORMS, at_once, batches

SHRINK = 10
"""Post-processing meets the problem's kernel divided by this (no residual depends on it): so small that PRUNE, which clips
above the kernel's largest singular value, has something to clip under every prior."""

POSTS: tuple[solve.Post, ...] = (ClipNorm(1.0), Truncate(4), Quantized(8))
"""Beside PRUNE and RECT, which have rows of their own in 15."""


def compensation_leaves_one_error(p: Problem) -> Measured:
    """12. Algorithm 1, at every step: A D - B = E_t and D - D* = post(raw) - raw. Control: E left out."""
    return worst(_compensation(p, post) for post in POSTS)


def prune_needs_compensation(p: Problem) -> Measured:
    """15. PRUNE: the error of invariant 12, and that of the same edits uncompensated."""
    return _compensation(p, Prune())


def rect_needs_compensation(p: Problem) -> Measured:
    """15. RECT: the error of invariant 12, and that of the same edits uncompensated."""
    return _compensation(p, Rect())


def history_is_needed(p: Problem) -> Measured:
    """15. The aligned sequence against the one-time edit, and the unaligned one, which leaves its history out."""
    whole = at_once(p, p.all)

    def gap(steps: Sequence[solve.Advance]) -> float:
        return relative(np.sum([np.asarray(step.update) for step in steps], axis=0), whole)

    return Measured(max(gap(_steps(p, form=form)) for form in FORMS), gap(_steps(p, mode="unaligned")))


def _compensation(p: Problem, post: solve.Post) -> Measured:
    *_, control = _gaps(p, _steps(p, post, compensate=False))
    return Measured(max(gap for form in FORMS for gap in _gaps(p, _steps(p, post, form=form))), control)


def _steps(
    p: Problem,
    post: solve.Post | None = None,
    *,
    mode: solve.Mode = "aligned",
    compensate: bool = True,
    form: solve.Form = "auto",
) -> list[solve.Advance]:
    """The steps of all batches."""
    width, room = p.kernel.shape[1], p.size
    sequence = solve.begin(p.prior, width, mode=mode, post=post, compensate=compensate, capacity=room, form=form)
    steps = []
    for rows in batches(p):
        block, kernel = p.block(rows), p.kernel / SHRINK
        sequence, step = solve.advance(
            sequence, p.prior, block, kernel, mode=mode, post=post, compensate=compensate, dtype=p.dtype
        )
        steps.append(step)
    solve.check_advance(jax.tree.map(lambda *leaves: np.stack(leaves), *steps), post)
    return steps


def _gaps(p: Problem, steps: Sequence[solve.Advance]) -> Iterator[float]:
    """After each step, the larger of |A D - B - E_t| / |B| and |D - D* - (D_t - raw_t)| / |D*|, where A and B are NumPy's.

    E_t = A (D_t - raw_t), so that the first is |A (D - D_t + raw_t) - B| / |B|, along the basis of the prior.
    """
    keys, total = p.reduced(), np.zeros(p.kernel.shape)
    for step, rows in zip(steps, batches(p), strict=True):
        update, raw = np.asarray(step.update), np.asarray(step.raw)
        total = total + update
        known = slice(rows[-1] + 1)
        exact = total - update + raw
        x = exact if p.basis is None else p.basis.T @ exact
        weighted = keys[known].T * p.weights[known]
        left, right = p.precision @ x + weighted @ (keys[known] @ x), weighted @ p.all.residuals[known]
        yield max(relative(left, right), relative(exact, at_once(p, p.block(known))))
