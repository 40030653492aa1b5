"""Data files: what is read and how it is scaled, and what is refused."""

import gzip
import io
import lzma

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clafusion import InputError
from clafusion.profiling.samples import load_labels, load_named_samples, load_samples

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 3, 4, 5), dtype=np.uint8)
REAL = np.random.default_rng(1).normal(size=(7, 6))


def packed(array_or_arrays):
    buffer = io.BytesIO()
    if isinstance(array_or_arrays, dict):
        np.savez(buffer, **array_or_arrays)
    else:
        np.save(buffer, array_or_arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("ending", [".npy", ".npz", ".npy.gz", ".npz.xz", ".pt", ".safetensors"])
def test_every_kind_of_file_gives_the_same_samples(tmp_path, ending):
    path = tmp_path / f"data{ending}"
    match ending:
        case ".pt":
            torch.save(torch.from_numpy(REAL), path)
        case ".safetensors":
            save_file({"x": torch.from_numpy(REAL)}, path)
        case ".npy.gz":
            path.write_bytes(gzip.compress(packed(REAL)))
        case ".npz.xz":
            path.write_bytes(lzma.compress(packed({"x": REAL})))
        case ".npz":
            path.write_bytes(packed({"x": REAL}))
        case _:
            path.write_bytes(packed(REAL))
    samples = load_samples(path)
    assert samples.dtype == torch.float32
    assert torch.equal(samples, torch.from_numpy(REAL).float())
    assert torch.equal(load_samples(path, limit=2), samples[:2])


def test_bytes_are_scaled_and_normalised_as_told(tmp_path):
    np.save(tmp_path / "d.npy", IMAGES)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    found = load_samples(tmp_path / "d.npy", scale=255, mean=mean, std=std)
    expected = (IMAGES / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    # Three roundings of float32 on values of at most 3, the last divided by 0.2.
    np.testing.assert_allclose(found.numpy(), expected, atol=4e-6)
    one = load_samples(tmp_path / "d.npy", scale=2, mean=[3], std=[4], shape=(60,))
    np.testing.assert_allclose(one.numpy(), ((IMAGES / 2 - 3) / 4).reshape(7, 60), rtol=1e-6)


def test_whole_numbers_stay_whole_unless_scaled(tmp_path):
    np.save(tmp_path / "d.npy", np.arange(12).reshape(3, 4))
    assert load_samples(tmp_path / "d.npy").dtype == torch.int64
    assert load_samples(tmp_path / "d.npy", scale=4).dtype == torch.float32


def test_any_layout_in_memory_is_read(tmp_path):
    for array in (REAL.astype(">f8"), np.asfortranarray(REAL), REAL[::-1][::-1]):
        np.save(tmp_path / "d.npy", array)
        assert torch.equal(load_samples(tmp_path / "d.npy"), torch.from_numpy(REAL).float())


def test_the_array_is_chosen_by_key_or_by_a_usual_name(tmp_path):
    path = tmp_path / "d.npz"
    path.write_bytes(packed({"images": REAL, "x_train": REAL + 1, "y": REAL + 2}))
    assert torch.equal(load_samples(path), torch.from_numpy(REAL + 1).float())
    assert torch.equal(load_samples(path, key="y"), torch.from_numpy(REAL + 2).float())
    with pytest.raises(InputError, match="has no 'z'; it has images, x_train, y"):
        load_samples(path, key="z")
    path.write_bytes(packed({"a": REAL, "b": REAL}))
    with pytest.raises(InputError, match=r"several arrays \(a, b\)"):
        load_samples(path)


REFUSED = {
    "bytes without a scale": ("d.npy", IMAGES, {}, "how they were scaled"),
    "an unfitting mean": ("d.npy", IMAGES, {"mean": [1.0, 2.0]}, "mean has 2 numbers"),
    "an unfitting shape": ("d.npy", REAL, {"shape": (4, 2)}, "shape 4x2 does not fit"),
    "no samples": ("d.npy", REAL[:0], {}, "holds no samples"),
    "a single number": ("d.npy", np.float32(3), {}, "holds no samples"),
    "complex numbers": ("d.npy", REAL * 1j, {}, "real numbers are needed"),
    "text": ("d.npy", np.array(["a", "b"]), {}, "numbers are needed"),
    "objects": ("d.npy", np.array([{}, []], dtype=object), {}, "cannot be read"),
    "limit 0": ("d.npy", REAL, {"limit": 0}, "limit must be at least 1"),
    "scale 0": ("d.npy", REAL, {"scale": 0.0}, "scale must be positive"),
    "an endless std": ("d.npy", REAL, {"std": [np.inf]}, "std must be positive"),
    "a mean of no number": ("d.npy", REAL, {"mean": [np.nan]}, "mean must be finite"),
    "a scale that is none": ("d.npy", REAL, {"scale": True}, "scale must be positive"),
    "std 0": ("d.npy", REAL, {"std": [0.0]}, "std must be positive"),
    "another ending": ("d.csv", REAL, {}, "unknown ending"),
    "another packed ending": ("d.pt.xz", REAL, {}, "only .npy and .npz files may be packed"),
    "a key of one array": ("d.npy", REAL, {"key": "x"}, r"one array, and key='x' \(--data-key\)"),
    "no packed file": ("d.npz.xz", REAL, {}, "cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused(tmp_path, name):
    path, array, settings, message = REFUSED[name]
    with open(tmp_path / path, "wb") as file:
        np.save(file, array, allow_pickle=True)
    with pytest.raises(InputError, match=message) as caught:
        load_samples(tmp_path / path, **settings)
    assert "\n" not in str(caught.value)


def test_a_list_of_tensors_is_refused(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "d.pt")
    with pytest.raises(InputError, match="holds a list"):
        load_samples(tmp_path / "d.pt")


def test_a_choice_of_sorted_samples_has_all_classes_and_is_the_same_each_time(tmp_path):
    labels = torch.arange(100).sort().values
    torch.save({"x": labels, "input_ids": labels[:, None]}, tmp_path / "a.pt")
    chosen = load_samples(tmp_path / "a.pt", key="x", limit=20, seed=0)
    assert torch.equal(chosen, chosen.sort().values)
    assert len(chosen.unique()) == 20
    assert chosen.max() > 60
    again = load_named_samples(tmp_path / "a.pt", ["input_ids"], 20, 0)["input_ids"]
    assert torch.equal(again[:, 0], chosen)
    assert not torch.equal(load_samples(tmp_path / "a.pt", key="x", limit=20, seed=1), chosen)
    assert torch.equal(load_samples(tmp_path / "a.pt", key="x", limit=20), labels[:20])
    assert torch.equal(load_samples(tmp_path / "a.pt", key="x", limit=200, seed=0), labels)


def test_a_broken_archive_of_named_inputs_is_refused(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"this is no archive")
    with pytest.raises(InputError, match=r"broken.npz' cannot be read"):
        load_named_samples(tmp_path / "broken.npz", ["input_ids"])


def test_labels_are_none_of_a_file_of_one_array(tmp_path):
    np.save(tmp_path / "d.npy", IMAGES)
    torch.save(torch.from_numpy(IMAGES), tmp_path / "d.pt")
    for name in ("d.npy", "d.pt"):
        with pytest.raises(InputError, match=rf"{name}' holds one array, the inputs, and no 'y'"):
            load_labels(tmp_path / name, "y")
    with pytest.raises(InputError, match=r"d\.pt' holds one array, and key='x'"):
        load_samples(tmp_path / "d.pt", key="x")
