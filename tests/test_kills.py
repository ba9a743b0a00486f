"""A run that is killed at any moment goes on with --resume: no unreadable file, no row lost or made twice, and its model at the end."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# A parent that has imported the script, but not begun to compute, forks the lives of a run; each ends by SIGKILL or by itself
PROGRAM = """
import json, os, random, signal, sys, time
from pathlib import Path
import {script} as m
m.import_envpool()

folder, teacher, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
UPDATES, BATCH = 600, 4 * 4
flags = dict(env_id="Hopper-v4", total_timesteps=UPDATES * BATCH, num_envs=4, num_steps=4, checkpoint_every=3, eval_episodes=2)
flags |= dict(log_every=1) if "distill" in m.__name__ else {{}}
flags |= dict(teacher=teacher, student_hidden=(8,))
rng, kills, resumed, found = random.Random(0), [], 0, []


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def life(spoil=None):
    "Forks one life of the run, which begins it or goes on."
    child = os.fork()
    if child == 0:
        os.dup2(os.open(folder.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        try:
            if spoil is not None:
                spoil()
            begun = (folder / "checkpoint.msgpack").exists() or (folder / "checkpoint_previous.msgpack").exists()
            m.main(m.Args(resume=str(folder)) if begun else m.Args(run_dir=str(folder), **flags))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check():
    "Every file that is there is whole, and the checkpoint counts on no row that is not there."
    newest = None
    for name in m.CHECKPOINTS:
        if (folder / name).exists():
            newest = m.read_tree(folder / name, "checkpoint")["updates"] if newest is None else newest
            m.read_tree(folder / name, "checkpoint")
    rows = [line for line in (folder / "progress.csv").read_bytes().split(b"\\n")[:-1]] if (folder / "progress.csv").exists() else []
    steps = [int(row.split(b",")[0]) for row in rows[1:]]
    assert steps == [BATCH * (i + 1) for i in range(len(steps))], steps
    assert newest is None or len(steps) >= newest, (len(steps), newest)
    found.append(newest)


def spoil_call(name, number, before, half=False):
    "Kills at the number-th call of a function of os, before it or after it."
    real, calls = getattr(os, name), []

    def call(*args):
        calls.append(None)
        if len(calls) == number and before:
            die()
        result = real(*args)
        if len(calls) == number:
            die()
        return result

    setattr(os, name, call)


def spoil_write(number):
    "Kills with half of the number-th file of write_atomic written."
    real, calls = open, []

    class Half:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            die()

    def opened(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        if mode == "wb" and str(path).endswith(".new"):
            calls.append(None)
            if len(calls) == number:
                return Half(file)
        return file

    m.open = opened


def spoil_row(number):
    "Kills with half of the number-th row of progress.csv written."
    real, calls = m.csv.DictWriter.writerow, []

    def row(self, values):
        calls.append(None)
        if len(calls) == number:
            with open(folder / "progress.csv", "ab") as file:
                file.write(b"%d,1.2" % (values["global_step"] if isinstance(values, dict) and isinstance(values.get("global_step"), int) else 1))
            die()
        return real(self, values)

    m.csv.DictWriter.writerow = row


if mode == "random":
    child, newest = life(), folder / "checkpoint.msgpack"
    for i in range(20):
        began, known = time.time(), newest.stat().st_mtime_ns if newest.exists() else 0
        if i < 15 or known == 0:  # most kills come while it learns, where nearly all it does is to write files
            while not newest.exists() or newest.stat().st_mtime_ns == known:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
        else:  # the others at any moment from its start on
            time.sleep(rng.uniform(0, lasted))
        lasted = time.time() - began
        os.kill(child, signal.SIGKILL)
        kills.append(status(child))
        check()
        child = life()
    assert status(child) == 0
else:
    spoils = [lambda: spoil_call("fsync", 8, True), lambda: spoil_call("fsync", 9, False), lambda: spoil_call("replace", 5, True),
              lambda: spoil_call("replace", 6, True), lambda: spoil_call("replace", 7, False), lambda: spoil_call("replace", 8, False),
              lambda: spoil_write(1), lambda: spoil_write(2), lambda: spoil_write(4), lambda: spoil_row(5), lambda: spoil_row(6)]
    for spoil in spoils if m.__name__ == "ppd_mujoco" else spoils[::3]:
        kills.append(status(life(spoil)))
        check()
    assert status(life()) == 0
check()
print(json.dumps({{"kills": kills, "updates": found, "files": sorted(x.name for x in folder.iterdir()), "rows": UPDATES}}))
"""


def run(script, mode, folder, teacher):
    program = PROGRAM.format(script=script)
    done = subprocess.run([sys.executable, "-c", program, folder / "run", teacher, mode], cwd=ROOT, capture_output=True, text=True, timeout=500,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"})
    output = (folder / "output").read_text() if (folder / "output").exists() else ""
    assert done.returncode == 0, done.stderr + output[-3000:]
    assert "Traceback" not in output
    found = json.loads(done.stdout)
    print(script, mode, found["kills"], found["updates"])
    assert {name for name in found["files"] if "tfevents" not in name} == {
        "args.json", "progress.csv", "checkpoint.msgpack", "checkpoint_previous.msgpack", "results.json",
        "student.msgpack"}
    assert found["updates"] == sorted(found["updates"], key=lambda x: -1 if x is None else x) and found["updates"][-1] == found["rows"]
    return found


def test_a_run_killed_at_twenty_random_moments(tiny_teacher, tmp_path):
    found = run("ppd_mujoco", "random", tmp_path, tiny_teacher)
    assert found["kills"] == [-9] * 20


@pytest.mark.parametrize("script", ["ppd_mujoco", "student_distill"])
def test_a_run_killed_inside_its_writes(script, tiny_teacher, tmp_path):
    found = run(script, "writes", tmp_path, tiny_teacher)
    assert found["kills"] == [-9] * (11 if script == "ppd_mujoco" else 4)
