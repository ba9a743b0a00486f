"""Probe environments on which the right values and actions are known, learned by the shipped functions.

They behave as envpool does: the observation after an end is the true final one, and the step after it is a phantom.
"""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs_procgen, small

import ppd_atari
import ppd_mujoco
import ppd_procgen
import student_distill
import teacher_distill
import train_teacher


class Probe:
    """Episodes of `length` steps whose observation is (time / length, sign); reward(action, sign) at every step.

    Where they are truncated the time stays hidden: an arbitrary cut is not a state that a value could know of.
    """

    def __init__(self, length, reward, truncates=False, num_envs=8):
        self.length, self.reward, self.truncates, self.rng = length, reward, truncates, np.random.default_rng(0)
        self.times, self.done = np.zeros(num_envs, int), np.zeros(num_envs, bool)
        self.signs = self.rng.choice([-1.0, 1.0], num_envs)
        self.action_space = SimpleNamespace(low=np.full(1, -2.0), high=np.full(1, 2.0), shape=(1,), dtype=np.float64)

    def observe(self):
        return np.stack([self.times / self.length * (not self.truncates), self.signs], 1)

    def reset(self):
        return self.observe(), {}

    def step(self, actions):
        phantoms = self.done
        rewards = np.where(phantoms, 0.0, self.reward(actions.reshape(len(phantoms)), self.signs)).astype(np.float32)
        self.times = np.where(phantoms, 0, self.times + 1)
        self.signs = np.where(phantoms, self.rng.choice([-1.0, 1.0], len(phantoms)), self.signs)
        self.done = self.times == self.length
        none = np.zeros_like(self.done)
        ends = (none, self.done) if self.truncates else (self.done, none)
        return self.observe(), rewards, *ends, {"terminated": ends[0]}


class Pictures(Probe):
    """The same with three actions, and images: the left half is bright where the sign is -1, else the right half."""

    def __init__(self, *args, **flags):
        super().__init__(*args, **flags)
        self.action_space = SimpleNamespace(shape=(), n=3)

    def observe(self):
        return np.where((np.arange(36) < 18) == (self.signs < 0)[:, None, None, None], 250, 5).astype(np.uint8).repeat(36, 2)


def learn(m, envs, updates, gamma=0.5, teacher=None, **flags):
    """The loop of main, on a probe; returns the networks, the final state, the statistics, and the last metrics."""
    images, any_suite, baseline = isinstance(envs, Pictures), m in (train_teacher, student_distill), m is student_distill
    ppo = {} if baseline else {"num_minibatches": 4, "gamma": gamma}
    args = m.Args(num_envs=8, num_steps=8 if images else 32, num_devices=1, ent_coef=0.0, **(ppo | {"learning_rate": 3e-3} | flags))
    network = m.Network("nature", (8, 8, 8), (16,)) if images else m.Network("mlp", (), (32,)) if any_suite else (32,)
    if images:
        args = m.Args(**(vars(args) | {"env_id": "Pong-v5", "size" if m is train_teacher else "student_size": "smaller"}))
    policy, value, x = m.Policy(network, 3 if images else 1), m.Value(network), envs.observe()[:1]
    networks = m.Networks(policy, value, *((policy, value) if baseline else () if m is train_teacher else (policy,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "OBSERVATION_SHAPE", x.shape[1:], raising=False)
        state = m.init_state(args, networks, *((x.shape[1:],) if any_suite else () if images else (2,)))
    state = jax.device_put(state, m.replicated(1))
    stats = None if images else m.Stats(jnp.zeros(2), jnp.ones(2), jnp.float32(1.0))
    taught = {"policy": teacher or policy.init(jax.random.PRNGKey(1), x), "value": value.init(jax.random.PRNGKey(2), x), "obs_stats": stats}
    act = m.act if not any_suite else m.act_on_images if images else m.act_on_states
    cursor = m.start(envs)
    for _ in range(updates):
        obs_stats = state.obs_stats if m is train_teacher else stats
        key, noise = m.draw_noise(state.key, args.num_steps, (8, policy.num_actions if m is ppd_atari else policy.action_dim),
                                  *((not images,) if any_suite else ()))
        devices, statistics = (() if m is ppd_mujoco else (1,)), (() if m is ppd_atari else (obs_stats,))
        policy_step = partial(act, *devices, policy, state.params["policy"], *statistics, noise)
        rollout = m.collect(envs, cursor, policy_step, args.num_steps)
        state = state._replace(key=key)
        if m is train_teacher:
            state, metrics = m.update(args, networks, state, rollout)
        else:
            state, metrics = m.update(args, networks, taught, state, rollout, *(() if baseline else (args.distill_coef,)))
    return networks, state, state.obs_stats if m is train_teacher else stats, metrics


def values_at(m, networks, state, obs_stats, observations):
    """Learned values in units of the raw reward, without the reward's normalisation."""
    values = networks.value.apply(state.params["value"], m.normalize(jnp.asarray(observations), obs_stats))
    return np.asarray(values) * np.sqrt(float(state.return_stats.var))


CASES = [(train_teacher, {}), (ppd_mujoco, {"distill_coef": 0.0})]


@pytest.mark.parametrize(("m", "flags"), CASES)
def test_value_of_a_terminating_episode(m, flags):
    """Reward 1 a step for 3 steps, then termination: V = 1 + γ + γ², 1 + γ, 1; the final observation never counts."""
    envs = Probe(3, lambda action, sign: np.ones_like(action))
    networks, state, stats, _ = learn(m, envs, 150, **flags)
    values = values_at(m, networks, state, stats, [[t / 3, 1.0] for t in range(3)])
    np.testing.assert_allclose(values, [1.75, 1.5, 1.0], atol=0.1)


@pytest.mark.parametrize(("m", "flags"), CASES)
def test_value_of_a_truncated_episode(m, flags):
    """Reward 1 a step for ever, cut off every 3 steps: V = 1 / (1 - γ) everywhere, because truncation bootstraps."""
    envs = Probe(3, lambda action, sign: np.ones_like(action), truncates=True)
    networks, state, stats, _ = learn(m, envs, 150, **flags)
    np.testing.assert_allclose(values_at(m, networks, state, stats, [[0.0, -1.0], [0.0, 1.0]]), 2.0, atol=0.1)


@pytest.mark.parametrize(("m", "flags"), CASES)
def test_the_best_action_is_found(m, flags):
    """Reward -(a - sign / 2)²: the policy's mean goes to sign / 2, though every second step is a phantom."""
    envs = Probe(1, lambda action, sign: -((action - 0.5 * sign) ** 2))
    networks, state, stats, _ = learn(m, envs, 200, **flags)
    means = m.act_deterministic(networks.policy, state.params["policy"], stats, np.array([[0.0, -1.0], [0.0, 1.0]], np.float32))
    np.testing.assert_allclose(np.ravel(means), [-0.5, 0.5], atol=0.1)


def picture_of(sign):
    envs = Pictures(1, None)
    envs.signs[:] = sign
    return envs.observe()[:1]


@pytest.mark.parametrize(("m", "flags"), [(train_teacher, {}), (ppd_atari, {"distill_coef": 0.0})])
def test_the_best_action_is_found_from_images(m, flags):
    """Reward 1 for action 0 where the left half is bright, and for action 2 where the right half is."""
    envs = Pictures(2, lambda action, sign: (action == 1.0 + sign).astype(float))
    networks, state, _, _ = learn(m, envs, 40, **flags)
    stats = (None,) if m is train_teacher else ()
    found = [int(m.act_deterministic(networks.policy, state.params["policy"], *stats, picture_of(sign))[0]) for sign in (-1, 1)]
    assert found == [0, 2]


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_comes_to_its_teacher_without_any_reward(direction):
    """With no reward at all PPD is left with its own term: the KL divergence to a random teacher falls by 95% and more."""
    m, nothing = ppd_mujoco, lambda action, sign: np.zeros_like(action)
    teacher = m.Policy((32,), 1).init(jax.random.PRNGKey(5), jnp.zeros((1, 2)))
    teacher["params"]["Dense_1"]["kernel"] = teacher["params"]["Dense_1"]["kernel"] * 1000.0
    flags = {"teacher": teacher, "kl_direction": direction}
    first = learn(m, Probe(4, nothing), 1, learning_rate=1e-9, **flags)[3]  # as it is before any learning
    last = learn(m, Probe(4, nothing), 100, **flags)[3]
    assert float(first["losses/teacher_kl"]) > 0.1
    assert float(last["losses/teacher_kl"]) < 0.05 * float(first["losses/teacher_kl"])


@pytest.mark.parametrize("m", [ppd_atari, student_distill])
def test_a_student_of_images_comes_to_a_teacher_that_tells_them_apart(m):
    """The teacher prefers other actions for each picture, and none in the mean: who does not look at them stays where he was."""
    policy = m.Policy(m.Network("nature", (8, 8, 8), (16,)), 3)
    teacher = policy.init(jax.random.PRNGKey(5), picture_of(1))
    logits = [policy.apply(teacher, picture_of(sign))[0] for sign in (-1, 1)]
    head, factor = teacher["params"]["Dense_1"], 3.0 / jnp.abs(logits[0] - logits[1]).max()
    head |= {"kernel": head["kernel"] * factor, "bias": -factor * (logits[0] + logits[1]) / 2}
    flags = {"teacher": teacher} | ({"distill_coef": 10.0} if m is ppd_atari else {})
    envs = Pictures(4, lambda action, sign: np.zeros_like(action, float))
    first, last = (float(learn(m, envs, n, **flags)[3]["losses/teacher_kl"]) for n in (1, 20 if m is ppd_atari else 150))
    assert first > 0.05 and last < 0.1 * first, (first, last)


def made_up_teacher(env_id, path, variant=None):
    """Write a teacher of random weights, whose actions differ from observation to observation."""
    m, rng = train_teacher, np.random.default_rng(0)
    suite, (shape, actions) = m.suite_of(env_id), student_distill.task_shape(env_id)
    network = m.Network("mlp", (), (8,)) if suite == "mujoco" else m.Network("nature", (4, 4, 4), (8,))
    x = jax.ShapeDtypeStruct(tuple(shape), jnp.float32 if suite == "mujoco" else jnp.uint8)

    def leaf(x):
        return rng.normal(0.0, 1.0 / np.sqrt(np.prod(x.shape[:-1])), x.shape).astype(np.float32) * (x.ndim > 1)

    arrays = {name: jax.tree.map(leaf, jax.eval_shape(module.init, jax.random.PRNGKey(0), x)) for name, module in (
        ("policy", m.Policy(network, actions)), ("value", m.Value(network)))}
    arrays["policy"]["params"]["Dense_1"]["kernel"] *= {"mujoco": 3.0, "atari": 8.0, "procgen": 30.0}[suite]
    if suite == "mujoco":
        arrays["obs_stats"] = m.Stats(np.zeros(shape, np.float32), np.ones(shape, np.float32), np.float32(1.0))
    m.save_file(path, {
        "env_id": env_id, "script": "train_teacher", "role": "teacher", "network": network._asdict(), "action_dim": actions,
        "observation_shape": shape, "variant": variant or {name: getattr(m.Args(), name) for name in m.VARIANTS[suite]}, "args": {},
        "versions": {}, "command": "", "evaluation": {"mean": 1.0, "std": 0.0, "games": 1, "returns": [1.0]}}, arrays)
    return path


@pytest.mark.parametrize(("m", "env_id", "flags"), [
    pytest.param(ppd_procgen, "CoinrunEasy-v0", {"total_timesteps": 14 * 128, "num_steps": 16, "num_minibatches": 4, "update_epochs": 2,
                                                "distill_coef": 10.0, "learning_rate": 2e-3},
                 marks=needs_procgen, id="ppd_procgen"),
    pytest.param(student_distill, "Hopper-v4", {"total_timesteps": 200 * 40, "learning_rate": 3e-3}, id="student_distill"),
    pytest.param(teacher_distill, "CoinrunEasy-v0", {"total_timesteps": 60 * 40, "learning_rate": 3e-3}, marks=needs_procgen, id="teacher_distill")])
def test_a_run_brings_a_student_to_its_teacher(m, env_id, flags, tmp_path, monkeypatch):
    """The KL divergence to a teacher of random weights falls by 80% and more."""
    monkeypatch.setattr(m, "finish", lambda *args: {})
    kl, update = [], m.update

    def watched(*args):
        state, metrics = update(*args)
        kl.append(float(metrics["losses/teacher_kl"]))
        return state, metrics

    monkeypatch.setattr(m, "update", watched)
    images = {"student_channels": (8, 8, 8)} if env_id != "Hopper-v4" else {}
    teacher = made_up_teacher(env_id, tmp_path / "teacher.safetensors")
    m.main(small(m, env_id, tmp_path / "run", teacher=str(teacher), student_hidden=(32,), num_envs=8, **images, **flags))
    first, last = kl[0], np.mean(kl[-3:])
    assert first > 0.05 and last < 0.2 * first, (first, last)
