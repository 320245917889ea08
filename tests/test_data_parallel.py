"""Two processes of one run, over gloo on the CPU: the same curve as one process, one folder, a clean end."""

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest

from tests.training_runs import ROOT, command, config_of, log_rows, run

# 10 rows in steps of 3: the last step of an epoch has one row and the second process none.
FLAGS = ("--format", "chatml", "--dtype", "float32", "--batch_size", "3", "--grad_accum", "1", "--lr", "5e-3",
         "--scheduler", "constant", "--eval_fraction", "0.17", "--eval_steps", "4", "--save_steps", "0")  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
STEPS = 8
EXACT_COLUMNS = ("step", "epoch", "tokens_seen", "trained_tokens", "learning_rate")


@pytest.fixture(scope="module")
def single_log(rows, tiny_model, tmp_path_factory):
    """The log rows of one process."""
    folder = tmp_path_factory.mktemp("single")
    arguments = ("--model", tiny_model, "--dataset", rows, *FLAGS, "--max_steps", STEPS, "--experiments_dir", folder)
    result = run(*arguments, "--name", "run")
    assert result.returncode == 0, result.stderr
    return log_rows(folder / "run")


def launch_command(launcher, *arguments):
    script, *flags = command(*arguments)[1:]
    return [sys.executable, *launcher, script, *flags]


def assert_same_curve(log, expected):
    """Equal up to the order of float32 sums."""
    for mine, one in zip(log[: len(expected)], expected, strict=True):
        assert [mine[name] for name in EXACT_COLUMNS] == [one[name] for name in EXACT_COLUMNS]
        assert float(mine["loss"]) == pytest.approx(float(one["loss"]), abs=1e-4)
        assert float(mine["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-3)
        assert bool(mine["eval_loss"]) == bool(one["eval_loss"])
        if one["eval_loss"]:
            assert float(mine["eval_loss"]) == pytest.approx(float(one["eval_loss"]), abs=1e-4)


def test_torchrun_gives_the_curve_of_one_process(rows, tiny_model, single_log, tmp_path):
    arguments = launch_command(TORCHRUN, "--model", tiny_model, "--dataset", rows, *FLAGS, "--max_steps", STEPS,
                     "--experiments_dir", tmp_path)  # fmt: skip
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.iterdir()
    assert result.stdout.strip() == str(folder)
    assert "2 processes" in result.stderr
    log = log_rows(folder)
    assert len(log) == STEPS
    assert any(float(row["eval_loss"]) for row in log if row["eval_loss"])
    assert float(log[-1]["loss"]) != float(log[0]["loss"])
    assert_same_curve(log, single_log)
    assert config_of(folder)["status"] == "finished"
    assert (folder / "final_model" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(os.name == "nt", reason="gloo under torchrun is only tested on Linux")
@pytest.mark.parametrize(
    ("launcher", "again"),
    [pytest.param((), TORCHRUN, id="1 to 2"), pytest.param(TORCHRUN, TORCHRUN, id="2 to 2"),
     pytest.param(TORCHRUN, (), id="2 to 1", marks=pytest.mark.slow)],
)  # fmt: skip
def test_resume_with_another_number_of_processes(launcher, again, rows, tiny_model, single_log, tmp_path):
    """A run of one process, and one of two, whose last steps are lost."""
    flags = [flag for flag in FLAGS if flag not in ("--save_steps", "0")]
    arguments = launch_command(launcher, "--model", tiny_model, "--dataset", rows, *flags, "--save_steps", 4,
                     "--max_steps", STEPS, "--experiments_dir", tmp_path, "--name", "run")  # fmt: skip
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "run"
    shutil.rmtree(folder / f"checkpoint-{STEPS}")
    shutil.rmtree(folder / "final_model")
    arguments = launch_command(again, "--resume", folder)
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert "resumed from step 4" in result.stderr and "Traceback" not in result.stderr
    assert ("random numbers (dropout) will differ" in result.stderr) == (launcher != again)
    log = log_rows(folder)
    assert len(log) == STEPS
    assert_same_curve(log, single_log)


@pytest.mark.skipif(os.name == "nt", reason="gloo under torchrun is only tested on Linux")
@pytest.mark.slow
@pytest.mark.parametrize("dead", ["0", "1"])
def test_dead_process_ends_the_run_with_a_checkpoint(dead, rows, tiny_model, single_log, tmp_path):
    """Launched by accelerate, to compare its curve too; then one of the two processes is killed.

    With checkpoints on and a best evaluation known, Trainer alone would wait for the dead process in a barrier.
    """
    arguments = launch_command(ACCELERATE, "--model", tiny_model, "--dataset", rows, *FLAGS, "--max_steps", 100_000,
                     "--save_steps", 90_000, "--experiments_dir", tmp_path, "--name", "run")  # fmt: skip
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "run"
    deadline = time.monotonic() + 500
    while not (folder / "training_log.csv").exists() or len(log_rows(folder)) < STEPS + 2:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == dead]
    assert len(found) == 1
    found[0].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of this run ended" in errors
    assert f"--resume {folder}" in errors
    assert_same_curve(log_rows(folder), single_log)
    config = config_of(folder)
    assert config["status"] == "interrupted"
    (checkpoint,) = folder.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert checkpoint.name == f"checkpoint-{state['global_step']}"
    assert config["steps"] == state["global_step"] >= STEPS
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert (checkpoint / "optimizer.pt").is_file()
    assert not list(folder.glob(".*"))


def test_sharded_training_is_refused(rows, tiny_model, tmp_path):
    result = run("--model", tiny_model, "--dataset", rows, "--experiments_dir", tmp_path,
                 env={"ACCELERATE_USE_FSDP": "true"})  # fmt: skip
    assert result.returncode == 2
    assert "FSDP" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
