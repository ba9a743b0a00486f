"""Every script stands alone, so siblings repeat each other; what they repeat must stay the same.

Any top-level function, class or constant that several scripts define under one name has one source text, with the comment
above it. DIFFERENT says which differ, and between whom. `python tests/test_shared_blocks.py --sync ppd_mujoco.py` copies that
script's blocks to the others, where they must be the same.
"""

import ast
import difflib
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LETTERS = {"T": "train_teacher.py", "M": "ppd_mujoco.py", "A": "ppd_atari.py", "P": "ppd_procgen.py", "S": "student_distill.py",
           "D": "teacher_distill.py", "B": "ppd_beyond.py", "E": "evaluate.py", "I": "import_teacher.py", "G": "ppd_gymnax.py"}
SCRIPTS = list(LETTERS.values())

# Blocks that differ: groups of scripts that share one text, one letter a script; a script in no group has its own
DIFFERENT = {  # ppd_gymnax.py has no phantoms, and trains many runs at once
    "": ('GymnaxEnvs', 'OBSERVATION_SHAPE', 'VARIANT', 'check', 'load_teachers', 'main'),
    "AP": ('act',),
    "AP SD": ('Batch', 'init_state', 'resolve', 'update'),
    "APB SD": ('warn_if_slow',),
    "APSDBE": ('read_network',),
    "MAP": ('distill_coef_at', 'ppd_loss', 'ppd_terms'),
    "MAP SD": ('Networks',),
    "MAPB SD": ('TrainState',),
    "MAPSDB": ('Run',),
    "MB AP SD": ('Teacher',),
    "SD": ('Args', 'RANGES', 'distill_loss', 'load_teacher'),
    "SDB": ('finish',),
    "SDBEI": ('task_shape',),
    "TB AP SD": ('Network', 'Value'),
    "TMAPB": ('compute_gae', 'discount_forward', 'standardize', 'update_stats'),
    "TMAPSD": ('make_optimizer',),
    "TMAPSDB": ('BEGIN', 'RESUMABLE', 'check_finite', 'collect'),
    "TMAPSDBE": ('over_devices',),
    "TMAPSDBEI": ('evaluate',),
    "TSDB": ('assess',),
    "TSDB AP": ('Cursor', 'NETWORKS', 'Policy', 'Rollout', 'draw_noise', 'torso'),
    "TSDBE": ('act_deterministic', 'normalize'),
    "TSDBE AP": ('distribution',),
    "TSDBEI": ('make_envs', 'step'),
    "TSDBEI AP": ('reset',),
}
GROUPS = {name: [{LETTERS[letter] for letter in group} for group in groups.split()] for groups, names in DIFFERENT.items() for name in names}
# Flags whose default, and with it the docstring, is each script's own
DIFFERENT_FLAGS = {"teacher", "env_id", "num_steps", "gamma", "ent_coef", "run_dir", "total_timesteps", "eval_episodes", "student_size", "num_devices",
                   "frame_skip", "repeat_action_probability", "start_level", "num_levels"}
OWN_FLAGS = {"ppd_gymnax.py": {"device", "distill_coef", "learning_rate", "num_envs", "num_minibatches", "resume", "seed", "teacher", "teacher_noise_seed"},
             "ppd_beyond.py": {"distill_coef", "teacher_noise_seed"}}
SECTIONS = ["Arguments", "Environments", "Networks", "Mathematics", "Jitted steps", "Files", "Evaluation", "Command line", "Main"]
COMPANIONS = {"distrax": "tfp-nightly", "envpool": "gymnasium", "gymnax": "gymnasium"}  # pinned for what a package needs
OPTIONAL = {"torch", "wandb"}


def source(script: str) -> str:
    return (ROOT / script).read_text()


@cache
def blocks(text: str) -> dict[str, tuple[int, int]]:
    """Top-level definitions by name, each with its first and last line (counted from 1); the comment above belongs to it."""
    found, rows = {}, text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name, first = node.name, min([node.lineno, *(each.lineno for each in node.decorator_list)])
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            name, first = ast.unparse(node.targets[0]), node.lineno
        else:
            continue
        while rows[first - 2].startswith("# "):
            first -= 1
        found[name] = (first, node.end_lineno)
    return found


def must_agree(name: str, script: str, other: str) -> bool:
    """Whether this block must have one text in both scripts."""
    return name not in GROUPS or any({script, other} <= group for group in GROUPS[name])


def block(text: str, name: str) -> list[str]:
    first, last = blocks(text)[name]
    return text.splitlines(keepends=True)[first - 1: last]


def flags(script: str) -> dict[str, tuple[str, str]]:
    """The flags of a script: type, and what is said of each, behind it or below."""
    body = next(node.body for node in ast.parse(source(script)).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    found, rows = {}, source(script).splitlines()
    for node, following in zip(body, body[1:] + [None], strict=True):
        if isinstance(node, ast.AnnAssign):
            below = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            doc = following.value.value if below else rows[node.end_lineno - 1].encode()[node.end_col_offset:].decode().partition("  # ")[2]
            found[node.target.id] = (ast.unparse(node.annotation), doc)
    return found


def imported(script: str) -> set[str]:
    """The top-level names of all modules that a script imports anywhere."""
    nodes = list(ast.walk(ast.parse(source(script))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert not any(node.level for node in nodes if isinstance(node, ast.ImportFrom))
    return {name.split(".")[0] for name in names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)}}


def requirements() -> dict[str, set[str]]:
    """The lines of requirements.txt by the name of their package, as they stand in a script."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line := line.split("#")[0].strip().replace('"', "'"):
            found.setdefault(line.split("==")[0], set()).add(line)
    return found


def metadata(script: str) -> dict:
    """The block of PEP 723, read as that says."""
    found = re.findall(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$", source(script))
    assert [kind for kind, *_ in found] == ["script"]
    return tomllib.loads("".join(line[2:] for line in found[0][1].splitlines(keepends=True)))


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_blocks_of_one_name_have_one_text(script):
    """And where DIFFERENT lets them differ, they do."""
    text = source(script)
    for other in SCRIPTS[: SCRIPTS.index(script)]:
        before = source(other)
        for name in blocks(text).keys() & blocks(before).keys():
            a, b = block(before, name), block(text, name)
            if must_agree(name, script, other):
                assert a == b, "".join(difflib.unified_diff(a, b, f"{other}: {name}", f"{script}: {name}"))
            else:
                assert a != b, f"{name} is the same in {other} and {script}; DIFFERENT should say so"


def test_every_exception_is_needed():
    found = [blocks(source(script)) for script in SCRIPTS]
    assert {name for name in GROUPS if sum(name in names for names in found) < 2} == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_stands_between_the_blocks(script):
    """What is no block, no import and not the call of main would escape the comparison."""
    first, *body, last = ast.parse(source(script)).body
    assert ast.get_docstring(ast.parse(source(script))) and isinstance(first, ast.Expr)
    assert isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'"
    others = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(others) == len(blocks(source(script)))


def test_sync_brings_back_every_block(tmp_path, monkeypatch):
    texts = {script: source(script) for script in SCRIPTS}
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for owner in SCRIPTS:
        (tmp_path / owner).write_text(texts[owner])
        for other in set(SCRIPTS) - {owner}:
            rows = texts[other].splitlines(keepends=True)
            for name, (first, last) in blocks(texts[other]).items():
                if name in blocks(texts[owner]) and must_agree(name, owner, other):
                    rows[first - 1] = "# spoiled\n" + rows[first - 1]
                    rows[last - 1] = rows[last - 1].replace("\n", "  # spoiled\n")
            (tmp_path / other).write_text("".join(rows))
            assert source(other).count("# spoiled") > 10
        sync(owner)
        assert {script: source(script) for script in SCRIPTS} == texts


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_documented_and_read(script):
    tree = ast.parse(source(script))
    tree.body = [node for node in tree.body if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("RANGES", "RESUMABLE"))]
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for name, (_, doc) in flags(script).items():
        assert doc, f"{script}: --{name} has no docstring"
        assert name in read or name in strings, f"{script}: nothing reads --{name}"


@pytest.mark.parametrize("script", [name for name in SCRIPTS[1:] if name not in ("evaluate.py", "import_teacher.py")])
def test_flags_of_one_name_are_one_flag(script):
    ours = flags(script)
    for other in SCRIPTS[: SCRIPTS.index(script)]:
        theirs = flags(other)
        for name in ours.keys() & theirs.keys() - DIFFERENT_FLAGS:
            own = name in OWN_FLAGS.get(script, ()) or name in OWN_FLAGS.get(other, ())
            assert ours[name] == theirs[name] or own, f"--{name} in {script} and {other}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_no_sibling(script):
    assert not {f"{name}.py" for name in imported(script)} & {path.name for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_lists_the_packages_that_it_imports(script):
    """No more and no less, also those imported within functions, with the versions and markers of requirements.txt."""
    packages = imported(script) - set(sys.stdlib_module_names) - OPTIONAL
    packages |= {COMPANIONS[name] for name in packages & COMPANIONS.keys()}
    found = metadata(script)
    assert found["requires-python"] == ">=3.11"
    assert len(found["dependencies"]) == len(set(found["dependencies"]))
    assert set(found["dependencies"]) == {line for name in packages for line in requirements()[name]}


def test_the_requirements_are_what_the_scripts_list():
    assert {line for script in SCRIPTS for line in metadata(script)["dependencies"]} == set().union(*requirements().values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners_come_in_order(script):
    rule = "# " + "=" * 118
    text = source(script).splitlines()
    titles = [text[i + 1][2:] for i in range(len(text) - 2) if text[i] == text[i + 2] == rule]
    assert titles == [name for name in SECTIONS if name in titles]
    assert len(titles) >= (6 if script in ("evaluate.py", "import_teacher.py") else 8) and text.count(rule) == 2 * len(titles)


def sync(owner: str) -> None:
    """Copies the owner's blocks over those of the same name in every other script."""
    original = source(owner)
    for script in set(SCRIPTS) - {owner}:
        text = source(script)
        rows = text.splitlines(keepends=True)
        for name, (first, last) in sorted(blocks(text).items(), key=lambda item: -item[1][0]):
            if name in blocks(original) and must_agree(name, owner, script):
                rows[first - 1: last] = block(original, name)
        (ROOT / script).write_text("".join(rows))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--sync" or sys.argv[2] not in SCRIPTS:
        raise SystemExit(f"usage: python {sys.argv[0]} --sync SCRIPT, with SCRIPT one of {', '.join(SCRIPTS)}")
    sync(sys.argv[2])
