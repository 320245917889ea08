"""sweep_lora.py on a real Ray: lost and joining machines, failing runs, sweeps that are stopped and resumed.

The runs are tests/sweep_stub.py, except for one sweep of train_lora.py.
"""

import contextlib
import csv
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("ray")

import sweep_lora
from finetune.sweep.stopping import FINISHED_FIRST

ROOT = Path(__file__).resolve().parent.parent
STUB = ROOT / "tests" / "sweep_stub.py"
STORE = 80 << 20


@pytest.fixture(scope="module")
def cluster():
    """A head that runs nothing and one machine of four cores, each a Ray node of its own on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=4, object_store_memory=STORE)
    yield cluster
    cluster.shutdown()


def write_plan(folder, **plan):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps({"steps": 3, "seconds": 0.0} | plan))
    return shlex.join([sys.executable, "-S", str(STUB), str(folder / "plan.json")])


def arguments(folder, command, *more):
    return ["--experiments_dir", str(folder), "--name", "s", "--cpus_per_run", "1", "--command", command, *more]


def sweep_of(folder):
    return json.loads((folder / "s" / "sweep.json").read_text())


def starts(folder, name):
    return [int(word) for word in (folder / "plan" / f"{name}.tries").read_text().split()]


def logged_steps(folder, name):
    with (folder / "s" / name / "training_log.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def wait_for(condition, process=None, seconds=900):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, "the sweep ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_machine_dies_and_another_joins(cluster, tmp_path):
    """Six runs whose results travel through Ray; the machine that holds runs is killed, another one comes."""
    (tmp_path / "rows.jsonl").write_text("{}\n")
    steps = 120
    command = write_plan(tmp_path / "plan", steps=steps, seconds=0.4)
    doomed = cluster.add_node(num_cpus=2, object_store_memory=STORE, resources={"doomed": 1})
    argv = arguments(Path("e"), command, "--address", cluster.address, "--transport", "ray", "--scratch",
                      str(tmp_path / "scratch"), "--retries", "1", "--rank", "1", "2", "3", "4", "5", "6")  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "sweep_lora.py"), *argv, "--", "--dataset", "rows.jsonl"], cwd=tmp_path,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = tmp_path / "e"
    # Every run has sent back a checkpoint, so those on the doomed machine can resume.
    wait_for(lambda: len({path.parent for path in folder.glob("s/rank*/checkpoint-*")}) == 6, process)
    cluster.remove_node(doomed, allow_graceful=False)
    cluster.add_node(num_cpus=2, object_store_memory=STORE)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert output.splitlines()[-1] == str(Path("e") / "s")
    assert "raylet" not in output, "what Ray says of a dead machine is no result"

    sweep = sweep_of(folder)
    outcomes = {run["name"]: [attempt["outcome"] for attempt in run["attempts"]] for run in sweep["runs"]}
    lost = [name for name, kinds in outcomes.items() if kinds == ["lost", "finished"]]
    assert 1 <= len(lost) <= 2
    assert all(kinds == ["finished"] for name, kinds in outcomes.items() if name not in lost)
    for name in outcomes:
        run = folder / "s" / name
        assert logged_steps(folder, name) == list(range(1, steps + 1))
        assert (run / "final_model" / "adapter").read_text() == name
        assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{steps - 1}", f"checkpoint-{steps}"}
        assert (run / f"checkpoint-{steps}" / "weights").stat().st_size == 100_000
        assert not list(run.glob(".*"))
    for name in lost:
        assert starts(tmp_path, name)[0] == 0
        assert starts(tmp_path, name)[1] > 0, "it went on from a checkpoint that had been brought back"
    assert {run["attempts"][-1]["transport"] for run in sweep["runs"]} == {"Ray"}
    assert (folder / "s" / "comparison.png").stat().st_size > 10_000


def coordinators_of(cluster):
    """The processes of sweeps' Coordinators on the machines of this cluster."""
    import psutil

    raylets = [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in cluster.list_all_nodes()]
    children = [one for raylet in raylets for one in raylet.children(recursive=True)]
    return [one for one in children if one.name().startswith("ray::Coord")]  # Linux cuts names to 15 bytes


@pytest.mark.slow
def test_killed_coordinator_is_restarted(cluster, tmp_path):
    """As the kernel does when memory runs out. No run is lost or restarted, and Ctrl-C still reaches every run."""
    command = write_plan(tmp_path / "plan", steps=400, seconds=0.1)
    argv = arguments(tmp_path, command, "--address", cluster.address, "--rank", "1", "2")
    process = subprocess.Popen([sys.executable, str(ROOT / "sweep_lora.py"), *argv], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(tmp_path.glob("s/rank*/checkpoint-*"))) >= 4, process)
    (coordinator,) = coordinators_of(cluster)
    coordinator.kill()
    wait_for(lambda: [one.pid for one in coordinators_of(cluster)] not in ([], [coordinator.pid]), process)
    wait_for(lambda: {run["status"] for run in sweep_of(tmp_path)["runs"]} == {"running"}, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    for run in sweep_of(tmp_path)["runs"]:
        assert [attempt["outcome"] for attempt in run["attempts"]] == ["interrupted"]
        assert starts(tmp_path, run["name"]) == [0]


def test_failing_runs_stop_no_other(cluster, tmp_path, capsys):
    runs = {
        "rank1": {"at": 2, "times": 1, "how": "failed"},
        "rank2": {"at": 3, "times": 99, "how": "out of memory"},
        "rank3": {"at": 1, "times": 99, "how": "refused"},
        "rank4": {"at": 2, "times": 1, "how": "killed"},
        "rank5": {"at": 3, "times": 1, "how": "preempted"},
    }
    command = write_plan(tmp_path / "plan", runs=runs)
    argv = arguments(tmp_path, command, "--address", cluster.address, "--retries", "2",
                      "--rank", "1", "2", "3", "4", "5", "6")  # fmt: skip
    assert sweep_lora.main(argv) == 1
    said = capsys.readouterr()
    records = {run["name"]: run for run in sweep_of(tmp_path)["runs"]}
    kinds = {name: [attempt["outcome"] for attempt in run["attempts"]] for name, run in records.items()}
    assert kinds == {
        "rank1": ["failed", "finished"],
        "rank2": ["out of memory"] * 3,
        "rank3": ["refused"],
        "rank4": ["killed", "finished"],
        "rank5": ["preempted", "finished"],
        "rank6": ["finished"],
    }
    assert [records[f"rank{n}"]["status"] for n in (2, 3)] == ["failed", "failed"]
    assert starts(tmp_path, "rank5") == [0, 2], "the next try begins at the checkpoint"
    assert logged_steps(tmp_path, "rank5") == [1, 2, 3]
    assert any("CUDA out of memory" in line for line in records["rank2"]["attempts"][-1]["lines"])
    assert "rank2" in said.err
    assert "CUDA out of memory" in said.err
    with (tmp_path / "s" / "summary.csv").open() as file:
        table = {Path(row["folder"]).name: row for row in csv.DictReader(file)}
    assert table["rank3"]["status"] == "failed"
    assert table["rank2"]["last_outcome"] == "out of memory"
    log = (tmp_path / "s" / "logs" / "rank1.log").read_text()
    assert log.count("=== attempt") == 2
    assert "the run says why" in log

    # The same command again: what has finished is not repeated, what has failed gets another chance.
    before = {name: len(starts(tmp_path, name)) for name in runs | {"rank6": 0}}
    (tmp_path / "plan" / "plan.json").write_text(json.dumps({"steps": 3, "seconds": 0.0}))
    assert sweep_lora.main(argv) == 0
    after = {name: len(starts(tmp_path, name)) for name in before}
    assert {name for name in before if after[name] > before[name]} == {"rank2", "rank3"}
    assert sweep_of(tmp_path)["status"] == "finished"


def test_asha_stops_hopeless_runs(cluster, tmp_path):
    """One run at a time, the good ones first, so that ASHA stops the worse ones that follow."""
    runs = {f"rank{rank}": {"loss": float(rank)} for rank in range(1, 7)}
    command = write_plan(tmp_path / "plan", steps=12, seconds=0.4, runs=runs)
    argv = arguments(tmp_path, command, "--address", cluster.address, "--scheduler", "asha", "--asha_grace", "20",
                      "--asha_reduction", "2", "--cpus_per_run", "4", "--rank", *"123456")  # fmt: skip
    assert sweep_lora.main([*argv, "--", "--max_steps", "12"]) == 0
    sweep = sweep_of(tmp_path)
    status = {run["name"]: run["status"] for run in sweep["runs"]}
    stopped = [name for name, what in status.items() if what == "stopped early"]
    assert status["rank1"] == "finished"
    assert len(stopped) >= 2
    assert set(status.values()) == {"finished", "stopped early"}
    assert all(logged_steps(tmp_path, name)[-1] < 12 for name in stopped)
    times = sorted((one["started"], one["ended"]) for run in sweep["runs"] for one in run["attempts"])
    assert all(ended <= started for (_, ended), (started, _) in pairwise(times)), "each run needs all four cores"
    decisions = [json.loads(line) for line in (tmp_path / "s" / "decisions.jsonl").read_text().splitlines()]
    told, first = ({one["run"] for one in decisions if one["decision"] == kind} for kind in ("stop", FINISHED_FIRST))
    assert told - first == set(stopped)
    assert all(status[name] == "finished" for name in first)
    assert all(one["rung_percent"] in (20, 40, 80, 100) and one["metric"] == "loss" for one in decisions)
    assert sweep["best"]["setting"] == "rank=1"
    # Stopped runs are done: the same command again starts nothing.
    before = {name: starts(tmp_path, name) for name in status}
    assert sweep_lora.main([*argv, "--", "--max_steps", "12"]) == 0
    assert {name: starts(tmp_path, name) for name in status} == before


def test_queued_runs_with_seeds(cluster, tmp_path, monkeypatch):
    """With a relative path, on a cluster that sends results back."""
    monkeypatch.chdir(tmp_path)
    ranks = [str(rank) for rank in range(1, 5)]
    command = write_plan(tmp_path / "plan", steps=2)
    argv = arguments("e", command, "--address", cluster.address, "--transport", "ray", "--scratch",
                      str(tmp_path / "scratch"), "--seeds", "3", "--rank", *ranks)  # fmt: skip
    assert sweep_lora.main(argv) == 0
    folder = tmp_path / "e"
    sweep = sweep_of(folder)
    assert len(sweep["runs"]) == 12
    assert all(starts(tmp_path, run["name"]) == [0] for run in sweep["runs"])
    assert {run["status"] for run in sweep["runs"]} == {"finished"}
    assert all((folder / "s" / run["name"] / "final_model" / "adapter").is_file() for run in sweep["runs"])
    assert len(sweep["best"]["values"]) == 3
    assert (folder / "s" / "comparison.png").stat().st_size > 10_000


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a process group")
def test_ctrl_c_and_resume(tmp_path):
    """On a Ray of the sweep's own. The signal goes to the whole process group, as a terminal sends it."""
    command = write_plan(tmp_path / "plan", steps=400, seconds=0.05)
    argv = [sys.executable, str(ROOT / "sweep_lora.py"), *arguments(tmp_path, command, "--rank", "1", "2", "3", "4")]
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    wait_for(lambda: any(len(path.read_text().splitlines()) > 5 for path in tmp_path.glob("s/*/*.csv")), process)
    assert {name.removeprefix("::ffff:") for name in listening(process.pid)} == {"127.0.0.1"}
    started = {path.stem for path in (tmp_path / "plan").glob("*.tries")}
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert not stubs_of(tmp_path)
    records = {run["name"]: run for run in sweep_of(tmp_path)["runs"]}
    assert {records[name]["status"] for name in started} == {"interrupted"}
    assert sweep_of(tmp_path)["status"] == "interrupted"

    (tmp_path / "plan" / "plan.json").write_text(json.dumps({"steps": 12, "seconds": 0.0}))
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in started:
        first, second = starts(tmp_path, name)
        steps = logged_steps(tmp_path, name)
        assert (first, steps) == (0, list(range(1, len(steps) + 1)))
        assert second > 0, "it went on from the checkpoint of its last step"


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="closes a terminal")
def test_closed_terminal_stops_the_sweep(tmp_path):
    """On a Ray of the sweep's own, whose processes belong to the same terminal."""
    import pty

    command = write_plan(tmp_path / "plan", steps=400, seconds=0.05)
    argv = [sys.executable, str(ROOT / "sweep_lora.py"), *arguments(tmp_path, command, "--rank", "1", "2", "3", "4")]
    child, terminal = pty.fork()
    if child == 0:
        os.execv(argv[0], argv)
    deadline = time.monotonic() + 600
    while not any(len(path.read_text().splitlines()) > 5 for path in tmp_path.glob("s/*/*.csv")):
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.1)[0]:  # a table that nobody reads would fill the terminal
            os.read(terminal, 1 << 16)
    started = {path.stem for path in (tmp_path / "plan").glob("*.tries")}
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130, (tmp_path / "s" / "sweep.log").read_text()
    assert not stubs_of(tmp_path)
    sweep = sweep_of(tmp_path)
    assert sweep["status"] == "interrupted"
    records = {run["name"]: run for run in sweep["runs"]}
    assert {tuple(one["outcome"] for one in records[name]["attempts"]) for name in started} == {("interrupted",)}
    configs = [json.loads((tmp_path / "s" / name / "experiment_config.json").read_text()) for name in started]
    assert {config["status"] for config in configs} == {"interrupted"}, "each has saved a checkpoint and ended"


def listening(pid):
    """Addresses on which this process and all that it has started take TCP connections."""
    import psutil

    found = set()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found |= {one.laddr.ip for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    return found


def stubs_of(folder):
    """Command lines of processes that still run the stub with this folder's plan."""
    import psutil

    plan = str(folder / "plan" / "plan.json")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        argv = process.info["cmdline"] or []
        if plan in argv and str(STUB) in argv:
            found.append(argv)
    return found


@pytest.mark.slow
def test_sweep_of_train_lora(rows, tiny_model, tmp_path):
    argv = ["--rank", "4", "8", "--experiments_dir", str(tmp_path), "--name", "s", "--", "--model", str(tiny_model),
             "--dataset", str(rows), "--format", "chatml", "--max_steps", "2", "--eval_fraction", "0.2"]  # fmt: skip
    result = subprocess.run(
        [sys.executable, str(ROOT / "sweep_lora.py"), *argv], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for rank in (4, 8):
        run = tmp_path / "s" / f"rank{rank}"
        config = json.loads((run / "experiment_config.json").read_text())
        assert config["status"] == "finished"
        assert config["flags"]["alpha"] == 2 * rank
        assert (run / "final_model" / "adapter_model.safetensors").is_file()
    assert "best: rank=" in result.stderr
    assert sweep_of(tmp_path)["best"]["metric"] == "eval_loss"
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".pkl", ".pickle")]
