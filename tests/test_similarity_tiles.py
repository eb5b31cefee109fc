"""The kernels that work through S tile by tile: what a batch of one tile does not show."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import rsfast
from rsfast.similarity import functional, reference
from rsfast.testing import assert_within_budget
from tests.cases import BF16, FP16, FP32
from tests.test_similarity import test_loss_of_separated_features_is_exact as exactly_separated

plan, prepare, tiled = (pytest.importorskip(f"rsfast.similarity.kernels{name}") for name in (".plan", ".prepare", ""))
N, D = 150, 7  # two rows of tiles, one or two columns of them; rows that need padding
TEMPERATURE = torch.tensor(14.0)


@pytest.fixture(autouse=True)
def _tiles_only(monkeypatch):
    """However small the batch is."""
    if hasattr(tiled, "small"):
        monkeypatch.setattr(tiled.small, "supports", lambda *size: False)


def drawn(n, m, dtype, device, near=0.0):
    """Unit norms; ``near``, from 0 to 1, brings texts close to their images."""
    g = torch.Generator().manual_seed(0)
    image, text = (torch.randn(k, D, generator=g) for k in (n, m))
    k = min(n, m)
    text[:k] += near * 30 * image[:k]
    return [F.normalize(t, dim=1).to(device, dtype) for t in (image, text)]


def numbers(*values, device):
    return [torch.tensor(float(v), device=device) for v in values]


def stacked(losses):
    return torch.stack(losses) if isinstance(losses, tuple) else losses


def gradients(loss, tensors, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = stacked(loss(*leaves, **options))
    weights = torch.linspace(1.3, 0.7, 2, dtype=y.dtype, device=y.device) if y.ndim else None  # no copy in a graph
    return [y.detach(), *torch.autograd.grad(y, leaves, weights)]


def judge(name, tensors, **options):
    """The kernels' loss and gradients against the reference's in float64, by the budget."""
    fused = gradients(getattr(functional, name), tensors, impl="fused", **options)
    plain = getattr(reference, name)
    gold = gradients(plain, [t.double() for t in tensors], **options)
    eager = gradients(plain, tensors, **options)
    for one, exact, other in zip(fused, gold, eager, strict=True):
        if one.ndim < 2:  # numbers are right by chance now and then
            other = exact.to(one.dtype) * (1 + torch.finfo(tensors[0].dtype).eps)
        assert_within_budget(one, exact, other, terms=max(len(t) for t in tensors[:2]), name=name)
    return fused


def ids(n, device, each=2):
    return torch.arange(n, device=device) // each


LOSSES = {
    "contrastive": lambda v, t, device: ("contrastive_loss", [v, t, *numbers(14, device=device)], {}),
    "ids": lambda v, t, device: (
        "contrastive_loss", [v, t, *numbers(14, device=device)],
        dict(image_ids=ids(len(v), device), label_smoothing=0.1),
    ),
    "rect": lambda v, t, device: (
        "contrastive_loss", [v[:-10], t, *numbers(14, device=device)],
        dict(image_ids=ids(len(v) - 10, device, 3), text_ids=2 * ids(len(t), device, 3), label_smoothing=0.1),
    ),
    "one way": lambda v, t, device: (
        "one_way_loss", [v[: len(v) // 3], t, *numbers(14, device=device)], dict(offset=len(v) // 2)
    ),
    "harma": lambda v, t, device: (
        "harma_loss", [v, t, *numbers(14, device=device)], dict(image_ids=ids(len(v), device))
    ),
    "triplet": lambda v, t, device: ("triplet_loss", [v, t], {}),
    "adaptive": lambda v, t, device: (
        "adaptive_triplet_loss", [v, t],
        dict(gamma=1.5, mask_same_id=True, image_ids=ids(len(v), device), text_ids=ids(len(t), device, 3)),
    ),
    "sigmoid": lambda v, t, device: ("sigmoid_loss", [v, t, *numbers(10, -10, device=device)], {}),
}  # fmt: skip
each_loss = pytest.mark.parametrize("loss", LOSSES)


@pytest.mark.parametrize("loss, dtype", [*itertools.product(LOSSES, (FP32, BF16)), ("harma", FP16)])
def test_several_tiles(loss, dtype, device):
    name, tensors, options = LOSSES[loss](*drawn(N, N, dtype, device), device)
    judge(name, tensors, **options)


@pytest.fixture
def small_tiles(monkeypatch):
    """Most tiles hold but negatives, and the rows of tiles are several groups, the last of them smaller."""
    small = plan.Tiles(BLOCK_M=32, BLOCK_N=64, BLOCK_K=16, PIECES=2, GROUP=3, num_warps=4, num_stages=3)
    for module in (tiled.softmax, tiled.pairwise):
        for each in (module.first_pass, module.second_pass):
            monkeypatch.setitem(each.__globals__, "tiles", lambda *size, large: small)


@pytest.mark.parametrize("loss", ("contrastive", "ids", "harma", "adaptive", "sigmoid"))
def test_many_tiles(loss, device, small_tiles):
    """The last row and column of tiles lack one pair."""
    name, tensors, options = LOSSES[loss](*drawn(127, 127, FP32, device), device)
    judge(name, tensors, **options)


@pytest.mark.parametrize("offset", (31, 33))
def test_a_positive_in_the_corner_of_a_tile(offset, device, small_tiles):
    """The last column of a tile with its first row, or the other way around."""
    image, text = drawn(191, 191, FP32, device)
    judge("one_way_loss", [image[:64], text, *numbers(14, device=device)], offset=offset)


def small_workspace(monkeypatch):
    monkeypatch.setattr(plan, "WORKSPACE", 1)
    monkeypatch.setattr(plan, "BLOCK_ROWS", 64)
    monkeypatch.setattr(plan, "BLOCK_COLUMNS", 40)


@pytest.mark.parametrize("loss", ("harma", "sigmoid", "rect", "one way"))
def test_several_bands_and_blocks(loss, device, monkeypatch):
    """As a batch too large for the workspace is taken; the sums' order is the only difference."""
    small_workspace(monkeypatch)
    name, tensors, options = LOSSES[loss](*drawn(N, N, FP32, device), device)
    judge(name, tensors, **options)


@pytest.mark.parametrize("dtype", (FP32, BF16))
@pytest.mark.parametrize("loss", ("harma", "sigmoid"))
def test_gpus_without_descriptors(loss, dtype, device, monkeypatch):
    for module in (plan, prepare):
        monkeypatch.setattr(module, "capability", lambda device: 80)
    name, tensors, options = LOSSES[loss](*drawn(N, N, dtype, device), device)
    judge(name, tensors, **options)


def flag(image, text, scale, **options):
    """Whether the contrastive loss took the kernels with maxima."""
    args = dict(triplet=False, mask_same=False, margin=0.0, gamma=0.0, weight=0.0, smoothing=0.0, offset=0) | options
    with torch.no_grad():
        return tiled._softmax_fwd(image, text, scale, None, None, *args.values(), True)[5].item()


@pytest.mark.parametrize("loss, bands", [("contrastive", False), ("ids", True), ("harma", False)])
def test_scores_too_far_apart_for_one_constant(loss, bands, device, monkeypatch):
    """A row whose scores all lie far below the batch's largest would add up to nothing."""
    if bands:
        small_workspace(monkeypatch)
    image, text = (t.clone() for t in drawn(N, N, FP32, device))
    image[3], image[4], text[4] = image[3] / 100, 9 * image[4], 9 * image[4]
    name, tensors, options = LOSSES[loss](image, text, device)
    scale = tensors[2].div_(2)
    assert flag(image, text, scale) == 1
    judge(name, tensors, **options)


class Blocks:
    """A kernel, launched with other blocks."""

    def __init__(self, kernel, **blocks):
        self.kernel, self.blocks = kernel, blocks

    def __getitem__(self, grid):
        return lambda *args, **options: self.kernel[grid](*args, **options | self.blocks)


def short_blocks(monkeypatch):
    monkeypatch.setattr(tiled.softmax, "BLOCK", 16)
    monkeypatch.setattr(tiled.softmax, "sums_kernel", Blocks(tiled.softmax.sums_kernel, BLOCK_T=1))
    for module, name in (
        (prepare, "scalars"), (tiled.softmax, "grad_scalars"), (tiled.softmax, "losses"), (tiled.softmax, "scale_grad"),
        (tiled.pairwise, "pairwise"),
    ):  # fmt: skip
        name += "_kernel"
        monkeypatch.setattr(module, name, Blocks(getattr(module, name), BLOCK=8))


@pytest.mark.parametrize("loss", ("contrastive", "sigmoid"))
def test_batches_longer_than_a_block(loss, device, monkeypatch):
    """The kernels over rows take several steps, and the largest is neither in the first block nor in the last step."""
    short_blocks(monkeypatch)
    image, text = (t.clone() for t in drawn(N, N, FP32, device))
    if loss == "contrastive":
        text[101] = image[100] = 9 * image[100]
    name, tensors, options = LOSSES[loss](image, text, device)
    judge(name, tensors, **options)


@pytest.mark.parametrize("loss", ("contrastive", "sigmoid"))
def test_one_side_longer_than_the_other(loss, device):
    """Their largest elements, hence the powers of two in their parts, and their norms differ."""
    image, text = drawn(60, 60, FP32, device)
    for factor in (1 / 9, 9):
        name, tensors, options = LOSSES[loss](factor * image, text / factor, device)
        judge(name, tensors, **options)
        if loss == "contrastive":
            assert [flag(*tensors[:2], scale) for scale in numbers(14, 79, device=device)] == [0, 0]


def test_norms_too_large_for_the_triplets_shared_exponential(device):
    image, text = drawn(N, N, FP32, device)
    judge("adaptive_triplet_loss", [30 * image, 30 * text])
    judge("harma_loss", [30 * image, 30 * text, *numbers(0.1, device=device)])


@pytest.mark.parametrize("norm", (3, 3.7, 5))
def test_the_first_scores_that_are_too_far_apart(norm, device):
    """Where terms of a sum are flushed to zero, but neither all terms nor all sums."""
    image, text = (t.clone() for t in drawn(N, N, FP32, device))
    image[3], image[4], text[4] = image[3] / 100, norm * image[4], norm * image[4]
    with torch.no_grad():
        loss = rsfast.contrastive_loss(image, text, *numbers(14, device=device), impl="fused")
        exact = reference.contrastive_loss(image.double(), text.double(), *numbers(14, device=device))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_usual_batches_take_the_kernels_without_maxima(device):
    image, text = drawn(60, 60, FP32, device, near=0.5)
    assert [flag(image, text, scale) for scale in numbers(1, 14, 50, 79, device=device)] == [0] * 4
    assert flag(image, text, *numbers(14, device=device), triplet=True, margin=0.2, gamma=2.0, weight=0.5) == 0
    eye = torch.eye(20, device=device)  # all negatives far below their positives
    assert [flag(eye, eye, scale) for scale in numbers(100, 170, device=device)] == [0, 0]
    assert flag(30 * image, 30 * text, *numbers(0.01, device=device)) == 0


def test_where_a_sum_counts_as_lost(device):
    """Its 19 terms are 2^-105, or 2^-107, and 20 times 2^-106 is the border; other positives outweigh theirs."""
    text = torch.eye(20, device=device)
    image = text.clone()
    image[3] /= 100
    assert [flag(image, text, scale) for scale in numbers(154.76, 156.15, device=device)] == [0, 1]


@pytest.mark.parametrize("loss", ("contrastive", "sigmoid"))
def test_one_gradient_alone(loss, device):
    name, tensors, options = LOSSES[loss](*drawn(20, 20, FP32, device), device)
    fused = functools.partial(getattr(functional, name), impl="fused", **options)
    _, *expected = gradients(fused, tensors)
    for i, together in enumerate(expected):
        leaves = [t.detach().requires_grad_(i == at) for at, t in enumerate(tensors)]
        (alone,) = torch.autograd.grad(fused(*leaves), leaves[i])
        assert torch.equal(alone, together)


@pytest.mark.parametrize("loss", ("triplet", "adaptive", "sigmoid"))
def test_losses_without_gradients(loss, device):
    """They come from another kernel."""
    for norm in (1, 30):
        image, text = drawn(60, 60, FP32, device)
        name, tensors, options = LOSSES[loss](norm * image, norm * text, device)
        fused = functools.partial(getattr(functional, name), impl="fused", **options)
        plain = fused(*tensors)
        assert plain.item() == pytest.approx(fused(tensors[0].requires_grad_(), *tensors[1:]).item(), rel=1e-6)


def test_the_largest_sums_do_not_overflow(device):
    same = torch.eye(8, device=device)[:1].expand(N, 8)
    for scale in numbers(79, 100, device=device):
        with torch.no_grad():
            loss = rsfast.contrastive_loss(same, same, scale, impl="fused")
        assert loss.item() == pytest.approx(math.log(N), abs=scale.item() * 2.0**-22)


def test_all_of_the_gradient_on_one_side(device):
    """A text nearer to a stranger, which itself is nearer to its partner: only a column's share bounds G."""
    image, text = (torch.eye(6, 8, device=device) for _ in "ab")
    image[0, 0], image[0, 7] = 0.25, 0.97
    text[0, 0], text[0, 5] = 0.87, 0.5
    for pair in ((image, text), (text, image)):
        judge("contrastive_loss", [*pair, *numbers(40, device=device)])


@pytest.mark.parametrize("factor", (-(2.0**-40), 2.0**40))
@pytest.mark.parametrize("loss", ("contrastive", "harma"))
def test_gradients_are_in_proportion_to_what_comes_back(loss, factor, device):
    """Bit for bit where that is a power of two, however far from the range of fp16."""
    name, tensors, options = LOSSES[loss](*drawn(40, 40, FP32, device), device)

    def scaled(factor):
        leaves = [t.requires_grad_() for t in tensors]
        y = stacked(getattr(functional, name)(*leaves, impl="fused", **options))
        return torch.autograd.grad(y, leaves, torch.full_like(y, factor))

    for one, other in zip(scaled(factor), scaled(1.0), strict=True):
        assert torch.equal(one, factor * other)


@pytest.mark.parametrize("scale", (40.0, 72.0))
def test_loss_of_separated_features_is_exact(scale, device):
    exactly_separated(scale, FP32, device)


def test_gradient_of_separated_pairs_is_not_lost_in_16_bits(device):
    """All that is left of it, far below what fp16 and bf16 hold next to 1, is the negatives' share."""
    for dtype in (FP32, FP16, BF16):
        image, text = drawn(N, N, dtype, device, near=1)
        scale = numbers(80, device=device)
        _, gold, *_ = gradients(reference.contrastive_loss, [image.double(), text.double(), scale[0].double()])
        _, ours, *_ = gradients(rsfast.contrastive_loss, [image, text, *scale], impl="fused")
        assert 0 < gold.abs().max() < 1
        error = (ours.double() - gold).norm() / gold.norm()
        assert error < 2 * torch.finfo(dtype).eps if dtype != FP32 else error < 1e-4


def test_small_gradients_next_to_large_ones(device):
    """Two pairs are alike; of all others' gradients fp16 next to 1 would hold a bit or two."""
    image, text = (torch.eye(20, 24, device=device) for _ in "ab")
    image[1], text[1] = image[0], text[0]
    tensors = [image, text, *numbers(16, device=device)]
    _, gold, *_ = gradients(reference.contrastive_loss, [t.double() for t in tensors])
    _, ours, *_ = gradients(functools.partial(rsfast.contrastive_loss, impl="fused"), tensors)
    torch.testing.assert_close(ours[2:].double(), gold[2:], rtol=1e-5, atol=0)


@pytest.fixture
def seen(monkeypatch):
    """Names of the operations inside ours, as they run: outside of an operator, else PyTorch shows none of them."""
    for name, function in (
        ("_softmax_fwd", tiled.softmax.fwd), ("_softmax_bwd", tiled.softmax.bwd), ("_pairwise_fwd", tiled.pairwise.fwd)
    ):  # fmt: skip
        monkeypatch.setattr(tiled, name, function)

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names = []
    with Names():
        yield names


@each_loss
def test_never_waits_for_the_gpu(loss, device, seen):
    name, tensors, options = LOSSES[loss](*drawn(40, 40, BF16, device), device)
    seen.clear()
    gradients(getattr(functional, name), tensors, impl="fused", **options)
    waits = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal")
    found = [name for name in seen if any(wait in name for wait in waits)]
    assert len(seen) > 10 and len(found) == (
        len(tensors) - 2 if device == "cpu" else 0
    )  # numbers on the CPU are checked


@each_loss
def test_a_frozen_side_costs_no_product(loss, device, seen):
    name, (image, text, *rest), options = LOSSES[loss](*drawn(40, 40, BF16, device), device)
    counts = []
    for frozen in ((), (0,), (1,), (0, 1)):
        leaves = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate((image, text, *rest))]
        seen.clear()
        y = stacked(getattr(functional, name)(*leaves, impl="fused", **options)).sum()
        if y.requires_grad:
            y.backward()
        counts.append(sum("mm" in name for name in seen))
    both, text_only, image_only, neither = counts
    assert text_only == image_only == both // 2 > 0 and neither == 0


def test_nothing_of_the_size_of_s_is_kept(device):
    image, text = (t.requires_grad_() for t in drawn(N, N, BF16, device))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        sum(rsfast.harma_loss(image, text, TEMPERATURE.to(device), image_ids=ids(N, device), impl="fused"))
    assert kept and max(kept) <= N * D


def test_products_of_fp32_keep_22_bits(device):
    """Raw TF32 keeps 10, bf16 parts 16."""
    image, text = drawn(N, N, FP32, device)
    for factor in (1e-3, 1.0, 3e3):
        batch = prepare.Batch(factor * image, text / factor, diagonal=True)
        high, low = (batch.a.float()[:, at : at + D] for at in (0, batch.width // 2))
        error = (high.double() + low.double()) / batch.scales[0].double() - (factor * image).double()
        assert error.abs().max() <= 2.0**-22 * (factor * image).abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_loss
def test_graph_capture(loss, device):
    name, tensors, options = LOSSES[loss](*drawn(N, N, BF16, device), device)
    expected = gradients(getattr(functional, name), tensors, impl="fused", **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(getattr(functional, name), tensors, impl="fused", **options)
    graph.replay()
    assert all(torch.equal(one, two) for one, two in zip(captured, expected, strict=True))
