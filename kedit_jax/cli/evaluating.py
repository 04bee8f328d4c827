"""`kedit eval`: the measures of the unedited model and of a session's, as tables, JSON, and a page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from kedit_jax import hosts
from kedit_jax.checkpoint import read_manifest
from kedit_jax.cli import show
from kedit_jax.cli.common import (
    Columns,
    Context,
    Dtype,
    Model,
    MomentsDir,
    Sha256,
    ZsreTarget,
    console,
    lines,
    load_for,
    load_here,
    open_session,
    read_facts,
)
from kedit_jax.cli.measured import Measured, ability_table, free_table
from kedit_jax.cli.page import Course, Spoken, page
from kedit_jax.cli.text import escape
from kedit_jax.editing.drift import key_drift
from kedit_jax.editing.session import EditSession, equivalence_error
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import (
    UNEDITED,
    PreparedTask,
    PreparedTexts,
    Record,
    References,
    Task,
    answers,
    ask,
    embedded_tasks,
    evaluate,
    prepare,
    prepare_task,
    prepare_texts,
    read_task,
    references_in,
    references_of,
    score_task,
    table,
    write_texts,
)
from kedit_jax.evaluation.counterfact import Prepared
from kedit_jax.models import Decoder
from kedit_jax.verification import batch_scores, is_exact, norms_over_steps, verify_session

SHOWN, TOKENS = 6, 16  # facts whose completions a page shows, and how long they are at most
WORLD = "world"


def evaluate_command(
    context: Context,
    model: Model,
    records: Annotated[str, typer.Argument(help="CounterFact, zsRE, MQuAKE ... recognised by content; a path or hf://...")],
    session: Annotated[Path | None, typer.Option(help="a session to evaluate beside the unedited model")] = None,
    heldout: Annotated[Path | None, typer.Option(help="text for the perplexity, a document a line")] = None,
    generation: Annotated[bool, typer.Option("--generation", help="free answers, by exact match to a natural stop")] = False,
    fluency: Annotated[bool, typer.Option("--fluency", help="fluency and consistency of sampled text")] = False,
    references: Annotated[
        Path | None, typer.Option(help="text whose sentences about the new objects consistency compares with")
    ] = None,
    sample: Annotated[int, typer.Option(help="records that --generation and --fluency take, evenly", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="of the sampled text")] = 0,
    ability: Annotated[
        list[str] | None,
        typer.Option(help="multiple-choice FILE, or TASK=FILE; 'world' for the embedded model; may be repeated"),
    ] = None,
    ability_limit: Annotated[int | None, typer.Option(help="questions of each task, evenly; all by default", min=1)] = None,
    moments: MomentsDir = None,
    dtype: Dtype = None,
    columns: Columns = None,
    sha256: Sha256 = None,
    zsre_target: ZsreTarget = "answers",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the numbers here, too")] = None,
    report: Annotated[Path | None, typer.Option(help="write a page about the session here, one HTML file")] = None,
) -> None:
    """Efficacy, generalization, specificity and more of the unedited model and of a session's."""
    if report is not None and session is None:
        raise KeditError("--report makes a page of a session; name its folder with --session")
    for file in (json_file, report):
        if file is not None:
            show.check_writable(file)
    tasks = [task.some(ability_limit) for task in _tasks(ability or [])]
    read = read_facts(records, columns, sha256, zsre_target)
    decoder, tokenizer = load_here(context, model, dtype) if session is None else load_for(context, session, model, dtype)
    texts = None
    if heldout is not None:
        texts = prepare_texts(list(lines(heldout)), tokenizer, max_length=decoder.config.max_positions)
    some = read[:: -(-len(read) // sample)]
    about = None
    if fluency:
        about = references_of(read) if references is None else references_in(lines(references), some)
    bench = _Bench(
        tokenizer=tokenizer,
        prepared=prepare(read, tokenizer),
        heldout=texts,
        some=some,
        generation=generation,
        references=about,
        seed=seed,
        tasks=[prepare_task(task, tokenizer) for task in tasks],
    )
    rows, edited = {UNEDITED: bench.measure(decoder)}, None
    if session is not None:
        edited = open_session(session, decoder, tokenizer, moments)
        rows["edited"] = bench.measure(edited.model)
    _show(rows)
    content: dict[str, Any] = {"rows": [{"model": name} | row.to_dict() for name, row in rows.items()]}
    if report is not None and edited is not None and session is not None:
        course = _course(edited, read, read_manifest(session).get("times"))
        name = Path(model).resolve().name if Path(model).is_dir() else model
        content["session"] = course.to_dict()
        text = page(name, edited, rows, course, metadata.version("kedit-jax"))
        if hosts.is_first():
            report.write_text(text, encoding="utf-8")
        console.print(f"a page about the session: {escape(str(report))}")
    if json_file is not None and hosts.is_first():
        json_file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Bench:
    """All that is asked of a model, made ready once."""

    tokenizer: Any
    prepared: Prepared
    heldout: PreparedTexts | None
    some: Sequence[Record]
    generation: bool
    references: References | None
    seed: int
    tasks: Sequence[PreparedTask]

    def measure(self, model: Decoder) -> Measured:
        """One row."""
        some, tokenizer = self.some, self.tokenizer
        return Measured(
            evaluation=evaluate(model, self.prepared, heldout=self.heldout),
            free=answers(model, tokenizer, some) if self.generation else None,
            text=None if self.references is None else write_texts(model, tokenizer, some, self.references, seed=self.seed),
            ability={prepared.task.name: score_task(model, prepared) for prepared in self.tasks},
        )


def _tasks(given: list[str]) -> list[Task]:
    """The tasks that were named, each under a name of its own."""
    found: list[Task] = []
    for text in given:
        name, equals, path = text.partition("=")
        if text == WORLD:
            found += embedded_tasks()
        elif equals and not Path(text).exists():
            found.append(read_task(path, task=name))
        else:
            found.append(read_task(text))
    names = [task.name for task in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise KeditError(f"--ability names {', '.join(twice)} more than once; give each task once")
    return found


def _show(rows: dict[str, Measured]) -> None:
    console.print(table({name: row.evaluation for name, row in rows.items()}))
    first = rows[UNEDITED]
    if first.free is not None or first.text is not None:
        console.print()
        console.print(free_table(rows))
    if first.ability:
        console.print()
        console.print(ability_table(rows))


def _course(session: EditSession, records: list[Record], times: list[str] | None) -> Course:
    """What the page shows of the session itself."""
    recorded = len(session.facts) > session.compacted
    norms = {}
    if session.batches:
        with show.bar(console, "steps, taken again") as move:
            norms = dict(norms_over_steps(session, move))
    return Course(
        equivalence=equivalence_error(session) if session.facts else None,
        checks=verify_session(session) if session.facts else [],
        exact=is_exact(session),
        batches=batch_scores(session),
        norms=norms,
        drift=key_drift(session) if recorded else {},
        spoken=_spoken(session, records),
        times=times or [""] * len(session.events),
    )


def _spoken(session: EditSession, records: list[Record]) -> list[Spoken]:
    """A sample of the session's facts, before and after, each with a paraphrase where the records have one."""
    facts = session.facts[:: max(1, -(-len(session.facts) // SHOWN))]
    others = {(record.prompt, record.subject): record.paraphrase_prompts[:1] for record in records}
    asked = [(prompt, fact.target) for fact in facts for prompt in (fact.text, *others.get((fact.prompt, fact.subject), ()))]
    before, after = (ask(model, session.tokenizer, asked, max_new_tokens=TOKENS) for model in (session.base, session.model))
    return [Spoken(*row) for row in zip(asked, before, after, strict=True)]
