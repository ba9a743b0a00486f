"""The README and the pages in docs/: their numbers are those of the raw results, and their links, commands, flags and code work."""

import ast
import importlib.util
import itertools
import json
import operator
import re
import shlex

import numpy as np
import pytest
from conftest import ROOT, read_csv

import ppd_gymnax
import ppd_mujoco
import ppd_procgen

PAGES = {path: path.read_text() for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]
LINES = [line for path, text in PAGES.items() if path.stem != "CHANGELOG" for line in text.splitlines()]
RESULTS = sorted((ROOT / "benchmark/results").rglob("*.json"))


def rows(word):
    return [line for line in LINES if line.startswith("|") and word in line]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT / "benchmark/results")))
def test_every_result_stands_in_the_pages_as_it_was_measured(path):
    result = json.loads(path.read_text())
    if "speed" in result:  # benchmark/speed.py
        for name, found in result["speed"].items():
            figures = [f"{found['script']:,.0f}", f"{found['share']:.0%}", f"{found['reference']:,.0f}", f"{found['ratio']:.2f}"]
            assert any(all(f"| {figure} |" in line for figure in figures) for line in rows(f"| {name} |")), (name, figures)
        return
    elif "overlap" in result:  # benchmark/overlap.py
        assert all(f"| {figure:,.0f} µs |" in rows(f"| {name} |")[0] for name, figure in result["overlap"].items())
        return
    elif "results" in result:  # ppd_gymnax.py
        found = result["results"]["teacher"]
        figures, lines = [f"{found['mean']:.1f} ± {found['interval']:.1f}"], rows(f"--env-id {result['env_id']} ")
    elif "gymnax" in result:  # benchmark/speed_gymnax.py
        for name, found in result["gymnax"].items():
            figures = [f"{found['PPO']:,.0f}", f"{found['PPD']:,.0f}", f"{found['cost']:+.0%}"]
            assert any(all(figure in line for figure in figures) for line in rows(name)), figures
            if "PureJaxRL" in found:
                figures = [f"{found[key]:,.0f}" for key in ("PPO", "PureJaxRL")] + [f"{found['ratio']:.2f}"]
                assert f"| {name} | {' | '.join(figures)} |" in LINES, figures
        return
    elif "variance" in result:  # benchmark/variance.py
        for found in result["variance"]:
            ratios = [f"{found[kind]['noise'] / found[kind]['signal']:.2f}" for kind in ("ratio", "detached")]
            cells = [result["env_id"], str(found["updates"]), f"{found['kl']:.1f}", *ratios]
            assert f"| {' | '.join(cells)} |" in LINES, cells
        return
    elif "imported" in result:  # benchmark/imported.py
        cells = [f"{result[name]['mean']:,.1f} ± {result[name]['std']:,.1f}" for name in ("theirs", "teacher", "student")]
        assert any(result["imported"] in line and f"| {' | '.join(cells)} |" in line for line in LINES), cells
        return
    elif "kl" in result:  # benchmark/pixels.py
        figures, lines = [f"{x['first']:.3f} to {x['last']:.3f}" for x in result["kl"].values()], rows(result["env_id"])
    elif "hidden_units" in result:  # benchmark/hidden_units.py
        for env_id, found in result["hidden_units"].items():
            if len(found) == 1:  # untrained
                cells = [f"{found[0]['contrast']:.2f}", f"{found[0]['alive']:.0%}"]
            else:
                cells = [f"{x['alive']:.0%}, {x['logits']:.4f}" for x in found]
            assert f"| {env_id} | {' | '.join(cells)} |" in LINES, cells
        return
    elif "levels" in result:  # benchmark/levels.py
        for env_id, found in result["levels"].items():
            cells = [env_id, found["alike"], found["end_on_first_step"], f"{found['return_for_nothing']:.2f}"]
            assert f"| {' | '.join(map(str, cells))} |" in LINES, cells
        return
    elif "resume" in result:  # benchmark/resume.py
        for word, mean in (("unbroken", result["means"]["unbroken"]), ("half-way and resumed", result["means"]["resumed"])):
            assert any(f"{mean:.3f}" in line for line in rows(word)), mean
        return
    elif "teacher" not in result:  # evaluate.py
        figures = [" | ".join(f"{found['mean']:.1f} ± {found['std']:.1f}" for found in (result, result["train_levels"]))]
        lines = rows(f"evaluate.py teachers/{result['env_id']}__")
    else:
        whom = ("student", "teacher") if "student" in result else ("teacher",)
        digits = 1 if result["teacher"]["mean"] < 100 else 0
        figures = [f"{result[name]['mean']:,.{digits}f} ± {result[name]['std']:,.{digits}f}" for name in whom]
        figures += [f"{result['ratio']:.3f}"] if "ratio" in result else []
        lines = rows(result["env_id"])
    assert any(all(figure in line for figure in figures) for line in lines), figures


def test_the_table_of_teachers_that_fail_is_that_of_every_game():
    """Of same and larger students; the mean of every student's games is that of its row."""
    key = operator.itemgetter("task", "seed", "size", "method")
    games = {key(row): np.float64(row["returns"].split()) for row in read_csv(ROOT / "benchmark/results/games/mujoco.csv")}
    found = {key(row): row for row in read_csv(ROOT / "benchmark/results/mujoco.csv") if row["experiment"] == "methods" and row["seed"] != "100"}
    assert games.keys() == found.keys()
    for student, returns in games.items():
        assert len(returns) == 50
        assert returns.mean() == pytest.approx(float(found[student]["student_mean"]), abs=0.05)
        assert returns.std() == pytest.approx(float(found[student]["student_std"]), abs=0.05)
    for task, seed, below in (("HalfCheetah-v4", 300, 3000), ("Ant-v4", 200, 3000), ("Humanoid-v4", 200, 7200), ("Humanoid-v4", 300, 7900)):
        teacher = np.float64(json.loads((ROOT / f"benchmark/results/teachers/{task}__{seed}.json").read_text())["teacher"]["returns"])
        returns = np.stack([x for student, x in games.items() if student[:2] == (task, str(seed)) and student[2] != "smaller"])
        error = np.hypot(returns.std(1), teacher.std()) / 50**0.5
        cells = [f"{min(x):{form}} to {max(x):{form}}" for x, form in (
            ((returns < below).sum(1), "d"), (returns.mean(1) / teacher.mean(), ".2f"), ((returns.mean(1) - teacher.mean()) / error, ".1f"),
            (np.median(returns, 1) / np.median(teacher), ".2f"))]
        assert rows(f"{task}, seed {seed}") == [f"| {task}, seed {seed} | {below:,} | {(teacher < below).sum()} | {' | '.join(cells)} |"]


@pytest.mark.parametrize(("method", "word"), [("ppo", "PPO, the teacher"), ("ppd", "PPD from the teacher")])
def test_the_one_level_table_is_that_of_the_raw_curves(method, word):
    cells = []
    for seed in (100, 200):
        table = read_csv(ROOT / f"benchmark/results/one_level/{method}__{seed}.csv")
        curve = [(int(row["global_step"]), float(row["charts/episodic_return"])) for row in table]
        solved = [step for step, value in curve if value >= 9]
        cells.append(f"{solved[0]:,}" if solved else f"not within {curve[-1][0]:,} (last: {curve[-1][1]:.1f})")
    assert rows(word) == [next(row for row in rows(word) if row.endswith(f"| {cells[0]} | {cells[1]} |"))]


@pytest.mark.parametrize(("name", "word"), [("pong_ppo_paper", "the paper's hyperparameters"), ("pong_ppo_usual", "those usual on Atari"),
                                           ("miner_ppo", "coinrun's, jumper's and ninja's flags")])
def test_the_runs_that_made_no_teacher_ended_where_the_page_says(name, word):
    last = read_csv(ROOT / f"benchmark/results/pixels/{name}.csv")[-1]
    found = f"| {word} | {int(last['global_step']):,} | {float(last['charts/episodic_return']):.1f} |"
    assert any(row.startswith(found) for row in rows(word)), found


def test_the_effect_of_the_detached_weight_is_that_of_the_raw_results():
    """Means over three seeds in the prose, wherever they stand."""
    table = [row for row in read_csv(ROOT / "benchmark/results/mujoco.csv") if row["experiment"] == "beyond" and row["size"] == "smaller"]
    ends = {"Humanoid": r"Humanoid's [a-z ]*end at\s+{}\s+of their teacher instead of\s+{}", "HalfCheetah": r"HalfCheetah's at {} instead of {}",
            "Ant": r"Ant's at\s+{} instead of {}"}
    for task, words in ends.items():
        means = []
        for method in ("ppd-detached", "ppd"):
            ratios = [float(row["student_mean"]) / float(row["teacher_mean"]) for row in table
                      if (row["task"], row["method"]) == (f"{task}-v4", method)]
            assert len(ratios) == 3
            means.append(re.escape(f"{np.mean(ratios):.2f}"))
        for path in (ROOT / "README.md", ROOT / "docs/results.md"):
            assert re.search(words.format(*means), PAGES[path]), (path, task, means)


def test_what_helps_is_told_as_the_table_has_it():
    """The geometric means over smaller students of MuJoCo, which its own test holds to the raw results."""
    text = " ".join(PAGES[ROOT / "docs/beyond.md"].split())
    paper, *others = re.search(r"smaller \| geometric mean \| ([\d.]+) [^|]*\| ([\d.]+) [^|]*\| ([\d.]+) [^|]*\| ([\d.]+)", text).groups()
    for words, found in zip(("end at {} instead of {}", "have {} instead of {}", "students, {} instead of {}"), others, strict=True):
        assert words.format(found, paper) in text


def test_the_changed_line_does_what_the_readme_says(tmp_path):
    """In a copy of the script: the ratio is clipped on both sides."""
    source = (ROOT / "ppd_mujoco.py").read_text()
    (old, new), = [diff for text in PAGES.values() for diff in re.findall(r"```diff\n-(.*)\n\+(.*)\n```", text)]
    assert source.count(old + "\n") == 1
    (tmp_path / "ppd_mine.py").write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("ppd_mine", tmp_path / "ppd_mine.py")
    spec.loader.exec_module(m := importlib.util.module_from_spec(spec))
    one = np.zeros(1, np.float32)
    for log_ratio, weight in ((0.5, 1.2), (0.1, np.exp(0.1)), (-0.5, 0.8)):
        log_prob = m.distribution((one, one)).log_prob(one)
        terms = m.ppd_terms((one, one), np.float32(0), m.Batch(None, one, log_prob - log_ratio, 0.0, 0.0, 1.0, (one + 2, one)), 0.2, "forward", "ratio")
        assert float(terms["distill_loss"]) == pytest.approx(2.0 * weight, rel=1e-5)


def test_first_kl_divergences_are_those_of_the_curves():
    """And what of them comes from the teachers' deviations alone."""
    table = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]] for line in PAGES[ROOT / "docs/algorithm.md"].splitlines()
             if re.match(r"\| \w+-v4 \|", line)}
    first = {"HalfCheetah-v4": {100: 13, 200: 16.1, 300: 13.5}, "Ant-v4": {100: 20, 200: 24.35, 300: 19.15}, "Humanoid-v4": {100: 240, 200: 445, 300: 90}, "Hopper-v4": {100: 550, 200: 110, 300: 520}}
    assert set(table) == set(first)
    said = {seed: [f"{values[seed]:g}" for values in first.values()] for seed in (100, 200, 300)}
    assert ("measured, within 3% for students of any size: with teachers of seed 100 {} on HalfCheetah, {} on Ant, {} on Humanoid and {} on Hopper; "
            "of seed 200 {}, {}, {} and {}; of seed 300 {}, {}, {} and {}.").format(*said[100], *said[200], *said[300]) in " ".join(PAGES[ROOT / "docs/algorithm.md"].split())
    for env_id, values in first.items():
        for (seed, value), size in itertools.product(values.items(), ("smaller", "same", "larger")):
            begin = read_csv(ROOT / f"benchmark/results/curves/methods__{env_id}__ppd__{size}__{seed}.csv")[0]
            assert float(begin["losses/teacher_kl"]) == pytest.approx(value, rel=0.03)
        log_std = ppd_mujoco.read_file(ROOT / f"teachers/{env_id}__100.safetensors")[1]["policy/params/log_std"]
        alone = (-log_std + (np.exp(2 * log_std) - 1) / 2).sum()
        assert table[env_id][:2] == [f"{np.exp(log_std).max():.2f}", f"{alone:.1f}"]


def test_shipped_teachers_have_their_results():
    shipped = {path.stem for path in (ROOT / "teachers").glob("*.safetensors")}
    assert shipped and shipped == {path.stem for path in RESULTS if path.parent.name == "teachers"}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


# ======================================================================================================================
# Links, commands, flags, metrics and code
# ======================================================================================================================


def anchors(text):
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    assert links or page.stem == "CHANGELOG"
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target.read_text()), link


def flags(path):
    """The flags of a script's Args, each with its type."""
    args = next(node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    return {node.target.id.replace("_", "-"): ast.unparse(node.annotation) for node in args.body if isinstance(node, ast.AnnAssign)}


SCRIPTS = {str(path.relative_to(ROOT)): flags(path) for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py")) if "class Args" in path.read_text()}
SCRIPTS["ppd_mine.py"] = SCRIPTS["ppd_mujoco.py"]  # the README's copy of it
OTHERS = {"tests/test_shared_blocks.py": {"sync"}}


def is_flag(name, known):
    return name in known or name.startswith("no-") and known.get(name[3:]) == "bool"


def commands(text):
    """Command lines of our programs: lines of code blocks, and code within a sentence."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.replace("\\\n", "").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line for line in lines if re.match(r"(\S*python|uv run) [\w/]+\.py|[\w/]+\.py --", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_name_programs_and_their_flags(page):
    for line in commands(PAGES[page]):
        words = shlex.split(line, comments=True)
        script = next(word for word in words if word.endswith(".py"))
        assert script in SCRIPTS or script in OTHERS, line
        for word in words:
            if word.startswith("--") and word != "--help":
                name = word[2:].partition("=")[0]
                assert name in OTHERS.get(script, ()) or is_flag(name, SCRIPTS.get(script, {})), f"{line}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_flags_that_are_named_exist(page):
    gone = {"contact-forces"} if page.stem == "CHANGELOG" else set()  # --contact-forces False, as it once was
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", PAGES[page])) - {"help", "sync"} - gone:
        assert any(is_flag(flag, known) for known in SCRIPTS.values()), flag


def test_every_logged_metric_is_explained():
    section = PAGES[ROOT / "docs/algorithm.md"].partition("## Every logged metric\n")[2]
    explained = {name for line in section.splitlines() if line.startswith("| `")
                 for name in re.findall(r"`([\w/]+)`", line.split("|")[1])}
    assert set(ppd_gymnax.COLUMNS) == explained  # PPO's, PPD's and the baselines'


def test_the_code_in_the_page_of_teachers_acts_as_the_scripts_do(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", PAGES[ROOT / "docs/teachers.md"], re.DOTALL)[1]
    found = {}
    exec(code, found)
    teacher = ppd_mujoco.load_teacher(ppd_mujoco.Args(env_id="Hopper-v4"))
    observations = np.random.default_rng(0).normal(size=(64, 11)).astype(np.float32) * 2
    expected = ppd_mujoco.act_deterministic(teacher.policy, teacher.params["policy"], teacher.params["obs_stats"], observations)
    np.testing.assert_allclose(found["act"](observations), expected, rtol=1e-4, atol=1e-4)
    assert found["about"] == teacher.about


@pytest.mark.sb3
@pytest.mark.parametrize("env_id", ["Hopper-v4", "CoinrunEasy-v0"])
def test_the_code_for_pytorch_in_the_page_of_teachers_acts_as_the_scripts_do(env_id, monkeypatch):
    monkeypatch.chdir(ROOT)
    first, *_, last = re.findall(r"```python\n(.*?)```", PAGES[ROOT / "docs/teachers.md"], re.DOTALL)
    found = {}
    exec(first.replace("Hopper-v4", env_id) + last, found)
    m = ppd_mujoco if env_id == "Hopper-v4" else ppd_procgen
    teacher, rng = m.load_teacher(m.Args(env_id=env_id)), np.random.default_rng(0)
    if m is ppd_mujoco:
        x = rng.normal(size=(64, 11)).astype(np.float32) * 2
        expected = ppd_mujoco.act_deterministic(teacher.policy, teacher.params["policy"], teacher.params["obs_stats"], x)
    else:
        x = rng.integers(0, 256, (64, 3, 64, 64), np.uint8)
        expected = teacher.policy.apply(teacher.params["policy"], x)
    np.testing.assert_allclose(found["outputs"](x), expected, rtol=1e-4, atol=1e-4)
