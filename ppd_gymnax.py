"""Proximal Policy Distillation (PPD) end to end in XLA: environments, teacher and student, for all seeds at once.

    python ppd_gymnax.py --env-id Breakout-MinAtar --num-seeds 5
    python ppd_gymnax.py --env-id Breakout-MinAtar --distill-coef 0.5 1 2 5         # a study of λ is one run

For every seed it trains a teacher by PPO, distils a student from it, and evaluates both. Each iteration collects a
rollout with the student, estimates advantages A, and over epochs of shuffled minibatches

    maximises  E[ min(r A, clip(r, 1-ε, 1+ε) A) + α entropy - λ KL(teacher || student) max(r, 1-ε) ]
    minimises  E[ (V(s) - R)² ]                              with r = π(a|s) / π_old(a|s), not detached.

PPO is the case without a teacher, so one `train` serves teacher and student. What makes PPD out of PPO is marked
`# PPD`. --method runs the paper's baselines instead: in student-distill the student acts, in teacher-distill its
teacher, and the student regresses. A seed learns the same whether it runs alone or among others, unless its teacher is
noisy: seeds of that noise are counted from --teacher-noise-seed on. Source: Spigler, "Proximal Policy Distillation",
TMLR 2025 (arXiv 2407.15134), Algorithms 1 to 3; networks and budgets are ours, small enough for a laptop. Tasks, by
gymnax's names: CartPole-v1, Acrobot-v1, MountainCar-v0, Pendulum-v1, Reacher-misc, MountainCarContinuous-v0, and
MinAtar's Asterix-, Breakout-, Freeway-, Seaquest- and SpaceInvaders-MinAtar.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2; python_version < '3.12'",
#   "jax==0.11.2; python_version >= '3.12'",
#   "distrax==0.1.9",
#   "flax==0.12.8",
#   "gymnasium==1.3.0",
#   "gymnax==1.0.1",
#   "matplotlib==3.11.2",
#   "numpy==2.4.6",
#   "optax==0.2.8",
#   "safetensors==0.8.0",
#   "scipy==1.17.1",
#   "tensorboardX==2.6.5",
#   "tfp-nightly==0.26.0.dev20261027",
#   "tqdm==4.67.1",
#   "tyro==1.0.17",
# ]
# ///

import csv
import dataclasses
import difflib
import importlib.metadata
import importlib.util
import io
import json
import os
import shlex
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

import distrax
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import scipy.stats
import tyro
from matplotlib.figure import Figure
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import trange

# ======================================================================================================================
# Arguments
# ======================================================================================================================


class Network(NamedTuple):
    """What a network is made of: convolutions, unless it is an MLP, then hidden layers."""

    kind: Literal["mlp", "minatar"]
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    activation: Literal["relu", "tanh"] = "relu"  # of the hidden layers; convolutions have ReLU
    value_hidden: tuple[int, ...] | None = None  # of the value network, where they are others


# Networks of each --student-size, in about the paper's proportions: 0.25, 1 and 4 times the parameters
NETWORKS = {
    "states": {"smaller": Network("mlp", (), (32, 32)), "same": Network("mlp", (), (64, 64)),
               "larger": Network("mlp", (), (128, 128))},
    "grid": {"smaller": Network("mlp", (), (16, 16)), "same": Network("mlp", (), (64, 64)),
             "larger": Network("mlp", (), (192, 192))},
    "cnn": {"smaller": Network("minatar", (8,), (64,)), "same": Network("minatar", (16,), (128,)),
            "larger": Network("minatar", (32,), (256,))},
}


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags."""

    # Task
    env_id: str = "Breakout-MinAtar"  # task by gymnax's name: of MinAtar, classic control, or Reacher-misc
    seed: int = 100  # first seed; a seed settles networks, actions, minibatches and environments
    num_seeds: int = 4  # seeds learned side by side: --seed and those after it
    total_timesteps: int | None = None  # environment steps of each student; by default a fifth of --teacher-timesteps
    cnn: bool = False  # a convolution and a hidden layer for MinAtar, in place of an MLP on the flattened grid
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where all of it runs; gpu is an error where there is none

    # Teacher
    teacher: str | None = None  # file for all seeds, or folder with teacher_{seed}.safetensors; by default trained here
    teacher_timesteps: int | None = None  # environment steps of a teacher trained here; or, by ppo, --total-timesteps
    teacher_num_envs: int | None = None  # environments while the teacher is trained; by default as many as PPD's
    teacher_num_steps: int = 128  # steps of each environment in a rollout while the teacher is trained
    teacher_ent_coef: float | None = None  # weight of its entropy bonus: 0.01, but 0.05 for Acrobot and MountainCar
    teacher_noise_std: float = 0.0  # standard deviation of noise on the teacher's parameters (σ; the paper's: 0.05)
    teacher_noise_seed: int = 0  # seed of that noise for the first seed, and so on

    # Student
    method: Literal["ppd", "student-distill", "teacher-distill", "ppo"] = "ppd"  # ppo: teachers, by their own flags
    student_size: Literal["smaller", "same", "larger"] = "larger"  # about 0.25, 1 or 4 times its teacher's parameters
    student_hidden: tuple[int, ...] | None = None  # widths of the student's hidden layers; overrides --student-size
    distill_coef: tuple[float, ...] = (1.0,)  # weights of the distillation term (λ), each a student; 0 is PPO
    distill_coef_final: float | None = None  # λ at the end of the run, reached linearly; by default constant
    distill_coef_decay: Literal["none", "return"] = "none"  # return: λ falls to 0 as the return rises to the teacher's
    pbt_interval: int | None = None  # every so many parts a seed's worst student copies its best, with a λ near its λ
    distill_weight: Literal["ratio", "detached"] = "ratio"  # max(r, 1-ε) with its gradient, the paper's, or without
    distill_future_coef: float = 0.0  # weight of a reward of -λ KL in the next state (β); 0 is the paper's
    teacher_mean_clip: bool = False  # clip the teacher's mean actions to their bounds in the KL divergence
    kl_direction: Literal["forward", "reverse"] = "forward"  # KL(teacher || student), or KL(student || teacher)

    # PPO (the baselines have no epochs, advantages or ratios)
    learning_rate: float | None = None  # step size of Adam, constant
    num_envs: int | None = None  # environments stepped in parallel (N): 64 on MinAtar, else 16; of the baselines 16
    num_steps: int | None = None  # steps of a student's rollout (T): 32 on MinAtar, else 64; of the baselines 5
    num_minibatches: int = 8  # minibatches of an epoch, a divisor of N*T
    update_epochs: int = 4  # passes over each rollout
    gamma: float = 0.99  # discount factor (γ)
    gae_lambda: float = 0.95  # decay of generalised advantage estimation
    clip_coef: float = 0.2  # clipping range of the probability ratio (ε)
    ent_coef: float = 0.0  # weight of the student's entropy bonus (α); the paper's: 0
    vf_coef: float = 0.5  # weight of the value loss, a plain mean squared error
    max_grad_norm: float = 0.5  # largest global norm of the gradient, policy and value together

    # Output
    run_dir: str | None = None  # folder; by default runs/{env_id}__{script}__{student_size}__{seed}__{unix_time}
    resume: str | None = None  # folder of a run to go on with, by its flags
    num_parts: int = 50  # parts of each training; after each come rows in progress.csv and a checkpoint
    eval_episodes: int = 100  # episodes of the final evaluation, with raw rewards; actions are sampled on MinAtar alone
    track: bool = False  # log to Weights & Biases as well (pip install wandb)
    wandb_project_name: str = "ppd"  # project to log to
    wandb_entity: str | None = None  # team to log to

    @property
    def seeds(self) -> range:
        """All seeds (S)."""
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def networks(self) -> dict[str, Network]:
        """The networks of policy and value by size."""
        return NETWORKS["cnn" if self.cnn else "grid" if is_grid(self.env_id) else "states"]

    @property
    def network(self) -> Network:
        """The student's network."""
        network = self.networks[self.student_size]
        return network if self.student_hidden is None else network._replace(hidden=self.student_hidden)

    @property
    def batch_size(self) -> int:
        """Samples of a rollout, N*T."""
        return self.num_envs * self.num_steps

    @property
    def updates_per_part(self) -> int:
        """Rollouts of one of the about --num-parts parts, each followed by one update."""
        return -(-self.total_timesteps // (self.batch_size * self.num_parts))

    @property
    def parts(self) -> int:
        """Parts of the training, no more than updates; the last may go a little further than asked."""
        return -(-self.total_timesteps // (self.batch_size * self.updates_per_part))


# Defaults of MinAtar and of other tasks; found by trying a few values, not the paper's
MINATAR = {"learning_rate": 2.5e-3, "num_envs": 64, "num_steps": 32, "teacher_timesteps": 400_000}
STATES = {"learning_rate": 1e-3, "num_envs": 16, "num_steps": 64, "teacher_timesteps": 500_000}
BASELINES = {"num_envs": 16, "num_steps": 5}  # a step for 80 samples; PPD: 64 on MinAtar, else 32; the paper's: 90
SPARSE = ("Acrobot-v1", "MountainCar-v0")  # rewards stay the same until chance has reached the goal
NEGATIVE = (*SPARSE, "Pendulum-v1")  # no reward is positive


# ======================================================================================================================
# Environments
# ======================================================================================================================


@cache
def make_env(env_id: str) -> tuple[Any, Any]:
    """Make the environment, which holds no state, and its parameters; end the program for a task that is unknown."""
    import gymnax  # not before: its import makes JAX settle its devices

    known = [name for name in gymnax.registered_envs if name != "MNISTBandit-bsuite"]  # that one downloads its images
    if env_id not in known:
        near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.3) or known
        fail(f"unknown gymnax task {env_id}; did you mean {', '.join(near)}?")
    return gymnax.make(env_id)


def is_grid(env_id: str) -> bool:
    """Tell whether observations are MinAtar's: a grid [10, 10, C] of zeros and ones."""
    return env_id.endswith("-MinAtar")


def observation_dim(env_id: str) -> int:
    """Return the length of a flattened observation (D)."""
    env, params = make_env(env_id)
    return int(np.prod(env.observation_space(params).shape))


def flatten(env_id: str, observations: jax.Array) -> jax.Array:
    """Flatten observations to [N, D]: states as float32; grids as bool, which takes a quarter of the memory."""
    return observations.reshape(len(observations), -1).astype(bool if is_grid(env_id) else jnp.float32)


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
    """Reset all environments."""
    env, params = make_env(env_id)
    observations, states = jax.vmap(env.reset, (0, None))(jax.random.split(key, num_envs), params)
    return World(states, flatten(env_id, observations), jnp.zeros(num_envs))


def step(env_id: str, world: World, actions: jax.Array, keys: jax.Array) -> tuple[World, Rollout]:
    """Step all environments; returns where they stand then, and a rollout of this step, without the axis T.

    actions: [N], or [N, A] of any size; what lies beyond the bounds is clipped here and nowhere else. gymnax resets an
    environment on the step that ends its episode. So there is no phantom step, but the observation after that step is
    the first of the next episode; the true final one is part of the rollout.
    """
    env, params = make_env(env_id)
    space = env.action_space(params)
    clipped = jnp.clip(actions, space.low, space.high).reshape(-1, *space.shape) if space.shape else actions
    observations, states, rewards, terminations, truncations, info = jax.vmap(env.step, (0, 0, 0, None))(
        keys, world.states, clipped, params)
    returns = world.returns + rewards
    after = World(states, flatten(env_id, observations), jnp.where(terminations | truncations, 0.0, returns))
    rewards, terminations, truncations = (x.astype(jnp.float32) for x in (rewards, terminations, truncations))
    final_observations = flatten(env_id, info["final_observation"])
    return after, Rollout(world.observations, actions, rewards, terminations, truncations, final_observations, returns)


# ======================================================================================================================
# Networks
# ======================================================================================================================


ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh}  # of hidden layers, by their name in a model file


def torso(network: Network, x: jax.Array) -> jax.Array:
    """Compute features [..., F] of flattened observations [..., D], inside a module's __call__, which owns the layers.

    An MLP, or 3x3 convolutions and then an MLP (Young and Tian 2019). A convolution is a matrix product of patches,
    because the gradient of XLA's own is ten times slower within lax.scan on a CPU.
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
        x = ACTIVATIONS[network.activation](dense(width)(x))
    return x


class Policy(nn.Module):
    """Categorical policy, or a Gaussian one, whose log standard deviation does not depend on the state."""

    network: Network
    action_dim: int
    gaussian: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Return logits [..., A], or mean and log standard deviation, both [..., A], for normalised x [..., D]."""
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
        """Return values [...] for normalised x [..., D]."""
        hidden = self.network.hidden if self.network.value_hidden is None else self.network.value_hidden
        x = torso(self.network._replace(hidden=hidden), x)
        return nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(x).squeeze(-1)


def distribution(outputs: jax.Array | tuple[jax.Array, jax.Array]) -> distrax.Distribution:
    """Return the action distribution for a policy's outputs: logits, or mean and log standard deviation; [..., A]."""
    if isinstance(outputs, tuple):
        mean, log_std = outputs
        return distrax.MultivariateNormalDiag(mean, jnp.exp(log_std))
    return distrax.Categorical(logits=outputs)


# ======================================================================================================================
# Mathematics
# ======================================================================================================================


class Stats(NamedTuple):
    """Running mean and variance, and the number of samples they are computed from."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def update_stats(stats: Stats, samples: jax.Array) -> Stats:
    """Add samples [B, ...] (Chan et al. 1979, pairwise update)."""
    n = len(samples)
    mean, var = samples.mean(0), samples.var(0)
    count = stats.count + n
    delta = mean - stats.mean
    merged = (stats.var * stats.count + var * n + delta**2 * stats.count * n / count) / count
    return Stats(stats.mean + delta * n / count, merged, count)


def normalize(observations: jax.Array, stats: Stats | None) -> jax.Array:
    """Subtract the running mean from states [..., D], divide by the running standard deviation, clip to ±10.

    A grid has no statistics, and stays as it is.
    """
    if stats is None:
        return observations
    return jnp.clip((observations - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)


def discount_forward(
    rewards: jax.Array, dones: jax.Array, carried: jax.Array, gamma: float
) -> tuple[jax.Array, jax.Array]:
    """Compute the discounted sum of the rewards so far, g_t = γ g_{t-1} + r_t; its deviation scales the rewards.

    rewards, dones: [T, N]; carried: [N], from the rollout before. Each episode starts at 0. Returns what to carry to
    the next rollout, [N], and all g, [T, N].
    """

    def forward(g, x):
        reward, done = x
        g = gamma * g + reward
        return g * (1.0 - done), g

    return jax.lax.scan(forward, carried, (rewards, dones), unroll=16)


def compute_gae(
    rewards: jax.Array, values: jax.Array, next_values: jax.Array, terminations: jax.Array, truncations: jax.Array,
    gamma: float, gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
    """Compute advantages and returns, both [T, N], by generalised advantage estimation (Schulman et al. 2016).

    All arrays: [T, N]; next_values: of the observation that each step led to, also where a new episode began instead.
    A terminated step does not bootstrap, a truncated one does; one that is both is terminated. Both cut the trace.
    """
    dones = jnp.maximum(terminations, truncations)
    deltas = rewards + gamma * next_values * (1.0 - terminations) - values

    def backward(advantage, x):
        delta, done = x
        advantage = delta + gamma * gae_lambda * (1.0 - done) * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(backward, jnp.zeros_like(deltas[0]), (deltas, dones), reverse=True, unroll=16)
    return advantages, advantages + values


def standardize(advantages: jax.Array) -> jax.Array:
    """Bring advantages [B] to mean 0 and variance 1."""
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


class Batch(NamedTuple):
    """Samples of a rollout; the leading axis is [B], or none for a single sample."""

    observations: jax.Array  # [B, D], normalised
    actions: jax.Array  # [B] or [B, A]
    log_probs: jax.Array  # [B], under the policy that acted
    advantages: jax.Array  # [B]
    returns: jax.Array  # [B]
    teacher: Any  # PPD: the teacher policy's outputs, [B, A] (each)
    future: jax.Array | None = None  # PPD: [B], returns of the KL divergence ahead, as a penalty


def divergence(teacher: distrax.Distribution, pi: distrax.Distribution, kl_direction: str) -> jax.Array:
    """Return KL(teacher || pi), forward, or KL(pi || teacher), reverse, in closed form."""
    return teacher.kl_divergence(pi) if kl_direction == "forward" else pi.kl_divergence(teacher)


def ppd_terms(
    outputs: Any, value: jax.Array, sample: Batch, clip_coef: float, kl_direction: str, distill_weight: str
) -> dict[str, jax.Array]:
    """Compute the terms of one sample's loss, as scalars (Algorithm 1).

    outputs: of the student's policy, [A] each; value: of the student, []; sample: its advantage is standardised.
    """
    pi, teacher = distribution(outputs), distribution(sample.teacher)
    log_ratio = pi.log_prob(sample.actions) - sample.log_probs
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_coef, 1.0 + clip_coef)
    kl = divergence(teacher, pi, kl_direction)  # PPD
    weight = jnp.maximum(ratio, 1.0 - clip_coef)  # PPD: the paper's has a gradient, which flows through both factors
    weight = jax.lax.stop_gradient(weight) if distill_weight == "detached" else weight
    return {
        "policy_loss": -jnp.minimum(ratio * sample.advantages, clipped * sample.advantages),
        "value_loss": (value - sample.returns) ** 2,
        "entropy": pi.entropy(),
        "approx_kl": ratio - 1.0 - log_ratio,
        "clipfrac": (jnp.abs(ratio - 1.0) > clip_coef).astype(jnp.float32),
        "distill_loss": kl * weight,  # PPD
        "teacher_kl": kl,
    }


def ppd_loss(
    outputs: Any, values: jax.Array, batch: Batch, distill_coef: float | None, clip_coef: float, ent_coef: float,
    vf_coef: float, kl_direction: str, distill_weight: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss of a minibatch and its terms, averaged over the samples.

    outputs: of the student's policy, [B, A] (each); values: of the student, [B]; distill_coef: λ at this step, or None
    for PPO, which has no teacher.
    """
    each = partial(ppd_terms, clip_coef=clip_coef, kl_direction=kl_direction, distill_weight=distill_weight)
    terms = jax.vmap(each)(outputs, values, batch)
    terms = jax.tree.map(jnp.mean, terms)
    loss = terms["policy_loss"] + vf_coef * terms["value_loss"] - ent_coef * terms["entropy"]
    if distill_coef is not None:  # PPD
        loss += distill_coef * terms["distill_loss"]
    return loss, {"loss": loss} | terms


def distill_loss(
    outputs: Any, values: jax.Array, teacher_outputs: Any, teacher_values: jax.Array, ent_coef: float, vf_coef: float,
    kl_direction: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the baselines' loss of a rollout (Algorithms 2 and 3) and its terms, averaged over the samples.

    outputs, teacher_outputs: of the two policies, [B, A] (each); values, teacher_values: [B].
    """
    pi, teacher = distribution(outputs), distribution(teacher_outputs)
    kl = divergence(teacher, pi, kl_direction)
    terms = {"teacher_kl": kl.mean(), "entropy": pi.entropy().mean(),
             "value_loss": ((values - teacher_values) ** 2).mean()}
    loss = terms["teacher_kl"] - ent_coef * terms["entropy"] + vf_coef * terms["value_loss"]
    return loss, {"loss": loss} | terms


def corrupt(params: dict, std: float, seed: int) -> dict:
    """Make an imperfect teacher (section 4.2): add Gaussian noise of this standard deviation to every parameter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
    return tree.unflatten([x + std * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


def imperfect(args: Args, teacher: dict) -> dict:
    """Return the teachers [S] as they teach: with --teacher-noise-std, add noise to their policies."""
    if args.teacher_noise_std == 0:
        return teacher
    policies = [corrupt(pick(teacher["policy"], i), args.teacher_noise_std, args.teacher_noise_seed + i)
                for i in range(args.num_seeds)]
    return teacher | {"policy": stack(policies)}


def distill_coef_at(args: Args, distill_coef: np.ndarray, fraction: np.ndarray, reached: np.ndarray) -> np.ndarray:
    """Return λ at these fractions of the run, from 0 at its first update to 1 at its last: constant, linear or falling.

    reached: the student's recent return, as a fraction of its teacher's.
    """
    if args.distill_coef_decay == "return":
        return distill_coef * np.clip(1.0 - reached, 0.0, 1.0) * np.ones_like(fraction)
    final = distill_coef if args.distill_coef_final is None else args.distill_coef_final
    return distill_coef + fraction.astype(np.float32) * (final - distill_coef)


# ======================================================================================================================
# Jitted steps
# ======================================================================================================================


class Networks(NamedTuple):
    """The flax modules; they hold no parameters."""

    policy: Policy
    value: Value
    teacher: Policy | None
    teacher_value: Value | None


NO_RETURN = np.float32(-1e9)  # of a run in which no episode has ended: finite, as all of a checkpoint must be


class TrainState(NamedTuple):
    """All that learning changes, of one run or, with a leading axis [R], of several."""

    params: dict  # {"policy": ..., "value": ...}, and "future" with --distill-future-coef
    opt_state: optax.OptState
    obs_stats: Stats | None  # of the states; a student's are its teacher's, and stay as they are
    return_stats: Stats  # of the discounted returns, scalars
    discounted: jax.Array  # [N]: discounted return of each running episode
    world: World
    key: jax.Array
    distill_coef: jax.Array  # λ of this run
    recent: jax.Array  # mean return of the episodes of the last part that had any; below all returns before that
    fresh: jax.Array  # bool: such a part has come since the population's last exchange


def make_networks(env_id: str, network: Network, teacher: Network | None = None) -> Networks:
    """Make the policy and the value of a task, beside those of the teacher."""
    env, params = make_env(env_id)
    space = env.action_space(params)
    gaussian = bool(space.shape)
    action_dim = int(np.prod(space.shape)) if gaussian else int(space.n)
    known = (Policy(teacher, action_dim, gaussian), Value(teacher)) if teacher else (None, None)
    return Networks(Policy(network, action_dim, gaussian), Value(network), *known)


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Return Adam after clipping of the gradient's global norm; that of the values of the KL divergence ahead apart.

    On flat vectors: fewer and larger operations.
    """
    adam = optax.flatten(
        optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(args.learning_rate, eps=1e-5)))
    if not args.distill_future_coef:
        return adam
    return optax.partition({"own": adam, "future": adam}, {"policy": "own", "value": "own", "future": "future"})


def init_state(args: Args, networks: Networks, seed: int) -> TrainState:
    """Initialise a teacher, or a student, from the seed alone."""
    key = jax.random.PRNGKey(seed)
    key = key if networks.teacher is None else jax.random.fold_in(key, 1)  # not the weights its teacher began with
    key, policy_key, value_key, reset_key = jax.random.split(key, 4)
    x = jnp.zeros((1, observation_dim(args.env_id)))
    params = {"policy": networks.policy.init(policy_key, x), "value": networks.value.init(value_key, x)}
    if args.distill_future_coef:  # PPD: values of the KL divergence ahead
        params["future"] = networks.value.init(jax.random.fold_in(value_key, 1), x)
    obs_stats = None if is_grid(args.env_id) else Stats(jnp.zeros_like(x[0]), jnp.ones_like(x[0]), jnp.float32(1e-4))
    return_stats = Stats(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(1e-4))
    world = jax.jit(reset, static_argnums=(0, 1))(args.env_id, args.num_envs, reset_key)
    return TrainState(params, make_optimizer(args).init(params), obs_stats, return_stats, jnp.zeros(args.num_envs),
                      world, key, distill_coef=jnp.float32(0.0), recent=jnp.float32(NO_RETURN), fresh=jnp.bool_(False))


def stack(trees: list) -> Any:
    """Put trees of one shape side by side, along a new leading axis.

    Networks are initialised one by one and then stacked. vmap would make one batched orthogonal initialisation of it,
    and that can hang for ever on two cores (seen with JAX 0.10).
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def pick(tree: Any, which: Any) -> Any:
    """Return these entries of the leading axis of all arrays of a tree; the inverse of `stack` for a single number."""
    return jax.tree.map(lambda x: x[which], tree)


def model(state: TrainState) -> dict:
    """Return what a model file holds: the parameters, and "obs_stats"."""
    return state.params | {"obs_stats": state.obs_stats}


def collect(args: Args, policy: Policy, params: dict, stats: Stats | None, world: World, key: jax.Array) -> tuple:
    """Step the environments T times with sampled actions; returns where they stand, and the rollout.

    One call draws all random numbers ahead, because drawn step by step they cost as much as the network.
    """
    noise_key, step_key = jax.random.split(key)
    sizes = args.num_steps, args.num_envs
    draw = jax.random.normal if policy.gaussian else jax.random.gumbel
    noises = draw(noise_key, (*sizes, policy.action_dim))

    def advance(world, x):
        noise, keys = x
        outputs = policy.apply(params, normalize(world.observations, stats))
        actions = outputs[0] + jnp.exp(outputs[1]) * noise if policy.gaussian else jnp.argmax(outputs + noise, axis=-1)
        return step(args.env_id, world, actions, keys)

    return jax.lax.scan(advance, world, (noises, jax.random.split(step_key, sizes)))


def gradient_step(args: Args, loss_fn: Callable, params: dict, opt_state: optax.OptState) -> tuple:
    """Follow the gradient of loss_fn(params) once; returns parameters and optimiser state, and the loss's terms."""
    grads, metrics = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = make_optimizer(args).update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    metrics |= {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    return (params, opt_state), metrics


def teach(args: Args, networks: Networks, teacher: dict, observations: jax.Array) -> Any:
    """Return the teacher policy's outputs, [..., A] (each), for normalised observations [..., D]."""
    outputs = networks.teacher.apply(teacher["policy"], observations)
    if args.teacher_mean_clip:
        env, params = make_env(args.env_id)
        space = env.action_space(params)
        return jnp.clip(outputs[0], space.low, space.high), outputs[1]
    return outputs


def learn_ppd(
    args: Args, networks: Networks, teacher: dict | None, state: TrainState, rollout: Rollout, distill_coef: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Learn by PPD, or by PPO where there is no teacher: epochs of minibatches from one rollout."""
    # The parameters are still those of the rollout, so its values and log-probabilities are one batched call
    observations = normalize(rollout.observations, state.obs_stats)
    values = networks.value.apply(state.params["value"], observations)
    next_observations = normalize(rollout.final_observations, state.obs_stats)
    next_values = networks.value.apply(state.params["value"], next_observations)
    outputs = networks.policy.apply(state.params["policy"], observations)
    log_probs = distribution(outputs).log_prob(rollout.actions)
    if teacher is None:
        teacher_outputs, distill_coef = outputs, None  # PPO, whose loss reads neither
    else:
        teacher_outputs = teach(args, networks, teacher, observations)  # PPD: once a rollout, for all epochs

    dones = jnp.maximum(rollout.terminations, rollout.truncations)
    gae = partial(compute_gae, terminations=rollout.terminations, truncations=rollout.truncations, gamma=args.gamma,
                  gae_lambda=args.gae_lambda)
    discounted, sums = discount_forward(rollout.rewards, dones, state.discounted, args.gamma)
    return_stats = update_stats(state.return_stats, sums.reshape(-1))
    rewards = jnp.clip(rollout.rewards / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)
    advantages, returns = gae(rewards, values, next_values)
    future = None
    if args.distill_future_coef:  # PPD: the later KL divergence that an action leads to is a reward with its own values
        pi = distribution(networks.policy.apply(state.params["policy"], next_observations))
        kl = divergence(distribution(teach(args, networks, teacher, next_observations)), pi, args.kl_direction)
        horizon = 1.0 / max(1.0 - args.gamma, 1e-3)  # steps; the network's values are means over so many, not sums
        future_values = horizon * networks.value.apply(state.params["future"], observations)
        next_future_values = horizon * networks.value.apply(state.params["future"], next_observations)
        ahead, future = gae(-kl * (1.0 - rollout.terminations), future_values, next_future_values)
        advantages += args.distill_future_coef * distill_coef * ahead
        future /= horizon

    batch = Batch(observations, rollout.actions, log_probs, advantages, returns, teacher_outputs, future)
    batch = jax.tree.map(lambda x: x.reshape(args.batch_size, *x.shape[2:]), batch)

    def train_minibatch(carry, indices):
        minibatch = pick(batch, indices)
        minibatch = minibatch._replace(advantages=standardize(minibatch.advantages))

        def loss_fn(params):
            outputs = networks.policy.apply(params["policy"], minibatch.observations)
            values = networks.value.apply(params["value"], minibatch.observations)
            loss, metrics = ppd_loss(outputs, values, minibatch, distill_coef, args.clip_coef, args.ent_coef,
                                     args.vf_coef, args.kl_direction, args.distill_weight)
            if args.distill_future_coef:  # PPD
                errors = networks.value.apply(params["future"], minibatch.observations) - minibatch.future
                metrics["future_loss"] = (errors**2).mean()
                metrics["loss"] = loss = loss + args.vf_coef * metrics["future_loss"]
            return loss, metrics

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
    state = state._replace(params=params, opt_state=opt_state, obs_stats=obs_stats, return_stats=return_stats,
                           discounted=discounted, key=key)
    if teacher is None:
        del metrics["distill_loss"], metrics["teacher_kl"]
    return state, jax.tree.map(jnp.mean, metrics)


def learn_by_regression(
    args: Args, networks: Networks, teacher: dict, state: TrainState, rollout: Rollout
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Learn as the baselines do: one gradient step on a whole rollout, towards the teacher's policy and value."""
    observations = normalize(rollout.observations.reshape(args.batch_size, -1), state.obs_stats)
    teacher_outputs = networks.teacher.apply(teacher["policy"], observations)
    teacher_values = networks.teacher_value.apply(teacher["value"], observations)

    def loss_fn(params):
        outputs = networks.policy.apply(params["policy"], observations)
        values = networks.value.apply(params["value"], observations)
        return distill_loss(outputs, values, teacher_outputs, teacher_values, args.ent_coef, args.vf_coef,
                            args.kl_direction)

    (params, opt_state), metrics = gradient_step(args, loss_fn, state.params, state.opt_state)
    return state._replace(params=params, opt_state=opt_state), metrics


def update(
    args: Args, networks: Networks, teacher: dict | None, state: TrainState, distill_coef: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Collect a rollout and learn from it; returns the new state and the metrics."""
    key, rollout_key = jax.random.split(state.key)
    policy, params = networks.policy, state.params
    if args.method == "teacher-distill":
        policy, params = networks.teacher, teacher
    world, rollout = collect(args, policy, params["policy"], state.obs_stats, state.world, rollout_key)
    state = state._replace(world=world, key=key)
    if args.method == "ppd":
        state, metrics = learn_ppd(args, networks, teacher, state, rollout, distill_coef)
    else:
        state, metrics = learn_by_regression(args, networks, teacher, state, rollout)
    dones = jnp.maximum(rollout.terminations, rollout.truncations)
    return state, {"episodes": dones.sum(), "returns": (rollout.returns * dones).sum()} | metrics


def over_devices(num_runs: int) -> jax.sharding.NamedSharding:
    """Return how runs are divided over the devices, GPUs or cores of a CPU: as many on each, no run on several."""
    size = max(n for n in range(1, len(jax.devices()) + 1) if num_runs % n == 0)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:size]), "runs")
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("runs"))


def spread(tree: Any) -> Any:
    """Put runs [R] on the devices, the last repeated until all have as many: 0 1 2, 3 4 4 for 5 runs on 2 devices."""
    num_runs = len(jax.tree.leaves(tree)[0])
    size = num_runs + -num_runs % min(num_runs, len(jax.devices()))
    return jax.device_put(pick(tree, np.minimum(np.arange(size), num_runs - 1)), over_devices(size))


def side_by_side(one_run: Callable, *trees: Any) -> Any:
    """Compute one_run(*trees) for every entry of the leading axis [R]: vectorised, and spread over the devices."""
    place = over_devices(len(jax.tree.leaves(trees)[0]))
    return jax.shard_map(
        jax.vmap(one_run), mesh=place.mesh, in_specs=place.spec, out_specs=place.spec, check_vma=False)(*trees)


@partial(jax.jit, static_argnames=("args", "networks"), donate_argnames="state")
def train(
    args: Args, networks: Networks, teacher: dict | None, state: TrainState, distill_coefs: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Do K updates of each of R runs; returns the new states, and the means of the updates' metrics, [R] each.

    teacher, state: with a leading axis [R]; without a teacher it is PPO. distill_coefs: [R, K], λ at each update.
    """

    def one_run(teacher, state, distill_coefs):
        state, metrics = jax.lax.scan(partial(update, args, networks, teacher), state, distill_coefs)
        episodes, returns = metrics.pop("episodes").sum(), metrics.pop("returns").sum()
        return state, {"charts/episodic_return": returns / episodes} | {  # NaN where no episode has ended
            f"losses/{name}": x.mean() for name, x in metrics.items()}

    return side_by_side(one_run, teacher, state, distill_coefs)


def exploit(args: Args, state: TrainState, part: int) -> TrainState:
    """Let each seed's worst student go on from its best, with 0.8 or 1.25 times the λ of the best.

    Not where no episode of the seed has ended since the last time: there is nothing new to go by. state: [R], NumPy
    arrays. Source: population based training, as in Schmitt et al. 2018.
    """
    runs = np.arange(len(state.recent)).reshape(-1, args.num_seeds)
    best, worst = state.recent[runs].argmax(0), state.recent[runs].argmin(0)
    moved = np.flatnonzero(state.fresh[runs].any(0) & (best != worst))  # seeds
    coins = [jax.random.bernoulli(jax.random.fold_in(jax.random.PRNGKey(seed), part)) for seed in args.seeds]
    parents, factors = runs.copy(), np.ones(runs.shape, np.float32)
    parents[worst[moved], moved] = runs[best[moved], moved]
    factors[worst[moved], moved] = np.where(coins, 1.25, 0.8)[moved]
    parent = pick(state, parents.ravel())
    return state._replace(params=parent.params, opt_state=parent.opt_state, return_stats=parent.return_stats,
                          distill_coef=parent.distill_coef * factors.ravel(), recent=parent.recent,
                          fresh=np.zeros_like(state.fresh))


# ======================================================================================================================
# Files
# ======================================================================================================================

SCRIPT = Path(__file__).stem
FORMAT = "proximal-policy-distillation 3"
BEGIN = {"bytes": 0, "rows": 0, "teacher_step": 0, "student_step": 0, "teacher_SPS": 0.0, "student_SPS": 0.0,
         "seconds": 0.0}  # what is known of the rows of progress.csv
# Of progress.csv; a teacher's training has no distillation losses, the baselines no PPO's, and their cells stay empty
COLUMNS = ["phase", "seed", "distill_coef", "global_step", "seconds", "charts/SPS", "charts/episodic_return",
           "charts/distill_coef"] + [
    f"losses/{name}" for name in ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac",
                                  "distill_loss", "teacher_kl", "future_loss", "grad_norm", "param_norm")]


def write_atomic(path: Path, content: bytes | dict) -> None:
    """Write a file, a dict as JSON, whole or not at all, also when the process is killed or the power fails."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with open(temporary, "wb") as file:
            file.write(content if isinstance(content, bytes) else (json.dumps(content, indent=2) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name must reach the disk as well
    os.close(folder)


def save_file(path: Path, about: dict, tree: Any) -> None:
    """Write a model or a checkpoint: arrays by their path in the tree, and `about` as JSON in the header."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    arrays = {jax.tree_util.keystr(where, simple=True, separator="/"): np.asarray(x) for where, x in leaves}
    header = {"about": json.dumps({"format": FORMAT} | about)}
    header["crc32"] = str(zlib.crc32(safetensors.numpy.save(arrays, header)))
    write_atomic(path, safetensors.numpy.save(arrays, header))


def read_file(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Read `about` and the arrays of a file; ValueError if it is missing, cut short, damaged or something else."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            header = {"about": "{}", "crc32": ""} | (file.metadata() or {})
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        about, crc32 = json.loads(header["about"]), header.pop("crc32")
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is {about.get('format')!r:.50}, not {FORMAT!r}")
        if str(zlib.crc32(safetensors.numpy.save(arrays, header))) != crc32:
            raise ValueError("it is damaged: its checksum does not match")
    except Exception as error:  # of many kinds, for content of any kind
        hint = "; .msgpack files are of an older version" if str(path).endswith(".msgpack") else ""
        raise ValueError(f"cannot read {path}: {error}{hint}") from None
    return about, arrays


def fill(template: Any, arrays: dict[str, np.ndarray], prefix: str) -> Any:
    """Return the template's tree with a file's arrays; ValueError unless they are finite, of its shapes and types."""

    def leaf(where, x):
        name = f"{prefix}/{jax.tree_util.keystr(where, simple=True, separator='/')}"
        found = arrays.get(name)
        if found is None or (found.shape, found.dtype) != (x.shape, x.dtype) or not np.isfinite(found).all():
            raise ValueError(f"its {name} is not finite and of the shape {x.shape}")
        return jnp.array(found)

    return jax.tree_util.tree_map_with_path(leaf, template)


@contextmanager
def checked(what: str) -> Iterator[None]:
    """End the program in one line where the content of a file is not what it says."""
    try:
        yield
    except Exception as error:  # of many kinds, for content of any kind
        fail(f"{what}: {type(error).__name__} {error}")


class Run:
    """The folder of a run: args.json, progress.csv, TensorBoard's events and checkpoints; --track adds W&B."""

    def __init__(self, args: Args, saved: dict | None):
        """Begin, or go on from a checkpoint: what was logged after it is dropped, since it will be made again."""
        name = f"{args.env_id}__{SCRIPT}__{args.student_size}__{args.seed}__{int(time.time())}"
        self.folder = Path(args.resume or args.run_dir or f"runs/{name}")
        self.logged = dict(saved["logged"] if saved else BEGIN)
        self.tracker = None
        if args.track:  # before the folder, which is not left behind if that fails
            with checked("--track"):
                import wandb

                self.tracker = wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=self.folder.name,
                    config=vars(args), id=self.logged.get("wandb_id"), resume="allow")
                self.logged["wandb_id"] = self.tracker.id
                self.tracker.define_metric("*", step_metric="global_step")
        try:
            self.folder.mkdir(parents=True, exist_ok=args.resume is not None)
        except FileExistsError:  # another run began in this second
            self.folder = Path(f"{self.folder}_{os.getpid()}")
            self.folder.mkdir()
        except OSError as error:
            fail(f"cannot create {self.folder}: {error.strerror}")
        typed = shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
        self.about = {
            "env_id": args.env_id, "script": SCRIPT, "command": saved.get("command") if saved else typed,
            "args": vars(args) | {"run_dir": None, "resume": None},  # folders say nothing on another machine
            "versions": {"python": sys.version.split()[0], "jax": jax.__version__, "flax": flax.__version__,
                         "gymnax": importlib.metadata.version("gymnax"), "device": jax.devices()[0].device_kind}}
        write_atomic(self.folder / "args.json", vars(args) | {"versions": self.about["versions"]})

        self.began, self.compiled = time.time() - self.logged["seconds"], {}
        self.file = open(self.folder / "progress.csv", "a", newline="")
        self.file.seek(self.file.truncate(min(self.file.tell(), self.logged["bytes"])))
        self.events = {}
        for phase in ("teacher", "student"):  # a folder for each: START drops all later steps of its folder
            folder, first = self.folder / "tfevents" / phase, self.logged[f"{phase}_step"] + 1
            folder.mkdir(parents=True, exist_ok=True)
            # Not by SummaryWriter, whose thread would wait for ever where the disk is full
            self.events[phase] = EventsWriter(str(folder / "events"), f".{os.getpid()}")
            self.events[phase].write_event(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def log(self, phase: str, global_step: int, runs: list[tuple[int, float]], metrics: dict[str, np.ndarray]) -> None:
        """Log the part of a phase that ended at this environment step, with a row for each run.

        runs: seed and λ of each; metrics: [R]. The speed is that of all runs together; it leaves out the first part,
        which compiles.
        """
        seconds, sps = time.time() - self.began, self.logged[f"{phase}_SPS"]
        first, since = self.compiled.setdefault(phase, (global_step, seconds))
        if global_step > first:
            sps = (global_step - first) * len(runs) / (seconds - since)
        elif not sps:
            sps = (global_step - self.logged[f"{phase}_step"]) * len(runs) / (seconds - self.logged["seconds"])
        table, tracked = csv.DictWriter(self.file, COLUMNS), {"global_step": global_step}
        if self.file.tell() == 0:
            table.writeheader()
        for i, (seed, distill_coef) in enumerate(runs):
            values = {name: float(x[i]) for name, x in metrics.items()}
            table.writerow({"phase": phase, "seed": seed, "distill_coef": distill_coef, "global_step": global_step,
                            "seconds": round(seconds, 3), "charts/SPS": sps} | values)
            tag = f"{phase}_{seed}_lambda_{distill_coef:g}"
            tracked |= {f"{tag}/{name}": x for name, x in values.items() if np.isfinite(x)}  # no return before an end
        self.file.flush()
        for name, x in tracked.items():
            self.events[phase].write_event(Event(wall_time=time.time(), step=global_step, summary=scalar(name, x)))
        self.events[phase].flush()
        rows = self.logged["rows"] + len(runs)
        if self.tracker is not None:
            self.tracker.log(tracked, step=rows, commit=True)  # W&B leaves out a step that it has had
        self.logged |= {"bytes": self.file.tell(), "rows": rows, f"{phase}_step": global_step, f"{phase}_SPS": sps,
                        "seconds": seconds}

    def save(self, phase: str, updates: int, networks: Networks, state: TrainState, teacher: dict | None) -> None:
        """Save all that --resume needs; two files stay. teacher: before noise [S], None while teachers are trained."""
        os.fsync(self.file.fileno())  # rows are on the disk before a checkpoint counts on them
        teacher_network = (networks.teacher or networks.policy).network._asdict()
        about = {"phase": phase, "updates": updates, "logged": self.logged, "teacher_network": teacher_network}
        path = self.folder / f"checkpoint_{self.logged['rows']:012d}.safetensors"
        save_file(path, self.about | about, {"state": state, "teacher": teacher})
        for old in sorted(self.folder.glob("checkpoint_*.safetensors"))[:-2]:
            old.unlink()

    def on_signal(self, number: int, frame: Any) -> None:
        """Take SIGINT or SIGTERM: training ends its part, and is saved; evaluation ends at once. So does all at two."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.signal = number
        if self.file.closed:  # nothing is learned any more
            self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """End the program if a signal has come."""
        if self.signal is not None:
            resume = shlex.join(["python", f"{SCRIPT}.py", "--resume", str(self.folder)])
            print(f"\ninterrupted; go on with: {resume}", file=sys.stderr)
            raise SystemExit(128 + self.signal)

    def close(self) -> None:
        """Close all files."""
        self.file.close()
        for events in self.events.values():
            events.close()
        if self.tracker is not None:
            self.tracker.finish()


def load_checkpoint(folder: str) -> tuple[dict, dict[str, np.ndarray]]:
    """Read a run's newest whole checkpoint: what it says, and its arrays; end the program if there is none."""
    problems = ""
    for path in sorted(Path(folder).glob("checkpoint_*.safetensors"), reverse=True):
        try:
            about, arrays = read_file(path)
        except ValueError as error:
            problems += f"{error}; "
            continue
        if about.get("script") != SCRIPT:
            fail(f"{folder} is a run of {about.get('script')}.py; go on with that script")
        with checked(f"{folder} was made by another version of {SCRIPT}.py"):
            known = about["logged"] | {"updates": about["updates"]}
            for name, begin in (BEGIN | {"updates": 0}).items():
                if not isinstance(known[name], int | type(begin)) or not 0 <= known[name] < 10**15:
                    raise ValueError(f"its {name} is {known[name]}")
        return about | {"note": f"{problems}going on from {path}"}, arrays
    fail(f"{problems}{folder} holds no checkpoint to go on from")


def read_network(found: dict) -> Network:
    """Return the network that a file describes; raises an exception of any kind if it does not describe one."""
    found = Network._field_defaults | found  # older files say less
    network = Network(**{name: tuple(found[name]) if isinstance(found[name], list) else found[name]
                         for name in Network._fields})
    if network.kind not in ("mlp", "minatar") or len(network.channels) + len(network.hidden) > MAX_LAYERS:
        raise ValueError(f"its network, {network.kind}, has more than {MAX_LAYERS} layers or is none of gymnax's tasks")
    return network


def load_teachers(args: Args) -> tuple[Network, dict | None]:
    """Read --teacher, a file or a folder with one for each seed; returns the teachers' network and parameters [S].

    Without --teacher the parameters are None: they are to be trained here. End the program for files that do not fit.
    """
    if args.teacher is None:
        return teacher_args(args).network, None
    paths, found = [args.teacher], []
    if os.path.isdir(args.teacher):
        paths = [os.path.join(args.teacher, f"teacher_{seed}.safetensors") for seed in args.seeds]
    for path in paths:
        with checked(f"{path} is no teacher of {args.env_id}"):
            about, arrays = read_file(path)
            network = read_network(about["network"])
            networks = make_networks(args.env_id, network)
            needed = {"env_id": args.env_id, "observation_shape": [observation_dim(args.env_id)],
                      "action_dim": networks.policy.action_dim}
            for name, value in needed.items():
                if about[name] != value:
                    raise ValueError(f"its {name} is {about[name]}, not {value}")
            if args.distill_coef_decay == "return" and not about["evaluation"]["mean"] > 0:
                fail(f"--distill-coef-decay return needs teachers of positive return; that of {path} has none")
            shapes = model(jax.eval_shape(partial(init_state, teacher_args(args), networks), 0))
            found.append((network, {name: fill(x, arrays, name) for name, x in shapes.items()}))
    known, teachers = zip(*found, strict=True)
    if len(set(known)) > 1:
        fail(f"the teachers in {args.teacher} are not of one size")
    return network, stack(list(teachers) * (args.num_seeds // len(paths)))


def shapes_of(args: Args, networks: Networks) -> TrainState:
    """Return the shapes and types of the states of all runs [R]; computes nothing."""
    num_runs = len(args.distill_coef) * args.num_seeds
    return jax.eval_shape(jax.vmap(partial(init_state, args, networks)), np.arange(num_runs))


def restore(args: Args, saved: dict, arrays: dict[str, np.ndarray]) -> tuple[Network, dict | None, tuple]:
    """Return what a checkpoint holds: the teachers' network and parameters [S]; the parts done, and the states [R].

    While the teachers are trained, their parameters are part of the states, and None here.
    """
    with checked(f"{args.resume} holds no state of this run"):
        network, teacher = read_network(saved["teacher_network"]), None
        trained, networks = teacher_args(args), make_networks(args.env_id, network)
        if saved["phase"] == "student":
            teacher = fill(model(shapes_of(trained, networks)), arrays, "teacher")
            trained, networks = args, make_networks(args.env_id, args.network, network)
        part, rest = divmod(saved["updates"], trained.updates_per_part)
        if rest or not 0 <= part <= trained.parts:
            raise ValueError(f"no part of the {saved['phase']}'s training ends with update {saved['updates']}")
        return network, teacher, (part, fill(shapes_of(trained, networks), arrays, "state"))


def wait(arrays: Any) -> Any:
    """Wait until these arrays are computed; Python sees signals here, but not within XLA."""
    while not all(x.is_ready() for x in jax.tree.leaves(arrays)):
        time.sleep(0.005)
    return arrays


# ======================================================================================================================
# Evaluation
# ======================================================================================================================


@partial(jax.jit, static_argnames=("args", "policy"))
def evaluate(args: Args, policy: Policy, players: dict, keys: jax.Array) -> jax.Array:
    """Play one episode in each of E environments; returns their sums of raw rewards, undiscounted, [R, E].

    players: with a leading axis [R], as the keys. Each environment's first episode counts, so that short ones do not
    crowd out long. Actions are deterministic on states, but sampled on MinAtar, whose games hardly vary otherwise.
    """

    def one_run(player, key):
        def advance(carry):
            world, running, returns, key = carry
            key, act_key, step_key = jax.random.split(key, 3)
            pi = distribution(policy.apply(player["policy"], normalize(world.observations, player["obs_stats"])))
            actions = pi.sample(seed=act_key) if is_grid(args.env_id) else pi.mode()
            keys = jax.random.split(step_key, args.eval_episodes)
            world, found = step(args.env_id, world, actions, keys)
            dones = jnp.maximum(found.terminations, found.truncations) > 0
            return world, running & ~dones, jnp.where(running & dones, found.returns, returns), key

        key, reset_key = jax.random.split(key)
        world = reset(args.env_id, args.eval_episodes, reset_key)
        carry = world, jnp.ones(args.eval_episodes, bool), jnp.zeros(args.eval_episodes), key
        return jax.lax.while_loop(lambda carry: carry[1].any(), advance, carry)[2]

    return side_by_side(one_run, players, keys)


def assess(args: Args, policy: Policy, players: dict) -> dict[str, Any]:
    """Evaluate the policies of all seeds [S]; returns their means, the mean of these, and all returns.

    interval: half the width of the 95% confidence interval of the mean over seeds, by Student's t; None for one seed.
    """
    keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(seed), 2) for seed in args.seeds])
    returns = np.asarray(wait(evaluate(args, policy, *spread((players, keys)))))[:args.num_seeds]
    means, interval = returns.mean(1), None
    if args.num_seeds > 1:
        quantile = scipy.stats.t.ppf(0.975, args.num_seeds - 1)
        interval = float(quantile * means.std(ddof=1) / np.sqrt(args.num_seeds))
    return {"mean": float(means.mean()), "interval": interval, "means": means.tolist(), "returns": returns.tolist()}


def plot(args: Args, folder: Path, results: dict[str, Any]) -> None:
    """Draw the returns of progress.csv, mean and range over seeds, and the evaluated teachers, as curves.png."""
    curves = {}
    with open(folder / "progress.csv", newline="") as file:
        for row in csv.DictReader(file):
            curve = curves.setdefault((row["phase"], row["distill_coef"]), [])
            curve.append((float(row["global_step"]), float(row["charts/episodic_return"])))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for (phase, distill_coef), curve in curves.items():
        curve = np.array(curve).reshape(-1, args.num_seeds, 2)
        curve = curve[np.isfinite(curve).all((1, 2))]  # a seed has no return before an episode's end
        steps, returns = curve[:, 0, 0], curve[:, :, 1]
        begins = "λ at first" if args.pbt_interval else "λ"
        label = phase if len(curves) < 3 or phase == "teacher" else f"{phase}, {begins} = {float(distill_coef):g}"
        line, = axes.plot(steps, returns.mean(1), label=f"{label}, while it learns")
        axes.fill_between(steps, returns.min(1), returns.max(1), color=line.get_color(), alpha=0.2, linewidth=0)
    for name, style in (("teacher", "--"), ("corrupted_teacher", ":")):
        if name in results:
            axes.axhline(results[name]["mean"], linestyle=style, color="black", label=f"{name}, evaluated")
    axes.set(xlabel="environment steps of each seed", ylabel="episodic return",
             title=f"{args.env_id}: {args.method}, {args.num_seeds} seeds")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    write_atomic(folder / "curves.png", image.getvalue())


def name_students(args: Args, state: TrainState) -> dict[str, dict]:
    """Return the students [S] by name: those of each λ, or those of a population whose last return was the highest."""
    students, runs = model(state), np.arange(len(state.recent)).reshape(-1, args.num_seeds)
    if args.pbt_interval:
        if state.recent[runs].max(0).min() == NO_RETURN:
            print("no episode has ended while the students of a seed learned: the first λ's was taken", file=sys.stderr)
        return {"student": pick(students, runs[state.recent[runs].argmax(0), np.arange(args.num_seeds)])}
    if len(args.distill_coef) == 1:
        return {"student": students}
    return {f"student_{coef:g}": pick(students, own) for coef, own in zip(args.distill_coef, runs, strict=True)}


def save_models(args: Args, run: Run, name: str, policy: Policy, players: dict, result: dict[str, Any]) -> None:
    """Write a model file for each seed, {name}_{seed}.safetensors; players: [S]; result: of `assess`."""
    for i, seed in enumerate(args.seeds):
        returns = result["returns"][i]
        about = run.about | {
            "library": "gymnax", "role": name.split("_")[0], "network": policy.network._asdict(),
            "action_dim": policy.action_dim, "observation_shape": [observation_dim(args.env_id)], "variant": {},
            "evaluation": {"mean": result["means"][i], "std": float(np.std(returns)), "returns": returns}}
        save_file(run.folder / f"{name}_{seed}.safetensors", about, pick(players, i))


def finish(args: Args, run: Run, players: dict[str, tuple], results: dict[str, dict]) -> dict[str, float]:
    """Write the models, results.json and curves.png, and print the outcome.

    players: policy and parameters [S] of each by name. Returns the means over seeds, the ratios and the speed.
    """
    for name, (policy, params) in players.items():
        if name.startswith("student"):
            save_models(args, run, name, policy, params, results[name])
            if min(results["teacher"]["means"]) > 0:  # of losses a ratio says nothing
                ratios = np.divide(results[name]["means"], results["teacher"]["means"])
                results[name]["ratio"] = float(np.exp(np.log(np.maximum(ratios, 0.01)).mean()))
    timing = {name: run.logged[name] for name in ("seconds", "teacher_SPS", "student_SPS") if run.logged[name]}
    about = run.about | {"network": policy.network._asdict()} | timing  # of the last, a student where there is one
    write_atomic(run.folder / "results.json", about | {"results": results})
    plot(args, run.folder, results)

    print(f"return: mean and 95% interval over {args.num_seeds} seeds, {args.eval_episodes} episodes each")
    for name, found in results.items():
        interval = "" if found["interval"] is None else f" ± {found['interval']:.1f}"
        ratio = f", {found['ratio']:.3f} of the teacher's" if "ratio" in found else ""
        print(f"{name.replace('_', ' '):<18} {found['mean']:>9.1f}{interval}{ratio}")
    phase = "teacher" if args.method == "ppo" else "student"
    print(f"{'steps per second':<18} {run.logged[f'{phase}_SPS']:>9.0f} ({phase}s, all seeds together)")
    print(f"{'files':<18} {run.folder}")
    return {name: found["mean"] for name, found in results.items()} | timing | {
        f"{name}_ratio": found["ratio"] for name, found in results.items() if "ratio" in found}


# ======================================================================================================================
# Command line
# ======================================================================================================================

# Smallest and largest value of a flag, or of each of its numbers
RANGES = {
    "total_timesteps": (1, 10**12), "teacher_timesteps": (1, 10**12), "num_envs": (1, 10**6), "num_steps": (1, 10**6),
    "teacher_num_steps": (1, 10**6), "teacher_num_envs": (1, 10**6), "num_minibatches": (1, 10**9),
    "update_epochs": (1, 10**6), "num_parts": (1, 10**6), "eval_episodes": (1, 10**6), "seed": (0, 10**9 - 1),
    "num_seeds": (1, 10**5), "teacher_noise_seed": (0, 10**9 - 1), "learning_rate": (0, 1e3), "gamma": (0, 1.0),
    "gae_lambda": (0, 1.0), "clip_coef": (0, 1.0), "ent_coef": (0, 1e6), "teacher_ent_coef": (0, 1e6),
    "vf_coef": (0, 1e6), "max_grad_norm": (1e-9, 1e9), "distill_coef": (0, 1e6), "distill_coef_final": (0, 1e6),
    "distill_future_coef": (0, 1e6), "pbt_interval": (1, 10**6), "teacher_noise_std": (0, 1e6),
    "student_hidden": (1, 65_536),
}
MAX_LAYERS = 64
OF_PPD = ("distill_coef", "distill_coef_final", "distill_coef_decay", "pbt_interval", "distill_weight",
          "distill_future_coef", "teacher_mean_clip")  # flags of its distillation term
OF_STUDENTS = ("student_size", "student_hidden", "kl_direction", "ent_coef", "num_steps")
RESUMABLE = ("resume", "device", "eval_episodes", "track", "wandb_project_name",
             "wandb_entity")  # flags that may change when a run goes on


def fail(message: str) -> NoReturn:
    """End the program for bad input: one line on stderr, exit code 2."""
    print("error: " + "".join(c if c.isprintable() else " " for c in message[:1000]), file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv: list[str] | None = None) -> Args:
    """Read the command line; with --resume, flags that are not given are the run's, and none may contradict it."""
    read = partial(tyro.cli, Args, args=argv, description=__doc__)
    args = read()
    if args.resume is None:
        return args
    with checked(f"{args.resume} was made by another version of {SCRIPT}.py"):
        flags = load_checkpoint(args.resume)[0]["args"]
        flags = {field.name: flags[field.name] for field in dataclasses.fields(Args)} | {"resume": args.resume}
        run = Args(**{name: tuple(x) if isinstance(x, list) else x for name, x in flags.items()})
        for field in dataclasses.fields(Args):
            kinds = [get_origin(kind) or kind for kind in (field.type, *get_args(field.type))]  # types, or words
            value = getattr(run, field.name)
            known = value in kinds or type(value) in kinds + [int] * (float in kinds)
            if not known or isinstance(value, tuple) and not all(isinstance(x, int | float | str) for x in value):
                raise ValueError(f"its {field.name} is {value}")
        args = read(default=run)
        for name, value in vars(run).items():
            if name not in RESUMABLE and getattr(args, name) != value:
                fail(f"--{name.replace('_', '-')} {getattr(args, name)} contradicts {args.resume}, where it is {value}")
        if (args.total_timesteps or 0) < run.total_timesteps:  # None extends nothing
            fail(f"--total-timesteps can extend a run, not shorten it: {args.resume} has {run.total_timesteps}")
    return args


def resolve(args: Args) -> Args:
    """Fill in the task's defaults; end the program for flags that cannot work, before anything is written."""
    env, params = make_env(args.env_id)
    unused = {"ppd": (), "ppo": OF_PPD + OF_STUDENTS}.get(args.method, OF_PPD)
    own = [name for name in unused if getattr(args, name) != getattr(Args(), name)]
    if own and not args.resume:  # a run that goes on has been told all of its flags
        fail(f"--{own[0].replace('_', '-')} has no effect beside --method {args.method}")
    known = MINATAR if is_grid(args.env_id) else STATES
    known = known | {"teacher_num_envs": args.num_envs or known["num_envs"],
                     "teacher_ent_coef": 0.05 if args.env_id in SPARSE else 0.01,
                     "total_timesteps": max(1, (args.teacher_timesteps or known["teacher_timesteps"]) // 5)}
    if args.method.endswith("distill"):
        known |= BASELINES
    if args.method == "ppo" and args.total_timesteps:
        known["teacher_timesteps"] = args.total_timesteps
    args = dataclasses.replace(args, **{name: value for name, value in known.items() if getattr(args, name) is None})
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if value is not None and not all(isinstance(x, int | type(high)) and low <= x <= high for x in numbers):
            fail(f"--{name.replace('_', '-')} must lie between {low:.10g} and {high:.10g}, not {value}")
    if not args.distill_coef:
        fail("--distill-coef takes one number or more")
    if args.method == "ppo" and args.teacher:
        fail("--method ppo trains teachers; with --teacher there is nothing left to do")
    if args.distill_coef_final is not None and args.distill_coef_decay != "none":
        fail("--distill-coef-final and --distill-coef-decay exclude each other")
    if args.distill_coef_final is not None and args.pbt_interval:
        fail("--distill-coef-final and --pbt-interval exclude each other: all λ of a population would end alike")
    if args.distill_coef_decay == "return" and args.env_id in NEGATIVE:
        fail(f"--distill-coef-decay return needs teachers of positive return; those of {args.env_id} have none")
    if len({f"{coef:g}" for coef in args.distill_coef}) < len(args.distill_coef):
        fail("--distill-coef has a number twice")
    if args.pbt_interval and len(args.distill_coef) < 2:
        fail("--pbt-interval needs a population: two numbers or more for --distill-coef")
    if args.pbt_interval and args.pbt_interval >= args.parts:
        fail(f"--pbt-interval {args.pbt_interval} leaves no exchange in a run of {args.parts} parts")
    if args.teacher_mean_clip and not env.action_space(params).shape:
        fail(f"--teacher-mean-clip is for continuous actions; those of {args.env_id} are not")
    if args.cnn and not is_grid(args.env_id):
        fail(f"--cnn is for MinAtar; {args.env_id} has states")
    if not 1 <= len(args.network.hidden) <= MAX_LAYERS:
        fail(f"a network has 1 to {MAX_LAYERS} hidden layers, not {len(args.network.hidden)}")
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


def teacher_args(args: Args) -> Args:
    """Return the flags of the teachers' training: PPO is PPD with λ = 0 and no teacher."""
    return dataclasses.replace(
        args, method="ppd", student_size="same", student_hidden=None, total_timesteps=args.teacher_timesteps,
        ent_coef=args.teacher_ent_coef, num_envs=args.teacher_num_envs, num_steps=args.teacher_num_steps,
        **{name: getattr(Args(), name) for name in OF_PPD} | {"distill_coef": (0.0,)})


# ======================================================================================================================
# Main
# ======================================================================================================================


def choose_device(device: str) -> None:
    """Choose where everything runs, before JAX first computes: on GPUs, or on CPU cores, each a device of its own."""
    with suppress(RuntimeError):  # a process that has computed already has its devices
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
        jax.config.update("jax_num_cpu_devices", len(cores))
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")


def check_finite(metrics: dict[str, np.ndarray], place: str, folder: Path) -> None:
    """End the run when a loss, the gradient or a parameter is NaN or infinite; the checkpoints stay as they were."""
    for name, values in metrics.items():
        if name.startswith("losses/") and not np.isfinite(values).all():
            raise SystemExit(f"error: {place} gave {name} = {values}; the last good state is in {folder}")


def init_runs(args: Args, networks: Networks, teacher: dict | None) -> TrainState:
    """Initialise all runs [R]: all seeds under the first λ, then all under the next; a seed begins alike under each."""
    state = stack([init_state(args, networks, seed) for seed in args.seeds])
    if teacher is not None:
        state = state._replace(obs_stats=teacher["obs_stats"])
    state = pick(jax.device_get(state), np.tile(np.arange(args.num_seeds), len(args.distill_coef)))
    return state._replace(distill_coef=np.repeat(np.float32(args.distill_coef), args.num_seeds))


def fit(args: Args, networks: Networks, teacher: dict | None, start: tuple | None, run: Run) -> TrainState:
    """Train the teachers or, given these, the students; returns the states of all runs [R], as NumPy arrays.

    teacher: before noise, [S]; start: the parts done and the states after them, or None to begin. A signal ends the
    program after the part under way.
    """
    phase, updates = "teacher" if teacher is None else "student", args.updates_per_part
    runs = [(seed, distill_coef) for distill_coef in args.distill_coef for seed in args.seeds]
    first, state = jax.device_get(start or (0, init_runs(args, networks, teacher)))
    seed_of, taught = np.arange(len(runs)) % args.num_seeds, None
    goals = np.float32(1.0)  # without effect, unless λ falls with the return
    if teacher is not None:
        taught = spread(pick(jax.device_get(imperfect(args, teacher)), seed_of))
    if args.distill_coef_decay == "return":
        fixed = dataclasses.replace(args, eval_episodes=Args.eval_episodes)  # --eval-episodes is of the end alone
        goals = np.float32(assess(fixed, networks.teacher, teacher)["means"])[seed_of]
        if goals.min() <= 0:
            fail("--distill-coef-decay return needs teachers of positive return; one of those in "
                 f"{args.teacher or run.folder} has {goals.min():g}")
    run.save(phase, first * updates, networks, state, teacher)  # going on, with the flags that have changed

    bar = trange(first + 1, args.parts + 1, initial=first, total=args.parts, desc=f"{args.env_id} {phase}", unit="part",
                 mininterval=0.5 if sys.stderr.isatty() else 60.0)
    with bar:
        for part in bar:
            # Learn
            fractions = np.arange((part - 1) * updates, part * updates) / max(1, args.parts * updates - 1)
            reached = (state.recent / goals)[:, None]
            coefs = distill_coef_at(args, state.distill_coef[:, None], fractions, reached)  # PPD
            learned = wait(train(args, networks, taught, spread(state), spread(coefs)))
            state, metrics = pick(jax.device_get(learned), slice(len(runs)))  # without what only fills the devices
            check_finite(metrics, f"updates {(part - 1) * updates + 1} to {part * updates} of the {phase}", run.folder)
            returns = metrics["charts/episodic_return"]
            ended = ~np.isnan(returns)
            state = state._replace(recent=np.where(ended, returns, state.recent), fresh=state.fresh | ended)
            if args.pbt_interval and part % args.pbt_interval == 0:
                state = exploit(args, state, part)

            # Log
            if args.method == "ppd":
                metrics["charts/distill_coef"] = np.mean(coefs, axis=1)
            run.log(phase, part * updates * args.batch_size, runs, metrics)
            speed = run.logged[f"{phase}_SPS"]
            bar.set_postfix_str(f"return {returns.mean():.1f}, {speed:,.0f} steps/s", refresh=False)

            # Save
            run.save(phase, part * updates, networks, state, teacher)
            run.stop_if_asked()
    return state


def main(args: Args) -> dict[str, float]:
    """Train teachers, distil students and evaluate all of them; returns the single numbers of results.json."""
    choose_device(args.device)
    saved, arrays = load_checkpoint(args.resume) if args.resume else (None, {})
    args = resolve(args)
    teacher_network, teacher, start = restore(args, saved, arrays) if saved else (*load_teachers(args), None)
    teacher_networks = make_networks(args.env_id, teacher_network)
    networks, students = make_networks(args.env_id, args.network, teacher_network), {}
    if saved:
        print(saved["note"], file=sys.stderr)

    # Train
    run, results = Run(args, saved), {}
    with closing(run):
        if teacher is None:  # their files are written before students need them
            teacher, start = model(fit(teacher_args(args), teacher_networks, None, start, run)), None
            results["teacher"] = assess(args, teacher_networks.policy, teacher)
            save_models(args, run, "teacher", teacher_networks.policy, teacher, results["teacher"])
            run.stop_if_asked()
        if args.method != "ppo":
            students = name_students(args, fit(args, networks, teacher, start, run))
    run.stop_if_asked()  # after the last part

    # Evaluate
    players = {"teacher": (teacher_networks.policy, teacher)}
    if args.teacher_noise_std:
        players["corrupted_teacher"] = (teacher_networks.policy, imperfect(args, teacher))
    players |= {name: (networks.policy, params) for name, params in students.items()}
    results |= {name: assess(args, *each) for name, each in players.items() if name not in results}

    # Save
    return finish(args, run, players, results)


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:  # before training
        raise SystemExit(130) from None
    except BrokenPipeError:  # who read the output has gone: --help | head
        raise SystemExit(1) from None
    except OSError as error:  # a full disk
        raise SystemExit(f"error: {error}; go on from the last checkpoint with --resume") from None
