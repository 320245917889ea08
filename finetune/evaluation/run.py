"""Generating, scoring and recording the answers of one model; an interrupted evaluation resumes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import user_errors
from finetune.evaluation.folder import archive
from finetune.evaluation.items import CONVERSATION, Item
from finetune.evaluation.metrics import Scored
from finetune.evaluation.scoring import score
from finetune.evaluation.suites import suite_verdict
from finetune.files import json_line, json_lines, write_text_atomic
from finetune.progress import progress_bar
from formats import Format, FormatError, decode, encode_prompt, unescape

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetune.generation.generate import Decoding, Generation, GenerationReport


@dataclass
class Prompts:
    """Items with their prompt ids; `refused` holds (item, reason) of those without a usable prompt.

    longest  maximum number of tokens of a prompt
    """

    longest: int | None = None
    items: list[Item] = field(default_factory=list)
    input_ids: list[list[int]] = field(default_factory=list)
    refused: list[tuple[Item, str]] = field(default_factory=list)

    def add(self, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, fmt: Format) -> None:
        """Add the items that have a usable prompt; the others to `refused`."""
        for item in items:
            try:
                ids = encode_prompt(item.messages, item.tools, tokenizer, fmt)
            except FormatError as error:
                self.refused.append((item, str(error)))
                continue
            if self.longest is not None and len(ids) > self.longest:
                reason = f"{len(ids):,} prompt tokens; the model has room for {self.longest:,} and an answer"
                self.refused.append((item, reason))
                continue
            self.items.append(item)
            self.input_ids.append(ids)


def make_prompts(
    items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, fmt: Format, *, longest: int | None = None
) -> Prompts:
    """The ids that a server would feed to the model, control tokens in contents neutralised as in training.

    longest  maximum number of tokens of a prompt
    """
    prompts = Prompts(longest)
    prompts.add(items, tokenizer, fmt)
    return prompts


def answer_token_limit(items: Sequence[Item], tokenizer: PreTrainedTokenizerBase) -> int:
    """1.5 times the tokens of the longest expected answer, between 64 and 1024; 256 without expected answers.

    At least 256 with conversations, whose expected answers are not known.
    """
    longest = 0
    for item in items:
        texts = [json.dumps(call, ensure_ascii=False) for call in item.expected_calls] or [item.expected_text or ""]
        # The brackets and tags of a call take up to a dozen tokens.
        lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 12 for text in texts if text]
        longest = max(longest, sum(lengths))
    limit = min(1024, max(64, longest * 3 // 2)) if longest else 256
    return max(limit, 256) if any(item.kind == CONVERSATION for item in items) else limit


def settings_hash(settings: dict[str, Any]) -> str:
    """12 hexadecimal digits that change with any of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


class ResultsFile:
    """The answers of one model, one JSON line each, appended and flushed as they come.

    Answers of an earlier evaluation with the same settings and items are kept. A file that also holds anything else
    is first renamed; `archived` is its new path.
    """

    def __init__(self, path: Path, settings: str, items: Sequence[Item]):
        self.path, self.settings = path, settings
        self.keys = [item.fingerprint() for item in items]
        lines, keys = self._read(), set(self.keys)
        wanted = [line for line in lines if line.get("settings") == settings and _is_answer(line, keys)]
        self.lines = {line["item"]: line for line in wanted}
        self.archived = archive(path) if len(wanted) < len(lines) else None
        self.rewrite()
        self.file = path.open("a", encoding="utf-8", newline="\n")

    def _read(self) -> list[dict[str, Any]]:
        """All complete lines; {} for a line that is not a JSON object."""
        with user_errors(f"cannot read {self.path}", "check its permissions"):
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        lines = []
        for line in text.split("\n")[:-1]:  # not splitlines: a text may hold U+2028
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = {}
            lines.append(value if isinstance(value, dict) else {})
        return lines

    def append(self, line: dict[str, Any]) -> None:
        """Write one answer to the file. UserError when the disk is full."""
        self.lines[line["item"]] = line
        with user_errors(f"cannot write {self.path}", "free some space and rerun the same command to resume"):
            self.file.write(json_line(line))
            self.file.flush()

    def rewrite(self) -> None:
        """Write the lines again in the order of the items, without the half line of an interrupted evaluation."""
        ordered = [self.lines[key] for key in dict.fromkeys(self.keys) if key in self.lines]
        write_text_atomic(self.path, json_lines(ordered))

    def close(self) -> None:
        """Stop appending."""
        with contextlib.suppress(OSError):  # a full disk has been reported
            self.file.close()


def _is_answer(line: dict[str, Any], keys: set[str]) -> bool:
    """Whether a line of a results file is an answer to one of the items; others may have written the file."""
    latency = line.get("latency_s")
    is_number = isinstance(latency, int | float) and not isinstance(latency, bool) and 0 <= latency < math.inf
    is_text = all(isinstance(line.get(name), str) for name in ("item", "text"))
    if not (is_number and is_text and line["item"] in keys):
        return False
    # The answers of a conversation are not judged again.
    verdicts = line.get("verdicts") if isinstance(line.get("verdicts"), dict) else {}
    is_judged = isinstance(verdicts.get("bfcl_valid"), bool) and isinstance(line.get("parsed_calls"), list)
    return line.get("kind") != CONVERSATION or (is_judged and isinstance(line.get("content"), str))


def run_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    fmt: Format,
    prompts: Prompts,
    decoding: Decoding,
    path: Path,
    settings: dict[str, Any],
    *,
    name: str,
    say: Callable[[str], None],
    share_prefix: bool = True,
) -> tuple[list[Scored], dict[str, Any]]:
    """Answer and score all prompts and write the answers to `path`; returns (scored answers, cost of generation).

    Answers that `path` already holds under the same settings are scored again, but not generated again.
    """
    results = ResultsFile(path, settings_hash(settings), prompts.items)
    if results.archived:
        say(f"{path.name} held answers of other settings or rows; they are now in {results.archived.name}")
    # The first item of every key: identical items are answered once.
    first = {key: at for at, key in reversed(list(enumerate(results.keys)))}
    missing = sorted(at for key, at in first.items() if key not in results.lines)
    if len(missing) < len(prompts.items):
        say(f"{name}: {len(prompts.items) - len(missing)} of {len(prompts.items)} already answered")
    with contextlib.closing(results):
        report = answer_prompts(model, tokenizer, fmt, prompts, decoding, results, missing, name, share_prefix)
    if report.reason and share_prefix:
        say(f"{name}: common prefixes of prompts are not shared ({report.reason})")
    scored = []
    for item, key in zip(prompts.items, results.keys, strict=True):
        line = results.lines[key]
        if item.kind != CONVERSATION:
            line |= judge(item, line["text"], tokenizer, fmt)
        told = (line[field] for field in ("content", "parsed_calls", "verdicts", "latency_s"))
        scored.append(Scored(item, *told, line.get("parse_errors", ())))
    results.rewrite()
    generated = any(prompts.items[at].kind != CONVERSATION for at in missing)
    return scored, {
        "generated_rows": len(missing),
        "seconds": round(report.seconds, 3),
        "method": report.method if generated else None,
        "prompt_tokens": report.prompt_tokens,
        "computed_prompt_tokens": report.computed_prompt_tokens,
        "new_tokens": report.new_tokens,
        "tokens_per_second": round(report.new_tokens / report.seconds, 2) if generated else None,
    }


def answer_prompts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    fmt: Format,
    prompts: Prompts,
    decoding: Decoding,
    results: ResultsFile,
    missing: list[int],
    name: str,
    share_prefix: bool,
) -> GenerationReport:
    """Append the answers to the prompts at the places `missing` to `results`, each as soon as it is finished.

    Returns the cost of the single answers; conversations, whose tools run between the answers, are not in it.
    """
    from finetune.generation.generate import generate

    todo = [at for at in missing if prompts.items[at].kind != CONVERSATION]
    conversations = [at for at in missing if prompts.items[at].kind == CONVERSATION]

    def append(at: int, answer: dict[str, Any]) -> None:
        item = prompts.items[at]
        fields = {key: getattr(item, key) for key in ("source", "row", "turn", "kind", "messages")}
        expected = {"expected_calls": item.expected_calls, "expected_text": item.expected_text}
        tools = [tool["function"]["name"] for tool in item.tools]
        key = {"settings": results.settings, "item": results.keys[at]}
        results.append({**fields, "tools": tools, **expected, **answer, **key})

    def record(index: int, generation: Generation) -> None:
        text = decode(generation.input_ids, tokenizer, fmt)
        measured = {
            "latency_s": round(generation.latency_s, 4),
            "new_tokens": len(generation.input_ids),
            "finish_reason": generation.finish_reason,
        }
        append(todo[index], judge(prompts.items[todo[index]], text, tokenizer, fmt) | measured)
        advance(1)

    with progress_bar(name, len(todo)) as advance:
        ids = [prompts.input_ids[at] for at in todo]
        report = generate(model, ids, decoding=decoding, share_prefix=share_prefix, on_result=record)
    if conversations:
        from finetune.evaluation.bfcl_multi_turn import converse

        items = [prompts.items[at] for at in conversations]
        turns = sum(len(item.truth["turns"]) for item in items)
        with progress_bar(f"{name}, turns of conversations", turns) as advance:
            finished = converse(
                model, tokenizer, fmt, items, decoding, longest=prompts.longest, share_prefix=share_prefix,
                on_turn=advance,
            )  # fmt: skip
            for index, answer in finished:
                append(conversations[index], answer)
    return report


def judge(item: Item, text: str, tokenizer: PreTrainedTokenizerBase, fmt: Format) -> dict[str, Any]:
    """The parsed answer and the verdicts on it."""
    parsed = fmt.parse(text, item.tools)
    calls = unescape(parsed.tool_calls, tokenizer, fmt)
    content = unescape(parsed.content, tokenizer, fmt)
    verdicts = score(item, content, calls, parsed.errors)
    verdicts |= suite_verdict(item, calls, parsed.errors, verdicts)
    return {
        "text": text,
        "content": content,
        "parsed_calls": calls,
        "parse_errors": parsed.errors,
        "verdicts": verdicts,
    }
