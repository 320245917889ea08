"""A loss or gradient that is not finite ends the run and names the rows of its step."""

import logging
import math
from types import SimpleNamespace

import pytest

from finetune.errors import UserError
from tests.helpers import lazy

nonfinite = lazy("finetune.training.nonfinite")
torch = lazy("torch")


def make_check(**arguments):
    args = SimpleNamespace(**{"fp16": False, "load_best_model_at_end": False} | arguments)
    state = SimpleNamespace(global_step=6, epoch=0.5, best_metric=1.0)
    logged = []
    trainer = SimpleNamespace(
        args=args, state=state, optimizer=SimpleNamespace(param_groups=[{"lr": 0.1}]),
        run_log=SimpleNamespace(log_row=lambda **row: logged.append(row)),
    )  # fmt: skip
    origins = [("rows.jsonl", number + 1) for number in range(9)]
    return nonfinite.FiniteCheck(trainer, origins), logged


def parameter(gradient):
    found = torch.nn.Parameter(torch.zeros(2))
    found.grad = None if gradient is None else torch.tensor([1.0, gradient])
    return found


@pytest.mark.parametrize(
    ("loss", "gradient", "said"),
    [
        (math.nan, 1.0, "the loss is nan"),
        (math.inf, 1.0, "the loss is inf"),
        (2.0, math.nan, "the gradient is not finite"),
        (2.0, math.inf, "the gradient is not finite"),
    ],
)
def test_rows_of_a_nonfinite_step_are_named(loss, gradient, said, caplog):
    check, logged = make_check()
    check([0, 1], 2.0, [parameter(1.0), parameter(None)])
    with caplog.at_level(logging.ERROR, "sandwich"), pytest.raises(UserError, match=f"step 7: {said}.*rows.jsonl, row"):
        check([2, 3, 4, 5, 7], loss, [parameter(1.0), parameter(gradient)])
    assert [row["step"] for row in logged] == [7]
    assert all(f"rows.jsonl, row {number}" in caplog.text for number in (3, 4, 5, 6, 8))
    assert "row 7" not in caplog.text


def test_nonfinite_step_that_may_pass():
    """float16's loss scaler skips such a step; with --load_best the best checkpoint is kept anyway."""
    check, logged = make_check(fp16=True)
    for _ in range(nonfinite.MAX_NONFINITE_STEPS_FP16):
        check([0], math.nan, [parameter(math.nan)])
    check([0], 2.0, [parameter(math.inf)])
    check, _ = make_check(load_best_model_at_end=True)
    check([0], math.nan, [])
    assert not logged
