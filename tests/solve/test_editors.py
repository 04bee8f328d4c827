"""One suite for every editor: a new one is a new parameter here, with its formula written down independently."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solve_problems import F32, F64, refined, relative

from kedit_jax import solve
from kedit_jax.errors import KeditError, NonFiniteError, SolverError
from kedit_jax.solve import editors

N, V, M, BLOCK = 64, 8, 24, 8
CONTROL = 1e-2
"""What a negative control must exceed."""

Oracle = Callable[["Case", np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """An editor's parameters, and what it does according to its paper."""

    parameters: Mapping[str, Any]
    oracle: Oracle
    """(case, C0, keys, residuals, weights) -> update, in float64 and without the library."""
    precision: Callable[[Mapping[str, Any], np.ndarray], np.ndarray]
    """A0 where the editor allows updates; its condition number decides what float64 can promise."""

    @property
    def equality(self) -> bool:
        return self.parameters.get("noise") == 0


def regularised_least_squares(case: Case, c0: np.ndarray, keys: np.ndarray, residuals: np.ndarray, weights: np.ndarray):
    """(A0 + K' Omega K)^-1 K' Omega R."""
    return refined(case.precision(case.parameters, c0) + (keys.T * weights) @ keys, (keys.T * weights) @ residuals)


def projected(case: Case, c0: np.ndarray, keys: np.ndarray, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AlphaEdit as published: (P (K' Omega K + weight C0) + L2 I)^-1 P K' Omega R, not symmetric."""
    p, eye = case.parameters, np.eye(len(c0))
    projector = published_projector(c0)
    system = projector @ ((keys.T * weights) @ keys + p.get("weight", 0.0) * c0) + p["l2"] * eye
    return refined(system, projector @ (keys.T * weights) @ residuals)


def published_projector(c0: np.ndarray) -> np.ndarray:
    """By a singular value decomposition, as published, with the published threshold."""
    u, s, _ = np.linalg.svd(c0)
    return u[:, s < 0.02] @ u[:, s < 0.02].T


def saddle_point(case: Case, c0: np.ndarray, keys: np.ndarray, residuals: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[A0 K'; K -N] [D; mu] = [0; R] with N = noise / weights: the Lagrangian's, for N = 0 of min <D, A0 D>, K D = R."""
    a0 = case.precision(case.parameters, c0)
    corner = np.diag(case.parameters.get("noise", 0.0) / weights)
    system = np.block([[a0, keys.T], [keys, -corner]])
    return refined(system, np.concatenate([np.zeros((len(a0), residuals.shape[1])), residuals]))[: len(a0)]


def moment_and_ridge(parameters: Mapping[str, Any], c0: np.ndarray) -> np.ndarray:
    return parameters.get("weight", 1.0) * c0 + parameters.get("ridge", 0.0) * np.eye(len(c0))


def l2_in_the_null_space(parameters: Mapping[str, Any], c0: np.ndarray) -> np.ndarray:
    eigenvalues = np.linalg.eigvalsh(c0)
    return np.diag(parameters.get("weight", 0.0) * np.maximum(eigenvalues[eigenvalues < 0.02], 0.0) + parameters["l2"])


CASES = {
    "memit": [Case({"weight": 15.0, "ridge": 1e-2}, regularised_least_squares, moment_and_ridge)],
    "alphaedit": [
        Case({"l2": 1.0}, projected, l2_in_the_null_space),
        Case({"threshold": 0.02, "l2": 0.5, "weight": 15.0}, projected, l2_in_the_null_space),
    ],
    "emmet": [
        Case({"noise": 0.7, "ridge": 1e-3}, saddle_point, moment_and_ridge),
        Case({"noise": 0.0, "weight": 2.0, "ridge": 1e-3}, saddle_point, moment_and_ridge),
    ],
    "rome": [Case({"noise": 0.0, "ridge": 1e-3}, saddle_point, moment_and_ridge)],
    "ridge": [Case({"rho": 2.0}, regularised_least_squares, lambda p, c0: p["rho"] * np.eye(len(c0)))],
}
"""At least one case for each of `solve.EDITORS`."""

FLAT = [(name, case) for name, cases in CASES.items() for case in cases]
every_editor = pytest.mark.parametrize(
    ("name", "case"), FLAT, ids=[f"{name}-{'-'.join(map(str, case.parameters.values()))}" for name, case in FLAT]
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A layer: C0 of rank-deficient keys, and constraints of which some nearly repeat others."""

    moment: np.ndarray
    kernel: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    weights: np.ndarray


def task(seed: int = 0, dtype: np.dtype = F64, *, repeats: bool = True) -> Task:
    rng = np.random.default_rng((7, seed))
    q, _ = np.linalg.qr(rng.normal(size=(N, N)))
    spectrum = np.where(np.arange(N) < 40, np.logspace(1, -4, N), 0.0)
    moment = (q * spectrum) @ q.T
    keys = (rng.normal(size=(M, N)) * np.sqrt(spectrum)) @ q.T + 0.3 * rng.normal(size=(M, N))
    if repeats:
        keys[M - 4 :] = keys[:4] * (1 + 1e-3 * rng.normal(size=(4, N)))
    kernel = (rng.normal(size=(N, V)) / np.sqrt(N)).astype(dtype)
    values = keys @ kernel + rng.normal(size=(M, V))
    weights = rng.uniform(0.5, 2.0, M)
    return Task((moment + moment.T) / 2, kernel, keys.astype(dtype), values.astype(dtype), weights)


def made(name: str, case: Case, moment: np.ndarray) -> solve.Editor:
    fixed = {"noise"} if name == "rome" else set()  # what the editor does not let anyone choose
    return solve.EDITORS[name](moment, **{key: value for key, value in case.parameters.items() if key not in fixed})


def prepared(name: str, case: Case, seed: int = 0, dtype: np.dtype = F64) -> tuple[Task, solve.Editor, solve.Constraints]:
    """Editors with equality constraints get keys that do not repeat, and no weights."""
    t = task(seed, dtype, repeats=not case.equality)
    editor = made(name, case, t.moment)
    return t, editor, editor.constraints(t.kernel, t.keys, t.values, None if case.equality else t.weights)


def expected(case: Case, t: Task, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
    keys, kernel, values = (np.asarray(x, np.longdouble) for x in (t.keys[rows], t.kernel, t.values[rows]))
    weights = np.ones(len(keys)) if case.equality else t.weights[rows]
    return np.asarray(case.oracle(case, t.moment, np.asarray(keys, np.float64), values - keys @ kernel, weights), np.float64)


def tau(case: Case, t: Task) -> float:
    """max(1e-10, eps64 cond(A0))."""
    return max(1e-10, float(np.finfo(np.float64).eps * np.linalg.cond(case.precision(case.parameters, t.moment))))


def blocks_of(stack: solve.Constraints) -> list[solve.Constraints]:
    return [solve.take(stack, np.arange(i, i + BLOCK)) for i in range(0, M, BLOCK)]


def one_time(editor: solve.Editor, stack: solve.Constraints, **options) -> np.ndarray:
    solution = solve.one_time(editor.prior, stack, **options)
    solve.check(solution.status)
    return np.asarray(solution.update)


def test_every_editor_is_tested():
    assert set(CASES) == set(solve.EDITORS)


@every_editor
class TestEveryEditor:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-10), (F32, 1e-5)], ids=["float64", "float32"])
    def test_steps_sum_to_the_one_time_edit(self, name, case, dtype, tolerance):
        _, editor, stack = prepared(name, case, dtype=dtype)
        state, update = solve.start(editor.prior, V, capacity=M, form="dual"), np.zeros((N, V), dtype)
        for block in blocks_of(stack):
            state, step = solve.step(state, editor.prior, block, dtype=dtype)
            solve.check(step.status)
            update = update + np.asarray(step.dense())
        assert update.dtype == dtype
        assert relative(update, one_time(editor, stack, dtype=dtype)) <= tolerance
        alone = sum(one_time(editor, block) for block in blocks_of(stack))  # as if no block knew of the others
        assert relative(alone, one_time(editor, stack)) > CONTROL

    def test_equals_its_formula_written_down_independently(self, name, case):
        for seed in range(2):
            t, editor, stack = prepared(name, case, seed)
            assert relative(one_time(editor, stack), expected(case, t)) <= tau(case, t)
        other = dataclasses.replace(t, moment=task(seed + 1).moment)
        if name != "ridge":
            assert relative(one_time(editor, stack), expected(case, other)) > CONTROL

    def test_float32_results_need_no_float64_from_the_caller(self, name, case):
        t, editor, stack = prepared(name, case, dtype=F32)
        assert stack.keys.dtype == F32
        update = one_time(editor, stack, dtype=F32)
        assert update.dtype == F32
        assert relative(update, expected(case, t)) <= 1e-5
        assert not jax.config.jax_enable_x64
        assert jnp.zeros(1).dtype == F32

    def test_retracting_a_subset_equals_a_fresh_edit_of_the_rest(self, name, case):
        t, editor, stack = prepared(name, case)
        keep = np.random.default_rng(1).random(M) < 0.6
        retracted = solve.solve_active(editor.prior, stack, keep)
        solve.check(retracted.status)
        assert relative(retracted.update, one_time(editor, solve.take(stack, keep))) <= 1e-11
        assert relative(retracted.update, expected(case, t, np.flatnonzero(keep))) <= tau(case, t)
        assert relative(retracted.update, one_time(editor, stack)) > CONTROL
        nothing = solve.solve_active(editor.prior, stack, np.zeros(M))
        assert (np.asarray(nothing.update) == 0).all()

    def test_layers_are_a_jit_of_a_vmap(self, name, case):
        layers = [prepared(name, case, seed) for seed in range(3)]
        with solve.float64():
            editor, stack = (jax.tree.map(lambda *x: jnp.stack(x), *(layer[i] for layer in layers)) for i in (1, 2))

            def edit(editor, stack):
                state = solve.start(editor.prior, V, capacity=M, form="dual")
                state, step = solve.step(state, editor.prior, stack)
                return solve.one_time(editor.prior, stack, form="dual"), step.dense(), solve.total(state, editor.prior)

            solution, dense, total = jax.jit(jax.vmap(edit))(editor, stack)
        solve.check(solution.status)
        for i, (_, alone, own) in enumerate(layers):
            for update in (solution.update, dense, total):
                assert relative(update[i], one_time(alone, own)) <= 1e-10

    def test_weights_of_facts(self, name, case):
        t = task(repeats=not case.equality)
        editor = made(name, case, t.moment)
        if case.equality:
            with pytest.raises(SolverError, match=r"editor with noise 0.*leave the weights out"):
                editor.constraints(t.kernel, t.keys, t.values, t.weights)
            return
        stack = editor.constraints(t.kernel, t.keys, t.values, t.weights)
        assert relative(stack.noise, editor.noise / t.weights) <= 1e-15
        plain = one_time(editor, editor.constraints(t.kernel, t.keys, t.values))
        assert relative(plain, one_time(editor, stack)) > CONTROL
        twice = [np.concatenate([x, x[:5]]) for x in (t.keys, t.values)]
        double = editor.constraints(t.kernel, t.keys, t.values, np.where(np.arange(M) < 5, 2.0, 1.0))
        assert relative(one_time(editor, double), one_time(editor, editor.constraints(t.kernel, *twice))) <= 1e-10

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
    def test_weights_that_are_none(self, name, case, bad):
        t = task()
        weights = np.where(np.arange(M) == 3, bad, 1.0)
        with pytest.raises(
            SolverError, match="noise 0" if case.equality else rf"weights must be finite and > 0.*{bad} at 3"
        ):
            made(name, case, t.moment).constraints(t.kernel, t.keys, t.values, weights)

    def test_an_empty_set_of_constraints(self, name, case):
        t, editor, stack = prepared(name, case)
        with pytest.raises(SolverError, match="no constraints: give at least one key"):
            editor.constraints(t.kernel, t.keys[:0], t.values[:0])
        with pytest.raises(SolverError, match="no constraints to solve for"):
            solve.one_time(editor.prior, solve.take(stack, np.arange(0)))

    def test_statistics_stand_for_the_constraints(self, name, case):
        _, editor, stack = prepared(name, case)
        if case.equality:
            with pytest.raises(SolverError, match="infinite weight and no statistics"):
                solve.statistics(editor.prior, stack)
            return
        whole = solve.solve_statistics(editor.prior, solve.statistics(editor.prior, stack))
        solve.check(whole.status)
        assert relative(whole.update, one_time(editor, stack)) <= 1e-10

    def test_bad_moments(self, name, case):
        c0 = task().moment
        if name == "ridge":  # reads the width alone
            assert made(name, case, c0 * np.nan).prior.n_keys == N
            return
        q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(N, N)))
        indefinite = (q * np.linspace(-1.0, 2.0, N)) @ q.T
        with pytest.raises(SolverError, match=r"indefinite: smallest eigenvalue -\d"):
            made(name, case, (indefinite + indefinite.T) / 2)
        with pytest.raises(SolverError, match="not symmetric"):
            made(name, case, c0 + 1e-3 * np.eye(N, k=1))
        with pytest.raises(NonFiniteError, match="1 entries"):
            made(name, case, np.where(np.eye(N) * (np.arange(N) == 2), np.nan, c0))


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("memit", {"weight": 0.0, "ridge": 1.0}, "weight must be finite and > 0, got 0"),
        ("memit", {"weight": -1.0, "ridge": 1.0}, "weight must be finite and > 0, got -1"),
        ("memit", {"weight": 1.0, "ridge": -1.0}, "ridge must be finite and >= 0, got -1"),
        ("memit", {"weight": 1.0}, "numerically singular.*use a ridge of at least"),
        ("emmet", {}, "numerically singular.*use a ridge of at least"),
        ("emmet", {"noise": -0.1, "ridge": 1.0}, "noise must be finite and >= 0"),
        ("emmet", {"noise": np.nan, "ridge": 1.0}, "noise must be finite and >= 0"),
        ("emmet", {"weight": 0.0, "ridge": 1.0}, "weight must be finite and > 0"),
        ("rome", {}, "numerically singular.*use a ridge of at least"),
        ("alphaedit", {"rank": 0}, "nothing could be edited: give a rank from 1 to 63, or use memit"),
        ("alphaedit", {"rank": N}, "nothing would be protected: give a rank from 1 to 63, or use ridge"),
        ("alphaedit", {"threshold": 100.0}, "nothing would be protected: lower the threshold to at most 10,"),
        ("alphaedit", {"threshold": 0.1, "rank": 3}, "threshold=0.1 and rank=3 choose the null space"),
        ("alphaedit", {"l2": 0.0}, "l2 must be finite and > 0"),
        ("ridge", {"rho": 0.0}, "rho must be finite and > 0"),
    ],
)
def test_bad_parameters(name, parameters, words):
    with pytest.raises(SolverError, match=words):
        solve.EDITORS[name](task().moment, **parameters)


def test_a_parameter_that_an_editor_does_not_have():
    for name in solve.EDITORS:
        with pytest.raises(TypeError):
            solve.EDITORS[name](task().moment, unheard_of=1.0)
    with pytest.raises(TypeError):
        solve.EDITORS["ridge"](task().moment)  # rho has no published value


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(), (N,), (N, N - 1), (0, 0)])
def test_moments_that_are_no_square_matrix(shape):
    for name, case in FLAT:
        with pytest.raises(SolverError, match="square matrix, got shape"):
            made(name, case, np.ones(shape))


@pytest.mark.parametrize("noise", [0.01, 0.7, 20.0])
def test_emmet_is_memit_with_inverse_weights(noise):
    """EMMET(lambda) = MEMIT with facts of weight 1 / lambda = MEMIT with lambda times its prior's weight and ridge."""
    t = task()
    emmet = editors.emmet(t.moment, noise=noise, weight=2.0, ridge=1e-3)
    memit = editors.memit(t.moment, weight=2.0, ridge=1e-3)
    scaled = editors.memit(t.moment, weight=2.0 * noise, ridge=1e-3 * noise)
    ours = one_time(emmet, emmet.constraints(t.kernel, t.keys, t.values))
    weighted = memit.constraints(t.kernel, t.keys, t.values, np.full(M, 1 / noise))
    plain = memit.constraints(t.kernel, t.keys, t.values)
    bound = max(1e-10, np.finfo(np.float64).eps * np.linalg.cond(2.0 * t.moment + 1e-3 * np.eye(N)))
    assert relative(one_time(memit, weighted), ours) <= bound
    assert relative(one_time(scaled, plain), ours) <= bound
    assert relative(one_time(memit, plain), ours) > CONTROL


def test_rome_writes_one_fact_by_its_own_formula():
    t = task()
    editor = editors.rome(t.moment, ridge=1e-3)
    k, v = t.keys[:1], t.values[:1]
    direction = np.linalg.solve(t.moment + 1e-3 * np.eye(N), k.T)
    published = direction @ (v - k @ t.kernel) / (k @ direction)
    bound = max(1e-10, np.finfo(np.float64).eps * np.linalg.cond(t.moment + 1e-3 * np.eye(N)))
    update = one_time(editor, editor.constraints(t.kernel, k, v))
    assert relative(update, published) <= bound
    assert relative(k @ (t.kernel + update), v) <= 1e-10
    assert np.linalg.matrix_rank(update) == 1


class TestMemitIsAlphaEditsFormWithoutAProjection:
    def test_restricted_to_everything(self):
        t = task()
        editor = editors.memit(t.moment, weight=15.0, ridge=1e-2)
        everything = solve.restricted(15.0 * t.moment + 1e-2 * np.eye(N), np.eye(N))
        stack = editor.constraints(t.kernel, t.keys, t.values)
        assert relative(solve.one_time(everything, stack).update, one_time(editor, stack)) <= 1e-10
        less = solve.restricted(15.0 * t.moment + 1e-2 * np.eye(N), np.eye(N)[:, : N // 2])
        assert relative(solve.one_time(less, stack).update, one_time(editor, stack)) > CONTROL

    @pytest.mark.parametrize("projection", [True, False], ids=["control", "identity"])
    def test_the_published_system_with_the_identity_for_its_projector(self, projection):
        """(P (K'K + weight C0) + L2 I)^-1 P K' R, step by step; at P = I its L2 is MEMIT's ridge."""
        t = task()
        projector = published_projector(t.moment) if projection else np.eye(N)
        update, history = np.zeros((N, V)), 15.0 * t.moment
        for i in range(0, M, BLOCK):
            keys, values = t.keys[i : i + BLOCK], t.values[i : i + BLOCK]
            system = projector @ (keys.T @ keys + history) + 1e-2 * np.eye(N)
            update = update + refined(system, projector @ keys.T @ (values - keys @ (t.kernel + update)))
            history = history + keys.T @ keys
        editor = editors.memit(t.moment, weight=15.0, ridge=1e-2)
        gap = relative(update, one_time(editor, editor.constraints(t.kernel, t.keys, t.values)))
        assert gap > CONTROL if projection else gap <= tau(CASES["memit"][0], t)

    def test_restricted_to_a_null_space_is_alphaedit(self):
        t = task()
        basis = solve.null_space(t.moment, threshold=0.02)
        stack = editors.alphaedit(t.moment).constraints(t.kernel, t.keys, t.values)
        for weight in (0.0, 15.0):
            own = editors.alphaedit(t.moment, l2=0.5, weight=weight)
            form = solve.restricted(weight * t.moment + 0.5 * np.eye(N), basis)
            assert relative(solve.one_time(form, stack).update, one_time(own, stack)) <= 1e-10


def test_priors_combined_by_the_user():
    """Two objectives on one kernel: their precisions add, and updates stay where both allow them."""
    t, other = task(0), task(1)
    memit, alphaedit = solve.memit(other.moment, 15.0, 1e-2), solve.alphaedit(t.moment, l2=0.5)
    both = solve.Editor(solve.combine(memit, alphaedit, solve.ridge(N, 0.25)))
    stack = both.constraints(t.kernel, t.keys, t.values, t.weights)
    basis = solve.null_space(t.moment)
    a0 = basis.T @ (15.0 * other.moment + (1e-2 + 0.5 + 0.25) * np.eye(N)) @ basis
    keys = t.keys @ basis
    x = refined(a0 + (keys.T * t.weights) @ keys, (keys.T * t.weights) @ stack.residuals)
    bound = max(1e-10, np.finfo(np.float64).eps * np.linalg.cond(a0))
    assert relative(one_time(both, stack), basis @ x) <= bound
    assert relative(solve.one_time(alphaedit, stack).update, basis @ x) > CONTROL


def test_editors_are_immutable():
    editor = editors.ridge(np.eye(3), rho=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        editor.noise = 2.0
    with pytest.raises(TypeError):
        solve.EDITORS["mine"] = editors.ridge


def test_errors_are_the_librarys_own():
    with pytest.raises(KeditError):
        editors.memit(task().moment)


def test_a_process_without_float64_gets_float32():
    code = (
        "import jax, numpy as np; from kedit_jax import solve;"
        "e = solve.EDITORS['memit'](np.eye(4), weight=1.0, ridge=1.0);"
        "s = e.constraints(np.zeros((4, 2), np.float32), np.eye(4, dtype=np.float32), np.ones((4, 2), np.float32));"
        "d = solve.one_time(e.prior, s, dtype='float32').update;"
        "assert not jax.config.jax_enable_x64 and d.dtype == 'float32' and np.allclose(d, 1 / 3), d"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
