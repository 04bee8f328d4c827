"""What the TPU compiler makes of the programs of an edit, asked ahead of time: no TPU is needed, none is used.

    pip install libtpu                                 (part of the extra `tpu`)
    python -m experiments.scale.tpu                    all models and slices below; table and numbers in this folder
    python -m experiments.scale.tpu --only llama-3-8b/v5e:4x4
    python -m experiments.scale.tpu --quick            a tiny model on one slice, nothing written

For each model and slice the programs are lowered from shapes alone and compiled: target values (a micro-batch on each share
of `data`), keys (a layer below the top edited one and the top itself), the kernel that the host's solve gives written into
its stack, a low-rank delta applied, and the keys of second moments. Recorded are the compiler's own account of the memory a
chip needs, the collectives it put in (by kind; a loop's body counts once), whether anything is factored on the chip, and
what `kedit inspect --mesh` would have said before.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GIB = 2**30
TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""What libtpu must be told where there is no TPU."""
LLAMA: dict[str, Any] = {
    "model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192,
    "hidden_act": "silu", "tie_word_embeddings": False, "num_key_value_heads": 8,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "tiny": LLAMA | {
        "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 5, "num_attention_heads": 8, "vocab_size": 2048,
    },
    "llama-3-8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 128256,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
        "hidden_act": "silu", "tie_word_embeddings": False, "num_key_value_heads": 4, "hidden_size": 3584,
        "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "vocab_size": 152064,
    },
    "llama-3-70b": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "vocab_size": 128256,
    },
}  # fmt: skip
EDITED = {"tiny": (2, 3), "llama-3-8b": (4, 5, 6, 7, 8), "qwen2.5-7b": (4, 5, 6, 7, 8), "llama-3-70b": (10, 11, 12, 13, 14)}
RUNS = (
    ("llama-3-8b", "v5e:4x4", 4, 4),
    ("llama-3-8b", "v5e:4x4", 2, 8),
    ("llama-3-8b", "v6e:4x4", 4, 4),
    ("llama-3-8b", "v5p:2x2x4", 4, 4),
    ("qwen2.5-7b", "v5e:4x4", 4, 4),
    ("llama-3-70b", "v5e:8x8", 8, 8),
)
QUICK = (("tiny", "v5e:2x2", 2, 2),)
BOTH = ("llama-3-8b", "v5e:4x4")  # compiled with either choice of what blocks keep
VALUES = "values, keep "
REQUESTS, PREFIXES, RANK = 16, 5, 2000  # of a share of `data`, of a request, of the delta
MOMENT_ROWS, MOMENT_TOKENS = 2, 512  # of a share of `data`, of a row
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
FACTORS = ("cholesky", "triangular", "eigh", "Lu", "Qr")


def planned(name: str, data: int, model: int, keep: Any) -> tuple[int, int]:
    """What `kedit inspect --mesh` has to say of target values: bytes of the arguments, and beside them."""
    from jax.sharding import AbstractMesh

    from kedit_jax.editing.budget import device_bytes, values_bytes
    from kedit_jax.models.registry import config_from_json
    from kedit_jax.models.spread import Spread

    config = config_from_json(MODELS[name], name)
    spread = Spread(AbstractMesh((data, model), ("data", "model")), config)
    return device_bytes(config, spread, 2), values_bytes(config, _layout().sizes, EDITED[name][-1], keep, 2, spread)


def programs(name: str, topology: str, data: int, model: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The programs of an edit, from shapes alone."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import mesh_utils, topologies
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from kedit_jax.delta import EditDelta, LowRank, _put_in_place, apply_edits
    from kedit_jax.editing import keys, moments, values
    from kedit_jax.models import abstract_decoder, down_kernel_address, named_parameters, with_parameters
    from kedit_jax.models.registry import config_from_json
    from kedit_jax.models.spread import Spread

    found = topologies.get_topology_desc(topology, platform="tpu")
    devices = mesh_utils.create_device_mesh((data, model), found.devices, allow_split_physical_axes=True)
    mesh = Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    config = config_from_json(MODELS[name], name)
    spread, dtype = Spread(mesh, config), jnp.bfloat16
    abstract = abstract_decoder(config, dtype, spread)

    def shaped(shape: Sequence[int], kind: Any, spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), kind, sharding=NamedSharding(mesh, spec))

    def stacked(leaf: Any) -> jax.ShapeDtypeStruct:
        kind = jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype)
        return shaped((data, *np.shape(leaf)), kind, PartitionSpec("data"))

    parameters = named_parameters(abstract)
    decoder = with_parameters(
        abstract, {path: shaped(leaf.shape, dtype, spread.at_rest(path, leaf.shape)) for path, leaf in parameters.items()}
    )
    layers = EDITED[name]
    top, n, d = layers[-1], config.d_ff, config.d_model
    layout = _layout()
    stack = jax.tree.map(stacked, layout)
    for keep in ("inputs", "products") if (name, topology) == BOTH else ("inputs",):
        yield (
            f"{VALUES}{keep}",
            partial(values._advanced.lower, decoder, stack, None, top, values.ValueSettings(), keep, None, 0),
        )
    stream = jax.eval_shape(keys.enter, decoder, stack)
    stream = jax.tree.map(lambda leaf: shaped(leaf.shape, leaf.dtype, PartitionSpec("data")), stream)
    for layer, what in ((layers[-2], "below the top"), (top, "the top")):
        yield f"keys, {what}", partial(keys.read.lower, decoder, stream, 0, layer, top, layout.n_contexts)
    down = parameters["layers.mlp.down.kernel"].shape
    spec = spread.at_rest("layers.mlp.down.kernel", down)
    kernel = shaped(down[1:], dtype, PartitionSpec(*spec[1:]))
    whole = shaped(down, dtype, spec)
    yield (
        "the host's kernel written",
        partial(_put_in_place.lower, whole, kernel, NamedSharding(mesh, spec), jax.ShapeDtypeStruct((), jnp.int32)),
    )
    low = LowRank(
        shaped((n, RANK), jnp.float32, PartitionSpec("model")), shaped((RANK, d), jnp.float32, PartitionSpec(None, "data"))
    )
    delta = EditDelta({down_kernel_address(layer): low for layer in layers})
    yield f"apply_edits, rank {RANK}", partial(jax.jit(apply_edits, donate_argnums=0).lower, decoder, delta)
    tokens = shaped((MOMENT_ROWS * data, MOMENT_TOKENS), jnp.int32, PartitionSpec("data"))
    yield "moments", partial(moments._keys.lower, decoder, tokens, tokens, layers)


def _layout() -> Any:
    import numpy as np

    from kedit_jax.editing.tokens import align

    return align([_request(np.random.default_rng(number)) for number in range(REQUESTS)])


def _request(rng: Any) -> list[Any]:
    """A request of CounterFact's lengths, as `encode_requests` gives it: bare, behind prefixes of ten tokens, KL prompt."""
    from kedit_jax.editing.tokens import Encoded

    subject, rest, target = int(rng.integers(3, 9)), int(rng.integers(2, 6)), 1 + int(rng.random() < 0.3)
    own = tuple(rng.integers(1, 1000, subject + rest + target).tolist())
    prefixes = [(), *(tuple(range(10 * number + 1, 10 * number + 11)) for number in range(PREFIXES))]
    rows = [Encoded(prefix + own, len(prefix) + subject + rest, len(prefix) + subject - 1) for prefix in prefixes]
    return [*rows, Encoded(own[:subject], subject, subject - 1)]


def compiled(lower: Callable[[], Any], layers: int) -> dict[str, Any]:
    """What the compiler says of a program; a stack of all layers should never be gathered whole."""
    began = time.process_time()
    try:
        program = lower().compile()
    except Exception as error:  # out of memory is said here, as an error of the compiler's
        return {"refused": str(error).strip().splitlines()[0][:300], "compile_s": round(time.process_time() - began, 1)}
    memory = program.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "compile_s": round(time.process_time() - began, 1),
    } | _read_program(program, layers)


def _read_program(program: Any, layers: int) -> dict[str, Any]:
    import jax

    try:
        return read(program.as_text(), layers)
    except jax.errors.JaxRuntimeError as error:  # some of v6e's asynchronous instructions have no text in jax 0.10.2
        return {"unreadable": str(error).strip().splitlines()[0][:200]}


def read(text: str, layers: int) -> dict[str, Any]:
    """Collectives, factorizations, and what must not be in a program: stacks of all layers gathered or copied."""
    channels = re.findall(rf"({COLLECTIVES})(?:-start)?\([^\n]*?channel_id=(\d+)", text)
    numbered = {number: kind for kind, number in channels}
    return {
        "collectives": dict(collections.Counter(numbered.values())),
        "factored": sorted({word for word in FACTORS if re.search(rf'custom_call_target="[^"]*{word}|= \S+ {word}', text)}),
        "stacks_gathered": len(re.findall(rf"= \w+\[(?:1,)*{layers},\d+,\d+\]\S* all-gather", text)),
        "copies_of_stacks": len(re.findall(rf"= \w+\[(?!1,)\d+,{layers},\d+,\d+\]\S* broadcast", text)),
    }


def child(name: str, topology: str, data: int, model: int) -> None:
    """One model on one slice: a line of JSON a program."""
    for what, lower in programs(name, topology, data, model):
        found = {"model": name, "slice": topology, "data": data, "model_axis": model, "program": what}
        print(json.dumps(found | compiled(lower, MODELS[name]["num_hidden_layers"])), flush=True)


def run(name: str, topology: str, data: int, model: int) -> list[dict[str, Any]]:
    """The programs of one model on one slice, in a process that believes in TPUs."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "experiments.scale.tpu", "--child", name, topology, str(data), str(model)]
    ended = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | TPU | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert ended.stdout is not None  # noqa: S101, it was asked for
    found = []
    for line in ended.stdout:
        if line.startswith("{"):
            found.append(json.loads(line))
            print(_row(found[-1]), flush=True)
    if ended.wait():
        raise SystemExit(f"{name} on {topology}: {(ended.stderr.read() if ended.stderr else '')[-2000:]}")
    return found


HEAD = ("model", "slice", "data x model", "program", "arguments", "temporary", "planned", "off", "collectives", "factored")


def _row(one: dict[str, Any]) -> str:
    cells = [one["model"], one["slice"], f"{one['data']} x {one['model_axis']}", one["program"]]
    if "refused" in one:
        return "| " + " | ".join([*cells, f"refused: {one['refused']}", *[""] * 5]) + " |"
    cells += [f"{one['arguments'] / GIB:.2f}", f"{one['temporary'] / GIB:.2f}"]
    if one["program"].startswith(VALUES):
        plan = sum(planned(one["model"], one["data"], one["model_axis"], one["program"].removeprefix(VALUES)))
        cells += [f"{plan / GIB:.2f}", f"{100 * (plan / (one['arguments'] + one['temporary']) - 1):+.0f} %"]
    else:
        cells += ["", ""]
    if "unreadable" in one:
        return "| " + " | ".join([*cells, "its text cannot be read", ""]) + " |"
    collectives = ", ".join(f"{count} {kind}" for kind, count in sorted(one["collectives"].items())) or "none"
    return "| " + " | ".join([*cells, collectives, ", ".join(one["factored"]) or "nothing"]) + " |"


def table(found: Sequence[dict[str, Any]]) -> str:
    """In Markdown; GiB a chip."""
    return "\n".join(["| " + " | ".join(HEAD) + " |", "| " + " | ".join("---" for _ in HEAD) + " |", *map(_row, found)])


def report(found: Sequence[dict[str, Any]]) -> str:
    """The page about them."""
    return f"""# What the TPU compiler says

Written by `python -m experiments.scale.tpu` (numbers in `results/tpu.json`); jax {metadata.version("jax")}.
Compiled ahead of time, from shapes: nothing was run on a TPU, so there are no speeds. bfloat16 weights,
{REQUESTS} requests of CounterFact's lengths in {PREFIXES + 1} contexts on each share of `data`, 25 steps;
moments of {MOMENT_ROWS} rows of {MOMENT_TOKENS} tokens a share. GiB a chip, as the compiler plans them:
arguments (the model, above all), and what is temporary. `planned` is what `kedit inspect --mesh` counts for both, `off`
how far that is from the compiler's sum. Of collectives, a loop's body counts once. `factored` lists factorizations and
triangular solves on the chip.

{table(found)}

- The largest program is that of the target values. Beside it a session holds the stack of edited kernels (the row "the
  host's kernel written").
- No stack of all layers is gathered whole, or copied for each part: gathered over `data`, Llama-3-8B's gate kernels alone
  would take 0.9 GiB of a chip. Both happened before layers were said to rest where they lie (4.1 GiB beside the model's
  0.9) and before the choice that ends the optimisation was left out on meshes (3.8 GiB). The tests look for both in the
  programs of a tiny model.
- The solve is not here: hosts do it in float64, and a chip sees nothing of it but the new kernel.
"""


def main() -> None:
    """Ask for all models and slices; what is stored already is kept unless `--again`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--table", action="store_true", help="of what is stored, beside what the plan says now")
    parser.add_argument("--again", action="store_true", help="also what is stored")
    parser.add_argument("--only", help="one model/slice, as llama-3-8b/v5e:4x4")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child[0], given.child[1], *map(int, given.child[2:]))
        return
    if given.quick:
        for one in QUICK:
            run(*one)
        return
    file = HERE / "results" / "tpu.json"
    stored = {} if given.again or not file.exists() else json.loads(file.read_text(encoding="utf-8"))
    for one in () if given.table else RUNS:
        key = f"{one[0]}/{one[1]}/{one[2]}x{one[3]}"
        if key in stored or (given.only and not key.startswith(given.only)):
            continue
        stored[key] = run(*one)
        file.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    (HERE / "TPU.md").write_text(report([one for found in stored.values() for one in found]), encoding="utf-8")


if __name__ == "__main__":
    main()
