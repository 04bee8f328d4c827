"""Files of strangers: nothing in them runs, leads elsewhere, or takes memory that their size does not account for."""

import ast
import gzip
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import save_file

from experiments.scale.hostile import World, make_world
from kedit_jax import files
from kedit_jax.checkpoint import has_session, load_session, lock_session, newest_version, read_manifest, save_session
from kedit_jax.cli.common import MAX_LINE, lines
from kedit_jax.cli.export import _bytes
from kedit_jax.cli.guarding import read_bounds
from kedit_jax.editing.presets import MAX_SETTINGS, assigned, read_settings
from kedit_jax.editing.requests import read_requests
from kedit_jax.errors import CheckpointError, KeditError, RequestError, SessionError, shown
from kedit_jax.evaluation import read_records, read_task
from kedit_jax.evaluation.datasets import files as dataset_files
from kedit_jax.evaluation.datasets import write_records
from kedit_jax.evaluation.datasets.reading import MAX_LISTED
from kedit_jax.evaluation.records import RecordError
from kedit_jax.export.merged import _beside
from kedit_jax.models import checkpoint_files, load_model, load_tokenizer, read_config
from kedit_jax.models.checkpoint_files import read_json
from kedit_jax.solve.cache import cached_editor

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def model_dir(world: World, tmp_path: Path) -> Path:
    shutil.copytree(world.folder / "model", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def stored(world: World, tmp_path: Path) -> Path:
    """A session's folder; `resigned` makes its checksums fit whatever was changed."""
    shutil.copytree(world.folder / "session", tmp_path / "session")
    return tmp_path / "session"


def rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def resigned(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change a session's manifest, as whoever sends it can: checksums that fit cost nothing."""
    version = newest_version(folder)
    rewrite(version / "_CHECKPOINT_METADATA", lambda whole: whole | {"custom_metadata": change(whole["custom_metadata"])})
    files.write_sums(version)


# --- nothing runs -----------------------------------------------------------------------------------------------------

CALLS = {"eval", "exec", "compile", "__import__", "unsafe_load", "full_load", "system", "popen"}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch", "subprocess"}


def offences(source: str) -> list[str]:
    """Whatever could run code that a file holds: loaders of pickles, evaluation of texts, unsafe YAML, code of a hub."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"imports {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called.split(".")[-1] in CALLS and called not in ("re.compile", "platform.system"):
            found.append(f"calls {called}")
        if called == "yaml.load" and [ast.unparse(arg) for arg in node.args[1:]] != ["_Loader"]:
            found.append("loads YAML with another loader than the one for plain values")
        if given.get("allow_pickle", "False") != "False" or given.get("trust_remote_code", "False") != "False":
            found.append(f"{called} with {given}")
        if called.endswith(".from_pretrained") and "trust_remote_code" not in given:
            found.append(f"{called} leaves it to others whether code of the hub runs")
    return found


def test_nothing_in_the_package_can_run_what_a_file_holds() -> None:
    found = {path.name: offences(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "kedit_jax").rglob("*.py"))}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "eval(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.full_load(text)",
        "np.load(path, allow_pickle=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(path)",
        "os.system(text)",
    ],
)
def test_negative_control_what_could_is_found(source: str) -> None:
    assert offences(source)
    assert not offences("re.compile(text)\nnp.load(path)\nyaml.load(text, _Loader)\nimport json")


@pytest.mark.filterwarnings("ignore")
def test_code_beside_a_tokenizer_or_model_does_not_run(model_dir: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    evil = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Evil:\n    pass\n"
    for name in ("tokenization_evil", "modeling_evil", "configuration_evil"):
        (model_dir / f"{name}.py").write_text(evil)
    rewrite(
        model_dir / "tokenizer_config.json",
        lambda old: old | {"auto_map": {"AutoTokenizer": [None, "tokenization_evil.Evil"]}, "tokenizer_class": "Evil"},
    )
    models = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    rewrite(model_dir / "config.json", lambda old: old | {"auto_map": models, "trust_remote_code": True})
    load_model(model_dir)
    try:
        load_tokenizer(model_dir)
    except CheckpointError as error:
        assert "trust_remote_code" in str(error) or "tokenizer" in str(error)  # noqa: PT017, either outcome is fine
    assert not ran.exists()
    exec(compile(evil, "evil", "exec"))
    assert ran.exists(), "negative control: it would have shown"


def test_yaml_makes_plain_values_alone(tmp_path: Path) -> None:
    for text in ("!!python/object/apply:os.getcwd []", "!!timestamp x", "!!int ''", "!!python/name:os.system"):
        (tmp_path / "s.yaml").write_text(f"layers: [1]\nridge: {text}\n")
        with pytest.raises(KeditError, match=r"s\.yaml"):
            read_settings(tmp_path / "s.yaml")
        with pytest.raises(KeditError, match="no value that can be read"):
            assigned([f"ridge={text}"])


# --- nothing leads elsewhere ------------------------------------------------------------------------------------------


def test_a_lock_that_is_a_link_leaves_its_target_alone(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for link in (os.symlink, os.link):
        (stored / files.LOCK).unlink(missing_ok=True)
        link(tmp_path / "precious", stored / files.LOCK)
        with pytest.raises(SessionError, match="cannot save the session"), lock_session(stored):
            pass
        assert (tmp_path / "precious").read_text() == "precious"
    (stored / files.LOCK).unlink()
    os.mkfifo(stored / files.LOCK)
    with pytest.raises(SessionError, match=r"no file of its own; delete it"), lock_session(stored):
        pass


@pytest.mark.parametrize("signed", [True, False])
def test_links_and_devices_in_a_session_are_refused(stored: Path, world: World, signed: bool) -> None:
    """Reading /dev/zero for its checksum would never end."""
    version = newest_version(stored)
    shutil.rmtree(version / "arrays")
    (version / "arrays").symlink_to("/dev/zero")
    os.mkfifo(version / "pipe")
    if not signed:
        rewrite(
            version / "_CHECKPOINT_METADATA",
            lambda whole: whole | {"custom_metadata": whole["custom_metadata"] | {"format": 2}},
        )
        (version / files.SUMS).unlink()
    with pytest.raises(SessionError, match=r"arrays is a link or no regular file\n  - pipe is a link"):
        load_session(stored, world.model, world.tokenizer, world.moments)


def test_what_was_left_for_a_writer_is_not_followed(stored: Path, world: World, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    for name in (".writing-00000002", ".removed-00000001"):
        (stored / name).symlink_to(tmp_path / "elsewhere")
    save_session(world.session, stored)
    assert newest_version(stored).name == "00000002"
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["file"]


def test_moments_of_a_session_are_found_by_a_fingerprint_and_not_by_a_path(stored: Path) -> None:
    resigned(stored, lambda old: old | {"moments": "/../../elsewhere"})
    with pytest.raises(SessionError, match=r"moments is '/\.\./\.\./elsewhere'; it must be a sha256"):
        read_manifest(stored)


def test_an_export_copies_no_file_that_a_link_leads_to(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for place in (blobs / "sum", tmp_path / "private.json"):
        place.write_text("{}")
    (snapshot / "own.json").write_text("{}")
    (snapshot / "cached.json").symlink_to("../../blobs/sum")
    (snapshot / "merges.txt").symlink_to(tmp_path / "private.json")
    assert [path.name for path in _beside(snapshot)] == ["cached.json", "own.json"]


@pytest.mark.parametrize("shard", ["../a.safetensors", "/etc/passwd", "..", "", "x" * 5000, "a\x00b", "sub/a.safetensors"])
def test_shards_lie_beside_their_index(model_dir: Path, shard: str) -> None:
    (model_dir / "model.safetensors").unlink()
    (model_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
    with pytest.raises(CheckpointError, match=r"beside the index|does not exist|no name of a file"):
        load_model(model_dir)


# --- nothing takes more memory than its size accounts for -------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("vocab_size", 10**12, "vocab_size is 1000000000000: it must be an integer of at most 2147483647"),
        ("n_layer", 10**9, "n_layer is 1000000000: it must be an integer of at most 10000"),
        ("n_embd", 10**400, "n_embd is 1000000"),
        ("n_positions", -5, "n_positions is -5: it must be an integer of at least 1"),
        ("eos_token_id", 2**70, "eos_token_id is"),
    ],
)
def test_sizes_of_a_config_are_refused_before_anything_is_made(model_dir: Path, field: str, value: int, words: str) -> None:
    rewrite(model_dir / "config.json", lambda old: old | {field: value})
    with pytest.raises(CheckpointError) as caught:
        load_model(model_dir)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_all_hostile_sizes_are_named_at_once(tmp_path: Path) -> None:
    config = {
        "model_type": "phi3", "vocab_size": 2**40, "num_hidden_layers": 10**9, "hidden_size": 2**32,
        "num_attention_heads": 2**33, "intermediate_size": 1e3, "max_position_embeddings": 2**50, "rms_norm_eps": 10**400,
        "hidden_act": ["silu"], "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1e308},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    for name in (*list(config)[1:9], "partial_rotary_factor"):
        assert f"{name} is" in str(caught.value)


def test_large_sizes_that_can_be_are_compared_with_the_weights(model_dir: Path) -> None:
    """No parameter is made before every tensor was found to fit."""
    rewrite(model_dir / "config.json", lambda old: old | {"vocab_size": 2**31 - 1, "n_positions": 2**31 - 1})
    with pytest.raises(CheckpointError, match=r"wte\.weight has shape .* asks for \[2147483647, 8\]"):
        load_model(model_dir)


@pytest.mark.parametrize("length", [2**60, 2**63 + 1, 100, 0])
def test_a_header_that_claims_any_length(model_dir: Path, length: int) -> None:
    (model_dir / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(model_dir)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 10_000 + "}", "\ufeff{}", "[1]"])
def test_json_of_any_depth_and_any_number_of_digits(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_json_that_is_too_large_or_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # without a block on the disk
    with pytest.raises(CheckpointError, match="more than 67,108,864 bytes"):
        read_json(tmp_path / "config.json")
    monkeypatch.setattr(checkpoint_files, "MAX_JSON", 10)
    (tmp_path / "config.json").write_text('{"a": 123456}')
    with pytest.raises(CheckpointError, match="more than 10 bytes"):
        read_json(tmp_path / "config.json")


def test_gzip_that_unpacks_to_a_thousand_times_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always = 2**18
    monkeypatch.setattr(dataset_files, "MAX_UNPACKED", always)  # or reading the half that is allowed would take a while
    line = b'{"prompt": "{} is in", "subject": "Rome", "target": "Italy"}\n'
    (tmp_path / "bomb").write_bytes(gzip.compress(line * (2 * always // len(line)), mtime=0))
    (tmp_path / "blank").write_bytes(gzip.compress(b" " * (2 * always), mtime=0))
    for name in ("bomb", "blank"):
        assert (tmp_path / name).stat().st_size < always / 100
        with pytest.raises(RecordError, match="unpack to more than 100 times as many"):
            read_records(tmp_path / name)
    (tmp_path / "honest").write_bytes(gzip.compress(line * 1000, mtime=0))
    assert len(read_records(tmp_path / "honest")) == 1000


def test_millions_of_flawed_records_are_counted_not_kept(tmp_path: Path) -> None:
    (tmp_path / "records").write_text('{"target": 1}\n' * 5000)
    with pytest.raises(RecordError) as caught:
        read_records(tmp_path / "records")
    listed, more = str(caught.value).splitlines()[1:-1], str(caught.value).splitlines()[-1]
    assert MAX_LISTED <= len(listed) < MAX_LISTED + 5
    unlisted = int(re.search(r"and ([\d,]+) more", more)[1].replace(",", ""))  # type: ignore[index]
    per_record = sum(line.startswith("  - line 1:") for line in listed)
    assert len(listed) + unlisted == 5000 * per_record


def test_aliases_that_stand_for_a_billion_values(tmp_path: Path) -> None:
    names = "abcdefghi"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in itertools.pairwise(names))
    for text in (bomb, "layers: &a [*a]", "values: &v {steps: *v}"):
        (tmp_path / "s.yaml").write_text(text)
        with pytest.raises(KeditError, match="alias"):
            read_settings(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"layers": [1], "ridge": ' + "9" * 400 + "}", "ridge is inf; it must be finite"),
        ('{"layers": [1], "memory": Infinity, "l2": NaN}', "l2 is nan; it must be positive\n  - memory is inf"),
        ('{"layers": [1], "prefixes": 1000000000000}', "prefixes is 1000000000000; it must be at most 10000"),
        ('{"layers": [1], "seed": ' + "9" * 30 + "}", "seed is"),
        ('{"layers": [1], "values": ' + '{"steps":' * 900 + "1" + "}" * 900 + "}", "settings"),
        ('{"layers": ' + "[" * 800 + "]" * 800 + "}", "must be a list of whole numbers"),
        ('{"layers": 5}', "layers is 5, which has the wrong type"),
        ('{"alg_name": [], "layers": 5}', "alg_name [] is not one of"),
        ("x" * (MAX_SETTINGS + 1), "more than 65,536 bytes"),
    ],
)
def test_settings_that_no_machine_could_follow(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(KeditError) as caught:
        read_settings(tmp_path / "s.json")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_arrays_that_zeros_were_packed_into(stored: Path, world: World, tmp_path: Path) -> None:
    """Zeros compress to nothing: 100 KB of a session could ask for gigabytes."""
    version = newest_version(stored)
    large = {"layers": {"0": {"keys": np.zeros((50, 100, 1000)), "update": np.zeros((12, 8))}}, "size": np.array([3])}
    manifest = json.loads((version / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    ocp.save_checkpointables(tmp_path / "large", {"arrays": large}, custom_metadata=manifest)
    shutil.rmtree(version)
    shutil.copytree(tmp_path / "large", version)
    files.write_sums(version)
    assert sum(path.stat().st_size for path in version.rglob("*")) < 100_000
    with pytest.raises(SessionError, match=r"'keys'\] has shape \(50, 100, 1000\), more than 15 rows"):
        load_session(stored, world.model, world.tokenizer, world.moments)


def test_a_document_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("x" * (MAX_LINE + 10))
    with pytest.raises(KeditError, match="a line has more than 16,777,216 characters"):
        list(lines(tmp_path / "corpus"))


def test_shown_is_short_for_values_of_any_depth_and_width() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    wide = [0]
    for _ in range(50):
        wide = [wide, wide]  # type: ignore[list-item]
    for value in (deep, wide, "x" * 10**6, 10**4000, {"a": deep}, list(range(10**6))):
        assert len(shown(value)) < 1000
    assert shown({"a": [1, "b", None]}) == "{'a': [1, 'b', None]}"


# --- everything wrong is one error ------------------------------------------------------------------------------------


def broken(old: Mapping[str, Any]) -> dict[str, Any]:
    facts = [*old["facts"][:2], {"prompt": "no slot", "subject": 3, "id": None}, []]
    events = [{"kind": "[/]", "ids": [1], "undoes": 7}, "x"]
    model = {"fingerprint": 1, "family": "gpt2", "n_layers": True, "kernel": [12], "dtype": None}
    changed = {"facts": facts, "events": events, "model": model, "batches": [-1], "sizes": {"rows": 1}, "priors": {"0": 1}}
    changed |= {"times": ["a"] * 9, "compacted": 10**30, "prefixes": ["\ud800"], "moments": 5, "settings": {"layers": "x"}}
    return {name: value for name, value in (dict(old) | changed).items() if name != "arrays"}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_manifest_s_problems_are_listed_whatever_its_format(stored: Path, world: World, number: int) -> None:
    resigned(stored, lambda old: broken(old) | {"format": number})
    if number < 3:
        (newest_version(stored) / files.SUMS).unlink()
    for read in (read_manifest, lambda folder: load_session(folder, world.model, world.tokenizer, world.moments)):
        with pytest.raises(SessionError, match="is damaged") as caught:
            read(stored)
        for words in (
            "model.fingerprint is 1", "model.n_layers is True", "model.kernel is [12]", "model.dtype is None",
            "priors.0 is 1", "moments is 5", "arrays is missing", "prefixes is",
            "facts: number 3: prompt 'no slot' has 0 slots",
            "facts: number 3: 'subject' must be text",
            "facts: number 3 has no id", "facts: number 4 is []",
            "compacted is 1000", "batches is [-1]", "sizes is {'rows': 1}", "event 1: kind is '[/]'", "event 1: ids is [1]",
            "event 1: undoes is 7", "event 2 is 'x'", "times is", "settings: ",
        ):  # fmt: skip
            assert words in str(caught.value), words


@pytest.mark.parametrize("missing", ["facts", "events", "settings", "model", "moments", "batches", "prefixes", "priors"])
def test_an_old_manifest_without_a_field_is_an_error_for_users(stored: Path, missing: str) -> None:
    resigned(stored, lambda old: {name: value for name, value in old.items() if name != missing} | {"format": 1})
    (newest_version(stored) / files.SUMS).unlink()
    with pytest.raises(SessionError, match=rf"{missing} is missing"):
        read_manifest(stored)


@pytest.mark.parametrize("number", ["3", [], True, 0, -1, None, 2.5])
def test_formats_that_are_no_numbers(stored: Path, number: Any) -> None:
    resigned(stored, lambda old: old | {"format": number})
    with pytest.raises(SessionError, match="its format is"):
        read_manifest(stored)


def test_a_manifest_of_any_depth(stored: Path) -> None:
    version = newest_version(stored)
    text = json.dumps({"custom_metadata": "@"}).replace('"@"', "[" * 50_000 + "]" * 50_000)
    (version / "_CHECKPOINT_METADATA").write_text(text)
    files.write_sums(version)
    with pytest.raises(SessionError, match="is damaged"):
        read_manifest(stored)
    (version / files.SUMS).unlink()
    assert has_session(stored)
    with pytest.raises(SessionError, match="no complete session"):
        read_manifest(stored)


def test_arrays_with_numbers_that_are_none(stored: Path, world: World, tmp_path: Path) -> None:
    """What is said names how many there are, and where, never the numbers."""
    version = newest_version(stored)
    arrays = ocp.load_checkpointables(version)["arrays"]
    arrays["layers"]["0"]["update"] = np.full((12, 8), np.nan)
    manifest = json.loads((version / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    ocp.save_checkpointables(tmp_path / "nan", {"arrays": arrays}, custom_metadata=manifest)
    shutil.rmtree(version)
    shutil.copytree(tmp_path / "nan", version)
    files.write_sums(version)
    with pytest.raises(SessionError, match=r"'update'\] has 96 entries that are NaN or infinite"):
        load_session(stored, world.model, world.tokenizer, world.moments)


@pytest.mark.parametrize(
    "factor", [np.eye(4), np.full((3, 3), np.nan), -np.eye(3), np.eye(3)[:2], np.eye(3, dtype=np.float32)]
)
def test_a_stored_prior_that_does_not_fit_is_made_anew(tmp_path: Path, factor: np.ndarray) -> None:
    from kedit_jax.solve import Prior
    from kedit_jax.solve.cache import _checksum

    good = cached_editor(tmp_path, "memit", np.eye(3), ridge=0.5)
    (path,) = tmp_path.glob("prior-*")
    save_file(
        {"factor": np.ascontiguousarray(factor), "noise": np.array(1.0)},
        path,
        metadata={"checksum": _checksum(path, Prior(factor), 1.0)},
    )
    with pytest.warns(UserWarning, match="is damaged .* and is made anew"):
        again = cached_editor(tmp_path, "memit", np.eye(3), ridge=0.5)
    np.testing.assert_array_equal(np.asarray(again.prior.factor), np.asarray(good.prior.factor))


def test_halves_of_characters(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "{} is in", "subject": "\\ud800", "target": "Italy", "id": "\\udfff"}')
    with pytest.raises(RequestError, match=r"'subject' .* lone surrogate(.|\n)*'id' .* lone surrogate"):
        read_requests(path)
    with pytest.raises(RecordError, match="lone surrogate"):
        read_records(path)
    path.write_text('{"src": "Who is Bob?", "subject": "Bob", "answers": ["he"], "note": "\\ud800"}')
    read = read_records(path)
    write_records(path, read)
    assert read_records(path)[0].extra == {"note": "\ud800"}, "what nothing reads is kept"


def test_a_field_that_one_schema_ignores_is_not_read_in_another(tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_text('[{"prompt": "Bob is", "subject": "Bob", "target_new": "old", "weight": 7, "subject_proposed": true}]')
    (record,) = read_records(path)
    write_records(path, [record])
    (again,) = read_records(path)
    assert (again.weight, again.subject_proposed) == (record.weight, record.subject_proposed) == (1.0, False)


def test_tasks_that_lack_what_tells_them(tmp_path: Path) -> None:
    (tmp_path / "task").write_text('{"sentence1": "He ran", "label": 1}\n')
    with pytest.raises(KeditError, match="no sentence2"):
        read_task(tmp_path / "task")
    (tmp_path / "task").write_text('{"sentence": "so good", "label": 1, "choices": 5}\n')
    assert len(read_task(tmp_path / "task").questions) == 1


def test_options_that_are_no_numbers() -> None:
    for text in ("9" * 400 + "GB", "1" + "0" * 308 + "TB", "nan", "infGB", "0"):
        with pytest.raises(KeditError, match="is no size"):
            _bytes(text)
    assert _bytes("2 GiB") == 2**31
    with pytest.raises(KeditError, match="bounds nothing"):
        read_bounds(["norm=nan"], None, 1)
    with pytest.raises(KeditError, match="no value that can be read"):
        assigned([f"ridge={'[' * 5000}"])


@pytest.mark.parametrize(
    "text", ['{"added_tokens": 1}', '{"model": {"vocab": 5}}', "[" * 50_000, "", "[]", '{"version": 9}']
)
@pytest.mark.filterwarnings("ignore")
def test_tokenizers_that_are_none(model_dir: Path, text: str) -> None:
    (model_dir / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"no tokenizer that transformers can open|is slow"):
        load_tokenizer(model_dir)
