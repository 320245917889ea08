"""Rows with their trained tokens in colour, in the terminal or as one HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from finetune.files import write_text_atomic
from formats import IGNORE_INDEX


def trained_spans(labels: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    """(start, end, whether trained) of each longest span of tokens that are all trained or all not."""
    end = 0
    for trained, group in groupby(label != IGNORE_INDEX for label in labels):
        start, end = end, end + sum(1 for _ in group)
        yield start, end, trained


@dataclass(frozen=True)
class Span:
    """A span of tokens, from `start` to before `end`, and its text."""

    text: str
    start: int
    end: int
    trained: bool


def decoded_spans(input_ids: Sequence[int], labels: Sequence[int], tokenizer) -> list[Span]:
    """The spans of a sequence; their texts joined are the decoded sequence.

    The text is what decoding up to the span's end adds, because some tokenizers join or strip text at borders.
    """
    result: list[Span] = []
    before = ""
    for start, end, trained in trained_spans(labels):
        decoded = tokenizer.decode(list(input_ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text = decoded[len(before) :] if decoded.startswith(before) else tokenizer.decode(list(input_ids[start:end]))
        result.append(Span(_visible(text), start, end, trained))
        before = decoded
    return result


def print_sequence(console, input_ids: Sequence[int], labels: Sequence[int], tokenizer, title: str) -> None:
    """Print one sequence to a rich console: trained tokens bold on green, or in ⟦brackets⟧ without colour."""
    from rich.text import Text

    console.rule(Text(f"{title}: {_token_counts(labels)}", style="bold"), align="left")
    text = Text()
    for span in decoded_spans(input_ids, labels, tokenizer):
        shown = span.text if console.color_system or not span.trained else f"⟦{span.text}⟧"
        text.append(shown, style="bold black on green" if span.trained else "dim")
    console.print(text, highlight=False)


def _token_counts(labels: Sequence[int]) -> str:
    return f"{len(labels)} tokens, {sum(label != IGNORE_INDEX for label in labels)} trained"


def _visible(text: str) -> str:
    """The text with control characters, which a terminal would obey, and zero-width spaces made visible."""
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
        "<p class='note'>Trained tokens are <mark>marked</mark>; hover over a span for its tokens.</p>",
    ]
    for entry in entries:
        parts.append(f"<h2>{html.escape(entry['title'])}</h2>")
        if entry["reason"]:
            parts.append(f"<p class='note'>{html.escape(entry['reason'])}</p>")
        for ids, labels, roles in entry["sequences"]:
            spans = []
            for span in decoded_spans(ids, labels, tokenizer):
                first, last = tokenizer.convert_ids_to_tokens([ids[span.start], ids[span.end - 1]])
                names = ", ".join(dict.fromkeys(roles[span.start : span.end]))
                hint = f"{span.end - span.start} tokens, {first!r} … {last!r}, {names}"
                tag = "mark" if span.trained else "span"
                spans.append(f"<{tag} title='{html.escape(hint)}'>{html.escape(span.text)}</{tag}>")
            parts.append(f"<p class='note'>{_token_counts(labels)}</p><pre>{''.join(spans)}</pre>")
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
    write_text_atomic(path, html_page(entries, tokenizer, heading))
