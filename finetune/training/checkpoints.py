"""How the trainer writes checkpoints that are complete or absent, and reads them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from finetune.files import require_run_folder, sync
from finetune.runs.experiment import COUNTERS
from finetune.runs.manifest import write_manifest
from finetune.runs.run_log import RunLog
from finetune.training.resume import check_random_state


class CheckpointMixin:
    """Methods of SandwichTrainer; a class before transformers' Trainer among the bases."""

    folder: Path
    run_log: RunLog
    lost_a_process: bool
    args: Any
    state: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, with the run's numbers, next to the final adapter."""

    # Overridden (transformers 5.17): Trainer writes into checkpoint-N itself, which a killed run leaves incomplete.
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the checkpoint to a temporary folder and rename it, so that every checkpoint-N is complete."""
        if not self.run_log.evaluation_pending:  # the evaluation adds to the row when it is repeated
            self.run_log.flush()
        target = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if target.exists():  # saved before a process was lost in the next step
            return
        require_run_folder(self.folder)
        self._locate_best_checkpoint()
        temporary = self.folder / ".saving"
        if self.args.should_save:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        self._wait_for_everyone()
        try:
            # Without best_global_step Trainer neither looks for the best checkpoint in the temporary folder nor waits
            # there for all ranks.
            with patched(self.args, "output_dir", str(temporary)), patched(self.state, "best_global_step", None):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self._wait_for_everyone()
            if self.args.should_save:
                saved = temporary / target.name
                self.state.save_to_json(str(saved / "trainer_state.json"))
                (saved / COUNTERS).write_text(json.dumps(self.run_log.state()), encoding="utf-8")
                # A pickle that nothing here reads: the flags are in experiment_config.json.
                (saved / "training_args.bin").unlink(missing_ok=True)
                write_manifest(saved)
                if self.run_log.path:  # a resumed run keeps the rows before this checkpoint
                    sync(self.run_log.path)
                os.replace(saved, target)
                sync(self.folder)
                rotate_checkpoints(
                    output_dir=str(self.folder),
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=False,
                )
        finally:
            if self.args.should_save:
                shutil.rmtree(temporary, ignore_errors=True)
        self._wait_for_everyone()
        self.run_log.pause()

    # Overridden (transformers 5.17): with several processes on a CPU Trainer maps to "cpu:0", which torch refuses.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load optimizer and scheduler; `load_state_dict` moves each tensor to its parameter's device."""
        if checkpoint is None:
            return
        for name, owner in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
            state = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            owner.load_state_dict(state)
        check_random_state(Path(checkpoint), self.args.process_index, self.args.world_size)

    def _wait_for_everyone(self) -> None:
        if not self.lost_a_process:
            self.accelerator.wait_for_everyone()

    def _locate_best_checkpoint(self) -> None:
        """Point the state to the best checkpoint in this folder: that of a resumed run may name its former place."""
        if self.state.best_global_step:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(self.folder / name)


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
