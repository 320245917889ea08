"""What goes to the Hub: the adapter, a model card with data, metrics and curve, and the list of it before it goes."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.evaluation.answer_settings import adapter_hash
from finetune.models.hub import hub_token, public_name
from finetune.runs.experiment import LOG, Experiment
from finetune.runs.find import Run

# What never leaves with an adapter: an evaluation of its folder holds the held-out rows with all answers.
PRIVATE = (
    ".*", "evaluation", "exports", "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json",
    "training_args.bin",
)  # fmt: skip
SHOWN = 12  # metrics in the card's table


def build_folder(run: Run, folder: Path, say: Any = print) -> None:
    """Fill `folder` with adapter, tokenizer, template, card, curve and scores; nothing of paths or the machine."""
    if run.adapter is None or run.experiment is None:
        raise UserError(f"{run.path} is no run folder: the model card is made from a run's config; name a run folder")
    shutil.copytree(run.adapter, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*PRIVATE, "README.md"))
    _name_base(folder / "adapter_config.json", run.experiment.config)
    scores, comparison = scores_of(run, say)
    curve = draw_curve(run.experiment.folder / LOG, folder / "loss.png")
    (folder / "README.md").write_text(model_card(run.experiment, scores, curve), encoding="utf-8")
    if comparison.is_file():
        shutil.copy(comparison, folder / "evaluation.md")


def scores_of(run: Run, say: Any) -> tuple[dict[str, dict[str, Any]], Path]:
    """(scores of this very adapter, the comparison beside them), from the run's evaluation or from the adapter's own.

    Of an adapter that was trained on, or of another checkpoint, they would be somebody else's: they are left out.
    """
    for folder in (run.experiment.folder, run.adapter):
        scores = read_scores(folder)
        known = scores.get("tuned", {}).get("settings", {}).get("adapter_sha256")
        if known is not None and known != adapter_hash(run.adapter):
            say(f"left out: the scores in {folder / 'evaluation'} are not of {run.adapter}; evaluate it again")
        elif scores:
            return scores, folder / "evaluation" / "comparison.md"
    return {}, run.adapter / "no comparison"


def _name_base(path: Path, config: dict[str, Any]) -> None:
    """The base by the name it was trained under: PEFT notes the folder it was loaded from."""
    adapter = json.loads(path.read_text(encoding="utf-8"))
    adapter["base_model_name_or_path"] = public_name(config["base_model"])
    adapter["revision"] = config.get("base_model_revision")
    path.write_text(json.dumps(adapter, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_scores(run_folder: Path) -> dict[str, dict[str, Any]]:
    """{"base": metrics, "tuned": metrics} as evaluate_lora.py wrote them; sides that were not scored are absent."""
    scores = {}
    for side, name in (("base", "base_model"), ("tuned", "finetuned_model")):
        path = run_folder / "evaluation" / f"{name}_metrics.json"
        if path.is_file():
            try:
                scores[side] = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(scores[side], dict):
                    raise ValueError("no object")
            except ValueError as error:
                raise UserError(f"{path} is no JSON ({error}); score the run again with evaluate_lora.py") from error
    return scores


def draw_curve(log: Path, picture: Path) -> bool:
    """Training and evaluation loss over steps as a PNG; False when nothing was logged."""
    if not log.is_file():
        return False
    with log.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    curves = {
        name: [(int(row["step"]), float(row[name])) for row in rows if row.get(name)] for name in ("loss", "eval_loss")
    }
    if not curves["loss"]:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, points), colour in zip(curves.items(), ("#0072B2", "#E69F00"), strict=True):
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label={"loss": "training"}.get(name, "evaluation"))
    axes.set(xlabel="step", ylabel="loss (nats per trained token)")
    axes.legend()
    figure.savefig(picture, dpi=120)
    return True


def model_card(experiment: Any, scores: dict[str, dict[str, Any]], curve: bool) -> str:
    """Markdown with the front matter that the Hub reads: base, data, training, scores with intervals, curve."""
    from finetune.runs.saving import model_card as training_card

    config = experiment.config
    flags = {**config["flags"], "dataset": [public_name(name) for name in config["flags"]["dataset"]]}
    config = {**config, "base_model": public_name(config["base_model"]), "flags": flags}
    experiment = Experiment(experiment.folder, config)
    front, _, body = training_card(experiment).removeprefix("---\n").partition("\n---\n")
    names = shown_metrics(scores)
    if names and "tuned" in scores:
        front += _model_index(experiment, scores["tuned"], names)
    lines = [line for line in body.rstrip().splitlines() if not line.startswith("Evaluation results, once")]
    if curve:
        lines += ["", "## Loss", "", "![Training loss over steps](loss.png)"]
    if names:
        sides = [side for side in ("base", "tuned") if side in scores]
        lines += ["", "## Evaluation", "", f"| metric | {' | '.join(sides)} | 95% interval of the last |"]
        lines.append("| --- |" + " ---: |" * (len(sides) + 1))
        for name in names:
            values = " | ".join(_three(scores[side].get(name)) for side in sides)
            interval = scores[sides[-1]].get("intervals_95", {}).get(name)
            lines.append(f"| {name} | {values} | {f'{interval[0]:.3f} to {interval[1]:.3f}' if interval else ''} |")
        lines += ["", f"{scores[sides[-1]].get('items', '?')} answers; what each metric means: "
                      "docs/evaluation.md of the project that made this."]  # fmt: skip
    lines += ["", "## Use", "", *_use(experiment)]
    return f"---\n{front}\n---\n" + "\n".join(lines).rstrip() + "\n"


def shown_metrics(scores: dict[str, dict[str, Any]]) -> list[str]:
    """The first metrics, in the order of the evaluation's own table."""
    if not scores:
        return []
    from finetune.evaluation.metrics import metric_names

    return metric_names(scores)[:SHOWN]


def _three(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"


def _model_index(experiment: Any, metrics: dict[str, Any], names: list[str]) -> str:
    """The Hub's own place for results, beside the table for people."""
    entries = "".join(
        f"\n    - type: {name}\n      value: {metrics[name]:.4f}" for name in names if metrics.get(name) is not None
    )
    return (
        f"\nmodel-index:\n- name: {json.dumps(experiment.folder.name)}\n  results:\n"
        "  - task:\n      type: text-generation\n"
        f"    dataset:\n      name: held-out rows\n      type: custom\n    metrics:{entries}"
    )


def _use(experiment: Any) -> list[str]:
    return [
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        'model = AutoPeftModelForCausalLM.from_pretrained("THIS_REPOSITORY")',
        'tokenizer = AutoTokenizer.from_pretrained("THIS_REPOSITORY")',
        "prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True,",
        '                                       return_tensors="pt", return_dict=True)',
        "answer = model.generate(**prompt, max_new_tokens=256)",
        "```",
        "",
        "The chat template in this repository is the one that was trained; that of "
        f"`{experiment.config['base_model']}` may differ.",
    ]


def listing(folder: Path) -> list[tuple[str, int]]:
    """(path below the folder, bytes) of everything that would be uploaded, in order."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def check_secrets(folder: Path) -> None:
    """UserError when the token of this session stands in any file that would be uploaded."""
    token = hub_token() or ""
    for path, _ in listing(folder) if len(token) > 7 else ():
        if token.encode() in (folder / path).read_bytes():
            raise UserError(f"{path} holds the value of HF_TOKEN; take it out before this is uploaded")
