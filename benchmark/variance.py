"""The noise in the gradient of PPD's distillation term, with and without the gradient through its ratio.

    python benchmark/variance.py --env-id Humanoid-v4 --json benchmark/results/variance/Humanoid-v4.json

A smaller student learns from the shipped teacher with the script's defaults. After so many updates the gradient of
KL(teacher || student) max(r, 1-ε) in the policy's parameters is taken over minibatches of a rollout's states, each time
with actions that the policy draws anew: r is 1, and both gradients have one mean over the actions. Noise: root of
the mean squared distance of a minibatch's gradient from the mean over all minibatches. Signal: norm of that mean,
less the noise that is left in it.
"""

import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ppd_mujoco as m


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    env_id: str = "Humanoid-v4"
    """task, of which a teacher is shipped"""
    student_size: Literal["smaller", "same", "larger"] = "smaller"
    """size of the student"""
    distill_weight: Literal["ratio", "detached"] = "ratio"
    """with which the student learns"""
    updates: tuple[int, ...] = (0, 100, 300)
    """after how many updates the noise is measured"""
    seed: int = 100
    """seed of the student"""
    json: str | None = None
    """also write the figures to this file"""


def main(args: Args) -> dict:
    """Learn, measure on the way, print and return the figures."""
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # not only when all is measured
    about = {"command": " ".join(["python benchmark/variance.py", *sys.argv[1:]]), "env_id": args.env_id,
             "student_size": args.student_size, "distill_weight": args.distill_weight, "seed": args.seed}
    teacher = m.load_teacher(m.Args(env_id=args.env_id))
    flags = m.resolve(m.Args(env_id=args.env_id, student_size=args.student_size, seed=args.seed,
                             distill_weight=args.distill_weight))
    envs = m.make_envs(args.env_id, flags.num_envs, flags.seed, teacher.about["variant"])
    networks = m.Networks(m.Policy(flags.hidden, teacher.policy.action_dim), m.Value(flags.hidden), teacher.policy)
    state, cursor = m.init_state(flags, networks, envs.observation_space.shape[0]), m.start(envs)
    state, found = jax.device_put(state, m.replicated(flags.num_devices)), []
    for iteration in range(max(args.updates) + 1):
        params, stats = state.params["policy"], teacher.params["obs_stats"]
        key, noise = m.draw_noise(state.key, flags.num_steps, (flags.num_envs, networks.policy.action_dim))
        rollout = m.collect(envs, cursor, partial(m.act, networks.policy, params, stats, noise), flags.num_steps)
        if iteration in args.updates:
            found.append({"updates": iteration} | measure(flags, networks, teacher.params, params, rollout))
            print(f"{args.env_id} after {iteration} updates: KL {found[-1]['kl']:.2f}; noise / signal "
                  f"{found[-1]['ratio']['noise'] / found[-1]['ratio']['signal']:.2f} with the gradient through r, "
                  f"{found[-1]['detached']['noise'] / found[-1]['detached']['signal']:.2f} without")
        if iteration < max(args.updates):
            state, _ = m.update(flags, networks, teacher.params, state._replace(key=key), rollout, flags.distill_coef)
    about["variance"] = found
    if args.json:
        Path(args.json).write_text(json.dumps(about, indent=2) + "\n")
    return about


def measure(flags: m.Args, networks: m.Networks, teacher: dict, params: dict, rollout: m.Rollout) -> dict:
    """Return signal and noise of both gradients over 300 minibatches of a rollout's states, and the mean KL divergence.

    teacher: its tree of policy and statistics; params: of the student's policy.
    """
    x = m.normalize(rollout.observations[:-1][~rollout.phantoms], teacher["obs_stats"])
    rng, rows, kls = np.random.default_rng(flags.seed), {"ratio": [], "detached": []}, []

    @partial(jax.jit, static_argnames="weight")
    def gradient(params, x, key, weight):
        actions, log_probs = m.distribution(networks.policy.apply(params, x)).sample_and_log_prob(seed=key)
        zeros = jnp.zeros(len(x))
        taught = networks.teacher.apply(teacher["policy"], x)
        part = m.Batch(x, actions, log_probs, zeros, zeros, zeros + 1.0, taught)

        def term(params):
            outputs = networks.policy.apply(params, x)
            terms = m.ppd_loss(outputs, zeros, part, 1.0, flags.clip_coef, 0.0, 0.0, flags.kl_direction, weight)[1]
            return terms["distill_loss"], terms["teacher_kl"]

        grads, kl = jax.grad(term, has_aux=True)(params)
        return jnp.concatenate([y.ravel() for y in jax.tree.leaves(grads)]), kl

    for i in range(300):
        minibatch = x[rng.choice(len(x), flags.batch_size // flags.num_minibatches, replace=False)]
        for weight, found in rows.items():
            grads, kl = gradient(params, minibatch, jax.random.PRNGKey(i), weight)
            found.append(np.asarray(grads))
            kls.append(float(kl))
    result = {"kl": float(np.mean(kls))}
    for weight, found in rows.items():
        mean = np.mean(found, axis=0)
        noise = np.mean([((each - mean) ** 2).sum() for each in found])
        signal = (mean**2).sum() - noise / (len(found) - 1)  # an unbiased estimate of the square
        result[weight] = {"signal": max(0.0, float(signal)) ** 0.5, "noise": float(noise) ** 0.5}
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
