"""The Markdown page of gpu.py's record."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_parts.schedule import DONE


def page(record: dict[str, Any]) -> str:
    """Everything that was measured, most important first; what failed with the end of its output."""
    parts = record.get("parts", {})
    machine = record.get("machine", {})
    lines = [
        f"# GPU record of {record.get('date', '')}",
        "",
        f"`{record.get('command', '')}` on {machine.get('gpu') or 'no GPU'}, {machine.get('cores')} CPU cores, Python "
        f"{machine.get('python')}, "
        + ", ".join(f"{name} {machine.get(name)}" for name in ("torch", "transformers", "peft", "trl", "unsloth")),
        "",
    ]
    if record.get("rehearsal"):
        lines += ["**A rehearsal without a GPU: no figure below is one of a GPU.**", ""]
    lines += ["| part | outcome | seconds |", "| --- | --- | ---: |"]
    lines += [f"| {name} | {one['status']} | {one.get('seconds', '')} |" for name, one in parts.items()]
    for name, outcome in parts.items():
        lines += ["", f"## {name}", "", *_result(outcome)]
        if outcome["status"] != DONE and outcome.get("end"):
            lines += ["", "```", outcome["end"], "```"]
    return "\n".join(lines) + "\n"


def _result(outcome: dict[str, Any]) -> list[str]:
    result = outcome.get("result")
    lines: list[str] = []
    if isinstance(result, dict) and "results" in result:
        lines += _throughput(result)
    elif isinstance(result, dict):
        lines += [f"- {key}: {_short(value)}" for key, value in result.items()]
    elif isinstance(result, list):
        lines += _rows(result)
    if outcome.get("text"):
        lines += ["", "```", outcome["text"].rstrip(), "```"]
    return lines


def _throughput(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{result['model']}, {result['dtype']}, 4 bit: {result['load_in_4bit']}, checkpointing: "
        f"{result['checkpointing']}, {result['rows_per_step']} rows per step",
        "",
        "| workload | trainer | s/step | tokens/s | x stock | peak GB | of bf16 peak | first loss | final loss |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for workload, trainers in result["results"].items():
        for trainer, one in trainers.items():
            if "error" in one:
                lines.append(f"| {workload} | {trainer} | {_cell(one['error'])} | | | | | | |")
                continue
            share = one.get("share_of_bf16_peak")
            cells = [
                f"{one['seconds_per_step']:.3f}", f"{one['tokens_per_second']:,.0f}",
                f"{one['times_stock']:.2f}" if "times_stock" in one else "", f"{one['peak_memory_gb']:.2f}",
                f"{share:.0%}" if share else "", f"{one['first_loss']:.4f}", f"{one['final_loss']:.4f}",
            ]  # fmt: skip
            lines.append(f"| {workload} | {trainer} | " + " | ".join(cells) + " |")
    return lines


def _rows(result: list[dict[str, Any]]) -> list[str]:
    shown = list(dict.fromkeys(key for row in result for key, value in row.items() if not isinstance(value, dict)))
    if not shown:
        return []
    return [
        f"| {' | '.join(shown)} |",
        f"| {' | '.join('---' for _ in shown)} |",
        *(f"| {' | '.join(_cell(_short(row.get(key, ''))) for key in shown)} |" for row in result),
    ]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:300]
