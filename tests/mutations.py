"""Does a test fail when the method is wrong? By hand:

    python tests/mutations.py            every mutation below, 10 to 90 seconds each
    python tests/mutations.py ema spd    those with one of these words in their name

Each is made in a copy of the project, and the tests named beside it run there until one fails. A
mutation that all of them survive is printed, and the exit status is 1.
"""
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTATIONS = [  # name, file, what stands there, what is put there, the tests that should fail
    ("SPD with the wrong sign", "losses.py", "(patches - momentum_patches.detach())",
     "(patches + momentum_patches.detach())", "losses"),
    ("SPD without its detach", "losses.py", "(patches - momentum_patches.detach())",
     "(patches - momentum_patches)", "losses"),
    ("SPD over all images", "losses.py", "per_image.sum() / mask.any(-1).sum().clamp(min=1)",
     "per_image.mean()", "losses"),
    ("SPD on raw features where unit vectors are asked for", "losses.py", "    if normalise:\n",
     "    if False:\n", "losses"),
    ("Eq. (1) by the largest dot product", "losses.py", "text, dim=-1)\n    pred",
     "text, dim=-1) * text.norm(dim=-1, keepdim=True)\n    pred", "losses"),
    ("prototypes that are sums", "losses.py", " / count.clamp(min=1)\n    return prototypes",
     "\n    return prototypes", "losses"),
    ("Q without being correct", "losses.py", "return correct & (labels", "return (labels",
     "losses"),
    ("Q without a prototype of its class", "losses.py", " & valid.gather(1, own_class)", "",
     "losses"),
    ("Q where there is no label", "losses.py", "correct & (labels != ignore) & valid",
     "correct & valid", "losses"),
    ("Q with labels clamped", "losses.py", "labels.masked_fill(labels == ignore, 0)",
     "labels.clamp(0, valid.shape[1] - 1)", "losses"),
    ("CPA's prototypes with a gradient", "losses.py", "F.normalize(prototypes.detach(), dim=-1)",
     "F.normalize(prototypes, dim=-1)", "losses"),
    ("CPA with an inverse temperature", "losses.py", "V, P) / tau", "V, P) * tau", "losses"),
    ("CPA's denominator over all classes", "losses.py", "masked_fill(~valid[:, :, None], lowest)",
     "masked_fill(valid[:, :, None] & False, lowest)", "losses"),
    ("CPA of every labelled patch", "losses.py", "labels.masked_fill(~q, -1)", "labels", "losses"),
    ("CPA over all images", "losses.py", "per_image.sum() / q.any(-1).sum().clamp(min=1)",
     "per_image.mean()", "losses"),
    ("lambdas swapped", "losses.py", "lambda_spd * spd + lambda_cpa * cpa",
     "lambda_cpa * spd + lambda_spd * cpa", "losses"),
    ("L_SEG with the wrong sign at the label", "losses.py", "- at_label.sum()",
     "+ at_label.sum()", "losses"),
    ("patch label: the rarest", "losses.py", "count.argmax(-1", "count.argmin(-1", "losses"),
    ("MAFT+'s teacher with a gradient", "losses.py", "frozen_patches.detach()", "frozen_patches",
     "losses"),
    ("EMA with alpha swapped", "ema.py", "targets, 1 - self.alpha)", "targets, self.alpha)", "ema"),
    ("EMA in training mode", "ema.py", ".eval().requires_grad_", ".requires_grad_", "ema"),
    ("EMA that shares what trains", "ema.py", " if not p.requires_grad}", "}", "ema"),
    ("EMA that shares nothing", "ema.py", "copy.deepcopy(module, shared)",
     "copy.deepcopy(module)", "ema"),
    ("EMA with stale buffers", "ema.py", "            average.copy_(target)", "            pass",
     "ema"),
    ("EMA's state with all of CLIP", "ema.py", " if t.data_ptr() not in shared}", "}", "ema"),
    ("TPA without its scale", "tpa.py", "scale * torch.einsum", "torch.einsum", "tpa"),
    ("TPA at one learning rate", "tpa.py", "lr * (1 - step / steps)", "lr", "tpa"),
    ("TPA's gradients left behind", "tpa.py", "        optimiser.zero_grad()", "        pass",
     "tpa"),
    ("TPA without the others' gradients", "tpa.py", "(loss, count, *(p.grad for p in params))",
     "(loss, count)", "train"),
    ("each position's own residual", "model.py", "x[:, :1] if class_token_residual else x", "x",
     "model"),
    ("positions resized as by PIL", "model.py", "antialias=False", "antialias=True", "model"),
    ("text that sees what follows", "model.py", "run_block(block, x, causal=True)",
     "run_block(block, x)", "model"),
    ("padding counted once", "model.py", "return copies * torch", "return torch", "model"),
    ("no mask for shifted windows", "model.py", "mask = -100.0 * (region", "mask = 0.0 * (region",
     "model"),
    ("up's bias forgotten", "model.py", "[bias, guidance], 1)", "[bias * 0, guidance], 1)",
     "model"),
    ("the least likely 256 classes", "model.py", ".topk(MAX_CLASSES)",
     ".topk(MAX_CLASSES, largest=False)", "model"),
    ("a head that recomputes nothing", "model.py", "self.recompute = recompute",
     "self.recompute = False", "model"),
    ("k trains", "model.py", "attention.v_proj_weight.requires_grad =",
     "attention.k_proj_weight.requires_grad =", "model"),
    ("reference patches of the student", "train.py",
     "reference = correctly_classified(momentum_patches",
     "reference = correctly_classified(patches", "train"),
    ("Q of the teacher", "train.py", "correct = correctly_classified(patches, text, labels)\n    q",
     "correct = correctly_classified(momentum_patches, text, labels)\n    q", "train"),
    ("prototypes of the student", "train.py", "class_prototypes(momentum_patches",
     "class_prototypes(patches", "train"),
    ("processes weighed alike", "train.py", "share * loss for", "loss for", "train"),
    ("SPD weighed by Q's images", "train.py", "[reference.any(-1).sum(), q.any",
     "[q.any(-1).sum(), q.any", "train"),
    ("gradients never averaged", "train.py", "grad_sync = part == parts", "grad_sync = False",
     "train"),
    ("resume repeats a batch", "train.py", "size // parts, step * parts,",
     "size // parts, max(0, step - 1) * parts,", "accidents"),
    ("the learning rate a step late", "train.py", "set_learning_rate(optimiser, step - 1,",
     "set_learning_rate(optimiser, step,", "train"),
    ("accumulated gradients not averaged", "train.py", "loss / parts).backward",
     "loss).backward", "train"),
    ("momentum never updated", "train.py", "            momentum.update()", "            pass",
     "train"),
    ("the step before the check for NaN", "train.py", "        refuse_non_finite(figures,",
     "        scaler.step(optimiser)\n        refuse_non_finite(figures,", "train"),
    ("a resumed optimiser that begins anew", "support/checkpoint.py",
     "optimiser.load_state_dict({", "dict({", "accidents"),
    ("a resumed momentum encoder that begins anew", "support/checkpoint.py",
     'momentum.load_state_dict(state["momentum"])', "pass", "accidents"),
    ("a resumed original that is the trained CLIP", "support/checkpoint.py",
     '{**state["model"], **state["original"]}', 'state["model"]', "train"),
    ("windows without the whole", "evaluate.py", "return (total / count + whole) / 2",
     "return total / count", "evaluate"),
    ("mIoU over all classes", "evaluate.py", "iou[labelled].mean", "iou.mean", "evaluate"),
    ("an image counted by every process", "evaluate.py", "range(rank, len(dataset), world)",
     "range(0, len(dataset))", "evaluate"),
    ("processes that see the same crops", "data.py", "(start * world + rank) * batch_size",
     "(start * world) * batch_size", "data"),
    ("the same augmentation for every draw", "data.py", "(self.seed, 1, draw)", "(self.seed, 1)",
     "data"),
    ("labels not flipped with the image", "data.py", "pixel_labels = pixel_labels[:, ::-1]",
     "pass", "data"),
]


def survives(name, file, before, after, tests):
    """Whether all the tests pass in a copy of the project with this mutation."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "out", "__pycache__"))
        text = (copy / file).read_text()
        assert text.count(before) == 1, f"{name}: {file} has {text.count(before)} of {before!r}"
        (copy / file).write_text(text.replace(before, after))
        files = [f"tests/test_{test}.py" for test in tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
        status = subprocess.run(command, cwd=copy, capture_output=True).returncode
        assert status in (0, 1), f"{name}: pytest could not run {files}"
        return status == 0


def main():
    words = [word.casefold() for word in sys.argv[1:]]
    chosen = [m for m in MUTATIONS if not words or any(w in m[0].casefold() for w in words)]
    alive = 0
    for mutation in chosen:
        begin = time.time()
        survived = survives(*mutation)
        alive += survived
        verdict = "SURVIVED" if survived else "caught"
        print(f"{verdict:8} {time.time() - begin:4.0f} s  {mutation[0]}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutations caught")
    sys.exit(alive > 0)


if __name__ == "__main__":
    main()
