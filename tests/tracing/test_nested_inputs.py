"""Models whose inputs are lists or mappings of tensors."""

import pytest
import torch
from torch import nn

from clafusion import InputError, fuse, trace
from clafusion.execution.nesting import flattened, nested, part

X, LEVEL, SCALE = (
    torch.randn(30, size, generator=torch.Generator().manual_seed(size)) for size in (6, 4, 1)
)
BATCH = {"x": X, "levels": [LEVEL, SCALE]}


class TakesAMapping(nn.Module):
    def __init__(self, width, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, width), nn.Linear(4, width)
        self.head = nn.Linear(width, 3)

    def forward(self, batch):
        level, scale = batch["levels"]
        return {"logits": self.head((self.first(batch["x"]) + self.second(level) * scale).relu())}


class TakesAList(TakesAMapping):
    def forward(self, levels, scale):
        return self.head((self.first(levels[0]) + self.second(levels[1]) * scale).relu())


class TakesNames(TakesAMapping):
    def forward(self, *parts):
        return super().forward(*parts)


@pytest.mark.parametrize(
    ("data", "example"),
    [
        ([{"batch": BATCH}], {"batch": BATCH}),
        ([(BATCH, torch.zeros(30))], (BATCH,)),
        ([{"batch": BATCH}], {"batch.x": X, "batch.levels.0": LEVEL, "batch.levels.1": SCALE}),
    ],
)
def test_a_mapping_of_tensors_is_an_input(data, example):
    models = [TakesAMapping(9, 0), TakesAMapping(7, 1)]
    traced = trace(models[0], example)
    assert traced.keywords == ("batch.x", "batch.levels.0", "batch.levels.1")
    assert [one.size for one in traced.groups] == [9]
    fused = fuse(models, data, [1, 0], example_inputs=example, calibration="none").model
    torch.testing.assert_close(fused(BATCH)["logits"], models[0](BATCH)["logits"])
    assert fuse(models, data, example_inputs=example).model(BATCH)["logits"].shape == (30, 3)


def test_a_list_of_tensors_is_an_input():
    models = [TakesAList(9, 0), TakesAList(7, 1)]
    inputs = [X, LEVEL], SCALE
    data = [(*inputs, torch.zeros(30))]
    fused = fuse(models, data, [1, 0], example_inputs=inputs, calibration="none").model
    torch.testing.assert_close(fused(*inputs), models[0](*inputs))


def test_inputs_without_names_are_refused():
    with pytest.raises(InputError, match="give lists and mappings of tensors by name"):
        trace(TakesNames(9, 0), (BATCH,))


def test_a_batch_that_lacks_a_part_is_refused():
    models = [TakesAMapping(9, 0), TakesAMapping(7, 1)]
    lacking = [{"batch": {"x": X, "levels": [LEVEL]}}]
    with pytest.raises(InputError, match=r"missing \['batch.levels.1'\]"):
        fuse(models, lacking, example_inputs={"batch": BATCH})


def test_names_say_where_a_tensor_belongs():
    names, values = zip(*flattened(BATCH, "batch"), strict=True)
    whole = nested(names, values)
    assert whole["batch"]["x"] is X
    assert whole["batch"]["levels"][1] is SCALE
    assert part(whole, "batch.levels.0") is LEVEL
    assert part(whole, "batch.levels.2") is None
    assert part(whole, "batch.x.0") is None


class TakesKeywords(TakesAMapping):
    def forward(self, x, **others):
        level, scale = others["levels"]
        return self.head((self.first(x) + self.second(level) * scale).relu())


@pytest.mark.parametrize("is_replaced", [False, True], ids=["method", "replaced"])
def test_keywords_that_no_signature_names_are_inputs(is_replaced):
    models = [TakesKeywords(9, 0), TakesKeywords(7, 1)]
    if is_replaced:  # as hooks of other libraries do
        models[0].forward = models[0].forward
    traced = trace(models[0], BATCH)
    assert [one.size for one in traced.groups] == [9]
    assert ("forward" in vars(models[0])) == is_replaced
    fused = fuse(models, [BATCH], example_inputs=BATCH, calibration="none").model
    assert fused(**BATCH).shape == (30, 3)
    torch.testing.assert_close(trace(models[1], BATCH).model(**BATCH), models[1](**BATCH))


def test_keys_that_are_numbers_stay_keys():
    given = {"maps": {"0": X, "1": LEVEL}, "list": [X, LEVEL]}
    flat = [pair for name, one in given.items() for pair in flattened(one, name)]
    names, values = zip(*flat, strict=True)
    assert names == ("maps.'0'", "maps.'1'", "list.0", "list.1")
    again = nested(names, values)
    assert again["maps"].keys() == {"0", "1"}
    assert isinstance(again["list"], list)
    assert all(part(given, name) is value for name, value in flat)
