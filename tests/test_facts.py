"""Every group of facts, walked through with a GPU that is only pretended: what it asks of PyTorch, and its names."""

import types

import pytest
import torch

from benchmarks import facts, measure
from rsfast._dispatch import INTERPRET

pytestmark = pytest.mark.skipif(not INTERPRET, reason="pretends a GPU where there is none")


@pytest.fixture
def small(monkeypatch):
    """Small shapes on the CPU, where every measurement runs what it is to measure once and finds it takes a second."""

    def seconds(run, setup=tuple, rounds=20):
        run(*setup())
        return 1.0

    one = types.SimpleNamespace(multi_processor_count=1)
    graph = types.SimpleNamespace(replay=lambda: None)
    cuda = types.SimpleNamespace(
        get_device_properties=lambda i: one, CUDAGraph=lambda: graph, graph=lambda g: torch.no_grad()
    )
    monkeypatch.setattr(facts.measure, "event_seconds", seconds)
    monkeypatch.setattr(facts.torch, "cuda", cuda)
    for name, value in dict(DEVICE="cpu", READ=700, LAYERS=((48, 32, 16), (32, 16, 16)), BARRIERS=16).items():
        monkeypatch.setattr(facts, name, value)
    monkeypatch.setattr(facts, "HEADS", ((2, 2, 5, 16),))
    monkeypatch.setattr(facts, "TILES", ((16, 16, 16, 4, 2),))


def test_memory(small):
    found = facts.memory()
    assert found["read_bytes_per_second"] == found["torch_amax_bytes_per_second"] == 2800
    assert found["lora_shrink_48x32x16_bytes_per_second"] == pytest.approx(48 * 32 * 2 * 10)


def test_launches_and_barriers(small):
    found = facts.launches()
    assert found == {"launch_in_a_graph_seconds": 1 / 200, "grid_barrier_seconds": 0.0}


def test_attention_names_the_backend_that_is_picked_and_those_that_refuse(small):
    found = facts.attention()
    assert found["sdpa_2x2x5x16_picked"] in {"flash_attention", "math", "efficient_attention"}
    assert found["sdpa_2x2x5x16_math_both_seconds"] == 0.1
    assert found["sdpa_2x2x5x16_cudnn"].startswith("refused: ")


def test_products_and_what_a_plain_triton_product_takes(small, monkeypatch):
    monkeypatch.setattr(facts, "bf16", torch.randn)  # of which the interpreter has no products
    assert facts.products(facts.LAYERS[:1]) == {"matmul_48x32x16_flops_per_second": 2 * 48 * 32 * 16 * 10}
    found = facts.products(facts.LAYERS[:1], with_triton=True)
    assert found["triton_tax_48x32x16"] == 1.0 and found["triton_matmul_48x32x16_tiles"] == "16x16x16x4x2"


def test_every_group_is_measured_once():
    assert measure.facts in facts.GROUPS.values() and len(facts.GROUPS) == 6 + 8
    products = [group.args[0] for name, group in facts.GROUPS.items() if name.startswith("Triton")]
    assert sum(products, ()) == facts.LAYERS + facts.LARGE + facts.ADAPTER and {len(one) for one in products} == {1}
