"""Line charts as geometry in the units of an SVG view box; `pieces.html.j2` draws them, `page.js` reads them out.

N logged points of a series, K points drawn.
"""

import json
import math
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from vlp.report import words

LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 24.0  # margins around the plot
MAX_POINTS = 400  # drawn; more cannot be told apart on a screen
SMOOTHING_SHARE = 0.03  # time constant of the smoothing, as a share of the points
SMOOTHED_FROM = 30  # points; fewer are drawn as they are


class Tick(NamedTuple):
    """A mark on an axis."""

    at: float
    label: str


class Look(NamedTuple):
    """What is the same for many charts."""

    size: tuple[float, float]
    note: str = ""  # what good looks like, in a few words
    group: str = ""  # what the chart belongs to
    unit: str = ""
    from_zero: bool = False
    smoothed: bool = True


class Chart(NamedTuple):
    """One chart, ready to draw."""

    title: str
    look: Look
    last: str  # newest value, written out
    alt: str
    line: str  # SVG path, smoothed
    raw: str  # SVG path behind it; "" without smoothing
    area: str  # SVG path under the line
    dots: list[tuple[float, float]]
    chance: float | None  # height of the chance line
    chance_label: Tick | None
    broken: list[float]  # where values were not finite
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    data: str  # JSON for the read-out


def smooth(values: np.ndarray, points: float) -> np.ndarray:
    """Mean of `values` [N] with weights exp(-distance / points) to both sides, so that the line does not lag behind."""
    decay = math.exp(-1 / points)

    def both_sides(x: np.ndarray) -> np.ndarray:
        left = list(accumulate(x.tolist(), lambda total, value: decay * total + value))
        right = list(accumulate(x[::-1].tolist(), lambda total, value: decay * total + value))
        return np.array(left) + np.array(right)[::-1] - x

    return both_sides(values) / both_sides(np.ones_like(values))


def thin(steps: np.ndarray, values: np.ndarray, limit: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce [N] points to about `limit`: the smallest and largest of each stretch, so that no spike is lost."""
    if len(steps) <= limit:
        return steps, values
    keep: set[int] = {0, len(steps) - 1}
    for stretch in np.array_split(np.arange(len(steps)), limit // 2):
        keep |= {int(stretch[values[stretch].argmin()]), int(stretch[values[stretch].argmax()])}
    chosen = np.array(sorted(keep))
    return steps[chosen], values[chosen]


def nice_ticks(low: float, high: float, wanted: int) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten) inside [low, high], about `wanted` of them."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    power = 10 ** math.floor(math.log10(span / wanted))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= wanted * 1.3)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def y_range(values: np.ndarray, line: np.ndarray, extra: list[float], from_zero: bool) -> tuple[float, float]:
    """Return the shown range: all of the line and of `extra`, and the raw values [N] without their rarest spikes."""
    shown = np.concatenate([np.quantile(values, [0.005, 0.995]), [line.min(), line.max()], extra])
    low, high = float(shown.min()), float(shown.max())
    if from_zero and low >= 0:
        low = 0.0
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin


class Frame(NamedTuple):
    """Where a value lands in the view box."""

    width: float
    height: float
    steps: tuple[float, float]  # shown
    values: tuple[float, float]  # shown

    def x(self, step: np.ndarray | float) -> np.ndarray:
        """Map steps to horizontal positions; a single step lands in the middle."""
        first, last = self.steps
        at = (np.asarray(step) - first) / (last - first) if last > first else np.full(np.shape(step), 0.5)
        return LEFT + (self.width - LEFT - RIGHT) * at

    def y(self, value: np.ndarray | float) -> np.ndarray:
        """Map values to heights, larger values further up."""
        low, high = self.values
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * (np.asarray(value) - low) / (high - low)

    def path(self, steps: np.ndarray, values: np.ndarray) -> str:
        """Return the SVG path through the points [K]; spikes out of the range end at its edge."""
        inside = np.clip(values, *self.values)
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(self.x(steps), self.y(inside), strict=True))


def chart(
    title: str, *, steps: np.ndarray, values: np.ndarray, look: Look, chance: float | None = None
) -> Chart | None:
    """Return the chart of `values` [N] over `steps` [N], or None without a finite value; NaN means not logged."""
    finite = np.isfinite(values)
    if not finite.any():
        return None
    logged = steps[~np.isnan(values)]
    broken = steps[np.isinf(values)]
    steps, values = steps[finite], values[finite]
    smoothed = look.smoothed and len(values) > SMOOTHED_FROM
    line = smooth(values, SMOOTHING_SHARE * len(values)) if smoothed else values
    shown = y_range(values, line, [] if chance is None else [chance], look.from_zero)
    frame = Frame(*look.size, (float(logged[0]), float(logged[-1])), shown)
    drawn = frame.path(*thin(steps, line))
    ends = frame.x(steps[[0, -1]])
    return Chart(
        title=title,
        look=look,
        last=words.measure(float(line[-1]), look.unit),
        alt=_describe(title, look.unit, steps, line, chance),
        line=drawn,
        raw=frame.path(*thin(steps, values)) if smoothed else "",
        area=f"{drawn}L{ends[1]:.1f} {frame.height - BOTTOM}L{ends[0]:.1f} {frame.height - BOTTOM}Z",
        dots=[] if len(steps) > 12 else list(zip(frame.x(steps).tolist(), frame.y(values).tolist(), strict=True)),
        chance=None if chance is None else float(frame.y(chance)),
        chance_label=None if chance is None else _chance_label(frame, chance, float(line[-1]), look.unit),
        broken=frame.x(broken).tolist(),
        x_ticks=[Tick(float(frame.x(at)), words.short(at)) for at in nice_ticks(*frame.steps, 5)],
        y_ticks=[Tick(float(frame.y(at)), words.plain(at)) for at in nice_ticks(*frame.values, 4)],
        data=_read_out(frame, steps, values, line, look.unit),
    )


def _chance_label(frame: Frame, chance: float, last: float, unit: str) -> Tick:
    """Return the words beside the chance line, on the side away from the curve where there is room."""
    at = float(frame.y(chance))
    below = last >= chance and at < frame.height - BOTTOM - 16
    return Tick(at + 13 if below else at - 5, f"chance {words.measure(chance, unit)}")


def _read_out(frame: Frame, steps: np.ndarray, values: np.ndarray, line: np.ndarray, unit: str) -> str:
    """Return JSON with a position and a sentence for up to MAX_POINTS points."""
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), MAX_POINTS)).round().astype(int))
    labels = []
    for index in chosen:
        label = words.measure(float(line[index]), unit)
        labels.append(label if line is values else f"{label} (raw {words.measure(float(values[index]), unit)})")
    columns = {
        "steps": steps[chosen].tolist(),
        "x": frame.x(steps[chosen]).round(1).tolist(),
        "y": frame.y(line[chosen]).round(1).tolist(),
        "labels": labels,
    }
    return json.dumps(columns, separators=(",", ":"))


def _describe(title: str, unit: str, steps: np.ndarray, line: np.ndarray, chance: float | None) -> str:
    """Return the chart in one sentence, for readers who cannot see it."""
    start, end = words.measure(float(line[0]), unit), words.measure(float(line[-1]), unit)
    compared = "" if chance is None else f", against {words.measure(chance, unit)} by chance"
    return f"{title}: {start} at step {steps[0]}, {end} at step {steps[-1]}{compared}."
