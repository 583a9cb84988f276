import pytest
from harness.random_run import memory_store, small_run

from ckptsvc.errors import Damaged, IncompatibleVersion, InvalidInput, NoCheckpoint, StoreUnavailable
from ckptsvc.format.commit import COMMIT, CommitRecord, epoch_key
from ckptsvc.pipeline.catalog import (
    Ref,
    find,
    list_refs,
    newest_epoch,
    open_checkpoint,
    read_commit,
    read_epoch,
    take_epoch,
)
from ckptsvc.storage import connect
from ckptsvc.storage.wrappers import Fault, Faulty, Wrapper

NOW = "2026-01-01T00:00:00Z"


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    if request.param == "memory":
        yield memory_store()
    else:
        store = connect(f"file://{tmp_path}/run")
        yield store
        store.close()


def put(store, key, data):
    store.delete(key)
    assert store.put_if_absent(key, data)


class TestListing:
    def test_newest_first_and_committed_or_not(self, store):
        run = small_run()
        for step, epoch in ((10, 1), (20, 1), (5, 2)):
            run.store(store, step, epoch)
        run.write(store, 0, 30, 1)
        assert list_refs(store) == [Ref(2, 5), Ref(1, 30), Ref(1, 20), Ref(1, 10)]
        assert [ref for ref, _ in find(store)] == [Ref(2, 5), Ref(1, 20), Ref(1, 10)]

    def test_other_names_are_not_checkpoints(self, store):
        small_run().store(store)
        for name in ("notes.txt", "step-7/mine", "step-000000000007.e1/x", "step-000000000007.e00001.bak/x"):
            put(store, name, b"mine")
        assert list_refs(store) == [Ref(1, 10)]

    def test_an_empty_run_has_none(self, store):
        assert (list_refs(store), find(store), newest_epoch(store)) == ([], [], 0)

    def test_one_step_or_one_name(self, store):
        run = small_run()
        for step, epoch in ((10, 1), (20, 1), (10, 2)):
            run.store(store, step, epoch)
        assert [ref for ref, _ in find(store, step=10)] == [Ref(2, 10), Ref(1, 10)]
        assert [ref for ref, _ in find(store, name=Ref(1, 10).name)] == [Ref(1, 10)]
        with pytest.raises(InvalidInput, match=r"look like step-000000000100\.e00007"):
            find(store, name="step-10")

    def test_a_record_that_cannot_be_used_comes_as_its_error(self, store):
        run = small_run()
        for step in (10, 20, 30):
            run.store(store, step)
        put(store, f"{Ref(1, 20).name}/{COMMIT}", b"{}")
        found = find(store)
        assert [ref.step for ref, _ in found] == [30, 20, 10]
        assert isinstance(found[1][1], Damaged)
        assert isinstance(found[2][1], CommitRecord)


class TestOpening:
    def test_gives_the_index(self, store):
        ref = small_run(world_size=4).store(store)
        checkpoint = open_checkpoint(store, ref)
        assert (checkpoint.index.info.step, len(checkpoint.index.shards), checkpoint.commit.shards) == (10, 4, 4)
        assert store.size(checkpoint.key(3)) == checkpoint.index.shards[3].nbytes

    def test_what_was_never_committed_is_no_checkpoint(self, store):
        small_run().write(store, 0)
        with pytest.raises(NoCheckpoint, match="its save never finished"):
            open_checkpoint(store, Ref(1, 10))

    @pytest.mark.parametrize("name", ["COMMIT", "index"])
    def test_any_flipped_bit_is_noticed(self, name):
        store = memory_store()
        ref = small_run().store(store)
        (key,) = (e.key for e in store.list(ref.name) if e.key.split("/")[1].startswith(name))
        data = bytearray(store.read(key))
        for at in range(0, len(data), max(len(data) // 97, 1)):
            data[at] ^= 1 << at % 8
            put(store, key, bytes(data))
            with pytest.raises((Damaged, IncompatibleVersion)):
                open_checkpoint(store, ref)
            data[at] ^= 1 << at % 8
        put(store, key, bytes(data))
        open_checkpoint(store, ref)

    @pytest.mark.parametrize("how", ["missing", "shorter", "longer"])
    def test_an_index_of_another_size_is_noticed(self, store, how):
        ref = small_run().store(store)
        (key,) = (e.key for e in store.list(ref.name) if "index" in e.key)
        data = store.read(key)
        store.delete(key)
        if how != "missing":
            put(store, key, data[:-1] if how == "shorter" else data + b"\0")
        with pytest.raises(Damaged, match="the index, is missing" if how == "missing" else "its commit record says"):
            open_checkpoint(store, ref)

    def test_a_record_in_the_wrong_folder_is_noticed(self, store):
        run = small_run()
        run.store(store, 10)
        run.store(store, 20)
        put(store, f"{Ref(1, 20).name}/{COMMIT}", store.read(f"{Ref(1, 10).name}/{COMMIT}"))
        with pytest.raises(Damaged, match="speaks of step 10 in epoch 1"):
            read_commit(store, Ref(1, 20))

    def test_a_record_of_megabytes_is_not_read(self, store):
        small_run().store(store)
        put(store, f"{Ref(1, 10).name}/{COMMIT}", b" " * (2 << 20))
        with pytest.raises(Damaged, match="too large for a commit record"):
            read_commit(store, Ref(1, 10))

    def test_an_index_of_another_checkpoint_is_noticed(self, store):
        run = small_run()
        run.store(store, 10)
        run.store(store, 20)
        other = read_commit(store, Ref(1, 10))
        record = read_commit(store, Ref(1, 20))
        fields = {f: getattr(other, f) for f in ("index", "index_bytes", "index_digest")}
        mixed = CommitRecord(**({f: getattr(record, f) for f in record.__struct_fields__} | fields))
        put(store, f"{Ref(1, 20).name}/{COMMIT}", mixed.encode())
        put(store, f"{Ref(1, 20).name}/{other.index}", store.read(f"{Ref(1, 10).name}/{other.index}"))
        with pytest.raises(Damaged, match="belongs to another checkpoint"):
            open_checkpoint(store, Ref(1, 20))


class TestEpochs:
    def test_are_counted_up(self, store):
        assert [take_epoch(store, "job", n, "me", NOW) for n in (1, 2)] == [1, 2]
        assert newest_epoch(store) == 2
        assert (read_epoch(store, 2).job, read_epoch(store, 2).attempt) == ("job", 2)

    def test_other_names_are_no_epochs(self, store):
        take_epoch(store, "job", 1, "me", NOW)
        for name in ("epochs/9.json", "epochs/00000009.txt", "epochs/00000009.json.old"):
            put(store, name, b"mine")
        assert newest_epoch(store) == 1

    def test_somebody_was_faster(self, store):
        class Slow(Wrapper):
            """Another job takes the epoch between our look and our write."""

            raced = False

            def put_if_absent(self, key, data):
                if not self.raced:
                    self.raced = True
                    take_epoch(self.inner, "other", 1, "other", NOW)
                return self.inner.put_if_absent(key, data)

        assert take_epoch(Slow(store), "job", 1, "me", NOW) == 2
        assert read_epoch(store, 1).job == "other"

    def test_an_answer_that_was_lost_is_ours_when_we_try_again(self, store):
        """As Retrying does: the second try finds the key there, with our name in it."""

        class Twice(Wrapper):
            def put_if_absent(self, key, data):
                self.inner.put_if_absent(key, data)
                return self.inner.put_if_absent(key, data)

        assert take_epoch(Twice(store), "job", 1, "me", NOW) == 1
        assert newest_epoch(store) == 1

    def test_a_hundred_competitors_are_too_many(self):
        store = memory_store()

        class Busy(Wrapper):
            def put_if_absent(self, key, data):
                take_epoch(self.inner, "other", 1, "him", NOW)
                return self.inner.put_if_absent(key, data)

        with pytest.raises(StoreUnavailable, match="a hundred others took epochs meanwhile"):
            take_epoch(Busy(store), "job", 1, "me", NOW)

    def test_errors_of_the_store_come_through(self):
        faulty = Faulty(memory_store(), [Fault(op="put_if_absent", error="store-denied")])
        with pytest.raises(Exception, match="fault injected") as caught:
            take_epoch(faulty, "job", 1, "me", NOW)
        assert caught.value.code == "store-denied"
        assert faulty.calls[-1].key == epoch_key(1)
