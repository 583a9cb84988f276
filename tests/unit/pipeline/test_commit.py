import errno
import os
import stat

import pytest
from ckptsvc_drivers.linux import System
from ckptsvc_drivers.posix import PosixStore
from harness.random_run import fence, memory_store, small_run

from ckptsvc.errors import CkptsvcError, Fenced, LayoutError, SaveFailed, StoreError, StoreFull, StoreUnavailable
from ckptsvc.format.commit import COMMIT, epoch_key
from ckptsvc.pipeline.catalog import Ref, find, open_checkpoint, read_commit, take_epoch
from ckptsvc.pipeline.commit import check_fence, commit_checkpoint
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.pipeline.sources import StoreSource
from ckptsvc.pipeline.verify import verify_checkpoint
from ckptsvc.storage import connect
from ckptsvc.storage.wrappers import Fault, Faulty, Retrying

REF = Ref(1, 10)


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    if request.param == "memory":
        yield memory_store()
    else:
        store = connect(f"file://{tmp_path}/run")
        yield store
        store.close()


@pytest.fixture
def written(store):
    """A run whose shards are durable."""
    run = small_run()
    return run, [run.write(store, rank) for rank in range(run.world_size)]


def names(store):
    return sorted(entry.key.split("/")[1].split("-")[0] for entry in store.list(REF.name))


class TestCommit:
    def test_is_index_and_record(self, store, written):
        run, shards = written
        record = commit_checkpoint(store, run.info(), shards, "me")
        assert read_commit(store, REF) == record
        assert (record.job, record.writer, record.step, record.epoch, record.world_size) == ("job", "me", 10, 1, 2)
        assert (record.shards, record.bytes) == (2, sum(shard.nbytes for shard in shards))
        assert verify_checkpoint(open_checkpoint(store, REF)) == []
        assert names(store) == ["COMMIT", "index", "r00000", "r00001"]

    def test_the_record_is_written_last(self, written, store):
        run, shards = written
        faulty = Faulty(store)
        commit_checkpoint(faulty, run.info(), shards, "me")
        changes = [call for call in faulty.calls if call.op in ("write", "put_if_absent")]
        assert [call.op for call in changes] == ["write", "put_if_absent"]
        assert changes[1].key == f"{REF.name}/{COMMIT}"

    def test_twice_is_once(self, store, written):
        run, shards = written
        first = commit_checkpoint(store, run.info(), shards, "me")
        before = sorted(store.list())
        assert commit_checkpoint(store, run.info(), shards, "me") == first
        assert commit_checkpoint(store, run.info(), shards, "a coordinator after me") == first
        assert sorted(store.list()) == before

    def test_aliases_are_kept(self, store, written):
        run, shards = written
        commit_checkpoint(store, run.info(aliases={"tied": "w"}), shards, "me")
        assert open_checkpoint(store, REF).index.resolve("tied") == "w"

    def test_somebody_elses_record_is_not_taken_for_ours(self, store, written):
        run, shards = written
        commit_checkpoint(store, run.info(job="other"), shards, "other")
        with pytest.raises(SaveFailed, match="was committed by other"):
            commit_checkpoint(store, run.info(), shards, "me")

    def test_a_hole_is_refused_and_leaves_no_record(self, store, written):
        run, shards = written
        with pytest.raises(LayoutError, match="'w'"):
            commit_checkpoint(store, run.info(), shards[:1], "me")
        assert read_commit(store, REF) is None

    def test_shards_that_only_their_writer_sees_are_refused(self, store, written):
        """As with a local directory on every node."""
        run, shards = written
        elsewhere = memory_store()
        with pytest.raises(SaveFailed, match=r"2 of 2 shards are not in .* for example r00000-.*does every node see"):
            commit_checkpoint(elsewhere, run.info(), shards, "me")
        assert list(elsewhere.list()) == []

    def test_of_shards_that_disagree_is_refused(self, store, written):
        run, shards = written
        other = small_run()
        other.metas["w"] = other.metas["w"]._replace(dtype="int32")
        for held in other.held:
            held.meta = other.metas["w"]
        with pytest.raises(LayoutError, match="'w'"):
            commit_checkpoint(store, run.info(), [shards[0], other.write(store, 1)], "me")
        assert read_commit(store, REF) is None


class TestFence:
    def test_a_newer_job_takes_the_run_over(self, store, written):
        run, shards = written
        take_epoch(store, "job", 1, "me", "")
        fence(store)
        with pytest.raises(Fenced, match=r"job other took this run over at .* \(epoch 2; ours is 1\)"):
            commit_checkpoint(store, run.info(), shards, "me")
        assert names(store) == ["r00000", "r00001"]

    def test_a_later_attempt_of_the_same_job_does_not(self, store, written):
        run, shards = written
        take_epoch(store, "job", 1, "me", "")
        take_epoch(store, "job", 2, "me", "")
        commit_checkpoint(store, run.info(), shards, "me")

    def test_a_job_before_us_does_not(self, store):
        fence(store)
        run = small_run()
        shards = [run.write(store, rank, epoch=2) for rank in range(2)]
        commit_checkpoint(store, run.info(epoch=2), shards, "me")

    @pytest.mark.parametrize("text", [b"{}", b"torn"])
    def test_an_unreadable_record_fences_nobody(self, store, text):
        assert store.put_if_absent(epoch_key(7), text)
        check_fence(store, "job", 1)


class TestFaults:
    """Whatever fails: there is a whole checkpoint or none, and trying again works."""

    def all_operations(self):
        store = memory_store()
        run = small_run()
        shards = [run.write(store, rank) for rank in range(2)]
        faulty = Faulty(store)
        commit_checkpoint(faulty, run.info(), shards, "me")
        return len(faulty.calls)

    @pytest.mark.parametrize("lost", [False, True])
    @pytest.mark.parametrize("error", ["store", "store-full", "store-denied", "store-unavailable"])
    def test_at_any_operation(self, error, lost):
        number = self.all_operations()
        assert number >= 4
        for nth in range(1, number + 1):
            store = memory_store()
            run = small_run()
            shards = [run.write(store, rank) for rank in range(2)]
            faulty = Faulty(store, [Fault(nth=nth, error=error, lost=lost)])
            try:
                record = commit_checkpoint(faulty, run.info(), shards, "me")
            except CkptsvcError as failure:
                told = failure.code
                assert told == error
                assert read_commit(store, REF) is None
                record = commit_checkpoint(store, run.info(), shards, "me")
            assert read_commit(store, REF) == record
            assert verify_checkpoint(open_checkpoint(store, REF)) == []

    def test_the_answer_that_matters_is_lost(self, store, written):
        """The record is there, the caller hears of an error: the commit has happened."""
        run, shards = written
        faulty = Faulty(store, [Fault(op="put_if_absent", error="store-unavailable", lost=True)])
        record = commit_checkpoint(faulty, run.info(), shards, "me")
        assert read_commit(store, REF) == record

    def test_and_the_record_is_somebody_elses(self, store, written):
        run, shards = written
        commit_checkpoint(store, run.info(job="other"), shards, "other")
        record = store.read(f"{REF.name}/{COMMIT}")
        store.delete(f"{REF.name}/{COMMIT}")

        class Late(Faulty):
            def put_if_absent(self, key, data):
                self.inner.put_if_absent(key, record)
                raise StoreUnavailable("no answer")

        with pytest.raises(StoreUnavailable):
            commit_checkpoint(Late(store), run.info(), shards, "me")

    def test_and_the_store_stays_silent(self, store, written):
        run, shards = written
        plan = [
            Fault(op="put_if_absent", error="store-unavailable", lost=True),
            Fault(op="read", key="*/COMMIT", nth=2, times=0, error="store-unavailable"),
        ]
        with pytest.raises(StoreUnavailable):
            commit_checkpoint(Faulty(store, plan), run.info(), shards, "me")
        assert commit_checkpoint(store, run.info(), shards, "me").writer == "me"

    def test_retries_see_the_record_of_the_first_try(self, store, written):
        run, shards = written
        faulty = Faulty(store, [Fault(op="put_if_absent", error="store-unavailable", lost=True, times=2)])
        record = commit_checkpoint(Retrying(faulty, first_wait=0.001), run.info(), shards, "me")
        assert read_commit(store, REF) == record

    def test_an_index_that_was_cut_short_is_not_the_one_in_the_record(self, store, written):
        run, shards = written
        faulty = Faulty(store, [Fault(op="write", error="store-full", short=100)])
        with pytest.raises(StoreFull):
            commit_checkpoint(faulty, run.info(), shards, "me")
        commit_checkpoint(store, run.info(), shards, "me")
        assert names(store) == ["COMMIT", "index", "index", "r00000", "r00001"]
        (want,) = [Want(m.name, m.dtype, m.shape, run.held[1].region) for m in run.metas.values()]
        checkpoint = open_checkpoint(store, REF)
        assert read_arrays(checkpoint.index, StoreSource(checkpoint), [want])[0][-1].tolist() == [297, 298, 299]

    def test_the_others_checkpoints_stay_whole(self, store):
        run = small_run()
        run.store(store, step=5)
        shards = [run.write(store, rank) for rank in range(2)]
        for nth in range(1, 5):
            with pytest.raises(CkptsvcError):
                commit_checkpoint(Faulty(store, [Fault(nth=nth, times=0, error="store")]), run.info(), shards, "me")
        assert [ref.step for ref, _ in find(store)] == [5]
        assert verify_checkpoint(open_checkpoint(store, Ref(1, 5))) == []


def test_a_record_that_is_there_but_not_for_good_is_no_commit(tmp_path):
    """The name is there, and the directory cannot be synced: power may take it away again."""
    store = PosixStore(str(tmp_path / "run"), system=Unsynced())
    run = small_run()
    shards = [run.write(store, rank) for rank in range(2)]
    store._system.fails = True
    for _ in range(2):  # and again, as an agent tries
        with pytest.raises(StoreError):
            commit_checkpoint(store, run.info(), shards, "me")
    store._system.fails = False
    assert commit_checkpoint(store, run.info(), shards, "me").writer == "me"
    store.close()


class Unsynced(System):
    """Directories cannot be synced once a commit record is linked there."""

    fails = False
    linked = False

    def link(self, source, target, directory):
        super().link(source, target, directory)
        self.linked = target == COMMIT

    def sync(self, fd):
        if self.fails and self.linked and stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "input/output error")
        super().sync(fd)
