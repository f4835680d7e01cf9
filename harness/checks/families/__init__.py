"""The families of properties: a module here is found by itself; see `harness.checks.family` for what it declares."""
