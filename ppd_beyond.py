"""Proximal Policy Distillation (PPD) beyond the paper: several teachers, and what else may shape the distillation term.

    python ppd_beyond.py --teacher A.safetensors B.safetensors --distill-coef 1 0.2 --distill-future-coef 1

On Atari, MuJoCo or Procgen. Each iteration collects a rollout with the student, estimates advantages A, and over epochs
of shuffled minibatches

    maximises  E[ min(r A, clip(r, 1-ε, 1+ε) A) + α entropy - Σ_k λ_k KL(teacher_k || student) max(r, 1-ε) ]
    minimises  E[ (V(s) - R)² + (F(s) - G)² ]      with r = π(a|s) / π_old(a|s), not detached.

With β > 0, A also has β Σ_k λ_k times the advantages of a second reward: minus KL(teacher_k || student) in the state
that an action leads to, averaged with weights λ_k. A value network F of its own learns its returns G, as means over
1/(1-γ) steps (Czarnecki et al. 2019; Tang and Munos 2025). λ_k may fall as 1 - return of the student / return of
teacher k, clipped to 0 and 1 (Agarwal et al. 2022), and the means of a teacher's actions may be clipped to their
bounds. All of it is off by default: then this learns what the script of the suite learns, to the bit. What makes PPD
out of PPO is marked `# PPD`, and what goes beyond it `# Beyond`. docs/beyond.md says more.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2; python_version < '3.12'",
#   "jax==0.11.2; python_version >= '3.12'",
#   "envpool==1.2.5; python_version < '3.12'",
#   "envpool==1.2.7; python_version >= '3.12'",
#   "distrax==0.1.9",
#   "flax==0.12.8",
#   "gymnasium==1.3.0",
#   "numpy==2.4.6",
#   "optax==0.2.8",
#   "safetensors==0.8.0",
#   "tensorboardX==2.6.5",
#   "tfp-nightly==0.26.0.dev20261027",
#   "tqdm==4.67.1",
#   "tyro==1.0.17",
# ]
# ///

import csv
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import shlex
import signal
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial, reduce
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
import tyro
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import trange

# ======================================================================================================================
# Arguments
# ======================================================================================================================


class Network(NamedTuple):
    """What a network is made of: convolutions, unless it is an MLP, then hidden layers."""

    kind: Literal["mlp", "nature", "impala"]
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    activation: Literal["relu", "tanh"] = "relu"  # of the hidden layers; convolutions have ReLU


CONVOLUTIONAL = {
    "smaller": Network("nature", (32, 64, 64), (64,)),
    "same": Network("impala", (16, 32, 32), (256,)),
    "larger": Network("impala", (32, 64, 64), (1024,)),
}
NETWORKS = {
    "atari": CONVOLUTIONAL,
    "mujoco": {"smaller": Network("mlp", (), (128, 64)), "same": Network("mlp", (), (256, 256)),
               "larger": Network("mlp", (), (512, 512))},
    "procgen": CONVOLUTIONAL,
}


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags."""

    # Task
    env_id: str | None = None  # task of Atari, MuJoCo or Procgen; by default the first teacher's, or Hopper-v4
    frame_skip: int | None = None  # Atari: frames for which an action is repeated; by default the teacher's
    repeat_action_probability: float | None = None  # Atari: probability of sticky actions; by default the teacher's
    start_level: int | None = None  # Procgen: first level to learn on; by default the teacher's
    num_levels: int | None = None  # Procgen: levels to learn on; later ones are the test; by default the teacher's
    seed: int = 100  # seed of everything; those of a study lie 100 apart, as the paper's: 100, 200, 300, 400, 500
    total_timesteps: int = 2_000_000  # environment steps, rounded up to whole rollouts; resets count
    device: Literal["auto", "cpu", "gpu"] = "auto"  # where the networks run; gpu is an error where there is none
    num_devices: int | None = None  # devices that share the work, by default the most that divide it; for MLPs 1 core

    # Teachers and student
    teacher: tuple[str, ...] = ()  # files, also of other tasks; by default teachers/{env_id}__100.safetensors
    student_size: Literal["smaller", "same", "larger"] = "larger"  # than the teacher: see NETWORKS above
    student_channels: tuple[int, int, int] | None = None  # filters of the three convolutions or stages
    student_hidden: tuple[int, ...] | None = None  # widths of the student's hidden layers; overrides --student-size
    distill_coef: tuple[float, ...] = (1.0,)  # weights (λ) of the teachers' terms, one for each or for all; 0 is PPO
    distill_coef_final: float | None = None  # λ at the end of the run, reached linearly; by default constant
    distill_coef_decay: Literal["none", "return"] = "none"  # return: λ falls to 0 as the return rises to the teacher's
    distill_weight: Literal["ratio", "detached"] = "ratio"  # max(r, 1-ε) with its gradient, the paper's, or without
    distill_future_coef: float = 0.0  # weight of a reward of -λ KL in the next state (β); 0 is the paper's
    teacher_mean_clip: bool = False  # clip the teacher's mean actions to their bounds in the KL divergence
    kl_direction: Literal["forward", "reverse"] = "forward"  # KL(teacher || student), or KL(student || teacher)
    teacher_noise_std: float = 0.0  # standard deviation of noise on the teacher's parameters (σ; the paper's: 0.05)
    teacher_noise_seed: int = 0  # seed of that noise; teacher k, counted from 0, has seed + k

    # PPO
    learning_rate: float = 3e-4  # step size of Adam, constant
    num_envs: int = 18  # environments stepped in parallel (N)
    num_steps: int = 64  # steps of each environment in a rollout (T)
    num_minibatches: int | None = None  # minibatches of an epoch; by default the fewest of 64 to 512 samples
    update_epochs: int = 4  # passes over each rollout
    gamma: float | None = None  # discount factor (γ); the paper's: 0.999, but 0.995 for Hopper and Swimmer
    gae_lambda: float = 0.9  # decay of generalised advantage estimation
    clip_coef: float = 0.2  # clipping range of the probability ratio (ε)
    ent_coef: float = 0.0  # weight of the entropy bonus (α)
    vf_coef: float = 0.5  # weight of the value loss, a plain mean squared error
    max_grad_norm: float = 0.5  # largest global norm of the gradient, policy and value together

    # Output
    run_dir: str | None = None  # folder; by default runs/{env_id}__{script}__{student_size}__{seed}__{unix_time}
    resume: str | None = None  # folder of a run to go on with, by its flags; --total-timesteps may be larger
    checkpoint_every: int = 50  # updates between checkpoints
    eval_episodes: int | None = None  # episodes of the final evaluation; the paper's: 50, but 200 on Procgen
    track: bool = False  # log to Weights & Biases as well (pip install wandb)
    wandb_project_name: str = "ppd"  # project to log to
    wandb_entity: str | None = None  # team to log to

    @property
    def network(self) -> Network:
        """The student's networks (appendix A.3, with the smaller convolutional one of Table 4)."""
        kind, channels, hidden, *_ = NETWORKS[suite_of(self.env_id)][self.student_size]
        hidden = hidden if self.student_hidden is None else self.student_hidden
        return Network(kind, self.student_channels or channels, hidden)

    @property
    def batch_size(self) -> int:
        """Samples of a rollout, N*T."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Rollouts of the run, each followed by one update."""
        return -(-self.total_timesteps // self.batch_size)


# ======================================================================================================================
# Environments
# ======================================================================================================================

EVAL_SEED = 10**9  # added to the seed of the environments in evaluation
SUITES = {"envpool.atari": "atari", "envpool.mujoco.gym": "mujoco", "envpool.procgen": "procgen"}
VARIANTS = {  # how a task is played: the flags of each suite that a model file keeps
    "atari": ("frame_skip", "repeat_action_probability"), "mujoco": ("contact_forces",),
    "procgen": ("start_level", "num_levels"),
}

# Scores of a random and of a human player (Badia et al. 2020), for human-normalised scores
HUMAN = {
    "Atlantis": (12850.0, 29028.1), "BeamRider": (363.9, 16926.5), "CrazyClimber": (10780.5, 35829.4),
    "DemonAttack": (152.1, 1971.0), "Enduro": (0.0, 860.5), "Freeway": (0.0, 29.6), "MsPacman": (307.3, 6951.6),
    "Pong": (-20.7, 14.6), "Qbert": (163.9, 13455.0), "Seaquest": (68.4, 42054.7), "Zaxxon": (32.5, 9173.3),
}


def count_cores() -> int:
    """Return how many cores of the CPU this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def import_envpool() -> Any:
    """Import envpool only when it is needed: that is slow, and fails where a system library is missing."""
    try:
        import envpool
    except ImportError as error:
        fail(f"envpool cannot be imported ({error}); on Debian: apt-get install libegl1 libopengl0")
    return envpool


def suite_of(env_id: str) -> str:
    """Return a task's suite, atari, mujoco or procgen; end the program for other tasks, naming those like it."""
    specs = import_envpool().registration.registry.specs  # of each task by name: the module it lies in, and more
    known = {name: SUITES[module] for name, (module, *_) in specs.items() if module in SUITES}
    if env_id not in known:
        near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.3)
        fail(f"unknown task {env_id}; did you mean {', '.join(near or ('Pong-v5', 'Hopper-v4', 'CoinrunEasy-v0'))}?")
    return known[env_id]


def task_shape(env_id: str) -> tuple[list[int], int]:
    """Return the shape of an observation and the number of actions, or of their dimensions; make no environment."""
    try:
        spec = import_envpool().make_spec(env_id)
    except ImportError:
        fail(f"{env_id} needs Qt, which envpool's Procgen draws with; on Debian: apt-get install libqt5gui5")
    space = spec.gymnasium_action_space
    return list(spec.gymnasium_observation_space.shape), int(space.shape[0] if space.shape else space.n)


Split = Literal["training", "evaluation", "train_levels"]


def make_envs(env_id: str, num_envs: int, seed: int, variant: dict, split: Split, **options: Any) -> Any:
    """Make vectorised environments; the seed is given here because envpool ignores reset(seed=).

    Atari: 84x84 grey images, the last four of them; a game ends after half an hour, 108,000 frames; in training a lost
    life ends an episode, but not the game. Procgen: 64x64 coloured images of num_levels levels from start_level on, but
    in evaluation of all later ones; train_levels evaluates on those of training. A few unseen levels look like one of
    training: they differ in their seeds. Humanoid: without contact forces 84 of its observations are 0. options: more
    of envpool's own.
    """
    suite = suite_of(env_id)
    if suite == "atari":
        limit = 108_000 // variant["frame_skip"]
        options |= variant | {"max_episode_steps": limit, "episodic_life": split == "training"}
    if suite == "procgen":
        first, levels = variant["start_level"], variant["num_levels"]
        unseen = {"start_level": first + levels, "num_levels": 2**31 - 1 - first - levels}
        options |= unseen if split == "evaluation" else variant
    if env_id.startswith("Humanoid"):
        options |= {"post_constraint": variant["contact_forces"]}
    try:
        return import_envpool().make_gymnasium(env_id, num_envs=num_envs, seed=seed, **options)
    except ImportError:
        fail(f"{env_id} needs Qt, which envpool's Procgen draws with; on Debian: apt-get install libqt5gui5")


def as_stored(observations: np.ndarray) -> np.ndarray:
    """Return states [N, D] as float32; images [N, C, H, W] stay uint8."""
    return observations if observations.dtype == np.uint8 else observations.astype(np.float32)


def reset(envs: Any) -> np.ndarray:
    """Reset all environments; returns their first observations."""
    return as_stored(envs.reset()[0])


def step(envs: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Step all environments; returns observations, rewards, terminations, truncations and ends of games, [N].

    actions: [N] int32, or [N, A] of any size: what lies beyond the bounds is clipped here and nowhere else. On Atari a
    lost life is a termination, but no end of the game; nor is it the end to have no life left.
    """
    space = envs.action_space
    if space.shape:
        actions = np.clip(actions, space.low, space.high, dtype=space.dtype)
    observations, rewards, terminations, truncations, info = envs.step(actions)
    ends = info.get("terminated", terminations).astype(bool) | truncations
    return as_stored(observations), rewards, terminations, truncations, ends


class Cursor(NamedTuple):
    """Where the environments stand between two rollouts; its arrays are updated in place."""

    observations: np.ndarray  # [N, D] float32 or [N, C, H, W] uint8
    dones: np.ndarray  # [N] bool: the last step ended an episode
    returns: np.ndarray  # [N] float64: sum of the raw rewards of the running game
    finished: deque  # such sums of the last 100 finished games


class Rollout(NamedTuple):
    """T steps of N environments, time first."""

    observations: np.ndarray  # [T+1, N, D] float32 or [T+1, N, C, H, W] uint8
    actions: np.ndarray  # [T, N] int32, or [T, N, A] float32 as sampled, before clipping to the bounds
    rewards: np.ndarray  # [T, N] float32
    terminations: np.ndarray  # [T, N] bool
    truncations: np.ndarray  # [T, N] bool
    phantoms: np.ndarray  # [T, N] bool


def start(envs: Any) -> Cursor:
    """Reset all environments; returns where they stand."""
    observations = reset(envs)
    return Cursor(observations, np.zeros(len(observations), bool), np.zeros(len(observations)), deque(maxlen=100))


def collect(envs: Any, cursor: Cursor, policy_step: Callable, num_steps: int) -> Rollout:
    """Step the N environments `num_steps` times with the actions that policy_step(observations, t) gives.

    envpool resets on the step after an episode's end: that step ignores its action and gives the reset observation with
    reward 0. It is no transition of the task. Such phantoms are marked, and weigh 0 wherever they could count.
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
        cursor.finished.extend(cursor.returns[ends])
        cursor.returns[ends] = 0.0
    cursor.observations[:] = observations[-1]
    return Rollout(observations, np.stack(actions), rewards, terminations, truncations, phantoms)


# ======================================================================================================================
# Networks
# ======================================================================================================================


ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh}  # of hidden layers, by their name in a model file


def torso(network: Network, x: jax.Array) -> jax.Array:
    """Compute features [..., F] of normalised states [..., D], or of images [..., C, H, W], uint8.

    An MLP, Nature-CNN (Mnih et al. 2015) or IMPALA-CNN (Espeholt et al. 2018). Called inside a module's __call__, which
    owns the layers.
    """
    orthogonal = nn.initializers.orthogonal(np.sqrt(2))
    conv = partial(nn.Conv, kernel_init=orthogonal,
                   conv_general_dilated=convolve if jax.default_backend() == "cpu" else None)
    if network.kind != "mlp":
        x = jnp.moveaxis(x, -3, -1).astype(jnp.float32) / 255.0
    if network.kind == "nature":
        for channels, size, stride in zip(network.channels, (8, 4, 3), (4, 2, 1), strict=True):
            x = nn.relu(conv(channels, (size, size), stride, "VALID")(x))
    if network.kind == "impala":
        for channels in network.channels:
            x = max_pool(conv(channels, (3, 3))(x))
            for _ in range(2):
                y = conv(channels, (3, 3))(nn.relu(x))
                x = x + conv(channels, (3, 3))(nn.relu(y))
        x = nn.relu(x)
    if network.kind != "mlp":
        x = x.reshape(*x.shape[:-3], -1)
    for width in network.hidden:
        x = ACTIVATIONS[network.activation](nn.Dense(width, kernel_init=orthogonal)(x))
    return x


def convolve(x: jax.Array, kernel: jax.Array, strides: Any, padding: str, **_: Any) -> jax.Array:
    """Convolve x [B, H, W, C] with a kernel [k, k, C, F] as one matrix product of patches; a CPU does that sooner.

    For a stride s, blocks of s x s pixels first become pixels of s*s*C channels: then the stride is 1.
    """
    (size, _, channels, filters), stride = kernel.shape, strides[0]
    if stride > 1:
        height, width = ((n - size) // stride * stride + size for n in x.shape[1:3])
        x = x[:, :height, :width].reshape(-1, height // stride, stride, width // stride, stride, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height // stride, width // stride, stride * stride * channels)
        size //= stride
        kernel = kernel.reshape(size, stride, size, stride, channels, filters).transpose(0, 2, 1, 3, 4, 5)
    if padding == "SAME":
        x = jnp.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    patches = [x[:, i: i + height, j: j + width] for i in range(size) for j in range(size)]
    # The barrier keeps the gradient of the transposed kernel a product of its own, which is twice as fast
    kernel = jax.lax.optimization_barrier(kernel.reshape(-1, filters).T)
    return jnp.einsum("bhwk,fk->bhwf", jnp.concatenate(patches, axis=-1), kernel)


def max_pool(x: jax.Array) -> jax.Array:
    """Take the maximum over 3x3 windows of x [..., H, W, C], stride 2, with a border of 1: sizes 84, 42, 21, 11.

    As maxima of shifted slices, of columns and then of rows, because XLA's own gradient of pooling is slow on a CPU.
    """
    for axis in (x.ndim - 2, x.ndim - 3):
        size = x.shape[axis]
        x = jnp.pad(x, [(int(a == axis),) * 2 for a in range(x.ndim)], constant_values=-jnp.inf)
        x = reduce(jnp.maximum, [jax.lax.slice_in_dim(x, i, i + size, 2, axis) for i in range(3)])
    return x


class Policy(nn.Module):
    """Gaussian policy of states, whose log standard deviation does not depend on them; categorical policy of images."""

    network: Network
    action_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Return mean and log standard deviation, both [..., A], or logits [..., A], for x as in `torso`."""
        x = torso(self.network, x)
        output = nn.Dense(self.action_dim, kernel_init=nn.initializers.orthogonal(0.01))(x)
        if self.network.kind != "mlp":
            return output
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        return output, jnp.broadcast_to(log_std, output.shape)


class Value(nn.Module):
    """State value: a network that shares nothing with the policy."""

    network: Network

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return values [...] for x as in `torso`."""
        x = torso(self.network, x)
        return nn.Dense(1, kernel_init=nn.initializers.orthogonal(1.0))(x).squeeze(-1)


def distribution(outputs: jax.Array | tuple[jax.Array, jax.Array]) -> distrax.Distribution:
    """Return the action distribution for a policy's outputs."""
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


def update_stats(stats: Stats, samples: jax.Array, weights: jax.Array) -> Stats:
    """Add the samples [B, ...] whose weight [B] is 1, not those of weight 0 (Chan et al. 1979, pairwise update)."""
    n = weights.sum()
    mean = jnp.tensordot(weights, samples, 1) / jnp.maximum(n, 1)
    var = jnp.tensordot(weights, (samples - mean) ** 2, 1) / jnp.maximum(n, 1)
    count = stats.count + n
    delta = mean - stats.mean
    merged = (stats.var * stats.count + var * n + delta**2 * stats.count * n / count) / count
    return Stats(stats.mean + delta * n / count, merged, count)


def normalize(observations: jax.Array, stats: Stats | None) -> jax.Array:
    """Subtract the running mean from states [..., D], divide by the deviation, clip to ±10; images stay as is."""
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

    return jax.lax.scan(forward, carried, (rewards, dones))


def compute_gae(
    rewards: jax.Array, values: jax.Array, terminations: jax.Array, truncations: jax.Array, gamma: float,
    gae_lambda: float,
) -> tuple[jax.Array, jax.Array]:
    """Compute advantages and returns, both [T, N], by generalised advantage estimation (Schulman et al. 2016).

    rewards, terminations, truncations: [T, N]; values: [T+1, N], of all stored observations. A terminated step does
    not bootstrap. A truncated step bootstraps from the true final observation, which is stored at t+1. Both cut the
    trace, so nothing of a phantom step reaches another step.
    """
    dones = jnp.maximum(terminations, truncations)
    deltas = rewards + gamma * values[1:] * (1.0 - terminations) - values[:-1]

    def backward(advantage, x):
        delta, done = x
        advantage = delta + gamma * gae_lambda * (1.0 - done) * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(backward, jnp.zeros_like(deltas[0]), (deltas, dones), reverse=True)
    return advantages, advantages + values[:-1]


def weighted_mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Average x [B] over the samples whose weight [B] is 1."""
    return (x * weights).sum() / jnp.maximum(weights.sum(), 1.0)


def standardize(advantages: jax.Array, weights: jax.Array) -> jax.Array:
    """Bring advantages [B] to mean 0 and variance 1 over the samples whose weight [B] is 1."""
    centred = advantages - weighted_mean(advantages, weights)
    return centred / (jnp.sqrt(weighted_mean(centred**2, weights)) + 1e-8)


class Batch(NamedTuple):
    """Samples of a rollout; the leading axis is [B], or none for a single sample."""

    observations: jax.Array  # [B, D], normalised, or [B, C, H, W], uint8
    actions: jax.Array  # [B, A] or [B]
    log_probs: jax.Array  # [B], under the policy that acted
    advantages: jax.Array  # [B]
    returns: jax.Array  # [B]
    weights: jax.Array  # [B]: 0 for a phantom transition, else 1
    teachers: tuple  # PPD: each teacher policy's outputs, [B, A] (each)
    future: jax.Array | None = None  # Beyond: [B], returns of the KL divergence ahead, as a penalty


def numbered(name: str, values: Iterable) -> dict[str, Any]:
    """Name values, one a teacher: name, name_2, name_3."""
    return {name + f"_{k}" * (k > 1): value for k, value in enumerate(values, 1)}


def divergence(teacher: distrax.Distribution, pi: distrax.Distribution, kl_direction: str) -> jax.Array:
    """Return KL(teacher || pi), forward, or KL(pi || teacher), reverse, in closed form."""
    return teacher.kl_divergence(pi) if kl_direction == "forward" else pi.kl_divergence(teacher)


def ppd_terms(
    outputs: Any, value: jax.Array, sample: Batch, clip_coef: float, kl_direction: str, distill_weight: str
) -> dict[str, jax.Array]:
    """Compute the terms of one sample's loss, as scalars (Algorithm 1); those of teachers are numbered.

    outputs: of the student's policy, [A] (each); value: of the student, []; sample: its advantage is standardised.
    """
    pi = distribution(outputs)
    log_ratio = pi.log_prob(sample.actions) - sample.log_probs
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_coef, 1.0 + clip_coef)
    kls = [divergence(distribution(teacher), pi, kl_direction) for teacher in sample.teachers]  # PPD
    weight = jnp.maximum(ratio, 1.0 - clip_coef)  # PPD: the paper's has a gradient, which flows through both factors
    weight = jax.lax.stop_gradient(weight) if distill_weight == "detached" else weight
    return {
        "policy_loss": -jnp.minimum(ratio * sample.advantages, clipped * sample.advantages),
        "value_loss": (value - sample.returns) ** 2,
        "entropy": pi.entropy(),
        "approx_kl": ratio - 1.0 - log_ratio,
        "clipfrac": (jnp.abs(ratio - 1.0) > clip_coef).astype(jnp.float32),
        **numbered("distill_loss", [kl * weight for kl in kls]),  # PPD
        **numbered("teacher_kl", kls),
    }


def ppd_loss(
    outputs: Any, values: jax.Array, batch: Batch, distill_coef: tuple[float, ...], clip_coef: float, ent_coef: float,
    vf_coef: float, kl_direction: str, distill_weight: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Compute the loss of a minibatch and its terms, averaged over the samples whose weight is 1.

    outputs: of the student's policy, [B, A] (each); values: of the student, [B]; distill_coef: λ of each teacher.
    """
    each = partial(ppd_terms, clip_coef=clip_coef, kl_direction=kl_direction, distill_weight=distill_weight)
    terms = jax.vmap(each)(outputs, values, batch)
    terms = {name: weighted_mean(term, batch.weights) for name, term in terms.items()}
    loss = terms["policy_loss"] + vf_coef * terms["value_loss"] - ent_coef * terms["entropy"]
    loss += sum(coef * terms[name] for name, coef in numbered("distill_loss", distill_coef).items())  # PPD
    return loss, {"loss": loss} | terms


def corrupt(params: dict, std: float, seed: int) -> dict:
    """Make an imperfect teacher (section 4.2): add Gaussian noise of this standard deviation to every parameter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
    return tree.unflatten([x + std * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


def distill_coef_at(args: Args, fraction: float, episodic_return: float, goals: Sequence[float]) -> tuple[float, ...]:
    """Return each teacher's λ at this fraction of the run, from 0 to 1: constant, linear, or falling with the return.

    episodic_return: of the student's recent episodes, nan before the first ends; goals: the teachers' returns.
    """
    coefs = args.distill_coef * (len(goals) if len(args.distill_coef) == 1 else 1)
    if args.distill_coef_decay == "return":  # Beyond
        reached = [np.nan_to_num(episodic_return) / goal for goal in goals]
        return tuple(coef * float(np.clip(1.0 - x, 0.0, 1.0)) for coef, x in zip(coefs, reached, strict=True))
    final = args.distill_coef_final
    return coefs if final is None else tuple(coef + fraction * (final - coef) for coef in coefs)


# ======================================================================================================================
# Jitted steps
# ======================================================================================================================

P = jax.sharding.PartitionSpec  # how arrays lie on several devices: P() is whole on each


class Networks(NamedTuple):
    """The flax modules; they hold no parameters."""

    policy: Policy
    value: Value
    teachers: tuple[Policy, ...]


class Teacher(NamedTuple):
    """A teacher: what its file says, with the task of the run, and the policy made of it."""

    about: dict
    policy: Policy
    params: dict  # {"policy": ..., "obs_stats": ...}, as in its file


class TrainState(NamedTuple):
    """All that learning changes."""

    params: dict  # {"policy": ..., "value": ...}
    opt_state: optax.OptState
    return_stats: Stats  # of the discounted returns, scalars
    discounted: jax.Array  # [N]: discounted return of each running episode
    key: jax.Array


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Return Adam after clipping of the gradient's global norm; that of the values of the KL divergence ahead apart."""
    adam = optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(args.learning_rate, eps=1e-5))
    if not args.distill_future_coef:
        return adam
    # Beyond: values that are far off must not take the others' steps
    return optax.partition({"own": adam, "future": adam}, {"policy": "own", "value": "own", "future": "future"})


def init_state(args: Args, networks: Networks, observation_shape: tuple[int, ...]) -> TrainState:
    """Initialise a student from the seed alone."""
    key = jax.random.fold_in(jax.random.PRNGKey(args.seed), 1)  # not the weights that a teacher of this seed began with
    key, policy_key, value_key = jax.random.split(key, 3)
    x = jnp.zeros((1, *observation_shape), jnp.float32 if len(observation_shape) == 1 else jnp.uint8)
    params = {"policy": networks.policy.init(policy_key, x), "value": networks.value.init(value_key, x)}
    if args.distill_future_coef:  # Beyond: values of the KL divergence ahead
        params["future"] = networks.value.init(jax.random.fold_in(value_key, 1), x)
    return_stats = Stats(jnp.float32(0.0), jnp.float32(1.0), jnp.float32(1e-4))
    return TrainState(params, make_optimizer(args).init(params), return_stats, jnp.zeros(args.num_envs), key)


@partial(jax.jit, static_argnames=("num_steps", "shape", "states"))
def draw_noise(key: jax.Array, num_steps: int, shape: tuple[int, int], states: bool) -> tuple[jax.Array, jax.Array]:
    """Draw noise [T, N, A] for a rollout, normal for states, Gumbel for images; returns the next key, and the noise.

    One call draws all of it, because drawn step by step it costs as much as the network.
    """
    key, rollout_key = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rollout_key, jnp.arange(num_steps))
    return key, jax.vmap(jax.random.normal if states else jax.random.gumbel, (0, None))(keys, shape)


def replicated(num_devices: int) -> jax.sharding.NamedSharding:
    """Return how arrays lie that are whole on each device that shares the work: GPUs, or cores of a CPU."""
    return jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(jax.devices()[:num_devices]), "devices"), P())


def over_devices(num_devices: int) -> Callable:
    """Return shard_map over the devices that share the work."""
    return partial(jax.shard_map, mesh=replicated(num_devices).mesh, check_vma=False)


def part_size(network: Network, num_rows: int) -> int:
    """Return how many of so many rows go through a network at a time, a divisor; on a CPU images must fit the cache."""
    most = {"nature": 16, "impala": 1}.get(network.kind, num_rows) if jax.default_backend() == "cpu" else 512
    return max(n for n in range(1, min(most, num_rows) + 1) if num_rows % n == 0)


def apply_in_parts(num_devices: int, network: nn.Module, params: dict, x: jax.Array) -> Any:
    """Apply a network to x [T, N, ...], shared out over the devices along N, a part at a time."""

    def on_one_device(params, x):
        rows = x.reshape(-1, *x.shape[2:])
        size = part_size(network.network, len(rows))
        outputs = jax.lax.map(partial(network.apply, params), rows.reshape(-1, size, *rows.shape[1:]))
        return jax.tree.map(lambda y: y.reshape(*x.shape[:2], *y.shape[2:]), outputs)

    whole, split = P(), P(None, "devices")
    return over_devices(num_devices)(on_one_device, in_specs=(whole, split), out_specs=split)(params, x)


def mean_gradient(
    args: Args, loss_fn: Callable, params: dict, batch: Batch, indices: jax.Array
) -> tuple[dict, dict[str, jax.Array]]:
    """Average gradient and terms of loss_fn(params, part) over the samples of these indices [B] whose weight is 1.

    They are shared out over the devices; each takes a part at a time, and adds up.
    """
    total = jnp.maximum(batch.weights[indices].sum(), 1.0)

    def on_one_device(params, batch, indices):
        def add(sums, where):
            part = jax.tree.map(lambda x: x[where], batch)
            share = part.weights.sum() / total
            found = jax.grad(loss_fn, has_aux=True)(params, part)
            return jax.tree.map(lambda s, x: s + share * x, sums, found), None

        parts = indices.reshape(-1, part_size(args.network, len(indices)))
        _, terms = jax.eval_shape(loss_fn, params, jax.tree.map(lambda x: x[parts[0]], batch))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, terms))
        return jax.lax.psum(jax.lax.scan(add, zeros, parts)[0], "devices")

    return over_devices(args.num_devices)(
        on_one_device, in_specs=(P(), P(), P("devices")), out_specs=P())(params, batch, indices)


def sample_actions(
    num_devices: int, policy: Policy, params: dict, obs_stats: Stats | None, noise: jax.Array, observations: jax.Array,
    t: int,
) -> jax.Array:
    """Sample actions, [N, A] for raw states or [N] for images, with the noise [T, N, A] of step t."""
    if policy.network.kind == "mlp":
        mean, log_std = policy.apply(params, normalize(observations, obs_stats))
        return mean + jnp.exp(log_std) * noise[t]
    logits = apply_in_parts(num_devices, policy, params, observations[None])[0]
    return jnp.argmax(logits + noise[t], axis=-1)


# On a CPU acting on states takes one thread: few rows gain nothing from more, which wait where the simulator could run
act_on_states = jax.jit(sample_actions, static_argnames=("num_devices", "policy"),
                        compiler_options={"xla_cpu_multi_thread_eigen": False})
act_on_images = jax.jit(sample_actions, static_argnames=("num_devices", "policy"))


@partial(jax.jit, static_argnames="policy")
def act_deterministic(policy: Policy, params: dict, obs_stats: Stats | None, observations: jax.Array) -> jax.Array:
    """Return the most likely actions, [N, A] for raw states or [N] for images."""
    outputs = apply_in_parts(1, policy, params, normalize(observations, obs_stats)[None])
    return distribution(jax.tree.map(lambda x: x[0], outputs)).mode()


@partial(jax.jit, static_argnames="policy")
def act_sampled(policy: Policy, params: dict, key: jax.Array, observations: jax.Array, t: int) -> jax.Array:
    """Sample actions [N] for images, as evaluation on Procgen takes them; t: step of the evaluation."""
    logits = apply_in_parts(1, policy, params, observations[None])[0]
    return distribution(logits).sample(seed=jax.random.fold_in(key, t))


@partial(jax.jit, static_argnames=("args", "networks"), donate_argnames="state")
def update(
    args: Args, networks: Networks, teachers: tuple[dict, ...], state: TrainState, rollout: Rollout,
    distill_coef: tuple[float, ...],
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Learn from one rollout; returns the new state and the metrics, averaged over all minibatches."""
    rewards, terminations, truncations, phantoms = (jnp.asarray(x, jnp.float32) for x in rollout[2:])
    dones, weights = jnp.maximum(terminations, truncations), 1.0 - phantoms

    # The parameters are still those of the rollout: its values and log-probabilities need no call of each step
    apply = partial(apply_in_parts, args.num_devices)
    observations = normalize(rollout.observations, teachers[0]["obs_stats"])
    values = apply(networks.value, state.params["value"], observations)
    outputs = apply(networks.policy, state.params["policy"], observations[:-1])
    log_probs = distribution(outputs).log_prob(rollout.actions)

    def teach(observations):  # PPD: each teacher sees its own statistics
        for policy, teacher in zip(networks.teachers, teachers, strict=True):
            outputs = apply(policy, teacher["policy"], normalize(observations, teacher["obs_stats"]))
            if args.teacher_mean_clip:  # Beyond
                space = import_envpool().make_spec(args.env_id).gymnasium_action_space
                outputs = (jnp.clip(outputs[0], space.low, space.high), outputs[1])
            yield outputs

    teacher_outputs = tuple(teach(rollout.observations[:-1]))  # PPD: once, for all epochs

    discounted, sums = discount_forward(rewards, dones, state.discounted, args.gamma)
    return_stats = update_stats(state.return_stats, sums.reshape(-1), weights.reshape(-1))
    rewards = jnp.clip(rewards / jnp.sqrt(return_stats.var + 1e-8), -10.0, 10.0)
    advantages, returns = compute_gae(rewards, values, terminations, truncations, args.gamma, args.gae_lambda)
    future = None
    if args.distill_future_coef:  # Beyond: the KL divergence that an action leads to is a reward with values of its own
        pi = distribution(apply(networks.policy, state.params["policy"], observations[1:]))
        kls = [divergence(distribution(outputs), pi, args.kl_direction) for outputs in teach(rollout.observations[1:])]
        coefs, first = jnp.stack(distill_coef), np.broadcast_to(args.distill_coef, len(distill_coef))
        shares = jnp.where(coefs.sum() > 0, coefs, first if first.any() else 1.0)
        shares /= shares.sum()  # values are of the mean divergence: right while all λ fall alike, even to 0
        kl = sum(share * kl for share, kl in zip(shares, kls, strict=True))
        horizon = 1.0 / max(1.0 - args.gamma, 1e-3)  # steps; the network's values are means over so many, not sums
        rewards = -kl * (1.0 - terminations)
        future_values = horizon * apply(networks.value, state.params["future"], observations)
        ahead, future = compute_gae(rewards, future_values, terminations, truncations, args.gamma, args.gae_lambda)
        advantages += args.distill_future_coef * coefs.sum() * ahead
        future /= horizon

    batch = Batch(
        observations[:-1], rollout.actions, log_probs, advantages, returns, weights, teacher_outputs, future)
    batch = jax.tree.map(lambda x: x.reshape(args.batch_size, *x.shape[2:]), batch)
    optimizer = make_optimizer(args)

    def loss_fn(params, samples):
        outputs = networks.policy.apply(params["policy"], samples.observations)
        values = networks.value.apply(params["value"], samples.observations)
        loss, metrics = ppd_loss(outputs, values, samples, distill_coef, args.clip_coef, args.ent_coef, args.vf_coef,
                                 args.kl_direction, args.distill_weight)
        if args.distill_future_coef:  # Beyond
            errors = networks.value.apply(params["future"], samples.observations) - samples.future
            metrics["future_loss"] = weighted_mean(errors**2, samples.weights)
            metrics["loss"] = loss = loss + args.vf_coef * metrics["future_loss"]
        return loss, metrics

    def train_minibatch(carry, indices):
        params, opt_state = carry
        advantages = standardize(batch.advantages[indices], batch.weights[indices])
        standardized = batch._replace(advantages=batch.advantages.at[indices].set(advantages))
        grads, metrics = mean_gradient(args, loss_fn, params, standardized, indices)
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
    state = TrainState(params, opt_state, return_stats, discounted, key)
    return jax.lax.with_sharding_constraint(state, replicated(args.num_devices)), metrics


# ======================================================================================================================
# Files
# ======================================================================================================================

SCRIPT = Path(__file__).stem
FORMAT = "proximal-policy-distillation 3"
BEGIN = {"bytes": 0, "step": 0, "SPS": 0.0, "seconds": 0.0}  # what is known of the rows of progress.csv


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
                         "envpool": import_envpool().__version__, "device": jax.devices()[0].device_kind}}
        write_atomic(self.folder / "args.json", vars(args) | {"versions": self.about["versions"]})

        self.batch_size, self.began, self.compiled = args.batch_size, time.time() - self.logged["seconds"], None
        self.file = open(self.folder / "progress.csv", "a", newline="")
        self.file.seek(self.file.truncate(min(self.file.tell(), self.logged["bytes"])))
        # Not by SummaryWriter, whose thread would wait for ever where the disk is full
        self.events = EventsWriter(str(self.folder / "events"), f".{os.getpid()}")
        self.events.write_event(Event(step=self.logged["step"] + 1, session_log=SessionLog(status=SessionLog.START)))
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def log(self, global_step: int, metrics: dict[str, float]) -> None:
        """Log the update that ended at this environment step; the speed leaves out the first, which compiles."""
        seconds = time.time() - self.began
        self.compiled = self.compiled or (global_step, seconds)
        steps, elapsed = global_step - self.compiled[0], seconds - self.compiled[1]
        sps = steps / elapsed if steps else self.logged["SPS"] or global_step / seconds
        row = {"global_step": global_step, "seconds": round(seconds, 3), "charts/SPS": sps} | metrics
        table = csv.DictWriter(self.file, list(row))
        if self.file.tell() == 0:
            table.writeheader()
        table.writerow(row)
        self.file.flush()
        finite = {name: float(x) for name, x in row.items() if np.isfinite(x)}  # no return before an episode's end
        for name, value in finite.items():
            self.events.write_event(Event(wall_time=time.time(), step=global_step, summary=scalar(name, value)))
        self.events.flush()
        if self.tracker is not None:
            self.tracker.log(finite, step=global_step, commit=True)  # W&B leaves out a step that it has had
        self.logged |= {"bytes": self.file.tell(), "step": global_step, "SPS": sps, "seconds": seconds}

    def save(self, updates: int, state: TrainState, finished: deque, teacher: Teacher) -> None:
        """Save all that --resume needs, but for the simulator's own state, which cannot be saved; two files stay."""
        os.fsync(self.file.fileno())  # rows are on the disk before a checkpoint counts on them
        about = {"updates": updates, "finished": list(finished), "logged": self.logged, "teacher": teacher.about}
        path = self.folder / f"checkpoint_{updates * self.batch_size:012d}.safetensors"
        save_file(path, self.about | about, {"state": state, "teacher": teacher.params})
        for old in sorted(self.folder.glob("checkpoint_*.safetensors"))[:-2]:
            old.unlink()

    def on_signal(self, number: int, frame: Any) -> None:
        """Take SIGINT or SIGTERM: an update ends and is saved, all else stops at once; so does all at a second one."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.signal = number
        if self.file.closed:  # nothing is learned any more
            self.stop()

    def stop(self) -> NoReturn:
        """End the program for the signal that came."""
        resume = shlex.join(["python", f"{SCRIPT}.py", "--resume", str(self.folder)])
        print(f"\ninterrupted; go on with: {resume}", file=sys.stderr)
        raise SystemExit(128 + self.signal)

    def close(self) -> None:
        """Close all files."""
        self.file.close()
        self.events.close()
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


def goal_of(about: dict) -> float:
    """Return the mean return of a teacher's evaluation, on Procgen that on the levels of training."""
    return about["evaluation"].get("train_levels", about["evaluation"])["mean"]


def read_network(found: dict) -> Network:
    """Return the network that a file describes; raises an exception of any kind if it does not describe one."""
    found = Network._field_defaults | found  # older files say less
    return Network(**{name: tuple(found[name][:MAX_LAYERS]) if isinstance(found[name], list) else found[name]
                      for name in Network._fields})


def make_teacher(args: Args, env_id: str, about: dict, arrays: dict[str, np.ndarray], prefix: str) -> Teacher:
    """Make the policy of one teacher for a task; ValueError if the content of its file is not what it says.

    prefix: of the names of its arrays, in a checkpoint.
    """
    suite = suite_of(env_id)
    network = read_network(about["network"])
    kind, channels = network.kind, network.channels
    if kind not in {network.kind for network in NETWORKS[suite].values()} or len(channels) > 3:
        raise ValueError(f"its network, {kind} with {len(channels)} convolutions, is none of {env_id}")
    policy = Policy(network, about["action_dim"])
    x = jax.ShapeDtypeStruct(tuple(about["observation_shape"]), jnp.float32 if kind == "mlp" else jnp.uint8)
    params = {"policy": fill(jax.eval_shape(policy.init, jax.random.PRNGKey(0), x), arrays, prefix + "policy"),
              "obs_stats": None}
    if kind == "mlp":
        params["obs_stats"] = fill(Stats(x, x, jax.ShapeDtypeStruct((), jnp.float32)), arrays, prefix + "obs_stats")
    variant = {name: about["variant"][name] if getattr(args, name, None) is None else getattr(args, name)
               for name in VARIANTS[suite]}
    if not isinstance(variant.get("contact_forces", True), bool):
        raise ValueError(f"its task was played with {variant}")
    return Teacher(about | {"env_id": env_id, "variant": variant}, policy, params)


def load_teachers(
    args: Args, saved: dict | None = None, arrays: dict[str, np.ndarray] | None = None
) -> tuple[Teacher, ...]:
    """Make the policies of a resumed run's teachers, of --teacher, or of the task's shipped one.

    End the program if there is no such file, if it is not what it says, or if it does not fit the task or the flags.
    """
    env_id, decay, teachers = args.env_id or (None if args.teacher else "Hopper-v4"), args.distill_coef_decay, []
    shipped = Path(__file__).parent / f"teachers/{env_id}__100.safetensors"
    if env_id:
        suite_of(env_id)
    if not (args.teacher or saved or shipped.exists()):
        fail(f"there is no {shipped}; train a teacher by `python train_teacher.py --env-id {env_id}` and name its file "
             "with --teacher")
    for k, path in enumerate(args.teacher or (shipped,)):
        path = args.resume or path
        with checked(f"{path} is no teacher"):
            about, own = (saved["teacher"][k], arrays) if saved else read_file(path)
            env_id = env_id or about["env_id"]
            if (found := (about["observation_shape"], about["action_dim"])) != (needed := task_shape(env_id)):
                fail(f"{path} is for observations and actions of {found}; those of {env_id} are {needed}")
            teacher = make_teacher(args, env_id, about, own, f"teacher/{k}/" if saved else "")
            if about["env_id"] != env_id:
                if decay == "return":
                    fail(f"--distill-coef-decay return needs teachers of {env_id}; {path} is of {about['env_id']}")
                print(f"{path} is a teacher of {about['env_id']}, a prior of skills for {env_id}", file=sys.stderr)
            goal = goal_of(about)
            if decay == "return" and not 0 < goal < math.inf:
                fail(f"--distill-coef-decay return needs a teacher of positive return; that of {path} is {goal}")
            if decay == "return" and teacher.about["variant"].items() - about["variant"].items():
                fail(f"--distill-coef-decay return needs the task as {path} was evaluated on it: {about['variant']}")
        teachers.append(teacher)
        first, other = teachers[0].about["variant"], teacher.about["variant"]
        # Contact forces matter on Humanoid alone
        if first != other and (env_id.startswith("Humanoid") or "contact_forces" not in first):
            fail(f"{path} plays with {other}, the first teacher with {first}")
    return tuple(teachers)


# ======================================================================================================================
# Evaluation
# ======================================================================================================================


def evaluate(envs: Any, policy_step: Callable) -> dict[str, Any]:
    """Play one episode in each of N environments; returns their sums of raw rewards, undiscounted, mean and deviation.

    Each environment's first episode counts, or short ones would crowd out long; policy_step(observations, t) acts.
    games: how many different episodes there were, since few things vary in some tasks; a standard error rests on those.
    """
    observations, t = reset(envs), 0
    returns, running = np.zeros(len(observations)), np.ones(len(observations), bool)
    histories = [0] * len(observations)
    bar = trange(len(observations), desc="evaluation", unit="episode", leave=False, disable=None)  # on a terminal only
    while running.any():
        histories = [zlib.crc32(x, h) if on else h for x, h, on in zip(observations, histories, running, strict=True)]
        observations, rewards, _, _, ends = step(envs, np.asarray(policy_step(observations, t)))
        returns += np.where(running, rewards, 0.0)
        bar.update(int((running & ends).sum()))
        running &= ~ends
        t += 1
    bar.close()
    envs.close()
    return {"mean": float(returns.mean()), "std": float(returns.std()), "games": len(set(histories)),
            "returns": returns.tolist()}


def assess(args: Args, variant: dict, policy: Policy, params: dict) -> dict[str, Any]:
    """Evaluate a policy as in the paper, in environments of their own seeds: likeliest actions, but sampled on Procgen.

    On Procgen on unseen levels, and apart from them on those of training; on Atari with the human-normalised score.
    """
    suite, key, found = suite_of(args.env_id), jax.random.PRNGKey(args.seed), {}
    for split in ("evaluation", "train_levels") if suite == "procgen" else ("evaluation",):
        envs = make_envs(args.env_id, args.eval_episodes, EVAL_SEED + args.seed, variant, split)
        found[split] = evaluate(envs, lambda x, t: (
            act_sampled(policy, params["policy"], key, x, t) if suite == "procgen"
            else act_deterministic(policy, params["policy"], params["obs_stats"], x)))
    result = found.pop("evaluation") | found
    random, human = HUMAN.get(args.env_id.split("-")[0], (None, None)) if suite == "atari" else (None, None)
    return result if human is None else result | {"human_normalised": (result["mean"] - random) / (human - random)}


def finish(args: Args, run: Run, players: dict, teacher: Teacher) -> dict[str, float]:
    """Evaluate all players on the same games, write student.safetensors and results.json, and print the outcome.

    players: policy and parameters of each by name. Returns the means and the ratio.
    """
    results = {name: assess(args, teacher.about["variant"], *player) for name, player in players.items()}
    numbers = {name: found["mean"] for name, found in results.items()}
    ratio = numbers["student"] / numbers["teacher"] if numbers["teacher"] > 0 else None  # of losses it says nothing
    numbers |= {"ratio": math.nan if ratio is None else ratio} | {name: run.logged[name] for name in ("SPS", "seconds")}
    network = args.network._asdict()
    model = teacher.about | run.about | {"role": "student", "network": network, "evaluation": results["student"]}
    save_file(run.folder / "student.safetensors", model, players["student"][1])
    write_atomic(run.folder / "results.json", run.about | {"network": network} | numbers | {"ratio": ratio} | results)
    for name, found in results.items():
        levels = f"; {found['train_levels']['mean']:,.1f} on training levels" if "train_levels" in found else ""
        print(f"{name.replace('_', ' '):<18} {found['mean']:>10,.1f} ± {found['std']:,.1f} "
              f"({args.eval_episodes} episodes, {found['games']} of them different{levels})")
    for name in ("ratio", "SPS", "seconds"):
        print(f"{name:<18} {numbers[name]:>10,.3f}")
    print(f"{'files':<18} {run.folder}")
    return numbers


# ======================================================================================================================
# Command line
# ======================================================================================================================

# Smallest and largest value of a flag, or of each of its numbers
RANGES = {
    "total_timesteps": (1, 10**12), "num_envs": (1, 10**5), "num_steps": (1, 10**6), "num_minibatches": (1, 10**9),
    "num_devices": (1, 10**4), "update_epochs": (1, 10**6), "checkpoint_every": (1, 10**9), "seed": (0, 10**9 - 1),
    "eval_episodes": (1, 10**5), "teacher_noise_seed": (0, 2**32 - 1), "learning_rate": (0, 1e3), "gamma": (0, 1.0),
    "gae_lambda": (0, 1.0), "clip_coef": (0, 1.0), "ent_coef": (0, 1e6), "vf_coef": (0, 1e6),
    "max_grad_norm": (1e-9, 1e9), "distill_coef": (0, 1e6), "distill_coef_final": (0, 1e6),
    "distill_future_coef": (0, 1e6), "teacher_noise_std": (0, 1e6), "frame_skip": (1, 100),
    "repeat_action_probability": (0, 1.0), "start_level": (0, 10**9), "num_levels": (1, 10**9),
    "student_channels": (1, 65_536), "student_hidden": (1, 65_536),
}
MAX_LAYERS = 64
RESUMABLE = ("resume", "total_timesteps", "device", "num_devices", "checkpoint_every", "eval_episodes", "track",
             "wandb_project_name", "wandb_entity")  # flags that may change when a run goes on


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
    suite = suite_of(args.env_id)
    paper = {"gamma": 0.995 if args.env_id.startswith(("Hopper", "Swimmer")) else 0.999,
             "eval_episodes": 200 if suite == "procgen" else 50}
    args = dataclasses.replace(args, **{name: value for name, value in paper.items() if getattr(args, name) is None})
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if value is not None and not all(isinstance(x, int | type(high)) and low <= x <= high for x in numbers):
            fail(f"--{name.replace('_', '-')} must lie between {low:.10g} and {high:.10g}, not {value}")
    if not 1 <= len(args.network.hidden) <= MAX_LAYERS:
        fail(f"a network has 1 to {MAX_LAYERS} hidden layers, not {len(args.network.hidden)}")
    if suite == "mujoco" and args.student_channels is not None:
        fail(f"--student-channels is for networks of images; {args.env_id} has states")
    for name in sum(VARIANTS.values(), ()):
        if name not in VARIANTS[suite] and getattr(args, name, None) != getattr(Args, name, None):
            fail(f"--{name.replace('_', '-')} is not for {args.env_id}")
    if suite != "mujoco" and args.teacher_mean_clip:
        fail(f"--teacher-mean-clip is for continuous actions; those of {args.env_id} are not")
    several = max(1, len(args.teacher))
    if np.shape(args.distill_coef) not in ((1,), (several,)):
        fail("--distill-coef takes 1 number" + f" or {several}, as many as teachers" * (several > 1))
    if args.distill_coef_final is not None and args.distill_coef_decay != "none":
        fail("--distill-coef-final and --distill-coef-decay exclude each other")
    if args.num_minibatches is None:
        fewest, most = -(-args.batch_size // 512), max(1, args.batch_size // 64)  # of 512 to 64 samples
        divisors = (k for k in range(fewest, most + 1) if args.batch_size % k == 0)
        args = dataclasses.replace(args, num_minibatches=next(divisors, fewest))
    if args.batch_size % args.num_minibatches or args.batch_size < 2 * args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} does not divide a rollout of {args.num_envs} environments x "
             f"{args.num_steps} steps = {args.batch_size} samples into equal parts of at least 2")
    samples, found = args.batch_size // args.num_minibatches, len(jax.devices())
    if args.num_devices is None:
        shared = math.gcd(args.num_envs, samples)
        most = 1 if suite == "mujoco" and jax.default_backend() == "cpu" else found
        args = dataclasses.replace(args, num_devices=max(n for n in range(1, most + 1) if shared % n == 0))
    if args.num_devices > found or args.num_envs % args.num_devices or samples % args.num_devices:
        fail(f"--num-devices {args.num_devices} is more than the {found} that JAX finds, or does not divide "
             f"{args.num_envs} environments and a minibatch of {samples} samples")
    if args.resume is None and args.run_dir is not None and os.path.exists(args.run_dir):
        fail(f"--run-dir {args.run_dir} exists; name another folder, or go on with --resume {args.run_dir}")
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track needs Weights & Biases: pip install wandb")
    if args.device == "gpu" and jax.default_backend() == "cpu":
        fail("--device gpu: JAX finds no GPU; pip install 'jax[cuda12]', or use --device cpu")
    return args


# ======================================================================================================================
# Main
# ======================================================================================================================


def warn_if_slow(args: Args, first: int, policy: Policy, params: dict, observations: np.ndarray) -> None:
    """Say at once if learning from images will take hours, as there is no GPU: at 5e10 operations a second and core.

    first: updates that are done; params: of the policy, whose passes and the value's cost the same; observations:
    [N, ...], of any task.
    """
    if jax.default_backend() != "cpu" or observations.dtype != np.uint8:
        return
    operations = jax.jit(policy.apply).lower(params, observations[:1]).cost_analysis()["flops"]
    passes = 4 + 6 * args.update_epochs  # acting, teacher, log-probabilities, values; gradients cost 3
    steps = args.total_timesteps - first * args.batch_size
    hours = steps * passes * operations / (5e10 * args.num_devices) / 3600
    if hours > 3:
        hint = "" if args.student_size == "smaller" else "; try --student-size smaller"
        print(f"without a GPU this takes about {hours:.0f} hours{hint}", file=sys.stderr)


def check_finite(metrics: dict[str, float], iteration: int, folder: Path) -> None:
    """End the run when a loss, the gradient or a parameter is NaN or infinite; the checkpoints stay as they were."""
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise SystemExit(f"error: update {iteration} gave {name} = {value}; the last good state is in {folder}")


def main(args: Args) -> dict[str, float]:
    """Distil a student and evaluate it beside its teachers; returns the single numbers of results.json."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # acting is waited for: handing it over only costs time
    with suppress(RuntimeError):  # a process that has computed already has its devices
        jax.config.update("jax_num_cpu_devices", max(1, min(args.num_devices or count_cores(), args.num_envs)))
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    saved, arrays = load_checkpoint(args.resume) if args.resume else (None, {})
    teachers = load_teachers(args, saved, arrays)
    teacher, everyone = teachers[0], Teacher(*zip(*teachers, strict=True))  # of which each field is a tuple
    flags = {name: value for name, value in teacher.about["variant"].items() if name in RANGES}
    args = resolve(dataclasses.replace(args, env_id=teacher.about["env_id"], **flags))
    noisy = (corrupt(each.params["policy"], args.teacher_noise_std, args.teacher_noise_seed + k)
             for k, each in enumerate(teachers))
    taught = tuple(each.params | {"policy": policy} for each, policy in zip(teachers, noisy, strict=True))
    goals = [goal_of(each.about) for each in teachers]

    first = saved["updates"] if saved else 0
    seed = (args.seed + first * args.num_envs) % EVAL_SEED  # going on, it plays new games
    envs = make_envs(args.env_id, args.num_envs, seed, teacher.about["variant"], "training")
    states, action_dim = args.network.kind == "mlp", teacher.policy.action_dim
    networks = Networks(Policy(args.network, action_dim), Value(args.network), everyone.policy)
    act = act_on_states if states else act_on_images
    state, cursor = init_state(args, networks, envs.observation_space.shape), start(envs)
    if saved:
        with checked(f"{args.resume} holds no state of this run"):
            state = fill(state, arrays, "state")
            cursor.finished.extend(map(float, saved["finished"]))
        state = state._replace(discounted=jnp.zeros(args.num_envs))  # its episodes are gone with the simulator
        print(saved["note"], file=sys.stderr)
    warn_if_slow(args, first, networks.policy, state.params["policy"], cursor.observations)
    state = jax.device_put(state, replicated(args.num_devices))  # as `update` returns it, or that would compile twice

    run = Run(args, saved)
    bar = trange(first + 1, args.num_updates + 1, initial=first, total=args.num_updates, desc=args.env_id,
                 unit="update", mininterval=0.5 if sys.stderr.isatty() else 60.0)
    with closing(run), bar:
        run.save(first, state, cursor.finished, everyone)  # going on, with the flags that have changed
        for iteration in bar:
            # Collect
            key, noise = draw_noise(state.key, args.num_steps, (args.num_envs, action_dim), states)
            policy_step = partial(
                act, args.num_devices, networks.policy, state.params["policy"], teacher.params["obs_stats"], noise)
            rollout = collect(envs, cursor, policy_step, args.num_steps)
            episodic_return = np.mean(cursor.finished) if cursor.finished else math.nan

            # Update
            fraction = (iteration - 1) / max(1, args.num_updates - 1)
            distill_coef = distill_coef_at(args, fraction, episodic_return, goals)  # PPD
            state, metrics = update(args, networks, taught, state._replace(key=key), rollout, distill_coef)
            metrics = numbered("charts/distill_coef", distill_coef) | {name: float(x) for name, x in metrics.items()}
            check_finite(metrics, iteration, run.folder)

            # Log
            run.log(iteration * args.batch_size, {"charts/episodic_return": episodic_return} | metrics)
            bar.set_postfix_str(f"return {episodic_return:.0f}, KL {metrics['losses/teacher_kl']:.3f}", refresh=False)

            # Save
            interrupted = run.signal is not None
            if interrupted or iteration % args.checkpoint_every == 0 or iteration == args.num_updates:
                run.save(iteration, state, cursor.finished, everyone)
            if interrupted:
                run.stop()
    if run.signal is not None:  # it came while the last checkpoint was saved
        run.stop()
    envs.close()
    student = teacher.params | jax.device_get(state.params)
    players = {"student": (networks.policy, student)}
    players |= numbered("teacher", [(each.policy, each.params) for each in teachers])
    if args.teacher_noise_std:
        players |= numbered("corrupted_teacher", zip(everyone.policy, taught, strict=True))
    return finish(args, run, players, teacher)


if __name__ == "__main__":
    try:
        main(parse_args())
    except KeyboardInterrupt:  # before training
        raise SystemExit(130) from None
    except BrokenPipeError:  # who read the output has gone: --help | head
        raise SystemExit(1) from None
    except OSError as error:  # a full disk
        raise SystemExit(f"error: {error}; go on from the last checkpoint with --resume") from None
