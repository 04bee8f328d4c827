"""One edited session on meshes of devices and processes, beside the same one on a single device.

    python -m experiments.scale.distributed            every layout and death below; table and numbers in this folder
    python -m experiments.scale.distributed --quick    2 processes of 4 devices, one death; nothing written

CPU devices stand in for accelerators and processes of this machine for hosts. Each layout runs the same story: the embedded
model is read onto the mesh, second moments are summed, facts are written, saved, written on, one is taken back, and the
session is saved again. Its numbers are compared with those of one device without a mesh. In some layouts a process is
killed (SIGKILL) midway: the others must end with an error within the stated time, and the same command, given once more,
must go on to the numbers of a run in which nobody died.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TIMEOUT = 15
"""Seconds after which processes must notice that one is gone, in place of the package's 60: a test waits for it."""
NOTICED = 3 * TIMEOUT
"""Seconds after the death by which all must have ended."""
LONGEST = 900
LAYERS, FACTS, TOKENS = (1, 3), 6, 6000  # edited, a step, of the moments' sample
DIED, REFUSED = -signal.SIGKILL, 1
BOUNDS = {"float32": {"kernels": 1e-5, "solver": 1e-10}, "float64": {"kernels": 1e-10, "solver": 1e-10}}
"""Largest relative error of kernels against the single device's, and of the steps against the session's one-time edit."""


@dataclass(frozen=True)
class Layout:
    """Processes, their devices, the mesh, and who dies where: (process, place in the story)."""

    processes: int
    devices: int
    data: int
    model: int
    dtype: str = "float32"
    death: tuple[int, str] | None = None

    @property
    def name(self) -> str:
        mesh = f"{self.processes} x {self.devices}, data={self.data} model={self.model}, {self.dtype}"
        return mesh if self.death is None else f"{mesh}, process {self.death[0]} dies {self.death[1]}"


QUICK = (Layout(2, 4, 4, 2, death=(1, "in the values of step 2")),)
FULL = (
    *(Layout(1, 8, data, 8 // data) for data in (1, 2, 4, 8)),
    Layout(1, 8, 4, 2, "float64"),
    Layout(2, 4, 2, 4),
    Layout(2, 4, 4, 2, "float64"),
    Layout(2, 2, 1, 4),
    Layout(4, 2, 4, 2),
    Layout(4, 1, 2, 2, "float64"),
    *(
        Layout(2, 2, 2, 2, death=(number, place))
        for number in (0, 1)
        for place in ("in the moments", "in the values of step 2", "before the save of step 2")
    ),
    Layout(4, 1, 2, 2, death=(3, "in the values of step 1")),
)


# --- what one process does ---------------------------------------------------------------------------------------------


def story(layout: Layout | None, folder: Path, dtype: str, coordinator: str, number: int, death: str | None) -> None:
    """Go on from where the folder is; without a layout, on one device and without a mesh."""
    from kedit_jax import assets, hosts
    from kedit_jax.models import reading

    if layout is not None and layout.processes > 1:
        hosts.initialize(coordinator, layout.processes, number, timeout=TIMEOUT)
    from kedit_jax.checkpoint import has_session, load_session, lock_session, save_session
    from kedit_jax.delta import host_kernel
    from kedit_jax.editing.moments import compute_moments
    from kedit_jax.editing.session import equivalence_error, start_session
    from kedit_jax.editing.settings import EditSettings
    from kedit_jax.editing.values import ValueSettings
    from kedit_jax.evaluation import parse_records
    from kedit_jax.models import down_kernel_address, load, make_mesh

    def here(place: str) -> None:
        if place == death:
            os.kill(os.getpid(), signal.SIGKILL)

    reading.BLOCK_BYTES = 2**14  # the model is read as larger ones are, part by part
    mesh = None if layout is None else make_mesh(layout.data, layout.model)
    model, tokenizer = load(assets.model_dir(), dtype=np.dtype(dtype), mesh=mesh)
    told = iter(range(10**6))
    moments = compute_moments(
        model, tokenizer, assets.corpus(), LAYERS, max_tokens=TOKENS, cache=folder / "moments", save_every=0,
        progress=lambda done, of: here("in the moments") if next(told) == 1 else None,
    )  # fmt: skip
    facts = [record.request() for record in parse_records(assets.records())[: 2 * FACTS]]
    facts.sort(key=lambda fact: -len(tokenizer(f"{fact.text} {fact.target}")["input_ids"]))  # later ones fit into the arrays
    values = ValueSettings(steps=10, learning_rate=0.5)
    settings = EditSettings(layers=LAYERS, moment_weight=15_000.0, prefixes=1, prefix_tokens=4, values=values)
    with lock_session(folder / "session") as lock:
        if has_session(folder / "session"):
            session = load_session(folder / "session", model, tokenizer, moments)
        else:
            session = start_session(model, tokenizer, moments, settings)
        while (step := len(session.events) + 1) <= 3:
            if step < 3:
                session, _ = session.edit(
                    facts[(step - 1) * FACTS : step * FACTS],
                    progress=lambda what, done, of, step=step: here(f"in the values of step {step}"),
                )
            else:
                session, _ = session.retract([str(session.facts[0].id)])
            here(f"before the save of step {step}")
            save_session(session, lock.folder, lock=lock)
    numbers: dict[str, np.ndarray] = {"solver": np.array(equivalence_error(session))}
    for layer, held in session.layers.items():
        numbers |= {
            f"moments.{layer}": moments.by_layer[layer],
            f"keys.{layer}": np.asarray(held.constraints.keys),
            f"update.{layer}": held.update,
            f"kernel.{layer}": host_kernel(session.model, down_kernel_address(layer)),
        }
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in numbers.values())).hexdigest()
    if len(set(hosts.gathered(digest))) > 1:
        raise SystemExit("the processes do not hold the same numbers")
    if hosts.is_first():
        np.savez(folder / "numbers.npz", **numbers)


# --- who starts them and looks at what they did --------------------------------------------------------------------------


def run(layout: Layout | None, folder: Path, dtype: str = "float32", death: tuple[int, str] | None = None) -> dict[str, Any]:
    """Start the processes of a layout and wait: exit statuses, seconds, and seconds from a death to the last end."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    devices, processes = (1, 1) if layout is None else (layout.devices, layout.processes)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_ENABLE_X64": str(dtype == "float64"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),  # who resumes compiles nothing
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OPENBLAS_NUM_THREADS": "1",
    }
    began, children = time.monotonic(), []
    for number in range(processes):
        told = {"layout": layout and asdict(layout), "folder": str(folder), "dtype": dtype, "coordinator": coordinator}
        told |= {"number": number, "death": death[1] if death is not None and death[0] == number else None}
        with (folder / f"process-{number}.log").open("ab") as log:
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "experiments.scale.distributed", "--child", json.dumps(told)],
                    cwd=ROOT, env=environment, stdout=log, stderr=log,
                )
            )  # fmt: skip
    dead, ended = None, {}
    while len(ended) < processes and time.monotonic() - began < LONGEST:
        for number, child in enumerate(children):
            if number not in ended and child.poll() is not None:
                ended[number] = time.monotonic()
                if child.returncode == DIED and dead is None:
                    dead = ended[number]
        time.sleep(0.05)
    for child in children:
        child.kill()
    found: dict[str, Any] = {
        "statuses": [child.wait() if number in ended else "hangs" for number, child in enumerate(children)],
        "seconds": round(time.monotonic() - began, 1),
    }
    return found if dead is None else found | {"noticed_after": round(max(ended.values()) - dead, 1)}


def compared(layout: Layout, folder: Path, single: Path) -> dict[str, Any]:
    """Run a layout, killed and resumed where it says so, and compare its numbers with those of the single device."""
    result: dict[str, Any] = {"layout": layout.name}
    if layout.death is not None:
        killed = run(layout, folder, layout.dtype, layout.death)
        others = [status for number, status in enumerate(killed["statuses"]) if number != layout.death[0]]
        result |= {"killed": killed, "all_ended": all(status not in ("hangs", 0) for status in others)}
        result["all_ended"] &= killed["statuses"][layout.death[0]] == DIED and killed.get("noticed_after", 1e9) <= NOTICED
    ended = run(layout, folder, layout.dtype)
    result |= ended
    if any(ended["statuses"]):
        logs = {path.name: path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("process-*.log"))}
        return result | {"good": False, "logs": logs}
    with np.load(folder / "numbers.npz") as mine, np.load(single / "numbers.npz") as reference:
        errors = {name: _error(mine[name], reference[name]) for name in reference.files if name != "solver"}
        result["solver"] = float(mine["solver"])
    for what in ("moments", "keys", "update", "kernel"):
        result[what] = max(error for name, error in errors.items() if name.startswith(what))
    bound = BOUNDS[layout.dtype]
    good = result["kernel"] <= bound["kernels"] and result["solver"] <= bound["solver"]
    if layout.dtype == "float64":
        good = good and max(errors.values()) <= bound["solver"]
    return result | {"good": good and result.get("all_ended", True)}


def _error(mine: np.ndarray, reference: np.ndarray) -> float:
    if mine.shape != reference.shape:
        return float("inf")
    return float(np.linalg.norm(mine.astype(np.float64) - reference) / np.linalg.norm(reference.astype(np.float64)))


def results(layouts: Sequence[Layout], home: Path) -> list[dict[str, Any]]:
    """Every layout's result, told as it comes."""
    singles = {}
    for dtype in sorted({layout.dtype for layout in layouts}):
        singles[dtype] = home / f"single-{dtype}"
        ended = run(None, singles[dtype], dtype)
        if any(ended["statuses"]):
            raise SystemExit((singles[dtype] / "process-0.log").read_text(errors="replace")[-4000:])
    found = []
    for number, layout in enumerate(layouts):
        found.append(compared(layout, home / f"layout-{number}", singles[layout.dtype]))
        print(json.dumps(found[-1]), flush=True)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    head = [
        "processes x devices",
        "kernels",
        "updates",
        "moments",
        "keys",
        "steps against one-time",
        "noticed after",
        "s",
        "",
    ]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for one in found:
        errors = [f"{one[what]:.1e}" if what in one else "-" for what in ("kernel", "update", "moments", "keys", "solver")]
        noticed = f"{one['killed'].get('noticed_after', '-')} s" if "killed" in one else ""
        cells = [one["layout"], *errors, noticed, str(one["seconds"]), "good" if one["good"] else "**bad**"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def report(found: Sequence[dict[str, Any]]) -> str:
    """The page about them."""
    return f"""# Meshes of devices and processes

Written by `python -m experiments.scale.distributed` (numbers in `results/distributed.json`). CPU devices stand in for
accelerators, processes of one machine for hosts. The embedded model is read onto the mesh part by part, moments of
{TOKENS} tokens are summed, {FACTS} facts are written and saved, {FACTS} more, one is taken back, and all is saved again.
Errors are relative (Frobenius, the worse of {len(LAYERS)} layers), against one device without a mesh; "steps" is the
distance of the sum of the session's steps from the one-time edit of its facts. Allowed for kernels and steps are
{BOUNDS["float32"]["kernels"]:g} and {BOUNDS["float32"]["solver"]:g} in float32; in float64
{BOUNDS["float64"]["kernels"]:g} for everything.

{table(found)}

Where a process dies (SIGKILL), all others must end with an error within {NOTICED} s of it (each gives up on a silent one
after {TIMEOUT} s here, 60 by default), and the same command, given once more, must go on to these numbers. Seconds are those
of the run that went to the end, on two busy cores, with what it compiled.
"""


def main() -> None:
    """Run all layouts, or be one process of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        told = json.loads(given.child)
        layout = told["layout"] and Layout(**told["layout"])
        try:
            story(layout, Path(told["folder"]), told["dtype"], told["coordinator"], told["number"], told["death"])
        except BaseException:
            from traceback import print_exc

            from kedit_jax import hosts

            print_exc()
            hosts.leave(REFUSED)
            raise
        return
    with tempfile.TemporaryDirectory() as home:
        found = results(QUICK if given.quick else FULL, Path(home))
    if not given.quick:
        (HERE / "results" / "distributed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (HERE / "DISTRIBUTED.md").write_text(report(found), encoding="utf-8")
    raise SystemExit(0 if all(one["good"] for one in found) else 1)


if __name__ == "__main__":
    main()
