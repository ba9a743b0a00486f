"""Makes the scripts importable, keeps the tests on the CPU, where they are exact, and compiles each program only once."""

import csv
import functools
import gc
import importlib.util
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # small programs are many
FLAGS = "--xla_backend_optimization_level=0"  # the tests compile more than they compute
if version("jax") < "0.11":  # newer XLA does not know this flag, and would end the process
    FLAGS += " --xla_cpu_use_fusion_emitters=false"  # fusions by LLVM, not MLIR: half the time
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # over which ppd_gymnax.py spreads its seeds
sys.path.insert(0, str(ROOT))

import envpool  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

import ppd_atari  # noqa: E402
import ppd_mujoco  # noqa: E402
import ppd_procgen  # noqa: E402
import student_distill  # noqa: E402
import teacher_distill  # noqa: E402
import train_teacher  # noqa: E402

gc.freeze()  # what is imported lasts, and need not be looked through time and again
envpool.make_spec = functools.lru_cache(envpool.make_spec)  # Atari's loads the game each time

try:
    envpool.make_gymnasium("CoinrunEasy-v0", num_envs=1).close()
    HAS_PROCGEN = True
except ImportError:
    HAS_PROCGEN = False

LACKS = [name for name in ("torch", "stable_baselines3") if importlib.util.find_spec(name) is None]
needs_procgen = pytest.mark.skipif(not HAS_PROCGEN, reason="Procgen needs Qt: apt-get install libqt5gui5")


def pytest_collection_modifyitems(items):
    """Puts first what waits most, and skips what is marked with sb3 where it is not installed."""
    items.sort(key=lambda item: item.path.name != "test_slurm.py")
    for item in items if LACKS else ():
        if item.get_closest_marker("sb3"):
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(LACKS)}: pip install -r requirements-sb3.txt"))


def on(m, *tasks):
    """Parameters (script, task), skipped where the task cannot be played."""
    return [pytest.param(m, task, marks=[needs_procgen] if task.startswith("Coinrun") else [], id=f"{m.__name__}-{task}")
            for task in tasks]


EVERYWHERE = ("Hopper-v4", "Pong-v5", "CoinrunEasy-v0")
PPD = [*on(ppd_mujoco, "Hopper-v4"), *on(ppd_atari, "Pong-v5"), *on(ppd_procgen, "CoinrunEasy-v0")]
# The baselines differ only in who acts, as test_shared_blocks.py holds, so each is tried on states or on images
STUDENTS = [*PPD, *on(student_distill, "Hopper-v4"), *on(teacher_distill, "Pong-v5")]
RUNS = [*on(train_teacher, *EVERYWHERE), *STUDENTS]


def small(m, env_id, folder, **flags):
    """Flags of the smallest run with three updates (50 of the baselines' shorter ones)."""
    images = not env_id.endswith("v4")
    updates, steps = (50, 5) if m in (student_distill, teacher_distill) else (3, 16)
    network = {"hidden": (8,)} | ({"channels": (4, 4, 4), "size": "smaller"} if images else {})
    if m is not train_teacher:
        network = {f"student_{name}": value for name, value in network.items()}
    defaults = {"env_id": env_id, "total_timesteps": updates * steps * 4, "num_envs": 4, "num_steps": steps,
                "eval_episodes": 2 if env_id == "Hopper-v4" else 1}
    return m.Args(run_dir=str(folder), **(defaults | network | flags))


def small_gymnax(folder, **flags):
    """Flags of a small run of ppd_gymnax.py: four updates of one teacher, and then of one student."""
    import ppd_gymnax  # its import makes JAX settle its devices

    return ppd_gymnax.Args(**({
        "env_id": "CartPole-v1", "num_seeds": 1, "num_envs": 4, "num_steps": 16, "num_minibatches": 2, "teacher_num_steps": 16,
        "teacher_timesteps": 256, "total_timesteps": 256, "student_hidden": (8,), "eval_episodes": 2, "run_dir": str(folder)} | flags))


def words(args):
    """The command line that says what these flags say."""
    fields = type(args).__dataclass_fields__
    said = {name: value for name, value in vars(args).items() if value != fields[name].default}
    return [word for name, value in said.items() for word in (
        (f"--{'' if value else 'no-'}{name.replace('_', '-')}",) if isinstance(value, bool) else
        (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value])))]


def first_call(monkeypatch, where, name, begin):
    """The arguments and keywords of the first call of a function, which ends what began."""

    class Called(Exception):
        pass

    def call(*args, **options):
        raise Called(args, options)

    with monkeypatch.context() as patch, pytest.raises(Called) as called:
        patch.setattr(where, name, call)
        begin()
    return called.value.args


def go_on(m, folder, *flags):
    """What `python {script} --resume {folder}` does, with further flags."""
    return m.main(m.parse_args(["--resume", str(folder), *map(str, flags)]))


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def rows(folder):
    return read_csv(folder / "progress.csv")


def without_timing(folder):
    """The rows of a run, but for what differs each time."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "charts/SPS")} for row in rows(folder)]


def checkpoints(folder):
    """From the oldest to the newest."""
    return sorted(Path(folder).glob("checkpoint_*.safetensors"))


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    """Small teachers of the three suites, trained for two updates: real model files, at once."""
    files = {}

    def get(env_id):
        if env_id not in files:
            folder = tmp_path_factory.mktemp("teacher") / "run"
            hidden = {"hidden": (8, 8)} if env_id == "Hopper-v4" else {}
            train_teacher.main(small(train_teacher, env_id, folder, total_timesteps=2 * 4 * 16, **hidden))
            files[env_id] = folder / "teacher.safetensors"
        return files[env_id]

    return get


@pytest.fixture(scope="session")
def tiny_teacher(teachers):
    """A Hopper teacher with two layers of 8."""
    return teachers("Hopper-v4")


@pytest.fixture(scope="session")
def gymnax_run(tmp_path_factory):
    """The folder of a small run of ppd_gymnax.py, with its teacher and its student."""
    folders = []

    def get():
        if not folders:
            import ppd_gymnax

            folders.append(tmp_path_factory.mktemp("gymnax") / "run")
            ppd_gymnax.main(small_gymnax(folders[0]))
        return folders[0]

    return get


@pytest.fixture(autouse=True)
def own_signals():
    """Takes back the handlers that a script has set: Ctrl-C is pytest's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def free_programs():
    """Drops compiled programs once they hold many of the memory mappings that a process may have (65,530 on Linux)."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
