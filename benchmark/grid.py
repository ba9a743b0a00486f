"""The paper's experiments as a grid of runs, and the same in miniature on gymnax: chosen by filters, run, collected.

    python benchmark/grid.py --suite mujoco --seed 100 --dry-run          # which commands would run
    python benchmark/grid.py --suite gymnax                               # the study of ppd_gymnax.py
    python benchmark/report.py --results runs/grid/results                # its tables and figures

A run that is done is not repeated, one that was cut off is resumed, one that fails is reported and the rest goes on.
On MuJoCo and at CPU scale students learn from the teachers of teachers/; where one is missing, and elsewhere, the grid
trains it first. Source: Spigler, "Proximal Policy Distillation", TMLR 2025 (arXiv 2407.15134): Table 1 (methods),
Table 2 (imperfect), Figure 2 (lambda).
"""

import csv
import ctypes
import dataclasses
import fcntl
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import submitit
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]

# The paper's tasks; of gymnax, MinAtar's
TASKS = {
    "atari": ("Atlantis-v5", "BeamRider-v5", "CrazyClimber-v5", "DemonAttack-v5", "Enduro-v5", "Freeway-v5",
              "MsPacman-v5", "Pong-v5", "Qbert-v5", "Seaquest-v5", "Zaxxon-v5"),
    "mujoco": ("Hopper-v4", "HalfCheetah-v4", "Ant-v4", "Humanoid-v4"),
    "procgen": ("CoinrunEasy-v0", "JumperEasy-v0", "MinerEasy-v0", "NinjaEasy-v0"),
    "gymnax": ("Asterix-MinAtar", "Breakout-MinAtar", "Freeway-MinAtar", "SpaceInvaders-MinAtar"),
}
CORRUPTED = {
    "atari": ("BeamRider-v5", "CrazyClimber-v5", "MsPacman-v5", "Qbert-v5"), "mujoco": (),
    "procgen": TASKS["procgen"], "gymnax": TASKS["gymnax"],
}
METHODS = ("ppd", "student-distill", "teacher-distill")
SIZES = ("smaller", "same", "larger")
CPU_TASKS = {"procgen": TASKS["procgen"], "atari": ("CrazyClimber-v5",)}  # images with networks that a CPU can train
# Nature-CNN with the 64 units of its teacher, or with 512
CPU_SIZES = {"smaller": (), "smaller-512": ("--student-hidden", "512")}
CPU_TEACHER_TIMESTEPS = {"procgen": "3000000", "atari": "1000000"}
CPU_STUDENT = {"procgen": (), "atari": ("--total-timesteps", "1000000")}
NOISE_STD = {"imperfect": 0.05, "cpu-imperfect": 0.05, "adaptive": 0.05,  # of corrupted teachers, by experiment
             "several": 0.02}  # MuJoCo's are left with little of their return by 0.05
DISTILL_COEFS = (0.5, 2.0, 5.0)  # and 1, which larger students have anyway
SEEDS = (100, 200, 300, 400, 500)
# PPD with one thing changed, by name; the students of STUDENT_SEEDS all learn from the teachers of seed 100
VARIANTS = {"ppd": (), "ppd-detached": ("--distill-weight", "detached"), "ppd-future": ("--distill-future-coef", "1"),
            "ppd-mean-clip": ("--teacher-mean-clip",), "ppd-decay": ("--distill-coef-decay", "return"),
            "ppd-pbt": ("--pbt-interval", "5"), "ppd-alone": ("--distill-coef", "0"), "ppd-prior": (),
            "ppd-second": (), "ppd-both": ("--distill-coef", "0.5")}
# what ppd_beyond.py has, and the script of a suite has not
OF_BEYOND = ("ppd-future", "ppd-mean-clip", "ppd-decay", "ppd-both")
BEYOND = {"mujoco": ("ppd", "ppd-detached", "ppd-future", "ppd-mean-clip"),
          "gymnax": ("ppd", "ppd-detached", "ppd-future")}
ADAPTIVE = ("ppd", "ppd-decay", "ppd-pbt")  # of corrupted teachers, each with several λ
# A teacher corrupted by one noise, by another, and both together with the same sum of λ
SEVERAL = ("ppd", "ppd-second", "ppd-both")
SEVERAL_TASKS = {"mujoco": ("HalfCheetah-v4", "Ant-v4")}
PRIOR = "CoinrunEasy-v0"  # the game whose teacher is a prior for students of others, beside students without a teacher
PRIORS = {"procgen": ("JumperEasy-v0", "NinjaEasy-v0")}
STUDENT_SEEDS = (100, 200, 300)
RATES = ("0.0004", "0.001")  # learning rates of MinAtar's larger students, beside the default

# One run of gymnax learns all of its seeds, and all λ, side by side; λ = 0 is PPO: what a student learns by itself
GYMNAX = ("--num-seeds", "5")
GYMNAX_STEPS = ("--teacher-timesteps", "10000000", "--total-timesteps", "2000000")  # the paper's
GYMNAX_SHORT = ("--teacher-timesteps", "1000000", "--total-timesteps", "200000")  # of these experiments:
SHORT = ("beyond", "adaptive", "short-teachers")
GYMNAX_COEFS = (0.0, *DISTILL_COEFS)

# Tasks of the miniature, and its flags; networks of images are too slow without a GPU
MINIATURE = {
    "mujoco": (("Hopper-v4",), ("--total-timesteps", "20000", "--eval-episodes", "5")),
    "gymnax": (("Breakout-MinAtar",), ("--num-seeds", "2", "--teacher-timesteps", "200000",
                                       "--total-timesteps", "40000", "--eval-episodes", "20")),
}

PAPER = ("teachers", "methods", "imperfect", "lambda")
EXPERIMENTS = (*PAPER, *(f"rate-{rate}" for rate in RATES), "beyond", "adaptive", "several", "short-teachers",
               "cpu-teachers", "cpu-methods", "cpu-imperfect", "cpu-priors")


class Run(NamedTuple):
    """One run of a script."""

    experiment: str
    suite: str
    task: str
    method: str
    size: str
    seed: int
    distill_coef: float | None = None  # None: the script's default; of gymnax's λ study, all of them

    @property
    def name(self) -> str:
        """Its folder: what it is, apart from all others."""
        coef = "" if self.distill_coef is None else f"__{self.distill_coef:g}"
        return f"{self.experiment}__{self.task}__{self.method}__{self.size}__{self.seed}{coef}"

    @property
    def script(self) -> str:
        """The script that does it."""
        if self.suite == "gymnax":
            return "ppd_gymnax.py"
        scripts = {"ppo": "train_teacher.py"} | dict.fromkeys(VARIANTS, f"ppd_{self.suite}.py")
        scripts |= dict.fromkeys(OF_BEYOND, "ppd_beyond.py")
        return scripts.get(self.method, f"{self.method.replace('-', '_')}.py")

    @property
    def teacher(self) -> "Run | None":
        """The run that makes its teacher."""
        if self.method == "ppo":
            return None
        if self.experiment.startswith("cpu"):
            task = PRIOR if self.method == "ppd-prior" else self.task
            return Run("cpu-teachers", self.suite, task, "ppo", "smaller", self.seed)
        if self.suite == "gymnax" and self.experiment in SHORT:
            return Run("short-teachers", self.suite, self.task, "ppo", "same", self.seed)
        seed = SEEDS[0] if self.experiment in ("beyond", "several") else self.seed
        return Run("teachers", self.suite, self.task, "ppo", "same", seed)


def experiments(suite: str) -> Iterator[Run]:
    """All runs of a suite, teachers first."""
    seeds = SEEDS[:1] if suite == "gymnax" else SEEDS
    for seed in seeds:
        yield from (Run("teachers", suite, task, "ppo", "same", seed) for task in TASKS[suite])
        for size in reversed(SIZES):
            yield from (Run("methods", suite, task, method, size, seed) for task in TASKS[suite] for method in METHODS)
        for task in CORRUPTED[suite]:
            yield from (Run("imperfect", suite, task, method, "larger", seed) for method in METHODS)
            if suite == "gymnax":
                yield Run("lambda", suite, task, "ppd", "larger", seed)
            elif suite == "atari":
                yield from (Run("lambda", suite, task, "ppd", "larger", seed, value) for value in DISTILL_COEFS)
    for seed in STUDENT_SEEDS if suite == "mujoco" else SEEDS[:1]:
        yield from (Run("beyond", suite, task, method, size, seed) for task in TASKS[suite]
                    for size in ("smaller", "larger") for method in BEYOND.get(suite, ()))
        yield from (Run("several", suite, task, method, "larger", seed)
                    for task in SEVERAL_TASKS.get(suite, ()) for method in SEVERAL)
    if suite == "gymnax":
        yield from (Run("short-teachers", suite, task, "ppo", "same", SEEDS[0]) for task in TASKS[suite])
        yield from (Run("adaptive", suite, task, method, "larger", SEEDS[0])
                    for task in TASKS[suite] for method in ADAPTIVE)
        yield from (Run(f"rate-{rate}", suite, task, method, "larger", SEEDS[0])
                    for rate in RATES for task in TASKS[suite] for method in METHODS)
    for task in CPU_TASKS.get(suite, ()):
        sizes = CPU_SIZES if suite == "procgen" else ("smaller",)
        yield Run("cpu-teachers", suite, task, "ppo", "smaller", SEEDS[0])
        yield from (Run("cpu-methods", suite, task, method, size, SEEDS[0]) for size in sizes for method in METHODS)
        if suite == "procgen":
            yield from (Run("cpu-imperfect", suite, task, method, "smaller-512", SEEDS[0]) for method in METHODS)
    yield from (Run("cpu-priors", suite, task, method, "smaller", SEEDS[0])
                for task in PRIORS.get(suite, ()) for method in ("ppd-prior", "ppd-alone"))


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program; any other filter that is not given lets everything pass."""

    experiment: tuple[Literal[*EXPERIMENTS], ...] = PAPER
    """filter, by default the paper's: teachers; every method and size; corrupted teachers; several λ; not the paper's:
    MinAtar's larger students with another learning rate; PPD with a changed distillation term; λ that adapts; two
    corrupted teachers; MinAtar's teachers for these; with cpu-, images at a scale that a CPU can train, priors among
    them: teachers of another game"""
    suite: tuple[Literal["atari", "mujoco", "procgen", "gymnax"], ...] = ()
    """filter"""
    task: tuple[str, ...] = ()
    """filter, by envpool's or gymnax's name"""
    method: tuple[Literal["ppo", *METHODS, *list(VARIANTS)[1:]], ...] = ()
    """filter; ppo trains teachers; those after teacher-distill are of the experiments that are not the paper's"""
    size: tuple[Literal[*SIZES, "smaller-512"], ...] = ()
    """filter: the student's size"""
    seed: tuple[int, ...] = ()
    """filter: 100, 200, 300, 400 or 500; gymnax's run of seed 100 is of five seeds"""
    dry_run: bool = False
    """print the command lines and stop"""
    folder: Path = Path("runs/grid")
    """where the runs go, seen from the repository's folder"""
    results: Path | None = None
    """where their rows go: {suite}.csv and curves/{run}.csv; by default the folder results within --folder"""
    processes: int | None = None
    """runs at a time, each on cores of its own; by default one for each core, and on Slurm all"""
    executor: Literal["local", "slurm"] = "local"
    """this machine, or a Slurm cluster, whose nodes see this folder; preempted runs go on from their checkpoints"""
    slurm_partition: str | None = None
    """Slurm: partition"""
    slurm_minutes: int = 24 * 60
    """Slurm: time limit of a job; a run that needs longer goes on in another"""
    slurm_cpus: int = 4
    """Slurm: cores of a run"""
    slurm_gpus: int = 0
    """Slurm: GPUs of a run"""
    miniature: bool = False
    """a small part of the grid with small budgets, which shows in minutes that all of it works"""
    extra: str = ""
    """more flags for every run, in quotes: --extra="--total-timesteps 50000" """


# ======================================================================================================================
# Command lines
# ======================================================================================================================


def shipped_path(teacher: Run) -> str:
    """Where the teacher that a run would make lies if it is shipped, within the repository."""
    return f"teachers/{teacher.task}__{teacher.seed}.safetensors"


def made_teacher(run: Run) -> Run | None:
    """The run of the grid that a student's teacher comes from; none where its teacher is shipped.

    The shipped teachers of images are small ones, for the experiments at CPU scale alone.
    """
    shipped = run.teacher and (ROOT / shipped_path(run.teacher)).exists()
    return None if shipped and (run.suite == "mujoco" or run.experiment.startswith("cpu")) else run.teacher


def teacher_path(run: Run, args: Args) -> str:
    """Where a student's teacher is or will be: shipped, or made by the grid; of gymnax, a folder with one a seed."""
    if made_teacher(run) is None:
        return shipped_path(run.teacher)
    return str(args.folder / run.teacher.name) + ("" if run.suite == "gymnax" else "/teacher.safetensors")


def command(run: Run, args: Args) -> list[str]:
    """The command line of a run, from the start, for the repository's folder."""
    words = ["python", run.script, "--env-id", run.task, "--seed", str(run.seed)]
    if run.suite == "gymnax":
        words += [*GYMNAX, *(GYMNAX_SHORT if run.experiment in SHORT else GYMNAX_STEPS)]
        words += ["--method", "ppd" if run.method in VARIANTS else run.method]
    if run.experiment == "cpu-teachers":
        words += ["--size", "smaller", "--total-timesteps", CPU_TEACHER_TIMESTEPS[run.suite]]
    if run.method != "ppo":
        size = run.size.partition("-")[0]
        words += ["--teacher", *[teacher_path(run, args)] * (2 if run.method == "ppd-both" else 1)]
        words += ["--student-size", size, *CPU_SIZES.get(run.size, ())]
        noise_std = NOISE_STD.get(run.experiment, 0.0)
        if run.suite == "gymnax" or noise_std:
            words += ["--teacher-noise-std", str(noise_std)]
            if noise_std:
                words += ["--teacher-noise-seed", str(run.teacher.seed + (run.method == "ppd-second"))]
        if run.experiment.startswith("cpu"):
            words += CPU_STUDENT[run.suite]
    words += VARIANTS.get(run.method, ())
    if run.experiment.startswith("rate-"):
        words += ["--learning-rate", run.experiment.removeprefix("rate-")]
    if run.experiment in ("lambda", "adaptive"):
        several = GYMNAX_COEFS if run.experiment == "lambda" else (0.5, 1.0, 2.0, 5.0)
        values = several if run.distill_coef is None else (run.distill_coef,)
        words += ["--distill-coef", *(f"{value:g}" for value in values)]
    if args.miniature:
        words += MINIATURE[run.suite][1]
    return words + shlex.split(args.extra) + ["--run-dir", str(args.folder / run.name)]


def chosen(args: Args) -> list[Run]:
    """The runs that pass the filters, and those that make their missing teachers, before them."""
    runs = []
    for suite in args.suite or TASKS:
        for run in experiments(suite):
            filters = ((args.experiment, run.experiment), (args.task, run.task), (args.method, run.method),
                       (args.size, run.size), (args.seed, run.seed))
            small = not args.miniature or (run.seed == SEEDS[0] and run.task in MINIATURE.get(suite, ((),))[0])
            if small and all(not wanted or value in wanted for wanted, value in filters):
                runs.append(run)
    return list(dict.fromkeys([teacher for run in runs if (teacher := made_teacher(run))] + runs))


# ======================================================================================================================
# Running
# ======================================================================================================================


GPUS = ("CUDA_VISIBLE_DEVICES",)
OF_THE_GRID = {"--teacher", "--method", "--student-size", "--size", "--resume"}  # beside what it gives a run anyway
BUDGETS = {"--total-timesteps", "--teacher-timesteps", "--num-seeds", "--eval-episodes"}  # which --extra may change
MAX_ARRAY = 1000  # jobs; what Slurm allows unless it is told otherwise


def is_done(run: Run, args: Args) -> bool:
    """Whether a run has ended with its results, which it writes last."""
    return (ROOT / args.folder / run.name / "results.json").exists()


def is_another(run: Run, args: Args) -> bool:
    """Whether the folder has a run of this name by another command: other budgets, say."""
    path, words = ROOT / args.folder / f"{run.name}.command", known_command(run, args)
    return path.exists() and path.with_name(run.name).exists() and path.read_text() != words


def known_command(run: Run, args: Args) -> str:
    """The command line of a run wherever its folder lies."""
    return shlex.join(command(run, dataclasses.replace(args, folder=Path("FOLDER")))) + "\n"


def fail(message: str) -> NoReturn:
    """Ends the program for bad input: one line on stderr, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Execution:
    """One script run to its end, from its checkpoint where there is one: what a job of submitit calls."""

    script: subprocess.Popen | None = None

    def __call__(self, run: Run, args: Args, cores: list[int] | None, grid: int | None, gpus: dict[str, str]) -> None:
        """Returns when the run has ended, and raises where it failed.

        cores: that it may use, or all. grid: on the grid's own machine its process: where that has ended, the run saves
        and ends too. gpus: the variable that says which are visible, if it was set.
        """
        if cores:
            os.sched_setaffinity(0, cores)
        env = {name: value for name, value in os.environ.items() if name not in GPUS} if grid else dict(os.environ)
        env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # runs that share a GPU share its memory
        folder, log_path = ROOT / args.folder / run.name, ROOT / args.folder / f"{run.name}.log"
        with open(log_path, "a") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # the script holds it too: one that still saves is waited for
            if is_another(run, args):  # of a grid that began together with this one
                raise RuntimeError(f"{args.folder} has {run.name} by another command")
            if is_done(run, args):
                return
            words = command(run, args)
            if any(folder.glob("checkpoint_*.safetensors")):
                words = [*words[:2], "--resume", str(args.folder / run.name)]
            else:  # it ended before its first checkpoint, or has not begun
                shutil.rmtree(folder, ignore_errors=True)
                folder.with_name(f"{run.name}.command").write_text(known_command(run, args))
            print("$", shlex.join(words), file=log, flush=True)
            self.script = subprocess.Popen([sys.executable, *words[1:]], cwd=ROOT, env=env | gpus, stdout=log,
                                           stderr=log, preexec_fn=prepare_script)
        while self.script.poll() is None and (grid is None or Path(f"/proc/{grid}").exists()):
            time.sleep(0.2)
        self.stop()
        ended = (128 + signal.SIGTERM, -signal.SIGTERM)  # with its checkpoint, or before it caught signals
        if grid is None and self.script.returncode in ended:
            time.sleep(3600)  # preempted: Slurm is about to end this job, and to begin it again
        if self.script.returncode:
            raise RuntimeError(f"exit code {self.script.returncode}")

    def stop(self) -> None:
        """Lets the script finish its update and save, if it still runs."""
        if self.script is not None:
            if self.script.poll() is None:
                self.script.terminate()
            self.script.wait()

    def checkpoint(self, *args: Any) -> submitit.helpers.DelayedSubmission:
        """Called shortly before Slurm's time limit; what is returned goes back into the queue."""
        self.stop()
        return submitit.helpers.DelayedSubmission(Execution(), *args)


def prepare_script() -> None:
    """Within the script's process: it gets SIGTERM when this one ends, and leaves Ctrl-C and Slurm's warning to it."""
    os.setsid()
    end_with_parent = 1  # PR_SET_PDEATHSIG of Linux
    ctypes.CDLL(None).prctl(end_with_parent, signal.SIGTERM)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def progress(run: Run, args: Args) -> float:
    """How much of a run is done, from 0 to 1."""
    try:
        with open(ROOT / args.folder / run.name / "args.json") as file:
            flags = json.load(file)
        with open(ROOT / args.folder / run.name / "progress.csv", "rb") as file:
            header = next(csv.reader([file.readline().decode()]))
            file.seek(max(file.tell(), os.fstat(file.fileno()).st_size - 2000))
            row = next(csv.reader([file.read().decode().splitlines()[-1]]))
        steps = flags["teacher_timesteps" if run.method == "ppo" and run.suite == "gymnax" else "total_timesteps"]
        return min(1.0, int(row[header.index("global_step")]) / steps)
    except (OSError, ValueError, IndexError, KeyError, StopIteration):  # it has not begun to write
        return 0.0


def last_words(run: Run, args: Args) -> str:
    """The last line of words that a run has printed, a frame around them aside: where it failed, why."""
    path = ROOT / args.folder / f"{run.name}.log"
    lines = path.read_text(errors="replace").replace("\r", "\n").splitlines() if path.exists() else []
    lines = [line.strip(" │") for line in lines if re.search(r"\w", line)]
    return lines[-1] if lines else f"it has not begun; see {args.folder / 'jobs'}"


def make_executor(args: Args) -> submitit.AutoExecutor:
    """What jobs are submitted to."""
    executor = submitit.AutoExecutor(ROOT / args.folder / "jobs", cluster=args.executor, slurm_max_num_timeout=100)
    if args.executor == "local":
        executor.update_parameters(timeout_min=10**6)
    else:
        executor.update_parameters(
            name="ppd", timeout_min=args.slurm_minutes, cpus_per_task=args.slurm_cpus,
            slurm_partition=args.slurm_partition, slurm_array_parallelism=args.processes or MAX_ARRAY,
            slurm_signal_delay_s=120,
            slurm_additional_parameters={"requeue": True} | ({"gpus": args.slurm_gpus} if args.slurm_gpus else {}))
    return executor


def run_all(runs: list[Run], args: Args) -> dict[Run, str]:
    """Executes runs side by side, a student after its teacher; returns the reasons of failures.

    On this machine all have equally many cores of their own, whichever runs are done already, since the floats of a run
    depend on their number; on Slurm all that are ready become one array.
    """
    executor, local = make_executor(args), args.executor == "local"
    waiting, running, failed = [run for run in runs if not is_done(run, args)], {}, {}
    available = sorted(os.sched_getaffinity(0))
    processes = max(1, min(args.processes or len(available), len(available), len(runs)))
    each = len(available) // processes
    free = [available[i * each:(i + 1) * each] for i in range(processes)]
    gpus = {name: os.environ[name] for name in GPUS if name in os.environ} if local else {}
    bar = tqdm(total=len(runs), unit=" runs", initial=len(runs) - len(waiting),
               bar_format="{l_bar}{bar}| {n:.1f}/{total} runs [{elapsed}<{remaining}{postfix}]",
               mininterval=0.5 if sys.stderr.isatty() else 60.0)
    with bar:
        while waiting or running:
            for run, (job, cores) in list(running.items()):
                if job.done():
                    del running[run]
                    free.append(cores)
                    if reason := fault(run, args):
                        failed[run] = reason
                        bar.write(f"failed: {run.name}: {reason}")
            ready = []
            for run in list(waiting):
                teacher = made_teacher(run)
                if teacher in failed:
                    waiting.remove(run)
                    failed[run] = f"its teacher failed: {teacher.name}"
                elif teacher is None or is_done(teacher, args):
                    ready.append(run)
            ready = ready[:len(free) if local else min(MAX_ARRAY, (args.processes or MAX_ARRAY) - len(running))]
            places = [free.pop(0) if local else None for _ in ready]
            if ready:
                interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # jobs inherit it: Ctrl-C ends this program,
                try:
                    with executor.batch():  # which they notice
                        jobs = [executor.submit(Execution(), run, args, cores, os.getpid() if local else None, gpus)
                                for run, cores in zip(ready, places, strict=True)]
                except submitit.core.utils.FailedJobError as error:
                    fail(f"Slurm takes no jobs: {' '.join(str(error).split())}")
                signal.signal(signal.SIGINT, interrupt)
                running |= dict(zip(ready, zip(jobs, places, strict=True), strict=True))
                waiting = [run for run in waiting if run not in running]
            bar.n = len(runs) - len(waiting) - len(failed) - sum(1 - progress(run, args) for run in running)
            names = ", ".join(run.name for run in list(running)[:3])
            bar.set_postfix_str(f"{len(running)} running: {names}", refresh=False)
            bar.refresh() if sys.stderr.isatty() else bar.update(0)
            time.sleep(0.5 if local else 5.0)
    return failed


# ======================================================================================================================
# Results
# ======================================================================================================================

PLAYERS = ("teacher", "corrupted_teacher", "student")
KINDS = ("mean", "std", "games", "train_mean", "train_std", "train_games", "human_normalised")
COLUMNS = ["experiment", "suite", "task", "method", "size", "seed", "distill_coef", "teacher_noise_std", "steps",
           "episodes", *(f"{player}_{kind}" for player in PLAYERS for kind in KINDS),
           "steps_per_second", "seconds", "versions", "command"]
KEY = COLUMNS[:7]
CURVE_COLUMNS = ("phase", "seed", "distill_coef", "global_step", "charts/episodic_return", "losses/teacher_kl")
CURVE_POINTS = 50


def figures(player: str, found: dict[str, Any]) -> dict[str, float]:
    """The cells of one evaluation; of Procgen also on the levels of training, of Atari also human-normalised."""
    cells = {f"{player}_{kind}": found[kind] for kind in KINDS if kind in found}
    if "train_levels" in found:
        cells |= {f"{player}_train_{kind}": found["train_levels"][kind] for kind in ("mean", "std", "games")}
    return cells


def rows(run: Run, args: Args) -> list[dict[str, Any]]:
    """The rows of a finished run: one, or of gymnax one for each seed and λ."""
    results = json.loads((ROOT / args.folder / run.name / "results.json").read_text())
    flags = results["args"]
    about = {"experiment": run.experiment, "suite": run.suite, "task": run.task, "method": run.method, "size": run.size,
             "seed": run.seed, "teacher_noise_std": flags.get("teacher_noise_std", 0.0),
             "steps": flags["total_timesteps"], "episodes": flags["eval_episodes"],
             "seconds": round(results["seconds"], 1), "command": results["command"],
             "versions": " ".join(f"{name} {version}" for name, version in results["versions"].items())}
    if run.suite != "gymnax":
        cells = {name: cell for player in PLAYERS if player in results for name, cell in
                 figures(player, results[player]).items()}
        coef = flags.get("distill_coef", "")
        coef = coef[0] if isinstance(coef, list) else coef  # of ppd_beyond.py one for each teacher
        return [about | cells | {"distill_coef": coef, "steps_per_second": round(results["SPS"])}]
    if run.method == "ppo":
        about |= {"steps": flags["teacher_timesteps"], "teacher_noise_std": 0.0}
    about["steps_per_second"] = round(results["teacher_SPS" if run.method == "ppo" else "student_SPS"])

    table = []
    coefs = flags["distill_coef"] if run.method in VARIANTS and run.method != "ppd-pbt" else [""]
    for coef in coefs:
        for i in range(flags["num_seeds"]):
            row = about | {"seed": flags["seed"] + i, "distill_coef": coef}
            for player in PLAYERS:
                name = player if player != "student" or len(coefs) == 1 else f"student_{coef:g}"
                if name in results["results"] and not (run.method == "ppo" and player == "corrupted_teacher"):
                    returns = results["results"][name]["returns"][i]
                    row |= figures(player, {"mean": float(np.mean(returns)), "std": float(np.std(returns))})
            table.append(row)
    return table


def record(run: Run, args: Args) -> None:
    """Writes a finished run's rows into its suite's table, in place of older ones of it, and its thinned curve."""
    folder = ROOT / (args.results or args.folder / "results")
    (folder / "curves").mkdir(parents=True, exist_ok=True)
    path, table = folder / f"{run.suite}.csv", {}
    found = [{name: str(row.get(name, "")) for name in COLUMNS} for row in rows(run, args)]
    # Of gymnax, a run is of all seeds and all λ; a run that names no λ is the only one of its seed
    names = KEY[:5] if run.suite == "gymnax" else KEY[:6] if run.distill_coef is None else KEY
    replaced = {tuple(row[name] for name in names) for row in found}
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # another grid may write, too
    if path.exists():
        with open(path, newline="") as file:
            table = {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)
                     if tuple(row[name] for name in names) not in replaced}
    table |= {tuple(row[name] for name in KEY): row for row in found}
    write_csv(path, COLUMNS, [table[key] for key in sorted(table)])
    os.close(lock)

    with open(ROOT / args.folder / run.name / "progress.csv", newline="") as file:
        curve = list(csv.DictReader(file))
    steps = sorted({int(row["global_step"]) for row in curve})
    kept = {steps[i] for i in np.linspace(0, len(steps) - 1, CURVE_POINTS).astype(int)}
    names = [name for name in CURVE_COLUMNS if name in curve[0]]
    thinned = [{name: row[name] for name in names} for row in curve if int(row["global_step"]) in kept]
    write_csv(folder / "curves" / f"{run.name}.csv", names, thinned)


def fault(run: Run, args: Args) -> str:
    """Records a run that has ended; returns why that cannot be, or nothing."""
    if is_another(run, args):
        return f"{args.folder} has it by another command"
    if not is_done(run, args):
        return last_words(run, args)
    try:
        record(run, args)
    except (OSError, ValueError, KeyError, IndexError, csv.Error) as error:
        return f"its results cannot be recorded: {type(error).__name__}: {error}"
    return ""


def write_csv(path: Path, columns: list[str], table: list[dict[str, Any]]) -> None:
    """Writes a table whole or not at all."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text.getvalue())
    os.replace(temporary, path)


def main(args: Args) -> int:
    """Runs the chosen part of the grid; returns how many runs failed."""
    if args.processes is not None and args.processes < 1:
        fail(f"--processes must be at least 1, not {args.processes}")
    try:
        given = {word.partition("=")[0].replace("_", "-") for word in shlex.split(args.extra)}
    except ValueError as error:
        fail(f"--extra {args.extra}: {error}")
    runs = chosen(args)
    if not runs:
        fail("no run passes these filters")
    told = {word for run in runs for word in command(run, dataclasses.replace(args, extra="")) if word.startswith("--")}
    if own := sorted(given & (OF_THE_GRID | told - BUDGETS)):
        fail(f"--extra cannot change {own[0]}, which the rows of a run go by")
    if others := [run for run in runs if is_another(run, args)]:
        fail(f"{args.folder} has {others[0].name} by another command; name another --folder")
    if args.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
        for run in runs:
            print(shlex.join(command(run, args)), *["  # done"] * is_done(run, args))
        return 0
    for path in (args.folder, args.results or args.folder / "results"):
        try:
            (ROOT / path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot create {path}: {error.strerror}")
    began = time.time()
    try:
        failed = run_all(runs, args)
    except KeyboardInterrupt:
        what = "the runs save and end" if args.executor == "local" else "what is in Slurm's queue stays there"
        print(f"interrupted: {what}; the same command goes on", file=sys.stderr)
        raise SystemExit(130) from None
    failed |= {run: reason for run in runs if run not in failed and (reason := fault(run, args))}
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are done, after {(time.time() - began) / 60:.0f} min; "
          f"results: {args.results or args.folder / 'results'}")
    for run, reason in failed.items():
        print(f"failed: {run.name}: {reason}")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(1 if main(tyro.cli(Args, description=__doc__)) else 0)
