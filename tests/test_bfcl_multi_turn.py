"""BFCL's rows of several turns: BFCL's own answers pass, others fail, and the tools' process can do nothing else."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from finetune.errors import UserError
from finetune.evaluation.bfcl import MULTI_TURN, load_items
from finetune.evaluation.bfcl_multi_turn import UNDECLARED_CALL, Conversation, expression
from finetune.evaluation.bfcl_tools import ToolProcess, ToolsFailed
from finetune.evaluation.items import CONVERSATION

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None, reason="pip install --no-deps bfcl-eval==2026.3.23"
)


@pytest.fixture(scope="module")
def tools():
    with ToolProcess(seconds=60) as process:
        yield process


def calls_of(expressions: list[str], tools: list[dict]) -> list[dict]:
    """BFCL's answers, which are Python expressions, as calls."""
    parameters = {t["function"]["name"]: list(t["function"]["parameters"].get("properties", {})) for t in tools}
    made = []
    for one in expressions:
        call = ast.parse(one, mode="eval").body
        arguments = dict(zip(parameters[call.func.id], map(ast.literal_eval, call.args), strict=False))
        arguments |= {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        made.append({"name": call.func.id, "arguments": arguments})
    return made


def answer_with(item, turns: list[list[list[dict]]], tools: ToolProcess) -> tuple[dict, Conversation]:
    """(verdict, conversation) of a model that makes these calls: turns -> steps -> calls; then it says "Done."."""
    conversation = Conversation(item, 20, "There are more tools now.")
    measured = SimpleNamespace(latency_s=0.5, input_ids=[1, 2, 3])
    for steps in turns:
        for calls in [*steps, []]:
            if not conversation.is_finished:
                conversation.take(measured, "the text", "" if calls else "Done.", calls, tools)
    assert conversation.is_finished
    return conversation.judge(tools), conversation


def expected(item) -> list[list[list[dict]]]:
    return [[calls_of(turn, item.truth["tools"])] if turn else [] for turn in item.truth["turns"]]


@pytest.mark.parametrize("category", MULTI_TURN)
def test_expected_calls_pass_and_others_fail(category, tools):
    items = load_items(category, limit=12)
    assert {item.kind for item in items} == {CONVERSATION} and len(items) == 12
    for item in items:
        right = expected(item)
        verdict, conversation = answer_with(item, right, tools)
        assert verdict == {"bfcl_valid": True}, item.row
        assert conversation.new_tokens == 3 * len(conversation.texts)
        step_by_step = [[[call] for step in steps for call in step] for steps in right]
        assert answer_with(item, step_by_step, tools)[0] == {"bfcl_valid": True}, item.row
        changed = next(at for at, steps in enumerate(right) if steps)
        without = [[] if at == changed else steps for at, steps in enumerate(right)]
        verdict, _ = answer_with(item, without, tools)
        assert verdict == {"bfcl_valid": False, "bfcl_error": "multi_turn:empty_turn_model_response"}, item.row


def test_missing_tools_are_declared_when_they_come_back(tools):
    (item,) = load_items("multi_turn_miss_func", limit=1)
    names = {tool["function"]["name"] for tool in item.tools}
    (missing,) = item.truth["row"]["missed_function"]["3"]
    assert missing not in names
    _, conversation = answer_with(item, expected(item), tools)
    assert {tool["function"]["name"] for tool in conversation.tools} == names | {missing}
    assert [m["content"] for m in conversation.messages if m["role"] == "user"][3] == "There are more tools now."
    roles = [message["role"] for message in conversation.messages]
    assert roles[:4] == ["user", "assistant", "tool", "tool"], "parallel calls have one result each"
    ids = [c["id"] for m in conversation.messages for c in m.get("tool_calls", ())]
    assert ids == [m["tool_call_id"] for m in conversation.messages if m["role"] == "tool"] and len(set(ids)) == len(
        ids
    )


def test_a_model_that_does_not_stop_is_failed(tools):
    (item,) = load_items("multi_turn_base", limit=1)
    step = [{"name": "pwd", "arguments": {}}]
    verdict, conversation = answer_with(item, [[step] * 30], tools)
    assert verdict == {"bfcl_valid": False, "bfcl_error": "more than 20 steps in one turn"}
    assert len(conversation.calls) == 21


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"name": "cd", "arguments": {"folder": 'it\'s "here"\n'}}, "cd(folder='it\\'s \"here\"\\n')"),
        ({"name": "cd", "arguments": {"a": 1, "b": [True, None, {"c": 2.5}]}}, "cd(a=1,b=[True, None, {'c': 2.5}])"),
        ({"name": "cd", "arguments": {"folder=open('x','w'),y": 1}}, UNDECLARED_CALL),
        ({"name": "cd", "arguments": {"lambda": 1}}, UNDECLARED_CALL),
        ({"name": "__import__", "arguments": {"name": "os"}}, UNDECLARED_CALL),
        ({"name": "cd(folder='x') or exit", "arguments": {}}, UNDECLARED_CALL),
    ],
)
def test_expressions_hold_a_declared_name_and_literals(call, text):
    assert expression(call, {"cd", "ls"}) == text
    ast.parse(text, mode="eval")


def test_a_call_that_is_not_declared_has_an_error_as_result(tools):
    (item,) = load_items("multi_turn_base", limit=1)
    calls = [{"name": "format_disk", "arguments": {"disk": 1}}, {"name": "ls", "arguments": {}}]
    _, conversation = answer_with(item, [[calls]] + [[]] * 3, tools)
    results = [m["content"] for m in conversation.messages if m["role"] == "tool"]
    assert "not defined" in results[0] and "document" in results[1]


@pytest.mark.parametrize(
    "attempt",
    [
        "__import__('socket').socket()",
        "__import__('socket').getaddrinfo('localhost', 80)",
        "__import__('os').system('true')",
        "__import__('subprocess').run(['true'])",
        "__import__('os').fork()",
        "open({path!r}, 'w')",
        "__import__('os').open({path!r}, 65)",
        "__import__('os').makedirs({path!r})",
        "__import__('shutil').rmtree({path!r})",
        "__import__('ctypes').CDLL(None)",
    ],
)
def test_the_process_reaches_nothing(attempt, tools, tmp_path):
    """Whatever were evaluated there: no connection, no program, no file."""
    row = load_items("multi_turn_base", limit=1)[0].truth["row"]
    request = {
        "row": row | {"id": "multi_turn_base_attempt"},
        "done": [],
        "calls": [attempt.format(path=str(tmp_path / "x"))],
    }
    (result,) = tools.ask(request)["results"]
    assert "is refused in the process of simulated tools" in result
    assert not list(tmp_path.iterdir())


def test_time_limit_and_a_new_process_with_the_same_state():
    row = load_items("multi_turn_base", limit=1)[0].truth["row"]
    done = ["cd(folder='document')"]
    with ToolProcess(seconds=20) as process:
        assert process.ask({"row": row, "done": [], "calls": done})["results"]
        first = process._process.pid
        process.seconds = 0.2
        with pytest.raises(ToolsFailed, match=r"longer than 0\.2 s"):
            process.ask({"row": row, "done": done, "calls": ["9**9**9"]})
        process.seconds = 60
        (answer,) = process.ask({"row": row, "done": done, "calls": ["pwd()"]})["results"]
        assert answer.endswith('/document"}') and process._process.pid != first
    assert process._process is None


def test_tools_that_cannot_start(monkeypatch, tmp_path):
    """One line with the reason, and not 200 failed rows."""
    (tmp_path / "bfcl_eval").mkdir()
    (tmp_path / "bfcl_eval/__init__.py").write_text("raise ImportError('half installed')\n", encoding="utf-8")
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    with (
        ToolProcess() as process,
        pytest.raises(UserError, match="cannot be started: ImportError: half installed; pip"),
    ):
        process.ask({"row": {}, "done": [], "calls": []})


@dataclass
class Scripted:
    """Replaces `generate`: each prompt is answered with the next scripted text of its row."""

    texts: list[list[str]]
    tokenizer: object
    prompts: list[int] = field(default_factory=list)

    def __call__(self, model, prompts, *, decoding, share_prefix):
        results = []
        for prompt in prompts:
            text = self.texts[0].pop(0) if self.texts[0] else "Done."
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            results.append(SimpleNamespace(input_ids=ids, latency_s=0.1, finish_reason="stop"))
            self.prompts.append(len(prompt))
        return SimpleNamespace(results=results)


def test_converse_reads_calls_of_a_format(monkeypatch):
    """The texts of a real format lead to BFCL's verdict; a row that outgrows the context is failed."""
    from finetune.evaluation.bfcl_multi_turn import converse
    from finetune.generation import generate as module
    from formats import get_format
    from tests import parts

    tokenizer = parts.tokenizer("smollm2")
    fmt = get_format("chatml", tokenizer)
    (item,) = load_items("multi_turn_base", limit=1)
    texts = []
    for steps in expected(item):
        for calls in steps:
            message = {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": c} for c in calls],
            }
            texts.append(written(message, tokenizer, fmt))
        texts.append("Done.")
    scripted = Scripted([list(texts)], tokenizer)
    monkeypatch.setattr(module, "generate", scripted)
    turns = []
    ((at, line),) = converse(None, tokenizer, fmt, [item], None, longest=None, on_turn=turns.append)
    assert at == 0 and line["verdicts"] == {"bfcl_valid": True} and sum(turns) == len(item.truth["turns"])
    assert line["finish_reason"] == "stop" and line["text"] == "\n".join(texts)
    assert scripted.prompts == sorted(scripted.prompts), "each prompt has the results before it"

    scripted.texts = [list(texts)]
    ((_, line),) = converse(None, tokenizer, fmt, [item], None, longest=scripted.prompts[1])
    assert line["verdicts"]["bfcl_error"].endswith(f"the model has room for {scripted.prompts[1]:,}")


def written(message: dict, tokenizer, fmt) -> str:
    """What the format writes for an answer, without the end of the turn."""
    from formats import encode

    row = {"messages": [{"role": "user", "content": "x"}, message], "tools": []}
    sequence = encode(row, tokenizer, fmt, allow_unreadable_calls=True).sequences[0]
    return tokenizer.decode([label for label in sequence.labels if label >= 0][:-1])


def test_script_scores_conversations_and_resumes(tmp_path):
    """A random model never calls: each request ends with its answer, and BFCL's verdict is kept."""
    from tests import training_runs
    from tests.scripts import run_script

    model = training_runs.write_tiny_model(tmp_path / "model")
    arguments = (model, "--suite", "bfcl:multi_turn_base", "--limit", 1, "--format", "chatml", "--max_new_tokens", 3,
                 "--output", tmp_path / "out")  # fmt: skip
    first = run_script("evaluate_lora.py", *arguments)
    assert first.returncode == 0, first.stderr
    (line,) = [json.loads(one) for one in (tmp_path / "out/base_model_results.jsonl").read_text("utf-8").splitlines()]
    assert line["kind"] == CONVERSATION and [m["role"] for m in line["messages"]] == ["user", "assistant"] * 4
    assert line["verdicts"] == {"bfcl_valid": False, "bfcl_error": "multi_turn:empty_turn_model_response"}
    metrics = json.loads((tmp_path / "out/base_model_metrics.json").read_text("utf-8"))
    assert metrics["bfcl_accuracy"] == metrics["bfcl_multi_turn_base_accuracy"] == 0.0
    assert metrics["items_by_kind"] == {"conversation": 1} and "tool_name_accuracy" in metrics["not_measured"]
    second = run_script("evaluate_lora.py", *arguments)
    assert second.returncode == 0 and "1 of 1 already answered" in second.stderr
    assert json.loads((tmp_path / "out/base_model_metrics.json").read_text("utf-8"))["bfcl_accuracy"] == 0.0
