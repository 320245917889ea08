"""Where an attempt works, and how its files travel when the sweep's folder is not on its machine.

A folder that both machines see (a token in it is compared) is worked in directly. Otherwise the attempt works in a
folder of its own machine that mirrors the user's working folder, and bytes travel as arguments and results of calls to
the hub: Ray's object transport. Only bytes, text and numbers are sent; no object that anybody else made is unpickled.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.errors import UserError
from finetune.runs.experiment import CHECKPOINT, CONFIG, FINAL
from finetune.sweep.runs import FINISHED, TOKEN, folder_status

CHUNK = 8 << 20
# Folders of a run that appear under their name only when they are whole, and never change afterwards.
WHOLE = ("evaluation", FINAL)


@dataclass(frozen=True)
class Workspace:
    """cwd: where the run's process starts; folder: the sweep's folder as this machine sees it."""

    cwd: Path
    folder: Path
    shared: bool

    def named(self, path: Path) -> str:
        """The path as a run's flags hold it: relative to the working folder where it lies inside."""
        try:
            return str(path.relative_to(self.cwd))
        except ValueError:
            return str(path)


def place_of(task: dict[str, Any]) -> Workspace:
    """The sweep's own folder where this machine sees it, else a folder of this machine."""
    cwd, folder = Path(task["cwd"]), Path(task["folder"])
    if task["transport"] != "ray":
        try:
            seen = (folder / TOKEN).read_text(encoding="utf-8") == task["token"] and cwd.is_dir()
        except OSError:
            seen = False
        if seen:
            return Workspace(cwd, folder, True)
        if task["transport"] == "shared":
            raise UserError(f"{folder} is not the sweep's folder on this machine; share it, or use --transport ray")
    scratch = Path(task["scratch"] or tempfile.gettempdir()) / "sandwich_sweeps" / task["sweep_id"] / task["machine"]
    inside = folder.relative_to(cwd) if folder.is_relative_to(cwd) else Path(folder.name)
    (scratch / inside).mkdir(parents=True, exist_ok=True)
    return Workspace(scratch, scratch / inside, False)


class Courier:
    """Brings a run's inputs and last state to this machine, and its files back as they are made."""

    def __init__(self, place: Workspace, run: str, call: Callable[..., Any]):
        self.place, self.run, self.call = place, run, call
        self.sent: dict[str, tuple[int, int]] = {}

    def fetch(self, inputs: dict[str, str]) -> None:
        """Get input files (name: SHA-256) that lie below the working folder, and the run as the hub last saw it."""
        if self.place.shared:
            return
        for name, digest in inputs.items():
            if Path(name).is_absolute():
                if not Path(name).is_file():
                    raise UserError(f"{name} is not on this machine; put it below the folder the sweep is started in")
                continue
            if os.path.normpath(name).startswith(".."):  # it would be written somewhere above the scratch folder
                raise UserError(f"{name} lies outside the folder the sweep is started in; put it below, or start above")
            target = self.place.cwd / name
            mark = target.with_name(f".{target.name}.{digest[:16]}")
            if not (target.is_file() and mark.exists()):
                self._get("input", name, target)
                mark.touch()
        # What a former attempt left here, a killed one say, may be older than what another machine has brought back
        # since, and its log has been sent.
        self.clear()
        for name in self.call("files_of", self.run):
            self._get("output", name, self.place.folder / name)
            self.sent[name] = _state(self.place.folder / name)
            if (parent := str(PurePosixPath(name).parent)) != self.run:
                self.sent[parent] = (0, 0)  # a checkpoint that need not travel back

    def clear(self) -> None:
        """Remove the run from this machine, when all of it has been sent; data files stay for other runs."""
        if not self.place.shared:
            shutil.rmtree(self.place.folder / self.run, ignore_errors=True)
            (self.place.folder / "logs" / f"{self.run}.log").unlink(missing_ok=True)

    def send_changed(self, ended: bool = False) -> None:
        """Send what is new or has changed since the last time; folders that must be whole go in one piece."""
        if self.place.shared:
            return
        folder = self.place.folder / self.run
        log = self.place.folder / "logs" / f"{self.run}.log"
        if log.exists():
            self._append(log)
        if not folder.is_dir():
            return
        # Folders first: a config that says "finished" must not arrive ahead of the adapter.
        for path in sorted(folder.iterdir(), key=lambda path: (path.is_file(), path.name)):
            if path.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):  # an old checkpoint that is removed while it is read
                self._send(path, ended)
        kept = [path.name for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name)]
        self.call("keep_checkpoints", self.run, kept)

    def _send(self, path: Path, ended: bool) -> None:
        name = path.relative_to(self.place.folder).as_posix()
        if CHECKPOINT.fullmatch(path.name) or path.name in WHOLE:
            if name not in self.sent:
                for file in sorted(p for p in path.rglob("*") if p.is_file()):
                    self._put(file, f"{self.run}/.incoming/{path.name}/{file.relative_to(path).as_posix()}")
                self.call("move", f"{self.run}/.incoming/{path.name}", name)
                self.sent[name] = (0, 0)
        elif path.is_file() and self.sent.get(name) != (state := _state(path)):
            if path.name == CONFIG and not ended and folder_status(path.parent) == FINISHED:
                return
            self._put(path, name)
            self.sent[name] = state

    def _put(self, path: Path, name: str) -> None:
        with path.open("rb") as file:
            offset = 0
            while True:
                data = file.read(CHUNK)
                last = len(data) < CHUNK
                self.call("write", name, offset, data, last)
                offset += len(data)
                if last:
                    return

    def _append(self, path: Path) -> None:
        name = path.relative_to(self.place.folder).as_posix()
        with path.open("rb") as file:
            file.seek(self.sent.get(name, (0, 0))[0])
            while data := file.read(CHUNK):
                self.call("append", name, data)
                self.sent[name] = (file.tell(), 0)

    def _get(self, kind: str, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{self.run}.part")  # other runs may be fetching the same file
        with part.open("wb") as file:
            while data := self.call("read", kind, name, file.tell(), CHUNK):
                file.write(data)
        part.replace(target)


def _state(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns
