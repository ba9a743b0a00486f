"""Speed of ppd_gymnax.py: environment steps per second of all seeds together, learning as a teacher and as a student.

    python benchmark/speed_gymnax.py                                        # on a CPU
    python benchmark/speed_gymnax.py --num-seeds 1 8 64 --num-envs 64       # what a GPU has room for

PPO and PPD train the same networks on rollouts of the same size, in turn within one process, and only after both are
compiled; medians over rounds. What PPD costs is the median over rounds of its time over PPO's. With --purejaxrl its PPO
takes its turn too, where there is one seed: same environments, widths of networks, rollouts, epochs and minibatches.
"""

import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

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
    purejaxrl: str | None = None
    """folder of a checkout of PureJaxRL, whose PPO is measured beside ours with one seed"""
    json: str | None = None
    """also write the figures to this file"""


def trainer(args: m.Args, taught: bool):
    """A function of the number of updates that trains all seeds for so many and waits for the end."""
    networks, teacher = m.make_networks(args.env_id, args.networks["same"]), None
    if taught:
        teacher = m.stack([m.model(m.init_state(args, networks, 0))] * args.num_seeds)
        networks = m.make_networks(args.env_id, args.networks["same"], args.networks["same"])
    state = m.stack([m.init_state(args, networks, i) for i in range(args.num_seeds)])
    state, teacher = m.spread(state), m.spread(teacher) if taught else None

    def run(updates: int) -> float:
        nonlocal state
        distill_coefs = m.spread(jnp.ones((args.num_seeds, updates)))
        began = time.perf_counter()
        state, metrics = m.train(args, networks, teacher, state, distill_coefs)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    return run


def make_as_before(make: Callable, env_id: str):
    """An environment of gymnax with the `step` of its first versions, which PureJaxRL expects, and its parameters."""
    env, params = make(env_id)
    new_step = env.step

    def step(key: jax.Array, state: Any, action: jax.Array, params: Any):
        obs, state, reward, terminated, truncated, _ = new_step(key, state, action, params)
        return obs, state, reward, terminated | truncated, {}

    env.step = step
    return env, params


def purejaxrl(folder: str, flags: m.Args):
    """A function of the number of updates that trains PureJaxRL's PPO for so many, and returns the time it took."""
    for unused in ("brax", "brax.envs", "brax.envs.wrappers", "brax.envs.wrappers.training", "navix"):
        sys.modules.setdefault(unused, MagicMock())  # what its wrappers of other suites import
    sys.path.insert(0, str(Path(folder) / "purejaxrl"))
    ppo = importlib.import_module("ppo")
    compiled = {}

    def run(updates: int) -> float:
        if updates not in compiled:
            config = {"LR": flags.learning_rate, "NUM_ENVS": flags.num_envs, "NUM_STEPS": flags.num_steps,
                      "TOTAL_TIMESTEPS": updates * flags.batch_size, "UPDATE_EPOCHS": flags.update_epochs,
                      "NUM_MINIBATCHES": flags.num_minibatches, "GAMMA": flags.gamma, "GAE_LAMBDA": flags.gae_lambda,
                      "CLIP_EPS": flags.clip_coef, "ENT_COEF": flags.ent_coef, "VF_COEF": flags.vf_coef,
                      "MAX_GRAD_NORM": flags.max_grad_norm, "ACTIVATION": "relu", "ENV_NAME": flags.env_id,
                      "ANNEAL_LR": False}
            with patch.object(ppo.gymnax, "make", partial(make_as_before, ppo.gymnax.make)):
                compiled[updates] = jax.jit(ppo.make_train(config)).lower(jax.random.key(0)).compile()
        began = time.perf_counter()
        jax.block_until_ready(compiled[updates](jax.random.key(0)))
        return time.perf_counter() - began

    return run


def measure(args: Args, env_id: str, num_seeds: int) -> dict[str, float]:
    """Medians of steps per second with PPO and with PPD, and of what PPD costs in time; PureJaxRL's beside them."""
    flags = m.Args(env_id=env_id, num_seeds=num_seeds, num_envs=args.num_envs, method="ppo", device=args.device)
    flags = m.teacher_args(m.resolve(flags))
    runs, updates = {"PPO": trainer(flags, False), "PPD": trainer(flags, True)}, 2
    if args.purejaxrl and num_seeds == 1:
        runs["PureJaxRL"] = purejaxrl(args.purejaxrl, flags)
    runs["PPO"](updates)  # compiles
    updates = max(1, round(updates * args.seconds / runs["PPO"](updates)))
    for run in runs.values():
        run(updates)
    times = np.array([[run(updates) for run in runs.values()] for _ in range(args.rounds)])
    steps = updates * flags.batch_size * num_seeds
    found = dict(zip(runs, np.median(steps / times, axis=0).tolist(), strict=True))
    found["cost"] = float(np.median(times[:, 1] / times[:, 0])) - 1
    if "PureJaxRL" in runs:
        found["ratio"] = float(np.median(times[:, 2] / times[:, 0]))
    return found


def main(args: Args) -> dict[str, dict[str, float]]:
    """Measures all tasks and numbers of seeds; prints and returns the medians."""
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # not only when all is measured
    m.choose_device(args.device)
    found = {f"{env_id}, {seeds} seed{'s' * (seeds > 1)}": measure(args, env_id, seeds)
             for env_id in args.env_id for seeds in args.num_seeds}
    for name, medians in found.items():
        theirs = (f"   PureJaxRL {medians['PureJaxRL']:>9,.0f} steps/s, ours is {medians['ratio']:.2f} times as fast"
                  if "PureJaxRL" in medians else "")
        print(f"{name:<32} PPO {medians['PPO']:>9,.0f} steps/s   PPD {medians['PPD']:>9,.0f} steps/s   "
              f"{medians['cost']:+.0%} time{theirs}")
    if args.json:
        words = ["FOLDER" if word == args.purejaxrl else word for word in sys.argv[1:]]
        about = {"command": " ".join(["python benchmark/speed_gymnax.py", *words]),
                 "versions": {name: version(name) for name in ("jax", "flax", "gymnax")},
                 "devices": len(jax.devices()), "cores": os.cpu_count(), "rounds": args.rounds, "gymnax": found}
        Path(args.json).write_text(json.dumps(about, indent=2) + "\n")
    return found


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
