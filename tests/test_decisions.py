"""Choosing between answers by likelihood: the options of a request, and what is chosen."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from finetune.errors import UserError
from finetune.evaluation.items import Option
from tests import parts
from tests.helpers import lazy
from tests.scored import DOOR, LAMP, call, item
from tests.scripts import run_script

decisions = lazy("finetune.evaluation.decisions")
options_module = lazy("finetune.evaluation.options")
torch = lazy("torch")

ASKS, DECLINES = "Which room?", "I cannot sing."


def items() -> list:
    return [
        item("call", call("set_lamp", room="hall"), row=1),
        item("call", call("door", Assign={"1": {"open": True}}), row=2),
        item("missing_parameter", row=3, text=ASKS),
        item("irrelevant", row=4, text=DECLINES),
        item("question", row=5, text="Hello."),
    ]


def test_options_come_from_other_rows_with_the_same_tools():
    pool = options_module.OptionPool(items())
    call_a, call_b, missing, irrelevant, _ = items()
    expected = [
        ("call", ["set_lamp"], "", True), ("other_call", ["door"], "", False), ("ask_back", [], ASKS, False),
        ("decline", [], DECLINES, False),
    ]  # fmt: skip
    assert [(o.name, [c["name"] for c in o.calls], o.text, o.is_expected) for o in pool.options(call_a)] == expected
    assert [o.calls[0]["name"] for o in pool.options(call_b)[:2]] == ["door", "set_lamp"]
    names = {o.name: (o.text or sorted(c["name"] for c in o.calls), o.is_expected) for o in pool.options(missing)}
    assert names.keys() == {"ask_back", "call", "other_call", "decline"}
    assert names["ask_back"] == (ASKS, True) and names["decline"] == (DECLINES, False)
    assert sorted(names["call"][0] + names["other_call"][0]) == ["door", "set_lamp"]
    assert pool.options(irrelevant)[0].text == DECLINES
    assert pool.options(missing) == options_module.OptionPool(items()).options(missing), "the same at every call"


def test_options_without_other_rows_come_from_the_schemas():
    alone = item("call", call("set_lamp", room="hall"))
    other = options_module.OptionPool([alone]).options(alone)[1]
    assert other.name == "other_call" and other.calls[0]["name"] == "door"
    only = item("irrelevant", text="No.", tools=[LAMP])
    options = options_module.OptionPool([only]).options(only)
    assert [option.name for option in options] == ["decline", "call", "ask_back"], "one tool gives one call"
    assert isinstance(options[1].calls[0]["arguments"]["room"], str)
    korean = item("call", call("set_lamp", room="거실"), tools=[LAMP])
    korean.messages = [{"role": "user", "content": "거실 불 꺼 줘"}]
    assert [option.text for option in options_module.OptionPool([korean]).options(korean)[1:]] == list(
        options_module.SENTENCES["ko"].values()
    )


@pytest.mark.parametrize("name", ["chatml", "llama3", "unreadable"])
def test_every_format_is_scored(tokenizer, name, tmp_path):
    """The likelihoods are those of the answer behind its prompt, also where nothing reads calls out of a text."""
    from formats import encode_prompt, get_format
    from tests.tiny import tiny_llama

    tokenizer = tokenizer if name != "llama3" else parts.tokenizer("llama3")
    fmt = get_format(name, tokenizer) if name != "unreadable" else replace(get_format("chatml"), read_calls=None)
    assert bool(fmt.unreadable_calls) is (name == "unreadable")
    made = decisions.make_decisions(items(), tokenizer, fmt, longest=1000)
    assert [(one.row, reason) for one, reason in made.refused] == [(5, "not a request with tools")]
    prompt = encode_prompt(made.items[0].messages, made.items[0].tools, tokenizer, fmt)
    for ids, labels in made.sequences[0]:
        assert ids[: len(prompt)] == prompt and set(labels[: len(prompt)]) == {-100}
    model = tiny_llama(tokenizer, initializer_range=0.2).eval()
    scored, found = decisions.choose(model, tokenizer, made, tmp_path / "decisions.jsonl", name="base")
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text("utf-8").splitlines()]
    for one, line, pairs, options in zip(scored, lines, made.sequences, made.options, strict=True):
        totals = []
        for ids, labels in pairs:
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            trained = torch.tensor(labels[1:]) >= 0
            totals.append(log_p[trained, torch.tensor(ids[1:])[trained]].sum().item())
        assert [option["log_likelihood"] for option in line["options"]] == pytest.approx(totals, abs=1e-3)
        best = options[totals.index(max(totals))]
        assert (line["chosen"], one.text, one.parsed_calls) == (best.name, best.text, best.calls)
        assert one.verdicts["decision_correct"] is best.is_expected
    assert sum(sum(row.values()) for row in found["decision_confusion"].values()) == 4
    assert 0 <= found["decision_macro_f1"] <= 1


def test_likelihoods_that_are_not_finite_are_refused(tokenizer, tmp_path):
    from formats import get_format
    from tests.tiny import tiny_llama

    made = decisions.make_decisions(items(), tokenizer, get_format("chatml", tokenizer), longest=1000)
    model = tiny_llama(tokenizer).eval()
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="row 1, turn 1: the likelihood of an answer is not finite"):
        decisions.choose(model, tokenizer, made, tmp_path / "decisions.jsonl", name="base")


def test_options_that_a_row_brings(tokenizer):
    from formats import get_format

    row = item(
        "irrelevant", row=1, text="No.", tools=[], options=[Option("a", [], "No.", True), Option("b", [], "Yes.")]
    )
    lonely = item("irrelevant", row=2, text="No.", tools=[DOOR], options=[Option("a", [], "No.", True)])
    made = decisions.make_decisions([row, lonely], tokenizer, get_format("chatml", tokenizer))
    assert [[option.name for option in options] for options in made.options] == [["a", "b"]]
    assert [(one.row, reason) for one, reason in made.refused] == [
        (2, "fewer than two of its answers can be expressed")
    ]
    short = decisions.make_decisions([row], tokenizer, get_format("chatml", tokenizer), longest=5)
    assert "the model has room for 5" in short.refused[0][1] and not short.items


def test_script(tmp_path):
    """Both models of a run, a table of what was chosen, and nothing generated."""
    from tests.exported import make_run

    run = make_run(tmp_path)
    user = {"role": "user", "content": "Dim the hall"}
    texts = [{"role": "assistant", "content": ASKS}, {"role": "assistant", "content": DECLINES}]
    call_of = {"type": "function", "function": {"name": "set_lamp", "arguments": {"room": "hall"}}}
    answers = [*texts, {"role": "assistant", "content": "", "tool_calls": [call_of]}]
    rows = [{"messages": [user, answer], "tools": [LAMP, DOOR]} for answer in answers]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = run_script("evaluate_lora.py", run, "--decisions", "--dataset", tmp_path / "test.jsonl")
    assert result.returncode == 0, result.stderr
    folder = run / "evaluation" / "decisions"
    metrics = json.loads((folder / "finetuned_model_metrics.json").read_text("utf-8"))
    assert metrics["items"] == 3 and 0 <= metrics["decision_accuracy"] <= 1
    assert "exact_match" not in metrics and "decision_accuracy_norm" in metrics
    assert sum(sum(row.values()) for row in metrics["decision_confusion"].values()) == 3
    report = (folder / "comparison.md").read_text("utf-8")
    assert "3 decisions by likelihood" in report and "## Chosen by tuned (macro F1" in report
    assert not (run / "evaluation" / "comparison.md").exists(), "scores of answers are in a folder of their own"

    refused = run_script("evaluate_lora.py", run, "--decisions", "--ranks", "2", "--dataset", tmp_path / "test.jsonl")
    assert refused.returncode == 2 and "--ranks and --decisions exclude each other" in refused.stderr
