"""Network cards that are not there: the files a driver shows of them, with the names, formats and widths of real ones.

card = Cassini("cxi0", version=2)
card.count("pct_spt_timeouts", 64)
card.write(root, now)          # ... or card.values(now), without any file

`cassini_telemetry_names.txt` lists every item of a Cassini 2 (from HPE's shs-cassini-headers); a Cassini 1 has all but
`ONLY_CASSINI_2`. The trees are linked as sysfs links them: class -> device, and `device` back to the PCI function.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ckptsvc.control.nic_counters import CASSINI, HANDLER, INFINIBAND, Value, parse

NAMES = tuple(Path(__file__).with_name("cassini_telemetry_names.txt").read_text().split())

ONLY_CASSINI_2 = re.compile(
    r"hni_pcs_corrected_cw_bin_\d+|hni_pcs_fecl_errors_([89]|1\d)|oxe_s[mp]t_cdt_errs|hni_mac_tx_ifg_adjustment_sync"
    r"|hni_llr_(rx_ack_nack_error|tx_bad_lossless|tx_bad_lossless_rpt|tx_bad_lossy|tx_llr_blocked|tx_llr_unblocked)"
)

NOT_ITEMS = ("reset_counters", "ALL-in-binary")
"""What some releases have beside the items."""

HANDLER_FILES = (
    *("spt_timeouts", "spt_timeouts_u", "spt_timeouts_o", "connections_cancelled", "pkts_cancelled_u"),
    *("pkts_cancelled_o", "cancel_no_matching_conn", "cancel_resource_busy", "cancel_trs_pend_rsp"),
    *("cancel_tct_closed", "nacks", "nack_no_target_trs", "nack_no_target_mst", "nack_no_target_conn"),
    *("nack_no_matching_conn", "nack_resource_busy", "nack_trs_pend_rsp", "nack_sequence_error", "sct_timeouts"),
    *("tct_timeouts", "accel_close_complete", "ignored_sct_timeouts", "srb_in_use", "spt_in_use", "smt_in_use"),
    *("sct_in_use", "trs_in_use", "mst_in_use", "tct_in_use", "rh_sct_status_change", "nid_value"),
    *("parked_nids", "max_parked_nids", "parked_switches", "max_parked_switches"),
)

WRAP = 1 << 56
_DECIDING = [c.file.removeprefix("telemetry/") for c in CASSINI if c.file.startswith("telemetry/")]


class Cassini:
    """One card, at rest.

    Args:
        name: "cxi0" and so on.
        version: 1 or 2.
        start: what every counter says at first.
        whole: write every item of the card, not only those that are read.
    """

    def __init__(self, name: str = "cxi0", version: int = 1, start: int = 0, whole: bool = False) -> None:
        self.name, self.version, self._whole = name, version, whole
        self.items = {n: start for n in NAMES if version == 2 or not ONLY_CASSINI_2.fullmatch(n)}
        self.handler = dict.fromkeys(HANDLER_FILES, 0)
        self.restarts = [0] * 10
        self.link = "up"
        self._restarted = 0
        self._written: set[Path] = set()

    def count(self, item: str, number: float) -> None:
        """A telemetry item rises, and wraps as the register does."""
        self.items[item] = (self.items[item] + round(number)) % WRAP

    def handle(self, file: str, number: int) -> None:
        """A count of the retry handler rises; it is printed as a signed number of 32 bits."""
        self.handler[file] = (self.handler[file] + number) % (1 << 32)

    def restart_link(self, clock: float) -> None:
        """The link comes up again by itself; the driver notes when, in a ring."""
        self.restarts[self._restarted % len(self.restarts)] = int(clock)
        self._restarted += 1

    def move(self, sent: float, received: float) -> None:
        """Bytes go over the wire."""
        self.count("hni_sts_tx_ok_octets", sent)
        self.count("hni_sts_rx_ok_octets", received)
        self.count("hni_pcs_good_cw", 39e6)

    def texts(self, clock: float) -> dict[str, str]:
        """The files that are read, by their path in the table, as the driver prints them at `clock` (Unix seconds)."""
        stamp = f"{int(clock)}.{int(clock % 1 * 1e9):09d}"
        found = {f"telemetry/{item}": f"{number}@{stamp}\n" for item, number in self._deciding()}
        found |= {f"link_restarts/time_{slot}": f"{at}\n" for slot, at in enumerate(self.restarts)}
        return found

    def handler_texts(self) -> dict[str, str]:
        """Those of the retry handler."""
        return {file: f"{n - (1 << 32) if n >= 1 << 31 else n}\n" for file, n in self.handler.items()}

    def values(self, clock: float) -> dict[str, Value]:
        """What a probe makes of the files that are read (without printing and reading them: it is done very often)."""
        stamp = round(clock * 1e9)
        found = {f"telemetry/{item}": Value(number, stamp) for item, number in self._deciding()}
        found |= {f"link_restarts/time_{slot}": Value(at) for slot, at in enumerate(self.restarts)}
        return found | {counter.file: Value(self.handler[counter.file]) for counter in HANDLER}

    def _deciding(self) -> Iterable[tuple[str, int]]:
        return ((item, self.items[item]) for item in _DECIDING)

    # ---- as files ----------------------------------------------------------------------------------------------------

    def write(self, root: Path, clock: float) -> None:
        """Write the tree below `root`: all of it at first, then the files that are read."""
        device = self.device(root)
        if device not in self._written:
            self._make(root, device, clock)
            self._written.add(device)
        for file, text in self.texts(clock).items():
            if (device / file).exists():  # a test may have taken it away
                put(device / file, text)
        put(device / self._link_file, self.link if self.version == 1 else f"{self.link}\n")
        if self.handler_directory(root).is_dir():
            for file, text in self.handler_texts().items():
                put(self.handler_directory(root) / file, text)

    def device(self, root: Path) -> Path:
        """The directory of its PCI function."""
        return root / f"sys/devices/pci0000:20/0000:{0x20 + int(self.name[3:]):x}:00.0"

    def handler_directory(self, root: Path) -> Path:
        """Where its retry handler shows itself."""
        return root / "run/cxi" / self.name

    def remove(self, root: Path) -> None:
        """The driver lets the card go."""
        (root / "sys/class/cxi" / self.name).unlink()

    @property
    def _link_file(self) -> str:
        return "port/link" if self.version == 1 else "port/0/link/state"

    def _make(self, root: Path, device: Path, clock: float) -> None:
        for folder in ("telemetry", "link_restarts", Path(self._link_file).parent, "properties", "fru", "uc"):
            (device / folder).mkdir(parents=True)
        stamp = f"{int(clock)}.{int(clock % 1 * 1e9):09d}"
        for item, number in self.items.items() if self._whole else self._deciding():
            put(device / "telemetry" / item, f"{number}@{stamp}\n", mode=0o444)
        for entry in NOT_ITEMS:
            put(device / "telemetry" / entry, "", mode=0o200)
        for slot in range(10):
            put(device / f"link_restarts/time_{slot}", "0\n", mode=0o444)
        for name, text in {
            "nid": "61174\n",
            "cassini_version": f"{self.version}.0\n",
            "pcie_uncorr_err": "0\n",
        }.items():
            put(device / "properties" / name, text)
        own = device / "cxi" / self.name
        own.mkdir(parents=True)
        (own / "device").symlink_to("../../../" + device.name)
        classes = root / "sys/class/cxi"
        classes.mkdir(parents=True, exist_ok=True)
        (classes / self.name).symlink_to(Path("../../..") / own.relative_to(root))
        (self.handler_directory(root) / "config").mkdir(parents=True)
        put(self.handler_directory(root) / "config/max_spt_retries", "4\n")


class Port:
    """One port of an InfiniBand or RoCE card, at rest."""

    def __init__(self, device: str = "mlx5_0", port: int = 1, roce: bool = False) -> None:
        self.device, self.port, self.roce = device, port, roce
        self.counts = {counter.file: 0 for counter in INFINIBAND}
        self.state = "4: ACTIVE"

    def directory(self, root: Path) -> Path:
        """Where it shows itself."""
        return root / "sys/class/infiniband" / self.device / "ports" / str(self.port)

    def count(self, name: str, number: int) -> None:
        """A counter rises."""
        self.counts[next(file for file in self.counts if file.endswith(f"/{name}"))] += number

    def values(self, _clock: float = 0.0) -> dict[str, Value]:
        """What a probe makes of its files."""
        return {file: parse(f"{number}\n".encode()) for file, number in self.counts.items()}

    def write(self, root: Path, _clock: float = 0.0) -> None:
        """Write its files below `root`."""
        directory = self.directory(root)
        for folder in ("counters", "hw_counters"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        for file, number in self.counts.items():
            put(directory / file, f"{number}\n")
        put(directory / "hw_counters/lifespan", "10\n")
        put(directory / "state", f"{self.state}\n")
        put(directory / "phys_state", "5: LinkUp\n")
        put(directory / "link_layer", "Ethernet\n" if self.roce else "InfiniBand\n")


def put(path: Path, text: str, mode: int | None = None) -> None:
    """Write a file in one go: a reader sees the old text or the new one."""
    new = path.with_name(f".{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    new.write_text(text)
    if mode is not None:
        new.chmod(mode)
    os.replace(new, path)
