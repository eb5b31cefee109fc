"""Torchvision's window attention, which reads the weights of its layers: what only it has."""

import peft
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention

from rsfast.models import add_lora, check_live, patch_peft
from tests.lora_models import build


def test_window_attention_that_nobody_knows_is_refused():
    class Own(ShiftedWindowAttention):
        def forward(self, x):
            return F.linear(x, self.qkv.weight[: x.shape[-1]])

    for attention, reason in (
        (Own(16, [2, 2], [0, 0], 2), "Own reads the weights of its layers and does not call them"),
        (ShiftedWindowAttention(16, [2, 2], [0, 0], 2), "its forward is replaced on the instance"),
    ):
        model = nn.Sequential(attention, nn.Linear(16, 16))
        if type(attention) is ShiftedWindowAttention:
            attention.forward = lambda x: x
        report = add_lora(model, r=2, targets=("q", "out", "1"))
        assert list(report.placed) == ["1"] and report.skipped == {"0.qkv": reason, "0.proj": reason}


def test_window_attention_keeps_its_dropout():
    x = torch.randn(2, 5, 5, 16, generator=torch.Generator().manual_seed(0))
    for options in ({}, {"attention_dropout": 0.5}, {"dropout": 0.5}):
        model = nn.Sequential(ShiftedWindowAttention(16, [3, 3], [1, 1], 2, **options))
        add_lora(model, r=2, targets=("v",))
        assert (model.eval()(x) == model(x)).all()
        same = (model.train()(x) == model.eval()(x)).float().mean()
        assert same == 1.0 if not options else same < 0.1, options


def test_adapters_of_peft_that_it_never_calls_are_reported():
    windows = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv", "mlp.0"]), build("swin_2")[0])
    report = patch_peft(windows)
    assert report.dead == tuple(f"features.{j}.attn.qkv" for j in ("1.0", "1.1", "3.0"))
    assert check_live(windows, build("swin_2")[1]) == list(report.dead)
