"""A stand-in for pydaos: as much of its documented interface as the driver uses."""

import os


class DaosErrorCode:
    """A DAOS error by its negative number."""

    def __init__(self, err_num: int) -> None:
        self.err, self.name, self.message = err_num, "DER_AGENT_COMM", "Agent communication error"

    def __str__(self) -> str:
        return f'DAOS error code {self.err} ({self.name}): "{self.message}"'


class PyDError(Exception):
    """An operation of DAOS failed."""

    def __init__(self, message: str, rc: int) -> None:
        super().__init__(message)
        self.error = DaosErrorCode(rc)
        self.message = f"{message}: {self.error}"

    def __str__(self) -> str:
        return self.message


class DaosClient:
    """The started client; the first one starts it."""

    def __init__(self) -> None:
        if not os.path.exists(os.path.join(os.environ["STANDIN_DAOS"], "agent")):
            raise PyDError("Failed to initialize DAOS", -1033)
