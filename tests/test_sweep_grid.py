"""Which runs a sweep has, and its folder, before anything is started."""

import json
import sys
from unittest.mock import MagicMock

import pytest
import yaml

import sweep_lora
from finetune.errors import UserError
from finetune.settings import parse
from finetune.sweep import grid
from finetune.sweep.coordinator import Coordinator
from finetune.sweep.runs import SweepRun, data_digests, open_sweep
from finetune.sweep.stopping import Asha


def dry(capsys, *argv):
    """(exit code, {run: its settings}, stderr) of a sweep that is only printed."""
    code = sweep_lora.main([*argv[: argv.index("--")], "--dry_run", *argv[argv.index("--") :]]
                           if "--" in argv else [*argv, "--dry_run"])  # fmt: skip
    said = capsys.readouterr()
    runs = {}
    for line in said.out.splitlines():
        name, _, flags = line.partition(": train_lora.py")
        runs[name.rsplit("/", 1)[-1]] = parse(flags.split())
    return code, runs, said


def test_grid_of_the_command_line(capsys):
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


def test_recipe_with_alpha_following_the_rank(capsys):
    _, runs, _ = dry(capsys, "--rank", "4", "64", "--", "--config", "configs/demo.yaml", "--max_steps", "2")
    assert [(s.rank, s.alpha, s.max_steps, s.model) for s in runs.values()] == [
        (4, 8, 2, "smollm2-135m"), (64, 128, 2, "smollm2-135m"),
    ]  # fmt: skip


def test_random_fractions_are_not_rounded():
    """Of a flag that takes numbers below 1, as warmup_ratio in docs/sweeps.md."""
    drawn = grid.draw({"count": 20, "seed": 0, "flags": {"warmup_ratio": {"min": 0.0, "max": 0.1}}})
    values = {one["warmup_ratio"] for one in drawn}
    assert len(values) > 10
    assert 0 <= min(values) < max(values) <= 0.1


def test_seeds_count_up(capsys):
    _, runs, _ = dry(capsys, "--rank", "4", "8", "--seeds", "3", "--", "--seed", "10")
    assert [s.seed for s in runs.values()] == [10, 11, 12] * 2
    assert len(runs) == 6


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--gpus_per_run", "one"], "must be 0, a number >= 0.0001 and <= 1, or an integer, not 'one'"),
        (["--cpus_per_run", "nan"], "must be a number >= 0.0001, or 0, not 'nan'"),
        (["--asha_grace", "ten"], "must be a number > 0 and < 100"),
        (["--asha_reduction", "three"], "must be a number > 1"),
        (["--command", "'open"], "must be a command line"),
        (["--command", " "], "must not be empty"),
    ],
)
def test_argparse_errors_name_the_kind_of_value(argv, wanted, capsys):
    with pytest.raises(SystemExit, match="2"):
        sweep_lora.main(["--rank", "4", *argv])
    assert f"argument {argv[0]}: {wanted}" in capsys.readouterr().err


def test_run_names_keep_unicode(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
    for name in ("도구.jsonl", "ä", "ö.jsonl", "가" * 80 + ".jsonl"):  # a sweep looks for its data sets
        (tmp_path / name).write_text(json.dumps(row) + "\n", encoding="utf-8")
    _, runs, _ = dry(capsys, "--dataset", "도구.jsonl", "ä,ö.jsonl", "가" * 80 + ".jsonl")
    long = next(name for name in runs if name.startswith("가"))
    assert list(runs) == ["도구.jsonl", "ä+ö.jsonl", long]
    assert len(long.encode()) <= 80


@pytest.mark.parametrize(
    "argv",
    [
        ["--gpus_per_run", "1.5"], ["--gpus_per_run", "-1"], ["--gpus_per_run", "1e-5"], ["--cpus_per_run", "1e-5"],
        ["--asha_reduction", "inf"], ["--asha_grace", "0"], ["--address", ""],
    ],
)  # fmt: skip
def test_sweep_flags_are_checked_before_ray_starts(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        sweep_lora.main(["--rank", "4", *argv])
    assert f"argument {argv[0]}" in capsys.readouterr().err.splitlines()[-1]


def test_scratch_folder_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    options = [sweep_lora.run_options(sweep_lora.build_parser().parse_args(argv)).scratch
               for argv in ([], ["--scratch", "here"], ["--scratch", "/tmp/there"])]  # fmt: skip
    assert options == [None, str(tmp_path / "here"), "/tmp/there"]


def test_scheduler_flag_takes_asha_and_schedules(capsys):
    _, runs, _ = dry(capsys, "--scheduler", "asha", "cosine", "linear")
    assert {s.scheduler for s in runs.values()} == {"cosine", "linear"}


def test_repeated_flag_collects_all_values(capsys):
    _, runs, _ = dry(capsys, "--rank", "4", "--rank", "8", "16", "--scheduler", "cosine", "--scheduler", "linear")
    assert {(s.rank, s.scheduler) for s in runs.values()} == {
        (rank, schedule) for rank in (4, 8, 16) for schedule in ("cosine", "linear")
    }  # fmt: skip


def write(path, **sections):
    path.write_text(yaml.safe_dump(sections))
    return path


def test_yaml_file(tmp_path, capsys):
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


def test_random_draws_are_in_range_and_repeatable(tmp_path, capsys):
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
    ("argv", "wanted"),
    [
        (["--rank", "4", "x"], "--rank"),
        (["--use_rslora", "maybe"], "use_rslora"),
        (["--rank", "4", "--", "--name", "a"], "--name"),
        (["--rank", "4", "--config", "configs/demo.yaml"], "'--config' is not a flag of the sweep"),
        (["configs/demo.yaml", "--rank", "4"], "'configs/demo.yaml' is not a flag of the sweep"),
        (["--rank", "4", "--", "--resume", "a"], "--resume"),
        (["--rank", "4", "--", "--config", "no-such.yaml"], "no-such.yaml"),
        (["--load_best", "on", "off"], "load_best"),  # a run that contradicts itself, before any is started
        (["--seed", "1", "2", "--seeds", "2"], "--seeds"),
        (["--target_modules", "q_proj,,v_proj"], "--target_modules"),
        (["--rank", "4", "8", "--", "--rank", "16"], "--rank after the --"),
        (["--rank", "4", "--scheduler", "asha", "--asha_reduction", "1.000001"], "2,302,587 rungs"),
        (["--rank", "4", "--scheduler", "asha", "--asha_grace", "5e-324"], "--asha_grace"),
        (["--rank", "4", "8", "--", "--push_to_hub", "me/adapter"], "--push_to_hub"),
        (["--dataset", "\udcff.jsonl"], "dataset must be UTF-8 text"),
        (["--seeds", "2", "--", "--seed", "4294967295"], "--seeds: seed must be an integer >= 0 and < 2**32"),
        (["--rank", *map(str, range(1, 201)), "--seed", *map(str, range(100))], "20,000"),
    ],
)
def test_refused_arguments(argv, wanted, capsys):
    code, runs, said = dry(capsys, *argv)
    assert code == 2
    assert not runs
    assert wanted in said.err
    assert len(said.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"grids": {}}, "'grids' was unexpected"),
        ({"grid": {"rnak": [1]}}, "grid: unknown flag 'rnak'; did you mean rank?"),
        ({"grid": {"rank": 4}}, "grid, rank: 4 is not of type 'array'"),
        ({"grid": {"rank": []}}, "grid, rank: [] should be non-empty"),
        ({"grid": {"target_modules": [[]]}}, "grid: target_modules"),
        ({"grid": {"name": ["a"]}}, "use --name before the --"),
        ({"grid": {"show_mask": [1, 2]}}, "not for a run of a sweep"),
        ({"train": {"show_mask": 2}}, "not for a run of a sweep"),
        ({"runs": {"rank": 4}}, "runs: {'rank': 4} is not of type 'array'"),
        ({"runs": [{"rank": 0}]}, "runs, entry 1: rank"),
        ({"seeds": 0}, "seeds: 0 is less than the minimum of 1"),
        ({"random": {"flags": {"lr": [1]}}}, "random: 'count' is a required property"),
        ({"random": {"count": True, "flags": {"rank": [1]}}}, "random, count: True is not of type 'integer'"),
        ({"random": {"count": 10**12, "flags": {"rank": [1]}}}, "random, count: 1000000000000 is greater than"),
        ({"random": {"count": 2, "flags": {}}}, "random, flags: {} should be non-empty"),
        ({"random": {"count": 2, "flags": {"lr": {"min": 1}}}}, "random, flags, lr: 'max' is a required property"),
        ({"random": {"count": 2, "flags": {"lr": {"min": 2, "max": 1}}}}, "random, lr: min must be <= max"),
        ({"random": {"count": 2, "flags": {"dropout": {"min": 0, "max": 0.5, "scale": "log"}}}}, "on a log scale"),
        ({"random": {"count": 2, "flags": {"optim": {"min": "a", "max": "b"}}}}, "give a list of values"),
        ({"random": {"count": 2, "flags": {"lr": {"min": None, "max": 1}}}}, "random, lr: a range needs"),
    ],
)
def test_refused_yaml_sections(sections, wanted, tmp_path, capsys):
    code, _, said = dry(capsys, "--sweep", str(write(tmp_path / "s.yaml", **sections)))
    assert code == 2
    assert said.err.startswith(f"error: sweep {tmp_path / 's.yaml'}")
    assert wanted in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("grid: {rank: [4], rank: [8]}", "duplicate key 'rank'"),
        ("grid: {rank: [4]}\ngrid: {lr: [1e-4]}", "duplicate key 'grid'"),
        ("grid: {lr: [2020-99-99]}", "not valid YAML"),
        ("grid: " + "[" * 3000, "not valid YAML"),
    ],
)
def test_refused_yaml_files(text, wanted, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(text)
    code, runs, said = dry(capsys, "--sweep", str(tmp_path / "s.yaml"))
    assert (code, runs) == (2, {})
    assert wanted in said.err
    assert len(said.err.splitlines()) == 1


def test_folder_is_the_same_for_the_same_runs(tmp_path, capsys):
    file = write(tmp_path / "s.yaml", grid={"lr": [1e-4, 2e-4], "rank": [8, 4]})
    sweep_lora.main(["--sweep", str(file), "--dry_run"])
    one = capsys.readouterr().out.splitlines()
    sweep_lora.main(["--rank", "4", "8", "--lr", "2e-4", "1e-4", "--dry_run"])
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(one)


def test_run_folders_do_not_depend_on_the_order():
    """Otherwise the same sweep in another order would take the finished run of one value for that of another."""
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


def test_run_names_avoid_the_sweeps_own_files():
    names = [point.name for point in grid.make_points({}, {"model": ["me/logs", "me/sweep.json", "me/other"]})]
    assert names == ["logs_2", "sweep.json_2", "other"]


def test_flag_varying_in_two_sections(tmp_path, capsys):
    ranges = {"count": 3, "flags": {"rank": {"min": 1, "max": 9}}}
    for sections in (
        {"runs": [{"rank": 8}, {"lr": 1e-4}], "grid": {"rank": [4]}},
        {"random": ranges, "grid": {"rank": [4]}},
        {"random": ranges, "runs": [{"rank": 2}]},
    ):
        code, _, said = dry(capsys, "--sweep", str(write(tmp_path / "s.yaml", **sections)))
        assert code == 2
        assert "rank varies in two sections" in said.err
    code, _, said = dry(capsys, "--sweep", str(write(tmp_path / "s.yaml", random=ranges)), "--", "--rank", "4")
    assert code == 2
    assert "--rank after the --" in said.err


def test_draws_reach_both_ends_equally():
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


def test_folder_belongs_to_one_sweep(tmp_path):
    first = opened(tmp_path / "s", points(4, 8))
    with pytest.raises(UserError, match="another process"):
        opened(tmp_path / "s", points(4, 8))
    first.close()
    opened(tmp_path / "s", points(4, 8)).close()
    with pytest.raises(UserError, match="another sweep"):
        opened(tmp_path / "s", points(4, 16), identity="b")


def test_dry_run_of_a_hostile_file_prints_no_escapes(tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text('grid: {rank: [4]}\ntrain: {dataset: ["\\e]52;c;cm0gLXJmIH4=\\a.jsonl"]}\n')
    assert sweep_lora.main(["--sweep", str(path), "--dry_run"]) == 2  # there is no such file
    shown = "".join(capsys.readouterr())
    assert "52;c" in shown and not set(shown) & {"\x1b", "\x07"}


def test_finished_sweep_grows_by_new_values(tmp_path):
    """Also by values of a second flag: the runs of the first sweep had its default, and keep their names."""
    first = opened(tmp_path / "s", points(4, 8))
    for run in first.runs:
        (tmp_path / "s" / run.name).mkdir()
        run.status = "finished"
    first.save()
    first.close()
    rate = parse([]).lr
    grown = grid.make_points({}, {"rank": [4, 8, 16], "lr": [rate, 1e-3]})
    for again in range(2):
        sweep = opened(tmp_path / "s", grown, identity="grown")
        sweep.close()
        kept = [run for run in sweep.runs if run.point.flags["lr"] == rate]
        assert [run.name for run in kept] == ["rank4", "rank8", "rank16_lr2e-04"], again
        assert [run.status for run in sweep.runs].count("finished") == 2
        assert [run.status for run in kept[:2]] == ["finished"] * 2
    with pytest.raises(UserError, match="repeat all its values beside the new ones"):
        opened(tmp_path / "s", points(4, 32), identity="other")
    grown_by_asha = {"command": [], "asha": True}
    with pytest.raises(UserError, match="another sweep"):
        open_sweep(tmp_path / "s", grown, identity="asha", argv=[], settings=grown_by_asha)


def test_folder_with_other_files_is_refused(tmp_path):
    """A finished rank4 that something else has put there would count as this sweep's."""
    run = tmp_path / "s" / "rank4"
    run.mkdir(parents=True)
    (run / "experiment_config.json").write_text(json.dumps({"status": "finished", "flags": {"rank": 4}}))
    with pytest.raises(UserError, match="holds other files"):
        opened(tmp_path / "s", points(4, 8))
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["rank4"]
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "logs").touch()  # a file, not the sweep's folder
    with pytest.raises(UserError, match="holds other files"):
        opened(tmp_path / "f", points(4, 8))
    (tmp_path / "t" / "logs").mkdir(parents=True)  # left by a sweep that was killed before it wrote anything
    (tmp_path / "t" / ".lock").touch()
    opened(tmp_path / "t", points(4, 8)).close()


@pytest.mark.parametrize(("error", "code"), [(UserError("no Ray"), 2), (KeyboardInterrupt(), 130)])
def test_aborted_sweep_is_not_left_running(tmp_path, monkeypatch, capsys, error, code):
    def broken_off(sweep, *rest):
        sweep.runs[0].status = "running"
        raise error

    monkeypatch.setattr(sweep_lora, "run_all", broken_off)
    assert sweep_lora.main(["--experiments_dir", str(tmp_path), "--name", "s", "--rank", "4", "8"]) == code
    kept = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert kept["status"] == "interrupted"
    assert [run["status"] for run in kept["runs"]] == ["interrupted", "waiting"]
    opened(tmp_path / "s", points(4, 8), identity=kept["id"]).close()


def test_nothing_is_written_without_ray(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(sweep_lora, "run_all", lambda *rest: pytest.fail("it was to be refused before"))
    assert sweep_lora.main(["--experiments_dir", str(tmp_path / "e"), "--rank", "4", "8"]) == 2
    assert "pip install ray==" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()


def test_refused_sweep_leaves_no_folder(tmp_path, monkeypatch, capsys):
    """Nothing listens at this address; the lock, sweep.json, logs and sweep.log exist by then."""
    pytest.importorskip("ray")
    argv = ["--experiments_dir", str(tmp_path), "--name", "s", "--rank", "4", "8"]
    assert sweep_lora.main([*argv, "--address", "127.0.0.1:1"]) == 2
    assert "--address" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    # The folder of a sweep that was started before stays.
    with monkeypatch.context() as patch:
        patch.setattr(sweep_lora, "run_all", MagicMock(side_effect=KeyboardInterrupt))
        assert sweep_lora.main(argv) == 130
    assert sweep_lora.main([*argv, "--address", "127.0.0.1:1"]) == 2
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["status"] == "interrupted"


def test_folder_without_locks(tmp_path, monkeypatch):
    def acquire(self, **rest):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", acquire)
    first = opened(tmp_path / "s", points(4, 8))
    first.runs[0].status = "finished"
    first.run_folder(first.runs[0]).mkdir()
    first.save()
    second = opened(tmp_path / "s", points(4, 8))  # not refused, though the first is still open
    assert (first.lock, second.lock) == (None, None)
    assert [run.status for run in second.runs] == ["finished", "waiting"]
    for sweep in (first, second):
        sweep.close()


@pytest.mark.parametrize(
    "edit",
    [
        lambda kept: kept.pop("data"),
        lambda kept: kept.pop("runs"),
        lambda kept: kept["runs"].append(5),
        lambda kept: kept["runs"][0].update(attempts=[5]),
        lambda kept: kept["runs"][0].update(attempts=[{"outcome": "failed", "step": "x", "lines": []}]),
        lambda kept: kept["runs"][0].update(attempts=[{"outcome": "failed", "step": 1}]),
        lambda kept: kept["runs"][0].update(name="../elsewhere"),
        lambda kept: kept["runs"][0].update(name="/tmp/elsewhere"),
        lambda kept: kept["runs"][0].update(name=".."),
        lambda kept: kept["runs"][0].update(name="a\\b"),
        lambda kept: kept["runs"][0].update(name=5),
    ],
)
def test_damaged_sweep_json_is_refused(tmp_path, edit):
    opened(tmp_path / "s", points(4, 8)).close()
    path = tmp_path / "s" / "sweep.json"
    kept = json.loads(path.read_text())
    edit(kept)
    path.write_text(json.dumps(kept))
    with pytest.raises(UserError, match="cannot read"):
        opened(tmp_path / "s", points(4, 8))


@pytest.mark.parametrize("name", ["sweep.json", "summary.csv", "logs", ".lock"])
def test_link_out_of_a_sweep_is_refused(name, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "s" / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="is a link to"):
        opened(tmp_path / "s", points(4, 8))
    assert (tmp_path / "outside").read_text() == "mine"


def test_run_with_a_deleted_folder_runs_again(tmp_path):
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


def test_changed_data_are_refused(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    some = points(4, 8, dataset=[f"{data}*0.5"])
    assert list(data_digests(some)) == [str(data)]
    opened(tmp_path / "s", some).close()
    data.write_text("{}\n{}\n")
    with pytest.raises(UserError, match="has changed since"):
        opened(tmp_path / "s", some)


def test_finished_run_missing_in_sweep_json(tmp_path):
    sweep = opened(tmp_path / "s", points(4, 8))
    sweep.close()
    run = sweep.run_folder(sweep.runs[0])
    run.mkdir()
    (run / "experiment_config.json").write_text(json.dumps({"status": "finished"}))
    again = opened(tmp_path / "s", points(4, 8))
    assert [run.status for run in again.runs] == ["finished", "waiting"]
    again.close()


def test_progress_resets_the_retries():
    run = SweepRun(points(4)[0])
    gets_on = [run.record_attempt({"outcome": "lost", "step": step}, retries=1) for step in (10, 20, 30)]
    assert gets_on == [True, True, True]
    assert run.record_attempt({"outcome": "lost", "step": 30}, retries=1) is False
    assert run.status == "failed"


def test_asha_stops_the_worse_half(tmp_path):
    pytest.importorskip("ray")
    asha = Asha(tmp_path, metric="loss", grace=10, reduction=2)
    losses = {"a": 1.0, "b": 2.0, "c": 0.5, "d": float("nan")}
    stopped = [run for run, loss in losses.items() if asha.should_stop(run, 10.0, {"step": 1, "loss": loss})]
    assert stopped == ["b", "d"]
    assert not asha.should_stop("a", 11.0, {"step": 2, "loss": 9.0}), "no run is stopped between two rungs"
    decisions = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert [(one["run"], one["decision"]) for one in decisions] == [
        ("a", "go on"), ("b", "stop"), ("c", "go on"), ("d", "stop"),
    ]  # fmt: skip
    # A resumed sweep replays earlier results without recording them again.
    again = Asha(tmp_path, metric="loss", grace=10, reduction=2)
    for run in ("a", "c"):
        again.should_stop(run, 10.0, {"step": 1, "loss": losses[run]}, replay=True)
    assert again.should_stop("e", 10.0, {"step": 1, "loss": 2.0})
    assert len((tmp_path / "decisions.jsonl").read_text().splitlines()) == 5


def test_coordinator_writes_only_in_its_folder(tmp_path):
    (tmp_path / "s").mkdir()
    coordinator = Coordinator(str(tmp_path / "s"), {})
    coordinator.write("run/file", 0, b"ab", False)
    assert not (tmp_path / "s" / "run" / "file").exists()
    coordinator.write("run/file", 2, b"c", True)
    assert (tmp_path / "s" / "run" / "file").read_bytes() == b"abc"
    for name in ("../outside", str(tmp_path / "outside"), "run/../../outside"):
        with pytest.raises(ValueError, match="outside"):
            coordinator.write(name, 0, b"x", True)
    assert not (tmp_path / "outside").exists()
