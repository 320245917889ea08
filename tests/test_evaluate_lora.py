"""The script on a small random model: its files, resuming, errors."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from finetune.errors import UserError
from finetune.evaluation.folder import archive_incomparable_scores, exclusive_folder
from finetune.evaluation.items import load_items
from finetune.evaluation.metrics import compute_metrics
from finetune.evaluation.report import comparison_markdown, update_model_card
from finetune.evaluation.run import ResultsFile, answer_token_limit, make_prompts, run_model, settings_hash
from finetune.evaluation.scoring import score
from tests import parts
from tests.helpers import lazy
from tests.rows import LAMP, WRAPPED, chat
from tests.scored import answered, call, item
from tests.scripts import ROOT, run_script
from tests.tiny import tiny_llama

generation = lazy("finetune.generation.generate")
transformers = lazy("transformers")


def dim(room: str, **level) -> dict:
    call = {"type": "function", "function": {"name": "set_lamp", "arguments": json.dumps({"room": room, **level})}}
    return {"role": "assistant", "tool_calls": [call]}


def rows() -> list[dict]:
    """A call; calls in two steps with a final answer; a question back; a refusal; chat without tools; a label."""

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
    """An adapter on a random Llama of 0.8 M parameters with SmolLM2's tokenizer; it changes every answer."""
    from peft import LoraConfig, get_peft_model

    tokenizer = parts.tokenizer("smollm2")
    folder = tmp_path_factory.mktemp("models")
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    lora = LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder / "adapter"


def run(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return run_script("evaluate_lora.py", *arguments, cwd=cwd)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_load_items(dataset):
    items = load_items([dataset])
    assert [i.kind for i in items] == KINDS
    assert [(i.row, i.turn) for i in items] == [(6, 1), (1, 1), (2, 1), (2, 3), (2, 5), (3, 1), (4, 1), (5, 1)]
    assert items[0].label is True and items[0].expected_text is None
    assert len({i.fingerprint() for i in items}) == len(items)
    assert [i.row for i in load_items([dataset], limit=1)] == [1]
    with pytest.raises(UserError, match="weights are for training data"):
        load_items([f"{dataset}*0.5"])
    with pytest.raises(UserError, match="is given twice"):
        load_items([dataset, str(dataset)])


def test_empty_expected_answer_is_not_scored_as_text(tmp_path):
    """An empty answer would be an exact match of nothing."""
    row = chat({"role": "assistant", "content": ""}, tools=[LAMP])
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = load_items([tmp_path / "rows.jsonl"])
    verdicts = score(item, "", [], [])
    assert (item.kind, verdicts["no_call_correct"]) == ("irrelevant", True)
    assert not {"exact_match", "token_f1", "rouge_l"} & set(verdicts)


def test_script_scores_both_models_and_resumes(dataset, adapter):
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
    assert [message["role"] for message in base[3]["messages"]] == ["user", "assistant", "tool"]
    assert base[3]["messages"][-1] == {"role": "tool", "content": "ok"}
    assert [line["messages"] for line in base] == [line["messages"] for line in tuned]
    assert all(b["text"] != t["text"] for b, t in zip(base, tuned, strict=True))  # the adapter was on, and off

    metrics = {name: read_json(folder / f"{name}_model_metrics.json") for name in ("base", "finetuned")}
    for m in metrics.values():
        assert m["tool_name_accuracy"] == m["parameter_accuracy"] == 0.0
        assert m["irrelevance_accuracy"] == m["missing_parameter_accuracy"] == m["answer_accuracy"] == 1.0
        assert (m["items"], m["rows"], m["not_scored"]) == (8, 6, 0)
        assert m["generation"]["method"] == "shared_prefix" and m["generation"]["generated_rows"] == 8
        assert m["tokens_per_second"] > 0
    assert metrics["base"]["settings"]["adapter_sha256"] is None
    assert len(metrics["finetuned"]["settings"]["adapter_sha256"]) == 64
    table = (folder / "comparison.md").read_text("utf-8")
    assert "| tool_name_accuracy | 3 | 0.000 | 0.000 | +0.000 | +0.000 to +0.000 | 1.000 |" in table
    assert "tool_name_accuracy" in first.stdout and "difference" in first.stdout

    # Killed while it wrote its fourth answer.
    results = folder / "finetuned_model_results.jsonl"
    lines = results.read_text("utf-8").splitlines(keepends=True)
    results.write_text("".join(lines[:3]) + lines[3][:50], encoding="utf-8")
    again = run(adapter, *common)
    assert again.returncode == 0, again.stderr
    assert "tuned: 3 of 8 already answered" in again.stderr
    assert "base: 8 of 8 already answered" in again.stderr
    resumed = read_lines(results)
    assert [line["text"] for line in resumed] == [line["text"] for line in tuned]
    assert resumed[:3] == tuned[:3]
    after = read_json(folder / "finetuned_model_metrics.json")
    assert after["generation"]["generated_rows"] == 5
    base_after = read_json(folder / "base_model_metrics.json")
    assert base_after == metrics["base"]  # nothing was generated, so its speed is that of the first evaluation

    # Other settings: the earlier answers are archived.
    other = run(adapter, *common[:-1], 4, "--only", "tuned", "--limit", 2)
    assert other.returncode == 0, other.stderr
    assert "held answers of other settings or rows" in other.stderr
    (kept,) = folder.glob("finetuned_model_results.before_*.jsonl")
    assert read_lines(kept) == resumed
    assert [line["row"] for line in read_lines(results)] == [1, 2, 2, 2]
    # So are the base model's scores of all rows, beside the tuned model's of two.
    assert "base_model_metrics.json held scores of other rows or settings" in other.stderr
    (kept,) = folder.glob("base_model_metrics.before_*.json")
    assert read_json(kept) == metrics["base"]
    assert not (folder / "comparison.json").exists() and not (folder / ".lock").exists()


def test_script_errors_are_one_line(dataset, adapter, tmp_path):
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
    assert "max_new_tokens" in refused(adapter, "--dataset", dataset, "--output", scores, "--max_new_tokens", "9999999")
    refused(tmp_path / "no_model", "--dataset", dataset, "--output", scores)
    assert not scores.exists()


@pytest.fixture(scope="module")
def model(adapter):
    """The base model, loaded without Unsloth."""
    return transformers.AutoModelForCausalLM.from_pretrained(adapter.parent / "base")


@pytest.fixture(scope="module")
def prompts(dataset):
    return make_prompts(load_items([dataset]), *tokenizer_and_format())


def tokenizer_and_format():
    from formats import get_format

    tokenizer = parts.tokenizer("smollm2")
    return tokenizer, get_format("chatml", tokenizer)


def answers(model, prompts, path, said, **settings):
    decoding = generation.Decoding((2,), max_new_tokens=5, batch_size=3)
    return run_model(
        model, *tokenizer_and_format(), prompts, decoding, path, {"model": "tiny", **settings}, name="base",
        say=said.append,
    )  # fmt: skip


def test_resuming_scores_again_and_restores_the_order(model, prompts, tmp_path):
    """Three of eight answers are there, in another order, with stale verdicts."""
    said, path = [], tmp_path / "results.jsonl"
    scored, cost = answers(model, prompts, path, said)
    complete = read_lines(path)
    assert cost["generated_rows"] == 8 and said == []
    stale = [{**line, "verdicts": {"stale": True}} for line in (complete[5], complete[0], complete[2])]
    path.write_text("".join(json.dumps(line) + "\n" for line in stale), encoding="utf-8")
    rescored, cost = answers(model, prompts, path, said)
    assert cost["generated_rows"] == 5 and said == ["base: 3 of 8 already answered"]
    without_time = [{k: v for k, v in line.items() if k != "latency_s"} for line in read_lines(path)]
    assert without_time == [{k: v for k, v in line.items() if k != "latency_s"} for line in complete]
    assert [s.verdicts for s in rescored] == [s.verdicts for s in scored]
    again, cost = answers(model, prompts, path, said)
    assert (cost["generated_rows"], cost["method"], cost["tokens_per_second"]) == (0, None, None)
    assert [s.text for s in again] == [s.text for s in scored]


def test_make_prompts_counts_a_prompt_without_room(dataset, prompts):
    assert len(prompts.items) == 8 and not prompts.refused
    longest = sorted(map(len, prompts.input_ids))[-2]
    cut = make_prompts(load_items([dataset]), *tokenizer_and_format(), longest=longest)
    assert len(cut.items) == 7
    ((item, reason),) = cut.refused
    assert (item.row, item.turn) == (2, 5) and "the model has room for" in reason


def test_answer_token_limit(dataset):
    tokenizer, items = parts.tokenizer("smollm2"), load_items([dataset])
    assert answer_token_limit(items, tokenizer) == 64
    items[1].expected_text = None
    items[1].expected_calls[0]["arguments"]["room"] = "hall " * 100
    assert 150 < answer_token_limit(items, tokenizer) < 220
    items[1].expected_calls[0]["arguments"]["room"] = "hall " * 5000
    assert answer_token_limit(items, tokenizer) == 1024
    assert answer_token_limit(items[:1], tokenizer) == 256  # a labelled row has no expected answer


def test_results_file_is_never_overwritten(dataset, tmp_path):
    items = load_items([dataset])[:2]
    path = tmp_path / "results.jsonl"
    keys = [item.fingerprint() for item in items]
    settings = settings_hash({"temperature": 0})
    assert settings != settings_hash({"temperature": 1}) and settings == settings_hash({"temperature": 0})
    first = ResultsFile(path, settings, items)
    first.append({"item": keys[1], "settings": settings, "text": "b", "latency_s": 0.1})
    assert [line["text"] for line in read_lines(path)] == ["b"]  # written at once
    first.append({"item": keys[0], "settings": settings, "text": "a", "latency_s": 0.1})
    first.close()
    first.rewrite()
    assert [line["text"] for line in read_lines(path)] == ["a", "b"]
    same = ResultsFile(path, settings, items)
    assert same.archived is None and len(same.lines) == 2
    same.close()
    fewer = ResultsFile(path, settings, items[:1])  # b would be lost
    assert fewer.archived is not None and [line["text"] for line in read_lines(fewer.archived)] == ["a", "b"]
    assert [line["text"] for line in read_lines(path)] == ["a"]
    fewer.close()
    other = ResultsFile(path, settings_hash({"temperature": 1}), items)
    assert other.lines == {} and other.archived not in (None, fewer.archived) and read_lines(path) == []
    other.close()


def test_exclusive_folder_refuses_a_second_evaluation(tmp_path):
    with exclusive_folder(tmp_path):
        with pytest.raises(UserError, match="another evaluation is writing"), exclusive_folder(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()  # the second one did not remove it
    with exclusive_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_archive_incomparable_scores(tmp_path):
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
        archive_incomparable_scores(tmp_path, {"tuned": scores("tuned")}, lambda _: None)
        assert path.exists() is kept and not (tmp_path / "comparison.json").exists()
    assert len(list(tmp_path.glob("*.before_*.json"))) == 4
    archive_incomparable_scores(tmp_path, {"tuned": scores("tuned")}, pytest.fail)  # nothing there


def test_answer_settings_change_with_the_files(adapter, tmp_path):
    """A model rebuilt under the same name and another scale in the adapter's config change the answers."""
    from finetune.evaluation.answer_settings import answer_settings
    from finetune.runs.find import find_run

    for name in ("base", "adapter"):
        shutil.copytree(adapter.parent / name, tmp_path / name)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**read_json(config), "base_model_name_or_path": str(tmp_path / "base")}), "utf-8")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fmt, decoding = tokenizer_and_format()[1], generation.Decoding((2,), max_new_tokens=5)

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


def test_results_file_archives_unknown_lines(dataset, tmp_path):
    """U+2028 does not end a line; half a line of a killed evaluation is dropped, anything else is archived."""
    items = load_items([dataset])[:2]
    keys = [item.fingerprint() for item in items]
    path = tmp_path / "results.jsonl"
    first = ResultsFile(path, "s", items)
    for key in keys:
        first.append({"item": key, "settings": "s", "text": "one\u2028two\x85three", "latency_s": 0.5})
    first.close()
    again = ResultsFile(path, "s", items)
    again.close()
    assert len(again.lines) == 2 and again.archived is None
    with path.open("a", encoding="utf-8") as file:
        file.write('{"item": "half')
    cut = ResultsFile(path, "s", items)
    cut.close()
    assert len(cut.lines) == 2 and cut.archived is None
    path.write_text("my own notes\n" + path.read_text("utf-8"), encoding="utf-8")
    mixed = ResultsFile(path, "s", items)
    mixed.close()
    assert len(mixed.lines) == 2 and mixed.archived.read_text("utf-8").startswith("my own notes\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full of Linux")
def test_results_file_on_a_full_disk(dataset, tmp_path):
    items = load_items([dataset])[:1]
    results = ResultsFile(tmp_path / "results.jsonl", "s", items)
    results.file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(UserError, match="No space left on device; free some space"):
        results.append({"item": items[0].fingerprint(), "settings": "s"})
    results.close()


def test_update_model_card(tmp_path):
    card = tmp_path / "README.md"
    assert not update_model_card(card, "# Base against tuned\n\nnothing")
    card.write_text(
        "# run\n\ntext\n\nEvaluation results, once `evaluate_lora.py` has run, lie there.\n", encoding="utf-8"
    )
    for number in ("one", "two"):
        assert update_model_card(card, f"# Base against tuned\n\n{number}\n\n## F1 of each tool\n")
    expected = "# run\n\ntext\n\n## Evaluation\n\ntwo\n\n### F1 of each tool\n"
    assert card.read_text("utf-8") == expected
    with card.open("ab") as file:
        file.write(b"\n## Licence\n\nCaf\xe9 only.\n\n## Thanks\n")  # written by hand in another encoding
    assert update_model_card(card, "# Base against tuned\n\nthree\n")
    assert card.read_bytes() == b"# run\n\ntext\n\n## Evaluation\n\nthree\n\n## Licence\n\nCaf\xe9 only.\n\n## Thanks\n"


def test_comparison_markdown_of_one_model():
    metrics = {
        "tuned": compute_metrics([answered(item("call", call("set_lamp", room="hall")), call("set_lamp", room="hall"))])
    }
    table = comparison_markdown(metrics, {}, ["heading"])
    assert "| tool_name_accuracy | 1 | 1.000 | 1.000 to 1.000 |" in table
    assert "| set_lamp | 1 | 1.000 |" in table and "not scored" not in table
    metrics["tuned"]["not_scored"] = 12
    assert "heading\n12 further answers not scored: longer" in comparison_markdown(metrics, {}, ["heading"])


def test_pictures_of_many_tools_and_of_odd_names(tmp_path, monkeypatch):
    """Beyond the maximum the rarest tools are one line; a dollar sign does not begin a formula."""
    from matplotlib.figure import Figure
    from PIL import Image

    from finetune.evaluation import report

    monkeypatch.setattr(report, "MAX_PICTURED_TOOLS", 4)  # a picture of 60 tools takes seconds
    labels, counts = [], []

    def record(figure: Figure, *arguments, **options):
        labels.append([[label.get_text() for label in axis.get_yticklabels()] for axis in figure.axes])
        counts.append([{text.get_position(): int(text.get_text()) for text in axis.texts} for axis in figure.axes])
        return savefig(figure, *arguments, **options)

    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", record)

    def lamps(count: int) -> dict:
        calls = [call(f"$lamp_{i}$") for i in range(count)]
        tools = [{"type": "function", "function": {"name": one["name"]}} for one in calls]
        often = [answered(item("call", one, tools=tools, row=i), one) for i, one in enumerate(calls[:3])]
        return compute_metrics([*often, *[answered(item("call", one, tools=tools, row=9), calls[0]) for one in calls]])

    written = report.write_pictures({"base": lamps(3), "tuned": lamps(14)}, tmp_path)
    assert [path.name for path in written] == ["confusion_matrix.png", "per_tool_f1.png"]
    for path in written:
        with Image.open(path) as picture:
            assert max(picture.size) < 2_000
    few, many = labels[0]
    assert few == many == ["$lamp_0$", "$lamp_1$", "$lamp_10$", "$lamp_2$", report.OTHERS]
    assert counts[0][1] == {(0, 0): 2, (1, 1): 1, (3, 3): 1, (0, 1): 1, (0, 2): 1, (0, 3): 1, (0, 4): 10}
    assert report.write_pictures({"tuned": {}}, tmp_path) == [] and not list(tmp_path.iterdir())


def test_parser_refuses_wrong_numbers():
    from evaluate_lora import build_parser

    for wrong in (["m", "--limit", "0"], ["m", "--temperature", "-1"], ["m", "--batch_size", "x"]):
        with pytest.raises(SystemExit):
            build_parser().parse_args(wrong)


def test_exclusive_folder_is_removed_when_empty(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in ("mine", "new/below"):
        with exclusive_folder(tmp_path / folder):
            assert (tmp_path / folder).is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with exclusive_folder(tmp_path / "new" / "below"):
        (tmp_path / "new" / "below" / "scores").write_text("1")
    assert (tmp_path / "new" / "below" / "scores").is_file()
    with pytest.raises(UserError, match="cannot write"), exclusive_folder(Path(__file__) / "below"):
        pass
