"""Groups of rows that belong together (a disjoint-set forest)."""

from __future__ import annotations


class Groups:
    """At first every row is a group of its own; a group is named by the smallest of its indices."""

    def __init__(self, count: int):
        self._parent = list(range(count))

    def find(self, row: int) -> int:
        """The name of a row's group."""
        while self._parent[row] != row:
            self._parent[row] = self._parent[self._parent[row]]
            row = self._parent[row]
        return row

    def join(self, a: int, b: int) -> None:
        """Make one group of those of two rows."""
        a, b = self.find(a), self.find(b)
        self._parent[max(a, b)] = min(a, b)

    def names(self) -> list[int]:
        """The name of every row's group."""
        return [self.find(row) for row in range(len(self._parent))]
