"""What cannot work ends at once: one line on stderr that says what to do, exit code 2, and nothing written."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import evaluate
import ppd_mujoco
import train_teacher

# script, flags, what the line must say; {t} is a whole teacher of Hopper, {x} a folder with spoiled copies of it
BAD = [
    (train_teacher, "--env-id Hoper-v4", "unknown MuJoCo task Hoper-v4; did you mean Hopper-v"),
    (train_teacher, "--env-id Pong-v5", "unknown MuJoCo task Pong-v5"),
    (train_teacher, "--env-id Hopper-v1", "did you mean Hopper-v"),
    (train_teacher, "--num-envs 0", "--num-envs must lie between 1 and"),
    (train_teacher, "--num-envs -3", "--num-envs must lie between 1 and"),
    (train_teacher, "--num-steps 0", "--num-steps must lie between 1 and"),
    (train_teacher, "--total-timesteps 0", "--total-timesteps must lie between 1 and"),
    (train_teacher, "--update-epochs 0", "--update-epochs must lie between 1 and"),
    (train_teacher, "--num-minibatches 7", "--num-minibatches 7 does not divide a rollout of 18 environments x 256 steps"),
    (train_teacher, "--num-minibatches 0", "--num-minibatches must lie between 1 and"),
    (train_teacher, "--eval-episodes 0", "--eval-episodes must lie between 1 and"),
    (train_teacher, "--checkpoint-every 0", "--checkpoint-every must lie between 1 and"),
    (train_teacher, "--seed -1", "--seed must lie between 0 and"),
    (train_teacher, "--seed 4000000000", "--seed must lie between 0 and"),
    (train_teacher, "--gamma 1.5", "--gamma must lie between 0 and 1"),
    (train_teacher, "--learning-rate nan", "--learning-rate must lie between 0 and"),
    (train_teacher, "--hidden 0", "hidden layers need a width of at least 1"),
    (train_teacher, "--hidden", "hidden layers need a width of at least 1"),
    (train_teacher, "--run-dir {x}", "exists; name another folder, or go on with --resume"),
    (train_teacher, "--run-dir {t}/below", "cannot create"),
    (train_teacher, "--resume {x}/nowhere", "cannot read {x}/nowhere/checkpoint.msgpack: No such file or directory"),
    (train_teacher, "--resume {x}/ppd", "is a run of ppd_mujoco.py; go on with that script"),
    (train_teacher, "--resume {x}/older", "was made by another version of train_teacher.py"),
    (train_teacher, "--resume {x}/damaged", "{x}/damaged/checkpoint.msgpack is no checkpoint file of this project"),
    (train_teacher, "--num-envs 1 --num-steps 8 --num-minibatches 8", "into equal parts of at least 2"),
    (train_teacher, "--track", "--track needs Weights & Biases: pip install wandb"),
    (train_teacher, "--device gpu", "--device gpu: JAX finds no GPU"),
    (ppd_mujoco, "--env-id Hoper-v4", "unknown MuJoCo task Hoper-v4; did you mean Hopper-v"),
    (ppd_mujoco, "--env-id Walker2d-v4", "no teacher of Walker2d-v4 is shipped; train one with `python train_teacher.py"),
    (ppd_mujoco, "--env-id Ant-v4 --teacher {t}", "is a teacher of Hopper-v4, not of Ant-v4"),
    (ppd_mujoco, "--teacher {x}/missing", "cannot read {x}/missing: No such file or directory"),
    (ppd_mujoco, "--teacher {x}", "cannot read {x}: Is a directory"),
    (ppd_mujoco, "--teacher {x}/short", "{x}/short is no model file of this project, or is cut short"),
    (ppd_mujoco, "--teacher {x}/flipped", "is damaged: its checksum does not match"),
    (ppd_mujoco, "--teacher {x}/foreign", "{x}/foreign is no model file of this project, or is cut short"),
    (ppd_mujoco, "--teacher {x}/empty", "{x}/empty is no model file of this project, or is cut short"),
    (ppd_mujoco, "--teacher {x}/newer", "version 2"),
    (ppd_mujoco, "--teacher {x}/discrete", "is no model of a MuJoCo task"),
    (ppd_mujoco, "--teacher {x}/shapes", "its parameters are not those of the network it describes"),
    (ppd_mujoco, "--teacher {x}/lacking", "is no model of a MuJoCo task: KeyError"),
    (ppd_mujoco, "--teacher {x}/nameless", "is no model of a MuJoCo task: KeyError 'env_id'"),
    (ppd_mujoco, "--teacher {x}/elsewhere", "unknown MuJoCo task Hopper-v1"),
    (ppd_mujoco, "--teacher {t} --num-minibatches 5", "--num-minibatches 5 does not divide a rollout of 18 environments x 64"),
    (ppd_mujoco, "--teacher {t} --distill-coef -1", "--distill-coef must lie between 0 and"),
    (ppd_mujoco, "--teacher {t} --distill-coef-final -1", "--distill-coef-final must lie between 0 and"),
    (ppd_mujoco, "--teacher {t} --teacher-noise-std -1", "--teacher-noise-std must lie between 0 and"),
    (ppd_mujoco, "--teacher {t} --student-hidden 64 0", "hidden layers need a width of at least 1"),
    (ppd_mujoco, "--teacher {t} --run-dir {x}", "exists; name another folder"),
    (ppd_mujoco, "--teacher {t} --device gpu", "--device gpu: JAX finds no GPU"),
    (evaluate, "{x}/missing", "cannot read {x}/missing: No such file or directory"),
    (evaluate, "{x}/short", "is no model file of this project, or is cut short"),
    (evaluate, "{t} --episodes 0", "--episodes must lie between 1 and"),
    (evaluate, "{t} --seed -1", "--seed must lie between 0 and"),
    (evaluate, "{t} --video {x}/film.avi", "--video writes .gif or .mp4"),
    (evaluate, "{t} --video {x}/nowhere/film.gif", "cannot write"),
    (evaluate, "{t} --json {x}/nowhere/out.json", "cannot write"),
]


@pytest.fixture(scope="session")
def spoiled(tiny_teacher, tmp_path_factory):
    """A folder with files that are almost a teacher."""
    m, folder, whole = train_teacher, tmp_path_factory.mktemp("spoiled"), tiny_teacher.read_bytes()
    model = m.load_tree(tiny_teacher, "model")
    (folder / "short").write_bytes(whole[: len(whole) // 2])
    (folder / "empty").write_bytes(b"")
    (folder / "foreign").write_bytes(np.random.default_rng(0).bytes(1000))
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (folder / "flipped").write_bytes(flipped)
    envelope = m.serialization.msgpack_restore(whole)
    (folder / "newer").write_bytes(m.serialization.msgpack_serialize(envelope | {"version": 2}))
    m.save_tree(folder / "discrete", "model", model | {"network": "impala"})
    m.save_tree(folder / "shapes", "model", model | {"hidden": [8, 9]})
    m.save_tree(folder / "lacking", "model", {k: v for k, v in model.items() if k != "obs_stats"})
    m.save_tree(folder / "nameless", "model", {k: v for k, v in model.items() if k != "env_id"})
    m.save_tree(folder / "elsewhere", "model", model | {"env_id": "Hopper-v1"})
    for name, checkpoint in (("ppd", {"script": "ppd_mujoco"}), ("older", {"script": "train_teacher", "args": {"gone": 1}})):
        (folder / name).mkdir()
        m.save_tree(folder / name / "checkpoint.msgpack", "checkpoint", checkpoint)
    (folder / "damaged").mkdir()
    (folder / "damaged/checkpoint.msgpack").write_bytes(b"not a checkpoint")
    return folder


def listing(folder):
    return sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))


def call(m, argv):
    if m is evaluate:
        return m.main(m.tyro.cli(m.Args, args=argv))
    return m.main(m.parse_args(argv))


@pytest.mark.parametrize(("m", "flags", "message"), BAD, ids=lambda x: getattr(x, "__name__", str(x)))
def test_bad_input(m, flags, message, tiny_teacher, spoiled, tmp_path, monkeypatch, capsys):
    before = listing(spoiled)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        call(m, flags.format(t=tiny_teacher, x=spoiled).split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    assert message.format(t=tiny_teacher, x=spoiled) in error
    assert list(tmp_path.iterdir()) == [] and listing(spoiled) == before


def test_a_bad_command_line_ends_quickly_and_without_a_traceback(tmp_path):
    """From the shell, where nothing is imported yet."""
    run = subprocess.run([sys.executable, ROOT / "ppd_mujoco.py", "--env-id", "Hoper-v4"], cwd=tmp_path, capture_output=True,
                         text=True, timeout=300)
    assert run.returncode == 2 and run.stdout == "" and list(tmp_path.iterdir()) == []
    assert run.stderr.startswith("error: unknown MuJoCo task Hoper-v4") and run.stderr.count("\n") == 1


def test_without_envpool_the_line_says_what_to_install(tmp_path):
    """As on Python 3.12 without EGL, where the import itself fails."""
    (tmp_path / "envpool.py").write_text("raise ImportError('libEGL.so.1: cannot open shared object file')")
    run = subprocess.run([sys.executable, ROOT / "ppd_mujoco.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert run.returncode == 2 and "apt-get install libegl1 libopengl0" in run.stderr and run.stderr.count("\n") == 1
