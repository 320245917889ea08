"""benchmarks/side_by_side.py: the parts that need no GPU."""

import json
import shlex
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

import sweep_lora
from benchmarks import side_by_side
from finetune.errors import UserError
from finetune.runs.run_log import COLUMNS
from finetune.sweep import grid
from tests.fake_nvml import FakeGpu, FakeNvml

STUB = Path(__file__).with_name("sweep_stub.py")


def options(**changes):
    values = {"cuda": True, "cores": 16, "model": "smollm2-135m", "steps": 9, "command": None, "flags": []}
    return Namespace(**values | changes)


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_n_runs_fit_on_one_gpu(at_once, tmp_path):
    argv = side_by_side.words_of(options(flags=["--lr", "1e-4"]), at_once, tmp_path, "s", 8)[2:]
    before, after = grid.split_arguments(argv)
    args = sweep_lora.build_parser().parse_args(before)
    assert 1 / at_once - 0.001 < args.gpus_per_run <= 1 / at_once
    assert args.cpus_per_run is None
    assert args.rank == ["4", "8", "16", "32", "64", "12", "24", "48"]
    recipe, given = grid.fixed_flags(after)
    assert (given["max_steps"], given["save_steps"], given["tokens_per_pass"], given["lr"]) == (9, 0, 8192, 1e-4)
    assert Path(given["dataset"][0]).is_file()
    assert recipe["batch_size"] == 16


def test_cpu_cores_are_divided(tmp_path):
    argv = side_by_side.words_of(options(cuda=False), 4, tmp_path, "s", 4)[2:]
    args = sweep_lora.build_parser().parse_args(grid.split_arguments(argv)[0])
    assert (args.gpus_per_run, args.cpus_per_run) == (0, 4)


@pytest.mark.parametrize(
    ("visible", "left", "number"),
    [(None, "0", 0), ("2,3", "2", 2), ("GPU-8932f937,1", "GPU-8932f937", None), ("", "", None), ("-1", "-1", None)],
)
def test_first_visible_gpu(visible, left, number):
    given = {"A": "b"} if visible is None else {"A": "b", "CUDA_VISIBLE_DEVICES": visible}
    env, gpu = side_by_side.one_gpu(given)
    assert env == {"A": "b", "CUDA_VISIBLE_DEVICES": left, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert gpu == number


def test_peak_gpu_memory(monkeypatch):
    """Of the second GPU; one reading fails."""
    other = FakeGpu(readings=[9 * 10**9])
    card = FakeGpu(readings=[10**9, 3 * 10**9, None, 2 * 10**9])
    nvml = FakeNvml(other, card)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(side_by_side, "SECONDS_BETWEEN_READINGS", 0.0)
    with side_by_side.gpu_memory_peak(1) as peak:
        deadline = time.monotonic() + 60
        while card.asked < 6:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert peak == {"gb": 3.0}
    assert nvml.opened == 0
    with side_by_side.gpu_memory_peak(None) as peak:
        pass
    assert peak == {}


def finished_sweep(folder, spans, steps=6):
    """A sweep's folder with a run for each (start, end) in seconds; its steps take 1, 2, 3 … seconds."""
    runs = []
    for number, (start, end) in enumerate(spans):
        name = f"rank{number}"
        (folder / name).mkdir(parents=True)
        rows = [dict.fromkeys(COLUMNS, "") | {"step": n, "seconds": n * (n + 1) / 2, "loss": 2 / n,
                                              "peak_memory_gb": 1.0 + number} for n in range(1, steps + 1)]  # fmt: skip
        lines = [",".join(COLUMNS), *(",".join(str(row[name]) for name in COLUMNS) for row in rows)]
        (folder / name / "training_log.csv").write_text("\n".join(lines) + "\n")
        (folder / name / "experiment_config.json").write_text('{"dtype": "bfloat16"}')
        attempt = {"started": f"2026-11-28T10:00:{start:06.3f}+00:00", "ended": f"2026-11-28T10:00:{end:06.3f}+00:00"}
        runs.append({"name": name, "attempts": [attempt]})
    (folder / "sweep.json").write_text(json.dumps({"runs": runs}))
    return folder


def test_record_of_a_sweep(tmp_path):
    folder = finished_sweep(tmp_path / "s", [(1, 21), (1.5, 20), (21, 40.25), (20, 41.5)])
    record = side_by_side.record_of(folder, 2)
    assert record["whole_s"] == 40.5
    assert record["steps_s"] == 4 * (3 + 4 + 5 + 6)
    assert record["peak_gb"] == 3.0 + 4.0
    assert (record["runs"], record["dtype"], record["losses"]["rank3"]) == (4, "bfloat16", pytest.approx(1 / 3))


@pytest.mark.parametrize("spans", [[(1, 10), (10, 20)], [(1, 10), (2, 9), (3, 8)]])
def test_runs_that_were_not_side_by_side_measure_nothing(tmp_path, spans):
    with pytest.raises(UserError, match="2 runs should have been side by side"):
        side_by_side.record_of(finished_sweep(tmp_path / "s", spans), 2)


def test_too_few_steps_are_refused(tmp_path):
    with pytest.raises(UserError, match="--steps"):
        side_by_side.record_of(finished_sweep(tmp_path / "s", [(1, 10)], steps=2), 1)


def record(at_once, whole, steps, **more):
    return {"at_once": at_once, "runs": 4, "whole_s": whole, "steps_s": steps, "peak_gb": 2.0 * at_once,
            "gpu_gb": None, "dtype": "bfloat16", "losses": {"rank4": 1.0}} | more  # fmt: skip


def test_ratios_are_within_one_repeat():
    records = [record(1, 100, 80), record(2, 50, 80), record(2, 60, 160), record(1, 120, 80)]
    assert side_by_side.ratios(records) == {2: {"whole": [2.0, 2.0], "steps": [2.0, 1.0]}}


@pytest.mark.parametrize(
    ("records", "cuda", "said"),
    [
        ([record(1, 100, 80), record(2, 60, 100), record(4, 50, 110)], True, "4 at a time (--gpus_per_run 0.25)"),
        ([record(1, 100, 80), record(2, 60, 100), record(4, 95, 200)], True, "2 at a time (--gpus_per_run 0.5)"),
        ([record(1, 100, 80), record(2, 60, 160)], True, "one after another (--gpus_per_run 1)"),  # imports alone
        ([record(1, 100, 80), record(2, 99, 80)], True, "one after another"),  # the steps alone
        ([record(1, 100, 80), record(2, 50, 80)] * 2 + [record(1, 100, 80), record(2, 99, 80)], True, "one after"),
        ([record(1, 100, 80), record(2, 60, 100)], False, "2 at a time (--cpus_per_run cores/2)"),
        ([record(1, 100, 80)], False, "one after another"),  # nothing else could be measured
    ],
)
def test_verdict(records, cuda, said):
    assert said in side_by_side.verdict(records, cuda)
    assert side_by_side.verdict(records, cuda).startswith("default should be: ")


def test_failing_measurement_is_recorded(tmp_path, monkeypatch, capsys):
    """Methods take turns; the file has every record so far when the next sweep begins."""
    order, on_disk = [], []
    path = tmp_path / "out.json"

    def measure(args, at_once, runs):
        order.append((at_once, runs))
        on_disk.append(len(json.loads(path.read_text())["records"]) if path.exists() else 0)
        if at_once == 4:
            raise UserError("out of memory")
        return record(at_once, 100 / at_once, 80)

    monkeypatch.setattr(side_by_side, "measure", measure)
    facts = {"processor": "x", "cores": 8, "gpu": "a card"}
    monkeypatch.setattr(side_by_side, "machine_facts", lambda env: facts)
    assert side_by_side.main(["--repeats", "2", "--json", str(path)]) == 0
    assert order == [(1, 1), (1, 4), (2, 4), (4, 4), (2, 4), (1, 4)]
    assert on_disk == [0, 0, 1, 2, 2, 3]
    said = capsys.readouterr().out
    assert "4 at a time failed: out of memory" in said
    assert said.splitlines()[-1].startswith("default should be: 2 at a time (--gpus_per_run 0.5)")
    kept = json.loads(path.read_text())
    assert kept["machine"]["gpu"] == "a card"
    assert kept["verdict"] in said
    assert side_by_side.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--at_once", "1"], "--at_once"),
        (["--at_once", "2", "3"], "--at_once"),
        (["--at_once", "16"], "--at_once"),
        (["--at_once", "4"], "2 cores"),
        (["--steps", "2"], "--steps"),
        (["--show", "no-such.json"], "no-such.json"),
        (["--show", __file__], "not a file of this benchmark"),
    ],
)
def test_refused_arguments(argv, wanted, monkeypatch, capsys):
    monkeypatch.setattr(side_by_side, "machine_facts", lambda env: {"cores": 2, "gpu": None})
    monkeypatch.setattr(side_by_side, "measure", lambda *rest: pytest.fail("measured"))
    assert side_by_side.main(argv) == 2
    said = capsys.readouterr().err
    assert wanted in said
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_whole_benchmark_with_a_stub(tmp_path, monkeypatch, capsys):
    """Real sweeps, whose runs sleep."""
    pytest.importorskip("ray")
    monkeypatch.setattr(side_by_side, "machine_facts", lambda env: {"cores": 2, "gpu": None})
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"steps": 5, "seconds": 1.0}))
    command = shlex.join([sys.executable, "-S", str(STUB), str(plan)])
    argv = ["--command", command, "--at_once", "2", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    assert side_by_side.main(argv) == 0
    one, other = json.loads((tmp_path / "out.json").read_text())["records"]
    assert (one["at_once"], other["at_once"]) == (1, 2)
    assert one["steps_s"] == other["steps_s"] == pytest.approx(2 * 0.3)
    assert "default should be: " in capsys.readouterr().out
    plan.write_text(
        json.dumps({"steps": 5, "seconds": 0.0, "runs": {"rank4": {"at": 3, "times": 99, "how": "failed"}}})
    )
    assert side_by_side.main(argv) == 2
    assert "failed: rank4 after 1 attempt: the run says why" in capsys.readouterr().err
