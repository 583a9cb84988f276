"""Thin adapters of the session for training frameworks stand here."""
