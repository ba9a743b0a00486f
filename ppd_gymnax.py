"""Proximal Policy Distillation (PPD) end to end in XLA: environments, teacher and student, for all seeds at once.

    python ppd_gymnax.py --env-id Breakout-MinAtar --num-seeds 5
    python ppd_gymnax.py --env-id Breakout-MinAtar --distill-coef 0.5 1 2 5         # a study of λ is one run

For every seed it trains a teacher by PPO, corrupts it, distils a student from what is left, and evaluates all three.
Each iteration collects a rollout, estimates advantages A, and over epochs of shuffled minibatches

    maximises  E[ min(r A, clip(r, 1-ε, 1+ε) A) + α entropy - λ KL(teacher || student) max(r, 1-ε) ]
    minimises  E[ (V(s) - R)² ]                              with r = π(a|s) / π_old(a|s), not detached.

PPO is the case without a teacher, so one `train` serves teacher and student; what makes PPD out of PPO is marked
`# PPD`. --method student-distill and teacher-distill run the paper's baselines instead. A seed learns the same whether
it runs alone or among others. Source: Spigler, "Proximal Policy Distillation", TMLR 2025 (arXiv 2407.15134), Algorithms
1 to 3; the tasks are gymnax's, and networks and budgets are ours, small enough for a laptop.
"""

import csv
import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

import distrax
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy.stats
import tyro
from flax import serialization
from tensorboardX import SummaryWriter
from tqdm import tqdm

# ======================================================================================================================
# Arguments
# ======================================================================================================================


class Network(NamedTuple):
    """What a network is made of: convolutions, unless it is an MLP, then hidden layers."""

    kind: Literal["mlp", "minatar"]
    channels: tuple[int, ...]
    hidden: tuple[int, ...]


# Networks of each --student-size, in about the paper's proportions: 0.25, 1 and 4 times the parameters
NETWORKS = {
    "states": {"smaller": Network("mlp", (), (32, 32)), "same": Network("mlp", (), (64, 64)),
               "larger": Network("mlp", (), (128, 128))},
    "grid": {"smaller": Network("mlp", (), (16, 16)), "same": Network("mlp", (), (64, 64)),
             "larger": Network("mlp", (), (192, 192))},
    "cnn": {"smaller": Network("minatar", (8,), (64,)), "same": Network("minatar", (16,), (128,)),
            "larger": Network("minatar", (32,), (256,))},
}


@dataclass(frozen=True)
class Task:
    """What is learned, and where."""

    env_id: str = "Breakout-MinAtar"
    """task, by gymnax's name: CartPole-v1, Acrobot-v1, MountainCar-v0, Pendulum-v1, MountainCarContinuous-v0,
    Reacher-misc, or Asterix-, Breakout-, Freeway-, Seaquest- or SpaceInvaders-MinAtar"""
    seed: int = 100
    """first seed; it settles networks, actions, minibatches and environments"""
    num_seeds: int = 4
    """seeds learned side by side: --seed and those after it"""
    total_timesteps: int | None = None
    """environment steps of each student, rounded up to whole rollouts; by default a fifth of its teacher's, as in the
    paper"""
    cnn: bool = False
    """a convolution and a hidden layer for MinAtar, in place of an MLP on the flattened grid"""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """where all of it runs, also of a resumed run; gpu is an error where there is none"""


@dataclass(frozen=True)
class Teacher:
    """Where the teacher comes from, and what is done to it."""

    teacher: str | None = None
    """file of a teacher for all seeds, or a run's folder, whose teacher_{seed}.msgpack teaches that seed; by default
    each seed trains its own"""
    teacher_timesteps: int | None = None
    """environment steps of each teacher, where it is trained here"""
    teacher_num_envs: int | None = None
    """environments stepped in parallel while the teacher is trained; by default --num-envs, where that is given"""
    teacher_num_steps: int | None = None
    """steps of each environment in a rollout while the teacher is trained"""
    teacher_ent_coef: float | None = None
    """weight of the entropy bonus while the teacher is trained: 0.01, and 0.05 where rewards are met by chance alone"""
    teacher_noise_std: float = 0.05
    """standard deviation of Gaussian noise on every parameter of the teacher's policy (the paper's σ, there 0.05)"""
    teacher_noise_seed: int = 0
    """seed of that noise for the first seed, and so on"""


@dataclass(frozen=True)
class Distillation:
    """The student, and how strongly the teacher pulls it."""

    method: Literal["ppd", "student-distill", "teacher-distill", "ppo"] = "ppd"
    """Algorithm 1, 2 (the student acts, and regresses to its teacher) or 3 (the teacher acts, the student regresses);
    ppo trains teachers and no student"""
    student_size: Literal["smaller", "same", "larger"] = "larger"
    """parameters of the student, about 0.25, 1 or 4 times its teacher's"""
    student_hidden: tuple[int, ...] | None = None
    """widths of the student's hidden layers; overrides --student-size"""
    distill_coef: tuple[float, ...] = (1.0,)
    """weight of the distillation term (the paper's λ); 0 is PPO; several values are as many students of each seed"""
    distill_coef_final: float | None = None
    """weight at the end of the run, reached linearly; by default λ stays constant"""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """KL(teacher || student), the paper's, or KL(student || teacher)"""


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation, of teacher and student; the baselines have no epochs, advantages or ratios."""

    learning_rate: float | None = None
    """step size of Adam, constant"""
    num_envs: int | None = None
    """environments stepped in parallel (N); of the baselines fewer, for as many gradient steps as PPD takes"""
    num_steps: int | None = None
    """steps of each environment in a student's rollout (T); of the baselines the paper's: 5"""
    num_minibatches: int = 8
    """minibatches of an epoch, a divisor of N*T"""
    update_epochs: int = 4
    """passes over each rollout"""
    gamma: float = 0.99
    """discount factor (γ)"""
    gae_lambda: float = 0.95
    """decay of generalised advantage estimation"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio (ε)"""
    ent_coef: float = 0.0
    """weight of the student's entropy bonus (α); the paper's: 0"""
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
    num_parts: int = 50
    """parts that each training is cut into: after each there are rows in progress.csv and a checkpoint"""
    eval_episodes: int = 100
    """episodes of the final evaluation, with raw rewards: deterministic actions on states; sampled ones on MinAtar,
    whose games hardly vary otherwise"""
    track: bool = False
    """log to Weights & Biases as well (pip install wandb)"""
    wandb_project_name: str = "ppd"
    """project to log to"""
    wandb_entity: str | None = None
    """team to log to"""


@dataclass(frozen=True)
class Args(Output, PPO, Distillation, Teacher, Task):
    """All flags; the command line groups them by the classes above."""

    @property
    def networks(self) -> dict[str, Network]:
        """The networks of policy and value by size."""
        return NETWORKS["cnn" if self.cnn else "grid" if is_grid(self.env_id) else "states"]

    @property
    def network(self) -> Network:
        """The student's."""
        network = self.networks[self.student_size]
        return network if self.student_hidden is None else network._replace(hidden=self.student_hidden)

    @property
    def batch_size(self) -> int:
        """Samples of a rollout, N*T."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Rollouts of a run, each followed by an update."""
        return -(-self.total_timesteps // self.batch_size)

    @property
    def updates_per_part(self) -> int:
        """Updates of one of the about --num-parts parts of a run; the last may take it a little further than asked."""
        return -(-self.num_updates // self.num_parts)

    @property
    def parts(self) -> int:
        """Parts of this run: there are no more than updates."""
        return -(-self.num_updates // self.updates_per_part)


# Defaults of MinAtar, of other tasks, and of those whose reward is the same until chance has reached the goal; found by
# trying a few values, not the paper's
MINATAR = {"learning_rate": 2.5e-3, "num_envs": 64, "num_steps": 32, "teacher_num_steps": 128,
           "teacher_timesteps": 400_000, "teacher_ent_coef": 0.01}
STATES = {"learning_rate": 1e-3, "num_envs": 16, "num_steps": 64, "teacher_num_steps": 128,
          "teacher_timesteps": 500_000, "teacher_ent_coef": 0.01}
BASELINES = {"num_envs": 16, "num_steps": 5}  # a gradient step for 80 samples; PPD takes one for 64, the paper for 90
SPARSE = dict.fromkeys(("Acrobot-v1", "MountainCar-v0"), {"teacher_ent_coef": 0.05})

# Flags that must lie in a range, both ends included
RANGES = {
    "total_timesteps": (1, 10**12), "teacher_timesteps": (1, 10**12), "num_envs": (1, 10**6), "num_steps": (1, 10**6),
    "teacher_num_steps": (1, 10**6), "teacher_num_envs": (1, 10**6),
    "num_minibatches": (1, 10**9), "update_epochs": (1, 10**6), "num_parts": (1, 10**6), "eval_episodes": (1, 10**6),
    "seed": (0, 10**9 - 1), "num_seeds": (1, 10**5), "teacher_noise_seed": (0, 10**9 - 1), "learning_rate": (0, 1e3),
    "gamma": (0, 1), "gae_lambda": (0, 1), "clip_coef": (0, 1), "ent_coef": (0, 1e6), "teacher_ent_coef": (0, 1e6),
    "vf_coef": (0, 1e6), "max_grad_norm": (1e-9, 1e9), "distill_coef_final": (0, 1e6), "teacher_noise_std": (0, 1e6),
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
    check_task(args.env_id)
    known = (MINATAR if is_grid(args.env_id) else STATES) | SPARSE.get(args.env_id, {})
    known |= {"teacher_num_envs": args.num_envs or known["num_envs"]}
    if args.method.endswith("distill"):
        known |= BASELINES
    args = dataclasses.replace(args, **{name: value for name, value in known.items() if getattr(args, name) is None})
    if args.total_timesteps is None:
        args = dataclasses.replace(args, total_timesteps=max(1, args.teacher_timesteps // 5))
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} must lie between {low:g} and {high:g}, not {value}")
    if not args.distill_coef or not all(0 <= value <= 1e6 for value in args.distill_coef):
        fail(f"--distill-coef takes numbers between 0 and 1e6, not {args.distill_coef}")
    if args.method == "ppo" and args.teacher:
        fail("--method ppo trains teachers; with --teacher there is nothing left to do")
    if args.method != "ppd" and (args.distill_coef != (1.0,) or args.distill_coef_final is not None):
        fail(f"--distill-coef weighs PPD's term; {args.method} has none")
    if args.cnn and not is_grid(args.env_id):
        fail(f"--cnn is for MinAtar; {args.env_id} has states")
    hidden = args.network.hidden
    if not 1 <= len(hidden) <= MAX_LAYERS or not all(1 <= width <= 65_536 for width in hidden):
        fail(f"a network has 1 to {MAX_LAYERS} hidden layers of 1 to 65536 units, not {hidden}")
    learned = ([("", args)] if args.method == "ppd" else []) + [("teacher ", teacher_args(args))] * (not args.teacher)
    for whose, each in learned:
        if each.batch_size % each.num_minibatches or each.batch_size < 2 * each.num_minibatches:
            fail(f"--num-minibatches {each.num_minibatches} does not divide a {whose}rollout of {each.num_envs} "
                 f"environments x {each.num_steps} steps = {each.batch_size} samples into equal parts of at least 2")
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


def check_task(env_id: str) -> None:
    """Ends the program for a task that gymnax does not have, naming those like it."""
    import gymnax  # not before: its import makes JAX settle its devices

    known = [name for name in gymnax.registered_envs if name != "MNISTBandit-bsuite"]  # that one downloads its images
    if env_id not in known:
        near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.3) or known
        fail(f"unknown gymnax task {env_id}; did you mean {', '.join(near)}?")


@cache
def make_env(env_id: str) -> tuple[Any, Any]:
    """The environment, which holds no state, and its parameters."""
    import gymnax  # not before: its import makes JAX settle its devices

    return gymnax.make(env_id)


def is_grid(env_id: str) -> bool:
    """Whether observations are MinAtar's: a grid [10, 10, C] of zeros and ones."""
    return env_id.endswith("-MinAtar")


def observation_dim(env_id: str) -> int:
    """Length of a flattened observation (D)."""
    env, params = make_env(env_id)
    return int(np.prod(env.observation_space(params).shape))


def flatten(env_id: str, observation: jax.Array) -> jax.Array:
    """An observation as [D]: states as float32; a grid as bool, a quarter of the memory to move."""
    return observation.reshape(-1).astype(bool if is_grid(env_id) else jnp.float32)


class World(NamedTuple):
    """Where N environments stand between two steps."""

    states: Any  # gymnax's, [N, ...]
    observations: jax.Array  # [N, D]
    returns: jax.Array  # [N]: sum of the raw rewards of the running episode


class Rollout(NamedTuple):
    """T steps of N environments, time first."""

    observations: jax.Array  # [T, N, D]
    actions: jax.Array  # [T, N], or [T, N, A] as sampled, before clipping to the bounds
    rewards: jax.Array  # [T, N]
    terminations: jax.Array  # [T, N] float32
    truncations: jax.Array  # [T, N] float32
    final_observations: jax.Array  # [T, N, D]: what each step led to, also where a new episode began instead
    returns: jax.Array  # [T, N]: sum of the raw rewards of the episode so far


def reset(env_id: str, num_envs: int, key: jax.Array) -> World:
    """Starts all environments."""
    env, params = make_env(env_id)
    observations, states = jax.vmap(env.reset, (0, None))(jax.random.split(key, num_envs), params)
    return World(states, jax.vmap(partial(flatten, env_id))(observations), jnp.zeros(num_envs))


def step(env_id: str, world: World, actions: jax.Array, keys: jax.Array) -> tuple[World, tuple[jax.Array, ...]]:
    """Steps all environments; returns where they stand then, and the last five parts of a rollout, without T.

    actions: [N], or [N, A] of any size: what lies beyond the bounds is clipped here and nowhere else. gymnax resets on
    the step that ends an episode: there is no phantom transition, but the observation then is the next episode's first.
    """
    env, params = make_env(env_id)
    space = env.action_space(params)
    if space.shape:
        actions = jnp.clip(actions, space.low, space.high).reshape(-1, *space.shape)
    observations, states, rewards, terminations, truncations, info = jax.vmap(env.step, (0, 0, 0, None))(
        keys, world.states, actions, params)
    shape = jax.vmap(partial(flatten, env_id))
    returns, dones = world.returns + rewards, terminations | truncations
    ends = terminations.astype(jnp.float32), truncations.astype(jnp.float32)
    world = World(states, shape(observations), jnp.where(dones, 0.0, returns))
    return world, (rewards.astype(jnp.float32), *ends, shape(info["final_observation"]), returns)


# ======================================================================================================================
# Networks
# ======================================================================================================================


def torso(network: Network, x: jax.Array) -> jax.Array:
    """Features [..., F] of flattened observations [..., D].

    An MLP, or a 3x3 convolution and then one (Young and Tian 2019). The convolution is a matrix product of patches: the
    gradient of XLA's own is ten times slower within lax.scan on a CPU. Called inside a module's __call__, whose layers
    these become.
    """
    dense = partial(nn.Dense, kernel_init=nn.initializers.orthogonal(np.sqrt(2)))
    x = x.astype(jnp.float32)
    if network.kind == "minatar":
        x = x.reshape(*x.shape[:-1], 10, 10, -1)
        for channels in network.channels:
            side = x.shape[-2] - 2
            windows = [x[..., i:i + side, j:j + side, :] for i in range(3) for j in range(3)]
            x = nn.relu(dense(channels)(jnp.concatenate(windows, axis=-1)))
        x = x.reshape(*x.shape[:-3], -1)
    for width in network.hidden:
        x = nn.relu(dense(width)(x))
    return x


class Policy(nn.Module):
    """Categorical policy, or a Gaussian one, whose log standard deviation does not depend on the state."""

    network: Network
    action_dim: int
    gaussian: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        """x: [..., D], normalised. Returns logits [..., A], or mean and log standard deviation, both [..., A]."""
        x = torso(self.network, x)
        output = nn.Dense(self.action_dim, kernel_init=nn.initializers.orthogonal(0.01))(x)
        if not self.gaussian:
            return output
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        return output, jnp.broadcast_to(log_std, output.shape)


class Value(nn.Module):
    """State value: a network that shares nothing with the policy."""

    network: Network

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x as in `torso`. Returns values [...]."""
        x = torso(self.network, x)
        return nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(x).squeeze(-1)


def distribution(outputs: jax.Array | tuple[jax.Array, jax.Array]) -> distrax.Distribution:
    """The action distribution that a policy's outputs stand for."""
    if isinstance(outputs, tuple):
        mean, log_std = outputs
        return distrax.MultivariateNormalDiag(mean, jnp.exp(log_std))
    return distrax.Categorical(logits=outputs)


# ======================================================================================================================
# Mathematics
# ======================================================================================================================


class Stats(NamedTuple):
    """Running mean and variance, and the number of samples they rest on."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def update_stats(stats: Stats, samples: jax.Array) -> Stats:
    """Adds samples [B, ...] (Chan et al. 1979, pairwise update)."""
    n = len(samples)
    mean, var = samples.mean(0), samples.var(0)
    count = stats.count + n
    delta = mean - stats.mean
    merged = (stats.var * stats.count + var * n + delta**2 * stats.count * n / count) / count
    return Stats(stats.mean + delta * n / count, merged, count)


def normalize(observations: jax.Array, stats: Stats | None) -> jax.Array:
    """States [..., D] less their running mean, over their running standard deviation, clipped to ±10; a grid as is."""
    if stats is None:
        return observations
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

    return jax.lax.scan(step, carried, (rewards, dones), unroll=16)


def compute_gae(
    rewards: jax.Array, values: jax.Array, next_values: jax.Array, terminations: jax.Array, truncations: jax.Array,
    gamma: float, gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2016): advantages and returns, both [T, N].

    All arrays: [T, N]; next_values: of the observation that each step led to, also where a new episode began instead.
    A terminated step does not bootstrap, a truncated one does; what is both is terminated. Both cut the trace.
    """
    dones = jnp.maximum(terminations, truncations)
    deltas = rewards + gamma * next_values * (1.0 - terminations) - values

    def step(advantage, x):
        delta, done = x
        advantage = delta + gamma * gae_lambda * (1.0 - done) * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros_like(deltas[0]), (deltas, dones), reverse=True, unroll=16)
    return advantages, advantages + values


def standardize(advantages: jax.Array) -> jax.Array:
    """Advantages [B] with mean 0 and variance 1."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


class Batch(NamedTuple):
    """Samples of a rollout; the leading axis is [B], or none for a single sample."""

    observations: jax.Array  # [B, D], normalised
    actions: jax.Array  # [B] or [B, A]
    log_probs: jax.Array  # [B], under the policy that acted
    advantages: jax.Array  # [B]
    returns: jax.Array  # [B]
    teacher: Any  # PPD: the teacher policy's outputs, [B, A] (each)


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
    outputs: Any, values: jax.Array, batch: Batch, distill_coef: float | None, clip_coef: float, ent_coef: float,
    vf_coef: float, kl_direction: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a minibatch and its terms, averaged over the samples.

    outputs: the student policy's, [B, A] (each); values: the student's, [B]; distill_coef: λ at this step, or None for
    PPO, which has no teacher.
    """
    terms = jax.vmap(partial(ppd_terms, clip_coef=clip_coef, kl_direction=kl_direction))(outputs, values, batch)
    terms = jax.tree.map(jnp.mean, terms)
    loss = terms["policy_loss"] + vf_coef * terms["value_loss"] - ent_coef * terms["entropy"]
    if distill_coef is not None:  # PPD
        loss += distill_coef * terms["distill_loss"]
    return loss, {"loss": loss} | terms


def distill_loss(
    outputs: Any, values: jax.Array, teacher_outputs: Any, teacher_values: jax.Array, ent_coef: float, vf_coef: float,
    kl_direction: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The baselines' loss of a rollout (Algorithms 2 and 3) and its terms, averaged over the samples.

    outputs, teacher_outputs: the two policies', [B, A] (each); values, teacher_values: [B].
    """
    pi, teacher = distribution(outputs), distribution(teacher_outputs)
    kl = teacher.kl_divergence(pi) if kl_direction == "forward" else pi.kl_divergence(teacher)
    terms = {"teacher_kl": kl.mean(), "entropy": pi.entropy().mean(),
             "value_loss": ((values - teacher_values) ** 2).mean()}
    loss = terms["teacher_kl"] - ent_coef * terms["entropy"] + vf_coef * terms["value_loss"]
    return loss, {"loss": loss} | terms


# ======================================================================================================================
# Jitted steps
# ======================================================================================================================


class Networks(NamedTuple):
    """The flax modules; they hold no parameters."""

    policy: Policy
    value: Value
    teacher: Policy | None
    teacher_value: Value | None


class Frozen(NamedTuple):
    """A teacher: parameters {"policy": ..., "value": ...}, and the statistics of the states it stands on."""

    params: dict
    obs_stats: Stats | None


class TrainState(NamedTuple):
    """All that learning changes, of one run or, with a leading axis [R], of several."""

    params: dict  # {"policy": ..., "value": ...}
    opt_state: optax.OptState
    obs_stats: Stats | None  # of the states; a student's are its teacher's, and stay as they are
    return_stats: Stats  # of the discounted returns, scalars
    discounted: jax.Array  # [N]: discounted return of each running episode
    world: World
    key: jax.Array


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam, after clipping the global norm of the gradient; on one flat vector, which takes fewer and larger steps."""
    return optax.flatten(
        optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(args.learning_rate, eps=1e-5)))


def init_state(args: Args, networks: Networks, seed: int) -> TrainState:
    """A fresh teacher, or a fresh student, from the seed alone."""
    key = jax.random.PRNGKey(seed)
    key = key if networks.teacher is None else jax.random.fold_in(key, 1)  # not the weights its teacher began with
    key, policy_key, value_key, reset_key = jax.random.split(key, 4)
    x = jnp.zeros((1, observation_dim(args.env_id)))
    params = {"policy": networks.policy.init(policy_key, x), "value": networks.value.init(value_key, x)}
    obs_stats = None if is_grid(args.env_id) else Stats(jnp.zeros_like(x[0]), jnp.ones_like(x[0]), jnp.float32(1e-4))
    return_stats = Stats(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(1e-4))
    world = jax.jit(reset, static_argnums=(0, 1))(args.env_id, args.num_envs, reset_key)
    opt_state = make_optimizer(args).init(params)
    return TrainState(params, opt_state, obs_stats, return_stats, jnp.zeros(args.num_envs), world, key)


def stack(trees: list) -> Any:
    """Puts trees of one shape side by side, along a new leading axis.

    Networks are initialised one by one and then stacked: a batched orthogonal initialisation, which vmap would make of
    it, can hang for ever on two cores (seen with JAX 0.10).
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def collect(args: Args, policy: Policy, params: dict, stats: Stats | None, world: World, key: jax.Array) -> tuple:
    """Steps the environments T times, with actions that the policy samples; returns where they stand, and the rollout.

    All random numbers are drawn ahead, in one call: drawn step by step they cost as much as the network.
    """
    noise_key, step_key = jax.random.split(key)
    sizes = args.num_steps, args.num_envs
    draw = jax.random.normal if policy.gaussian else jax.random.gumbel
    noises = draw(noise_key, (*sizes, policy.action_dim))

    def advance(world, x):
        noise, keys = x
        outputs = policy.apply(params, normalize(world.observations, stats))
        actions = outputs[0] + jnp.exp(outputs[1]) * noise if policy.gaussian else jnp.argmax(outputs + noise, axis=-1)
        observations = world.observations
        world, found = step(args.env_id, world, actions, keys)
        return world, Rollout(observations, actions, *found)

    return jax.lax.scan(advance, world, (noises, jax.random.split(step_key, sizes)))


def gradient_step(args: Args, loss_fn: Callable, params: dict, opt_state: optax.OptState) -> tuple:
    """Follows the gradient of loss_fn(params) once; returns parameters and optimiser state, and the loss's terms."""
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = make_optimizer(args).update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    metrics |= {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    return (params, opt_state), metrics


def learn_ppd(
    args: Args, networks: Networks, teacher: Frozen | None, state: TrainState, rollout: Rollout, distill_coef: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """PPD, or PPO where there is no teacher: epochs of minibatches from one rollout."""
    dones = jnp.maximum(rollout.terminations, rollout.truncations)

    # The parameters are still those of the rollout, so its values and log-probabilities are one batched call
    observations = normalize(rollout.observations, state.obs_stats)
    values = networks.value.apply(state.params["value"], observations)
    next_values = networks.value.apply(state.params["value"], normalize(rollout.final_observations, state.obs_stats))
    outputs = networks.policy.apply(state.params["policy"], observations)
    log_probs = distribution(outputs).log_prob(rollout.actions)
    if teacher is None:
        distill_coef = None  # PPO; the policy of the rollout stands in for its teacher, and XLA drops what is unused
    else:
        outputs = networks.teacher.apply(teacher.params["policy"], observations)  # PPD: once a rollout, for all epochs

    discounted, sums = discount_forward(rollout.rewards, dones, state.discounted, args.gamma)
    return_stats = update_stats(state.return_stats, sums.reshape(-1))
    rewards = jnp.clip(rollout.rewards / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)
    advantages, returns = compute_gae(
        rewards, values, next_values, rollout.terminations, rollout.truncations, args.gamma, args.gae_lambda)

    batch = Batch(observations, rollout.actions, log_probs, advantages, returns, outputs)
    batch = jax.tree.map(lambda x: x.reshape(args.batch_size, *x.shape[2:]), batch)

    def train_minibatch(carry, indices):
        minibatch = jax.tree.map(lambda x: x[indices], batch)
        minibatch = minibatch._replace(advantages=standardize(minibatch.advantages))

        def loss_fn(params):
            outputs = networks.policy.apply(params["policy"], minibatch.observations)
            values = networks.value.apply(params["value"], minibatch.observations)
            return ppd_loss(outputs, values, minibatch, distill_coef, args.clip_coef, args.ent_coef, args.vf_coef,
                            args.kl_direction)

        return gradient_step(args, loss_fn, *carry)

    key, shuffle_key = jax.random.split(state.key)
    epoch_keys = jax.random.split(shuffle_key, args.update_epochs)
    orders = jnp.argsort(jax.vmap(jax.random.bits, (0, None))(epoch_keys, (args.batch_size,)))
    minibatches = orders.reshape(args.update_epochs * args.num_minibatches, -1)
    (params, opt_state), metrics = jax.lax.scan(train_minibatch, (state.params, state.opt_state), minibatches)

    # The new statistics count from the next rollout on: this one and all of its epochs see the same observations
    obs_stats = state.obs_stats
    if teacher is None and obs_stats is not None:
        obs_stats = update_stats(obs_stats, rollout.observations.reshape(args.batch_size, -1))
    state = TrainState(params, opt_state, obs_stats, return_stats, discounted, state.world, key)
    if teacher is None:
        del metrics["distill_loss"], metrics["teacher_kl"]
    return state, jax.tree.map(jnp.mean, metrics)


def learn_by_regression(
    args: Args, networks: Networks, teacher: Frozen, state: TrainState, rollout: Rollout
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The baselines: one gradient step on a whole rollout, towards the teacher's policy and value."""
    observations = normalize(rollout.observations.reshape(args.batch_size, -1), state.obs_stats)
    teacher_outputs = networks.teacher.apply(teacher.params["policy"], observations)
    teacher_values = networks.teacher_value.apply(teacher.params["value"], observations)

    def loss_fn(params):
        outputs = networks.policy.apply(params["policy"], observations)
        values = networks.value.apply(params["value"], observations)
        return distill_loss(outputs, values, teacher_outputs, teacher_values, args.ent_coef, args.vf_coef,
                            args.kl_direction)

    (params, opt_state), metrics = gradient_step(args, loss_fn, state.params, state.opt_state)
    return state._replace(params=params, opt_state=opt_state), metrics


def update(
    args: Args, networks: Networks, teacher: Frozen | None, state: TrainState, distill_coef: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Collects a rollout and learns from it; returns the new state and the metrics."""
    key, rollout_key = jax.random.split(state.key)
    acting = (networks.policy, state.params) if args.method != "teacher-distill" else (networks.teacher, teacher.params)
    world, rollout = collect(args, acting[0], acting[1]["policy"], state.obs_stats, state.world, rollout_key)
    state = state._replace(world=world, key=key)
    if args.method == "ppd":
        state, metrics = learn_ppd(args, networks, teacher, state, rollout, distill_coef)
    else:
        state, metrics = learn_by_regression(args, networks, teacher, state, rollout)
    dones = jnp.maximum(rollout.terminations, rollout.truncations)
    return state, {"episodes": dones.sum(), "returns": (rollout.returns * dones).sum()} | metrics


def fill_devices(num_runs: int) -> np.ndarray:
    """Indices of runs, the last repeated until all devices have as many: 0 1 2 3 4 4 for five runs on two devices."""
    size = num_runs + -num_runs % min(num_runs, len(jax.devices()))
    return np.minimum(np.arange(size), num_runs - 1)


def over_devices(num_runs: int) -> jax.sharding.NamedSharding:
    """How the runs lie on the devices, the same number on each: GPUs, or cores of a CPU, which share one run badly."""
    size = max(n for n in range(1, len(jax.devices()) + 1) if num_runs % n == 0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:size]), "runs")
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("runs"))


def side_by_side(one_run: Callable, *trees: Any) -> Any:
    """one_run(*trees) for every entry of the trees' leading axis [R]: vectorised, and spread over the devices."""
    place = over_devices(len(jax.tree.leaves(trees)[0]))
    return jax.shard_map(
        jax.vmap(one_run), mesh=place.mesh, in_specs=place.spec, out_specs=place.spec, check_vma=False)(*trees)


@partial(jax.jit, static_argnames=("args", "networks"), donate_argnames="state")
def train(
    args: Args, networks: Networks, teacher: Frozen | None, state: TrainState, distill_coefs: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """K updates of each of R runs; returns the new states, and the means of the updates' metrics, [R] each.

    teacher, state: with a leading axis [R]; without a teacher it is PPO. distill_coefs: [R, K], λ at each update.
    """

    def one_run(teacher, state, distill_coefs):
        state, metrics = jax.lax.scan(partial(update, args, networks, teacher), state, distill_coefs)
        episodes, returns = metrics.pop("episodes").sum(), metrics.pop("returns").sum()
        return state, {"charts/episodic_return": returns / episodes} | {  # NaN where no episode has ended
            f"losses/{name}": x.mean() for name, x in metrics.items()}

    return side_by_side(one_run, teacher, state, distill_coefs)


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


def as_frozen(tree: dict) -> Frozen:
    """Parameters and statistics as a file holds them."""
    stats = tree["obs_stats"]
    params = {name: tree["params"][name] for name in ("policy", "value")}
    return jax.tree.map(jnp.asarray, Frozen(params, None if stats is None else Stats(**stats)))


def describe_run(args: Args, network: Network) -> dict:
    """What every file of results or of a model says about where it comes from."""
    return {"env_id": args.env_id, "script": SCRIPT, "network": plain(network), "args": plain_args(args),
            "command": command_line(args), "versions": versions()}


def save_models(
    args: Args, policy: Policy, role: str, name: str, players: Frozen, evaluation: dict, folder: Path
) -> None:
    """Writes a model file for each seed, {name}_{seed}.msgpack; players: with a leading axis [S]."""
    for i in range(args.num_seeds):
        player = jax.tree.map(lambda x, i=i: x[i], players)
        returns = evaluation["returns"][i]
        found = {"mean": evaluation["means"][i], "std": float(np.std(returns)), "returns": returns}
        save_tree(folder / f"{name}_{args.seed + i}.msgpack", "model", describe_run(args, policy.network) | {
            "library": "gymnax", "role": role, "action_dim": policy.action_dim,
            "observation_shape": [observation_dim(args.env_id)], "params": player.params,
            "obs_stats": None if player.obs_stats is None else player.obs_stats._asdict(), "evaluation": found})


def load_teachers(args: Args) -> tuple[Networks, Frozen] | None:
    """The networks of --teacher and, with a leading axis [S], its parameters; None where each seed trains its own."""
    if args.teacher is None:
        return None
    paths = [args.teacher] * args.num_seeds
    if os.path.isdir(args.teacher):
        paths = [os.path.join(args.teacher, f"teacher_{args.seed + i}.msgpack") for i in range(args.num_seeds)]
    found = {path: load_teacher(args, path) for path in paths}  # one file is read once
    if len({networks for networks, _ in found.values()}) > 1:
        fail(f"the teachers in {args.teacher} are not of one size")
    return found[paths[0]][0], stack([found[path][1] for path in paths])


def load_teacher(args: Args, path: str) -> tuple[Networks, Frozen]:
    """The networks and parameters of a teacher's file."""
    model = load_tree(path, "model")
    try:
        kind, channels, hidden = (model["network"][name] for name in Network._fields)
        network = Network(kind, tuple(map(int, channels)), tuple(map(int, hidden)))
        if model["env_id"] != args.env_id:
            raise ValueError(f"its task is {model['env_id']}")
        if kind not in ("mlp", "minatar") or len(channels) + len(hidden) > MAX_LAYERS:
            raise ValueError(f"its network is of the kind {kind}, with {len(channels) + len(hidden)} layers")
        networks = make_networks(args.env_id, network)
        x = jax.ShapeDtypeStruct((observation_dim(args.env_id),), jnp.float32)
        stats = None if is_grid(args.env_id) else Stats(x, x, jax.ShapeDtypeStruct((), jnp.float32))
        shapes = {name: jax.eval_shape(getattr(networks, name).init, jax.random.PRNGKey(0), x)
                  for name in ("policy", "value")}
        frozen = as_frozen(model)
        check_arrays("parameters", frozen, Frozen(shapes, stats))
    except Exception as error:  # of many kinds, for content of any kind
        fail(f"{path} is no teacher of {args.env_id}: {type(error).__name__} {error}")
    return networks, frozen


def plain(network: Network) -> dict:
    """A network as files describe it."""
    return {"kind": network.kind, "channels": list(network.channels), "hidden": list(network.hidden)}


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
            "gymnax": importlib.metadata.version("gymnax"), "device": jax.devices()[0].device_kind}


def check_finite(metrics: dict[str, np.ndarray], place: str, folder: Path) -> None:
    """Ends the run when a loss, the gradient or a parameter is NaN or infinite; the checkpoints stay as they were."""
    bad = [name for name, values in metrics.items() if name.startswith("losses/") and not np.isfinite(values).all()]
    if bad:
        last = folder / CHECKPOINTS[0]
        raise SystemExit(f"error: {place} gave {bad[0]} = {metrics[bad[0]]}; the last good state is {last}")


def stop(folder: Path, number: int) -> NoReturn:
    """Ends the program for the signal of this number."""
    print(f"\ninterrupted; go on with: python {SCRIPT}.py --resume {folder}", file=sys.stderr)
    raise SystemExit(128 + number)


# Of progress.csv; a teacher's training has no distillation losses, the baselines no PPO's, and their cells stay empty
COLUMNS = ["phase", "seed", "distill_coef", "global_step", "seconds", "charts/SPS", "charts/episodic_return"] + [
    f"losses/{name}" for name in ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac",
                                  "distill_loss", "teacher_kl", "grad_norm", "param_norm")]


class Log:
    """progress.csv and TensorBoard events in the run's folder; Weights & Biases, where asked for, gets them as well."""

    def __init__(self, folder: Path, args: Args, num_rows: int):
        """num_rows: how many rows to keep; those after them, of updates that are made again, are dropped."""
        path = folder / "progress.csv"
        if path.exists():
            lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]  # whole ones
            write_atomic(path, b"".join(lines[: num_rows + 1]))
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
        self.tensorboard = SummaryWriter(str(folder))
        self.num_rows = num_rows

    def write(self, run: dict[str, Any], metrics: dict[str, float]) -> None:
        """Logs the metrics of one run; run: its phase, seed, λ, step and seconds."""
        table = csv.DictWriter(self.file, COLUMNS)
        if self.file.tell() == 0:
            table.writeheader()
        table.writerow(run | metrics)
        self.num_rows += 1
        known = {name: value for name, value in metrics.items() if np.isfinite(value)}  # no return before an end
        about, step = f"{run['phase']}_{run['seed']}_lambda_{run['distill_coef']:g}", run["global_step"]
        for name, value in known.items():
            self.tensorboard.add_scalar(f"{about}/{name.replace('/', '-')}", value, step)
        if self.tracker is not None:
            self.tracker.log({f"{about}/{name}": value for name, value in known.items()} | {"global_step": step})

    def close(self) -> None:
        """Writes out what is left."""
        self.file.close()
        self.tensorboard.close()
        if self.tracker is not None:
            self.tracker.finish()


def wait(arrays: Any) -> Any:
    """Waits for what is being computed where signals are seen, which they are not within XLA."""
    while not all(x.is_ready() for x in jax.tree.leaves(arrays)):
        time.sleep(0.005)
    return arrays


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


@partial(jax.jit, static_argnames=("args", "policy"))
def evaluate(args: Args, policy: Policy, players: Frozen, keys: jax.Array) -> jax.Array:
    """Returns [R, E] of one episode in each of E environments: sums of raw rewards, undiscounted.

    players: with a leading axis [R], as the keys. Each environment's first episode counts, so that short ones do not
    crowd out long.
    """

    def one_run(player, key):
        def act(observations, key):
            pi = distribution(policy.apply(player.params["policy"], normalize(observations, player.obs_stats)))
            return pi.sample(seed=key) if is_grid(args.env_id) else pi.mode()

        def advance(carry):
            world, running, returns, key = carry
            key, act_key, step_key = jax.random.split(key, 3)
            keys = jax.random.split(step_key, args.eval_episodes)
            world, found = step(args.env_id, world, act(world.observations, act_key), keys)
            dones = jnp.maximum(found[1], found[2]) > 0
            return world, running & ~dones, jnp.where(running & dones, found[4], returns), key

        key, reset_key = jax.random.split(key)
        world = reset(args.env_id, args.eval_episodes, reset_key)
        carry = world, jnp.ones(args.eval_episodes, bool), jnp.zeros(args.eval_episodes), key
        return jax.lax.while_loop(lambda carry: carry[1].any(), advance, carry)[2]

    return side_by_side(one_run, players, keys)


def assess(args: Args, policy: Policy, players: Frozen) -> dict[str, Any]:
    """Evaluates [R] policies, the seeds of one thing after another; returns means and what they rest on.

    interval: half the width of the 95% confidence interval of the mean over seeds, by Student's t.
    """
    indices = fill_devices(args.num_seeds)
    keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(args.seed + i), 2) for i in indices])
    returns = wait(evaluate(args, policy, jax.tree.map(lambda x: x[indices], players), keys))
    returns = np.asarray(returns)[:args.num_seeds]
    means = returns.mean(1)
    interval = None  # one seed has none
    if args.num_seeds > 1:
        quantile = scipy.stats.t.ppf(0.975, args.num_seeds - 1)
        interval = float(quantile * means.std(ddof=1) / np.sqrt(args.num_seeds))
    return {"mean": float(means.mean()), "interval": interval, "means": means.tolist(), "returns": returns.tolist()}


def plot(folder: Path, args: Args, results: dict[str, Any]) -> None:
    """Draws the curves of progress.csv, mean and range over seeds, and what was evaluated, as curves.png."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(folder / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    curves = dict.fromkeys((row["phase"], float(row["distill_coef"])) for row in rows)
    for i, (phase, distill_coef) in enumerate(curves):
        chosen = [row for row in rows if (row["phase"], float(row["distill_coef"])) == (phase, distill_coef)]
        steps = sorted({int(row["global_step"]) for row in chosen})
        values = np.array([[float(row["charts/episodic_return"]) for row in chosen if int(row["global_step"]) == step]
                           for step in steps])
        label = phase if phase == "teacher" or len(curves) < 3 else f"{phase}, λ = {distill_coef:g}"
        known = np.isfinite(values).all(1)
        steps, values = np.array(steps)[known], values[known]
        axes.plot(steps, values.mean(1), label=f"{label}, while it learns", color=f"C{i}")
        axes.fill_between(steps, values.min(1), values.max(1), color=f"C{i}", alpha=0.2, linewidth=0)
    for name, style in (("teacher", "--"), ("corrupted_teacher", ":")):
        if name in results:
            label = f"{name.replace('_', ' ')}, evaluated"
            axes.axhline(results[name]["mean"], linestyle=style, color="black", label=label)
    student = "" if args.method == "ppo" else f" into {'-'.join(map(str, args.network.hidden))}"
    axes.set(xlabel="environment steps of each seed", ylabel="episodic return",
             title=f"{args.env_id}: {args.method}{student}, {args.num_seeds} seeds")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    write_atomic(folder / "curves.png", image.getvalue())
    plt.close(figure)


# ======================================================================================================================
# Main
# ======================================================================================================================


def make_networks(env_id: str, network: Network, teacher: "Networks | None" = None) -> Networks:
    """Policy and value of this make, beside those of the teacher."""
    env, params = make_env(env_id)
    space = env.action_space(params)
    gaussian = bool(space.shape)
    policy = Policy(network, int(np.prod(space.shape)) if gaussian else int(space.n), gaussian)
    return Networks(policy, Value(network), *((None, None) if teacher is None else teacher[:2]))


def corrupt(params: dict, std: float, seed: int) -> dict:
    """An imperfect teacher (section 4.2): adds Gaussian noise of this standard deviation to every parameter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
    return tree.unflatten([x + std * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


def choose_device(device: str) -> None:
    """Settles where everything runs, before JAX first computes: on GPUs, or on each of its CPU cores apart."""
    with suppress(RuntimeError):  # within a program that has computed already, it is settled
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
        jax.config.update("jax_num_cpu_devices", len(cores))
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


def check_saved(args: Args, saved: dict, teacher_networks: Networks, given: Frozen | None) -> None:
    """Ends the program for a checkpoint that is none of this run, or whose teacher is not the one that is given now."""
    learns = saved.get("phase") == "student"

    def check(what, tree, args, networks, size):
        whole = jax.eval_shape(partial(init_state, args, networks), 0)
        expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), whole)
        if what == "teacher":
            expected = Frozen(expected.params, expected.obs_stats)
        check_arrays(what, serialization.from_state_dict(expected, tree), expected)

    try:
        counts = saved["updates"], saved["num_rows"], *map(float, saved["timing"].values())
        if saved["phase"] not in ("teacher", "student") or min(counts) < 0 or type(saved["num_rows"]) is not int:
            raise ValueError(f"{saved['phase']!r}, {counts}")
        phase = args if learns else teacher_args(args)
        if saved["updates"] not in range(0, phase.updates_per_part * phase.parts + 1, phase.updates_per_part):
            raise ValueError(f"no part of the {saved['phase']}'s training ends with update {saved['updates']}")
        if learns:
            networks, size = make_networks(args.env_id, args.network, teacher_networks), len(args.distill_coef)
            check("arrays", saved["state"], args, networks, size * args.num_seeds)
            check("teacher", saved["teacher"], teacher_args(args), teacher_networks, args.num_seeds)
        else:
            check("arrays", saved["state"], teacher_args(args), teacher_networks, args.num_seeds)
        known = as_frozen(saved["teacher"]) if learns else given
    except Exception as error:  # as in load_teacher
        fail(f"{args.resume} holds no state of this run: {type(error).__name__} {error}")
    if given is not None and not jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), known, given)):
        fail(f"the teacher is not the one that {args.resume} began with; put its file back, or begin another run")


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


def distill_coef_at(args: Args, distill_coef: float, fraction: np.ndarray) -> np.ndarray:
    """λ at these fractions of the run, from 0 at its first update to 1 at its last: constant, or linear."""
    final = distill_coef if args.distill_coef_final is None else args.distill_coef_final
    return distill_coef + fraction * (final - distill_coef)


def fit(
    args: Args, networks: Networks, teacher: Frozen | None, original: Frozen | None, saved: dict | None, folder: Path,
    log: Log, timing: dict[str, float],
) -> TrainState:
    """Trains the teachers, or with a teacher the students, from the start or a checkpoint; returns their states.

    The runs are all seeds under the first λ, then all under the next. teacher, original: as it teaches and as it was
    before noise, with a leading axis [S], one for each seed. timing: is brought up to date.
    """
    flags = plain_args(args)
    phase, args = ("teacher", teacher_args(args)) if teacher is None else ("student", args)
    runs = [(distill_coef, i) for distill_coef in args.distill_coef for i in range(args.num_seeds)]
    state = stack([init_state(args, networks, args.seed + i) for i in range(args.num_seeds)])
    if teacher is not None:
        state = state._replace(obs_stats=teacher.obs_stats)
    first, state = 0, jax.tree.map(lambda x: np.asarray(x)[[i for _, i in runs]], state)
    if saved and saved["phase"] == phase:
        first = saved["updates"] // args.updates_per_part
        state = serialization.from_state_dict(state, saved["state"])
    filled = fill_devices(len(runs))
    made = [runs[i] for i in filled]
    teachers = jax.tree.map(lambda x: np.asarray(x)[[i for _, i in made]], teacher)
    state = jax.tree.map(lambda x: np.asarray(x)[filled], state)
    state, teachers = jax.device_put((state, teachers), over_devices(len(made)))

    updates = args.updates_per_part
    part_steps = updates * args.batch_size
    began = compiled = time.time()
    before = timing["seconds"]

    def save(part: int) -> None:
        """Saves all that --resume needs after this part, and keeps the checkpoint before."""
        os.fsync(log.file.fileno())  # rows are on the disk before a checkpoint counts on them
        save_tree(folder / CHECKPOINTS[0], "checkpoint", {
            "script": SCRIPT, "args": flags, "phase": phase, "updates": part * updates, "num_rows": log.num_rows,
            "state": serialization.to_state_dict(jax.tree.map(lambda x: np.asarray(x)[: len(runs)], state)),
            "teacher": serialization.to_state_dict(original), "timing": timing}, keep=folder / CHECKPOINTS[1])

    if log.num_rows == 0:
        save(0)
    bar = tqdm(total=args.parts * part_steps * len(runs), initial=first * part_steps * len(runs), unit=" steps",
               desc=f"{args.env_id} {phase}", unit_scale=True, mininterval=0.5 if sys.stderr.isatty() else 60.0)
    with bar, catch_signals() as signals:
        for part in range(first + 1, args.parts + 1):
            fractions = np.arange((part - 1) * updates, part * updates) / max(1, args.parts * updates - 1)
            distill_coefs = np.stack([distill_coef_at(args, distill_coef, fractions) for distill_coef, _ in made])
            state, metrics = train(args, networks, teachers, state, jnp.asarray(distill_coefs, jnp.float32))
            metrics = jax.device_get(wait(metrics))
            check_finite(metrics, f"updates {(part - 1) * updates + 1} to {part * updates} of the {phase}", folder)

            now = time.time()
            if part == first + 1:  # which compiled: the speed is that of the parts after it, or of the run before
                known = timing.get(f"{phase}_SPS")
                timing[f"{phase}_SPS"], compiled = known or part_steps * len(runs) / (now - began), now
            else:
                timing[f"{phase}_SPS"] = (part - first - 1) * part_steps * len(runs) / (now - compiled)
            timing["seconds"] = before + now - began
            for run, (distill_coef, i) in enumerate(runs):
                about = {"phase": phase, "seed": args.seed + i, "distill_coef": distill_coef,
                         "global_step": part * part_steps, "seconds": round(timing["seconds"], 3),
                         "charts/SPS": timing[f"{phase}_SPS"]}
                log.write(about, {name: float(values[run]) for name, values in metrics.items()})
            bar.set_postfix_str(f"return {metrics['charts/episodic_return'].mean():.1f}", refresh=False)
            bar.update(part_steps * len(runs))
            save(part)
            if signals:
                stop(folder, signals[0])
    return jax.tree.map(lambda x: np.asarray(x)[: len(runs)], state)


def teacher_args(args: Args) -> Args:
    """The flags of the teachers' training: PPO is PPD with λ = 0 and no teacher."""
    return dataclasses.replace(
        args, method="ppd", student_size="same", student_hidden=None, distill_coef=(0.0,), distill_coef_final=None,
        total_timesteps=args.teacher_timesteps, ent_coef=args.teacher_ent_coef, num_envs=args.teacher_num_envs,
        num_steps=args.teacher_num_steps)


def finish(
    args: Args, networks: Networks, teachers: dict[str, Frozen], students: Frozen | None, folder: Path,
    timing: dict[str, float],
) -> dict[str, float]:
    """Evaluates teachers and students on the same games, writes all files, prints the outcome.

    teachers: "teacher" and, where there is noise, "corrupted_teacher", with a leading axis [S], as trained or read;
    students: with a leading axis [R]. Returns the means over seeds, the ratios and the timing.
    """
    results = {name: assess(args, networks.teacher, player) for name, player in teachers.items()}
    for i, distill_coef in enumerate(args.distill_coef if students else ()):
        chosen = slice(i * args.num_seeds, (i + 1) * args.num_seeds)
        name = "student" if len(args.distill_coef) == 1 else f"student_{distill_coef:g}"
        players = jax.tree.map(lambda x, chosen=chosen: x[chosen], students)
        results[name] = assess(args, networks.policy, players)
        if min(results["teacher"]["means"]) > 0:  # a ratio to what is negative would say nothing
            ratios = np.divide(results[name]["means"], results["teacher"]["means"])
            results[name]["ratio"] = float(np.exp(np.log(np.maximum(ratios, 1e-12)).mean()))
        save_models(args, networks.policy, "student", name, players, results[name], folder)
    if args.teacher is None:
        save_models(args, networks.teacher, "teacher", "teacher", teachers["teacher"], results["teacher"], folder)
    made, speed = (networks.policy, "student_SPS") if students else (networks.teacher, "teacher_SPS")
    write_json(folder / "results.json", describe_run(args, made.network) | timing | {"results": results})
    plot(folder, args, results)
    print(f"return: mean and 95% interval over {args.num_seeds} seeds, {args.eval_episodes} episodes each")
    for name, found in results.items():
        interval = "" if found["interval"] is None else f" ± {found['interval']:.1f}"
        ratio = f", {found['ratio']:.3f} of the teacher's" if "ratio" in found else ""
        print(f"{name.replace('_', ' '):<18} {found['mean']:>9.1f}{interval}{ratio}")
    print(f"{'steps per second':<18} {timing[speed]:>9.0f} ({speed[:7]}s, all seeds together)")
    print(f"{'files':<18} {folder}")
    return {name: found["mean"] for name, found in results.items()} | timing | {
        f"{name}_ratio": found["ratio"] for name, found in results.items() if "ratio" in found}


def main(args: Args) -> dict[str, float]:
    """Trains teachers, distils students and evaluates all of them; returns the single numbers of results.json."""
    choose_device(args.device)
    args, saved = restore(args)
    args = resolve(args)
    given = load_teachers(args)
    teacher_networks, teacher = given or (make_networks(args.env_id, teacher_args(args).network), None)
    if saved:
        check_saved(args, saved, teacher_networks, teacher)
    folder = make_folder(args)
    log = Log(folder, args, saved["num_rows"] if saved else 0)
    timing = saved["timing"] if saved else {"seconds": 0.0}

    with closing(log):
        if teacher is None and saved and saved["phase"] == "student":
            teacher = as_frozen(saved["teacher"])
        elif teacher is None:
            state = fit(args, teacher_networks, None, None, saved, folder, log, timing)
            teacher = Frozen(state.params, state.obs_stats)
        players = {"teacher": teacher}
        if args.teacher_noise_std:
            policies = [corrupt(jax.tree.map(lambda x, i=i: x[i], teacher.params["policy"]), args.teacher_noise_std,
                                args.teacher_noise_seed + i) for i in range(args.num_seeds)]
            players["corrupted_teacher"] = teacher._replace(params=teacher.params | {"policy": stack(policies)})
        networks, students = make_networks(args.env_id, args.network, teacher_networks), None
        if args.method != "ppo":
            taught = players.get("corrupted_teacher", teacher)
            state = fit(args, networks, taught, teacher, saved, folder, log, timing)
            students = Frozen(state.params, state.obs_stats)
    with catch_signals(partial(stop, folder)):
        return finish(args, networks, players, students, folder, timing)


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
