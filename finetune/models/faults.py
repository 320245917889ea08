"""Problems with a third-party model, in one line each: on the Hub, in its files, missing weights."""

from __future__ import annotations

import contextlib
import logging
import re
import textwrap
from collections.abc import Iterator

from finetune.errors import UserError, is_out_of_memory


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turn errors of the Hub and of model `name`'s files into UserErrors with a remedy, except out of memory."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any kind: a third-party config.json can make Transformers raise anything
        if (problem := _problem(name, error)) is None:
            raise
        raise UserError(f"model {name} {problem}") from error


def _problem(name: str, error: Exception) -> str | None:
    """What is wrong and what to do, to follow "model NAME"; None for out of memory."""
    from httpx import TransportError
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from safetensors import SafetensorError

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(map(str, chain))

    def raised(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if raised(GatedRepoError) or "gated repo" in text.lower():
        url = f"https://huggingface.co/{name}"
        return f"is gated: accept its license on {url} and set HF_TOKEN to a token with read access"
    if "trust_remote_code" in text:
        return "contains its own code; read it, then pass --trust_remote_code to run it"
    if raised(RepositoryNotFoundError):
        return "is not on the Hub (or private: set HF_TOKEN); check --model"
    if raised(LocalEntryNotFoundError, ConnectionError, TransportError) or "offline" in text.lower():
        return (
            "is neither a folder nor in the local cache, and the Hub cannot be reached; check --model and the network, "
            "or use --model smollm2-135m"
        )
    if raised(HFValidationError):
        return "is neither a folder nor a valid Hub id; check --model"
    if any(map(is_out_of_memory, chain)):
        return None
    if "file named model.safetensors" in text:
        return (
            "has no weights in safetensors format, and pickled weights, which can run code, are not loaded: convert "
            "them, or choose another --model"
        )
    if "ignore_mismatched_sizes" in text:
        return "cannot be loaded: the shapes of its weights do not match its config.json; download the model again"
    reason = one_line(error)
    if not isinstance(error, OSError | ValueError | RuntimeError | SafetensorError):
        reason = f"{type(error).__name__}: {reason}"  # the message alone may be just the name of a key
    return f"cannot be loaded: {reason}; check --model"


def one_line(error: Exception) -> str:
    """The message of an error on one line, shortened."""
    return textwrap.shorten(str(error), 250, placeholder=" …")


@contextlib.contextmanager
def missing_weights() -> Iterator[list[str]]:
    """Names of weights that a model's files lack and Transformers initializes: it reports them in its log only."""
    names: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
        names.extend(re.findall(r"^(\S.*?) *\| MISSING", text, re.MULTILINE))
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.addFilter(collect)
    logger.setLevel(logging.WARNING)
    try:
        yield names
    finally:
        logger.removeFilter(collect)
        logger.setLevel(level)
