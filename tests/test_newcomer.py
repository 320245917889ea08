"""What somebody new runs into first: no environment, misspelled flags and names, a package too few."""

from __future__ import annotations

import subprocess
import sys

import httpx
import pytest

from finetune import packages
from finetune.errors import UserError, require
from finetune.flags.types import flags_of, hint, meant
from finetune.models.hub import check_available, check_path
from finetune.settings import build_parser
from formats import FormatError, check_format_name
from tests.scripts import ROOT

ROWS = "data/samples/gennx_heldout.jsonl"
TRAIN_FLAGS = flags_of(build_parser())


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> list[str]:
    """A Python without any of the packages."""
    return [sys.executable, "-I", "-S"]


def run(command: list[str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["visualize_loss.py", "LOG"],
        ["prepare_data.py", ROWS, "--output", "OUT"],
        ["evaluate_lora.py", "smollm2-135m", "--dataset", ROWS],
        ["chat_lora.py", "smollm2-135m", "--prompt", "x"],
        ["export_lora.py", "smollm2-135m", "--to", "vllm"],
        ["sweep_lora.py", "--rank", "4", "8", "--", "--config", "configs/demo.yaml"],
        ["gpu_memory.py", "estimate", "--model", "smollm2-135m"],
        ["train_lora.py", "--config", "configs/demo.yaml"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_bare_python_names_the_environment(bare, tmp_path, arguments):
    log = tmp_path / "training_log.csv"
    log.write_text("step,loss\n1,2\n2,1\n", encoding="utf-8")
    places = {"LOG": str(log), "OUT": str(tmp_path / "out")}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import runpy; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run([*bare, "-c", code], *(places.get(one, one) for one in arguments))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "is not installed for" in line
    assert "source .venv/bin/activate" in line and r".venv\Scripts\activate" in line


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("gradio", "pip install gradio=="),
        ("uvicorn", "pip install uvicorn=="),
        ("bfcl_eval", "pip install --no-deps bfcl-eval=="),
        ("unsloth", "pip install --no-deps unsloth=="),
        ("psycopg", "pip install psycopg=="),
        ("sklearn", "pip install scikit-learn=="),
    ],
)
def test_the_remedy_installs_one_pinned_package(module, command):
    installed = packages.install_command(module)
    assert installed.startswith(command) and len(installed) > len(command)


def test_missing_optional_packages_are_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--web needs gradio.*pip install gradio==\d"):
        require("--web", "gradio")
    with pytest.raises(UserError, match=r"fastapi and uvicorn, which are not .* pip install fastapi==\S+ uvicorn==\d"):
        require("--serve", "fastapi", "uvicorn")
    assert "run: pip install gradio==" in packages.missing_message("gradio")


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("--datset", "did you mean --dataset?"),
        ("--learning_rate", "did you mean --lr?"),
        ("--lora-r", "did you mean --rank?"),
        ("--lora_alpha=3", "did you mean --alpha?"),
        ("--per_device_train_batch_size", "did you mean --batch_size?"),
        ("--output_dir", "did you mean --experiments_dir?"),
        ("--cutoff_len", "did you mean --max_seq_length?"),
        ("--tool", "did you mean --tools?"),
        ("foo.jsonl", "did you mean --dataset foo.jsonl?"),
        ("foo.parquet", "did you mean --dataset foo.parquet?"),
        ("recipe.yaml", "did you mean --config recipe.yaml?"),
        ("--frobnicate", "see train_lora.py --help"),
    ],
)
def test_hints_for_unknown_arguments(word, advice):
    assert hint(word, TRAIN_FLAGS, "train_lora.py") == advice


def test_hints_name_only_flags_of_the_script():
    assert meant("learning_rate", ["model", "tools"]) is None
    assert meant("promt", ["prompt", "port"]) == "prompt"


def test_unknown_flags_end_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--datset", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --datset x; did you mean --dataset?\n"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("sweep_lora.py", [], "nothing to vary"),
        ("sweep_lora.py", ["--lora_r", "4"], "did you mean --rank?"),
        ("sweep_lora.py", ["--rank", "4", "8", "--dry_run", "--", "--dataset", "no.jsonl"], "no.jsonl: there is no"),
        ("chat_lora.py", ["experiments/nope"], "experiments/nope: there is no such folder"),
        ("evaluate_lora.py", ["experiments/nope", "--dataset", ROWS], "experiments/nope: there is no such folder"),
        ("export_lora.py", ["experiments/nope", "--to", "vllm"], "experiments/nope: there is no such folder"),
        ("export_lora.py", ["smollm2-135m", "--to", "gguf", "--llama_cpp", "docs"], "docs has no convert_hf"),
        ("chat_lora.py", ["smollm2-135m", "--format", "lama3"], "did you mean llama3?"),
        ("prepare_data.py", ["--outptu", "x"], "--outptu: did you mean --output?"),
        ("chat_lora.py", ["--promt", "x"], "did you mean --prompt?"),
        ("train_lora.py", ["--dataset", ROWS, "--format", "lama3"], "did you mean llama3?"),
        ("train_lora.py", ["--dataset", "data/sample"], "did you mean data/samples?"),
    ],
)
def test_refused_before_anything_slow(script, arguments, message):
    """Neither torch nor Transformers nor Unsloth has been imported when the message is printed."""
    code = (
        f"import runpy, sys\nsys.argv = {[script, *arguments]!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code == 2, stop.code\n"
        "print([name for name in ('torch', 'transformers', 'unsloth') if sys.modules.get(name)])\n"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_names_of_models_that_read_as_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments" / "run_a").mkdir(parents=True)
    (tmp_path / "org" / "one").mkdir(parents=True)
    (tmp_path / "org" / "one" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"did you mean experiments/run_a\?"):
        check_path("experiments/run_b")
    for name in ("./x", "~/x", "a/b/c", "C:\\x"):
        with pytest.raises(UserError, match="there is no such folder"):
            check_path(name)
    check_path("org/two")  # a folder of models that somebody cloned from the Hub
    check_path("Qwen/Qwen2.5-0.5B-Instruct")


def test_unknown_model_is_refused_by_one_request(monkeypatch):
    requests = []

    def refuse(url, **_):
        requests.append(url)
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", refuse)
    with pytest.raises(UserError, match="neither a folder nor in the local cache, and the Hub cannot be reached"):
        check_available("org/nowhere")
    assert len(requests) == 1 and requests[0].endswith("org/nowhere/resolve/main/config.json")
    check_available("smollm2-135m")
    assert len(requests) == 1


def test_format_names(tmp_path):
    check_format_name("auto")
    check_format_name("chatml")
    with pytest.raises(FormatError, match=r"did you mean chatml\?"):
        check_format_name("chat-ml")
    with pytest.raises(FormatError, match="no such file"):
        check_format_name(str(tmp_path / "own.yaml"))


def test_collecting_the_tests_imports_nothing_heavy():
    """Torch, Transformers and Unsloth take most of a minute on a busy machine; listing the tests needs none of them."""
    code = (
        "import sys, pytest\n"
        "status = pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests'])\n"
        "heavy = [name for name in ('torch', 'transformers', 'unsloth') if sys.modules.get(name)]\n"
        "sys.exit(f'status {status}, imported {heavy}' if status or heavy else 0)\n"
    )
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr + done.stdout[-3000:]
