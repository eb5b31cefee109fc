"""What is special about the losses that compare every image with every text: values, gradients, limits."""

import math
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import rsfast
from rsfast.similarity.functional import one_way_loss, one_way_sigmoid_loss
from tests.cases import CASES
from tests.pairs import features, number, same_gradients, same_to_rounding

FILE = np.load(pathlib.Path(__file__).parent / "data" / "harma_losses.npz")
KERNELS = {case.name for case in CASES if case.has_kernel()}


def read(key):
    return torch.from_numpy(FILE[key])


GOLDEN = {
    "contrastive": (rsfast.contrastive_loss, {}),
    "contrastive_idx": (rsfast.contrastive_loss, dict(image_ids=read("idx"))),
    "affiliation": (rsfast.affiliation_loss, dict(labels=read("label"))),
    "triplet": (rsfast.triplet_loss, {}),
    "triplet_hardest": (rsfast.triplet_loss, dict(negatives="hardest")),
    "ada_triplet": (rsfast.adaptive_triplet_loss, {}),
    "ada_triplet_gamma1_margin3": (rsfast.adaptive_triplet_loss, dict(gamma=1, margin=0.3)),
    "ada_triplet_hardest": (rsfast.adaptive_triplet_loss, dict(negatives="hardest")),
}


def test_every_loss_in_the_file_is_looked_at():
    assert {key.removesuffix(".loss") for key in FILE if key.endswith(".loss")} == set(GOLDEN)


def assert_is_harmas(name, loss, leaves):
    """In fp64; the gradients in the file are fp32, the losses are not."""
    # upstream divides the targets of equal ids, and looks for its own centre, in fp32
    eps = torch.finfo(torch.float32 if name == "contrastive_idx" else torch.float64).eps
    torch.testing.assert_close(loss.detach(), read(f"{name}.loss"), rtol=8 * eps, atol=0)
    for key, grad in zip(("image", "text", "temp"), torch.autograd.grad(loss, leaves), strict=False):
        if f"{name}.grad_{key}" not in FILE:
            continue
        gold = read(f"{name}.grad_{key}")
        # the file keeps these two gradients in fp32, and a sum of rounded targets is off by the largest, not by itself
        noise = max(8 * eps, torch.finfo(gold.dtype).eps) * gold.abs().max()
        assert (grad - gold).abs().max() <= noise, key


@pytest.mark.parametrize("name", GOLDEN)
def test_equals_harma(name):
    image, text = (read(key).double().requires_grad_() for key in ("image", "text"))
    temp, (loss, options) = read("temp").requires_grad_(), GOLDEN[name]
    if name == "affiliation":  # upstream's second temperature is no parameter
        options = options | dict(logit_scale=1 / torch.tensor(0.07, dtype=torch.double))
    if name not in ("contrastive", "contrastive_idx"):
        assert_is_harmas(name, loss(image, text, **options), [image, text])
    else:
        assert_is_harmas(name, loss(image, text, logit_scale=1 / temp, **options), [image, text, temp])


@pytest.mark.parametrize("contrastive", ("contrastive", "contrastive_idx"))
def test_the_pair_of_losses_is_harmas(contrastive):
    image, text = (read(key).double().requires_grad_() for key in ("image", "text"))
    temp = read("temp").requires_grad_()
    for at, name, leaves in ((0, contrastive, [image, text, temp]), (1, "ada_triplet", [image, text])):
        pair = rsfast.harma_loss(image, text, 1 / temp, **GOLDEN[contrastive][1])
        assert_is_harmas(name, pair[at], leaves)


def contrastive_by_hand(scores, same, smoothing):
    """One direction, pair by pair; ``same[i][j]`` says whether image i and text j are positives."""
    total = 0.0
    for row, alike in zip(scores, same, strict=True):
        log_sum = math.log(sum(math.exp(s) for s in row))
        for s, positive in zip(row, alike, strict=True):
            target = positive / max(sum(alike), 1)
            total -= ((1 - smoothing) * target + smoothing / len(row)) * (s - log_sum)
    return total / len(scores)


def flipped(rows):
    return list(zip(*rows, strict=True))


IDS = (
    (None, None),
    ((3, 3, 5, 9, 5), None),
    ((3, 3, 5, 9, 5), (5, 3, 9, 9, 3)),
    ((3, 7, 5), (3, 3, 7, 5, 7, 5, 5)),  # three images, seven captions
    ((3, 4), (3, 8, 3)),  # an image and a caption without a partner
    ((6, 6, 6, 6, 6), None),
)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("image_ids, text_ids", IDS)
def test_contrastive_losses_pair_by_pair(image_ids, text_ids, smoothing):
    n = len(image_ids or range(5))
    image, text = features(n, len(text_ids or range(n)))
    rows = range(n) if image_ids is None else image_ids
    columns = rows if text_ids is None else text_ids
    scores, same = (6 * image @ text.T).tolist(), [[i == j for j in columns] for i in rows]
    to_text, to_image = (
        contrastive_by_hand(*tables, smoothing) for tables in ((scores, same), (flipped(scores), flipped(same)))
    )
    ids = [None if given is None else torch.tensor(given) for given in (image_ids, text_ids)]
    loss = rsfast.contrastive_loss(
        image, text, torch.tensor(6.0), image_ids=ids[0], text_ids=ids[1], label_smoothing=smoothing
    )
    assert loss.item() == pytest.approx((to_text + to_image) / 2, rel=1e-12)
    partners = ids[0] if ids[1] is None else ids[1]
    for by_hand, queries, keys, query_ids, key_ids in (
        (to_text, image, text, ids[0], partners),
        (to_image, text, image, partners, ids[0]),
    ):
        loss = one_way_loss(
            queries, keys, torch.tensor(6.0), query_ids=query_ids, key_ids=key_ids, label_smoothing=smoothing
        )
        assert loss.item() == pytest.approx(by_hand, rel=1e-12)


def test_offset_rows_of_the_whole():
    """The rows of two processes, averaged, are the loss of all of them, with its gradient."""
    image, text, scale, bias = *features(6, 6), number(9.0), number(-3.0)
    halves = [slice(0, 2), slice(2, 6)]

    def averaged(part):
        return sum(len(image[rows]) * part(rows) for rows in halves) / 6

    to_text, to_image = (
        averaged(lambda rows: one_way_loss(a[rows], b, scale, offset=rows.start))  # noqa: B023
        for a, b in ((image, text), (text, image))
    )
    whole = rsfast.contrastive_loss(image, text, scale)
    assert same_gradients((to_text + to_image) / 2, whole, (image, text, scale))
    parts = averaged(lambda rows: one_way_sigmoid_loss(image[rows], text, scale, bias, offset=rows.start))
    assert same_gradients(parts, rsfast.sigmoid_loss(image, text, scale, bias), (image, text, scale, bias))


@pytest.mark.parametrize("smoothing", (0.0, 0.1, 1.0))
def test_label_smoothing_is_cross_entropys(smoothing):
    image, text, scale = *features(6, 6), number(9.0)
    logits, target = scale * image @ text.T, torch.arange(6)
    theirs = sum(F.cross_entropy(s, target, label_smoothing=smoothing) for s in (logits, logits.T)) / 2
    ours = rsfast.contrastive_loss(image, text, scale, label_smoothing=smoothing)
    assert same_gradients(ours, theirs, (image, text, scale))


@pytest.mark.parametrize("ids", (None, (3, 3, 5, 9, 5), (6, 6, 6, 6, 6)))
@pytest.mark.parametrize("scale", (1.0, 14.0, 100.0))
def test_gradient_of_the_contrastive_loss_in_closed_form(scale, ids):
    """s / 2N (P + P' - y - y'), and the temperature's from it."""
    image, text, scale = *features(5, 5), number(scale)
    ids = None if ids is None else torch.tensor(ids)
    loss = rsfast.contrastive_loss(image, text, scale, image_ids=ids)
    logits = scale * image @ text.T
    ids = torch.arange(5) if ids is None else ids
    same = (ids[:, None] == ids).double()
    g = logits.softmax(1) + logits.softmax(0) - same / same.sum(1, keepdim=True) - same / same.sum(0)
    g = scale / 10 * g
    by_hand = (g @ text, g.T @ image, (image * (g @ text)).sum() / scale)
    for ours, closed in zip(torch.autograd.grad(loss, (image, text, scale)), by_hand, strict=True):
        assert same_to_rounding(ours, closed, factor=64 * scale.item())  # the exponents are as large


@pytest.mark.skipif("contrastive_loss" not in KERNELS, reason="no kernel yet")
@pytest.mark.parametrize("scale", (20.0, 40.0, 72.0))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_loss_of_separated_features_is_exact(scale, dtype, device):
    """Down to 1e-30, where a sum that holds the positive would be 1, and the loss 0."""
    image, text = (torch.eye(9, 16, device=device, dtype=dtype, requires_grad=True) for _ in "ab")
    exponent = torch.tensor(scale, device=device, requires_grad=True)
    others = 8 * math.exp(-scale)
    exact = math.log1p(others)
    eps = scale * torch.finfo(torch.float32).eps  # of the exponent, hence of the loss
    loss = rsfast.contrastive_loss(image, text, exponent, impl="fused")
    assert loss.item() == pytest.approx(exact, rel=2 * eps, abs=0)
    image_grad, _, scale_grad = torch.autograd.grad(loss, (image, text, exponent))
    share = others / (1 + others)
    g = (
        scale
        / 9
        * (share / 8 * torch.ones(9, 9, dtype=torch.double) - share * 9 / 8 * torch.eye(9, dtype=torch.double))
    )
    rounding = 2 * eps + torch.finfo(dtype).eps
    torch.testing.assert_close(image_grad[:, :9].double().cpu(), g, rtol=rounding, atol=0)
    assert scale_grad.item() == pytest.approx(-share, rel=2 * eps, abs=0)


def sigmoid_by_hand(z):
    """Pair by pair, z_ij the scaled and shifted similarity."""
    return sum(
        math.log1p(math.exp(-s if i == j else s)) for i, row in enumerate(z) for j, s in enumerate(row)
    ) / len(z)  # fmt: skip


@pytest.mark.parametrize("bias", (None, -4.0))
def test_sigmoid_loss_pair_by_pair(bias):
    """With its gradient in closed form: (sigmoid(z) - y) / N."""
    image, text, scale = *features(5, 5), number(7.0)
    shift = None if bias is None else number(bias)
    loss = rsfast.sigmoid_loss(image, text, scale, shift)
    z = 7 * image @ text.T + (bias or 0)
    assert loss.item() == pytest.approx(sigmoid_by_hand(z.tolist()), rel=1e-12)
    g = (z.sigmoid() - torch.eye(5)) / 5
    closed = [scale * g @ text, scale * g.T @ image, (g * (image @ text.T)).sum(), g.sum()]
    leaves = [leaf for leaf in (image, text, scale, shift) if leaf is not None]
    for ours, by_hand in zip(torch.autograd.grad(loss, leaves), closed, strict=False):
        assert same_to_rounding(ours, by_hand)


def test_sigmoid_loss_of_settled_pairs_is_exact():
    """Down to 1e-30, in fp32: no sigmoid that has rounded to 1."""
    eye = torch.eye(6, requires_grad=True)
    loss = rsfast.sigmoid_loss(eye, torch.eye(6), torch.tensor(140.0), torch.tensor(-70.0))
    assert loss.item() == pytest.approx(6 * math.exp(-70), rel=70 * torch.finfo(torch.float32).eps, abs=0)
    assert (torch.autograd.grad(loss, eye)[0] != 0).all()


@pytest.mark.parametrize("t", (0.5, 2.0, 30.0))
def test_uniformity_pair_by_pair(t):
    """With its gradient in closed form: 2 t sum_j w_ij / Z x_j."""
    (x,) = features(6)
    s = (x @ x.T).tolist()
    pairs = [math.exp(-2 * t * (1 - s[i][j])) for i in range(6) for j in range(i)]
    loss = rsfast.uniformity_loss(x, t=t)
    assert loss.item() == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-12)
    w = (-2 * t * (1 - x @ x.T)).exp().fill_diagonal_(0)
    assert same_to_rounding(torch.autograd.grad(loss, x)[0], 2 * t * w @ x / sum(pairs), factor=64 * t)


def test_uniformity_is_of_distances():
    """Of unit vectors; the gradients along a vector itself differ, until it is normalised."""
    (x,) = features(6)
    apart = torch.pdist(F.normalize(x, dim=1)).square()
    assert same_gradients(rsfast.uniformity_loss(x, normalize=True), (-2 * apart).exp().mean().log(), [x])


@pytest.mark.parametrize("alpha", (1.0, 2.0, 3.5))
def test_alignment_pair_by_pair(alpha):
    image, text = features(5, 5)
    by_hand = sum(math.dist(a, b) ** alpha for a, b in zip(image.tolist(), text.tolist(), strict=True)) / 5
    assert rsfast.alignment_loss(image, text, alpha=alpha).item() == pytest.approx(by_hand, rel=1e-12)
    together = rsfast.alignment_loss(image, image.detach(), alpha=alpha)
    assert together == 0 and torch.equal(torch.autograd.grad(together, image)[0], torch.zeros_like(image))


def test_affiliation_pair_by_pair():
    image, text = features(5, 5)
    labels = (4, 0, 4, 7, 0)

    def centre(side, label):
        rows = [row for row, own in zip(side.tolist(), labels, strict=True) if own == label]
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def scores(queries, keys):
        return (6 * (torch.tensor(queries, dtype=torch.double) @ torch.tensor(keys, dtype=torch.double).T)).tolist()

    own = [[i == j for j in range(5)] for i in range(5)]
    image_centres, text_centres = ([centre(side, label) for label in labels] for side in (image, text))
    by_hand = contrastive_by_hand(scores(image.tolist(), text_centres), own, 0)
    by_hand += contrastive_by_hand(scores(image_centres, text.tolist()), own, 0)
    loss = rsfast.affiliation_loss(image, text, torch.tensor(labels), torch.tensor(6.0))
    assert loss.item() == pytest.approx(by_hand / 2, rel=1e-12)
