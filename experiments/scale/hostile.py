"""Everything that reads what others wrote, as targets for a fuzzer: valid inputs, ways to spoil them, and what to call.

A target takes bytes and a folder of its own, puts the bytes where a user's file would lie, and reads them as commands do.
It may accept them or refuse them with a `KeditError`; anything else that happens is a finding. What a checksum guards is
signed again after it was spoilt: an attacker can compute one, too.
"""

import base64
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import random
import shutil
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.numpy import save, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kedit_jax import files, solve
from kedit_jax.checkpoint import load_session, newest_version, read_events, read_manifest, save_session
from kedit_jax.cli import history
from kedit_jax.cli.common import lines, parse_columns, parse_layers
from kedit_jax.cli.export import _bytes
from kedit_jax.cli.guarding import read_bounds
from kedit_jax.delta import Dense, EditDelta, LowRank
from kedit_jax.editing import history as histories
from kedit_jax.editing import moment_files
from kedit_jax.editing.moment_files import Moments, Sums, Work
from kedit_jax.editing.presets import assigned, read_settings
from kedit_jax.editing.requests import EditRequest, read_requests, write_requests
from kedit_jax.editing.session import EditSession, Event, start_session
from kedit_jax.editing.settings import EditSettings
from kedit_jax.errors import KeditError
from kedit_jax.evaluation import read_records, read_task
from kedit_jax.evaluation.datasets import write_records
from kedit_jax.export import delta_file, save_delta, staging
from kedit_jax.export.model_delta import ModelDelta
from kedit_jax.models import (
    Decoder,
    down_kernel_address,
    gpt2_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    named_parameters,
    save_model,
    with_parameters,
)
from kedit_jax.models.checkpoint_files import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    STORED_DTYPES,
    TensorFiles,
    locate_tensors,
    read_json,
)
from kedit_jax.models.loading import abstract_decoder
from kedit_jax.models.registry import config_from_json, config_to_json
from kedit_jax.solve import cache as prior_cache
from kedit_jax.solve.postprocess import parse_post

DEEP, NEAR, LONG = "@deep@", "@near@", "@long@"
"""Stand for values that no JSON writer makes: 30,000 lists in each other, some 900, a number of 6,000 digits."""

VALUES: Sequence[Any] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 2**31, 2**60, 10**12, -(10**12), 10**400, 0.5, -0.0, 1e-320, 1e308),
    *(float("nan"), float("inf"), "", " ", "{}", "{} {}", "a{}b", "\ud800", "\x00", "\x1b[31m", "../../x", "/etc/passwd"),
    *(
        "[/]",
        "[bold]",
        "<script>",
        "0",
        "1e999",
        "\u2028",
        "é" * 50,
        "x" * 5000,
        [],
        {},
        [[]],
        [None],
        {"": None},
        DEEP,
        LONG,
    ),
)
"""What a value in a tree is replaced by."""

SCRAPS = (
    *(
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b",",
        b":",
        b"\n",
        b"\r",
        b"\t",
        b"&a ",
        b"*a",
    ),
    *(b"\\ud800", b"9" * 30, b"1e999", b"NaN", b"-", b"null", b"[[" * 400, b"!!int ''", b"!!timestamp x", b"<<: ", b"? "),
    *(b"\x1f\x8b\x08", b"\xff" * 8, b"\x00" * 8, b"\x7f" * 8, b'{"a":' * 300, b"../", b"{}", b"'", b"|", b"#", b"%", b"@"),
)
"""What is put between bytes."""


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        reads: what it stands for, in words.
        seeds: valid inputs.
        read: reads an input in a folder that is its own.
        unpack, pack: between bytes and a tree of lists and dictionaries; what is packed is signed, where readers look at
            checksums.
        slow: one input takes tens of milliseconds.
    """

    name: str
    reads: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes, Path], object]
    unpack: Callable[[bytes], Any] | None = None
    pack: Callable[[Any], bytes] | None = None
    slow: bool = False


# --- spoiling ---------------------------------------------------------------------------------------------------------


def spoilt(target: Target, data: bytes, rng: random.Random) -> bytes:
    """The input with one to three flaws, in its bytes or in the tree that it holds."""
    for _ in range(rng.randint(1, 3)):
        if target.unpack is not None and target.pack is not None and rng.random() < 0.7:
            try:
                data = target.pack(_spoilt_tree(target.unpack(data), rng))
                continue
            except Exception:  # whatever unpackers raise: it is no longer in the form that holds a tree
                pass
        data = _spoilt_bytes(data, rng.choice(target.seeds), rng)
    return data


def _spoilt_bytes(data: bytes, other: bytes, rng: random.Random) -> bytes:
    at, length = rng.randint(0, len(data)), rng.randint(1, 12)
    match rng.randint(0, 6):
        case 0 if data:
            at = min(at, len(data) - 1)
            return data[:at] + bytes([data[at] ^ 1 << rng.randint(0, 7)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data[:at] + data[at + length :]
        case 3:
            return data[:at] + other[rng.randint(0, len(other)) :]
        case 4:
            return data[:at] + data[at : at + length] * rng.randint(2, 40) + data[at + length :]
        case 5:
            return data[:at] + bytes(rng.randint(0, 255) for _ in range(length)) + data[at + length :]
        case _:
            return data[:at] + rng.choice(SCRAPS) + data[at:]


def _spoilt_tree(tree: Any, rng: random.Random) -> Any:
    """A copy with one node replaced, left out, doubled, renamed, or wrapped."""
    places = list(_places(tree))
    path = rng.choice(places)
    if not path:
        return rng.choice(VALUES)
    parent = functools.reduce(lambda node, key: node[key], path[:-1], tree)
    key = path[-1]
    match rng.randint(0, 7):
        case 0:
            del parent[key]
        case 1:
            parent[key] = [parent[key]]
        case 2 if isinstance(parent, list):
            parent.extend([parent[key]] * rng.randint(1, 5))
        case 2 | 3 if isinstance(parent, dict):
            parent[rng.choice(["", "a", "values", "\ud800", "__class__", "0", "x" * 300])] = parent.pop(key)
        case 4:
            there = functools.reduce(lambda node, key: node[key], rng.choice(places), tree)
            parent[key] = json.loads(json.dumps(there, default=str))
        case _:
            parent[key] = rng.choice(VALUES)
    return tree


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _places(value, (*path, key))


def _json(tree: Any) -> bytes:
    """JSON as anyone may write it: half characters, NaN, any depth and any number of digits."""
    text = json.dumps(tree)
    for mark, depth in ((DEEP, 30_000), (NEAR, 850 + len(text) % 128)):
        text = text.replace(f'"{mark}"', "[" * depth + "]" * depth)
    text = text.replace(f'"{LONG}"', "9" * 6000)
    return text.encode()


# --- a small world ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A random model of two layers, its tokenizer, moments, and a session of three facts, all of them on disk."""

    model: Decoder
    tokenizer: Any
    moments: Moments
    session: EditSession
    folder: Path


def make_world(folder: Path) -> World:
    """Drawn, not computed: no program of XLA's but those that applying updates takes."""
    texts = ["Alice Smith was born in Paris. In Rome, people speak old French; Bob likes the violin."]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")
    config = gpt2_config(vocab_size=len(tokenizer), n_layers=2, d_model=8, n_heads=2, d_ff=12, max_positions=16)
    rng = np.random.default_rng(0)
    abstract = abstract_decoder(config)
    drawn = {name: 0.1 * rng.normal(size=leaf.shape) for name, leaf in named_parameters(abstract).items()}
    model = with_parameters(abstract, {name: _on_device(value) for name, value in drawn.items()})
    save_model(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    moments = Moments({0: np.eye(12)}, 100, model_fingerprint(model), "c" * 64, str(model.dtype), {0: 0.5})
    settings = EditSettings(layers=(0,), moment_weight=5.0, ridge=0.1, prefixes=0)
    session = _with_facts(start_session(model, tokenizer, moments, settings), rng)
    save_session(session, folder / "session")
    moment_files.write_moments(moment_files.moments_path(folder / "session", moments.fingerprint((0,))), moments)
    return World(model, tokenizer, moments, session, folder)


def _on_device(value: np.ndarray) -> Any:
    return jnp.asarray(value, jnp.float32)


def _with_facts(session: EditSession, rng: np.random.Generator) -> EditSession:
    """Three facts under keys and residuals that are drawn."""
    subjects = (("{} was born in", "Alice", "Rome"), ("In {}, people speak", "Paris", "violin"), ("{} likes", "Bob", "tea"))
    facts = tuple(EditRequest(*one, id=f"fact-{number}") for number, one in enumerate(subjects, 1))
    layers = {}
    with solve.float64():
        for layer in session.settings.layers:
            site = session.site(layer)
            keys, residuals = rng.normal(size=(3, 12)).astype(np.float32), rng.normal(size=(3, 8))
            stack = solve.Constraints(keys, residuals, np.ones(3))
            layers[layer], _ = histories.extended(session.layers[layer], site, stack)
        event = Event("edit", tuple(str(fact.id) for fact in facts), texts=tuple(fact.text for fact in facts))
        changed = dataclasses.replace(session, layers=layers, facts=facts, batches=(3,), events=(event,))
        return changed._with_model()


# --- the readers ------------------------------------------------------------------------------------------------------


def _header(data: bytes, folder: Path) -> object:
    (folder / SINGLE_FILE).write_bytes(data)
    found = TensorFiles(folder)
    if found.problems:
        raise KeditError.listing("damaged:", found.problems)
    return [tensor.read() for tensor in found.tensors.values() if tensor.kind in STORED_DTYPES]


def _index(data: bytes, folder: Path) -> object:
    for name in "ab":
        if not (folder / f"{name}.safetensors").exists():
            save_file({name: np.zeros(2, np.float32)}, folder / f"{name}.safetensors")
    (folder / INDEX_FILE).write_bytes(data)
    return locate_tensors(folder)


def _config(data: bytes, folder: Path) -> object:
    (folder / CONFIG_FILE).write_bytes(data)
    config = config_from_json(read_json(folder / CONFIG_FILE))
    again = config_from_json(json.loads(json.dumps(config_to_json(config))))
    if dataclasses.replace(again, rotary=config.rotary, local=config.local) != config:
        raise AssertionError(f"read back as {again}, was {config}")
    return config


def _model(world: World, data: bytes, folder: Path) -> object:
    if not (folder / SINGLE_FILE).exists():
        shutil.copy(world.folder / "model" / SINGLE_FILE, folder)
    (folder / CONFIG_FILE).write_bytes(data)
    return load_model(folder)


def _tokenizer(world: World, data: bytes, folder: Path) -> object:
    for path in (world.folder / "model").iterdir():
        if not (folder / path.name).exists() and path.name != SINGLE_FILE:
            shutil.copy(path, folder)
    (folder / "tokenizer.json").write_bytes(data)
    return load_tokenizer(folder)


def _requests(data: bytes, folder: Path) -> object:
    path = folder / "requests.jsonl"
    path.write_bytes(data)
    found = read_requests(path)
    write_requests(path, found)
    if read_requests(path) != found:
        raise AssertionError("what was read is not what was written")
    return found


def _records(data: bytes, folder: Path) -> object:
    path = folder / "records"
    path.write_bytes(data)
    found = read_records(path)
    requests = [record.request() for record in found]
    write_records(path, found)
    if [record.request() for record in read_records(path)] != [
        dataclasses.replace(one, id=one.id or str(record.case_id)) for one, record in zip(requests, found, strict=True)
    ]:
        raise AssertionError("what was read is not what was written")
    return found


def _task(data: bytes, folder: Path) -> object:
    (folder / "task").write_bytes(data)
    return read_task(folder / "task")


def _settings(data: bytes, folder: Path) -> object:
    (folder / "settings").write_bytes(data)
    read = read_settings(folder / "settings")
    shown = ", ".join(f"{name}={value}" for name, value in read.unused.items())  # as commands show it
    if EditSettings.from_dict(json.loads(json.dumps(read.settings.to_dict()))) != read.settings:
        raise AssertionError("what was read is not what was written")
    return shown


def _options(data: bytes, folder: Path) -> object:
    """A line an option: its number, and what is given for it."""
    text = data.decode("utf-8", "surrogateescape")
    readers: tuple[Callable[[str], object], ...] = (
        parse_columns,
        parse_layers,
        lambda given: assigned([given]),
        parse_post,
        _bytes,
        lambda given: read_bounds([given], None, 1),
    )
    return readers[ord(text[:1] or "0") % len(readers)](text[1:])


def _lines(data: bytes, folder: Path) -> object:
    (folder / "corpus.txt").write_bytes(data)
    return list(lines(folder / "corpus.txt"))


def _sums(data: bytes, folder: Path) -> object:
    (folder / "a").write_bytes(b"a")
    (folder / files.SUMS).write_bytes(data)
    problems = files.check_sums(folder)
    if problems:
        raise KeditError.listing("damaged:", problems)
    return problems


def _in_session(world: World, data: bytes, folder: Path) -> Path:
    """A copy of the stored session whose manifest is `data`, with checksums that fit."""
    version = newest_version(world.folder / "session")
    target = folder / version.name
    if not target.exists():
        shutil.copytree(version, target)
    stored = target / "_CHECKPOINT_METADATA"
    whole = json.loads((version / stored.name).read_bytes())
    text = json.dumps(whole | {"custom_metadata": "@manifest@"})
    stored.write_bytes(text.encode().replace(b'"@manifest@"', data))
    files.write_sums(target)
    return folder


def _manifest(world: World, data: bytes, folder: Path) -> object:
    found = read_manifest(_in_session(world, data, folder))
    read_events(found)
    with mock.patch.object(history, "console", Console(file=io.StringIO())):
        history.log(folder, every=True)
    return found


def _session(world: World, data: bytes, folder: Path) -> object:
    _in_session(world, data, folder)
    return load_session(folder, world.model, world.tokenizer, world.moments)


def _arrays(world: World, data: bytes, folder: Path) -> object:
    """The first byte chooses the file that the others replace; all checksums fit."""
    version = newest_version(world.folder / "session")
    shutil.rmtree(folder / version.name, ignore_errors=True)
    shutil.copytree(version, folder / version.name)
    paths = _array_files(folder / version.name)
    paths[data[0] % len(paths) if data else 0].write_bytes(data[1:])
    files.write_sums(folder / version.name)
    return load_session(folder, world.model, world.tokenizer, world.moments)


def _array_files(version: Path) -> list[Path]:
    return sorted(path for path in version.rglob("*") if path.is_file() and path.name != files.SUMS)


def _moments(data: bytes, folder: Path) -> object:
    path = folder / "moments-0.safetensors"
    path.write_bytes(data)
    refused: list[KeditError] = []
    work = Work("m", (0, 1), "float32", 8)
    for read in (
        lambda: moment_files.read_moments(path).fingerprint((0,)),
        lambda: moment_files.read_sums(path).squares,
        lambda: moment_files.stored_prefixes(folder, work, 1000),
    ):
        try:
            read()
        except KeditError as error:
            refused.append(error)
    if len(refused) == 3:
        raise refused[0]
    return path


def _prior(world: World, data: bytes, folder: Path) -> object:
    path = folder / _prior_name()
    path.write_bytes(data)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        editor = solve.cached_editor(folder, "memit", np.eye(3), ridge=0.5)
    if np.asarray(editor.prior.factor).shape != (3, 3) or not np.isfinite(np.asarray(editor.prior.factor)).all():
        raise AssertionError(f"a stored prior was taken whose factor is {np.asarray(editor.prior.factor)}")
    if said:
        raise KeditError(str(said[0].message))
    return editor


def _prior_name() -> str:
    return f"prior-{prior_cache._content('memit', np.eye(3), {'ridge': 0.5})}.safetensors"


def _delta(data: bytes, folder: Path) -> object:
    (folder / "delta.safetensors").write_bytes(data)
    staging.check_file(folder / "delta.safetensors", ours=delta_file.is_delta, overwrite=True)
    return delta_file.load_delta(folder / "delta.safetensors")


def _export(data: bytes, folder: Path) -> object:
    (folder / staging.MANIFEST).write_bytes(data)
    return staging.check_folder(folder, "merged", overwrite=True)


# --- trees in files ---------------------------------------------------------------------------------------------------


def _unpack_lines(data: bytes) -> Any:
    return [json.loads(line) for line in data.split(b"\n") if line.strip()]


def _pack_lines(tree: Any) -> bytes:
    return b"\n".join(map(_json, tree if isinstance(tree, list | tuple) else [tree]))


def _unpack_records(data: bytes) -> Any:
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    return _unpack_lines(data) if data[:1] == b"{" else json.loads(data)


def _unpack_yaml(data: bytes) -> Any:
    return yaml.safe_load(data)


def _unpack_tensors(data: bytes) -> Any:
    """The header, and the tensors' bytes behind it."""
    (length,) = struct.unpack("<Q", data[:8])
    return {"header": json.loads(data[8 : 8 + length]), "data": base64.b64encode(data[8 + length :]).decode()}


def _pack_tensors(tree: Any) -> bytes:
    header = _json(tree["header"])
    return struct.pack("<Q", len(header)) + header + base64.b64decode(tree["data"])


def _unpack_signed(data: bytes) -> Any:
    """As `_unpack_tensors`, with the JSON in the metadata unpacked, too."""
    tree = _unpack_tensors(data)
    about = tree["header"].get("__metadata__", {})
    for name, text in about.items():
        with contextlib.suppress(ValueError, TypeError):
            about[name] = {"json": json.loads(text)}
    return tree


def _pack_signed(sign: Callable[[dict[str, Any], Path], dict[str, Any]], tree: Any) -> bytes:
    """Metadata as texts, signed for the tensors that the header speaks of."""
    header = dict(tree["header"])
    about = header.get("__metadata__")
    if isinstance(about, dict):
        about = {
            name: _json(value["json"]).decode() if isinstance(value, dict) and "json" in value else value
            for name, value in about.items()
        }
        header["__metadata__"] = about
    data = _pack_tensors({"header": header, "data": tree["data"]})
    if not isinstance(about, dict):
        return data
    with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / _prior_name()
        path.write_bytes(data)
        header["__metadata__"] = sign(about, path)
        return _pack_tensors({"header": header, "data": tree["data"]})
    return data


def _stored(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping


def _sign_moments(about: dict[str, Any], path: Path) -> dict[str, Any]:
    about |= {"arrays": moment_files._digest(_stored(path))}
    return about | ({"about": moment_files._about_digest(about)} if "about" in about else {})


def _sign_prior(about: dict[str, Any], path: Path) -> dict[str, Any]:
    arrays = _stored(path)
    prior = solve.Prior(arrays["factor"], arrays.get("basis"))
    return about | {"checksum": prior_cache._checksum(path, prior, float(arrays["noise"]))}


def _sign_delta(about: dict[str, Any], path: Path) -> dict[str, Any]:
    return about | {"arrays": delta_file._digest(_stored(path))}


# --- valid inputs -----------------------------------------------------------------------------------------------------

CONFIGS: Sequence[dict[str, Any]] = (
    {
        "model_type": "gpt2", "vocab_size": 40, "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16,
        "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "eos_token_id": 3,
    },
    {
        "model_type": "llama", "vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        }, "eos_token_id": [1, 2], "head_dim": 4,
    },
    {
        "model_type": "gpt_neox", "vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": 16, "layer_norm_eps": 1e-5, "hidden_act": "gelu",
        "rotary_pct": 0.5, "rotary_emb_base": 777,
    },
    {
        "model_type": "phi3", "vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "original_max_position_embeddings": 16, "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}, "sliding_window": 8,
    },
    {
        "model_type": "gemma3_text", "vocab_size": 40, "num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
        "hidden_activation": "gelu_pytorch_tanh", "head_dim": 4, "sliding_window": 8, "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 4, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    },
    {
        "model_type": "qwen2", "vocab_size": 40, "num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 12, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4,
        "use_sliding_window": True,
    },
)  # fmt: skip

COUNTERFACT = {
    "case_id": 7, "pararel_idx": 1, "requested_rewrite": {
        "prompt": "{} was born in", "relation_id": "P19", "subject": "Alice", "target_new": {"str": "Rome", "id": "Q1"},
        "target_true": {"str": "Oslo", "id": "Q2"}}, "paraphrase_prompts": ["Alice comes from"],
    "neighborhood_prompts": ["Bob was born in"], "attribute_prompts": [], "generation_prompts": ["Alice is"],
    "same_subject": [{"prompt": "Alice likes", "target": "tea", "aliases": ["Tea"]}], "weight": 2,
}  # fmt: skip
RECORDS: Sequence[Any] = (
    [COUNTERFACT],
    [{
        "case_id": 1, "requested_rewrite": [COUNTERFACT["requested_rewrite"]], "questions": ["Where was she born?"],
        "new_answer": "Rome", "new_answer_alias": ["Roma"]}],
    [{"src": "Where is Alice from?", "subject": "Alice", "answers": ["Rome"], "alt": "Oslo", "rephrase": "Alice is from?",
      "loc": "who sings", "loc_ans": "Bob"}],
    [{"prompt": "Alice was born in", "subject": "Alice", "target_new": "Rome", "ground_truth": ["Oslo"],
      "rephrase_prompt": "x", "locality": {"Forgetfulness": [{"prompt": "Alice likes", "ground_truth": [["tea"]]}]},
      "portability": {"Reasoning": [{"prompt": "Her town is", "ground_truth": "Rome"}]},
      "locality_prompt": ["Bob is"], "locality_ground_truth": ["old"]}],
    [{"id": "a", "prompt": "Alice was born in", "subject": "Alice", "target": "Rome", "weight": 2, "relation": "born",
      "paraphrases": ["Alice is from"], "old_target": "Oslo"}],
)  # fmt: skip
REQUESTS: Sequence[Any] = (
    {"id": "a", "prompt": "{} was born in", "subject": "Alice", "target": "Rome", "relation": "born", "old_target": "Oslo"},
    {"prompt": "{} is in", "subject": "Rome", "target": "Italy", "weight": 0.5},
)
TABLES = (
    b"prompt,subject,target,weight\nAlice was born in,Alice,Rome,2\n\"In Paris, people\",Paris,speak,\n",
    b"id\tprompt\tsubject\ttarget\tparaphrases\n1\t{} is in\tOslo\tRome\tx\n",
    b"subject;prompt;target\nAlice;{} likes;tea\n",
)  # fmt: skip
TASKS: Sequence[Any] = (
    [{"context": "Rome is a", "choices": ["city", "tree"], "gold": 0}],
    [{"question": "What?", "choices": ["a", "b", "c", "d"], "answer": 2}],
    [{"sentence": "so good", "label": 1}, {"sentence": "bad", "label": 0}],
    [{"sentence": "They Went.", "label": 1}],
    [{"sentence1": "He ran home", "sentence2": "He went home", "label": 1}],
    [{"sentence1": "He ran home and then slept for hours", "sentence2": "He ran", "label": "entailment"}],
)
SETTINGS = (
    b"layers: [3, 4]\neditor: alphaedit\nmoment_weight: 15000\nvalues:\n  steps: 20\n  learning_rate: 5e-1\n"
    b"null_relative: 1e-3\n",
    b'{"layers": [0], "ridge": 1, "post": "rect:0.4", "values": {"clamp": 4}, "conflicts": "latest", "seed": 3}',
    b"alg_name: MEMIT\nlayers: [4, 5]\nclamp_norm_factor: 4\nlayer_selection: all\nfact_token: subject_last\n"
    b"v_num_grad_steps: 20\nv_lr: 5e-1\nkl_factor: 0.0625\nv_weight_decay: 1e-3\nmom2_update_weight: 15000\n"
    b"model_name: ./x\ndevice: 0\n",
    b"alg_name: ROME\nlayers: [5]\nmom2_adjustment: false\ncontext_template_length_params: [[5, 10]]\n",
)
OPTIONS = (b"0prompt=A,target=B", b"13,4,5", b"2values.learning_rate=5e-1", b"3rect:0.4", b"45GB", b"5norm=1")


def make_targets(world: World) -> dict[str, Target]:
    """Every reader, by name."""
    tensors = save(
        {
            "a": np.arange(6, dtype=np.float32).reshape(2, 3),
            "b": np.zeros((), np.float16),
            "c": np.ones(3, ml_dtypes.bfloat16),
        },
        {"format": "pt"},
    )
    index = {"metadata": {"total_size": 16}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    made = world.folder / "made"
    made.mkdir(exist_ok=True)
    moments = [moment_files.moments_path(made, "0"), made / "partial-0.safetensors", made / "old.safetensors"]
    rng = np.random.default_rng(0)
    c0 = {layer: (lambda a: a @ a.T)(rng.normal(size=(3, 3))) for layer in (0, 1)}
    sums = Sums.none((0, 1), 3)
    sums.add(iter((layer, np.tril(c0[layer])) for layer in c0), 4, "c")
    moment_files.write_sums(moments[1], sums, Work("m", (0, 1), "float32", 8))
    moment_files.write_moments(moments[0], Moments(c0, 10, "m", "c", "float32", {0: 0.5, 1: 0.25}), sums, 8)
    arrays = {str(layer): value for layer, value in c0.items()}
    about = {"tokens": "10", "model": "m", "corpus": "c", "dtype": "float32", "arrays": moment_files._digest(arrays)}
    save_file(arrays, moments[2], metadata=about)
    solve.cached_editor(made, "memit", np.eye(3), ridge=0.5)
    config = world.model.config
    updates = {
        down_kernel_address(0): Dense(np.zeros((12, 8))),
        down_kernel_address(1): LowRank(np.ones((12, 1)), np.ones((1, 8))),
    }
    fingerprint = model_fingerprint(world.model)
    save_delta(ModelDelta(EditDelta(updates), config, fingerprint, "float32"), made / "delta.safetensors", overwrite=True)
    version = newest_version(world.folder / "session")
    manifest = json.loads((version / "_CHECKPOINT_METADATA").read_bytes())["custom_metadata"]
    old = {name: value for name, value in manifest.items() if name not in ("retired", "skipped", "compacted", "times")}
    manifests = tuple(map(_json, (manifest, old | {"format": 1}, old | {"format": 2})))
    exported = {"format": staging.FORMAT, "form": "merged", "files": ["a", "b/c"]}
    records = tuple(map(_json, RECORDS))
    lined = tuple(map(_pack_lines, RECORDS))
    moment_form = (_unpack_signed, functools.partial(_pack_signed, _sign_moments))
    found = (
        Target("header", "weights: a safetensors file", (tensors,), _header, _unpack_tensors, _pack_tensors),
        Target("index", "weights: model.safetensors.index.json", (_json(index),), _index, json.loads, _json),
        Target("config", "config.json, to a configuration and back", tuple(map(_json, CONFIGS)), _config, json.loads, _json),
        Target("model", "config.json beside weights, to a model", ((world.folder / "model" / CONFIG_FILE).read_bytes(),),
               functools.partial(_model, world), json.loads, _json, slow=True),
        Target("tokenizer", "tokenizer.json", ((world.folder / "model" / "tokenizer.json").read_bytes(),),
               functools.partial(_tokenizer, world), json.loads, _json, slow=True),
        Target("requests", "edit requests, JSON Lines", (_pack_lines(REQUESTS),),
               _requests, _unpack_lines, _pack_lines),
        Target("records", "data sets: JSON, JSON Lines, gzip, six schemas",
               (*records, *lined, gzip.compress(records[0], mtime=0)),
               _records, _unpack_records, _json),
        Target("tables", "data sets: CSV, TSV", TABLES, _records),
        Target("tasks", "multiple-choice tasks", tuple(map(_pack_lines, TASKS)), _task, _unpack_lines, _pack_lines),
        Target("settings", "settings, YAML and JSON, ours and EasyEdit's", SETTINGS, _settings, _unpack_yaml, _json),
        Target("options", "values of options: columns, layers, --set, post, sizes, bounds", OPTIONS, _options),
        Target("corpus", "texts, a document a line", (b"Rome is old.\n\nParis, too.\n",), _lines),
        Target("sums", "SHA256SUMS", (f"{hashlib.sha256(b'a').hexdigest()}  a\n".encode(),), _sums),
        Target("manifest", "a session's manifest, as `kedit log` shows it", manifests, functools.partial(_manifest, world),
               json.loads, _json, slow=True),
        Target("session", "a session's manifest, to a session", manifests, functools.partial(_session, world),
               json.loads, _json, slow=True),
        Target("arrays", "the files of a session's arrays",
               tuple(bytes([i]) + path.read_bytes() for i, path in enumerate(_array_files(version))),
               functools.partial(_arrays, world), slow=True),
        Target("moments", "second moments, finished, partial and old", tuple(path.read_bytes() for path in moments),
               _moments, *moment_form),
        Target("prior", "factored priors", ((made / _prior_name()).read_bytes(),), functools.partial(_prior, world),
               _unpack_signed, functools.partial(_pack_signed, _sign_prior)),
        Target("delta", "exported deltas", ((made / "delta.safetensors").read_bytes(),), _delta, _unpack_signed,
               functools.partial(_pack_signed, _sign_delta)),
        Target("export", "the manifest of an export", (_json(exported),), _export, json.loads, _json),
    )  # fmt: skip
    return {target.name: target for target in found}
