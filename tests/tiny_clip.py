"""Tiny open_clip models with random weights, and inputs for them."""

import torch
from open_clip.model import CLIP, CustomTextCLIP

CUSTOM = {"qk_norm": True, "scale_attn": True, "scale_fc": True}  # makes open_clip choose its custom blocks
SIZE = {"bottleneck": 32, "num_heads": 4}
END = 49  # end-of-text: the highest id


def tiny_clip(kind=CLIP, *, vision=None, text=None, **options):
    """Three vision blocks and two text blocks; LayerScale in the vision tower shows what is inside ``ls_2``."""
    torch.manual_seed(0)
    vision = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16, "ls_init_value": 0.5} | (
        vision or {}
    )
    text = {"layers": 2, "width": 24, "heads": 2, "vocab_size": 50, "context_length": 7} | (text or {})
    return kind(8, vision, text, **options).eval()


def tiny_custom_text_clip(**options):
    return tiny_clip(CustomTextCLIP, **options)


def inputs(batch=3):
    """Images, and texts of lengths 4, 7, 2 with zeros behind end-of-text."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, 16, 16, generator=generator)
    texts = torch.tensor([[1, 5, 9, END, 0, 0, 0], [1, 2, 3, 4, 5, 6, END], [1, END, 0, 0, 0, 0, 0]])[:batch]
    return images, texts


def stir(model):
    """Give every trainable parameter a value of its own, so that nothing is zero by initialisation."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def features(model, images, texts):
    return model.encode_image(images), model.encode_text(texts)


def snapshot(model):
    """All that adding and removing must not change."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: type(module) for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()},
        {name: sorted(m.__dict__) for name, m in model.named_modules()},
    )


def assert_unchanged(model, before):
    tensors, *rest = snapshot(model)
    assert tensors.keys() == before[0].keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[0][name]), name
    assert tuple(rest) == before[1:]
