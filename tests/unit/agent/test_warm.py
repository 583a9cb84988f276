"""A rank that is forked from a warm interpreter is what `python -u script arguments` would be.

Each script is run both ways, and has to write the same. The warm interpreter imports something small here, not torch:
what it does is the same.
"""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptsvc.agent.launcher.ranks import Ranks
from ckptsvc.agent.launcher.standby import Standby, place_of, reason_against

ABOUT_ITSELF = """
import json, os, signal, sys
def say(**things): print(json.dumps(things, default=lambda value: type(value).__name__))
say(argv=sys.argv, orig=sys.orig_argv, path0=sys.path[0], path=sys.path)
say(main={name: value for name, value in vars(sys.modules["__main__"]).items() if name[:2] == "__" and name[2] != "b"})
say(name=__name__, file=__file__, flags=list(sys.flags), executable=sys.executable, prefix=sys.prefix)
say(environ={k: v for k, v in sorted(os.environ.items()) if k != "LC_CTYPE"}, rank=os.getenv("RANK"))
say(handlers=[(str(n), repr(signal.getsignal(n)).split(' at ')[0]) for n in sorted(signal.valid_signals())])
say(streams=[(s.encoding, s.errors, s.line_buffering, s.write_through, s.isatty()) for s in (sys.stdout, sys.stderr)])
say(input=sys.stdin.read(), session=os.getsid(0) == os.getpid() == os.getpgrp(), cwd=os.getcwd())
open_ = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3, 64) if os.path.islink(f"/proc/self/fd/{fd}")]
say(open=[name for name in open_ if name != __file__])
say(command=open("/proc/self/cmdline").read().split(chr(0)))
say(threads=len(os.listdir("/proc/self/task")), paths=sorted(p for p in sys.path if "warm" in p))
"""

SCRIPTS = {
    "it ends well": "print('fine')",
    "it ends with a status": "import sys; print(1); sys.exit(7)",
    "it ends with a message": "import sys; sys.exit('what went wrong')",
    "an exception": "def f(x):\n    return 1 / x\n\nprint('before')\nf(0)\n",
    "an exception with a cause": "try:\n    {}[1]\nexcept KeyError as e:\n    raise ValueError('outer') from e\n",
    "a hook for exceptions": "import sys\nsys.excepthook = lambda *a: print('hook', a[0])\n1/0\n",
    "a syntax error": "x = = 1\n",
    "it kills itself": "import os; os.kill(os.getpid(), 9)",
    "an interrupt": "import signal, os; os.kill(os.getpid(), signal.SIGINT)",
    "what is to be done at exit": "import atexit; atexit.register(print, 'bye'); print('hello')",
    "a thread outlives the script": (
        "import threading, time\n"
        "def late():\n    time.sleep(0.1); print(__name__, sorted(n for n in globals() if n[0] != '_'))\n"
        "threading.Thread(target=late).start()\n"
    ),
    "it imports its neighbour": "import neighbour; print(neighbour.__name__, neighbour.__file__)",
    "it spawns": (
        "import multiprocessing as mp\n"
        "def work(x): print('child', x, __name__)\n"
        "if __name__ == '__main__':\n"
        "    p = mp.get_context('spawn').Process(target=work, args=(5,)); p.start(); p.join(); print(p.exitcode)\n"
    ),
    "it forks": "import os; pid = os.fork(); os.write(1, b'x\\n'); pid and os.waitpid(pid, 0)",
    "it pickles a class of its own": (
        "import pickle\nclass A: pass\nprint(pickle.loads(pickle.dumps(A())).__class__.__module__)"
    ),
    "it runs another python": "import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', "
    '\'import os, sys; print(sys.path, os.environ.get("PYTHONPATH"), os.environ.get("CKPTSVC_WARM"))\']))',
}


def outcome(command, folder, warm, count=1, environ=None):
    """Run ranks; returns (their statuses, what each wrote, what was said of the warm interpreter)."""
    said, logs = [], folder / ("warm" if warm else "cold")
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(environ or {})}

    async def run():
        ranks = Ranks([sys.executable, "-u", *command], environ, warm, logs, lambda rank: None, said.append)
        try:
            await ranks.start(1, {rank: {"RANK": str(rank)} for rank in range(count)})
            while any(rank.status is None for rank in ranks.live.values()):
                await asyncio.sleep(0.01)
            statuses = [rank.status for rank in ranks.live.values()]
            await ranks.stop(0.0)
            return statuses
        finally:
            await ranks.close()

    statuses = asyncio.run(run())
    return statuses, [(logs / "attempt_1" / f"rank_{rank}.log").read_text() for rank in range(count)], said


def standby(script, *preload, module=False, memory=1 << 30):
    return Standby(preload or ("decimal",), memory).spec(place_of(str(script), module=module)[1])


def both_ways(command, script, folder, module=False, environ=None):
    cold = outcome(command, folder, None, environ=environ)
    warm = outcome(command, folder, standby(script, module=module), environ=environ)
    assert "standby: a warm interpreter" in warm[2][0], warm
    return cold[0] + cold[1][0].splitlines(), warm[0] + warm[1][0].splitlines()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (here / "neighbour.py").write_text("")
    monkeypatch.chdir(here)
    return here


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_does_and_writes_the_same(folder, name):
    script = folder / "train.py"
    script.write_text(SCRIPTS[name])
    cold, warm = both_ways(["train.py", "-x", "a b"], "train.py", folder)
    assert warm == cold


@pytest.mark.parametrize("way", ["relative", "absolute", "elsewhere", "link", "module", "package"])
def test_it_finds_itself_in_the_same_place(folder, tmp_path, way):
    script, module = folder / "train.py", way in ("module", "package")
    name, environ = "train.py", {}
    if way == "elsewhere":
        script, name = tmp_path / "there" / "train.py", "../there/train.py"
        script.parent.mkdir()
    elif way == "absolute":
        name = str(script)
    elif way == "link":
        (folder / "link.py").symlink_to(tmp_path / "there" / "train.py")
        script, name = tmp_path / "there" / "train.py", "link.py"
        script.parent.mkdir()
    elif way == "module":
        name = "train"
    elif way == "package":
        script, name = folder / "trains" / "__main__.py", "trains"
        script.parent.mkdir()
        (script.parent / "__init__.py").write_text("")
    script.write_text(ABOUT_ITSELF)
    cold, warm = both_ways([*(["-m"] if module else []), name, "--lr", "0.1"], name, folder, module, environ)
    assert warm == cold
    assert cold[0] == 0


@pytest.mark.parametrize("path", ["", "{folder}", "{folder}:/nonexistent"])
def test_the_path_for_modules_is_that_of_the_environment(folder, path):
    (folder / "train.py").write_text(ABOUT_ITSELF)
    cold, warm = both_ways(["train.py"], "train.py", folder, environ={"PYTHONPATH": path.format(folder=folder)})
    assert warm == cold


def test_a_sitecustomize_that_was_there_before_is_run(folder, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import sys; sys.customized = __name__, __file__")
    (folder / "train.py").write_text("import sys, sitecustomize; print(sys.customized, sitecustomize.__file__)")
    cold, warm = both_ways(["train.py"], "train.py", folder, environ={"PYTHONPATH": str(site)})
    assert warm == cold
    assert str(site) in warm[1]


def test_ranks_draw_numbers_of_their_own(folder):
    (folder / "train.py").write_text(
        "import os, random, uuid, numpy; print(random.random(), numpy.random.rand(), uuid.uuid4())"
    )
    _, written, _ = outcome(["train.py"], folder, standby("train.py", "decimal", "numpy"), count=3)
    assert len({number for text in written for number in text.split()}) == 9


def test_what_is_imported_is_there_and_each_rank_has_it_to_itself(folder):
    (folder / "train.py").write_text(
        "import os, sys; print('decimal' in sys.modules, os.getppid())\n"
        "import decimal; decimal.getcontext().prec += int(os.environ['RANK']); print(decimal.getcontext().prec)"
    )
    _, written, _ = outcome(["train.py"], folder, standby("train.py", "decimal", "numpy"), count=3)
    assert [text.split()[0] for text in written] == ["True"] * 3
    assert [text.split()[2] for text in written] == ["28", "29", "30"]
    assert len({text.split()[1] for text in written}) == 1, "all are children of the keeper"


class TestReasonsAgainst:
    """Ranks then start without it, and somebody is told why."""

    def refused(self, folder, *preload, **changes):
        (folder / "train.py").write_text("import sys; print('decimal' in sys.modules)")
        statuses, written, said = outcome(["train.py"], folder, standby("train.py", *preload, **changes), count=2)
        assert statuses == [0, 0]
        assert written == ["False\n"] * 2
        assert said[0].startswith("no standby: ")
        return said[0]

    def test_the_first_module_is_not_there(self, folder):
        assert "nonexistent cannot be imported: ModuleNotFoundError" in self.refused(folder, "nonexistent", "decimal")

    def test_a_module_ends_the_interpreter(self, folder, tmp_path, monkeypatch):
        self.module(tmp_path, monkeypatch, "import sys; sys.exit(3)")
        assert "disturbing cannot be imported: SystemExit: 3" in self.refused(folder, "disturbing")

    def test_a_module_kills_the_interpreter(self, folder, tmp_path, monkeypatch):
        self.module(tmp_path, monkeypatch, "import os; os._exit(3)")
        assert "the warm interpreter has ended" in self.refused(folder, "disturbing")

    def test_threads_run(self, folder, tmp_path, monkeypatch):
        self.module(
            tmp_path,
            monkeypatch,
            "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()",
        )
        assert "1 threads run after the import of decimal, disturbing" in self.refused(folder, "decimal", "disturbing")

    def test_a_device_is_open(self, folder, tmp_path, monkeypatch):
        self.module(tmp_path, monkeypatch, "device = open('/dev/ptmx')")
        assert "/dev/ptmx is open" in self.refused(folder, "disturbing")

    def test_it_takes_too_much_memory(self, folder):
        assert "MiB, and 1 are allowed" in self.refused(folder, "decimal", memory=1 << 20)

    def test_the_script_has_a_module_of_that_name_beside_it(self, folder):
        (folder / "decimal.py").write_text("")
        (folder / "train.py").write_text("")
        _, _, said = outcome(["train.py"], folder, standby("train.py"))
        assert "decimal.py stands in the way of module decimal" in said[0]

    def test_or_a_package(self, folder):
        (folder / "decimal").mkdir()
        (folder / "decimal" / "__init__.py").write_text("")
        (folder / "train.py").write_text("")
        _, _, said = outcome(["train.py"], folder, standby("train.py"))
        assert "stands in the way of module decimal" in said[0]

    def test_but_a_folder_that_is_no_package_does_not(self, folder):
        (folder / "decimal").mkdir()
        (folder / "train.py").write_text("")
        _, _, said = outcome(["train.py"], folder, standby("train.py"))
        assert "standby: a warm interpreter" in said[0]

    def module(self, tmp_path, monkeypatch, text):
        (tmp_path / "disturbing.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")


def test_a_warm_interpreter_that_dies_is_done_without(folder):
    (folder / "train.py").write_text("print('ran')")

    async def run():
        said = []
        ranks = Ranks(
            [sys.executable, "train.py"], os.environ, standby("train.py"), folder, lambda rank: None, said.append
        )
        try:
            await ranks.open()
            while not said:
                await asyncio.sleep(0.01)
            (warm,) = children(ranks._process.pid)
            os.kill(warm, 9)
            while len(said) < 2:
                await asyncio.sleep(0.01)
            await ranks.start(1, {0: {}})
            while ranks.live[0].status is None:
                await asyncio.sleep(0.01)
            assert ranks.live[0].status == 0
            assert said[1] == "no standby: the warm interpreter has ended"
            await ranks.stop(0.0)
        finally:
            await ranks.close()

    asyncio.run(run())


def test_a_rank_that_waits_for_it_can_be_stopped(folder, tmp_path, monkeypatch):
    """It is never started then, also not when the interpreter is ready."""
    (tmp_path / "slow.py").write_text("import time; time.sleep(1)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    (folder / "train.py").write_text("open('ran', 'w')")

    async def run():
        said, ended = [], []
        command = [sys.executable, "train.py"]
        ranks = Ranks(command, os.environ, standby("train.py", "slow"), folder, ended.append, said.append)
        try:
            for grace in (5.0, 0.0):
                await ranks.start(1, {0: {}, 1: {}})
                assert await ranks.stop(grace) == []
            assert [rank.status for rank in ended] == [-9] * 4
            while not said:
                await asyncio.sleep(0.01)
            assert "standby: a warm interpreter" in said[0]
            await ranks.start(2, {0: {}})
            await ranks.stop(0.0)  # now it is being forked
        finally:
            await ranks.close()

    asyncio.run(run())
    assert len(list(folder.glob("attempt_*/rank_*"))) == 3


def test_an_interpreter_that_does_not_look_there_is_not_mistaken_for_one(folder):
    """Without the trial it would run the script as no rank."""
    (folder / "train.py").write_text("import os; print(os.environ['RANK'])")
    wrapper = folder / "python"
    wrapper.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)

    async def run():
        said = []
        command = [str(wrapper), "train.py"]
        ranks = Ranks(command, os.environ, standby("train.py"), folder, lambda rank: None, said.append)
        try:
            await ranks.start(1, {0: {"RANK": "0"}})
            while ranks.live[0].status is None:
                await asyncio.sleep(0.01)
            assert ranks.live[0].status == 0
            assert "imports no sitecustomize from PYTHONPATH" in said[0]
            await ranks.stop(0.0)
        finally:
            await ranks.close()

    asyncio.run(run())
    assert (folder / "attempt_1" / "rank_0.log").read_text() == "0\n"


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize(
    "line",
    [
        'os.environ["OMP_NUM_THREADS"] = "4"',
        "os.environ.setdefault('MKL_NUM_THREADS', '4')",
        "os.putenv( 'OPENBLAS_NUM_THREADS', '4')",
        'os.environ.update({"TORCH_LOGS": "dynamo"})',
    ],
)
def test_a_script_that_sets_what_is_read_at_import_is_not_for_standby(tmp_path, line):
    (tmp_path / "train.py").write_text(f"import os\n{line}\nimport torch\n")
    assert "which is read when torch is loaded" in reason_against(tmp_path / "train.py")


@pytest.mark.parametrize(
    "line",
    ['os.environ["CUDA_VISIBLE_DEVICES"] = "0"', 'os.environ["NCCL_DEBUG"] = "INFO"', 'print("OMP_NUM_THREADS")', ""],
)
def test_others_are(tmp_path, line):
    (tmp_path / "train.py").write_text(f"import os\n{line}\n")
    assert reason_against(tmp_path / "train.py") == ""


def test_a_directory_is_not_for_standby(tmp_path):
    assert "is a directory" in reason_against(tmp_path)


def test_the_interpreter_alone_is_not_changed_by_the_directory():
    """A child of a rank that has the directory in its path by mistake runs as ever."""
    where = Path(reason_against.__globals__["DIRECTORY"])
    environ = {**os.environ, "PYTHONPATH": str(where)}
    ended = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.path)"], env=environ, capture_output=True, text=True
    )
    assert ended.returncode == 0
    assert str(where) not in ended.stdout
    assert ended.stderr == ""
