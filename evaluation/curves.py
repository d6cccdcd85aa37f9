"""The curves of a run, from its metrics.csv, as SVG by hand: it follows the page's colours in light and dark, needs no
library of 30 MB and no second to import it, and a test holds it to the numbers.
"""

import math
from html import escape
from pathlib import Path

import numpy as np

from training.folder import METRICS, read_rows

MOST_POINTS = 300  # of a curve
FEW_POINTS = 60  # so many are marked, and tell their value
LEFT, RIGHT, TOP, BOTTOM = 44, 344, 10, 182  # of the axes, in a drawing of 356 x 216
Points = list[tuple[float, float]]


class Metrics:
    """metrics.csv over the epochs. history: (epoch, validation loss, its standard error), that before training first.

    Attributes: epoch: whole ones done. validation: Points. band: [(epoch, low, high)], a standard error around it.
    """

    def __init__(self, output: Path, history=()):
        self.rows = read_rows(output)
        self.steps_per_epoch = max((int(row[1]) for row in self.rows if row[0] == "1"), default=1)
        self.epoch = int(self.rows[-1][1]) // self.steps_per_epoch if self.rows else 0
        known = [(epoch, loss, error or 0) for epoch, loss, error in history if loss is not None]
        self.validation = [(epoch, loss) for epoch, loss, _ in known] or self.points("val_loss")
        self.band = [(epoch, loss - error, loss + error) for epoch, loss, error in known]

    def points(self, name: str) -> Points:
        """A column, in epochs; without what is no number."""
        found = []
        for row in self.rows:
            try:
                value = float(row[METRICS.index(name)])
            except ValueError:
                continue
            if math.isfinite(value):
                found.append((int(row[1]) / self.steps_per_epoch, value))
        return found

    def smooth(self, name: str) -> Points:
        """The mean of a column's last epoch of steps, at each step."""
        points, steps = self.points(name), self.steps_per_epoch
        sums = np.cumsum([0, *(value for _, value in points)])
        starts = [max(0, end - steps) for end in range(1, len(sums))]
        means = [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
        return [(epoch, mean) for (epoch, _), mean in zip(points, means, strict=True)]


def _ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers in [low, high]."""
    power = 10 ** math.floor(math.log10((high - low) / 2))
    step = power * next(times for times in (5, 2, 1) if times * power <= (high - low) / 2)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _path(places: Points) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def chart(title: str, lines: dict[str, Points], band=(), faint: Points = ()) -> str:
    """Named lines on one pair of axes, in epochs; "" without a point.

    band: [(epoch, low, high)] around the first; faint: what it is the mean of.
    """
    lines = {name: points for name, points in lines.items() if points}
    every = [point for points in lines.values() for point in points] + list(faint)
    if not every:
        return ""
    values = [value for _, value in every] + [end for _, *ends in band for end in ends]
    margin = 0.06 * (max(values) - min(values)) or abs(values[0]) / 2 or 1
    low, high, last = min(values) - margin, max(values) + margin, max(1, *(epoch for epoch, _ in every))

    def place(epoch: float, value: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * epoch / last, BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    parts = [f'<text x="{RIGHT}" y="212" text-anchor="end">epochs</text>']
    for value in _ticks(low, high):
        _, y = place(0, value)
        parts.append(f'<path class="axis" d="M{LEFT} {y:.1f}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for epoch in (tick for tick in _ticks(0, last) if tick == int(tick)):
        parts.append(f'<text x="{place(epoch, 0)[0]:.1f}" y="198" text-anchor="middle">{epoch:g}</text>')
    if band:
        over, under = [place(x, high) for x, _, high in band], [place(x, low) for x, low, _ in band]
        parts.append(f'<path class="band" d="{_path(over + under[::-1])}Z"/>')
    drawn = [("faint", 0, faint)] if faint else []
    for kind, colour, points in drawn + [("line", number, points) for number, points in enumerate(lines.values())]:
        places = np.array([place(*point) for point in points])
        thinned = [part.mean(axis=0) for part in np.array_split(places, min(len(places), MOST_POINTS))]
        parts.append(f'<path class="{kind} c{colour % 6}" d="{_path(thinned)}"/>')
        for (x, y), (epoch, value) in zip(places, points, strict=True) if len(points) <= FEW_POINTS else ():
            tip = f"<title>epoch {epoch:.3g}: {value:.4g}</title>"
            parts.append(f'<circle class="{kind} c{colour % 6}" cx="{x:.1f}" cy="{y:.1f}" r="3">{tip}</circle>')
    names = [f'<span class="c{number % 6}"><i></i>{escape(name)}</span>' for number, name in enumerate(lines)]
    legend = f'<p class="soft legend">{"".join(names)}</p>' if len(names) > 1 else ""
    drawing = f'<svg viewBox="0 0 356 216" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f"<section><p>{escape(title)}</p>{drawing}{legend}</section>\n"
