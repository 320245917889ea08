"""The experiment folder of a run that starts, and what its config records."""

from __future__ import annotations

import hashlib
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import distributed
from finetune.errors import UserError
from finetune.runs.experiment import Experiment, git_sha, package_versions, run_name
from finetune.settings import Settings
from finetune.training.data import RunData

if TYPE_CHECKING:
    from peft import PeftModel

    from finetune.models.loading import Loaded
    from formats import Format


log = logging.getLogger("sandwich")


def template_sha256(fmt: Format) -> str:
    """Hash of the chat template that is trained and served."""
    return hashlib.sha256(fmt.pinned_template().encode("utf-8")).hexdigest()


def checkpoints_gradients(settings: Settings, loaded: Loaded) -> bool:
    """Whether the run uses gradient checkpointing."""
    if settings.gradient_checkpointing is not None:
        return settings.gradient_checkpointing
    return not loaded.device.startswith("cpu")


def run_config(
    settings: Settings, arguments: list[str], data: RunData, fmt: Format, end_of_turn_ids: list[int], loaded: Loaded,
    model: PeftModel,
) -> dict[str, Any]:  # fmt: skip
    """The content of experiment_config.json; `arguments` are those of the command line."""
    train, held_out, eval_rows = data.train, data.held_out, data.eval_rows
    return {
        "flags": settings.run_flags(),
        "argv": arguments,
        "base_model": settings.model,
        "base_model_revision": loaded.revision,
        "dtype": loaded.dtype,
        "load_in_4bit": loaded.load_in_4bit,
        "device": loaded.device,
        "gradient_checkpointing": checkpoints_gradients(settings, loaded),
        "format": {
            "name": fmt.name,
            "template_sha256": template_sha256(fmt),
            "template_kwargs": dict(fmt.template_kwargs),
            "end_of_turn_ids": end_of_turn_ids,
        },
        "data": {"fingerprint": train.fingerprint, "counts": train.counts, "notes": dict(train.notes)}
        | data.rows.report,
        "eval_data": {"fingerprint": held_out.fingerprint, **eval_rows.report} if held_out and eval_rows else None,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "versions": package_versions(),
        "git_sha": git_sha(),
        "seed": settings.seed,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "ended": None,
        "status": "running",
    }


def changed_versions(run: Experiment) -> list[str]:
    """The packages, and Python, whose version is not the one with which the run started."""
    stored = run.config.get("versions")
    stored = stored if isinstance(stored, dict) else {}  # an older version of this program did not store them
    now = package_versions()
    return [f"{name} is {now[name]}, not the run's {old}" for name, old in stored.items() if now.get(name, old) != old]


def refuse_changed(run: Experiment | None, force: bool, **fingerprints: str | None) -> None:
    """UserError when the stopped run, if there is one, began with another `data`, `eval_data` or `format`.

    With --force a warning.
    """
    recorded = {"data": "fingerprint", "eval_data": "fingerprint", "format": "template_sha256"}
    names = {"data": "data", "eval_data": "evaluation data", "format": "chat template"}
    if run is None:
        return
    changed = [
        names[part]
        for part, fingerprint in fingerprints.items()
        if (run.config.get(part) or {}).get(recorded[part]) != fingerprint
    ]
    if changed and not force:
        raise UserError(
            f"--resume {run.folder}: the {' and the '.join(changed)} changed since; start a new run, or continue with "
            "--force"
        )
    if changed:
        log.warning("--force: the %s changed since the run started", " and the ".join(changed))


def open_experiment(settings: Settings, config: dict[str, Any], stopped_run: Experiment | None) -> Experiment:
    """The folder of the stopped run, or a new one; only the first process writes into it."""
    is_main = distributed.rank() == 0
    if stopped_run is not None:
        stopped_run.writes = is_main
        if settings.force:
            stopped_run.update(**{name: config[name] for name in ("flags", "data", "eval_data", "format", "versions")})
        stopped_run.update(status="running", resumed=[*stopped_run.config.get("resumed", []), config["started"]])
        return stopped_run
    name = settings.name or run_name(
        settings.model, settings.rank, settings.alpha, settings.lr, settings.epochs, datetime.now()
    )
    if is_main:
        experiment = Experiment.create(settings.experiments_dir, name, config, exact_name=settings.name is not None)
    folder = distributed.from_first(lambda: str(experiment.folder))
    return experiment if is_main else Experiment(Path(folder), config, writes=False)
