"""What is right, in float64 and without PEFT: the closed form; every run holds PEFT's own merge against it."""

from harness.reference.closed_form import delta, merged_weight

__all__ = ["delta", "merged_weight"]
