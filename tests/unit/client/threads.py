"""The ranks of a job as threads of this process, for tests of what they say to each other.

    results = run(3, lambda group: group.all_gather(b"x"))

As gloo does it: messages between two ranks keep their order, a message is moved when both sides have begun it, and its
memory is used until then. Whoever waits longer than `TIMEOUT` seconds fails.
"""

import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor

TIMEOUT = 20.0


class Work:
    """A message under way."""

    def __init__(self, data):
        self.data = data
        self.done = threading.Event()

    def wait(self):
        assert self.done.wait(TIMEOUT), "waits for a message that never comes"


class _Job:
    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.told = [b""] * size
        self.lock = threading.Lock()
        self.begun = {side: defaultdict(deque) for side in ("send", "receive")}

    def begin(self, side, pair, work):
        """One side of a message; it is moved when the other side has begun too."""
        other = "receive" if side == "send" else "send"
        with self.lock:
            waiting = self.begun[other][pair]
            if not waiting:
                self.begun[side][pair].append(work)
                return work
            first = waiting.popleft()
            source, target = (work, first) if side == "send" else (first, work)
            assert len(source.data) == len(target.data), f"{pair}: {len(source.data)} bytes for {len(target.data)}"
            target.data[:] = source.data
        for each in (work, first):
            each.done.set()
        return work


class ThreadGroup:
    """See client.group.Group."""

    def __init__(self, job, rank, size):
        self._job, self.rank, self.size = job, rank, size

    def all_gather(self, data):
        self._job.told[self.rank] = data
        self._job.barrier.wait(TIMEOUT)
        told = list(self._job.told)
        self._job.barrier.wait(TIMEOUT)
        return told

    def broadcast(self, data):
        return self.all_gather(data)[0]

    def all_true(self, value):
        return all(each == b"yes" for each in self.all_gather(b"yes" if value else b"no"))

    def send(self, data, to):
        assert to != self.rank
        return self._job.begin("send", (self.rank, to), Work(data))

    def receive(self, into, source):
        assert source != self.rank
        return self._job.begin("receive", (source, self.rank), Work(into))


def run(size, function):
    """What the function returned, or raised, on each rank."""
    job = _Job(size)

    def rank(number):
        try:
            return function(ThreadGroup(job, number, size))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank, range(size)))
    left = {side: [pair for pair, works in pairs.items() if works] for side, pairs in job.begun.items()}
    assert left == {"send": [], "receive": []}, f"messages nobody took: {left}"
    return results
