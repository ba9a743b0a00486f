"""Each script as a user runs it, for a few updates: what it leaves behind, that it repeats itself, stops and goes on.

There is one run of each script on each suite, which several tests look at. What test_shared_blocks.py holds to be one text
(`Run`, `collect`, `evaluate`, `corrupt` ...) is then tried with ppd_mujoco.py alone; ppd_gymnax.py has its own in test_gymnax.py.
"""

import contextlib
import ctypes
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import envpool
import imageio.v3 as imageio
import jax
import numpy as np
import pytest
import yaml
from conftest import (
    EVERYWHERE,
    PPD,
    ROOT,
    RUNS,
    checkpoints,
    first_call,
    go_on,
    needs_procgen,
    on,
    rows,
    small,
    small_gymnax,
    without_timing,
    words,
)
from tensorboardX.proto.event_pb2 import Event, SessionLog

import evaluate
import import_teacher
import ppd_atari
import ppd_beyond
import ppd_gymnax
import ppd_mujoco
import ppd_procgen
import student_distill
import teacher_distill
import train_teacher

BASELINES = (student_distill, teacher_distill)
SCRIPTS = [(train_teacher, "Hopper-v4"), (ppd_mujoco, "Hopper-v4"), (ppd_atari, "Pong-v5"),
           pytest.param(ppd_procgen, "CoinrunEasy-v0", marks=needs_procgen), (student_distill, "Hopper-v4"), (teacher_distill, "Hopper-v4")]
VARIANT = {"contact_forces": True, "frame_skip": 4, "repeat_action_probability": 0.0, "start_level": 0, "num_levels": 200}


def variant(env_id, **flags):
    """How a task is played, as a model file says it."""
    names = ("contact_forces",) if env_id.endswith("v4") else ("frame_skip", "repeat_action_probability") if env_id.endswith("v5") else (
        "start_level", "num_levels")
    return {name: VARIANT[name] for name in names} | flags


def steps(folder):
    return [int(row["global_step"]) for row in rows(folder)]


def flags_of(m, env_id, teachers):
    return {} if m is train_teacher else {"teacher": str(teachers(env_id))}


def model(folder, m):
    return m.read_file(folder / f"{'teacher' if m is train_teacher else 'student'}.safetensors")


def nothing(*args):
    """In place of an evaluation."""
    return {"mean": 0.0, "std": 0.0, "games": 1, "returns": [0.0], "train_levels": {"mean": 0.0, "std": 0.0}}


def state_of(m, args):
    return next(x for x in args if isinstance(x, m.TrainState))


@contextlib.contextmanager
def strict_envpool():
    """envpool as it is, but it refuses what it would end the process for, or accept without a word."""
    make = envpool.make_gymnasium

    def checked(env_id, num_envs, seed, **options):
        assert seed >= 0 and seed + num_envs <= 2**31 and options.get("noop_max", 30) >= 1
        envs = make(env_id, num_envs=num_envs, seed=seed, **options)
        step, space = envs.step, envs.action_space

        def checked_step(actions):
            assert actions.shape == (num_envs, *space.shape)
            if space.shape:
                assert (actions >= space.low).all() and (actions <= space.high).all()
            else:
                assert actions.dtype.kind == "i" and (actions >= 0).all() and (actions < space.n).all()
            return step(actions)

        envs.step = checked_step
        return envs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envpool, "make_gymnasium", checked)
        yield


@pytest.fixture(scope="session")
def finished(teachers, tmp_path_factory):
    """The run of a script on a task, from its command line on: folder, command, what main returned and what it printed."""
    made = {}

    def get(m, env_id):
        if (m, env_id) not in made:
            folder, output = tmp_path_factory.mktemp("finished") / "run", io.StringIO()
            logging = {"log_every": 20} if m in BASELINES else {}
            argv = [f"{m.__name__}.py", *words(small(m, env_id, folder, **flags_of(m, env_id, teachers), **logging))]
            with pytest.MonkeyPatch.context() as patch, strict_envpool(), contextlib.redirect_stdout(output):
                patch.setattr(sys, "argv", argv)
                numbers = m.main(m.parse_args(argv[1:]))
            made[m, env_id] = SimpleNamespace(folder=folder, numbers=numbers, output=output.getvalue(), command=shlex.join(["python", *argv]))
        return made[m, env_id]

    return get


@pytest.mark.parametrize(("m", "env_id"), RUNS)
def test_a_run_leaves_what_it_promises(m, env_id, finished):
    run, role = finished(m, env_id), "teacher" if m is train_teacher else "student"
    folder, table = run.folder, rows(run.folder)
    files = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    last = 1000 if m in BASELINES else 192
    kept = {f"checkpoint_{step:012d}.safetensors" for step in (0, last)} if m not in BASELINES else {path.name for path in checkpoints(folder)}
    assert files == kept | {"args.json", "progress.csv", f"{role}.safetensors", "results.json"} and len(kept) == 2
    assert sum("tfevents" in path.name for path in folder.iterdir()) == 1

    assert steps(folder) == ([400, 800, 1000] if m in BASELINES else [64, 128, 192])
    metrics = {"charts/episodic_return", "charts/SPS", "losses/value_loss", "losses/entropy", "losses/loss", "losses/grad_norm",
               "losses/param_norm"}
    metrics |= {"losses/teacher_kl"} if m is not train_teacher else set()
    metrics |= {"losses/policy_loss", "losses/approx_kl", "losses/clipfrac"} if m not in BASELINES else set()
    metrics |= {"losses/distill_loss", "charts/distill_coef"} if m.__name__.startswith("ppd") else set()
    assert set(table[0]) == metrics | {"global_step", "seconds"}
    assert all(np.isfinite(float(row[name])) for row in table for name in metrics if name.startswith("losses"))
    if env_id == "Hopper-v4":
        assert np.isfinite(float(table[-1]["charts/episodic_return"]))

    args, results = (json.loads((folder / name).read_text()) for name in ("args.json", "results.json"))
    assert args["env_id"] == env_id and set(args["versions"]) == {"python", "jax", "flax", "envpool", "device"}
    episodes = 2 if env_id == "Hopper-v4" else 1
    for player in {"teacher", role}:
        found = results[player]
        assert len(found["returns"]) == episodes and 1 <= found["games"] <= episodes
        assert found["mean"] == pytest.approx(np.mean(found["returns"])) and found["std"] == pytest.approx(np.std(found["returns"]))
        assert ("train_levels" in found) == (env_id == "CoinrunEasy-v0")
        if env_id == "Pong-v5":
            assert found["human_normalised"] == pytest.approx((found["mean"] + 20.7) / 35.3)
    assert results["command"] == run.command and results["script"] == m.__name__
    assert results["args"] | {"run_dir": str(folder)} == {name: value for name, value in args.items() if name != "versions"}
    assert all(isinstance(value, float) for value in run.numbers.values())
    assert str(folder) in run.output

    about, arrays = model(folder, m)
    assert about["role"] == role and about["env_id"] == env_id and about["variant"] == variant(env_id)
    assert about["evaluation"] == results[role] and about["network"] == results["network"]
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in arrays.values())
    assert str(folder) not in json.dumps(about | {"command": None})
    if m in BASELINES:  # their files are as those of the others
        evaluate.load_policy(str(folder / "student.safetensors"))
    else:
        again = evaluate.main(evaluate.Args(model=str(folder / f"{role}.safetensors"), episodes=episodes, seed=100))
        assert again["mean"] == run.numbers[role]


@pytest.mark.parametrize(("m", "env_id"), [
    *on(train_teacher, *EVERYWHERE), *on(ppd_mujoco, "Hopper-v4"), *on(ppd_procgen, "CoinrunEasy-v0"), *on(student_distill, "Hopper-v4")])
def test_the_same_seed_gives_the_same_run_to_the_bit(m, env_id, finished, tmp_path, teachers, monkeypatch):
    """In the same folder, so that nothing is compiled anew; another seed begins with other weights and in other games."""
    run, update, begun = finished(m, env_id), m.update, []
    before = run.folder.rename(tmp_path / "before")
    flags = flags_of(m, env_id, teachers) | ({"log_every": 20} if m in BASELINES else {})

    def watched(*args):
        rollout = next(x for x in args if isinstance(x, m.Rollout))
        begun.append((np.asarray(state_of(m, args).params["policy"]["params"]["Dense_0"]["kernel"]), rollout.observations[0].copy()))
        if args[0].seed != 100:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(m, "update", watched)
    monkeypatch.setattr(m, "assess", nothing)
    m.main(small(m, env_id, run.folder, **flags))
    with pytest.raises(KeyboardInterrupt):
        m.main(small(m, env_id, tmp_path / "other", seed=9999, **flags))
    run.folder.rename(tmp_path / "again")
    before.rename(run.folder)
    assert without_timing(tmp_path / "again") == without_timing(run.folder)
    one, again = (model(folder, m)[1] for folder in (run.folder, tmp_path / "again"))
    assert list(one) == list(again) and all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(begun[0][0], begun[-1][0])
    assert not np.array_equal(begun[0][1], begun[-1][1]) or env_id == "Pong-v5"  # all its games begin alike


def test_the_same_command_gives_the_same_run_to_the_bit_as_users_compile_it(tmp_path):
    """The other tests have XLA optimise less, and what it compiled is kept."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "ppd_mujoco.py", "--student-size", "smaller", "--total-timesteps", "3456", "--eval-episodes", "2", "--run-dir"]
    lives = [subprocess.Popen([*command, tmp_path / name], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for name in "ab"]
    assert [life.communicate(timeout=300) and life.returncode for life in lives] == [0, 0]
    assert without_timing(tmp_path / "a") == without_timing(tmp_path / "b") and len(rows(tmp_path / "a")) == 3
    (about, one), (_, other) = (model(tmp_path / name, ppd_mujoco) for name in "ab")
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert json.loads((tmp_path / "b/results.json").read_text())["student"] == about["evaluation"]


def test_tensorboard_gets_what_progress_csv_gets(finished):
    """By the time the run ends, all of it."""
    folder, found, begun = finished(ppd_mujoco, "Hopper-v4").folder, {}, []
    data = next(folder.glob("*tfevents*")).read_bytes()
    while data:
        size = struct.unpack("<Q", data[:8])[0]
        event, data = Event.FromString(data[12: 12 + size]), data[16 + size:]
        begun += [event.step] if event.session_log.status == SessionLog.START else []
        for value in event.summary.value:
            found.setdefault(event.step, {})[value.tag] = value.simple_value
    assert begun == [1] and len(found) == 3
    for row in rows(folder):
        expected = {name: float(value) for name, value in row.items() if value != "nan"}
        assert found[int(row["global_step"])] == pytest.approx(expected)


def test_a_checkpoint_comes_back_to_the_bit(tmp_path, tiny_teacher):
    m = ppd_mujoco
    networks = m.Networks(m.Policy((8,), 3), m.Value((8,)), m.Policy((8, 8), 3))
    state = m.init_state(small(m, "Hopper-v4", tmp_path), networks, 11)
    m.save_file(tmp_path / "x", {"seconds": 0.1 + 0.2, "text": "λ\n\""}, {"state": state})
    about, arrays = m.read_file(tmp_path / "x")
    assert about == {"format": m.FORMAT, "seconds": 0.1 + 0.2, "text": "λ\n\""}
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(m.fill(state, arrays, "state")), strict=True):
        assert np.array_equal(x, y) and x.dtype == y.dtype


# Stopping and going on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "env_id"), SCRIPTS)
def test_a_signal_saves_and_the_run_goes_on(m, env_id, tmp_path, teachers, monkeypatch, capsys):
    """A first one in the second of four updates, a second one in the evaluation."""
    folder, starts, seeds = tmp_path / "run", [], []
    update, assess, make_envs, start = m.update, m.assess, m.make_envs, m.start
    number = signal.SIGINT if m in (train_teacher, ppd_atari, teacher_distill) else signal.SIGTERM
    args = small(m, env_id, folder, **flags_of(m, env_id, teachers))
    batch = args.num_envs * args.num_steps

    def watched(*args):
        starts.append(jax.tree.map(np.array, state_of(m, args)))
        if len(starts) == 2:
            os.kill(os.getpid(), number)
        return update(*(x._replace(rewards=np.ones_like(x.rewards)) if isinstance(x, m.Rollout) else x for x in args))

    def begin_games(envs):
        cursor = start(envs)
        cursor.finished.extend([] if starts else [0.25])  # a game that the first life finished
        return cursor

    def interrupted(begin):
        with pytest.raises(SystemExit) as stopped:
            begin()
        assert stopped.value.code == 128 + number and not (folder / "results.json").exists()
        assert f"\ninterrupted; go on with: python {m.__name__}.py --resume {folder}\n" in capsys.readouterr().err

    monkeypatch.setattr(m, "update", watched)
    monkeypatch.setattr(m, "start", begin_games)
    monkeypatch.setattr(m, "make_envs", lambda env_id, n, seed, *rest, **flags: seeds.append(seed) or make_envs(env_id, n, seed, *rest, **flags))
    monkeypatch.setattr(sys, "argv", ["x.py", "--as", "typed"])
    interrupted(lambda: m.main(dataclasses.replace(args, total_timesteps=4 * batch)))
    monkeypatch.setattr(sys, "argv", ["x.py", "--resume"])
    before, (done, arrays) = steps(folder), m.read_file(checkpoints(folder)[-1])
    assert done["updates"] == 2 and before == ([2 * batch] if m in BASELINES else [batch, 2 * batch])
    with open(folder / "progress.csv", "a") as file:  # a row of an update after the checkpoint, which will be made again
        file.write(",".join([str(3 * batch), *list(rows(folder)[-1].values())[1:]]) + "\n")

    monkeypatch.setattr(m, "assess", lambda *args: os.kill(os.getpid(), number) or time.sleep(1))
    interrupted(lambda: go_on(m, folder))
    assert steps(folder) == before + ([4 * batch] if m in BASELINES else [3 * batch, 4 * batch])
    reset = {} if m in BASELINES else {"discounted": None}
    for where, x in jax.tree_util.tree_leaves_with_path(starts[2]._replace(key=None, **reset)):
        np.testing.assert_array_equal(x, arrays["state/" + jax.tree_util.keystr(where, simple=True, separator="/")])
    np.testing.assert_array_equal(starts[2].key, jax.random.split(arrays["state/key"])[0])
    assert not np.array_equal(starts[2].key, starts[1].key)
    assert seeds == [100, 100 + 2 * 4] and m.load_checkpoint(folder)[0]["finished"][0] == done["finished"][0] == 0.25
    if m not in BASELINES:
        assert arrays["state/discounted"].any() and starts[3].discounted.any()
        assert not starts[2].discounted.any()  # the episodes it was of are gone with the simulator
    # The update that compiles anew says nothing of the speed
    assert float(rows(folder)[len(before)]["charts/SPS"]) == pytest.approx(done["logged"]["SPS"])

    progress = (folder / "progress.csv").read_bytes()
    monkeypatch.setattr(m, "assess", assess)
    go_on(m, folder)
    results = json.loads((folder / "results.json").read_text())
    assert len(starts) == 4 and (folder / "progress.csv").read_bytes() == progress
    assert results["seconds"] > done["logged"]["seconds"] and results["command"] == "python x.py --as typed"


@pytest.mark.parametrize(("m", "whole"), [(ppd_mujoco, True), (ppd_mujoco, False), (train_teacher, True), (student_distill, True)])
def test_a_run_can_be_extended(m, whole, finished, tmp_path, monkeypatch):
    """A finished one, or one that stands at its beginning; its rows are then those of a run of that length.

    It is killed before it learns anything, and the next --resume knows of the extension.
    """
    folder = shutil.copytree(finished(m, "Hopper-v4").folder, tmp_path / "run")
    if not whole:
        checkpoints(folder)[-1].unlink()
    before, size = without_timing(folder), 20 if m in BASELINES else 64
    more = (80 if m in BASELINES else 5) * size
    monkeypatch.setattr(m, "assess", nothing)
    first_call(monkeypatch, m, "collect", lambda: go_on(m, folder, "--total-timesteps", more))
    go_on(m, folder)
    assert steps(folder) == (list(range(400, 1001, 400)) + [1000, 1200, 1600] if m in BASELINES else list(range(64, more + 1, 64)))
    assert without_timing(folder)[:len(before)] == before
    assert m.load_checkpoint(folder)[0]["updates"] * size == more
    assert json.loads((folder / "results.json").read_text())["args"]["total_timesteps"] == more
    assert json.loads((folder / "args.json").read_text())["total_timesteps"] == more


def test_a_run_goes_on_with_all_that_it_has_learned(tmp_path, tiny_teacher, monkeypatch):
    """Optimiser, statistics and random numbers, not the weights alone; it remembers the last games, and plays new ones."""
    m, begun, seeds = ppd_mujoco, [], []
    update, make_envs, collect = m.update, m.make_envs, m.collect
    monkeypatch.setattr(m, "assess", nothing)
    m.main(small(m, "Hopper-v4", tmp_path / "run", teacher=str(tiny_teacher)))
    about, arrays = m.read_file(checkpoints(tmp_path / "run")[-1])
    monkeypatch.setattr(m, "make_envs", lambda env_id, n, seed, *rest: seeds.append(seed) or make_envs(env_id, n, seed, *rest))
    monkeypatch.setattr(m, "collect", lambda envs, cursor, *rest: begun.append(list(cursor.finished)) or collect(envs, cursor, *rest))
    monkeypatch.setattr(m, "update", lambda *args: begun.append(jax.tree.map(np.array, state_of(m, args))) or update(*args))
    go_on(m, tmp_path / "run", "--total-timesteps", 4 * 64)
    finished, state = begun
    assert finished == about["finished"] and len(finished) > 0
    for where, x in jax.tree_util.tree_leaves_with_path(state._replace(key=None, discounted=None)):
        np.testing.assert_array_equal(x, arrays["state/" + jax.tree_util.keystr(where, simple=True, separator="/")])
    np.testing.assert_array_equal(state.key, jax.random.split(arrays["state/key"])[0])
    assert seeds == [100 + 3 * 4]


@pytest.mark.parametrize(("m", "env_id", "name", "expected"), [
    pytest.param(m, env_id, *rest, marks=[] if env_id == "Pong-v5" else [needs_procgen], id=f"{m.__name__}-{env_id}")
    for own, env_id, *rest in ((ppd_atari, "Pong-v5", "episodic_life", True), (ppd_procgen, "CoinrunEasy-v0", "start_level", 0))
    for m in (own, ppd_beyond, train_teacher, *BASELINES)])
def test_a_run_learns_from_single_lives_and_from_levels_of_training(m, env_id, name, expected, tmp_path, teachers, monkeypatch):
    """Unlike the evaluation."""
    taught = str(teachers(env_id))
    flags = {} if m is train_teacher else {"teacher": (taught,) if m is ppd_beyond else taught}
    _, options = first_call(monkeypatch, envpool, "make_gymnasium", lambda: m.main(small(m, env_id, tmp_path / "run", **flags)))
    assert options[name] == expected


@pytest.mark.parametrize("m", BASELINES)
def test_who_acts(m, tmp_path, tiny_teacher, monkeypatch):
    args = small(m, "Hopper-v4", tmp_path / "run", teacher=str(tiny_teacher))
    (_, policy, *_), _ = first_call(monkeypatch, m, "act_on_states", lambda: m.main(args))
    assert policy.network.hidden == ((8, 8) if m is teacher_distill else (8,))


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax])
def test_two_runs_that_begin_in_the_same_second(m, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(m.time, "time", lambda: 1.5)
    args = m.resolve(m.Args(env_id="Hopper-v4" if m is ppd_mujoco else "CartPole-v1"))
    name = f"{args.env_id}__{m.__name__}__larger__100__1"
    runs = [m.Run(args, None) for _ in range(2)]
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [name, f"{name}_{os.getpid()}"] == [run.folder.name for run in runs]
    for run in runs:
        run.close()
        assert {path.name.split(".")[0] for path in run.folder.iterdir()} == {"args", "progress", "tfevents" if m is ppd_gymnax else "events"}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, tiny_teacher, monkeypatch):
    """From the second update on the rewards are NaN: the run ends there and the first update's checkpoint stays."""
    m, collect, calls = ppd_mujoco, ppd_mujoco.collect, []

    def spoiled(*args):
        rollout = collect(*args)
        calls.append(None)
        return rollout._replace(rewards=rollout.rewards * (np.nan if len(calls) > 1 else 1.0))

    monkeypatch.setattr(m, "collect", spoiled)
    with pytest.raises(SystemExit, match=r"update 2 gave losses/\w+ = nan; the last good state is in .*run"):
        m.main(small(m, "Hopper-v4", tmp_path / "run", teacher=str(tiny_teacher), checkpoint_every=1))
    assert m.load_checkpoint(tmp_path / "run")[0]["updates"] == 1 and len(rows(tmp_path / "run")) == 1


class Tracker:
    """What the scripts use of Weights & Biases, which needs an account.

    As there, rows of a run have growing steps: one whose step is not above the last is left out, also when the run goes on.
    """

    def __init__(self):
        self.runs, self.about, self.ignored, self.finished = {}, [], [], 0

    def init(self, **about):
        assert about["resume"] == "allow"
        self.id = about["id"] or f"made{len(self.runs)}"
        self.runs.setdefault(self.id, {})
        self.about.append(about)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "global_step")

    def log(self, row, step, commit):
        assert commit  # or it would wait for the next step, and a kill would lose it
        if step <= max(self.rows_by_step, default=-1):
            self.ignored.append(step)
        else:
            self.rows_by_step[step] = row

    @property
    def rows_by_step(self):
        return self.runs[self.id]

    @property
    def rows(self):
        return list(self.rows_by_step.values())

    def finish(self):
        self.finished += 1


@pytest.fixture
def tracker(monkeypatch):
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    monkeypatch.setattr(ppd_mujoco.importlib.util, "find_spec", lambda name: True)
    return tracker


def test_tracking_gets_what_progress_csv_gets(tmp_path, tiny_teacher, tracker):
    ppd_mujoco.main(small(ppd_mujoco, "Hopper-v4", tmp_path / "run", teacher=str(tiny_teacher), track=True))
    about, = tracker.about
    assert tracker.finished == 1 and about["name"] == "run" and about["id"] is None  # W&B makes one
    assert about["config"]["env_id"] == "Hopper-v4"
    written = [{k: float(v) for k, v in row.items() if v != "nan"} for row in rows(tmp_path / "run")]
    assert tracker.rows == written and len(written) == 3


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax])
def test_tracking_that_fails_leaves_no_folder(m, tmp_path, tiny_teacher, tracker, monkeypatch, capsys):
    monkeypatch.setattr(tracker, "init", lambda **_: 1 / 0)
    folder = tmp_path / "run"
    args = small_gymnax(folder, track=True) if m is ppd_gymnax else small(m, "Hopper-v4", folder, teacher=str(tiny_teacher), track=True)
    with pytest.raises(SystemExit) as ended:
        m.main(args)
    assert ended.value.code == 2 and "error: --track: ZeroDivisionError" in capsys.readouterr().err
    assert not folder.exists()


class Killed(BaseException):
    """In place of SIGKILL."""


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax])
def test_tracking_gets_no_row_twice(m, tmp_path, tiny_teacher, tracker, monkeypatch):
    """Of a run that is killed three rows after its checkpoint, goes on from there, and is killed again before it has another one."""
    flags = {"track": True} | ({"num_parts": 4} if m is ppd_gymnax else {
        "teacher": str(tiny_teacher), "total_timesteps": 9 * 64, "checkpoint_every": 4})
    make = small_gymnax if m is ppd_gymnax else partial(small, m, "Hopper-v4")
    m.main(make(tmp_path / "whole", **flags))
    whole, log, save, logged = tracker.rows_by_step, m.Run.log, m.Run.save, []

    def killing(*args):
        log(*args)
        logged.append(None)
        if len(logged) in (7, 10):
            raise Killed

    folder = tmp_path / "killed"
    monkeypatch.setattr(m.Run, "log", killing)
    monkeypatch.setattr(m.Run, "save", lambda *args: save(*args) if len(logged) in (0, 4) else None)
    with pytest.raises(Killed):
        m.main(make(folder, **flags))
    with pytest.raises(Killed):
        go_on(m, folder)
    go_on(m, folder)
    ids = [about["id"] for about in tracker.about]
    assert ids == [None, None, tracker.id, tracker.id] and len(tracker.runs) == 2
    assert tracker.ignored == list(whole)[4:7] * 2 and list(tracker.rows_by_step) == list(whole)
    assert [row["global_step"] for row in tracker.rows] == [row["global_step"] for row in whole.values()]
    assert len(rows(folder)) == len(rows(tmp_path / "whole")) == len(whole)


# Imperfect teachers ----------------------------------------------------------------------------------------------------


def test_distill_coef_goes_linearly_to_its_end():
    args = ppd_mujoco.Args(distill_coef=2.0, distill_coef_final=1.0)
    assert [ppd_mujoco.distill_coef_at(args, x) for x in (0.0, 0.5, 1.0)] == [2.0, 1.5, 1.0]
    assert ppd_mujoco.distill_coef_at(ppd_mujoco.Args(distill_coef=2.0), 0.7) == 2.0


def test_a_teacher_of_another_task_with_the_same_shapes_is_a_prior(tmp_path, capsys):
    """A line says so; statistics and variant are the teacher's, the task is the student's."""
    teacher = ppd_mujoco.load_teacher(ppd_mujoco.Args(env_id="Walker2d-v4", teacher=str(ROOT / "teachers/HalfCheetah-v4__100.safetensors")))
    assert capsys.readouterr().err.endswith("is a teacher of HalfCheetah-v4, a prior of skills for Walker2d-v4\n")
    assert teacher.about["env_id"] == "Walker2d-v4" and teacher.params["obs_stats"].mean.shape == (17,)


def test_a_corrupted_teacher_is_reproducible_and_noisy_everywhere(tiny_teacher, tmp_path):
    params = ppd_mujoco.load_teacher(ppd_mujoco.Args(teacher=str(tiny_teacher))).params["policy"]
    a, b, c = (jax.tree.leaves(ppd_mujoco.corrupt(params, 0.05, seed)) for seed in (0, 0, 1))
    noise = np.concatenate([np.ravel(x - y) for x, y in zip(a, jax.tree.leaves(params), strict=True)])
    assert (noise != 0).all() and abs(noise.std() - 0.05) < 0.01 and abs(noise.mean()) < 0.01
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(np.array_equal(x, y) for x, y in zip(a, c, strict=True))
    flags = dict(teacher=str(tiny_teacher), total_timesteps=64, teacher_noise_std=0.5)
    numbers = ppd_mujoco.main(small(ppd_mujoco, "Hopper-v4", tmp_path / "run", **flags))
    assert numbers["corrupted_teacher"] != numbers["teacher"]
    assert numbers["ratio"] == numbers["student"] / numbers["teacher"]


@pytest.mark.parametrize(("m", "env_id"), SCRIPTS[1:])
def test_imperfect_teachers_everywhere(m, env_id, tmp_path, teachers, monkeypatch):
    """A corrupted teacher teaches, and is evaluated beside the original; another seed gives another one."""
    taught, players = [], []

    def first(tree):
        return np.asarray(jax.tree.leaves(tree)[0])

    def update(*args):
        taught.append(first(args[2]["policy"]))
        return state_of(m, args), {"losses/teacher_kl": 1.0}

    def assess(args, variant, policy, player):
        players.append(first(player["policy"]))
        return nothing()

    acting, collect = [], m.collect
    monkeypatch.setattr(m, "collect", lambda envs, cursor, policy_step, *rest: acting.append(policy_step) or collect(envs, cursor, policy_step, *rest))
    monkeypatch.setattr(m, "update", update)
    monkeypatch.setattr(m, "assess", assess)
    for seed in (0, 1):
        flags = {"teacher_noise_std": 0.05, "teacher_noise_seed": seed, "total_timesteps": 1}
        numbers = m.main(small(m, env_id, tmp_path / f"run{seed}", **flags_of(m, env_id, teachers), **flags))
        assert {"student", "teacher", "corrupted_teacher"} <= set(numbers)
    original = first({name: x for name, x in m.read_file(teachers(env_id))[1].items() if name.startswith("policy/")})
    assert np.array_equal(players[1], original) and np.array_equal(players[4], original)
    assert np.array_equal(players[2], taught[0]) and np.array_equal(players[5], taught[1])
    if m is teacher_distill:  # who acts is who teaches
        assert all(np.array_equal(first(act.args[2]), noisy) for act, noisy in zip(acting, taught, strict=True))
    assert not np.array_equal(players[2], players[1]) and not np.array_equal(players[2], players[5])


# Evaluation and environments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "env_id"), on(evaluate, "Hopper-v4", "Breakout-v5", "CoinrunEasy-v0"))
def test_evaluation_counts_the_first_episode_of_each_environment(m, env_id, teachers):
    """The same games played one by one give the same returns: environment i has seed + i, but Procgen's the i-th level of a seed."""
    if env_id == "Hopper-v4":
        policy, params = m.load_policy(str(teachers(env_id)))[1:]
        policy_step = lambda x, t: m.act_deterministic(policy, params["policy"], params["obs_stats"], x)  # noqa: E731
    elif env_id == "CoinrunEasy-v0":
        policy_step = lambda x, t: np.full(len(x), 7 if t % 9 < 7 else 5)  # noqa: E731  # to the right, mostly
    else:
        policy_step = lambda x, t: (x.astype(np.int64).sum((1, 2, 3)) + t // 7) % 4  # noqa: E731
    together = m.evaluate(m.make_envs(env_id, 3, 7, variant(env_id), "evaluation"), policy_step)
    seeds = [(1 + i, 7) if env_id == "CoinrunEasy-v0" else (1, 7 + i) for i in range(3)]
    alone = [m.evaluate(m.make_envs(env_id, *each, variant(env_id), "evaluation"), policy_step)["returns"][-1] for each in seeds]
    assert len(set(alone)) > 1
    np.testing.assert_allclose(together["returns"], alone, rtol=1e-4)
    assert together["mean"] == pytest.approx(np.mean(alone), rel=1e-4) and together["std"] == pytest.approx(np.std(alone), rel=1e-3)


def test_evaluation_says_how_many_games_differ(monkeypatch):
    """Four environments of which the first and the last see the same; what comes after an episode's end does not count.

    The third goes on for longer than the others, which see something, and get rewards, meanwhile.
    """
    ended = []
    monkeypatch.setattr(ppd_mujoco, "trange", lambda total, **_: SimpleNamespace(update=ended.append, close=lambda: ended.append(total)))

    class Envs:
        action_space = SimpleNamespace(low=-1.0, high=1.0, dtype=np.float32)
        seen = np.array([[0, 1, 2, 0], [5, 5, 5, 5], [6, 6, 7, 8], [9, 9, 9, 9]], np.float32)[..., None]

        def reset(self):
            self.t = 0
            return self.seen[0], {}

        def step(self, actions):
            self.t += 1
            ends = np.array([self.t == 2, self.t == 2, self.t == 3, self.t == 2])
            return self.seen[self.t], np.ones(4, np.float32), ends, np.zeros(4, bool), {}

        def close(self):
            pass

    found = ppd_mujoco.evaluate(Envs(), lambda x, t: np.zeros((4, 1), np.float32))
    assert found == {"mean": 2.25, "std": pytest.approx(0.1875**0.5), "games": 3, "returns": [2.0, 2.0, 3.0, 2.0]}
    assert ended == [0, 3, 1, 4]  # the bar of a terminal


def test_envpool_gives_phantoms_and_collect_marks_them():
    m, steps = ppd_mujoco, 60
    envs = m.make_envs("Hopper-v4", 3, 0, variant("Hopper-v4"))
    cursor = m.start(envs)
    first = m.collect(envs, cursor, lambda observations, t: np.full((3, 3), 0.9 * (-1) ** t, np.float32), steps)
    dones = first.terminations | first.truncations
    assert dones.any() and not first.phantoms[0].any()
    assert (first.phantoms[1:] == dones[:-1]).all()
    assert not first.rewards[first.phantoms].any() and not dones[first.phantoms].any()
    assert len(cursor.finished) == dones.sum()
    cursor.dones[:] = [True, False, False]  # the flag crosses into the next rollout
    second = m.collect(envs, cursor, lambda observations, t: np.zeros((3, 3), np.float32), 1)
    assert second.phantoms.tolist() == [[True, False, False]]
    assert np.array_equal(second.observations[0], first.observations[-1])


def random_actions(rng, actions, envs):
    return lambda observations, t: rng.integers(0, actions, envs).astype(np.int32)


@pytest.mark.parametrize(("m", "last"), [(ppd_atari, True), (train_teacher, "training")])
def test_a_whole_game_of_atlantis_under_life_loss_episodes(m, last):
    """No life is left before the game is over there. The return of a game is that of all its lives, and of no other game."""
    envs = m.make_envs("Atlantis-v5", 2, 3, variant("Atlantis-v5"), last)
    seen, step = [], envs.step

    def watched(actions):
        observations, rewards, *flags, info = step(actions)
        seen.append((rewards, info["terminated"].astype(bool), info["lives"]))
        return observations, rewards, *flags, info

    envs.step = watched
    cursor, act, lost = m.start(envs), random_actions(np.random.default_rng(0), 4, 2), 0
    while sum(over.sum() for _, over, _ in seen) < 2:
        lost += m.collect(envs, cursor, act, 500).terminations.sum()
    rewards, over, lives = (np.array(x) for x in zip(*seen, strict=True))
    assert lost > over.sum() and ((lives == 0) & ~over).any()  # where an end would be counted too early
    expected = []
    for n in range(2):
        ends = np.flatnonzero(over[:, n])
        expected += [rewards[begin + 1: end + 1, n].sum() for begin, end in zip([-1, *ends[:-1]], ends, strict=True)]
    assert sorted(cursor.finished) == pytest.approx(sorted(expected))


@pytest.mark.parametrize("m", [ppd_atari, evaluate])
def test_evaluation_on_atari_never_ends_with_a_life(m):
    """Breakout has five lives: its first termination comes with the last of them."""
    envs = m.make_envs("Breakout-v5", 4, 0, variant("Breakout-v5"), *([] if m is ppd_atari else ["evaluation"]))
    envs.reset()
    rng, lost = np.random.default_rng(0), False
    for _ in range(2000):
        _, _, terminations, _, info = envs.step(rng.integers(0, 4, 4).astype(np.int32))
        lost |= (info["lives"] < 5).any() and not terminations.any()
        assert (info["lives"][terminations] == 0).all()
        if terminations.any():
            break
    assert lost and terminations.any()


@pytest.mark.parametrize(("m", "env_id"), [*PPD, *on(train_teacher, *EVERYWHERE), *on(evaluate, *EVERYWHERE)])
def test_what_an_evaluation_plays(m, env_id, monkeypatch):
    """Games of seeds that training does not have; on Procgen unseen levels, apart from them those of training, and sampled actions."""
    made, mode, procgen = [], variant(env_id), env_id == "CoinrunEasy-v0"
    monkeypatch.setattr(m, "make_envs", lambda *args: made.append(args) or args)
    monkeypatch.setattr(m, "evaluate", lambda envs, policy_step: {"mean": 1.0, "envs": envs, "acts": policy_step(None, 0)})
    for name in ("act_deterministic", "act_sampled"):
        monkeypatch.setattr(m, name, lambda *args, name=name: name, raising=False)
    params = {"policy": None, "obs_stats": None}
    if m is evaluate:
        found = m.assess({"env_id": env_id, "suite": m.suite_of(env_id), "variant": mode}, None, params, 5, 7)
    else:
        found = m.assess(m.Args(env_id=env_id, seed=7, eval_episodes=5), mode, None, params)
    splits = {ppd_mujoco: [()], ppd_atari: [()], ppd_procgen: [(True,), (False,)]}.get(m, [("evaluation",), ("train_levels",)])
    expected = [(env_id, 5, 10**9 + 7, mode, *split) for split in splits[:1 + procgen]]
    played = [found, found["train_levels"]] if procgen else [found]
    assert made == expected == [each["envs"] for each in played]
    assert {each["acts"] for each in played} == {"act_sampled" if procgen else "act_deterministic"}


@needs_procgen
@pytest.mark.parametrize("m", [ppd_procgen, evaluate])
@pytest.mark.parametrize(("unseen", "low", "high"), [(True, 200, 2**31), (False, 0, 199)])
def test_procgen_evaluates_on_the_levels_it_says(m, unseen, low, high):
    split = unseen if m is ppd_procgen else "evaluation" if unseen else "train_levels"
    envs, rng, levels = m.make_envs("JumperEasy-v0", 64, 0, variant("JumperEasy-v0"), split), np.random.default_rng(0), set()
    levels |= set(envs.reset()[1]["level_seed"].tolist())
    for _ in range(300):
        levels |= set(envs.step(rng.integers(0, 15, 64).astype(np.int32))[4]["level_seed"].tolist())
    assert len(levels) > 50 and low <= min(levels) and max(levels) <= high


@pytest.mark.parametrize("env_id", ["Walker2d-v4", "Breakout-v5", pytest.param("StarpilotEasy-v0", marks=needs_procgen)])
def test_any_task_of_a_suite_has_sensible_defaults(env_id, tmp_path, monkeypatch):
    m = train_teacher
    monkeypatch.setattr(m, "assess", nothing)
    args = m.resolve(m.Args(env_id=env_id))
    assert args.num_envs * args.num_steps / args.num_minibatches == 512
    assert np.isfinite(m.main(small(m, env_id, tmp_path / "run", total_timesteps=64))["SPS"])


def test_a_film_of_mujoco_can_be_opened(tiny_teacher, tmp_path):
    """In a process of its own, as OpenGL must be there before envpool is."""
    for library in ("libGLdispatch.so.0", "libEGL.so.1", "libOpenGL.so.0"):
        try:
            ctypes.CDLL(library)
        except OSError:
            pytest.skip(f"filming MuJoCo needs {library}: apt-get install libegl1 libopengl0 libgl1-mesa-dri")
    film = tmp_path / "film.gif"
    subprocess.run([sys.executable, "evaluate.py", tiny_teacher, "--episodes", "1", "--video", film, "--video-seconds", "0.2"],
                   cwd=ROOT, check=True, capture_output=True, timeout=300)
    frames = imageio.imread(film)
    assert frames.shape == (5, 480, 480, 3) and frames.std() > 10 and (frames[0] != frames[-1]).any()


@pytest.mark.parametrize(("env_id", "shape"), [("Pong-v5", (210, 160, 3)),
                                               pytest.param("CoinrunEasy-v0", (64, 64, 3), marks=needs_procgen)])
def test_a_film_of_images_can_be_opened(env_id, shape, teachers, tmp_path, monkeypatch):
    film = tmp_path / "film.gif"
    monkeypatch.setattr(evaluate, "assess", nothing)
    evaluate.main(evaluate.Args(model=str(teachers(env_id)), episodes=1, video=str(film), video_seconds=3.0))
    frames = imageio.imread(film)
    assert frames.shape[1:] == shape and len(frames) > 5 and frames.std() > 10


@pytest.mark.parametrize("rate", [15.0, 1 / 0.045])  # of Atari and Procgen, of Humanoid: no whole hundredths of a second
def test_a_gif_lasts_as_long_as_its_frames(rate, tmp_path):
    frames = [np.full((8, 8, 3), 10 * i, np.uint8) for i in range(20)]
    evaluate.write_video(tmp_path / "film.gif", frames, rate)
    shown = [imageio.immeta(tmp_path / "film.gif", index=i)["duration"] for i in range(20)]
    assert sum(shown) == pytest.approx(20_000 / rate, abs=5.0) and max(shown) - min(shown) <= 10


@pytest.mark.parametrize("env_id", ["Pong-v5", pytest.param("CoinrunEasy-v0", marks=needs_procgen)])
def test_a_model_card_says_what_was_measured(env_id, teachers, tmp_path, monkeypatch, capsys):
    """The folder has all that a model hub shows, and the model in it is the model."""
    levels = {"train_levels": {"mean": 4.25, "std": 2.0, "games": 2, "returns": [2.25, 6.25]}} if env_id.startswith("Coinrun") else {}
    measured = {"mean": -1.5, "std": 0.5, "games": 1, "returns": [-1.0, -2.0]} | levels
    monkeypatch.setattr(evaluate, "assess", lambda *_: measured)
    card = tmp_path / "card"
    sticky = {"repeat_action_probability": 0.25} if env_id == "Pong-v5" else {}
    args = evaluate.Args(model=str(teachers(env_id)), episodes=2, card=str(card), video_seconds=0.5, seed=7, **sticky)
    evaluate.main(args)
    assert {path.name for path in card.iterdir()} == {"README.md", "model.safetensors", "evaluation.json", "replay.gif"}
    assert (card / "model.safetensors").read_bytes() == teachers(env_id).read_bytes()
    assert json.loads((card / "evaluation.json").read_text()).items() >= measured.items()
    assert imageio.imread(card / "replay.gif").std() > 10
    _, head, text = (card / "README.md").read_text().split("---\n", 2)
    model, = yaml.safe_load(head)["model-index"]
    result, = model["results"]
    assert result["metrics"] == [{"type": "mean_reward", "name": "mean_reward", "value": "-1.50 +/- 0.50", "verified": False}]
    assert result["dataset"] == {"type": env_id, "name": env_id} and env_id in yaml.safe_load(head)["tags"]
    flags = " --repeat-action-probability 0.25" if sticky else ""
    assert f"python evaluate.py model.safetensors --episodes 2 --seed 7{flags}\n" in text and "| -1.5 ± 0.5 | 2 | 1 |" in text
    assert ("| those of training | 4.2 ± 2.0 | 2 | 2 |" in text) == bool(levels)
    with pytest.raises(SystemExit):
        evaluate.main(args)
    assert "exists" in capsys.readouterr().err


def test_a_model_of_another_version_of_the_environments_is_told_apart():
    """Procgen's images of envpool 1.2.5 are not those of 1.2.7, so returns differ."""
    here = metadata.version("envpool")
    assert evaluate.other_version({"versions": {"envpool": "0.1\x1b"}}) == f", with envpool 0.1  instead of {here}"
    for about in ({"versions": {"envpool": here}}, {"versions": {"gymnax": "0.1"}}, {"versions": "envpool"}, {}):
        assert evaluate.other_version(about) == ""
    assert "gymnax 0.1 instead of" in evaluate.other_version({"library": "gymnax", "versions": {"gymnax": "0.1"}})


def test_what_a_model_says_of_its_task_is_all_that_reaches_the_simulator(tiny_teacher, monkeypatch):
    about, arrays = ppd_mujoco.read_file(tiny_teacher)
    about = about | {"variant": about["variant"] | {"noop_max": 0}, "command": "two\nlines \x1b[31m"}
    monkeypatch.setattr(evaluate, "read_file", lambda path: (about, arrays))
    read = evaluate.load_policy("model.safetensors")[0]
    assert set(read["variant"]) == {"contact_forces"} and read["title"].endswith("two lines  [31m")


@pytest.mark.parametrize(("env_id", "rate"), [("CartPole-v1", 25.0), ("Acrobot-v1", 5.0)])
def test_a_film_of_gymnax_has_the_time_of_its_simulation(env_id, rate, monkeypatch):
    """CartPole has steps of 0.02 s, of which every second is drawn, Acrobot of 0.2 s."""
    envs = evaluate.GymnaxEnvs(env_id, 1, 0)
    monkeypatch.setattr(envs, "render", lambda env_ids: [np.zeros((2, 2, 3), np.uint8)], raising=False)
    monkeypatch.setattr(evaluate, "open_envs", lambda *_, **__: envs)
    monkeypatch.setattr(evaluate, "make_policy_step", lambda *_: lambda observations, t: np.zeros(1, np.int32))
    frames, found = evaluate.film({"env_id": env_id, "suite": "states", "library": "gymnax"}, None, None, 0, 1.0)
    assert found == pytest.approx(rate) and len(frames) > 1


def test_a_model_card_is_not_written_by_the_model(tiny_teacher, tmp_path, monkeypatch):
    """Lines and fences in what a file says of itself stay within their place."""
    about, arrays = ppd_mujoco.read_file(tiny_teacher)
    about |= {"command": "x\n```\n---\n# Bad", "role": "a\n---\nlicense: none"}
    measured = {"mean": 0.0, "std": 0.0, "games": 1, "returns": [0.0]}
    args = evaluate.Args(model=str(tiny_teacher), card=str(tmp_path / "card"))
    evaluate.write_card(tmp_path / "card", args, about | {"suite": "mujoco"}, measured, ([np.zeros((8, 8, 3), np.uint8)] * 2, 25.0))
    lines = (tmp_path / "card/README.md").read_text().splitlines()
    assert lines.count("---") == 2 and lines.count("```") == 4 and not any(line.startswith(("# Bad", "license")) for line in lines)


# The command line ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [train_teacher, ppd_mujoco, ppd_atari, ppd_procgen, student_distill, teacher_distill, ppd_gymnax, evaluate,
                               import_teacher])
def test_help_is_documentation(m, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    with pytest.raises(SystemExit) as stopped:
        evaluate.tyro.cli(m.Args, args=["--help"], description=m.__doc__) if m in (evaluate, import_teacher) else m.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "2407.15134" in text and "default: " in text
    if m.__name__.startswith("ppd"):
        assert all(re.search(rf"--{flag}\b", text) for flag in ("distill-coef", "kl-direction", "teacher-noise-std", "gamma"))
        assert all(symbol in text for symbol in "λσαεγ")


@pytest.mark.parametrize("script", ["ppd_mujoco.py", "ppd_gymnax.py", "evaluate.py"])
def test_help_that_nobody_reads_to_its_end_says_nothing_more(script):
    """Written as it comes, by -u: what stays in Python's buffer until the end is beyond a script."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([sys.executable, "-u", script, "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_help_comes_quickly():
    began = time.time()
    text = subprocess.run([sys.executable, "ppd_mujoco.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert time.time() - began < 20 and "--distill-coef" in text  # 4 seconds on an idle machine; a busy one takes longer
