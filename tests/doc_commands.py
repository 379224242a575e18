"""Commands of the documents, run as far as it goes without what they need."""

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer
from documents import ROOT
from torch.distributed.run import get_args_parser

from megatron_dsv3.cli import app
from megatron_dsv3.config.job import load_job

CLI = typer.main.get_command(app)
JOB = {
    "model": {"hf_dir": "m"},
    "data": {"store": "s"},
    "train": {"global_batch_size": 65536},
    "output": {"dir": "o"},
}


class ParsedError(Exception):
    """A script's own parser took the words."""


def check(words: list[str], *, allowed: bool) -> None:
    """`allowed`: a reason is given why the command can't be run, so an unknown one may stand."""
    first, *rest = words
    if first == "megatron-dsv3":
        check_cli(rest)
    elif first == "torchrun":
        check_torchrun(rest)
    elif first in ("python", "python3") and rest and (ROOT / rest[0]).is_file():
        check_script(ROOT / rest[0], rest[1:])
    elif first == "make":
        targets = [word for word in rest if "=" not in word]
        subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)
    elif script := next((w for w in rest if w.startswith("examples/") and w.endswith(".sh")), None):
        check_shell(ROOT / script, rest[rest.index(script) + 1 :])
    else:
        assert allowed, f"{words}: not known here; say <!-- not run: why --> before the block"


def check_cli(words: list[str]) -> None:
    command, context, name = CLI, None, "megatron-dsv3"
    while hasattr(command, "commands"):
        if "--help" in words[:1]:
            return
        assert words, f"{name} needs a command"
        context = command.make_context(name, [], parent=context, resilient_parsing=True)
        assert words[0] in command.commands, f"{name} {words[0]}: no such command"
        name, command, words = words[0], command.commands[words[0]], words[1:]
    if "--help" in words:
        return
    parsed = command.make_context(name, list(words), parent=context).params
    if overrides := parsed.get("overrides"):
        load(JOB, overrides)


def check_torchrun(words: list[str]) -> None:
    parsed = get_args_parser().parse_args([word for word in words if word != "..."])
    assert parsed.module
    assert parsed.training_script == "megatron_dsv3.cli"
    check_cli(parsed.training_script_args)


def check_script(path: Path, words: list[str]) -> None:
    """Runs it up to where it has read its arguments."""
    if "ArgumentParser" not in path.read_text(encoding="utf-8"):
        return
    original = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *args: object) -> None:
        original(parser, *args)
        raise ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [str(path), *words])
        patch.syspath_prepend(path.parent)
        with pytest.raises(ParsedError):
            runpy.run_path(str(path), run_name="__main__")


def check_shell(path: Path, words: list[str]) -> None:
    text = path.read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            # Those that a script does not know it hands on to the command line.
            assert word in text or word in our_flags(), f"{path.name} has no {word}"
    if path.name == "train_dsv3_671b.sh":
        check_dry_run(path, words)


def check_dry_run(path: Path, words: list[str]) -> None:
    """What it would submit and run."""
    with tempfile.TemporaryDirectory() as folder:
        sbatch = Path(folder, "sbatch")  # its presence is what makes a login node
        sbatch.write_text("#!/bin/sh\nexit 1\n")
        sbatch.chmod(0o755)
        shutil.copy(ROOT / "examples" / "sft_671b.yaml", Path(folder, "job.yaml"))
        done = subprocess.run(
            ["bash", path, *words, "--dry-run"],
            cwd=folder,
            env={"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert "sbatch --job-name=" in done.stdout
    assert "megatron_dsv3.cli train" in done.stdout


def load(sections: dict, overrides: list[str]) -> None:
    """Reads a job as `train` would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_dsv3.config.job.read_yaml", lambda path: sections)
        load_job(Path("job.yaml"), overrides)


def our_flags() -> set[str]:
    """Of the command line and of what stands in the repository's scripts."""
    texts = [
        path.read_text(encoding="utf-8")
        for folder in ("tools", "scripts", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh")
    ]
    in_scripts = {flag for text in texts for flag in re.findall(r"--[a-z][a-z-]+", text)}
    return in_scripts | {
        flag
        for command in leaves(CLI)
        for p in command.params
        for flag in [*p.opts, *p.secondary_opts]
    }


def leaves(command) -> list:
    inner = getattr(command, "commands", {}).values()
    return [leaf for one in inner for leaf in leaves(one)] if inner else [command]
