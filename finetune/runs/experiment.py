"""The experiment folder: its name, its atomic birth, its config, and finding a run again."""

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
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.errors import UserError, no_room
from finetune.files import current_umask, write_text_atomic

log = logging.getLogger("sandwich")

CONFIG = "experiment_config.json"
LOG = "training_log.csv"
FINAL = "final_model"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
COUNTERS = "log_counters.json"  # in every checkpoint: what training_log.csv goes on counting from


def run_name(model: str, rank: int, alpha: float, lr: float, epochs: float, when: datetime) -> str:
    """`<model>_r16_a32_lr2em04_ep3_<YYYYmmdd_HHMMSS>`, as the described system writes it."""
    # Of a name without a Latin letter or digit nothing is left, and a long one has to leave room for the rest.
    short = re.sub(r"[^A-Za-z0-9.]+", "_", Path(model).name).strip("_.")[:100] or "model"
    mantissa, exponent = f"{lr:e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    sign = "m" if exponent.startswith("-") else "p"
    return f"{short}_r{rank}_a{alpha:g}_lr{mantissa}e{sign}{exponent[1:]}_ep{epochs:g}_{when:%Y%m%d_%H%M%S}"


def check_writable(experiments_dir: str | Path, *, make: bool = True) -> Path:
    """The folder, made if need be; UserError when nothing can be written there.

    make  False: only ask, of the folder above it where it is not there yet; what is refused later leaves no empty one
    """
    folder = Path(experiments_dir)
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror or error}; choose another folder with --experiments_dir"
        ) from error
    return folder


def check_free(experiments_dir: str | Path, name: str | None) -> None:
    """UserError when the user's own name for a run is taken; asked before anything slow, and again by `create`."""
    if name and (target := Path(experiments_dir) / name).exists():
        raise UserError(f"run {target} exists already; choose another --name, or continue it with --resume {target}")


@dataclass
class Experiment:
    """One run's folder and the contents of its experiment_config.json.

    `writes` is False in the processes of a data-parallel run that only read: rank 0 writes for all of them.
    """

    folder: Path
    config: dict[str, Any]
    writes: bool = True

    @classmethod
    def create(cls, experiments_dir: str | Path, name: str, config: dict[str, Any], *, exact_name: bool) -> Experiment:
        """Make the folder with its config inside, all at once: filled aside, then renamed to a name nobody has.

        A taken name gets `_2`, `_3` …, so two runs of one second get two folders; with exact_name (--name) it is an
        error instead, because the user asked for that very folder.
        """
        parent = check_writable(experiments_dir)
        aside = Path(tempfile.mkdtemp(dir=parent, prefix=".new_run_"))
        try:
            os.chmod(aside, 0o777 & ~current_umask())
            experiment = cls(aside, config)
            experiment.save()
            for attempt in range(1, 10_000):
                target = parent / (name if attempt == 1 else f"{name}_{attempt}")
                if not target.exists() and _claim(aside, target):
                    experiment.folder = target
                    return experiment
                if exact_name:
                    check_free(parent, name)
            raise UserError(f"no free name for a run called {name} in {parent}")
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    @classmethod
    def open(cls, folder: str | Path) -> Experiment:
        folder = Path(folder)
        path = folder / CONFIG
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{folder} is not a run folder: it has no {CONFIG}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
        return cls(folder, config if isinstance(config, dict) else {})

    def save(self) -> None:
        if not self.writes:
            return
        write_text_atomic(self.folder / CONFIG, json.dumps(self.config, ensure_ascii=False, indent=2) + "\n")

    def update(self, **entries: Any) -> None:
        self.config.update(entries)
        self.save()

    def ended(self, status: str) -> None:
        self.update(status=status, ended=datetime.now(UTC).isoformat(timespec="seconds"))

    @contextlib.contextmanager
    def end_recorded(self) -> Iterator[None]:
        """Where the block ends by an error, the config says so, training.log how, and the screen how to go on."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(UserError):  # a full disk: the first error is the one to tell
                self.ended("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            if isinstance(error, Exception) and not isinstance(error, UserError):
                log.exception("the run failed")
            if not isinstance(error, UserError) and self.checkpoints():
                log.warning("go on with: python train_lora.py --resume %s", shlex.quote(str(self.folder)))
            if no_room(error):
                raise OSError(errno.ENOSPC, "no room left to write", str(self.folder)) from error
            raise

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [
            (int(match[1]), path)
            for path in self.folder.iterdir()
            if (match := CHECKPOINT.fullmatch(path.name)) and path.is_dir()
        ]
        return [path for _, path in sorted(found)]


def _claim(aside: Path, target: Path) -> bool:
    try:
        # Neither POSIX nor Windows renames a folder onto one that holds files, and every run's folder holds its config.
        aside.rename(target)
        return True
    except OSError:
        if target.exists():
            return False
        raise


def find_resumable(target: str, experiments_dir: str | Path) -> tuple[Experiment, Path]:
    """(run, newest whole checkpoint) for --resume: a run folder, one of its checkpoints, or "" for the newest stopped
    run. Raises UserError when there is none.
    """
    if not target:
        candidates = []
        for config in Path(experiments_dir).glob(f"*/{CONFIG}"):
            try:
                experiment = _trained(config.parent)
            except UserError:  # of another program, or of a machine that went down; it must not stand in the way
                continue
            checkpoints = experiment.checkpoints()
            if checkpoints and experiment.config.get("status") != "finished":
                candidates.append((checkpoints[-1].stat().st_mtime, str(config.parent)))
        if not candidates:
            raise UserError(f"--resume: no unfinished run with a checkpoint in {experiments_dir}; name a run folder")
        return find_resumable(max(candidates)[1], experiments_dir)
    path = Path(target)
    if not path.is_dir():
        raise UserError(f"--resume {target}: there is no such folder")
    if path.name in ("", ".."):  # "." and its like: the folder's own name is what says whether it is a checkpoint
        path = path.resolve()
    if not CHECKPOINT.fullmatch(path.name):
        experiment = _trained(path)
        for checkpoint in reversed(experiment.checkpoints()):
            if (damage := what_is_missing(checkpoint)) is None:
                return experiment, checkpoint
            log.warning("%s is passed over: %s", checkpoint, damage)
        raise UserError(
            f"--resume {target}: the run has no checkpoint that is whole; start it again with --config {path / CONFIG}"
        )
    if damage := what_is_missing(path):
        raise UserError(f"--resume {target}: {damage}; name another checkpoint, or the run's folder for its newest one")
    return _trained(path.parent), path


def _trained(folder: Path) -> Experiment:
    experiment = Experiment.open(folder)
    if missing := [key for key in ("flags", "data", "format") if not isinstance(experiment.config.get(key), dict)]:
        raise UserError(f"{folder / CONFIG} has no {', '.join(missing)}, so train_lora.py did not write it; train anew")
    return experiment


def what_is_missing(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to go on from (a file that is absent or was cut short), or None when it is whole.

    A machine that goes down, or a copy that was broken off, leaves such. Nothing is loaded: only ends are looked at.
    """
    from safetensors import SafetensorError, safe_open

    states = {path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth")}
    states |= {"optimizer.pt", "scheduler.pt"}
    if not any(name.startswith("rng_state") for name in states):  # one for each process of the run
        states.add("rng_state.pth")
    for name in ("adapter_config.json", "trainer_state.json", COUNTERS, "adapter_model.safetensors", *sorted(states)):
        path = checkpoint / name
        try:
            if name.endswith(".json"):
                content = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(content, dict):
                    raise ValueError
                if name == "trainer_state.json":
                    step = content["global_step"]
            elif name.endswith(".safetensors"):
                safe_open(path, "numpy")
            elif path.stat() and not zipfile.is_zipfile(path):  # torch writes zip files, whose directory is at the end
                raise ValueError
        except FileNotFoundError:
            return f"it has no {name}"
        except (OSError, ValueError, KeyError, SafetensorError):
            return f"its {name} is not whole"
    if f"checkpoint-{step}" != checkpoint.name:
        return f"its trainer_state.json is of step {step}: the folder was renamed"
    return None


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide a run's numbers."""
    import platform
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for name in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "datasets",
        "accelerate",
        "bitsandbytes",
        "unsloth",
        "unsloth_zoo",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def git_sha() -> str | None:
    """Commit of the checkout this file lies in, with "-dirty" for local changes; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            command = ["git", *arguments]
            result = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    sha = git("rev-parse", "HEAD")
    if sha is None:
        return None
    return sha + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
