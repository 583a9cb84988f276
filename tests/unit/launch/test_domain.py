import pytest

from ckptsvc.launch.domain import domain_of

TREE = {"SLURM_TOPOLOGY_ADDR": "s0.s4.tux12", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}


@pytest.mark.parametrize(
    ("setting", "environ", "node", "domain"),
    [
        ("auto", {}, "n1", ""),
        ("auto", TREE, "tux12", "s0.s4"),
        ("auto", {"SLURM_TOPOLOGY_ADDR": "b3.n", "SLURM_TOPOLOGY_ADDR_PATTERN": "block.node"}, "n", "b3"),
        ("auto", {"SLURM_TOPOLOGY_ADDR": "n1", "SLURM_TOPOLOGY_ADDR_PATTERN": "node"}, "n1", ""),
        ("auto", {"SLURM_TOPOLOGY_ADDR": "a.b.c", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.node"}, "n1", ""),
        ("auto", {"SLURM_TOPOLOGY_ADDR": "a.b"}, "n1", ""),
        ("auto", {}, "x4502c0s1b0n0", "x4502c0"),
        ("auto", {}, "x4502c7s1b0n0.hsn.example", "x4502c7"),
        ("auto", {"SLURMD_NODENAME": "x1000c1s0b0n1"}, "n1", "x1000c1"),
        ("auto", {}, "x4502", ""),
        ("zone-a", TREE, "x4502c0s1b0n0", "zone-a"),
        ("", TREE, "x4502c0s1b0n0", ""),
    ],
)
def test_the_domain_of_a_node(setting, environ, node, domain):
    assert domain_of(setting, environ, node) == domain
