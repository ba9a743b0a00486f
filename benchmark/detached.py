"""PPD beside PPD without the gradient through its ratio: ppd_mujoco.py with each --distill-weight.

    python benchmark/detached.py --json benchmark/results/detached/HalfCheetah-v4.json

The distillation term is KL(teacher || student) max(r, 1-ε). Its KL is the same for all actions in a state, so at r = 1
the gradient through r is 0 in expectation over the actions: what a minibatch has of it is noise of the size of the KL.
A run that is done is not repeated, one that was cut off is resumed.
"""

import csv
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    env_id: str = "HalfCheetah-v4"
    """task, of which a teacher is shipped"""
    student_size: str = "smaller"
    """size of the students"""
    seeds: tuple[int, ...] = (100, 200, 300)
    """seeds of the students; the teacher is the shipped one of seed 100"""
    timesteps: int = 2_000_000
    """environment steps of each run"""
    eval_episodes: int = 50
    """episodes of each evaluation"""
    folder: Path = Path("runs/detached")
    """where the runs go"""
    json: str | None = None
    """also write the figures to this file"""


def recent(values: list[float], fraction: float) -> float:
    """The mean of the 20 values, or as many as there are, up to this fraction of all."""
    last = max(1, round(fraction * len(values)))
    return statistics.fmean(values[max(0, last - 20): last])


def distil(args: Args, weight: str, seed: int) -> dict:
    """Distils one student, unless that is done; what it came to, and its KL divergence at quarters of the run."""
    run = args.folder / f"{weight}__{args.env_id}__{args.student_size}__{seed}"
    wanted = {"total_timesteps": args.timesteps, "eval_episodes": args.eval_episodes, "distill_weight": weight}
    if (run / "args.json").exists():
        made = json.loads((run / "args.json").read_text())
        if made | wanted != made:
            raise SystemExit(f"error: {run} is a run of other flags; name another --folder")
    if not (run / "results.json").exists():
        flags = wanted | {
            "env_id": args.env_id, "seed": seed, "student_size": args.student_size, "run_dir": run,
            "teacher": ROOT / f"teachers/{args.env_id}__100.safetensors"}
        if any(run.glob("checkpoint_*.safetensors")):
            flags = {"resume": run}
        else:  # it ended before its first checkpoint, or has not begun
            shutil.rmtree(run, ignore_errors=True)
        words = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
        if subprocess.run([sys.executable, str(ROOT / "ppd_mujoco.py"), *words]).returncode != 0:
            raise SystemExit(f"error: the run in {run} failed")
    result = json.loads((run / "results.json").read_text())
    with open(run / "progress.csv", newline="") as file:
        curve = [float(row["losses/teacher_kl"]) for row in csv.DictReader(file)]
    return {"seed": seed, "ratio": result["ratio"], "student": result["student"], "teacher": result["teacher"]["mean"],
            "kl": [recent(curve, quarter) for quarter in (0.25, 0.5, 0.75, 1.0)], "versions": result["versions"]}


def main(args: Args) -> dict:
    """Runs what is missing and prints the figures; returns what the file has."""
    weights = {"ppd": "ratio", "detached": "detached"}
    found = {name: [distil(args, weight, seed) for seed in args.seeds] for name, weight in weights.items()}
    print(f"\n{args.env_id}, {args.student_size} students, {args.timesteps:,} steps; seeds {args.seeds}")
    for name, runs in found.items():
        ratios = ", ".join(f"{x['ratio']:.3f}" for x in runs)
        kl = map(statistics.fmean, zip(*(x["kl"] for x in runs), strict=True))
        print(f"{name:<9} student / teacher {ratios}; mean KL at quarters {', '.join(f'{x:.2f}' for x in kl)}")
    about = {"command": " ".join(["python benchmark/detached.py", *sys.argv[1:]]), "env_id": args.env_id,
             "student_size": args.student_size, "timesteps": args.timesteps, "detached": found}
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(about, indent=2) + "\n")
    return about


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
