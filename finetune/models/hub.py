"""The Hugging Face Hub: the user's token, and names that mean something to others."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
from pathlib import Path

from finetune.errors import UserError
from finetune.models import bundled

BUNDLED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the bundled model on the Hub


def hub_token() -> str | None:
    """$HF_TOKEN, else the token that `hf auth login` stored, without surrounding white space; None without either.

    Raises UserError, which does not repeat the token, when it cannot be one: the HTTP library's error would print it.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        try:
            from huggingface_hub import get_token
        except ImportError:  # train_lora.py --doctor, before anything is installed
            return None
        token = get_token() or ""
    if not re.fullmatch(r"[!-~]*", token):
        raise UserError("the Hugging Face token contains white space or invalid characters; set HF_TOKEN again")
    return token or None


def is_local_path(name: str) -> bool:
    """Whether the name of a model or dataset is a path on this machine, not a Hub id."""
    try:
        return Path(name).is_absolute() or Path(name).exists()
    except (OSError, ValueError):  # longer than any path, or with a null byte
        return False


# Path of another machine or of a file that has moved: ~/x, ./x, C:\\x, a/b/c, x/rows.jsonl.
_PATH = re.compile(r"[~.]|[A-Za-z]:|.*\\|.*/.*/|.*\.(jsonl|ndjson|json|csv|tsv|parquet|db|gguf)(\.gz)?$", re.IGNORECASE)


def public_name(name: str) -> str:
    """A Hub id as it is; only the last part of a local path. A weight or a split after it stays."""
    path, weight = re.fullmatch(r"(.*?)(\*[\d.]+)?", name, re.DOTALL).groups(default="")
    folder, at, split = path.rpartition("@")
    if at and not is_local_path(path) and "/" not in split and "\\" not in split:
        path, weight = folder, f"@{split}{weight}"
    if is_local_path(path):
        return (Path(path).resolve().name or "folder") + weight
    if path.lower().startswith("sqlite:///"):
        return "sqlite:///" + re.split(r"[/\\]", path)[-1] + weight
    if "://" not in path and _PATH.match(path):
        return (re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "folder") + weight
    return name


def public_base(model: str) -> str:
    """The base model as a model card names it: its Hub id, or the last part of a local path."""
    return BUNDLED_ID if model.lower() == bundled.NAME else public_name(model)


def check_public_base(model: str, flag: str, remedy: str) -> None:
    """UserError when nobody else could load the base model of an adapter that `flag` is to upload."""
    if model.lower() != bundled.NAME and is_local_path(model):
        raise UserError(f"{flag}: the base model {model} is a local path, which nobody else can load; {remedy}")


def check_path(name: str) -> None:
    """UserError for the name of a model that reads as a path of this machine where there is nothing."""
    if name.lower() == bundled.NAME or is_local_path(name):
        return
    parent = Path(name).parent
    if _PATH.match(name) or (parent != Path() and parent.is_dir() and not any(parent.glob("*/config.json"))):
        close = difflib.get_close_matches(Path(name).name, [p.name for p in parent.glob("*/")], n=1, cutoff=0.5)
        hint = f"did you mean {parent / close[0]}?" if close else "check the path"
        raise UserError(f"{name}: there is no such folder; {hint}")
    if name.lower().startswith("smollm") and "/" not in name:
        raise UserError(f"model {name} is not known; did you mean {bundled.NAME}?")


@functools.cache
def check_available(name: str, revision: str | None = None) -> None:
    """UserError, before anything slow is imported, for a model that is neither a folder, nor cached, nor on the Hub."""
    check_path(name)
    if name.lower() == bundled.NAME or is_local_path(name):
        return
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    from finetune.models.faults import hub_errors

    with hub_errors(name), contextlib.suppress(EntryNotFoundError):
        if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots").is_dir():
            return
        # One request: the library's own loading retries for more than a minute without a network.
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), token=hub_token(), timeout=10)
