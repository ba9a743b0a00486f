"""A run that is killed at any moment goes on with --resume: no unreadable file, no row lost or made twice, and its model at the end.

Every script writes by the same `write_atomic` and `save_file` (test_shared_blocks.py). ppd_mujoco.py stands for the scripts whose
`Run` is the same, student_distill.py for a loop that logs and saves at different updates, ppd_gymnax.py for its own `Run`. But for
one run, what they learn is replaced by counting, so that they do little else than to write files.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

# A parent that has imported the script, but not begun to compute, forks the lives of a run; each ends by SIGKILL or by itself
PROGRAM = """
import json, os, random, signal, sys, time
from collections import deque
from pathlib import Path
import jax, numpy as np
import {script} as m

GYMNAX = m.__name__ == "ppd_gymnax"
if not GYMNAX:
    m.import_envpool()
folder, teacher, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
UPDATES, BATCH = {updates}, 4 * 4
LIMIT = UPDATES // ({kills} + 1)  # updates of a life that is killed, so that no machine is at the end before all kills
flags = dict(env_id="Hopper-v4", teacher=teacher, total_timesteps=UPDATES * BATCH, checkpoint_every=3)
if GYMNAX:
    flags = dict(env_id="CartPole-v1", num_seeds=1, teacher_timesteps=UPDATES * BATCH // 2, total_timesteps=UPDATES * BATCH // 2,
                 num_parts=UPDATES // 2, num_minibatches=2, teacher_num_steps=4)
flags |= dict(num_envs=4, num_steps=4, eval_episodes=2, student_hidden=(8,)) | (dict(log_every=1) if "distill" in m.__name__ else {{}})
rng, kills, found = random.Random(0), [], []


def count(limit):
    "Replaces what is learned: each update adds 1 to every parameter; after so many it waits to be killed."
    made = []

    class Envs:
        observation_space, close = np.zeros(11), lambda self: None

    def init_state(*args):
        arrays = {{name: np.zeros(4 if name == "discounted" else 1000, np.float32) for name in m.TrainState._fields}}
        return m.TrainState(**arrays | {{"params": {{"policy": arrays["key"], "value": arrays["key"]}}}})

    def learn(*args):
        time.sleep(60 if len(made) == limit else 0.001)
        made.append(None)
        state = next(x for x in args if isinstance(x, m.TrainState))
        metrics = dict.fromkeys(("losses/teacher_kl", "charts/episodic_return"), np.ones(2, np.float32)) if GYMNAX else {{"losses/teacher_kl": 1.0}}
        return state._replace(params=jax.tree.map(lambda x: np.asarray(x) + 1, state.params)), metrics

    m.init_state = m.init_state if GYMNAX else init_state
    m.make_envs, m.start = lambda *args: Envs(), lambda envs: m.Cursor(None, None, None, deque([1.0], maxlen=100))
    m.draw_noise, m.collect, m.corrupt = lambda key, *args: (key, None), lambda *args: None, lambda params, *args: params
    m.update = m.train = learn
    m.warn_if_slow = lambda *args: None
    m.wait = lambda arrays: arrays
    m.assess = lambda *args: {{"mean": 1.0, "std": 0.0, "games": 1, "returns": [[1.0]], "means": [1.0], "interval": None}}


def checkpoints():
    return sorted(folder.glob("checkpoint_*.safetensors"))


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def life(spoil=None, limit=None):
    "Forks one life of the run, which begins it or goes on."
    child = os.fork()
    if child == 0:
        os.dup2(os.open(folder.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        try:
            if mode != "real":
                count(limit)
            if spoil is not None:
                spoil()
            m.main(m.parse_args(["--resume", str(folder)]) if checkpoints() else m.Args(run_dir=str(folder), **flags))
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return child


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check():
    "Every checkpoint that is there is whole, there are two at most, and the newest counts on no row that is not there."
    newest = None
    assert len(checkpoints()) <= 3  # a third where the kill came between a new one and the removal of the oldest
    for path in checkpoints():
        about, arrays = m.read_file(path)
        newest = about["logged"]["rows"] if GYMNAX else about["updates"]
        bias = arrays["state/params/policy/params/Dense_0/bias"].ravel() if GYMNAX or mode == "real" else arrays["state/params/policy"]
        assert mode == "real" or (bias == about["updates"]).all()  # every update is in it, once
    rows = (folder / "progress.csv").read_bytes().split(b"\\n")[1:-1] if (folder / "progress.csv").exists() else []
    steps = [int(row.split(b",")[3 if GYMNAX else 0]) for row in rows]
    expected = [BATCH * (i + 1) for i in range(UPDATES // 2)] * 2 if GYMNAX else [BATCH * (i + 1) for i in range(UPDATES)]
    assert steps == expected[:len(steps)], steps
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
                file.write(b"teacher,1" if GYMNAX else b"%d,1.2" % values["global_step"])
            die()
        return real(self, values)

    m.csv.DictWriter.writerow = row


if mode != "writes":
    child, lasted = life(limit=LIMIT), 0.0
    for i in range({kills}):
        began, known = time.time(), checkpoints()
        if i % 4 < 3 or not known:  # most kills come while it learns, where nearly all it does is to write files
            while checkpoints() == known:
                assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it lives
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2 if mode == "real" else 0.05))
        else:  # the others at any moment from its start on
            time.sleep(rng.uniform(0, lasted))
        lasted = time.time() - began
        os.kill(child, signal.SIGKILL)
        kills.append(status(child))
        check()
        child = life(limit=LIMIT if i + 1 < {kills} else None)
    assert status(child) == 0
else:
    spoils = [lambda: spoil_row(5), lambda: spoil_write(2), lambda: spoil_call("fsync", 8, True), lambda: spoil_call("replace", 5, True),
              lambda: spoil_write(1), lambda: spoil_call("unlink", 9, True), lambda: spoil_call("fsync", 12, False), lambda: spoil_write(4),
              lambda: spoil_call("replace", 6, True), lambda: spoil_call("replace", 7, False), lambda: spoil_row(6)]
    for spoil in spoils[:{kills}]:
        kills.append(status(life(spoil)))
        check()
    assert status(life()) == 0
check()
print(json.dumps({{"kills": kills, "updates": found, "files": sorted(x.name for x in folder.iterdir()), "rows": UPDATES}}))
"""


def run(script, mode, kills, updates, folder, teacher):
    program = PROGRAM.format(script=script, kills=kills, updates=updates)
    done = subprocess.run([sys.executable, "-c", program, folder / "run", teacher, mode], cwd=ROOT, capture_output=True, text=True, timeout=500,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    output = (folder / "output").read_text() if (folder / "output").exists() else ""
    assert done.returncode == 0, done.stderr + output[-3000:]
    assert "Traceback" not in output
    found = json.loads(done.stdout)
    print(script, mode, found["updates"])
    assert found["kills"] == [-9] * kills
    models = {"student_100.safetensors", "teacher_100.safetensors", "curves.png"} if script == "ppd_gymnax" else {"student.safetensors"}
    left = [name for name in found["files"] if "tfevents" not in name and not name.startswith("checkpoint_")]
    assert set(left) == models | {"args.json", "progress.csv", "results.json"}
    assert sum(name.startswith("checkpoint_") for name in found["files"]) == 2
    assert found["updates"] == sorted(found["updates"], key=lambda x: -1 if x is None else x) and found["updates"][-1] == found["rows"]


def test_a_run_killed_at_three_random_moments(tiny_teacher, tmp_path):
    """As it is."""
    run("ppd_mujoco", "real", 3, 300, tmp_path, tiny_teacher)


@pytest.mark.parametrize(("script", "kills", "updates"), [("ppd_mujoco", 20, 600), ("ppd_gymnax", 5, 300)])
def test_a_run_killed_at_twenty_random_moments(script, kills, updates, tiny_teacher, tmp_path):
    """The gymnax run's are fewer, as each life takes longer to begin."""
    run(script, "random", kills, updates, tmp_path, tiny_teacher)


@pytest.mark.parametrize(("script", "kills"), [("ppd_mujoco", 11), ("student_distill", 4), ("ppd_gymnax", 6)])
def test_a_run_killed_inside_its_writes(script, kills, tiny_teacher, tmp_path):
    run(script, "writes", kills, 100, tmp_path, tiny_teacher)
