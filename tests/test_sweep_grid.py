"""Which runs a sweep has, before anything is started."""

import json
import sys
from unittest.mock import MagicMock

import pytest
import yaml

import sweep_lora
from finetune.errors import UserError
from finetune.settings import parse
from finetune.sweep import grid
from finetune.sweep.hub import Hub
from finetune.sweep.runs import SweepRun, data_digests, open_sweep
from finetune.sweep.stopping import Asha


def dry(capsys, *words):
    """(exit code, {run: its settings}, stderr) of a sweep that is only printed."""
    code = sweep_lora.main([*words[: words.index("--")], "--dry_run", *words[words.index("--") :]]
                           if "--" in words else [*words, "--dry_run"])  # fmt: skip
    said = capsys.readouterr()
    runs = {}
    for line in said.out.splitlines():
        name, _, flags = line.partition(": train_lora.py")
        runs[name.rsplit("/", 1)[-1]] = parse(flags.split())
    return code, runs, said


def test_the_grid_of_the_line(capsys):
    code, runs, _ = dry(capsys, "--lr", "1e-4", "2e-4", "--rank", "4", "8", "--", "--model", "m", "--alpha", "5")
    assert code == 0
    assert list(runs) == ["rank4_lr1e-04", "rank4_lr2e-04", "rank8_lr1e-04", "rank8_lr2e-04"]
    assert [(s.rank, s.lr, s.alpha, s.model) for s in runs.values()] == [
        (4, 1e-4, 5, "m"), (4, 2e-4, 5, "m"), (8, 1e-4, 5, "m"), (8, 2e-4, 5, "m"),
    ]  # fmt: skip


def test_every_kind_of_flag(capsys):
    _, runs, _ = dry(
        capsys, "--use_rslora", "on", "off", "--target_modules", "q_proj,v_proj", "all-linear", "--alpha", "default",
        "--load-in-4bit", "default", "off",
    )  # fmt: skip
    assert len(runs) == 8
    assert {s.use_rslora for s in runs.values()} == {True, False}
    assert {tuple(s.target_modules) for s in runs.values()} == {("q_proj", "v_proj"), ("all-linear",)}
    assert {s.load_in_4bit for s in runs.values()} == {None, False}
    assert {s.alpha for s in runs.values()} == {32}


def test_the_recipe_is_dissolved_and_alpha_follows_the_rank(capsys):
    _, runs, _ = dry(capsys, "--rank", "4", "64", "--", "--config", "configs/demo.yaml", "--max_steps", "2")
    assert [(s.rank, s.alpha, s.max_steps, s.model) for s in runs.values()] == [
        (4, 8, 2, "smollm2-135m"), (64, 128, 2, "smollm2-135m"),
    ]  # fmt: skip


def test_seeds_count_up(capsys):
    _, runs, _ = dry(capsys, "--rank", "4", "8", "--seeds", "3", "--", "--seed", "10")
    assert [s.seed for s in runs.values()] == [10, 11, 12] * 2
    assert len(runs) == 6


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--gpus_per_run", "one"], "must be 0, a number >= 0.0001 and <= 1, or an integer, not 'one'"),
        (["--cpus_per_run", "nan"], "must be a number >= 0.0001, or 0, not 'nan'"),
        (["--asha_grace", "ten"], "must be a number > 0 and < 100"),
        (["--asha_reduction", "three"], "must be a number > 1"),
        (["--command", "'open"], "must be a command line"),
        (["--command", " "], "must not be empty"),
    ],
)
def test_what_argparse_says_names_no_function_of_ours(words, wanted, capsys):
    with pytest.raises(SystemExit, match="2"):
        sweep_lora.main(["--rank", "4", *words])
    assert f"argument {words[0]}: {wanted}" in capsys.readouterr().err


def test_names_in_any_script_are_kept(capsys):
    _, runs, _ = dry(capsys, "--dataset", "도구.jsonl", "ä,ö.jsonl", "가" * 100 + ".jsonl")
    long = next(name for name in runs if name.startswith("가"))
    assert list(runs) == ["도구.jsonl", "ä+ö.jsonl", long]
    assert len(long.encode()) <= 80


@pytest.mark.parametrize(
    "words",
    [["--gpus_per_run", "1.5"], ["--gpus_per_run", "-1"], ["--asha_reduction", "inf"], ["--asha_grace", "0"],
     *(["--name", name] for name in ("../elsewhere", "..", "", ".hidden", "two\nlines"))],
)  # fmt: skip
def test_flags_of_the_sweep_are_checked_before_ray_is_started(words, capsys):
    with pytest.raises(SystemExit) as end:
        sweep_lora.main(["--rank", "4", *words])
    assert end.value.code == 2
    assert f"argument {words[0]}" in capsys.readouterr().err


def test_the_scratch_folder_is_named_in_full(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = [sweep_lora.run_options(sweep_lora.build_parser().parse_args(words)).scratch
               for words in ([], ["--scratch", "here"], ["--scratch", "/tmp/there"])]  # fmt: skip
    assert options == [None, str(tmp_path / "here"), "/tmp/there"]


def test_schedules_and_asha_share_a_flag(capsys):
    _, runs, _ = dry(capsys, "--scheduler", "asha", "cosine", "linear")
    assert {s.scheduler for s in runs.values()} == {"cosine", "linear"}


def test_a_flag_that_is_given_twice_has_the_values_of_both(capsys):
    _, runs, _ = dry(capsys, "--rank", "4", "--rank", "8", "16", "--scheduler", "cosine", "--scheduler", "linear")
    assert {(s.rank, s.scheduler) for s in runs.values()} == {
        (rank, schedule) for rank in (4, 8, 16) for schedule in ("cosine", "linear")
    }  # fmt: skip


def write(path, **sections):
    path.write_text(yaml.safe_dump(sections))
    return path


def test_the_file(tmp_path, capsys):
    file = write(
        tmp_path / "s.yaml", train={"model": "m"}, grid={"rank": [4, 8]}, seeds=2,
        runs=[{"lr": "1e-4", "alpha": 16}, {"lr": 2e-4}],
    )  # fmt: skip
    _, runs, _ = dry(capsys, "--sweep", str(file), "--", "--epochs", "1")
    assert len(runs) == 8
    assert {(s.rank, s.lr, s.alpha) for s in runs.values()} == {
        (4, 1e-4, 16), (8, 1e-4, 16), (4, 2e-4, 8), (8, 2e-4, 16),
    }  # fmt: skip
    assert {(s.model, s.epochs) for s in runs.values()} == {("m", 1)}


def test_random_draws_stay_in_their_ranges_and_repeat(tmp_path, capsys):
    ranges = {"lr": {"min": 1e-5, "max": 1e-3, "scale": "log"}, "rank": {"min": 4, "max": 64}, "dropout": [0, 0.1]}
    file = write(tmp_path / "s.yaml", random={"count": 200, "seed": 1, "flags": ranges})
    _, runs, _ = dry(capsys, "--sweep", str(file))
    _, again, _ = dry(capsys, "--sweep", str(file))
    assert list(runs) == list(again)
    values = list(runs.values())
    assert len(values) == 200
    assert all(1e-5 <= s.lr <= 1e-3 and 4 <= s.rank <= 64 and s.dropout in (0, 0.1) for s in values)
    # Half of a log range lies below its geometric middle, and whole numbers reach both ends' neighbourhoods.
    assert 60 < sum(s.lr < 1e-4 for s in values) < 140
    assert min(s.rank for s in values) < 10
    assert max(s.rank for s in values) > 58
    other = write(tmp_path / "t.yaml", random={"count": 200, "seed": 2, "flags": ranges})
    assert list(dry(capsys, "--sweep", str(other))[1]) != list(runs)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--rank", "4", "x"], "--rank"),
        (["--rank", "0"], "--rank"),
        (["--use_rslora", "maybe"], "use_rslora"),
        (["--overlong", "drop", "keep"], "overlong"),
        (["--rank", "4", "--", "--name", "a"], "--name"),
        (["--rank", "4", "--config", "configs/demo.yaml"], "'--config' is not a flag of the sweep"),
        (["configs/demo.yaml", "--rank", "4"], "'configs/demo.yaml' is not a flag of the sweep"),
        (["--rank", "4", "--", "--resume", "a"], "--resume"),
        (["--rank", "4", "--", "--experiments_dir", "a"], "--experiments_dir"),
        (["--rank", "4", "--", "--config", "no-such.yaml"], "no-such.yaml"),
        (["--load_best", "on", "off"], "load_best"),  # a run that contradicts itself, before any is started
        (["--seed", "1", "2", "--seeds", "2"], "--seeds"),
        (["--target_modules", "q_proj,,v_proj"], "--target_modules"),
        (["--target_modules", ""], "--target_modules"),
        (["--rank", "4", "8", "--", "--rank", "16"], "--rank after the --"),
        (["--rank", "4", "--scheduler", "asha", "--asha_reduction", "1.000001"], "2,302,587 rungs"),
        (["--rank", "4", "--scheduler", "asha", "--asha_grace", "5e-324"], "--asha_grace"),
        (["--rank", "4", "8", "--", "--push_to_hub", "me/adapter"], "--push_to_hub"),
        (["--dataset", "\udcff.jsonl"], "dataset must be UTF-8 text"),
        (["--seeds", "2", "--", "--seed", "4294967295"], "--seeds: seed must be an integer >= 0 and < 2**32"),
        (["--rank", *map(str, range(1, 201)), "--seed", *map(str, range(100))], "20,000"),
    ],
)
def test_what_is_refused(words, wanted, capsys):
    code, runs, said = dry(capsys, *words)
    assert code == 2
    assert not runs
    assert wanted in said.err
    assert len(said.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"grids": {}}, "grids"),
        ({"grid": {"rnak": [1]}}, "rank"),
        ({"grid": {"rank": 4}}, "list"),
        ({"grid": {"name": ["a"]}}, "--name"),
        ({"runs": {"rank": 4}}, "list"),
        ({"seeds": 0}, "seeds"),
        ({"random": {"flags": {"lr": [1]}}}, "count"),
        ({"random": {"count": 2, "flags": {"lr": {"min": 1}}}}, "max"),
        ({"random": {"count": 2, "flags": {"lr": {"min": 2, "max": 1}}}}, "min"),
        ({"random": {"count": 2, "flags": {"weight_decay": {"min": 0, "max": 1, "scale": "log"}}}}, "log"),
        ({"random": {"count": 2, "flags": {"optim": {"min": "a", "max": "b"}}}}, "list of values"),
        ({"random": {"count": 2, "flags": {"lr": {"min": None, "max": 1}}}}, "numbers"),
        ({"random": {"count": 2}}, "flags"),
        ({"random": {"count": 2, "flags": {}}}, "no flag"),
        ({"random": {"count": True, "flags": {"rank": [1]}}}, "count"),
        ({"random": {"count": 10**12, "flags": {"rank": [1]}}}, "count"),
        ({"random": {"count": 2, "seed": "x", "flags": {"rank": [1]}}}, "seed"),
        ({"grid": {"target_modules": [[]]}}, "target_modules"),
        ({"grid": []}, "mapping"),
        ({"runs": 0}, "list"),
        ({"train": {"show_mask": 2}}, "not for a run of a sweep"),
        ({"grid": {"show_mask": [1, 2]}}, "not for a run of a sweep"),
    ],
)
def test_what_is_refused_in_a_file(sections, wanted, tmp_path, capsys):
    code, _, said = dry(capsys, "--sweep", str(write(tmp_path / "s.yaml", **sections)))
    assert code == 2
    assert "s.yaml" in said.err
    assert wanted in said.err


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("grid: {rank: [4], rank: [8]}", "duplicate key 'rank'"),
        ("grid: {rank: [4]}\ngrid: {lr: [1e-4]}", "duplicate key 'grid'"),
        ("grid: {lr: [2020-99-99]}", "not valid YAML"),
        ("grid: " + "[" * 3000, "not valid YAML"),
    ],
)
def test_a_file_that_is_no_sweep(text, wanted, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(text)
    code, runs, said = dry(capsys, "--sweep", str(tmp_path / "s.yaml"))
    assert (code, runs) == (2, {})
    assert wanted in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("words", [["--address", ""], ["--gpus_per_run", "1e-5"], ["--cpus_per_run", "1e-5"]])
def test_what_ray_would_refuse_is_refused_before_it_is_started(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        sweep_lora.main([*words, "--dry_run"])
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


def test_the_same_runs_have_the_same_folder_however_they_are_written(tmp_path, capsys):
    file = write(tmp_path / "s.yaml", grid={"lr": [1e-4, 2e-4], "rank": [8, 4]})
    sweep_lora.main(["--sweep", str(file), "--dry_run"])
    one = capsys.readouterr().out.splitlines()
    sweep_lora.main(["--rank", "4", "8", "--lr", "2e-4", "1e-4", "--dry_run"])
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(one)


def test_a_run_keeps_its_folder_whatever_the_order_of_values_with_one_name():
    """Else the same sweep, written down the other way round, takes the one's finished run for the other's."""
    for name, values in (("dataset", [["a/rows.jsonl"], ["b/rows.jsonl"]]), ("lr", [1.2342e-4, 1.2341e-4])):
        one, other = (
            {point.name: point.flags for point in grid.make_points({}, {name: some})} for some in (values, values[::-1])
        )
        assert one == other
        assert len(one) == 2
    listed = [{"rank": 16, "lr": 1e-4}, {"lr": 1e-4}, {"lr": 2e-4}]
    one, other = (
        {point.name: point.flags for point in grid.make_points({"rank": 16}, {}, runs=some)}
        for some in (listed, listed[::-1])
    )
    assert one == other
    assert set(one) == {"lr1e-04", "lr2e-04"}


def test_no_run_takes_the_name_of_the_sweep_s_own_files():
    names = [point.name for point in grid.make_points({}, {"model": ["me/logs", "me/sweep.json", "me/other"]})]
    assert names == ["logs_2", "sweep.json_2", "other"]


def test_one_flag_varies_in_one_place(tmp_path, capsys):
    ranges = {"count": 3, "flags": {"rank": {"min": 1, "max": 9}}}
    for sections in (
        {"runs": [{"rank": 8}, {"lr": 1e-4}], "grid": {"rank": [4]}},
        {"random": ranges, "grid": {"rank": [4]}},
        {"random": ranges, "runs": [{"rank": 2}]},
    ):
        code, _, said = dry(capsys, "--sweep", str(write(tmp_path / "s.yaml", **sections)))
        assert code == 2
        assert "rank varies in two places" in said.err
    code, _, said = dry(capsys, "--sweep", str(write(tmp_path / "s.yaml", random=ranges)), "--", "--rank", "4")
    assert code == 2
    assert "--rank after the --" in said.err


def test_draws_reach_both_ends_alike_and_no_further():
    spec = {"count": 3000, "seed": 0, "flags": {
        "rank": {"min": 1, "max": 3}, "dropout": {"min": 0.99961, "max": 0.99964},
        "lr": {"min": 1.0049e-4, "max": 1.005e-4},
    }}  # fmt: skip
    drawn = grid.draw(spec)
    counts = [sum(one["rank"] == rank for one in drawn) for rank in (1, 2, 3)]
    assert all(900 < count < 1100 for count in counts)
    assert all(0.99961 <= one["dropout"] <= 0.99964 and 1.0049e-4 <= one["lr"] <= 1.005e-4 for one in drawn)


def points(*ranks, **fixed):
    return grid.make_points(fixed, {"rank": list(ranks)})


def opened(folder, some, identity="a"):
    return open_sweep(folder, some, identity=identity, argv=["--rank"], settings={})


def test_two_sweeps_at_once_do_not_share_a_folder(tmp_path):
    first = opened(tmp_path / "s", points(4, 8))
    with pytest.raises(UserError, match="another process"):
        opened(tmp_path / "s", points(4, 8))
    first.close()
    opened(tmp_path / "s", points(4, 8)).close()
    with pytest.raises(UserError, match="another sweep"):
        opened(tmp_path / "s", points(4, 16), identity="b")


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    """A finished rank4 of another origin would count as this sweep's."""
    run = tmp_path / "s" / "rank4"
    run.mkdir(parents=True)
    (run / "experiment_config.json").write_text(json.dumps({"status": "finished", "flags": {"rank": 4}}))
    with pytest.raises(UserError, match="holds other files"):
        opened(tmp_path / "s", points(4, 8))
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["rank4"]
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "logs").touch()  # somebody's file
    with pytest.raises(UserError, match="holds other files"):
        opened(tmp_path / "f", points(4, 8))
    (tmp_path / "t" / "logs").mkdir(parents=True)  # what a sweep leaves that was killed before it wrote anything
    (tmp_path / "t" / ".lock").touch()
    opened(tmp_path / "t", points(4, 8)).close()


@pytest.mark.parametrize(("error", "code"), [(UserError("no Ray"), 2), (KeyboardInterrupt(), 130)])
def test_a_sweep_that_is_broken_off_does_not_say_that_it_is_running(tmp_path, monkeypatch, capsys, error, code):
    def broken_off(sweep, *rest):
        sweep.runs[0].status = "running"
        raise error

    monkeypatch.setattr(sweep_lora, "run_all", broken_off)
    assert sweep_lora.main(["--experiments_dir", str(tmp_path), "--name", "s", "--rank", "4", "8"]) == code
    kept = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert kept["status"] == "interrupted"
    assert [run["status"] for run in kept["runs"]] == ["interrupted", "waiting"]
    opened(tmp_path / "s", points(4, 8), identity=kept["id"]).close()


def test_without_ray_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sweep_lora, "run_all", lambda *rest: pytest.fail("it was to be refused before"))
    assert sweep_lora.main(["--experiments_dir", str(tmp_path / "e"), "--rank", "4", "8"]) == 2
    assert "pip install ray==" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_a_sweep_that_is_refused_before_its_first_try_leaves_no_folder(tmp_path, monkeypatch, capsys):
    """Nobody listens at this address; the lock, sweep.json, logs and sweep.log are there by then."""
    pytest.importorskip("ray")
    words = ["--experiments_dir", str(tmp_path), "--name", "s", "--rank", "4", "8"]
    assert sweep_lora.main([*words, "--address", "127.0.0.1:1"]) == 2
    assert "--address" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    # One that has been started before stays.
    with monkeypatch.context() as patch:
        patch.setattr(sweep_lora, "run_all", MagicMock(side_effect=KeyboardInterrupt))
        assert sweep_lora.main(words) == 130
    assert sweep_lora.main([*words, "--address", "127.0.0.1:1"]) == 2
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["status"] == "interrupted"


def test_a_sweep_in_a_folder_without_locks(tmp_path, monkeypatch):
    def acquire(self, **rest):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    opened(tmp_path / "s", points(4, 8)).close()
    opened(tmp_path / "s", points(4, 8)).close()


@pytest.mark.parametrize(
    "edit",
    [
        lambda kept: kept.pop("data"),
        lambda kept: kept.pop("started"),
        lambda kept: kept.pop("runs"),
        lambda kept: kept.update(argv=3, id="another"),
        lambda kept: kept["runs"].append(5),
        lambda kept: kept["runs"][0].update(attempts=5),
        lambda kept: kept["runs"][0].update(attempts=[5]),
        lambda kept: kept["runs"][0].update(attempts=[{"outcome": "failed", "step": "x", "lines": []}]),
        lambda kept: kept["runs"][0].update(attempts=[{"outcome": "failed", "step": 1, "lines": 5}]),
    ],
)
def test_a_sweep_json_that_somebody_has_edited(tmp_path, edit):
    opened(tmp_path / "s", points(4, 8)).close()
    path = tmp_path / "s" / "sweep.json"
    kept = json.loads(path.read_text())
    edit(kept)
    path.write_text(json.dumps(kept))
    with pytest.raises(UserError, match="cannot read"):
        opened(tmp_path / "s", points(4, 8))


def test_a_run_whose_folder_somebody_has_removed_is_made_again(tmp_path):
    sweep = opened(tmp_path / "s", points(4, 8, 16))
    for run, status in zip(sweep.runs, ("finished", "stopped early", "finished"), strict=True):
        run.status = status
        sweep.run_folder(run).mkdir()
    sweep.save()
    sweep.close()
    sweep.run_folder(sweep.runs[0]).rmdir()
    again = opened(tmp_path / "s", points(4, 8, 16))
    assert [run.status for run in again.runs] == ["waiting", "stopped early", "finished"]
    again.close()


def test_changed_data_stop_a_sweep_that_goes_on(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    some = points(4, 8, dataset=[f"{data}*0.5"])
    assert list(data_digests(some)) == [str(data)]
    opened(tmp_path / "s", some).close()
    data.write_text("{}\n{}\n")
    with pytest.raises(UserError, match="has changed since"):
        opened(tmp_path / "s", some)


def test_a_finished_run_counts_even_if_the_sweep_could_not_write_it_down(tmp_path):
    sweep = opened(tmp_path / "s", points(4, 8))
    sweep.close()
    run = sweep.run_folder(sweep.runs[0])
    run.mkdir()
    (run / "experiment_config.json").write_text(json.dumps({"status": "finished"}))
    again = opened(tmp_path / "s", points(4, 8))
    assert [run.status for run in again.runs] == ["finished", "waiting"]
    again.close()


def test_retries_count_only_what_gets_no_further():
    run = SweepRun(points(4)[0])
    gets_on = [run.ended({"outcome": "lost", "step": step}, retries=1) for step in (10, 20, 30)]
    assert gets_on == [True, True, True]
    assert run.ended({"outcome": "lost", "step": 30}, retries=1) is False
    assert run.status == "failed"


def test_asha_lets_the_best_go_on(tmp_path):
    pytest.importorskip("ray")
    asha = Asha(tmp_path, metric="loss", grace=10, reduction=2)
    losses = {"a": 1.0, "b": 2.0, "c": 0.5, "d": float("nan")}
    stopped = [run for run, loss in losses.items() if asha.result(run, 10.0, {"step": 1, "loss": loss})]
    assert stopped == ["b", "d"]
    assert not asha.result("a", 11.0, {"step": 2, "loss": 9.0}), "between two rungs nobody is stopped"
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [(one["run"], one["decision"]) for one in decisions] == [
        ("a", "go on"), ("b", "stop"), ("c", "go on"), ("d", "stop"),
    ]  # fmt: skip
    # A sweep that goes on knows what was reached before, and writes it down no second time.
    again = Asha(tmp_path, metric="loss", grace=10, reduction=2)
    for run in ("a", "c"):
        again.result(run, 10.0, {"step": 1, "loss": losses[run]}, replay=True)
    assert again.result("e", 10.0, {"step": 1, "loss": 2.0})
    assert len((tmp_path / "decisions.jsonl").read_text().splitlines()) == 5


def test_the_hub_writes_nowhere_else(tmp_path):
    (tmp_path / "s").mkdir()
    hub = Hub(str(tmp_path / "s"), {})
    hub.write("run/file", 0, b"ab", False)
    assert not (tmp_path / "s" / "run" / "file").exists()
    hub.write("run/file", 2, b"c", True)
    assert (tmp_path / "s" / "run" / "file").read_bytes() == b"abc"
    for name in ("../outside", str(tmp_path / "outside"), "run/../../outside"):
        with pytest.raises(ValueError, match="outside"):
            hub.write(name, 0, b"x", True)
    assert not (tmp_path / "outside").exists()
