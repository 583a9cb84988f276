"""moto's server, in which creating is one step. By itself moto looks first and writes then, in several threads.

python moto_server.py PORT
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.server import MotoRequestHandler
from werkzeug.serving import run_simple


class Application(DomainDispatcherApplication):
    """Takes requests with the condition one at a time."""

    _creating = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        with self._creating if "HTTP_IF_NONE_MATCH" in environ else contextlib.nullcontext():
            return super().__call__(environ, start_response)


if __name__ == "__main__":
    os.environ["MOTO_PORT"] = sys.argv[1]
    application = Application(create_backend_app)
    run_simple("127.0.0.1", int(sys.argv[1]), application, threaded=True, request_handler=MotoRequestHandler)
