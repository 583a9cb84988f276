"""Parallel layouts, rules for families of models, and maps between names."""
