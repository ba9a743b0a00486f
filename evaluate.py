"""Evaluates any model file by the paper's protocol, and films it.

    python evaluate.py teachers/Hopper-v4__100.msgpack
    python evaluate.py runs/.../student.msgpack --video hopper.gif

Raw rewards and whole games: 50 episodes with deterministic actions (Atari, MuJoCo), or 200 with sampled actions
(Procgen) on unseen levels and, apart from them, on those of training. There are as many environments as episodes and
each one's first episode counts, so that short ones are not over-represented. Source: Spigler, "Proximal Policy
Distillation", TMLR 2025 (arXiv 2407.15134), section 4. Models of ppd_gymnax.py are evaluated as that script does:
100 episodes, with sampled actions on MinAtar.
"""

import ctypes
import difflib
import hashlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import distrax
import flax.linen as nn
import imageio.v3 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import serialization

# ======================================================================================================================
# Arguments
# ======================================================================================================================


class Network(NamedTuple):
    """What a network is made of: convolutions, unless it is an MLP, then hidden layers."""

    kind: Literal["mlp", "nature", "impala", "minatar"]
    channels: tuple[int, ...]
    hidden: tuple[int, ...]


MAX_LAYERS = 64


@dataclass(frozen=True)
class Args:
    """All flags of this script."""

    model: tyro.conf.Positional[str]
    """model file: teacher.msgpack or student.msgpack of a run, or a shipped teacher"""
    episodes: int | None = None
    """episodes, one for each of as many environments; the paper's: 50, but 200 on Procgen; on gymnax 100"""
    seed: int = 0
    """seed of the environments, environment i takes seed + i; a run's own evaluation used that run's seed"""
    contact_forces: bool | None = None
    """observe contact forces (Humanoid); by default as in training"""
    json: str | None = None
    """also write every episode's return to this file"""
    video: str | None = None
    """also film one episode: a .gif, or an .mp4 (pip install imageio-ffmpeg)"""
    video_seconds: float = 10.0
    """length of the film at most, in the simulation's own time"""


def fail(message: str) -> NoReturn:
    """Ends the program for bad input: one line on stderr, exit code 2."""
    print("error: " + "".join(c if c.isprintable() else " " for c in message[:1000]), file=sys.stderr)
    raise SystemExit(2)


def check(args: Args) -> None:
    """Ends the program for flags that cannot work, before anything is written."""
    if args.episodes is not None and not 1 <= args.episodes <= 10**5:
        fail(f"--episodes must lie between 1 and 100000, not {args.episodes}")
    if not 0 <= args.seed < 10**9:
        fail(f"--seed must lie between 0 and 999999999, not {args.seed}")
    if not 0 < args.video_seconds <= 3600:
        fail(f"--video-seconds must lie between 0 and 3600, not {args.video_seconds}")
    for path in filter(None, (args.json, args.video)):
        if os.path.isdir(path) or not os.access(Path(path).resolve().parent, os.W_OK):
            fail(f"cannot write {path}: it is a folder, or there is no folder for it")
    if args.video and Path(args.video).suffix not in (".gif", ".mp4"):
        fail(f"--video writes .gif or .mp4, not {args.video}")
    if args.video and args.video.endswith(".mp4") and importlib.util.find_spec("imageio_ffmpeg") is None:
        fail(f"an .mp4 needs ffmpeg: pip install imageio-ffmpeg, or write a .gif instead of {args.video}")


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
SECONDS_PER_STEP = {"Ant": 0.05, "HalfCheetah": 0.05, "Hopper": 0.008, "Humanoid": 0.015, "HumanoidStandup": 0.015,
                    "InvertedDoublePendulum": 0.05, "InvertedPendulum": 0.04, "Pusher": 0.05, "Reacher": 0.02,
                    "Swimmer": 0.04, "Walker2d": 0.008}


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


class Variant(NamedTuple):
    """How a task is played."""

    frame_skip: int | None  # Atari
    start_level: int | None  # Procgen
    num_levels: int | None  # Procgen
    contact_forces: bool | None = None  # Humanoid


def make_variant(path: str, flags: dict) -> Variant:
    """How a model's task is played, by the flags of its run; where they say nothing, as in the paper."""
    known = {"frame_skip": (4, 1, 100), "start_level": (0, 0, 10**9), "num_levels": (200, 1, 10**9)}
    values = {name: default if flags.get(name) is None else flags[name] for name, (default, *_) in known.items()}
    for name, (_, low, high) in known.items():
        if type(values[name]) is not int or not low <= values[name] <= high:
            fail(f"{path} was trained with a {name} of {values[name]!r}, which cannot be")
    return Variant(**values, contact_forces=flags.get("contact_forces") is True)


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

    def split(self) -> jax.Array:
        """A new key for each environment."""
        self.key, key = jax.random.split(self.key)
        return jax.random.split(key, self.num_envs)

    def reset(self) -> tuple[np.ndarray, dict]:
        """Starts all environments: their observations, and no further information."""
        observations, self.states = jax.jit(jax.vmap(self.env.reset, (0, None)))(self.split(), self.params)
        return np.asarray(observations).reshape(self.num_envs, -1), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Steps all environments with actions [N] or [N, A]; one that ends begins anew at once."""
        actions = jnp.asarray(actions).reshape(self.num_envs, *self.action_space.shape)
        observations, self.states, *rest, _ = self.step_all(self.split(), self.states, actions, self.params)
        return np.asarray(observations).reshape(self.num_envs, -1), *map(np.asarray, rest), {}

    def close(self) -> None:
        """There is nothing to close."""


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


# ======================================================================================================================
# Networks
# ======================================================================================================================


def torso(network: Network, x: jax.Array) -> jax.Array:
    """Features [..., F] of normalised states or flat grids [..., D], or of images [..., C, H, W], uint8.

    An MLP, Nature-CNN (Mnih et al. 2015), IMPALA-CNN (Espeholt et al. 2018), or one convolution of MinAtar's grids
    (Young and Tian 2019). Called inside a module's __call__, whose layers these become.
    """
    orthogonal = nn.initializers.orthogonal(np.sqrt(2))
    if network.kind == "minatar":  # the convolution as a matrix product of patches, which ppd_gymnax.py says why
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
            x = nn.relu(nn.Conv(channels, (size, size), stride, "VALID", kernel_init=orthogonal)(x))
    if network.kind == "impala":
        conv = partial(nn.Conv, kernel_size=(3, 3), kernel_init=orthogonal)
        for channels in network.channels:
            x = max_pool(conv(channels)(x))
            for _ in range(2):
                y = conv(channels)(nn.relu(x))
                x = x + conv(channels)(nn.relu(y))
        x = nn.relu(x)
    if network.kind in ("nature", "impala"):
        x = x.reshape(*x.shape[:-3], -1)
    for width in network.hidden:
        x = nn.relu(nn.Dense(width, kernel_init=orthogonal)(x))
    return x


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
    """Gaussian policy, whose log standard deviation does not depend on the state, or categorical policy."""

    network: Network
    action_dim: int
    gaussian: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        """x as in `torso`. Returns mean and log standard deviation, both [..., A], or logits [..., A]."""
        x = torso(self.network, x)
        output = nn.Dense(self.action_dim, kernel_init=nn.initializers.orthogonal(0.01))(x)
        if not self.gaussian:
            return output
        log_std = self.param("log_std", nn.initializers.zeros, (self.action_dim,))
        return output, jnp.broadcast_to(log_std, output.shape)


def distribution(outputs: jax.Array | tuple[jax.Array, jax.Array]) -> distrax.Distribution:
    """The action distribution that a policy's outputs stand for."""
    if isinstance(outputs, tuple):
        mean, log_std = outputs
        return distrax.MultivariateNormalDiag(mean, jnp.exp(log_std))
    return distrax.Categorical(logits=outputs)


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


class Frozen(NamedTuple):
    """A policy that does not learn: its parameters, and the statistics of the states it stands on."""

    params: dict
    obs_stats: Stats | None


@partial(jax.jit, static_argnames="policy")
def act_deterministic(policy: Policy, params: dict, obs_stats: Stats | None, observations: jax.Array) -> jax.Array:
    """The most likely actions, [N, A] for raw states or [N] for images."""
    return distribution(policy.apply(params, normalize(observations, obs_stats))).mode()


@partial(jax.jit, static_argnames="policy")
def act_sampled(policy: Policy, params: dict, key: jax.Array, observations: jax.Array, t: int) -> jax.Array:
    """Sampled actions [N] for images, as the evaluation on Procgen takes them; t: step of the evaluation."""
    return distribution(policy.apply(params, observations)).sample(seed=jax.random.fold_in(key, t))


# ======================================================================================================================
# Files
# ======================================================================================================================


FORMAT, VERSION = "proximal-policy-distillation", 2


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
        if kind not in ("mlp", "nature", "impala", "minatar"):
            raise ValueError(f"its network is of the kind {kind}")
        network = Network(kind, tuple(map(int, channels)), tuple(map(int, hidden)))
        gaussian = "log_std" in model["params"]["policy"]["params"]
        policy, stats = Policy(network, int(model["action_dim"]), gaussian), model["obs_stats"]
        if (stats is None) != (kind != "mlp" or model["env_id"].endswith("-MinAtar")):
            raise ValueError("its observation statistics are not those of its task")
        images = kind in ("nature", "impala")
        x = jax.ShapeDtypeStruct(tuple(model["observation_shape"]), jnp.uint8 if images else jnp.float32)
        check_model(model, policy, x)
        describe(model["evaluation"])
        frozen = Frozen(model["params"]["policy"], None if stats is None else Stats(**stats))
    except Exception as error:  # of many kinds, for content of any kind
        fail(f"{path} is no model of this project: {type(error).__name__} {error}")
    return model, policy, jax.tree.map(jnp.asarray, frozen)


def check_fit(path: str | Path, model: dict, policy: Policy) -> None:
    """Ends the program for a model that its task, which must be known, has not the observations or actions for."""
    env_id, kinds = model["env_id"], ("nature", "impala")
    if str(model.get("library")) == "gymnax":
        import gymnax

        if env_id not in gymnax.registered_envs or env_id == "MNISTBandit-bsuite":  # that one downloads its images
            fail(f"unknown gymnax task {env_id} in {path}")
        env, params = gymnax.make(env_id)
        space, kinds = env.action_space(params), ("mlp", "minatar") if env_id.endswith("-MinAtar") else ("mlp",)
        gaussian, size = bool(space.shape), int(np.prod(env.observation_space(params).shape))
        needed = [size], int(np.prod(space.shape) if gaussian else space.n)
    else:
        gaussian = suite_of(env_id) == "mujoco"
        kinds, needed = ("mlp",) if gaussian else kinds, task_shape(env_id)
    found = list(model["observation_shape"]), policy.action_dim
    if found != needed or policy.network.kind not in kinds or policy.gaussian != gaussian:
        fail(f"{path} is a network of the kind {policy.network.kind} for observations and actions of {found}; "
             f"those of {env_id} are {needed}")


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


def gymnax_step(policy: Policy, frozen: Frozen, env_id: str, seed: int) -> Callable:
    """How a policy acts on gymnax's tasks: the likeliest actions, but sampled on MinAtar, whose games hardly vary."""
    key = jax.random.PRNGKey(seed)
    if env_id.endswith("-MinAtar"):
        return lambda observations, t: act_sampled(policy, frozen.params, key, observations, t)
    return lambda observations, t: act_deterministic(policy, frozen.params, frozen.obs_stats, observations)


def assess_gymnax(policy: Policy, frozen: Frozen, env_id: str, episodes: int, seed: int) -> dict[str, Any]:
    """The evaluation of a policy on one of gymnax's tasks: mean, standard deviation and all returns."""
    returns = evaluate(GymnaxEnvs(env_id, episodes, EVAL_SEED + seed), gymnax_step(policy, frozen, env_id, seed))
    return {"mean": float(returns.mean()), "std": float(returns.std()), "returns": returns.tolist()}


def load_opengl() -> None:
    """Loads what envpool's renderer wants loaded before envpool itself; without it, filming would end the program."""
    try:
        for library in ("libGLdispatch.so.0", "libEGL.so.1", "libOpenGL.so.0"):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        fail(f"filming needs OpenGL ({error}); on Debian: apt-get install libegl1 libopengl0 libgl1-mesa-dri")


def describe(evaluation: dict) -> str:
    """One line about an evaluation."""
    text = f"{evaluation['mean']:>10.1f} ± {evaluation['std']:.1f} ({len(evaluation['returns'])} episodes"
    if "human_normalised" in evaluation:
        text += f"; human-normalised {evaluation['human_normalised']:.3f}"
    if "train_levels" in evaluation:
        levels = evaluation["train_levels"]
        text += f"; {levels['mean']:.1f} ± {levels['std']:.1f} on training levels"
    return text + ")"


def film(
    policy: Policy, frozen: Frozen, env_id: str, seed: int, variant: Variant, seconds: float
) -> tuple[list[np.ndarray], float]:
    """Frames [H, W, 3] of the first episode, in real time at about 25 a second, and their exact number a second."""
    options = task_options(env_id, "evaluation", variant)
    envs = import_envpool().make_gymnasium(
        env_id, num_envs=1, seed=EVAL_SEED + seed, render_mode="rgb_array", **options)
    policy_step, observations = evaluation_step(policy, frozen, env_id, seed), reset(envs)
    duration = {"atari": (variant.frame_skip or 1) / 60, "procgen": 1 / 15}.get(suite_of(env_id)) or SECONDS_PER_STEP[
        env_id.split("-")[0]]
    every = max(1, round(0.04 / duration))
    frames = []
    for t in range(max(1, round(seconds / duration))):
        if t % every == 0:
            frames.append(np.array(envs.render(env_ids=[0])[0]))
        observations, _, _, _, ends = step(envs, np.asarray(policy_step(observations, t)))
        if ends[0]:
            break
    envs.close()
    return frames, 1.0 / (duration * every)


def film_gymnax(
    policy: Policy, frozen: Frozen, env_id: str, seed: int, seconds: float
) -> tuple[list[np.ndarray], float]:
    """Frames [H, W, 3] of the first episode as gymnax draws it, one for each step, and their number a second."""
    import matplotlib

    matplotlib.use("Agg")
    from gymnax.visualize import Visualizer

    envs = GymnaxEnvs(env_id, 1, EVAL_SEED + seed)
    policy_step, observations = gymnax_step(policy, frozen, env_id, seed), reset(envs)
    states, total = [], 0.0
    returns = []
    rate = 10.0 if env_id.endswith("-MinAtar") else 20.0
    for t in range(max(1, round(seconds * rate))):
        states.append(jax.tree.map(lambda x: x[0], envs.states))
        returns.append(total)
        observations, rewards, _, _, ends = step(envs, np.asarray(policy_step(observations, t)))
        total += float(rewards[0])
        if ends[0]:
            break
    drawing = Visualizer(envs.env, envs.params, states, returns)
    try:
        drawing.init()
    except Exception as error:  # of many kinds: a task without a drawing, a package that is not there
        fail(f"gymnax cannot draw {env_id} here ({error}); classic control needs pygame: pip install pygame")
    frames = []
    for t in range(len(states)):
        drawing.update(t)
        drawing.fig.canvas.draw()
        frames.append(np.asarray(drawing.fig.canvas.buffer_rgba())[..., :3].copy())
    return frames, rate


def write_video(path: str, frames: list[np.ndarray], rate: float) -> None:
    """Writes a .gif that repeats for ever, or an .mp4; whole, or not at all."""
    temporary = Path(path).with_name(f".new-{Path(path).name}")
    try:
        if path.endswith(".gif"):
            imageio.imwrite(temporary, frames, duration=1000.0 / rate, loop=0)
        else:
            with warnings.catch_warnings(action="ignore"):  # JAX warns of any fork, and this one starts ffmpeg
                imageio.imwrite(temporary, frames, fps=rate, plugin="FFMPEG", macro_block_size=8)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ======================================================================================================================
# Main
# ======================================================================================================================


def main(args: Args) -> dict[str, float]:
    """Evaluates the model; returns what it prints."""
    check(args)
    model, policy, frozen = load_policy(args.model)
    env_id, flags, network = model["env_id"], model["args"], policy.network
    gymnax = str(model.get("library")) == "gymnax"
    if args.video and network.kind == "mlp" and not gymnax:
        load_opengl()
    check_fit(args.model, model, policy)
    variant = own = make_variant(args.model, flags)
    if args.contact_forces is not None:
        if not env_id.startswith("Humanoid"):
            fail(f"--contact-forces is for Humanoid, not for {env_id}")
        variant = variant._replace(contact_forces=args.contact_forces)
    if gymnax:
        evaluation = assess_gymnax(policy, frozen, env_id, args.episodes or 100, args.seed)
    else:
        episodes = args.episodes or (200 if suite_of(env_id) == "procgen" else 50)
        evaluation = assess(policy, frozen, env_id, episodes, args.seed, variant)
    numbers = {"mean": evaluation["mean"], "std": evaluation["std"], "min": min(evaluation["returns"]),
               "median": float(np.median(evaluation["returns"])), "max": max(evaluation["returns"])}
    layers = "-".join(map(str, (*network.channels, *network.hidden)))
    print(f"{env_id} {model['role']}, {network.kind} {layers}: {model['command']}")
    print(f"{describe(evaluation).strip()}, min {numbers['min']:.1f}, median {numbers['median']:.1f}, "
          f"max {numbers['max']:.1f}")
    with_forces = "with" if variant.contact_forces else "without"
    print(f"its own run measured {describe(model['evaluation']).strip()}"
          + ("" if variant == own else f"; this is {with_forces} contact forces, unlike its training"))
    if args.json:
        about = {"env_id": env_id, "command": model["command"], "seed": args.seed}
        if env_id.startswith("Humanoid"):
            about["contact_forces"] = variant.contact_forces
        write_atomic(Path(args.json), (json.dumps(about | numbers | evaluation, indent=2) + "\n").encode())
    if args.video:
        frames, rate = (film_gymnax(policy, frozen, env_id, args.seed, args.video_seconds) if gymnax else
                        film(policy, frozen, env_id, args.seed, variant, args.video_seconds))
        write_video(args.video, frames, rate)
        print(f"{args.video}: {len(frames)} frames, {rate:.0f} a second")
    return numbers


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except OSError as error:  # a full disk
        fail(str(error))
