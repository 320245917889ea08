"""What can be wrong with a stranger's model, in one line: on the Hub, in its files, in what its weights lack."""

from __future__ import annotations

import contextlib
import logging
import re
import textwrap
from collections.abc import Iterator

from finetune.errors import UserError


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Failures of the Hub, of missing files and of a model's own files become one line with a remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from safetensors import SafetensorError

    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of any kind: they come from whatever a stranger's config.json holds
        chain, cause = [], error
        while cause is not None:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        text = " ".join(str(e) for e in chain)
        if any(isinstance(e, GatedRepoError) for e in chain) or "gated repo" in text.lower():
            raise UserError(
                f"model {name} is gated: accept its licence on https://huggingface.co/{name} "
                "and set HF_TOKEN to a token with read access"
            ) from error
        if "trust_remote_code" in text:
            raise UserError(
                f"model {name} brings its own code; read it, then pass --trust_remote_code to run it"
            ) from error
        if any(isinstance(e, RepositoryNotFoundError) for e in chain):
            raise UserError(f"model {name} is not on the Hub (or private: set HF_TOKEN); check --model") from error
        if any(isinstance(e, LocalEntryNotFoundError | ConnectionError) for e in chain) or "offline" in text.lower():
            raise UserError(
                f"model {name} is neither a folder nor in the local cache, and the Hub cannot be reached; "
                "check --model and the network, or use --model smollm2-135m"
            ) from error
        if any(isinstance(e, HFValidationError) for e in chain):
            raise UserError(f"model {name} is neither a folder nor a name that the Hub allows") from error
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text, re.IGNORECASE):
            raise
        if "file named model.safetensors" in text:
            raise UserError(
                f"model {name} has no weights as safetensors; pickled ones can run code and are not loaded: "
                "convert them, or choose another --model"
            ) from error
        if "ignore_mismatched_sizes" in text:
            raise UserError(
                f"model {name} cannot be loaded: its weights have other shapes than its config.json says; "
                "fetch the model again"
            ) from error
        reason = one_line(error)
        if not isinstance(error, OSError | ValueError | RuntimeError | SafetensorError):
            reason = f"{type(error).__name__}: {reason}"  # the text alone is a key's name or less
        raise UserError(f"model {name} cannot be loaded: {reason}; check --model") from error


def one_line(error: Exception) -> str:
    """What an error says, on one line and not too long."""
    return textwrap.shorten(str(error), 250, placeholder=" …")


class LoadReport(logging.Handler):
    """Weights that Transformers made up because a model's files lack them; it tells so in its log only."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.missing: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
        self.missing += re.findall(r"^(\S.*?) *\| MISSING", text, re.MULTILINE)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        source = logging.getLogger("transformers.modeling_utils")
        before = source.level, source.propagate
        source.addHandler(self)
        source.setLevel(logging.WARNING)
        source.propagate = False
        try:
            yield
        finally:
            source.removeHandler(self)
            source.propagate = before[1]
            source.setLevel(before[0])
