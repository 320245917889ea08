"""Serve exports with vLLM and llama.cpp, and compare their calls with those of our own generation.

    make test-servers ONLY="chatml qwen" ARGS="--record record.md"

For each format a small model learns six answers by heart, so that greedy answers do not depend on rounding. Every
answer is requested complete and streamed with tool_choice auto, and one call with required and with a named function;
these two are written under a JSON grammar that the model has not learned, so any valid call passes. llama.cpp's are
shown and not judged: there `required` allows text of any length before a call, and a named function is the same as
`auto`. Exit status 1 when a call differs from our own generation's, a forced one is not valid, or a server does not
start; for an export that warned that llama.cpp does not read its calls ("must fail" in the table), when all are equal.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.json_schema import schema_errors
from tests.formats.pairs import Pair
from tests.scripts import ROOT
from tests.servers.client import Answer, ask
from tests.servers.memorized import EXPORTS, MAX_NEW_TOKENS, default_pairs, folder_of, log_of
from tests.servers.servers import StartError, Vllm, llama_cpp_server

CANNOT_READ = "llama.cpp's server did not read a call"  # in the warning of an export
# llama.cpp's converter shows Gemma 4's quotes, which are control tokens, for Gemma's own architecture only.
FAILS_AS_LLAMA = {("gemma4_v5", "gguf")}
HEADER = (
    "| format | vocabulary | export | parser | calls as ours | streamed | text as ours | required | named | start, s |",
    "| --- | --- | --- | --- | ---: | ---: | ---: | --- | --- | ---: |",
)


@dataclass
class Outcome:
    """One export on its server: counts of answers, and a line for each that differs."""

    pair: Pair
    export: str
    parser: str = ""
    start_s: float = 0.0
    requests: int = 0
    same: int = 0
    same_streamed: int = 0
    same_text: int = 0
    forced: dict[str, str] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    must_fail: bool = False

    @property
    def passed(self) -> bool:
        is_same = self.same == self.same_streamed == self.requests
        return self.requests > 0 and (not is_same if self.must_fail else is_same and not self.differences)

    def row(self) -> str:
        of = f"of {self.requests}"
        cells = [
            f"`{self.pair.format}`", self.pair.label, self.export, "must fail" if self.must_fail else self.parser,
            f"{self.same} {of}", f"{self.same_streamed} {of}", f"{self.same_text} of {2 * self.requests}",
            self.forced.get("required", "-"), self.forced.get("named", "-"), f"{self.start_s:.0f}",
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"


def compare(url: str, answers: dict[str, Any], outcome: Outcome) -> None:
    """Ask everything, four requests at a time, and count what equals our own answers."""
    with ThreadPoolExecutor(4) as pool:
        requests = {
            (name, stream): pool.submit(ask, url, case, stream=stream, max_tokens=MAX_NEW_TOKENS)
            for name, case in answers.items()
            for stream in (False, True)
        }
    outcome.requests = len(answers)
    for (name, stream), request in requests.items():
        served, case = request.result(), answers[name]
        is_same = served.error is None and served.calls == case["calls"]
        outcome.same += is_same and not stream
        outcome.same_streamed += is_same and stream
        outcome.same_text += is_same and served.content.strip() == case["content"].strip()
        if not is_same:
            outcome.differences.append(f"{name}{', streamed' * stream}: {served} instead of {case['calls']}")
    # One call of one tool, whose arguments have few values: under a grammar the model leaves what it has learned, and
    # may write calls until its tokens end. Without "strict" some of vLLM's parsers constrain the name alone.
    only, *_ = answers["call"]["tools"]
    case = {**answers["call"], "tools": [{**only, "function": {**only["function"], "strict": True}}]}
    choices = {"required": "required", "named": {"type": "function", "function": {"name": "weather"}}}
    for kind, choice in choices.items():
        options = {"max_tokens": MAX_NEW_TOKENS, "tool_choice": choice, "parallel_tool_calls": False}
        served = [ask(url, case, stream=stream, **options) for stream in (False, True)]
        verdicts = [verdict(one, case) for one in served]
        outcome.forced[kind] = " / ".join(verdicts)
        # vLLM's grammar for `mistral` allows any number of calls: the model writes them until its tokens end.
        is_valid = {*verdicts} <= {"same", "valid", "cut off"} and {*verdicts} != {"cut off"}
        if not is_valid and outcome.export != "gguf":
            outcome.differences += [f"{kind}: {one}" for one in served]


def verdict(served: Answer, case: dict[str, Any]) -> str:
    """How a forced call compares: same as ours, another valid call, an invalid one, cut off, none, or refused."""
    if served.error is not None:
        return "refused"
    if served.calls == case["calls"]:
        return "same"
    if not served.calls:
        return "cut off" if served.finish_reason == "length" else "none"
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in case["tools"]}
    is_valid = all(
        call["name"] in schemas and schema_errors(schemas[call["name"]], call["arguments"]) == ([], None)
        for call in served.calls
    )
    return "valid" if is_valid else "invalid"


def serve(pair: Pair, export: str, folder: Path, vllm: Vllm) -> Outcome:
    """Start a server on one export and compare its answers."""
    outcome, made = Outcome(pair, export), folder / export.replace(":", "-")
    if not (folder / "answers.json").is_file() or not made.is_dir():
        outcome.differences.append("there is no export: see memorized.log")
        return outcome
    answers = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    is_warned = CANNOT_READ in log_of(made).read_text(encoding="utf-8")
    outcome.must_fail = is_warned or (pair.template, export) in FAILS_AS_LLAMA
    outcome.differences += [
        f"{name}: our own generation does not read the trained calls"
        for name, case in answers.items()
        if case["calls"] != case["trained_calls"]
    ]
    began = time.monotonic()
    if export != "gguf":
        words = shlex.split((made / "serve.sh").read_text(encoding="utf-8").splitlines()[-1])
        outcome.parser = words[words.index("--tool-call-parser") + 1] if "--tool-call-parser" in words else "none"
    try:
        with vllm.server(made) if export != "gguf" else llama_cpp_server(made) as url:
            outcome.start_s = time.monotonic() - began
            compare(url, answers, outcome)
    except StartError as error:
        outcome.differences.append(str(error))
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only", nargs="*", metavar="FORMAT", help="formats, templates or *.jinja files (default: all)"
    )
    parser.add_argument("--exports", nargs="+", choices=EXPORTS, default=list(EXPORTS))
    parser.add_argument("--vllm", type=Path, default=ROOT / ".cache" / "vllm", help="virtual environment with vLLM")
    parser.add_argument("--workspace", type=Path, help="keep runs and exports in this folder")
    parser.add_argument("--record", type=Path, help="append the table to this file")
    args = parser.parse_args()
    lines, failed = [*HEADER], []
    with tempfile.TemporaryDirectory() as temporary:
        workspace = args.workspace or Path(temporary)
        workspace.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.servers.memorized", str(workspace), "--exports", *args.exports]
        command += ["--only", *args.only] if args.only else []
        with (workspace / "memorized.log").open("a", encoding="utf-8") as log:
            subprocess.run(command, cwd=ROOT, stderr=log, check=False)
        print("\n".join(HEADER), flush=True)
        with contextlib.closing(Vllm(args.vllm)) as vllm:
            for pair in default_pairs(args.only):
                for export in args.exports:
                    outcome = serve(pair, export, folder_of(pair, workspace), vllm)
                    lines.append(outcome.row())
                    print(lines[-1], flush=True)
                    print(*(f"  {line}" for line in outcome.differences), sep="\n", file=sys.stderr, flush=True)
                    if not outcome.passed:
                        failed.append(f"{pair.format} on {pair.label}, {export}")
    if args.record:
        with args.record.open("a", encoding="utf-8") as file:
            file.write("\n".join([*facts(args.vllm), *lines]) + "\n")
    print(*(f"FAILED: {line}" for line in failed), sep="\n", file=sys.stderr)
    return bool(failed)


def facts(venv: Path) -> list[str]:
    """Machine, versions and command of a record."""
    script = (
        "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('vllm', 'torch', 'transformers')))"
    )
    served = subprocess.run([venv / "bin" / "python", "-c", script], capture_output=True, text=True, check=False).stdout
    from importlib.metadata import version

    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines()
         if line.startswith("model name")), platform.processor(),
    )  # fmt: skip
    return [
        f"{time.strftime('%Y-%m-%d')}, {cpu}, Python {platform.python_version()}; server: {served.strip()}; "
        f"xllamacpp {version('xllamacpp')}; `python -m tests.servers {shlex.join(sys.argv[1:])}`", "",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
