"""Text of others is shown as text: on a terminal, in a log, on the page, in a chart and in a spreadsheet."""

import io
import json
import logging
import re
import subprocess
import sys

import pytest

from finetune.charts.tables import csv_text
from finetune.errors import UserError, one_line_errors
from finetune.flags.types import FlagParser
from finetune.logs import log, log_to_file, start_logging
from finetune.progress import counted, printable, protect_rich, say
from tests.exported import make_run
from tests.scripts import ROOT

ESCAPES = [
    "\x1b]0;title\x07",
    "\x1b]8;;http://evil.example\x1b\\link",
    "\x1b[2J\x1b[H",
    "\x9b31m",
    "a\rb",
    "a\x08b",
    "\x7f",
]
CONTROLS = set("\x1b\x07\x9b\r\x08\x7f\x9d\u202e")


@pytest.mark.parametrize("text", [*ESCAPES, "\x9d0;title\x9c", "a\u202eb"])
def test_printable_removes_escapes(text):
    assert not set(printable(text)) & CONTROLS
    assert printable("한국어 é\n\ttext") == "한국어 é\n\ttext"


@pytest.mark.parametrize("text", ESCAPES)
def test_messages_errors_and_logs(text, capsys, tmp_path):
    from rich.console import Console

    @one_line_errors
    def main():
        say(f"row {text}")
        raise UserError(f"tool {text}")

    assert main() == 2
    stream = io.StringIO()
    handlers, propagate, level = log.handlers[:], log.propagate, log.level
    try:
        start_logging(Console(file=stream))
        log.warning("name %s", text)
        log_to_file(tmp_path / "training.log")
    finally:
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)
        logging.raiseExceptions = True
    shown = capsys.readouterr().err + stream.getvalue() + (tmp_path / "training.log").read_bytes().decode()
    assert not set(shown) & CONTROLS and shown.count("name ") == 2


@pytest.mark.parametrize("text", ESCAPES)
def test_rich_tables(text):
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.table import Table

    protect_rich()
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False, width=200)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    console.print(table)
    console.print(text)
    console.print(Markdown(f"# {text}"))
    assert not set(stream.getvalue()) & CONTROLS


def test_rich_keeps_its_own_styles():
    from rich.console import Console

    protect_rich()
    stream = io.StringIO()
    Console(file=stream, force_terminal=True, color_system="standard").print("[red]warm[/red]")
    assert "\x1b[31mwarm" in stream.getvalue()


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1"])
def test_formula_cells_are_prefixed(text):
    assert csv_text(text) == "'" + printable(text)


@pytest.mark.parametrize("value", [-1.5, 3, None, "run=1", "", True])
def test_other_cells_are_unchanged(value):
    assert csv_text(value) == value


def test_text_is_printed_by_print_text_and_say():
    """Folders and files of others have names, too; doctor.py and settings.py print what is of this machine or ours."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("finetune/**/*.py")]
    printing = {file.name for file in files if re.search(r"^ *print\(", file.read_text(encoding="utf-8"), re.MULTILINE)}
    assert printing == {"progress.py", "errors.py", "types.py", "doctor.py", "settings.py"}


def test_tables_in_markdown_are_printable(tmp_path):
    from finetune.evaluation.report import comparison_markdown
    from finetune.runs.experiment import Experiment
    from finetune.runs.model_card import model_card

    experiment = Experiment.open(make_run(tmp_path, data=False))
    experiment.config["base_model"] = experiment.config["flags"]["dataset"][0] = "a" + "".join(ESCAPES)
    written = model_card(experiment) + comparison_markdown({"tuned": {"intervals_95": {}}}, {}, ESCAPES)
    assert not set(written) & CONTROLS


def test_flag_that_does_not_exist_is_printable(capsys):
    with pytest.raises(SystemExit):
        FlagParser("x").parse_args(["--\x1b[2J"])
    assert not set(capsys.readouterr().err) & CONTROLS


HOSTILE = [
    "<img src=http://evil.example/x.png>", "![x](http://evil.example/x.png)", "<script>alert(1)</script>",
    '<meta http-equiv="refresh" content="0;url=http://evil.example">', "[click](javascript:alert(1))",
    "<http://evil.example>", "[a]: http://evil.example\n![a]", "    indented <b>", "``` \n<iframe src=x>",
    "&lt;img&gt;", "# title", "a | b\n--|--\n<b> | 2", "~~~\n![x](http://evil.example/y)\n~~~", "$$\\href{http://evil.example}{x}$$",
    "- a\n\n      ![x](//evil.example/x)", "\\![x](http://evil.example/z)", "http://evil.example/a?b=c", "1. a\n2) b",
    "see www.evil.example/x, a@evil.example",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_page_shows_markup_as_text(text):
    """A Markdown renderer that allows HTML makes only paragraphs of it."""
    import html

    from finetune.chat.web import as_text

    markdown = pytest.importorskip("markdown_it")
    rendered = markdown.MarkdownIt("gfm-like", {"html": True, "linkify": False, "breaks": True}).render(as_text(text))
    assert set(re.findall(r"<(\w+)", rendered)) <= {"p", "br"}
    assert not re.search(r"https?:|www\.|@", as_text(text))  # what the page's own renderer makes links of
    plain = html.unescape(re.sub(r"<[^>]*>", "", rendered)).replace("\u00a0", " ")
    assert plain.split() == text.split()


def test_page_escapes_calls_problems_and_names():
    from finetune.chat.reply import Reply
    from finetune.chat.session import ChatSession
    from finetune.chat.web import chat_messages

    evil = "<img src=x>![y](http://evil.example/z)"
    session = ChatSession()
    session.turns = [
        {"role": "user", "content": evil}, {"role": "assistant", "content": evil},
        {"role": "tool", "name": evil, "content": evil},
    ]  # fmt: skip
    call = {"name": evil, "arguments": {evil: evil}}
    session.replies = {1: Reply(evil, content=evil, reasoning_content=evil, tool_calls=[call], problems=[[evil]])}
    shown = chat_messages(session)
    assert len(shown) == 5
    for message in shown:
        outside = message["content"].split("```")[::2]  # the code blocks, which the page shows as they are
        assert not any("<img" in text or "![y]" in text for text in outside)
        assert "<img" not in json.dumps(message.get("metadata", {}))


def test_chart_page_escapes_names(tmp_path):
    from finetune.charts.curves import read_run
    from finetune.charts.curves_page import write_page
    from finetune.charts.run_labels import compare_runs

    run = tmp_path / "run"
    run.mkdir()
    (run / "training_log.csv").write_text("step,loss,eval_loss\n1,2.5,\n2,1.25,1.5\n")
    evil = "</script><img src=x onerror=alert(1)>"
    comparison = compare_runs([read_run(run / "training_log.csv")])
    row = {"run": evil, "status": evil, "notes": evil}
    write_page(comparison, [row], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<img" not in page and "\\u003cimg" in page
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page


def test_rich_is_protected_when_it_is_imported():
    """Not earlier, because that takes too long for --help."""
    code = (
        "import sys\nfrom finetune.progress import protect_rich\nprotect_rich()\nprotect_rich()\n"
        "assert 'rich' not in sys.modules\nfrom rich.console import Console\nConsole().print('a\\x1b[2Jb')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout.decode().strip() == "a\ufffd[2Jb"


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0 rows"), (1, "1 row"), (2000, "2,000 rows"), ("1", "1 row"), ("0.2", "0.2 rows")]
)
def test_counted(number, shown):
    assert counted(number, "row") == shown
