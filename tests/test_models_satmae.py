"""SatMAE's checkpoints in timm's Vision Transformer."""

import argparse
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from rsfast.deblora import image_encoder
from rsfast.models import load_satmae, satmae

WIDTH, HEADS, PATCH = 32, 4, 4


def checkpoint(*, finetuned=False, side=4, channels=3):
    """Random weights by the names and shapes of MAE's code, with all that is dropped."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return 0.3 * torch.randn(*shape, generator=generator)

    def layer(name, out, into):
        return {f"{name}.weight": random(out, into), f"{name}.bias": random(out)}

    def norm(name):
        return {f"{name}.weight": 1 + random(WIDTH), f"{name}.bias": random(WIDTH)}

    weights = {
        "cls_token": random(1, 1, WIDTH), "pos_embed": random(1, side**2 + 1, WIDTH),
        "patch_embed.proj.weight": random(WIDTH, channels, PATCH, PATCH), "patch_embed.proj.bias": random(WIDTH),
    }  # fmt: skip
    for i in range(2):
        weights |= norm(f"blocks.{i}.norm1") | norm(f"blocks.{i}.norm2")
        weights |= layer(f"blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH) | layer(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        weights |= layer(f"blocks.{i}.mlp.fc1", 2 * WIDTH, WIDTH) | layer(f"blocks.{i}.mlp.fc2", WIDTH, 2 * WIDTH)
    if finetuned:
        return weights | norm("fc_norm") | layer("head", 5, WIDTH)
    decoder = (
        layer("decoder_embed", 8, WIDTH) | layer("decoder_blocks.0.attn.qkv", 24, 8) | layer("decoder_pred", 48, 8)
    )
    return weights | norm("norm") | decoder | {"mask_token": random(1, 1, 8), "decoder_pos_embed": random(1, 17, 8)}


def by_hand(w, images, *, pool):
    """The model written out: MAE's pre-norm ViT with exact GELU and eps 1e-6."""

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def layer(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], PATCH).flatten(2).mT
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(2):
        q, k, v = layer(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        attended = (q @ k.mT / math.sqrt(WIDTH // HEADS)).softmax(-1) @ v
        x = x + layer(f"blocks.{i}.attn.proj", attended.transpose(1, 2).flatten(2))
        hidden = layer(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        x = x + layer(f"blocks.{i}.mlp.fc2", F.gelu(hidden))
    if "fc_norm.weight" in w:
        return norm("fc_norm", x[:, 1:].mean(1))
    return norm("norm", x)[:, 0] if pool == "token" else norm("norm", x)[:, 1:].mean(1)


@pytest.fixture
def save(tmp_path):
    def saved(content):
        torch.save(content, tmp_path / "satmae.pth")
        return tmp_path / "satmae.pth"

    return saved


@torch.no_grad()
@pytest.mark.parametrize("finetuned,pool", [(False, None), (False, "avg"), (True, None)])
def test_computes_what_the_weights_say(save, finetuned, pool):
    weights = checkpoint(finetuned=finetuned)
    path = save({"model": weights, "epoch": 3, "args": argparse.Namespace(lr=0.1, model="mae_vit_large_patch16")})
    model = load_satmae(path, num_heads=HEADS, global_pool=pool)
    encoder, transform = image_encoder(model)
    image = torch.randn(2, 3, 16, 16)
    assert not model.training and all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    torch.testing.assert_close(encoder(image), by_hand(weights, image, pool=pool or "token"))
    assert model(image).shape == (2, WIDTH)


@torch.no_grad()
def test_the_transform_is_satmaes(save):
    from PIL import Image

    _, transform = image_encoder(load_satmae(save(checkpoint()), num_heads=HEADS))
    grey = transform(Image.new("RGB", (60, 50), (255, 255, 255)))
    assert grey.shape == (3, 16, 16)
    wanted = (1 - torch.tensor(satmae.MEAN)) / torch.tensor(satmae.STD)
    torch.testing.assert_close(grey[:, 3, 3], wanted)


@torch.no_grad()
def test_other_image_sizes(save):
    weights = checkpoint()
    same = load_satmae(save(weights), num_heads=HEADS, img_size=16)
    assert torch.equal(same.pos_embed, weights["pos_embed"])
    constant = torch.ones(1, 16, WIDTH) * torch.arange(WIDTH)
    weights["pos_embed"] = torch.cat([weights["pos_embed"][:, :1], constant], 1)
    model = load_satmae(save(weights), num_heads=HEADS, img_size=24)
    assert torch.equal(model.pos_embed[:, :1], weights["pos_embed"][:, :1])
    torch.testing.assert_close(model.pos_embed[:, 1:], constant[:, :1].expand(1, 36, -1))
    assert model(torch.zeros(1, 3, 24, 24)).shape == (1, WIDTH)


def without(name):
    return {k: v for k, v in checkpoint().items() if k != name}


BAD = {
    "it lacks blocks.1.norm2.bias": (lambda: without("blocks.1.norm2.bias"), {}),
    "it has, not expected, gamma, zeta": (lambda: checkpoint() | {"gamma": torch.ones(1), "zeta": torch.ones(1)}, {}),
    "it has of another shape norm.weight": (lambda: checkpoint() | {"norm.weight": torch.ones(3)}, {}),
    "holds no RGB model of SatMAE: it lacks pos_embed": (lambda: without("pos_embed"), {}),
    "multi-spectral": (
        lambda: {**without("patch_embed.proj.weight"), "patch_embed.0.proj.weight": torch.ones(1)}, {},
    ),
    "no model of square RGB images": (lambda: checkpoint(channels=10), {}),
    "must hold weights by name": (lambda: {"model": [1]}, {}),
    "num_heads must be a divisor of the width, 32, got None": (checkpoint, dict(num_heads=None)),
    "num_heads must be a divisor of the width, 32, got 5": (checkpoint, dict(num_heads=5)),
    "img_size must be a multiple of 4": (checkpoint, dict(img_size=18)),
    "global_pool must be token or avg": (checkpoint, dict(global_pool="max")),
    "global_pool must be avg": (lambda: checkpoint(finetuned=True), dict(global_pool="token")),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_files_and_arguments(save, message):
    content, options = BAD[message]
    with pytest.raises(ValueError, match=message):
        load_satmae(save(content()), **{"num_heads": HEADS, **options})


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def test_nothing_in_the_file_is_run(save, tmp_path):
    path = tmp_path / "evil.pth"
    for content in ({"model": checkpoint(), "args": Evil()}, {"model": checkpoint(), "args": pickle.Pickler}):
        torch.save(content, path)
        with pytest.raises(ValueError, match="evil.pth is damaged or not safe to read"):
            load_satmae(path)
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="evil.pth is damaged"):
        load_satmae(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_satmae(tmp_path / "none.pth")
