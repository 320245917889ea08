"""A GGUF file behind llama.cpp's own OpenAI-compatible server, which xllamacpp carries."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from finetune.chat.address import check_address
from finetune.errors import UserError

log = logging.getLogger("sandwich")


def serve_gguf(path: Path, host: str, port: int) -> int:
    """Serve until Ctrl-C; calls are read by llama.cpp, from the template inside the file."""
    if not path.is_file():
        raise UserError(f"{path} is no file; make one with: python export_lora.py RUN --to gguf")
    try:
        import xllamacpp  # noqa: F401 - only whether it is there
    except ImportError as error:
        raise UserError("serving a GGUF needs xllamacpp; run: pip install -r requirements_optional.txt") from error
    from finetune.export.llama_check import llama_server

    check_address(host, port)
    with llama_server(path, context=0, host=host, port=port) as server:
        log.info("llama.cpp serves %s at %s/v1; Ctrl-C ends it", path.name, server.listening_address)
        threading.Event().wait()
    return 0
