"""The prior over updates. An editor IS a prior (and the noise of its constraints), nothing else.

All editors of the family solve, for keys K [m, n] with residuals R0 against the original kernel and weights w,

    D* = argmin_D  sum_i w_i |r_i - k_i D|^2  +  <D, A0 D>,        H = A0^-1 the prior's covariance

and differ in H alone ("The Labyrinth and the Thread", arXiv 2605.26670, section 3):

| editor | prior | noise of the constraints |
| --- | --- | --- |
| MEMIT (arXiv 2210.07229) | `memit(C0, weight)` | 1 |
| MEMIT with ridge | `memit(C0, weight, ridge=rho)` | 1 |
| plain ridge | `ridge(n, rho)` | 1 |
| AlphaEdit (arXiv 2410.02355) | `alphaedit(C0, threshold=, l2=)` | 1 |
| ROME, EMMET (arXiv 2403.14236) | `memit(C0, 1.0)` | 0 (equality), or EMMET's lambda |
| your own | `from_precision(A0)`, `restricted(A0, N)`, `combine(...)` | 1 / weight of each fact |

`editors` names the published ones with their noise. The factorisation is made once, here, in float64 on the host; solving
never factors an n x n matrix of the prior again.
"""

import hashlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from kedit_jax.errors import NonFiniteError, SolverError
from kedit_jax.solve.arrays import AnyArray, compiled, float64, matmul, record

SYMMETRY = 1e-8
"""Largest |C - C'| over the largest |C| that counts as rounding in a second moment."""

ORTHONORMAL = 1e-8
"""Largest |N'N - I| that counts as rounding in a basis, and largest sine of the angle between directions that are one."""

NULL_THRESHOLD = 0.02
"""AlphaEdit's published threshold on the eigenvalues of C0."""


@record
class Prior:
    """H = basis L^-T L^-1 basis', the covariance of an update's columns; immutable, a pytree.

    `factor` is L: the lower Cholesky factor of the precision in the basis, or its diagonal when L is diagonal.
    `basis` has orthonormal columns; None stands for the identity.
    """

    factor: Float[AnyArray, "*layers r r"] | Float[AnyArray, "*layers r"]
    basis: Float[AnyArray, "*layers n r"] | None = None

    @property
    def rank(self) -> int:
        """r: the dimension of the subspace that updates may use."""
        return int(self.factor.shape[-1])

    @property
    def n_keys(self) -> int:
        """n: the width of the keys."""
        return self.rank if self.basis is None else int(self.basis.shape[-2])

    @property
    def dtype(self) -> np.dtype:
        """The dtype in which everything solved under this prior is computed."""
        return np.dtype(self.factor.dtype)


@compiled
def whiten(prior: Prior, keys: Float[AnyArray, "m n"]) -> Float[Array, "m r"]:
    """U = K basis L^-T, so that U U' = K H K'. Works in the prior's dtype."""
    rows = jnp.asarray(keys, prior.dtype)
    if prior.basis is not None:
        rows = matmul(rows, jnp.asarray(prior.basis))
    factor = jnp.asarray(prior.factor)
    if factor.ndim == 1:
        return rows / factor
    return jax.lax.linalg.triangular_solve(factor, rows, left_side=False, lower=True, transpose_a=True)


@compiled
def unwhiten(prior: Prior, x: Float[AnyArray, "r v"]) -> Float[Array, "n v"]:
    """basis L^-T x: from whitened coordinates back to the kernel's. Works in the prior's dtype."""
    columns, factor = jnp.asarray(x, prior.dtype), jnp.asarray(prior.factor)
    if factor.ndim == 1:
        columns = columns / factor[:, None]
    else:
        columns = jax.lax.linalg.triangular_solve(factor, columns, left_side=True, lower=True, transpose_a=True)
    return columns if prior.basis is None else matmul(jnp.asarray(prior.basis), columns)


def memit(moment: Float[AnyArray, "n n"], weight: float, ridge: float = 0.0, *, tolerance: float = 1e-5) -> Prior:
    """MEMIT's prior: A0 = weight * C0 + ridge * I.

    Args:
        moment: C0, the MEAN second moment of keys over a corpus, symmetric, positive semidefinite.
        weight: lambda > 0, how strongly an update is kept small on the corpus (15000 or 20000 in published settings).
        ridge: rho >= 0, part of the objective. Needed when C0 is singular.
        tolerance: the relative accuracy that solutions must be able to reach: A0 is refused as numerically singular
            when its smallest eigenvalue is below 0.1 eps64 / tolerance of its largest.

    Raises:
        SolverError: C0 not square or not symmetric (beyond `SYMMETRY`), weight <= 0, ridge < 0, or A0 not positive
            definite to the tolerance; the message names the smallest eigenvalue and the ridge that would mend it.
        NonFiniteError: NaN or infinity in C0.
    """
    c0 = _symmetric(moment, "moment")
    _positive("weight", weight, zero=False)
    _positive("ridge", ridge, zero=True)
    return _factored(weight * c0 + ridge * np.eye(len(c0)), ridge, tolerance)


def from_precision(precision: Float[AnyArray, "n n"], *, tolerance: float = 1e-5) -> Prior:
    """A prior given by its precision A0 itself. Raises as `memit` does."""
    return _factored(_symmetric(precision, "precision"), 0.0, tolerance)


def ridge(n: int, rho: float) -> Prior:
    """Plain ridge: A0 = rho * I of width n. Raises SolverError unless n >= 1 and rho > 0."""
    if n < 1:
        raise SolverError(f"the width of the keys must be at least 1, got {n}")
    _positive("rho", rho, zero=False)
    return on_device(np.full(n, np.sqrt(rho)))


def null_space(
    moment: Float[AnyArray, "n n"],
    *,
    threshold: float | None = None,
    relative: float | None = None,
    rank: int | None = None,
) -> Float[np.ndarray, "n r"]:
    """Orthonormal eigenvectors of C0's smallest eigenvalues, smallest first: the directions that a corpus hardly uses.

    Give at most one of the three rules. Eigenvectors of equal eigenvalues are determined only together: a `rank` that
    separates some of them (of a singular C0, say) picks a subspace by rounding.

    Args:
        moment: C0 as for `memit`.
        threshold: eigenvalues < threshold, on C0's own; 0.02 as published, and when no rule is given.
        relative: eigenvalues < relative * the largest.
        rank: this many.

    Returns:
        N [n, r] in float64 on the host, 0 < r < n; N N' is AlphaEdit's projector.

    Raises:
        SolverError: C0 as `alphaedit` refuses it, more than one rule, or a null space of rank 0 (nothing could be edited)
            or n (nothing would be protected); the message names the eigenvalues and what would mend it.
        NonFiniteError: NaN or infinity in C0.
    """
    return _null_space(_symmetric(moment, "moment"), threshold, relative, rank)[1]


def alphaedit(
    moment: Float[AnyArray, "n n"],
    *,
    threshold: float | None = None,
    relative: float | None = None,
    rank: int | None = None,
    l2: float = 10.0,
    weight: float = 0.0,
) -> Prior:
    """AlphaEdit's prior: updates live in the null space of C0 alone, H = N (weight N'C0N + l2 I)^-1 N'.

    N is the `null_space` of C0. With weight 0 this is the published editor, whose nonsymmetric system (projector P = N N')
    has the same solution: A0 = l2 I in the basis N. N'C0N is diagonal by construction (the eigenvalues), so the factor is
    kept as a diagonal.

    Args:
        moment: C0 as for `memit`.
        threshold, relative, rank: which eigenvectors, at most one of them, as for `null_space`; threshold 0.02, as
            published, when none is given. They apply to C0's own eigenvalues, not to those of weight * C0.
        l2: > 0, 10 as published (1 for Qwen2.5).
        weight: >= 0, adds MEMIT's term within the null space; 0 as published.

    Raises:
        SolverError: as `memit` and `null_space`.
        NonFiniteError: NaN or infinity in C0.
    """
    c0 = _symmetric(moment, "moment")
    _positive("l2", l2, zero=False)
    _positive("weight", weight, zero=True)
    eigenvalues, basis = _null_space(c0, threshold, relative, rank)
    return on_device(np.sqrt(weight * np.maximum(eigenvalues, 0.0) + l2), basis)


def restricted(precision: Float[AnyArray, "n n"], basis: Float[AnyArray, "n r"], *, tolerance: float = 1e-5) -> Prior:
    """AlphaEdit's form for any precision and subspace: H = N (N'A0N)^-1 N', updates D = N X alone.

    With N = I this is `from_precision(A0)`, so MEMIT for A0 = weight * C0 + ridge * I. A0 may be singular outside of N.

    Args:
        precision: A0, symmetric, positive definite on the subspace.
        basis: N with orthonormal columns, from `null_space` for instance.
        tolerance: as for `memit`.

    Raises:
        SolverError: a basis of another height, without columns or not orthonormal (beyond `ORTHONORMAL`); A0 as
            `from_precision` refuses it, on the subspace.
        NonFiniteError: NaN or infinity in A0 or N.
    """
    a0, n = _symmetric(precision, "precision"), _orthonormal(basis)
    if len(n) != len(a0):
        raise SolverError(
            f"basis has shape {n.shape}, the precision {a0.shape}: a basis needs one row for each key direction"
        )
    return _factored(_inside(a0, n), 0.0, tolerance, n)


def combine(*priors: Prior, tolerance: float = 1e-5) -> Prior:
    """The prior of updates that all the given ones ask for: precisions add, on the intersection of their subspaces.

    <D, A0 D> = sum_j <D, A0_j D>, D in every prior's subspace. Two copies of a prior weigh twice as much; `combine(prior)`
    is the prior itself, up to rounding. Combining `ridge(n, rho)` adds rho to the precision. Float64, whatever the priors'
    dtype; one layer (factors without leading axes).

    Raises:
        SolverError: no priors, different widths, subspaces with nothing in common but 0, or a sum that is numerically
            singular to the tolerance (as `memit`).
    """
    if not priors:
        raise SolverError("no priors to combine: give at least one")
    widths = [prior.n_keys for prior in priors]
    if len(set(widths)) > 1:
        raise SolverError(f"priors of widths {', '.join(map(str, widths))} belong to different layers: combine those of one")
    basis = _intersection([np.asarray(prior.basis, np.float64) for prior in priors if prior.basis is not None])
    parts = []
    for prior in priors:
        own, a0 = prior.basis, _product_with_transpose(np.asarray(prior.factor, np.float64))
        within = basis if own is None or basis is None else np.asarray(own, np.float64).T @ basis
        parts.append(a0 if within is None else _inside(a0, within))
    return _factored(np.sum(parts, axis=0), 0.0, tolerance, basis)


@compiled
def precision(prior: Prior) -> Float[Array, "r r"]:
    """A0 in the prior's basis: <D, A0 D> = <X, precision X> for updates D = basis X (X = D without a basis)."""
    factor = jnp.asarray(prior.factor)
    return jnp.diag(jnp.square(factor)) if factor.ndim == 1 else matmul(factor, factor.T)


def cast(prior: Prior, dtype: DTypeLike) -> Prior:
    """The same prior in another dtype; everything solved under it is then computed in that dtype.

    float32 is for machines without float64. It loses accuracy wherever keys meet directions in which the prior is weak:
    see the package's docstring for the measured errors before using it.
    """
    with float64():
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), prior)


def prior_fingerprint(prior: Prior) -> str:
    """sha256 (hex) over the prior's arrays: dtype, shape and bytes. Equal only for bitwise equal priors."""
    digest = hashlib.sha256()
    for name, leaf in (("factor", prior.factor), ("basis", prior.basis)):
        if leaf is not None:
            array = np.ascontiguousarray(leaf)
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.data)
    return digest.hexdigest()


def on_device(factor: np.ndarray, basis: np.ndarray | None = None) -> Prior:
    """A prior of arrays in float64 on the host, where `solve.float64()` puts such work."""
    with float64():
        return Prior(jnp.asarray(factor), None if basis is None else jnp.asarray(basis))


def _positive(name: str, value: float, *, zero: bool) -> None:
    if not np.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise SolverError(f"{name} must be finite and {'>= 0' if zero else '> 0'}, got {value}")


def _symmetric(matrix: Float[AnyArray, "n n"], name: str) -> Float[np.ndarray, "n n"]:
    array = np.asarray(matrix, np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
        raise SolverError(f"{name} must be a square matrix, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{name} has {int((~np.isfinite(array)).sum())} entries that are NaN or infinite")
    asymmetry, scale = float(np.abs(array - array.T).max()), float(np.abs(array).max())
    if asymmetry > SYMMETRY * scale:
        raise SolverError(
            f"{name} is not symmetric: largest |C - C'| is {asymmetry:.3g}, allowed {SYMMETRY:g} of its largest entry "
            f"{scale:.3g}; accumulate it in float64 as K'K, or symmetrise it as (C + C') / 2 if you know why it differs"
        )
    return (array + array.T) / 2


def _semidefinite(eigenvalues: Float[np.ndarray, "n"]) -> None:
    """Eigenvalues below 0 by more than rounding mean that this is no second moment."""
    rounding = len(eigenvalues) * np.finfo(np.float64).eps * max(abs(eigenvalues[0]), abs(eigenvalues[-1]))
    if eigenvalues[0] < -SYMMETRY * max(eigenvalues[-1], 0.0) - rounding:
        raise SolverError(
            f"the moment is indefinite: smallest eigenvalue {eigenvalues[0]:.3g}, largest {eigenvalues[-1]:.3g}; a second "
            f"moment K'K / N has none below 0, so accumulate it in float64"
        )


def _null_space(
    c0: Float[np.ndarray, "n n"], threshold: float | None, relative: float | None, rank: int | None
) -> tuple[Float[np.ndarray, "r"], Float[np.ndarray, "n r"]]:
    """The chosen eigenvalues of C0, ascending, and their eigenvectors."""
    rules = {"threshold": threshold, "relative": relative, "rank": rank}
    given = [f"{name}={value}" for name, value in rules.items() if value is not None]
    if len(given) > 1:
        raise SolverError(f"{' and '.join(given)} choose the null space in different ways: give one")
    for name in ("threshold", "relative"):
        value = rules[name]
        if value is not None:
            _positive(name, value, zero=False)
    eigenvalues, vectors = scipy.linalg.eigh(c0)
    _semidefinite(eigenvalues)
    if rank is not None:
        chosen = _checked_rank(rank, eigenvalues)
    elif relative is not None:
        chosen = _below("relative", relative, eigenvalues, max(float(eigenvalues[-1]), 0.0))
    else:
        chosen = _below("threshold", NULL_THRESHOLD if threshold is None else threshold, eigenvalues, 1.0)
    return eigenvalues[:chosen], vectors[:, :chosen].copy()  # never a view, which would hold all vectors


def _checked_rank(rank: int, eigenvalues: Float[np.ndarray, "n"]) -> int:
    n = len(eigenvalues)
    if 0 < rank < n:
        return rank
    why = "nothing could be edited" if rank <= 0 else "nothing would be protected"
    raise SolverError(
        f"a null space of rank {rank} of {n} (eigenvalues {eigenvalues[0]:.3g} to {eigenvalues[-1]:.3g}), so {why}: give a "
        f"rank from 1 to {n - 1}, or use {'memit' if rank <= 0 else 'ridge'}"
    )


def _below(name: str, value: float, eigenvalues: Float[np.ndarray, "n"], unit: float) -> int:
    """How many eigenvalues are below value * unit: some, but not all."""
    smallest, largest = float(eigenvalues[0]), float(eigenvalues[-1])
    count = int(np.searchsorted(eigenvalues, value * unit))
    at = f"{name} {value:g}" + (f" of the largest ({largest:.3g})" if name == "relative" else "")
    if not count:
        mend = f"{smallest / unit:.3g}" if unit else "0"
        raise SolverError(
            f"no eigenvalue of the moment is below {at} (smallest {smallest:.3g}), so nothing could be edited: raise "
            f"the {name} above {mend}, or use memit"
        )
    if count == len(eigenvalues):
        raise SolverError(
            f"every eigenvalue of the moment is below {at} (largest {largest:.3g}), so nothing would be protected: lower "
            f"the {name} to at most {largest / unit:.3g}, or use ridge"
        )
    return count


def _orthonormal(basis: Float[AnyArray, "n r"]) -> Float[np.ndarray, "n r"]:
    n = np.ascontiguousarray(np.asarray(basis, np.float64))
    if n.ndim != 2 or not n.size:
        raise SolverError(f"basis must be a matrix [n, r] with at least one column, got shape {n.shape}")
    if not np.isfinite(n).all():
        raise NonFiniteError(f"basis has {int((~np.isfinite(n)).sum())} entries that are NaN or infinite")
    off = float(np.abs(n.T @ n - np.eye(n.shape[1])).max())
    if off > ORTHONORMAL:
        raise SolverError(
            f"basis is not orthonormal: largest |N'N - I| is {off:.3g}, allowed {ORTHONORMAL:g}; take Q of "
            f"numpy.linalg.qr(N) in float64"
        )
    return n


def _inside(a0: Float[np.ndarray, "n n"], basis: Float[np.ndarray, "n r"]) -> Float[np.ndarray, "r r"]:
    """N'A0N, exactly symmetric."""
    reduced = basis.T @ a0 @ basis
    return (reduced + reduced.T) / 2


def _product_with_transpose(factor: np.ndarray) -> np.ndarray:
    return np.diag(factor**2) if factor.ndim == 1 else factor @ factor.T


def _intersection(bases: list[np.ndarray]) -> np.ndarray | None:
    """Orthonormal basis of what all the subspaces share; None, the whole space, for none of them.

    By the sines of the principal angles: their cosines are 1 - angle^2 / 2, which rounds to 1 below angles of 1e-8.
    """
    if not bases:
        return None
    shared = bases[0]
    for other in bases[1:]:
        _, sines, directions = scipy.linalg.svd(shared - other @ (other.T @ shared), full_matrices=False)
        same = sines <= ORTHONORMAL
        if not same.any():
            ranks = ", ".join(str(basis.shape[1]) for basis in bases)
            raise SolverError(
                f"the priors' subspaces (ranks {ranks} of {len(shared)}) have only 0 in common (smallest sine of an angle "
                f"between them {sines.min():.3g}), so nothing could be edited: choose wider null spaces, or fewer priors"
            )
        if not same.all():  # otherwise the basis stays as it is, and with it the priors' own coordinates
            shared = np.ascontiguousarray(shared @ directions[same].T)
    return shared


class _Spectrum(NamedTuple):
    smallest: float
    largest: float


def _factored(a0: Float[np.ndarray, "r r"], ridge: float, tolerance: float, basis: np.ndarray | None = None) -> Prior:
    """Prior with precision a0 in the basis, after making sure that a0 is positive definite to the tolerance."""
    floor = 0.1 * np.finfo(np.float64).eps / tolerance
    factor, info = scipy.linalg.lapack.dpotrf(a0, lower=1, clean=1)
    # The 1-norm estimate costs n^2 and never exceeds the true reciprocal condition by more than its own estimation error;
    # eigenvalues (4 n^3 / 3) are computed only when it leaves doubt, and for the message.
    doubtful = info != 0 or _reciprocal_condition(factor, a0) < 10 * floor
    if doubtful:
        spectrum = _Spectrum(*scipy.linalg.eigvalsh(a0)[[0, -1]])
        if info != 0 or spectrum.smallest < floor * spectrum.largest:
            raise _singular(spectrum, ridge, floor)
    return on_device(np.ascontiguousarray(factor), basis)


def _reciprocal_condition(factor: np.ndarray, a0: np.ndarray) -> float:
    norm = float(np.abs(a0).sum(0).max())
    return float(scipy.linalg.lapack.dpocon(factor, norm, uplo="L")[0])


def _singular(spectrum: _Spectrum, ridge: float, floor: float) -> SolverError:
    wanted = ridge + floor * abs(spectrum.largest) + max(-spectrum.smallest, 0.0)
    wanted = float(f"{1.05 * wanted:.2g}")  # rounded up to two digits, so that the number in the message works as it is
    kind = "indefinite" if spectrum.smallest < -floor * abs(spectrum.largest) else "singular"
    return SolverError(
        f"the prior's precision is numerically {kind}: smallest eigenvalue {spectrum.smallest:.3g}, largest "
        f"{spectrum.largest:.3g}, ridge {ridge:g}; use a ridge of at least {wanted:g}, or a moment from more samples"
    )
