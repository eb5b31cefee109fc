"""README and docstrings do what they say: their Python runs as written, commands exist, CI runs the test command."""

import argparse
import doctest
import importlib
import pkgutil
import re
import shlex

import pytest
import torch

import rsfast
from benchmarks.report import ROOT
from rsfast import cli

README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands():
    """Every command line of the bash blocks, continued lines joined."""
    return [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_python_blocks_run_in_order(capsys):
    assert len(blocks("python")) >= 8
    names = {"__name__": "readme"}
    for number, block in enumerate(blocks("python")):
        exec(compile(block, f"README.md, python block {number}", "exec"), names)


def test_examples_of_docstrings_run_as_they_stand():
    finder, runner, seen = doctest.DocTestFinder(), doctest.DocTestRunner(), 0
    for found in pkgutil.walk_packages(rsfast.__path__, "rsfast."):
        if ".kernels" in found.name:  # need Triton, and show no examples
            continue
        for example in finder.find(importlib.import_module(found.name), globs={}):
            seen += bool(example.examples)
            runner.run(example)
    assert runner.summarize().failed == 0 and seen >= 14


def test_the_replacement_is_the_same_function():
    """What README calls the code you have equals what it puts in its place."""
    have = {}
    exec(blocks("python")[0], have)
    theirs = have["Adapter"](48).double()
    torch.manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours = rsfast.GatedAdapter(48, impl="reference").double()
    state = theirs.state_dict()
    ours.load_state_dict({
        name: state[
            name.replace("residual_gate", "block_gate").replace("in_proj.", "attention.in_proj_").replace(
                "out_proj", "attention.out_proj"
            )
        ]
        for name in ours.state_dict()
    })  # fmt: skip
    x = torch.randn(3, 5, 48, dtype=torch.double)
    torch.testing.assert_close(ours(x), theirs(x.transpose(0, 1)).transpose(0, 1))


def test_two_setup_commands_come_first():
    demo, tests = (block.strip() for block in blocks("bash")[:2])
    for command, end in ((demo, "rsfast demo"), (tests, "python -m pytest -n 2")):
        assert "\n" not in command and command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
        assert command.endswith(f".venv/bin/{end}") and "-c constraints.txt" in command and "clone" not in command
    assert '-e ".[test]"' in tests


def test_ci_runs_the_test_command_of_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script and "pytest benchmarks" in script and "ruff format --check" in script


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("rsfast ")])
def test_commands_are_understood(line, monkeypatch):
    """The parser takes every flag; nothing is run."""
    taken = []
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, argv=None, namespace=None):
        taken.append(parse(self, argv, namespace))
        taken[-1].run = lambda args: 0
        return taken[-1]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    assert cli.main(shlex.split(line)[1:]) == 0 and len(taken) == 1


def test_names_of_files_and_flags_in_the_text_exist():
    for path in re.findall(r"`((?:benchmarks|tests|rsfast|\.ci)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
    for name in set(re.findall(r"\brsfast(?:\.\w+)+(?=\()", README)):
        module, _, function = name.rpartition(".")
        assert hasattr(importlib.import_module(module), function), name


def test_no_number_with_a_unit_of_speed_or_memory_is_typed_by_hand():
    before, _, rest = README.partition("<!-- benchmarks:start -->")
    text = before + rest.partition("<!-- benchmarks:end -->")[2]
    typed = re.findall(
        r"\d[\d.]*\s?(?:x faster|times faster|ms|µs|us|TB/s|GB/s|TFLOP/s|GB|MB|GiB|MiB|samples/s)\b", text
    )
    assert not typed, typed
