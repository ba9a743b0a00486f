"""Whether an interrupted MuJoCo distillation ends where the unbroken one does.

    python benchmark/resume.py --json benchmark/results/resume/Hopper-v4.json

The simulator's state cannot be saved, so a resumed run is not the unbroken one to the bit. For each seed a student is
distilled twice: in one go, and stopped half-way by SIGTERM and resumed. Both end with the script's own evaluation; what
counts is whether the student's return over its teacher's differs by more than it does from seed to seed.
"""

import dataclasses
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    env_id: str = "Hopper-v4"
    """task, of which a teacher is shipped"""
    seeds: tuple[int, ...] = (100, 200, 300)
    """seeds of the students"""
    timesteps: int = 300_000
    """environment steps of each run"""
    num_steps: int = 64
    """steps of each environment in a rollout"""
    student_size: str = "larger"
    """size of the students"""
    eval_episodes: int = 50
    """episodes of each evaluation"""
    json: str | None = None
    """also write the figures to this file"""


def distil(args: Args, seed: int, folder: Path, stop_at: int | None) -> dict:
    """Distils one student, stopped by SIGTERM after this many rows where one is given; what results.json says."""
    script = [sys.executable, str(ROOT / "ppd_mujoco.py")]
    flags = {"env-id": args.env_id, "seed": seed, "total-timesteps": args.timesteps, "num-steps": args.num_steps,
             "student-size": args.student_size, "eval-episodes": args.eval_episodes, "run-dir": folder}
    run = subprocess.Popen([*script, *(str(x) for name, value in flags.items() for x in (f"--{name}", value))])
    if stop_at is not None:
        table = folder / "progress.csv"
        while run.poll() is None and (not table.exists() or table.read_bytes().count(b"\n") <= stop_at):
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        if run.wait() != 128 + signal.SIGTERM or (folder / "results.json").exists():
            raise SystemExit("error: the run could not be stopped half-way; give it more --timesteps")
        run = subprocess.Popen([*script, "--resume", str(folder)])
    if run.wait() != 0:
        raise SystemExit(f"error: the run in {folder} failed")
    return json.loads((folder / "results.json").read_text())


def main(args: Args) -> dict:
    """Runs all of it and prints the ratios; returns what the file has."""
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # not only when all is measured
    found: dict = {"unbroken": [], "resumed": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for name in found:
                run = Path(folder, f"{name}__{seed}")
                if name == "unbroken":
                    result = distil(args, seed, run, None)
                    half = ((run / "progress.csv").read_bytes().count(b"\n") - 1) // 2
                else:
                    result = distil(args, seed, run, half)
                found[name].append({"seed": seed, "ratio": result["ratio"], "student": result["student"]["mean"],
                                    "teacher": result["teacher"]["mean"], "returns": result["student"]["returns"]})
    ratios = {name: [x["ratio"] for x in runs] for name, runs in found.items()}
    spread = max(ratios["unbroken"]) - min(ratios["unbroken"])
    differences = [b - a for a, b in zip(ratios["unbroken"], ratios["resumed"], strict=True)]
    means = {name: sum(x) / len(x) for name, x in ratios.items()}
    print(f"\n{args.env_id}, {args.timesteps:,} steps: student / teacher of seeds {args.seeds}")
    for name, x in ratios.items():
        print(f"{name:<10} {', '.join(f'{value:.3f}' for value in x)}; mean {means[name]:.3f}")
    print(f"largest difference of a seed {max(map(abs, differences)):.3f}; spread of the unbroken seeds {spread:.3f}; "
          f"difference of the means {abs(means['resumed'] - means['unbroken']):.3f}")
    about = {"command": " ".join(["python benchmark/resume.py", *sys.argv[1:]]), "env_id": args.env_id,
             "timesteps": args.timesteps, "versions": result["versions"]}
    about |= {"resume": found, "means": means, "spread": spread, "differences": differences}
    if args.json:
        Path(args.json).write_text(json.dumps(about, indent=2) + "\n")
    return about


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
