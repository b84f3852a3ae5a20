"""Makes the pictures, then trains every adapter: python make.py --packages DIR [--only TASK ...] [--data-only].

Writes data/, adapters/ and tasks.yaml of this folder, and keeps training pictures in work/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from domains import TRAINING, Domains
from listing import trained, write_taskset
from packages import Packages
from pictures import training_table, write_data
from score import score_all
from tasks import TASKS
from train import Frozen, Schedule, load_base, prepare, train

from coremerge.evaluation import read_taskset

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packages' files")
    parser.add_argument("--base", help="the base model's folder, instead of making it from its package")
    parser.add_argument("--only", action="append", choices=TASKS, help="train and score this task alone")
    parser.add_argument("--data-only", action="store_true", help="write the pictures and rows, train nothing")
    parser.add_argument("--keep-data", action="store_true", help="leave the pictures and rows as they are")
    parser.add_argument("--scores-only", action="store_true", help="train nothing, score what is there")
    parser.add_argument("--images", type=int, default=Schedule.images, help="seen in training, all epochs together")
    arguments = parser.parse_args()
    domains = Domains(Packages(arguments.packages))
    if not arguments.keep_data:
        write_data(HERE, domains)
    if arguments.data_only:
        return
    base = arguments.base or located()
    names = arguments.only or (trained(HERE) if arguments.scores_only else list(TASKS))
    if not arguments.scores_only:
        train_all(domains, base, names, arguments.images)
    write_taskset(HERE)
    score_all(HERE, base, names)


def located() -> str:
    """The base model that the task set names."""
    base = read_taskset(HERE).base
    assert base is not None
    return base.locate(HERE)


def train_all(domains: Domains, source: str, names: list[str], images: int) -> None:
    """Trains adapters one after the other."""
    base = load_base(source)
    frozen = Frozen(base)
    for name in names:
        task = TASKS[name]
        table = training_table(domains, task.domain, TRAINING[task.domain], HERE / "work")
        schedule = Schedule.of(task, images)
        train(base, frozen, prepare(HERE, name, task, table), schedule, HERE / "adapters" / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
