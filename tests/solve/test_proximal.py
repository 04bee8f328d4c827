"""Proximal operators: against NumPy, against their definition, and what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from regularizer_cases import CASES
from solve_problems import F32, F64, relative

from kedit_jax import solve
from kedit_jax.errors import SolverError
from kedit_jax.solve.proximal import proximal

STRENGTH, STEP = 0.7, 0.9


@pytest.fixture(params=CASES)
def name(request) -> str:
    return request.param


def points(seed: int = 0) -> np.ndarray:
    """Entries, rows and columns on both sides of every threshold, one row and one column of zeros."""
    x = np.random.default_rng(seed).normal(size=(9, 6)) * np.logspace(0.3, -1, 9)[:, None]
    x[3], x[:, 2] = 0.0, 0.0
    return x


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_operator_and_value_are_numpys(name, dtype):
    case, x = CASES[name], points().astype(dtype)
    regularizer = case.make(STRENGTH)
    with solve.float64():
        u = regularizer.prox(jnp.asarray(x), jnp.asarray(STEP, dtype))
        value = regularizer.value(u)
    tolerance = {F64: 1e-13, F32: 1e-5}[dtype]
    assert (u.shape, u.dtype, value.dtype) == (x.shape, dtype, dtype)
    assert relative(u, case.prox(np.asarray(x, np.float64), STEP, STRENGTH)) <= tolerance
    assert float(value) == pytest.approx(case.value(np.asarray(u, np.float64), STRENGTH), rel=tolerance)
    assert relative(u, case.prox(np.asarray(x, np.float64), STEP, 0.5 * STRENGTH)) > 1e-2


def test_operator_minimises_what_it_says(name):
    """step R(u) + 1/2 |u - x|^2 is lower at prox(x, step) than anywhere around, and not so for another step."""
    case, x, rng = CASES[name], points(1), np.random.default_rng(0)
    regularizer = case.make(STRENGTH)

    def objective(u: np.ndarray) -> float:
        return STEP * case.value(u, STRENGTH) + 0.5 * ((u - x) ** 2).sum()

    with solve.float64():
        u, other = (np.asarray(regularizer.prox(jnp.asarray(x), step)) for step in (STEP, 1.3 * STEP))
    around = [
        scale * rng.normal(size=x.shape) * mask for scale in (1e-3, 0.1, 1.0) for mask in (1.0, u != 0) for _ in range(20)
    ]
    towards = [share * (x - u) for share in (-0.1, 0.1, 1.0)] + [-share * u for share in (-0.1, 0.1, 1.0)]
    assert all(objective(u + change) >= objective(u) * (1 - 1e-12) for change in around + towards)
    if name != "box":  # a projection, whatever the step
        assert objective(other) > objective(u) * (1 + 1e-4)


def test_what_is_small_becomes_exactly_zero():
    with solve.float64():
        x = jnp.asarray(points())
        for regularizer, axis in ((solve.GroupLasso(0.3), 1), (solve.GroupLasso(0.3, over="values"), 0)):
            u = np.asarray(regularizer.prox(x, 1.0))
            dead = np.linalg.norm(x, axis=axis) <= 0.3
            assert dead.sum() >= 1
            assert ((np.linalg.norm(u, axis=axis) == 0) == dead).all()
        assert ((np.asarray(solve.L1(0.3).prox(x, 1.0)) == 0) == (np.abs(x) <= 0.3)).all()
        assert np.linalg.matrix_rank(np.asarray(solve.Nuclear(0.3).prox(x, 1.0)), tol=1e-12) < np.linalg.matrix_rank(x)
        assert np.isfinite(np.asarray(solve.GroupLasso(0.3).prox(0 * x, 1.0))).all()


def test_one_sided_box():
    with solve.float64():
        x = jnp.asarray(points())
        assert (np.asarray(solve.Box(0.0, np.inf).prox(x, 1.0)) == np.maximum(points(), 0)).all()
        assert float(solve.Box(0.0, np.inf).value(x)) == np.inf


def test_equal_parameters_share_a_compilation():
    assert hash(solve.L1(0.1)) == hash(solve.L1(0.1))
    assert solve.GroupLasso(0.1) == solve.GroupLasso(0.1, over="keys") != solve.GroupLasso(0.1, over="values")
    with pytest.raises(dataclasses.FrozenInstanceError):
        solve.L1(0.1).strength = 0.2


@pytest.mark.usefixtures("unchecked")
class TestRefused:
    @pytest.mark.parametrize("make", [solve.L1, solve.GroupLasso, solve.Nuclear, solve.SquaredNorm])
    @pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
    def test_strength(self, make, bad):
        with pytest.raises(SolverError, match=rf"strength of {make.__name__} must be finite and >= 0 .*got {bad}"):
            make(bad)

    def test_groups(self):
        with pytest.raises(SolverError, match=r"unknown groups 'rows': use over='keys'"):
            solve.GroupLasso(1.0, over="rows")

    @pytest.mark.parametrize("bounds", [(1.0, -1.0), (np.nan, 1.0), (0.0, np.nan), (np.inf, np.inf), (-np.inf, -np.inf)])
    def test_bounds(self, bounds):
        with pytest.raises(SolverError, match=r"a box needs low <= high"):
            solve.Box(*bounds)

    @pytest.mark.parametrize("bad", [solve.L1, 0.1, "l1", None], ids=repr)
    def test_no_regulariser(self, bad):
        with pytest.raises(SolverError, match=r"is no regulariser: give an object with prox\(x, step\), like L1\(0.1\)"):
            proximal(bad)

    def test_not_hashable(self):
        @dataclasses.dataclass
        class Mutable:
            strength: float

            def prox(self, x, step):
                return x

        with pytest.raises(SolverError, match=r"Mutable\(strength=1.0\) is not hashable.*frozen dataclass"):
            proximal(Mutable(1.0))
