"""Export targets: merged.py, gguf.py, … register one each with `@target`; export_lora.py runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.errors import UserError
from finetune.runs.experiment import CONFIG, FINAL
from finetune.runs.find import Run


@dataclass(frozen=True)
class Job:
    """One export: what to export, where to, and the flags of export_lora.py."""

    run: Run
    folder: Path  # empty; renamed to the output folder when the export is complete
    name: str  # of the model in files and servers
    dtype: str = "auto"
    quantization: tuple[str, ...] = ("q8_0",)
    llama_cpp: Path | None = None
    mode: str = "lora"
    repo_id: str | None = None
    public: bool = False
    rank: int | str | None = None  # adapter: the rank to cut it to, or "auto"
    tolerance: float = 0.01  # adapter: how much loss "auto" may add, in nats
    dataset: tuple[str, ...] = ()  # adapter: rows by which "auto" chooses; empty: the run's own evaluation rows


# Writes into `job.folder`; may return what to do with the output folder afterwards.
Exporter = Callable[[Job], Callable[[Path], None] | None]


@dataclass(frozen=True)
class Target:
    """One choice of --to."""

    export: Exporter
    marker: str  # pattern of a file in every export of this kind, so that --overwrite replaces nothing else
    help: str


TARGETS: dict[str, Target] = {}


def target(name: str, *, marker: str, help: str) -> Callable[[Exporter], Exporter]:
    """Register a function as the export target `name`."""

    def register(export: Exporter) -> Exporter:
        TARGETS[name] = Target(export, marker, help)
        return export

    return register


def output_folder(source: str | Path, kind: str, output: Path | None, overwrite: bool) -> Path:
    """`output`, else `<run>/exports/<kind>` (for a checkpoint `<run>/exports/<kind>-<checkpoint>`).

    A model that is not a folder is exported to `exports/<name>/<kind>`. Raises UserError when the folder exists and may
    not be replaced, or when replacing it would delete the run.
    """
    path = Path(source)
    if output is None:
        if not path.is_dir():
            output = Path("exports") / path.name / kind
        elif (path.parent / CONFIG).is_file():
            output = path.parent / "exports" / (kind if path.name == FINAL else f"{kind}-{path.name}")
        else:
            output = path / "exports" / kind
    if not output.exists():
        return output
    if not output.is_dir():
        raise UserError(f"{output} is a file; name a folder with --output")
    if not overwrite:
        raise UserError(f"{output} exists already; replace it with --overwrite, or name another folder with --output")
    resolved, marker = output.resolve(), TARGETS[kind].marker
    in_run = (path / CONFIG).is_file() and resolved.parent == path.resolve()  # final_model, a checkpoint, evaluation
    if in_run or resolved in (Path.cwd(), *Path.cwd().parents, path.resolve(), *path.resolve().parents):
        raise UserError(f"--overwrite would delete {output} and the run in it; name another folder with --output")
    if any(output.iterdir()) and not any(output.glob(marker)):
        raise UserError(
            f"--overwrite replaces only earlier exports, and {output} is not one of {kind}: it has no {marker}; "
            "name another folder with --output"
        )
    return output
