"""What is written computes, in a new model, what the model computes; else it is refused."""

import copy

import pytest
import torch
from torch import nn

from clafusion import InputError, fuse
from clafusion.weights.round_trip import check_round_trip
from clafusion.weights.state_files import save_model, state_of, stored_content
from tests.support import networks

X = torch.randn(5, 4)


class Net(nn.Module):
    """Has all that a state dict may lack: a hidden buffer, attributes, extra state."""

    def __init__(self, scale=1.0, factor=1.0, extra=1.0):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), scale), persistent=False)
        self.table = torch.ones(4)
        self.factor = factor
        self.extra = {"factor": extra}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def forward(self, x):
        return self.first(x * self.scale) * self.table * self.factor * self.extra["factor"]


class SharesMemory(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 4)
        self.third = nn.Linear(4, width)
        self.third.weight = nn.Parameter(self.first.weight.detach())
        self.fourth = nn.Linear(width, 2)

    def forward(self, x):
        return self.fourth(self.third(self.second(self.first(x).relu()).relu()).relu())


def checked(model, build, state=None):
    state = state_of(model) if state is None else state
    check_round_trip(model, state, build, (X,), called="'nets.py:Net'")


def test_extra_state_comes_back(tmp_path):
    model = Net(extra=3.0)
    save_model(model, tmp_path / "w.pt", lambda state: checked(model, Net, state))
    found = Net()
    found.load_state_dict(torch.load(tmp_path / "w.pt"))
    assert torch.equal(found(X), model(X))
    with pytest.raises(InputError, match=r"'_extra_state' is a dict.*write a \.pt file"):
        save_model(model, tmp_path / "w.safetensors")
    model.extra = nn.Identity()
    with pytest.raises(InputError, match=r"'_extra_state' is a Identity.*cannot be read back"):
        save_model(model, tmp_path / "other.pt")
    assert [one.name for one in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net(scale=2.0), r"non-persistent buffer 'scale' differs from a fresh model's; make it a"),
        (Net(factor=2.0), "attribute 'factor' differs from a fresh model's"),
    ],
)
def test_what_the_file_lacks_is_named_and_no_file_is_left(tmp_path, model, message):
    (tmp_path / "w.pt").write_bytes(b"the old one")
    with pytest.raises(InputError, match=message) as caught:
        save_model(model, tmp_path / "w.pt", lambda state: checked(model, Net, state))
    assert "into a new model of 'nets.py:Net'" in str(caught.value)
    assert "outputs differ by up to" in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["w.pt"]
    assert (tmp_path / "w.pt").read_bytes() == b"the old one"


def test_tensors_that_are_attributes_are_compared():
    model = Net()
    model.table = torch.full((4,), 2.0)
    with pytest.raises(InputError, match="attribute 'table' differs"):
        checked(model, Net)


def test_what_does_not_load_or_run_is_refused():
    model = Net()
    with pytest.raises(InputError, match=r"do not load into 'nets\.py:Net': .*of another shape"):
        checked(model, Net, {**state_of(model), "first.weight": torch.ones(4, 5)})
    with pytest.raises(InputError, match=r"cannot be built again to check.*ZeroDivisionError"):
        checked(model, lambda: 1 / 0)
    other = copy.deepcopy(model)
    other.forward = lambda x: 2 * Net.forward(other, x)
    with pytest.raises(InputError, match="keep what the network computes with in parameters"):
        checked(other, Net)


def test_dropout_batches_and_modes_make_no_difference():
    def build():
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 2))

    model = build().train()
    before = copy.deepcopy(model.state_dict())
    checked(model, build)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


def test_unequal_values_for_shared_memory_are_named():
    model = copy.deepcopy(SharesMemory())  # in which the two no longer share memory
    with torch.no_grad():
        model.third.weight += 1
    with pytest.raises(InputError, match="are tied in the model and differ in the file"):
        checked(model, SharesMemory)


def test_parameters_that_share_memory_are_fused_as_one(tmp_path):
    torch.manual_seed(0)
    first, second = SharesMemory(6), SharesMemory(6)
    data = torch.randn(100, 4)
    result = fuse([first, second], data)
    assert torch.equal(result.model.first.weight, result.model.third.weight)
    save_model(
        result.model,
        tmp_path / "w.safetensors",
        lambda state: checked(result.model, lambda: SharesMemory(6), state),
    )
    found = SharesMemory(6)
    found.load_state_dict(stored_content(tmp_path / "w.safetensors"))
    assert torch.allclose(found.eval()(data), result.model.eval()(data))


def test_a_network_of_linear_layers_comes_back_after_a_fusion():
    result = fuse([networks.mlp(4, 6, 5, 2), networks.mlp(4, 6, 2, seed=1)], torch.randn(50, 4))
    checked(result.model, lambda: networks.mlp(4, 6, 5, 2))
