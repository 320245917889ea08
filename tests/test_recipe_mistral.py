"""The recipe for Mistral 7B Instruct v0.2, in its own format, with a tiny model that has the real tokenizer."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from finetune.export.gguf import tools_folder
from tests import parts
from tests.scripts import ROOT, run_script

PAGE = (ROOT / "docs" / "recipes" / "mistral.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)[1:] for text in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    for line in text.splitlines() if line.startswith("python ")
]  # fmt: skip
SAMPLES = ROOT / "data" / "samples"
TOOLS = ["code_execution", "direct_chat", "rag_retrieval", "web_search"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder in which the page's commands are run, with the model in `model`."""
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("recipe")
    (folder / "data").mkdir()
    (folder / "data" / "samples").symlink_to(SAMPLES)
    (folder / "configs").symlink_to(ROOT / "configs")
    tokenizer = parts.fresh_tokenizer("mistral-v1", parts.MISTRAL_7B_V02_TEMPLATE)
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, sliding_window=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def run(place: Path, *arguments: str, given: str = "", status: int = 0, **env: str):
    """The completed process of one command, with the tiny model in place of the large one."""
    script, *flags = arguments
    if script == "train_lora.py" and "--init_adapter" not in flags:
        flags += ["--model", "model"]
    result = run_script(script, *flags, cwd=place, given=given, env=env)
    assert result.returncode == status, f"{arguments}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr
    return result


def commands(start: str) -> list[list[str]]:
    found = [command for command in COMMANDS if " ".join(command).startswith(start)]
    assert found, start
    return found


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_are_what_the_page_generates(place):
    for command in commands("prepare_data.py"):
        run(place, *command)
    made = place / "data" / "processed" / "tool_choice"
    for split in ("train", "validation", "test"):
        assert (made / f"{split}.jsonl").read_bytes() == (SAMPLES / f"tool_choice_{split}.jsonl").read_bytes()
    rows = rows_of(place / "data" / "raw" / "tool_choice" / "train.jsonl")
    called = [row["messages"][-1]["tool_calls"][0]["function"]["name"] for row in rows]
    assert {name: called.count(name) for name in TOOLS} == dict.fromkeys(TOOLS, 36)
    assert all(row["messages"][-1]["content"] for row in rows), "each call has its reason"


def test_no_database_is_one_line_that_names_the_sample(place):
    (command,) = (line for line in PAGE.splitlines() if line.startswith("python prepare_data.py") and "--sql" in line)
    nobody = {"POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": "1", "POSTGRES_PASSWORD": "hush", "DATABASE_URL": ""}
    result = run(place, *shlex.split(command)[1:], "--overwrite", status=2, **nobody)
    assert len(result.stderr.strip().splitlines()) == 1 and "hush" not in result.stderr
    assert "127.0.0.1" in result.stderr and "data/samples/query_logs.jsonl" in result.stderr


@pytest.mark.parametrize("recipe", ["mistral_tool_aware_10gb", "mistral_tool_aware", "mistral_tool_aware_16gb"])
def test_no_row_of_the_recipe_is_lost(place, recipe):
    result = run(place, "train_lora.py", "--config", f"configs/{recipe}.yaml", "--dry_run", "--show_mask", "1")
    said = " ".join(result.stdout.split())
    assert "Tool: " in said and "Parameters: {" in said and "Reasoning: " in said
    assert re.search(r"\b125\b", said + result.stderr) and "dropped" not in result.stderr


def test_recipe_trains_and_scores(place):
    """Two steps, one answered row: what is trained and how it is scored; the slow test has the complete chain."""
    config = "configs/mistral_tool_aware.yaml"
    run(place, "train_lora.py", "--config", config, "--name", "short", "--max_steps", "2", "--save_steps", "0")
    recorded = json.loads((place / "experiments" / "short" / "experiment_config.json").read_text(encoding="utf-8"))
    assert recorded["format"]["name"] == "tool-reasoning"
    run(place, "evaluate_lora.py", "experiments/short", "--dataset", "data/samples/tool_choice_custom.json",
        "--limit", "1", "--max_new_tokens", "4", "--only", "tuned")  # fmt: skip
    scores = json.loads(
        (place / "experiments" / "short" / "evaluation" / "finetuned_model_metrics.json").read_text(encoding="utf-8")
    )
    assert scores["items_by_kind"] == {"call": 1} and scores["per_tool"]["rag_retrieval"]["support"] == 1


@pytest.mark.slow
def test_every_command_of_the_page(place):
    if not (tools_folder() / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's converter is not installed: make install-test")
    (place / ".env").write_text('export WANDB_PROJECT="mistral-tool-aware"\n', encoding="utf-8")
    for command in COMMANDS:
        overwrite = ["--overwrite"] if command[0] == "prepare_data.py" else []
        run(place, *command, *overwrite, given="What does the style guide say about naming?\n/quit\n")
    runs = {name: place / "experiments" / name for name in ("stage1", "stage2")}
    for folder in runs.values():
        assert (folder / "final_model" / "adapter_model.safetensors").is_file()
    results = runs["stage1"] / "evaluation"
    for side in ("base", "finetuned"):
        scores = json.loads((results / f"{side}_model_metrics.json").read_text(encoding="utf-8"))
        assert set(scores["per_tool"]) <= set(TOOLS) and "tool_selection_accuracy" in scores
        assert scores["confusion_matrix"]["labels"][:4] == TOOLS
        assert len(rows_of(results / f"{side}_model_results.jsonl")) == 15
    assert (results / "confusion_matrix.png").is_file()
    logs = json.loads((runs["stage1"] / "evaluation_logs" / "finetuned_model_metrics.json").read_text("utf-8"))
    assert logs["counted"]["tool_name_accuracy"] == 12 and logs["counted"]["parameter_accuracy"] == 11
    serve = (runs["stage1"] / "exports" / "vllm" / "serve.sh").read_text(encoding="utf-8")
    assert "--tool-call-parser sandwich" in serve
    result = run(place, "export_lora.py", "experiments/stage1", "--to", "ollama", status=2)
    assert "finds no calls that are written as lines" in result.stderr


def test_use_wandb_is_report_to_wandb(tmp_path):
    (tmp_path / ".env").write_text("USE_WANDB=true\n", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("{}\n", encoding="utf-8")
    for flags, said in (([], True), (["--report_to", "none"], False)):
        result = run_script("train_lora.py", "--model", "smollm2-135m", "--dataset", "rows.jsonl", *flags, cwd=tmp_path)
        assert result.returncode == 2 and ("USE_WANDB is set: --report_to wandb" in result.stderr) == said


def test_environment_file(tmp_path, monkeypatch):
    """`.env` gives tokens and trackers that the environment lacks, and no other variable."""
    from finetune import packages

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packages.os, "environ", {"WANDB_PROJECT": "mine"})
    text = 'export HF_TOKEN="hf_x"\nWANDB_PROJECT=theirs\nUSE_WANDB=True\nPATH=/tmp\n'
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    packages.apply_dotenv()
    assert packages.os.environ == {"WANDB_PROJECT": "mine", "HF_TOKEN": "hf_x", "USE_WANDB": "True"}
    assert packages.wants_wandb()
