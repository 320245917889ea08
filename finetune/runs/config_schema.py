"""What experiment_config.json must hold for the commands that open a run; others may have written or edited it."""

from __future__ import annotations

from typing import Any

from finetune.errors import UserError
from finetune.settings import checked

_COUNT: dict[str, Any] = {"type": "integer"}
_NUMBER: dict[str, Any] = {"type": ["number", "null"]}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "flags": {"type": "object"},
        "base_model": {"type": "string", "minLength": 1},
        "base_model_revision": {"type": ["string", "null"]},
        "dtype": {"enum": ["auto", "float32", "float16", "bfloat16"]},
        "load_in_4bit": {"type": ["boolean", "null"]},
        "format": {"type": "object", "properties": {"name": {"type": "string"}}},
        "data": {"type": "object", "properties": {"sequences": _COUNT, "trained_tokens": _COUNT}},
        "eval_data": {"type": ["object", "null"]},
        "result": {"type": "object", "properties": {"final_loss": _NUMBER, "best_eval_loss": _NUMBER}},
        "steps": _COUNT,
        "status": {"type": ["string", "null"]},
        "resumed": {"type": "array"},
    },
}
_VALUES: dict[str, Any] = {"type": "object", "additionalProperties": {"type": ["number", "boolean", "null"]}}
# What training continues from in a checkpoint's trainer_state.json, beside what Transformers checks while it loads.
TRAINER_STATE: dict[str, Any] = {
    "type": "object",
    "required": ["global_step"],
    "properties": {
        "global_step": _COUNT,
        "epoch": _NUMBER,
        "best_metric": _NUMBER,
        "best_global_step": {"type": ["integer", "null"]},
        "log_history": {"type": "array", "items": {"type": "object"}},
        "stateful_callbacks": {
            "type": "object", "additionalProperties": {"type": "object", "additionalProperties": _VALUES},
        },
    },
}  # fmt: skip
# The flags that commands read from a run's config.
READ_FLAGS = (
    "format", "max_seq_length", "dataset", "rank", "alpha", "dropout", "target_modules", "lr", "epochs", "batch_size",
    "grad_accum", "seed", "rope_scaling",
)  # fmt: skip


def schema_fault(schema: dict[str, Any], value: Any) -> str | None:
    """ ", entry, of an entry: what is wrong with it", to follow the name of a file; None where nothing is."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema).iter_errors(value))
    return error and f"{''.join(f', {entry}' for entry in error.absolute_path)}: {error.message[:200]}"


def checked_config(where: str, config: dict[str, Any]) -> dict[str, Any]:
    """The config, with the flags in READ_FLAGS converted to their types and set to their defaults where absent.

    Raises UserError, starting with `where`, that names the first entry that is not what train_lora.py writes.
    """
    if fault := schema_fault(SCHEMA, config):
        raise UserError(f"{where}{fault}; restore the file that train_lora.py wrote, or train again")
    if "flags" not in config:
        return config
    flags = dict(config["flags"])
    for name in READ_FLAGS:
        value = checked(f"{where}, flags", name, flags.get(name))
        if value != flags.get(name):  # 32 stays 32
            flags[name] = value
    return config | {"flags": flags}
