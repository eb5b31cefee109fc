"""Tiny models of every kind that takes LoRA, batches for them, and an oracle that merges weights by hand."""

import math

import torch
import torch.nn.functional as F
from open_clip.coca_model import CoCa
from open_clip.model import CustomTextCLIP
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models import SwinTransformer
from torchvision.models import VisionTransformer as TorchvisionViT
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2
from transformers import CLIPConfig, CLIPModel, SiglipVisionConfig, SiglipVisionModel

from rsfast import BatchedLoRALinear
from rsfast.models import lora_layers
from rsfast.models.lora_attention import Projection
from tests.tiny_clip import CUSTOM, inputs, tiny_clip, tiny_custom_text_clip


class MainAttention(nn.Module):
    """Built as the attention of open_clip's main branch: one weight or three, q and k normalised, bool True keeps."""

    def __init__(self, dim, num_heads, kdim=None, qk_norm=False, scaled_cosine=False, scale_heads=False, bias=True):
        super().__init__()
        self.num_heads, self.logit_scale_max = num_heads, math.log(0.9)
        self.in_proj_weight = self.q_proj_weight = self.k_proj_weight = self.v_proj_weight = None
        if kdim is None:
            self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * dim**-0.5)
        else:
            self.q_proj_weight = nn.Parameter(torch.randn(dim, dim) * dim**-0.5)
            self.k_proj_weight, self.v_proj_weight = (nn.Parameter(torch.randn(dim, kdim) * kdim**-0.5) for _ in "kv")
        self.in_proj_bias = nn.Parameter(torch.randn(3 * dim)) if bias else None
        self.ln_q, self.ln_k = (nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity() for _ in "qk")
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), 2.0)) if scaled_cosine else None
        self.head_scale = nn.Parameter(torch.rand(num_heads, 1, 1) + 0.5) if scale_heads else None
        self.attn_drop, self.ln_inner = nn.Dropout(0.0), nn.LayerNorm(dim)
        self.out_proj, self.out_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x, k_x=None, v_x=None, attn_mask=None):
        k_x, v_x = x if k_x is None else k_x, x if v_x is None else v_x
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, W, b) for t, W, b in zip((x, k_x, v_x), weights, biases, strict=True))
        q, k, v = (t.view(*t.shape[:2], self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        if self.logit_scale is None:
            scores = self.ln_q(q) @ self.ln_k(k).transpose(2, 3) / math.sqrt(q.shape[-1])
        else:
            scores = torch.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
            scores = scores * self.logit_scale.clamp(max=self.logit_scale_max).exp()
        if attn_mask is not None:
            mask = attn_mask if attn_mask.ndim == 2 else attn_mask.view(len(x), self.num_heads, *attn_mask.shape[1:])
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        y = scores.softmax(-1) @ v
        y = y if self.head_scale is None else y * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(y.transpose(1, 2).flatten(2))))


class MainModel(nn.Module):
    """A block as open_clip's main branch has them, a block that attends to something else, and a pooler."""

    def __init__(self, **options):
        super().__init__()
        self.attn, self.cross = MainAttention(16, 2, **options), MainAttention(16, 2)
        self.pool = MainAttention(16, 4, kdim=24)
        self.mlp = nn.Sequential()
        for name, layer in (("c_fc", nn.Linear(16, 24)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(24, 16))):
            self.mlp.add_module(name, layer)

    def forward(self, x, other, context, mask):
        x = x + self.attn(x, k_x=x, v_x=x, attn_mask=mask)
        x = F.layer_norm(x + self.cross(x, k_x=other, v_x=other.clone()), (16,))
        x = F.layer_norm(x + self.mlp(x), (16,))
        return self.pool(x, k_x=context, v_x=context)


def lnd_clip():
    """A model whose blocks run (tokens, samples, width), as open_clip 2.x did."""
    model = tiny_clip()
    for transformer in (model.visual.transformer, model.transformer):
        transformer.batch_first = False
        for block in transformer.resblocks:
            block.attn.batch_first = False
    return model


def coca():
    """A pooler whose keys have another width than its queries, texts with a class token, a decoder that crosses."""
    text = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 50, "context_length": 6, "embed_cls": True}
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, "output_tokens": True}
    vision |= {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}
    decoder = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 50, "context_length": 6}
    return CoCa(16, decoder, text | {"output_tokens": True}, vision)


def timm_clip():
    """A timm tower inside open_clip, which pools by attention to a latent query."""
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    text = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 50, "context_length": 7}
    model = CustomTextCLIP(8, vision, text)
    trunk = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    model.visual.trunk = VisionTransformer(**trunk, global_pool="map", class_token=False)
    model.visual.head = nn.Linear(16, 8)
    return model


def eva(**options):
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
    return Eva(**size, **options)


def swin(**options):
    """8 x 8 tokens in windows of 3 x 2, shifted and padded, then 4 x 4 tokens."""
    size = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": [3, 2]}
    return SwinTransformer(**size, num_classes=5, **options)


def torchvision_vit():
    return TorchvisionViT(16, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5)


def hf_clip():
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {"vocab_size": 50, "max_position_embeddings": 7, "eos_token_id": 49}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=size | {"image_size": 16, "patch_size": 8}, projection_dim=8)
    )


def hf_siglip():
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(**size, image_size=16, patch_size=8))


def images():
    return (inputs()[0].double(),)


def both():
    pictures, texts = inputs()
    return pictures.double(), texts


def by_name():
    pictures, texts = inputs()
    return {"input_ids": texts, "pixel_values": pictures.double()}


def main_inputs():
    x, other, context = (torch.randn(3, L, D, dtype=torch.double) for L, D in ((4, 16), (5, 16), (2, 24)))
    return x, other, context, torch.ones(4, 4).tril().bool()


# by name: how to make it, and a batch
MODELS = {
    "clip": (tiny_clip, both),
    "custom_text": (tiny_custom_text_clip, both),
    "custom_blocks": (lambda: tiny_clip(vision=CUSTOM | {"scale_heads": True}, text=CUSTOM), both),
    "lnd": (lnd_clip, both),
    "quick_gelu": (lambda: tiny_clip(quick_gelu=True), both),
    "coca": (coca, lambda: {"image": both()[0], "text": both()[1][:, :6]}),
    "main": (lambda: MainModel(qk_norm=True, scale_heads=True), main_inputs),
    "main_cosine": (lambda: MainModel(scaled_cosine=True, bias=False), main_inputs),
    "timm": (
        lambda: VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5),
        images,
    ),
    "timm_in_open_clip": (timm_clip, both),
    "eva": (lambda: eva(qkv_fused=True), images),
    "eva_separate": (lambda: eva(qkv_fused=False, swiglu_mlp=True, use_rot_pos_emb=True, scale_mlp=True), images),
    "beit": (
        lambda: Beit(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, num_classes=5, init_values=0.5),
        images,
    ),
    "swin": (swin, images),
    "swin_2": (lambda: swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), images),
    "torchvision_vit": (torchvision_vit, images),
    "hf_clip": (hf_clip, by_name),
    "hf_siglip": (hf_siglip, images),
}


def build(name):
    """The model in float64 and evaluation mode, every parameter of it random, and a batch."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
            elif parameter.ndim:  # biases, scales; many start at zero or one
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model, batch()


def run(model, batch):
    """All outputs in one vector."""
    output = model(**batch) if isinstance(batch, dict) else model(*batch)
    return torch.cat([x.flatten() for x in tensors(output) if x.is_floating_point()])


def tensors(output):
    """All tensors in an output but the similarities between samples."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = [value for key, value in output.items() if not key.startswith("logits_per_")]
    values = output if isinstance(output, tuple | list) else ()
    return [x for value in values for x in tensors(value)]


def stir_lora(model):
    """Factors of a size at which LoRA matters; rows of a bank beyond an adapter's rank stay zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.copy_(0.3 * torch.randn(factor.shape, generator=generator))
    return model


def merged_weights(model, adapter=None):
    """The weights with LoRA by their names in the model without it: W + scaling B A, written out for each slice."""
    weights = {}
    for path, layer in lora_layers(model).items():
        A, B, scaling = layer.lora_A, layer.lora_B, layer.scaling
        if isinstance(layer, BatchedLoRALinear):
            A, B, scaling = A[adapter], B[adapter], scaling[adapter]
        weight, row = layer.weight.clone(), 0
        for number, (start, end) in enumerate(layer.slices or ((0, layer.out_features),)):
            part = B[row : row + end - start] @ A[number * layer.r : (number + 1) * layer.r]
            weight[start:end] += scaling * part
            row += end - start
        parent, _, _ = path.rpartition(".")
        held = isinstance(layer, Projection) or hasattr(layer, "columns")
        weights[f"{parent}.{layer._name}" if held else f"{path}.weight"] = weight
    return weights


def by_hand(plain, batch, weights):
    """Outputs of the model without LoRA under weights that have it."""

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = plain

        def forward(self):
            return run(self.plain, batch)

    named = {f"plain.{name}": weight for name, weight in weights.items()}
    return torch.func.functional_call(Call(), named, ())
