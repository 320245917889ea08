"""Steps whose loss or gradient is not finite: their rows are recorded, and a run that cannot continue is ended."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from finetune import distributed
from finetune.errors import UserError

log = logging.getLogger("sandwich")
# float16's loss scaler skips steps without a finite gradient, so a few in a row are harmless.
MAX_NONFINITE_STEPS_FP16 = 10
MAX_SHOWN_ROWS = 4


class FiniteCheck:
    """Called after each backward of a step; counts the steps in a row that were not finite.

    origins  (file, row) of each of the trainer's sequences
    """

    def __init__(self, trainer: Any, origins: Sequence[tuple[str, int]]):
        self.trainer = trainer
        self.origins = origins
        self.steps_in_a_row = 0

    def __call__(self, rows: Sequence[int], loss_sum: float, parameters: Iterable[torch.nn.Parameter]) -> None:
        """UserError, after logging the step's row and rows, when this step would make every weight nan.

        rows  this process's sequences of the step; loss_sum and gradients are those of all processes.

        Not with --load_best once a checkpoint was evaluated: the run ends with the best one whatever follows.
        """
        trainer, args = self.trainer, self.trainer.args
        is_finite = math.isfinite(loss_sum)
        if is_finite and not args.fp16:  # float16's scaled gradients may overflow
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            is_finite = not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        self.steps_in_a_row = 0 if is_finite else self.steps_in_a_row + 1
        if self.may_diverge() or self.steps_in_a_row <= (MAX_NONFINITE_STEPS_FP16 if args.fp16 else 0):
            return
        step, rate = trainer.state.global_step + 1, trainer.optimizer.param_groups[0]["lr"]
        names = sorted({name for names in distributed.gather([self.name(row) for row in rows]) for name in names})
        what = "the gradient is not finite" if math.isfinite(loss_sum) else f"the loss is {loss_sum}"
        log.error("step %d: %s; its rows: %s", step, what, "; ".join(names))
        trainer.run_log.log_row(step=step, epoch=trainer.state.epoch or 0, learning_rate=rate, grad_norm=math.nan)
        shown = "; ".join(names[:MAX_SHOWN_ROWS]) + (" …" if len(names) > MAX_SHOWN_ROWS else "")
        raise UserError(
            f"step {step}: {what}, and training cannot continue; try a lower --lr (it was {rate:g} in this step), "
            f"--max_grad_norm, or another --dtype, and look at the rows of the step ({shown}; all in training.log)"
        )

    def may_diverge(self) -> bool:
        """Whether the run ends with the weights of a finite evaluation whatever follows."""
        best = self.trainer.state.best_metric
        return self.trainer.args.load_best_model_at_end and best is not None and math.isfinite(best)

    def name(self, row: int) -> str:
        return "{}, row {}".format(*self.origins[row]) if row < len(self.origins) else f"sequence {row}"
