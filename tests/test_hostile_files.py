"""Whatever bytes a model file or a checkpoint has: one line on stderr and exit code 2, or a model that can be used.

Cut short, with a flipped bit, foreign, or with a right checksum over wrong content: nothing raises another exception, takes
memory that the file does not have, or runs code.
"""

import contextlib
import copy
import hashlib
import io
import os
import pickle
import resource
from collections import deque

import jax
import msgpack
import numpy as np
import pytest
from conftest import needs_procgen, small
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import ppd_atari
import ppd_gymnax
import ppd_mujoco
import ppd_procgen
import student_distill
import teacher_distill
import train_teacher

quick = settings(max_examples=25, deadline=None, database=None, derandomize=True)


class Reader:
    """How one script reads one kind of file: calling it gives None where the content can be used, else the error's line."""

    def __init__(self, kind, whole, read, folder):
        self.kind, self.whole, self.read = kind, whole, read
        self.path = folder / ("checkpoint.msgpack" if kind == "checkpoint" else "model.msgpack")
        self.tree = train_teacher.serialization.msgpack_restore(train_teacher.serialization.msgpack_restore(whole)["payload"])
        self.tried = 0

    def __call__(self, content):
        self.path.write_bytes(content)
        self.tried += 1
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                self.read(self.path)
        except SystemExit as stopped:
            error = stderr.getvalue()
            assert stopped.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
            assert len(error) < 1_100
            return error
        assert stderr.getvalue() == ""
        return None


def sealed(kind, payload, /, **envelope):
    """A file with a right checksum."""
    return msgpack.packb({"format": train_teacher.FORMAT, "version": train_teacher.VERSION, "kind": kind,
                          "sha256": hashlib.sha256(payload).hexdigest(), "payload": payload} | envelope)


def packed(tree):
    return train_teacher.serialization.msgpack_serialize(tree)


def leaves(tree, path=()):
    """Paths to all values of nested dicts and lists, containers included."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield *path, name
        yield from leaves(value, (*path, name))


def replaced(tree, path, value):
    tree = copy.deepcopy(tree)
    inner = tree
    for name in path[:-1]:
        inner = inner[name]
    if value is DELETED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return tree


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


DELETED = object()


def array(shape, dtype, data=b""):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data)))


def nested(times):
    value = 0
    for _ in range(times):
        value = {"a": value}
    return value


# What a value of a file is replaced by
VALUES = {
    "deleted": DELETED, "none": None, "true": True, "minus one": -1, "zero": 0, "large": 2**63 - 1, "half": 0.5, "nan": float("nan"),
    "infinite": float("inf"), "text": "text", "lines": "two\nlines \x1b[31m", "bytes": b"\xff" * 10, "list": [], "dict": {},
    "long list": [1] * 5000, "nested": nested(200), "numbers": np.arange(3), "not finite": np.full((8, 8), np.nan, np.float32),
    "doubles": np.zeros((8, 8)), "complex": 1j, "no numbers": np.array(["a", "b"]), "scalar": np.float32(1.0),
    "huge": array((2**60,), "float32"), "huge and empty": array((0, 2**62), "float32"), "negative": array((-1, -1), "float32"),
    "objects": array((1,), "O", bytes(8)), "void": array((1,), "V0"), "records": array((1,), "f4," * 500, bytes(2000)),
    "dates": array((1,), "datetime64[D]", bytes(8)), "no dtype": array((1,), "nope", bytes(8)), "no array": msgpack.ExtType(1, b""),
    "no complex": msgpack.ExtType(2, b"\x05"), "unknown": msgpack.ExtType(77, b"x"),
    "chunks": {"__msgpack_chunked_array__": True, "shape": {"0": 2**50}, "chunks": {}},
    "chunk": {"__msgpack_chunked_array__": True, "shape": {"0": 2**50}, "chunks": {"0": np.zeros(1, np.float32)}},
}
# What claims to be larger or deeper than it is
RAW = {
    "empty": b"", "array": b"\xdd\xff\xff\xff\xff", "map": b"\xdf\xff\xff\xff\xff", "text": b"\xdb\xff\xff\xff\xff",
    "bytes": b"\xc6\xff\xff\xff\xff", "extension": b"\xc9\xff\xff\xff\xff\x01", "deep lists": b"\x91" * 100_000 + b"\x90",
    "deep maps": b"\x81\xa1a" * 100_000 + b"\x90", "number": b"\x05", "list": b"\x90", "half": b"\x81",
}


class Evil:
    """What pickle would run."""

    def __reduce__(self):
        return os.system, ("touch pickle_was_here",)


def reader_of_models(m, env_id, teachers, gymnax_teacher, folder):
    path = gymnax_teacher if m is ppd_gymnax or env_id == "CartPole-v1" else teachers(env_id)

    def read(path):
        if m is evaluate:
            model, policy, _ = m.load_policy(path)
            m.check_fit(path, model, policy)
            m.make_variant(path, model["args"])
        elif m is ppd_gymnax:
            m.load_teachers(m.resolve(m.Args(env_id=env_id, teacher=str(path))))
        else:
            m.resolve(m.load_teacher(m.Args(env_id=env_id, teacher=str(path)))[0])

    return Reader("model", path.read_bytes(), read, folder)


def reader_of_checkpoints(m, env_id, teachers, gymnax_teacher, folder, make):
    """Reads as main does, up to the first environment; the fresh state that a checkpoint's replaces is made once."""
    flags = {} if m in (train_teacher, ppd_gymnax) else {"teacher": str(teachers(env_id))}
    if m is ppd_gymnax:
        args = make(folder / "run", seed=7)
    else:
        args = small(m, env_id, folder / "run", total_timesteps=1, **flags)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        m.main(args)
    whole = (folder / "run/checkpoint.msgpack").read_bytes()
    (folder / "run/checkpoint_previous.msgpack").unlink()

    def prepare(args):
        if m is train_teacher:
            args = m.resolve(args)
            networks = m.Networks(m.Policy(args.network, 3), m.Value(args.network))
            return args, m.init_state(args, networks, (11,)), None
        if m is ppd_gymnax:
            return m.resolve(args), m.make_networks(args.env_id, m.teacher_args(args).network), None
        args, *found = m.load_teacher(args)
        args = m.resolve(args)
        if m is ppd_mujoco:
            policy, original = found
            networks = m.Networks(m.Policy(args.hidden, policy.action_dim), m.Value(args.hidden), policy)
            return args, m.init_state(args, networks, 11), m.fingerprint(original)
        networks, original, value = found
        return args, m.init_state(args, networks, (11,)), m.fingerprint((original, value))

    template = prepare(m.restore(m.Args(resume=str(folder / "run")))[0])[1:]

    def read(path):
        args, saved = m.restore(m.Args(resume=str(path.parent)))
        if m not in (train_teacher, ppd_gymnax):
            args = m.load_teacher(args)[0]
        args = m.resolve(args)
        if m is ppd_gymnax:
            m.check_saved(args, saved, template[0], None)
        else:
            cursor = m.Cursor(np.zeros((4, 11)), np.zeros(4, bool), np.zeros(4), deque(maxlen=100))
            m.restore_state(args, saved, template[0], cursor, template[1])

    return Reader("checkpoint", whole, read, folder / "run")


MODELS = [(ppd_mujoco, "Hopper-v4"), (teacher_distill, "Hopper-v4"), (student_distill, "Pong-v5"), (ppd_atari, "Pong-v5"),
          (ppd_procgen, "CoinrunEasy-v0"), (evaluate, "Hopper-v4"), (evaluate, "CartPole-v1"), (ppd_gymnax, "CartPole-v1")]
RESUMED = [(train_teacher, "Hopper-v4"), (ppd_mujoco, "Hopper-v4"), (student_distill, "Hopper-v4"), (ppd_gymnax, "CartPole-v1")]
READERS = [pytest.param(kind, m, env_id, id=f"{m.__name__}-{env_id}-{kind}", marks=[needs_procgen] if "Coin" in env_id else [])
           for kind, cases in (("model", MODELS), ("checkpoint", RESUMED)) for m, env_id in cases]


@pytest.fixture(scope="module")
def readers(teachers, tmp_path_factory):
    """Readers by case, each made once."""
    made, gymnax_files = {}, []

    def make_gymnax(folder, **flags):
        return ppd_gymnax.Args(**({
            "env_id": "CartPole-v1", "num_seeds": 1, "num_envs": 4, "num_steps": 16, "num_minibatches": 2, "teacher_num_steps": 16,
            "teacher_timesteps": 64, "total_timesteps": 64, "student_hidden": (8,), "eval_episodes": 1, "run_dir": str(folder)} | flags))

    def get(kind, m, env_id):
        if (kind, m, env_id) not in made:
            if not gymnax_files and env_id == "CartPole-v1":
                folder = tmp_path_factory.mktemp("gymnax") / "run"
                ppd_gymnax.main(make_gymnax(folder))
                gymnax_files.append(folder / "teacher_100.msgpack")
            rest = teachers, gymnax_files[-1] if gymnax_files else None, tmp_path_factory.mktemp("file")
            made[kind, m, env_id] = (
                reader_of_models(m, env_id, *rest) if kind == "model" else reader_of_checkpoints(m, env_id, *rest, make_gymnax))
        return made[kind, m, env_id]

    yield get
    print({f"{kind} {m.__name__} {env_id}": reader.tried for (kind, m, env_id), reader in made.items()})


@pytest.mark.parametrize(("kind", "m", "env_id"), READERS)
def test_bytes_that_are_not_a_file_of_ours(kind, m, env_id, readers, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    reader = readers(kind, m, env_id)
    whole = reader.whole
    assert reader(whole) is None
    rng = np.random.default_rng(0)
    for size in [0, 1, 2, len(whole) - 1, *rng.integers(3, len(whole) - 1, 20)]:
        assert reader(whole[:size]), f"cut to {size} bytes"
    for bit in [*range(0, 8 * 100, 23), *rng.integers(0, 8 * len(whole), 40)]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        assert reader(bytes(flipped)), f"bit {bit} flipped"
    for foreign in (pickle.dumps(Evil()), b"\x89PNG\r\n\x1a\n" * 100, b"PK\x03\x04" * 100, whole + b"\0", rng.bytes(5000)):
        assert reader(foreign)
    other = "model" if kind == "checkpoint" else "checkpoint"
    payload = packed(reader.tree)
    for name, value in (("version", 3), ("version", 10**18), ("version", "2"), ("kind", other), ("kind", ["x"] * 1000), ("format", "other")):
        assert reader(sealed(kind, payload, **{name: value})), (name, value)
    assert "version 3; needed is" in reader(sealed(kind, payload, version=3))
    for name in RAW:
        assert reader(RAW[name]) and reader(sealed(kind, RAW[name])), name
    assert list(tmp_path.iterdir()) == []  # no code has run


@pytest.mark.parametrize(("kind", "m", "env_id"), READERS)
def test_a_right_checksum_over_wrong_content(kind, m, env_id, readers):
    """Each part of the file in turn is replaced; of parameters, shapes and state nothing but the right content will do."""
    reader = readers(kind, m, env_id)
    rng = np.random.default_rng(1)
    paths = list(leaves(reader.tree))
    vital = ("params", "obs_stats", "observation_shape") if kind == "model" else ("state", "updates")
    unread = {"observation_shape"} if m is ppd_gymnax else set() if m in (student_distill, teacher_distill, train_teacher) else {"value"}
    chosen = [path for path in paths if len(path) == 1] + [paths[i] for i in rng.choice(len(paths), min(len(paths), 25), replace=False)]
    names = list(VALUES)
    for i, path in enumerate(chosen):
        for name in names if len(path) == 1 and path[0] in (*vital, "network") else [names[(3 * i + j) % len(names)] for j in range(3)]:
            content = packed(replaced(reader.tree, path, VALUES[name]))
            error = reader(sealed(kind, content))
            harmless = content == packed(reader.tree) or (path, name) == (("updates",), "zero") or kind == "model" and unread & set(path)
            assert error or path[0] not in vital or harmless, f"{path}: {name}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in VALUES:
        reader(sealed(kind, packed(reader.tree | {"params" if kind == "model" else "state": VALUES[name]} if VALUES[name] is not DELETED else {})))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 200 * 1024


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4), max_leaves=10)


@pytest.mark.parametrize(("kind", "m", "env_id"), READERS)
def test_content_that_hypothesis_invents(kind, m, env_id, readers):
    reader = readers(kind, m, env_id)
    paths = list(leaves(reader.tree))

    @quick
    @given(st.sampled_from(paths), anything)
    def replace(path, value):
        reader(sealed(kind, packed(replaced(reader.tree, path, value))))

    @quick
    @given(anything | st.binary(max_size=200))
    def invent(value):
        assert reader(value if isinstance(value, bytes) else msgpack.packb(value))
        assert reader(sealed(kind, value if isinstance(value, bytes) else msgpack.packb(value)))

    replace()
    invent()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("kind", "m", "env_id"), [x for x in READERS if x.values[0] == "model"])
def test_parameters_that_are_not_finite(kind, m, env_id, value, readers):
    """In any one of the policy's arrays."""
    reader = readers(kind, m, env_id)
    for path in leaves(reader.tree):
        found = at(reader.tree, path)
        if path[:2] == ("params", "policy") and isinstance(found, np.ndarray):
            spoiled = found.copy()
            spoiled.flat[-1] = value
            assert "are not all finite" in reader(sealed(kind, packed(replaced(reader.tree, path, spoiled)))), path


def test_a_teacher_of_other_actions_than_its_task_has(readers, tiny_teacher, tmp_path):
    """A consistent network, whose actions envpool would not survive."""
    m, reader = ppd_mujoco, readers("model", ppd_mujoco, "Hopper-v4")
    for shape, actions in (((11,), 1), ((11,), 4), ((12,), 3)):
        policy = m.Policy((8, 8), actions)
        params = jax.tree.map(np.asarray, policy.init(jax.random.PRNGKey(0), np.zeros(shape, np.float32)))
        stats = {"mean": np.zeros(shape, np.float32), "var": np.ones(shape, np.float32), "count": np.ones((), np.float32)}
        tree = reader.tree | {"params": {"policy": params}, "obs_stats": stats, "action_dim": actions, "observation_shape": list(shape)}
        assert f"is for observations and actions of ([{shape[0]}], {actions}); those of Hopper-v4 are ([11], 3)" in reader(
            sealed("model", packed(tree)))
