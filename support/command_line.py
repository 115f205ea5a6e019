"""The flags of train.py and evaluate.py, and defaults that depend on others and on the machine."""
import argparse
import os
from pathlib import Path

import torch

from support.errors import UserError
from support.flags import non_negative_int, positive, positive_int


def shared_flags(description, epilog=None):
    """A parser with the flags that training and evaluation have in common, and its add_argument."""
    parser = argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-root", help="the folder that holds the datasets (default $RPMD_DATA, else "
                            "$DETECTRON2_DATASETS, else ./datasets)")
    add("--classes", help="other names for a dataset's classes: a file, or comma-separated")
    add("--compile", action="store_true",
        help="torch.compile: a first step or image that takes minutes (gains nothing on CPUs)")
    add("--timeout", type=positive, default=30, help="minutes a process waits for others (30)")
    return parser, add


def parse_training(description, recipe, datasets, argv=None):
    """The flags of a training. recipe: train.RECIPE. datasets: what --dataset may name."""
    cuda = torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    parser, add = shared_flags(description, (
        "ours: not in the paper. For the tiny CLIP chosen on toy worlds that no table of\n"
        "results shows (docs/results.md). For real CLIPs nobody has tuned them yet."))
    add("--dataset", default="toy", help=f"{', '.join(datasets)} (default toy)")
    add("--unseen", help="names to hold out of segmentation training, to be scored apart")
    add("--out", help="where everything is written (default out/DATASET)")
    add("--clip", help="tiny, or an open_clip ViT (default: tiny for toy, else ViT-B-16-quickgelu)")
    add("--pretrained", help="open_clip tag, checkpoint file, toy, crops (a tiny CLIP, pre-trained "
        "on crops of the training images and the names of what they hold), or none (default: "
        "openai; toy for toy worlds, none for other data with the tiny CLIP)")
    add("--adapt", default="both", choices=("both", "visual", "text", "none"),
        help="what of CLIP trains (default both)")
    add("--init-cat-seg", metavar="FILE", help="start from CAT-Seg, its CLIP as the original")
    add("--distill", default="rpmd", choices=("rpmd", "frozen", "pooled", "none"),
        help="rpmd (default); frozen: the same with the original CLIP as teacher; pooled: MAFT+'s; "
             "none: plain CAT-Seg")
    for flag, (real, tiny, kind, whose, text) in recipe.items():
        own = f", for the tiny CLIP {tiny:g} (ours)" if tiny != real else ""
        add(f"--{flag}", type=kind, help=f"{text}; default {real:g} ({whose}){own}")
    add("--spd-features", default="normalised", choices=("normalised", "raw"),
        help="what Eq. (2) compares: unit vectors (default), or CLIP's features as they are (ours)")
    add("--ignored", default="negative", choices=("negative", "skip"),
        help="unlabelled pixels: negatives of every class as in CAT-Seg (default), or not in L_SEG")
    add("--accumulate", type=positive_int, default=1,
        help="passes per step, each over a part of the batch, in which SPD and CPA average (1)")
    add("--recompute-head", action="store_true", help="save memory: the head's forward pass twice")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="bf16" if bf16 else "fp32",
        help="default bf16 on GPUs with it")
    add("--workers", type=non_negative_int, default=4 if cuda else 0,
        help="loader processes (default: 4 with a GPU, else 0)")
    add("--seed", type=non_negative_int, default=0,
        help="of the head's first weights, of images' order and augmentation (default 0)")
    add("--restart", action="store_true", help="ignore a checkpoint in --out and train anew")
    args = parser.parse_args(argv)
    fill_in(args, recipe)
    return args


def fill_in(args, recipe):
    """Defaults that depend on other flags. Raises UserError."""
    toy = args.dataset.startswith("toy")
    args.clip = args.clip or ("tiny" if toy else "ViT-B-16-quickgelu")
    name = args.dataset.removeprefix("folder:").replace("toy:", "toy-")
    args.out = args.out or str(Path("out", Path(name).expanduser().resolve().name))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    passes = processes * args.accumulate
    tiny = args.clip == "tiny"
    defaults = {flag.replace("-", "_"): row[1 if tiny else 0] for flag, row in recipe.items()}
    defaults["batch_size"] = max(defaults["batch_size"], passes)
    if args.distill not in ("rpmd", "frozen") or args.adapt not in ("both", "text"):
        defaults["tpa_steps"] = 0  # it is part of RPMD, and for a text encoder that trains
    defaults["pretrained"] = "none" if tiny or args.init_cat_seg else "openai"
    if tiny and toy:
        defaults["pretrained"] = "toy"
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.batch_size % passes:
        raise UserError(f"--batch-size {args.batch_size} does not divide among {processes} "
                        f"processes x --accumulate {args.accumulate}")
    if args.adapt in ("visual", "none") and args.tpa_steps:
        raise UserError(f"--tpa-steps {args.tpa_steps} adapts the text encoder, which --adapt "
                        f"{args.adapt} keeps frozen: use --tpa-steps 0")


def parse_evaluation(description, datasets, reported, argv=None):
    """The flags of an evaluation. datasets: what --datasets may name; reported: what all means."""
    parser, add = shared_flags(description)
    add("--checkpoint", required=True, help="of train.py, or one that CAT-Seg published")
    add("--datasets", nargs="+", default=["toy"],
        help=f"{', '.join(datasets)}; all: {', '.join(reported)}")
    add("--split", default="val")
    add("--image", nargs="+", help="pictures, folders or patterns of them, to label with --classes")
    add("--views", choices=("sliding", "whole"),
        help="CAT-Seg's five views, or one (default: one for toy)")
    add("--zero-shot", action="store_true", help="CLIP as training began with it, without the head")
    add("--save-labels", action="store_true", help="write labels as png, 16-bit from 257 classes")
    add("--save-pictures", type=non_negative_int, default=0, metavar="N",
        help="draw N images: ground truth, prediction")
    add("--out", help="folder to write to (default: eval/ beside the checkpoint; with --image, "
                      "beside the picture)")
    return parser.parse_args(argv)
