"""Stable Diffusion as a backbone: the features of its UNet's middle block."""

import hashlib
import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)  # of v1.x


def sample_seed(name: str) -> int:
    """The seed of a sample's noise, from its name alone.

    So its features depend neither on the batch it is in, nor on its place in the data, nor on where a killed run went
    on, and they are the same again in another split or subset.
    """
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest(), "big") >> 1


class StableDiffusionEncoder(nn.Module):
    """Images to the features of the UNet's middle block at one noise level, averaged over draws of noise.

    The latent of the VAE, ``x_t = sqrt(a_t) x + sqrt(1 - a_t) noise``, the UNet's down and middle blocks; its up blocks
    are not run, and are not part of this module. The parts are those of the pipeline, no copies, so LoRA put into this
    encoder is in the pipeline's UNet; ``lora_targets`` are the names for :func:`rsfast.models.add_lora` that mean all
    projections of the UNet's attentions here, and none of the VAE's.

    Source: debLoRA's feature extraction for Stable Diffusion 1.5 (t = 1, eight draws, 1280 channels of 8 x 8 for images
    of 512 x 512). Differs from upstream on purpose: **the prompt is one fixed text for all images, and there is no
    argument through which a label could reach it.** Upstream puts the name of an image's folder, which is its class,
    into the prompt, for validation images too: such features know the answer, and a probe on them measures nothing.
    Upstream also samples the VAE's latent; here its mean is the default, so that fewer draws decide a feature.

    Args:
        unet, vae: ``diffusers``' ``UNet2DConditionModel`` and ``AutoencoderKL``.
        prompt_embedding: (1, tokens, width), the prompt as the text encoder gives it.
        scheduler: One of ``diffusers``, for its noise levels.
        timestep: t, from 0.
        ensemble: Draws of noise; run one after the other, so memory does not grow with it.
        latent: ``"mean"`` of the VAE's distribution, or ``"sample"`` draws from it once an image, as upstream does.
        pool: ``"mean"`` over places, (B, C), or ``"flatten"``, (B, C * h * w), channel by channel.
        size: Height and width of what :meth:`default_transform` gives.

    Raises:
        ValueError: An argument does not fit.
        NotImplementedError: The UNet wants more than a latent, a time and a prompt, as that of SDXL does.
    """

    takes_seeds = True
    lora_targets = tuple(
        f"{block}.{name}" for block in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")
    )

    def __init__(
        self, unet: nn.Module, vae: nn.Module, prompt_embedding: Tensor, scheduler, *, timestep: int = 1,
        ensemble: int = 8, latent: str = "mean", pool: str = "mean", size: int = 512,
    ):  # fmt: skip
        super().__init__()
        steps = len(scheduler.alphas_cumprod)
        if type(timestep) is not int or not 0 <= timestep < steps:
            raise ValueError(f"timestep must be from 0 to {steps - 1}, got {timestep!r}")
        for name, value in (("ensemble", ensemble), ("size", size)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, value, choices in (("latent", latent, ("mean", "sample")), ("pool", pool, ("mean", "flatten"))):
            if value not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}, got {value!r}")
        if prompt_embedding.ndim != 3 or len(prompt_embedding) != 1:
            raise ValueError(f"prompt_embedding must be (1, tokens, width), got {tuple(prompt_embedding.shape)}")
        _check_plain(unet)
        self.timestep, self.ensemble, self.latent, self.pool, self.size = timestep, ensemble, latent, pool, size
        self.keep = float(scheduler.alphas_cumprod[timestep]) ** 0.5
        self.spread = float(1 - scheduler.alphas_cumprod[timestep]) ** 0.5
        self.scaling = vae.config.scaling_factor
        self.vae_encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.time_proj, self.time_embedding, self.conv_in = unet.time_proj, unet.time_embedding, unet.conv_in
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
        self.register_buffer("prompt_embedding", prompt_embedding.detach().clone())

    def extra_repr(self) -> str:
        names = ("timestep", "ensemble", "latent", "pool", "keep", "scaling")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def default_transform(self):
        """The whole image, squashed to ``size`` squared by bilinear resampling, from -1 to 1."""
        from torchvision import transforms

        half = [0.5, 0.5, 0.5]
        return transforms.Compose(
            [transforms.Resize([self.size] * 2), transforms.ToTensor(), transforms.Normalize(half, half)]
        )

    def forward(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Features of images (B, 3, H, W) from -1 to 1.

        Args:
            images: 512 x 512 is what v1.x was trained on.
            seeds: Of each image's noise, see :func:`sample_seed`. None gives every image the same noise: for training,
                where nothing but the images may be at hand.

        Returns:
            (B, C) or (B, C * h * w), in fp32. C is 1280 in v1.x. The draws do not depend on the batch or the device:
            they are made on the CPU, in fp32, for each image by itself.
        """
        seeds = [0] * len(images) if seeds is None else list(seeds)
        if len(seeds) != len(images):
            raise ValueError(f"seeds must be one an image, {len(images)}, got {len(seeds)}")
        weight = self.conv_in.weight
        images = images.to(weight.device, weight.dtype)
        moments = self.vae_encoder(images)
        mean, log_variance = (moments if self.quant_conv is None else self.quant_conv(moments)).chunk(2, 1)
        draws = self._draws(mean.shape[1:], seeds).to(mean.device, mean.dtype)
        if self.latent == "sample":
            mean = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * draws[:, -1]
        latent = mean * self.scaling
        total = 0
        for number in range(self.ensemble):
            total = total + self._middle(self.keep * latent + self.spread * draws[:, number]).float()
        features = total / self.ensemble
        return features.mean((2, 3)) if self.pool == "mean" else features.flatten(1)

    def _draws(self, shape, seeds: Sequence[int]) -> Tensor:
        """(B, ensemble + 1, C, h, w): the noise of every draw, and last that of the latent."""
        generators = (torch.Generator().manual_seed(seed) for seed in seeds)
        return torch.stack([torch.randn(self.ensemble + 1, *shape, generator=g) for g in generators])

    def _middle(self, noisy: Tensor) -> Tensor:
        times = torch.full((len(noisy),), self.timestep, device=noisy.device)
        embedded = self.time_embedding(self.time_proj(times).to(noisy.dtype))
        prompt = self.prompt_embedding.to(noisy.dtype).expand(len(noisy), -1, -1)
        hidden = self.conv_in(noisy)
        for block in (*self.down_blocks, self.mid_block):
            attends = getattr(block, "has_cross_attention", False)
            hidden = block(hidden, embedded, encoder_hidden_states=prompt) if attends else block(hidden, embedded)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # down blocks give what they skip, too
        return hidden


def stable_diffusion_encoder(
    model: str | os.PathLike | object,
    *,
    prompt: str = "a remote sensing image",
    timestep: int = 1,
    ensemble: int = 8,
    latent: str = "mean",
    pool: str = "mean",
    size: int = 512,
    dtype: torch.dtype | None = None,
) -> StableDiffusionEncoder:
    """A :class:`StableDiffusionEncoder` from a pipeline of ``diffusers``; needs the extra ``diffusion``.

    Args:
        model: Folder or name of a Stable Diffusion 1.x pipeline, or anything with ``unet``, ``vae``, ``text_encoder``
            and ``tokenizer``. With ``scheduler`` too, its noise levels are used, else those of v1.x.
        prompt: The one text for all images. Encoded once, here; text encoder and tokenizer are not kept. It must not
            say what is in them: see :class:`StableDiffusionEncoder`.
        timestep, ensemble, latent, pool, size: As in :class:`StableDiffusionEncoder`.
        dtype: Of the weights where ``model`` is a folder or a name; default: as they were stored.

    Raises:
        ValueError: An argument does not fit, the extra is missing, or no pipeline can be made of ``model``.

    Example::

        encoder = stable_diffusion_encoder("folder/of/stable-diffusion-v1-5").cuda()
        add_lora(encoder, targets=encoder.lora_targets)
        store = extract_features(encoder, data, "features")
    """
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("Stable Diffusion needs diffusers; pip install 'rsfast[diffusion]'") from error
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text for all images, got {type(prompt).__name__}")
    if isinstance(model, str | os.PathLike):
        options = {} if dtype is None else {"torch_dtype": dtype}
        try:
            model = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None, **options)
        except Exception as error:  # whatever a damaged or foreign folder makes it stumble over
            raise ValueError(f"model: {model} gives no Stable Diffusion pipeline: {error}") from error
    missing = [name for name in ("unet", "vae", "text_encoder", "tokenizer") if getattr(model, name, None) is None]
    if missing:
        raise ValueError(f"model must have unet, vae, text_encoder and tokenizer, lacks {', '.join(missing)}")
    length = model.tokenizer.model_max_length
    tokens = model.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        where = next(model.text_encoder.parameters()).device
        embedding = model.text_encoder(tokens.input_ids.to(where))[0]
    scheduler = getattr(model, "scheduler", None) or diffusers.DDPMScheduler(**BETAS)
    return StableDiffusionEncoder(
        model.unet, model.vae, embedding, scheduler, timestep=timestep, ensemble=ensemble, latent=latent, pool=pool,
        size=size,
    )  # fmt: skip


def _check_plain(unet: nn.Module) -> None:
    config = unet.config
    more = [name for name in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type") if config.get(name)]
    more += [name for name in ("center_input_sample", "num_class_embeds", "time_cond_proj_dim") if config.get(name)]
    if more or getattr(unet, "time_embed_act", None) is not None:
        raise NotImplementedError(
            f"the UNet is not that of Stable Diffusion 1.x: {', '.join(more) or 'time_embed_act'}"
        )
