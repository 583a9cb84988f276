"""Which checkpoints a restore gives up, and for which errors."""

from types import SimpleNamespace

import pytest

from ckptsvc.client.candidates import Candidate
from ckptsvc.client.group import Alone
from ckptsvc.client.restore import Image
from ckptsvc.client.session import Session
from ckptsvc.errors import Damaged, LayoutError


class Contradictory:
    """Candidates of which no two ranks agree about a tensor."""

    def open(self, candidate: Candidate) -> Image:
        raise LayoutError("ranks 0 and 1 disagree about the shape of w")


@pytest.mark.parametrize(("tier", "error"), [("memory", Damaged), ("local", Damaged), ("store", LayoutError)])
def test_a_snapshot_whose_shards_do_not_fit_together_is_passed_over(tier: str, error: type[Exception]) -> None:
    """It was never a checkpoint; in the store, where nothing like that is committed, it is the end."""
    session = SimpleNamespace(_group=Alone())
    with pytest.raises(error, match="disagree"):
        Session._restore_one(session, Contradictory(), Candidate(1, 10, tier))  # type: ignore[arg-type]
