"""Where modules are merged."""
