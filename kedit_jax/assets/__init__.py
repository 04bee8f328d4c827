"""The embedded model, its tokenizer and its data: a small GPT-2-shaped model of an invented world.

Everything here was generated and trained by `python -m experiments.facts_lm`; no name or fact is real. `folder` is that of
other assets which it wrote, in place of the package's own.
"""

import gzip
import json
from importlib import resources
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def model_dir(folder: Path | None = None) -> Path:
    """The directory of the model and its tokenizer, in Hugging Face layout."""
    return _asset("model", folder)


def records(folder: Path | None = None) -> list[Record]:
    """Editable facts in CounterFact's schema; the first ones have one for each subject.

    Beyond CounterFact's fields, `same_subject` lists other facts of the subject as {"prompt", "target"}.
    """
    return json.loads(_text("records.json.gz", folder))


def corpus(folder: Path | None = None) -> list[str]:
    """Documents of the kind that the model was trained on, for the second moments of its keys (some 120,000 tokens)."""
    return _text("corpus.txt.gz", folder).splitlines()


def heldout(folder: Path | None = None) -> list[str]:
    """Documents that the model was not trained on, about nothing that the records edit: for perplexity."""
    return _text("heldout.txt.gz", folder).splitlines()


def _asset(name: str, folder: Path | None) -> Path:
    return Path(str(resources.files(__package__).joinpath(name))) if folder is None else folder / name


def _text(name: str, folder: Path | None) -> str:
    return gzip.decompress(_asset(name, folder).read_bytes()).decode("utf-8")
