"""Self-contained HTML pages: the template engine, the style that all pages share, and line charts drawn as SVG.

Comes in: values. Goes out: text for a page, and charts as numbers that `chart.html.j2` draws. Pages need nothing from elsewhere; what
comes in is escaped. Does not know: any stage.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, MissingPackageError

WIDTH, HEIGHT = 720.0, 220.0
"""Of a chart's box, without its labels."""
_POINTS = 400
"""Of a line, at most: longer series are drawn as the means of equal stretches."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """x and y, x ascending; what is not finite is left out."""
    color: int = 0
    """Number of its colour, from 0."""
    dots: bool = False
    """Mark each point."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series, placed."""

    name: str
    color: int
    points: str
    """Of an SVG polyline, in a box of WIDTH and HEIGHT."""
    dots: list[tuple[float, float, str]]
    """Places, and what they say when pointed at."""
    last: str
    """Its last value."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Lines, and what the axes say."""

    title: str
    lines: list[Line]
    levels: list[tuple[float, str]]
    """Heights of the lines across, and their labels."""
    marks: list[tuple[float, str]]
    """Places along the bottom, and their labels."""


def require_page(setting: str, path: Path | None) -> None:
    """Raise ConfigError where a page is to be written over what is named as no page."""
    if path is not None and path.suffix not in (".html", ".htm"):
        raise ConfigError(f"{setting}={path} is written as a page; give it a name that ends in .html.")


def render_page(folder: Path, template: str, content: dict[str, Any], *, extra: str) -> str:
    """Fill a template of `folder`, which may include what stands beside this file. extra: the one that installs the template engine."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingPackageError("jinja2", extra=extra, purpose="a report") from error
    loader = jinja2.FileSystemLoader([folder, Path(__file__).parent])
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(**content)


def line_chart(title: str, series: Sequence[Series]) -> Chart | None:
    """Place series in one box; None where none has a point."""
    kept = [(one, [(x, y) for x, y in one.points if math.isfinite(y)]) for one in series]
    kept = [(one, _thinned(points)) for one, points in kept if points]
    if not kept:
        return None
    xs, ys = ([point[axis] for _, points in kept for point in points] for axis in (0, 1))
    left, right = min(xs), max(max(xs), min(xs) + 1)
    steps = ticks(min(ys), max(ys))
    bottom, top = steps[0], steps[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return WIDTH * (x - left) / (right - left), HEIGHT * (1 - (y - bottom) / (top - bottom))

    lines = []
    for one, points in kept:
        places = [place(x, y) for x, y in points]
        dots = [(*at, f"{x:,.0f}: {_value(y)}") for at, (x, y) in zip(places, points, strict=True)] if one.dots or len(points) == 1 else []
        polyline = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(Line(name=one.name, color=one.color, points=polyline, dots=dots, last=_value(points[-1][1])))
    return Chart(
        title=title,
        lines=lines,
        levels=[(place(left, step)[1], label(step, steps)) for step in steps],
        marks=[(place(step, bottom)[0], f"{step:,.0f}") for step in ticks(left, right) if left <= step <= right and step == round(step)],
    )


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers, evenly spaced, from one at most `low` to one at least `high`."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / count)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def label(value: float, steps: Sequence[float]) -> str:
    """Return a tick with as many digits as tell it from its neighbours."""
    step = steps[1] - steps[0]
    largest = max(map(abs, steps))
    if largest < 1e-3 or largest >= 1e7:
        return f"{value:.2g}"
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (0 if f"{step:e}"[2] == "0" else 1))
    return f"{value:,.{digits}f}"


def _value(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _POINTS:
        return list(points)
    bounds = [round(number * len(points) / _POINTS) for number in range(_POINTS + 1)]
    stretches = [points[start:stop] for start, stop in itertools.pairwise(bounds)]
    return [(stretch[-1][0], math.fsum(y for _, y in stretch) / len(stretch)) for stretch in stretches]
