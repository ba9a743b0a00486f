"""The grid on a real Slurm: controller, daemon and authentication of one node, started here, with preemption by requeueing."""

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, read_csv

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "scontrol", "squeue")
pytestmark = pytest.mark.skipif(
    os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)),
    reason="the test of Slurm needs root and Slurm itself: apt-get install slurm-wlm munge")

TINY = "--teacher-timesteps 2048 --total-timesteps 20480 --num-seeds 1 --num-envs 8 --num-parts 80 --eval-episodes 2 --teacher-num-steps 32"


def free_port():
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of one node with two processors; jobs of the partition `high` take the place of those of `low`."""
    folder, host = tmp_path / "slurm", socket.gethostname()
    for name in ("state", "spool", "munge"):
        (folder / name).mkdir(parents=True)
    munge = folder / "munge"
    config = folder / "slurm.conf"
    config.write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={munge}/socket,cred_expire=10
CredType=cred/munge
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
KillWait=5
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=12
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF
""")
    monkeypatch.setenv("SLURM_CONF", str(config))
    subprocess.run(["mungekey", "--create", "--keyfile", str(munge / "key")], check=True)
    daemons = [subprocess.Popen(words, stdout=open(folder / f"{words[0]}.out", "w"), stderr=subprocess.STDOUT) for words in (
        ["munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key", f"--pid-file={munge}/pid",
         f"--log-file={munge}/log", f"--seed-file={munge}/seed"],
        ["slurmctld", "-D", "-f", str(config)], ["slurmd", "-D", "-f", str(config)])]
    try:
        for _ in range(60):
            found = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout
            if "idle" in found:
                break
            time.sleep(0.5)
        else:
            pytest.fail("\n".join(path.read_text()[-1500:] for path in (*folder.glob("*.log"), *folder.glob("*.out"))))
        yield folder
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def test_an_array_of_runs_survives_preemption(slurm, tmp_path):
    folder = tmp_path / "grid"
    words = [sys.executable, "benchmark/grid.py", "--executor", "slurm", "--slurm-partition", "low", "--slurm-cpus", "1", "--suite", "gymnax",
             "--task", "Breakout-MinAtar", "--size", "same", "--method", "ppo", "ppd", "student-distill", "--folder", str(folder), f"--extra={TINY}"]
    grid = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        began = time.time()
        while not (cut := [path.parent for path in folder.glob("methods__*__ppd__*/checkpoint_*.safetensors") if int(path.stem[11:])]):
            assert grid.poll() is None and time.time() - began < 300, grid.communicate()[0] if grid.poll() else "too slow"
            time.sleep(0.2)
        running = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%i"], capture_output=True, text=True).stdout.split()
        assert running and all("_" in job for job in running)  # of an array
        urgent = subprocess.run(["sbatch", "-p", "high", "-n", "2", "-o", "/dev/null", "--wrap", "sleep 3"], capture_output=True, text=True)
        assert urgent.returncode == 0, urgent.stderr
        out = grid.communicate(timeout=580)[0]
    finally:
        grid.kill()
    logs = {path.stem: path.read_text() for path in folder.glob("*.log")}
    assert grid.returncode == 0 and "3 of 3 runs are done" in out, out + str(logs)
    assert "interrupted; go on with" in logs[cut[0].name] and "--resume" in logs[cut[0].name]
    rows = [(row["experiment"], row["method"], row["size"]) for row in read_csv(folder / "results/gymnax.csv")]
    assert len(rows) == len(set(rows)) == 3
    for path in folder.glob("*/progress.csv"):  # no row lost or repeated
        progress = [(row["phase"], int(row["global_step"])) for row in read_csv(path)]
        for phase in {phase for phase, _ in progress}:
            steps = [step for each, step in progress if each == phase]
            assert steps == [steps[0] * (i + 1) for i in range(len(steps))]
