"""``rsfast info``: complete, honest, and readable by programs."""

import argparse
import importlib.metadata
import inspect
import json

import pytest
import torch

import rsfast
import rsfast.info as info
from rsfast._dispatch import INTERPRET

OPERATIONS = [name for name in rsfast.__all__ if inspect.isfunction(getattr(rsfast, name))]
CHOOSING = [name for name in OPERATIONS if "impl" in inspect.signature(getattr(rsfast, name)).parameters]


def shown(*argv):
    parser = argparse.ArgumentParser()
    info.add_parser(parser.add_subparsers())
    args = parser.parse_args(["info", *argv])
    return args.run(args)


def test_every_operation_with_a_choice_is_listed():
    assert CHOOSING and set(info.PROBES) == set(CHOOSING)
    assert set(info.info()["operations"]) == set(CHOOSING)


@pytest.mark.parametrize("name", CHOOSING)
def test_every_operation_has_its_reasons_beside_it(name):
    assert callable(inspect.getmodule(getattr(rsfast, name)).why_not_fused)


@pytest.mark.parametrize("name", CHOOSING)
def test_what_is_said_is_what_auto_would_run(name):
    said = info.info()["operations"][name]
    waiting = any("no kernel yet" in reason for reason in said["reasons"])
    assert said["reasons"]
    assert said["impl"] == ("fused" if torch.cuda.is_available() and not waiting else "reference")


@pytest.mark.skipif(not INTERPRET, reason="speaks of Triton's interpreter")
def test_the_interpreter_is_given_as_the_reason():
    assert "TRITON_INTERPRET" in info.info()["operations"]["gated_adapter"]["reasons"][0]


def test_fused_is_said_where_nothing_speaks_against_it(monkeypatch):
    monkeypatch.setattr(info, "use_fused", lambda impl, reasons: impl == "auto" and not reasons)
    monkeypatch.setattr(inspect.getmodule(rsfast.gated_adapter), "why_not_fused", lambda x: [])
    said = info.info()["operations"]["gated_adapter"]
    assert said["impl"] == "fused" and said["reasons"] == ["the kernels can run"]


def test_json_is_the_same_as_the_function(capsys):
    assert shown("--json") == 0
    assert json.loads(capsys.readouterr().out) == info.info()


def test_text_names_versions_and_operations(capsys):
    assert shown() == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["torch", torch.__version__.split("+")[0]] for line in lines)
    column = {line.index(line.split()[1]) for line in lines[:5]}
    assert len(column) == 1, "the values do not stand under each other"
    assert all(any(line.startswith(name) for line in lines) for name in CHOOSING)


def test_two_faiss_packages_are_pointed_out(monkeypatch):
    real = importlib.metadata.version
    both = {"faiss-gpu": "1.15.1", "faiss-cpu": "1.15.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: both.get(name) or real(name))
    assert any("faiss" in warning for warning in info.info()["warnings"])
    del both["faiss-cpu"]
    assert not any("faiss" in warning for warning in info.info()["warnings"])


def test_a_missing_package_is_said_and_not_fatal(monkeypatch, capsys):
    real = importlib.metadata.version

    def version(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert info.info()["versions"]["triton"] is None
    shown()
    assert "not installed" in capsys.readouterr().out
