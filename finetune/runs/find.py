"""What a path names (a run, an adapter, a model), and its model ready to answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.models.adapter import adapter_config, attach_adapter
from finetune.models.loading import Loaded, import_unsloth, load_base, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Run:
    """What a path names: an experiment folder, an adapter folder, or (without an adapter) a whole model.

    A whole model has an `experiment` where it is a run's own export (`RUN/exports/merged`).
    """

    path: str | Path
    experiment: Any | None  # finetune.runs.experiment.Experiment
    adapter: Path | None

    @property
    def base_name(self) -> str:
        """The base model by the name it was trained under; of a whole model its own. Raises UserError."""
        if self.adapter is None:
            return str(self.path)
        if self.experiment is not None:
            return str(self.experiment.config["base_model"])
        return str(adapter_config(self.adapter)["base_model_name_or_path"])

    def load_base(self, **overrides: Any) -> tuple[Loaded, Any]:
        """(base model as it was loaded for training, format it was trained with); `overrides` go to `load_base`.

        For a plain model or a stranger's adapter the format is chosen by the tokenizer.
        """
        if self.adapter is None:
            loaded = load_base(self.base_name, **overrides)
        elif self.experiment is None:
            revision = adapter_config(self.adapter).get("revision")
            loaded = load_base(self.base_name, **{"revision": revision, **overrides})
        else:
            config = self.experiment.config
            flags = config["flags"]
            settings = {
                "revision": config.get("base_model_revision"),
                "dtype": config.get("dtype", "auto"),
                "load_in_4bit": config.get("load_in_4bit"),
                "max_seq_length": flags["max_seq_length"],
                "trust_remote_code": flags["trust_remote_code"],
            }
            loaded = load_base(self.base_name, **{**settings, **overrides})
        return loaded, self.format_for(loaded.tokenizer)

    def load_tokenizer(self) -> tuple[PreTrainedTokenizerBase, Any]:
        """(tokenizer, format it was trained with), without the weights."""
        if self.experiment is not None and self.adapter is not None:
            config, flags = self.experiment.config, self.experiment.config["flags"]
            tokenizer = load_tokenizer(
                config["base_model"], config.get("base_model_revision"), flags["trust_remote_code"]
            )
        elif self.adapter is not None and not (self.adapter / "tokenizer_config.json").is_file():
            config = adapter_config(self.adapter)
            tokenizer = load_tokenizer(config["base_model_name_or_path"], config.get("revision"))
        else:
            tokenizer = load_tokenizer(str(self.adapter or self.path))
        return tokenizer, self.format_for(tokenizer)

    def format_for(self, tokenizer: Any) -> Any:
        """The format the run was trained with (a user's own is known by its file), else one that fits the tokenizer."""
        from formats import choose_format, get_format

        if self.experiment is None:
            return choose_format(tokenizer)[0]
        own = str(self.experiment.config["flags"]["format"])
        return get_format(
            own if own.endswith((".yaml", ".yml")) else self.experiment.config["format"]["name"], tokenizer
        )


def find_run(path: str | Path) -> Run:
    """What `path` names; a run without a finished adapter stands for its newest checkpoint.

    Raises UserError when it is a folder that is neither a run, an adapter nor a model, or a run without any of these.
    """
    from finetune.runs.experiment import CONFIG, FINAL

    if Path(path).is_file():
        raise UserError(f"{path} is a file; name a run folder, an adapter folder or a model")
    if isinstance(path, str) and not Path(path).is_dir():
        return Run(path, None, None)
    path = Path(path)
    if (path / CONFIG).is_file():
        experiment, adapter = _trained(path), path / FINAL
        if not (adapter / "adapter_config.json").is_file():
            checkpoints = experiment.checkpoints()
            if not checkpoints:
                raise UserError(f"run {path} has neither {FINAL}/ nor a checkpoint yet; let it train first")
            adapter = checkpoints[-1]
        return Run(path, experiment, adapter)
    if (path / "adapter_config.json").is_file():
        return Run(path, _trained(path.parent) if (path.parent / CONFIG).is_file() else None, path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is neither a run folder, an adapter nor a model; name one of them")
    run = path.resolve().parents[1] if path.resolve().parent.name == "exports" else None
    return Run(path, _trained(run) if run and (run / CONFIG).is_file() else None, None)


def _trained(folder: Path) -> Any:
    """The run of a folder; UserError when its config is not one that train_lora.py has filled."""
    from finetune.runs.experiment import CONFIG, Experiment

    experiment = Experiment.open(folder)
    if missing := [key for key in ("flags", "base_model", "format") if key not in experiment.config]:
        raise UserError(f"{folder / CONFIG} has no {', '.join(missing)}, so train_lora.py did not write it; train anew")
    return experiment


def load_for_inference(path: str | Path, *, base: bool = False, merged: bool = False) -> tuple[Any, Any, Any]:
    """(model, tokenizer, format) of an experiment folder, an adapter folder, or a plain model.

    base=True leaves the adapter away; merged=True folds it into the weights (changes bfloat16 results slightly).
    The format is the one the run was trained with; for a plain model or a stranger's adapter it is chosen by the
    tokenizer. Raises UserError when `path` is none of the three.
    """
    run = find_run(path)
    loaded, fmt = run.load_base()
    model = loaded.model
    if run.adapter is not None and not base:
        model = attach_adapter(model, run.adapter)
        if merged:
            model = model.merge_and_unload()
    return _for_inference(model), loaded.tokenizer, fmt


def _for_inference(model: Any) -> Any:
    return import_unsloth().FastLanguageModel.for_inference(model) or model
