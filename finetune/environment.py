"""Tokens and trackers from `.env` in the current folder; what the environment already has is kept."""

from __future__ import annotations

import io
import os
from pathlib import Path

DOTENV = Path(".env")
# Other names in the file are not set: it may configure other programs. finetune/reading/sql.py reads the database's.
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT", "USE_WANDB")


def dotenv() -> dict[str, str]:
    """The variables of `.env`; {} without the file."""
    if not DOTENV.is_file():
        return {}
    try:
        from dotenv import dotenv_values
    except ImportError:  # train_lora.py --doctor, before anything is installed
        return {}
    text = DOTENV.read_text(encoding="utf-8-sig", errors="replace")
    return {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value is not None}


def apply_dotenv() -> None:
    """Set those of NAMES that `.env` has and the environment lacks."""
    for name, value in dotenv().items():
        if name in NAMES:
            os.environ.setdefault(name, value)


def wants_wandb() -> bool:
    """Whether $USE_WANDB asks for Weights & Biases."""
    return os.environ.get("USE_WANDB", "").strip().lower() in ("1", "true", "yes", "on")
