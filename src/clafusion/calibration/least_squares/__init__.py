r"""Calibration by least squares: regress every fused layer onto the parents' aligned outputs.

The fused network is walked in order, on its own activations. Each linear or convolution layer,
together with the BatchNorm behind it, is an affine map of its input ``x``; it is replaced by the
one that comes closest to what the parents put out at the same place,

.. math:: \min_{W, b} \sum \lVert W x + b - t \rVert^2 + \lambda \lVert W - W_0 \rVert^2,
          \qquad t = \sum_p v_p\, T_{out,p}^\top y_p,

with ``W_0`` the averaged weights and ``v_p`` the weight of parent ``p``. Four things make it work
across depths:

- The layer that a residual addition follows aims at the parents' *sums* minus the fused shortcut,
  so that each block corrects the error so far.
- Before a ReLU the goal is the mean of the parents' *activations*: where that is positive the layer
  should put it out, elsewhere anything below 0 will do (solved by majorisation, some rounds).
- A hidden channel that one layer writes and one layer reads needs no partner. Of all parents'
  channels side by side those are kept by which the reading layer's output is best told
  (:mod:`clafusion.calibration.channel_selection`).
- Networks that solve a task by different features have no good mean of them. So the interior may
  be anchored at one parent, ``v`` between the weights ``w`` and that parent alone, and only the
  network's outputs aim at the weighted mean with ``w`` itself. Where the parents learnt different
  things it should not be. Which of the two it is shows without labels: how far the fused network's
  outputs are from the weighted mean of the parents'.

Anchors are tried on an eighth of the inputs, and compared on others; only the best is regressed on
all (:mod:`.anchors`). All that are tried are followed at once: each parent runs once, whatever
their number, and what the candidates share of a layer's goal is computed once (:mod:`.walks`).

Where the parents put out a mean of probabilities the last layer is refitted afterwards
(:mod:`clafusion.calibration.output_layer`).

The normal equations are in closed form: no labels and no gradient steps. Layer-wise regression onto
the parents' features is the idea of RegMean (arXiv 2212.09849) and PLeaS (arXiv 2407.02447); here
it crosses widths and depths, and layers see the fused network's own inputs.
"""

from clafusion.calibration.least_squares.anchors import anchored_weights
from clafusion.calibration.least_squares.regression import regress_anchored

__all__ = ["anchored_weights", "regress_anchored"]
