"""Every script stands alone, so siblings repeat each other; what they repeat must stay the same.

Any top-level function, class or constant that several scripts define under one name must have one source text. EXCEPTIONS
says which may differ, and between whom. `python tests/test_shared_blocks.py --sync ppd_mujoco.py` copies that script's blocks
to the others, where they must be the same.
"""

import ast
import difflib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["train_teacher.py", "ppd_mujoco.py", "ppd_atari.py", "ppd_procgen.py", "student_distill.py", "teacher_distill.py",
           "evaluate.py", "ppd_gymnax.py"]
BASELINES, IMAGES = {"student_distill.py", "teacher_distill.py"}, {"ppd_atari.py", "ppd_procgen.py"}
ANY_SUITE = {"train_teacher.py", "evaluate.py"} | BASELINES
STUDENTS = {"ppd_mujoco.py"} | IMAGES | BASELINES

# Blocks that may differ, each with the groups of scripts within which they may not
EXCEPTIONS = {
    **dict.fromkeys(("main",), ()),  # what is trained, and how it acts
    **dict.fromkeys(("Task", "Output", "RANGES"), (BASELINES,)),  # flags
    **dict.fromkeys(("Args", "Batch", "Networks", "TrainState", "finish", "init_state", "resolve", "update"), (BASELINES, IMAGES)),
    **dict.fromkeys(("make_folder",), (STUDENTS,)),  # its name has the student's size
    # What a suite's own script can say more simply than one for any suite
    **dict.fromkeys(("OBSERVATION_SHAPE", "assess", "check_task", "describe", "load_teacher", "make_envs", "step"),
                    (ANY_SUITE,)),
    **dict.fromkeys(("Cursor", "Distillation", "Frozen", "NETWORKS", "PAPER", "PAPER_TASKS", "PPO", "Rollout",
                     "Value", "act", "act_deterministic", "apply_in_chunks", "distribution", "draw_noise", "normalize", "reset"),
                    (ANY_SUITE, IMAGES)),
    # evaluate.py needs no gradients, and takes the models of ppd_gymnax.py as well
    **dict.fromkeys(("Network", "Policy", "torso"), (ANY_SUITE - {"evaluate.py"}, IMAGES)),
    **dict.fromkeys(("load_policy",), (ANY_SUITE - {"evaluate.py"},)),
    **dict.fromkeys(("prepare", "train_minibatch"), (IMAGES,)),  # PPD is PPO with a teacher
}
# What ppd_gymnax.py has in its own way: its environments have no phantoms, and it trains many runs at once
GYMNAX = {"Log", "check_finite", "choose_device", "collect", "compute_gae", "discount_forward", "distill_coef_at", "distill_loss",
          "evaluate", "make_optimizer", "ppd_loss", "standardize", "update_stats", "versions"}
GYMNAX_FLAGS = {"device", "distill_coef", "learning_rate", "num_envs", "num_minibatches", "seed", "teacher", "teacher_noise_seed"}
# Flags whose default, and with it the docstring, is each script's own
DIFFERENT_FLAGS = {"env_id", "num_steps", "gamma", "ent_coef", "run_dir", "total_timesteps", "eval_episodes", "student_size",
                   "frame_skip", "start_level", "num_levels", "contact_forces"}
SECTIONS = ["Arguments", "Environments", "Networks", "Mathematics", "Jitted steps", "Files", "Evaluation", "Main"]


def source(script: str) -> str:
    return (ROOT / script).read_text()


def blocks(text: str) -> dict[str, tuple[int, int]]:
    """Top-level definitions by name, each with its first and last line (counted from 1)."""
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = (min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno)
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
            name = ast.unparse(target).strip("()")
            found[name] = (node.lineno, node.end_lineno)
    return found


def must_agree(name: str, script: str, other: str) -> bool:
    """Whether this block must have one text in both scripts."""
    if "ppd_gymnax.py" in (script, other) and name in GYMNAX:
        return False
    return name not in EXCEPTIONS or any({script, other} <= group for group in EXCEPTIONS[name])


def lines(text: str, span: tuple[int, int]) -> list[str]:
    return text.splitlines(keepends=True)[span[0] - 1: span[1]]


def flags(script: str) -> dict[str, tuple[str, str]]:
    """The flags of a script's Args and of the classes it inherits from: type and docstring of each."""
    classes = {node.name: node for node in ast.parse(source(script)).body if isinstance(node, ast.ClassDef)}
    names = [base.id for base in classes["Args"].bases] + ["Args"]
    found = {}
    for body in (classes[name].body for name in names):
        for node, following in zip(body, body[1:] + [None], strict=True):
            if isinstance(node, ast.AnnAssign):
                documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                found[node.target.id] = (ast.unparse(node.annotation), following.value.value if documented else "")
    return found


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_blocks_of_one_name_have_one_text(script):
    ours, text = blocks(source(script)), source(script)
    for other in SCRIPTS[: SCRIPTS.index(script)]:
        theirs = blocks(source(other))
        for name in ours.keys() & theirs.keys():
            a, b = lines(source(other), theirs[name]), lines(text, ours[name])
            assert a == b or not must_agree(name, script, other), "".join(difflib.unified_diff(a, b, f"{other}: {name}", f"{script}: {name}"))


def test_every_exception_is_needed():
    texts = {}
    for script in SCRIPTS:
        for name, span in blocks(source(script)).items():
            texts.setdefault(name, set()).add("".join(lines(source(script), span)))
    assert {name for name in EXCEPTIONS if len(texts.get(name, ())) < 2} == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_documented_and_read(script):
    tree = ast.parse(source(script))
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for name, (_, doc) in flags(script).items():
        assert doc, f"{script}: --{name} has no docstring"
        assert name in read or name in strings, f"{script}: nothing reads --{name}"


@pytest.mark.parametrize("script", [name for name in SCRIPTS[1:] if name != "evaluate.py"])
def test_flags_of_one_name_are_one_flag(script):
    ours = flags(script)
    for other in SCRIPTS[: SCRIPTS.index(script)]:
        theirs = flags(other)
        for name in ours.keys() & theirs.keys() - DIFFERENT_FLAGS:
            own = script == "ppd_gymnax.py" and name in GYMNAX_FLAGS
            assert ours[name] == theirs[name] or own, f"--{name} in {script} and {other}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_no_sibling(script):
    for node in ast.walk(ast.parse(source(script))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert not {f"{module.split('.')[0]}.py" for module in modules} & {p.name for p in ROOT.glob("*.py")}


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners_come_in_order(script):
    rule = "# " + "=" * 118
    text = source(script).splitlines()
    titles = [text[i + 1][2:] for i in range(len(text) - 2) if text[i] == text[i + 2] == rule]
    assert titles == [name for name in SECTIONS if name in titles]
    assert len(titles) >= 6 and text.count(rule) == 2 * len(titles)


def sync(owner: str) -> None:
    """Copies the owner's blocks over those of the same name in every other script."""
    text, spans = source(owner), blocks(source(owner))
    for script in SCRIPTS:
        target = source(script)
        ours = target.splitlines(keepends=True)
        found = blocks(target)
        for name, (first, last) in sorted(found.items(), key=lambda item: -item[1][0]):
            if script != owner and name in spans and must_agree(name, owner, script):
                ours[first - 1: last] = lines(text, spans[name])
        (ROOT / script).write_text("".join(ours))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--sync" or sys.argv[2] not in SCRIPTS:
        raise SystemExit(f"usage: python {sys.argv[0]} --sync SCRIPT, with SCRIPT one of {', '.join(SCRIPTS)}")
    sync(sys.argv[2])
