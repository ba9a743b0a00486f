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

import imageio.v3 as imageio
import jax
import numpy as np
import pytest
from conftest import ROOT

import evaluate
import ppd_mujoco
import train_teacher


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_timing(folder):
    return [{k: v for k, v in row.items() if k not in ("seconds", "charts/SPS")} for row in rows(folder)]


def small(m, folder, **flags):
    """The smallest run with three updates that reaches an episode's end."""
    defaults = dict(env_id="Hopper-v4", total_timesteps=3 * 4 * 16, num_envs=4, num_steps=16, eval_episodes=2)
    if m is train_teacher:
        defaults["hidden"] = (8, 8)
    else:
        defaults["student_hidden"] = (8,)
    return m.Args(run_dir=str(folder), **(defaults | flags))


def model(folder, m):
    name = "teacher" if m is train_teacher else "student"
    return train_teacher.load_tree(folder / f"{name}.msgpack", "model")


@pytest.mark.parametrize("m", [train_teacher, ppd_mujoco])
def test_a_run_leaves_what_it_promises(m, tmp_path, tiny_teacher, capsys):
    flags = {"teacher": str(tiny_teacher)} if m is ppd_mujoco else {}
    numbers = m.main(small(m, tmp_path / "run", **flags))
    folder, role = tmp_path / "run", "teacher" if m is train_teacher else "student"
    files = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    assert files == {"args.json", "progress.csv", "checkpoint.msgpack", f"{role}.msgpack", "results.json"}
    assert sum("tfevents" in path.name for path in folder.iterdir()) == 1

    table = rows(folder)
    assert [int(row["global_step"]) for row in table] == [64, 128, 192]
    metrics = {"charts/episodic_return", "charts/SPS", "losses/policy_loss", "losses/value_loss", "losses/entropy",
               "losses/approx_kl", "losses/clipfrac", "losses/loss"}
    metrics |= {"losses/distill_loss", "losses/teacher_kl"} if m is ppd_mujoco else set()
    assert set(table[0]) == metrics | {"global_step", "seconds"}
    assert all(np.isfinite(float(row[name])) for row in table for name in metrics if name.startswith("losses"))
    assert np.isfinite(float(table[-1]["charts/episodic_return"]))

    args, results = (json.loads((folder / name).read_text()) for name in ("args.json", "results.json"))
    assert args["num_minibatches"] == 1 and set(args["versions"]) == {"python", "jax", "flax", "envpool", "device"}
    assert len(results[role]["returns"]) == 2 and results[role]["mean"] == pytest.approx(np.mean(results[role]["returns"]))
    assert results["command"].startswith(f"python {m.__name__}.py --env-id Hopper-v4 --seed 100 ")
    assert all(isinstance(value, float) and np.isfinite(value) for value in numbers.values())
    assert str(folder) in capsys.readouterr().out

    saved = model(folder, m)
    assert saved["role"] == role and saved["env_id"] == "Hopper-v4" and str(tmp_path) not in json.dumps(saved["args"] | {"teacher": None})
    assert saved["evaluation"] == results[role]
    assert evaluate.main(evaluate.Args(model=str(folder / f"{role}.msgpack"), episodes=2, seed=100))["mean"] == numbers[role]


@pytest.mark.parametrize("m", [train_teacher, ppd_mujoco])
def test_the_same_seed_gives_the_same_run_to_the_bit(m, tmp_path, tiny_teacher):
    flags = {"teacher": str(tiny_teacher)} if m is ppd_mujoco else {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        m.main(small(m, tmp_path / name, seed=seed, **flags))
    assert without_timing(tmp_path / "a") == without_timing(tmp_path / "b") != without_timing(tmp_path / "c")
    a, b, c = (jax.tree.leaves(model(tmp_path / name, m)["params"]) for name in "abc")
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


def test_a_checkpoint_comes_back_to_the_bit(tmp_path, tiny_teacher):
    m = ppd_mujoco
    networks = m.Networks(m.Policy((8,), 3), m.Value((8,)), m.Policy((8, 8), 3))
    args = small(m, tmp_path, teacher=str(tiny_teacher))
    state = m.init_state(args, networks, 11)
    m.save_tree(tmp_path / "x", "checkpoint", {"state": m.serialization.to_state_dict(state)})
    restored = m.serialization.from_state_dict(state, m.load_tree(tmp_path / "x", "checkpoint")["state"])
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert np.array_equal(x, y) and x.dtype == y.dtype


@pytest.mark.parametrize("m", [train_teacher, ppd_mujoco])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on(m, number, tmp_path, tiny_teacher, monkeypatch):
    folder = tmp_path / "run"
    size = ["--hidden", "8"] if m is train_teacher else ["--student-hidden", "8", "--teacher", str(tiny_teacher)]
    command = [sys.executable, f"{m.__name__}.py", "--env-id", "Hopper-v4", "--num-envs", "4", "--num-steps", "16",
               "--total-timesteps", "1000000", "--eval-episodes", "2", "--run-dir", str(folder), *size]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (folder / "progress.csv").exists() or len((folder / "progress.csv").read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    message = process.communicate(timeout=300)[1]
    assert process.returncode == 128 + number
    assert f"go on with: python {m.__name__}.py --resume {folder}" in message
    done = train_teacher.load_tree(folder / "checkpoint.msgpack", "checkpoint")
    assert len(rows(folder)) == done["updates"]
    assert not (folder / "results.json").exists()

    assert np.asarray(done["state"]["discounted"]).any()  # of episodes that are gone when the run goes on
    done["args"]["total_timesteps"] = (done["updates"] + 2) * 64  # the rest of a million steps would take long
    train_teacher.save_tree(folder / "checkpoint.msgpack", "checkpoint", done)
    last = list(rows(folder)[-1].values())
    with open(folder / "progress.csv", "a") as file:  # a row of an update after the checkpoint, which will be made again
        file.write(",".join([str((done["updates"] + 1) * 64), *last[1:]]) + "\n")
    starts, update = [], m.update
    monkeypatch.setattr(m, "update", lambda *a: starts.append(np.array(a[-2 if m is train_teacher else -3].discounted)) or update(*a))
    m.main(m.Args(resume=str(folder)))
    assert not starts[0].any() and starts[1].any()
    assert [int(row["global_step"]) for row in rows(folder)] == [64 * (i + 1) for i in range(done["updates"] + 2)]
    assert json.loads((folder / "results.json").read_text())["seconds"] > done["timing"]["seconds"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, tiny_teacher, monkeypatch):
    """From the second update on the rewards are NaN: the run ends there and the first update's checkpoint stays."""
    m, collect, calls = ppd_mujoco, ppd_mujoco.collect, []

    def spoiled(*args):
        rollout = collect(*args)
        calls.append(None)
        return rollout._replace(rewards=rollout.rewards * (np.nan if len(calls) > 1 else 1.0))

    monkeypatch.setattr(m, "collect", spoiled)
    with pytest.raises(SystemExit, match=r"update 2 gave losses/\w+ = nan; the last good state is .*checkpoint.msgpack"):
        m.main(small(m, tmp_path / "run", teacher=str(tiny_teacher), checkpoint_every=1))
    assert m.load_tree(tmp_path / "run/checkpoint.msgpack", "checkpoint")["updates"] == 1
    assert len(rows(tmp_path / "run")) == 1


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
    numbers = ppd_mujoco.main(small(ppd_mujoco, tmp_path / "run", **flags))
    assert numbers["corrupted_teacher"] != numbers["teacher"]
    assert numbers["ratio"] == numbers["student"] / numbers["teacher"]


def test_evaluation_counts_the_first_episode_of_each_environment(tiny_teacher):
    """The same games played one by one, each alone, give the same returns; envpool seeds environment i with seed + i."""
    model, policy, frozen = evaluate.load_policy(tiny_teacher)
    together = evaluate.evaluate(policy, frozen, model["env_id"], 5, 7)
    alone = [evaluate.evaluate(policy, frozen, model["env_id"], 1, 7 + i)[0] for i in range(5)]
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_envpool_gives_phantoms_and_collect_marks_them():
    m, steps = train_teacher, 60
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


def test_a_film_can_be_opened(tiny_teacher, tmp_path):
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


@pytest.mark.parametrize("script", ["train_teacher", "ppd_mujoco", "evaluate"])
def test_help_is_documentation(script):
    began = time.time()
    text = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": "160"}, check=True).stdout
    assert time.time() - began < 20  # 4 seconds on an idle machine; a busy one takes longer
    assert "2407.15134" in text and "default: " in text
    if script == "ppd_mujoco":
        assert all(f"{group} options" in text for group in ("Task", "Distillation", "PPO", "Output"))
        assert all(re.search(rf"--{flag}\b", text) for flag in ("distill-coef", "kl-direction", "teacher-noise-std", "gamma"))
        assert all(symbol in text for symbol in "λσαεγ")
