"""Links in folders that other people may have made: a command must not read or write what they point to."""

from __future__ import annotations

import os
from pathlib import Path

from finetune.errors import UserError


def refuse_links(folder: Path, owner: Path | None = None) -> None:
    """UserError for a link in `folder`, or `folder` itself, that leads out of `owner` (default: `folder`).

    Files are written through links, so one in a run folder could replace any file of this user.
    """
    root = (owner or folder).resolve()
    paths = [] if owner is None else [folder]
    for parent, folders, files in os.walk(folder):  # does not follow links
        paths += [Path(parent, name) for name in (*folders, *files)]
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise UserError(
                f"{path} is a link to {path.readlink()}, out of {owner or folder}, where commands would write; "
                "remove it, or replace it by what it points to"
            )
