"""A format of two files, outside this package: registered by a call or by an entry point, then used like any other."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import formats
from finetune.encoding.encode import encode_conversations
from formats import FormatError, builtin, get_format
from formats.choosing import OWN_TEMPLATE
from formats.registry import FORMATS
from tests import parts
from tests.formats.cases import ROWS
from tests.formats.checks import assert_exact

ROOT = Path(__file__).parents[2]
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
MODULE = """\
from formats import Format
from formats.base import read_template
from formats.calls import call_from_object, read_json, read_tagged


def parse(text, tools=None):
    def body(source, at):
        value, end = read_json(source, at)
        return call_from_object(value, "arguments"), end

    return read_tagged(text, "<call>", "</call>", body)


def detect(added, template):
    return "the tokenizer has <repo_name>" if "<repo_name>" in added else None


FORMAT = Format(
    "shout", read_template(__file__), ("<|im_end|>",), ("<|im_start|>",), ("<call>", "</call>"),
    read_calls=parse, detect=detect, detect_order=5,
)
"""


@pytest.fixture
def package(tmp_path):
    """A folder with the two files of the format and the metadata of an installed package."""
    (tmp_path / "shout_format.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "shout_format.jinja").write_text(TEMPLATE, encoding="utf-8")
    metadata = tmp_path / "shout_format-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shout-format\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[sandwich.formats]\nshout = shout_format:FORMAT\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def registered(package, monkeypatch):
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.delitem(sys.modules, "shout_format", raising=False)
    fmt = importlib.import_module("shout_format").FORMAT
    formats.register(fmt)
    yield fmt
    del FORMATS["shout"]


def test_registered_format_masks_and_parses(registered, tmp_path):
    tokenizer = parts.tokenizer("smollm2")
    fmt = get_format("shout", tokenizer)
    statuses = set()
    for label in ("plain", "single_call", "parallel", "text_and_call", "nested_arguments", "turns"):
        encoded = formats.encode(ROWS[label], tokenizer, fmt)
        assert_exact(ROWS[label], encoded, tokenizer, fmt)
        statuses.add(encoded.status)
    assert statuses == {"ok"}
    parsed = fmt.parse('So.<call>{"name": "f", "arguments": {"a": 1}}</call><|im_end|>')
    assert (parsed.content, parsed.tool_calls) == ("So.", [{"name": "f", "arguments": {"a": 1}}])
    bare = parts.fresh_tokenizer("smollm2")
    bare.chat_template = None  # an own template would decide
    assert formats.choose_format(bare)[0] is registered


def test_registered_format_encodes_in_processes(registered, tmp_path):
    """Workers get the format by pickle; a change to its code makes another cache file."""
    tokenizer, rows = parts.tokenizer("smollm2"), [ROWS["single_call"]] * 3
    flags = {"cache_dir": tmp_path / "cache", "progress": False, "num_proc": 2}
    first = encode_conversations(rows, tokenizer, registered, **flags)
    assert first.report["kept"] == 3
    assert encode_conversations(rows, tokenizer, registered, **flags).report["from_cache"]
    module = Path(sys.modules["shout_format"].__file__)
    module.write_text(MODULE + "# changed\n", encoding="utf-8")
    assert not encode_conversations(rows, tokenizer, registered, **flags).report["from_cache"]


def test_name_can_be_registered_once(registered):
    formats.register(registered)
    with pytest.raises(FormatError, match="'chatml': the name is taken"):
        formats.register(formats.Format("chatml", "", ()))


def test_entry_point_makes_a_format_known(package):
    """`prepare_data.py parse --format shout` finds the installed package; a broken one is named."""
    source = package / "texts.jsonl"
    source.write_text('{"text": "<call>{\\"name\\": \\"f\\", \\"arguments\\": {}}</call>"}\n', encoding="utf-8")
    command = [sys.executable, ROOT / "prepare_data.py", "parse", "--format", "shout", source, package / "out.jsonl"]

    def run() -> subprocess.CompletedProcess:
        return subprocess.run(
            command, env={"PYTHONPATH": str(package)}, capture_output=True, check=False, text=True, encoding="utf-8"
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert "1 text read, 0 with errors, 1 call " in done.stdout
    (package / "shout_format.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    done = run()
    assert done.returncode == 2 and "entry point shout = shout_format:FORMAT: ModuleNotFoundError" in done.stderr


def test_builtin_formats_are_found_by_file_name():
    folder = Path(builtin.__path__[0])
    names = {path.stem.replace("_", "-") for path in folder.glob("*.jinja")}
    assert {path.stem for path in folder.glob("*.jinja")} == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert {name for name in FORMATS if not name.startswith("mistral-")} == names | set(OWN_TEMPLATE)


def test_auto_asks_formats_in_this_order():
    asked = sorted((fmt for fmt in FORMATS.values() if fmt.detect), key=lambda fmt: fmt.detect_order)
    names = [fmt.name for fmt in asked]
    assert names == ["llama3", "qwen-xml", "qwen", "chatml", "mistral", "gemma", "phi4-mini"]
