"""Serve a GGUF file with llama.cpp's OpenAI-compatible server (package xllamacpp)."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from finetune.chat.address import check_address
from finetune.errors import UserError

log = logging.getLogger("sandwich")


def serve_gguf(path: Path, host: str, port: int) -> int:
    """Serve until Ctrl-C; llama.cpp parses the calls by the template inside the file."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; create one with: python export_lora.py RUN --to gguf")
    try:
        import xllamacpp  # noqa: F401
    except ImportError as error:
        raise UserError("serving a GGUF needs xllamacpp; run: pip install -r requirements/optional.txt") from error
    from finetune.export.llama_check import llama_server

    check_address(host, port)
    with llama_server(path, context=0, host=host, port=port) as server:
        log.info("llama.cpp serves %s at %s/v1; stop with Ctrl-C", path.name, server.listening_address)
        threading.Event().wait()
    return 0
