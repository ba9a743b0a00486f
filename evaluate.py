"""Evaluates any model file by the paper's protocol, and films it.

    python evaluate.py teachers/Hopper-v4__100.msgpack
    python evaluate.py runs/.../student.msgpack --video hopper.gif

Fifty episodes with deterministic actions and raw rewards; as many environments as episodes, and each one's first
episode counts, so that short ones are not over-represented. Source: Spigler, "Proximal Policy Distillation", TMLR 2025
(arXiv 2407.15134), section 4.
"""

import ctypes
import difflib
import hashlib
import importlib.util
import json
import os
import re
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

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


@dataclass(frozen=True)
class Args:
    """All flags of this script."""

    model: tyro.conf.Positional[str]
    """model file: teacher.msgpack or student.msgpack of a run, or a shipped teacher"""
    episodes: int = 50
    """episodes, one for each of as many environments"""
    seed: int = 0
    """seed of the environments, environment i takes seed + i; a run's own evaluation used that run's seed"""
    json: str | None = None
    """also write every episode's return to this file"""
    video: str | None = None
    """also film one episode: a .gif, or an .mp4 (pip install imageio-ffmpeg)"""
    video_seconds: float = 10.0
    """length of the film at most, in the simulation's own time"""


def fail(message: str) -> NoReturn:
    """Ends the program for bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check(args: Args) -> None:
    """Ends the program for flags that cannot work, before anything is written."""
    if not 1 <= args.episodes <= 10**5:
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


GYM_MUJOCO = ("Ant|HalfCheetah|Hopper|Humanoid|HumanoidStandup|InvertedDoublePendulum|InvertedPendulum|Pusher|Reacher|"
              "Swimmer|Walker2d")
EVAL_SEED = 10**9  # what evaluation adds to the seed of its environments, so that it plays other games than training
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


def check_task(env_id: str) -> None:
    """Ends the program for a task that is no Gym MuJoCo task of envpool, naming those like it."""
    known = [name for name in import_envpool().list_all_envs() if re.fullmatch(rf"({GYM_MUJOCO})-v\d+", name)]
    if env_id not in known:
        near = difflib.get_close_matches(env_id, known, n=3, cutoff=0.3) or known
        fail(f"unknown MuJoCo task {env_id}; did you mean {', '.join(near)}?")


def make_envs(env_id: str, num_envs: int, seed: int) -> Any:
    """Vectorised environments; the seed is given here because envpool ignores reset(seed=)."""
    return import_envpool().make_gymnasium(env_id, num_envs=num_envs, seed=seed)


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


def distribution(outputs: tuple[jax.Array, jax.Array]) -> distrax.Distribution:
    """The action distribution that a policy's outputs (mean, log standard deviation; [..., A]) stand for."""
    mean, log_std = outputs
    return distrax.MultivariateNormalDiag(mean, jnp.exp(log_std))


class Stats(NamedTuple):
    """Running mean and variance, and the number of samples they rest on."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array


def normalize(observations: jax.Array, stats: Stats) -> jax.Array:
    """Observations [..., D] less their running mean, over their running standard deviation, clipped to ±10."""
    return jnp.clip((observations - stats.mean) / jnp.sqrt(stats.var + 1e-8), -10.0, 10.0)


class Frozen(NamedTuple):
    """A policy that does not learn: its parameters, and the observation statistics it stands on."""

    params: dict
    obs_stats: Stats


@partial(jax.jit, static_argnames="policy")
def act_deterministic(policy: Policy, params: dict, obs_stats: Stats, observations: jax.Array) -> jax.Array:
    """The most likely actions [N, A] for raw observations [N, D]."""
    return distribution(policy.apply(params, normalize(observations, obs_stats))).mode()


# ======================================================================================================================
# Files
# ======================================================================================================================


FORMAT, VERSION = "proximal-policy-distillation", 1


def load_tree(path: str | Path, kind: str) -> dict:
    """Reads a file of save_tree; ends the program if it is missing, cut short, damaged or something else."""
    try:
        envelope = serialization.msgpack_restore(Path(path).read_bytes())
        found = [envelope[name] for name in ("format", "version", "kind", "sha256", "payload")]
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except Exception:  # msgpack raises many kinds for bytes that are not its own
        fail(f"{path} is no {kind} file of this project, or is cut short")
    if found[:3] != [FORMAT, VERSION, kind]:
        fail(f"{path} is a {found[2]} file of {found[0]}, version {found[1]}; "
             f"needed is a {kind} file, version {VERSION}")
    if not isinstance(found[4], bytes) or found[3] != hashlib.sha256(found[4]).hexdigest():
        fail(f"{path} is damaged: its checksum does not match")
    return serialization.msgpack_restore(found[4])


def load_policy(path: str | Path) -> tuple[dict, Policy, Frozen]:
    """Reads a model file: all it holds, its policy network, and that network's parameters and statistics."""
    model = load_tree(path, "model")
    try:
        policy = Policy(tuple(map(int, model["hidden"])), int(model["action_dim"]))
        frozen = Frozen(model["params"]["policy"], Stats(**model["obs_stats"]))
        expected = jax.eval_shape(policy.init, jax.random.PRNGKey(0), jnp.zeros(model["observation_shape"]))
        if model["network"] != "mlp" or jax.tree.map(jnp.shape, expected) != jax.tree.map(jnp.shape, frozen.params):
            raise ValueError("its parameters are not those of the network it describes")
        if list(frozen.obs_stats.mean.shape) != list(model["observation_shape"]):
            raise ValueError("its observation statistics are not those of its task")
        _ = [model[name] for name in ("env_id", "role", "command", "evaluation")]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f"{path} is no model of a MuJoCo task: {type(error).__name__} {error}")
    return model, policy, jax.tree.map(jnp.asarray, frozen)


# ======================================================================================================================
# Evaluation
# ======================================================================================================================


def evaluate(policy: Policy, frozen: Frozen, env_id: str, episodes: int, seed: int) -> np.ndarray:
    """Returns [episodes] of the deterministic policy: sums of raw rewards, undiscounted.

    There are as many environments as episodes and each one's first episode counts: short ones do not crowd out long.
    """
    envs = make_envs(env_id, episodes, EVAL_SEED + seed)
    space, observations = envs.action_space, envs.reset()[0]
    returns, running = np.zeros(episodes), np.ones(episodes, bool)
    while running.any():
        actions = act_deterministic(policy, frozen.params, frozen.obs_stats, observations.astype(np.float32))
        observations, rewards, terminations, truncations, _ = envs.step(
            np.clip(np.asarray(actions), space.low, space.high, dtype=space.dtype))
        returns += np.where(running, rewards, 0.0)
        running &= ~(terminations | truncations)
    envs.close()
    return returns


def load_opengl() -> None:
    """Loads what envpool's renderer wants loaded before envpool itself; without it, filming would end the program."""
    try:
        for library in ("libGLdispatch.so.0", "libEGL.so.1", "libOpenGL.so.0"):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        fail(f"filming needs OpenGL ({error}); on Debian: apt-get install libegl1 libopengl0 libgl1-mesa-dri")


def film(policy: Policy, frozen: Frozen, env_id: str, seed: int, seconds: float) -> tuple[list[np.ndarray], float]:
    """Frames [H, W, 3] of the first episode, in real time at about 25 a second, and their exact number a second."""
    envs = import_envpool().make_gymnasium(env_id, num_envs=1, seed=EVAL_SEED + seed, render_mode="rgb_array")
    space, observations = envs.action_space, envs.reset()[0]
    step = SECONDS_PER_STEP[env_id.split("-")[0]]
    every = max(1, round(0.04 / step))
    frames = []
    for t in range(max(1, int(seconds / step))):
        if t % every == 0:
            frames.append(np.array(envs.render(env_ids=[0])[0]))
        actions = act_deterministic(policy, frozen.params, frozen.obs_stats, observations.astype(np.float32))
        observations, _, terminations, truncations, _ = envs.step(
            np.clip(np.asarray(actions), space.low, space.high, dtype=space.dtype))
        if terminations[0] or truncations[0]:
            break
    envs.close()
    return frames, 1.0 / (step * every)


def write_video(path: str, frames: list[np.ndarray], rate: float) -> None:
    """Writes a .gif that repeats for ever, or an .mp4."""
    if path.endswith(".gif"):
        imageio.imwrite(path, frames, duration=1000.0 / rate, loop=0)
    else:
        with warnings.catch_warnings(action="ignore"):  # JAX warns of any fork, and this one starts ffmpeg
            imageio.imwrite(path, frames, fps=rate, plugin="FFMPEG", macro_block_size=8)


# ======================================================================================================================
# Main
# ======================================================================================================================


def main(args: Args) -> dict[str, float]:
    """Evaluates the model; returns what it prints."""
    check(args)
    if args.video:
        load_opengl()
    model, policy, frozen = load_policy(args.model)
    check_task(model["env_id"])
    returns = evaluate(policy, frozen, model["env_id"], args.episodes, args.seed)
    numbers = {"mean": float(returns.mean()), "std": float(returns.std()), "min": float(returns.min()),
               "median": float(np.median(returns)), "max": float(returns.max())}
    print(f"{model['env_id']} {model['role']}, hidden layers {'-'.join(map(str, model['hidden']))}: {model['command']}")
    print(f"{numbers['mean']:.1f} ± {numbers['std']:.1f} over {args.episodes} episodes "
          f"(min {numbers['min']:.1f}, median {numbers['median']:.1f}, max {numbers['max']:.1f})")
    print(f"its own run measured {model['evaluation']['mean']:.1f} ± {model['evaluation']['std']:.1f}")
    if args.json:
        about = {"env_id": model["env_id"], "command": model["command"], "seed": args.seed}
        Path(args.json).write_text(json.dumps(about | numbers | {"returns": returns.tolist()}, indent=2) + "\n")
    if args.video:
        frames, rate = film(policy, frozen, model["env_id"], args.seed, args.video_seconds)
        write_video(args.video, frames, rate)
        print(f"{args.video}: {len(frames)} frames, {rate:.0f} a second")
    return numbers


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
