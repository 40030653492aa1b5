"""What a fusion of classifiers of other classes returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clafusion.assessment.evaluation import Evaluation, network_of
from clafusion.assessment.nearness import DISTANCES, Nearness
from clafusion.assessment.output_cache import OutputCache
from clafusion.results import RESULT, FusionResult, parameter_count
from clafusion.shared_trunk.split import Split
from clafusion.shared_trunk.tasks import task_scores
from clafusion.table import Table

__all__ = ["SharedTrunkResult"]


@dataclass(frozen=True)
class SharedTrunkResult(FusionResult):
    """One network of a shared trunk and a branch for each parent, and how it came about.

    ``model`` is a :class:`clafusion.shared_trunk.network.SharedTrunk`: it puts out ``(batch,
    classes)``, the classes of the first parent, then those of the second one, and so on.
    ``problem`` is that of the trunk; where nothing is shared each network's own. ``assessment``
    says how near the result is to the parents side by side, over all classes. Other attributes are
    those of :class:`clafusion.FusionResult`.

    Attributes
    ----------
    sizes
        How many classes each parent has, in order: ``model(x).split(result.sizes, 1)`` are the
        tasks' outputs.
    split
        Where the trunk ends in each parent.
    nearness
        How near the result is to each parent on that one's classes, by name; on data that was kept
        out of the fusion, without labels.
    is_exact
        Whether the trunk puts out what each parent's does, so that nothing was calibrated.
    """

    sizes: tuple[int, ...] = ()
    split: Split = field(default_factory=lambda: Split((), None, ()))
    nearness: Mapping[str, Nearness] = field(default_factory=dict)
    is_exact: bool = False

    def __repr__(self) -> str:
        facts = [
            f"{parameter_count(self.model)} parameters",
            f"{' + '.join(map(str, self.sizes))} classes",
            self.shared_text,
        ]
        if self.evaluation is not None:
            facts.append(f"accuracy {100 * (self.evaluation.scores[RESULT].accuracy or 0):.1f} %")
        elif self.assessment is not None:
            facts.append(str(self.assessment.result).partition(", divergence")[0])
        return f"<SharedTrunkResult {', '.join(facts)}>"

    @property
    def shared_text(self) -> str:
        """Up to which layer the trunk is shared, in words."""
        if self.split.is_empty:
            return "nothing shared"
        place = self.aligned.reference
        whole = len(self.aligned.profiles[place].traced.layers)
        return f"{self.split.counts[place]} of {whole} layers shared, to {self.split.layers[place]}"

    @property
    def table(self) -> Table:
        """One row for each network: how near the result is to it, and how good it is.

        That of the result says how near it is to all of them side by side.
        """
        near = dict(self.nearness)
        if self.assessment is not None:
            near[RESULT] = self.assessment.result
        return self._table(near, DISTANCES["classes"])

    def evaluated(
        self,
        inputs: Iterable[tuple[Tensor, ...]],
        labels: Tensor,
        known_outputs: OutputCache | None = None,
    ) -> Evaluation:
        """Do what :meth:`evaluate` does, with inputs in batches of tensors.

        Labels are classes among those of all parents, one parent's behind the other's; see
        :func:`clafusion.shared_trunk.tasks.task_scores`.
        """
        own = network_of(self.model, next(iter(self.parent_models.values())).keywords)
        parents = self._parent_networks(known_outputs)
        return task_scores(own, parents, self.sizes, inputs, labels)

    @property
    def taken(self) -> dict[str, Any]:
        """What was taken where options leave a choice; also ``shared``, where the trunk ends."""
        found = super().taken
        found["shared"] = {
            "layers": dict(zip(self.names, self.split.layers, strict=True)),
            "counts": dict(zip(self.names, self.split.counts, strict=True)),
            "is_exact": self.is_exact,
        }
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return what was found and done, as plain data for JSON."""
        return {
            **super().to_dict(),
            "sizes": list(self.sizes),
            "nearness": {
                name: {"agreement": one.agreement, "distance": one.distance}
                for name, one in self.nearness.items()
            },
        }
