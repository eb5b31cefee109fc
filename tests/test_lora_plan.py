"""What may run a stage, under which name a table has it, what runs then, and how inputs are handed to the kernels."""

import dataclasses
import json

import pytest
import torch

import rsfast
from tests.cases import BF16, FP32

plan, linear = (pytest.importorskip(f"rsfast.lora.kernels.{name}") for name in ("plan", "linear"))
rows_apart = pytest.importorskip("rsfast._tiles").rows_apart
FACTS = plan.Facts(4096, 768, 512, 16, 1, 0, False, BF16)
CPU = torch.device("cpu")


def arms(stage, **changes):
    return list(dict.fromkeys(c.arm for c in plan.candidates(stage, dataclasses.replace(FACTS, **changes))))


@pytest.mark.parametrize(
    "stage, changes, expected",
    [
        ("forward", {}, "composed augmented expand inside"),
        ("forward", dict(rank=32), "composed augmented expand inside"),
        ("forward", dict(rank=33), "composed augmented expand"),
        ("forward", dict(parts=2), "composed augmented expand"),
        ("forward", dict(dtype=FP32), "composed augmented expand"),
        ("forward", dict(dropout=True), "composed augmented expand"),
        ("forward", dict(adapters=2), "composed expand"),
        ("dgrad", {}, "composed augmented expand"),
        ("dgrad", dict(dropout=True), "composed expand"),
        ("dgrad", dict(adapters=2), "composed expand"),
        ("low", dict(rank=64), "composed once"),
        ("low", dict(rank=65), "composed"),
        ("factor", {}, "composed outer"),
        ("factor", dict(dropout=True), "composed"),
        ("factor", dict(adapters=2), "composed"),
    ],
)
def test_what_may_run(stage, changes, expected):
    assert arms(stage, **changes) == expected.split()
    assert len(plan.candidates(stage, dataclasses.replace(FACTS, **changes))) <= 12


def test_what_insisting_runs():
    for stage, changes, sm, expected in (
        ("forward", {}, 90, ("inside", 256)),
        ("forward", dict(outputs=1024), 80, ("inside", 128)),
        ("forward", dict(outputs=1025), 90, ("expand", 256)),
        ("forward", dict(rank=17, outputs=513), 90, ("expand", 256)),
        ("forward", dict(rank=17, outputs=512), 90, ("expand", 128)),
        ("dgrad", dict(outputs=768), 80, ("expand", 128)),
        ("forward", dict(dtype=FP32), 90, ("expand", 32)),
        ("low", {}, 90, ("once", 128)),
        ("low", dict(rank=65), 90, ("composed", 128)),
        ("factor", {}, 90, ("outer", 128)),
    ):
        outputs = changes.get("outputs", 768)
        choice = plan.insisted(stage, dataclasses.replace(FACTS, **{**changes, "outputs": outputs}), sm)
        assert (choice.arm, choice.BLOCK_N) == expected, (stage, changes)


def test_names_in_a_table():
    assert FACTS.key("low") == "low bfloat16 to4096 768x512 r16x1 one whole"
    for changes, name in (
        (dict(rows=4097), "low bfloat16 to16384 768x512 r16x1 one whole"),
        (dict(rows=40960), "low bfloat16 to40960 768x512 r16x1 one whole"),
        (dict(rows=40961), "low bfloat16 over40960 768x512 r16x1 one whole"),
        (dict(rank=17, parts=3), "low bfloat16 to4096 768x512 r32x3 one whole"),
        (dict(adapters=7, dropout=True, dtype=FP32), "low float32 to4096 768x512 r16x1 several dropout"),
    ):
        assert dataclasses.replace(FACTS, **changes).key("low") == name


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes the user's table of this machine, which is read anew before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def write(text):
        path = plan.user_table(plan.gpu_name(CPU))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        plan.table_of.cache_clear()
        return path

    yield write
    plan.table_of.cache_clear()


def test_a_table_decides_unless_it_cannot(table):
    best, unknown = plan.candidates("forward", FACTS)[3], plan.Choice("expand", 999)
    small = dataclasses.replace(FACTS, rows=1)
    other = dataclasses.replace(FACTS, rank=128)
    entries = {FACTS.key("forward"): best, other.key("forward"): unknown}
    path = table(json.dumps(dict(choices={key: dataclasses.asdict(choice) for key, choice in entries.items()})))
    for insist in (False, True):
        assert plan.choose("forward", FACTS, CPU, insist) == plan.choose("forward", small, CPU, insist) == best
    assert plan.choose("forward", other, CPU, False) == plan.choose("low", FACTS, CPU, False) == plan.COMPOSED
    assert plan.choose("forward", other, CPU, True) == plan.insisted("forward", other, 90)
    path.unlink()  # read once a process, so that equal calls choose equally
    assert plan.choose("forward", FACTS, CPU, False) == best
    with plan.forced({"forward": unknown}):
        with plan.forced({"low": best}):
            assert (
                plan.choose("forward", FACTS, CPU, False) == unknown and plan.choose("low", FACTS, CPU, False) == best
            )
        assert plan.choose("forward", FACTS, CPU, True) == unknown
        assert plan.choose("low", FACTS, CPU, False) == plan.COMPOSED
    assert plan.choose("forward", FACTS, CPU, False) == best


@pytest.mark.parametrize("text", ("{", "[]", "{}", '{"choices": 3}', '{"choices": {"a": 3}}', '{"choices": {"a": {}}}'))
def test_a_broken_table_is_named_and_left_out(table, text):
    path = table(text)
    with pytest.warns(UserWarning, match=f"{path.name} is no table of rsfast tune.*products of cuBLAS run instead"):
        assert plan.choose("forward", FACTS, CPU, False) == plan.COMPOSED


def test_what_goes_by_its_strides():
    t = torch.arange(64.0).view(4, 16)
    for kept in (t, t[:, :5], t[::2]):
        assert rows_apart(kept) is kept
    for copied in (t[:, ::2], t.T, t[:1].expand(3, 16)):
        rows = rows_apart(copied)
        assert rows.is_contiguous() and torch.equal(rows, copied)
    described = [linear._described(each) for each in (t, t[:, :8], t[:, 4:8], t[:, 1:9], t.T, t[:, ::2], t.view(-1, 2))]
    assert described == [True, True, True, False, False, False, False]


def test_slices_are_on_the_device_once():
    flat = plan.flat(((0, 3), (5, 9)))
    assert flat == [0, 3, 0, 5, 9, 3]
    slices, again = (plan.Batch.slices_on(torch.ones(1), tuple(flat)) for _ in "ab")
    assert slices is again and slices.tolist() == flat and plan.Batch.slices_on(torch.ones(1), ()) is None


@pytest.mark.parametrize("columns", (128, 200))
def test_a_tile_that_is_stored_in_pieces(device, columns):
    """Two and four of them, each with its piece of the bias."""
    g = torch.Generator().manual_seed(0)
    shapes = (3, 16), (columns, 16), (columns,), (2, 16), (columns, 2)
    x, W, b, A, B = (torch.randint(-2, 3, s, generator=g).float().to(device) for s in shapes)
    with plan.forced({"forward": plan.Choice("expand", 64, 256, 32)}):
        y = rsfast.lora_linear(x, W, b, A, B, 1.0, impl="fused")
    assert torch.equal(y, x @ W.T + b + x @ A.T @ B.T)


def test_an_expansion_of_several_blocks(device):
    s, B, base = (
        torch.arange(rows * width).view(rows, width).float() % 7 for rows, width in ((67, 3), (131, 3), (67, 131))
    )
    s, B, base = s.to(device), B.to(device), base.to(device)
    assert torch.equal(rsfast.lora_expand(s, B, base, impl="fused"), base + s @ B.T)


def test_the_user_s_table_goes_before_the_library_s(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "TABLES", tmp_path / "shipped")
    mine, shipped = plan.user_table("A GPU"), plan.TABLES / plan.file_name("A GPU")
    assert plan.table_path("A GPU") is None
    for path in (shipped, mine):  # the later one goes before
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        assert plan.table_path("A GPU") == path


def test_a_single_token_has_no_axis_for_an_id():
    x, A, B = torch.ones(4), torch.ones(1, 2, 4), torch.ones(1, 4, 2)
    with pytest.raises(ValueError, match="adapter_ids must be"):
        rsfast.batched_lora_linear(x, torch.eye(4), None, A, B, torch.ones(1), torch.tensor(0))
