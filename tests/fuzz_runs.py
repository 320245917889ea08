"""Files of run folders, recipes, sweeps, logs and evaluations, mutated, and what the commands read of them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.runs.manifest import write_manifest
from finetune.runs.run_log import COLUMNS, RunLog
from formats import FormatError
from tests.fuzz_inputs import edited, mutated
from tests.scored import item

SWEEP = {"train": {"dataset": ["rows.jsonl"], "rank": 8}, "grid": {"lr": [1e-4, 2e-4]}, "runs": [{"alpha": 8}],
         "random": {"count": 2, "seed": 1, "flags": {"dropout": {"uniform": [0, 0.1]}}}, "seeds": 2}  # fmt: skip


@cache
def config() -> dict[str, Any]:
    """An experiment_config.json as train_lora.py writes it."""
    from finetune.settings import Settings

    flags = Settings(model="smollm2-135m", dataset=["rows.jsonl"], format="chatml", eval_fraction=0.1).run_flags()
    return {
        "flags": flags, "argv": ["--rank", "8"], "base_model": "smollm2-135m", "base_model_revision": None,
        "dtype": "float32", "load_in_4bit": False, "device": "cpu", "gradient_checkpointing": False,
        "format": {"name": "chatml", "template_sha256": "0", "template_kwargs": {}, "end_of_turn_ids": [2]},
        "data": {"fingerprint": "0", "counts": {"read": 3}, "notes": {}, "sequences": 3, "trained_tokens": 99},
        "eval_data": {"fingerprint": "0"}, "trainable_parameters": 10, "total_parameters": 100,
        "versions": {"torch": "2.9"}, "git_sha": None, "seed": 1, "started": "2026-01-01T00:00:00+00:00", "ended": None,
        "status": "interrupted", "steps": 2, "memory": {"predicted_gb": 1.0}, "resumed": [],
        "result": {"final_loss": 1.25, "best_eval_loss": 1.5},
    }  # fmt: skip


ADAPTER = {"base_model_name_or_path": "smollm2-135m", "revision": None, "r": 8, "target_modules": ["q_proj"]}
STATE = {"global_step": 2, "epoch": 0.5, "log_history": [{"loss": 1.0, "step": 1}], "best_global_step": 1}
COUNTERS = {"tokens_seen": 5, "trained_tokens": 3, "seconds": 1.5, "window_loss_sum": 0.0}
MANIFEST = {"files": {"trainer_state.json": {"size": 10, "sha256": "0"}}}


@cache
def weights() -> dict[str, bytes]:
    """The binary files of a checkpoint, as far as they are looked at before they are loaded."""
    import zipfile

    import numpy as np
    from safetensors.numpy import save

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data", b"")
    states = dict.fromkeys(("optimizer.pt", "scheduler.pt", "rng_state.pth"), archive.getvalue())
    return {"adapter_model.safetensors": save({"a": np.zeros(1)}), **states}


def damaged(value: Any, chance: random.Random) -> bytes:
    """JSON of a mutated value, or of the value with damaged bytes."""
    if chance.random() < 0.2:
        return edited(json.dumps(value).encode(), chance)
    return json.dumps(mutated(value, chance, [config(), SWEEP], 3)).encode("utf-8", "replace")


def config_case(chance: random.Random) -> dict[str, Any]:
    """One damaged file, and which one it is."""
    values = {"run": config(), "adapter": ADAPTER, "state": STATE, "counters": COUNTERS, "manifest": MANIFEST}
    values |= {"recipe": {"rank": 8, "lr": "2e-4", "dataset": ["a.jsonl"], "share_prefix": True}, "sweep": SWEEP}
    which = chance.choice(["run"] * 6 + list(values))
    return {"which": which, "data": damaged(values[which], chance), "json": chance.random() < 0.5}


def check_config(case: dict[str, Any], folder: Path) -> None:
    run = folder / "run"
    checkpoint = run / "checkpoint-2"
    shutil.rmtree(run, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    (run / "final_model").mkdir()
    given = {"run": case["data"]} if case["which"] == "run" else {case["which"]: case["data"]}
    files = {
        "run": (run / "experiment_config.json", config()),
        "adapter": (run / "final_model" / "adapter_config.json", ADAPTER),
        "state": (checkpoint / "trainer_state.json", STATE),
        "counters": (checkpoint / "log_counters.json", COUNTERS),
    }
    for which, (path, value) in files.items():
        path.write_bytes(given.get(which) or json.dumps(value).encode())
    for name, data in weights().items():
        (checkpoint / name).write_bytes(data)
    (checkpoint / "adapter_config.json").write_text(json.dumps(ADAPTER), encoding="utf-8")
    write_manifest(checkpoint)
    if "manifest" in given:
        (checkpoint / "manifest.json").write_bytes(given["manifest"])
    suffix = ".json" if case["json"] else ".yaml"
    for name in ("recipe", "sweep"):
        (run / f"{name}{suffix}").write_bytes(given.get(name, b"{}"))
    for read in (read_run_folder, read_resumed, read_adapter, read_recipes):
        with contextlib.suppress(UserError, FormatError), contextlib.redirect_stderr(io.StringIO()):
            read(run, suffix)


def read_run_folder(run: Path, suffix: str) -> None:
    """What evaluate_lora.py, chat_lora.py and export_lora.py take from a config before they load weights."""
    from finetune.export.hub import read_scores
    from finetune.runs.find import find_run
    from finetune.runs.model_card import model_card
    from tests import parts

    found = find_run(run)
    assert isinstance(found.base_name, str)
    limit = found.experiment.config["flags"].get("max_seq_length")
    assert limit is None or limit > 0
    found.base_settings()
    found.format_for(parts.tokenizer("smollm2"))
    if found.base_name == "smollm2-135m":
        assert found.max_length() > 0
    scores, _ = read_scores(found)
    assert model_card(found.experiment, scores=scores)


def read_resumed(run: Path, suffix: str) -> None:
    from finetune.runs.experiment import checkpoint_damage, find_resumable, folder_status
    from finetune.settings import parse, resumed
    from finetune.training.record import changed_versions, refuse_changed

    folder_status(run)
    if checkpoint_damage(run / "checkpoint-2") is None:
        log = RunLog(None)
        log.restore(json.loads((run / "checkpoint-2" / "log_counters.json").read_bytes()))
        log.start(2)
        log.log_row(step=3, epoch=1.0, learning_rate=0.0, grad_norm=0.0)
    with contextlib.suppress(UserError):
        find_resumable(str(run), run.parent)
    with contextlib.suppress(UserError):
        find_resumable("", run.parent)
    from finetune.runs.experiment import open_trained

    experiment = open_trained(run)
    resumed(
        parse(["--resume", str(run), "--force"]), experiment.config["flags"], str(run), changed_versions(experiment)
    )
    refuse_changed(experiment, True, data="0", eval_data="0", format="0")


def read_adapter(run: Path, suffix: str) -> None:
    from finetune.models.adapter import adapter_config
    from finetune.runs.find import find_run

    adapter_config(run / "final_model")
    (run / "experiment_config.json").rename(run / "moved.json")
    found = find_run(run / "final_model")
    assert isinstance(found.base_name, str)
    found.base_settings()


def read_recipes(run: Path, suffix: str) -> None:
    from finetune.settings import parse
    from finetune.sweep.grid import make_points, read_file

    for path in (run / f"recipe{suffix}", run / "moved.json"):
        with contextlib.suppress(UserError):
            parse(["--config", str(path)])
    sections = read_file(run / f"sweep{suffix}")
    make_points(sections["train"], sections["grid"], runs=sections["runs"], seeds=sections["seeds"])


def log_case(chance: random.Random) -> dict[str, Any]:
    """Two logs, one of them damaged, and a config."""
    lines = [",".join(COLUMNS)]
    for step in range(1, chance.randint(1, 12)):
        cells = [
            step,
            step / 8,
            2.5 / step,
            chance.choice(("", 1.5)),
            2e-4,
            1.0,
            step * 9,
            step * 4,
            10.5,
            9.5,
            step,
            1.25,
        ]
        lines.append(",".join(map(str, cells)))
    log = "\n".join(lines).encode() + b"\n"
    return {"log": edited(log, chance), "other": log, "config": damaged(config(), chance), "x": chance.randrange(4)}


def check_log(case: dict[str, Any], folder: Path) -> None:
    import visualize_loss
    from finetune.charts import curves
    from finetune.runs.run_log import RunLog, read_rows

    runs = folder / "logs"
    shutil.rmtree(runs, ignore_errors=True)
    for name, log, data in (("a", case["log"], case["config"]), ("b", case["other"], json.dumps(config()).encode())):
        (runs / name).mkdir(parents=True)
        (runs / name / "training_log.csv").write_bytes(log)
        (runs / name / "experiment_config.json").write_bytes(data)
    shown = io.StringIO()
    table, page = runs / "summary.csv", runs / "page.html"
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        code = visualize_loss.main(
            ["-s", str(table), "--html", str(page), str(runs), "--x", list(curves.X_COLUMNS)[case["x"]]]
        )
    assert code in (0, 2)
    if code == 0:
        with table.open(encoding="utf-8", newline="") as file:
            assert len(list(csv.reader(file))) == 3, "a run is absent from the summary"
    log = runs / "a" / "training_log.csv"
    kept = [row for row in read_rows(log) if int(row[0]) <= 5]
    RunLog(log).start(resumed_at_step=5)
    assert read_rows(log) == kept, "the resumed log has other rows"


def results_case(chance: random.Random) -> dict[str, Any]:
    metrics = {
        "items": 2, "tool_name_accuracy": 0.5, "parameter_accuracy": 0.25, "generation": {"tokens_per_second": 5.0},
        "per_tool": {"dim": {"support": 2, "f1": 1.0}}, "intervals_95": {"tool_name_accuracy": [0.1, 0.9]},
        "settings": {"format": "chatml", "adapter_sha256": None}, "data": {"items_sha256": "0", "sources": ["a"]},
    }  # fmt: skip
    lines = [
        {"source": "rows", "row": n, "settings": "s", "item": item(row=n).fingerprint(), "text": "Done",
         "content": "Done", "parsed_calls": [], "verdicts": {}, "latency_s": 0.1, "parse_errors": []} for n in range(3)
    ]  # fmt: skip
    line = (
        b"\n".join(damaged(one, chance) if chance.random() < 0.5 else json.dumps(one).encode() for one in lines) + b"\n"
    )
    return {"metrics": damaged(metrics, chance), "results": line, "good": metrics}


def check_results(case: dict[str, Any], folder: Path) -> None:
    from evaluate_lora import keep_speed
    from finetune.charts import curves
    from finetune.evaluation.folder import archive_incomparable_scores
    from finetune.evaluation.metrics import metric_names
    from finetune.evaluation.run import ResultsFile
    from finetune.export.hub import read_scores
    from finetune.runs.experiment import Experiment
    from finetune.runs.find import Run
    from finetune.runs.model_card import model_card

    run = folder / "scored"
    shutil.rmtree(run, ignore_errors=True)
    scores = run / "evaluation"
    scores.mkdir(parents=True)
    adapter = run / "final_model"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER), encoding="utf-8")
    for name in ("base_model", "finetuned_model"):
        (scores / f"{name}_metrics.json").write_bytes(case["metrics"])
    path = scores / "base_model_results.jsonl"
    path.write_bytes(case["results"])
    before = [line for line in case["results"].split(b"\n") if line.strip()]
    first, second = item(row=1), item(row=2)
    results = ResultsFile(path, "s", [first, second])
    results.close()
    kept = path.read_text("utf-8").count("\n")
    assert kept or not before or results.archived, "answers are gone"
    for line in results.lines.values():
        assert isinstance(line["text"], str) and line["latency_s"] >= 0
    keep_speed({"generated_rows": 0, "tokens_per_second": None}, scores / "base_model_metrics.json", {})
    curves.summarize(curves.read_run(run / "training_log.csv"))
    experiment = Experiment(run, config())
    with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
        found, _ = read_scores(Run(run, experiment, adapter))
        model_card(experiment, scores=found, metrics=metric_names(found))
    archive_incomparable_scores(scores, {"base": case["good"]}, lambda text: None)
