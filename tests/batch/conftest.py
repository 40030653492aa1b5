"""Files of the models, and their pairs fused one by one."""

import pytest

from clafusion import ModelFile, fuse
from clafusion.weights.state_files import save_model
from tests.support.many_pairs import DATA, FACTORY, SETTINGS, WIDTHS, modules


@pytest.fixture
def files(tmp_path):
    (tmp_path / "nets.py").write_text(FACTORY)
    found = {}
    for name, model in modules().items():
        save_model(model, tmp_path / f"{name}.safetensors")
        factory = f"{tmp_path}/nets.py:mlp{WIDTHS[name]}"
        found[name] = ModelFile(factory, tmp_path / f"{name}.safetensors")
    return found


@pytest.fixture(scope="module")
def expected():
    models = modules()
    names = list(models)
    return {
        (one, other): fuse([models[one], models[other]], DATA, **SETTINGS)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
    }
