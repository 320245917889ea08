"""Rows out of a database: a query of the user's own, or a whole query-log table. SQLAlchemy does the talking.

Credentials come from the URL, the environment or a `.env` file, and appear in no message and no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.errors import UserError

DEFAULT_TABLE = "query_logs"
_SECRET = re.compile("pass|pwd|secret|token|key", re.IGNORECASE)  # ?password=… in a URL, ?sslpassword=…
_TABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)?")


def database_url(text: str | None, environment: dict[str, str] | None = None):
    """A SQLAlchemy URL; what it leaves open is filled from the environment (and `.env` in the current folder).

    text  "postgresql://host/db", "sqlite:///file.db", any other SQLAlchemy URL; "" or None: $DATABASE_URL, else
          PostgreSQL as POSTGRES_HOST, POSTGRES_PORT, POSTGRES_DB, POSTGRES_USER and POSTGRES_PASSWORD say
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    known = _environment() if environment is None else environment
    text = text or known.get("DATABASE_URL") or "postgresql://"
    text = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", text)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        # The text may hold a password: it is not repeated.
        raise UserError(
            "--sql: this is no database URL; write postgresql://user@host/database or sqlite:///file.db"
        ) from error
    if url.get_backend_name() == "sqlite":
        if url.database and url.database != ":memory:" and not Path(url.database).is_file():
            raise UserError(f"--sql: there is no SQLite file {url.database}; check the path (sqlite:///relative.db)")
    elif url.get_backend_name() == "postgresql":
        port = known.get("POSTGRES_PORT")
        if port and not port.isdigit():
            raise UserError(f"POSTGRES_PORT is {port!r}, no number; mend the environment or .env")
        url = url.set(
            host=url.host or known.get("POSTGRES_HOST"),
            port=url.port or (int(port) if port else None),
            database=url.database or known.get("POSTGRES_DB"),
            username=url.username or known.get("POSTGRES_USER"),
            password=url.password or known.get("POSTGRES_PASSWORD"),
        )
    return url


def shown_url(url) -> str:
    """The URL as messages and files may hold it: without a password, wherever in it one stands."""
    return url.difference_update_query(_secrets(url)).render_as_string(hide_password=True)


def _secrets(url) -> list[str]:
    return [key for key in url.query if _SECRET.search(key)]


def _environment() -> dict[str, str]:
    from dotenv import dotenv_values

    file = {name: value for name, value in dotenv_values(Path(".env")).items() if value is not None}
    return file | dict(os.environ)


def read_sql(
    url_text: str | None, *, query: str | None = None, table: str | None = None
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield (source, row number from 1, row) of a query, or of all rows of a table (default: query_logs).

    Columns that are NULL are left out of a row. Raises UserError, never with a password in its text.
    """
    import sqlalchemy
    from sqlalchemy.exc import NoSuchModuleError, SQLAlchemyError

    url = database_url(url_text)
    if query is None:
        table = table or DEFAULT_TABLE
        if not _TABLE.fullmatch(table):
            raise UserError(f"--table {table!r}: no plain table name; use --query with a SELECT of your own")
        query = f"SELECT * FROM {table}"
    name = f"{shown_url(url)}#{table or 'query'}"
    try:
        engine = sqlalchemy.create_engine(url)
    except (NoSuchModuleError, ImportError) as error:
        raise UserError(
            f"--sql: no driver for {url.drivername} ({error}); pip install it, or use postgresql/sqlite"
        ) from error
    try:
        with engine.connect().execution_options(stream_results=True, **_read_only(url)) as connection:
            # The user's own query has no parameters: its colons are left alone, its per cent signs are meant.
            if engine.dialect.paramstyle in ("format", "pyformat"):
                query = query.replace("%", "%%")
            if engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA query_only = ON")
            found = connection.exec_driver_sql(query)
            names = list(found.keys())
            if len(set(names)) < len(names):
                twice = next(column for column in names if names.count(column) > 1)
                raise UserError(f"{name}: the query gives the column {twice} twice; name one of them with AS")
            for number, row in enumerate(found.mappings(), start=1):
                yield name, number, {column: value for column, value in row.items() if value is not None}
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        for secret in (url.password, *(url.query[key] for key in _secrets(url))):
            if secret:
                reason = reason.replace(str(secret), "***")
        raise UserError(
            f"{name}: {reason}; check --sql, --query or --table, and POSTGRES_* in the environment"
        ) from error
    finally:
        engine.dispose()


def _read_only(url) -> dict[str, Any]:
    """Preparing data reads: where the server can be told so, a query that writes is refused by the server itself."""
    return {"postgresql_readonly": True} if url.get_backend_name() == "postgresql" else {}
