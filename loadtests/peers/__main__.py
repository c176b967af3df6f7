"""`python -m loadtests.peers prepare|run`: see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from loadtests.peers.columns import COLUMNS, OURS, columns
from loadtests.peers.compare import Bounds, compare
from loadtests.peers.folder import Folder, default_root
from loadtests.peers.machine import label, num_cores
from loadtests.peers.prepare import PEERS, prepare
from loadtests.peers.report import save, show
from loadtests.peers.shapes import SHAPES
from loadtests.peers.work import Work

PAGE_WIDTH = 110  # of tables that go to a file
RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    """Exit status: 0 done, 1 something is missing or failed, 2 wrong arguments."""
    arguments = _parser().parse_args()
    folder = Folder(arguments.dir.resolve())
    if arguments.command == "prepare":
        failed = prepare(folder, arguments.only, arguments.shapes, arguments.jobs)
        return 1 if failed else 0
    return _run(arguments, folder)


def _run(arguments: argparse.Namespace, folder: Folder) -> int:
    shape = SHAPES[arguments.shape]
    wanted = arguments.prompt + arguments.output
    if wanted > shape.context_length:
        sys.exit(
            f"{arguments.prompt} + {arguments.output} tokens were asked for; "
            f"{shape.name} was made for {shape.context_length}"
        )
    work = Work(
        shape=shape.name,
        dtype=arguments.dtype,
        what=arguments.what,
        batches=arguments.batch,
        prompt_tokens=arguments.prompt,
        # Prefill is over with the first token.
        output_tokens=1 if arguments.what == "prefill" else arguments.output,
        threads=arguments.threads,
        vocab_size=shape.vocab_size,
        folder=str(folder.root),
        checkpoint=str(shape.checkpoint(folder.root)),
        seed=arguments.seed,
    )
    console = Console()
    if not console.is_terminal:
        console.width = PAGE_WIDTH
    progress = Console(stderr=True)
    comparison = compare(
        columns(arguments.what, arguments.contenders),
        work,
        rounds=arguments.rounds,
        bounds=_bounds(arguments),
        say=lambda text: progress.print(text, markup=False, highlight=False, soft_wrap=True),
    )
    show(comparison, console)
    if arguments.out is not None:
        console.print(f"written: {save(comparison, arguments.out)}")
    return 1 if comparison.missing else 0


def _bounds(arguments: argparse.Namespace) -> Bounds:
    if arguments.no_wait:
        return Bounds(arguments.limit_s, wait_s=0.0, repeats=0)
    return Bounds(arguments.limit_s, arguments.wait_s, arguments.repeats)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.peers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    make = commands.add_parser("prepare", help="make what is missing; run again to go on")
    make.add_argument("--only", type=_names(PEERS), default=PEERS, help=",".join(PEERS))
    make.add_argument("--shapes", type=_names(SHAPES), default=(*SHAPES,), help=",".join(SHAPES))
    make.add_argument("--jobs", type=int, default=num_cores(), help="of the compiler")

    run = commands.add_parser("run", help="measure in turns and print ratios")
    run.add_argument("--shape", choices=SHAPES, default="gpt2")
    run.add_argument("--dtype", choices=("fp32", "bf16", "int8"), default="bf16")
    run.add_argument("--what", choices=("decode", "prefill", "http"), default="decode")
    run.add_argument("--batch", type=_numbers, default=(1, 8, 32), help="such as 1,8,32")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    run.add_argument("--output", type=int, default=128, help="tokens to generate for each")
    run.add_argument("--threads", type=int, default=num_cores(), help="of every contender")
    peers = dict.fromkeys(column.name for column in COLUMNS if column.name != OURS)
    run.add_argument("--contenders", type=_names(peers), default=(), help=",".join(peers))
    run.add_argument("--seed", type=int, default=7)
    run.add_argument("--limit-s", type=float, default=300.0, help="for one contender's process")
    run.add_argument("--wait-s", type=float, default=60.0, help="for a quiet machine, each time")
    run.add_argument("--repeats", type=int, default=2, help="of a process that was disturbed")
    run.add_argument("--no-wait", action="store_true", help="measure now, whoever is there")
    run.add_argument(
        "--out",
        type=Path,
        nargs="?",
        const=RESULTS / label(),
        help="write JSON too; without a folder, to results/<machine>",
    )
    for command in (make, run):
        command.add_argument(
            "--dir", type=Path, default=default_root(), help="of the peers ($PEERS_DIR)"
        )
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: batches are 1 or more")
    return numbers


def _names(known: object) -> object:
    names = [str(name) for name in known]  # type: ignore[attr-defined]

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(names)}")
        return chosen

    return parse


if __name__ == "__main__":
    sys.exit(main())
