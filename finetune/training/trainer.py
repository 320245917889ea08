"""TRL's SFTTrainer on ready input_ids and labels, with one optimizer step as its unit."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.models.loading import import_unsloth

import_unsloth()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft.optimizers import create_loraplus_optimizer  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import EarlyStoppingCallback  # noqa: E402
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints  # noqa: E402
from trl import SFTTrainer  # noqa: E402

from finetune import distributed  # noqa: E402
from finetune.errors import UserError  # noqa: E402
from finetune.passes.plan import make_row  # noqa: E402
from finetune.passes.runner import PassRunner  # noqa: E402
from finetune.runs.experiment import CONFIG, COUNTERS, LOG, Experiment  # noqa: E402
from finetune.training.callbacks import LogCallback, StopCallback  # noqa: E402
from finetune.training.order import steps_of_epoch  # noqa: E402

log = logging.getLogger("sandwich")
# Largest difference, per trained token in nats, between a few rows computed our way and by the model's own forward.
# float32: sums in another order differ by about 1e-6; the 16-bit types round every activation.
FIRST_STEP_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}
CHECKED_ROWS = 2
# float16's scaler leaves out steps without a finite gradient, so a few do no harm; this many do not end by themselves.
NO_NUMBER_IN_FLOAT16 = 10
EVALUATED_TOGETHER = 64  # rows of the evaluation set that may share prefixes; passes are cut by their tokens anyway


class StepSampler:
    """Row numbers of each optimizer step. The order depends on (seed, epoch) alone, so a resumed run draws the same.

    In a data-parallel run every rank takes its slice of the same step, so the number of ranks changes no step's rows;
    a rank's slice of a short last step may be empty.
    """

    def __init__(
        self,
        rows: int,
        step_rows: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        groups: np.ndarray | None = None,  # see steps_of_epoch
    ):
        self.rows, self.step_rows, self.seed, self.groups = rows, step_rows, seed, groups
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.rows / self.step_rows)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        for step in steps_of_epoch(self.rows, self.step_rows, rng, self.groups):
            yield step[self.rank :: self.world_size]


class StepLoader(DataLoader):
    """A DataLoader whose batches are steps; Trainer and accelerate hand it the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class SandwichTrainer(SFTTrainer):
    """Trains on `sequences[i] = (input_ids, labels)`. One batch of the loader is one optimizer step.

    args.per_device_train_batch_size is batch_size x grad_accum and args.gradient_accumulation_steps is 1: how a step is
    cut into forward passes is PassRunner's business, and the loss is the mean over the step's trained tokens.
    """

    def __init__(
        self,
        *,
        sequences: Sequence[tuple[Any, Any]],
        eval_sequences: Sequence[tuple[Any, Any]] | None,
        tokens_per_pass: int,
        share_prefix: bool,
        log_callback: LogCallback,
        groups: np.ndarray | None = None,
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ):
        self.sequences, self.eval_sequences = sequences, eval_sequences
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.log_callback, self.groups = log_callback, groups
        self._checked = self.lost_a_process = False
        self._without_number = 0  # steps in a row whose loss was nan or inf
        super().__init__(
            # TRL wants a Dataset; rows stay where they are and are looked up by number.
            train_dataset=Dataset.from_dict({"row": range(len(sequences))}),
            eval_dataset=Dataset.from_dict({"row": range(len(eval_sequences))}) if eval_sequences else None,
            data_collator=lambda rows: {"rows": [row["row"] for row in rows]},
            **kwargs,
        )
        self.add_callback(log_callback)
        pad = self.processing_class.pad_token_id
        self.runner = PassRunner(self.model, tokens_per_pass, share_prefix, pad if pad is not None else 0)
        self.runner.autocast = self.accelerator.autocast

    # --- data ---------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        sampler = StepSampler(
            len(self.sequences),
            self.args.per_device_train_batch_size,
            self.args.seed,
            self.args.process_index,
            self.args.world_size,
            self.groups,
        )
        return StepLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        try:
            if self.loraplus_lr_ratio is not None and self.optimizer is None:
                self.optimizer = self._loraplus_optimizer()
            return super().create_optimizer(*args, **kwargs)
        except (ImportError, ValueError) as error:
            name, reason = getattr(self.args.optim, "value", self.args.optim), str(error).splitlines()[0]
            raise UserError(f"--optim {name} cannot be used here ({reason}); choose another one") from error

    def _loraplus_optimizer(self) -> torch.optim.Optimizer:
        """LoRA+ (Hayou et al., arXiv:2402.12354): the log has A's rate, B learns at `loraplus_lr_ratio` times it."""
        kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        return create_loraplus_optimizer(
            self.model,
            kind,
            loraplus_lr_ratio=self.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **kwargs,
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate counts padded batches, which do not exist here

    def store_flos(self) -> None:
        """Nothing to store; Trainer's own asks all ranks for it, also when a checkpoint is saved without them."""

    @property
    def stop_callback(self) -> StopCallback:
        return next(c for c in self.callback_handler.callbacks if isinstance(c, StopCallback))

    def _checkpoint_name(self) -> str:
        return f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    # --- steps --------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Forward and backward of one step; returns its loss, the mean over the trained tokens of all ranks."""
        model.train()
        rows = [make_row(*self.sequences[i]) for i in inputs["rows"]]
        if rows and not self._checked:
            self._check_against_model(rows)
        mine = sum(len(row.positions) for row in rows)
        trained_everywhere, stopping = distributed.totals([mine, self.stop_callback.requested is not None])
        if stopping:  # a signal that has reached one rank stops all of them after this step
            self.stop_callback.agree()
        result = self.runner.run(rows, 1 / max(trained_everywhere, 1), backward=self.accelerator.backward)
        loss_sum, tokens, computed_tokens = distributed.totals(
            [result.loss_sum, sum(row.length for row in rows), result.computed_tokens]
        )
        distributed.sum_gradients([p for p in self.model.parameters() if p.requires_grad])
        self.log_callback.run_log.add_step(
            loss_sum=loss_sum,
            tokens=int(tokens),
            trained_tokens=int(trained_everywhere),
            computed_tokens=int(computed_tokens),
        )
        self._without_number = 0 if math.isfinite(loss_sum) else self._without_number + 1
        best = self.state.best_metric
        # With --load_best a checkpoint that was evaluated is what the run ends with, whatever comes after it.
        way_back = self.args.load_best_model_at_end and best is not None and math.isfinite(best)
        if self._without_number > (NO_NUMBER_IN_FLOAT16 if self.args.fp16 else 0) and not way_back:
            self._give_up(loss_sum)
        return torch.tensor(loss_sum / max(trained_everywhere, 1), device=self.args.device)

    def _give_up(self, loss: float) -> None:
        """End a run whose next step would make every weight nan: log the step's row, then raise UserError."""
        step = self.state.global_step + 1
        rate = self._get_learning_rate()
        self.log_callback.run_log.log_row(
            step=step, epoch=self.state.epoch or 0, learning_rate=rate, grad_norm=math.nan
        )
        raise UserError(
            f"step {step}: the loss is {loss}, and training cannot go on from there; try a lower --lr (it was {rate:g} "
            "in this step), --max_grad_norm, or another --dtype"
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where the checkpoint of a resumed run was its last step: Transformers would take one step more."""
        if self.state.global_step >= self.state.max_steps or self._stopped_early():
            self._find_best_checkpoint()
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _stopped_early(self) -> bool:
        """Whether early stopping has ended the run; a checkpoint of that step keeps the count, not the end."""
        return any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; where another process of the run dies, the last whole step is saved and the run is stopped."""
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            distributed.lock(folder)
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            if not distributed.is_lost(error):
                raise
            self.lost_a_process = True
            if self._stands_in(folder):
                log.error("another process of this run ended in step %d", self.state.global_step + 1)
                if self.state.global_step:
                    # Gradients are summed before they are used: the weights are those of the last whole step.
                    with _replaced(self.accelerator, "wait_for_everyone", lambda: None):
                        self._save_checkpoint(self.model, None)
            return None

    def _stands_in(self, folder: Path) -> bool:
        """Whether this rank ends the run that has lost a process: rank 0, or the first to see that rank 0 is gone."""
        if self.args.should_save:
            return True
        if not (folder / CONFIG).exists():  # on another machine
            return False
        if not distributed.lock(folder):  # waits until rank 0, where that is alive, has done it
            return False
        if Experiment.open(folder).config["status"] != "running":
            return False
        self.args.distributed_state.process_index = 0
        self.log_callback.run_log.take_over(folder / LOG, self.state.global_step)
        self.log_callback.console.quiet = False
        return True

    def _check_against_model(self, rows) -> None:
        """Compare a few rows computed together with the same rows computed alone by the model's own forward."""
        self._checked = True
        few = sorted(rows, key=lambda row: len(row.input_ids))[:CHECKED_ROWS]
        self.model.eval()
        alone = self.runner.reference_loss(few)
        ours = self.runner.run(few, 1.0).loss_sum
        self.model.train()
        if not math.isfinite(alone):
            raise UserError(
                f"the model's own loss is {alone} before it has learned anything; its weights are broken, or too large "
                "for this --dtype (try --dtype float32)"
            )
        difference = abs(ours - alone) / sum(len(row.positions) for row in few)
        dtype = str(self.runner.head.weight.dtype).removeprefix("torch.")
        tolerance = FIRST_STEP_TOLERANCE.get(dtype, FIRST_STEP_TOLERANCE["bfloat16"])
        if not difference <= tolerance:
            raise UserError(
                f"first step: rows computed together differ from rows computed alone by {difference:.2g} nats a token "
                f"(allowed {tolerance:.0e}); this model needs another attention path: please report it with the "
                "model's name, and train with --no-share_prefix meanwhile"
            )

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss per trained token over all evaluation rows, computed with the same shared prefixes."""
        self.model.eval()
        rows = [make_row(*pair) for pair in self.eval_sequences[distributed.rank() :: distributed.size()]]
        size = max(self.args.per_device_train_batch_size, EVALUATED_TOGETHER)
        loss_sum = 0.0
        # Neighbours in id order share the longest prefixes; the sum does not depend on the order.
        rows.sort(key=lambda row: row.input_ids.tobytes())
        for start in range(0, len(rows), size):
            loss_sum += self.runner.run(rows[start : start + size], 1.0).loss_sum
        loss_sum, positions = distributed.totals([loss_sum, sum(len(row.positions) for row in rows)])
        loss = loss_sum / positions
        self.model.train()
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log_callback.run_log.log_eval(step=self.state.global_step, epoch=self.state.epoch or 0.0, eval_loss=loss)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card is written once, with the run's numbers, beside the finished adapter."""

    def _save_checkpoint(self, model, trial) -> None:
        """Write the checkpoint aside and rename it, so that whatever is called checkpoint-N is whole."""
        self.log_callback.run_log.flush()
        folder = Path(self.args.output_dir)
        name = self._checkpoint_name()
        if (folder / name).exists():  # the last step's checkpoint is already there when an epoch ends with it
            return
        self._find_best_checkpoint()
        best = self.state.best_model_checkpoint
        aside = folder / ".saving"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)  # what a killed process left behind
        self.accelerator.wait_for_everyone()
        try:
            with _replaced(self, "_get_output_dir", lambda trial: str(aside)):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.best_model_checkpoint = best
                self.state.save_to_json(str(aside / name / "trainer_state.json"))
                counters = json.dumps(self.log_callback.run_log.state())
                (aside / name / COUNTERS).write_text(counters, encoding="utf-8")
                # A pickle that nothing here reads: the flags are in experiment_config.json.
                (aside / name / "training_args.bin").unlink(missing_ok=True)
                os.replace(aside / name, folder / name)
        finally:
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=best,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()
        self.log_callback.run_log.pause()

    def _find_best_checkpoint(self) -> None:
        """Where it is now: the state of a resumed run knows the folder in which it was written."""
        if self.state.best_global_step:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / name)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
