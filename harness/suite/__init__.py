"""The conformance suite as pytest tests: `pytest --pyargs harness.suite --lora-loader=SPEC`."""
