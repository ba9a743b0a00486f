"""What goes wrong on the way: signals at any time, damaged checkpoints, a full disk, another teacher, numbers that are not finite."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, small

import ppd_gymnax
import ppd_mujoco
import student_distill
import train_teacher

SLOWER = "import sys, {script} as m; {change}; sys.argv[0] = '{script}.py'; m.program()"


def words(m, args):
    flags = {name: value for name, value in vars(args).items() if value != m.Args.__dataclass_fields__[name].default}
    return [word for name, value in flags.items()
            for word in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value]))]


def begin(m, *flags, change="pass"):
    """Starts a script in a process of its own, with a change of its module."""
    program = SLOWER.format(script=m.__name__, change=change)
    return subprocess.Popen([sys.executable, "-c", program, *map(str, flags)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def wait_for(condition, process):
    deadline = time.time() + 400
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def steps(folder):
    return [int(row["global_step"]) for row in rows(folder)]


def lines(text):
    """What is on stderr beside the progress bar and the blanks that wipe it out."""
    return [line for line in text.splitlines() if line.strip() and "steps/s" not in line]


@pytest.fixture(scope="module")
def finished(tiny_teacher, tmp_path_factory):
    """A run of six updates with a checkpoint after each second: those of updates 4 and 6 are kept."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ppd_mujoco.main(small(ppd_mujoco, "Hopper-v4", folder, teacher=str(tiny_teacher), total_timesteps=6 * 64, checkpoint_every=2))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def resume(folder):
    return ppd_mujoco.main(ppd_mujoco.Args(resume=str(folder)))


def gymnax_flags(folder, **flags):
    return ppd_gymnax.Args(**({
        "env_id": "CartPole-v1", "num_seeds": 1, "num_envs": 4, "num_steps": 16, "num_minibatches": 2, "teacher_num_steps": 16,
        "teacher_timesteps": 256, "total_timesteps": 256, "student_hidden": (8,), "eval_episodes": 2, "run_dir": str(folder)} | flags))


# Signals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "number"), [(ppd_mujoco, signal.SIGINT), (train_teacher, signal.SIGTERM), (student_distill, signal.SIGINT),
                                           (ppd_gymnax, signal.SIGINT)])
def test_a_signal_in_the_final_evaluation_says_how_to_go_on(m, number, tiny_teacher, tmp_path):
    """A run whose training is complete then goes straight to its evaluation."""
    folder = tmp_path / "run"
    flags = {} if m in (train_teacher, ppd_gymnax) else {"teacher": str(tiny_teacher)}
    args = gymnax_flags(folder) if m is ppd_gymnax else small(m, "Hopper-v4", folder, **flags)
    endless = "m.assess = lambda *args: [open({!r}, 'w'), __import__('time').sleep(300)]".format(str(tmp_path / "evaluates"))
    process = begin(m, *words(m, args), change=endless)
    wait_for((tmp_path / "evaluates").exists, process)
    process.send_signal(number)
    error = process.communicate(timeout=400)[1]
    assert process.returncode == 128 + number
    assert lines(error)[-1:] == [f"interrupted; go on with: python {m.__name__}.py --resume {folder}"] and "Traceback" not in error
    before = (folder / "progress.csv").read_text()
    assert not (folder / "results.json").exists()
    m.main(m.Args(resume=str(folder)))
    assert (folder / "progress.csv").read_text() == before and (folder / "results.json").exists()


def test_a_second_signal_ends_at_once(tiny_teacher, tmp_path):
    """In the middle of an update that would never end."""
    endless = "m.collect = lambda *args: [open({!r}, 'w'), [__import__('time').sleep(0.1) for _ in range(3000)]]".format(str(tmp_path / "acts"))
    process = begin(ppd_mujoco, *words(ppd_mujoco, small(ppd_mujoco, "Hopper-v4", tmp_path / "run", teacher=str(tiny_teacher))), change=endless)
    wait_for((tmp_path / "acts").exists, process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None  # it waits for the update's end
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=30)[1]
    assert process.returncode == -signal.SIGINT
    ppd_mujoco.read_tree(tmp_path / "run/checkpoint.msgpack", "checkpoint")


def test_signals_are_seen_while_xla_computes(tmp_path):
    """One part of ppd_gymnax.py that would take hours: the first signal waits for its end, the second does not."""
    args = gymnax_flags(tmp_path / "run", teacher_timesteps=10**9, num_parts=1)
    train = "train = m.train; m.train = lambda *args: [train(*args), open({!r}, 'w')][0]".format(str(tmp_path / "trains"))
    process = begin(ppd_gymnax, *words(ppd_gymnax, args), change=train)
    wait_for((tmp_path / "trains").exists, process)
    for _ in range(2):
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT


# Checkpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["short", "flipped", "empty", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, run, capsys):
    newest = run / "checkpoint.msgpack"
    whole = bytearray(newest.read_bytes())
    whole[len(whole) // 2] ^= 1
    if damage == "missing":
        newest.unlink()
    else:
        newest.write_bytes({"short": whole[:-100], "flipped": whole, "empty": b""}[damage])
    capsys.readouterr()
    resume(run)
    assert lines(capsys.readouterr().err)[0].endswith(f"going on from {run}/checkpoint_previous.msgpack")
    assert steps(run) == [64 * i for i in range(1, 7)]
    assert ppd_mujoco.read_tree(newest, "checkpoint")["updates"] == 6


def test_both_checkpoints_damaged(run, capsys):
    for name in ppd_mujoco.CHECKPOINTS:
        (run / name).write_bytes(b"")
    before = (run / "progress.csv").read_text()
    with pytest.raises(SystemExit) as stopped:
        resume(run)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "checkpoint_previous.msgpack is no checkpoint file" in error
    assert (run / "progress.csv").read_text() == before


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax])
def test_a_row_cut_in_half_is_dropped(m, tmp_path, run):
    """Also where what is left of it looks like an earlier step: half of 384 is 38."""
    folder = run
    if m is ppd_gymnax:
        folder = tmp_path / "gymnax"
        m.main(gymnax_flags(folder))
    table, whole = folder / "progress.csv", (folder / "progress.csv").read_bytes()
    for left in (b"38", b"384,1.2", b"384,1.2,3\r", whole.splitlines()[-1]):
        table.write_bytes(whole + left)
        m.Log(folder, m.Args(resume=str(folder)), whole.count(b"\n") - 1 if m is ppd_gymnax else 384).close()
        assert table.read_bytes() == whole
    table.write_bytes(whole[:20])  # of the header
    m.Log(folder, m.Args(resume=str(folder)), 0).close()
    assert table.read_bytes() == b""


def test_another_teacher_than_at_the_start(run, tiny_teacher, tmp_path, capsys):
    """Its file is written anew between the start and --resume: the same network, other numbers."""
    teacher = tmp_path / "teacher.msgpack"
    saved = ppd_mujoco.read_tree(run / "checkpoint.msgpack", "checkpoint")
    saved["args"]["teacher"] = str(teacher)
    ppd_mujoco.save_tree(run / "checkpoint.msgpack", "checkpoint", saved)
    model = ppd_mujoco.load_tree(tiny_teacher, "model")
    ppd_mujoco.save_tree(teacher, "model", model)
    resume(run)
    model["params"]["policy"]["params"]["log_std"] = model["params"]["policy"]["params"]["log_std"] + np.float32(1e-6)
    ppd_mujoco.save_tree(teacher, "model", model)
    before = (run / "progress.csv").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        resume(run)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and f"the teacher is not the one that {run} began with" in error
    assert (run / "progress.csv").read_text() == before


def test_another_teacher_of_gymnax(tmp_path, capsys):
    m, teacher = ppd_gymnax, tmp_path / "a/teacher_100.msgpack"
    m.main(gymnax_flags(tmp_path / "a"))
    m.main(gymnax_flags(tmp_path / "b", teacher=str(teacher)))
    m.main(m.Args(resume=str(tmp_path / "b")))
    model = m.load_tree(teacher, "model")
    model["obs_stats"]["mean"] = model["obs_stats"]["mean"] + np.float32(1e-3)
    m.save_tree(teacher, "model", model)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        m.main(m.Args(resume=str(tmp_path / "b")))
    assert stopped.value.code == 2 and "the teacher is not the one that" in capsys.readouterr().err


# The disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "size"), [(ppd_mujoco, "row"), (ppd_mujoco, "checkpoint"), (student_distill, "row"), (ppd_gymnax, "row")])
def test_a_full_disk_ends_the_run_in_one_line(m, size, tiny_teacher, tmp_path):
    """From some moment on no file can grow beyond a size, of a few rows or of half a checkpoint; then the limit is lifted."""
    folder = tmp_path / "run"
    flags = {} if m is ppd_gymnax else {"teacher": str(tiny_teacher), "checkpoint_every": 10, "eval_episodes": 1}
    flags |= {"log_every": 1} if m is student_distill else {}
    args = gymnax_flags(folder, teacher_timesteps=64 * 2000, num_parts=2000) if m is ppd_gymnax else small(
        m, "Hopper-v4", folder, **flags, total_timesteps=(20 if m is student_distill else 64) * 3000)
    process = begin(m, *words(m, args))
    wait_for((folder / "checkpoint_previous.msgpack").exists, process)
    limit = (folder / "progress.csv").stat().st_size + 500 if size == "row" else (folder / "checkpoint.msgpack").stat().st_size // 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    error = process.communicate(timeout=400)[1]
    assert process.returncode == 1, error
    assert len(lines(error)) == 1 and lines(error)[0].startswith("error: [Errno 27] File too large"), error
    assert lines(error)[0].endswith("go on from the last checkpoint with --resume")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    updates = [m.read_tree(folder / name, "checkpoint")["updates"] for name in m.CHECKPOINTS]
    assert updates[0] > updates[1]
    if m is not ppd_gymnax:
        batch = args.num_envs * args.num_steps
        saved = m.read_tree(folder / "checkpoint.msgpack", "checkpoint")
        saved["args"]["total_timesteps"] = (saved["updates"] + 3) * batch
        m.save_tree(folder / "checkpoint.msgpack", "checkpoint", saved)
        m.main(m.Args(resume=str(folder)))
        assert steps(folder) == [batch * (i + 1) for i in range(saved["updates"] + 3)]


def test_a_folder_that_cannot_be_written(run):
    """On --resume something that is no file lies where progress.csv was."""
    (run / "progress.csv").unlink()
    (run / "progress.csv").mkdir()
    process = begin(ppd_mujoco, "--resume", run)
    error = process.communicate(timeout=400)[1]
    assert process.returncode == 1 and len(lines(error)) == 1 and lines(error)[0].startswith("error: [Errno 21] Is a directory"), error


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    for m in (ppd_mujoco, ppd_gymnax):
        path = tmp_path / "file"
        m.write_atomic(path, b"old")
        for name in ("fsync", "replace"):
            with monkeypatch.context() as patched, pytest.raises(OSError):
                patched.setattr(m.os, name, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
                m.write_atomic(path, b"new")
            assert [x.name for x in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"
        path.unlink()


# Numbers ---------------------------------------------------------------------------------------------------------------


def spoil_gradient(m, monkeypatch):
    """The loss stays as it is; the gradient of the square root at 0 is not finite."""
    name = "ppo_loss" if m is train_teacher else "distill_loss" if m is student_distill else "ppd_loss"
    loss = getattr(m, name)

    def spoiled(outputs, *args, **kwargs):
        value, terms = loss(outputs, *args, **kwargs)
        return value + jnp.sqrt(0.0 * (outputs[0] ** 2).sum()), terms

    monkeypatch.setattr(m, name, spoiled)


def spoil_step(m, monkeypatch):
    """Loss and gradient stay as they are; what is added to the parameters is infinite."""
    make = m.make_optimizer
    monkeypatch.setattr(m, "make_optimizer", lambda args: optax.chain(make(args), optax.scale(jnp.inf)))


@pytest.mark.parametrize("m", [ppd_mujoco, train_teacher, student_distill, ppd_gymnax])
@pytest.mark.parametrize(("spoil", "quantity"), [(spoil_gradient, "grad_norm"), (spoil_step, "param_norm")])
def test_a_gradient_or_parameter_that_is_not_finite_stops_the_run(m, spoil, quantity, tiny_teacher, tmp_path, monkeypatch):
    """With one gradient step an update, the loss itself is still finite in the first."""
    spoil(m, monkeypatch)
    flags = {} if m in (train_teacher, ppd_gymnax) else {"teacher": str(tiny_teacher)}
    flags |= {"num_minibatches": 1, "update_epochs": 1} if m is not student_distill else {"log_every": 1}
    flags["seed"] = 1000 + len(quantity)  # args that nothing else has compiled
    args = gymnax_flags(tmp_path / "run", num_parts=4, **flags) if m is ppd_gymnax else small(m, "Hopper-v4", tmp_path / "run", **flags)
    first = "updates 1 to 1 of the teacher" if m is ppd_gymnax else "update 1"
    with pytest.raises(SystemExit, match=rf"error: {first} gave losses/{quantity} = \[?(nan|inf)\]?; the last good state is .*checkpoint.msgpack"):
        m.main(args)
    assert m.read_tree(tmp_path / "run/checkpoint.msgpack", "checkpoint")["updates"] == 0
    assert not (tmp_path / "run/checkpoint_previous.msgpack").exists()


def test_the_baselines_check_before_a_checkpoint_and_name_the_update(tiny_teacher, tmp_path, monkeypatch):
    """Rows are means over twenty updates, checkpoints come after each third; the eighth update is spoiled."""
    m, update, calls = student_distill, student_distill.update, []

    def spoiled(*args):
        state, metrics = update(*args)
        calls.append(None)
        return state, metrics | ({"losses/param_norm": jnp.float32(np.inf)} if len(calls) == 8 else {})

    monkeypatch.setattr(m, "update", spoiled)
    with pytest.raises(SystemExit, match="update 8 gave losses/param_norm = inf"):
        m.main(small(m, "Hopper-v4", tmp_path / "run", teacher=str(tiny_teacher), log_every=20, checkpoint_every=3))
    assert [m.read_tree(tmp_path / "run" / name, "checkpoint")["updates"] for name in m.CHECKPOINTS] == [6, 3]


# envpool, which trusts its caller --------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [ppd_mujoco, train_teacher, student_distill])
def test_no_seed_reaches_2_to_the_31(m, tiny_teacher, tmp_path, monkeypatch):
    """Not with the largest --seed, nor after so many updates that a resumed run's would."""
    seeds, make = [], m.import_envpool().make_gymnasium

    def watched(env_id, num_envs, seed, **options):
        seeds.append(seed + num_envs - 1)
        return make(env_id, num_envs=num_envs, seed=seed, **options)

    monkeypatch.setattr(m.import_envpool(), "make_gymnasium", watched)
    flags = {} if m is train_teacher else {"teacher": str(tiny_teacher)}
    folder, seed = tmp_path / "run", m.RANGES["seed"][1]
    m.main(small(m, "Hopper-v4", folder, seed=seed, **flags))
    saved = m.read_tree(folder / "checkpoint.msgpack", "checkpoint")
    saved["updates"] = 10**9
    saved["args"]["total_timesteps"] = saved["updates"] * saved["args"]["num_envs"] * saved["args"]["num_steps"]
    m.save_tree(folder / "checkpoint.msgpack", "checkpoint", saved)
    m.main(m.Args(resume=str(folder)))
    assert seeds[0] == seed + 3 and max(seeds) < 2**31
    assert seed + m.EVAL_SEED + m.RANGES["eval_episodes"][1] < 2**31 and m.RANGES["num_envs"][1] + m.EVAL_SEED < 2**31
    assert json.loads((folder / "results.json").read_text())["args"]["seed"] == seed
