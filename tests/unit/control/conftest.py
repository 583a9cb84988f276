"""Lets the tests of this folder import the module they share: `told`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
