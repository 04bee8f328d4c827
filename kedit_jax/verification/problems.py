"""Generated edit problems, and an oracle that shares nothing with the solver it judges.

The families are those on which published solves lose digits: second moments with a power-law spectrum, of half rank, or of
heavy-tailed activations; keys the corpus has never seen; a fifth of the keys near-duplicates of others with conflicting
targets; more constraints than the prior has rank.

The oracle is NumPy's: primal normal equations formed in extended precision, solved in float64 and refined.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.special
from jaxtyping import Float, Shaped

from kedit_jax import solve
from kedit_jax.solve.arrays import AnyArray

N, V = 96, 16
"""Key and value widths of most problems; rank N puts the crossover of the two forms at 79 constraints."""

F64, F32 = np.dtype(np.float64), np.dtype(np.float32)

FAMILIES = ("power-law", "rank-deficient", "heavy-tailed", "atypical", "alphaedit", "alphaedit-memit", "ridge")
"""Priors and keys; the last three are keys that the corpus has not seen with another editor's prior."""

MEMIT: Mapping[str, tuple[float, float]] = {
    "power-law": (15.0, 1e-2),
    "rank-deficient": (15000.0, 1e-2),
    "heavy-tailed": (150.0, 1e-2),
    "atypical": (15000.0, 1.0),
}
"""Weight and ridge; weak enough priors that 160 keys interfere, or the negative controls would show nothing."""

ALPHAEDIT: Mapping[str, tuple[float, float]] = {"alphaedit": (0.0, 1.0), "alphaedit-memit": (15.0, 10.0)}
"""Weight of MEMIT's term in the null space, and L2."""

THRESHOLD = 0.02
"""AlphaEdit's, as published; 52 of the 96 directions are below it."""

RIDGE = 5.0

Rows = np.ndarray | slice
Draw = Callable[[int, np.random.Generator], np.ndarray]


@dataclass(frozen=True, eq=False)
class Problem:
    """A prior, what it stands for in float64, and more constraints than it has rank.

    Attributes:
        prior: the library's.
        precision: A0 in the basis, made without the library.
        basis: orthonormal columns that updates are restricted to, made without the library; None for all directions.
        kernel, keys, values, weights: the constraints k_i (kernel + D) ~ v_i, each with weight w_i.
    """

    family: str
    prior: solve.Prior
    precision: Float[np.ndarray, "r r"]
    basis: Float[np.ndarray, "n r"] | None
    kernel: Float[np.ndarray, "n v"]
    keys: Float[np.ndarray, "m n"]
    values: Float[np.ndarray, "m v"]
    weights: Float[np.ndarray, "m"]

    @property
    def size(self) -> int:
        """m, the number of constraints."""
        return len(self.keys)

    @property
    def dtype(self) -> np.dtype:
        """Of the model: kernel, keys and values are numbers of it."""
        return self.kernel.dtype

    @functools.cached_property
    def tau(self) -> float:
        """What float64 can promise against another algorithm: max(1e-10, eps64 cond(A0))."""
        return max(1e-10, float(np.finfo(np.float64).eps * np.linalg.cond(self.precision)))

    @functools.cached_property
    def all(self) -> solve.Constraints:
        """All constraints."""
        return solve.constraints(self.kernel, self.keys, self.values, self.weights)

    def block(self, rows: Rows) -> solve.Constraints:
        """The constraints of these rows."""
        return solve.take(self.all, np.arange(self.size)[rows])

    def truth(self, rows: Rows = slice(None), values: Float[np.ndarray, "m v"] | None = None) -> Float[np.ndarray, "n v"]:
        """D*(rows), by refined primal normal equations."""
        return oracle(self, rows, rows, self.values if values is None else values, self.kernel)

    def reduced(self) -> Float[np.ndarray, "m r"]:
        """The keys in the basis."""
        keys = self.keys.astype(np.float64)
        return keys if self.basis is None else keys @ self.basis


def problem(family: str, seed: int = 0, m: int = 160, n: int = N, v: int = V, dtype: np.dtype = F64) -> Problem:
    """m constraints with random weights, a fifth of them near-duplicates of others with conflicting targets.

    Keys, values and kernel hold numbers of `dtype`, as a model of that dtype would give them.
    """
    rng = np.random.default_rng((seed, FAMILIES.index(family)))
    moment, draw = _moment_and_keys(family if family in MEMIT else "atypical", rng, n)
    keys = draw(m, rng)
    copies = rng.choice(np.arange(m // 2, m), m // 5, replace=False)
    originals = rng.choice(m // 2, m // 5)
    keys[copies] = keys[originals] * (1 + 1e-4 * rng.normal(size=(len(copies), n)))
    kernel, keys = (rng.normal(size=(n, v)) / np.sqrt(n)).astype(dtype), keys.astype(dtype)
    values = (keys @ kernel + rng.normal(size=(m, v))).astype(dtype)
    return Problem(family, *_priors(family, moment), kernel, keys, values, rng.uniform(0.5, 2.0, m))


def _moment_and_keys(family: str, rng: np.random.Generator, n: int) -> tuple[np.ndarray, Draw]:
    spectrum = np.logspace(2, -6, n)
    if family == "heavy-tailed":
        return _heavy_tailed(rng, n)
    if family == "rank-deficient":
        return _spectral(rng, n, np.where(np.arange(n) < n // 2, spectrum, 0.0), 0.1)
    return _spectral(rng, n, spectrum, 0.0 if family == "power-law" else 0.1)


def _heavy_tailed(rng: np.random.Generator, n: int) -> tuple[np.ndarray, Draw]:
    """Keys like an MLP's hidden activations: GELU of t3-distributed inputs, neurons of very different scale."""
    p = n // 4
    mix = rng.normal(size=(p, n)) * np.logspace(0, -1.5, p)[:, None]
    scale, bias = np.exp(rng.normal(size=n)), -0.8 + 0.5 * rng.normal(size=n)

    def keys(count: int, rng: np.random.Generator) -> np.ndarray:
        x = rng.normal(size=(count, p)) * np.sqrt(3 / rng.chisquare(3, size=(count, 1)))
        return _gelu(1.4 * x @ mix + bias) * scale

    sample = keys(6 * n, rng)
    return sample.T @ sample / len(sample), keys


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2))))


def _spectral(rng: np.random.Generator, n: int, spectrum: np.ndarray, outside: float) -> tuple[np.ndarray, Draw]:
    """C0 with the given spectrum; keys drawn from it plus isotropic noise that the corpus has not seen."""
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    moment = (q * spectrum) @ q.T

    def keys(count: int, rng: np.random.Generator) -> np.ndarray:
        return (rng.normal(size=(count, n)) * np.sqrt(spectrum)) @ q.T + outside * rng.normal(size=(count, n))

    return (moment + moment.T) / 2, keys


def _priors(family: str, moment: np.ndarray) -> tuple[solve.Prior, np.ndarray, np.ndarray | None]:
    """The library's prior, and A0 with its basis made separately."""
    n = len(moment)
    if family in MEMIT:
        weight, rho = MEMIT[family]
        return solve.memit(moment, weight, rho), weight * moment + rho * np.eye(n), None
    if family == "ridge":
        return solve.ridge(n, RIDGE), RIDGE * np.eye(n), None
    weight, l2 = ALPHAEDIT[family]
    eigenvalues, vectors = np.linalg.eigh(moment)
    null = vectors[:, eigenvalues < THRESHOLD]
    reduced = weight * null.T @ moment @ null + l2 * np.eye(null.shape[1])
    return solve.alphaedit(moment, threshold=THRESHOLD, l2=l2, weight=weight), reduced, null


def oracle(
    p: Problem, history: Rows, rows: Rows, values: Float[np.ndarray, "m v"], kernel: Float[np.ndarray, "n v"]
) -> Float[np.ndarray, "n v"]:
    """A(history)^-1 K' W (V - K kernel) over rows: the one-time edit if rows are the history and kernel the original."""
    keys, values, kernel = (np.asarray(x, np.longdouble) for x in (p.keys, values, kernel))
    reduced = keys if p.basis is None else keys @ p.basis
    a = p.precision + (reduced[history].T * p.weights[history]) @ reduced[history]
    b = (reduced[rows].T * p.weights[rows]) @ (values[rows] - keys[rows] @ kernel)
    solution = refined(a, b)
    return np.asarray(solution if p.basis is None else p.basis @ solution, np.float64)


def refined(a: Shaped[np.ndarray, "r r"], b: Shaped[np.ndarray, "r v"]) -> Shaped[np.ndarray, "r v"]:
    """a^-1 b in float64, refined with residuals in the precision of a and b: a plain solve would spend the tolerance."""
    inverse = np.linalg.inv(np.asarray(a, np.float64))
    x = np.zeros_like(b)
    for _ in range(4):
        x = x + inverse @ np.asarray(b - a @ x, np.float64)
    return x


def relative(a: Float[AnyArray, "*shape"], b: Float[AnyArray, "*shape"]) -> float:
    """|a - b| / |b|, Frobenius, in float64; infinite against 0, which would prove nothing."""
    ours, reference = np.asarray(a, np.float64), np.asarray(b, np.float64)
    scale = float(np.linalg.norm(reference))
    return float(np.linalg.norm(ours - reference)) / scale if scale else np.inf
