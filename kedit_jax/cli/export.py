"""`kedit export`: a session's edits as a merged checkpoint, a LoRA adapter, or the delta alone."""

import re
from pathlib import Path
from typing import Annotated

import typer

from kedit_jax.cli.common import Context, Model, MomentsDir, Session, console, load_for, open_session
from kedit_jax.cli.text import escape
from kedit_jax.editing.session import EditSession
from kedit_jax.errors import KeditError
from kedit_jax.export import FORMS, VLLM_RANKS, check_target, export_adapter, export_merged, plan_adapter, save_delta

NOTABLE = 1e-5  # of an update's norm; rounding to float32 loses some 1e-8, to bfloat16 some 1e-3
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def export(
    context: Context,
    model: Model,
    to: Annotated[Path, typer.Argument(help="folder to write; for the delta, a .safetensors file")],
    session: Session,
    form: Annotated[str, typer.Option("--as", help=f"one of {', '.join(FORMS)}")] = "merged",
    dtype: Annotated[
        str | None, typer.Option(help="of the merged weights or the adapter; merged: as stored by default")
    ] = None,
    rank: Annotated[int | None, typer.Option(help=f"of the adapter; vLLM takes {', '.join(map(str, VLLM_RANKS))}")] = None,
    error: Annotated[
        float | None, typer.Option(help="of the adapter: the smallest rank that costs no more than this")
    ] = None,
    shard: Annotated[str | None, typer.Option(help="largest file of the merged checkpoint, as 5GB; as the original")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="of the adapter: say what it costs, and write nothing")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier export")] = False,
    moments: MomentsDir = None,
) -> None:
    """Write what serving stacks load: a merged checkpoint, a PEFT LoRA adapter, or the delta as safetensors."""
    if form not in FORMS:
        raise KeditError(f"--as {form!r} is none of {', '.join(FORMS)}")
    _check_options(
        form, rank=rank, error=error, shard=shard, dry_run=dry_run or None, dtype=dtype if form == "delta" else None
    )
    limit = None if shard is None else _bytes(shard)
    if not dry_run:
        check_target(to, form, overwrite=overwrite)
    decoder, tokenizer = load_for(context, session, model, None)
    edited = open_session(session, decoder, tokenizer, moments)
    if form == "adapter":
        _adapter(edited, to, model, rank, error, dtype, dry_run=dry_run, overwrite=overwrite)
    elif form == "delta":
        _say(f"delta of {len(edited.facts)} facts", save_delta(edited, to, overwrite=overwrite))
    else:
        done = export_merged(model, edited, to, dtype=dtype, max_shard_bytes=limit, overwrite=overwrite)
        kept = "the dtype it was stored in" if done.dtype is None else done.dtype
        for address, lost in done.rounding.items():
            if lost > NOTABLE:
                console.print(f"  {escape(address)}: {100 * lost:.2g} % of the update is lost in {kept}", highlight=False)
        _say(f"{len(done.files)} files, {done.size / 2**20:.1f} MiB in {kept}", done.folder)


def _adapter(
    edited: EditSession,
    to: Path,
    model: str,
    rank: int | None,
    error: float | None,
    dtype: str | None,
    *,
    dry_run: bool,
    overwrite: bool,
) -> None:
    """Say what the rank costs before anything is written."""
    plan = plan_adapter(edited, rank, error=error, dtype=dtype or "float32")
    for line in plan.lines():
        console.print(escape(line), highlight=False, soft_wrap=True)
    if dry_run:
        console.print("nothing was written")
        return
    _say(f"LoRA adapter of rank {plan.rank}", export_adapter(plan, to, base_model=model, overwrite=overwrite))


def _check_options(form: str, **given: object) -> None:
    """Raise for options that the form does not read."""
    wanted = {"merged": {"shard"}, "adapter": {"rank", "error", "dry_run"}, "delta": set[str]()}[form]
    unused = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None and name not in wanted]
    if unused:
        raise KeditError(f"--as {form} does not use {', '.join(unused)}")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]*)", text.strip().upper())
    size = float(match[1]) * _UNITS.get(match[2], 0) if match and len(text) < 100 else 0.0  # longer ones can be infinite
    if size < 1:
        raise KeditError(f"--shard {text!r} is no size; write it as 5GB, 500MB or 2GiB")
    return int(size)


def _say(what: str, path: Path) -> None:
    console.print(f"{what}: {escape(str(path))}", highlight=False, soft_wrap=True)
