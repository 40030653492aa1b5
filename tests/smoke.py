"""What an installed wheel must be able to do, outside the source tree: `python smoke.py`."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

import clafusion
from clafusion.reports.page import write_report


def main() -> None:
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
    shallow = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    data = torch.randn(200, 8)
    models = {"deep": deep, "shallow": shallow}
    result = clafusion.fuse(models, data)
    print(clafusion.summary(result))
    (one,) = clafusion.fuse_pairs(models, data)
    assert torch.equal(one.model(data), result.model(data))
    with TemporaryDirectory() as folder:  # of files that are no modules
        write_report([one], Path(folder, "report.html"))
    print(clafusion.build_info())


if __name__ == "__main__":
    main()
