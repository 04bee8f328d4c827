"""The harness: what it counts, what it reads from compiled programs, and the end-to-end comparison on a tiny shape."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmarks import edits, problem, profiles, roofline
from experiments.benchmarks.measuring import Clock, medians


class Here:
    """Stands for a child process, in this one."""

    def __init__(self, make: Any, *args: Any) -> None:
        self._made = make(*args)

    def __call__(self, name: str, *args: Any) -> Any:
        return getattr(self._made, name)(*args)

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def folder(quick_compilation: None, folder_of: Callable[[str], Path]) -> Path:
    return folder_of("gpt2")


def test_the_comparison_has_all_its_numbers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edits, "Child", Here)
    found = edits.compare(folder, edits.Plan(3, 3, 2), lambda text: None)
    found = json.loads(json.dumps(found))
    for who in ("ours", "published"):
        assert set(found["seconds_a_request"][who]) == {*edits.PARTS, "total"}
        assert {"before", "now", "peak"} <= set(found["memory_mib"][who])
        assert len(found["pairs"][who]) == 2
    assert set(found["ratios"]) == {"values", "keys", "solve", "total"}
    assert "compilation_seconds" in found
    assert found["agreement"]["z_max"] < edits.TOLERANCE
    assert found["agreement"]["loss_max_difference"] < 1e-5
    edits.plot({"shapes": {"tiny": {"plans": [found]}}}, tmp_path)
    assert (tmp_path / "edits.png").stat().st_size > 0


def test_a_problem_is_read_as_it_was_written(folder: Path) -> None:
    found = problem.read(folder)
    assert len(found.requests) == 3
    assert set(found.moments()) == set(found.shape.layers)
    tokenizer = problem.start(found).tokenizer
    for text in (found.requests[0].text, *found.prefixes):  # a word is a token, and so is the full stop
        assert len(tokenizer(text.rstrip())["input_ids"]) == len(text.replace(".", " .").split())


def test_requests_are_drawn_by_length() -> None:
    assert {part: sum(counts) for part, counts in problem.LENGTHS.items()} == dict.fromkeys(problem.LENGTHS, 10_000)


def test_parts_of_a_clock_and_the_rest() -> None:
    ticks = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0])
    clock = Clock(lambda: next(ticks))
    with clock.part("all"):
        with clock.part("keys"):
            pass
        with clock.part("solve"):
            pass
    assert clock.take("all") == {"keys": 2.0, "solve": 5.0, "other": 3.0}
    assert clock.seconds == {}
    assert medians([{"a": 1.0}, {"a": 5.0}, {"a": 2.0}]) == {"a": 2.0}


def test_distinct_tokens_are_the_nodes_of_the_prefix_tree() -> None:
    assert roofline.distinct([(1, 2, 3), (1, 2, 4), (2, 2)]) == 6


PROGRAM = """HloModule jit_f

FileNames
1 "/somewhere/kedit_jax/models/layers.py"
2 "/somewhere/optax/adam.py"

FunctionNames
1 "Linear.__call__"
2 "adam.<locals>.update"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}


ENTRY %main {
  %dot.1 = f32[2,3]{1,0} dot(%a, %b), metadata={op_name="jit(f)/dot" stack_frame_id=2}
  %transpose_copy_fusion.2 = f32[2]{0} fusion(%a), kind=kLoop, metadata={op_name="x" stack_frame_id=1}
  ROOT %add.3 = (f32[], /*index=1*/f32[2]{0}) while(%a)
}
"""


def test_operations_are_traced_to_functions_of_the_package() -> None:
    assert profiles.sources(PROGRAM) == {
        "dot.1": profiles.Source("dot", "Linear.__call__", "matrix products"),
        "transpose_copy_fusion.2": profiles.Source("fusion", "Linear.__call__", "data moved"),
        "add.3": profiles.Source("while", "XLA", "other arithmetic"),
    }
