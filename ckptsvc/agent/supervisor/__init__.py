"""The system service of a node with many users: root's small process, which starts each user's own agent."""
