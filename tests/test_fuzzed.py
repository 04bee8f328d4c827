"""The quick form of `python -m experiments.scale.fuzz`: the same flaws, fewer of them, the same ones every time."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies

from experiments.scale.fuzz import Watch
from experiments.scale.hostile import Target, World, make_targets, make_world, spoilt

NAMES = (
    *("header", "index", "config", "model", "tokenizer", "requests", "records", "tables", "tasks", "settings", "options"),
    *("corpus", "sums", "manifest", "session", "arrays", "moments", "prior", "delta", "export"),
)
QUICK, SLOW = 50, 10  # inputs of a target
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def targets(world: World) -> dict[str, Target]:
    return make_targets(world)


def watched(target: Target, folder: Path) -> Watch:
    """A watch that has seen the flaws; their number depends on how long one input takes."""
    (folder / "read").mkdir()
    watch = Watch(target, "hypothesis", folder / "read", folder / "tally.json")
    flawed = settings(
        max_examples=SLOW if target.slow else QUICK,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @flawed
    @given(strategies.sampled_from(target.seeds), strategies.randoms(use_true_random=False))
    def one(data: bytes, rng: random.Random) -> None:
        watch.give(spoilt(target, data, rng))

    one()
    return watch


def test_every_target_is_tried(targets: dict[str, Target]) -> None:
    assert tuple(targets) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_valid_inputs_are_taken_and_flawed_ones_taken_or_refused(
    targets: dict[str, Target], tmp_path: Path, name: str
) -> None:
    (tmp_path / "valid").mkdir()
    for data in targets[name].seeds:
        targets[name].read(data, tmp_path / "valid")
    tally = watched(targets[name], tmp_path).tally
    assert tally.findings == {}
    assert tally.inputs == tally.accepted + tally.refused
    assert tally.refused > 0 or name in ("corpus", "arrays"), "flaws are met"


def test_negative_control_what_no_user_can_read_is_found(tmp_path: Path) -> None:
    def read(data: bytes, folder: Path) -> object:
        if b"x" not in data:
            raise KeyError(data)
        return data

    watch = watched(Target("control", "", (b"xxx",), read), tmp_path)
    assert any(what.startswith("KeyError in test_fuzzed.py:read") for what in watch.tally.findings)


def test_negative_control_what_takes_memory_is_found(tmp_path: Path) -> None:
    """In a process of its own: the peak of one that has held gigabytes says nothing of some hundred MiB more."""
    script = """if True:
        import sys
        from pathlib import Path
        from experiments.scale.fuzz import Watch
        from experiments.scale.hostile import Target

        def read(data, folder):
            if data == b"large":
                bytearray(300 * 2**20)[:: 2**12] = b"1" * (300 * 2**8)

        watch = Watch(Target("control", "", (b"",), read), "hypothesis", Path(sys.argv[1]), Path(sys.argv[1]) / "tally")
        for data in (b"small", b"large"):
            watch.give(data)
            print(sorted(watch.tally.findings))
    """
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines() == ["[]", "['memory']"], done.stderr
