"""Rates over time as the points of a line chart: when requests were finished -> tokens a second.

Time in which nothing was finished for long, while the run was stopped, say, is cut out. Does not know: pages, files.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 200
"""Of the drawing, without its labels."""
_POINTS = 80
_PAUSE = 120
"""Seconds without a finished request that are cut out."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A line, and what its axes say."""

    line: str
    """Points of an SVG polyline, in a box of WIDTH and HEIGHT."""
    area: str
    """The same, closed along the bottom."""
    levels: list[tuple[float, str]]
    """Heights of the lines across, and their labels."""
    times: list[tuple[float, str]]
    """Places along the bottom, and their labels."""
    mean: float
    """Tokens a second."""
    requests_per_second: float
    seconds: int
    """Of work."""
    pauses: int
    """That were cut out."""
    interval: int
    """Seconds that a point stands for."""


def chart(answers: Mapping[int, tuple[int, int]]) -> Chart:
    """Return the rate of generated tokens over the time of work. answers: requests and tokens finished in each second; not empty."""
    places, pauses = _working_time(sorted(answers))
    seconds = max(places.values()) + 1
    interval = max(math.ceil(seconds / _POINTS), 1)
    count = math.ceil(seconds / interval)
    tokens = [0.0] * count
    for second, (_, generated) in answers.items():
        tokens[places[second] // interval] += generated
    lengths = [min(interval, seconds - start * interval) for start in range(count)]
    rates = [amount / length for amount, length in zip(tokens, lengths, strict=True)]
    top = round_up(max(rates)) if max(rates) else 1.0
    points = [(WIDTH * (number + 0.5) / count, HEIGHT * (1 - rate / top)) for number, rate in enumerate(rates)]
    points = [(0.0, points[0][1]), *points, (float(WIDTH), points[-1][1])]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Chart(
        line=line,
        area=f"0,{HEIGHT} {line} {WIDTH},{HEIGHT}",
        levels=[(HEIGHT * (1 - part / 4), f"{top * part / 4:,.0f}" if top >= 4 else f"{top * part / 4:.2g}") for part in range(5)],
        times=[(WIDTH * part / 4, _clock(seconds * part / 4)) for part in range(5)],
        mean=sum(generated for _, generated in answers.values()) / seconds,
        requests_per_second=sum(requests for requests, _ in answers.values()) / seconds,
        seconds=seconds,
        pauses=pauses,
        interval=interval,
    )


def round_up(value: float) -> float:
    """Return the next number above that is 1, 2, 4 or 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 4, 8, 10) if factor * power >= value)


def _working_time(seconds: list[int]) -> tuple[dict[int, int], int]:
    """Return the place of each second in the time of work, from 0, and the number of pauses cut out."""
    places, shift, pauses = {seconds[0]: 0}, seconds[0], 0
    for before, second in itertools.pairwise(seconds):
        if second - before > _PAUSE:
            shift += second - before - 1
            pauses += 1
        places[second] = second - shift
    return places, pauses


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
