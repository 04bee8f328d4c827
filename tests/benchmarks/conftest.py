"""Two problems in float64, made once, and compiled programs that all tests share."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from experiments.benchmarks import problem

SMALL = {"n_layers": 3, "d_model": 16, "steps": 5, "layers": (0, 1), "dtype": "float64"}
SHAPES = {
    "gpt2": dataclasses.replace(problem.SHAPES["tiny-gpt2"], d_ff=40, **SMALL),
    "llama": dataclasses.replace(problem.SHAPES["tiny-llama"], d_ff=36, **SMALL),
}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """In float64; programs run once or twice here, and unoptimized ones are ready in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's problem, three requests; to be asked for inside `quick_compilation`."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            problem.prepare(made[family], SHAPES[family], 3, seed=1)
        return made[family]

    return get
