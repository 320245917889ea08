"""A loss or gradient that is not finite, and a real limit on memory."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.errors import UserError
from tests.helpers import lazy

gradient_check = lazy("tests.gradient_check")
nonfinite = lazy("finetune.training.nonfinite")
runner_module = lazy("finetune.passes.runner")
torch = lazy("torch")
STATM = Path("/proc/self/statm")  # its first number is the process's address space, in pages


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


def limited(room, backward):
    """In a process of its own: halved passes under a real limit on memory; (where it failed, distance)."""
    import resource

    model = gradient_check.with_random_lora(gradient_check.small_llama())
    rows = gradient_check.random_rows(30, 2)
    runner = runner_module.PassRunner(model, 10**9, share_prefix=True, pad_token_id=0)
    original, failed = runner.run_once, []

    def watched(rows, scale, backward):
        reached = []

        def noted(loss):
            reached.append("backward")
            backward(loss)

        try:
            return original(rows, scale, noted if backward else None)
        except Exception:
            failed.append(reached[-1] if reached else "forward")
            raise

    def result():
        if backward:
            return gradient_check.shared_gradients(runner, rows)
        with torch.no_grad():
            return runner.run(rows, 1.0).loss_sum

    runner_module.CPU_TARGET_TOKENS = 10**9  # else passes on a CPU are small whatever the limit is
    runner.tokens_per_pass = 1024
    expected = result()
    runner.tokens_per_pass, runner.run_once = 10**9, watched
    used = int(STATM.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    actual = result()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if backward:
        return failed, gradient_check.relative_distance(actual, expected)
    return failed, abs(actual - expected) / abs(expected)


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="needs Linux")
@pytest.mark.parametrize("backward", [True, False], ids=["training", "evaluation"])
def test_memory_limit_halves_the_passes(backward):
    import multiprocessing

    places = set()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for room in (60, 120, 200):
            failed, distance = pool.apply(limited, (room << 20, backward))
            assert distance < 1e-4
            places |= set(failed)
    assert places >= ({"forward", "backward"} if backward else {"forward"}), places
