"""Lets the tests of this folder import the module they share: `stored`. No deadlines: the machine may be busy."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.append(str(Path(__file__).parent))
settings.register_profile("ckptsvc", deadline=None)
settings.load_profile("ckptsvc")
