"""Two processes on one run, over gloo on the CPU: the same curve as one process, one folder, a clean end."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.training_runs import ROOT, command, config_of, log_rows, run

# 10 rows in steps of 3: the last step of an epoch has one row, so the second process has none of it.
FLAGS = ("--format", "chatml", "--dtype", "float32", "--batch_size", "3", "--grad_accum", "1", "--lr", "5e-3",
         "--scheduler", "constant", "--eval_fraction", "0.17", "--eval_steps", "4", "--save_steps", "0")  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")  # fmt: skip
STEPS = 8
COUNTED = ("step", "epoch", "tokens_seen", "trained_tokens", "learning_rate")


@pytest.fixture(scope="module")
def alone(rows, tiny_model, tmp_path_factory):
    """The rows of the log of one process."""
    folder = tmp_path_factory.mktemp("alone")
    arguments = ("--model", tiny_model, "--dataset", rows, *FLAGS, "--max_steps", STEPS, "--experiments_dir", folder)
    result = run(*arguments, "--name", "run")
    assert result.returncode == 0, result.stderr
    return log_rows(folder / "run")


def launched(launcher, *arguments):
    script, *flags = command(*arguments)[1:]
    return [sys.executable, *launcher, script, *flags]


def assert_same_curve(log, wanted):
    """Equal up to the order of float32 sums."""
    for mine, one in zip(log[: len(wanted)], wanted, strict=True):
        assert [mine[name] for name in COUNTED] == [one[name] for name in COUNTED]
        assert float(mine["loss"]) == pytest.approx(float(one["loss"]), abs=1e-4)
        assert float(mine["grad_norm"]) == pytest.approx(float(one["grad_norm"]), rel=1e-3)
        assert bool(mine["eval_loss"]) == bool(one["eval_loss"])
        if one["eval_loss"]:
            assert float(mine["eval_loss"]) == pytest.approx(float(one["eval_loss"]), abs=1e-4)


def test_torchrun_gives_the_curve_of_one_process_and_one_folder(rows, tiny_model, alone, tmp_path):
    words = launched(TORCHRUN, "--model", tiny_model, "--dataset", rows, *FLAGS, "--max_steps", STEPS,
                     "--experiments_dir", tmp_path)  # fmt: skip
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    (folder,) = tmp_path.iterdir()
    assert result.stdout.strip() == str(folder)
    assert "2 processes" in result.stderr
    log = log_rows(folder)
    assert len(log) == STEPS
    assert any(float(row["eval_loss"]) for row in log if row["eval_loss"])
    assert float(log[-1]["loss"]) != float(log[0]["loss"])
    assert_same_curve(log, alone)
    assert config_of(folder)["status"] == "finished"
    assert (folder / "final_model" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(os.name == "nt", reason="gloo over torchrun is tried on Linux only")
@pytest.mark.slow
@pytest.mark.parametrize("dead", ["0", "1"])
def test_a_dead_process_ends_the_run_with_a_checkpoint(dead, rows, tiny_model, alone, tmp_path):
    """Launched by accelerate, so that its curve is looked at as well; then one of the two processes is killed."""
    words = launched(ACCELERATE, "--model", tiny_model, "--dataset", rows, *FLAGS, "--max_steps", 100_000,
                     "--experiments_dir", tmp_path, "--name", "run")  # fmt: skip
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
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
    assert_same_curve(log_rows(folder), alone)
    config = config_of(folder)
    assert config["status"] == "interrupted"
    (checkpoint,) = folder.glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert checkpoint.name == f"checkpoint-{state['global_step']}"
    assert config["steps"] == state["global_step"] >= STEPS
    assert (checkpoint / "adapter_model.safetensors").is_file()
    assert (checkpoint / "optimizer.pt").is_file()
    assert not list(folder.glob(".*"))


def test_sharded_training_is_refused_in_one_line(rows, tiny_model, tmp_path):
    result = run("--model", tiny_model, "--dataset", rows, "--experiments_dir", tmp_path,
                 env={"ACCELERATE_USE_FSDP": "true"})  # fmt: skip
    assert result.returncode == 2
    assert "FSDP" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
