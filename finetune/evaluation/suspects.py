"""Training rows that a run fits least: most are wrong, or ask for something that no other row asks for.

Every trained turn is predicted by the run's own early and last adapter, teacher-forced. Its margin is the largest
log p(the model's token) - log p(the trained token) of its tokens, averaged over the two: a model that has learned from
the other rows what belongs there prefers it by far, while a turn that is merely hard has many small margins. The early
adapter counts because the last one may have memorised the error. Turns are ranked by how far their margin exceeds the
median of the turns of their tool: answers of a kind that the run has not learned are hard, and not suspect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.errors import UserError
from finetune.evaluation.rank_losses import LossMeter, encode_as_in_training, own_rows
from finetune.evaluation.report import table_markdown
from finetune.evaluation.scoring import leaves
from finetune.files import json_lines, write_text_atomic
from finetune.progress import counted, printable, progress_bar
from formats import IGNORE_INDEX
from formats.base import call_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.passes.plan import Predictions
    from finetune.reading.load_result import LoadResult
    from finetune.runs.find import Run
    from formats import Format

REPORT, TABLE = "suspects.jsonl", "suspects.md"
RANKED_BY = "excess_margin"
SHOWN_CHARACTERS = 60
CONTINUED_TOKENS = 12
NO_CALL = "(text)"
MIN_TURNS = 5  # of a tool, for a median of its own


@dataclass
class Turn:
    """One trained assistant turn: where it comes from, its tokens, and what each adapter predicts at them."""

    source: str
    row: int
    turn: int
    message: dict[str, Any]
    sequence: int
    first: int  # of its tokens in the sequence
    end: int
    predictions: list[Predictions] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def tool(self) -> str:
        """The first called tool, or NO_CALL."""
        calls = self.message.get("tool_calls")
        return call_of(calls[0])["name"] if calls else NO_CALL

    def margins(self) -> np.ndarray:
        """Of each token, averaged over the adapters."""
        return np.mean([one.best_log_p - one.log_p for one in self.predictions], axis=0)

    def losses(self) -> np.ndarray:
        """Of each token, averaged over the adapters."""
        return -np.mean([one.log_p for one in self.predictions], axis=0)


def check_suspects(run: Run) -> None:
    """UserError for what is not a run, which knows its training rows and its adapter."""
    if run.experiment is None or run.adapter is None:
        raise UserError(f"--suspects: {run.path} is not the folder of a run with an adapter, whose rows are known")


def early_checkpoint(run: Run) -> Path | None:
    """The run's first checkpoint before the step of its adapter; None where it has none."""
    assert run.experiment is not None and run.adapter is not None
    found = [path for path in run.experiment.checkpoints() if (path / "adapter_model.safetensors").is_file()]
    ending = run.experiment.config.get("ending") or {}
    last = _step(run.adapter) if run.adapter in found else ending.get("adapter_step", math.inf)
    return next((path for path in found if _step(path) < last), None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


@dataclass
class Measured:
    """The turns of all trained rows, the sequences (ids, labels) that hold them, and the number of rows without one.

    unclear  number of trained rows of which some sequences are too long, so that turns and sequences cannot be paired
    """

    turns: list[Turn]
    sequences: Sequence[tuple[list[int], list[int]]]
    not_trained: int
    unclear: int


def measure_turns(run: Run, model: Any, tokenizer: PreTrainedTokenizerBase, fmt: Format) -> Measured:
    """Every trained turn with its scores; `model` is the base with the run's last adapter."""
    loaded = own_rows(run, "data")
    rows = encode_as_in_training(run, loaded, "the run's training rows", tokenizer, fmt)
    meter = LossMeter(model, tokenizer, rows.sequences)
    adapters = [last := model.active_adapter]
    if early := early_checkpoint(run):
        model.load_adapter(str(early), adapter_name="early")
        adapters.insert(0, "early")
    by_adapter = []
    with progress_bar("training rows", len(meter.rows) * len(adapters)) as advance:
        for name in adapters:
            model.set_adapter(name)
            by_adapter.append(meter.predictions(advance))
    model.set_adapter(last)
    flags = run.experiment.config["flags"] if run.experiment else {}
    trimmed = range(len(loaded.conversations)) if flags.get("train_on") == "last" else rows.turns_removed
    turns = list(_turns(loaded, rows.rows, rows.sequences, by_adapter, trimmed))
    _score(turns)
    trained = {int(row) for row in rows.rows}
    unclear = {tuple(loaded.origins[row]) for row in trained} - {(turn.source, turn.row) for turn in turns}
    return Measured(turns, rows.sequences, len(loaded.conversations) - len(trained), len(unclear))


def _turns(
    loaded: LoadResult,
    row_of: np.ndarray,
    sequences: Sequence[tuple[list[int], list[int]]],
    by_adapter: list[list[Predictions]],
    trimmed: Container[int],
) -> Iterator[Turn]:
    """Trained turns in the order of the sequences; a row that stands several times in the data is taken once.

    trimmed  conversations whose first turns are not trained; others are left out unless each turn has its tokens
    """
    seen: set[tuple[str, int, int]] = set()
    spans_of: dict[int, list[tuple[int, int, int]]] = {}  # conversation -> (sequence, first token, end)
    for number, (_, labels) in enumerate(sequences):
        trained = np.flatnonzero(np.asarray(labels) != IGNORE_INDEX)
        for part in np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1):
            spans_of.setdefault(int(row_of[number]), []).append((number, int(part[0]), int(part[-1]) + 1))
    for conversation, spans in spans_of.items():
        messages = loaded.conversations[conversation]["messages"]
        assistant = [
            index for index, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("train") is not False
        ]  # fmt: skip
        taken: dict[int, int] = {}
        own_turns = assistant[-len(spans) :] if conversation in trimmed else assistant
        if len(own_turns) != len(spans):
            continue
        for (number, first, end), index in zip(spans, own_turns, strict=True):
            source, row = loaded.origins[conversation]
            offset = taken.get(number, 0)
            taken[number] = offset + end - first
            if (source, row, index) in seen:
                continue
            seen.add((source, row, index))
            own = slice(offset, offset + end - first)
            predictions = [_part(one[number], own) for one in by_adapter]
            yield Turn(source, row, index, messages[index], number, first, end, predictions)


def _part(predictions: Predictions, own: slice) -> Predictions:
    return type(predictions)(predictions.log_p[own], predictions.best_log_p[own], predictions.best_ids[own])


def _score(turns: list[Turn]) -> None:
    """margin; loss (mean of the turn's tokens); excess_margin and excess_loss, above the median of the tool's turns.

    A tool with less than MIN_TURNS turns has the median of all turns with calls.
    """
    by_tool: dict[str, list[Turn]] = {}
    for turn in turns:
        turn.scores = {"margin": float(turn.margins().max()), "loss": float(turn.losses().mean())}
        by_tool.setdefault(turn.tool, []).append(turn)
    calling = [turn for turn in turns if turn.tool != NO_CALL]
    for tool, own in by_tool.items():
        alike = own if len(own) >= MIN_TURNS or tool == NO_CALL else calling
        for name in ("margin", "loss"):
            usual = median(turn.scores[name] for turn in alike)
            for turn in own:
                turn.scores[f"excess_{name}"] = turn.scores[name] - usual


def find_suspects(
    measured: Measured, count: int, model: Any, tokenizer: PreTrainedTokenizerBase, fmt: Format
) -> list[dict[str, Any]]:
    """The `count` rows that rank first: the worst turn, where it differs, what the model would write."""
    from finetune.generation.generate import Decoding, generate
    from formats import check_tokenizer

    worst: dict[tuple[str, int], Turn] = {}
    for turn in sorted(measured.turns, key=lambda turn: -turn.scores[RANKED_BY]):
        worst.setdefault((turn.source, turn.row), turn)
    chosen = list(worst.values())[:count]
    places = [turn.first + int(turn.margins().argmax()) for turn in chosen]
    ids = [measured.sequences[turn.sequence][0] for turn in chosen]
    decoding = Decoding(tuple(check_tokenizer(tokenizer, fmt)), CONTINUED_TOKENS)
    report = generate(model, [own[:at] for own, at in zip(ids, places, strict=True)], decoding=decoding)
    lines = []
    for turn, own, at, generation in zip(chosen, ids, places, report.results, strict=True):
        assert generation is not None
        before, rest = tokenizer.decode(own[turn.first : at]), tokenizer.decode(own[at : turn.end - 1])
        lines.append(
            {
                "source": turn.source, "row": turn.row, "turn": turn.turn, "tool": turn.tool,
                "where": place_in_calls(turn.message, before + rest, len(before)),
                "before": before, "trained": rest, "model": tokenizer.decode(generation.input_ids),
                "scores": _rounded(turn.scores),
            }
        )  # fmt: skip
    return lines


def place_in_calls(message: dict[str, Any], text: str, at: int) -> str:
    """The argument (or the name) of a call that character `at` of the rendered answer belongs to; "text" otherwise."""
    where, position = "text", 0
    for call in map(call_of, message.get("tool_calls") or []):
        parts = [("name of the tool", [call["name"]])]
        for path, value in leaves(call["arguments"]):
            written = [json.dumps(value, ensure_ascii=False), str(value)]
            parts.append((".".join(map(str, path)) or "arguments", written))
        for name, written in parts:
            found = [(start, one) for one in written if (start := text.find(one, position)) >= 0]
            if not found:
                continue
            start, one = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            if at < start + len(one):  # between the part before it and its end: its key belongs to it
                return name
            position, where = start + len(one), f"after {name}"
    return where


def suspects_markdown(lines: Sequence[dict[str, Any]], heading: str) -> str:
    """One line for each suspect."""
    rows = [
        [
            f"{line['source']} row {line['row']}, turn {line['turn']}", line["tool"], line["where"],
            _shown(line["before"][-24:], line["trained"]), _shown("", line["model"]),
            f"{line['scores'][RANKED_BY]:.1f}",
        ]
        for line in lines
    ]  # fmt: skip
    header = ["row", "tool", "where", "trained", "the model would write", "margin above the usual"]
    return f"# Suspects\n\n{heading}\n\n{table_markdown(header, rows)}"


def _shown(before: str, text: str) -> str:
    text = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
    marked = f"…{before}>>>{text}" if before else text
    return printable(" ".join(marked.split())).replace("|", "\\|").replace("`", "'")


def report_suspects(
    run: Run, model: Any, tokenizer: PreTrainedTokenizerBase, fmt: Format, count: int, folder: Path
) -> tuple[list[Path], str]:
    """(files written into `folder`, the table): the suspects, and in suspects.jsonl every other turn's scores."""
    measured = measure_turns(run, model, tokenizer, fmt)
    lines = find_suspects(measured, count, model, tokenizer, fmt)
    early = early_checkpoint(run)
    heading = (
        f"The {len(lines)} of {counted(len({(one.source, one.row) for one in measured.turns}), 'training row')} that "
        f"{run.path} fits least, by its "
        + (f"adapters of {early.name} and of the end" if early else "last adapter alone (it has no earlier checkpoint)")
        + f". Rows that are not trained: {measured.not_trained}; with answers that are too long, not ranked: "
        + f"{measured.unclear}. Behind >>> is what differs most."
    )
    listed = {(line["source"], line["row"], line["turn"]) for line in lines}
    others = [
        {"source": turn.source, "row": turn.row, "turn": turn.turn, "tool": turn.tool, "scores": _rounded(turn.scores)}
        for turn in sorted(measured.turns, key=lambda turn: -turn.scores[RANKED_BY])
        if (turn.source, turn.row, turn.turn) not in listed
    ]
    table = suspects_markdown(lines, heading)
    written = [
        write_text_atomic(folder / TABLE, table),
        write_text_atomic(folder / REPORT, json_lines([*lines, *others])),
    ]
    return written, table


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.items()}
