"""The experiment folder: its name, its atomic birth, its config, and finding a run again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune.errors import UserError, write_text_atomic

CONFIG = "experiment_config.json"
LOG = "training_log.csv"
FINAL = "final_model"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def run_name(model: str, rank: int, alpha: float, lr: float, epochs: float, when: datetime) -> str:
    """`<model>_r16_a32_lr2em04_ep3_<YYYYmmdd_HHMMSS>`, as the described system writes it."""
    short = re.sub(r"[^A-Za-z0-9.]+", "_", Path(model).name).strip("_")
    mantissa, exponent = f"{lr:e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    sign = "m" if exponent.startswith("-") else "p"
    return f"{short}_r{rank}_a{alpha:g}_lr{mantissa}e{sign}{exponent[1:]}_ep{epochs:g}_{when:%Y%m%d_%H%M%S}"


def check_writable(experiments_dir: str | Path) -> Path:
    """The folder, made if need be; UserError when nothing can be written there."""
    folder = Path(experiments_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror or error}; choose another folder with --experiments_dir"
        ) from error
    return folder


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
            os.chmod(aside, 0o777 & ~_umask())
            experiment = cls(aside, config)
            experiment.save()
            for attempt in range(1, 10_000):
                target = parent / (name if attempt == 1 else f"{name}_{attempt}")
                if not target.exists() and _claim(aside, target):
                    experiment.folder = target
                    return experiment
                if exact_name:
                    raise UserError(
                        f"run {target} exists already; choose another --name, or continue it with --resume {target}"
                    )
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
        return cls(folder, config)

    def save(self) -> None:
        if not self.writes:
            return
        write_text_atomic(self.folder / CONFIG, json.dumps(self.config, ensure_ascii=False, indent=2) + "\n")

    def update(self, **entries: Any) -> None:
        self.config.update(entries)
        self.save()

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := CHECKPOINT.fullmatch(path.name))]
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


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def find_resumable(target: str, experiments_dir: str | Path) -> tuple[Experiment, Path]:
    """(run, newest checkpoint) for --resume: a run folder, one of its checkpoints, or "" for the newest stopped run."""
    if target:
        path = Path(target)
        if not path.is_dir():
            raise UserError(f"--resume {target}: there is no such folder")
        if CHECKPOINT.fullmatch(path.name):
            return Experiment.open(path.parent), path
        experiment = Experiment.open(path)
        checkpoints = experiment.checkpoints()
        if not checkpoints:
            raise UserError(
                f"--resume {target}: the run has no checkpoint yet; start it again with --config {path / CONFIG}"
            )
        return experiment, checkpoints[-1]
    candidates = []
    for config in Path(experiments_dir).glob(f"*/{CONFIG}"):
        experiment = Experiment.open(config.parent)
        checkpoints = experiment.checkpoints()
        if checkpoints and experiment.config.get("status") != "finished":
            candidates.append((checkpoints[-1].stat().st_mtime, experiment, checkpoints[-1]))
    if not candidates:
        raise UserError(f"--resume: no unfinished run with a checkpoint in {experiments_dir}; name a run folder")
    _, experiment, checkpoint = max(candidates, key=lambda c: c[0])
    return experiment, checkpoint


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
