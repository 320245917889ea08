"""`train_lora.py --doctor`: can this machine train, and if not, what mends it. Needs the standard library only."""

from __future__ import annotations

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

from finetune.models.bundled import cache_dir

ROOT = Path(__file__).resolve().parent.parent
PINS = ("requirements_lora.txt", "requirements_unsloth.txt")
# What no training starts without; the rest of the pins serves one command or one kind of model.
NEEDED = {
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "safetensors", "huggingface_hub",
    "tokenizers", "psutil", "jinja2", "jsonschema", "pyyaml", "pyarrow", "numpy", "rich", "unsloth", "unsloth_zoo",
}  # fmt: skip
SHOWN = ("transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")
LITTLE_DISK_GB = 5
PROBE_SECONDS = 900  # a first import compiles a thousand modules, on a busy machine slowly
INSTALL = "make install, or the pip lines for this kind of machine in the README"

# Run in a process of its own: importing Unsloth patches the process, and a broken build may end it.
PROBE = """
import json, sys
out = {}
try:
    from finetune.errors import UserError
    from finetune.models.loading import default_dtype, import_unsloth
    import_unsloth()
    import torch
    from unsloth.device_type import DEVICE_TYPE
    out.update(unsloth=DEVICE_TYPE, dtype=default_dtype(), threads=torch.get_num_threads())
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        device = "cuda" if torch.cuda.is_available() else "cpu"
        there = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        back = dequantize_4bit(*quantize_4bit(there, quant_type="nf4"))
        out["four_bit"] = bool((back - there).abs().max() < 0.2)
    except Exception as error:
        out["four_bit"], out["four_bit_error"] = False, f"{type(error).__name__}: {error}"
except BaseException as error:
    out["error"] = str(error) if type(error).__name__ == "UserError" else f"{type(error).__name__}: {error}"
print("\\nPROBE" + json.dumps(out))
"""
TORCH_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if cuda else []
print("\\nPROBE" + json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
    "hip": getattr(torch.version, "hip", None), "available": cuda,
    "cards": [[c.name, c.total_memory / 2**30, f"{c.major}.{c.minor}"] for c in cards]}))
"""


@dataclass
class Checkup:
    """Lines of the report, and what is wrong as (what, remedy); `fatal` keeps a training from running."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    fatal: list[tuple[str, str]] = field(default_factory=list)
    hints: list[tuple[str, str]] = field(default_factory=list)


def report() -> int:
    """Print one screen; 0 when a training could run here, 1 otherwise."""
    checkup = examine()
    print("Sandwich doctor\n")
    for name, text in checkup.lines:
        print(f"  {name:<12} {text}")
    for title, findings in (("In the way of a training", checkup.fatal), ("Worth knowing", checkup.hints)):
        if findings:
            print(f"\n{title}:")
        for what, remedy in findings:
            print(textwrap.fill(what, 100, initial_indent="  - ", subsequent_indent="    "))
            print(f"      {remedy}")
    print("\n" + ("A training cannot run here yet." if checkup.fatal else "A training can run here."))
    return 1 if checkup.fatal else 0


def examine() -> Checkup:
    checkup = Checkup()
    _system(checkup)
    installed = _packages(checkup)
    torch = probe(TORCH_PROBE) if "torch" in installed else None
    _device(checkup, torch, installed)
    if torch and "error" not in torch and "unsloth" in installed:
        _unsloth(checkup, probe(PROBE), installed["unsloth"])
    checkup.lines.append(("HF token", hub_token()))
    _folders(checkup)
    return checkup


def _system(checkup: Checkup) -> None:
    version = sys.version_info[:2]
    checkup.lines.append(("Python", f"{platform.python_version()}  {sys.executable}"))
    checkup.lines.append(("System", f"{platform.system()} {platform.release()}, {platform.machine()}, {_resources()}"))
    if version < (3, 11):
        checkup.fatal.append((f"Python {platform.python_version()} is too old", "use Python 3.11 or 3.12"))
    elif version > (3, 12):
        checkup.hints.append((f"Python {platform.python_version()} was not tried", "Python 3.11 and 3.12 were"))


def _resources() -> str:
    text = f"{os.cpu_count()} CPUs"
    if importlib.util.find_spec("psutil"):
        import psutil

        text += f", {psutil.virtual_memory().total / 2**30:.0f} GiB memory"
    return text


def read_pins() -> dict[str, str]:
    """Package -> version of every `name==version` line in the requirements files, names in lower case with "_"."""
    pins: dict[str, str] = {}
    for name in PINS:
        path = ROOT / name
        if path.exists():
            pairs = re.findall(r"(?m)^([\w.-]+)==([^\s;#]+)", path.read_text(encoding="utf-8"))
            pins |= {package.lower().replace("-", "_"): version for package, version in pairs}
    return pins


def installed_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages(checkup: Checkup) -> dict[str, str]:
    """Compare what is installed with the pins; returns package -> installed version."""
    pins = read_pins()
    found = {name: installed_version(name) for name in pins.keys() | NEEDED}
    installed = {name: version for name, version in found.items() if version}
    missing = sorted(found.keys() - installed.keys())
    other = sorted(name for name, pin in pins.items() if name in installed and installed[name].split("+")[0] != pin)
    needed = [name for name in missing if name in NEEDED]
    if needed:
        checkup.fatal.append((f"not installed: {', '.join(needed)}", INSTALL))
    if len(missing) > len(needed):
        rest = ", ".join(name for name in missing if name not in NEEDED)
        checkup.hints.append((f"not installed, needed by some commands: {rest}", INSTALL))
    if other:
        differing = ", ".join(f"{name} {installed[name]} (pinned {pins[name]})" for name in other)
        checkup.hints.append((f"other versions than those tried: {differing}", INSTALL))
    same = len(pins) - len(other) - len([name for name in missing if name in pins])
    checkup.lines.append(("Packages", f"{same} of {len(pins)} pinned packages have the pinned version"))
    shown = "  ".join(f"{name} {installed[name]}" for name in SHOWN if name in installed)
    if shown:
        checkup.lines.append(("", shown))
    return installed


def probe(code: str) -> dict[str, Any]:
    """Run `code` in another Python process; the JSON it prints behind PROBE, or {"error": its last line}."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, timeout=PROBE_SECONDS, env=environment, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_SECONDS} s"}
    answer = done.stdout.rpartition("\nPROBE")[2]
    try:
        return json.loads(answer)
    except ValueError:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return {"error": lines[-1] if lines else f"ended with status {done.returncode}"}


def gpus_of_the_machine() -> list[str]:
    """Names of the NVIDIA cards the driver knows, whether torch can use them or not."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU \d+: (.+?) \(UUID", done.stdout, re.MULTILINE) if done.returncode == 0 else []


def torch_remedy() -> str:
    pin = read_pins().get("torch", "")
    index = " --index-url https://download.pytorch.org/whl/cu130" if sys.platform == "win32" else ""
    return f"pip uninstall torch, then pip install torch=={pin}{index}"


def _device(checkup: Checkup, torch: dict[str, Any] | None, installed: dict[str, str]) -> None:
    cards = gpus_of_the_machine()
    if torch is None or "error" in torch:
        checkup.lines.append(("Device", ", ".join(cards) or "no NVIDIA GPU"))
        if torch:
            checkup.fatal.append((f"torch cannot be imported: {torch['error']}", INSTALL))
        return
    build = f"CUDA {torch['cuda']}" if torch["cuda"] else f"ROCm {torch['hip']}" if torch["hip"] else "CPU"
    checkup.lines.append(("torch", f"{torch['version']}, {build} build"))
    if torch["available"]:
        text = "; ".join(f"{name}, {size:.0f} GiB, compute {capability}" for name, size, capability in torch["cards"])
        checkup.lines.append(("Device", text))
        if len(torch["cards"]) > 1:
            checkup.hints.append(("several GPUs: one process uses the first", "choose with CUDA_VISIBLE_DEVICES"))
        return
    checkup.lines.append(("Device", f"CPU{' (the GPU is not used)' if cards else ', no NVIDIA GPU'}"))
    if cards and not torch["cuda"]:
        checkup.hints.append((f"{cards[0]} is idle: this torch is a CPU build", torch_remedy()))
    elif cards:
        checkup.hints.append((f"{cards[0]} is idle: torch cannot reach it",
                              f"update the NVIDIA driver to one for CUDA {torch['cuda']}, see nvidia-smi"))  # fmt: skip
    beside = [name for name in ("triton", "torchvision", "xformers") if installed_version(name)]
    if beside and not torch["cuda"] and not torch["hip"]:
        checkup.hints.append((f"{' and '.join(beside)}: made for CUDA, and breaks imports beside a CPU build of torch",
                              f"pip uninstall {' '.join(beside)}"))  # fmt: skip


def _unsloth(checkup: Checkup, answer: dict[str, Any], version: str) -> None:
    if "error" in answer:
        checkup.lines.append(("Unsloth", f"{version}, cannot be imported"))
        checkup.fatal.append((answer["error"], INSTALL))
        return
    backend = "CPU fallback" if answer["unsloth"] == "cpu" else f"{answer['unsloth'].upper()} backend"
    checkup.lines.append(("Unsloth", f"{version}, {backend}, {answer['threads']} CPU threads"))
    slow = {"bfloat16": "bfloat16, in hardware", "float16": "float16 (no bfloat16 in hardware)"}
    checkup.lines.append(("Precision", slow.get(answer["dtype"], "float32 (bfloat16 is emulated and slow here)")))
    checkup.lines.append(("4-bit", "works (bitsandbytes NF4, tried)" if answer["four_bit"] else "does not work"))
    if not answer["four_bit"]:
        error = answer.get("four_bit_error", "NF4 values come back wrong")
        checkup.hints.append((f"no 4-bit models: {error}", "train with --no-load_in_4bit, or reinstall bitsandbytes"))


def hub_token() -> str:
    """Where a Hugging Face token was found; never the token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(name, "").strip():
            return f"present (from {name})"
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    if Path(os.environ.get("HF_TOKEN_PATH", home / "token")).is_file():
        return "present (from hf auth login)"
    return "none (only gated and private models need one: set HF_TOKEN)"


def _folders(checkup: Checkup) -> None:
    for name, folder in (("Runs", Path("experiments").resolve()), ("Cache", cache_dir())):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**30
        try:
            with tempfile.TemporaryFile(dir=existing):
                checkup.lines.append((name, f"{folder}, writable, {free:.0f} GiB free"))
        except OSError as error:
            checkup.lines.append((name, f"{folder}, not writable"))
            remedy = "--experiments_dir FOLDER" if name == "Runs" else "SANDWICH_CACHE=FOLDER"
            checkup.fatal.append((f"cannot write to {existing}: {error.strerror}", f"choose another: {remedy}"))
        if free < LITTLE_DISK_GB:
            checkup.hints.append((f"only {free:.1f} GiB free at {existing}", "make room: checkpoints fill it"))
