"""Compiled programs are kept on disk by the command line, and by it alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from kedit_jax.cli.cache import compiled_programs_kept

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import collections, json, sys
import jax, jax.numpy as jnp
from kedit_jax.cli.cache import compiled_programs_kept
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: seen.update([name.rsplit("/", 1)[1]]))
with compiled_programs_kept():
    result = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)(jnp.linspace(0.0, 9.0, 64).reshape(8, 8))
print(json.dumps({"hits": seen["cache_hits"], "misses": seen["cache_misses"], "result": result.tolist()}))
"""


def child(home: Path, *, cores: set[int] | None = None, **variables: str) -> dict[str, Any]:
    """What a process that compiles two or three programs says about the cache; held to these cores, if to any."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {cores})\n{PROGRAM}" if cores else PROGRAM],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return json.loads(done.stdout)


def stored(home: Path) -> list[Path]:
    return sorted(path for path in home.rglob("*") if path.is_file())


def test_a_second_run_compiles_nothing_and_damage_is_compiled_anew(tmp_path: Path) -> None:
    first = child(tmp_path)
    files = stored(tmp_path)
    second = child(tmp_path)
    assert first["misses"] == len(files) > 0
    assert first["hits"] == 0
    assert second["hits"] == first["misses"]
    assert second["misses"] == 0
    assert stored(tmp_path) == files
    assert second["result"] == first["result"]  # bit for bit: JSON keeps every digit
    assert (files[0].parent.stat().st_mode & 0o077) == 0
    for file in files:  # a full disk leaves such ones
        file.write_bytes(file.read_bytes()[:20])
    assert child(tmp_path) == {"hits": 0, "misses": first["misses"], "result": first["result"]}


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [])(0)) < 2, reason="needs a second core to leave out")
def test_programs_for_one_core_are_not_run_on_two(tmp_path: Path) -> None:
    one = {min(os.sched_getaffinity(0))}
    first = child(tmp_path, cores=one)
    assert child(tmp_path)["misses"] == first["misses"] > 0
    assert child(tmp_path, cores=one)["hits"] == first["misses"]


@pytest.mark.parametrize("what", ["a file in place of the folder", "switched off"])
def test_without_a_folder_all_is_compiled(tmp_path: Path, what: str) -> None:
    """Negative control, and no error: the command goes on."""
    variables = {"JAX_ENABLE_COMPILATION_CACHE": "false"} if what == "switched off" else {}
    home = tmp_path / "home"
    if not variables:
        home.write_text("no folder")
    found = child(home, **variables)
    assert found["hits"] == found["misses"] == 0


def test_the_users_own_folder_is_kept_to(tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert child(tmp_path / "home", JAX_COMPILATION_CACHE_DIR=str(own))["misses"] > 0
    assert stored(own)
    assert not (tmp_path / "home").exists()


def test_afterwards_nothing_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    with compiled_programs_kept():
        assert [getattr(jax.config, name) for name in names] != before
    assert [getattr(jax.config, name) for name in names] == before
