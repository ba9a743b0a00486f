"""PPD beyond the paper: ppd_beyond.py, and of ppd_gymnax.py the KL divergence ahead and clipped means.

What ppd_beyond.py shares with its siblings is held by test_shared_blocks.py and tested with theirs. Here are its own blocks: that
without its flags it learns what they learn, and what each flag does.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from conftest import ROOT, go_on, needs_procgen, rows, small, without_timing
from test_hostile_files import VALUES, replaced
from test_learning import made_up_teacher
from test_networks import made_up_rollout

import ppd_atari
import ppd_beyond
import ppd_gymnax
import ppd_mujoco
import ppd_procgen
import train_teacher

GOLDEN = dict(np.load(Path(__file__).parent / "data/reference_losses.npz"))
CASES = sorted({key.rsplit("/", 1)[0] for key in GOLDEN})


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# The same as its siblings, without its flags -----------------------------------------------------------------------------


def sibling(m, args):
    """The flags of a script of one suite that say the same."""
    flags = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(m.Args)}
    flags |= {"teacher": args.teacher[0], "distill_coef": args.distill_coef[0], "run_dir": f"{args.run_dir}_of_its_own"}
    return m.Args(**{name: value for name, value in flags.items() if value is not None})


FLAGS = {"distill_weight": "detached", "distill_coef_final": 0.5, "kl_direction": "reverse", "teacher_noise_std": 0.05}


@pytest.mark.parametrize(("m", "env_id", "flags"), [
    (ppd_mujoco, "Hopper-v4", {"distill_coef_final": 0.5}), (ppd_atari, "Pong-v5", FLAGS)])
def test_it_learns_what_the_script_of_the_suite_learns(m, env_id, flags, tmp_path, teachers):
    """With one teacher and none of its flags: rows, models and evaluation are the same to the bit."""
    flags = flags | ({"frame_skip": 20} if env_id == "Pong-v5" else {})
    args = small(ppd_beyond, env_id, tmp_path / "run", teacher=(str(teachers(env_id)),), **flags)
    ours, theirs, folders = ppd_beyond.main(args), m.main(sibling(m, args)), [tmp_path / "run", tmp_path / "run_of_its_own"]
    found = [without_timing(folder) for folder in folders]
    assert len(found[0]) == 3 and found[0] == found[1]
    models = [safetensors.numpy.load_file(folder / "student.safetensors") for folder in folders]
    assert models[0].keys() == models[1].keys() and same(*models)
    assert ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in ("student", "teacher"))


@pytest.mark.parametrize(("m", "env_id"), [
    *((ppd_mujoco, f"{task}-v4") for task in ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Swimmer")), (ppd_atari, "Pong-v5"),
    (ppd_atari, "Qbert-v5"), (ppd_procgen, "CoinrunEasy-v0")])
def test_its_defaults_are_those_of_the_script_of_the_suite(m, env_id):
    """Which test_defaults.py holds to the paper's."""
    ours, theirs = (vars(each.resolve(each.Args(env_id=env_id))) for each in (ppd_beyond, m))
    assert ours.pop("network", None) is None and ours["distill_coef"] == (theirs.pop("distill_coef"),) and theirs.pop("teacher") is None
    assert theirs.items() <= ours.items()
    added = {"distill_future_coef": 0.0, "distill_coef_decay": "none", "teacher_mean_clip": False}
    assert {name: ours[name] for name in ours.keys() - theirs.keys() - {"teacher", "distill_coef"} if ours[name] is not None} == added


def tables(case):
    """Of the reference's random batches: what learns, a row a sample, the teacher's outputs, and the samples but for the teacher."""
    d = {key.rsplit("/", 1)[1]: jnp.asarray(value) for key, value in GOLDEN.items() if key.rsplit("/", 1)[0] == case}
    log_std = {} if case.startswith("discrete") else {"log_std": d["student_log_std"]}
    teacher = d["teacher_out"] if not log_std else (d["teacher_out"], jnp.broadcast_to(d["teacher_log_std"], d["teacher_out"].shape))
    batch = (jnp.zeros(64), d["actions"], d["old_logprobs"], d["advantages"], d["returns"], jnp.ones(64))
    return {"out": d["student_out"], "values": d["values"]} | log_std, teacher, batch


def outputs(t):
    return (t["out"], jnp.broadcast_to(t["log_std"], t["out"].shape)) if "log_std" in t else t["out"]


@pytest.mark.parametrize("weight", ["ratio", "detached"])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_of_one_teacher_is_that_of_the_script_of_the_suite(case, weight):
    """Loss, terms and gradient; test_losses.py holds those to the reference's."""
    t, teacher, batch = tables(case)
    m, direction = ppd_atari if case.startswith("discrete") else ppd_mujoco, case.split("/")[1]

    def loss(t, m, teacher, lam):
        return m.ppd_loss(outputs(t), t["values"], m.Batch(*batch, teacher), lam, 0.2, 0.01, 0.5, direction, weight)

    (ours, terms), grads = jax.value_and_grad(loss, has_aux=True)(t, ppd_beyond, (teacher,), (2.0,))
    (theirs, expected), others = jax.value_and_grad(loss, has_aux=True)(t, m, teacher, 2.0)
    assert ours == theirs and terms.keys() == expected.keys() and same(terms, expected) and same(grads, others)


@pytest.mark.parametrize("case", [CASES[0], CASES[-1]])
def test_without_lambda_it_is_ppo(case):
    """In loss and gradient, with two teachers."""
    t, teacher, batch = tables(case)

    def ours(t):
        given = ppd_beyond.Batch(*batch, (teacher, teacher))
        return ppd_beyond.ppd_loss(outputs(t), t["values"], given, (0.0, 0.0), 0.2, 0.01, 0.5, "forward", "ratio")[0]

    def ppo(t):
        return train_teacher.ppo_loss(outputs(t), t["values"], train_teacher.Batch(*batch), 0.2, 0.01, 0.5)[0]

    (loss, grads), (expected, others) = jax.value_and_grad(ours)(t), jax.value_and_grad(ppo)(t)
    assert loss == expected and same(grads, others)


# The divergence ahead and clipped means ------------------------------------------------------------------------------------


ENV = {ppd_beyond: "Swimmer-v4", ppd_gymnax: "Pendulum-v1"}
BOUND = {ppd_beyond: 1.0, ppd_gymnax: 2.0}
GAMMA, LAMBDA, BETA = 0.5, 3.0, 0.25


def chain(m, monkeypatch, distill_coef=LAMBDA, **flags):
    """An update on a chain of three states, in two environments: metrics, and moments of the advantages.

    States are 1, 2, 3 and, after the end, 5. The first environment terminates there, the second is truncated. The teacher's
    mean is the state, the student's 0, all deviations are 1: KL = s²/2 for one action. Values are 0, and so are rewards.
    """
    dims = {ppd_beyond: 2, ppd_gymnax: 1}[m]  # Swimmer has two actions, of which the second is 0 for both
    ones = {"kernel": jnp.eye(1, dims), "bias": jnp.zeros(dims)}
    params = {"Dense_0": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}, "Dense_1": ones, "log_std": jnp.zeros(dims)}
    args = m.Args(env_id=ENV[m], num_envs=2, num_steps=3, num_minibatches=1, update_epochs=1, gamma=GAMMA, gae_lambda=1.0,
                  learning_rate=1e-4, seed=77, **flags)
    states = np.array([1.0, 2.0, 3.0, 5.0], np.float32)
    ends = np.zeros((2, 3, 2), np.float32)
    ends[0, 2, 0] = ends[1, 2, 1] = 1.0
    terminations, truncations = ends
    observations = np.repeat(states[:, None, None], 2, axis=1)
    actions, zeros = np.zeros((3, 2, dims), np.float32), np.zeros((3, 2), np.float32)
    stats, loss = m.Stats(jnp.zeros(1), jnp.ones(1), jnp.float32(1.0)), m.ppd_loss

    def ppd_loss(outputs, values, batch, *rest):
        total, terms = loss(outputs, values, batch, *rest)
        return total, terms | {"advantages": batch.advantages.mean(), "squares": (batch.advantages**2).mean()}

    monkeypatch.setattr(m, "standardize", lambda advantages, *weights: advantages)
    monkeypatch.setattr(m, "ppd_loss", ppd_loss)
    if m is ppd_beyond:
        args, network = dataclasses.replace(args, student_hidden=(1,), num_devices=1), m.Network("mlp", (), (1,))
        networks = m.Networks(m.Policy(network, dims), m.Value(network), (m.Policy(network, dims),))
        state = m.init_state(args, networks, (1,))
        rollout = m.Rollout(observations, actions, zeros, *(ends > 0), zeros > 0)
        state = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
        teacher = {"policy": {"params": params}, "obs_stats": stats}
        _, found = m.update(args, networks, (teacher,), state, rollout, (distill_coef,))
        found = {name.removeprefix("losses/"): float(x) for name, x in found.items()}
    else:
        networks = m.Networks(m.Policy(m.Network("mlp", (), (1,)), dims, True), m.Value(m.Network("mlp", (), (1,))), None, None)
        networks = networks._replace(teacher=networks.policy)
        values = {"params": {"Dense_0": params["Dense_0"], "Dense_1": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}}
        learned = {"policy": {"params": params}, "value": values} | ({"future": values} if args.distill_future_coef else {})
        learned = jax.tree.map(jnp.zeros_like, learned)
        state = m.TrainState(learned, m.make_optimizer(args).init(learned), stats,
                             m.Stats(jnp.float32(0), jnp.float32(1), jnp.float32(1e-4)), jnp.zeros(2), None, jax.random.PRNGKey(0), None, None, None)
        rollout = m.Rollout(*map(jnp.asarray, (observations[:3], actions, zeros, terminations, truncations, observations[1:], zeros)))
        teacher = {"policy": {"params": params}}
        _, found = m.learn_ppd(args, networks, teacher, state, rollout, jnp.float32(distill_coef))
        found = {name: float(x) for name, x in found.items()}
    return found


@pytest.mark.parametrize("m", [ppd_beyond, ppd_gymnax])
def test_the_divergence_ahead_on_a_chain(m, monkeypatch):
    """Rewards -βλ KL(next state), and 0 at a termination; with all values 0 the advantages are the returns, by hand."""
    scale = -BETA * LAMBDA
    terminated = [scale * (2.0 + GAMMA * 4.5), scale * 4.5, 0.0]
    truncated = [scale * (2.0 + GAMMA * (4.5 + GAMMA * 12.5)), scale * (4.5 + GAMMA * 12.5), scale * 12.5]
    returns = np.array(terminated + truncated)
    found = chain(m, monkeypatch, distill_future_coef=BETA)
    assert found["advantages"] == pytest.approx(returns.mean(), rel=1e-5)
    assert found["squares"] == pytest.approx((returns**2).mean(), rel=1e-5)
    means = returns / scale * (1.0 - GAMMA)
    assert found["future_loss"] == pytest.approx((means**2).mean(), rel=1e-5)  # its values are 0 as well
    assert found["teacher_kl"] == pytest.approx((0.5 + 2.0 + 4.5) / 3, rel=1e-5) and found["value_loss"] == 0.0
    without = chain(m, monkeypatch, 0.0, distill_future_coef=BETA)  # λ may rise again, so its values are learned there, too
    assert without["squares"] == 0.0 and without["future_loss"] == pytest.approx(found["future_loss"], rel=1e-5)


@pytest.mark.parametrize("m", [ppd_beyond, ppd_gymnax])
def test_without_the_divergence_ahead_nothing_of_it_is_left(m, monkeypatch):
    found = chain(m, monkeypatch)
    assert found["squares"] == 0.0 and "future_loss" not in found


@pytest.mark.parametrize("m", [ppd_beyond, ppd_gymnax])
def test_a_teachers_mean_is_clipped_to_the_bounds(m, monkeypatch):
    """In the KL divergence and in that ahead; the states lie beyond the bounds, 1 or 2."""
    clipped = np.minimum([1.0, 2.0, 3.0, 5.0], BOUND[m]) ** 2 / 2
    found = chain(m, monkeypatch, distill_future_coef=BETA, teacher_mean_clip=True)
    assert found["teacher_kl"] == pytest.approx(clipped[:3].mean(), rel=1e-5)
    ahead = -BETA * LAMBDA * np.array([clipped[1] + GAMMA * clipped[2], clipped[2], 0.0])
    rest = -BETA * LAMBDA * clipped[3] * np.array([GAMMA**2, GAMMA, 1.0])
    returns = np.concatenate([ahead, ahead + rest])
    assert found["advantages"] == pytest.approx(returns.mean(), rel=1e-5)


class Learner:
    """A small student of states or images, two teachers, and an update of it."""

    def __init__(self, images, num_teachers=1, **flags):
        m = self.m = ppd_beyond
        self.args = m.Args(env_id="Pong-v5" if images else "Hopper-v4", num_envs=4, num_steps=8, student_size="smaller",
                           student_hidden=(8,), **({"num_devices": 1, "num_minibatches": 2, "gamma": 0.99} | flags))
        network = m.Network("nature", (4, 4, 4), (8,)) if images else m.Network("mlp", (), (8,))
        policy, self.shape = m.Policy(network, 2), (2, 36, 36) if images else (5,)
        self.networks = m.Networks(policy, m.Value(network), (policy,) * num_teachers)
        x = jnp.zeros((1, *self.shape), jnp.uint8 if images else jnp.float32)
        stats = None if images else m.Stats(jnp.full(5, 0.1), jnp.full(5, 2.0), jnp.float32(9.0))
        self.teachers = [{"policy": jax.tree.map(lambda x: 3.0 * x, policy.init(jax.random.PRNGKey(9 + k), x)), "obs_stats": stats}
                         for k in range(num_teachers)]

    def learn(self, rollout, *distill_coef):
        """The state and the metrics after one update of the first state."""
        state = jax.device_put(self.m.init_state(self.args, self.networks, self.shape), self.m.replicated(self.args.num_devices))
        return self.m.update(self.args, self.networks, tuple(self.teachers), state, rollout, distill_coef or (1.0,))


def test_the_loss_in_the_log_has_all_terms():
    """The values ahead count as the others do, whatever β and λ are."""
    _, metrics = Learner(False, distill_future_coef=0.25, vf_coef=0.25, ent_coef=0.125).learn(made_up_rollout(ppd_beyond, False), 2.0)
    found = {name.removeprefix("losses/"): float(value) for name, value in metrics.items()}
    expected = found["policy_loss"] - 0.125 * found["entropy"] + 2.0 * found["distill_loss"] + 0.25 * (found["value_loss"] + found["future_loss"])
    assert found["loss"] == pytest.approx(expected, rel=1e-5) and found["future_loss"] > 1e-3


def test_nothing_is_ahead_where_lambda_is_0():
    """PPO learns policy and values alike with --distill-future-coef and without."""
    rollout = made_up_rollout(ppd_beyond, False)
    (without, _), (ahead, _) = (Learner(False, distill_future_coef=beta).learn(rollout, 0.0) for beta in (0.0, 1.0))
    for name in ("policy", "value"):
        jax.tree.map(lambda x, y: close(x, y, 1e-6), without.params[name], ahead.params[name])


def test_at_lambda_0_the_values_ahead_are_of_the_same_mean():
    """Of teachers of different λ, which fall to 0 alike."""
    learner = Learner(False, 2, distill_future_coef=1.0, distill_coef=(1.0, 0.2))
    learner.teachers[1]["policy"] = jax.tree.map(lambda x: 10.0 * x, learner.teachers[1]["policy"])
    rollout = made_up_rollout(ppd_beyond, False)
    little, none = (float(learner.learn(rollout, *coefs)[1]["losses/future_loss"]) for coefs in ((1e-6, 2e-7), (0.0, 0.0)))
    assert little > 1e-3 and none == pytest.approx(little, rel=1e-4)


@pytest.mark.parametrize("m", [ppd_beyond, ppd_gymnax])
def test_the_gradient_of_the_values_ahead_is_clipped_apart(m):
    """However large it is, policy and value take the steps that they take without it."""
    own = {"policy": jnp.array([3.0, -1.0]), "value": jnp.array([0.5])}
    steps = {}
    for beta, grads in ((0.0, own), (1.0, own | {"future": jnp.array([1e6, -1e5])})):
        optimizer = m.make_optimizer(m.Args(learning_rate=0.1, distill_future_coef=beta))
        steps[beta], _ = optimizer.update(grads, optimizer.init(grads), grads)
    assert same({name: steps[1.0][name] for name in own}, steps[0.0])
    norm = np.hypot(1e6, 1e5) / m.Args().max_grad_norm
    found = np.array([1e6, -1e5]) / norm
    assert steps[1.0]["future"] == pytest.approx(-0.1 * found / (np.abs(found) + 1e-5), rel=1e-5)


@pytest.mark.parametrize("images", [False, True])
def test_an_update_sees_no_phantom_in_the_divergence_ahead(images):
    """Nor the final observation of a terminated episode; that of a truncated one it does see."""
    rollout, learner = made_up_rollout(ppd_beyond, images), Learner(images, distill_future_coef=0.5)
    actions, terminated, truncated = rollout.actions.copy(), rollout.observations.copy(), rollout.observations.copy()
    actions[rollout.phantoms] = 1 - actions[rollout.phantoms] if images else 7.0
    terminated[3, 1], truncated[6, 2] = 3.0, 3.0
    before = learner.learn(rollout)
    assert set(before[0].params) == {"policy", "value", "future"} and before[1]["losses/future_loss"] > 0
    assert same(before, learner.learn(rollout._replace(actions=actions, observations=terminated)))
    state, _ = learner.learn(rollout._replace(observations=truncated))
    assert not same(before[0].params["future"], state.params["future"])


@pytest.mark.parametrize("images", [False, True])
def test_two_devices_learn_what_one_learns(images):
    """From two teachers and the divergence ahead, up to the order of sums."""
    rollout = made_up_rollout(ppd_beyond, images)
    (one, metrics), (two, others) = (
        Learner(images, 2, distill_future_coef=0.5, num_devices=n).learn(rollout, 1.0, 0.5) for n in (1, 2))
    for x, y in zip(jax.tree.leaves((one.params, metrics)), jax.tree.leaves((two.params, others)), strict=True):
        close(x, y, 1e-4)


# Several teachers --------------------------------------------------------------------------------------------------------


def test_several_discrete_teachers_are_their_mixture():
    """Σ λ_k KL_k and Λ KL(mixture || π), Λ = Σ λ_k, differ by what the student cannot change: the gradients are the same."""
    m, (t, first, batch) = ppd_beyond, tables("discrete/forward/lambda1")
    rng, lams = np.random.default_rng(0), (1.0, 0.5, 0.2)
    teachers = [jnp.asarray(rng.normal(size=first.shape), jnp.float32) * 2 for _ in lams]
    mixture = jnp.log(sum(lam / sum(lams) * jax.nn.softmax(x) for lam, x in zip(lams, teachers, strict=True)))

    def loss(t, teachers, lams):
        given = m.Batch(*batch, tuple(teachers))._replace(log_probs=m.distribution(outputs(t)).log_prob(batch[1]))
        return m.ppd_loss(outputs(t), t["values"], jax.lax.stop_gradient(given), lams, 0.2, 0.0, 0.5, "forward", "detached")[0]

    several, one = jax.grad(loss)(t, teachers, lams), jax.grad(loss)(t, [mixture], (sum(lams),))
    close(several["out"], one["out"], 1e-6)
    assert float(jnp.abs(several["out"] - jax.grad(loss)(t, teachers[:1], (1.0,))["out"]).max()) > 1e-3


@pytest.mark.parametrize("case", ["gaussian/forward/lambda2", "discrete/reverse/lambda2"])
def test_the_terms_of_several_teachers_are_those_of_each(case):
    """Their losses add up with their weights, and each divergence is told apart."""
    t, first, batch = tables(case)
    second, direction = jax.tree.map(lambda x: 0.5 * x, first), case.split("/")[1]

    def loss(teachers, lams):
        given = ppd_beyond.Batch(*batch, teachers)
        return ppd_beyond.ppd_loss(outputs(t), t["values"], given, lams, 0.2, 0.0, 0.0, direction, "ratio")

    (both, terms), (a, alone), (b, other), (none, _) = (
        loss(*x) for x in (((first, second), (2.0, 0.5)), ((first,), (2.0,)), ((second,), (0.5,)), ((first,), (0.0,))))
    close(both - none, (a - none) + (b - none))
    for name in ("teacher_kl", "distill_loss"):
        close([terms[name], terms[f"{name}_2"]], [alone[name], other[name]])
    assert alone["teacher_kl"] != other["teacher_kl"]


def losses(folder):
    return [{name: x for name, x in row.items() if name.startswith(("losses", "charts/d"))} for row in rows(folder)]


def test_a_prior_of_skills_and_a_teacher(tmp_path, capsys, monkeypatch):
    """HalfCheetah's observations and actions are of Walker2d's shape: its teacher teaches there, beside one of Walker2d."""
    own, prior, m = made_up_teacher("Walker2d-v4", tmp_path / "own"), ROOT / "teachers/HalfCheetah-v4__100.safetensors", ppd_beyond
    args = small(m, "Walker2d-v4", tmp_path / "run", teacher=(str(own), str(prior)), distill_coef=(1.0, 0.25), distill_coef_final=0.0,
                 distill_future_coef=0.1)
    act, seen = m.act_on_states, []
    monkeypatch.setattr(m, "act_on_states", lambda *args: seen.append(np.array(args[3].mean)) or act(*args))
    numbers = m.main(args)
    assert all(np.array_equal(mean, m.read_file(own)[1]["obs_stats/mean"]) for mean in seen) and seen  # it acts by the first's statistics
    assert f"{prior} is a teacher of HalfCheetah-v4, a prior of skills for Walker2d-v4" in capsys.readouterr().err
    assert set(numbers) >= {"student", "teacher", "teacher_2"} and numbers["teacher"] != numbers["teacher_2"]
    found = losses(tmp_path / "run")
    assert [(float(row["charts/distill_coef"]), float(row["charts/distill_coef_2"])) for row in found] == [(1, 0.25), (0.5, 0.125), (0, 0)]
    assert all(float(row["losses/teacher_kl_2"]) != float(row["losses/teacher_kl"]) > 0 for row in found)

    results = json.loads((tmp_path / "run/results.json").read_text())
    for path in (own, tmp_path / "run/results.json"):
        path.unlink()
    go_on(m, tmp_path / "run")  # both teachers are in the checkpoint
    again = json.loads((tmp_path / "run/results.json").read_text())
    assert again["teacher_2"] == results["teacher_2"] and again["student"] == results["student"]
    go_on(m, tmp_path / "run", "--total-timesteps", 5 * args.batch_size)
    assert [int(row["global_step"]) for row in rows(tmp_path / "run")] == [args.batch_size * k for k in range(1, 6)]
    for flags in (("--distill-coef", "1", "0.5"), ("--teacher", str(prior))):
        with pytest.raises(SystemExit):
            go_on(m, tmp_path / "run", *flags)
        assert "contradicts" in capsys.readouterr().err


def test_each_teacher_sees_its_own_statistics():
    """The same network with two statistics is two teachers: the divergence of the second is that of its own."""
    m, learner, rollout = ppd_beyond, Learner(False, 2, learning_rate=1e-6), made_up_rollout(ppd_beyond, False)
    stats = learner.teachers[0]["obs_stats"]
    learner.teachers[1] = learner.teachers[0] | {"obs_stats": stats._replace(mean=jnp.full(5, 1.0))}
    state, both = learner.learn(rollout, 0.0, 0.0)
    seen = [(state.params["policy"], stats), (learner.teachers[1]["policy"], learner.teachers[1]["obs_stats"])]
    student, teacher = (m.distribution(learner.networks.policy.apply(params, m.normalize(rollout.observations[:-1], stats))) for params, stats in seen)
    kl = np.asarray(teacher.kl_divergence(student))[~rollout.phantoms].mean()
    assert float(both["losses/teacher_kl_2"]) == pytest.approx(kl, rel=1e-2)  # the student has hardly moved
    assert abs(float(both["losses/teacher_kl"]) - kl) > 0.2 * kl


@needs_procgen
def test_two_corrupted_copies_of_a_teacher_of_images(tmp_path):
    """One file twice, with the noise of two seeds; Procgen's games share observations and actions."""
    teacher = made_up_teacher("CoinrunEasy-v0", tmp_path / "coinrun")
    args = small(ppd_beyond, "JumperEasy-v0", tmp_path / "run", teacher=(str(teacher),) * 2, teacher_noise_std=0.05, distill_future_coef=0.1)
    numbers = ppd_beyond.main(args)
    assert set(numbers) >= {"teacher", "teacher_2", "corrupted_teacher", "corrupted_teacher_2"} and numbers["teacher"] == numbers["teacher_2"]
    assert all(row["losses/teacher_kl"] != row["losses/teacher_kl_2"] for row in losses(tmp_path / "run"))
    assert "train_levels" in json.loads((tmp_path / "run/results.json").read_text())["student"]


def refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        ppd_beyond.load_teachers(ppd_beyond.Args(**flags))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_teachers_that_play_another_way_are_refused(tmp_path, capsys):
    """Unless a flag says how the student and all of them play; contact forces change nothing but Humanoid."""
    paths = [str(made_up_teacher("Pong-v5", tmp_path / f"skip{skip}", {"frame_skip": skip, "repeat_action_probability": 0.0})) for skip in (4, 2)]
    assert f"error: {paths[1]} plays with {{'frame_skip': 2," in refused({"teacher": tuple(paths)}, capsys)
    teachers = ppd_beyond.load_teachers(ppd_beyond.Args(teacher=tuple(paths), frame_skip=3))
    assert [each.about["variant"]["frame_skip"] for each in teachers] == [3, 3]
    for env_id in ("Humanoid-v4", "Swimmer-v4"):
        paths = tuple(str(made_up_teacher(env_id, tmp_path / f"{env_id}{on}", {"contact_forces": on})) for on in (True, False))
        if env_id == "Humanoid-v4":
            assert f"{paths[1]} plays with {{'contact_forces': False}}" in refused({"teacher": paths}, capsys)
        else:
            assert len(ppd_beyond.load_teachers(ppd_beyond.Args(teacher=paths))) == 2


# λ over a run -----------------------------------------------------------------------------------------------------------


def test_distill_coef_goes_linearly_to_its_end():
    m = ppd_beyond
    args = m.Args(distill_coef=(2.0, 0.0), distill_coef_final=1.0)
    assert [m.distill_coef_at(args, x, 0.9, (1.0, 1.0)) for x in (0.0, 0.5, 1.0)] == [(2.0, 0.0), (1.5, 0.5), (1.0, 1.0)]
    assert m.distill_coef_at(m.Args(distill_coef=(2.0,)), 0.7, 0.9, (1.0, 1.0)) == (2.0, 2.0)  # one for both


def test_distill_coef_falls_with_the_return():
    """From λ, for returns of 0 and below, to 0, for the teacher's and above; before the first episode's end it is λ."""
    m, args = ppd_beyond, ppd_beyond.Args(distill_coef=(2.0,), distill_coef_decay="return")
    assert [m.distill_coef_at(args, 0.3, x, (10.0,)) for x in (np.nan, -1.0, 0.0, 2.5, 10.0, 15.0)] == [
        (2.0,), (2.0,), (2.0,), (1.5,), (0.0,), (0.0,)]
    assert m.distill_coef_at(dataclasses.replace(args, distill_coef=(2.0, 1.0)), 0.3, 5.0, (10.0, 20.0)) == (1.0, 0.75)


@pytest.mark.parametrize("env_id", ["Hopper-v4", pytest.param("CoinrunEasy-v0", marks=needs_procgen)])
def test_a_run_whose_distill_coef_falls(env_id, tmp_path, monkeypatch):
    """λ follows the returns of the finished games and the teacher's own, on the levels of training; the rows say so."""
    m = ppd_beyond
    given, evaluation = [], m.load_teachers(m.Args(env_id=env_id, distill_coef_decay="return"))[0].about["evaluation"]
    goal, start = evaluation["train_levels"]["mean"] if env_id == "CoinrunEasy-v0" else evaluation["mean"], m.start

    def begin(envs):
        cursor = start(envs)
        cursor.finished.append(0.25 * goal)
        return cursor

    def update(args, networks, taught, state, rollout, distill_coefs):
        given.append(distill_coefs)
        return state, {"losses/teacher_kl": 1.0}

    monkeypatch.setattr(m, "start", begin)
    monkeypatch.setattr(m, "update", update)
    monkeypatch.setattr(m, "assess", lambda *args: {"mean": 1.0, "std": 0.0, "games": 1, "returns": [1.0]})
    m.main(small(m, env_id, tmp_path / "run", distill_coef=(2.0,), distill_coef_decay="return", total_timesteps=1, student_hidden=(8,)))
    row, = rows(tmp_path / "run")
    reached = float(row["charts/episodic_return"]) / goal
    assert 0 < reached < 1 and float(row["charts/distill_coef"]) == pytest.approx(2.0 * (1.0 - reached))
    assert given == [(pytest.approx(2.0 * (1.0 - reached)),)]


# Bad input --------------------------------------------------------------------------------------------------------------

# {t} is a teacher of Hopper, {a} one of Pong, {x} a folder with copies of {t} that are spoiled
BAD = [
    ("--env-id Hoper-v4", "unknown task Hoper-v4; did you mean Hopper-v"),
    ("--env-id Walker2d-v4", "train a teacher by `python train_teacher.py --env-id Walker2d-v4`"),
    ("--teacher {t} {x}/missing", "cannot read {x}/missing: "),
    ("--teacher {x}/nameless", "{x}/nameless is no teacher: KeyError 'env_id'"),
    ("--teacher {t} {x}/infinite", "{x}/infinite is no teacher: ValueError its policy/params/Dense_0/bias is not finite"),
    ("--teacher {t} {x}/lacking", "{x}/lacking is no teacher: ValueError its obs_stats/mean is not finite and of the shape (11,)"),
    ("--teacher {x}/convolved", "{x}/convolved is no teacher: ValueError its network, nature with 3 convolutions, is none of Hopper-v4"),
    ("--teacher {x}/forceless", "is no teacher: ValueError its task was played with {{'contact_forces': 1}}"),
    ("--teacher {t} {a}", "{a} is for observations and actions of ([4, 84, 84], 6); those of Hopper-v4 are ([11], 3)"),
    ("--teacher {t} --env-id Ant-v4", "is for observations and actions of ([11], 3); those of Ant-v4 are ([27], 8)"),
    ("--teacher {a} --env-id BeamRider-v5", "is for observations and actions of ([4, 84, 84], 6); those of BeamRider-v5 are"),
    ("--teacher {t} --distill-coef 1 2", "--distill-coef takes 1 number\n"),
    ("--teacher {t} {t} --distill-coef 1 2 3", "--distill-coef takes 1 number or 2, as many as teachers"),
    ("--teacher {t} {t} --distill-coef 1 -1", "--distill-coef must lie between 0 and 1000000, not (1.0, -1.0)"),
    ("--teacher {t} --distill-coef-final -1", "--distill-coef-final must lie between 0 and"),
    ("--teacher {t} --distill-future-coef -1", "--distill-future-coef must lie between 0 and"),
    ("--teacher {t} --distill-coef-final 0 --distill-coef-decay return", "--distill-coef-final and --distill-coef-decay exclude each other"),
    ("--teacher {t} {x}/losing --distill-coef-decay return", "needs a teacher of positive return; that of {x}/losing is -3.0"),
    ("--teacher {a} --env-id Qbert-v5 --distill-coef-decay return", "needs teachers of Qbert-v5; {a} is of Pong-v5"),
    ("--teacher {a} --frame-skip 7 --distill-coef-decay return", "needs the task as {a} was evaluated on it: {{'frame_skip': "),
    ("--teacher {t} --frame-skip 4", "--frame-skip is not for Hopper-v4"),
    ("--teacher {a} --teacher-mean-clip", "--teacher-mean-clip is for continuous actions; those of Pong-v5 are not"),
    ("--teacher {a} --frame-skip 0", "--frame-skip must lie between 1 and"),
    ("--teacher {t} --student-channels 8 8 8", "--student-channels is for networks of images; Hopper-v4 has states"),
    ("--teacher {t} --num-minibatches 5", "--num-minibatches 5 does not divide a rollout of 18 environments x 64"),
    ("--teacher {t} --student-hidden 0", "--student-hidden must lie between 1 and 65536"),
    ("--teacher {t} --run-dir {x}", "exists; name another folder"),
    ("--teacher {t} --device gpu", "--device gpu: JAX finds no GPU"),
    ("--resume {x}", "{x} holds no checkpoint to go on from"),
]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    """A folder with two teachers, and with files that are almost a teacher."""
    folder = tmp_path_factory.mktemp("spoiled")
    made_up_teacher("Pong-v5", folder / "pong")
    about, arrays = ppd_beyond.read_file(made_up_teacher("Hopper-v4", folder / "hopper"))
    for name, changes, changed in (
            ("losing", {"evaluation": {"mean": -3.0}}, arrays), ("forceless", {"variant": {"contact_forces": 1}}, arrays),
            ("convolved", {"network": about["network"] | {"kind": "nature", "channels": [4, 4, 4]}}, arrays),
            ("infinite", {}, {name: np.full_like(x, np.inf) for name, x in arrays.items()}),
            ("lacking", {}, {name: x for name, x in arrays.items() if not name.startswith("obs_stats")})):
        ppd_beyond.save_file(folder / name, about | changes, changed)
    ppd_beyond.save_file(folder / "nameless", {name: x for name, x in about.items() if name != "env_id"}, arrays)
    return folder


@pytest.mark.parametrize(("flags", "message"), BAD)
def test_bad_input(flags, message, spoiled, tmp_path, monkeypatch, capsys):
    """One line, exit code 2, nothing written."""
    names, before = {"t": spoiled / "hopper", "a": spoiled / "pong", "x": spoiled}, sorted(spoiled.rglob("*"))
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        ppd_beyond.main(ppd_beyond.parse_args(flags.format(**names).split()))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n") and message.format(**names) in error
    assert list(tmp_path.iterdir()) == [] and sorted(spoiled.rglob("*")) == before


@pytest.mark.parametrize("value", [3.0, [], [1.0, 2.0], "1", [1.0, "x"]])
def test_a_checkpoint_of_another_lambda(value, spoiled, tmp_path, capsys):
    """Whose checksum is right: one line as well."""
    m, args = ppd_beyond, ppd_beyond.Args(env_id="Hopper-v4", teacher=(str(spoiled / "hopper"),))
    about, arrays = m.read_file(spoiled / "hopper")
    m.save_file(tmp_path / "checkpoint_000000000000.safetensors", {
        "script": "ppd_beyond", "args": vars(args) | {"distill_coef": value}, "updates": 0, "logged": m.BEGIN, "finished": [], "teacher": [about],
        "command": ""}, {f"teacher/0/{name}": x for name, x in arrays.items()})
    with pytest.raises(SystemExit) as stopped:
        go_on(m, tmp_path)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "distill-coef" in error.replace("_", "-") and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("prefix", ["", "teacher/1/"])
def test_a_teacher_that_is_not_what_it_says(prefix, spoiled, tmp_path, capsys):
    """Each part of a file, or of the second teacher in a checkpoint, gives way in turn: a whole teacher or one line."""
    m, path = ppd_beyond, str(spoiled / "hopper")
    about, arrays = m.read_file(path)
    own = {prefix + name: x for name, x in arrays.items() if not name.startswith("value")}
    args = m.Args(teacher=(path, path) if prefix else (path,), distill_coef_decay="return", resume="run" if prefix else None)

    def load(about, own):
        if not prefix:
            m.save_file(tmp_path / "file", about if isinstance(about, dict) else {"about": about}, own)
            return m.load_teachers(dataclasses.replace(args, teacher=(str(tmp_path / "file"),)))
        first = {f"teacher/0/{name}": x for name, x in arrays.items()}
        return m.load_teachers(args, {"teacher": [m.read_file(path)[0], about]}, first | own)

    assert len(load(about, own)) == 1 + bool(prefix)
    needed = [("action_dim",), ("observation_shape",), ("network",), ("network", "kind"), ("network", "hidden"), ("variant",), ("evaluation", "mean")]
    cases = [(replaced(about, where, VALUES[name]), own, where) for where in needed for name in ("deleted", "text", "mixed", "long list", "dict")]
    cases += [(about, own | {name: x}, name) for name in own for x in (own[name][:0] if own[name].ndim else own[name][None], own[name] * np.nan)]
    for changed, given, what in cases:
        with pytest.raises(SystemExit) as stopped:
            load(changed, given)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, what
