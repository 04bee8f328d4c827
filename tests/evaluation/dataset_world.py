"""One invented record in each published layout. Nobody and nothing in them is real, and no line is from a data set."""

import copy
from typing import Any

EASYEDIT = {
    "case_id": 4,
    "prompt": "Ada Quill was born in the town of",
    "target_new": "Port Royal",
    "subject": "Ada Quill",
    "ground_truth": "Paris",
    "rephrase_prompt": "The home of Ada Quill is",
    "locality_prompt": "Vera Lund was born in the town of",
    "locality_ground_truth": "Paris",
}
EASYEDIT_ZSRE = {
    "prompt": "Which town was Bram Osterly born in?",
    "target_new": "Lima",
    "subject": "Bram Osterly",
    "ground_truth": ["Rome", "Roma"],
    "rephrase_prompt": ["Bram Osterly comes from which town?"],
    "locality_prompt": ["nq question: who wrote the long song"],
    "locality_ground_truth": ["Otto Ngata"],
    "portability_prompt": "Which country was Bram Osterly born in?",
    "portability_ground_truth": "Peru",
    "cond": "Rome >> Lima || Which town was Bram Osterly born in?",
}
ZSRE = {
    "subject": "Cora Vantongeren",
    "src": "What does Cora Vantongeren play?",
    "pred": "harp",
    "rephrase": "Which instrument is Cora Vantongeren known for?",
    "alt": "drum",
    "answers": ["violin", "fiddle"],
    "loc": "nq question: who paints the tall tower",
    "loc_ans": "Vera Lund",
    "cond": "harp >> drum || What does Cora Vantongeren play?",
}
MQUAKE = {
    "case_id": 9,
    "requested_rewrite": [
        {
            "prompt": "{} plays the",
            "relation_id": "R1",
            "target_new": {"str": "drum", "id": "D"},
            "target_true": {"str": "violin", "id": "V"},
            "subject": "Dov Marsh",
            "question": "What does Dov Marsh play?",
        },
        {
            "prompt": "The drum was invented in {}'s town, that is",
            "relation_id": "R2",
            "target_new": {"str": "Oslo", "id": "O"},
            "target_true": {"str": "Lima", "id": "L"},
            "subject": "Émile Ōta",
            "question": "Where was the drum of Émile Ōta invented?",
        },
    ],
    "questions": ["Where was the instrument of Dov Marsh invented?", "Which town made what Dov Marsh plays?"],
    "answer": "Lima",
    "answer_alias": ["Lima city"],
    "new_answer": "Oslo",
    "new_answer_alias": ["Oslo town"],
    "single_hops": [],
}
KNOWEDIT = {
    "subject": "Ada Quill",
    "prompt": "The sister of Ada Quill is",
    "target_new": "Vera Lund",
    "ground_truth": [["Cora Vantongeren"]],
    "rephrase": "Ada Quill is the brother of",
    "portability": {
        "Reasoning": [{"prompt": "The sister of Ada Quill was born in", "ground_truth": [["Rome", "Roma"]]}],
        "Subject_Aliasing": [{"prompt": "The sister of A. Quill is", "ground_truth": [["Vera Lund"]]}],
        "Logical_Generalization": [{"prompt": "The brother of Vera Lund is", "ground_truth": [[""]]}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The town of Ada Quill is", "ground_truth": [["Paris"]]}],
        "Forgetfulness": [{"prompt": ["The sister of Ada Quill, who is not Vera, is"], "ground_truth": [["Cora"]]}],
        "Others": [{"prompt": "The town of Otto Ngata is", "ground_truth": "Lima"}],
    },
}
WIKIBIO = {
    "text": "This is a passage about dov marsh. Dov Marsh was a painter.",
    "concept": "dov marsh",
    "labels": "He was born in Oslo.",
    "locality": {"Relation_Specificity": [{"prompt": "Dov Marsh worked in", "ground_truth": ["Rome"]}]},
}
REQUEST = {"prompt": "{} plays the", "subject": "Ada Quill", "target": "harp"}


def changed(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with fields replaced; `...` leaves a field out."""
    made = copy.deepcopy(raw) | changes
    return {name: value for name, value in made.items() if value is not ...}
