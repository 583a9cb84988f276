import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ckptsvc.errors import ArenaExhausted, InvalidInput, RunBusy
from ckptsvc.pipeline.arena import HUGE_PAGE, TAIL, ArenaPool, Label, Mappings, State, populate

MiB = 1 << 20


def label(**changes):
    fields = {
        "job": "job",
        "store": "file:///run",
        "coordinator": "",
        "attempt": 1,
        "epoch": 2,
        "step": 30,
        "rank": 4,
        "world_size": 8,
        "nbytes": 5000,
        "extent": 4096,
        "aliases": {"b": "w"},
    }
    return Label(**{**fields, **changes})


@pytest.fixture
def pool(tmp_path):
    pool = ArenaPool(tmp_path / "arenas", 100 * MiB)
    assert pool.open() == []
    yield pool
    pool.close(remove=True)


def made(pool, rank=4, nbytes=1000):
    """A free arena whose memory is there."""
    arena, fd = pool.make("job", rank, nbytes)
    populate(fd, arena.capacity)
    os.close(fd)
    pool.release(arena)
    return arena


def take(pool, step=30, job="job", rank=4, nbytes=1000):
    """As a rank does for a snapshot."""
    return pool.acquire(job, rank, nbytes, step, "token")


def staged(pool, step=30):
    arena, _ = take(pool, step)
    pool.stage(arena, label(step=step))
    return arena


def reopened(pool):
    """What the next agent finds when this one is killed now."""
    os.close(pool._lock)
    pool._lock = -1
    successor = ArenaPool(pool.root, pool.limit)
    found = successor.open()
    pool._lock, successor._lock = successor._lock, -1  # the fixture closes it
    pool.arenas = successor.arenas
    return found


class TestMaking:
    def test_after_a_rewind_the_snapshot_of_the_earlier_epoch_goes_first(self, pool):
        arenas = [made(pool) for _ in range(2)]
        for key in ((2, 100), (3, 60)):
            arena, _ = take(pool, key[1])
            pool.stage(arena, label(epoch=key[0], step=key[1]))
            pool.keep(arena)
        arena, evicted = take(pool, 70)
        assert arena in arenas
        assert (evicted.epoch, evicted.step) == (2, 100)

    def test_memory_is_allocated_in_huge_pages(self, pool):
        arena = made(pool, nbytes=HUGE_PAGE + 1)
        assert arena.capacity + TAIL == 2 * HUGE_PAGE == os.stat(arena.path).st_size == pool.total
        assert os.stat(arena.path).st_blocks * 512 >= arena.capacity
        assert arena.state is State.FREE

    def test_only_this_user_may_look(self, pool):
        arena = made(pool)
        assert os.stat(arena.path).st_mode & 0o777 == 0o600
        assert os.stat(pool.root).st_mode & 0o777 == 0o700

    def test_the_limit_holds(self, pool):
        pool.limit = 2 * HUGE_PAGE
        made(pool)
        with pytest.raises(ArenaExhausted, match="an arena of 4 MiB does not fit: 2 of 4 MiB are taken"):
            pool.make("job", 4, 2 * HUGE_PAGE - TAIL)
        made(pool)
        with pytest.raises(ArenaExhausted, match=r"raise arena\.limit"):
            pool.make("job", 4, 1)
        assert len(list(pool.root.glob("*.arena"))) == 2

    def test_no_memory_is_an_error_and_not_a_signal(self, pool):
        arena, fd = pool.make("job", 4, 1)
        with pytest.raises(ArenaExhausted, match="no memory for an arena of"):
            populate(fd, 1 << 60)
        os.close(fd)
        pool.remove(arena)

    def test_plan_counts_what_is_usable(self, pool):
        assert pool.plan("job", 4, 1000, 2) == 2
        made(pool)
        assert pool.plan("job", 4, 1000, 2) == 1
        assert pool.plan("job", 5, 1000, 2) == 2
        assert pool.plan("other", 4, 1000, 2) == 2

    def test_plan_removes_free_arenas_that_are_too_small(self, pool):
        small, kept = made(pool), made(pool)
        pool.stage(kept, label())
        assert pool.plan("job", 4, HUGE_PAGE + 1, 2) == 2
        assert not small.path.exists()
        assert kept.path.exists()


class TestAcquiring:
    def test_a_free_arena_is_taken(self, pool):
        arena = made(pool)
        taken, evicted = take(pool, 30)
        assert (taken, evicted) == (arena, None)
        assert (taken.state, taken.step) == (State.FILLING, 30)

    @pytest.mark.parametrize(("job", "rank", "nbytes"), [("other", 4, 1), ("job", 5, 1), ("job", 4, HUGE_PAGE + 1)])
    def test_but_not_one_of_somebody_else_or_too_small(self, pool, job, rank, nbytes):
        made(pool)
        with pytest.raises(ArenaExhausted, match="no free arena"):
            take(pool, 30, job, rank, nbytes)

    def test_what_is_being_filled_or_saved_is_not_taken(self, pool):
        made(pool)
        made(pool)
        staged(pool)
        take(pool, 31)
        with pytest.raises(ArenaExhausted, match="for rank 4: 1 are still being saved"):
            take(pool, 32)

    def test_the_oldest_of_the_kept_ones_goes(self, pool):
        for step in (30, 20, 40):
            made(pool)
            pool.keep(staged(pool, step))
        arena, evicted = take(pool, 50)
        assert (evicted.step, arena.step) == (20, 50)
        assert sorted(a.step for a in pool.arenas.values()) == [30, 40, 50]

    def test_a_free_one_before_a_kept_one(self, pool):
        made(pool)
        pool.keep(staged(pool, 30))
        free = made(pool)
        assert take(pool, 50) == (free, None)

    def test_a_snapshot_larger_than_its_arena_cannot_be(self, pool):
        arena = made(pool)
        with pytest.raises(InvalidInput, match="cannot be in an arena"):
            pool.stage(arena, label(nbytes=arena.capacity + 1))


class TestLettingGo:
    def test_drop_removes_a_job_but_what_is_being_saved(self, pool):
        for _ in range(3):
            made(pool)
        pool.keep(staged(pool, 20))
        saving = staged(pool, 30)
        pool.drop("other")
        assert len(pool.arenas) == 3
        pool.drop("job", rank=5)
        assert len(pool.arenas) == 3
        pool.drop("job")
        assert list(pool.arenas.values()) == [saving]
        assert sorted(p.name for p in pool.root.iterdir()) == sorted(
            [saving.path.name, saving.path.with_suffix(".json").name, "lock"]
        )

    def test_close_leaves_the_snapshots_or_nothing(self, tmp_path):
        pool = ArenaPool(tmp_path / "arenas", 100 * MiB)
        pool.open()
        for _ in range(3):
            made(pool)
        kept = staged(pool)
        take(pool, 31)
        pool.close(remove=False)
        assert sorted(p.name for p in pool.root.iterdir()) == sorted(
            [f"{kept.name}.arena", f"{kept.name}.json", "lock"]
        )
        pool.open()
        made(pool)
        pool.close(remove=True)
        pool.close(remove=True)
        assert not pool.root.exists()

    def test_free_arenas_can_be_left_to_the_next_agent(self, tmp_path):
        """Not one that somebody may still copy into, nor one that belongs to other nodes."""
        pool = ArenaPool(tmp_path / "arenas", 100 * MiB)
        pool.open()
        free = [made(pool), made(pool, rank=5)]
        made(pool)
        filling, _ = take(pool, 31)
        guest, fd = pool.make("job", 0, 1000, guest=True)
        os.close(fd)
        pool.release(guest)
        pool.close(remove=False, keep_free=True)
        left = {arena.name: arena for arena in free if arena.name != filling.name}
        again = ArenaPool(pool.root, 100 * MiB)
        assert again.open() == []
        kept = [each for each in again.arenas.values() if each.name in left]
        assert len(again.arenas) == 2
        assert {(each.job, each.rank) for each in kept} == {(left[e.name].job, left[e.name].rank) for e in kept}
        assert all(each.state is State.FREE and each.capacity == left[each.name].capacity for each in kept)
        assert not list(pool.root.glob("*.free")), "from now on they are filled"
        os.close(again._lock)  # killed
        assert ArenaPool(pool.root, 100 * MiB).open() == []
        assert not list(pool.root.glob("*.arena"))

    def test_a_label_that_cannot_be_written_leaves_the_arena_as_it_was(self, pool, monkeypatch):
        made(pool)
        arena, _ = take(pool, 31)

        def full(path, fresh):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("ckptsvc.pipeline.arena._write_label", full)
        with pytest.raises(OSError, match="No space"):
            pool.stage(arena, label(step=31))
        assert (arena.state, arena.label) == (State.FILLING, None)
        pool.release(arena)

    def test_without_descriptors_nothing_is_lost(self, pool, monkeypatch):
        """What is kept stays; it was the only free arena, so that there is none."""
        kept = staged(pool) if made(pool) else None
        pool.keep(kept)

        def none_left(*arguments):
            raise OSError(24, "Too many open files")

        monkeypatch.setattr("ckptsvc.pipeline.arena.os.open", none_left)
        with pytest.raises(ArenaExhausted, match="cannot be opened: Too many open files"):
            take(pool, 31)
        with pytest.raises(ArenaExhausted, match="no arena can be made"):
            pool.make("job", 4, 1000)
        assert (kept.state, kept.label.step) == (State.KEPT, 30)


class TestRecovery:
    """An agent may be killed at any moment; the next one finds whole snapshots, and nothing else stays."""

    def test_while_memory_is_being_made(self, pool):
        pool.make("job", 4, 1000)
        assert reopened(pool) == []
        assert [p.name for p in pool.root.iterdir()] == ["lock"]

    def test_with_a_free_arena(self, pool):
        made(pool)
        assert reopened(pool) == []
        assert [p.name for p in pool.root.iterdir()] == ["lock"]

    def test_while_a_rank_copies(self, pool):
        made(pool)
        take(pool, 30)
        assert reopened(pool) == []

    def test_while_a_rank_copies_over_a_kept_snapshot(self, pool):
        made(pool)
        pool.keep(staged(pool))
        take(pool, 31)
        assert reopened(pool) == []

    def test_while_a_label_is_written(self, pool):
        made(pool)
        arena, _ = take(pool, 30)
        arena.path.with_suffix(".new").write_bytes(msgspec.json.encode(label())[:-20])
        assert reopened(pool) == []
        assert [p.name for p in pool.root.iterdir()] == ["lock"]

    @pytest.mark.parametrize("kept", [False, True])
    def test_with_a_whole_snapshot(self, pool, kept):
        made(pool)
        arena = staged(pool)
        if kept:
            pool.keep(arena)
        (found,) = reopened(pool)
        assert (found.name, found.capacity, found.job, found.rank, found.step) == (
            arena.name,
            arena.capacity,
            "job",
            4,
            30,
        )
        assert found.state is (State.KEPT if kept else State.STAGED)
        assert found.label == msgspec.structs.replace(label(), kept=kept)
        assert pool.total == arena.capacity + TAIL

    def test_while_a_kept_snapshot_is_being_labelled(self, pool):
        made(pool)
        arena = staged(pool)
        arena.path.with_suffix(".new").write_bytes(b"{")
        (found,) = reopened(pool)
        assert found.state is State.STAGED
        assert not list(pool.root.glob("*.new"))

    def test_after_a_release(self, pool):
        made(pool)
        pool.release(staged(pool))
        assert reopened(pool) == []

    def test_while_an_arena_is_removed(self, pool):
        made(pool)
        staged(pool).path.unlink()
        assert reopened(pool) == []
        assert [p.name for p in pool.root.iterdir()] == ["lock"]

    @pytest.mark.parametrize(
        "text",
        [b"", b"{}", b"null", b"\xff\xfe", b'{"job": 1}', b"[" * 10_000, msgspec.json.encode(label(nbytes=1 << 40))],
    )
    def test_with_a_label_that_is_none(self, pool, text):
        made(pool)
        staged(pool).path.with_suffix(".json").write_bytes(text)
        assert reopened(pool) == []
        assert [p.name for p in pool.root.iterdir()] == ["lock"]


class TestOwnership:
    def test_one_agent_at_a_time(self, pool):
        with pytest.raises(RunBusy, match="another agent uses the arenas"):
            ArenaPool(pool.root, 1).open()

    def test_a_dead_agent_owns_nothing(self, tmp_path):
        program = (
            "import os, sys; from pathlib import Path; from ckptsvc.pipeline.arena import ArenaPool\n"
            "ArenaPool(Path(sys.argv[1]), 1).open(); print('open', flush=True); os.kill(os.getpid(), 9)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "arenas")], capture_output=True, check=False
        )
        assert (done.returncode, done.stdout) == (-9, b"open\n")
        pool = ArenaPool(tmp_path / "arenas", 1)
        assert pool.open() == []
        pool.close(remove=True)


class TestMappings:
    @pytest.fixture
    def mappings(self):
        return Mappings()

    def test_show_whole_pages(self, pool, mappings):
        arena = made(pool)
        with open(arena.path, "r+b") as file:
            file.write(b"abc")
        with mappings.pages(str(arena.path), 3) as image:
            assert (len(image), bytes(image[:4]), image.readonly) == (4096, b"abc\0", True)

    @pytest.mark.parametrize("nbytes", [-1, 0, HUGE_PAGE + 1])
    def test_of_bytes_that_are_not_there_is_refused(self, pool, mappings, nbytes):
        arena = made(pool)
        with pytest.raises(InvalidInput, match=f"{nbytes} were asked for"), mappings.pages(str(arena.path), nbytes):
            pass

    def test_of_a_file_that_is_not_there_is_refused(self, pool, mappings):
        with pytest.raises(FileNotFoundError), mappings.pages(str(pool.root / "x.arena"), 3):
            pass

    def test_are_kept_until_they_are_forgotten(self, pool, mappings):
        arena = made(pool)
        mappings.touch(str(arena.path))
        pool.remove(arena)
        assert mapped_files(pool.root) == 1
        mappings.forget(str(arena.path))
        assert mapped_files(pool.root) == 0

    def test_one_that_is_forgotten_while_it_is_read_goes_afterwards(self, pool, mappings):
        arena = made(pool)
        with mappings.pages(str(arena.path), 3) as image:
            pool.remove(arena)
            mappings.forget(str(arena.path))
            assert bytes(image[:1]) == b"\0"
        assert mapped_files(pool.root) == 0


def mapped_files(folder: Path) -> int:
    """How many files below a folder this process maps."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/")
