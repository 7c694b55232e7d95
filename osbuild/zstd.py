"""The door to zstd: the standard library's module from Python 3.14 on, its backport before; the same API."""

from __future__ import annotations

from typing import Any, Final

# Any: neither module has stubs for every Python that we run on.
try:
    from compression import zstd as _zstd  # type: ignore[import-not-found,unused-ignore]
except ImportError:
    from backports import zstd as _zstd

WINDOW_LOG_MAX: Final = 27
ZstdError: Final[type[Exception]] = _zstd.ZstdError
VERSION: Final[str] = _zstd.zstd_version


def decompressor(window_log: int = WINDOW_LOG_MAX) -> Any:
    """One frame's decompressor that refuses windows of more than 2^27 bytes, 128 MiB, or as many as are wished."""
    return _zstd.ZstdDecompressor(options={_zstd.DecompressionParameter.window_log_max: window_log})


def compressor(level: int) -> Any:
    """A compressor whose output depends on its input and libzstd's version only.

    libzstd cuts its input into jobs when it has workers and gives other bytes when it has none; one worker or many
    give the same. So the number of workers and the size of a job are fixed, whatever the machine.
    """
    parameter = _zstd.CompressionParameter
    return _zstd.ZstdCompressor(
        options={
            parameter.compression_level: level,
            parameter.nb_workers: 2,
            parameter.job_size: 4 << 20,
            parameter.checksum_flag: 1,
        }
    )
