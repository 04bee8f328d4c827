"""`python -m experiments.facts_lm`: generate the world, train the embedded model on it, write the package's assets."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from experiments.facts_lm.data import Rows, training_rows
from experiments.facts_lm.export import CorpusConfig, Report, asset_sizes, export_data, export_model, write_report
from experiments.facts_lm.recall import recall_report
from experiments.facts_lm.tokenizer import end_of_text_id, train_tokenizer
from experiments.facts_lm.trace import causal_trace
from experiments.facts_lm.train import Losses, State, TrainConfig, initial_state, load_state, make_step, save_state, train
from experiments.facts_lm.world import World, WorldConfig, build_world
from kedit_jax.models import Decoder, load_model, with_parameters

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "kedit_jax" / "assets"
REPORTS = Path(__file__).resolve().parent
RUNS = ROOT / "runs"
RECALL_SAMPLE = 256  # facts asked about while training
TRACE_SAMPLE = 256

QUICK_WORLD = WorldConfig(people=12, companies=6, places=6, objects=3)
QUICK_TRAIN = TrainConfig(
    vocab_size=512,
    n_layers=3,
    d_model=32,
    n_heads=2,
    d_ff=64,
    steps=30,
    batch=4,
    length=40,
    warmup=5,
    first_reading_layer=2,
)
QUICK_CORPUS = CorpusConfig(documents=20, held_out=10)

WIDE_WORLD = WorldConfig(people=1040, companies=520, places=520, facts=1)
WIDE_TRAIN = TrainConfig(d_ff=4096, steps=3000)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    seed: Annotated[int, typer.Option(help="of the world, the initial weights and the order of training")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="a tiny model in seconds, to test the pipeline")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="twice the subjects and the keys' width, for 2,000 edits")] = False,
    assets: Annotated[Path | None, typer.Option(help="where the model and its data go (default: the package)")] = None,
    run: Annotated[Path | None, typer.Option(help="where the checkpoint is kept (default: runs/)")] = None,
    every: Annotated[int, typer.Option(help="steps between checkpoints", min=1)] = 100,
    stop_at: Annotated[int | None, typer.Option(help="stop after this step, to be continued by the same command")] = None,
) -> None:
    """Train the embedded model and write it with its data. An interrupted training continues where its checkpoint is."""
    console = Console()
    if quick and wide:
        raise typer.BadParameter("--quick and --wide are two sizes; give one")
    world = build_world(replace(QUICK_WORLD if quick else WIDE_WORLD if wide else WorldConfig(), seed=seed))
    config = replace(QUICK_TRAIN if quick else WIDE_TRAIN if wide else TrainConfig(), seed=seed)
    run = run or RUNS / ("facts_lm_quick" if quick else "facts_lm_wide" if wide else "facts_lm")
    assets = assets or (run / "assets" if quick or wide else ASSETS)
    tokenizer = train_tokenizer(world, vocab_size=config.vocab_size, seed=seed)
    console.print(
        f"{len(world.subjects):,} subjects, {len(world.facts):,} facts and {len(world.types):,} types, "
        f"{tokenizer.get_vocab_size():,} tokens"
    )
    until = min(stop_at or config.steps, config.steps)
    checkpoint = run / "checkpoint.npz"
    model, state = train_with_checkpoints(world, tokenizer, config, checkpoint, console, every=every, until=until)
    if state.step < config.steps:
        console.print(f"stopped after step {state.step} of {config.steps}; the same command continues")
        return
    export_model(with_parameters(model, state.parameters), tokenizer, assets / "model")
    export_data(world, assets, QUICK_CORPUS if quick else CorpusConfig())
    size = "--quick" if quick else "--wide" if wide else None
    report = make_report(load_model(assets / "model", dtype="float32"), tokenizer, world, config, state, assets, size)
    write_report(report, REPORTS if assets == ASSETS else REPORTS / "wide" if wide else run)
    console.print({name: round(value, 1) for name, value in report.recall.items()})
    console.print(f"{state.seconds:.0f} s ({state.cpu_seconds:.0f} CPU-s); assets in {assets}")


def train_with_checkpoints(
    world: World,
    tokenizer: Tokenizer,
    config: TrainConfig,
    checkpoint: Path,
    console: Console,
    *,
    every: int,
    until: int,
) -> tuple[Decoder, State]:
    """Train from the checkpoint, if there is one, to step `until`, with a line on recall at every checkpoint."""
    rows = _rows(world, tokenizer, config)
    model, state = initial_state(config, end_of_text_id(tokenizer))
    step = make_step(model, config)
    if checkpoint.exists():
        state = load_state(checkpoint, state, config)
        console.print(f"continuing after step {state.step} of {checkpoint}")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("training", total=until, completed=state.step)

        def show(number: int, losses: Losses) -> None:
            progress.update(task, completed=number, description=f"answers {float(losses.answers):.3f} nats")

        while state.step < until:
            stop = min(until, (state.step // every + 1) * every)
            state = train(step, state, rows, config, until=stop, on_step=show)
            save_state(checkpoint, state, config)
            known = recall_report(
                with_parameters(model, state.parameters), tokenizer, world, sample=RECALL_SAMPLE, seed=config.seed
            )
            progress.console.print(
                f"step {state.step}, {state.seconds:.0f} s, recall: {known['rewrite']:.1f} % as trained, "
                f"{known['paraphrase_prefixed']:.1f} % in unseen words"
            )
    return model, state


def _rows(world: World, tokenizer: Tokenizer, config: TrainConfig) -> Rows:
    return training_rows(
        world,
        tokenizer,
        rows=config.steps * config.batch,
        length=config.length,
        max_positions=config.max_positions,
        seed=config.seed,
    )


def make_report(
    model: Decoder,
    tokenizer: Tokenizer,
    world: World,
    config: TrainConfig,
    state: State,
    assets: Path,
    size: str | None = None,
) -> Report:
    """Measure the stored model over all facts, and trace a sample."""
    options = [*([size] if size else []), *([f"--seed {config.seed}"] if config.seed else [])]
    sizes = {"subjects": len(world.subjects), "facts": len(world.facts), "types": len(world.types)}
    sizes["editable facts"] = sum(not fact.subject.reserve for fact in world.facts)
    return Report(
        command=" ".join(["python -m experiments.facts_lm", *options]),
        train=config,
        world=sizes,
        seconds=round(state.seconds, 1),
        cpu_seconds=round(state.cpu_seconds, 1),
        recall=recall_report(model, tokenizer, world, sample=None, seed=config.seed + 1),
        trace=causal_trace(model, tokenizer, world.facts[:TRACE_SAMPLE], seed=config.seed),
        file_bytes=asset_sizes(assets),
    )


if __name__ == "__main__":
    app()
