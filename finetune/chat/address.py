"""The address of a server: whether it is free, before anything slow is loaded, and whether others can reach it."""

from __future__ import annotations

import ipaddress
import socket

from finetune.errors import UserError


def check_address(host: str, port: int) -> None:
    """UserError when `host`:`port` is in use or not an address of this machine."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error


def url(host: str, port: int) -> str:
    """The server's URL; an IPv6 address is in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
