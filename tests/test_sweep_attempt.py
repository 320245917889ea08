"""One attempt at a run without Ray: the Coordinator is called directly, the process is tests/sweep_stub.py."""

import json
import logging
import os
import shlex
import signal
import sys
from hashlib import sha256
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest

from finetune.errors import UserError
from finetune.runs.run_log import COLUMNS
from finetune.sweep import ray_runner
from finetune.sweep.attempt import last_lines, outcome_of, run_arguments, run_attempt
from finetune.sweep.coordinator import Coordinator
from finetune.sweep.file_sync import Workspace
from finetune.sweep.grid import make_points
from finetune.sweep.ray_session import SweepOptions, defer_ctrl_c, ray_session
from finetune.sweep.runs import TOKEN, open_sweep
from finetune.sweep.stopping import Asha

pytestmark = pytest.mark.skipif(os.name == "nt", reason="ends processes with POSIX signals")
STUB = Path(__file__).with_name("sweep_stub.py")


class Site:
    """A user's working folder with a sweep in it, and machines that may or may not see it."""

    def __init__(self, root):
        self.root, self.cwd = root, root / "user"
        self.folder = self.cwd / "e" / "s"
        (self.folder / "logs").mkdir(parents=True)
        (self.folder / TOKEN).write_text("token")
        (self.cwd / "rows.jsonl").write_bytes(b"{}\n" * 10)
        (root / "plan").mkdir()
        self.inputs = {"rows.jsonl": sha256(b"{}\n" * 10).hexdigest()}
        self.coordinator = Coordinator(str(self.folder), {"rows.jsonl": str(self.cwd / "rows.jsonl")})
        self.number = 0

    def attempt(self, machine, transport="ray", on_call=None, options=None, **plan):
        (self.root / "plan" / "plan.json").write_text(json.dumps({"steps": 4, "seconds": 0.0} | plan))
        self.number += 1
        task = {
            "name": "rank4", "arguments": ["--rank", "4", "--dataset", "rows.jsonl"], "root": str(self.root),
            "command": [sys.executable, "-S", str(STUB), str(self.root / "plan" / "plan.json")],
            "folder": str(self.folder), "cwd": str(self.cwd), "scratch": str(self.root / "tmp"), "sweep_id": "id",
            "machine": machine, "token": "token", "transport": transport, "inputs": self.inputs, "processes": 1,
            "cpus": 1.0, "gpus": 0.0, "number": self.number, "interval": 0.05, "patience": 20.0,
            "hang_minutes": 0.0, "force": False,
        }  # fmt: skip
        task |= options or {}

        def call(method, *arguments):
            if on_call:
                on_call(method, *arguments)
            return getattr(self.coordinator, method)(*arguments)

        return run_attempt(task, call)

    def starts(self):
        return [int(word) for word in (self.root / "plan" / "rank4.tries").read_text().split()]

    def files(self):
        run = self.folder / "rank4"
        return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


RUN_FILES = {
    "experiment_config.json", "training_log.csv", "final_model/adapter", "checkpoint-3/step", "checkpoint-3/weights",
    "checkpoint-4/step", "checkpoint-4/weights",
}  # fmt: skip


@pytest.mark.parametrize("transport", ["ray", "auto"])
def test_all_results_come_back(site, transport):
    outcome = site.attempt("one", transport)
    assert (outcome["outcome"], outcome["step"], outcome["exit_code"]) == ("finished", 4, 0), outcome
    assert outcome["transport"] == {"ray": "Ray", "auto": "shared folder"}[transport]
    assert site.files() == RUN_FILES
    assert (site.folder / "rank4" / "checkpoint-4" / "weights").read_bytes() == bytes(100_000)
    assert (site.folder / "logs" / "rank4.log").read_text().startswith("=== attempt 1 on ")
    assert sorted(path.name for path in site.folder.iterdir()) == [TOKEN, "logs", "rank4"]
    rows = [row for update in site.coordinator.exchange({}) for row in update.get("rows", [])]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["loss"] == 1.25


@pytest.mark.parametrize("transport", ["ray", "auto"])
def test_next_attempt_resumes_on_another_machine(site, transport):
    broken = {"rank4": {"at": 4, "times": 1, "how": "killed"}}
    first = site.attempt("one", transport, steps=6, runs=broken)
    assert (first["outcome"], first["step"], first["exit_code"]) == ("killed", 3, -9)
    assert first["lines"][-1] == "the run says why"
    second = site.attempt("two", transport, steps=6, runs=broken)
    assert (second["outcome"], second["step"]) == ("finished", 6)
    assert site.starts() == [0, 3]
    lines = (site.folder / "rank4" / "training_log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "1", "2", "3", "4", "5", "6"]
    assert {path.name for path in (site.folder / "rank4").glob("checkpoint-*")} == {"checkpoint-5", "checkpoint-6"}
    assert (site.folder / "logs" / "rank4.log").read_text().count("=== attempt") == 2


def test_log_has_each_attempt_once(site):
    broken = {"rank4": {"at": 3, "times": 2, "how": "killed"}}
    for kind in ("killed", "killed", "finished"):
        assert site.attempt("one", steps=6, runs=broken)["outcome"] == kind
    text = (site.folder / "logs" / "rank4.log").read_text()
    assert [text.count(f"=== attempt {number} ") for number in (1, 2, 3)] == [1, 1, 1]
    assert text.count("the run says why") == 2


def test_scratch_files_are_deleted_once_sent(site):
    """Except for input files, which other runs use."""
    broken = {"rank4": {"at": 3, "times": 1, "how": "killed"}}
    for kind in ("killed", "finished"):
        assert site.attempt("one", runs=broken)["outcome"] == kind
        left = [path.name for path in (site.root / "tmp").rglob("*") if path.is_file()]
        assert sorted(left) == [f".rows.jsonl.{site.inputs['rows.jsonl'][:16]}", "rows.jsonl"]
    assert site.files() == RUN_FILES


@pytest.mark.parametrize("transport", ["ray", "auto"])
def test_attempt_without_checkpoint_is_archived(site, transport):
    broken = {"rank4": {"at": 1, "times": 1, "how": "failed"}}
    assert site.attempt("one", transport, runs=broken)["outcome"] == "failed"
    assert site.attempt("two", transport, runs=broken)["outcome"] == "finished"
    assert site.starts() == [0, 0]
    assert (site.folder / ".rank4_broken_1" / "experiment_config.json").is_file()
    assert site.files() == RUN_FILES


@pytest.mark.parametrize("why", ["interrupted", "stopped early"])
def test_stopped_run_saves_a_checkpoint(site, why):
    def on_call(method, *arguments):
        if method == "report" and arguments[0].get("rows"):
            site.coordinator.stop_reasons["rank4"] = why

    outcome = site.attempt("one", on_call=on_call, steps=400, seconds=0.05)
    assert (outcome["outcome"], outcome["exit_code"]) == (why, 130)
    step = outcome["step"]
    assert 0 < step < 400
    assert (site.folder / "rank4" / f"checkpoint-{step}" / "step").read_text() == str(step)
    assert json.loads((site.folder / "rank4" / "experiment_config.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("force", [False, True])
def test_force_reaches_only_a_resumed_run(tmp_path, force):
    """`sweep_lora.py --force`: after an update of a package a run's --resume alone is refused."""
    task = {"name": "new", "arguments": ["--rank", "4"], "force": force}
    workspace = Workspace(tmp_path, tmp_path / "sweep", True)
    (workspace.folder / "old" / "checkpoint-2").mkdir(parents=True)
    resumed = run_arguments(task, workspace, workspace.folder / "old")
    assert resumed == ["--resume", str(Path("sweep") / "old"), *(["--force"] if force else [])]
    assert "--force" not in run_arguments(task, workspace, workspace.folder / "new")


def test_hung_run_is_ended(site):
    hangs = {"rank4": {"at": 3, "times": 1, "how": "hung"}}
    options = {"hang_minutes": 1 / 30, "patience": 0.2}  # a start on a busy machine takes less than two seconds
    first = site.attempt("one", options=options, runs=hangs)
    assert (first["outcome"], first["step"], first["exit_code"]) == ("hung", 2, -9), first
    why = "neither logged nor printed for 0.0333333 minutes (--hang_minutes)"
    assert first["lines"][-2:] == ["the run says why", why]
    second = site.attempt("two", options=options, runs=hangs)
    assert (second["outcome"], second["step"]) == ("finished", 4)
    assert site.starts() == [0, 2]


@pytest.mark.parametrize(("code", "kind"), [(2, "refused"), (-9, "killed"), (1, "failed")])
def test_torchrun_failure_is_that_of_its_process(tmp_path, code, kind):
    """The output is that of torch 2.13.0."""
    log = tmp_path / "log"
    log.write_text(
        "=== attempt 1\nerror: x.jsonl: there is no such file\nE1122 01:51:42.575000 11703 torch/distributed/elastic/"
        f"multiprocessing/api.py:1002] failed (exitcode: {code}) local_rank: 0 (pid: 11707) of binary: /bin/python\n"
        "Traceback (most recent call last):\n" + "  File x\n" * 20 + "Root Cause (first observed failure):\n"
    )
    found, lines = last_lines(1, log, 0)
    assert (found, lines) == (code, ["=== attempt 1", "error: x.jsonl: there is no such file"])
    assert outcome_of(found, lines, "")["outcome"] == kind
    assert last_lines(0, log, 0)[0] == 0


def test_flags_refused_under_torchrun(site):
    outcome = site.attempt("one", "auto", options={"command": [], "processes": 2})
    assert (outcome["outcome"], outcome["exit_code"]) == ("refused", 2), outcome
    # Whichever is found first: without a network the default model, else the rows.
    assert outcome["lines"][-1].startswith(("error: rows.jsonl, row 1:", "error: model ")), outcome


def test_slow_run_that_logs_does_not_hang(site):
    outcome = site.attempt("one", options={"hang_minutes": 1 / 40}, steps=4, seconds=0.6)
    assert (outcome["outcome"], outcome["step"]) == ("finished", 4), outcome


def test_finished_run_is_not_run_again(site):
    site.attempt("one")
    assert site.attempt("two")["outcome"] == "finished"
    assert site.starts() == [0]


def test_adapter_arrives_before_the_finished_config(site):
    arrived = []

    def on_call(method, *arguments):
        if method == "write" and arguments[3]:
            text = arguments[2].decode("utf-8", "replace") if "config" in arguments[0] else ""
            arrived.append("finished" if '"finished"' in text else arguments[0])

    site.attempt("one", on_call=on_call)
    assert arrived.index("rank4/.incoming/final_model/adapter") < arrived.index("finished")


def test_log_arrives_before_its_checkpoint(site):
    """A machine that dies between the two would otherwise leave a resumed run without the rows in between."""
    logged = []

    def on_call(method, *arguments):
        if method == "publish" and "checkpoint" in arguments[1]:
            rows = (site.folder / "rank4" / "training_log.csv").read_text().splitlines()
            logged.append(arguments[1].rpartition("-")[2] in {row.split(",")[0] for row in rows})

    site.attempt("one", on_call=on_call, steps=5, seconds=0.1)
    assert len(logged) >= 2
    assert all(logged)


def test_exit_status_0_without_a_finished_run_fails(site, monkeypatch):
    """A wrapper that hides an exit status must not make a failed run a finished one, which is never repeated."""
    monkeypatch.setattr("finetune.sweep.attempt.program", lambda task, workspace: ["sh", "-c", "echo nothing done"])
    outcome = site.attempt("one")
    assert (outcome["outcome"], outcome["exit_code"]) == ("failed", 0)
    assert outcome["lines"][0] == "nothing done"
    assert "exit status 0" in outcome["lines"][-1]


def command_lines(mark):
    """Command lines of running processes that contain the mark."""
    found = []
    for one in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(one.info["cmdline"] or [])
        if mark in line and one.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


def test_children_of_a_failed_attempt_are_ended(site, monkeypatch):
    mark = str(site.root / "child")
    script = f"{sys.executable} -S -c 'import time; time.sleep(600)' {mark} & sleep 0.3; exit 1"
    monkeypatch.setattr("finetune.sweep.attempt.program", lambda task, workspace: ["sh", "-c", script])
    outcome = site.attempt("one")
    assert (outcome["outcome"], outcome["lines"]) == ("failed", ["ended without output, with exit status 1"])
    assert not command_lines(mark)


def test_trainer_behind_a_shell_script_saves(site, monkeypatch):
    """The signal ends the shell at once; the trainer must get it too, and time for its checkpoint."""

    def on_call(method, *arguments):
        if method == "report" and arguments[0].get("rows"):
            site.coordinator.stop_reasons["rank4"] = "interrupted"

    stub = [sys.executable, "-S", str(STUB), str(site.root / "plan" / "plan.json")]
    monkeypatch.setattr(
        "finetune.sweep.attempt.program",
        lambda task, workspace: ["sh", "-c", shlex.join(stub) + ' "$@"; exit $?', "sh"],
    )
    outcome = site.attempt("one", "auto", on_call=on_call, steps=400, seconds=0.05)
    assert outcome["outcome"] == "interrupted"
    assert not command_lines(str(site.root / "plan" / "plan.json"))
    assert json.loads((site.folder / "rank4" / "experiment_config.json").read_text())["status"] == "interrupted"


def test_deleted_log_does_not_end_the_run(site):
    def on_call(method, *arguments):
        if method == "report" and arguments[0].get("rows"):
            (site.folder / "logs" / "rank4.log").unlink(missing_ok=True)

    outcome = site.attempt("one", "auto", on_call=on_call, steps=6, seconds=0.1)
    assert (outcome["outcome"], outcome["step"]) == ("finished", 6)
    assert site.starts() == [0]


@pytest.mark.parametrize(
    "broken",
    [
        "2,0.5,o.9,,,,,,,,,", '2,"0.5,0.9,,,,,,,,,', "9" * 5000 + "," * 11, "2,0.5," + "9" * 200_000 + "," * 9,
        "2,0.5\n,,,",
    ],
    ids=["a letter", "a quote", "a long step", "a long cell", "cut in two"],
)  # fmt: skip
def test_damaged_log_row_is_skipped(site, broken):
    log = site.folder / "rank4" / "training_log.csv"
    edits = []

    def on_call(method, *arguments):
        if method == "report" and arguments[0].get("rows") and not edits:
            edits.append(broken)
            with log.open("a") as file:
                file.write(broken + "\n")

    outcome = site.attempt("one", "auto", on_call=on_call, steps=6, seconds=0.2)
    assert edits
    assert (outcome["outcome"], outcome["step"]) == ("finished", 6), outcome
    steps = [row["step"] for update in site.coordinator.exchange({}) for row in update.get("rows", [])]
    assert steps[0] == 1
    assert steps[-1] == 6


def test_missing_program_is_refused(site, monkeypatch):
    monkeypatch.setattr("finetune.sweep.attempt.program", lambda task, workspace: ["/no/such/program"])
    outcome = site.attempt("one")
    assert (outcome["outcome"], outcome["step"]) == ("refused", None)
    assert outcome["lines"] == ["cannot start /no/such/program: No such file or directory; check --command"]
    assert {"number", "node", "device", "started", "ended"} <= set(outcome)


def test_data_outside_the_working_folder(site):
    site.inputs["../../elsewhere/rows.jsonl"] = "0" * 64
    outcome = site.attempt("one")
    assert outcome["outcome"] == "refused"
    assert "lies outside the folder the sweep is started in" in outcome["lines"][0]
    assert not list(site.root.rglob("elsewhere"))
    assert site.attempt("one", "auto")["outcome"] == "finished"


def test_unshared_folder_is_detected(site):
    (site.folder / TOKEN).write_text("another sweep's")
    outcome = site.attempt("one", "shared")
    assert outcome["outcome"] == "refused"
    assert "--transport ray" in outcome["lines"][0]
    assert site.attempt("one", "auto")["transport"] == "Ray"


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:1", "127.0.0.1:99999", "nowhere.invalid:6379"])
def test_address_without_a_cluster(address):
    pytest.importorskip("ray")
    with pytest.raises(UserError, match=address), ray_session(SweepOptions(address=address)):
        pass


@pytest.mark.parametrize("folder", ["x" * 90, "file"])
def test_unusable_ray_tmpdir(tmp_path, monkeypatch, folder):
    """Too long for a socket's path, or a file."""
    pytest.importorskip("ray")
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / folder))
    if folder != "file":
        (tmp_path / folder).mkdir()
    with (
        pytest.raises(UserError, match=r"cannot start Ray on this machine: .*set RAY_TMPDIR"),
        ray_session(SweepOptions()),
    ):
        pass


def test_ctrl_c_is_deferred_until_ray_has_started():
    done = []
    with pytest.raises(KeyboardInterrupt), defer_ctrl_c():
        signal.raise_signal(signal.SIGINT)
        done.append("started")
    assert done == ["started"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_full_disk_of_the_sweep_ends_no_run(tmp_path, monkeypatch, caplog):
    """An error while sweep.json is written would end every running run."""
    pytest.importorskip("ray")
    monkeypatch.setattr(logging.getLogger("sandwich"), "propagate", True)
    sweep = open_sweep(tmp_path / "s", make_points({"max_steps": 10}, {"rank": [4, 8]}), identity="x", argv=[],
                       settings={})  # fmt: skip
    runner = object.__new__(ray_runner.RayRunner)
    runner.sweep, runner.saved_at = sweep, -1e9
    monkeypatch.setattr(sweep, "save", MagicMock(side_effect=UserError("cannot write sweep.json: No space left")))
    runner._save()
    assert "cannot write sweep.json" in caplog.text
    if Path("/dev/full").exists():
        asha = Asha(sweep.folder, metric="loss", grace=10, reduction=3)
        asha.path = Path("/dev/full")
        assert not asha.should_stop("rank4", 10.0, {"step": 1, "loss": 1.0})
        assert "cannot write to /dev/full: No space left on device; decision at step 1 of rank4: go on" in caplog.text
    sweep.close()


@pytest.mark.parametrize("replay", [False, True])
def test_rows_after_the_stop_are_not_compared(tmp_path, replay):
    """Rungs that a stopped run reaches on its way out would lower the hurdle for the next one."""
    pytest.importorskip("ray")
    sweep = open_sweep(tmp_path / "s", make_points({"max_steps": 10}, {"rank": [4, 8]}), identity="x", argv=[],
                       settings={})  # fmt: skip
    runner = object.__new__(ray_runner.RayRunner)
    runner.sweep, runner.judged, runner.hopeless, runner.stop_reasons = sweep, {}, set(), {}
    runner.asha = Asha(sweep.folder, metric="loss", grace=10, reduction=3)
    good, bad = sweep.runs
    if replay:
        for run, loss in ((good, 1.0), (bad, 9.0)):
            folder = sweep.run_folder(run)
            folder.mkdir()
            lines = [",".join(COLUMNS), *(f"{step},,{loss}" + "," * (len(COLUMNS) - 3) for step in range(1, 9))]
            (folder / "training_log.csv").write_text("\n".join(lines) + "\n")
        runner._replay()
    else:
        for run, loss in ((good, 1.0), (bad, 9.0)):
            run.status = "running"
            for step in range(1, 9):
                runner._take_row(run, {"step": step, "loss": loss})
        assert runner.hopeless == {bad.name}
    assert runner.asha.reached == {good.name: 80.0, bad.name: 10.0}
    sweep.close()
