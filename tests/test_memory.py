"""Memory and open files stay flat over a run: of ppd_mujoco.py, whose `Run` is that of its siblings, and of ppd_gymnax.py."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import os, re, sys
import {script} as m
check_finite, sizes, files = m.check_finite, [], []
def watched(*args):
    with open("/proc/self/status") as file:
        sizes.append(sum(map(int, re.findall(r"(?:RssAnon|VmSwap):\\s+(\\d+)", file.read()))) / 1024)
    files.append(len(os.listdir("/proc/self/fd")))
    check_finite(*args)
m.check_finite = watched
m.main(m.Args(run_dir=sys.argv[2], num_envs=4, num_steps=16, student_hidden=(64, 64), eval_episodes=1, {flags}))
tenth = len(sizes) // 10
print(len(sizes), sum(sizes[4 * tenth: 5 * tenth]) / tenth, sum(sizes[-tenth:]) / tenth, max(files[tenth: 2 * tenth]), max(files[-tenth:]))
"""


@pytest.mark.parametrize(("script", "flags"), [
    ("ppd_mujoco", "env_id='Hopper-v4', teacher=sys.argv[1], total_timesteps=1000 * 64, checkpoint_every=10, num_devices=1"),
    ("ppd_gymnax", "env_id='CartPole-v1', teacher_timesteps=64, total_timesteps=400 * 64, num_parts=400, num_seeds=1, num_minibatches=2, "
                   "teacher_num_steps=16")])
def test_memory_and_open_files_are_flat(script, flags, tiny_teacher, tmp_path):
    """Memory of its own, in MiB, over the fifth tenth of the updates, when what compilation took is given back, against the last tenth."""
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(script=script, flags=flags), str(tiny_teacher), str(tmp_path / "run")],
                         cwd=ROOT, check=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    line = next(line for line in reversed(run.stdout.splitlines()) if line[0].isdigit())
    updates, early, late, files, files_late = map(float, line.split())
    print(line)
    assert updates >= 400 and files_late <= files
    assert late < 1.005 * early, f"{early:.1f} MiB grew to {late:.1f} MiB"
