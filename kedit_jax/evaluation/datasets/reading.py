"""Reading and writing sets of records."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kedit_jax.editing.requests import encodable
from kedit_jax.errors import KeditError, shown
from kedit_jax.evaluation.datasets.fields import Fields
from kedit_jax.evaluation.datasets.files import Columns, raw_records
from kedit_jax.evaluation.datasets.hub import HUB, check_sum, fetch
from kedit_jax.evaluation.datasets.schemas import SCHEMAS, ZSRE_TARGETS, Reading, Schema, recognise
from kedit_jax.evaluation.datasets.subject import Finder, longest_shared_span
from kedit_jax.evaluation.records import Record, RecordError

MAX_LISTED = 1000
"""Problems that an error lists; a file with more of them is another file than was meant."""


def parse_records(
    raws: Iterable[Any],
    source: str = "records",
    *,
    finder: Finder | None = longest_shared_span,
    zsre_target: str = "answers",
    left_out: list[str] | None = None,
) -> list[Record]:
    """Records from raw ones (the dicts that JSON gives), in their order, which is the order of the edits.

    The schema is told by the fields (see `kedit_jax.evaluation.datasets`). Blanks around targets are removed: scoring puts
    exactly one space before a target. Keys outside the schema are kept in `Record.extra`.

    Args:
        raws: one raw record each; an exception stands for a record that could not be read.
        source: name of the whole, for the error.
        finder: proposes the subject of a record that has none; None proposes nothing.
        zsre_target: what edits of zsRE's records write: "answers" or "alt".
        left_out: a list to which the problems are added; the records that have them are left out then, and nothing is raised
            as long as one record can be used.

    Raises:
        RecordError: every problem of every record, with the record's number from 1, its id, the field and the mend:
            missing or wrong fields, a subject that is not in its prompt, a new object that is the true one, records of
            several schemas, a case id used twice (also as a number once and as text once: both name the same edit).
    """
    placed = ((f"record {number}", raw) for number, raw in enumerate(raws, start=1))
    return _collect(placed, source, _reading(finder, zsre_target), left_out)


def read_records(
    source: str | Path,
    *,
    columns: Columns | None = None,
    finder: Finder | None = longest_shared_span,
    zsre_target: str = "answers",
    sha256: str | None = None,
    left_out: list[str] | None = None,
) -> list[Record]:
    """Read records from a file or by name from a hub, whatever its form and schema (see `kedit_jax.evaluation.datasets`).

    Args:
        source: a path, or `hf://datasets/OWNER/NAME[@REVISION]/FILE`, which needs `sha256` (see `fetch`).
        columns: of a table, which column holds which field of a request: {"prompt": "Sentence", "target": "Correct", ...};
            several columns may hold paraphrases. By default columns have the names of the fields.
        finder, zsre_target, left_out: as in `parse_records`.
        sha256: the file's checksum, checked before anything is read.

    Raises:
        RecordError: the file cannot be read or is another one, holds no record, or has problems: all listed.
    """
    reading = _reading(finder, zsre_target)
    if str(source).startswith(HUB):
        path = fetch(str(source), sha256=sha256)
    else:
        path = Path(source)
        if sha256 is not None:
            check_sum(path, sha256)
    return _collect(raw_records(path, columns), str(source), reading, left_out)


def write_records(path: str | Path, records: Iterable[Record]) -> None:
    """Write records as JSON Lines that `read_records` reads back."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            text = json.dumps(record.to_dict(), ensure_ascii=False)
            if not encodable(text):  # halves of characters, in fields that nothing here reads: as escapes they can be kept
                text = json.dumps(record.to_dict())
            file.write(text + "\n")


def _reading(finder: Finder | None, zsre_target: str) -> Reading:
    if zsre_target not in ZSRE_TARGETS:
        raise RecordError(f"zsre_target {zsre_target!r} is not known; give one of {', '.join(ZSRE_TARGETS)}")
    return Reading(finder, zsre_target)


def _collect(raws: Iterable[tuple[str, Any]], source: str, reading: Reading, left_out: list[str] | None) -> list[Record]:
    """The records of all raw ones, or all problems."""
    records: list[Record] = []
    problems: list[str] = []
    unlisted = 0
    first_seen: dict[str, str] = {}
    schema: Schema | None = None
    for number, (place, raw) in enumerate(raws):
        fields = Fields()
        found, own = _one(fields, raw, number, reading, schema)
        schema = schema or own
        name = raw.get("case_id", raw.get("id")) if isinstance(raw, Mapping) else None
        told = f"{place} (case_id {shown(name):.60})" if isinstance(name, int | str) and name != "" else place
        for record in found:
            _check_unused(fields, str(record.case_id), first_seen, place)
        if left_out is None and len(problems) >= MAX_LISTED:  # a small file can unpack to millions of them
            unlisted += len(fields.problems)
            records = []
        else:
            problems += [f"{told}: {problem}" for problem in fields.problems]
            records += [] if fields.problems else found
    if left_out is not None:
        left_out += problems
    if problems and (left_out is None or not records):
        unlisted += len(problems[MAX_LISTED:])
        more = [f"and {unlisted:,} more"] if unlisted else []
        raise RecordError.listing(f"{source}: nothing was read, mend these first:", problems[:MAX_LISTED] + more)
    if not records:
        raise RecordError(f"{source} holds no records; give at least one")
    return records


def _one(
    fields: Fields, raw: Any, number: int, reading: Reading, schema: Schema | None
) -> tuple[list[Record], Schema | None]:
    """The records of a raw one and its schema, which must be the one that was told before, if one was."""
    if isinstance(raw, Exception):
        fields.problems.append(str(raw) if isinstance(raw, KeditError) else f"not valid JSON ({raw})")
        return [], None
    try:
        if not isinstance(raw, Mapping):
            fields.problems.append(f"must be an object with the fields of a record, not {shown(raw):.60}")
            return [], None
        own = recognise(raw)
        if own is not None and schema is not None and own.name != schema.name:
            known = f"the records before it in that of {schema.name}"
            fields.problems.append(f"in the schema of {own.name}, but {known}; split the file")
            return [], None
        used = own or schema
        if used is None:
            fields.problems.append(f"no known schema: none of the fields {shown(list(raw)):.300} is one of {_signs()}")
            return [], None
        return used.read(fields, raw, number, reading), used
    except RecursionError:
        fields.problems.append("nested too deeply")
    return [], None


def _signs() -> str:
    return ", ".join(f"{schema.field!r} ({schema.name})" for schema in SCHEMAS)


def _check_unused(fields: Fields, name: str, first_seen: dict[str, str], place: str) -> None:
    """Note a case id; a problem where it was there before."""
    if name in first_seen:
        fields.problems.append(f"'case_id' is already used by {first_seen[name]}; give every record its own")
    first_seen.setdefault(name, place)
