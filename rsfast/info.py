"""What is installed here, and which implementation of every operation would run."""

import importlib.metadata
import inspect
import json
import platform
import subprocess

import torch

import rsfast
from rsfast import _extension, tune
from rsfast._dispatch import INTERPRET, use_fused

PACKAGES = (  # shown if installed, after rsfast's own dependencies
    ("torch", "triton", "torchvision", "open_clip_torch", "numpy", "safetensors", "tqdm"),
    ("timm", "peft", "faiss-gpu", "faiss-cpu", "tensorboard"),
)
PROBES = {  # a shape that the recipes use, for each operation with a choice of implementation
    "gated_adapter": (256, 50, 768),
    "contrastive_loss": (428, 512),
    "triplet_loss": (428, 512),
    "adaptive_triplet_loss": (428, 512),
    "harma_loss": (428, 512),
    "sigmoid_loss": (428, 512),
    "uniformity_loss": (428, 512),
    "lora_linear": (12800, 768),
    "batched_lora_linear": (12800, 768),
    "lora_shrink": (12800, 768),
    "lora_expand": (12800, 16),
    "kmeans_assign": (98304, 1280),
    "kmeans_update": (98304, 1280),
    "kmeans_step": (98304, 1280),
    "kmeans_distances": (98304, 1280),
    "kmeans_plusplus": (98304, 1280),
}


def info() -> dict:
    """Versions, GPUs, and for every operation what ``impl="auto"`` would run and why.

    Returns:
        ``versions`` (None where a required package is missing), ``gpus`` (with the table of ``rsfast tune`` that speaks
        for each), ``cuda_library`` (where it comes from, or why not), ``operations`` (``impl``, ``reasons``, ``input``)
        and ``warnings``; nothing but strings, numbers, lists and dicts.

    Example:
        >>> import rsfast.info
        >>> sorted(rsfast.info.info())
        ['cuda_library', 'gpus', 'operations', 'versions', 'warnings']
    """
    needed, optional = PACKAGES
    versions = {"rsfast": _version("rsfast"), "python": platform.python_version()}
    versions |= {name: _version(name) for name in needed}
    versions["cuda"] = torch.version.cuda
    versions |= {name: version for name in optional if (version := _version(name)) is not None}
    warnings = []
    if {"faiss-gpu", "faiss-cpu"} <= set(versions):
        warnings.append(
            "faiss-gpu and faiss-cpu are both installed and overwrite each other's files: uninstall both, then one"
        )
    if torch.version.cuda and not torch.cuda.is_available():
        warnings.append("no GPU is visible, so every operation runs its reference in plain PyTorch")
    operations = {name: _operation(name) for name in PROBES}
    library = _extension.status()
    return {
        "versions": versions, "gpus": _gpus(), "cuda_library": library, "operations": operations, "warnings": warnings
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver_version() -> str:
    """Version of the NVIDIA driver, ``unknown`` where ``nvidia-smi`` does not say."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, check=True, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _gpus() -> list[dict]:
    found, driver = [], driver_version() if torch.cuda.is_available() else None
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = round(p.total_memory / 2**30, 1)
        one = {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": memory, "driver": driver}
        found.append(one | {"lora_table": tune.table_in_use(torch.device("cuda", i))})
    return found


def _operation(name: str) -> dict:
    """What auto would choose for an input of the probe's shape on the best device here."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    probe = torch.empty(1, dtype=dtype, device=device).expand(PROBES[name])  # a shape costs no memory
    reasons = inspect.getmodule(getattr(rsfast, name)).why_not_fused(probe)
    fused = use_fused("auto", reasons)
    if not fused and not reasons and INTERPRET:
        reasons = ["TRITON_INTERPRET=1: auto never runs kernels in Triton's interpreter"]
    shape = " x ".join(map(str, PROBES[name]))
    return {
        "impl": "fused" if fused else "reference",
        "reasons": reasons or ["the kernels can run"],
        "input": f"{shape} {str(dtype).removeprefix('torch.')} on {device}",
    }


def as_text(found: dict) -> str:
    """The same for people: one fact a line, aligned."""
    width = max(len(name) for name in (*found["versions"], *found["operations"])) + 2
    lines = [f"{name:{width}}{version or 'not installed'}" for name, version in found["versions"].items()]
    gpus = [
        f"{g['name']}, capability {g['capability']}, {g['memory_gib']} GiB, driver {g['driver']}" for g in found["gpus"]
    ]
    lines += [f"{'gpu':{width}}{gpu}" for gpu in gpus or ["none"]]
    lines += [f"{'lora table':{width}}{g['lora_table']}, for {g['name']}" for g in found["gpus"]]
    lines += [f"{'cuda library':{width}}{found['cuda_library']}", ""]
    for name, operation in found["operations"].items():
        lines.append(f"{name:{width}}{operation['impl']}, for {operation['input']}")
        lines += [f"{'':{width}}because {reason}" for reason in operation["reasons"]]
    return "\n".join([*lines, *(f"\nwarning: {warning}" for warning in found["warnings"])])


def add_parser(subparsers) -> None:
    """Add ``info`` to the command line."""
    parser = subparsers.add_parser("info", help="versions, GPU, and the implementation every operation would run")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=main)


def main(args) -> int:
    found = info()
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0
