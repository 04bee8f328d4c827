"""Priors: what they mean, and what they refuse."""

import re

import jax
import numpy as np
import pytest
from solve_problems import EDITORS, F64, problem, relative

from kedit_jax import solve
from kedit_jax.errors import NonFiniteError, SolverError


def moment(eigenvalues: np.ndarray, seed: int = 0) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    c0 = (q * eigenvalues) @ q.T
    return (c0 + c0.T) / 2


@pytest.mark.parametrize("family", EDITORS)
def test_whitened_products_are_the_priors_covariance(family):
    p = problem(family)
    basis = np.eye(len(p.kernel)) if p.basis is None else p.basis
    h = basis @ np.linalg.inv(p.precision) @ basis.T
    u = np.asarray(solve.whiten(p.prior, p.keys))
    assert u.shape == (160, p.prior.rank)
    assert p.prior.n_keys == len(p.kernel)
    assert p.prior.dtype == F64
    assert relative(u @ u.T, p.keys @ h @ p.keys.T) <= p.tau
    assert relative(solve.unwhiten(p.prior, u.T), h @ p.keys.T) <= p.tau


def test_alphaedit_covariance_is_the_projector_over_l2():
    c0 = moment(np.logspace(1, -5, 40))
    prior = solve.alphaedit(c0, threshold=0.02, l2=10.0)
    eigenvalues, vectors = np.linalg.eigh(c0)
    null = vectors[:, eigenvalues < 0.02]
    assert prior.rank == null.shape[1]
    h = np.asarray(solve.unwhiten(prior, np.asarray(solve.whiten(prior, np.eye(40))).T))
    assert relative(h, null @ null.T / 10.0) <= 1e-12


class TestNullSpace:
    c0 = moment(np.logspace(1, -5, 40))

    def test_rules_choose_the_smallest_eigenvalues(self):
        eigenvalues, vectors = np.linalg.eigh(self.c0)
        for rule, rank in (
            ({}, (eigenvalues < 0.02).sum()),
            ({"threshold": 0.5}, (eigenvalues < 0.5).sum()),
            ({"relative": 0.5}, (eigenvalues < 0.5 * eigenvalues[-1]).sum()),
            ({"rank": 7}, 7),
            ({"rank": 39}, 39),
        ):
            basis = solve.null_space(self.c0, **rule)
            assert basis.dtype == F64
            assert basis.shape == (40, rank)
            assert np.abs(basis.T @ basis - np.eye(rank)).max() <= 1e-13
            assert relative(basis @ basis.T, vectors[:, :rank] @ vectors[:, :rank].T) <= 1e-9
            assert relative(solve.alphaedit(self.c0, **rule).basis, basis) == 0
        assert solve.null_space(self.c0, threshold=0.5).shape != solve.null_space(self.c0, relative=0.5).shape

    def test_relative_does_not_depend_on_the_scale(self):
        ranks = {solve.null_space(scale * self.c0, relative=1e-3).shape[1] for scale in (1e-6, 1.0, 1e6)}
        assert len(ranks) == 1
        assert solve.null_space(1e3 * self.c0, threshold=0.02).shape[1] < solve.null_space(self.c0).shape[1]

    def test_one_rule_at_most(self):
        for rules in ({"threshold": 0.1, "relative": 0.1}, {"relative": 0.1, "rank": 3}, {"threshold": 0.1, "rank": 3}):
            with pytest.raises(SolverError, match=r" and .* choose the null space in different ways: give one"):
                solve.null_space(self.c0, **rules)
        with pytest.raises(SolverError, match=r"threshold=0\.1 and relative=0\.2 and rank=3"):
            solve.alphaedit(self.c0, threshold=0.1, relative=0.2, rank=3)

    @pytest.mark.parametrize("rule", ["threshold", "relative"])
    @pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
    def test_bounds_out_of_range(self, rule, bad):
        with pytest.raises(SolverError, match=f"{rule} must be finite and > 0, got {bad}"):
            solve.null_space(self.c0, **{rule: bad})

    @pytest.mark.parametrize(
        ("rule", "words", "mend"),
        [
            (
                {"threshold": 0.1},
                r"below threshold 0.1 \(smallest 0.5\).*edited: raise the threshold above 0.5,",
                {"threshold": 0.51},
            ),
            (
                {"threshold": 2.1},
                r"below threshold 2.1 \(largest 2\).*lower the threshold to at most 2,",
                {"threshold": 1.99},
            ),
            (
                {"relative": 0.1},
                r"below relative 0.1 of the largest \(2\) \(smallest 0.5\).*edited: raise the relative above 0.25,",
                {"relative": 0.26},
            ),
            (
                {"relative": 1.1},
                r"below relative 1.1 of the largest \(2\).*lower the relative to at most 1,",
                {"relative": 0.99},
            ),
            (
                {"rank": 0},
                r"rank 0 of 10 \(eigenvalues 0.5 to 2\), so nothing could be edited: give a rank from 1 to 9",
                {"rank": 1},
            ),
            ({"rank": -1}, r"rank -1 of 10.*nothing could be edited", {"rank": 1}),
            ({"rank": 10}, r"rank 10 of 10.*nothing would be protected: give a rank from 1 to 9", {"rank": 9}),
        ],
    )
    def test_rank_0_or_full_names_the_eigenvalues_and_a_mend_that_works(self, rule, words, mend):
        c0 = moment(np.linspace(0.5, 2, 10))
        for make in (solve.null_space, solve.alphaedit):
            with pytest.raises(SolverError, match=words):
                make(c0, **rule)
            make(c0, **mend)

    def test_a_moment_of_zeros(self):
        for rule, words in (({}, "protected"), ({"relative": 0.5}, "edited"), ({"rank": 8}, "protected")):
            with pytest.raises(SolverError, match=words):
                solve.null_space(np.zeros((8, 8)), **rule)

    @pytest.mark.parametrize("rule", [{}, {"relative": 0.5}, {"rank": 3}])
    def test_what_is_no_second_moment(self, rule):
        indefinite = moment(np.linspace(-0.5, 3, 20))
        with pytest.raises(SolverError, match=r"moment is indefinite: smallest eigenvalue -0.5"):
            solve.null_space(indefinite, **rule)
        with pytest.raises(SolverError, match="not symmetric"):
            solve.null_space(indefinite + np.eye(20, k=1), **rule)
        with pytest.raises(NonFiniteError, match="400 entries"):
            solve.null_space(np.full((20, 20), np.nan), **rule)


def covariance(prior: solve.Prior) -> np.ndarray:
    """H [n, n], through the library's whitening."""
    whitened = np.asarray(solve.whiten(prior, np.eye(prior.n_keys)))
    return whitened @ whitened.T


def subspace(n: int, rank: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, rank)))[0]


class TestRestricted:
    a0 = moment(np.logspace(2, -2, 20))

    def test_covariance(self):
        basis = subspace(20, 8, 1)
        prior = solve.restricted(self.a0, basis)
        assert (prior.rank, prior.n_keys, prior.dtype) == (8, 20, F64)
        reduced = basis.T @ self.a0 @ basis
        assert relative(covariance(prior), basis @ np.linalg.inv(reduced) @ basis.T) <= 1e-12
        assert relative(solve.precision(prior), reduced) <= 1e-13

    def test_everything_is_the_precision_itself(self):
        for basis in (np.eye(20), subspace(20, 20, 2)):
            assert relative(covariance(solve.restricted(self.a0, basis)), np.linalg.inv(self.a0)) <= 1e-10

    def test_a_precision_may_be_singular_outside(self):
        eigenvalues = np.where(np.arange(20) < 8, 1.0, 0.0)
        singular = moment(eigenvalues, seed=3)
        inside = np.linalg.eigh(singular)[1][:, 12:]
        assert relative(covariance(solve.restricted(singular, inside)), singular) <= 1e-12
        with pytest.raises(SolverError, match="numerically singular"):
            solve.restricted(singular, np.eye(20))
        with pytest.raises(SolverError, match=r"indefinite: smallest eigenvalue -1,"):
            solve.restricted(-singular, inside)

    @pytest.mark.usefixtures("unchecked")
    def test_bases_that_are_none(self):
        basis = subspace(20, 8, 1)
        for bad, words in (
            (1.01 * basis, r"not orthonormal: largest \|N'N - I\| is 0.0201.*numpy.linalg.qr"),
            (np.concatenate([basis, basis], 1), "not orthonormal"),
            (basis[:19], "not orthonormal"),
            (subspace(19, 8, 1), r"basis has shape \(19, 8\), the precision \(20, 20\)"),
            (basis[:, :0], "at least one column"),
            (basis[:, 0], "at least one column"),
        ):
            with pytest.raises(SolverError, match=words):
                solve.restricted(self.a0, bad)
        with pytest.raises(NonFiniteError, match="basis has 160 entries"):
            solve.restricted(self.a0, basis * np.nan)
        with pytest.raises(SolverError, match="precision is not symmetric"):
            solve.restricted(self.a0 + np.eye(20, k=1), basis)
        rounded = subspace(20, 8, 1).astype(np.float32)  # a basis kept in float32 is off by 1e-7
        with pytest.raises(SolverError, match="not orthonormal"):
            solve.restricted(self.a0, rounded)
        solve.restricted(self.a0, np.linalg.qr(rounded.astype(np.float64))[0])


class TestCombine:
    a0, b0 = moment(np.logspace(1, -2, 20), 1), moment(np.logspace(0, -3, 20), 2)

    def test_precisions_add(self):
        together = solve.combine(solve.from_precision(self.a0), solve.from_precision(self.b0), solve.ridge(20, 0.3))
        assert together.basis is None
        assert relative(covariance(together), np.linalg.inv(self.a0 + self.b0 + 0.3 * np.eye(20))) <= 1e-11
        assert relative(solve.precision(together), self.a0 + self.b0 + 0.3 * np.eye(20)) <= 1e-13

    def test_one_of_them_is_itself(self):
        for prior in (solve.from_precision(self.a0), solve.alphaedit(self.a0, threshold=0.5), solve.ridge(20, 2.0)):
            assert relative(covariance(solve.combine(prior)), covariance(prior)) <= 1e-12
            assert relative(covariance(solve.combine(prior, prior)), covariance(prior) / 2) <= 1e-12

    def test_order_does_not_matter(self):
        priors = [solve.restricted(self.a0, subspace(20, 15, 1)), solve.memit(self.b0, 2.0), solve.ridge(20, 0.1)]
        assert relative(covariance(solve.combine(*priors)), covariance(solve.combine(*priors[::-1]))) <= 1e-12

    @pytest.mark.parametrize("ranks", [(15, 12), (15, 20), (18, 17, 16), (6, 19)])
    def test_on_the_intersection_of_subspaces(self, ranks):
        """Random subspaces share rank sum - n (number - 1); by the null space of what each forbids, an independent way."""
        bases = [subspace(20, rank, i) for i, rank in enumerate(ranks)]
        precisions = [moment(np.logspace(0.5, -1, 20), i) for i in range(len(ranks))]
        together = solve.combine(*(solve.restricted(a, n) for a, n in zip(precisions, bases, strict=True)))
        forbidden = np.sum([np.eye(20) - n @ n.T for n in bases], axis=0)
        shared = np.linalg.eigh(forbidden)[1][:, : sum(ranks) - 20 * (len(ranks) - 1)]
        expected = shared @ np.linalg.inv(shared.T @ np.sum(precisions, axis=0) @ shared) @ shared.T
        assert together.rank == shared.shape[1]
        assert relative(covariance(together), expected) <= 1e-9
        alone = solve.restricted(np.sum(precisions, axis=0), bases[0])
        if ranks != (15, 20):
            assert relative(covariance(alone), expected) > 1e-2

    def test_diagonal_factors_and_float32_are_taken_as_they_are(self):
        alphaedit = solve.alphaedit(self.a0, threshold=0.5, l2=2.0, weight=3.0)
        together = solve.combine(alphaedit, solve.ridge(20, 1.0))
        assert relative(together.basis, alphaedit.basis) == 0
        expected = solve.alphaedit(self.a0, threshold=0.5, l2=3.0, weight=3.0)
        assert relative(covariance(together), covariance(expected)) <= 1e-12
        rounded = solve.combine(solve.cast(solve.from_precision(self.a0), np.float32))
        assert rounded.dtype == F64
        assert 0 < relative(solve.precision(rounded), self.a0) <= 1e-6

    def test_nothing_in_common(self):
        basis = subspace(20, 20, 0)
        first, second = (solve.restricted(self.a0, basis[:, part]) for part in (slice(0, 8), slice(8, 20)))
        with pytest.raises(SolverError, match=r"subspaces \(ranks 8, 12 of 20\) have only 0 in common.*wider null spaces"):
            solve.combine(first, second)
        nearly = solve.restricted(self.a0, np.linalg.qr(basis[:, :8] + 1e-6 * basis[:, 8:16])[0])
        with pytest.raises(SolverError, match=r"smallest sine of an angle between them 1e-06"):
            solve.combine(first, nearly)

    @pytest.mark.usefixtures("unchecked")
    def test_misuse(self):
        with pytest.raises(SolverError, match="no priors to combine"):
            solve.combine()
        with pytest.raises(SolverError, match="widths 20, 19 belong to different layers"):
            solve.combine(solve.ridge(20, 1.0), solve.ridge(19, 1.0))


@pytest.mark.parametrize("family", EDITORS)
def test_precision_is_what_the_prior_was_made_of(family):
    p = problem(family)
    assert relative(solve.precision(p.prior), p.precision) <= 1e-12
    assert solve.precision(p.prior).dtype == F64


def test_ridge_and_precision_are_memit_with_the_same_precision():
    c0 = moment(np.linspace(1, 3, 12))
    given = solve.from_precision(5.0 * c0 + 0.3 * np.eye(12))
    assert solve.prior_fingerprint(given) == solve.prior_fingerprint(solve.memit(c0, 5.0, 0.3))
    keys = np.random.default_rng(0).normal(size=(4, 12))
    flat = solve.from_precision(0.3 * np.eye(12))
    assert relative(solve.whiten(solve.ridge(12, 0.3), keys), solve.whiten(flat, keys)) <= 1e-14


class TestRefused:
    def test_singular_moment_names_the_eigenvalue_and_a_ridge_that_works(self):
        c0 = moment(np.where(np.arange(30) < 15, np.logspace(2, -2, 30), 0.0))
        with pytest.raises(
            SolverError, match=r"singular: smallest eigenvalue .*, largest 1.5e\+06.*ridge of at least"
        ) as error:
            solve.memit(c0, 15000.0)
        ridge = float(re.search(r"ridge of at least (\S+),", str(error.value))[1])
        assert ridge == pytest.approx(0.1 * np.finfo(float).eps * 1.5e6 / 1e-5, rel=0.2)
        solve.memit(c0, 15000.0, ridge)
        with pytest.raises(SolverError):
            solve.memit(c0, 15000.0, ridge / 10)

    def test_indefinite_matrix_names_the_eigenvalue_and_a_ridge_that_works(self):
        c0 = moment(np.linspace(-0.5, 3, 20))
        with pytest.raises(SolverError, match=r"indefinite: smallest eigenvalue -0.5") as error:
            solve.from_precision(c0)
        ridge = float(re.search(r"ridge of at least (\S+),", str(error.value))[1])
        assert 0.5 < ridge < 0.6
        solve.memit(c0, 1.0, ridge)
        with pytest.raises(SolverError, match=r"moment is indefinite: smallest eigenvalue -0.5"):
            solve.alphaedit(c0)

    def test_ill_conditioned_is_not_singular(self):
        for condition in (1e8, 1e11):  # the second is decided by its eigenvalues, the estimate leaves doubt
            solve.memit(moment(np.logspace(0, -np.log10(condition), 30)), 1.0)
        with pytest.raises(SolverError):
            solve.memit(moment(np.logspace(0, -11, 30)), 1.0, tolerance=1e-10)

    @pytest.mark.parametrize("make", [lambda c: solve.memit(c, 1.0), solve.alphaedit, solve.from_precision])
    @pytest.mark.usefixtures("unchecked")
    def test_what_is_no_second_moment(self, make):
        c0 = moment(np.linspace(1e-3, 3, 8))
        skew = c0.copy()
        skew[0, 1] += 1e-4
        with pytest.raises(SolverError, match=r"not symmetric: largest \|C - C'\| is 0.0001"):
            make(skew)
        make(c0 * (1 + 1e-9 * np.random.default_rng(0).random((8, 8))))  # rounding is no asymmetry
        for shape in ((8, 7), (8,), (0, 0)):
            with pytest.raises(SolverError, match=r"square matrix, got shape"):
                make(np.ones(shape))
        for bad in (np.nan, np.inf):
            broken = c0.copy()
            broken[2, 2] = bad
            with pytest.raises(NonFiniteError, match="1 entries"):
                make(broken)

    @pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
    def test_parameters_out_of_range(self, bad):
        c0 = moment(np.logspace(0, -4, 8))
        for call in (
            lambda: solve.memit(c0, bad),
            lambda: solve.memit(c0, 0.0),
            lambda: solve.memit(c0, 1.0, bad),
            lambda: solve.ridge(8, bad),
            lambda: solve.ridge(8, 0.0),
            lambda: solve.ridge(0, 1.0),
            lambda: solve.alphaedit(c0, l2=bad),
            lambda: solve.alphaedit(c0, l2=0.0),
            lambda: solve.alphaedit(c0, threshold=bad),
            lambda: solve.alphaedit(c0, weight=bad),
        ):
            with pytest.raises(SolverError, match=r"must be (finite and|at least)"):
                call()

    def test_null_space_empty_or_everything(self):
        c0 = moment(np.linspace(0.5, 2, 10))
        with pytest.raises(SolverError, match=r"nothing could be edited: raise the threshold above 0.5"):
            solve.alphaedit(c0, threshold=0.02)
        with pytest.raises(SolverError, match=r"nothing would be protected: lower the threshold to at most 2"):
            solve.alphaedit(c0, threshold=3.0)
        assert solve.alphaedit(c0, threshold=1.1).rank == 4


def test_fingerprint_sees_every_array():
    c0 = moment(np.logspace(0, -4, 10))
    priors = [
        solve.memit(c0, 1.0),
        solve.memit(c0, 1.0, 1e-3),
        solve.alphaedit(c0),
        solve.alphaedit(c0, l2=1.0),
        solve.ridge(10, 1.0),
        solve.ridge(11, 1.0),
        solve.cast(solve.ridge(10, 1.0), np.float32),
    ]
    prints = [solve.prior_fingerprint(prior) for prior in priors]
    assert len(set(prints)) == len(priors)
    assert all(re.fullmatch("[0-9a-f]{64}", text) for text in prints)
    assert solve.prior_fingerprint(jax.tree.map(np.asarray, priors[2])) == prints[2]
    assert solve.prior_fingerprint(solve.memit(c0, 1.0)) == prints[0]


def test_fields_are_frozen():
    with pytest.raises(AttributeError):
        solve.ridge(3, 1.0).factor = np.ones(3)
