"""Stand-ins for DAOS' client: libdfs, compiled for the test, and pydaos. What they do is said in libdfs.c."""

import ctypes
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent


def compiler() -> str | None:
    """The C compiler, if there is one."""
    return shutil.which("gcc") or shutil.which("cc")


def build(folder: Path) -> Path:
    """Compile the stand-in for libdfs."""
    library = folder / "libdfs.so"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler(), *options, "-o", library, SOURCE / "libdfs.c", "-lpthread"], check=True)
    return library


class Standin:
    """A DAOS of the test's own: one pool, one container, and the faults that calls meet.

    Attributes:
        library: path of libdfs.so.
        root: the value of STANDIN_DAOS.
        container: the directory that holds what is in the container.
    """

    def __init__(self, library: Path, root: Path) -> None:
        self.library, self.root, self.container = library, root, root / "pool" / "cont"
        self.container.mkdir(parents=True)
        self.agent = root / "agent"
        self.agent.touch()
        self._calls = ctypes.CDLL(str(library))
        self._calls.standin_fault.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 4, ctypes.c_bool]
        self._calls.standin_gate.argtypes = [ctypes.c_char_p, ctypes.c_int]

    def fault(
        self, call: str, error: int = 0, *, skip: int = 0, times: int = 1, delay_ms: int = 0, after: bool = False
    ) -> None:
        """Let `times` calls go wrong after the first `skip`: see standin_fault."""
        self._calls.standin_fault(call.encode(), skip, times, error, delay_ms, after)

    def gate(self, call: str, wanted: int) -> None:
        """Hold every such call until so many are in it at once, for up to 20 s."""
        self._calls.standin_gate(call.encode(), wanted)

    def peak(self) -> int:
        """Most calls that were in the gate at once."""
        return int(self._calls.standin_peak())

    def reset(self) -> None:
        """No faults and no gate any more."""
        self._calls.standin_reset()

    def sizes(self) -> list[int]:
        """Bytes of the structures, as the compiler has them."""
        found = (ctypes.c_long * 5)()
        self._calls.standin_sizes(found)
        return list(found)
