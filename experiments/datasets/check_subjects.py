"""Whether the library finds the last token of every subject, told without the offsets that it finds it by.

    python -m experiments.datasets.check_subjects --tokenizer DIRECTORY FILE...

Each file is read twice: by the library, which says which token of "prompt target" is the subject's last, and as plain JSON,
whose prompt gives the text up to the end of the subject. That token is right when the tokens up to and including it decode
to that text (a token may go on behind it), and those before it do not. The neighbours of that token are the control: neither
may pass. A second table says how often the library would propose the subject that the file has, if the file had none.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit_jax.editing.tokens import Passage, encode
from kedit_jax.evaluation import Record, RecordError, longest_shared_span, read_records
from kedit_jax.evaluation.datasets.subject import shared_spans
from kedit_jax.models import load_tokenizer

PREFIX = "It was a long day. "
"""A text before the prompt, such as editing samples from the model."""
FIELDS = (("prompt", "rephrase_prompt"), ("src", "rephrase"))
"""What a file may call its prompts and paraphrases."""


@dataclass
class Counts:
    """Of how many records the token is right, ends where the subject ends, and of how many a neighbour passes."""

    right: int = 0
    exact: int = 0
    earlier: int = 0
    later: int = 0


def is_last(tokenizer: Any, tokens: Sequence[int], place: int, head: str) -> bool:
    """Whether the head is whole with the token at a place, and is not without it."""
    return text_of(tokenizer, tokens[: place + 1]).startswith(head) and not text_of(tokenizer, tokens[:place]).startswith(
        head
    )


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def count(tokenizer: Any, records: Sequence[Record], heads: Sequence[str], prefix: str) -> Counts:
    """Compare what the library says of each record with the text up to the end of its subject."""
    passages = [Passage(record.prompt, record.subject, record.target_new, prefix) for record in records]
    counts = Counts()
    for encoded, head in zip(encode(tokenizer, passages), heads, strict=True):
        tokens, last = encoded.tokens, encoded.subject_last
        counts.right += is_last(tokenizer, tokens, last, prefix + head)
        counts.exact += text_of(tokenizer, tokens[: last + 1]) == prefix + head
        counts.earlier += last > 0 and is_last(tokenizer, tokens, last - 1, prefix + head)
        counts.later += is_last(tokenizer, tokens, last + 1, prefix + head)
    return counts


def heads_of(raws: Sequence[dict[str, Any]], prompt: str) -> list[str]:
    """The text of each prompt up to the end of its subject, from the file alone."""
    for raw in raws:
        if raw[prompt].count(raw["subject"]) != 1:
            raise SystemExit(f"the subject does not stand once in {raw!r}")
    return [raw[prompt][: raw[prompt].index(raw["subject"]) + len(raw["subject"])] for raw in raws]


def proposals(raws: Sequence[dict[str, Any]], prompt: str, paraphrase: str) -> tuple[int, int, int, int]:
    """How many subjects the library proposes as the file has them, otherwise, not at all; how many length alone would."""
    right = wrong = none = by_length = 0
    for raw in raws:
        spans = {span for _, span in shared_spans(raw[prompt], [raw[paraphrase]])}
        longest = [span for span in spans if len(span) == max(map(len, spans))]
        by_length += longest == [raw["subject"]]
        try:
            found = longest_shared_span(raw[prompt], [raw[paraphrase]])
        except RecordError:
            found = None
        right, wrong, none = (
            right + (found == raw["subject"]),
            wrong + (found not in (None, raw["subject"])),
            none + (found is None),
        )
    return right, wrong, none, by_length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, type=Path, help="a directory with a tokenizer.json")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="EasyEdit's CounterFact, or MEND's zsRE")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    checked, proposed = [], []
    for path in options.files:
        raws = json.loads(path.read_text(encoding="utf-8"))
        prompt, paraphrase = next(names for names in FIELDS if names[0] in raws[0])
        begin = time.perf_counter()
        records = read_records(path)
        seconds = time.perf_counter() - begin
        heads = heads_of(raws, prompt)
        for prefix in ("", PREFIX):
            found = count(tokenizer, records, heads, prefix)
            numbers = f"{found.right} | {found.exact} | {found.earlier} | {found.later}"
            checked.append(f"| {path.name} | {len(records)} of {len(raws)} | {seconds:.2f} | {prefix!r} | {numbers} |")
        right, wrong, none, by_length = proposals(raws, prompt, paraphrase)
        proposed.append(f"| {path.name} | {len(raws)} | {right} | {wrong} | {none} | {by_length} |")
    print(
        "| file | records read | seconds | prefix | right | ends with the subject | one earlier passes | one later passes |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", *checked, sep="\n")
    print("\n| file | records | proposed as given | proposed otherwise | not proposed | as given by length alone |")
    print("| --- | --- | --- | --- | --- | --- |", *proposed, sep="\n")


if __name__ == "__main__":
    main()
