"""Any checkpoint into any format: the whole of a conversion, from addresses to a complete target.

    request.open_sources    addresses -> one Logical: read, selected, averaged
    Conversion              Logical + target -> files, tasks, what is finished already
      .run                  makes the tasks of one share, as of one of several processes
      .finish               once all shares are there: the last files

A conversion is resumed by the same request: what is finished was recorded beside the target. Several processes may work
on one conversion, each with a lease on its share; whoever finds all of it finished completes it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

import ckptsvc
from ckptsvc.errors import InvalidInput, RunBusy, SaveFailed, StoreError
from ckptsvc.format.checksum import Digests, digest128
from ckptsvc.interop.conversion.average import memory_for
from ckptsvc.interop.conversion.casts import can_cast, is_lossless
from ckptsvc.interop.conversion.ledger import Plan
from ckptsvc.interop.conversion.memory import resident
from ckptsvc.interop.conversion.native import Holding, Naming, step_of, write_native
from ckptsvc.interop.conversion.produce import Budget, Production
from ckptsvc.interop.conversion.request import Request, Sources, model_of, target_format
from ckptsvc.interop.conversion.select import Recast
from ckptsvc.interop.conversion.target import Target
from ckptsvc.interop.conversion.tasks import Task, share, tasks
from ckptsvc.interop.formats import NATIVE, exporter, split_address
from ckptsvc.interop.logical import Logical, Note
from ckptsvc.interop.outputs import Output
from ckptsvc.pipeline.catalog import Ref, newest_epoch
from ckptsvc.pipeline.clock import now_iso
from ckptsvc.pipeline.failpoint import failpoint

TRIES = 3
"""How often files are begun again where a store fails in a way that may pass."""

LOOK_AGAIN = 60.0
"""Seconds between two looks at whether the source has changed: hours of work are not done in vain then."""

TAKE_OVER = 60.0
"""Seconds after which one of several processes completes a target that another one began to complete."""


class Conversion:
    """A planned conversion.

    Args:
        request: what is asked for.
        sources: opened.
        memory: bytes that this process may have.
        holding: what each of `ranks` ranks stores, for a target of our own format with a layout.
        ranks: of `holding`.
        dry: plan only: nothing is written, not even that it was begun.
        restart: throw away what an unfinished conversion into the target has done.
        part: which of how many processes that share the work this one is; None if it works for one of them. Where
            others began with this one, what is there may be what they have completed.

    Attributes:
        budget: how memory is divided.
        output: the files.
        tasks: the work.
        finished: digests by file of what was finished before, by the number of its task.
        casts: (dtype, dtype in the target) -> tensors of which that changes values.
        infinite: by tensor, how many values became infinite in a cast.
        complete: everything was done before; there is nothing to do.

    Raises:
        InvalidInput, RunBusy, StoreFull, LayoutError, StoreError: it cannot be done, and nothing was written.
    """

    def __init__(
        self,
        request: Request,
        sources: Sources,
        memory: int,
        *,
        holding: Holding | None = None,
        ranks: int = 0,
        dry: bool = False,
        restart: bool = False,
        part: tuple[int, int] | None = (0, 1),
    ) -> None:
        self._request, self._sources, self._logical = request, sources, sources.logical
        self._holding, self._ranks = holding, ranks
        self.memory = memory
        self.format, place = target_format(request.target), split_address(request.target)[1]
        self._step = step_of(self._logical, request.options) if self.format == NATIVE else 0
        averaging = memory_for(request.average, self._logical.extent)
        self.budget = Budget.of(memory - resident() - averaging, self._logical.extent)
        self.target = Target(self.format, place, self._step, self.budget.block, part)
        self.infinite: Counter[str] = Counter()
        self.bytes_read = 0
        self.finished: dict[int, dict[str, Digests]] = {}
        try:
            self._begin(dry=dry, restart=restart, beside=part is not None and part[0] > 0)
        except BaseException:
            self.target.close()
            raise

    @property
    def ref(self) -> Ref | None:
        """The checkpoint of our own that is made."""
        return Ref(self.plan.epoch, self._step) if self.format == NATIVE else None

    @property
    def notes(self) -> list[Note]:
        """What a person should know: of the source, the target, and what was cast."""
        casts = [
            Note("lost", f"{count} tensors are rounded from {of} to {to}") for (of, to), count in self.casts.items()
        ]
        infinite = [
            Note("warning", f"{count} values of {name} are infinite now: they are too large for their new type")
            for name, count in sorted(self.infinite.items())
        ]
        return [*self._logical.notes, *self.output.notes, *casts, *infinite]

    @property
    def nbytes(self) -> int:
        """Bytes of all files of tensors."""
        return sum(file.nbytes for file in self.output.files)

    @property
    def logical(self) -> Logical:
        """What is read."""
        return self._logical

    def left(self, number: int = 0, of: int = 1) -> list[Task]:
        """The tasks of one of several workers that are not finished."""
        return [task for task in share(self.tasks, number, of) if task.number not in self.finished]

    def run(self, progress: Callable[[int], None], number: int = 0, of: int = 1) -> None:
        """Make what is left of one share.

        Args:
            progress: called with bytes written since the last call, from several threads.
            number: which of the workers this is.
            of: how many there are.

        Raises:
            Damaged: a source has changed meanwhile.
            CkptsvcError: as the source and the target raise.
        """
        for attempt in range(1, TRIES + 1):
            production = Production(self._logical, self.target.store, self.budget, progress, self._done)
            try:
                production.run(self._still_needed(self.left(number, of)))
            except StoreError as error:
                if not error.retryable or attempt == TRIES:
                    raise
                time.sleep(0.5 * attempt)
            else:
                return
            finally:
                self.infinite += production.infinite
                self.bytes_read += production.bytes_read

    def reread(self) -> None:
        """Look again at what is finished, by whomever."""
        self.finished = self._recorded()

    def finish(self, alone: bool = True) -> bool:
        """Complete the target if all tasks are finished, by whomever.

        Args:
            alone: no other process works on this conversion.

        Returns:
            whether the target is complete.

        Raises:
            SaveFailed: what was done has been removed meanwhile.
            Damaged: a source has changed meanwhile.
            CkptsvcError: as the target raises.
        """
        self.target.check_entered()
        if not alone:
            self.target.leave()  # what is left to do is shared out by a vote
        begun = self.target.ledger.read()
        if self.complete:
            if begun is not None and begun.identity == self.plan.identity:
                self.target.forget()
            return True
        if begun is None and not alone:
            return self._made_by_another()
        if begun != self.plan:
            raise SaveFailed(
                f"what was done for {self.target.url} is somebody else's now, or was thrown away",
                hint="did another command say --restart? then give this one again",
            )
        self.reread()
        if len(self.finished) < len(self.tasks):
            return False
        if not alone and not self._elected():
            return self._made_by_another()
        self._sources.check_unchanged()
        digests = {key: found for files in self.finished.values() for key, found in files.items()}
        smalls = self.output.finish(digests)
        failpoint("before_complete")
        self.target.complete(smalls, self.output.files, self.ref)
        self.target.leave()
        return True

    def close(self) -> None:
        """Give back what is open."""
        self._logical.close()
        self.target.close()

    # ---- beginning ------------------------------------------------------------------------------------------

    def _begin(self, *, dry: bool, restart: bool, beside: bool) -> None:
        """Plan, see that it can be done, and only then note that it has begun."""
        ledger = self.target.ledger
        begun = ledger.read()
        if begun is not None and restart and not dry:
            self.target.enter()
            self.target.discard(Ref(begun.epoch, self._step) if self.format == NATIVE else None)
            begun = None
        self.plan = self._new_plan()
        earlier = self.target.completed(self.plan.identity, self._step)
        if earlier is not None:
            self.plan = msgspec.structs.replace(self.plan, epoch=earlier.epoch)
        elif begun is None and not (beside and self.target.is_there()):
            self.target.check_free()
        elif begun is not None and begun.identity == self.plan.identity:
            self.plan = begun
        self.output = self._planned()
        self.casts = self._checked_casts()
        self.tasks = tasks(self.output.files, self._logical)
        ours = begun is not None and begun.identity == self.plan.identity
        late = beside and begun is None and self.target.is_there()
        self.complete = earlier is not None or late or (ours and self.target.is_renamed())
        if dry or self.complete:
            return
        planned = self.plan
        if begun is None:
            self.target.check_space(self.nbytes)
        self.target.enter()
        if not self._is_as_it_was(begun, beside):
            return
        if begun is None and self.format == NATIVE:
            epoch = self.target.take_epoch(self.plan.identity, self.plan.created)
            self.plan = msgspec.structs.replace(self.plan, epoch=epoch)
        self.target.check_name()
        self.plan = ledger.claim(self.plan)
        if self.format == NATIVE and planned != self.plan:  # another writer took the epoch, or began first
            self.output = self._planned()
            self.tasks = tasks(self.output.files, self._logical)
        self.finished = self._recorded()
        self.target.check_space(sum(task.nbytes for task in self.tasks if task.number not in self.finished))

    def _is_as_it_was(self, begun: Plan | None, beside: bool) -> bool:
        """Look again, now that nobody else does this work; whether there still is something to do.

        Raises:
            RunBusy: another process has completed it, or thrown it away, since it was planned.
        """
        now = self.target.ledger.read()
        if now is not None and now.identity == self.plan.identity and self.target.is_renamed():
            self.complete = True
            return False
        made = self.target.is_there() or self.target.completed(self.plan.identity, self._step) is not None
        if now is not None or (begun is None and not made):
            return True
        if not (beside and made):
            raise RunBusy(
                f"another process has just completed {self.target.url}, or thrown away what was done for it",
                hint="give the same command again",
            )
        self.complete = True
        return False

    def _new_plan(self) -> Plan:
        request = self._request
        family = model_of(request.family)
        rules = family.digest if family else ""  # a file of the user's own may be edited
        asked = msgspec.structs.replace(request, sources=(), target="")
        facts = [ckptsvc.__version__, self._sources.identity, self.format, asked, rules]
        title = f"{' '.join(request.sources)} -> {request.target}"
        epoch = newest_epoch(self.target.store) + 1 if self.format == NATIVE else 0
        return Plan(identity=digest128(msgspec.json.encode(facts)), title=title, created=now_iso(), epoch=epoch)

    def _planned(self) -> Output:
        logical = Recast(self._logical, self._request.dtype) if self._request.dtype else self._logical
        if self.ref is None:
            return exporter(self.format)(logical, self._request.options)
        naming = Naming(self.target.url, self.ref, self.plan.created, self.plan.identity)
        return write_native(logical, self._request.options, naming, self._holding, self._ranks)

    def _recorded(self) -> dict[int, dict[str, Digests]]:
        return self.target.ledger.done(self.tasks, [_layout(task) for task in self.tasks], self.target.store)

    def _checked_casts(self) -> dict[tuple[str, str], int]:
        """Refuse casts that are impossible, or change values without having been asked for."""
        asked = bool(self._request.dtype) or any("dtype" in name for name in self._request.options)
        found: dict[tuple[str, str], set[str]] = {}
        for file in self.output.files:
            for fill in file.fills:
                of = self._logical.meta(fill.name).dtype
                if of == fill.dtype or is_lossless(of, fill.dtype):
                    continue
                if not can_cast(of, fill.dtype):
                    raise InvalidInput(f"{fill.name} is {of}, which cannot be cast to {fill.dtype}")
                found.setdefault((of, fill.dtype), set()).add(fill.name)
        if found and not asked:
            (of, to), names = next(iter(found.items()))
            raise InvalidInput(
                f"{min(names)} is {of}, and would be rounded to {to} in {self.format}",
                hint=f"if that is what you want, say so: --dtype {to}",
            )
        return {cast: len(names) for cast, names in found.items()}

    # ---- working -----------------------------------------------------------------------------------------------

    def _still_needed(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Those that nobody else has made when their turn comes, of a source that is what it was."""
        looked = time.monotonic()
        for task in tasks:
            if time.monotonic() - looked >= LOOK_AGAIN:
                self._sources.check_unchanged()
                looked = time.monotonic()
            self.target.check_entered()
            if self.target.ledger.needs(task):
                yield task

    # ---- finishing ------------------------------------------------------------------------------------------

    def _done(self, task: Task, digests: Mapping[str, Digests]) -> None:
        self.target.ledger.record(task, _layout(task), digests)
        self.finished[task.number] = dict(digests)
        failpoint("after_task")

    def _made_by_another(self) -> bool:
        """That the target is complete, now that the records of this conversion are gone.

        Raises:
            SaveFailed: it is not.
        """
        sizes = {file.key: file.nbytes for file in self.output.files}
        if not self.target.is_made(self.plan.identity, self.ref, sizes):
            raise SaveFailed(
                f"what was done for {self.target.url} was thrown away meanwhile", hint="give the same command again"
            )
        return True

    def _elected(self) -> bool:
        """Whether this process completes the target; else it waits for the one that does.

        Raises:
            SaveFailed: nobody did.
        """
        ledger = self.target.ledger
        for turn in range(5):
            if ledger.elect(turn):
                return True
            end = time.monotonic() + TAKE_OVER
            while time.monotonic() < end:
                if ledger.read() is None:
                    return False
                time.sleep(0.2)
        raise SaveFailed(f"nobody has completed {self.target.url}", hint="give the same command again")


def _layout(task: Task) -> str:
    """What identifies the files of a task."""
    files = [
        (f.key, f.nbytes, f.fixed, [(x.offset, x.name, str(x.region), x.dtype) for x in f.fills]) for f in task.files
    ]
    return digest128(msgspec.json.encode(files))
