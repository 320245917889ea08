"""Texts for a property of a schema: examples from its description, dates in the form it asks for, or a word list.

`words` in these functions is the `values` entry of a file in finetune/synthetic/phrasings: lists of texts by format and
by word in a property's name. A list may be the name of another one.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import datetime
from typing import Any

# "e.g. Seoul, Paris" and "Options are: a, b" in a description, up to the end of the sentence
_EXAMPLES = re.compile(
    r"(?:e\.g\.,?|for example:?|for instance:?|such as|examples?:|examples of [\w ]{1,40} are:?|"
    r"\b(?:options|values|choices)(?: are)?:|\[enum\]:|\bone of(?: the following)?:?|예:|예를 들어)\s+"
    r"((?:[^.;)\n]|\.(?!\s|$|\)))+)",
    re.IGNORECASE,
)
_NO_EXAMPLE = re.compile(r"(?:an?|the|any|or|and|your|etc)\b|.*[{}<>]", re.IGNORECASE)  # "such as an email address"
# "'local' for local branches, 'remote' for remote ones" in a description
_QUOTED = re.compile(r"""(?<!\w)(['"`])([\w.:/-]{1,20})\1(?!\w)""")
_DATE_PART = "(?:YYYY|YY|MM|DD)"
# "DD/MM/YYYY", "YYYY-MM-DDTHH:MM:SSZ", "HH:MM"
_DATE_FORM = re.compile(
    rf"\b(?:{_DATE_PART}(?:[-/.]{_DATE_PART}){{1,2}}(?:[T ]HH:MM(?::SS)?Z?)?|HH:MM(?::SS)?Z?)(?!\w)"
)
_DIRECTIVES = {":MM": ":%M", "YYYY": "%Y", "YY": "%y", "MM": "%m", "DD": "%d", "HH": "%H", "SS": "%S"}
_ISO_DATE = re.compile(r"\b(?:ISO[ -]?8601|RFC ?3339)\b", re.IGNORECASE)
GENERIC_WORDS = {"name", "id", "path", "value", "number", "type", "data", "input", "text"}  # in names of parameters
# A `name` is a person's where its description, or the tool's, is about one of these.
_PERSON = re.compile(
    r"\b(?:person|people|user|customer|client|contact|guest|patient|employee|recipient|sender|member|author|student|"
    r"teacher|doctor|passenger|candidate|applicant|attendee|participant|driver|manager|colleague|friend|someone|staff|"
    r"(?:first|last|full|given|family)[ _]name)s?\b"
    r"|사람|고객|사용자|회원|직원|연락처|학생|환자|손님|담당자|수신자|성함",
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
    """Texts for the property `name`.

    about     what the tool does
    reserved  texts of the tool's schema that are no examples: names of properties, values of enums
    """
    kind, description = str(schema.get("format")), str(schema.get("description") or "")
    for key in (f"format {kind}", kind, kind.rstrip("1345")):  # pydantic's `uuid4` and others
        if texts := _listed(words, key):
            return texts
    if match := _EXAMPLES.search(description):
        parts = [part.strip(" '\"`") for part in re.split(r",\s*(?:or|and)?\s*|\s+or\s+|\s+and\s+", match[1])]
        parts = [part for part in parts if 0 < len(part) <= 40 and not _NO_EXAMPLE.match(part)]
        if examples := [part for part in parts if part not in reserved]:
            return examples
    quoted = dict.fromkeys(text for _, text in _QUOTED.findall(description) if text not in reserved)
    if len(quoted) > 1:
        return list(quoted)
    if form := _DATE_FORM.search(description.upper()):
        return _moments(form[0], words)
    if _ISO_DATE.search(description):
        return _listed(words, "date" if humanised(name).lower().endswith("date") else "date-time")
    return _by_name(humanised(name).lower().split(), description or about, words)


def _listed(words: dict[str, Any], key: str) -> list[str]:
    found = words.get(key, [])
    return _listed(words, found) if isinstance(found, str) else found


def _moments(form: str, words: dict[str, Any]) -> list[str]:
    """Dates and times as a description writes them, such as DD/MM/YYYY."""
    for part, directive in _DIRECTIVES.items():
        form = form.replace(part, directive)
    return [datetime.fromisoformat(text).strftime(form) for text in _listed(words, "date-time")]


def _by_name(parts: list[str], about: str, words: dict[str, Any]) -> list[str]:
    for start in range(len(parts) - 1):  # "email address" of `sender_email_address`
        if texts := _listed(words, " ".join(parts[start:])):
            return texts
    if parts and parts[-1] in ("name", "names"):  # a file's, a branch's, a customer's or a pod's
        is_person = _PERSON.search(" ".join([*parts, about] if len(parts) == 1 else parts))
        parts = [*(["name"] if is_person else []), *parts[:-1]]
    elif len(parts) > 1 and parts[-1] in GENERIC_WORDS - {"id"}:  # a message's id is no message
        parts = [parts[-1], *parts[:-1]]
    is_file = re.search(r"\b(?:file|folder|director)", about, re.IGNORECASE)
    for part in reversed(parts):
        for key in (f"{part} file" if is_file else part, part, part.removesuffix("s")):
            if texts := _listed(words, key):
                return texts
    return _listed(words, "word")
