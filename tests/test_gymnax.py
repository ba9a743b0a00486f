"""ppd_gymnax.py: same-step resets, seeds side by side, the three methods, files, and what it learns."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, first_call, go_on, rows, without_timing

import evaluate
import ppd_gymnax as m
import ppd_mujoco

STATES = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "MountainCarContinuous-v0", "Reacher-misc"]
GRIDS = [f"{name}-MinAtar" for name in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")]


def small(folder, **flags):
    """Flags of a run with a few updates of small networks."""
    defaults = {"env_id": "CartPole-v1", "num_seeds": 2, "num_envs": 4, "num_steps": 16, "num_minibatches": 2, "teacher_num_steps": 16,
                "teacher_timesteps": 3 * 64, "total_timesteps": 3 * 64, "student_hidden": (8,), "eval_episodes": 2}
    return m.Args(run_dir=str(folder), **(defaults | flags))


def copy(tree):
    return jax.tree.map(jnp.copy, tree)


def numbers(rows):
    names = [name for name in m.COLUMNS if name.startswith(("losses", "charts/ep"))]
    return np.array([[float(row[name] or "nan") for name in names] for row in rows])


# What follows an episode's end -----------------------------------------------------------------------------------------


def test_gae_by_hand():
    """Step 0 goes on, 1 terminates, 2 is truncated, 3 is both, 4 goes on to the rollout's end."""
    rewards = jnp.array([[1.0], [2.0], [3.0], [4.0], [5.0]])
    values = jnp.array([[10.0], [20.0], [30.0], [40.0], [50.0]])
    next_values = jnp.array([[20.0], [99.0], [8.0], [77.0], [6.0]])
    terminations = jnp.array([[0.0], [1.0], [0.0], [1.0], [0.0]])
    truncations = jnp.array([[0.0], [0.0], [1.0], [1.0], [0.0]])
    advantages, returns = m.compute_gae(rewards, values, next_values, terminations, truncations, 0.5, 0.5)
    # 4: 5 + 0.5*6 - 50 = -42; 3: 4 - 40 = -36, terminated; 2: 3 + 0.5*8 - 30 = -23, bootstraps; 1: 2 - 20 = -18
    # 0: (1 + 0.5*20 - 10) + 0.25 * -18 = -3.5; the trace crosses no end
    np.testing.assert_allclose(advantages[:, 0], [-3.5, -18.0, -23.0, -36.0, -42.0])
    np.testing.assert_allclose(returns[:, 0], [6.5, 2.0, 7.0, 4.0, 8.0])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_an_episode_ends_with_its_true_final_observation(env_id):
    """Replayed with gymnax's own step_env, which does not reset: CartPole terminates, Pendulum is truncated after 200."""
    env, params = gymnax.make(env_id)
    steps, key = 210, jax.random.PRNGKey(3)
    world = m.reset(env_id, 1, key)
    state = jax.tree.map(lambda x: x[0], world.states)
    actions = jnp.ones((1,)) if env_id == "Pendulum-v1" else jnp.ones(1, jnp.int32)
    jitted = jax.jit(m.step, static_argnums=0)
    ends, total = 0, 0.0
    for t in range(steps):
        world, (_, _, reward, terminated, truncated, final, returns) = jitted(
            env_id, world, actions[:, None] if env_id == "Pendulum-v1" else actions, jax.random.split(jax.random.fold_in(key, t), 1))
        observation, state, own_reward, own_end, _ = env.step_env(key, state, actions, params) if env_id == "Pendulum-v1" else (
            env.step_env(key, state, actions[0], params))
        total += float(jnp.squeeze(own_reward))
        np.testing.assert_allclose(final[0], jnp.ravel(observation), rtol=1e-4, atol=1e-5)
        assert float(returns[0]) == pytest.approx(total, rel=1e-4)
        if terminated[0] or truncated[0]:
            assert bool(terminated[0]) == (env_id == "CartPole-v1") and bool(truncated[0]) == (env_id == "Pendulum-v1")
            assert not np.allclose(world.observations[0], final[0])  # the next episode has begun
            state, total, ends = jax.tree.map(lambda x: x[0], world.states), 0.0, ends + 1
        else:
            np.testing.assert_array_equal(world.observations[0], final[0])
        assert float(world.returns[0]) == pytest.approx(total, rel=1e-4)
    assert ends >= 1


class Probe:
    """Episodes of 3 steps with reward 1 each, which terminate or are truncated; the observation after the end is 9."""

    def __init__(self, truncates):
        self.truncates = truncates

    def action_space(self, params):
        return SimpleNamespace(shape=(), n=2)

    def observation_space(self, params):
        return SimpleNamespace(shape=(1,))

    def observe(self, time):
        hidden = jnp.where(time == 3, 9.0, 0.0)  # a truncated episode does not know its time
        return jnp.where(self.truncates, 0.0 * hidden, jnp.where(time == 3, 9.0, time))[None]

    def reset(self, key, params):
        return self.observe(jnp.int32(0)), jnp.int32(0)

    def step(self, key, state, action, params):
        time = state + 1
        end = time == 3
        after = jnp.where(end, 0, time)
        info = {"final_observation": self.observe(time)}
        return self.observe(after), after, jnp.float32(1.0), end & (not self.truncates), end & self.truncates, info


@pytest.mark.parametrize("truncates", [False, True])
def test_values_of_episodes_that_terminate_and_are_truncated(truncates, monkeypatch):
    """Terminating: V = 1 + γ + γ², 1 + γ, 1. Cut off: V = 1 / (1 - γ) everywhere, because truncation bootstraps."""
    monkeypatch.setattr(m, "make_env", lambda env_id: (Probe(truncates), None))
    args = m.Args(env_id=f"Probe-{truncates}", num_envs=8, num_steps=32, num_minibatches=4, learning_rate=3e-3, gamma=0.5)
    networks = m.make_networks(args.env_id, m.Network("mlp", (), (32,)))
    state = m.stack([m.init_state(args, networks, 0)])
    state, _ = m.train(args, networks, None, state, jnp.zeros((1, 200)))
    state = jax.tree.map(lambda x: x[0], state)
    x = m.normalize(jnp.array([[0.0], [1.0], [2.0]]), state.obs_stats)[: 1 if truncates else 3]
    values = networks.value.apply(state.params["value"], x) * jnp.sqrt(state.return_stats.var)
    np.testing.assert_allclose(values, [2.0] if truncates else [1.75, 1.5, 1.0], atol=0.1)


@pytest.mark.parametrize("env_id", STATES + GRIDS)
def test_every_task_takes_steps_and_grids_lose_nothing_as_bool(env_id, monkeypatch):
    args = m.resolve(m.Args(env_id=env_id, num_envs=16, num_steps=100, num_seeds=1))
    networks = m.make_networks(env_id, args.networks["smaller"])
    state = m.init_state(args, networks, 0)
    assert state.world.observations.dtype == (bool if env_id in GRIDS else jnp.float32)
    monkeypatch.setattr(m, "flatten", lambda env_id, x: x.reshape(len(x), -1).astype(jnp.float32))  # as they were
    collect = jax.jit(lambda state: m.collect(args, networks.policy, state.params["policy"], state.obs_stats, state.world, state.key))
    world = state.world._replace(observations=state.world.observations.astype(jnp.float32))
    rollout = collect(state._replace(world=world))[1]
    assert all(np.isfinite(x).all() for x in rollout)
    assert (rollout.observations[1:] != rollout.observations[:-1]).any((0, 2)).all()  # in each environment
    if env_id in GRIDS:
        assert np.isin(rollout.observations, (0.0, 1.0)).all() and np.isin(rollout.final_observations, (0.0, 1.0)).all()


# Networks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "inputs", "actions"), [("states", 4, 2), ("grid", 400, 3), ("cnn", 400, 3), ("grid", 1000, 6)])
def test_sizes_are_in_about_the_papers_proportions(kind, inputs, actions):
    policy = {}
    for name, network in m.NETWORKS[kind].items():
        shapes = jax.eval_shape(m.Policy(network, actions, False).init, jax.random.PRNGKey(0), jnp.zeros(inputs))
        policy[name] = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
    assert 0.2 <= policy["smaller"] / policy["same"] <= 0.35
    assert 3.0 <= policy["larger"] / policy["same"] <= 7.5


def test_the_convolution_of_patches_is_a_convolution():
    network, x = m.Network("minatar", (5,), (6,)), jax.random.normal(jax.random.PRNGKey(1), (7, 400))

    class Torso(nn.Module):
        @nn.compact
        def __call__(self, x):
            return m.torso(network, x)

    params = Torso().init(jax.random.PRNGKey(0), x)["params"]
    kernel = params["Dense_0"]["kernel"].reshape(3, 3, 4, 5)
    y = jax.lax.conv_general_dilated(x.reshape(7, 10, 10, 4), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = nn.relu(y + params["Dense_0"]["bias"]).reshape(7, -1)
    y = nn.relu(y @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"])
    np.testing.assert_allclose(Torso().apply({"params": params}, x), y, rtol=1e-4, atol=1e-5)


# Runs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("env_id", "method"), [
    ("Breakout-MinAtar", "ppd"), ("Pendulum-v1", "teacher-distill")])
def test_a_run_leaves_what_it_promises(env_id, method, tmp_path, capsys):
    folder = tmp_path / "run"
    found = m.main(small(folder, env_id=env_id, method=method, teacher_noise_std=0.1, num_steps=16 if method == "ppd" else 5))
    files = {path.name for path in folder.iterdir() if not path.name.startswith(("tfevents", "checkpoint_"))}
    assert len(list(folder.glob("checkpoint_*.safetensors"))) == 2
    models = {f"{name}_{seed}.safetensors" for name in ("teacher", "student") for seed in (100, 101)}
    assert files == models | {"args.json", "progress.csv", "results.json", "curves.png"}
    table = rows(folder)
    students = [row for row in table if row["phase"] == "student"]
    assert {row["seed"] for row in students} == {"100", "101"}
    assert all(np.isfinite(float(row["losses/teacher_kl"])) for row in students)
    results = json.loads((folder / "results.json").read_text())
    assert set(results["results"]) == {"teacher", "corrupted_teacher", "student"}
    for name, result in results["results"].items():
        assert np.shape(result["returns"]) == (2, 2) and result["mean"] == pytest.approx(np.mean(result["returns"]), rel=1e-5)
        assert found[name] == result["mean"]
        interval = 12.7062 * np.std(result["means"], ddof=1) / np.sqrt(2)  # Student's t at 97.5%, one degree of freedom
        assert result["interval"] == pytest.approx(interval, rel=1e-4, abs=1e-6)
    out = capsys.readouterr().out
    assert "corrupted teacher" in out and str(folder) in out
    film = {"video": str(tmp_path / "film.gif"), "video_seconds": 2} if env_id == "Breakout-MinAtar" else {}
    for name, flags in (("teacher_100.safetensors", {}), ("student_100.safetensors", film)):
        again = evaluate.main(evaluate.Args(model=str(folder / name), episodes=3, **flags))
        assert np.isfinite(again["mean"])
    if film:
        frames = evaluate.imageio.imread(film["video"])
        assert len(frames) >= 2 and frames.std() > 0


def test_by_default_the_teacher_has_no_noise_and_the_table_two_rows(tmp_path, capsys):
    assert m.Args().teacher_noise_std == 0.0
    m.main(small(tmp_path / "run", num_seeds=1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["return:", "teacher", "student", "steps", "files"]
    assert set(json.loads((tmp_path / "run/results.json").read_text())["results"]) == {"teacher", "student"}


def test_seeds_side_by_side_are_the_same_seeds_alone(tmp_path):
    """The same actions at first, and the same parameters and losses to float32's tolerance."""
    env_id = "Breakout-MinAtar"
    args = m.resolve(small(tmp_path / "x", env_id=env_id))
    networks = m.make_networks(env_id, args.network)
    states = [m.init_state(args, networks, seed) for seed in (100, 101)]
    collect = lambda state: m.collect(  # noqa: E731
        args, networks.policy, state.params["policy"], state.obs_stats, state.world, state.key)[1].actions
    actions = jax.jit(jax.vmap(collect))(m.stack(states))
    np.testing.assert_array_equal(actions[1], jax.jit(collect)(states[1]))

    state, both = m.train(args, networks, None, m.stack(states), jnp.zeros((2, 3)))
    other, alone = m.train(args, networks, None, m.stack(states[1:]), jnp.zeros((1, 3)))
    for x, y in zip(jax.tree.leaves((state.params, both)), jax.tree.leaves((other.params, alone)), strict=True):
        np.testing.assert_allclose(x[1], y[0], rtol=1e-3, atol=1e-4)


def test_a_student_s_seeds_side_by_side_are_the_same_seeds_alone(tmp_path):
    """Three seeds on two devices, so that one place is only filled; each is evaluated by itself, too."""
    assert jax.device_count() == 2
    m.main(small(tmp_path / "together", num_seeds=3))
    m.main(small(tmp_path / "alone", num_seeds=1, seed=102))
    together = [row for row in rows(tmp_path / "together") if row["seed"] == "102"]
    assert {row["phase"] for row in together} == {"teacher", "student"}
    np.testing.assert_allclose(numbers(together), numbers(rows(tmp_path / "alone")), rtol=1e-3, atol=1e-4)
    for name in ("teacher", "student"):
        of_seeds = [m.read_file(tmp_path / f"together/{name}_{seed}.safetensors")[0]["evaluation"]["returns"] for seed in (100, 101, 102)]
        assert of_seeds[2] == m.read_file(tmp_path / f"alone/{name}_102.safetensors")[0]["evaluation"]["returns"]
        assert of_seeds[2] not in of_seeds[:2]


def test_several_lambdas_in_one_run_are_those_runs(tmp_path):
    m.main(small(tmp_path / "study", distill_coef=(0.5, 4.0)))
    m.main(small(tmp_path / "alone", distill_coef=(4.0,)))
    chosen = [row for row in rows(tmp_path / "study") if row["phase"] == "student" and row["distill_coef"] == "4.0"]
    alone = [row for row in rows(tmp_path / "alone") if row["phase"] == "student"]
    np.testing.assert_allclose(numbers(chosen), numbers(alone), rtol=1e-3, atol=1e-4)
    files = {path.name for path in (tmp_path / "study").glob("student*")}
    assert files == {f"student_{coef}_{seed}.safetensors" for coef in ("0.5", "4") for seed in (100, 101)}
    for seed in (100, 101):
        ours, theirs = (m.read_file(tmp_path / name)[1] for name in (f"study/student_4_{seed}.safetensors", f"alone/student_{seed}.safetensors"))
        for name, x in theirs.items():
            np.testing.assert_allclose(ours[name], x, rtol=1e-3, atol=1e-4)


def test_lambda_is_linear_over_the_run():
    args = m.Args(distill_coef=(2.0,), distill_coef_final=0.5)
    np.testing.assert_allclose(m.distill_coef_at(args, 2.0, np.array([0.0, 0.5, 1.0]), 0.9), [2.0, 1.25, 0.5])
    np.testing.assert_allclose(m.distill_coef_at(m.Args(), 2.0, np.array([0.0, 1.0]), 0.9), [2.0, 2.0])


def test_lambda_falls_with_the_return(tmp_path):
    """Of each run on its own; in a run, as the returns of the part before say."""
    args = m.Args(distill_coef_decay="return")
    found = m.distill_coef_at(args, jnp.array([[2.0], [2.0], [4.0]]), np.array([0.0, 0.5]), jnp.array([[-1.0], [0.25], [2.0]]))
    np.testing.assert_allclose(found, [[2.0, 2.0], [1.5, 1.5], [0.0, 0.0]])
    m.main(small(tmp_path / "run", distill_coef_decay="return", num_parts=3, total_timesteps=30 * 64, eval_episodes=100))
    goals = [each["mean"] for each in (m.read_file(tmp_path / f"run/teacher_{seed}.safetensors")[0]["evaluation"] for seed in (100, 101))]
    learned = [row for row in rows(tmp_path / "run") if row["phase"] == "student"]
    for i, goal in enumerate(goals):
        first, second, third = learned[i::2]
        assert float(first["charts/distill_coef"]) == 1.0
        for row, before in ((second, first), (third, second)):
            expected = np.clip(1 - float(before["charts/episodic_return"]) / goal, 0, 1)
            assert float(row["charts/distill_coef"]) == pytest.approx(expected, abs=1e-5)


def test_lambda_cannot_fall_with_the_return_of_a_teacher_that_has_none(tmp_path, capsys):
    """The file says so, before anything is written."""
    m.main(small(tmp_path / "run", num_seeds=1, method="ppo", student_hidden=None, num_steps=None))
    about, arrays = m.read_file(tmp_path / "run/teacher_100.safetensors")
    m.save_file(tmp_path / "losing", about | {"evaluation": about["evaluation"] | {"mean": 0.0}}, arrays)
    with pytest.raises(SystemExit) as ended:
        m.main(small(tmp_path / "student", num_seeds=1, teacher=str(tmp_path / "losing"), distill_coef_decay="return"))
    assert ended.value.code == 2 and "needs teachers of positive return" in capsys.readouterr().err
    assert not (tmp_path / "student").exists()


def test_the_worst_of_a_population_goes_on_from_the_best():
    """Two seeds, three λ: the worst takes what was learned, not where it stands."""
    args = m.resolve(m.Args(env_id="CartPole-v1", num_seeds=2, distill_coef=(0.5, 1.0, 2.0), pbt_interval=1, num_envs=2, student_hidden=(4,)))
    networks = m.make_networks(args.env_id, args.network)
    states = [m.init_state(args, networks, i)._replace(distill_coef=jnp.float32(c), recent=jnp.float32(r), fresh=jnp.bool_(i == 4))
              for i, c, r in zip(range(6), (0.5, 0.5, 1.0, 1.0, 2.0, 2.0), (3.0, 7.0, 9.0, 7.0, 5.0, 7.0), strict=True)]
    states = [state._replace(**{name: jax.tree.map(lambda x, i=i: x + i, getattr(state, name))  # in which all begin alike
                                for name in ("opt_state", "obs_stats", "return_stats", "discounted")}) for i, state in enumerate(states)]
    before = jax.device_get(m.stack(states))
    after = m.exploit(args, before, 3)
    of_first = [2, 1, 2, 3, 4, 5]  # the first seed's λ = 0.5 goes on from its λ = 1; the other seed's are all alike
    for name in ("params", "opt_state", "return_stats", "recent"):
        for x, y in zip(jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(before, name)), strict=True):
            np.testing.assert_array_equal(x, y[np.array(of_first)])
    for name in ("world", "key", "discounted", "obs_stats"):
        for x, y in zip(jax.tree.leaves(getattr(after, name)), jax.tree.leaves(getattr(before, name)), strict=True):
            np.testing.assert_array_equal(x, y)
    assert float(after.distill_coef[0]) in (np.float32(0.8), np.float32(1.25))
    np.testing.assert_array_equal(after.distill_coef[1:], before.distill_coef[1:])
    assert not after.fresh.any()
    for x, y in zip(jax.tree.leaves(m.exploit(args, after, 4)), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)  # nothing new to go by
    factors = {float(m.exploit(args, before, part).distill_coef[0]) for part in range(8)}
    assert factors == {float(np.float32(0.8)), float(np.float32(1.25))}


def test_who_has_ended_no_episode_is_the_worst_of_a_population():
    """Also where all returns are negative."""
    args = m.resolve(m.Args(env_id="Acrobot-v1", num_seeds=1, distill_coef=(0.5, 2.0), pbt_interval=1, num_envs=2, student_hidden=(4,)))
    networks = m.make_networks(args.env_id, args.network)
    begun = m.init_state(args, networks, 0)
    states = jax.device_get(m.stack([begun._replace(distill_coef=jnp.float32(0.5)),
                                     begun._replace(distill_coef=jnp.float32(2.0), recent=jnp.float32(-500.0), fresh=jnp.bool_(True))]))
    found = m.exploit(args, states, 1).distill_coef
    assert found[1] == 2.0 and found[0] in (np.float32(1.6), np.float32(2.5))


def test_a_population_s_student_is_its_best(capsys):
    args = m.Args(num_seeds=2, distill_coef=(0.5, 1.0, 2.0), pbt_interval=1)
    state = m.TrainState({"policy": np.arange(6)}, *[None] * 7, np.array([3.0, 7.0, 9.0, 1.0, 5.0, 8.0]), None)
    assert m.name_students(args, state)["student"]["policy"].tolist() == [2, 5] and not capsys.readouterr().err
    never = state._replace(recent=np.where(np.arange(6) % 2, np.float32(-1e9), state.recent))
    assert m.name_students(args, never)["student"]["policy"].tolist() == [2, 1]
    assert "no episode has ended while the students of a seed learned" in capsys.readouterr().err


def test_a_population_has_one_student_of_each_seed(tmp_path):
    """λ changes on the way, and the rows keep it."""
    numbers = m.main(small(tmp_path / "run", total_timesteps=8 * 64, num_parts=8, distill_coef=(0.5, 2.0), pbt_interval=2))
    assert set(numbers) >= {"student", "teacher"} and not any(name.startswith("student_0") for name in numbers)
    assert {path.name for path in (tmp_path / "run").glob("student*")} == {"student_100.safetensors", "student_101.safetensors"}
    learned = [row for row in rows(tmp_path / "run") if row["phase"] == "student"]
    assert {row["distill_coef"] for row in learned} == {"0.5", "2.0"}
    found = {round(float(row["charts/distill_coef"]), 4) for row in learned}
    assert found > {0.5, 2.0} and found & {0.4, 0.625, 1.6, 2.5}


def test_lambda_zero_is_ppo_whatever_the_teacher(tmp_path):
    """An update of a student with λ = 0 beside a teacher, and without any: the same parameters; with λ = 1 others."""
    args = m.resolve(small(tmp_path / "x"))
    teacher_network = m.Network("mlp", (), (16,))
    networks = m.make_networks(args.env_id, args.network, teacher_network)
    start = m.stack([m.init_state(args, networks, 7)])
    other = m.init_state(args, m.make_networks(args.env_id, teacher_network), 9)
    teacher = m.stack([m.model(other)])
    zero, one = (m.train(args, networks, teacher, copy(start), jnp.full((1, 1), coef))[0].params for coef in (0.0, 1.0))
    without = m.train(args, networks._replace(teacher=None), None, copy(start), jnp.zeros((1, 1)))[0].params
    for x, y in zip(jax.tree.leaves(zero), jax.tree.leaves(without), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    assert max(np.abs(x - y).max() for x, y in zip(jax.tree.leaves(zero), jax.tree.leaves(one), strict=True)) > 1e-4


def test_the_teacher_stays_as_it_was(tmp_path):
    """Its parameters and statistics teach and are evaluated, but never learn."""
    m.main(small(tmp_path / "a", num_seeds=1))
    teacher = tmp_path / "a/teacher_100.safetensors"
    m.main(small(tmp_path / "b", num_seeds=2, teacher=str(teacher)))
    assert not list((tmp_path / "b").glob("teacher*")) and {row["phase"] for row in rows(tmp_path / "b")} == {"student"}
    saved = {k[10:]: v for k, v in m.read_file(tmp_path / "b/student_100.safetensors")[1].items() if k.startswith("obs_stats")}
    for name, value in {k[10:]: v for k, v in m.read_file(teacher)[1].items() if k.startswith("obs_stats")}.items():
        np.testing.assert_array_equal(saved[name], value)


def test_teachers_trained_alone_teach_their_own_seeds(tmp_path):
    """Students of the teachers that --method ppo left are those of a run that trains teachers and students at once."""
    at_once = m.main(small(tmp_path / "at_once"))
    alone = m.main(small(tmp_path / "alone", method="ppo", student_hidden=None, num_steps=None))
    assert "student" not in alone and alone["teacher"] == at_once["teacher"]
    files = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {"teacher_100.safetensors", "teacher_101.safetensors", "curves.png"} <= files and not any("student" in name for name in files)
    later = m.main(small(tmp_path / "later", teacher=str(tmp_path / "alone")))
    assert later["student"] == at_once["student"] and later["teacher"] == at_once["teacher"]
    for seed in (100, 101):
        a, b = (jax.tree.leaves(m.read_file(tmp_path / run / f"student_{seed}.safetensors")[1]) for run in ("at_once", "later"))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_baselines_take_as_many_gradient_steps_as_ppd():
    """And teachers are the same whatever the students' method; what is asked for is done."""
    assert m.resolve(m.Args(method="ppo", total_timesteps=1000)).teacher_timesteps == 1000
    assert m.resolve(m.Args(method="ppo", total_timesteps=1000, teacher_timesteps=5000)).teacher_timesteps == 5000  # as the grid has it
    args = {name: m.resolve(m.Args(method=name)) for name in ("ppd", "student-distill", "teacher-distill", "ppo")}
    samples = {name: each.batch_size / (each.num_minibatches * each.update_epochs if name == "ppd" else 1) for name, each in args.items()}
    assert samples["ppd"] == 64 and samples["student-distill"] == samples["teacher-distill"] == 80
    teachers = {dataclasses.replace(m.teacher_args(each), total_timesteps=1) for each in args.values()}
    assert len(teachers) == 1 and teachers.pop().num_envs == 64
    assert m.teacher_args(m.resolve(m.Args(num_envs=8))).num_envs == m.resolve(m.Args(num_envs=8)).num_envs == 8
    assert m.resolve(m.Args(env_id="Acrobot-v1")).teacher_ent_coef == 0.05 != m.resolve(m.Args()).teacher_ent_coef


def test_the_teacher_acts_in_teacher_distill_alone(tmp_path, monkeypatch):
    acting = []
    collect = m.collect
    monkeypatch.setattr(m, "collect", lambda args, policy, *rest: acting.append(policy.network.hidden) or collect(args, policy, *rest))
    for method, expected in (("teacher-distill", (64, 64)), ("student-distill", (8,)), ("ppd", (8,))):
        acting.clear()
        m.main(small(tmp_path / method, method=method, num_steps=5 if method != "ppd" else 16, seed=7000))
        assert acting[-1] == expected
        students = [row for row in rows(tmp_path / method) if row["phase"] == "student"]
        assert students and all(np.isfinite(float(row["losses/teacher_kl"])) for row in students)


@pytest.mark.parametrize("method", ["ppd", "teacher-distill"])
def test_a_student_comes_to_its_teacher(method, tmp_path):
    """With rewards of no weight (γ and learning from returns aside) the divergence falls by 80% and more."""
    flags = {"num_steps": 16, "distill_coef": (20.0,)} if method == "ppd" else {"num_steps": 5}
    m.main(small(tmp_path / "run", env_id="CartPole-v1", method=method, teacher_timesteps=20_000, total_timesteps=20_000,
                 student_hidden=(32,), num_seeds=1, num_envs=16, num_parts=20, **flags))
    kl = [float(row["losses/teacher_kl"]) for row in rows(tmp_path / "run") if row["phase"] == "student"]
    assert kl[-1] < 0.2 * kl[0]


def test_ppo_learns_to_balance_and_both_scripts_evaluate_alike(tmp_path):
    """A short run of CartPole, from about 20 steps of balance to several hundred; what remains to chance differs by its error."""
    found = m.main(small(tmp_path / "run", num_seeds=1, num_envs=16, num_steps=128, teacher_num_steps=128, num_minibatches=8,
                         teacher_timesteps=50_000, student_hidden=(64, 64), total_timesteps=20_000, eval_episodes=100))
    assert found["teacher"] > 300 and found["student"] > 300
    results = json.loads((tmp_path / "run/results.json").read_text())["results"]
    again = evaluate.main(evaluate.Args(model=str(tmp_path / "run/student_100.safetensors"), episodes=100))
    error = np.hypot(np.std(results["student"]["returns"]), again["std"]) / np.sqrt(100)
    assert again["mean"] == pytest.approx(results["student"]["mean"], abs=5 * error + 1e-3)


def test_a_population_goes_on_to_the_bit(tmp_path, monkeypatch, capsys):
    """Stopped in the teacher's training and again in the student's, it gives the very students of the unbroken run."""
    flags = {"total_timesteps": 10 * 64, "teacher_timesteps": 10 * 64, "num_parts": 5, "distill_coef": (0.5, 2.0),
             "pbt_interval": 1, "distill_coef_decay": "return", "distill_future_coef": 0.5}
    m.main(small(tmp_path / "whole", **flags))
    train, folder = m.train, tmp_path / "cut"
    args = small(folder, **flags)
    for parts, number in ((2, signal.SIGTERM), (5, signal.SIGINT)):
        left = [parts]

        def stopped(*args, number=number, left=left):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return train(*args)

        before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        monkeypatch.setattr(m, "train", stopped)
        with pytest.raises(SystemExit) as ended:
            m.main(args)
        monkeypatch.setattr(m, "train", train)
        for each, handler in before.items():
            signal.signal(each, handler)
        assert ended.value.code == 128 + number and f"--resume {folder}" in capsys.readouterr().err
        args = m.parse_args(["--resume", str(folder)])
    assert {row["phase"] for row in rows(folder)} == {"teacher", "student"}
    m.main(args)
    for name in ("teacher_100", "student_100", "student_101"):
        a, b = (m.read_file(tmp_path / run / f"{name}.safetensors")[1] for run in ("whole", "cut"))
        assert a.keys() == b.keys() and all(np.array_equal(a[each], b[each]) for each in a), name
    assert without_timing(tmp_path / "whole") == without_timing(tmp_path / "cut")


def test_a_flag_that_may_change_is_kept_by_a_run_that_goes_on(tmp_path, monkeypatch):
    m.main(small(tmp_path / "run", num_seeds=1, total_timesteps=64))
    first_call(monkeypatch, m, "assess", lambda: go_on(m, tmp_path / "run", "--eval-episodes", 3))
    go_on(m, tmp_path / "run")
    assert [len(returns) for returns in json.loads((tmp_path / "run/results.json").read_text())["results"]["student"]["returns"]] == [3]


def test_a_teacher_that_the_decay_cannot_take_is_kept(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        m.main(small(tmp_path / "run", env_id="MountainCarContinuous-v0", distill_coef_decay="return"))
    assert ended.value.code == 2 and f"one of those in {tmp_path / 'run'} has -" in capsys.readouterr().err
    assert m.read_file(tmp_path / "run/teacher_100.safetensors")[0]["evaluation"]["mean"] < 0


def test_every_core_is_a_device():
    """Importing what the script imports must not settle JAX's devices before --device and the number of cores do."""
    program = "import os, jax, ppd_gymnax as m; m.choose_device('cpu'); print(len(jax.devices()) == len(os.sched_getaffinity(0)))"
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.stdout == "True\n", done.stderr


# What the update is ----------------------------------------------------------------------------------------------------


learn, act = jax.jit(m.learn_ppd, static_argnums=(0, 1)), jax.jit(m.collect, static_argnums=(0, 1))


def test_it_learns_as_ppd_mujoco_does():
    """Which test_networks.py holds to the algorithm step by step; some rewards are clipped, and gradients so small that Adam's ε counts."""
    other = ppd_mujoco
    flags = {"num_envs": 4, "num_steps": 8, "num_minibatches": 1, "update_epochs": 3, "gamma": 0.9, "gae_lambda": 0.7, "clip_coef": 0.05,
             "ent_coef": 0.03, "vf_coef": 0.3, "learning_rate": 0.01, "max_grad_norm": 1e-3}
    ours = m.Args(env_id="Pendulum-v1", **flags)
    theirs = other.Args(env_id="Hopper-v4", num_devices=1, student_hidden=(8,), **flags)
    network = m.Network("mlp", (), (8,))
    networks = m.make_networks("Pendulum-v1", network, network), other.Networks(other.Policy((8,), 1), other.Value((8,)), other.Policy((8,), 1))
    states = [m.init_state(ours, networks[0], 3), other.init_state(theirs, networks[1], 3)]
    stats, scale = (jnp.full(3, 0.1), jnp.full(3, 2.0), jnp.float32(9.0)), (jnp.float32(0.0), jnp.float32(1e-4), jnp.float32(1e6))
    states[0] = states[0]._replace(params=copy(states[1].params), obs_stats=m.Stats(*stats), return_stats=m.Stats(*scale))
    states[1] = jax.device_put(states[1]._replace(return_stats=other.Stats(*scale)), other.replicated(1))
    teacher = {"policy": jax.tree.map(lambda x: 2.0 * x + 0.1, states[1].params["policy"])}

    rng, none = np.random.default_rng(0), np.zeros((8, 4), np.float32)
    x, actions, rewards = (rng.normal(size=shape).astype(np.float32) for shape in ((9, 4, 3), (8, 4, 1), (8, 4)))
    rollout = m.Rollout(*map(jnp.asarray, (x[:-1], actions, 0.1 * rewards, none, none, x[1:], none)))
    state, found = learn(ours, networks[0], teacher, states[0], rollout, 2.0)
    rollout = other.Rollout(x, actions, 0.1 * rewards, *[none > 0] * 3)
    expected, metrics = other.update(theirs, networks[1], teacher | {"obs_stats": other.Stats(*stats)}, states[1], rollout, 2.0)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    for name, value in found.items():
        np.testing.assert_allclose(value, metrics[f"losses/{name}"], rtol=1e-4, atol=1e-5)


def made_up(env_id="CartPole-v1", **flags):
    """Flags, networks and a student's first state."""
    args = m.resolve(m.Args(env_id=env_id, **{"num_envs": 2} | flags))
    networks = m.make_networks(env_id, m.Network("mlp", (), (4,)), m.Network("mlp", (), (4,)))
    return args, networks, m.init_state(args, networks, 0)


def test_actions_are_samples_of_the_policy():
    args, networks, state = made_up(num_envs=64, num_steps=128)
    params = jax.tree.map(jnp.zeros_like, state.params["policy"])
    params["params"]["Dense_1"]["bias"] = jnp.array([2.0, 0.0])
    actions = act(args, networks.policy, params, state.obs_stats, state.world, state.key)[1].actions
    assert float((actions == 0).mean()) == pytest.approx(1 / (1 + np.exp(-2.0)), abs=0.015)

    args, networks, state = made_up("Pendulum-v1", num_envs=64, num_steps=128)
    params = jax.tree.map(jnp.zeros_like, state.params["policy"])
    params["params"]["Dense_1"]["bias"], params["params"]["log_std"] = jnp.array([0.5]), jnp.array([-1.0])
    actions = act(args, networks.policy, params, state.obs_stats, state.world, state.key)[1].actions
    assert float(actions.mean()) == pytest.approx(0.5, abs=0.015) and float(actions.std()) == pytest.approx(np.exp(-1.0), abs=0.015)


def test_a_truncated_step_bootstraps_from_its_final_observation_and_a_terminated_one_from_none():
    args, networks, state = made_up(num_envs=8, num_steps=16, num_minibatches=2, method="student-distill")
    rollout = act(args, networks.policy, state.params["policy"], state.obs_stats, state.world, state.key)[1]
    end = jnp.zeros((16, 8)).at[5, 2].set(1.0)
    seen = rollout.final_observations.at[5, 2].add(3.0)
    cut, over = rollout._replace(terminations=0 * end, truncations=end), rollout._replace(terminations=end, truncations=0 * end)
    loss = [float(learn(args, networks._replace(teacher=None), None, state, each, 0.0)[1]["value_loss"])
            for each in (cut, cut._replace(final_observations=seen), over, over._replace(final_observations=seen))]
    assert loss[0] != loss[1] and loss[2] == loss[3]


def test_a_baseline_regresses_to_its_teachers_values_and_a_teachers_statistics_take_in_each_rollout():
    args, networks, state = made_up(num_envs=8, num_steps=16, num_minibatches=2, method="student-distill")
    rollout = act(args, networks.policy, state.params["policy"], state.obs_stats, state.world, state.key)[1]
    x = m.normalize(rollout.observations, state.obs_stats)
    teacher = made_up()[2].params | {"value": jax.tree.map(lambda x: x + 0.5, state.params["value"])}
    errors = networks.value.apply(state.params["value"], x) - networks.teacher_value.apply(teacher["value"], x)
    found = jax.jit(m.learn_by_regression, static_argnums=(0, 1))(args, networks, teacher, state, rollout)[1]
    assert float(found["value_loss"]) == pytest.approx(float((errors**2).mean()), rel=1e-5)
    stats = learn(args, networks._replace(teacher=None), None, state, rollout, 0.0)[0].obs_stats
    seen = np.asarray(rollout.observations).reshape(128, -1)
    np.testing.assert_allclose(stats.mean, seen.mean(0), atol=1e-4)
    np.testing.assert_allclose(stats.var, seen.var(0), rtol=1e-3)


def test_an_epoch_takes_every_sample_once_in_an_order_of_its_own(monkeypatch):
    args, networks, state = made_up(num_envs=8, num_steps=16, num_minibatches=4, update_epochs=3)
    rollout = act(args, networks.policy, state.params["policy"], state.obs_stats, state.world, state.key)[1]
    taken, pick = [], m.pick

    def watched(tree, which):
        if isinstance(tree, m.Batch):
            jax.debug.callback(lambda x: taken.append(np.array(x)), which, ordered=True)
        return pick(tree, which)

    monkeypatch.setattr(m, "pick", watched)
    m.learn_ppd(args, networks._replace(teacher=None), None, state, rollout, 0.0)
    jax.effects_barrier()
    assert [x.shape for x in taken] == [(32,)] * 12
    orders = np.reshape(taken, (3, 128))
    assert (np.sort(orders) == np.arange(128)).all() and len({*map(tuple, orders), tuple(range(128))}) == 4


def test_lambda_and_noise_reach_the_student(tmp_path, monkeypatch):
    train, given = m.train, []

    def watched(args, networks, teacher, state, coefs):
        given.append((None if teacher is None else jax.tree.map(np.array, teacher["policy"]), np.array(coefs)))
        return train(args, networks, teacher, state, coefs)

    monkeypatch.setattr(m, "train", watched)
    m.main(small(tmp_path / "run", num_seeds=1, num_parts=3, distill_coef=(2.0,), distill_coef_final=0.5, teacher_noise_std=0.1))
    np.testing.assert_allclose([coefs[0, 0] for taught, coefs in given if taught is not None], [2.0, 1.25, 0.5])
    clean = m.read_file(tmp_path / "run/teacher_100.safetensors")[1]["policy/params/Dense_1/kernel"]
    assert 0.07 < (given[-1][0]["params"]["Dense_1"]["kernel"][0] - clean).std() < 0.13


def test_the_first_episode_of_each_environment_counts(monkeypatch):
    """Of a made-up task, where an environment's k-th episode has the return k, and ends after one step or after two."""

    def step(env_id, world, actions, keys):
        ends = jnp.array([1.0, 1.0 * (world.observations[1, 0] % 2)])
        observations = world.observations + jnp.ones((2, 1))
        return world._replace(observations=observations), SimpleNamespace(terminations=ends, truncations=0 * ends, returns=observations[:, 0])

    args, networks, state = made_up(num_seeds=1, eval_episodes=2)
    world = state.world._replace(observations=jnp.zeros((2, 4)))
    monkeypatch.setattr(m, "step", step)
    monkeypatch.setattr(m, "reset", lambda *_: world)
    players = m.stack([{"policy": state.params["policy"], "obs_stats": state.obs_stats}])
    assert m.evaluate(args, networks.policy, players, jnp.zeros((1, 2), jnp.uint32)).tolist() == [[1.0, 2.0]]
