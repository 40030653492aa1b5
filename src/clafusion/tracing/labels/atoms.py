"""The atoms of a run on labels: a union-find, fingerprints, and which atoms keep their places."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clafusion.tracing.labels.ids import collapse, mix

__all__ = ["Atoms", "atoms_in"]


class Atoms:
    """Atoms that are united, and what they met.

    Parameters
    ----------
    parents
        The union-find of an earlier run over the same graph. Atoms are numbered in the order of
        their creation, which is the same in every run.

    Attributes
    ----------
    parents
        The union-find: the parent of each atom; a root is its own parent.
    pinned, returned, counted, averaged
        Atoms that keep their places; those of them that the model puts out; atoms whose values the
        model adds up without a weight; those of which it takes a mean or a norm, or adds them up.
    """

    def __init__(self, parents: NDArray[np.int64] | None = None) -> None:
        self.parents = np.empty(0, dtype=np.int64) if parents is None else parents.copy()
        self.created = 0
        self._starts: list[int] = []  # of the atoms that were created together
        self.pinned: set[int] = set()
        self.returned: set[int] = set()
        self.counted: set[int] = set()
        self.averaged: set[int] = set()
        self._met: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []

    def fresh(self, count: int) -> Tensor:
        """Return ``count`` new atoms."""
        start, self.created = self.created, self.created + count
        self._starts.append(start)
        missing = np.arange(len(self.parents), self.created)
        self.parents = np.append(self.parents, missing)
        return torch.arange(start, self.created)

    def roots(self, ids: Tensor) -> Tensor:
        """Return ids with every atom replaced by its root in the union-find."""
        array = ids.numpy()
        moving = array >= 0
        if not moving.any():
            return ids
        atoms = np.where(moving, array, 0)
        while True:
            parents = self.parents[atoms]
            if np.array_equal(parents, atoms):
                break
            atoms = parents
        return torch.from_numpy(np.where(moving, atoms, array))

    def unite_stacked(self, ids: Tensor, axis: int) -> bool:
        """Unite what lies side by side along an axis, where several layers' channels are stacked.

        A sum over that axis adds up the channels of the layers, as ``+`` would. Returns whether it
        is such a stack: along the axis each place has several atoms, and those of a layer of its
        own.
        """
        if ids.dim() < 2 or -axis > ids.dim():
            return False
        rows = collapse(ids.movedim(axis, 0))[0].flatten(1)
        if len(rows) < 2 or bool((rows < 0).any()):
            return False
        seen: set[int] = set()
        for row in rows:
            if len(self.roots(row).unique()) < 2:
                return False
            layers = np.searchsorted(self._starts, row.unique().numpy(), side="right").tolist()
            if not seen.isdisjoint(layers):
                return False
            seen.update(layers)
        self.unite(rows[:1].expand(rows.shape), rows)
        return True

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Unite atoms element by element; an atom that meets a fixed id takes a fingerprint."""
        first, second = collapse(first, second)
        first, second = (self.roots(ids).reshape(-1) for ids in (first, second))
        both = (first >= 0) & (second >= 0) & (first != second)
        pairs = torch.stack([first[both], second[both]])
        while pairs.size(1):
            # Of all that a root is to be united with, the smallest becomes its parent. The others
            # still differ from it, and have their turn in the next round.
            higher, lower = pairs.amax(0).numpy(), pairs.amin(0).numpy()
            np.minimum.at(self.parents, higher, lower)
            pairs = self.roots(pairs)
            pairs = pairs[:, pairs[0] != pairs[1]]
        self.meet(first, second)
        self.meet(second, first)

    def pin(self, ids: Tensor) -> None:
        """Keep every atom in ``ids`` at its place: it joins no channel group."""
        self.pinned.update(atoms_in(ids).tolist())

    def give_out(self, ids: Tensor) -> None:
        """Pin the atoms of an output."""
        self.pin(ids)
        self.returned.update(atoms_in(ids).tolist())

    def fixed(self, ids: Tensor) -> Tensor:
        """Return labels with a fixed id in place of every atom, the same for united ones."""
        roots = self.roots(ids)
        return torch.where(roots >= 0, -1 - roots, roots)

    def count(self, ids: Tensor) -> None:
        """Note that the model adds up values of every atom in ``ids`` without a weight."""
        self.counted.update(atoms_in(ids).tolist())

    def meet(self, ids: Tensor, others: Tensor) -> None:
        """Give every atom in ``ids`` the sequence of fixed ids that it meets as a fingerprint.

        A single id that all atoms meet sets none apart, and is left out.
        """
        ids, others = collapse(ids, others)
        ids, others = self.roots(ids).reshape(-1), others.reshape(-1)
        chosen = (ids >= 0) & (others < 0)
        atoms, fixed = ids[chosen].numpy(), others[chosen].numpy()
        if len(atoms) == 0 or (fixed == fixed[0]).all():
            return
        order = np.argsort(atoms, kind="stable")
        atoms, fixed = atoms[order], fixed[order]
        starts = np.flatnonzero(np.r_[True, atoms[1:] != atoms[:-1]])
        rank = np.arange(len(atoms)) - np.repeat(starts, np.diff(np.r_[starts, len(atoms)]))
        words = mix(fixed.view(np.uint64) ^ mix(rank.astype(np.uint64)))
        self._met.append((atoms[starts], np.add.reduceat(words, starts)))

    def fingerprints(self, roots: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return for each root a hash of the set of all that its atoms met.

        Exchangeable atoms have equal fingerprints. ``roots`` has the root of every atom.
        """
        hashes = np.zeros(len(roots), dtype=np.uint64)
        if any(len(atoms) for atoms, _ in self._met):
            owners = roots[np.concatenate([atoms for atoms, _ in self._met])]
            words = np.concatenate([words for _, words in self._met])
            order = np.lexsort((words, owners))
            owners, words = owners[order], words[order]
            is_new = np.r_[True, (owners[1:] != owners[:-1]) | (words[1:] != words[:-1])]
            np.add.at(hashes, owners[is_new], mix(words[is_new]))
        return hashes


def atoms_in(ids: Tensor) -> Tensor:
    """Return the atoms in labels, each once."""
    (ids,) = collapse(ids)
    atoms: Tensor = ids[ids >= 0].unique()
    return atoms
