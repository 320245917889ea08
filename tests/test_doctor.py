"""`train_lora.py --doctor` on this machine, on one without packages, and on fake ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import doctor

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = {"version": "2.13.0+cpu", "cuda": None, "hip": None, "available": False, "gpus": [], "threads": 2,
             "dtype": "float32"}  # fmt: skip
CUDA_TORCH = {**CPU_TORCH, "version": "2.13.0", "cuda": "13.0"}


def run_doctor(*options: str, deep: bool = False, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *options, str(ROOT / "train_lora.py"), "--doctor", *["deep"] * deep],
        capture_output=True, text=True, encoding="utf-8", cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment}, check=False,
    )  # fmt: skip


def test_this_machine_is_ready_to_train():
    result = run_doctor(deep=True, HF_TOKEN="hf_secret_that_must_not_show")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) <= 40 and lines[-1] == "Ready to train."
    for name in ("Python", "Packages", "torch", "Device", "Unsloth", "Precision", "4-bit", "Runs", "Cache"):
        assert any(line.split()[:1] == [name] for line in lines), name
    assert "present (from HF_TOKEN)" in result.stdout
    assert "hf_secret" not in result.stdout + result.stderr


def test_unsloth_is_imported_only_where_it_may_fail(monkeypatch):
    """On a CPU with the tested versions the report says that it was not."""
    asked = []
    checkup = examined(monkeypatch, torch=CPU_TORCH, asked=asked)
    lines = dict(checkup.lines)
    assert asked == [doctor.TORCH_PROBE] and "not imported" in lines["Unsloth"] and "4-bit" not in lines
    assert lines["Precision"] == "float32 (bfloat16 is emulated and slow here); 2 CPU threads"
    for reason in ({"deep": True}, {"installed": {"trl": "1.16.0"}}, {"torch": {**CUDA_TORCH, "available": True}}):
        asked.clear()
        lines = dict(examined(monkeypatch, **{"torch": CPU_TORCH, "asked": asked, **reason}).lines)
        assert asked == [doctor.TORCH_PROBE, doctor.UNSLOTH_PROBE] and "4-bit" in lines, reason


def test_torch_probe_imports_no_other_package():
    heavy = "{'transformers', 'unsloth', 'bitsandbytes', 'scipy', 'sympy', 'pandas', 'datasets'}"
    code = doctor.TORCH_PROBE.replace("json.dumps(facts)", f"json.dumps(sorted({heavy} & sys.modules.keys()))")
    assert doctor.probe(f"import sys\n{code}") == []


def test_missing_packages_exit_1():
    result = run_doctor("-S")  # -S hides site-packages
    assert result.returncode == 1, result.stderr
    assert result.stderr == "" and "Not ready to train." in result.stdout
    assert "torch" in result.stdout.split("not installed:")[1] and doctor.INSTALL in result.stdout


def test_pins_are_those_of_the_requirements_files():
    pins = doctor.read_pins()
    assert pins["torch"] == "2.13.0" and pins["unsloth"] == pins["unsloth_zoo"]
    assert pins.keys() >= doctor.REQUIRED


def examined(monkeypatch, *, torch, gpus=(), installed=None, unsloth=None, deep=False, asked=None) -> doctor.Checkup:
    """The report for a fake machine; torch, unsloth: the answers of the probes, which are added to `asked`."""
    versions = {**doctor.read_pins(), **(installed or {})}
    answer = {"unsloth": "cpu", "dtype": "float32", "four_bit": True} | (unsloth or {})
    asked = [] if asked is None else asked
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    monkeypatch.setattr(doctor, "driver_gpus", lambda: list(gpus))
    monkeypatch.setattr(
        doctor, "probe", lambda code: asked.append(code) or (torch if code is doctor.TORCH_PROBE else answer)
    )
    return doctor.examine(deep=deep)


def test_gpu_with_a_cpu_build_of_torch(monkeypatch):
    checkup = examined(monkeypatch, torch=CPU_TORCH, gpus=["NVIDIA GeForce RTX 3060"])
    assert checkup.blocking == []
    problem, fix = checkup.warnings[0]
    assert "RTX 3060 is not used" in problem and "pip install torch==2.13.0" in fix


def test_driver_that_is_too_old(monkeypatch):
    checkup = examined(monkeypatch, torch=CUDA_TORCH, gpus=["NVIDIA GeForce RTX 3060"])
    assert any("torch cannot access it" in problem and "driver" in fix for problem, fix in checkup.warnings)


def test_triton_with_a_cpu_build_of_torch(monkeypatch):
    extra = {"triton": "3.6.0", "torchvision": "0.28.0"}
    checkup = examined(monkeypatch, torch=CPU_TORCH, installed=extra)
    assert any(fix == "pip uninstall triton torchvision" for _, fix in checkup.warnings)
    assert examined(monkeypatch, torch=CUDA_TORCH, installed=extra).warnings == []


def test_working_gpu(monkeypatch):
    torch = {**CUDA_TORCH, "available": True, "gpus": [["NVIDIA H200", 139.8, "9.0"]]}
    checkup = examined(monkeypatch, torch=torch, gpus=["NVIDIA H200"], unsloth={"unsloth": "cuda", "dtype": "bfloat16"})
    lines = dict(checkup.lines)
    assert lines["Device"] == "NVIDIA H200, 140 GiB, compute 9.0" and "CUDA backend" in lines["Unsloth"]
    assert lines["Precision"].startswith("bfloat16, in hardware") and not checkup.blocking and not checkup.warnings


def test_other_versions_and_missing_packages(monkeypatch):
    checkup = examined(monkeypatch, torch=CPU_TORCH, installed={"trl": "1.16.0", "matplotlib": None})
    assert checkup.blocking == []
    assert any("trl 1.16.0 (pinned 1.15.0)" in problem for problem, _ in checkup.warnings)
    assert any("matplotlib" in problem for problem, _ in checkup.warnings)
    checkup = examined(monkeypatch, torch=CPU_TORCH, installed={"peft": None})
    assert [problem for problem, _ in checkup.blocking] == ["not installed: peft"]


def test_broken_unsloth_torch_and_4_bit(monkeypatch):
    checkup = examined(monkeypatch, torch=CPU_TORCH, deep=True, unsloth={"error": "no unsloth (boom)"})
    assert checkup.blocking[0][0] == "no unsloth (boom)"
    checkup = examined(monkeypatch, torch={"error": "ImportError: libcudart.so.13"})
    assert "libcudart.so.13" in checkup.blocking[0][0]
    no_4_bit = {"four_bit": False, "four_bit_error": "no kernel"}
    checkup = examined(monkeypatch, torch=CPU_TORCH, deep=True, unsloth=no_4_bit)
    assert not checkup.blocking
    assert any("no kernel" in problem and "--no-load_in_4bit" in fix for problem, fix in checkup.warnings)


def test_failed_probe_is_an_error():
    assert doctor.probe("raise RuntimeError('boom')") == {"error": "RuntimeError: boom"}
    assert doctor.probe("import os; os._exit(3)") == {"error": "exit status 3"}
    assert doctor.probe("print('noise'); print('\\nPROBE{\"a\": 1}')") == {"a": 1}


@pytest.mark.parametrize(
    ("variable", "stored", "expected"),
    [
        ("hf_abc", None, "present (from HF_TOKEN)"),
        ("", "hf_abc", "present (from hf auth login)"),
        ("", None, "none"),
        ("hf_a bc", None, "the Hugging Face token contains white space"),
    ],
)
def test_token_source_never_shows_the_token(monkeypatch, variable, stored, expected):
    monkeypatch.setenv("HF_TOKEN", variable)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: stored)
    found = doctor.token_source()
    assert found.startswith(expected) and "hf_a" not in found


def test_unwritable_folder_is_blocking(monkeypatch, tmp_path):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    monkeypatch.setenv("SANDWICH_CACHE", str(tmp_path))
    checkup = doctor.Checkup()
    doctor._folders(checkup)
    assert [fix for _, fix in checkup.blocking] == [
        "choose another folder: --experiments_dir FOLDER", "choose another folder: SANDWICH_CACHE=FOLDER",
    ]  # fmt: skip
