"""Speed of ppd_gymnax.py: environment steps per second of all seeds together, learning as a teacher and as a student.

    python benchmark/speed_gymnax.py                                        # on a CPU
    python benchmark/speed_gymnax.py --num-seeds 1 8 64 --num-envs 64       # what a GPU has room for

PPO and PPD train the same networks on rollouts of the same size, in turn within one process, and only after both are
compiled; medians over rounds. What PPD costs is the median over rounds of its time over PPO's.
"""

import dataclasses
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ppd_gymnax as m


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    env_id: tuple[str, ...] = ("CartPole-v1", "Breakout-MinAtar")
    """tasks"""
    num_seeds: tuple[int, ...] = (1, 5)
    """seeds side by side"""
    num_envs: int | None = None
    """environments of each seed; by default the task's"""
    rounds: int = 9
    """measurements, each of PPO and then of PPD"""
    seconds: float = 2.0
    """about how long one measurement takes"""
    device: str = "auto"
    """where it runs: auto, cpu or gpu"""
    json: str | None = None
    """also write the figures to this file"""


def trainer(args: m.Args, taught: bool):
    """A function of the number of updates that trains all seeds for so many and waits for the end."""
    networks, teacher = m.make_networks(args.env_id, args.networks["same"]), None
    indices = m.fill_devices(args.num_seeds)
    place = m.over_devices(len(indices))
    if taught:
        own = m.init_state(args, networks, 0)
        teacher = m.stack([m.Frozen(own.params, own.obs_stats)] * len(indices))
        networks = m.make_networks(args.env_id, args.networks["same"], networks)
    state = m.stack([m.init_state(args, networks, int(i)) for i in indices])
    state, teacher = jax.device_put((state, teacher), place)

    def run(updates: int) -> float:
        nonlocal state
        began = time.perf_counter()
        state, metrics = m.train(args, networks, teacher, state, jnp.ones((len(indices), updates)))
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    return run


def measure(args: Args, env_id: str, num_seeds: int) -> dict[str, float]:
    """Medians of steps per second with PPO and with PPD, and of what PPD costs in time."""
    flags = m.Args(env_id=env_id, num_seeds=num_seeds, num_envs=args.num_envs, method="ppo", device=args.device)
    flags = m.teacher_args(m.resolve(flags))
    runs, updates = {"PPO": trainer(flags, False), "PPD": trainer(flags, True)}, 2
    runs["PPO"](updates)  # compiles
    updates = max(1, round(updates * args.seconds / runs["PPO"](updates)))
    for run in runs.values():
        run(updates)
    times = np.array([[run(updates) for run in runs.values()] for _ in range(args.rounds)])
    steps = updates * flags.batch_size * num_seeds
    medians = np.median(steps / times, axis=0)
    return {"PPO": medians[0], "PPD": medians[1], "cost": float(np.median(times[:, 1] / times[:, 0])) - 1}


def main(args: Args) -> dict[str, dict[str, float]]:
    """Measures all tasks and numbers of seeds; prints and returns the medians."""
    m.choose_device(args.device)
    found = {f"{env_id}, {seeds} seed{'s' * (seeds > 1)}": measure(args, env_id, seeds)
             for env_id in args.env_id for seeds in args.num_seeds}
    for name, medians in found.items():
        print(f"{name:<32} PPO {medians['PPO']:>9,.0f} steps/s   PPD {medians['PPD']:>9,.0f} steps/s   "
              f"{medians['cost']:+.0%} time")
    if args.json:
        about = {"command": " ".join(["python benchmark/speed_gymnax.py", *sys.argv[1:]]),
                 "versions": {name: version(name) for name in ("jax", "flax", "gymnax")},
                 "devices": len(jax.devices()), "cores": os.cpu_count(), "rounds": args.rounds, "gymnax": found}
        Path(args.json).write_text(json.dumps(about, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
