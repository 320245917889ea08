"""The recipes in configs/: published numbers; tests/test_recipes.py runs four of them, the others are dry runs here."""

import json
from pathlib import Path

import pytest

import formats
from finetune import settings
from tests.scripts import ROOT, run_script

RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
# The published numbers of the five systems.
PUBLISHED = {
    "korean_tool_calling": {"model": "kakaocorp/kanana-1.5-2.1b-instruct-2505", "rank": 16, "alpha": 32, "lr": 2e-4,
                            "epochs": 3, "batch_size": 4, "grad_accum": 4, "max_seq_length": 9000},
    "gennx_qlora": {"model": "Qwen/Qwen2.5-1.5B-Instruct", "rank": 8, "target_modules": ["all-linear"], "lr": 2e-4,
                    "scheduler": "cosine", "warmup_ratio": 0.05, "batch_size": 1, "grad_accum": 8, "dtype": "float16",
                    "optim": "paged_adamw_8bit", "early_stopping_patience": 3, "early_stopping_threshold": 0.01,
                    "load_in_4bit": True},
    "fitness_qa": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "rank": 16, "alpha": 64, "dropout": 0.15, "lr": 3e-5,
                   "target_modules": ["q_proj", "v_proj"], "epochs": 5, "batch_size": 2, "grad_accum": 16,
                   "warmup_steps": 50, "logging_steps": 20, "eval_steps": 50, "save_steps": 50, "save_total_limit": 2,
                   "load_best": True, "max_seq_length": 512, "report_to": "none"},
    "mistral_tool_aware": {"model": "mistralai/Mistral-7B-Instruct-v0.2", "rank": 8, "alpha": 16, "epochs": 3,
                           "batch_size": 1, "grad_accum": 8, "max_seq_length": 2048, "load_in_4bit": True,
                           "gradient_checkpointing": True, "optim": "paged_adamw_8bit", "save_steps": 100},
    "mistral_tool_aware_10gb": {"rank": 4, "alpha": 16, "batch_size": 1, "grad_accum": 16, "max_seq_length": 1024},
    "mistral_tool_aware_16gb": {"rank": 16, "alpha": 16, "batch_size": 2, "grad_accum": 4, "max_seq_length": 4096},
    "qwen2_cpu": {"model": "Qwen/Qwen2-1.5B", "rank": 64, "alpha": 16, "dropout": 0.05, "batch_size": 1,
                  "target_modules": ["q_proj", "v_proj"], "grad_accum": 4, "lr": 2e-4, "epochs": 3, "optim":
                  "adamw_torch", "weight_decay": 0.01, "scheduler": "cosine", "dtype": "float32", "logging_steps": 10,
                  "save_steps": 500, "max_seq_length": 512},
}  # fmt: skip
RUN_ELSEWHERE = ("korean_tool_calling", "gennx_qlora", "qwen2_cpu", "fitness_qa", "mistral_tool_aware")
TOOL = {
    "type": "function",
    "function": {
        "name": "open_valve",
        "description": "Open a valve",
        "parameters": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]},
    },
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(20):
            call = {"type": "function", "function": {"name": "open_valve", "arguments": {"id": number}}}
            messages = [
                {"role": "user", "content": f"Please open valve {number}."},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "ok", "name": "open_valve"},
                {"role": "assistant", "content": f"Valve {number} is open."},
            ]
            file.write(json.dumps({"messages": messages, "tools": [TOOL]}) + "\n")
    return path


def test_every_published_system_has_a_recipe():
    assert {path.stem for path in RECIPES} >= set(PUBLISHED) | {"demo"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_names_model_data_and_a_known_format(recipe):
    chosen = settings.parse(["--config", str(recipe)])
    assert chosen.dataset and chosen.model
    assert chosen.format == "auto" or chosen.format in formats.FORMATS
    assert recipe.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_recipe_has_the_published_numbers(name):
    chosen = settings.parse(["--config", str(ROOT / "configs" / f"{name}.yaml")])
    assert {key: getattr(chosen, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_the_config_with_sections_is_the_recipe():
    """configs/fitness_qa.json, in the names of other trainers, sets what the flat recipe sets, and the run's folder."""
    flat, sections = (settings.parse(["--config", str(ROOT / "configs" / f"fitness_qa.{end}")]) for end in
                      ("yaml", "json"))  # fmt: skip
    assert sections.run_flags() == flat.run_flags() | {"name": "fitness_qa"}


@pytest.mark.parametrize("recipe", [path for path in RECIPES if not path.stem.startswith(RUN_ELSEWHERE)],
                         ids=lambda path: path.stem)  # fmt: skip
def test_recipe_passes_a_dry_run(recipe, rows, tmp_path):
    # The bundled model has only ChatML's control tokens, and the datasets of the recipes are not available.
    arguments = ["--config", recipe, "--model", "smollm2-135m", "--format", "chatml", "--dataset", rows, "--dry_run",
                 "--experiments_dir", tmp_path / "experiments"]  # fmt: skip
    if settings.parse(["--config", str(recipe)]).eval_dataset:
        arguments += ["--eval_dataset", rows]
    result = run_script("train_lora.py", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "experiments").exists()
