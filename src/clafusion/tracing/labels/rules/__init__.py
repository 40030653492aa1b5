"""What each operation does with labels, a module for each family of operations.

Importing this package registers every rule. To add a rule, write a function
``(propagation, call) -> Label`` in the module of its family, under
``@rule("name of the ATen operation")``.
"""

from clafusion.tracing.labels.rules import (
    attention,
    einsum,
    elementwise,
    indexing,
    norms,
    recurrent,
    reductions,
    structural,
    weighted,
)

__all__ = [
    "attention",
    "einsum",
    "elementwise",
    "indexing",
    "norms",
    "recurrent",
    "reductions",
    "structural",
    "weighted",
]
