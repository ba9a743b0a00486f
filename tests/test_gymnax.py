"""ppd_gymnax.py: same-step resets, seeds side by side, the three methods, files, and what it learns."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import flax.linen as nn
import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

import evaluate
import ppd_gymnax as m

STATES = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1", "MountainCarContinuous-v0", "Reacher-misc"]
GRIDS = [f"{name}-MinAtar" for name in ("Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders")]


def small(folder, **flags):
    """Flags of a run with a few updates of small networks, whose students have no noise to learn from."""
    defaults = {"env_id": "CartPole-v1", "num_seeds": 2, "num_envs": 4, "num_steps": 16, "num_minibatches": 2, "teacher_num_steps": 16,
                "teacher_timesteps": 3 * 64, "total_timesteps": 3 * 64, "student_hidden": (8,), "eval_episodes": 2,
                "teacher_noise_std": 0.0}
    return m.Args(run_dir=str(folder), **(defaults | flags))


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


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
        world, (reward, terminated, truncated, final, returns) = jitted(
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
    state, _ = m.train(args, networks, None, state, jnp.zeros((1, 300)))
    state = jax.tree.map(lambda x: x[0], state)
    x = m.normalize(jnp.array([[0.0], [1.0], [2.0]]), state.obs_stats)[: 1 if truncates else 3]
    values = networks.value.apply(state.params["value"], x) * jnp.sqrt(state.return_stats.var)
    np.testing.assert_allclose(values, [2.0] if truncates else [1.75, 1.5, 1.0], atol=0.1)


@pytest.mark.parametrize("env_id", GRIDS)
def test_grids_lose_nothing_as_bool(env_id):
    env, params = gymnax.make(env_id)
    world = jax.vmap(env.reset, (0, None))(jax.random.split(jax.random.PRNGKey(0), 16), params)[1]
    step = jax.jit(jax.vmap(env.step, (0, 0, 0, None)))
    for t in range(150):
        keys = jax.random.split(jax.random.PRNGKey(t), 16)
        observations, world, *_ = step(keys, world, jax.random.randint(keys[0], (16,), 0, env.num_actions), params)
        assert np.isin(observations, (0.0, 1.0)).all()


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


@pytest.mark.parametrize("method", ["ppd", "student-distill", "teacher-distill"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "Breakout-MinAtar"])
def test_a_run_leaves_what_it_promises(env_id, method, tmp_path, capsys):
    folder = tmp_path / "run"
    found = m.main(small(folder, env_id=env_id, method=method, teacher_noise_std=0.1, num_steps=16 if method == "ppd" else 5))
    files = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    models = {f"{name}_{seed}.msgpack" for name in ("teacher", "student") for seed in (100, 101)}
    assert files == models | {"args.json", "progress.csv", "checkpoint.msgpack", "checkpoint_previous.msgpack", "results.json",
                              "curves.png"}
    table = rows(folder)
    students = [row for row in table if row["phase"] == "student"]
    assert {row["seed"] for row in students} == {"100", "101"}
    assert all(np.isfinite(float(row["losses/teacher_kl"])) for row in students)
    results = json.loads((folder / "results.json").read_text())
    assert set(results["results"]) == {"teacher", "corrupted_teacher", "student"}
    for name, result in results["results"].items():
        assert np.shape(result["returns"]) == (2, 2) and result["mean"] == pytest.approx(np.mean(result["returns"]), rel=1e-5)
        assert found[name] == result["mean"] and result["interval"] >= 0
    out = capsys.readouterr().out
    assert "corrupted teacher" in out and str(folder) in out
    for name in models:
        again = evaluate.main(evaluate.Args(model=str(folder / name), episodes=3))
        assert np.isfinite(again["mean"])


def test_a_model_is_evaluated_alike_by_both_scripts(tmp_path):
    """CartPole's deterministic policies differ in return from start to start; 200 starts each settle the mean."""
    m.main(small(tmp_path / "run", eval_episodes=200, num_seeds=1))
    results = json.loads((tmp_path / "run/results.json").read_text())["results"]
    again = evaluate.main(evaluate.Args(model=str(tmp_path / "run/student_100.msgpack"), episodes=200))
    error = np.std(results["student"]["returns"]) / np.sqrt(200)
    assert again["mean"] == pytest.approx(results["student"]["mean"], abs=6 * error + 1e-3)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Breakout-MinAtar"])
def test_seeds_side_by_side_are_the_same_seeds_alone(env_id, tmp_path):
    """The same actions at first, and the same curves to float32's tolerance."""
    m.main(small(tmp_path / "both", env_id=env_id, num_seeds=2))
    m.main(small(tmp_path / "alone", env_id=env_id, num_seeds=1, seed=101))
    both = [row for row in rows(tmp_path / "both") if row["seed"] == "101"]
    np.testing.assert_allclose(numbers(both), numbers(rows(tmp_path / "alone")), rtol=1e-3, atol=1e-4)

    args = m.resolve(small(tmp_path / "x", env_id=env_id))
    networks = m.make_networks(env_id, args.network)
    states = [m.init_state(args, networks, seed) for seed in (100, 101)]
    collect = lambda state: m.collect(  # noqa: E731
        args, networks.policy, state.params["policy"], state.obs_stats, state.world, state.key)[1].actions
    actions = jax.jit(jax.vmap(collect))(m.stack(states))
    for i, state in enumerate(states):
        np.testing.assert_array_equal(actions[i], jax.jit(collect)(state))


def test_several_lambdas_in_one_run_are_those_runs(tmp_path):
    m.main(small(tmp_path / "study", distill_coef=(0.5, 4.0)))
    m.main(small(tmp_path / "alone", distill_coef=(4.0,)))
    chosen = [row for row in rows(tmp_path / "study") if row["phase"] == "student" and row["distill_coef"] == "4.0"]
    alone = [row for row in rows(tmp_path / "alone") if row["phase"] == "student"]
    np.testing.assert_allclose(numbers(chosen), numbers(alone), rtol=1e-3, atol=1e-4)
    files = {path.name for path in (tmp_path / "study").glob("student*")}
    assert files == {f"student_{coef}_{seed}.msgpack" for coef in ("0.5", "4") for seed in (100, 101)}


def test_lambda_is_linear_over_the_run():
    args = m.Args(distill_coef=(2.0,), distill_coef_final=0.5)
    np.testing.assert_allclose(m.distill_coef_at(args, 2.0, np.array([0.0, 0.5, 1.0])), [2.0, 1.25, 0.5])
    np.testing.assert_allclose(m.distill_coef_at(m.Args(), 2.0, np.array([0.0, 1.0])), [2.0, 2.0])


def test_lambda_zero_is_ppo_whatever_the_teacher(tmp_path):
    """One update of a student with λ = 0 beside a teacher, and without any: the same parameters."""
    args = m.resolve(small(tmp_path / "x", distill_coef=(0.0,)))
    teacher_networks = m.make_networks(args.env_id, m.Network("mlp", (), (16,)))
    networks = m.make_networks(args.env_id, args.network, teacher_networks)
    start = m.stack([m.init_state(args, networks, 7)])
    other = m.init_state(args, teacher_networks, 9)
    teacher = m.stack([m.Frozen(other.params, other.obs_stats)])
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
    with_teacher, _ = m.train(args, networks, teacher, copy(start), jnp.zeros((1, 2)))
    without, _ = m.train(args, networks._replace(teacher=None), None, copy(start), jnp.zeros((1, 1)))
    once, _ = m.train(args, networks, teacher, copy(start), jnp.zeros((1, 1)))
    for x, y in zip(jax.tree.leaves(once.params), jax.tree.leaves(without.params), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    assert not np.allclose(jax.tree.leaves(with_teacher.params)[1], jax.tree.leaves(once.params)[1])


def test_the_teacher_stays_as_it_was(tmp_path):
    """Its parameters and statistics teach and are evaluated, but never learn."""
    m.main(small(tmp_path / "a", num_seeds=1))
    teacher = tmp_path / "a/teacher_100.msgpack"
    m.main(small(tmp_path / "b", num_seeds=2, teacher=str(teacher)))
    assert not list((tmp_path / "b").glob("teacher*")) and {row["phase"] for row in rows(tmp_path / "b")} == {"student"}
    saved = m.load_tree(tmp_path / "b/student_100.msgpack", "model")["obs_stats"]
    for name, value in m.load_tree(teacher, "model")["obs_stats"].items():
        np.testing.assert_array_equal(saved[name], value)


def test_teachers_trained_alone_teach_their_own_seeds(tmp_path):
    """Students of the teachers that --method ppo left are those of a run that trains teachers and students at once."""
    at_once = m.main(small(tmp_path / "at_once"))
    alone = m.main(small(tmp_path / "alone", method="ppo"))
    assert "student" not in alone and alone["teacher"] == at_once["teacher"]
    files = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {"teacher_100.msgpack", "teacher_101.msgpack", "curves.png"} <= files and not any("student" in name for name in files)
    later = m.main(small(tmp_path / "later", teacher=str(tmp_path / "alone")))
    assert later["student"] == at_once["student"] and later["teacher"] == at_once["teacher"]
    for seed in (100, 101):
        a, b = (jax.tree.leaves(m.load_tree(tmp_path / run / f"student_{seed}.msgpack", "model")["params"]) for run in ("at_once", "later"))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    one = m.main(small(tmp_path / "one", num_seeds=1, teacher=str(tmp_path / "alone/teacher_101.msgpack")))
    assert one["teacher"] != later["teacher"] or one["student"] != later["student"]


def test_baselines_take_as_many_gradient_steps_as_ppd():
    """And teachers are the same whatever the students' method; what is asked for is done."""
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
        m.main(small(tmp_path / method, method=method, num_steps=5 if method != "ppd" else 16, seed=hash(method) % 1000))
        assert acting[-1] == expected


@pytest.mark.parametrize("method", ["ppd", "student-distill", "teacher-distill"])
def test_a_student_comes_to_its_teacher(method, tmp_path):
    """With rewards of no weight (γ and learning from returns aside) the divergence falls by 80% and more."""
    flags = {"num_steps": 16, "distill_coef": (20.0,)} if method == "ppd" else {"num_steps": 5}
    m.main(small(tmp_path / "run", env_id="CartPole-v1", method=method, teacher_timesteps=20_000, total_timesteps=20_000,
                 student_hidden=(32,), num_envs=16, num_parts=20, **flags))
    kl = [float(row["losses/teacher_kl"]) for row in rows(tmp_path / "run") if row["phase"] == "student" and row["seed"] == "100"]
    assert kl[-1] < 0.2 * kl[0]


def test_ppo_learns_to_balance(tmp_path):
    """A short run of CartPole, from about 20 steps of balance to several hundred."""
    found = m.main(small(tmp_path / "run", num_envs=16, num_steps=128, teacher_num_steps=128, num_minibatches=8, teacher_timesteps=60_000,
                         student_hidden=(64, 64), total_timesteps=20_000, eval_episodes=20))
    assert found["teacher"] > 300 and found["student"] > 300


def test_a_signal_saves_and_the_run_goes_on_to_the_bit(tmp_path):
    """Stopped in the teacher's training and again in the student's, it gives the very students of the unbroken run."""
    flags = ["--env-id", "CartPole-v1", "--num-seeds", "2", "--num-envs", "8", "--num-steps", "64", "--teacher-num-steps", "64", "--num-minibatches", "4",
             "--teacher-timesteps", "60000", "--total-timesteps", "60000", "--num-parts", "60", "--eval-episodes", "2",
             "--student-hidden", "16", "--distill-coef", "0.5", "2"]
    command = [sys.executable, ROOT / "ppd_gymnax.py"]
    whole = subprocess.run([*command, *flags, "--run-dir", tmp_path / "whole"], capture_output=True, text=True, timeout=400)
    assert whole.returncode == 0, whole.stderr
    argv, folder = [*flags, "--run-dir", tmp_path / "cut"], tmp_path / "cut"
    for phase, number in (("teacher", signal.SIGTERM), ("student", signal.SIGINT)):
        run = subprocess.Popen([*command, *argv], stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.time() + 200
            while time.time() < deadline and run.poll() is None:
                if (folder / "progress.csv").exists() and (folder / "progress.csv").read_text().count(f"\n{phase},") >= 3:
                    break
                time.sleep(0.02)
            run.send_signal(number)
            error = run.communicate(timeout=200)[1]
        finally:
            run.kill()
        assert run.returncode == 128 + number, error
        assert f"--resume {folder}" in error
        argv = ["--resume", folder]
    last = subprocess.run([*command, *argv], capture_output=True, text=True, timeout=400)
    assert last.returncode == 0, last.stderr
    for name in ("teacher_100", "student_0.5_100", "student_2_101"):
        a, b = (jax.tree.leaves(m.load_tree(tmp_path / run / f"{name}.msgpack", "model")["params"]) for run in ("whole", "cut"))
        assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)), name
    a, b = ([{k: v for k, v in row.items() if k not in ("seconds", "charts/SPS")} for row in rows(tmp_path / run)]
            for run in ("whole", "cut"))
    assert a == b


def test_every_core_is_a_device():
    """Importing what the script imports must not settle JAX's devices before --device and the number of cores do."""
    program = "import os, jax, ppd_gymnax as m; m.choose_device('cpu'); print(len(jax.devices()) == len(os.sched_getaffinity(0)))"
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS")}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.stdout == "True\n", done.stderr


def test_five_seeds_do_not_hang(tmp_path):
    """Batched orthogonal initialisation under vmap hangs for ever on two cores; the time limit would show it."""
    flags = ["--num-seeds", "5", "--teacher-timesteps", "8192", "--total-timesteps", "8192", "--eval-episodes", "2"]
    run = subprocess.run([sys.executable, ROOT / "ppd_gymnax.py", *flags, "--run-dir", tmp_path / "run"], timeout=300,
                         capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert run.returncode == 0 and "student" in run.stdout


def test_a_film(tmp_path):
    m.main(small(tmp_path / "run", env_id="Breakout-MinAtar", num_seeds=1))
    film = tmp_path / "film.gif"
    evaluate.main(evaluate.Args(model=str(tmp_path / "run/student_100.msgpack"), episodes=1, video=str(film), video_seconds=2))
    frames = evaluate.imageio.imread(film)
    assert len(frames) >= 2 and frames.std() > 0


@pytest.mark.parametrize("env_id", STATES + GRIDS)
def test_every_task_takes_a_step(env_id):
    args = m.resolve(m.Args(env_id=env_id, num_envs=2, num_steps=4, num_minibatches=2, num_seeds=1))
    networks = m.make_networks(env_id, args.networks["smaller"])
    state, metrics = m.train(args, networks, None, m.stack([m.init_state(args, networks, 0)]), jnp.zeros((1, 1)))
    assert all(np.isfinite(value).all() for name, value in metrics.items() if name.startswith("losses"))
