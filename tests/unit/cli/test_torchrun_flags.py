"""A torchrun command line runs under `ckptsvc run` as it is."""

import os
import re
import subprocess
import sys

import click
import pytest
from torch.distributed.run import get_args_parser

from ckptsvc.cli.run import command
from ckptsvc.cli.torchrun_flags import WITHOUT_EFFECT


def test_every_option_of_torchrun_is_known() -> None:
    ours = {name for option in command.params for name in option.opts}
    theirs = {name for action in get_args_parser()._actions for name in action.option_strings if name.startswith("--")}
    assert theirs - ours == {"--help"}
    assert len(theirs) > 30


def test_those_without_effect_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rdzv_backend=c10d", "--tee", "3", "--nnodes", "0", "train.py", "--role", "x"]
    with pytest.raises(Exception, match="--nnodes 0 is impossible"):
        command.main(arguments, standalone_mode=False)
    said = capsys.readouterr().err
    assert "--rdzv_backend has no effect: the agents are the rendezvous" in said
    assert "--tee has no effect" in said
    assert "--role" not in said  # it is the script's


@pytest.mark.parametrize("names", WITHOUT_EFFECT)
def test_they_take_a_value(names: tuple[str, ...]) -> None:
    for name in names:
        with pytest.raises(Exception, match="--nnodes 0 is impossible"):
            command.main([name, "1", "--nnodes", "0", "train.py"], standalone_mode=False)


def test_an_option_that_nobody_knows_is_not_taken_for_the_script() -> None:
    with pytest.raises(click.NoSuchOption, match="--nproc-per-mode"):
        command.main(["--nproc-per-mode", "2", "train.py"], standalone_mode=False)


def test_variables_of_the_training_operator_are_read() -> None:
    environ = {"PET_NNODES": "0:4", "PATH": ""}
    ended = subprocess.run(
        [sys.executable, "-m", "ckptsvc.cli.main", "run", "train.py"],
        env=environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert re.search("--nnodes 0:4 is impossible", ended.stderr)
