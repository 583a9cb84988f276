"""What the ranks of a benchmark are asked to measure, and what each of them answers. No torch here."""

from __future__ import annotations

import msgspec

OVERLAPPED = "ckptsvc, overlap"
"""What `attach(..., overlap=True)` is called in the results of `overlap`."""

Sample = dict[str, float]
"""One repetition: numbers by name, in seconds and bytes unless the name says otherwise."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure.

    Attributes:
        workload: "save", "small", "overlap", "restore" or "reshard"; "stage" is the trainer that `restore` needs first.
        nbytes: size of the state over all ranks.
        tensors: number of tensors of the `small` state.
        repeat: repetitions, after one to warm up.
        peers: what to compare with.
        store: URL of the run to use.
        directory: where peers and raw limits may write; "" where the store is no directory.
        agent: process id of the agent.
        stored: for `reshard`, number of ranks that have saved.
        base: seconds for which the compute loop of `overlap` runs alone.
    """

    workload: str
    nbytes: int
    repeat: int
    store: str
    directory: str
    tensors: int = 20_000
    peers: tuple[str, ...] = ()
    agent: int = 0
    stored: int = 1
    base: float = 0.4


class Results(msgspec.Struct, kw_only=True):
    """What one rank has measured.

    Attributes:
        nbytes: bytes of the state that this rank holds.
        samples: by system or raw limit, one for each repetition.
        warm_up: likewise, the repetition before these.
        unavailable: peers that could not be measured, with the reason.
        notes: how something was done, by what it was.
    """

    nbytes: int = 0
    samples: dict[str, list[Sample]] = {}
    warm_up: dict[str, Sample] = {}
    unavailable: dict[str, str] = {}
    notes: dict[str, str] = {}

    def add(self, name: str, repetition: int, sample: Sample) -> None:
        """Note one repetition of a system or a limit; number 0 is the warm-up."""
        if repetition == 0:
            self.warm_up[name] = sample
        else:
            self.samples.setdefault(name, []).append(sample)

    def drop(self, name: str, why: str) -> None:
        """A system cannot be measured: nothing of it counts."""
        self.unavailable[name] = why
        self.samples.pop(name, None)
        self.warm_up.pop(name, None)
