"""What cannot work ends at once: one line on stderr that says what to do, exit code 2, and nothing written."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import evaluate
import ppd_atari
import ppd_gymnax
import ppd_mujoco
import ppd_procgen
import student_distill
import teacher_distill
import train_teacher

# script, flags, what the line must say; {t} is a whole teacher of Hopper, {x} a folder with spoiled copies of it, {a} a
# whole one of Pong
BAD = [
    (train_teacher, "--env-id Hoper-v4", "unknown task Hoper-v4; did you mean Hopper-v"),
    (train_teacher, "--env-id Acrobot-v1", "unknown task Acrobot-v1; did you mean"),
    (train_teacher, "--env-id CartPole-v1", "unknown task CartPole-v1"),
    (train_teacher, "--env-id Pog-v5", "unknown task Pog-v5; did you mean Pong-v5"),
    (train_teacher, "--env-id Coinrun-v0", "unknown task Coinrun-v0; did you mean Coinrun"),
    (train_teacher, "--env-id Pong-v5 --frame-skip 0", "--frame-skip must lie between 1 and"),
    (train_teacher, "--env-id CoinrunEasy-v0 --num-levels 0", "--num-levels must lie between 1 and"),
    (train_teacher, "--env-id Hopper-v4 --channels 8 8 8", "--channels is for networks of images; Hopper-v4 has states"),
    (train_teacher, "--env-id Pong-v5 --channels 8 0 8", "hidden layers, and all of 1 to 65536 units, not (8, 0, 8, 256)"),
    (train_teacher, "--env-id Hopper-v4 --contact-forces True", "--contact-forces is for Humanoid, not for Hopper-v4"),
    (ppd_mujoco, "--teacher {t} --contact-forces False", "--contact-forces is for Humanoid, not for Hopper-v4"),
    (student_distill, "--teacher {t} --contact-forces True", "--contact-forces is for Humanoid, not for Hopper-v4"),
    (train_teacher, "--env-id Pong-v5 --frame-skip 101", "--frame-skip must lie between 1 and 100, not 101"),
    (train_teacher, "--env-id CoinrunEasy-v0 --start-level -1", "--start-level must lie between 0 and"),
    (train_teacher, "--num-envs 100001", "--num-envs must lie between 1 and 100000, not 100001"),
    (train_teacher, "--eval-episodes 100001", "--eval-episodes must lie between 1 and 100000, not 100001"),
    (train_teacher, f"--hidden {'8 ' * 65}", "a network has 1 to 64 hidden layers"),
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
    (train_teacher, "--hidden 0", "all of 1 to 65536 units, not (0,)"),
    (train_teacher, "--hidden", "a network has 1 to 64 hidden layers, and all of 1 to 65536 units, not ()"),
    (train_teacher, "--run-dir {x}", "exists; name another folder, or go on with --resume"),
    (train_teacher, "--run-dir {t}/below", "cannot create"),
    (train_teacher, "--resume {x}/nowhere", "cannot read {x}/nowhere/checkpoint.msgpack: No such file or directory"),
    (train_teacher, "--resume {x}/ppd", "is a run of ppd_mujoco.py; go on with that script"),
    (train_teacher, "--resume {x}/older", "was made by another version of train_teacher.py (KeyError"),
    (train_teacher, "--resume {x}/before", "was made by another version of train_teacher.py (KeyError 'contact_forces')"),
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
    (ppd_mujoco, "--teacher {x}/newer", "version 3"),
    (ppd_mujoco, "--teacher {x}/discrete", "is no model of a MuJoCo task"),
    (ppd_mujoco, "--teacher {x}/shapes", "its parameters are not those of the network it describes"),
    (ppd_mujoco, "--teacher {x}/lacking", "is no model of a MuJoCo task: KeyError"),
    (ppd_mujoco, "--teacher {x}/nameless", "is no model of a MuJoCo task: KeyError 'env_id'"),
    (ppd_mujoco, "--teacher {x}/elsewhere", "unknown MuJoCo task Hopper-v1"),
    (ppd_mujoco, "--teacher {t} --num-minibatches 5", "--num-minibatches 5 does not divide a rollout of 18 environments x 64"),
    (ppd_mujoco, "--teacher {t} --distill-coef -1", "--distill-coef must lie between 0 and"),
    (ppd_mujoco, "--teacher {t} --distill-coef-final -1", "--distill-coef-final must lie between 0 and"),
    (ppd_mujoco, "--teacher {t} --teacher-noise-std -1", "--teacher-noise-std must lie between 0 and"),
    (ppd_mujoco, "--teacher {t} --student-hidden 64 0", "hidden layers of 1 to 65536 units, not (64, 0)"),
    (ppd_mujoco, "--teacher {t} --student-hidden 1000000000000", "hidden layers of 1 to 65536 units"),
    (ppd_mujoco, "--teacher {x}/infinite", "{x}/infinite is no model of a MuJoCo task: ValueError its parameters are not all finite"),
    (ppd_mujoco, "--teacher {x}/ppd/checkpoint.msgpack", "is a 'checkpoint' file, version 2; needed is 'model', version 2"),
    (ppd_mujoco, "--resume {x}/ppd", "was made by another version of ppd_mujoco.py (KeyError 'updates')"),
    (ppd_mujoco, "--resume {t}", "cannot read {t}/checkpoint.msgpack: Not a directory"),
    (ppd_mujoco, "--teacher {t} --run-dir {x}", "exists; name another folder"),
    (ppd_mujoco, "--teacher {t} --device gpu", "--device gpu: JAX finds no GPU"),
    (ppd_mujoco, "--teacher {a}", "is no model of a MuJoCo task"),
    (ppd_atari, "--env-id Pog-v5", "unknown Atari task Pog-v5; did you mean Pong-v5"),
    (ppd_atari, "--env-id Hopper-v4", "unknown Atari task Hopper-v4"),
    (ppd_atari, "", "no teacher of Pong-v5 is shipped; train one with `python train_teacher.py --env-id Pong-v5`"),
    (ppd_atari, "--teacher {t}", "is no model of an Atari task"),
    (ppd_atari, "--teacher {a} --env-id Qbert-v5", "is a teacher of Pong-v5, not of Qbert-v5"),
    (ppd_atari, "--teacher {a} --frame-skip 0", "--frame-skip must lie between 1 and"),
    (ppd_atari, "--teacher {a} --student-channels 8 8 0", "all of 1 to 65536 units, not (8, 8, 0, 1024)"),
    (ppd_atari, "--teacher {a} --student-hidden 0", "all of 1 to 65536 units"),
    (ppd_atari, "--teacher {x}/infinite", "is no model of an Atari task: ValueError its network is of the kind mlp"),
    (ppd_atari, "--teacher {x}/short", "is no model file of this project, or is cut short"),
    (ppd_procgen, "--env-id Coinrun-v0", "unknown Procgen task Coinrun-v0; did you mean Coinrun"),
    (ppd_procgen, "", "no teacher of CoinrunEasy-v0 is shipped"),
    (ppd_procgen, "--teacher {a}", "unknown Procgen task Pong-v5"),
    (ppd_procgen, "--teacher {x}/flipped", "is damaged: its checksum does not match"),
    (student_distill, "--env-id Hoper-v4", "unknown task Hoper-v4; did you mean Hopper-v"),
    (student_distill, "--env-id Walker2d-v4", "no teacher of Walker2d-v4 is shipped"),
    (student_distill, "--teacher {t} --env-id Pong-v5", "is a teacher of Hopper-v4, not of Pong-v5"),
    (student_distill, "--teacher {t} --student-channels 8 8 8", "--student-channels is for networks of images"),
    (student_distill, "--teacher {t} --log-every 0", "--log-every must lie between 1 and"),
    (student_distill, "--teacher {x}/lacking", "is no model of this project: KeyError"),
    (student_distill, "--teacher {x}/shapes", "its parameters are not those of the network it describes"),
    (student_distill, "--teacher {x}/valueless", "holds no value network to learn from"),
    (student_distill, "--resume {x}/ppd", "is a run of ppd_mujoco.py; go on with that script"),
    (teacher_distill, "--teacher {t} --num-steps 0", "--num-steps must lie between 1 and"),
    (teacher_distill, "--teacher {t} --run-dir {x}", "exists; name another folder"),
    (teacher_distill, "--teacher {x}/newer", "version 3"),
    (teacher_distill, "--teacher {x}/elsewhere", "unknown task Hopper-v1"),
    (teacher_distill, "--teacher {t} --device gpu", "--device gpu: JAX finds no GPU"),
    (ppd_gymnax, "--env-id Breakout", "unknown gymnax task Breakout; did you mean Breakout-MinAtar"),
    (ppd_gymnax, "--env-id MNISTBandit-bsuite", "unknown gymnax task MNISTBandit-bsuite"),
    (ppd_gymnax, "--num-seeds 0", "--num-seeds must lie between 1 and"),
    (ppd_gymnax, "--distill-coef 1 -1", "--distill-coef takes numbers between 0 and 1e6"),
    (ppd_gymnax, "--distill-coef nan", "--distill-coef takes numbers between 0 and 1e6"),
    (ppd_gymnax, "--method student-distill --distill-coef 2", "--distill-coef weighs PPD's term; student-distill has none"),
    (ppd_gymnax, "--env-id CartPole-v1 --cnn", "--cnn is for MinAtar; CartPole-v1 has states"),
    (ppd_gymnax, "--num-minibatches 7", "does not divide a rollout of 64 environments x 32 steps"),
    (ppd_gymnax, "--teacher-num-steps 3 --num-minibatches 256", "does not divide a teacher rollout of 64 environments x 3 steps"),
    (ppd_gymnax, "--student-hidden 8 0", "hidden layers of 1 to 65536 units, not (8, 0)"),
    (ppd_gymnax, "--student-hidden 70000", "hidden layers of 1 to 65536 units, not (70000,)"),
    (ppd_gymnax, "--method ppo --teacher {t}", "--method ppo trains teachers; with --teacher there is nothing left to do"),
    (ppd_gymnax, "--method ppo --distill-coef 2", "--distill-coef weighs PPD's term; ppo has none"),
    (ppd_gymnax, "--teacher {x}", "cannot read {x}/teacher_100.msgpack: No such file or directory"),
    (ppd_gymnax, "--teacher-num-envs 0", "--teacher-num-envs must lie between 1 and"),
    (ppd_gymnax, "--num-parts 0", "--num-parts must lie between 1 and"),
    (ppd_gymnax, "--teacher {t}", "is no teacher of Breakout-MinAtar"),
    (ppd_gymnax, "--teacher {x}/short", "is no model file of this project, or is cut short"),
    (ppd_gymnax, "--run-dir {x}", "exists; name another folder"),
    (ppd_gymnax, "--resume {x}/ppd", "is a run of ppd_mujoco.py; go on with that script"),
    (ppd_gymnax, "--device gpu", "--device gpu: JAX finds no GPU"),
    (evaluate, "{x}/missing", "cannot read {x}/missing: No such file or directory"),
    (evaluate, "{x}/short", "is no model file of this project, or is cut short"),
    (evaluate, "{x}/infinite", "its parameters are not all finite"),
    (evaluate, "{x}/skipless", "was trained with a frame_skip of 0, which cannot be"),
    (evaluate, "{t} --contact-forces True", "--contact-forces is for Humanoid, not for Hopper-v4"),
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
    (folder / "newer").write_bytes(m.serialization.msgpack_serialize(envelope | {"version": 3}))
    m.save_tree(folder / "discrete", "model", model | {"network": model["network"] | {"kind": "impala"}})
    m.save_tree(folder / "shapes", "model", model | {"network": model["network"] | {"hidden": [8, 9]}})
    m.save_tree(folder / "valueless", "model", model | {"params": {"policy": model["params"]["policy"]}})
    m.save_tree(folder / "lacking", "model", {k: v for k, v in model.items() if k != "obs_stats"})
    m.save_tree(folder / "nameless", "model", {k: v for k, v in model.items() if k != "env_id"})
    m.save_tree(folder / "elsewhere", "model", model | {"env_id": "Hopper-v1"})
    flags = {name: value for name, value in m.plain_args(m.Args()).items() if name != "contact_forces"}
    for name, checkpoint in (("ppd", {"script": "ppd_mujoco"}), ("older", {"script": "train_teacher", "updates": 0, "args": {"gone": 1}}),
                             ("before", {"script": "train_teacher", "updates": 0, "args": flags})):
        (folder / name).mkdir()
        m.save_tree(folder / name / "checkpoint.msgpack", "checkpoint", checkpoint)
    params = m.jax.tree.map(lambda x: np.full_like(x, np.inf), model["params"])
    m.save_tree(folder / "infinite", "model", model | {"params": params})
    m.save_tree(folder / "skipless", "model", model | {"args": model["args"] | {"frame_skip": 0}})
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
def test_bad_input(m, flags, message, tiny_teacher, teachers, spoiled, tmp_path, monkeypatch, capsys):
    names = {"t": tiny_teacher, "x": spoiled, "a": teachers("Pong-v5") if "{a}" in flags else None}
    capsys.readouterr()
    before = listing(spoiled)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        call(m, flags.format(**names).split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    assert message.format(**names) in error
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


@pytest.mark.parametrize("m", [ppd_procgen, train_teacher, student_distill, teacher_distill, evaluate])
def test_without_qt_the_line_says_what_to_install(m, monkeypatch, capsys):
    """envpool imports its Procgen, and that Qt, only when such a task is made."""

    def fails(*args, **flags):
        raise ImportError("libQt5Gui.so.5: cannot open shared object file")

    monkeypatch.setattr(m.import_envpool(), "make_gymnasium", fails)
    with pytest.raises(SystemExit) as stopped:
        m.make_envs("CoinrunEasy-v0", 1, 0, *((0, 200) if m is ppd_procgen else ("training", m.Variant(None, 0, 200))))
    assert stopped.value.code == 2 and "apt-get install libqt5gui5" in capsys.readouterr().err
