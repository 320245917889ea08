"""export_lora.py on a small finished run: what it writes, what llama.cpp computes with it, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import export_lora
from finetune.errors import UserError
from finetune.evaluation.answer_settings import adapter_hash
from finetune.export.gguf import convert, find_tools, llama_cpp_template, pin_variables, read_metadata, tools_folder
from finetune.export.hub import publish
from finetune.export.llama_check import apply_template
from finetune.export.targets import Job, output_folder
from finetune.files import atomic_directory
from finetune.runs.find import find_run
from formats import FORMATS, choose_format
from formats.base import clean_messages, render_messages
from tests import ollama, parts
from tests.exported import make_run
from tests.formats import public_templates
from tests.formats.cases import ROWS
from tests.scripts import ROOT, run_script
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def exports(run_folder) -> tuple[Path, dict[str, str]]:
    """(folder of all exports, stderr of each); also of copies of the run: with a 4-bit base, with a NaN weight."""
    if not (tools_folder() / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's tools are not installed: make install-test")
    four_bit, broken = run_folder.with_name("four_bit"), run_folder.with_name("nan")
    for copy in (four_bit, broken):
        shutil.copytree(run_folder, copy)
    change_config(four_bit, load_in_4bit=True)
    make_nan(broken / "final_model" / "adapter_model.safetensors")
    lines = {
        "merged": [run_folder, "--to", "merged"],
        "gguf": [run_folder, "--to", "gguf", "--quantization", "f16,q8_0,q4_k_m"],
        "again": [run_folder, "--to", "merged"],
        "ollama": [run_folder, "--to", "ollama", "--quantization", "f16"],
        "four_bit": [four_bit, "--to", "merged", "--dtype", "float32"],
        "nan": [broken, "--to", "merged"],
    }
    results = {name: run_script("export_lora.py", *arguments) for name, arguments in lines.items()}
    said = {name: result.stderr for name, result in results.items()}
    codes = {name: result.returncode for name, result in results.items()}
    assert codes == {"merged": 0, "gguf": 0, "again": 2, "ollama": 0, "four_bit": 0, "nan": 2}, said
    return run_folder / "exports", said


def change_config(folder: Path, **entries) -> None:
    path = folder / "experiment_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **entries}), encoding="utf-8")


def make_nan(path: Path) -> None:
    """Make one weight of the adapter NaN."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path)


def logits(model, ids: list[int]):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


PROMPT = "<|im_start|>user\nWeather in Turin?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def adapter_logprobs(run_folder):
    """(ids, log-probabilities of base + adapter, of the base), through PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = json.loads((run_folder / "experiment_config.json").read_text("utf-8"))["base_model"]
    ids = parts.tokenizer("smollm2")(PROMPT)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    of_base = logits(model, ids)
    return ids, logits(PeftModel.from_pretrained(model, run_folder / "final_model").eval(), ids), of_base


def test_merged_model_answers_as_the_adapter(exports, run_folder, adapter_logprobs):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder, said = exports
    model = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert str(model.dtype) == "torch.bfloat16"
    ids, adapted, base = adapter_logprobs
    merged = logits(model, ids)
    rounding, change = (merged - adapted).abs().max(), (base - adapted).abs().max()
    assert rounding < 0.1 and change > 5 * rounding
    trained = (run_folder / "final_model" / "chat_template.jinja").read_text("utf-8")
    assert (folder / "merged" / "chat_template.jinja").read_text("utf-8") == trained
    assert AutoTokenizer.from_pretrained(folder / "merged")(PROMPT)["input_ids"] == ids
    assert 2 in GenerationConfig.from_pretrained(folder / "merged").eos_token_id
    assert "of 4 prompts" in said["merged"]
    assert not [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".bin"]


def test_4_bit_base_is_merged_dequantised(exports, run_folder, adapter_logprobs):
    """The saved weights are the dequantised ones plus the adapter's product, number for number."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from safetensors.torch import load_file

    assert "trained in 4 bits" in exports[1]["four_bit"]
    merged = load_file(run_folder.with_name("four_bit") / "exports" / "merged" / "model.safetensors")
    base = load_file(
        Path(json.loads((run_folder / "experiment_config.json").read_text("utf-8"))["base_model"]) / "model.safetensors"
    )
    adapter = load_file(run_folder / "final_model" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"  # without an adapter
    quantised, state = quantize_4bit(base[name], quant_type="nf4", compress_statistics=True)
    assert torch.allclose(merged[name], dequantize_4bit(quantised, state).float(), atol=1e-5)
    assert not torch.allclose(merged[name], base[name], atol=1e-4)
    name = "model.layers.0.self_attn.q_proj.weight"
    quantised, state = quantize_4bit(base[name], quant_type="nf4", compress_statistics=True)
    down, up = (adapter[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
    wanted = dequantize_4bit(quantised, state).float() + 48 / 12 * (up @ down)
    assert torch.allclose(merged[name], wanted, atol=1e-4)


def test_nan_adapter_is_refused_and_leaves_nothing(exports, run_folder):
    _, said = exports
    assert said["nan"].count("error: ") == 1
    folder = run_folder.with_name("nan") / "exports"
    assert not list(folder.rglob("*.safetensors")) and not [p for p in folder.iterdir() if p.name.endswith(".part")]


def test_existing_export_is_not_overwritten(exports):
    assert "exists already; replace it with --overwrite" in exports[1]["again"]


def test_gguf_answers_as_transformers(exports, adapter_logprobs):
    """First-token log-probabilities through llama.cpp: 0.05 nats for f16, half a nat for the quantised files."""
    from finetune.export.llama_check import llama_server

    folder, said = exports
    ids, adapted, _ = adapter_logprobs
    wanted = adapted[-1].topk(5)
    for kind, tolerance in (("f16", 0.05), ("q8_0", 0.5), ("q4_k_m", 2.0)):
        assert f"run-{kind}.gguf: first-token log-probabilities" in said["gguf"]
        with llama_server(folder / "gguf" / f"run-{kind}.gguf", context=256) as server:
            request = {"prompt": ids, "max_tokens": 1, "logprobs": 200, "n_probs": 200, "temperature": 0}
            answer = server.handle_completions(request)
        top = {e["id"]: e["logprob"] for e in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
        for token, value in zip(wanted.indices.tolist(), wanted.values.tolist(), strict=True):
            assert abs(top[token] - value) < tolerance, kind


def test_gguf_carries_the_trained_template(exports, run_folder):
    trained = (run_folder / "final_model" / "chat_template.jinja").read_text("utf-8")
    assert trained.startswith("{%- if default_system is not defined %}")
    found = read_metadata(exports[0] / "gguf" / "run-q8_0.gguf")
    assert found["tokenizer.chat_template"] == pin_variables(trained)
    assert found["tokenizer.ggml.eos_token_id"] == 2


def test_pinned_variables_override_the_server():
    import jinja2

    template = FORMATS["llama3"].with_kwargs(odd="a {%- endif %} b").pinned_template()
    text = pin_variables(template)
    assert "is not defined %}{%- set date_string" not in text
    render = jinja2.Environment().from_string("{%- set x = 1 %}" + text.split("{#-")[0] + "{{ date_string }}{{ odd }}")
    assert render.render(date_string="today") == "26 Jul 2024a {%- endif %} b"


LLAMA_CASES = [
    *("system", "turns", "single_call", "call_and_result", "parallel", "text_and_call", "steps", "nested_arguments"),
    *("typed_arguments", "korean_call", "newline_first", "spaces", "path_name", "jinja"),
]


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.template])
def test_llama_cpp_renders_the_same_prompts(name, exports):
    """llama.cpp's own Jinja on the template as it is exported: the same text, or both refuse."""
    from finetune.export.llama_check import llama_server

    tokenizer = parts.tokenizer("smollm2")
    fmt = replace(FORMATS[name], template=llama_cpp_template(FORMATS[name]), template_kwargs={})
    same = 0
    with llama_server(exports[0] / "gguf" / "run-q8_0.gguf", context=64, chat_template=fmt.template) as server:
        for case in LLAMA_CASES:
            if name == "llama3-pythonic" and any(m.get("tool_calls") for m in ROWS[case]["messages"][:-1]):
                continue  # its template writes values with %r, which llama.cpp does not support: the export warns
            messages = list(ROWS[case]["messages"])
            while messages[-1]["role"] == "assistant":
                messages.pop()
            messages = clean_messages(messages, fmt)
            try:
                ours = render_messages(messages, ROWS[case]["tools"], fmt, tokenizer, True)
            except Exception:  # templates raise anything
                ours = None
            assert apply_template(server.listening_address, messages, ROWS[case]["tools"]) == ours, case
            same += ours is not None
    assert same >= (5 if name in ("plain", "mistral-v1", "llama3-pythonic") else 11)


@pytest.mark.parametrize("name", ["llama3-function", "kanana"])
def test_llama_cpp_reads_calls_in_function_tags(name, exports):
    """It parses what it is to continue too; without the mark in the template every answer with tools is refused."""
    from finetune.export.llama_check import CALL, llama_server

    written = {"role": "assistant", "content": '<function=weather>{"city": "Turin", "days": 2}</function>'}
    request = {
        "messages": [CALL["messages"][0], written], "tools": CALL["tools"], "temperature": 0, "max_tokens": 2,
        "logit_bias": [[parts.tokenizer("smollm2").eos_token_id, 1e6]],
    }  # fmt: skip
    file, template = exports[0] / "gguf" / "run-q8_0.gguf", llama_cpp_template(FORMATS[name])
    with llama_server(file, context=1024, chat_template=template) as server:
        (call,) = server.handle_chat_completions(request)["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("weather", '{"city": "Turin", "days": 2}')


def test_gguf_export_says_whether_llama_cpp_reads_its_calls(exports, monkeypatch):
    from dataclasses import replace
    from functools import partial

    from finetune.export import llama_check
    from finetune.export.merged import MergedModel

    file, merged = (
        exports[0] / "gguf" / "run-q8_0.gguf",
        MergedModel(None, parts.tokenizer("smollm2"), FORMATS["chatml"]),
    )
    assert "did not read" not in exports[1]["gguf"]
    assert llama_check.unread_answers(file, merged) == []
    other = partial(llama_check.llama_server, chat_template=FORMATS["gemma"].template)
    monkeypatch.setattr(llama_check, "llama_server", other)
    assert llama_check.unread_answers(file, merged) == ["a call", "text with braces"]
    template = FORMATS["llama3"].template.replace("<|eot_id|>", "<|im_end|>")  # its calls have no opening text
    llama3 = replace(FORMATS["llama3"], template=template, end_of_turn=("<|im_end|>",), tokens=())
    merged = MergedModel(None, parts.tokenizer("smollm2"), llama3)
    untagged = partial(other.func, chat_template=llama_cpp_template(llama3))
    monkeypatch.setattr(llama_check, "llama_server", untagged)
    assert llama_check.unread_answers(file, merged) == ["text with braces"]
    tokenizer = public_templates.load("gptoss", "bytes")  # llama.cpp continues its answers in the final channel
    merged = MergedModel(None, tokenizer, choose_format(tokenizer)[0])
    monkeypatch.setattr(llama_check, "llama_server", partial(other.func, chat_template=tokenizer.chat_template))
    assert llama_check.unread_answers(file, merged) == []


def test_llama_cpp_server_can_be_closed_at_once(exports):
    """In a process of its own: where it waits forever, it cannot be interrupted."""
    code = "import sys\nfrom pathlib import Path\nfrom finetune.export.llama_check import llama_server\n"
    code += "for _ in range(8):\n    with llama_server(Path(sys.argv[1]), context=64): pass"
    file = exports[0] / "gguf" / "run-q8_0.gguf"
    subprocess.run([sys.executable, "-c", code, file], check=True, timeout=120, cwd=ROOT)


def test_gguf_names_further_ends_of_turn(exports, tmp_path):
    """Without them llama.cpp does not stop there; there are three places."""
    end = parts.tokenizer("smollm2").eos_token_id
    (path,) = convert(exports[0] / "merged", tmp_path, "m", ["q8_0"], find_tools(None), [end, 7, 5, 9])
    header = read_metadata(path)
    assert [header[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")] == [end, 7, 5]


def test_ollama_folder_is_complete(exports):
    folder = exports[0] / "ollama"
    text = (folder / "Modelfile").read_text("utf-8")
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "run-f16.gguf"]
    assert text.startswith("FROM ./run-f16.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 1024" in text
    template = text.split('"""')[1]
    row = {"messages": [{"role": "user", "content": "hi"}], "tools": ROWS["single_call"]["tools"]}
    trained = (exports[0] / "merged" / "chat_template.jinja").read_text("utf-8")
    ours = parts.tokenizer("smollm2").apply_chat_template(
        row["messages"], tools=row["tools"], chat_template=trained, add_generation_prompt=True, tokenize=False
    )
    assert ollama.render(template, [row]) == [ours]


def test_vllm_folder_serves_adapter_and_template(run_folder, tmp_path, capsys):
    assert export_lora.main([str(run_folder), "--to", "vllm", "--output", str(tmp_path / "v"), "--name", "house"]) == 0
    script = (tmp_path / "v" / "serve.sh").read_text("utf-8")
    assert "--tool-call-parser sandwich" in script and "--max-lora-rank 16" in script
    assert "--lora-modules house=./adapter" in script and "--max-model-len 1024" in script
    assert "--generation-config ./adapter" in script
    assert (tmp_path / "v" / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "v" / "chat_template.jinja").read_text("utf-8") == (
        run_folder / "final_model" / "chat_template.jinja"
    ).read_text("utf-8")


def test_hub_dry_run_lists_files_and_uploads_nothing(run_folder, tmp_path, capsys, monkeypatch):
    import yaml

    monkeypatch.delenv("HF_TOKEN", raising=False)
    scores = run_folder / "evaluation"
    scores.mkdir(exist_ok=True)
    for name, value in (("base_model", 0.1), ("finetuned_model", 0.9)):
        metrics = {
            "tool_name_accuracy": value,
            "items": 7,
            "intervals_95": {"tool_name_accuracy": [value - 0.1, value]},
        }
        (scores / f"{name}_metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    target = tmp_path / "hub"
    arguments = [str(run_folder), "--to", "hub", "--output", str(target), "--repo_id", "me/house"]
    assert export_lora.main(arguments) == 0
    captured = capsys.readouterr()
    assert "nothing was uploaded: that needs a token" in captured.err
    listed = {line.split()[-1] for line in captured.out.splitlines()[:-1]}
    assert {"README.md", "loss.png", "adapter_model.safetensors", "chat_template.jinja"} <= listed
    assert listed == {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    card = (target / "README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "base" and front["library_name"] == "peft"
    assert front["model-index"][0]["results"][0]["metrics"] == [{"type": "tool_name_accuracy", "value": 0.9}]
    assert "| tool_name_accuracy | 0.100 | 0.900 | 0.800 to 0.900 |" in card and "![Training loss" in card
    for path in [*target.glob("*.json"), *target.glob("*.md")]:
        assert str(run_folder.parents[1]) not in path.read_text("utf-8"), path


@pytest.mark.parametrize(
    ("base", "public"),
    [
        ("/data/models: new/llama", "llama"),
        ("@scope/model", "@scope/model"),
        ("org/model # 1", "org/model # 1"),
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_front_matter_is_valid_for_any_base(base, public, run_folder):
    import yaml

    from finetune.runs.experiment import Experiment
    from finetune.runs.model_card import model_card

    experiment = Experiment.open(run_folder)
    experiment.config["base_model"] = base
    card = model_card(experiment)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == public
    assert f"LoRA adapter for `{public}`" in card and "/data" not in card


class FakeHub:
    """Records what HfApi would upload."""

    def __init__(self, token):
        self.token = token

    def create_repo(self, repository, private, exist_ok):
        self.repository = (repository, private)

    def upload_folder(self, folder_path, repo_id, allow_patterns):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        assert all(any(fnmatchcase(name, pattern) for pattern in allow_patterns) for name in files)
        FakeHub.uploads.append((self.token, self.repository, files))
        return f"https://huggingface.co/{repo_id}"


def test_both_upload_commands_publish_the_same_files(run_folder, tmp_path, capsys, monkeypatch):
    """train_lora.py --push_to_hub calls `publish`; a local base has no public name and is refused by both."""
    FakeHub.uploads = []
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy, ignore=shutil.ignore_patterns("exports", "evaluation"))
    arguments = [str(copy), "--to", "hub", "--repo_id", "me/house"]
    assert export_lora.main(arguments) == 2
    assert "is a local path, which nobody else can load" in capsys.readouterr().err
    change_config(copy, base_model="org/base")
    assert export_lora.main(arguments) == 0
    publish(copy, "me/house")
    (token, repository, exported), again = FakeHub.uploads
    assert (token, repository) == ("hf_abcdefghij", ("me/house", True)) and again == (token, repository, exported)
    assert json.loads(exported["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert str(run_folder.parents[1]).encode() not in b"".join(exported.values())


def test_scores_of_another_adapter_are_omitted(run_folder, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy, ignore=shutil.ignore_patterns("exports", "evaluation"))
    for place, known, value in ((copy, "of the adapter before", 0.1), (copy / "final_model", None, 0.9)):
        (place / "evaluation").mkdir()
        settings = {"adapter_sha256": known or adapter_hash(copy / "final_model")}
        scores = {"tool_name_accuracy": value, "items": 7, "intervals_95": {}, "settings": settings}
        (place / "evaluation" / "finetuned_model_metrics.json").write_text(json.dumps(scores), encoding="utf-8")
        (place / "evaluation" / "comparison.md").write_text(f"scores {value}\n", encoding="utf-8")
    assert export_lora.main([str(copy), "--to", "hub"]) == 0
    said = capsys.readouterr()
    assert "omitted: the scores in" in said.err and "finetuned_model_metrics.json" not in said.out
    hub = copy / "exports" / "hub"
    assert "| tool_name_accuracy | 0.900 |" in (hub / "README.md").read_text("utf-8")
    assert (hub / "evaluation.md").read_text("utf-8") == "scores 0.9\n" and not (hub / "evaluation").exists()
    shutil.rmtree(copy / "final_model" / "evaluation")
    assert export_lora.main([str(copy), "--to", "hub", "--overwrite"]) == 0
    assert "tool_name_accuracy" not in (hub / "README.md").read_text("utf-8") and not (hub / "evaluation.md").exists()
    (copy / "evaluation" / "base_model_metrics.json").write_text("[]", encoding="utf-8")
    assert export_lora.main([str(copy), "--to", "hub", "--overwrite"]) == 2
    assert "base_model_metrics.json: [] is not of type 'object'" in capsys.readouterr().err


def test_token_in_a_file_stops_the_upload(run_folder, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy, ignore=shutil.ignore_patterns("exports"))
    (copy / "final_model" / "notes.txt").write_text("not published: hf_abcdefghij", encoding="utf-8")
    template = copy / "final_model" / "chat_template.jinja"
    template.write_text(f"{template.read_text(encoding='utf-8')}{{# hf_abcdefghij #}}", encoding="utf-8")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij\n")  # as a secret's file ends
    assert export_lora.main([str(copy), "--to", "hub"]) == 2
    error = capsys.readouterr().err
    assert "chat_template.jinja contains your Hugging Face token" in error and "hf_abcdefghij" not in error
    assert not (copy / "exports" / "hub").exists()


@pytest.mark.parametrize("token", ["hf_abc\r\ndefghij", "hf_abc defghij", "hf_abcdéfghij"])
def test_invalid_token_is_never_printed(token, run_folder, tmp_path, capsys, monkeypatch):
    """The HTTP library would say: illegal header value b'Bearer hf_…'."""
    monkeypatch.setenv("HF_TOKEN", token)
    arguments = ["--to", "hub", "--output", str(tmp_path / "hub"), "--repo_id", "me/house"]
    assert export_lora.main([str(run_folder), *arguments]) == 2
    said = capsys.readouterr()
    assert "set HF_TOKEN again" in said.err and "hf_" not in said.err + said.out
    with pytest.raises(UserError, match="set HF_TOKEN again") as raised:
        publish(run_folder, "me/house")
    assert "hf_" not in str(raised.value)


def test_tools_are_found_in_a_named_folder(tmp_path, monkeypatch):
    (tmp_path / "build" / "bin").mkdir(parents=True)
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    program = tmp_path / "build" / "bin" / ("llama-quantize.exe" if os.name == "nt" else "llama-quantize")
    program.write_text("")
    program.chmod(0o755)
    for tools in (find_tools(tmp_path), _with_variable(monkeypatch, tmp_path)):
        assert tools.convert == [sys.executable, str(tmp_path / "convert_hf_to_gguf.py")]
        assert tools.quantize == [str(program)]
    with pytest.raises(UserError, match=r"has no convert_hf_to_gguf\.py"):
        find_tools(tmp_path / "build")


def _with_variable(monkeypatch, folder: Path):
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    return find_tools(None)


def test_missing_tools_are_one_line_with_a_remedy(run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("finetune.export.gguf.tools_folder", lambda: tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    assert export_lora.main([str(run_folder), "--to", "gguf", "--output", str(tmp_path / "g")]) == 2
    error = capsys.readouterr().err
    assert "pip install --no-deps --target" in error and "requirements/llama_cpp.txt" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "g").exists()


def test_unknown_template_is_refused_before_the_merge(run_folder, tmp_path, capsys, monkeypatch):
    if not (tools_folder() / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's tools are not installed: make install-test")
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy, ignore=shutil.ignore_patterns("exports"))
    with (copy / "final_model" / "chat_template.jinja").open("a", encoding="utf-8") as template:
        template.write("of an older version")
    monkeypatch.setattr("finetune.export.ollama.write_gguf", lambda *_: pytest.fail("merged first"))
    assert export_lora.main([str(copy), "--to", "ollama"]) == 2
    assert "another version of the chatml template" in capsys.readouterr().err


def test_old_export_stays_until_the_new_one_is_complete(tmp_path):
    target = tmp_path / "exports" / "merged"
    target.mkdir(parents=True)
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(target, replace=True) as folder:
        (folder / "new").write_text("half")
        raise RuntimeError
    assert [path.name for path in target.parent.iterdir()] == ["merged"]
    assert (target / "old").is_file()
    with atomic_directory(target, replace=True) as folder:
        (folder / "new").write_text("whole")
    assert [path.name for path in target.parent.rglob("*")] == ["merged", "new"]


def test_old_export_survives_an_interrupted_rename(tmp_path, monkeypatch):
    target = tmp_path / "merged"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def interrupted(path: Path, to: Path) -> Path:
        if path.suffix == ".part":
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directory(target, replace=True):
        pass
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["merged", "merged/old"]


@pytest.mark.skipif(os.name == "nt", reason="simulates a full disk by a limit on file sizes")
def test_full_disk_is_one_line(tmp_path):
    import resource

    import torch
    from safetensors.torch import save_file

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with (
            pytest.raises(UserError, match="No space left on device"),
            atomic_directory(tmp_path / "merged", replace=True) as folder,
        ):
            save_file({"weights": torch.zeros(100_000)}, folder / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_overwriting_replaces_only_exports(tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    assert output_folder("model", "gguf", photographs, overwrite=True) == photographs  # an empty folder
    (photographs / "one.jpg").touch()
    with pytest.raises(UserError, match="is not one of gguf"):
        output_folder("model", "gguf", photographs, overwrite=True)
    (photographs / "model-q8_0.gguf").touch()
    assert output_folder("model", "gguf", photographs, overwrite=True) == photographs


@pytest.mark.parametrize("output", [".", "..", "final_model"])
def test_overwriting_the_run_is_refused(output, run_folder):
    with pytest.raises(UserError, match="would delete"):
        output_folder(run_folder, "merged", run_folder / output, overwrite=True)


def test_float32_compute_keeps_the_weights():
    import torch

    from finetune.export.llama_check import float32_compute
    from finetune.export.merged import log_probabilities
    from finetune.models.bundled import smollm2_dir
    from finetune.models.loading import load_tokenizer
    from tests.tiny import tiny_llama

    model = tiny_llama(load_tokenizer(str(smollm2_dir()))).bfloat16().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prompts = [list(range(40, 60))]
    with float32_compute(model):
        found = log_probabilities(model, prompts)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    coarse = log_probabilities(model, prompts)
    exact = log_probabilities(model.float(), prompts)
    assert torch.equal(found[0], exact[0])
    assert not torch.allclose(coarse[0], exact[0], atol=1e-4)


def test_gguf_of_a_sentencepiece_vocabulary_splits_as_the_tokenizer(tmp_path, capsys):
    """With the base's tokenizer.model llama.cpp makes the same tokens; without it the export says that it does not."""
    pytest.importorskip("xllamacpp")
    package = Path(pytest.importorskip("mistral_common").__file__).parent
    from finetune.export.gguf import write_gguf

    if not (tools_folder() / "convert_hf_to_gguf.py").is_file():
        pytest.skip("requirements/llama_cpp.txt is not installed")
    tokenizer, base = parts.tokenizer("mistral-v3"), tmp_path / "base"
    tiny_llama(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    for name in ("without", "with"):
        (tmp_path / name).mkdir()
        write_gguf(Job(find_run(base), tmp_path / name, "m"), ["f32"], find_tools(None, ["f32"]))
        assert ("splits prompts into other tokens" in capsys.readouterr().err) == (name == "without")
        shutil.copy(package / "data" / "mistral_instruct_tokenizer_240323.model.v3", base / "tokenizer.model")
