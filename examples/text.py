"""Byte-level text for the examples: files, held-out split, batches, a bigram model to beat."""

import pathlib
import sysconfig
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 15  # the split's unit, bytes
_EVERY = 16  # one block in so many is held out
_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "pydoc_data"}

Bytes = NDArray[np.uint8]


class Text(NamedTuple):
    train: Bytes
    held_out: Bytes


def load(paths: Sequence[str], limit: int = 1 << 25) -> Text:
    """Reads files and folders (recursively); without any, the standard library's sources.

    At most `limit` bytes. Every sixteenth block of 32 KiB is held out.
    """
    chunks: list[bytes] = []
    size = 0
    for file in _files(paths):
        content = file.read_bytes()
        if b"\0" not in content[:1024]:  # not text
            chunks.append(content[: limit - size])
            size += len(chunks[-1])
        if size >= limit:
            break
    data = np.frombuffer(b"".join(chunks), np.uint8)
    blocks = [data[i : i + _BLOCK] for i in range(0, data.size, _BLOCK)]
    if len(blocks) < 2:
        raise ValueError(f"--data: must hold at least {2 * _BLOCK} bytes of text, got {data.size}")
    # From the first block on, so that the smallest text has a held-out part too.
    held_out = np.concatenate(blocks[::_EVERY])
    train = np.concatenate([b for i, b in enumerate(blocks) if i % _EVERY])
    return Text(train, held_out)


def _files(paths: Sequence[str]) -> Iterator[pathlib.Path]:
    if not paths:
        library = pathlib.Path(sysconfig.get_paths()["stdlib"])
        for file in sorted(library.rglob("*.py")):
            if not _SKIPPED & set(file.relative_to(library).parts):
                yield file
        return
    for name in paths:
        path = pathlib.Path(name)
        if path.is_dir():
            yield from (f for f in sorted(path.rglob("*")) if f.is_file())
        elif path.is_file():
            yield path
        else:
            raise ValueError(f"--data: must name a file or a folder, got {name!r}")


def batch(data: Bytes, step: int, *, size: int, length: int, seed: int) -> NDArray[np.int32]:
    """`size` random windows of `length` + 1 bytes; a function of seed and step alone, so that a
    resumed run, and every process of a run, sees the same data."""
    starts = np.random.default_rng([seed, step]).integers(0, data.size - length, size)
    return _windows(data, starts, length)


def held_out_batches(
    data: Bytes, *, batches: int, size: int, length: int
) -> list[NDArray[np.int32]]:
    """`batches` batches of evenly spaced windows."""
    starts = np.linspace(0, data.size - length - 1, batches * size).astype(np.int64)
    return [_windows(data, part, length) for part in np.split(starts, batches)]


def _windows(data: Bytes, starts: NDArray[np.int64], length: int) -> NDArray[np.int32]:
    return data[starts[:, None] + np.arange(length + 1)[None, :]].astype(np.int32)


def bigram_loss(train: Bytes, windows: Sequence[NDArray[np.int32]], alpha: float = 0.1) -> float:
    """Mean nats per byte of p(next | byte) = (count + alpha) / (total + 256 alpha) on `windows`."""
    pairs = train[:-1].astype(np.int64) * 256 + train[1:]
    counts = np.bincount(pairs, minlength=256 * 256).reshape(256, 256) + alpha
    log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
    tokens = np.concatenate(windows)
    return float(-log_p[tokens[:, :-1], tokens[:, 1:]].mean())
