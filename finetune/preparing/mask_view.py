"""Rows with their trained tokens in colour, in the terminal or as one HTML page, so that a mask can be seen."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats import IGNORE_INDEX


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are all trained or all not: their text, number, role names and first and last id."""

    text: str
    tokens: int
    trained: bool
    roles: tuple[str, ...]
    ids: tuple[int, ...]


def runs(input_ids: Sequence[int], labels: Sequence[int], tokenizer, roles: Sequence[str] | None = None) -> list[Run]:
    """Cut a sequence where training begins and ends. Texts joined give the decoded sequence.

    A run's text is what decoding up to its end adds, so that tokenizers which join or strip at borders stay exact.
    """
    result: list[Run] = []
    start, before = 0, ""
    for end in range(1, len(input_ids) + 1):
        if end < len(input_ids) and (labels[end] == IGNORE_INDEX) == (labels[start] == IGNORE_INDEX):
            continue
        upto = tokenizer.decode(list(input_ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = upto[len(before) :] if upto.startswith(before) else tokenizer.decode(list(input_ids[start:end]))
        names = tuple(dict.fromkeys(roles[start:end])) if roles else ()
        result.append(Run(text, end - start, labels[start] != IGNORE_INDEX, names, tuple(input_ids[start:end])))
        start, before = end, upto
    return result


def print_sequence(console, input_ids, labels, tokenizer, title: str) -> None:
    """Print one sequence to a rich console: trained tokens bold on green, the rest dim."""
    from rich.text import Text

    trained = sum(label != IGNORE_INDEX for label in labels)
    console.rule(Text(f"{title}: {len(input_ids)} tokens, {trained} trained", style="bold"), align="left")
    text = Text()
    for run in runs(input_ids, labels, tokenizer):
        text.append(_visible(run.text), style="bold black on green" if run.trained else "dim")
    # Without colour (a pipe, a log) the brackets of `marked` carry the mask.
    console.print(text if console.color_system else marked(input_ids, labels, tokenizer), highlight=False, markup=False)


def marked(input_ids, labels, tokenizer) -> str:
    """The sequence as plain text with ⟦trained tokens⟧ in brackets."""
    found = [(_visible(run.text), run.trained) for run in runs(input_ids, labels, tokenizer)]
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in found)


def _visible(text: str) -> str:
    """Control characters that would act on a terminal are shown, and so is a zero-width space (escaped tokens)."""
    shown = {0x200B: "\u2423ZWSP\u2423"} | {code: f"\\x{code:02x}" for code in (*range(9), 11, 12, *range(14, 32), 127)}
    return text.translate(shown)


_STYLE = """body{font:14px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1a1a1a}
pre{white-space:pre-wrap;word-break:break-word;background:#f6f6f4;padding:1rem;border-radius:6px;color:#666}
mark{background:#bfe8c9;color:#0b3d17;border-bottom:2px solid #1b7f37}
h2{font-size:1rem;margin:2rem 0 .3rem}.note{color:#555}
@media (prefers-color-scheme:dark){body{background:#161616;color:#ddd}pre{background:#222;color:#999}
mark{background:#14532d;color:#d1fadf}}"""


def html_page(entries: Iterable[dict[str, Any]], tokenizer, heading: str) -> str:
    """One self-contained page. entries: {"title", "sequences": [(input_ids, labels, roles)], "reason": str | None}."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><meta name='viewport' content='width=device-width'>",
        f"<title>{html.escape(heading)}</title><style>{_STYLE}</style><h1>{html.escape(heading)}</h1>",
        "<p class='note'>Trained tokens are <mark>marked</mark>; hover over a piece for its tokens.</p>",
    ]
    for entry in entries:
        parts.append(f"<h2>{html.escape(entry['title'])}</h2>")
        if entry.get("reason"):
            parts.append(f"<p class='note'>{html.escape(entry['reason'])}</p>")
        for ids, labels, roles in entry["sequences"]:
            pieces = []
            for run in runs(ids, labels, tokenizer, roles):
                first, last = (tokenizer.convert_ids_to_tokens(token) for token in (run.ids[0], run.ids[-1]))
                hint = f"{run.tokens} tokens, {first!r} … {last!r}, {', '.join(run.roles)}"
                tag = "mark" if run.trained else "span"
                pieces.append(f"<{tag} title='{html.escape(hint)}'>{html.escape(_visible(run.text))}</{tag}>")
            trained = sum(label != IGNORE_INDEX for label in labels)
            parts.append(f"<p class='note'>{len(ids)} tokens, {trained} trained</p><pre>{''.join(pieces)}</pre>")
    return "\n".join(parts) + "\n</html>\n"


def show_terminal(entries: Iterable[dict[str, Any]], tokenizer) -> None:
    """Print entries (as for `html_page`) to stdout."""
    from rich.console import Console

    console = Console()
    for entry in entries:
        if entry["reason"]:
            console.print(f"{entry['title']}: {entry['reason']}", highlight=False, markup=False)
        for ids, labels, _ in entry["sequences"]:
            print_sequence(console, ids, labels, tokenizer, entry["title"])


def show_html(entries: Iterable[dict[str, Any]], tokenizer, heading: str, path: str | Path) -> None:
    """Write the page of `html_page`."""
    from finetune.files import write_text_atomic

    write_text_atomic(path, html_page(entries, tokenizer, heading))
