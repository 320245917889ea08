"""TRL's SFTTrainer on given input_ids and labels; its batch is one optimizer step."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.models.loading import import_unsloth

import_unsloth()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft.optimizers import create_loraplus_optimizer  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import EarlyStoppingCallback  # noqa: E402
from trl import SFTTrainer  # noqa: E402

from finetune import distributed  # noqa: E402
from finetune.errors import UserError  # noqa: E402
from finetune.passes.plan import make_row  # noqa: E402
from finetune.passes.runner import PassRunner  # noqa: E402
from finetune.runs.experiment import CONFIG, LOG, Experiment  # noqa: E402
from finetune.training.call_scores import METRICS, CallScorer  # noqa: E402
from finetune.training.callbacks import LogCallback, StopCallback  # noqa: E402
from finetune.training.checkpoints import CheckpointMixin  # noqa: E402
from finetune.training.nonfinite import FiniteCheck  # noqa: E402
from finetune.training.order import Groups, StepSampler  # noqa: E402
from finetune.training.resume import EvaluationStopped, RepeatEvaluation, ResumeCallback, unloadable  # noqa: E402

log = logging.getLogger("sandwich")
EVAL_ROWS_PER_RUN = 64  # evaluation rows that may share prefixes; passes are limited by their tokens anyway

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]  # (input_ids, labels) of each row


class StepLoader(DataLoader):
    """A DataLoader whose batches are steps; Trainer and accelerate tell it the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class SandwichTrainer(CheckpointMixin, SFTTrainer):
    """Trains on `sequences`. One batch of the loader is one optimizer step.

    args.per_device_train_batch_size is batch_size x grad_accum and args.gradient_accumulation_steps is 1: PassRunner
    splits a step into forward passes, and the loss is the mean over the step's trained tokens. groups: as in
    `steps_of_epoch`; origins: as in FiniteCheck.
    """

    def __init__(
        self,
        *,
        sequences: Sequences,
        eval_sequences: Sequences | None,
        tokens_per_pass: int,
        share_prefix: bool,
        log_callback: LogCallback,
        groups: Groups | None = None,
        origins: Sequence[tuple[str, int]] = (),
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ):
        self.sequences, self.eval_sequences, self.groups = sequences, eval_sequences or [], groups
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.run_log, self.log_callback, self.stop_callback = log_callback.run_log, log_callback, StopCallback()
        self.call_scorer: CallScorer | None = None  # set for --eval_calls
        self.lost_a_process = False
        self.checkpoint: Path | None = None  # from which `train` resumes
        self.is_loaded = False  # whether it has loaded, and training has begun
        self._is_checked = False
        self._check_is_finite = FiniteCheck(self, origins)
        adapter = {n: p.data for n, p in kwargs["model"].named_parameters() if p.requires_grad}
        super().__init__(
            # TRL requires a Dataset; its rows are only indices into `sequences`.
            train_dataset=Dataset.from_dict({"row": range(len(sequences))}),
            eval_dataset=Dataset.from_dict({"row": range(len(eval_sequences))}) if eval_sequences else None,
            data_collator=lambda rows: {"rows": [row["row"] for row in rows]},
            **kwargs,
        )
        # TRL casts the adapter of a 4-bit base to bfloat16 (1.15.0), in which most small updates round to nothing.
        for name, parameter in kwargs["model"].named_parameters():
            if name in adapter:
                parameter.data = adapter[name]
        self.folder = Path(self.args.output_dir or "")
        for callback in (ResumeCallback(self), log_callback, self.stop_callback):
            self.add_callback(callback)
        pad_token_id = getattr(self.processing_class, "pad_token_id", None) or 0
        self.runner = PassRunner(self.model, tokens_per_pass, share_prefix, pad_token_id)
        self.runner.autocast = self.accelerator.autocast

    # --- data and optimizer -------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        args, rows = self.args, len(self.sequences)
        sampler = StepSampler(
            rows, args.per_device_train_batch_size, args.seed, args.process_index, args.world_size, self.groups
        )
        return StepLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)  # type: ignore[arg-type]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's; with `loraplus_lr_ratio` LoRA+ (Hayou et al., arXiv:2402.12354), where B learns at that
        multiple of the logged rate, which is A's."""
        try:
            if self.loraplus_lr_ratio is not None and self.optimizer is None:
                optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.runner.model)
                self.optimizer = create_loraplus_optimizer(
                    self.runner.model,
                    optimizer_class,
                    loraplus_lr_ratio=self.loraplus_lr_ratio,
                    loraplus_weight_decay=self.args.weight_decay,
                    **options,
                )
            return super().create_optimizer(*args, **kwargs)
        except (ImportError, ValueError) as error:
            name, reason = getattr(self.args.optim, "value", self.args.optim), str(error).splitlines()[0]
            raise UserError(f"--optim {name} cannot be used here ({reason}); choose another one") from error

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate is for padded batches, which do not exist here

    def store_flos(self) -> None:
        """Nothing to store. Trainer's own is a collective operation, which would block once a process is lost."""

    # --- steps --------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one step; returns its loss, the mean over the trained tokens of all ranks."""
        model.train()
        rows = [make_row(*self.sequences[i]) for i in inputs["rows"]]
        if rows and not self._is_checked:
            self.runner.check_against_model(rows, self._check_is_finite.may_diverge())
            self._is_checked = True
        trained, stop_requests = distributed.totals(
            [sum(len(row.positions) for row in rows), self.stop_callback.requested is not None]
        )
        if stop_requests:  # a signal that has reached one rank stops all of them after this step
            self.stop_callback.confirm()
        result = self.runner.run(rows, 1 / max(trained, 1), backward=self.accelerator.backward)
        loss_sum, tokens, computed_tokens = distributed.totals(
            [result.loss_sum, sum(row.length for row in rows), result.computed_tokens]
        )
        parameters = [p for p in self.runner.model.parameters() if p.requires_grad]
        distributed.sum_gradients(parameters)
        self.run_log.add_step(
            loss_sum=loss_sum,
            tokens=int(tokens),
            trained_tokens=int(trained),
            computed_tokens=int(computed_tokens),
        )
        self._check_is_finite(inputs["rows"], loss_sum, parameters)
        return torch.tensor(loss_sum / max(trained, 1), device=self.args.device)

    # Overridden (transformers 5.17): a run resumed at its last step would otherwise take one step more.
    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # The checkpoint at which early stopping ended a run stores its count, but not that the run has ended.
        stopped_early = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        if self.state.global_step >= self.state.max_steps or stopped_early or self.control.should_training_stop:
            self._locate_best_checkpoint()
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; when another process of the run is lost, save the last complete step and stop.

        UserError when the checkpoint does not load; nothing is changed then.
        """
        checkpoint = kwargs.get("resume_from_checkpoint")
        self.checkpoint, self.is_loaded = Path(checkpoint) if checkpoint else None, False
        self.add_callback(RepeatEvaluation(self))
        try:
            return super().train(*args, **kwargs)
        except Exception as error:
            if not distributed.is_lost(error):
                if self.checkpoint is not None and not self.is_loaded and (fault := unloadable(self.checkpoint, error)):
                    raise fault from error
                raise
            self.lost_a_process = True
            if self._should_finish_run():
                log.error("another process of this run ended in step %d", self.state.global_step + 1)
                if self.state.global_step:
                    # Gradients are summed before they are used: the weights are those of the last complete step.
                    self._save_checkpoint(self.model, None)
            return None

    def _should_finish_run(self) -> bool:
        """Whether this rank saves what is left: rank 0, or its successor, the first rank to see that rank 0 is gone."""
        if self.args.should_save:
            return True
        if not (self.folder / CONFIG).exists():  # on another machine
            return False
        if not distributed.wait_for_lock(self.folder):  # waits until rank 0, if it is alive, has saved
            return False
        if Experiment.open(self.folder).config["status"] != "running":
            return False
        self.args.distributed_state.process_index = 0  # makes args.should_save true (transformers 5.17)
        self.run_log.become_writer(self.folder / LOG, self.state.global_step)
        self.log_callback.console.quiet = False
        return True

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Log `evaluation_loss` and, with --eval_calls, the scores of calls."""
        loss = self.evaluation_loss()
        with self._stoppable():
            self.run_log.pause()
            calls = self._score_calls(is_finite=math.isfinite(loss))
        self.runner.model.train()
        metrics = {"eval_loss": loss, **calls}
        self.run_log.log_eval(step=self.state.global_step, epoch=self.state.epoch or 0.0, **metrics)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def evaluation_loss(self) -> float:
        """Mean loss per trained token over all evaluation rows, computed with shared prefixes.

        Raises EvaluationStopped when a signal has arrived.
        """
        self.runner.model.eval()
        rows = [make_row(*pair) for pair in self.eval_sequences[distributed.rank() :: distributed.size()]]
        # Neighbors in this order share the longest prefixes; the sum does not depend on the order.
        rows.sort(key=lambda row: row.input_ids.tobytes())
        size = max(self.args.per_device_train_batch_size, EVAL_ROWS_PER_RUN)
        # Every rank takes part in the same number of checks for a signal.
        share = math.ceil(len(self.eval_sequences) / distributed.size())
        loss_sum = 0.0
        with self._stoppable():
            for i in range(0, share, size):
                if sum(distributed.totals([self.stop_callback.requested is not None])):
                    self.stop_callback.confirm()
                    raise EvaluationStopped
                if i < len(rows):
                    loss_sum += self.runner.run(rows[i : i + size], 1.0).loss_sum
        loss_sum, positions = distributed.totals([loss_sum, sum(len(row.positions) for row in rows)])
        return loss_sum / positions

    def _score_calls(self, *, is_finite: bool) -> dict[str, float]:
        if self.call_scorer is None:
            return {}
        if not is_finite:  # not even 0, which a checkpoint could have as its best score
            return {f"eval_{name}": math.nan for name in METRICS}
        with self.runner.autocast():
            return self.call_scorer.score(self.runner.model, self.run_log.counters.seconds)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """In a run of one process a signal raises EvaluationStopped at once; several have to agree on it first."""
        self.stop_callback.raises = EvaluationStopped if distributed.size() == 1 else None
        try:
            yield
        finally:
            self.stop_callback.raises = None

    # Overridden (transformers 5.17): Trainer would lose an evaluation that a signal stops.
    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's; a stopped evaluation leaves a checkpoint whose resume evaluates first."""
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationStopped:
            self._save_stopped_evaluation()

    def _save_stopped_evaluation(self) -> None:
        log.info("the evaluation at step %d was stopped; --resume repeats it", self.state.global_step)
        self.run_log.evaluation_pending = True
        self.control.should_evaluate = self.control.should_save = False  # or the end of an epoch does both again
        self._save_checkpoint(self.model, None)
        self.control.should_training_stop = True

    def repeat_stopped_evaluation(self) -> None:
        """The evaluation that a signal stopped before the checkpoint from which this run resumes."""
        try:
            metrics = self._evaluate(None, None)
        except EvaluationStopped:
            self.control.should_training_stop = True
            return
        self._determine_best_metric(metrics=metrics, trial=None)
        self.run_log.evaluation_pending = False

    # Overridden (transformers 5.17): Trainer keeps the first of equal values, and few requests give few different ones.
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this evaluation is the best so far; of equal accuracies that of the lower loss is."""
        state = self.state
        losses = {entry["step"]: entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
        is_equal = metrics.get(str(self.args.metric_for_best_model)) == state.best_metric
        if is_equal and metrics.get("eval_loss", math.inf) < losses.get(state.best_global_step, -math.inf):
            state.best_metric = None
        return super()._determine_best_metric(metrics, trial)
