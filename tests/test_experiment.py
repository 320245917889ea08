"""Experiment folders, their log and locks, atomic writes, one-line errors."""

import errno
import io
import json
import os
import shlex
import subprocess
import sys
import threading
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock, Timeout
from safetensors.numpy import save_file

from finetune import distributed
from finetune.errors import UserError, one_line_errors
from finetune.files import open_atomic, write_text_atomic
from finetune.runs.experiment import CONFIG, COUNTERS, Experiment, check_writable, find_resumable, run_name
from finetune.runs.manifest import write_manifest
from finetune.runs.run_log import COLUMNS, RunLog, read_rows

ROOT = Path(__file__).resolve().parent.parent

WHEN = datetime(2025, 12, 18, 14, 30, 22)


@pytest.mark.parametrize(
    ("model", "rank", "alpha", "lr", "epochs", "wanted"),
    [
        ("kakaocorp/kanana-1.5-2.1b-instruct-2505", 16, 32, 2e-4, 3,
         "kanana_1.5_2.1b_instruct_2505_r16_a32_lr2em04_ep3_20251218_143022"),
        ("Qwen/Qwen2.5-3B-Instruct", 8, 16, 1.5e-5, 0.5, "Qwen2.5_3B_Instruct_r8_a16_lr1.5em05_ep0.5_20251218_143022"),
        ("/models/my model/", 4, 8, 1, 1, "my_model_r4_a8_lr1ep00_ep1_20251218_143022"),
        ("/models/한국어", 4, 8, 1, 1, "model_r4_a8_lr1ep00_ep1_20251218_143022"),
        ("..", 4, 8, 1, 1, "model_r4_a8_lr1ep00_ep1_20251218_143022"),
        ("org/" + 300 * "x", 4, 8, 1, 1, 100 * "x" + "_r4_a8_lr1ep00_ep1_20251218_143022"),
    ],
)  # fmt: skip
def test_run_names(model, rank, alpha, lr, epochs, wanted):
    assert run_name(model, rank, alpha, lr, epochs, WHEN) == wanted


def test_runs_of_one_second_get_their_own_folders(tmp_path):
    made = []

    def create():
        made.append(Experiment.create(tmp_path, "run", {"who": threading.get_ident()}, exact_name=False).folder)

    threads = [threading.Thread(target=create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.name for p in made) == sorted(["run", *(f"run_{i}" for i in range(2, 9))])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in made)
    assert all((p / CONFIG).is_file() for p in made)


def test_named_run_is_never_overwritten(tmp_path):
    first = Experiment.create(tmp_path, "mine", {"a": 1}, exact_name=True)
    with pytest.raises(UserError, match="exists already"):
        Experiment.create(tmp_path, "mine", {"a": 2}, exact_name=True)
    assert Experiment.open(first.folder).config == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root and Windows may write anywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="--experiments_dir"):
        check_writable(tmp_path / "experiments")


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "experiments").write_text("")
    with pytest.raises(UserError, match="--experiments_dir"):
        check_writable(tmp_path / "experiments")


def make_run(folder, status, checkpoints):
    config = {"status": status, "flags": {}, "data": {}, "format": {}}
    experiment = Experiment.create(folder, f"run_{status}", config, exact_name=True)
    for step in checkpoints:
        make_checkpoint(experiment.folder / f"checkpoint-{step}")
    return experiment


def make_checkpoint(folder):
    """The files that a resume reads, valid but nearly empty."""
    folder.mkdir()
    step = folder.name.removeprefix("checkpoint-")
    for name in ("adapter_config.json", "trainer_state.json", COUNTERS):
        content = {"trainer_state.json": {"global_step": int(step)}, COUNTERS: {"tokens_seen": 1}}.get(name, {"a": 1})
        (folder / name).write_text(json.dumps(content))
    save_file({"a": np.zeros(8, np.float32)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(folder / name, "w") as file:
            file.writestr("a", "some state")
    write_manifest(folder)


def test_resume_finds_the_newest_checkpoint(tmp_path):
    finished = make_run(tmp_path, "finished", [9])
    stopped = make_run(tmp_path, "interrupted", [2, 10])
    (stopped.folder / ".saving").mkdir()
    for target in ("", str(stopped.folder)):
        experiment, checkpoint = find_resumable(target, tmp_path)
        assert experiment.folder == stopped.folder
        assert checkpoint.name == "checkpoint-10"
    assert find_resumable(str(finished.folder / "checkpoint-9"), tmp_path)[1].name == "checkpoint-9"
    empty = make_run(tmp_path, "failed", [])
    with pytest.raises(UserError, match="no complete checkpoint"):
        find_resumable(str(empty.folder), tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        (tmp_path / "other" / "checkpoint-1").mkdir(parents=True)
        find_resumable(str(tmp_path / "other"), tmp_path)


def test_resume_of_a_run_that_is_named_like_a_checkpoint(tmp_path):
    run = make_run(tmp_path, "interrupted", [2])
    run.folder.rename(tmp_path / "checkpoint-5")
    assert find_resumable(str(tmp_path / "checkpoint-5"), tmp_path)[1] == tmp_path / "checkpoint-5" / "checkpoint-2"


def test_run_is_locked_before_its_checkpoints_are_read(tmp_path):
    """The process that has the lock may still save one, or remove one."""
    run, locked = make_run(tmp_path, "interrupted", [2]), []

    def lock(folder):
        locked.append(folder)
        make_checkpoint(folder / "checkpoint-4")

    assert find_resumable("", tmp_path, lock)[1].name == "checkpoint-4"
    assert locked == [run.folder]
    with pytest.raises(UserError, match="not a run folder"):
        (tmp_path / "other").mkdir()
        find_resumable(str(tmp_path / "other"), tmp_path, lock)
    assert locked == [run.folder]


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
             "adapter_config.json", COUNTERS],
)  # fmt: skip
@pytest.mark.parametrize("cut", [True, False])
def test_incomplete_checkpoint_is_skipped(tmp_path, name, cut):
    run = make_run(tmp_path, "interrupted", [2, 4])
    newest = run.folder / "checkpoint-4"
    data = (newest / name).read_bytes()
    (newest / name).unlink()
    if cut:
        (newest / name).write_bytes(data[:-3])
    assert find_resumable(str(run.folder), tmp_path)[1].name == "checkpoint-2"
    assert find_resumable("", tmp_path)[1].name == "checkpoint-2"
    with pytest.raises(UserError, match=rf"checkpoint-4: it.*{name}.*name another checkpoint"):
        find_resumable(str(newest), tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("trainer_state.json", "[]", "trainer_state.json: "), (COUNTERS, "3", "not an object"),
        ("trainer_state.json", '{"global_step": 7}', "of step 7: the folder was renamed"),
        *(
            ("trainer_state.json", json.dumps({"global_step": 4} | change), rf"trainer_state.json, {entry}")
            for change, entry in [
                ({"global_step": "4"}, "global_step: '4' is not of type 'integer'"),
                ({"global_step": [[[]]]}, "global_step"), ({"epoch": "x"}, "epoch"),
                ({"best_metric": "low"}, "best_metric"), ({"log_history": [5]}, "log_history, 0"),
                ({"best_global_step": 2.5}, "best_global_step"), ({"stateful_callbacks": 5}, "stateful_callbacks"),
                ({"stateful_callbacks": {"EarlyStoppingCallback": {"attributes": {"early_stopping_patience_counter":
                  "x"}}}}, "stateful_callbacks, EarlyStoppingCallback, attributes, early_stopping_patience_counter"),
            ]
        ),
    ],
)  # fmt: skip
def test_damaged_checkpoint_is_skipped(tmp_path, name, text, why):
    """Its manifest may fit: others can write both."""
    run = make_run(tmp_path, "interrupted", [2, 4])
    (run.folder / "checkpoint-4" / name).write_text(text)
    write_manifest(run.folder / "checkpoint-4")
    (run.folder / "checkpoint-9").write_text("a file")
    assert find_resumable(str(run.folder), tmp_path)[1].name == "checkpoint-2"
    with pytest.raises(UserError, match=rf"checkpoint-4: its ({name} is )?{why}"):
        find_resumable(str(run.folder / "checkpoint-4"), tmp_path)


def test_resume_ignores_folders_of_other_programs(tmp_path):
    run = make_run(tmp_path, "interrupted", [2])
    for number, text in enumerate(("{", "[]", '"x"', '{"status": "running"}')):
        folder = tmp_path / f"other_{number}"
        folder.mkdir()
        (folder / CONFIG).write_text(text)
        with pytest.raises(UserError, match=CONFIG):
            find_resumable(str(folder), tmp_path)
    assert find_resumable("", tmp_path)[0].folder == run.folder


def step(log, number, loss_sum=2.0, trained=4):
    log.add_step(loss_sum=loss_sum, tokens=100, trained_tokens=trained, computed_tokens=60)
    log.log_row(step=number, epoch=number / 10, learning_rate=1e-3, grad_norm=0.5)


def test_log_has_one_row_per_step_with_eval_loss(tmp_path):
    log = RunLog(tmp_path / "training_log.csv")
    log.start()
    step(log, 1)
    step(log, 2)
    log.log_eval(step=2, epoch=0.2, eval_loss=0.75)
    step(log, 3, loss_sum=1.0)
    log.flush()
    lines = log.path.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    rows = [dict(zip(COLUMNS, line.split(","), strict=True)) for line in lines[1:]]
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert [row["loss"] for row in rows] == ["0.5", "0.5", "0.25"]
    assert [row["eval_loss"] for row in rows] == ["", "0.75", ""]
    assert [row["tokens_seen"] for row in rows] == ["100", "200", "300"]
    assert [row["trained_tokens"] for row in rows] == ["4", "8", "12"]


def test_resume_drops_rows_after_the_checkpoint(tmp_path):
    path = tmp_path / "training_log.csv"
    log = RunLog(path)
    log.start()
    for number in range(1, 5):
        step(log, number)
    log.flush()
    with path.open("a") as file:
        file.write("5,0.5,0.4")  # killed in the middle of a line
    before = path.read_text().splitlines()
    again = RunLog(path)
    again.restore(log.state())
    again.start(resumed_at_step=2)
    assert path.read_text().splitlines() == before[:3]
    assert [row[0] for row in read_rows(path)] == ["1", "2"]


@pytest.mark.parametrize("written", [2, 3])
def test_new_writer_writes_each_row_once(tmp_path, written):
    """The first process dies while it writes a row, before or after that of the last complete step."""
    path = tmp_path / "training_log.csv"
    first, second = RunLog(path), RunLog(None)
    for log in (first, second):
        log.start()
        for number in range(1, 4):
            step(log, number)
            log.log_eval(step=number, epoch=number / 10, eval_loss=0.5)
            if number <= written:
                log.flush()
    with path.open("a") as file:
        file.write("4,0.4,0.")
    second.become_writer(path, 3)
    second.flush()
    assert [row[0] for row in read_rows(path)] == ["1", "2", "3"]
    assert path.read_text().endswith("\n")


def test_config_is_written_atomically(tmp_path, monkeypatch):
    experiment = Experiment.create(tmp_path, "run", {"a": 1}, exact_name=True)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("finetune.errors.os.replace", fail)
    with pytest.raises(UserError, match="disk full"):
        experiment.update(a=2)
    monkeypatch.undo()
    assert json.loads((experiment.folder / CONFIG).read_text()) == {"a": 1}
    assert [p.name for p in experiment.folder.iterdir()] == [CONFIG]


@pytest.mark.parametrize(
    ("error", "status", "raised"),
    [
        (KeyboardInterrupt(), "interrupted", KeyboardInterrupt),
        (UserError("the loss is nan"), "failed", UserError),
        (ZeroDivisionError("a bug"), "failed", ZeroDivisionError),
        # What a full disk looks like from Python, safetensors and torch.
        (OSError(errno.ENOSPC, "No space left on device"), "failed", OSError),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "failed", OSError),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "failed", OSError),
    ],
)
def test_config_records_how_a_run_ended(tmp_path, error, status, raised):
    run = make_run(tmp_path, "running", [2])
    with pytest.raises(raised) as caught, run.record_outcome():
        raise error
    assert (Experiment.open(run.folder).config["status"], "ended" in run.config) == (status, True)
    if raised is OSError:
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(run.folder))


@pytest.mark.parametrize("processes", [1, 2])
def test_run_is_trained_by_one_process_at_a_time(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(distributed, "LOCK_TIMEOUT_SECONDS", 0)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    other = FileLock(tmp_path / distributed.LOCK)
    other.acquire()
    with pytest.raises(UserError, match="another process is training this run"):
        distributed.lock_run(tmp_path)
    other.release()
    monkeypatch.setenv("RANK", str(processes - 1))
    if processes == 2:
        distributed.lock_run(tmp_path)  # does nothing: rank 0 locks
        other.acquire(timeout=0)
        other.release()
    monkeypatch.setenv("RANK", "0")
    distributed.lock_run(tmp_path)
    with pytest.raises(Timeout):
        other.acquire(timeout=0)


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK=x"),
        ({"WORLD_SIZE": "2"}, "RANK expected, but not set; start with torchrun, or unset WORLD_SIZE"),
    ],
)
def test_unusable_launcher_variables(variables, wanted, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=wanted):
        distributed.rank()
        distributed.start()
    monkeypatch.setenv("WORLD_SIZE", "")
    assert distributed.size() == 1


def test_more_processes_than_gpus(monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "2"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"process 3 of this machine has no GPU: .*--nproc_per_node must be <= 2"):
        distributed.start()


def test_wait_for_lock_without_lock_support(tmp_path, monkeypatch):
    def acquire(self, **rest):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(distributed, "_group", object())
    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    assert not distributed.wait_for_lock(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="has POSIX shells and devices")
@pytest.mark.parametrize(
    ("stdout", "code", "said"), [(">&-", 3, ""), ("| true", 3, ""), ("> /dev/full", 1, "No space left")]
)
def test_closed_or_full_stdout(stdout, code, said):
    """Unflushed output must not fail at Python's own flush at exit, which has an exit status of its own."""
    if stdout == "> /dev/full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    script = (
        "import sys, time\nfrom finetune.errors import one_line_errors\n@one_line_errors\ndef main():\n"
        "    time.sleep(0.2)\n    sys.stdout.isatty()\n    print('x')\n    return 3\nsys.exit(main())"
    )
    line = f"{shlex.join([sys.executable, '-c', script])} {stdout}; exit ${{PIPESTATUS[0]}}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    result = subprocess.run(["bash", "-c", line], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == bool(said)


@pytest.mark.skipif(os.name == "nt", reason="has no pseudo-terminals")
def test_closed_terminal_does_not_end_the_work(tmp_path):
    """Writing to it is an error, also for a command that handles SIGHUP."""
    import pty

    script = (
        "import pathlib, signal, sys, threading\nfrom finetune.errors import one_line_errors\n@one_line_errors\n"
        "def main():\n    closed = threading.Event()\n    signal.signal(signal.SIGHUP, lambda *_: closed.set())\n"
        "    print('ready', sys.stdout.isatty() and sys.stderr.isatty())\n"
        "    while not closed.wait(0.1):\n        print('x', file=sys.stderr)\n"
        "    print('y')\n    print('z', file=sys.stderr)\n    pathlib.Path(sys.argv[1]).touch()\n    return 3\n"
        "sys.exit(main())"
    )
    process, terminal = pty.fork()
    if not process:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", script, str(tmp_path / "done")])
    with io.FileIO(terminal, "rb") as file:
        said = b""
        while b"x" not in said:
            said += file.read(1000)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 3
    assert b"ready True" in said and (tmp_path / "done").exists()


def test_stdout_that_cannot_encode_a_letter():
    script = (
        "import sys\nfrom finetune.errors import one_line_errors\n"
        "sys.exit(one_line_errors(lambda: print('experiments/\\xfc\\u5b57'))())"
    )
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, check=False)
    assert (result.returncode, result.stdout.split()) == (0, [rb"experiments/\xfc\u5b57"]), result.stderr


def test_user_error_of_a_full_disk_exits_with_1(tmp_path, capsys):
    @one_line_errors
    def write():
        with open_atomic(tmp_path / "file"):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    assert write() == 1
    assert "file: Disk quota exceeded; free some space" in capsys.readouterr().err
    assert one_line_errors(fail)(UserError("row 3 says: No space left on device")) == 2


@pytest.mark.parametrize("size", [1 << 50, 1 << 62])
def test_out_of_memory_exits_with_1(size, tmp_path, capsys):
    """The errors of PyTorch's allocator and of Python's."""
    import torch

    allocate = torch.empty if size == 1 << 50 else bytearray
    with (
        pytest.raises((RuntimeError, MemoryError)),
        Experiment.create(tmp_path, "run", {}, exact_name=True).record_outcome(),
    ):
        allocate(size)
    assert one_line_errors(allocate)(size) == 1
    said = capsys.readouterr().err
    assert said.count("error: out of memory (") == 1 and "Traceback" not in said


def test_panic_of_a_rust_library_is_one_line(capsys):
    """A tokenizer's pattern that backtracks without an end."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    assert one_line_errors(tokenizer.encode)("a" * 100 + "b") == 2
    assert "error: a library failed (" in capsys.readouterr().err


def test_error_hides_passwords_and_full_disk_exits_1(capsys):
    assert one_line_errors(fail)(UserError("model https://u:hush@host/x and ssh://hush@h: no")) == 2
    assert one_line_errors(fail)(OSError(errno.ENOSPC, "No space left on device", "run/x")) == 1
    said = capsys.readouterr().err
    assert "hush" not in said
    assert "https://***@host/x" in said
    assert "error: run/x: No space left" in said


def fail(error):
    raise error


@pytest.mark.skipif(os.name == "nt", reason="there are no such files")
def test_atomic_write_to_a_pipe_and_a_symlink(tmp_path):
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text_atomic(pipe, "text")
    assert os.read(reader, 100) == b"text"
    assert pipe.is_fifo()
    os.close(reader)
    file.write_text("old")
    link.symlink_to(file)
    write_text_atomic(link, "new")
    assert (link.is_symlink(), file.read_text()) == (True, "new")


def test_failed_write_leaves_no_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), open_atomic(tmp_path / "a" / "b" / "file"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), open_atomic(tmp_path / "a" / "b" / "file"):
        (tmp_path / "a" / "theirs").write_text("")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "theirs"]


def test_letters_that_cannot_be_encoded(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # what a pipe on Windows is
    monkeypatch.setattr("sys.stdout", stream)
    assert one_line_errors(print)("날씨.jsonl", flush=True) == 0
    assert stream.buffer.getvalue().strip() == rb"\ub0a0\uc528.jsonl"
    # A file name that is not UTF-8: Python has its bytes as lone surrogates.
    write_text_atomic(tmp_path / "config.json", json.dumps({"name": "run\udcff"}, ensure_ascii=False))
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) == {"name": "run\udcff"}


def test_check_writable_can_create_nothing(tmp_path):
    assert check_writable(tmp_path / "a" / "b", make=False) == tmp_path / "a" / "b"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--experiments_dir"):
        check_writable(tmp_path / "file" / "b", make=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_resume_of_a_dot_uses_the_real_name(tmp_path, monkeypatch):
    run = make_run(tmp_path, "failed", [2])
    monkeypatch.chdir(run.folder)
    assert find_resumable(".", tmp_path)[0].folder.name == "run_failed"
    monkeypatch.chdir(run.folder / "checkpoint-2")
    for target in (".", ".."):
        assert find_resumable(target, tmp_path)[1].name == "checkpoint-2"


def test_log_of_another_version_or_after_a_crash(tmp_path):
    older = [name for name in COLUMNS[:12] if name not in ("computed_tokens_per_second", "peak_memory_gb")]
    path = tmp_path / "training_log.csv"
    path.write_bytes(f"{','.join(older)}\n{','.join(map(str, range(1, 11)))}\n".encode() + b"\xff\x00\n2,3\n3,")
    assert read_rows(path) == [[*"123456789", "", "10", "", "", ""]]
    log = RunLog(path)
    log.start(resumed_at_step=1)
    assert path.read_text().splitlines() == [",".join(COLUMNS), "1,2,3,4,5,6,7,8,9,,10,,,"]
    path.write_text("")
    assert read_rows(path) == []
