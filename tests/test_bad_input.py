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
    (train_teacher, "--env-id Pong-v5 --channels 8 0 8", "--channels must lie between 1 and 65536, not (8, 0, 8)"),
    (train_teacher, "--env-id Hopper-v4 --no-contact-forces", "--no-contact-forces is for Humanoid, not for Hopper-v4"),
    (train_teacher, "--env-id Pong-v5 --repeat-action-probability 1.5", "--repeat-action-probability must lie between 0 and 1, not 1.5"),
    (train_teacher, "--env-id Pong-v5 --frame-skip 101", "--frame-skip must lie between 1 and 100, not 101"),
    (train_teacher, "--env-id CoinrunEasy-v0 --start-level -1", "--start-level must lie between 0 and"),
    (train_teacher, "--env-id Hopper-v4 --frame-skip 1", "--frame-skip is not for Hopper-v4"),
    (train_teacher, "--env-id Pong-v5 --num-levels 5", "--num-levels is not for Pong-v5"),
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
    (train_teacher, "--num-envs 2 --num-steps 1021", "--num-minibatches 4 does not divide a rollout of 2 environments x 1021 steps = 2042"),
    (train_teacher, "--num-minibatches 0", "--num-minibatches must lie between 1 and"),
    (train_teacher, "--eval-episodes 0", "--eval-episodes must lie between 1 and"),
    (train_teacher, "--checkpoint-every 0", "--checkpoint-every must lie between 1 and"),
    (train_teacher, "--seed -1", "--seed must lie between 0 and"),
    (train_teacher, "--seed 4000000000", "--seed must lie between 0 and"),
    (train_teacher, "--gamma 1.5", "--gamma must lie between 0 and 1"),
    (train_teacher, "--learning-rate nan", "--learning-rate must lie between 0 and"),
    (train_teacher, "--hidden 0", "--hidden must lie between 1 and 65536, not (0,)"),
    (train_teacher, "--hidden", "a network has 1 to 64 hidden layers, not 0"),
    (train_teacher, "--run-dir {x}", "exists; name another folder, or go on with --resume"),
    (train_teacher, "--run-dir {t}/below", "cannot create"),
    (train_teacher, "--resume {x}/nowhere", "{x}/nowhere holds no checkpoint to go on from"),
    (train_teacher, "--resume {x}/ppd", "is a run of ppd_mujoco.py; go on with that script"),
    (train_teacher, "--resume {x}/older", "was made by another version of train_teacher.py: KeyError"),
    (train_teacher, "--resume {x}/before", "was made by another version of train_teacher.py: KeyError 'contact_forces'"),
    (train_teacher, "--resume {x}/damaged", "cannot read {x}/damaged/checkpoint_000000000000.safetensors: "),
    (train_teacher, "--resume {x}/whole --device gpu", "--device gpu: JAX finds no GPU"),
    (train_teacher, "--resume {x}/whole --seed 5", "--seed 5 contradicts {x}/whole, where it is 100"),
    (train_teacher, "--resume {x}/whole --total-timesteps 5", "--total-timesteps can extend a run, not shorten it: {x}/whole has 1000"),
    (train_teacher, "--resume {x}/whole --total-timesteps None", "--total-timesteps can extend a run, not shorten it: {x}/whole has 1000"),
    (train_teacher, "--resume {x}/whole --total-timesteps 10000000000000", "--total-timesteps must lie between 1 and"),
    (train_teacher, "--num-envs 1 --num-steps 8 --num-minibatches 8", "into equal parts of at least 2"),
    (train_teacher, "--track", "--track needs Weights & Biases: pip install wandb"),
    (train_teacher, "--device gpu", "--device gpu: JAX finds no GPU"),
    (ppd_mujoco, "--env-id Hoper-v4", "unknown MuJoCo task Hoper-v4; did you mean Hopper-v"),
    (ppd_mujoco, "--env-id Walker2d-v4", "train a teacher by `python train_teacher.py --env-id Walker2d-v4` and name its file with --teacher"),
    (ppd_mujoco, "--env-id Ant-v4 --teacher {t}", "is for observations and actions of ([11], 3); those of Ant-v4 are ([27], 8)"),
    (ppd_mujoco, "--teacher {x}/missing", "cannot read {x}/missing: "),
    (ppd_mujoco, "--teacher=", "cannot read : "),
    (ppd_mujoco, "--teacher {x}", "cannot read {x}: "),
    (ppd_mujoco, "--teacher {x}/short", "cannot read {x}/short: "),
    (ppd_mujoco, "--teacher {x}/flipped", "cannot read {x}/flipped: it is damaged: its checksum does not match"),
    (ppd_mujoco, "--teacher {x}/foreign", "cannot read {x}/foreign: "),
    (ppd_mujoco, "--teacher {x}/empty", "cannot read {x}/empty: "),
    (ppd_mujoco, "--teacher {x}/newer", "its format is 'proximal-policy-distillation 4', not 'proximal-policy-distillation 3'"),
    (ppd_mujoco, "--teacher {x}/old.msgpack", "; .msgpack files are of an older version"),
    (ppd_mujoco, "--teacher {x}/discrete", "is no model of a MuJoCo task"),
    (ppd_mujoco, "--teacher {x}/shapes", "its policy/params/Dense_1/bias is not finite and of the shape (9,)"),
    (ppd_mujoco, "--teacher {x}/lacking", "is no model of a MuJoCo task: ValueError its obs_stats/mean is not finite and of the shape (11,)"),
    (ppd_mujoco, "--teacher {x}/nameless", "is no model of a MuJoCo task: KeyError 'env_id'"),
    (ppd_mujoco, "--teacher {x}/elsewhere", "unknown MuJoCo task Hopper-v1"),
    (ppd_mujoco, "--teacher {t} --num-minibatches 5", "--num-minibatches 5 does not divide a rollout of 18 environments x 64"),
    (ppd_mujoco, "--teacher {t} --distill-coef -1", "--distill-coef must lie between 0 and"),
    (ppd_mujoco, "--teacher {t} --distill-coef-final -1", "--distill-coef-final must lie between 0 and"),
    (ppd_gymnax, "--distill-coef-final 0 --distill-coef-decay return", "--distill-coef-final and --distill-coef-decay exclude each other"),
    (ppd_gymnax, "--distill-coef 1 2 --distill-coef-final 0 --pbt-interval 2", "--distill-coef-final and --pbt-interval exclude each other"),
    (ppd_gymnax, "--pbt-interval 2", "--pbt-interval needs a population: two numbers or more for --distill-coef"),
    (ppd_gymnax, "--distill-coef 1 2 --pbt-interval 40", "--pbt-interval 40 leaves no exchange in a run of 40 parts"),
    (ppd_gymnax, "--method ppo --student-size smaller", "--student-size has no effect beside --method ppo"),
    (ppd_gymnax, "--method ppo --num-steps 64", "--num-steps has no effect beside --method ppo"),
    (ppd_gymnax, "--distill-coef 0.5 1 1.0", "--distill-coef has a number twice"),
    (ppd_gymnax, "--distill-coef 1 2 --pbt-interval 0", "--pbt-interval must lie between 1 and"),
    (ppd_gymnax, "--teacher-mean-clip", "--teacher-mean-clip is for continuous actions; those of Breakout-MinAtar are not"),
    (ppd_gymnax, "--method teacher-distill --distill-future-coef 1", "--distill-future-coef has no effect beside --method teacher-distill"),
    (ppd_mujoco, "--teacher {t} --teacher-noise-std -1", "--teacher-noise-std must lie between 0 and"),
    (ppd_mujoco, "--teacher {t} --student-hidden 64 0", "--student-hidden must lie between 1 and 65536, not (64, 0)"),
    (ppd_mujoco, "--teacher {t} --student-hidden 1000000000000", "--student-hidden must lie between 1 and 65536"),
    (ppd_mujoco, "--teacher {x}/infinite", "{x}/infinite is no model of a MuJoCo task: ValueError its policy/params/Dense_0/bias is not finite"),
    (ppd_mujoco, "--teacher {x}/ppd/checkpoint_000000000000.safetensors", "is no model of a MuJoCo task: KeyError 'network'"),
    (ppd_mujoco, "--resume {x}/ppd", "was made by another version of ppd_mujoco.py: KeyError"),
    (ppd_mujoco, "--resume {t}", "{t} holds no checkpoint to go on from"),
    (ppd_mujoco, "--teacher {t} --run-dir {x}", "exists; name another folder"),
    (ppd_mujoco, "--teacher {t} --device gpu", "--device gpu: JAX finds no GPU"),
    (ppd_mujoco, "--teacher {a}", "is no model of a MuJoCo task"),
    (ppd_atari, "--env-id Pog-v5", "unknown Atari task Pog-v5; did you mean Pong-v5"),
    (ppd_atari, "--env-id Hopper-v4", "unknown Atari task Hopper-v4"),
    (ppd_atari, "--env-id Amidar-v5", "train a teacher by `python train_teacher.py --env-id Amidar-v5` and name its file with --teacher"),
    (ppd_atari, "--teacher {t}", "is no model of an Atari task"),
    (ppd_atari, "--teacher {a} --env-id BeamRider-v5", "is for observations and actions of ([4, 84, 84], 6); those of BeamRider-v5 are"),
    (ppd_atari, "--teacher {a} --frame-skip 0", "--frame-skip must lie between 1 and"),
    (ppd_atari, "--teacher {a} --student-channels 8 8 0", "--student-channels must lie between 1 and 65536, not (8, 8, 0)"),
    (ppd_atari, "--teacher {a} --student-hidden 0", "--student-hidden must lie between 1 and 65536"),
    (ppd_atari, "--teacher {x}/infinite", "is no model of an Atari task"),
    (ppd_atari, "--teacher {x}/short", "cannot read {x}/short: "),
    (ppd_procgen, "--env-id Coinrun-v0", "unknown Procgen task Coinrun-v0; did you mean Coinrun"),
    (ppd_procgen, "--env-id HeistHard-v0", "train a teacher by `python train_teacher.py --env-id HeistHard-v0`"),
    (ppd_procgen, "--teacher {a}", "{a} is no model of a Procgen task"),
    (ppd_procgen, "--teacher {x}/flipped", "cannot read {x}/flipped: it is damaged: its checksum does not match"),
    (student_distill, "--env-id Hoper-v4", "unknown task Hoper-v4; did you mean Hopper-v"),
    (student_distill, "--env-id Walker2d-v4", "train a teacher by `python train_teacher.py --env-id Walker2d-v4`"),
    (student_distill, "--teacher {t} --env-id Pong-v5", "is a teacher of Hopper-v4, not of Pong-v5"),
    (student_distill, "--teacher {t} --student-channels 8 8 8", "--student-channels is for networks of images"),
    (student_distill, "--teacher {t} --start-level 0", "--start-level is not for Hopper-v4"),
    (student_distill, "--teacher {t} --log-every 0", "--log-every must lie between 1 and"),
    (student_distill, "--teacher {x}/lacking", "is no teacher: ValueError its obs_stats"),
    (student_distill, "--teacher {x}/shapes", "its policy/params/Dense_1/bias is not finite and of the shape (9,)"),
    (student_distill, "--teacher {x}/valueless", "is no teacher: ValueError its value/params/Dense_0/bias is not finite"),
    (student_distill, "--resume {x}/ppd", "is a run of ppd_mujoco.py; go on with that script"),
    (teacher_distill, "--teacher {t} --num-steps 0", "--num-steps must lie between 1 and"),
    (teacher_distill, "--teacher {t} --run-dir {x}", "exists; name another folder"),
    (teacher_distill, "--teacher {x}/newer", "its format is 'proximal-policy-distillation 4'"),
    (teacher_distill, "--teacher {x}/elsewhere", "unknown task Hopper-v1"),
    (teacher_distill, "--teacher {t} --device gpu", "--device gpu: JAX finds no GPU"),
    (ppd_gymnax, "--env-id Breakout", "unknown gymnax task Breakout; did you mean Breakout-MinAtar"),
    (ppd_gymnax, "--env-id MNISTBandit-bsuite", "unknown gymnax task MNISTBandit-bsuite"),
    (ppd_gymnax, "--num-seeds 0", "--num-seeds must lie between 1 and"),
    (ppd_gymnax, "--distill-coef 1 -1", "--distill-coef must lie between 0 and 1000000, not (1.0, -1.0)"),
    (ppd_gymnax, "--distill-coef nan", "--distill-coef must lie between 0 and 1000000, not (nan,)"),
    (ppd_gymnax, "--method student-distill --distill-coef 2", "--distill-coef has no effect beside --method student-distill"),
    (ppd_gymnax, "--env-id Acrobot-v1 --distill-coef-decay return", "needs teachers of positive return; those of Acrobot-v1 have none"),
    (ppd_gymnax, "--env-id CartPole-v1 --cnn", "--cnn is for MinAtar; CartPole-v1 has states"),
    (ppd_gymnax, "--num-minibatches 7", "does not divide a rollout of 64 environments x 32 steps"),
    (ppd_gymnax, "--teacher-num-steps 3 --num-minibatches 256", "does not divide a teacher rollout of 64 environments x 3 steps"),
    (ppd_gymnax, "--student-hidden 8 0", "--student-hidden must lie between 1 and 65536, not (8, 0)"),
    (ppd_gymnax, "--student-hidden 70000", "--student-hidden must lie between 1 and 65536, not (70000,)"),
    (ppd_gymnax, "--method ppo --teacher {t}", "--method ppo trains teachers; with --teacher there is nothing left to do"),
    (ppd_gymnax, "--method ppo --distill-coef 2", "--distill-coef has no effect beside --method ppo"),
    (ppd_gymnax, "--method ppo --kl-direction reverse", "--kl-direction has no effect beside --method ppo"),
    (ppd_gymnax, "--teacher {x}", "cannot read {x}/teacher_100.safetensors: "),
    (ppd_gymnax, "--teacher-num-envs 0", "--teacher-num-envs must lie between 1 and"),
    (ppd_gymnax, "--num-parts 0", "--num-parts must lie between 1 and"),
    (ppd_gymnax, "--teacher {t}", "is no teacher of Breakout-MinAtar"),
    (ppd_gymnax, "--teacher {x}/short", "cannot read {x}/short: "),
    (ppd_gymnax, "--run-dir {x}", "exists; name another folder"),
    (ppd_gymnax, "--resume {x}/ppd", "is a run of ppd_mujoco.py; go on with that script"),
    (ppd_gymnax, "--device gpu", "--device gpu: JAX finds no GPU"),
    (evaluate, "{x}/missing", "cannot read {x}/missing: "),
    (evaluate, "{x}/short", "cannot read {x}/short: "),
    (evaluate, "{x}/infinite", "its policy/params/Dense_0/bias is not finite"),
    (evaluate, "{x}/skipless", "its frame_skip is 0, which cannot be"),
    (evaluate, "{x}/old.msgpack", "; .msgpack files are of an older version"),
    (evaluate, "{t} --repeat-action-probability 0.5", "--repeat-action-probability is for Atari, not for Hopper-v4"),
    (evaluate, "{t} --episodes 0", "--episodes must lie between 1 and"),
    (evaluate, "{t} --seed -1", "--seed must lie between 0 and"),
    (evaluate, "{t} --video {x}/film.avi", "--video writes .gif or .mp4"),
    (evaluate, "{t} --video {x}/nowhere/film.gif", "cannot write"),
    (evaluate, "{t} --json {x}/nowhere/out.json", "cannot write"),
    (evaluate, "{t} --json {x}/short/out.json", "cannot write"),
    (evaluate, "{t} --card {x}", "exists, or there is no folder for it"),
]


def save_checkpoint(m, folder, **args):
    """A checkpoint that has all that is looked at before its arrays are."""
    flags = vars(m.Args(**args)) | {"run_dir": None}
    folder.mkdir()
    m.save_file(folder / "checkpoint_000000000000.safetensors", {
        "script": m.__name__, "args": flags, "updates": 0, "logged": m.BEGIN, "finished": [], "command": "", "phase": "teacher", "teacher": {}}, {})


@pytest.fixture(scope="session")
def spoiled(tiny_teacher, tmp_path_factory):
    """A folder with files that are almost a teacher, and with runs."""
    m, folder, whole = train_teacher, tmp_path_factory.mktemp("spoiled"), tiny_teacher.read_bytes()
    about, arrays = m.read_file(tiny_teacher)

    def save(name, changes=None, arrays=arrays, lacking=()):
        changed = {key: value for key, value in (about | (changes or {})).items() if key not in lacking}
        m.save_file(folder / name, changed, {key: value for key, value in arrays.items() if not key.startswith(lacking or "-")})

    (folder / "short").write_bytes(whole[: len(whole) // 2])
    (folder / "empty").write_bytes(b"")
    (folder / "foreign").write_bytes(np.random.default_rng(0).bytes(1000))
    (folder / "old.msgpack").write_bytes(b"\x85\xa6format\xbdproximal-policy-distillation" * 10)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    (folder / "flipped").write_bytes(flipped)
    save("newer", {"format": "proximal-policy-distillation 4"})
    save("discrete", {"network": about["network"] | {"kind": "impala"}})
    save("shapes", {"network": about["network"] | {"hidden": [8, 9]}})
    save("valueless", lacking=("value",))
    save("lacking", lacking=("obs_stats",))
    save("nameless", lacking=("env_id",))
    save("elsewhere", {"env_id": "Hopper-v1"})
    save("infinite", arrays={name: np.full_like(x, np.inf) for name, x in arrays.items()})
    save("skipless", {"env_id": "Pong-v5", "variant": {"frame_skip": 0, "repeat_action_probability": 0.0}})
    save_checkpoint(m, folder / "whole", total_timesteps=1000, num_steps=256, ent_coef=0.0, eval_episodes=1, num_minibatches=1)
    flags = {name: value for name, value in vars(m.Args()).items() if name != "contact_forces"}
    for name, checkpoint in (("ppd", {"script": "ppd_mujoco", "env_id": "Hopper-v4"}), ("older", {"script": "train_teacher", "args": {"gone": 1}}),
                             ("before", {"script": "train_teacher", "updates": 0, "logged": m.BEGIN, "args": flags})):
        (folder / name).mkdir()
        m.save_file(folder / name / "checkpoint_000000000000.safetensors", checkpoint, {})
    (folder / "damaged").mkdir()
    (folder / "damaged/checkpoint_000000000000.safetensors").write_bytes(b"not a checkpoint")
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


@pytest.mark.parametrize("m", [train_teacher, ppd_mujoco, ppd_atari, ppd_procgen, student_distill, teacher_distill, ppd_gymnax],
                         ids=lambda m: m.__name__)
def test_flags_that_contradict_the_run(m, tmp_path, capsys):
    """Each flag in turn beside --resume: those of learning must be the run's, those of the machine and of output may change."""
    save_checkpoint(m, tmp_path / "run", total_timesteps=1000)
    others = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x / 2 + 0.125, str: lambda x: x + "x",
              tuple: lambda x: (*x, 3), type(None): lambda x: 3}
    before = listing(tmp_path)
    may_change = {"device", "num_devices", "checkpoint_every", "eval_episodes", "track", "wandb_project_name", "wandb_entity"}
    may_change |= set() if m is ppd_gymnax else {"total_timesteps"}  # whose parts are of its length
    for field in m.dataclasses.fields(m.Args):
        if field.name == "resume":
            continue
        old = 1000 if field.name == "total_timesteps" else field.default
        new = others[type(old)](old)
        if "Literal" in str(field.type):
            new = next(x for x in field.type.__args__ if x != old)
        if field.type == tuple[int, int, int] | None:
            new = (3, 4, 5)
        flag = f"--{field.name.replace('_', '-')}"
        argv = [f"--no-{flag[2:]}"] if new is False else [flag] if new is True else [flag, *map(str, new if isinstance(new, tuple) else (new,))]
        argv = ["--resume", str(tmp_path / "run"), *argv]
        if field.name in may_change:
            assert getattr(m.parse_args(argv), field.name) in (new, str(new), (new,)), flag
            assert capsys.readouterr().err == ""
        else:
            with pytest.raises(SystemExit) as stopped:
                m.parse_args(argv)
            error = capsys.readouterr().err
            assert stopped.value.code == 2 and error.count("\n") == 1, flag
            given = getattr(m.tyro.cli(m.Args, args=argv), field.name)
            assert error == f"error: {flag} {given} contradicts {tmp_path}/run, where it is {old}\n" and given != old
    assert listing(tmp_path) == before


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


@pytest.mark.parametrize("m", [ppd_procgen, train_teacher, evaluate])  # student_distill.py's is train_teacher.py's
def test_without_qt_the_line_says_what_to_install(m, monkeypatch, capsys):
    """envpool imports its Procgen, and that Qt, only when such a task is looked at."""

    def fails(*args, **flags):
        raise ImportError("libQt5Gui.so.5: cannot open shared object file")

    for name in ("make_gymnasium", "make_spec"):
        monkeypatch.setattr(m.import_envpool(), name, fails)
    looks = [] if m is train_teacher else [lambda: m.task_shape("CoinrunEasy-v0")]
    looks += [] if m is ppd_procgen else [lambda: m.make_envs("CoinrunEasy-v0", 1, 0, {"start_level": 0, "num_levels": 200}, "training")]
    for look in looks:
        with pytest.raises(SystemExit) as stopped:
            look()
        assert stopped.value.code == 2 and "apt-get install libqt5gui5" in capsys.readouterr().err
