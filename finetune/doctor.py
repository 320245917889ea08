"""`train_lora.py --doctor`: whether this machine is ready to train, and what to fix. Imports no third-party package."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.models.bundled import cache_dir
from finetune.models.hub import hub_token
from finetune.packages import read_pins
from finetune.progress import counted

ROOT = Path(__file__).resolve().parent.parent
# Packages that every training needs; the other pinned packages are for one command or one kind of model.
REQUIRED = {
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors", "huggingface_hub",
    "tokenizers", "psutil", "jinja2", "jsonschema", "pyyaml", "pyarrow", "numpy", "rich", "unsloth", "unsloth_zoo",
}  # fmt: skip
SHOWN = ("transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
MIN_FREE_GIB = 5
PROBE_TIMEOUT_SECONDS = 900  # the first import compiles a thousand modules
INSTALL = "make install, or the pip commands for this kind of machine in the README"

# Run in subprocesses: importing Unsloth patches the process, and a broken build may crash it.
TORCH_PROBE = """
import contextlib, json, torch
cuda = torch.cuda.is_available()
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
facts = {"version": torch.__version__, "cuda": torch.version.cuda,
    "hip": getattr(torch.version, "hip", None), "available": cuda,
    "gpus": [[c.name, c.total_memory / 2**30, f"{c.major}.{c.minor}"] for c in gpus],
    "threads": torch.get_num_threads()}
with contextlib.suppress(Exception):  # a package is missing
    from finetune.models.loading import default_dtype
    facts["dtype"] = default_dtype()
print("\\nPROBE" + json.dumps(facts))
"""
UNSLOTH_PROBE = """
import json, sys
for name in ("sklearn", "scipy"):  # Transformers imports them where they are installed; they take seconds
    sys.modules[name] = None
out = {}
try:
    from finetune.models.loading import default_dtype, import_unsloth
    import_unsloth()
    import torch
    from unsloth.device_type import DEVICE_TYPE
    out.update(unsloth=DEVICE_TYPE, dtype=default_dtype())
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        device = "cuda" if torch.cuda.is_available() else "cpu"
        weights = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        back = dequantize_4bit(*quantize_4bit(weights, quant_type="nf4"))
        out["four_bit"] = bool((back - weights).abs().max() < 0.2)
    except Exception as error:
        out["four_bit"], out["four_bit_error"] = False, f"{type(error).__name__}: {error}"
except BaseException as error:
    out["error"] = str(error) if type(error).__name__ == "UserError" else f"{type(error).__name__}: {error}"
print("\\nPROBE" + json.dumps(out))
"""


@dataclass
class Checkup:
    """Lines of the report as (name, text), and problems as (problem, fix); only blocking ones prevent a training."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    blocking: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)

    def line(self, name: str, text: str) -> None:
        self.lines.append((name, text))

    def block(self, problem: str, fix: str) -> None:
        self.blocking.append((problem, fix))

    def warn(self, problem: str, fix: str) -> None:
        self.warnings.append((problem, fix))


def report(*, deep: bool = False) -> int:
    """Print one screen; returns 0 when this machine is ready to train, otherwise 1."""
    checkup = examine(deep=deep)
    print("Sandwich doctor\n")
    for name, text in checkup.lines:
        print(f"  {name:<12} {text}")
    for title, problems in (("Blocking problems", checkup.blocking), ("Warnings", checkup.warnings)):
        if problems:
            print(f"\n{title}:")
        for problem, fix in problems:
            print(textwrap.fill(problem, 100, initial_indent="  - ", subsequent_indent="    "))
            print(f"      {fix}")
    print("\n" + ("Not ready to train." if checkup.blocking else "Ready to train."))
    return 1 if checkup.blocking else 0


def examine(*, deep: bool = False) -> Checkup:
    """All checks. Unsloth takes many seconds to import: this is done if `deep`, on a GPU, and with other versions than
    the tested ones.
    """
    checkup = Checkup()
    _system(checkup)
    installed, as_tested = _packages(checkup)
    torch = probe(TORCH_PROBE) if "torch" in installed else None
    _device(checkup, torch)
    if torch and "error" not in torch and "unsloth" in installed:
        if deep or torch["available"] or not as_tested:
            answer = probe(UNSLOTH_PROBE)
        else:
            answer = {"dtype": torch.get("dtype")}
        _unsloth(checkup, answer, installed["unsloth"], torch["threads"])
    checkup.line("HF token", token_source())
    _folders(checkup)
    return checkup


def _system(checkup: Checkup) -> None:
    python, version = platform.python_version(), sys.version_info[:2]
    checkup.line("Python", f"{python}  {sys.executable}")
    system = f"{platform.system()} {platform.release()}, {platform.machine()}, {os.cpu_count()} CPUs"
    if importlib.util.find_spec("psutil"):
        import psutil

        system += f", {psutil.virtual_memory().total / 2**30:.0f} GiB memory"
    checkup.line("System", system)
    if version < (3, 11):
        checkup.block(f"Python {python} is too old", "use Python 3.11 or 3.12")
    elif version > (3, 12):
        checkup.warn(f"Python {python} has not been tested", "use Python 3.11 or 3.12")


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages(checkup: Checkup) -> tuple[dict[str, str], bool]:
    """Compare the installed packages with the pins: (package -> installed version, whether all are the pinned ones)."""
    pins = read_pins()
    found = {name: installed_version(name) for name in pins.keys() | REQUIRED}
    installed = {name: version for name, version in found.items() if version}
    missing = found.keys() - installed.keys()
    others = sorted(name for name in pins.keys() - missing if installed[name].split("+")[0] != pins[name])
    if required := sorted(missing & REQUIRED):
        checkup.block(f"not installed: {', '.join(required)}", INSTALL)
    if optional := sorted(missing - REQUIRED):
        checkup.warn(f"not installed, needed by some commands: {', '.join(optional)}", INSTALL)
    if others:
        versions = ", ".join(f"{name} {installed[name]} (pinned {pins[name]})" for name in others)
        checkup.warn(f"other versions than the tested ones: {versions}", INSTALL)
    same = len(pins) - len(others) - len(missing & pins.keys())
    checkup.line("Packages", f"{same} of {len(pins)} pinned packages have the pinned version")
    shown = "  ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed)
    if shown:
        checkup.line("", shown)
    return installed, not others and not missing


def probe(code: str) -> dict[str, Any]:
    """Run `code` in a subprocess; returns the JSON that it prints after "PROBE", or {"error": its last line}."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, timeout=PROBE_TIMEOUT_SECONDS, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"timeout after {PROBE_TIMEOUT_SECONDS} s"}
    answer = done.stdout.rpartition("\nPROBE")[2]
    try:
        return json.loads(answer)
    except ValueError:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return {"error": lines[-1] if lines else f"exit status {done.returncode}"}


def driver_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that the driver reports, whether torch can use them or not."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)  # noqa: S607  (found in PATH)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU \d+: (.+?) \(UUID", done.stdout, re.MULTILINE) if done.returncode == 0 else []


def torch_reinstall() -> str:
    pin = read_pins().get("torch", "")
    index = " --index-url https://download.pytorch.org/whl/cu130" if sys.platform == "win32" else ""
    return f"pip uninstall torch, then pip install torch=={pin}{index}"


def _device(checkup: Checkup, torch: dict[str, Any] | None) -> None:
    gpus = driver_gpus()
    if torch is None or "error" in torch:
        checkup.line("Device", ", ".join(gpus) or "no NVIDIA GPU")
        if torch:
            checkup.block(f"torch cannot be imported: {torch['error']}", INSTALL)
        return
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPU"
    checkup.line("torch", f"{torch['version']}, {build} build")
    if torch["available"]:
        text = "; ".join(f"{name}, {size:.0f} GiB, compute {capability}" for name, size, capability in torch["gpus"])
        checkup.line("Device", text)
        if len(torch["gpus"]) > 1:
            checkup.warn("several GPUs: one process uses the first", "choose another with CUDA_VISIBLE_DEVICES")
        return
    checkup.line("Device", f"CPU{' (the GPU is not used)' if gpus else ', no NVIDIA GPU'}")
    if gpus and not torch["cuda"]:
        checkup.warn(f"{gpus[0]} is not used: this torch is a CPU build", torch_reinstall())
    elif gpus:
        fix = f"update the NVIDIA driver to one for CUDA {torch['cuda']}, see nvidia-smi"
        checkup.warn(f"{gpus[0]} is not used: torch cannot access it", fix)
    cuda_only = [name for name in ("triton", "torchvision", "xformers") if installed_version(name)]
    if cuda_only and not torch["cuda"] and not torch["hip"]:
        problem = f"{' and '.join(cuda_only)}: built for CUDA, breaks imports with a CPU build of torch"
        checkup.warn(problem, f"pip uninstall {' '.join(cuda_only)}")


def _unsloth(checkup: Checkup, answer: dict[str, Any], version: str, threads: int) -> None:
    if "error" in answer:
        checkup.line("Unsloth", f"{version}, cannot be imported")
        checkup.block(answer["error"], INSTALL)
        return
    if device := answer.get("unsloth"):
        used = "CPU fallback" if device == "cpu" else f"{device.upper()} backend"
    else:
        used = "not imported, as all versions are the tested ones (--doctor deep does)"
    checkup.line("Unsloth", f"{version}, {used}")
    dtypes = {"bfloat16": "bfloat16, in hardware", "float16": "float16 (no bfloat16 in hardware)"}
    precision = dtypes.get(answer["dtype"], "float32 (bfloat16 is emulated and slow here)")
    checkup.line("Precision", f"{precision}; {counted(threads, 'CPU thread')}")
    if not device:
        return
    checkup.line("4-bit", "works (bitsandbytes NF4, tested)" if answer["four_bit"] else "does not work")
    if not answer["four_bit"]:
        error = answer.get("four_bit_error", "NF4 values are dequantized wrongly")
        checkup.warn(f"no 4-bit models: {error}", "train with --no-load_in_4bit, or reinstall bitsandbytes")


def token_source() -> str:
    """Where a Hugging Face token was found; never the token."""
    try:
        token = hub_token()
    except UserError as error:
        return str(error)
    if token is None:
        return "none (only gated and private models need one: set HF_TOKEN)"
    return f"present (from {'HF_TOKEN' if os.environ.get('HF_TOKEN', '').strip() else 'hf auth login'})"


def _folders(checkup: Checkup) -> None:
    folders = {"Runs": Path("experiments").resolve()}
    with contextlib.suppress(ImportError):  # platformdirs is one of the missing packages
        folders["Cache"] = cache_dir()
    for name, folder in folders.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**30
        try:
            with tempfile.TemporaryFile(dir=existing):
                checkup.line(name, f"{folder}, writable, {free:.0f} GiB free")
        except OSError as error:
            checkup.line(name, f"{folder}, not writable")
            option = "--experiments_dir FOLDER" if name == "Runs" else "SANDWICH_CACHE=FOLDER"
            checkup.block(f"cannot write to {existing}: {error.strerror}", f"choose another folder: {option}")
        if free < MIN_FREE_GIB:
            checkup.warn(f"only {free:.1f} GiB free at {existing}", "free some space; checkpoints need it")
