"""Compiled programs are kept on disk, so that a command that ran before starts in seconds.

JAX's own persistent compilation cache, and its own variables rule it: `JAX_COMPILATION_CACHE_DIR` names another folder,
`JAX_ENABLE_COMPILATION_CACHE=false` switches it off. The folder can be deleted at any time.
"""

import hashlib
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "jax_compilation_cache_dir"
LEAST = "jax_persistent_cache_min_compile_time_secs"


@contextmanager
def compiled_programs_kept() -> Iterator[None]:
    """While it lasts, every program that JAX compiles is stored, and read again where it was stored before.

    Programs of any size are: JAX leaves out what compiles in less than a second, which is most of a command's hundred. A
    folder that cannot be written or is full costs the gain, never the command.
    """
    settings: dict[str, str | float] = {}
    if LEAST.upper() not in os.environ:
        settings[LEAST] = 0.0
    if getattr(jax.config, FOLDER) is None and (folder := _folder()) is not None:
        settings[FOLDER] = str(folder)
    before = {name: getattr(jax.config, name) for name in settings}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            if FOLDER in settings:
                compilation_cache.reset_cache()  # or JAX would hold on to the folder


def _folder() -> Path | None:
    """The user's folder for programs of this processor, or None where nothing can be written."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(home) if home else Path.home() / ".cache") / "kedit_jax" / "programs" / _processor()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # who can write here can run code as the user
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # the latter where there is no home
        return None
    return folder


def _processor() -> str:
    """Names the processor's instructions and the cores that may be used.

    Programs use all instructions, and would crash on a processor that has fewer; a home can be shared by several machines.
    And they are split among the cores at hand when they are compiled, though JAX does not ask for those when it looks a
    program up: what a process held to one core had stored ran on one of two ever after, an evaluation 1.5 times longer.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = [platform.machine(), platform.processor(), str(cores)]
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        told += sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
