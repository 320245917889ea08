"""The folder of a finished adapter: adapter, tokenizer, chat template, generation config, model card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.files import atomic_directory, require_run_folder
from finetune.runs.experiment import FINAL, Experiment
from finetune.runs.model_card import model_card
from formats import Format
from formats.escape import unmarked_as_special
from formats.response_template import example_answers, response_template

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def save_final_model(
    experiment: Experiment,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    fmt: Format,
    end_of_turn_ids: list[int],
) -> Path:
    """Write `final_model/`, complete or not at all; returns its path. UserError when the run's folder has vanished."""
    target = experiment.folder / FINAL
    require_run_folder(experiment.folder)
    with atomic_directory(target, replace=True) as folder:  # a resumed run may have finished before
        model.save_pretrained(str(folder), safe_serialization=True)
        saved = with_format(tokenizer, fmt)  # the caller's tokenizer keeps its own template
        saved.save_pretrained(str(folder))
        generation_config(model, end_of_turn_ids).save_pretrained(str(folder))
        (folder / "README.md").write_text(model_card(experiment), encoding="utf-8", errors="backslashreplace")
    return target


def with_format(tokenizer: PreTrainedTokenizerBase, fmt: Format) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with the format's chat template and response template.

    A base's own response template would read other calls than those trained, so it is replaced or removed.
    """
    saved = copy.copy(tokenizer)
    saved.chat_template = fmt.pinned_template()
    # `init_kwargs` is what save_pretrained writes; `response_schema` is the name in earlier versions of Transformers.
    stale = ("response_template", "response_schema")
    saved.init_kwargs = {key: value for key, value in tokenizer.init_kwargs.items() if key not in stale}
    # Transformers (5.20 and later) encodes these as text in contents, with sanitize_control_tokens=True.
    if names := unmarked_as_special(tokenizer, fmt):
        saved.init_kwargs["chat_control_tokens"] = names
    saved.response_template = checked_response_template(fmt, tokenizer)
    if getattr(saved, "response_schema", None) is not None:
        saved.response_schema = None
    return saved


def checked_response_template(fmt: Format, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The format's response template if Transformers reads with it what the format's own parser reads, else None."""
    try:
        from transformers.utils.chat_parsing import parse_response
    except ImportError:  # an earlier version of Transformers
        return None
    template = response_template(fmt, tokenizer)
    if template is None:
        return None
    for prompt, answer in example_answers(fmt, tokenizer):
        expected = fmt.parse(answer)
        try:
            message = parse_response(answer, template, prefix=prompt)
        except Exception:  # the parser raises what its content parsers raise
            return None
        calls = [call["function"] for call in message.get("tool_calls", [])]
        if calls != expected.tool_calls or message.get("content", "") != expected.content:
            return None
    return template


def generation_config(model: PreTrainedModel, end_of_turn_ids: list[int]) -> GenerationConfig:
    """The base model's generation config, greedy by default, stopping at every end of turn of the format."""
    from transformers import GenerationConfig

    base = getattr(model, "generation_config", None) or GenerationConfig()
    known = base.eos_token_id if isinstance(base.eos_token_id, list) else [base.eos_token_id]
    config = GenerationConfig(**{k: v for k, v in base.to_diff_dict().items() if k != "transformers_version"})
    config.eos_token_id = list(dict.fromkeys([*end_of_turn_ids, *(i for i in known if i is not None)]))
    return config
