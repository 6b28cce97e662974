"""Plots as inline SVG: plain strings, colours by CSS class, so that one picture serves a light page and a dark one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

import msgspec

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 12, 34
_NUM_TICKS = 5
_STRIP_HEIGHT = 100
_NOTE_LETTER = 6
"""How wide a letter of a note is, about."""
_MINUTES_FROM_S = 600
_TIME_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14_400, 28_800)

Points = Sequence[tuple[float, float]]


class Scale(msgspec.Struct, frozen=True):
    """From values to a place between 0 and 1. step: between ticks; None: a round one."""

    low: float
    high: float
    logarithmic: bool = False
    step: float | None = None

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, self.low))
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self) -> list[float]:
        if self.logarithmic:
            return _log_ticks(self.low, self.high)
        step = self.step or _round_step((self.high - self.low) / _NUM_TICKS)
        return [round(self.low + step * at, 9) for at in range(int(round((self.high - self.low) / step, 6)) + 1)]


class Mark(msgspec.Struct, frozen=True):
    """A labelled vertical line."""

    at: float
    text: str


def linear(high: float) -> Scale:
    """From 0 to a round number above."""
    if high <= 0:
        return Scale(0.0, 1.0)
    step = _round_step(high / _NUM_TICKS)
    return Scale(0.0, step * math.ceil(round(high / step, 9)))


def logarithmic(low: float, high: float) -> Scale:
    """Of positive values, at least a factor of ten wide."""
    low, high = low * 0.9, high * 1.1
    middle = math.sqrt(low * high)
    return Scale(min(low, middle / 3.2), max(high, middle * 3.2), logarithmic=True)


class Plot:
    """Axes, and what is drawn between them. x_label, y_label: text of a tick."""

    def __init__(
        self, x: Scale, y: Scale, x_label: Callable[[float], str], y_label: Callable[[float], str], x_title: str = ""
    ) -> None:
        self._x, self._y = x, y
        self._parts = list(_axes(x, y, x_label, y_label, x_title))

    def line(self, points: Points, style: str) -> None:
        if points:
            self._parts.append(f'<path class="line {style}" d="{self._path(points)}"/>')

    def area(self, lower: Points, upper: Points, style: str, title: str = "") -> None:
        """Between two lines over the same places."""
        if upper:
            path = self._path([*upper, *reversed(lower)])
            self._parts.append(f'<path class="area {style}" d="{path}Z">{_title(title)}</path>')

    def bars(self, bottoms: Sequence[float], points: Points, width: float, style: str) -> None:
        """Standing on `bottoms`, `width` wide in values of x, one path for all."""
        path = []
        for bottom, (x, height) in zip(bottoms, points, strict=True):
            if height > 0:
                left, right = self._at_x(x) + 0.3, max(self._at_x(x) + 0.8, self._at_x(x + width) - 0.3)
                top, low = self._at_y(bottom + height), self._at_y(bottom)
                path.append(f"M{left:.1f} {low:.1f}V{top:.1f}H{right:.1f}V{low:.1f}Z")
        self._parts.append(f'<path class="area {style}" d="{"".join(path)}"/>')

    def mark(self, mark: Mark, style: str) -> None:
        at = self._at_x(mark.at)
        self._parts.append(f'<path class="mark {style}" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        self._note(at, HEIGHT - BOTTOM - 8, mark.text)

    def dot(self, x: float, y: float, text: str, style: str) -> None:
        at_x, at_y = self._at_x(x), self._at_y(y)
        self._parts.append(f'<circle class="dot {style}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="3"/>')
        self._note(at_x, at_y + 13, text)

    def render(self, description: str) -> str:
        inside = "".join(self._parts)
        return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">{inside}</svg>'

    def _note(self, x: float, y: float, text: str) -> None:
        """To the right of x where there is room, else to the left."""
        fits = x + 6 + len(text) * _NOTE_LETTER <= WIDTH
        anchor, at = ("start", x + 6) if fits else ("end", x - 6)
        self._parts.append(f'<text class="note" x="{at:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def _at_x(self, value: float) -> float:
        return LEFT + self._x(value) * (WIDTH - LEFT - RIGHT)

    def _at_y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self._y(value) * (HEIGHT - TOP - BOTTOM)

    def _path(self, points: Points) -> str:
        return "M" + "L".join(f"{self._at_x(x):.1f} {self._at_y(y):.1f}" for x, y in points)


def strip(values: Sequence[float], high: float, style: str, title: str) -> str:
    """A small filled curve of even steps, as wide as its place; no text, so it may be stretched."""
    number = max(1, len(values))
    heights = [_STRIP_HEIGHT * (1 - min(1.0, value / high if high else 0.0)) for value in values]
    steps = "".join(f"V{_short(height)}H{at + 1}" for at, height in enumerate(heights))
    return (
        f'<svg class="strip" viewBox="0 0 {number} {_STRIP_HEIGHT}" preserveAspectRatio="none">{_title(title)}'
        f'<path class="area {style}" d="M0 {_STRIP_HEIGHT}{steps}V{_STRIP_HEIGHT}Z"/></svg>'
    )


def time_label(span_s: float) -> tuple[Callable[[float], str], str]:
    """How to write seconds on an axis of that length, and the name of the axis."""
    if span_s < _MINUTES_FROM_S:
        return (lambda seconds: f"{seconds:g}"), "seconds"
    return (lambda seconds: f"{seconds / 60:g}"), "minutes"


def time_scale(span_s: float) -> Scale:
    """All of the span and no more."""
    return Scale(0.0, max(1.0, span_s), step=next((step for step in _TIME_STEPS if span_s / step <= 8), 86_400))


def duration_label(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:g} s"
    return f"{milliseconds:g} ms"


def percent_label(value: float) -> str:
    return f"{100 * value:g} %"


# ------------------------------------------------------------ axes


def _axes(
    x: Scale, y: Scale, x_label: Callable[[float], str], y_label: Callable[[float], str], x_title: str
) -> Iterator[str]:
    bottom = HEIGHT - BOTTOM
    for tick in y.ticks():
        at = bottom - y(tick) * (bottom - TOP)
        yield f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{escape(y_label(tick))}</text>'
    for tick in x.ticks():
        at = LEFT + x(tick) * (WIDTH - LEFT - RIGHT)
        yield f'<path class="grid" d="M{at:.1f} {TOP}V{bottom}"/>'
        yield f'<text class="tick" x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{escape(x_label(tick))}</text>'
    yield f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'
    if x_title:
        middle = (LEFT + WIDTH - RIGHT) / 2
        yield f'<text class="tick" x="{middle:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_title)}</text>'


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) > 3 else (1, 3) if math.log10(high / low) > 1.5 else (1, 2, 5)
    ticks = [round(factor * 10.0**power, 9) for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _title(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def _short(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
