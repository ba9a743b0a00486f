"""Procgen's levels: how many of the unseen ones look like one of training, and what a player gets who does nothing.

    python benchmark/levels.py --json benchmark/results/pixels/levels.json

The levels are those of the scripts: 200 of training, and for evaluation any other. A game of each is begun; two levels
look alike whose first images are equal. The player then keeps to Procgen's action 4, which does nothing, until the end.
"""

import dataclasses
import importlib.metadata
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import ppd_procgen as m  # noqa: E402

NOTHING = 4  # of the 15 actions, the one without a key


@dataclasses.dataclass(frozen=True)
class Args:
    """All flags of this program."""

    env_id: tuple[str, ...] = ("CoinrunEasy-v0", "JumperEasy-v0", "NinjaEasy-v0", "MinerEasy-v0")
    """games"""
    num_levels: int = 200
    """levels of training, from the first on"""
    games: int = 1000
    """games begun on unseen levels, and on those of training as often until no more of them are found"""
    seed: int = 100
    """seed of the choice of levels"""
    json: str | None = None
    """also write the figures to this file"""


def look(env_id: str, args: Args) -> dict[str, float]:
    """Begin games on levels of training until none is new, and games on unseen levels, which are played to the end."""
    variant = {"num_levels": args.num_levels, "start_level": 0}
    known, before, seed = set(), None, args.seed
    while len(known) != before:
        envs, before = m.make_envs(env_id, args.games, seed, variant), len(known)
        known |= {image.tobytes() for image in m.reset(envs)}
        seed += args.games
        envs.close()
    unseen = partial(m.make_envs, env_id, args.games, m.EVAL_SEED + args.seed, variant, unseen=True)
    envs, nothing = unseen(), np.full(args.games, NOTHING, np.int32)
    alike = sum(image.tobytes() in known for image in m.reset(envs))
    *_, ends = m.step(envs, nothing)
    envs.close()
    played = m.evaluate(unseen(), lambda images, t: nothing)  # the same games again
    return {"images_of_training": len(known), "games": args.games, "alike": alike, "end_on_first_step": int(ends.sum()),
            "return_for_nothing": played["mean"]}


def main(args: Args) -> dict:
    """Look at all games, print and return the figures."""
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)  # not only when all is measured
    about = {"command": " ".join(["python benchmark/levels.py", *sys.argv[1:]]), "seed": args.seed,
             "versions": {name: importlib.metadata.version(name) for name in ("envpool", "numpy")}, "levels": {}}
    for env_id in args.env_id:
        found = about["levels"][env_id] = look(env_id, args)
        print(f"{env_id:<16} of {args.games:,} unseen levels {found['alike']} look like one of training "
              f"({found['images_of_training']} images), {found['end_on_first_step']} end on the first step, "
              f"return for doing nothing {found['return_for_nothing']:.2f}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(about, indent=2) + "\n")
    return about


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
