"""Each script as a user runs it, for a few updates: what it leaves behind, that it repeats itself, stops and goes on."""

import csv
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import time

import envpool
import imageio.v3 as imageio
import jax
import numpy as np
import pytest
from conftest import PPD, ROOT, RUNS, STUDENTS, needs_procgen, on, small

import evaluate
import ppd_atari
import ppd_mujoco
import ppd_procgen
import student_distill
import teacher_distill
import train_teacher

BASELINES = (student_distill, teacher_distill)


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_timing(folder):
    return [{k: v for k, v in row.items() if k not in ("seconds", "charts/SPS")} for row in rows(folder)]


def flags_of(m, env_id, teachers):
    return {} if m is train_teacher else {"teacher": str(teachers(env_id))}


def model(folder, m):
    name = "teacher" if m is train_teacher else "student"
    return train_teacher.load_tree(folder / f"{name}.msgpack", "model")


@pytest.fixture
def strict_envpool(monkeypatch):
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

    monkeypatch.setattr(envpool, "make_gymnasium", checked)


@pytest.mark.parametrize(("m", "env_id"), RUNS)
def test_a_run_leaves_what_it_promises(m, env_id, tmp_path, teachers, capsys, strict_envpool):
    logging = {"log_every": 20} if m in BASELINES else {}
    numbers = m.main(small(m, env_id, tmp_path / "run", **flags_of(m, env_id, teachers), **logging))
    folder, role = tmp_path / "run", "teacher" if m is train_teacher else "student"
    files = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    checkpoints = {"checkpoint.msgpack", "checkpoint_previous.msgpack"}
    assert files == checkpoints | {"args.json", "progress.csv", f"{role}.msgpack", "results.json"}
    assert sum("tfevents" in path.name for path in folder.iterdir()) == 1

    table = rows(folder)
    assert [int(row["global_step"]) for row in table] == ([400, 800, 1000] if m in BASELINES else [64, 128, 192])
    metrics = {"charts/episodic_return", "charts/SPS", "losses/value_loss", "losses/entropy", "losses/loss", "losses/grad_norm",
               "losses/param_norm"}
    metrics |= {"losses/teacher_kl"} if m is not train_teacher else set()
    metrics |= {"losses/policy_loss", "losses/approx_kl", "losses/clipfrac"} if m not in BASELINES else set()
    metrics |= {"losses/distill_loss"} if m.__name__.startswith("ppd") else set()
    assert set(table[0]) == metrics | {"global_step", "seconds"}
    assert all(np.isfinite(float(row[name])) for row in table for name in metrics if name.startswith("losses"))
    if env_id == "Hopper-v4":
        assert np.isfinite(float(table[-1]["charts/episodic_return"]))

    args, results = (json.loads((folder / name).read_text()) for name in ("args.json", "results.json"))
    assert args["env_id"] == env_id and set(args["versions"]) == {"python", "jax", "flax", "envpool", "device"}
    episodes = 2 if env_id == "Hopper-v4" else 1
    players = {"teacher", "student"} - ({"student"} if m is train_teacher else set())
    for player in players:
        assert len(results[player]["returns"]) == episodes
        assert results[player]["mean"] == pytest.approx(np.mean(results[player]["returns"]))
        assert ("train_levels" in results[player]) == (env_id == "CoinrunEasy-v0")
        if env_id == "Pong-v5":
            assert results[player]["human_normalised"] == pytest.approx((results[player]["mean"] + 20.7) / 35.3)
    assert results["command"].startswith(f"python {m.__name__}.py --env-id {env_id} --seed 100 ")
    assert all(isinstance(value, float) for value in numbers.values())
    assert str(folder) in capsys.readouterr().out

    saved = model(folder, m)
    assert saved["role"] == role and saved["env_id"] == env_id
    assert str(tmp_path) not in json.dumps(saved["args"] | {"teacher": None})
    assert saved["evaluation"] == results[role]
    again = evaluate.main(evaluate.Args(model=str(folder / f"{role}.msgpack"), episodes=episodes, seed=100))
    assert again["mean"] == numbers[role]


@pytest.mark.parametrize(("m", "env_id"), RUNS)
def test_the_same_seed_gives_the_same_run_to_the_bit(m, env_id, tmp_path, teachers, monkeypatch):
    monkeypatch.setattr(m, "assess", lambda *args: {"mean": 0.0, "std": 0.0, "returns": [0.0], "train_levels": {"mean": 0.0, "std": 0.0}})
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        m.main(small(m, env_id, tmp_path / name, seed=seed, **flags_of(m, env_id, teachers)))
    assert without_timing(tmp_path / "a") == without_timing(tmp_path / "b") != without_timing(tmp_path / "c")
    a, b, c = (jax.tree.leaves(model(tmp_path / name, m)["params"]) for name in "abc")
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


def test_a_checkpoint_comes_back_to_the_bit(tmp_path, tiny_teacher):
    m = ppd_mujoco
    networks = m.Networks(m.Policy((8,), 3), m.Value((8,)), m.Policy((8, 8), 3))
    args = small(m, "Hopper-v4", tmp_path, teacher=str(tiny_teacher))
    state = m.init_state(args, networks, 11)
    m.save_tree(tmp_path / "x", "checkpoint", {"state": m.serialization.to_state_dict(state)})
    restored = m.serialization.from_state_dict(state, m.load_tree(tmp_path / "x", "checkpoint")["state"])
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert np.array_equal(x, y) and x.dtype == y.dtype


@pytest.mark.parametrize(("m", "env_id", "number"), [
    (train_teacher, "Hopper-v4", signal.SIGINT), (ppd_mujoco, "Hopper-v4", signal.SIGTERM), (ppd_atari, "Pong-v5", signal.SIGINT),
    pytest.param(ppd_procgen, "CoinrunEasy-v0", signal.SIGTERM, marks=needs_procgen),
    (student_distill, "Hopper-v4", signal.SIGTERM), (teacher_distill, "Pong-v5", signal.SIGINT)])
def test_a_signal_saves_and_the_run_goes_on(m, env_id, number, tmp_path, teachers, monkeypatch):
    folder = tmp_path / "run"
    args = small(m, env_id, folder, total_timesteps=10**6, **flags_of(m, env_id, teachers))
    flags = {name: value for name, value in vars(args).items() if value != m.Args.__dataclass_fields__[name].default}
    words = [word for name, value in flags.items()
             for word in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value]))]
    process = subprocess.Popen([sys.executable, f"{m.__name__}.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (folder / "progress.csv").exists() or len((folder / "progress.csv").read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number
    assert f"go on with: python {m.__name__}.py --resume {folder}" in message
    done = train_teacher.load_tree(folder / "checkpoint.msgpack", "checkpoint")
    batch = args.num_envs * args.num_steps
    assert int(rows(folder)[-1]["global_step"]) == done["updates"] * batch
    assert not (folder / "results.json").exists()

    before = [int(row["global_step"]) for row in rows(folder)]
    done["args"]["total_timesteps"] = (done["updates"] + 2) * batch  # the rest of a million steps would take long
    train_teacher.save_tree(folder / "checkpoint.msgpack", "checkpoint", done)
    last = list(rows(folder)[-1].values())
    with open(folder / "progress.csv", "a") as file:  # a row of an update after the checkpoint, which will be made again
        file.write(",".join([str((done["updates"] + 1) * batch), *last[1:]]) + "\n")
    starts, update = [], m.update

    def watched(*args):
        state = next(x for x in args if isinstance(x, m.TrainState))
        starts.append(np.array(getattr(state, "discounted", 0.0)))
        return update(*args)

    monkeypatch.setattr(m, "update", watched)
    m.main(m.Args(resume=str(folder)))
    if m not in BASELINES:
        assert np.asarray(done["state"]["discounted"]).any() or env_id != "Hopper-v4"
        assert not starts[0].any()  # the episodes it was of are gone with the simulator
        assert starts[1].any() or env_id != "Hopper-v4"  # which pays for every step
    after = [done["updates"] * batch + batch * i for i in ((2,) if m in BASELINES else (1, 2))]
    assert [int(row["global_step"]) for row in rows(folder)] == before + after
    assert json.loads((folder / "results.json").read_text())["seconds"] > done["timing"]["seconds"]
    if m not in BASELINES:  # the update that compiles anew says nothing of the speed
        assert float(rows(folder)[len(before)]["charts/SPS"]) == pytest.approx(done["timing"]["SPS"])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, tiny_teacher, monkeypatch):
    """From the second update on the rewards are NaN: the run ends there and the first update's checkpoint stays."""
    m, collect, calls = ppd_mujoco, ppd_mujoco.collect, []

    def spoiled(*args):
        rollout = collect(*args)
        calls.append(None)
        return rollout._replace(rewards=rollout.rewards * (np.nan if len(calls) > 1 else 1.0))

    monkeypatch.setattr(m, "collect", spoiled)
    with pytest.raises(SystemExit, match=r"update 2 gave losses/\w+ = nan; the last good state is .*checkpoint.msgpack"):
        m.main(small(m, "Hopper-v4", tmp_path / "run", teacher=str(tiny_teacher), checkpoint_every=1))
    assert m.load_tree(tmp_path / "run/checkpoint.msgpack", "checkpoint")["updates"] == 1
    assert len(rows(tmp_path / "run")) == 1


class Tracker:
    """What the scripts use of Weights & Biases, which needs an account."""

    Error = ValueError

    def __init__(self):
        self.rows, self.about, self.finished = [], None, False
        self.log = self.rows.append

    def init(self, **about):
        self.about = about
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "global_step")

    def finish(self):
        self.finished = True


def test_tracking_gets_what_progress_csv_gets(tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", tracker := Tracker())
    monkeypatch.setattr(ppd_mujoco.importlib.util, "find_spec", lambda name: True)
    ppd_mujoco.main(small(ppd_mujoco, "Hopper-v4", tmp_path / "run", teacher=str(tiny_teacher), track=True))
    assert tracker.finished and tracker.about["id"] == "run" and tracker.about["config"]["env_id"] == "Hopper-v4"
    written = [{k: float(v) for k, v in row.items() if v != "nan" and k != "seconds"} for row in rows(tmp_path / "run")]
    assert tracker.rows == written and len(written) == 3


def test_distill_coef_goes_linearly_to_its_end():
    args = ppd_mujoco.Args(distill_coef=2.0, distill_coef_final=1.0)
    assert [ppd_mujoco.distill_coef_at(args, x) for x in (0.0, 0.5, 1.0)] == [2.0, 1.5, 1.0]
    assert ppd_mujoco.distill_coef_at(ppd_mujoco.Args(distill_coef=2.0), 0.7) == 2.0


def test_a_corrupted_teacher_is_reproducible_and_noisy_everywhere(tiny_teacher, tmp_path):
    _, _, teacher = ppd_mujoco.load_policy(tiny_teacher)
    a, b, c = (jax.tree.leaves(ppd_mujoco.corrupt(teacher.params, 0.05, seed)) for seed in (0, 0, 1))
    noise = np.concatenate([np.ravel(x - y) for x, y in zip(a, jax.tree.leaves(teacher.params), strict=True)])
    assert (noise != 0).all() and abs(noise.std() - 0.05) < 0.01 and abs(noise.mean()) < 0.01
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(np.array_equal(x, y) for x, y in zip(a, c, strict=True))
    flags = dict(teacher=str(tiny_teacher), total_timesteps=64, teacher_noise_std=0.5)
    numbers = ppd_mujoco.main(small(ppd_mujoco, "Hopper-v4", tmp_path / "run", **flags))
    assert numbers["corrupted_teacher"] != numbers["teacher"]
    assert numbers["ratio"] == numbers["student"] / numbers["teacher"]


@pytest.mark.parametrize(("m", "env_id"), STUDENTS)
def test_imperfect_teachers_everywhere(m, env_id, tmp_path, teachers, monkeypatch):
    """A corrupted teacher teaches, and is evaluated beside the original; another seed gives another one."""
    players = []

    def assess(*args):
        players.append(next(jax.tree.leaves(x)[0] for x in args if isinstance(x, dict) or hasattr(x, "params")))
        return {"mean": float(len(players)), "std": 0.0, "returns": [0.0], "train_levels": {"mean": 0.0, "std": 0.0}}

    monkeypatch.setattr(m, "assess", assess)
    for seed in (0, 1):
        flags = {"teacher_noise_std": 0.05, "teacher_noise_seed": seed, "total_timesteps": 1}
        numbers = m.main(small(m, env_id, tmp_path / f"run{seed}", **flags_of(m, env_id, teachers), **flags))
        assert {"student", "teacher", "corrupted_teacher"} <= set(numbers)
    assert np.array_equal(players[1], players[4])  # the original
    assert not np.array_equal(players[2], players[1]) and not np.array_equal(players[2], players[5])


@pytest.mark.parametrize(("m", "env_id"), [*on(evaluate, "Hopper-v4", "Pong-v5", "CoinrunEasy-v0"), *PPD])
def test_evaluation_counts_the_first_episode_of_each_environment(m, env_id, teachers):
    """The same games played one by one, each alone, give the same returns; envpool seeds environment i with seed + i."""
    model, policy, frozen = m.load_policy(teachers(env_id))
    options = {ppd_mujoco: (), ppd_atari: (4, False), ppd_procgen: (0, 200, True), evaluate: ("evaluation", evaluate.Variant(4, 0, 200))}[m]
    stats = getattr(frozen, "obs_stats", None)
    if env_id == "Hopper-v4":
        policy_step = lambda x, t: m.act_deterministic(policy, frozen.params, stats, x)  # noqa: E731
    else:
        policy_step = lambda x, t: (x[:, 0, 20, 20].astype(np.int32) + t // 7) % 6  # noqa: E731
    together = m.evaluate(m.make_envs(env_id, 3, 7, *options), policy_step)
    alone = [m.evaluate(m.make_envs(env_id, 1, 7 + i, *options), policy_step)[0] for i in range(3)]
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_envpool_gives_phantoms_and_collect_marks_them():
    m, steps = ppd_mujoco, 60
    envs = m.make_envs("Hopper-v4", 3, 0)
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


@pytest.mark.parametrize(("m", "options"), [(ppd_atari, (4, True)), (train_teacher, ("training", train_teacher.Variant(4, 0, 200)))])
def test_a_whole_game_of_atlantis_under_life_loss_episodes(m, options):
    """No life is left before the game is over there. The return of a game is that of all its lives, and of no other game."""
    envs = m.make_envs("Atlantis-v5", 2, 3, *options)
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
    envs = m.make_envs("Breakout-v5", 4, 0, *((4, False) if m is ppd_atari else ("evaluation", evaluate.Variant(4, None, None))))
    envs.reset()
    rng, lost = np.random.default_rng(0), False
    for _ in range(2000):
        _, _, terminations, _, info = envs.step(rng.integers(0, 4, 4).astype(np.int32))
        lost |= (info["lives"] < 5).any() and not terminations.any()
        assert (info["lives"][terminations] == 0).all()
        if terminations.any():
            break
    assert lost and terminations.any()


@needs_procgen
@pytest.mark.parametrize("m", [ppd_procgen, evaluate])
@pytest.mark.parametrize(("unseen", "low", "high"), [(True, 200, 2**31), (False, 0, 199)])
def test_procgen_evaluates_on_the_levels_it_says(m, unseen, low, high):
    split = "evaluation" if unseen else "train_levels"
    options = (0, 200, unseen) if m is ppd_procgen else (split, m.Variant(None, 0, 200))
    envs, rng, levels = m.make_envs("JumperEasy-v0", 64, 0, *options), np.random.default_rng(0), set()
    levels |= set(envs.reset()[1]["level_seed"].tolist())
    for _ in range(300):
        levels |= set(envs.step(rng.integers(0, 15, 64).astype(np.int32))[4]["level_seed"].tolist())
    assert len(levels) > 50 and low <= min(levels) and max(levels) <= high


@pytest.mark.parametrize("env_id", ["Walker2d-v4", "Breakout-v5", pytest.param("StarpilotEasy-v0", marks=needs_procgen)])
def test_any_task_of_a_suite_has_sensible_defaults(env_id, tmp_path, monkeypatch):
    m = train_teacher
    monkeypatch.setattr(m, "assess", lambda *args: {"mean": 0.0, "std": 0.0, "returns": [0.0]})
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
def test_a_film_of_images_can_be_opened(env_id, shape, teachers, tmp_path):
    film = tmp_path / "film.gif"
    evaluate.main(evaluate.Args(model=str(teachers(env_id)), episodes=1, video=str(film), video_seconds=3.0))
    frames = imageio.imread(film)
    assert frames.shape[1:] == shape and len(frames) > 5 and frames.std() > 10


@pytest.mark.parametrize("script", ["train_teacher", "ppd_mujoco", "ppd_atari", "ppd_procgen", "student_distill", "teacher_distill",
                                    "evaluate"])
def test_help_is_documentation(script):
    began = time.time()
    text = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": "160"}, check=True).stdout
    assert time.time() - began < 20  # 4 seconds on an idle machine; a busy one takes longer
    assert "2407.15134" in text and "default: " in text
    if script.startswith("ppd"):
        assert all(f"{group} options" in text for group in ("Task", "Distillation", "PPO", "Output"))
        assert all(re.search(rf"--{flag}\b", text) for flag in ("distill-coef", "kl-direction", "teacher-noise-std", "gamma"))
        assert all(symbol in text for symbol in "λσαεγ")
