"""gpu_memory.py: its answers without a card, on a fake driver, and its log when the program dies."""

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
from tests.fake_nvml import FakeCard, FakeNvml  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30


@pytest.fixture
def nvml(monkeypatch):
    """Put a fake driver with these cards in place of pynvml."""

    def install(*cards, **options):
        fake = FakeNvml(*cards, **options)
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
@pytest.mark.parametrize("verb", ["check", "monitor"])
def test_without_a_driver_there_is_an_answer_and_no_error(nvml, capsys, verb, code, words):
    nvml(init_error=code)
    assert gpu_memory.main([verb]) == 0
    assert words in capsys.readouterr().out


def test_check_and_monitor_as_a_process(tmp_path):
    """The real package: on a machine without a card it finds none; on one with a card it names it."""
    checked = run("check")
    assert checked.returncode == 0 and not checked.stderr
    assert "No GPU can be used here" in checked.stdout or "CUDA up to" in checked.stdout
    watched = run("monitor", "--samples", "1", "--interval", "0.1", "--output", tmp_path / "log.json")
    assert watched.returncode == 0 and not watched.stderr
    assert ("Nothing to watch" in watched.stdout) == ("No GPU" in checked.stdout)
    assert (tmp_path / "log.json").exists() == ("No GPU" not in checked.stdout)  # nothing to say: no empty log


def test_a_driver_without_a_card(nvml, capsys):
    fake = nvml()
    assert gpu_memory.main(["check"]) == 0 and gpu_memory.main(["monitor"]) == 0
    assert capsys.readouterr().out.count("sees no GPU") == 2
    assert fake.opened == 0  # closed again


def test_check_tells_what_a_card_is_good_for(nvml, capsys):
    nvml(FakeCard(), FakeCard(name="Tesla T4", total=15 * GIB, capability=(7, 5), readings=[14 * GIB]))
    assert gpu_memory.main(["check"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Driver 580.82.07, CUDA up to 13.0" in out
    assert "0 NVIDIA GeForce RTX 3060" in out and "8.6" in out and "7.5" in out
    assert "Card 0 can now train models of up to about 14 B parameters" in out
    assert "Card 1 has no bfloat16" in out
    assert "Card 1 has too little free memory" in out
    assert "Other programs hold 15.0 GB" in out


def test_cards_that_do_not_tell_everything(nvml, capsys):
    nvml(FakeCard(without=("power", "utilization", "temperature")), FakeCard(name="GB10", without=("memory",)))
    assert gpu_memory.main(["check"]) == 0
    assert "Card 1 does not tell its memory" in capsys.readouterr().out
    with devices.open_driver() as driver:
        first, second = driver.cards()
    assert first.power_w is None and first.utilization_percent is None and first.memory_used_gb == pytest.approx(1.074)
    assert second.status == "ok" and second.memory_total_gb is None


# --- monitor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_monitor_survives_a_card_that_vanishes_and_comes_back(nvml, tmp_path, capsys, suffix):
    fake = nvml(FakeCard(), FakeCard(name="second", readings=[2 * GIB, 3 * GIB, None, None, 4 * GIB]))
    log = tmp_path / f"gpu_logs{suffix}"
    assert gpu_memory.main(["monitor", "--interval", "0.01", "--samples", "5", "--output", str(log)]) == 0
    records = watch.read_log(log)
    assert [(r["index"], r["status"]) for r in records if r["status"] == "lost"] == [(1, "lost")] * 2
    assert len(records) == 10 and [r["index"] for r in records] == [0, 1] * 5
    # monitor asks once whether there is a card at all, so the log begins with the second reading
    second = [r["memory_used_gb"] for r in records if r["index"] == 1]
    assert second == [pytest.approx(3.221), None, None, pytest.approx(4.295), pytest.approx(4.295)]
    assert all(
        r["memory_used_gb"] == pytest.approx(1.074) and r["power_w"] == 151.3 for r in records if r["index"] == 0
    )
    assert fake.inits > 1 and fake.opened == 0  # NVML was opened anew to find the card again, and closed at the end
    assert (tmp_path / "gpu_logs.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("lost") == 2


def test_monitor_goes_on_when_every_card_is_lost(nvml, tmp_path):
    nvml(FakeCard(readings=[GIB, GIB, None]))
    log = tmp_path / "log.csv"
    assert gpu_memory.main(["monitor", "--interval", "0.01", "--samples", "4", "--output", str(log)]) == 0
    assert [row["status"] for row in csv.DictReader(log.open(encoding="utf-8"))] == ["ok", "lost", "lost", "lost"]


def test_an_earlier_log_is_continued_and_other_files_are_left_alone(nvml, tmp_path):
    nvml(FakeCard())
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
from tests.fake_nvml import FakeCard, FakeNvml
sys.modules["pynvml"] = FakeNvml(FakeCard(), FakeCard(name="second"))
import gpu_memory
sys.exit(gpu_memory.main(["monitor", "--interval", "0.001", "--output", {log!r}]))
"""


@pytest.mark.parametrize("suffix", [".json", ".csv"])
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_killed_monitor_leaves_a_whole_log(tmp_path, suffix):
    log = tmp_path / f"log{suffix}"
    code = KILLED.format(root=str(ROOT), log=str(log))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    while process.poll() is None and (not log.exists() or log.stat().st_size < 20_000):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    text = log.read_text(encoding="utf-8")
    records = json.loads(text) if suffix == ".json" else list(csv.DictReader(text.splitlines()))  # by any reader
    assert len(records) > 50 and len(watch.read_log(log)) == len(records)
    assert gpu_memory.main(["plot", str(log)]) == 0
    assert log.with_suffix(".png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_monitor_ends_well_and_draws(tmp_path, number):
    log = tmp_path / "log.json"
    code = KILLED.format(root=str(ROOT), log=str(log)).replace("0.001", "30")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not log.exists() or log.stat().st_size < 10):
        time.sleep(0.02)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "2 records in" in out and (tmp_path / "log.png").exists()


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_log_torn_in_its_last_record_is_read_and_continued(tmp_path, suffix, cut):
    """What a power cut may leave: the end of the last write is missing."""
    card = devices.Card(0, 'a "quoted", name', memory_used_gb=1.5, memory_total_gb=8.0)
    log = watch.CardLog(tmp_path / f"log{suffix}")
    for second in range(3):
        log.add([card], f"2026-11-21T12:00:0{second}+00:00")
    torn = log.path.read_bytes()[:-cut]
    log.path.write_bytes(torn)
    assert len(watch.read_log(log.path)) in (2, 3)
    again = watch.CardLog(log.path)
    again.add([card], "2026-11-21T12:00:09+00:00")
    records = watch.read_log(log.path)
    assert len(records) in (3, 4) and records[-1]["time"].endswith("09+00:00")
    assert {r["name"] for r in records} == {card.name}
    if suffix == ".json":
        assert json.loads(log.path.read_text(encoding="utf-8")) == records


@pytest.mark.parametrize(
    ("column", "value"),
    [("memory_used_gb", "much"), ("time", "yesterday"), ("index", "0.5x"), ("utilization_percent", "?")],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_log_with_a_value_of_the_wrong_kind_is_refused_in_one_line(tmp_path, capsys, suffix, column, value):
    log = watch.CardLog(tmp_path / f"log{suffix}")
    for second in range(2):
        log.add([devices.Card(0, "one", memory_used_gb=1.5)], f"2026-11-21T12:00:0{second}+00:00")
    one = watch.read_log(log.path)
    log.path.write_text(watch._as_text([one[0], one[1] | {column: value}], suffix), encoding="utf-8")
    assert gpu_memory.main(["plot", str(log.path)]) == 2
    error = capsys.readouterr().err
    assert "record 2" in error and value in error and error.count("\n") == 1


def test_a_log_that_is_taken_away_ends_the_monitor_in_one_line(nvml, tmp_path, capsys, monkeypatch):
    nvml(FakeCard())
    log = tmp_path / "log.json"
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: log.unlink())
    assert gpu_memory.main(["monitor", "--samples", "3", "--output", str(log)]) == 2
    error = capsys.readouterr().err
    assert f"cannot write {log}" in error and error.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file")
@pytest.mark.parametrize("suffix", watch.SUFFIXES)
@pytest.mark.parametrize("earlier", [0, 2])
def test_a_disk_that_takes_a_part_of_a_reading_leaves_a_whole_log(tmp_path, suffix, earlier):
    import resource

    log = watch.CardLog(tmp_path / f"log{suffix}")
    moment = "2026-11-28T10:00:00.000+00:00"
    for _ in range(earlier):
        log.add([devices.Card(0, "a card")], moment)
    before = log.path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(UserError, match="the log ends here"):
            log.add([devices.Card(0, "a card")], moment)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert log.path.read_bytes() == before
    log.add([devices.Card(0, "a card")], moment)
    assert len(watch.read_log(log.path)) == earlier + 1


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UserError, match="nothing to draw"):
        watch.draw([], tmp_path / "x.png")


# --- estimate as a command --------------------------------------------------------------------------------------------


def test_the_described_command_in_both_spellings(capsys, nvml):
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


def test_what_is_not_said_is_what_train_lora_would_do(capsys, nvml):
    """4 bit on a GPU, also where it computes in float32, and none on a CPU; 7B is 7."""
    nvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    plans = []
    for words in (["7B"], ["7", "--dtype", "float32"], ["7", "--device", "cpu"],
                  ["7.0b", "--device", "cpu", "--quantization", "4bit", "--dtype", "float32"]):  # fmt: skip
        assert gpu_memory.main(["estimate", "--json", "--model_size", *words]) == 0
        answer = json.loads(capsys.readouterr().out)
        plans.append(answer["plan"]["load_in_4bit"])
        assert answer["parameters"] == pytest.approx(7e9, rel=0.01)
    assert plans == [True, True, False, True]


def test_estimate_prints_parts_advice_and_cards(capsys, nvml):
    nvml(FakeCard())
    assert gpu_memory.main(["estimate", "--model_size", "7", "--rank", "64", "--seq_length", "65536"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("weights of the layers", "peak", "Does not fit NVIDIA GeForce RTX 3060", "Fits with --", "Largest:",
                  "half the rank", "80 GB"):  # fmt: skip
        assert words in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_size", "7", "--target_modules", "qq"], "this model has"),
        (["--model_size", "7", "--optim", "wonder"], "its memory is not known"),
        (["--model_size", "9999"], "in billions"),
        (["--model_size", "0.001"], "in billions"),
        (["--model", "./nowhere/at/all"], "./nowhere/at/all"),
        (["--model_size", "7", "--target_modules", "q_proj", "qq"], "this model has"),
        (["--model_size", "7", "--target_modules", "all-linear", "q_proj"], "this model has"),
        (["--model_size", "7", "--last_layers", "1000"], "32 decoder layers"),
    ],
)
def test_mistakes_end_in_one_line(words, message, nvml, capsys):
    nvml(init_error=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert gpu_memory.main(["estimate", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["--model", ""], ["--model_size", "7", "--rank", "9" * 400], ["--model_size", "7", "--trained_share", "half"]],
)
def test_values_that_no_flag_takes(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_memory.main(["estimate", *words])
    assert f"{words[-2]}: must " in capsys.readouterr().err


def test_a_config_whose_text_part_is_no_config(tmp_path, capsys):
    config = {"model_type": "llama", "text_config": {"hidden_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert gpu_memory.main(["estimate", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "model type 'llama' cannot be measured" in error and error.count("\n") == 1


# --- logs that somebody else has written ------------------------------------------------------------------------------

READING = dict.fromkeys(watch.COLUMNS) | {
    "time": "2026-11-21T10:00:00+00:00", "index": 0, "name": "card", "status": "ok", "memory_used_gb": 1.0,
}  # fmt: skip


def as_log(*changes):
    return "[\n" + ",\n".join(json.dumps(READING | one) for one in changes) + "\n]\n"


@pytest.mark.parametrize(
    "change",
    [
        {"index": None}, {"memory_used_gb": 10**400}, {"memory_total_gb": 1e308}, {"time": "0001-01-01T00:00:00+05:00"},
        {"time": "9999-12-31T23:59:59-05:00"}, {"name": "\ud800"},
    ],
)  # fmt: skip
def test_a_reading_that_cannot_be_drawn(tmp_path, capsys, change):
    (tmp_path / "log.json").write_text(as_log({}, change))
    assert gpu_memory.main(["plot", str(tmp_path / "log.json")]) == 2
    error = capsys.readouterr().err
    assert "record 2" in error and error.count("\n") == 1


def test_a_name_with_dollars_and_times_with_and_without_a_zone_are_drawn(tmp_path):
    (tmp_path / "log.json").write_text(as_log({"time": "2026-11-21T09:00:00"}, {"name": "$\\frac$"}))
    assert gpu_memory.main(["plot", str(tmp_path / "log.json")]) == 0


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("notes.json", "[draft] my notes"), ("notes.json", "[" * 5000), ("notes.jsonl", "my notes\n"),
        ("notes.jsonl", "my notes"), ("table.csv", "a,b"), ("table.csv", '"' + "x" * 200_000 + '"\n'),
        ("log.csv", ",".join(watch.COLUMNS) + "\n2026-11-21T10:00:00+00:00,0,card,ok,1,1,2,3,3,1,more\n"),
    ],
)  # fmt: skip
def test_a_file_of_somebody_elses_is_left_as_it_is(nvml, tmp_path, capsys, name, text):
    nvml(FakeCard())
    (tmp_path / name).write_text(text)
    assert gpu_memory.main(["monitor", "--samples", "1", "--output", str(tmp_path / name)]) == 2
    assert (tmp_path / name).read_text() == text
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["log.json", "log.jsonl", "log.csv"])
def test_a_log_that_lost_power_in_any_byte_goes_on(nvml, tmp_path, name):
    nvml(FakeCard())
    words = ["monitor", "--samples", "1", "--output", str(tmp_path / name)]
    assert gpu_memory.main(words) == 0
    whole = (tmp_path / name).read_bytes()
    for size in range(0, len(whole), 7):
        for tail in (b"", b"\0\0"):
            (tmp_path / name).write_bytes(whole[:size] + tail)
            log = watch.CardLog(tmp_path / name)
            assert log.records in (0, 1)
            assert watch.read_log(tmp_path / name) == watch.read_log(log.path)


def test_an_interval_longer_than_the_system_can_sleep(nvml, monkeypatch):
    nvml(FakeCard())
    slept = []
    monkeypatch.setattr(watch.time, "sleep", slept.append)
    assert gpu_memory.main(["monitor", "--samples", "2", "--interval", "1e300"]) == 0
    assert slept == [watch.LONGEST_SLEEP]


@pytest.mark.skipif(os.name == "nt", reason="has POSIX devices and pipes")
def test_a_log_that_is_no_file(nvml, tmp_path, capsys):
    """Reading a device may never end."""
    nvml(FakeCard())
    (tmp_path / "zeros.jsonl").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("zeros.jsonl", "pipe.csv"):
        assert gpu_memory.main(["monitor", "--samples", "1", "--output", str(tmp_path / name)]) == 2
        assert "it is no file" in capsys.readouterr().err


def test_a_picture_without_a_log(nvml, tmp_path, capsys):
    nvml(FakeCard())
    assert gpu_memory.main(["monitor", "--samples", "1", "--plot", str(tmp_path / "a.png")]) == 2
    assert "--output" in capsys.readouterr().err


def test_names_with_brackets_are_printed_as_they_are(nvml, tmp_path, capsys):
    """rich takes [b] for bold, and ends with an error at [/b]."""
    nvml(FakeCard(name="card [/b]"))
    folder = tmp_path / "m[" / "b]"
    folder.mkdir(parents=True)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 100} | sizes))
    for words in (["check"], ["monitor", "--samples", "1"], ["estimate", "--model", str(folder)]):
        assert gpu_memory.main(words) == 0
        assert "card [/b]" in capsys.readouterr().out
