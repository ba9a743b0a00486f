"""What goes wrong on the way: signals at any time, damaged checkpoints, a full disk, no power, numbers that are not finite.

What test_shared_blocks.py holds to be one text is tried with one script: `write_atomic`, `save_file`, `read_file`,
`load_checkpoint` and `Run` with ppd_mujoco.py. ppd_gymnax.py has its own `Run` and loop, train_teacher.py no
teacher, student_distill.py rows and checkpoints at different updates: each is tried where that matters.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, checkpoints, go_on, rows, small, small_gymnax, without_timing, words

import ppd_atari
import ppd_gymnax
import ppd_mujoco
import ppd_procgen
import student_distill
import teacher_distill
import train_teacher

# The script as it is run, with a change before its last lines
PROGRAM = """
import sys
__file__ = sys.argv[0] = {path!r}
text, last = open(__file__).read().split('if __name__ == "__main__":')
exec(compile(text + {change!r} + '\\nif __name__ == "__main__":' + last, __file__, "exec"))
"""


def begin(m, *flags, change="pass"):
    """Starts a script in a process of its own, with a change of what it defines."""
    program = PROGRAM.format(path=f"{m.__name__}.py", change=change)
    return subprocess.Popen([sys.executable, "-c", program, *map(str, flags)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process):
    deadline = time.time() + 400
    while not condition():
        assert process.poll() is None and time.time() < deadline, process.communicate()
        time.sleep(0.02)


def steps(folder):
    return [int(row["global_step"]) for row in rows(folder)]


def lines(text):
    """What is on stderr beside the progress bar and the blanks that wipe it out."""
    return [line for line in text.splitlines() if line.strip() and "%|" not in line]


def updates(folder):
    return [ppd_mujoco.read_file(path)[0]["updates"] for path in checkpoints(folder)]


def flags_of(m, folder, teacher, **flags):
    if m is ppd_gymnax:
        return small_gymnax(folder, **flags)
    return small(m, "Hopper-v4", folder, **({} if m is train_teacher else {"teacher": str(teacher)}), **flags)


@pytest.fixture(scope="module")
def finished(tiny_teacher, tmp_path_factory):
    """A run of six updates with a checkpoint after each second: those of updates 4 and 6 are kept."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    ppd_mujoco.main(small(ppd_mujoco, "Hopper-v4", folder, teacher=str(tiny_teacher), total_timesteps=6 * 64, checkpoint_every=2))
    assert updates(folder) == [4, 6]
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# Signals ---------------------------------------------------------------------------------------------------------------


def test_a_signal_saves_and_a_second_one_ends_at_once(tiny_teacher, tmp_path):
    """The program as it is run: one signal while it learns; then, going on, two in an update that would never end.

    test_runs.py sends signals to every script.
    """
    m, folder = ppd_mujoco, tmp_path / "run"
    process = begin(m, *words(flags_of(m, folder, tiny_teacher, total_timesteps=10**6)))
    wait_for(lambda: (folder / "progress.csv").exists() and (folder / "progress.csv").read_text().count("\n") > 3, process)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=400)[1]
    assert process.returncode == 143 and lines(error) == [f"interrupted; go on with: python ppd_mujoco.py --resume {folder}"]
    assert steps(folder) == [64 * (i + 1) for i in range(updates(folder)[-1])]

    before = (folder / "progress.csv").read_text()
    endless = "collect = lambda *args: [open({!r}, 'w'), [time.sleep(0.1) for _ in range(3000)]]".format(str(tmp_path / "acts"))
    process = begin(m, "--resume", folder, change=endless)
    wait_for((tmp_path / "acts").exists, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it waits for the update's end
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=30)[1]
    assert process.returncode == -signal.SIGINT and (folder / "progress.csv").read_text() == before
    m.read_file(checkpoints(folder)[-1])


def test_signals_are_seen_while_xla_computes(tmp_path):
    """One part of ppd_gymnax.py that would take hours: the first signal waits for its end, the second does not."""
    args = small_gymnax(tmp_path / "run", teacher_timesteps=10**9, num_parts=1)
    train = "learn = train; train = lambda *args: [learn(*args), open({!r}, 'w')][0]".format(str(tmp_path / "trains"))
    process = begin(ppd_gymnax, *words(args), change=train)
    wait_for((tmp_path / "trains").exists, process)
    for _ in range(2):
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT


def test_gymnax_stops_at_a_signal_and_goes_on(tmp_path, monkeypatch, capsys):
    """In the teacher's training and evaluation, in the student's and at the end; all comes to what it comes to without."""
    m, flags, calls = ppd_gymnax, {"num_parts": 4, "teacher_timesteps": 256, "total_timesteps": 256}, []

    def interrupted(real, when):
        def call(*args):
            calls.append(real)
            if calls.count(real) in when:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args)

        return call

    m.main(small_gymnax(tmp_path / "whole", **flags))
    monkeypatch.setattr(m, "train", interrupted(m.train, (2, 7)))
    monkeypatch.setattr(m, "assess", interrupted(m.assess, (1, 3)))
    for begun in (False, True, True, True):
        with pytest.raises(SystemExit) as stopped:
            go_on(m, tmp_path / "run") if begun else m.main(small_gymnax(tmp_path / "run", **flags))
        assert stopped.value.code == 143
        assert f"go on with: python ppd_gymnax.py --resume {tmp_path}/run" in capsys.readouterr().err
        assert not (tmp_path / "run/results.json").exists()
    assert steps(tmp_path / "run") == steps(tmp_path / "whole") == [64, 128, 192, 256] * 2
    go_on(m, tmp_path / "run")
    assert without_timing(tmp_path / "run") == without_timing(tmp_path / "whole") and len(calls) == 8 + 5
    for name in ("teacher_100.safetensors", "student_100.safetensors"):
        one, other = (m.read_file(tmp_path / folder / name)[1] for folder in ("run", "whole"))
        assert all(np.array_equal(one[key], other[key]) for key in other)


# Checkpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["short", "flipped", "empty", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, run, capsys):
    before, newest = checkpoints(run)
    whole = bytearray(newest.read_bytes())
    whole[len(whole) // 2] ^= 1
    if damage == "missing":
        newest.unlink()
    else:
        newest.write_bytes({"short": whole[:-100], "flipped": whole, "empty": b""}[damage])
    capsys.readouterr()
    go_on(ppd_mujoco, run)
    note = lines(capsys.readouterr().err)[0]
    assert note.endswith(f"going on from {before}") and (damage == "missing" or note.startswith(f"cannot read {newest}: "))
    assert steps(run) == [64 * i for i in range(1, 7)] and updates(run) == [4, 6]


def test_both_checkpoints_damaged(run, capsys):
    for path in checkpoints(run):
        path.write_bytes(b"")
    before = {path: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(SystemExit) as stopped:
        go_on(ppd_mujoco, run)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and all(f"cannot read {path}: " in error for path in checkpoints(run))
    assert f"{run} holds no checkpoint to go on from" in error
    assert {path: path.read_bytes() for path in run.iterdir()} == before


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax])
def test_a_row_cut_in_half_is_dropped(m, run, gymnax_run, tmp_path):
    """Also where what is left of it looks like an earlier step: half of 384 is 38."""
    folder = shutil.copytree(gymnax_run(), tmp_path / "gymnax") if m is ppd_gymnax else run
    table, whole = folder / "progress.csv", (folder / "progress.csv").read_bytes()
    for left in (whole + b"38", whole + b"384,1.2", whole + b"384,1.2,3\r", whole + whole.splitlines()[-1], whole, whole[:20]):
        table.write_bytes(left)
        args = m.parse_args(["--resume", str(folder)])
        m.Run(args, m.load_checkpoint(args.resume)[0]).close()
        assert table.read_bytes() == left[:len(whole)]


@pytest.mark.parametrize("m", [ppd_mujoco, student_distill, teacher_distill])
def test_a_run_goes_on_without_its_teacher_s_file(m, tiny_teacher, tmp_path):
    """Its folder may have moved as well; the noise on the teacher is the same."""
    teacher = shutil.copy(tiny_teacher, tmp_path / "teacher.safetensors")
    m.main(flags_of(m, tmp_path / "run", teacher, teacher_noise_std=0.1))
    one = json.loads((tmp_path / "run/results.json").read_text())
    os.unlink(teacher)
    os.rename(tmp_path / "run", tmp_path / "moved")
    (tmp_path / "moved/results.json").unlink()
    go_on(m, tmp_path / "moved")
    other = json.loads((tmp_path / "moved/results.json").read_text())
    assert other == one
    named = m.read_file(tmp_path / "moved/student.safetensors")[0]["args"]["teacher"]
    assert named == str(teacher)


def test_a_gymnax_run_goes_on_without_its_teacher_s_file(gymnax_run, tmp_path):
    m, teacher = ppd_gymnax, tmp_path / "teacher.safetensors"
    shutil.copy(gymnax_run() / "teacher_100.safetensors", teacher)
    m.main(small_gymnax(tmp_path / "run", teacher=str(teacher), teacher_noise_std=0.1))
    one = json.loads((tmp_path / "run/results.json").read_text())
    teacher.unlink()
    go_on(m, tmp_path / "run")
    assert json.loads((tmp_path / "run/results.json").read_text()) == one


# The disk --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "size"), [(ppd_mujoco, "row"), (ppd_mujoco, "checkpoint"), (ppd_gymnax, "row")])
def test_a_full_disk_ends_the_run_in_one_line(m, size, tiny_teacher, tmp_path):
    """From some moment on no file can grow beyond a size, of a few rows or of half a checkpoint; then the limit is lifted."""
    folder = tmp_path / "run"
    flags = {"teacher_timesteps": 64 * 500, "num_parts": 500} if m is ppd_gymnax else {
        "checkpoint_every": 10, "eval_episodes": 1, "total_timesteps": 64 * 3000}
    process = begin(m, *words(flags_of(m, folder, tiny_teacher, **flags)))
    wait_for(lambda: len(checkpoints(folder)) > 1, process)
    limit = (folder / "progress.csv").stat().st_size + 500 if size == "row" else checkpoints(folder)[0].stat().st_size // 2
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    error = process.communicate(timeout=400)[1]
    assert process.returncode == 1, error
    assert len(lines(error)) == 1 and lines(error)[0].startswith("error: [Errno 27] File too large"), error
    assert lines(error)[0].endswith("go on from the last checkpoint with --resume")
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    done = updates(folder)
    assert len(done) == 2 and done[0] < done[1]
    if m is ppd_mujoco:
        args = m.load_checkpoint(folder)[0]["args"] | {"total_timesteps": 64 * (done[1] + 3)}  # the rest would take long
        about, arrays = m.read_file(checkpoints(folder)[-1])
        m.save_file(checkpoints(folder)[-1], about | {"args": args}, arrays)
        go_on(m, folder)
        assert steps(folder) == [64 * (i + 1) for i in range(done[1] + 3)]


def test_a_folder_that_cannot_be_written(run):
    """On --resume something that is no file lies where progress.csv was."""
    (run / "progress.csv").unlink()
    (run / "progress.csv").mkdir()
    with pytest.raises(IsADirectoryError):  # which ends the program as a full disk does
        go_on(ppd_mujoco, run)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    m, path = ppd_mujoco, tmp_path / "file"
    m.write_atomic(path, b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched, pytest.raises(OSError):
            patched.setattr(m.os, name, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            m.write_atomic(path, b"new")
        assert [x.name for x in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax])
def test_what_a_checkpoint_counts_on_is_on_the_disk_before_it(m, tiny_teacher, tmp_path, monkeypatch):
    """Should the power fail: rows first, then the checkpoint's content, its name, and only then the removal of an older one."""
    calls, real = [], {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}

    def watched(name):
        def call(target, *args, **flags):
            path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else args[0] if name == "replace" else target)
            if "tfevents" not in path.name and (name != "unlink" or path.exists()):
                calls.append((name, path.name.split("_")[0]))
            return real[name](target, *args, **flags)

        return call

    for name in real:
        monkeypatch.setattr(os, name, watched(name))
    flags = {"num_parts": 4} if m is ppd_gymnax else {"checkpoint_every": 1}
    m.main(flags_of(m, tmp_path / "run", tiny_teacher, **flags))
    saved = [("fsync", "progress.csv"), ("fsync", ".checkpoint"), ("replace", "checkpoint"), ("fsync", "run")]
    first = calls.index(saved[0])
    assert calls[:first] == [("fsync", ".args.json.new"), ("replace", "args.json"), ("fsync", "run")]
    assert calls[first:first + 13] == saved + saved + saved + [("unlink", "checkpoint")]
    model = [i for i, call in enumerate(calls) if call[0] == "replace"][-2 if m is ppd_mujoco else -3]
    assert calls[model][1].startswith("student") and calls[model + 1] == ("fsync", "run")


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


@pytest.mark.parametrize(("m", "spoil", "quantity"), [
    (ppd_mujoco, spoil_gradient, "grad_norm"), (ppd_mujoco, spoil_step, "param_norm"), (train_teacher, spoil_step, "param_norm"),
    (student_distill, spoil_gradient, "grad_norm"), (ppd_gymnax, spoil_step, "param_norm")])
def test_a_gradient_or_parameter_that_is_not_finite_stops_the_run(m, spoil, quantity, tiny_teacher, tmp_path, monkeypatch):
    """With one gradient step an update, the loss itself is still finite in the first; test_runs.py sees both norms in all scripts."""
    spoil(m, monkeypatch)
    flags = {"num_minibatches": 1, "update_epochs": 1} if m is not student_distill else {"log_every": 1}
    flags |= {"seed": 1000 + len(quantity)} | ({"num_parts": 4} if m is ppd_gymnax else {})  # args that nothing else has compiled
    first = "updates 1 to 1 of the teacher" if m is ppd_gymnax else "update 1"
    with pytest.raises(SystemExit, match=rf"error: {first} gave losses/{quantity} = \[?(nan|inf)\]?; the last good state is in .*run"):
        m.main(flags_of(m, tmp_path / "run", tiny_teacher, **flags))
    assert updates(tmp_path / "run") == [0]


def test_the_baselines_check_before_a_checkpoint_and_name_the_update(tiny_teacher, tmp_path, monkeypatch):
    """Rows are means over twenty updates, checkpoints come after each third; the eighth update is spoiled."""
    m, update, calls = student_distill, student_distill.update, []

    def spoiled(*args):
        state, metrics = update(*args)
        calls.append(None)
        return state, metrics | ({"losses/param_norm": jnp.float32(np.inf)} if len(calls) == 8 else {})

    monkeypatch.setattr(m, "update", spoiled)
    with pytest.raises(SystemExit, match="update 8 gave losses/param_norm = inf"):
        m.main(flags_of(m, tmp_path / "run", tiny_teacher, log_every=20, checkpoint_every=3))
    assert updates(tmp_path / "run") == [3, 6]


# envpool, which trusts its caller --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "env_id"), [
    (ppd_mujoco, "Hopper-v4"), (train_teacher, "Hopper-v4"), (student_distill, "Hopper-v4"), (teacher_distill, "Hopper-v4"),
    (ppd_atari, "Pong-v5"), (ppd_procgen, "CoinrunEasy-v0")])
def test_no_seed_reaches_2_to_the_31(m, env_id, tmp_path, monkeypatch):
    """Not with the largest --seed, nor after so many updates that a resumed run's would, nor in the evaluation."""
    seeds, highest, folder = [], m.RANGES["seed"][1], tmp_path / "run"

    class Made(Exception):
        pass

    def make(env_id, num_envs, seed, **options):
        seeds.append(seed + num_envs)
        raise Made

    monkeypatch.setattr(m.import_envpool(), "make_gymnasium", make)
    variant = {"contact_forces": True, "frame_skip": 4, "repeat_action_probability": 0.0, "start_level": 0, "num_levels": 200}
    if m is not train_teacher:
        variant = {name: variant[name] for name in getattr(m, "VARIANT", ("contact_forces",))}
        teacher = SimpleNamespace(about={"env_id": env_id, "variant": variant}, policy=None, params={"policy": {}})
        monkeypatch.setattr(m, "load_teacher", lambda *args: teacher)
        monkeypatch.setattr(m, "corrupt", lambda params, *args: params)
    args = small(m, env_id, tmp_path / "none", seed=highest, total_timesteps=10**12)
    with pytest.raises(Made):
        m.main(args)
    with pytest.raises(Made):
        m.assess(args, variant, *[None] * (m.assess.__code__.co_argcount - 2))
    folder.mkdir()
    m.save_file(folder / "checkpoint_000000000000.safetensors", {
        "script": m.__name__, "command": "", "args": vars(args) | {"run_dir": None}, "updates": 10**9, "finished": [], "teacher": {},
        "logged": m.BEGIN}, {})
    with pytest.raises(Made):
        go_on(m, folder)
    assert seeds[0] == highest + 4 and len(seeds) == 3 and max(seeds) < 2**31 and min(seeds) > 0
    assert highest + m.EVAL_SEED + m.RANGES["eval_episodes"][1] < 2**31 and m.RANGES["num_envs"][1] + m.EVAL_SEED < 2**31
