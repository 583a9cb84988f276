"""The commands that look at runs and agents, as programs: on what real jobs have saved, with real exit statuses."""

import json
import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.damage import Damage, damaged
from harness.job import Launch
from harness.programs import adam, network, tensors_of, train_step
from harness.rank import Rank
from harness.runtime import Runtime, eventually
from harness.stored import cli
from harness.zygote import Zygote

from ckptsvc.cli import agents

Command = Callable[..., subprocess.CompletedProcess[str]]
CKPTSVC = [sys.executable, "-m", "ckptsvc.cli.main"]


def train(rank: Rank, store: str, until: int, sharded: bool = False, seed: int = 0) -> dict[str, Any]:
    """Train with saves at every second step; returns (name, dtype, shape) of every tensor."""
    import ckptsvc

    random.seed(0)  # the generators are part of what is saved
    np.random.seed(0)
    model = network(seed)
    if rank.world > 1:
        rank.join()
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (rank.world,)))
    optimizer = adam(model)
    run = ckptsvc.attach({"model": model, "optimizer": optimizer, "best": 0.5}, store=store, every="off")
    while run.steps_done < until:
        train_step(model, optimizer, run.steps_done)
        run.step()
        if run.steps_done % 2 == 0:
            run.save(wait=True)
    run.close()
    tensors = tensors_of(model, optimizer)
    found = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    if sharded:
        import torch.distributed as dist

        rank.report("result", result=found)
        dist.barrier()
        os._exit(0)  # now and then gloo aborts a process that takes its groups apart
    return found


def hold(rank: Rank, store: str) -> None:
    """Train until told to end."""
    import ckptsvc

    model = network()
    run = ckptsvc.attach({"model": model}, store=store, every="off")
    run.step()
    run.save(wait=True)
    rank.report("ready")
    rank.until("end")
    run.close()


@pytest.fixture
def command(runtime: Runtime) -> Command:
    """Run the command line as a program in the test's own world."""

    def run(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CKPTSVC, *map(str, arguments)],
            env=runtime.environ | environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def on_terminal(arguments: list[object], environ: dict[str, str], columns: int = 80) -> tuple[int, str]:
    """Run the command line on a terminal of that width; returns its exit status and all it has written."""
    leader, follower = pty.openpty()
    size = {"COLUMNS": str(columns), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [*CKPTSVC, *map(str, arguments)], env=environ | size, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 65536) if select.select([leader], [], [], 60)[0] else b""
        except OSError:  # the last one has closed it
            part = b""
        if not part:
            break
        written += part
    os.close(leader)
    return process.wait(60), written.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def runs(_zygote: Callable[[], Zygote], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Four runs of four steps: "one" and "again" of one rank, "other" with another seed, "two" of two ranks, sharded.

    Yields:
        the folder of each by its name, and what `train` returned for the last under "tensors".
    """
    runtime, folder = Runtime(), tmp_path_factory.mktemp("runs")
    launch = Launch(runtime, folder / "jobs", _zygote)
    made: dict[str, Any] = {name: folder / name for name in ("one", "again", "other", "two")}
    launch.plain(1, train, str(made["one"]), 4).results()
    launch.plain(1, train, str(made["again"]), 4).results()
    launch.plain(1, train, str(made["other"]), 4, False, 1).results()
    made["tensors"] = launch.plain(2, train, str(made["two"]), 4, True).results()[0]
    yield made
    problems = runtime.close()
    assert not problems, "\n".join(problems)


def test_what_two_ranks_have_saved(runs: dict[str, Any], command: Command) -> None:
    store = runs["two"]
    listed = json.loads(command("ls", store, "--json").stdout)
    assert [(c["step"], c["state"], c["world_size"]) for c in listed["checkpoints"]] == [
        (4, "committed", 2), (2, "committed", 2),
    ]  # fmt: skip
    on_disk = sum(p.stat().st_size for p in (store / listed["checkpoints"][0]["name"]).glob("r*"))
    assert listed["checkpoints"][0]["bytes"] == on_disk

    found = json.loads(command("inspect", f"file://{store}", "--json").stdout)
    assert {t["name"]: [t["dtype"], t["shape"]] for t in found["tensors"]} == runs["tensors"]
    layouts = {t["name"]: t["layout"]["kind"] for t in found["tensors"]}
    assert layouts["model/0.weight"] == layouts["optimizer/state/0.weight/exp_avg"] == "slabs"
    values = json.loads(command("inspect", store, "--values", "--rank", "1", "--json").stdout)["values"]
    plain = {value["path"]: value["value"] for value in values}
    assert plain["best"] == 0.5
    assert plain["optimizer/param_groups/0/lr"] == 0.01
    assert "model" not in plain


def test_a_flipped_bit_is_damage(runs: dict[str, Any], command: Command) -> None:
    assert command("verify", runs["two"], "--all").returncode == 0
    with damaged(runs["two"], Damage("r00001-*", "flip", -1)) as path:
        ended = command("verify", runs["two"], "--json")
        assert ended.returncode == 12
        assert path.name in json.loads(ended.stdout)["checkpoints"][0]["damage"][0]["file"]
        assert command("diff", runs["two"], runs["one"]).returncode == 12
    assert command("verify", runs["two"], "--step", "3").returncode == 10


def test_nothing_of_a_good_run_is_garbage(runs: dict[str, Any], command: Command, tmp_path: Path) -> None:
    copy = shutil.copytree(runs["two"], tmp_path / "copy")
    (copy / "step-000000000002.e00001" / "COMMIT").unlink()
    ended = command("gc", copy, "--older-than", "0", "--delete")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert sorted(path.name for path in copy.iterdir()) == ["epochs", "step-000000000004.e00001"]
    assert command("verify", copy, "--all").returncode == 0


def test_the_difference_between_two_runs(runs: dict[str, Any], command: Command) -> None:
    same = command("diff", runs["one"], runs["again"])
    assert (same.returncode, same.stderr) == (0, ""), same.stdout
    other = command("diff", runs["one"], runs["other"], "--json", "-m", "model/*", "-m", "optimizer/*")
    assert (other.returncode, other.stderr) == (1, "")
    document = json.loads(other.stdout)
    differing = {each["name"] for each in document["tensors"]["different"]}
    assert {"model/0.weight", "optimizer/state/0.weight/exp_avg"} <= differing
    assert "optimizer/state/0.weight/step" not in differing
    assert document["values"]["different"] == []


def test_the_layout_is_no_difference(runs: dict[str, Any], command: Command) -> None:
    # Both ranks have the same data: but for rounding nothing depends on how many there are.
    patterns = ["-m", "model/*", "-m", "optimizer/*"]
    ended = command("diff", runs["one"], runs["two"], *patterns, "--tolerance", "1e-5", "--json")
    assert ended.returncode == 0, ended.stdout
    assert json.loads(ended.stdout)["tensors"]["equal"] == len(runs["tensors"])


def test_errors_say_what_where_and_what_to_do(command: Command, tmp_path: Path) -> None:
    for arguments, status in (
        (["ls"], 2),
        (["ls", "nosuch://x"], 2),
        (["inspect", tmp_path], 10),
        (["verify", tmp_path, "--json"], 10),
        (["diff", tmp_path, tmp_path], 10),
        (["gc", tmp_path, "--older-than", "soon"], 2),
        (["status"], 20),
        (["status", "--json"], 20),
    ):
        ended = command(*arguments)
        assert ended.returncode == status, arguments
        assert "Traceback" not in ended.stderr
        assert ended.stderr.startswith(("error: ", "Usage: ")), arguments
        if "--json" in arguments:
            assert json.loads(ended.stdout)["error"]["what"] in ended.stderr
        else:
            assert ended.stdout == ""


def test_the_agents_of_the_node(launch: Launch, runtime: Runtime, command: Command, tmp_path: Path) -> None:
    with launch.plain(1, hold, str(tmp_path / "run")) as job:
        job.wait_for("ready")
        ended = command("status", "--json")
        assert (ended.returncode, ended.stderr) == (0, "")
        (agent,) = json.loads(ended.stdout)["agents"]
        (rank,) = agent["status"]["ranks"]
        assert rank["pid"] == job.reports()[0]["pid"]
        assert (rank["step"], rank["committed"], rank["store"]) == (1, 1, f"file://{tmp_path}/run")
        shown = command("status", "--job", rank["job"]).stdout
        assert f"job {rank['job']}" in shown
        assert "committed" in shown
        assert command("status", "--job", "another").returncode == 10
        status, out = on_terminal(["status"], runtime.environ)
        assert status == 0
        assert "\x1b[" in out
        (process,) = runtime.agents()
        os.kill(process.pid, signal.SIGSTOP)
        try:
            quick, agents.ASK_TIMEOUT = agents.ASK_TIMEOUT, 0.3
            silent = cli("status", "--dir", runtime.sockets, "--json")
        finally:
            agents.ASK_TIMEOUT = quick
            os.kill(process.pid, signal.SIGCONT)
        assert silent.status == 3
        assert json.loads(silent.out)["agents"][0]["error"]["code"] == "agent-unavailable"
        job.go("end")
        assert job.wait() == [0]


def test_a_save_that_is_running_is_no_garbage(
    launch: Launch, runtime: Runtime, command: Command, tmp_path: Path
) -> None:
    store = tmp_path / "run"
    runtime.arm("before_commit")
    with launch.plain(1, hold, str(store)) as job:
        runtime.reached("before_commit")
        ended = command("gc", store, "--older-than", "0", "--delete", "--json")
        assert ended.returncode == 0
        (garbage,) = json.loads(ended.stdout)["garbage"]
        assert garbage["fate"] == "running"
        runtime.let_go("before_commit")
        job.wait_for("ready")
        job.go("end")
        assert job.wait() == [0]
    assert command("verify", store).returncode == 0


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("arguments", [["ls"], ["inspect"], ["verify"], ["inspect", "--values"]], ids=" ".join)
def test_on_a_terminal(runs: dict[str, Any], runtime: Runtime, arguments: list[str], columns: int) -> None:
    call = [arguments[0], runs["one"], *arguments[1:]]
    status, out = on_terminal(call, runtime.environ | {"NO_COLOR": "1"}, columns)
    assert status == 0
    if arguments != ["verify"]:  # which has a bar, and that moves the cursor
        assert "\x1b" not in out
    still = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.split("\r")[-1])
    results = [line for line in still.splitlines() if "file://" not in line]
    assert results
    assert max(map(len, results)) <= columns


def test_colours_on_a_terminal(runs: dict[str, Any], runtime: Runtime) -> None:
    assert "\x1b[1m" in on_terminal(["inspect", runs["one"]], runtime.environ)[1]


def test_a_reader_that_goes_away(runs: dict[str, Any], runtime: Runtime) -> None:
    call = [*CKPTSVC, "inspect", str(runs["one"])]
    process = subprocess.Popen(call, env=runtime.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(60) == 141


def test_an_interrupt(runtime: Runtime) -> None:
    agent = runtime.start_agent()
    call = [*CKPTSVC, "status", "--watch"]
    with subprocess.Popen(
        call, env=runtime.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        eventually(lambda: "cygrpc" in Path(f"/proc/{process.pid}/maps").read_text(), "it to ask the agent")
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(60) == 130
        assert time.monotonic() - began < 2
        assert "Traceback" not in process.stderr.read()
    agent.terminate()
    assert agent.wait(60) == 0


def test_no_command_needs_torch() -> None:
    names = ("convert", "diff", "gc", "inspect", "ls", "status", "verify")
    imports = ", ".join(f"ckptsvc.cli.{name}" for name in names)
    code = f"import sys, {imports}; print('torch' in sys.modules, 'rich' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "False False\n"
