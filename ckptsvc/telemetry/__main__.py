"""`python -m ckptsvc.telemetry`: print the reference of metrics and logs (docs/reference/metrics.md)."""

import sys

from ckptsvc.telemetry.reference import markdown

sys.stdout.write(markdown())
