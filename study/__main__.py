"""The paper's analysis: what becomes of CLIP's features, reference patches above all, in training.

    python -m study pictures --checkpoint out/toy/last.pt
    python -m study shift --checkpoints out/toy-rpmd/step-*.pt out/toy-plain/step-*.pt
    python -m study sweep ablate --seeds 8
"""
import argparse

from study.shift import pictures, shift
from study.sweep import TABLES, sweep
from support.accidents import door
from support.files import number


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for run in (pictures, shift, sweep):
        verb = verbs.add_parser(run.__name__, help=run.__doc__, description=run.__doc__,
                                allow_abbrev=False)
        verb.set_defaults(run=run)
        verb.add_argument("--out", default="out/study")
        if run is sweep:
            verb.add_argument("table", choices=sorted(path.stem for path in TABLES.glob("*.txt")))
            verb.add_argument("--seeds", type=number(int, 2), default=8, help="toy worlds")
            verb.add_argument("--first-seed", type=number(int, 0), default=1)
            verb.add_argument("--jobs", type=number(int, 1), default=2, help="runs at a time")
        else:
            verb.add_argument("--dataset", default="toy")
            verb.add_argument("--data-root")
        if run is pictures:
            verb.add_argument("--checkpoint", required=True)
        if run is shift:
            verb.add_argument("--checkpoints", nargs="+", required=True)
    args, args.further = parser.parse_known_args(argv)  # further: train.py's, for sweep
    if args.further and args.run is not sweep:
        parser.error(f"unrecognized arguments: {' '.join(args.further)}")
    return args


if __name__ == "__main__":
    with door():
        arguments = parse()
        arguments.run(arguments)
