"""Networks against the paper's Table 4, and against what a teacher must not feel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import needs_procgen

import evaluate
import ppd_atari
import ppd_mujoco
import ppd_procgen
import student_distill
import teacher_distill
import train_teacher

PPD = {"atari": ppd_atari, "mujoco": ppd_mujoco, "procgen": ppd_procgen}
ANY_SUITE = [train_teacher, student_distill, teacher_distill]

STATES = {"Ant-v4": (27, 8), "HalfCheetah-v4": (17, 6), "Hopper-v4": (11, 3), "Humanoid-v4": (376, 17), "Swimmer-v4": (8, 2)}
ACTIONS = {"Atlantis-v5": 4, "BeamRider-v5": 9, "CrazyClimber-v5": 9, "DemonAttack-v5": 6, "Enduro-v5": 9, "Freeway-v5": 3,
           "MsPacman-v5": 9, "Pong-v5": 6, "Qbert-v5": 6, "Seaquest-v5": 18, "Zaxxon-v5": 18,
           "CoinrunEasy-v0": 15, "JumperEasy-v0": 15, "MinerEasy-v0": 15, "NinjaEasy-v0": 15}
SUITES = {"mujoco": [name for name in STATES if name != "Swimmer-v4"], "atari": [name for name in ACTIONS if name.endswith("v5")],
          "procgen": [name for name in ACTIONS if name.endswith("v0")]}
TABLE_4 = {
    ("atari", "smaller"): 279_325.18, ("atari", "same"): 1_091_498.27, ("atari", "larger"): 8_328_942.64,
    ("mujoco", "smaller"): 22_728.5, ("mujoco", "same"): 95_816.5, ("mujoco", "larger"): 322_696.5,
    ("procgen", "smaller"): 142_511, ("procgen", "same"): 625_999, ("procgen", "larger"): 4_599_439,
}
WIDTHS = {"smaller": (128, 64), "same": (256, 256), "larger": (512, 512)}


def suite(env_id):
    return "mujoco" if env_id in STATES else "atari" if env_id.endswith("v5") else "procgen"


def by_hand(env_id, size):
    """Parameters worked out from widths alone: a dense layer has (inputs + 1) x outputs, a convolution (k x k x inputs + 1) x outputs."""
    if env_id in STATES:
        inputs, actions = STATES[env_id]
        first, second = WIDTHS[size]
        return (inputs + 1) * first + (first + 1) * second + (second + 1) * actions
    channels, side, actions = (4, 84, ACTIONS[env_id]) if suite(env_id) == "atari" else (3, 64, ACTIONS[env_id])
    if size == "smaller":
        total, hidden = 0, 64
        for outputs, kernel, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            total += (kernel**2 * channels + 1) * outputs
            channels, side = outputs, (side - kernel) // stride + 1
    else:
        total, hidden = 0, {"same": 256, "larger": 1024}[size]
        for outputs in {"same": (16, 32, 32), "larger": (32, 64, 64)}[size]:
            total += (9 * channels + 1) * outputs + 4 * (9 * outputs + 1) * outputs
            channels, side = outputs, -(-side // 2)
    return total + (side**2 * channels + 1) * hidden + (hidden + 1) * actions


def count(policy, x):
    """Parameters of the policy network alone; log_std is not counted."""
    params = dict(jax.eval_shape(policy.init, jax.random.PRNGKey(0), x)["params"])
    params.pop("log_std", None)
    return sum(np.prod(x.shape) for x in jax.tree.leaves(params))


def policies(env_id, size, **flags):
    """The policy of this size in the suite's own script, and in those for any suite; and an input."""
    own = PPD[suite(env_id)]
    students = own.Args(env_id=env_id, student_size=size, **flags), [student_distill.Args(env_id=env_id, student_size=size, **flags)]
    teacher = train_teacher.Args(env_id=env_id, size=size, **{name.removeprefix("student_"): x for name, x in flags.items()})
    if env_id in STATES:
        inputs, actions = STATES[env_id]
        found, x = [own.Policy(students[0].hidden, actions)], jnp.zeros((1, inputs))
    else:
        actions = ACTIONS[env_id]
        found, x = [own.Policy(students[0].network, actions)], jnp.zeros((1, *own.OBSERVATION_SHAPE), jnp.uint8)
    found.append(train_teacher.Policy(teacher.network, actions))
    found += [m.Policy(students[1][0].network, actions) for m in (student_distill, teacher_distill)]
    return found, x


@pytest.mark.parametrize("size", ["smaller", "same", "larger"])
@pytest.mark.parametrize("env_id", [*STATES, *ACTIONS])
def test_parameter_counts(env_id, size):
    found, x = policies(env_id, size)
    assert {count(policy, x) for policy in found} == {by_hand(env_id, size)}


@pytest.mark.parametrize(("suite", "size"), TABLE_4)
def test_mean_parameter_counts_are_table_4(suite, size):
    assert np.mean([by_hand(env_id, size) for env_id in SUITES[suite]]) == pytest.approx(TABLE_4[suite, size], abs=0.005)


def test_the_smaller_network_of_the_paper_s_text():
    """Filters 32, 32, 32 and 128 units, which is not the one whose parameters Table 4 counts."""
    flags = {"student_channels": (32, 32, 32), "student_hidden": (128,)}
    counts = {env_id: {count(policy, x) for policy in found}
              for env_id in ACTIONS for found, x in [policies(env_id, "smaller", **flags)]}
    assert all(len(found) == 1 for found in counts.values())
    assert np.mean([min(counts[env_id]) for env_id in SUITES["atari"]]) == pytest.approx(235_857.55, abs=0.005)
    assert counts["CoinrunEasy-v0"] == {99_439}


@pytest.mark.parametrize("env_id", [
    pytest.param(env_id, marks=[needs_procgen] if suite(env_id) == "procgen" else []) for env_id in (*STATES, *ACTIONS)])
def test_the_environments_have_these_shapes(env_id):
    envs = train_teacher.make_envs(env_id, 1, 0, "training", train_teacher.Variant(4, 0, 200))
    if env_id in STATES:
        assert (*envs.observation_space.shape, *envs.action_space.shape) == STATES[env_id]
    else:
        assert envs.action_space.n == ACTIONS[env_id]
        assert envs.observation_space.shape == PPD[suite(env_id)].OBSERVATION_SHAPE


@pytest.mark.parametrize("m", [*ANY_SUITE, ppd_atari, ppd_procgen, evaluate])
@pytest.mark.parametrize("size", [84, 42, 21, 64, 32, 16, 5])
def test_max_pool_is_flax_s_with_a_border_of_one(m, size):
    """In value and in gradient, whose like flax takes from XLA's pooling; no two inputs are the same, so it is unique."""
    x = jnp.asarray(np.random.default_rng(0).permutation(2 * size * size * 3).reshape(2, size, size, 3), jnp.float32)

    def theirs(x):
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    np.testing.assert_array_equal(m.max_pool(x), theirs(x))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=theirs(x).shape), jnp.float32)
    ours, expected = (jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (m.max_pool, theirs))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("m", [*ANY_SUITE, ppd_atari, ppd_procgen])
@pytest.mark.parametrize("batch", [1, 6, 13, 24])
def test_the_gradient_of_convolutions_is_xla_s(m, batch):
    """The network with our gradient against the same network with flax's own, in all parameters and in the images."""
    rng = np.random.default_rng(0)
    x, kernel, weights = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((batch, 9, 7, 3), (3, 3, 3, 5), (batch, 9, 7, 5)))

    def theirs(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    ours, expected = (jax.grad(lambda *a, f=f: (f(*a) * weights).sum(), (0, 1))(x, kernel) for f in (m.convolve, theirs))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [ppd_atari, ppd_procgen])
def test_images_are_divided_by_255_and_channels_come_first(m):
    """A network of one convolution's weights sees each channel, and 255 as 1."""
    network = m.Network("nature", (1, 1, 1), (1,))
    policy = m.Policy(network, 2)
    shape = m.OBSERVATION_SHAPE
    params = jax.tree.map(jnp.ones_like, policy.init(jax.random.PRNGKey(0), jnp.zeros(shape, jnp.uint8)))
    params["params"]["Dense_1"]["bias"] = jnp.zeros(2)
    black, white = (policy.apply(params, jnp.full(shape, x, jnp.uint8))[0] for x in (0, 255))
    side = ((shape[1] - 8) // 4 + 1 - 4) // 2 + 1 - 2
    # bias 1 in each layer: black 1, 17, 154; white 64·C more in the first: (64C + 1)·16 + 1, ·9 + 1; then the sum and 1
    assert float(black) == side**2 * 154 + 1
    assert float(white) == side**2 * (9 * (16 * (64 * shape[0] + 1) + 1) + 1) + 1


def test_student_hidden_overrides_the_size():
    assert ppd_mujoco.Args(student_size="smaller", student_hidden=(7, 5)).hidden == (7, 5)


@pytest.mark.parametrize("m", [*ANY_SUITE, ppd_mujoco])
def test_initialisation(m):
    """Orthogonal weights with gain √2, 0.01 for the policy's head and 1 for the value's; zero biases and log_std."""
    network = (256, 256) if m is ppd_mujoco else m.Network("mlp", (), (256, 256))
    policy = m.Policy(network, 3).init(jax.random.PRNGKey(0), jnp.zeros((1, 11)))["params"]
    value = m.Value(network).init(jax.random.PRNGKey(1), jnp.zeros((1, 11)))["params"]
    for params, gains in ((policy, (np.sqrt(2), np.sqrt(2), 0.01)), (value, (np.sqrt(2), np.sqrt(2), 1.0))):
        is_orthogonal(params, {f"Dense_{i}": gain for i, gain in enumerate(gains)})
    assert not np.asarray(policy["log_std"]).any()


def is_orthogonal(params, gains):
    for name, gain in gains.items():
        kernel = np.asarray(params[name]["kernel"], np.float64)
        kernel = kernel.reshape(-1, kernel.shape[-1])
        kernel = kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T
        np.testing.assert_allclose(kernel.T @ kernel, gain**2 * np.eye(kernel.shape[1]), atol=1e-5)
        assert not np.asarray(params[name]["bias"]).any()


@pytest.mark.parametrize("m", [*ANY_SUITE, ppd_atari, ppd_procgen])
@pytest.mark.parametrize("kind", ["nature", "impala"])
def test_initialisation_of_convolutional_networks(m, kind):
    network, x = m.Network(kind, (8, 8, 8), (16,)), jnp.zeros((1, 4, 84, 84), jnp.uint8)
    for params, gain in ((m.Policy(network, 3).init(jax.random.PRNGKey(0), x)["params"], 0.01),
                         (m.Value(network).init(jax.random.PRNGKey(1), x)["params"], 1.0)):
        convolutions = [f"Conv_{i}" for i in range(3 if kind == "nature" else 15)]
        assert set(params) == {*convolutions, "Dense_0", "Dense_1"}
        is_orthogonal(params, dict.fromkeys([*convolutions, "Dense_0"], np.sqrt(2)) | {"Dense_1": gain})


IMAGES = [train_teacher, ppd_atari, ppd_procgen]
STEPS = [(train_teacher, False), (train_teacher, True), (ppd_mujoco, False), (ppd_atari, True), (ppd_procgen, True)]
SMALL = ("nature", (8, 8, 8), (16,))


def made_up_rollout(rng, m, images=False, steps=8, envs=4, dims=5, actions=2):
    flags = np.zeros((3, steps, envs), bool)
    flags[0, 2, 1] = flags[2, 3, 1] = True  # a termination and its phantom
    flags[1, 5, 2] = flags[2, 6, 2] = True  # a truncation and its phantom
    rewards = rng.normal(size=(steps, envs)).astype(np.float32) * ~flags[2]
    if images:
        observations = rng.integers(0, 256, (steps + 1, envs, 2, 36, 36), np.uint8)
        taken = rng.integers(0, actions, (steps, envs)).astype(np.int32)
    else:
        observations = rng.normal(size=(steps + 1, envs, dims)).astype(np.float32)
        taken = rng.normal(size=(steps, envs, actions)).astype(np.float32)
    return m.Rollout(observations, taken, rewards, *flags)


def learner(m, images=False, **flags):
    """A small learner: a function from a rollout to the state and the metrics after one update."""
    args = m.Args(env_id="Hopper-v4", num_envs=4, num_steps=8, num_minibatches=2, ent_coef=0.01, gamma=0.99, **flags)
    network = m.Network(*SMALL) if images else (16, 8) if m is ppd_mujoco else m.Network("mlp", (), (16, 8))
    policy, value = m.Policy(network, 2), m.Value(network)
    shape = (2, 36, 36) if images else (5,)
    x = jnp.zeros((1, *shape), jnp.uint8 if images else jnp.float32)
    if m is train_teacher:
        networks = m.Networks(policy, value)
        return lambda rollout: m.update(args, networks, m.init_state(args, networks, shape), rollout)
    if m is ppd_mujoco:
        networks = m.Networks(policy, value, m.Policy((8,), 2))
        params = networks.teacher.init(jax.random.PRNGKey(9), x)
        teacher = m.Frozen(params, m.Stats(jnp.zeros(5), jnp.ones(5), jnp.float32(1.0)))
        return lambda rollout: m.update(args, networks, teacher, m.init_state(args, networks, 5), rollout, 1.0)
    networks = m.Networks(policy, value, policy)
    teacher = policy.init(jax.random.PRNGKey(9), x)
    return lambda rollout: m.update(args, networks, teacher, init_small(m, args, networks, x), rollout, 1.0)


def init_small(m, args, networks, x):
    """init_state of a pixel script, for images of another size than its suite's."""
    shape = m.OBSERVATION_SHAPE
    m.OBSERVATION_SHAPE = x.shape[1:]
    try:
        return m.init_state(args, networks)
    finally:
        m.OBSERVATION_SHAPE = shape


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(("m", "images"), STEPS)
def test_an_update_does_not_see_phantom_transitions(m, images):
    """Whatever the policy did there, and what it saw there after a termination, changes no bit of state or metrics."""
    rollout = made_up_rollout(np.random.default_rng(0), m, images)
    actions, observations = rollout.actions.copy(), rollout.observations.copy()
    actions[rollout.phantoms] = 1 - actions[rollout.phantoms] if images else 7.0
    observations[3, 1] = 3.0  # the final observation of a terminated episode
    learn = learner(m, images)
    before, after = learn(rollout), learn(rollout._replace(actions=actions, observations=observations))
    assert same(before, after)
    actions[0, 0] = 1 - actions[0, 0] if images else 7.0
    assert not same(before, learn(rollout._replace(actions=actions)))


@pytest.mark.parametrize(("m", "images"), STEPS)
def test_an_update_bootstraps_from_a_truncated_observation(m, images):
    """The final observation of a truncated episode does count: it is what its last step bootstraps from."""
    rollout = made_up_rollout(np.random.default_rng(0), m, images)
    observations = rollout.observations.copy()
    observations[6, 2] = 3.0
    learn = learner(m, images)
    assert not same(learn(rollout), learn(rollout._replace(observations=observations)))


def baseline(m, images, rollout, updates=1):
    """Some updates of a small student-distill or teacher-distill; returns teacher, state and metrics."""
    args = m.Args(env_id="Hopper-v4", num_envs=4, num_steps=8, ent_coef=0.01)
    network = m.Network(*SMALL) if images else m.Network("mlp", (), (16, 8))
    shape = (2, 36, 36) if images else (5,)
    networks = m.Networks(m.Policy(network, 2), m.Value(network), m.Policy(network, 2), m.Value(network))
    x = jnp.zeros((1, *shape), jnp.uint8 if images else jnp.float32)
    stats = None if images else m.Stats(jnp.zeros(5), jnp.ones(5), jnp.float32(1.0))
    teacher = m.Frozen(networks.teacher.init(jax.random.PRNGKey(9), x), stats)
    value, state = networks.teacher_value.init(jax.random.PRNGKey(8), x), m.init_state(args, networks, shape)
    for _ in range(updates):
        state, metrics = m.update(args, networks, teacher, value, state, rollout)
    return (teacher, value), state, metrics


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("m", [student_distill, teacher_distill])
def test_an_update_of_the_baselines_sees_neither_phantoms_nor_rewards(m, images):
    rollout = made_up_rollout(np.random.default_rng(0), m, images)
    observations = rollout.observations.copy()
    observations[:-1][rollout.phantoms] = 3.0
    before = baseline(m, images, rollout)
    assert same(before, baseline(m, images, rollout._replace(observations=observations, rewards=rollout.rewards + 1.0)))
    observations[0, 0] = 3.0
    assert not same(before[1].params, baseline(m, images, rollout._replace(observations=observations))[1].params)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("m", [student_distill, teacher_distill])
def test_the_baselines_leave_the_teacher_as_it_was(m, images):
    rollout = made_up_rollout(np.random.default_rng(0), m, images)
    assert same(baseline(m, images, rollout, 1)[0], baseline(m, images, rollout, 5)[0])


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


@pytest.mark.parametrize("m", [ppd_atari, ppd_procgen])
def test_no_update_reaches_the_teacher_of_images(m):
    args = m.Args(env_id="any", num_envs=4, num_steps=8, num_minibatches=2, ent_coef=0.0, gamma=0.99)
    policy, x = m.Policy(m.Network(*SMALL), 2), jnp.zeros((1, 2, 36, 36), jnp.uint8)
    networks = m.Networks(policy, m.Value(m.Network(*SMALL)), policy)
    teacher = policy.init(jax.random.PRNGKey(9), x)
    copy, state = jax.tree.map(np.array, teacher), init_small(m, args, networks, x)
    for _ in range(2):
        state, metrics = m.update(args, networks, teacher, state, made_up_rollout(np.random.default_rng(0), m, True), 1.0)
    assert same(teacher, copy) and float(metrics["losses/teacher_kl"]) > 0


def test_a_student_of_the_teacher_s_seed_and_size_starts_from_other_weights():
    args = ppd_mujoco.Args(student_size="same", env_id="Hopper-v4", seed=100)
    networks = ppd_mujoco.Networks(ppd_mujoco.Policy(args.hidden, 3), ppd_mujoco.Value(args.hidden), None)
    student = ppd_mujoco.init_state(args, networks, 11).params
    network = train_teacher.Args(env_id="Hopper-v4").network
    networks = train_teacher.Networks(train_teacher.Policy(network, 3), train_teacher.Value(network))
    teacher = train_teacher.init_state(train_teacher.Args(seed=100), networks, (11,)).params
    kernels = [x for x in jax.tree.leaves(jax.tree.map(np.array_equal, student, teacher))]
    assert sum(kernels) == len(jax.tree.leaves(student)) - 6  # the zeros of biases and log_std alone are the same


def test_flags_of_learning_do_something():
    rollout = made_up_rollout(np.random.default_rng(0), ppd_mujoco)
    plain = learner(ppd_mujoco)(rollout)
    for flags in ({"kl_direction": "reverse"}, {"clip_coef": 0.01}, {"vf_coef": 0.1}, {"max_grad_norm": 0.01},
                  {"learning_rate": 1e-3}, {"update_epochs": 2}, {"gae_lambda": 0.5}, {"seed": 3}):
        assert not same(plain[0].params, learner(ppd_mujoco, **flags)(rollout)[0].params), flags
