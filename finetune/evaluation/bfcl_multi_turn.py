"""BFCL's rows of several turns: the model calls simulated tools until it stops calling, then the user goes on.

As in the leaderboard's function-calling mode: a turn ends with an answer without a readable call; after 20 steps in one
turn the row is failed. The tools and BFCL's checker run in a process of their own (`bfcl_tools`).
"""

from __future__ import annotations

import json
import keyword
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.evaluation.bfcl_tools import ToolProcess, ToolsFailed
from finetune.evaluation.items import CONVERSATION, Item
from finetune.reading.tool_schemas import normalize_tools
from formats import Format, FormatError, decode, encode_prompt, unescape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.generation.generate import Decoding, Generation

UNDECLARED_CALL = "undeclared_tool()"  # what the tools' process is given for a call that must not be evaluated


def item_of(row: dict[str, Any], truth: list[list[str]], number: int, category: str, folder: Path) -> Item:
    """The item of one row; its tools are those of its first turn. folder: the package's folder of rows."""
    from bfcl_eval.constants.executable_backend_config import MULTI_TURN_FUNC_DOC_FILE_MAPPING as FILES

    texts = [(folder / "multi_turn_func_doc" / FILES[name]).read_text("utf-8") for name in row["involved_classes"]]
    tools = normalize_tools([json.loads(line) for text in texts for line in text.splitlines() if line.strip()])
    missed = {name for names in row.get("missed_function", {}).values() for name in names}
    return Item(
        source=f"bfcl:{category}",
        row=number,
        turn=len(row["question"][0]),
        kind=CONVERSATION,
        messages=row["question"][0],
        tools=[tool for tool in tools if tool["function"]["name"] not in missed],
        category=category,
        truth={"row": row, "turns": truth, "tools": tools},
    )


@dataclass
class Conversation:
    """One row in progress. `turns` has the calls of every step of every turn, as Python expressions."""

    item: Item
    steps_limit: int
    more_tools: str  # what the user says when further tools appear
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    turns: list[list[list[str]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None
    seconds: float = 0.0
    new_tokens: int = 0

    def __post_init__(self) -> None:
        self.tools = list(self.item.tools)
        self.start_turn()

    @property
    def row(self) -> dict[str, Any]:
        return self.item.truth["row"]

    @property
    def is_finished(self) -> bool:
        return self.failure is not None or len(self.turns) > len(self.row["question"])

    def start_turn(self) -> None:
        """The user's next messages; where a turn brings back tools that were missing, they are declared."""
        number = len(self.turns)
        self.turns.append([])
        if number == len(self.row["question"]):
            return
        if names := self.row.get("missed_function", {}).get(str(number)):
            self.tools += [tool for tool in self.item.truth["tools"] if tool["function"]["name"] in names]
            self.messages.append({"role": "user", "content": self.more_tools})
        self.messages += self.row["question"][number]

    def take(self, generation: Generation, text: str, content: str, calls: list[dict], tools: ToolProcess) -> None:
        """Continue with the model's answer: execute its calls, or end the turn."""
        self.texts.append(text)
        self.seconds, self.new_tokens = self.seconds + generation.latency_s, self.new_tokens + len(generation.input_ids)
        if not calls:
            self.messages.append({"role": "assistant", "content": content or text})
            self.start_turn()
            return
        ids = [
            f"call{len(self.calls) + number:05d}" for number in range(len(calls))
        ]  # nine letters and digits: Mistral
        made = [{"id": key, "type": "function", "function": dict(call)} for key, call in zip(ids, calls, strict=True)]
        self.messages.append({"role": "assistant", "content": content, "tool_calls": made})
        self.calls += calls
        declared = {tool["function"]["name"] for tool in self.item.truth["tools"]}
        expressions = [expression(call, declared) for call in calls]
        done = [one for turn in self.turns for step in turn for one in step]
        try:
            results = tools.ask({"row": self.row, "done": done, "calls": expressions})["results"]
        except ToolsFailed as error:
            self.failure = str(error)
            return
        self.turns[-1].append(expressions)
        for key, call, result in zip(ids, calls, results, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": key, "name": call["name"], "content": result})
        if len(self.turns[-1]) > self.steps_limit:
            self.failure = f"more than {self.steps_limit} steps in one turn"

    def judge(self, tools: ToolProcess) -> dict[str, Any]:
        """{"bfcl_valid", and "bfcl_error" where it is False}: BFCL's verdict on the calls of all turns."""
        error = self.failure
        if error is None:
            try:
                turns = self.turns[: len(self.row["question"])]
                answer = tools.ask({"row": self.row, "turns": turns, "truth": self.item.truth["turns"]})
                error = None if answer["valid"] else answer["error"]
            except ToolsFailed as failed:
                error = str(failed)
        return {"bfcl_valid": error is None} | ({"bfcl_error": error} if error else {})


def expression(call: dict[str, Any], declared: set[str]) -> str:
    """A call as the Python expression that BFCL evaluates: a declared name and literals, nothing else."""
    arguments = call["arguments"]
    if call["name"] not in declared or not all(k.isidentifier() and not keyword.iskeyword(k) for k in arguments):
        return UNDECLARED_CALL
    return f"{call['name']}({','.join(f'{name}={value!r}' for name, value in arguments.items())})"


def converse(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    fmt: Format,
    items: Sequence[Item],
    decoding: Decoding,
    *,
    longest: int | None,
    share_prefix: bool = True,
    on_turn: Callable[[int], None] = lambda turns: None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index of the item, what its line of results has) of each finished row.

    longest  tokens of a prompt; a row that outgrows it is failed
    on_turn  is told how many further turns have ended
    """
    from bfcl_eval.constants.default_prompts import DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_FC as MORE_TOOLS
    from bfcl_eval.constants.default_prompts import MAXIMUM_STEP_LIMIT

    from finetune.generation.generate import generate

    active = {at: Conversation(item, MAXIMUM_STEP_LIMIT, MORE_TOOLS) for at, item in enumerate(items)}
    with ToolProcess() as tools:
        while active:
            prompts: dict[int, list[int]] = {}
            for at, one in active.items():
                try:
                    prompts[at] = encode_prompt(one.messages, one.tools, tokenizer, fmt)
                except FormatError as error:
                    one.failure = str(error)
                    continue
                if longest is not None and len(prompts[at]) > longest:
                    one.failure = f"{len(prompts.pop(at)):,} prompt tokens; the model has room for {longest:,}"
            ended = sum(len(one.turns) for one in active.values())
            report = generate(model, list(prompts.values()), decoding=decoding, share_prefix=share_prefix)
            for at, generation in zip(prompts, report.results, strict=True):
                assert generation is not None
                text = decode(generation.input_ids, tokenizer, fmt)
                parsed = fmt.parse(text, active[at].tools)
                # A call that cannot be read ends the turn, as in BFCL.
                calls = [] if parsed.errors else unescape(parsed.tool_calls, tokenizer, fmt)
                content = unescape(parsed.content, tokenizer, fmt)
                active[at].take(generation, unescape(text, tokenizer, fmt), content, calls, tools)
            on_turn(sum(len(one.turns) for one in active.values()) - ended)
            for at in [at for at, one in active.items() if one.is_finished]:
                one = active.pop(at)
                yield (
                    at,
                    {
                        "messages": one.messages,
                        "text": "\n".join(one.texts),
                        "content": one.messages[-1]["content"],
                        "parsed_calls": one.calls,
                        "parse_errors": [],
                        "verdicts": one.judge(tools),
                        "latency_s": round(one.seconds, 4),
                        "new_tokens": one.new_tokens,
                        "finish_reason": one.failure or "stop",
                    },
                )
