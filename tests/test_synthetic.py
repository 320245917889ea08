"""Synthetic rows: reproducible, valid, with disjoint wordings of the splits; the committed samples."""

import contextlib
import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from finetune.errors import UserError
from finetune.preparing.checks import check_conversation
from finetune.reading.conversations import load_conversations, normalize_row
from finetune.reading.tool_schemas import load_tools_file
from finetune.synthetic.generate import NoNewRequest, Writer, generate, generate_files, shares
from finetune.synthetic.phrasebook import load_phrasebook
from finetune.synthetic.phrasing import SPLITS, Value, expand, fill_arguments, read_json
from finetune.synthetic.schema_phrasing import FOLDER, LANGUAGES, own_descriptions, task_of, with_value
from finetune.synthetic.schema_texts import humanised, texts_for
from finetune.synthetic.schema_values import SchemaValues

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "data" / "samples"
SCHEMAS, ALL_SCHEMAS, TIERS = (
    SAMPLES / f"gennx_{name}.json" for name in ("tool_schemas_tier1", "tool_schemas_all", "tiers")
)
README = " ".join((SAMPLES / "README.md").read_text(encoding="utf-8").replace("\\\n", " ").split())
# The flags of the commands that give the samples.
COMMANDS = re.findall(r"generate (--tools data/samples/\S+ --output data/samples .*? --name \w+)", README)
FOUR_TOOLS = [
    {
        "name": "rag_retrieval",
        "description": "Searches the knowledge base for documents.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}, "top_k": {"type": "integer", "minimum": 1, "maximum": 20}},
            "required": ["query"],
        },
    },
    {
        "name": "web_search",
        "description": "Search the internet for current information",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string"}, "region": {"enum": ["us", "de", "kr"]}},
            "required": ["query"],
        },
    },
    {
        "name": "code_execution",
        "description": "Execute Python code in a sandbox",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string"}, "timeout": {"type": "number", "minimum": 1, "maximum": 60}},
            "required": ["code"],
        },
    },
    {
        "name": "direct_chat",
        "description": "Direct conversation without external tools",
        "parameters": {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]},
    },
]


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "prepare_data.py"), "generate", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)


def texts(row: dict, role: str) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == role]


def calls(row: dict) -> list[dict]:
    return [call["function"] for message in row["messages"] for call in message.get("tool_calls", ())]


@pytest.fixture
def four_tools(tmp_path) -> Path:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(FOUR_TOOLS), encoding="utf-8")
    return path


# --- the committed samples


def test_tier_1_has_fifteen_valid_schemas():
    tools = load_tools_file(SCHEMAS)
    assert len({tool["function"]["name"] for tool in tools}) == 15
    for tool in tools:
        Draft202012Validator.check_schema(tool["function"]["parameters"])
    bodies = [tool["function"]["parameters"]["properties"].get("Assign") for tool in tools]
    assert sum(body is not None for body in bodies) == 11


@pytest.mark.parametrize("command", COMMANDS, ids=["gennx", "gennx_ko", "demo"])
def test_command_gives_the_committed_samples(tmp_path, command):
    done = prepare(*command.split(), "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    written = list(tmp_path.iterdir())
    assert len(written) == len(SPLITS)
    for path in written:
        assert path.read_bytes() == (SAMPLES / path.name).read_bytes(), path.name
        assert path.stat().st_size < 2_000_000


def requests(path: Path) -> set[str]:
    return {skeleton(text) for row in read_rows(path) for text in texts(row, "user")}


# Requests written by hand -> the rows of the same tools that are, or can be, trained.
NATURAL = {
    "demo_natural": ("demo_train", "demo_heldout"),
    "gennx_natural": ("gennx_train", "gennx_heldout"),
    "gennx_natural_all": ("gennx_train", "gennx_heldout", "gennx_natural"),
    "gennx_natural_ko": ("gennx_train_ko", "gennx_heldout_ko"),
    "house_natural": (),
    "korean_natural": ("korean_toolflow", "korean_when2call", "korean_apigen"),
    "tool_choice_natural": ("tool_choice_train", "tool_choice_validation", "tool_choice_test"),
}


def test_samples_for_training_and_evaluation_share_no_request(tmp_path):
    assert {path.stem for path in SAMPLES.glob("*natural*")} == NATURAL.keys()
    for name, others in NATURAL.items():
        asked = [requests(SAMPLES / f"{one}.jsonl") for one in (name, *others)]
        if name in ("demo_natural", "gennx_natural"):
            assert all(not one & other for one, other in itertools.combinations(asked, 2))
        assert all(not asked[0] & other for other in asked[1:]), name
    for name, *flags in (("house_natural", "house_tools.json", "--per-tool", "64", "--heldout-rows", "40"),
                         ("gennx_natural_all", "gennx_tool_schemas_all.json", "--per-tool", TIERS)):  # fmt: skip
        done = prepare("--tools", SAMPLES / flags[0], *flags[1:], "--output", tmp_path / name)
        assert done.returncode == 0, done.stderr
        made = set().union(*map(requests, (tmp_path / name).glob("*.jsonl")))
        assert len(made) > 100 and not made & requests(SAMPLES / f"{name}.jsonl")


@pytest.mark.parametrize("name", NATURAL)
def test_hand_written_requests_need_every_tool_and_none(name):
    """Without a category the answer is calls; where a tool is for conversation, it takes the place of the others."""
    read = load_conversations(SAMPLES / f"{name}.jsonl", strict=True).conversations
    categories = Counter(row.get("category") for row in read_rows(SAMPLES / f"{name}.jsonl"))
    tools = {tool["function"]["name"] for tool in read[0]["tools"]}
    assert len(read) == 40
    called = Counter(call["name"] for row in read for call in calls(row))
    assert called.keys() == tools
    if "direct_chat" in tools:
        assert categories.keys() == {None} and set(called.values()) == {10}
    else:
        assert categories["missing_parameter"] >= 7 and categories["irrelevant"] >= 4
        assert sum(len(calls(row)) > 1 for row in read) >= 3
    for row, raw in zip(read, read_rows(SAMPLES / f"{name}.jsonl"), strict=True):
        assert bool(calls(row)) == ("category" not in raw)
        assert not any(tool in text for tool in tools for text in texts(raw, "user"))
        assert raw.get("category") != "missing_parameter" or row["messages"][-1]["content"].endswith("?")


def test_sample_questions_begin_alike():
    """One first token of all questions makes "ask or call" one decision for a small model."""
    rows = [row for name in ("demo", "gennx") for row in read_rows(SAMPLES / f"{name}_train.jsonl")]
    asked = [row["messages"][-1]["content"] for row in rows if row.get("category") == "missing_parameter"]
    assert len(asked) > 100 and all(text.startswith("Which ") for text in asked)


@pytest.mark.parametrize("name", sorted({path.name for path in SAMPLES.glob("*.jsonl")} - {"qwen2_test.jsonl"}))
def test_sample_rows_pass_the_checks_of_prepare_data(name):
    choice = SAMPLES / "tool_choice_tools.json"
    gennx, demo = ALL_SCHEMAS if "_all" in name else SCHEMAS, SAMPLES / "demo_tool_schemas.json"
    declared = {"gennx": gennx, "demo": demo, "tool": choice, "query": choice}
    schemas = declared.get(name.partition("_")[0])  # None: each row has its own tools, or none
    tools = load_tools_file(schemas) if schemas else None
    loaded = load_conversations(SAMPLES / name, strict=True, tools=tools)
    for (_, number), conversation in zip(loaded.origins, loaded.conversations, strict=True):
        assert tools is None or conversation["tools"] == tools, number
        errors = [problem.text for problem in check_conversation(conversation) if problem.error]
        assert not errors, (number, errors)


@pytest.mark.parametrize("suffix", ["", "_ko"])
def test_hand_written_rows_have_the_documented_format(suffix):
    rows = read_rows(SAMPLES / f"gennx_tool_calling_samples{suffix}.jsonl")
    assert len(rows) >= 10
    for row in rows:
        assert list(row) == ["messages", "tools"] and isinstance(row["tools"], str)
        roles = [message["role"] for message in row["messages"]]
        assert roles[:2] == ["system", "user"] and roles[-1] == "assistant"
        assert roles.count("assistant") >= 2
        for call in calls(row):
            assert isinstance(call["arguments"], str) and isinstance(json.loads(call["arguments"]), dict)
        for message in row["messages"]:
            assert message["role"] != "tool" or ("name" in message and json.loads(message["content"]) is not None)
    used = Counter(call["name"] for row in rows for call in calls(row))
    assert len(used) == 15  # every tool
    assert any(len(texts(row, "user")) > 1 for row in rows)
    assert any(not calls(row) for row in rows)


@pytest.mark.parametrize("suffix", ["", "_ko"])
def test_held_out_wordings_do_not_occur_in_training(suffix):
    skeletons = {}
    for split in SPLITS:
        rows = read_rows(SAMPLES / f"gennx_{split}{suffix}.jsonl")
        skeletons[split] = {skeleton(text) for row in rows for text in texts(row, "user")}
    assert len(skeletons["heldout"]) > 100
    assert not skeletons["train"] & skeletons["heldout"]


def skeleton(text: str) -> str:
    """A request without its values: numbers and names such as C30, B1, DL or Roof."""
    return re.sub(r"-?\d+(\.\d+)?|\b[A-Z][A-Za-z]*\d*\b(?<!^.)", "#", text[:1].lower() + text[1:]).lower()


@pytest.mark.parametrize("language", LANGUAGES)
def test_templates_of_the_splits_are_disjoint(language):
    """No held-out template is a training template, except in lists of values."""
    shared: set[str] = set()

    def walk(node, path):
        if isinstance(node, dict) and set(node) == set(SPLITS):
            if path[-1] in ("core", "sentence", "missing", "frames", "joins", "chat"):
                assert not {str(text) for text in node["train"]} & {str(text) for text in node["heldout"]}, path
                shared.add(path[-1])
        elif isinstance(node, dict):
            for key, value in node.items():
                walk(value, [*path, key])
        elif isinstance(node, list):
            for number, value in enumerate(node):
                walk(value, [*path, str(number)])

    walk(read_json(SAMPLES / f"gennx_phrasings_{language}.json"), ["file"])
    assert shared == {"core", "sentence", "missing", "frames", "joins", "chat"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_requests_of_the_splits_are_disjoint(language):
    """Thousands of requests, beyond the committed rows."""
    tools, seen = load_tools_file(SCHEMAS), {}
    for split in SPLITS:
        rng = random.Random(f"wide:{split}")
        writer = Writer(load_phrasebook(SAMPLES / f"gennx_phrasings_{language}.json", tools, rng), tools, split, rng)
        for kind in ("call", "steps", "missing", "chat"):
            with contextlib.suppress(NoNewRequest):  # there are only a few chats
                for _ in range(500):
                    writer.row(kind)
        seen[split] = {re.sub(r"-?\d+(\.\d+)?", "#", text) for text in writer.seen}
        assert len(writer.seen) > 1000
    assert not seen["train"] & seen["heldout"]


def test_each_tool_has_twelve_training_wordings():
    """Templates times their alternatives, without frames."""
    data = read_json(SAMPLES / "gennx_phrasings_en.json")
    for name, cases in data["tools"].items():
        wordings = sum(
            1 if "[" not in text else len(re.search(r"\[([^\]]*)\]", text)[1].split("|"))
            for case in cases
            for text in case["core"]["train"] + case.get("sentence", {}).get("train", [])
        )
        assert wordings >= 12, name


@pytest.mark.parametrize("suffix", ["", "_ko"])
def test_held_out_rows_cover_all_tools_and_kinds(suffix):
    rows = read_rows(SAMPLES / f"gennx_heldout{suffix}.jsonl")
    by_tool = Counter(call["name"] for row in rows for call in calls(row))
    assert len(by_tool) == 15 and min(by_tool.values()) >= 4
    assert 100 <= sum(by_tool.values()) <= 150
    assert sum(len(calls(row)) > 1 for row in rows) >= 10
    silent = Counter(row["category"] for row in rows if not calls(row))
    assert silent["irrelevant"] >= 5 and silent["missing_parameter"] >= 5
    assert "category" not in next(row for row in rows if calls(row))


def test_values_of_a_call_are_in_its_request():
    """Numbers and names are copied from the request; only codes (BEAM, 1111111, GZ) are not."""
    codes = {"SB", "SR", "CONC", "STEEL", "BEAM", "TRUSS", "D", "L", "W", "S", "KN", "N", "M", "MM", "GX", "GY", "GZ",
             "1111111", "1110000", "0010000", "REACTIONG", "DISPLACEMENTG", "BEAMFORCE"}  # fmt: skip
    for row in read_rows(SAMPLES / "gennx_train.jsonl"):
        said = " ".join(texts(row, "user"))
        for call in calls(row):
            fixed = {"POST /db/bodf": ["1", 0], "POST /db/unit": ["1"]}.get(call["name"], [])
            for value in leaves(json.loads(call["arguments"])):
                if value not in codes and value not in fixed:
                    assert re.search(rf"(?<![\w.]){re.escape(str(value))}(?![\w]|\.\d)", said), (value, said)


def leaves(value):
    """Values and map keys of arguments without the field names of the API."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key.isdecimal():
                yield key
            yield from leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


# --- the command


def test_seed_decides_the_rows(tmp_path, four_tools):
    for folder, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        done = prepare("--tools", str(four_tools), "--seed", seed, "--output", str(tmp_path / folder))
        assert done.returncode == 0, done.stderr
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


@pytest.mark.parametrize("language", LANGUAGES)
def test_general_wording_for_each_tool(four_tools, language):
    tools = load_tools_file(four_tools)
    made = generate(tools, per_tool=32, language=language, seed=1)
    rows = [row for _, row in made["train"][1]]
    kinds = Counter(kind for kind, _ in made["train"][1])
    assert kinds["missing"] and kinds["ambiguous"] and kinds["chat"] and kinds["steps"]
    by_tool = Counter(calls(row)[0]["name"] for kind, row in made["train"][1] if kind == "call")
    assert set(by_tool.values()) == {32} and len(by_tool) == 4
    requests = Counter(text for row in rows for text in texts(row, "user"))
    assert requests.most_common(1)[0][1] == 1
    assert not set(requests) & {text for _, row in made["heldout"][1] for text in texts(row, "user")}
    for _, row in made["train"][1] + made["heldout"][1]:
        assert not [problem for problem in check_conversation(normalize_row(row)) if problem.error]
    if language == "ko":
        assert all(re.search("[가-힣]", text) for text in requests)


def test_held_out_rows_do_not_depend_on_training_rows(four_tools):
    tools = load_tools_file(four_tools)
    few, many = (generate(tools, rows=rows, heldout_rows=20, seed=5) for rows in (30, 60))
    assert [row for _, row in few["heldout"][1]] == [row for _, row in many["heldout"][1]]


def test_incomplete_and_ambiguous_rows_ask_back(four_tools):
    made = generate(load_tools_file(four_tools), per_tool=32, seed=1)["train"][1]
    for kind, row in made:
        if kind in ("missing", "ambiguous"):
            assert not calls(row)
        if kind == "missing":
            assert row["category"] == "missing_parameter"
            assert re.fullmatch(r"Which (query|code|message) shall I use\?", row["messages"][-1]["content"])
        if kind == "ambiguous":
            assert row["messages"][-1]["content"].startswith("Which of the two: shall I ")


def test_single_tool_without_parameters(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text('[{"name": "ping", "description": "Ping the server"}]', encoding="utf-8")
    made = generate(load_tools_file(path), per_tool=20, seed=0)
    kinds = Counter(kind for kind, _ in made["train"][1])
    assert kinds["call"] >= 20 and not kinds["steps"] and not kinds["ambiguous"] and not kinds["missing"]
    assert all(json.loads(call["arguments"]) == {} for _, row in made["train"][1] for call in calls(row))


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        ("[]", [], ["contains no tool schema"]),
        ("[{}", [], ["tools.json", "JSON array of tool schemas"]),
        (json.dumps(FOUR_TOOLS), ["--phrasings", str(SAMPLES / "gennx_phrasings_en.json")], ["rag_retrieval"]),
        (json.dumps(FOUR_TOOLS), ["--phrasings", "nowhere.json"], ["nowhere.json", "cannot be read"]),
        ('[{"name": "f"}]', ["--rows", "5000"], ["no new request", "fewer rows"]),
        (
            '[{"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}, "required": ["a"]}}]',
            [],
            ["tool f", "no arguments found"],
        ),
        (
            '[{"name": "f", "parameters": {"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}}]',
            [],
            ["tool f: its schema refers to #/$defs/b"],
        ),
    ],
)
def test_bad_input_ends_in_one_line_without_files(tmp_path, content, flags, words):
    path = tmp_path / "tools.json"
    path.write_text(content, encoding="utf-8")
    done = prepare("--tools", str(path), "--output", str(tmp_path / "out"), *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "out").exists()


def test_existing_files_are_kept_without_overwrite(tmp_path, four_tools):
    flags = ("--tools", str(four_tools), "--rows", "20", "--output", str(tmp_path))
    (tmp_path / "heldout.jsonl").write_text("mine", encoding="utf-8")
    done = prepare(*flags)
    assert done.returncode == 2 and "--overwrite" in done.stderr
    assert (tmp_path / "heldout.jsonl").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "train.jsonl").exists()
    assert prepare(*flags, "--overwrite").returncode == 0
    assert len(read_rows(tmp_path / "train.jsonl")) == 20


# --- rows that teach choosing

NOTES = [
    {"name": "notes_search", "description": "Notes service. Searches the notes for a word.", "parameters": {
        "type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}},
    {"name": "notes_delete", "description": "Notes service. Delete a note.", "parameters": {
        "type": "object", "properties": {"note_id": {"type": "integer"}}, "required": ["note_id"]}},
    {"name": "notes_copy", "description": "Notes service. Copy a file to another place.", "parameters": {
        "type": "object", "required": ["source", "destination"],
        "properties": {"source": {"type": "string"}, "destination": {"type": "string"}}}},
]  # fmt: skip


def rows_of(tools: list[dict], tmp_path, **options) -> list[tuple[str, dict]]:
    path = tmp_path / "some_tools.json"
    path.write_text(json.dumps(tools), encoding="utf-8")
    return generate(load_tools_file(path), **options)["train"][1]


def test_undeclared_tool_is_declined(tmp_path):
    rows = [row for kind, row in rows_of(NOTES, tmp_path, rows=200, seed=3) if kind == "absent"]
    omitted = Counter()
    for row in rows:
        names = [tool["function"]["name"] for tool in json.loads(row["tools"])]
        (name,) = {tool["name"] for tool in NOTES} - set(names)
        omitted[name] += 1
        assert not calls(row) and row["category"] == "irrelevant"
        assert row["messages"][-1]["content"] == "Sorry, I have no tool for that."
    assert len(omitted) == 3


def test_similar_tools_are_not_omitted(tmp_path):
    """Where another tool could serve the request, declining would be wrong."""
    tools = [
        {"name": "rm", "description": "Remove a file or directory."},
        {"name": "rmdir", "description": "Remove a directory."},
        {"name": "pwd", "description": "Print the path of the working folder."},
    ]
    for kind, row in rows_of(tools, tmp_path, per_tool=6, seed=0):
        if kind == "absent":
            assert [tool["function"]["name"] for tool in json.loads(row["tools"])] == ["rm", "rmdir"]


def test_tools_with_phrasings_but_no_schema_are_declined(tmp_path):
    tools = load_tools_file(SAMPLES / "demo_tool_schemas.json")
    made = generate(tools, SAMPLES / "demo_phrasings_en.json", rows=60, seed=0)["train"][1]
    absent = [row for kind, row in made if kind == "absent"]
    assert absent and {row["category"] for row in absent} == {"irrelevant"}
    assert {len(json.loads(row["tools"])) for _, row in made} == {5}
    assert {call["name"] for _, row in made for call in calls(row)} <= {tool["function"]["name"] for tool in tools}


def test_parallel_rows_have_two_calls_in_one_answer(four_tools):
    made = generate(load_tools_file(four_tools), rows=120, seed=1)["train"][1]
    parallel = [row for kind, row in made if kind == "parallel"]
    assert parallel and all(len(row["messages"][-1]["tool_calls"]) == 2 for row in parallel)


def test_small_talk_goes_to_a_tool_for_it(four_tools):
    made = generate(load_tools_file(four_tools), rows=120, seed=1)["train"][1]
    talk = [row for kind, row in made if kind == "chat"]
    assert not any("onversation" in texts(row, "user")[0] for kind, row in made if kind in ("missing", "ambiguous"))
    assert talk and not any("category" in row for row in talk)
    for row in talk:
        (call,) = calls(row)
        assert call["name"] == "direct_chat"
        assert json.loads(call["arguments"]) == {"message": texts(row, "user")[0]}


@pytest.mark.parametrize(
    "schema", [{"type": "string", "maxLength": 5}, {"enum": ["hi"]}, {"type": "integer"}, {"type": ["string", "null"]}]
)
def test_small_talk_stays_text_where_the_tool_takes_no_free_text(tmp_path, schema):
    parameters = {"type": "object", "properties": {"text": schema}}
    tools = [{"name": "chat", "description": "Small talk", "parameters": parameters}, NOTES[1]]
    rows = [row for kind, row in rows_of(tools, tmp_path, rows=40, seed=0) if kind == "chat"]
    assert rows and not any(calls(row) for row in rows)


@pytest.mark.parametrize("parameter", ["conversation_id", "user", "chat_id", ""])
def test_small_talk_is_no_call_of_a_tool_about_conversations(tmp_path, parameter):
    schema = {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter]}
    tools = [{"name": "delete_conversation", "description": "Delete a conversation.", "parameters": schema}, *NOTES]
    made = rows_of(tools, tmp_path, rows=120, seed=0)
    assert not any(calls(row) for kind, row in made if kind == "chat")
    assert any(kind == "absent" for kind, _ in made)


def object_of(properties: dict, required: list[str] | None = None, **more) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties if required is None else required),
        **more,
    }


STRICT = object_of({"status": {"type": "string", "enum": ["open", "paid"]}, "cursor": {"type": ["string", "null"]},
                    "kind": {"const": "audit"}})  # fmt: skip
ONE_OF_TWO = object_of({"id": {"type": "integer"}, "url": {"type": "string", "format": "uri"}}, [],
                       anyOf=[{"required": ["id"]}, {"required": ["url"]}])  # fmt: skip
SOME_OR_ALL = {"type": "object", "oneOf": [
    {**object_of({"ids": {"type": "array", "items": {"type": "integer"}}}), "additionalProperties": False},
    {"properties": {"all": {"type": "boolean"}}, "additionalProperties": False},
]}  # fmt: skip


@pytest.mark.parametrize("schema", [STRICT, ONE_OF_TWO, SOME_OR_ALL], ids=["strict", "one_of_two", "some_or_all"])
def test_questions_ask_for_what_the_request_lacks(tmp_path, schema):
    """Not for constants, values that may be null, or one of two alternatives where the other is given."""
    made = rows_of([{"name": "list_entries", "description": "List entries.", "parameters": schema}], tmp_path,
                   per_tool=40, seed=0)  # fmt: skip
    asked = Counter(row["messages"][-1]["content"] for kind, row in made if kind == "missing")
    for kind, row in made:
        if kind == "missing":
            assert not re.search(r"https?://|\bid\b.*\d", texts(row, "user")[0])
    names = {"Which status shall I use?", "Which id shall I use?", "Which url shall I use?", "Which ids shall I use?"}
    assert set(asked) <= names


def test_every_value_and_key_of_a_map_is_said(tmp_path):
    """Also where the task's words make room for a value, and for keys that no schema declares."""
    headers = {"type": "object", "additionalProperties": {"type": "string"},
               "propertyNames": {"enum": ["Content-Type", "X-Api-Key", "Accept"]}}  # fmt: skip
    tools = [
        {"name": "get_weather", "description": "Get the weather for the given city.", "parameters": object_of(
            {"city": {"type": "string"}, "units": {"enum": ["celsius", "kelvin"]}})},
        {"name": "send_request", "description": "Send a request.", "parameters": object_of({"headers": headers})},
        {"name": "insert_row", "description": "Insert a row.", "parameters": object_of({"values": {"type": "object"}})},
    ]  # fmt: skip
    for _, row in rows_of(tools, tmp_path, per_tool=40, seed=0):
        said = " ".join(texts(row, "user"))
        for call in calls(row):
            for value in json.loads(call["arguments"]).values():
                assert value, "an empty object"
                words = [*value, *value.values()] if isinstance(value, dict) else [value]
                assert all(word in said for word in words), (said, call)


def test_no_call_repeats_in_an_answer(tmp_path):
    tools = [{"name": "list_printers", "description": "List printers."}, {"name": "ping", "description": "Ping it."}]
    parallel = [calls(row) for kind, row in rows_of(tools, tmp_path, per_tool=6, seed=0) if kind == "parallel"]
    assert parallel and all(first != second for first, second in parallel)


def test_what_a_shell_could_do_is_not_declined(tmp_path):
    command = object_of({"command": {"type": "string"}})
    tools = [
        {"name": "bash", "description": "Run a shell command.", "parameters": command},
        {"name": "grep", "description": "Search files.", "parameters": object_of({"pattern": {"type": "string"}})},
        {"name": "read_file", "description": "Read a file.", "parameters": object_of({"path": {"type": "string"}})},
    ]
    for kind, row in rows_of(tools, tmp_path, per_tool=20, seed=0):
        if kind == "absent":
            assert "bash" not in [tool["function"]["name"] for tool in json.loads(row["tools"])]


def test_needs_are_worded_without_the_tool(tmp_path):
    """Text common to all descriptions is not what a tool does; some requests name neither tool nor description."""
    requests = [texts(row, "user")[0] for kind, row in rows_of(NOTES, tmp_path, per_tool=32, seed=2) if kind == "call"]
    assert not any("Notes service" in text or "notes service" in text for text in requests)
    deletions = [text for text in requests if re.search(r"note id|\bnote\b", text)]
    assert any("notes_delete" not in text and "elete" not in text for text in deletions)
    copies = [row for kind, row in rows_of(NOTES, tmp_path, per_tool=32, seed=2)
              for call in calls(row) if call["name"] == "notes_copy"]  # fmt: skip
    for row in copies:
        for call in calls(row):
            if call["name"] == "notes_copy":
                arguments = json.loads(call["arguments"])
                assert arguments["source"] != arguments["destination"]


@pytest.mark.parametrize(
    ("task", "key", "value", "expected"),
    [
        ("sort the contents of a file line by line", "file_name", "a.txt", "sort the contents of a.txt line by line"),
        ("remove a file or directory", "file_name", "a.txt", None),
        ("get the weather for a given city", "city", "Oslo", "get the weather for Oslo"),
        ("delete a contract", "contract_id", "E-5126", "delete contract E-5126"),  # not `delete E-5126`
        ("switch branches", "branch_name", "main", None),
        ("show a file system", "file", "a.txt", None),
        ("lock the door", "name", "front", None),
    ],
)
def test_value_replaces_the_words_for_it(task, key, value, expected):
    assert with_value(task, key, value) == (expected or task, expected is not None)
    assert with_value("set the scale of a pod", "scale", "3", keeps_noun=True)[0] == "set scale 3 of a pod"


@pytest.mark.parametrize(
    ("name", "schema", "about", "expected"),
    [
        ("file_name", {}, "", "file"),
        ("branch_name", {}, "", "branch"),
        ("user_name", {}, "", "user"),
        ("customer_names", {}, "", "name"),
        ("name", {}, "Adds a contact.", "name"),
        ("name", {"description": "Name of the pod"}, "Shows a pod to a user.", "word"),
        ("name", {}, "Restarts a pod.", "word"),
        ("order_id", {}, "", "id"),
        ("message_id", {}, "", "id"),
        ("notificationID", {}, "", "id"),
        ("repo", {}, "", "repo"),
        ("repo_path", {}, "", "repo path"),
        ("email_address", {}, "", "email"),
        ("mode", {"description": "'l' for lines, 'w' for words"}, "", ["l", "w"]),
        ("body", {"description": "for 'add' and 'reply', not for 'method'"}, "", "message"),  # of the enum, or a name
        ("version", {"description": "examples of valid versions are: v1, apps/v1"}, "", ["v1", "apps/v1"]),
        ("type", {"description": "Here are the options: read, write."}, "", ["read", "write"]),
        ("sort", {"description": "One of the following: asc, desc"}, "", ["asc", "desc"]),
        ("brake", {"description": 'Possible values: "engage", `release`.'}, "", ["engage", "release"]),
        ("owner", {"description": "one of the people of the team"}, "", "user"),
        ("user_first_name", {}, "", "name"),
        ("destination", {}, "Drives somewhere.", "city"),
        ("destination", {}, "Moves a file.", "destination file"),
        ("ref", {"description": "e.g. refs/pull/{number}/head"}, "", "revision"),
        ("since", {"description": "ISO 8601 date and time"}, "", "date-time"),
        ("day", {"description": "as DD/MM/YYYY"}, "", ["15/01/2026", "21/03/2026", "30/05/2026"]),
        ("card", {"description": "Expiry (MM/YY)"}, "", ["01/26", "03/26", "05/26"]),
        ("at", {"description": "yyyy-mm-dd hh:mm"}, "", ["2026-01-15 09:30", "2026-03-21 14:00"]),
        ("speed", {"description": "one of quiet, turbo (default turbo)"}, "", ["quiet", "turbo"]),
        ("kind", {"description": "must be one of 'a', 'b', or 'c'"}, "", ["a", "b", "c"]),
        ("kind", {"description": "Allowed values: json | xml"}, "", ["json", "xml"]),
        ("kind", {"description": "options: json/xml/csv"}, "", ["json", "xml", "csv"]),
        ("kind", {"description": "one of: 1 (low), 2 (high)"}, "", ["1", "2"]),
        ("kind", {"description": "'not started', 'in progress' or 'done'"}, "", ["not started", "in progress", "done"]),
        ("kind", {"description": "The 'id' from the 'list_orders' response"}, "", "word"),
        ("kind", {"description": "ID of one of the resources in the account"}, "", "word"),
        ("kind", {"description": "such as when the user asks for it"}, "", "word"),
        ("kind", {"description": "for example the user's name or order number"}, "", "word"),
        ("kind", {"description": "Options are:\n- 'get' - reads one\n- 'set' - writes it"}, "", ["get", "set"]),
        ("label_selector", {"description": "e.g. 'app=shop,env=prod'"}, "", ["app=shop,env=prod"]),
        ("query", {"description": "e.g. '/<log-name>', 'kubelet'"}, "", ["kubelet"]),
        ("priority", {"description": "high, medium or low"}, "", ["high", "medium", "low"]),
        ("mode", {"description": "Travel mode (driving, walking, transit)"}, "", ["driving", "walking", "transit"]),
        ("state", {"description": "lost/stolen/damaged"}, "", ["lost", "stolen", "damaged"]),
        ("kind", {"description": "사이즈: S, M, L"}, "", ["S", "M", "L"]),
        ("kind", {"description": "(한식, 중식, 일식 중 하나)"}, "", ["한식", "중식", "일식"]),
        ("kind", {"description": "음식 (예: 한식, 중식 등)"}, "", ["한식", "중식"]),
        ("user", {"description": "Username or email"}, "", "user"),
        ("content", {"description": "Markdown or HTML"}, "", "content"),
        ("tags", {"description": 'e.g. ["work", "home"]'}, "", ["work", "home"]),
        ("place", {"description": "e.g. San Francisco, CA"}, "", ["San Francisco, CA"]),
        ("place", {"description": "e.g. Rock and Roll"}, "", ["Rock and Roll"]),
        ("symbol", {"description": "e.g. 'AAPL' for Apple Inc."}, "", ["AAPL"]),
        ("coupon_code", {"description": "Coupon code"}, "", "id"),
        ("code", {"description": "Python code"}, "", "code"),
        ("order_number", {}, "", "id"),
        ("pin", {"description": "6-digit PIN"}, "", ["482173"]),
        ("ssn", {"description": "(###-##-####)"}, "", ["482-17-3059"]),
        ("part", {"description": "in the form XX-XX"}, "", ["48-21"]),
        ("recipient", {"description": "Recipient email"}, "", "email"),
        ("origin", {"description": "IATA code"}, "", "airport"),
        ("name", {"description": "The user-friendly name"}, "", "word"),
        ("name", {"description": "Name of the user's playlist"}, "", "word"),
        ("name", {"description": "Your name"}, "", "name"),
        ("length", {"description": "Duration in ISO 8601"}, "", "duration"),
        ("day", {"description": "The day, ISO-8601 date"}, "", "date"),
        ("dob", {"description": "Date of birth (YYYY-MM-DD)"}, "", ["1990-01-15"]),
        ("birthday", {"format": "date"}, "", ["1990-01-15"]),
        ("day", {"description": "as YYYYMMDD"}, "", ["20260115"]),
        ("day", {"description": "DD Month YYYY"}, "", ["15 January 2026"]),
        ("day", {"description": "YYYY년 MM월 DD일"}, "", ["2026년 01월 15일"]),
        ("at", {"description": "hh:mm AM/PM"}, "", ["02:00 PM"]),
        ("at", {"description": "YYYY-MM-DDTHH:MM:SS+09:00"}, "", ["2026-01-15T09:30:00+09:00"]),
        ("at", {"description": "YYYY-MM-DDTHH:MM:SS.sssZ"}, "", ["2026-01-15T09:30:00.000Z"]),
        ("query", {"description": "Finds pages. Supports:\n- title: words of it\n- author: a name"}, "", "query"),
        ("note", {"description": "Note for the email"}, "Sends an email.", "word"),
        ("time", {}, "", "time"),
        ("time", {"format": "time"}, "", "format time"),
    ],
)
def test_texts_follow_the_parameter_and_its_description(name, schema, about, expected):
    words = read_json(FOLDER / "en.json")["values"]
    while isinstance(expected, str):
        expected = words[expected]
    found = texts_for(schema, name, words, about=about, reserved={"add", "reply", "method"})
    assert found[: len(expected)] == expected


def test_few_examples_get_others_of_their_kind():
    words = read_json(FOLDER / "en.json")["values"]
    texts = {
        name: texts_for({"description": f"e.g. {example}"}, name, words)
        for name, example in [("city", "Paris"), ("hotel_id", "HTL-123"), ("start", "2025-01-02T03:04:05-05:00"),
                              ("currency", "usd"), ("entity_id", "light.hall")]
    }  # fmt: skip
    assert texts["city"] == ["Paris", *words["city"]] and texts["currency"][:2] == ["usd", "usd"]
    assert len(texts["hotel_id"]) > 4 and all(re.fullmatch(r"HTL-\d{3}", text) for text in texts["hotel_id"])
    assert texts["start"][1] == "2026-01-15T09:30:00-05:00" and texts["entity_id"] == ["light.hall"]


@pytest.mark.parametrize(
    ("description", "allowed"),
    [
        ("Priority from 1 to 5", range(1, 6)),
        ("Month (01-12)", range(1, 13)),
        ("Between 1 and 5", range(1, 6)),
        ("0 (free) to 4 (full)", range(5)),
        ("range -3..3", range(-3, 4)),
        ("Z in mm [0, 9]", range(10)),
        ("between $1,000 and $1,003", range(1000, 1004)),
        ("평점(1-5점)", range(1, 6)),
        ("1부터 5까지", range(1, 6)),
        ("must be 12, 24 or 36", (12, 24, 36)),
        ("ISO (100, 200, 400)", (100, 200, 400)),
        ("min 3, max 5", range(3, 6)),
        ("PIN (4-6 digits)", range(1000, 10000)),
        ("Release year, e.g. 1999", range(1980, 2019)),
        ("since 2015-01-01", range(1, 52)),
        ("Unix timestamp (2024-01-01 = 17)", range(1, 52)),
    ],
)
def test_numbers_follow_the_description(description, allowed):
    schema = {"properties": {"n": {"type": "integer", "description": description}}, "required": ["n"]}
    values = SchemaValues(schema, {}, random.Random(0))
    drawn = {values.draw("f")["n"] for _ in range(100)}
    assert drawn <= set(allowed) and (len(drawn) > 20 or drawn == set(allowed))


def test_ranges_complete_the_schema_and_limits_are_in_order():
    properties = {
        "pedal": {"type": "number", "description": "between 0 (free) and 1 (pressed)"},
        "hour": {"type": "integer", "minimum": 0, "description": "Hour (0-23)"},
        "page": {"type": "integer", "minimum": 90, "maximum": 99, "description": "Not from 1 to 5"},
        "max_price": {"type": "number"}, "min_price": {"type": "number"},
        "startDate": {"type": "string"}, "endDate": {"type": "string"},
        "check_in": {"type": "string", "description": "DD/MM/YYYY"},
        "check_out": {"type": "string", "description": "DD/MM/YYYY"},
    }  # fmt: skip
    words = read_json(FOLDER / "en.json")["values"]
    values = SchemaValues({"properties": properties, "required": list(properties)}, words, random.Random(0))
    for _ in range(50):
        drawn = values.draw("f")
        assert 0 <= drawn["pedal"] <= 1 and 0 <= drawn["hour"] <= 23 and drawn["page"] >= 90
        assert drawn["min_price"] <= drawn["max_price"] and drawn["startDate"] <= drawn["endDate"]
        assert drawn["check_in"].split("/")[::-1] <= drawn["check_out"].split("/")[::-1]


def test_a_description_that_contradicts_the_schema_is_ignored():
    rooms = {"type": "integer", "minimum": 5, "multipleOf": 5, "description": "1 or 2"}
    values = SchemaValues({"properties": {"rooms": rooms}, "required": ["rooms"]}, {}, random.Random(0))
    assert values.draw("f")["rooms"] in range(5, 60, 5)


def test_a_value_with_a_default_is_not_asked_for():
    properties = {
        "calendar": {"type": "string", "description": "Calendar, defaults to 'primary'"},
        "page": {"type": "integer", "default": 1}, "day": {"type": "string"},
    }  # fmt: skip
    values = SchemaValues({"properties": properties, "required": list(properties)}, {"word": ["a"]}, random.Random(0))
    assert [values.can_be_asked_for(dict.fromkeys(properties, "a"), name) for name in properties] == [
        False,
        False,
        True,
    ]


def test_short_arrays_of_few_choices():
    """Elements repeat only where the schema requires more of them than there are."""
    few = {"type": "array", "items": {"enum": ["a", "b"]}}
    properties = {"few": few, "three": {**few, "minItems": 3}}
    values = SchemaValues({"properties": properties, "required": list(properties)}, {}, random.Random(0))
    for _ in range(20):
        drawn = values.draw("f")
        assert len(set(drawn["few"])) == len(drawn["few"]) and len(drawn["three"]) >= 3


def test_numbers_are_whole_unless_measured():
    schemas = {
        "issue_number": {}, "perPage": {"maximum": 100}, "price": {"maximum": 9}, "x": {"default": 0.5, "maximum": 9},
        "share": {"minimum": 0, "maximum": 1},
    }  # fmt: skip
    properties = {name: {"type": "number", "minimum": 1, **schema} for name, schema in schemas.items()}
    values = SchemaValues({"properties": properties, "required": list(schemas)}, {}, random.Random(0))
    drawn = [values.draw("f") for _ in range(50)]
    whole = {name: all(isinstance(one[name], int) for one in drawn) for name in schemas}
    assert whole == {"issue_number": True, "perPage": True, "price": False, "x": False, "share": False}


# --- values of any schema

names = st.sampled_from(["query", "city", "id", "startDate", "top_k", "x", "제목", "note-2", "LCNAME"])
scalars = st.one_of(
    st.fixed_dictionaries({"type": st.just("boolean")}),
    st.fixed_dictionaries({"enum": st.lists(st.sampled_from(["a", 7, None, True, 2.5]), min_size=1, unique_by=repr)}),
    st.fixed_dictionaries({"const": st.sampled_from(["fixed", 3])}),
    st.builds(lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
              st.integers(-1000, 1000), st.integers(0, 50)),
    st.builds(lambda low, span: {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 2 + span},
              st.integers(-50, 50), st.integers(0, 9)),
    st.builds(lambda step: {"type": "integer", "multipleOf": step}, st.integers(1, 20)),
    st.builds(lambda low, span: {"type": "number", "minimum": low, "exclusiveMaximum": low + span},
              st.integers(-50, 50), st.sampled_from([0.5, 1, 8, 100])),
    st.builds(lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span},
              st.integers(0, 30), st.integers(0, 30)),
    st.builds(lambda form: {"type": "string", "format": form},
              st.sampled_from(["date", "date-time", "email", "uri", "uuid", "ipv4", "time", "hostname"])),
    st.just({"type": ["string", "null"], "description": "a city, e.g. Seoul, Paris"}),
    st.just({}),
)  # fmt: skip


def containers(inner):
    return st.one_of(
        st.builds(lambda items, low, span: {"type": "array", "items": items, "minItems": low, "maxItems": low + span},
                  inner, st.integers(0, 3), st.integers(0, 3)),
        st.builds(lambda items: {"type": "array", "prefixItems": items, "items": False, "maxItems": 9},
                  st.lists(inner, min_size=1, max_size=2)),
        st.builds(lambda value: {"type": "object", "additionalProperties": value, "minProperties": 1}, inner),
        st.builds(lambda branches: {"anyOf": [*branches, {"type": "null"}]}, st.lists(inner, min_size=1, max_size=2)),
        objects(inner),
    )  # fmt: skip


def objects(inner):
    def build(properties, required, closed):
        schema = {"type": "object", "properties": properties, "required": [k for k in properties if k in required]}
        return {**schema, "additionalProperties": False} if closed else schema

    return st.builds(build, st.dictionaries(names, inner, max_size=4), st.sets(names), st.booleans())


@settings(max_examples=100, deadline=None)
@given(objects(st.recursive(scalars, containers, max_leaves=8)), st.integers(0, 2**32))
def test_drawn_arguments_fit_any_schema(schema, seed):
    Draft202012Validator.check_schema(schema)
    words = read_json(FOLDER / "en.json")["values"]
    first = SchemaValues(schema, words, random.Random(seed)).draw("tool f")
    Draft202012Validator(schema).validate(first)
    assert json.loads(json.dumps(first)) == first
    assert set(schema["required"]) <= set(first)
    assert SchemaValues(schema, words, random.Random(seed)).draw("tool f") == first


@pytest.mark.parametrize("pattern", [r"^[A-Z]{2}\d{4}$", r"^(GET|POST) /\w{1,8}$", r"\d{3}-\d{4}", "^a?b*$"])
def test_texts_match_their_pattern(pattern):
    pytest.importorskip("rstr", reason="pip install rstr")
    schema = {"type": "object", "properties": {"code": {"type": "string", "pattern": pattern, "maxLength": 20}},
              "patternProperties": {"^x-": {"type": "boolean"}}, "required": ["code"]}  # fmt: skip
    for seed in range(50):
        value = SchemaValues(schema, {"word": ["a"]}, random.Random(seed)).draw("tool f")
        Draft202012Validator(schema).validate(value)


def test_recursive_schema_gives_finite_values():
    tree = {"type": "object", "properties": {"name": {"type": "string"},
            "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}, "required": ["name"]}  # fmt: skip
    schema = {"$defs": {"node": tree}, "type": "object", "properties": {"root": {"$ref": "#/$defs/node"}},
              "required": ["root"]}  # fmt: skip
    values = SchemaValues(schema, read_json(FOLDER / "en.json")["values"], random.Random(0))
    for _ in range(50):
        Draft202012Validator(schema).validate(values.draw("tool f"))


def test_list_and_escaped_references_are_followed():
    schema = {"type": "object", "properties": {
              "a": {"oneOf": [{"type": "integer"}, {"enum": ["x"]}]}, "b": {"$ref": "#/properties/a/oneOf/1"},
              "c": {"$ref": "#/$defs/p%20q~1r"}}, "required": ["b", "c"],
              "$defs": {"p q/r": {"const": 7}}}  # fmt: skip
    drawn = SchemaValues(schema, {"word": ["a"]}, random.Random(0)).draw("tool f")
    assert (drawn["b"], drawn["c"]) == ("x", 7)


def test_not_and_contains_are_met_by_redrawing():
    schema = {"type": "object", "properties": {
              "a": {"type": "integer", "minimum": 1, "maximum": 6, "not": {"const": 3}},
              "b": {"type": "array", "items": {"enum": [1, 2]}, "contains": {"const": 2}, "minItems": 1}},
              "required": ["a", "b"]}  # fmt: skip
    values = SchemaValues(schema, read_json(FOLDER / "en.json")["values"], random.Random(0))
    for _ in range(50):
        Draft202012Validator(schema).validate(values.draw("tool f"))


def test_texts_come_from_description_format_or_name():
    properties = {
        "place": {"type": "string", "description": "Where, e.g. Jeju or Gangneung."},
        "mail": {"type": "string", "format": "email"},
        "home_city": {"type": "string"},
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    words = read_json(FOLDER / "en.json")["values"]
    for seed in range(20):
        value = SchemaValues(schema, words, random.Random(seed)).draw("tool f")
        assert value["place"] in ("Jeju", "Gangneung")
        assert value["mail"] in words["email"] and value["home_city"] in words["city"]


# --- phrasing files


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ({"description": "where to, e.g. anna@corp.example.com or ben@corp.example.com."}, r"\w+@corp[.]example[.]com"),
        ({"description": "such as an email address or a phone number"}, r"[A-Z]-\d{4}"),  # by the name, customer_id
        ({"pattern": r"^\d{4}-\d{2}-\d{2}$", "format": "date"}, r"2026-[01]\d-[0-3]\d"),
        ({"pattern": "^[A-Z]{3}$", "description": "e.g. USD, EUR"}, "USD|EUR"),
        ({"pattern": r".*\S.*"}, r"[\w -]+"),
        ({"format": "email", "maxLength": 16}, r".{1,16}"),
        ({"format": "duration"}, r"P.+"),
        ({"format": "uuid4"}, r"[0-9a-f-]{36}"),
        ({"enum": ["a", None]}, "a"),
    ],
)
def test_texts_are_what_people_write(schema, pattern):
    words = read_json(FOLDER / "en.json")["values"]
    values = SchemaValues(object_of({"customer_id": {"type": "string", **schema}}), words, random.Random(0))
    drawn = {values.draw("f")["customer_id"] for _ in range(20)}
    assert all(re.fullmatch(pattern, text) for text in drawn), drawn


def test_examples_of_objects_are_used():
    words = read_json(FOLDER / "en.json")["values"]
    row = {"name": "Anna", "age": 41}
    free = object_of({"values": {"type": "object", "examples": [row]}})
    assert SchemaValues(free, words, random.Random(0)).draw("f") == {"values": row}
    hard = {
        "type": "object",
        "required": ["a"],
        "properties": {"a": {"not": {"type": "string"}}},
        "examples": [{"a": 5}],
    }
    assert SchemaValues(hard, words, random.Random(0)).draw("f") == {"a": 5}
    none = {"type": "object", "properties": {}, "additionalProperties": {}}
    assert SchemaValues(none, words, random.Random(0)).draw("f") == {}


def test_nullable_recursion_ends_with_null():
    node = {"type": "object", "required": ["next"], "properties": {
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}  # fmt: skip
    schema = {**object_of({"list": {"$ref": "#/$defs/node"}}), "$defs": {"node": node}}
    words = read_json(FOLDER / "en.json")["values"]
    assert '"next": null' in json.dumps(SchemaValues(schema, words, random.Random(0)).draw("f"))
    anything = object_of({"x": {"anyOf": [{"type": "string"}, True]}})
    assert all(SchemaValues(anything, words, random.Random(seed)).draw("f") for seed in range(9))


def test_slots_keep_their_types_and_repeat_keys():
    slots = {"id": Value("7", 7), "x": Value("0.5", 0.5), "ids": Value("3 and 4", [3, 4]), "axis": Value("Z", "FZ")}
    template = {"Assign": {"{id}": {"X": "{x}", "{axis}": -1, "NOTE": "no. {id}"}}, "KEYS": "{ids}"}
    assert fill_arguments(template, slots) == {
        "Assign": {"7": {"X": 0.5, "FZ": -1, "NOTE": "no. 7"}}, "KEYS": [3, 4],
    }  # fmt: skip
    assert fill_arguments({"{ids}": {"C": "1"}}, slots) == {"3": {"C": "1"}, "4": {"C": "1"}}
    items = [{"n": Value("1", 1)}, {"n": Value("2", 2)}]
    assert fill_arguments({"Assign": {"{n}": {"N": "{n}"}}}, slots, items) == {"Assign": {"1": {"N": 1}, "2": {"N": 2}}}


def test_brackets_in_values_are_not_templates():
    slots = {"code": Value("print([1|2], {x})", None)}
    assert expand("[run|run] {code}", slots, {}, random.Random(0)) == "run print([1|2], {x})"


@pytest.mark.parametrize(
    ("description", "task"),
    [
        ("Searches the web. Fast.", "search the web"),
        ("Queries a table", "query a table"),
        ("Fetches pages", "fetch pages"),
        ("Get weather", "get weather"),
        ("Click an element", "click an element"),
        ("Useful for when you need to answer questions about math. Input: a question.", "answer questions about math"),
        ("Get weather for a U.S. city. Fast.", "get weather for a U.S. city"),
        ("Search documents, e.g.  guides. Fast.", "search documents, e.g.  guides"),
        (
            "Legt einen Termin an, z. B. ein Treffen. Schnell.",
            "use the tool for legt einen Termin an, z. B. ein Treffen",
        ),
        ("Does " + "very " * 60 + "much", "do it now"),
        ("Create, update or delete labels", "create, update or delete labels"),
        ("This tool will create a label.", "create a label"),
        ("Direct conversation", "use the tool for direct conversation"),
        ("GPU statistics", "use the tool for GPU statistics"),
        ("", "do it now"),
    ],
)
def test_description_becomes_a_clause(description, task):
    words = read_json(FOLDER / "en.json")
    assert task_of({"name": "do_it_now", "description": description}, words) == task


@pytest.mark.parametrize("beginning", ["Part of the shop. ", "Shop: ", "Shop | ", "Shop\n"])
def test_what_all_descriptions_begin_with_is_omitted(beginning):
    tools = [{"function": {"name": name, "description": f"{beginning}{name}s a cart"}} for name in ("open", "close")]
    words = read_json(FOLDER / "en.json")
    assert [task_of(function, words) for function in own_descriptions(tools)] == ["open a cart", "close a cart"]


def test_humanised_names():
    assert [humanised(name) for name in ("top_k", "startDate", "userIDs", "LCNAME", "POST /db/node", "note-2")] == [
        "top k", "start date", "user ids", "LCNAME", "POST /db/node", "note 2",
    ]  # fmt: skip


def test_shares_sum_to_the_total():
    assert shares({"a": 66, "b": 8, "c": 8, "d": 10, "e": 8}, 1) == {"a": 1, "b": 0, "c": 0, "d": 0, "e": 0}
    for total in range(200):
        assert sum(shares({"a": 3, "b": 1.5, "c": 1}, total).values()) == total


def broken(change) -> dict:
    data = read_json(SAMPLES / "gennx_phrasings_en.json")
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("frames"), r"phrasings\.json: 'frames' is a required property; see data/samples"),
        (
            lambda data: data["mix"]["train"].update(call_row=1),
            "`mix` in the phrasings has the unknown kind 'call_row'",
        ),
        (lambda data: data["mix"].update(train={"call": 0}), "`mix` in the phrasings has no weight for a kind of row"),
        (lambda data: data["tools"].pop("POST /db/node"), "no phrasings for the tool POST /db/node"),
        (lambda data: data["common"]["values"].pop("x"), r"POST /db/node: slot \{x\} has no value"),
        (
            lambda data: data["common"]["values"].update(x={"real": [0, 1]}),
            "common/values/x: .* is not valid under any of the given schemas",
        ),
        (lambda data: data["common"]["values"].update(x=[]), r"common/values/x: \[\] is not of type 'object'"),
        (
            lambda data: data["common"]["phrases"].update(point={"train": ["{point}"], "heldout": ["{point}"]}),
            "phrases within themselves",
        ),
        (
            lambda data: data["common"]["values"].update(ids={"list": {"integer": [1, 2]}, "length": [5, 5]}),
            "the list .* has too few different values",
        ),
        (
            lambda data: data["tools"]["POST /doc/anal"][0]["core"].update(heldout=[]),
            r"tools/POST /doc/anal/0/core/heldout: \[\] should be non-empty",
        ),
    ],
)
def test_errors_of_a_phrasing_file(tmp_path, change, message):
    path = tmp_path / "phrasings.json"
    path.write_text(json.dumps(broken(change)), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        generate(load_tools_file(SCHEMAS), path, rows=40)


def test_a_phrasing_file_extends_another(tmp_path):
    tools = load_tools_file(SCHEMAS)
    (tmp_path / "base.json").write_text(json.dumps(broken(lambda data: None)), encoding="utf-8")
    analyse = {"core": {"train": ["compute it"], "heldout": ["compute it all"]}, "arguments": {}}
    (tmp_path / "own.json").write_text(
        json.dumps({"extends": "base.json", "system": "Short.", "tools": {"POST /doc/anal": [analyse]}}),
        encoding="utf-8",
    )
    whole = broken(lambda data: data.update(system="Short.", tools=data["tools"] | {"POST /doc/anal": [analyse]}))
    (tmp_path / "whole.json").write_text(json.dumps(whole), encoding="utf-8")
    extended, expected = (
        {split: rows for split, (_, rows) in generate(tools, tmp_path / name, rows=40, seed=1).items()}
        for name in ("own.json", "whole.json")
    )
    assert extended == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"extends": "none.json"}, "none.json"),
        ({"extends": "own.json"}, "own.json.*'language' is a required property"),
        ({"extends": "base.json", "tools": []}, "own.json: tools: .* is not of type 'object'"),
        ({"extends": 5}, "own.json"),
    ],
)
def test_errors_of_a_file_that_extends_another(tmp_path, content, message):
    (tmp_path / "base.json").write_text(json.dumps(broken(lambda data: None)), encoding="utf-8")
    (tmp_path / "own.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        generate(load_tools_file(SCHEMAS), tmp_path / "own.json", rows=40)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (
            [{"properties": {"r": {"$ref": "#"}}, "required": ["r"]}],
            "tool f0: its schema cannot be followed .RecursionError",
        ),
        (
            [{"properties": {"a": 5}}],
            "tool f0: its parameters are not a valid",
        ),
        ([{"properties": {"r": {"$ref": "#r"}}, "required": ["r"]}], "tool f0: its schema refers to #r, which it does"),
        ([{"not": {"$ref": "#/$defs/b"}}], "tool f0: its schema cannot be followed .*/[$]defs/b"),
        (
            [{"minProperties": 2, "additionalProperties": {}, "propertyNames": {"type": "object"}}],
            "tool f0: no arguments found that fit its schema",
        ),
        ([{"properties": {"a": {"minLength": 10**6}}}], "tool f0: its schema requires 1,000,000 characters for a;"),
        (
            [
                {
                    "properties": {
                        "a": {"items": {"items": {"items": True, "minItems": 90}, "minItems": 90}, "minItems": 9}
                    }
                }
            ],
            "tool f0: its schema requires more than 5,000 values",
        ),
        (
            [{"properties": {}, "$defs": {"t": {"$dynamicRef": "#/$defs/t"}}, "$dynamicRef": "#/$defs/t"}],
            "tool f0: .*nested deeper than 200 levels",
        ),
        (
            [{"properties": {"a": {"type": "integer", "minimum": 10**400}}}],
            "tool f0: .*OverflowError",
        ),
        (
            [{"properties": {"a": {"type": "number", "multipleOf": 5e-324}}}],
            "tool f0: .*OverflowError",
        ),
        (
            [{"properties": {"a": {"type": "string", "pattern": "^((((((((a+)+)+)+)+)+)+)+)+$"}}, "required": ["a"]}],
            "no text fits the pattern .*it takes more than 20,000 steps",
        ),
        ([{"type": "array", "items": {}}], "tool f0: no arguments found .*it does not describe an object"),
        ([{}, {}, None], "2 tools have the same name, f1"),
    ],
)
def test_errors_of_tool_schemas(tmp_path, tools, message):
    named = [{"name": f"f{n}", "parameters": schema} for n, schema in enumerate(tools)]
    named = [tool if tool["parameters"] is not None else named[1] for tool in named]
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(named), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        generate_files(path, tmp_path / "out", per_tool=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "schema",
    [
        {"minimum": "#"},
        {"type": "integer", "minimum": 0, "maximum": "1"},
        {"type": "integer", "multipleOf": "h"},
        {"maxLength": "long"},
        {"type": "array", "minItems": [1]},
        {"patternProperties": 3},
    ],
)
def test_invalid_keywords_are_ignored(schema, tmp_path):
    """A keyword that no validator can read does not decide which values are drawn."""
    tool = {"name": "f", "parameters": {"type": "object", "required": ["x"], "properties": {"x": schema}}}
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([tool]), encoding="utf-8")
    ((train, _), _) = generate_files(path, tmp_path, per_tool=2)
    calls = [call for row in map(json.loads, train.read_text("utf-8").splitlines()) for m in row["messages"]
             for call in m.get("tool_calls", ())]  # fmt: skip
    assert calls and all("x" in json.loads(call["function"]["arguments"]) for call in calls)


def test_required_must_be_a_list(tmp_path):
    path = tmp_path / "tools.json"
    schema = {"type": "object", "properties": {"x": {}}, "required": {"enum": "a"}}
    path.write_text(json.dumps([{"name": "f", "parameters": schema}]), encoding="utf-8")
    assert generate_files(path, tmp_path, per_tool=2)


def test_call_that_breaks_its_schema_is_an_error(tmp_path):
    path = tmp_path / "phrasings.json"
    wrong = {"Assign": {"{id}": {"X": "{x}", "Y": "{y}"}}}  # Z is required
    path.write_text(json.dumps(broken(lambda d: d["tools"]["POST /db/node"][0].update(arguments=wrong))))
    with pytest.raises(UserError, match=r"POST /db/node does not fit its schema.*'Z' is a required property"):
        generate(load_tools_file(SCHEMAS), path, rows=60, seed=0)


def test_tiers_give_each_tool_its_rows():
    tools = load_tools_file(ALL_SCHEMAS)
    made = generate(tools, per_tool=TIERS, seed=7)["train"][1]
    called = Counter(row["messages"][-1]["tool_calls"][0]["function"]["name"] for kind, row in made if kind == "call")
    tiers = json.loads(TIERS.read_text("utf-8")).values()
    wanted = {name: tier["rows"] for tier in tiers for name in tier["tools"]}
    assert called.keys() == wanted.keys()
    # Rows of calls also replace those of kinds that have no further requests.
    assert all(rows <= called[name] <= 1.3 * rows + 1 for name, rows in wanted.items())


@pytest.mark.parametrize(
    ("tiers", "said"),
    [
        ({"one": {"rows": 2, "tools": ["f", "f"]}}, "the tool 'f' is in two tiers"),
        ({"one": {"rows": 2, "tools": ["f", "x"]}}, "there is no tool 'x'"),
        ({"one": {"rows": 2, "tools": ["f"]}}, "no tier has g"),
        ({"one": {"rows": 0, "tools": ["f", "g"]}}, "all tiers have 0 rows"),
        ({"one": {"rows": True, "tools": ["f", "g"]}}, "one must be"),
        ({"one": {"rows": 1, "tools": [["f"]]}}, "there is no tool"),
        ([1], "the file must be"),
    ],
)
def test_bad_tiers_are_refused(tiers, said, tmp_path):
    path = tmp_path / "tiers.json"
    path.write_text(json.dumps(tiers), encoding="utf-8")
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]
    with pytest.raises(UserError, match=said):
        generate(tools, per_tool=path)


@pytest.mark.parametrize("language", LANGUAGES)
def test_reasons_stand_beside_calls(language):
    tools = [{"type": "function", "function": tool} for tool in FOUR_TOOLS]
    made = {reasons: generate(tools, language=language, per_tool=2, reasons=reasons) for reasons in (False, True)}
    for split, (_, rows) in made[True].items():
        for _, row in rows:
            for message in row["messages"]:
                for call in message.get("tool_calls", ()):
                    assert call["function"]["name"] in message["content"]
        assert not any(
            m.get("tool_calls") and m.get("content") for _, row in made[False][split][1] for m in row["messages"]
        )
