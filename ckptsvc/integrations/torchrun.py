"""torchrun with our rendezvous: `torchrun --rdzv-backend=ckptsvc --rdzv-endpoint=HOST:PORT --rdzv-id=JOB ...`

For those who must keep torchrun. It starts and watches the ranks as ever; the coordinator of ckptsvc says who is part
of an attempt, and gives each attempt a store of its own: with torchrun's default, ranks that are restarted can read
addresses of the attempt before (pytorch/pytorch#167288). torch finds this in the entry-point group "torchrun.handlers".

The agent on the host of the endpoint coordinates, and is started if there is none. Without an endpoint the agents
elect one, in the etcd that `--rdzv-conf` or CKPTSVC_AGENT_COORDINATION names. `--rdzv-conf`, separated by commas:

    node=NAME            name of this node, unique in the job; default: the host name
    is_host=true|false   whether the endpoint is on this node; default: whether its address is
    join_timeout=600     seconds to wait for the other nodes
    coordination=URL     etcd://HOST:PORT, several of them with + in between: etcd://A:2379+B:2379/prefix
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousParameters


def handler() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """What torch registers under the name of the entry point. Cheap: every torchrun calls it."""
    return create


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """The rendezvous of one torchrun."""
    from ckptsvc.integrations.rendezvous import Rendezvous, place_of

    return Rendezvous(parameters, place_of(parameters))
