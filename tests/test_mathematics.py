"""The functions with an equation, each against something that is not itself: hand-computed numbers, loops, samples.

Scripts that share a block, which test_shared_blocks.py holds, share its test.
"""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppd_atari
import ppd_gymnax
import ppd_mujoco
import train_teacher
from ppd_mujoco import Stats, compute_gae, standardize, update_stats

STATES = [ppd_mujoco, train_teacher, ppd_gymnax]  # with Gaussian policies
IMAGES = [ppd_atari, train_teacher, ppd_gymnax]  # with categorical ones


def by_name(module):
    return module.__name__


def test_gae_by_hand():
    """One environment: step 0 goes on, 1 terminates, 2 is the phantom after it, 3 truncates, 4 is the phantom after that."""
    rewards = jnp.array([[1.0], [2.0], [0.0], [3.0], [0.0], [4.0]])
    values = jnp.array([[10.0], [20.0], [30.0], [40.0], [50.0], [60.0], [70.0]])
    terminations = jnp.array([[0.0], [1.0], [0.0], [0.0], [0.0], [0.0]])
    truncations = jnp.array([[0.0], [0.0], [0.0], [1.0], [0.0], [0.0]])
    advantages, returns = compute_gae(rewards, values, terminations, truncations, 0.5, 0.5)
    # 5: 4 + 0.5*70 - 60 = -21, the rollout's end bootstraps
    # 3: truncated: 3 + 0.5*V(its true final observation, stored at t+1) - V = 3 + 25 - 40 = -12, and the trace is cut
    # 1: terminated: 2 - 20 = -18, no bootstrap
    # 0: (1 + 0.5*20 - 10) + 0.25 * -18 = -3.5
    np.testing.assert_allclose(np.asarray(advantages)[[0, 1, 3, 5], 0], [-3.5, -18.0, -12.0, -21.0])
    np.testing.assert_allclose(np.asarray(returns)[[0, 1, 3, 5], 0], [6.5, 2.0, 28.0, 39.0])


def random_rollout(rng, steps=200, envs=7):
    """Flags as envpool gives them: a phantom follows each end, and ends no episode itself."""
    terminations, truncations, phantoms = np.zeros((3, steps, envs), np.float32)
    for t in range(steps):
        if t:
            phantoms[t] = np.maximum(terminations[t - 1], truncations[t - 1])
        kind = rng.choice(3, size=envs, p=[0.8, 0.1, 0.1])
        terminations[t] = (kind == 1) * (1 - phantoms[t])
        truncations[t] = (kind == 2) * (1 - phantoms[t])
    rewards = rng.normal(size=(steps, envs)).astype(np.float32) * (1 - phantoms)
    values = rng.normal(size=(steps + 1, envs)).astype(np.float32)
    return rewards, values, terminations, truncations, phantoms


def test_gae_is_the_sum_over_each_episode():
    """Against the definition, A_t = sum_k (γλ)^k δ_{t+k} up to the episode's end, in float64 and episode by episode."""
    rewards, values, terminations, truncations, phantoms = random_rollout(np.random.default_rng(0))
    gamma, lam = 0.97, 0.9
    advantages, returns = compute_gae(rewards, values, terminations, truncations, gamma, lam)
    for n in range(rewards.shape[1]):
        for t in range(len(rewards)):
            if phantoms[t, n]:
                continue
            total, k = 0.0, t
            while True:
                bootstrap = 0.0 if terminations[k, n] else float(values[k + 1, n])
                total += (gamma * lam) ** (k - t) * (float(rewards[k, n]) + gamma * bootstrap - float(values[k, n]))
                if terminations[k, n] or truncations[k, n] or k == len(rewards) - 1:
                    break
                k += 1
            assert float(advantages[t, n]) == pytest.approx(total, abs=1e-4)
            assert float(returns[t, n]) == pytest.approx(total + float(values[t, n]), abs=1e-4)


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax], ids=by_name)
def test_discounted_sums_start_anew_in_each_episode_and_cross_rollouts(m):
    rewards, dones = jnp.array([[1.0], [2.0], [0.0], [3.0]]), jnp.array([[0.0], [1.0], [0.0], [0.0]])
    carried, sums = m.discount_forward(rewards, dones, jnp.array([8.0]), 0.5)
    np.testing.assert_allclose(sums[:, 0], [5.0, 4.5, 0.0, 3.0])
    np.testing.assert_allclose(carried, [3.0])


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax], ids=by_name)
def test_running_statistics_are_those_of_all_real_samples(m):
    rng = np.random.default_rng(1)
    samples, weights = rng.normal(5.0, 3.0, (4, 100, 6)).astype(np.float32), rng.integers(0, 2, (4, 100)).astype(np.float32)
    samples[weights == 0] = 1e6
    stats = m.Stats(jnp.zeros(6), jnp.ones(6), jnp.float32(1e-4))
    for x, w in zip(samples, weights, strict=True):  # ppd_gymnax.py has no phantoms
        stats = m.update_stats(stats, x[w == 1]) if m is ppd_gymnax else m.update_stats(stats, jnp.asarray(x), jnp.asarray(w))
    real = samples[weights == 1].astype(np.float64)
    np.testing.assert_allclose(stats.mean, real.mean(0), rtol=1e-4)
    np.testing.assert_allclose(stats.var, real.var(0), rtol=1e-3)
    assert float(stats.count) == pytest.approx(len(real), abs=1e-2)


def test_a_rollout_of_phantoms_alone_changes_no_statistics():
    stats = Stats(jnp.ones(2), jnp.full(2, 2.0), jnp.float32(10.0))
    after = update_stats(stats, jnp.full((5, 2), 99.0), jnp.zeros(5))
    for old, new in zip(stats, after, strict=True):
        np.testing.assert_allclose(old, new)


def test_standardized_advantages_ignore_phantoms():
    advantages, weights = jnp.array([1.0, 2.0, 3.0, 1e6]), jnp.array([1.0, 1.0, 1.0, 0.0])
    for out in (standardize(advantages, weights)[:3], ppd_gymnax.standardize(advantages[:3])):
        np.testing.assert_allclose(out, np.array([-1.0, 0.0, 1.0]) * np.sqrt(1.5), rtol=1e-5)
    assert np.isfinite(standardize(advantages, jnp.zeros(4))).all()  # a minibatch of phantoms alone


@pytest.mark.parametrize("m", STATES, ids=by_name)
def test_normalized_observations_are_clipped(m):
    stats = m.Stats(jnp.array([1.0, 0.0, 0.0]), jnp.array([4.0, 1.0, 1.0]), jnp.float32(9.0))
    np.testing.assert_allclose(m.normalize(jnp.array([5.0, -1e9, 1e9]), stats), [2.0, -10.0, 10.0], rtol=1e-6)


def gaussian(rng, dims=4):
    return jnp.asarray(rng.normal(size=dims), jnp.float32), jnp.asarray(0.3 * rng.normal(size=dims), jnp.float32)


@pytest.mark.parametrize("m", STATES, ids=by_name)
def test_distribution_by_its_density_and_by_samples(m):
    """Log-probability and entropy against the textbook, KL against the closed form and 200,000 samples."""
    rng = np.random.default_rng(2)
    (mean_p, log_p), (mean_q, log_q) = gaussian(rng), gaussian(rng)
    p, q = m.distribution((mean_p, log_p)), m.distribution((mean_q, log_q))
    x = np.asarray(p.sample(seed=jax.random.PRNGKey(0), sample_shape=(200_000,)), np.float64)

    def log_density(x, mean, log_std):
        mean, log_std = np.asarray(mean, np.float64), np.asarray(log_std, np.float64)
        return (-0.5 * ((x - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(-1)

    np.testing.assert_allclose(p.log_prob(jnp.asarray(x[:100], jnp.float32)), log_density(x[:100], mean_p, log_p), rtol=1e-4)
    assert float(p.entropy()) == pytest.approx(float(np.sum(log_p) + 2 * np.log(2 * np.pi * np.e)), rel=1e-5)
    var_p, var_q = np.exp(2 * np.asarray(log_p)), np.exp(2 * np.asarray(log_q))
    closed = np.sum(log_q - log_p + (var_p + (mean_p - mean_q) ** 2) / (2 * var_q) - 0.5)
    assert float(p.kl_divergence(q)) == pytest.approx(float(closed), rel=1e-4)
    sampled = log_density(x, mean_p, log_p) - log_density(x, mean_q, log_q)
    assert float(p.kl_divergence(q)) == pytest.approx(sampled.mean(), abs=5 * sampled.std() / np.sqrt(len(x)))


@pytest.mark.parametrize("m", IMAGES, ids=by_name)
def test_categorical_distribution_by_its_probabilities(m):
    """Log-probability, entropy and KL against sums over the probabilities, and the mode."""
    logits = np.random.default_rng(3).normal(0.0, 2.0, (2, 5))
    p, q = (np.exp(x) / np.exp(x).sum() for x in logits)
    ours_p, ours_q = (m.distribution(jnp.asarray(x, jnp.float32)) for x in logits)
    np.testing.assert_allclose(ours_p.log_prob(jnp.arange(5)), np.log(p), rtol=1e-5)
    assert float(ours_p.entropy()) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)
    assert float(ours_p.kl_divergence(ours_q)) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert int(ours_p.mode()) == p.argmax()


@pytest.mark.parametrize("m", STATES, ids=by_name)
@pytest.mark.parametrize("log_std", [-10.0, 0.0, 10.0])
@pytest.mark.parametrize("teacher_log_std", [-10.0, 0.0, 10.0])
def test_gradients_are_finite_at_the_extremes(m, log_std, teacher_log_std):
    """distrax has given NaN gradients far out in the past."""
    teacher = m.distribution((jnp.full(3, 50.0), jnp.full(3, teacher_log_std)))
    outputs = (jnp.full(3, -50.0), jnp.full(3, log_std))
    for f in (lambda o: m.distribution(o).log_prob(jnp.full(3, 50.0)), lambda o: m.distribution(o).entropy(),
              lambda o: teacher.kl_divergence(m.distribution(o)), lambda o: m.distribution(o).kl_divergence(teacher)):
        value, grads = jax.value_and_grad(f)(outputs)
        assert np.isfinite(value) and all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("m", IMAGES, ids=by_name)
@pytest.mark.parametrize("size", [0.0, 50.0, 1000.0])
def test_gradients_of_extreme_logits_are_finite(m, size):
    """At 1000 the probabilities themselves are 0 and 1 in float32."""
    outputs, other = size * jnp.array([1.0, -1.0, 0.0]), size * jnp.array([-1.0, 1.0, 0.0])
    teacher = m.distribution(other)
    for f in (lambda o: m.distribution(o).log_prob(1), lambda o: m.distribution(o).entropy(),
              lambda o: teacher.kl_divergence(m.distribution(o)), lambda o: m.distribution(o).kl_divergence(teacher)):
        value, grads = jax.value_and_grad(f)(outputs)
        assert np.isfinite(value) and np.isfinite(grads).all()


def noise_and_samples(m, steps, envs, actions, states):
    """Noise of a rollout, and the keys with which a distribution gives the same actions step by step."""
    key = jax.random.PRNGKey(1)
    after, noise = m.draw_noise(key, steps, (envs, actions), *((states,) if m is train_teacher else ()))
    assert noise.shape == (steps, envs, actions) and not np.array_equal(after, key)
    rollout_key = jax.random.split(key)[1]
    return noise, [jax.random.fold_in(rollout_key, t) for t in range(steps)]


@pytest.mark.parametrize("m", [ppd_mujoco, train_teacher], ids=by_name)
def test_actions_are_samples_of_the_distribution(m):
    """Noise is drawn for a whole rollout at once; the actions are those that the distribution gives step by step."""
    policy = m.Policy((8,) if m is ppd_mujoco else m.Network("mlp", (), (8,)), 3)
    params = policy.init(jax.random.PRNGKey(0), jnp.zeros((1, 5)))
    params["params"]["log_std"] = jnp.array([-1.0, 0.0, 1.0])
    stats = m.Stats(jnp.full(5, 0.5), jnp.full(5, 4.0), jnp.float32(1.0))
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    noise, keys = noise_and_samples(m, 6, 4, 3, True)
    act, outputs = m.act if m is ppd_mujoco else m.act_on_states, policy.apply(params, (x - 0.5) / 2.0)
    devices = () if m is ppd_mujoco else (1,)
    for t in range(6):
        expected = m.distribution(outputs).sample(seed=keys[t])
        np.testing.assert_allclose(act(*devices, policy, params, stats, noise, x, t), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(m.act_deterministic(policy, params, stats, x), outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize("m", [ppd_atari, train_teacher], ids=by_name)
def test_actions_on_images_are_samples_of_the_distribution(m, num_devices):
    policy = m.Policy(m.Network("nature", (4, 4, 4), (8,)), 6)
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 36, 36), np.uint8)
    params = policy.init(jax.random.PRNGKey(0), x)
    params["params"]["Dense_1"]["kernel"] *= 100.0
    noise, keys = noise_and_samples(m, 6, 4, 6, False)
    act, stats = (m.act, ()) if m is ppd_atari else (m.act_on_images, (None,))
    outputs = policy.apply(params, x)
    for t in range(6):
        actions = act(num_devices, policy, params, *stats, noise, x, t)
        np.testing.assert_array_equal(actions, m.distribution(outputs).sample(seed=keys[t]))
    np.testing.assert_array_equal(m.act_deterministic(policy, params, *stats, x), np.argmax(outputs, -1))


def test_actions_of_an_evaluation_are_samples_of_the_distribution():
    """As Procgen's policies are evaluated: of the key and the step alone."""
    m, key = train_teacher, jax.random.PRNGKey(7)
    policy = m.Policy(m.Network("nature", (4, 4, 4), (8,)), 6)
    x = np.random.default_rng(0).integers(0, 256, (4, 3, 36, 36), np.uint8)
    params = policy.init(jax.random.PRNGKey(0), x)
    found = [m.act_sampled(policy, params, key, x, t) for t in range(6)]
    expected = [m.distribution(policy.apply(params, x)).sample(seed=jax.random.fold_in(key, t)) for t in range(6)]
    np.testing.assert_array_equal(found, expected)
    assert len({tuple(np.asarray(each)) for each in found}) > 1


def test_distribution_is_distrax():
    assert isinstance(ppd_mujoco.distribution((jnp.zeros(2), jnp.zeros(2))), distrax.Distribution)
