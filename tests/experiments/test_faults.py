"""Sessions and exports whose writers are killed, or find no room: one version or the other, never something between."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.scale.faults import numbers, state_of
from kedit_jax.checkpoint import load_session, save_session
from kedit_jax.editing.moments import Moments
from kedit_jax.editing.session import EditSession

ROOT = Path(__file__).parents[2]


def test_a_dozen_faults_leave_one_version_or_the_other() -> None:
    """In a process of its own: it forks before any of JAX's or Orbax's threads run."""
    command = [sys.executable, "-m", "experiments.scale.faults", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"\| (\d+) \| .* \| (\d+) \|", done.stdout)
    assert sum(int(times) for times, _ in rows) >= 12
    assert all(times == resumed for times, resumed in rows)


def test_negative_control_what_is_between_is_found(history: list[EditSession], moments: Moments, tmp_path: Path) -> None:
    states = {"before": numbers(history[1]), "after": numbers(history[2])}

    def opened(folder: Path) -> EditSession:
        return load_session(folder, history[1].base, history[1].tokenizer, moments)

    for number, name in ((1, "before"), (2, "after")):
        save_session(history[number], tmp_path / name)
        assert state_of(tmp_path / name, states, opened) == name
    first, *_ = history[2].layers
    half = {
        **history[2].layers,
        first: dataclasses.replace(history[2].layers[first], sequence=history[1].layers[first].sequence),
    }
    save_session(dataclasses.replace(history[2], layers=half), tmp_path / "between")
    with pytest.raises(RuntimeError, match="in neither of before, after"):
        state_of(tmp_path / "between", states, opened)
    torn = numbers(opened(tmp_path / "between"))
    with pytest.raises(RuntimeError, match=r"is torn, and fails the checks .*layer 0"):
        state_of(tmp_path / "between", {"torn": torn}, opened)
