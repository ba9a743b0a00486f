"""Student-distill on Atari, MuJoCo or Procgen: a student acts, and learns what its teacher would have done.

    python student_distill.py --env-id Hopper-v4 --student-size larger

Each iteration collects a few steps with the student, sampling its actions, and takes one gradient step on all of them:

    minimises  E[ KL(teacher || student) - α entropy ] + E[ (V(s) - V_teacher(s))² ].

Rewards play no part. This is one of the two baselines of PPD; teacher_distill.py differs in who acts. Source: Spigler,
"Proximal Policy Distillation", TMLR 2025 (arXiv 2407.15134), Algorithm 2 and appendix A.3.
"""

import csv
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import operator
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
import tyro
from flax import serialization
from tensorboardX import SummaryWriter
from tqdm import tqdm

# ======================================================================================================================
# Arguments
# ======================================================================================================================


class Network(NamedTuple):
    """What a network is made of: convolutions, unless it is an MLP, then hidden layers."""

    kind: Literal["mlp", "nature", "impala"]
    channels: tuple[int, ...]
    hidden: tuple[int, ...]


CONVOLUTIONAL = {
    "smaller": Network("nature", (32, 64, 64), (64,)),
    "same": Network("impala", (16, 32, 32), (256,)),
    "larger": Network("impala", (32, 64, 64), (1024,)),
}
NETWORKS = {
    "atari": CONVOLUTIONAL,
    "mujoco": {name: Network("mlp", (), hidden)
               for name, hidden in {"smaller": (128, 64), "same": (256, 256), "larger": (512, 512)}.items()},
    "procgen": CONVOLUTIONAL,
}


class Variant(NamedTuple):
    """How a task is played."""

    frame_skip: int | None  # Atari
    start_level: int | None  # Procgen
    num_levels: int | None  # Procgen
    contact_forces: bool | None = None  # Humanoid


@dataclass(frozen=True)
class Task:
    """What is learned, and where."""

    env_id: str | None = None
    """task, by envpool's name: an Atari game (Pong-v5, ...), a Gym MuJoCo task (Hopper-v4, ...) or a Procgen game
    (CoinrunEasy-v0, ...); by default the teacher's, and Hopper-v4 where no teacher is named either"""
    seed: int = 100
    """seed of networks, actions, minibatches and environments (the paper's: 100, 200, 300, 400, 500); environment i
    takes seed + i, so seeds of one study should lie further apart than --num-envs and --eval-episodes"""
    total_timesteps: int = 2_000_000
    """environment steps in all, rounded up to whole rollouts; envpool's reset steps count, as everywhere"""
    frame_skip: int | None = None
    """frames for which each action is repeated (Atari); by default as many as the teacher learned with"""
    start_level: int | None = None
    """first level to learn on (Procgen); by default the teacher's"""
    num_levels: int | None = None
    """levels to learn on (Procgen); all later ones are for the test; by default as many as the teacher learned on"""
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
    """networks of the student; of states: an MLP of 128-64, 256-256 (the paper's teachers) or 512-512 units; of images:
    Nature-CNN with 64 units, IMPALA-CNN with 16, 32, 32 filters and 256 units (the paper's teachers), or IMPALA-CNN
    with 32, 64, 64 filters and 1024 units"""
    student_channels: tuple[int, int, int] | None = None
    """filters of the student's three convolutions (Nature-CNN) or stages (IMPALA-CNN); overrides --student-size"""
    student_hidden: tuple[int, ...] | None = None
    """widths of the student's hidden layers; overrides --student-size"""
    kl_direction: Literal["forward", "reverse"] = "forward"
    """KL(teacher || student), the paper's, or KL(student || teacher)"""
    teacher_noise_std: float = 0.0
    """standard deviation of Gaussian noise on every parameter of the teacher's policy (the paper's σ, there 0.05)"""
    teacher_noise_seed: int = 0
    """seed of that noise"""


@dataclass(frozen=True)
class Regression:
    """How the student learns."""

    learning_rate: float = 3e-4
    """step size of Adam, constant"""
    num_envs: int = 18
    """environments stepped in parallel (N)"""
    num_steps: int = 5
    """steps of each environment in a rollout (T)"""
    ent_coef: float = 0.0
    """weight of the entropy bonus (α)"""
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
    checkpoint_every: int = 2000
    """updates between checkpoints"""
    log_every: int = 100
    """updates between rows of progress.csv, each with their means"""
    eval_episodes: int | None = None
    """episodes of the final evaluation, with raw rewards; the paper's: 50 with deterministic actions, but 200 with
    sampled ones on Procgen"""
    track: bool = False
    """log to Weights & Biases as well (pip install wandb)"""
    wandb_project_name: str = "ppd"
    """project to log to"""
    wandb_entity: str | None = None
    """team to log to"""


@dataclass(frozen=True)
class Args(Output, Regression, Distillation, Task):
    """All flags; the command line groups them by the classes above."""

    @property
    def network(self) -> Network:
        """The student's networks (appendix A.3, with the smaller convolutional one of Table 4)."""
        network = NETWORKS[suite_of(self.env_id)][self.student_size]
        channels = network.channels if self.student_channels is None else self.student_channels
        return Network(network.kind, channels, network.hidden if self.student_hidden is None else self.student_hidden)

    @property
    def variant(self) -> Variant:
        """How the task is played."""
        return Variant(self.frame_skip, self.start_level, self.num_levels, self.contact_forces)

    @property
    def batch_size(self) -> int:
        """Samples of a rollout, N*T."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Rollouts of the run, each followed by one update."""
        return -(-self.total_timesteps // self.batch_size)


# Flags that must lie in a range, both ends included
RANGES = {
    "total_timesteps": (1, 10**12), "num_envs": (1, 10**5), "num_steps": (1, 10**6), "checkpoint_every": (1, 10**9),
    "log_every": (1, 10**9), "eval_episodes": (1, 10**5), "seed": (0, 10**9 - 1), "teacher_noise_seed": (0, 2**32 - 1),
    "learning_rate": (0, 1e3), "ent_coef": (0, 1e6), "vf_coef": (0, 1e6), "max_grad_norm": (1e-9, 1e9),
    "frame_skip": (1, 100), "start_level": (0, 10**9), "num_levels": (1, 10**9), "teacher_noise_std": (0, 1e6),
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
    suite = suite_of(args.env_id)
    if args.eval_episodes is None:
        args = dataclasses.replace(args, eval_episodes=200 if suite == "procgen" else 50)
    for name, (low, high) in RANGES.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} must lie between {low:g} and {high:g}, not {value}")
    if args.contact_forces is not None and not args.env_id.startswith("Humanoid"):
        fail(f"--contact-forces is for Humanoid, not for {args.env_id}")
    if suite == "mujoco" and args.student_channels is not None:
        fail(f"--student-channels is for networks of images; {args.env_id} has states")
    layers = args.network.channels + args.network.hidden
    if not 1 <= len(args.network.hidden) <= MAX_LAYERS or not all(1 <= width <= 65_536 for width in layers):
        fail(f"a network has 1 to {MAX_LAYERS} hidden layers, and all of 1 to 65536 units, not {layers}")
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

SUITES = {"envpool.atari": "atari", "envpool.mujoco.gym": "mujoco", "envpool.procgen": "procgen"}
EVAL_SEED = 10**9  # what evaluation adds to the seed of its environments, so that it plays other games than training

# Scores of a random and of a human player (Badia et al. 2020), for human-normalised scores
HUMAN = {
    "Atlantis": (12850.0, 29028.1), "BeamRider": (363.9, 16926.5), "CrazyClimber": (10780.5, 35829.4),
    "DemonAttack": (152.1, 1971.0), "Enduro": (0.0, 860.5), "Freeway": (0.0, 29.6), "MsPacman": (307.3, 6951.6),
    "Pong": (-20.7, 14.6), "Qbert": (163.9, 13455.0), "Seaquest": (68.4, 42054.7), "Zaxxon": (32.5, 9173.3),
}


def import_envpool() -> Any:
    """Imports envpool only when it is needed: that is slow, and fails where a system library is missing."""
    try:
        import envpool
    except ImportError as error:
        fail(f"envpool cannot be imported ({error}); on Debian: apt-get install libegl1 libopengl0")
    return envpool


def suite_of(env_id: str) -> str:
    """The suite of a task: atari, mujoco or procgen; ends the program for other tasks, naming those like it."""
    specs = import_envpool().registration.registry.specs  # of each task by name: the module it lies in, and more
    known = {name: SUITES[module] for name, (module, *_) in specs.items() if module in SUITES}
    if env_id not in known:
        near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.3)
        fail(f"unknown task {env_id}; did you mean {', '.join(near or ('Pong-v5', 'Hopper-v4', 'CoinrunEasy-v0'))}?")
    return known[env_id]


def task_shape(env_id: str) -> tuple[list[int], int]:
    """Shape of an observation, and the number of actions, or of their dimensions; makes no environment."""
    try:
        spec = import_envpool().make_spec(env_id)
    except ImportError:
        fail(f"{env_id} needs Qt, which envpool's Procgen draws with; on Debian: apt-get install libqt5gui5")
    space = spec.gymnasium_action_space
    return list(spec.gymnasium_observation_space.shape), int(space.shape[0] if space.shape else space.n)


Split = Literal["training", "evaluation", "train_levels"]


def task_options(env_id: str, split: Split, variant: Variant) -> dict[str, Any]:
    """envpool's options for a split of a task.

    Atari: 84x84 grey images, the last four of them; a game ends after half an hour, 108,000 frames; in training a lost
    life ends an episode, but not the game. Procgen: 64x64 coloured images of num_levels levels from start_level on, but
    in evaluation of all later ones; train_levels evaluates on those of training. Humanoid: without contact forces the
    84 numbers that give them in an observation are 0, as they are in envpool's Humanoid-v4 unless it is told otherwise.
    """
    suite, (frame_skip, first, levels, contact_forces) = suite_of(env_id), variant
    if suite == "atari":
        return {"frame_skip": frame_skip, "max_episode_steps": 108_000 // frame_skip,
                "episodic_life": split == "training"}
    if suite == "procgen" and split == "evaluation":
        return {"start_level": first + levels, "num_levels": 2**31 - 1 - first - levels}
    if suite == "procgen":
        return {"start_level": first, "num_levels": levels}
    return {"post_constraint": bool(contact_forces)} if env_id.startswith("Humanoid") else {}


def make_envs(env_id: str, num_envs: int, seed: int, split: Split, variant: Variant) -> Any:
    """Vectorised environments; the seed is given here because envpool ignores reset(seed=)."""
    options = task_options(env_id, split, variant)
    try:
        return import_envpool().make_gymnasium(env_id, num_envs=num_envs, seed=seed, **options)
    except ImportError:
        fail(f"{env_id} needs Qt, which envpool's Procgen draws with; on Debian: apt-get install libqt5gui5")


def as_stored(observations: np.ndarray) -> np.ndarray:
    """States [N, D] as float32; images [N, C, H, W] stay uint8."""
    return observations if observations.dtype == np.uint8 else observations.astype(np.float32)


def reset(envs: Any) -> np.ndarray:
    """The first observations of all environments."""
    return as_stored(envs.reset()[0])


def step(envs: Any, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Observations, and rewards, terminations, truncations and ends of whole games, [N] each.

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


def torso(network: Network, x: jax.Array) -> jax.Array:
    """Features [..., F] of normalised states [..., D], or of images [..., C, H, W], uint8.

    An MLP, Nature-CNN (Mnih et al. 2015) or IMPALA-CNN (Espeholt et al. 2018). Called inside a module's __call__, whose
    layers these become.
    """
    orthogonal = nn.initializers.orthogonal(np.sqrt(2))
    if network.kind != "mlp":
        x = jnp.moveaxis(x, -3, -1).astype(jnp.float32) / 255.0
    if network.kind == "nature":
        for channels, size, stride in zip(network.channels, (8, 4, 3), (4, 2, 1), strict=True):
            x = nn.relu(nn.Conv(channels, (size, size), stride, "VALID", kernel_init=orthogonal)(x))
    if network.kind == "impala":
        ours = (lambda x, kernel, *_, **__: convolve(x, kernel)) if jax.default_backend() == "cpu" else None
        conv = partial(nn.Conv, kernel_size=(3, 3), kernel_init=orthogonal, conv_general_dilated=ours)
        for channels in network.channels:
            x = max_pool(conv(channels)(x))
            for _ in range(2):
                y = conv(channels)(nn.relu(x))
                x = x + conv(channels)(nn.relu(y))
        x = nn.relu(x)
    if network.kind != "mlp":
        x = x.reshape(*x.shape[:-3], -1)
    for width in network.hidden:
        x = nn.relu(nn.Dense(width, kernel_init=orthogonal)(x))
    return x


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of x [B, H, W, C] with a kernel [3, 3, C, F], stride 1, zeros around: XLA's, but for its gradient.

    XLA's is slow on a CPU. The sum over shifted copies of x, as one matrix product for a few images at a time, so that
    they stay in the cache, is the same gradient sooner. On a GPU it is not used.
    """
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def convolve_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The convolution, and what its gradient needs."""
    return convolve(x, kernel), (x, kernel)


def convolve_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gradients in x and in the kernel, from that in the output [B, H, W, F]."""
    x, kernel = saved
    size, height, width = max(k for k in range(1, 13) if len(x) % k == 0), *x.shape[1:3]

    def add(total, part):
        x, gradient = part
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = jnp.concatenate([x[:, i: i + height, j: j + width] for i in range(3) for j in range(3)], axis=-1)
        return total + jnp.tensordot(shifted, gradient, ((0, 1, 2), (0, 1, 2))).reshape(kernel.shape), None

    parts = jax.tree.map(lambda y: y.reshape(-1, size, *y.shape[1:]), (x, gradient))
    in_kernel, _ = jax.lax.scan(add, jnp.zeros_like(kernel), parts)
    return convolve(gradient, kernel[::-1, ::-1].swapaxes(2, 3)), in_kernel


convolve.defvjp(convolve_forward, convolve_backward)


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 3x3 windows of x [..., H, W, C], stride 2, with a border of 1: sizes 84, 42, 21, 11.

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
        """x as in `torso`. Returns mean and log standard deviation, both [..., A], or logits [..., A]."""
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


def normalize(observations: jax.Array, stats: Stats | None) -> jax.Array:
    """States [..., D] less their running mean, over their running standard deviation, clipped to ±10; images as is."""
    if stats is None:
        return observations
    return jnp.clip((observations - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)


def weighted_mean(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Mean of x [B] over the samples whose weight [B] is 1."""
    return (x * weights).sum() / jnp.maximum(weights.sum(), 1.0)


class Batch(NamedTuple):
    """Samples of a rollout; the leading axis is [B], or none for a single sample."""

    weights: jax.Array  # [B]: 0 for a phantom transition, else 1
    teacher: Any  # the teacher policy's outputs, [B, A] (each)
    teacher_values: jax.Array  # [B]


def distill_terms(outputs: Any, value: jax.Array, sample: Batch, kl_direction: str) -> dict[str, jax.Array]:
    """The terms of one sample's loss (Algorithms 2 and 3), as scalars.

    outputs: the student policy's, [A] (each); value: the student's, [].
    """
    pi, teacher = distribution(outputs), distribution(sample.teacher)
    return {
        "teacher_kl": teacher.kl_divergence(pi) if kl_direction == "forward" else pi.kl_divergence(teacher),
        "entropy": pi.entropy(),
        "value_loss": (value - sample.teacher_values) ** 2,
    }


def distill_loss(
    outputs: Any, values: jax.Array, batch: Batch, ent_coef: float, vf_coef: float, kl_direction: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a rollout and its terms, averaged over the samples whose weight is 1.

    outputs: the student policy's, [B, A] (each); values: the student's, [B].
    """
    terms = jax.vmap(partial(distill_terms, kl_direction=kl_direction))(outputs, values, batch)
    terms = {name: weighted_mean(term, batch.weights) for name, term in terms.items()}
    loss = terms["teacher_kl"] - ent_coef * terms["entropy"] + vf_coef * terms["value_loss"]
    return loss, {"loss": loss} | terms


# ======================================================================================================================
# Jitted steps
# ======================================================================================================================


class Networks(NamedTuple):
    """The flax modules; they hold no parameters."""

    policy: Policy
    value: Value
    teacher: Policy
    teacher_value: Value


class Frozen(NamedTuple):
    """A policy that does not learn: its parameters, and the statistics of the states it stands on."""

    params: dict
    obs_stats: Stats | None


class TrainState(NamedTuple):
    """All that learning changes."""

    params: dict  # {"policy": ..., "value": ...}
    opt_state: optax.OptState
    key: jax.Array


def make_optimizer(args: Args) -> optax.GradientTransformation:
    """Adam, after clipping the global norm of the gradient."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.adam(args.learning_rate, eps=1e-5))


def init_state(args: Args, networks: Networks, observation_shape: tuple[int, ...]) -> TrainState:
    """A fresh student, from the seed alone."""
    key = jax.random.fold_in(jax.random.PRNGKey(args.seed), 1)  # not the weights that a teacher of this seed began with
    key, policy_key, value_key = jax.random.split(key, 3)
    x = jnp.zeros((1, *observation_shape), jnp.float32 if len(observation_shape) == 1 else jnp.uint8)
    params = {"policy": networks.policy.init(policy_key, x), "value": networks.value.init(value_key, x)}
    return TrainState(params, make_optimizer(args).init(params), key)


@partial(jax.jit, static_argnames=("num_steps", "shape", "states"))
def draw_noise(key: jax.Array, num_steps: int, shape: tuple[int, int], states: bool) -> tuple[jax.Array, jax.Array]:
    """The key to go on with, and noise [T, N, A] of a rollout: standard normal for states, Gumbel for images."""
    key, rollout_key = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(rollout_key, jnp.arange(num_steps))
    return key, jax.vmap(jax.random.normal if states else jax.random.gumbel, (0, None))(keys, shape)


def sample_actions(
    policy: Policy, params: dict, obs_stats: Stats | None, noise: jax.Array, observations: jax.Array, t: int
) -> jax.Array:
    """Samples actions, [N, A] for raw states or [N] for images, with the noise [T, N, A] of step t."""
    outputs = policy.apply(params, normalize(observations, obs_stats))
    if isinstance(outputs, tuple):
        return outputs[0] + jnp.exp(outputs[1]) * noise[t]
    return jnp.argmax(outputs + noise[t], axis=-1)


# On a CPU acting on states takes one thread: a few rows are not worth several, which then spin where the simulator runs
act_on_states = jax.jit(
    sample_actions, static_argnames="policy", compiler_options={"xla_cpu_multi_thread_eigen": False})
act_on_images = jax.jit(sample_actions, static_argnames="policy")


@partial(jax.jit, static_argnames="policy")
def act_deterministic(policy: Policy, params: dict, obs_stats: Stats | None, observations: jax.Array) -> jax.Array:
    """The most likely actions, [N, A] for raw states or [N] for images."""
    return distribution(policy.apply(params, normalize(observations, obs_stats))).mode()


@partial(jax.jit, static_argnames="policy")
def act_sampled(policy: Policy, params: dict, key: jax.Array, observations: jax.Array, t: int) -> jax.Array:
    """Sampled actions [N] for images, as the evaluation on Procgen takes them; t: step of the evaluation."""
    return distribution(policy.apply(params, observations)).sample(seed=jax.random.fold_in(key, t))


@partial(jax.jit, static_argnames=("args", "networks"), donate_argnames="state")
def update(
    args: Args, networks: Networks, teacher: Frozen, teacher_value: dict, state: TrainState, rollout: Rollout
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one gradient step on a rollout; returns the new state and the metrics."""
    observations = jnp.asarray(rollout.observations[:-1])
    observations = normalize(observations.reshape(args.batch_size, *observations.shape[2:]), teacher.obs_stats)
    weights = 1.0 - jnp.asarray(rollout.phantoms, jnp.float32).reshape(-1)
    outputs = networks.teacher.apply(teacher.params, observations)
    batch = Batch(weights, outputs, networks.teacher_value.apply(teacher_value, observations))

    def loss_fn(params):
        outputs = networks.policy.apply(params["policy"], observations)
        values = networks.value.apply(params["value"], observations)
        return distill_loss(outputs, values, batch, args.ent_coef, args.vf_coef, args.kl_direction)

    grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = make_optimizer(args).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    return TrainState(params, opt_state, state.key), {f"losses/{name}": x for name, x in metrics.items()}


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
        kind, channels, hidden = (model["network"][name] for name in Network._fields)
        if kind not in ("mlp", "nature", "impala"):
            raise ValueError(f"its network is of the kind {kind}")
        network = Network(kind, tuple(map(int, channels)), tuple(map(int, hidden)))
        policy, stats = Policy(network, int(model["action_dim"])), model["obs_stats"]
        if (stats is None) == (kind == "mlp"):
            raise ValueError("its observation statistics are not those of its task")
        x = jax.ShapeDtypeStruct(tuple(model["observation_shape"]), jnp.float32 if kind == "mlp" else jnp.uint8)
        check_model(model, policy, x)
        frozen = Frozen(model["params"]["policy"], None if stats is None else Stats(**stats))
    except Exception as error:  # of many kinds, for content of any kind
        fail(f"{path} is no model of this project: {type(error).__name__} {error}")
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


def evaluation_step(policy: Policy, frozen: Frozen, env_id: str, seed: int) -> Callable:
    """How a policy acts in evaluation, policy_step(observations, t): the likeliest actions, but sampled on Procgen."""
    key = jax.random.PRNGKey(seed)
    if suite_of(env_id) == "procgen":
        return lambda observations, t: act_sampled(policy, frozen.params, key, observations, t)
    return lambda observations, t: act_deterministic(policy, frozen.params, frozen.obs_stats, observations)


def assess(
    policy: Policy, frozen: Frozen, env_id: str, episodes: int, seed: int, variant: Variant
) -> dict[str, Any]:
    """The paper's evaluation of a policy: mean, standard deviation and all returns, in environments of their own seeds.

    On Procgen those of unseen levels, and apart from them those of the training levels; on Atari the human-normalised
    score as well, where Badia et al. 2020 give one.
    """
    result: dict[str, Any] = {}
    for split in ("evaluation", "train_levels") if suite_of(env_id) == "procgen" else ("evaluation",):
        envs = make_envs(env_id, episodes, EVAL_SEED + seed, split, variant)
        returns = evaluate(envs, evaluation_step(policy, frozen, env_id, seed))
        found = {"mean": float(returns.mean()), "std": float(returns.std()), "returns": returns.tolist()}
        result |= found if split == "evaluation" else {split: found}
    game = env_id.split("-")[0]
    if suite_of(env_id) == "atari" and game in HUMAN:
        random, human = HUMAN[game]
        result["human_normalised"] = (result["mean"] - random) / (human - random)
    return result


# ======================================================================================================================
# Main
# ======================================================================================================================


def corrupt(params: dict, std: float, seed: int) -> dict:
    """An imperfect teacher (section 4.2): adds Gaussian noise of this standard deviation to every parameter."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.PRNGKey(seed), len(leaves))
    return tree.unflatten([x + std * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)])


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


def inherit(args: Args, names: tuple[str, ...], model: dict, path: Path) -> Args:
    """The flags, and where these are not given, those of the teacher, on whose task it learned."""
    try:
        known = {name: operator.index(model["args"][name]) for name in names if getattr(args, name) is None}
    except (KeyError, TypeError) as error:
        fail(f"{path} does not say how its task was played: {type(error).__name__} {error}")
    return dataclasses.replace(args, **known)


def load_teacher(args: Args) -> tuple[Args, Networks, Frozen, dict]:
    """The networks of student and teacher, the teacher's policy and its value's parameters.

    The task and how it is played are the teacher's, where no flag says otherwise.
    """
    if args.env_id is None and args.teacher is None:
        args = dataclasses.replace(args, env_id="Hopper-v4")
    if args.env_id is not None:
        suite_of(args.env_id)
    path = Path(args.teacher or Path(__file__).parent / "teachers" / f"{args.env_id}__100.msgpack")
    if args.teacher is None and not path.exists():
        fail(f"no teacher of {args.env_id} is shipped; train one with `python train_teacher.py --env-id {args.env_id}` "
             "and name its file with --teacher")
    model, policy, teacher = load_policy(path)
    if args.env_id not in (None, model["env_id"]):
        fail(f"{path} is a teacher of {model['env_id']}, not of {args.env_id}")
    suite = suite_of(model["env_id"])
    if (suite == "mujoco") != (policy.network.kind == "mlp"):
        fail(f"{path} has a network of the kind {policy.network.kind}, which does not go with {model['env_id']}")
    if (found := (list(model["observation_shape"]), policy.action_dim)) != (needed := task_shape(model["env_id"])):
        fail(f"{path} is for observations and actions of {found}; those of {model['env_id']} are {needed}")
    try:
        teacher_value, value = Value(policy.network), jax.tree.map(jnp.asarray, model["params"]["value"])
        x = jax.ShapeDtypeStruct(tuple(model["observation_shape"]), jnp.float32 if suite == "mujoco" else jnp.uint8)
        check_arrays("parameters", value, jax.eval_shape(teacher_value.init, jax.random.PRNGKey(0), x))
    except Exception as error:  # as in load_policy
        fail(f"{path} holds no value network to learn from: {type(error).__name__} {error}")
    played = {"atari": ("frame_skip",), "procgen": ("start_level", "num_levels"), "mujoco": ()}[suite]
    args = inherit(dataclasses.replace(args, env_id=model["env_id"]), played, model, path)
    if args.contact_forces is None and args.env_id.startswith("Humanoid"):
        args = dataclasses.replace(args, contact_forces=model["args"].get("contact_forces") is True)
    networks = Networks(Policy(args.network, policy.action_dim), Value(args.network), policy, teacher_value)
    return args, networks, teacher, value


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


def describe(evaluation: dict) -> str:
    """One line about an evaluation."""
    text = f"{evaluation['mean']:>10.1f} ± {evaluation['std']:.1f} ({len(evaluation['returns'])} episodes"
    if "human_normalised" in evaluation:
        text += f"; human-normalised {evaluation['human_normalised']:.3f}"
    if "train_levels" in evaluation:
        levels = evaluation["train_levels"]
        text += f"; {levels['mean']:.1f} ± {levels['std']:.1f} on training levels"
    return text + ")"


def finish(
    args: Args, networks: Networks, state: TrainState, teacher: Frozen, original: Frozen, observation_shape: tuple,
    folder: Path, timing: dict,
) -> dict[str, float]:
    """Evaluates student and teacher on the same games, writes student.msgpack and results.json, prints the outcome.

    teacher: as it taught; original: as it was before noise. Returns each one's mean, their ratio and the timing.
    """
    student = teacher._replace(params=state.params["policy"])
    players = {"student": (networks.policy, student), "teacher": (networks.teacher, original)}
    if args.teacher_noise_std:
        players["corrupted_teacher"] = (networks.teacher, teacher)
    how = (args.env_id, args.eval_episodes, args.seed, args.variant)
    evaluations = {name: assess(*player, *how) for name, player in players.items()}
    numbers = {name: x["mean"] for name, x in evaluations.items()} | timing
    numbers["ratio"] = numbers["student"] / numbers["teacher"] if numbers["teacher"] > 0 else float("nan")

    network = {name: list(x) if isinstance(x, tuple) else x for name, x in args.network._asdict().items()}
    about = {"env_id": args.env_id, "script": SCRIPT, "network": network, "args": plain_args(args),
             "command": command_line(args), "versions": versions()}
    ratio = {"ratio": numbers["ratio"] if numbers["teacher"] > 0 else None}  # of what is negative it would say nothing
    save_tree(folder / "student.msgpack", "model", about | {
        "role": "student", "action_dim": networks.policy.action_dim, "observation_shape": list(observation_shape),
        "params": state.params, "obs_stats": teacher.obs_stats and teacher.obs_stats._asdict(),
        "evaluation": evaluations["student"]})
    write_json(folder / "results.json", about | timing | ratio | evaluations)
    for name, evaluation in evaluations.items():
        print(f"{name.replace('_', ' '):<18} {describe(evaluation)}")
    print(f"{'student / teacher':<18} {numbers['ratio']:>10.3f}")
    print(f"{'steps per second':<18} {timing['SPS']:>10.0f}")
    print(f"{'files':<18} {folder}")
    return numbers


def main(args: Args) -> dict[str, float]:
    """Distils a student and evaluates it beside its teacher; returns the single numbers of results.json."""
    choose_device(args.device)
    args, saved = restore(args)
    args, networks, original, teacher_value = load_teacher(args)
    args = resolve(args)
    teacher = original._replace(params=corrupt(original.params, args.teacher_noise_std, args.teacher_noise_seed))
    first, known = saved["updates"] if saved else 0, fingerprint((original, teacher_value))
    seed = (args.seed + first * args.num_envs) % EVAL_SEED  # going on, it plays new games
    envs = make_envs(args.env_id, args.num_envs, seed, "training", args.variant)
    states, shape = args.network.kind == "mlp", envs.observation_space.shape
    act = act_on_states if states else act_on_images
    state, cursor = init_state(args, networks, shape), start(envs)
    if saved:
        state = restore_state(args, saved, state, cursor, known)

    folder = make_folder(args)
    log = Log(folder, args, first * args.batch_size)
    timing = saved["timing"] if saved else {"SPS": 0.0, "seconds": 0.0}
    began = compiled = time.time()
    before, since = timing["seconds"], []
    if not saved:
        save_checkpoint(folder, args, 0, state, cursor, timing, log, known)
    with closing(log), progress_bar(args, first) as bar, catch_signals() as signals:
        for number in range(first + 1, args.num_updates + 1):
            key, noise = draw_noise(state.key, args.num_steps, (args.num_envs, networks.policy.action_dim), states)
            # The student acts
            policy_step = partial(act, networks.policy, state.params["policy"], teacher.obs_stats, noise)
            rollout = collect(envs, cursor, policy_step, args.num_steps)
            state, metrics = update(args, networks, teacher, teacher_value, state._replace(key=key), rollout)
            since.append(metrics)

            now, steps, last = time.time(), number * args.batch_size, number == args.num_updates or bool(signals)
            if number == first + 1:  # which compiled: the speed is that of the updates after it, or of the run before
                timing["SPS"], compiled = timing["SPS"] or args.batch_size / (now - began), now
            else:
                timing["SPS"] = (number - first - 1) * args.batch_size / (now - compiled)
            timing["seconds"] = before + now - began
            bar.update(args.batch_size)
            if number % args.log_every == 0 or number % args.checkpoint_every == 0 or last:
                since = jax.device_get(since)
                for i, found in enumerate(since, number - len(since) + 1):
                    check_finite(found, i, folder)
            if number % args.log_every == 0 or last:
                metrics = jax.tree.map(lambda *x: float(np.mean(x)), *since)
                episodic_return = float(np.mean(cursor.finished)) if cursor.finished else float("nan")
                charts = {"charts/episodic_return": episodic_return, "charts/SPS": timing["SPS"]}
                log.write(steps, timing["seconds"], charts | metrics)
                kl = metrics["losses/teacher_kl"]
                bar.set_postfix_str(f"return {episodic_return:.0f}, KL {kl:.3f}", refresh=False)
                since = []
            if number % args.checkpoint_every == 0 or last:
                save_checkpoint(folder, args, number, state, cursor, timing, log, known)
            if last and signals:  # not one that came since, without a checkpoint
                stop(folder, signals[0])
    with catch_signals(partial(stop, folder)):
        envs.close()
        return finish(args, networks, state, teacher, original, shape, folder, timing)


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
