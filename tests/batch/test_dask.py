"""A local Dask cluster of separate worker processes, one of which is killed in the middle."""

import json
import os
import signal

import pytest
import torch

from clafusion import fuse
from clafusion.batch.run import fuse_pairs
from tests.support import networks
from tests.support.many_pairs import DATA, SETTINGS

distributed = pytest.importorskip("distributed")


@pytest.fixture
def client(tmp_path):
    with (
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=None,
            local_directory=str(tmp_path),
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.filterwarnings("default")  # of Dask and its event loop
def test_the_pairs_of_a_killed_worker_are_done_again_and_none_twice(client, tmp_path):
    models = {f"m{i}": networks.mlp(12, *range(6, 7 + i), 5, seed=i) for i in range(7)}
    killed = []

    def kill(done, total):
        if done and not killed:
            worker = min(client.run(os.getpid).values())
            killed.append((worker, done, total))
            os.kill(worker, signal.SIGKILL)

    results = list(
        fuse_pairs(
            models,
            DATA,
            executor=client.get_executor(pure=False),
            out_dir=tmp_path / "out",
            progress=kill,
            **SETTINGS,
        )
    )
    (_, done, total) = killed[0]
    assert 0 < done < total == 21
    assert [one.error for one in results] == [None] * 21
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    pairs = [(one["first"], one["second"]) for one in map(json.loads, lines)]
    assert sorted(pairs) == [(one.first, one.second) for one in results]
    for one in results:
        wanted = fuse([models[one.first], models[one.second]], DATA, **SETTINGS).model.state_dict()
        assert all(torch.equal(one.state[name], tensor) for name, tensor in wanted.items())
