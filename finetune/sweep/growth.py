"""A sweep under the name of an earlier one: the runs they share keep their names, and new values add runs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune.errors import UserError
from finetune.settings import Settings
from finetune.sweep.grid import OWN_FILES, Point, free_name


def with_earlier_names(points: Sequence[Point], records: Sequence[dict[str, Any]]) -> list[Point] | None:
    """The points, in their order, those of the earlier sweep under the names they have in its sweep.json (`records`).

    A run is the same if all its flags are, defaults included. None where a run of the earlier sweep is absent.
    """
    names = {_key(record["flags"]): str(record["name"]) for record in records}
    keys = [_key(point.flags) for point in points]
    if not names.keys() <= set(keys):
        return None
    taken = {*OWN_FILES, *(name.lower() for name in names.values())}
    return [
        replace(point, name=names[key] if key in names else free_name(point.name, taken))
        for point, key in zip(points, keys, strict=True)
    ]


def _key(flags: dict[str, Any]) -> str:
    with contextlib.suppress(TypeError, UserError):  # another version wrote them: no run of today is the same
        flags = Settings(**flags).run_flags()
    return json.dumps(flags, sort_keys=True)
