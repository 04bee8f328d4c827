"""The programs of an edit, compiled for TPUs that are not here. Needs libtpu (`pip install libtpu`); skipped without."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from experiments.scale import tpu

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None or "TPU_LIBRARY_PATH" in os.environ


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """A tiny model on a slice of four chips; the programs of a large one have the same collectives."""
    name, topology, data, model = tpu.QUICK[0]
    command = [sys.executable, "-m", "experiments.scale.tpu", "--child", name, topology, str(data), str(model)]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        command, cwd=tpu.ROOT, env=environment | tpu.TPU, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["program"]: row for row in rows}


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
def test_a_tpu_takes_every_program_and_factors_nothing(found: dict[str, dict[str, Any]]) -> None:
    assert {"values, keep inputs", "keys, the top", "moments"} < set(found)
    for what, row in found.items():
        assert "refused" not in row, what
        assert row["factored"] == [], what
        assert row["stacks_gathered"] == 0, what
        assert row["copies_of_stacks"] == 0, what


@pytest.mark.skipif(not HAS_LIBTPU, reason="libtpu is not installed")
def test_writing_a_kernel_and_applying_a_delta_need_no_other_chip(found: dict[str, dict[str, Any]]) -> None:
    for what in ("the host's kernel written", f"apply_edits, rank {tpu.RANK}"):
        assert found[what]["collectives"] == {}
        assert found[what]["output"] <= 0.01 * found[what]["arguments"], "written in place"
    assert "all-gather" in found["values, keep inputs"]["collectives"], "negative control: layers are gathered"


def test_what_the_compiler_says_is_read() -> None:
    """The reading of a program's text, on lines such as the compiler writes."""
    text = """
      %a = bf16[8,4]{1,0} all-gather(%x), channel_id=1, dimensions={0}
      %b = bf16[8,4]{1,0} all-gather-start(%x), channel_id=2, dimensions={0}
      %c = bf16[8,4]{1,0} all-gather-done(%b), channel_id=2
      %d = f32[3]{0} all-reduce(%y), channel_id=7
      %e = bf16[5,64,128]{2,1,0} all-gather(%z), channel_id=9, dimensions={1}
      %f = bf16[4,5,64,128]{3,2,1,0} broadcast(%z), dimensions={1,2,3}
      %g = f32[9,9]{1,0} cholesky(%m), lower=true
    """
    said = tpu.read(text, layers=5)
    assert said["collectives"] == {"all-gather": 3, "all-reduce": 1}
    assert (said["stacks_gathered"], said["copies_of_stacks"], said["factored"]) == (1, 1, ["cholesky"])
    assert tpu.read("%h = bf16[6,64,128]{2,1,0} all-gather(%z), channel_id=9", layers=5)["stacks_gathered"] == 0
