"""Every equation against plain float64 loops, by hand on a case small enough, where nothing is
defined, and its gradients."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (
    IGNORE,
    class_prototypes,
    class_reference_masks,
    contrast_mask,
    cpa_loss,
    patch_labels,
    reference_mask,
    segmentation_loss,
    spd_loss,
    total_loss,
)

B, L, K, D, TAU = 4, 9, 5, 6, 0.1


def batch(seed):
    """Patches near their class's text, so that most are right; some labels ignored; the last image
    without any label."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randn(K, D, generator=g, dtype=torch.float64)
    labels = torch.randint(-1, K, (B, L), generator=g)
    labels[-1] = IGNORE
    noise = lambda: 0.9 * torch.randn(B, L, D, generator=g, dtype=torch.float64)
    return text[labels] + noise(), text[labels] + noise(), text, labels


def cosine(a, b):
    dot = sum(float(x) * float(y) for x, y in zip(a, b))
    return dot / math.sqrt(sum(float(x) ** 2 for x in a) * sum(float(y) ** 2 for y in b))


def loop_reference(patches, text, labels):
    """Eq. (1), patch by patch."""
    mask = [[False] * L for _ in range(B)]
    for b in range(B):
        for p in range(L):
            scores = [cosine(patches[b, p], text[k]) for k in range(K)]
            mask[b][p] = labels[b, p] != IGNORE and scores.index(max(scores)) == labels[b, p]
    return torch.tensor(mask)


def loop_spd(patches, teacher, mask):
    """Eq. (2)."""
    images = []
    for b in range(B):
        errors = [
            sum((float(x) - float(y)) ** 2 for x, y in zip(patches[b, p], teacher[b, p]))
            for p in range(L)
            if mask[b, p]
        ]
        if errors:
            images.append(sum(errors) / len(errors))
    return sum(images) / len(images) if images else 0.0


def loop_prototypes(teacher, mask, labels):
    """Eqs. (3) and (4): {class: prototype} per image."""
    found = []
    for b in range(B):
        members = {
            c: [teacher[b, p] for p in range(L) if mask[b, p] and labels[b, p] == c]
            for c in range(K)
        }
        found.append({c: sum(vs) / len(vs) for c, vs in members.items() if vs})
    return found


def loop_cpa(patches, prototypes, labels, correct):
    """Eq. (5)."""
    images = []
    for b in range(B):
        terms = []
        for p in range(L):
            c = int(labels[b, p])
            if correct[b, p] and c in prototypes[b]:
                total = sum(
                    math.exp(cosine(patches[b, p], v) / TAU) for v in prototypes[b].values()
                )
                terms.append(
                    -math.log(math.exp(cosine(patches[b, p], prototypes[b][c]) / TAU) / total)
                )
        if terms:
            images.append(sum(terms) / len(terms))
    return sum(images) / len(images) if images else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_equations_1_to_5_equal_loops(seed):
    patches, teacher, text, labels = batch(seed)
    mask, correct = reference_mask(teacher, text, labels), reference_mask(patches, text, labels)
    assert (
        torch.equal(mask, loop_reference(teacher, text, labels))
        and mask.any()
        and not mask[labels != IGNORE].all()
    )
    assert spd_loss(patches, teacher, mask).item() == pytest.approx(
        loop_spd(patches, teacher, mask), rel=1e-12
    )
    class_masks = class_reference_masks(mask, labels, K)
    assert class_masks.shape == (B, K, L)
    prototypes, valid = class_prototypes(teacher, class_masks)
    expected = loop_prototypes(teacher, mask, labels)
    assert valid.tolist() == [[c in expected[b] for c in range(K)] for b in range(B)]
    for b in range(B):
        for c, v in expected[b].items():
            torch.testing.assert_close(prototypes[b, c], v, rtol=1e-12, atol=0)
    loss = cpa_loss(patches, prototypes, valid, labels, correct, TAU)
    assert (
        loss.item() == pytest.approx(loop_cpa(patches, expected, labels, correct), rel=1e-12)
        and loss > 0
    )
    q = torch.tensor(
        [
            [bool(correct[b, p]) and int(labels[b, p]) in expected[b] for p in range(L)]
            for b in range(B)
        ]
    )
    assert torch.equal(contrast_mask(valid, labels, correct), q)


def test_one_case_by_hand():
    """Two patches of one image with classes 0 and 1; both right; the target's first has moved by
    (0.6, 0.8) - (1, 0)."""
    text, labels = torch.eye(2), torch.tensor([[0, 1]])
    teacher, patches = (
        torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),
        torch.tensor([[[0.8, 0.6], [0.0, 2.0]]]),
    )
    mask = reference_mask(teacher, text, labels)
    assert mask.tolist() == [[True, True]]
    assert spd_loss(patches, teacher, mask).item() == pytest.approx((0.04 + 0.36 + 0) / 2)
    prototypes, valid = class_prototypes(teacher, class_reference_masks(mask, labels, 2))
    assert prototypes.tolist() == [[[1, 0], [0, 2]]] and valid.tolist() == [[True, True]]
    by_hand = (
        math.log(1 + math.exp((0.6 - 0.8) / 0.5)) + math.log(1 + math.exp((0 - 1) / 0.5))
    ) / 2
    assert cpa_loss(patches, prototypes, valid, labels, mask, 0.5).item() == pytest.approx(by_hand)
    assert total_loss(1.0, 2.0, 3.0, 0.5, 0.25) == 2.75


def test_pooled_loss_equals_loops():
    from study.rivals import pooled_loss

    g = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(2, 16, 3, generator=g, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    maps = [v.detach().clamp(min=0).reshape(2, 4, 4, 3) for v in (a, b)]
    expected = 0
    for size in (1, 2, 4):
        cell = 4 // size
        pooled = [
            torch.stack(
                [
                    torch.stack(
                        [
                            m[:, r * cell : r * cell + cell, c * cell : c * cell + cell].mean(
                                (1, 2)
                            )
                            for c in range(size)
                        ]
                    )
                    for r in range(size)
                ]
            )
            for m in maps
        ]  # [rows,columns,B,D]
        for sums in ([p.sum(0) for p in pooled], [p.sum(1) for p in pooled]):
            d = (sums[0] - sums[1]).abs()
            expected += torch.where(d < 1, 0.5 * d**2, d - 0.5).mean().item()
    loss = pooled_loss(a, b, (4, 4))
    assert loss.item() == pytest.approx(expected, rel=1e-12) and loss > 0
    assert torch.autograd.grad(loss, (a, b), allow_unused=True)[1] is None


def test_ignored_patches_are_never_reference_patches():
    text = torch.eye(3)
    assert not reference_mask(text[None], text, torch.full((1, 3), IGNORE)).any()


@pytest.mark.parametrize("missing", ["labels", "reference patches"])
def test_losses_are_zero_with_zero_gradient_where_nothing_is_defined(missing):
    patches, teacher, text, labels = batch(0)
    labels = torch.full_like(labels, IGNORE) if missing == "labels" else labels.clamp(min=0)
    mask = torch.zeros(B, L, dtype=torch.bool)
    patches.requires_grad_()
    prototypes, valid = class_prototypes(teacher, class_reference_masks(mask, labels, K))
    correct = reference_mask(patches, text, labels)
    for loss in (
        spd_loss(patches, teacher, mask),
        cpa_loss(patches, prototypes, valid, labels, correct, TAU),
    ):
        (grad,) = torch.autograd.grad(loss, patches)
        assert loss.item() == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_an_image_without_reference_patches_does_not_dilute_the_mean():
    patches, teacher, text, labels = batch(1)
    mask = reference_mask(teacher, text, labels)
    assert not mask[-1].any() and mask[:-1].any(-1).all()
    assert torch.equal(
        spd_loss(patches, teacher, mask), spd_loss(patches[:-1], teacher[:-1], mask[:-1])
    )


def test_gradients():
    patches, teacher, text, labels = batch(2)
    mask, correct = reference_mask(teacher, text, labels), reference_mask(patches, text, labels)
    prototypes, valid = class_prototypes(teacher, class_reference_masks(mask, labels, K))
    patches.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: spd_loss(v, teacher, mask), patches)
    assert torch.autograd.gradcheck(
        lambda v: cpa_loss(v, prototypes, valid, labels, correct, TAU), patches
    )
    logits, target = (
        torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True),
        torch.randint(-1, 5, (2, 6, 6)),
    )
    for ignored in ("negative", "skip"):
        assert torch.autograd.gradcheck(
            lambda z: segmentation_loss(z, target, ignored, chunk=2), logits
        )


def test_no_gradient_reaches_the_teacher():
    patches, teacher, text, labels = batch(3)
    for t in (patches, teacher, text):
        t.requires_grad_()
    mask = reference_mask(teacher, text, labels)
    prototypes, valid = class_prototypes(teacher, class_reference_masks(mask, labels, K))
    assert not prototypes.requires_grad
    leaf = (
        prototypes.clone().requires_grad_()
    )  # even handed in with a graph, prototypes are detached
    loss = spd_loss(patches, teacher, mask) + cpa_loss(patches, leaf, valid, labels, mask, TAU)
    grads = torch.autograd.grad(loss, (patches, teacher, text, leaf), allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1:] == (None, None, None)


def test_patch_labels_take_the_most_frequent_and_the_lowest_of_ties():
    target = torch.tensor([[[3, 3, 1, 2, -1, -1, 7, 0], [3, 5, 2, 1, -1, 4, 0, 7]]])
    assert patch_labels(target, (1, 4)).tolist() == [[3, 1, -1, 0]]
    tie_with_ignore = torch.tensor([[[-1, 2], [2, -1]]])
    assert patch_labels(tie_with_ignore, (1, 1)).tolist() == [[-1]]


def test_patch_labels_equal_counting():
    target = torch.randint(-1, 4, (2, 12, 8), generator=torch.Generator().manual_seed(0))
    got = patch_labels(target, (3, 2)).reshape(2, 3, 2)
    for b in range(2):
        for r in range(3):
            for c in range(2):
                cell = target[b, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].flatten().tolist()
                assert got[b, r, c] == min(sorted(set(cell)), key=lambda v: (-cell.count(v), v))


def test_patch_labels_refuse_a_grid_that_does_not_divide():
    with pytest.raises(ValueError, match="10 x 8 .* 3 x 2"):
        patch_labels(torch.zeros(1, 10, 8, dtype=torch.long), (3, 2))


@pytest.mark.parametrize("chunk", [1, 3, 32])
def test_segmentation_loss_equals_bce_against_one_hot_labels(chunk):
    g = torch.Generator().manual_seed(0)
    logits, target = (
        torch.randn(2, 7, 6, 6, generator=g, dtype=torch.float64),
        torch.randint(-1, 7, (2, 24, 24), generator=g),
    )
    up = F.interpolate(logits, (24, 24), mode="bilinear", align_corners=False)
    one_hot = torch.stack([(target == k).double() for k in range(7)], 1)  # all zero where ignored
    each = F.binary_cross_entropy_with_logits(up, one_hot, reduction="none")
    assert segmentation_loss(logits, target, chunk=chunk).item() == pytest.approx(
        each.mean().item(), rel=1e-12
    )
    kept = each.permute(0, 2, 3, 1)[target != IGNORE]
    assert segmentation_loss(logits, target, "skip", chunk).item() == pytest.approx(
        kept.mean().item(), rel=1e-12
    )
    void = torch.full_like(target, IGNORE)
    assert segmentation_loss(logits, void, "skip").item() == 0
    assert segmentation_loss(logits, void).item() == pytest.approx(
        F.softplus(up).mean().item(), rel=1e-12
    )


PUBLIC = [
    f for name, f in vars(losses).items() if inspect.isfunction(f) and f.__module__ == "losses"
]


def test_every_function_is_public_and_knows_the_ignore_label():
    assert len(PUBLIC) >= 9 and not [f for f in PUBLIC if f.__name__.startswith("_")]
    for function in PUBLIC:
        ignore = inspect.signature(function).parameters.get("ignore")
        assert ignore is None or ignore.default == IGNORE


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_every_function_can_be_pasted(function):
    """Its source alone, under the three imports of the file, computes the same."""
    from torch.utils.checkpoint import checkpoint

    scope = {"torch": torch, "F": F, "checkpoint": checkpoint}
    exec(inspect.getsource(function), scope)
    patches, teacher, text, labels = batch(4)
    mask = reference_mask(teacher, text, labels)
    correct = reference_mask(patches, text, labels)
    class_masks = class_reference_masks(mask, labels, K)
    prototypes, valid = class_prototypes(teacher, class_masks)
    g = torch.Generator().manual_seed(0)
    pixel_labels = torch.randint(-1, K, (B, 12, 12), generator=g)
    logits = torch.randn(B, K, 3, 3, generator=g)
    arguments = {
        "patch_labels": (pixel_labels, (3, 3)),
        "reference_mask": (patches, text, labels),
        "spd_loss": (patches, teacher, mask, True),
        "class_reference_masks": (mask, labels, K),
        "class_prototypes": (teacher, class_masks),
        "contrast_mask": (valid, labels, correct),
        "cpa_loss": (patches, prototypes, valid, labels, correct, TAU),
        "total_loss": (1.0, 2.0, 3.0, 0.5, 0.25),
        "segmentation_loss": (logits, pixel_labels, "skip", 2),
    }[function.__name__]
    pasted, ours = scope[function.__name__](*arguments), function(*arguments)
    torch.testing.assert_close(pasted, ours, rtol=0, atol=0)


def test_spd_on_unit_vectors():
    patches, teacher, text, labels = batch(0)
    mask = reference_mask(teacher, text, labels)
    unit = spd_loss(F.normalize(patches, dim=-1), F.normalize(teacher, dim=-1), mask)
    assert torch.equal(spd_loss(patches, teacher, mask, normalise=True), unit)
    assert not torch.isclose(spd_loss(patches, teacher, mask), unit)


def test_arguments_that_do_not_fit_are_refused():
    """Nothing broadcasts silently, and no label is clamped into another class."""
    patches, teacher, text, labels = batch(0)
    mask = reference_mask(teacher, text, labels)
    for wrong in (
        (patches, teacher[:1], mask),
        (patches, teacher, mask[:, :1]),
        (patches[0], teacher, mask),
    ):
        with pytest.raises(ValueError, match="momentum_patches .* and mask .* do not fit patches"):
            spd_loss(*wrong)
    prototypes, valid = class_prototypes(teacher, class_reference_masks(mask, labels, K))
    for label in (K, 255, -2):
        labels[0, 0] = label
        with pytest.raises(ValueError, match=rf"labels should be -1 or lie in 0\.\.{K - 1}"):
            contrast_mask(valid, labels, mask)
        with pytest.raises(ValueError, match="labels should be"):
            cpa_loss(patches, prototypes, valid, labels, mask, TAU)


def test_any_label_can_be_the_one_that_is_ignored():
    """255 is the field's: the equations give the same as with -1."""
    patches, teacher, text, labels = batch(4)
    found = []
    for ignore in (-1, 255):
        own = labels.masked_fill(labels == -1, ignore)
        mask, correct = (reference_mask(v, text, own, ignore) for v in (teacher, patches))
        prototypes, valid = class_prototypes(teacher, class_reference_masks(mask, own, K))
        q = contrast_mask(valid, own, correct, ignore)
        cpa = cpa_loss(patches, prototypes, valid, own, correct, TAU, ignore)
        logits = torch.stack([patches @ t for t in text], 1)[:, :, None]  # [B,K,1,L]
        seg = [
            segmentation_loss(logits, own[:, None], kind, ignore=ignore)
            for kind in ("negative", "skip")
        ]
        found.append(torch.cat([mask.flatten(), q.flatten(), torch.stack([cpa, *seg])]))
    assert (labels == -1).any() and torch.equal(*found)
