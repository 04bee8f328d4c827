"""`kedit verify`, and the proof that its checks see what they are for: mutations of the library fail the matching ones."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kedit_jax import cli
from kedit_jax.checkpoint import save_session
from kedit_jax.editing.algebra import compact
from kedit_jax.editing.moments import Moments, compute_moments
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, start_session
from kedit_jax.models import Decoder, save_model
from kedit_jax.solve import dual, interface, primal, sequences
from kedit_jax.solve.arrays import compiled
from kedit_jax.verification import solver
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
    monkeypatch.setattr(
        solver, "generated", lambda: [problem("alphaedit", m=solver.SIZE, dtype=dtype) for dtype in (F64, F32)]
    )


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
        prior_alone = np.eye(len(state.inverse), dtype=state.inverse.dtype)
        return original(dataclasses.replace(state, inverse=prior_alone), *block)

    patch.setattr(primal, "append", append)


def no_history_under_a_regulariser(patch: pytest.MonkeyPatch) -> None:
    """A_t and B_t of the new block alone."""
    patch.setattr(regularized, "add", lambda known, new: new)


def no_gradient(patch: pytest.MonkeyPatch) -> None:
    """The term <grad L_t(D_<t), D> of a regularised step is gone."""
    original = regularized._smooth

    def smooth(prior: Any, stats: Any, at: Any) -> Any:
        whole = original(prior, stats, at)
        return dataclasses.replace(whole, linear=whole.curvature[:, None] * (whole.axes.T @ at))  # 2 A at, and no more

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


SEQUENCES = {"1", "2", "3", "4", "5", "10", "12", "13a", "15a", "15c", "15d"}
MUTATIONS: dict[Mutation, set[str]] = {
    # 6, 7 and 11 factor anew what they are given, and 13b holds of any update that the prior allows.
    no_history_in_the_dual: SEQUENCES | {"8", "9"},
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


@pytest.fixture
def stored(tmp_path: Path, model: Decoder, moments: Moments, tokenizer: Any, texts: list[str]) -> Callable[..., Path]:
    """Stores a session of the tests' model, the model and its moments; returns the session's folder."""
    save_model(model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    again = compute_moments(model, tokenizer, texts, (0, 2), batch_tokens=512, cache=tmp_path / "moments")
    assert again.fingerprint((0, 2)) == moments.fingerprint((0, 2))
    return lambda session: save_session(session, tmp_path / "session")


class TestSession:
    arguments = ("verify", "model", "--session", "session", "--moments", "moments", "--json", "checks.json")

    def test_a_stored_session_holds(
        self, kedit: Kedit, stored: Callable[..., Path], history: list[EditSession], tmp_path: Path
    ) -> None:
        stored(history[-1])
        out = kedit(*self.arguments)
        assert "all 2 checks hold" in out
        assert "keys since they were recorded" in out
        content = json.loads((tmp_path / "checks.json").read_text())
        assert [check["id"] for check in content["checks"]] == ["layer 0", "layer 2"]
        assert all(check["holds"] and check["error"] <= 1e-10 < 1e-2 < check["control"] for check in content["checks"])
        drift = {row["layer"]: row for row in content["drift"]}
        assert set(drift) == {0, 2}
        assert drift[0]["largest"] < 1e-6 < drift[2]["largest"], "nothing below the first edited layer moves its keys"
        assert drift[2]["facts"] == len(history[-1].facts)

    def test_an_update_that_is_not_the_constraints_fails(
        self, kedit: Kedit, stored: Callable[..., Path], history: list[EditSession], tmp_path: Path
    ) -> None:
        held = history[-1].layers[2]
        other = dataclasses.replace(held.sequence, update=held.update * (1 + 1e-8))
        layers = {**history[-1].layers, 2: dataclasses.replace(held, sequence=other)}
        stored(dataclasses.replace(history[-1], layers=layers))
        assert "1 of 2 checks fail: layer 2" in kedit(*self.arguments, status=1)
        checks = json.loads((tmp_path / "checks.json").read_text())["checks"]
        assert [check["holds"] for check in checks] == [True, False]

    def test_compacted_facts_have_neither_control_nor_drift(
        self, kedit: Kedit, stored: Callable[..., Path], history: list[EditSession], tmp_path: Path
    ) -> None:
        stored(compact(history[-1]))
        assert "compacted" in kedit(*self.arguments)
        content = json.loads((tmp_path / "checks.json").read_text())
        assert [check["control"] for check in content["checks"]] == [None, None]
        assert content["drift"] == []

    def test_a_baseline_is_called_one(
        self,
        kedit: Kedit,
        stored: Callable[..., Path],
        fresh: EditSession,
        batches: list[list[EditRequest]],
        moments: Moments,
    ) -> None:
        settings = dataclasses.replace(fresh.settings, history="unaligned")
        session = start_session(fresh.base, fresh.tokenizer, moments, settings)
        for batch in (batches[0], batches[2]):
            session, _ = session.edit(batch)
        stored(session)
        out = " ".join(kedit(*self.arguments, status=1).split())
        assert "history 'unaligned': a baseline" in out
        assert "2 of 2 checks fail" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["model"], "kedit verify MODEL --session DIR"),
        (["--session", "session"], "kedit verify MODEL --session DIR"),
        (["model", "--session", "nowhere"], "nowhere"),
        (["--json", "no/such/folder.json"], "cannot write"),
    ],
)
def test_what_cannot_be_verified_is_one_message(args: list[str], message: str, kedit: Kedit) -> None:
    out = kedit("verify", *args, status=1)
    assert message in " ".join(out.split())
    assert "Traceback" not in out
