"""The paper's default of every hyperparameter, for every task and script, in one table (appendix A)."""

import jax
import numpy as np
import pytest
from conftest import ROOT, first_call, needs_procgen
from test_learning import made_up_teacher

import evaluate
import ppd_atari
import ppd_mujoco
import ppd_procgen
import student_distill
import teacher_distill
import train_teacher

ATARI = [f"{game}-v5" for game in ("Atlantis", "BeamRider", "CrazyClimber", "DemonAttack", "Enduro", "Freeway", "MsPacman", "Pong",
                                   "Qbert", "Seaquest", "Zaxxon")]
PROCGEN = [f"{game}Easy-v0" for game in ("Coinrun", "Jumper", "Miner", "Ninja")]
MUJOCO = [f"{robot}-v4" for robot in ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Swimmer")]
SLOW = ("Hopper-v4", "Swimmer-v4")  # the two tasks that differ from their suite
ALL = {"learning_rate": 3e-4, "num_envs": 18, "vf_coef": 0.5, "max_grad_norm": 0.5}
PPO = ALL | {"update_epochs": 4, "gae_lambda": 0.9, "clip_coef": 0.2}
STUDENT = {"total_timesteps": 2_000_000, "student_size": "larger", "kl_direction": "forward", "teacher_noise_std": 0.0, "ent_coef": 0.0}
PPD = {ppd_atari: ATARI, ppd_mujoco: MUJOCO, ppd_procgen: PROCGEN}


def suite_flags(env_id):
    return {"eval_episodes": 200 if env_id in PROCGEN else 50}


def teacher(env_id):
    steps = 256 if env_id in (*ATARI, *SLOW) else 512
    return PPO | suite_flags(env_id) | {
        "num_steps": steps, "num_minibatches": 18 * steps // 512, "gamma": 0.995, "size": "same", "frame_skip": 4, "start_level": 0,
        "num_levels": 200, "ent_coef": 0.01 if env_id in (*ATARI, *PROCGEN, *SLOW) else 0.0,
        "total_timesteps": 30_000_000 if env_id in PROCGEN else 10_000_000, "contact_forces": True, "repeat_action_probability": 0.0}


def ppd(env_id):
    return PPO | STUDENT | suite_flags(env_id) | {
        "num_steps": 64, "num_minibatches": 3, "gamma": 0.995 if env_id in SLOW else 0.999, "distill_coef": 1.0,
        "distill_coef_final": None, "distill_weight": "ratio"}


def baseline(env_id):
    return ALL | STUDENT | suite_flags(env_id) | {"num_steps": 5}


TABLE = [(train_teacher, env_id, teacher(env_id)) for env_id in (*ATARI, *MUJOCO, *PROCGEN)]
TABLE += [(m, env_id, ppd(env_id)) for m, tasks in PPD.items() for env_id in tasks]
TABLE += [(m, env_id, baseline(env_id)) for m in (student_distill, teacher_distill) for env_id in (*ATARI, *MUJOCO, *PROCGEN)]


@pytest.mark.parametrize(("m", "env_id", "expected"), [pytest.param(*row, id=f"{row[0].__name__}-{row[1]}") for row in TABLE])
def test_defaults_are_the_paper_s(m, env_id, expected):
    args = m.resolve(m.Args(env_id=env_id))
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("m", [train_teacher, ppd_atari, ppd_mujoco, ppd_procgen, student_distill, teacher_distill])
def test_the_table_covers_every_flag_of_learning(m):
    table = {name for script, _, expected in TABLE if script is m for name in expected}
    others = {"env_id", "seed", "device", "teacher", "run_dir", "resume", "checkpoint_every", "log_every", "track", "wandb_project_name",
              "wandb_entity", "teacher_noise_seed", "hidden", "channels", "student_hidden", "student_channels", "num_devices"}
    inherited = set() if m is train_teacher else {"frame_skip", "start_level", "num_levels", "repeat_action_probability"}  # from the teacher's file
    assert set(m.Args.__dataclass_fields__) - table - others - inherited == set()


def played(m, monkeypatch, **flags):
    """How a script's environments would be played."""
    (_, _, _, variant, *_), _ = first_call(monkeypatch, m, "make_envs", lambda: m.main(m.Args(**flags)))
    return variant


@pytest.mark.parametrize(("env_id", "variant"), [
    ("Pong-v5", {"frame_skip": 1, "repeat_action_probability": 0.25}),
    pytest.param("CoinrunEasy-v0", {"start_level": 7, "num_levels": 3}, marks=needs_procgen)])
def test_a_student_plays_as_its_teacher_did_unless_told_otherwise(env_id, variant, tmp_path, monkeypatch):
    path = made_up_teacher(env_id, tmp_path / "teacher.safetensors", variant)
    for m in (ppd_atari if env_id == "Pong-v5" else ppd_procgen, student_distill, teacher_distill):
        assert played(m, monkeypatch, teacher=str(path)) == variant
        name, value = ("frame_skip", 2) if env_id == "Pong-v5" else ("num_levels", 5)
        assert played(m, monkeypatch, teacher=str(path), **{name: value}) == variant | {name: value}


@pytest.mark.parametrize("m", [ppd_mujoco, student_distill])
@pytest.mark.parametrize("contact_forces", [False, True])
def test_a_student_feels_the_contact_forces_that_its_teacher_felt(m, contact_forces, tmp_path, monkeypatch):
    about, arrays = train_teacher.read_file(ROOT / "teachers/Humanoid-v4__100.safetensors")
    path, variant = tmp_path / "teacher.safetensors", {"contact_forces": contact_forces}
    train_teacher.save_file(path, about | {"variant": variant}, arrays)
    assert played(m, monkeypatch, teacher=str(path)) == variant


def test_an_evaluation_plays_as_the_file_says(tmp_path, monkeypatch):
    for contact_forces in (False, True):
        model = made_up_teacher("Humanoid-v4", tmp_path / "model", {"contact_forces": contact_forces})
        assert played(evaluate, monkeypatch, model=str(model)) == {"contact_forces": contact_forces}
    variant = {"frame_skip": 2, "repeat_action_probability": 0.25}
    model = made_up_teacher("Pong-v5", tmp_path / "model", variant)
    assert played(evaluate, monkeypatch, model=str(model)) == variant
    asked = played(evaluate, monkeypatch, model=str(model), repeat_action_probability=0.0)
    assert asked == variant | {"repeat_action_probability": 0.0}


def test_a_teacher_observes_contact_forces_unless_told_otherwise(monkeypatch):
    m = train_teacher
    assert played(m, monkeypatch, env_id="Humanoid-v4") == {"contact_forces": True}
    assert not m.parse_args(["--env-id", "Humanoid-v4", "--no-contact-forces"]).contact_forces
    assert played(m, monkeypatch, env_id="Humanoid-v4", contact_forces=False) == {"contact_forces": False}


@pytest.mark.parametrize("m", [ppd_atari, train_teacher])
def test_sticky_actions_reach_the_simulator(m):
    """The same seed and actions give another game where the last action is repeated now and then."""
    split = () if m is ppd_atari else ("evaluation",)
    seen = []
    for probability in (0.0, 0.0, 0.25):
        envs = m.make_envs("Pong-v5", 1, 0, {"frame_skip": 4, "repeat_action_probability": probability}, *split)
        rng = np.random.default_rng(0)
        m.reset(envs)
        seen.append([m.step(envs, rng.integers(0, 6, 1).astype(np.int32))[0].sum() for _ in range(60)])
    assert seen[0] == seen[1] != seen[2]


@pytest.mark.parametrize("m", [*PPD, student_distill, teacher_distill])
def test_without_a_flag_a_shipped_teacher_teaches(m):
    teacher = m.load_teacher(m.Args())
    assert teacher.about["role"] == "teacher" and teacher.about["env_id"] in PPD.get(m, MUJOCO)


@pytest.mark.parametrize("m", [train_teacher, ppd_atari, student_distill])
def test_a_run_that_will_take_hours_without_a_gpu_says_so_at_once(m, capsys):
    def told(size, first, dtype=np.uint8):
        flag = "size" if m is train_teacher else "student_size"
        args = m.resolve(m.Args(env_id="Pong-v5", total_timesteps=10**7, num_devices=1, **{flag: size}))
        policy, x = m.Policy(args.network, 6), np.zeros((18, 4, 84, 84), dtype)
        params = jax.eval_shape(policy.init, jax.random.PRNGKey(0), x[0])
        m.warn_if_slow(args, round(first * args.num_updates), policy, params, x)
        return capsys.readouterr().err

    whole, rest = (float(told("same", first).split()[6]) for first in (0, 0.5))
    assert whole > 20 and rest == pytest.approx(whole / 2, abs=1)
    assert told("same", 0).endswith("-size smaller\n") and not told("same", 1) and not told("same", 0, np.float32)
    assert told("smaller", 0).endswith(" hours\n")  # nothing smaller is left to try
