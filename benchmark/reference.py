"""Run PPD of sb3_distill, the author's PyTorch code, from a teacher of this repository.

    python benchmark/reference.py --reference FOLDER --env-id Hopper-v4 --student-size smaller --seed 100 \
        --json benchmark/results/reference/Hopper-v4__smaller__100.json

FOLDER is a checkout of sb3_distill. The Python that runs this needs torch, stable-baselines3, gymnasium[mujoco],
safetensors and tyro. The tasks are Gymnasium's own v4. The teacher's weights move into a policy of stable-baselines3,
and the program stops unless it then acts as they do. Its frozen statistics normalise the observations of teacher
and student. Hyperparameters are the defaults of ppd_mujoco.py: the paper's, with 3 minibatches of 384, and with rewards
normalised by the γ of the run. Everything else is sb3_distill and stable-baselines3 as they are.
Evaluation: deterministic actions and raw rewards, the first episode of each of 50 environments.
"""

import dataclasses
import importlib.util
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import safetensors

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = {"smaller": (128, 64), "same": (256, 256), "larger": (512, 512)}
NUM_ENVS, NUM_STEPS, BATCH_SIZE = 18, 64, 384
POINTS = 20  # of the curve in the file


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    reference: str
    """folder of a checkout of sb3_distill"""
    env_id: str = "Hopper-v4"
    """MuJoCo task of Gymnasium"""
    student_size: Literal["smaller", "same", "larger"] = "smaller"
    """smaller (128-64 units), same (256-256) or larger (512-512)"""
    seed: int = 100
    """seed of the student and of the environments"""
    teacher: Path | None = None
    """model file of the teacher; left out, the shipped one of the task and the seed"""
    total_timesteps: int = 2_000_000
    """environment steps; the last rollout is completed"""
    distill_coef: float = 1.0
    """weight of the distillation term (λ)"""
    eval_episodes: int = 50
    """episodes of each evaluation, each of an environment of its own"""
    threads: int = 1
    """threads of torch"""
    json: Path | None = None
    """also write the result to this file"""


# ======================================================================================================================
# The teacher
# ======================================================================================================================


def read_model(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Return what a model file says of itself, and its arrays by name."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            return json.loads(file.metadata()["about"]), {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # of many kinds, for content of any kind
        fail(f"{path} is no model: {error}")


def normalize(arrays: dict[str, np.ndarray], observations: np.ndarray) -> np.ndarray:
    """Normalise observations [..., D] by a model's frozen statistics, and clip them to ±10."""
    centred = observations - arrays["obs_stats/mean"]
    return np.clip(centred / np.sqrt(arrays["obs_stats/var"] + 1e-8), -10, 10).astype(np.float32)


def act(arrays: dict[str, np.ndarray], observations: np.ndarray) -> np.ndarray:
    """Return the mean actions [..., A] of a model for raw observations [..., D], not yet clipped to the bounds."""
    x = normalize(arrays, observations)
    layers = sum("policy/params/Dense" in name for name in arrays) // 2
    for i in range(layers):
        x = x @ arrays[f"policy/params/Dense_{i}/kernel"] + arrays[f"policy/params/Dense_{i}/bias"]
        x = np.maximum(x, 0) if i < layers - 1 else x
    return x


def sb3_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a model's weights by the names of an ActorCriticPolicy of stable-baselines3.

    Kernels [inputs, outputs] become weights [outputs, inputs]. Hidden layers have even numbers there, since the ReLUs
    between them are counted too.
    """
    found = {"log_std": arrays["policy/params/log_std"]}
    for network, head in (("policy", "action_net"), ("value", "value_net")):
        layers = sum(f"{network}/params/Dense" in name for name in arrays) // 2
        for i in range(layers):
            name = f"mlp_extractor.{network}_net.{2 * i}" if i < layers - 1 else head
            found[f"{name}.weight"] = arrays[f"{network}/params/Dense_{i}/kernel"].T
            found[f"{name}.bias"] = arrays[f"{network}/params/Dense_{i}/bias"]
    return found


def random_observations(arrays: dict[str, np.ndarray], count: int) -> np.ndarray:
    """Draw raw observations [count, D], with three times the spread of those the model has seen."""
    rng = np.random.default_rng(0)
    mean, std = arrays["obs_stats/mean"], np.sqrt(arrays["obs_stats/var"])
    return (mean + 3 * std * rng.normal(size=(count, len(mean)))).astype(np.float32)


def move_teacher(model, arrays: dict[str, np.ndarray]) -> None:
    """Give a PPO of stable-baselines3 a model's weights; AssertionError unless it then acts as the model.

    Its mean actions must equal those of `act` on 1,000 random observations, to 1e-5 of their size (of 1 at least).
    """
    import torch

    weights = {name: torch.tensor(np.ascontiguousarray(x)) for name, x in sb3_arrays(arrays).items()}
    model.policy.load_state_dict(weights)  # an error if a name is missing, or one too many
    model.policy.set_training_mode(False)
    observations = random_observations(arrays, 1000)
    with torch.no_grad():
        x = torch.tensor(model.get_env().normalize_obs(observations))
        theirs = model.policy.get_distribution(x).mode().numpy()
    ours = act(arrays, observations)
    worst = (np.abs(theirs - ours) / np.maximum(1, np.abs(ours))).max()
    assert worst < 1e-5, f"the moved teacher acts differently: by up to {worst:g}"


# ======================================================================================================================
# Environments and evaluation
# ======================================================================================================================


def gamma_of(env_id: str) -> float:
    """Return the discount of a task (appendix A.3)."""
    return 0.995 if env_id in ("Hopper-v4", "Swimmer-v4") else 0.999


def make_envs(env_id: str, arrays: dict[str, np.ndarray]):
    """Make the environments for training: observations by frozen statistics, rewards by running ones."""
    import gymnasium
    from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

    envs = VecMonitor(DummyVecEnv([lambda: gymnasium.make(env_id, disable_env_checker=True)] * NUM_ENVS))
    envs = VecNormalize(envs, gamma=gamma_of(env_id), clip_obs=10.0, clip_reward=10.0, epsilon=1e-8)
    envs.obs_rms.mean = arrays["obs_stats/mean"].astype(np.float64)
    envs.obs_rms.var = arrays["obs_stats/var"].astype(np.float64)
    envs.obs_rms.update = lambda observations: None  # frozen
    return envs


def evaluate(args: Args, arrays: dict[str, np.ndarray], policy) -> dict:
    """Play the first episode of each environment with deterministic actions; returns every return, mean and std."""
    import gymnasium

    envs = [gymnasium.make(args.env_id) for _ in range(args.eval_episodes)]
    observations = np.stack([env.reset(seed=10**9 + args.seed + i)[0] for i, env in enumerate(envs)])
    returns, running = np.zeros(len(envs)), np.ones(len(envs), bool)
    while running.any():
        actions, _ = policy.predict(normalize(arrays, observations), deterministic=True)  # clipped to the bounds
        for i in np.flatnonzero(running):
            observations[i], reward, terminated, truncated, _ = envs[i].step(actions[i])
            returns[i] += reward
            running[i] = not (terminated or truncated)
    for env in envs:
        env.close()
    return {"mean": returns.mean(), "std": returns.std(), "returns": returns.tolist()}


# ======================================================================================================================
# Training
# ======================================================================================================================


def network(hidden: tuple[int, ...]) -> dict:
    """Return the options of two separate networks of stable-baselines3 with these hidden layers."""
    from torch import nn

    return {"net_arch": {"pi": list(hidden), "vf": list(hidden)}, "activation_fn": nn.ReLU}


def make_teacher(about: dict, arrays: dict[str, np.ndarray], envs):
    """Make a PPO of stable-baselines3 with a model's weights."""
    from stable_baselines3 import PPO

    teacher = PPO("MlpPolicy", envs, policy_kwargs=network(about["network"]["hidden"]), device="cpu")
    move_teacher(teacher, arrays)
    return teacher


def make_student(args: Args, envs, teacher):
    """Make the PPD of sb3_distill, with a student of fresh weights."""
    from sb3_distill import ProximalPolicyDistillation

    student = ProximalPolicyDistillation(
        "MlpPolicy", envs, policy_kwargs=network(HIDDEN[args.student_size]), seed=args.seed, device="cpu",
        n_steps=NUM_STEPS, batch_size=BATCH_SIZE, n_epochs=4, learning_rate=3e-4, gamma=gamma_of(args.env_id),
        gae_lambda=0.9, clip_range=0.2, ent_coef=0.0, vf_coef=0.5, max_grad_norm=0.5)  # Adam's eps is 1e-5 by default
    student.set_teacher(teacher, distill_lambda=args.distill_coef)
    return student


def train(args: Args, student, teacher) -> list[dict]:
    """Train the student; returns its curve, each point a mean over the updates since the last.

    A point has the steps done, KL(teacher || student) on the rollouts before they are learned from, and the mean
    return of the last 100 episodes of training.
    """
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.distributions import kl_divergence

    curve, divergences = [], []

    class Curve(BaseCallback):
        """Measures the KL divergence after each rollout."""

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            rows = torch.tensor(self.model.rollout_buffer.observations).flatten(0, 1)
            with torch.no_grad():
                policies = [model.policy.get_distribution(rows) for model in (teacher, self.model)]
                divergences.append(kl_divergence(*policies).sum(-1).mean().item())
            if self.num_timesteps >= (len(curve) + 1) * args.total_timesteps / POINTS:
                returns = [episode["r"] for episode in self.model.ep_info_buffer]
                curve.append({"steps": self.num_timesteps, "kl": float(np.mean(divergences)),
                              "return": float(np.mean(returns)) if returns else None})
                divergences.clear()
                print(curve[-1], flush=True)

    student.learn(args.total_timesteps, callback=Curve())
    return curve


def command_line(args: Args) -> str:
    """Return the command of this run, with FOLDER for the checkout."""
    flags = {"reference": "FOLDER", "env-id": args.env_id, "student-size": args.student_size, "seed": args.seed}
    others = {"total-timesteps": args.total_timesteps, "distill-coef": args.distill_coef,
              "eval-episodes": args.eval_episodes, "threads": args.threads}
    flags |= {name: value for name, value in others.items() if value != getattr(Args, name.replace("-", "_"))}
    flags |= {"teacher": args.teacher.name} if args.teacher else {}
    return "python benchmark/reference.py " + " ".join(f"--{name} {value}" for name, value in flags.items())


def versions(reference: str) -> dict[str, str]:
    """Return the versions of all that the result rests on."""
    found = {name: version(name) for name in ("torch", "stable-baselines3", "gymnasium", "mujoco", "numpy")}
    commit = subprocess.run(["git", "-C", reference, "rev-parse", "HEAD"], capture_output=True, text=True)
    return {"python": platform.python_version(), "sb3_distill": commit.stdout.strip()} | found


def fail(message: str) -> NoReturn:
    """End the program for bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(args: Args) -> dict:
    """Distil one student, evaluate it and its teacher, and return what the file has."""
    path = args.teacher or ROOT / f"teachers/{args.env_id}__{args.seed}.safetensors"
    sys.path.insert(0, args.reference)
    if importlib.util.find_spec("sb3_distill") is None:
        fail(f"{args.reference} is no checkout of sb3_distill")
    if not path.exists():
        fail(f"there is no {path}; name a teacher of {args.env_id} with --teacher")
    about, arrays = read_model(path)
    if about["env_id"] != args.env_id or about["network"]["kind"] != "mlp":
        fail(f"{path} is a teacher of {about['env_id']}, not of {args.env_id}")
    if about["network"].get("activation", "relu") != "relu" or about["network"].get("value_hidden"):
        fail(f"{path} has tanh layers or a value network of other widths; this moves ReLU and equal widths alone")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # not only when all is computed
    import torch

    torch.set_num_threads(args.threads)
    envs = make_envs(args.env_id, arrays)
    teacher = make_teacher(about, arrays, envs)
    student = make_student(args, envs, teacher)
    taught = evaluate(args, arrays, teacher.policy)
    print(f"teacher: {taught['mean']:.1f} ± {taught['std']:.1f}", flush=True)
    began = time.perf_counter()
    curve = train(args, student, teacher)
    seconds = time.perf_counter() - began
    learned = evaluate(args, arrays, student.policy)
    result = {
        "command": command_line(args), "versions": versions(args.reference), "env_id": args.env_id,
        "student_size": args.student_size, "seed": args.seed, "teacher_file": path.name,
        "teacher": taught, "student": learned, "ratio": learned["mean"] / taught["mean"],
        "curve": curve, "steps": student.num_timesteps, "seconds": seconds}
    print(f"student: {learned['mean']:.1f} ± {learned['std']:.1f}, {result['ratio']:.3f} of the teacher; "
          f"{student.num_timesteps:,} steps in {seconds:,.0f} s")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Args, description=__doc__))
