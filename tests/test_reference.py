"""The reference's PPD from our teachers: the moved teacher is the same policy, and the file says what was run."""

import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]  # not from conftest.py, which needs JAX
sys.path.insert(0, str(ROOT / "benchmark"))
import reference  # noqa: E402

TASKS = ["Ant-v4", "HalfCheetah-v4", "Hopper-v4", "Humanoid-v4", "Swimmer-v4"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is out of date:DeprecationWarning")  # v4: the paper's


def test_act_by_hand():
    """Two observations, one of them clipped; two hidden units, of which the ReLU stops one."""
    arrays = {"obs_stats/mean": np.array([1.0, 0.0]), "obs_stats/var": np.array([4.0, 1.0]),
              "policy/params/Dense_0/kernel": np.array([[1.0, -1.0], [0.5, 0.0]]), "policy/params/Dense_0/bias": np.array([0.0, 1.0]),
              "policy/params/Dense_1/kernel": np.array([[2.0], [100.0]]), "policy/params/Dense_1/bias": np.array([-1.0])}
    observation = np.array([7.0, 1000.0])  # normalised: 3 and 10; hidden: 8 and -2
    np.testing.assert_allclose(reference.normalize(arrays, observation), [3, 10], rtol=1e-6)
    np.testing.assert_allclose(reference.act(arrays, observation), [15], rtol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_the_weights_by_the_other_library_s_names_give_the_same_actions(task):
    about, arrays = reference.read_model(ROOT / f"teachers/{task}__100.safetensors")
    moved = reference.sb3_arrays(arrays)
    assert about["network"]["hidden"] == [256, 256] and len(moved) == 13
    observations = reference.random_observations(arrays, 1000)
    x = reference.normalize(arrays, observations)
    assert np.abs(x).max() == 10 and 2.5 < x[:, arrays["obs_stats/var"] > 1e-6].std() < 3.1
    for name in ("mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2"):
        x = np.maximum(x @ moved[f"{name}.weight"].T + moved[f"{name}.bias"], 0)
    x = x @ moved["action_net.weight"].T + moved["action_net.bias"]
    np.testing.assert_allclose(x, reference.act(arrays, observations), rtol=1e-5, atol=1e-5)
    assert moved["value_net.weight"].shape == (1, 256) and moved["mlp_extractor.value_net.2.weight"].shape == (256, 256)
    assert (moved["log_std"] == arrays["policy/params/log_std"]).all()


def test_evaluation_takes_the_first_episode_of_each_environment():
    """Hopper's teacher, by numpy alone, returns in Gymnasium what its file says of envpool; a limp body falls after 133 to 198 steps."""
    about, arrays = reference.read_model(ROOT / "teachers/Hopper-v4__100.safetensors")

    class Policy:
        def predict(self, x, deterministic):
            assert deterministic
            raw = x * np.sqrt(arrays["obs_stats/var"] + 1e-8) + arrays["obs_stats/mean"]
            return np.clip(reference.act(arrays, raw), -1, 1), None

    found = reference.evaluate(reference.Args("", eval_episodes=3), arrays, Policy())
    assert len(found["returns"]) == 3 and found["mean"] == pytest.approx(np.mean(found["returns"]))
    assert found["mean"] == pytest.approx(about["evaluation"]["mean"], rel=0.01)

    class Limp:
        def predict(self, x, deterministic):
            return np.zeros((len(x), 3)), None

    alone, lengths = [0.0] * 3, [0] * 3
    for i in range(3):
        env, done = gymnasium.make("Hopper-v4"), False
        env.reset(seed=10**9 + reference.Args.seed + i)
        while not done:
            _, reward, terminated, truncated, _ = env.step(np.zeros(3))
            alone[i], lengths[i], done = alone[i] + reward, lengths[i] + 1, terminated or truncated
    assert len(set(lengths)) > 1
    assert reference.evaluate(reference.Args("", eval_episodes=3), arrays, Limp())["returns"] == alone


def test_the_command_in_the_file_names_what_is_not_the_default():
    args = reference.Args("elsewhere/sb3_distill", "Ant-v4", "larger", 200)
    command = "python benchmark/reference.py --reference FOLDER --env-id Ant-v4 --student-size larger --seed 200"
    assert reference.command_line(args) == command
    args = reference.Args("elsewhere/sb3_distill", "Ant-v4", "larger", 200, total_timesteps=1152)
    assert reference.command_line(args) == command + " --total-timesteps 1152"
    args = reference.Args("elsewhere/sb3_distill", "Ant-v4", "larger", 200, Path("elsewhere/teacher.safetensors"))
    assert reference.command_line(args) == command + " --teacher teacher.safetensors"


@pytest.mark.parametrize(("flags", "message"), [
    ({"reference": "elsewhere"}, "elsewhere is no checkout of sb3_distill"),
    ({"env_id": "Walker2d-v4"}, "Walker2d-v4__100.safetensors; name a teacher of Walker2d-v4 with --teacher"),
    ({"env_id": "Ant-v4", "teacher": "tanh"}, "tanh is a teacher of Hopper-v4, not of Ant-v4"),
    ({"teacher": "tanh"}, "tanh has tanh layers or a value network of other widths"),
])
def test_what_cannot_be_run_is_said(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "sb3_distill.py").write_text("")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "sb3_distill", raising=False)
    about = {"env_id": "Hopper-v4", "network": {"kind": "mlp", "hidden": [64, 64], "activation": "tanh"}}
    (tmp_path / "tanh").touch()
    if "teacher" in flags:
        monkeypatch.setattr(reference, "read_model", lambda path: (about, {}))
        flags = flags | {"teacher": tmp_path / "tanh"}
    with pytest.raises(SystemExit) as ended:
        reference.main(reference.Args(**{"reference": str(tmp_path)} | flags))
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_discounts_are_the_papers():
    assert [reference.gamma_of(task) for task in TASKS] == [0.999, 0.999, 0.995, 0.999, 0.995]


@pytest.mark.sb3
@pytest.mark.parametrize("task", TASKS)
def test_the_moved_teacher_acts_as_ours(task):
    about, arrays = reference.read_model(ROOT / f"teachers/{task}__100.safetensors")
    envs = reference.make_envs(task, arrays)
    teacher = reference.make_teacher(about, arrays, envs)  # it compares 1,000 actions itself
    assert teacher.policy.optimizer.defaults["eps"] == 1e-5
    before = envs.obs_rms.mean.copy()
    envs.reset()
    envs.step(np.zeros((18, about["action_dim"])))
    assert (envs.obs_rms.mean == before).all() and envs.ret_rms.count > 18  # rewards alone are learned about


@pytest.mark.sb3
def test_a_teacher_that_was_moved_wrongly_is_refused(monkeypatch):
    about, arrays = reference.read_model(ROOT / "teachers/Hopper-v4__100.safetensors")
    right = reference.sb3_arrays(arrays)
    monkeypatch.setattr(reference, "sb3_arrays", lambda _: right | {"action_net.bias": right["action_net.bias"] + np.float32(0.01)})
    with pytest.raises(AssertionError, match="acts differently"):
        reference.make_teacher(about, arrays, reference.make_envs("Hopper-v4", arrays))


@pytest.mark.sb3
def test_the_program_runs_and_writes_its_file(tmp_path):
    """PPO stands in for PPD, as sb3_distill is no package: what is tested is all around it."""
    (tmp_path / "sb3_distill.py").write_text(
        "from stable_baselines3 import PPO\n\n\nclass ProximalPolicyDistillation(PPO):\n"
        "    def set_teacher(self, teacher, distill_lambda):\n        assert distill_lambda == 1.0\n")
    flags = ["--reference", tmp_path, "--total-timesteps", "2304", "--eval-episodes", "2", "--json", tmp_path / "a/b.json"]
    done = subprocess.run([sys.executable, "benchmark/reference.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a/b.json").read_text())
    assert found["steps"] == 2304 and [point["steps"] for point in found["curve"]] == [1152, 2304]
    assert found["teacher"]["mean"] > 3400 > found["student"]["mean"] and len(found["student"]["returns"]) == 2
    assert found["ratio"] == found["student"]["mean"] / found["teacher"]["mean"] and found["curve"][0]["kl"] > 100
    assert str(tmp_path) not in json.dumps(found)


def test_committed_files_are_whole():
    for path in (ROOT / "benchmark/results/reference").glob("*.json"):
        found = json.loads(path.read_text())
        assert path.stem == f"{found['env_id']}__{found['student_size']}__{found['seed']}"
        assert found["command"].startswith("python benchmark/reference.py --reference FOLDER") and found["steps"] == 2_001_024
        for player in ("teacher", "student"):
            returns = found[player]["returns"]
            assert len(returns) == 50 and found[player]["mean"] == pytest.approx(np.mean(returns))
            assert found[player]["std"] == pytest.approx(np.std(returns))
