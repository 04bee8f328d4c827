"""Second moments as a stream: packed, of any iterable, continued after interruptions or for more tokens; their error."""

import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from editing_world import TEXTS, random_model
from safetensors.numpy import save_file

from kedit_jax.editing import moment_files
from kedit_jax.editing import moments as module
from kedit_jax.editing.corpus import DOCUMENTS, HeldBlocks, read_blocks
from kedit_jax.editing.moments import Moments, compute_moments, default_tokens, read_moments
from kedit_jax.errors import KeditError
from kedit_jax.models import Decoder, ModelConfig
from kedit_jax.models.config import LocalAttention, RotaryConfig

LAYERS = (0, 2)


def same(left: Moments, right: Moments) -> bool:
    """Bit for bit, errors included."""
    return (
        (left.tokens, left.corpus) == (right.tokens, right.corpus)
        and str(left.errors) == str(right.errors)
        and all(np.array_equal(left.by_layer[layer], right.by_layer[layer]) for layer in left.by_layer)
    )


def apart(left: Moments, right: Moments) -> float:
    return max(
        float(np.linalg.norm(left.by_layer[n] - right.by_layer[n]) / np.linalg.norm(right.by_layer[n]))
        for n in left.by_layer
    )


# --- packing --------------------------------------------------------------------------------------------------------


def alone(rows: Any, size: int) -> Any:
    """Every row in a line of its own, in batches of the packed one's shape, so that nothing else is compiled."""
    for begin in range(0, len(rows), 6):
        tokens, segments = np.zeros((2, 6, 32), np.int32)
        for i, row in enumerate(rows[begin : begin + 6]):
            tokens[i, : len(row)], segments[i, : len(row)] = row, 1
        yield tokens, segments


def in_one_segment(rows: Any, size: int) -> Any:
    """The fault: documents that share a line see each other."""
    return ((tokens, (segments > 0).astype(np.int32)) for tokens, segments in HONEST(rows, size))


HONEST = module._batches


@pytest.fixture(scope="module", params=["learned positions", "rotary", "windows"])
def decoder(request: pytest.FixtureRequest, wide_model: Decoder) -> Decoder:
    if request.param == "learned positions":
        return wide_model
    rotary = RotaryConfig(8, 777.0)
    config = dataclasses.replace(wide_model.config, rotary=rotary, norm="rms", gated_mlp=True, activation="silu")
    if request.param == "windows":  # two layers of four: Mistral's in all of them is the simpler case
        config = dataclasses.replace(config, local=LocalAttention(6, (True, False, True, True)))
    with jax.enable_x64(True):
        return random_model(config, 2, scale=0.3, dtype=np.float64)


def sums_of(batches: Callable[..., Any], decoder: Decoder, tokenizer: Any, patch: pytest.MonkeyPatch) -> Moments:
    """Four documents in rows of 12, 12, 12 and 5 tokens, of which two and three share a line of 32."""
    patch.setattr(module, "_batches", batches)
    return compute_moments(decoder, tokenizer, TEXTS[:4], (1,), row_tokens=12, batch_tokens=256)


def test_packed_documents_see_nothing_of_each_other(
    decoder: Decoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with jax.enable_x64(True):
        packed, apiece, mixed = (
            sums_of(batches, decoder, tokenizer, monkeypatch) for batches in (HONEST, alone, in_one_segment)
        )
    assert packed.tokens == apiece.tokens == 164
    assert apart(packed, apiece) < 1e-12
    assert apart(mixed, apiece) > 1e-3, "negative control"


def test_padding_may_be_longer_than_a_document(config: ModelConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of padding past the model's table would be NaN, in the attention's sums too."""
    short = random_model(dataclasses.replace(config, max_positions=20), 2, scale=0.08)
    assert np.isfinite(sums_of(alone, short, tokenizer, monkeypatch).by_layer[1]).all()


def test_packing_in_float32(model: Decoder, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, apiece = (sums_of(batches, model, tokenizer, monkeypatch) for batches in (HONEST, alone))
    assert apart(packed, apiece) < 1e-6


def test_little_is_padding_and_few_shapes_occur() -> None:
    rng = np.random.default_rng(0)
    shapes, real = set(), 0
    for _ in range(50):
        rows = [np.ones(min(512, 8 + int(rng.exponential(100))), np.int32) for _ in range(30)]
        batches = list(module._batches(rows, 1024))
        shapes |= {tokens.shape for tokens, _ in batches}
        assert sum(int((segments > 0).sum()) for _, segments in batches) == sum(map(len, rows))
        real += sum(map(len, rows)) / sum(tokens.size for tokens, _ in batches) / 50
    assert real > 0.8
    assert len(shapes) <= 4 * 5, "widths of 32 to 512, four heights each"


# --- streaming ------------------------------------------------------------------------------------------------------


def test_an_endless_corpus_is_read_as_far_as_needed(model: Decoder, tokenizer: Any) -> None:
    """Documents of 41 tokens in blocks of 160: besides those done, two blocks and what the tokenizer gets at once."""
    drawn = 0
    ahead = []

    def endless() -> Iterator[str]:
        nonlocal drawn
        for text in itertools.cycle(TEXTS):
            drawn += 1
            yield text

    found = compute_moments(
        model, tokenizer, endless(), LAYERS, batch_tokens=64, max_tokens=3000,
        progress=lambda done, total: ahead.append((41 * drawn - done, total)),
    )  # fmt: skip
    assert found.tokens == 3000
    assert max(tokens for tokens, _ in ahead) <= 2 * 160 + 41 * (DOCUMENTS + 1)
    assert {total for _, total in ahead} == {3000}


def test_the_sample_is_ten_tokens_a_component_or_all(model: Decoder, tokenizer: Any) -> None:
    calls: list[Any] = []
    assert default_tokens(model.config) == 1600
    some = compute_moments(model, tokenizer, itertools.cycle(TEXTS), LAYERS, batch_tokens=64)
    every = compute_moments(
        model,
        tokenizer,
        iter(TEXTS * 3),
        LAYERS,
        batch_tokens=64,
        max_tokens=math.inf,
        progress=lambda *args: calls.append(args),
    )
    assert (some.tokens, every.tokens) == (1600, 3 * 656)
    assert {total for _, total in calls[:-1]} == {None}, "the corpus decides"
    assert calls[-1] == (3 * 656, 3 * 656)


def test_blocks_do_not_depend_on_the_size_of_the_sample(tokenizer: Any) -> None:
    """All blocks but the last are those of the whole corpus, wherever the sample ends."""

    def contents(most: int | None) -> list[bytes]:
        return [block.content for block in read_blocks(tokenizer, TEXTS, width=30, size=100, most=most)]

    whole = contents(None)
    for most in (*range(60, 260, 7), 656):
        some = contents(most)
        assert some[:-1] == whole[: len(some) - 1]


def test_held_blocks_come_back(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kedit_jax.editing.corpus.IN_MEMORY", 1000)
    blocks = list(read_blocks(tokenizer, TEXTS, width=30, size=100, most=None))
    held = HeldBlocks()
    held.append(blocks[-1])
    held.clear()
    for block in blocks:
        held.append(block)
    assert [(block.content, block.last) for block in held] == [(block.content, block.last) for block in blocks]


@pytest.mark.parametrize(("texts", "options", "words"), [
    ("one string", {}, "one string"),
    (["text"], {"max_tokens": 2.5}, "max_tokens is 2.5"),
    (["text"], {"max_tokens": math.nan}, "max_tokens is nan"),
    (["text"], {"max_tokens": -math.inf}, "max_tokens is -inf"),
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(model: Decoder, tokenizer: Any, texts: Any, options: Any, words: str) -> None:
    with pytest.raises(KeditError, match=words):
        compute_moments(model, tokenizer, texts, LAYERS, **options)


# --- continued ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):  # noqa: N818, no error
    pass


class Run:
    """`compute_moments` of the first tokens of a corpus with a cache; blocks of 160 tokens hold three documents."""

    def __init__(self, model: Decoder, tokenizer: Any, cache: Path) -> None:
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.began = -1

    def __call__(
        self, tokens: int, *, stop: int = 10**9, cache: bool = True, texts: Any = TEXTS, batch: int = 64
    ) -> Moments:
        """Interrupted once `stop` tokens are done; `began` tells how many were there before the first block."""
        calls: list[int] = []

        def progress(done: int, _: int | None) -> None:
            calls.append(done)
            if done >= stop:
                raise Interrupted

        try:
            return compute_moments(
                self.model, self.tokenizer, iter(texts), LAYERS, batch_tokens=batch, max_tokens=tokens,
                cache=self.cache if cache else None, save_every=0, progress=progress,
            )  # fmt: skip
        finally:
            self.began = calls[0] if calls else -1

    def names(self) -> list[str]:
        return sorted(path.name.split("-")[0] for path in self.cache.iterdir())

    @property
    def partial(self) -> Path:
        (path,) = self.cache.glob("partial-*")
        return path


@pytest.fixture
def run(model: Decoder, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(module, "SAVING", math.inf)  # however slow the disk is
    return Run(model, tokenizer, tmp_path / "cache")


@pytest.mark.parametrize("stop", [1, 200, 400])
def test_an_interrupted_run_goes_on(run: Run, stop: int) -> None:
    whole = run(600, cache=False)
    with pytest.raises(Interrupted):
        run(600, stop=stop)
    assert run.names() == ["partial"]
    assert same(run(600), whole)
    assert run.began > stop, "what was done is not done again"
    assert run.names() == ["moments"]
    assert same(run(600), whole)
    assert run.began == -1


def test_interrupted_again_and_again(run: Run) -> None:
    whole = run(656, cache=False)
    for stop in (100, 300, 400):
        with pytest.raises(Interrupted):
            run(656, stop=stop)
    assert same(run(656), whole)


def test_a_larger_sample_begins_with_a_smaller_one(run: Run) -> None:
    small = run(300)
    larger = run(600)
    assert run.began > 246, "two blocks of three documents were there"
    assert same(larger, run(600, cache=False))
    assert run.names() == ["moments", "moments"]
    assert same(run(300), small), "sessions that were begun with it find it"
    assert same(run(math.inf), run(math.inf, cache=False))
    assert same(run(280), run(280, cache=False)), "a smaller one uses the blocks it has in full"
    assert len(run.names()) == 4


def test_another_corpus_takes_nothing_over(run: Run) -> None:
    """That begins alike or not: the tokens read in vain are worked on."""
    run(656)
    for changed in (5, 0):
        texts = [*TEXTS[:changed], "Another text.", *TEXTS[changed + 1 :]]
        found = run(656, texts=texts)
        assert run.began <= 160
        assert same(found, run(656, texts=texts, cache=False))


def test_negative_control_sums_of_another_corpus_would_show(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["Rome Rome Rome", *TEXTS[1:]]
    run(600, texts=texts)
    (stored,) = run.cache.iterdir()
    first = next(read_blocks(run.tokenizer, TEXTS, width=64, size=160, most=None))
    claimed = moment_files.hashlib.sha256(first.content).hexdigest()
    monkeypatch.setattr(module, "stored_prefixes", lambda *_: ({claimed: stored}, 200))
    assert apart(run(600), run(600, cache=False)) > 1e-3


def test_other_batches_make_sums_of_their_own(run: Run) -> None:
    run(300)
    found = run(600, batch=96)
    assert run.began <= 160
    assert same(found, run(600, batch=96, cache=False))


KILLED = """
import math, os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from editing_world import TEXTS, random_model, train_tokenizer
from transformers import PreTrainedTokenizerFast
from kedit_jax.editing import moments as module
from kedit_jax.models import gpt2_config
made = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(TEXTS), eos_token="<end>", pad_token="<end>")
config = gpt2_config(vocab_size=len(made), n_layers=4, d_model=16, n_heads=2, d_ff=160, max_positions=64)
module.SAVING, replace, saved = math.inf, os.replace, []
def killing(*names):
    saved.append(names)
    if len(saved) == 3:  # in the midst of the third saving
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = killing
module.compute_moments(random_model(config, 0, scale=0.08), made, iter(TEXTS), (0, 2), batch_tokens=64, max_tokens=600,
                       cache={cache!r}, save_every=0)
"""


def test_a_killed_process_leaves_what_it_saved(run: Run) -> None:
    script = KILLED.format(tests=str(Path(__file__).parents[1]), cache=str(run.cache))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = run(600)
    assert run.began == 3 * 123, "two of the blocks had been saved"
    assert same(found, run(600, cache=False))
    assert run.names() == [".moments", "moments"], "what was being written is left for a day"
    (left,) = run.cache.glob(".moments-*")
    os.utime(left, (0, 0))
    run(500)
    assert run.names() == ["moments", "moments"]


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped bit", "newer format"])
def test_a_damaged_partial_file_is_named(run: Run, damage: str) -> None:
    with pytest.raises(Interrupted):
        run(600, stop=300)
    path = run.partial
    whole = path.read_bytes()
    newer = whole.replace(f'"format":"{moment_files.FORMAT}"'.encode(), b'"format":"9"')
    path.write_bytes({
        "cut": whole[: len(whole) // 2], "empty": b"", "newer format": newer,
        "flipped bit": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:],
    }[damage])  # fmt: skip
    with pytest.raises(KeditError, match=r"damaged .*delete the file") as caught:
        run(600)
    assert path.name in str(caught.value)
    path.unlink()
    assert same(run(600), run(600, cache=False))


def test_a_bit_flipped_in_what_a_file_says_of_itself_is_found(run: Run, tmp_path: Path) -> None:
    """Counts and sums of squares decide what a larger sample goes on with; the arrays' checksum does not cover them."""
    run(600)
    (path,) = run.cache.glob("moments-*")
    whole, found = path.read_bytes(), read_moments(path)
    begin, end = whole.index(b'"__metadata__"'), whole.index(b"}", whole.index(b'"__metadata__"'))
    for at in range(begin, end, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 7]) + whole[at + 1 :])
        for read in (read_moments, moment_files.read_sums):
            with pytest.raises(KeditError, match=r"damaged .*delete the file"):
                read(path)
    path.write_bytes(whole)
    with moment_files.safe_open(path, framework="numpy") as file:
        about, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del about["about"]
    save_file(arrays, path, metadata=about | {"format": "2"})
    assert same(read_moments(path), found), "the control: format 2 had no checksum of it"
    save_file(arrays, path, metadata=about | {"format": "2", "tokens": str(found.tokens + 1)})
    assert read_moments(path).tokens == found.tokens + 1


def test_what_is_of_another_model_is_left_alone(run: Run, config: ModelConfig, model: Decoder) -> None:
    with pytest.raises(Interrupted):
        run(600, stop=300)
    path, run.model = run.partial, random_model(config, 7, scale=0.08)
    assert same(run(600), run(600, cache=False))
    assert path.exists()
    run.model = model
    run(600)
    assert run.began > 300
    assert not path.exists()


def test_a_folder_that_turns_read_only_is_a_clear_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moment_files, "save_file", full)
    with pytest.raises(KeditError, match=r"cannot store moments in .*No space left"):
        run(600)
    assert list(run.cache.iterdir()) == []


def test_files_of_the_first_format_are_read(run: Run, tmp_path: Path) -> None:
    """C0 itself under the layer's number, and neither sums nor errors; eleven layers, whose order as text is another."""
    found = run(600, cache=False)
    by_layer = {layer: found.by_layer[LAYERS[layer % 2]] for layer in range(11)}
    digest = moment_files.hashlib.sha256()
    for layer, c0 in by_layer.items():
        digest.update(str(layer).encode())
        digest.update(c0.tobytes())
    about = {"arrays": digest.hexdigest(), "tokens": "600", "model": found.model, "corpus": found.corpus, "dtype": "float32"}
    save_file({str(layer): c0 for layer, c0 in by_layer.items()}, tmp_path / "old.safetensors", metadata=about)
    old = read_moments(tmp_path / "old.safetensors")
    assert (old.tokens, old.model, old.corpus, old.errors) == (600, found.model, found.corpus, {})
    assert list(old.by_layer) == list(range(11))
    assert all(np.array_equal(old.by_layer[layer], by_layer[layer]) for layer in by_layer)


def test_moments_of_the_first_format_are_found(run: Run) -> None:
    found = run(600, cache=False)
    run.cache.mkdir()
    arrays = {str(layer): c0 for layer, c0 in found.by_layer.items()}
    about = {name: str(getattr(found, name)) for name in ("tokens", "model", "corpus", "dtype")}
    path = module.moments_path(run.cache, found.fingerprint(LAYERS))
    save_file(arrays, path, metadata=about | {"arrays": moment_files._digest(arrays)})
    assert run(600).errors == {}
    assert run.began == -1
    assert same(run(656), run(656, cache=False)), "they hold no sums: a larger sample begins anew"
    assert json.dumps(sorted(run.names())) == '["moments", "moments"]'


# --- error ----------------------------------------------------------------------------------------------------------


class Generated:
    """Keys of known moments in place of a model's: C0 = A A', documents of 16 tokens that share half of their variance,
    and one component in which a few tokens are far out."""

    def __init__(self, width: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.mix = rng.normal(size=(width, width)) * np.logspace(0, -2, width)
        self.c0 = self.mix @ self.mix.T
        self.rng = rng

    def keys(self, documents: int) -> np.ndarray:
        """[16 documents, width]"""
        width = len(self.c0)
        shared = np.repeat(self.rng.normal(size=(documents, width)), 16, axis=0)
        own = self.rng.normal(size=shared.shape)
        own[:, 0] *= np.sqrt(10) * (self.rng.random(len(own)) < 0.1)
        return np.sqrt(0.5) * (shared + own) @ self.mix.T


def tokens_as_numbers(texts: list[str]) -> dict[str, list[list[int]]]:
    """Text N is a document of 16 tokens that no other has."""
    return {"input_ids": [list(range(16 * int(text), 16 * int(text) + 16)) for text in texts]}


def test_the_estimated_error_is_the_true_one(wide_model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root mean squares over 30 samples of 128 documents, in blocks of 16 of them."""
    generated, documents = Generated(24, 0), 128
    truth, told, naive = [], [], []
    for _ in range(30):
        keys = generated.keys(documents)
        monkeypatch.setattr(module, "_keys", lambda m, tokens, segments, layers, keys=keys: [keys[tokens]])
        found = compute_moments(
            wide_model, tokens_as_numbers, map(str, range(documents)), (1,), batch_tokens=256, max_tokens=math.inf
        )
        c0 = found.by_layer[1]
        size = np.linalg.norm(c0)
        truth.append(np.linalg.norm(c0 - generated.c0) / size)
        told.append(found.errors[1])
        spread = np.square(np.square(keys).sum(1)).mean() - size**2
        naive.append(np.sqrt(spread / len(keys)) / size)
    true, estimate, independent = (np.sqrt(np.mean(np.square(values))) for values in (truth, told, naive))
    assert 0.85 < estimate / true < 1.15
    assert independent / true < 0.6, "negative control: tokens of a document are not independent"


def test_one_block_tells_no_error(model: Decoder, tokenizer: Any) -> None:
    found = compute_moments(model, tokenizer, TEXTS[:3], LAYERS, batch_tokens=64)
    assert all(math.isnan(error) for error in found.errors.values())


def test_errors_are_stored(run: Run) -> None:
    found = run(600)
    again = run(600)
    assert run.began == -1
    assert again.errors == found.errors
    assert all(0 < error < 1 for error in found.errors.values())
