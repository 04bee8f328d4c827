"""Convex regularisers of an update, each given by its proximal operator.

A regulariser R enters a solver through one function alone,

    prox(x, step) = argmin_u  step * R(u) + 1/2 |u - x|^2        x, u: [n, v],  step > 0 a scalar

so `regularized` (Prop. 3.4 of "The Labyrinth and the Thread", arXiv 2605.26670) takes any object with such a `prox`, or the
bare function. It is traced: write it with `jax.numpy`, keep shape and dtype, and make an object hashable (a frozen
dataclass), for a compilation is cached by it.

| regulariser | R(D) | what it asks of an update |
| --- | --- | --- |
| `L1(strength)` | strength * sum |D_ij| | few entries |
| `GroupLasso(strength, over="keys")` | strength * sum_i |D_i,:| | few key directions (rows) |
| `GroupLasso(strength, over="values")` | strength * sum_j |D_:,j| | few value directions (columns) |
| `Nuclear(strength)` | strength * sum of singular values | low rank |
| `SquaredNorm(strength)` | strength * |D|^2 | ridge: the same as `strength` more in the prior's precision |
| `Box(low, high)` | 0 if low <= D_ij <= high, else infinite | bounded entries |

The operators work in the dtype of x, under `jax.jit` and `jax.vmap`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kedit_jax.errors import SolverError
from kedit_jax.solve.arrays import AnyArray, matmul

Proximal = Callable[[Any, Any], Any]
"""(x [n, v], step) -> argmin_u step * R(u) + 1/2 |u - x|^2, of the shape and dtype of x."""


@runtime_checkable
class HasProx(Protocol):
    """A regulariser with more to it than its proximal operator."""

    def prox(self, x: Any, step: Any) -> Any:
        """See `Proximal`."""


Regularizer = HasProx | Proximal
"""What the solver takes: an object with `prox`, or the function itself."""


@dataclasses.dataclass(frozen=True)
class L1:
    """R(D) = strength * sum |D_ij|. Soft thresholding; entries below the threshold are exactly 0."""

    strength: float

    def __post_init__(self) -> None:
        _check_strength(self)

    def prox(self, x: Float[AnyArray, "n v"], step: Float[AnyArray, ""] | float) -> Float[Array, "n v"]:
        """sign(x) max(|x| - step * strength, 0)."""
        return jnp.sign(x) * jnp.maximum(jnp.abs(x) - step * self.strength, 0)

    def value(self, x: Float[AnyArray, "n v"]) -> Float[Array, ""]:
        """R(x)."""
        return self.strength * jnp.sum(jnp.abs(x))


@dataclasses.dataclass(frozen=True)
class GroupLasso:
    """R(D) = strength * sum of the norms of D's rows (`over="keys"`) or of its columns (`over="values"`).

    Groups are shortened by step * strength, and exactly 0 when they are shorter than that: an update of few key directions
    (inputs of the kernel) or of few value directions (its outputs).
    """

    strength: float
    over: Literal["keys", "values"] = "keys"

    def __post_init__(self) -> None:
        _check_strength(self)
        if self.over not in ("keys", "values"):
            raise SolverError(
                f"unknown groups {self.over!r}: use over='keys' (rows of an update) or over='values' (columns)"
            )

    def prox(self, x: Float[AnyArray, "n v"], step: Float[AnyArray, ""] | float) -> Float[Array, "n v"]:
        """x_g max(1 - step * strength / |x_g|, 0) for every group g."""
        norms = self._norms(x)
        # 0 / 0 in a group that is 0 would be NaN, under where as well once it is differentiated.
        return jnp.asarray(x) * (jnp.maximum(norms - step * self.strength, 0) / jnp.where(norms > 0, norms, 1))

    def value(self, x: Float[AnyArray, "n v"]) -> Float[Array, ""]:
        """R(x)."""
        return self.strength * jnp.sum(self._norms(x))

    def _norms(self, x: Float[AnyArray, "n v"]) -> Array:
        return jnp.linalg.norm(x, axis=1 if self.over == "keys" else 0, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Nuclear:
    """R(D) = strength * sum of D's singular values. One singular value decomposition of [n, v] for each application."""

    strength: float

    def __post_init__(self) -> None:
        _check_strength(self)

    def prox(self, x: Float[AnyArray, "n v"], step: Float[AnyArray, ""] | float) -> Float[Array, "n v"]:
        """x with its singular values lowered by step * strength, those below it to 0."""
        left, singular, right = jnp.linalg.svd(x, full_matrices=False)
        return matmul(left * jnp.maximum(singular - step * self.strength, 0), right)

    def value(self, x: Float[AnyArray, "n v"]) -> Float[Array, ""]:
        """R(x)."""
        return self.strength * jnp.sum(jnp.linalg.svd(x, compute_uv=False))


@dataclasses.dataclass(frozen=True)
class SquaredNorm:
    """R(D) = strength * |D|^2, ridge: what a prior with `strength` more on its precision's diagonal does in closed form."""

    strength: float

    def __post_init__(self) -> None:
        _check_strength(self)

    def prox(self, x: Float[AnyArray, "n v"], step: Float[AnyArray, ""] | float) -> Float[Array, "n v"]:
        """x / (1 + 2 step * strength)."""
        return jnp.asarray(x) / (1 + 2 * step * self.strength)

    def value(self, x: Float[AnyArray, "n v"]) -> Float[Array, ""]:
        """R(x)."""
        return self.strength * jnp.sum(jnp.square(x))


@dataclasses.dataclass(frozen=True)
class Box:
    """R(D) = 0 where low <= D_ij <= high for all entries, else infinite. A bound may be infinite.

    Bounds on both sides of 0 can always be met. Others may not meet the subspace of a prior with a basis: the solver then
    reports that it did not converge.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high or self.low == math.inf or self.high == -math.inf:
            raise SolverError(f"a box needs low <= high with a finite number between them, got {self.low} and {self.high}")

    def prox(self, x: Float[AnyArray, "n v"], step: Float[AnyArray, ""] | float) -> Float[Array, "n v"]:
        """x clipped to the box, whatever the step."""
        return jnp.clip(x, self.low, self.high)

    def value(self, x: Float[AnyArray, "n v"]) -> Float[Array, ""]:
        """0 or infinity."""
        outside = jnp.any((x < self.low) | (x > self.high))
        return jnp.where(outside, jnp.asarray(jnp.inf, x.dtype), jnp.asarray(0, x.dtype))


def proximal(regularizer: Regularizer) -> Proximal:
    """The regulariser's proximal operator, which raises SolverError when what it returns is no [n, v] of the dtype of x.

    Raises:
        SolverError: neither an object with `prox` nor a function, or not hashable.
    """
    given = regularizer.prox if isinstance(regularizer, HasProx) else regularizer
    if isinstance(regularizer, type) or not callable(given):
        raise SolverError(
            f"{describe(regularizer)} is no regulariser: give an object with prox(x, step), like L1(0.1), or such a function"
        )
    try:
        hash(regularizer)
    except TypeError as error:
        raise SolverError(
            f"the regulariser {describe(regularizer)} is not hashable, so no compilation can be cached by it: make it a "
            f"frozen dataclass with hashable fields"
        ) from error
    return lambda x, step: _same_kind(regularizer, given(x, step), x)


def describe(regularizer: object) -> str:
    """The regulariser as a message names it."""
    return str(getattr(regularizer, "__qualname__", None) or repr(regularizer))


def _same_kind(regularizer: Regularizer, result: Any, x: Array) -> Array:
    """`result` if it is an array of the shape and dtype of x. Runs while tracing, so it costs nothing afterwards."""
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
    if shape is None or dtype is None:
        raise SolverError(
            f"the proximal operator of {describe(regularizer)} returned {type(result).__name__}, not an array: return u, of "
            f"the shape {x.shape} of x"
        )
    if shape != x.shape or dtype != x.dtype:
        raise SolverError(
            f"the proximal operator of {describe(regularizer)} turned {x.dtype} {x.shape} into {dtype} {shape}: return the "
            f"shape and dtype of x (write its constants as Python numbers, which have no dtype of their own)"
        )
    return result


def _check_strength(regularizer: L1 | GroupLasso | Nuclear | SquaredNorm) -> None:
    if not (math.isfinite(regularizer.strength) and regularizer.strength >= 0):
        raise SolverError(
            f"the strength of {type(regularizer).__name__} must be finite and >= 0 (R is convex), got {regularizer.strength}"
        )
