"""What is special about the triplet losses: values pair by pair, ties, masks, and gradients at the border."""

import math

import pytest
import torch

import rsfast
from tests.pairs import features, same_gradients, same_to_rounding

IDS = ((None, None), ((3, 3, 5, 9, 5), None), ((3, 3, 5, 9, 5), (5, 3, 9, 9, 3)), ((6, 6, 6, 6, 6), None))
MARGIN = 0.4


def tensors(ids):
    return None if ids is None else torch.tensor(ids)


@pytest.mark.parametrize("image_ids, text_ids", IDS)
@pytest.mark.parametrize("negatives", ("all", "hardest"))
@pytest.mark.parametrize("gamma", (None, 0.0, 1.0, 2.0))
def test_pair_by_pair(gamma, negatives, image_ids, text_ids):
    """``gamma`` None is the plain triplet loss, which is not halved."""
    image, text = features(5, 5)
    s = (image @ text.T).tolist()

    def weighed(i, j, own):
        cost = max(0.0, MARGIN + s[i][j] - s[own][own])
        left_out = i == j or (image_ids is not None and image_ids[i] == (text_ids or image_ids)[j])
        return 0.0 if left_out else (1 - math.exp(-cost)) ** (gamma or 0) * cost

    take = sum if negatives == "all" else max
    by_hand = sum(take(weighed(i, j, i) for j in range(5)) + take(weighed(j, i, i) for j in range(5)) for i in range(5))
    loss, options = (rsfast.triplet_loss, {}) if gamma is None else (rsfast.adaptive_triplet_loss, dict(gamma=gamma))
    found = loss(
        image, text, margin=MARGIN, negatives=negatives, image_ids=tensors(image_ids), text_ids=tensors(text_ids),
        mask_same_id=image_ids is not None, **options,
    )  # fmt: skip
    assert found.item() == pytest.approx(by_hand / (1 if gamma is None else 2), rel=1e-12)
    assert (by_hand > 0) == (image_ids != (6, 6, 6, 6, 6))


def in_closed_form(image, text, slope, hardest=False):
    """The features' gradients from G, the loss's gradient by similarity, ``slope`` the derivative by violation."""
    scores = image @ text.T
    own = scores.diagonal()
    rows, columns = ((MARGIN + scores - d).clamp(min=0).fill_diagonal_(0) for d in (own[:, None], own))
    if hardest:
        rows = rows * torch.zeros_like(rows).scatter_(1, rows.argmax(1, keepdim=True), 1)
        columns = columns * torch.zeros_like(rows).scatter_(0, columns.argmax(0, keepdim=True), 1)
    rows, columns = ((cost > 0) * slope(cost) for cost in (rows, columns))
    g = rows + columns
    g = g - torch.diag(rows.sum(1) + columns.sum(0))
    return g @ text, g.T @ image


def adaptive_slope(gamma):
    return lambda c: ((-torch.expm1(-c)) ** gamma + gamma * c * (-c).exp() * (-torch.expm1(-c)) ** (gamma - 1)) / 2


@pytest.mark.parametrize("negatives", ("all", "hardest"))
@pytest.mark.parametrize("gamma", (None, 1.0, 2.0, 3.5))
def test_gradient_in_closed_form(gamma, negatives):
    image, text = features(7, 7)
    if gamma is None:
        loss, slope = rsfast.triplet_loss(image, text, margin=MARGIN, negatives=negatives), torch.ones_like
    else:
        loss = rsfast.adaptive_triplet_loss(image, text, margin=MARGIN, gamma=gamma, negatives=negatives)
        slope = adaptive_slope(gamma)
    closed = in_closed_form(image, text, slope, hardest=negatives == "hardest")
    for ours, by_hand in zip(torch.autograd.grad(loss, (image, text)), closed, strict=True):
        assert by_hand.abs().max() > 0.1 and same_to_rounding(ours, by_hand)


def test_saturated_form_of_gamma_2():
    """What a kernel computes: one exponential of S for both directions, u = 0 where there is no violation."""
    image, text = features(7, 7)
    scores = image @ text.T
    own, e, total = scores.diagonal(), (-scores).exp(), 0
    for d in (own[:, None], own):
        u = (1 - e * (d - MARGIN).exp()).clamp(0, 1).fill_diagonal_(0)
        total = total + (u**2 * (scores + MARGIN - d)).sum()
        t, cost = u**2, scores + MARGIN - d
        assert same_to_rounding(t + (u - t) * 2 * cost, (u > 0) * 2 * adaptive_slope(2)(cost))
    assert same_to_rounding(rsfast.adaptive_triplet_loss(image, text, margin=MARGIN), total / 2)


def test_gamma_0_is_half_the_plain_loss():
    leaves = features(6, 6)
    half = rsfast.triplet_loss(*leaves, margin=MARGIN) / 2
    assert same_gradients(rsfast.adaptive_triplet_loss(*leaves, margin=MARGIN, gamma=0.0), half, leaves)


@pytest.mark.parametrize("loss", (rsfast.triplet_loss, rsfast.adaptive_triplet_loss))
def test_of_equal_negatives_the_first_has_the_gradient(loss):
    """Images 0 and 3 are the same vector, and so are texts 1 and 2: every maximum over them is a tie."""
    image, text = torch.eye(4), torch.ones(4, 4)
    image[3], text[0], text[3] = image[0], 0.0, 0.0
    image.requires_grad_()
    text.requires_grad_()
    scores = image @ text.T  # rows 1 1 1 1 but for columns 0 and 3, which are 0
    assert scores.tolist() == [[0, 1, 1, 0]] * 4
    found = loss(image, text, margin=0.5, negatives="hardest")
    slope = torch.ones_like if loss is rsfast.triplet_loss else adaptive_slope(2)
    far, near = slope(torch.tensor(1.5)), slope(torch.tensor(0.5))
    g = torch.zeros(4, 4)
    # rows 0 and 3 are beaten by text 1, not by 2; row 1 by text 2, row 2 by text 1, each by the margin alone
    for i, j, each in ((0, 1, far), (1, 2, near), (2, 1, near), (3, 1, far)):
        g[i, j] += each
        g[i, i] -= each
    # columns 0 and 3 are 0 everywhere, columns 1 and 2 are 1: the first image that is not their own
    for i, j in ((1, 0), (0, 1), (0, 2), (0, 3)):
        g[i, j] += near
        g[j, j] -= near
    for ours, by_hand in zip(torch.autograd.grad(found, (image, text)), (g @ text, g.T @ image), strict=True):
        assert same_to_rounding(ours, by_hand)


def test_ids_are_ignored_unless_the_mask_is_asked_for():
    image, text = features(5, 5)
    ids = torch.tensor((3, 3, 5, 9, 5))
    for loss in (rsfast.triplet_loss, rsfast.adaptive_triplet_loss):
        plain, masked = (loss(image, text, margin=MARGIN, image_ids=ids, mask_same_id=mask) for mask in (False, True))
        assert plain == loss(image, text, margin=MARGIN) > masked


@pytest.mark.parametrize("way", ("reference", "small", "tiles"))
@pytest.mark.parametrize("negatives", ("all", "hardest"))
@pytest.mark.parametrize("gamma", (None, 0.0, 0.5, 1.0, 2.0))
def test_no_violation_no_gradient(gamma, negatives, way, device, monkeypatch):
    """Neither below the border nor on it, where a power of 0 below 1 would have an infinite slope."""
    if way != "reference":
        kernels = pytest.importorskip("rsfast.similarity.kernels")
        if way == "tiles":
            monkeypatch.setattr(kernels.small, "supports", lambda *size: False)
    image, text = torch.eye(4, device=device, requires_grad=True), torch.eye(4, device=device)
    options = dict(negatives=negatives, impl="reference" if way == "reference" else "fused")
    loss = rsfast.triplet_loss if gamma is None else rsfast.adaptive_triplet_loss
    options |= {} if gamma is None else dict(gamma=gamma)
    for margin in (0.2, 1.0):
        with torch.autograd.set_detect_anomaly(True):  # which stops at a NaN on the way
            found = loss(image, text, margin=margin, **options)
            (grad,) = torch.autograd.grad(found, image)
        assert found == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_a_row_without_a_negative_adds_nothing():
    """All of one id, or all but one: nothing to be hardest among, and no NaN from an empty maximum."""
    image, text = features(4, 4)
    for ids in ((1, 1, 1, 1), (1, 1, 1, 2)):
        loss = rsfast.triplet_loss(
            image, text, margin=MARGIN, negatives="hardest", image_ids=torch.tensor(ids), mask_same_id=True
        )
        grads = torch.autograd.grad(loss, (image, text))
        assert all(g.isfinite().all() for g in grads) and (loss == 0) == (ids == (1, 1, 1, 1))
