"""What compute-sanitizer watches, where the tool is found, and what its output says.

python -m benchmarks.sanitize          launch a sample of the kernels at small shapes

"""

import itertools
import os
import re
import shutil

import torch

import rsfast
import rsfast.kmeans
from rsfast import _sources
from tests.cases import BF16, CASES, FP32

TOOLS = ("memcheck", "racecheck")
NAME = "compute-sanitizer"
SAMPLE = (
    "gated_adapter", "gated_adapter_shared", "gated_adapter_shared_lengths",
    "harma_loss_ids", "contrastive_loss", "triplet_loss_hardest", "sigmoid_loss",
    "lora_linear", "lora_linear_dropout", "lora_linear_qv", "batched_lora_linear", "batched_lora_linear_dropout_qv",
)  # fmt: skip
KMEANS = ((300, 640, 32), (301, 33, 5), (700, 64, 300))  # what one pass serves, an odd width, many clusters
MANY_PAIRS = (1537, 72)  # more than one launch of a loss holds, and no multiple of a tile
DONE = "the sample is done"  # its last line: without it a clean report says nothing
# a tensor in the middle of a larger block has no end that memcheck could see
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
ERRORS = re.compile(r"={9} ERROR SUMMARY: (\d+) errors?")
HAZARDS = re.compile(r"={9} RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)")
REFUSED = re.compile(r"={9} (.*(?:Device not supported|not supported on this device).*)", re.IGNORECASE)
KIND = re.compile(r"={9} (Invalid .*|(?:Error|Warning): .*|Program hit .*|Out-of-range .*|Misaligned .*)")
FOUND = ("Invalid", "Out-of-range", "Misaligned", "Error: Race", "Warning: Race")  # in the kernels, summary or not


def command(tool: str, path: str, argv: list[str]) -> list[str]:
    """``argv`` watched; what PyTorch itself asks the driver in vain is no error, for every call of ours is checked."""
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [path, "--tool", tool, *options, "--error-exitcode", "1", "--target-processes", "all", *argv]


def tool() -> str | None:
    """Path of compute-sanitizer: on PATH, or in the toolkit that nvcc belongs to; None where there is none."""
    if found := shutil.which(NAME):
        return found
    nvcc = _sources.nvcc()
    homes = [os.path.dirname(os.path.dirname(os.path.realpath(nvcc)))] if nvcc else []
    homes += [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [os.path.join(home, part) for home in [*homes, "/usr/local/cuda"] for part in ("bin", NAME)]
    return shutil.which(NAME, path=os.pathsep.join(places))


def parse(output: str) -> dict:
    """What a report says.

    Returns:
        ``finished``: whether the sample came to its end under the tool, and the tool to its summary. ``errors``: of
        memcheck or of racecheck, None without a summary. ``warnings``: of racecheck. ``kinds``: first lines of
        what was reported, each with its number, twenty at most. ``refused``: why the tool would not run here, if so.
    """
    errors = [int(n) for n in ERRORS.findall(output)]
    hazards = [tuple(map(int, found)) for found in HAZARDS.findall(output)]
    errors += [found[1] for found in hazards]
    kinds: dict[str, int] = {}
    for kind in KIND.findall(output):
        kinds[kind.strip()[:160]] = kinds.get(kind.strip()[:160], 0) + 1
    found = dict(finished=bool(errors) and DONE in output, errors=sum(errors) if errors else None)
    found |= {"warnings": sum(h[2] for h in hazards)} if hazards else {}
    refused = REFUSED.search(output)
    return found | {"kinds": dict(list(kinds.items())[:20]), "refused": refused and refused[1].strip()}


def verdict(code: int | None, report: dict) -> str:
    """How a part of a run ended that was watched by a tool, by its exit code and :func:`parse`."""
    if report["refused"]:
        return f"skipped: {report['refused']}"
    if report["errors"] or report.get("warnings"):
        return f"FAILED: {report['errors']} errors, {report.get('warnings', 0)} warnings"
    if seen := sum(number for kind, number in report["kinds"].items() if kind.startswith(FOUND)):
        return f"FAILED: {seen} reports before its end"
    if code is None:
        return "cut off"
    if code or not report["finished"]:
        return f"FAILED with {code}, without a report" if report["errors"] is None else f"FAILED with {code}"
    return "passed"


def sample(device: str = "cuda") -> None:
    """Launch every CUDA kernel and a sample of the Triton kernels, forward and backward."""
    sample_kmeans(device)
    for case in [c for c in CASES if c.name in SAMPLE and c.has_kernel()]:
        for shape in (*case.small[:4], *[MANY_PAIRS] * ("image_features" in case.names)):
            for dtype in (FP32, BF16):
                leaves = [t.requires_grad_() for t in case.inputs(shape, dtype, device)]
                case.call(case.public, leaves, impl="fused").sum().backward()
        print("sampled", case.name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    print(DONE, flush=True)


def sample_kmeans(device: str = "cuda") -> None:
    """One pass, two passes, whole fits, mini-batches, the constraint."""
    for size, dtype in itertools.product(KMEANS, (FP32, BF16)):
        _kmeans(*size, dtype, device)
        print("sampled k-means", *size, dtype, flush=True)


def _kmeans(n: int, width: int, k: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    centers, weights = x[:k].float(), torch.ones(n, device=device)
    rsfast.kmeans_step(x, centers, impl="fused")
    step = rsfast.kmeans_step(x, centers, weights=weights, precision="fast", impl="fused")
    rsfast.kmeans_assign(x, centers, subsidies=centers.new_zeros(k), impl="fused")
    rsfast.kmeans_update(x, step.labels, k, weights=weights, impl="fused")
    costs = rsfast.kmeans_distances(x, centers, impl="fused")
    rsfast.kmeans.constrained_assign(costs, n // (2 * k), impl="fused")
    rsfast.KMeans(k, max_iter=3, random_state=0, n_init=1).fit(x)
    rsfast.MiniBatchKMeans(k, batch_size=512, max_iter=2, random_state=0, n_init=1).fit(x)


if __name__ == "__main__":
    sample()
