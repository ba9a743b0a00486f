"""Evaluate any model file by the paper's protocol, film it, and write its model card.

    python evaluate.py teachers/Hopper-v4__100.safetensors
    python evaluate.py runs/.../student.safetensors --video hopper.gif
    python evaluate.py runs/.../student.safetensors --card hopper

Raw rewards and whole games: 50 episodes with deterministic actions (Atari, MuJoCo), or 200 with sampled actions
(Procgen) on unseen levels and, apart from them, on those of training. There are as many environments as episodes and
each one's first episode counts, so that short ones are not over-represented. Source: Spigler, "Proximal Policy
Distillation", TMLR 2025 (arXiv 2407.15134), section 4. Models of ppd_gymnax.py are evaluated as that script does:
100 episodes, with sampled actions on MinAtar.
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
#   "gymnax==1.0.1",
#   "imageio==2.38.1",
#   "matplotlib==3.11.2",
#   "numpy==2.4.6",
#   "safetensors==0.8.0",
#   "tfp-nightly==0.26.0.dev20261027",
#   "tqdm==4.67.1",
#   "tyro==1.0.17",
# ]
# ///

import ctypes
import difflib
import importlib.util
import json
import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import distrax
import flax.linen as nn
import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tyro
from tqdm import trange

# ======================================================================================================================
# Arguments
# ======================================================================================================================


class Network(NamedTuple):
    """What a network is made of: convolutions, unless it is an MLP, then hidden layers."""

    kind: Literal["mlp", "nature", "impala", "minatar"]
    channels: tuple[int, ...]
    hidden: tuple[int, ...]
    activation: Literal["relu", "tanh"] = "relu"  # of the hidden layers; convolutions have ReLU


@dataclass(frozen=True)
class Args:
    """All flags."""

    model: tyro.conf.Positional[str]  # teacher.safetensors or student.safetensors of a run, or a shipped teacher
    episodes: int | None = None  # episodes, each the first of its environment; the paper's: 50, but 200 on Procgen
    seed: int = 0  # seed of the games (environment i takes seed + i on MuJoCo and Atari); a run took its own
    repeat_action_probability: float | None = None  # Atari: sticky actions; by default as in training
    json: str | None = None  # also write every episode's return to this file
    video: str | None = None  # also film one episode: a .gif, or an .mp4 (pip install imageio-ffmpeg)
    video_seconds: float = 10.0  # length of the film at most, in the simulation's own time
    card: str | None = None  # also write a new folder as a model hub expects it: model, card, film and every return


# ======================================================================================================================
# Environments
# ======================================================================================================================

EVAL_SEED = 10**9  # added to the seed of the environments in evaluation
SUITES = {"envpool.atari": "atari", "envpool.mujoco.gym": "mujoco", "envpool.procgen": "procgen"}
VARIANTS = {  # how a task is played: the flags of each suite that a model file keeps
    "atari": ("frame_skip", "repeat_action_probability"), "mujoco": ("contact_forces",),
    "procgen": ("start_level", "num_levels"),
}
KINDS = {"mujoco": ("mlp",), "states": ("mlp",), "minatar": ("mlp", "minatar"), "atari": ("nature", "impala"),
         "procgen": ("nature", "impala")}  # of the networks of each suite; states and minatar are gymnax's
EPISODES = {"mujoco": 50, "atari": 50, "procgen": 200, "states": 100, "minatar": 100}
SECONDS_PER_STEP = {  # of simulated time, for films, where a task says nothing else
    "Hopper": 0.008, "Humanoid": 0.015, "HumanoidStandup": 0.015, "InvertedPendulum": 0.04, "Reacher": 0.02,
    "Swimmer": 0.04, "Walker2d": 0.008, "mujoco": 0.05, "procgen": 1 / 15, "states": 0.05, "minatar": 0.1}

# Scores of a random and of a human player (Badia et al. 2020), for human-normalised scores
HUMAN = {
    "Atlantis": (12850.0, 29028.1), "BeamRider": (363.9, 16926.5), "CrazyClimber": (10780.5, 35829.4),
    "DemonAttack": (152.1, 1971.0), "Enduro": (0.0, 860.5), "Freeway": (0.0, 29.6), "MsPacman": (307.3, 6951.6),
    "Pong": (-20.7, 14.6), "Qbert": (163.9, 13455.0), "Seaquest": (68.4, 42054.7), "Zaxxon": (32.5, 9173.3),
}


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


class GymnaxEnvs:
    """gymnax's environments behind the part of envpool's interface that is used here; observations [N, D] are flat."""

    def __init__(self, env_id: str, num_envs: int, seed: int):
        """seed: settles all that happens in these environments."""
        import gymnax

        self.env, self.params = gymnax.make(env_id)
        self.key, self.num_envs = jax.random.PRNGKey(seed), num_envs
        self.action_space = self.env.action_space(self.params)
        self.step_all = jax.jit(jax.vmap(self.env.step, (0, 0, 0, None)))
        self.states: Any = None
        self.drawing: Any = None
        self.total = 0.0  # of the first environment's rewards

    def split(self) -> jax.Array:
        """Return a new key for each environment."""
        self.key, key = jax.random.split(self.key)
        return jax.random.split(key, self.num_envs)

    def reset(self) -> tuple[np.ndarray, dict]:
        """Reset all environments; returns their observations, and no further information."""
        observations, self.states = jax.jit(jax.vmap(self.env.reset, (0, None)))(self.split(), self.params)
        return np.asarray(observations).reshape(self.num_envs, -1), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Step all environments with actions [N] or [N, A]; one that ends begins anew at once."""
        actions = jnp.asarray(actions).reshape(self.num_envs, *self.action_space.shape)
        observations, self.states, *rest, _ = self.step_all(self.split(), self.states, actions, self.params)
        self.total += float(rest[0][0])
        return np.asarray(observations).reshape(self.num_envs, -1), *map(np.asarray, rest), {}

    def render(self, env_ids: list[int]) -> list[np.ndarray]:
        """Draw the first environment as gymnax does: one image [H, W, 3]."""
        if self.drawing is None:
            import matplotlib

            matplotlib.use("Agg")
            from gymnax.visualize import Visualizer

            self.drawing = Visualizer(self.env, self.params, [], [])
        drawing = self.drawing
        drawing.state_seq.append(jax.tree.map(lambda x: x[0], self.states))
        drawing.reward_seq.append(self.total)
        if len(drawing.state_seq) == 1:
            drawing.init()
        drawing.update(len(drawing.state_seq) - 1)
        drawing.fig.canvas.draw()
        return [np.asarray(drawing.fig.canvas.buffer_rgba())[..., :3]]

    def close(self) -> None:
        """Do nothing: there is nothing to close."""


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


# ======================================================================================================================
# Networks
# ======================================================================================================================


ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh}  # of hidden layers, by their name in a model file


def torso(network: Network, x: jax.Array) -> jax.Array:
    """Compute features [..., F] of normalised states or flat grids [..., D], or of images [..., C, H, W], uint8.

    An MLP, Nature-CNN (Mnih et al. 2015), IMPALA-CNN (Espeholt et al. 2018), or one convolution of MinAtar's grids
    (Young and Tian 2019). Called inside a module's __call__, which owns the layers.
    """
    orthogonal = nn.initializers.orthogonal(np.sqrt(2))
    conv = partial(nn.Conv, kernel_init=orthogonal,
                   conv_general_dilated=convolve if jax.default_backend() == "cpu" else None)
    if network.kind == "minatar":  # the convolution is a matrix product of patches, as in ppd_gymnax.py
        x = x.reshape(*x.shape[:-1], 10, 10, -1)
        for channels in network.channels:
            side = x.shape[-2] - 2
            windows = [x[..., i:i + side, j:j + side, :] for i in range(3) for j in range(3)]
            x = nn.relu(nn.Dense(channels, kernel_init=orthogonal)(jnp.concatenate(windows, axis=-1)))
        x = x.reshape(*x.shape[:-3], -1)
    if network.kind in ("nature", "impala"):
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
    if network.kind in ("nature", "impala"):
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
    """Gaussian policy, whose log standard deviation does not depend on the state, or categorical policy."""

    network: Network
    action_dim: int
    gaussian: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Return mean and log standard deviation, both [..., A], or logits [..., A], for x as in `torso`."""
        x = torso(self.network, x)
        output = nn.Dense(self.action_dim, kernel_init=nn.initializers.orthogonal(0.01))(x)
        if not self.gaussian:
            return output
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        return output, jnp.broadcast_to(log_std, output.shape)


def distribution(outputs: jax.Array | tuple[jax.Array, jax.Array]) -> distrax.Distribution:
    """Return the action distribution for a policy's outputs."""
    if isinstance(outputs, tuple):
        mean, log_std = outputs
        return distrax.MultivariateNormalDiag(mean, jnp.exp(log_std))
    return distrax.Categorical(logits=outputs)


class Stats(NamedTuple):
    """Running mean and variance, and the number of samples they are computed from."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def normalize(observations: jax.Array, stats: Stats | None) -> jax.Array:
    """Subtract the running mean from states [..., D], divide by the deviation, clip to ±10; images stay as is."""
    if stats is None:
        return observations
    return jnp.clip((observations - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)


P = jax.sharding.PartitionSpec  # how arrays lie on several devices: P() is whole on each


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


# ======================================================================================================================
# Files
# ======================================================================================================================

FORMAT = "proximal-policy-distillation 3"


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


def read_network(found: dict) -> Network:
    """Return the network that a file describes; raises an exception of any kind if it does not describe one."""
    found = Network._field_defaults | found  # older files say less
    return Network(**{name: tuple(found[name][:MAX_LAYERS]) if isinstance(found[name], list) else found[name]
                      for name in Network._fields})


def load_policy(path: str) -> tuple[dict, Policy, dict]:
    """Read a model file: what it says, its policy, parameters and statistics; end the program if it is not one."""
    with checked(f"{path} is no model of this project"):
        about, arrays = read_file(path)
        env_id, gymnax = about["env_id"], about.get("library") == "gymnax"
        suite = gymnax_suite(env_id) if gymnax else suite_of(env_id)
        for name in VARIANTS.get(suite, ()):
            if not in_range(name, about["variant"][name]):
                raise ValueError(f"its {name} is {about['variant'][name]}, which cannot be")
        variant = {name: about["variant"][name] for name in VARIANTS.get(suite, ())}  # and nothing else for envpool
        network = read_network(about["network"])
        kind, channels = network.kind, network.channels
        if kind not in KINDS[suite] or len(channels) > 3:
            raise ValueError(f"its network, {kind} with {len(channels)} convolutions, is none of {env_id}")
        (shape, actions), gaussian = gymnax_shape(env_id) if gymnax else (task_shape(env_id), suite == "mujoco")
        policy = Policy(network, about["action_dim"], gaussian)
        if (found := (about["observation_shape"], policy.action_dim)) != (shape, actions):
            raise ValueError(f"it is for observations and actions of {found}; those of {env_id} are {(shape, actions)}")
        x = jax.ShapeDtypeStruct(tuple(shape), jnp.uint8 if suite in ("atari", "procgen") else jnp.float32)
        params = fill(jax.eval_shape(policy.init, jax.random.PRNGKey(0), x), arrays, "policy")
        stats = Stats(x, x, jax.ShapeDtypeStruct((), jnp.float32)) if suite in ("mujoco", "states") else None
        params = {"policy": params, "obs_stats": fill(stats, arrays, "obs_stats")}
        layers = "-".join(map(str, network.channels + network.hidden))
        title = plain(f"{env_id} {about['role']}, {kind} {layers}: {about['command']}")
        about |= {"suite": suite, "variant": variant, "title": title, "measured": describe(about["evaluation"])}
        return about, policy, params


def plain(text: str) -> str:
    """Return what a file says without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def other_version(about: dict) -> str:
    """Return which version of the environments a model's own run had, if not this one: another's images can differ."""
    library, versions = "gymnax" if about.get("library") == "gymnax" else "envpool", about.get("versions")
    had, here = versions.get(library) if isinstance(versions, dict) else None, metadata.version(library)
    return f", with {library} {plain(str(had))} instead of {here}" if had not in (None, here) else ""


def gymnax_suite(env_id: str) -> str:
    """Return the suite of one of gymnax's tasks, minatar or states; end the program for other tasks."""
    import gymnax

    if env_id not in gymnax.registered_envs or env_id == "MNISTBandit-bsuite":  # that one downloads its images
        fail(f"unknown gymnax task {env_id}")
    return "minatar" if env_id.endswith("-MinAtar") else "states"


def gymnax_shape(env_id: str) -> tuple[tuple[list[int], int], bool]:
    """Return an observation's shape, the number of actions or of their dimensions, and whether it is the latter."""
    envs = GymnaxEnvs(env_id, 1, 0)
    space, size = envs.action_space, int(np.prod(envs.env.observation_space(envs.params).shape))
    return ([size], int(np.prod(space.shape) if space.shape else space.n)), bool(space.shape)


# ======================================================================================================================
# Evaluation
# ======================================================================================================================


def make_policy_step(about: dict, policy: Policy, params: dict, seed: int) -> Callable:
    """Return policy_step(observations, t): the likeliest actions, but sampled ones on Procgen and MinAtar."""
    key = jax.random.PRNGKey(seed)
    if about["suite"] in ("procgen", "minatar"):
        return lambda observations, t: act_sampled(policy, params["policy"], key, observations, t)
    return lambda observations, t: act_deterministic(policy, params["policy"], params["obs_stats"], observations)


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


def open_envs(about: dict, num_envs: int, seed: int, split: Split, **options: Any) -> Any:
    """Make the environments of a model file's task, of seeds that training does not have."""
    if about.get("library") == "gymnax":
        return GymnaxEnvs(about["env_id"], num_envs, EVAL_SEED + seed)
    return make_envs(about["env_id"], num_envs, EVAL_SEED + seed, about["variant"], split, **options)


def assess(about: dict, policy: Policy, params: dict, episodes: int, seed: int) -> dict[str, Any]:
    """Evaluate a policy as in the paper, in environments of their own seeds.

    On Procgen on unseen levels, and apart from them on those of training; on Atari with the human-normalised score.
    """
    suite, policy_step = about["suite"], make_policy_step(about, policy, params, seed)
    result = evaluate(open_envs(about, episodes, seed, "evaluation"), policy_step)
    if suite == "procgen":
        result["train_levels"] = evaluate(open_envs(about, episodes, seed, "train_levels"), policy_step)
    random, human = HUMAN.get(about["env_id"].split("-")[0], (None, None)) if suite == "atari" else (None, None)
    return result if human is None else result | {"human_normalised": (result["mean"] - random) / (human - random)}


def describe(evaluation: dict) -> str:
    """Say an evaluation in one line: mean ± standard deviation over episodes."""
    text = f"{evaluation['mean']:.1f} ± {evaluation['std']:.1f} ({len(evaluation['returns'])} episodes"
    if evaluation.get("games", math.inf) < len(evaluation["returns"]):
        text += f", {evaluation['games']} different games"
    if "human_normalised" in evaluation:
        text += f"; human-normalised {evaluation['human_normalised']:.3f}"
    if "train_levels" in evaluation:
        levels = evaluation["train_levels"]
        text += f"; {levels['mean']:.1f} ± {levels['std']:.1f} on training levels"
    return text + ")"


def load_opengl() -> OSError | None:
    """Load what MuJoCo's renderer wants loaded before envpool itself, or say what is missing."""
    try:
        for library in ("libGLdispatch.so.0", "libEGL.so.1", "libOpenGL.so.0"):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return error
    return None


def film(about: dict, policy: Policy, params: dict, seed: int, seconds: float) -> tuple[list[np.ndarray], float]:
    """Return frames [H, W, 3] of the first episode, in real time at about 25 a second, and their exact number."""
    env_id, suite = about["env_id"], about["suite"]
    envs = open_envs(about, 1, seed, "evaluation", render_mode="rgb_array")
    policy_step, observations, frames = make_policy_step(about, policy, params, seed), reset(envs), []
    if suite == "atari":
        duration = about["variant"]["frame_skip"] / 60
    elif isinstance(envs, GymnaxEnvs):
        duration = getattr(envs.params, "dt", None) or getattr(envs.params, "tau", None) or SECONDS_PER_STEP[suite]
    else:
        duration = SECONDS_PER_STEP.get(env_id.split("-")[0], SECONDS_PER_STEP[suite])
    every = max(1, round(0.04 / duration))
    for t in range(max(1, round(seconds / duration))):
        if t % every == 0:
            try:
                frames.append(np.array(envs.render(env_ids=[0])[0]))
            except Exception as error:  # of many kinds: a task without a drawing, a package that is not there
                fail(f"{env_id} cannot be drawn here ({error}); gymnax's classic control needs pygame")
        observations, _, _, _, ends = step(envs, np.asarray(policy_step(observations, t)))
        if ends[0]:
            break
    envs.close()
    return frames, 1.0 / (duration * every)


def write_video(path: Path, frames: list[np.ndarray], rate: float) -> None:
    """Write a .gif that repeats for ever, or an .mp4; whole, or not at all. rate: frames a second."""
    if path.suffix == ".gif":  # which shows each frame for whole hundredths of a second: 7, 6 and 7 of them at 15
        ends = np.round(np.arange(len(frames) + 1) * 100.0 / rate)
        options = {"duration": (10.0 * np.diff(ends)).tolist(), "loop": 0}
    else:
        options = {"fps": rate, "plugin": "FFMPEG", "macro_block_size": 8}
    with warnings.catch_warnings(action="ignore"):  # JAX warns of any fork, and an .mp4's starts ffmpeg
        write_atomic(path, imageio.imwrite("<bytes>", frames, extension=path.suffix, **options))


CARD = """---
library_name: proximal-policy-distillation
tags: [reinforcement-learning, deep-reinforcement-learning, proximal-policy-distillation, jax, {env_id}]
model-index:
- name: {env_id} {role}
  results:
  - task: {{type: reinforcement-learning, name: reinforcement-learning}}
    dataset: {{type: {env_id}, name: {env_id}}}
    metrics:
    - {{type: mean_reward, name: mean_reward, value: {mean:.2f} +/- {std:.2f}, verified: false}}
---

# {env_id}: a {role} of Proximal Policy Distillation

![one episode](replay.gif)

A policy in JAX, {network}. Whole games with raw rewards and {actions} actions, the first of each environment:

| levels or games | return, mean ± standard deviation | episodes | different ones |
|---|---|---|---|
{rows}

`evaluation.json` has every return. The scripts of Proximal Policy Distillation in JAX play them again:

```
python evaluate.py model.safetensors --episodes {episodes} --seed {seed}{sticky}
```

The model was made by this command, with these versions:

```
{command}
{versions}
```

`model.safetensors` holds plain arrays, named by their path in the parameter tree, and describes itself as JSON in its
header. The algorithm: Spigler, "Proximal Policy Distillation", TMLR 2025, [arXiv](https://arxiv.org/abs/2407.15134).
"""


def write_card(folder: Path, args: Args, about: dict, evaluation: dict, replay: tuple[list[np.ndarray], float]) -> None:
    """Write a folder as the Hugging Face Hub expects it: README.md with metadata, model, film and every return.

    evaluation: as `assess` returns it; replay: frames, and how many a second.
    """
    splits = {"all": evaluation}
    if "train_levels" in evaluation:
        splits = {"unseen": evaluation, "those of training": evaluation["train_levels"]}
    rows = [f"| {name} | {found['mean']:,.1f} ± {found['std']:,.1f} | {len(found['returns'])} | {found['games']} |"
            for name, found in splits.items()]
    kinds = {"mlp": "an MLP", "nature": "a Nature-CNN", "impala": "an IMPALA-CNN", "minatar": "a CNN"}
    layers = "-".join(map(str, (*about["network"]["channels"], *about["network"]["hidden"]))) or "no hidden layer"
    said = {name: plain(str(about.get(name))).replace("`", " ") for name in ("command", "versions", "role")}
    probability = args.repeat_action_probability
    text = CARD.format(
        **said, env_id=about["env_id"], mean=evaluation["mean"], std=evaluation["std"], rows="\n".join(rows),
        network=f"{kinds[about['network']['kind']]} of {layers}", seed=args.seed, episodes=len(evaluation["returns"]),
        actions="sampled" if about["suite"] in ("procgen", "minatar") else "deterministic",
        sticky="" if probability is None else f" --repeat-action-probability {probability:g}")
    folder.mkdir()
    write_atomic(folder / "model.safetensors", Path(args.model).read_bytes())
    measured = {"env_id": about["env_id"], "variant": about.get("variant", {}), "seed": args.seed} | evaluation
    write_atomic(folder / "evaluation.json", measured)
    write_video(folder / "replay.gif", *replay)
    write_atomic(folder / "README.md", text.encode())


# ======================================================================================================================
# Command line
# ======================================================================================================================

# Smallest and largest value of a flag, and of what a model file says of its task
RANGES = {
    "episodes": (1, 10**5), "seed": (0, 10**9 - 1), "video_seconds": (0.01, 3600.0), "frame_skip": (1, 100),
    "repeat_action_probability": (0, 1.0), "start_level": (0, 10**9), "num_levels": (1, 10**9),
}
MAX_LAYERS = 64


def fail(message: str) -> NoReturn:
    """End the program for bad input: one line on stderr, exit code 2."""
    print("error: " + "".join(c if c.isprintable() else " " for c in message[:1000]), file=sys.stderr)
    raise SystemExit(2)


def check(args: Args) -> None:
    """End the program for flags that cannot work, before anything is written."""
    for name, value in vars(args).items():
        if name in RANGES and value is not None and not in_range(name, value):
            low, high = RANGES[name]
            fail(f"--{name.replace('_', '-')} must lie between {low:.10g} and {high:.10g}, not {value}")
    for path in filter(None, (args.json, args.video)):
        if os.path.isdir(path) or not os.access(f"{Path(path).resolve().parent}/", os.W_OK):
            fail(f"cannot write {path}: it is a folder, or there is no folder for it")
    if args.card and (os.path.exists(args.card) or not os.access(f"{Path(args.card).resolve().parent}/", os.W_OK)):
        fail(f"--card {args.card} exists, or there is no folder for it")
    if args.video and Path(args.video).suffix not in (".gif", ".mp4"):
        fail(f"--video writes .gif or .mp4, not {args.video}")
    if args.video and args.video.endswith(".mp4") and importlib.util.find_spec("imageio_ffmpeg") is None:
        fail(f"an .mp4 needs ffmpeg: pip install imageio-ffmpeg, or write a .gif instead of {args.video}")


def in_range(name: str, value: Any) -> bool:
    """Tell whether a flag, or what a model file says of its task, is a number that can be."""
    low, high = RANGES.get(name, (False, True))
    return isinstance(value, int | type(high)) and low <= value <= high


# ======================================================================================================================
# Main
# ======================================================================================================================


def main(args: Args) -> dict[str, float]:
    """Evaluate the model, write and film what is asked for; returns what it prints."""
    check(args)
    missing = load_opengl() if args.video or args.card else None
    about, policy, params = load_policy(args.model)
    if missing and about["suite"] == "mujoco":
        fail(f"filming needs OpenGL ({missing}); on Debian: apt-get install libegl1 libopengl0 libgl1-mesa-dri")
    if args.repeat_action_probability is not None:
        if about["suite"] != "atari":
            fail(f"--repeat-action-probability is for Atari, not for {about['env_id']}")
        about["variant"] |= {"repeat_action_probability": args.repeat_action_probability}
    evaluation = assess(about, policy, params, args.episodes or EPISODES[about["suite"]], args.seed)
    returns = evaluation["returns"]
    numbers = {"mean": evaluation["mean"], "std": evaluation["std"], "min": min(returns),
               "median": float(np.median(returns)), "max": max(returns)}
    print(about["title"])
    print(f"{describe(evaluation)}, min {numbers['min']:.1f}, median {numbers['median']:.1f}, max {numbers['max']:.1f}")
    print(f"its own run measured {about['measured']}{other_version(about)}")
    if args.json:
        said = {name: about[name] for name in ("env_id", "command", "variant")}
        write_atomic(Path(args.json), said | {"seed": args.seed} | numbers | evaluation)
    if args.video or args.card:
        frames, rate = film(about, policy, params, args.seed, args.video_seconds)
        if args.video:
            write_video(Path(args.video), frames, rate)
            print(f"{args.video}: {len(frames)} frames, {rate:.0f} a second")
        if args.card:
            write_card(Path(args.card), args, about, evaluation, (frames, rate))
            print(f"{args.card}: README.md, model.safetensors, evaluation.json, replay.gif")
    return numbers


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # who read the output has gone: --help | head
        raise SystemExit(1) from None
    except OSError as error:  # a full disk
        fail(str(error))
