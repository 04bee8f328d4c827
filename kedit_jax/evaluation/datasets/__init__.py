"""Data sets of edits: recognised by what a file holds, checked, and brought into one form, `Record`.

A file is a JSON list, JSON Lines, or a table (comma, semicolon or tab between cells, names of the columns in the first row),
UTF-8 with or without byte order mark, plain or gzipped; its name does not matter. The schema is told by the fields:

| schema | told by | id | true object |
| --- | --- | --- | --- |
| CounterFact, MultiCounterFact, ours | `requested_rewrite`, an object | `case_id` | `target_true`; none where it is null |
| MQuAKE | `requested_rewrite`, a list | `case_id`; `.1`, `.2` .. behind it for several edits | `target_true` |
| zsRE (MEND) | `src` | `case_id`, else position | none, or the first of `answers`: see below |
| EasyEdit's CounterFact and zsRE, KnowEdit | `target_new`, `locality`, `portability` | the same | `ground_truth` if any |
| requests, tables | `target` | `id`, else position | `old_target` if any |

The first line of the table that fits counts; all records of a file are in one schema. What a format lacks:

- No true object: measures that compare NLL(new) with NLL(true) do not apply, and are None; those of exact match do.
- zsRE names no counterfactual true object. As MEMIT's evaluation does, the first of `answers` is written, there is no true
  object, and `?` is put behind `loc`. With `zsre_target="alt"`, EasyEdit's way, `alt` is written and the first of `answers`
  is the true object; records whose `alt` is empty or is that answer cannot be used, and are listed.
- A neighbour's object that is the record's true object makes a neighbourhood prompt, compared by probability as
  CounterFact does; one of its own makes a neighbourhood fact, scored by exact match.
- MQuAKE's questions hold only after all edits of their case: they belong to its last edit. Edits that several cases share
  are left as they are.
- KnowEdit's `Relation_Specificity` and `Forgetfulness` are facts of the same subject, other groups of `locality`
  neighbourhood facts, all groups of `portability` follow from the edit. Of several answers the first counts, the others are
  its aliases; an item without prompt or answer is left out, as published evaluations do.
- Keys that no rule reads are kept in `Record.extra`.
"""

from kedit_jax.evaluation.datasets.hub import fetch
from kedit_jax.evaluation.datasets.reading import parse_records, read_records, write_records
from kedit_jax.evaluation.datasets.subject import longest_shared_span, place_subject

__all__ = [
    "fetch",
    "longest_shared_span",
    "parse_records",
    "place_subject",
    "read_records",
    "write_records",
]
