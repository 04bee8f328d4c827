"""From a file to raw records, one at a time, in memory bounded by the longest of them: JSON lists, JSON Lines, tables."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from kedit_jax.evaluation.datasets.schemas import REQUEST_FIELDS
from kedit_jax.evaluation.records import RecordError

MAX_RECORD = 1 << 24
"""Characters of a record; the longest of the published data sets have some 20,000."""
CHUNK = 1 << 18
MAX_UNPACKED, MAX_RATIO = 1 << 24, 100
"""Bytes that a packed file may always unpack to, and how many times its size beyond that. Text packs to a tenth or so of its
size; gzip can pack a thousand times what it is, and such a file is meant to fill a memory."""
DELIMITERS = ",;\t"
_BLANKS = re.compile(r"[ \t\n\r]*")

Columns = Mapping[str, str | Sequence[str]]
Raw = tuple[str, Any]
"""Where a raw record stands, and the record or the error that reading it raised."""


def raw_records(path: Path, columns: Columns | None = None) -> Iterator[Raw]:
    """The raw records of a file; its form is told by the first character that is no blank.

    Args:
        columns: of a table, as `read_records` takes them; with them the file is read as a table.

    Raises:
        RecordError: the file cannot be read, is no UTF-8, or is broken in a way after which nothing more can be read.
    """
    first = _first_character(path)
    if first == "":
        return
    if first == "[" and columns is None:
        with _text(path, None) as stream:
            yield from _json_list(stream, str(path))
    elif first == "{" and columns is None:
        with _text(path, "\n") as stream:  # str.splitlines would also cut at U+2028 and U+0085, which JSON strings may hold
            yield from _json_lines(stream)
    else:
        with _text(path, "") as stream:
            yield from _table(stream, str(path), columns)


@contextmanager
def _text(path: Path, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """The text of a file, unpacked where it begins as gzip does."""
    try:
        with path.open("rb") as file:
            packed = file.peek(2)[:2] == b"\x1f\x8b"
            data: Any = io.BufferedReader(_Unpacked(file, path.stat().st_size)) if packed else file
            with io.TextIOWrapper(data, encoding="utf-8-sig", newline=newline) as stream:
                yield stream
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RecordError(f"cannot read records from {str(path)!r}: {error}; give UTF-8 text, plain or .gz") from error


class _Unpacked(io.RawIOBase):
    """A gzipped file's content, up to what an honest one holds."""

    def __init__(self, file: Any, size: int) -> None:
        self._content, self._left, self._size = gzip.GzipFile(fileobj=file), max(MAX_UNPACKED, MAX_RATIO * size), size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._content.read1(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"its {self._size:,} bytes unpack to more than {MAX_RATIO} times as many; unpack it yourself")
        buffer[: len(data)] = data
        return len(data)


def _first_character(path: Path) -> str:
    with _text(path, None) as stream:
        while chunk := stream.read(CHUNK):
            if chunk.strip():
                return chunk.lstrip()[0]
    return ""


def _json_lines(stream: io.TextIOWrapper) -> Iterator[Raw]:
    """One raw record a line; blank lines are skipped."""
    for number, line in enumerate(_lines(stream), start=1):
        if line.strip():
            yield f"line {number}", _json(line)


def _lines(stream: io.TextIOWrapper) -> Iterator[str]:
    while line := stream.readline(MAX_RECORD + 1):
        if len(line) > MAX_RECORD:
            raise RecordError(f"a line of more than {MAX_RECORD:,} characters; write one record a line")
        yield line


def _json(text: str) -> Any:
    """What the text holds, or the error that reading it raised."""
    try:
        return json.loads(text.rstrip())
    except (ValueError, RecursionError) as error:
        told = f"{error.msg}: column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        return RecordError(f"not valid JSON ({told}); write one whole object a line, or a list of objects")


def _json_list(stream: io.TextIOWrapper, source: str) -> Iterator[Raw]:
    """The items of a JSON list. After a broken one nothing more can be told apart: that is an error of the whole file."""
    window = _Window(stream, source)
    window.take("[")
    number = 0
    while window.next_character() != "]" or number > 0:
        number += 1
        yield f"record {number}", window.value()
        if window.next_character() == "]":
            break
        window.take(",")
    window.take("]")
    if window.next_character():
        raise window.error("Extra data")


class _Window:
    """The part of a stream of JSON that is being decoded."""

    def __init__(self, stream: io.TextIOWrapper, source: str) -> None:
        self.stream, self.source = stream, source
        self.decoder = json.JSONDecoder()
        self.text, self.at = "", 0
        self.line, self.column = 1, 1  # of the text's first character

    def next_character(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            self.at = _BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def take(self, expected: str) -> None:
        """Go past a character."""
        if self.next_character() != expected:
            raise self.error(f"Expecting {expected!r}")
        self.at += 1

    def value(self) -> Any:
        """Decode one item and go past it."""
        self.next_character()
        while True:
            try:
                found, end = self.decoder.raw_decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                place = self._place(getattr(error, "pos", self.at))  # growing moves the text
                if self._grow():
                    continue
                message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise self._error(message, place) from error
            length = end - self.at
            # a number that ends with the window may go on behind it
            if end == len(self.text) and self._grow():
                continue
            self.at += length
            return found

    def error(self, message: str) -> RecordError:
        """An error here."""
        return self._error(message, self._place(self.at))

    def _error(self, message: str, place: tuple[int, int]) -> RecordError:
        where = f"line {place[0]} column {place[1]}"
        return RecordError(
            f"{self.source!r} is not valid JSON ({message}: {where}); give a list of objects, or one object a line"
        )

    def _place(self, position: int) -> tuple[int, int]:
        """Line and column, in the file, of a position of the text."""
        newlines = self.text.count("\n", 0, position)
        before = self.text.rfind("\n", 0, position)
        return self.line + newlines, position - before if newlines else self.column + position

    def _grow(self) -> bool:
        """Read as much again as is not decoded yet, and drop what is; False at the end of the stream."""
        self.line, self.column = self._place(self.at)
        self.text, self.at = self.text[self.at :], 0
        if len(self.text) > MAX_RECORD:
            raise self.error(f"a record of more than {MAX_RECORD:,} characters")
        more = self.stream.read(max(CHUNK, len(self.text)))
        self.text += more
        return bool(more)


def _table(stream: io.TextIOWrapper, source: str, columns: Columns | None) -> Iterator[Raw]:
    """The rows of a table as raw requests; blank cells and blank rows are left out. Row 1 is the one with the names."""
    lines = _lines(stream)
    blank, header = next((i, line) for i, line in enumerate(lines) if line.strip())
    rows = csv.reader(chain([header], lines), delimiter=max(DELIMITERS, key=header.count), strict=True)
    names = None
    number = blank
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise RecordError(f"{source!r} is no table that can be read: row {number}: {error}") from error
        if names is None:
            names = [name.strip() for name in row]
            wanted = _wanted(names, source, columns)
        elif len(row) != len(names) and any(cell.strip() for cell in row):
            problem = f"{len(row)} cells, but {len(names)} columns are named; put cells that hold the delimiter in quotes"
            yield f"row {number}", RecordError(problem)
        elif any(cell.strip() for cell in row):
            yield f"row {number}", _request(row, wanted)


def _wanted(names: Sequence[str], source: str, columns: Columns | None) -> dict[str, list[int]]:
    """The positions of each field's columns.

    Raises:
        RecordError: listing fields that there are not, columns that are not in the table, or are in it twice.
    """
    if columns is None:
        columns = {name: name for name in names if name in REQUEST_FIELDS}
    asked = {field: [name] if isinstance(name, str) else list(name) for field, name in columns.items()}
    problems = [
        f"there is no field {field!r}; there are {', '.join(REQUEST_FIELDS)}"
        for field in asked
        if field not in REQUEST_FIELDS
    ]
    for field, wanted in asked.items():
        for name in wanted:
            if names.count(name) != 1:
                problems.append(
                    f"{field!r}: column {name!r} is in the table {names.count(name)} times; its columns are {names!r:.300}"
                )
        if len(wanted) != 1 and field != "paraphrases":
            problems.append(f"{field!r} needs one column, not {len(wanted)}")
    missing = [field for field in ("prompt", "target") if field not in asked]
    if missing:
        problems.append(
            f"which columns hold {' and '.join(map(repr, missing))}? the first row has {names!r:.300}; name them so, or "
            'give columns={"prompt": ..., "target": ...}. (JSON begins with [ or {)'
        )
    if problems:
        raise RecordError.listing(f"{source!r} cannot be read as a table:", problems)
    return {field: [names.index(name) for name in wanted] for field, wanted in asked.items()}


def _request(row: Sequence[str], wanted: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """The fields of a request from the cells of a row."""
    found: dict[str, Any] = {}
    for field, places in wanted.items():
        cells = [row[i] for i in places if row[i].strip()]
        if field == "paraphrases":
            found[field] = cells
        elif cells:
            found[field] = _number(cells[0]) if field == "weight" else cells[0]
    return found


def _number(cell: str) -> float | str:
    """The number in a cell; other text stays, to be shown as what is wrong."""
    try:
        return float(cell)
    except ValueError:
        return cell
