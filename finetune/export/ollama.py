"""A Modelfile for Ollama: the chat template in Go's text/template, stop strings, and how Ollama finds tool calls."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.export.gguf import find_tools, write_gguf
from finetune.export.merged import served_format
from finetune.export.ollama_json import definitions
from finetune.export.targets import Job, target
from finetune.progress import say
from formats import FORMATS, Format, FormatError, get_format
from formats.base import clean_messages, render_messages
from formats.choosing import OWN_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = Path(__file__).with_name("ollama_templates")


@target("ollama", marker="Modelfile", help="a GGUF file and its Modelfile")
def export_ollama(job: Job) -> Callable[[Path], None]:
    tokenizer, fmt = job.run.load_tokenizer()
    known = known_format(served_format(job.run, fmt), tokenizer)
    go_template(known)  # raises before the slow merge
    quantizations = job.quantization[-1:]
    (gguf,), _ = write_gguf(job, quantizations, find_tools(job.llama_cpp, quantizations))
    text = modelfile(known, gguf.name, context=job.run.max_length())
    (job.folder / "Modelfile").write_text(text, encoding="utf-8")
    command = ["ollama", "create", job.name.lower(), "-f"]
    return lambda folder: say(f"next: {shlex.join([*command, str(folder / 'Modelfile')])}")


def go_template(fmt: Format) -> str:
    """The format's template for Ollama, which adds the start token itself. Raises FormatError with a reason."""
    ollama = fmt.ollama
    if ollama is None:
        raise FormatError(f"format {fmt.name} has no template for Ollama; use --to vllm or --to gguf")
    if ollama.refused:
        raise FormatError(f"format {fmt.name} cannot be served by Ollama: {ollama.refused}; use --to vllm or --to gguf")
    body = (TEMPLATES / f"{ollama.template}.gotmpl").read_text(encoding="utf-8").strip()
    pinned = {**fmt.template_kwargs, **({"end": fmt.end_of_turn[0]} if "$end" in body else {})}
    variables = "".join(
        f"{{{{ ${name} := {json.dumps(value, ensure_ascii=False)} }}}}"
        for name, value in pinned.items()
        if isinstance(value, (str, bool))
    )
    # Ollama takes the first text inside the first `if .ToolCalls` for the start of a call; this one never writes it.
    tag = f"{{{{ if and false .ToolCalls }}}}{ollama.call_start}{{{{ end }}}}" if ollama.call_start else ""
    separators = (",", ":") if ollama.compact_json else (", ", ": ")
    return definitions(body, *separators) + variables + tag + body


def known_format(fmt: Format, tokenizer: PreTrainedTokenizerBase) -> Format:
    """The built-in format whose template renders what `fmt`, the trained one, renders.

    `native` and custom formats are compared with all built-in ones; a format that Ollama cannot serve is returned as it
    is. Raises FormatError where none is the same.
    """
    if fmt.ollama is not None and fmt.ollama.refused:
        return fmt
    named = [name for name in FORMATS if name not in OWN_TEMPLATE]
    names = [fmt.name] if fmt.name in named else named
    wanted = _renderings(fmt, tokenizer)
    for name in names:
        try:
            candidate = get_format(name, tokenizer)
            if set(fmt.end_of_turn) == set(candidate.end_of_turn) and _renderings(candidate, tokenizer) == wanted:
                return candidate
        except FormatError:
            continue
    if len(names) == 1:
        raise FormatError(
            f"the run was trained with another version of the {fmt.name} template; use --to vllm or --to gguf"
        )
    raise FormatError(f"format {fmt.name} renders like no format with an Ollama template; use --to vllm or --to gguf")


def _renderings(fmt: Format, tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """A few conversations that distinguish templates, as text; None where the template refuses one."""
    texts: list[str | None] = []
    for messages, tools in _PROBES:
        try:
            texts.append(render_messages(clean_messages(messages, fmt), tools, fmt, tokenizer, True))
        except Exception:  # templates raise anything
            texts.append(None)
    return texts


_TOOL = {
    "type": "function",
    "function": {
        "name": "fq0zk",
        "description": "dq0zk",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    },
}
_USER, _SAID = {"role": "user", "content": "uq0zk"}, {"role": "assistant", "content": "aq0zk"}
_CALL = {"type": "function", "id": "callid000", "function": {"name": "fq0zk", "arguments": {"a": "vq0zk"}}}
_CALLS = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "content": "rq0zk", "tool_call_id": "callid000"}
_PROBES = [
    ([_USER], []),
    ([{"role": "system", "content": "sq0zk"}, _USER, _SAID, _USER], []),
    ([_USER, _CALLS, _RESULT], [_TOOL]),
    ([{"role": "system", "content": "sq0zk"}, _USER, _CALLS, _RESULT, _SAID, _USER], [_TOOL, _TOOL]),
    ([_USER, {**_CALLS, "tool_calls": [_CALL, {**_CALL, "id": "callid001"}]}, _RESULT, _RESULT], [_TOOL]),
    ([_USER, {**_CALLS, "content": "aq0zk"}, _RESULT], [_TOOL]),
]


def modelfile(fmt: Format, weights: str, *, context: int | None = None) -> str:
    """Text of a Modelfile for `weights` (a GGUF file beside it).

    context  tokens of num_ctx; Ollama's default is shorter than many tool lists, and it truncates silently
    Raises FormatError for a format that Ollama cannot serve.
    """
    template = go_template(fmt)
    if '"""' in template:
        raise FormatError(f'format {fmt.name}: a Modelfile cannot contain a template with """')
    lines = [f"FROM ./{weights}", f'TEMPLATE """{template}"""']
    if fmt.ollama and fmt.ollama.parser:
        lines.append(f"PARSER {fmt.ollama.parser}")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stop_strings(fmt)]
    lines.append("PARAMETER temperature 0")
    if context:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def stop_strings(fmt: Format) -> list[str]:
    """Every end of turn, and for a format without control tokens the labels that start the next turn."""
    return [*fmt.end_of_turn, *(fmt.ollama.stop if fmt.ollama else ())]
