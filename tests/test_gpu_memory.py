"""gpu_memory.py without a GPU, on a fake driver, and its log when the monitor is killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")

import gpu_memory  # noqa: E402
from finetune.errors import UserError  # noqa: E402
from finetune.memory import devices, watch  # noqa: E402
from tests.fake_nvml import FakeGpu, FakeNvml  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


@pytest.fixture
def nvml(monkeypatch):
    """Replace pynvml by a fake driver with these GPUs."""

    def install(*gpus, **options):
        fake = FakeNvml(*gpus, **options)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, str(ROOT / "gpu_memory.py"), *map(str, arguments)], capture_output=True, text=True,
        encoding="utf-8", check=False, **options,
    )  # fmt: skip


# --- check ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "there is no NVIDIA driver"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "installed but not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "does not answer"),
    ],
)
def test_check_without_a_driver_says_why(nvml, capsys, code, words):
    nvml(init_error=code)
    assert gpu_memory.main(["check"]) == 0
    assert words in capsys.readouterr().out


def test_monitor_without_a_driver_says_why(nvml, capsys):
    nvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert gpu_memory.main(["monitor"]) == 0
    assert "Nothing to watch: there is no NVIDIA driver" in capsys.readouterr().out


def test_check_and_monitor_on_this_machine(tmp_path):
    """With the real pynvml, in a process of its own."""
    checked = run("check")
    assert checked.returncode == 0 and not checked.stderr
    assert "No GPU can be used here" in checked.stdout or "CUDA up to" in checked.stdout
    watched = run("monitor", "--samples", "1", "--interval", "0.1", "--output", tmp_path / "log.json")
    assert watched.returncode == 0 and not watched.stderr
    assert ("Nothing to watch" in watched.stdout) == ("No GPU" in checked.stdout)
    assert (tmp_path / "log.json").exists() == ("No GPU" not in checked.stdout)  # no empty log


def test_driver_without_a_gpu(nvml, capsys):
    fake = nvml()
    assert gpu_memory.main(["check"]) == 0 and gpu_memory.main(["monitor"]) == 0
    assert capsys.readouterr().out.count("the NVIDIA driver") == 2
    assert fake.opened == 0  # closed


def test_check_says_what_each_gpu_can_train(nvml, capsys):
    nvml(FakeGpu(), FakeGpu(name="Tesla T4", total=15 * GIB, capability=(7, 5), readings=[14 * GIB]))
    assert gpu_memory.main(["check"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Driver 580.82.07, CUDA up to 13.0" in out
    assert "0 NVIDIA GeForce RTX 3060" in out and "8.6" in out and "7.5" in out
    assert "GPU 0 can now train models of up to about 14 B parameters" in out
    assert "GPU 1 has no bfloat16" in out
    assert "GPU 1 has too little free memory" in out
    assert "Other programs use 15.0 GB" in out


def test_gpus_that_do_not_report_everything(nvml, capsys):
    nvml(FakeGpu(without=("power", "utilization", "temperature")), FakeGpu(name="GB10", without=("memory",)))
    assert gpu_memory.main(["check"]) == 0
    assert "GPU 1 does not report its memory" in capsys.readouterr().out
    with devices.open_driver() as driver:
        first, second = driver.gpus()
    assert first.power_w is None and first.utilization_percent is None and first.memory_used_gb == pytest.approx(1.074)
    assert second.status == "ok" and second.memory_total_gb is None


# --- monitor ----------------------------------------------------------------------------------------------------------


def test_monitor_logs_a_gpu_that_is_lost_and_found(nvml, tmp_path, capsys):
    fake = nvml(FakeGpu(), FakeGpu(name="second", readings=[2 * GIB, 3 * GIB, None, None, 4 * GIB]))
    log = tmp_path / "gpu_logs.json"
    assert gpu_memory.main(["monitor", "--interval", "0.01", "--samples", "5", "--output", str(log)]) == 0
    records = watch.read_log(log)
    assert [(r["index"], r["status"]) for r in records if r["status"] == "lost"] == [(1, "lost")] * 2
    assert len(records) == 10 and [r["index"] for r in records] == [0, 1] * 5
    # monitor first reads once to see whether there is a GPU
    second = [r["memory_used_gb"] for r in records if r["index"] == 1]
    assert second == [pytest.approx(3.221), None, None, pytest.approx(4.295), pytest.approx(4.295)]
    assert all(
        r["memory_used_gb"] == pytest.approx(1.074) and r["power_w"] == 151.3 for r in records if r["index"] == 0
    )
    assert fake.inits > 1 and fake.opened == 0  # NVML was reopened, and closed at the end
    assert (tmp_path / "gpu_logs.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("lost") == 2


def test_monitor_continues_when_every_gpu_is_lost(nvml, tmp_path):
    nvml(FakeGpu(readings=[GIB, GIB, None]))
    log = tmp_path / "log.csv"
    assert gpu_memory.main(["monitor", "--interval", "0.01", "--samples", "4", "--output", str(log)]) == 0
    assert [row["status"] for row in csv.DictReader(log.open(encoding="utf-8"))] == ["ok", "lost", "lost", "lost"]


def test_log_is_continued_and_other_files_are_kept(nvml, tmp_path):
    nvml(FakeGpu())
    log = tmp_path / "log.json"
    for _ in range(2):
        assert gpu_memory.main(["monitor", "--interval", "0.01", "--samples", "2", "--output", str(log)]) == 0
    assert len(json.loads(log.read_text(encoding="utf-8"))) == 4
    other = tmp_path / "settings.json"
    other.write_text('{"mine": 1}\n', encoding="utf-8")
    assert gpu_memory.main(["monitor", "--samples", "1", "--output", str(other)]) == 2
    assert other.read_text(encoding="utf-8") == '{"mine": 1}\n'
    assert gpu_memory.main(["monitor", "--samples", "1", "--output", str(tmp_path / "log.txt")]) == 2


KILLED = """
import sys
sys.path[:0] = [{root!r}]
from tests.fake_nvml import FakeGpu, FakeNvml
sys.modules["pynvml"] = FakeNvml(FakeGpu(), FakeGpu(name="second"))
import gpu_memory
sys.exit(gpu_memory.main(["monitor", "--interval", "0.001", "--output", {log!r}]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_killed_monitor_leaves_a_complete_log(tmp_path):
    log = tmp_path / "log.json"
    code = KILLED.format(root=str(ROOT), log=str(log))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while process.poll() is None and (not log.exists() or log.stat().st_size < 20_000):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    text = log.read_text(encoding="utf-8")
    records = json.loads(text)
    assert len(records) > 50 and len(watch.read_log(log)) == len(records)
    assert gpu_memory.main(["plot", str(log)]) == 0
    assert log.with_suffix(".png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_monitor_draws_its_log(tmp_path, number):
    log = tmp_path / "log.json"
    code = KILLED.format(root=str(ROOT), log=str(log)).replace("0.001", "30")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not log.exists() or log.stat().st_size < 10):
        time.sleep(0.02)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "2 records in" in out and (tmp_path / "log.png").exists()


@pytest.mark.parametrize("cut", [2, 5, 40])  # the last number of a line may be cut to another number
@pytest.mark.parametrize("suffix", watch.SUFFIXES)
def test_cut_off_log_is_refused(tmp_path, suffix, cut):
    """What a power failure may leave; an empty file is a log without records."""
    log = watch.GpuLog(tmp_path / f"log{suffix}")
    log.add([devices.Gpu(0, 'a "quoted", name', memory_used_gb=1.5, power_w=151.25)], "2026-11-21T12:00:00+00:00")
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="is not a log of gpu_memory"):
        watch.GpuLog(log.path)
    log.path.write_bytes(b"")
    assert watch.read_log(watch.GpuLog(log.path).path) == []


@pytest.mark.parametrize(
    ("suffix", "column", "value"),
    [(".json", "memory_used_gb", "much"), (".jsonl", "time", "yesterday"), (".csv", "index", "0.5x")],
)
def test_value_of_the_wrong_kind_is_refused(tmp_path, capsys, suffix, column, value):
    log = watch.GpuLog(tmp_path / f"log{suffix}")
    for second in range(2):
        log.add([devices.Gpu(0, "one", memory_used_gb=1.5)], f"2026-11-21T12:00:0{second}+00:00")
    one = watch.read_log(log.path)
    log.path.write_text(watch._as_text([one[0], one[1] | {column: value}], suffix), encoding="utf-8")
    assert gpu_memory.main(["plot", str(log.path)]) == 2
    error = capsys.readouterr().err
    assert "record 2" in error and value in error and error.count("\n") == 1


def test_deleted_log_ends_the_monitor(nvml, tmp_path, capsys, monkeypatch):
    nvml(FakeGpu())
    log = tmp_path / "log.json"
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: log.unlink())
    assert gpu_memory.main(["monitor", "--samples", "3", "--output", str(log)]) == 2
    error = capsys.readouterr().err
    assert f"cannot write {log}" in error and error.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file")
@pytest.mark.parametrize(("suffix", "earlier"), [(".json", 0), (".json", 2), (".csv", 2)])
def test_full_disk_leaves_a_complete_log(tmp_path, suffix, earlier):
    import resource

    log = watch.GpuLog(tmp_path / f"log{suffix}")
    moment = "2026-11-28T10:00:00.000+00:00"
    for _ in range(earlier):
        log.add([devices.Gpu(0, "a GPU")], moment)
    before = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(UserError, match="the log ends here"):
            log.add([devices.Gpu(0, "a GPU")], moment)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_bytes() == before
    log.add([devices.Gpu(0, "a GPU")], moment)
    assert len(watch.read_log(log.path)) == earlier + 1


def test_empty_log_cannot_be_drawn(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        watch.draw([], tmp_path / "x.png")


# --- estimate as a command --------------------------------------------------------------------------------------------


def test_dashes_and_underscores_are_the_same(capsys, nvml):
    nvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    words = ["--quantization", "4bit", "--lora-r", "8", "--batch-size", "1", "--seq-length", "2048"]
    answers = []
    for spelled in (words, [word.replace("-", "_").replace("__", "--") for word in words]):
        assert gpu_memory.main(["estimate", "--model-size", "7.0", *spelled, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    (answer, _) = answers
    assert answer["total_gb"] == pytest.approx(sum(answer["parts_gb"].values()), abs=0.002)
    assert 4.5 < answer["total_gb"] < 11  # the described system reports 9 to 11 GB for its own loop
    assert answer["plan"]["rank"] == 8 and answer["plan"]["tokens"] == 2048 and "card" not in answer


def test_defaults_are_those_of_train_lora(capsys, nvml):
    """4 bit on a GPU in any dtype, 16 bit on a CPU; 7B is 7."""
    nvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    plans = []
    for words in (["7B"], ["7", "--dtype", "float32"], ["7", "--device", "cpu"],
                  ["7.0b", "--device", "cpu", "--quantization", "4bit", "--dtype", "float32"]):  # fmt: skip
        assert gpu_memory.main(["estimate", "--json", "--model_size", *words]) == 0
        answer = json.loads(capsys.readouterr().out)
        plans.append(answer["plan"]["load_in_4bit"])
        assert answer["parameters"] == pytest.approx(7e9, rel=0.01)
    assert plans == [True, True, False, True]


def test_estimate_prints_parts_changes_and_gpus(capsys, nvml):
    nvml(FakeGpu())
    assert gpu_memory.main(["estimate", "--model_size", "7", "--rank", "64", "--seq_length", "65536"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("weights of the layers", "peak", "Does not fit NVIDIA GeForce RTX 3060", "Fits with --", "Largest:",
                  "half the rank", "80 GB"):  # fmt: skip
        assert words in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_size", "7", "--optim", "wonder"], "memory use unknown"),
        (["--model_size", "9999"], "in billions"),
        (["--model", "./nowhere/at/all"], "./nowhere/at/all"),
        (["--model_size", "7", "--target_modules", "q_proj", "qq"], "this model has"),
        (["--model_size", "7", "--target_modules", "all-linear", "q_proj"], "this model has"),
        (["--model_size", "7", "--last_layers", "1000"], "32 decoder layers"),
    ],
)
def test_wrong_values_end_in_one_line(words, message, nvml, capsys):
    nvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert gpu_memory.main(["estimate", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--model", ""], ["--model_size", "7", "--rank", "9" * 400], ["--model_size", "7", "--trained_share", "half"]],
)
def test_malformed_values_are_usage_errors(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_memory.main(["estimate", *words])
    assert f"{words[-2]}: must " in capsys.readouterr().err


def test_config_with_a_malformed_text_part(tmp_path, capsys):
    config = {"model_type": "llama", "text_config": {"hidden_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert gpu_memory.main(["estimate", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "model type 'llama' cannot be measured" in error and error.count("\n") == 1


# --- logs of other programs, or edited by hand ------------------------------------------------------------------------

READING = dict.fromkeys(watch.COLUMNS) | {
    "time": "2026-11-21T10:00:00+00:00", "index": 0, "name": "gpu", "status": "ok", "memory_used_gb": 1.0,
}  # fmt: skip


def as_log(*changes):
    return "[\n" + ",\n".join(json.dumps(READING | one) for one in changes) + "\n]\n"


@pytest.mark.parametrize(
    "change",
    [
        {"index": None}, {"memory_used_gb": 10**400}, {"memory_total_gb": 1e308}, {"name": "\ud800"},
        {"time": "9999-12-31T23:59:59-05:00"},
    ],
)  # fmt: skip
def test_reading_that_cannot_be_drawn(tmp_path, capsys, change):
    (tmp_path / "log.json").write_text(as_log({}, change))
    assert gpu_memory.main(["plot", str(tmp_path / "log.json")]) == 2
    error = capsys.readouterr().err
    assert "record 2" in error and error.count("\n") == 1


def test_dollars_and_times_without_a_zone_are_drawn(tmp_path):
    (tmp_path / "log.json").write_text(as_log({"time": "2026-11-21T09:00:00"}, {"name": "$\\frac$"}))
    assert gpu_memory.main(["plot", str(tmp_path / "log.json")]) == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.json", "[draft] my notes"), ("notes.json", "[" * 5000), ("notes.jsonl", "my notes\n"),
        ("notes.jsonl", "my notes"), ("other.jsonl", '{"time": "now"}'), ("table.csv", "a,b"),
        ("log.csv", ",".join(watch.COLUMNS) + "\n2026-11-21T10:00:00+00:00,0,gpu,ok,1,1,2,3,3,1,more\n"),
    ],
)  # fmt: skip
def test_other_files_are_refused_and_kept(nvml, tmp_path, capsys, name, text):
    nvml(FakeGpu())
    (tmp_path / name).write_text(text)
    assert gpu_memory.main(["monitor", "--samples", "1", "--output", str(tmp_path / name)]) == 2
    assert (tmp_path / name).read_text() == text
    assert capsys.readouterr().err.count("\n") == 1


def test_interval_is_limited_to_what_sleep_accepts(nvml, monkeypatch):
    nvml(FakeGpu())
    slept = []
    monkeypatch.setattr(watch.time, "sleep", slept.append)
    assert gpu_memory.main(["monitor", "--samples", "2", "--interval", "1e300"]) == 0
    assert slept == [watch.MAX_SLEEP_SECONDS]


@pytest.mark.skipif(os.name == "nt", reason="has POSIX devices and pipes")
def test_log_must_be_a_regular_file(nvml, tmp_path, capsys):
    """Reading a device may never end."""
    nvml(FakeGpu())
    (tmp_path / "zeros.jsonl").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("zeros.jsonl", "pipe.csv"):
        assert gpu_memory.main(["monitor", "--samples", "1", "--output", str(tmp_path / name)]) == 2
        assert "not a regular file" in capsys.readouterr().err


def test_plot_of_monitor_needs_a_log(nvml, tmp_path, capsys):
    nvml(FakeGpu())
    assert gpu_memory.main(["monitor", "--samples", "1", "--plot", str(tmp_path / "a.png")]) == 2
    assert "--output" in capsys.readouterr().err


def test_brackets_in_names_are_printed(nvml, tmp_path, capsys):
    """rich reads [b] as bold and raises at [/b]."""
    nvml(FakeGpu(name="gpu [/b]"))
    folder = tmp_path / "m[" / "b]"
    folder.mkdir(parents=True)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 100} | sizes))
    for words in (["check"], ["monitor", "--samples", "1"], ["estimate", "--model", str(folder)]):
        assert gpu_memory.main(words) == 0
        assert "gpu [/b]" in capsys.readouterr().out
