"""A whole HarMA training step of an open_clip model: both towers, both losses, backward, AdamW."""

import functools

import open_clip
import pytest
import torch

import rsfast
import rsfast.models
from benchmarks.arms import DEVICE, INDUCTOR, TIMED, caption_lengths
from benchmarks.harma import HarmaAdapter
from benchmarks.measure import measure_step
from rsfast._dispatch import INTERPRET
from rsfast.testing import assert_within_budget

# name: how the adapters are computed, whether the model is compiled, whether padding is skipped
STEPS = {
    "rsfast": ("fused", False, False),
    "harma": ("harma", False, False),
    "rsfast-lengths": ("fused", False, True),
    "reference": ("reference", False, False),
    "rsfast-compiled": ("fused", True, False),
    "harma-compiled": ("harma", True, False),
}
TINY = dict(
    embed_dim=16,
    vision_cfg=dict(layers=2, width=32, head_width=16, patch_size=8, image_size=16),
    text_cfg=dict(layers=2, width=16, heads=2, vocab_size=64, context_length=8),
)
BATCHES = (214, 428) if DEVICE == "cuda" else (4,)


def _clip():
    """ViT-B/32 of random weights, a tiny one without a GPU; the same in every call."""
    torch.manual_seed(0)
    return open_clip.create_model("ViT-B-32") if DEVICE == "cuda" else open_clip.CLIP(**TINY)


def _model(adapters: str, skip_padding=False):
    """As the released code shares: a sub-adapter in each text block; up-projections drawn, for zeros hide mistakes."""
    model = _clip()
    impl = "fused" if adapters == "fused" else "reference"
    rsfast.models.add_adapters(model, share="text", skip_padding=skip_padding, impl=impl)
    for name, p in model.named_parameters():
        if ".adapter." in name and "up." in name:
            torch.nn.init.normal_(p, std=0.02)
    if adapters == "harma":
        for block in [m for m in model.modules() if isinstance(getattr(m, "adapter", None), rsfast.GatedAdapter)]:
            block.adapter = _WithoutLengths(HarmaAdapter.like(block.adapter, batch_first=True))
    return model.to(DEVICE)


class _WithoutLengths(torch.nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, x, lengths):
        return self.adapter(x)


def _batch(model, size):
    """Random images, and texts whose lengths are spread as real captions', padded with zeros."""
    g = torch.Generator().manual_seed(2)
    side, tokens, words = model.visual.image_size[0], model.context_length, model.vocab_size
    images = torch.randn(size, 3, side, side, generator=g)
    texts = torch.randint(1, words - 2, (size, tokens), generator=g)
    lengths = caption_lengths(size).clamp(max=tokens)[:, None]
    position = torch.arange(tokens)
    texts[(position == lengths - 1).expand(size, -1)] = words - 1  # end-of-text is the highest id
    return images.to(DEVICE), texts.masked_fill(position >= lengths, 0).to(DEVICE)


def _features(model, dtype):
    with torch.no_grad():
        model = model.to(dtype).eval()
        images, texts = _batch(model, 4)
        image, text, _ = model(images.to(dtype), texts)
    return image, text


@functools.cache
def _truth(skip_padding):
    return [_features(_model("reference", skip_padding), dtype) for dtype in (torch.float64, torch.float32)]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("impl", STEPS)
def bench_step(record, impl, batch):
    adapters, compiled, skip_padding = STEPS[impl]
    if adapters == "fused" and DEVICE == "cpu" and not INTERPRET:
        pytest.skip("fused kernels need a GPU, or TRITON_INTERPRET=1 to run slowly without one")
    if adapters == "fused" and not TIMED["gated_adapter"].has_kernel():
        pytest.skip("the gated adapter has no kernel yet")
    for name, actual, gold, eager in zip(
        ("image features", "text features"), _features(_model(adapters, skip_padding), torch.float32),
        *_truth(skip_padding), strict=True,
    ):  # fmt: skip
        assert_within_budget(actual, gold, eager, terms=768, name=f"{impl} {name}")

    model = _model(adapters, skip_padding).train()
    images, texts = _batch(model, batch)
    called = model
    if compiled:
        torch.compiler.reset()
        called = torch.compile(model, backend=INDUCTOR, dynamic=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=4e-4, betas=(0.9, 0.98), weight_decay=0.04, fused=DEVICE == "cuda")

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            image, text, scale = called(images, texts)
            contrastive, triplet = rsfast.harma_loss(image, text, scale)
        (contrastive + triplet).backward()
        optimizer.step()
        optimizer.zero_grad()

    key = dict(family="step", op="harma_vit_b_32", shape=f"{batch}", dtype="bfloat16", impl=impl) | {"pass": "step"}
    record(key, lambda benchmark, clock: measure_step(benchmark, step), moved=None, flops=step_flops(model, batch))


def step_flops(model, batch: int) -> int:
    """Operations of the blocks: frozen ones forward and once more for the gradient of x; adapters three times."""
    total = 0
    for tower, tokens, case in (
        (model.visual.transformer, model.visual.positional_embedding.shape[0], "gated_adapter"),
        (model.transformer, model.context_length, "gated_adapter_shared"),
    ):
        shape = (batch, tokens, tower.width)
        block = batch * tokens * (24 * tower.width**2 + 4 * tokens * tower.width)  # 12 D^2 weights; two products
        adapter = TIMED[case].flops(shape) + TIMED[case].flops(shape, backward=True)
        total += len(tower.resblocks) * (2 * block + adapter)
    return total
