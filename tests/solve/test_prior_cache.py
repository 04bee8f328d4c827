"""Priors on disk: factored once, never confused, never wrong."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import scipy.linalg

from kedit_jax import solve
from kedit_jax.errors import KeditError, SolverError
from kedit_jax.solve.cache import cached_editor

EDITORS: dict[str, dict[str, Any]] = {
    "memit": {"weight": 20.0, "ridge": 0.1},
    "alphaedit": {"threshold": 0.5, "l2": 2.0},
    "emmet": {"weight": 2.0, "ridge": 0.1, "noise": 0.5},
    "ridge": {"rho": 2.0},
}


@pytest.fixture
def moment() -> np.ndarray:
    keys = np.random.default_rng(0).normal(size=(200, 24)) * np.logspace(0, -2, 24)
    return keys.T @ keys / 200


def no_factorisation(patch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("a moment was factored")

    for module, name in ((scipy.linalg.lapack, "dpotrf"), (scipy.linalg, "eigh"), (scipy.linalg, "eigvalsh")):
        patch.setattr(module, name, refused)


def same(a: solve.Editor, b: solve.Editor) -> bool:
    ours, theirs = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(ours) == len(theirs) and all(np.array_equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", EDITORS)
def test_the_second_time_nothing_is_factored(
    name: str, moment: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cached_editor(tmp_path / "priors", name, moment, **EDITORS[name])
    assert same(first, solve.EDITORS[name](moment, **EDITORS[name]))
    no_factorisation(monkeypatch)
    second = cached_editor(tmp_path / "priors", name, moment.copy(), **EDITORS[name])
    assert same(first, second)
    assert second.prior.dtype == np.float64
    assert [path.name[:6] for path in (tmp_path / "priors").iterdir()] == ["prior-"], "one file, no remains"


def test_negative_control_another_one_is_factored(
    moment: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_editor(tmp_path, "memit", moment, weight=20.0, ridge=0.1)
    no_factorisation(monkeypatch)
    for other, changes in (
        (moment, {"weight": 21.0, "ridge": 0.1}),
        (moment, {"weight": 20.0, "ridge": np.nextafter(0.1, 1)}),
        (moment * (1 + 2e-16), {"weight": 20.0, "ridge": 0.1}),
    ):
        with pytest.raises(AssertionError, match="a moment was factored"):
            cached_editor(tmp_path, "memit", other, **changes)
    with pytest.raises(AssertionError, match="a moment was factored"):
        cached_editor(tmp_path, "emmet", moment, weight=20.0, ridge=0.1)


def test_rules_of_a_null_space_are_not_confused(moment: np.ndarray, tmp_path: Path) -> None:
    ranks = {
        rule: cached_editor(tmp_path, "alphaedit", moment, **{rule: number}).prior.rank
        for rule, number in (("threshold", 0.5), ("relative", 0.5), ("rank", 5))
    }
    assert ranks == {
        rule: solve.EDITORS["alphaedit"](moment, **{rule: number}).prior.rank
        for rule, number in (("threshold", 0.5), ("relative", 0.5), ("rank", 5))
    }
    assert len(list(tmp_path.iterdir())) == 3
    cached_editor(tmp_path, "alphaedit", moment, threshold=0.5, relative=None, rank=None)
    assert len(list(tmp_path.iterdir())) == 3, "None is not given"


@pytest.mark.parametrize("damage", ["flipped bit", "another's", "cut", "empty"])
def test_a_damaged_file_is_made_anew(damage: str, moment: np.ndarray, tmp_path: Path) -> None:
    right = cached_editor(tmp_path, "emmet", moment, **EDITORS["emmet"])
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    cached_editor(tmp_path / "other", "emmet", moment, weight=3.0)
    (other,) = (tmp_path / "other").iterdir()
    bad = {
        "flipped bit": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
        "another's": other.read_bytes(),
        "cut": good[:-8],
        "empty": b"",
    }[damage]
    assert bad != good
    path.write_bytes(bad)
    with pytest.warns(UserWarning, match=f"{path.name}' is damaged .* made anew"):
        assert same(cached_editor(tmp_path, "emmet", moment, **EDITORS["emmet"]), right)
    assert path.read_bytes() == good


def test_what_cannot_be_stored_or_made(moment: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(SolverError, match="unknown editor 'memitt'"):
        cached_editor(tmp_path, "memitt", moment)
    with pytest.raises(SolverError, match="weight must be finite"):
        cached_editor(tmp_path, "memit", moment, weight=-1.0)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(KeditError, match="cannot store priors in"):
        cached_editor(tmp_path / "file", "memit", moment, ridge=1.0)
