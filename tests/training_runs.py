"""Runs of train_lora.py on a few rows: the rows, a tiny model, and what a run leaves."""

from __future__ import annotations

import csv
import json
import sys

from finetune.models.bundled import smollm2_dir
from tests.scripts import ROOT, run_script
from tests.tiny import tiny_llama

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def conversation(number):
    city = ["Oslo", "Rome", "Paris", "Kyiv", "Seoul"][number % 5]
    call = {"type": "function", "function": {"name": "get_weather", "arguments": json.dumps({"city": city})}}
    return {
        "messages": [
            {"role": "user", "content": f"Weather in {city}, please ({number})"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "name": "get_weather", "content": '{"t": 3}'},
            {"role": "assistant", "content": f"It is 3 degrees in {city}."},
        ],
        "tools": json.dumps(TOOLS),
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_tiny_model(folder):
    """Two small random layers under the real SmolLM2 tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir())
    tokenizer.save_pretrained(folder)
    tiny_llama(tokenizer, hidden_size=32, intermediate_size=64, max_position_embeddings=8192).save_pretrained(folder)
    return folder


def command(*arguments):
    return [sys.executable, str(ROOT / "train_lora.py"), *map(str, arguments)]


def run(*arguments, **options):
    return run_script("train_lora.py", *arguments, **options)


def log_rows(folder):
    with (folder / "training_log.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def config_of(folder):
    return json.loads((folder / "experiment_config.json").read_text(encoding="utf-8"))
