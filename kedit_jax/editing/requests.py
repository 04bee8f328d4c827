"""Edit requests: what a user wants a model to say, checked before any model runs."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kedit_jax.errors import RequestError, shown

SLOT = "{}"


@dataclass(frozen=True)
class EditRequest:
    """One fact to write: after `prompt` with `subject` in its slot, the model shall continue with `target`.

    Attributes:
        prompt: text with exactly one `{}`, the place of the subject. Other braces are literal.
        subject: what the fact is about; braces are literal.
        target: the new object, without the space that joins it to the prompt; braces are literal.
        id: name of the fact in a session, needed to retract it; the session assigns one where it is None.
        relation: name of the relation, for finding conflicting facts.
        old_target: what the model says today, for reports.
        weight: how much this fact counts against the prior and the other facts; 1 as published, > 0.

    Raises:
        RequestError: listing everything that is wrong with the request.
    """

    prompt: str
    subject: str
    target: str
    id: str | None = None
    relation: str | None = None
    old_target: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        problems = request_problems(asdict(self))
        if problems:
            raise RequestError.listing(f"unusable edit request {self.id or self.subject!r}:", problems)

    @property
    def text(self) -> str:
        """The prompt with the subject in its slot."""
        return self.prompt.replace(SLOT, self.subject)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as `read_requests` reads them back."""
        values = asdict(self)
        return {field.name: values[field.name] for field in fields(self) if values[field.name] != field.default}


REQUIRED = ("prompt", "subject", "target")
KNOWN = tuple(field.name for field in fields(EditRequest))


def request_problems(record: Mapping[str, Any]) -> list[str]:
    """Everything wrong with the raw fields of one request, each with its mend."""
    problems = [f"unknown field {shown(name)}; known are {', '.join(KNOWN)}" for name in record if name not in KNOWN]
    for name in KNOWN:
        value = record.get(name)
        if value is None:
            if name in REQUIRED:
                problems.append(f"{name!r} is missing")
        elif name == "weight":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
                problems.append(f"weight {shown(value)} must be a number > 0; leave a fact out to give it no weight")
        elif not isinstance(value, str):
            problems.append(f"{name!r} must be text, not {shown(value)}")
        elif not encodable(value):
            problems.append(f"{name!r} {value!r:.60} holds half a character (a lone surrogate); write it as UTF-8")
        elif name in REQUIRED and not value.strip():
            problems.append(f"{name!r} is empty")
        elif name == "prompt" and value.count(SLOT) != 1:
            problems.append(f"prompt {value!r} has {value.count(SLOT)} slots; put exactly one {SLOT} at the subject")
    return problems


def encodable(text: str) -> bool:
    """Whether it can be written at all: JSON may hold halves of characters, which UTF-8 does not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unique_ids(requests: Sequence[EditRequest], taken: Iterable[str] = ()) -> None:
    """Raise a RequestError that lists every id used twice, or already among `taken`."""
    seen, problems = set(taken), []
    for position, request in enumerate(requests, start=1):
        if request.id is None:
            continue
        if request.id in seen:
            problems.append(f"request {position}: id {request.id!r} is already used; give every fact its own")
        seen.add(request.id)
    if problems:
        raise RequestError.listing("duplicate ids:", problems)


def parse_requests(records: Iterable[tuple[str, Any]], source: str) -> list[EditRequest]:
    """Requests from (place, raw record) pairs; every problem of every record in one RequestError.

    Args:
        records: where each record stands ("line 3") and what was read there: a mapping of the request's fields,
            or an exception that reading it raised.
        source: name of the whole, for the error.
    """
    requests, problems = [], []
    first_seen: dict[str, str] = {}
    for place, record in records:
        if isinstance(record, Exception):
            found = [f"not valid JSON ({record})"]
        elif not isinstance(record, Mapping):
            found = [f"must be an object with {', '.join(REQUIRED)}, not {shown(record):.60}"]
        else:
            found = request_problems(record)
            name = record.get("id")
            if isinstance(name, str) and name in first_seen:
                found.append(f"id {name!r} is already used at {first_seen[name]}; give every fact its own")
            elif isinstance(name, str):
                first_seen[name] = place
        if found:
            problems += [f"{place}: {problem}" for problem in found]
        else:
            requests.append(EditRequest(**{name: value for name, value in record.items() if value is not None}))
    if problems:
        raise RequestError.listing(f"{source}: nothing was read, mend these first:", problems)
    return requests


def read_requests(path: str | Path) -> list[EditRequest]:
    """Read a JSONL file of requests: one object a line with `prompt`, `subject`, `target` and, at will, `id`,
    `relation`, `old_target`, `weight`. Blank lines are skipped.

    Raises:
        RequestError: the file cannot be read, holds no request, or has problems: all listed with line numbers.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also split at U+2028 inside a string
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read requests from {str(path)!r}: {error}") from error
    records = [(f"line {number}", _json(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    if not records:
        raise RequestError(f"{str(path)!r} holds no requests; write one JSON object a line")
    return parse_requests(records, str(path))


def _json(line: str) -> Any:
    """What the line holds, or the error that reading it raised."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def write_requests(path: str | Path, requests: Sequence[EditRequest]) -> None:
    """Write requests as JSONL that `read_requests` reads back."""
    Path(path).write_text(
        "".join(json.dumps(request.to_dict(), ensure_ascii=False) + "\n" for request in requests), encoding="utf-8"
    )
