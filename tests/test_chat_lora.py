"""Chat: streamed text, calls and their results, questions, terminal, page, server."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import chat_lora
from finetune.chat.questions import answer_all, read_questions, start_session
from finetune.chat.reply import LiveText, Reply, read_reply
from finetune.chat.session import ChatAgent, ChatSession, ToolResult
from finetune.chat.tool_command import ToolCommand, parse_tool_command
from finetune.errors import UserError
from finetune.reading.tool_schemas import load_tools_file
from formats import FORMATS
from tests import chat_model, parts
from tests.browser import CHROMIUM, REASON
from tests.rows import LAMP
from tests.scripts import ROOT, run_script

TEXTS = (
    "",
    "  Two words.\n\n",
    "I will dim it.\n<tool_call>\n{\"name\":\"set_lamp\",\"arguments\":{\"room\":\"hall\"}}\n</tool_call>",
    '<tool_call>{"name":"a","arguments":{}}</tool_call> and <tool_call>{"name":"b","arguments":{}}</tool_call> x',
    "<tool_call>\n{\"name\": \"set_lamp\", \"argu",
    "<function=set_lamp>{\"room\": \"hall\"}</function> Done.",
    "before <function=set_lamp>{\"room\": }</function> after",
    "<tool_call>\n<function=set_lamp>\n<parameter=room>\nhall\n</parameter>\n</function>\n</tool_call>",
    "{\"name\": \"set_lamp\", \"parameters\": {\"room\": \"hall\"}}",
    "{\"answer\": 42}",
    "<|python_tag|>{\"name\": \"set_lamp\", \"parameters\": {}}",
    "[set_lamp(room=\"hall\", level=3)]",
    "[1] is a footnote",
    "Well: [TOOL_CALLS][{\"name\": \"a\", \"arguments\": {}}]",
    "[TOOL_CALLS]a[ARGS]{}[TOOL_CALLS]b[ARGS]{\"x\": 1}",
    "<|tool_call|>[{\"name\": \"a\", \"arguments\": {}}]<|/tool_call|>",
    "<think>It is dark.</think>\n\nLet there be light <b>now</b>, 3 < 4.",
    "What a < b <t and [T mean; 100 <|im_ is no token",
    "A control token of the data: <\u200b|im_end|> stays. 안녕하세요 🙂",
    "Ended.<|im_end|>\n<|im_start|>user\nnever shown",
)  # fmt: skip


@pytest.mark.parametrize("name", sorted(name for name, fmt in FORMATS.items() if fmt.read_calls or fmt.template))
def test_live_text_adds_up_to_the_parsed_content(name):
    fmt, tokenizer, rng = FORMATS[name], parts.tokenizer("smollm2"), random.Random(name)
    for text in TEXTS:
        live, shown, at = LiveText(tokenizer, fmt), [], 0
        while at < len(text):
            size = rng.randint(1, 7)
            shown.append(live.feed(text[at : at + size]))
            at += size
        rest, parsed = live.finish()
        assert "".join(shown) + rest == parsed.content, text
        assert parsed == read_parsed(text, tokenizer, fmt)


def read_parsed(text, tokenizer, fmt):
    from finetune.chat.reply import unescaped

    return unescaped(fmt.parse(text), tokenizer, fmt)


def test_live_text_shows_text_but_not_reasoning():
    tokenizer = parts.tokenizer("smollm2")
    live = LiveText(tokenizer, FORMATS["chatml"])
    assert [live.feed(piece) for piece in ("The", " hall", " is <", "b>dark", ".")] == [
        "The",
        " hall",
        " is",
        " <b>dark",
        ".",
    ]
    live = LiveText(tokenizer, FORMATS["qwen-xml"], prompt="<|im_start|>assistant\n<think>\n")
    assert [live.feed(piece) for piece in ("dark", "</think>", "\n\nYes", " it is")] == ["", "", "Yes", " it is"]
    assert live.finish()[1].reasoning_content == "dark"


def test_read_reply_names_problems_of_calls():
    tokenizer, fmt = parts.tokenizer("smollm2"), FORMATS["chatml"]

    def problems(name, arguments):
        text = "<tool_call>\n" + json.dumps({"name": name, "arguments": arguments}) + "\n</tool_call>"
        return read_reply(text, chat_model.TOOLS, tokenizer, fmt).problems[0]

    assert problems("set_lamp", {"room": "hall", "level": 3}) == []
    assert problems("sing", {}) == ["no tool is called 'sing'; declared: set_lamp"]
    assert problems("set_lamp", {"room": "hall", "colour": "red"}) == ["unknown argument colour"]
    assert sorted(problems("set_lamp", {"level": "3"})) == [
        "arguments: 'room' is a required property",
        "level: '3' is not of type 'integer'",
    ]
    broken = read_reply(chat_model.BROKEN, chat_model.TOOLS, tokenizer, fmt)
    assert broken.parse_errors and broken.content == chat_model.BROKEN  # not hidden


# --- the tool command


def program(tmp_path: Path, body: str) -> tuple[str, ...]:
    path = tmp_path / "a tool.py"
    path.write_text("import json, subprocess, sys, time\n" + body, encoding="utf-8")
    return (sys.executable, str(path))


def test_tool_command_passes_the_call_on_stdin(tmp_path):
    argv = program(tmp_path, "call = json.load(sys.stdin)\nprint(json.dumps({'got': call, 'argv': sys.argv[1:]}))")
    call = {"name": "set_lamp", "arguments": {"room": "부엌; rm -rf $HOME", "level": 3}}
    given = json.loads(ToolCommand((*argv, "$(whoami)", "a;b"))(call))
    assert given == {"got": call, "argv": ["$(whoami)", "a;b"]}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit('the lamp is broken')", "status 1: the lamp is broken"),
        ("pass", "wrote nothing"),
        ("print('x' * 200_000)", "200,000 characters"),
        ("while True: print('x' * 10_000)", "more than 1,000,000 bytes"),
        ("sys.stderr.write('é' * 3_000_000 + chr(10) + 'the lamp is broken'); sys.exit(3)", "status 3: the lamp is"),
    ],
)
def test_tool_command_failure_is_a_result(tmp_path, body, said):
    assert said in json.loads(ToolCommand(program(tmp_path, body))({"name": "a", "arguments": {}}))["error"]


def test_tool_command_that_cannot_start_or_hangs(tmp_path):
    assert "cannot start" in ToolCommand((str(tmp_path / "none"),))({"name": "a", "arguments": {}})
    started = tmp_path / "pid"
    child = f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    body = f"subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    result = ToolCommand(program(tmp_path, body), timeout=2.0)({"name": "a", "arguments": {}})
    assert "longer than 2 s" in json.loads(result)["error"]
    if hasattr(os, "killpg"):
        with pytest.raises(ProcessLookupError):  # the child was killed as well
            for _ in range(50):
                os.kill(int(started.read_text("utf-8")), 0)
                time.sleep(0.1)


def test_tool_command_leaves_a_background_child(tmp_path):
    """The child outlives the program and has inherited its stdout; the result is there at once."""
    body = """
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid)
"""
    pid = ToolCommand(program(tmp_path, body))({"name": "a", "arguments": {}})
    os.kill(int(pid), signal.SIGTERM)  # still running


def test_tool_command_that_does_not_read_its_input(tmp_path):
    unread = ToolCommand(program(tmp_path, "sys.stdout.buffer.write(b'caf\\xe9')"))
    assert unread({"name": "a", "arguments": {"text": "x" * 1_000_000}}) == "caf\ufffd"


def test_parse_tool_command():
    assert parse_tool_command(None) is None
    program = shlex.quote(sys.executable)
    assert parse_tool_command(f"{program} 'a b' --x=1 ; rm").argv == (sys.executable, "a b", "--x=1", ";", "rm")
    with pytest.raises(UserError, match="cannot run no-such-program"):
        parse_tool_command("no-such-program --x")
    for wrong in ("", "'open"):
        with pytest.raises(UserError, match="--tool_command"):
            parse_tool_command(wrong)


# --- a conversation


class Scripted:
    """A model with prepared answers."""

    name, sides, fmt = "scripted", ("tuned",), FORMATS["chatml"]

    def __init__(self, *replies: Reply):
        self.replies, self.seen = list(replies), []

    def stream(self, messages, tools, decoding, side="tuned"):
        self.seen.append(messages)
        yield self.replies.pop(0)


def calling(*names: str, problems: list[str] | None = None) -> Reply:
    made = [{"name": name, "arguments": {}} for name in names]
    return Reply("…", tool_calls=made, problems=[problems or []] * len(made))


def test_agent_executes_calls_in_order():
    ran = []
    model = Scripted(calling("a", "b"), calling("c", problems=["no tool is called 'c'"]), Reply("Done.", "Done."))
    conversation = ChatSession("Be brief.")
    conversation.add_user("go")
    agent = ChatAgent(model, None, lambda call: ran.append(call["name"]) or f"did {call['name']}")
    made = list(agent.answer(conversation))
    assert ran == ["a", "b"]  # a call that does not fit its schema is not executed
    assert [event.result for event in made if isinstance(event, ToolResult)][:2] == ["did a", "did b"]
    assert [type(event) for event in made] == [Reply, ToolResult, ToolResult, Reply, ToolResult, Reply]
    assert [turn["role"] for turn in conversation.messages] == [
        "system", "user", "assistant", "tool", "tool", "assistant", "tool", "assistant",
    ]  # fmt: skip
    ids = [call["id"] for turn in conversation.turns for call in turn.get("tool_calls", [])]
    assert ids == ["call_1", "call_2", "call_3"]
    assert [t["tool_call_id"] for t in conversation.turns if t["role"] == "tool"] == ids
    assert "no tool is called" in json.loads(conversation.turns[5]["content"])["error"]
    assert not conversation.pending


def test_agent_limits_the_rounds_of_calls():
    conversation = ChatSession()
    conversation.add_user("go")
    model = Scripted(*(calling("a") for _ in range(9)))
    list(ChatAgent(model, None, lambda call: "again", max_rounds=2).answer(conversation))
    assert len(model.seen) == 3 and len(conversation.pending) == 1


def test_saved_session_is_a_row_for_training(tmp_path):
    from finetune.reading.conversations import load_conversations

    conversation = ChatSession("Be brief.", chat_model.TOOLS)
    with pytest.raises(UserError, match="nothing to save"):
        conversation.save(tmp_path / "chat.jsonl")
    conversation.add_user("Dim")
    conversation.add_reply(Reply("", tool_calls=[chat_model.CALL], problems=[[]]))
    conversation.add_result(chat_model.RESULT)
    conversation.add_reply(Reply("Done.", "Done."))
    path = tmp_path / "chat.jsonl"
    path.write_bytes(b'{"question": "2+2?", "answer": "4"}')  # a last line without its end
    conversation.save(path)
    read = load_conversations([path]).conversations
    assert len(read) == 2 and read[1]["tools"] == chat_model.TOOLS
    assert [m["role"] for m in read[1]["messages"]] == ["system", "user", "assistant", "tool", "assistant"]


def test_tools_and_questions(tmp_path):
    file = tmp_path / "tools.json"
    for written in ([LAMP], {"tools": [LAMP]}, chat_model.TOOLS):
        file.write_text(json.dumps(written), encoding="utf-8")
        assert load_tools_file(file) == chat_model.TOOLS
    file.write_text(json.dumps({"messages": [], "tools": [LAMP]}) + "\n" + json.dumps({"messages": []}), "utf-8")
    assert load_tools_file(file) == chat_model.TOOLS
    for wrong, said in (
        ("{", "not valid JSON"), ("[{}]", "no name"), (json.dumps([LAMP, LAMP]), "same name"), ("5", "not a list"),
        ("null", "contains no tool schema"), ("[]", "contains no tool schema"), ("[" * 100_000, "too deep"),
        (b"\xff[]", "not UTF-8"), ("[" + "1" * 5000 + "]", "not valid JSON"), ('[{"name": "\\ud800"}]', "surrogate"),
        ('[{"name": "f", "parameters": ' + '{"a": ' * 70 + "{}" + "}" * 71 + "]", "nested deeper"),
        ('[{"name": "f", "name": "g"}]', "duplicate key"),
    ):  # fmt: skip
        file.write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
        with pytest.raises(UserError, match=said):
            load_tools_file(file)
    with pytest.raises(UserError, match=r"none\.json"):
        load_tools_file(tmp_path / "none.json")
    text, lines = tmp_path / "q.txt", tmp_path / "q.jsonl"
    text.write_text("one\n\n two \n", encoding="utf-8")
    assert read_questions(text) == ["one", "two"]
    lines.write_text('"one"\n{"question": "two"}\n{"messages": [{"role": "user", "content": "x"}]}\n{"a": 1}', "utf-8")
    with pytest.raises(UserError, match="line 4"):
        read_questions(lines)


def test_questions_of_a_json_file(tmp_path):
    path = tmp_path / "q.json"
    for written in (["one", {"question": "two"}], {"questions": ["one", "two"]}):
        path.write_text(json.dumps(written, indent=1), encoding="utf-8")
        assert [row["messages"][-1]["content"] for row in read_questions(path)] == ["one", "two"]
    for wrong, said in (("[]", "must be a list of questions"), ("{}", "must be a list"), ("[1]", "question 1: neither"),
                        ('["a", {"x": 1}]', "question 2: neither"), ("[", "not valid JSON")):  # fmt: skip
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            read_questions(path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rank": 8}, "has no section for answers"),
        ({"inference": {"generation": {"top_p": 3}}}, "inference.generation.top_p must be a number > 0 and <= 1"),
        ({"inference": {"mode": "both"}}, "inference.mode must be one of lora, merged"),
        ({"inference": {"questions": "why?"}}, "inference.questions: must be a list"),
        ({"lora": {"rr": 1}}, "unknown entry lora.rr"),
        ({"inference": {}}, "its section inference has no adapter_path"),
    ],
)
def test_bad_chat_config_is_refused_by_name(config, said, tmp_path, capsys):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    assert chat_lora.main(["--config", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_chat_config_is_the_default_of_the_command_line(tmp_path):
    path, merged = tmp_path / "c.json", tmp_path / "merged"
    inference = {"adapter_path": "run", "mode": "merged", "merged_model_path": str(merged), "questions": ["a?"],
                 "generation": {"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 9}}  # fmt: skip
    path.write_text(json.dumps({"inference": inference}), encoding="utf-8")
    args, questions = chat_lora.parse(["--config", str(path), "--top_p", "0.5"])
    assert (args.model, args.mode, args.temperature, args.top_p, args.max_new_tokens) == ("run", "merged", 0.2, 0.5, 9)
    assert [row["messages"][0]["content"] for row in questions] == ["a?"]
    assert chat_lora.parse(["other", "--config", str(path), "--prompt", "b?"])[1] == []
    merged.mkdir()
    args, _ = chat_lora.parse(["--config", str(path)])
    assert (args.model, args.mode) == (str(merged), "lora")


@pytest.mark.parametrize(
    ("line", "system", "asked", "tools"),
    [
        ('"one"', "S", "one", 0),
        ('{"question": "two", "id": 7}', "S", "two", 0),
        ('{"input": "three", "label": "ok"}', "S", "three", 0),
        ('{"prompt": "four", "system": "own", "tools": [{"name": "f"}]}', "own", "four", 1),
        ('{"instruction": "five", "input": "on this", "output": "gold"}', "S", "five\n\non this", 0),
        ('{"conversations": [{"from": "human", "value": "six"}, {"from": "gpt", "value": "gold"}]}', "S", "six", 0),
        ('{"query": "seven", "answers": "[{\\"name\\": \\"f\\", \\"arguments\\": {}}]"}', "S", "seven", 0),
    ],
)
def test_start_session_keeps_text_and_tools(line, system, asked, tools, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(line, encoding="utf-8")
    conversation = start_session(*read_questions(path), "S", [])
    assert conversation.messages == [{"role": "system", "content": system}, {"role": "user", "content": asked}]
    assert len(conversation.tools) == tools


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 20_000, "not valid JSON"),
        ('{"question": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"a": 1}', "neither text"),
        ('"a\\ud800"', "surrogate"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no user message"),
        ('{"messages": [{"role": "user", "content": "x"}], "tools": 5}', "not a list"),
    ],
)
def test_read_questions_names_the_line(line, said, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('"fine"\n\n' + line, encoding="utf-8")
    with pytest.raises(UserError, match=f"q.jsonl, line 3: .*{said}"):
        read_questions(path)


def test_question_without_room_is_refused_first(agent, tmp_path):
    output = tmp_path / "out.txt"
    with pytest.raises(UserError, match=r"question 2: the conversation has 1,\d+ tokens"):
        answer_all(agent, [chat_model.REQUEST, "lamp " * 1100], "", chat_model.TOOLS, ["tuned"], output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--web", "--serve"], "exclude each other"),
        (["--prompt", "x", "--compare", "--base"], "--compare needs"),
        (["--compare"], "in the terminal"),
        (["--output", "x.jsonl"], "use /save"),
        (["--web", "--host", "0.0.0.0"], "SANDWICH_WEB_PASSWORD"),
        (["--web", "--share"], "SANDWICH_WEB_PASSWORD"),
        (["--tools", "none.json"], "none.json"),
        (["--serve", "--tool-command", "x"], "the client runs the calls"),
        (["--prompt", "caf\udce9"], "--prompt is not UTF-8"),
    ],
)
def test_script_refuses_conflicting_flags(flags, said, capsys, monkeypatch):
    import chat_lora

    monkeypatch.delenv("SANDWICH_WEB_PASSWORD", raising=False)
    assert chat_lora.main(["m", *flags]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("port", ["0", "65536", "http"])
def test_script_refuses_an_invalid_port(port, capsys):
    import chat_lora

    with pytest.raises(SystemExit) as stop:
        chat_lora.main(["m", "--serve", "--port", port])
    assert stop.value.code == 2 and "--port: must be" in capsys.readouterr().err


# --- a model that has memorised one conversation


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return chat_model.trained_adapter(tmp_path_factory.mktemp("chat_model"))


@pytest.fixture(scope="module")
def agent(adapter) -> ChatAgent:
    """Without Unsloth, whose import would change the models of other tests; tests of the script use it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from finetune.chat.model import ChatModel
    from finetune.generation.generate import Decoding
    from formats import get_format

    tokenizer = AutoTokenizer.from_pretrained(adapter.parent / "base")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(adapter.parent / "base"), adapter).eval()
    model = ChatModel(model, tokenizer, get_format("chatml", tokenizer), "memorised")
    return ChatAgent(model, Decoding(model.stop_ids, max_new_tokens=48))


def test_answer_equals_that_of_the_evaluation(agent):
    from finetune.generation.generate import generate

    model, messages, tools = agent.model, chat_model.conversation()[:1], chat_model.TOOLS
    *shown, reply = model.stream(messages, tools, agent.decoding)
    assert (reply.tool_calls, reply.problems, reply.finish_reason) == ([chat_model.CALL], [[]], "stop")
    assert shown == [] and reply.content == ""
    evaluated = generate(model.model, [model.prompt_ids(messages, tools)], decoding=agent.decoding).results[0]
    assert model.tokenizer.decode(evaluated.input_ids) == reply.text
    *shown, base = model.stream(messages, tools, agent.decoding, "base")
    assert len(shown) > 1 and "".join(shown) == base.content == chat_model.BASE_ANSWER
    with pytest.raises(UserError, match="room for 1,024"):
        model.prompt_ids([{"role": "user", "content": "lamp " * 1100}], [])


def test_answer_gets_the_room_that_is_left(agent, monkeypatch, tmp_path):
    """A recipe trained on 512 tokens, and answers of up to 512: the question takes part of them."""
    from finetune.chat.questions import answer_all

    questions = [chat_model.REQUEST, "Dim it"]
    longest = max(len(agent.model.prompt_ids([{"role": "user", "content": text}], [])) for text in questions)
    monkeypatch.setattr(agent.model.model, "max_seq_length", longest + 2, raising=False)
    answer_all(agent, questions, "", [], ["base"], tmp_path / "answers.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == [1, 2] and lines[0]["finish_reason"] == "length"
    monkeypatch.setattr(agent.model.model, "max_seq_length", longest)
    with pytest.raises(UserError, match=f"question 1: .* room for {longest}"):
        answer_all(agent, questions, "", [], ["base"], None)


def test_closing_a_stream_stops_the_generation(agent):
    """The lock is released at once, and the next answer is complete."""
    messages = chat_model.conversation()[:1]
    events = agent.model.stream(messages, chat_model.TOOLS, agent.decoding, "base")
    assert chat_model.BASE_ANSWER.startswith(next(events))
    events.close()
    assert not agent.model.lock.locked()
    *_, reply = agent.model.stream(messages, chat_model.TOOLS, agent.decoding, "base")
    assert reply.content == chat_model.BASE_ANSWER


def typed(agent: ChatAgent, lines: list[str], keyboard: bool = True, tools=chat_model.TOOLS) -> tuple[str, ChatSession]:
    """(what the terminal shows when these lines are typed or piped, the conversation)."""
    from rich.console import Console

    from finetune.chat.terminal import Terminal

    feed, out = iter(lines), io.StringIO()

    def read(_prompt: str) -> str:
        try:
            return next(feed)
        except StopIteration:
            raise EOFError from None

    conversation = ChatSession("", list(tools))
    terminal = Terminal(agent, conversation, Console(file=out, width=200), read)
    terminal.keyboard = keyboard
    terminal.run()
    return out.getvalue(), conversation


def test_terminal_commands(agent, tmp_path):
    saved = tmp_path / "my chats.jsonl"
    text, conversation = typed(
        agent, [chat_model.REQUEST, chat_model.RESULT, "/base", "/raw", f"/save {saved}", "/tools", "/nix"]
    )
    assert 'call  set_lamp(room="hall", level=3)' in text
    assert text.index("call  set_lamp") < text.index(chat_model.DONE) < text.index(chat_model.BASE_ANSWER)
    assert f'"{chat_model.DONE}"' in text  # /raw
    assert "set_lamp(room, level)  Dim a lamp." in text and "unknown command /nix" in text
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(saved.read_text("utf-8"))["messages"] == conversation.messages
    assert "No closing quotation" in typed(agent, ['/tools "half.json'])[0]
    text, conversation = typed(agent, [chat_model.REQUEST, "", "/system Be brief.", "/reset", "/base", "/system"])
    assert conversation.turns == [] and conversation.system == "Be brief."
    assert "nothing has been answered yet" in text and "system: Be brief." in text


@pytest.mark.parametrize("word", ["quit", "Exit ", "/quit"])
def test_terminal_ends_at_a_bare_quit(agent, word):
    _, conversation = typed(agent, ["Do not quit", word, chat_model.REQUEST])
    assert [turn["content"] for turn in conversation.turns if turn["role"] == "user"] == ["Do not quit"]


def test_terminal_shows_broken_calls(agent):
    text, _ = typed(agent, [chat_model.BROKEN_REQUEST])
    assert "not a call: call 1:" in text and '{"name":"set_lamp","arguments":{"room":' in text


def test_terminal_takes_results_over_a_pipe(agent):
    text, conversation = typed(agent, [chat_model.REQUEST, f"/result {chat_model.RESULT}"], keyboard=False)
    assert chat_model.DONE in text and not conversation.pending


def test_terminal_ctrl_c(agent, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(agent.model), "stream", interrupted)
    text, conversation = typed(agent, [chat_model.REQUEST])
    assert "stopped; the message and its answer are not kept" in text and conversation.turns == []
    with pytest.raises(KeyboardInterrupt):
        typed(agent, [chat_model.REQUEST], keyboard=False)


def piped(agent: ChatAgent, data: bytes, monkeypatch) -> tuple[str, ChatSession]:
    """The same with the terminal's own reader of stdin."""
    from rich.console import Console

    from finetune.chat.terminal import Terminal

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    out, conversation = io.StringIO(), ChatSession()
    Terminal(agent, conversation, Console(file=out, width=200)).run()
    return out.getvalue(), conversation


def test_terminal_reads_a_pipe(monkeypatch):
    answers = Reply("One.", "One."), Reply("Two.", "Two.")
    _, conversation = piped(ChatAgent(Scripted(*answers), None), b"a\\\nb\r\n\n//c\\", monkeypatch)
    assert [turn["content"] for turn in conversation.turns] == ["a\nb", "One.", "/c", "Two."]
    with pytest.raises(UserError, match="not UTF-8"):
        piped(ChatAgent(Scripted(), None), b"caf\xe9\n", monkeypatch)


def test_terminal_drops_a_message_without_an_answer(agent):
    text, conversation = typed(agent, ["lamp " * 1100, chat_model.REQUEST])
    assert "error: the conversation has" in text and "call  set_lamp" in text
    assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]


def test_terminal_prints_no_control_characters():
    """Not in calls, results, errors or text."""
    call = {"name": "set\x1b[2J", "arguments": {"room": "a\x9b2J\r"}}
    model = Scripted(Reply("…", tool_calls=[call], problems=[[]]), Reply("", parse_errors=["no \x1b[31m"]))
    text, _ = typed(ChatAgent(model, None, lambda call: "done\x1b]0;title\x07"), ["go"], tools=[])
    assert "set\ufffd[2J" in text and "-> done\ufffd]0;title\ufffd" in text
    assert not {"\x1b", "\x9b", "\x07", "\r"} & set(text)


def test_terminal_shows_tools_with_an_invalid_schema(tmp_path):
    file = tmp_path / "tools.json"
    broken = [{"name": "f", "parameters": {"properties": [{"name": "a"}]}}, {"name": "g", "parameters": {"type": 5}}]
    file.write_text(json.dumps([*broken, LAMP]), encoding="utf-8")
    text, conversation = typed(ChatAgent(Scripted(), None), [f"/tools {file}"], tools=[])
    assert text.count("are not a JSON Schema") == 2 and "3 tools declared" in text and "set_lamp(room, level)" in text
    assert len(conversation.tools) == 3


def chat(*arguments: str | Path, given: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return run_script("chat_lora.py", *arguments, given=given, cwd=cwd, timeout=300)


def test_script_answers_a_file_of_questions(adapter, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([LAMP]), encoding="utf-8")
    (tmp_path / "q.txt").write_text(f"{chat_model.REQUEST}\n{chat_model.BROKEN_REQUEST}\n", encoding="utf-8")
    flags = ["--tools", "tools.json", "--max_new_tokens", "48", "--questions", "q.txt", "--compare"]
    done = chat(adapter, *flags, "--output", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()]
    assert [(line["row"], line["side"]) for line in lines] == [(1, "base"), (1, "tuned"), (2, "base"), (2, "tuned")]
    assert lines[0]["content"] == chat_model.BASE_ANSWER
    assert lines[1]["tool_calls"] == [{**chat_model.CALL, "problems": []}]
    assert lines[3]["parse_errors"] and lines[3]["content"] == chat_model.BROKEN
    again = chat(adapter, *flags, "--output", "out.jsonl", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_script_over_a_pipe_with_a_tool_command(adapter, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([LAMP]), encoding="utf-8")
    argv = program(tmp_path, f"print('{chat_model.RESULT}')")
    command = " ".join(f'"{word}"' for word in argv)
    flags = ["--tools", tmp_path / "tools.json", "--max_new_tokens", "48", "--tool-command", command]
    done = chat(adapter, *flags, given=chat_model.REQUEST + "\n", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == [
        'call  set_lamp(room="hall", level=3)', f"  -> {chat_model.RESULT}", chat_model.DONE, "",
    ]  # fmt: skip


def test_script_with_a_merged_adapter(adapter, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([LAMP]), encoding="utf-8")
    done = chat(adapter, "--mode", "merged", "--tools", tmp_path / "tools.json", "--prompt", chat_model.REQUEST)
    assert (done.returncode, done.stdout) == (0, 'set_lamp(room="hall", level=3)\n'), done.stderr


# --- an OpenAI client


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def client(agent):
    """An OpenAI client of a running server."""
    openai, uvicorn = pytest.importorskip("openai"), pytest.importorskip("uvicorn")
    from finetune.chat.serve import build_app, guarded

    port = free_port()
    app = guarded(build_app(agent.model, agent.decoding), "127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.should_exit = True
    thread.join(20)


def test_server_refuses_invalid_requests(agent):
    pytest.importorskip("fastapi", reason="pip install -r requirements/optional.txt")
    from starlette.testclient import TestClient

    from finetune.chat.serve import build_app

    client = TestClient(build_app(agent.model, agent.decoding), raise_server_exceptions=False)
    asked = {"messages": chat_model.conversation()[:1]}
    for wrong in (
        {"max_tokens": "abc"}, {"max_tokens": -5}, {"max_tokens": 1.5}, {"max_tokens": True}, {"temperature": -1},
        {"temperature": "hot"}, {"top_p": 5}, {"seed": "x"}, {"frequency_penalty": "x"}, {"stop": ["x"]},
        {"response_format": "json"}, {"messages": "x"}, {"messages": [5]}, {"messages": []}, {"tools": [5]},
        {"messages": [{"role": "user", "content": "x"}] * 2001}, {"tools": [{}] * 1001},
        {"messages": [{"role": "user", "content": "\ud800"}]}, {"tools": "x"}, {"top_k": 5}, {"n": 2},
        {"messages": [{"content": "x"}]}, {"messages": [{"role": 5, "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]}, {"messages": [{"role": "user", "content": {"a": 1}}]},
        {"messages": [{"role": "assistant", "tool_calls": "x"}]}, {"tools": [{"type": "function"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]},
        {"tools": [{"type": "function", "function": {"parameters": []}}]},
    ):  # fmt: skip
        for stream in (False, True):
            content = json.dumps({**asked, **wrong, "stream": stream})
            headers = {"content-type": "application/json"}
            answer = client.post("/v1/chat/completions", content=content, headers=headers)
            assert answer.status_code == 400 and answer.json()["detail"], (wrong, answer.text)
    nameless = client.post("/v1/chat/completions", json={**asked, "tools": [*chat_model.TOOLS, {"type": "function"}]})
    assert "tool 2 has no name" in nameless.json()["detail"]
    ignored = {"user": "me", "n": 1, "response_format": {"type": "text"}, "parallel_tool_calls": True, "stop": None}
    numbers = {"max_tokens": 3, "temperature": 0, "seed": 1, "top_p": 1, "frequency_penalty": 0.5}
    fine = client.post("/v1/chat/completions", json={**asked, **ignored, **numbers})
    assert fine.status_code == 200 and fine.json()["choices"][0]["finish_reason"] == "length"
    assert client.get("/health").json() == {"status": "ok"} and client.get("/docs").status_code == 404


@pytest.mark.parametrize("depth", [70, 300, 700, 900, 930, 950, 960, 100_000])
def test_server_refuses_deep_nesting(depth):
    """Whatever part is nested, and whichever of JSON's readers and writers meets its own limit first."""
    pytest.importorskip("fastapi", reason="pip install -r requirements/optional.txt")
    from starlette.testclient import TestClient

    from finetune.chat.serve import build_app

    client = TestClient(build_app(SimpleNamespace(sides=("tuned",), name="m"), None), raise_server_exceptions=False)
    deep, user = '{"a":' * depth + "1" + "}" * depth, '{"role": "user", "content": "x"}'
    call = f'{{"type": "function", "function": {{"name": "f", "arguments": {deep}}}}}'
    for body in (
        "[" * depth + "]" * depth,
        f'{{"messages": [{{"role": "user", "content": {deep}}}]}}',
        f'{{"messages": [{{"role": "assistant", "tool_calls": [{call}]}}, {user}]}}',
        f'{{"messages": [{user}], "tools": [{{"function": {{"name": "f", "parameters": {deep}}}}}]}}',
    ):
        answer = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 400, (body[:80], answer.text)


def test_server_refusal_is_short():
    """One that quotes the request would send back as much as it got."""
    pytest.importorskip("fastapi", reason="pip install -r requirements/optional.txt")
    from starlette.testclient import TestClient

    from finetune.chat.serve import MAX_DETAIL, build_app

    client = TestClient(build_app(SimpleNamespace(sides=("tuned",), name="m"), None), raise_server_exceptions=False)
    for body in ({f"k{number}": 1 for number in range(5000)}, {"messages": [5] * 2000}, 5, None, "x"):
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 400 and len(answer.json()["detail"]) <= MAX_DETAIL


def test_server_samples_with_the_seed(agent):
    pytest.importorskip("fastapi", reason="pip install -r requirements/optional.txt")
    from starlette.testclient import TestClient

    from finetune.chat.serve import build_app

    client = TestClient(build_app(agent.model, agent.decoding))
    asked = {"messages": chat_model.conversation()[:1], "temperature": 50, "max_tokens": 8}

    def content(**more) -> str:
        return client.post("/v1/chat/completions", json=asked | more).json()["choices"][0]["message"]["content"]

    assert content(seed=1) == content(seed=1) != content(seed=2)
    assert content(seed=1, top_p=1e-9) == content(temperature=0)
    assert content() != content()


def test_server_round_trip(client):
    assert [model.id for model in client.models.list()] == ["tuned", "base"]
    messages = [{"role": "user", "content": chat_model.REQUEST}]
    choice = client.chat.completions.create(model="tuned", messages=messages, tools=chat_model.TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    (call,) = choice.message.tool_calls
    assert call.function.name == "set_lamp" and json.loads(call.function.arguments) == chat_model.CALL["arguments"]
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": chat_model.RESULT}]
    answer = client.chat.completions.create(model="tuned", messages=messages, tools=chat_model.TOOLS)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (chat_model.DONE, "stop")
    assert answer.usage.completion_tokens > 1
    base = client.chat.completions.create(model="base", messages=messages[:1], tools=chat_model.TOOLS)
    assert base.choices[0].message.content == chat_model.BASE_ANSWER


def test_server_answers_within_the_room_that_is_left(client, agent, monkeypatch):
    messages = chat_model.conversation()[:1]
    room = len(agent.model.prompt_ids(messages, [])) + 2
    monkeypatch.setattr(agent.model.model, "max_seq_length", room, raising=False)
    answer = client.chat.completions.create(model="base", messages=messages)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 2)


def test_server_streams(client):
    def streamed(messages, **more):
        stream = client.chat.completions.create(
            model="tuned", messages=messages, tools=chat_model.TOOLS, stream=True, **more
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        return text, calls, chunks[-1].choices[0].finish_reason, sum(bool(c.choices[0].delta.content) for c in chunks)

    turns = chat_model.conversation()
    text, calls, reason, _ = streamed(turns[:1])
    assert (text, reason, [c.function.name for c in calls]) == ("", "tool_calls", ["set_lamp"])
    assert json.loads(calls[0].function.arguments) == chat_model.CALL["arguments"]
    sent = [dict(turn) for turn in turns[:3]]
    function = {"name": "set_lamp", "arguments": json.dumps(chat_model.CALL["arguments"])}  # as clients write them
    sent[1]["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
    text, calls, reason, pieces = streamed(sent)
    assert (text, calls, reason) == (chat_model.DONE, [], "stop") and pieces > 1
    text, calls, _, _ = streamed([{"role": "user", "content": chat_model.BROKEN_REQUEST}])
    assert text == chat_model.BROKEN and not calls  # not hidden
    text, _, reason, _ = streamed(sent, max_completion_tokens=2)
    assert reason == "length" and len(text) < len(chat_model.DONE)


def test_cut_call_is_not_content(client):
    """Cut in the middle of a call, the answer has neither its half nor a reason to run it."""
    ask = {"model": "tuned", "messages": chat_model.conversation()[:1], "tools": chat_model.TOOLS}
    whole = client.chat.completions.create(**ask).usage.completion_tokens
    for limit in range(1, whole - 2, 3):
        choice = client.chat.completions.create(**ask, max_tokens=limit).choices[0]
        assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("length", "", None), limit
    chunks = list(client.chat.completions.create(**ask, max_tokens=whole // 2, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "length"


def test_server_role_developer_is_system(client):
    def tokens(role):
        messages = [{"role": role, "content": "Answer briefly."}, *chat_model.conversation()[:1]]
        answer = client.chat.completions.create(model="tuned", messages=messages, max_tokens=4)
        return answer.usage.prompt_tokens, answer.choices[0].message.content

    assert tokens("developer") == tokens("system")


def test_server_returns_one_call_where_asked():
    pytest.importorskip("fastapi", reason="pip install -r requirements/optional.txt")
    from finetune.chat.serve import ChatRequest, finish_reason_of

    reply = Reply("", tool_calls=[chat_model.CALL, {"name": "other", "arguments": {}}], problems=[[], ["unknown"]])
    for given, kept in ((None, 2), (True, 2), (False, 1)):
        request = ChatRequest(messages=[{"role": "user", "content": "x"}], parallel_tool_calls=given)
        answered = request.answered(reply)
        assert len(answered.tool_calls) == len(answered.problems) == kept
        assert answered.tool_calls[0] == chat_model.CALL and finish_reason_of(answered) == "tool_calls"


def test_penalties_are_those_of_the_api():
    """OpenAI: logit - count x frequency_penalty - (count > 0) x presence_penalty, over the answer alone."""
    import torch

    from finetune.chat.model import Penalties

    ids = torch.tensor([[3, 3, 1, 0, 1]])  # two tokens of the prompt, then the answer
    scores = Penalties(frequency=0.5, presence=0.25, prompt_length=2)(ids, torch.zeros(1, 5))
    assert scores.tolist() == [[-0.75, -1.25, 0.0, 0.0, 0.0]]


def test_server_honours_penalties(client):
    ask = {"model": "base", "messages": [{"role": "user", "content": "Go on"}], "max_tokens": 40}

    def repeated(**penalty):
        words = client.chat.completions.create(**ask, **penalty).choices[0].message.content.split()
        return len(words) - len(set(words))

    assert repeated(frequency_penalty=2, presence_penalty=2) <= repeated()


def test_server_says_what_is_not_supported(client):
    import openai

    ask = {"model": "tuned", "messages": [{"role": "user", "content": "Hi"}], "tools": chat_model.TOOLS}
    for wrong in (
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "set_lamp"}}},
        {"presence_penalty": 3},
        {"response_format": {"type": "json_object"}},
        {"n": 2},
        {"messages": []},
        {"messages": [{"role": "wizard", "content": "Hi"}]},
        {"max_tokens": 5000},
    ):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**{**ask, **wrong})
    with pytest.raises(openai.NotFoundError, match="tuned, base"):
        client.chat.completions.create(**{**ask, "model": "gpt"})


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent as a signal")
def test_gguf_server_round_trip(adapter, tmp_path):
    """Adapter -> GGUF -> `--serve`: llama.cpp renders, answers and parses the call; Ctrl-C ends it with 130."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("xllamacpp")
    from finetune.export.gguf import tools_folder

    if not (tools_folder() / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's tools are not installed: make install-test")
    script = [sys.executable, str(ROOT / "export_lora.py"), str(adapter), "--to", "gguf", "--dtype", "float32",
              "--quantization", "f16", "--output", str(tmp_path / "gguf"), "--name", "memorised"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(script, env=environment, check=True, timeout=600)
    port = free_port()
    script = [sys.executable, str(ROOT / "chat_lora.py"), str(tmp_path / "gguf" / "memorised-f16.gguf"), "--serve"]
    with subprocess.Popen([*script, "--port", str(port)], env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert "llama.cpp serves memorised-f16.gguf" in server.stderr.readline()
            with pytest.raises(subprocess.CalledProcessError) as taken:
                subprocess.run([*script, "--port", str(port)], env=environment, check=True, capture_output=True)
            assert taken.value.returncode == 2 and b"choose another --port" in taken.value.stderr
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            ask = {"model": "memorised", "tools": chat_model.TOOLS, "temperature": 0, "max_tokens": 48}
            messages = [{"role": "user", "content": chat_model.REQUEST}]
            choice = client.chat.completions.create(messages=messages, **ask).choices[0]
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            assert call.function.name == "set_lamp"
            assert json.loads(call.function.arguments) == chat_model.CALL["arguments"]
            messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": chat_model.RESULT}]
            answer = client.chat.completions.create(messages=messages, **ask).choices[0]
            assert (answer.message.content, answer.finish_reason) == (chat_model.DONE, "stop")
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait(30) == 130


# --- the page


@contextlib.contextmanager
def opened(agent: ChatAgent):
    pytest.importorskip("gradio")
    from finetune.chat.web import open_page

    port = free_port()
    page = open_page(agent, "", chat_model.TOOLS, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        page.close(verbose=False)


def test_page_through_the_gradio_client(agent, monkeypatch):
    monkeypatch.delenv("SANDWICH_WEB_PASSWORD", raising=False)
    with opened(agent) as url:
        from gradio_client import Client

        client = Client(url, verbose=False)
        settings = (json.dumps(chat_model.TOOLS), "", 0, 48)
        _, base, tuned, *_ = client.predict(chat_model.REQUEST, *settings, api_name="/ask")
        assert said(base) == [chat_model.REQUEST, chat_model.BASE_ANSWER]
        card = tuned[-1]
        assert card["metadata"]["title"] == "call: set_lamp" and '"room": "hall"' in said([card])[0]
        assert "arguments fit the schema" in said([card])[0]
        _, base, tuned, *_ = client.predict(chat_model.RESULT, "tuned", *settings, api_name="/give_result")
        assert said(tuned)[-1] == chat_model.DONE and len(base) == 2
        client.predict(api_name="/reset")
        _, _, tuned, *_, saved = client.predict(chat_model.BROKEN_REQUEST, *settings, api_name="/ask")
        assert tuned[-1]["metadata"]["title"] == "not a call" and chat_model.BROKEN in said(tuned)[-1]
        *_, shown, _ = client.predict("x", "{", *settings[1:], api_name="/ask")
        assert "not answered" in shown and "not valid JSON" in shown
        path = saved["value"] if isinstance(saved, dict) else saved
        assert chat_model.BROKEN_REQUEST in Path(path).read_text("utf-8")
        copies = Path(os.environ["GRADIO_TEMP_DIR"])
        assert list(copies.rglob("chat.jsonl")) and copies.stat().st_mode & 0o77 == 0  # private to this user


def said(messages: list[dict]) -> list[str]:
    return [m["content"] if isinstance(m["content"], str) else m["content"][0]["text"] for m in messages]


def test_page_asks_for_the_password(agent, monkeypatch):
    monkeypatch.setenv("SANDWICH_WEB_PASSWORD", "bread and butter")
    with opened(agent) as url:
        from gradio_client import Client

        for wrong in (None, ("me", "bread")):
            with pytest.raises(Exception, match=r"(?i)auth|login|401|credentials"):
                Client(url, auth=wrong, verbose=False)
        assert Client(url, auth=("anyone", "bread and butter"), verbose=False)


def test_page_refuses_other_sites(agent, monkeypatch):
    httpx = pytest.importorskip("httpx")
    monkeypatch.delenv("SANDWICH_WEB_PASSWORD", raising=False)
    with opened(agent) as url:
        assert httpx.get(f"{url}/config").status_code == 200
        for headers in ({"host": "rebound.example"}, {"origin": "http://evil.example"}):
            assert httpx.get(f"{url}/config", headers=headers).status_code == 403
        join = f"{url}/gradio_api/queue/join"
        assert httpx.post(join, content="{}", headers={"content-type": "text/plain"}).status_code == 415
        large = {"content-type": "application/json"}
        assert httpx.post(join, content=b" " * 10_000_001, headers=large).status_code == 413


def test_page_uses_the_public_tunnel_only_on_request(agent, monkeypatch):
    """The tunnel needs Gradio's servers, so only the arguments of `launch` are checked."""
    gradio = pytest.importorskip("gradio")
    import chat_lora

    asked = []

    def launch(_page, **options):
        asked.append(options["share"])
        raise OSError

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setattr("finetune.chat.model.load_chat_model", lambda *_, **__: agent.model)
    monkeypatch.setattr("finetune.logs.start_logging", lambda: None)
    monkeypatch.setenv("SANDWICH_WEB_PASSWORD", "bread and butter")
    for flags in ([], ["--share"]):
        assert chat_lora.main(["m", "--web", *flags]) == 2
    assert asked == [False, True]


@pytest.mark.skipif(CHROMIUM is None, reason=REASON)
def test_page_in_a_real_browser(agent, tmp_path, monkeypatch):
    playwright = pytest.importorskip("playwright.sync_api")
    monkeypatch.delenv("SANDWICH_WEB_PASSWORD", raising=False)
    picture = Path(os.environ.get("SANDWICH_SCREENSHOT", tmp_path / "chat_web.png"))
    with opened(agent) as url, playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            elsewhere: list[str] = []
            page.on(
                "request",
                lambda request: request.url.startswith((url, "data:", "blob:")) or elsewhere.append(request.url),
            )
            page.goto(url)
            page.get_by_label("Message", exact=True).fill(chat_model.REQUEST)
            page.get_by_label("Message", exact=True).press("Enter")
            page.get_by_text("call: set_lamp").wait_for(timeout=120_000)
            page.get_by_text("arguments fit the schema").wait_for()  # seen without a click
            page.get_by_text(chat_model.BASE_ANSWER).wait_for(timeout=120_000)
            for verdict in ("valid call", "no call"):
                page.get_by_text(verdict, exact=True).wait_for()
            page.screenshot(path=str(picture))
            page.get_by_label("Result of the pending call").fill(chat_model.RESULT)
            page.get_by_role("button", name="Give the result").click()
            page.get_by_text(chat_model.DONE).wait_for(timeout=120_000)
            save = page.get_by_text("Save as JSON Lines")
            page.wait_for_function("element => !element.disabled", arg=save.element_handle())
            with page.expect_download() as download:
                save.click()  # the first click saves what is shown now
            assert chat_model.DONE in Path(download.value.path()).read_text(encoding="utf-8")
            page.set_viewport_size({"width": 390, "height": 844})
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            page.get_by_role("button", name="Clear").first.click()  # the bin
            page.get_by_text(chat_model.BASE_ANSWER).wait_for(state="detached")
            page.get_by_text("call: set_lamp").wait_for(state="detached")
            assert elsewhere == []  # nothing is fetched from other hosts
        finally:
            browser.close()
    assert picture.read_bytes()[:4] == b"\x89PNG"
