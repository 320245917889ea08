"""The checks of prepare_data.py on the rows of a run: wrong calls and results stop it, other problems are counted."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from finetune import json_schema
from finetune.errors import UserError
from finetune.files import write_to_cache
from finetune.json_schema import dialects
from finetune.preparing import checks
from finetune.progress import counted
from finetune.reading.load_result import LoadResult

log = logging.getLogger("sandwich")
# "nothing to train" and "empty answer" are found, counted and skipped by the encoding.
SKIPPED = ("nothing to train", "empty answer")


def check_rows(loaded: LoadResult, cache_dir: Path) -> None:
    """Raise UserError for the first row with a wrong call or result; log the number of rows with other problems.

    The outcome is cached by the fingerprint of the conversations.
    """
    code = [Path(str(module.__file__)).read_text("utf-8") for module in (checks, json_schema, dialects)]
    key = json.dumps([loaded.fingerprint, version("jsonschema"), *code])
    path = cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    try:
        counts = {str(kind): int(number) for kind, number in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError):
        counts = _check_all(loaded)
        write_to_cache(path, json.dumps(counts).encode())
    for kind, number in counts.items():
        log.info("kept with a warning: %s (%s)", kind, counted(number, "row"))


def _check_all(loaded: LoadResult) -> dict[str, int]:
    counts: Counter = Counter()
    for (source, row), conversation in zip(loaded.origins, loaded.conversations, strict=True):
        problems = checks.check_conversation(conversation)
        for problem in problems:
            if problem.kind in checks.STOPPING:
                columns = loaded.unread_tool_columns() if problem.kind == "undeclared tool" else []
                found = f" (not read: {', '.join(columns)})" if columns else ""
                raise UserError(
                    f"{source}, row {row}: {problem.text}; {checks.STOPPING[problem.kind]}{found}; "
                    "prepare_data.py rejects such rows and keeps the others"
                )
        counts.update({problem.kind for problem in problems} - set(SKIPPED))
    return dict(counts)
