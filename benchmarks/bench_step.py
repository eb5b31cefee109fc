"""A whole HarMA training step of an open_clip model: both towers, both losses, backward, AdamW."""

import copy
import functools
import gc
from dataclasses import dataclass

import open_clip
import pytest
import torch

import rsfast
import rsfast.models
from benchmarks.arms import DEVICE, INDUCTOR, TIMED, caption_lengths
from benchmarks.harma import HarmaAdapter
from benchmarks.harma_losses import cleaned
from benchmarks.measure import captured_step, measure_step
from rsfast._dispatch import INTERPRET
from rsfast.testing import assert_within_budget


@dataclass(frozen=True)
class Arm:
    """How a step is computed.

    Args:
        adapters: Ours ("fused"), HarMA's own ("harma", with HarMA's losses) or ours in plain PyTorch ("reference").
        compiled: Model, and HarMA's losses, through torch.compile.
        lengths: Tokens beyond a caption's end take no part in the adapters.
        cut: Texts cut at the longest of the batch, which with ``lengths`` changes no feature.
        graph: The whole step as one CUDA graph.
    """

    adapters: str
    compiled: bool = False
    lengths: bool = False
    cut: bool = False
    graph: bool = False


STEPS = {  # what is least known first
    "rsfast": Arm("fused"),
    "harma": Arm("harma"),
    "rsfast-cut": Arm("fused", lengths=True, cut=True),
    "rsfast-graph": Arm("fused", graph=True),
    "harma-graph": Arm("harma", graph=True),
    "rsfast-cut-graph": Arm("fused", lengths=True, cut=True, graph=True),
    "harma-compiled": Arm("harma", compiled=True),  # which takes a minute
    "rsfast-lengths": Arm("fused", lengths=True),
    "reference": Arm("reference"),
    "rsfast-compiled": Arm("fused", compiled=True),
}
TINY = dict(
    embed_dim=16,
    vision_cfg=dict(layers=2, width=32, head_width=16, patch_size=8, image_size=16),
    text_cfg=dict(layers=2, width=16, heads=2, vocab_size=64, context_length=8),
)
BATCHES = (214, 428) if DEVICE == "cuda" else (4,)


@functools.cache
def _drawn():
    """ViT-B/32 of random weights, a tiny one without a GPU; drawing them takes seconds."""
    torch.manual_seed(0)
    return open_clip.create_model("ViT-B-32") if DEVICE == "cuda" else open_clip.CLIP(**TINY)


def _clip():
    """The same in every call, and what is drawn after it too."""
    model = copy.deepcopy(_drawn())
    torch.manual_seed(1)
    return model


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


def _cut(model, texts):
    """The texts up to the last end-of-text, and the text tower for as many tokens; in place."""
    longest = int(texts.argmax(1).max()) + 1
    model.positional_embedding = torch.nn.Parameter(model.positional_embedding[:longest].detach(), requires_grad=False)
    model.attn_mask, model.context_length = model.attn_mask[:longest, :longest], longest
    return texts[:, :longest].contiguous()


def _features(model, dtype, cut=False):
    with torch.no_grad():
        model = model.to(dtype).eval()
        images, texts = _batch(model, 4)
        image, text, _ = model(images.to(dtype), _cut(model, texts) if cut else texts)
    return image, text


@functools.cache
def _truth(lengths):
    return [_features(_model("reference", lengths), dtype) for dtype in (torch.float64, torch.float32)]


def _step(impl, batch):
    """(a training step, the trained model, what its capture held at most or None)."""
    arm = STEPS[impl]
    model = _model(arm.adapters, arm.lengths).train()
    images, texts = _batch(model, batch)
    texts = _cut(model, texts) if arm.cut else texts
    called, losses = model, rsfast.harma_loss
    if arm.adapters == "harma":  # as it trains: each caption of an image of its own
        losses = functools.partial(cleaned, image_ids=torch.arange(batch, device=DEVICE))
    if arm.compiled:
        torch.compiler.reset()
        called = torch.compile(model, backend=INDUCTOR, dynamic=False)
        losses = torch.compile(losses, backend=INDUCTOR, dynamic=False) if arm.adapters == "harma" else losses
    trained = [p for p in model.parameters() if p.requires_grad]
    options = dict(fused=DEVICE == "cuda", capturable=arm.graph and DEVICE == "cuda")
    optimizer = torch.optim.AdamW(trained, lr=4e-4, betas=(0.9, 0.98), weight_decay=0.04, **options)

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            image, text, scale = called(images, texts)
            contrastive, triplet = losses(image, text, scale)
        (contrastive + triplet).backward()
        optimizer.step()
        optimizer.zero_grad()

    return (*captured_step(step), model) if arm.graph else (step, None, model)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("impl", STEPS)
def bench_step(record, impl, batch):
    arm = STEPS[impl]
    if arm.adapters == "fused" and DEVICE == "cpu" and not INTERPRET:
        pytest.skip("fused kernels need a GPU, or TRITON_INTERPRET=1 to run slowly without one")
    if arm.adapters == "fused" and not TIMED["gated_adapter"].has_kernel():
        pytest.skip("the gated adapter has no kernel yet")
    for name, actual, gold, eager in zip(
        ("image features", "text features"),
        _features(_model(arm.adapters, arm.lengths), torch.float32, arm.cut),
        *_truth(arm.lengths), strict=True,
    ):  # fmt: skip
        assert_within_budget(actual, gold, eager, terms=768, name=f"{impl} {name}")
    gc.collect()
    step, peak, model = _step(impl, batch)
    key = dict(family="step", op="harma_vit_b_32", shape=f"{batch}", dtype="bfloat16", impl=impl) | {"pass": "step"}
    ours = None if impl == "rsfast" or DEVICE != "cuda" else lambda: _step("rsfast", batch)[0]
    record(
        key,
        lambda benchmark, clock: (
            measure_step(benchmark, step, beside=ours, samples=batch) | ({} if peak is None else {"peak_memory": peak})
        ),
        moved=None,
        flops=step_flops(model, batch),
    )


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
