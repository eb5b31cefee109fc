"""What is special about the kernels of the hardest negatives: ties, several tiles, hubs, rows without a negative.

Small integers have exact products in every dtype, so what the kernels find is compared bit for bit.
"""

import math

import pytest
import torch

import rsfast
from rsfast.similarity import reference
from tests.cases import BF16, FP16, FP32

FUSED = dict(negatives="hardest", impl="fused")


def integers(n, width, dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(-2, 3, (n, width), generator=g).to(device, dtype) for _ in "ab"]


def first_of_highest(scores, same):
    """Highest score of each row and the first place where it is."""
    scores = scores.masked_fill(same, -torch.inf)
    highest = scores.amax(1)
    places = torch.arange(len(scores), device=scores.device)
    return highest, torch.where(scores == highest[:, None], places, len(scores)).amin(1)


@pytest.mark.parametrize(
    "generation, n, dtype, masked",
    [(90, 300, BF16, False), (90, 300, FP32, True), (80, 300, FP16, True), (80, 260, FP32, False)],
)
def test_finds_the_first_of_the_hardest(monkeypatch, device, generation, n, dtype, masked):
    from rsfast.similarity.kernels import hardest, prepare

    if device == "cpu":
        for module in (hardest, prepare):
            monkeypatch.setattr(module, "capability", lambda device: generation)
    image, text = integers(n, 9, dtype, device)
    image_ids, text_ids = (torch.arange(n, device=device) // k % 70 for k in (3, 2))
    same = torch.eye(n, dtype=torch.bool, device=device)
    same = same | (image_ids[:, None] == text_ids) if masked else same
    ids = (image_ids, text_ids) if masked else (None, None)
    loss, slopes, found = hardest.fwd(image, text, *ids, 0.5, 0.0, 1.0)

    scores = image.double() @ text.double().mT
    total = 0
    for way, (s, left_out) in enumerate([(scores, same), (scores.mT, same.mT)]):
        highest, place = first_of_highest(s, left_out)
        violation = (0.5 + highest - scores.diagonal()).relu()
        assert torch.equal(slopes[way], (violation > 0).float())
        assert torch.equal(found[way], torch.where(violation > 0, place, n).int())
        total = total + violation.sum()
    assert loss == total  # halves: exact too


def exactly_as_the_reference(image, text, **options):
    """Loss and gradients, bit for bit those of the reference in float64."""
    wide = [t.double().requires_grad_() for t in (image, text)]
    gold = reference.triplet_loss(*wide, negatives="hardest", **options)
    leaves = [t.clone().requires_grad_() for t in (image, text)]
    loss = rsfast.triplet_loss(*leaves, **FUSED, **options)
    grads = torch.autograd.grad(loss, leaves), torch.autograd.grad(gold, wide)
    assert loss.dtype == torch.float32 and loss == gold
    for ours, exact in zip(*grads, strict=True):
        assert ours.dtype == image.dtype and torch.equal(ours.double(), exact)
    return loss, *grads[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_gradients_are_exact_where_many_tie(device, dtype, masked):
    image, text = integers(45, 5, dtype, device)
    ids = dict(image_ids=torch.arange(45, device=device) // 2 % 9, mask_same_id=True) if masked else {}
    exactly_as_the_reference(image, text, margin=0.5, **ids)


def test_one_text_is_the_hardest_of_all(device):
    """More rows share it than a step of the gradient's loop takes, and not a multiple of it."""
    n = 37
    image, text = integers(n, 6, FP32, device)
    image[:, 0], text[:, 0] = 1, 0
    text[5, 0] = 40
    _, dimage, dtext = exactly_as_the_reference(image, text, margin=0.5)
    assert dtext[5, 0] >= n - 1 - 3  # but for its own pair, and what it loses as a positive


def test_equal_texts_take_the_gradient_once(device):
    image = torch.eye(4, 8, device=device)
    text = image.roll(1, 0).contiguous()
    text[3] = text[2] = text[1]  # all of the highest score in row 0, and image 0 in their columns
    _, _, dtext = exactly_as_the_reference(image, text, margin=0.5)
    assert dtext[1:, 0].tolist() == [2, 1, 1]


def test_nobody_has_a_negative(device):
    image, text = integers(20, 5, FP32, device)
    ids = torch.zeros(20, dtype=torch.int64, device=device)
    loss, dimage, dtext = exactly_as_the_reference(image, text, image_ids=ids, mask_same_id=True)
    assert loss == 0 and not dimage.any() and not dtext.any()


def test_some_have_no_negative(device):
    """Image 2 meets only texts of its own id; every text still has other images."""
    image, text = integers(6, 5, FP32, device)
    image_ids, text_ids = torch.tensor([0, 1, 7, 3, 4, 5], device=device), torch.full((6,), 7, device=device)
    exactly_as_the_reference(image, text, margin=90.0, image_ids=image_ids, text_ids=text_ids, mask_same_id=True)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_weights_and_slopes(device, gamma):
    """The last text is the hardest of each image but its own, by nothing, next to nothing, little and much."""
    from rsfast.similarity.kernels.hardest import fwd

    c = torch.tensor([0.0, 2**-20, 2**-10, 0.25, 1.0, 30.0], dtype=torch.float64, requires_grad=True)
    gold = ((-torch.expm1(-c)).where(c > 0, 1) ** gamma * c.relu() / 2).sum()
    (slope,) = torch.autograd.grad(gold, c)

    image, text = torch.zeros(2, 7, 3, device=device)
    image[:6, 0], image[6, 0], text[6, 0] = c.detach(), 100, 1
    loss, slopes, hardest = fwd(image, text, None, None, 0.0, gamma, 0.5)
    exactly = dict(rtol=4 * torch.finfo(FP32).eps, atol=0, check_dtype=False, check_device=False)
    torch.testing.assert_close(loss, gold.detach(), **exactly)
    torch.testing.assert_close(slopes[0, :6], slope, **exactly)
    assert hardest[0].tolist() == [7, 6, 6, 6, 6, 6, 7] and not slopes[0, 6] and not slopes[1].any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_nan_is_not_hidden(device, gamma):
    image, text = integers(20, 5, FP32, device)
    text[3, 2] = math.nan
    image.requires_grad_()
    loss = rsfast.adaptive_triplet_loss(image, text, gamma=gamma, **FUSED)
    (dimage,) = torch.autograd.grad(loss, image)
    assert loss.isnan() and dimage[3].isnan().any()
