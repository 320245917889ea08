"""A small finished run for the export tests: a random Llama with a real tokenizer, and a random adapter."""

from __future__ import annotations

import json
from pathlib import Path

from tests import parts
from tests.formats.cases import ROWS
from tests.tiny import tiny_llama


def make_run(folder: Path, format_name: str = "chatml", tokenizer_name: str = "smollm2", *, data: bool = True) -> Path:
    """A run folder as train_lora.py writes it; returns its path."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from finetune.runs.experiment import Experiment
    from finetune.runs.saving import save_final_model
    from formats import check_tokenizer, get_format

    tokenizer = parts.tokenizer(tokenizer_name)
    base = folder / "base"
    model = tiny_llama(tokenizer, max_position_embeddings=2048)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = folder / "rows.jsonl"
    lines = [json.dumps(ROWS[name], ensure_ascii=False) + "\n" for name in ("single_call", "call_and_result", "plain")]
    if data:
        rows.write_text("".join(lines), encoding="utf-8")

    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "down_proj"]
    lora = LoraConfig(r=12, lora_alpha=48, init_lora_weights=False, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(base), lora)
    fmt = get_format(format_name, tokenizer)
    experiment = Experiment.create(
        folder / "experiments",
        "run",
        {
            "flags": {
                "dataset": [str(rows)], "format": format_name, "max_seq_length": 1024, "trust_remote_code": False,
                "rank": 12, "alpha": 48, "dropout": 0.0, "target_modules": targets, "lr": 1e-3, "epochs": 1,
                "batch_size": 1, "grad_accum": 1, "seed": 0,
            },
            "base_model": str(base), "base_model_revision": None, "dtype": "float32", "load_in_4bit": False,
            "format": {"name": fmt.name}, "data": {"sequences": 3, "trained_tokens": 99}, "steps": 2,
            "result": {"final_loss": 1.25},
        },
        exact_name=True,
    )  # fmt: skip
    save_final_model(experiment, adapted, tokenizer, fmt, check_tokenizer(tokenizer, fmt))
    (experiment.folder / "training_log.csv").write_text("step,loss,eval_loss\n1,2.5,\n2,1.25,1.5\n", encoding="utf-8")
    return experiment.folder
