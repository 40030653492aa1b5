"""A folder of images, through a directory's image processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clafusion.errors import InputError
from clafusion.interop.huggingface import quiet, transformers_library
from clafusion.weights.messages import one_line

__all__ = ["image_files", "processed"]

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")
_FILES = ("preprocessor_config.json", "processor_config.json")
_BATCH_SIZE = 64


def image_files(folder: Path, limit: int | None = None) -> list[Path]:
    """Return the images in a folder and in the folders in it, in the order of their paths.

    Of more than ``limit`` these are spread evenly over all: each class may have a folder.

    Raises
    ------
    InputError
        There is none.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1; got {limit}")
    every = sorted(one for one in folder.rglob("*") if one.suffix.lower() in _ENDINGS)
    if not every:
        raise InputError(f"{str(folder)!r} holds no images ({', '.join(_ENDINGS)})")
    count = len(every) if limit is None else min(limit, len(every))
    return [every[i * len(every) // count] for i in range(count)]


def processed(files: Sequence[Path], directory: Path) -> list[dict[str, Tensor]]:
    """Return batches of a network's inputs by name, as its directory's processor makes them.

    Parameters
    ----------
    files
        The images.
    directory
        A Hugging Face directory with an image processor.

    Raises
    ------
    InputError
        The directory has no processor or it cannot be read, an image cannot be read, or the images
        become inputs of unlike sizes.
    """
    processor = _processor(directory)
    found = [
        _named(processor, files[start : start + _BATCH_SIZE], directory)
        for start in range(0, len(files), _BATCH_SIZE)
    ]
    sizes = {tuple(one.shape[1:]) for batch in found for one in batch.values()}
    if len({frozenset(batch) for batch in found}) > 1 or len(sizes) > len(found[0]):
        raise InputError(
            f"the processor in {str(directory)!r} makes inputs of unlike sizes of these images: "
            "bring them to one size"
        )
    return found


def _processor(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in _FILES):
        raise InputError(
            f"{str(directory)!r} has no image processor (none of {', '.join(_FILES)}): give arrays "
            "(.npy, .npz), or copy the processor's files into the directory"
        )
    library = transformers_library()
    try:
        with quiet():
            return library.AutoImageProcessor.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise InputError(
            f"the image processor in {str(directory)!r} cannot be read: {one_line(error)}"
        ) from error


def _named(processor: Any, files: Sequence[Path], directory: Path) -> dict[str, Tensor]:
    images = [_image(one) for one in files]
    try:
        found = processor(images=images, return_tensors="pt")
    except Exception as error:
        raise InputError(
            f"the image processor in {str(directory)!r} does not take these images: "
            f"{one_line(error)}"
        ) from error
    return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _image(file: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("a folder of images needs the library pillow: install it") from error
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"the image {str(file)!r} cannot be read: {one_line(error)}") from error
