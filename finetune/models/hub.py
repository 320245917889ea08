"""The token for the Hugging Face Hub, from the environment alone."""

from __future__ import annotations

import os
import re
from pathlib import Path

from finetune.errors import UserError


def hub_token() -> str | None:
    """$HF_TOKEN without white space around it (files and Docker secrets end with a line), None when it is not set.

    UserError, which does not repeat it, when no token looks so: the HTTP library's own complaint would print it.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError("HF_TOKEN holds white space or characters that no token has; set it anew")
    return token or None


def public_name(model: str) -> str:
    """A Hub id as it is; of a path on this machine only its last part."""
    path = Path(model)
    return path.resolve().name if path.exists() or path.is_absolute() else model
