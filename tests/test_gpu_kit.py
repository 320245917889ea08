"""The kit behind `make gpu`, with parts and tests that fail in every way; the GPU itself is not needed."""

import importlib
import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu, memory
from benchmarks.gpu_parts import kit
from benchmarks.gpu_parts.report import page
from benchmarks.gpu_parts.schedule import MAX_AT_ONCE, Part, groups, run_parts, write_record
from benchmarks.throughput_parts.random_model import write_in_a_process
from finetune import settings
from finetune.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def python(name, code, limit=60.0, **more):
    return Part(name, [sys.executable, "-c", code], limit, **more)


def writes(path, value):
    return f"import pathlib; pathlib.Path({str(path)!r}).write_text({json.dumps(value)!r})"


def run(parts, record, folder, seconds=60.0):
    run_parts(parts, record, lambda one: write_record(one, folder / "gpu.json", page(one)), seconds, folder / "logs")
    return {name: outcome["status"] for name, outcome in record["parts"].items()}


def test_failing_parts_stop_nothing(tmp_path):
    parts = [
        python("crash", "import os; print('final line', flush=True); os.abort()"),
        python("hang", f"{writes(tmp_path / 'half.json', {'tokens': 3})}; import time; time.sleep(600)", 1.0,
               result=tmp_path / "half.json"),
        Part("missing", [str(tmp_path / "no_such_program")], 5.0),
        python("broken", "open('" + str(tmp_path / "broken.json") + "', 'w').write('{')",
               result=tmp_path / "broken.json"),
        python("good", writes(tmp_path / "good.json", {"seconds": 2.5}), result=tmp_path / "good.json"),
    ]  # fmt: skip
    record = {}
    assert run(parts, record, tmp_path) == {
        "crash": "failed", "hang": "time limit", "missing": "failed", "broken": "failed", "good": "done",
    }  # fmt: skip
    saved = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert saved["parts"]["hang"]["result"] == {"tokens": 3}  # what it had written before the limit
    assert saved["parts"]["good"]["result"] == {"seconds": 2.5}
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| hang | time limit |" in text and "final line" in text and "- seconds: 2.5" in text


def test_second_start_runs_what_is_missing(tmp_path):
    marker = tmp_path / "runs.txt"
    count = f"open({str(marker)!r}, 'a').write('x')"
    repaired = tmp_path / "repaired"
    later = f"import sys, os; sys.exit(not os.path.exists({str(repaired)!r}))"
    record = {}
    parts = [python("once", count), python("later", later)]
    assert run(parts, record, tmp_path) == {"once": "done", "later": "failed"}
    repaired.touch()
    assert run(parts, record, tmp_path) == {"once": "done", "later": "done"}
    assert marker.read_text() == "x"


def test_the_time_of_all_parts_is_limited(tmp_path):
    record = {}
    parts = [python("slow", "import time; time.sleep(600)", 500), python("late", "pass")]
    assert run(parts, record, tmp_path, seconds=2) == {"slow": "time limit", "late": "no time left"}
    assert record["parts"]["slow"]["limit"] <= 2


def test_parts_of_a_group_run_at_the_same_time(tmp_path):
    """Each waits for the other's file: one after the other they would end at their limit."""

    def meets(own, other):
        return (f"import pathlib, time; folder = pathlib.Path({str(tmp_path)!r}); (folder / '{own}').touch()\n"
                f"while not (folder / '{other}').exists(): time.sleep(0.01)")  # fmt: skip

    parts = [python("a", meets("a", "b"), group="g"), python("b", meets("b", "a"), group="g")]
    assert run(parts, {}, tmp_path) == {"a": "done", "b": "done"}


def test_children_of_a_stopped_part_are_stopped(tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(one.pid)); time.sleep(600)"
    )
    run([python("parent", code, 3.0)], {}, tmp_path)
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_full_disk_prints_the_record(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from benchmarks.gpu_parts.schedule import write_record\n"
        "write_record({'parts': {'a': {'status': 'done', 'result': 'x' * 100}}}, Path(sys.argv[2]), 'page')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path / "gpu.json")],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "cannot write" in done.stdout and "x" * 100 in done.stdout
    assert not (tmp_path / "gpu.json").exists()


def test_every_test_has_an_outcome(tmp_path):
    """One that hangs and one that kills the process cost themselves only."""
    (tmp_path / "test_some.py").write_text(
        "import os, time, pytest\n"
        "def test_good(): pass\n"
        "def test_hangs(): time.sleep(600)\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_aborts(): os._exit(9)\n"
        "def test_skipped(): pytest.skip('no GPU')\n",
        encoding="utf-8",
    )
    out = tmp_path / "tests.json"
    command = [sys.executable, "-m", "benchmarks.gpu_parts.limit_tests", str(tmp_path / "test_some.py"), "--limit", "2",
               "--json", str(out)]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = {entry["test"].split("::")[1]: entry for entry in json.loads(out.read_text(encoding="utf-8"))}
    assert {name: entry["outcome"] for name, entry in outcomes.items()} == {
        "test_good": "passed", "test_hangs": "time limit or crash", "test_bad": "failed",
        "test_aborts": "time limit or crash", "test_skipped": "skipped",
    }  # fmt: skip
    assert "assert 1 == 2" in outcomes["test_bad"]["error"]


def test_packed_wheels_leave_out_unneeded_files(tmp_path):
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    record = "bitsandbytes-1.0.dist-info/RECORD"
    files = ("bitsandbytes/lib_cuda118.so", f"bitsandbytes/lib_{kit.CUDA_LIBRARY}.so", "bitsandbytes/__init__.py")
    with zipfile.ZipFile(wheel, "w") as made:
        for name in files:
            made.writestr(name, "data")
        made.writestr(record, "".join(f"{name},sha256=x,4\n" for name in files))
    kit._trim(tmp_path, "bitsandbytes", lambda path: path.suffix == ".so" and kit.CUDA_LIBRARY not in path.stem)
    with zipfile.ZipFile(wheel) as kept:
        assert kept.namelist() == [files[1], files[2], record]
        assert kept.read(record).decode() == f"{files[1]},sha256=x,4\n{files[2]},sha256=x,4\n"


def test_wheels_are_installed_once_without_an_index(tmp_path, monkeypatch):
    info = "packed_thing-1.0.dist-info"
    wheel = tmp_path / "packed_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("packed_thing.py", "value = 3\n")
        made.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: packed_thing\nVersion: 1.0\n")
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", f"packed_thing.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # an environment without Unsloth
    paths = kit.install_wheels(tmp_path, tmp_path / "site")
    assert paths == f"{tmp_path / 'site'}:before"
    assert (tmp_path / "site" / "packed_thing.py").is_file()
    monkeypatch.setattr(subprocess, "run", None)
    assert kit.install_wheels(tmp_path, tmp_path / "site") == paths


def test_model_that_cannot_be_written_is_one_line(tmp_path, capfd):
    """Its process has said why: a full disk, mostly."""
    with pytest.raises(UserError, match="model could not be written"):
        write_in_a_process({"model_type": "llama"}, tmp_path / "model", "float32", tmp_path / "no_tokenizer")
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="for machines without a GPU")
def test_without_a_gpu_is_one_line(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_limits_leave_valuable_parts_their_turn(tmp_path):
    """Where everything before it hangs, too, on 15 cores or more; half a minute of nine is for the start."""
    parts = gpu.parts_for_gpu(tmp_path, "smollm2-135m")
    names = [part.name for part in parts]
    valuable = parts[: names.index("ranks_1")]
    assert names[0] == "throughput_1.5b"
    assert {name.split("_")[0] for name in names[: len(valuable)]} == {
        "throughput", "doctor", "tests", "train", "losses", "generation", "evaluation", "memory",
    }  # fmt: skip
    assert all(len(group) <= MAX_AT_ONCE for group in groups(valuable))
    assert sum(max(part.limit for part in group) for group in groups(valuable)) <= 9 * 60 - 30
    assert gpu.build_parser().get_default("minutes") == 9


def test_each_gpu_test_is_in_one_part(tmp_path):
    expressions = [part.command[part.command.index("-k") + 1] for part in gpu.parts_for_gpu(tmp_path, "smollm2-135m")
                   if part.name.startswith("tests_")]  # fmt: skip
    collected = [
        line
        for expression in expressions
        for line in subprocess.run(
            [sys.executable, "-m", "pytest", "tests/gpu", "-q", "--collect-only", "-k", expression], cwd=ROOT,
            capture_output=True, text=True, check=True,
        ).stdout.splitlines()
        if "::" in line
    ]  # fmt: skip
    assert len(collected) == len(set(collected)) == 9


def test_failed_setting_fails_its_part(tmp_path, monkeypatch):
    """Otherwise the second start would leave it out."""
    monkeypatch.setattr(memory, "CPU_CASES", {"bad": memory.Case(memory.SMALL, 64, flags=("--rank", "0"))})
    monkeypatch.setattr(sys, "argv", ["memory.py", "--only", "bad", "--json", str(tmp_path / "bad.json")])
    assert memory.main() == 1
    assert "--rank" in json.loads((tmp_path / "bad.json").read_text(encoding="utf-8"))[0]["failed"]


def test_every_part_of_the_kit_parses(tmp_path):
    """Each command's flags are known to the script that it starts."""
    for part in gpu.parts_for_gpu(tmp_path, "smollm2-135m") + gpu.parts_for_rehearsal(tmp_path, str(tmp_path)):
        script, *arguments = part.command[1:]
        if script == "train_lora.py" and arguments != ["--doctor"]:
            settings.parse(arguments)
        elif script == "evaluate_lora.py":
            importlib.import_module("evaluate_lora").build_parser().parse_args(arguments)
        elif script.startswith("benchmarks/") and script != "benchmarks/memory.py":
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).build_parser().parse_args(arguments)
