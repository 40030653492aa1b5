"""Whether a network's layers put out anything that can be compared."""

from __future__ import annotations

from clafusion.errors import InputError
from clafusion.profiling.profile import ModelProfile

__all__ = ["check_alive"]


def check_alive(name: str, profile: ModelProfile) -> None:
    """Raise where a layer puts out the same for all inputs, for its similarity is undefined."""
    for layer, products, is_entered in zip(
        profile.traced.layers, profile.grams, profile.traced.entered_layers, strict=True
    ):
        if not is_entered:
            continue
        total = float(products.trace())
        spread = total - float(products.sum()) / len(products)
        if not spread > 1e-12 * total:
            graphs = (
                ""
                if profile.traced.graph is None
                else ". What is put out for whole graphs is compared on many graphs: give several"
            )
            raise InputError(
                f"layer {layer.name!r} of {name} puts out the same for all inputs, so it "
                f"cannot be compared; check the model and the scale of the data{graphs}"
            )
