"""The report of `evaluate_lora.py RUN --ranks 2,4,8`: how good the adapter is when it is cut to smaller ranks."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.charts.ranks import draw_ranks
from finetune.evaluation.metrics import compute_metrics
from finetune.evaluation.rank_losses import LossMeter, encode_loss_rows, losses_by_rank, smallest_rank
from finetune.evaluation.report import table_markdown
from finetune.evaluation.run import Prompts, run_model
from finetune.files import write_text_atomic
from finetune.models.hub import public_name
from finetune.models.truncation import TruncatableAdapter, energy_share
from finetune.progress import counted
from finetune.runs.find import Run
from formats import Format

if TYPE_CHECKING:
    from finetune.generation.generate import Decoding

REPORT, TABLE, PICTURE, ANSWERS = "ranks.json", "ranks.md", "ranks.png", "rank_answers"
SHOWN_SCORES = ("tool_name_accuracy", "parameter_accuracy", "schema_valid_rate", "irrelevance_accuracy")


def measure_ranks(
    run: Run, model: Any, tokenizer: Any, fmt: Format, ranks: Sequence[int], *, datasets: Sequence[str],
    limit: int | None, prompts: Prompts | None, decoding: Decoding | None, settings: dict[str, Any], folder: Path,
    share_prefix: bool, tolerance: float, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The report as ranks.json has it: of each rank and of the adapter itself, loss, energy kept and scores.

    model     base and adapter
    prompts   to answer for the scores; None: losses alone. The answers are kept in `folder`, and a report resumes.
    settings  what else the answers depend on, as `answer_settings` returns it
    """
    adapter = TruncatableAdapter(model)
    rows, source = encode_loss_rows(run, tokenizer, fmt, datasets, limit=limit)
    meter = LossMeter(model, tokenizer, rows.sequences)
    with model.disable_adapter():
        base_loss = meter.loss()
    losses = losses_by_rank(adapter, meter, sorted(set(ranks)))
    results: dict[int, dict[str, Any]] = {
        rank: {"eval_loss": round(loss, 6), "energy": round(energy_share(adapter.spectra, rank), 6)}
        for rank, loss in losses.items()
    }
    for rank in losses if prompts else ():
        cut = {} if rank == adapter.rank else {"rank": rank}
        with adapter.at_rank(rank):
            scored, _ = run_model(
                model, tokenizer, fmt, prompts, decoding, folder / ANSWERS / f"rank{rank}_results.jsonl",
                settings | cut, name=f"rank {rank}", say=say, share_prefix=share_prefix,
            )  # fmt: skip
        metrics = compute_metrics(scored)
        results[rank] |= {name: value for name, value in metrics.items() if isinstance(value, float)}
    enough = smallest_rank(results, tolerance)
    return {
        "model": public_name(str(run.path)),
        "rank": adapter.rank,
        "layers": len(adapter.updates),
        "loss_rows": {
            "source": ", ".join(map(public_name, datasets)) or source,
            "sequences": len(rows.sequences),
            "trained_tokens": meter.tokens,
        },
        "answers": len(prompts.items) if prompts else 0,
        "base_loss": round(base_loss, 6),
        "ranks": {str(rank): values for rank, values in results.items()},
        "tolerance": tolerance,
        "smallest_rank": enough,
        "advice": advice(run, adapter.rank, enough, results, tolerance),
        "spectra": [[float(f"{value:.5g}") for value in values] for values in adapter.spectra],
        "settings": settings,
    }


def advice(run: Run, whole: int, enough: int, results: dict[int, dict[str, Any]], tolerance: float) -> str:
    """One line: the smallest rank that is good enough, and how to get it."""
    loss, own = results[enough]["eval_loss"], results[whole]["eval_loss"]
    if enough == whole:
        smaller = [rank for rank in results if rank != whole]
        return f"keep rank {whole}: of the ranks {', '.join(map(str, smaller))} none is within {tolerance:g} of it"
    return (
        f"rank {enough} is enough: loss {loss:.4f}, against {own:.4f} at rank {whole} (tolerance {tolerance:g}); "
        f"get it with: python export_lora.py {shlex.quote(str(run.path))} --to adapter --rank {enough}"
    )


def ranks_markdown(report: dict[str, Any]) -> str:
    """The table and the advice."""
    whole, ranks = report["rank"], report["ranks"]
    scores = [name for name in SHOWN_SCORES if any(name in values for values in ranks.values())]
    rows = [["base", f"{report['base_loss']:.4f}", "", "", *[""] * len(scores)]]
    for rank, values in ranks.items():
        difference = "" if int(rank) == whole else f"{values['eval_loss'] - ranks[str(whole)]['eval_loss']:+.4f}"
        name = f"{rank} (the adapter itself)" if int(rank) == whole else rank
        shown = ["" if values.get(score) is None else f"{values[score]:.3f}" for score in scores]
        rows.append([name, f"{values['eval_loss']:.4f}", difference, f"{values['energy']:.1%}", *shown])
    of = report["loss_rows"]
    answers = f"; scores over {counted(report['answers'], 'answer')}" if report["answers"] else ""
    heading = (
        f"{report['model']}, rank {whole}, {report['layers']} layers: the best approximation of each rank. Loss over "
        f"{of['trained_tokens']:,} trained tokens of {counted(of['sequences'], 'sequence')} ({of['source']}){answers}."
    )
    table = table_markdown(["rank", "loss", "difference", "energy kept", *scores], rows)
    return f"# Ranks\n\n{heading}\n\n{table}\n{report['advice']}\n"


def write_rank_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write ranks.json, ranks.md and ranks.png; returns their paths."""
    import numpy as np

    ranks = {int(rank): values for rank, values in report["ranks"].items()}
    scores = {
        name: {rank: values[name] for rank, values in ranks.items() if name in values}
        for name in SHOWN_SCORES[:2]
        if any(name in values for values in ranks.values())
    }
    draw_ranks(
        folder / PICTURE,
        losses={rank: values["eval_loss"] for rank, values in ranks.items()},
        scores=scores,
        spectra=[np.array(values) for values in report["spectra"]],
        chosen=report["smallest_rank"],
        title=f"{Path(report['model']).name}: {report['advice'].partition(':')[0]}",
    )
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    return [
        write_text_atomic(folder / REPORT, text),
        write_text_atomic(folder / TABLE, ranks_markdown(report)),
        folder / PICTURE,
    ]
