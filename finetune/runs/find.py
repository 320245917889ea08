"""What a path names (a run, an adapter, a model), and its model ready for inference."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.models.adapter import adapter_config, attach_adapter
from finetune.models.hub import check_available
from finetune.models.limits import check_vocabulary, model_positions
from finetune.models.loading import Loaded, import_unsloth, load_base, load_config, load_tokenizer
from finetune.models.rope import stretched
from finetune.runs.experiment import CONFIG, FINAL, Experiment
from formats import Format, choose_format, get_format

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


log = logging.getLogger("sandwich")


@dataclass
class Run:
    """What a path names: an experiment folder, an adapter folder, or (adapter None) a complete model.

    A run's own exports have its `experiment`: a complete model (`RUN/exports/merged`) or an adapter.
    """

    path: str | Path
    experiment: Experiment | None
    adapter: Path | None
    trust_remote_code: bool = False  # from the command line alone: the files of a run may come from anyone

    @property
    def base_name(self) -> str:
        """The base model by the name it was trained under; of a complete model its own. Raises UserError."""
        if self.adapter is None:
            return str(self.path)
        if self.experiment is not None:
            return str(self.experiment.config["base_model"])
        return str(adapter_config(self.adapter)["base_model_name_or_path"])

    @property
    def base_revision(self) -> str | None:
        """The revision of the base model, as far as it is known."""
        return self.base_settings().get("revision")

    def base_settings(self) -> dict[str, Any]:
        """The arguments of `load_base` with which the base model was loaded for training, as far as they are known."""
        trust = {"trust_remote_code": self.trust_remote_code}
        if self.adapter is None:
            if self.experiment is None:
                return trust
            return {"max_seq_length": self.experiment.config["flags"]["max_seq_length"], **trust}
        if self.experiment is None:
            return {"revision": adapter_config(self.adapter).get("revision"), **trust}
        config, flags = self.experiment.config, self.experiment.config["flags"]
        return {
            "revision": config.get("base_model_revision"),
            "dtype": config.get("dtype", "auto"),
            "load_in_4bit": config.get("load_in_4bit"),
            "max_seq_length": flags["max_seq_length"],
            "rope_scaling": self.rope_scaling,
            **trust,
        }

    @property
    def rope_scaling(self) -> str | None:
        """The run's --rope_scaling; None where the model's own config already holds it."""
        if self.experiment is None or self.adapter is None:
            return None
        return self.experiment.config["flags"].get("rope_scaling")

    def stretched_positions(self) -> dict[str, Any] | None:
        """The entries of the base's config.json that --rope_scaling changes; None without it."""
        if not self.rope_scaling:
            return None
        config = load_config(self.base_name, self.base_settings().get("revision"), self.trust_remote_code)
        return stretched(config, self.rope_scaling, self.base_name)

    def max_length(self) -> int | None:
        """The run's limit in tokens, never more than the model's positions; None for a model without a run."""
        if self.experiment is None:
            return None
        flags = self.experiment.config["flags"]
        revision = None if self.adapter is None else self.experiment.config.get("base_model_revision")
        config = load_config(self.base_name, revision, self.trust_remote_code, self.rope_scaling)
        return min(filter(None, (flags.get("max_seq_length"), model_positions(config))), default=None)

    def check_vocabulary(self) -> None:
        """UserError when the tokenizer has more tokens than the base has embeddings; reads no weights."""
        config = load_config(self.base_name, self.base_settings().get("revision"), self.trust_remote_code)
        rows = getattr(config.get_text_config(), "vocab_size", None)
        check_vocabulary(self._tokenizer(), rows, self.base_name)

    def load_base(self, **overrides: Any) -> tuple[Loaded, Format]:
        """(base model loaded as for training, format); `overrides` are arguments of `load_base`."""
        loaded = load_base(self.base_name, **{**self.base_settings(), **overrides})
        if self.experiment is None and self.adapter is not None:  # the template beside it is the trained one
            return loaded, self.load_tokenizer()[1]
        return loaded, self.format_for(loaded.tokenizer)

    def load_tokenizer(self) -> tuple[PreTrainedTokenizerBase, Format]:
        """(tokenizer, format), without the weights."""
        tokenizer = self._tokenizer()
        return tokenizer, self.format_for(tokenizer)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.experiment is None and self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file():
            return load_tokenizer(str(self.adapter), trust_remote_code=self.trust_remote_code)
        return load_tokenizer(self.base_name, self.base_settings().get("revision"), self.trust_remote_code)

    def format_for(self, tokenizer: PreTrainedTokenizerBase) -> Format:
        """The format the run was trained with (the user's own by its file); without a run, chosen by the tokenizer."""
        if self.experiment is None:
            fmt = choose_format(tokenizer)[0]
        else:
            given = str(self.experiment.config["flags"]["format"])
            name = given if given.endswith((".yaml", ".yml")) else self.experiment.config["format"].get("name", given)
            fmt = get_format(name, tokenizer)
        if fmt.unreadable_calls:
            log.warning("%s; an answer's calls are shown, and scored, as text", fmt.unreadable_calls)
        return fmt


def find_run(path: str | Path, *, trust_remote_code: bool = False) -> Run:
    """What `path` names; of a run without a finished adapter its newest checkpoint.

    trust_remote_code  run code of the base model's repository; never read from the run's own files
    Raises UserError for a folder that is not a run, an adapter or a model, and for a run without any adapter.
    """
    run = _find(path)
    run.trust_remote_code = trust_remote_code
    flags = run.experiment.config["flags"] if run.experiment is not None else {}
    if flags.get("trust_remote_code") and not trust_remote_code:
        log.warning(
            "run %s: its config sets trust_remote_code, which is ignored; add --trust_remote_code if you trust the "
            "base model", path,
        )  # fmt: skip
    return run


def _find(path: str | Path) -> Run:
    if Path(path).is_file():
        raise UserError(f"{path} is a file; name a run folder, an adapter folder or a model")
    if isinstance(path, str) and not Path(path).is_dir():
        check_available(path)
        return Run(path, None, None)
    path = Path(path)
    if (path / CONFIG).is_file():
        experiment, adapter = open_trained(path), path / FINAL
        if not (adapter / "adapter_config.json").is_file():
            checkpoints = experiment.checkpoints()
            if not checkpoints:
                raise UserError(f"run {path} has neither {FINAL}/ nor a checkpoint yet; wait for its first checkpoint")
            adapter = checkpoints[-1]
        return Run(path, experiment, adapter)
    is_adapter = (path / "adapter_config.json").is_file()
    if not is_adapter and not (path / "config.json").is_file():
        raise UserError(f"{path} is neither a run folder, an adapter nor a model; name one of them")
    if is_adapter and (path.parent / CONFIG).is_file():
        return Run(path, open_trained(path.parent), path)
    run = path.resolve().parents[1] if path.resolve().parent.name == "exports" else None
    return Run(path, open_trained(run) if run and (run / CONFIG).is_file() else None, path if is_adapter else None)


def open_trained(folder: Path) -> Experiment:
    return Experiment.open(folder, entries=("flags", "base_model", "format"))


def load_for_inference(
    path: str | Path,
    *,
    base: bool = False,
    merged: bool = False,
    format_name: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Format]:
    """(model, tokenizer, format) of an experiment folder, an adapter folder, or a complete model.

    base  True: without the adapter. merged  True: adapter folded into the weights (bfloat16 results change slightly).
    format_name  overrides the format that the run was trained with
    Raises UserError as `find_run` does.
    """
    run = find_run(path, trust_remote_code=trust_remote_code)
    check_available(run.base_name, run.base_revision)
    loaded, fmt = run.load_base()
    fmt = get_format(format_name, loaded.tokenizer) if format_name else fmt
    model = loaded.model
    if run.adapter is not None and not base:
        model = attach_adapter(model, run.adapter)
        if merged:
            model = model.merge_and_unload()
    return import_unsloth().FastLanguageModel.for_inference(model) or model, loaded.tokenizer, fmt
