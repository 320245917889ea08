"""Settings of chat_lora.py from a config with a section `inference`."""

from __future__ import annotations

import argparse
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

from finetune.chat.questions import as_questions
from finetune.errors import UserError
from finetune.files import read_data
from finetune.flags.sections import has_sections, read_sections
from finetune.settings import settable_flags


def read_chat_config(path: str | Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Defaults for the parser's arguments, and "questions" as `read_questions` returns them.

    Raises UserError, naming file and entry, for an unknown entry or a wrong value, also in the sections for training.
    """
    where = f"config {path}"
    data = read_data("config", path)
    if not isinstance(data, dict) or not has_sections(data):
        raise UserError(f'{where} has no section for answers, such as {{"inference": {{"adapter_path": "…"}}}}')
    _, entries = read_sections(where, data, settable_flags())
    actions = {action.dest: action for action in parser._actions}
    values: dict[str, Any] = {}
    for name, (entry, value) in entries.items():
        if name == "questions":
            values[name] = as_questions(value, [], f"{where}, {entry}")
        elif name != "merged_model_path":
            action = actions[name]
            try:
                values[name] = (action.type or str)(str(value))
            except (ArgumentTypeError, ValueError) as error:
                raise UserError(f"{where}: {entry} {error}") from None
            if action.choices and values[name] not in action.choices:
                raise UserError(f"{where}: {entry} must be one of {', '.join(action.choices)}, not {value!r}")
    # A model that was merged before needs no adapter.
    merged = entries.get("merged_model_path", ("", ""))[1]
    if values.get("mode") == "merged" and isinstance(merged, str) and Path(merged).is_dir():
        values |= {"model": merged, "mode": "lora"}
    return values
