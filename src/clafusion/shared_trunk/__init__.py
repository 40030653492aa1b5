r"""Classifiers of other classes -> one trunk that they share, and a branch of its own for each.

Of parents ``p`` with trunks :math:`f_p` and branches :math:`g_p`, each a classifier
:math:`g_p(f_p(x))` of its own classes, the result puts out, one task after the other,

.. math:: \bigl[\, g_1(f(x)),\; g_2(f(x)),\; \dots \,\bigr],

as ZipIt (arXiv 2305.03053) does in its partial zip. The trunk :math:`f` is a fusion of the
:math:`f_p` by all that a fusion does: layers aligned, channels matched, weights averaged, the mean
calibrated towards the parents' matched values. A branch stays its parent's: what it reads and
writes of the trunk's channels is brought into their order and number by the parent's plan ``T``,

.. math:: \tilde W = T_{out}^\top\, W\, T_{in},

and a calibration gives its layers, on what the fused trunk feeds them, what they put out in their
own parent alone. No mean is taken there.

Where the trunk ends is a dial. With nothing shared the result is the parents side by side, with all
but the last layers shared it is one network with several last layers.
"""
