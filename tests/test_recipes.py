"""The commands of docs/recipes/ as they are written, in the formats of the recipes.

Folders with the names that models and data sets have on the Hub hold tiny models with the real tokenizers of their
families, and the sample rows.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from formats import FORMATS
from tests import parts
from tests.scripts import ROOT, run_script
from tests.tiny import tiny_llama
from tests.training_runs import config_of

# Kanana's tokenizer has Llama 3's vocabulary. Its template may differ from the served one: this one writes calls as the
# rows have them and has no place for tools.
KANANA_LIKE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<function=' + c.function.name + '>' + c.function.arguments | tojson + "
    "'</function>' }}{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MODELS = {
    "kakaocorp/kanana-1.5-2.1b-instruct-2505": ("llama3", KANANA_LIKE),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2.5", None),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2.5", None),
    "Qwen/Qwen2-1.5B": ("qwen2.5", None),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2.5", None),
}
COMMIT = "0" * 39 + "1"
# Appended to the commands of a page, so that they take seconds. The last of two equal flags wins.
SMALLER = {
    "train_lora.py": ["--max_steps", "2"],
    "evaluate_lora.py": ["--limit", "5", "--max_new_tokens", "8"],
    "chat_lora.py": ["--max_new_tokens", "8"],
}


@dataclass
class Workplace:
    """A folder like a clone, with the samples and recipes."""

    folder: Path

    def run(self, command: str, *more: str, given: str = "") -> subprocess.CompletedProcess:
        """Run a command line of a page; it must succeed."""
        program, *arguments = [*shlex.split(command), *more]
        arguments = [name for word in arguments for name in (sorted(self._found(word)) or [word])]
        if program == "hf" or arguments[0] == "-m":
            executable = Path(sys.executable).with_name(program) if program == "hf" else sys.executable
            env = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run([executable, *arguments], cwd=self.folder, env=env, capture_output=True, text=True,
                                  encoding="utf-8", check=False)  # fmt: skip
        else:
            script, *flags = arguments
            done = run_script(script, *flags, given=given, cwd=self.folder)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def _found(self, word: str) -> list[str]:
        return [str(path.relative_to(self.folder)) for path in self.folder.glob(word)] if "*" in word else []

    def only_run(self) -> Path:
        """The folder of the only run."""
        (folder,) = (path.parent for path in (self.folder / "experiments").glob("*/experiment_config.json"))
        return folder


def commands_of(page: str) -> list[str]:
    text = (ROOT / "docs" / "recipes" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """A tiny model under each name."""
    from transformers import AutoTokenizer

    home = tmp_path_factory.mktemp("models")
    for name, (family, template) in MODELS.items():
        tokenizer = AutoTokenizer.from_pretrained(parts.FOLDERS[family]())
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(home / name)
        tiny = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
        tiny_llama(tokenizer, max_position_embeddings=16384, **tiny).save_pretrained(home / name)
    return home


@pytest.fixture
def workplace(models, tmp_path) -> Workplace:
    for owner in models.iterdir():
        shutil.copytree(owner, tmp_path / owner.name)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(ROOT / "data" / "samples", tmp_path / "data" / "samples")
    for name in ("toolflow", "when2call", "apigen"):
        folder = tmp_path / "NotoriousH2" / f"instructkr-{name}"
        folder.mkdir(parents=True)
        shutil.copy(ROOT / "data" / "samples" / f"korean_{name}.jsonl", folder / "train.jsonl")
    return Workplace(tmp_path)


def without_tensorboard() -> list[str]:
    """The recipe's tracker is an optional package."""
    return [] if importlib.util.find_spec("tensorboard") else ["--report_to", "none"]


def test_korean_trains_every_row_without_a_flag(workplace):
    """Parallel calls and text beside a call too, under the tokenizer's own template."""
    workplace.run("python train_lora.py", "--max_steps", "2")
    config = config_of(workplace.only_run())
    assert (config["data"]["rows"], config["data"]["kept"]) == (60, 60)
    assert config["format"]["name"] == "native-tools"
    rows = [json.loads(line) for line in (workplace.folder / "data/samples/korean_apigen.jsonl").open(encoding="utf-8")]
    answers = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    assert any(text.count("<function=") == 2 for text in answers)
    assert any("<function=" in text and not text.startswith("<function=") for text in answers)


def test_gennx_records_what_was_used(workplace):
    """On a CPU the fp16, 4-bit recipe with a paged optimizer computes in another dtype with another optimizer."""
    data = ["--dataset", "data/samples/gennx_tool_calling_samples.jsonl", "--eval_fraction", "0.2"]
    shorter = ["--max_steps", "6", "--eval_steps", "1", "--lr", "1e-9", *without_tensorboard()]
    done = workplace.run("python train_lora.py --config configs/gennx_qlora.yaml --name gennx", *data, *shorter)
    config = config_of(workplace.folder / "experiments" / "gennx")
    assert config["format"]["name"] == "qwen" and config["flags"]["load_best"] is True
    assert (config["flags"]["dtype"], config["flags"]["optim"]) == ("float16", "paged_adamw_8bit")
    assert config["device"] == "cpu" and config["dtype"] in ("bfloat16", "float32")
    assert config["optim"] in ("adamw_torch", "adamw_torch_fused")
    assert config["load_in_4bit"] is True
    plan = config["memory"]["plan"]
    assert (plan["dtype"], plan["optim"], plan["load_in_4bit"]) == (config["dtype"], "adamw_torch", True)
    ending = config["ending"]
    assert ending["reason"] == "stopped early"
    assert ending["why"].startswith("eval_loss did not improve by more than 0.01 in 3 evaluations; its best is ")
    assert ending["why"].endswith(f", at step {ending['adapter_step']}")
    said = " ".join(done.stderr.split())
    assert f"stopped early at step {config['steps']} of 6; adapter of step {ending['adapter_step']}" in said
    assert ending["why"] in said


def test_qwen2_trains_its_three_rows(workplace):
    workplace.run("python train_lora.py --config configs/qwen2_cpu.yaml --name qwen_finetune")
    folder = workplace.folder / "experiments" / "qwen_finetune"
    config = config_of(folder)
    assert (config["data"]["rows"], config["data"]["kept"], config["format"]["name"]) == (3, 3, "plain")
    assert (config["dtype"], config["load_in_4bit"]) == ("float32", False)
    assert "3 of 3" in (folder / "training.log").read_text(encoding="utf-8")


def test_fitness_trains_and_answers_from_one_file(workplace):
    workplace.run("python train_lora.py --config configs/fitness_qa.json", "--limit", "40", "--max_steps", "2",
                  "--eval_steps", "1")  # fmt: skip
    config = config_of(workplace.folder / "experiments" / "fitness_qa")
    assert (config["data"]["kept"], config["eval_data"]["kept"], config["format"]["name"]) == (40, 100, "plain")
    asked = json.loads((workplace.folder / "configs/fitness_qa.json").read_text(encoding="utf-8"))
    done = workplace.run("python chat_lora.py --config configs/fitness_qa.json", "--max_new_tokens", "8")
    lines = done.stdout.splitlines()
    assert [line.removeprefix("Question: ") for line in lines[::2]] == asked["inference"]["questions"]
    assert all(line.startswith("Answer: ") for line in lines[1::2]) and len(lines) == 6


@pytest.mark.slow
@pytest.mark.parametrize("page", ["korean", "gennx", "../ko/gennx", "qwen2", "fitness"])
def test_every_command_of_the_page(page, workplace):
    for command in commands_of(page):
        script = next((word for word in command.split() if word.endswith(".py")), "")
        more = SMALLER.get(script, []) + (without_tensorboard() if "gennx_qlora" in command else [])
        if command.startswith("hf "):
            check_download(command, workplace)
            continue
        workplace.run(command, *more, given="안녕\nquit\nnever read\n" if script == "chat_lora.py" else "")
    made = workplace.folder / "experiments"
    if page == "korean":
        assert (workplace.folder / "comparison.png").is_file()
        assert len((workplace.folder / "summary.csv").read_text(encoding="utf-8").splitlines()) == 4
    if page == "gennx":
        metrics = json.loads((made / "gennx/evaluation/finetuned_model_metrics.json").read_text(encoding="utf-8"))
        named = ("tool_name_accuracy", "parameter_accuracy", "json_validity_rate", "hallucination_rate",
                 "latency_p50_s")  # fmt: skip
        assert all(name in metrics for name in named)
        assert (made / "gennx/exports/merged/model.safetensors").is_file()
    if page == "qwen2":
        metrics = json.loads((made / "qwen_finetune/evaluation/finetuned_model_metrics.json").read_text("utf-8"))
        assert sum(map(sum, metrics["quality_confusion"]["matrix"])) == 5
        assert "Labels and judgements" in (made / "qwen_finetune/evaluation/comparison.md").read_text("utf-8")
    if page == "fitness":
        merged = json.loads((workplace.folder / "configs/fitness_qa.json").read_text(encoding="utf-8"))
        merged["inference"]["mode"] = "merged"
        (workplace.folder / "merged.json").write_text(json.dumps(merged), encoding="utf-8")
        done = workplace.run("python chat_lora.py --config merged.json", *SMALLER["chat_lora.py"])
        assert done.stdout.count("Question: ") == 3


def check_download(command: str, workplace: Workplace) -> None:
    """After the download the model's name means the same without a network."""
    cache, elsewhere = workplace.folder / "downloaded", workplace.folder / "elsewhere"
    elsewhere.mkdir()
    env = {**os.environ, "HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_OFFLINE": "0"}
    with hub_server(workplace.folder) as url:
        program, *arguments = shlex.split(command)
        hf = Path(sys.executable).with_name(program)
        done = subprocess.run([hf, *arguments], env={**env, "HF_ENDPOINT": url}, capture_output=True, text=True,
                              check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    arguments = ["--config", ROOT / "configs/gennx_qlora.yaml", "--dry_run", "--dataset",
                 ROOT / "data/samples/gennx_tool_calling_samples.jsonl", *without_tensorboard()]  # fmt: skip
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    done = run_script("train_lora.py", *arguments, cwd=elsewhere, env=offline, fresh=True)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def hub_server(models: Path) -> Iterator[str]:
    """The address of a server that offers the folders OWNER/NAME in `models` as the Hub does."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            found = re.match(r"(/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/[^/?]+/?([^?]*)", self.path)
            if found is None:
                self.send_error(404)
                return
            files = {path.name: path.read_bytes() for path in (models / found[2]).iterdir()}
            bodies = {
                "revision": {"id": found[2], "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]},
                "tree": [{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha256(data).hexdigest()[:40]}
                         for name, data in files.items()],
            }  # fmt: skip
            body = files[found[4]] if found[3] == "resolve" else json.dumps(bodies[found[3]]).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("script", ["make_korean", "make_fitness"])
def test_samples_are_what_their_script_writes(script, tmp_path):
    """The same seed gives the same bytes."""
    sizes = {"make_korean": ["--rows", "20"], "make_fitness": ["--train", "640", "--validation", "100"]}
    command = [sys.executable, "-m", f"data.samples.{script}", *sizes[script], "--output", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    written = sorted(tmp_path.iterdir())
    assert len(written) == (3 if script == "make_korean" else 2)
    for path in written:
        assert path.read_bytes() == (ROOT / "data" / "samples" / path.name).read_bytes()


def test_fitness_rows_do_not_repeat_and_are_right():
    from data.samples.make_fitness import FIGURES, make_rows

    rows = make_rows(5800, seed=7)
    assert len({row["question"] for row in rows}) == 5800
    with FIGURES.open(encoding="utf-8", newline="") as file:
        protein = {food["food"]: float(food["protein_g"]) for food in csv.DictReader(file)}
    checked = 0
    for row in rows:
        if found := re.fullmatch(r"How much protein is in (\d+) g of (.*)\?", row["question"]):
            amount = f"{protein[found[2]] * int(found[1]) / 100:.1f}".removesuffix(".0")
            assert re.search(rf" have (about )?{amount} g of protein", row["answer"])
            checked += 1
    assert checked > 20


def test_recipes_name_known_formats_and_files_that_ship():
    for path in sorted((ROOT / "docs" / "recipes").glob("*.md")):
        for name in re.findall(r"(?:configs|data/samples)/[\w.]+\.\w+", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.name}: {name}"
    assert {"llama3-function", "kanana", "native-tools", "qwen", "plain"} <= set(FORMATS)
