"""`python -m experiments.export.roundtrip`: edit a checkpoint, export it in every form, reload it in torch, compare.

The checkpoint has GPT-2 small's shape and random weights, the tokenizer is GPT-2's own, the facts are CounterFact's. What
transformers and peft compute from the exported files is compared with the edited model here, logit by logit, on every
rewrite, paraphrase and neighbourhood prompt, and fact by fact. Nothing but the numbers is kept.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
import typer
from rich.console import Console

from kedit_jax.delta import apply_edits
from kedit_jax.editing.moments import compute_moments
from kedit_jax.editing.session import EditSession, start_session
from kedit_jax.editing.settings import EditSettings
from kedit_jax.editing.values import ValueSettings
from kedit_jax.evaluation import Record, read_records
from kedit_jax.export import (
    AdapterPlan,
    efficacy_of,
    export_adapter,
    export_merged,
    load_delta,
    plan_adapter,
    save_delta,
)
from kedit_jax.models import Decoder, load, load_model, model_fingerprint

REPORTS = Path(__file__).resolve().parent
ROWS = 16  # prompts of one forward pass: their logits take 16 x 50257 x 4 bytes a token
TOLERANCE = 1e-4  # of logits in float32


@dataclass
class Shape:
    """Of the checkpoint; the defaults are GPT-2 small's."""

    layers: int = 12
    width: int = 768
    heads: int = 12


@dataclass
class Numbers:
    """What was measured, by name, and how long each stage took."""

    about: dict[str, Any] = field(default_factory=dict)
    logits: dict[str, float] = field(default_factory=dict)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    errors: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, console: Console) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 1)
        console.print(f"{name}: {self.seconds[name]} s")


def make_checkpoint(folder: Path, tokenizer: Path, shape: Shape, std: float, seed: int) -> None:
    """Random weights in transformers' own files, with the tokenizer beside them."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_layer=shape.layers, n_embd=shape.width, n_head=shape.heads, initializer_range=std, vocab_size=50257
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder, max_shard_size="200MB")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"):
        if (tokenizer / file).exists():
            shutil.copyfile(tokenizer / file, folder / file)


def edit(model: Decoder, tokenizer: Any, records: list[Record], corpus: list[str], settings: EditSettings) -> EditSession:
    """The facts written in two batches, so that the second is solved with the first as its history."""
    moments = compute_moments(model, tokenizer, corpus, settings.layers, max_tokens=10 * model.config.d_ff)
    session = start_session(model, tokenizer, moments, settings)
    half = -(-len(records) // 2)
    for batch in (records[:half], records[half:]):
        session, _ = session.edit([record.request() for record in batch])
    return session


def texts_of(records: list[Record]) -> list[str]:
    """Every prompt, the rewrites with their target behind them."""
    found = []
    for record in records:
        found += [f"{record.rewrite_prompt} {record.target_new}", *record.paraphrase_prompts, *record.neighborhood_prompts]
    return list(dict.fromkeys(found))


class Rows:
    """Prompts in batches of one shape, padded on the right."""

    def __init__(self, texts: list[str], tokenizer: Any) -> None:
        self.ids = [tokenizer(text)["input_ids"] for text in texts]
        self.width = max(map(len, self.ids))

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin in range(0, len(self.ids), ROWS):
            tokens, valid = np.zeros((ROWS, self.width), np.int32), np.zeros((ROWS, self.width), bool)
            for row, ids in enumerate(self.ids[begin : begin + ROWS]):
                tokens[row, : len(ids)], valid[row, : len(ids)] = ids, True
            yield tokens, valid


def compare(model: Decoder, oracle: Any, rows: Rows) -> tuple[float, float]:
    """Largest |difference| of logits over all tokens of all prompts, and the largest |logit|."""
    worst = largest = 0.0
    for tokens, valid in rows:
        ours = np.asarray(model(jnp.asarray(tokens), jnp.asarray(valid)), np.float32)[valid]
        with torch.no_grad():
            theirs = oracle(torch.tensor(tokens).long(), attention_mask=torch.tensor(valid).long()).logits
        worst = max(worst, float(np.abs(ours - theirs.float().numpy()[valid]).max()))
        largest = max(largest, float(np.abs(ours).max()))
    return worst, largest


def facts_in_torch(oracle: Any, records: list[Record], tokenizer: Any) -> dict[str, float]:
    """Probability per target token and exact match of the new objects, computed from torch's logits alone."""
    probabilities, matches = [], []
    for record in records:
        prompt = tokenizer(record.rewrite_prompt)["input_ids"]
        whole = tokenizer(f"{record.rewrite_prompt} {record.target_new}")["input_ids"]
        with torch.no_grad():
            logits = oracle(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].float()
        target = torch.tensor(whole[len(prompt) :])
        nll = torch.nn.functional.cross_entropy(logits, target)
        probabilities.append(float(torch.exp(-nll)))
        matches.append(bool((logits.argmax(-1) == target).all()))
    return {"probability": float(np.mean(probabilities)), "exact_match": float(np.mean(matches))}


def load_torch(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def check_forms(session: EditSession, base: Path, work: Path, rows: Rows, records: list[Record], found: Numbers) -> None:
    """Every form of export, written and read back."""
    tokenizer = session.tokenizer
    merged = export_merged(base, session, work / "merged")
    oracle = load_torch(merged.folder)
    found.logits["merged, float32"], found.about["largest logit"] = compare(session.model, oracle, rows)
    found.facts["merged, in torch"] = facts_in_torch(oracle, records, tokenizer)
    found.logits["negative control: unedited against merged"], _ = compare(session.base, oracle, rows)
    found.errors["merged model loaded again is the session's, bit for bit"] = model_fingerprint(
        load_model(merged.folder)
    ) == model_fingerprint(session.model)

    half = export_merged(base, session, work / "half", dtype="bfloat16")
    wide = load_model(half.folder, dtype=jnp.float32)
    found.logits["merged, stored as bfloat16, both computed in float32"], _ = compare(wide, load_torch(half.folder), rows)
    found.errors["rounding of updates to bfloat16, worst layer"] = max(half.rounding.values())

    plan = plan_adapter(session)
    check_adapter("adapter", plan, session, base, work, rows, found)
    found.facts["adapter, in torch"] = facts_in_torch(
        peft.PeftModel.from_pretrained(load_torch(base), work / "adapter"), records, tokenizer
    )
    found.errors["rank that is exact, by layer"] = dict(plan.needed)
    found.errors["truncation, worst layer, by rank"] = dict(plan.choices)
    check_adapter("truncated adapter", plan_adapter(session, 8), session, base, work, rows, found)

    save_delta(session, work / "delta.safetensors")
    loaded = load_delta(work / "delta.safetensors", session.base)
    found.errors["delta applied is the session's model, bit for bit"] = model_fingerprint(
        apply_edits(session.base, loaded.delta)
    ) == model_fingerprint(session.model)


def check_adapter(
    name: str, plan: AdapterPlan, session: EditSession, base: Path, work: Path, rows: Rows, found: Numbers
) -> None:
    export_adapter(plan, work / name, base_model=base)
    oracle = peft.PeftModel.from_pretrained(load_torch(base), work / name).eval()
    ours = session.model if plan.exact else apply_edits(session.base, plan.delta)
    found.logits[f"{name} of rank {plan.rank}"], _ = compare(ours, oracle, rows)
    found.errors[f"{name} of rank {plan.rank}: kernels, worst layer"] = max(plan.errors.values())
    told = plan.efficacy or efficacy_of(session, plan.delta)
    for label, answers in (
        ("unedited", told.unedited),
        ("edited", told.full),
        (f"{name} of rank {plan.rank}", told.changed),
    ):
        found.facts[label] = {"probability": answers.probability, "exact_match": answers.exact_match}


def markdown(found: Numbers, command: str) -> str:
    """The numbers as tables."""
    lines = ["# Round trip of every export", "", f"`{command}`", ""]
    lines += [f"- {name}: {value}" for name, value in found.about.items()]
    lines += ["", "Largest |difference of a logit| between this package and torch, over all tokens of all prompts:", ""]
    lines += ["| form | difference |", "| --- | --- |", *(f"| {name} | {v:.1e} |" for name, v in found.logits.items())]
    lines += ["", "The facts: probability of a target token (geometric mean), exact match:", ""]
    lines += ["| model | probability, % | exact match, % |", "| --- | --- | --- |"]
    lines += [f"| {name} | {100 * v['probability']:.3f} | {100 * v['exact_match']:.1f} |" for name, v in found.facts.items()]
    lines += ["", "| other | |", "| --- | --- |", *(f"| {name} | {_cell(v)} |" for name, v in found.errors.items())]
    lines += ["", "| stage | seconds |", "| --- | --- |", *(f"| {name} | {v} |" for name, v in found.seconds.items())]
    return "\n".join(lines) + "\n"


def command_line(**options: object) -> str:
    """How to run it again; whose folders they were says nothing."""
    given = " ".join(f"--{name} {value}" for name, value in options.items())
    return f"python -m experiments.export.roundtrip --tokenizer TOKENIZER --records RECORDS --work WORKDIR {given}"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_cell(one)}" for key, one in value.items())
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def main(
    tokenizer: Annotated[Path, typer.Option(help="folder of GPT-2's tokenizer")],
    records: Annotated[Path, typer.Option(help="CounterFact records, any schema that kedit_jax reads")],
    work: Annotated[Path, typer.Option(help="folder for checkpoints; it must not exist")],
    count: Annotated[int, typer.Option(help="records that are edited")] = 100,
    layers: Annotated[int, typer.Option(help="of the checkpoint")] = 12,
    width: int = 768,
    heads: int = 12,
    edited: Annotated[str, typer.Option(help="layers that are edited")] = "3,4,5",
    steps: Annotated[int, typer.Option(help="of the target values' optimisation")] = 20,
    clamp: Annotated[float, typer.Option(help="of the target values; random weights need more than trained ones")] = 5.0,
    prefixes: int = 1,
    std: Annotated[float, typer.Option(help="of the random weights")] = 0.05,
    seed: int = 0,
    report: Annotated[Path | None, typer.Option(help="folder for RESULTS.json and RESULTS.md")] = None,
) -> None:
    """Edit, export, reload, compare."""
    console, found = Console(), Numbers()
    everything = read_records(records)
    chosen = everything[:count]
    work.mkdir(parents=True, exist_ok=False)
    with found.stage("checkpoint", console):
        make_checkpoint(work / "base", tokenizer, Shape(layers, width, heads), std, seed)
        model, fast = load(work / "base")
    settings = EditSettings(
        layers=tuple(int(layer) for layer in edited.split(",")),
        moment_weight=10.0,
        ridge=1e-3,
        values=ValueSettings(steps=steps, clamp=clamp, decay=0.0),
        prefixes=prefixes,
        prefix_tokens=5,
        conflicts="keep",
        micro_batch=25,
        seed=seed,
    )
    with found.stage("edit", console):
        session = edit(model, fast, chosen, texts_of(everything[-2000:]), settings)
    rows = Rows(texts_of(chosen), fast)
    found.about |= {
        "checkpoint": f"GPT-2, {layers} layers, width {width}, random weights of standard deviation {std}",
        "facts": len(session.facts),
        "edited layers": edited,
        "prompts compared": len(rows.ids),
        "tokens compared": sum(map(len, rows.ids)),
    }
    with found.stage("unedited model in torch", console):
        found.logits["unedited"], _ = compare(session.base, load_torch(work / "base"), rows)
    with found.stage("export, reload, compare", console):
        check_forms(session, work / "base", work, rows, chosen, found)
    command = command_line(
        count=count,
        layers=layers,
        width=width,
        heads=heads,
        edited=edited,
        steps=steps,
        clamp=clamp,
        prefixes=prefixes,
        std=std,
        seed=seed,
    )
    text = markdown(found, command)
    console.print(text, markup=False)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        (report / "RESULTS.md").write_text(text, encoding="utf-8")
        numbers = {"command": command} | {name: getattr(found, name) for name in found.__dataclass_fields__}
        (report / "RESULTS.json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    exact = {name: value for name, value in found.logits.items() if not name.startswith("negative control")}
    if max(exact.values()) > TOLERANCE:
        console.print(f"[bold red]logits differ by more than {TOLERANCE}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
