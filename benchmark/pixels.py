"""Learning from pixels, shown in minutes on a CPU: each method distils a fixed teacher of random weights.

    python benchmark/pixels.py --env-id Pong-v5 --json pong.json

Teachers that play well take a GPU; whether a student comes to resemble its teacher does not depend on that. The teacher
is the small Nature-CNN with random weights, its logits scaled up until it has clear preferences. PPD, student-distill
and teacher-distill each distil it into another such network, and the KL divergence between the two policies is printed
as it was at first and as it is at last, means of the first and the last tenth of the run's rows.
"""

import csv
import dataclasses
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ppd_atari
import ppd_procgen
import student_distill
import teacher_distill
import train_teacher

Method = Literal["ppd", "student-distill", "teacher-distill"]


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    env_id: Literal["Pong-v5", "CoinrunEasy-v0"] = "Pong-v5"
    """task"""
    method: tuple[Method, ...] = get_args(Method)
    """methods"""
    timesteps: int = 4_000
    """environment steps of each method"""
    learning_rate: float = 3e-4
    """step size of each method"""
    scale: float = 30.0
    """gain of the teacher's last layer, in place of 0.01"""
    seed: int = 100
    """seed of teacher and students"""
    json: str | None = None
    """also write the figures to this file"""


def random_teacher(args: Args, path: Path) -> None:
    """Write a teacher of random weights, in the file format of train_teacher.py."""
    m = train_teacher
    flags = m.Args(env_id=args.env_id, size="smaller", seed=args.seed)
    variant = {name: getattr(flags, name) for name in m.VARIANTS[m.suite_of(args.env_id)]}
    envs = m.make_envs(args.env_id, 1, args.seed, variant, "training")
    policy, value = m.Policy(flags.network, int(envs.action_space.n)), m.Value(flags.network)
    shape = envs.observation_space.shape
    x = jnp.zeros((1, *shape), jnp.uint8)
    policy_key, value_key = jax.random.split(jax.random.PRNGKey(args.seed + 1))
    params = {"policy": policy.init(policy_key, x), "value": value.init(value_key, x)}
    head = params["policy"]["params"]["Dense_1"]
    head["kernel"] = head["kernel"] * args.scale / 0.01
    m.save_file(path, {
        "env_id": args.env_id, "script": "benchmark/pixels", "args": vars(flags), "role": "teacher",
        "network": flags.network._asdict(), "command": "python benchmark/pixels.py", "action_dim": policy.action_dim,
        "observation_shape": list(shape), "variant": variant, "versions": {},
        "evaluation": {"mean": 0.0, "std": 0.0, "games": 0, "returns": []}}, params)


def main(args: Args) -> dict[str, dict[str, float]]:
    """Distil with each method and print the fall of the KL divergence; returns it."""
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # not only when all is measured
    scripts = {"ppd": ppd_atari if args.env_id == "Pong-v5" else ppd_procgen,
               "student-distill": student_distill, "teacher-distill": teacher_distill}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder, "teacher.safetensors")
        random_teacher(args, teacher)
        for name in args.method:
            m = scripts[name]
            run, rows = Path(folder, name), {} if name == "ppd" else {"log_every": 10}
            m.finish = lambda *rest: {}  # the evaluation of a random policy would say nothing
            m.main(m.Args(env_id=args.env_id, teacher=str(teacher), student_size="smaller", seed=args.seed,
                          total_timesteps=args.timesteps, learning_rate=args.learning_rate, run_dir=str(run), **rows))
            with open(run / "progress.csv", newline="") as file:
                table = list(csv.DictReader(file))
            kl = [float(row["losses/teacher_kl"]) for row in table]
            tenth = max(1, len(kl) // 10)
            first, last = float(np.mean(kl[:tenth])), float(np.mean(kl[-tenth:]))
            found[m.__name__] = {"first": first, "last": last, "fall": 1 - last / first,
                                 "seconds": float(table[-1]["seconds"]), "SPS": float(table[-1]["charts/SPS"])}
    print(f"\n{args.env_id}, {args.timesteps:,} steps: KL divergence to a teacher of random weights")
    for name, x in found.items():
        print(f"{name:<16} {x['first']:.3f} to {x['last']:.3f}: {x['fall']:.0%} less in {x['seconds']:.0f} s")
    if args.json:
        about = {"command": " ".join(["python benchmark/pixels.py", *sys.argv[1:]]), "env_id": args.env_id,
                 "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "envpool")}}
        Path(args.json).write_text(json.dumps(about | {"kl": found}, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
