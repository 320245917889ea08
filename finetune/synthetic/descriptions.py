"""What the description of a schema's property tells about its values: choices, examples, ranges, forms of dates."""

from __future__ import annotations

import re
from collections.abc import Collection

_TOLD = r"((?:\([^()]*\)|[^.;()\n]|\.(?!\s|$|\)))+)"  # up to the end of the sentence or of the bracket
_CHOICES = re.compile(
    r"(?:\b(?:options|values|choices)(?: are| include)?:|\b(?:values|options|choices) (?:are|include)\b|\[enum\]:|"
    rf"\bone of(?: the following)?:?)\s*{_TOLD}",
    re.IGNORECASE,
)
_EXAMPLES = re.compile(
    r"(?:\be\.?g\.?[:,]?|\bfor (?:example|instance)[:,]?|\bsuch as|\bexamples?:|\bex[.:]|"
    rf"\bexamples of [\w ]{{1,40}} are:?|\bin the (?:format|form)(?= ['\"`])|예시?[:)]|예를 들어,?)\s+{_TOLD}",
    re.IGNORECASE,
)
# A line of a list: "- 'add' - add a sub-issue", "1. get: reads an issue"
_BULLET = re.compile(r"""^\s*(?:[-*•]|\d+[.)])\s*['"`]?([\w./-]{1,30})['"`]?(?=\s*(?:[-–—:(]|$))""", re.MULTILINE)
_QUOTED = re.compile(r"""(?<!\w)(['"`])([^'"`]{1,40})\1(?!\w)""")
# Between two quoted choices: ", ", " or ", " for local branches, "
_BETWEEN = re.compile(r"(?: for [\w -]+)?(?:\s?\([^)]*\))?(?:\s?[=:-] ?[\w ]+)?[\s,/|;.]*(?:or|and|또는)?\s*")
_SEPARATOR = re.compile(r",\s*(?:(?:or|and)\s+)?|\s+(?:or|and|또는)\s+|\s*\|\s*")
_ALTERNATIVE = re.compile(r"\s+(?:or|또는)\s+|\s*\|\s*")
_TAIL = re.compile(r"\s+(?:for\s|등|중 하나).*")  # "AAPL for Apple", "한식, 중식 등"
# "such as an email address", "or leave empty", "refs/pull/{number}/head"
_NO_VALUE = re.compile(
    r"(?:an?|the|any|your|all)\s|(?:or|and|etc|defaults?|if|when|leave|optional|required|inclusive|like)\b|.*[{}<>]",
    re.IGNORECASE,
)
_KIND_OF_VALUE = re.compile(r"(?:an?|the|any|your)\s", re.IGNORECASE)  # "for example the user's name or order number"
_CHOICE = re.compile(r"(?!\d+$)[\w+.-]{1,30}(?: [\w-]{1,20})?")
_NUMBER = r"(-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)"
_PLAIN = r"-?\d+(?:\.\d+)?"
_ASIDE = r"(?:x|%|°[CF]?)?(?:\s?\([^()]*\))?"  # "0 (free) to 4 (full)", "1x to 8x"
_NO_LENGTH = r"(?![\d/:-]|\.\d)(?!\s*-?(?:digit|char|letter|word|자리|글자))"
_RANGES = [
    re.compile(rf"\bbetween [$€£]?{_NUMBER}{_ASIDE} and [$€£]?{_NUMBER}{_NO_LENGTH}", re.IGNORECASE),
    re.compile(
        rf"(?<![\w.,/:-])[$€£]?{_NUMBER}{_ASIDE}(?: to |\s?[-–~]\s?|\.\.\.?|부터 ?|에서 ?)[$€£]?{_NUMBER}{_NO_LENGTH}",
        re.IGNORECASE,
    ),
    re.compile(rf"[\[(]{_NUMBER}, ?{_NUMBER}[\])]"),
]
_DIGITS = re.compile(r"\b(\d{1,2})(?:\s?[-–]\s?\d+)?[ -]digits?\b", re.IGNORECASE)  # "6-digit code", "8-12 digits"
_LOWEST = re.compile(rf"(?:\b(?:min(?:imum)?|at least)(?: of|:| is)?|최소) ?{_NUMBER}{_NO_LENGTH}", re.IGNORECASE)
_HIGHEST = re.compile(rf"(?:\b(?:max(?:imum)?|at most|up to)(?: of|:| is)?|최대) ?{_NUMBER}{_NO_LENGTH}", re.IGNORECASE)
# "12, 24 or 36", "(100, 200, 400)"; begins at the first number only, or long lists would take quadratic time
_NUMBERS = re.compile(
    rf"(?<![\w.,/:-])(?<!, )(?:(?:{_PLAIN}, ?)*{_PLAIN},?\s+(?:or|또는)\s+{_PLAIN}"
    rf"|(?<=\()(?:{_PLAIN}, ?){{2,}}{_PLAIN}(?=\))){_NO_LENGTH}"
)
_DATE_PART = "(?:YYYY|YY|MONTH|MMM|MM|M|DD|D)"
_CLOCK = r"HH:MM(?::SS(?:\.SSS)?)?(?:Z|[+-](?:HH:MM|\d\d:\d\d))?(?: ?AM\b)?"
# "DD/MM/YYYY", "YYYY-MM-DDTHH:MM:SSZ", "DD Month YYYY", "HH:MM AM/PM"
_DATE_FORM = re.compile(
    rf"\b(?:(?:YYYYMMDD|{_DATE_PART}(?:(?:[-/.]|,? |년 ?|월 ?){_DATE_PART}){{1,2}})일?(?:[T ]{_CLOCK})?|{_CLOCK})(?!\w)"
)
_DIRECTIVES = {
    "[+-]HH:MM": "+00:00", "AM": "%p", "HH": "%H", ":MM": ":%M", "SS(?!S)": "%S", "SSS": "000",
    "YYYY": "%Y", "YY": "%y", "MONTH": "%B", "MMM": "%b", "MM?": "%m", "DD?": "%d",
}  # fmt: skip
_PIECE = re.compile("|".join(f"({piece})" for piece in _DIRECTIVES))


def told_texts(description: str, reserved: Collection[str]) -> tuple[list[str], bool]:
    """(texts, whether there are no others): choices, or examples.

    reserved  texts that are neither: names of properties and values of enums of the same tool
    """
    bullets = [text for text in _BULLET.findall(description) if text not in reserved]
    if len(bullets) > 1:
        return bullets, True
    if match := _CHOICES.search(description):
        texts = _listed(match[1], reserved)
        if len(texts) == 1 and re.fullmatch(r"[\w-]+(?:/[\w-]+)+", texts[0]):
            texts = texts[0].split("/")
        if len(texts) > 1:
            return texts, True
    if match := _EXAMPLES.search(description):
        text = match[1].strip()
        is_place = re.fullmatch(r"[A-Z][\w .]+, [A-Z]{2}", text)  # "San Francisco, CA"
        texts = [text] if is_place else [] if _KIND_OF_VALUE.match(text) else _listed(text, reserved)
        if texts:
            return texts, False
    return _quoted_choices(description, reserved), True


def _listed(text: str, reserved: Collection[str]) -> list[str]:
    if quoted := [found for _, found in _QUOTED.findall(text)]:
        return [one for one in quoted if one not in reserved and not re.search("[{}<>]", one)]
    text = re.sub(r"\s*\([^()]*\)", "", text).strip(" []")
    separator = _SEPARATOR if "," in text else _ALTERNATIVE  # one example: "Rock and Roll"
    parts = [_TAIL.sub("", part).strip(" '\"`") for part in separator.split(text)]
    parts = [part for part in parts if 0 < len(part) <= 40 and len(part.split()) <= 4 and not _NO_VALUE.match(part)]
    return [part for part in parts if part not in reserved]


def _quoted_choices(description: str, reserved: Collection[str]) -> list[str]:
    """The longest list of quoted texts: 'local' for local branches, 'remote' for remote ones."""
    lists: list[list[str]] = [[]]
    end = 0
    for found in _QUOTED.finditer(description):
        if lists[-1] and not _BETWEEN.fullmatch(description, end, found.start()):
            lists.append([])
        lists[-1].append(found[2])
        end = found.end()
    longest = [text for text in dict.fromkeys(max(lists, key=len)) if text not in reserved]
    return longest if len(longest) > 1 else []


def bare_choices(description: str) -> list[str]:
    """Choices without a word for them: `high, medium or low`, `Travel mode (driving, walking, transit)`."""
    sentence = re.split(r"[.!?](?:\s|$)|\n", description)[0]
    for text in [*re.findall(r"\(([^()]*)\)", description), re.split(r": | - |\beither |\(", sentence)[-1]]:
        text = _TAIL.sub("", text.strip(" .:"))
        parts = [part for part in re.split(rf"{_SEPARATOR.pattern}|\s*/\s*", text) if not _NO_VALUE.match(part)]
        are_joined = len(parts) > 2 or re.search(r"\bor\b|또는|[|/]", text)
        if 2 <= len(parts) <= 8 and are_joined and all(_CHOICE.fullmatch(part) for part in parts):
            return parts
    return []


def told_numbers(description: str) -> list[float]:
    """The only numbers that are allowed: `12, 24 or 36`."""
    found = _NUMBERS.search(description)
    return [_number(text) for text in re.findall(_PLAIN, found[0])] if found else []


def told_range(description: str) -> tuple[float | None, float | None]:
    """(lowest, highest) number: `from 1 to 5`, `(0-100)`, `at most 8`; around the example of `e.g. 1999`."""
    if found := _DIGITS.search(description):
        return 10 ** (int(found[1]) - 1), 10 ** int(found[1]) - 1
    for pattern in _RANGES:
        if found := pattern.search(description):
            low, high = map(_number, found.groups())
            if low <= high:
                return low, high
    low, high = (_number(found[1]) if (found := end.search(description)) else None for end in (_LOWEST, _HIGHEST))
    examples = _EXAMPLES.search(description)
    if low is high is None and examples and (found := re.match(rf"{_PLAIN}(?=[\s,]|$)", examples[1])):
        example = _number(found[0])
        spread = max(abs(example) // 100, 2)
        return example - spread, example + spread
    return low, high


def _number(text: str) -> float:
    value = float(text.replace(",", ""))
    return int(value) if value == int(value) else value


def digits_form(description: str) -> str | None:
    """The digits that a description asks for, each as #: `6-digit code`, `(###-##-####)`, also with X."""
    if found := _DIGITS.search(description):
        return "#" * int(found[1])
    found = re.search(r"(?<!\w)[X#]+(?:[-. ][X#]+)+(?!\w)", description)
    return found[0].replace("X", "#") if found else None


def date_form(description: str) -> str | None:
    """The form of dates or times that a description writes down, for strftime."""
    if not (found := _DATE_FORM.search(description.upper())):
        return None
    directives = list(_DIRECTIVES.values())
    form = _PIECE.sub(lambda piece: directives[(piece.lastindex or 1) - 1], found[0])
    return form.replace("%H", "%I") if "%p" in form else form
