"""Train, merge and evaluate LLaVA models with DeepSpeed (Visual Instruction Tuning, arXiv 2304.08485)."""

__version__ = "0.1.0"
