"""Whether an address can be listened on, asked before anything slow."""

from __future__ import annotations

import socket

from finetune.errors import UserError


def check_address(host: str, port: int) -> None:
    """UserError when `host`:`port` is taken or none of this machine's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"{host}:{port} cannot be listened on ({error.strerror}); choose another --port") from error
