"""Published editors, each a prior and the noise of its constraints, and nothing else (theory: see `prior`).

    editor = editors.memit(moment, weight=15000.0, ridge=1.0)
    stack = editor.constraints(kernel, keys, values)
    update = one_time(editor.prior, stack).update

Every editor takes C0 [n, n] first, the MEAN second moment of keys over a corpus, and everything else by name. To add one,
write a function that returns an `Editor`, and name it in `EDITORS`: the common tests then ask for its parameters and for its
formula written down independently.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Real

from kedit_jax.errors import SolverError
from kedit_jax.solve import prior as priors
from kedit_jax.solve.arrays import AnyArray, record
from kedit_jax.solve.constraints import Constraints, constraints
from kedit_jax.solve.prior import Prior


@record
class Editor:
    """argmin_D  sum_i w_i |r_i - k_i D|^2 / noise  +  <D, A0 D>: a prior A0, and the noise of a constraint of weight 1."""

    prior: Prior
    noise: Float[AnyArray, "*layers"] | float = 1.0
    """0 makes every constraint an equality."""

    def constraints(
        self,
        kernel: Real[AnyArray, "n v"],
        keys: Real[AnyArray, "m n"],
        values: Real[AnyArray, "m v"],
        weights: Real[AnyArray, "m"] | None = None,
    ) -> Constraints:
        """The constraints `k_i (kernel + D) ~ v_i` as this editor understands them: noise_i = noise / w_i.

        Args:
            kernel: the original kernel W0.
            keys: one row a constraint.
            values: their targets, in units of the kernel's output.
            weights: w_i > 0, default 1: a fact of weight 2 counts as much as the same fact given twice.

        Raises:
            SolverError: as `solve.constraints`; or weights for an editor with equality constraints, which are met
                whatever their weight.
            NonFiniteError: NaN or infinity in the kernel, keys or values.
        """
        if weights is not None and self.noise == 0:
            raise SolverError(
                "weights mean nothing to an editor with noise 0, whose constraints are all met exactly: leave the weights "
                "out, or give the editor noise > 0 (`emmet(moment, noise=...)`)"
            )
        stack = constraints(kernel, keys, values, weights)
        return dataclasses.replace(stack, noise=stack.noise * self.noise)


def memit(moment: Float[AnyArray, "n n"], *, weight: float = 15000.0, ridge: float = 0.0) -> Editor:
    """MEMIT (arXiv 2210.07229): A0 = weight * C0 + ridge * I, noise 1. Raises as `prior.memit`."""
    return Editor(priors.memit(moment, weight, ridge))


def alphaedit(
    moment: Float[AnyArray, "n n"],
    *,
    threshold: float | None = None,
    relative: float | None = None,
    rank: int | None = None,
    l2: float = 10.0,
    weight: float = 0.0,
) -> Editor:
    """AlphaEdit (arXiv 2410.02355): H = N (weight * N'C0N + l2 * I)^-1 N' on C0's null space, noise 1.

    Raises as `prior.alphaedit`.
    """
    made = priors.alphaedit(moment, threshold=threshold, relative=relative, rank=rank, l2=l2, weight=weight)
    return Editor(made)


def emmet(moment: Float[AnyArray, "n n"], *, noise: float = 0.0, weight: float = 1.0, ridge: float = 0.0) -> Editor:
    """EMMET (arXiv 2403.14236): A0 = weight * C0 + ridge * I under equality constraints, or with its lambda as `noise`.

    With noise lambda > 0 this is MEMIT whose constraints weigh 1 / lambda, or, all multiplied by lambda, MEMIT with lambda
    times the prior's weight and ridge. Raises as `prior.memit`; and SolverError unless noise is finite and >= 0.
    """
    if not np.isfinite(noise) or noise < 0:
        raise SolverError(f"noise must be finite and >= 0 (0 asks for equality), got {noise}")
    return Editor(priors.memit(moment, weight, ridge), float(noise))


def rome(moment: Float[AnyArray, "n n"], *, ridge: float = 0.0) -> Editor:
    """ROME (arXiv 2202.05262): A0 = C0 + ridge * I, equality. Published for one fact, D = C0^-1 k' r / (k C0^-1 k').

    For several facts it is EMMET with noise 0. Raises as `prior.memit`.
    """
    return emmet(moment, ridge=ridge)


def ridge(moment: Float[AnyArray, "n n"], *, rho: float) -> Editor:
    """Plain ridge (the recursive-least-squares editor): A0 = rho * I, noise 1. Of the moment it takes the width alone.

    Raises SolverError for a moment that is not square, or unless rho > 0.
    """
    shape = np.shape(moment)
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise SolverError(f"moment must be a square matrix, got shape {shape}")
    return Editor(priors.ridge(shape[0], rho))


EDITORS: Mapping[str, Callable[..., Editor]] = MappingProxyType(
    {"memit": memit, "alphaedit": alphaedit, "emmet": emmet, "rome": rome, "ridge": ridge}
)
"""Every editor by its name."""
