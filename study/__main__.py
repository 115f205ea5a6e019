"""The paper's analysis: what becomes of CLIP's features, reference patches above all, in training.

    python -m study pictures --checkpoint out/toy/last.pt
    python -m study shift --checkpoints out/toy/step-*.pt plain/last.pt
    python -m study ablate --seeds 8      and likewise curve, spread, sweep

shift compares checkpoints: a run's snapshots (train.py --snapshot-every), or runs with different
--adapt and --distill. The last four train every row of a table with the same seeds, several runs
side by side, and write VERB.md, VERB.png and VERB.jsonl, a run a line. The same command goes on
where it stopped. Further flags are train.py's and hold for every run."""
import argparse
from pathlib import Path

from data import NAMES
from study import compare, measures
from support import runs
from support.flags import non_negative_int, positive_int

READ = (measures.pictures, measures.shift)
TRAIN = (compare.ablate, compare.curve, compare.spread, compare.sweep)


def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m study", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(required=True, dest="verb")
    for run in READ + TRAIN:
        verb = run.__name__
        command = verbs.add_parser(verb, help=run.__doc__, description=run.__doc__,
                                   allow_abbrev=False)
        worlds = (3, 101) if verb == "sweep" else (5, 1)
        command.set_defaults(run=run, dataset="toy", unseen=None)
        add = command.add_argument
        add("--out", default="out/study", help="folder for results (default out/study), and for "
            "runs, which verbs share: those that two of them need are trained once")
        if verb == "pictures":
            add("--checkpoint", required=True, help="of train.py")
        if verb == "shift":
            add("--checkpoints", required=True, nargs="+", help="of train.py, whole or snapshots")
        if run in READ:
            add("--dataset", help=", ".join(NAMES))
            add("--data-root", help="the folder that holds the datasets")
            add("--images", type=non_negative_int, default=0,
                help="how many, evenly spread (default 6 to draw, all to measure)")
            continue
        add("--seeds", type=positive_int, default=worlds[0], help=f"how many (default {worlds[0]})")
        add("--first-seed", type=non_negative_int, default=worlds[1], help=f"default {worlds[1]}")
        add("--jobs", type=positive_int, help="runs side by side (default: cores, or one on a GPU)")
        if verb == "ablate":
            add("--dataset", help="toy (default), or folder:PATH")
            add("--unseen", nargs="+", help="names to hold out, comma-separated: a list per split")
            add("--rows", nargs="+", help="only rows with these words in their name, and plain")
    args, args.further = p.parse_known_args(argv)
    if args.further and args.run in READ:
        p.error(f"unrecognized arguments: {' '.join(args.further)}")
    return args


if __name__ == "__main__":
    args = parse()
    with runs.one_sentence_for_errors(), runs.writing_folder(args.out):
        Path(args.out).mkdir(parents=True, exist_ok=True)
        args.run(args)
