"""Whether it pays to step one half of the environments while the network acts for the other: both ways, in turn.

    python benchmark/overlap.py --json benchmark/results/speed/overlap.json

The scripts step all environments at once and then act for all. Here the same policy acts in HalfCheetah that way, and
for two pools of half the size whose simulators run on their own threads meanwhile.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppd_mujoco as m  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    env_id: str = "HalfCheetah-v4"
    """task"""
    num_envs: int = 18
    """environments, an even number"""
    hidden: tuple[int, ...] = (512, 512)
    """widths of the policy's hidden layers"""
    steps: int = 1000
    """steps of a round"""
    rounds: int = 5
    """rounds of each way, of which the medians are given"""
    json: str | None = None
    """also write every round's figures to this file"""


def make_policy(args: Args, num_envs: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return a policy of random weights, which samples actions for so many environments as the scripts do."""
    (size,), action_dim = m.task_shape(args.env_id)
    policy = m.Policy(args.hidden, action_dim)
    params = policy.init(jax.random.PRNGKey(0), jnp.zeros((1, size)))
    stats = m.Stats(jnp.zeros(size), jnp.ones(size), jnp.float32(1.0))
    _, noise = m.draw_noise(jax.random.PRNGKey(1), 1, (num_envs, action_dim))
    return lambda observations: np.asarray(m.act(policy, params, stats, noise, observations, 0))


def at_once(args: Args) -> float:
    """Return the microseconds of a step of all environments, stepped at once."""
    envs, act = m.make_envs(args.env_id, args.num_envs, 1, {"contact_forces": True}), make_policy(args, args.num_envs)
    observations = m.step(envs, act(m.reset(envs)))[0]
    began = time.perf_counter()
    for _ in range(args.steps):
        observations = m.step(envs, act(observations))[0]
    return (time.perf_counter() - began) / args.steps * 1e6


def in_halves(args: Args, num_threads: int) -> float:
    """Return the microseconds of a step of all environments, in two pools, each with so many threads."""
    half, make = args.num_envs // 2, m.import_envpool().make_gymnasium
    options = {"post_constraint": True} if args.env_id.startswith("Humanoid") else {}  # as in `at_once`
    pools = [make(args.env_id, num_envs=half, seed=1 + i * half, num_threads=num_threads, **options) for i in (0, 1)]
    act, space = make_policy(args, half), pools[0].action_space

    def send(pool, observations):
        actions = act(observations.astype(np.float32))
        pool.send(np.clip(actions, space.low, space.high, dtype=space.dtype))

    for pool in pools:
        send(pool, pool.reset()[0])
    began = time.perf_counter()
    for _ in range(args.steps):
        for pool in pools:  # while the network acts for this one, the other's simulator runs
            send(pool, pool.recv()[0])
    return (time.perf_counter() - began) / args.steps * 1e6


def main(args: Args) -> dict[str, float]:
    """Measure the ways in turn; print and return the medians."""
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # not only when all is measured
    if args.num_envs % 2:
        raise SystemExit(f"error: --num-envs {args.num_envs} has no halves")
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as in the scripts
    ways = {"at once": at_once, "two halves, 1 thread each": lambda args: in_halves(args, 1),
            "two halves, 2 threads each": lambda args: in_halves(args, 2)}
    rounds = [{name: way(args) for name, way in ways.items()} for _ in range(args.rounds)]
    medians = {name: statistics.median(found[name] for found in rounds) for name in ways}
    for name, value in medians.items():
        print(f"{name:<28}{value:>7,.0f} µs a step of {args.num_envs} environments")
    if args.json:
        about = {"command": " ".join(["python benchmark/overlap.py", *sys.argv[1:]]), "env_id": args.env_id,
                 "cores": os.cpu_count(), "versions": {name: version(name) for name in ("jax", "flax", "envpool")}}
        Path(args.json).write_text(json.dumps(about | {"overlap": medians, "rounds": rounds}, indent=2) + "\n")
    return medians


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
