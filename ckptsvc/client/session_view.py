"""What a notebook shows of a session."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptsvc.html import view
from ckptsvc.quantities import duration

if TYPE_CHECKING:
    from ckptsvc.client.session import Session


def session_view(session: Session) -> str:
    """Where the training stands, as this rank knows it: HTML without a script."""
    place, every = session._place, session.settings.save.every
    committed = session.committed_step
    interval = "off" if every is None else f"{every.steps:,} steps" if every.steps else duration(every.seconds)
    facts = [
        ("steps done", f"{session.steps_done:,}"),
        ("committed", "none yet" if committed is None else f"step {committed:,}"),
        ("rank", f"{place.rank} of {place.world_size}"),
        ("attempt", str(place.attempt)),
        ("saves every", interval),
        ("last save blocked", f"{1000 * session.last_blocked:.1f} ms"),
        ("skipped", f"{session.skipped:,}"),
        ("started from", session.restored_from or "nothing"),
    ]
    state = "closed" if session._closed.is_set() else "connected" if session._link.identity else "without an agent"
    return view(f"Training {place.job}: {state}", session._url, facts, note=f"on {place.node}")
