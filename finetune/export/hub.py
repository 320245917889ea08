"""A run on the Hugging Face Hub: the adapter with a model card, loss curve and scores, without local paths."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.charts.curves import read_run
from finetune.charts.plots import draw_curves
from finetune.charts.run_labels import compare_runs
from finetune.errors import UserError
from finetune.evaluation.answer_settings import adapter_hash
from finetune.export.adapter_files import PUBLIC_FILES, WRITTEN_FILES, copy_adapter, inside
from finetune.export.targets import Job, target
from finetune.models.adapter import lora_rank
from finetune.models.hub import check_public_base, hub_token, public_base
from finetune.progress import print_text, say
from finetune.runs.config_schema import schema_fault
from finetune.runs.experiment import LOG, Experiment
from finetune.runs.find import Run, find_run
from finetune.runs.model_card import Scores, model_card

MAX_METRICS = 12  # in the model card


@target("hub", marker="adapter_config.json", help="adapter and model card; uploaded with --repo_id")
def export_hub(job: Job) -> Callable[[Path], None] | None:
    """Adapter and model card as they are uploaded; uploaded with --repo_id and a token."""
    token = hub_token()
    build_folder(job.run, job.folder)
    if job.repo_id and token:
        check_public_base(
            job.run.base_name,
            f"--repo_id {job.repo_id}",
            "export without --repo_id, put the Hub id of the base model into README.md and adapter_config.json, "
            f"and upload the folder with: hf upload {job.repo_id} FOLDER",
        )
    check_token_absent(job.folder)
    for path in _files(job.folder):
        print_text(f"{path.stat().st_size:>12,}  {path.relative_to(job.folder).as_posix()}")
    if not (job.repo_id and token):
        missing = "--repo_id OWNER/NAME" if not job.repo_id else "a token with write access in HF_TOKEN"
        say(f"nothing was uploaded: that needs {missing}")
        return None

    def upload(folder: Path) -> None:
        say(f"uploaded: {_upload(folder, job.repo_id, private=not job.public, run=job.run)}")

    return upload


def publish(run_folder: Path, repository: str) -> str:
    """Upload a finished run into a private repository, as `export_lora.py --to hub` does; returns the commit's URL."""
    run = find_run(run_folder)
    with tempfile.TemporaryDirectory() as folder:
        build_folder(run, Path(folder))
        check_token_absent(Path(folder))
        return _upload(Path(folder), repository, private=True, run=run)


def build_folder(run: Run, folder: Path) -> None:
    """Fill `folder` with adapter, tokenizer, chat template, model card, loss curve and scores."""
    from finetune.evaluation.report import metric_names

    if run.adapter is None or run.experiment is None:
        raise UserError(f"{run.path} is not a run folder, whose config the model card needs; name a run folder")
    copy_adapter(run.adapter, folder)
    path, config = folder / "adapter_config.json", run.experiment.config
    adapter = json.loads(path.read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = public_base(config["base_model"])  # PEFT writes the folder it was loaded from
    adapter["revision"] = config.get("base_model_revision")
    path.write_text(json.dumps(adapter, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    scores, comparison = read_scores(run)
    metrics = metric_names(scores)[:MAX_METRICS]
    has_curve = draw_curve(run.experiment.folder / LOG, folder / "loss.png")
    if (rank := lora_rank(adapter)) != config["flags"]["rank"]:  # an export with --rank
        shown = f"{rank} (cut from {config['flags']['rank']})"
        config = config | {"flags": config["flags"] | {"rank": shown, "alpha": adapter["lora_alpha"]}}
    card = model_card(Experiment(run.experiment.folder, config), scores=scores, metrics=metrics, has_curve=has_curve)
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    if comparison is not None and comparison.is_file():
        shutil.copyfile(inside(comparison, comparison.parent.parent), folder / "evaluation.md")


def read_scores(run: Run) -> tuple[Scores, Path | None]:
    """(scores of exactly this adapter, path of their comparison.md), from the run's evaluation or the adapter's own."""
    for parent in (run.experiment.folder, run.adapter):
        folder = parent / "evaluation"
        scores = {
            side: _read_metrics(path)
            for side, name in (("base", "base_model"), ("tuned", "finetuned_model"))
            if (path := folder / f"{name}_metrics.json").is_file() and inside(path, parent)
        }
        scored_hash = scores.get("tuned", {}).get("settings", {}).get("adapter_sha256")
        if scored_hash is not None and scored_hash != adapter_hash(run.adapter):
            say(f"omitted: the scores in {folder} are not of {run.adapter}; evaluate it again")
        elif scores:
            return scores, folder / "comparison.md"
    return {}, None


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); score the run again with evaluate_lora.py") from error
    from finetune.evaluation.metrics import METRICS

    # What the model card reads; the file may have come with a run folder of others.
    interval = {"type": ["array", "null"], "items": {"type": "number"}, "minItems": 2}
    properties = {
        **{metric.name: {"type": ["number", "null"]} for metric in METRICS},
        "settings": {"type": "object"},
        "items": {"type": "integer"},
        "intervals_95": {"type": "object", "additionalProperties": interval},
    }
    schema = {"type": "object", "patternProperties": {"^bfcl_": {"type": "number"}}, "properties": properties}
    if fault := schema_fault(schema, metrics):
        raise UserError(f"{path}{fault}; score the run again with evaluate_lora.py")
    return metrics


def draw_curve(log: Path, picture: Path) -> bool:
    """Draw the training and evaluation loss of one run; False when nothing was logged."""
    run = read_run(log)
    if not len(run.points("step", "loss")[0]):
        return False
    draw_curves(compare_runs([run]), picture)
    return True


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def check_token_absent(folder: Path) -> None:
    """UserError when a file in the folder contains the user's Hugging Face token."""
    token = hub_token() or ""
    for path in _files(folder) if len(token) > 7 else ():
        if token.encode() in path.read_bytes():
            raise UserError(f"{path.relative_to(folder)} contains your Hugging Face token; remove it before uploading")


def _upload(folder: Path, repository: str, *, private: bool, run: Run) -> str:
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=hub_token())
        api.create_repo(repository, private=private, exist_ok=True)
        allowed = [*PUBLIC_FILES, *WRITTEN_FILES]
        return str(api.upload_folder(folder_path=str(folder), repo_id=repository, allow_patterns=allowed))
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"upload to {repository} failed ({reason}); the adapter is safe in {run.adapter}: set HF_TOKEN to a token "
            f"with write access and run: python export_lora.py {run.path} --to hub --repo_id {repository} --overwrite"
        ) from error
