"""Graph networks of the suite. Whoever imports this needs torch_geometric."""

from tests.support.architectures import architecture
from tests.support.graphs import LAYERS, graph, of

__all__ = ["SOURCE"]

SOURCE = "torch_geometric"

for _name in (
    "GCN",
    "GraphSAGE",
    "GIN",
    "GAT",
    "GATv2",
    "GINE",
    "TransformerConv",
    "GraphNorm, graphs",
):
    architecture(
        f"{SOURCE} {_name}",
        of(LAYERS[_name](), graph(24, 70, graphs=2)),
        source=SOURCE,
    )(LAYERS[_name])
