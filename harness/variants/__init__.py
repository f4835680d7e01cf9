"""What a module of a LoRA file can be: the plain pair A and B, and everything else that trainers save."""

from harness.variants.table import VARIANTS, get_variant
from harness.variants.variant import Update, Variant

__all__ = ["VARIANTS", "Update", "Variant", "get_variant"]
