"""Mutated rows and files of rows for tests/fuzz.py: reading, checking, encoding, preparing."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.preparing.checks import check_conversation
from finetune.preparing.preparation import PrepareOptions, prepare
from finetune.reading.columns import decoded
from finetune.reading.conversations import load_conversations
from finetune.reading.normalize import conversation_text, normalize_row
from finetune.reading.row_files import RowError
from finetune.reading.shapes import describe
from formats import get_format
from tests.fuzz_inputs import PLANTED, edited, mutated, parts, row_seeds

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
METADATA = ("from", "id", "index", "type")  # keys whose value is not a text of the conversation
# Shapes that hold alternatives of an answer, of which the first is read.
WITH_ALTERNATIVES = ("BFCL", "SQuAD")
PAIRS = (("chatml", "smollm2"), ("qwen", "qwen3"), ("llama3", "llama3"), ("mistral", "mistral-tekken"),
         ("plain", "smollm2"), ("qwen-xml", "qwen3"), ("native", "qwen3"))  # fmt: skip


@cache
def seeds() -> list[dict[str, Any]]:
    return row_seeds()


def row_case(chance: random.Random) -> dict[str, Any]:
    """A mutated row, and for one in three the format that it is encoded with."""
    row, pair = mutated(chance.choice(seeds()), chance, seeds()), chance.randrange(3 * len(PAIRS))
    return {"row": row, "pair": pair if pair < len(PAIRS) else None}


def opened(value: Any) -> Any:
    """The value with every text that is JSON of an object or a list replaced by what it holds."""
    if isinstance(value, str):
        inner = decoded(value) if value.lstrip()[:1] in ("{", "[") else value
        return value if isinstance(inner, str) else opened(inner)
    if isinstance(value, list):
        return [opened(item) for item in value]
    return {key: opened(item) for key, item in value.items()} if isinstance(value, dict) else value


def check_row(case: dict[str, Any], folder: Path) -> None:
    row = case["row"]
    notes: Counter = Counter()
    try:
        conversation = normalize_row(row, notes=notes)
    except RowError:
        return
    check_conversation(conversation)
    text = conversation_text(conversation).decode("utf-8")
    described = describe(row)
    unread = re.split(r", |\.", described.partition("; not read: ")[2])
    for word in set(PLANTED.findall(json.dumps(row, ensure_ascii=False))) - set(PLANTED.findall(text)):
        paths = [path for path, inner in parts(opened(row)).items() if isinstance(inner, str) and word in inner]
        named = " ".join(notes)
        noted = {*unread, *METADATA}
        noted |= {"tools"} if "translated to JSON Schema" in named else set()
        is_known = described.startswith(WITH_ALTERNATIVES)
        if not is_known and not any({*path} & noted or any(repr(str(k)[:40]) in named for k in path) for path in paths):
            raise AssertionError(f"text lost: {word} at {paths}; notes {dict(notes)}")
    if case["pair"] is not None:
        check_encoding(conversation, case["pair"])


@cache
def loaded_pair(number: int) -> tuple[Any, Any, re.Pattern, dict[int, str]]:
    """(tokenizer, format, pattern of control strings, id -> control token) of an entry of PAIRS."""
    from formats.tokens import added_tokens
    from tests import parts as tokenizers

    name, vocabulary = PAIRS[number % len(PAIRS)]
    tokenizer = tokenizers.tokenizer(vocabulary)
    fmt = get_format(name, tokenizer)
    special = {*tokenizer.all_special_tokens, *fmt.control_tokens, *fmt.call_markers}
    control = {text: number for text, number in added_tokens(tokenizer).items() if not text.strip("\u2581 ").isalnum()}
    strings = sorted({*special, *control, "<think>", "</think>"}, key=len, reverse=True)
    strings = [text for text in strings if len(text.strip()) > 1]
    return tokenizer, fmt, re.compile("|".join(map(re.escape, strings))), {n: text for text, n in control.items()}


def load_pairs() -> None:
    """Load every tokenizer."""
    for number in range(len(PAIRS)):
        loaded_pair(number)


def without_control(value: Any, pattern: re.Pattern) -> Any:
    """The value with every control string replaced, however they overlap."""
    if isinstance(value, str):
        while pattern.search(value):
            value = pattern.sub("x", value)
        return value
    if isinstance(value, list):
        return [without_control(item, pattern) for item in value]
    if isinstance(value, dict):
        return {without_control(key, pattern): without_control(item, pattern) for key, item in value.items()}
    return value


def check_encoding(conversation: dict[str, Any], pair: int) -> None:
    """The control tokens of a row are those of the same row without control strings in its contents."""
    from finetune.encoding.options import EncodingOptions
    from finetune.encoding.rows import encode_answers

    tokenizer, fmt, pattern, control = loaded_pair(pair)
    options = EncodingOptions(allow_unreadable_calls=True, reasoning="drop")
    encoded = encode_answers(conversation, tokenizer, fmt, options)
    if encoded.status == "refused":
        assert encoded.reason and not encoded.sequences, "refused without a reason"
        return
    calm = without_control(conversation, pattern)
    other = encode_answers(calm, tokenizer, fmt, options)
    if calm == conversation or other.status == "refused" or "</think>" in json.dumps(conversation):
        return
    for kind in ("labels", "input_ids"):
        made, wanted = (
            Counter(number for s in one.sequences for number in getattr(s, kind) if number in control)
            for one in (encoded, other)
        )
        if len(encoded.sequences) == len(other.sequences) and made != wanted:
            names = {control[number]: (made[number], wanted[number]) for number in made | wanted}
            raise AssertionError(f"control tokens in {kind} of {PAIRS[pair % len(PAIRS)]}: {names}")


def file_case(chance: random.Random) -> dict[str, Any]:
    """A file of rows, mostly damaged: its name, its bytes, and the number of rows it holds if it is not."""
    rows = [mutated(chance.choice(seeds()), chance, seeds()) if chance.random() < 0.6 else chance.choice(seeds())
            for _ in range(chance.randint(1, 6))]  # fmt: skip
    suffix = chance.choice(SUFFIXES)
    data, count = file_bytes(rows, suffix, chance)
    if chance.random() < 0.6:
        data, count = edited(data, chance), None
    if chance.random() < 0.2:
        suffix, data = suffix + ".gz", gzip.compress(data, 1, mtime=0)
        if chance.random() < 0.2:
            data, count = edited(data, chance), None
    return {
        "name": f"rows{suffix}",
        "data": data,
        "rows": count,
        "way": chance.choice((0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3)),
    }


def file_bytes(rows: list[Any], suffix: str, chance: random.Random) -> tuple[bytes, int | None]:
    if suffix in (".jsonl", ".ndjson"):
        return "\n".join(json.dumps(row) for row in rows).encode(), len(rows)
    if suffix == ".json":
        value: Any = rows if chance.random() < 0.7 else {chance.choice(("data", "rows", "x")): rows, "meta": 1}
        return json.dumps(value, indent=chance.choice((None, 1))).encode(), None
    objects = [row for row in rows if isinstance(row, dict)]
    cells = [{str(key).replace("\x00", ""): as_cell(value) for key, value in row.items()} for row in objects]
    if suffix in (".csv", ".tsv"):
        import csv

        file = io.StringIO()
        names = list(dict.fromkeys(name for row in cells for name in row)) or ["question"]
        writer = csv.DictWriter(file, names, delimiter="," if suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(cells)
        return file.getvalue().encode("utf-8", "replace"), None
    import pyarrow
    from pyarrow import ipc, parquet

    try:
        table = pyarrow.Table.from_pylist(rows)
    except Exception:  # what Arrow cannot hold as structs is written as JSON text
        table = pyarrow.Table.from_pylist(
            [{k: v.encode("utf-8", "replace").decode() for k, v in row.items()} for row in cells]
        )
    sink = io.BytesIO()
    try:
        if suffix == ".parquet":
            parquet.write_table(table, sink)
        else:
            with ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    except pyarrow.ArrowException:  # a struct without a field
        return b"PAR1", None
    return sink.getvalue(), table.num_rows


def as_cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def check_file(case: dict[str, Any], folder: Path) -> None:
    path = folder / case["name"]
    path.write_bytes(case["data"])
    way = case["way"]
    try:
        if way == 0:
            load_conversations([path], strict=True)
        elif way == 1:
            prepared = prepare([str(path)], PrepareOptions(dedupe=True, split="60/20/20"))
            assert prepared.kept + len(prepared.rejected) == prepared.loaded.counts["read"]
        elif way == 2:
            check_command(path, folder)
        else:
            loaded = load_conversations([path], strict=False)
            counts = loaded.counts
            assert counts["kept"] + counts["rejected"] == counts["read"], f"rows lost: {counts}"
            assert case["rows"] in (None, counts["read"]), f"{counts['read']} rows read of {case['rows']}"
    except UserError as error:
        assert str(error).strip(), "an error without a reason"
    finally:
        path.unlink()


def check_command(path: Path, folder: Path) -> None:
    """prepare_data.py ends with 0 or one line, and writes each row that it read to one file."""
    import prepare_data

    output, shown = folder / "prepared", io.StringIO()
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            code = prepare_data.main([str(path), "--output", str(output)])
        assert code in (0, 2), f"exit status {code}"
        assert code == 0 or shown.getvalue().count("error: ") >= 1, "no error line"
        if code == 0:
            assert (output / "dataset_card.md").is_file()
            lines = sum(file.read_text("utf-8").count("\n") for file in output.glob("*.jsonl"))
            read = int(re.search(r"([\d,]+) read =", shown.getvalue())[1].replace(",", ""))
            assert lines == read, f"{lines} rows written of {read} read"
    finally:
        shutil.rmtree(output, ignore_errors=True)
