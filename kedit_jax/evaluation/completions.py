"""What a model says when it is left to speak: greedy completions, before and after an edit, and sampled texts."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from kedit_jax.errors import KeditError
from kedit_jax.evaluation.batching import encode, power_of_two, stack_rows
from kedit_jax.hosts import to_host
from kedit_jax.models import Decoder
from kedit_jax.models.generation import generate

ROWS_PER_BATCH = 64


class Sampling(NamedTuple):
    """How tokens are drawn: among the `top_k` likeliest, from a seed."""

    top_k: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """A prompt and how two models go on."""

    prompt: str
    before: str
    after: str


def complete(
    model: Decoder, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int = 50, stop: Sequence[str] = ("\n",)
) -> list[str]:
    """Continue each prompt greedily until a natural stop: a token that ends a text, or one of the texts `stop`.

    Returns:
        The continuations alone, without what stopped them and without blanks around them. One that did not stop is as
        long as `max_new_tokens` tokens.

    Raises:
        KeditError: listing prompts without tokens, or prompts too long for the model.
    """
    ends = _end_ids(model, tokenizer)
    found = _continued(_tokens_of(tokenizer, prompts), model, max_new_tokens, ends)
    return [_cut(_text(tokenizer, _until(ids, ends)), stop) for ids in found]


def complete_until(
    model: Decoder, tokenizer: Any, prompts: Sequence[str], marks: Sequence[str], *, max_new_tokens: int = 50
) -> list[str]:
    """Continue each prompt greedily up to and with the first token that holds one of the marks, or ends a text.

    Nothing but the space that joins it to the prompt is cut, so that whoever compares the answer sees what stopped it. All
    have fewer tokens than `max_new_tokens` where the longest prompt leaves the model no more positions.

    Raises:
        KeditError: as `complete`.
    """
    ends = _end_ids(model, tokenizer)
    stops = tuple(sorted({*ends, *_tokens_with(tokenizer, tuple(marks))})) if marks else ends
    rows, limit = _tokens_of(tokenizer, prompts), model.config.position_limit
    room = max_new_tokens if limit is None or not rows else limit + 1 - max(map(len, rows))
    found = _continued(rows, model, max(1, min(max_new_tokens, room)), stops)
    return [_text(tokenizer, _until(ids, ends, _first(ids, stops))).removeprefix(" ") for ids in found]


def sample_texts(
    model: Decoder, tokenizer: Any, prompts: Sequence[str], *, max_tokens: int = 100, top_k: int = 5, seed: int = 0
) -> list[str]:
    """Texts that begin with each prompt and go on by sampling among the `top_k` likeliest tokens.

    As published evaluations generate (`generate_fast` of the ROME and MEMIT code): a text has `max_tokens` tokens with its
    prompt, or as many as the model has positions; a token that ends a text is sampled like any other and not shown. The same
    prompts and seed give the same texts.

    Raises:
        KeditError: a prompt without tokens, or of `max_tokens` or more; a setting without a meaning.
    """
    rows = _tokens_of(tokenizer, prompts)
    if not rows:
        return []
    limit = model.config.position_limit
    longest, shortest = max(map(len, rows)), min(map(len, rows))
    most = max_tokens if limit is None else min(max_tokens, limit)
    long = [f"prompt {i + 1} {prompts[i]!r:.60}: {len(row)} tokens" for i, row in enumerate(rows) if len(row) >= most]
    if long:
        raise KeditError.listing(f"a text has {most} tokens at most, and these prompts leave no room; shorten them:", long)
    n_new = most - shortest if limit is None else min(most - shortest, limit + 1 - longest)
    found = _continued(rows, model, n_new, (), sampling=Sampling(top_k, seed))
    return [_text(tokenizer, [*row, *new[: most - len(row)]]) for row, new in zip(rows, found, strict=True)]


def compare_completions(
    before: Decoder,
    after: Decoder,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 50,
    stop: Sequence[str] = ("\n",),
) -> list[Completion]:
    """The completions of two models side by side (arguments and errors: see `complete`)."""
    first, second = (
        complete(model, tokenizer, prompts, max_new_tokens=max_new_tokens, stop=stop) for model in (before, after)
    )
    return [Completion(*row) for row in zip(prompts, first, second, strict=True)]


def _end_ids(model: Decoder, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a text, for the model or for the tokenizer."""
    own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(sorted({*model.config.eos_ids, *own}))


def _tokens_of(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    rows: list[list[int]] = encode(tokenizer, prompts)["input_ids"] if prompts else []
    problems = [
        f"prompt {i + 1} {prompt!r} has no tokens; give some text" for i, prompt in enumerate(prompts) if not rows[i]
    ]
    if problems:
        raise KeditError.listing("these prompts cannot be completed:", problems)
    return rows


@functools.lru_cache(maxsize=8)  # a vocabulary of 128k takes a second, and two models share it
def _tokens_with(tokenizer: Any, marks: tuple[str, ...]) -> tuple[int, ...]:
    """Tokens whose text holds one of the marks."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return tuple(token for token, text in enumerate(texts) if any(mark in text for mark in marks))


def _continued(
    rows: Sequence[list[int]], model: Decoder, n_new: int, stops: tuple[int, ...], sampling: Sampling | None = None
) -> list[list[int]]:
    """New tokens of each row; rows of like lengths go together."""
    found: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), ROWS_PER_BATCH):
        chosen = order[start : start + ROWS_PER_BATCH]
        new = _continue([rows[i] for i in chosen], model, n_new, stops, sampling, start)
        for i, ids in zip(chosen, new, strict=False):
            found[i] = ids
    return found


def _continue(
    rows: Sequence[list[int]],
    model: Decoder,
    n_new: int,
    stops: tuple[int, ...],
    sampling: Sampling | None,
    start: int,
) -> list[list[int]]:
    """New tokens of each row; rows are filled up to a power of two, so that few shapes are compiled."""
    filled = [*rows, *([rows[0]] * (power_of_two(len(rows)) - len(rows)))]
    tokens = stack_rows(filled, len(filled))
    valid = np.arange(tokens.shape[1]) < np.array([[len(row)] for row in filled])
    key = jax.random.key(0) if sampling is None else jax.random.fold_in(jax.random.key(sampling.seed), start)
    new = generate(
        model, jax.numpy.asarray(tokens), jax.numpy.asarray(valid), n_new,
        key=key, temperature=0.0 if sampling is None else 1.0, top_k=sampling and sampling.top_k, stop_ids=stops,
    )  # fmt: skip
    return to_host(new).tolist()


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _first(ids: Sequence[int], among: tuple[int, ...]) -> int:
    """How many of the tokens there are up to and with the first of these."""
    return next((i + 1 for i, token in enumerate(ids) if token in among), len(ids))


def _until(ids: list[int], ends: tuple[int, ...], most: int | None = None) -> list[int]:
    """The tokens before the first that ends a text, `most` at most."""
    return ids[: next((i for i, token in enumerate(ids[:most]) if token in ends), most if most is not None else len(ids))]


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stops, where some of them may stand at its very beginning."""
    text = text.lstrip()
    return text[: min((text.index(mark) for mark in stop if mark in text), default=len(text))].strip()
