"""The kernel of small batches, by itself: losses, gradients, and how it divides the work."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

from rsfast._tiles import INTERPRET
from rsfast.similarity import reference
from rsfast.similarity.kernels import small, small_tiles
from rsfast.testing import assert_within_budget

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
OPTIONS = dict(margin=0.2, gamma=2.0, adaptive=True, mask_same_id=False, label_smoothing=0.0)
GRADIENTS = ("dimage of contrastive", "dtext of contrastive", "dscale", "dimage of triplet", "dtext of triplet")


def draw(n, d, dtype, device, alike=0.0):
    """Unit rows; texts are partly their images."""
    g = torch.Generator().manual_seed(n)
    image, text = torch.randn(2, n, d, generator=g)
    text = alike * image + (1 - alike) * text
    return [F.normalize(x, dim=1).to(device, dtype) for x in (image, text)]


def kernel(image, text, scale, ids, *, contrastive=True, triplet=True, grad=True, **options):
    """Both losses in one tensor, and gradients."""
    one, two, *grads = small.step(
        image, text, scale, ids, contrastive=contrastive, triplet=triplet, grad=grad, **(OPTIONS | options)
    )
    return torch.stack([one, two]), *grads


def expected(image, text, scale, ids, *, margin, gamma, adaptive, mask_same_id, label_smoothing):
    """Losses and gradients by the reference, in the dtype of what comes in."""
    image, text, scale = (t.detach().requires_grad_() for t in (image, text, scale))
    contrastive = reference.contrastive_loss(image, text, scale, image_ids=ids, label_smoothing=label_smoothing)
    hinge = functools.partial(
        reference.adaptive_triplet_loss if adaptive else reference.triplet_loss,
        margin=margin, image_ids=ids, mask_same_id=mask_same_id,
    )  # fmt: skip
    triplet = hinge(image, text, gamma=gamma) if adaptive else hinge(image, text)
    grads = torch.autograd.grad(contrastive, (image, text, scale)) + torch.autograd.grad(triplet, (image, text))
    return torch.stack([contrastive, triplet]).detach(), grads


def assert_right(image, text, scale, ids, *, sm_count=None, alone=False, **changes):
    """Both losses and all gradients within the budget; ``alone``: of each loss by itself."""
    options = OPTIONS | changes
    run = functools.partial(kernel, image, text, scale, ids, sm_count=sm_count, **options)
    if alone:
        (one, dimage, dtext, dscale), (two, *others, _) = run(triplet=False), run(contrastive=False)
        losses = one + two
        dimage, dtext = torch.cat([dimage, others[0]]), torch.cat([dtext, others[1]])
    else:
        losses, dimage, dtext, dscale = run()
    wide = [t.double() for t in (image, text, scale)]
    gold, gold_grads = expected(*wide, ids, **options)
    eager, eager_grads = expected(image, text, scale, ids, **options)
    each = wide[2].expand(len(image), len(image)).clone()  # one sum over all pairs, so it cancels
    terms = expected(wide[0], wide[1], each, ids, **options)[1][2].norm().item()
    for name, one, two, three in zip(("contrastive", "triplet"), losses, gold, eager, strict=True):
        assert_within_budget(one, two, three, terms=max(image.shape), name=name)
    grads = dimage[0], dtext[0], dscale, dimage[1], dtext[1]
    for name, one, two, three in zip(GRADIENTS, grads, gold_grads, eager_grads, strict=True):
        assert one.dtype == FP32
        scale = terms if name == "dscale" else None
        assert_within_budget(one.to(three.dtype), two, three, terms=max(image.shape), scale=scale, name=name)


@pytest.mark.parametrize("dtype", (FP32, FP16, BF16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("n, d", ((2, 1), (7, 13), (65, 40), (130, 24)))
def test_within_budget(n, d, dtype, device):
    assert_right(*draw(n, d, dtype, device), torch.tensor(14.0, device=device), None)


VARIANTS = {
    "pairs": dict(ids=lambda i: i // 2),
    "apart": dict(ids=lambda i: i % 7, mask_same_id=True),
    "all alike": dict(ids=torch.zeros_like, label_smoothing=0.1, adaptive=False),
    "all alike, masked": dict(ids=torch.zeros_like, mask_same_id=True),
    "smooth": dict(label_smoothing=0.1, gamma=1.3),
    "uniform targets": dict(ids=lambda i: i // 3, label_smoothing=1.0, gamma=1.0),
    "hinge": dict(adaptive=False, margin=0.5),
    "halved hinge": dict(gamma=0.0),
    "sharp": dict(scale=100.0, alike=0.3),
    "sharp pairs": dict(scale=100.0, ids=lambda i: i // 2),
}


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, dtype, device):
    options = dict(VARIANTS[name])
    ids, scale, alike = options.pop("ids", None), options.pop("scale", 14.0), options.pop("alike", 0.0)
    ids = None if ids is None else ids(torch.arange(66, device=device))
    assert_right(*draw(66, 24, dtype, device, alike), torch.tensor([scale], device=device)[0], ids, **options)


@pytest.mark.parametrize("sm_count, tile", ((6, (128, 64)), (4, (128, 128))))
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=lambda d: str(d)[6:])
def test_tall_and_wide_tiles(sm_count, tile, dtype, device):
    plan, wide = small._plan(130, sm_count, 1), tile == (128, 128)
    assert tile == (plan.BLOCK_M, plan.BLOCK_N) and wide == (small._plan(130, sm_count, 2) is None)
    ids = torch.arange(130, device=device) % 50
    assert_right(*draw(130, 24, dtype, device), torch.tensor(14.0, device=device), ids, sm_count=sm_count, alone=wide)


@pytest.mark.parametrize("factors", ((1000.0, 3e-6), (2.0**-60, 2.0**50)), ids=("large", "far apart"))
def test_features_of_any_size(factors, device):
    image, text = (x * f for x, f in zip(draw(66, 24, FP32, device), factors, strict=True))
    unit = factors[0] * factors[1]
    image[-1] *= 40  # longer than the others
    assert_right(image, text, torch.tensor(5 / unit, device=device), None, margin=0.2 * unit)


def test_peaks(device):
    """Over more features than all programs read at once, the largest last; fp16 parts overflow where it is missed."""
    image, text = draw(70, 24, FP32, device)
    image[-1, -1], text[-1, -1] = -5, 7
    peaks = torch.full((2, small.PEAKS.value), torch.nan, device=device)
    counters = torch.full((2,), 9, dtype=torch.int32, device=device)
    small.peak_kernel[small.PEAKS.value, 2](image, text, peaks, counters, image.numel(), BLOCK=16)
    assert peaks.amax(1).tolist() == [5, 7] and not counters.any()


def test_a_loss_of_nothing_keeps_its_digits(device):
    """Images and texts so well matched that 1 - P is 1e-30; fp64 itself needs the positive taken out of the sum."""
    n, scale = 70, 72.0
    g = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.eye(n) + 0.01 * torch.randn(n, n, generator=g)).to(device) for _ in range(2))
    losses, dimage, dtext, dscale = kernel(image, text, torch.tensor(scale, device=device), None)
    wide = [t.double().requires_grad_() for t in (image, text, torch.tensor(scale, device=device))]
    s = wide[0] @ wide[1].mT
    others = ~torch.eye(n, dtype=torch.bool, device=device)
    gaps = ((x - x.diagonal()[:, None])[others].view(n, n - 1) for x in (s, s.mT))
    gold = sum(F.softplus((wide[2] * gap).logsumexp(1)).mean() / 2 for gap in gaps)
    assert 1e-31 < gold < 1e-27
    # the exponent is off by a rounding of each factor and of each score, a sum of n products
    eps = 4 * scale * torch.finfo(FP32).eps
    assert abs(losses[0] / gold.item() - 1) <= eps and losses[1] == 0
    gold_grads = torch.autograd.grad(gold, wide)
    for ours, theirs in zip((dimage[0], dtext[0], dscale), gold_grads, strict=True):
        assert (ours - theirs).norm() <= eps * theirs.norm()
    assert not dimage[1].any() and not dtext[1].any()


def assert_same_bits(one, two):
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=lambda d: str(d)[6:])
def test_barriers_are_launches(dtype, device):
    """Programs run one after another in the interpreter, so there only a grid of one passes a barrier."""
    n, sm_count = (50, 1) if INTERPRET.value else (200, None)
    inputs = *draw(n, 24, dtype, device), torch.tensor(14.0, device=device), torch.arange(n, device=device) // 2
    runs = [kernel(*inputs, sm_count=sm_count, cooperative=cooperative) for cooperative in (True, False, True)]
    assert_same_bits(*runs[:2])
    assert_same_bits(*runs[1:])


@pytest.mark.parametrize("sm_count", (1, 2, 5))
def test_any_number_of_programs_share_the_work(sm_count, device):
    inputs = *draw(50, 90, FP32, device), torch.tensor(14.0, device=device), None
    assert_same_bits(kernel(*inputs, sm_count=sm_count, cooperative=False), kernel(*inputs, cooperative=False))


@pytest.mark.parametrize("sm_count", (108, 132, 148, 170, 188, 1024))
def test_there_is_room_for_every_piece(sm_count):
    """A GPU of 148 multiprocessors takes 144 tiles of four pieces."""
    for n, losses in itertools.product(range(2, 2100), (1, 2)):
        if plan := small._plan(n, sm_count, losses):
            tiles_m, tiles_n = plan.tiles(n)
            assert tiles_m * tiles_n * plan.PIECES <= small_tiles.ROOM.value, (n, plan)
            assert small_tiles.COL_B.value + 16 * (losses - 1) + tiles_m <= small_tiles.ROW_A.value
            assert small_tiles.ROW_A.value + 64 * (losses - 1) + tiles_n * plan.PIECES <= small_tiles.PARTIALS


def test_each_loss_alone_and_without_gradients(device):
    inputs = *draw(66, 24, BF16, device), torch.tensor(14.0, device=device), torch.arange(66, device=device) // 2
    losses, dimage, dtext, dscale = kernel(*inputs)
    alone = kernel(*inputs, triplet=False)
    assert_same_bits(alone, (torch.stack([losses[0], losses[0] * 0]), dimage[:1], dtext[:1], dscale))
    alone = kernel(inputs[0], inputs[1], None, None, contrastive=False)
    assert_same_bits(alone, (torch.stack([losses[1] * 0, losses[1]]), dimage[1:], dtext[1:], dscale * 0))
    bare, *empty = kernel(*inputs, grad=False)
    assert torch.equal(bare, losses) and empty[0].numel() == empty[1].numel() == 0


def test_inputs_of_any_layout(device):
    image, text = draw(50, 24, FP32, device)
    scale, ids = torch.tensor(14.0, device=device), torch.arange(50, device=device) // 2
    strided = image.mT.contiguous().mT, torch.stack([text, text * torch.nan], -1)[..., 0]
    assert_same_bits(kernel(*strided, scale, torch.stack([ids, ids * 0], -1)[..., 0]), kernel(image, text, scale, ids))


def test_what_it_takes():
    assert all(small.supports(n, n, 512, FP32, 132, 1) for n in (2, 428, 704, 1024, 1408))
    assert small.supports(1024, 1024, 512, FP32, 132, 2) and not small.supports(1025, 1025, 512, FP32, 132, 2)
    assert small.supports(640, 640, 1, BF16, 108, 2) and not small.supports(1281, 1281, 512, FP16, 108, 1)
    for n, m, d, dtype in ((1409, 1409, 512, FP32), (1, 1, 8, FP32), (8, 9, 8, FP32), (8, 8, 8, torch.float64)):
        assert not small.supports(n, m, d, dtype, 132, 1)
