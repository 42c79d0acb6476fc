"""The claims of the papers behind this library, run again: ``python -m fourfold.reproduce``."""
