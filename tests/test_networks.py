"""Networks against the paper's Table 4 and against XLA's own convolutions, and what one update sees and leaves alone.

Scripts that share a block, which test_shared_blocks.py holds, share its test: train_teacher.py stands for the scripts of any
suite, and ppd_atari.py for ppd_procgen.py; teacher_distill.py learns as student_distill.py does.
"""

import dataclasses
from functools import cache, partial

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
import train_teacher

PPD = {"atari": ppd_atari, "mujoco": ppd_mujoco, "procgen": ppd_procgen}

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


@cache
def shapes_of(module, shape):
    """Names and shapes of a module's parameters; nothing is computed."""
    x = jnp.zeros((1, *shape), jnp.float32 if len(shape) == 1 else jnp.uint8)
    return jax.eval_shape(module.init, jax.random.PRNGKey(0), x)["params"]


def count(policy, shape):
    """Parameters of the policy network alone; log_std is not counted."""
    params = {name: x for name, x in shapes_of(policy, shape).items() if name != "log_std"}
    return sum(np.prod(x.shape) for x in jax.tree.leaves(params))


def policies(env_id, size, **flags):
    """The policy of this size in the suite's own script, and in those for any suite; and the shape of its input."""
    own = PPD[suite(env_id)]
    student = own.Args(env_id=env_id, student_size=size, **flags)
    teacher = train_teacher.Args(env_id=env_id, size=size, **{name.removeprefix("student_"): x for name, x in flags.items()})
    network = student_distill.Args(env_id=env_id, student_size=size, **flags).network
    actions = STATES[env_id][1] if env_id in STATES else ACTIONS[env_id]
    shape = STATES[env_id][:1] if env_id in STATES else own.OBSERVATION_SHAPE
    return [own.Policy(student.hidden if env_id in STATES else student.network, actions), train_teacher.Policy(teacher.network, actions),
            student_distill.Policy(network, actions), evaluate.Policy(evaluate.Network(*network[:4]), actions, env_id in STATES)], shape


@pytest.mark.parametrize("size", ["smaller", "same", "larger"])
@pytest.mark.parametrize("env_id", [*STATES, *ACTIONS])
def test_parameter_counts(env_id, size):
    found, shape = policies(env_id, size)
    assert {count(policy, shape) for policy in found} == {by_hand(env_id, size)}


@pytest.mark.parametrize(("suite", "size"), TABLE_4)
def test_mean_parameter_counts_are_table_4(suite, size):
    assert np.mean([by_hand(env_id, size) for env_id in SUITES[suite]]) == pytest.approx(TABLE_4[suite, size], abs=0.005)


def test_the_smaller_network_of_the_paper_s_text():
    """Filters 32, 32, 32 and 128 units, which is not the one whose parameters Table 4 counts."""
    flags = {"student_channels": (32, 32, 32), "student_hidden": (128,)}
    counts = {env_id: {count(policy, shape) for policy in found}
              for env_id in ACTIONS for found, shape in [policies(env_id, "smaller", **flags)]}
    assert all(len(found) == 1 for found in counts.values())
    assert np.mean([min(counts[env_id]) for env_id in SUITES["atari"]]) == pytest.approx(235_857.55, abs=0.005)
    assert counts["CoinrunEasy-v0"] == {99_439}


@pytest.mark.parametrize("env_id", [
    pytest.param(env_id, marks=[needs_procgen] if suite(env_id) == "procgen" else []) for env_id in (*STATES, *ACTIONS)])
def test_the_environments_have_these_shapes(env_id):
    expected = list(STATES[env_id][:1] if env_id in STATES else PPD[suite(env_id)].OBSERVATION_SHAPE), (
        STATES[env_id][1] if env_id in STATES else ACTIONS[env_id])
    assert student_distill.task_shape(env_id) == PPD[suite(env_id)].task_shape(env_id) == expected
    if env_id in (*STATES, "Pong-v5", "CoinrunEasy-v0"):
        variant = {name: getattr(train_teacher.Args(), name) for name in train_teacher.VARIANTS[suite(env_id)]}
        envs = train_teacher.make_envs(env_id, 1, 0, variant, "training")
        actions = envs.action_space.shape[0] if env_id in STATES else envs.action_space.n
        assert (list(envs.observation_space.shape), actions) == expected


# Convolutions ----------------------------------------------------------------------------------------------------------

KINDS = [("nature", (32, 64, 64)), ("impala", (16, 32, 32))]
SHAPES = [(4, 84, 84), (3, 64, 64)]


def make_policy(m, network, actions=3):
    return evaluate.Policy(network, actions, False) if m is evaluate else m.Policy(network, actions)


def some_params(module, shape):
    """Random parameters of a module, of a size that keeps its activations about as large as its input."""
    rng = np.random.default_rng(0)

    def leaf(x):
        return rng.normal(0.0, 1.0 / np.sqrt(max(1, np.prod(x.shape[:-1]))), x.shape).astype(np.float32)

    return {"params": jax.tree.map(leaf, dict(shapes_of(module, shape)))}


def by_xla(function):
    """A function made where JAX says that there is a GPU, on which the networks leave convolutions to XLA."""

    def patched(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: "gpu")
            return function(*args)

    return jax.jit(patched)


def closeness(ours, expected):
    """The largest difference of any array, as a fraction of its norm."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.linalg.norm(jnp.ravel(a - b)) / jnp.linalg.norm(jnp.ravel(b))) for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: f"{x[0]}x{x[1]}")
@pytest.mark.parametrize(("kind", "channels"), KINDS, ids=lambda x: x if isinstance(x, str) else str(x[0]))
def test_networks_of_patches_are_xla_s(kind, channels, shape, monkeypatch):
    """In value and in every gradient; in float64, where rounding makes no ReLU and no maximum choose another side."""
    policy = make_policy(train_teacher, train_teacher.Network(kind, channels, (8,)))
    params, x = some_params(policy, shape), np.random.default_rng(1).integers(0, 256, (1, *shape), np.uint8)
    called = []
    monkeypatch.setattr(train_teacher, "convolve", lambda *a, f=train_teacher.convolve, **b: called.append(1) or f(*a, **b))

    def loss(params):
        return (policy.apply(params, x) ** 2).sum()

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        ours = jax.jit(jax.value_and_grad(loss))(params)
        convolutions = len(called)
        expected = by_xla(jax.value_and_grad(loss))(params)
        assert len(called) == convolutions == (3 if kind == "nature" else 15)
        assert ours[0].dtype == jnp.float64 and closeness(ours, expected) < 1e-10
        assert all(np.any(np.asarray(x)) for x in jax.tree.leaves(ours))


@cache
def xla_s_values(kind, channels):
    """Shapes of the parameters and outputs of a network whose convolutions are XLA's."""
    policy, shape = make_policy(train_teacher, train_teacher.Network(kind, channels, (8,))), SHAPES[0]
    params, x = some_params(policy, shape), np.random.default_rng(1).integers(0, 256, (3, *shape), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        shapes = jax.eval_shape(policy.init, jax.random.PRNGKey(0), x)["params"]
    return jax.tree.map(lambda x: x.shape, shapes), by_xla(policy.apply)(params, x)


@pytest.mark.parametrize("m", [train_teacher, ppd_atari, evaluate])
@pytest.mark.parametrize(("kind", "channels"), KINDS, ids=lambda x: x if isinstance(x, str) else str(x[0]))
def test_every_script_s_network_gives_xla_s_values(m, kind, channels):
    """In float32, from the same names and shapes of parameters, whoever convolves."""
    policy, shape = make_policy(m, m.Network(kind, channels, (8,))), SHAPES[0]
    params, x = some_params(policy, shape), np.random.default_rng(1).integers(0, 256, (3, *shape), np.uint8)
    shapes, expected = xla_s_values(kind, channels)
    assert shapes == jax.tree.map(lambda x: x.shape, params["params"])
    assert closeness(jax.jit(policy.apply)(params, x), expected) < 1e-5


@pytest.mark.parametrize(("size", "stride", "padding"), [(8, 4, "VALID"), (4, 2, "VALID"), (3, 1, "VALID"), (3, 1, "SAME")])
def test_a_convolution_of_patches_is_xla_s_on_any_rectangle(size, stride, padding):
    """In value and in the gradients of images and of kernels; some pixels at the edges are in no window."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 21, 14, 3), (size, size, 3, 5)))

    def theirs(x, kernel, strides, padding):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def both(convolve):
        y, back = jax.vjp(lambda *a: convolve(*a, (stride, stride), padding), x, kernel)
        return y, back(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    assert closeness(both(train_teacher.convolve), both(theirs)) < 1e-5


@pytest.mark.parametrize("size", [84, 21, 5])
def test_max_pool_is_flax_s_with_a_border_of_one(size):
    """In value and in gradient, whose like flax takes from XLA's pooling; no two inputs are the same, so it is unique."""
    x = jnp.asarray(np.random.default_rng(0).permutation(2 * size * size * 3).reshape(2, size, size, 3), jnp.float32)

    def theirs(x):
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

    np.testing.assert_array_equal(train_teacher.max_pool(x), theirs(x))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=theirs(x).shape), jnp.float32)
    ours, expected = (jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (train_teacher.max_pool, theirs))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda x: f"{x[0]}x{x[1]}")
@pytest.mark.parametrize("m", [train_teacher, ppd_atari, evaluate])
def test_images_are_divided_by_255_and_channels_come_first(m, shape):
    """A network of one convolution's weights sees each channel, and 255 as 1."""
    policy = make_policy(m, m.Network("nature", (1, 1, 1), (1,)), 2)
    params = {"params": jax.tree.map(lambda x: jnp.ones(x.shape), dict(shapes_of(policy, shape)))}
    params["params"]["Dense_1"]["bias"] = jnp.zeros(2)
    black, white = (policy.apply(params, jnp.full(shape, x, jnp.uint8)[None])[0, 0] for x in (0, 255))
    side = ((shape[1] - 8) // 4 + 1 - 4) // 2 + 1 - 2
    # bias 1 in each layer: black 1, 17, 154; white 64·C more in the first: (64C + 1)·16 + 1, ·9 + 1; then the sum and 1
    assert float(black) == side**2 * 154 + 1
    assert float(white) == side**2 * (9 * (16 * (64 * shape[0] + 1) + 1) + 1) + 1


# Initialisation --------------------------------------------------------------------------------------------------------


def test_student_hidden_overrides_the_size():
    assert ppd_mujoco.Args(student_size="smaller", student_hidden=(7, 5)).hidden == (7, 5)
    network = ppd_atari.Args(student_size="same", student_channels=(1, 2, 3), student_hidden=(7,)).network
    assert network == ("impala", (1, 2, 3), (7,), "relu")


@pytest.mark.parametrize("m", [train_teacher, ppd_mujoco])
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


@pytest.mark.parametrize("m", [train_teacher, ppd_atari])
@pytest.mark.parametrize("kind", ["nature", "impala"])
def test_initialisation_of_convolutional_networks(m, kind):
    network, x = m.Network(kind, (8, 8, 8), (16,)), jnp.zeros((1, 4, 36, 36), jnp.uint8)
    for params, gain in ((m.Policy(network, 3).init(jax.random.PRNGKey(0), x)["params"], 0.01),
                         (m.Value(network).init(jax.random.PRNGKey(1), x)["params"], 1.0)):
        convolutions = [f"Conv_{i}" for i in range(3 if kind == "nature" else 15)]
        assert set(params) == {*convolutions, "Dense_0", "Dense_1"}
        is_orthogonal(params, dict.fromkeys([*convolutions, "Dense_0"], np.sqrt(2)) | {"Dense_1": gain})


# Updates ---------------------------------------------------------------------------------------------------------------

STEPS = [(train_teacher, False), (train_teacher, True), (ppd_mujoco, False), (ppd_atari, True), (student_distill, False),
         (student_distill, True)]
LEARNERS = pytest.mark.parametrize(("m", "images"), STEPS, ids=lambda x: x.__name__ if hasattr(x, "__name__") else ("states", "images")[x])
REWARDED = pytest.mark.parametrize(("m", "images"), STEPS[:4], ids=lambda x: x.__name__ if hasattr(x, "__name__") else ("states", "images")[x])
SMALL = ("nature", (4, 4, 4), (8,))


def made_up_rollout(m, images, steps=8, envs=4, dims=5, actions=2):
    rng, flags = np.random.default_rng(0), np.zeros((3, steps, envs), bool)
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


class Learner:
    """A small student or teacher, and what it learns from; `learn` does an update, and leaves nothing behind."""

    def __init__(self, m, images, distill_coef=1.0, **flags):
        ppd = m in (ppd_mujoco, ppd_atari)
        flags = {"num_devices": 1, "ent_coef": 0.01} | ({} if m is student_distill else {"num_minibatches": 2, "gamma": 0.99}) | flags
        self.m, self.distill_coef = m, distill_coef
        self.args = m.Args(env_id="Pong-v5" if images else "Hopper-v4", num_envs=4, num_steps=8, **flags)
        network = m.Network(*SMALL) if images else (16, 8) if m is ppd_mujoco else m.Network("mlp", (), (16, 8))
        hidden = {"student_hidden" if m is not train_teacher else "hidden": network if m is ppd_mujoco else network.hidden}
        self.args = dataclasses.replace(self.args, **hidden, **({} if not images else {"size" if m is train_teacher else "student_size": "smaller"}))
        policy, value = m.Policy(network, 2), m.Value(network)
        self.shape = (2, 36, 36) if images else (5,)
        x = jnp.zeros((1, *self.shape), jnp.uint8 if images else jnp.float32)
        stats = None if images else m.Stats(jnp.full(5, 0.1), jnp.full(5, 2.0), jnp.float32(9.0))
        params = {"policy": policy.init(jax.random.PRNGKey(9), x), "value": value.init(jax.random.PRNGKey(8), x)}
        self.networks = m.Networks(policy, value, *((policy, value) if m is student_distill else (policy,) if ppd else ()))
        self.teacher = params | {"obs_stats": stats}

    def start(self):
        """The state at first, where an update leaves it: whole on each device."""
        mesh = self.m.replicated(self.args.num_devices).mesh
        return jax.device_put(self.init(), jax.sharding.NamedSharding(mesh, self.m.P()))

    def init(self):
        """init_state; of ppd_atari.py with images of another size than its suite's."""
        if self.m is ppd_mujoco:
            return self.m.init_state(self.args, self.networks, 5)
        if self.m is not ppd_atari:
            return self.m.init_state(self.args, self.networks, self.shape)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.m, "OBSERVATION_SHAPE", self.shape)
            return self.m.init_state(self.args, self.networks)

    def learn(self, rollout, state=None):
        """The state and the metrics after one update."""
        state = self.start() if state is None else state
        if self.m is train_teacher:
            return self.m.update(self.args, self.networks, state, rollout)
        return self.m.update(self.args, self.networks, self.teacher, state, rollout, *(() if self.m is student_distill else (self.distill_coef,)))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@LEARNERS
def test_an_update_does_not_see_phantom_transitions(m, images):
    """Whatever the policy did there, and what it saw there after a termination, changes no bit of state or metrics."""
    rollout = made_up_rollout(m, images)
    actions, observations = rollout.actions.copy(), rollout.observations.copy()
    actions[rollout.phantoms] = 1 - actions[rollout.phantoms] if images else 7.0
    observations[3, 1] = 3.0  # the final observation of a terminated episode
    learner = Learner(m, images)
    before = learner.learn(rollout)
    assert same(before, learner.learn(rollout._replace(actions=actions, observations=observations)))
    actions[0, 0] = 1 - actions[0, 0] if images else 7.0
    if m is not student_distill:  # which learns from no actions
        assert not same(before, learner.learn(rollout._replace(actions=actions)))
    observations[0, 0] = 3.0
    assert not same(before[0].params, learner.learn(rollout._replace(observations=observations))[0].params)


@pytest.mark.parametrize("images", [False, True])
def test_an_update_of_the_baselines_sees_no_rewards_and_no_phantoms(images):
    rollout = made_up_rollout(student_distill, images)
    observations = rollout.observations.copy()
    observations[:-1][rollout.phantoms] = 3.0
    observations[-1] = 3.0
    learner = Learner(student_distill, images)
    changed = rollout._replace(observations=observations, rewards=rollout.rewards + 1.0, actions=rollout.actions + 1)
    assert same(learner.learn(rollout), learner.learn(changed))


@REWARDED
def test_an_update_bootstraps_from_a_truncated_observation(m, images):
    """The final observation of a truncated episode does count: it is what its last step bootstraps from."""
    rollout = made_up_rollout(m, images)
    observations = rollout.observations.copy()
    observations[6, 2] = 3.0
    learner = Learner(m, images)
    assert not same(learner.learn(rollout), learner.learn(rollout._replace(observations=observations)))


def close(a, b, tolerance=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@LEARNERS
def test_two_devices_learn_as_one_does(m, images):
    """The same parameters, statistics and metrics to float32's tolerance, though phantoms are not shared out evenly."""
    assert len(jax.devices()) == 2
    rollout = made_up_rollout(m, images)
    one, two = (Learner(m, images, num_devices=n).learn(rollout) for n in (1, 2))
    start = Learner(m, images).start()
    close(one[0]._replace(opt_state=(), key=()), two[0]._replace(opt_state=(), key=()))
    close(one[1], two[1], 1e-4)
    assert not same(one[0].params, start.params) and same(one[0].key, two[0].key)


@pytest.mark.parametrize(("kind", "num_devices"), [("nature", 2), ("impala", 1), ("mlp", 2)])
def test_the_mean_gradient_is_that_of_the_whole_minibatch(kind, num_devices):
    """In parts, on several devices, with phantoms: gradient and terms of one jax.grad over the samples at once."""
    m, rng = student_distill, np.random.default_rng(0)
    shape, batch = {"nature": (2, 36, 36), "impala": (1, 12, 12), "mlp": (5,)}[kind], 60
    network = m.Network(kind, {"nature": (4, 4, 4), "impala": (4,), "mlp": ()}[kind], (8,))
    policy, value = m.Policy(network, 3), m.Value(network)
    params = {"policy": some_params(policy, shape), "value": some_params(value, shape)}
    x = rng.normal(size=(batch, *shape)).astype(np.float32) if kind == "mlp" else rng.integers(0, 256, (batch, *shape), np.uint8)
    teacher = jnp.asarray(rng.normal(size=(batch, 3)), jnp.float32)
    weights = jnp.asarray(rng.random(batch) < 0.7, jnp.float32)
    samples = m.Batch(jnp.asarray(x), weights, (teacher, 0 * teacher) if kind == "mlp" else teacher, jnp.asarray(rng.normal(size=batch), jnp.float32))
    indices = jnp.asarray(rng.permutation(batch)[:48])
    assert m.part_size(network, 48 // num_devices) == {"nature": 12, "impala": 1, "mlp": 24}[kind]

    def loss_fn(params, part):
        outputs = policy.apply(params["policy"], part.observations)
        return m.distill_loss(outputs, value.apply(params["value"], part.observations), part, 0.1, 0.5, "forward")

    class Flags:
        pass

    Flags.network, Flags.num_devices = network, num_devices
    ours = jax.jit(partial(m.mean_gradient, Flags, loss_fn))(params, samples, indices)
    expected = jax.jit(jax.grad(loss_fn, has_aux=True))(params, jax.tree.map(lambda x: x[indices], samples))
    assert closeness(ours, expected) < 1e-5


@pytest.mark.parametrize("num_devices", [1, 2])
def test_networks_in_parts_are_the_whole(num_devices):
    m, rng = student_distill, np.random.default_rng(0)
    policy = m.Policy(m.Network(*SMALL), 3)
    params, x = some_params(policy, (2, 36, 36)), rng.integers(0, 256, (9, 6, 2, 36, 36), np.uint8)
    found = jax.jit(m.apply_in_parts, static_argnums=(0, 1))(num_devices, policy, params, x)
    assert found.shape == (9, 6, 3) and closeness(found, policy.apply(params, x)) < 1e-5


@pytest.mark.parametrize(("m", "images"), [(ppd_mujoco, False), (ppd_atari, True)])
def test_an_update_with_lambda_zero_is_the_teacher_s_ppo(m, images):
    """From the same parameters, statistics and keys, two scripts with different code come to the same parameters."""
    ours, theirs = Learner(m, images, distill_coef=0.0), Learner(train_teacher, images)
    state, other, rollout = ours.start(), theirs.start(), made_up_rollout(m, images)
    other = other._replace(params=jax.tree.map(jnp.copy, state.params), key=jnp.copy(state.key))
    if not images:
        other = other._replace(obs_stats=train_teacher.Stats(*map(jnp.copy, ours.teacher["obs_stats"])))
    (state, metrics), (other, expected) = ours.learn(rollout, state), theirs.learn(train_teacher.Rollout(*rollout), other)
    close((state.params, state.return_stats), (other.params, other.return_stats))
    close({name: metrics[name] for name in expected}, expected, 1e-4)


@pytest.mark.parametrize(("m", "images"), [(ppd_mujoco, False), (ppd_atari, True), (student_distill, False), (student_distill, True)])
def test_no_update_reaches_the_teacher(m, images):
    learner, rollout = Learner(m, images), made_up_rollout(m, images)
    copy, state = jax.tree.map(np.array, learner.teacher), learner.start()
    for _ in range(3):
        state, metrics = learner.learn(rollout, state)
    assert same(learner.teacher, copy) and float(metrics["losses/teacher_kl"]) > 0
    assert jax.tree.structure(state.params["policy"]) == jax.tree.structure(learner.start().params["policy"])


@pytest.mark.parametrize(("m", "images"), [(ppd_mujoco, False), (ppd_atari, True), (student_distill, False)])
def test_a_student_of_the_teacher_s_seed_and_size_starts_from_other_weights(m, images):
    student, teacher = (Learner(each, images).start().params for each in (m, train_teacher))
    for (where, x), y in zip(jax.tree.leaves_with_path(student), jax.tree.leaves(teacher), strict=True):
        assert np.array_equal(x, y) == (where[-1].key in ("bias", "log_std"))  # zeros


def test_a_baseline_regresses_to_its_teachers_values():
    m, learner = student_distill, Learner(student_distill, False)
    params, rollout = jax.tree.map(np.array, learner.start().params), made_up_rollout(m, False)
    x = m.normalize(rollout.observations[:-1], learner.teacher["obs_stats"])
    errors = learner.networks.value.apply(params["value"], x) - learner.networks.teacher_value.apply(learner.teacher["value"], x)
    expected = float((errors[~rollout.phantoms] ** 2).mean())
    assert float(learner.learn(rollout)[1]["losses/value_loss"]) == pytest.approx(expected, rel=1e-5)


def test_a_teachers_statistics_take_in_each_rollout():
    rollout = made_up_rollout(train_teacher, False)
    state, _ = Learner(train_teacher, False).learn(rollout)
    real = rollout.observations[:-1][~rollout.phantoms]
    np.testing.assert_allclose(state.obs_stats.mean, real.mean(0), atol=1e-4)
    np.testing.assert_allclose(state.obs_stats.var, real.var(0), rtol=1e-3)


def test_an_update_is_the_algorithm_step_by_step():
    """Against loops and formulas written out: returns, advantages, minibatches, the loss, clipping and Adam, with unusual flags."""
    m, f64 = ppd_mujoco, partial(np.asarray, dtype=np.float64)
    flags = {"gamma": 0.9, "gae_lambda": 0.7, "clip_coef": 0.05, "ent_coef": 0.03, "vf_coef": 0.3, "learning_rate": 0.01, "max_grad_norm": 0.9,
             "update_epochs": 3, "num_minibatches": 4, "kl_direction": "reverse", "seed": 3}
    learner, rollout = Learner(m, False, distill_coef=2.0, **flags), made_up_rollout(m, False)
    networks, taught = learner.networks, learner.teacher
    state = learner.start()._replace(return_stats=m.Stats(jnp.float32(0.0), jnp.float32(1e-4), jnp.float32(1e4)))  # half the rewards are clipped
    params, weights = jax.tree.map(np.array, state.params), f64(~rollout.phantoms)
    x = np.clip((rollout.observations - np.asarray(taught["obs_stats"].mean)) / np.sqrt(np.asarray(taught["obs_stats"].var)), -10, 10)
    values = f64(networks.value.apply(params["value"], x))

    def log_prob(outputs, actions):
        return (-0.5 * ((actions - outputs[0]) / jnp.exp(outputs[1])) ** 2 - outputs[1] - 0.5 * np.log(2 * np.pi)).sum(-1)

    sums, running = np.zeros((8, 4)), np.zeros(4)
    for t in range(8):
        sums[t] = running = 0.9 * running + rollout.rewards[t]
        running = running * ~(rollout.terminations[t] | rollout.truncations[t])
    n, real = weights.sum(), sums[weights == 1]
    count = n + 1e4
    variance = (1e-4 * 1e4 + real.var() * n + real.mean() ** 2 * 1e4 * n / count) / count
    rewards = np.clip(rollout.rewards / np.sqrt(variance), -10, 10)
    advantages, later = np.zeros((9, 4)), np.zeros(4)
    for t in reversed(range(8)):
        delta = rewards[t] + 0.9 * values[t + 1] * ~rollout.terminations[t] - values[t]
        advantages[t] = later = delta + 0.9 * 0.7 * later * ~(rollout.terminations[t] | rollout.truncations[t])
    advantages = advantages[:8]
    teacher = networks.teacher.apply(taught["policy"], x[:8])
    data = x[:8], rollout.actions, log_prob(networks.policy.apply(params["policy"], x[:8]), rollout.actions), advantages + values[:8], *teacher
    data = [np.asarray(each, np.float32).reshape(32, *each.shape[2:]) for each in data]

    @jax.jit
    def gradient(params, advantages, weights, x, actions, old, returns, teacher_mean, teacher_log_std):
        def loss(params):
            mean, log_std = outputs = networks.policy.apply(params["policy"], x)
            ratio = jnp.exp(log_prob(outputs, actions) - old)
            gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 0.95, 1.05) * advantages)
            difference = (jnp.exp(2 * log_std) + (mean - teacher_mean) ** 2) / (2 * jnp.exp(2 * teacher_log_std))
            kl = (teacher_log_std - log_std + difference - 0.5).sum(-1)
            entropy = (log_std + 0.5 * np.log(2 * np.pi * np.e)).sum(-1)
            squares = (networks.value.apply(params["value"], x) - returns) ** 2
            return (weights * (-gain + 0.3 * squares - 0.03 * entropy + 2.0 * kl * jnp.maximum(ratio, 0.95))).sum() / weights.sum()

        return jax.grad(loss)(params)

    moments, step = [jax.tree.map(np.zeros_like, params) for _ in range(2)], 0
    for key in jax.random.split(jax.random.split(state.key)[1], 3):
        for indices in np.asarray(jax.random.permutation(key, 32)).reshape(4, 8):
            w, a = weights.reshape(-1)[indices], advantages.reshape(-1)[indices]
            mean = (w * a).sum() / w.sum()
            a = (a - mean) / np.sqrt((w * (a - mean) ** 2).sum() / w.sum())
            grads, step = gradient(params, a, w, *(each[indices] for each in data)), step + 1
            norm = np.sqrt(sum((f64(g) ** 2).sum() for g in jax.tree.leaves(grads)))
            grads = jax.tree.map(lambda g, norm=norm: f64(g) * min(1.0, 0.9 / norm), grads)
            moments[0] = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
            moments[1] = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, moments[1], grads)
            params = jax.tree.map(lambda p, m, v, t=step: np.float32(p - 0.01 * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-5)), params, *moments)
    start = jax.tree.map(np.array, state.params)
    found, metrics = learner.learn(rollout, state)
    assert float(found.return_stats.var) == pytest.approx(variance, rel=1e-5) and 0 < float(metrics["losses/clipfrac"]) < 1
    close(found.params, params, 2e-4)
    assert max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(start), strict=True)) > 0.05
