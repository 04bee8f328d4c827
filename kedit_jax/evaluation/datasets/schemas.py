"""The schemas: what tells each one, and how its fields become those of a `Record` (see the package's table)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kedit_jax.editing.requests import SLOT
from kedit_jax.errors import KeditError
from kedit_jax.evaluation.datasets.fields import Fields, Raw
from kedit_jax.evaluation.datasets.subject import Finder, place_subject
from kedit_jax.evaluation.records import FACT_LISTS, PROMPT_LISTS, SCORED_LISTS, Fact, Record

ZSRE_TARGETS = ("answers", "alt")
SAME_SUBJECT = ("Relation_Specificity", "Forgetfulness")
"""KnowEdit's groups of `locality` that are about the edited subject."""


@dataclass(frozen=True)
class Reading:
    """How to read what a schema leaves open.

    Attributes:
        finder: proposes the subject of a record that has none; None proposes nothing.
        zsre_target: what an edit of a zsRE record writes, "answers" (the first of them) or "alt".
    """

    finder: Finder | None
    zsre_target: str


@dataclass(frozen=True)
class Schema:
    """One layout of a record's fields.

    Attributes:
        name: for messages.
        field: the field that tells it.
        read: the records of one raw record (MQuAKE's hold several) from its fields, itself and its position; they are not to
            be used where the fields have problems.
        is_list: whether that field is a list, where this decides.
    """

    name: str
    field: str
    read: Callable[[Fields, Raw, int, Reading], list[Record]]
    is_list: bool | None = None

    def fits(self, raw: Raw) -> bool:
        """Whether a raw record is in this schema; schemas are asked in the order of `SCHEMAS`."""
        return self.field in raw and (self.is_list is None or isinstance(raw[self.field], list) == self.is_list)


def recognise(raw: Raw) -> Schema | None:
    """The schema of a raw record."""
    return next((schema for schema in SCHEMAS if schema.fits(raw)), None)


def _counterfact(fields: Fields, raw: Raw, number: int, reading: Reading) -> list[Record]:
    """CounterFact, MultiCounterFact, and what `Record.to_dict` writes."""
    known = {"case_id", "pararel_idx", "requested_rewrite", "subject_proposed", "weight", *PROMPT_LISTS, *FACT_LISTS}
    lists: dict[str, Any] = {name: fields.prompts(raw, name, required=name in SCORED_LISTS) for name in PROMPT_LISTS}
    facts: dict[str, Any] = {name: fields.facts(raw, name) for name in FACT_LISTS}
    case_id, pararel_idx = fields.case_id(raw), fields.optional(raw, "pararel_idx", "pararel_idx", int)
    holds = "'prompt', 'subject', 'target_new' and 'target_true'"
    rewrite = fields.mapping(raw, "requested_rewrite", "requested_rewrite", holds)
    if rewrite is None:
        return []
    record = replace(
        _rewrite(fields, rewrite, "requested_rewrite"),
        case_id=case_id,
        pararel_idx=pararel_idx,
        **lists,
        **facts,
        subject_proposed=fields.flag(raw, "subject_proposed"),
        weight=fields.weight(raw),
        extra=_rest(raw, known),
    )
    if record.neighborhood_prompts and record.target_true is None and not fields.problems:
        fields.problems.append("'neighborhood_prompts' need 'target_true', their object; or give 'neighborhood_facts'")
    return [record]


def _rewrite(fields: Fields, raw: Raw, name: str) -> Record:
    """The edit itself, as CounterFact and MQuAKE nest it; no true object where `target_true` is null."""
    new, new_id = _target(fields, raw, name, "target_new")
    without = "target_true" in raw and raw["target_true"] is None
    true, true_id = (None, None) if without else _target(fields, raw, name, "target_true")
    fields.different(new, true, f"{name}.target_new.str")
    return Record(
        case_id="",
        prompt=fields.template(raw, f"{name}.prompt"),
        subject=fields.text(raw, "subject", f"{name}.subject"),
        target_new=new,
        target_true=true,
        relation_id=fields.optional(raw, "relation_id", f"{name}.relation_id", str),
        target_new_id=new_id,
        target_true_id=true_id,
    )


def _target(fields: Fields, raw: Raw, name: str, key: str) -> tuple[str, str | None]:
    """An object's text, without blanks around it, and its id."""
    value = fields.mapping(raw, key, f"{name}.{key}", "'str' and 'id'")
    if value is None:
        return "", None
    return fields.text(value, "str", f"{name}.{key}.str").strip(), fields.optional(value, "id", f"{name}.{key}.id", str)


def _mquake(fields: Fields, raw: Raw, number: int, reading: Reading) -> list[Record]:
    """A case of MQuAKE: one record for each of its edits; what follows from all of them belongs to the last."""
    case_id, rewrites = fields.case_id(raw), fields.items(raw, "requested_rewrite")
    if not rewrites:
        fields.problems.append("'requested_rewrite' is empty; give at least one edit")
    records = []
    for i, item in enumerate(rewrites):
        name = f"requested_rewrite[{i}]"
        rewrite = fields.mapping({"item": item}, "item", name, "'prompt', 'subject', 'target_new' and 'target_true'")
        if rewrite is not None:
            question = fields.optional_text(rewrite, "question", f"{name}.question")
            record = replace(_rewrite(fields, rewrite, name), case_id=f"{case_id}.{i + 1}" if len(rewrites) > 1 else case_id)
            records.append(record if question is None else replace(record, paraphrase_prompts=(question,)))
    questions = fields.prompts(raw, "questions")
    answer = fields.text(raw, "new_answer").strip() if questions else ""
    aliases = fields.prompts(raw, "new_answer_alias")
    if records:
        known = {"case_id", "requested_rewrite", "questions", "new_answer", "new_answer_alias"}
        follows = tuple(Fact(question, answer, aliases) for question in questions)
        records[-1] = replace(records[-1], portability_facts=follows, extra=_rest(raw, known))
    return records


def _zsre(fields: Fields, raw: Raw, number: int, reading: Reading) -> list[Record]:
    """zsRE as MEND has it. MEND's `loc` lacks the question mark, which MEMIT's evaluation adds."""
    answers = fields.answers(raw, "answers", required=True)
    alt = reading.zsre_target == "alt"
    facts: tuple[Fact, ...] = ()
    if raw.get("loc") is not None or raw.get("loc_ans") is not None:
        loc, loc_ans = fields.text(raw, "loc").rstrip(), fields.text(raw, "loc_ans").strip()
        facts = (Fact(loc if loc.endswith("?") else f"{loc}?", loc_ans),)
    used = {"src", "subject", "answers", "rephrase", "loc", "loc_ans", "case_id", *(("alt",) if alt else ())}
    return _from_complete_prompt(
        fields,
        raw,
        reading,
        case_id=number if raw.get("case_id") is None else fields.case_id(raw),
        numbered=raw.get("case_id") is None,
        prompt="src",
        target=("alt", fields.text(raw, "alt").strip()) if alt else ("answers", answers[0] if answers else ""),
        true=answers[0] if alt and answers else None,
        paraphrases=fields.one_or_more(raw, "rephrase"),
        neighborhood_facts=facts,
        extra=_rest(raw, used) | ({"answers": list(answers)} if len(answers) > 1 else {}),
    )


def _easyedit(fields: Fields, raw: Raw, number: int, reading: Reading) -> list[Record]:
    """CounterFact and zsRE as EasyEdit has them, and KnowEdit, whose WikiBio has `text`, `labels` and `concept`."""
    prompt, new = _either(raw, "prompt", "text"), _either(raw, "target_new", "labels")
    subject, rephrase = _either(raw, "subject", "concept"), _either(raw, "rephrase_prompt", "rephrase")
    answers = fields.answers(raw, "ground_truth")
    true = answers[0] if answers else None
    near = _pairs(fields, raw, "locality_prompt", "locality_ground_truth")
    follows = _pairs(fields, raw, "portability_prompt", "portability_ground_truth")
    locality, portability = (_groups(fields, raw, key) for key in ("locality", "portability"))
    used = {prompt, new, subject, rephrase, "case_id", "ground_truth", "locality", "portability"}
    used |= {f"{kind}_{part}" for kind in ("locality", "portability") for part in ("prompt", "ground_truth")}
    return _from_complete_prompt(
        fields,
        raw,
        reading,
        case_id=number if raw.get("case_id") is None else fields.case_id(raw),
        numbered=raw.get("case_id") is None,
        prompt=prompt,
        subject=subject,
        target=(new, fields.text(raw, new).strip()),
        true=true,
        paraphrases=fields.one_or_more(raw, rephrase),
        neighborhood_prompts=tuple(fact.prompt for fact in near if fact.target == true),
        neighborhood_facts=(
            *(fact for fact in near if fact.target != true),
            *_in_groups(locality, lambda group: group not in SAME_SUBJECT),
        ),
        same_subject=_in_groups(locality, lambda group: group in SAME_SUBJECT),
        portability_facts=(*follows, *_in_groups(portability, lambda group: True)),
        extra=_rest(raw, used),
    )


def _pairs(fields: Fields, raw: Raw, prompt: str, answer: str) -> tuple[Fact, ...]:
    """Facts from a prompt and its answer, or from as many answers as prompts."""
    prompts, answers = fields.one_or_more(raw, prompt), fields.one_or_more(raw, answer)
    if len(prompts) != len(answers):
        fields.problems.append(f"{prompt!r} has {len(prompts)} texts and {answer!r} has {len(answers)}; give one for each")
        return ()
    return tuple(Fact(one, other.strip()) for one, other in zip(prompts, answers, strict=True))


def _groups(fields: Fields, raw: Raw, key: str) -> dict[str, list[Fact]]:
    """Facts by the name of their group."""
    if raw.get(key) is None:
        return {}
    groups = fields.mapping(raw, key, key, "lists of {prompt, ground_truth} by name") or {}
    found: dict[str, list[Fact]] = {}
    for group in groups:
        name = f"{key}.{group}"
        for i, item in enumerate(fields.items({name: groups[group]}, name)):
            value = fields.mapping({"item": item}, "item", f"{name}[{i}]", "'prompt' and 'ground_truth'")
            if value is not None:
                prompts = fields.answers(value, "prompt", f"{name}[{i}].prompt")
                answers = fields.answers(value, "ground_truth", f"{name}[{i}].ground_truth")
                if prompts and answers:
                    found.setdefault(str(group), []).append(Fact(prompts[0], answers[0], answers[1:]))
    return found


def _in_groups(groups: Mapping[str, Sequence[Fact]], wanted: Callable[[str], bool]) -> tuple[Fact, ...]:
    return tuple(fact for group, facts in groups.items() if wanted(group) for fact in facts)


REQUEST_FIELDS = ("id", "prompt", "subject", "target", "relation", "old_target", "weight", "paraphrases")


def _request(fields: Fields, raw: Raw, number: int, reading: Reading) -> list[Record]:
    """An edit request as `read_requests` reads it, with `paraphrases` at will; the prompt may name its subject in place."""
    fields.problems += [
        f"unknown field {name!r}; known are {', '.join(REQUEST_FIELDS)}" for name in raw if name not in REQUEST_FIELDS
    ]
    true = fields.optional_text(raw, "old_target")
    return _from_complete_prompt(
        fields,
        raw,
        reading,
        case_id=number if raw.get("id") is None else fields.text(raw, "id"),
        numbered=raw.get("id") is None,
        prompt="prompt",
        target=("target", fields.text(raw, "target").strip()),
        true=true and true.strip(),
        paraphrases=fields.one_or_more(raw, "paraphrases"),
        relation_id=fields.optional_text(raw, "relation"),
        weight=fields.weight(raw),
    )


def _from_complete_prompt(
    fields: Fields,
    raw: Raw,
    reading: Reading,
    *,
    case_id: int | str,
    prompt: str,
    target: tuple[str, str],
    true: str | None,
    paraphrases: tuple[str, ...],
    subject: str = "subject",
    **others: Any,
) -> list[Record]:
    """A record from a prompt that names its subject in place.

    Args:
        prompt, subject: the names of their fields.
        target: the name of its field, and the object to write.
        true: the true object.
        others: more attributes of the record.
    """
    text, given = fields.text(raw, prompt), fields.optional_text(raw, subject)
    fields.different(target[1], true, target[0])
    if fields.problems:
        return []
    try:
        found = _proposed(text, paraphrases, reading.finder, subject) if given is None else given
        template, spelled = place_subject(text, found)
    except KeditError as error:
        fields.problems.append(str(error))
        return []
    return [
        Record(
            case_id=case_id,
            prompt=template,
            subject=spelled,
            target_new=target[1],
            target_true=true,
            paraphrase_prompts=paraphrases,
            subject_proposed=given is None,
            **others,
        )
    ]


def _proposed(prompt: str, paraphrases: Sequence[str], finder: Finder | None, name: str) -> str:
    """The subject that the finder proposes."""
    if SLOT in prompt:
        raise KeditError(f"{name!r} is missing; give what belongs into the {SLOT} of {prompt!r}")
    found = None if finder is None else finder(prompt, paraphrases)
    if found is None:
        raise KeditError(
            f"{name!r} is missing, and none can be proposed for {prompt!r}; give it, or paraphrases that share it"
        )
    if not isinstance(found, str) or not found.strip() or found not in prompt:
        raise KeditError(f"the finder proposed {found!r:.60}, which is no part of {prompt!r}; give {name!r}")
    return found


def _either(raw: Raw, first: str, second: str) -> str:
    """The field that the record has; the first where it has neither."""
    return second if raw.get(first) is None and raw.get(second) is not None else first


def _rest(raw: Raw, used: set[str]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in used}


SCHEMAS = (
    Schema("CounterFact", "requested_rewrite", _counterfact, is_list=False),
    Schema("MQuAKE", "requested_rewrite", _mquake, is_list=True),
    Schema("zsRE", "src", _zsre),
    Schema("EasyEdit", "target_new", _easyedit),
    Schema("EasyEdit", "locality", _easyedit),
    Schema("EasyEdit", "portability", _easyedit),
    Schema("requests", "target", _request),
)
