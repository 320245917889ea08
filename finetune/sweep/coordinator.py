"""The process of a sweep that its attempts call: they report to it, send it files, and learn from it when to stop.

It runs on the machine that the sweep was started on, as an actor of ray_runner.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune.runs.experiment import folder_status, list_checkpoints
from finetune.sweep.runs import FINISHED, archive_broken

ALL_RUNS = "*"


class Coordinator:
    """All methods take and return bytes, text, numbers, lists and dictionaries only."""

    def __init__(self, folder: str, inputs: dict[str, str]):
        """folder: the sweep's; inputs: name in the runs' flags -> file on this machine; all paths absolute."""
        self.folder, self.inputs = Path(folder).resolve(), inputs
        self.reports: list[dict[str, Any]] = []
        self.stop_reasons: dict[str, str] = {}
        self.hurry = False

    def report(self, report: dict[str, Any]) -> tuple[str, bool]:
        """Store the report for the sweep; returns why this run must stop, or "", and whether at once."""
        self.reports.append(report)
        return self.stop_reasons.get(ALL_RUNS) or self.stop_reasons.get(report["run"], ""), self.hurry

    def exchange(self, stop_reasons: dict[str, str], hurry: bool = False) -> list[dict[str, Any]]:
        """Take the sweep's orders; returns all reports since the last call, oldest first.

        stop_reasons: run or ALL_RUNS -> why it must stop; hurry: without waiting for checkpoints. Orders are sent
        complete each time, as a Coordinator that Ray had to restart has lost the earlier ones.
        """
        self.stop_reasons, self.hurry = stop_reasons, hurry
        reports, self.reports = self.reports, []
        return reports

    def write(self, name: str, offset: int, data: bytes, last: bool) -> None:
        """Write one chunk of a file, which gets its name with the last chunk."""
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

    def publish(self, source: str, target: str) -> None:
        """Rename a folder that has arrived completely."""
        destination = self._inside(target)
        if destination.exists():
            shutil.rmtree(destination)
        self._inside(source).rename(destination)
        shutil.rmtree(self._inside(source).parent, ignore_errors=True)

    def keep_checkpoints(self, run: str, names: list[str]) -> None:
        """Delete checkpoints that the run itself has deleted (--save_total_limit), once a newer one is here."""
        folder = self._inside(run)
        present = list_checkpoints(folder) if folder.is_dir() else []
        if any(path.name in names for path in present):
            for path in present:
                if path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)

    def files_to_resume(self, run: str) -> list[str]:
        """The files that a new attempt starts from: log, config and the newest checkpoint; [] without a checkpoint."""
        folder = self._inside(run)
        if not folder.is_dir():
            return []
        files = [path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
        if folder_status(folder) != FINISHED:
            checkpoints = list_checkpoints(folder)
            if not checkpoints:
                archive_broken(folder)
                return []
            files += [path for path in checkpoints[-1].rglob("*") if path.is_file()]
        return [path.relative_to(self.folder).as_posix() for path in files]

    def read(self, kind: str, name: str, offset: int, size: int) -> bytes:
        """A chunk of an input (by its name in the flags) or of a file in the sweep's folder; b"" at its end."""
        path = Path(self.inputs[name]) if kind == "input" else self._inside(name)
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def _inside(self, name: str) -> Path:
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder) or path == self.folder:
            raise ValueError(f"{name} lies outside the sweep's folder")
        return path
