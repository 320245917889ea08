"""The answers between which a model decides: the expected one, calls, a question back, a refusal."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from finetune.errors import UserError
from finetune.evaluation.items import CALL, IRRELEVANT, MISSING_PARAMETER, Item, Option
from finetune.synthetic.phrasing import read_json
from finetune.synthetic.schema_phrasing import FOLDER
from finetune.synthetic.schema_values import SchemaValues

EXPECTED_NAME = {CALL: "call", MISSING_PARAMETER: "ask_back", IRRELEVANT: "decline"}
SENTENCES = {
    "en": {"ask_back": "Could you give me the missing details?", "decline": "Sorry, none of my tools can do that."},
    "ko": {"ask_back": "필요한 정보를 더 알려 주시겠어요?", "decline": "죄송하지만 제가 가진 도구로는 할 수 없습니다."},
}


class OptionPool:
    """Answers of all items, by their tools."""

    def __init__(self, items: Sequence[Item]):
        self.calls: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self.texts: dict[tuple[str, str], list[str]] = {}
        self.words = {language: read_json(FOLDER / f"{language}.json")["values"] for language in SENTENCES}
        for item in items:
            if item.kind == CALL and len(item.expected_calls) == 1:
                self.calls.setdefault(_tools_key(item), {}).setdefault(
                    item.expected_calls[0]["name"], item.expected_calls
                )
            elif item.expected_text and item.kind in EXPECTED_NAME:
                self.texts.setdefault((_tools_key(item), EXPECTED_NAME[item.kind]), []).append(item.expected_text)

    def options(self, item: Item) -> list[Option]:
        """The expected answer first; the choice of the others depends on the item alone."""
        rng = random.Random(item.fingerprint())
        language = "ko" if any("가" <= letter <= "힣" for letter in item.messages[-1]["content"]) else "en"
        expected = EXPECTED_NAME[item.kind]
        options = [Option(expected, item.expected_calls, item.expected_text or "", True)]
        if item.kind != CALL and not item.expected_text:
            options[0].text = self._text(item, expected, language, rng)
        taken = {call["name"] for call in item.expected_calls}
        for name in ("call", "other_call")[item.kind == CALL :]:
            if call := self._call(item, taken, language, rng):
                options.append(Option(name, [call], ""))
                taken.add(call["name"])
        options += [
            Option(name, [], self._text(item, name, language, rng))
            for name in ("ask_back", "decline")
            if name != expected
        ]
        return options

    def _call(self, item: Item, taken: set[str], language: str, rng: random.Random) -> dict[str, Any] | None:
        made = self.calls.get(_tools_key(item), {})
        if names := sorted(made.keys() - taken):
            return made[rng.choice(names)][0]
        tools = {tool["function"]["name"]: tool["function"] for tool in item.tools}
        for name in rng.sample(sorted(tools.keys() - taken), len(tools.keys() - taken)):
            schema = tools[name].get("parameters") or {"type": "object"}
            try:
                return {"name": name, "arguments": SchemaValues(schema, self.words[language], rng).draw(name)}
            except UserError:  # a schema for which no arguments are found
                continue
        return None

    def _text(self, item: Item, name: str, language: str, rng: random.Random) -> str:
        texts = sorted(set(self.texts.get((_tools_key(item), name), ())) - {item.expected_text})
        return rng.choice(texts) if texts else SENTENCES[language][name]


def _tools_key(item: Item) -> str:
    return json.dumps(item.tools, sort_keys=True)
