"""Root gives orders to the agents of users; users give none to each other's, nor lead root's astray."""

from __future__ import annotations

import json
import os

from harness.users import ALICE, BOB, Node, Person, as_user, node_of_users

from ckptsvc.errors import EXIT_STATUS
from ckptsvc.rpc import service
from ckptsvc.rpc.dial import IDENTITY_SOCKET

ROOT = Person("root", 0, 0, (0,))


def audited(node: Node, person: Person) -> list[tuple[str, str, str]]:
    path = node.home(person) / ".local/state/ckptsvc/audit.jsonl"
    if not path.exists():
        return []
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (person.uid, 0o600)
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["verb"], line["user"], line["outcome"]) for line in lines]


def test_root_may_order_and_others_may_not() -> None:
    with node_of_users() as node:
        node.start()
        for person in (ALICE, BOB):
            as_user(person, lambda: service.ask(node.directory, "agent")["directory"])
        order = ("exclude", "n9", "--reason", "a fan")
        status, said = node.command(ROOT, *order, "--user", ALICE.name, SUDO_UID="")
        assert status == 0, said
        assert "node n9 is excluded" in said
        status, said = node.command(BOB, *order, "--user", ALICE.name)
        assert (status, "only root gives orders" in said) == (EXIT_STATUS["invalid-input"], True)
        status, said = node.command(BOB, "pause", "job", "--dir", str(node.agent_directory(ALICE)))
        assert status != 0, said
        status, said = node.command(ROOT, *order, "--user", "nobody-at-all")
        assert (status, "has no agent here" in said) == (EXIT_STATUS["agent-unavailable"], True)
        mine = node.agent_directory(ALICE) / IDENTITY_SOCKET
        theirs = node.agent_directory(BOB) / IDENTITY_SOCKET

        def lead_astray() -> None:
            os.rename(mine, f"{mine}.away")
            os.symlink(theirs, mine)

        as_user(ALICE, lead_astray)
        status, said = node.command(ROOT, *order, "--user", ALICE.name, SUDO_UID="")
        assert (status, f"is no socket of user {ALICE.uid}" in said) == (EXIT_STATUS["agent-unavailable"], True)
        assert audited(node, ALICE) == [("exclude", "root", "done")]
        assert audited(node, BOB) == []
