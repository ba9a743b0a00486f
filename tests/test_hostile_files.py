"""Whatever bytes a model file or a checkpoint has: one line on stderr and exit code 2, or a model that can be used.

Cut short, with a flipped bit, foreign, or with a right checksum over wrong content: nothing raises another exception, takes
memory that the file does not have, writes a file, or runs code.

All scripts read bytes by the same `read_file` (test_shared_blocks.py), for which ppd_mujoco.py stands, with a model and a
checkpoint. What they make of the content differs, so each reader of models is tried with wrong content; teacher_distill.py's
is student_distill.py's. Of the readers of checkpoints ppd_mujoco.py stands for the students that learn by PPO,
student_distill.py for the baselines, train_teacher.py for a run without a teacher, and ppd_gymnax.py for itself.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import re
import shutil
import struct
import time
import zlib
from collections import deque

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import checkpoints, needs_procgen, small, small_gymnax
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import ppd_atari
import ppd_gymnax
import ppd_mujoco
import ppd_procgen
import student_distill
import train_teacher

quick = settings(max_examples=15, deadline=None, database=None, derandomize=True)


class Reached(Exception):
    """The content was taken, and the work would begin."""


class Reader:
    """How one script reads one kind of file: calling it gives None where the content can be used, else the error's line."""

    def __init__(self, path, read):
        self.path, self.read, self.whole = path, read, path.read_bytes()
        self.about, self.arrays = ppd_mujoco.read_file(path)
        self.kept, self.tried = listing(path.parent), 0

    def __call__(self, content):
        folder, stderr = self.path.parent, io.StringIO()
        self.path.write_bytes(content)
        self.tried += 1
        try:
            with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
                self.read(self.path)
        except SystemExit as stopped:
            *notes, error = stderr.getvalue().splitlines(keepends=True)
            assert stopped.code == 2 and error.startswith("error: ") and error.endswith("\n"), (stopped.code, stderr.getvalue())
            assert len(error) < 1_100 and all(note.startswith("going on from ") for note in notes)
            assert listing(folder) == self.kept | {self.path.name: content}
            return error
        except Reached:
            return None
        finally:
            if set(listing(folder)) != set(self.kept):  # a run has begun
                shutil.rmtree(folder)
                folder.mkdir()
                for name, data in self.kept.items():
                    (folder / name).write_bytes(data)
        raise AssertionError("neither taken nor refused")

    def complaints(self, cases):
        """What is wrong with how it takes these contents, by what was changed; vital ones it must refuse."""
        found = []
        for changed, content, vital in cases:
            try:
                if self(content) is None and vital:
                    found.append(f"{changed}: taken")
            except Exception as error:  # what the program would end with
                found.append(f"{changed}: {type(error).__name__} {error}"[:200])
        return found


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sealed(about, arrays):
    """A file with a right checksum."""
    header = {"about": about if isinstance(about, str) else json.dumps(about)}
    header["crc32"] = str(zlib.crc32(safetensors.numpy.save(arrays, header)))
    return safetensors.numpy.save(arrays, header)


def raw(header, data=b"", size=None):
    """A file with this header, which claims to be of that size."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def leaves(tree, path=()):
    """Paths to all values of nested dicts and lists, containers included."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in items:
        yield *path, name
        yield from leaves(value, (*path, name))


DELETED = object()


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


def nested(times):
    value = 0
    for _ in range(times):
        value = {"a": value}
    return value


# What a value of the JSON is replaced by
VALUES = {
    "deleted": DELETED, "none": None, "true": True, "minus one": -1, "zero": 0, "large": 2**63 - 1, "enormous": 10**400, "half": 0.5,
    "nan": float("nan"), "infinite": float("inf"), "text": "text", "lines": "two\nlines \x1b[31m", "list": [], "dict": {},
    "long list": [1] * 5000, "numbers": [8, 8.5], "mixed": [8, "a"], "texts": ["a", "b"], "nested": nested(200),
}
# What an array is replaced by
ARRAYS = {
    "deleted": lambda x: DELETED, "longer": lambda x: np.concatenate([x.reshape(-1), x.reshape(-1)]), "empty": lambda x: x.reshape(-1)[:0],
    "another shape": lambda x: x[None], "doubles": lambda x: x.astype(np.float64), "numbers": lambda x: x.astype(np.int64),
    "booleans": lambda x: x.astype(bool),
}
# Headers that claim what is not so, or are no headers
TENSOR = '{{"dtype":"{}","shape":{},"data_offsets":{}}}'
RAW = {
    "no header": b"", "huge header": raw(b"{}", size=2**63), "large header": raw(b"{}", size=10**8), "a list": raw(b"[]"),
    "deep": raw(b'{"a":' * 50_000), "no UTF-8": raw(b'{"\xff":1}'), "numbers for text": raw(b'{"__metadata__":{"about":5}}'),
    "no text": raw(b'{"__metadata__":{"about":"{"}}'), "deep text": raw(b'{"__metadata__":{"about":"' + b"[" * 100_000 + b'"}}'),
    "a long number": raw(b'{"__metadata__":{"about":"' + b"9" * 100_000 + b'"}}'), "no object": raw(b'{"__metadata__":{"about":"5"}}'),
} | {name: raw(('{"policy/x":' + TENSOR.format(*claim) + "}").encode(), b"12345678") for name, claim in {
    "beyond the end": ("F32", [2**40], [0, 2**42]), "backwards": ("F32", [2], [8, 0]), "overflow": ("F32", [2**62, 4], [0, 8]),
    "huge and empty": ("F32", [0, 2**62], [0, 0]), "many dimensions": ("F32", [1] * 500 + [2], [0, 8]), "negative": ("F32", [-2], [0, 8]),
    "no type": ("O", [1], [0, 8]), "no type of NumPy": ("BF16", [4], [0, 8]), "overlap": ("F32", [1], [2, 6]),
}.items()}


class Evil:
    """What pickle would run."""

    def __reduce__(self):
        return os.system, ("touch pickle_was_here",)


class Envs:
    """In place of envpool's, which trusts its caller; any call that it would not survive fails here."""

    class Space:
        def __init__(self, *shape):
            self.shape = shape

    observation_space, action_space = Space(11), Space(3)

    def __init__(self, env_id, num_envs, seed, variant, *split):
        assert type(env_id) is str and 1 <= num_envs <= 10**5 and 0 <= seed and seed + num_envs <= 2**31
        ranges = {"contact_forces": (0, 1), "frame_skip": (1, 100), "repeat_action_probability": (0, 1), "start_level": (0, 10**9),
                  "num_levels": (1, 10**9)}
        for name, (low, high) in ranges.items():
            assert low <= variant.get(name, low) <= high and (name.startswith("repeat") or type(variant.get(name, low)) in (int, bool)), name

    def close(self):
        pass


def reader_of_models(m, env_id, path, folder):
    """Reads as main does, up to the first environment."""
    (folder / "model.safetensors").write_bytes(path.read_bytes())

    def reached(*args, **flags):
        if m not in (evaluate, ppd_gymnax):
            Envs(*args)
        if m is not evaluate:
            raise Reached
        return {"mean": 0.0, "std": 0.0, "returns": [0.0]}  # and it prints what the file says

    def read(path):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(m, {evaluate: "assess", ppd_gymnax: "Run"}.get(m, "make_envs"), reached)
            if m is evaluate:
                m.main(m.Args(model=str(path), json=str(path.parent / "json")))
                raise Reached
            run = str(path.parent / "run")
            m.main(small_gymnax(run, teacher=str(path)) if m is ppd_gymnax else m.Args(teacher=str(path), run_dir=run))

    return Reader(folder / "model.safetensors", read)


def reader_of_checkpoints(m, env_id, teacher, folder):
    """Reads as main does, and logs a row, as the first update would."""
    if m is ppd_gymnax:
        shutil.copytree(teacher.parent, folder / "run")
    else:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            m.main(small(m, env_id, folder / "run", **({} if m is train_teacher else {"teacher": str(teacher)})))
    newest = checkpoints(folder / "run")[-1]
    for path in (folder / "run").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path not in (newest, folder / "run/progress.csv"):
            path.unlink()
    made = {}

    class Run(m.Run):
        def __init__(self, *args):
            super().__init__(*args)
            made["run"] = self

    class Loop:
        def __init__(self, first, end, **_):
            self.first = first

        def __enter__(self):
            assert self.first >= 1, f"its first update is {self.first}"
            finished = made["cursor"].finished
            made["run"].log(self.first * 64, {"charts/episodic_return": float(np.mean(finished)) if finished else np.nan})
            raise Reached

        def __exit__(self, *args):
            pass

    def start(envs):
        made["cursor"] = m.Cursor(np.zeros((4, 11), np.float32), np.zeros(4, bool), np.zeros(4), deque(maxlen=100))
        return made["cursor"]

    def fit(args, networks, teacher, start, run):
        run.log("teacher" if teacher is None else "student", (start[0] + 1) * 64, [(args.seed, 1.0)], {"losses/loss": np.ones(1)})
        raise Reached

    stubs = {"fit": fit} if m is ppd_gymnax else {"make_envs": Envs, "start": start, "trange": Loop, "Run": Run}

    def read(path):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in stubs.items():
                patch.setattr(m, name, value)
            m.main(m.parse_args(["--resume", str(path.parent)]))

    return Reader(newest, read)


MODELS = [(ppd_mujoco, "Hopper-v4"), (student_distill, "Hopper-v4"), (student_distill, "Pong-v5"), (ppd_atari, "Pong-v5"),
          (ppd_procgen, "CoinrunEasy-v0"), (evaluate, "Hopper-v4"), (evaluate, "Pong-v5"), (evaluate, "CartPole-v1"),
          (ppd_gymnax, "CartPole-v1")]
RESUMED = [(train_teacher, "Hopper-v4"), (ppd_mujoco, "Hopper-v4"), (student_distill, "Hopper-v4"), (ppd_gymnax, "CartPole-v1")]
READERS = [pytest.param(kind, m, env_id, id=f"{m.__name__}-{env_id}-{kind}", marks=[needs_procgen] if "Coin" in env_id else [])
           for kind, cases in (("model", MODELS), ("checkpoint", RESUMED)) for m, env_id in cases]
OF_MODELS = [case for case in READERS if case.values[0] == "model"]
OF_CHECKPOINTS = [case for case in READERS if case.values[0] == "checkpoint"]
OF_BYTES = [case for case in READERS if case.values[1] is ppd_mujoco]


@pytest.fixture(scope="module")
def readers(teachers, gymnax_run, tmp_path_factory):
    """Readers by case, each made once."""
    made = {}

    def get(kind, m, env_id):
        if (kind, m, env_id) not in made:
            teacher = gymnax_run() / "teacher_100.safetensors" if env_id == "CartPole-v1" else teachers(env_id)
            make = reader_of_models if kind == "model" else reader_of_checkpoints
            made[kind, m, env_id] = make(m, env_id, teacher, tmp_path_factory.mktemp("file"))
        return made[kind, m, env_id]

    yield get
    print({f"{kind} {m.__name__} {env_id}": reader.tried for (kind, m, env_id), reader in made.items()})


@pytest.mark.parametrize(("kind", "m", "env_id"), OF_BYTES)
def test_bytes_that_are_not_a_file_of_ours(kind, m, env_id, readers, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    reader = readers(kind, m, env_id)
    whole = reader.whole
    assert reader(whole) is None
    rng = np.random.default_rng(0)
    for size in [0, 1, 7, 8, 9, len(whole) - 1, *rng.integers(10, len(whole) - 1, 15)]:
        assert reader(whole[:size]), f"cut to {size} bytes"
    for bit in [*range(0, 8 * 100, 23), *rng.integers(0, 8 * len(whole), 40)]:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        assert reader(bytes(flipped)), f"bit {bit} flipped"
    for foreign in (pickle.dumps(Evil()), b"\x89PNG\r\n\x1a\n" * 100, b"PK\x03\x04" * 100, whole + b"\0", rng.bytes(5000)):
        assert reader(foreign)
    for name in RAW:
        assert reader(RAW[name]), name
    for text in ("", "{", "5", "[]", "null", "[" * 100_000, "9" * 100_000, '{"format": ["x"]}', "{}"):
        assert reader(sealed(text, reader.arrays)), text[:20]
    for version in ("proximal-policy-distillation 4", "other", 3, None, ["x"] * 1000):
        error = reader(sealed(reader.about | {"format": version}, reader.arrays))
        assert "its format is " in error and error.count("not 'proximal-policy-distillation 3'") == 1, version
    assert list(tmp_path.iterdir()) == []  # no code has run


def test_every_bit_of_a_header_counts(tmp_path):
    """Of a small file, and of its arrays as well."""
    m, path = ppd_mujoco, tmp_path / "x.safetensors"
    m.save_file(path, {"a": 1}, {"b": np.arange(3, dtype=np.float32)})
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="cannot read"):
            m.read_file(path)


@pytest.mark.parametrize(("kind", "m", "env_id"), READERS)
def test_a_right_checksum_over_wrong_content(kind, m, env_id, readers):
    """Each part of the file in turn is replaced; of networks, shapes, parameters and state nothing but the right content will do."""
    reader = readers(kind, m, env_id)
    assert reader(reader.whole) is None and reader(sealed(reader.about, reader.arrays | {"more": np.zeros(3)})) is None
    rng, names, paths, cases = np.random.default_rng(1), list(VALUES), list(leaves(reader.about)), []

    def case(path, name, vital):
        content = sealed(replaced(reader.about, path, VALUES[name]), reader.arrays)
        cases.append((f"{'.'.join(map(str, path))} {name}", content, vital and content != reader.whole))

    if kind == "model":
        vital = [("action_dim",), ("observation_shape",), ("env_id",), ("network",), ("network", "kind"), ("network", "hidden")]
        for path in vital:
            for name in ("deleted", "text", "mixed", "long list", *rng.choice(names, 1)):
                case(path, name, True)
    else:
        numbers = [path for path in paths if path[:1] == ("logged",) and path != ("logged", "wandb_id")] + [("updates",)]
        vital = numbers + [path for path in paths if path[0] in ("args", "teacher_network") or path in (("teacher",), ("finished",), ("finished", 0))]
        for path in vital:
            typed = path[0] == "args" and path[-1] != "resume"  # which is what --resume says
            free = path[0] == "finished" or path == ("args", "teacher", 0) or path[-1] in ("activation", "value_hidden")  # older files lack these two
            needed = ("deleted", "mixed", "text") if path in numbers else () if free else (
                "deleted", *["dict"] * typed)
            for name in (*needed, *(("minus one", "enormous") if path in numbers else rng.choice(names, 1))):
                case(path, name, name in needed)
    others = [path for path in paths if path not in vital and path[0] != "finished"]
    for i in rng.permutation(len(others))[:15]:
        case(others[i], names[i % len(names)], False)

    needed = ("policy/", "obs_stats/", "value/" * (m in (student_distill, ppd_gymnax))) if kind == "model" else ("state/", "teacher/policy/")
    for i, (name, array) in enumerate(reader.arrays.items()):
        for how in list(ARRAYS)[i % 2:: 3 if len(reader.arrays) < 30 else 7]:
            changed = replaced(reader.arrays, (name,), ARRAYS[how](array))
            cases.append((f"{name} {how}", sealed(reader.about, changed), name.startswith(tuple(filter(None, needed)))))
    assert not (found := "\n".join(reader.complaints(cases))), found


@pytest.mark.parametrize(("kind", "m", "env_id"), READERS)
def test_content_that_hypothesis_invents(kind, m, env_id, readers):
    reader = readers(kind, m, env_id)
    paths = list(leaves(reader.about))
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4), max_leaves=10)

    @quick
    @given(st.sampled_from(paths), anything)
    def replace(path, value):
        reader(sealed(replaced(reader.about, path, value), reader.arrays))

    @quick
    @given(anything)
    def invent(value):
        assert reader(sealed(json.dumps(value), reader.arrays))
        assert reader(sealed({"format": reader.about["format"], "script": m.__name__, "about": value}, reader.arrays))

    replace()
    invent()


def test_bytes_that_hypothesis_invents(readers):
    reader = readers("model", ppd_mujoco, "Hopper-v4")

    @settings(quick, max_examples=100)
    @given(st.binary(max_size=200), st.booleans())
    def invent(data, framed):
        assert reader(raw(data) if framed else data)

    invent()


@pytest.mark.parametrize(("kind", "m", "env_id"), OF_MODELS)
def test_what_a_model_claims_takes_no_memory_and_no_time(kind, m, env_id, readers):
    """Networks, observations and actions that are much larger than the arrays that are there."""
    def memory(name):
        """In KiB: VmRSS now, VmHWM at its highest since the reset below."""
        with open("/proc/self/status") as file:
            return int(re.search(rf"{name}:\s+(\d+)", file.read())[1])

    reader = readers(kind, m, env_id)
    about, cases = reader.about, []
    convolutions = [{"channels": [2**40] * 3}, {"kind": "impala", "channels": [8] * 500}] if about["network"]["channels"] else []
    for network in ({"hidden": [8192, 8192]}, {"hidden": [2**40]}, {"hidden": [8] * 10**6}, *convolutions):
        cases.append((str(network)[:40], sealed(about | {"network": about["network"] | network}, reader.arrays), True))
    for claim in ({"action_dim": 2**40}, {"observation_shape": [2**40]}, {"observation_shape": [1] * 10**5}):
        cases.append((str(claim)[:40], sealed(about | claim, reader.arrays), True))
    for case in cases:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        began, before = time.process_time(), memory("VmRSS")
        assert not (found := "\n".join(reader.complaints([case]))), found
        assert time.process_time() - began < 5, case[0]
        assert memory("VmHWM") < before + 50 * 1024, case[0]


@pytest.mark.parametrize(("kind", "m", "env_id"), OF_MODELS)
def test_parameters_that_are_not_finite(kind, m, env_id, readers):
    """In any one of the policy's arrays."""
    reader, values = readers(kind, m, env_id), (np.nan, np.inf, -np.inf)
    for i, (name, array) in enumerate(reader.arrays.items()):
        if name.startswith(("policy/", "obs_stats/")):
            spoiled = array.copy()
            spoiled.flat[-1] = values[i % 3]
            assert "is not finite" in reader(sealed(reader.about, reader.arrays | {name: spoiled})), name


def test_a_teacher_of_other_actions_than_its_task_has(readers):
    """A consistent network, whose actions envpool would not survive."""
    m, reader = ppd_mujoco, readers("model", ppd_mujoco, "Hopper-v4")
    for size, actions in ((11, 1), (11, 4), (12, 3)):
        x = np.zeros(size, np.float32)
        params = m.Policy((8, 8), actions).init(jax.random.PRNGKey(0), x)
        leaves = jax.tree_util.tree_leaves_with_path({"policy": params, "obs_stats": m.Stats(x, x + 1, np.ones((), np.float32))})
        arrays = {jax.tree_util.keystr(where, simple=True, separator="/"): np.asarray(x) for where, x in leaves}
        assert f"is for observations and actions of ([{size}], {actions}); those of Hopper-v4 are ([11], 3)" in reader(
            sealed(reader.about | {"action_dim": actions, "observation_shape": [size]}, arrays))
