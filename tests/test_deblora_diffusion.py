"""Stable Diffusion's middle block as features, with tiny random models."""

import copy
import inspect
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from rsfast.deblora import StableDiffusionEncoder, extract_features, image_encoder, sample_seed
from rsfast.deblora import stable_diffusion_encoder as make
from rsfast.models import add_lora, lora_layers
from tests.scenes import Scenes, contents

SEEDS = [3, 2**63 - 1, 7]


class Letters:
    """A tokenizer of letters."""

    model_max_length = 6

    def __call__(self, text, *, padding, max_length, truncation, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        ids = [1, *(2 + ord(letter) % 40 for letter in text)][: max_length - 1] + [49]
        return SimpleNamespace(input_ids=torch.tensor([ids + [0] * (max_length - len(ids))]))


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=12, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=6, eos_token_id=49,
    )  # fmt: skip
    text_encoder = CLIPTextModel(text)
    for model in (unet, vae, text_encoder):
        model.double().eval()
    return SimpleNamespace(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=Letters())


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, dtype=torch.double) * 2 - 1


def middle(unet, noisy, prompt):
    """What the whole UNet's middle block gives, by a hook."""
    seen = []
    hook = unet.mid_block.register_forward_hook(lambda module, args, out: seen.append(out))
    unet(noisy, 1, prompt.expand(len(noisy), -1, -1))
    hook.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("latent", ["mean", "sample"])
def test_features_are_the_whole_unets_middle_block(parts, images, latent):
    encoder = make(parts, prompt="from above", ensemble=2, latent=latent, pool="flatten")
    prompt = parts.text_encoder(Letters()("from above", padding="max_length", max_length=6, truncation=True,
                                          return_tensors="pt").input_ids).last_hidden_state  # fmt: skip
    noise = torch.stack([
        torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in SEEDS
    ]).double()  # fmt: skip
    found = parts.vae.encode(images).latent_dist
    latents = found.mean if latent == "mean" else found.mean + found.std * noise[:, 2]
    latents = latents * 0.18215
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    noisy = [scheduler.add_noise(latents, noise[:, i], torch.ones(3, dtype=torch.long)) for i in range(2)]
    wanted = (middle(parts.unet, noisy[0], prompt).float() + middle(parts.unet, noisy[1], prompt).float()) / 2
    assert wanted.shape == (3, 16, 4, 4)
    features = encoder(images, SEEDS)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, wanted.flatten(1))
    pooled = make(parts, prompt="from above", ensemble=2, latent=latent)(images, SEEDS)
    torch.testing.assert_close(pooled, wanted.mean((2, 3)))


@torch.no_grad()
@pytest.mark.parametrize("latent", ["mean", "sample"])
def test_an_image_does_not_see_its_batch(parts, images, latent):
    encoder = make(parts, ensemble=3, latent=latent)
    together = encoder(images, SEEDS)
    alone = torch.cat([encoder(image[None], [seed]) for image, seed in zip(images, SEEDS, strict=True)])
    torch.testing.assert_close(together, alone)
    assert torch.equal(encoder(images, SEEDS), together)
    assert not torch.equal(encoder(images, SEEDS[::-1]), together)
    draws = encoder._draws((4, 8, 8), SEEDS)
    assert torch.equal(draws[1:], encoder._draws((4, 8, 8), SEEDS[1:]))


@torch.no_grad()
def test_without_seeds_all_images_have_the_same_noise(parts, images):
    encoder = make(parts, ensemble=2)
    assert torch.equal(encoder(images), encoder(images, [0, 0, 0]))


@torch.no_grad()
def test_prompt_timestep_and_scheduler_take_part(parts, images):
    before = make(parts)(images, SEEDS)
    assert torch.equal(make(parts, prompt="a remote sensing image")(images, SEEDS), before)
    clean = SimpleNamespace(**vars(parts), scheduler=DDIMScheduler(beta_start=1e-9, beta_end=1e-9))
    for other in (make(parts, prompt=""), make(parts, timestep=500), make(parts, ensemble=1), make(clean)):
        assert not torch.allclose(other(images, SEEDS), before)
    # without noise the seeds decide nothing
    torch.testing.assert_close(make(clean)(images, SEEDS), make(clean)(images, [1, 2, 3]), rtol=1e-3, atol=1e-3)


def test_no_argument_could_carry_a_label():
    allowed = {"self", "images", "seeds", "model", "prompt", "timestep", "ensemble", "latent", "pool", "size", "dtype"}
    allowed |= {"unet", "vae", "prompt_embedding", "scheduler"}
    for function in (make, StableDiffusionEncoder.__init__, StableDiffusionEncoder.forward):
        assert set(inspect.signature(function).parameters) <= allowed


def test_a_list_of_prompts_is_refused(parts):
    with pytest.raises(TypeError, match="prompt must be one text for all images"):
        make(parts, prompt=["a ship", "a plane"])
    with pytest.raises(ValueError, match=r"prompt_embedding must be \(1, tokens, width\), got \(2, 6, 12\)"):
        StableDiffusionEncoder(parts.unet, parts.vae, torch.ones(2, 6, 12), DDPMScheduler())


@pytest.mark.parametrize("message,options", [
    ("timestep must be from 0 to 999", dict(timestep=1000)), ("ensemble must be a positive", dict(ensemble=0)),
    ("latent must be mean or sample", dict(latent="mode")), ("pool must be mean or flatten", dict(pool="max")),
    ("size must be a positive", dict(size=0.5)),
])  # fmt: skip
def test_bad_arguments(parts, message, options):
    with pytest.raises(ValueError, match=message):
        make(parts, **options)


def test_bad_models(parts, images, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="lacks text_encoder, tokenizer"):
        make(SimpleNamespace(unet=parts.unet, vae=parts.vae))
    with pytest.raises(ValueError, match="gives no Stable Diffusion pipeline"):
        make(tmp_path)
    with pytest.raises(ValueError, match="seeds must be one an image, 3, got 2"):
        make(parts)(images, [1, 2])
    other = SimpleNamespace(config={"addition_embed_type": "text_time"})
    with pytest.raises(NotImplementedError, match="not that of Stable Diffusion 1.x: addition_embed_type"):
        StableDiffusionEncoder(other, parts.vae, torch.ones(1, 6, 12), DDPMScheduler())
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"rsfast\[diffusion\]"):
        make(parts)


def test_lora_in_the_attentions_is_trained_and_nothing_else(parts, images):
    parts = copy.deepcopy(parts)
    encoder = make(parts, ensemble=2).float()
    assert not [name for name, _ in encoder.named_modules() if "up_blocks" in name or "decoder" in name]
    before = encoder(images, SEEDS)
    add_lora(encoder, r=2, targets=encoder.lora_targets)
    layers = lora_layers(encoder)
    assert len(layers) == 16 and not any("vae" in path for path in layers)  # 8 in one down block, 8 in the middle
    torch.testing.assert_close(encoder(images, SEEDS), before)
    for layer in layers.values():
        nn.init.normal_(layer.lora_B)
    encoder(images).square().sum().backward()
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(trained) == 32 and all(p.grad.abs().max() > 0 for p in trained.values())
    assert len(lora_layers(parts.unet)) == 16  # it is the pipeline's own


def test_extraction(parts, tmp_path):
    parts = copy.deepcopy(parts)
    encoder = make(parts, ensemble=2, size=16).float()
    same, transform = image_encoder(encoder)
    assert same is encoder
    image = transform(Scenes().load(4))
    assert image.shape == (3, 16, 16) and image.min() >= -1 and image.max() <= 1 and image.min() < -0.5
    extract_features(encoder, Scenes(), tmp_path / "once", batch_size=4)
    store = extract_features(encoder, Scenes(), tmp_path / "ones", batch_size=1)
    names = [f"{i}.png" for i in range(10)]
    with torch.no_grad():
        wanted = encoder(torch.stack([transform(Scenes().load(i)) for i in range(10)]), [sample_seed(n) for n in names])
    torch.testing.assert_close(torch.tensor(np.array(store.features)), wanted)

    class Stops(Scenes):
        def load(self, index):
            if index == 5:
                raise KeyboardInterrupt
            return super().load(index)

    with pytest.raises(KeyboardInterrupt):
        extract_features(encoder, Stops(), tmp_path / "twice", batch_size=4)
    extract_features(encoder, Scenes(), tmp_path / "twice", batch_size=4)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")
    with pytest.raises(ValueError, match="begun with weights"):
        extract_features(make(parts, ensemble=2, size=16, prompt="").float(), Scenes(), tmp_path / "once", batch_size=4)
