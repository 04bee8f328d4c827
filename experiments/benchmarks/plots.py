"""Pictures that say what they show."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"values": "#4477aa", "keys": "#ee6677", "solve": "#228833", "other": "#bbbbbb"}


@contextlib.contextmanager
def figure(path: Path, title: str, *, columns: int = 1) -> Iterator[list[Any]]:
    """Axes side by side, written to `path` in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, axes = pyplot.subplots(1, columns, figsize=(max(6.0, 3.6 * columns), 4.6), squeeze=False, layout="constrained")
    made.suptitle(title)
    try:
        yield list(axes[0])
        made.savefig(path, dpi=120)
    finally:
        pyplot.close(made)


def stacked(axes: Any, bars: Mapping[str, Mapping[str, float]]) -> None:
    """A bar of parts for each name, with its total above it."""
    tallest = max(sum(parts.values()) for parts in bars.values())
    for place, parts in enumerate(bars.values()):
        bottom = 0.0
        for part, size in parts.items():
            axes.bar(place, size, bottom=bottom, color=COLOURS.get(part), label=part if place == 0 else None)
            bottom += size
        axes.annotate(f"{bottom:.3g}", (place, bottom), ha="center", va="bottom")
    axes.set_xticks(range(len(bars)), list(bars))
    axes.legend(fontsize="small")
    axes.set_ylim(0, 1.1 * tallest)


def lines(axes: Any, x: Sequence[float], series: Mapping[str, Sequence[float]], *, x_label: str, y_label: str) -> None:
    """A line with points for each name, from zero up."""
    for name, y in series.items():
        axes.plot(x, y, marker="o", markersize=3, label=name)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def bars(axes: Any, shares: Mapping[str, float], *, title: str) -> None:
    """A lying bar for each share, the first on top."""
    names = list(shares)[::-1]
    drawn = axes.barh(names, [100 * shares[name] for name in names], color=COLOURS["values"])
    axes.bar_label(drawn, fmt="%.1f", fontsize="small")
    axes.set_title(title)
    axes.set_xlabel("% of the time")
    axes.margins(x=0.25)
