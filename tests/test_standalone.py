"""Every script is one file: copied alone into an empty folder it runs there; and a model file needs none of them."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, needs_procgen
from test_import_teacher import made_up_cleanrl
from test_learning import made_up_teacher

import evaluate
import ppd_mujoco

HOPPER = ROOT / "teachers/Hopper-v4__100.safetensors"
SHORT = ["--num-envs", "2", "--num-steps", "8", "--total-timesteps", "32", "--eval-episodes", "1", "--run-dir", "run"]
STUDENT = [*SHORT, "--student-hidden", "8"]
IMAGES = [*STUDENT, "--teacher", "teacher.safetensors", "--student-size", "smaller", "--student-channels", "4", "4", "4"]
RUNS = {
    "train_teacher.py": SHORT, "ppd_mujoco.py": STUDENT, "student_distill.py": STUDENT, "teacher_distill.py": STUDENT,
    "ppd_atari.py": [*IMAGES, "--frame-skip", "20"], "ppd_procgen.py": IMAGES,
    "ppd_beyond.py": [*STUDENT, "--distill-future-coef", "1"],
    "ppd_gymnax.py": ["--env-id", "CartPole-v1", "--num-seeds", "5", "--num-envs", "4", "--num-steps", "16", "--teacher-num-steps", "16",
                      "--teacher-timesteps", "128", "--total-timesteps", "128", "--eval-episodes", "2", "--run-dir", "run"],
    "import_teacher.py": ["agent.cleanrl_model", "--env-id", "Pong-v5", "--frame-skip", "20", "--eval-episodes", "1"],
    "evaluate.py": ["teachers/Hopper-v4__100.safetensors", "--episodes", "1", "--json", "found.json"],
}


@pytest.mark.parametrize("script", [pytest.param(name, marks=[needs_procgen] if name == "ppd_procgen.py" else []) for name in RUNS])
def test_a_script_runs_alone_in_an_empty_folder(script, tmp_path):
    """With nothing beside it but a teacher: by default the shipped one, in the folder teachers.

    Of ppd_gymnax.py five seeds, as XLA compiles by itself: vectorised initialisation of networks would hang on two cores.
    """
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(ROOT / script, folder)
    given = {script}
    if script in ("ppd_atari.py", "ppd_procgen.py"):
        given.add(made_up_teacher("Pong-v5" if script == "ppd_atari.py" else "BigfishEasy-v0", folder / "teacher.safetensors").name)
    elif script == "import_teacher.py":
        (folder / "agent.cleanrl_model").write_bytes(made_up_cleanrl()[0])
        given.add("agent.cleanrl_model")
    elif script not in ("train_teacher.py", "ppd_gymnax.py"):
        (folder / "teachers").mkdir()
        shutil.copy(HOPPER, folder / "teachers")
        given.add("teachers")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS" * (script == "ppd_gymnax.py"))}
    done = subprocess.run([sys.executable, script, *RUNS[script]], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    made = {path.name for path in folder.iterdir()} - given
    if script == "evaluate.py":
        assert made == {"found.json"} and json.loads((folder / "found.json").read_text())["mean"] > 0
    elif script == "import_teacher.py":
        assert made == {"teacher.safetensors"} and evaluate.load_policy(str(folder / "teacher.safetensors"))[0]["role"] == "teacher"
    else:
        files = {path.name for path in (folder / "run").iterdir()}
        last = {"train_teacher.py": "teacher.safetensors", "ppd_gymnax.py": "student_100.safetensors"}.get(script, "student.safetensors")
        assert made == {"run"} and {"args.json", "progress.csv", "results.json", last} <= files


def act(path, observations):
    """The most likely actions [N, A] of a MuJoCo policy for raw observations [N, D], by NumPy alone."""
    arrays = safetensors.numpy.load_file(path)
    x = (observations - arrays["obs_stats/mean"]) / np.sqrt(arrays["obs_stats/var"] + 1e-8)
    x = np.clip(x, -10.0, 10.0)
    layers = sorted({name.rsplit("/", 1)[0] for name in arrays if name.startswith("policy/params/Dense")})
    for layer in layers[:-1]:
        x = np.maximum(x @ arrays[f"{layer}/kernel"] + arrays[f"{layer}/bias"], 0.0)
    return x @ arrays[f"{layers[-1]}/kernel"] + arrays[f"{layers[-1]}/bias"]


def test_a_model_file_is_read_without_any_script():
    """In the states of an episode that it plays well itself, its actions are those of the scripts."""
    envs = ppd_mujoco.make_envs("Hopper-v4", 1, 7, {"contact_forces": True})
    teacher = ppd_mujoco.load_teacher(ppd_mujoco.Args(teacher=str(HOPPER)))
    _, policy, params = evaluate.load_policy(str(HOPPER))
    x, total = ppd_mujoco.reset(envs), 0.0
    for _ in range(100):
        actions = act(HOPPER, x)
        ours = ppd_mujoco.act_deterministic(teacher.policy, teacher.params["policy"], teacher.params["obs_stats"], x)
        np.testing.assert_allclose(actions, ours, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(actions, evaluate.act_deterministic(policy, params["policy"], params["obs_stats"], x), rtol=1e-5, atol=1e-5)
        x, rewards, terminations, *_ = ppd_mujoco.step(envs, actions)
        total += rewards[0]
        assert not terminations[0]
    assert total > 150
