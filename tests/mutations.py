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
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTATIONS = {  # (file, tests that should fail): (name, what stands there, what is put there)
    ("losses.py", "losses"): [
        ("SPD with the wrong sign", "(patches - momentum", "(patches + momentum"),
        ("SPD without its detach", "- momentum_patches.detach()", "- momentum_patches"),
        ("SPD over all images", "mask.any(-1).sum()", "torch.tensor(len(mask))"),
        ("SPD on raw features, always", "if normalise:", "if False:"),
        ("Eq. (1) by the largest dot product", "F.normalize(text, dim=-1)", "text"),
        ("prototypes that are sums", " / count.clamp(min=1)\n    ret", "\n    ret"),
        ("Q without being correct", "return correct & (labels", "return (labels"),
        ("Q without a prototype of its class", " & valid.gather(1, own_class)", ""),
        ("Q where there is no label", "& (labels != ignore) & valid", "& valid"),
        ("Q with labels clamped", "labels.masked_fill(labels == ignore, 0)",
         "labels.clamp(0, valid.shape[1] - 1)"),
        ("CPA's prototypes with a gradient", "prototypes.detach()", "prototypes"),
        ("CPA with an inverse temperature", "V, P) / tau", "V, P) * tau"),
        ("CPA's denominator over all classes", "~valid[:, :, None]", "valid[:, :, None] & False"),
        ("CPA of every labelled patch", "labels.masked_fill(~q, -1)", "labels"),
        ("CPA over all images", "q.any(-1).sum()", "torch.tensor(len(q))"),
        ("lambdas swapped", "lambda_spd * spd + lambda_cpa *", "lambda_cpa * spd + lambda_spd *"),
        ("L_SEG with the wrong sign at the label", "minus_at_label +", "-minus_at_label +"),
        ("patch label: the rarest", "count.argmax(-1", "count.argmin(-1"),
        ("MAFT+'s teacher with a gradient", "frozen_patches.detach()", "frozen_patches")],
    ("ema.py", "ema"): [
        ("EMA with alpha swapped", "targets, 1 - self.alpha)", "targets, self.alpha)"),
        ("EMA in training mode", ".eval().requires_grad_", ".requires_grad_"),
        ("EMA that shares what trains", " if not p.requires_grad}", "}"),
        ("EMA that shares nothing", "copy.deepcopy(module, shared)", "copy.deepcopy(module)"),
        ("EMA with stale buffers", "            average.copy_(target)", "            pass"),
        ("EMA's state with all of CLIP", " if t.data_ptr() not in shared}", "}")],
    ("tpa.py", "tpa"): [
        ("TPA without its scale", "scale * torch.einsum", "torch.einsum"),
        ("TPA at one learning rate", "lr * (1 - step / steps)", "lr"),
        ("TPA's gradients left behind", "        optimiser.zero_grad()", "        pass")],
    ("tpa.py", "train"): [
        ("TPA without the others' gradients", "(loss, count, *(p.grad for p in params))",
         "(loss, count)")],
    ("model.py", "model"): [
        ("each position's own residual", "x[:, :1] if class_token_residual else x", "x"),
        ("positions resized as by PIL", "antialias=False", "antialias=True"),
        ("text that sees what follows", "block, x, causal=True)", "block, x)"),
        ("padding counted once", "return copies * torch", "return torch"),
        ("no mask for shifted windows", "mask = -100.0 * (region", "mask = 0.0 * (region"),
        ("up's bias forgotten", "[bias, guidance], 1)", "[bias * 0, guidance], 1)"),
        ("the least likely 256 classes", "topk(MAX_CLASSES", "topk(MAX_CLASSES, largest=False"),
        ("k trains", ', "v_proj_weight"))', ', "k_proj_weight"))')],
    ("train.py", "train"): [
        ("reference patches of the student", "reference = correctly_classified(momentum_",
         "reference = correctly_classified("),
        ("Q of the teacher", "correct = correctly_classified(patches, text, labels)\n    q",
         "correct = correctly_classified(momentum_patches, text, labels)\n    q"),
        ("prototypes of the student", "class_prototypes(momentum_", "class_prototypes("),
        ("processes weighed alike", "share * loss for", "loss for"),
        ("SPD weighed by Q's images", "[reference.any(-1)", "[q.any(-1)"),
        ("gradients never averaged", "grad_sync = part == parts", "grad_sync = False"),
        ("the learning rate a step late", "rate(optimiser, step - 1,", "rate(optimiser, step,"),
        ("accumulated gradients not averaged", "loss / parts).backward", "loss).backward"),
        ("momentum never updated", "            momentum.update()", "            pass"),
        ("the step before the check for NaN", "        refuse_non_finite(metrics,",
         "        scaler.step(optimiser)\n        refuse_non_finite(metrics,")],
    ("train.py", "accidents"): [
        ("resume repeats a batch", "parts, step * parts,", "parts, max(0, step - 1) * parts,")],
    ("support/checkpoint.py", "accidents"): [
        ("a resumed optimiser that begins anew", "optimiser.load_state_dict(", "dict("),
        ("a resumed momentum encoder that begins anew",
         'momentum.load_state_dict(state["momentum"])', "pass")],
    ("support/checkpoint.py", "train"): [
        ("a resumed original that is the trained CLIP", '{**state["model"], **state["original"]}',
         'state["model"]')],
    ("evaluate.py", "evaluate"): [
        ("windows without the whole", "(total / count + whole) / 2", "total / count"),
        ("mIoU over all classes", "iou[labelled].mean", "iou.mean"),
        ("an image counted by every process", "(rank, len(dataset), world)", "(len(dataset))")],
    ("data.py", "data"): [
        ("processes that see the same crops", "+ rank * b,", ","),
        ("the same augmentation for every draw", "(self.seed, 1, draw)", "(self.seed, 1)"),
        ("labels not flipped with the image", "pixel_labels = pixel_labels[:, ::-1]", "pass")]}


def survives(file, before, after, test):
    """Whether a test file passes in a copy of the project with this mutation."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "out", "__pycache__"))
        text = (copy / file).read_text()
        assert text.count(before) == 1, f"{file} has {text.count(before)} of {before!r}"
        (copy / file).write_text(text.replace(before, after))
        command = [sys.executable, "-m", "pytest", "-x", "-q", f"tests/test_{test}.py"]
        status = subprocess.run(command, cwd=copy, capture_output=True).returncode
        assert status in (0, 1), f"pytest could not run {command[-1]}"
        return status == 0


def main():
    words = sys.argv[1:] or [""]
    survivors = []
    for (file, test), mutations in MUTATIONS.items():
        for name, before, after in mutations:
            if not any(word.casefold() in name.casefold() for word in words):
                continue
            alive = survives(file, before, after, test)
            print(f"{name}: {'SURVIVED' if alive else 'caught'}", flush=True)
            if alive:
                survivors.append(name)
    sys.exit(f"survivors: {survivors}" if survivors else 0)


if __name__ == "__main__":
    main()
