"""Meshes of devices and processes in small: what `python -m experiments.scale.distributed` runs in full."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.scale import distributed
from experiments.scale.distributed import DIED, QUICK, Layout, compared, results


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, Any]:
    """Two processes of four devices; one of them is killed in the second step, and both are started once more."""
    (one,) = results(QUICK, home)
    return one


def test_two_processes_give_what_one_device_gives(found: dict[str, Any]) -> None:
    assert found["statuses"] == [0, 0], found.get("logs")
    assert found["kernel"] <= 1e-5
    assert found["solver"] <= 1e-10
    assert found["good"]


def test_a_killed_process_ends_the_others_in_time(found: dict[str, Any]) -> None:
    assert found["killed"]["statuses"][1] == DIED
    assert found["killed"]["statuses"][0] not in ("hangs", 0)
    assert found["killed"]["noticed_after"] <= distributed.NOTICED


def test_the_story_was_told_to_its_end(found: dict[str, Any], home: Path) -> None:
    """Negative control of the comparison: both sides could agree on nothing."""
    with np.load(home / "layout-0" / "numbers.npz") as numbers:
        assert numbers["keys.1"].shape == (2 * distributed.FACTS - 1, 2048)
        assert all(np.linalg.norm(numbers[f"update.{layer}"]) > 0 for layer in distributed.LAYERS)
    assert sorted(path.name for path in (home / "layout-0" / "session").glob("0*")) == ["00000003"]


@pytest.mark.parametrize(("name", "size"), [("kernel.1", 1e-4), ("solver", 1e-8)])
def test_negative_control_other_numbers_are_bad(
    found: dict[str, Any], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: float
) -> None:
    with np.load(home / "layout-0" / "numbers.npz") as numbers:
        changed = dict(numbers)
    changed[name] = changed[name] * (1 + size) if name != "solver" else np.array(size)

    def pretended(layout: Layout, folder: Path, *others: Any) -> dict[str, Any]:
        np.savez(tmp_path / "numbers.npz", **changed)
        return {"statuses": [0, 0], "seconds": 0.0}

    monkeypatch.setattr(distributed, "run", pretended)
    assert not compared(Layout(2, 4, 4, 2), tmp_path, home / "single-float32")["good"]


@pytest.mark.parametrize("statuses", [[0, DIED], ["hangs", DIED], [1, 1]])
def test_negative_control_a_death_that_nobody_notices_is_bad(
    found: dict[str, Any], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statuses: list[Any]
) -> None:
    def pretended(layout: Layout, folder: Path, dtype: str, death: Any = None) -> dict[str, Any]:
        with np.load(home / "layout-0" / "numbers.npz") as numbers:
            np.savez(tmp_path / "numbers.npz", **numbers)
        ended = {"statuses": [0, 0], "seconds": 0.0}
        return ended if death is None else {"statuses": statuses, "seconds": 1.0, "noticed_after": 0.1}

    monkeypatch.setattr(distributed, "run", pretended)
    assert not compared(QUICK[0], tmp_path, home / "single-float32")["good"]
