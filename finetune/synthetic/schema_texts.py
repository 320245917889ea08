"""Texts for a property of a schema: what its description tells, or a word list by its format or name.

`words` in these functions is the `values` entry of a file in finetune/synthetic/phrasings: lists of texts by format and
by word in a property's name. A list may be the name of another one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import datetime
from typing import Any

from finetune.synthetic.descriptions import bare_choices, date_form, digits_form, told_texts

GENERIC_WORDS = {"name", "id", "path", "value", "number", "type", "data", "input", "text"}  # in names of parameters
FREE_TEXTS = {"message", "text", "body", "content", "description", "comment", "prompt", "query", "question", "title"}
ENOUGH_EXAMPLES = 4  # fewer ones become a constant of all rows
DIGITS = "4821730596"
_ISO = re.compile(r"\b(?:ISO[ -]?8601|RFC ?3339)\b", re.IGNORECASE)
_ISO_MOMENT = re.compile(r"\d{4}-\d\d-\d\d(?:T\d\d:\d\d(?::\d\d)?)?")
_BIRTH = re.compile(r"\b(?:birth|birthday|dob|born)\b|생년|생일", re.IGNORECASE)
_PROGRAM = re.compile(r"python|source|snippet|script|program|execut|\brun", re.IGNORECASE)
# A `name` is a person's where its description, or the tool's, is about one of these: not "the user's playlist".
_PERSON = re.compile(
    r"\b(?:person|people|user|customer|client|contact|guest|patient|employee|recipient|sender|member|author|student|"
    r"teacher|doctor|passenger|candidate|applicant|attendee|participant|driver|manager|colleague|friend|someone|staff|"
    r"holder|cardholder|booking|reservation|your name|(?:first|last|full|given|family) name)s?\b"
    r"(?!['’-]|\s(?!to\b|who\b|that\b|in\b|for\b|on\b|with\b|and\b|or\b|is\b|names?\b)\w)"
    r"|사람|고객|사용자|회원|직원|연락처|학생|환자|손님|담당자|수신자|성함|예약자",
    re.IGNORECASE,
)
# "Recipient email", not "a note for the email"
_KIND = re.compile(
    r"(?<!\bthe )(?<!\ban )\b(email|phone|url|airport|hostname)(?: address| number| code)?(?:e?s)?(?=[.,;(]|$)",
    re.IGNORECASE,
)


def humanised(name: str) -> str:
    """`top_k` -> `top k`, `startDate` -> `start date`; names with other characters stay."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_\-]*", name):
        return name
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", re.sub(r"[_\-]+", " ", name)).strip()
    return words if words.isupper() else words.lower()


def texts_for(
    schema: dict[str, Any], name: str, words: dict[str, Any], *, about: str = "", reserved: Collection[str] = ()
) -> list[str]:
    """Texts for the property `name`, dates in ascending order.

    about     what the tool does
    reserved  texts of the tool's schema that are no values of it: names of properties, values of enums
    """
    kind, description = str(schema.get("format")), str(schema.get("description") or "")
    parts = humanised(name).lower().split()
    for key in (f"format {kind}", kind, kind.rstrip("1345")):  # pydantic's `uuid4` and others
        if texts := _listed(words, key):
            return _moments(words, "%Y-%m-%d", 1990) if _is_birth(kind, parts, description) else texts
    if texts := _dates(parts, description, words):
        return texts
    told, are_all = told_texts(description, reserved)
    named = _by_name(parts, description, about, words)
    is_free = parts[-1:] and parts[-1] in FREE_TEXTS  # its description may list what it can contain
    if told and not (is_free and are_all):
        return told if are_all or len(told) >= ENOUGH_EXAMPLES else _with_others(told, parts, words)
    if _is_birth(kind, parts, description):
        return _moments(words, "%Y-%m-%d", 1990)
    if form := digits_form(description):
        return [_filled(form, by) for by in range(6)]
    choices = [] if is_free else bare_choices(description)
    nouns = {choice.lower().split()[-1].removesuffix("s") for choice in choices}
    return choices if choices and nouns.isdisjoint(words.keys() | GENERIC_WORDS) else named or _listed(words, "word")


def _listed(words: dict[str, Any], key: str) -> list[str]:
    found = words.get(key, [])
    return _listed(words, found) if isinstance(found, str) else found


def _is_birth(kind: str, parts: list[str], description: str) -> bool:
    return kind in ("None", "date") and bool(_BIRTH.search(" ".join([*parts, description])))


def _dates(parts: list[str], description: str, words: dict[str, Any]) -> list[str]:
    """Dates or times in the form that the description asks for; [] where it asks for none."""
    if form := date_form(description):
        return _moments(words, form, 1990 if _is_birth("None", parts, description) else None)
    if not _ISO.search(description):
        return []
    about = " ".join([*parts, description.lower()])
    if _BIRTH.search(about):
        return _moments(words, "%Y-%m-%d", 1990)
    if re.search(r"duration|interval", about):
        return _listed(words, "duration")
    is_day = re.search(r"\b(?:date|day)\b", about) and not re.search(r"time|\bat\b", about)
    return _listed(words, "date" if is_day else "date-time")


def _moments(words: dict[str, Any], form: str, year: int | None = None) -> list[str]:
    moments = [datetime.fromisoformat(text) for text in _listed(words, "date-time")]
    texts = [moment.replace(year=year or moment.year).strftime(form) for moment in moments]
    return texts if re.search("%[dmYy]", form) else sorted(texts)


def _filled(form: str, by: int) -> str:
    """Digits in the place of #: ###-##-####."""
    digits = iter((DIGITS[by:] + DIGITS) * len(form))
    return re.sub("#", lambda _: next(digits), form)


def _with_others(examples: list[str], parts: list[str], words: dict[str, Any]) -> list[str]:
    """A few examples with others of their kind: other dates, other digits, or the word list by name."""
    moments = [datetime.fromisoformat(text) for text in _listed(words, "date-time")]
    others = list(examples)
    for text in examples:
        if found := _ISO_MOMENT.search(text):
            size = len(found[0])
            others += [_ISO_MOMENT.sub(moment.isoformat()[:size], text, count=1) for moment in moments]
        elif re.search(r"\d", text) and not re.search(r"\s\w+\s", text):
            shifted = [re.sub(r"\d", lambda m, by=by: DIGITS[(int(m[0]) + by) % 10], text) for by in range(6)]
            others += [one for one in shifted if not re.search(r"\b0\d", one) or re.search(r"\b0\d", text)]
    if len(others) > len(examples) or parts[-1:] == ["id"]:  # ids have the form of the example
        return others
    named = _listed(words, " ".join(parts[-2:])) or _by_name(parts[-1:], "", "", words)
    return [*examples, *([text.lower() for text in named] if all(map(str.islower, examples)) else named)]


def _by_name(parts: list[str], description: str, about: str, words: dict[str, Any]) -> list[str]:
    """The list by the words of the name, or of the description; [] where there is none."""
    for start in range(len(parts) - 1):  # "email address" of `sender_email_address`
        if texts := _listed(words, " ".join(parts[start:])):
            return texts
    if re.search(r"\bairport code|\bIATA\b", description) and not re.search(r"\b(?:city|name)\b", description):
        return _listed(words, "airport")
    about = description or about
    last = parts[-1] if parts else ""
    if last in ("code", "number", "pin") and not (last == "code" and _PROGRAM.search(about)):
        return _listed(words, parts[-2] if len(parts) > 1 and last == "number" else "id") or _listed(words, "id")
    if last in ("name", "names"):  # a file's, a branch's, a customer's or a pod's
        is_person = _PERSON.search(" ".join([*parts, about] if len(parts) == 1 else parts))
        parts = [*(["name"] if is_person else []), *parts[:-1]]
    elif len(parts) > 1 and last in GENERIC_WORDS - {"id"}:  # a message's id is no message
        parts = [last, *parts[:-1]]
    is_file = re.search(r"\b(?:file|folder|director)", about, re.IGNORECASE)
    for part in reversed(parts):
        for key in (f"{part} file" if is_file else part, part, part.removesuffix("s")):
            if texts := _listed(words, key):
                return texts
    return _listed(words, found[1].lower()) if (found := _KIND.search(description)) else []
