"""Run traced graphs, node by node, with weights from anywhere."""
