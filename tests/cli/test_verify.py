"""`kedit verify`, and the proof that its checks see what they are for: each mutation of the library fails the matching ones."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kedit_jax import cli
from kedit_jax.checkpoint import save_session
from kedit_jax.cli import verify as command
from kedit_jax.editing.moments import Moments, compute_moments
from kedit_jax.editing.session import EditSession
from kedit_jax.models import Decoder, save_model
from kedit_jax.solve import dual, interface, primal, sequences
from kedit_jax.solve.arrays import compiled
from kedit_jax.verification import Check, solver
from kedit_jax.verification.problems import F32, F64, problem

regularized = importlib.import_module("kedit_jax.solve.regularized")  # the package's attribute is the function

Kedit = Callable[..., str]
Mutation = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture
def kedit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kedit:
    """Runs the command line in an empty folder, 80 columns wide; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["kedit", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code in ((0, None) if status == 0 else (status,)), printed.out + printed.err
        return printed.out + printed.err

    return run


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One problem in each dtype, of the family that every invariant concerns."""
    monkeypatch.setattr(solver, "generated", lambda: [problem("alphaedit", dtype=dtype) for dtype in (F64, F32)])


@pytest.mark.usefixtures("few")
def test_everything_holds(kedit: Kedit, tmp_path: Path) -> None:
    out = kedit("verify", "--json", "checks.json")
    assert "all 32 checks hold" in out
    assert max(map(len, out.splitlines())) <= 80
    content = json.loads((tmp_path / "checks.json").read_text())
    assert list(content) == ["checks"]
    for check in content["checks"]:
        assert list(check) == ["id", "name", "dtype", "error", "tolerance", "control", "holds"]
        assert check["holds"] is True
        assert check["error"] <= check["tolerance"]
        assert check["control"] > 1e-2
        assert any(line.split()[0] == check["id"] and check["dtype"] in line for line in out.splitlines() if line.strip())
    assert jax.config.jax_enable_x64 is False


def no_history_in_the_dual(patch: pytest.MonkeyPatch) -> None:
    """The cross term between old and new constraints is gone."""
    original = dual.append

    def append(state: dual.DualState, *block: Any) -> Any:
        blank = dataclasses.replace(state, whitened=jnp.zeros_like(state.whitened))
        new, step = original(blank, *block)
        return dataclasses.replace(new, whitened=new.whitened + state.whitened), step

    patch.setattr(dual, "append", append)


def no_history_in_the_primal(patch: pytest.MonkeyPatch) -> None:
    """Every step starts from the prior alone."""
    original = primal.append

    def append(state: primal.PrimalState, *block: Any) -> Any:
        blank = dataclasses.replace(state, inverse=jnp.eye(len(state.inverse), dtype=state.inverse.dtype))
        return original(blank, *block)

    patch.setattr(primal, "append", append)


def no_history_under_a_regulariser(patch: pytest.MonkeyPatch) -> None:
    """A_t and B_t of the new block alone."""
    patch.setattr(regularized, "add", lambda known, new: new)


def no_gradient(patch: pytest.MonkeyPatch) -> None:
    """The term <grad L_t(D_<t), D> of a regularised step is gone."""
    original = regularized._smooth

    def smooth(prior: Any, stats: Any, at: Any) -> Any:
        whole, still = original(prior, stats, at), dataclasses.replace(stats, right=jnp.zeros_like(stats.right))
        return dataclasses.replace(whole, linear=original(prior, still, at).linear + whole.axes.T @ _slope(prior, stats, at))

    def _slope(prior: Any, stats: Any, at: Any) -> Any:
        """2 A at, what is left of the linear term of the sum when the gradient is 0."""
        hessian = 2 * regularized._coloured(
            prior, regularized._coloured(prior, stats.gram + jnp.eye(len(stats.gram), dtype=stats.gram.dtype)).T
        )
        inside = at if prior.basis is None else prior.basis.T @ at
        pull = hessian @ inside
        return pull if prior.basis is None else prior.basis @ pull

    step = regularized._next.__wrapped__
    patch.setattr(regularized, "_smooth", smooth)
    # Another function, so that no earlier trace of the step is found.
    patch.setattr(regularized, "_next", compiled(lambda *args, **how: step(*args, **how), static=("regularizer", "dtype")))


def no_compensation(patch: pytest.MonkeyPatch) -> None:
    """Post-processing errors of earlier steps stay where they are."""
    original = sequences._propose
    patch.setattr(sequences, "_propose", lambda *args, **how: original(*args, **how | {"compensate": False}))


def no_removal(patch: pytest.MonkeyPatch) -> None:
    """Retraction keeps the rows."""
    original = dual.retain
    patch.setattr(dual, "retain", lambda state, keep: original(state, jnp.ones_like(keep)))
    patch.setattr(interface, "masked", lambda stack, keep: stack)


SEQUENCES = {"1", "2", "3", "4", "5", "10", "13a"}
MUTATIONS: dict[Mutation, set[str]] = {
    # 6 and 7 factor anew what they are given, 11 and 13b hold of any update that a prior allows.
    no_history_in_the_dual: SEQUENCES | {"8", "9", "12", "15a", "15c", "15d"},
    no_history_in_the_primal: SEQUENCES | {"9"},
    no_history_under_a_regulariser: {"14", "15b"},
    no_gradient: {"14", "15b"},
    no_compensation: {"12", "15c", "15d"},
    no_removal: {"6", "7", "8", "9", "13a"},
}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_seen(mutation: Mutation, kedit: Kedit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exactly the checks that protect what was taken away fail, in every dtype, and the exit status says so."""
    mutation(monkeypatch)
    out = kedit("verify", "--json", "checks.json", status=1)
    checks = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert len(checks) == 32
    assert {check["id"] for check in checks if not check["holds"]} == MUTATIONS[mutation]
    assert {check["id"] for check in checks if check["holds"]}.isdisjoint(MUTATIONS[mutation]), "in both dtypes"
    assert "FAILS" in out
    assert "of 32 checks fail" in out
