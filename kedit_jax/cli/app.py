"""The commands. Each reads files, calls the library, shows what came out; errors of the user are one clear message."""

import math
import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console

from kedit_jax import hosts
from kedit_jax.checkpoint import SessionLock, has_session, lock_session, read_manifest, save_session
from kedit_jax.cli import history, show
from kedit_jax.cli.cache import compiled_programs_kept
from kedit_jax.cli.common import (
    Columns,
    Conflicts,
    Context,
    Dtype,
    Model,
    MomentsDir,
    Run,
    Session,
    Sha256,
    ZsreTarget,
    console,
    lines,
    load_for,
    load_here,
    open_session,
    parse_layers,
    parse_mesh,
    read_facts,
)
from kedit_jax.cli.demo import demo
from kedit_jax.cli.evaluating import evaluate_command
from kedit_jax.cli.export import export
from kedit_jax.cli.guarding import Guard, guard, read_bounds
from kedit_jax.cli.machine import doctor, inspect
from kedit_jax.cli.text import escape
from kedit_jax.cli.verify import verify
from kedit_jax.editing.moments import Moments, compute_moments, default_tokens, moments_path
from kedit_jax.editing.presets import PRESETS, assigned, check_preset, derive_settings, overridden, read_settings
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, check_editable, start_session
from kedit_jax.editing.settings import USES, EditSettings
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import Record
from kedit_jax.models import Decoder, ModelConfig
from kedit_jax.solve.postprocess import POSTS
from kedit_jax.solve.sequences import MODES

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
FEW_CORES = 4
SHOWN = 10  # proposed subjects
NULL_SPACE = {"null_threshold", "null_relative", "null_rank"}
ALONE = ("demo", "export")  # commands that a second process would not help
INTERRUPTED = 130  # the exit status that typer gives to an interrupt from the keyboard

Corpus = Annotated[Path | None, typer.Option(help="text such as the model was trained on, a document a line")]
Layers = Annotated[str | None, typer.Option(help="layers to edit, as 3,4,5; 0 is the first")]
MaxTokens = Annotated[float | None, typer.Option(help="of the corpus; 10 x the key width by default, inf for all", min=1)]

COMMANDS = (demo, verify, inspect, doctor, export)
for command in (*COMMANDS, history.log, history.retract, history.restore, history.undo, history.merge, history.compact):
    app.command()(command)
app.command("eval")(evaluate_command)


@app.callback()
def everywhere(
    context: Context,
    mesh: Annotated[str | None, typer.Option(help="lay models out on all devices, as data=2,model=4")] = None,
    hosts_found: Annotated[
        bool, typer.Option("--hosts", help="one of several processes that Slurm, a TPU slice or Open MPI started")
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(help="host:port of the first of several processes started by hand")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="how many they are", min=1)] = None,
    process: Annotated[int | None, typer.Option(help="which of them this is, from 0 on", min=0)] = None,
    timeout: Annotated[
        int, typer.Option(help="seconds after which all end when one of them does not answer", min=1)
    ] = hosts.TIMEOUT,
) -> None:
    """Edit facts in language models. Options for several devices and processes stand before the command."""
    by_hand = (coordinator, processes, process)
    if any(part is not None for part in by_hand) and None in by_hand:
        raise KeditError("--coordinator, --processes and --process say together which process this is: give all three")
    if hosts_found or coordinator is not None:
        hosts.initialize(coordinator, processes, process, timeout=timeout)
        console.quiet = not hosts.is_first()
    if hosts.count() > 1 and context.invoked_subcommand in ALONE:
        raise KeditError(f"kedit {context.invoked_subcommand} runs in one process: leave --hosts and --coordinator out")
    context.obj = Run(None if mesh is None else parse_mesh(mesh))


@app.command()
def stats(
    context: Context,
    model: Model,
    corpus: Annotated[Path, typer.Option(help="text such as the model was trained on, a document a line")],
    layers: Annotated[str, typer.Option(help="layers, as 3,4,5; 0 is the first")],
    moments: Annotated[Path, typer.Option(help="folder to store the moments in")] = Path("moments"),
    max_tokens: MaxTokens = None,
    dtype: Dtype = None,
) -> None:
    """Compute the second moments of a model's keys over a corpus, once, for all edits to come."""
    decoder, tokenizer = load_here(context, model, dtype)
    check_editable(decoder.config)
    found = _compute(decoder, tokenizer, corpus, parse_layers(layers), moments, max_tokens)
    console.print(
        f"second moments of layers {layers} over {found.tokens:,} tokens: "
        f"{escape(str(moments_path(moments, found.fingerprint(tuple(found.by_layer)))))}"
    )
    console.print(show.sampling(found))


@app.command()
def edit(
    context: Context,
    model: Model,
    facts: Annotated[str, typer.Argument(help="JSONL of prompt (with one {}), subject, target; or a data set, CSV, TSV")],
    session: Session,
    columns: Columns = None,
    sha256: Sha256 = None,
    zsre_target: ZsreTarget = "answers",
    corpus: Corpus = None,
    settings: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings, ours or EasyEdit's")] = None,
    preset: Annotated[str | None, typer.Option(help=f"published settings: {', '.join(PRESETS)}")] = None,
    editor: Annotated[str | None, typer.Option(help=f"one of {', '.join(USES)}")] = None,
    layers: Layers = None,
    moment_weight: Annotated[float | None, typer.Option(help="lambda, the weight of the second moments")] = None,
    ridge: Annotated[float | None, typer.Option(help="rho, the weight of the identity; the ridge editor needs it")] = None,
    l2: Annotated[float | None, typer.Option(help="AlphaEdit's ridge within the null space")] = None,
    null_threshold: Annotated[float | None, typer.Option(help="AlphaEdit's null space: eigenvalues of C0 below")] = None,
    noise: Annotated[float | None, typer.Option(help="1 / weight of a fact; 0 asks for equality (EMMET, ROME)")] = None,
    mode: Annotated[str | None, typer.Option("--history", help=f"how the sequence is run: {', '.join(MODES)}")] = None,
    post: Annotated[str | None, typer.Option(help=f"done to each step: {', '.join(POSTS)}, as rect:0.4")] = None,
    compensate: Annotated[
        bool | None, typer.Option(help="make up for it in the next step (Algorithm 1); the default")
    ] = None,
    conflicts: Conflicts = None,
    similarity: Annotated[float | None, typer.Option(help="facts conflict whose keys have this cosine, too")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what conflicts would lead to, and write nothing")] = False,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="any other setting, as values.learning_rate=0.1; may be repeated")
    ] = None,
    guards: Annotated[
        list[str] | None,
        typer.Option("--guard", help="bound: perplexity=1.2, retention=0.8 or norm=1; see --guard-texts; may be repeated"),
    ] = None,
    guard_texts: Annotated[Path | None, typer.Option(help="held-out text for the perplexity, a document a line")] = None,
    guard_every: Annotated[
        int, typer.Option(help="steps between probes, which are kept or rolled back together", min=1)
    ] = 1,
    max_tokens: MaxTokens = None,
    batch: Annotated[int, typer.Option(help="facts a step", min=1)] = 100,
    moments: MomentsDir = None,
    dtype: Dtype = None,
) -> None:
    """Write facts into a model, in a new session or one begun earlier; saved after every batch, so it can be interrupted.

    Run the same command again to go on: facts that the session holds already are skipped. With --guard, a step after which
    the model is out of bounds is not kept: the session stays as it was, `kedit log` says why, the exit status is 1.
    """
    bounds = read_bounds(guards or [], guard_texts, guard_every)
    wanted = _requests(read_facts(facts, columns, sha256, zsre_target))
    options = {"editor": editor, "layers": layers and parse_layers(layers), "moment_weight": moment_weight, "ridge": ridge}
    options |= {"l2": l2, "null_threshold": null_threshold, "noise": noise}
    options |= {"history": mode, "post": post, "compensate": compensate} | assigned(assign or [])
    folder = moments or session / "moments"
    with ExitStack() as until_stored:
        if has_session(session):
            _check_same_settings(session, settings, preset, options)
            lock = None if dry_run else until_stored.enter_context(lock_session(session))
            decoder, tokenizer = load_for(context, session, model, dtype)
            current = open_session(session, decoder, tokenizer, folder)
        else:
            chosen = _settings(settings, preset, options)
            if corpus is None:
                raise KeditError("a new session needs --corpus, text such as the model was trained on, a document a line")
            decoder, tokenizer = load_here(context, model, dtype)
            check_editable(decoder.config)
            if preset is not None:
                check_preset(preset, decoder.config)
            lock = None if dry_run else until_stored.enter_context(lock_session(session))
            chosen = chosen or _derived(decoder.config, options)
            current = _started(decoder, tokenizer, corpus, chosen, folder, max_tokens)
        new = _not_yet_written(current, wanted)
        if lock is None:
            _show_plan(current, new, conflicts, similarity)
            return
        watch = guard(current, bounds, guard_texts, guard_every)
        current = _edit_in_batches(current, new, lock, batch, {"conflicts": conflicts, "similarity": similarity}, watch)
    console.print(f"{show.summary(current)}; stored in {escape(str(session))}")
    if current.events and current.events[-1].kind == "rollback":
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; what the user got wrong is one message and exit status 1, not a traceback."""
    try:
        with _few_blas_threads(), compiled_programs_kept():
            app()
    except KeditError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}")
        hosts.leave(1)
        sys.exit(1)
    except jax.errors.JaxRuntimeError as error:
        if hosts.count() == 1:
            raise
        Console(stderr=True, highlight=False).print(
            f"[bold red]error:[/] a process of this run ended or does not answer ({escape(str(error).splitlines()[0])}); "
            "what was saved is intact, run the same command again on all hosts to go on"
        )
        hosts.leave(1)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            Console(stderr=True).print("interrupted; what was saved is intact, run the same command again to go on")
        if ended.code:
            hosts.leave(ended.code if isinstance(ended.code, int) else 1)
        raise


def _few_blas_threads() -> AbstractContextManager[object]:
    """On few cores one BLAS thread, unless the user has chosen: more spin beside XLA's, where they are not told to sleep."""
    if (os.cpu_count() or 1) > FEW_CORES or {"OPENBLAS_NUM_THREADS", "OPENBLAS_THREAD_TIMEOUT"} & set(os.environ):
        return nullcontext()
    from threadpoolctl import threadpool_limits  # importing it sets an environment variable

    limited: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limited


def _requests(records: list[Record]) -> list[EditRequest]:
    """What the records ask for; subjects that were proposed are shown, for a person to look at."""
    proposed = [record for record in records if record.subject_proposed]
    for record in proposed[:SHOWN]:
        console.print(f"  proposed subject {escape(repr(record.subject))} in {escape(repr(record.rewrite_prompt))}")
    if proposed:
        console.print(
            f"{len(proposed)} of {len(records)} facts name no subject; it was proposed from prompt and paraphrases"
        )
    return [record.request() for record in records]


def _started(
    model: Decoder, tokenizer: Any, corpus: Path, settings: EditSettings, folder: Path, max_tokens: float | None
) -> EditSession:
    """A new session; its moments are let go of here, and none are held while facts are written."""
    found = _compute(model, tokenizer, corpus, settings.layers, folder, max_tokens)
    return start_session(model, tokenizer, found, settings, priors=folder)


def _compute(
    model: Decoder, tokenizer: Any, corpus: Path, layers: tuple[int, ...], folder: Path, max_tokens: float | None
) -> Moments:
    asked = default_tokens(model.config) if max_tokens is None else max_tokens
    with show.bar(console, "second moments (tokens)") as move:
        found = compute_moments(model, tokenizer, lines(corpus), layers, max_tokens=asked, cache=folder, progress=move)
    if found.tokens < asked < math.inf:
        console.print(f"the corpus has {found.tokens:,} tokens, of the {asked:,.0f} asked for")
    return found


def _settings(file: Path | None, preset: str | None, options: dict[str, Any]) -> EditSettings | None:
    """Settings of a new session: from a file, a preset, or the layers alone, overridden by the options; None for none."""
    if preset is not None and preset not in PRESETS:
        raise KeditError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    if file is not None and preset is not None:
        raise KeditError("--settings and --preset both say everything; give one of them, and single options beside it")
    if file is not None:
        read = read_settings(file)
        if read.unused:
            console.print(
                f"not used of {escape(str(file))}: {escape(', '.join(f'{k}={v}' for k, v in read.unused.items()))}"
            )
        return _with_options(read.settings, options)
    if preset is not None:
        return _with_options(PRESETS[preset].settings, options)
    return _with_options(EditSettings(options["layers"]), options) if options["layers"] else None


def _derived(config: ModelConfig, options: dict[str, Any]) -> EditSettings:
    """Settings for a model that nobody published any for."""
    settings = _with_options(derive_settings(config), options)
    console.print(f"no settings published or given: layers {', '.join(map(str, settings.layers))}, from the model's depth")
    return settings


def _with_options(settings: EditSettings, options: dict[str, Any]) -> EditSettings:
    given = {name: value for name, value in options.items() if value is not None}
    for chosen in set(given) & NULL_SPACE:
        given |= dict.fromkeys(NULL_SPACE - {chosen})
    settings = overridden(settings, given)
    _check_used(settings, [name for name, value in given.items() if value is not None])
    return settings


def _check_used(settings: EditSettings, given: Iterable[str]) -> None:
    """Raise for numbers of a prior that the editor does not read: whoever gives them expects something of them."""
    used = set(USES[settings.editor].values())
    unused = sorted(set(given) & {name for numbers in USES.values() for name in numbers.values()} - used)
    if unused:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise KeditError(f"editor {settings.editor!r} does not use {named}; it uses {', '.join(sorted(used))}")


def _check_same_settings(session: Path, file: Path | None, preset: str | None, options: dict[str, Any]) -> None:
    """A session's settings are part of its history: options that ask for others are refused, the same ones are fine."""
    stored = EditSettings.from_dict(read_manifest(session)["settings"])
    asked = {name: value for name, value in options.items() if value is not None}
    base = (None if file is None and preset is None else _settings(file, preset, options)) or stored
    wanted = overridden(base, asked).to_dict() | {"layers": tuple(sorted(asked.get("layers", base.layers)))}
    differing = [name for name, value in wanted.items() if value != stored.to_dict()[name]]
    if differing:
        raise KeditError(f"the session was begun with other {', '.join(differing)}; leave them out or begin another session")


def _not_yet_written(session: EditSession, wanted: list[EditRequest]) -> list[EditRequest]:
    """The facts that the session has never seen, so that an interrupted command can be run again."""

    def said(facts: Iterable[EditRequest]) -> set[tuple[str, str, str]]:
        return {(fact.prompt, fact.subject, fact.target) for fact in facts}

    seen = {"are in the session already": said(session.facts)}
    seen["were left out before (`kedit log` says why)"] = said(session.skipped)
    seen["were taken back or replaced before (`kedit restore` brings them back)"] = said(session.retired)
    new = wanted
    for why, known in seen.items():
        rest = [fact for fact in new if (fact.prompt, fact.subject, fact.target) not in known]
        if len(rest) < len(new):
            console.print(f"{len(new) - len(rest)} of {len(wanted)} facts {why} and are skipped")
        new = rest
    return new


def _show_plan(session: EditSession, new: list[EditRequest], conflicts: str | None, similarity: float | None) -> None:
    if not new:
        console.print("nothing would be written")
        return
    plan = session.plan(new, conflicts=conflicts, similarity=similarity)
    for line in plan.lines():
        console.print(f"  {escape(line)}", highlight=False, soft_wrap=True)
    console.print(
        f"{len(plan.conflicts)} conflicts; under the policy {plan.policy!r} {len(plan.written)} facts would be written, "
        f"{len(plan.skipped)} skipped, and {len(plan.replaced)} of the session replaced. Nothing was changed."
    )


def _edit_in_batches(
    session: EditSession, new: list[EditRequest], lock: SessionLock, size: int, policy: dict[str, Any], watch: Guard
) -> EditSession:
    """Stored after every step, or every few where a guard probes only then; ends at the first that it does not keep."""
    batches = [new[begin : begin + size] for begin in range(0, len(new), size)]
    session = session.sized_for(batches)
    with show.bar(console, "facts", len(new)) as move:
        for begin in range(0, len(batches), watch.every):
            session, breaches = watch.edit(session, batches[begin : begin + watch.every], policy)
            save_session(session, lock.folder, lock=lock)
            if breaches:
                for said in breaches:
                    console.print(f"[bold red]rolled back:[/] {escape(said)}", highlight=False)
                break
            move(min((begin + watch.every) * size, len(new)), len(new))
    return session
