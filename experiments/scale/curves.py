"""What a process and a folder hold at a moment, and whether a curve of it over a long run is as flat as it should be."""

import ctypes
import dataclasses
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy.stats import theilslopes

from experiments.benchmarks.measuring import memory
from kedit_jax import delta
from kedit_jax.editing import keys, values
from kedit_jax.verification.checks import finite

PARTIAL = (".writing-", ".removed-")
"""What a version of a session is called that is not yet, or no longer, one."""
VERSION_DIGITS = 8
END = 0.2
"""Share of a curve at each end that is compared with the other end."""


@dataclass(frozen=True)
class Verdict:
    """What is claimed of a curve, and what was found.

    Attributes:
        claim: "flat": it rises by no more than `limit`, as a share of its median; "at most": no value exceeds `limit`; "at
            least": none is less, for negative controls.
        measured: that share, or the largest (smallest) value.
        rise: over the whole curve, in its unit; where it is claimed to be flat.
    """

    curve: str
    claim: str
    measured: float
    limit: float
    unit: str = ""
    rise: float | None = None

    @property
    def holds(self) -> bool:
        """Whether it was found; never where something is not a number."""
        return self.measured >= self.limit if self.claim == "at least" else self.measured <= self.limit

    def to_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(self) | {"holds": self.holds}
        return {name: finite(value) if isinstance(value, float) else value for name, value in found.items()}


def flat(curve: str, x: Sequence[float], y: Sequence[float], limit: float, unit: str = "") -> Verdict:
    """Whether a curve rises by at most this share of its median from end to end; falling is flat.

    The rise is that of the Theil-Sen line, which single outliers do not move, or that of the median of the last fifth over
    the first one's if it is larger: a line fitted to everything would overlook a step close to the end.
    """
    over, up = np.asarray(x, float), np.asarray(y, float)
    count = max(1, round(END * len(up)))
    slope = float(theilslopes(up, over).slope) * float(over[-1] - over[0]) if len(up) > 1 else 0.0
    rise = max(slope, float(np.median(up[-count:]) - np.median(up[:count])))
    size = float(np.median(np.abs(up)))
    share = rise / size if size else (np.inf if rise > 0 else 0.0)
    return Verdict(curve, "flat", share, limit, unit, rise)


def at_most(curve: str, y: Iterable[float], limit: float, unit: str = "") -> Verdict:
    """Whether every value is at most this; NaN is more than anything."""
    return Verdict(curve, "at most", float(np.max(np.asarray(list(y), float))), limit, unit)


def at_least(curve: str, y: Iterable[float], limit: float, unit: str = "") -> Verdict:
    """Whether every value is at least this: what a negative control must be."""
    return Verdict(curve, "at least", float(np.min(np.asarray(list(y), float))), limit, unit)


def process_state() -> dict[str, float]:
    """What this process holds: MiB resident, open files, JAX's arrays, programs compiled for edits, memory mappings."""
    arrays = jax.live_arrays()
    maps, handles = Path("/proc/self/maps"), Path("/proc/self/fd")
    edits = (values._advanced, keys.enter, keys.read, delta._put, delta._put_in_place)
    return {
        "rss_mib": memory()["now"],
        "open_files": len(os.listdir(handles)) if handles.exists() else 0,
        "live_arrays": len(arrays),
        "live_mib": sum(array.nbytes for array in arrays) / 2**20,
        "edit_programs": sum(function._cache_size() for function in edits),
        "maps": maps.read_bytes().count(b"\n") if maps.exists() else 0,
    }


def folder_state(folder: Path, *others: Path) -> dict[str, float]:
    """Bytes of a session's folder, its versions, and all that has no business there or in the `others`."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = [path.name for path in folder.iterdir()]
    versions = [name for name in names if len(name) == VERSION_DIGITS and name.isdigit()]
    left = len(set(names) - {*versions, ".lock"}) + sum(len(list(other.iterdir())) for other in others)
    return {
        "disk_bytes": sum(path.stat().st_size for path in files),
        "files": len(files),
        "versions": len(versions),
        "leftovers": left,
    }


def given_back() -> float:
    """MiB that glibc gives back to the system of what is free: it keeps what threads freed, in an arena for each of them."""
    before = memory()["now"]
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
    return before - memory()["now"]


def array_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(int(np.asarray(leaf).nbytes) for leaf in jax.tree.leaves(tree))
