r"""How near a fused network comes to what its parents put out together, without labels.

The parents together are their weighted mean :math:`\bar y = \sum_p w_p y_p`, where outputs are
classes the probabilities that :mod:`clafusion.merging.combination` gives. A network :math:`q` is
compared with it over all rows :math:`x`, and over all positions where there are several: by how
often both choose the same class and by

.. math::

    D_{KL}(\bar y \,\|\, q) = \operatorname{mean}_x \sum_c \bar y_c \log(\bar y_c / q_c)
    \quad\text{or}\quad
    \frac{\sum_x \|q - \bar y\|^2}{\sum_x \|\bar y - \operatorname{mean} \bar y\|^2},

the mean Kullback-Leibler divergence in nats (Kullback and Leibler, Ann. Math. Stat. 1951), or where
outputs are values the relative squared error.
"""
