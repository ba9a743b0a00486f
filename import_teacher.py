"""Make a teacher of an agent that another library has trained: stable-baselines3, or CleanRL in JAX.

    python import_teacher.py agent.zip --env-id Hopper-v4 --vecnormalize stats.npz --out teacher.safetensors
    python ppd_mujoco.py --teacher teacher.safetensors

It takes PPO and A2C of stable-baselines3 with MlpPolicy or CnnPolicy (a .zip; needs torch), and CleanRL's PPO on Atari
(a .cleanrl_model). It plays the paper's evaluation (Spigler, "Proximal Policy Distillation", TMLR 2025, arXiv
2407.15134, section 4) and writes how well the agent did into the file. Nothing in an agent's file is executed; a pickle
of VecNormalize is, with --trust-pickle.

Weights stay what they are, in another order: a torch layer is [outputs, inputs], here it is [inputs, outputs]. The
hidden layer after convolutions sees pixels by channel, row and column there, by row, column and channel here.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "jax==0.10.2; python_version < '3.12'",
#   "jax==0.11.2; python_version >= '3.12'",
#   "envpool==1.2.5; python_version < '3.12'",
#   "envpool==1.2.7; python_version >= '3.12'",
#   "flax==0.12.8",
#   "gymnasium==1.3.0",
#   "gymnax==1.0.1",
#   "numpy==2.4.6",
#   "safetensors==0.8.0",
#   "tqdm==4.67.1",
#   "tyro==1.0.17",
# ]
# ///

import difflib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import pickle
import re
import shlex
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import flax
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tyro
from tqdm import trange

# ======================================================================================================================
# Arguments
# ======================================================================================================================


@dataclass(frozen=True)
class Args:
    """All flags."""

    agent: tyro.conf.Positional[str]  # .zip of stable-baselines3, or .cleanrl_model
    env_id: str  # its task, by envpool's name (Hopper-v4, Pong-v5, CoinrunEasy-v0) or gymnax's (CartPole-v1)
    out: str = "teacher.safetensors"  # the file to write; it must not exist
    vecnormalize: str | None = None  # observation statistics: .npz with mean and var, or the .pkl of VecNormalize
    trust_pickle: bool = False  # read that .pkl, which can run any code; it needs stable_baselines3
    seed: int = 0  # seed of the games of the evaluation
    eval_episodes: int | None = None  # episodes of the evaluation; the paper's: 50, but 200 on Procgen
    frame_skip: int = 4  # Atari: frames for which an action is repeated
    repeat_action_probability: float = 0.0  # Atari: probability of sticky actions; ALE's v5 tasks have 0.25
    start_level: int = 0  # Procgen: first level that it learned on
    num_levels: int = 200  # Procgen: levels that it learned on; all later ones are for the test
    contact_forces: bool = True  # Humanoid: observe contact forces, as in Gym; envpool's own default leaves zeros


# ======================================================================================================================
# Environments
# ======================================================================================================================

EVAL_SEED = 10**9  # added to the seed of the environments in evaluation
SUITES = {"envpool.atari": "atari", "envpool.mujoco.gym": "mujoco", "envpool.procgen": "procgen"}
VARIANTS = {  # how a task is played: the flags of each suite that a model file keeps
    "atari": ("frame_skip", "repeat_action_probability"), "mujoco": ("contact_forces",),
    "procgen": ("start_level", "num_levels"),
}
EPISODES = {"mujoco": 50, "atari": 50, "procgen": 200, "states": 100, "minatar": 100}

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
        return np.asarray(observations).reshape(self.num_envs, -1), *map(np.asarray, rest), {}

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


class Layers(NamedTuple):
    """One network: convolutions [k, k, C, F] and then dense layers [inputs, outputs], each with its bias; head last."""

    convolutions: list[tuple[np.ndarray, np.ndarray]]
    dense: list[tuple[np.ndarray, np.ndarray]]


class Agent(NamedTuple):
    """What a file of another library holds."""

    policy: Layers
    value: Layers
    log_std: np.ndarray | None  # [A], of a Gaussian policy
    activation: Literal["relu", "tanh"]  # of hidden layers; convolutions have ReLU


@partial(jax.jit, static_argnames="activation")
def policy_outputs(layers: Layers, observations: jax.Array, activation: str) -> jax.Array:
    """Compute means or logits [N, A] of states [N, D] or images [N, C, H, W], uint8."""
    x = observations
    if layers.convolutions:
        x = jnp.moveaxis(x, 1, -1).astype(jnp.float32) / 255.0
        for (kernel, bias), stride in zip(layers.convolutions, (4, 2, 1), strict=True):
            order = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=order)
            x = jax.nn.relu(x + bias)
        x = x.reshape(len(x), -1)
    *hidden, (kernel, bias) = layers.dense
    for weights, biases in hidden:
        x = getattr(jax.nn, activation)(x @ weights + biases)
    return x @ kernel + bias


def scale_inputs(agent: Agent, scale: np.ndarray) -> Agent:
    """Return the agent whose networks give for x / scale what they gave for x [..., D]; scale: [D] or a number."""

    def scaled(layers):
        (kernel, bias), *others = layers.dense
        return layers._replace(dense=[((kernel * np.reshape(scale, (-1, 1))).astype(np.float32), bias), *others])

    return agent._replace(policy=scaled(agent.policy), value=scaled(agent.value))


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


def save_file(path: Path, about: dict, tree: Any) -> None:
    """Write a model or a checkpoint: arrays by their path in the tree, and `about` as JSON in the header."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    arrays = {jax.tree_util.keystr(where, simple=True, separator="/"): np.asarray(x) for where, x in leaves}
    header = {"about": json.dumps({"format": FORMAT} | about)}
    header["crc32"] = str(zlib.crc32(safetensors.numpy.save(arrays, header)))
    write_atomic(path, safetensors.numpy.save(arrays, header))


@contextmanager
def checked(what: str) -> Iterator[None]:
    """End the program in one line where the content of a file is not what it says."""
    try:
        yield
    except Exception as error:  # of many kinds, for content of any kind
        fail(f"{what}: {type(error).__name__} {error}")


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


MOST_BYTES = 2**30  # of what is unpacked from a .zip

# Parameters of an ActorCriticPolicy of stable-baselines3; hidden layers have even numbers, activations the others
KNOWN = (r"log_std|(((pi_|vf_)?features_extractor\.(cnn\.[024]|linear\.0)"
         r"|mlp_extractor\.(shared|policy|value)_net\.\d*[02468]|action_net|value_net)\.(weight|bias))")


def read_agent(path: str, observation_shape: list[int]) -> Agent:
    """Read the file of another library; raises an exception of any kind where it is not one that is known."""
    if zipfile.is_zipfile(path):
        return read_sb3(path, observation_shape)
    return read_cleanrl(path)


def read_cleanrl(path: str) -> Agent:
    """Read a .cleanrl_model of PPO in JAX on Atari: Nature-CNN, shared by policy and value, which add a layer each."""
    _, parameters = flax.serialization.msgpack_restore(Path(path).read_bytes()).values()  # after the flags
    shared, policy, value = (each["params"] for each in parameters.values())
    if names := {*shared, *policy, *value} - {"Conv_0", "Conv_1", "Conv_2", "Dense_0"}:
        raise ValueError(f"{', '.join(sorted(names))} is unknown in CleanRL's PPO")

    def layer(found):
        return tuple(np.asarray(found[name], np.float32) for name in ("kernel", "bias"))

    convolutions = [layer(shared[f"Conv_{i}"]) for i in range(3)]
    networks = (Layers(convolutions, [layer(shared["Dense_0"]), layer(head["Dense_0"])]) for head in (policy, value))
    return Agent(*networks, log_std=None, activation="relu")


def read_sb3(path: str, observation_shape: list[int]) -> Agent:
    """Read a .zip of stable-baselines3: weights by torch without unpickling, and what they are weights of as JSON."""
    if importlib.util.find_spec("torch") is None:
        fail(f"{path} holds weights of PyTorch, which reads them: pip install torch")
    import torch

    with zipfile.ZipFile(path) as file:
        if sum(file.getinfo(name).file_size for name in ("data", "policy.pth")) > MOST_BYTES:
            raise ValueError("it is too large for an agent")
        data, content = json.loads(file.read("data")), io.BytesIO(file.read("policy.pth"))
    state = torch.load(content, map_location="cpu", weights_only=True)
    weights = {name: x.to(torch.float32).numpy() for name, x in state.items()}
    if unknown := [name for name in weights if not re.fullmatch(KNOWN, name)]:
        raise ValueError(f"{unknown[0]} is unknown in a policy of PPO or A2C")
    if (module := data["policy_class"]["__module__"]) != "stable_baselines3.common.policies":
        raise ValueError(f"its policy is one of {module}, which can compute anything")
    options = data["policy_kwargs"]
    extractor, layers = options.get("features_extractor_class"), "stable_baselines3.common.torch_layers"
    if extractor not in (None, f"<class '{layers}.NatureCNN'>", f"<class '{layers}.FlattenExtractor'>"):
        raise ValueError(f"its {extractor} is unknown here")
    if data.get("use_sde") or not options.get("normalize_images", True):
        raise ValueError("it explores by gSDE, or its images are not divided by 255")
    policy, value = (sb3_layers(weights, player, observation_shape) for player in ("policy", "value"))
    known = {f"<class 'torch.nn.modules.activation.{name}'>": name.lower() for name in ("Tanh", "ReLU")}
    torch_class = options.get("activation_fn", next(iter(known)))
    activation = known.get(torch_class)
    if not any(name.startswith("mlp_extractor.") for name in weights):
        activation = "relu"  # that of Nature-CNN; an MLP without hidden layers has none
    if activation is None or activation == "tanh" and policy.convolutions:
        raise ValueError(f"hidden layers with {torch_class} are unknown here, as is tanh after convolutions")
    return Agent(policy, value, weights.get("log_std"), activation)


def side_of_features(side: int) -> int:
    """Return how many pixels are left of so many in a row after Nature-CNN's convolutions: 7 of 84, 4 of 64."""
    for size, stride in ((8, 4), (4, 2), (3, 1)):
        side = (side - size) // stride + 1
    return side


def sb3_layers(weights: dict[str, np.ndarray], player: str, observation_shape: list[int]) -> Layers:
    """Return one network, "policy" or "value", of an ActorCriticPolicy's weights; what both share, each has."""

    def dense(name):
        return weights[f"{name}.weight"].T, weights[f"{name}.bias"]

    def chain(prefix):
        return [dense(f"{prefix}.{i}") for i in range(0, 2 * len(weights), 2) if f"{prefix}.{i}.weight" in weights]

    convolutions, hidden = [], []
    own = f"{'pi' if player == 'policy' else 'vf'}_features_extractor"
    extractor = own if any(name.startswith(own) for name in weights) else "features_extractor"
    if f"{extractor}.cnn.0.weight" in weights:
        names = [f"{extractor}.cnn.{i}" for i in (0, 2, 4)]
        convolutions = [(weights[f"{x}.weight"].transpose(2, 3, 1, 0), weights[f"{x}.bias"]) for x in names]
        height, width = map(side_of_features, observation_shape[1:])
        kernel, bias = dense(f"{extractor}.linear.0")
        kernel = kernel.reshape(-1, height, width, len(bias)).transpose(1, 2, 0, 3).reshape(-1, len(bias))
        hidden = [(kernel, bias)]
    hidden += chain("mlp_extractor.shared_net") + chain(f"mlp_extractor.{player}_net")
    return Layers(convolutions, [*hidden, dense("action_net" if player == "policy" else "value_net")])


def check_agent(agent: Agent, observation_shape: list[int], num_actions: int, gaussian: bool) -> None:
    """Raise ValueError where the networks are not of these observations and actions, or a weight is not finite."""
    for layers, outputs in ((agent.policy, num_actions), (agent.value, 1)):
        if bool(layers.convolutions) != (len(observation_shape) == 3):
            raise ValueError(f"it has {len(layers.convolutions)} convolutions, for observations of {observation_shape}")
        if any(bias.ndim != 1 for _, bias in (*layers.convolutions, *layers.dense)):
            raise ValueError("a bias of it is no vector")
        inputs, sizes = observation_shape[0], (8, 4, 3)
        for (kernel, bias), size in zip(layers.convolutions, sizes, strict=bool(layers.convolutions)):
            if kernel.shape != (size, size, inputs, len(bias)):
                raise ValueError(f"a convolution has the shape {kernel.shape}, of {inputs} channels")
            inputs = len(bias)
        if layers.convolutions:
            inputs *= math.prod(map(side_of_features, observation_shape[1:]))
        for kernel, bias in layers.dense:
            if kernel.shape != (inputs, len(bias)):
                raise ValueError(f"a layer has {kernel.shape[0]} inputs where {inputs} are needed")
            inputs = len(bias)
        if inputs != outputs:
            raise ValueError(f"its network has {inputs} outputs, where the task needs {outputs}")
    shapes = [[kernel.shape for kernel, _ in layers.convolutions] for layers in (agent.policy, agent.value)]
    if shapes[0] != shapes[1] or max(len(layers.dense) for layers in (agent.policy, agent.value)) > MAX_LAYERS:
        raise ValueError(f"its value has other convolutions than its policy, or a network has over {MAX_LAYERS} layers")
    if (agent.log_std is not None) != gaussian or gaussian and agent.log_std.shape != (num_actions,):
        raise ValueError(f"its actions are {'discrete' if agent.log_std is None else 'continuous'}, the task's are not")
    if not all(np.isfinite(x).all() for x in jax.tree.leaves((agent.policy, agent.value, agent.log_std))):
        raise ValueError("a weight of it is not finite")


def read_stats(path: str, trust_pickle: bool, observation_shape: list[int]) -> dict[str, np.ndarray]:
    """Read what VecNormalize knows of observations: mean and var, [D], clip_obs, epsilon and count.

    End the program for a pickle that is not trusted, and for content that is something else.
    """
    if not path.endswith(".npz") and not trust_pickle:
        fail(f"{path} is a pickle, and reading it can run any code. If you trust it, add --trust-pickle, or write its "
             f"arrays: python -c \"import numpy, pickle; v = pickle.load(open('{path}', 'rb')); numpy.savez('out.npz', "
             "mean=v.obs_rms.mean, var=v.obs_rms.var, clip_obs=v.clip_obs, epsilon=v.epsilon)\"")
    with checked(f"{path} holds no statistics of VecNormalize"), open(path, "rb") as file:
        if path.endswith(".npz"):
            found = dict(np.load(file, allow_pickle=False))
        else:
            stats = pickle.load(file)
            if not stats.norm_obs:
                raise ValueError("it leaves observations as they are, so leave out --vecnormalize")
            found = {"mean": stats.obs_rms.mean, "var": stats.obs_rms.var, "count": stats.obs_rms.count,
                     "clip_obs": stats.clip_obs, "epsilon": stats.epsilon}
        found = {"clip_obs": 10.0, "epsilon": 1e-8, "count": 1.0} | found
        found["clip_obs"] = np.minimum(found["clip_obs"], 1e6)  # beyond, no float32 has a use for it
        found = {name: np.asarray(found[name], np.float64) for name in ("mean", "var", "clip_obs", "epsilon", "count")}
        for name, x in found.items():
            needed = tuple(observation_shape) if name in ("mean", "var") else ()
            if x.shape != needed or not np.isfinite(x).all() or name != "mean" and (x < 0).any():
                raise ValueError(f"its {name} is not finite, negative, or not of the shape {needed}")
    return found


def normalized(agent: Agent, stats: dict[str, np.ndarray]) -> tuple[Agent, dict[str, np.ndarray]]:
    """Return the agent, and its statistics as a model file has them: clipped to ±10, with 1e-8 added to the variance.

    To clip to ±c is to clip x / (c / 10) to ±10; the first layers take the factor back. It is exact but for dimensions
    that hardly vary where c < 10: a variance that would have to be negative in the file becomes 0.
    """
    factor = stats["clip_obs"] / 10.0
    variance = np.maximum((stats["var"] + stats["epsilon"]) * factor**2 - 1e-8, 0.0)
    stats = {"mean": stats["mean"], "var": variance, "count": stats["count"]}
    return scale_inputs(agent, factor), {name: x.astype(np.float32) for name, x in stats.items()}


def unnormalized(agent: Agent, largest: np.ndarray) -> tuple[Agent, dict[str, np.ndarray]]:
    """Return the agent, and statistics for observations that it saw as they are, of these largest magnitudes [D].

    A model file clips to ±10. So each observation is divided by a power of two, which rounds nothing and puts the clip
    at four times what was seen at least; the first layers take the factors back.
    """
    scale = 2.0 ** np.ceil(np.log2(np.maximum(largest / 2.5, 1.0)))
    stats = {"mean": np.zeros_like(scale), "var": scale**2, "count": np.ones(())}
    return scale_inputs(agent, scale), {name: x.astype(np.float32) for name, x in stats.items()}


def describe_network(agent: Agent) -> dict[str, Any]:
    """Return what a model file says of its networks."""
    hidden, values = ([len(bias) for _, bias in layers.dense[:-1]] for layers in (agent.policy, agent.value))
    channels = [len(bias) for _, bias in agent.policy.convolutions]
    return {"kind": "nature" if channels else "mlp", "channels": channels, "hidden": hidden,
            "activation": agent.activation, "value_hidden": None if values == hidden else values}


def tree(layers: Layers, log_std: np.ndarray | None) -> dict[str, Any]:
    """Return a network's parameters as Flax names them."""
    named = {f"{kind}_{i}": {"kernel": np.ascontiguousarray(kernel), "bias": bias} for kind, found in (
        ("Conv", layers.convolutions), ("Dense", layers.dense)) for i, (kernel, bias) in enumerate(found)}
    return {"params": named | ({} if log_std is None else {"log_std": log_std})}


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


def open_envs(about: dict, num_envs: int, seed: int, split: Split, **options: Any) -> Any:
    """Make the environments of a model file's task, of seeds that training does not have."""
    if about.get("library") == "gymnax":
        return GymnaxEnvs(about["env_id"], num_envs, EVAL_SEED + seed)
    return make_envs(about["env_id"], num_envs, EVAL_SEED + seed, about["variant"], split, **options)


def assess(
    about: dict, agent: Agent, suite: str, normalize: Callable, episodes: int | None, seed: int
) -> dict[str, Any]:
    """Evaluate an agent as in the paper: the likeliest actions, but sampled ones on Procgen and MinAtar.

    On Procgen on unseen levels, and apart from them on those of training; on Atari with the human-normalised score.
    normalize: what becomes of observations before the network.
    """
    key, episodes = jax.random.PRNGKey(seed), episodes or EPISODES[suite]

    def policy_step(observations, t):
        outputs = policy_outputs(agent.policy, normalize(observations), agent.activation)
        if suite in ("procgen", "minatar"):
            return jax.random.categorical(jax.random.fold_in(key, t), outputs)
        return outputs if agent.log_std is not None else outputs.argmax(-1)

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


# ======================================================================================================================
# Command line
# ======================================================================================================================

# Smallest and largest value of a flag
RANGES = {
    "seed": (0, 10**9 - 1), "eval_episodes": (1, 10**5), "frame_skip": (1, 100), "repeat_action_probability": (0, 1.0),
    "start_level": (0, 10**9), "num_levels": (1, 10**9),
}
MAX_LAYERS = 64


def fail(message: str) -> NoReturn:
    """End the program for bad input: one line on stderr, exit code 2."""
    print("error: " + "".join(c if c.isprintable() else " " for c in message[:1000]), file=sys.stderr)
    raise SystemExit(2)


# ======================================================================================================================
# Main
# ======================================================================================================================


def check(args: Args) -> None:
    """End the program for flags that cannot work, before anything is written."""
    for name, (low, high) in RANGES.items():
        if (value := getattr(args, name)) is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} must lie between {low:.10g} and {high:.10g}, not {value}")
    folder = f"{Path(args.out).resolve().parent}/"
    if not Path(args.out).name or os.path.exists(args.out) or not os.access(folder, os.W_OK):
        fail(f"cannot write {args.out}: it exists, or there is no folder for it")


def main(args: Args) -> dict[str, float]:
    """Read the agent, evaluate it and write the teacher's file; returns mean and deviation of its returns."""
    check(args)
    import gymnax

    library = "gymnax" if args.env_id in gymnax.registered_envs else "envpool"
    suite = gymnax_suite(args.env_id) if library == "gymnax" else suite_of(args.env_id)
    task = gymnax_shape(args.env_id) if library == "gymnax" else (task_shape(args.env_id), suite == "mujoco")
    (shape, num_actions), gaussian = task
    for name in sum(VARIANTS.values(), ()):
        if name not in VARIANTS.get(suite, ()) and getattr(args, name) != getattr(Args, name):
            fail(f"--{name.replace('_', '-')} is not for {args.env_id}")
    with checked(f"{args.agent} is no agent of stable-baselines3 or CleanRL for {args.env_id}"):
        agent = read_agent(args.agent, shape)
        check_agent(agent, shape, num_actions, gaussian)
    if args.vecnormalize and suite not in ("mujoco", "states"):
        fail(f"--vecnormalize is for tasks with states, not for {args.env_id}")
    stats = read_stats(args.vecnormalize, args.trust_pickle, shape) if args.vecnormalize else None
    if stats:
        with np.errstate(over="ignore"):
            agent, stats = normalized(agent, stats)

    # Play
    about = {"env_id": args.env_id, "variant": {name: getattr(args, name) for name in VARIANTS.get(suite, ())}}
    about |= {"library": library} if library == "gymnax" else {}
    largest = np.zeros(shape)  # of the observations' magnitudes

    def normalize(x):
        if stats:
            return np.clip((x - stats["mean"]) / np.sqrt(stats["var"] + np.float32(1e-8)), -10.0, 10.0)
        np.maximum(largest, np.abs(x).max(0), out=largest)
        return x

    with np.errstate(all="ignore"):  # numbers that are too large are refused below
        evaluation = assess(about, agent, suite, normalize, args.eval_episodes, args.seed)
        if suite in ("mujoco", "states") and not stats:
            agent, stats = unnormalized(agent, largest)

    # Write
    arrays = {"policy": tree(agent.policy, agent.log_std), "value": tree(agent.value, None)}
    arrays |= {"obs_stats": stats} if stats else {}
    if not all(np.isfinite(x).all() for x in (evaluation["returns"], *jax.tree.leaves(arrays))):
        fail(f"{args.agent} has numbers so large that what it computes is not finite")
    command = shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]])
    versions = {"python": sys.version.split()[0], "jax": jax.__version__, "flax": flax.__version__,
                library: importlib.metadata.version(library), "device": jax.devices()[0].device_kind}
    about |= {"script": "import_teacher", "command": command, "args": vars(args), "versions": versions,
              "role": "teacher", "network": describe_network(agent), "action_dim": num_actions,
              "observation_shape": shape, "evaluation": evaluation}
    save_file(Path(args.out), about, arrays)
    print(f"{args.out}: {args.env_id} teacher, {describe(evaluation)}")
    return {"mean": evaluation["mean"], "std": evaluation["std"]}


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # who read the output has gone: --help | head
        raise SystemExit(1) from None
    except OSError as error:  # a full disk
        fail(str(error))
