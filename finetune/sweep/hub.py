"""The sweep's one meeting point: attempts report to it, bring files to it, and hear from it when to stop.

It lives on the machine that the sweep was started on; ray_runner.py makes an actor of it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune.runs.experiment import CHECKPOINT
from finetune.sweep.runs import FINISHED, folder_status, set_aside

EVERYTHING = "*"


class Hub:
    """All methods take and return bytes, text, numbers, lists and dictionaries only."""

    def __init__(self, folder: str, inputs: dict[str, str]):
        """folder: the sweep's; inputs: name in the runs' flags -> file on this machine; both with absolute paths."""
        self.folder, self.inputs = Path(folder).resolve(), inputs
        self.news: list[dict[str, Any]] = []
        self.orders: dict[str, str] = {}
        self.hurry = False

    # --- orders and news ----------------------------------------------------------------------------------------------

    def report(self, update: dict[str, Any]) -> str:
        """Keep the update for the sweep; returns why this run is to stop, or ""."""
        self.news.append(update)
        return self.orders.get(EVERYTHING) or self.orders.get(update["run"], "")

    def exchange(self, orders: dict[str, str], hurry: bool = False) -> list[dict[str, Any]]:
        """Take the sweep's orders (run, or `EVERYTHING`: why it is to end; `hurry`: without waiting for checkpoints).

        Returns all updates since the last call, oldest first. All orders come each time: a hub that Ray had to start
        anew has forgotten the earlier ones.
        """
        self.orders, self.hurry = orders, hurry
        news, self.news = self.news, []
        return news

    def in_a_hurry(self) -> bool:
        return self.hurry

    # --- files --------------------------------------------------------------------------------------------------------

    def write(self, name: str, offset: int, data: bytes, last: bool) -> None:
        """One piece of a file; it gets its name with its last piece."""
        target = self._inside(name)
        part = target.with_name(f".{target.name}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(data)
        if last:
            part.replace(target)

    def append(self, name: str, data: bytes) -> None:
        target = self._inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as file:
            file.write(data)

    def move(self, source: str, target: str) -> None:
        """Give a folder that has arrived whole its name."""
        to = self._inside(target)
        if to.exists():
            shutil.rmtree(to)
        self._inside(source).rename(to)
        shutil.rmtree(self._inside(source).parent, ignore_errors=True)

    def keep_checkpoints(self, run: str, names: list[str]) -> None:
        """Remove checkpoints that the run itself has removed (--save_total_limit), once a newer one is here."""
        folder = self._inside(run)
        here = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
        if any(path.name in names for path in here):
            for path in here:
                if path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)

    def files_of(self, run: str) -> list[str]:
        """The files that a new attempt starts from: log, config and the newest checkpoint; [] without a checkpoint."""
        folder = self._inside(run)
        if not folder.is_dir():
            return []
        if folder_status(folder) == FINISHED:
            return [p.relative_to(self.folder).as_posix() for p in folder.iterdir() if p.suffix in (".json", ".csv")]
        checkpoints = sorted((int(match[1]), path) for path in folder.iterdir()
                             if (match := CHECKPOINT.fullmatch(path.name)))  # fmt: skip
        if not checkpoints:
            set_aside(folder)
            return []
        files = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
        files += [p for p in checkpoints[-1][1].rglob("*") if p.is_file()]
        return [path.relative_to(self.folder).as_posix() for path in files]

    def read(self, kind: str, name: str, offset: int, size: int) -> bytes:
        """A piece of an input (by its name in the flags) or of a file in the sweep's folder; b"" at its end."""
        path = Path(self.inputs[name]) if kind == "input" else self._inside(name)
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _inside(self, name: str) -> Path:
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder) or path == self.folder:
            raise ValueError(f"{name} lies outside the sweep's folder")
        return path
