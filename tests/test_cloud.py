"""The cloud recipes: SkyPilot reads the YAML; the shell recipe runs with stubs for its programs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SKY = ROOT / "cloud" / "sweep.sky.yaml"


def test_skypilot_accepts_the_task(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(SKY))
    assert task.name == "lora-rank"
    assert all(one.use_spot for one in task.resources)
    assert {name for one in task.resources for name in one.accelerators} == {"L4", "A10G", "RTXA6000", "A100"}
    assert "/ranks" in task.storage_mounts
    assert "$LORA_RANK" in task.run
    # The check can fail: SkyPilot refuses an unknown key.
    broken = tmp_path / "broken.yaml"
    broken.write_text(yaml.safe_dump(yaml.safe_load(SKY.read_text()) | {"recources": {}}))
    with pytest.raises(ValueError, match="recources"):
        sky.Task.from_yaml(str(broken))


def test_shell_of_the_task_parses():
    task = yaml.safe_load(SKY.read_text())
    for part in ("setup", "run"):
        checked = subprocess.run(["bash", "-n"], input=task[part], text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr
    assert "visualize_loss.py" in task["run"].splitlines()[-1]
    assert (ROOT / task["envs"]["RECIPE"]).is_file()
    assert (ROOT / task["envs"]["DATASET"]).is_file()


@pytest.mark.skipif(os.name == "nt", reason="a bash script")
@pytest.mark.parametrize(
    ("there", "resumed", "begun", "status"),
    [
        ((), None, True, 0),  # the first machine
        (("training_log.csv",), None, True, 0),  # preempted before the first checkpoint
        (("checkpoint-50",), 0, False, 0),
        (("checkpoint-50",), 2, True, 0),  # preempted during the upload of the first checkpoint
        (("checkpoint-50",), 1, False, 1),  # the run itself failed: its checkpoints stay for the next attempt
    ],
)
def test_replacement_machine_resumes_or_restarts(tmp_path, there, resumed, begun, status):
    """The task's own lines with a stub for Python, whose --resume ends with `resumed`."""
    ranks = tmp_path / "ranks"
    for name in ("", *there):
        (ranks / ("rank16" if there else "") / name).mkdir(parents=True, exist_ok=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/usr/bin/env bash\necho "$*" >> {tmp_path}/calls\ncase "$*" in *--resume*) exit {resumed or 0};; esac\n'
    )
    python.chmod(0o755)
    task = yaml.safe_load(SKY.read_text())
    env = os.environ | {name: str(value) for name, value in task["envs"].items()}
    lines = task["run"].replace("/ranks", str(ranks))
    done = subprocess.run(["bash", "-c", lines], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert ("--resume" in calls) == (resumed is not None)
    assert ("--rank 16 " in calls) == begun
    assert ("visualize_loss.py" in calls) == (status == 0)
    kept = [path.name for path in ranks.iterdir()]
    assert not there or (len(kept) == 1 and kept[0].startswith(".rank16_" if begun else "rank16")), kept


@pytest.mark.skipif(os.name == "nt", reason="a bash script")
@pytest.mark.parametrize("failing", ["", "16"])
def test_five_ranks_start_on_five_gpus(tmp_path, failing):
    """PY is a stub that records its calls; a failing rank fails the recipe, once all have ended."""
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/usr/bin/env bash\necho "$CUDA_VISIBLE_DEVICES $*" >> {tmp_path}/calls\n'
        f'case "$*" in *"--rank {failing or "none"} "*) exit 1;; esac\n'
    )
    stub.chmod(0o755)
    env = {**os.environ, "PY": str(stub), "RUNS": str(tmp_path / "runs")}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    argv = ["bash", str(ROOT / "cloud" / "five_gpus.sh"), "--dataset", "a b.jsonl"]
    result = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == bool(failing), result.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    ranks = sorted((int(line.split("--rank ")[1].split()[0]), line.split()[0]) for line in calls[:5])
    assert ranks == [(4, "0"), (8, "1"), (16, "2"), (32, "3"), (64, "4")]
    assert all("--dataset a b.jsonl" in line for line in calls[:5])
    assert "visualize_loss.py" in calls[5]
    assert len(calls) == 6


@pytest.mark.skipif(os.name == "nt", reason="a bash script")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signals_each_of_the_five_once(tmp_path, number):
    """A second signal would end a run without its checkpoint; a run without a signal would continue alone."""
    stub = tmp_path / "python"
    stub.write_text(
        f"#!{sys.executable} -S\nimport signal, sys, time\n"
        f"note = lambda text: open({str(tmp_path / 'calls')!r}, 'a').write(text + '\\n')\n"
        "heard = []\n"
        "for n in (signal.SIGINT, signal.SIGTERM): signal.signal(n, lambda n, frame: heard.append(n))\n"
        "note('started')\n"
        "deadline = time.monotonic() + 60\n"
        "while not heard and time.monotonic() < deadline: time.sleep(0.02)\n"
        "time.sleep(0.2)\n"
        "note(f'stopped {len(heard)}')\n"
    )
    stub.chmod(0o755)
    env = {**os.environ, "PY": str(stub), "RUNS": str(tmp_path / "runs")}
    argv = ["bash", str(ROOT / "cloud" / "five_gpus.sh")]
    process = subprocess.Popen(argv, env=env, cwd=ROOT, start_new_session=True)
    calls, deadline = tmp_path / "calls", time.monotonic() + 60
    while not calls.exists() or calls.read_text().count("started") < 5:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(timeout=60) == 130
    assert calls.read_text().count("stopped 1\n") == 5
