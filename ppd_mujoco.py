"""Proximal Policy Distillation (PPD) on MuJoCo: a student learns by PPO from its own experience, pulled to its teacher.

    python ppd_mujoco.py --env-id Hopper-v4 --student-size larger

Each iteration collects a rollout with the student, estimates advantages A, and over epochs of shuffled minibatches

    maximises  E[ min(r A, clip(r, 1-ε, 1+ε) A) + α entropy - λ KL(teacher || student) max(r, 1-ε) ]
    minimises  E[ (V(s) - R)² ]                              with r = π(a|s) / π_old(a|s), not detached.

The teacher is a file of train_teacher.py; its frozen observation statistics serve the student as well. What makes PPD
out of PPO is marked `# PPD`. Source: Spigler, "Proximal Policy Distillation", TMLR 2025 (arXiv 2407.15134), Algorithm 1
and appendix A.3.
"""

import csv
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import platform
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

import distrax
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import serialization
from tensorboardX import SummaryWriter
from tqdm import tqdm

# ======================================================================================================================
# Arguments
# ======================================================================================================================


@dataclass(frozen=True)
class Task:
    """What is learned, and where."""

    env_id: str | None = None
    """task, by envpool's name: Ant-v4, HalfCheetah-v4, Hopper-v4, Humanoid-v4, Swimmer-v4 (the paper's) or another Gym
    MuJoCo task; by default the teacher's, and Hopper-v4 where no teacher is named either"""
    seed: int = 100
    """seed of networks, actions, minibatches and environments (the paper's: 100, 200, 300, 400, 500); environment i
    takes seed + i, so seeds of one study should lie further apart than --num-envs and --eval-episodes"""
    total_timesteps: int = 2_000_000
    """environment steps in all, rounded up to whole rollouts; envpool's reset steps count, as everywhere"""
    contact_forces: bool | None = None
    """observe contact forces (Humanoid), the teacher too; by default as it did in its training"""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """where the networks run, also of a resumed run; gpu is an error where there is none"""


@dataclass(frozen=True)
class Distillation:
    """The teacher, the student, and how strongly one pulls the other."""

    teacher: str | None = None
    """file of the teacher; by default teachers/{env_id}__100.msgpack beside this script"""
    student_size: Literal["smaller", "same", "larger"] = "larger"
    """hidden layers of the student: 128-64, 256-256 (the paper's teachers) or 512-512"""
    student_hidden: tuple[int, ...] | None = None
    """widths of the student's hidden layers; overrides --student-size"""
    distill_coef: float = 1.0
    """weight of the distillation term (the paper's λ); 0 is PPO"""
    distill_coef_final: float | None = None
    """weight at the end of the run, reached linearly; by default λ stays constant"""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """KL(teacher || student), the paper's, or KL(student || teacher)"""
    teacher_noise_std: float = 0.0
    """standard deviation of Gaussian noise on every parameter of the teacher's policy (the paper's σ, there 0.05)"""
    teacher_noise_seed: int = 0
    """seed of that noise"""


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation."""

    learning_rate: float = 3e-4
    """step size of Adam, constant"""
    num_envs: int = 18
    """environments stepped in parallel (N)"""
    num_steps: int | None = None
    """steps of each environment in a rollout (T); the paper's: 64"""
    num_minibatches: int | None = None
    """minibatches of an epoch, a divisor of N*T; by default the fewest of at most 512 samples"""
    update_epochs: int = 4
    """passes over each rollout"""
    gamma: float | None = None
    """discount factor (γ); the paper's: 0.999, but 0.995 for Hopper and Swimmer"""
    gae_lambda: float = 0.9
    """decay of generalised advantage estimation"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio (ε)"""
    ent_coef: float | None = None
    """weight of the entropy bonus (α); the paper's: 0"""
    vf_coef: float = 0.5
    """weight of the value loss, a plain mean squared error"""
    max_grad_norm: float = 0.5
    """largest global norm of the gradient, policy and value together"""


@dataclass(frozen=True)
class Output:
    """What a run leaves behind."""

    run_dir: str | None = None
    """folder of the run; by default runs/{env_id}__{script}__{student_size}__{seed}__{unix_time}"""
    resume: str | None = None
    """folder of an interrupted run to go on with; all other flags but --device are then that run's"""
    checkpoint_every: int = 50
    """updates between checkpoints"""
    eval_episodes: int = 50
    """episodes of the final evaluation, with deterministic actions and raw rewards"""
    track: bool = False
    """log to Weights & Biases as well (pip install wandb)"""
    wandb_project_name: str = "ppd"
    """project to log to"""
    wandb_entity: str | None = None
    """team to log to"""


@dataclass(frozen=True)
class Args(Output, PPO, Distillation, Task):
    """All flags; the command line groups them by the classes above."""

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the student's hidden layers (appendix A.3)."""
        sizes = {"smaller": (128, 64), "same": (256, 256), "larger": (512, 512)}
        return sizes[self.student_size] if self.student_hidden is None else self.student_hidden

    @property
    def batch_size(self) -> int:
        """Samples of a rollout, N*T."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Rollouts of the run, each followed by one update."""
        return -(-self.total_timesteps // self.batch_size)


# The paper's defaults (appendix A.3): of each task, and of those it does not have
PAPER = {"num_steps": 64, "ent_coef": 0.0, "gamma": 0.999}
PAPER_TASKS = {"Hopper": PAPER | {"gamma": 0.995}, "Swimmer": PAPER | {"gamma": 0.995}}

# Flags that must lie in a range, both ends included
RANGES = {
    "total_timesteps": (1, 10**12), "num_envs": (1, 10**5), "num_steps": (1, 10**6), "num_minibatches": (1, 10**9),
    "update_epochs": (1, 10**6), "checkpoint_every": (1, 10**9), "eval_episodes": (1, 10**5), "seed": (0, 10**9 - 1),
    "teacher_noise_seed": (0, 2**32 - 1), "learning_rate": (0, 1e3), "gamma": (0, 1), "gae_lambda": (0, 1),
    "clip_coef": (0, 1), "ent_coef": (0, 1e6), "vf_coef": (0, 1e6), "max_grad_norm": (1e-9, 1e9),
    "distill_coef": (0, 1e6), "distill_coef_final": (0, 1e6), "teacher_noise_std": (0, 1e6),
}
MAX_LAYERS = 64


def fail(message: str) -> NoReturn:
    """Ends the program for bad input: one line on stderr, exit code 2."""
    print("error: " + "".join(c if c.isprintable() else " " for c in message[:1000]), file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the command line; every class that `Args` inherits from is a group of flags."""
    groups = [(base.__name__, base, dataclasses.field(default_factory=base)) for base in reversed(Args.__bases__)]
    form = tyro.conf.OmitArgPrefixes[dataclasses.make_dataclass("Groups", groups, frozen=True)]
    parsed = tyro.cli(form, args=argv, description=__doc__)
    return Args(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def resolve(args: Args) -> Args:
    """Fills in the task's defaults; ends the program for flags that cannot work, before anything is written."""
    paper = PAPER_TASKS.get(args.env_id.split("-")[0], PAPER)
    args = dataclasses.replace(args, **{name: value for name, value in paper.items() if getattr(args, name) is None})
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} must lie between {low:g} and {high:g}, not {value}")
    if args.contact_forces is not None and not args.env_id.startswith("Humanoid"):
        fail(f"--contact-forces is for Humanoid, not for {args.env_id}")
    if not 1 <= len(args.hidden) <= MAX_LAYERS or not all(1 <= width <= 65_536 for width in args.hidden):
        fail(f"a network has 1 to {MAX_LAYERS} hidden layers of 1 to 65536 units, not {args.hidden}")
    if args.num_minibatches is None:
        divisors = (k for k in range(-(-args.batch_size // 512), args.batch_size // 2 + 1) if args.batch_size % k == 0)
        args = dataclasses.replace(args, num_minibatches=next(divisors, 1))
    if args.batch_size % args.num_minibatches or args.batch_size < 2 * args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} does not divide a rollout of {args.num_envs} environments x "
             f"{args.num_steps} steps = {args.batch_size} samples into equal parts of at least 2")
    if args.resume is None and args.run_dir is not None and os.path.exists(args.run_dir):
        fail(f"--run-dir {args.run_dir} exists; name another folder, or go on with --resume {args.run_dir}")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track needs Weights & Biases: pip install wandb")
    if args.device == "gpu" and jax.default_backend() == "cpu":
        fail("--device gpu: JAX finds no GPU; pip install 'jax[cuda12]', or use --device cpu")
    return args


# ======================================================================================================================
# Environments
# ======================================================================================================================

EVAL_SEED = 10**9  # what evaluation adds to the seed of its environments, so that it plays other games than training


def import_envpool() -> Any:
    """Imports envpool only when it is needed: that is slow, and fails where a system library is missing."""
    try:
        import envpool
    except ImportError as error:
        fail(f"envpool cannot be imported ({error}); on Debian: apt-get install libegl1 libopengl0")
    return envpool


def check_task(env_id: str) -> None:
    """Ends the program for a task that is no Gym MuJoCo task of envpool, naming those like it."""
    specs = import_envpool().registration.registry.specs  # of each task by name: the module it lies in, and more
    known = [name for name, (module, *_) in specs.items() if module == "envpool.mujoco.gym"]
    if env_id not in known:
        near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.3) or known
        fail(f"unknown MuJoCo task {env_id}; did you mean {', '.join(near)}?")


def task_shape(env_id: str) -> tuple[list[int], int]:
    """Shape of an observation, and the number of actions, or of their dimensions; makes no environment."""
    try:
        spec = import_envpool().make_spec(env_id)
    except ImportError:
        fail(f"{env_id} needs Qt, which envpool's Procgen draws with; on Debian: apt-get install libqt5gui5")
    space = spec.gymnasium_action_space
    return list(spec.gymnasium_observation_space.shape), int(space.shape[0] if space.shape else space.n)


def make_envs(env_id: str, num_envs: int, seed: int, contact_forces: bool | None = None) -> Any:
    """Vectorised environments; the seed is given here because envpool ignores reset(seed=).

    Humanoid: without contact forces the 84 numbers that give them in an observation are 0, as they are in envpool's
    Humanoid-v4 unless it is told otherwise.
    """
    options = {"post_constraint": bool(contact_forces)} if env_id.startswith("Humanoid") else {}
    return import_envpool().make_gymnasium(env_id, num_envs=num_envs, seed=seed, **options)


def reset(envs: Any) -> np.ndarray:
    """The first observations [N, D] of all environments, float32."""
    return envs.reset()[0].astype(np.float32)


def step(envs: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Observations [N, D], and rewards, terminations, truncations and ends of whole games, [N] each.

    actions: [N, A], of any size; what lies beyond the bounds is clipped here and nowhere else.
    """
    space = envs.action_space
    actions = np.clip(actions, space.low, space.high, dtype=space.dtype)
    observations, rewards, terminations, truncations, _ = envs.step(actions)
    return observations.astype(np.float32), rewards, terminations, truncations, terminations | truncations


class Cursor(NamedTuple):
    """Where the environments stand between two rollouts; its arrays are updated in place."""

    observations: np.ndarray  # [N, D] float32
    dones: np.ndarray  # [N] bool: the last step ended an episode
    returns: np.ndarray  # [N] float64: sum of the raw rewards of the running game
    finished: deque  # such sums of the last 100 finished games


class Rollout(NamedTuple):
    """T steps of N environments, time first."""

    observations: np.ndarray  # [T+1, N, D] float32
    actions: np.ndarray  # [T, N, A] float32, as sampled, before clipping to the bounds
    rewards: np.ndarray  # [T, N] float32
    terminations: np.ndarray  # [T, N] bool
    truncations: np.ndarray  # [T, N] bool
    phantoms: np.ndarray  # [T, N] bool


def start(envs: Any) -> Cursor:
    """Resets all environments."""
    observations = reset(envs)
    return Cursor(observations, np.zeros(len(observations), bool), np.zeros(len(observations)), deque(maxlen=100))


def collect(envs: Any, cursor: Cursor, policy_step: Callable, num_steps: int) -> Rollout:
    """Steps the N environments `num_steps` times with the actions that policy_step(observations, t) gives.

    envpool resets on the step after an episode's end: that step ignores its action and gives the reset observation with
    reward 0. It is no transition of the task; such phantoms are marked, and have weight 0 wherever they could count.
    """
    observations = np.empty((num_steps + 1, *cursor.observations.shape), cursor.observations.dtype)
    rewards = np.empty((num_steps, len(cursor.dones)), np.float32)
    terminations, truncations, phantoms = np.empty((3, *rewards.shape), bool)
    actions = []
    observations[0] = cursor.observations
    for t in range(num_steps):
        phantoms[t] = cursor.dones
        actions.append(np.asarray(policy_step(observations[t], t)))
        observations[t + 1], rewards[t], terminations[t], truncations[t], ends = step(envs, actions[t])
        np.logical_or(terminations[t], truncations[t], out=cursor.dones)
        cursor.returns[:] += rewards[t]
        if ends.any():
            cursor.finished.extend(cursor.returns[ends])
            cursor.returns[ends] = 0.0
    cursor.observations[:] = observations[-1]
    return Rollout(observations, np.stack(actions), rewards, terminations, truncations, phantoms)


# ======================================================================================================================
# Networks
# ======================================================================================================================


class Policy(nn.Module):
    """Gaussian policy: an MLP with ReLU gives the mean; the log standard deviation does not depend on the state."""

    hidden: tuple[int, ...]
    action_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x: [..., D], normalised. Returns mean and log standard deviation, both [..., A]."""
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.orthogonal(np.sqrt(2)))(x))
        mean = nn.Dense(self.action_dim, kernel_init=nn.initializers.orthogonal(0.01))(x)
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        return mean, jnp.broadcast_to(log_std, mean.shape)


class Value(nn.Module):
    """State value: an MLP with ReLU that shares nothing with the policy."""

    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., D], normalised. Returns values [...]."""
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, kernel_init=nn.initializers.orthogonal(np.sqrt(2)))(x))
        return nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(x).squeeze(-1)


def distribution(outputs: tuple[jax.Array, jax.Array]) -> distrax.Distribution:
    """The action distribution that a policy's outputs (mean, log standard deviation; [..., A]) stand for."""
    mean, log_std = outputs
    return distrax.MultivariateNormalDiag(mean, jnp.exp(log_std))


# ======================================================================================================================
# Mathematics
# ======================================================================================================================


class Stats(NamedTuple):
    """Running mean and variance, and the number of samples they rest on."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def update_stats(stats: Stats, samples: jax.Array, weights: jax.Array) -> Stats:
    """Adds samples [B, ...] whose weight [B] is 1, not those of weight 0 (Chan et al. 1979, pairwise update)."""
    n = weights.sum()
    mean = jnp.tensordot(weights, samples, 1) / jnp.maximum(n, 1)
    var = jnp.tensordot(weights, (samples - mean) ** 2, 1) / jnp.maximum(n, 1)
    count = stats.count + n
    delta = mean - stats.mean
    merged = (stats.var * stats.count + var * n + delta**2 * stats.count * n / count) / count
    return Stats(stats.mean + delta * n / count, merged, count)


def normalize(observations: jax.Array, stats: Stats) -> jax.Array:
    """Observations [..., D] less their running mean, over their running standard deviation, clipped to ±10."""
    return jnp.clip((observations - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)


def discount_forward(
    rewards: jax.Array, dones: jax.Array, carried: jax.Array, gamma: float
) -> tuple[jax.Array, jax.Array]:
    """Discounted sum of the rewards so far, g_t = γ g_{t-1} + r_t, from 0 in each episode: what scales the rewards.

    rewards, dones: [T, N]; carried: [N], from the rollout before. Returns what to carry on, [N], and all g, [T, N].
    """

    def step(g, x):
        reward, done = x
        g = gamma * g + reward
        return g * (1.0 - done), g

    return jax.lax.scan(step, carried, (rewards, dones))


def compute_gae(
    rewards: jax.Array, values: jax.Array, terminations: jax.Array, truncations: jax.Array, gamma: float,
    gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2016): advantages and returns, both [T, N].

    rewards, terminations, truncations: [T, N]; values: [T+1, N], of all stored observations. A terminated step does
    not bootstrap. A truncated one does, from the true final observation, which is the one stored at t+1. Both cut the
    trace, so nothing of a phantom step reaches another.
    """
    dones = jnp.maximum(terminations, truncations)
    deltas = rewards + gamma * values[1:] * (1.0 - terminations) - values[:-1]

    def step(advantage, x):
        delta, done = x
        advantage = delta + gamma * gae_lambda * (1.0 - done) * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros_like(deltas[0]), (deltas, dones), reverse=True)
    return advantages, advantages + values[:-1]


def weighted_mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of x [B] over the samples whose weight [B] is 1."""
    return (x * weights).sum() / jnp.maximum(weights.sum(), 1.0)


def standardize(advantages: jax.Array, weights: jax.Array) -> jax.Array:
    """Advantages [B] with mean 0 and variance 1 over the samples whose weight [B] is 1."""
    centred = advantages - weighted_mean(advantages, weights)
    return centred / (jnp.sqrt(weighted_mean(centred**2, weights)) + 1e-8)


class Batch(NamedTuple):
    """Samples of a rollout; the leading axis is [B], or none for a single sample."""

    observations: jax.Array  # [B, D], normalised
    actions: jax.Array  # [B, A]
    log_probs: jax.Array  # [B], under the policy that acted
    advantages: jax.Array  # [B]
    returns: jax.Array  # [B]
    weights: jax.Array  # [B]: 0 for a phantom transition, else 1
    teacher: Any  # PPD: the teacher policy's outputs, [B, A] each


def ppd_terms(
    outputs: Any, value: jax.Array, sample: Batch, clip_coef: float, kl_direction: str
) -> dict[str, jax.Array]:
    """The terms of one sample's loss (Algorithm 1), as scalars.

    outputs: the student policy's, [A] each; value: the student's, []; sample: its advantage is standardised already.
    """
    pi, teacher = distribution(outputs), distribution(sample.teacher)
    log_ratio = pi.log_prob(sample.actions) - sample.log_probs
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_coef, 1.0 + clip_coef)
    kl = teacher.kl_divergence(pi) if kl_direction == "forward" else pi.kl_divergence(teacher)  # PPD
    return {
        "policy_loss": -jnp.minimum(ratio * sample.advantages, clipped * sample.advantages),
        "value_loss": (value - sample.returns) ** 2,
        "entropy": pi.entropy(),
        "approx_kl": ratio - 1.0 - log_ratio,
        "clipfrac": (jnp.abs(ratio - 1.0) > clip_coef).astype(jnp.float32),
        "distill_loss": kl * jnp.maximum(ratio, 1.0 - clip_coef),  # PPD: the gradient flows through both factors
        "teacher_kl": kl,
    }


def ppd_loss(
    outputs: Any, values: jax.Array, batch: Batch, distill_coef: float, clip_coef: float, ent_coef: float,
    vf_coef: float, kl_direction: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a minibatch and its terms, averaged over the samples whose weight is 1.

    outputs: the student policy's, [B, A] each; values: the student's, [B]; distill_coef: λ at this step.
    """
    terms = jax.vmap(partial(ppd_terms, clip_coef=clip_coef, kl_direction=kl_direction))(outputs, values, batch)
    terms = {name: weighted_mean(term, batch.weights) for name, term in terms.items()}
    loss = terms["policy_loss"] + vf_coef * terms["value_loss"] - ent_coef * terms["entropy"]
    loss += distill_coef * terms["distill_loss"]  # PPD
    return loss, {"loss": loss} | terms


# ======================================================================================================================
# Jitted steps
# ======================================================================================================================


class Networks(NamedTuple):
    """The flax modules; they hold no parameters."""

    policy: Policy
    value: Value
    teacher: Policy


class Frozen(NamedTuple):
    """A policy that does not learn: its parameters, and the observation statistics it stands on."""

    params: dict
    obs_stats: Stats


class TrainState(NamedTuple):
    """All that learning changes."""

    params: dict  # {"policy": ..., "value": ...}
    opt_state: optax.OptState
    return_stats: Stats  # of the discounted returns, scalars
    discounted: jax.Array  # [N]: discounted return of each running episode
    key: jax.Array


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam, after clipping the global norm of the gradient."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(args.learning_rate, eps=1e-5))


def init_state(args: Args, networks: Networks, observation_dim: int) -> TrainState:
    """A fresh student, from the seed alone."""
    key = jax.random.fold_in(jax.random.PRNGKey(args.seed), 1)  # not the weights that a teacher of this seed began with
    key, policy_key, value_key = jax.random.split(key, 3)
    x = jnp.zeros((1, observation_dim))
    params = {"policy": networks.policy.init(policy_key, x), "value": networks.value.init(value_key, x)}
    return_stats = Stats(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(1e-4))
    return TrainState(params, make_optimizer(args).init(params), return_stats, jnp.zeros(args.num_envs), key)


@partial(jax.jit, static_argnames=("num_steps", "shape"))
def draw_noise(key: jax.Array, num_steps: int, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """The key to go on with, and standard normal noise [T, N, A] of a rollout.

    It is drawn in one call, because drawn step by step it costs as much as the network.
    """
    key, rollout_key = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rollout_key, jnp.arange(num_steps))
    return key, jax.vmap(jax.random.normal, (0, None))(keys, shape)


@partial(jax.jit, static_argnames="policy", compiler_options={"xla_cpu_multi_thread_eigen": False})
def act(
    policy: Policy, params: dict, obs_stats: Stats, noise: jax.Array, observations: jax.Array, t: int
) -> jax.Array:
    """Samples actions [N, A] for raw observations [N, D] with the noise [T, N, A] of step t.

    On a CPU in one thread: so few rows are not worth several, which then spin where the simulator could run.
    """
    mean, log_std = policy.apply(params, normalize(observations, obs_stats))
    return mean + jnp.exp(log_std) * noise[t]


@partial(jax.jit, static_argnames="policy")
def act_deterministic(policy: Policy, params: dict, obs_stats: Stats, observations: jax.Array) -> jax.Array:
    """The most likely actions [N, A] for raw observations [N, D]."""
    return distribution(policy.apply(params, normalize(observations, obs_stats))).mode()


@partial(jax.jit, static_argnames=("args", "networks"), donate_argnames="state")
def update(
    args: Args, networks: Networks, teacher: Frozen, state: TrainState, rollout: Rollout, distill_coef: float
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Learns from one rollout; returns the new state and the means of all minibatches' metrics."""
    rewards, terminations, truncations, phantoms = (jnp.asarray(x, jnp.float32) for x in rollout[2:])
    dones, weights = jnp.maximum(terminations, truncations), 1.0 - phantoms

    # The parameters are still those of the rollout, so its values and log-probabilities are one batched call
    observations = normalize(rollout.observations, teacher.obs_stats)
    values = networks.value.apply(state.params["value"], observations)
    log_probs = distribution(networks.policy.apply(state.params["policy"], observations[:-1])).log_prob(rollout.actions)
    teacher_outputs = networks.teacher.apply(teacher.params, observations[:-1])  # PPD: once a rollout, for all epochs

    discounted, sums = discount_forward(rewards, dones, state.discounted, args.gamma)
    return_stats = update_stats(state.return_stats, sums.reshape(-1), weights.reshape(-1))
    rewards = jnp.clip(rewards / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)
    advantages, returns = compute_gae(rewards, values, terminations, truncations, args.gamma, args.gae_lambda)

    batch = Batch(observations[:-1], rollout.actions, log_probs, advantages, returns, weights, teacher_outputs)
    batch = jax.tree.map(lambda x: x.reshape(args.batch_size, *x.shape[2:]), batch)
    optimizer = make_optimizer(args)

    def loss_fn(params, minibatch):
        outputs = networks.policy.apply(params["policy"], minibatch.observations)
        values = networks.value.apply(params["value"], minibatch.observations)
        return ppd_loss(outputs, values, minibatch, distill_coef, args.clip_coef, args.ent_coef, args.vf_coef,
                        args.kl_direction)

    def train_minibatch(carry, indices):
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[indices], batch)
        minibatch = minibatch._replace(advantages=standardize(minibatch.advantages, minibatch.weights))
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, minibatch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        metrics |= {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        return (params, opt_state), metrics

    key, shuffle_key = jax.random.split(state.key)
    epoch_keys = jax.random.split(shuffle_key, args.update_epochs)
    orders = jax.vmap(jax.random.permutation, (0, None))(epoch_keys, args.batch_size)
    minibatches = orders.reshape(args.update_epochs * args.num_minibatches, -1)
    (params, opt_state), metrics = jax.lax.scan(train_minibatch, (state.params, state.opt_state), minibatches)
    metrics = {f"losses/{name}": values.mean() for name, values in metrics.items()}
    return TrainState(params, opt_state, return_stats, discounted, key), metrics


# ======================================================================================================================
# Files
# ======================================================================================================================

SCRIPT = Path(__file__).stem
FORMAT, VERSION = "proximal-policy-distillation", 2
CHECKPOINTS = ("checkpoint.msgpack", "checkpoint_previous.msgpack")


def write_atomic(path: Path, data: bytes, keep: Path | None = None) -> None:
    """Writes a file whole or not at all: a killed run leaves no half of it under this name.

    keep: the name under which the file that it replaces stays.
    """
    temporary = path.with_name(f".{path.name}.new")  # always the same, so what a killed run left of it goes, too
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except BaseException:  # a full disk, or a signal
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: dict) -> None:
    """Writes a small file for people and programs."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def save_tree(path: Path, kind: str, tree: dict, keep: Path | None = None) -> None:
    """Writes plain dicts, lists, strings, numbers and arrays as msgpack, in an envelope with their checksum."""
    payload = serialization.msgpack_serialize(jax.device_get(tree))
    envelope = {"format": FORMAT, "version": VERSION, "kind": kind, "sha256": hashlib.sha256(payload).hexdigest()}
    write_atomic(path, serialization.msgpack_serialize(envelope | {"payload": payload}), keep)


def read_tree(path: str | Path, kind: str) -> dict:
    """Reads a file of save_tree; ValueError if it is missing, cut short, damaged or something else."""
    wrong = f"{path} is no {kind} file of this project, or is cut short"
    try:
        envelope = serialization.msgpack_restore(Path(path).read_bytes())
        names = ("format", "version", "kind", "sha256", "payload")
        form, version, found, digest, payload = (envelope[name] for name in names)
        if form == FORMAT and (version, found) != (VERSION, kind):
            wrong = f"{path} is a {found!r:.20} file, version {version!r:.20}; needed is {kind!r}, version {VERSION}"
        elif form == FORMAT and digest != hashlib.sha256(payload).hexdigest():
            wrong = f"{path} is damaged: its checksum does not match"
        elif form == FORMAT and isinstance(tree := serialization.msgpack_restore(payload), dict):
            return tree
    except OSError as error:
        wrong = f"cannot read {path}: {error.strerror}"
    except Exception:  # msgpack raises many kinds for bytes that are not its own
        pass
    raise ValueError(wrong)


def load_tree(path: str | Path, kind: str) -> dict:
    """Reads a file of save_tree; ends the program if it is missing, cut short, damaged or something else."""
    try:
        return read_tree(path, kind)
    except ValueError as error:
        fail(str(error))


def check_arrays(what: str, found: Any, expected: Any) -> None:
    """Raises ValueError unless what a file holds is finite, and of these shapes and types."""
    describe = partial(jax.tree.map, lambda x: (tuple(x.shape), np.dtype(x.dtype)))
    if describe(found) != describe(expected):
        raise ValueError(f"its {what} are not those of the network it describes")
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(found)):
        raise ValueError(f"its {what} are not all finite")


def check_model(model: dict, policy: nn.Module, x: jax.ShapeDtypeStruct) -> None:
    """Raises an exception for a model file that does not hold what it says; x: the policy's input."""
    about = {"env_id": str, "role": str, "command": str, "evaluation": dict, "args": dict}
    if wrong := [name for name, kind in about.items() if not isinstance(model[name], kind)]:
        raise TypeError(f"its {wrong[0]} is of another type")
    if len(model["network"]["hidden"]) > MAX_LAYERS:
        raise ValueError(f"it describes {len(model['network']['hidden'])} hidden layers")
    check_arrays("parameters", model["params"]["policy"], jax.eval_shape(policy.init, jax.random.PRNGKey(0), x))
    if (stats := model["obs_stats"]) is not None:
        each, count = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x.shape, ()))
        check_arrays("observation statistics", stats, {"mean": each, "var": each, "count": count})
        if stats["var"].min() < 0:
            raise ValueError("its observations have a negative variance")


def load_policy(path: str | Path) -> tuple[dict, Policy, Frozen]:
    """Reads a model file: all it holds, its policy network, and that network's parameters and statistics."""
    model = load_tree(path, "model")
    try:
        if model["network"]["kind"] != "mlp":
            raise ValueError(f"its network is of the kind {model['network']['kind']}")
        policy = Policy(tuple(map(int, model["network"]["hidden"])), int(model["action_dim"]))
        check_model(model, policy, jax.ShapeDtypeStruct(tuple(model["observation_shape"]), jnp.float32))
        frozen = Frozen(model["params"]["policy"], Stats(**model["obs_stats"]))
    except Exception as error:  # of many kinds, for content of any kind
        fail(f"{path} is no model of a MuJoCo task: {type(error).__name__} {error}")
    return model, policy, jax.tree.map(jnp.asarray, frozen)


def plain_args(args: Args) -> dict:
    """The flags as plain values, but not where the run's files lie: that says nothing on another machine."""
    return json.loads(json.dumps(dataclasses.asdict(args) | {"run_dir": None, "resume": None}))


def command_line(args: Args) -> str:
    """The command that repeats this run: task, seed, and every flag of learning that is not its default."""
    elsewhere = ("env_id", "seed", "device", "run_dir", "resume", "track", "wandb_project_name", "wandb_entity")
    words = ["python", f"{SCRIPT}.py", "--env-id", args.env_id, "--seed", str(args.seed)]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if field.name not in elsewhere and value != field.default:
            words += [f"--{field.name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])]
    return " ".join(words)


def versions() -> dict[str, str]:
    """What the run stands on."""
    return {"python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__,
            "envpool": import_envpool().__version__, "device": jax.devices()[0].device_kind}


def fingerprint(arrays: Any) -> str:
    """A checksum by which a teacher is known again."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(arrays))).hexdigest()


def save_checkpoint(
    folder: Path, args: Args, updates: int, state: TrainState, cursor: Cursor, timing: dict[str, float], log: "Log",
    teacher: str | None,
) -> None:
    """Saves all that --resume needs after this many updates, and keeps the checkpoint before.

    The simulator's own state cannot be saved. teacher: its fingerprint, where there is one.
    """
    os.fsync(log.file.fileno())  # rows are on the disk before a checkpoint counts on them
    save_tree(folder / CHECKPOINTS[0], "checkpoint", {
        "script": SCRIPT, "args": plain_args(args), "updates": updates, "state": serialization.to_state_dict(state),
        "finished": list(cursor.finished), "timing": timing, "teacher": teacher}, keep=folder / CHECKPOINTS[1])


def check_finite(metrics: dict[str, float], number: int, folder: Path) -> None:
    """Ends the run when a loss, the gradient or a parameter is NaN or infinite; the checkpoints stay as they were."""
    bad = [f"{name} = {value}" for name, value in metrics.items() if not np.isfinite(value)]
    if bad:
        raise SystemExit(f"error: update {number} gave {bad[0]}; the last good state is {folder / CHECKPOINTS[0]}")


def stop(folder: Path, number: int) -> NoReturn:
    """Ends the program for the signal of this number."""
    print(f"\ninterrupted; go on with: python {SCRIPT}.py --resume {folder}", file=sys.stderr)
    raise SystemExit(128 + number)


def progress_bar(args: Args, first: int) -> tqdm:
    """Counts environment steps; where no terminal shows it, once a minute."""
    total, done = args.num_updates * args.batch_size, first * args.batch_size
    interval = 0.5 if sys.stderr.isatty() else 60.0
    return tqdm(total=total, initial=done, desc=args.env_id, unit=" steps", unit_scale=True, mininterval=interval)


class Log:
    """progress.csv and TensorBoard events in the run's folder; Weights & Biases, where asked for, gets them as well."""

    def __init__(self, folder: Path, args: Args, first_step: int):
        """first_step: where the run goes on; rows after it, of updates that are made again, are dropped."""
        path = folder / "progress.csv"
        if path.exists():
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]  # whole ones
            steps = [line.split(b",")[0] for line in lines]
            kept = [line for line, n in zip(lines, steps, strict=True) if not n.isdigit() or int(n) <= first_step]
            write_atomic(path, b"".join(kept))
        self.tracker = None
        if args.track:
            import wandb

            try:
                self.tracker = wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, id=folder.name,
                                          resume="allow", config=plain_args(args))
            except wandb.Error as error:
                fail(f"--track: {error}")
            self.tracker.define_metric("*", step_metric="global_step")
        self.file = open(path, "a", newline="", buffering=1)
        self.tensorboard = SummaryWriter(str(folder), purge_step=first_step + 1 if args.resume else None)

    def write(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        """Logs the metrics of the update that ended at this environment step."""
        row = {"global_step": step, "seconds": round(seconds, 3)} | metrics
        table = csv.DictWriter(self.file, list(row))
        if self.file.tell() == 0:
            table.writeheader()
        table.writerow(row)
        known = {name: value for name, value in metrics.items() if np.isfinite(value)}  # no return before an end
        for name, value in known.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.tracker is not None:
            self.tracker.log(known | {"global_step": step})

    def close(self) -> None:
        """Writes out what is left."""
        self.file.close()
        self.tensorboard.close()
        if self.tracker is not None:
            self.tracker.finish()


@contextmanager
def catch_signals(act: Callable[[int], None] | None = None) -> Iterator[list[int]]:
    """Collects the first SIGINT or SIGTERM, so that the update under way can end; a second ends the program at once.

    act: called with the number of the first one, where there is nothing to wait for.
    """
    caught: list[int] = []

    def catch(number: int, frame: Any) -> None:
        caught.append(number)
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        if act is not None:
            act(number)

    previous = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ======================================================================================================================
# Evaluation
# ======================================================================================================================


def evaluate(envs: Any, policy_step: Callable) -> np.ndarray:
    """Returns [N] of one episode in each of N environments: sums of raw rewards, undiscounted.

    Each environment's first episode counts, so that short ones do not crowd out long; policy_step is as in `collect`.
    """
    observations, t = reset(envs), 0
    returns, running = np.zeros(len(observations)), np.ones(len(observations), bool)
    while running.any():
        observations, rewards, _, _, ends = step(envs, np.asarray(policy_step(observations, t)))
        returns += np.where(running, rewards, 0.0)
        running &= ~ends
        t += 1
    envs.close()
    return returns


def assess(args: Args, policy: Policy, frozen: Frozen) -> dict[str, Any]:
    """The paper's evaluation of a policy: deterministic actions in --eval-episodes environments of their own seeds."""
    envs = make_envs(args.env_id, args.eval_episodes, EVAL_SEED + args.seed, args.contact_forces)
    returns = evaluate(envs, lambda x, t: act_deterministic(policy, frozen.params, frozen.obs_stats, x))
    return {"mean": float(returns.mean()), "std": float(returns.std()), "returns": returns.tolist()}


# ======================================================================================================================
# Main
# ======================================================================================================================


def corrupt(params: dict, std: float, seed: int) -> dict:
    """An imperfect teacher (section 4.2): adds Gaussian noise of this standard deviation to every parameter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
    return tree.unflatten([x + std * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


def distill_coef_at(args: Args, fraction: float) -> float:
    """λ at this fraction of the run, from 0 at its first update to 1 at its last: constant, or linear."""
    final = args.distill_coef if args.distill_coef_final is None else args.distill_coef_final
    return args.distill_coef + fraction * (final - args.distill_coef)


def choose_device(device: str) -> None:
    """Settles where the networks run, before JAX first computes."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # acting is waited for: handing it over only costs time
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a flag's type."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        return value in options
    if get_origin(kind) is tuple:
        alike = isinstance(value, tuple) and all(fits(x, options[0]) for x in value)
        return alike and (options[-1] is ... or len(value) == len(options))
    if options:
        return any(fits(value, option) for option in options)
    return type(value) is kind or (kind is float and type(value) is int)


def change_args(args: Args, flags: dict) -> Args:
    """The flags of a file; raises an exception for one that is unknown, missing or of another type."""
    if missing := [field.name for field in dataclasses.fields(args) if field.name not in flags]:
        raise KeyError(missing[0])  # of a run before there was this flag, which its default might change
    args = dataclasses.replace(args, **{name: tuple(x) if isinstance(x, list) else x for name, x in flags.items()})
    for field in dataclasses.fields(args):
        if not fits(getattr(args, field.name), field.type):
            raise TypeError(f"{field.name} is {getattr(args, field.name)!r}")
    return args


def restore(args: Args) -> tuple[Args, dict | None]:
    """With --resume: the flags and the newest whole checkpoint of that run, wherever its folder has moved to."""
    if args.resume is None:
        return args, None
    newest, previous = (Path(args.resume, name) for name in CHECKPOINTS)
    try:
        saved = read_tree(newest, "checkpoint")
    except ValueError as error:
        if not previous.exists():
            fail(str(error))
        saved = load_tree(previous, "checkpoint")
        print(f"{error}; going on from {previous}", file=sys.stderr)
    if saved.get("script") != SCRIPT:
        fail(f"{args.resume} is a run of {saved.get('script')}.py; go on with that script")
    try:
        if type(saved["updates"]) is not int or saved["updates"] < 0:
            raise TypeError(f"updates is {saved['updates']!r}")
        return change_args(Args(), saved["args"] | {"resume": args.resume, "device": args.device}), saved
    except Exception as error:  # as in load_policy
        fail(f"{args.resume} was made by another version of {SCRIPT}.py ({type(error).__name__} {error})")


def restore_state(args: Args, saved: dict, state: TrainState, cursor: Cursor, teacher: str | None) -> TrainState:
    """What a checkpoint has in place of a fresh state and of no returns; ends the program if that is of another run.

    teacher: the fingerprint of this run's, where there is one.
    """
    try:
        found = serialization.from_state_dict(state, saved["state"])
        check_arrays("arrays", found, state)
        cursor.finished.extend(map(float, saved["finished"]))
        timing, known = saved["timing"], saved["teacher"]
        if saved["updates"] > args.num_updates or not all(fits(timing[name], float) for name in ("SPS", "seconds")):
            raise ValueError(f"update {saved['updates']} of {args.num_updates}, {timing}")
    except Exception as error:  # as in load_policy
        fail(f"{args.resume} holds no state of this run: {type(error).__name__} {error}")
    if known != teacher:
        fail(f"the teacher is not the one that {args.resume} began with; put its file back, or begin another run")
    return jax.tree.map(jnp.array, found)


def load_teacher(args: Args) -> tuple[Args, Policy, Frozen]:
    """The teacher's network and what is frozen of it; the task is the teacher's, where no flag says otherwise."""
    if args.env_id is None and args.teacher is None:
        args = dataclasses.replace(args, env_id="Hopper-v4")
    if args.env_id is not None:
        check_task(args.env_id)
    path = Path(args.teacher or Path(__file__).parent / "teachers" / f"{args.env_id}__100.msgpack")
    if args.teacher is None and not path.exists():
        fail(f"no teacher of {args.env_id} is shipped; train one with `python train_teacher.py --env-id {args.env_id}` "
             "and name its file with --teacher")
    model, policy, teacher = load_policy(path)
    if args.env_id not in (None, model["env_id"]):
        fail(f"{path} is a teacher of {model['env_id']}, not of {args.env_id}")
    if args.env_id is None:
        check_task(model["env_id"])
    if (found := (list(model["observation_shape"]), policy.action_dim)) != (needed := task_shape(model["env_id"])):
        fail(f"{path} is for observations and actions of {found}; those of {model['env_id']} are {needed}")
    args = dataclasses.replace(args, env_id=model["env_id"])
    if args.contact_forces is None and args.env_id.startswith("Humanoid"):
        args = dataclasses.replace(args, contact_forces=model["args"].get("contact_forces") is True)
    return args, policy, teacher


def make_folder(args: Args) -> Path:
    """Creates the run's folder, with args.json in it."""
    name = f"{args.env_id}__{SCRIPT}__{args.student_size}__{args.seed}__{int(time.time())}"
    folder = Path(args.resume or args.run_dir or f"runs/{name}")
    if args.resume is None:
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            fail(f"cannot create {folder}: {error.strerror}")
        write_json(folder / "args.json", dataclasses.asdict(args) | {"versions": versions()})
    return folder


def finish(
    args: Args, networks: Networks, state: TrainState, teacher: Frozen, original: Frozen, folder: Path, timing: dict
) -> dict[str, float]:
    """Evaluates student and teacher on the same games, writes student.msgpack and results.json, prints the outcome.

    teacher: as it taught; original: as it was before noise. Returns each one's mean, their ratio and the timing.
    """
    student = teacher._replace(params=state.params["policy"])
    players = {"student": (networks.policy, student), "teacher": (networks.teacher, original)}
    if args.teacher_noise_std:
        players["corrupted_teacher"] = (networks.teacher, teacher)
    evaluations = {name: assess(args, *player) for name, player in players.items()}
    numbers = {name: x["mean"] for name, x in evaluations.items()} | timing
    numbers["ratio"] = numbers["student"] / numbers["teacher"] if numbers["teacher"] > 0 else float("nan")

    network = {"kind": "mlp", "channels": [], "hidden": list(args.hidden)}
    about = {"env_id": args.env_id, "script": SCRIPT, "network": network, "args": plain_args(args),
             "command": command_line(args), "versions": versions()}
    ratio = {"ratio": numbers["ratio"] if numbers["teacher"] > 0 else None}  # of what is negative it would say nothing
    save_tree(folder / "student.msgpack", "model", about | {
        "role": "student", "action_dim": networks.policy.action_dim,
        "observation_shape": list(teacher.obs_stats.mean.shape), "params": state.params,
        "obs_stats": teacher.obs_stats._asdict(), "evaluation": evaluations["student"]})
    write_json(folder / "results.json", about | timing | ratio | evaluations)
    for name, x in evaluations.items():
        print(f"{name.replace('_', ' '):<18} {x['mean']:>10.1f} ± {x['std']:.1f} ({len(x['returns'])} episodes)")
    print(f"{'student / teacher':<18} {numbers['ratio']:>10.3f}")
    print(f"{'steps per second':<18} {timing['SPS']:>10.0f}")
    print(f"{'files':<18} {folder}")
    return numbers


def main(args: Args) -> dict[str, float]:
    """Distils a student and evaluates it beside its teacher; returns the single numbers of results.json."""
    choose_device(args.device)
    args, saved = restore(args)
    args, teacher_policy, original = load_teacher(args)
    args = resolve(args)
    teacher = original._replace(params=corrupt(original.params, args.teacher_noise_std, args.teacher_noise_seed))
    first, known = saved["updates"] if saved else 0, fingerprint(original)
    seed = (args.seed + first * args.num_envs) % EVAL_SEED  # going on, it plays new games
    envs = make_envs(args.env_id, args.num_envs, seed, args.contact_forces)
    networks = Networks(Policy(args.hidden, teacher_policy.action_dim), Value(args.hidden), teacher_policy)
    state, cursor = init_state(args, networks, envs.observation_space.shape[0]), start(envs)
    if saved:
        state = restore_state(args, saved, state, cursor, known)
        state = state._replace(discounted=jnp.zeros(args.num_envs))  # its episodes are gone with the simulator

    folder = make_folder(args)
    log = Log(folder, args, first * args.batch_size)
    timing = saved["timing"] if saved else {"SPS": 0.0, "seconds": 0.0}
    began = compiled = time.time()
    before = timing["seconds"]
    if not saved:
        save_checkpoint(folder, args, 0, state, cursor, timing, log, known)
    with closing(log), progress_bar(args, first) as bar, catch_signals() as signals:
        for number in range(first + 1, args.num_updates + 1):
            key, noise = draw_noise(state.key, args.num_steps, (args.num_envs, networks.policy.action_dim))
            policy_step = partial(act, networks.policy, state.params["policy"], teacher.obs_stats, noise)
            rollout = collect(envs, cursor, policy_step, args.num_steps)
            distill_coef = distill_coef_at(args, (number - 1) / max(1, args.num_updates - 1))
            state, metrics = update(args, networks, teacher, state._replace(key=key), rollout, distill_coef)
            metrics = jax.tree.map(float, jax.device_get(metrics))
            check_finite(metrics, number, folder)

            now, steps = time.time(), number * args.batch_size
            if number == first + 1:  # which compiled: the speed is that of the updates after it, or of the run before
                timing["SPS"], compiled = timing["SPS"] or args.batch_size / (now - began), now
            else:
                timing["SPS"] = (number - first - 1) * args.batch_size / (now - compiled)
            timing["seconds"] = before + now - began
            episodic_return = float(np.mean(cursor.finished)) if cursor.finished else float("nan")
            charts = {"charts/episodic_return": episodic_return, "charts/SPS": timing["SPS"]}
            log.write(steps, timing["seconds"], charts | metrics)
            bar.set_postfix_str(f"return {episodic_return:.0f}, KL {metrics['losses/teacher_kl']:.3f}", refresh=False)
            bar.update(args.batch_size)
            if (last := number == args.num_updates or bool(signals)) or number % args.checkpoint_every == 0:
                save_checkpoint(folder, args, number, state, cursor, timing, log, known)
            if last and signals:
                stop(folder, signals[0])
    with catch_signals(partial(stop, folder)):
        envs.close()
        return finish(args, networks, state, teacher, original, folder, timing)


def program() -> None:
    """The command line's program: a file that cannot be written ends it in one line, with exit code 1.

    It ends there and then, since what Python would still write at its exit would fail as well.
    """

    def give_up(error: BaseException) -> NoReturn:
        with tqdm.external_write_mode(sys.stderr):  # in place of the progress bar
            print(f"error: {error}; go on from the last checkpoint with --resume", file=sys.stderr, flush=True)
            os._exit(1)

    threading.excepthook = lambda failure: give_up(failure.exc_value)  # a thread writes TensorBoard's events
    try:
        main(parse_args())
    except KeyboardInterrupt:  # before training
        raise SystemExit(130) from None
    except OSError as error:
        give_up(error)


if __name__ == "__main__":
    program()
