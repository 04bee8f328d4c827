"""A session's evaluation as one HTML file that needs nothing beside it: no script, no font, no address.

Everything that a fact, a prompt or a file name says is escaped; numbers carry their full value in `<data value>`. The page
is well-formed XML as well, so that it can be read by a program.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any, NamedTuple

from kedit_jax.cli import charts
from kedit_jax.cli.measured import MEASURES, Measured
from kedit_jax.cli.text import plain
from kedit_jax.editing.drift import Drift
from kedit_jax.editing.session import EditSession, Event
from kedit_jax.evaluation import Said
from kedit_jax.verification import BatchScores, Check, Norms

EVENTS, FACTS, LISTED = 40, 100, 6
"""Shown of a session's steps, of facts that left, and of a step's facts; what is not shown is counted."""

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1c1e21; --soft: #5d6470; --line: #dcdfe4;
  --good: #00704f; --bad: #b3400d; --s0: #9aa1ac; --s1: #0069b4; --s2: #c65200; --s3: #00805e; --s4: #a8489a; --s5: #8a6d00 }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1d2026; --ink: #e8eaee; --soft: #a2a9b5;
  --line: #363b45; --good: #5cd6ae; --bad: #ff9d6b; --s0: #7f8896; --s1: #63b3f4; --s2: #ff9a57; --s3: #4fd0a5;
  --s4: #e291d6; --s5: #dcc04a } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
main { max-width: 1320px; margin: 0 auto; padding: 20px 16px 48px }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 4px }
h2 { font-size: 1.15rem; margin: 36px 0 8px }
p { max-width: 78ch; margin: 6px 0 }
.note, .lead { color: var(--soft) }
.note { font-size: .875rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 }
.tile, figure, .say, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 10px }
.tile { padding: 10px 14px }
.tile span { display: block; font-size: .875rem; color: var(--soft) }
.tile b { font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: 14px; margin: 14px 0 }
.pair { display: flex; flex-wrap: wrap; gap: 0 14px; align-items: flex-start }
.pair figure { flex: 1 1 330px; max-width: 560px; margin: 10px 0 }
figure { margin: 0; padding: 12px 14px }
figcaption b { display: block }
svg { display: block; width: 100%; height: auto; margin-top: 8px }
svg text { fill: var(--soft); font-size: 11.5px; font-variant-numeric: tabular-nums }
.grid { stroke: var(--line) }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round }
.dot, .bar { fill: currentColor }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; background: currentColor; margin-right: 6px }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: .875rem; margin: 6px 0 0 }
.s0 { color: var(--s0) } .s1 { color: var(--s1) } .s2 { color: var(--s2) } .s3 { color: var(--s3) }
.s4 { color: var(--s4) } .s5 { color: var(--s5) }
.scroll { overflow-x: auto; margin: 10px 0; width: max-content; max-width: 100% }
table { border-collapse: collapse; font-size: .9375rem }
th, td { padding: 6px 14px; text-align: left; vertical-align: top; unicode-bidi: isolate; overflow-wrap: normal }
th { font-weight: 600; color: var(--soft) }
tbody tr { border-top: 1px solid var(--line) }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums }
td.n { white-space: nowrap }
.words td { overflow-wrap: anywhere; min-width: 6ch }
.words td:last-child { min-width: 24ch }
time { white-space: nowrap }
.good { color: var(--good) } .bad { color: var(--bad) }
.says { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 12px; margin: 12px 0 }
.say { padding: 10px 14px }
.say p { margin: 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 12px; margin: 6px 0 0; font-size: .9375rem }
dt { color: var(--soft) } dd { margin: 0; unicode-bidi: isolate }
footer { margin-top: 40px; border-top: 1px solid var(--line); padding-top: 10px }
@media (max-width: 600px) { th, td { padding: 5px 9px } }
"""


class Spoken(NamedTuple):
    """A prompt with the object that it asks for, and how both models go on from it."""

    asked: tuple[str, str]
    before: Said
    after: Said


@dataclass(frozen=True)
class Course:
    """What a page shows of the session beside its measures.

    Attributes:
        checks: each layer's update against the one-time edit; empty where there are no facts.
        exact: whether the session promises to be that.
        norms: of each layer; empty where the steps cannot be taken again.
        drift: of each layer's keys; empty where none are recorded.
        spoken: a sample of what both models say by themselves.
        times: of the events, as stored; "" where not known.
    """

    equivalence: float | None
    checks: Sequence[Check]
    exact: bool
    batches: BatchScores
    norms: Mapping[int, Norms]
    drift: Mapping[int, Drift]
    spoken: Sequence[Spoken]
    times: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the page, ready for JSON."""
        return {
            "equivalence_error": self.equivalence,
            "promises_the_one_time_edit": self.exact,
            "checks": [check.to_dict() for check in self.checks],
            "batches": [
                {"facts": count, "met": float(met), "probability": float(probability)}
                for count, met, probability in zip(
                    self.batches.facts, self.batches.met, self.batches.probability, strict=True
                )
            ],
            "norms": {
                str(layer): {"update": found.update.tolist(), "step": found.step.tolist()}
                for layer, found in self.norms.items()
            },
            "drift": {str(layer): {"mean": d.mean, "largest": d.largest} for layer, d in self.drift.items()},
            "completions": [
                {"prompt": row.asked[0], "wanted": row.asked[1], "before": row.before.said, "after": row.after.said}
                for row in self.spoken
            ],
        }


def page(model: str, session: EditSession, rows: Mapping[str, Measured], course: Course, version: str) -> str:
    """The page of a session.

    Args:
        model: how the user named it.
        rows: the unedited model's measures and the edited one's, in this order.
        version: of the library.
    """
    settings, count = session.settings, len(session.facts)
    title = f"{count} fact{'s' * (count != 1)} edited into {model}"
    lead = (
        f"{settings.editor}, history {settings.history}, {len(session.batches)} batches, layers "
        f"{', '.join(map(str, settings.layers))}; {session.base.config.family}, {session.base.config.n_layers} layers of "
        f"{session.base.config.d_model}; weights {session.moments.model[:12]}"
    )
    body = "".join(
        (
            f'<h1>{_text(title)}</h1><p class="lead">{_text(lead)}</p>',
            _tiles(rows, course),
            _measures(rows),
            _freely(rows),
            _abilities(rows),
            _over_steps(course),
            _equivalence(course),
            _history(session, course.times),
            _completions(course.spoken),
            f'<footer class="note">Written by kedit_jax {_text(version)}. Numbers are rounded on the page; each carries its '
            "full value in the source.</footer>",
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


def _tiles(rows: Mapping[str, Measured], course: Course) -> str:
    """What a reader wants to know first."""
    first, last = next(iter(rows)), list(rows)[-1]
    shown = ("score", "efficacy_accuracy", "generalization_accuracy", "specificity_accuracy", "perplexity")
    tiles = []
    for key in shown:
        now, before = (getattr(rows[name].evaluation, key) for name in (last, first))
        if now is not None:
            tiles.append((MEASURES[key][0], _value(now, f"tile {last} {key}"), f"unedited {_plain(before)}"))
    if course.equivalence is not None:
        tiles.append(("Distance from the one-time edit", _value(course.equivalence, "tile equivalence"), "relative"))
    made = [f'<div class="tile"><span>{_text(a)}</span><b>{b}</b><span>{_text(c)}</span></div>' for a, b, c in tiles]
    return f'<div class="tiles">{"".join(made)}</div>'


def _measures(rows: Mapping[str, Measured]) -> str:
    lines = []
    for key, (name, what) in MEASURES.items():
        values = [getattr(row.evaluation, key) for row in rows.values()]
        if any(value is not None for value in values):
            cells = [_value(value, f"{model} {key}") for model, value in zip(rows, values, strict=True)]
            lines.append([f'{_text(name)}<br/><span class="note">{_text(what)}</span>', *cells])
    names = ("efficacy", "generalization", "specificity", "same_subject", "retention")
    chart = charts.bars(
        {
            MEASURES[f"{name}_accuracy"][0].split(",")[0]: {
                model: getattr(row.evaluation, f"{name}_accuracy") for model, row in rows.items()
            }
            for name in names
        },
        title="Before and after",
        note="share of prompts on which every token of the right object is the likeliest, %",
    )
    return f'<h2>Measures</h2><div class="pair">{_table(["", *rows], lines, range(1, 1 + len(rows)))}{chart}</div>'


def _freely(rows: Mapping[str, Measured]) -> str:
    lines = []
    for part, key, name in (
        ("free", "efficacy", "Rewrite prompts, the new object alone"),
        ("free", "efficacy_begins", "Rewrite prompts, begins with it"),
        ("free", "generalization", "Paraphrases, the new object alone"),
        ("free", "generalization_begins", "Paraphrases, begins with it"),
        ("free", "specificity", "Neighbours, the true object alone"),
        ("free", "specificity_begins", "Neighbours, begins with it"),
        ("text", "fluency", "Fluency of sampled text"),
        ("text", "consistency", "Consistency with texts about the new object"),
    ):
        measured = {model: getattr(row, part) for model, row in rows.items()}
        values = {model: None if found is None else getattr(found, key) for model, found in measured.items()}
        if any(value is not None for value in values.values()):
            lines.append([_text(name), *(_value(value, f"{model} {part} {key}") for model, value in values.items())])
    if not lines:
        return ""
    counts = next(iter(rows.values()))
    n = counts.free.n if counts.free is not None else counts.text.n if counts.text is not None else 0
    note = (
        f"Of {n} records. Answers are decoded freely up to a natural stop, without being shown the right ones. Fluency is "
        "100 times the weighted entropy of word pairs and triples of sampled text, consistency 100 times its TF-IDF cosine "
        "with reference texts."
    )
    return f'<h2>Left to speak</h2><p class="note">{note}</p>' + _table(["", *rows], lines, range(1, 1 + len(rows)))


def _abilities(rows: Mapping[str, Measured]) -> str:
    names = list(dict.fromkeys(name for row in rows.values() for name in row.ability))
    if not names:
        return ""
    lines = []
    for name in names:
        chance = next(iter(rows.values())).ability[name]
        cells = [
            _value(getattr(row.ability[name], key), f"{model} ability {name} {key}")
            for key in ("f1", "accuracy")
            for model, row in rows.items()
        ]
        lines.append([_text(name), str(chance.n), *cells, _plain(chance.chance)])
    heads = ["task", "questions", *(f"{key}, {model}" for key in ("F1", "accuracy") for model in rows), "guessing"]
    note = "Multiple choice, zero-shot: weighted F1 and accuracy, %."
    return f'<h2>General ability</h2><p class="note">{note}</p>' + _table(heads, lines, range(1, len(heads)))


def _over_steps(course: Course) -> str:
    figures, batches = [], course.batches
    if len(batches.facts):
        figures.append(
            charts.lines(
                {"target's probability": _numbered(batches.probability), "met exactly": _numbered(batches.met)},
                title="What of each batch the model says now",
                x="batch that the fact came in",
                y="%, on rewrite prompts; what was forgotten shows at the left",
                top=100.0,
            )
        )
    for key, name in (("update", "All steps together"), ("step", "Each step alone")):
        series = {f"layer {layer}": _numbered(getattr(norms, key)) for layer, norms in course.norms.items()}
        if series:
            figures.append(
                charts.lines(series, title=name, x="batch", y="norm of the change, % of the original kernel's norm")
            )
    if not figures:
        return ""
    note = "" if course.norms else '<p class="note">This history does not keep what its earlier steps were made of.</p>'
    return f'<h2>Over the steps</h2>{note}<div class="figures">{"".join(figures)}</div>'


def _numbered(shares: Iterable[float]) -> list[tuple[float, float]]:
    """(1, first), (2, second) ..., in per cent."""
    return [(float(number), 100 * float(share)) for number, share in enumerate(shares, 1)]


def _equivalence(course: Course) -> str:
    if not course.checks:
        return ""
    promise = (
        "This session promises that its kernels are changed by what the one-time edit of all its facts changes them by. "
        "Without the last batch the distance would be the control."
        if course.exact
        else "This session was run as a baseline, which does not promise the one-time edit of its facts."
    )
    lines = []
    for check in course.checks:
        verdict = f'<span class="{"good" if check.holds else "bad"}">{"holds" if check.holds else "does not hold"}</span>'
        cells = [_value(number, f"{check.id} {key}") for key, number in
                 (("error", check.error), ("allowed", check.tolerance), ("control", check.control))]  # fmt: skip
        lines.append([_text(check.id), *cells, verdict])
    made = _table(["", "distance", "allowed", "control", ""], lines, range(1, 4))
    drift = ""
    if course.drift:
        rows = [
            [
                f"layer {layer}",
                _value(100 * d.mean, f"drift {layer} mean"),
                _value(100 * d.largest, f"drift {layer} max"),
            ]
            for layer, d in course.drift.items()
        ]
        drift = (
            '<p class="note">How far the keys of the facts have moved since they were recorded, % of a key: later edits of '
            "lower layers move those of upper ones, which no solve accounts for.</p>"
            + _table(["", "mean", "largest"], rows, range(1, 3))
        )
    return f'<h2>Sequence against one-time edit</h2><p class="note">{promise}</p>{made}{drift}'


def _history(session: EditSession, times: Sequence[str]) -> str:
    said = {str(fact.id): f"{fact.text} → {fact.target}" for fact in (*session.facts, *session.retired, *session.skipped)}
    for event in session.events:
        said = dict(zip(event.ids, (text.replace(" -> ", " → ") for text in event.texts), strict=False)) | said
    numbered = list(enumerate(zip(session.events, times, strict=True), 1))[::-1]
    lines = [
        [
            str(number),
            _text(_kind(event)),
            f"<time>{_text(time.replace('T', ' ')[:16])}</time>",
            str(len(event.ids)),
            *_left(event),
        ]
        for number, (event, time) in numbered[:EVENTS]
    ]
    conflicts = sum(len(event.replaced) + len(event.skipped) for event in session.events if event.kind != "replace")
    intro = (
        f"{len(session.events)} steps; {conflicts} facts were replaced or skipped because of conflicts, "
        f"{len(session.retired)} left and can be restored."
    )
    made = f'<h2>Conflicts, and what was taken back</h2><p class="note">{intro}{_more(len(numbered), EVENTS, "steps")}</p>'
    made += _table(["step", "what", "when (UTC)", "facts", "replaced", "skipped"], lines, (0, 3))
    gone = [("left", fact) for fact in session.retired] + [("skipped", fact) for fact in session.skipped]
    if gone:
        rows = [[_text(str(fact.id)), how, _text(f"{fact.text} → {fact.target}")] for how, fact in islice(gone, FACTS)]
        made += _table(["fact", "", "what it says"], rows, (), kind="words")
        made += f'<p class="note">{_more(len(gone), FACTS, "facts")}</p>' if len(gone) > FACTS else ""
    return made


def _kind(event: Event) -> str:
    return f"undo of step {event.undoes}" if event.kind == "undo" else event.kind


def _left(event: Event) -> list[str]:
    """What an event replaced and skipped, by name."""
    return [
        _text(", ".join(names[:LISTED])) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
        for names in (event.replaced, event.skipped)
    ]


def _completions(spoken: Sequence[Spoken]) -> str:
    if not spoken:
        return ""
    cards = []
    for (prompt, wanted), before, after in spoken:
        colour, mark = ("good", "✓") if after.exact else ("bad", "✗")
        cards.append(
            f'<div class="say"><p><b>{_text(prompt)}</b></p><dl><dt>before</dt><dd>{_text(before.said)}</dd>'
            f'<dt>after</dt><dd class="{colour}">{_text(after.said)} {mark}</dd>'
            f"<dt>asked for</dt><dd>{_text(wanted)}</dd></dl></div>"
        )
    return (
        '<h2>What the model says</h2><p class="note">A sample of its facts, on the prompt that was edited and on a '
        f'paraphrase where there is one.</p><div class="says">{"".join(cards)}</div>'
    )


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]], numbers: Iterable[int], kind: str = "") -> str:
    """A table that scrolls by itself where it is too wide. Cells are HTML, heads are text."""
    right = set(numbers)
    css = ['class="n"' if i in right else "" for i in range(99)]
    head = "".join(f"<th {css[i]}>{_text(name)}</th>" for i, name in enumerate(heads))
    body = "".join(f"<tr>{''.join(f'<td {css[i]}>{cell}</td>' for i, cell in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll {kind}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _value(value: float | None, name: str) -> str:
    """A number as it is read, with its full value and a name to find it by."""
    return "–" if value is None else f'<data value="{value!r}" data-name="{_text(name)}">{_plain(value)}</data>'


def _plain(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.1f}" if 0.05 <= abs(value) < 1e6 else f"{value:.1e}"


def _more(count: int, shown: int, what: str) -> str:
    return f" The last {shown} of {count} {what} are shown." if count > shown else ""


def _text(text: str) -> str:
    """Escaped; characters that no page may hold show as a replacement character."""
    return escape(plain(text))
