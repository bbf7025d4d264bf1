"""Writes models for servers and phones: `python -m export --preset emoji --out models`."""
