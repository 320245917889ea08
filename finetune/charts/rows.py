"""Logged numbers by column: what the charts need of a data frame, without the time that importing pandas takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


class Rows:
    """Float arrays of one length by name. NaN where nothing was logged."""

    def __init__(self, columns: Mapping[str, Iterable[float]]):
        import numpy as np

        self.columns = {
            name: values if isinstance(values, np.ndarray) else np.array(list(values), float)
            for name, values in columns.items()
        }

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def __setitem__(self, name: str, values: np.ndarray) -> None:
        self.columns[name] = values

    def take(self, index: np.ndarray) -> Rows:
        """The rows of a boolean mask or of indices."""
        return Rows({name: values[index] for name, values in self.columns.items()})

    def logged(self, name: str) -> np.ndarray:
        """The values of a column without those that were not logged."""
        values = self.columns[name]
        return values[values == values]

    def by_step(self) -> Rows:
        """One row for each step, in order; of a step that has several, every column's last logged value counts."""
        import numpy as np

        steps, groups = np.unique(self["step"], return_inverse=True)
        merged = {}
        for name, values in self.columns.items():
            merged[name] = np.full(len(steps), np.nan)
            known = values == values
            merged[name][groups[known]] = values[known]  # of equal indices the last assignment stays
        merged["step"] = steps
        return Rows(merged).take(steps == steps)
