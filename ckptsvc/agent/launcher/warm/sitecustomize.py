"""What a warm interpreter does between its own start and the script: import, wait, fork a rank whenever one is wanted.

The keeper starts the ranks' very command, `python -u train.py ...`, with this directory in PYTHONPATH. The interpreter
imports `sitecustomize` when it is ready to run and before it has looked at the script (docs.python.org/3/library/site).
It stays in here: it imports what ranks will need, and forks one for every request. In the fork the import returns, and
the interpreter goes on as it always does: sys.argv, sys.path, `__main__`, -m, tracebacks and exit status are its own
doing, not an imitation. What differs from a new interpreter: modules are loaded already, with the environment of the
launcher, which is the ranks' but for RANK and the like; and /proc/PID/environ shows that environment.

Forking is safe while there is one thread and no device is open. Where that is not so, where a module would be another
one in the script's own directory, or where it takes more memory than allowed, it says why and ends: ranks then start
without it. Standard library only: whether ckptsvc can be imported is not known here.

    keeper -> warm   {rank, variables} + output
    warm -> keeper   {ready, mib}, {cannot}; {rank, pid} for every rank
"""

import contextlib
import ctypes
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import os
import signal
import socket
import sys
import time
from typing import Any, NoReturn

VARIABLE = "CKPTSVC_WARM"
MAX_MESSAGE = 128 << 10
HERE = os.path.dirname(os.path.abspath(__file__))

_PR_SET_PDEATHSIG = 1
_HARMLESS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/shm/", "/dev/pts/")


def hand_on() -> None:
    """Run the sitecustomize that would have been imported without this one, in its own name."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


def serve(spec: dict[str, Any]) -> None:
    """Import, then fork a rank for every request. Returns in the rank only."""
    keeper = socket.socket(fileno=spec["fd"])
    keeper.set_inheritable(False)
    why = load(spec["preload"]) or reason_against(spec)
    if why:
        give_up(keeper, why)
    gc.collect()
    gc.freeze()  # so that the collector does not touch, and copy, the pages that ranks share
    keeper.send(json.dumps({"ready": True, "mib": private_mib()}).encode())
    while True:
        data, fds, _, _ = socket.recv_fds(keeper, MAX_MESSAGE, 1)
        if not data:
            os._exit(0)  # the keeper is gone
        request = json.loads(data)
        middle = os.fork()
        if not middle:
            # The process in the middle ends at once, so that the rank becomes a child of the keeper, the subreaper.
            rank = os.fork()
            if rank:
                keeper.send(json.dumps({"rank": request["rank"], "pid": rank}).encode())
                os._exit(0)
            keeper.close()
            become(request["variables"], fds[0], spec["keeper"])
            return
        os.close(fds[0])
        os.waitpid(middle, 0)


def load(names: list[str]) -> str:
    """Import all; returns why not, or "". It is of no use without the first; others may be absent."""
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001  whatever it is, the script must meet it itself, or not at all
            if name == names[0]:
                return f"{name} cannot be imported: {type(error).__name__}: {error}"
    return ""


def reason_against(spec: dict[str, Any]) -> str:
    """Why no rank can be forked from this process; "" if all is well."""
    child = os.fork()  # OpenBLAS ends its threads before a fork, and starts them again when it needs them
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"{threads - 1} threads run after the import of {', '.join(spec['preload'])}"
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.startswith("/dev/") and not path.startswith(_HARMLESS):
                return f"{path} is open after the import of {', '.join(spec['preload'])}"
    if private_mib() > spec["memory"] >> 20:
        return f"it takes {private_mib()} MiB, and {spec['memory'] >> 20} are allowed"
    return shadowed(spec["first"])


def shadowed(directory: str) -> str:
    """Whether a module that is loaded would be another one for the script, whose directory comes first in sys.path."""
    with contextlib.suppress(OSError):
        for entry in os.listdir(directory):
            name, _, kind = entry.partition(".")
            loaded = sys.modules.get(name)
            origin = getattr(loaded, "__file__", None) or ""
            package = os.path.exists(os.path.join(directory, entry, "__init__.py"))
            if loaded is None or not (package or kind in ("py", "pyc") or kind.endswith("so")):
                continue
            where = os.path.dirname(os.path.dirname(origin) if hasattr(loaded, "__path__") else origin)
            if os.path.realpath(where) != os.path.realpath(directory):
                return f"{os.path.join(directory, entry)} stands in the way of module {name}"
    return ""


def private_mib() -> int:
    """Memory that is this process's own, in MiB; 0 where the kernel does not tell (proc(5), smaps_rollup)."""
    try:
        with open("/proc/self/smaps_rollup") as file:
            return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) >> 10
    except OSError:
        return 0


def give_up(keeper: socket.socket, why: str) -> NoReturn:
    """No rank will be forked from here."""
    keeper.send(json.dumps({"cannot": why[:1000]}).encode())
    os._exit(0)


def become(variables: dict[str, str], output: int, keeper: int) -> None:
    """Be a rank: a child of the keeper, with its own session, output and environment."""
    while os.getppid() != keeper:  # until the process in the middle has ended
        if os.getppid() == 1:
            os._exit(1)  # the keeper has ended too
        time.sleep(0.0005)
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != keeper:
        os._exit(1)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.update(variables)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # each new interpreter draws its own, as `random` does after a fork by itself


_spec = os.environ.pop(VARIABLE, None)
if _spec == "trial":
    os._exit(0)  # it has come here, which is all that was to be found out
if _spec is not None:
    _given = json.loads(_spec)
    if _given["pythonpath"] is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = _given["pythonpath"]
hand_on()
if _spec is not None:
    try:
        serve(_given)
    except BaseException:  # noqa: BLE001  the interpreter would say so and go on: with the script, as no rank at all
        os._exit(1)
