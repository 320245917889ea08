"""The answers between which a model decides: the expected one, calls, a question back, a refusal."""

from __future__ import annotations

import contextlib
import json
import random
import re
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


MAX_COMPARED = 500  # requests with the same tools that are compared with one


class OptionPool:
    """Calls and texts with which other requests are answered, by their tools."""

    def __init__(self, items: Sequence[Item]):
        self.answers: dict[tuple[str, str], list[tuple[set[str], Option]]] = {}
        self.words = {language: read_json(FOLDER / f"{language}.json")["values"] for language in SENTENCES}
        for item in items:
            name = EXPECTED_NAME.get(item.kind, "")
            if item.expected_text or len(item.expected_calls) == 1:
                option = Option(name, item.expected_calls, item.expected_text or "")
                found = self.answers.setdefault((_tools_key(item), name), [])
                found += [(_words(_request(item)), option)] * (len(found) < MAX_COMPARED)

    def options(self, item: Item) -> list[Option]:
        """The expected answer first. A call is that of the most similar request, so that the choice is not too easy."""
        expected = EXPECTED_NAME[item.kind]
        options = [Option(expected, item.expected_calls, item.expected_text or "", True)]
        if item.kind != CALL and not item.expected_text:
            options[0].text = self._text(item, expected)
        taken = {call["name"] for call in item.expected_calls}
        for name in ("call", "other_call")[item.kind == CALL :]:
            if call := self._call(item, taken):
                options.append(Option(name, [call], ""))
                taken.add(call["name"])
        texts = [name for name in ("ask_back", "decline") if name != expected]
        return options + [Option(name, [], self._text(item, name)) for name in texts]

    def _nearest(self, item: Item, name: str) -> list[Option]:
        """The answers of that kind to requests with the same tools, those of the most similar request first."""
        own = _words(_request(item))
        found = self.answers.get((_tools_key(item), name), [])
        return [option for _, option in sorted(found, key=lambda pair: -_similarity(own, pair[0]))]

    def _call(self, item: Item, taken: set[str]) -> dict[str, Any] | None:
        for option in self._nearest(item, "call"):
            if option.calls[0]["name"] not in taken:
                return option.calls[0]
        own, rng = _words(_request(item)), random.Random(item.fingerprint())
        functions = [tool["function"] for tool in item.tools if tool["function"]["name"] not in taken]
        described = {f["name"]: _words(f"{f['name']} {f.get('description', '')}") for f in functions}
        for function in sorted(functions, key=lambda one: -_similarity(own, described[one["name"]])):
            values = SchemaValues(function.get("parameters") or {"type": "object"}, self.words[_language(item)], rng)
            with contextlib.suppress(UserError):  # a schema for which no arguments are found
                return {"name": function["name"], "arguments": values.draw(function["name"])}
        return None

    def _text(self, item: Item, name: str) -> str:
        texts = (option.text for option in self._nearest(item, name))
        return next((text for text in texts if text != item.expected_text), SENTENCES[_language(item)][name])


def _tools_key(item: Item) -> str:
    return json.dumps(item.tools, sort_keys=True)


def _request(item: Item) -> str:
    return next((message["content"] for message in reversed(item.messages) if message["role"] == "user"), "")


def _language(item: Item) -> str:
    return "ko" if any("가" <= letter <= "힣" for letter in _request(item)) else "en"


def _words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.lower()))


def _similarity(left: set[str], right: set[str]) -> float:
    """Jaccard's: common words / all words."""
    return len(left & right) / (len(left | right) or 1)
