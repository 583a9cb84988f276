"""The documentation's pages: their blocks of code, and a shell in which those that say so are run.

    <!-- run -->            the next block is run: bash; console ("$ command", then what it prints); python
    <!-- run: slow -->      the same, in the slow tests only
    <!-- file: NAME -->     the next block is written to NAME

Blocks of one page share a folder, an environment and a shell. In what a console block shows, "..." in a line stands for
any text, and a line of only "..." for any lines.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[a-z]+)(?:: (?P<value>[^\n]+?))? -->\n)?```(?P<language>[a-z]*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_DONE = "===done==="


@dataclass(frozen=True)
class Block:
    """A block of code of a page; `mark` is "run", "file" or ""."""

    page: str
    line: int
    language: str
    text: str
    mark: str
    value: str

    @property
    def where(self) -> str:
        """For messages."""
        return f"docs/{self.page}:{self.line}"


def pages() -> dict[str, str]:
    """Name of every page in docs/ -> its text."""
    return {path.relative_to(DOCS).as_posix(): path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))}


def blocks(page: str, text: str) -> Iterator[Block]:
    """The blocks of code of a page."""
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page, line, found["language"], found["text"], found["mark"] or "", found["value"] or "")


def steps(block: Block) -> Iterator[tuple[str, str | None]]:
    """What of a block is to be run, one after the other, each with what it is to print (None: anything)."""
    if block.language == "console":
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            lines = part.splitlines(keepends=True)
            count = 1 + next(n for n, line in enumerate(lines) if not line.endswith("\\\n"))
            yield "".join(lines[:count]), "".join(lines[count:])
    elif block.language == "python":
        yield f"{sys.executable} - <<'END_OF_PYTHON'\n{block.text}END_OF_PYTHON\n", None
    else:
        yield block.text, None


def fits(shown: str, printed: str) -> bool:
    """Whether that is what was printed."""
    lines = [line.rstrip() for line in shown.splitlines()]
    pattern = ""
    for line in lines:
        pattern += r"(?:.*\n)*?" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + r"[ ]*\n"
    return re.fullmatch(pattern, printed if not printed or printed.endswith("\n") else f"{printed}\n") is not None


class Shell:
    """A bash in a private world: home, sockets and folder of its own. `close` ends all that was begun in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._private = Path(tempfile.mkdtemp(prefix="ckptsvc-docs-"))  # short: paths of sockets are
        self._process = subprocess.Popen(
            ["bash", "--norc", "-e"], cwd=folder, env=self._environment(), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        environment = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        bin_folder = self._private / "bin"
        bin_folder.mkdir()
        command = f'#!/bin/sh\nexec "{sys.executable}" -m ckptsvc.cli.main "$@"\n'
        (bin_folder / "ckptsvc").write_text(command)
        (bin_folder / "ckptsvc").chmod(0o755)
        return environment | {
            "HOME": str(self._private),
            "PATH": f"{bin_folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'storage_drivers'}",
            "CKPTSVC_AGENT_SOCKET_DIR": str(self._private / "sockets"),
            "OMP_NUM_THREADS": "1",
        }

    def run(self, command: str, timeout: float = 100.0) -> tuple[int, str]:
        """Run something; returns its exit status and what it printed. The status of a failure ends nothing here."""
        assert self._process.stdin is not None
        text = f"set +e; {{ :\n{command}\n}} 2>&1; echo; echo {_DONE}$?\n"
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()
        return self._answer(command, time.monotonic() + timeout)

    def _answer(self, command: str, deadline: float) -> tuple[int, str]:
        assert self._process.stdout is not None
        output, descriptor = b"", self._process.stdout.fileno()
        while not (found := re.search(rf"\n{_DONE}(\d+)\n".encode(), output)):
            if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError(f"{command}\nhas not ended; so far:\n{output.decode(errors='replace')}")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise RuntimeError(f"{command}\nhas ended the shell:\n{output.decode(errors='replace')}")
            output += piece
        return int(found[1]), output[: found.start()].decode(errors="replace")

    def close(self) -> None:
        """End the shell, its jobs, and the agents that they have started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        left = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal() and self._is_ours(path)]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + 10
            while any(Path(f"/proc/{pid}").exists() for pid in left) and time.monotonic() < deadline:
                time.sleep(0.05)
        shutil.rmtree(self._private, ignore_errors=True)

    def _is_ours(self, path: Path) -> bool:
        try:
            return f"HOME={self._private}".encode() in path.joinpath("environ").read_bytes().split(b"\0")
        except OSError:
            return False
