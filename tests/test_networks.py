"""Networks against the paper's Table 4, and against what a teacher must not feel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ppd_mujoco
import train_teacher

SHAPES = {"Ant-v4": (27, 8), "HalfCheetah-v4": (17, 6), "Hopper-v4": (11, 3), "Humanoid-v4": (376, 17), "Swimmer-v4": (8, 2)}
TABLE_4 = {"smaller": 22_728.5, "same": 95_816.5, "larger": 322_696.5}  # mean of the four tasks without Swimmer
# Each task's own counts, worked out by hand from widths: (D+1)·h1 + (h1+1)·h2 + (h2+1)·A
COUNTS = {
    ("Ant-v4", "smaller"): 12_360, ("Ant-v4", "same"): 75_016, ("Ant-v4", "larger"): 281_096,
    ("HalfCheetah-v4", "smaller"): 10_950, ("HalfCheetah-v4", "same"): 71_942, ("HalfCheetah-v4", "larger"): 274_950,
    ("Hopper-v4", "smaller"): 9_987, ("Hopper-v4", "same"): 69_635, ("Hopper-v4", "larger"): 270_339,
    ("Humanoid-v4", "smaller"): 57_617, ("Humanoid-v4", "same"): 166_673, ("Humanoid-v4", "larger"): 464_401,
    ("Swimmer-v4", "smaller"): 9_538, ("Swimmer-v4", "same"): 68_610, ("Swimmer-v4", "larger"): 268_290,
}


def count(env_id, size):
    """Parameters of the policy network alone; log_std is not counted."""
    observation_dim, action_dim = SHAPES[env_id]
    policy = ppd_mujoco.Policy(ppd_mujoco.Args(student_size=size).hidden, action_dim)
    params = jax.eval_shape(policy.init, jax.random.PRNGKey(0), jnp.zeros((1, observation_dim)))["params"]
    return sum(np.prod(x.shape) for x in jax.tree.leaves(params)) - np.prod(params["log_std"].shape)


@pytest.mark.parametrize(("env_id", "size"), COUNTS)
def test_parameter_counts(env_id, size):
    assert count(env_id, size) == COUNTS[env_id, size]


@pytest.mark.parametrize("size", TABLE_4)
def test_mean_parameter_counts_are_table_4(size):
    assert np.mean([count(env_id, size) for env_id in SHAPES if env_id != "Swimmer-v4"]) == TABLE_4[size]


@pytest.mark.parametrize("env_id", SHAPES)
def test_the_environments_have_these_shapes(env_id):
    envs = train_teacher.make_envs(env_id, 1, 0)
    assert (*envs.observation_space.shape, *envs.action_space.shape) == SHAPES[env_id]


def test_student_hidden_overrides_the_size():
    assert ppd_mujoco.Args(student_size="smaller", student_hidden=(7, 5)).hidden == (7, 5)


@pytest.mark.parametrize("m", [train_teacher, ppd_mujoco])
def test_initialisation(m):
    """Orthogonal weights with gain √2, 0.01 for the policy's head and 1 for the value's; zero biases and log_std."""
    policy = m.Policy((256, 256), 3).init(jax.random.PRNGKey(0), jnp.zeros((1, 11)))["params"]
    value = m.Value((256, 256)).init(jax.random.PRNGKey(1), jnp.zeros((1, 11)))["params"]
    for params, gains in ((policy, (np.sqrt(2), np.sqrt(2), 0.01)), (value, (np.sqrt(2), np.sqrt(2), 1.0))):
        for i, gain in enumerate(gains):
            kernel = np.asarray(params[f"Dense_{i}"]["kernel"], np.float64)
            kernel = kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T
            np.testing.assert_allclose(kernel.T @ kernel, gain**2 * np.eye(kernel.shape[1]), atol=1e-5)
            assert not np.asarray(params[f"Dense_{i}"]["bias"]).any()
    assert not np.asarray(policy["log_std"]).any()


def made_up_rollout(rng, m, steps=8, envs=4, dims=5, actions=2):
    flags = np.zeros((3, steps, envs), bool)
    flags[0, 2, 1] = flags[2, 3, 1] = True  # a termination and its phantom
    flags[1, 5, 2] = flags[2, 6, 2] = True  # a truncation and its phantom
    rewards = rng.normal(size=(steps, envs)).astype(np.float32) * ~flags[2]
    observations = rng.normal(size=(steps + 1, envs, dims)).astype(np.float32)
    return m.Rollout(observations, rng.normal(size=(steps, envs, actions)).astype(np.float32), rewards, *flags)


def learner(m, **flags):
    """A small learner: a function from a rollout to the state and the metrics after one update."""
    args = m.Args(env_id="Hopper-v4", num_envs=4, num_steps=8, num_minibatches=2, ent_coef=0.01, gamma=0.99, **flags)
    policy, value = m.Policy((16, 8), 2), m.Value((16, 8))
    if m is train_teacher:
        networks = m.Networks(policy, value)
        return lambda rollout: m.update(args, networks, m.init_state(args, networks, 5), rollout)
    networks = m.Networks(policy, value, m.Policy((8,), 2))
    params = networks.teacher.init(jax.random.PRNGKey(9), jnp.zeros((1, 5)))
    teacher = m.Frozen(params, m.Stats(jnp.zeros(5), jnp.ones(5), jnp.float32(1.0)))
    return lambda rollout: m.update(args, networks, teacher, m.init_state(args, networks, 5), rollout, 1.0)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("m", [train_teacher, ppd_mujoco])
def test_an_update_does_not_see_phantom_transitions(m):
    """Whatever the policy did there, and what it saw there after a termination, changes no bit of state or metrics."""
    rollout = made_up_rollout(np.random.default_rng(0), m)
    actions, observations = rollout.actions.copy(), rollout.observations.copy()
    actions[rollout.phantoms] = 7.0
    observations[3, 1] = 3.0  # the final observation of a terminated episode
    learn = learner(m)
    before, after = learn(rollout), learn(rollout._replace(actions=actions, observations=observations))
    assert same(before, after)
    actions[0, 0] = 7.0
    assert not same(before, learn(rollout._replace(actions=actions)))


@pytest.mark.parametrize("m", [train_teacher, ppd_mujoco])
def test_an_update_bootstraps_from_a_truncated_observation(m):
    """The final observation of a truncated episode does count: it is what its last step bootstraps from."""
    rollout = made_up_rollout(np.random.default_rng(0), m)
    observations = rollout.observations.copy()
    observations[6, 2] = 3.0
    learn = learner(m)
    assert not same(learn(rollout), learn(rollout._replace(observations=observations)))


def test_no_gradient_and_no_update_reaches_the_teacher():
    m, rng = ppd_mujoco, np.random.default_rng(0)
    policy, teacher = m.Policy((16, 8), 2), m.Policy((8,), 2)
    x = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    student_params, teacher_params = policy.init(jax.random.PRNGKey(0), x), teacher.init(jax.random.PRNGKey(1), x)
    args = m.Args(env_id="Hopper-v4", num_envs=4, num_steps=8, num_minibatches=2, ent_coef=0.0, gamma=0.99)
    networks = m.Networks(policy, m.Value((16, 8)), teacher)
    frozen = m.Frozen(teacher_params, m.Stats(jnp.zeros(5), jnp.ones(5), jnp.float32(1.0)))
    copy = jax.tree.map(np.array, frozen)
    rollout, state = made_up_rollout(rng, m), m.init_state(args, networks, 5)
    for _ in range(3):
        state, metrics = m.update(args, networks, frozen, state, rollout, 1.0)
    assert same(frozen, copy) and float(metrics["losses/teacher_kl"]) > 0
    assert jax.tree.structure(state.params["policy"]) == jax.tree.structure(student_params)


def test_a_student_of_the_teacher_s_seed_and_size_starts_from_other_weights():
    args = ppd_mujoco.Args(student_size="same", env_id="Hopper-v4", seed=100)
    networks = ppd_mujoco.Networks(ppd_mujoco.Policy(args.hidden, 3), ppd_mujoco.Value(args.hidden), None)
    student = ppd_mujoco.init_state(args, networks, 11).params
    teacher = train_teacher.init_state(train_teacher.Args(seed=100), train_teacher.Networks(*networks[:2]), 11).params
    kernels = [x for x in jax.tree.leaves(jax.tree.map(np.array_equal, student, teacher))]
    assert sum(kernels) == len(jax.tree.leaves(student)) - 6  # the zeros of biases and log_std alone are the same


def test_flags_of_learning_do_something():
    rollout = made_up_rollout(np.random.default_rng(0), ppd_mujoco)
    plain = learner(ppd_mujoco)(rollout)
    for flags in ({"kl_direction": "reverse"}, {"clip_coef": 0.01}, {"vf_coef": 0.1}, {"max_grad_norm": 0.01},
                  {"learning_rate": 1e-3}, {"update_epochs": 2}, {"gae_lambda": 0.5}, {"seed": 3}):
        assert not same(plain[0].params, learner(ppd_mujoco, **flags)(rollout)[0].params), flags
