"""Helpers that several test modules use."""

from __future__ import annotations

import importlib
from typing import Any

# What pytest and its plugins look for in everything that a test module holds; no module has them.
ASKED_WHILE_COLLECTING = ("_mock_name", "is_hypothesis_test", "hypothesis", "pytestmark", "_pytestfixturefunction")
OF_MODULES = ("__dict__", "__name__", "__file__", "__path__", "__spec__", "__doc__", "__version__", "__package__")


class _LazyModule:
    """Every attribute, `__dict__` included (monkeypatch reads it), is that of the module.

    Except those that pytest asks for while it collects tests: they must not import the module.
    """

    def __init__(self, name: str):
        object.__setattr__(self, "_name", name)

    def __getattribute__(self, attribute: str) -> Any:
        if attribute == "__class__":
            return _LazyModule
        if attribute in ASKED_WHILE_COLLECTING or (attribute.startswith("__") and attribute not in OF_MODULES):
            raise AttributeError(attribute)
        return getattr(importlib.import_module(object.__getattribute__(self, "_name")), attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        setattr(importlib.import_module(object.__getattribute__(self, "_name")), attribute, value)

    def __delattr__(self, attribute: str) -> None:
        delattr(importlib.import_module(object.__getattribute__(self, "_name")), attribute)


def lazy(name: str) -> Any:
    """The module `name`, imported at its first use: tests are collected without importing torch."""
    return _LazyModule(name)
