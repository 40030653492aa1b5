"""When two models may share a trace."""

import re

import pytest
import torch

import clafusion
from clafusion.tracing.architecture import architecture
from clafusion.tracing.fixed_values import Constant


class _Plain(torch.nn.Module):
    def __init__(self, slope=1.0, mask=1.0, tied=False, function=torch.relu):
        super().__init__()
        self.one, self.two = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.norm = torch.nn.BatchNorm1d(6)
        self.slope, self.function = slope, function
        self.register_buffer("mask", torch.full((6,), mask))
        if tied:
            self.two.weight = self.one.weight


class _Settings:
    """Such as the configuration of a model."""

    def __init__(self, value):
        self.value = value
        self.more = {"numbers": [1, 2], "none": None}


class _Uncopied:
    def __reduce_ex__(self, protocol):
        raise ValueError("not copied")


def test_an_architecture_is_all_that_an_export_can_depend_on():
    plain = architecture(_Plain())
    assert plain is not None
    other = _Plain()
    with torch.no_grad():
        other.one.weight.add_(1.0)
        other.norm.running_mean.add_(1.0)
    assert architecture(other) == plain
    for change in (
        {"slope": 2.0},
        {"slope": 1},
        {"mask": 0.0},
        {"tied": True},
        {"function": torch.tanh},
        {"function": _Settings(torch.tanh)},
        {"slope": _Settings(1.0)},
    ):
        assert architecture(_Plain(**change)) not in (plain, None)
    assert architecture(_Plain().train(False)) == plain
    assert architecture(_Plain().double()) != plain
    hooked = _Plain()
    hooked.one.register_forward_pre_hook(lambda *_: None)
    for opaque in (hooked, _Plain(slope=object()), _Plain(slope=torch.ones(1))):
        assert architecture(opaque) is None
    assert architecture(_Plain(slope=_Settings(2.0))) == architecture(_Plain(slope=_Settings(2.0)))
    assert architecture(_Plain(slope=_Settings(torch.ones(1)))) is None
    assert architecture(_Plain(slope=_Uncopied())) is None
    patterns = [architecture(_Plain(slope=[re.compile(one)])) for one in "aab"]
    assert patterns[0] == patterns[1] != patterns[2] is not None
    loaded, other = _Settings(2.0), _Settings(2.0)
    loaded._name_or_path, other._name_or_path = "one/folder", "another"
    assert architecture(_Plain(slope=loaded)) == architecture(_Plain(slope=other)) is not None


def _compiled(x):
    return torch.relu(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_module_with_a_compiled_function_is_refused_as_one_that_cannot_be_copied():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)
            self.act = torch.jit.script(_compiled)

        def forward(self, inputs):
            return self.two(self.act(self.one(inputs)))

    with pytest.raises(clafusion.InputError, match="Net cannot be copied"):
        clafusion.trace(Net(), torch.randn(4, 6))


_FACTOR = 1.0


class _ReadsAGlobal(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)

    def forward(self, inputs):
        return self.two(torch.relu(self.one(inputs) + _FACTOR))


@pytest.mark.parametrize("verify", [True, False])
def test_models_of_one_architecture_share_a_trace_as_long_as_it_is_true(monkeypatch, verify):
    torch.manual_seed(0)
    inputs = torch.randn(4, 6)
    first, second = _ReadsAGlobal(), _ReadsAGlobal()
    traced = clafusion.trace(first, inputs, verify=verify)
    again = clafusion.trace(second, inputs, verify=verify)
    assert again.module is traced.module
    assert again.model is second
    assert clafusion.trace(first, inputs + 1, verify=verify).module is not traced.module
    monkeypatch.setattr(f"{__name__}._FACTOR", 2.0)
    changed = clafusion.trace(first, inputs, verify=verify)
    assert changed.module is not traced.module
    torch.testing.assert_close(changed.run((inputs,))[0], first(inputs))


class _WithTable(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.one, self.two = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)
        self.register_buffer("table", torch.full((1, 6), value))

    def forward(self, inputs):
        return self.two(torch.relu(self.one(inputs) + self.table.view(6)))


def _constants(traced):
    return [
        value
        for layer in traced.layers
        for of_node in layer.structure
        for value in _flat(of_node)
        if isinstance(value, Constant)
    ]


def _flat(value):
    if isinstance(value, tuple):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def test_a_kept_trace_holds_no_buffer_of_its_first_model():
    torch.manual_seed(0)
    inputs = torch.randn(4, 6)
    first = _WithTable(1.0)
    traced = clafusion.trace(first, inputs)
    first.load_state_dict(_WithTable(2.0).state_dict())  # in place
    again = clafusion.trace(_WithTable(1.0), inputs)
    assert again.module is traced.module
    (constant,) = _constants(again)
    assert torch.equal(constant.whole, torch.ones(1, 6))
    assert bool((constant.reached == 1).all())
    other = clafusion.trace(first, inputs)
    assert _constants(other) != _constants(again)


@pytest.mark.parametrize("verify", [True, False])
def test_a_kept_trace_holds_nothing_of_the_data(verify):
    torch.manual_seed(0)
    data = torch.randn(1000, 6)
    wanted = data[:3].clone()
    first = clafusion.trace(_ReadsAGlobal(), data, verify=verify)
    data.zero_()
    again = clafusion.trace(_ReadsAGlobal(), wanted, verify=verify)
    assert again.module is first.module
    assert torch.equal(again.example_inputs[0], wanted)


_COUNT = 1


class _ReadsHowMany(_ReadsAGlobal):
    def forward(self, inputs):
        return tuple(super(_ReadsHowMany, self).forward(inputs) for _ in range(_COUNT))


@pytest.mark.parametrize("verify", [True, False])
def test_a_kept_trace_with_another_number_of_outputs_is_not_taken(monkeypatch, verify):
    torch.manual_seed(0)
    inputs = torch.randn(4, 6)
    model = _ReadsHowMany()
    assert len(clafusion.trace(model, inputs, verify=verify).outputs) == 1
    monkeypatch.setattr(f"{__name__}._COUNT", 2)
    assert len(clafusion.trace(model, inputs, verify=verify).outputs) == 2


def test_a_state_dict_moves_under_all_names_of_a_tied_weight():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.inner = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8)
            self.head = torch.nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(torch.relu(self.inner(self.embedding(x))))

    torch.manual_seed(0)
    model = Tied().eval()
    words = torch.randint(0, 20, (40, 6), generator=torch.Generator().manual_seed(0))
    traced = clafusion.trace(model, words)
    orders = [torch.randperm(group.size) for group in traced.groups]
    moved = clafusion.permute_channels(model.state_dict(), traced.groups, orders)
    assert torch.equal(moved["head.weight"], moved["embedding.weight"])
    assert not torch.equal(moved["head.weight"], model.head.weight)
    copied = Tied().eval()
    copied.head.weight = torch.nn.Parameter(copied.head.weight.detach().clone())  # no longer tied
    copied.load_state_dict(moved)
    torch.testing.assert_close(copied(words), model(words), rtol=0, atol=1e-5)
