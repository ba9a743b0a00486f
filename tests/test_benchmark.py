"""The grid of experiments and its report: the paper's runs, done once each, and tables that say what the runs gave."""

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import ROOT, needs_procgen, read_csv

sys.path.insert(0, str(ROOT / "benchmark"))
import grid
import report

import ppd_atari
import ppd_beyond
import ppd_gymnax
import ppd_mujoco
import ppd_procgen
import student_distill
import teacher_distill
import train_teacher

SCRIPTS = {f"{m.__name__}.py": m for m in (
    ppd_atari, ppd_beyond, ppd_gymnax, ppd_mujoco, ppd_procgen, student_distill, teacher_distill, train_teacher)}
TINY = "--teacher-timesteps 2048 --total-timesteps 8192 --num-seeds 2 --num-envs 8 --num-parts 32 --eval-episodes 2 --teacher-num-steps 32"


def all_runs():
    return [run for suite in grid.TASKS for run in grid.experiments(suite)]


def test_the_grid_is_the_papers():
    runs = all_runs()
    assert len(set(runs)) == len(runs) == len({run.name for run in runs})
    paper = [run for run in runs if run.suite != "gymnax"]
    tasks, seeds = 11 + 4 + 4, 5
    count = {name: sum(run.experiment == name for run in paper) for name in grid.EXPERIMENTS}
    assert count == {"teachers": tasks * seeds, "methods": tasks * 3 * 3 * seeds, "imperfect": 8 * 3 * seeds, "lambda": 4 * 3 * seeds,  # λ = 1 is among the methods
                     "cpu-teachers": 5, "cpu-methods": (4 * 2 + 1) * 3, "cpu-imperfect": 4 * 3, "cpu-priors": 2 * 2,
                     "beyond": 4 * 2 * 4 * 3, "rate-0.0004": 0, "rate-0.001": 0, "adaptive": 0, "short-teachers": 0, "several": 2 * 3 * 3}
    assert {run.method for run in runs if run.experiment == "adaptive"} == set(grid.ADAPTIVE)
    known = pd.read_csv(ROOT / "benchmark/paper_tables.csv")
    for suite, table in itertools.product(("atari", "mujoco", "procgen"), (5, 6)):
        named = set(known[(known.table == table) & (known.suite == suite)].env) - {"all"}
        ours = {run.task for run in paper if run.suite == suite and run.experiment == ("methods" if table == 5 else "imperfect")}
        assert {report.paper_name(task) for task in ours} == named


def test_every_command_line_of_the_grid_means_what_its_run_is_called():
    args = grid.Args()
    kinds = {(run.experiment, run.suite, run.method, run.size, run.distill_coef): run for run in all_runs()}
    for run in kinds.values():
        words = grid.command(run, args)
        flags = SCRIPTS[words[1]].parse_args(words[2:])
        assert (flags.env_id, flags.seed) == (run.task, run.seed)
        if run.suite == "gymnax":
            ppd_gymnax.resolve(dataclasses.replace(flags, teacher=None))  # ends the program for flags that cannot work
            assert (flags.method, flags.num_seeds) == ("ppd" if run.method in grid.VARIANTS else run.method, 5)
            assert (flags.distill_coef_decay == "return", flags.pbt_interval == 5) == (run.method == "ppd-decay", run.method == "ppd-pbt")
            assert run.experiment != "adaptive" or flags.distill_coef == (0.5, 1, 2, 5)
            short = run.experiment in ("beyond", "adaptive", "short-teachers")
            assert (flags.teacher_timesteps, flags.total_timesteps) == ((1_000_000, 200_000) if short else (10_000_000, 2_000_000))
            assert run.teacher is None or run.teacher.experiment == ("short-teachers" if short else "teachers")
            assert flags.learning_rate == {"rate-0.0004": 0.0004, "rate-0.001": 0.001}.get(run.experiment)
        if run.experiment == "cpu-teachers":
            assert flags.size == run.size
        if run.method != "ppo":
            task = "CoinrunEasy-v0" if run.method == "ppd-prior" else run.task
            assert run.size.startswith(flags.student_size) and task in str(flags.teacher)
            assert (flags.student_hidden == (512,)) == run.size.endswith("512")
            mild = 0.02 if run.experiment == "several" else 0.0
            assert flags.teacher_noise_std == (0.05 if run.experiment.endswith(("imperfect", "adaptive")) else mild)
            assert run.script != "ppd_gymnax.py" or run.experiment != "lambda" or flags.distill_coef == (0, 0.5, 2, 5)
        changed = (run.method == "ppd-detached", run.method == "ppd-future", run.method == "ppd-mean-clip")
        assert run.script.partition("_")[0] != "ppd" or changed == (
            flags.distill_weight == "detached", getattr(flags, "distill_future_coef", 0.0) == 1.0, getattr(flags, "teacher_mean_clip", False))
        if run.method.startswith("ppd") and run.suite != "gymnax":
            assert words[1] == ("ppd_beyond.py" if run.method in ("ppd-future", "ppd-mean-clip", "ppd-decay", "ppd-both") else f"ppd_{run.suite}.py")
        if run.distill_coef is not None:
            assert flags.distill_coef == run.distill_coef
    assert {grid.teacher_path(run, args) for run in all_runs() if run.task == "Hopper-v4" and run.seed == 100 and run.teacher} == {
        "teachers/Hopper-v4__100.safetensors"}


def test_two_corrupted_teachers_are_those_of_the_runs_beside_them():
    """Teacher k of ppd_beyond.py has the noise of seed + k; the sum of λ is that of one teacher."""
    runs = [run for run in grid.experiments("mujoco") if run.experiment == "several" and run.task == "Ant-v4" and run.seed == 200]
    first, second, both = (SCRIPTS[words[1]].parse_args(words[2:]) for words in (grid.command(run, grid.Args()) for run in runs))
    assert [run.method for run in runs] == ["ppd", "ppd-second", "ppd-both"] and both.teacher == (first.teacher, second.teacher)
    assert (both.teacher_noise_seed, both.teacher_noise_seed + 1) == (first.teacher_noise_seed, second.teacher_noise_seed) == (100, 101)
    assert first.distill_coef == second.distill_coef == 2 * both.distill_coef[0] == 1


def test_without_a_filter_it_is_the_papers_grid_and_the_study_like_it():
    found = [[run.suite for run in grid.chosen(grid.Args(miniature=small))] for small in (False, True)]
    assert [(len(suites), suites.count("gymnax")) for suites in found] == [(1130 + 56, 56), (24, 14)]


def test_filters_choose_runs_and_the_teachers_they_lack(capsys):
    chosen = grid.chosen(grid.Args(suite=("gymnax",), experiment=("methods",), method=("ppd",), size=("same",), task=("Breakout-MinAtar",)))
    assert [(run.experiment, run.method) for run in chosen] == [("teachers", "ppo"), ("methods", "ppd")]
    chosen = grid.chosen(grid.Args(suite=("mujoco",), experiment=("methods",), task=("Hopper-v4",), seed=(100,)))
    assert len(chosen) == 9 and {run.experiment for run in chosen} == {"methods"}  # that teacher is shipped
    grid.main(grid.Args(suite=("mujoco",), experiment=("methods",), task=("Ant-v4",), size=("larger",), method=("ppd",), seed=(100, 400), dry_run=True))
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line)[1] for line in lines] == ["train_teacher.py", "ppd_mujoco.py", "ppd_mujoco.py"]
    assert "--teacher runs/grid/teachers__Ant-v4__ppo__same__400/teacher.safetensors" in lines[2]  # no teacher of seed 400 is shipped
    with pytest.raises(SystemExit):
        grid.main(grid.Args(task=("Nothing-v0",)))


def test_students_of_all_seeds_that_go_beyond_the_paper_have_one_teacher():
    runs = grid.chosen(grid.Args(suite=("mujoco",), experiment=("beyond",), task=("Ant-v4",), size=("smaller",)))
    assert [(run.method, run.seed) for run in runs] == [(name, seed) for seed in (100, 200, 300) for name in grid.BEYOND["mujoco"]]
    assert {grid.teacher_path(run, grid.Args()) for run in runs} == {"teachers/Ant-v4__100.safetensors"}
    assert set(grid.BEYOND["mujoco"]) == set(report.VARIANTS)
    runs = grid.chosen(grid.Args(experiment=("several",)))
    assert {grid.teacher_path(run, grid.Args()) for run in runs} == {f"teachers/{task}-v4__100.safetensors" for task in ("Ant", "HalfCheetah")}


def test_a_student_has_the_teacher_of_another_game_as_a_prior_or_none():
    runs = grid.chosen(grid.Args(experiment=("cpu-priors",), task=("NinjaEasy-v0",)))
    found = [SCRIPTS["ppd_procgen.py"].parse_args(grid.command(run, grid.Args())[2:]) for run in runs]
    assert [(run.method, str(flags.teacher), flags.distill_coef) for run, flags in zip(runs, found, strict=True)] == [
        ("ppd-prior", "teachers/CoinrunEasy-v0__100.safetensors", 1.0), ("ppd-alone", "teachers/NinjaEasy-v0__100.safetensors", 0.0)]


@pytest.mark.parametrize(("method", "coef"), [("ppd", 1.0), ("ppd-future", [1.0])])
def test_a_row_has_one_lambda(method, coef, tmp_path):
    """Of ppd_beyond.py, which has one for each teacher, that of its only one; figures of levels of training are beside the others."""
    run, args = grid.Run("beyond", "mujoco", "Hopper-v4", method, "smaller", 100), grid.Args(folder=tmp_path)
    player = {"mean": 2.0, "std": 0.5, "games": 1, "returns": [2.0]}
    player |= {"train_levels": {"mean": 4.0, "std": 1.0, "games": 3, "returns": [4.0]}}
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "results.json").write_text(json.dumps({
        "args": {"total_timesteps": 9, "eval_episodes": 1, "distill_coef": coef}, "seconds": 1.0, "SPS": 7.0, "command": "", "versions": {},
        "student": player, "teacher": player}))
    row, = grid.rows(run, args)
    assert row["distill_coef"] == 1.0 and (row["student_mean"], row["student_games"]) == (2.0, 1)
    assert [row[f"teacher_train_{kind}"] for kind in ("mean", "std", "games")] == [4.0, 1.0, 3]


def test_rows_of_gymnax_are_of_their_seed_and_lambda(tmp_path):
    run, args = grid.Run("lambda", "gymnax", "Breakout-MinAtar", "ppd", "larger", 100), grid.Args(folder=tmp_path)
    (tmp_path / run.name).mkdir()
    players = {"teacher": 1.0, "student_0.5": 10.0, "student_2": 20.0}
    (tmp_path / run.name / "results.json").write_text(json.dumps({
        "args": {"total_timesteps": 9, "eval_episodes": 2, "distill_coef": [0.5, 2.0], "seed": 100, "num_seeds": 3}, "seconds": 1.0,
        "student_SPS": 7.0, "command": "", "versions": {},
        "results": {name: {"returns": [[mean + i - 1, mean + i + 1] for i in range(3)]} for name, mean in players.items()}}))
    found = [tuple(row[name] for name in ("distill_coef", "seed", "teacher_mean", "student_mean", "student_std")) for row in grid.rows(run, args)]
    assert found == [(coef, 100 + i, 1.0 + i, mean + i, 1.0) for coef, mean in ((0.5, 10.0), (2.0, 20.0)) for i in range(3)]


def test_the_table_beyond_the_paper_by_hand():
    """Three seeds of two tasks with teachers of return 100; one variant lacks a task, which its mean then leaves out for all."""
    values = {("ppd", "A"): (50, 60, 70), ("ppd", "B"): (40, 40, 40), ("ppd-detached", "A"): (90, 90, 90)}
    runs = pd.DataFrame([{"experiment": "beyond", "suite": "mujoco", "task": task, "method": method, "size": "smaller", "seed": seed,
                          "teacher_mean": 100.0, "student_mean": value, "command": ""}
                         for (method, task), found in values.items() for seed, value in zip((100, 200, 300), found, strict=True)])
    half = 4.302653 * 0.1 / 3 ** 0.5
    lines = report.beyond_table(runs, "mujoco").splitlines()
    assert lines[0] == "| students | task | the paper's | detached |"
    assert lines[2:4] == [f"| smaller | A | 0.60 ± {half:.2f} | 0.90 ± 0.00 |", "| smaller | B | 0.40 ± 0.00 |  |"]
    assert lines[4].startswith("| smaller | geometric mean | 0.59 [0.") and lines[4].endswith(" | 0.90 [0.90, 0.90] |")
    assert report.beyond_table(runs[runs.task == "A"], "mujoco").splitlines()[2:] == lines[2:3]  # one task has no mean over tasks


def test_the_tables_of_several_teachers_and_of_priors_by_hand():
    students = {"ppd": (50, 60, 70), "ppd-second": (40, 40, 40), "ppd-both": (90, 90)}
    runs = pd.DataFrame([{"experiment": "several", "suite": "mujoco", "task": "A", "method": method, "size": "larger", "seed": seed, "teacher_mean": 100.0,
                          "corrupted_teacher_mean": 20.0 if method == "ppd-second" else 30.0, "student_mean": value, "command": ""}
                         for method, found in students.items() for seed, value in zip((100, 200, 300), found, strict=False)])
    assert report.several_table(runs).splitlines()[2:] == [
        f"| A | 0.30 | 0.20 | 0.60 ± {4.302653 * 0.1 / 3 ** 0.5:.2f} | 0.40 ± 0.00 | 0.90 ± 0.00 |"]

    def row(experiment, method, teacher, student):
        players = {"teacher": teacher, "student": student}
        cells = {f"{player}_{split}{kind}": value for player, mean in players.items() for split in ("", "train_")
                 for kind, value in (("mean", mean + (split != "")), ("std", 2.0))}
        return {"experiment": experiment, "suite": "procgen", "task": "A", "method": method, "size": "smaller", "seed": 100, "episodes": 100, **cells}

    runs = pd.DataFrame([row("cpu-priors", "ppd-alone", 8, 4), row("cpu-priors", "ppd-prior", 2, 6), row("cpu-methods", "student-distill", 8, 1),
                         row("cpu-methods", "ppd", 8, 8)])
    assert report.priors_table(runs).splitlines()[2:] == [
        "| A | unseen levels | 8.00 ± 0.20 | 2.00 ± 0.20 (0.25) | 4.00 ± 0.20 (0.50) | 6.00 ± 0.20 (0.75) | 8.00 ± 0.20 (1.00) |",
        "| A | training levels | 9.00 ± 0.20 | 3.00 ± 0.20 (0.33) | 5.00 ± 0.20 (0.56) | 7.00 ± 0.20 (0.78) | 9.00 ± 0.20 (1.00) |"]


def test_the_table_of_lambdas_that_adapt_by_hand():
    """A line for the corrupted teacher, each fixed λ, each that falls, and the population, which has no λ of its own."""
    about = {"experiment": "adaptive", "suite": "gymnax", "task": "A", "size": "larger", "teacher_mean": 10.0, "corrupted_teacher_mean": 5.0,
             "command": ""}
    cases = [("ppd", 1.0, 7.0), ("ppd", 2.0, 8.0), ("ppd-decay", 1.0, 9.0), ("ppd-pbt", float("nan"), 11.0)]
    runs = pd.DataFrame([about | {"method": method, "distill_coef": coef, "student_mean": mean + 2 * i, "seed": 100 + i}
                         for method, coef, mean in cases for i in range(2)])
    half = 12.706205 * 0.1  # of two seeds, 0.2 apart
    assert report.adaptive_table(runs, "gymnax").splitlines()[2:] == [
        "| the corrupted teacher | 0.50 ± 0.00 | 0.50 [0.50, 0.50] |", f"| λ = 1 | 0.80 ± {half:.2f} | 0.79 [0.70, 0.90] |",
        f"| λ = 2 | 0.90 ± {half:.2f} | 0.89 [0.80, 1.00] |", f"| λ falls with the return, from 1 | 1.00 ± {half:.2f} | 0.99 [0.90, 1.10] |",
        f"| a population of these λ | 1.20 ± {half:.2f} | 1.20 [1.10, 1.30] |"]


def test_means_of_lambdas_that_adapt_are_over_the_same_tasks():
    about = {"experiment": "adaptive", "suite": "gymnax", "size": "larger", "teacher_mean": 10.0, "corrupted_teacher_mean": 5.0, "command": ""}
    runs = pd.DataFrame([about | {"task": task, "method": method, "distill_coef": 1.0, "student_mean": mean, "seed": 100}
                         for task, method, mean in (("A", "ppd", 9.0), ("B", "ppd", 1.0), ("A", "ppd-decay", 9.0))])
    assert [line.split(" | ")[-1] for line in report.adaptive_table(runs, "gymnax").splitlines()[3:]] == ["0.90 |", "0.90 |"]


def test_the_table_of_learning_rates_by_hand():
    """Where a method has no runs its cell is empty; the default's are the larger students among the methods."""
    assert float(report.DEFAULT_RATE) == ppd_gymnax.MINATAR["learning_rate"]
    about = {"suite": "gymnax", "seed": 100, "teacher_mean": 10.0, "command": ""}
    runs = pd.DataFrame([about | {"experiment": name, "task": task, "method": method, "size": size, "student_mean": mean} for name, task, method, size, mean in (
        ("methods", "A", "ppd", "larger", 9.0), ("methods", "A", "ppd", "same", 1.0), ("methods", "A", "student-distill", "larger", 8.0),
        ("methods", "B", "ppd", "larger", 4.0), ("methods", "B", "student-distill", "larger", 2.0), ("rate-0.001", "A", "ppd", "larger", 7.0))])
    assert report.rates_table(runs, "gymnax").splitlines()[2:] == [
        "| all | 0.001 |  |  | 0.70 | 1 × 1 |", "| all | 0.0025 |  | 0.40 | 0.60 | 2 × 1 |",
        "| A | 0.001 |  |  | 0.70 | 1 × 1 |", "| A | 0.0025 |  | 0.80 | 0.90 | 1 × 1 |",
        "| B | 0.001 |  |  |  | not run |", "| B | 0.0025 |  | 0.20 | 0.40 | 1 × 1 |"]


def start_grid(folder, extra, *flags):
    words = ["env", "--default-signal=INT",  # which is ignored where the tests run in the background
             sys.executable, "benchmark/grid.py", "--suite", "gymnax", "--task", "Breakout-MinAtar", "--size", "same", "--folder", str(folder)]
    return subprocess.Popen([*words, f"--extra={extra}", *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def table(path):
    return [{k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in read_csv(path)]


def test_a_grid_that_is_killed_goes_on_and_repeats_nothing(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    began = start_grid(whole, TINY, "--method", "ppo", "ppd")
    out = began.communicate(timeout=400)[0]
    assert began.returncode == 0 and "2 of 2 runs are done" in out, out

    first = cut / "teachers__Breakout-MinAtar__ppo__same__100"
    began = start_grid(cut, TINY, "--method", "ppo", "ppd")
    while not any(first.glob("checkpoint_*.safetensors")):
        assert began.poll() is None, began.communicate()[0]
        time.sleep(0.05)
    os.killpg(began.pid, signal.SIGINT)  # as Ctrl-C does
    out = began.stdout.read()
    assert began.wait() == 130 and "Traceback" not in out and out.endswith("interrupted: the runs save and end; the same command goes on\n")

    began = start_grid(cut, TINY, "--method", "ppo", "ppd")
    while not (first / "results.json").exists() or not any(int(path.stem[11:]) for path in cut.glob("methods__*/checkpoint_*.safetensors")):
        assert began.poll() is None, began.communicate()[0]
        time.sleep(0.05)
    began.kill()
    began.wait()  # its jobs see that it is gone, save and end, while the next grid waits for them
    stamp = (first / "results.json").stat().st_mtime_ns
    began = start_grid(cut, TINY, "--method", "ppo", "ppd")
    out = began.communicate(timeout=400)[0]
    assert began.returncode == 0 and "2 of 2 runs are done" in out, out
    assert (first / "results.json").stat().st_mtime_ns == stamp
    assert any("--resume" in log.read_text() for log in cut.glob("*.log"))
    relative = [[{k: v.replace(str(folder), "") for k, v in row.items()} for row in table(folder / "results/gymnax.csv")] for folder in (whole, cut)]
    assert relative[0] == relative[1] and len(relative[0]) == 4
    assert {path.name for path in (whole / "results/curves").iterdir()} == {path.name for path in (cut / "results/curves").iterdir()}


def test_a_failed_run_is_reported_and_the_rest_goes_on(tmp_path):
    began = start_grid(tmp_path / "x", TINY + " --num-minibatches 7", "--method", "ppo", "ppd")
    out = began.communicate(timeout=200)[0]
    assert began.returncode == 1 and "0 of 2 runs are done" in out
    assert "--num-minibatches 7 does not divide" in out and "its teacher failed: teachers__Breakout-MinAtar__ppo__same__100" in out


@pytest.mark.parametrize("words", [
    ("speed.py", "--rounds", "1", "--case", "halfcheetah-sd", "--longer", "0.1"),
    ("speed_gymnax.py", "--env-id", "CartPole-v1", "--num-seeds", "1", "--rounds", "1", "--seconds", "0.01"),
    ("overlap.py", "--steps", "20", "--rounds", "1"),
    ("variance.py", "--env-id", "Hopper-v4", "--updates", "0", "1"),
    ("hidden_units.py", "--env-id", "Pong-v5", "--updates", "0", "--num-steps", "4"),
    pytest.param(("levels.py", "--env-id", "NinjaEasy-v0", "--num-levels", "2", "--games", "3"), marks=needs_procgen),
    pytest.param(("pixels.py", "--env-id", "CoinrunEasy-v0", "--method", "student-distill", "--timesteps", "1152"), marks=needs_procgen),
    ("resume.py", "--timesteps", "3200", "--num-steps", "16", "--seeds", "100", "--eval-episodes", "1", "--student-size", "smaller")])
def test_the_other_benchmarks_run(words, tmp_path):
    done = subprocess.run([sys.executable, f"benchmark/{words[0]}", *words[1:], "--json", tmp_path / "found.json"], cwd=ROOT, timeout=400,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    key = "kl" if words[0] == "pixels.py" else words[0].removesuffix(".py").removeprefix("speed_")
    assert found["command"].startswith(f"python benchmark/{words[0]}") and found[key]


def test_our_table_1_of_the_papers_table_5_is_its_table_1():
    known = pd.read_csv(ROOT / "benchmark/paper_tables.csv")
    fifth = known[(known.table == 5) & (known.split == "test") & (known.env != "all")]
    teachers = fifth[fifth["size"] == "teacher"].set_index("env").value
    rows = fifth[fifth["size"] != "teacher"].assign(experiment="methods", task=lambda x: x.env, seed=100)
    rows = rows.assign(method=rows.method.map({name: method for method, name in report.METHODS.items()}))
    for player, values in (("student", rows.value), ("teacher", rows.env.map(teachers))):
        rows[f"{player}_mean"] = values.where(rows.suite != "atari")
        rows[f"{player}_human_normalised"] = values.where(rows.suite == "atari")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.overview_table(rows, "geometric").splitlines()[2:]]
    assert [(line[0], line[6]) for line in lines[::3]] == [("atari", "11 × 1"), ("mujoco", "4 × 1"), ("procgen", "4 × 1"), ("all", "19 × 1")]
    for suite, size, *cells, _, paper in lines:
        ours = [float(cell.replace(",", "")) for cell in cells if cell]
        assert len(ours) == (3 if suite == "all" else 4), (suite, size)
        assert ours == pytest.approx([float(value) for value in paper.split(", ")], abs=0.0151, rel=1e-3), (suite, size)
    partly = report.overview_table(rows[rows.suite != "atari"], "geometric").splitlines()
    assert "| atari | same |  |  |  |  | not run | 2.19, 1.11, 1.16, 1.19 |" in partly
    assert "| all | same |  |  |  |  | not run | 0.99, 1.05, 1.11 |" in partly  # of the paper's suites not all are there


def test_every_task_counts_the_same_however_many_seeds_it_has():
    assert report.geometric_mean(np.array([0.9, 0.9, 0.9]), np.array([0.4])) == pytest.approx(0.6)


@pytest.mark.parametrize(("student", "words"), [(1.1, "geometric mean"), (-50.0, "geometric mean; a fraction below 0.01 counts as 0.01")])
def test_a_heading_says_where_a_fraction_counts_for_more_than_it_is(tmp_path, student, words):
    made_up(tmp_path)
    rows = pd.read_csv(tmp_path / "mujoco.csv")
    rows.loc[0, "student_mean"] = student * rows.teacher_mean[0] / 100
    tables = report.sections(rows)
    assert all(tables[name].splitlines()[0].endswith(f", {words}") for name in ("overview", "summary", "mujoco-methods"))


def made_up(folder):
    rng, rows = np.random.default_rng(0), []
    for task, size, method, seed in itertools.product(("Ant-v4", "Hopper-v4"), ("same",), ("ppd", "student-distill"), (100, 200, 300)):
        rows.append({name: "" for name in grid.COLUMNS} | {
            "experiment": "methods", "suite": "mujoco", "task": task, "method": method, "size": size, "seed": seed,
            "teacher_mean": 1000.0 * seed, "student_mean": 1000.0 * seed * (0.9 if method == "ppd" else rng.uniform(0.5, 1.5))})
    grid.write_csv(folder / "mujoco.csv", grid.COLUMNS, rows)


def test_the_report_gives_what_the_rows_say_and_leaves_the_rest_empty(tmp_path, capsys):
    made_up(tmp_path)
    report.main(report.Args(results=tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert "| mujoco | smaller |  |  |  |  | not run | 4322.42, 0.94, 0.97, 0.97 |" in text
    line = next(line for line in text.splitlines() if line.startswith("| mujoco | same |"))
    teacher, td, sd, ppd, runs, paper = (cell.strip() for cell in line.split("|")[3:-1])
    assert (teacher, td, ppd, runs) == ("200,000", "", "0.90 [0.90, 0.90]", "2 × 3") and paper == "4322.42, 0.96, 1, 1.01"
    mean, low, high = map(float, re.findall(r"[\d.]+", sd))
    scores = np.array(report.fractions(report.load(tmp_path).query("method == 'student-distill'")))
    assert scores.shape == (2, 3) and mean == pytest.approx(math.exp(np.log(scores).mean()), abs=0.0051)
    assert scores.min() <= low < mean < high <= scores.max() + 0.0051
    assert "| the paper's | 3574 |" in text and "standard error" not in text

    rows = report.load(tmp_path).query("seed == 100").assign(episodes=50, teacher_std=100.0, student_std=200.0)
    assert report.spread(rows) == "one seed (100)"
    line = report.returns_table(rows[rows.method == "ppd"], "mujoco").splitlines()[3]  # under Ant's
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["± standard error", "14", "", "", "", "", "", "28", "", "", ""]


def test_a_heading_names_the_floor_where_a_fraction_has_counted_as_it():
    rows = pd.DataFrame({"suite": "mujoco", "teacher_mean": [10.0, 10.0, -1.0], "student_mean": [9.0, 8.0, -5.0], "corrupted_teacher_mean": [5.0, 0.0, 0.0]})
    assert report.geometric(rows) == "geometric mean"  # the third teacher has no fractions
    for found in (report.geometric(rows.assign(student_mean=[9.0, -1.0, 1.0])), report.geometric(rows, players=("student", "corrupted_teacher"))):
        assert found == "geometric mean; a fraction below 0.01 counts as 0.01"


@pytest.mark.parametrize(("name", "content"), [("mujoco.csv", ""), ("mujoco.csv", "a,b\n1,2\n"), ("mujoco.csv", "experiment,suite\nmethods,mujoco\n"),
                                              ("reference/x.json", "{"), ("reference/x.json", '{"env_id": 5}'), ("reference/x.json", "[]")])
def test_tables_of_something_else_are_refused(name, content, tmp_path, capsys):
    made_up(tmp_path)
    (tmp_path / "reference").mkdir()
    (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as ended:
        report.main(report.Args(results=tmp_path))
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_cells_of_a_row_rest_on_the_same_runs():
    """Freeway has no teacher-distill and a teacher that scores nothing; a method without any run takes nothing away."""
    rows = pd.DataFrame([{"suite": "gymnax", "task": task, "seed": seed, "method": method, "teacher_mean": teacher, "student_mean": 1.0}
                         for task, seed, teacher in (("Breakout", 1, 2.0), ("Breakout", 2, 4.0), ("Freeway", 1, 0.0), ("Freeway", 2, 1.0))
                         for method in ("ppd", "teacher-distill") if (task, method) != ("Freeway", "teacher-distill")])
    assert [x.tolist() for x in report.fractions(rows[rows.method == "ppd"])] == [[0.5, 0.25], [1.0]]
    assert report.aggregate(rows[rows.method == "ppd"])["runs"] == "2 × 1 to 2"
    parts = report.by_method(rows)
    assert [len(parts[name]) for name in report.METHODS] == [2, 0, 2]
    again = rows.assign(teacher_mean=rows.teacher_mean.mask((rows.seed == 2) & (rows.method == "teacher-distill"), 0.0))
    assert [len(report.by_method(again)[name]) for name in report.METHODS] == [1, 0, 1]  # evaluated again, it scored nothing
    with pytest.raises(ValueError, match="several runs"):
        report.fractions(pd.concat([rows, rows]).assign(command="python x"))


def test_rows_of_a_run_take_the_place_of_all_its_older_ones(tmp_path, monkeypatch):
    run, args = grid.Run("methods", "gymnax", "Breakout-MinAtar", "ppd", "same", 100), grid.Args(folder=tmp_path)
    (tmp_path / run.name).mkdir()
    (tmp_path / run.name / "progress.csv").write_text("phase,seed,distill_coef,global_step,charts/episodic_return\nstudent,100,1.0,1,2.0\n")
    about = {"experiment": "methods", "suite": "gymnax", "task": run.task, "method": "ppd", "size": "same"}
    for seeds, coef in ((5, 1.0), (2, 2.0)):
        monkeypatch.setattr(grid, "rows", lambda *_, n=seeds, c=coef: [about | {"seed": 100 + i, "distill_coef": c} for i in range(n)])
        grid.record(run, args)
    assert [row["distill_coef"] for row in table(tmp_path / "results/gymnax.csv")] == ["2.0", "2.0"]
    assert {path.name for path in (tmp_path / "results").iterdir()} == {"gymnax.csv", "curves"}


def test_a_row_of_another_lambda_takes_its_place_too(tmp_path, monkeypatch):
    """Where a run's name has no λ, it was given by --extra; where it has one, each λ has its row."""
    for coef, kept in ((None, ["2.0"]), (0.5, ["1.0", "2.0"])):
        run, args = grid.Run("lambda", "atari", "Qbert-v5", "ppd", "larger", 100, coef), grid.Args(folder=tmp_path / str(coef))
        (args.folder / run.name).mkdir(parents=True)
        (args.folder / run.name / "progress.csv").write_text("global_step,charts/episodic_return\n1,2.0\n")
        for value in (1.0, 2.0):
            row = {"experiment": "lambda", "suite": "atari", "task": run.task, "method": "ppd", "size": "larger", "seed": 100, "distill_coef": value}
            monkeypatch.setattr(grid, "rows", lambda *_, row=row: [row])
            grid.record(run, args)
        assert [row["distill_coef"] for row in table(args.folder / "results/atari.csv")] == kept


@pytest.mark.parametrize("flags", [{"extra": '"'}, {"folder": ROOT / "README.md"}, {"results": ROOT / "README.md", "miniature": True},
                                   {"extra": "--gamma 0.9 --seed=7"}, {"extra": "--student_size same"},
                                   {"extra": "--distill-coef 3", "experiment": ("lambda",)}, {"extra": "--learning-rate 1", "experiment": ("rate-0.001",)}])
def test_flags_of_the_grid_that_cannot_be(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        grid.main(grid.Args(**flags))
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_what_a_failed_run_said_is_its_last_words(tmp_path):
    run, args = grid.Run("teachers", "gymnax", "Breakout-MinAtar", "ppo", "same", 100), grid.Args(folder=tmp_path)
    assert "has not begun" in grid.last_words(run, args)
    (tmp_path / f"{run.name}.log").write_text("$ python\n╭─ Parsing error ─╮\n│ Unrecognized options: --bogus │\n╰───────╯\n")
    assert grid.last_words(run, args) == "Unrecognized options: --bogus"
    (tmp_path / f"{run.name}.log").write_bytes(b"No space left\n\xe2\x96")
    assert grid.fault(run, args) == "No space left"


@pytest.mark.parametrize(("broken", "content"), [("results.json", "half a file"), ("progress.csv", "global_step\n"), ("../results/gymnax.csv", "global_step\n3\n")])
def test_results_that_cannot_be_recorded_are_a_fault_of_that_run(broken, content, tmp_path, monkeypatch):
    run, args = grid.Run("teachers", "gymnax", "Breakout-MinAtar", "ppo", "same", 100), grid.Args(folder=tmp_path)
    (tmp_path / run.name).mkdir()
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(grid, "rows", lambda *_: json.loads((tmp_path / run.name / "results.json").read_text()))
    (tmp_path / run.name / "results.json").write_text("[{}]")
    (tmp_path / run.name / "progress.csv").write_text("global_step,charts/episodic_return\n1,2.0\n")
    assert grid.fault(run, args) == ""
    (tmp_path / run.name / broken).write_text(content)
    assert grid.fault(run, args).startswith("its results cannot be recorded: ")


def test_a_folder_of_other_commands_is_refused(tmp_path, capsys):
    run, args = grid.Run("teachers", "gymnax", "Breakout-MinAtar", "ppo", "same", 100), grid.Args(folder=tmp_path)
    (tmp_path / f"{run.name}.command").write_text(grid.known_command(run, args))
    other = grid.Args(folder=tmp_path, extra="--gamma 0.9")
    assert not grid.is_another(run, other)  # it never began
    (tmp_path / run.name).mkdir()
    assert grid.is_another(run, other) and not grid.is_another(run, grid.Args(folder=tmp_path / "."))
    (tmp_path / run.name / "results.json").touch()
    with pytest.raises(RuntimeError, match="by another command"):  # begun by a grid beside this one
        grid.Execution()(run, other, None, os.getpid(), {})
    assert "by another command" in grid.fault(run, other)
    for args in (grid.Args(folder=tmp_path, miniature=True), grid.Args(folder=tmp_path, extra="--gamma 0.9")):
        with pytest.raises(SystemExit):
            grid.main(dataclasses.replace(args, suite=("gymnax",), experiment=("teachers",), task=("Breakout-MinAtar",)))
        assert "by another command" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        grid.main(grid.Args(folder=tmp_path, processes=0))


def test_the_pages_are_what_the_report_makes_of_the_results():
    tables, shown = report.sections(report.load(ROOT / "benchmark/results")), set()
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        text = page.read_text()
        names = set(re.findall(r"<!-- report: (\S+) -->", text))
        assert names <= set(tables) and report.fill_tables(text, tables) == text
        stale = re.sub(r"0\.9\d", "0.12", text)
        assert not names or report.fill_tables(stale, tables).count("0.12") < stale.count("0.12")
        shown |= names
    assert {"summary", "mujoco-methods", "mujoco-beyond", "gymnax-beyond", "mujoco-several", "gymnax-adaptive"} <= shown


def test_committed_rows_are_whole():
    for path in (ROOT / "benchmark/results").glob("*.csv"):
        rows = read_csv(path)
        assert rows and list(rows[0]) == grid.COLUMNS
        assert len({tuple(row[name] for name in grid.KEY) for row in rows}) == len(rows)
        teachers = {}
        for row in rows:  # all of a task and seed had the same one, up to the rounding of different CPUs, but for those beyond the paper
            own = re.match("beyond|several|adaptive|short-|cpu-", row["experiment"])
            two_cpus = (row["experiment"], row["task"]) == ("beyond", "HalfCheetah-v4")  # its sizes: the same games end otherwise
            size = row["size"] if two_cpus else ""
            where = {"gymnax": r"device .*", "procgen": r"envpool \S+"}.get(path.stem, "")  # a GPU's floats, and Qt's images, are others
            about = (row["task"], row["seed"], own and own[0], size, row["method"] == "ppd-prior", re.search(where, row["versions"])[0])
            first = teachers.setdefault(about, float(row["teacher_mean"]))
            assert float(row["teacher_mean"]) == pytest.approx(first, rel=1e-3 if path.stem != "gymnax" else 0)
        for row in rows:
            assert row["suite"] == path.stem and row["teacher_mean"] and row["command"].startswith("python ") and "/tmp" not in row["command"]
            assert (row["student_mean"] != "") == (row["method"] != "ppo")


def test_recorded_commands_are_still_understood():
    """One of each kind, whatever its numbers, but for two old forms that the page on results explains."""
    found = [json.loads(path.read_text()) for path in (ROOT / "benchmark/results").rglob("*.json")]
    found += [row for path in (ROOT / "benchmark/results").glob("*.csv") for row in read_csv(path)]
    commands = [each["command"] for each in found if isinstance(each, dict) and "command" in each]
    commands = [command for command in commands if not re.search("--contact-forces True|--method ppo .*--num-steps", command)]
    kinds = [shlex.split(command) for command in {re.sub(r"\d+", "", command): command for command in commands}.values()]
    kinds = [words for words in kinds if words[1] in SCRIPTS]
    assert len(kinds) > 20
    for words in kinds:
        flags = SCRIPTS[words[1]].parse_args(words[2:])
        if words[1] == "ppd_gymnax.py":
            ppd_gymnax.resolve(dataclasses.replace(flags, teacher=None, run_dir=None))


def test_an_atari_game_without_a_humans_score_counts_by_its_returns():
    rows = pd.DataFrame({"suite": "atari", "task": ["Pong-v5", "Breakout-v5"], "seed": 100, "teacher_mean": [20.0, 100.0],
                         "teacher_human_normalised": [1.0, np.nan], "student_mean": [10.0, 150.0], "student_human_normalised": [0.9, np.nan]})
    assert np.concatenate(report.fractions(rows)).tolist() == [1.5, 0.9]


def test_probability_of_improvement_by_hand():
    """Of 2 × 3 pairs of the first task 3 are won and 1 is a tie; all of the second are lost."""
    ours, theirs = [np.array([1.0, 3.0]), np.array([0.0])], [np.array([0.0, 1.0, 3.0]), np.array([2.0])]
    assert report.probability_of_improvement(ours, theirs) == pytest.approx((3.5 / 6 + 0.5 / 6 + 0) / 2)
    won, lost = [np.array([2.0, 3.0])], [np.array([0.0, 1.0])]
    assert (report.probability_of_improvement(won, lost), report.probability_of_improvement(lost, won)) == (1, 0)
    assert report.probability_of_improvement(won, won) == 0.5
    statistic = scipy.stats.mannwhitneyu(*(part[0] for part in (ours, theirs))).statistic
    assert report.probability_of_improvement(ours[:1], theirs[:1]) == pytest.approx(statistic / 6)


def test_performance_profile_by_hand():
    parts = [np.array([0.5, 1.0]), np.array([1.0, 1.5, 2.0, 0.25])]
    profile = report.performance_profile(parts, np.array([0.0, 0.5, 1.0, 2.0]))
    np.testing.assert_allclose(profile, [1, (1 / 2 + 3 / 4) / 2, (0 + 2 / 4) / 2, 0])  # above, so a run at τ does not count
    drawn = report.performance_profile([np.array([[0.5, 0.5], [1.0, 1.0]])], np.array([0.75]))
    assert drawn.tolist() == [[0.0], [1.0]]


def test_seeds_are_drawn_within_each_task():
    drawn = report.redrawn([np.array([0.0, 1.0]), np.array([10.0, 11.0, 12.0])], np.random.default_rng(0))
    assert [x.shape for x in drawn] == [(report.DRAWS, 2), (report.DRAWS, 3)]
    assert [set(x.ravel().tolist()) for x in drawn] == [{0, 1}, {10, 11, 12}]
    assert drawn[0].mean() == pytest.approx(0.5, abs=0.05) and abs(np.corrcoef(drawn[0][:, 0], drawn[1][:, 0])[0, 1]) < 0.1
    rows = pd.DataFrame([{"suite": "gymnax", "task": "A", "seed": seed, "method": method, "teacher_mean": 10.0, "command": "",
                          "student_mean": seed + 0.5 * (method == "ppd")} for method in ("ppd", "td") for seed in (1, 2)])
    ours, theirs = (rows[rows.method == name] for name in ("ppd", "td"))
    assert report.improvement(ours, theirs) == "0.75 [0.00, 1.00]"  # of two seeds an interval says nothing
    assert report.improvement(ours, theirs[:0]) == ""
    assert report.several_seeds(rows) and not report.several_seeds(rows[rows.seed == 1])


def test_improvement_and_profiles_are_there_only_with_several_seeds(tmp_path):
    made_up(tmp_path)
    runs = report.load(tmp_path)
    line = report.sections(runs)["mujoco-improvement"].splitlines()[-1]
    assert re.fullmatch(r"\| same \|  \| \d\.\d\d \[\d\.\d\d, \d\.\d\d\] \| 2 × 3 \|", line)
    assert "mujoco-improvement" not in report.sections(runs[runs.seed == 100])
    assert report.profiles(tmp_path, runs, "profiles.png", "title") and (tmp_path / "profiles.png").stat().st_size > 10_000
    assert not report.profiles(tmp_path, runs[runs.seed == 100], "none.png", "title") and not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("seed", [2, 3])
def test_intervals_need_several_seeds_that_all_methods_have(seed, tmp_path):
    """PPD has two seeds, student-distill another or one of them: no interval and no profile of one seed or of none."""
    rows = pd.DataFrame([{"experiment": "methods", "suite": "mujoco", "task": "A", "size": "same", "teacher_mean": 1.0, "student_mean": 1.0,
                          "method": method, "seed": each} for method, each in (("ppd", 1), ("ppd", 2), ("student-distill", seed))])
    assert len(report.improvement_table(rows, "mujoco").splitlines()) == 2
    assert not report.profiles(tmp_path, rows, "none.png", "title")


def test_the_reference_stands_beside_ours(tmp_path):
    made_up(tmp_path)
    assert report.references(tmp_path).empty and "mujoco-reference" not in report.sections(report.load(tmp_path))
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference/Ant-v4__same__100.json").write_text(json.dumps({
        "env_id": "Ant-v4", "student_size": "same", "seed": 100, "steps": 1152, "command": "python benchmark/reference.py",
        "teacher_file": "Ant-v4__100.safetensors",
        "teacher": {"mean": 200_000.0, "std": 2000.0, "returns": [0.0] * 4},
        "student": {"mean": 50_000.0, "std": 1000.0, "returns": [0.0] * 4},
        "curve": [{"steps": 1152 * i, "kl": 10.0 / i, "return": None} for i in (1, 2, 3)]}))
    (tmp_path / "reference/of_another_lambda.json").write_bytes((tmp_path / "reference/Ant-v4__same__100.json").read_bytes())
    other = json.loads((tmp_path / "reference/Ant-v4__same__100.json").read_text()) | {"seed": 200}  # from seed 100's teacher
    (tmp_path / "reference/Ant-v4__same__200.json").write_text(json.dumps(other))
    short = other | {"seed": 300, "teacher_file": "Ant-v4__300.safetensors", "command": "python x --total-timesteps 1152"}
    (tmp_path / "reference/Ant-v4__same__300.json").write_text(json.dumps(short))
    runs = report.load(tmp_path).assign(episodes=4, teacher_std=400.0, student_std=200.0)
    assert runs[runs.experiment == "reference"].seed.tolist() == [100]
    table = report.sections(runs)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table["mujoco-returns"].splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and lines[0][-1] == "the reference's ppd / teacher (ours)"
    assert {line[0]: line[-1] for line in lines[2:]} == {"Ant-v4": "same 0.25 (0.90)", "Hopper-v4": "", "the paper's": ""}
    assert table["mujoco-reference"].splitlines()[-1] == (
        "| Ant-v4 | same | 100 | 200,000 ± 400 | 50,000 ± 200 | 0.250 | 100,000 ± 400 | 90,000 ± 200 | 0.900 |")
    assert report.divergences(tmp_path, runs, "kl.png", "title") and (tmp_path / "kl.png").stat().st_size > 10_000
    assert not report.divergences(tmp_path, runs[runs.experiment == "methods"], "none.png", "title")


def test_lines_of_figures_differ_without_colour():
    for labels in (report.METHODS, dict.fromkeys((0, 0.5, 1, 2, 5))):
        looks = report.looks(labels)
        assert list(looks) == list(labels)
        assert len({str(line) for _, line, _ in looks.values()}) == len({marker for _, _, marker in looks.values()}) == len(labels)


def test_the_table_of_images_at_cpu_scale():
    about = {"suite": "procgen", "task": "CoinrunEasy-v0", "seed": 100, "episodes": 100, "teacher_mean": 5.0, "teacher_std": 2.0,
             "teacher_train_mean": 8.0, "teacher_train_std": 1.0}
    rows = [{"experiment": "cpu-methods", "method": "ppd", "size": "smaller", "student_mean": 4.5, "student_std": 3.0, "student_games": 25,
             "student_train_mean": 8.0, "student_train_std": 1.0},
            {"experiment": "cpu-imperfect", "method": "student-distill", "size": "smaller-512", "student_mean": 2.0, "student_std": 1.0,
             "student_train_mean": 4.0, "student_train_std": 1.0, "corrupted_teacher_mean": 1.0, "corrupted_teacher_std": 1.0,
             "corrupted_teacher_train_mean": 2.0, "corrupted_teacher_train_std": 1.0}]
    runs = pd.DataFrame([about | row for row in rows])
    assert report.cpu_table(runs, "procgen", "cpu-methods").splitlines()[2:] == [
        "| CoinrunEasy-v0 | unseen levels | 64 units | 5.00 ± 0.20 |  |  | 4.50 ± 0.60 (0.90) |",
        "| CoinrunEasy-v0 | training levels | 64 units | 8.00 ± 0.10 |  |  | 8.00 ± 0.10 (1.00) |"]
    assert report.cpu_table(runs, "procgen", "cpu-imperfect").splitlines()[2:] == [
        "| CoinrunEasy-v0 | unseen levels | 512 units | 5.00 ± 0.20 | 1.00 ± 0.10 (0.20) |  | 2.00 ± 0.10 (0.40) |  |",
        "| CoinrunEasy-v0 | training levels | 512 units | 8.00 ± 0.10 | 2.00 ± 0.10 (0.25) |  | 4.00 ± 0.10 (0.50) |  |"]
