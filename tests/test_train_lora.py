"""train_lora.py as a subprocess: its experiment folder, resuming, and refusals."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

import train_lora
from finetune.runs.manifest import write_manifest
from finetune.runs.run_log import COLUMNS
from finetune.settings import parse
from tests import faults
from tests.helpers import lazy
from tests.scripts import ROOT
from tests.training_runs import command, config_of, conversation, log_rows, run, write_rows

safetensors_torch = lazy("safetensors.torch")

# Columns that depend on the machine.
TIMING_COLUMNS = {"tokens_per_second", "computed_tokens_per_second", "seconds", "peak_memory_gb"}


@pytest.fixture(scope="module")
def finished_run(rows, tmp_path_factory):
    """One run of the real bundled model: 12 rows, 2 held out, 4 rows a step, 2 epochs."""
    experiments = tmp_path_factory.mktemp("experiments")
    result = run(
        "--model", "smollm2-135m", "--dataset", rows, "--format", "chatml", "--batch_size", 2, "--grad_accum", 2,
        "--epochs", 2, "--eval_fraction", 0.17, "--save_steps", 4, "--lr", "1e-3", "--experiments_dir", experiments,
        fresh=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (folder,) = [p for p in experiments.iterdir() if not p.name.startswith(".")]
    return folder, result


def test_run_folder_has_exactly_the_documented_files(finished_run):
    folder, result = finished_run
    assert re.fullmatch(r"smollm2_135m_r16_a32_lr1em03_ep2_\d{8}_\d{6}", folder.name)
    assert result.stdout.strip() == str(folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint-4", "checkpoint-6", "experiment_config.json", "final_model", "training.log", "training_log.csv",
    ]  # fmt: skip
    assert sorted(p.name for p in (folder / "final_model").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert not list(folder.rglob("*.bin"))


def test_log_has_one_row_per_step_and_a_falling_loss(finished_run):
    folder, _ = finished_run
    logged = log_rows(folder)
    assert list(logged[0]) == list(COLUMNS)
    assert [int(row["step"]) for row in logged] == [1, 2, 3, 4, 5, 6]
    assert [float(row["epoch"]) for row in logged] == pytest.approx([i / 3 for i in range(1, 7)], abs=1e-6)
    losses = [float(row["loss"]) for row in logged]
    assert losses[-1] < 0.6 * losses[0]
    assert [bool(row["eval_loss"]) for row in logged] == [False, False, True, False, False, True]
    assert float(logged[5]["eval_loss"]) < float(logged[2]["eval_loss"])
    seen = [int(row["tokens_seen"]) for row in logged]
    assert seen == sorted(seen)
    config = config_of(folder)
    assert seen[2] == config["data"]["tokens"]  # every token once per epoch
    assert int(logged[2]["trained_tokens"]) == config["data"]["trained_tokens"]
    for row in logged:
        # The tool schema is shared within a step, so fewer tokens are computed than the rows hold.
        assert 0 < float(row["computed_tokens_per_second"]) < float(row["tokens_per_second"])
        assert float(row["peak_memory_gb"]) > 0.5
        assert float(row["seconds"]) > 0


def test_experiment_config_records_the_run(finished_run):
    folder, _ = finished_run
    config = config_of(folder)
    assert config["status"] == "finished"
    assert config["ended"] >= config["started"]
    assert config["flags"]["rank"] == 16
    assert config["flags"]["alpha"] == 32
    assert config["base_model"] == "smollm2-135m"
    assert "--eval_fraction" in config["argv"]
    assert config["data"]["rows"] == 10
    assert config["eval_data"]["rows"] == 2
    assert config["data"]["trained_tokens_by_role"].keys() == {"assistant"}
    template = (folder / "final_model" / "chat_template.jinja").read_text(encoding="utf-8")
    assert hashlib.sha256(template.encode()).hexdigest() == config["format"]["template_sha256"]
    assert config["format"]["name"] == "chatml"
    assert config["trainable_parameters"] == 4_884_480
    assert config["versions"]["unsloth"]
    assert config["result"]["final_loss"] == float(log_rows(folder)[-1]["loss"])
    memory = config["memory"]
    assert memory["measured_gb"] == config["result"]["peak_memory_gb"]
    assert memory["predicted_gb"] == pytest.approx(sum(memory["parts"].values()), abs=0.01)
    assert memory["parts"]["adapter"] == pytest.approx(4 * config["trainable_parameters"] / 1e9, abs=1e-4)
    assert memory["plan"]["tokens"] >= memory["plan"]["longest"] == config["data"]["longest"]


def test_generation_config_stops_at_end_of_turn(finished_run):
    folder, _ = finished_run
    generation = json.loads((folder / "final_model" / "generation_config.json").read_text(encoding="utf-8"))
    ends = generation["eos_token_id"]
    assert 2 in (ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_checkpoints_carry_the_runs_own_template(finished_run, name):
    folder, _ = finished_run
    final = (folder / "final_model" / name).read_text(encoding="utf-8")
    assert name == "chat_template.jinja" or "response_template" in json.loads(final)
    for checkpoint in folder.glob("checkpoint-*"):
        assert (checkpoint / name).read_text(encoding="utf-8") == final


def test_secrets_are_not_written(rows, tiny_model, tmp_path):
    result = run(
        "--model", tiny_model, "--dataset", rows, "--format", "chatml", "--max_steps", 1, "--experiments_dir", tmp_path,
        env={"HF_TOKEN": "hf_averysecretvalue", "WANDB_API_KEY": "wandbsecretvalue"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    texts = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()] + [result.stderr.encode()]
    assert not any(b"secretvalue" in text for text in texts)


def test_experiment_config_repeats_the_run(finished_run, tmp_path):
    """An experiment_config.json is a valid --config, and the curve it gives is the same."""
    folder, _ = finished_run
    result = run("--config", folder / "experiment_config.json", "--max_steps", 2, "--experiments_dir", tmp_path)
    assert result.returncode == 0, result.stderr
    (again,) = tmp_path.iterdir()
    assert log_rows(again)[0]["loss"] == log_rows(folder)[0]["loss"]


RESUMED = (
    "--format", "chatml", "--batch_size", 2, "--grad_accum", 2, "--epochs", 3, "--dropout", 0.1, "--save_steps", 2,
    "--logging_steps", 3, "--eval_fraction", 0.17, "--lr", "5e-3", "--name", "run",
)  # fmt: skip


BASES = {
    "float32": ("--dtype", "float32"), "bfloat16": ("--dtype", "bfloat16"), "4bit": ("--load_in_4bit",),
    "dequantized": ("--load_in_4bit", "--dequantize_once"),
}  # fmt: skip


@pytest.mark.parametrize(
    "base", ["float32", "4bit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bfloat16", "dequantized"))]
)
def test_killed_run_resumes_to_the_same_bytes(base, rows, tiny_model, tmp_path):
    """SIGKILL after a checkpoint, then --resume: adapter bytes and log rows equal those of an undisturbed run.

    Dropout, logging every third step and checkpoints every second one need random state, data order and the partial
    log window to be restored.
    """
    arguments = ("--model", tiny_model, "--dataset", rows, *RESUMED, *BASES[base])
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    assert run(*arguments, "--experiments_dir", complete).returncode == 0

    process = subprocess.Popen(
        command(*arguments, "--experiments_dir", killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (killed / "run" / "checkpoint-4").is_dir():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    process.wait()
    assert config_of(killed / "run")["status"] == "running"
    assert not (killed / "run" / "final_model").exists()
    # A kill while writing a line and a checkpoint would also leave these.
    with (killed / "run" / "training_log.csv").open("a") as file:
        file.write("5,1.6")
    for name in (".saving/checkpoint-99", ".final_model.a1b2.part"):
        (killed / "run" / name).mkdir(parents=True, exist_ok=True)
    (killed / "run" / ".training_log.csv.a1b2.part").touch()
    # A machine that went down before the newest checkpoint was on the disk leaves it truncated.
    cut = killed / "run" / "checkpoint-6"
    shutil.rmtree(cut, ignore_errors=True)
    shutil.copytree(killed / "run" / "checkpoint-4", cut)
    (cut / "optimizer.pt").write_bytes((cut / "optimizer.pt").read_bytes()[:-100])

    result = run("--resume", killed / "run")
    assert result.returncode == 0, result.stderr
    assert "checkpoint-6: its optimizer.pt is not complete" in result.stderr
    assert config_of(killed / "run")["status"] == "finished"
    adapters = [(d / "run" / "final_model" / "adapter_model.safetensors").read_bytes() for d in (complete, killed)]
    assert adapters[0] == adapters[1]
    tensors = safetensors_torch.load(adapters[0])
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
    logs = [
        [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in log_rows(folder / "run")]
        for folder in (complete, killed)
    ]
    assert logs[0] == logs[1]
    assert [int(row["step"]) for row in logs[0]] == [3, 6, 9]
    means = [config_of(folder / "run")["result"]["train_loss"] for folder in (complete, killed)]
    assert means[0] == pytest.approx(means[1], rel=1e-4)  # of all steps, not of those since the resume
    assert not list((killed / "run").glob(".*"))


def test_resume_after_the_last_step_only_saves(rows, tiny_model, tmp_path):
    """The last checkpoint is in the middle of an epoch. The name of the run is not read as rich markup."""
    result = run(
        "--model", tiny_model, "--dataset", rows, "--format", "chatml", "--batch_size", 2, "--grad_accum", 1,
        "--max_steps", 2, "--save_steps", 1, "--scheduler", "constant", "--experiments_dir", tmp_path,
        "--name", "a [b] c",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "a [b] c" in result.stderr
    folder = tmp_path / "a [b] c"
    adapter = (folder / "final_model" / "adapter_model.safetensors").read_bytes()
    log = (folder / "training_log.csv").read_bytes()
    shutil.rmtree(folder / "final_model")

    result = run("--resume", folder)
    assert result.returncode == 0, result.stderr
    assert (folder / "training_log.csv").read_bytes() == log
    assert (folder / "final_model" / "adapter_model.safetensors").read_bytes() == adapter
    assert config_of(folder)["steps"] == 2


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", None)]
)  # Ctrl-C, a preempted machine, and a terminal that was closed
def test_signal_saves_a_checkpoint_to_resume_from(rows, tiny_model, tmp_path, number):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("ignored in this process, and so by the run: the tests were started with nohup")
    process = subprocess.Popen(
        command("--model", tiny_model, "--dataset", rows, "--format", "chatml", "--batch_size", 1, "--grad_accum", 1,
                "--epochs", 500, "--name", "run", "--experiments_dir", tmp_path),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    log = tmp_path / "run" / "training_log.csv"
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    if number not in (signal.SIGINT, signal.SIGTERM):  # a closed terminal sends two, one by its shell
        time.sleep(0.05)
        process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (143 if number == signal.SIGTERM else 130)
    assert f"--resume {tmp_path / 'run'}" in errors
    assert "Traceback" not in errors
    config = config_of(tmp_path / "run")
    assert config["status"] == "interrupted"
    last = int(log_rows(tmp_path / "run")[-1]["step"])
    assert (tmp_path / "run" / f"checkpoint-{last}" / "trainer_state.json").is_file()
    assert config["steps"] == last


@pytest.mark.skipif(os.name == "nt", reason="sends SIGTERM")
def test_signal_stops_inside_an_evaluation(rows, tiny_model, tmp_path):
    """The resumed run evaluates first: its log and adapter are those of an undisturbed run."""
    held_out = write_rows(tmp_path / "held_out.jsonl", [conversation(number) for number in range(150)])
    arguments = ("--model", tiny_model, "--dataset", rows, "--eval_dataset", held_out, "--format", "chatml",
                 "--max_steps", 2, "--eval_steps", 1, "--save_steps", 1, "--load_best", "--lr", "5e-3",
                 "--name", "run")  # fmt: skip
    assert run(*arguments, "--experiments_dir", tmp_path / "whole").returncode == 0

    process = subprocess.Popen(
        command(*arguments, "--experiments_dir", tmp_path / "stopped"), cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip
    for line in process.stderr:
        if "step 1 of 2" in line:  # logged before the evaluation
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 143, errors
    assert "the evaluation at step 1 was stopped" in errors and "Traceback" not in errors
    folder = tmp_path / "stopped" / "run"
    assert config_of(folder)["status"] == "interrupted"
    assert [row["eval_loss"] for row in log_rows(folder)] == [""]

    result = run("--resume", folder)
    assert result.returncode == 0, result.stderr
    logs = [
        [{k: v for k, v in row.items() if k not in TIMING_COLUMNS} for row in log_rows(tmp_path / name / "run")]
        for name in ("whole", "stopped")
    ]
    assert logs[0] == logs[1]
    final = [tmp_path / n / "run" / "final_model" / "adapter_model.safetensors" for n in ("whole", "stopped")]
    assert final[0].read_bytes() == final[1].read_bytes()


def test_resume_auto_starts_then_continues(rows, tiny_model, tmp_path):
    """Then a key planted in a checkpoint and its manifest, and a run without a checkpoint."""
    arguments = ("--model", tiny_model, "--dataset", rows, "--format", "chatml", "--max_steps", 2, "--save_steps", 1,
                 "--experiments_dir", tmp_path, "--resume", "auto")  # fmt: skip
    refused(run(*arguments), "--resume auto continues the run of --name")
    assert run(*arguments, "--name", "run").returncode == 0
    folder = tmp_path / "run"
    adapter = (folder / "final_model" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoint-2")
    shutil.rmtree(folder / "final_model")
    result = run(*arguments, "--name", "run")
    assert result.returncode == 0, result.stderr
    assert "resumed from step 1" in result.stderr
    assert (folder / "final_model" / "adapter_model.safetensors").read_bytes() == adapter

    newest = folder / "checkpoint-2"
    state = json.loads((newest / "trainer_state.json").read_text())
    (newest / "trainer_state.json").write_text(json.dumps(state | {"planted": 1}))
    write_manifest(newest)
    log = (folder / "training_log.csv").read_bytes()
    result = run("--resume", folder)
    refused(result, "checkpoint-2 cannot be loaded", "planted", f"--resume {folder / 'checkpoint-1'}")
    assert newest.is_dir() and (folder / "training_log.csv").read_bytes() == log

    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    result = run(*arguments, "--name", "run")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run.no_checkpoint_1" / "training_log.csv").read_bytes() == log
    assert (folder / "final_model" / "adapter_model.safetensors").read_bytes() == adapter


def test_other_processes_start_again_with_the_first(tmp_path, monkeypatch):
    """`torchrun … --resume auto` of a run without a checkpoint: the first process renames its folder at any time."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "experiment_config.json").write_text('{"status": "failed"}')
    settings = parse(["--name", "run", "--experiments_dir", str(tmp_path), "--resume", "auto"])
    assert train_lora.find_stopped_run(settings)[1:] == (None, None)

    def list_checkpoints(folder):
        folder.rename(tmp_path / "renamed")
        return real(folder)

    real = train_lora.list_checkpoints
    monkeypatch.setattr(train_lora, "list_checkpoints", list_checkpoints)
    settings = parse(["--name", "run", "--experiments_dir", str(tmp_path), "--resume", "auto"])
    assert train_lora.find_stopped_run(settings)[1:] == (None, None)
    assert not folder.exists()


def test_diverged_run_with_load_best_resumes(rows, tiny_model, tmp_path):
    """Its weights are not finite any more, and its best ones are kept: as in a run that was never stopped."""
    arguments = ("--model", tiny_model, "--dataset", rows, "--format", "chatml", "--dtype", "float32", "--lr", "1e30",
                 "--warmup_steps", 2, "--max_steps", 4, "--eval_fraction", 0.17, "--eval_steps", 1, "--load_best",
                 "--experiments_dir", tmp_path, "--name", "run")  # fmt: skip
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "run"
    expected = faults.outcome(folder)
    assert [row["eval_loss"] for row in expected[1]][2:] == ["nan", "nan"]
    shutil.rmtree(folder / "final_model")
    shutil.rmtree(folder / "checkpoint-4")
    result = run("--resume", folder)
    assert result.returncode == 0, result.stderr
    assert "resumed from step 3" in result.stderr
    assert faults.outcome(folder) == expected


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_random_kills_change_nothing(rows, tmp_path):
    """The short form of `make faults`."""
    model = faults.write_byte_model(tmp_path / "model")
    flags = faults.flags_of(("float32", "shared", "1", "dropout"))
    found = faults.compare_killed_run(("--model", model, "--dataset", rows, *flags), tmp_path, kills=3, seed=3)
    assert len(found) == 3


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="has no SIGHUP")
def test_sighup_is_ignored_under_nohup(rows, tiny_model, tmp_path):
    words = command("--model", tiny_model, "--dataset", rows, "--format", "chatml", "--batch_size", 1, "--grad_accum",
                    1, "--max_steps", 20, "--name", "run", "--experiments_dir", tmp_path)  # fmt: skip
    process = subprocess.Popen(["nohup", *words], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "training_log.csv"
    deadline = time.monotonic() + 300
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert config_of(tmp_path / "run")["steps"] == 20


def test_sharing_prefixes_keeps_the_loss_curve(rows, tiny_model, tmp_path):
    """Thirty steps with and without sharing are equal within 1e-4 in float32."""
    arguments = ("--model", tiny_model, "--dataset", rows, "--format", "chatml", "--max_steps", 30, "--lr", "5e-3",
                 "--dtype", "float32", "--experiments_dir", tmp_path)  # fmt: skip
    assert run(*arguments, "--name", "shared").returncode == 0
    assert run(*arguments, "--name", "alone", "--no-share_prefix").returncode == 0
    shared, alone = ([float(r["loss"]) for r in log_rows(tmp_path / name)] for name in ("shared", "alone"))
    assert len(shared) == 30
    assert shared == pytest.approx(alone, abs=1e-4)
    assert shared[-1] < 0.97 * shared[0]


def test_early_stopping_loads_the_best_checkpoint(rows, tiny_model, tmp_path):
    result = run(
        "--model", tiny_model, "--dataset", rows, "--eval_dataset", rows, "--format", "chatml", "--lr", "30",
        "--max_steps", 40, "--eval_steps", 2, "--early_stopping_patience", 2, "--scheduler", "constant",
        "--experiments_dir", tmp_path, "--name", "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    logged = log_rows(tmp_path / "run")
    losses = {int(r["step"]): float(r["eval_loss"]) for r in logged if r["eval_loss"]}
    assert max(losses) < 40
    best = min(losses, key=losses.get)
    assert max(losses) - best >= 4
    assert f"stopped early at step {max(losses)} of 40; adapter of step {best}" in result.stderr
    final = (tmp_path / "run" / "final_model" / "adapter_model.safetensors").read_bytes()
    assert final == (tmp_path / "run" / f"checkpoint-{best}" / "adapter_model.safetensors").read_bytes()


def test_resume_after_an_early_stop_only_saves(rows, tiny_model, tmp_path):
    """The last checkpoint is of the step that stopped the run; the best one is found in a moved folder, too."""
    result = run(
        "--model", tiny_model, "--dataset", rows, "--eval_dataset", rows, "--format", "chatml", "--lr", "30",
        "--max_steps", 40, "--eval_steps", 1, "--early_stopping_patience", 1, "--load_best", "--scheduler", "constant",
        "--experiments_dir", tmp_path, "--name", "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    stopped = config_of(tmp_path / "run")["steps"]
    assert stopped < 40
    adapter = (tmp_path / "run" / "final_model" / "adapter_model.safetensors").read_bytes()
    log = (tmp_path / "run" / "training_log.csv").read_bytes()
    shutil.rmtree(tmp_path / "run" / "final_model")
    folder = (tmp_path / "run").rename(tmp_path / "moved")

    result = run("--resume", folder)
    assert result.returncode == 0, result.stderr
    assert config_of(folder)["steps"] == stopped
    assert (folder / "training_log.csv").read_bytes() == log
    assert (folder / "final_model" / "adapter_model.safetensors").read_bytes() == adapter

    kept = json.loads((folder / "experiment_config.json").read_text())["ending"]["adapter_step"]
    best = folder / f"checkpoint-{kept}" / "adapter_model.safetensors"
    best.write_bytes(best.read_bytes()[:-64] + bytes(64))
    result = run("--resume", folder)
    assert result.returncode == 0, result.stderr
    assert f"checkpoint-{kept}, the best so far, cannot be kept: its adapter_model" in result.stderr
    assert f"stopped early at step {stopped} of 40; adapter of step {stopped}" in result.stderr


def test_second_stage_starts_from_an_adapter(rows, tiny_model, tmp_path):
    """Other data and a new schedule; rank, modules and the base in 4 bits are the adapter's; the resume does not need
    the first run."""
    first = ("--model", tiny_model, "--dataset", rows, "--format", "chatml", "--rank", 3, "--target_modules", "q_proj",
             "--load_in_4bit", "--rope_scaling", "linear:2", "--max_steps", 2, "--lr", "1e-2", "--experiments_dir",
             tmp_path)  # fmt: skip
    assert run(*first, "--name", "one").returncode == 0
    other = write_rows(tmp_path / "other.jsonl", [conversation(number) for number in range(20, 26)])
    second = ("--init_adapter", tmp_path / "one", "--dataset", other, "--max_steps", 2, "--save_steps", 1,
              "--experiments_dir", tmp_path)  # fmt: skip
    still = run(*second, "--lr", "1e-30", "--weight_decay", 0, "--name", "still")
    assert still.returncode == 0, still.stderr
    one, two = (tmp_path / name / "final_model" / "adapter_model.safetensors" for name in ("one", "still"))
    assert one.read_bytes() == two.read_bytes()
    flags = config_of(tmp_path / "still")["flags"]
    assert (flags["rank"], flags["alpha"], flags["target_modules"], flags["format"]) == (3, 6, ["q_proj"], "chatml")
    assert config_of(tmp_path / "still")["load_in_4bit"] and flags["rope_scaling"] == "linear:2"
    other_base = run(*second, "--no-load_in_4bit", "--rope_scaling", "linear:4", "--dry_run")
    assert other_base.returncode == 0, other_base.stderr
    said = " ".join(other_base.stderr.split())
    assert "made on a base with --load_in_4bit, not --no-load_in_4bit" in said
    assert "made on a base with --rope_scaling linear:2, not --rope_scaling linear:4" in said

    refused(run(*second, "--rank", 4), "it was made with --rank 3, not 4")
    refused(run(*second[2:], "--init_adapter", tiny_model), "not a run or an adapter")
    (tmp_path / "one").rename(tmp_path / "gone")
    shutil.rmtree(tmp_path / "still" / "final_model")
    shutil.rmtree(tmp_path / "still" / "checkpoint-2")
    result = run("--resume", tmp_path / "still")
    assert result.returncode == 0, result.stderr
    assert two.read_bytes() == (tmp_path / "gone" / "final_model" / "adapter_model.safetensors").read_bytes()


def test_resume_refuses_changed_data_early(tmp_path, rows):
    """The model of this run does not exist, so an error about it would mean that the data was not checked first."""
    own = shutil.copy(rows, tmp_path / "rows.jsonl")
    write_rows(own, [conversation(99)])
    folder = tmp_path / "run"
    make_checkpoint(folder / "checkpoint-1")
    flags = {"model": "nobody/no-such-model", "dataset": [str(own)], "format": "chatml"}
    config = {"flags": flags, "data": {"fingerprint": "of other rows"}, "format": {}, "status": "interrupted"}
    (folder / "experiment_config.json").write_text(json.dumps(config))
    refused(run("--resume", folder), "the data changed since; start a new run")


def make_checkpoint(folder):
    """The files that --resume checks, with almost no content."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "trainer_state.json", "log_counters.json"):
        (folder / name).write_text('{"global_step": 1}' if name == "trainer_state.json" else "{}")
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    write_manifest(folder)


def test_dry_run_prints_the_table_and_writes_nothing(rows, tmp_path):
    result = run(
        "--model", "smollm2-135m", "--dataset", rows, "--format", "chatml", "--dry_run", "--show_mask", 1,
        "--experiments_dir", tmp_path / "experiments",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for wanted in ("rows", "dropped", "trained", "longest row", "steps", "memory", '"name":"get_weather"'):
        assert wanted in result.stdout
    # Suggested flags stay on one line in a pipe, so that they can be copied.
    assert re.search(r"--rank \d+ --max_seq_length \d+ --batch_size \d+ --grad_accum \d+", result.stdout)
    assert not (tmp_path / "experiments").exists()


def test_nan_loss_ends_the_run_and_is_logged(rows, tiny_model, tmp_path):
    """The step is not taken, because all weights and later checkpoints would be nan."""
    result = run(
        "--model", tiny_model, "--dataset", rows, "--format", "chatml", "--lr", "1e30", "--save_steps", 1,
        "--max_steps", 30, "--scheduler", "constant", "--experiments_dir", tmp_path, "--name", "run",
    )  # fmt: skip
    refused(result, "the loss is nan", "--lr")
    assert config_of(tmp_path / "run")["status"] == "failed"
    logged = log_rows(tmp_path / "run")
    assert logged[-1]["loss"] == "nan" and len(logged) < 30
    assert not (tmp_path / "run" / f"checkpoint-{logged[-1]['step']}").exists()
    assert not (tmp_path / "run" / "final_model").exists()


def test_pickled_weights_are_not_loaded(rows, tiny_model, tmp_path):
    import torch

    model = shutil.copytree(tiny_model, tmp_path / "model")
    torch.save(safetensors_torch.load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    result = run("--model", model, "--dataset", rows, "--format", "chatml", "--experiments_dir", tmp_path / "e")
    refused(result, "no weights in safetensors format")
    assert not list((tmp_path / "e").glob("*"))


def test_missing_weights_are_reported(rows, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    result = run(
        "--model", model, "--dataset", rows, "--format", "chatml", "--max_steps", 1, "--experiments_dir", tmp_path / "e"
    )
    assert result.returncode == 0, result.stderr
    assert re.search(r"its files lack model\.layers\.2\..*random numbers", result.stderr)


def row_without_messages():
    return {"tools": "[]", "note": "nothing to say"}


def bad_arguments():
    row = conversation(0)
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"city": '
    return row


BAD_DATA = {
    "a missing file": (None, "rows.jsonl"),
    "not JSON": ("{'a': 1}\n", "row 2"),
    "no messages": (json.dumps(row_without_messages()) + "\n", "row 2"),
    "arguments are not an object": (json.dumps(bad_arguments()) + "\n", "row 2"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_rows_are_refused(case, tmp_path):
    second, wanted = BAD_DATA[case]
    path = tmp_path / "rows.jsonl"
    if second is not None:
        path.write_text(json.dumps(conversation(1)) + "\n" + second, encoding="utf-8")
    refused(
        run("--model", "smollm2-135m", "--dataset", path, "--experiments_dir", tmp_path / "e"), "rows.jsonl", wanted
    )
    assert not list((tmp_path / "e").glob("*"))


def refused(result, *wanted):
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    for text in wanted:
        assert text in errors[0]


def test_data_without_trained_rows_is_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}])
    result = run(
        "--model", "smollm2-135m", "--dataset", path, "--format", "chatml", "--experiments_dir", tmp_path / "e"
    )
    refused(result)
    assert not list((tmp_path / "e").glob("*"))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--model", "nobody/no-such-model"), "nobody/no-such-model"),
        (("--model", "smollm2-135m", "--format", "llama3"), "llama3"),
        (("--model", "smollm2-135m", "--format", "no-such-format"), "no-such-format"),
        (("--model", "smollm2-135m", "--format", "chatml", "--target_modules", "qqq_proj"), "qqq_proj"),
        (("--model", "smollm2-135m", "--format", "chatml", "--target_modules", "mlp"), "mlp has no matrix to adapt"),
        (("--model", "smollm2-135m", "--format", "chatml", "--target_modules", "lm_head"), "only next to an adapter"),
        (("--model", "smollm2-135m", "--target_modules", "all-linear", "lm_head"), "all-linear cannot be combined"),
        (("--model", "smollm2-135m", "--format", "chatml", "--last_layers", "500"), "the model has 30 decoder layers"),
        (("--model", "smollm2-135m", "--format", "chatml", "--rank", "1000000000"), "the widest layer is 1,536"),
        (("--model", "smollm2-135m", "--max_seq_length", "50", "--format", "chatml"), "max_seq_length"),
        (("--model", "smollm2-135m", "--report_to", "trackio"), "trackio"),
        (("--model", "smollm2-135m", "--push_to_hub", "not a repo"), "write OWNER/NAME"),
        (("--model", "smollm2-135m", "--push_to_hub", "me/adapter"), "there is no token; set HF_TOKEN"),
        (("--model", ".", "--push_to_hub", "me/adapter"), "the base model . is a local path"),
        (("--model", "smollm2-135m", "--format", "chatml", "--optim", "adamw_tor"), "did you mean adamw_torch?"),
        (
            ("--model", "smollm2-135m", "--format", "chatml", "--eval_dataset", "empty.jsonl"),
            "no rows left to evaluate on",
        ),
    ],
)
def test_bad_settings_are_refused_without_a_folder(arguments, wanted, rows, tmp_path):
    if wanted == "trackio":
        pytest.importorskip("rich")
        import importlib.util

        if importlib.util.find_spec("trackio"):
            pytest.skip("trackio is installed here")
    (tmp_path / "empty.jsonl").touch()
    nobody = {"HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "no_token")}
    result = run(*arguments, "--dataset", rows, "--experiments_dir", tmp_path / "e", cwd=tmp_path, env=nobody)
    refused(result, wanted)
    assert not list((tmp_path / "e").glob("*"))


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--target_modules", "q_proj", "foo"), "no module called foo; it has down_proj, embed_tokens"),
        (("--last_layers", "3"), "the model has 2 decoder layers"),
        (("--rank", str(10**17)), "--rank 100000000000000000"),
    ],
)
def test_bad_adapter_is_refused_before_loading_weights(arguments, wanted, dry, rows, tiny_model, tmp_path):
    """The weights are not valid, so opening them would give another error."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"no weights")
    flags = ("--model", model, "--dataset", rows, "--format", "chatml", "--experiments_dir", tmp_path / "e")
    refused(run(*flags, *arguments, *["--dry_run"] * dry), wanted)


def test_encoder_is_refused(rows, tiny_model, tmp_path):
    from transformers import BertConfig

    model = shutil.copytree(tiny_model, tmp_path / "model")
    BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(model)
    flags = ("--model", model, "--dataset", rows, "--format", "chatml", "--experiments_dir", tmp_path / "e")
    refused(run(*flags), "model type 'bert' is an encoder")


def test_unwritable_experiments_folder_is_refused(rows, tmp_path):
    (tmp_path / "e").write_text("a file is in the way")
    refused(run("--model", "smollm2-135m", "--dataset", rows, "--experiments_dir", tmp_path / "e"), "--experiments_dir")


def test_tokenizer_without_template_is_refused(rows, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    refused(
        run("--model", model, "--dataset", rows, "--format", "native", "--experiments_dir", tmp_path / "e"), "template"
    )


def test_loraplus_scales_the_learning_rate_of_b(tiny_model, rows, tmp_path):
    """Adam's first step changes each weight that has a gradient by the learning rate. While B is 0, A has none; its
    first gradient comes in the second step, scaled by (1 - b1) / (1 - b1^2) / sqrt((1 - b2) / (1 - b2^2))."""
    result = run(
        "--model", tiny_model, "--dataset", rows, "--format", "chatml", "--max_steps", 2, "--save_steps", 1,
        "--lr", "1e-3", "--loraplus_lr_ratio", 4, "--scheduler", "constant", "--weight_decay", 0, "--max_grad_norm", 0,
        "--experiments_dir", tmp_path, "--name", "plus",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    checkpoints = [tmp_path / "plus" / f"checkpoint-{step}" for step in (1, 2)]
    after = [safetensors_torch.load_file(path / "adapter_model.safetensors") for path in checkpoints]
    largest = {"lora_A": 0.0, "lora_B": 0.0}
    for name, tensor in after[0].items():
        kind = "lora_A" if "lora_A" in name else "lora_B"
        moved = after[1][name] - tensor if kind == "lora_A" else tensor
        largest[kind] = max(largest[kind], moved.abs().max().item())
    second = 0.1 / (1 - 0.9**2) / (0.001 / (1 - 0.999**2)) ** 0.5
    assert largest == {"lora_A": pytest.approx(1e-3 * second, rel=0.02), "lora_B": pytest.approx(4e-3, rel=0.02)}
    assert float(log_rows(tmp_path / "plus")[0]["learning_rate"]) == pytest.approx(1e-3)


def test_second_stage_of_an_exported_adapter_takes_the_bundled_model_by_its_name(tmp_path):
    from finetune.errors import UserError
    from finetune.models.bundled import resolve_model
    from finetune.settings import parse
    from finetune.training.second_stage import with_adapter_flags

    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    config["base_model_name_or_path"] = resolve_model("smollm2-135m")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").touch()
    given = ["--init_adapter", str(tmp_path), "--dataset", "rows.jsonl", "--model"]
    assert with_adapter_flags(parse([*given, "smollm2-135m"])).rank == 2
    with pytest.raises(UserError, match=r"it was made with --model .*smollm2.*, not other"):
        with_adapter_flags(parse([*given, "other"]))
