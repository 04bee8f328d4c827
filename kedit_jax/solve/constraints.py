"""The stack of constraints that an edit has to meet: keys, residuals against the ORIGINAL kernel, and noise."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Real

from kedit_jax.errors import KeditError, NonFiniteError, SolverError
from kedit_jax.solve.arrays import AnyArray, compiled, matmul, record


@record
class Constraints:
    """m constraints k_i (W0 + D) ~ v_i, each with weight w_i, as the solver reads them.

    Leading axes (`*layers`) appear when the problems of several layers are stacked for `jax.vmap`.
    """

    keys: Float[AnyArray, "*layers m n"]
    """k_i: inputs of the edited kernel."""
    residuals: Float[AnyArray, "*layers m v"]
    """v_i - k_i W0, always against the original kernel, never the edited one."""
    noise: Float[AnyArray, "*layers m"]
    """1 / w_i >= 0; 0 asks for equality (EMMET, ROME)."""

    @property
    def size(self) -> int:
        """Number of constraints."""
        return int(self.keys.shape[-2])


def _residuals(
    kernel: Real[AnyArray, "n v"], keys: Real[AnyArray, "m n"], values: Real[AnyArray, "m v"], dtype: DTypeLike
) -> Float[Array, "m v"]:
    return jnp.asarray(values, dtype) - matmul(jnp.asarray(keys, dtype), jnp.asarray(kernel, dtype))


residuals = compiled(_residuals, static=("dtype",))


def constraints(
    kernel: Real[AnyArray, "n v"],
    keys: Real[AnyArray, "m n"],
    values: Real[AnyArray, "m v"],
    weights: Real[AnyArray, "m"] | None = None,
    *,
    noise: Real[AnyArray, "m"] | float | None = None,
) -> Constraints:
    """Checked constraints `k_i (kernel + D) ~ v_i` as host arrays, for any dtype of the inputs.

    Residuals are taken in float64, because rounding them to float32 costs accuracy wherever close keys have conflicting
    targets. float32 keys stay float32 (half the memory); the solver widens them to the dtype of its prior.

    Args:
        kernel: the original kernel W0, y = x @ W0.
        keys: one row a constraint.
        values: their targets, in units of the kernel's output.
        weights: w_i > 0, default 1. More weight means a closer fit.
        noise: 1 / w_i >= 0 instead of weights; 0 asks for equality.

    Raises:
        SolverError: no constraints, shapes that do not fit, weights <= 0, noise < 0, or both given.
        NonFiniteError: NaN or infinity in the kernel, keys or values.
    """
    kernel, keys, values = (_wide(x) for x in (kernel, keys, values))
    _check_shapes(kernel, keys, values)
    variance = _noise(keys.shape[0], weights, noise)
    _check_finite(kernel, keys, values)
    with jax.enable_x64(True):
        r0 = np.asarray(residuals(kernel, keys, values, np.dtype(np.float64)))
    return Constraints(keys, r0, variance)


def _wide(x: Real[AnyArray, "..."]) -> Float[np.ndarray, "..."]:
    """Host array in its own dtype, but at least float32 (bfloat16 products lose what the model saw)."""
    array = np.asarray(x)
    return array if array.dtype == np.float64 else array.astype(np.float32 if array.dtype.itemsize < 8 else np.float64)


def _check_shapes(kernel: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    shapes = f"kernel {kernel.shape}, keys {keys.shape}, values {values.shape}"
    if any(x.ndim != 2 for x in (kernel, keys, values)):
        raise SolverError(f"kernel [n, v], keys [m, n] and values [m, v] must be matrices, got {shapes}")
    if keys.shape[1] != kernel.shape[0] or values.shape[1] != kernel.shape[1] or len(keys) != len(values):
        raise SolverError(f"shapes do not fit: kernel [n, v], keys [m, n], values [m, v] expected, got {shapes}")
    if not len(keys):
        raise SolverError(f"no constraints: give at least one key with its target, got {shapes}")


def _noise(m: int, weights: Real[AnyArray, "w"] | None, noise: Real[AnyArray, "w"] | float | None) -> Float[np.ndarray, "m"]:
    if weights is not None and noise is not None:
        raise SolverError("weights and noise are two spellings of the same thing (noise = 1 / weight): give one")
    name, given = ("weights", weights) if weights is not None else ("noise", 1.0 if noise is None else noise)
    array = np.asarray(given, np.float64)
    if array.shape not in ((), (m,)):
        raise SolverError(f"{name} has shape {array.shape}, but there are {m} keys: give one number for each")
    bad = ~np.isfinite(array) | (array <= 0 if name == "weights" else array < 0)
    if bad.any():
        rule = "finite and > 0; leave a constraint out to give it no weight" if name == "weights" else "finite and >= 0"
        raise SolverError(f"{name} must be {rule}, got {_some(array, bad)}")
    return np.broadcast_to(1 / array if name == "weights" else array, (m,)).copy()


def _check_finite(kernel: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    named = {"kernel": kernel, "keys": keys, "values": values}
    problems = [
        f"{name}: {int((~np.isfinite(x)).sum())} of {x.size} numbers, in rows {_rows(~np.isfinite(x).all(1))}"
        for name, x in named.items()
        if not np.isfinite(x).all()
    ]
    if problems:
        raise NonFiniteError.listing("NaN or infinity; check the model's dtype and the optimised targets:", problems)


def _some(array: np.ndarray, bad: np.ndarray) -> str:
    if array.ndim == 0:
        return f"{array}"
    return ", ".join(f"{array[i]} at {i}" for i in np.flatnonzero(bad)[:5])


def _rows(bad: np.ndarray) -> str:
    rows = np.flatnonzero(bad)
    return ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")


def concatenate(blocks: Sequence[Constraints]) -> Constraints:
    """All constraints of the blocks, in order, as host arrays."""
    if not blocks:
        raise KeditError("no blocks of constraints to concatenate: give at least one")
    return jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *blocks)


def take(stack: Constraints, rows: Bool[np.ndarray, "m"] | Int[np.ndarray, "k"]) -> Constraints:
    """The chosen constraints (boolean mask or indices), as host arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[rows], stack)


@compiled
def masked(stack: Constraints, keep: Real[AnyArray, "m"] | Bool[AnyArray, "m"]) -> Constraints:
    """The same shapes with the rows where `keep` is 0 turned into no-ops (key 0, residual 0, noise 1).

    A no-op contributes exactly 0 to every update, so this is retraction with static shapes, and jit-able.
    """
    kept = jnp.asarray(keep).astype(bool)
    return Constraints(
        jnp.where(kept[:, None], stack.keys, jnp.zeros_like(stack.keys)),
        jnp.where(kept[:, None], stack.residuals, jnp.zeros_like(stack.residuals)),
        jnp.where(kept, stack.noise, jnp.ones_like(stack.noise)),
    )


def padded(stack: Constraints, rows: int) -> Constraints:
    """`stack` with no-op rows at its end, as host arrays, so that blocks of many sizes share one compilation."""
    extra = rows - stack.size
    if extra < 0:
        raise SolverError(f"{stack.size} constraints do not fit into {rows} rows: pad to at least {stack.size}")
    return Constraints(
        np.pad(np.asarray(stack.keys), ((0, extra), (0, 0))),
        np.pad(np.asarray(stack.residuals), ((0, extra), (0, 0))),
        np.pad(np.asarray(stack.noise), (0, extra), constant_values=1.0),
    )
