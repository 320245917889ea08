"""Files that anybody can check with tools of their own: conversations as text, ids and labels; texts as calls.

`encode_file` and `parse_file` write exactly one line per input row, in order, whatever the row contains.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from finetune.encoding.options import DEFAULT_OPTIONS, EncodingOptions
from finetune.encoding.rows import in_rows, warn_of_length, warning_kinds
from finetune.errors import UserError
from finetune.files import json_line, open_atomic
from finetune.models import loading
from finetune.packages import unhide_torch
from finetune.progress import progress_bar
from finetune.reading.normalize import normalize_row
from finetune.reading.row_files import RowError, Unreadable, json_lines
from finetune.reading.sources import Spec, data_suffix, parse_spec, read_rows, refuse_same_file
from finetune.reading.tool_schemas import normalize_tools
from formats import Encoded, Format, choose_format, encode, get_format
from formats.comparison import own_difference

log = logging.getLogger(__name__)
Check = Callable[[dict[str, Any]], str]  # why a conversation is refused; "" if it is not
_ENCODED_KEYS = frozenset(("row", "status", "sequences"))
_PARSED_KEYS = frozenset(("content", "tool_calls", "errors"))


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """A tokenizer by folder, Hub id or the bundled model's name; only its own code may need torch. Raises UserError."""
    for variable, value in (("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(variable, value)
    if trust_remote_code:
        unhide_torch()
    try:
        return loading.load_tokenizer(name, trust_remote_code=trust_remote_code)
    except UserError as error:
        raise UserError(f"tokenizer {name}: {error}") from error


def load_format(name: str, tokenizer: Any) -> tuple[Format, str]:
    """(format, why and what it renders differently) for a name, a YAML file or `auto`. Raises FormatError."""
    if name == "auto":
        return choose_format(tokenizer)
    fmt = get_format(name, tokenizer)
    difference = tokenizer is not None and own_difference(fmt, tokenizer)
    return fmt, f"asked for; it {difference}" if difference else "asked for"


def _encode_row(
    raw: Any, tokenizer: Any, fmt: Format, options: EncodingOptions, column_map: Any, tools: Any, check: Check | None
) -> Encoded:
    """Encode one raw row; what cannot be used is refused with its reason."""
    try:
        conversation = normalize_row(raw, column_map=column_map, tools=tools)
    except RowError as error:
        return Encoded("refused", str(error))
    if check is not None and (reason := check(conversation)):
        return Encoded("refused", reason)
    return encode(conversation, tokenizer, fmt, **options.of_format)


def encode_file(
    source: str | Path,
    target: str | Path,
    tokenizer: Any,
    fmt: Format,
    options: EncodingOptions = DEFAULT_OPTIONS,
    *,
    column_map: Any = None,
    tools: Any = None,
    check: Check | None = None,
    overwrite: bool = False,
    positions: int | None = None,
) -> Counter:
    """Write `{"row", "status", "reason", "sequences": [{"text", "input_ids", "labels"}]}` per row; counts by status.

    `row` is the row's number from 1 (for JSON Lines its line). A row that is trained without a part of it, or has more
    tokens than `positions`, has its "warnings"; they are also counted in the log. `check` says why a conversation is
    refused, or returns None.
    """
    counts: Counter = Counter()
    warned: dict[str, list[int]] = {}
    spec = _unweighted(source)
    writing = _rewritten(spec, target, _ENCODED_KEYS, overwrite=overwrite)
    with writing as write, progress_bar("rows", _row_count(spec)) as advance:
        for _, number, raw in read_rows(spec):
            encoded = _encode_row(raw, tokenizer, fmt, options, column_map, tools, check)
            warn_of_length(encoded, positions)
            counts[encoded.status] += 1
            sequences = [{"text": s.text, "input_ids": s.input_ids, "labels": s.labels} for s in encoded.sequences]
            line = {"row": number, "status": encoded.status, "reason": encoded.reason, "sequences": sequences}
            write(line | ({"warnings": encoded.warnings} if encoded.warnings else {}))
            for kind in warning_kinds(encoded):
                warned.setdefault(kind, []).append(number)
            advance(1)
    for kind, numbers in warned.items():
        log.warning("%s: %s (first: row %d)", in_rows(numbers), kind, numbers[0])
    return counts


def parse_file(source: str | Path, target: str | Path, fmt: Format, *, overwrite: bool = False) -> Counter:
    """Parse the field `text` of each row and write `{"content", "tool_calls", "errors"}`; counts by outcome.

    `reasoning_content` is added where the text has some. A row without text gets an error in its line.
    """
    counts: Counter = Counter()
    spec = _unweighted(source)
    with _rewritten(spec, target, _PARSED_KEYS, overwrite=overwrite) as write:
        for _, number, raw in read_rows(spec):
            result: dict[str, Any] = {"content": "", "tool_calls": [], "errors": []}
            if isinstance(raw, Unreadable):
                result |= {"content": raw.text, "errors": [f"row {number} {raw.reason}"]}
            elif not isinstance(raw.get("text"), str):
                result["errors"] = [f"row {number} has no field 'text' with a string"]
            else:
                result |= _parsed(raw["text"], raw.get("tools"), fmt)
            counts["read"] += 1
            counts["with errors"] += bool(result["errors"])
            counts["calls"] += len(result["tool_calls"])
            write(result)
    return counts


def _parsed(text: str, tools: Any, fmt: Format) -> dict[str, Any]:
    try:
        parsed = fmt.parse(text, normalize_tools(tools))
    except ValueError as error:  # the row's own tools are malformed
        return {"content": text, "errors": [str(error)]}
    result = vars(parsed).copy()
    if parsed.reasoning_content is None:
        del result["reasoning_content"]
    return result


def encoded_rows(
    specs: list[str],
    tokenizer: Any,
    fmt: Format,
    options: EncodingOptions = DEFAULT_OPTIONS,
    *,
    first: int = 1,
    number: int = 5,
    column_map: Any = None,
    tools: Any = None,
    check: Check | None = None,
) -> Iterator[dict[str, Any]]:
    """{"title", "reason", "sequences": [(input_ids, labels, roles)]} of `number` rows, counted over all sources.

    Raises UserError when there is no row `first`.
    """
    rows = (row for spec in specs for row in read_rows(_unweighted(spec)))
    found = False
    for source, row, raw in islice(rows, first - 1, first - 1 + number):
        found = True
        encoded = _encode_row(raw, tokenizer, fmt, options, column_map, tools, check)
        notes = [f"{encoded.status}: {encoded.reason}"] if encoded.reason else []
        notes += [f"warning: {warning}" for warning in encoded.warnings]
        yield {
            "title": f"{source}, row {row}",
            "reason": "; ".join(notes) or None,
            "sequences": [(s.input_ids, s.labels, s.roles) for s in encoded.sequences],
        }
    if not found:
        raise UserError(f"{', '.join(specs)}: there is no row {first}; use a smaller --first")


def _row_count(spec: Spec) -> int:
    """How many rows a progress bar should expect: the lines of a JSON Lines file, else unknown (0)."""
    path = spec.path
    if path is None or data_suffix(path) not in (".jsonl", ".ndjson") or path.suffix == ".gz" or not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _unweighted(source: str | Path) -> Spec:
    spec = parse_spec(source)
    if spec.weight != 1:
        raise UserError(f"{spec.text}: weights are for training; here every row is read exactly once")
    return spec


@contextmanager
def _rewritten(
    spec: Spec, target: str | Path, keys: frozenset[str], *, overwrite: bool
) -> Iterator[Callable[[dict[str, Any]], int]]:
    """Yield write(row); `target` is replaced only when all lines are written, and never when it is the source.

    keys  those of each line that is written; a file with other content is replaced only with `overwrite`
    """
    refuse_same_file([spec], target)
    path = Path(target)
    if path.is_file() and path.stat().st_size and not overwrite:
        row = next((row for _, row in json_lines(path)), None) if path.suffix == ".jsonl" else None
        if not isinstance(row, dict) or not keys <= row.keys():
            raise UserError(
                f"{target} holds something else than the output of this verb; add --overwrite to replace it"
            )
    with open_atomic(target) as file:
        yield lambda row: file.write(json_line(row).encode("utf-8"))
