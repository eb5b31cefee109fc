"""check_live names the LoRA that no output depends on, and leaves no trace."""

import contextlib
import copy

import open_clip
import peft
import pytest
import torch
from torch import nn

from rsfast import LoRALinear
from rsfast.models import add_lora, check_live, lora_layers, merge_lora, set_adapter_ids
from tests.lora_models import build, stir_lora
from tests.tiny_clip import CUSTOM, inputs, snapshot, tiny_clip, tiny_custom_text_clip

OUT = {f"base_model.model.visual.transformer.resblocks.{j}.attn.out_proj" for j in range(3)} | {
    f"base_model.model.transformer.resblocks.{j}.attn.out_proj" for j in range(2)
}


def peft_model(model, targets, **options):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))


def test_dead_ones_of_peft_on_open_clip():
    assert set(check_live(peft_model(tiny_clip(), ["out_proj"]), inputs())) == OUT
    assert set(check_live(peft_model(tiny_clip(), ["out_proj", "c_fc"]), inputs())) == OUT
    assert set(check_live(peft_model(tiny_clip(), "all-linear"), inputs())) == OUT
    assert check_live(peft_model(tiny_clip(), ["attn", "c_proj"]), inputs()) == []
    assert check_live(peft_model(tiny_clip(vision=CUSTOM, text=CUSTOM), ["out_proj"]), inputs()) == []
    assert check_live(peft_model(tiny_clip(), ["out_proj"], init_lora_weights=False), inputs()) == sorted(
        OUT, key=lambda path: (".visual." not in path, path)
    )


def test_all_24_of_vit_b_32():
    """Its depth, a narrower width."""
    shape = {"layers": 12, "width": 64, "heads": 2}
    vision = {"layers": 12, "width": 64, "head_width": 32, "patch_size": 32, "image_size": 64}
    model = open_clip.model.CLIP(32, vision, shape | {"vocab_size": 50, "context_length": 7})
    dead = check_live(peft_model(model, ["out_proj"]), (torch.randn(1, 3, 64, 64), inputs()[1][:1]))
    assert len(dead) == 24 and sum(".visual." in name for name in dead) == 12


def test_what_the_batch_does_not_reach_is_dead():
    model = tiny_custom_text_clip()
    add_lora(model, r=2)
    assert check_live(model, inputs()) == check_live(model, dict(zip(("image", "text"), inputs(), strict=True))) == []
    assert set(check_live(model, {"image": inputs()[0]})) == {path for path in lora_layers(model) if "text" in path}
    add = tiny_clip()
    add_lora(add, r=2, num_adapters=3, targets=("out", "fc"))
    set_adapter_ids(add, torch.tensor([2, -1, 2]))
    assert set(check_live(add, inputs())) == {f"{path}[{g}]" for path in lora_layers(add) for g in (0, 1)}
    set_adapter_ids(add, torch.tensor([1, 0, 2]))
    assert check_live(add, inputs()) == []
    one_token = nn.MultiheadAttention(8, 2, batch_first=True)
    add_lora(one_token, r=2)
    attend = Calls(one_token, lambda model, x: model(x, x, x)[0])
    assert check_live(attend, (torch.randn(2, 1, 8),)) == []  # one pair for q, k and v, and v is alive
    assert check_live(attend, (torch.zeros(2, 3, 8),)) == ["model.out_proj", "model.in_proj"]


class Calls(nn.Module):
    """A model made of layers and a function."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args, **options):
        return self.function(self.model, *args, **options)


def chain(function, width=8):
    torch.manual_seed(0)
    model = nn.ModuleList([LoRALinear(nn.Linear(width, width), r=2) for _ in range(4)])
    return Calls(model, function)


def test_live_ones_that_gradients_miss():
    x = (torch.randn(3, 8),)

    def no_grad(model, x):
        with torch.no_grad():
            x = model[0](x)
        return model[2](x), model[3].weight  # 1 and 3 take no part

    def tiny(model, x):
        return model[3](model[2](model[1](model[0](x) * 1e-30) * 1e-30)).half()

    def everything(model, x):
        with torch.inference_mode():
            return {"y": [model[2](model[0](x)).relu()], "n": 3}

    assert check_live(chain(no_grad), x) == ["model.1", "model.3"]
    assert check_live(chain(everything), x) == ["model.1", "model.3"]
    assert check_live(chain(tiny), x) == ["model.0", "model.1"]  # under half's smallest number they change nothing
    assert check_live(chain(lambda model, x: model[0](x).argmax(-1)), x) == ["model.1", "model.2", "model.3"]
    random = torch.get_rng_state()
    small = chain(lambda model, x: 1e-6 * model[0](x).detach() + torch.rand(3, 8))  # the same draws in every run
    assert check_live(small, x) == ["model.1", "model.2", "model.3"]
    torch.set_rng_state(random)
    expected = torch.rand(3)
    torch.set_rng_state(random)
    check_live(small, x)
    assert torch.equal(torch.rand(3), expected)
    through = chain(lambda model, x: model[1](model[0](x)))
    nn.init.zeros_(through.model[1].weight)  # nothing gets through but by the next one's B, which is zero too
    assert check_live(through, x) == ["model.2", "model.3"]
    assert check_live(chain(lambda model, x: model[1](x) + 0 * model[2](x)), x) == ["model.0", "model.2", "model.3"]


def test_low_precision_and_merged():
    model = tiny_clip()
    add_lora(model, r=2)
    images, texts = inputs()
    assert check_live(copy.deepcopy(model).bfloat16(), (images.bfloat16(), texts)) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert check_live(model, (images, texts)) == []
    merge_lora(stir_lora(model))
    assert check_live(model, (images, texts)) == []  # what it would be once it is taken out of the weights


@pytest.mark.parametrize("kind", ["ours", "peft", "peft_attention"])
def test_nothing_is_left_changed(kind):
    model, batch = build("clip")
    if kind == "ours":
        add_lora(model, r=2, dropout=0.5)
    else:
        model = peft_model(model, ["out_proj"] if kind == "peft" else ["attn"], lora_dropout=0.5)
    model.train()
    model.visual.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, random = snapshot(model), torch.get_rng_state()
    modes = {name: module.training for name, module in model.named_modules()}

    class Fails(Exception):
        pass

    def fail(module, args, output):
        fail.left -= 1
        if not fail.left:
            raise Fails

    for left in (0, 1, 2, 4) if kind == "peft" else (0, 1):  # which of its forwards fails; 0: none
        fail.left = left
        hook = model.ln_final.register_forward_hook(fail)
        with pytest.raises(Fails) if left else contextlib.nullcontext():
            check_live(model, batch)
        hook.remove()
        after = snapshot(model)
        for name, tensor in before[0].items():
            assert torch.equal(tensor, after[0][name]), name
        assert after[1:3] == before[1:3] and torch.equal(torch.get_rng_state(), random)
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert all(p.grad is None or p.grad.eq(1).all() for p in model.parameters())


def test_bad_input_is_named():
    model = tiny_clip()
    with pytest.raises(ValueError, match="model has no LoRA"):
        check_live(model, inputs())
    add_lora(model, r=2)
    with pytest.raises(TypeError, match=r"batch must be a tuple or list .* got Tensor"):
        check_live(model, inputs()[0])
    with pytest.raises(TypeError, match="model must be an nn.Module, got function"):
        check_live(lambda x: x, inputs())
    with pytest.raises(ValueError, match="holds no tensor"):
        check_live(chain(lambda model, x: None), (torch.ones(1, 8),))
    with pytest.raises(ValueError, match="is not finite"):
        check_live(chain(lambda model, x: model[0](x) / 0), (torch.ones(1, 8),))
    broken = tiny_clip()
    add_lora(broken, r=2)
    broken.cached = next(broken.parameters()).requires_grad_() * 2
    with pytest.raises(TypeError, match="copy.deepcopy can copy"):
        check_live(broken, inputs())
