"""Rows of real databases: SQLite always, PostgreSQL where it is installed. No password is shown."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import time
from argparse import Namespace
from pathlib import Path

import pytest

import prepare_data
from finetune.errors import UserError
from finetune.reading.conversations import load_conversations
from finetune.reading.sql import database_url, read_sql, shown_url

CREATE = """CREATE TABLE query_logs (id integer, query text, tool_used text, parameters {json}, response text)"""
LOGS = [
    (1, "Find the Q3 report", "rag_retrieval", '{"z": "Q3", "a": {"n": 1.50, "big": 12345678901234567890}}', None),
    (2, "Hello 안녕", None, None, "Hi there: 100%"),
    (3, "What is 2+2?", "code_execution", "{}", None),
]
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("rag_retrieval", "code_execution")]


def check(rows) -> None:
    """Assert that the rows are those of LOGS."""
    result = load_conversations([], rows=rows, tools=TOOLS)
    first, second, third = (conversation["messages"][-1] for conversation in result.conversations)
    arguments = first["tool_calls"][0]["function"]["arguments"]
    assert json.dumps(arguments) == '{"z": "Q3", "a": {"n": 1.5, "big": 12345678901234567890}}'
    assert second == {"role": "assistant", "content": "Hi there: 100%"}
    assert third["tool_calls"][0]["function"] == {"name": "code_execution", "arguments": {}}
    assert [row for _, row in result.origins] == [1, 2, 3]


@pytest.fixture
def sqlite_url(tmp_path) -> str:
    path = tmp_path / "logs.db"
    with sqlite3.connect(path) as connection:
        connection.execute(CREATE.format(json="text"))
        connection.executemany("INSERT INTO query_logs VALUES (?, ?, ?, ?, ?)", LOGS)
    connection.close()
    return f"sqlite:///{path.as_posix()}"


def test_sqlite_table_and_query(sqlite_url):
    check(read_sql(sqlite_url))
    check(read_sql(sqlite_url, table="query_logs"))
    check(read_sql(sqlite_url, query="SELECT * FROM query_logs WHERE ':x' <> '%s' ORDER BY id"))
    ((source, number, row),) = read_sql(
        sqlite_url, query="SELECT query AS question, NULL AS n FROM query_logs WHERE id = 2"
    )
    assert (number, row) == (1, {"question": "Hello 안녕"}) and source.endswith("logs.db#query")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"table": "none"}, "no such table"),
        ({"table": "x; DROP TABLE query_logs"}, "not a plain table name"),
        ({"query": "SELEC 1"}, "syntax error"),
    ],
)
def test_wrong_queries_are_one_line(sqlite_url, kwargs, message):
    with pytest.raises(UserError, match=message):
        list(read_sql(sqlite_url, **kwargs))


@pytest.mark.parametrize("url", ["nonsense", "sqlite:///nowhere/at/all.db", "nodriver://u:hush@host/db"])
def test_wrong_urls_are_one_line_without_password(url):
    with pytest.raises(UserError, match="--sql") as caught:
        list(read_sql(url))
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("query", ["user=u&password=hush", "sslpassword=hush", "Passwd=hush&sslmode=disable"])
def test_password_in_url_query_is_hidden(query):
    url = f"postgresql://localhost:1/db?{query}"
    assert "hush" not in shown_url(database_url(url, {}))
    with pytest.raises(UserError, match="localhost:1/db") as caught:
        list(read_sql(url, query="SELECT 1"))
    assert "hush" not in str(caught.value)
    assert "hush" not in prepare_data.command_line(
        Namespace(argv=["--sql", url, "--output", "out"], sql=url, query=None)
    )


def test_sqlite_is_read_only(sqlite_url):
    for query in ("DROP TABLE query_logs", "DELETE FROM query_logs", "DELETE FROM query_logs RETURNING *"):
        with pytest.raises(UserError, match="readonly"):
            list(read_sql(sqlite_url, query=query))
    check(read_sql(sqlite_url))


def test_duplicate_query_column_is_named(sqlite_url):
    query = "SELECT a.query, b.query FROM query_logs a JOIN query_logs b ON a.id = b.id"
    with pytest.raises(UserError, match="two columns query"):
        list(read_sql(sqlite_url, query=query))


def test_url_overrides_environment_credentials():
    known = {
        "POSTGRES_HOST": "db",
        "POSTGRES_PORT": "5433",
        "POSTGRES_DB": "logs",
        "POSTGRES_USER": "me",
        "POSTGRES_PASSWORD": "hush",
    }
    url = database_url(None, known)
    assert (url.drivername, url.host, url.port, url.database, url.username, url.password) == (
        "postgresql+psycopg",
        "db",
        5433,
        "logs",
        "me",
        "hush",
    )
    assert database_url("postgres://other@elsewhere/x", known).host == "elsewhere"
    assert database_url("", {"DATABASE_URL": "sqlite://"}).get_backend_name() == "sqlite"
    with pytest.raises(UserError, match="POSTGRES_PORT"):
        database_url(None, {"POSTGRES_PORT": "five"})


def test_environment_overrides_dotenv(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text('export POSTGRES_HOST="from_file"\nPOSTGRES_DB=file_db\n', encoding="utf-8")
    for name in ("DATABASE_URL", "POSTGRES_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("POSTGRES_DB", "from_environment")
    url = database_url(None)
    assert (url.host, url.database) == ("from_file", "from_environment")


# PostgreSQL


def _program(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    return shutil.which(name) or (str(found[0]) if found else None)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """A server on a free port, with password logins; yields its port."""
    if not (_program("initdb") and _program("pg_ctl")):
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed (Debian: postgresql)")
    pytest.importorskip("psycopg")
    folder = tmp_path_factory.mktemp("postgres")
    (folder / "password").write_text("hush-hush", encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The server refuses to run as root; use the user of the Debian package.
    as_user: list[str] = []
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        if not (shutil.which("runuser") and _user_exists("postgres")):
            pytest.skip("running as root without the user postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
        for path in (folder, *list(folder.parents)[:3]):  # with pytest-xdist there is one more
            path.chmod(0o755)
        shutil.chown(folder, "postgres")
        shutil.chown(folder / "password", "postgres")
    data = folder / "data"
    init = [
        _program("initdb"),
        "-D",
        str(data),
        "-U",
        "cipher",
        "-A",
        "scram-sha-256",
        "--no-sync",
        "-E",
        "UTF8",
        "--locale=C",
        f"--pwfile={folder / 'password'}",
    ]
    control = [*as_user, _program("pg_ctl"), "-D", str(data)]
    subprocess.run([*as_user, *init], check=True, capture_output=True, cwd=folder)
    options = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    start = [*control, "-W", "-l", str(folder / "log"), "-o", options, "start"]
    subprocess.run(start, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    try:
        with _connected(port) as link:
            link.execute(CREATE.format(json="json"))
            link.cursor().executemany("INSERT INTO query_logs VALUES (%s, %s, %s, %s::json, %s)", LOGS)
        yield port
    finally:
        stop = [*control, "-W", "-m", "immediate", "stop"]
        subprocess.run(stop, check=False, cwd=folder, stdout=subprocess.DEVNULL)


def _connected(port: int):
    """A connection as soon as the server accepts one (in some containers pg_ctl cannot wait for it)."""
    import psycopg

    for _ in range(300):
        try:
            return psycopg.connect(host="127.0.0.1", port=port, user="cipher", password="hush-hush", dbname="postgres")
        except psycopg.OperationalError as error:
            failure = error
            time.sleep(0.1)
    raise failure


def _user_exists(name: str) -> bool:
    import pwd

    return any(entry.pw_name == name for entry in pwd.getpwall())


@pytest.fixture
def postgres_environment(postgres, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    values = {"HOST": "127.0.0.1", "PORT": str(postgres), "DB": "postgres", "USER": "cipher", "PASSWORD": "hush-hush"}
    for name, value in values.items():
        monkeypatch.setenv(f"POSTGRES_{name}", value)
    return postgres


def test_postgresql_table_and_query(postgres_environment):
    check(read_sql(""))
    check(read_sql("postgresql://", query="SELECT * FROM query_logs WHERE query NOT LIKE '%nothing%' ORDER BY id"))


def test_postgresql_is_read_only(postgres_environment):
    ((_, _, row),) = read_sql("", query="SELECT current_setting('transaction_read_only') AS answer")
    assert row == {"answer": "on"}
    with pytest.raises(UserError, match="DELETE"):
        list(read_sql("", query="DELETE FROM query_logs RETURNING *"))


def test_postgresql_wrong_password_is_not_shown(postgres_environment, monkeypatch):
    monkeypatch.setenv("POSTGRES_PASSWORD", "wrong-secret")
    with pytest.raises(UserError, match="authentication failed") as caught:
        list(read_sql(""))
    assert "wrong-secret" not in str(caught.value)
