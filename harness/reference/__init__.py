"""What is right: PEFT's own merge, and the float64 closed form that audits it."""

from harness.reference.closed_form import delta, merged_weight
from harness.reference.peft_merge import peft_merged_weights

__all__ = ["delta", "merged_weight", "peft_merged_weights"]
