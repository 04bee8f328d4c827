"""What several commands share: their options, and how they open models and stored sessions."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kedit_jax.checkpoint import load_session, read_manifest
from kedit_jax.editing.moments import moments_path, read_moments
from kedit_jax.editing.requests import EditRequest, read_requests
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import is_request_file, read_records
from kedit_jax.models import Decoder, load

console = Console()

Model = Annotated[str, typer.Argument(help="a Hugging Face directory (config.json, safetensors, tokenizer) or hub id")]
Session = Annotated[Path, typer.Option(help="the folder that holds the session")]
MomentsDir = Annotated[Path | None, typer.Option(help="folder of stored moments; by default in the session's folder")]
Dtype = Annotated[str | None, typer.Option(help="of the model: float32, bfloat16, float16; as stored by default")]
Conflicts = Annotated[
    str | None,
    typer.Option(help="facts that contradict each other: latest, first, merge, reject or keep; latest by default"),
]


def lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises KeditError where it cannot be read."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise KeditError(f"cannot read {str(path)!r}: {error}") from error


def read_facts(source: str, columns: str | None = None) -> list[EditRequest]:
    """Facts to edit: our own JSONL, or any data set that `kedit_jax.evaluation.read_records` knows, a table among them."""
    if columns is not None:
        pairs = [part.partition("=") for part in columns.split(",")]
        if not all(field and column for field, _, column in pairs):
            raise KeditError(f"columns {columns!r} must be given as field=column, as prompt=Sentence,target=Correct")
        return [record.request() for record in read_records(source, columns={field: column for field, _, column in pairs})]
    if is_request_file(source):  # it leaves out ids at will, which a session then gives
        return read_requests(source)
    return [record.request() for record in read_records(source)]


def load_for(session: Path, model: str, dtype: str | None) -> tuple[Decoder, Any]:
    """The model in the dtype that the session was begun with, unless another one is asked for."""
    return load(model, dtype=dtype or read_manifest(session)["model"]["dtype"])


def open_session(session: Path, model: Decoder, tokenizer: Any, moments: Path | None = None) -> EditSession:
    """A stored session with the moments it was started with, found by their fingerprint in its folder or in `moments`."""
    folder = moments or session / "moments"
    path = moments_path(folder, read_manifest(session)["moments"])
    if not path.exists():
        raise KeditError(f"the session's moments are not in {str(folder)!r}; give the folder they are in with --moments")
    return load_session(session, model, tokenizer, read_moments(path))
