"""Charts as inline SVG, drawn by hand: a page with them needs no script, no font and no file beside it.

Colours are CSS classes (`s0`, grey, to `s5`), so that the page's style sets them for light and dark. A chart is drawn 360
units wide, about as many as a telephone has pixels, and text stays readable where several stand side by side.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 360.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 10.0, 10.0, 36.0
COLOURS = 6
POINTS = 240
"""Of a line: more would not show."""

Points = Sequence[tuple[float, float]]


def lines(series: Mapping[str, Points], *, title: str, x: str, y: str, top: float | None = None) -> str:
    """A figure of lines over numbered steps, from 0 upwards.

    Args:
        series: name -> points in the order of x, at least one of them; not finite ones are left out.
        title: of the figure; also what a screen reader says.
        x, y: names of the axes.
        top: upper end of y; from the data by default.
    """
    drawn = {name: _thinned([point for point in points if math.isfinite(point[1])]) for name, points in series.items()}
    every = [point for points in drawn.values() for point in points]
    low, high = (f(at for at, _ in every) for f in (min, max))
    ticks = _ticks(top or max(value for _, value in every) or 1.0)

    def place(at: float, value: float) -> tuple[float, float]:
        across = 0.5 if high == low else (at - low) / (high - low)
        right, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return round(LEFT + across * right, 1), round(TOP + (1 - value / ticks[-1]) * up, 1)

    parts = [_grid(tick, place(low, tick)[1]) for tick in ticks]
    for at in sorted({low, high} if high - low < 4 else {low, float(round((low + high) / 2)), high}):
        parts.append(
            f'<text class="tick" text-anchor="middle" x="{place(at, 0.0)[0]}" y="{HEIGHT - 20}">{_short(at)}</text>'
        )
    for number, (name, points) in enumerate(drawn.items()):
        colour = f"s{1 + number % (COLOURS - 1)}"
        spots = [(*place(*point), point) for point in points]
        path = " ".join(f"{across},{up}" for across, up, _ in spots)
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        if len(spots) <= 40:
            parts += [
                f'<circle class="dot {colour}" cx="{across}" cy="{up}" r="2.6"><title>'
                f"{escape(f'{name}, {x} {_short(at)}: {_short(value)}')}</title></circle>"
                for across, up, (at, value) in spots
            ]
    parts.append(f'<text class="axis" text-anchor="middle" x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 4}">{escape(x)}</text>')
    legend = "" if len(series) == 1 else _legend({name: f"s{1 + i % (COLOURS - 1)}" for i, name in enumerate(series)})
    return _figure(title, y, HEIGHT, "".join(parts), legend)


def bars(rows: Mapping[str, Mapping[str, float | None]], *, title: str, note: str, top: float = 100.0) -> str:
    """A figure of horizontal bars in groups, 0 to `top`; None shows as a dash.

    Args:
        rows: name of a group -> name of a bar -> its value.
        note: what the bars show.
    """
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    step, gap, left = 15.0, 12.0, 104.0
    height, parts, at = len(rows) * (len(names) * step + gap) + 8, [], 4.0
    for group, row in rows.items():
        middle = at + len(names) * step / 2 + 4
        parts.append(f'<text class="tick" text-anchor="end" x="{left - 8}" y="{middle}">{escape(group)}</text>')
        for number, name in enumerate(names):
            value, up = row.get(name), at + number * step
            long = 0.0 if value is None else max(0.0, min(1.0, value / top)) * (WIDTH - left - 46)
            shown = "–" if value is None else f"{value:.1f}"
            parts.append(
                f'<rect class="bar s{number % COLOURS}" x="{left}" y="{up}" width="{long:.1f}" height="{step - 3}" rx="2">'
                f"<title>{escape(f'{group}, {name}: {shown}')}</title></rect>"
                f'<text class="tick" x="{left + long + 5:.1f}" y="{up + step - 5}">{shown}</text>'
            )
        at += len(names) * step + gap
    return _figure(title, note, height, "".join(parts), _legend({name: f"s{i % COLOURS}" for i, name in enumerate(names)}))


def _figure(title: str, note: str, height: float, inside: str, legend: str) -> str:
    return (
        f'<figure><figcaption><b>{escape(title)}</b><span class="note">{escape(note)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}">{inside}</svg>{legend}</figure>'
    )


def _legend(colours: Mapping[str, str]) -> str:
    keys = [f'<span><i class="key {colour}"></i>{escape(name)}</span>' for name, colour in colours.items()]
    return f'<p class="legend">{"".join(keys)}</p>'


def _grid(value: float, up: float) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up}" y2="{up}"/>'
        f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{up + 4}">{_short(value)}</text>'
    )


def _ticks(top: float) -> list[float]:
    """0 and a few round numbers above it, the last at least `top`."""
    rough = top / 4
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(top / step - 1e-9) + 1)]


def _short(value: float) -> str:
    return f"{value:.4g}"


def _thinned(points: Points) -> list[tuple[float, float]]:
    """At most `POINTS` of the points, the first and the last among them."""
    if len(points) <= POINTS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]
