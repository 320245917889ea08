"""All formats by name: those of formats/builtin, and those that other packages register."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

from formats import builtin
from formats.base import Format, FormatError

FORMATS: dict[str, Format] = {}
ENTRY_POINTS = "sandwich.formats"


def register(fmt: Format) -> None:
    """Make a format known to `get_format`, `--format NAME` and `--format auto`.

    Raises FormatError for a name that another format has.
    """
    if fmt.name == "auto" or FORMATS.get(fmt.name, fmt) != fmt:
        raise FormatError(f"cannot register format {fmt.name!r}: the name is taken; choose another one")
    FORMATS[fmt.name] = fmt


@cache
def load_entry_points() -> None:
    """Register the formats of installed packages. Raises FormatError when one cannot be loaded."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            fmt = entry.load()
        except Exception as error:  # whatever the import of another package raises
            raise FormatError(f"entry point {entry.name} = {entry.value}: {type(error).__name__}: {error}") from error
        if not isinstance(fmt, Format):
            raise FormatError(f"entry point {entry.name} = {entry.value} is not a formats.Format")
        register(fmt)


def _register_builtin() -> None:
    """Import every module of formats/builtin; FORMAT and the optional VARIANTS are what it offers."""
    for info in pkgutil.iter_modules(builtin.__path__):
        module = importlib.import_module(f"{builtin.__name__}.{info.name}")
        for fmt in (module.FORMAT, *getattr(module, "VARIANTS", ())):
            register(fmt)


_register_builtin()
