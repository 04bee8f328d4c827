"""Loads a checkpoint in a process of its own and prints, in MiB, how much memory that took at its peak.

    python loading_memory.py DIRECTORY [float32|bfloat16|kept] [whole]

`whole` is the control: it holds all tensors of the files before it loads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from kedit_jax.models import load_model, named_parameters


def resident(field: str) -> float:
    """VmRSS is what the process has now, VmHWM the most it had. The ru_maxrss of `resource` may be that of the process
    which started this one: Linux carries it over."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise LookupError(field)


def main(directory: str, dtype: str = "kept", control: str = "") -> None:
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(3)))  # the compiler's own memory is not the loader's
    before = resident("VmRSS")
    held = [load_file(path) for path in sorted(Path(directory).glob("*.safetensors"))] if control else []
    model = load_model(directory, dtype=None if dtype == "kept" else jnp.dtype(dtype))
    size = sum(value.nbytes for value in named_parameters(model).values()) / 2**20
    sys.stdout.write(json.dumps({"peak": resident("VmHWM") - before, "model": size, "held": len(held)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
