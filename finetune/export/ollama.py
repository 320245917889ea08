"""A Modelfile for Ollama: the chat template as Go's text/template, its stop strings, and how calls are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from finetune.errors import UserError
from finetune.export.ollama_json import prelude
from formats import FORMATS, Format, FormatError, get_format
from formats.base import clean_messages, render_messages

TEMPLATES = Path(__file__).with_name("ollama_templates")


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
    return prelude(body, *separators) + variables + tag + body


def known_format(fmt: Format, tokenizer: Any) -> Format:
    """The format of ours that writes what this one's template writes, with its pinned variables.

    fmt: the trained format; `native` and formats of the user's own are compared with all of ours, so is a template
    of an older version. Raises FormatError where none is the same.
    """
    names = [fmt.name] if fmt.name in FORMATS and fmt.name != "native" else [n for n in FORMATS if n != "native"]
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
            f"the run was trained with another {fmt.name} template than this version has; use --to vllm or --to gguf"
        )
    raise FormatError(f"format {fmt.name} is none of those that have a template for Ollama; use --to vllm or --to gguf")


def _renderings(fmt: Format, tokenizer: Any) -> list[str | None]:
    """Texts of a few conversations that tell templates apart; None where the template refuses one."""
    texts = []
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

    context: tokens of num_ctx; Ollama's own default is shorter than many tool lists, and cuts silently.
    Raises FormatError for a format that Ollama cannot serve.
    """
    template = go_template(fmt)
    if '"""' in template:
        raise FormatError(f'format {fmt.name}: a Modelfile cannot hold a template with """ in it')
    lines = [f"FROM ./{weights}", f'TEMPLATE """{template}"""']
    if fmt.ollama and fmt.ollama.parser:
        lines.append(f"PARSER {fmt.ollama.parser}")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stop_strings(fmt)]
    lines.append("PARAMETER temperature 0")
    if context:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def stop_strings(fmt: Format) -> list[str]:
    """Every end of turn, and for a format without control tokens the words that start somebody else's turn."""
    return [*fmt.end_of_turn, *(fmt.ollama.stop if fmt.ollama else ())]


def export_ollama(folder: Path, gguf: Path, fmt: Format, tokenizer: Any, context: int | None) -> Path:
    """Write `folder`/Modelfile for a GGUF in the same folder; `fmt` is the format with the template of the run."""
    path = folder / "Modelfile"
    path.write_text(modelfile(known_format(fmt, tokenizer), gguf.name, context=context), encoding="utf-8")
    return path


def check_format(run: Any) -> None:
    """Refuse before any work what Ollama cannot serve, as far as the run's config tells."""
    fmt = FORMATS.get(run.experiment.config["format"]["name"]) if run.experiment is not None else None
    if fmt is not None and fmt.ollama is not None and (reason := fmt.ollama.refused):
        raise UserError(f"format {fmt.name} cannot be served by Ollama: {reason}; use --to vllm or --to gguf")
