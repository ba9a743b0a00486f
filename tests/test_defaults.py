"""The paper's default of every hyperparameter, for every task and script, in one table (appendix A)."""

import json

import pytest
from conftest import ROOT, needs_procgen

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
        "total_timesteps": 30_000_000 if env_id in PROCGEN else 10_000_000, "contact_forces": True if env_id == "Humanoid-v4" else None}


def ppd(env_id):
    return PPO | STUDENT | suite_flags(env_id) | {
        "num_steps": 64, "num_minibatches": 3, "gamma": 0.995 if env_id in SLOW else 0.999, "distill_coef": 1.0,
        "distill_coef_final": None}


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
              "wandb_entity", "teacher_noise_seed", "hidden", "channels", "student_hidden", "student_channels"}
    inherited = set() if m is train_teacher else {"frame_skip", "start_level", "num_levels", "contact_forces"}  # from the teacher's file
    assert set(m.Args.__dataclass_fields__) - table - others - inherited == set()


@pytest.mark.parametrize(("env_id", "flags"), [
    ("Pong-v5", {"frame_skip": 1}),
    pytest.param("CoinrunEasy-v0", {"start_level": 7, "num_levels": 3}, marks=needs_procgen)])
def test_a_student_plays_as_its_teacher_did(env_id, flags, teachers, tmp_path):
    model = train_teacher.load_tree(teachers(env_id), "model")
    train_teacher.save_tree(tmp_path / "teacher", "model", model | {"args": model["args"] | flags})
    own = ppd_atari if env_id == "Pong-v5" else ppd_procgen
    for m in (own, student_distill, teacher_distill):
        args = m.load_teacher(m.Args(teacher=str(tmp_path / "teacher")))[0]
        assert all(getattr(args, name) == value for name, value in flags.items() if hasattr(args, name))
        asked = m.load_teacher(m.Args(teacher=str(tmp_path / "teacher"), **({"frame_skip": 2} if hasattr(args, "frame_skip") else {})))[0]
        assert getattr(asked, "frame_skip", 2) == 2


@pytest.mark.parametrize("m", [ppd_mujoco, student_distill, teacher_distill])
def test_a_student_feels_the_contact_forces_that_its_teacher_felt(m, tmp_path):
    """A teacher from before there was the flag learned from zeros in their place."""
    model = train_teacher.load_tree(ROOT / "teachers/Humanoid-v4__100.msgpack", "model")
    model["args"].pop("contact_forces", None)
    for told, expected in (({}, False), ({"contact_forces": True}, True), ({"contact_forces": "yes"}, False)):
        train_teacher.save_tree(tmp_path / "teacher", "model", model | {"args": model["args"] | told})
        assert m.load_teacher(m.Args(teacher=str(tmp_path / "teacher")))[0].contact_forces is expected
        assert m.load_teacher(m.Args(teacher=str(tmp_path / "teacher"), contact_forces=True))[0].contact_forces is True
    assert m.load_teacher(m.Args(env_id="Hopper-v4"))[0].contact_forces is None


def test_an_evaluation_unlike_the_training_says_so(tmp_path, capsys):
    for told in (False, None):
        evaluate.main(evaluate.Args(model=str(ROOT / "teachers/Humanoid-v4__100.msgpack"), episodes=1, contact_forces=told, json=str(tmp_path / "x")))
        assert ("this is without contact forces, unlike its training" in capsys.readouterr().out) is (told is False)
        assert json.loads((tmp_path / "x").read_text())["contact_forces"] is (told is None)
