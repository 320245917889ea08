"""The tracker of --report_to: one run of the tracker for one run folder, also after a resume, with its parameters."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from finetune.errors import UserError
from finetune.files import require_run_folder, write_text_atomic
from finetune.models.faults import one_line
from finetune.models.hub import public_base, public_name
from finetune.runs.experiment import Experiment

log = logging.getLogger("sandwich")
# In the run folder: the tracker's run, how many rows were sent to it, and the last step of each metric.
STATE = "tracker.json"
MAX_PARAMETER_LENGTH = 250  # MLflow


def tracker_callback(name: str, experiment: Experiment) -> TrainerCallback:
    """Transformers' callback for the tracker, which continues the run that a resumed run began."""
    (base,) = get_reporting_integration_callbacks(name)

    class Continued(base):  # type: ignore[misc, valid-type]
        failed = False  # after an error it is not called again: training_log.csv has every row

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if not state.is_world_process_zero:
                return super().on_train_begin(args, state, control, **kwargs)
            self.path = experiment.folder / STATE
            self.record = read_state(self.path, name) if state.global_step else {}
            self.sent = dict(self.record.get("sent", {}))  # by the earlier process: its steps are repeated
            if name == "trackio":  # continues any run of the same name: a new run needs a name of its own
                self.run_name = self.record.get("run") or args.run_name + ("" if self.record else f" {token_hex(2)}")
                args = copy.copy(args)
                args.run_name = self.run_name
            with self.guarded(), environment(RESUMERS[name](self, self.record.get("run"), experiment.folder)):
                super().on_train_begin(args, state, control, **kwargs)
                if name == "wandb":
                    number_rows_from(self._wandb.run, self.record.get("rows", 0))
                self.record |= {"tracker": name, "run": RUN_IDS[name](self)}
                self.write()
                PARAMETERS[name](self, parameters(experiment.config))
            return None

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
            kind = next((kind for kind in ("loss", "eval_loss") if kind in (logs or {})), None)
            if self.failed or not state.is_world_process_zero:
                return None
            if kind and state.global_step <= self.sent.get(kind, 0):
                return None
            with self.guarded():
                super().on_log(args, state, control, logs=logs, **kwargs)
                self.record["rows"] = self.record.get("rows", 0) + 1
                if kind:
                    self.record.setdefault("sent", {})[kind] = state.global_step
                self.write()
            return None

        def on_train_end(self, *args: Any, **kwargs: Any) -> Any:
            with self.guarded():
                return None if self.failed else super().on_train_end(*args, **kwargs)

        @contextlib.contextmanager
        def guarded(self) -> Iterator[None]:
            try:
                yield
            except UserError:  # the run folder cannot be written
                raise
            except Exception as error:  # each tracker has its own classes
                self.failed = True
                log.warning("--report_to %s failed (%s); the run continues without it", name, one_line(error))

        def write(self) -> None:
            require_run_folder(experiment.folder)
            write_text_atomic(self.path, json.dumps(self.record) + "\n")

    Continued.__name__, Continued.__module__ = base.__name__, base.__module__
    return Continued()


def read_state(path: Path, name: str) -> dict[str, Any]:
    """What an earlier process has recorded; {} where it used another tracker or the file is not readable."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = {kind: int(step) for kind, step in record.get("sent", {}).items()}
        rows = int(record.get("rows", 0))
        return {**record, "sent": known, "rows": rows} if record["tracker"] == name else {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("cannot read %s (%s): %s starts a new run", path, type(error).__name__, name)
        return {}


def number_rows_from(run: Any, rows: int) -> None:
    """Have W&B number the next row `rows`: offline it begins with 0 again, and a sync drops repeated numbers."""
    if run.step < rows:
        run.log({}, step=rows, commit=False)


def parameters(config: dict[str, Any]) -> dict[str, str | int | float]:
    """What distinguishes this run from others, beside Transformers' own arguments; without folders of this machine."""
    flags = config["flags"]
    names = [public_name(name) for name in flags["dataset"]]
    return {
        "rank": flags["rank"],
        "alpha": flags["alpha"],
        "use_rslora": flags["use_rslora"],
        "lora_dropout": flags["dropout"],
        "target_modules": " ".join(flags["target_modules"])[:MAX_PARAMETER_LENGTH],
        "base_model": public_base(config["base_model"]),
        "format": config["format"]["name"],
        "data": " ".join(names)[:MAX_PARAMETER_LENGTH],
        "data_fingerprint": config["data"]["fingerprint"],
        "eval_data": " ".join(map(public_name, flags["eval_dataset"] or []))[:MAX_PARAMETER_LENGTH],
    }


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """The variables are set inside the block, unless the user has set them."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _resume_tensorboard(callback: Any, run: str | None, folder: Path) -> dict[str, str]:
    if callback.logging_dir is None:  # the default is a new folder for each start
        callback.logging_dir = str(folder / "runs")
    return {}


# Environment variables by which the tracker continues a run.
RESUMERS = {
    "tensorboard": _resume_tensorboard,
    "wandb": lambda callback, run, folder: {"WANDB_RUN_ID": run, "WANDB_RESUME": "allow"} if run else {},
    "mlflow": lambda callback, run, folder: {"MLFLOW_RUN_ID": run} if run else {},
    "trackio": lambda callback, run, folder: {},
}
RUN_IDS = {
    "tensorboard": lambda callback: callback.logging_dir,
    "wandb": lambda callback: callback._wandb.run.id,
    "mlflow": lambda callback: callback._ml_flow.active_run().info.run_id,
    "trackio": lambda callback: callback.run_name,
}
PARAMETERS = {
    "tensorboard": lambda callback, values: callback.tb_writer.add_text("parameters", json.dumps(values)),
    "wandb": lambda callback, values: callback._wandb.config.update(values, allow_val_change=True),
    "mlflow": lambda callback, values: callback._ml_flow.log_params(values),
    "trackio": lambda callback, values: callback._trackio.config.update(values, allow_val_change=True),
}
