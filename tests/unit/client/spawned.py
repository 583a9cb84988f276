"""Runs a function in N processes with a gloo process group.

    results = run(4, function, "argument")     # function(rank, "argument") in each, from a test module

Each process is a fresh interpreter that loads the function's file. Arguments and results are JSON. When one
fails or all take too long, the rest are ended and the failures' output is in the AssertionError.
"""

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT = 100.0  # a machine may be busy; pytest ends the test after 120


def run(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What `function(rank, *arguments)` returned on each rank."""
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        job = {
            "file": inspect.getfile(function),
            "function": function.__name__,
            "arguments": arguments,
            "world_size": world_size,
            "folder": folder,
        }
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        processes = []
        for rank in range(world_size):
            command = [sys.executable, __file__, str(rank), json.dumps(job)]
            with Path(folder, f"{rank}.log").open("wb") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        try:
            _wait(processes, time.monotonic() + timeout)
        finally:
            statuses = [process.poll() for process in processes]
            for process in processes:
                process.kill()
                process.wait()
        failed = [rank for rank, status in enumerate(statuses) if status != 0]
        if failed:
            said = [f"--- rank {r}, exit {statuses[r]}\n{Path(folder, f'{r}.log').read_text()}" for r in failed]
            raise AssertionError(f"{function.__name__} on {world_size} ranks failed\n" + "\n".join(said))
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world_size)]


def _wait(processes: list["subprocess.Popen[bytes]"], deadline: float) -> None:
    """Until all have ended, or a while after the first failure, or the deadline."""
    while time.monotonic() < deadline:
        statuses = [process.poll() for process in processes]
        if None not in statuses:
            return
        if any(statuses):
            deadline = min(deadline, time.monotonic() + 1.0)  # let the others tell what they saw
        time.sleep(0.02)


def _child(rank: int, job: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(Path(job["file"]).stem, job["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    store = dist.FileStore(str(Path(job["folder"], "rendezvous")), job["world_size"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job["world_size"])
    result = getattr(module, job["function"])(rank, *job["arguments"])
    Path(job["folder"], f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _child(int(sys.argv[1]), json.loads(sys.argv[2]))
