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
        rewards = np.where(phantoms, 0.0, self.reward(actions[:, 0], self.signs)).astype(np.float32)
        self.times = np.where(phantoms, 0, self.times + 1)
        self.signs = np.where(phantoms, self.rng.choice([-1.0, 1.0], len(phantoms)), self.signs)
        self.done = self.times == self.length
        none = np.zeros_like(self.done)
        return self.observe(), rewards, *((none, self.done) if self.truncates else (self.done, none)), {}


def learn(m, envs, updates, gamma=0.9, teacher=None, **flags):
    """The loop of main, on a probe; returns the networks, the final state, the statistics, and the last metrics."""
    args = m.Args(num_envs=8, num_steps=32, num_minibatches=4, gamma=gamma, ent_coef=0.0,
                  **({"learning_rate": 3e-3} | flags))
    stats = m.Stats(jnp.zeros(2), jnp.ones(2), jnp.float32(1.0))
    cursor = m.start(envs)
    if m is train_teacher:
        network = m.Network("mlp", (), (32,))
        networks = m.Networks(m.Policy(network, 1), m.Value(network))
        state = m.init_state(args, networks, (2,))
    else:
        networks = m.Networks(m.Policy((32,), 1), m.Value((32,)), m.Policy((32,), 1))
        state = m.init_state(args, networks, 2)
        frozen = m.Frozen(teacher or networks.teacher.init(jax.random.PRNGKey(1), jnp.zeros((1, 2))), stats)
    for _ in range(updates):
        obs_stats = state.obs_stats if m is train_teacher else stats
        key, noise = m.draw_noise(state.key, 32, (8, 1), *((True,) if m is train_teacher else ()))
        act = m.act_on_states if m is train_teacher else m.act
        rollout = m.collect(envs, cursor, partial(act, networks.policy, state.params["policy"], obs_stats, noise), 32)
        state = state._replace(key=key)
        if m is train_teacher:
            state, metrics = m.update(args, networks, state, rollout)
        else:
            state, metrics = m.update(args, networks, frozen, state, rollout, args.distill_coef)
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
    networks, state, stats, _ = learn(m, envs, 250, **flags)
    values = values_at(m, networks, state, stats, [[t / 3, 1.0] for t in range(3)])
    np.testing.assert_allclose(values, [2.71, 1.9, 1.0], atol=0.1)


@pytest.mark.parametrize(("m", "flags"), CASES)
def test_value_of_a_truncated_episode(m, flags):
    """Reward 1 a step for ever, cut off every 3 steps: V = 1 / (1 - γ) everywhere, because truncation bootstraps."""
    envs = Probe(3, lambda action, sign: np.ones_like(action), truncates=True)
    networks, state, stats, _ = learn(m, envs, 300, gamma=0.5, **flags)
    np.testing.assert_allclose(values_at(m, networks, state, stats, [[0.0, -1.0], [0.0, 1.0]]), 2.0, atol=0.1)


@pytest.mark.parametrize(("m", "flags"), CASES)
def test_the_best_action_is_found(m, flags):
    """Reward -(a - sign / 2)²: the policy's mean goes to sign / 2, though every second step is a phantom."""
    envs = Probe(1, lambda action, sign: -((action - 0.5 * sign) ** 2))
    networks, state, stats, _ = learn(m, envs, 300, **flags)
    means = m.act_deterministic(networks.policy, state.params["policy"], stats, np.array([[0.0, -1.0], [0.0, 1.0]], np.float32))
    np.testing.assert_allclose(np.ravel(means), [-0.5, 0.5], atol=0.1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_comes_to_its_teacher_without_any_reward(direction):
    """With no reward at all PPD is left with its own term: the KL divergence to a random teacher falls by 95% and more."""
    m, nothing = ppd_mujoco, lambda action, sign: np.zeros_like(action)
    teacher = m.Policy((32,), 1).init(jax.random.PRNGKey(5), jnp.zeros((1, 2)))
    teacher["params"]["Dense_1"]["kernel"] = teacher["params"]["Dense_1"]["kernel"] * 1000.0
    flags = {"teacher": teacher, "kl_direction": direction}
    first = learn(m, Probe(4, nothing), 1, learning_rate=1e-9, **flags)[3]  # as it is before any learning
    last = learn(m, Probe(4, nothing), 150, **flags)[3]
    assert float(first["losses/teacher_kl"]) > 0.1
    assert float(last["losses/teacher_kl"]) < 0.05 * float(first["losses/teacher_kl"])


@pytest.mark.parametrize(("m", "env_id"), [
    (ppd_atari, "Pong-v5"), pytest.param(ppd_procgen, "CoinrunEasy-v0", marks=needs_procgen),
    (student_distill, "Hopper-v4"), (student_distill, "Pong-v5"), (teacher_distill, "Hopper-v4"),
    pytest.param(teacher_distill, "CoinrunEasy-v0", marks=needs_procgen)])
def test_a_student_comes_to_a_peaked_teacher(m, env_id, teachers, tmp_path, monkeypatch):
    """A teacher of random weights whose actions differ from image to image: the KL divergence to it falls by 80% and more."""
    model = m.load_tree(teachers(env_id), "model")
    rng = np.random.default_rng(0)
    layers = model["params"]["policy"]["params"]
    for name, layer in layers.items():
        if name != "log_std":
            layer["kernel"] = rng.normal(0.0, 1.0 / np.sqrt(np.prod(layer["kernel"].shape[:-1])), layer["kernel"].shape).astype(np.float32)
    last = max(name for name in layers if name.startswith("Dense"))
    layers[last]["kernel"] *= {"Hopper-v4": 3.0, "Pong-v5": 8.0, "CoinrunEasy-v0": 30.0}[env_id]
    m.save_tree(tmp_path / "teacher", "model", model)
    monkeypatch.setattr(m, "finish", lambda args, networks, state, *rest: {})
    kl, update = [], m.update

    def watched(*args):
        state, metrics = update(*args)
        kl.append(float(metrics["losses/teacher_kl"]))
        return state, metrics

    monkeypatch.setattr(m, "update", watched)
    steps = 40_000 if env_id == "Hopper-v4" else 12_000 if m is ppd_procgen else 6_000
    flags = {"total_timesteps": steps, "student_hidden": (64,), "learning_rate": 1e-3, "num_envs": 8, "teacher": str(tmp_path / "teacher")}
    if env_id != "Hopper-v4":
        flags |= {"student_channels": (16, 16, 16)}
    if m not in (student_distill, teacher_distill):
        flags |= {"num_steps": 32, "num_minibatches": 4, "distill_coef": 10.0}  # rewards would pull elsewhere
    m.main(small(m, env_id, tmp_path / "run", **flags))
    first, last = kl[0], np.mean(kl[-5:])
    assert first > 0.1 and last < 0.2 * first, (first, last)
