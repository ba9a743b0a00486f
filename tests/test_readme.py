"""The README's numbers are those of the raw results in the repository, and its commands exist."""

import csv
import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "benchmark/results").rglob("*.json"))


def rows(word):
    return [line for line in README.splitlines() if line.startswith("|") and word in line]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: str(path.relative_to(ROOT / "benchmark/results")))
def test_every_result_stands_in_the_readme_as_it_was_measured(path):
    result = json.loads(path.read_text())
    if "medians" in result:  # benchmark/speed.py
        figures = [f"{result['medians']['script']:,.0f}", f"{result['medians']['share']:.0%}"]
        lines = rows(re.search(r"--script (\w+)", result["command"])[1] if "--script" in result["command"] else "ppd_mujoco")
    elif "results" in result:  # ppd_gymnax.py
        found = result["results"]["teacher"]
        figures, lines = [f"{found['mean']:.1f} ± {found['interval']:.1f}"], rows(f"--env-id {result['env_id']} ")
    elif "gymnax" in result:  # benchmark/speed_gymnax.py
        for name, found in result["gymnax"].items():
            figures = [f"{found['PPO']:,.0f}", f"{found['PPD']:,.0f}", f"{found['cost']:+.0%}"]
            assert any(all(figure in line for figure in figures) for line in rows(name)), figures
        return
    elif "kl" in result:  # benchmark/pixels.py
        figures, lines = [f"{x['first']:.3f} to {x['last']:.3f}" for x in result["kl"].values()], rows(result["env_id"])
    elif "resume" in result:  # benchmark/resume.py
        figures, lines = [f"{mean:.3f}" for mean in result["means"].values()], README.splitlines()
    elif "detached" in result:  # benchmark/detached.py
        for runs in result["detached"].values():
            ratios, kl = ([f"{x['ratio']:.3f}" for x in runs], [f"{sum(x) / len(x):.2f}" for x in zip(*(x["kl"] for x in runs), strict=True)])
            assert any(f"| {', '.join(ratios)} | {', '.join(kl)} |" in line for line in README.splitlines()), (ratios, kl)
        return
    else:
        whom = ("student", "teacher") if "student" in result else ("teacher",)
        figures = [f"{result[name]['mean']:,.0f} ± {result[name]['std']:,.0f}" for name in whom]
        figures += [f"{result['ratio']:.3f}"] if "ratio" in result else []
        lines = rows(result["env_id"])
    assert any(all(figure in line for figure in figures) for line in lines), figures


@pytest.mark.parametrize(("method", "word"), [("ppo", "PPO, the teacher"), ("ppd", "PPD from the teacher")])
def test_the_one_level_table_is_that_of_the_raw_curves(method, word):
    cells = []
    for seed in (100, 200):
        with open(ROOT / f"benchmark/results/one_level/{method}__{seed}.csv", newline="") as file:
            curve = [(int(row["global_step"]), float(row["charts/episodic_return"])) for row in csv.DictReader(file)]
        solved = [step for step, value in curve if value >= 9]
        cells.append(f"{solved[0]:,}" if solved else f"not within {curve[-1][0]:,} (last: {curve[-1][1]:.1f})")
    assert rows(word) == [next(row for row in rows(word) if row.endswith(f"| {cells[0]} | {cells[1]} |"))]


def test_shipped_teachers_have_their_results():
    shipped = {path.stem for path in (ROOT / "teachers").glob("*.msgpack")}
    assert shipped == {path.stem for path in RESULTS if path.parent.name == "teachers"}


def test_files_the_readme_links_to_exist():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_flags_the_readme_names_exist():
    text = "".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py")))
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", README)) - {"help", "sync"}:
        assert re.search(rf"\b{flag.replace('-', '_')}:", text), flag
