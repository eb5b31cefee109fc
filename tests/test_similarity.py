"""What is special about the in-batch losses."""

import math
import pathlib
import re

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F

import rsfast

FILE = np.load(pathlib.Path(__file__).parent / "data" / "harma_losses.npz")


def read(key):
    return torch.from_numpy(FILE[key])


def features(n, m=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(k, 12, generator=g, dtype=torch.float64), dim=1) for k in (n, m or n)]


GOLDEN = {
    "contrastive": {},
    "contrastive_idx": dict(image_ids=read("idx")),
    "ada_triplet": {},
    "ada_triplet_gamma1_margin3": dict(gamma=1, margin=0.3),
    "ada_triplet_hardest": dict(negatives="hardest"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_harma(name):
    """In fp64; the gradients in the file are fp32, the losses are not."""
    image, text = (read(key).double().requires_grad_() for key in ("image", "text"))
    leaves = [image, text]
    if name.startswith("contrastive"):
        temp = read("temp").requires_grad_()
        leaves.append(temp)
        loss = rsfast.contrastive_loss(image, text, 1 / temp, **GOLDEN[name])
    else:
        loss = rsfast.adaptive_triplet_loss(image, text, **GOLDEN[name])
    # upstream divides the targets of equal ids in fp32
    eps = torch.finfo(torch.float32 if name == "contrastive_idx" else torch.float64).eps
    torch.testing.assert_close(loss.detach(), read(f"{name}.loss"), rtol=8 * eps, atol=0)
    for key, grad in zip(("image", "text", "temp"), torch.autograd.grad(loss, leaves), strict=False):
        gold = read(f"{name}.grad_{key}")
        # the file keeps these two gradients in fp32, and a sum of rounded targets is off by the largest, not by itself
        noise = max(8 * eps, torch.finfo(gold.dtype).eps) * gold.abs().max()
        assert (grad - gold).abs().max() <= noise, key


@pytest.mark.parametrize("n", (1, 7))
def test_contrastive_loss_is_open_clips(n):
    image, text = (t.requires_grad_() for t in features(n))
    scale = torch.tensor(14.0, dtype=torch.float64, requires_grad=True)
    ours = rsfast.contrastive_loss(image, text, scale)
    theirs = open_clip.ClipLoss()(image, text, scale)
    torch.testing.assert_close(ours, theirs)
    for one, two in zip(*(torch.autograd.grad(y, (image, text, scale)) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, two)


def contrastive_by_hand(scores, same, smoothing):
    """Pair by pair; ``same[i][j]`` says whether image i and text j are positives."""

    def one_way(scores, same):
        total = 0.0
        for row, alike in zip(scores, same, strict=True):
            log_sum = math.log(sum(math.exp(s) for s in row))
            for s, positive in zip(row, alike, strict=True):
                target = positive / max(sum(alike), 1)
                total -= ((1 - smoothing) * target + smoothing / len(row)) * (s - log_sum)
        return total / len(scores)

    flip = lambda rows: list(zip(*rows, strict=True))  # noqa: E731
    return (one_way(scores, same) + one_way(flip(scores), flip(same))) / 2


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize(
    "image_ids, text_ids",
    (
        (None, None),
        ((3, 3, 5, 9, 5), None),
        ((3, 3, 5, 9, 5), (5, 3, 9, 9, 3)),
        ((3, 7, 5), (3, 3, 7, 5, 7, 5, 5)),  # three images, seven captions
        ((3, 4), (3, 8, 3)),  # an image and a caption without a partner
    ),
)
def test_contrastive_loss_pair_by_pair(image_ids, text_ids, smoothing):
    n = len(image_ids or range(5))
    image, text = features(n, len(text_ids or range(n)))
    rows = range(n) if image_ids is None else image_ids
    columns = rows if text_ids is None else text_ids
    by_hand = contrastive_by_hand((6 * image @ text.T).tolist(), [[i == j for j in columns] for i in rows], smoothing)
    loss = rsfast.contrastive_loss(
        image, text, torch.tensor(6.0),
        image_ids=None if image_ids is None else torch.tensor(image_ids),
        text_ids=None if text_ids is None else torch.tensor(text_ids), label_smoothing=smoothing,
    )  # fmt: skip
    assert loss.item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("smoothing", (0.0, 0.1, 1.0))
def test_label_smoothing_is_cross_entropys(smoothing):
    image, text = features(6)
    logits, target = 9 * image @ text.T, torch.arange(6)
    theirs = sum(F.cross_entropy(s, target, label_smoothing=smoothing) for s in (logits, logits.T)) / 2
    torch.testing.assert_close(
        rsfast.contrastive_loss(image, text, torch.tensor(9.0), label_smoothing=smoothing), theirs
    )


@pytest.mark.parametrize(
    "image_ids, text_ids", ((None, None), ((3, 3, 5, 9, 5), None), ((3, 3, 5, 9, 5), (5, 3, 9, 9, 3)))
)
@pytest.mark.parametrize("negatives", ("all", "hardest"))
@pytest.mark.parametrize("gamma", (0.0, 1.0, 2.0))
def test_triplet_loss_pair_by_pair(gamma, negatives, image_ids, text_ids):
    image, text = features(5)
    s, margin = (image @ text.T).tolist(), 0.4

    def weighed(i, j, own):
        cost = max(0.0, margin + s[i][j] - s[own][own])
        left_out = i == j or (image_ids is not None and image_ids[i] == (text_ids or image_ids)[j])
        return 0.0 if left_out else (1 - math.exp(-cost)) ** gamma * cost

    take = sum if negatives == "all" else max
    by_hand = sum(take(weighed(i, j, i) for j in range(5)) + take(weighed(j, i, i) for j in range(5)) for i in range(5))
    loss = rsfast.adaptive_triplet_loss(
        image, text, margin=margin, gamma=gamma, negatives=negatives,
        image_ids=None if image_ids is None else torch.tensor(image_ids),
        text_ids=None if text_ids is None else torch.tensor(text_ids), mask_same_id=image_ids is not None,
    )  # fmt: skip
    assert loss.item() == pytest.approx(by_hand / 2, rel=1e-12) and by_hand > 0


def test_triplet_loss_ignores_ids_unless_told():
    image, text, ids = *features(5), torch.tensor((3, 3, 5, 9, 5))
    plain, masked = (
        rsfast.adaptive_triplet_loss(image, text, margin=0.4, image_ids=ids, mask_same_id=mask)
        for mask in (False, True)
    )
    assert plain == rsfast.adaptive_triplet_loss(image, text, margin=0.4) > masked


def test_gradient_of_a_settled_triplet_is_zero_not_nan():
    image = torch.eye(4, requires_grad=True)
    for gamma in (0.0, 0.5, 2.0):
        loss = rsfast.adaptive_triplet_loss(image, torch.eye(4), gamma=gamma)
        assert loss == 0 and torch.equal(torch.autograd.grad(loss, image)[0], torch.zeros(4, 4))


SCALE, ONES = torch.tensor(1.0), torch.ones(4, 8)
BAD = {
    "image_features must be floating point (N, D), got torch.float32 of shape (8,)": (torch.ones(8), ONES, {}),
    "text_features must be floating point (N, D), got torch.int64": (ONES, ONES.long(), {}),
    "text_features must be 8 wide, as image_features, got 9": (ONES, torch.ones(4, 9), {}),
    "text_features must have dtype torch.float32": (ONES, ONES.half(), {}),
    "text_features must have device cpu": (ONES, ONES.to("meta"), {}),
    "the batch is empty: 0 images and 0 texts": (ONES[:0], ONES[:0], {}),
    "image_ids must be 4 integers, one a row, got torch.int64 of shape (3,)": (
        ONES, ONES, dict(image_ids=torch.arange(3))),
    "image_ids must be 4 integers, one a row, got torch.float32": (ONES, ONES, dict(image_ids=torch.ones(4))),
    "text_ids must be 4 integers, one a row": (
        ONES, ONES, dict(image_ids=torch.arange(4), text_ids=torch.arange(5))),
    "image_ids must be on cpu": (ONES, ONES, dict(image_ids=torch.arange(4, device="meta"))),
    "image_ids are needed where text_ids are given": (ONES, ONES, dict(text_ids=torch.arange(4))),
}  # fmt: skip
BAD_CONTRASTIVE = BAD | {
    "image_ids and text_ids are needed for 4 images and 3 texts": (ONES, ONES[:3], dict(image_ids=torch.arange(4))),
    "label_smoothing must be between 0 and 1, got 1.5": (ONES, ONES, dict(label_smoothing=1.5)),
    "logit_scale must hold one number, got shape (2,)": (ONES, ONES, dict(logit_scale=torch.ones(2))),
    "impl must be 'auto', 'fused' or 'reference', got 'fast'": (ONES, ONES, dict(impl="fast")),
}
BAD_TRIPLET = BAD | {
    "text_features must have 4 rows, one an image, got 3": (ONES, ONES[:3], {}),
    "negatives must be 'all' or 'hardest', got 'some'": (ONES, ONES, dict(negatives="some")),
    "image_ids are needed with mask_same_id=True": (ONES, ONES, dict(mask_same_id=True)),
    "gamma must be 0 or more, got -1": (ONES, ONES, dict(gamma=-1)),
    "impl must be 'auto', 'fused' or 'reference', got 'fast'": (ONES, ONES, dict(impl="fast")),
}


@pytest.mark.parametrize("message", BAD_CONTRASTIVE)
def test_bad_arguments_of_the_contrastive_loss_are_named(message):
    image, text, options = BAD_CONTRASTIVE[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        rsfast.contrastive_loss(image, text, **{"logit_scale": SCALE, **options})


@pytest.mark.parametrize("message", BAD_TRIPLET)
def test_bad_arguments_of_the_triplet_loss_are_named(message):
    image, text, options = BAD_TRIPLET[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        rsfast.adaptive_triplet_loss(image, text, **options)
