"""Pins and references against deletion, in every order in which two programs can come between each other's calls."""

import contextlib
import time

import msgspec
import pytest
from harness.random_run import memory_store, small_run

from ckptsvc.errors import CkptsvcError, NoCheckpoint, SaveFailed
from ckptsvc.format.commit import COMMIT, PINS, RETIRED, CommitRecord, pin_key
from ckptsvc.pipeline.catalog import Ref, find, open_checkpoint, read_commit
from ckptsvc.pipeline.garbage import find_garbage, remove_garbage
from ckptsvc.pipeline.pins import pin, pinned, read_pin, unpin
from ckptsvc.pipeline.references import withdraw_if_late
from ckptsvc.pipeline.retain import Pace, expire, put_back, retired
from ckptsvc.pipeline.retention import Policy
from ckptsvc.pipeline.verify import verify_checkpoint
from ckptsvc.storage import connect
from ckptsvc.storage.wrappers import Fault, Faulty, Wrapper

OLD, MIDDLE, NEW = Ref(1, 10), Ref(1, 20), Ref(1, 30)
LAST = Policy(last=1)


@pytest.fixture
def store():
    return filled(memory_store())


def filled(store):
    for ref in (OLD, MIDDLE, NEW):
        small_run().store(store, ref.step)
    return store


def refer(store, ref, *others):
    """Have a committed checkpoint say that it needs others."""
    key = f"{ref.name}/{COMMIT}"
    record = msgspec.structs.replace(read_commit(store, ref), refers=tuple(other.name for other in others))
    store.delete(key)
    store.put_if_absent(key, record.encode())


def whole(store):
    refs = [ref for ref, _ in find(store)]
    for ref in refs:
        assert verify_checkpoint(open_checkpoint(store, ref)) == []
    return refs


def clean(store):
    """Nothing is left that no checkpoint has."""
    assert list(find_garbage(store)) == []
    assert retired(store) == {}


class Between(Wrapper):
    """Calls `act` once, just before or after the call number `nth`."""

    def __init__(self, inner, nth, act, *, after=False):
        super().__init__(inner)
        self.nth, self.act, self.after, self.count = nth, act, after, 0

    def _call(self, op, key, nbytes, run):
        self.count += 1
        if self.count != self.nth:
            return run()
        if not self.after:
            self.act()
            return run()
        try:
            return run()
        finally:
            self.act()


def test_a_pin_keeps_and_is_taken_away_again(store):
    assert pin(store, OLD, "paper, table 2")
    assert not pin(store, OLD, "again")
    assert read_pin(store, OLD).note == "paper, table 2"
    assert expire(store, LAST).gone == [MIDDLE]
    assert unpin(store, OLD)
    assert not unpin(store, OLD)
    assert read_pin(store, OLD) is None
    assert expire(store, LAST).gone == [OLD]
    clean(store)


def test_what_is_no_checkpoint_cannot_be_pinned(store):
    with pytest.raises(NoCheckpoint, match="never finished, or it was deleted"):
        pin(store, Ref(1, 99))
    assert pinned(store) == set()


def test_names_that_are_no_pins_say_nothing(store):
    for name in ("x.json", f"{OLD.name}", f"{OLD.name}.txt", "step-1.e1.json"):
        store.put_if_absent(f"{PINS}/{name}", b"x")
    assert pinned(store) == set()
    store.put_if_absent(pin_key(OLD.name), b"damaged")
    assert pinned(store) == {OLD}, "a pin counts by its presence"
    assert read_pin(store, OLD).note == ""


def calls_of(work):
    counting = Faulty(filled(memory_store()))
    work(counting)
    return len(counting.calls)


@pytest.mark.parametrize("after", [False, True])
def test_a_pin_set_at_any_moment_of_a_deletion_is_refused_or_holds(after):
    held = refused = 0
    for nth in range(1, calls_of(lambda store: expire(store, LAST)) + 1):
        store, said = filled(memory_store()), []

        def act(store=store, said=said):
            try:
                said.append(pin(store, OLD))
            except NoCheckpoint:
                said.append(False)

        expire(Between(store, nth, act, after=after), LAST)
        if said == [True]:
            held += 1
            assert OLD in whole(store)
        else:
            refused += 1
            assert OLD not in whole(store)
            assert pinned(store) == set()
        clean(store)
    assert held
    assert refused


def test_a_deletion_at_any_moment_of_a_pin_is_noticed_or_does_not_happen():
    held = refused = 0
    for nth in range(1, calls_of(lambda store: pin(store, OLD)) + 1):
        store = filled(memory_store())
        try:
            pin(Between(store, nth, lambda store=store: expire(store, LAST)), OLD)
        except NoCheckpoint:
            refused += 1
            assert OLD not in whole(store)
        else:
            held += 1
            assert OLD in whole(store)
    assert held
    assert refused


@pytest.mark.parametrize("after", [False, True])
def test_a_checkpoint_that_refers_to_one_that_is_being_deleted_finds_it_or_its_loss(after):
    found = lost = 0
    for nth in range(1, calls_of(lambda store: expire(store, LAST)) + 1):
        store, seen = filled(memory_store()), []

        def act(store=store, seen=seen):
            small_run().store(store, 40)
            refer(store, Ref(1, 40), OLD)
            seen.append(read_commit(store, OLD) is not None)  # as its writer does after its commit (FORMAT.md, 11.4)

        expire(Between(store, nth, act, after=after), LAST)
        if seen == [True]:
            found += 1
            assert verify_checkpoint(open_checkpoint(store, OLD)) == []
        else:
            lost += 1
        assert Ref(1, 40) in [ref for ref, _ in find(store)]
    assert found
    assert lost


def test_what_is_referred_to_goes_with_the_last_that_refers_to_it(store):
    refer(store, MIDDLE, OLD)
    refer(store, NEW, MIDDLE)
    assert expire(store, LAST).gone == []
    small_run().store(store, 40)
    assert expire(store, LAST).gone == [OLD, MIDDLE, NEW]
    clean(store)


@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("lost", [False, True])
def test_an_interruption_anywhere_loses_no_pin_and_leaves_nothing_that_is_not_found(kind, lost, tmp_path):
    def fresh(name):
        made = filled(memory_store() if kind == "memory" else connect(f"file://{tmp_path}/{name}"))
        pin(made, MIDDLE)
        return made

    counting = Faulty(fresh("counting"))
    expire(counting, LAST)
    for nth in range(1, len(counting.calls) + 1):
        store = fresh(str(nth))
        with contextlib.suppress(CkptsvcError):
            expire(Faulty(store, [Fault(nth=nth, times=0, error="store-unavailable", lost=lost)]), LAST)
        assert whole(store)[:2] == [NEW, MIDDLE]
        if nth % 2:  # one of two ways to clean up
            expire(store, LAST, resume_after=0)
        for garbage in list(find_garbage(store)):
            assert remove_garbage(store, garbage)
        expire(store, LAST, resume_after=0)
        clean(store)
        assert whole(store) == [NEW, MIDDLE]
        store.close()


def test_a_deletion_that_was_interrupted_after_a_pin_is_taken_back(store):
    record = store.read(f"{OLD.name}/{COMMIT}")
    store.put_if_absent(f"{RETIRED}/{OLD.name}", record)
    store.put_if_absent(pin_key(OLD.name), b"x")
    store.delete(f"{OLD.name}/{COMMIT}")
    assert [g.folder for g in find_garbage(store)] == [], "it is pinned and whole"
    assert expire(store, Policy()).back == [], "somebody may be at it still"
    assert expire(store, Policy(), now=time.time() + 3600).back == [OLD]
    assert whole(store) == [NEW, MIDDLE, OLD]


def test_what_is_half_deleted_does_not_come_back_for_a_pin(store):
    store.put_if_absent(f"{RETIRED}/{OLD.name}", store.read(f"{OLD.name}/{COMMIT}"))
    store.delete(f"{OLD.name}/{COMMIT}")
    first = next(entry for entry in store.list(OLD.name))
    store.delete(first.key)
    store.put_if_absent(pin_key(OLD.name), b"x")  # whoever set it was killed before it looked again
    assert not put_back(store, OLD)
    assert [(g.folder, g.why) for g in find_garbage(store)] == [(OLD.name, "its deletion was interrupted")]
    assert expire(store, Policy(), resume_after=0).gone == [OLD]
    assert [(g.folder, g.why) for g in find_garbage(store)] == [(PINS, "pins a checkpoint that is not there")]


def test_files_that_a_checkpoint_needs_stay_though_their_own_is_half_deleted(store):
    refer(store, NEW, OLD)
    store.put_if_absent(f"{RETIRED}/{OLD.name}", store.read(f"{OLD.name}/{COMMIT}"))
    store.delete(f"{OLD.name}/{COMMIT}")
    store.delete(f"{OLD.name}/{next(iter(store.children(OLD.name)))}")
    before = sorted(store.list(OLD.name))
    assert expire(store, LAST, resume_after=0).gone == []  # what refers to it counts as none, so that another is kept
    assert [g.folder for g in find_garbage(store)] == []
    assert sorted(store.list(OLD.name)) == before


def test_a_mark_of_another_checkpoint_brings_nothing_back(store):
    store.put_if_absent(f"{RETIRED}/{OLD.name}", store.read(f"{MIDDLE.name}/{COMMIT}"))
    store.delete(f"{OLD.name}/{COMMIT}")
    assert not put_back(store, OLD)


def test_a_commit_that_needs_what_was_deleted_meanwhile_is_taken_back(store):
    key = f"{NEW.name}/{COMMIT}"
    record = msgspec.structs.replace(read_commit(store, NEW), refers=(MIDDLE.name,))
    store.delete(key)
    store.put_if_absent(key, record.encode())
    withdraw_if_late(store, NEW, record)
    store.delete(f"{MIDDLE.name}/{COMMIT}")
    with pytest.raises(SaveFailed, match="deleted meanwhile"):
        withdraw_if_late(store, NEW, record)
    assert whole(store) == [OLD]


def test_a_hostile_mark_deletes_no_checkpoint(store):
    for name in (NEW.name, "../x", "step-1.e1", Ref(7, 7).name):
        with contextlib.suppress(CkptsvcError):
            store.put_if_absent(f"{RETIRED}/{name}", b"{}")
    expire(store, Policy(last=9), resume_after=0)
    assert whole(store) == [NEW, MIDDLE, OLD]


def test_a_record_that_cannot_be_read_now_stops_all_deletion(store):
    faulty = Faulty(store, [Fault(op="read", key=f"{NEW.name}/*", times=0, error="store-unavailable")])
    with pytest.raises(CkptsvcError):
        expire(faulty, LAST)
    assert not [call for call in faulty.calls if call.op == "delete"]


def test_objects_are_deleted_no_faster_than_allowed():
    now, slept = [100.0], []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += seconds

    pace = Pace(10, lambda: now[0], sleep)
    for _ in range(21):
        pace()
    assert now[0] == pytest.approx(102.0)
    now[0] += 50
    pace()
    assert len(slept) == 20, "what was not used does not count for later, and nothing waits for it"
    unlimited = Pace(0, lambda: now[0], sleep)
    unlimited()
    assert len(slept) == 20


def test_a_record_says_its_metrics_and_what_it_refers_to(store):
    record = msgspec.structs.replace(
        read_commit(store, OLD), metrics={"loss": "1.25", "ppl": "nan"}, refers=(NEW.name,)
    )
    again = CommitRecord.decode(record.encode())
    assert again == record
    assert again.values["loss"] == 1.25
    assert b'"metrics"' not in read_commit(store, OLD).encode()
