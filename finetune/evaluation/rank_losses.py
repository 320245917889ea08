"""Evaluation loss of an adapter cut to smaller ranks, and the smallest rank that is good enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.models.adapter import adapter_config, lora_rank
from finetune.progress import progress_bar
from finetune.runs.find import Run
from formats import Format

if TYPE_CHECKING:
    from finetune.encoding.encoded import EncodedRows
    from finetune.models.truncation import TruncatableAdapter
    from finetune.passes.plan import Predictions, Row
    from finetune.reading.load_result import LoadResult

DEFAULT_TOLERANCE = 0.01  # nats of loss, share of answers
TOKENS_PER_PASS = 4096  # halved where they do not fit
ROWS_PER_RUN = 64  # rows that may share prefixes
# Scores that a smaller rank must keep.
KEPT_SCORES = ("tool_name_accuracy", "parameter_accuracy", "tool_selection_accuracy")


def check_ranks(run: Run, ranks: Sequence[int], datasets: Sequence[str] | None, flag: str) -> None:
    """UserError, before anything is loaded, for a rank above the adapter's own, and for a run without rows for a loss.

    datasets  those of the command line; None: no loss is needed
    """
    if run.adapter is None:
        raise UserError(f"{flag}: {run.path} has no adapter, whose rank could be reduced")
    own = lora_rank(adapter_config(run.adapter))
    if (largest := max(ranks, default=1)) > own:
        raise UserError(f"{flag} {largest}: must be <= {own}, the rank of the adapter in {run.adapter}")
    flags = run.experiment.config["flags"] if run.experiment is not None else {}
    if datasets is not None and not datasets and not flags.get("eval_dataset") and not flags.get("eval_fraction"):
        raise UserError(f"{flag}: {run.path} has no evaluation rows of its own; name held-out rows with --dataset")


def encode_loss_rows(
    run: Run, tokenizer: Any, fmt: Format, datasets: Sequence[str], *, limit: int | None = None
) -> tuple[EncodedRows, str]:
    """(ids and labels of `datasets`, else of the run's own evaluation rows; which these are), encoded as in training.

    Raises UserError where none has a loss, and where the run's evaluation rows have changed since. See `check_ranks`.
    """
    from finetune.evaluation.items import load_rows

    if datasets:
        loaded, source = load_rows(datasets, limit=limit)[0], "--dataset"
    else:
        loaded, source = own_rows(run, "eval_data"), "the run's evaluation rows"
    return encode_as_in_training(run, loaded, source, tokenizer, fmt), source


def encode_as_in_training(run: Run, loaded: LoadResult, source: str, tokenizer: Any, fmt: Format) -> EncodedRows:
    """Ids and labels of rows as the run encoded its own; UserError where no row has a loss."""
    from finetune.encoding.encode import encode_conversations
    from finetune.encoding.options import EncodingOptions

    flags: dict[str, Any] = run.experiment.config["flags"] if run.experiment is not None else {}
    options = EncodingOptions.of(flags, max_seq_length=run.max_length())
    rows = encode_conversations(loaded.conversations, tokenizer, fmt, options, origins=loaded.origins, progress=False)
    if not len(rows.sequences):
        reasons = "; ".join(rows.report["reasons"]) or "no conversation"
        raise UserError(f"{source}: no row has a loss ({reasons}); name other rows with --dataset")
    return rows


def own_rows(run: Run, part: str) -> LoadResult:
    """The rows that a run trained on (part "data") or was evaluated on ("eval_data").

    Raises UserError where they have changed since.
    """
    from finetune.preparing.splits import split_off
    from finetune.reading.conversations import load_conversations
    from finetune.reading.row_filter import parse_where
    from finetune.reading.tool_schemas import load_tools_file

    assert run.experiment is not None
    flags = run.experiment.config["flags"]
    options = {
        "seed": flags["seed"], "tools": load_tools_file(flags["tools"]) if flags.get("tools") else None,
        "include_rejected": bool(flags.get("include_rejected")),
    }  # fmt: skip
    if part == "eval_data" and flags.get("eval_dataset"):
        loaded = load_conversations(flags["eval_dataset"], **options)
    else:
        where = parse_where(flags.get("where"))
        loaded = load_conversations(flags["dataset"], limit=flags.get("limit"), where=where, **options)
        if flags.get("eval_fraction") and not flags.get("eval_dataset"):
            loaded = split_off(loaded, flags["eval_fraction"], flags["seed"])[part == "eval_data"]
    if (run.experiment.config.get(part) or {}).get("fingerprint") not in (None, loaded.fingerprint):
        rows = "evaluation rows" if part == "eval_data" else "training rows"
        advice = "name rows with --dataset" if part == "eval_data" else "train again, or restore them"
        raise UserError(f"the {rows} of {run.path} have changed since it was trained; {advice}")
    return loaded


class LossMeter:
    """The mean loss per trained token of some rows, with common prefixes computed once."""

    def __init__(self, model: Any, tokenizer: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]):
        from finetune.passes.plan import make_row
        from finetune.passes.runner import PassRunner

        self.model = model
        rows = [make_row(*pair) for pair in sequences]
        self.order = sorted(range(len(rows)), key=lambda number: rows[number].input_ids.tobytes())
        self.rows = [rows[number] for number in self.order]
        self.tokens = sum(len(row.positions) for row in self.rows)
        self.runner = PassRunner(model, TOKENS_PER_PASS, True, tokenizer.pad_token_id or 0)

    def loss(self) -> float:
        """The loss of the model as it now is."""
        self.model.eval()
        return sum(self.runner.run(part, 1.0).loss_sum for part in self._parts()) / self.tokens

    def predictions(self, advance: Callable[[int], None]) -> list[Predictions]:
        """What the model as it now is predicts at the trained tokens of each of the sequences, in their order."""
        self.model.eval()
        found: list[Predictions] = []
        for part in self._parts():
            found += self.runner.predict(part)
            advance(len(part))
        return [one for _, one in sorted(zip(self.order, found, strict=True), key=lambda pair: pair[0])]

    def _parts(self) -> Iterator[Sequence[Row]]:
        return (self.rows[at : at + ROWS_PER_RUN] for at in range(0, len(self.rows), ROWS_PER_RUN))


def losses_by_rank(adapter: TruncatableAdapter, meter: LossMeter, ranks: Sequence[int]) -> dict[int, float]:
    """Loss of the adapter cut to each of the ranks and, last, of the adapter itself."""
    losses = {}
    with progress_bar("loss by rank", len(ranks) + 1) as advance:
        for rank in [*(rank for rank in ranks if rank < adapter.rank), adapter.rank]:
            with adapter.at_rank(rank):
                losses[rank] = meter.loss()
            advance(1)
    return losses


def smallest_rank(results: dict[int, dict[str, float]], tolerance: float) -> int:
    """The smallest rank that keeps what the largest has: loss and scores at most `tolerance` worse.

    results  "eval_loss" and scores of each rank; the largest rank is the adapter itself
    """
    whole = results[max(results)]

    def is_enough(values: dict[str, float]) -> bool:
        kept = all(values[name] >= whole[name] - tolerance - 1e-9 for name in KEPT_SCORES if name in whole)
        return kept and values["eval_loss"] <= whole["eval_loss"] + tolerance + 1e-9

    return min(rank for rank, values in results.items() if is_enough(values) or values is whole)


def halved_ranks(rank: int) -> list[int]:
    """The powers of two below `rank`, smallest first."""
    return [2**power for power in range(rank.bit_length()) if 2**power < rank]
