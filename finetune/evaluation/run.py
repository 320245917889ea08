"""Generating, scoring and recording the answers of one model; a killed run goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.evaluation.folder import free_name
from finetune.evaluation.items import Item
from finetune.evaluation.metrics import Scored
from finetune.evaluation.scoring import score
from finetune.files import json_line, write_text_atomic
from finetune.progress import progress_bar


@dataclass
class Prompts:
    """Items with their prompt ids; `refused` holds (item, reason) of those that no prompt can be made for."""

    items: list[Item] = field(default_factory=list)
    input_ids: list[list[int]] = field(default_factory=list)
    refused: list[tuple[Item, str]] = field(default_factory=list)


def make_prompts(items: Sequence[Item], tokenizer: Any, fmt: Any, *, longest: int | None = None) -> Prompts:
    """The ids a server would feed for each item, control tokens in contents neutralised as in training.

    `longest` is the number of tokens the model can hold minus those to be generated.
    """
    from formats import FormatError, encode_prompt

    prompts = Prompts()
    for item in items:
        try:
            ids = encode_prompt(item.messages, item.tools, tokenizer, fmt)
        except FormatError as error:
            prompts.refused.append((item, str(error)))
            continue
        if longest is not None and len(ids) > longest:
            reason = f"{len(ids):,} prompt tokens; beside an answer the model has room for {longest:,}"
            prompts.refused.append((item, reason))
            continue
        prompts.items.append(item)
        prompts.input_ids.append(ids)
    return prompts


def room_for_answers(items: Sequence[Item], tokenizer: Any) -> int:
    """Tokens an answer may take: half as many again as the longest gold answer, 64 to 1024; 256 without gold answers.

    A model that has not learned when to stop would otherwise spend most of the time on text that no score reads.
    """
    longest = 0
    for item in items:
        texts = [json.dumps(call, ensure_ascii=False) for call in item.expected_calls] or [item.expected_text or ""]
        # A call's brackets and tags take up to a dozen tokens beside its JSON.
        lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 12 for text in texts if text]
        longest = max(longest, sum(lengths))
    return min(1024, max(64, longest * 3 // 2)) if longest else 256


def settings_hash(settings: dict[str, Any]) -> str:
    """12 hexadecimal digits over everything that decides an answer besides the item itself."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


class ResultsFile:
    """The answers of one model, one JSON line each, appended and flushed as they come.

    Lines of an earlier run with the same settings and items are taken over. A file that also holds anything else
    is first set aside under another name, never overwritten; `set_aside` then names it.
    """

    def __init__(self, path: Path, settings: str, items: Sequence[Item]):
        self.path, self.settings = path, settings
        self.keys = [item.fingerprint() for item in items]
        self.set_aside: Path | None = None
        self.lines: dict[str, dict[str, Any]] = {}
        wanted, foreign = set(self.keys), False
        for line in self._read():
            if line is not None and line.get("settings") == settings and line.get("item") in wanted:
                self.lines[line["item"]] = line
            else:
                foreign = True
        if foreign:
            self.set_aside = free_name(path)
            path.replace(self.set_aside)
        self.finish()  # also drops half a line that a killed run left
        self.file = path.open("a", encoding="utf-8", newline="\n")

    def _read(self) -> list[dict[str, Any] | None]:
        """All lines that were ended; None for one that is no answer. The half line of a killed run is left away."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); check its rights") from error
        lines = []
        for line in text.split("\n")[:-1]:  # not splitlines: texts may hold U+2028 and other ends of lines
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            lines.append(value if isinstance(value, dict) else None)
        return lines

    def append(self, line: dict[str, Any]) -> None:
        """Record one answer now: a killed run keeps it. UserError when the disk is full."""
        self.lines[line["item"]] = line
        try:
            self.file.write(json_line(line))
            self.file.flush()
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror}; make room and give the same command again"
            ) from error

    def finish(self) -> None:
        """Write the lines once more in the order of the items (answers arrive in the order they end)."""
        ordered = [self.lines[key] for key in dict.fromkeys(self.keys) if key in self.lines]
        write_text_atomic(self.path, "".join(map(json_line, ordered)))

    def close(self) -> None:
        """End appending."""
        with contextlib.suppress(OSError):  # what a full disk did not take has been reported
            self.file.close()


def run_model(
    model: Any,
    tokenizer: Any,
    fmt: Any,
    prompts: Prompts,
    decoding: Any,
    path: Path,
    settings: dict[str, Any],
    *,
    name: str,
    say: Callable[[str], None],
    share_prefix: bool = True,
) -> tuple[list[Scored], dict[str, Any]]:
    """Answer and score all prompts, recording every answer in `path`; (scored items, what the generation cost).

    Answers found in `path` under the same settings are not generated again, but scored anew.
    """
    from formats import unescape

    results = ResultsFile(path, settings_hash(settings), prompts.items)
    if results.set_aside:
        say(f"{path.name} held answers of other settings or rows; they are now in {results.set_aside.name}")
    todo = [at for at, key in enumerate(results.keys) if key not in results.lines]
    # Rows that are the same word for word are answered once.
    todo = list({results.keys[at]: at for at in reversed(todo)}.values())[::-1]
    if len(todo) < len(prompts.items):
        say(f"{name}: {len(prompts.items) - len(todo)} of {len(prompts.items)} answers are already there")

    def record(at: int, generation: Any) -> None:
        item = prompts.items[at]
        text = tokenizer.decode(generation.input_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        results.append(
            {
                "source": item.source,
                "row": item.row,
                "turn": item.turn,
                "kind": item.kind,
                "messages": item.messages,
                "tools": [tool["function"]["name"] for tool in item.tools],
                "expected_calls": item.expected_calls,
                "expected_text": item.expected_text,
                **_judged(item, text, tokenizer, fmt, unescape),
                "latency_s": round(generation.latency_s, 4),
                "new_tokens": len(generation.input_ids),
                "finish_reason": generation.finish_reason,
                "settings": results.settings,
                "item": results.keys[at],
            }
        )

    try:
        cost = _generate(model, prompts.input_ids, todo, decoding, record, name, say, share_prefix)
    finally:
        results.close()
    scored = []
    for item, key in zip(prompts.items, results.keys, strict=True):
        line = results.lines[key]
        line |= _judged(item, line["text"], tokenizer, fmt, unescape)
        scored.append(
            Scored(
                item, line["content"], line["parsed_calls"], line["verdicts"], line["latency_s"], line["new_tokens"],
                line["parse_errors"],
            )
        )  # fmt: skip
    results.finish()
    return scored, cost


def _judged(item: Item, text: str, tokenizer: Any, fmt: Any, unescape: Callable) -> dict[str, Any]:
    """The generated text read back, and the verdicts on it."""
    parsed = fmt.parse(text, item.tools)
    calls = unescape(parsed.tool_calls, tokenizer, fmt)
    content = unescape(parsed.content, tokenizer, fmt)
    verdicts = score(item, content, calls, parsed.errors)
    if item.source.startswith("bfcl:"):
        from finetune.evaluation.bfcl import verdict

        verdicts |= verdict(item, calls, parsed.errors, verdicts)
    return {
        "text": text,
        "content": content,
        "parsed_calls": calls,
        "parse_errors": parsed.errors,
        "verdicts": verdicts,
    }


def _generate(model, input_ids, todo, decoding, record, name, say, share_prefix) -> dict[str, Any]:
    """Generate the open rows; after an out-of-memory error the rest goes on with half the batch."""
    from dataclasses import replace

    import torch

    from finetune.generation.generate import generate

    started, tokens, computed, method, new_tokens = time.perf_counter(), 0, 0, None, 0
    open_rows = list(todo)
    with progress_bar(name, len(todo)) as advance:
        while open_rows:
            rows, done = open_rows, set()

            def finished(at: int, generation: Any, rows=rows, done=done) -> None:
                nonlocal new_tokens
                record(rows[at], generation)
                done.add(rows[at])
                new_tokens += len(generation.input_ids)
                advance(1)

            report = None
            with contextlib.suppress(torch.OutOfMemoryError):
                report = generate(
                    model,
                    [input_ids[at] for at in rows],
                    decoding=decoding,
                    share_prefix=share_prefix,
                    on_result=finished,
                )
            open_rows = [at for at in rows if at not in done]
            if report is None:
                if decoding.batch_size == 1:
                    raise UserError("the accelerator's memory does not hold one row; lower --max_new_tokens")
                decoding = replace(decoding, batch_size=decoding.batch_size // 2)
                torch.cuda.empty_cache()
                say(f"out of memory; going on with --batch_size {decoding.batch_size}")
                continue
            tokens += report.prompt_tokens
            computed += report.computed_prompt_tokens
            method = report.method
            if report.reason and share_prefix:
                say(f"{name}: the prompts' common start is not shared ({report.reason})")
    seconds = time.perf_counter() - started
    return {
        "generated_rows": len(todo),
        "seconds": round(seconds, 3),
        "method": method,
        "prompt_tokens": tokens,
        "computed_prompt_tokens": computed,
        "new_tokens": new_tokens,
        "tokens_per_second": round(new_tokens / seconds, 2) if todo and seconds else None,
    }
