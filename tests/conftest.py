"""Makes the scripts importable, keeps the tests on the CPU, where they are exact, and compiles each program only once."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

import train_teacher  # noqa: E402


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """A Hopper teacher with two layers of 8, trained for two updates: a real model file, at once."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train_teacher.main(train_teacher.Args(env_id="Hopper-v4", total_timesteps=2 * 4 * 16, num_envs=4, num_steps=16,
                                          hidden=(8, 8), eval_episodes=2, run_dir=str(folder)))
    return folder / "teacher.msgpack"
