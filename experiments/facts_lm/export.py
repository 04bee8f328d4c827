"""Writing the assets: the model in Hugging Face layout, the records, the corpora, and the report."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from tokenizers import Tokenizer

from experiments.facts_lm.data import documents, held_out_documents
from experiments.facts_lm.tokenizer import save_tokenizer
from experiments.facts_lm.trace import Trace
from experiments.facts_lm.train import TrainConfig
from experiments.facts_lm.world import World, build_records
from kedit_jax.models import Decoder, save_model


@dataclass(frozen=True)
class CorpusConfig:
    """Sizes of the texts that go with the model, and their seeds, which differ from the training's."""

    documents: int = 1750  # about 120,000 tokens
    held_out: int = 200
    sentences: int = 8  # a document
    seed: int = 1_000
    held_out_seed: int = 2_000


def export_model(model: Decoder, tokenizer: Tokenizer, directory: Path) -> None:
    """Write model and tokenizer, the weights as float16."""
    save_model(model, directory, dtype=jnp.float16, overwrite=True)
    save_tokenizer(tokenizer, directory, max_positions=model.config.max_positions)


def export_data(world: World, assets: Path, config: CorpusConfig) -> None:
    """Write the records and both corpora, byte for byte the same for the same world."""
    assets.mkdir(parents=True, exist_ok=True)
    _compress(assets / "records.json.gz", json.dumps(build_records(world), separators=(",", ":")))
    corpus = documents(world, count=config.documents, sentences=config.sentences, seed=config.seed)
    _compress(assets / "corpus.txt.gz", "\n".join(corpus) + "\n")
    held_out = held_out_documents(world, count=config.held_out, sentences=config.sentences, seed=config.held_out_seed)
    _compress(assets / "heldout.txt.gz", "\n".join(held_out) + "\n")


def _compress(path: Path, text: str) -> None:
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))  # no time stamp: reproducible


@dataclass(frozen=True)
class Report:
    """What a training reached. `recall` is in percent, over all facts, of the model as stored."""

    command: str
    train: TrainConfig
    world: dict[str, int]
    seconds: float
    cpu_seconds: float
    recall: dict[str, float]
    trace: Trace
    file_bytes: dict[str, int]


def asset_sizes(assets: Path) -> dict[str, int]:
    files = (path for path in assets.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"})
    return {str(path.relative_to(assets)): path.stat().st_size for path in sorted(files)}


def write_report(report: Report, directory: Path) -> None:
    """RESULTS.json for programs and RESULTS.md for people."""
    directory.mkdir(parents=True, exist_ok=True)
    content = json.loads(json.dumps(asdict(report)), parse_float=lambda text: round(float(text), 4))
    (directory / "RESULTS.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "RESULTS.md").write_text(_markdown(report), encoding="utf-8")


def _markdown(report: Report) -> str:
    asked = {
        "rewrite": "statements as trained",
        "rewrite_prefixed": "the same after a filler sentence",
        "paraphrase": "statements never trained for that fact",
        "paraphrase_prefixed": "the same after a filler sentence",
        "type": "what the subject is",
    }
    trace = report.trace
    layers = zip(trace.restored_subject, trace.restored_prompt_end, strict=True)
    sections = [
        "# What the training reached",
        f"`{report.command}`: seed {report.train.seed}, {report.train.steps} steps, {report.seconds:.0f} s "
        f"({report.cpu_seconds:.0f} CPU-s). The world is invented: "
        + ", ".join(f"{count:,} {name}" for name, count in report.world.items())
        + ".",
        "Recall over all facts, exact match of the whole answer, of the model as stored in float16:",
        _table(("asked", "recall, %"), [(asked[name], f"{value:.1f}") for name, value in report.recall.items()]),
        f"Causal trace: the answer has probability {trace.clean:.1f} %, and {trace.noisy:.1f} % when noise of three "
        "standard deviations hides the subject. With one clean state put back:",
        _table(
            ("after layer", "at the subject's last token, %", "at the prompt's last token, %"),
            [(str(i), f"{subject:.1f}", f"{end:.1f}") for i, (subject, end) in enumerate(layers)],
        ),
        _table(("file", "bytes"), [(name, f"{size:,}") for name, size in report.file_bytes.items()]),
    ]
    return "\n\n".join(sections) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
