"""Records: one edit each, with the prompts that measure it, in the terms of CounterFact (Meng et al. 2022)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kedit_jax.editing.requests import SLOT, EditRequest
from kedit_jax.errors import KeditError


class RecordError(KeditError):
    """An evaluation record, or a file of them, that cannot be used."""


@dataclass(frozen=True)
class Fact:
    """After `prompt` the model says, or shall say, `target`; `aliases` say the same as the target. Braces are literal."""

    prompt: str
    target: str
    aliases: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fact in the file's schema."""
        aliases = {"aliases": list(self.aliases)} if self.aliases else {}
        return {"prompt": self.prompt, "target": self.target, **aliases}


@dataclass(frozen=True)
class Record:
    """One edit and the prompts that measure it.

    Attributes:
        case_id: name of the record, unique in its file: as the file has it, or its position from 0.
        prompt: the rewrite prompt, with exactly one `{}` for the subject.
        subject: what the fact is about; braces are literal.
        target_new: the object to write, without the space that joins it to the prompt.
        target_true: the object that the world, and the unedited model, has there; None where the data set names none: then
            no probability can be compared, and the measures are those of exact match alone.
        paraphrase_prompts: other wordings of the same fact, complete texts that contain the subject.
        neighborhood_prompts: prompts of the same relation about other subjects, whose true object is `target_true`.
        attribute_prompts: prompts about subjects that have `target_new`; kept, not scored.
        generation_prompts: prompts for free text about the subject; kept, not scored.
        same_subject: other facts of the same subject, to be left alone (not in the original schema).
        relation_id: name of the relation.
        target_new_id, target_true_id: names of the objects.
        pararel_idx: number of the record in ParaRel.
        extra: keys of the record's object that are not of the schema.
        neighborhood_facts: facts to be left alone that have an object of their own; scored by exact match.
        portability_facts: facts that follow from the edit, such as multi-hop questions; kept, not scored.
        subject_proposed: whether the subject was found by a finder, not given.
        weight: how much the fact counts (see `EditRequest`).
    """

    case_id: int | str
    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrase_prompts: tuple[str, ...] = ()
    neighborhood_prompts: tuple[str, ...] = ()
    attribute_prompts: tuple[str, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    same_subject: tuple[Fact, ...] = ()
    relation_id: str | None = None
    target_new_id: str | None = None
    target_true_id: str | None = None
    pararel_idx: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    neighborhood_facts: tuple[Fact, ...] = ()
    portability_facts: tuple[Fact, ...] = ()
    subject_proposed: bool = False
    weight: float = 1.0
    numbered: bool = field(default=False, compare=False)

    @property
    def rewrite_prompt(self) -> str:
        """The rewrite prompt with the subject in its slot."""
        return self.prompt.replace(SLOT, self.subject)

    def request(self) -> EditRequest:
        """The edit that the record asks for; its id is the case id as text, or None where that is a mere place in a file."""
        return EditRequest(
            prompt=self.prompt,
            subject=self.subject,
            target=self.target_new,
            id=None if self.numbered else str(self.case_id),
            relation=self.relation_id,
            old_target=self.target_true,
            weight=self.weight,
        )

    def to_dict(self) -> dict[str, Any]:
        """The record in CounterFact's schema and our additions to it, as `parse_records` reads it back."""
        true = None if self.target_true is None else {"str": self.target_true, "id": self.target_true_id}
        rewrite = {
            "prompt": self.prompt,
            "relation_id": self.relation_id,
            "subject": self.subject,
            "target_new": {"str": self.target_new, "id": self.target_new_id},
            "target_true": true,
        }
        additions: dict[str, Any] = {
            name: [fact.to_dict() for fact in getattr(self, name)] for name in FACT_LISTS[1:] if getattr(self, name)
        }
        if self.subject_proposed:
            additions["subject_proposed"] = True
        if self.weight != 1:
            additions["weight"] = self.weight
        known = {*additions, "subject_proposed", "weight", *FACT_LISTS}  # another schema's record may have these, unread
        return {
            **{name: value for name, value in self.extra.items() if name not in known},
            "case_id": self.case_id,
            "pararel_idx": self.pararel_idx,
            "requested_rewrite": rewrite,
            **{name: list(getattr(self, name)) for name in PROMPT_LISTS},
            FACT_LISTS[0]: [fact.to_dict() for fact in self.same_subject],
            **additions,
        }


SCORED_LISTS = ("paraphrase_prompts", "neighborhood_prompts")
PROMPT_LISTS = (*SCORED_LISTS, "attribute_prompts", "generation_prompts")
FACT_LISTS = ("same_subject", "neighborhood_facts", "portability_facts")
