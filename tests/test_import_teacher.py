"""Agents of stable-baselines3, trained here, and of CleanRL: as teachers they give the outputs and returns that they gave there.

What needs torch and stable-baselines3 is skipped where they are not installed; .ci/run installs them.
"""

import io
import json
import os
import pickle
import sys
import zipfile

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LACKS, ROOT, needs_procgen, small, small_gymnax

import evaluate
import import_teacher
import ppd_atari
import ppd_gymnax
import ppd_mujoco
import ppd_procgen
import student_distill

sys.path.insert(0, str(ROOT / "benchmark"))
import imported as imported_agents  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning"),  # Hopper-v4: the paper's
              pytest.mark.filterwarnings("ignore:You are trying to run PPO on the GPU")]

if not LACKS:
    import gymnasium
    import torch
    from stable_baselines3 import A2C, DQN, PPO
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)

    class Custom(BaseFeaturesExtractor):
        """A network that no reader can know."""

        def __init__(self, space):
            super().__init__(space, 4)

        def forward(self, x):
            return x


def arch(activation=None, **options):
    return options | ({} if activation is None else {"activation_fn": getattr(torch.nn, activation)})


# Of each agent: task, algorithm and policy, what the policy is made of, steps, whether observations are normalised
AGENTS = {
    "tanh": ("CartPole-v1", "PPO", "MlpPolicy", lambda: arch(), 4096, False),
    "separate": ("CartPole-v1", "A2C", "MlpPolicy", lambda: arch("ReLU", net_arch={"pi": [32], "vf": [24, 16]}), 500, False),
    "linear": ("CartPole-v1", "A2C", "MlpPolicy", lambda: arch(net_arch=[]), 500, False),
    "normalized": ("Hopper-v4", "PPO", "MlpPolicy", lambda: arch(), 4096, True),
    "raw": ("HalfCheetah-v4", "A2C", "MlpPolicy", lambda: arch("ReLU", net_arch=[32, 16]), 500, False),
    "nature": ("Pong-v5", "PPO", "CnnPolicy", lambda: arch(), 64, False),
    "apart": ("CoinrunEasy-v0", "A2C", "CnnPolicy", lambda: arch("ReLU", net_arch=[16], share_features_extractor=False,
                                                                 features_extractor_kwargs={"features_dim": 32}), 64, False),
}
EVERY = [pytest.param(name, marks=[pytest.mark.sb3, *([needs_procgen] if name == "apart" else [])]) for name in AGENTS]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The agent by name: its model in stable-baselines3, its environments there, and the teacher's file."""
    known = {}

    def get(name):
        if name not in known:
            env_id, algorithm, policy, options, steps, normalised = AGENTS[name]
            folder = tmp_path_factory.mktemp("agent")
            envs = imported_agents.make_envs({"policy": policy, "env_id": env_id}, 2, seed=3)
            envs = VecNormalize(envs, clip_obs=3.0, epsilon=1e-4) if normalised else envs
            rollout = {"n_steps": min(steps // 2, 512)} | ({"batch_size": 64} if algorithm == "PPO" else {})
            model = {"PPO": PPO, "A2C": A2C}[algorithm](policy, envs, policy_kwargs=options(), seed=1, device="cpu", **rollout)
            model.learn(steps)
            model.save(folder / "agent.zip")
            flags = {"eval_episodes": 2 if policy == "CnnPolicy" else 40}
            if normalised:
                envs.save(folder / "stats.pkl")
                stats = envs.obs_rms
                np.savez(folder / "stats.npz", mean=stats.mean, var=stats.var, clip_obs=3.0, epsilon=1e-4, count=stats.count)
                flags["vecnormalize"] = str(folder / "stats.npz")
            args = import_teacher.Args(str(folder / "agent.zip"), env_id, str(folder / "teacher.safetensors"), **flags)
            known[name] = model, envs, args, import_teacher.main(args)
        return known[name]

    return get


def observations_for(name, envs):
    """1,000 random observations of the agent's task: images, or states of three times the spread of those it has seen."""
    rng, space = np.random.default_rng(0), envs.observation_space
    if len(space.shape) == 3:
        return rng.integers(0, 256, (1000, *space.shape), np.uint8)
    if isinstance(envs, VecNormalize):
        return (envs.obs_rms.mean + 3 * np.sqrt(envs.obs_rms.var) * rng.normal(size=(1000, *space.shape))).astype(np.float32)
    return rng.normal(size=(1000, *space.shape)).astype(np.float32)


def apply(network, params, stats, x):
    """A network's outputs, in parts: the CPU's convolutions are of a few images at a time."""
    if stats is not None:
        x = ppd_mujoco.normalize(x, stats)
    return jnp.concatenate([jnp.asarray(network.apply(params, part)) for part in np.split(np.asarray(x), 20)])


@pytest.mark.parametrize("name", EVERY)
def test_outputs_are_those_of_stable_baselines3(name, imported):
    """On 1,000 random observations to 1e-5: means, deviations or log-probabilities, and values."""
    model, envs, args, _ = imported(name)
    x = observations_for(name, envs)
    with torch.no_grad():
        tensor = torch.tensor(envs.normalize_obs(x) if isinstance(envs, VecNormalize) else x)
        theirs = model.policy.get_distribution(tensor).distribution
        values = model.policy.predict_values(tensor).squeeze(-1).numpy()
    about, policy, params = evaluate.load_policy(args.out)
    outputs = policy.apply(params["policy"], ppd_mujoco.normalize(x, params["obs_stats"])) if policy.gaussian else apply(
        policy, params["policy"], params["obs_stats"], x)
    if policy.gaussian:
        np.testing.assert_allclose(outputs[0], theirs.mean.numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.exp(outputs[1]), theirs.stddev.numpy(), rtol=1e-5)
    else:
        np.testing.assert_allclose(jax.nn.log_softmax(outputs), theirs.logits.numpy(), rtol=1e-5, atol=1e-5)
    assert about["env_id"] == args.env_id and about["role"] == "teacher"
    if about.get("library") == "gymnax":
        network, found = ppd_gymnax.load_teachers(ppd_gymnax.resolve(small_gymnax("run", teacher=args.out)))
        network, found = ppd_gymnax.Value(network), jax.tree.map(lambda x: x[0], found)
    else:
        teacher = student_distill.load_teacher(student_distill.Args(teacher=args.out))
        network, found = student_distill.Value(teacher.policy.network), teacher.params
    np.testing.assert_allclose(apply(network, found["value"], found["obs_stats"], x), values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_evaluate_measures_what_the_import_did(name, imported, capsys):
    _, _, args, numbers = imported(name)
    episodes = 2 if name in ("nature", "apart") else 40
    found = evaluate.main(evaluate.Args(args.out, episodes=episodes))
    assert found["mean"] == pytest.approx(numbers["mean"], rel=2e-2), capsys.readouterr()


@pytest.mark.sb3
def test_the_program_trains_imports_and_distils(tmp_path, monkeypatch):
    student = "ppd_gymnax.py --env-id CartPole-v1 --num-seeds 1 --total-timesteps 2048 --eval-episodes 3"
    monkeypatch.setitem(imported_agents.AGENTS, "cartpole", imported_agents.AGENTS["cartpole"] | {"steps": 256, "episodes": 4, "student": student})
    imported_agents.main(imported_agents.Args("cartpole", json=tmp_path / "new/found.json"))
    found = json.loads((tmp_path / "new/found.json").read_text())
    assert (found["steps"], found["student_command"], len(found["teacher"]["returns"])) == (256, student, 100)
    assert [len(found[name]["returns"]) for name in ("theirs", "student")] == [4, 3] and found["theirs"]["mean"] >= 8


@pytest.mark.sb3
@pytest.mark.parametrize("name", ["tanh", "normalized", "raw"])
def test_returns_are_those_in_gymnasium(name, imported):
    """Within four standard errors, of 40 episodes in another simulator."""
    model, envs, args, numbers = imported(name)
    theirs = []
    for seed in range(40):
        env = gymnasium.make(args.env_id)
        x, total, done = env.reset(seed=1000 + seed)[0], 0.0, False
        while not done:
            x = envs.normalize_obs(x) if isinstance(envs, VecNormalize) else x
            x, reward, terminated, truncated, _ = env.step(model.predict(x, deterministic=True)[0])
            total, done = total + reward, terminated or truncated
        theirs.append(total)
        if name == "raw" and seed == 9:  # a thousand steps each
            break
    error = np.hypot(numbers["std"] / np.sqrt(40), np.std(theirs) / np.sqrt(len(theirs)))
    assert abs(np.mean(theirs) - numbers["mean"]) < 4 * error + 1e-6, (np.mean(theirs), numbers)


STUDENTS = {"tanh": (ppd_gymnax, "ppd"), "separate": (ppd_gymnax, "student-distill"), "normalized": (ppd_mujoco,),
            "nature": (ppd_atari,), "apart": (ppd_procgen, student_distill)}


@pytest.mark.parametrize("name", [each for each in EVERY if each.values[0] in STUDENTS])
def test_students_learn_from_it(name, imported, tmp_path):
    """By PPD; and where the value network is of another shape or apart, by the baseline that learns from its values too."""
    _, _, args, _ = imported(name)
    m, *others = STUDENTS[name]
    if m is ppd_gymnax:
        m.main(small_gymnax(tmp_path / "run", teacher=args.out, method=others[0], teacher_timesteps=None))
        assert (tmp_path / "run/student_100.safetensors").exists()
        return
    for each in (m, *others):
        found = each.main(small(each, args.env_id, tmp_path / each.__name__, teacher=args.out))
        assert set(found) >= {"student", "teacher"} and (tmp_path / each.__name__ / "student.safetensors").exists()


@pytest.mark.sb3
def test_a_clip_of_what_was_seen_leaves_room(imported):
    """Unnormalised states are divided by powers of two, which changes no bit, and are clipped far beyond those it met."""
    model, envs, args, _ = imported("raw")
    _, policy, params = evaluate.load_policy(args.out)
    stats = params["obs_stats"]
    scale = np.sqrt(stats.var)
    assert (np.log2(scale) % 1 == 0).all() and scale.max() > 1 and not np.asarray(stats.mean).any()
    with torch.no_grad():
        edge = (9.9 * scale).astype(np.float32)
        theirs = model.policy.get_distribution(torch.tensor(edge[None])).distribution.mean.numpy()
    np.testing.assert_allclose(policy.apply(params["policy"], ppd_mujoco.normalize(edge[None], stats))[0], theirs, rtol=1e-5, atol=1e-5)


def refusal(capsys, *argv, out="teacher.safetensors", folder=None):
    """The one line that the program ends with."""
    path = folder / out
    existed = path.exists()
    with pytest.raises(SystemExit) as stopped:
        import_teacher.main(import_teacher.Args(*map(str, argv), out=str(path)))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and path.exists() == existed
    return error


class Harm:
    """Deserialised by pickle, it writes a file."""

    def __reduce__(self):
        return (open, (str(Harm.path), "w"))


@pytest.mark.sb3
def test_files_that_are_no_such_agent(imported, tmp_path, capsys):
    _, _, args, _ = imported("tanh")
    whole = open(args.agent, "rb").read()
    made = tmp_path / "agent.zip"

    def tell(env_id="CartPole-v1"):
        return refusal(capsys, made, env_id, folder=tmp_path)

    def rebuilt(**parts):
        with zipfile.ZipFile(args.agent) as old, zipfile.ZipFile(made, "w") as new:
            for name in old.namelist():
                content = parts.get(name.removesuffix(".pth"), lambda x: x)(old.read(name))
                if content is not None:
                    new.writestr(name, content)
        return tell()

    def weights(change):
        def content(old):
            state = torch.load(io.BytesIO(old), weights_only=True)
            change(state)
            torch.save(state, buffer := io.BytesIO())
            return buffer.getvalue()
        return content

    def data(**changes):
        return lambda old: json.dumps(json.loads(old) | changes)

    for content in (b"", whole[:1000], whole[: len(whole) // 2], bytes(1000), pickle.dumps({"1": 2})):
        made.write_bytes(content)
        assert "is no agent of stable-baselines3 or CleanRL" in tell()
    made.write_bytes(whole)
    assert "a layer has 4 inputs where 11 are needed" in tell("Hopper-v4")
    assert "a layer has 4 inputs where 6 are needed" in tell("Acrobot-v1")
    assert "0 convolutions" in tell("Pong-v5") and "unknown task Cartpole" in tell("Cartpole")
    assert "'data'" in rebuilt(data=lambda x: None) and "policy.pth" in rebuilt(policy=lambda x: None)
    Harm.path = tmp_path / "harm"
    torch.save({"log_std": Harm()}, buffer := io.BytesIO())
    assert "weights_only" in rebuilt(policy=lambda x: buffer.getvalue()).lower().replace("weights only", "weights_only")
    rebuilt(policy=lambda x: pickle.dumps(Harm()))
    assert not Harm.path.exists()
    assert "not finite" in rebuilt(policy=weights(lambda state: state["action_net.bias"].fill_(float("nan"))))
    assert "q_net.weight is unknown" in rebuilt(policy=weights(lambda state: state.update({"q_net.weight": torch.zeros(2)})))
    assert "value_net.weight" in rebuilt(policy=weights(lambda state: state.pop("value_net.weight")))
    assert "the task's are not" in rebuilt(policy=weights(lambda state: state.update({"log_std": torch.zeros(2)})))
    assert "gSDE" in rebuilt(data=data(use_sde=True))
    for module in ("torch.nn.modules.activation.ELU", "__main__.ReLU"):
        assert module in rebuilt(data=data(policy_kwargs={"activation_fn": f"<class '{module}'>"}))
    assert "MyNatureCNN" in rebuilt(data=data(policy_kwargs={"features_extractor_class": "<class 'there.MyNatureCNN'>"}))
    assert "one of __main__" in rebuilt(data=data(policy_class={"__module__": "__main__"}))
    assert "'policy_kwargs'" in rebuilt(data=lambda x: json.dumps({k: v for k, v in json.loads(x).items() if k != "policy_kwargs"}))
    assert "not finite" in rebuilt(policy=weights(lambda state: [x.fill_(3e38) for x in state.values()]))
    for changed in (None, [], "text", {"policy_kwargs": 3}, {"policy_kwargs": {"activation_fn": {}}}):
        rebuilt(data=lambda x, changed=changed: json.dumps(changed))


@pytest.mark.sb3
def test_other_algorithms_and_networks_of_stable_baselines3(tmp_path, capsys):
    space = gymnasium.make("CartPole-v1")
    DQN("MlpPolicy", space, device="cpu").save(tmp_path / "dqn.zip")
    assert "q_net" in refusal(capsys, tmp_path / "dqn.zip", "CartPole-v1", folder=tmp_path)
    PPO("MlpPolicy", space, policy_kwargs={"features_extractor_class": Custom}, device="cpu").save(tmp_path / "custom.zip")
    assert "Custom" in refusal(capsys, tmp_path / "custom.zip", "CartPole-v1", folder=tmp_path)
    PPO("MlpPolicy", gymnasium.make("Pendulum-v1"), use_sde=True, device="cpu").save(tmp_path / "sde.zip")
    assert "gSDE" in refusal(capsys, tmp_path / "sde.zip", "Pendulum-v1", folder=tmp_path)


@pytest.mark.sb3
def test_statistics(imported, tmp_path, capsys, monkeypatch):
    """A pickle is read where that is said, and gives the same file as its arrays; what is no statistics is refused."""
    _, envs, args, _ = imported("normalized")
    pkl = args.vecnormalize.replace(".npz", ".pkl")

    def tell(path, **flags):
        with pytest.raises(SystemExit) as stopped:
            import_teacher.main(import_teacher.Args(
                args.agent, "Hopper-v4", str(tmp_path / "t.safetensors"), vecnormalize=str(path), eval_episodes=2, **flags))
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and not list(tmp_path.glob("*.safetensors"))
        return error

    assert "--trust-pickle" in tell(pkl) and "numpy.savez" in tell(pkl)
    np.savez(tmp_path / "short.npz", mean=np.zeros(3), var=np.ones(3))
    assert "not of the shape (11,)" in tell(tmp_path / "short.npz")
    np.savez(tmp_path / "nan.npz", mean=np.full(11, np.nan), var=np.ones(11))
    assert "its mean is not finite" in tell(tmp_path / "nan.npz")
    np.savez(tmp_path / "objects.npz", mean=np.array([{}] * 11, object), var=np.ones(11))
    assert "allow_pickle" in tell(tmp_path / "objects.npz")
    np.savez(tmp_path / "half.npz", mean=np.zeros(11))
    envs.norm_obs = False
    envs.save(tmp_path / "plain.pkl")
    envs.norm_obs = True
    assert "leave out --vecnormalize" in tell(tmp_path / "plain.pkl", trust_pickle=True)
    np.savez(tmp_path / "unclipped.npz", **dict(np.load(args.vecnormalize)) | {"clip_obs": np.inf})
    free = str(tmp_path / "unclipped.safetensors")
    import_teacher.main(import_teacher.Args(args.agent, "Hopper-v4", free, vecnormalize=str(tmp_path / "unclipped.npz"), eval_episodes=2))
    assert evaluate.load_policy(free)
    os.remove(free)
    assert "'var'" in tell(tmp_path / "half.npz") and "holds no statistics" in tell(args.agent, trust_pickle=True)
    out = str(tmp_path / "pickled.safetensors")
    import_teacher.main(import_teacher.Args(args.agent, "Hopper-v4", out, vecnormalize=pkl, trust_pickle=True, eval_episodes=2))
    ours, before = (ppd_mujoco.read_file(path)[1] for path in (out, args.out))
    assert all((ours[name] == before[name]).all() for name in before) and ours.keys() == before.keys()


def test_torch_is_asked_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(import_teacher.importlib.util, "find_spec", lambda name: None)
    with zipfile.ZipFile(tmp_path / "agent.zip", "w") as file:
        file.writestr("data", "{}")
    assert "pip install torch" in refusal(capsys, tmp_path / "agent.zip", "CartPole-v1", folder=tmp_path)


@pytest.mark.parametrize(("env_id", "flag", "value"), [("Hopper-v4", "num_levels", 5), ("Pong-v5", "contact_forces", False),
                                                       ("CartPole-v1", "frame_skip", 1)])
def test_flags_of_another_suite_are_refused(env_id, flag, value, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        import_teacher.main(import_teacher.Args("agent.zip", env_id, str(tmp_path / "out"), **{flag: value}))
    assert stopped.value.code == 2 and f"--{flag.replace('_', '-')} is not for {env_id}" in capsys.readouterr().err


def test_flags(tmp_path, capsys):
    (tmp_path / "there").touch()
    assert "it exists" in refusal(capsys, "agent.zip", "CartPole-v1", out="there", folder=tmp_path)
    with pytest.raises(SystemExit):
        import_teacher.check(import_teacher.Args("agent.zip", "CartPole-v1", out=""))
    assert "cannot write" in capsys.readouterr().err
    assert "no folder" in refusal(capsys, "agent.zip", "CartPole-v1", out="no/where", folder=tmp_path)
    assert "No such file" in refusal(capsys, "agent.zip", "CartPole-v1", folder=tmp_path)
    with pytest.raises(SystemExit):
        import_teacher.main(import_teacher.Args("agent.zip", "Pong-v5", str(tmp_path / "t"), frame_skip=0))
    assert "--frame-skip must lie between 1 and 100" in capsys.readouterr().err


class Torso(nn.Module):
    """Nature-CNN as CleanRL's JAX scripts have it."""

    @nn.compact
    def __call__(self, x):
        x = jnp.transpose(x, (0, 2, 3, 1)) / 255.0
        for features, size, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            x = nn.relu(nn.Conv(features, (size, size), (stride, stride), "VALID", bias_init=nn.initializers.normal(0.1))(x))
        return nn.relu(nn.Dense(512)(x.reshape(len(x), -1)))


def made_up_cleanrl():
    """Content of a file as CleanRL's PPO writes it: flags, and parameters of the network, the actor and the critic."""
    keys, x = jax.random.split(jax.random.PRNGKey(0), 3), jnp.zeros((1, 4, 84, 84))
    torso, actor, critic = Torso(), nn.Sequential([nn.Dense(6)]), nn.Sequential([nn.Dense(1)])
    features = torso.init(keys[0], x)
    heads = [{"params": {"Dense_0": head.init(key, jnp.zeros((1, 512)))["params"]["layers_0"]}}
             for head, key in ((actor, keys[1]), (critic, keys[2]))]
    return flax.serialization.to_bytes([{"env_id": "Pong-v5", "seed": 1}, [features, *heads]]), features, heads


@pytest.fixture(scope="module")
def cleanrl():
    return made_up_cleanrl()


def test_cleanrl(cleanrl, tmp_path, capsys):
    """Logits and values of 100 random images, to 1e-5, by the scripts' own networks."""
    content, features, heads = cleanrl
    (tmp_path / "ppo.cleanrl_model").write_bytes(content)
    out = str(tmp_path / "teacher.safetensors")
    import_teacher.main(import_teacher.Args(str(tmp_path / "ppo.cleanrl_model"), "Pong-v5", out, eval_episodes=2))
    assert "Pong-v5 teacher, -2" in capsys.readouterr().out
    x = np.random.default_rng(0).integers(0, 256, (100, 4, 84, 84), np.uint8)
    hidden = Torso().apply(features, x)
    teacher = student_distill.load_teacher(student_distill.Args(teacher=out))
    for network, name, head in zip((teacher.policy, student_distill.Value(teacher.policy.network)), ("policy", "value"), heads, strict=True):
        theirs = nn.Dense(6 if name == "policy" else 1).apply({"params": head["params"]["Dense_0"]}, hidden)
        np.testing.assert_allclose(apply(network, teacher.params[name], None, x).reshape(100, -1), theirs, rtol=1e-4, atol=1e-5)
    assert ppd_atari.load_teacher(ppd_atari.Args(teacher=out)).policy.network.hidden == (512,)
    agent = import_teacher.read_agent(str(tmp_path / "ppo.cleanrl_model"), [4, 84, 84])  # as it is evaluated
    theirs = nn.Dense(6).apply({"params": heads[0]["params"]["Dense_0"]}, hidden)
    np.testing.assert_allclose(import_teacher.policy_outputs(agent.policy, x, agent.activation), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_weights_of_another_type(dtype, cleanrl, tmp_path):
    """They are float32 in the model file, which no script would take else."""
    _, features, heads = cleanrl
    (tmp_path / "x").write_bytes(flax.serialization.to_bytes([{}, jax.tree.map(lambda x: np.asarray(x, dtype), [features, *heads])]))
    agent = import_teacher.read_agent(str(tmp_path / "x"), [4, 84, 84])
    assert {x.dtype for x in jax.tree.leaves((agent.policy, agent.value))} == {np.dtype(np.float32)}


def test_files_that_are_no_cleanrl_model(cleanrl, tmp_path, capsys):
    content, features, heads = cleanrl
    path = tmp_path / "ppo.cleanrl_model"
    dqn = flax.serialization.to_bytes(features)
    deep = flax.serialization.to_bytes([{}, [{"params": features["params"] | {"Dense_1": features["params"]["Dense_0"]}}, *heads]])
    small = flax.serialization.to_bytes([{}, [{"params": features["params"] | {"Conv_0": features["params"]["Conv_1"]}}, *heads]])
    column = jax.tree.map(lambda x: x[:, None] if x.ndim == 1 else x, heads)
    matrix = flax.serialization.to_bytes([{}, [features, *column]])
    for wrong in (b"", content[:5000], content[:-1], b"\xc1" * 100, dqn, deep, small, matrix, flax.serialization.to_bytes([1, 2]), b"\x93\x01\x02\x03"):
        path.write_bytes(wrong)
        assert "is no agent of stable-baselines3 or CleanRL for Pong-v5" in refusal(capsys, path, "Pong-v5", folder=tmp_path)
    path.write_bytes(content)
    refusal(capsys, path, "Hopper-v4", folder=tmp_path)
