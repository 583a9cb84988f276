"""Deleting checkpoints under faults: what is half deleted is no checkpoint, and what must stay stays."""

import contextlib

import pytest
from harness.increments import Saver, big_run, floats
from harness.random_run import memory_store, small_run

from ckptsvc.errors import CkptsvcError, SaveFailed
from ckptsvc.format.commit import COMMIT, RETIRED
from ckptsvc.pipeline.catalog import Ref, find, list_refs, open_checkpoint
from ckptsvc.pipeline.garbage import find_garbage, remove_garbage
from ckptsvc.pipeline.increments import Economy
from ckptsvc.pipeline.pins import pin
from ckptsvc.pipeline.retain import Pace, expire, put_back, retire, sweep
from ckptsvc.pipeline.retention import Policy
from ckptsvc.pipeline.verify import verify_checkpoint
from ckptsvc.storage import connect
from ckptsvc.storage.wrappers import Fault, Faulty

STEPS = (10, 20, 30, 40)


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    if request.param == "memory":
        yield memory_store()
    else:
        store = connect(f"file://{tmp_path}/run")
        yield store
        store.close()


def fill(store):
    run = small_run()
    for step in STEPS:
        run.store(store, step)
    return store


def delete_checkpoint(store, ref):
    """Whatever keeps it."""
    retire(store, ref)
    sweep(store, ref, Pace(0), lambda nbytes: None)


def whole(store):
    """Steps of the checkpoints that are there; each of them verifies."""
    refs = [ref for ref, _ in find(store)]
    for ref in refs:
        assert verify_checkpoint(open_checkpoint(store, ref)) == []
    return [ref.step for ref in refs]


def test_the_commit_record_goes_first(store):
    faulty = Faulty(fill(store))
    delete_checkpoint(faulty, Ref(1, 10))
    deleted = [call.key for call in faulty.calls if call.op == "delete"]
    assert deleted[0] == f"{Ref(1, 10).name}/{COMMIT}"
    assert len(deleted) >= 4
    assert whole(store) == [40, 30, 20]
    assert [entry for entry in store.list() if entry.key.startswith(Ref(1, 10).name)] == []


def test_what_is_protected_stays(store):
    fill(store)
    assert expire(store, Policy(last=1), [Ref(1, 10), Ref(1, 30), Ref(1, 99)]).gone == [Ref(1, 20)]
    assert whole(store) == [40, 30, 10]


def test_the_newest_epoch_counts_before_the_highest_step(store):
    fill(store)
    small_run().store(store, step=5, epoch=2)
    assert expire(store, Policy(last=1)).gone == [Ref(1, 10), Ref(1, 20), Ref(1, 30), Ref(1, 40)]
    assert whole(store) == [5]


def test_to_keep_more_than_there_are_is_to_keep_all(store):
    fill(store)
    assert expire(store, Policy(last=4)).gone == []
    assert expire(store, Policy(last=100)).gone == []
    assert whole(store) == [40, 30, 20, 10]


@pytest.mark.parametrize("lost", [False, True])
def test_an_interruption_anywhere_leaves_whole_checkpoints_only(lost):
    counting = Faulty(fill(memory_store()))
    expire(counting, Policy(last=2))
    for nth in range(1, len(counting.calls) + 1):
        store = fill(memory_store())
        with contextlib.suppress(CkptsvcError):  # a record that cannot be read is passed over
            expire(Faulty(store, [Fault(nth=nth, times=0, error="store-unavailable", lost=lost)]), Policy(last=2))
        assert whole(store)[:2] == [40, 30]
        # What was begun is finished by the next one, or found as garbage.
        expire(store, Policy(last=2), resume_after=0)
        for garbage in list(find_garbage(store)):
            assert remove_garbage(store, garbage)
        assert whole(store) == [40, 30]
        assert {entry.key.split("/")[0] for entry in store.list()} == {Ref(1, 40).name, Ref(1, 30).name}


def fill_with_references(store, last=6):
    """Steps 1 to `last`; the first and every third after it are whole, the others refer to the whole one before."""
    run = big_run({"frozen": floats(20_000), "trained": floats(500)})
    saver = Saver(store, Economy(incremental=True, full_every=3))
    for step in range(1, last + 1):
        run.truth["trained"] = floats(500, step)
        saver.save(run, step)
    return store


def test_what_is_referred_to_stays():
    store = fill_with_references(memory_store(), 5)  # 2 and 3 refer to 1, and 5 to 4
    assert expire(store, Policy(last=1)).gone == [Ref(1, 1), Ref(1, 2), Ref(1, 3)]
    assert whole(store) == [5, 4]
    fill_with_references(store, 5)
    assert expire(store, Policy(last=1), [Ref(1, 2)]).gone == [Ref(1, 3)]
    assert whole(store) == [5, 4, 2, 1]


@pytest.mark.parametrize("lost", [False, True])
def test_an_interruption_anywhere_leaves_all_that_is_referred_to(lost):
    counting = Faulty(fill_with_references(memory_store(), 5))
    expire(counting, Policy(last=1))
    for nth in range(1, len(counting.calls) + 1):
        store = fill_with_references(memory_store(), 5)
        with contextlib.suppress(CkptsvcError):
            expire(Faulty(store, [Fault(nth=nth, times=0, error="store-unavailable", lost=lost)]), Policy(last=1))
        assert whole(store)[:2] == [5, 4]
        for _ in range(2):
            expire(store, Policy(last=1), resume_after=0)
            for garbage in list(find_garbage(store)):
                assert remove_garbage(store, garbage)
        assert whole(store) == [5, 4]
        assert {entry.key.split("/")[0] for entry in store.list()} == {Ref(1, 5).name, Ref(1, 4).name}


@pytest.mark.parametrize("nth", range(1, 8))
def test_a_record_that_cannot_be_read_for_a_moment_loses_no_base(nth):
    store = fill_with_references(memory_store(), 5)
    with contextlib.suppress(CkptsvcError):
        expire(Faulty(store, [Fault(op="read", nth=nth, error="store-unavailable")]), Policy(last=1))
    assert whole(store)[:2] == [5, 4]


def test_a_reference_that_comes_while_a_checkpoint_is_being_deleted_is_seen():
    store = fill_with_references(memory_store(), 3)
    late = {step: store.read(f"{Ref(1, step).name}/{COMMIT}") for step in (2, 3)}
    for step in late:
        store.delete(f"{Ref(1, step).name}/{COMMIT}")
    fill_with = small_run()
    fill_with.store(store, step=9)

    class Racing(Faulty):
        def delete(self, key):
            self.inner.delete(key)
            if key == f"{Ref(1, 1).name}/{COMMIT}":
                self.inner.put_if_absent(f"{Ref(1, 2).name}/{COMMIT}", late[2])

    done = expire(Racing(store), Policy(last=1))
    assert (done.gone, done.back) == ([], [Ref(1, 1)])
    assert whole(store) == [9, 2, 1]


def test_a_record_that_comes_while_what_it_needs_is_being_deleted_is_withdrawn():
    """The deleter has looked already when the record comes."""
    store = memory_store()

    class Racing(Faulty):
        def put_if_absent(self, key, data):
            if key == f"{Ref(1, 2).name}/{COMMIT}":
                delete_checkpoint(self.inner, Ref(1, 1))
            return self.inner.put_if_absent(key, data)

    with pytest.raises(SaveFailed, match="deleted meanwhile"):
        fill_with_references(Racing(store), 2)
    assert whole(store) == []
    (garbage,) = find_garbage(store)
    assert garbage.ref == Ref(1, 2)


def test_a_record_whose_writer_was_killed_before_it_could_take_it_back_is_garbage():
    """And then what it was the record of; but nothing of what others need, nor what is pinned."""
    store = fill_with_references(memory_store(), 3)  # 2 and 3 refer to 1
    small_run().store(store, step=9)
    retire(store, Ref(1, 1))
    assert list(find_garbage(store)) == []  # it can be put back, and will be
    sweep(store, Ref(1, 1), Pace(0), lambda nbytes: None)
    pin(store, Ref(1, 3))
    (garbage,) = find_garbage(store)
    assert [entry.key for entry in garbage.entries] == [f"{Ref(1, 2).name}/{COMMIT}"]
    assert garbage.why == f"needs files of {Ref(1, 1).name}, which was deleted"
    assert remove_garbage(store, garbage)
    (garbage,) = find_garbage(store)
    assert garbage.ref == Ref(1, 2)
    assert remove_garbage(store, garbage)
    assert [ref.step for ref, _ in find(store)] == [9, 3]
    assert list(find_garbage(store)) == []


def test_a_folder_that_is_referred_to_is_no_garbage():
    """Whatever took its commit record away."""
    store = fill_with_references(memory_store(), 2)
    store.delete(f"{Ref(1, 1).name}/{COMMIT}")
    assert list(find_garbage(store)) == []
    assert whole(store) == [2]
    delete_checkpoint(store, Ref(1, 2))
    (garbage,) = find_garbage(store)
    assert garbage.ref == Ref(1, 1)
    assert remove_garbage(store, garbage)
    assert list_refs(store) == []


def test_a_pinned_one_that_comes_back_brings_back_what_it_needs():
    """The pin comes when the deleter has read the pins, and has not yet taken the record away."""
    store = fill_with_references(memory_store(), 3)  # 2 and 3 refer to 1
    small_run().store(store, step=9)

    class Racing(Faulty):
        def put_if_absent(self, key, data):
            if key == f"{RETIRED}/{Ref(1, 3).name}":
                pin(self.inner, Ref(1, 3))
            return self.inner.put_if_absent(key, data)

    done = expire(Racing(store), Policy(last=1))
    assert (done.gone, done.back) == ([Ref(1, 2)], [Ref(1, 3), Ref(1, 1)])
    assert whole(store) == [9, 3, 1]


def test_gc_leaves_what_a_pinned_half_needs():
    store = fill_with_references(memory_store(), 2)
    pin(store, Ref(1, 2))
    for step in (2, 1):  # a deleter that was killed when it had come so far
        retire(store, Ref(1, step))
    assert list(find_garbage(store)) == []
    small_run().store(store, step=9)
    assert expire(store, Policy(last=1), resume_after=0).back == [Ref(1, 2), Ref(1, 1)]
    assert whole(store) == [9, 2, 1]


@pytest.mark.parametrize("newer", [False, True])
def test_what_a_record_that_cannot_be_used_names_stays(newer):
    store = fill_with_references(memory_store(), 2)
    key = f"{Ref(1, 2).name}/{COMMIT}"
    data = store.read(key)
    store.delete(key)
    store.put_if_absent(key, data.replace(b'"2.1"', b'"3.0"') if newer else data.replace(b'"job":"', b'"job":"x'))
    small_run().store(store, step=9)
    assert expire(store, Policy(last=1)).gone == []
    assert [ref.step for ref, _ in find(store)] == [9, 2, 1]
    assert list(find_garbage(store)) == []


def test_a_checkpoint_without_its_base_does_not_count_as_the_newest():
    store = fill_with_references(memory_store(), 5)
    store.delete(f"{Ref(1, 4).name}/{COMMIT}")  # whoever committed step 5 was killed before it looked
    assert expire(store, Policy(last=1)).gone == [Ref(1, 2)]  # the newest that is whole is step 3, which needs 1
    assert 3 in [ref.step for ref, _ in find(store)]


def test_what_was_put_back_meanwhile_is_not_swept():
    store = fill(memory_store())

    class Racing(Faulty):
        def list(self, prefix=""):
            if prefix == Ref(1, 10).name:
                put_back(self.inner, Ref(1, 10))
            return self.inner.list(prefix)

    expire(Racing(store), Policy(last=3))
    assert 10 in whole(store)
