"""The finished adapter's folder: adapter, tokenizer, template as trained, generation config, model card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.files import atomic_directory
from finetune.models.hub import hub_token
from finetune.runs.experiment import FINAL, Experiment


def save_final_model(experiment: Experiment, model: Any, tokenizer: Any, fmt: Any, end_of_turn_ids: list[int]) -> Path:
    """Write `final_model/`, complete or not at all; returns its path."""
    target = experiment.folder / FINAL
    with atomic_directory(target, replace=True) as folder:  # a resumed run may have finished before
        model.save_pretrained(str(folder), safe_serialization=True)
        saved = copy.copy(tokenizer)  # the caller's tokenizer keeps its own template
        saved.chat_template = fmt.pinned_template()
        saved.save_pretrained(str(folder))
        generation_config(model, end_of_turn_ids).save_pretrained(str(folder))
        (folder / "README.md").write_text(model_card(experiment), encoding="utf-8", errors="backslashreplace")
    return target


def generation_config(model: Any, end_of_turn_ids: list[int]) -> Any:
    """The base model's generation config, greedy by default, stopping at every end of turn of the format."""
    from transformers import GenerationConfig

    base = getattr(model, "generation_config", None) or GenerationConfig()
    known = base.eos_token_id if isinstance(base.eos_token_id, list) else [base.eos_token_id]
    config = GenerationConfig(**{k: v for k, v in base.to_diff_dict().items() if k != "transformers_version"})
    config.eos_token_id = list(dict.fromkeys([*end_of_turn_ids, *(i for i in known if i is not None)]))
    return config


def model_card(experiment: Experiment) -> str:
    """Markdown with the front matter the Hub reads: what was trained on what, how, and the numbers it reached."""
    config, flags = experiment.config, experiment.config["flags"]
    data, result = config["data"], config.get("result", {})
    lines = [
        "---",
        f"base_model: {config['base_model']}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora, tool-calling, sandwich]",
        "---",
        f"# {experiment.folder.name}",
        "",
        f"LoRA adapter for `{config['base_model']}`, trained on the assistant's tokens only.",
        "",
        "| | |",
        "| --- | --- |",
        f"| data | {', '.join(flags['dataset'])} "
        f"({data['sequences']:,} sequences, {data['trained_tokens']:,} trained tokens) |",
        f"| format | {config['format']['name']} (template in `chat_template.jinja`) |",
        f"| LoRA | r {flags['rank']}, alpha {flags['alpha']}, dropout {flags['dropout']}, "
        f"{', '.join(flags['target_modules'])} |",
        f"| training | lr {flags['lr']:g}, {flags['epochs']:g} epochs, "
        f"{flags['batch_size'] * flags['grad_accum']} rows a step, {config['steps']} steps, seed {flags['seed']} |",
        f"| base weights | {'4-bit NF4' if config['load_in_4bit'] else config['dtype']} |",
    ]
    if result.get("final_loss") is not None:
        lines.append(f"| training loss | {result['final_loss']:.4f} |")
    if result.get("best_eval_loss") is not None:
        lines.append(f"| best evaluation loss | {result['best_eval_loss']:.4f} |")
    lines += ["", "Evaluation results, once `evaluate_lora.py` has run, lie in the run's `evaluation/` folder.", ""]
    return "\n".join(lines)


def push_to_hub(folder: Path, repository: str, private: bool = True) -> str:
    """Upload the folder; the token comes from HF_TOKEN or the Hub's own login, never a flag. Private unless told."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=hub_token())
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=str(folder), repo_id=repository))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"upload to {repository} failed ({reason}); the adapter is safe in {folder}: "
            "set HF_TOKEN to a token with write access and upload it again"
        ) from error
