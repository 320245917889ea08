"""The real script on a small random model: what it writes, how it resumes, how it refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import UserError
from finetune.evaluation.folder import alone_in, set_strangers_aside
from finetune.evaluation.items import load_items
from finetune.evaluation.metrics import compute_metrics
from finetune.evaluation.report import comparison_markdown, update_model_card
from finetune.evaluation.run import ResultsFile, make_prompts, room_for_answers, run_model, settings_hash
from finetune.evaluation.scoring import score
from finetune.generation.generate import Decoding
from tests import parts
from tests.rows import LAMP, WRAPPED, chat
from tests.scripts import ROOT, run_script
from tests.tiny import tiny_llama


def dim(room: str, **level) -> dict:
    call = {"type": "function", "function": {"name": "set_lamp", "arguments": json.dumps({"room": room, **level})}}
    return {"role": "assistant", "tool_calls": [call]}


def rows() -> list[dict]:
    """A call, a call in two steps with a closing answer, a question back, a refusal; and chat without tools."""

    def user(text):
        return {"role": "user", "content": text}

    def says(text):
        return {"role": "assistant", "content": text}

    result = {"role": "tool", "content": "ok"}
    tools = [WRAPPED]
    return [
        {"messages": [user("Dim the hall to 3"), dim("hall", level=3)], "tools": tools},
        {
            "messages": [user("Dim hall and attic"), dim("hall"), result, dim("attic"), result, says("Done.")],
            "tools": tools,
        },
        {"messages": [user("Dim it"), says("Which room?")], "tools": tools},
        {"messages": [user("Sing a song"), says("No tool of mine sings.")], "tools": tools},
        {"messages": [user("Are you there"), says("Yes, always here.")]},
        {"input": "Say something healthy", "label": "ok"},
    ]


KINDS = ["question", "call", "call", "call", "answer", "missing_parameter", "irrelevant", "question"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter on a random Llama of 0.8 M parameters with SmolLM2's tokenizer; big enough to change every answer."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    tokenizer = parts.tokenizer("smollm2")
    folder = tmp_path_factory.mktemp("models")
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder / "adapter"


def run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return run_script("evaluate_lora.py", *arguments, cwd=cwd)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_items_of_a_file(dataset):
    items = load_items([dataset])
    assert [i.kind for i in items] == KINDS
    assert [(i.row, i.turn) for i in items] == [(6, 1), (1, 1), (2, 1), (2, 3), (2, 5), (3, 1), (4, 1), (5, 1)]
    assert items[0].label is True and items[0].expected_text is None
    assert len({i.fingerprint() for i in items}) == len(items)
    assert [i.row for i in load_items([dataset], limit=1)] == [1]
    with pytest.raises(UserError, match="a weight mixes training data"):
        load_items([f"{dataset}*0.5"])
    with pytest.raises(UserError, match="is named twice"):
        load_items([dataset, str(dataset)])


def test_an_empty_gold_answer_asks_for_no_call_and_for_no_text(tmp_path):
    """An answer that is empty as well would be an exact match of nothing."""
    row = chat({"role": "assistant", "content": ""}, tools=[LAMP])
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = load_items([tmp_path / "rows.jsonl"])
    verdicts = score(item, "", [], [])
    assert (item.kind, verdicts["no_call_correct"]) == ("irrelevant", True)
    assert not {"exact_match", "token_f1", "rouge_l"} & set(verdicts)


def test_both_models_through_the_script(dataset, adapter):
    common = ("--dataset", dataset, "--format", "chatml", "--max_new_tokens", 6)
    first = run(adapter, *common)
    assert first.returncode == 0, first.stderr
    folder = adapter / "evaluation"
    assert sorted(p.name for p in folder.iterdir()) == [
        "base_model_metrics.json", "base_model_results.jsonl", "comparison.json", "comparison.md",
        "confusion_matrix.png", "finetuned_model_metrics.json", "finetuned_model_results.jsonl", "per_tool_f1.png",
    ]  # fmt: skip
    base, tuned = (read_lines(folder / f"{name}_model_results.jsonl") for name in ("base", "finetuned"))
    assert [line["kind"] for line in base] == [line["kind"] for line in tuned] == KINDS
    wanted = {"row", "messages", "expected_calls", "text", "parsed_calls", "parse_errors", "verdicts", "latency_s"}
    assert all(wanted <= line.keys() for line in base + tuned)
    assert base[1]["expected_calls"] == [{"name": "set_lamp", "arguments": {"room": "hall", "level": 3}}]
    assert base[3]["messages"][-1] == {"role": "tool", "content": "ok"} | {
        key: value for key, value in base[3]["messages"][-1].items() if key not in ("role", "content")
    }
    assert [line["messages"] for line in base] == [line["messages"] for line in tuned]
    assert all(b["text"] != t["text"] for b, t in zip(base, tuned, strict=True))  # the adapter was on, and off

    metrics = {
        name: json.loads((folder / f"{name}_model_metrics.json").read_text("utf-8")) for name in ("base", "finetuned")
    }
    for m in metrics.values():
        assert m["tool_name_accuracy"] == m["parameter_accuracy"] == 0.0
        assert m["irrelevance_accuracy"] == m["missing_parameter_accuracy"] == m["answer_accuracy"] == 1.0
        assert (m["items"], m["rows"], m["not_scored"]) == (8, 6, 0)
        assert m["generation"]["method"] == "shared_prefix" and m["generation"]["generated_rows"] == 8
        assert m["tokens_per_second"] > 0
    assert metrics["base"]["settings"]["adapter_sha256"] is None
    assert len(metrics["finetuned"]["settings"]["adapter_sha256"]) == 64
    table = (folder / "comparison.md").read_text("utf-8")
    assert "| tool_name_accuracy | 0.000 | 0.000 | +0.000 | +0.000 to +0.000 | 1.000 |" in table
    assert "tool_name_accuracy" in first.stdout and "difference" in first.stdout

    # A run that was killed while it wrote its fourth answer.
    results = folder / "finetuned_model_results.jsonl"
    lines = results.read_text("utf-8").splitlines(keepends=True)
    results.write_text("".join(lines[:3]) + lines[3][:50], encoding="utf-8")
    again = run(adapter, *common)
    assert again.returncode == 0, again.stderr
    assert "tuned: 3 of 8 answers are already there" in again.stderr
    assert "base: 8 of 8 answers are already there" in again.stderr
    resumed = read_lines(results)
    assert [line["text"] for line in resumed] == [line["text"] for line in tuned]
    assert resumed[:3] == tuned[:3]
    after = read_json(folder / "finetuned_model_metrics.json")
    assert after["generation"]["generated_rows"] == 5
    base_after = read_json(folder / "base_model_metrics.json")
    assert base_after == metrics["base"]  # nothing new was generated: its speed is still that of the first run

    # Other settings: the earlier answers are kept under another name.
    other = run(adapter, *common[:-1], 4, "--only", "tuned", "--limit", 2)
    assert other.returncode == 0, other.stderr
    assert "held answers of other settings or rows" in other.stderr
    (kept,) = folder.glob("finetuned_model_results.before_*.jsonl")
    assert read_lines(kept) == resumed
    assert [line["row"] for line in read_lines(results)] == [1, 2, 2, 2]
    # Nor are the base's scores of all rows left beside the tuned model's of two.
    assert "base_model_metrics.json held scores of other rows or settings" in other.stderr
    (kept,) = folder.glob("base_model_metrics.before_*.json")
    assert read_json(kept) == metrics["base"]
    assert not (folder / "comparison.json").exists() and not (folder / ".lock").exists()


def test_one_line_errors(dataset, adapter, tmp_path):
    def refused(*arguments):
        done = run(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in done.stderr
        return line

    assert "name held-out rows with --dataset" in refused(adapter)
    assert "missing.jsonl" in refused(adapter, "--dataset", tmp_path / "missing.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(rows()[0]) + '\n{"messages": [\n', encoding="utf-8")
    line = refused(adapter, "--dataset", broken)
    assert "broken.jsonl" in line and "row 2" in line
    no_answers = tmp_path / "no_answers.jsonl"
    no_answers.write_text(json.dumps({"messages": [{"role": "user", "content": "x"}]}) + "\n", encoding="utf-8")
    assert "error" in refused(adapter, "--dataset", no_answers)
    assert "no category" in refused(adapter, "--suite", "bfcl:nothing")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "--output" in refused(adapter, "--dataset", dataset, "--output", tmp_path / "file")
    scores = tmp_path / "scores"
    assert "has room for" in refused(adapter, "--dataset", dataset, "--output", scores, "--max_new_tokens", "9999999")
    refused(tmp_path / "no_model", "--dataset", dataset, "--output", scores)
    assert not scores.exists()


def test_resuming_scores_anew_and_rewrites_in_order(dataset, adapter, tmp_path):
    """In one process, without Unsloth: three of eight answers are there, in another order, with stale verdicts."""
    from transformers import AutoModelForCausalLM

    from formats import get_format

    model, tokenizer = AutoModelForCausalLM.from_pretrained(adapter.parent / "base"), parts.tokenizer("smollm2")
    fmt = get_format("chatml", tokenizer)
    prompts = make_prompts(load_items([dataset]), tokenizer, fmt)
    decoding, settings, said = Decoding((2,), max_new_tokens=5, batch_size=3), {"model": "tiny"}, []
    path = tmp_path / "results.jsonl"

    def go():
        return run_model(model, tokenizer, fmt, prompts, decoding, path, settings, name="base", say=said.append)

    scored, cost = go()
    whole = read_lines(path)
    assert cost["generated_rows"] == 8 and said == []
    stale = [{**line, "verdicts": {"stale": True}} for line in (whole[5], whole[0], whole[2])]
    path.write_text("".join(json.dumps(line) + "\n" for line in stale), encoding="utf-8")
    rescored, cost = go()
    assert cost["generated_rows"] == 5 and said == ["base: 3 of 8 answers are already there"]
    without_time = [{k: v for k, v in line.items() if k != "latency_s"} for line in read_lines(path)]
    assert without_time == [{k: v for k, v in line.items() if k != "latency_s"} for line in whole]
    assert [s.verdicts for s in rescored] == [s.verdicts for s in scored]


def test_a_prompt_without_room_is_counted(dataset):
    tokenizer = parts.tokenizer("smollm2")
    from formats import get_format

    fmt = get_format("chatml", tokenizer)
    items = load_items([dataset])
    whole = make_prompts(items, tokenizer, fmt)
    assert len(whole.items) == 8 and not whole.refused
    longest = sorted(map(len, whole.input_ids))[-2]
    cut = make_prompts(items, tokenizer, fmt, longest=longest)
    assert len(cut.items) == 7
    ((item, reason),) = cut.refused
    assert (item.row, item.turn) == (2, 5) and "the model has room for" in reason


def test_room_for_answers(dataset):
    tokenizer, items = parts.tokenizer("smollm2"), load_items([dataset])
    assert room_for_answers(items, tokenizer) == 64
    items[1].expected_text = None
    items[1].expected_calls[0]["arguments"]["room"] = "hall " * 100
    assert 150 < room_for_answers(items, tokenizer) < 220
    items[1].expected_calls[0]["arguments"]["room"] = "hall " * 5000
    assert room_for_answers(items, tokenizer) == 1024
    assert room_for_answers(items[:1], tokenizer) == 256  # a labelled row has no gold answer


def test_results_files_are_never_overwritten(dataset, tmp_path):
    items = load_items([dataset])[:2]
    path = tmp_path / "results.jsonl"
    keys = [item.fingerprint() for item in items]
    settings = settings_hash({"temperature": 0})
    assert settings != settings_hash({"temperature": 1}) and settings == settings_hash({"temperature": 0})
    first = ResultsFile(path, settings, items)
    first.append({"item": keys[1], "settings": settings, "text": "b"})
    assert [line["text"] for line in read_lines(path)] == ["b"]  # there at once
    first.append({"item": keys[0], "settings": settings, "text": "a"})
    first.close()
    first.finish()
    assert [line["text"] for line in read_lines(path)] == ["a", "b"]
    same = ResultsFile(path, settings, items)
    assert same.set_aside is None and len(same.lines) == 2
    same.close()
    fewer = ResultsFile(path, settings, items[:1])  # b would be lost
    assert fewer.set_aside is not None and [line["text"] for line in read_lines(fewer.set_aside)] == ["a", "b"]
    assert [line["text"] for line in read_lines(path)] == ["a"]
    fewer.close()
    other = ResultsFile(path, settings_hash({"temperature": 1}), items)
    assert other.lines == {} and other.set_aside not in (None, fewer.set_aside) and read_lines(path) == []
    other.close()


def test_two_evaluations_of_one_folder(tmp_path):
    with alone_in(tmp_path):
        with pytest.raises(UserError, match="another evaluation is writing"), alone_in(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()  # the refused one took nothing away
    with alone_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_scores_of_the_other_side_stay_only_where_they_can_be_compared(tmp_path):
    def scores(side: str, items: str = "a", **settings) -> dict:
        settings = {"temperature": 0, "adapter_sha256": side, "batch_size": len(side), **settings}
        return {"data": {"items_sha256": items}, "settings": settings}

    path = tmp_path / "base_model_metrics.json"
    for left, kept in (
        (scores("base"), True), (scores("base", items="b"), False), (scores("base", temperature=1), False),
        ({}, False), ([], False),
    ):  # fmt: skip
        path.write_text(json.dumps(left), encoding="utf-8")
        (tmp_path / "comparison.json").touch()
        set_strangers_aside(tmp_path, {"tuned": scores("tuned")}, lambda _: None)
        assert path.exists() is kept and not (tmp_path / "comparison.json").exists()
    assert len(list(tmp_path.glob("*.before_*.json"))) == 4
    set_strangers_aside(tmp_path, {"tuned": scores("tuned")}, lambda _: None)  # nothing there


def test_whatever_decides_an_answer_is_in_its_settings(adapter, tmp_path):
    """A merged model made anew in its old folder, another scale in the adapter's config: their answers are others."""
    import shutil

    from transformers import AutoModelForCausalLM

    from finetune.evaluation.answer_settings import answer_settings
    from finetune.runs.find import find_run
    from formats import get_format

    for name in ("base", "adapter"):
        shutil.copytree(adapter.parent / name, tmp_path / name)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**read_json(config), "base_model_name_or_path": str(tmp_path / "base")}), "utf-8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fmt, decoding = get_format("chatml", parts.tokenizer("smollm2")), Decoding((2,), max_new_tokens=5)

    def settings(folder: str, side: str) -> dict:
        return answer_settings(find_run(tmp_path / folder), side, model, fmt, decoding)

    base, tuned = settings("adapter", "base"), settings("adapter", "tuned")
    assert {key for key in base if base[key] != tuned[key]} == {"adapter_sha256"}
    assert settings("base", "base") == base  # the same answers, whichever folder names the model
    config.write_text(json.dumps({**read_json(config), "lora_alpha": 8}), encoding="utf-8")
    assert settings("adapter", "tuned")["adapter_sha256"] != tuned["adapter_sha256"]
    assert settings("adapter", "base") == base
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert settings("base", "base")["base_sha256"] != base["base_sha256"]


def test_lines_of_a_results_file(dataset, tmp_path):
    """U+2028 is no end of a line of JSON; a killed run leaves half a line, anything else is not ours to drop."""
    items = load_items([dataset])[:2]
    keys = [item.fingerprint() for item in items]
    path = tmp_path / "results.jsonl"
    first = ResultsFile(path, "s", items)
    for key in keys:
        first.append({"item": key, "settings": "s", "text": "one\u2028two\x85three"})
    first.close()
    again = ResultsFile(path, "s", items)
    again.close()
    assert len(again.lines) == 2 and again.set_aside is None
    with path.open("a", encoding="utf-8") as file:
        file.write('{"item": "half')
    cut = ResultsFile(path, "s", items)
    cut.close()
    assert len(cut.lines) == 2 and cut.set_aside is None
    path.write_text("my own notes\n" + path.read_text("utf-8"), encoding="utf-8")
    mixed = ResultsFile(path, "s", items)
    mixed.close()
    assert len(mixed.lines) == 2 and mixed.set_aside.read_text("utf-8").startswith("my own notes\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_a_full_disk_is_one_line(dataset, tmp_path):
    items = load_items([dataset])[:1]
    results = ResultsFile(tmp_path / "results.jsonl", "s", items)
    results.file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(UserError, match="No space left on device; make room"):
        results.append({"item": items[0].fingerprint(), "settings": "s"})
    results.close()


def test_model_card_gets_the_scores_once(tmp_path):
    card = tmp_path / "README.md"
    assert not update_model_card(card, "# Base against tuned\n\nnothing")
    card.write_text(
        "# run\n\ntext\n\nEvaluation results, once `evaluate_lora.py` has run, lie there.\n", encoding="utf-8"
    )
    for number in ("one", "two"):
        assert update_model_card(card, f"# Base against tuned\n\n{number}\n\n## F1 of each tool\n")
    whole = "# run\n\ntext\n\n## Evaluation\n\ntwo\n\n### F1 of each tool\n"
    assert card.read_text("utf-8") == whole
    with card.open("ab") as file:
        file.write(b"\n## Licence\n\nCaf\xe9 only.\n\n## Thanks\n")  # written by hand, in another encoding
    assert update_model_card(card, "# Base against tuned\n\nthree\n")
    assert card.read_bytes() == b"# run\n\ntext\n\n## Evaluation\n\nthree\n\n## Licence\n\nCaf\xe9 only.\n\n## Thanks\n"


def test_table_of_one_model():
    from tests.test_scoring import answered, call, item

    metrics = {
        "tuned": compute_metrics([answered(item("call", call("set_lamp", room="hall")), call("set_lamp", room="hall"))])
    }
    table = comparison_markdown(metrics, {}, ["heading"])
    assert "| tool_name_accuracy | 1.000 | 1.000 to 1.000 |" in table
    assert "| set_lamp | 1 | 1.000 |" in table


def test_pictures_of_very_many_tools_and_of_odd_names(tmp_path, monkeypatch):
    """A suite has more tools than a picture has room for, and a dollar is no formula."""
    from PIL import Image

    from finetune.evaluation import report
    from tests.test_scoring import answered, call, item

    monkeypatch.setattr(report, "MOST", 4)  # a picture of 60 tools takes seconds

    def lamps(count: int) -> dict:
        calls = [call(f"$lamp_{i}$") for i in range(count)]
        tools = [{"type": "function", "function": {"name": one["name"]}} for one in calls]
        often = [answered(item("call", one, tools=tools, row=i), one) for i, one in enumerate(calls[:3])]
        return compute_metrics([*often, *[answered(item("call", one, tools=tools, row=9), calls[0]) for one in calls]])

    few, many = lamps(3), lamps(14)
    labels, counts = report._shown(many["confusion_matrix"])
    assert labels == ["$lamp_0$", "$lamp_1$", "$lamp_10$", "$lamp_2$", report.OTHERS]
    assert counts.sum() == np.sum(many["confusion_matrix"]["matrix"]) == 17
    assert counts[0].tolist() == [2, 0, 0, 0, 0] and counts[-1].tolist() == [10, 0, 0, 0, 0]
    assert report._shown(few["confusion_matrix"])[0] == ["$lamp_0$", "$lamp_1$", "$lamp_2$"]
    written = report.write_pictures({"base": few, "tuned": many}, tmp_path)
    assert [path.name for path in written] == ["confusion_matrix.png", "per_tool_f1.png"]
    for path in written:
        with Image.open(path) as picture:
            assert max(picture.size) < 2_000
    assert report.write_pictures({"tuned": {}}, tmp_path) == [] and not list(tmp_path.iterdir())


def test_arguments_are_checked():
    from evaluate_lora import build_parser
    from finetune.evaluation.folder import made

    for wrong in (["m", "--limit", "0"], ["m", "--temperature", "-1"], ["m", "--batch_size", "x"]):
        with pytest.raises(SystemExit):
            build_parser().parse_args(wrong)
    with pytest.raises(UserError, match="cannot write"), made(Path(__file__) / "below"):
        pass


def test_a_folder_is_left_only_with_something_in_it(tmp_path):
    from finetune.evaluation.folder import made

    (tmp_path / "mine").mkdir()
    for folder in ("mine", "new/below"):
        with made(tmp_path / folder):
            assert (tmp_path / folder).is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with made(tmp_path / "new" / "below"):
        (tmp_path / "new" / "below" / "scores").write_text("1")
    assert (tmp_path / "new" / "below" / "scores").is_file()
