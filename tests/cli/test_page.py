"""A session's page: well-formed, self-contained, escaped, and with the numbers that were measured."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import jax
import numpy as np
import pytest

from kedit_jax.cli import charts
from kedit_jax.cli.evaluating import _course
from kedit_jax.cli.measured import MEASURES, Measured
from kedit_jax.cli.page import Course, Spoken, page
from kedit_jax.delta import host_kernel
from kedit_jax.editing.requests import EditRequest
from kedit_jax.editing.session import EditSession, Event, equivalence_error
from kedit_jax.evaluation import AbilityScore, Evaluation, FreeAnswers, FreeText, Said, prepare_pairs, score_pairs
from kedit_jax.evaluation.metrics import FactScores, Percentages, PromptScores, RecordMeasures, Scores
from kedit_jax.evaluation.report import Details
from kedit_jax.models import down_kernel_address
from kedit_jax.verification import batch_scores, norms_over_steps

HOSTILE = '<script>alert(1)</script> "quoted" "onmouseover="alert(1) \'too\' & ]]> \x1b[31m \x00 </style><img>'
NAMES = [field.name for field in dataclasses.fields(Percentages)]


def evaluation(begin: float) -> Evaluation:
    """Numbers that can be told apart; nothing behind them."""
    none, number, yes = np.zeros(0, int), np.zeros(0), np.zeros(0, bool)
    prompts, facts = PromptScores(none, number, number, yes, yes), FactScores(none, number, yes)
    details = Details((), RecordMeasures(*[number] * 7), Scores(0, prompts, prompts, prompts, facts))
    shares = {name: begin + i / 7 for i, name in enumerate(NAMES)}
    return Evaluation(**shares, perplexity=begin + 40, n=3, details=details)


def measured(begin: float) -> Measured:
    return Measured(
        evaluation(begin),
        FreeAnswers(*(begin + i / 9 for i in range(6)), n=3, answers=()),
        FreeText(begin + 600.0, None, 3, 0, ()),
        {HOSTILE: AbilityScore(begin + 0.1, begin + 0.2, 25.0, 8)},
    )


ROWS = {"unedited": measured(1.0), "edited": measured(50.0)}


@pytest.fixture(scope="module")
def session(history: list[EditSession]) -> EditSession:
    """After four batches, one fact of which was taken back; what stands and what left say hostile things."""
    with jax.enable_x64(False):
        fewer, _ = history[-1].retract([str(history[-1].facts[1].id)])
    bad = EditRequest("{} says", HOSTILE, HOSTILE, id="<i>id</i>")
    return dataclasses.replace(
        fewer,
        retired=(*fewer.retired, bad),
        skipped=(bad,),
        events=(*fewer.events, Event(HOSTILE, ("<b>",), (HOSTILE,), (HOSTILE,), texts=(HOSTILE,), reason=HOSTILE)),
    )


@pytest.fixture(scope="module")
def course(session: EditSession) -> Course:
    with jax.enable_x64(False):
        found = _course(session, [], None)
    bad = Said(HOSTILE, exact=False, begins=False)
    return dataclasses.replace(found, spoken=[*found.spoken, Spoken((HOSTILE, HOSTILE), bad, bad)])


@pytest.fixture(scope="module")
def html(session: EditSession, course: Course) -> str:
    return page(HOSTILE, session, ROWS, course, "0.0")


@pytest.fixture(scope="module")
def tree(html: str) -> ElementTree.Element:
    """Reads the page as XML, which fails where it is not well-formed."""
    return ElementTree.fromstring(html)


def test_the_page_is_well_formed_and_has_its_parts(tree: ElementTree.Element) -> None:
    heads = ["".join(head.itertext()) for head in tree.iter("h2")]
    assert heads == [
        "Measures", "Left to speak", "General ability", "Over the steps", "Sequence against one-time edit",
        "Conflicts, and what was taken back", "What the model says",
    ]  # fmt: skip
    assert len(list(tree.iter("svg"))) == 4
    style = next(tree.iter("style")).text or ""
    assert "prefers-color-scheme: dark" in style
    names = {meta.get("name") for meta in tree.iter("meta")}
    assert "viewport" in names, "or a telephone shows it as a wide page"


def test_nothing_is_loaded(html: str, tree: ElementTree.Element) -> None:
    assert not re.search(r"https?:|url\(|@import|src=|href=|<script|<iframe|<link", html)
    assert not [node.tag for node in tree.iter() if node.tag in ("script", "link", "img", "iframe", "object", "a")]


def test_hostile_texts_are_shown_as_texts(html: str, tree: ElementTree.Element) -> None:
    shown = HOSTILE.replace("\x1b", "\ufffd").replace("\x00", "\ufffd")
    texts = ["".join(node.itertext()) for tag in ("h1", "td", "dd", "b") for node in tree.iter(tag)]
    assert sum(shown in text for text in texts) >= 7, "title, task, event, retired, skipped, completions"
    assert "\x00" not in html
    assert html.count("<style>") == html.count("</style>") == 1


class Found(HTMLParser):
    """The elements, and the names of their attributes, as a browser makes them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_hostile_texts_make_no_elements_and_no_attributes(
    html: str, session: EditSession, course: Course, fresh: EditSession
) -> None:
    """Of model, facts, ids, events, times, tasks and completions; the same page without them has all there is to find."""
    hostile_times = dataclasses.replace(course, times=[HOSTILE] * len(session.events))
    for made in (html, page(HOSTILE, session, ROWS, hostile_times, HOSTILE)):
        found = Found(made)
        harmless = page("model", dataclasses.replace(fresh, events=(Event("edit", ("a",)),)), ROWS, course_of(course), "0.0")
        allowed = Found(harmless.replace(HOSTILE, "task"))
        assert found.elements == allowed.elements
        assert found.attributes == allowed.attributes
        assert not {"script", "img"} & found.elements
        assert not [name for name in found.attributes if "onmouseover" in name]


def course_of(course: Course) -> Course:
    """One event, and words of nobody."""
    said = Said("said", exact=True, begins=True)
    return dataclasses.replace(course, times=[""], spoken=[Spoken(("a", "b"), said, said)])


def test_negative_control_texts_that_are_not_escaped_are_found(html: str) -> None:
    raw = html.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
    found = Found(raw)
    assert {"script", "img"} <= found.elements
    assert [name for name in found.attributes if "onmouseover" in name]


def values(tree: ElementTree.Element) -> dict[str, float]:
    return {str(node.get("data-name")): float(str(node.get("value"))) for node in tree.iter("data")}


def test_the_numbers_are_those_of_the_json(tree: ElementTree.Element, course: Course) -> None:
    found, content = values(tree), json.loads(json.dumps(course.to_dict()))
    for model, row in ROWS.items():
        told = json.loads(json.dumps(row.to_dict()))
        for key in MEASURES:
            assert found[f"{model} {key}"] == told[key], key
        for key in ("efficacy", "generalization_begins", "specificity"):
            assert found[f"{model} free {key}"] == told["free_answers"][key]
        assert found[f"{model} text fluency"] == told["free_text"]["fluency"]
        task = next(name for name in found if name.startswith(f"{model} ability") and name.endswith("f1"))
        assert found[task] == told["ability"][HOSTILE]["f1"]
    assert found["tile equivalence"] == content["equivalence_error"]
    for check in content["checks"]:
        assert found[f"{check['id']} error"] == check["error"]
    for layer, drift in content["drift"].items():
        assert found[f"drift {layer} mean"] == 100 * drift["mean"]
    shown = {node.get("data-name"): node.text for node in tree.iter("data")}
    assert shown["edited efficacy"] == f"{ROWS['edited'].evaluation.efficacy:.1f}"
    assert set(MEASURES) == set(NAMES) | {"perplexity"}


def test_the_course_is_the_session_s(session: EditSession, course: Course) -> None:
    with jax.enable_x64(False):
        assert course.equivalence == equivalence_error(session)
    assert course.equivalence is not None
    assert course.equivalence < 1e-10
    assert all(check.holds for check in course.checks)
    sizes = [len(norms.update) for norms in course.norms.values()]
    assert sizes == [len(session.batches)] * len(session.settings.layers)
    for layer, norms in course.norms.items():
        kernel = np.asarray(host_kernel(session.base, down_kernel_address(layer)), np.float64)
        size = np.linalg.norm(session.layers[layer].update) / np.linalg.norm(kernel)
        assert norms.update[-1] == pytest.approx(size, rel=1e-9)
        assert norms.step[0] == norms.update[0]
        assert all(np.diff(norms.update) != 0)


def test_batches_are_scored_apart(session: EditSession) -> None:
    with jax.enable_x64(False):
        found = batch_scores(session)
        pairs = prepare_pairs([(fact.text, fact.target) for fact in session.facts], session.tokenizer)
        scores = score_pairs(session.model, pairs)
    assert found.facts == session.batches
    ends = np.cumsum(session.batches)[:-1]
    assert found.met == pytest.approx([part.mean() for part in np.split(scores.correct, ends)])
    assert found.probability == pytest.approx([part.mean() for part in np.split(np.exp(-scores.nll), ends)])


def test_a_session_without_facts_or_without_its_steps(fresh: EditSession, history: list[EditSession]) -> None:
    with jax.enable_x64(False):
        empty = _course(fresh, [], None)
    assert ElementTree.fromstring(page("model", fresh, ROWS, empty, "0.0")) is not None
    assert (empty.equivalence, list(empty.checks), dict(empty.norms), empty.batches.facts) == (None, [], {}, ())
    latest = dataclasses.replace(history[1], settings=dataclasses.replace(history[1].settings, history="latest-simplified"))
    assert norms_over_steps(latest) == {}, "only the last batch's constraints are known"


def test_charts_of_many_points_and_of_none_that_is_finite() -> None:
    many = charts.lines({"a": [(float(i), float(i)) for i in range(5000)]}, title="t", x="x", y="y")
    assert many.count(",") < 2 * charts.POINTS, "a line is thinned"
    assert "circle" not in many
    gap = charts.lines({"a": [(1.0, 2.0), (2.0, float("nan")), (3.0, 4.0)]}, title="t", x="x", y="y")
    assert "nan" not in gap
    flat = ElementTree.fromstring(charts.lines({"<a>": [(1.0, 0.0)], "b": [(1.0, 0.0)]}, title="<t>", x="x", y="y"))
    assert "<a>" in "".join(flat.itertext())
    dash = charts.bars({"g": {"a": None, "b": 150.0}}, title="t", note="n")
    assert "–" in dash
    assert max(float(width) for width in re.findall(r'width="([\d.]+)"', dash)) <= charts.WIDTH
