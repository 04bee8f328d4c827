"""Sequences of edits and post-processors as the papers write them, in NumPy; shares nothing with the library.

The recursions carry what they say they carry: the accumulated normal matrix, the kernel as it is, and Algorithm 1's error E.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
from solve_problems import Problem, refined


def _prune(update: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(update, full_matrices=False)
    largest = np.linalg.norm(kernel, 2)
    return u @ np.diag([np.log(x) - np.log(largest) + largest if x > largest else x for x in s]) @ vt


def _rect(update: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    order = np.argsort(-np.abs(update / kernel), axis=None)
    result = np.zeros(update.size)
    kept = order[: round(0.4 * update.size)]
    result[kept] = update.ravel()[kept]
    return result.reshape(update.shape)


def _truncate(update: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    u, s, vt = np.linalg.svd(update, full_matrices=False)
    return sum(s[i] * np.outer(u[:, i], vt[i]) for i in range(4))


def _quantize(update: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    weights = kernel + update
    scale = np.abs(weights).max(0, keepdims=True) / 127
    return np.rint(weights / scale) * scale - kernel


def _round(update: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return (kernel + update).astype(ml_dtypes.bfloat16).astype(np.float64) - kernel


LITERAL: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "prune": _prune,
    "rect:0.4": _rect,
    "clip:1.0": lambda update, kernel: update * min(1.0, 1.0 / np.linalg.norm(update)),
    "truncate:4": _truncate,
    "round:bfloat16": _round,
    "quantize:8": _quantize,
}
"""By the names that `solve.parse_post` reads."""


class Taken(NamedTuple):
    """One step of a recursion."""

    raw: np.ndarray
    update: np.ndarray
    total: np.ndarray


def literal_sequence(
    p: Problem, batches: Sequence[np.ndarray], mode: str, post: str | None, compensate: bool
) -> Iterator[Taken]:
    """The step of every batch, by the equations of the mode, from the actual kernel.

    Restricted editors are taken as published, P (K'K + ..) + L2 I with the projector P on their subspace: outside it, where
    their precision is not defined, A0 is the identity, as any multiple of it would do.
    """
    basis = np.eye(len(p.kernel)) if p.basis is None else p.basis
    projector = basis @ basis.T
    a0 = (basis @ p.precision @ basis.T + np.eye(len(basis)) - projector).astype(np.longdouble)
    keys, values, original = (np.asarray(x, np.longdouble) for x in (p.keys, p.values, p.kernel))
    total, history, error = np.zeros_like(original), np.zeros_like(a0), np.zeros_like(original)
    for rows in batches:
        weighted = (keys[rows] * p.weights[rows, None]).T
        history = history * (mode == "aligned") + weighted @ keys[rows]
        a = a0 + projector @ history
        right = projector @ weighted @ (values[rows] - keys[rows] @ (original + total))
        if mode == "latest":
            right = right - a0 @ total
        elif compensate:
            right = right - error
        raw = refined(a, right)
        update = raw if post is None else LITERAL[post](raw.astype(np.float64), (original + total).astype(np.float64))
        error, total = a @ (update - raw), total + update
        yield Taken(*(np.asarray(x, np.float64) for x in (raw, update, total)))
