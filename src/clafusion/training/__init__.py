"""Train a fused network further: finetuning on labels and distillation from teachers.

Nothing in :func:`clafusion.fuse` needs this package, and a plain PyTorch loop serves as well.
"""

from clafusion.training.distillation import distill
from clafusion.training.finetuning import finetune
from clafusion.training.loop import TrainingResult

__all__ = ["TrainingResult", "distill", "finetune"]
