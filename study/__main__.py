"""The paper's analysis: what becomes of CLIP's features, reference patches above all, in training.

    python -m study pictures --checkpoint out/toy/last.pt
    python -m study shift --checkpoints out/toy/step-*.pt plain/last.pt
    python -m study ablate --seeds 8      and likewise every other table in study/tables

shift compares checkpoints: a run's snapshots (train.py --snapshot-every), or runs with different
--adapt and --distill. A table trains each of its rows with the same seeds, several runs side by
side, and writes NAME.md, NAME.png and NAME.jsonl, a run a line (and NAME-steps.png, where rows say
--eval-every). The same command goes on where it stopped. Further flags are train.py's and hold for
every run."""
import argparse
from pathlib import Path

from data import NAMES
from study import compare, measures
from support import runs
from support.errors import writing
from support.flags import non_negative_int, positive_int

READ = {"pictures": measures.pictures, "shift": measures.shift}


def parse(argv=None):
    p = argparse.ArgumentParser(prog="python -m study", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = p.add_subparsers(required=True, dest="verb")
    for verb in (*READ, *compare.TABLES):
        run = READ.get(verb, compare.tabulate)
        about = run.__doc__ if verb in READ else compare.TABLES[verb].read_text().splitlines()[0]
        command = verbs.add_parser(verb, help=about, description=about, allow_abbrev=False)
        command.set_defaults(run=run, dataset="toy", unseen=None)
        add = command.add_argument
        add("--out", default="out/study", help="folder for results (default out/study), and for "
            "runs, which tables share: those that two of them need are trained once")
        add("--dataset", help=", ".join(NAMES if verb in READ else ("toy (default)", NAMES[-3])))
        if verb in READ:
            add("--data-root", help="the folder that holds the datasets")
            add("--images", type=non_negative_int, default=0,
                help="how many, evenly spread (default 6 to draw, all to measure)")
        if verb == "pictures":
            add("--checkpoint", required=True, help="of train.py")
        elif verb == "shift":
            add("--checkpoints", required=True, nargs="+", help="of train.py, whole or snapshots")
        else:
            add("--unseen", nargs="+", help="names to hold out, comma-separated: a list per split")
            add("--seeds", type=positive_int, default=5, help="how many (default 5)")
            add("--first-seed", type=non_negative_int, default=1, help="default 1")
            add("--rows", nargs="+", help="only these methods, or rows with these words in them")
            add("--against", default="plain fine-tuning", help="the row that differences are to")
            add("--jobs", type=positive_int, help="side by side (default: cores, or one on a GPU)")
    args, args.further = p.parse_known_args(argv)
    if args.further and args.verb in READ:
        p.error(f"unrecognized arguments: {' '.join(args.further)}")
    return args


if __name__ == "__main__":
    args = parse()
    with runs.one_sentence_for_errors(), writing(f"--out {args.out}"):
        Path(args.out).mkdir(parents=True, exist_ok=True)
        args.run(args)
