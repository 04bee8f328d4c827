"""(e) Where the remaining time is: every operation of one warm edit, by part of the edit, by function and by kind.

JAX's profiler names the operation; the compiled program says which function of the package it comes from and what it does.
What a part takes beside operations is the host's: tokens, dispatch, NumPy. Durations are of the wall, so only shares count.
"""

import contextlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.benchmarks.edits import PARTS, QUICK_SHAPE_NAMES, SHAPE_NAMES, Ours, Preparation
from experiments.benchmarks.measuring import Child, Clock
from experiments.benchmarks.plots import bars, figure
from experiments.benchmarks.problem import SHAPES

SEED = 3
COUNT, QUICK_COUNT = 20, 3
SHOWN = 14  # functions in a picture
MARK = "part of the edit: "
OUTER = ("while", "call", "conditional")  # their time is that of the operations in them
PRODUCTS = re.compile(r"dot|custom-call|convolution")
MOVES = re.compile(r"copy|transpose|slice|gather|scatter|broadcast|pad|concatenate|bitcast|iota|reshape")


class Source(NamedTuple):
    """What an operation of a compiled program is."""

    opcode: str
    function: str
    kind: str


def measure(*, quick: bool, report: Callable[[str], None]) -> dict[str, Any]:
    """Shares of each shape's edit."""
    count = QUICK_COUNT if quick else COUNT
    found: dict[str, Any] = {"seed": SEED, "count": count, "shapes": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in QUICK_SHAPE_NAMES if quick else SHAPE_NAMES:
            report(name)
            made = Path(folder) / name
            with Child(Preparation) as preparation:
                preparation("run", made, SHAPES[name], count, SEED)
            with Child(Profiled, made) as ours:
                ours("edit", count)
                found["shapes"][name] = ours("profile", count)
    return found


class Profiled(Ours):
    """The library on a problem, under JAX's profiler."""

    def profile(self, count: int) -> dict[str, Any]:
        """Shares of the time of one edit."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        plain, self._clock = self._clock, Marked()
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                self.edit(count)
            self._clock = plain
            (path,) = Path(folder).rglob("*.xplane.pb")
            data = jax.profiler.ProfileData.from_file(str(path))
        events = [event for plane in data.planes for line in plane.lines for event in line.events]
        programs = [module for program in jax.devices()[0].client.live_executables() for module in program.hlo_modules()]
        return shares(events, {module.name: sources(module.to_string()) for module in programs})


class Marked(Clock):
    """A clock whose parts the profiler sees."""

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        with jax.profiler.TraceAnnotation(MARK + name), super().part(name):
            yield


def shares(events: Iterable[Any], programs: Mapping[str, Mapping[str, Source]]) -> dict[str, Any]:
    """Shares of the whole edit's time by part, by part and function, and by kind of operation."""
    events = list(events)
    windows = {part: [_span(e) for e in events if e.name == MARK + part] for part in (*PARTS[:3], "all")}
    ((begin, end),) = windows.pop("all")
    functions: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    for event in events:
        stats = dict(event.stats)
        if "hlo_op" not in stats:
            continue
        known = programs.get(str(stats["hlo_module"]), {})
        source = known.get(str(stats["hlo_op"]), Source("", "unknown", "unknown"))
        start = event.start_ns
        if source.opcode in OUTER or not begin <= start < end:
            continue
        part = next((part for part, spans in windows.items() if any(a <= start < b for a, b in spans)), "other")
        functions[f"{part}: {source.function}"] += event.duration_ns
        kinds[source.kind] += event.duration_ns
        busy[part] += event.duration_ns
    spent = {part: sum(b - a for a, b in spans) for part, spans in windows.items()}
    spent["other"] = end - begin - sum(spent.values())
    for part, time in spent.items():
        functions[f"{part}: host"] = max(0, time - busy[part])
    kinds["host"] = max(0, end - begin - sum(kinds.values()))
    return {
        name: {key: value / (end - begin) for key, value in sorted(counted.items(), key=lambda item: -item[1])}
        for name, counted in (("parts", spent), ("functions", functions), ("kinds", kinds))
    }


def _span(event: Any) -> tuple[float, float]:
    return event.start_ns, event.start_ns + event.duration_ns


def sources(text: str) -> dict[str, Source]:
    """What every operation of a compiled program's text is; its function is the innermost one of the package."""
    names, functions, locations, frames = (
        _table(text, title) for title in ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
    )

    def function(frame: str | None) -> str:
        seen = set()
        while frame in frames and frame not in seen:
            seen.add(frame)
            place = _fields(locations[_fields(frames[frame])["file_location_id"]])
            if "kedit_jax" in names[place["file_name_id"]]:
                return functions[place["function_name_id"]].strip('"').replace(".<locals>", "")
            frame = _fields(frames[frame]).get("parent_frame_id")
        return "XLA"

    found = {}
    for name, opcode, rest in re.findall(r"^\s*(?:ROOT )?%(\S+) = \S+(?: [^ (]*)*? ([\w-]+)\((.*)$", text, re.MULTILINE):
        frame = re.search(r"stack_frame_id=(\d+)", rest)
        product = PRODUCTS.search(opcode) or "__ynn_fusion" in rest
        kind = "matrix products" if product else "data moved" if MOVES.match(_last(opcode, name)) else "other arithmetic"
        found[name] = Source(opcode, function(frame and frame[1]), kind)
    return found


def _last(opcode: str, name: str) -> str:
    """What an operation ends with; a fusion's name lists its first and last ones."""
    return re.sub(r"_fusion(\.\d+)?$", "", name).rsplit("_", 1)[-1] if opcode == "fusion" else opcode


def _table(text: str, title: str) -> dict[str, str]:
    """Rows "number value" below a title at the top of a program's text."""
    lines = text.split(f"\n{title}\n", 1)
    if len(lines) == 1:
        return {}
    return dict(line.split(" ", 1) for line in lines[1].split("\n\n", 1)[0].splitlines())


def _fields(row: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\d+)", row))


def plot(result: Mapping[str, Any], folder: Path) -> None:
    """The functions that take most of each shape's edit."""
    shapes = result["shapes"]
    title = f"Where the time of an edit of {result['count']} requests goes"
    with figure(folder / "profiles.png", title, columns=2 * len(shapes)) as axes:
        for place, (name, found) in zip(axes[::2], shapes.items(), strict=True):
            most = dict(list(found["functions"].items())[:SHOWN])
            most["all others"] = 1 - sum(most.values())
            bars(place, most, title=f"{name}\nby part and function")
        for place, (name, found) in zip(axes[1::2], shapes.items(), strict=True):
            bars(place, found["kinds"], title=f"{name}\nby kind")
