"""Rows of a database: those of a query, or of a whole table, read through SQLAlchemy.

Credentials come from the URL, the environment or a `.env` file; they appear in no message and no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import UserError
from finetune.packages import dotenv

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

DEFAULT_TABLE = "query_logs"
EXAMPLE_ROWS = "data/samples/query_logs.jsonl"
# Entries of a URL's query that are shown. Any other may hold a password: password=…, odbc_connect=…;PWD=…
_SHOWN_ENTRIES = {"sslmode", "charset", "mode", "uri", "cache", "timeout", "connect_timeout", "driver", "encrypt"}
_ODBC_SECRET = re.compile(r"(?:pwd|password|token|secret|key)\s*=\s*(\{[^}]*\}|[^;]*)", re.IGNORECASE)
_TABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?")


def database_url(text: str | None, environment: Mapping[str, str] | None = None) -> URL:
    """A SQLAlchemy URL whose missing parts come from the environment (default: os.environ and `.env`).

    text  "postgresql://host/db", "sqlite:///file.db", any other SQLAlchemy URL; "" or None: $DATABASE_URL, else
          PostgreSQL as POSTGRES_HOST, POSTGRES_PORT, POSTGRES_DB, POSTGRES_USER and POSTGRES_PASSWORD say
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    known = dotenv() | dict(os.environ) if environment is None else environment
    text = text or known.get("DATABASE_URL") or "postgresql://"
    try:
        url = make_url(re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", text))
    except (ArgumentError, ValueError) as error:
        # The text may hold a password: it is not shown.
        raise UserError(
            "--sql: not a database URL; write postgresql://user@host/database or sqlite:///file.db"
        ) from error
    if "@" in (url.host or ""):  # the end of a password, which would be shown as the host
        raise UserError("--sql: the user name or password of the URL holds an @; write it as %40")
    if url.get_backend_name() == "sqlite":
        if url.database and url.database != ":memory:" and not Path(url.database).is_file():
            raise UserError(f"--sql: there is no SQLite file {url.database}; check the path (sqlite:///relative.db)")
    elif url.get_backend_name() == "postgresql":
        port = known.get("POSTGRES_PORT")
        if port and not port.isdigit():
            raise UserError(f"POSTGRES_PORT is {port!r}, not a number; fix the environment or .env")
        url = url.set(
            host=url.host or known.get("POSTGRES_HOST"),
            port=url.port or (int(port) if port else None),
            database=url.database or known.get("POSTGRES_DB"),
            username=url.username or known.get("POSTGRES_USER"),
            password=url.password or known.get("POSTGRES_PASSWORD"),
        )
    return url


def shown_url(url: URL) -> str:
    """The URL without passwords, for messages and files."""
    return url.difference_update_query(_secret_keys(url)).render_as_string(hide_password=True)


def _secret_keys(url: URL) -> list[str]:
    return [key for key in url.query if key.lower() not in _SHOWN_ENTRIES]


def _secrets(url: URL) -> list[str]:
    """Every text that must not be in a message, the longest first."""
    values = [str(url.password or "")]
    for key in _secret_keys(url):
        given = url.query[key]
        for value in (given,) if isinstance(given, str) else given:
            values += [value, *(found.strip("{}") for found in _ODBC_SECRET.findall(value))]
    return sorted(filter(None, values), key=len, reverse=True)


def read_sql(
    url_text: str | None, *, query: str | None = None, table: str | None = None
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (source, row number from 1, row) of a query, or of all rows of a table (default: query_logs).

    Columns that are NULL are omitted from a row. Raises UserError, never with a password in its text.
    """
    import sqlalchemy
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    url = database_url(url_text)
    if query is None:
        table = table or DEFAULT_TABLE
        if not _TABLE.fullmatch(table):
            raise UserError(f"--table {table!r}: not a plain table name; use --query with a SELECT statement")
        query = f"SELECT * FROM {table}"  # noqa: S608  (checked by _TABLE)
    name = f"{shown_url(url)}#{table or 'query'}"
    try:
        engine = sqlalchemy.create_engine(url)
    except (NoSuchModuleError, ImportError) as error:
        raise UserError(
            f"--sql: no driver for {url.drivername} ({error}); pip install it, or use postgresql/sqlite"
        ) from error
    read_only = {"postgresql_readonly": True} if engine.dialect.name == "postgresql" else {}
    try:
        with engine.connect().execution_options(stream_results=True, **read_only) as connection:
            # exec_driver_sql leaves colons alone; drivers with %s parameters need per cent signs doubled.
            if engine.dialect.paramstyle in ("format", "pyformat"):
                query = query.replace("%", "%%")
            if engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA query_only = ON")
            found = connection.exec_driver_sql(query)
            names = list(found.keys())
            if duplicates := [column for column in names if names.count(column) > 1]:
                raise UserError(f"{name}: the query has two columns {duplicates[0]}; rename one of them with AS")
            for number, row in enumerate(found.mappings(), start=1):
                yield name, number, {column: value for column, value in row.items() if value is not None}
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        for secret in _secrets(url):
            reason = reason.replace(secret, "***")
        raise UserError(
            f"{name}: {reason}; check --sql, --query or --table, and POSTGRES_* in the environment, or read rows of a "
            f"file instead (example: {EXAMPLE_ROWS})"
        ) from error
    finally:
        engine.dispose()
