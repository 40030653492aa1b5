"""Recurrent layers and cells: LSTM, GRU and plain ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from clafusion.tracing.labels.interpreter import LabelPropagation
from clafusion.tracing.labels.rule import Call, Label, NotFollowed, ParameterView, rule
from clafusion.tracing.labels.rules.common import rows_along


@rule(*"lstm gru rnn_tanh rnn_relu".split())
def _recurrent(propagation: LabelPropagation, call: Call) -> Label:
    """Unite each layer's hidden channels: the rows of all gates, the columns of the recurrence."""
    if "input" not in call.bound or "hx" not in call.bound or "data" in call.bound:
        raise NotFollowed("its sequences are packed")
    gates = {"lstm": 4, "gru": 3}.get(call.name, 1)
    ids = propagation.activation(call.label("input"), call.value("input"))
    weights = list(call.bound["params"])
    directions = 2 if call.value("bidirectional") else 1
    layers = call.value("num_layers")
    each = 4 if call.value("has_biases") else 2
    if len(weights) != each * directions * layers:
        raise NotFollowed("its hidden states are projected (proj_size)")
    hidden: list[Tensor] = []
    for layer in range(layers):
        row = propagation.common_row(rows_along(ids, -1))
        outputs = []
        for direction in range(directions):
            start = (layer * directions + direction) * each
            atoms = _recurrence(propagation, call, row, weights[start : start + each], gates)
            outputs.append(atoms)
            hidden.append(atoms)
        channels = torch.cat(outputs)
        ids = channels.expand(*ids.shape[:-1], len(channels))
    _tie_initial_states(propagation, call, hidden)
    states = torch.stack([atoms.expand(call.output[1].size(1), -1) for atoms in hidden])
    return (ids, *[states] * (len(call.output) - 1))


@rule(*"lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell".split())
def _recurrent_cell(propagation: LabelPropagation, call: Call) -> Label:
    """Do one step of a recurrent layer; its states move with the hidden channels."""
    gates = {"lstm_cell": 4, "gru_cell": 3}.get(call.name, 1)
    ids = propagation.activation(call.label("input"), call.value("input"))
    weights = [call.bound[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    present = [node for node in weights if isinstance(node, fx.Node)]
    atoms = _recurrence(
        propagation, call, propagation.common_row(rows_along(ids, -1)), present, gates
    )
    states = call.bound["hx"]
    for node in states if isinstance(states, (list, tuple)) else [states]:
        state = propagation.activation(call.label_of(node), call.value_of(node))
        propagation.unite(state, atoms.expand(state.shape))
    result = atoms.expand(*ids.shape[:-1], len(atoms))
    return (result, result) if isinstance(call.output, tuple) else result


def _recurrence(
    propagation: LabelPropagation, call: Call, row: Tensor, weights: Sequence[fx.Node], gates: int
) -> Tensor:
    """Unite the hidden channels of one layer and direction; return their atoms."""
    views = [label for label in map(call.label_of, weights) if isinstance(label, ParameterView)]
    if len(views) != len(weights):
        raise NotFollowed("its weights are computed from other values")
    atoms = propagation.fresh(views[1].tensor.size(1))
    propagation.weigh(views[0], "weight", {0: atoms.repeat(gates), 1: row}, inward=[1])
    propagation.weigh(views[1], "weight", {0: atoms.repeat(gates), 1: atoms}, inward=[1])
    for bias in views[2:]:
        propagation.scale(bias, atoms.repeat(gates))
    return atoms


def _tie_initial_states(
    propagation: LabelPropagation, call: Call, hidden: Sequence[Tensor]
) -> None:
    """Unite the channels of the initial states with the hidden channels of their layers."""
    initial = call.bound["hx"]
    for node in initial if isinstance(initial, (list, tuple)) else [initial]:
        ids = propagation.activation(call.label_of(node), call.value_of(node))
        for atoms, layer in zip(hidden, ids, strict=True):
            propagation.unite(layer, atoms.expand(layer.shape))
