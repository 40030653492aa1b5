r"""Blocks of several trained models, of any kinds -> one network, stitched in closed form.

A model is cut where one value alone passes, into ``K`` blocks. Between two blocks of models ``a``
and ``b`` stands a *stitch*: an affine map of the channels, which is the only thing that is fitted,

.. math:: \min_{W, b} \|W x_a + b - x_b\|^2 + \lambda \|W\|^2

where :math:`x_b` is what the second block reads in its own model, and :math:`x_a` what the first
one puts out in the new network.

Then each channel gets the deviation that it has in :math:`x_b`, up to twice its own, as a
regression shrinks what it cannot explain.

Blocks are compared as by pFedHR (arXiv 2308.08643): two blocks are ``1 / (CKA of their inputs + CKA
of their outputs)`` apart, and form ``K`` groups, of which a candidate takes one block each, in
order. As for DeRy (arXiv 2210.17409) a candidate may have so many parameters and operations at
most.
"""
