"""What a smaller rank would do: evaluate_lora.py --ranks, export_lora.py --rank, train_lora.py --eval_ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import evaluate_lora
import export_lora
import train_lora
from finetune.evaluation.rank_losses import halved_ranks, smallest_rank
from finetune.runs.find import find_run
from tests import training_runs
from tests.exported import make_run
from tests.helpers import lazy
from tests.scripts import run_script

torch = lazy("torch")
safetensors = lazy("safetensors.torch")
transformers = lazy("transformers")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A run with a random adapter of rank 12."""
    return make_run(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def rows(run_folder) -> Path:
    return run_folder.parents[1] / "rows.jsonl"


@pytest.fixture(scope="module")
def reported(run_folder, rows):
    """(report, stdout) of ranks 2 and 4 of a copy of the run."""
    folder = run_folder.with_name("reported")
    shutil.copytree(run_folder, folder)
    result = run_script("evaluate_lora.py", folder, "--ranks", "4,2", "--dataset", rows, "--max_new_tokens", 4)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "evaluation" / "ranks.json").read_text("utf-8")), result.stdout


@pytest.fixture(scope="module")
def small_adapter(run_folder) -> Path:
    """The export of rank 4."""
    result = run_script("export_lora.py", run_folder, "--to", "adapter", "--rank", 4)
    assert result.returncode == 0, result.stderr
    assert "rank 4 of 12: " in result.stderr
    return run_folder / "exports" / "adapter"


def merged(run_folder: Path, rank: int | None):
    """The base with the best approximation of each layer's update added, from the full matrix by NumPy."""
    base = transformers.LlamaForCausalLM.from_pretrained(run_folder.parents[1] / "base")
    tensors = safetensors.load_file(run_folder / "final_model" / "adapter_model.safetensors")
    for name in [name for name in tensors if ".lora_A." in name]:
        a, b = (tensors[one].double().numpy() for one in (name, name.replace("lora_A", "lora_B")))
        left, values, right = np.linalg.svd(48 / 12 * b @ a, full_matrices=False)
        update = (left[:, :rank] * values[:rank]) @ right[:rank]
        weight = base.get_submodule(name.removeprefix("base_model.model.").partition(".lora_A")[0]).weight
        weight.data += torch.from_numpy(update).float()
    return base.eval()


def sequences(run_folder: Path, rows: Path) -> list:
    from finetune.evaluation.rank_losses import encode_loss_rows

    run = find_run(run_folder)
    return list(encode_loss_rows(run, *run.load_tokenizer(), [str(rows)])[0].sequences)


def plain_loss(model, pairs) -> float:
    """Mean loss per trained token by Transformers, each row alone."""
    total = count = 0
    with torch.inference_mode():
        for ids, labels in pairs:
            logits, targets = model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(labels)[1:]
            total += torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=-100)
            count += int((targets != -100).sum())
    return float(total) / count


def test_losses_are_those_of_the_approximation(reported, run_folder, rows):
    report, stdout = reported
    pairs = sequences(run_folder, rows)
    assert list(report["ranks"]) == ["2", "4", "12"]
    for rank in (2, 4, 12):
        expected = plain_loss(merged(run_folder, rank), pairs)
        assert report["ranks"][str(rank)]["eval_loss"] == pytest.approx(expected, abs=2e-4)
    base = transformers.LlamaForCausalLM.from_pretrained(run_folder.parents[1] / "base")
    assert report["base_loss"] == pytest.approx(plain_loss(base, pairs), abs=2e-4)
    assert report["loss_rows"]["sequences"] == len(pairs)
    assert report["ranks"]["12"]["energy"] == 1 and 0 < report["ranks"]["2"]["energy"] < 1
    assert report["advice"].split(":")[0] in stdout.replace("\n", " ")


def test_report_has_scores_table_and_picture(reported, run_folder, rows):
    report, _ = reported
    folder = run_folder.with_name("reported") / "evaluation"
    assert all("tool_name_accuracy" in values for values in report["ranks"].values())
    table = (folder / "ranks.md").read_text("utf-8")
    assert table.count("\n| ") == 6, "header, separator, base, two ranks, the adapter"
    assert "| 12 (the adapter itself) |" in table
    assert (folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
    again = run_script("evaluate_lora.py", folder.parent, "--ranks", "2,4", "--dataset", rows, "--max_new_tokens", 4)
    assert again.stderr.count("already answered") == 3, again.stderr


def test_exported_rank_is_the_best_approximation(small_adapter, run_folder, rows):
    from peft import PeftModel

    config = json.loads((small_adapter / "adapter_config.json").read_text("utf-8"))
    tensors = safetensors.load_file(small_adapter / "adapter_model.safetensors")
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (4, 4, {}, False)
    assert {min(tensor.shape) for tensor in tensors.values()} == {4}
    base = transformers.LlamaForCausalLM.from_pretrained(run_folder.parents[1] / "base")
    model = PeftModel.from_pretrained(base, small_adapter).eval()
    ids = torch.tensor([list(range(5, 60))])
    with torch.inference_mode():
        expected, logits = merged(run_folder, 4)(ids).logits, model(ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    names = {path.name for path in small_adapter.iterdir()}
    assert {"chat_template.jinja", "tokenizer.json", "generation_config.json"} <= names


def test_exported_adapter_is_a_run_to_later_commands(small_adapter, rows, tmp_path):
    """Inside the run it has the run's settings; moved elsewhere it is an adapter with its own template."""
    run = find_run(small_adapter)
    assert run.experiment is not None and run.adapter == small_adapter
    result = run_script("export_lora.py", small_adapter, "--to", "merged", "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    moved = tmp_path / "small"
    shutil.copytree(small_adapter, moved, ignore=shutil.ignore_patterns("exports"))
    result = run_script("evaluate_lora.py", moved, "--dataset", rows, "--ranks", "2", "--max_new_tokens", 4)
    assert result.returncode == 0, result.stderr
    assert json.loads((moved / "evaluation" / "ranks.json").read_text("utf-8"))["settings"]["format"] == "chatml"


def test_auto_chooses_by_the_loss(run_folder, rows, tmp_path):
    output, tolerance = tmp_path / "auto", 0.05
    result = run_script("export_lora.py", run_folder, "--to", "adapter", "--rank", "auto", "--tolerance", tolerance,
                        "--dataset", rows, "--output", output)  # fmt: skip
    assert result.returncode == 0, result.stderr
    shown = result.stderr.partition(": 1: ")[2].partition(";")[0]
    losses = {int(rank): float(loss) for rank, loss in (part.split(": ") for part in ("1: " + shown).split(", "))}
    assert list(losses) == [1, 2, 4, 8, 12]
    enough = min(rank for rank, loss in losses.items() if loss <= losses[12] + tolerance)
    assert json.loads((output / "adapter_config.json").read_text("utf-8"))["r"] == enough


def test_without_rank_the_adapter_is_copied(run_folder, tmp_path):
    output = tmp_path / "copy"
    assert export_lora.main([str(run_folder), "--to", "adapter", "--output", str(output)]) == 0
    name = "adapter_model.safetensors"
    assert (output / name).read_bytes() == (run_folder / "final_model" / name).read_bytes()


REFUSED = {
    "above": (evaluate_lora, ["--ranks", "4,64", "--dataset", "{rows}"], "--ranks 64: must be <= 12, the rank of the"),
    "no rows": (evaluate_lora, ["--ranks", "4"], "has no evaluation rows of its own; name held-out rows"),
    "suite": (evaluate_lora, ["--ranks", "4", "--suite", "bfcl:multiple"], "--ranks and --suite exclude each other"),
    "only": (evaluate_lora, ["--ranks", "4", "--only", "base", "--dataset", "{rows}"], "--ranks and --only exclude"),
    "alone": (evaluate_lora, ["--tolerance", "0.1", "--dataset", "{rows}"], "--tolerance needs --ranks"),
    "zero": (evaluate_lora, ["--ranks", "4,0"], "must be an integer >= 1"),
    "export above": (export_lora, ["--to", "adapter", "--rank", "13"], "--rank 13: must be <= 12"),
    "export auto": (export_lora, ["--to", "adapter", "--rank", "auto"], "has no evaluation rows of its own"),
    "export merged": (export_lora, ["--to", "merged", "--rank", "4"], "--rank is for --to adapter"),
    "export rows": (export_lora, ["--to", "adapter", "--rank", "4", "--dataset", "{rows}"], "is for --rank auto"),
}


def exit_status(script, *arguments: str) -> int:
    try:
        return script.main(list(arguments))
    except SystemExit as ended:  # argparse
        return ended.code


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, run_folder, rows, tmp_path, capsys):
    script, arguments, reason = REFUSED[name]
    arguments = [one.format(rows=rows) for one in arguments]
    assert exit_status(script, str(run_folder), *arguments, "--output", str(tmp_path / "out")) == 2
    assert reason in capsys.readouterr().err


def test_model_without_adapter_has_no_rank(run_folder, rows, tmp_path, capsys):
    base = str(run_folder.parents[1] / "base")
    for script, arguments in (
        (evaluate_lora, ["--ranks", "2", "--dataset", str(rows)]),
        (export_lora, ["--to", "adapter"]),
    ):
        assert exit_status(script, base, *arguments, "--output", str(tmp_path / "out")) == 2
        assert "has no adapter" in capsys.readouterr().err


def test_smallest_rank_that_keeps_loss_and_scores():
    results = {
        2: {"eval_loss": 0.20, "parameter_accuracy": 0.9},
        4: {"eval_loss": 0.109, "parameter_accuracy": 0.5},
        8: {"eval_loss": 0.11, "parameter_accuracy": 0.89},
        16: {"eval_loss": 0.10, "parameter_accuracy": 0.9},
    }
    assert smallest_rank(results, 0.01) == 8
    assert smallest_rank(results, 0.1) == 2
    assert smallest_rank(results, 0.0) == 16
    assert smallest_rank({rank: {"eval_loss": one["eval_loss"]} for rank, one in results.items()}, 0.01) == 4
    assert smallest_rank({4: {"eval_loss": 0.1}, 8: {"eval_loss": 0.2}}, 0.0) == 4, "better than the adapter itself"
    assert halved_ranks(12) == [1, 2, 4, 8] and halved_ranks(16) == [1, 2, 4, 8] and halved_ranks(1) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    """A run of rank 8 with --eval_ranks, and its stderr."""
    folder = tmp_path_factory.mktemp("trained")
    rows = training_runs.write_rows(folder / "rows.jsonl", [training_runs.conversation(i) for i in range(12)])
    result = training_runs.run(
        "--model", tiny_model, "--dataset", rows, "--format", "chatml", "--dtype", "float32", "--rank", 8, "--lr",
        "2e-2", "--max_steps", 6, "--eval_fraction", 0.3, "--eval-ranks", 2, 4, "--experiments_dir", folder,
        "--name", "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stderr


def test_run_records_the_rank_it_used(trained):
    folder, stderr = trained
    ranks = training_runs.config_of(folder)["ranks"]
    assert ranks["rank"] == 8 and list(ranks["energy"]) == ["2", "4"]
    assert 0 < ranks["energy"]["2"] <= ranks["energy"]["4"] <= 1
    assert list(ranks["eval_loss"]) == ["2", "4", "8"]
    logged = [float(row["eval_loss"]) for row in training_runs.log_rows(folder) if row["eval_loss"]]
    assert ranks["eval_loss"]["8"] == pytest.approx(logged[-1], abs=2e-6), "the adapter itself, evaluated once more"
    assert ranks["eval_loss"]["2"] != ranks["eval_loss"]["8"]
    assert "rank used" in stderr and "directions of each layer" in stderr and "loss by rank" in stderr


def test_report_of_a_runs_own_evaluation_rows(trained):
    """The same rows and losses as the run measured itself, and no scores without --dataset."""
    folder, _ = trained
    result = run_script("evaluate_lora.py", folder, "--ranks", "2,4")
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "evaluation" / "ranks.json").read_text("utf-8"))
    losses = {rank: values["eval_loss"] for rank, values in report["ranks"].items()}
    assert losses == pytest.approx(training_runs.config_of(folder)["ranks"]["eval_loss"], abs=1e-4)
    assert report["loss_rows"]["source"] == "the run's evaluation rows"
    assert set(report["ranks"]["2"]) == {"eval_loss", "energy"} and report["answers"] == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rank", "8", "--eval_ranks", "4", "8", "--eval_fraction", "0.2"], "--eval_ranks 8: must be < 8"),
        (["--rank", "8", "--eval_ranks", "4"], "--eval_ranks needs evaluation rows"),
    ],
    ids=["rank", "rows"],
)
def test_eval_ranks_refused(arguments, reason, capsys):
    assert exit_status(train_lora, *arguments, "--dataset", "rows.jsonl") == 2
    assert reason in capsys.readouterr().err
