"""Results on disk: one file of JSON lines a run, written line by line, continued where it stopped.

The first line is the header: all that decides what follows, and where it was computed (`PLACE`). A line is written whole and
flushed; one that a kill cut off has no line break, and is dropped when the run goes on. The last line says that the run is
complete. Only the names in `TIMES` differ between a run that was interrupted and one that was not.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedit_jax.errors import KeditError

FORMAT = 1
TIMES = ("seconds", "cpu_seconds")
PLACE = ("versions", "hardware")
"""Parts of the header that say where a run was computed, and may differ when it is continued."""
DIGITS = 6
"""Of stored numbers: what is measured is not known better, and the files stay small."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """A run as it is stored.

    Attributes:
        header: what it was computed from.
        lines: what was measured, in order.
        complete: whether it came to its end.
    """

    header: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    complete: bool

    @property
    def name(self) -> str:
        return str(self.header["run"])

    @property
    def seed(self) -> int:
        return int(self.header["seed"])

    @property
    def what(self) -> Mapping[str, Any]:
        return self.header["what"]

    def last(self, measure: str) -> float | None:
        """The measure at the last line that has it."""
        found = [line[measure] for line in self.lines if line.get(measure) is not None]
        return float(found[-1]) if found else None

    def series(self, measure: str, x: str = "edits") -> tuple[list[float], list[float]]:
        """(x, measure) over the lines that have both."""
        pairs = [(line[x], line[measure]) for line in self.lines if None not in (line.get(x), line.get(measure))]
        return [float(a) for a, _ in pairs], [float(b) for _, b in pairs]


@dataclass
class Log:
    """The file of a run that is being computed.

    Attributes:
        lines: what it holds beside the header.
        complete: nothing is left to do.
    """

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    _began: tuple[float, float] = field(default_factory=lambda: (time.perf_counter(), time.process_time()))

    @classmethod
    def open(cls, path: Path, header: Mapping[str, Any], say: Say = print) -> "Log":
        """The run's file, begun with this header or continued.

        Raises:
            KeditError: a file of another header (what differs is listed), a damaged line, or one that cannot be written.
        """
        header = _plain({"format": FORMAT, **header})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _mended(path, say)
            if not kept:
                path.write_text(_text(header), encoding="utf-8")
                return cls(path)
        except OSError as error:
            raise KeditError(f"cannot write results to {str(path)!r}: {error}; choose another --out") from error
        result = parse(kept, str(path))
        _check_same(result.header, header, path)
        return cls(path, [dict(line) for line in result.lines], result.complete)

    @property
    def session(self) -> Path:
        """Folder of the run's session while it is unfinished."""
        return self.path.with_suffix(".session")

    def begin(self) -> None:
        """Count time from now on."""
        self._began = (time.perf_counter(), time.process_time())

    def append(self, line: Mapping[str, Any]) -> None:
        """Store a line, with the time since the one before."""
        now = (time.perf_counter(), time.process_time())
        times = {name: round(b - a, 3) for name, a, b in zip(TIMES, self._began, now, strict=True)}
        self._write({**_plain(line), **times})
        self.lines.append({**_plain(line), **times})
        self.begin()

    def finish(self) -> None:
        """Mark the run as complete, and drop what only its continuation needed."""
        self._write({"end": len(self.lines)})
        self.complete = True
        shutil.rmtree(self.session, ignore_errors=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_text(line))
            file.flush()
            os.fsync(file.fileno())


def parse(text: str, source: str) -> Result:
    """A run from its file's text. Raises KeditError naming the line that cannot be read."""
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            read = json.loads(line)
        except ValueError as error:
            raise KeditError(f"{source}, line {number} is damaged ({error}); delete the file to compute it anew") from error
        if not isinstance(read, dict):
            raise KeditError(f"{source}, line {number} holds {line!r:.60}, no object; delete the file to compute it anew")
        lines.append(read)
    if not lines or lines[0].get("format") != FORMAT:
        raise KeditError(f"{source} does not begin with a header of format {FORMAT}; it is no result of this program")
    complete = "end" in lines[-1]
    return Result(lines[0], lines[1:-1] if complete else lines[1:], complete)


def read_results(folder: Path) -> list[Result]:
    """All runs below a folder, by path; a half-written last line is left out."""
    return [parse(_whole(path), str(path)) for path in sorted(folder.rglob("*.jsonl"))]


def _whole(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return text[: text.rfind("\n") + 1]


def _mended(path: Path, say: Say) -> str:
    """The file's text without a half-written last line, which is taken out of the file, too."""
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        say(f"{path.name}: dropped a half-written last line ({text[len(whole) :]!r:.60}); the run goes on behind it")
        partial = path.with_suffix(".partial")
        partial.write_text(whole, encoding="utf-8")
        os.replace(partial, path)
    return whole


def _check_same(stored: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    differing = [
        f"{name}: stored {old}, given {new}"
        for name, old, new in _differences(stored, given)
        if name.split(".")[0] not in PLACE
    ]
    if differing:
        raise KeditError.listing(
            f"{str(path)!r} was computed from something else; give another --out, or delete it to compute it anew:",
            differing,
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif old != new:
        yield name, f"{old!r:.80}", f"{new!r:.80}"


def _plain(value: Any) -> Any:
    """What JSON holds: numbers rounded to `DIGITS`, None for those that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bool) or value is None or isinstance(value, int | str):
        return value
    number = float(value)
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n"
