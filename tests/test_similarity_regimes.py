"""The kernels of the in-batch losses where their arithmetic changes: temperature, norm, alignment, tile borders."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.cases import BF16, CASES, FP32
from tests.test_contract import assert_matches_the_oracle

tiled = pytest.importorskip("rsfast.similarity.kernels")
ROWS = {case.name: case for case in CASES}


@pytest.fixture(autouse=True, params=("small", "tiles"))
def _way(request, monkeypatch):
    """Either way through the kernels, whichever a batch of this size would take."""
    small = getattr(tiled, "small", None)
    if request.param == "small" and small is None:
        pytest.skip("no kernel yet")
    if request.param == "tiles" and small is not None:
        monkeypatch.setattr(small, "supports", lambda *size: False)


def drawn(shape, texts, *, aligned=0.0, common=0.0, norm=1.0, scale=14.0, numbers=1):
    """Images and texts whose partners have an inner product of about ``aligned``, and all about ``common``."""

    def inputs(_, dtype, device):
        g = torch.Generator().manual_seed(3)
        image, noise = (torch.randn(n, shape[1], generator=g) for n in (shape[0], texts))
        image[:, 0] += 30 * common  # one direction that all have in common
        noise[:, 0] += 30 * common
        image = F.normalize(image, dim=1)
        partners = image[torch.arange(texts) % len(image)]
        text = F.normalize(aligned * partners + (1 - abs(aligned)) * F.normalize(noise, dim=1), dim=1)
        values = [torch.tensor(x, dtype=torch.promote_types(dtype, FP32)) for x in (scale, -scale / 2)[:numbers]]
        return tuple(x.to(device) for x in ((norm * image).to(dtype), (norm * text).to(dtype), *values))

    return inputs


def judged(name, shape, dtype, device, texts=None, pack=None, products=0.0, **how):
    case = ROWS[name]
    numbers = len(case.names) - 2
    inputs = drawn(shape, texts or shape[0], numbers=numbers, **how)
    case = dataclasses.replace(case, inputs=inputs, pack=pack or case.pack)
    if not case.has_kernel():
        pytest.skip("no kernel yet")
    assert_matches_the_oracle(case, shape, dtype, device, products if dtype == FP32 else 0.0)


SHARP = {
    "soft": dict(scale=0.5),
    "aligned": dict(aligned=0.6, scale=14.0),
    "settled": dict(aligned=0.9, scale=14.0),
    "settled_sharp": dict(aligned=0.9, scale=22.0),
    "sharp": dict(scale=100.0),
    "sharper": dict(scale=150.0),
    "opposed": dict(aligned=-0.9, scale=100.0),
    # the parts of fp32 features lose about a 24th bit of a score, which a temperature this sharp multiplies
    "cone": dict(aligned=0.5, common=0.2, scale=50.0, products=50 * 2.0**-24),
    "long": dict(norm=4.0, aligned=0.5, scale=20.0),
    "longer": dict(norm=30.0, aligned=0.7, scale=14.0),
    "short": dict(norm=0.05, scale=14.0),
}
LOSSES = ("contrastive_loss", "contrastive_loss_ids", "contrastive_loss_smooth", "harma_loss_ids", "sigmoid_loss")


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("how", SHARP)
@pytest.mark.parametrize("name", LOSSES)
def test_temperatures_and_norms(name, how, dtype, device):
    judged(name, (9, 24), dtype, device, **SHARP[how])


@pytest.mark.parametrize("how", ("settled_sharp", "opposed", "long"))
@pytest.mark.parametrize("name", ("contrastive_loss_rect", "one_way_loss", "one_way_sigmoid_loss"))
def test_rectangles(name, how, device):
    judged(name, (6, 24), FP32, device, texts=15, **SHARP[how])


@pytest.mark.parametrize("rows", (2, 63, 129))
@pytest.mark.parametrize("name", ("contrastive_loss_ids", "harma_loss", "sigmoid_loss", "triplet_loss_hardest"))
def test_borders_of_tiles(name, rows, device):
    judged(name, (rows, 8), FP32, device)


@pytest.mark.parametrize("ids", ((4,) * 9, tuple(range(9)), (1, 2, 2, 2, 2, 2, 2, 2, 2), (2**40, 2**40 + 1, 0) * 3))
@pytest.mark.parametrize("name", ("contrastive_loss_ids", "adaptive_triplet_loss_masked"))
def test_ids(name, ids, device):
    case = ROWS[name]

    def pack(tensors):
        args, options = case.pack(tensors)
        return args, options | dict(image_ids=torch.tensor(ids, device=tensors[0].device))

    judged(name, (9, 24), FP32, device, pack=pack)


@pytest.mark.parametrize("margin", (-0.1, 0.0, 0.3, 1.5, 5.0))
@pytest.mark.parametrize("gamma", (0.0, 0.5, 1.0, 3.0))
def test_margins_and_exponents(margin, gamma, device):
    judged(
        "adaptive_triplet_loss", (9, 24), FP32, device, pack=lambda tensors: (tensors, dict(margin=margin, gamma=gamma))
    )
