"""What goes beyond the paper: the KL divergence ahead as a reward, clipped means, several teachers and those of other tasks."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, go_on, needs_procgen, rows, small
from test_learning import made_up_teacher
from test_networks import Learner, made_up_rollout

import ppd_atari
import ppd_gymnax
import ppd_mujoco
import ppd_procgen

ENV = {ppd_mujoco: "Swimmer-v4", ppd_gymnax: "Pendulum-v1"}
BOUND = {ppd_mujoco: 1.0, ppd_gymnax: 2.0}
GAMMA, LAMBDA, BETA = 0.5, 3.0, 0.25


def chain(m, monkeypatch, **flags):
    """An update on a chain of three states, in two environments: metrics, and moments of the advantages.

    States are 1, 2, 3 and, after the end, 5. The first environment terminates there, the second is truncated. The teacher's
    mean is the state, the student's 0, all deviations are 1: KL = s²/2 for one action. Values are 0, and so are rewards.
    """
    dims = {ppd_mujoco: 2, ppd_gymnax: 1}[m]  # Swimmer has two actions, of which the second is 0 for both
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
    if m is ppd_mujoco:
        args = dataclasses.replace(args, student_hidden=(1,), num_devices=1)
        networks = m.Networks(m.Policy((1,), dims), m.Value((1,)), (m.Policy((1,), dims),))
        state = m.init_state(args, networks, 1)
        rollout = m.Rollout(observations, actions, zeros, *(ends > 0), zeros > 0)
        state = state._replace(params=jax.tree.map(jnp.zeros_like, state.params))
        _, found = m.update(args, networks, (m.Frozen({"params": params}, stats),), state, rollout, (LAMBDA,))
        found = {name.removeprefix("losses/"): float(x) for name, x in found.items()}
    else:
        networks = m.Networks(m.Policy(m.Network("mlp", (), (1,)), dims, True), m.Value(m.Network("mlp", (), (1,))), None, None)
        networks = networks._replace(teacher=networks.policy)
        values = {"params": {"Dense_0": params["Dense_0"], "Dense_1": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros(1)}}}
        learned = {"policy": {"params": params}, "value": values} | ({"future": values} if args.distill_future_coef else {})
        learned = jax.tree.map(jnp.zeros_like, learned)
        state = m.TrainState(learned, m.make_optimizer(args).init(learned), stats,
                             m.Stats(jnp.float32(0), jnp.float32(1), jnp.float32(1e-4)), jnp.zeros(2), None, jax.random.PRNGKey(0), None, None)
        rollout = m.Rollout(*map(jnp.asarray, (observations[:3], actions, zeros, terminations, truncations, observations[1:], zeros)))
        teacher = {"policy": {"params": params}}
        _, found = m.learn_ppd(args, networks, teacher, state, rollout, jnp.float32(LAMBDA))
        found = {name: float(x) for name, x in found.items()}
    return found


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax])
def test_the_divergence_ahead_on_a_chain(m, monkeypatch):
    """Rewards -βλ KL(next state), and 0 at a termination; with all values 0 the advantages are the returns, by hand."""
    scale = -BETA * LAMBDA
    terminated = [scale * (2.0 + GAMMA * 4.5), scale * 4.5, 0.0]
    truncated = [scale * (2.0 + GAMMA * (4.5 + GAMMA * 12.5)), scale * (4.5 + GAMMA * 12.5), scale * 12.5]
    returns = np.array(terminated + truncated)
    found = chain(m, monkeypatch, distill_future_coef=BETA)
    assert found["advantages"] == pytest.approx(returns.mean(), rel=1e-5)
    assert found["squares"] == pytest.approx((returns**2).mean(), rel=1e-5)
    assert found["future_loss"] == pytest.approx((returns**2).mean(), rel=1e-5)  # its values are 0 as well
    assert found["teacher_kl"] == pytest.approx((0.5 + 2.0 + 4.5) / 3, rel=1e-5) and found["value_loss"] == 0.0


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax])
def test_without_the_divergence_ahead_nothing_of_it_is_left(m, monkeypatch):
    found = chain(m, monkeypatch)
    assert found["squares"] == 0.0 and "future_loss" not in found


@pytest.mark.parametrize("m", [ppd_mujoco, ppd_gymnax])
def test_a_teachers_mean_is_clipped_to_the_bounds(m, monkeypatch):
    """In the KL divergence and in that ahead; the states lie beyond the bounds, 1 or 2."""
    clipped = np.minimum([1.0, 2.0, 3.0, 5.0], BOUND[m]) ** 2 / 2
    found = chain(m, monkeypatch, distill_future_coef=BETA, teacher_mean_clip=True)
    assert found["teacher_kl"] == pytest.approx(clipped[:3].mean(), rel=1e-5)
    ahead = -BETA * LAMBDA * np.array([clipped[1] + GAMMA * clipped[2], clipped[2], 0.0])
    rest = -BETA * LAMBDA * clipped[3] * np.array([GAMMA**2, GAMMA, 1.0])
    returns = np.concatenate([ahead, ahead + rest])
    assert found["advantages"] == pytest.approx(returns.mean(), rel=1e-5)


def test_the_divergence_ahead_of_images():
    """The same block for images: it has values of its own, and changes what the policy learns."""
    plain, ahead = (Learner(ppd_atari, True, distill_future_coef=x, vf_coef=0.0) for x in (0.0, 0.5))
    rollout = made_up_rollout(ppd_atari, True)
    (state, metrics), (other, expected) = ahead.learn(rollout), plain.learn(rollout)
    assert metrics["losses/future_loss"] > 0 and set(metrics) - set(expected) == {"losses/future_loss"}
    assert set(state.params) == {"policy", "value", "future"} and set(other.params) == {"policy", "value"}
    differences = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.params["policy"], other.params["policy"])
    assert max(jax.tree.leaves(differences)) > 1e-5


def losses(folder):
    return [{name: x for name, x in row.items() if name.startswith(("losses", "charts/d"))} for row in rows(folder)]


def test_a_prior_of_skills_and_a_teacher(tmp_path, capsys):
    """HalfCheetah's observations and actions are of Walker2d's shape: its teacher teaches there, beside one of Walker2d."""
    own, prior = made_up_teacher("Walker2d-v4", tmp_path / "own"), ROOT / "teachers/HalfCheetah-v4__100.safetensors"
    args = small(ppd_mujoco, "Walker2d-v4", tmp_path / "run", teacher=(str(own), str(prior)), distill_coef=(1.0, 0.25), distill_coef_final=0.0)
    numbers = ppd_mujoco.main(args)
    assert f"{prior} is a teacher of HalfCheetah-v4, a prior of skills for Walker2d-v4" in capsys.readouterr().err
    assert set(numbers) >= {"student", "teacher", "teacher_2"} and numbers["teacher"] != numbers["teacher_2"]
    found = losses(tmp_path / "run")
    assert [(float(row["charts/distill_coef"]), float(row["charts/distill_coef_2"])) for row in found] == [(1, 0.25), (0.5, 0.125), (0, 0)]
    assert all(float(row["losses/teacher_kl_2"]) != float(row["losses/teacher_kl"]) > 0 for row in found)

    results = (tmp_path / "run/results.json").read_text()
    for path in (own, tmp_path / "run/results.json"):
        path.unlink()
    go_on(ppd_mujoco, tmp_path / "run")  # both teachers are in the checkpoint
    assert json.loads((tmp_path / "run/results.json").read_text())["teacher_2"] == json.loads(results)["teacher_2"]


def test_each_teacher_sees_its_own_statistics():
    """The same network with two statistics is two teachers: the divergence of the second is that of its own."""
    learner, rollout = Learner(ppd_mujoco, False, learning_rate=1e-6), made_up_rollout(ppd_mujoco, False)
    learner.teacher = learner.teacher._replace(params=jax.tree.map(lambda x: 3.0 * x, learner.teacher.params))
    other = learner.teacher._replace(obs_stats=learner.teacher.obs_stats._replace(mean=jnp.full(5, 1.0)))
    networks = learner.networks._replace(teachers=learner.networks.teachers * 2)
    _, both = ppd_mujoco.update(learner.args, networks, (learner.teacher, other), learner.start(), rollout, (0.0, 0.0))
    state = learner.start()
    outputs = [networks.policy.apply(p, ppd_mujoco.normalize(rollout.observations[:-1], stats)) for p, stats in (
        (state.params["policy"], learner.teacher.obs_stats), (other.params, other.obs_stats))]
    student, teacher = map(ppd_mujoco.distribution, outputs)
    kl = np.asarray(teacher.kl_divergence(student))[~rollout.phantoms].mean()
    assert float(both["losses/teacher_kl_2"]) == pytest.approx(kl, rel=1e-2)  # the student has hardly moved
    assert abs(float(both["losses/teacher_kl"]) - kl) > 0.2 * kl


@needs_procgen
def test_two_corrupted_copies_of_a_teacher_of_images(tmp_path):
    """One file twice, with the noise of two seeds; Procgen's games share observations and actions."""
    teacher = made_up_teacher("CoinrunEasy-v0", tmp_path / "coinrun")
    args = small(ppd_procgen, "JumperEasy-v0", tmp_path / "run", teacher=(str(teacher),) * 2, teacher_noise_std=0.05, distill_future_coef=0.1)
    numbers = ppd_procgen.main(args)
    assert set(numbers) >= {"teacher", "teacher_2", "corrupted_teacher", "corrupted_teacher_2"} and numbers["teacher"] == numbers["teacher_2"]
    assert all(row["losses/teacher_kl"] != row["losses/teacher_kl_2"] for row in losses(tmp_path / "run"))


def test_teachers_that_play_another_way_are_refused(tmp_path, capsys):
    """Unless a flag says how the student and all of them play."""
    paths = [made_up_teacher("Pong-v5", tmp_path / f"skip{skip}", {"frame_skip": skip, "repeat_action_probability": 0.0}) for skip in (4, 2)]
    args = ppd_atari.Args(teacher=tuple(map(str, paths)))
    with pytest.raises(SystemExit) as ended:
        ppd_atari.load_teachers(args)
    assert ended.value.code == 2 and f"error: {paths[1]} plays with {{'frame_skip': 2," in capsys.readouterr().err
    teachers = ppd_atari.load_teachers(dataclasses.replace(args, frame_skip=3))
    assert [each.about["variant"]["frame_skip"] for each in teachers] == [3, 3]
