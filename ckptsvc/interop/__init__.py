"""Other systems' checkpoints, in and out: importers and exporters stand here."""
