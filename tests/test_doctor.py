"""`train_lora.py --doctor` on this machine as it is, on one where nothing is installed, and on made-up ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import doctor

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = {"version": "2.13.0+cpu", "cuda": None, "hip": None, "available": False, "cards": []}
CUDA_TORCH = {"version": "2.13.0", "cuda": "13.0", "hip": None, "available": False, "cards": []}


def run_doctor(*options: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *options, str(ROOT / "train_lora.py"), "--doctor"], capture_output=True, text=True,
        encoding="utf-8", cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment}, check=False,
    )  # fmt: skip


def test_this_machine_can_train_and_the_report_fits_one_screen():
    result = run_doctor(HF_TOKEN="hf_secret_that_must_not_show")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) <= 40 and lines[-1] == "A training can run here."
    for name in ("Python", "Packages", "torch", "Device", "Unsloth", "Precision", "4-bit", "Runs", "Cache"):
        assert any(line.split()[:1] == [name] for line in lines), name
    assert "present (from HF_TOKEN)" in result.stdout
    assert "hf_secret" not in result.stdout + result.stderr


def test_without_any_package_it_says_what_is_missing_and_exits_1():
    result = run_doctor("-S")  # -S hides site-packages: a Python where nothing has been installed
    assert result.returncode == 1, result.stderr
    assert result.stderr == "" and "A training cannot run here yet." in result.stdout
    assert "torch" in result.stdout.split("not installed:")[1] and doctor.INSTALL in result.stdout


def test_pins_are_read_from_the_requirements_files():
    pins = doctor.read_pins()
    assert pins["torch"] == "2.13.0" and pins["unsloth"] == pins["unsloth_zoo"]
    assert pins.keys() >= doctor.NEEDED  # or a package would be needed that no file installs


def examined(monkeypatch, *, torch, cards=(), installed=None, unsloth=None) -> doctor.Checkup:
    """The report for a machine described by the arguments; only the questions to the machine are replaced."""
    versions = {**doctor.read_pins(), **(installed or {})}
    answer = {"unsloth": "cpu", "dtype": "float32", "threads": 2, "four_bit": True} | (unsloth or {})
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    monkeypatch.setattr(doctor, "gpus_of_the_machine", lambda: list(cards))
    monkeypatch.setattr(doctor, "probe", lambda code: torch if code is doctor.TORCH_PROBE else answer)
    return doctor.examine()


def test_a_gpu_beside_a_cpu_build_of_torch(monkeypatch):
    checkup = examined(monkeypatch, torch=CPU_TORCH, cards=["NVIDIA GeForce RTX 3060"])
    assert checkup.fatal == []
    what, remedy = checkup.hints[0]
    assert "RTX 3060 is idle" in what and "pip install torch==2.13.0" in remedy


def test_a_driver_that_is_too_old(monkeypatch):
    checkup = examined(monkeypatch, torch=CUDA_TORCH, cards=["NVIDIA GeForce RTX 3060"])
    assert any("torch cannot reach it" in what and "driver" in remedy for what, remedy in checkup.hints)


def test_triton_and_torchvision_beside_a_cpu_build(monkeypatch):
    extra = {"triton": "3.6.0", "torchvision": "0.28.0"}
    checkup = examined(monkeypatch, torch=CPU_TORCH, installed=extra)
    assert any(remedy == "pip uninstall triton torchvision" for _, remedy in checkup.hints)
    assert examined(monkeypatch, torch=CUDA_TORCH, installed=extra).hints == []


def test_a_working_gpu(monkeypatch):
    torch = {**CUDA_TORCH, "available": True, "cards": [["NVIDIA H200", 139.8, "9.0"]]}
    checkup = examined(
        monkeypatch, torch=torch, cards=["NVIDIA H200"], unsloth={"unsloth": "cuda", "dtype": "bfloat16"}
    )
    lines = dict(checkup.lines)
    assert lines["Device"] == "NVIDIA H200, 140 GiB, compute 9.0" and "CUDA backend" in lines["Unsloth"]
    assert lines["Precision"] == "bfloat16, in hardware" and not checkup.fatal and not checkup.hints


def test_another_version_is_worth_knowing_and_a_missing_one_is_fatal_only_when_needed(monkeypatch):
    checkup = examined(monkeypatch, torch=CPU_TORCH, installed={"trl": "1.16.0", "matplotlib": None})
    assert checkup.fatal == []
    assert any("trl 1.16.0 (pinned 1.15.0)" in what for what, _ in checkup.hints)
    assert any("matplotlib" in what for what, _ in checkup.hints)
    checkup = examined(monkeypatch, torch=CPU_TORCH, installed={"peft": None})
    assert [what for what, _ in checkup.fatal] == ["not installed: peft"]


def test_broken_unsloth_torch_and_4_bit(monkeypatch):
    checkup = examined(monkeypatch, torch=CPU_TORCH, unsloth={"error": "unsloth cannot be imported (boom)"})
    assert checkup.fatal[0][0] == "unsloth cannot be imported (boom)"
    checkup = examined(monkeypatch, torch={"error": "ImportError: libcudart.so.13"})
    assert "libcudart.so.13" in checkup.fatal[0][0]
    checkup = examined(monkeypatch, torch=CPU_TORCH, unsloth={"four_bit": False, "four_bit_error": "no kernel"})
    assert not checkup.fatal and any("no kernel" in what and "--no-load_in_4bit" in r for what, r in checkup.hints)


def test_a_probe_that_dies_or_prints_nonsense_is_an_error_not_a_crash():
    assert doctor.probe("raise RuntimeError('boom')") == {"error": "RuntimeError: boom"}
    assert doctor.probe("import os; os._exit(3)") == {"error": "ended with status 3"}
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


def test_an_unwritable_folder_is_in_the_way(monkeypatch, tmp_path):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    monkeypatch.setenv("SANDWICH_CACHE", str(tmp_path))
    checkup = doctor.Checkup()
    doctor._folders(checkup)
    assert [remedy for _, remedy in checkup.fatal] == [
        "choose another: --experiments_dir FOLDER", "choose another: SANDWICH_CACHE=FOLDER",
    ]  # fmt: skip
