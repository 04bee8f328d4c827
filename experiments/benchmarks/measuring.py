"""How the benchmarks measure: one core, CPU seconds, peak memory of a process, and one process for each procedure.

XLA's own flags for one thread do not hold it to one core, so the process that starts the others is pinned and they inherit
it, before any of them imports a library that counts cores. On an accelerator the clock is the wall's, read when the device
is idle.
"""

import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.machine import cores, processor


def pin(core: int) -> None:
    """Hold this process, and all that it starts from now on, to one core."""
    os.sched_setaffinity(0, {core})


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    packages = ("jax", "jaxlib", "torch", "transformers", "numpy", "scipy")
    return {
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def memory() -> dict[str, float]:
    """MiB that this process holds, and the most it has held since `forget_peak`."""
    fields = dict(line.split(":", 1) for line in _lines("/proc/self/status") if line.startswith(("VmRSS", "VmHWM")))
    return {name: int(fields[key].split()[0]) / 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def forget_peak() -> None:
    """Let the peak begin anew from what is held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class Clock:
    """Seconds spent in named parts; one may hold others.

    Args:
        now: the seconds that count; the process's CPU time by default, all threads together.
        ready: waits for what was started and is not done.
    """

    def __init__(self, now: Callable[[], float] = time.process_time, ready: Callable[[], Any] = lambda: None) -> None:
        self.seconds: Counter[str] = Counter()
        self._now, self._ready = now, ready

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._ready()
        begin = self._now()
        yield
        self._ready()
        self.seconds[name] += self._now() - begin

    def take(self, whole: str) -> dict[str, float]:
        """The seconds so far, forgotten afterwards; those of the part `whole` less all others are given as "other"."""
        taken = dict(self.seconds)
        self.seconds.clear()
        total = taken.pop(whole)
        return {**taken, "other": total - sum(taken.values())}


def seconds_of(work: Callable[[], Any], repetitions: int = 3) -> float:
    """Median CPU seconds of a piece of work, one run before the first that counts."""
    work()
    times = []
    for _ in range(repetitions):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every number over rows that have the same names."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


class Child:
    """An object in a process of its own, asked for one thing at a time.

    Args:
        make: makes the object; what it returns is asked for its methods by name.
    """

    def __init__(self, make: Callable[..., Any], *args: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, make, args), daemon=True)
        self._process.start()
        far.close()
        self._answer()

    def __call__(self, name: str, *args: Any) -> Any:
        self._pipe.send((name, args))
        return self._answer()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join(timeout=60)

    def _answer(self) -> Any:
        try:
            good, value = self._pipe.recv()
        except EOFError:
            self._process.join(timeout=60)
            raise RuntimeError(f"a measured process ended with exit code {self._process.exitcode}") from None
        if not good:
            raise RuntimeError(f"in a measured process:\n{value}")
        return value


def _serve(pipe: Any, make: Callable[..., Any], args: Sequence[Any]) -> None:
    found, name = None, ""
    while True:
        try:
            if found is None:
                found, value = make(*args), None
            else:
                name, args = pipe.recv()
                value = getattr(found, name)(*args)
            pipe.send((True, value))
        except EOFError:
            return
        except Exception:
            pipe.send((False, traceback.format_exc()))
