"""What several commands share: their options, and how they open models and stored sessions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kedit_jax import hosts
from kedit_jax.checkpoint import load_session, read_manifest
from kedit_jax.cli.text import escape
from kedit_jax.editing.moments import moments_path, read_moments
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import Record, read_records
from kedit_jax.models import Decoder, load, make_mesh
from kedit_jax.models.spread import DATA, MODEL

console = Console()
MAX_LINE = 2**24
"""Characters of a document, which is held in memory as a whole."""


if TYPE_CHECKING:
    Context = typer.Context
else:  # what a group of commands is given is the base class, and the tests check annotations
    Context = typer.Context.__mro__[1]


@dataclass(frozen=True)
class Run:
    """What options before the command say: it is in the context that typer hands down.

    Attributes:
        mesh: axes of the mesh that models lie on, `data` and `model`; None for one device.
    """

    mesh: dict[str, int] | None = None


Model = Annotated[str, typer.Argument(help="a Hugging Face directory (config.json, safetensors, tokenizer) or hub id")]
Session = Annotated[Path, typer.Option(help="the folder that holds the session")]
MomentsDir = Annotated[Path | None, typer.Option(help="folder of stored moments; by default in the session's folder")]
Dtype = Annotated[str | None, typer.Option(help="of the model: float32, bfloat16, float16; as stored by default")]
Conflicts = Annotated[
    str | None,
    typer.Option(help="facts that contradict each other: latest, first, merge, reject or keep; latest by default"),
]

Columns = Annotated[str | None, typer.Option(help="of a table: prompt=Sentence,target=Correct,subject=Name")]
Sha256 = Annotated[str | None, typer.Option(help="checksum of the file; needed for hf://...")]
ZsreTarget = Annotated[str, typer.Option(help="what edits of zsRE write: answers, or alt as EasyEdit does")]


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are not blank, read as they are asked for. Raises KeditError where it cannot be."""
    try:
        with path.open(encoding="utf-8") as file:
            while part := file.readline(MAX_LINE + 1):
                if len(part) > MAX_LINE:
                    raise OSError(f"a line has more than {MAX_LINE:,} characters; write a document a line")
                yield from (line for line in part.splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise KeditError(f"cannot read {str(path)!r}: {error}") from error


def read_facts(source: str, columns: str | None, sha256: str | None, zsre_target: str) -> list[Record]:
    """Records from any data set or table that `kedit_jax.evaluation.read_records` knows, told by content."""
    return read_records(source, columns=parse_columns(columns), sha256=sha256, zsre_target=zsre_target)


def say_unused(file: Path, unused: Mapping[str, object]) -> None:
    """What a file of settings says that means nothing here."""
    if unused:
        told = ", ".join(f"{name}={value}" for name, value in unused.items())
        console.print(f"not used of {escape(str(file))}: {escape(told)}")


def parse_columns(text: str | None) -> dict[str, str | list[str]] | None:
    """field=column pairs; a field named several times takes several columns. Raises KeditError."""
    if text is None:
        return None
    found: dict[str, list[str]] = {}
    for part in text.split(","):
        name, equals, column = part.partition("=")
        if not (name.strip() and equals and column.strip()):
            raise KeditError(f"columns {text!r} must be given as field=column, as prompt=Sentence,target=Correct")
        found.setdefault(name.strip(), []).append(column.strip())
    return {name: columns[0] if len(columns) == 1 else columns for name, columns in found.items()}


def parse_layers(text: str) -> tuple[int, ...]:
    """Numbers of layers, each once. Raises KeditError."""
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise KeditError(f"{text!r} is no list of layers; write numbers such as 3,4,5") from error
    if len(set(layers)) < len(layers):
        raise KeditError(f"layers {text} name one twice")
    return layers


def parse_mesh(text: str) -> dict[str, int]:
    """The axes of a mesh, as data=2,model=4. Raises KeditError."""
    pairs = [part.partition("=") for part in text.split(",")]
    found = {name.strip(): size.strip() for name, _, size in pairs}
    whole = all(size.isdigit() and int(size) for size in found.values())
    if len(found) < len(pairs) or set(found) - {DATA, MODEL} or not whole:
        raise KeditError(f"mesh {text!r} must be written as data=2,model=4, with whole numbers from 1 on")
    return {name: int(size) for name, size in found.items()}


def load_here(context: Context, model: str, dtype: str | None) -> tuple[Decoder, Any]:
    """A model and its tokenizer, on the mesh that options before the command ask for."""
    axes = context.obj.mesh
    if axes is None and hosts.count() > 1:
        axes = {DATA: hosts.count()}
    return load(model, dtype=dtype, mesh=None if axes is None else make_mesh(**axes))


def load_for(context: Context, session: Path, model: str, dtype: str | None) -> tuple[Decoder, Any]:
    """The model in the dtype that the session was begun with, unless another one is asked for."""
    return load_here(context, model, dtype or read_manifest(session)["model"]["dtype"])


def open_session(session: Path, model: Decoder, tokenizer: Any, moments: Path | None = None) -> EditSession:
    """A stored session with the moments it was started with, found by their fingerprint in its folder or in `moments`."""
    folder = moments or session / "moments"
    path = moments_path(folder, read_manifest(session)["moments"])
    if not path.exists():
        raise KeditError(f"the session's moments are not in {str(folder)!r}; give the folder they are in with --moments")
    return load_session(session, model, tokenizer, read_moments(path), priors=folder)
