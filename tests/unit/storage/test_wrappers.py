import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptsvc.errors import BY_CODE, ConfigError, NotFound, StoreDenied, StoreError, StoreFull, StoreUnavailable
from ckptsvc.storage import connect
from ckptsvc.storage.testing import MiB, content_of
from ckptsvc.storage.wrappers import Fault, Faulty, Limited, Measured, Retrying, decode_faults


@pytest.fixture
def inner():
    return connect(f"memory://{uuid.uuid4()}")


def put(store, key, content, progress=None):
    store.write(key, memoryview(content), len(content), progress=progress)


def retrying(store, attempts=4):
    return Retrying(store, attempts=attempts, first_wait=0.001, longest_wait=0.002)


ALL = {
    "capabilities": lambda store: store.capabilities(),
    "write": lambda store: put(store, "dir/a", b"new"),
    "put_if_absent": lambda store: store.put_if_absent("dir/record", b"record"),
    "read": lambda store: store.read("dir/a"),
    "read_into": lambda store: store.read_into("dir/a", 0, memoryview(bytearray(2))),
    "size": lambda store: store.size("dir/a"),
    "list": lambda store: list(store.list("dir")),
    "children": lambda store: store.children("dir"),
    "delete": lambda store: store.delete("dir/a"),
    "close": lambda store: store.close(),
}


# --- Faulty ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ALL)
def test_every_operation_can_fail(inner, op):
    put(inner, "dir/a", b"old")
    store = Faulty(inner, [Fault(op=op, error="store", retryable=True)])
    for other, operate in ALL.items():
        if other == op:
            with pytest.raises(StoreError, match=f"injected into {op}") as caught:
                operate(store)
            assert caught.value.retryable
        elif other not in ("delete", "close"):
            operate(store)
    ALL[op](store)


def test_the_nth_call_on_a_pattern(inner):
    store = Faulty(inner, [Fault(op="write", key="step-2/r*", nth=2, times=2, error="store-full")])
    for key in ("step-1/r0", "step-1/r1", "step-2/index", "step-2/r0"):
        put(store, key, b"1")
    for key in ("step-2/r1", "step-2/r2"):
        with pytest.raises(StoreFull, match=key):
            put(store, key, b"1")
    put(store, "step-2/r3", b"1")
    assert [call.key for call in store.calls][-3:] == ["step-2/r1", "step-2/r2", "step-2/r3"]
    assert {call.op for call in store.calls} == {"write"}


def test_for_ever(inner):
    store = Faulty(inner, [Fault(op="read", nth=2, times=0, error="store-denied")])
    put(inner, "a", b"1")
    assert store.read("a") == b"1"
    for _ in range(3):
        with pytest.raises(StoreDenied):
            store.read("a")


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_can_be_injected(inner, code):
    with pytest.raises(BY_CODE[code]):
        Faulty(inner, [Fault(op="children", error=code)]).children()


def test_a_short_write(inner):
    store = Faulty(inner, [Fault(op="write", short=3, error="store")])
    with pytest.raises(StoreError):
        put(store, "a", b"12345")
    assert inner.read("a") == b"123"
    put(store, "a", b"12345")
    assert inner.read("a") == b"12345"


@pytest.mark.parametrize("op", ["write", "put_if_absent"])
def test_a_lost_response(inner, op):
    store = Faulty(inner, [Fault(op=op, error="store-unavailable", lost=True)])
    with pytest.raises(StoreUnavailable):
        ALL[op](store)
    assert inner.read("dir/a" if op == "write" else "dir/record")


def test_a_delay(inner):
    store = Faulty(inner, [Fault(op="size", delay=0.1)])
    put(inner, "a", b"1")
    start = time.perf_counter()
    assert store.size("a") == 1
    assert time.perf_counter() - start >= 0.1


def test_a_hang_until_released(inner):
    store = Faulty(inner, [Fault(op="write", key="hangs", hang=True, times=0)])
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(put, store, "hangs", b"1")
        put(store, "goes on", b"1")
        time.sleep(0.05)
        assert not future.done()
        with pytest.raises(NotFound):
            inner.size("hangs")
        store.release()
        future.result(10)
    assert inner.size("hangs") == 1


def test_plans_travel_as_json(inner):
    plan = decode_faults('[{"op": "write", "key": "*/COMMIT", "nth": 2, "error": "store-full"}]')
    assert plan == (Fault(op="write", key="*/COMMIT", nth=2, error="store-full"),)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[{", "truncated"),
        ('{"op": "read"}', "array"),
        ('[{"operation": "read"}]', "operation"),
        ('[{"error": "no-such"}]', "no-such"),
        ('[{"nth": 0}]', "nth"),
        ('[{"short": 3}]', "error"),
    ],
)
def test_bad_plans_are_explained(text, word):
    with pytest.raises(ConfigError, match=word):
        decode_faults(text)


# --- Retrying -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ALL)
def test_what_may_pass_is_tried_again(inner, op):
    put(inner, "dir/a", b"old")
    faulty = Faulty(inner, [Fault(op=op, times=3, error="store-unavailable")])
    ALL[op](retrying(faulty))
    assert [call.op for call in faulty.calls].count(op) == 4


def test_whoever_wants_to_know_is_told_of_every_further_try_and_of_no_last_one(inner):
    told = []
    faulty = Faulty(inner, [Fault(op="size", times=0, error="store-unavailable")])
    store = Retrying(faulty, attempts=3, first_wait=0.001, longest_wait=0.002, on_retry=lambda e: told.append(e.code))
    with pytest.raises(StoreError):
        store.size("a")
    assert told == ["store-unavailable"] * 2


def test_not_for_ever(inner):
    faulty = Faulty(inner, [Fault(times=0, error="store", retryable=True)])
    with pytest.raises(StoreError):
        retrying(faulty).read("a")
    assert len(faulty.calls) == 4


@pytest.mark.parametrize("code", ["store", "store-full", "store-denied", "not-found", "damaged", "agent-unavailable"])
def test_what_will_not_pass_is_not_tried_again(inner, code):
    faulty = Faulty(inner, [Fault(times=0, error=code)])
    with pytest.raises(BY_CODE[code]):
        retrying(faulty).read("a")
    assert len(faulty.calls) == 1


def test_a_commit_whose_response_was_lost_is_ours(inner):
    store = retrying(Faulty(inner, [Fault(op="put_if_absent", lost=True, error="store-unavailable")]))
    assert store.put_if_absent("COMMIT", b"mine")
    assert inner.read("COMMIT") == b"mine"


@pytest.mark.parametrize("theirs", [b"their", b"theirs, which is much longer"])
def test_a_commit_that_somebody_else_made_is_theirs(inner, theirs):
    inner.put_if_absent("COMMIT", theirs)
    store = retrying(Faulty(inner, [Fault(op="put_if_absent", error="store-unavailable")]))
    assert store.put_if_absent("COMMIT", b"mines") is False
    assert retrying(inner).put_if_absent("COMMIT", theirs) is False, "equal bytes alone do not make it ours"


def test_progress_counts_a_repeated_byte_once(inner):
    size = 40 * MiB
    store = retrying(Faulty(inner, [Fault(op="write", short=20 * MiB, error="store-unavailable")]))
    seen = []
    put(store, "a", bytes(size), seen.append)
    assert sum(seen) == size
    assert min(seen) > 0


# --- Limited --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["write", "read", "read_into"])
def test_the_rate_holds(inner, op):
    content = content_of(12 * MiB)
    put(inner, "a", content)
    store = Limited(inner, bytes_per_second=60 * MiB)
    start = time.monotonic()
    if op == "write":
        put(store, "b", content)
        assert inner.read("b") == content
    elif op == "read":
        assert store.read("a") == content
    else:
        back = bytearray(len(content))
        store.read_into("a", 0, memoryview(back))
        assert back == content
    assert 0.19 <= time.monotonic() - start < 5


def test_threads_share_the_rate(inner):
    store = Limited(inner, bytes_per_second=40 * MiB)
    start = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: put(store, str(number), bytes(2 * MiB)), range(4)))
    assert time.monotonic() - start >= 0.19


def test_calls_in_flight_are_bounded(inner):
    running, most, lock = 0, 0, threading.Lock()

    class Slow(Faulty):
        def _call(self, op, key, nbytes, run):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.01)
            with lock:
                running -= 1
            return super()._call(op, key, nbytes, run)

    store = Limited(Slow(inner), in_flight=2)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: store.children(), range(16)))
    assert most == 2


@pytest.mark.parametrize("limits", [{"bytes_per_second": 0}, {"bytes_per_second": -1.0}, {"in_flight": 0}])
def test_limits_are_positive(inner, limits):
    with pytest.raises(ConfigError, match=next(iter(limits))):
        Limited(inner, **limits)


# --- Measured -------------------------------------------------------------------------------------------------------


def test_every_call_is_reported(inner):
    seen = []
    store = Measured(inner, lambda *facts: seen.append(facts))
    put(store, "dir/a", b"12345")
    store.put_if_absent("dir/record", b"123")
    assert store.read("dir/a") == b"12345"
    store.read_into("dir/a", 0, memoryview(bytearray(2)))
    with pytest.raises(NotFound):
        store.size("none")
    list(store.list())
    assert [(op, nbytes) for op, _, nbytes, _ in seen] == [
        ("write", 5),
        ("put_if_absent", 3),
        ("read", 5),
        ("read_into", 2),
        ("size", 0),
        ("list", 0),
    ]
    assert all(seconds >= 0 for _, seconds, _, _ in seen)
    errors = [error for *_, error in seen]
    assert isinstance(errors[4], NotFound)
    assert errors.count(None) == 5
