"""HarMA's adapters and checkpoints, against its golden vectors and a re-statement of its block."""

import pathlib
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rsfast
from rsfast.models import add_adapters, convert_harma_adapter, load_harma_checkpoint, remove_adapters
from tests.tiny_clip import SIZE, assert_unchanged, features, inputs, snapshot, stir, tiny_clip, tiny_custom_text_clip

DATA = pathlib.Path(__file__).parent / "data"
R = 32  # bottleneck of the checkpoints here; HarMA's own is 128
EPS = torch.finfo(torch.float32).eps


def assert_golden(actual, stored):
    """Inputs, parameters and outputs were rounded to fp32 when they were stored."""
    torch.testing.assert_close(actual, stored, rtol=EPS, atol=EPS * stored.abs().max().item())


def golden(name):
    return {key: torch.from_numpy(value).double() for key, value in np.load(DATA / f"harma_adapter_{name}.npz").items()}


def under(prefix, tensors):
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


@pytest.mark.parametrize("name", ["image", "text_shared"])
@pytest.mark.parametrize("form", ["adapter", "block"])
def test_converted_adapter_gives_harmas_numbers(name, form):
    vectors = golden(name)
    own, gate = under("param.", vectors), vectors["block_gate"]
    if form == "adapter":
        converted = convert_harma_adapter({**own, "block_gate": gate})
    else:
        converted = convert_harma_adapter({**{f"mmadapter.{key}": t for key, t in own.items()}, "gate1": gate})
    shared = rsfast.SharedAdapter(128) if name == "text_shared" else None
    adapter = rsfast.GatedAdapter(vectors["x"].shape[2], shared=shared).double()
    adapter.load_state_dict(converted, strict=True)
    out = adapter(vectors["x"].transpose(0, 1)).transpose(0, 1)
    assert_golden(out, vectors["block_out"])

    without = rsfast.GatedAdapter(vectors["x"].shape[2], shared=shared, residual_gate=False).double()
    without.load_state_dict(convert_harma_adapter(own), strict=True)
    out = without(vectors["x"].transpose(0, 1)).transpose(0, 1)
    assert_golden(out, vectors["adapter_out"])


def test_converting_names_what_does_not_belong():
    own = under("param.", golden("text_shared"))
    with pytest.raises(ValueError, match="ln_1.weight is unknown"):
        convert_harma_adapter({**own, "ln_1.weight": torch.ones(1)})
    for missing in ("img_proj_up.bias", "gate1", "BiShareAdapterxx.l2.weight"):
        with pytest.raises(ValueError, match=f"{missing} is missing"):
            convert_harma_adapter({key: t for key, t in own.items() if key != missing})


class Share(nn.Module):
    """HarMA's sub-adapter in our words; parameters by its names, tokens on axis 0."""

    def __init__(self):
        super().__init__()
        self.l1, self.l2 = nn.Linear(R, R // 2), nn.Linear(R // 2, R)
        self.multihead_attention1 = nn.MultiheadAttention(R // 2, 8)
        self.gate1 = nn.Parameter(torch.tensor(0.6))

    def forward(self, x):
        p = self.l1(x)
        a = torch.sigmoid(self.gate1)
        return x + self.l2(a * self.multihead_attention1(p, p, p)[0] + (1 - a) * p)


class Adapter(nn.Module):
    """HarMA's adapter, likewise."""

    def __init__(self, width, share):
        super().__init__()
        self.img_proj_down, self.img_proj_up = nn.Linear(width, R), nn.Linear(R, width)
        self.BiShareAdapterxx = share
        self.multihead_attention = nn.MultiheadAttention(R, 8)
        self.gate1 = nn.Parameter(torch.tensor(0.6))

    def forward(self, x):
        h = F.gelu(self.img_proj_down(x))
        z = self.multihead_attention(h, h, h)[0]
        z = z if self.BiShareAdapterxx is None else self.BiShareAdapterxx(z)
        z = self.multihead_attention(z, z, z)[0]
        a = torch.sigmoid(self.gate1)
        return x + self.img_proj_up(a * h + (1 - a) * z)


class Harma(nn.Module):
    """HarMA around a tiny model: its state_dict has the very names of HarMA's checkpoints."""

    def __init__(self, share="text"):
        super().__init__()
        self.temp = nn.Parameter(torch.tensor(0.05))
        self.model = tiny_clip(vision={"ls_init_value": None})  # HarMA's backbone has no LayerScale
        shares = [Share() if share else None for _ in range(3)]
        for width, transformer in ((32, self.model.visual.transformer), (24, self.model.transformer)):
            for block, shared in zip(transformer.resblocks, shares, strict=False):
                block.mmadapter = Adapter(width, shared if share == "both" or width == 24 else None)
                block.gate1 = nn.Parameter(torch.tensor(0.6))
        generator = torch.Generator().manual_seed(3)
        for p in self.model.parameters():
            p.data.add_(0.2 * torch.randn(p.shape, generator=generator))
        self.double()

    def blocks(self, x, transformer, mask=None):
        x = x.transpose(0, 1)  # HarMA runs (tokens, samples, width)
        for block in transformer.resblocks:
            h = block.ln_1(x).transpose(0, 1)
            x = x + block.attn(h, h, h, need_weights=False, attn_mask=mask)[0].transpose(0, 1)
            u = block.mlp(block.ln_2(x))
            a = torch.sigmoid(block.gate1)
            x = x + a * block.mmadapter(u) + (1 - a) * u
        return x.transpose(0, 1)

    @torch.no_grad()
    def features(self, images, texts):
        m = self.model
        x = self.blocks(m.visual._embeds(images.double()), m.visual.transformer)
        y = self.blocks(m.token_embedding(texts) + m.positional_embedding, m.transformer, m.attn_mask.double())
        y = m.ln_final(y)[torch.arange(len(y)), texts.argmax(1)]
        return m.visual.ln_post(x[:, 0]) @ m.visual.proj, y @ m.text_projection


def fresh(make=tiny_clip):
    torch.manual_seed(9)
    return make(vision={"ls_init_value": None}).double()


@pytest.mark.parametrize("make", [tiny_clip, tiny_custom_text_clip])
@pytest.mark.parametrize("share", ["text", "both", None])
@pytest.mark.parametrize("form", ["whole", "bare", "ddp", "clip_only"])
def test_checkpoint_gives_harmas_features(tmp_path, make, share, form):
    harma = Harma(share)
    state = harma.state_dict()
    content = {
        "whole": {"model": state, "config": {"model": "vit", "temp1": 0.07}},
        "bare": state,
        "ddp": {"model": {f"module.{key}": t for key, t in state.items()}},
        "clip_only": harma.model.state_dict(),
    }[form]
    torch.save(content, tmp_path / "checkpoint.pth")
    model = fresh(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = load_harma_checkpoint(model, tmp_path / "checkpoint.pth")
    images, texts = inputs()
    for ours, theirs in zip(features(model, images.double(), texts), harma.features(images, texts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)  # fp64; sums in another order

    scale = harma.model.logit_scale if form == "clip_only" else (1 / harma.temp).log()
    assert torch.allclose(model.logit_scale, scale, rtol=0, atol=1e-15)
    expected = {next(k for k in report.not_placed)} if form != "clip_only" else set()
    assert set(report.not_placed) == {k for k in expected if k.endswith("model.logit_scale")}
    assert len(report.placed) + len(report.not_placed) == len(state) - (form == "clip_only") and not report.missing
    text_blocks = getattr(model, "text", model).transformer.resblocks
    owners = [block.adapter.shared is not None for block in [*model.visual.transformer.resblocks, *text_blocks]]
    assert owners == [share == "both"] * 3 + [share is not None] * 2
    assert (text_blocks[0].adapter.shared is model.visual.transformer.resblocks[0].adapter.shared) == (share != "text")


def test_checkpoint_goes_into_adapters_that_are_there(tmp_path):
    harma = Harma()
    torch.save(harma.state_dict(), tmp_path / "c.pth")
    model = fresh()
    add_adapters(model, bottleneck=R, num_heads=8, share="text")
    load_harma_checkpoint(model, tmp_path / "c.pth")
    images, texts = inputs()
    for ours, theirs in zip(features(model, images.double(), texts), harma.features(images, texts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_report_says_what_found_no_place(tmp_path):
    state = Harma().state_dict()
    state["model.visual.extra.weight"] = torch.ones(2)
    state["model.BiShareAdapter.0.l1.weight"] = torch.ones(2)
    state["model.attn_mask"] = torch.full((7, 7), float("-inf"))
    del state["model.ln_final.weight"], state["temp"], state["model.logit_scale"]
    torch.save({"model": state}, tmp_path / "c.pth")
    model = fresh()
    with pytest.warns(UserWarning, match=r"1 tensors.*visual\.extra\.weight.*2 of the model's.*ln_final\.weight"):
        report = load_harma_checkpoint(model, tmp_path / "c.pth")
    assert set(report.not_placed) == {
        "model.visual.extra.weight",
        "model.BiShareAdapter.0.l1.weight",
        "model.attn_mask",
    }
    assert set(report.missing) == {"logit_scale", "ln_final.weight"}
    for name in (*report.not_placed, *report.missing):
        assert name in str(report)


def broken(change):
    def damage(state):
        change(state)
        return {"model": state}

    return damage


BAD = {
    "backbone_shape": (broken(lambda s: s.update({"model.ln_final.bias": torch.ones(3)})), r"ln_final\.bias must have"),
    "backbone_nan": (broken(lambda s: s["model.visual.proj"].fill_(float("nan"))), r"visual\.proj is not finite"),
    "adapter_nan": (
        broken(lambda s: s["model.transformer.resblocks.1.gate1"].fill_(float("nan"))),
        r"text\.1\.residual_gate is not finite",
    ),
    "adapter_missing": (
        broken(lambda s: s.pop("model.visual.transformer.resblocks.2.mmadapter.img_proj_up.bias")),
        r"block 2 of the visual tower: .*img_proj_up\.bias is missing",
    ),
    "block_gate": (
        broken(lambda s: s.pop("model.transformer.resblocks.0.gate1")),
        r"text\.0\.residual_gate is missing",
    ),
    "one_share_less": (
        broken(lambda s: [s.pop(k) for k in list(s) if k.startswith("model.transformer.resblocks.1.mmadapter.BiSh")]),
        "own a sub-adapter",
    ),
    "temp": (broken(lambda s: s["temp"].fill_(-1)), r"temp must be one positive number, got -1\.0"),
    "no_adapters": (lambda s: {k: t for k, t in s.items() if "adapter" not in k and "gate1" not in k}, "no adapters"),
    "no_tensors": (lambda s: {"model": {"epoch": 3}}, "dict of tensors"),
    "a_list": (lambda s: [1, 2], "dict of tensors"),
    "code": (lambda s: {"model": s, "config": types.SimpleNamespace(a=1)}, "weights_only=True"),
}


@pytest.mark.parametrize(("damage", "message"), BAD.values(), ids=BAD)
def test_bad_checkpoints_change_nothing(tmp_path, damage, message):
    torch.save(damage(Harma().state_dict()), tmp_path / "c.pth")
    model = fresh()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        load_harma_checkpoint(model, tmp_path / "c.pth")
    assert "c.pth" in str(caught.value)
    assert_unchanged(model, before)


def test_files_that_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        load_harma_checkpoint(fresh(), tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="text.pth is not a checkpoint"):
        load_harma_checkpoint(fresh(), tmp_path / "text.pth")


def test_towers_that_should_share_must_agree(tmp_path):
    state = {key: t.clone() for key, t in Harma("both").state_dict().items()}
    state["model.transformer.resblocks.1.mmadapter.BiShareAdapterxx.l1.bias"] += 1
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"text\.1\.shared\.down\.bias and visual\.1\.shared\.down\.bias differ"):
        load_harma_checkpoint(fresh(), tmp_path / "c.pth")


def test_other_adapters_are_refused(tmp_path):
    torch.save(Harma().state_dict(), tmp_path / "c.pth")
    model = fresh()
    add_adapters(model, **SIZE)
    stir(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="num_heads is 8 in the file and 4 here; share is 'text' in the file"):
        load_harma_checkpoint(model, tmp_path / "c.pth")
    assert_unchanged(model, before)
    remove_adapters(model)
    with pytest.raises(ValueError, match=r"visual\.3\.down\.weight is missing"):
        load_harma_checkpoint(tiny_clip(vision={"layers": 4, "ls_init_value": None}).double(), tmp_path / "c.pth")


class CommentedMap(dict):
    """Stands for ruamel.yaml's class, in which HarMA's training script saves its configuration."""


class CommentedSeq(list):
    pass


def test_the_configuration_that_harma_saves_is_not_in_the_way(tmp_path, monkeypatch):
    for name in ("ruamel", "ruamel.yaml", "ruamel.yaml.comments"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for kind in (CommentedMap, CommentedSeq):
        monkeypatch.setattr(kind, "__module__", "ruamel.yaml.comments")
        monkeypatch.setattr(sys.modules["ruamel.yaml.comments"], kind.__name__, kind, raising=False)
    train_file = CommentedSeq(["train.json"])
    train_file.note = "state"
    harma = Harma()
    config = CommentedMap(train_file=train_file, model="geo", temp1=0.07)
    torch.save({"model": harma.state_dict(), "config": config}, tmp_path / "c.pth")
    model = fresh()
    with pytest.warns(UserWarning, match="QuickGELU.*has GELU"):
        report = load_harma_checkpoint(model, tmp_path / "c.pth")
    assert not report.missing
    images, texts = inputs()
    for ours, theirs in zip(features(model, images.double(), texts), harma.features(images, texts), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
