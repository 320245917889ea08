"""Real faults in the middle of a run: a full or read-only disk, limits, damage, a moved folder, a clock that jumps.

Each run is then resumed; its adapter and log must be those of a run without the fault.
"""

import contextlib
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.runs.manifest import write_manifest
from tests import faults
from tests.scripts import run_script
from tests.test_manifest import flip_256_bytes, zero_4_kb
from tests.training_runs import config_of, conversation, log_rows, run, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="signals, limits and mounts of Unix")]
FLAGS = (
    "--format", "chatml", "--batch_size", 2, "--grad_accum", 2, "--max_steps", 6, "--lr", "5e-3", "--dropout", 0.1,
    "--eval_fraction", 0.17, "--eval_steps", 3, "--logging_steps", 1, "--name", "run", "--resume", "auto",
)  # fmt: skip


@pytest.fixture(scope="module")
def training(rows, tmp_path_factory):
    model = faults.write_byte_model(tmp_path_factory.mktemp("model") / "model")
    return ("--model", model, "--dataset", rows, *FLAGS, "--save_steps", 2)


@pytest.fixture(scope="module")
def undisturbed(training, tmp_path_factory):
    """The folder of a run without a fault."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run(*training, "--experiments_dir", folder)
    assert result.returncode == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def expected(undisturbed):
    return faults.outcome(undisturbed)


@pytest.fixture
def disk(tmp_path):
    """mount(options) mounts or changes a small file system of its own; returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        again = ["-o", f"remount,{options}"] if os.path.ismount(folder) else ["-o", options]
        done = subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", folder], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a file system: {done.stderr.decode().strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


@contextlib.contextmanager
def running(tmp_path, *arguments):
    """The process of a run, once it has logged a row."""
    (tmp_path / "output").mkdir(exist_ok=True)
    group = faults.Processes(1, tmp_path / "output")
    group.start(*arguments)
    log = arguments[arguments.index("--experiments_dir") + 1] / "run" / "training_log.csv"
    deadline = time.monotonic() + 300
    try:
        while not (log.exists() and log.read_text().count("\n") > 1):
            assert not group.poll() and time.monotonic() < deadline, group.text()
            time.sleep(0.002)
        yield group
    finally:
        group.kill([0])
        group.poll(60)


def ends_in_one_line(code, text, wanted, status):
    """No traceback on the console, and one line that says what happened."""
    assert code == status, text
    errors = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and wanted in errors[0], text
    assert "Traceback" not in text, text


def resumes_to(expected, training, folder):
    result = run(*training, "--experiments_dir", folder)
    assert result.returncode == 0, result.stderr
    assert faults.outcome(folder / "run") == expected
    assert not list((folder / "run").glob(".*"))
    return result


@pytest.mark.parametrize(
    ("checkpoints", "resumed"),
    [(0, None), (0.6, None), (1.6, "resumed from step 2")],
    ids=["config", "first", "second"],
)
def test_full_disk_then_resume(checkpoints, resumed, disk, training, expected, undisturbed):
    """The disk has room for so many checkpoints and 8 KB."""
    used = sum(path.stat().st_size for path in (undisturbed / "checkpoint-2").iterdir())
    folder = disk(f"size={8 + checkpoints * used / 1024:.0f}k")
    result = run(*training, "--experiments_dir", folder)
    ends_in_one_line(result.returncode, result.stderr, "free some space", 1)
    disk("size=200m")
    result = resumes_to(expected, training, folder)
    assert (resumed in result.stderr) if resumed else ("resumed from" not in result.stderr)


def test_full_disk_at_a_row_of_the_log(disk, tmp_path, training, expected):
    """Someone else fills the disk between two checkpoints."""
    folder = disk("size=60m")
    arguments = (*training, "--max_steps", 4000, "--save_steps", 4000, "--epochs", 1, "--experiments_dir", folder)
    with running(tmp_path, *arguments) as group:
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            for size in itertools.chain(itertools.repeat(1 << 20, 60), itertools.repeat(512)):
                with contextlib.suppress(OSError):
                    filler.write(b"x" * size)
                if os.statvfs(folder).f_bavail == 0:
                    break
        assert group.poll(120), "the run did not notice"
        ends_in_one_line(group.codes[0], group.text(), "free some space", 1)
    (folder / "filler").unlink()
    rows = log_rows(folder / "run")
    assert [int(row["step"]) for row in rows] == list(range(1, len(rows) + 1))
    assert config_of(folder / "run")["status"] in ("failed", "running")  # the disk may have been too full to say so


def test_full_disk_at_the_adapter(disk, training, tmp_path):
    """Without checkpoints the run is lost, and says so; nothing incomplete is left."""
    folder = disk("size=100k")
    result = run(*training, "--save_steps", 0, "--experiments_dir", folder)
    ends_in_one_line(result.returncode, result.stderr, "free some space", 1)
    assert not list((folder / "run").glob("*final_model*"))
    assert config_of(folder / "run")["status"] == "failed"


@contextlib.contextmanager
def mounted(tmp_path, kind, options):
    """A new file system of its own; yields its folder and a call that mounts it once more."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(128 << 20)
    mount = ["mount", "-o", f"loop,{options}", image, folder]
    for command in ([f"mkfs.{kind}", "-q", image], mount):
        if not shutil.which(command[0]) or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip(f"cannot run {command[0]} for {kind}")
    try:
        yield folder, lambda: subprocess.run(mount, check=True)
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


def test_read_only_disk_then_resume(tmp_path, training, expected):
    """What ext4 does after an error of the disk; a mount with open files cannot be made read-only otherwise."""
    with mounted(tmp_path, "ext4", "errors=remount-ro") as (folder, mount_again):
        with running(tmp_path, *training, "--experiments_dir", folder) as group:
            subprocess.run(["mount", "-o", "remount,abort", folder], check=True)
            assert group.poll(120)
            ends_in_one_line(group.codes[0], group.text(), "Read-only file system", 2)
        result = run(*training, "--experiments_dir", folder, "--name", "other")
        ends_in_one_line(result.returncode, result.stderr, "cannot write to", 2)
        subprocess.run(["umount", folder], check=True)
        mount_again()
        resumes_to(expected, training, folder)


def test_used_up_quota_then_resume(tmp_path, training, expected):
    """Of btrfs, which also holds for root; writes fail with EDQUOT while the disk has room."""
    with mounted(tmp_path, "btrfs", "noatime") as (folder, _):
        if subprocess.run(["btrfs", "quota", "enable", folder], capture_output=True, check=False).returncode:
            pytest.skip("cannot turn on quotas of btrfs")
        with running(tmp_path, *training, "--experiments_dir", folder) as group:
            subprocess.run(["btrfs", "qgroup", "limit", "1K", folder], check=True)
            assert group.poll(120)
            ends_in_one_line(group.codes[0], group.text(), "free some space", 1)
        assert "Disk quota exceeded" in group.text() or "in a quota" in group.text()
        result = run(*training, "--experiments_dir", folder, "--name", "other")
        ends_in_one_line(result.returncode, result.stderr, "Disk quota exceeded", 1)
        subprocess.run(["btrfs", "quota", "disable", folder], check=True)
        resumes_to(expected, training, folder)


def in_each_child(tmp_path, code):
    """Environment in which a run executes `code` before anything else."""
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(tmp_path / "custom")}


def test_file_size_limit_then_resume(tmp_path, training, expected):
    """ulimit -f: writes fail with EFBIG."""
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
    result = run(*training, "--experiments_dir", tmp_path, env=in_each_child(tmp_path, code))
    ends_in_one_line(result.returncode, result.stderr, "free some space", 1)
    resumes_to(expected, training, tmp_path)


def test_clock_that_jumps_back(tmp_path, training, expected):
    """Each look at the clock is an hour before the last one; then the oldest checkpoint seems to be the newest."""
    code = (
        "import itertools, time\nreal, hours = time.time, itertools.count()\n"
        "time.time = lambda: real() - 3600 * next(hours)\n"
    )
    result = run(*training, "--experiments_dir", tmp_path, "--save_total_limit", 2, env=in_each_child(tmp_path, code))
    assert result.returncode == 0, result.stderr
    assert faults.outcome(tmp_path / "run") == expected
    seconds = [float(row["seconds"]) for row in log_rows(tmp_path / "run")]
    assert seconds == sorted(seconds) and seconds[0] > 0
    kept = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-4", "checkpoint-6"]
    for age, path in enumerate(kept):
        os.utime(path, (1e9 - age * 1e6, 1e9 - age * 1e6))
    assert "resumed from step 6" in run("--resume", tmp_path / "run").stderr


@pytest.mark.parametrize(("room", "code"), [(100 << 20, 0), (0, 1)])
def test_out_of_memory(room, code, tmp_path):
    """The address space is limited during the run: half of a pass fits, or nothing does."""
    import resource

    model = faults.write_byte_model(tmp_path / "model", hidden_size=256, intermediate_size=4096)
    rows = [conversation(0) for _ in range(16)]
    for number, row in enumerate(rows):
        row["messages"][0]["content"] = "Which city is it? " * 9 + f"rain {number} " * 50
    data = write_rows(tmp_path / "rows.jsonl", rows)
    arguments = ("--model", model, "--dataset", data, "--batch_size", 8, "--grad_accum", 1, "--max_steps", 3,
                 "--tokens_per_pass", 9000, "--dtype", "float32", *FLAGS[:2], *FLAGS[-4:])  # fmt: skip
    with running(tmp_path, *arguments, "--experiments_dir", tmp_path) as group:
        size = int(Path(f"/proc/{group.ids[0]}/statm").read_text().split()[0]) * resource.getpagesize() + room
        resource.prlimit(group.ids[0], resource.RLIMIT_AS, (size, size))
        assert group.poll(300) and group.codes == [code], group.text()
    if code:
        ends_in_one_line(code, group.text(), "out of memory", 1)
    else:
        assert "out of memory; continuing with" in group.text()
    config = config_of(tmp_path / "run")
    assert (config["status"], config.get("steps")) == (("failed", None) if code else ("finished", 3))


def test_vanished_folder_ends_the_run(tmp_path, training):
    with running(tmp_path, *training, "--max_steps", 4000, "--experiments_dir", tmp_path / "e") as group:
        (tmp_path / "e" / "run").rename(tmp_path / "moved")
        assert group.poll(120)
        ends_in_one_line(group.codes[0], group.text(), "has disappeared", 2)
    assert not (tmp_path / "e" / "run").exists()
    assert len(log_rows(tmp_path / "moved")) >= 1


def test_stopped_process_continues(tmp_path, training, expected):
    """SIGSTOP and SIGCONT: Ctrl-Z, a suspended machine."""
    with running(tmp_path, *training, "--experiments_dir", tmp_path) as group:
        os.kill(group.ids[0], signal.SIGSTOP)
        assert not group.poll(2)
        os.kill(group.ids[0], signal.SIGCONT)
        assert group.poll(300) and group.codes == [0], group.text()
    assert faults.outcome(tmp_path / "run") == expected


def test_two_resumes_at_once(tmp_path, training, expected):
    """One trains; the other waits for it, and is refused or finds nothing left to do."""
    with running(tmp_path, *training, "--experiments_dir", tmp_path) as group:
        while not list((tmp_path / "run").glob("checkpoint-*")):
            assert not group.poll(0.01)
    groups = [faults.Processes(1, tmp_path / name, first) for first, name in enumerate(("first", "second"))]
    try:
        for group in groups:
            group.output.mkdir()
            group.start("--resume", tmp_path / "run")
        for group in groups:
            assert group.poll(300), group.text()
            if group.codes != [0]:
                ends_in_one_line(group.codes[0], group.text(), "another process is training this run", 2)
    finally:
        for group in groups:
            group.kill([0])
    assert [0] in [group.codes for group in groups]
    assert faults.outcome(tmp_path / "run") == expected
    assert config_of(tmp_path / "run")["status"] == "finished"


def test_copies_of_a_running_run_resume(tmp_path, training, expected):
    """`cp -r` at any moment: a copied file may be half written, a folder half copied."""
    copies = []
    with running(tmp_path, *training, "--experiments_dir", tmp_path / "e") as group:
        while not group.poll(0.05):
            copies.append(tmp_path / f"copy_{len(copies)}")
            copies[-1].mkdir()
            subprocess.run(["cp", "-r", tmp_path / "e" / "run", copies[-1]], capture_output=True, check=False)
        assert group.codes == [0], group.text()
    for folder in copies[:: max(1, len(copies) // 4)]:
        resumes_to(expected, training, folder)


def test_edited_log_then_resume(tmp_path, training, expected):
    """Half a line, bytes that are not text, rows of later steps."""
    with running(tmp_path, *training, "--experiments_dir", tmp_path) as group:
        while not list((tmp_path / "run").glob("checkpoint-*")):
            assert not group.poll(0.01)
    with (tmp_path / "run" / "training_log.csv").open("ab") as file:
        file.write(b'"\n\xff\x00,,,\n99,1,0.1,,,,,,,,,,,\n6,0.5,0.3')
    resumes_to(expected, training, tmp_path)


def test_checkpoint_that_cannot_be_removed(tmp_path, training, expected):
    """A read-only mount; the run says so, and continues once it can."""
    assert run(*training, "--experiments_dir", tmp_path).returncode == 0
    folder = tmp_path / "run"
    newest = folder / "checkpoint-6"
    mount = subprocess.run(["mount", "--bind", newest, newest], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip(f"cannot mount a file system: {mount.stderr.decode().strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", newest], check=True)
        result = run("--resume", folder / "checkpoint-4")
        ends_in_one_line(result.returncode, result.stderr, "checkpoint-6 cannot be removed", 2)
    finally:
        subprocess.run(["umount", newest], check=True)
    resumes_to(expected, training, tmp_path)


def test_full_disk_at_the_results_of_an_evaluation(disk, tmp_path, undisturbed, rows):
    """One line and no half written file; the same command works once there is room."""
    folder = disk("size=8k")
    arguments = (undisturbed, "--dataset", rows, "--output", folder / "results", "--max_new_tokens", 8)
    result = run_script("evaluate_lora.py", *arguments)
    ends_in_one_line(result.returncode, result.stderr, "free some space", 1)
    for path in folder.rglob("*.json"):
        json.loads(path.read_text())
    disk("size=60m")
    result = run_script("evaluate_lora.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert (folder / "results" / "finetuned_model_metrics.json").is_file()
    assert not list((folder / "results").glob(".*"))


def test_twenty_runs_in_one_second():
    """In one folder of runs, which others read meanwhile."""
    done = subprocess.run([sys.executable, "-m", "tests.soak", "--runs", "20"], cwd=faults.ROOT, capture_output=True,
                          text=True, timeout=1800, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_damaged_checkpoints_then_resume(tmp_path, training, expected):
    """The newest complete checkpoint is used and named, and no other one is deleted before it has loaded."""
    assert run(*training, "--experiments_dir", tmp_path).returncode == 0
    folder = tmp_path / "run"
    shutil.rmtree(folder / "final_model")
    zero_4_kb(folder / "checkpoint-6" / "adapter_model.safetensors")
    flip_256_bytes(folder / "checkpoint-4" / "optimizer.pt")
    result = run("--resume", folder, "--dry_run")
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
    result = resumes_to(expected, training, tmp_path)
    for text in ("checkpoint-6: its adapter_model.safetensors is damaged", "checkpoint-4: its optimizer.pt is damaged",
                 "resuming", "at checkpoint-2", "resumed from step 2"):  # fmt: skip
        assert text in result.stderr
    for path in folder.glob("checkpoint-*"):
        (path / "scheduler.pt").unlink()
    result = run("--resume", folder)
    ends_in_one_line(result.returncode, result.stderr, "no complete checkpoint", 2)
    assert len(list(folder.glob("checkpoint-*"))) == 3


class Planted:
    def __reduce__(self):
        return (os.system, ("touch planted_pickle_ran",))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_planted_pickle_is_not_run(name, tmp_path, training):
    """In a checkpoint with a manifest that fits: someone else's checkpoint can have one."""
    result = run(*training, "--max_steps", 4, "--experiments_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    checkpoint = tmp_path / "run" / "checkpoint-4"
    torch_file = (
        f"import torch, sys\nfrom tests.test_faults import Planted\ntorch.save(Planted(), {str(checkpoint / name)!r})"
    )
    subprocess.run([sys.executable, "-c", torch_file], check=True)
    (checkpoint / "training_args.bin").write_bytes(pickle.dumps(Planted()))
    write_manifest(checkpoint)
    result = run("--resume", tmp_path / "run", cwd=tmp_path, env={"PYTHONPATH": str(faults.ROOT)})
    ends_in_one_line(result.returncode, result.stderr, "cannot be loaded", 2)
    assert not list(tmp_path.rglob("planted_pickle_ran"))
    assert checkpoint.is_dir()
