"""Which nodes are lost together? The failure domain of a node, as its scheduler or its name tells it.

    SLURM_TOPOLOGY_ADDR   "s0.s4.tux12" with the pattern "switch.switch.node": the leaf switch, "s0.s4" (topology/tree);
                          "b3.tux12" with "block.node": the block (topology/block)
    x1000c0s3b0n1         HPE's component names, which PALS calls nodes by: cabinet and chassis, "x1000c0", which share
                          switches, cooling and power

In Kubernetes nothing in a pod's environment says it: set CKPTSVC_TIERS_DOMAIN to the node's zone or rack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

AUTO = "auto"
MAX_DOMAIN = 256
"""Characters of a domain."""

_XNAME = re.compile(r"(x[0-9]{1,5}c[0-9]{1,3})(s[0-9]{1,3}b[0-9]{1,2}n[0-9]{1,2})(?:[.-].*)?")


def domain_of(setting: str, environ: Mapping[str, str], node: str) -> str:
    """The failure domain of a node; "" where nothing tells it: then it counts as one of its own.

    Args:
        setting: of tiers.domain: the domain, or "auto".
        environ: the environment of the agent, or of a rank: a scheduler tells its jobs alone.
        node: the name of the node.
    """
    if setting != AUTO:
        return setting[:MAX_DOMAIN]
    names = environ.get("SLURM_TOPOLOGY_ADDR", "").split(".")
    kinds = environ.get("SLURM_TOPOLOGY_ADDR_PATTERN", "").split(".")
    if len(names) == len(kinds) > 1 and kinds[-1] == "node":
        return ".".join(names[:-1])[:MAX_DOMAIN]
    for name in (node, environ.get("SLURMD_NODENAME", "")):
        match = _XNAME.fullmatch(name)
        if match is not None:
            return match[1]
    return ""
