"""Memory stays flat over a run."""

import os
import subprocess
import sys

from conftest import ROOT

PROGRAM = """
import resource, sys
import ppd_mujoco as m
collect, sizes = m.collect, []
def watched(*args):
    with open("/proc/self/statm") as file:
        sizes.append(int(file.read().split()[1]) * resource.getpagesize() / 2**20)
    return collect(*args)
m.collect = watched
m.main(m.Args(env_id="Hopper-v4", teacher=sys.argv[1], run_dir=sys.argv[2], total_timesteps=600 * 64, num_envs=4, num_steps=16,
              student_hidden=(64, 64), eval_episodes=1, checkpoint_every=10))
tenth = len(sizes) // 10
print(sum(sizes[tenth: 2 * tenth]) / tenth, sum(sizes[-tenth:]) / tenth)
"""


def test_memory_is_flat(tiny_teacher, tmp_path):
    """Resident size of the second tenth of 600 updates, after compilation, against that of the last tenth."""
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(tiny_teacher), str(tmp_path / "run")], cwd=ROOT, check=True,
                         capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    early, late = map(float, run.stdout.splitlines()[-1].split())
    assert late < 1.02 * early, f"{early:.1f} MiB grew to {late:.1f} MiB"
