"""Where an attempt works, and how its files travel when the sweep's folder is not visible on its machine.

A folder that both machines see (a token in it is compared) is used directly. Otherwise the attempt works in a scratch
folder that mirrors the user's working folder, and files travel in chunks as arguments and results of calls to the
Coordinator, through Ray's object store: Ray itself (2.60) copies code to other machines but no results back. Only
bytes, text and numbers are sent; no pickled object of a third party is loaded.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.errors import UserError
from finetune.runs.experiment import CHECKPOINT, CONFIG, FINAL, LOG, folder_status, list_checkpoints
from finetune.sweep.runs import FINISHED, TOKEN

CHUNK_BYTES = 8 << 20
# Folders of a run that get their name when they are complete, and do not change afterwards.
ATOMIC_FOLDERS = ("evaluation", FINAL)


@dataclass(frozen=True)
class Workspace:
    """cwd: where the run's process starts; folder: the sweep's folder on this machine."""

    cwd: Path
    folder: Path
    shared: bool

    def argument(self, path: Path) -> str:
        """The path as a run's flags have it: relative to the working folder where it lies inside."""
        return str(path.relative_to(self.cwd) if path.is_relative_to(self.cwd) else path)


def open_workspace(task: dict[str, Any]) -> Workspace:
    """The sweep's own folder where this machine sees it, else a scratch folder."""
    cwd, folder = Path(task["cwd"]), Path(task["folder"])
    if task["transport"] != "ray":
        try:
            shared = (folder / TOKEN).read_text(encoding="utf-8") == task["token"] and cwd.is_dir()
        except OSError:
            shared = False
        if shared:
            return Workspace(cwd, folder, True)
        if task["transport"] == "shared":
            raise UserError(f"{folder} is not the sweep's folder on this machine; share it, or use --transport ray")
    scratch = private_folder(Path(task["scratch"] or tempfile.gettempdir())) / task["sweep_id"] / task["machine"]
    inside = scratch / (folder.relative_to(cwd) if folder.is_relative_to(cwd) else folder.name)
    inside.mkdir(parents=True, exist_ok=True)
    return Workspace(scratch, inside, False)


def private_folder(parent: Path) -> Path:
    """This user's folder for scratch files in `parent`, such as /tmp; UserError where somebody else has made it."""
    own = os.getuid() if hasattr(os, "getuid") else None
    folder = parent / ("sandwich_sweeps" if own is None else f"sandwich_sweeps_{own}")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if own is not None and (found.st_uid != own or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o022):
        raise UserError(f"{folder} is a link, or others can write to it; remove it, or name a folder with --scratch")
    return folder


class FileSync:
    """Copies a run's inputs and last state to this machine, and its files back while they are made."""

    def __init__(self, workspace: Workspace, run: str, call: Callable[..., Any]):
        self.workspace, self.call = workspace, call
        self.folder, self.log = workspace.folder / run, workspace.folder / "logs" / f"{run}.log"
        self.log_sent = 0  # bytes
        self.sent: dict[str, tuple[int, int]] = {}  # size and time of a file when it was sent; (0, 0) for a folder

    def fetch(self, inputs: dict[str, str]) -> None:
        """Copy the input files (name: SHA-256) and the run's state as the Coordinator has it. Raises UserError."""
        if self.workspace.shared:
            return
        for name, digest in inputs.items():
            self._fetch_input(name, digest)
        # Files of an earlier attempt on this machine may be older than what another machine has sent since.
        self.clear()
        for name in self.call("files_to_resume", self.folder.name):
            path = self.workspace.folder / name
            self._get("output", name, path)
            self.sent[name] = _state(path)
            if (parent := str(PurePosixPath(name).parent)) != self.folder.name:
                self.sent[parent] = (0, 0)  # a checkpoint, which need not be sent back

    def _fetch_input(self, name: str, digest: str) -> None:
        path = Path(os.path.normpath(name))
        if path.is_absolute() and path.is_file():
            return
        if path.is_absolute() or path.parts[0] == "..":  # the latter would be written above the scratch folder
            raise UserError(f"{name} lies outside the folder the sweep is started in; move it there, or start above it")
        target = self.workspace.cwd / name
        mark = target.with_name(f".{target.name}.{digest[:16]}")
        if not (target.is_file() and mark.exists()):
            self._get("input", name, target)
            mark.touch()

    def clear(self) -> None:
        """Delete the run's scratch files; input files stay for other runs."""
        if not self.workspace.shared:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.log.unlink(missing_ok=True)

    def send_changed(self, ended: bool = False) -> None:
        """Send new and changed files; a checkpoint or the adapter appears on the other side when it is complete."""
        if self.workspace.shared:
            return
        if self.log.exists():
            self._send_log()
        if not self.folder.is_dir():
            return
        # If this machine dies between two files, the run resumes from what has arrived: so its log comes before the
        # checkpoints, whose rows are in it, and a config that says "finished" after the adapter.
        for path in sorted(self.folder.iterdir(), key=lambda path: (path.name != LOG, path.is_file(), path.name)):
            if path.name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):  # an old checkpoint that is deleted while it is read
                self._send(path, ended)
        self.call("keep_checkpoints", self.folder.name, [path.name for path in list_checkpoints(self.folder)])

    def _send(self, path: Path, ended: bool) -> None:
        name = f"{self.folder.name}/{path.name}"
        if CHECKPOINT.fullmatch(path.name) or path.name in ATOMIC_FOLDERS:
            if name not in self.sent:
                incoming = f"{self.folder.name}/.incoming/{path.name}"
                for file in sorted(p for p in path.rglob("*") if p.is_file()):
                    self._put(file, f"{incoming}/{file.relative_to(path).as_posix()}")
                self.call("publish", incoming, name)
                self.sent[name] = (0, 0)
        elif path.is_file() and self.sent.get(name) != (state := _state(path)):
            if path.name == CONFIG and not ended and folder_status(path.parent) == FINISHED:
                return
            self._put(path, name)
            self.sent[name] = state

    def _put(self, path: Path, name: str) -> None:
        with path.open("rb") as file:
            last = False
            while not last:
                offset = file.tell()
                data = file.read(CHUNK_BYTES)
                last = len(data) < CHUNK_BYTES
                self.call("write", name, offset, data, last)

    def _send_log(self) -> None:
        with self.log.open("rb") as file:
            file.seek(self.log_sent)
            while data := file.read(CHUNK_BYTES):
                self.call("append", f"logs/{self.log.name}", data)
                self.log_sent = file.tell()

    def _get(self, kind: str, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{self.folder.name}.part")  # other runs may be fetching the same file
        with part.open("wb") as file:
            while data := self.call("read", kind, name, file.tell(), CHUNK_BYTES):
                file.write(data)
        part.replace(target)


def _state(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_size, info.st_mtime_ns
