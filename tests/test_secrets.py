"""Passwords, tokens and folders of this machine are in no message and in nothing that is uploaded."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import export_lora
import prepare_data
from finetune.errors import UserError, one_line_errors
from finetune.models.hub import public_name
from finetune.reading.sql import database_url, read_sql, shown_url
from tests.exported import make_run

ROOT = Path(__file__).parent.parent
PASSWORD = "hu5h"


@pytest.mark.parametrize(
    "url",
    ["postgresql://u:hu5h@ss@host/db", "postgresql://u:p@hu5h@host:5432/db", "postgresql://u:a/hu5h@ss@host/db",
     "mysql://u:hu5h@@host"],
)  # fmt: skip
def test_password_with_an_at_sign(url, capsys):
    @one_line_errors
    def main():
        raise UserError(f"cannot use {url} here")

    assert main() == 2
    shown = capsys.readouterr().err
    assert PASSWORD not in shown and "ss@" not in shown and "host" in shown
    with pytest.raises(UserError, match="%40") as caught:
        database_url(url, {})
    assert PASSWORD not in str(caught.value) and "ss@" not in str(caught.value)
    assert database_url("postgresql://u:p%40ss@host/db", {}).password == "p@ss"


@pytest.mark.parametrize(
    "query",
    ["odbc_connect=DRIVER%3DX%3BSERVER%3Ds%3BUID%3Du%3BPWD%3Dhu5h", "authentication=hu5h", "sslcert=hu5h",
     "options=-c%20x%3Dhu5h", "sslmode=disable&access=hu5h", "PWD=hu5h&PWD=hu5h2"],
)  # fmt: skip
def test_secret_in_the_query_of_a_url(query):
    url = f"postgresql://localhost:1/db?{query}"
    assert PASSWORD not in shown_url(database_url(url, {}))
    with pytest.raises(UserError) as caught:
        list(read_sql(url, query="SELECT 1"))
    assert PASSWORD not in str(caught.value)
    arguments = Namespace(argv=["--sql", url, "--output", "out"], sql=url, query=None)
    assert PASSWORD not in prepare_data.command_line(arguments)


def test_harmless_entries_of_a_url_are_shown():
    assert "sslmode=disable" in shown_url(database_url("postgresql://localhost/db?sslmode=disable", {}))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/ann/rows.jsonl", "rows.jsonl"), ("/home/ann/rows.jsonl*0.5", "rows.jsonl*0.5"),
        ("~/private/rows.jsonl", "rows.jsonl"), ("private/rows.jsonl", "rows.jsonl"), ("../ann/data", "data"),
        ("/home/ann/processed@validation", "processed@validation"), ("C:\\Users\\ann\\rows.csv", "rows.csv"),
        ("a/b/c", "c"), ("sqlite:////home/ann/logs.db#query_logs", "sqlite:///logs.db#query_logs"),
        ("org/name", "org/name"), ("org/name:config@train*0.5", "org/name:config@train*0.5"),
        ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-3B-Instruct"),
        ("postgresql://u:***@host/db#query", "postgresql://u:***@host/db#query"),
    ],
)  # fmt: skip
def test_public_name_has_no_folders(name, shown):
    assert public_name(name) == shown


def test_command_in_a_card_has_no_folders():
    argv = ["--dataset", "/home/ann/a.jsonl", "--output=/home/ann/out", "--split", "0.8,0.1,0.1", "--seed", "3"]
    command = prepare_data.command_line(Namespace(argv=argv, sql=None, query=None))
    assert command == "prepare_data.py --dataset a.jsonl --output=out --split 0.8,0.1,0.1 --seed 3"
    argv = ["/home/ann lee/a.jsonl*0.5", "--output=/home/ann lee/out", "--system", "Be /brief/ and kind.", "가" * 300]
    command = prepare_data.command_line(Namespace(argv=argv, sql=None, query=None))
    assert "ann" not in command and "a.jsonl*0.5" in command and "--output=out" in command
    assert "'Be /brief/ and kind.'" in command and "가" * 300 in command


@pytest.mark.parametrize("spelling", [["--query", "SELECT 'hu5h'"], ["--query=SELECT 'hu5h'"]])
def test_query_is_not_in_a_card(spelling):
    arguments = Namespace(argv=["--sql", "sqlite:///a.db", *spelling], sql=None, query="SELECT 'hu5h'")
    command = prepare_data.command_line(arguments)
    assert PASSWORD not in command and "--query" in command


def test_hub_export_has_no_secrets_and_no_folders(tmp_path, monkeypatch):
    """One secret of each kind is planted in the run folder; the exported files hold none of them."""
    home = tmp_path / "ann-private"
    home.mkdir()
    run = make_run(home)
    token = "hf_" + "t0ken" * 6
    monkeypatch.setenv("HF_TOKEN", token)
    path = run / "experiment_config.json"
    config = json.loads(path.read_text())
    config["flags"]["dataset"] += ["/srv/ann-private/rows.jsonl*0.5", "ann-private/rows.csv"]
    config["argv"] = ["--dataset", str(home), token]
    path.write_text(json.dumps(config))
    for name in ("training_args.bin", ".env", "notes.txt", "trainer_state.json"):
        (run / "final_model" / name).write_text(f"{token} {home}")
    assert export_lora.main([str(run), "--to", "hub", "--output", str(tmp_path / "out")]) == 0
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"README.md", "adapter_model.safetensors"} <= {file.name for file in written}
    for file in written:
        assert b"ann-private" not in file.read_bytes() and token.encode() not in file.read_bytes(), file.name


def test_unsloth_statistics_are_off(tmp_path):
    """Unsloth reads the variable while it is imported, here a package that prints it."""
    (tmp_path / "unsloth.py").write_text("import os, sys\nsys.stderr.write(os.environ['UNSLOTH_DISABLE_STATISTICS'])")
    (tmp_path / "torch.py").write_text(
        "class version:\n    cuda = '1'\nclass cuda:\n    device_count = staticmethod(lambda: 0)\n"
    )
    code = "from finetune.models.loading import import_unsloth; import_unsloth()"
    environment = {k: v for k, v in os.environ.items() if k != "UNSLOTH_DISABLE_STATISTICS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stderr == "1", done.stderr
