"""What several tests assert of networks."""

import torch

from tests.support.networks import output


def assert_same_function(model, expected, inputs, calibration="none"):
    """Equal up to float32 rounding, relative to the largest output.

    Least squares rewrites every layer from float32 products, which leaves 1e-5 a layer.
    """
    want = output(expected, inputs)
    bound = 3e-4 if calibration == "least_squares" else 2e-5
    torch.testing.assert_close(
        output(model, inputs), want, rtol=0, atol=bound * float(want.abs().max())
    )


def assert_same_logits(model, expected, inputs):
    """Equal up to float32 rounding, for models of the transformers package."""
    found, want = (output(one, inputs).logits for one in (model, expected))
    torch.testing.assert_close(found, want, rtol=0, atol=1e-4 * float(want.abs().max()))
