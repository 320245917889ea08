"""The range of the loss axis: what separates the runs stays readable, whatever a spike or a first step reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

FIRST_SHARE = 0.1  # of a curve: its steep start
MAX_START = 4  # times the range of the rest: a curve that starts or jumps higher is cut off above


def visible_range(curves: list[np.ndarray]) -> tuple[float, float, float]:
    """(lowest, top, highest): the y range that must be visible, and the highest value, which may be above `top`.

    curves  smoothed losses of each run, all finite
    The level that a run holds for more than a tenth of its time is visible, and so is its start unless it would take
    most of the picture.
    """
    import numpy as np

    lowest = min(float(values.min()) for values in curves)
    highest = max(float(values.max()) for values in curves)
    bodies = [values[int(len(values) * FIRST_SHARE) :] for values in curves]
    level = max(float(np.quantile(values, 0.9)) for values in bodies)
    room = max(level - lowest, 1e-9)
    if highest <= lowest + MAX_START * room or len(max(curves, key=len)) < 4:
        return lowest, highest, highest
    return lowest, level + room, highest
