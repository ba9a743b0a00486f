"""Train an agent with stable-baselines3, import it as a teacher, and distil a student from it by PPD.

    python benchmark/imported.py --agent hopper --json benchmark/results/imported/hopper.json

It needs requirements-sb3.txt. Hyperparameters of the agent are the defaults of stable-baselines3, but for what AGENTS
says. Its returns are measured twice: there, in Gymnasium (coinrun: in envpool, on unseen levels), and by
import_teacher.py.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import tyro
from reference import read_model

ROOT = Path(__file__).resolve().parents[1]
UNSEEN = {"start_level": 200, "num_levels": 2**31 - 1 - 200}
STATES = {"policy": "MlpPolicy", "num_envs": 8}
AGENTS = {  # of each agent: its task, what it is trained with, and the student's command without the teacher
    "cartpole": {
        "env_id": "CartPole-v1", **STATES, "steps": 100_000, "episodes": 100,
        "flags": {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8,
                  "learning_rate": 1e-3},
        "student": "ppd_gymnax.py --env-id CartPole-v1 --num-seeds 1 --total-timesteps 100000"},
    "hopper": {
        "env_id": "Hopper-v4", **STATES, "steps": 400_000, "episodes": 50,
        "flags": {"n_steps": 256, "batch_size": 128},
        "student": "ppd_mujoco.py --total-timesteps 300000"},
    "coinrun": {
        "env_id": "CoinrunEasy-v0", "policy": "CnnPolicy", "num_envs": 16, "steps": 300_000, "episodes": 200,
        "flags": {"n_steps": 256, "batch_size": 512, "n_epochs": 3, "gamma": 0.995, "ent_coef": 0.01},
        "student": "ppd_procgen.py --student-size smaller --total-timesteps 200000"},
}


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    agent: Literal["cartpole", "hopper", "coinrun"] = "hopper"
    """which agent, as AGENTS describes them"""
    seed: int = 1
    """seed of the agent's training; the student has its script's default"""
    threads: int = 1
    """threads of torch"""
    json: Path | None = None
    """also write the result to this file"""


def make_envs(agent: dict, num_envs: int, seed: int, **levels):
    """Make environments of the agent's task for stable-baselines3."""
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

    if agent["policy"] == "MlpPolicy":
        envs = VecMonitor(DummyVecEnv([lambda: gymnasium.make(agent["env_id"])] * num_envs))
        envs.seed(seed)
        return envs
    import envpool

    pool = envpool.make_gymnasium(agent["env_id"], num_envs=num_envs, seed=seed, **levels)

    class Images(VecEnv):
        """envpool's environments; what follows an end is the first observation, one step late."""

        def reset(self):
            return pool.reset()[0]

        def step_async(self, actions):
            self.actions = actions.astype(np.int32)

        def step_wait(self):
            x, rewards, terminations, truncations, _ = pool.step(self.actions)
            return x, rewards, terminations | truncations, [{"terminal_observation": each} for each in x]

        def close(self):
            pool.close()

        def get_attr(self, name, indices=None):
            return [None] * num_envs

        def set_attr(self, name, value, indices=None): ...

        def env_method(self, name, *args, indices=None, **options): ...

        def env_is_wrapped(self, wrapper, indices=None):
            return [False] * num_envs

    return Images(num_envs, pool.observation_space, pool.action_space)


def play(agent: dict, model, normalize) -> list[float]:
    """Return the first episode's return of each of so many environments: likeliest actions, sampled ones on coinrun."""
    envs = make_envs(agent, agent["episodes"], 10**9, **UNSEEN)
    x, returns, running = envs.reset(), np.zeros(envs.num_envs), np.ones(envs.num_envs, bool)
    while running.any():
        actions, _ = model.predict(normalize(x), deterministic=agent["policy"] == "MlpPolicy")
        x, rewards, dones, _ = envs.step(actions)
        returns += np.where(running, rewards, 0.0)
        running &= ~dones
    envs.close()
    return returns.tolist()


def summary(returns: list[float]) -> dict:
    """Return mean, standard deviation and returns."""
    return {"mean": float(np.mean(returns)), "std": float(np.std(returns)), "returns": returns}


def script(*words: str, folder: Path) -> None:
    """Run a script of this repository."""
    subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=folder, check=True)


def main(args: Args) -> dict:
    """Train, import and distil; returns what the file has."""
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)  # not only when all is measured
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(args.threads)
    agent, folder = AGENTS[args.agent], Path(tempfile.mkdtemp())
    envs = make_envs(agent, agent["num_envs"], args.seed, start_level=0, num_levels=200)
    flags, normalize = [], np.asarray
    if args.agent == "hopper":
        envs, flags = VecNormalize(envs), ["--vecnormalize", "stats.npz"]
        normalize = envs.normalize_obs
    model, began = PPO(agent["policy"], envs, seed=args.seed, device="cpu", **agent["flags"]), time.perf_counter()
    model.learn(agent["steps"])
    seconds = time.perf_counter() - began
    model.save(folder / "agent.zip")
    if flags:
        stats = envs.obs_rms
        np.savez(folder / "stats.npz", mean=stats.mean, var=stats.var, clip_obs=envs.clip_obs, epsilon=envs.epsilon)
    theirs = play(agent, model, normalize)
    envs.close()

    script("import_teacher.py", "agent.zip", "--env-id", agent["env_id"], *flags, folder=folder)
    script(*agent["student"].split(), "--teacher", "teacher.safetensors", "--run-dir", "run", folder=folder)
    teacher = read_model(folder / "teacher.safetensors")[0]["evaluation"]
    found = json.loads((folder / "run/results.json").read_text())
    student = np.ravel(found.get("results", found)["student"]["returns"]).tolist()  # of ppd_gymnax.py a list a seed
    result = {
        "imported": args.agent, "env_id": agent["env_id"], "steps": agent["steps"], "seed": args.seed,
        "seconds": seconds, "student_command": agent["student"],
        "versions": {name: version(name) for name in ("torch", "stable-baselines3", "gymnasium")},
        "theirs": summary(theirs), "teacher": teacher, "student": summary(student)}
    print(f"{np.mean(theirs):.1f} ± {np.std(theirs):.1f} by stable-baselines3, {len(theirs)} episodes; files: {folder}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
