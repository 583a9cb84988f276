"""How a person names a checkpoint: STORE plus NAME or --step, or one address that ends in a checkpoint's folder.

ckptsvc inspect file:///runs/gpt                                the newest
ckptsvc inspect file:///runs/gpt --step 100                     the newest of that step
ckptsvc inspect file:///runs/gpt step-000000000100.e00001       this one
ckptsvc inspect /runs/gpt/step-000000000100.e00001              the same
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import click

from ckptsvc.cli.terminal import plural
from ckptsvc.errors import Damaged, IncompatibleVersion, InvalidInput, NoCheckpoint
from ckptsvc.format.commit import CommitRecord, parse_checkpoint_name
from ckptsvc.pipeline.catalog import Checkpoint, Ref, Refused, find, list_refs, open_checkpoint
from ckptsvc.storage import Store, canonical
from ckptsvc.storage.opening import open_store


class Address(NamedTuple):
    """A run, and which of its checkpoints.

    Attributes:
        url: address of the store of the run.
        name: folder of the one checkpoint that is meant, or None.
        step: the step that is meant, or None.
    """

    url: str
    name: str | None = None
    step: int | None = None


def checkpoint_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the arguments STORE and NAME and the option --step (`store`, `name`, `step`)."""
    for decorate in (
        click.option("--step", type=click.IntRange(0), metavar="N", help="The newest checkpoint of this step."),
        click.argument("name", required=False),
        click.argument("store"),
    ):
        command = decorate(command)
    return command


def parse(where: str, name: str | None = None, step: int | None = None) -> Address:
    """What the arguments of a command mean.

    Args:
        where: URL or path of a run, or of a checkpoint in it.
        name: folder of a checkpoint.
        step: a training step.

    Raises:
        InvalidInput: `name` is no name of a checkpoint, or the arguments name more than one thing.
        ConfigError: `where` is empty.
    """
    url = canonical(where)
    above, _, last = url.rstrip("/").rpartition("/")
    if parse_checkpoint_name(last):
        if name not in (None, last):
            raise InvalidInput(f"{where} is a checkpoint already, and {name} is another")
        url, name = (f"{above}/" if above.endswith("/") else above), last
    if name is not None and parse_checkpoint_name(name) is None:
        hint = f"for step {int(name)} write --step {int(name)}" if name.isdecimal() else _LOOKS_LIKE
        raise InvalidInput(f"{name!r} is no name of a checkpoint", hint=hint)
    if name is not None and step is not None:
        raise InvalidInput(f"{name} is a checkpoint already; --step {step} does not go with it")
    return Address(url, name, step)


_LOOKS_LIKE = "they look like step-000000000100.e00007; `ckptsvc ls` lists them"


@contextmanager
def opened(address: Address) -> Iterator[Store]:
    """The store of an address, closed at the end of the block."""
    store = open_store(address.url)
    try:
        yield store
    finally:
        store.close()


def matching(store: Store, address: Address) -> list[tuple[Ref, CommitRecord | Refused]]:
    """The committed checkpoints an address may mean, newest first, at least one; a bad record comes as its error.

    Raises:
        NoCheckpoint: there is none; says what there is instead.
        StoreError: the store cannot be read.
    """
    found = find(store, address.step, address.name)
    if found:
        return found
    if address.name in {ref.name for ref in list_refs(store)}:
        raise NoCheckpoint(f"{store.url}/{address.name} has no commit record: its save never finished")
    what = address.name or "checkpoint" + ("" if address.step is None else f" of step {address.step}")
    raise NoCheckpoint(f"{store.url} has no committed {what}", hint=what_instead(store))


def choose(store: Store, address: Address) -> Checkpoint:
    """Open the newest checkpoint an address may mean.

    Raises:
        NoCheckpoint: there is none.
        Damaged, IncompatibleVersion: its commit record or index cannot be used.
        StoreError: the store cannot be read.
    """
    ref, commit = matching(store, address)[0]
    try:
        if not isinstance(commit, CommitRecord):
            raise commit
        return open_checkpoint(store, ref, commit)
    except (Damaged, IncompatibleVersion) as error:
        hint = error.hint or "`ckptsvc verify` names all that is bad; --step or NAME takes another checkpoint"
        raise type(error)(f"{store.url}: {error.what}", hint=hint) from error


def what_instead(store: Store) -> str:
    """What to say where the wanted checkpoint is not: what there is."""
    committed = find(store)
    if committed:
        return f"the newest is {committed[0][0].name}; `ckptsvc ls` lists all"
    unfinished = len(list_refs(store))
    if unfinished:
        return f"{plural(unfinished, 'save')} not committed; `ckptsvc ls --all` lists them"
    runs = [name for name in list(store.children())[:50] if any(map(parse_checkpoint_name, store.children(name)))]
    if runs:
        return f"it holds runs: {', '.join(runs[:5])}"
    return "is the address right? a run has folders such as step-000000000100.e00007"
