"""Whether a network's layers put out anything that can be compared."""

from __future__ import annotations

from clafusion.errors import InputError
from clafusion.profiling.gram import is_constant
from clafusion.profiling.profile import ModelProfile

__all__ = ["check_alive"]


def check_alive(name: str, profile: ModelProfile) -> None:
    """Raise where a layer puts out the same for all inputs, for its similarity is undefined."""
    for layer, products, is_entered in zip(
        profile.traced.layers, profile.grams, profile.traced.entered_layers, strict=True
    ):
        if is_entered and is_constant(products):
            graphs = (
                ""
                if profile.traced.graph is None
                else ". What is put out for whole graphs is compared on many graphs: give several"
            )
            raise InputError(
                f"layer {layer.name!r} of {name} puts out the same for all inputs, so it "
                f"cannot be compared; check the model and the scale of the data{graphs}"
            )
