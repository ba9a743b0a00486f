"""Steps per second of every method, beside the most this machine could give it, and beside the reference.

    python benchmark/speed.py --rounds 3
    python benchmark/speed.py --case coinrun-ppd --reference ../sb3_distill --reference-python ../venv/bin/python

Each measurement is a process of its own; rounds take them in turn, so that a noisy machine troubles all alike. An
algorithm that learns only between rollouts can do no better than to spend the time of the environments alone and that
of its matrix products alone, so the machine's limit, measured in the same round, is

    1 / (1 / environment steps per second + floating-point operations per step / operations per second).

The operations are those of acting, of the rollout's values, log-probabilities and teacher, and of forward and backward
passes over all epochs; convolutions count as products. All else (Adam, sampling, logging, Python) counts against the
script. The reference is sb3_distill (PyTorch) on the same environments, networks and hyperparameters; it needs
stable-baselines3 and envpool in the Python that runs it. Rollouts have 64 steps (the baselines' 5), PPO's too.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


class Case(NamedTuple):
    """A method on a task."""

    env_id: str
    script: str
    size: str  # of the student, or of the teacher where that is what is trained
    timesteps: int


CASES = {
    "coinrun-ppo": Case("CoinrunEasy-v0", "train_teacher", "smaller", 6 * 1152),
    "coinrun-ppd": Case("CoinrunEasy-v0", "ppd_procgen", "smaller", 6 * 1152),
    "coinrun-sd": Case("CoinrunEasy-v0", "student_distill", "smaller", 100 * 90),
    "coinrun-td": Case("CoinrunEasy-v0", "teacher_distill", "smaller", 100 * 90),
    "pong-ppo": Case("Pong-v5", "train_teacher", "smaller", 4 * 1152),
    "pong-ppd": Case("Pong-v5", "ppd_atari", "smaller", 4 * 1152),
    "pong-impala-ppo": Case("Pong-v5", "train_teacher", "same", 2 * 1152),
    "pong-impala-ppd": Case("Pong-v5", "ppd_atari", "same", 2 * 1152),
    "halfcheetah-ppo": Case("HalfCheetah-v4", "train_teacher", "same", 60 * 1152),
    "halfcheetah-ppd": Case("HalfCheetah-v4", "ppd_mujoco", "larger", 60 * 1152),
    "halfcheetah-sd": Case("HalfCheetah-v4", "student_distill", "larger", 600 * 90),
    "halfcheetah-td": Case("HalfCheetah-v4", "teacher_distill", "larger", 600 * 90),
}
NUM_ENVS = 18


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    case: tuple[str, ...] = tuple(CASES)
    """what is measured"""
    rounds: int = 3
    """rounds, of which the medians are given"""
    longer: float = 1.0
    """times as many steps in each measurement: where a GPU learns, a few updates take no time"""
    reference: str | None = None
    """folder of a checkout of sb3_distill to measure as well"""
    reference_python: str = sys.executable
    """Python that has stable-baselines3 and envpool"""
    json: str | None = None
    """also write every round's figures to this file"""


# ======================================================================================================================
# One measurement, in a process of its own
# ======================================================================================================================


def num_steps(case: Case) -> int:
    """Return the steps of each environment in a rollout."""
    return 5 if case.script.endswith("distill") else 64


def make_envs(env_id: str):
    """Make the environments as the scripts do, for the measurements without them."""
    import envpool

    options = {"num_levels": 200, "start_level": 0} if "Easy" in env_id else {}
    options |= {"episodic_life": True} if env_id.startswith("Pong") else {}
    return envpool.make_gymnasium(env_id, num_envs=NUM_ENVS, seed=1, **options)


def measure_limit(case: Case) -> dict[str, float]:
    """Measure environments alone and matrix products alone, and count the operations of a step."""
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp

    import train_teacher as m

    envs, rng = make_envs(case.env_id), np.random.default_rng(0)
    space, shape = envs.action_space, envs.observation_space.shape
    actions = (rng.uniform(space.low, space.high, (64, NUM_ENVS, *space.shape)) if space.shape
               else rng.integers(0, space.n, (64, NUM_ENVS)).astype(np.int32))
    envs.reset()
    for action in actions:  # to warm up
        envs.step(action)
    steps, began = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - began < 2.0:
        for action in actions:
            envs.step(action)
        steps += 64
    environment = steps * NUM_ENVS / (time.perf_counter() - began)

    x = jnp.asarray(rng.normal(size=(2048, 2048)), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    began = time.perf_counter()
    for _ in range(20):
        product(x, x).block_until_ready()
    products = 20 * 2 * 2048**3 / (time.perf_counter() - began)

    def operations(module, rows: jax.ShapeDtypeStruct) -> float:
        """Count what one row takes through a network, forward."""
        params = jax.eval_shape(module.init, jax.random.PRNGKey(0), rows)
        return jax.jit(module.apply).lower(params, rows).compile().cost_analysis()["flops"] / rows.shape[0]

    dim = space.shape[0] if space.shape else int(space.n)
    network = m.NETWORKS[m.suite_of(case.env_id)][case.size]
    taught = m.NETWORKS[m.suite_of(case.env_id)]["same" if "Cheetah" in case.env_id else case.size]
    rows = jax.ShapeDtypeStruct((NUM_ENVS, *shape), jnp.float32 if len(shape) == 1 else jnp.uint8)
    policy, value = operations(m.Policy(network, dim), rows), operations(m.Value(network), rows)
    teacher = operations(m.Policy(taught, dim), rows) if case.script != "train_teacher" else 0.0
    if case.script.endswith("distill"):
        actor = teacher if case.script == "teacher_distill" else policy
        each = actor + teacher + operations(m.Value(taught), rows) + 3 * (policy + value)
    else:
        each = 2 * policy + value * 65 / 64 + teacher + 4 * 3 * (policy + value)
    return {"environment": environment, "products": products, "operations": each,
            "limit": 1 / (1 / environment + each / products)}


def random_teacher(env_id: str, size: str, path: Path) -> None:
    """Write a teacher of random weights: what it does plays no part in the speed."""
    import jax
    import jax.numpy as jnp

    import train_teacher as m

    flags = m.Args(env_id=env_id, size=size)
    variant = {name: getattr(flags, name) for name in m.VARIANTS[m.suite_of(env_id)]}
    envs = make_envs(env_id)
    shape, dim = envs.observation_space.shape, int(envs.action_space.n)
    x = jnp.zeros((1, *shape), jnp.uint8)
    params = {"policy": m.Policy(flags.network, dim).init(jax.random.PRNGKey(0), x),
              "value": m.Value(flags.network).init(jax.random.PRNGKey(1), x)}
    m.save_file(path, {
        "env_id": env_id, "script": "benchmark/speed", "args": {}, "role": "teacher", "command": "", "versions": {},
        "network": flags.network._asdict(), "action_dim": dim, "observation_shape": list(shape), "variant": variant,
        "evaluation": {"mean": 0.0, "std": 0.0, "games": 0, "returns": []}}, params)


def measure_script(case: Case) -> dict[str, float]:
    """Run a script, its whole loop with logging and checkpoints; the speed is that after its first update."""
    sys.path.insert(0, str(ROOT))
    m = __import__(case.script)
    teacher = case.script == "train_teacher"
    flags = {"size" if teacher else "student_size": case.size, "num_steps": num_steps(case)}
    flags |= {"log_every": 10} if case.script.endswith("distill") else {}  # the speed counts from the first row on
    nothing = {"mean": 0.0, "std": 0.0, "games": 0, "returns": []}
    m.assess = lambda *rest: nothing | {"train_levels": nothing}
    with tempfile.TemporaryDirectory() as folder:
        if not teacher and "Cheetah" not in case.env_id:
            import jax

            jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
            flags["teacher"] = f"{folder}/teacher.safetensors"
            random_teacher(case.env_id, case.size, Path(flags["teacher"]))
        return {"SPS": m.main(m.Args(
            env_id=case.env_id, total_timesteps=case.timesteps, run_dir=f"{folder}/run", **flags))["SPS"]}


def measure_reference(case: Case, folder: str) -> dict[str, float]:
    """Run the reference on the same task; the speed is that after its first update."""
    sys.path.insert(0, folder)
    import torch
    from sb3_distill import ProximalPolicyDistillation, StudentDistill, TeacherDistill
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize
    from torch import nn

    class Envs(VecEnv):
        """envpool behind the interface of stable-baselines3."""

        def __init__(self):
            self.envs = make_envs(case.env_id)
            super().__init__(NUM_ENVS, self.envs.observation_space, self.envs.action_space)

        def reset(self):
            return self.envs.reset()[0]

        def step_async(self, actions):
            self.actions = actions.astype(self.envs.action_space.dtype)

        def step_wait(self):
            observations, rewards, terminations, truncations, _ = self.envs.step(self.actions)
            return observations, rewards, terminations | truncations, [{} for _ in range(NUM_ENVS)]

        def close(self):
            self.envs.close()

        def get_attr(self, name, indices=None):
            return [None] * NUM_ENVS

        def set_attr(self, name, value, indices=None):
            pass

        def env_method(self, name, *args, indices=None, **kwargs):
            return [None] * NUM_ENVS

        def env_is_wrapped(self, wrapper, indices=None):
            return [False] * NUM_ENVS

    class Residual(nn.Module):
        """A residual block of IMPALA-CNN."""

        def __init__(self, channels):
            super().__init__()
            self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1),
                                        nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))

        def forward(self, x):
            return x + self.layers(x)

    class Features(BaseFeaturesExtractor):
        """The scripts' convolutional networks."""

        def __init__(self, space):
            units = {"smaller": 64, "same": 256, "larger": 1024}[case.size]
            super().__init__(space, units)
            layers, last = [], space.shape[0]
            if case.size == "smaller":
                for channels, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
                    layers += [nn.Conv2d(last, channels, size, stride), nn.ReLU()]
                    last = channels
            else:
                for channels in {"same": (16, 32, 32), "larger": (32, 64, 64)}[case.size]:
                    layers += [nn.Conv2d(last, channels, 3, padding=1), nn.MaxPool2d(3, 2, 1),
                               Residual(channels), Residual(channels)]
                    last = channels
                layers.append(nn.ReLU())
            self.layers = nn.Sequential(*layers, nn.Flatten())
            with torch.no_grad():
                size = self.layers(torch.zeros(1, *space.shape)).shape[1]
            self.head = nn.Sequential(nn.Linear(size, units), nn.ReLU())

        def forward(self, x):
            return self.head(self.layers(x))

    class Clock(BaseCallback):
        """Notes when each rollout begins."""

        def __init__(self):
            super().__init__()
            self.times = []

        def _on_rollout_start(self):
            self.times.append((time.perf_counter(), self.num_timesteps))

        def _on_step(self):
            return True

    states = "Cheetah" in case.env_id
    envs = VecNormalize(Envs(), norm_obs=states)
    images = {"policy": "CnnPolicy", "policy_kwargs": {
        "features_extractor_class": Features, "net_arch": [], "share_features_extractor": False}}

    def mlp(width: int) -> dict:
        layers = [width, width]
        return {"policy": "MlpPolicy", "policy_kwargs": {
            "net_arch": {"pi": layers, "vf": layers}, "activation_fn": nn.ReLU}}

    width = {"smaller": 128, "same": 256, "larger": 512}[case.size]
    flags = (mlp(width) if states else images) | {
        "env": envs, "n_steps": num_steps(case), "gamma": 0.999, "learning_rate": 3e-4}
    several = {"batch_size": 384, "n_epochs": 4, "gae_lambda": 0.9, "ent_coef": 0.0}
    if case.script == "train_teacher":
        model = PPO(**flags, **several)
    elif case.script.startswith("ppd"):
        model = ProximalPolicyDistillation(**flags, **several)
    else:
        model = {"student_distill": StudentDistill, "teacher_distill": TeacherDistill}[case.script](**flags)
    if case.script != "train_teacher":
        model.set_teacher(PPO(**((mlp(256) if states else images) | {"env": envs, "n_steps": 64})))
    clock = Clock()
    model.learn(case.timesteps, callback=clock)
    (began, first), ended = clock.times[1], time.perf_counter()
    return {"SPS": (model.num_timesteps - first) / (ended - began)}


# ======================================================================================================================
# Rounds
# ======================================================================================================================


def run(args: Args, what: str, name: str) -> dict[str, float]:
    """Take one measurement in a process of its own."""
    python = args.reference_python if what == "reference" else sys.executable
    words = [python, __file__, what, name, str(args.longer), *([args.reference] if what == "reference" else [])]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise SystemExit(f"error: {what} of {name} failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(args: Args) -> dict[str, dict[str, float]]:
    """Measure all cases in turn, round by round; print and return the medians."""
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # not only when all is measured
    kinds = ["limit", "script"] + ["reference"] * (args.reference is not None)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in args.case}
    for _ in range(args.rounds):
        for name in args.case:
            found = {what: run(args, what, name) for what in kinds}
            row = found["limit"] | {"script": found["script"]["SPS"]}
            row["share"] = row["script"] / row["limit"]
            if args.reference:
                row |= {"reference": found["reference"]["SPS"]}
                row["ratio"] = row["script"] / row["reference"]
            rounds[name].append(row)
            beside = f", the reference {row['reference']:,.0f}: {row['ratio']:.2f}" if args.reference else ""
            print(f"{name:<18}{row['script']:>8,.0f} steps/s, {row['share']:.0%} of the limit{beside}", flush=True)
    medians = {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
               for name, rows in rounds.items()}
    print(f"\nmedians of {args.rounds} rounds, {os.cpu_count()} cores")
    for name, row in medians.items():
        beside = f"{row['reference']:>9,.0f}{row['ratio']:>7.2f}" if args.reference else ""
        print(f"{name:<18}{row['script']:>8,.0f} of {row['limit']:>8,.0f} steps/s, {row['share']:.0%}{beside}")
    if args.json:
        from importlib.metadata import version

        import jax

        command = f"python benchmark/speed.py --case {' '.join(args.case)} --rounds {args.rounds}"
        command += f" --longer {args.longer:g}" * (args.longer != 1)
        command += " --reference FOLDER" * (args.reference is not None)
        about = {"command": command, "cores": os.cpu_count(), "device": jax.devices()[0].device_kind,
                 "versions": {name: version(name) for name in ("jax", "flax", "envpool")}}
        Path(args.json).write_text(json.dumps(about | {"speed": medians, "rounds": rounds}, indent=2) + "\n")
    return medians


if __name__ == "__main__":
    if sys.argv[1:2] in (["limit"], ["script"], ["reference"]):  # a measurement: see `run`
        what, name, longer, *rest = sys.argv[1:]
        case = CASES[name]._replace(timesteps=round(CASES[name].timesteps * float(longer)))
        print(json.dumps({"limit": measure_limit, "script": measure_script, "reference": measure_reference}[what](
            case, *rest)))
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__))
