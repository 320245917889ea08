"""prepare: every row is kept or rejected, files are replaced only with --overwrite, user errors are one line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import prepare_data
from finetune.errors import UserError
from finetune.files import open_atomic, write_jsonl
from finetune.reading.conversations import normalize_row
from formats import encode
from tests.rows import ANSWER, GOOD, LAMP, chat, lamp_call, read

ROOT = Path(__file__).resolve().parent.parent


def fail(capsys, *argv: str) -> str:
    """Run a command that must fail with exit status 2; returns its error line."""
    assert prepare_data.main([str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    return lines[-1]


def many_rows() -> list[dict]:
    """30 good rows, 20 of them with a call."""
    rooms = ["hall", "kitchen", "attic", "cellar", "garage", "study", "porch", "garden", "bedroom", "bathroom"]
    rows = []
    for i, room in enumerate(rooms * 3):
        user = {
            "role": "user",
            "content": f"{['Dim', 'Brighten', 'Check'][i // 10]} the lamp of my {room}, will you? {i * 7919}",
        }
        rows.append({"messages": [user, lamp_call({"room": room, "level": i}) if i % 3 else ANSWER], "tools": [LAMP]})
    return rows


BAD = [
    ("{oops", "is not JSON"),
    ({"id": 1}, "has no messages"),
    (chat(lamp_call({"level": 3}), tools=[LAMP]), "'room' is a required property"),
    (chat(lamp_call({"room": "x"}), tools=[]), "not declared"),
    (chat({"role": "assistant", "content": ""}), "says and calls nothing"),
    (many_rows()[4], "duplicate of"),
    ({"prompt": "half \ud83d", "completion": "x"}, "surrogate"),
]


@pytest.fixture
def mixed(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in many_rows()] + [
        bad if isinstance(bad, str) else json.dumps(bad) for bad, _ in BAD
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.filterwarnings("error::UserWarning")
def test_chart_of_letters_without_a_font_does_not_warn(tmp_path):
    """No installed font has Linear B; matplotlib would warn about each letter."""
    row = chat(lamp_call({"room": "x"}, name="\U00010000\U00010001"), tools=[LAMP | {"name": "\U00010000\U00010001"}])
    write_jsonl(tmp_path / "rows.jsonl", [row])
    assert prepare_data.main([str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]) == 0


def test_prepare_accounts_for_every_row(mixed, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare_data.main([str(mixed), "--output", str(out)]) == 0
    names = [
        "dataset_card.md",
        "lengths.png",
        "rejected.jsonl",
        "test.jsonl",
        "tools.png",
        "train.jsonl",
        "validation.jsonl",
    ]
    assert sorted(path.name for path in out.iterdir()) == names
    splits = {name: read(out / f"{name}.jsonl") for name in ("train", "validation", "test")}
    rejected = read(out / "rejected.jsonl")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 24, "validation": 3, "test": 3}
    kept = [row for rows in splits.values() for row in rows]
    assert sorted(map(json.dumps, kept)) == sorted(json.dumps(normalize_row(row)) for row in many_rows())
    assert sorted(row["row"] for row in rejected) == list(range(31, 38))
    reasons = {row["row"]: row["reason"] for row in rejected}
    for number, (_, expected) in enumerate(BAD, start=31):
        assert expected in reasons[number]
    assert next(row for row in rejected if row["row"] == 31)["raw"] == "{oops"
    assert (out / "lengths.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "dataset_card.md").read_text(encoding="utf-8")
    assert "| read | 37 |" in card and "| kept | 30 |" in card and "| rejected | 7 |" in card
    assert "| `set_lamp` | 16 | 2 | 2 |" in card
    shown = capsys.readouterr().out
    assert "37 read = 30 kept + 7 rejected" in shown
    assert "messages: messages, tools" in shown


def test_prepared_rows_are_read_back_unchanged(mixed, tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, ("0", "0", "1"), strict=True):
        assert prepare_data.main(["prepare", str(mixed), "--output", str(folder), "--seed", seed]) == 0
    first, second, third = ((folder / "train.jsonl").read_bytes() for folder in folders)
    assert first == second != third
    assert [normalize_row(row) for row in read(folders[0] / "train.jsonl")] == read(folders[0] / "train.jsonl")


def test_near_duplicates_share_a_split_or_are_rejected(tmp_path):
    base = "Please show me the vertical reaction at every support of the frame for load case number {}"
    rows = [{"prompt": base.format(i), "completion": str(i)} for i in range(20)]
    rows += [
        {"prompt": text, "completion": "ok"} for text in ("Hello", "Undo the last step", "Which units?", "Save it")
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert prepare_data.main([str(source), "--output", str(tmp_path / "a"), "--split", "60/20/20"]) == 0
    alike = {
        name
        for name in ("train", "validation", "test")
        if "vertical" in (tmp_path / f"a/{name}.jsonl").read_text("utf-8")
    }
    assert len(alike) == 1
    assert prepare_data.main([str(source), "--output", str(tmp_path / "b"), "--dedupe"]) == 0
    rejected = read(tmp_path / "b" / "rejected.jsonl")
    assert len(rejected) == 19 and all("near-duplicate of" in row["reason"] for row in rejected)
    assert prepare_data.main([str(source), "--output", str(tmp_path / "c"), "--dedupe", "--strict"]) == 2
    assert not (tmp_path / "c").exists()


def test_strict_stops_at_the_first_bad_row(mixed, tmp_path, capsys):
    line = fail(capsys, mixed, "--output", tmp_path / "out", "--strict")
    assert "rows.jsonl, row 31: is not JSON" in line and not (tmp_path / "out").exists()


def test_output_is_replaced_only_with_overwrite(mixed, tmp_path, capsys):
    assert prepare_data.main([str(mixed), "--output", str(tmp_path / "out")]) == 0
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    assert "already there" in fail(capsys, mixed, "--output", tmp_path / "out", "--seed", "5")
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    assert prepare_data.main([str(mixed), "--output", str(tmp_path / "out"), "--seed", "5", "--overwrite"]) == 0
    assert (tmp_path / "out" / "train.jsonl").read_bytes() != before


def test_input_files_are_never_replaced(tmp_path, capsys):
    source = write_jsonl(tmp_path / "rejected.jsonl", [GOOD["pair"]])
    write_jsonl(tmp_path / "train.jsonl", [{"text": "x"}])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for command in (
        [source, "--output", tmp_path, "--overwrite"],
        ["parse", "--format", "qwen", tmp_path, tmp_path / "train.jsonl"],
        ["show", "--tokenizer", "x", source, "--html", source],
    ):
        assert "is the file that is read" in fail(capsys, *command)
    (tmp_path / "train.jsonl").unlink()
    other = write_jsonl(tmp_path / "other" / "rows.jsonl", [GOOD["pair"]])
    assert "rejected.jsonl is already there" in fail(capsys, other, "--output", tmp_path)
    assert source.read_bytes() == before[source]
    assert "every row is read exactly once" in fail(capsys, "parse", "--format", "qwen", f"{other}*2", tmp_path / "o")


def test_card_has_no_folders(tmp_path):
    """Not of a source, of the columns it was read by, of a rejected row, or of the command."""
    folder = tmp_path / "ann lee" / "private"
    folder.mkdir(parents=True)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    write_jsonl(folder / "rows.jsonl", [{"messages": turns}, {"messages": turns}, {"messages": 5}])
    assert prepare_data.main([str(folder / "rows.jsonl"), "--output", str(folder / "out"), "--split", "1/0/0"]) == 0
    card = (folder / "out" / "dataset_card.md").read_text()
    assert "ann lee" not in card and "private" not in card and card.count("rows.jsonl") > 3


def test_rows_beyond_the_model_are_warned_of(tmp_path, tokenizer_dir, capsys):
    """Without --max_seq_length they are kept, but training would omit them."""
    model = tmp_path / "model"
    shutil.copytree(tokenizer_dir, model)
    (model / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 64}')
    long = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]}
    short = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in (short, long)))
    flags = ["--tokenizer", str(model), "--format", "chatml", "--split", "1/0/0"]
    assert prepare_data.main([str(source), "--output", str(tmp_path / "out"), *flags]) == 0
    shown = capsys.readouterr().out
    assert "longer than the model's 64 positions; training omits it" in shown and "row 2" in shown


def test_overlong_rows_are_rejected_or_trimmed(tmp_path, tokenizer, tokenizer_dir, fmt):
    long = chat(ANSWER, {"role": "user", "content": "more " * 60}, ANSWER, tools=[LAMP])
    last = {"messages": long["messages"][2:], "tools": long["tools"]}
    limit = len(encode(normalize_row(last), tokenizer, fmt).sequences[0].input_ids)
    source = write_jsonl(tmp_path / "rows.jsonl", [GOOD["call with text arguments"], long])
    flags = ["--tokenizer", tokenizer_dir, "--format", "chatml", "--max_seq_length", str(limit), "--split", "1/0/0"]
    assert prepare_data.main([str(source), "--output", str(tmp_path / "drop"), *flags]) == 0
    (rejected,) = read(tmp_path / "drop" / "rejected.jsonl")
    assert rejected["row"] == 2 and "longer than max_seq_length" in rejected["reason"]
    assert prepare_data.main([str(source), "--output", str(tmp_path / "trim"), *flags, "--overlong", "trim_turns"]) == 0
    assert read(tmp_path / "trim" / "train.jsonl")[1] == normalize_row(last)
    assert (
        "| train | 2 | " in (card := (tmp_path / "trim" / "dataset_card.md").read_text("utf-8"))
        and f"| {limit} |" in card
    )


def test_tools_file_and_database_rows(tmp_path, capsys):
    import sqlite3

    with sqlite3.connect(tmp_path / "logs.db") as connection:
        connection.execute("CREATE TABLE query_logs (query text, tool_used text, parameters text)")
        connection.executemany(
            "INSERT INTO query_logs VALUES (?, 'set_lamp', ?)", [("Dim it", '{"room": "a"}'), ("Dim", "{}")]
        )
    connection.close()
    (tmp_path / "tools.json").write_text(json.dumps([LAMP]), encoding="utf-8")
    url = f"sqlite:///{(tmp_path / 'logs.db').as_posix()}"
    command = [
        "--sql",
        url,
        "--tools",
        str(tmp_path / "tools.json"),
        "--output",
        str(tmp_path / "out"),
        "--split",
        "1/0/0",
    ]
    assert prepare_data.main(command) == 0
    assert len(read(tmp_path / "out" / "train.jsonl")) == 1
    assert "query -> prompt, tool_used -> tool, parameters" in capsys.readouterr().out
    assert read(tmp_path / "out" / "rejected.jsonl")[0]["row"] == 2


def test_any_tool_or_folder_name_is_drawn_and_printed(tmp_path, capsys):
    names = ["a$^$b", "[/b]", "a\x00\nb", "long" * 2000, "예약"]
    rows = [
        {"messages": [{"role": "user", "content": name}, lamp_call({}, name)], "tools": [{"name": name}]}
        for name in names
    ]
    out = tmp_path / "out[/b]"
    assert prepare_data.main([str(write_jsonl(tmp_path / "rows.jsonl", rows)), "--output", str(out)]) == 0
    assert (out / "tools.png").stat().st_size > 1000 and "out[/b]" in capsys.readouterr().out


@pytest.mark.skipif(os.name == "nt", reason="Windows allows no such file names")
def test_card_with_names_that_are_hostile_to_yaml(tmp_path):
    """The front matter is loaded by the Hub's library, and each table row stays one line."""
    from huggingface_hub import DatasetCard

    names = ["a: b", "@c", "d\ne", "- f", "---", "{{ g }}", "h | i", "<j>", "k\x1b[2J\x9b"]
    rows = [
        {"messages": [{"role": "user", "content": f"ask {name}"}, lamp_call({}, name)], "tools": [{"name": name}]}
        for name in names
    ]
    source = write_jsonl(tmp_path / "rows: @x\n---\ny.jsonl", rows)
    assert prepare_data.main([str(source), "--output", str(tmp_path / "out: @"), "--split", "1/1/0"]) == 0
    card = DatasetCard.load(tmp_path / "out: @" / "dataset_card.md")
    files = [{"split": name, "path": f"{name}.jsonl"} for name in ("train", "validation")]
    assert card.data.to_dict() == {"configs": [{"config_name": "default", "data_files": files}]}
    lines = card.text.splitlines()
    for name in ("a: b", "@c", "d e", "- f", "---", "{{ g }}", "h \\| i", "&lt;j>", "k\ufffd[2J\ufffd"):
        assert sum(line.startswith(f"| `{name}` | ") for line in lines) == 1
    assert any(line.startswith("| rows: @x --- y.jsonl | 9 | 9 |") for line in lines)


def test_prepare_imports_no_torch(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [GOOD["pair"]])
    code = (
        "import sys, prepare_data\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "assert prepare_data.main(['rows.jsonl', '--output', 'out']) == 0\n"
        "for name in ('torch', 'transformers', 'huggingface_hub', 'scipy', 'pandas'):\n"
        "    assert name not in sys.modules, name\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, capture_output=True)


def test_password_is_not_in_the_shown_command():
    args = prepare_data.build_parser().parse_args(["prepare", "--sql", "postgresql://me:hush@h/d", "--output", "x"])
    args.argv = ["prepare", "--sql", "postgresql://me:hush@h/d", "--output", "x"]
    assert "hush" not in prepare_data.command_line(args)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "out"], "nothing to read"),
        (["none.jsonl", "--output", "out"], "none.jsonl: there is no such file"),
        (["empty.jsonl", "--output", "out"], "no rows left of 0 read"),
        (["bad.jsonl", "--output", "out"], "no rows left of 1 read"),
        (["good.jsonl", "--output", "good.jsonl"], "cannot write"),
        (["good.jsonl", "--output", "out", "--map", "x"], "COLUMN=FIELD"),
        (["good.jsonl", "--output", "out", "--tools", "none.json"], "cannot read tools none.json"),
        (["good.jsonl", "--output", "out", "--max_seq_length", "9"], "--tokenizer"),
        (["good.jsonl*2", "--output", "out"], "weights belong to training"),
        (["good.jsonl", "--output", "out", "--split", "80/20"], "three shares"),
        (["encode", "--tokenizer", "nowhere", "--format", "chatml", "good.jsonl", "o.jsonl"], "tokenizer nowhere"),
        (["parse", "--format", "no-such-format", "good.jsonl", "o.jsonl"], "no-such-format"),
        (["parse", "--format", "native", "good.jsonl", "o.jsonl"], "needs --tokenizer"),
        (["a" * 300 + ".jsonl", "--output", "out"], "too long"),
        (["good.jsonl", "--output", "a" * 300], "too long"),
        (["parse", "--format", "qwen", "good.jsonl", "a" * 300], "too long"),
    ],
)
def test_user_errors_are_one_line_and_leave_no_output(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_jsonl(Path("good.jsonl"), [GOOD["pair"]])
    Path("bad.jsonl").write_text("{\n", encoding="utf-8")
    Path("empty.jsonl").write_text("", encoding="utf-8")
    assert message in fail(capsys, *argv)
    written = [path.name for path in Path("out").glob("*")]  # the reasons are written even if no row is left
    assert written == (["rejected.jsonl"] if "bad.jsonl" in argv else []) and not Path("o.jsonl").exists()


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*out: No space"), open_atomic(tmp_path / "out") as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_data_set_is_written_completely_or_not_at_all(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "rows.jsonl", many_rows())
    command = [str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "new" / "out")]
    (tmp_path / "old" / "test.jsonl").mkdir(parents=True)  # a folder cannot be replaced by a file
    (tmp_path / "old" / "train.jsonl").write_text("before")
    fail(capsys, *command[:2], str(tmp_path / "old"), "--overwrite")
    assert (tmp_path / "old" / "train.jsonl").read_text() == "before"

    def full(result):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("finetune.preparing.dataset_card.draw_tools", full)
    assert prepare_data.main(command) == 1
    assert not (tmp_path / "new").exists()


def test_show_refuses_a_missing_row(tmp_path, tokenizer_dir, capsys):
    rows = str(write_jsonl(tmp_path / "rows.jsonl", [GOOD["pair"]]))
    show = ["show", "--tokenizer", tokenizer_dir, "--format", "chatml", rows]
    assert "there is no row 2" in fail(capsys, *show, "--first", "2")
    assert "there is no row 2" in fail(capsys, *show, "--first", "2", "--html", str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


def test_split_asked_for_without_rows_is_an_error(tmp_path, capsys):
    source = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Capital of Peru?", "completion": "Lima."}])
    arguments = [str(source), "--output", str(tmp_path / "out")]
    assert prepare_data.main([*arguments, "--split", "80/10/10"]) == 2
    assert "--split 80/10/10: validation and test would get no row" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert prepare_data.main(arguments) == 0  # the default shares are not asked for: the empty splits are named
    assert "the split test gets no row" in " ".join(capsys.readouterr().out.split())
