"""Replaces train_lora.py in tests of sweeps: the same flags, signals, exit codes and folder, without a model.

Its first argument is a plan: {"steps", "seconds" (per step), "runs": {name: {"at", "times", "how", "loss"}}}. Each
start appends the step that it begins at to NAME.tries beside the plan.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

COLUMNS = (
    "step,epoch,loss,eval_loss,learning_rate,grad_norm,tokens_seen,trained_tokens,tokens_per_second,"
    "computed_tokens_per_second,seconds,peak_memory_gb"
)
plan_path = Path(sys.argv[1])
plan = json.loads(plan_path.read_text())
arguments = sys.argv[2:]
stopped = []
signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))


def value(name):
    return arguments[arguments.index(name) + 1] if name in arguments else None


def write(path, text):
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    os.replace(temporary, path)


def config(folder, status):
    flags = {"rank": int(value("--rank") or 0), "seed": int(value("--seed") or 3407), "experiments_dir": "x"}
    if (folder / "experiment_config.json").exists():
        flags = json.loads((folder / "experiment_config.json").read_text())["flags"]
    write(folder / "experiment_config.json", json.dumps({"flags": flags, "status": status}))


if value("--resume"):
    folder = Path(value("--resume"))
    step = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    header, *rows = (folder / "training_log.csv").read_text().splitlines(keepends=True)
    # As train_lora.py does: rows after the checkpoint are dropped and logged again.
    kept = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
    write(folder / "training_log.csv", "".join([header, *kept]))
else:
    folder, step = Path(value("--experiments_dir")) / value("--name"), 0
    folder.mkdir()  # a taken name is an error, as it is for train_lora.py
    (folder / "training_log.csv").write_text(COLUMNS + "\n")
if value("--dataset"):
    assert Path(value("--dataset")).is_file(), f"no {value('--dataset')} in {Path.cwd()}"
config(folder, "running")
tries = plan_path.parent / f"{folder.name}.tries"
with tries.open("a") as file:
    file.write(f"{step}\n")
count = len(tries.read_text().split())
mine = plan.get("runs", {}).get(folder.name, {})

while step < plan["steps"]:
    time.sleep(plan["seconds"])
    if mine.get("how") and step + 1 == mine["at"] and count <= mine["times"]:
        print("the run says why", flush=True)
        if mine["how"] == "out of memory":
            print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", flush=True)
        if mine["how"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if mine["how"] == "hung":
            time.sleep(3600)  # SIGTERM is received and ignored
        if mine["how"] == "preempted":
            raise SystemExit(143)
        raise SystemExit(2 if mine["how"] == "refused" else 1)
    step += 1
    loss = mine.get("loss", 1.0) + 1 / step
    with (folder / "training_log.csv").open("a") as file:
        file.write(f"{step},{step / plan['steps']},{loss},,1e-4,1.0,{step * 10},{step * 5},10,10,{step * 0.1},0.1\n")
    part = folder / f".checkpoint-{step}.part"
    part.mkdir()
    (part / "weights").write_bytes(bytes(100_000))
    (part / "step").write_text(str(step))
    part.rename(folder / f"checkpoint-{step}")
    for old in folder.glob(f"checkpoint-{step - 2}"):
        (old / "weights").unlink()
        (old / "step").unlink()
        old.rmdir()
    if stopped and step < plan["steps"]:
        config(folder, "interrupted")
        raise SystemExit(130)
(folder / "final_model").mkdir(exist_ok=True)
(folder / "final_model" / "adapter").write_text(folder.name)
config(folder, "finished")
