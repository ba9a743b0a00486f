"""Write every table and figure of the paper from the raw results of the grid, ours beside the paper's.

    python benchmark/report.py                                   # from benchmark/results, into it, README.md and docs/
    python benchmark/report.py --results runs/grid/results       # from a grid of your own, into its folder

Scores are fractions of the teacher's return, task by task and seed by seed. Over tasks and seeds they are aggregated by
the geometric mean, in which every task counts the same, as in the paper, and by the interquartile mean of all runs
(Agarwal et al. 2021); intervals are 95% by bootstrap over seeds, stratified by task, and need more than one seed of
each task. Where all tasks have several seeds, there are also the probability that PPD improves on a baseline and
performance profiles (Agarwal et al. 2021 too). The aggregates of a row rest on the same tasks and seeds: those that all
methods of the row have; seeds whose teacher's return is not positive count nowhere. A cell of a single task has all of
its runs. One without runs stays empty.
Source of the paper's numbers: paper_tables.csv, from Spigler, "Proximal Policy Distillation", TMLR 2025 (2407.15134).
"""

import dataclasses
import functools
import itertools
import json
import re
import sys
from pathlib import Path
from typing import NoReturn

import matplotlib
import numpy as np
import pandas as pd
import scipy.stats
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 (it asks for a screen unless told otherwise first)
from matplotlib.ticker import EngFormatter, MaxNLocator  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"teacher-distill": "td", "student-distill": "sd", "ppd": "ppd"}  # as the paper's tables order and call them
# PPD with one thing changed, by the names of benchmark/grid.py
VARIANTS = {"ppd": "the paper's", "ppd-detached": "detached", "ppd-future": "β = 1", "ppd-mean-clip": "mean clipped"}
SIZES = ("smaller", "same", "larger")
LEVELS = {"unseen levels": "", "training levels": "train_"}  # of Procgen, with what columns of theirs begin with
SUITES = {"atari": "Atari", "procgen": "Procgen", "mujoco": "MuJoCo", "gymnax": "MinAtar (gymnax)"}
DEFAULT_RATE = "0.0025"  # of ppd_gymnax.py on MinAtar: a learning rate
CURVE_FIGURES = {"atari": 6, "mujoco": 7, "procgen": 8}
STYLE = {  # a figure fills a page of text, so that its points are those of print
    "font.size": 8, "axes.titlesize": 9, "figure.titlesize": 9, "axes.linewidth": 0.6, "lines.linewidth": 1.1,
    "lines.markersize": 3.5, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "savefig.dpi": 220}
PAGE = 7.2  # inches
LOOKS = {  # colour (Okabe and Ito's), line and marker: each tells methods apart without the others
    "teacher-distill": ("#0072B2", ":", "s"), "student-distill": ("#D55E00", "--", "^"), "ppd": ("black", "-", "o")}
LINES, MARKERS = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1))), ("o", "s", "^", "D", "v")
DRAWS = 2000  # of the bootstraps of probabilities and profiles
FLOOR = 0.01  # what a fraction counts for at least in the geometric mean, which a single 0 would make 0


@dataclasses.dataclass(frozen=True)
class Args:
    """Hold all flags of this program."""

    results: Path = ROOT / "benchmark/results"
    """folder with {suite}.csv and curves/, as benchmark/grid.py leaves it; report.md and the figures go there"""
    readme: bool = True
    """bring the tables of README.md and docs/ up to date, if the results are the repository's own"""


def fail(message: str) -> NoReturn:
    """End the program for bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def load(folder: Path) -> pd.DataFrame:
    """Read all rows of all suites.

    Where there is a λ study, the larger students of PPD are those of λ = 1 in it.
    """
    try:
        tables = [pd.read_csv(folder / f"{suite}.csv") for suite in SUITES if (folder / f"{suite}.csv").exists()]
    except ValueError as error:  # pandas' own are of this kind
        fail(f"{folder} has a table that cannot be read: {error}")
    needed = {"experiment", "suite", "task", "method", "size", "seed", "distill_coef", "teacher_mean", "student_mean"}
    if not tables or any(needed - {*table} for table in tables):
        names = ", ".join(f"{suite}.csv" for suite in SUITES)
        fail(f"{folder} has no table of the grid ({names}), or one that is of something else")
    runs = pd.concat(tables, ignore_index=True)
    # On MuJoCo all students beyond the paper have one teacher, and priors are teachers of other tasks
    shared = runs.experiment.isin(["beyond", "several"]) & (runs.suite != "gymnax") | (runs.method == "ppd-prior")
    own = runs[~shared]
    apart = own.experiment.str.extract("^(beyond|adaptive|short-|cpu-)")[0].fillna("")  # groups of their own
    for (_, task, seed, _), found in own.groupby(["suite", "task", "seed", apart]).teacher_mean:
        if found.max() - found.min() > 0.01 * found.abs().max():
            print(f"note: {task}, seed {seed}: rows of different teachers or machines, whose returns are "
                  f"{number(found.min())} to {number(found.max())}", file=sys.stderr)
    studied = runs.loc[runs.experiment == "lambda", ["suite", "task"]].drop_duplicates()
    ones = runs[(runs.experiment == "methods") & (runs.method == "ppd") & (runs["size"] == "larger")].merge(studied)
    others = [table for table in (ones.assign(experiment="lambda"), references(folder)) if len(table)]
    return pd.concat([runs, *others], ignore_index=True)


def references(folder: Path) -> pd.DataFrame:
    """Read what benchmark/reference.py left in {task}__{size}__{seed}.json: rows like the grid's, of "reference"."""
    rows = []
    for path in sorted((folder / "reference").glob("*.json")):
        try:
            found = json.loads(path.read_text())
            row = {"experiment": "reference", "suite": "mujoco", "task": found["env_id"], "method": "ppd"}
            row |= {"size": found["student_size"], "seed": found["seed"], "command": found["command"]}
            row |= {"steps": found["steps"], "episodes": len(found["student"]["returns"])}
            for player in ("teacher", "student"):
                row |= {f"{player}_mean": found[player]["mean"], f"{player}_std": found[player]["std"]}
            own = found["teacher_file"] == f"{row['task']}__{row['seed']}.safetensors"
        except (ValueError, TypeError, KeyError) as error:
            fail(f"{path} is no file of benchmark/reference.py: {type(error).__name__} {error}")
        standard = path.stem == f"{row['task']}__{row['size']}__{row['seed']}"
        if standard and own and not re.search("--(distill-coef|total-timesteps|eval-episodes)", row["command"]):
            rows.append(row)
    return pd.DataFrame(rows)


@functools.cache
def paper_tables() -> pd.DataFrame:
    """Read every number of the paper's tables."""
    return pd.read_csv(ROOT / "benchmark/paper_tables.csv")


def paper_value(table: int, suite: str, size: str, method: str, env: str = "all", split: str = "") -> str:
    """Return a cell of the paper's tables, or nothing."""
    known = paper_tables()
    found = known[(known.table == table) & (known.suite == suite) & (known["size"] == size) & (known.method == method)
                  & (known.env == env) & (known.split == ("train" if split else "test"))]
    return "" if found.empty else f"{found.value.iloc[0]:g}"


# ======================================================================================================================
# Aggregates
# ======================================================================================================================


def geometric_mean(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the geometric mean over tasks of that over each's seeds, along this axis; 0.01 is the least of a score."""
    return np.exp(np.mean([np.log(np.maximum(task, FLOOR)).mean(axis) for task in tasks], 0))


def interquartile_mean(*tasks: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean of the middle half of the scores of all tasks, as above (Agarwal et al. 2021)."""
    return scipy.stats.trim_mean(np.concatenate(tasks, axis), 0.25, axis)


def scores(rows: pd.DataFrame, player: str, split: str = "") -> pd.Series:
    """Return what is compared: mean returns, but human-normalised scores on Atari, as in the paper's Tables 1 and 5.

    An Atari game without a human's score counts by its returns.
    """
    names = [f"{player}_{split}mean", f"{player}_human_normalised"]
    means, normalised = (column for _, column in rows.reindex(columns=names).astype(float).items())
    return means.where(rows.suite != "atari", normalised.fillna(means))


def fractions(rows: pd.DataFrame, player: str = "student", split: str = "") -> list[np.ndarray]:
    """Divide a player's scores by its teacher's: [seeds] for each task; ValueError if a run is there twice."""
    again = rows[rows.duplicated(["task", "seed"])]
    if len(again):
        raise ValueError(f"several runs of a task and seed: {again.command.iloc[0]}")
    teachers = scores(rows, "teacher", split)
    found = rows.assign(fraction=scores(rows, player, split) / teachers)[teachers > 0].dropna(subset="fraction")
    return [each.to_numpy() for _, each in found.groupby("task").fraction]


def fractions_of(rows: pd.DataFrame, task: str, player: str = "student") -> np.ndarray:
    """Return such fractions of one task, [seeds], of which there may be none."""
    return np.concatenate([np.zeros(0), *fractions(rows[rows.task == task], player)])


def aggregate(rows: pd.DataFrame, player: str = "student", split: str = "") -> dict[str, str]:
    """Return geometric mean, interquartile mean and number of runs, as cells; intervals need more than one seed."""
    parts = fractions(rows, player, split)
    if not parts:
        return {"geometric": "", "iqm": "", "runs": ""}
    seeds = sorted({len(each) for each in parts})
    cells = {"runs": f"{len(parts)} × {seeds[0]}" + (f" to {seeds[-1]}" if len(seeds) > 1 else "")}
    for name, statistic in (("geometric", geometric_mean), ("iqm", interquartile_mean)):
        cells[name] = f"{statistic(*parts):.2f}"
        if seeds[0] > 1:  # each task's seeds are drawn apart
            found = scipy.stats.bootstrap(tuple(parts), statistic, method="percentile", n_resamples=5000,
                                          random_state=np.random.default_rng(0)).confidence_interval
            cells[name] += f" [{found.low:.2f}, {found.high:.2f}]"
    return cells


def several_seeds(rows: pd.DataFrame) -> bool:
    """Tell whether every task has more than one seed."""
    return len(rows) > 0 and rows.groupby("task").seed.nunique().min() > 1


def redrawn(parts: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the seeds of each task anew, with replacement; returns their scores, [draws, seeds] for each task."""
    return [part[rng.integers(len(part), size=(DRAWS, len(part)))] for part in parts]


def probability_of_improvement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> np.ndarray:
    """Return how often one of our runs scores higher than one of theirs, ties counting half, as a mean over tasks.

    ours, theirs: [..., seeds] for each task. A task's share is the Mann-Whitney U over the number of pairs (Agarwal et
    al. 2021).
    """
    shares = []
    for x, y in zip(ours, theirs, strict=True):
        x, y = x[..., :, None], y[..., None, :]
        shares.append(((x > y) + 0.5 * (x == y)).mean((-2, -1)))
    return np.mean(shares, 0)


def performance_profile(parts: list[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """Return the share of runs that score above each threshold, as a mean over tasks (Agarwal et al. 2021).

    parts: [..., seeds] for each task; the result is [..., thresholds].
    """
    return np.mean([(part[..., None] > thresholds).mean(-2) for part in parts], 0)


def improvement(ours: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """Return the probability of improvement of rows over others of the same tasks, as a cell.

    The seeds of both are drawn apart, as Agarwal et al. do.
    """
    x, y, rng = fractions(ours), fractions(theirs), np.random.default_rng(0)
    if not x or not y:
        return ""
    low, high = np.percentile(probability_of_improvement(redrawn(x, rng), redrawn(y, rng)), [2.5, 97.5])
    return f"{probability_of_improvement(x, y):.2f} [{low:.2f}, {high:.2f}]"


def comparable(parts: dict) -> dict:
    """Keep of the rows of several methods or λ the tasks and seeds that all have, but for those without any run.

    Only where each's own evaluation of the teacher is positive, since the others give no fraction.
    """
    good = [rows[scores(rows, "teacher") > 0] for rows in parts.values() if len(rows)]
    known = [set(zip(rows.task, rows.seed, strict=True)) for rows in good]
    common = set.intersection(*known) if known else set()
    return {name: rows[np.array([x in common for x in zip(rows.task, rows.seed, strict=True)], bool)]
            for name, rows in parts.items()}


def returns(rows: pd.DataFrame, player: str, split: str = "") -> str:
    """Return the mean return (on Atari human-normalised), and of several seeds its standard deviation, as a cell."""
    values = scores(rows, player, split).dropna()
    deviation = f" ± {number(values.std(), values.mean())}" if len(values) > 1 else ""
    return "" if values.empty else f"{number(values.mean())}{deviation}"


def standard_error(rows: pd.DataFrame, player: str, split: str = "") -> str:
    """Return the standard error of the mean return of a single run over its episodes, as a cell."""
    found = scores_at(rows, player, split)
    return number(found[1], found[0]) if found else ""


def number(value: float, size: float | None = None) -> str:
    """Return a number as a cell, with as many digits as suit one of this size, or its own."""
    size = abs(value if size is None else size)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2}f}"


# ======================================================================================================================
# Tables
# ======================================================================================================================


def markdown(header: list[str], table: list[list[str]]) -> str:
    """Return a table as markdown."""
    lines = [header, ["---"] * len(header), *table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def means(statistic: str) -> str:
    """Return what the heading of the paper's numbers adds where ours beside them are not geometric means."""
    return "" if statistic == "geometric" else " (geometric means)"


def spread(rows: pd.DataFrame) -> str:
    """Tell what a return and its spread in a table or figure are."""
    seeds = sorted(set(rows.seed))
    if len(seeds) == 1:
        return f"one seed ({seeds[0]})"
    return "mean ± standard deviation over seeds" + ("" if several_seeds(rows) else ", where there are several")


def geometric(rows: pd.DataFrame, split: str = "", players: tuple[str, ...] = ("student",)) -> str:
    """Name the mean of a table of fractions, and say so where one has counted for more than it is."""
    rows = rows[scores(rows, "teacher", split) > 0]
    low = any((scores(rows, player, split) < FLOOR * scores(rows, "teacher", split)).any() for player in players)
    return "geometric mean" + (f"; a fraction below {FLOOR} counts as {FLOOR}" if low else "")


def by_method(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of each method that can be compared."""
    return comparable({name: runs[runs.method == name] for name in METHODS})


def number_of_runs(cells: dict[str, dict[str, str]]) -> str:
    """Return the cell that says how many tasks and seeds a row rests on, the same for all methods with runs."""
    return next((cell["runs"] for cell in cells.values() if cell["runs"]), "not run")


def overview_table(runs: pd.DataFrame, statistic: str) -> str:
    """Return Table 1 whole: students as fractions of their teachers, of each suite of the paper and of all together."""
    paper_header = f"the paper's teacher, td, sd, ppd{means(statistic)}"
    header = ["suite", "students", "teacher", *METHODS, "tasks × seeds", paper_header]
    runs, table = runs[(runs.experiment == "methods") & runs.suite.isin(CURVE_FIGURES)], []
    for suite, size in itertools.product((*CURVE_FIGURES, "all"), SIZES):
        each = runs[runs["size"] == size]
        parts = by_method(each[each.suite == suite] if suite != "all" else each)
        taught = pd.concat(parts.values()).drop_duplicates(["task", "seed"])
        if suite == "all" and set(taught.suite) != set(CURVE_FIGURES):  # a mean over some of them would mislead
            parts = {name: rows[:0] for name, rows in parts.items()}
        cells = {name: aggregate(rows) for name, rows in parts.items()}
        values = scores(taught, "teacher").groupby(taught.task).mean()
        teacher = "" if values.empty or suite == "all" else number(values.mean())
        paper = [paper_value(1, suite, "teacher", "ppo"), *(paper_value(1, suite, size, x) for x in METHODS.values())]
        table.append([suite, size, teacher, *(cell[statistic] for cell in cells.values()), number_of_runs(cells),
                      ", ".join(filter(None, paper))])
    return markdown(header, table)


def rows_by_size(runs: pd.DataFrame, suite: str, statistic: str, paper_suite: str, split: str = "") -> list[list[str]]:
    """Return a row for each size: the students' fractions of their teachers, runs, and the paper's numbers if any."""
    runs, rows = runs[(runs.experiment == "methods") & (runs.suite == suite)], []
    table = 7 if split else 1
    for size in SIZES:
        cells = {name: aggregate(each, split=split) for name, each in by_method(runs[runs["size"] == size]).items()}
        paper = [paper_value(table, paper_suite, size, name, split=split) for name in METHODS.values()]
        rows.append([size, *(cell[statistic] for cell in cells.values()), number_of_runs(cells),
                     ", ".join(filter(None, paper))])
    return rows


def methods_table(runs: pd.DataFrame, suite: str, statistic: str, split: str = "") -> str:
    """Return Table 1 (on Procgen's training levels Table 7): students of every size, as fractions of their teachers."""
    header = ["students", *METHODS, "tasks × seeds", f"the paper's td, sd, ppd{means(statistic)}"]
    return markdown(header, rows_by_size(runs, suite, statistic, "all" if suite == "gymnax" else suite, split))


def summary_table(runs: pd.DataFrame) -> str:
    """Return students as fractions of their teachers in all suites with runs; the paper's numbers where it has them."""
    header = ["", "students", *METHODS, "tasks × seeds", "the paper's td, sd, ppd"]
    suites = set(runs.suite[runs.experiment == "methods"])
    return markdown(header, [[SUITES[suite], *row] for suite in SUITES if suite in suites
                             for row in rows_by_size(runs, suite, "geometric", suite)])


def improvement_table(runs: pd.DataFrame, suite: str) -> str:
    """Return how probable it is that a student of PPD scores higher than a baseline's."""
    runs, table = runs[runs.suite == suite], []
    baselines = [name for name in METHODS if name != "ppd"]
    groups = {size: runs[(runs.experiment == "methods") & (runs["size"] == size)] for size in SIZES}
    groups["larger, corrupted teacher"] = runs[runs.experiment == "imperfect"]
    for name, rows in groups.items():
        parts = by_method(rows)
        if several_seeds(pd.concat(parts.values())):
            cells = {method: aggregate(each) for method, each in parts.items()}
            table.append([name, *(improvement(parts["ppd"], parts[x]) for x in baselines), number_of_runs(cells)])
    return markdown(["students", *(f"over {name}" for name in baselines), "tasks × seeds"], table)


def imperfect_table(runs: pd.DataFrame, suite: str, statistic: str, split: str = "") -> str:
    """Return Table 2 (by task Tables 6 and 8): larger students of corrupted teachers, as fractions of the original."""
    runs = runs[(runs.experiment == "imperfect") & (runs.suite == suite)]
    paper_header = f"the paper's corrupted, td, sd, ppd{means(statistic)}"
    header, table = ["", "corrupted teacher", *METHODS, "tasks × seeds", paper_header], []
    for task in ("all", *sorted(runs.task.unique())):
        parts = by_method(runs if task == "all" else runs[runs.task == task])
        taught = pd.concat(parts.values()).drop_duplicates(["task", "seed"])
        corrupted = aggregate(taught, "corrupted_teacher", split)
        cells = {name: aggregate(rows, split=split) for name, rows in parts.items()}
        of_paper = 8 if split else 2 if task == "all" else 6
        known = "atari" if suite == "gymnax" and task == "all" else suite
        paper = [paper_value(of_paper, known, *x, env=paper_name(task), split=split) for x in
                 (("teacher", "corrupted"), *(("larger", name) for name in METHODS.values()))]
        table.append([task, corrupted[statistic], *(cell[statistic] for cell in cells.values()), number_of_runs(cells),
                      ", ".join(filter(None, paper))])
    return markdown(header, table)


def rates_table(runs: pd.DataFrame, suite: str) -> str:
    """Return larger students by learning rate, all tasks together and each, as fractions of their teachers."""
    rates = {name.removeprefix("rate-"): name for name in runs.experiment.unique() if name.startswith("rate-")}
    rates[DEFAULT_RATE] = "methods"
    runs, table = runs[runs.experiment.isin(rates.values()) & (runs.suite == suite) & (runs["size"] == "larger")], []
    for task in ("all", *sorted(runs.task.unique())):
        each = runs if task == "all" else runs[runs.task == task]
        for rate in sorted(rates, key=float):
            parts = by_method(each[each.experiment == rates[rate]])
            cells = {method: aggregate(rows) for method, rows in parts.items()}
            table.append([task, rate, *(cell["geometric"] for cell in cells.values()), number_of_runs(cells)])
    return markdown(["", "learning rate", *METHODS, "tasks × seeds"], table)


def paper_name(task: str) -> str:
    """Return a task's name in the paper's tables."""
    name = re.sub(r"(Easy|Hard)?-(v\d|MinAtar)$", "", task)
    return {"HalfCheetah": "half-cheetah"}.get(name, name.lower())


def returns_table(runs: pd.DataFrame, suite: str, split: str = "") -> str:
    """Return Table 5: returns of teachers and students; of a single seed with their standard errors over episodes."""
    theirs = runs[(runs.experiment == "reference") & (runs.suite == suite)] if not split else runs[:0]
    runs = runs[(runs.experiment == "methods") & (runs.suite == suite)]
    names = [(size, name) for size in SIZES for name in METHODS]
    header = ["task", "teacher", *(f"{size}, {METHODS[name]}" for size, name in names)]
    header += ["the reference's ppd / teacher (ours)"] * (len(theirs) > 0)
    table = []
    for task in sorted(runs.task.unique()):
        each = runs[runs.task == task]
        parts = [each[(each["size"] == size) & (each.method == name)] for size, name in names]
        teachers = each.drop_duplicates("seed")
        lines = {task: returns}
        if len(teachers) == 1 and suite != "atari":  # whose returns are normalised and whose deviations are not
            lines["± standard error"] = standard_error
        for label, cell in lines.items():
            table.append([label, cell(teachers, "teacher", split), *(cell(part, "student", split) for part in parts)])
        paper = [paper_value(5, suite, size, name, paper_name(task), split)
                 for size, name in (("teacher", "ppo"), *((size, METHODS[name]) for size, name in names))]
        if any(paper):
            table.append(["the paper's", *paper])
        if len(theirs):
            first = next(i for i, line in enumerate(table) if line[0] == task)
            table[first].append(beside_reference(each, theirs[theirs.task == task]))
    return markdown(header, [line + [""] * (len(header) - len(line)) for line in table])


def beside_reference(ours: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """Return the reference's students of a task as fractions of their teacher, and ours in brackets, as a cell."""
    ours, cells = ours[ours.method == "ppd"], []
    for size in SIZES:
        pair = comparable({0: theirs[theirs["size"] == size], 1: ours[ours["size"] == size]})
        found = [fractions(rows) for rows in pair.values()]
        there, here = (f"{part[0].mean():.2f}" if part else "" for part in found)
        if there:
            cells.append(f"{size} {there}" + (f" ({here})" if here else ""))
    return ", ".join(cells)


def reference_table(runs: pd.DataFrame) -> str:
    """Return PPD of the reference beside ours, run by run: returns ± standard deviations, and student over teacher."""
    theirs, table = runs[runs.experiment == "reference"], []
    ours = runs[(runs.experiment == "methods") & (runs.method == "ppd")]
    theirs = theirs.assign(order=theirs["size"].map(SIZES.index)).sort_values(["task", "order", "seed"])
    for _, run in theirs.iterrows():
        same = ours[(ours.task == run.task) & (ours["size"] == run["size"]) & (ours.seed == run.seed)]
        cells = []
        for row in (run, same.iloc[0] if len(same) else None):
            cells += [""] * 3 if row is None else [
                f"{number(row.teacher_mean)} ± {number(row.teacher_std, row.teacher_mean)}",
                f"{number(row.student_mean)} ± {number(row.student_std, row.student_mean)}",
                f"{row.student_mean / row.teacher_mean:.3f}"]
        table.append([run.task, run["size"], str(run.seed), *cells])
    header = ["task", "students", "seed", "the reference: teacher", "ppd", "ratio", "ours: teacher", "ppd", "ratio"]
    return markdown(header, table)


def name_of(suite: str, rows: pd.DataFrame) -> str:
    """Return a suite's name, and of gymnax how long students learn, since its studies differ in that."""
    return SUITES[suite] + (f", students of {rows.steps.max():,.0f} steps" if suite == "gymnax" else "")


def cpu_table(runs: pd.DataFrame, suite: str, experiment: str) -> str:
    """Return results of images at CPU scale: return ± standard error over games, and the fraction of the teacher's."""
    runs = runs[(runs.experiment == experiment) & (runs.suite == suite)]
    levels = LEVELS if suite == "procgen" else {"": ""}
    table = []
    groups = runs.groupby(["task", "size", "seed"])
    for ((task, size, _), rows), (label, split) in itertools.product(groups, levels.items()):
        taught = scores_at(rows[:1], "teacher", split)
        corrupted = ()
        if experiment == "cpu-imperfect":
            corrupted = scores_at(rows[:1], "corrupted_teacher", split, taught)
        students = [scores_at(rows[rows.method == name], "student", split, taught) for name in METHODS]
        units = f"{size.partition('-')[2] or 64} units"
        table.append([task, label, units, *map(cell_of, (taught, corrupted, *students))])
    header = ["task", "levels", "students", "teacher", "corrupted teacher", *METHODS]
    filled = [i for i, name in enumerate(header) if name in METHODS or any(row[i] for row in table)]
    return markdown([header[i] for i in filled], [[row[i] for i in filled] for row in table])


def priors_table(runs: pd.DataFrame) -> str:
    """Return students of Procgen's games alone, with the teacher of another game, and with their own, at CPU scale."""
    runs, table = runs[(runs.suite == "procgen") & (runs["size"] == "smaller")], []
    for task in sorted(runs.task[runs.experiment == "cpu-priors"].unique()):
        each = runs[(runs.task == task) & runs.experiment.isin(["cpu-priors", "cpu-methods"])]
        alone, prior, own = (each[each.method == name] for name in ("ppd-alone", "ppd-prior", "ppd"))
        for label, split in LEVELS.items():
            taught = scores_at(alone, "teacher", split)
            found = scores_at(prior, "teacher", split, taught), *(scores_at(x, "student", split, taught)
                                                                  for x in (alone, prior, own))
            table.append([task, label, *map(cell_of, (taught, *found))])
    header = ["task", "levels", "its teacher", "the prior", "student alone", "with the prior", "with its teacher"]
    return markdown(header, table)


def scores_at(rows: pd.DataFrame, player: str, split: str, teacher: tuple = ()) -> tuple:
    """Return a single run's mean return, its standard error over different games, and the fraction of a teacher's."""
    if rows.empty:
        return ()
    row = rows.iloc[0]
    mean, std, games = (row.get(f"{player}_{split}{kind}") for kind in ("mean", "std", "games"))
    error = std / (row.episodes if games is None or np.isnan(games) else games) ** 0.5
    return (mean, error, *([mean / teacher[0]] if teacher and teacher[0] > 0 else []))


def cell_of(found: tuple) -> str:
    """Return such a score as a cell."""
    if not found:
        return ""
    mean, error, *fraction = found
    return f"{number(mean)} ± {number(error, mean)}" + (f" ({fraction[0]:.2f})" if fraction else "")


def lambda_table(runs: pd.DataFrame, suite: str) -> str:
    """Return the λ study: larger students by PPD, as a fraction of their teachers."""
    runs = runs[(runs.experiment == "lambda") & (runs.suite == suite)]
    parts = comparable({value: runs[runs.distill_coef == value] for value in sorted(runs.distill_coef.unique())})
    runs, table = pd.concat(parts.values()), []
    tasks = sorted(runs.task.unique())
    for value, each in parts.items():
        found = aggregate(each)
        table.append([f"{value:g}" + (" (PPO)" if value == 0 else ""), found["geometric"], found["iqm"],
                      *(returns(each[each.task == task], "student") for task in tasks)])
    teachers = runs.drop_duplicates(["task", "seed"])
    table.append(["the teacher", "1", "1", *(returns(teachers[teachers.task == task], "teacher") for task in tasks)])
    return markdown(["λ", "geometric mean", "interquartile mean", *tasks], table)


def beyond_table(runs: pd.DataFrame, suite: str) -> str:
    """Return PPD with a changed term: fraction of the teacher's return, mean and half its 95% interval over seeds.

    The interval is by t. The last line of each size is the geometric mean over its tasks, if several. A cell rests
    on as many seeds as its variant has.
    """
    runs = runs[(runs.experiment == "beyond") & (runs.suite == suite)]
    names, table = [name for name in VARIANTS if name in set(runs.method)], []
    for size, rows in sorted(runs.groupby("size"), reverse=True):
        parts = {name: rows[rows.method == name] for name in names}
        for task in sorted(rows.task.unique()):
            table.append([size, task, *(interval_cell(fractions_of(each, task)) for each in parts.values())])
        if rows.task.nunique() > 1:
            cells = (aggregate(each)["geometric"] for each in comparable(parts).values())
            table.append([size, "geometric mean", *cells])
    return markdown(["students", "task", *(VARIANTS[name] for name in names)], table)


def several_table(runs: pd.DataFrame) -> str:
    """Return students of two corrupted teachers beside those of each: fractions of the original, as above."""
    runs, table = runs[runs.experiment == "several"], []
    parts = {name: runs[runs.method == name] for name in ("ppd", "ppd-second", "ppd-both")}
    for task in sorted(runs.task.unique()):
        cells = [(parts["ppd"], "corrupted_teacher"), (parts["ppd-second"], "corrupted_teacher"),
                 *((rows, "student") for rows in parts.values())]
        found = [fractions_of(rows, task, player) for rows, player in cells]
        table.append([task, *(f"{x.mean():.2f}" if len(x) else "" for x in found[:2]), *map(interval_cell, found[2:])])
    return markdown(["task", "teacher A", "teacher B", "student of A", "of B", "of both"], table)


def adaptive_table(runs: pd.DataFrame, suite: str) -> str:
    """Return students of corrupted teachers with λ that adapts, as fractions of the original; ± half a 95% interval.

    The geometric means are over the tasks and seeds that all lines have.
    """
    runs = runs[(runs.experiment == "adaptive") & (runs.suite == suite)]
    corrupted = "the corrupted teacher"
    lines = {corrupted: runs.drop_duplicates(["task", "seed"])}
    for method, what in (("ppd", "λ = {:g}"), ("ppd-decay", "λ falls with the return, from {:g}")):
        for value, rows in runs[runs.method == method].groupby("distill_coef"):
            lines[what.format(value)] = rows
    if "ppd-pbt" in set(runs.method):
        lines["a population of these λ"] = runs[runs.method == "ppd-pbt"]
    tasks, table = sorted(runs.task.unique()), []
    for (label, rows), common in zip(lines.items(), comparable(lines).values(), strict=True):
        player = "corrupted_teacher" if label == corrupted else "student"
        each = (interval_cell(fractions_of(rows, task, player)) for task in tasks)
        table.append([label, *each, aggregate(common, player)["geometric"]])
    return markdown(["", *tasks, "geometric mean"], table)


def interval_cell(values: np.ndarray) -> str:
    """Return the mean of a few seeds and half the width of its 95% confidence interval (by t), as a cell."""
    if len(values) < 2:
        return "".join(f"{x:.2f}" for x in values)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.2f} ± {half:.2f}"


# ======================================================================================================================
# Figures
# ======================================================================================================================


def looks(labels: dict) -> dict:
    """Return colour, line style and marker of each value: the methods' own, or from dark to light."""
    if set(labels) <= set(LOOKS):
        return {value: LOOKS[value] for value in labels}
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.8, len(labels)))
    return dict(zip(labels, zip(shades, itertools.cycle(LINES), itertools.cycle(MARKERS)), strict=False))


def panels(count: int, ylabel: str) -> tuple:
    """Make a figure of so many panels over environment steps, labelled at its edges; returns it and the panels."""
    columns = min(2 if count <= 4 else 3, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(PAGE, 2.0 * lines + 0.7), squeeze=False, layout="constrained")
    for i, axis in enumerate(axes.flat):
        axis.set(xlabel="environment steps" if i + columns >= count else "", ylabel=ylabel if i % columns == 0 else "")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count]


def finish(figure, title: str, path: Path) -> None:
    """Give a figure its title, and one legend of all panels below them, and write it."""
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if "the teacher" in handles:  # last
        handles["the teacher"] = handles.pop("the teacher")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6),
                  handlelength=3.2, columnspacing=1.5, frameon=False)
    figure.suptitle(title)
    figure.savefig(path)
    plt.close(figure)


def curves(folder: Path, runs: pd.DataFrame, column: str, labels: dict, name: str, title: str) -> bool:
    """Draw the return while students learn, and as evaluated at the end; returns whether there was anything to draw.

    A panel for each task, a line for each value of the column that is among the labels. The curve of teacher-distill
    would be its teacher's, which acts there, so only its end is drawn. Bands, which overlap where there are many lines,
    are left to the few.
    """
    tasks = sorted(runs.task.unique())
    if not tasks:
        return False
    few, look = len(labels) <= len(METHODS), looks(labels)
    figure, axes = panels(len(tasks), "episodic return")
    for axis, task in zip(axes, tasks, strict=True):
        for i, (value, label) in enumerate(labels.items()):
            color, line, marker = look[value]
            each = runs[(runs.task == task) & (runs[column] == value)]
            found = [curve_of(folder, run) for _, run in each.iterrows() if run.method != "teacher-distill"]
            found = [curve for curve in found if len(curve)]
            if found:  # seeds are interpolated to the steps of the first, where all have begun and none has ended
                steps = found[0].index
                steps = steps[(steps >= max(x.index[0] for x in found)) & (steps <= min(x.index[-1] for x in found))]
                values = np.array([np.interp(steps, curve.index, curve) for curve in found])
                apart = max(1, len(steps) // 6)  # between markers, which are not at the same steps on all lines
                axis.plot(steps, values.mean(0), color=color, linestyle=line, marker=marker, label=label,
                          markevery=(i * apart // len(labels), apart))
                if few and len(found) > 1:
                    mean, deviation = values.mean(0), values.std(0, ddof=1)
                    axis.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)
            if len(each):
                axis.errorbar(each.steps.max() * (1.05 + 0.035 * i), each.student_mean.mean(),
                              each.student_mean.std() if len(each) > 1 else None, color=color, marker=marker, capsize=2,
                              elinewidth=0.8, linestyle="none", label=label if value == "teacher-distill" else None)
        teachers = runs[runs.task == task].drop_duplicates("seed").teacher_mean
        axis.axhline(teachers.mean(), linestyle=(0, (1, 2)), color="black", linewidth=0.9, label="the teacher")
        axis.set(title=task, xlim=(0, None))
    finish(figure, f"{title}\n{spread(runs)}; right of the lines: as evaluated at the end", folder / name)
    return True


def profiles(folder: Path, runs: pd.DataFrame, name: str, title: str) -> bool:
    """Draw performance profiles of all methods, a panel for each size; returns whether there was anything to draw.

    Bands are 95% intervals at each threshold by bootstrap over seeds, stratified by task.
    """
    sizes = {}
    for size in SIZES:
        parts = by_method(runs[runs["size"] == size])
        found = {method: each for method, rows in parts.items() if (each := fractions(rows))}
        if found and several_seeds(pd.concat(parts.values())):
            sizes[size] = found
    if not sizes:
        return False
    figure, axes = plt.subplots(1, len(sizes), figsize=(PAGE, 2.7), squeeze=False, layout="constrained",
                                sharex=True, sharey=True)
    for axis, (size, found) in zip(axes.flat, sizes.items(), strict=True):
        thresholds = np.linspace(0, 1.02 * max(part.max() for parts in found.values() for part in parts), 301)
        for i, (method, parts) in enumerate(found.items()):
            color, line, marker = LOOKS[method]
            axis.plot(thresholds, performance_profile(parts, thresholds), color=color, linestyle=line, marker=marker,
                      markevery=(15 * i, 45), label=method)
            drawn = performance_profile(redrawn(parts, np.random.default_rng(0)), thresholds)
            low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
            axis.fill_between(thresholds, low, high, color=color, alpha=0.15, linewidth=0)
        axis.axvline(1, color="black", linewidth=0.9, linestyle=(0, (1, 2)), label="the teacher")
        axis.set(title=f"students: {size}", xlabel="fraction of the teacher's return (τ)")
    axes[0, 0].set(ylabel="share of runs above τ", xlim=(0, None), ylim=(0, 1.02))
    finish(figure, title, folder / name)
    return True


def divergences(folder: Path, runs: pd.DataFrame, name: str, title: str) -> bool:
    """Draw KL(teacher || student) in the reference's runs and in ours; returns whether there was anything to draw.

    A point of the reference's is the mean over a twentieth of the run, drawn in the middle of it.
    """
    theirs = runs[runs.experiment == "reference"].sort_values(["task", "size", "seed"])
    if theirs.empty:
        return False
    figure, axes = panels(len(theirs), "KL divergence")
    for axis, (_, run) in zip(axes, theirs.iterrows(), strict=True):
        file = folder / f"reference/{run.task}__{run['size']}__{run.seed}.json"
        curve = pd.DataFrame(json.loads(file.read_text())["curve"])
        ours = curve_of(folder, run.replace("reference", "methods"), "losses/teacher_kl")
        axis.plot(ours.index, ours, color="black", linestyle="-", marker="o", markevery=0.15, label="ours")
        middles = (curve.steps + curve.steps.shift(fill_value=0)) / 2
        axis.plot(middles, curve.kl, color="#D55E00", linestyle="--", marker="^", markevery=3, label="the reference")
        axis.set(title=f"{run.task}, {run['size']} ({run.seed})", yscale="log", xlim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(5))
    finish(figure, title, folder / name)
    return True


def curve_of(folder: Path, run: pd.Series, column: str = "charts/episodic_return") -> pd.Series:
    """Read a column of the thinned learning curve of a row's student by environment step, from its first value on."""
    experiment = "methods" if run.experiment == "lambda" and run.distill_coef == 1 else run.experiment
    first = run.seed if run.suite != "gymnax" else "*"
    coef = f"__{run.distill_coef:g}" if experiment == "lambda" and run.suite != "gymnax" else ""
    name, curve = f"{experiment}__{run.task}__{run.method}__{run['size']}__{first}{coef}.csv", pd.DataFrame()
    for path in sorted((folder / "curves").glob(name)):
        curve = pd.read_csv(path)
        if run.suite == "gymnax":
            curve = curve[(curve.phase == "student") & (curve.seed == run.seed)]
            curve = curve[curve.distill_coef == run.distill_coef] if experiment == "lambda" else curve
        if len(curve):
            break
    return curve.set_index("global_step")[column].dropna() if len(curve) else pd.Series(dtype=float)


def draw(folder: Path, runs: pd.DataFrame) -> list[str]:
    """Draw all figures that the results allow; returns markdown that shows them."""
    shown = []
    for suite in (suite for suite in SUITES if suite in set(runs.suite)):
        each = runs[(runs.suite == suite) & (runs["size"] == "larger")]
        name = f"figure{CURVE_FIGURES.get(suite, 1)}_{suite}.png"
        title = f"{SUITES[suite]}: larger students"
        if curves(folder, each[each.experiment == "methods"], "method", {x: x for x in METHODS}, name, title):
            shown.append(f"![{title}]({name})")
        title = f"{SUITES[suite]}: share of runs above a fraction of the teacher's return"
        name = f"profiles_{suite}.png"
        if profiles(folder, runs[(runs.suite == suite) & (runs.experiment == "methods")], name, title):
            shown.append(f"![{title}]({name})")
        small = runs[(runs.suite == suite) & (runs.experiment == "cpu-methods") & (runs["size"] == "smaller")]
        title, name = f"{SUITES[suite]} at CPU scale: students of 64 units", f"figure_cpu_{suite}.png"
        title += "; lines: training levels, marks: unseen ones" if suite == "procgen" else ""
        if curves(folder, small, "method", {x: x for x in METHODS}, name, title):
            shown.append(f"![{title}]({name})")
        changed = runs[(runs.suite == suite) & (runs.experiment == "beyond") & (runs["size"] == "smaller")]
        labels = {method: label for method, label in VARIANTS.items() if method in set(changed.method)}
        title = f"{name_of(suite, changed)}: smaller students by PPD with one thing changed"
        name = f"figure_beyond_{suite}.png"
        if curves(folder, changed, "method", labels, name, title):
            shown.append(f"![{title}]({name})")
        studied, name = each[each.experiment == "lambda"], f"figure2_{suite}.png"
        labels = {x: f"λ = {x:g}" for x in sorted(studied.distill_coef.unique())}
        title = f"{SUITES[suite]}: larger students by PPD with several λ"
        if curves(folder, studied, "distill_coef", labels, name, title):
            shown.append(f"![{title}]({name})")
    title, name = "PPD of the reference and ours: the divergence while students learn (their seed)", "reference.png"
    if divergences(folder, runs, name, title):
        shown.append(f"![{title}]({name})")
    return shown


# ======================================================================================================================
# The report
# ======================================================================================================================


def sections(runs: pd.DataFrame) -> dict[str, str]:
    """Return every table by its name, with a caption."""
    found, methods = {}, runs[runs.experiment == "methods"]
    both, interval = ("student", "corrupted_teacher"), "mean and 95% interval over seeds, by t; by bootstrap for the"
    if set(methods.suite) & set(CURVE_FIGURES):
        of_suites = methods[methods.suite.isin(CURVE_FIGURES)]
        found["overview"] = (f"Students as a fraction of their teachers (Table 1), {geometric(of_suites)}\n\n"
                             + overview_table(runs, "geometric"))
        found["overview-iqm"] = "The same, interquartile mean\n\n" + overview_table(runs, "iqm")
    if len(methods):
        found["summary"] = f"Students as a fraction of their teachers, {geometric(methods)}\n\n" + summary_table(runs)
    for suite in (suite for suite in SUITES if suite in set(runs.suite)):
        each, name = runs[runs.suite == suite], SUITES[suite]
        parts = dict(list(each.groupby("experiment")))
        kinds = set(parts)
        if "methods" in kinds:
            found[f"{suite}-methods"] = (
                f"{name}: students as a fraction of their teachers (Table 1), "
                f"{geometric(methods[methods.suite == suite])}\n\n" + methods_table(runs, suite, "geometric"))
            if suite not in CURVE_FIGURES:  # those are in the overview
                found[f"{suite}-methods-iqm"] = (
                    f"{name}: the same, interquartile mean\n\n" + methods_table(runs, suite, "iqm"))
            found[f"{suite}-returns"] = (
                f"{name}: returns, {spread(parts['methods'])} (Table 5)\n\n"
                + returns_table(runs, suite))
            if several_seeds(parts["methods"]):
                found[f"{suite}-improvement"] = (
                    f"{name}: probability that a student of PPD scores higher than a baseline's, with 95% intervals "
                    "over seeds\n\n" + improvement_table(runs, suite))
        if "reference" in kinds:
            found[f"{suite}-reference"] = (
                f"{name}: PPD of the reference beside ours, return ± standard deviation over episodes\n\n"
                + reference_table(runs))
        if "imperfect" in kinds:
            found[f"{suite}-imperfect"] = (
                f"{name}: larger students of corrupted teachers, as a fraction of the uncorrupted (Tables 2 and 6), "
                f"{geometric(parts['imperfect'], players=both)}\n\n"
                + imperfect_table(runs, suite, "geometric"))
            found[f"{suite}-imperfect-iqm"] = (
                f"{name}: the same, interquartile mean\n\n" + imperfect_table(runs, suite, "iqm"))
        if "lambda" in kinds:
            found[f"{suite}-lambda"] = (
                f"{name}: larger students by PPD with several λ; {geometric(parts['lambda'])}; "
                f"returns: {spread(parts['lambda'])}\n\n" + lambda_table(runs, suite))
        if any(kind.startswith("rate-") for kind in kinds):
            found[f"{suite}-rates"] = (
                f"{name}: larger students by learning rate, as a fraction of their teachers, "
                f"{geometric(each[each.experiment.str.startswith('rate-')])}\n\n" + rates_table(runs, suite))
        if "beyond" in kinds:
            found[f"{suite}-beyond"] = (
                f"{name_of(suite, parts['beyond'])}: PPD with one thing changed, as a fraction of "
                f"the teacher's return; {interval} {geometric(parts['beyond'])}\n\n"
                + beyond_table(runs, suite))
        if "adaptive" in kinds:
            found[f"{suite}-adaptive"] = (
                f"{name_of(suite, parts['adaptive'])}: larger students of corrupted teachers by PPD, "
                f"as a fraction of the original's return; {interval} "
                f"{geometric(parts['adaptive'], players=both)}\n\n" + adaptive_table(runs, suite))
        if "several" in kinds:
            found[f"{suite}-several"] = (
                f"{name}: larger students of two corrupted teachers and of each, as a fraction of the original's "
                "return; mean and 95% interval over seeds of students\n\n" + several_table(each))
        small = each[each.experiment.str.startswith("cpu-")]
        if "cpu-priors" in kinds:
            found[f"{suite}-priors"] = (
                f"{name} at CPU scale, {spread(small)}: returns ± standard error over games, and as a fraction of the "
                "return of the game's own teacher\n\n" + priors_table(runs))
        for experiment, key, of in (("cpu-methods", "cpu", ""), ("cpu-imperfect", "cpu-imperfect", "uncorrupted ")):
            if experiment in kinds:
                found[f"{suite}-{key}"] = (
                    f"{name} at CPU scale, {spread(small)}: returns ± standard error over games, and as a fraction of "
                    f"the {of}teacher's\n\n" + cpu_table(runs, suite, experiment))
        if suite == "procgen" and kinds & {"methods", "imperfect"}:
            found["procgen-train-methods"] = (
                f"{name}, training levels: students as a fraction of their teachers (Table 7), "
                f"{geometric(methods[methods.suite == suite], 'train_')}\n\n"
                + methods_table(runs, suite, "geometric", "train_"))
            found["procgen-train-returns"] = (
                f"{name}, training levels: returns (Table 5)\n\n" + returns_table(runs, suite, "train_"))
            found["procgen-train-imperfect"] = (
                f"{name}, training levels: corrupted teachers (Table 8), "
                f"{geometric(parts.get('imperfect', each[:0]), 'train_', both)}\n\n"
                + imperfect_table(runs, suite, "geometric", "train_"))
    return found


def fill_tables(text: str, tables: dict[str, str]) -> str:
    """Bring each table of a page between `<!-- report: NAME -->` and `<!-- end -->` up to date; returns the page."""
    def fill(match: re.Match) -> str:
        table = tables.get(match[2], "Not run yet.")
        return f"{match[1]}\n{table}\n<!-- end -->"

    return re.sub(r"(<!-- report: (\S+) -->)\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main(args: Args) -> None:
    """Write report.md, the figures and, from the repository's own results, the tables of README.md and docs/."""
    runs = load(args.results)
    tables = sections(runs)
    with plt.rc_context(STYLE):
        figures = draw(args.results, runs)
    text = "\n\n".join(["# Report of benchmark/report.py", *(f"## {table}" for table in tables.values()), *figures])
    (args.results / "report.md").write_text(text + "\n")
    print(text)
    if args.readme and args.results.resolve() == (ROOT / "benchmark/results").resolve():
        for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
            page.write_text(fill_tables(page.read_text(), tables))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
