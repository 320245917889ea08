"""The folder of a finished adapter: adapter, tokenizer, chat template, generation config, model card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.files import atomic_directory
from finetune.runs.experiment import FINAL, Experiment
from finetune.runs.model_card import model_card

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from formats import Format


def save_final_model(
    experiment: Experiment,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fmt: Format,
    end_of_turn_ids: list[int],
) -> Path:
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


def generation_config(model: PreTrainedModel, end_of_turn_ids: list[int]) -> GenerationConfig:
    """The base model's generation config, greedy by default, stopping at every end of turn of the format."""
    from transformers import GenerationConfig

    base = getattr(model, "generation_config", None) or GenerationConfig()
    known = base.eos_token_id if isinstance(base.eos_token_id, list) else [base.eos_token_id]
    config = GenerationConfig(**{k: v for k, v in base.to_diff_dict().items() if k != "transformers_version"})
    config.eos_token_id = list(dict.fromkeys([*end_of_turn_ids, *(i for i in known if i is not None)]))
    return config
