"""The command line on a model of one's own: stats, edit, log, retract, eval, and what it says to bad input."""

import io
import json
import os
import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kedit_jax import cli
from kedit_jax.checkpoint import has_session, lock_session, read_manifest
from kedit_jax.cli.common import console
from kedit_jax.errors import KeditError
from kedit_jax.models import Decoder, gpt2_config, save_model

TEXTS = [
    "The old dog saw a cat near the house.",
    "Alice Smith plays the violin in Paris.",
    "You and I speak French because the cat is a dog.",
    "Therefore the small river is a friend of Bob Stone.",
]
FACTS = [
    {"id": "alice", "prompt": "{} plays the", "subject": "Alice Smith", "target": "cat"},
    {"id": "bob", "prompt": "The friend of {} speaks", "subject": "Bob Stone", "target": "French"},
    {"prompt": "{} is a", "subject": "Paris", "target": "river dog"},
]
RECORD = {
    "case_id": 0,
    "pararel_idx": 0,
    "requested_rewrite": {
        "prompt": "{} plays the",
        "relation_id": "plays",
        "subject": "Alice Smith",
        "target_new": {"str": "cat", "id": "cat"},
        "target_true": {"str": "violin", "id": "violin"},
    },
    "paraphrase_prompts": ["The cat saw Alice Smith. Alice Smith plays"],
    "neighborhood_prompts": ["Bob Stone plays the"],
    "attribute_prompts": [],
    "generation_prompts": ["Alice Smith likes"],
}
CATS = [{"context": "The old dog saw a", "choices": ["cat", "house"], "gold": gold} for gold in (0, 1)]
OPTIONS = ["--layers", "1,2", "--moment-weight", "10"]

Kedit = Callable[..., str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model in Hugging Face layout, its tokenizer, a corpus, facts and records."""
    folder = tmp_path_factory.mktemp("home")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator(TEXTS * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=special[0], pad_token=special[0])
    config = gpt2_config(vocab_size=raw.get_vocab_size(), n_layers=4, d_model=16, n_heads=2, d_ff=32, max_positions=64)
    save_model(Decoder(config, rngs=nnx.Rngs(0)), folder / "model", dtype=jnp.float32)
    tokenizer.save_pretrained(folder / "model")
    (folder / "corpus.txt").write_text("\n".join(TEXTS * 12))
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in FACTS))
    (folder / "records.json").write_text(json.dumps([RECORD]))
    (folder / "cats.jsonl").write_text("".join(json.dumps(question) + "\n" for question in CATS))
    return folder


@pytest.fixture
def kedit(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Kedit:
    """Runs the command line in the home folder; returns what it printed, or raises what it exited with."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(console, "width", 200)  # what a worker of pytest-xdist imports has a width already

    def run(*args: str, status: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["kedit", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code in ((0, None) if status == 0 else (status,)), printed.out + printed.err
        return printed.out + printed.err

    return run


def test_a_session_from_the_first_fact_to_the_last(home: Path, kedit: Kedit) -> None:
    first = kedit("edit", "model", "facts.jsonl", "--session", "s", "--corpus", "corpus.txt", "--batch", "2", *OPTIONS)
    assert "3 facts in 2 batches" in first
    assert [fact["id"] for fact in read_manifest(home / "s")["facts"]] == ["alice", "bob", "fact-3"]

    again = kedit("edit", "model", "facts.jsonl", "--session", "s")
    assert "3 of 3 facts are in the session already" in again

    assert "took back 1; 2 facts in 2 batches" in kedit("retract", "model", "bob", "--session", "s")
    log = kedit("log", "--session", "s")
    assert "retract" in log
    assert "bob" in log
    assert "2 facts stand, written by memit (aligned) into layers 1, 2" in log

    evaluate = ["eval", "model", "records.json", "--session", "s", "--heldout", "corpus.txt", "--json", "scores.json"]
    also = ["--generation", "--fluency", "--references", "corpus.txt", "--ability", "cats.jsonl", "--report", "s.html"]
    printed = kedit(*evaluate, *also)
    assert "left to speak" in printed
    assert "cats" in printed
    rows = {row["model"]: row for row in json.loads((home / "scores.json").read_text())["rows"]}
    assert set(rows) == {"unedited", "edited"}
    assert all(np.isfinite(row["perplexity"]) for row in rows.values())
    assert rows["edited"]["perplexity"] != rows["unedited"]["perplexity"]
    for row in rows.values():
        assert row["free_answers"]["n"] == row["free_text"]["n"] == row["free_text"]["n_consistency"] == 1
        assert row["free_text"]["fluency"] > 0
        assert row["ability"]["cats"] | {"accuracy": 0, "f1": 0} == {"accuracy": 0, "f1": 0, "chance": 50, "n": 2}
    told, html = json.loads((home / "scores.json").read_text())["session"], (home / "s.html").read_text()
    assert told["equivalence_error"] < 1e-10
    assert f'value="{told["equivalence_error"]!r}"' in html
    assert [batch["facts"] for batch in told["batches"]] == [1, 1]
    assert "The cat saw Alice Smith. Alice Smith plays" in html, "a paraphrase, completed before and after"
    assert "Bob Stone speaks → French" in html, "what was taken back"


def test_a_history_as_a_person_reads_it(home: Path, kedit: Kedit) -> None:
    """Conflict, dry run, retraction, restoring, undoing, merging and compacting, each shown in the log."""
    (home / "later.jsonl").write_text(json.dumps(FACTS[0] | {"id": "alice-2", "target": "dog"}) + "\n")
    for session in ("h", "other"):
        file = "facts.jsonl" if session == "h" else "later.jsonl"
        kedit("edit", "model", file, "--session", session, "--corpus", "corpus.txt", *OPTIONS)
    dry = kedit("edit", "model", "later.jsonl", "--session", "h", "--dry-run")
    assert "contradicts alice of the session: 'Alice Smith plays the' -> 'cat'" in dry
    assert "1 facts would be written, 0 skipped, and 1 of the session replaced" in dry
    assert len(read_manifest(home / "h")["events"]) == 1, "nothing was stored"

    assert "alice-2" in kedit("edit", "model", "later.jsonl", "--session", "h", "--conflicts", "reject", status=1)
    kedit("edit", "model", "later.jsonl", "--session", "h")
    assert [fact["id"] for fact in read_manifest(home / "h")["facts"]] == ["bob", "fact-3", "alice-2"]
    skipped = kedit("edit", "model", "facts.jsonl", "--session", "h")
    assert "1 of 3 facts were taken back or replaced before (`kedit restore`" in skipped
    assert "undid step 2 (edit)" in kedit("undo", "model", "--session", "h")
    assert "took back 1" in kedit("retract", "model", "bob", "--session", "h")
    assert "restored 1" in kedit("restore", "model", "bob", "--session", "h")
    assert "merged 1 facts of other" in kedit("merge", "model", "other", "--session", "h", "--moments", "h/moments")
    assert "compacted 3 facts" in kedit("compact", "model", "--session", "h", "--yes")
    assert "compacted into statistics" in kedit("retract", "model", "bob", "--session", "h", status=1)

    log = kedit("log", "--session", "h").splitlines()
    steps = [line.split("  ")[:2] for line in log if line.startswith("step")]
    assert steps == [
        ["step 7", "compact"],
        ["step 6", "merge"],
        ["step 5", "restore"],
        ["step 4", "retract"],
        ["step 3", "undo of step 2"],
        ["step 2", "edit"],
        ["step 1", "edit"],
    ]
    second = log[log.index(next(line for line in log if line.startswith("step 2"))) :]
    assert "1 fact, 1 replaced" in second[0]
    assert second[1:3] == ["    + alice-2  Alice Smith plays the -> dog", "    - alice  Alice Smith plays the -> cat"]
    assert "3 facts stand, 3 of them compacted" in log[-1]


def test_compacting_asks_first(home: Path, kedit: Kedit, monkeypatch: pytest.MonkeyPatch) -> None:
    kedit("edit", "model", "facts.jsonl", "--session", "asked", "--corpus", "corpus.txt", *OPTIONS)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    assert "never be retracted" in kedit("compact", "model", "--session", "asked", status=1)
    assert read_manifest(home / "asked")["compacted"] == 0


def test_numbers_that_the_editor_does_not_read_are_refused(home: Path, kedit: Kedit) -> None:
    options = ["--layers", "1", "--editor", "alphaedit", "--moment-weight", "10"]
    said = kedit("edit", "model", "facts.jsonl", "--session", "no", "--corpus", "corpus.txt", *options, status=1)
    assert "editor 'alphaedit' does not use --moment-weight; it uses l2, null_rank, null_relative, null_threshold" in said


def test_commands_that_change_a_session_wait_for_nobody(home: Path, kedit: Kedit) -> None:
    """Each names who is writing and changes nothing; those that only read go on."""
    begin = ["edit", "model", "facts.jsonl", "--corpus", "corpus.txt", "--session", "held", *OPTIONS]
    with lock_session(home / "held"):
        assert f"process {os.getpid()} on" in kedit(*begin, status=1)
    kedit(*begin)
    before = read_manifest(home / "held")
    with lock_session(home / "held"):
        changing = [begin, ["retract", "model", "alice"], ["restore", "model", "alice"], ["undo", "model"]]
        changing += [["merge", "model", "held"], ["compact", "model", "--yes"]]
        for command in changing:
            said = kedit(*command, *(["--session", "held"] if command is not begin else []), status=1)
            assert f"process {os.getpid()} on" in said, command[0]
        kedit(*begin, "--dry-run")
        kedit("log", "--session", "held")
    assert read_manifest(home / "held") == before
    assert "no session in" in kedit("retract", "model", "alice", "--session", "none", status=1)
    assert not (home / "none").exists()


def test_a_guarded_edit_keeps_what_is_within_bounds(home: Path, kedit: Kedit) -> None:
    whole = ["edit", "model", "facts.jsonl", "--corpus", "corpus.txt", "--batch", "1", *OPTIONS]
    kedit(*whole, "--session", "unguarded")
    wide = ["--guard", "norm=1000", "--guard", "perplexity=1e9", "--guard-texts", "corpus.txt", "--guard-every", "2"]
    kedit(*whole, "--session", "wide", *wide)
    assert read_manifest(home / "wide")["facts"] == read_manifest(home / "unguarded")["facts"]
    said = kedit(*whole, "--session", "narrow", "--guard", "norm=1e-9", status=1)
    assert "rolled back: norm of the update over that of its kernel is" in said
    manifest = read_manifest(home / "narrow")
    assert (manifest["facts"], [event["kind"] for event in manifest["events"]]) == ([], ["rollback"])
    assert "must be at most 1e-09" in kedit("log", "--session", "narrow")
    kedit(*whole, "--session", "narrow")
    assert len(read_manifest(home / "narrow")["facts"]) == 2, "the one rolled back is skipped, the others are written"
    said = kedit(*whole, "--session", "bad", "--guard", "norm", "--guard", "sense=1", "--guard", "perplexity=2", status=1)
    assert all(words in said for words in ("'norm' is no bound", "there is no 'sense'", "needs --guard-texts"))
    assert not has_session(home / "bad")


def test_an_interrupted_edit_goes_on_where_it_stopped(home: Path, kedit: Kedit, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ["edit", "model", "facts.jsonl", "--corpus", "corpus.txt", "--batch", "1", *OPTIONS]
    kedit(*whole, "--session", "whole")
    with monkeypatch.context() as patch:
        from kedit_jax.cli import app

        saved = app.save_session

        def stop_after_first(session: object, folder: Path, **lock: object) -> None:
            saved(session, folder, **lock)
            raise KeyboardInterrupt

        patch.setattr(app, "save_session", stop_after_first)
        assert "run the same command again" in kedit(*whole, "--session", "halted", status=130)
    assert len(read_manifest(home / "halted")["facts"]) == 1
    kedit(*whole, "--session", "halted")
    halted, whole_one = read_manifest(home / "halted"), read_manifest(home / "whole")
    assert len(halted.pop("times")) == len(whole_one.pop("times")) == 3
    assert halted == whole_one


def test_moments_are_let_go_of_before_facts_are_written(home: Path, kedit: Kedit, monkeypatch: pytest.MonkeyPatch) -> None:
    from kedit_jax.cli import app

    arrays: list[weakref.ref[np.ndarray]] = []
    held: list[bool] = []
    computed, saved = app.compute_moments, app.save_session

    def compute(*args: Any, **options: Any) -> Any:
        moments = computed(*args, **options)
        arrays.extend(weakref.ref(c0) for c0 in moments.by_layer.values())
        return moments

    def save(*args: Any, **options: Any) -> Any:
        held.extend(array() is not None for array in arrays)
        return saved(*args, **options)

    monkeypatch.setattr(app, "compute_moments", compute)
    monkeypatch.setattr(app, "save_session", save)
    (home / "first.jsonl").write_text(json.dumps(FACTS[0]) + "\n")
    kedit("edit", "model", "first.jsonl", "--session", "let-go", "--corpus", "corpus.txt", *OPTIONS)
    assert held == [False] * 2


def test_stats_are_computed_once(home: Path, kedit: Kedit) -> None:
    args = ["stats", "model", "--corpus", "corpus.txt", "--layers", "1,2", "--moments", "m"]
    assert "second moments of layers 1,2" in kedit(*args)
    (stored,) = (home / "m").iterdir()
    before = stored.stat().st_mtime_ns
    kedit(*args)
    assert stored.stat().st_mtime_ns == before
    kedit("edit", "model", "facts.jsonl", "--session", "s2", "--corpus", "corpus.txt", "--moments", "m", *OPTIONS)
    assert not (home / "s2" / "moments").exists()


def test_stats_tell_what_the_sample_is_worth(kedit: Kedit) -> None:
    args = ["stats", "model", "--corpus", "corpus.txt", "--layers", "1,2", "--moments", "m2"]
    assert "over 320 tokens" in kedit(*args), "ten times the key width"
    short = kedit(*args, "--max-tokens", "1e6")
    assert re.search(r"the corpus has \d+ tokens, of the 1,000,000 asked for", short)
    assert "relative: unknown, it is too small to tell" in short
    whole = kedit(*args, "--max-tokens", "inf")
    assert "asked for" not in whole
    assert re.findall("over (.*) tokens", whole) == re.findall("over (.*) tokens", short)
    assert "max_tokens is 2.5" in kedit(*args, "--max-tokens", "2.5", status=1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["edit", "model", "none.jsonl", "--session", "x"], "none.jsonl"),
        (["edit", "nowhere/model", "facts.jsonl", "--session", "x", "--corpus", "corpus.txt", *OPTIONS], "nowhere/model"),
        (
            ["edit", "model", "facts.jsonl", "--session", "x", "--corpus", "corpus.txt", "--preset", "gpt2-xl"],
            "is for openai-community/gpt2-xl (gpt2, 48 layers of key width 6400); this model is gpt2 with 4 of 32",
        ),
        (["edit", "model", "facts.jsonl", "--session", "x", "--layers", "1"], "--corpus"),
        (["edit", "model", "facts.jsonl", "--session", "x", "--corpus", "corpus.txt", "--layers", "9"], "from 0 to 3"),
        (["edit", "model", "facts.jsonl", "--session", "x", "--corpus", "corpus.txt", "--layers", "a"], "no list of layers"),
        (["edit", "model", "facts.jsonl", "--session", "x", "--preset", "gpt-5"], "there are gpt2-xl"),
        (["edit", "model", "facts.jsonl", "--session", "x", "--layers", "1", "--editor", "magic"], "there are memit"),
        (["log", "--session", "x"], "no session in 'x'"),
        (["retract", "model", "bob", "--session", "x"], "no session in 'x'"),
        (["stats", "model", "--corpus", "none.txt", "--layers", "1"], "cannot read 'none.txt'"),
        (["eval", "model", "records.json", "--report", "r.html"], "--report makes a page of a session; name its folder"),
        (["eval", "model", "records.json", "--ability", "none.jsonl"], "none.jsonl"),
        (["eval", "model", "records.json", "--ability", "glue=cats.jsonl"], "there is no task 'glue'; there are sst2"),
        (
            ["eval", "model", "records.json", "--ability", "facts.jsonl"],
            "are of no known task; give context, choices",
        ),
        (["eval", "model", "records.json", *["--ability", "cats.jsonl"] * 2], "--ability names cats more than once"),
    ],
)
def test_bad_input_is_one_message(home: Path, kedit: Kedit, args: list[str], message: str) -> None:
    printed = " ".join(kedit(*args, status=1).split())
    assert "error:" in printed
    assert message in printed
    assert "Traceback" not in printed
    assert not has_session(home / "x")


def test_a_session_keeps_the_dtype_it_was_begun_with(home: Path, kedit: Kedit) -> None:
    kedit("edit", "model", "facts.jsonl", "--session", "s6", "--corpus", "corpus.txt", "--dtype", "bfloat16", *OPTIONS)
    assert read_manifest(home / "s6")["model"]["dtype"] == "bfloat16"
    assert "took back 1" in kedit("retract", "model", "alice", "--session", "s6")
    assert "dtype" in kedit("retract", "model", "bob", "--session", "s6", "--dtype", "float32", status=1)


def test_square_brackets_in_ids_and_folders_are_shown_as_they_are(home: Path, kedit: Kedit) -> None:
    fact = FACTS[0] | {"id": "a[/b]"}
    (home / "brackets.jsonl").write_text(json.dumps(fact))
    assert "[red]s" in kedit("edit", "model", "brackets.jsonl", "--session", "[red]s", "--corpus", "corpus.txt", *OPTIONS)
    assert "a[/b]" in kedit("log", "--session", "[red]s")


def test_results_that_cannot_be_written_are_refused_at_once(kedit: Kedit) -> None:
    for args in (["eval", "model", "records.json"], ["demo"]):
        assert "cannot write 'no/folder.json'" in kedit(*args, "--json", "no/folder.json", status=1)


def test_the_demo_does_not_replace_a_session_of_another_model(home: Path, kedit: Kedit) -> None:
    kedit("edit", "model", "facts.jsonl", "--session", "mine", "--corpus", "corpus.txt", *OPTIONS)
    before = read_manifest(home / "mine")
    assert "holds a session of another model" in " ".join(kedit("demo", "--folder", "mine", status=1).split())
    assert read_manifest(home / "mine") == before


def test_moments_elsewhere_are_asked_for(home: Path, kedit: Kedit) -> None:
    kedit("edit", "model", "facts.jsonl", "--session", "s7", "--corpus", "corpus.txt", "--moments", "m7", *OPTIONS)
    assert "give the folder they are in with --moments" in kedit("retract", "model", "bob", "--session", "s7", status=1)
    assert "took back 1" in kedit("retract", "model", "bob", "--session", "s7", "--moments", "m7")


def test_settings_of_a_session_cannot_change_midway(home: Path, kedit: Kedit) -> None:
    kedit("edit", "model", "facts.jsonl", "--session", "s3", "--corpus", "corpus.txt", *OPTIONS)
    args = ["edit", "model", "facts.jsonl", "--session", "s3"]
    assert "begun with other editor, ridge" in kedit(*args, "--editor", "ridge", "--ridge", "1", status=1)
    assert "3 of 3 facts are in the session already" in kedit(*args, "--layers", "2,1")


def test_settings_from_the_depth_of_the_model(home: Path, kedit: Kedit) -> None:
    said = kedit("edit", "model", "facts.jsonl", "--session", "s8", "--corpus", "corpus.txt", "--moment-weight", "10")
    assert "no settings published or given: layers 1, from the model's depth" in said
    assert read_manifest(home / "s8")["settings"]["layers"] == [1]


def test_settings_of_easyedit(home: Path, kedit: Kedit) -> None:
    text = "alg_name: MEMIT\nlayers: [1]\nv_lr: 1e-1\nv_num_grad_steps: 3\nmom2_update_weight: 10\ndevice: 0\n"
    (home / "memit.yaml").write_text(text)
    options = ["--session", "s9", "--corpus", "corpus.txt", "--settings", "memit.yaml", "--ridge", "0.5"]
    assert "not used of memit.yaml: device=0" in kedit("edit", "model", "facts.jsonl", *options)
    stored = read_manifest(home / "s9")["settings"]
    assert (stored["moment_weight"], stored["values"]["learning_rate"], stored["ridge"]) == (10.0, 0.1, 0.5)


def test_settings_from_a_file(home: Path, kedit: Kedit) -> None:
    settings = {"layers": [1], "moment_weight": 5.0, "ridge": 0.01, "values": {"steps": 3}, "prefixes": 0}
    (home / "settings.json").write_text(json.dumps(settings))
    kedit("edit", "model", "facts.jsonl", "--session", "s4", "--corpus", "corpus.txt", "--settings", "settings.json")
    stored = read_manifest(home / "s4")["settings"]
    assert (stored["layers"], stored["ridge"], stored["values"]["steps"]) == ([1], 0.01, 3)
    (home / "settings.json").write_text(json.dumps(settings | {"moment_wieght": 1}))
    args = ["edit", "model", "facts.jsonl", "--session", "s5", "--corpus", "corpus.txt", "--settings", "settings.json"]
    assert "unknown settings moment_wieght" in kedit(*args, status=1)


def test_facts_from_data_sets_and_tables(home: Path, kedit: Kedit) -> None:
    """A CounterFact file, and a table with columns of its own, whose subject is proposed where it has none."""
    options = ["--corpus", "corpus.txt", *OPTIONS]
    kedit("edit", "model", "records.json", "--session", "d1", *options)
    (fact,) = read_manifest(home / "d1")["facts"]
    assert (fact["subject"], fact["target"], fact["relation"]) == ("Alice Smith", "cat", "plays")
    (home / "mine.csv").write_text("Sentence,Correct,Name\nBob Stone speaks,French,Bob Stone\n{} is a,river dog,Paris\n")
    columns = "prompt=Sentence,target=Correct,subject=Name"
    kedit("edit", "model", "mine.csv", "--columns", columns, "--session", "d2", *options)
    facts = read_manifest(home / "d2")["facts"]
    assert [(f["prompt"], f["subject"], f["target"]) for f in facts] == [
        ("{} speaks", "Bob Stone", "French"),
        ("{} is a", "Paris", "river dog"),
    ]
    bad = kedit("edit", "model", "mine.csv", "--columns", "Sentence", "--session", "d3", *options, status=1)
    assert "field=column" in bad


def test_facts_in_any_form(home: Path, kedit: Kedit) -> None:
    """A JSON list, a table by content, no ids in either; the session names the facts, and proposed subjects are shown."""
    options = ["--corpus", "corpus.txt", *OPTIONS]
    (home / "list.json").write_text(json.dumps([{"prompt": "Bob Stone speaks", "subject": "Bob Stone", "target": "French"}]))
    (home / "table.dat").write_text("prompt,subject,target\n{} is a,Paris,river dog\n")
    (home / "bare.jsonl").write_text(
        json.dumps({"prompt": "Alice Smith plays the", "target": "cat", "paraphrases": ["In Paris Alice Smith plays"]})
    )
    for file in ("list.json", "table.dat"):
        kedit("edit", "model", file, "--session", "forms", *options)
    said = kedit("edit", "model", "bare.jsonl", "--session", "forms", *options)
    assert "proposed subject 'Alice Smith' in 'Alice Smith plays the'" in said
    assert "1 of 1 facts name no subject" in said
    facts = read_manifest(home / "forms")["facts"]
    assert [(f["id"], f["prompt"]) for f in facts] == [
        ("fact-1", "{} speaks"),
        ("fact-2", "{} is a"),
        ("fact-3", "{} plays the"),
    ]


def test_any_setting_from_the_command_line(home: Path, kedit: Kedit) -> None:
    given = ["--set", "values.learning_rate=1e-1", "--set", "values.steps=3", "--set", "prefixes=0", "--set", "seed=4"]
    kedit("edit", "model", "facts.jsonl", "--session", "set", "--corpus", "corpus.txt", *OPTIONS, *given)
    stored = read_manifest(home / "set")["settings"]
    assert (stored["values"]["learning_rate"], stored["values"]["steps"], stored["prefixes"], stored["seed"]) == (
        0.1,
        3,
        0,
        4,
    )
    kedit("edit", "model", "facts.jsonl", "--session", "set", "--set", "values.steps=3")
    assert "begun with other values" in kedit(
        "edit", "model", "facts.jsonl", "--session", "set", "--set", "values.steps=4", status=1
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--set", "speed=1"], "unknown settings speed"),
        (["--set", "values.speed=1"], "unknown settings values.speed"),
        (["--set", "seed"], "write it as NAME=VALUE"),
        (["--set", "seed=[1"], "has no value that can be read"),
        (["--set", "seed=hello"], "seed is 'hello'; it must be a whole number"),
        (["--set", "values.steps=2.5"], "values.steps is 2.5; it must be a whole number"),
        (["--set", "compensate=maybe"], "compensate is 'maybe'; it must be true or false"),
        (["--editor", "alphaedit", "--l2", "-5"], "l2 is -5.0; it must be positive"),
        (["--preset", "gpt2-xl", "--settings", "facts.jsonl"], "give one of them"),
    ],
)
def test_settings_that_cannot_be_used(kedit: Kedit, given: list[str], words: str) -> None:
    args = ["edit", "model", "facts.jsonl", "--session", "unset", "--corpus", "corpus.txt", "--layers", "1", *given]
    assert words in kedit(*args, status=1)


def test_a_model_that_cannot_be_edited_is_refused_before_the_work(
    home: Path, kedit: Kedit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kedit_jax.cli import app

    def not_editable(config: object) -> None:
        raise KeditError("not edited")

    monkeypatch.setattr(app, "check_editable", not_editable)
    for args in (["edit", "model", "facts.jsonl", "--session", "gem"], ["stats", "model", "--moments", "gem"]):
        assert "not edited" in kedit(*args, "--corpus", "corpus.txt", "--layers", "1", status=1)
    assert not (home / "gem").exists()
