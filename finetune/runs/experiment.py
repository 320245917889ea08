"""The experiment folder of a run: its name, its atomic creation, its config and its checkpoints."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.errors import UserError, is_out_of_memory, no_room, user_errors
from finetune.files import current_umask, require_run_folder, write_text_atomic
from finetune.runs.config_schema import TRAINER_STATE, checked_config, schema_fault
from finetune.runs.manifest import manifest_mismatch
from finetune.runs.run_log import counters_fault

log = logging.getLogger("sandwich")

CONFIG = "experiment_config.json"
LOG = "training_log.csv"
FINAL = "final_model"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
COUNTERS = "log_counters.json"  # in every checkpoint: the totals that training_log.csv continues from
RESUMED_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", COUNTERS,
)  # fmt: skip
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo")


def run_name(model: str, rank: int, alpha: float, lr: float, epochs: float, when: datetime) -> str:
    """`<model>_r16_a32_lr2em04_ep3_<YYYYmmdd_HHMMSS>`; the model is `model` where its name has no Latin letter."""
    short = re.sub(r"[^A-Za-z0-9.]+", "_", Path(model).name).strip("_.")[:100] or "model"
    mantissa, exponent = f"{lr:e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    sign = "m" if exponent.startswith("-") else "p"
    return f"{short}_r{rank}_a{alpha:g}_lr{mantissa}e{sign}{exponent[1:]}_ep{epochs:g}_{when:%Y%m%d_%H%M%S}"


def check_writable(experiments_dir: str | Path, *, make: bool = True) -> Path:
    """The folder, created if need be; UserError when it is not writable.

    make  False: check the nearest existing parent instead of creating the folder, so that a later refusal leaves none
    """
    folder = Path(experiments_dir)
    with user_errors(f"cannot write to {folder}", "choose another folder with --experiments_dir"):
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        existing = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        with tempfile.TemporaryFile(dir=existing):
            pass
    return folder


def check_free(experiments_dir: str | Path, name: str | None) -> None:
    """UserError when the user's own name for a run is taken; checked before anything slow, and again by `create`."""
    if name and (target := Path(experiments_dir) / name).exists():
        raise UserError(f"run {target} exists already; choose another --name, or continue it with --resume {target}")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in a run's folder, oldest first; they are renamed to checkpoint-N when complete."""
    found = [
        (int(match[1]), path)
        for path in folder.iterdir()
        if (match := CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found)]


@dataclass
class Experiment:
    """One run's folder and the contents of its experiment_config.json.

    writes  False: `save` does nothing, as rank 0 writes for all processes of a data-parallel run
    """

    folder: Path
    config: dict[str, Any]
    writes: bool = True

    @classmethod
    def create(cls, experiments_dir: str | Path, name: str, config: dict[str, Any], *, exact_name: bool) -> Experiment:
        """Create the folder with its config inside, atomically.

        A taken name gets `_2`, `_3` …, so two runs started in one second get two folders; with exact_name (--name)
        it raises UserError instead.
        """
        parent = check_writable(experiments_dir)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".new_run_"))
        try:
            os.chmod(temporary, 0o777 & ~current_umask())
            experiment = cls(temporary, config)
            experiment.save()
            for attempt in range(1, 10_000):
                target = parent / (name if attempt == 1 else f"{name}_{attempt}")
                if not target.exists() and _claim(temporary, target):
                    experiment.folder = target
                    return experiment
                if exact_name:
                    check_free(parent, name)
            raise UserError(f"{parent}: no free name for run {name}; choose another --name")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def open(cls, folder: str | Path, *, entries: tuple[str, ...] = ()) -> Experiment:
        """The run in `folder`; UserError when it has no readable config, one without these entries, or a link out."""
        folder = Path(folder)
        path = folder / CONFIG
        refuse_links(folder)
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder} is not a run folder: it has no {CONFIG}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        config = config if isinstance(config, dict) else {}
        if missing := [key for key in entries if not isinstance(config.get(key), (dict, str))]:
            raise UserError(f"{path} has no {', '.join(missing)}: train_lora.py did not write it; train again")
        return cls(folder, checked_config(str(path), config))

    def save(self) -> None:
        if self.writes:
            require_run_folder(self.folder)  # it would be created again, with nothing but the config
            write_text_atomic(self.folder / CONFIG, json.dumps(self.config, ensure_ascii=False, indent=2) + "\n")

    def update(self, **entries: Any) -> None:
        self.config.update(entries)
        self.save()

    def ended(self, status: str) -> None:
        self.update(status=status, ended=datetime.now(UTC).isoformat(timespec="seconds"))

    @contextlib.contextmanager
    def record_outcome(self) -> Iterator[None]:
        """On an error, set the config's status, log the traceback, say how to resume, and raise again.

        A full disk is raised as OSError(ENOSPC) with the run's folder.
        """
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(UserError):  # a full disk: the first error is the one to report
                self.ended("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            if isinstance(error, Exception) and not isinstance(error, UserError) and not is_out_of_memory(error):
                log.exception("the run failed")
            if not isinstance(error, UserError) and self.checkpoints():
                log.warning("resume with: python train_lora.py --resume %s", shlex.quote(str(self.folder)))
            if reason := no_room(error):
                raise OSError(errno.ENOSPC, reason, str(self.folder)) from error
            raise

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return list_checkpoints(self.folder)


def _claim(temporary: Path, target: Path) -> bool:
    try:
        # Neither POSIX nor Windows renames a folder onto one that holds files, and every run's folder holds its config.
        temporary.rename(target)
        return True
    except OSError:
        if target.exists():
            return False
        raise


def refuse_links(folder: Path, owner: Path | None = None) -> None:
    """UserError for a link in `folder`, or `folder` itself, that leads out of `owner` (default: `folder`), and a pipe.

    Files are written through links, so one in a run folder could replace any file of this user. A pipe is never read
    to its end.
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
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path} is not a regular file, and reading it may never end; remove it")


def folder_status(folder: Path) -> str | None:
    """`status` in a run folder's config; None where there is none."""
    try:
        status = Experiment.open(folder).config.get("status")
    except UserError:
        return None
    return None if status is None else str(status)


def find_resumable(
    target: str, experiments_dir: str | Path, lock: Callable[[Path], None] | None = None
) -> tuple[Experiment, Path]:
    """(run, newest complete checkpoint) for --resume.

    target  a run folder, one of its checkpoints, or "" for the newest unfinished run. Raises UserError without one.
    lock    called with the run's folder before anything is read from it that another process could still change
    """
    if not target:
        candidates = []
        for config in Path(experiments_dir).glob(f"*/{CONFIG}"):
            try:
                experiment = open_trained(config.parent)
            except UserError:  # a folder of another program, or damaged: not a reason to refuse the others
                continue
            checkpoints = experiment.checkpoints()
            if checkpoints and experiment.config.get("status") != "finished":
                candidates.append((checkpoints[-1].stat().st_mtime, str(config.parent)))
        if not candidates:
            raise UserError(f"--resume: no unfinished run with a checkpoint in {experiments_dir}; name a run folder")
        return find_resumable(max(candidates)[1], experiments_dir, lock)
    path = Path(target)
    if not path.is_dir():
        raise UserError(f"--resume {target}: no such folder; name a run folder or one of its checkpoints")
    if path.name in ("", ".."):  # the real name says whether it is a checkpoint
        path = path.resolve()
    is_checkpoint = CHECKPOINT.fullmatch(path.name) and not (path / CONFIG).exists()  # a run may have such a name
    if lock:
        open_trained(path.parent if is_checkpoint else path)  # not a run: nothing is locked
        lock(path.parent if is_checkpoint else path)
    if is_checkpoint:
        if damage := checkpoint_damage(path):
            raise UserError(f"--resume {target}: {damage}; name another checkpoint, or the run's folder for its newest")
        return open_trained(path.parent), path
    experiment = open_trained(path)
    for checkpoint in reversed(experiment.checkpoints()):
        if (damage := checkpoint_damage(checkpoint)) is None:
            return experiment, checkpoint
        log.warning("skipping %s: %s", checkpoint, damage)
    raise UserError(f"--resume {target}: the run has no complete checkpoint; start again with --config {path / CONFIG}")


def open_trained(folder: Path) -> Experiment:
    return Experiment.open(folder, entries=("flags", "data", "format"))


def checkpoint_damage(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is absent, damaged (a machine went down, a copy was aborted) or not of such a run.

    None if complete. Others may have written a checkpoint and its manifest: what is read before loading is checked.
    """
    if mismatch := manifest_mismatch(checkpoint):
        return mismatch
    if missing := next((name for name in RESUMED_FILES if not (checkpoint / name).is_file()), None):
        return f"it has no {missing}"
    for name, fault_of in (("trainer_state.json", _state_fault), (COUNTERS, counters_fault)):
        try:
            if fault := fault_of(checkpoint / name):
                return fault
        except (OSError, ValueError, AttributeError, RecursionError):
            return f"its {name} is not complete"
    return None


def _state_fault(path: Path) -> str | None:
    state = json.loads(path.read_text(encoding="utf-8"))
    if fault := schema_fault(TRAINER_STATE, state):
        return f"its {path.name}{fault}"
    if path.parent.name != f"checkpoint-{state['global_step']}":
        return f"its {path.name} is of step {state['global_step']}: the folder was renamed"
    return None


def package_versions() -> dict[str, str]:
    """Installed versions of Python and of the packages that decide a run's numbers."""
    import platform
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def git_sha() -> str | None:
    """Commit of the checkout this file is in, with "-dirty" for local changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],  # noqa: S607  (in PATH)
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
