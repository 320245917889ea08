"""Loading a checkpoint: what is checked before the run continues, and what is removed after it has loaded."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from finetune.errors import UserError, is_out_of_memory, no_room, user_errors
from finetune.runs.experiment import checkpoint_damage, list_checkpoints

log = logging.getLogger("sandwich")


class EvaluationStopped(Exception):
    """A signal arrived during an evaluation; the run resumes with this evaluation."""


class ResumeCallback(TrainerCallback):
    """What follows once the trainer's checkpoint, if there is one, has loaded.

    Before LogCallback, which cuts the log: a later checkpoint could not be resumed without these rows.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.is_loaded = True
        if trainer.checkpoint is None:
            return
        log.info("resumed from step %d", state.global_step)
        trainer._total_loss_scalar = trainer.run_log.counters.step_losses  # Trainer would divide the rest by all steps
        if args.load_best_model_at_end and state.best_global_step:
            forget_damaged_best(trainer.checkpoint.parent, state)
        if args.should_save:
            remove_leftovers(trainer.checkpoint.parent)
            remove_later_checkpoints(trainer.checkpoint)


class RepeatEvaluation(TrainerCallback):
    """The evaluation that a signal stopped before the checkpoint; after all others, which log its result."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.run_log.evaluation_pending:
            self.trainer.repeat_stopped_evaluation()


def forget_damaged_best(folder: Path, state: TrainerState) -> None:
    """Without its best checkpoint a run keeps the best of the later steps; Trainer would silently keep the last."""
    best = folder / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    damage = checkpoint_damage(best) if best.is_dir() else "the folder is absent"
    if damage:
        log.warning("%s, the best so far, cannot be kept: %s; the best of the following steps will be", best, damage)
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def check_random_state(checkpoint: Path, rank: int, processes: int) -> None:
    """Read this process's random state before the run changes anything; Trainer restores it at the first step.

    A warning when the checkpoint has none for this number of processes.
    """
    saved = len(list(checkpoint.glob("rng_state*.pth")))
    path = checkpoint / ("rng_state.pth" if processes == 1 else f"rng_state_{rank}.pth")
    if path.is_file():
        with safe_globals():
            state = torch.load(path, weights_only=True)
        if missing := {"python", "numpy", "cpu"} - set(state):
            raise ValueError(f"{path.name} has no state of {', '.join(sorted(missing))}")
    if saved != processes or not path.is_file():
        log.warning(
            "%s was saved by %d process(es), this run has %d: random numbers (dropout) will differ",
            checkpoint, saved, processes,
        )  # fmt: skip


def remove_later_checkpoints(checkpoint: Path) -> None:
    """Remove the run's checkpoints after this one: their rows are cut from the log, and they will be saved again."""
    checkpoints = list_checkpoints(checkpoint.parent)
    names = [path.name for path in checkpoints]
    for path in checkpoints[names.index(checkpoint.name) + 1 :]:
        log.info("removing %s: the run resumes at %s", path.name, checkpoint.name)
        with user_errors(f"{path} cannot be removed", f"remove it, or resume from it with --resume {path}"):
            shutil.rmtree(path)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote them."""
    for path in (folder / ".saving", *folder.glob(".*.part")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def unloadable(checkpoint: Path, error: Exception) -> UserError | None:
    """A UserError for content of a checkpoint that cannot be loaded; None for an error with another cause."""
    if isinstance(error, UserError) or is_out_of_memory(error) or no_room(error):
        return None
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    older = [path for path in list_checkpoints(checkpoint.parent) if _step(path) < _step(checkpoint)]
    advice = f"resume from an older one with --resume {older[-1]}" if older else "start a new run"
    return UserError(f"{checkpoint} cannot be loaded ({reason}); {advice}")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[-1])
