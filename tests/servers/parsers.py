"""The tool-call parsers of a real vLLM on the answers that templates write: no model, no server.

    python -m tests.servers.parsers [--templates FOLDER] [--record record.md]

Every trained answer of the test conversations is parsed complete and streamed token by token by the parser that an
export would name, and the calls and the text are compared with those of `Format.parse`. Published templates stand on a
vocabulary of bytes. Needs the environment of `make test-servers`; exit status 1 when calls differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.export.vllm import parser_of, write_plugin
from finetune.runs.find import Run
from formats import FORMATS, IGNORE_INDEX, Format, FormatError, choose_format, encode
from tests.formats import public_templates
from tests.formats.table import ALL
from tests.scripts import ROOT
from tests.servers.memorized import CASES, default_pairs
from tests.servers.servers import VLLM_VARIABLES

HEADER = (
    "| template | format | parser | answers | calls as ours | streamed | text as ours |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: |",
)


def tokenizers(templates: Path | None) -> Iterator[tuple[str, Any, Format]]:
    """(label, tokenizer, format): every named format on a real vocabulary, then every published template."""
    for pair in default_pairs():
        if not pair.format.startswith("native"):
            yield (f"({pair.label})", *pair.load())
    texts = {name: public_templates.load(name, "bytes").chat_template for name in public_templates.names()}
    files = sorted(templates.glob("*.jinja")) if templates else []
    for label, text in {**texts, **{path.stem: path.read_text(encoding="utf-8") for path in files}}.items():
        tokenizer = public_templates.tokenizer_with(text)
        try:
            yield label, tokenizer, choose_format(tokenizer)[0]
        except FormatError:
            continue


def trained_answers(tokenizer: Any, fmt: Format) -> list[dict[str, Any]]:
    """Each trained answer of each conversation: its ids, and what `Format.parse` reads."""
    answers = []
    for name, row in {**CASES, **ALL}.items():
        for sequence in encode(row, tokenizer, fmt).sequences:
            ids: list[int] = []
            for label in (*sequence.labels, IGNORE_INDEX):
                if label != IGNORE_INDEX:
                    ids.append(label)
                elif ids:
                    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                    read = fmt.parse(text, row["tools"])
                    answers.append({
                        "case": name, "ids": ids, "tools": row["tools"], "calls": read.tool_calls, "text": read.content
                    })  # fmt: skip
                    ids = []
    return answers


def write(folder: Path, label: str, tokenizer: Any, fmt: Format) -> None:
    parser = parser_of(fmt, tokenizer.get_vocab())
    if parser is None:
        return
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(end) for end in fmt.end_of_turn]
    given = {"label": label, "format": fmt.name, "parser": parser, "ends": ends}
    (folder / "given.json").write_text(json.dumps({**given, "answers": trained_answers(tokenizer, fmt)}), "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--vllm", type=Path, default=ROOT / ".cache" / "vllm", help="virtual environment with vLLM")
    parser.add_argument("--templates", type=Path, help="folder of more chat templates (*.jinja)")
    parser.add_argument("--record", type=Path, help="append the table to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "plugin").mkdir()
        write_plugin(folder / "plugin", Run("x", None, None), FORMATS["llama3-function"])
        for number, (label, tokenizer, fmt) in enumerate(tokenizers(args.templates)):
            write(folder / f"{number:03}", label, tokenizer, fmt)
        command = [args.vllm / "bin" / "python", Path(__file__).with_name("parse_with_vllm.py"), folder]
        variables = {**VLLM_VARIABLES, "VLLM_LOGGING_LEVEL": "CRITICAL"}
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=variables, check=True).stdout
    lines = [*HEADER, *(line for line in made.splitlines() if line.startswith("|"))]
    print(*lines, sep="\n")
    if args.record:
        with args.record.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    return "CALLS" in made


if __name__ == "__main__":
    sys.exit(main())
