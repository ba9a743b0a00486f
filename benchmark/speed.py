"""Steps per second of a script, beside the most this machine could give it.

    python benchmark/speed.py --env-id HalfCheetah-v4 --rounds 5

Each round measures three things one after the other: the environments alone, stepped with random actions; the rate of a
large matrix product; and the script itself, its whole loop with logging and checkpoints. An algorithm that learns only
between rollouts can do no better than to spend the first two times, so the machine's limit is

    1 / (1 / environment steps per second + floating-point operations per step / operations per second).

The operations are those of the matrix products of acting, of the rollout's values, log-probabilities and teacher, and
of forward and backward passes over all epochs. All else (Adam, sampling, logging, Python) counts against the script.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ppd_mujoco
import train_teacher


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    env_id: str = "HalfCheetah-v4"
    """task; for ppd_mujoco one whose teacher is shipped"""
    script: Literal["ppd_mujoco", "train_teacher"] = "ppd_mujoco"
    """what is measured"""
    student_size: Literal["smaller", "same", "larger"] = "larger"
    """of ppd_mujoco's student"""
    timesteps: int = 60_000
    """environment steps of the script in each round"""
    rounds: int = 5
    """rounds, of which the medians are given"""
    json: str | None = None
    """also write every round's figures to this file"""


def environment_rate(env_id: str, num_envs: int, seconds: float = 2.0) -> tuple[float, int, int]:
    """Steps per second of the environments alone, with random actions drawn beforehand; sizes of states and actions."""
    envs = ppd_mujoco.make_envs(env_id, num_envs, seed=1)
    space, rng = envs.action_space, np.random.default_rng(0)
    actions = rng.uniform(space.low, space.high, (64, num_envs, *space.shape))
    envs.reset()
    for action in actions:
        envs.step(action)
    steps, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for action in actions:
            envs.step(action)
        steps += actions.shape[0] * num_envs
    rate = steps / (time.perf_counter() - began)
    envs.close()
    return rate, envs.observation_space.shape[0], space.shape[0]


def matrix_rate(size: int = 2048, repeats: int = 20) -> float:
    """Floating-point operations per second of a square matrix product in float32."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    began = time.perf_counter()
    for _ in range(repeats):
        product(x, x).block_until_ready()
    return repeats * 2 * size**3 / (time.perf_counter() - began)


def operations_per_step(args: ppd_mujoco.Args | train_teacher.Args, inputs: int, actions: int) -> float:
    """Floating-point operations of all matrix products, for each environment step."""

    def weights(hidden: tuple[int, ...], outputs: int) -> int:
        widths = (inputs, *hidden, outputs)
        return sum(a * b for a, b in zip(widths[:-1], widths[1:], strict=True))

    policy, value, first = weights(args.hidden, actions), weights(args.hidden, 1), inputs * args.hidden[0]
    rollout = 2 * policy + 2 * policy + 2 * value * (args.num_steps + 1) / args.num_steps  # act; log-probs; values
    if isinstance(args, ppd_mujoco.Args):
        rollout += 2 * weights((256, 256), actions)  # the shipped teachers
    learning = 6 * (policy + value) - 2 * 2 * first  # forward, weights' gradient, inputs' gradient but for the data's
    return rollout + args.update_epochs * learning


def script_rate(args: Args) -> tuple[float, object]:
    """Steps per second of the script after its first update, and the flags as it resolved them."""
    m = {"ppd_mujoco": ppd_mujoco, "train_teacher": train_teacher}[args.script]
    size = {"student_size": args.student_size} if m is ppd_mujoco else {}
    with tempfile.TemporaryDirectory() as folder:
        flags = m.Args(
            env_id=args.env_id, total_timesteps=args.timesteps, eval_episodes=1, run_dir=f"{folder}/run", **size)
        rate = m.main(flags)["SPS"]
    return rate, m.resolve(dataclasses.replace(flags, run_dir=None))


def main(args: Args) -> dict[str, float]:
    """Measures and prints; returns the medians."""
    rounds = []
    for number in range(args.rounds):
        environment, inputs, actions = environment_rate(args.env_id, 18)
        matrix = matrix_rate()
        rate, flags = script_rate(args)
        operations = operations_per_step(flags, inputs, actions)
        limit = 1 / (1 / environment + operations / matrix)
        rounds.append({"environment": environment, "matrix": matrix, "script": rate, "limit": limit,
                       "share": rate / limit})
        print(f"round {number + 1}: environments {environment:,.0f} steps/s, products {matrix / 1e9:,.0f} GFLOP/s, "
              f"{args.script} {rate:,.0f} steps/s, {rate / limit:.0%} of the limit", flush=True)
    medians = {name: statistics.median(x[name] for x in rounds) for name in rounds[0]}
    print(f"\n{args.script} on {args.env_id}, {operations / 1e6:.1f} MFLOP a step, medians of {args.rounds} rounds")
    print(f"{'environments alone':<22}{medians['environment']:>10,.0f} steps/s")
    print(f"{'matrix products':<22}{medians['matrix'] / 1e9:>10,.0f} GFLOP/s")
    print(f"{'limit of the machine':<22}{medians['limit']:>10,.0f} steps/s")
    print(f"{args.script:<22}{medians['script']:>10,.0f} steps/s, {medians['share']:.0%} of the limit")
    if args.json:
        about = {"command": " ".join(["python benchmark/speed.py", *sys.argv[1:]]), "cores": os.cpu_count(),
                 "versions": train_teacher.versions(), "operations_per_step": operations}
        Path(args.json).write_text(json.dumps(about | {"medians": medians, "rounds": rounds}, indent=2) + "\n")
    return medians


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
