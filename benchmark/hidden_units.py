"""Whether the small network sees enough of an Atari game to learn it by PPO: what its policy's hidden units make of it.

    python benchmark/hidden_units.py --env-id Pong-v5 DemonAttack-v5 --json found.json

train_teacher.py's defaults with --size smaller: policy and value are networks of their own, so that the policy's hidden
units learn from the policy's gradient alone. At the start and after so many updates, over the images of a rollout:

- contrast: the deviation of a hidden unit between images, as a fraction of its mean (means over all units);
- alive: the share of units that any of the images sets above 0; the others have no gradient, and stay as they are;
- logits: the deviation of a logit between images, mean over the actions; at 0 the policy does not look at the image.
"""

import dataclasses
import importlib.metadata
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import train_teacher as m


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    env_id: tuple[str, ...] = ("Pong-v5", "DemonAttack-v5")
    """Atari games"""
    updates: tuple[int, ...] = (0, 1, 2, 5, 10)
    """after how many updates the units are looked at"""
    seed: int = 100
    """seed of networks and games"""
    learning_rate: float = m.Args.learning_rate
    """step size of Adam"""
    num_steps: int | None = None
    """steps of each environment in a rollout; by default the paper's"""
    json: str | None = None
    """also write the figures to this file"""


def look(policy: m.Policy, params: dict, images: np.ndarray) -> dict[str, float]:
    """Return contrast, alive and logits of a policy over images [B, C, H, W]."""
    logits, found = policy.apply(params, images, capture_intermediates=True, mutable=["intermediates"])
    units = jnp.maximum(found["intermediates"]["Dense_0"]["__call__"][0], 0.0)
    return {"contrast": float(units.std(0).mean() / units.mean()), "alive": float((units > 0).any(0).mean()),
            "logits": float(logits.std(0).mean())}


def learn(args: Args, env_id: str) -> list[dict[str, float]]:
    """Learn a game and look at the units on the way; end the program for a task that is no Atari game."""
    if m.suite_of(env_id) != "atari":
        m.fail(f"{env_id} is no Atari game, whose images this is about")
    flags = m.resolve(m.Args(env_id=env_id, size="smaller", seed=args.seed, learning_rate=args.learning_rate,
                             num_steps=args.num_steps, num_devices=1))
    variant = {name: getattr(flags, name) for name in m.VARIANTS["atari"]}
    envs = m.make_envs(env_id, flags.num_envs, flags.seed, variant, "training")
    action_dim, found = int(envs.action_space.n), []
    networks = m.Networks(m.Policy(flags.network, action_dim), m.Value(flags.network))
    state, cursor = m.init_state(flags, networks, envs.observation_space.shape), m.start(envs)
    state = jax.device_put(state, m.replicated(1))
    for iteration in range(max(args.updates) + 1):
        params = state.params["policy"]
        key, noise = m.draw_noise(state.key, flags.num_steps, (flags.num_envs, action_dim), False)
        act = partial(m.act_on_images, 1, networks.policy, params, None, noise)
        rollout = m.collect(envs, cursor, act, flags.num_steps)
        if iteration in args.updates:
            images = rollout.observations[:-1].reshape(-1, *rollout.observations.shape[2:])
            images = images[:: max(1, len(images) // 400)]
            row = {"steps": iteration * flags.batch_size} | look(networks.policy, params, images)
            found.append(row)
            print(f"{env_id:<18} after {row['steps']:>7,} steps: contrast {row['contrast']:.3f}, "
                  f"alive {row['alive']:.0%}, logits {row['logits']:.4f}", flush=True)
        if iteration < max(args.updates):
            state, _ = m.update(flags, networks, state._replace(key=key), rollout)
    return found


def main(args: Args) -> dict:
    """Learn all games, print and return the figures."""
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # not only when all is measured
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    about = {"command": " ".join(["python benchmark/hidden_units.py", *sys.argv[1:]]), "seed": args.seed,
             "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "envpool")},
             "hidden_units": {env_id: learn(args, env_id) for env_id in args.env_id}}
    if args.json:
        Path(args.json).write_text(json.dumps(about, indent=2) + "\n")
    return about


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
