"""The house rules: imports point downwards, lint, types, nothing global changes on import."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "kedit_jax"
ROOMS = (
    *(
        "errors",
        "files",
        "hosts",
        "assets",
        "solve",
        "models",
        "delta",
        "editing",
        "checkpoint",
        "evaluation",
        "verification",
    ),
    *("export", "cli"),
)
"""From the floor up: a room imports itself and what stands before it. The package itself is the roof: it names what users
need, from every room but the command line, and no room imports it."""


def sources() -> dict[str, str]:
    """Module name -> source, of the whole package; a package bears its own name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def imports(module: str, source: str, known: Mapping[str, str]) -> Iterator[str]:
    """Modules of the package that this one imports anywhere, in functions and under TYPE_CHECKING too."""
    is_package = any(name.startswith(f"{module}.") for name in known)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                base = ".".join([*parts[: len(parts) - node.level + is_package], *([base] if base else [])])
            if base.split(".")[0] == PACKAGE:
                for alias in node.names:  # a name may be a module of its own, or something in the package
                    yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def offences(modules: Mapping[str, str]) -> list[str]:
    """Every import that points upwards or out of the house, and a cycle if there is one."""
    found, graph = [], {}
    for module, source in modules.items():
        graph[module] = {name for name in imports(module, source, modules) if name != module}
        for name in sorted(graph[module]):
            if name not in modules:
                found.append(f"{module} imports {name}, which does not exist")
            elif not room(name):
                found.append(f"{module} imports the whole package")
            elif not room(module) and room(name) == "cli":
                found.append(f"the package itself imports {name}")
            elif room(module) and ROOMS.index(room(name)) > ROOMS.index(room(module)):
                found.append(f"{module} imports {name}, which is above it")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a cycle: {' <- '.join(error.args[1])}")
    return found


def test_every_module_stands_in_a_room() -> None:
    assert {room(module) for module in sources()} - {""} <= set(ROOMS)


def test_imports_point_downwards() -> None:
    assert offences(sources()) == []


def test_assets_are_data() -> None:
    modules = sources()
    inside = [name for name in modules if room(name) == "assets"]
    assert inside
    assert not [name for module in inside for name in imports(module, modules[module], modules)]


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("kedit_jax.solve.bad", "from kedit_jax.models import Decoder", "kedit_jax.models, which is above"),
        ("kedit_jax.solve.bad", "from kedit_jax.delta import LowRank", "kedit_jax.delta, which is above"),
        ("kedit_jax.solve.bad", "import kedit_jax.editing.session as s", "kedit_jax.editing.session, which is above"),
        ("kedit_jax.solve.bad", "from ..models.decoder import Decoder", "kedit_jax.models.decoder, which is above"),
        ("kedit_jax.models.bad", "def f():\n    from kedit_jax import delta", "kedit_jax.delta, which is above"),
        (
            "kedit_jax.models.bad",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kedit_jax.editing import keys",
            "kedit_jax.editing.keys, which is above",
        ),
        ("kedit_jax.errors", "from kedit_jax.solve import Prior", "kedit_jax.solve, which is above"),
        ("kedit_jax.editing.bad", "import kedit_jax", "the whole package"),
        ("kedit_jax.editing.bad", "from kedit_jax.solver import x", "does not exist"),
        ("kedit_jax", "from kedit_jax.cli import main", "the package itself"),
        ("kedit_jax.editing.tokens", "from kedit_jax.editing.session import EditSession", "a cycle"),
    ],
)
def test_negative_control_an_offender_is_found(module: str, source: str, words: str) -> None:
    assert any(words in offence for offence in offences(sources() | {module: source}))


def test_negative_control_downwards_is_allowed() -> None:
    good = "from kedit_jax.solve import Prior\nfrom ..delta import LowRank\nfrom . import keys\nimport numpy"
    assert offences(sources() | {"kedit_jax.editing.good": good}) == []


def run(*command: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_has_nothing_to_say(command: tuple[str, ...]) -> None:
    places = [name for name in (PACKAGE, "tests", "experiments", "notebooks") if (ROOT / name).is_dir()]
    done = run("-m", "ruff", *command, *places)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mypy_has_nothing_to_say() -> None:
    done = run("-m", "mypy", PACKAGE)
    assert done.returncode == 0, done.stdout + done.stderr


IMPORT_ALL = """
import importlib, json, os, pkgutil, sys
import jax
before = dict(os.environ)
values = dict(jax.config.values)
import kedit_jax
for found in pkgutil.walk_packages(kedit_jax.__path__, "kedit_jax."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
changed = {name: repr(value) for name, value in jax.config.values.items() if values.get(name) != value}
print(json.dumps({
    "x64": jax.config.jax_enable_x64,
    "config": changed,
    "environment": {k: v for k, v in os.environ.items() if before.get(k) != v},
    "gone": [k for k in before if k not in os.environ],
    "foreign": [name for name in ("torch", "tensorflow", "matplotlib", "pandas", "pytest") if name in sys.modules],
    "imported": [name for name in sys.modules if name.startswith("kedit_jax.")],
}))
"""


def test_importing_everything_changes_nothing_global() -> None:
    """No x64 for the whole process, no environment variables, no torch: it is the tests' oracle alone."""
    done = run("-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["x64"] is False
    assert report["config"] == {}
    assert report["gone"] == []
    assert report["foreign"] == []
    assert set(sources()) - {PACKAGE} <= set(report["imported"]), "everything was imported"
    assert report["environment"] == {}


def test_negative_control_a_global_change_is_noticed() -> None:
    guilty = IMPORT_ALL.replace("import kedit_jax\n", "import kedit_jax\njax.config.update('jax_enable_x64', True)\n", 1)
    done = run("-c", guilty)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["x64"] is True
    assert "jax_enable_x64" in report["config"]


def test_nothing_needs_the_folders_outside() -> None:
    """The package and its tests read nothing beside this checkout."""
    for path in [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        if path != Path(__file__):
            assert os.sep + "work" + os.sep not in path.read_text(encoding="utf-8"), path
