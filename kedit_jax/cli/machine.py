"""`kedit inspect`: what a model is and what editing it takes. `kedit doctor`: whether this machine is fit for it."""

import math
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import AbstractMesh
from rich import box
from rich.table import Table

from kedit_jax import solve
from kedit_jax.cli.common import console, parse_layers, parse_mesh
from kedit_jax.cli.text import escape
from kedit_jax.editing.budget import device_bytes, memory_items, total
from kedit_jax.editing.presets import PRESETS, derive_settings, read_settings
from kedit_jax.editing.session import check_editable
from kedit_jax.editing.settings import EditSettings
from kedit_jax.errors import KeditError
from kedit_jax.models import ModelConfig, Spread, down_kernel_address, read_config
from kedit_jax.models.spread import DATA, MODEL

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
)


def inspect(
    model: Annotated[str, typer.Argument(help="a Hugging Face directory or hub id; of it the configuration alone is read")],
    settings: Annotated[Path | None, typer.Option(help="YAML or JSON file of settings, ours or EasyEdit's")] = None,
    layers: Annotated[str | None, typer.Option(help="layers to edit, as 3,4,5; by default published or derived")] = None,
    facts: Annotated[int, typer.Option(help="facts the session shall hold", min=1)] = 1000,
    batch: Annotated[int, typer.Option(help="facts a step", min=1)] = 100,
    dtype: Annotated[str, typer.Option(help="of the model: float32, bfloat16, float16")] = "bfloat16",
    mesh: Annotated[str | None, typer.Option(help="plan for devices that need not be here, as data=4,model=4")] = None,
) -> None:
    """Family, layers and sizes of a model, what would be edited, and the memory that takes, before anything is loaded."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise KeditError(f"dtype {dtype!r} is none of float32, bfloat16, float16")
    config = read_config(model)
    chosen, origin = _chosen(config, settings, layers)
    check_editable(config)
    if not all(0 <= layer < config.n_layers for layer in chosen.layers):
        raise KeditError(
            f"layers {', '.join(map(str, chosen.layers))}: the model has layers from 0 to {config.n_layers - 1}"
        )
    axes = None if mesh is None else {DATA: 1, MODEL: 1} | parse_mesh(mesh)
    spread = None if axes is None else Spread(AbstractMesh(tuple(axes.values()), tuple(axes)), config)
    items = memory_items(config, chosen, facts=facts, batch=batch, dtype=jnp.dtype(dtype), spread=spread)
    parameters = device_bytes(config, None, 1)
    console.print(
        f"{config.family}: {config.n_layers} layers of width {config.d_model}, {config.n_heads} heads over "
        f"{config.n_kv_heads} of keys and values, vocabulary {config.vocab_size:,}, {_count(parameters)} parameters",
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"edited: layers {', '.join(map(str, chosen.layers))} ({escape(origin)}), kernels "
        f"[{config.d_ff}, {config.d_model}] at {escape(down_kernel_address(chosen.layers[0]))} and so on",
        highlight=False,
        soft_wrap=True,
    )
    where = "" if axes is None else f", {axes[DATA]} x {axes[MODEL]} devices"
    title = f"{facts} facts, {batch} a step, model in {dtype}{where}"
    table = Table(box=box.SIMPLE, title=title, title_justify="left")
    table.add_column("memory for")
    table.add_column("where")
    table.add_column("size", justify="right")
    for item in items:
        table.add_row(item.what, item.place, f"{'' if item.exact else '~'}{_size(item.size)}")
    console.print(table)
    device, host = total(items, "device"), total(items, "host")
    if axes is None:
        _compare(device, host)
        return
    console.print(f"{_size(device)} a device, of {math.prod(axes.values())} alike; {_size(host)} of host memory a process")
    uncut = [name for name, size in (("attention heads", config.n_heads), ("key width", config.d_ff)) if size % axes[MODEL]]
    if uncut:
        console.print(
            f"model={axes[MODEL]} does not divide the {' and the '.join(uncut)}, which every device then computes whole"
        )


def doctor() -> None:
    """Versions, devices, precision and free memory; exit status 1 if something here would spoil results."""
    for name in PACKAGES:
        console.print(f"  {name:<18}{_version(name)}", highlight=False)
    console.print(
        f"  {'python':<18}{platform.python_version()} on {platform.system()} {platform.machine()}", highlight=False
    )
    findings = list(_findings())
    for finding in findings:
        mark = {True: "[green]ok[/]   ", False: "[bold red]bad[/]  ", None: "[yellow]note[/] "}[finding.good]
        console.print(f"  {mark}{escape(finding.text)}", highlight=False, soft_wrap=True)
    if any(finding.good is False for finding in findings):
        raise typer.Exit(1)


class Finding(NamedTuple):
    """One line of the doctor's report; `good` is None for what is worth knowing but no fault."""

    good: bool | None
    text: str


def _findings() -> Iterator[Finding]:
    for device in jax.devices():
        memory = _device_memory(device)
        room = "" if memory is None else f", {memory / 2**30:.1f} GiB free"
        yield Finding(True, f"device {device.id}: {device.device_kind} ({device.platform}){room}")
    free = _host_memory()
    if free is not None:
        yield Finding(free > 2 * 2**30, f"{free / 2**30:.1f} GiB of host memory are free; the demo takes 2")
    disk = shutil.disk_usage(Path.cwd()).free
    yield Finding(disk > 2**30, f"{disk / 2**30:.1f} GiB of disk are free in {Path.cwd()}")
    yield from _precision()
    if jax.dtypes.canonicalize_dtype(np.float64) == np.float64:
        yield Finding(
            None, "JAX_ENABLE_X64 is set: not needed here, and models then tend to run in float64 where they need not"
        )
    if (os.cpu_count() or 1) > 1 and not {"OPENBLAS_NUM_THREADS", "OPENBLAS_THREAD_TIMEOUT"} & set(os.environ):
        yield Finding(
            None, "idle BLAS threads spin on cores that XLA needs; with OPENBLAS_THREAD_TIMEOUT=14 set they sleep instead"
        )


def _precision() -> Iterator[Finding]:
    """Products and solves of this machine against float64 on the host."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(256, 256)), rng.normal(size=(256, 256))
    narrow = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    exact = np.asarray(narrow[0], np.float64) @ np.asarray(narrow[1], np.float64)
    highest = _error(jnp.matmul(*narrow, precision=jax.lax.Precision.HIGHEST), exact)
    yield Finding(highest < 1e-5, f"float32 product at highest precision: error {highest:.1e}")
    plain = _error(jnp.matmul(*narrow), exact)
    if plain > 1e-5:
        yield Finding(
            None, f"float32 product at default precision: error {plain:.1e}; the solver asks for the highest itself"
        )
    prior = solve.memit(a @ a.T / 256, 10.0, 1.0)
    stack = solve.Constraints(b[:32], a[:32], np.ones(32))
    with solve.float64():
        found = np.asarray(solve.one_time(prior, stack).update)
    expected = np.linalg.solve(10 * a @ a.T / 256 + np.eye(256) + b[:32].T @ b[:32], b[:32].T @ a[:32])
    error = _error(found, expected)
    yield Finding(error < 1e-10, f"a float64 solve against NumPy: error {error:.1e}")


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} billion" if parameters >= 1e8 else f"{parameters / 1e6:.2f} million"


def _error(found: jax.Array | np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


def _chosen(config: ModelConfig, file: Path | None, layers: str | None) -> tuple[EditSettings, str]:
    """The settings that editing would start from, and where they come from."""
    own = None if layers is None else parse_layers(layers)
    if file is not None:
        read = read_settings(file)
        if read.unused:
            console.print(
                f"not used of {escape(str(file))}: {escape(', '.join(f'{k}={v}' for k, v in read.unused.items()))}"
            )
        return (read.settings, f"from {file}") if own is None else (replace(read.settings, layers=own), "as asked")
    if own is not None:
        return EditSettings(own), "as asked"
    alike = [
        name
        for name, p in PRESETS.items()
        if (p.n_layers, p.d_ff) == (config.n_layers, config.d_ff) and p.family == config.family
    ]
    if alike:
        return PRESETS[alike[0]].settings, f"published for {alike[0]}, of the same shape: --preset {alike[0]}"
    return derive_settings(config), "from the model's depth; nothing published"


def _compare(device: int, host: int) -> None:
    """Say whether that fits into this machine."""
    accelerator = jax.devices()[0]
    free_host, free_device = _host_memory(), _device_memory(accelerator)
    if accelerator.platform == "cpu" or free_device is None:
        need, rows = device + host, [("this machine's memory", device + host, free_host)]
    else:
        need, rows = host, [(accelerator.device_kind, device, free_device), ("host memory", host, free_host)]
    for what, wanted, free in rows:
        if free is not None:
            verdict = "[green]fits[/]" if wanted < free else "[bold red]does not fit[/]"
            console.print(f"{_size(wanted)} of {what}, {_size(free)} are free: {verdict}", highlight=False)
    if need and free_host is None:
        console.print("how much memory is free cannot be read on this system")


def _host_memory() -> int | None:
    """Bytes of host memory that are free, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _device_memory(device: jax.Device) -> int | None:
    """Bytes of an accelerator that are free, None where it does not say."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    return None if not stats or "bytes_limit" not in stats else stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
