"""Load the plugin: the same options and markers as an installed copy."""

pytest_plugins = ["harness.plugin"]
