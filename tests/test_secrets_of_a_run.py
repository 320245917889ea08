"""One secret of each kind, then everything that prepare, train, evaluate and export write and print is searched."""

import json
import sqlite3
from pathlib import Path

import pytest

from tests.scripts import run_script
from tests.training_runs import conversation, write_rows, write_tiny_model

PASSWORD, QUERY = "hu5h-p4ss", "qu3ry-t3xt"
TOKENS = {
    "HF_TOKEN": "hf_" + "t0ken" * 6,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "SANDWICH_API_TOKEN": "s3rver-k3y",
    "SANDWICH_WEB_PASSWORD": "p4ge-p4ssword",
    "POSTGRES_PASSWORD": "p0stgres-p4ss",
    "OPENAI_API_KEY": "sk-0penai-k3y",
}
FOLDER = "ann-private"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secrets") / FOLDER
    folder.mkdir()
    (folder / ".env").write_text(f"POSTGRES_PASSWORD={PASSWORD}\n")
    rows = [conversation(number) for number in range(8)]
    write_rows(folder / "eval.jsonl", rows[:1])
    with sqlite3.connect(folder / "log.db") as database:
        database.execute("CREATE TABLE log (messages TEXT, tools TEXT)")
        pairs = [(json.dumps(row["messages"]), row["tools"]) for row in rows]
        database.executemany("INSERT INTO log VALUES (?, ?)", pairs)
    write_tiny_model(folder / "model")
    return folder


def test_no_secret_is_printed_or_written(home):
    printed = []

    def run(script, *arguments, code):
        done = run_script(script, *arguments, env=TOKENS, cwd=home)
        printed.append(done.stdout + done.stderr)
        assert done.returncode == code, done.stderr

    query = f"SELECT messages, tools FROM log WHERE '{QUERY}' <> ''"  # noqa: S608
    run("prepare_data.py", "--sql", f"sqlite:///{home}/log.db", "--query", query, "--output", home / "data",
        "--split", "1/0/0", code=0)  # fmt: skip
    run("prepare_data.py", "--sql", f"postgresql://u:{PASSWORD}@ss@localhost:1/db", "--output", home / "x", code=2)
    run("prepare_data.py", "--sql", f"postgresql://u:{PASSWORD}@localhost:1/db", "--output", home / "x", code=2)
    odbc = f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BUID%3Du%3BPWD%3D{PASSWORD}"
    run("prepare_data.py", "--sql", odbc, "--output", home / "x", code=2)
    train = ["--model", home / "model", "--dataset", home / "data" / "train.jsonl", "--format", "chatml",
             "--experiments_dir", home / "runs", "--batch_size", 4, "--grad_accum", 1]  # fmt: skip
    run("train_lora.py", *train, "--max_steps", 1, "--name", "run", code=0)
    run("train_lora.py", *train, "--lr", "1e38", "--max_steps", 9, "--name", "diverges", code=2)
    run("train_lora.py", *train, "--push_to_hub", "ann/x", "--name", "local", code=2)
    score = ["--dataset", home / "eval.jsonl", "--limit", 1, "--max_new_tokens", 2]
    run("evaluate_lora.py", home / "runs" / "run", *score, code=0)
    run("export_lora.py", home / "runs" / "run", "--to", "hub", "--output", home.parent / "hub", code=0)

    secrets = [PASSWORD, QUERY, *TOKENS.values()]
    ours = {home / ".env"}
    written = [path for path in home.parent.rglob("*") if path.is_file() and path not in ours]
    expected = {"README.md", "training.log", "experiment_config.json", "adapter_model.safetensors"}
    assert expected <= {path.name for path in written}
    for secret in secrets:
        assert not [text for text in printed if secret in text], secret
        assert not [path for path in written if secret.encode() in path.read_bytes()], secret
    uploaded = [path for path in written if path.is_relative_to(home.parent / "hub")]
    uploaded += [home / "data" / "dataset_card.md", home / "runs" / "run" / "final_model" / "README.md"]
    assert len(uploaded) > 4
    assert not [path for path in uploaded if FOLDER in path.read_text(encoding="utf-8", errors="replace")]
    assert not Path(home / "x").exists()
