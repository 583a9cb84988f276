"""A private Slurm cluster on this host: munged, slurmctld, and a slurmd for each of several virtual nodes.

Nothing outside its own folder is touched, and every daemon is a child of the test: `stop` ends them and all that they
have started.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from harness.runtime import eventually

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin"))
COMMAND_TIMEOUT = 30.0

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
PlugStackConfig=/dev/null
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
ReturnToService=2
TopologyPlugin=topology/{topology}
MessageTimeout=5
SlurmdTimeout=10
KillWait=5
JobRequeue=1
{nodes}
PartitionName=main Nodes=n[1-{count}] Default=YES MaxTime=INFINITE State=UP
"""

NODE = (
    "NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 SocketsPerBoard=1"
    " CoresPerSocket=2 ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN"
)


def missing() -> str:
    """Why there can be no cluster here; "" if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if absent:
        return f"Slurm is not installed ({', '.join(absent)}): apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "Slurm's daemons need root"


class Slurm:
    """A running cluster.

    Args:
        switches: the nodes at each leaf switch, below one that joins them; none: Slurm knows of no switches.

    Attributes:
        environ: for the commands that talk to it, and for jobs.
    """

    def __init__(self, folder: Path, environ: dict[str, str], nodes: int, switches: Sequence[str] = ()) -> None:
        self._folder, self._count = folder, nodes
        for name in ("state", "spool", "munge"):
            (folder / name).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        with contextlib.ExitStack() as held:
            ports = [held.enter_context(socket.socket()) for _ in range(nodes + 1)]
            for port in ports:
                port.bind(("127.0.0.1", 0))
            numbers = [port.getsockname()[1] for port in ports]
        lines = [NODE.format(number=n, host=host, port=numbers[n]) for n in range(1, nodes + 1)]
        self.configuration = folder / "slurm.conf"
        self.configuration.write_text(
            CONFIGURATION.format(
                host=host,
                folder=folder,
                port=numbers[0],
                nodes="\n".join(lines),
                count=nodes,
                topology="tree" if switches else "none",
            )
        )
        leaves = [f"SwitchName=s{number} Nodes={names}\n" for number, names in enumerate(switches)]
        (folder / "topology.conf").write_text("".join([*leaves, f"SwitchName=top Switches=s[0-{len(leaves) - 1}]\n"]))
        self.environ = environ | {"SLURM_CONF": str(self.configuration), "PATH": PATH}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the daemons; all nodes are idle then."""
        munge, conf = self._folder / "munge", str(self.configuration)
        key = munge / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        options = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        files = [f"--{option}={munge / name}" for option, name in options.items()]
        self._spawn("munged", "--foreground", "--force", *files)
        eventually((munge / "socket").exists, "munged to listen")
        self._spawn("slurmctld", "-D", "-c", "-f", conf)
        for number in range(1, self._count + 1):
            self._spawn("slurmd", "-D", "-N", f"n{number}", "-f", conf)

        def idle() -> bool:
            return (
                self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split() == ["idle"] * self._count
            )

        eventually(idle, f"all nodes to be idle\n{self.log()}", 60)

    def run(self, *command: str, check: bool = True, **environ: str) -> str:
        """What a command of Slurm's prints."""
        ended = subprocess.run(
            command,
            env=self.environ | environ,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT,
            check=False,
        )
        assert not check or ended.returncode == 0, f"{command}: {ended.stderr}\n{self.log()}"
        return ended.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job: JobState, Restarts, ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", number, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def slurmd(self, node: str) -> int:
        """The process of a node's daemon."""
        (found,) = [daemon.pid for daemon in self._daemons if isinstance(daemon.args, list) and node in daemon.args]
        return found

    def log(self) -> str:
        """The end of every daemon's log."""
        logs = sorted(self._folder.glob("*.log"))
        return "\n".join(f"--- {p.name}\n" + "\n".join(p.read_text(errors="replace").splitlines()[-25:]) for p in logs)

    def stop(self) -> None:
        """Cancel all jobs and end the daemons."""
        with contextlib.suppress(subprocess.TimeoutExpired, AssertionError):
            self.run("scancel", "--user=root", check=False)
            eventually(lambda: not self.run("squeue", "--noheader", check=False).strip(), "the jobs to end", 30)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _spawn(self, program: str, *arguments: str) -> None:
        path = shutil.which(program, path=PATH)
        assert path is not None
        with open(self._folder / f"{program}.out", "ab") as output:
            daemon = subprocess.Popen(
                [path, *arguments],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        time.sleep(0.05)
