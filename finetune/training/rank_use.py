"""Which part of its rank a finished adapter uses, and its evaluation loss at smaller ranks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from finetune.errors import UserError
from finetune.models.truncation import TruncatableAdapter, rank_use
from finetune.training.resume import EvaluationStopped

if TYPE_CHECKING:
    from finetune.runs.experiment import Experiment
    from finetune.training.trainer import SandwichTrainer

log = logging.getLogger("sandwich")


def record_rank_use(trainer: SandwichTrainer, experiment: Experiment, ranks: list[int]) -> None:
    """Write `ranks` into experiment_config.json: `rank_use` and, by rank, `eval_loss`.

    ranks  smaller ranks to evaluate; all processes of a data-parallel run take part
    """
    model = trainer.runner.model
    try:
        entry = rank_use(model)
        adapter = TruncatableAdapter(model) if ranks else None
    except UserError as error:
        log.warning("the rank used was not measured: %s", error)
        return
    if adapter is not None:
        losses = {}
        try:
            for rank in [*sorted(set(ranks)), adapter.rank]:
                with adapter.at_rank(rank):
                    losses[str(rank)] = round(trainer.evaluation_loss(), 6)
            entry["eval_loss"] = losses
        except EvaluationStopped:
            log.warning("the evaluation at smaller ranks was stopped; run evaluate_lora.py RUN --ranks for it")
    experiment.update(ranks=entry)
