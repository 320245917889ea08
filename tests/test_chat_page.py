"""The chat page without a model: verdicts, the gallery, stopping, saving."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.chat.examples import examples_of
from finetune.chat.reply import Reply
from finetune.chat.session import ChatAgent
from finetune.chat.verdicts import better, verdict_html, verdict_of
from finetune.errors import UserError
from tests.rows import LAMP

CALL = {"name": "set_lamp", "arguments": {"room": "hall"}}


def reply(text="", *, calls=(), problems=(), errors=(), **more) -> Reply:
    found = list(problems) or [[] for _ in calls]
    return Reply(text, content=text, tool_calls=list(calls), problems=found, parse_errors=list(errors), **more)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (reply(calls=[CALL]), "valid call"),
        (reply(calls=[CALL], problems=[["room is not declared"]]), "call against the schema"),
        (reply("<tool_call>{", errors=["not valid JSON"]), "broken call"),
        (reply("Hello."), "no call"),
        (reply("Hello", finish_reason="length"), "cut off"),
    ],
)
def test_kinds_of_answers(answer, kind):
    answer.seconds, answer.new_tokens = 1.25, 1024
    verdict = verdict_of(answer)
    assert (verdict.kind, verdict.numbers, verdict.expected) == (kind, "1.2 s · 1,024 tokens", None)
    assert kind in verdict_html(verdict)


def test_expected_calls_decide_what_is_better():
    valid, none = verdict_of(reply(calls=[CALL])), verdict_of(reply("Hi"))
    broken = verdict_of(reply("{", errors=["broken"]))
    assert better({"base": broken, "tuned": valid}) == "tuned"
    assert better({"base": none, "tuned": valid}) is None  # the request may have needed no call
    assert better({"tuned": valid}) is None and better({"base": valid, "tuned": valid}) is None
    wanted = [CALL]
    with_call = verdict_of(reply(calls=[CALL]), wanted)
    assert with_call.expected and better({"base": verdict_of(reply("Hi"), wanted), "tuned": with_call}) == "tuned"
    assert better({"base": verdict_of(reply("Hi"), []), "tuned": verdict_of(reply(calls=[CALL]), [])}) == "base"


def test_verdicts_show_text_as_text():
    shown = verdict_html(verdict_of(reply("{", errors=["<script>alert(1)</script>"])))
    assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_gallery_has_requests_for_every_tool(tmp_path):
    def row(text, tool):
        function = {"name": tool, "arguments": {"room": "hall"}}
        call = {"id": "1", "type": "function", "function": function}
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": [call]}],
                "tools": [LAMP, {**LAMP, "name": "set_fan"}]}  # fmt: skip

    rows = [row(f"lamp {n}", "set_lamp") for n in range(20)] + [row("fan", "set_fan")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = {"flags": {"dataset": [str(tmp_path / "rows.jsonl")], "eval_dataset": None}, "status": "finished"}
    (tmp_path / "run" / "final_model").mkdir(parents=True)
    (tmp_path / "run" / "experiment_config.json").write_text(json.dumps(config), encoding="utf-8")
    found = examples_of(tmp_path / "run")
    assert [one.text for one in found[:3]] == ["lamp 0", "fan", "lamp 1"] and len(found) == 8
    assert found[1].calls[0]["name"] == "set_fan" and found == examples_of(tmp_path / "run" / "final_model")
    (tmp_path / "rows.jsonl").unlink()
    assert examples_of(tmp_path / "run") == [] == examples_of("org/model")


class FakeModel:
    sides, name, fmt = ("tuned", "base"), "m", SimpleNamespace(name="chatml")

    def __init__(self):
        self.asked: list[str] = []

    def stream(self, messages, tools, decoding, side):
        self.asked.append(side)
        if messages[-1]["content"] == "too long":
            raise UserError("the conversation has 9 tokens")
        yield "Hel"
        yield "lo"
        yield reply("Hello", new_tokens=2)


def test_page_has_no_formulas(monkeypatch, tmp_path):
    """With `$$` around it, the text of a code block would be Markdown again, images and HTML included."""
    gradio = pytest.importorskip("gradio")
    from finetune.chat.web import build_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = build_page(ChatAgent(FakeModel(), SimpleNamespace(temperature=0.0, max_new_tokens=9)))
    chats = [block for block in page.blocks.values() if isinstance(block, gradio.Chatbot)]
    assert len(chats) == 2 and not any(chat.latex_delimiters for chat in chats)


@pytest.fixture
def handlers(monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    from finetune.chat.web import _Handlers

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    decoding = SimpleNamespace(temperature=0.0, max_new_tokens=9)
    monkeypatch.setattr("finetune.chat.web.replace", lambda one, **new: SimpleNamespace(**{**vars(one), **new})
                        if one is decoding else replaced(one, **new))  # fmt: skip
    return _Handlers(ChatAgent(FakeModel(), decoding), ["base", "tuned"])


def replaced(agent, **new):
    return ChatAgent(**{**vars(agent), **new})


SETTINGS = ("", "", 0.0, 9)


def test_tuned_answers_first_and_both_are_judged(handlers):
    shown = list(handlers.ask("Hi", None, *SETTINGS))
    assert handlers.agent.model.asked == ["tuned", "base"]
    assert "waits for the other side" in shown[0][4]
    box, visit, base, tuned, *verdicts, save = shown[-1]
    assert box == "" and [turn["content"] for turn in base] == ["Hi", "Hello"] == [turn["content"] for turn in tuned]
    assert all("no call" in verdict and "2 tokens" in verdict for verdict in verdicts)
    row = json.loads(Path(save.value if isinstance(save.value, str) else save.value["path"]).read_text("utf-8"))
    assert row["messages"] == visit.sessions["tuned"].messages  # the state after this answer


def test_stop_drops_the_answer_and_returns_the_message(handlers):
    running = handlers.ask("Hi", None, *SETTINGS)
    visit = next(running)[1]
    handlers.stop(visit)
    box, visit, base, tuned, *_ = list(running)[-1]
    assert box == "Hi" and base == [] == tuned and visit.waiting == {}
    assert list(handlers.ask("Hi", visit, *SETTINGS))[-1][3] != []  # the next message is answered


def test_problems_are_lines_and_nothing_is_lost(handlers):
    visit = list(handlers.ask("Hi", None, *SETTINGS))[-1][1]
    for text, settings, problem in (
        ("too long", SETTINGS, "9 tokens"), ("x", ("{", *SETTINGS[1:]), "not valid JSON"),
        (" ", SETTINGS, "write a message first"),
    ):  # fmt: skip
        box, visit, base, tuned, _, verdict, _ = list(handlers.ask(text, visit, *settings))[-1]
        assert box == text and problem in verdict and "not answered" in verdict
        assert len(base) == len(tuned) == 2


def test_emptying_resets_every_output(handlers):
    state, base, tuned, *lines, save = handlers.empty()
    assert state is None and base == [] == tuned and len(lines) == 2 and not save.interactive
