"""A checkpoint's manifest: the name, size and SHA-256 of each of its files, so that damage is found before loading."""

from __future__ import annotations

import json
from pathlib import Path

from finetune.files import sha256_of, sync

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write `folder`'s manifest, and everything in it to the disk."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
    target = folder / MANIFEST
    target.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    for path in (target, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def manifest_mismatch(folder: Path) -> str | None:
    """The first file that differs from the folder's manifest; None if all are equal."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        recorded = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is not complete"
    for name, (size, digest) in recorded.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"its {name} is not complete ({path.stat().st_size:,} bytes instead of {size:,})"
            if sha256_of(path) != digest:
                return f"its {name} is damaged (SHA-256 differs from {MANIFEST})"
        except FileNotFoundError:
            return f"it has no {name}"
        except OSError as error:
            return f"its {name} cannot be read ({error.strerror})"
    return None
