"""Every equation against plain float64 loops, by hand on a case small enough, where nothing is
defined, and its gradients."""
import inspect
import math
from statistics import fmean

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (IGNORE, class_prototypes, class_reference_masks, contrast_mask,
                    correctly_classified, cpa_loss, patch_labels, pooled_loss, segmentation_loss,
                    spd_loss, total_loss)

B, L, K, D, TAU = 4, 9, 5, 6, 0.1


def batch(seed):
    """Patches near their class's text, so that most are right; some labels ignored; the last image
    without any label. Returns patches, momentum patches, text, labels."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(K, D, generator=g, dtype=torch.float64)
    labels = torch.randint(-1, K, (B, L), generator=g)
    labels[-1] = IGNORE
    noise = 0.9 * torch.randn(2, B, L, D, generator=g, dtype=torch.float64)
    return text[labels] + noise[0], text[labels] + noise[1], text, labels


def equations(patches, teacher, text, labels, ignore=IGNORE):
    """What Eqs. (1), (3), (4) and Q are: reference, class masks, prototypes, valid, correct, q."""
    reference = correctly_classified(teacher, text, labels, ignore)
    masks = class_reference_masks(reference, labels, len(text))
    prototypes, valid = class_prototypes(teacher, masks)
    correct = correctly_classified(patches, text, labels, ignore)
    q = contrast_mask(valid, labels, correct, ignore)
    return reference, masks, prototypes, valid, correct, q


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def nearest(feature, text):
    scores = [cosine(feature, t) for t in text]
    return scores.index(max(scores))


def by_loops(patches, teacher, text, labels):
    """The equations patch by patch: reference, q [B,L], prototypes [{class: v}], L_SPD, L_CPA."""
    reference, q = torch.zeros(2, *labels.shape, dtype=torch.bool)
    prototypes, spd, cpa = [], [], []
    text = text.tolist()
    for b, of_image in enumerate(labels.tolist()):
        members, errors, terms = {}, [], []
        V, V_M = patches[b].tolist(), teacher[b].tolist()
        for p, c in enumerate(of_image):
            if nearest(V_M[p], text) == c:  # Eq. (1)
                reference[b, p] = True
                errors.append(sum((x - y) ** 2 for x, y in zip(V[p], V_M[p])))  # Eq. (2)
                members.setdefault(c, []).append(V_M[p])  # Eq. (3)
        prototypes.append({c: [*map(fmean, zip(*v))] for c, v in members.items()})  # Eq. (4)
        for p, c in enumerate(of_image):
            if nearest(V[p], text) == c and c in members:
                q[b, p] = True
                e = {k: math.exp(cosine(V[p], v) / TAU) for k, v in prototypes[b].items()}
                terms.append(-math.log(e[c] / sum(e.values())))  # Eq. (5)
        spd += [fmean(errors)] if errors else []
        cpa += [fmean(terms)] if terms else []
    return reference, q, prototypes, fmean(spd), fmean(cpa)


@pytest.mark.parametrize("seed", range(5))
def test_equations_1_to_5_equal_loops(seed):
    inputs = patches, teacher, _, labels = batch(seed)
    reference, masks, prototypes, valid, _, q = equations(*inputs)
    loop_reference, loop_q, loop_prototypes, spd, cpa = by_loops(*inputs)
    assert torch.equal(reference, loop_reference) and torch.equal(q, loop_q) and q.any()
    assert not reference[labels != IGNORE].all() and not reference[-1].any()  # counts in no mean
    assert spd_loss(patches, teacher, reference).item() == pytest.approx(spd, rel=1e-12)
    assert masks.shape == (B, K, L)
    assert valid.tolist() == [[c in of_image for c in range(K)] for of_image in loop_prototypes]
    for b, of_image in enumerate(loop_prototypes):
        for c, v in of_image.items():
            assert prototypes[b, c].tolist() == pytest.approx(v, rel=1e-12)
    loss = cpa_loss(patches, prototypes, valid, labels, q, TAU)
    assert loss.item() == pytest.approx(cpa, rel=1e-12) and cpa > 0


def test_one_case_by_hand():
    """Two patches of one image, of classes 0 and 1, both right; the student's first has turned from
    (1, 0) to (0.8, 0.6), its second grown by 1."""
    text, labels = torch.eye(2), torch.tensor([[0, 1]])
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    patches = torch.tensor([[[0.8, 0.6], [0.0, 3.0]]])
    reference, _, prototypes, valid, _, q = equations(patches, teacher, text, labels)
    assert reference.tolist() == q.tolist() == valid.tolist() == [[True, True]]
    assert prototypes.tolist() == [[[1, 0], [0, 2]]]
    raw = spd_loss(patches, teacher, reference)
    unit = spd_loss(patches, teacher, reference, normalise=True)
    assert raw.item() == pytest.approx((0.4 + 1) / 2) and unit.item() == pytest.approx(0.4 / 2)
    first, second = math.log(1 + math.exp((0.6 - 0.8) / 0.5)), math.log(1 + math.exp(-1 / 0.5))
    cpa = cpa_loss(patches, prototypes, valid, labels, q, 0.5)
    assert cpa.item() == pytest.approx((first + second) / 2)
    assert total_loss(1.0, 2.0, 3.0, 0.5, 0.25) == 2.75


def test_the_argmax_of_eq_1_is_over_cosines():
    """The first text has the larger dot product, the second the smaller angle."""
    text, patches = torch.tensor([[9.0, 9.0], [1.0, 0.0]]), torch.tensor([[[1.0, 0.1]]])
    assert correctly_classified(patches, text, torch.tensor([[1]])).item()
    assert not correctly_classified(patches, text, torch.tensor([[IGNORE]])).item()
    assert losses.reference_mask is correctly_classified


def test_losses_are_zero_with_zero_gradient_where_nothing_is_defined():
    """No label at all, or no reference patch."""
    patches, teacher, text, labels = batch(0)
    patches.requires_grad_()
    void, labels = torch.full_like(labels, IGNORE), labels.clamp(min=0)
    for inputs in ((patches, teacher, text, void), (patches, -text[labels], text, labels)):
        reference, _, prototypes, valid, _, q = equations(*inputs)
        assert not reference.any() and not valid.any() and not q.any()
        for loss in (spd_loss(*inputs[:2], reference),
                     cpa_loss(patches, prototypes, valid, inputs[3], q, TAU)):
            gradient, = torch.autograd.grad(loss, patches)
            assert loss.item() == 0 and gradient.abs().sum() == 0
    assert not contrast_mask(~valid, void, ~q).any()


def test_gradients():
    patches, teacher, text, labels = batch(2)
    reference, _, prototypes, valid, _, q = equations(patches, teacher, text, labels)
    patches.requires_grad_()
    logits = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    pixel_labels = torch.randint(-1, 5, (2, 6, 6))
    check = torch.autograd.gradcheck
    assert check(lambda v: spd_loss(v, teacher, reference), patches)
    assert check(lambda v: cpa_loss(v, prototypes, valid, labels, q, TAU), patches)
    for ignored in ("negative", "skip"):
        assert check(lambda z: segmentation_loss(z, pixel_labels, ignored, chunk=2), logits)


def test_no_gradient_reaches_the_teacher():
    inputs = batch(3)
    for tensor in inputs[:3]:
        tensor.requires_grad_()
    patches, teacher, text, labels = inputs
    reference, _, prototypes, valid, _, q = equations(*inputs)
    assert not prototypes.requires_grad
    leaf = prototypes.clone().requires_grad_()  # prototypes with a graph are detached, too
    loss = spd_loss(patches, teacher, reference)
    loss = loss + cpa_loss(patches, leaf, valid, labels, q, TAU)
    loss = loss + pooled_loss(patches, teacher, (3, 3))
    gradients = torch.autograd.grad(loss, (patches, teacher, text, leaf), allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1:] == (None, None, None)


def test_patch_labels_equal_counting():
    """The most frequent label of a patch's pixels; of ties the lowest, IGNORE before all others."""
    pixel_labels = torch.randint(-1, 4, (2, 12, 8), generator=torch.Generator().manual_seed(0))
    cells = pixel_labels.unfold(1, 4, 4).unfold(2, 4, 4).reshape(2, 6, 16).tolist()
    expected = [[min(sorted(cell), key=lambda label: -cell.count(label)) for cell in image]
                for image in cells]
    assert patch_labels(pixel_labels, (3, 2)).tolist() == expected
    ties = torch.tensor([[[3, 3, 1, 2, -1, 5], [3, 5, 2, 1, 5, -1]]])
    assert patch_labels(ties, (1, 3)).tolist() == [[3, 1, -1]]


def test_arguments_that_do_not_fit_are_refused():
    """Nothing broadcasts silently, and no label is clamped into another class."""
    with pytest.raises(ValueError, match="10 x 8 .* 3 x 2"):
        patch_labels(torch.zeros(1, 10, 8, dtype=torch.long), (3, 2))
    patches, teacher, text, labels = batch(0)
    reference, _, prototypes, valid, _, q = equations(patches, teacher, text, labels)
    for wrong in ((patches, teacher[:1], reference), (patches, teacher, reference[:, :1]),
                  (patches[0], teacher, reference)):
        with pytest.raises(ValueError, match="momentum_patches .* and mask .* do not fit patches"):
            spd_loss(*wrong)
    with pytest.raises(ValueError, match="'negative' or 'skip', not 'all'"):
        segmentation_loss(torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1), "all")
    q[0, 0] = True
    for label in (K, 255, -2):
        labels[0, 0] = label
        assert not correctly_classified(patches, text, labels)[0, 0]
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            contrast_mask(valid, labels, reference)
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            cpa_loss(patches, prototypes, valid, labels, q, TAU)


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_segmentation_loss_equals_bce_against_one_hot_labels(chunk):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, 6, 6, generator=g, dtype=torch.float64)
    pixel_labels = torch.randint(-1, 7, (2, 24, 24), generator=g)
    z = F.interpolate(logits, (24, 24), mode="bilinear", align_corners=False)
    one_hot = torch.stack([(pixel_labels == k).double() for k in range(7)], 1)  # 0 where ignored
    each = F.binary_cross_entropy_with_logits(z, one_hot, reduction="none")
    known = each.permute(0, 2, 3, 1)[pixel_labels != IGNORE]
    void = torch.full_like(pixel_labels, IGNORE)
    for labels, ignored, expected in ((pixel_labels, "negative", each.mean()),
                                      (pixel_labels, "skip", known.mean()),
                                      (void, "negative", F.softplus(z).mean()), (void, "skip", 0)):
        loss = segmentation_loss(logits, labels, ignored, chunk)
        assert loss.item() == pytest.approx(float(expected), rel=1e-12)


def test_pooled_loss_equals_loops():
    a, b = torch.randn(2, 2, 16, 3, generator=torch.Generator().manual_seed(0)).double()
    expected = 0
    for size in (1, 2, 4):
        n = 4 // size  # patches of a cell, each way
        pooled = [v.clamp(min=0).reshape(2, size, n, size, n, 3).mean((2, 4)) for v in (a, b)]
        for axis in (1, 2):
            d = (pooled[0].sum(axis) - pooled[1].sum(axis)).abs()
            expected += torch.where(d < 1, 0.5 * d ** 2, d - 0.5).mean().item()
    assert pooled_loss(a, b, (4, 4)).item() == pytest.approx(expected, rel=1e-12) and expected > 0


def test_any_label_can_be_the_one_that_is_ignored():
    """255 is the field's: the equations give the same as with -1."""
    patches, teacher, text, labels = batch(4)
    results = []
    for ignore in (-1, 255):
        own = labels.masked_fill(labels == -1, ignore)
        reference, _, prototypes, valid, _, q = equations(patches, teacher, text, own, ignore)
        cpa = cpa_loss(patches, prototypes, valid, own, q, TAU)
        logits = (patches @ text.T).transpose(1, 2)[:, :, None]  # [B,K,1,L]
        seg = [segmentation_loss(logits, own[:, None], ignored, ignore=ignore)
               for ignored in ("negative", "skip")]
        results.append(torch.cat([reference.flatten(), q.flatten(), torch.stack([cpa, *seg])]))
    assert (labels == -1).any() and torch.equal(*results)


def test_every_function_can_be_pasted():
    """It uses nothing of the file but the three imports; a label that it ignores is IGNORE."""
    functions = [f for f in vars(losses).values() if inspect.getmodule(f) is losses]
    assert len(functions) >= 10
    for function in functions:
        used = inspect.getclosurevars(function).globals
        assert used.keys() <= {"torch", "F", "checkpoint"}, function
        ignore = inspect.signature(function).parameters.get("ignore")
        assert ignore is None or ignore.default == IGNORE
