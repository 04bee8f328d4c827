"""Where the subject ends and the target begins, for several kinds of tokenizers, against a count of bytes."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from editing_reference import byte_spans, last_token_of, read_text
from editing_world import TEXTS, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.tokens import KL_PROMPT, Encoded, Passage, encode, lay_out
from kedit_jax.errors import RequestError

PASSAGES = [
    Passage("{} was born in", "Alice Smith", "old Lima"),
    Passage("In {}, people speak", "Paris", "French"),
    Passage("The house of {}", "Bob Jones", "is new"),
    Passage("{}", "Bob", "plays"),
    Passage("{}'s house is", "Émile Ōta", "新しい"),
    Passage("{}, the town, is", "東京\U0001f600", "\U0001f600 old"),
    Passage("The ({}) is", "a {} b", "{x}"),
    Passage("{} is", "Alice ", " far "),
    Passage("{} is", "xAlice\u0301", "old", prefix="Bob \ufffd is. "),
    Passage("The {} house of {{x}}".replace("{{x}}", "{x}"), "old", "is old", prefix="{} and {x}. "),
    Passage("{}plays", "Bob", "old"),
]


def wrap(made: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def plain() -> Any:
    return wrap(train_tokenizer(TEXTS))


def trimmed() -> Any:
    """As GPT-2's own: offsets leave out the space in front of a word."""
    made = train_tokenizer(TEXTS)
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return wrap(made)


def templated(template: str) -> Any:
    """Llama 3's: special tokens around every text."""
    made = train_tokenizer(TEXTS)
    made.add_special_tokens(["<s>", "</s>"])
    ids = [(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    around = processors.TemplateProcessing(single=template, special_tokens=ids)
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), around])
    return wrap(made, bos_token="<s>", eos_token="</s>")


def sentencepiece(*, split: bool) -> Any:
    """Llama 2's: spaces are letters, a text begins with one; without `split` a token may span several words."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=split)
    alphabet = sorted(set("".join(TEXTS)) | {"▁"})
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    learned = json.loads(made.to_str())["model"]
    vocab = learned["vocab"] | {f"<0x{byte:02X}>": len(learned["vocab"]) + byte for byte in range(256)}
    merges = [tuple(pair) for pair in learned["merges"]]
    made.model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return wrap(made, bos_token="<s>", unk_token="<unk>")


def byte_level_spans(tokenizer: Any, ids: list[int], text: str) -> list[tuple[int, int]]:
    return byte_spans(tokenizer, ids)


def sentencepiece_spans(tokenizer: Any, ids: list[int], text: str) -> list[tuple[int, int]]:
    """Bytes by piece; a space is put before the text, unless it begins with one."""
    spans, begin = [], 0 if text.startswith(" ") else -1
    for piece in tokenizer.convert_ids_to_tokens(ids):
        size = 1 if piece.startswith("<0x") else len(piece.replace("▁", " ").encode())
        spans.append((begin, begin + size))
        begin += size
    return spans


Spans = Callable[[Any, list[int], str], list[tuple[int, int]]]
KINDS: dict[str, tuple[Callable[[], Any], Spans, int, int]] = {  # maker, spans, special tokens in front and behind
    "byte-level": (plain, byte_level_spans, 0, 0),
    "trimmed offsets": (trimmed, byte_level_spans, 0, 0),
    "with BOS": (lambda: templated("<s> $A"), byte_level_spans, 1, 0),
    "with BOS and EOS": (lambda: templated("<s> $A </s>"), byte_level_spans, 1, 1),
    "sentencepiece": (lambda: sentencepiece(split=True), sentencepiece_spans, 1, 0),
    "sentencepiece across words": (lambda: sentencepiece(split=False), sentencepiece_spans, 1, 0),
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple[Any, Spans, int, int]:
    maker, *rest = KINDS[request.param]
    return (maker(), *rest)


def brute_force(kind: tuple[Any, Spans, int, int], passage: Passage) -> Encoded:
    """By counting bytes: the last token that overlaps the subject's last character, the first one behind the context."""
    tokenizer, spans_of, front, behind = kind
    before, _, after = passage.prompt.partition("{}")
    context = passage.prefix + before + passage.subject + after
    text = context if passage.target is None else context + " " + passage.target.strip()
    ids = tokenizer(text)["input_ids"]
    ids = ids[: len(ids) - behind]
    spans = spans_of(tokenizer, ids[front:], text)
    end = len(passage.prefix + before + passage.subject.rstrip())
    begin = next((i for i, (_, b) in enumerate(spans) if b > len(context.encode())), len(spans))
    return Encoded(tuple(ids), front + begin, front + last_token_of(spans, text, end))


@pytest.mark.parametrize("passage", PASSAGES, ids=lambda passage: passage.text)
def test_subject_and_target_are_where_counting_bytes_finds_them(kind: tuple[Any, Spans, int, int], passage: Passage) -> None:
    expected = brute_force(kind, passage)
    if expected.subject_last >= expected.n_prompt:  # one token holds the subject's end and the target's beginning
        with pytest.raises(RequestError, match="not found"):
            encode(kind[0], [passage])
        return
    (found,) = encode(kind[0], [passage])
    assert found == expected
    assert found.target == expected.tokens[expected.n_prompt :] != ()


WORDS = st.text(alphabet="abAé東\u0301 .'{}\U0001f600", min_size=1, max_size=6)


@settings(max_examples=80, deadline=None, database=None, derandomize=True)
@given(prefix=WORDS, before=WORDS, subject=WORDS.filter(str.strip), after=WORDS, target=WORDS.filter(str.strip))
def test_random_texts_are_located_as_counting_bytes_does(
    kind: tuple[Any, Spans, int, int], prefix: str, before: str, subject: str, after: str, target: str
) -> None:
    prompt = before.replace("{", "").replace("}", "") + "{}" + after.replace("{", "").replace("}", "")
    passage = Passage(prompt, subject, target, prefix)
    expected = brute_force(kind, passage)
    try:
        (found,) = encode(kind[0], [passage])
    except RequestError:
        assert expected.subject_last >= expected.n_prompt
    else:
        assert (found.tokens, found.n_prompt, found.subject_last) == (
            expected.tokens,
            expected.n_prompt,
            expected.subject_last,
        )


def test_negative_control_encoding_the_prefix_again_counts_wrong() -> None:
    """What offsets are for: "Bob" alone is one token, in "Bobby" it is none, and so its length says nothing."""
    tokenizer = plain()
    passage = Passage("{}e is", "Alic", "old")
    (found,) = encode(tokenizer, [passage])
    counted = len(tokenizer("Alic")["input_ids"]) - 1
    assert found.subject_last == brute_force((tokenizer, byte_level_spans, 0, 0), passage).subject_last != counted


def test_special_tokens_in_a_text_are_text() -> None:
    tokenizer = templated("<s> $A </s>")
    (found,) = encode(tokenizer, [Passage("{} is", "Bob", "old </s>")])
    assert found.tokens[-1] == tokenizer.eos_token_id
    assert found.tokens[0] == tokenizer.bos_token_id
    assert found.tokens.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("space", ["kept", "dropped"])
def test_a_target_that_tokenizes_to_nothing_is_refused(space: str) -> None:
    """A soft hyphen that the normaliser removes; the space before it may stay as a token of its own."""
    made = Tokenizer(models.WordLevel({"Ada": 0, "is": 1, "here": 2}, unk_token="here"))
    made.normalizer = normalizers.Replace("\u00ad", "")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "isolated") if space == "kept" else pre_tokenizers.WhitespaceSplit()
    with pytest.raises(RequestError, match="has no tokens after 'Ada is'"):
        encode(wrap(made), [Passage("{} is", "Ada", "\u00ad")])
    (fine,) = encode(wrap(made), [Passage("{} is", "Ada", "here\u00ad")])
    assert fine.target[-1] == 2


def test_everything_that_is_not_found_is_listed() -> None:
    """A tokenizer may clean its text, and leave nothing of a subject or a target."""
    made = train_tokenizer(TEXTS)
    made.normalizer = normalizers.Sequence([normalizers.Replace("Eve", ""), normalizers.Replace(" y", "")])
    tokenizer = wrap(made)
    with pytest.raises(RequestError) as caught:
        encode(tokenizer, [Passage("{} is", name, what) for name, what in (("Eve", "old"), ("Bob", "old"), ("Bob", "y"))])
    problems = str(caught.value).splitlines()[1:]
    assert len(problems) == 2
    assert "'Eve'" in problems[0]
    assert "'y'" in problems[1]
    assert encode(tokenizer, []) == []


# --- layouts --------------------------------------------------------------------------------------------------------

PREFIXES = ("The old house of Rome. ", "Émile. ")
REQUESTS = [
    EditRequest("{} was born in", "Alice Smith", "old Lima and Oslo"),
    EditRequest("In {}, people speak", "Paris", "violin"),
    EditRequest("The house of {}", "Bob Jones", "new"),
]


@pytest.mark.parametrize("size", [None, 5])
def test_rows_are_aligned_at_the_subjects_last_token(tokenizer: Any, size: int | None) -> None:
    layout = lay_out(tokenizer, REQUESTS, PREFIXES, max_positions=64, size=size)
    assert layout.n_contexts == 3
    requests = [*REQUESTS, *REQUESTS[:1] * ((size or 3) - 3)]  # padding repeats the first
    assert layout.n_prompts == 3 * len(requests)
    assert layout.owners.tolist() == [1, 2], "those with text before the subject, whose bare prompt is not the KL prompt"
    assert layout.kl_rows.tolist() == [0, layout.n_prompts, layout.n_prompts + 1, 9, 12][: len(requests)]
    assert layout.tokens.shape == layout.valid.shape == (layout.n_prompts + 2, layout.tokens.shape[1])
    cut = layout.n_prefix
    assert cut % 8 == 0
    assert (layout.tokens.shape[1] - cut) % 4 == 0
    for row in range(len(layout.tokens)):
        is_kl = row >= layout.n_prompts
        request = requests[layout.owners[row - layout.n_prompts] if is_kl else row // 3]
        ids = layout.tokens[row][layout.valid[row]].tolist()
        begin = int(layout.valid[row].argmax())
        assert layout.valid[row, begin : begin + len(ids)].all(), "the real tokens stand together"
        assert not layout.tokens[row][~layout.valid[row]].any()
        if is_kl:
            text = read_text(tokenizer, "", KL_PROMPT, request.subject, None)
            assert ids == text.ids[: text.subject_last + 1], "the KL prompt ends with the subject"
            assert begin + len(ids) - 1 == cut
            assert not layout.target_weights[row].any()
            assert not layout.target_columns[row].any()
            continue
        text = read_text(tokenizer, ("", *PREFIXES)[row % 3], request.prompt, request.subject, request.target)
        assert ids == text.ids[:-1], "nothing follows from the target's last token"
        assert begin + text.subject_last == cut
        n = len(text.ids) - text.target_begin
        assert layout.targets[row, :n].tolist() == text.ids[text.target_begin :]
        np.testing.assert_array_equal(layout.target_weights[row, :n], 1 / n)
        assert not layout.target_weights[row, n:].any()
        for i in range(n):  # the column behind which each target token comes is the one before it
            column = cut + layout.target_columns[row, i]
            assert column - begin == text.target_begin - 1 + i


def test_without_prefixes_the_bare_prompt_is_the_only_context(tokenizer: Any) -> None:
    layout = lay_out(tokenizer, REQUESTS[:1], (), max_positions=64)
    assert layout.n_contexts == 1
    assert len(layout.tokens) == 2, "one of them padding: the bare prompt begins with the KL prompt"
    assert layout.kl_rows.tolist() == [0]
    assert layout.target_weights[0].sum() == pytest.approx(1)


def test_a_prompt_longer_than_the_model_is_refused(tokenizer: Any) -> None:
    long = EditRequest("{} was born in " + "Lima " * 40, "Alice Smith", "Oslo")
    longer = EditRequest("In {} they say " + "Lima " * 60, "Rome", "Oslo")
    length = len(tokenizer(long.text + " Oslo")["input_ids"])
    with pytest.raises(RequestError, match=f"has {length} tokens .*, the model takes {length - 1}") as caught:
        lay_out(tokenizer, [*REQUESTS, long, longer], (), max_positions=length - 1)
    problems = str(caught.value).splitlines()[1:]
    assert len(problems) == 2, "both, and none of the short ones"
    assert "In Rome" in problems[1]
    assert lay_out(tokenizer, [*REQUESTS, long], (), max_positions=length).valid.any()
