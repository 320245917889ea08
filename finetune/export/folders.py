"""Where an export goes."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import UserError
from finetune.runs.experiment import CONFIG, FINAL

# A file that every export of a kind has, so that --overwrite takes nobody's photographs for one.
MARKS = {
    "merged": "generation_config.json", "gguf": "*.gguf", "ollama": "Modelfile", "vllm": "serve.sh",
    "hub": "adapter_config.json",
}  # fmt: skip


def output_folder(source: str | Path, kind: str, output: Path | None, overwrite: bool) -> Path:
    """`output`, else `<run>/exports/<kind>` (of a checkpoint `<run>/exports/<kind>-<checkpoint>`).

    A model that is no folder exports into `exports/<name>/<kind>`. Raises UserError when something lies there and may
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
    if output.exists():
        if not output.is_dir():
            raise UserError(f"{output} is a file; name a folder with --output")
        if not overwrite:
            raise UserError(f"{output} exists already; give --overwrite to replace it, or another folder by --output")
        taken = output.resolve()
        run = (path / CONFIG).is_file() and taken.parent == path.resolve()  # final_model, a checkpoint, the evaluation
        if run or taken in (Path.cwd(), *Path.cwd().parents, path.resolve(), *path.resolve().parents):
            raise UserError(f"--overwrite would delete {output} and the run in it; name another folder with --output")
        if any(output.iterdir()) and not any(output.glob(MARKS[kind])):
            raise UserError(
                f"--overwrite replaces an earlier export, and {output} does not look like one of {kind}: it has no "
                f"{MARKS[kind]}; name another folder with --output"
            )
    return output


def size_of(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
