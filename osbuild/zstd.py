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
_TOO_LARGE: Final = "too much memory"  # in libzstd's words for a window that it was told not to allow
_RSYNCABLE: Final = 500  # ZSTD_c_rsyncable, for which Python has no name


def decompressor(window_log: int = WINDOW_LOG_MAX) -> Any:
    """One frame's decompressor that refuses windows of more than 2^27 bytes, 128 MiB, or as many as are wished."""
    return _zstd.ZstdDecompressor(options={_zstd.DecompressionParameter.window_log_max: window_log})


def wants_memory(problem: Exception) -> bool:
    """Whether a frame was refused for its window, and not for damage."""
    return _TOO_LARGE in str(problem)


def compressor(level: int) -> Any:
    """A compressor whose output depends on its input and libzstd's version only.

    libzstd cuts its input into jobs when it has workers and gives other bytes when it has none; one worker or many
    give the same. So the number of workers and the size of a job are fixed, whatever the machine.

    The content says where a job ends (after 8 MiB at most), and a job sees nothing of the one before: so behind a
    change nearly all blocks are the ones they were, though they are one frame, which every reader reads. It costs a
    third of a percent in size; jobs of half that length would cost nearly one.
    """
    parameter = _zstd.CompressionParameter
    return _zstd.ZstdCompressor(
        options={
            parameter.compression_level: level,
            parameter.nb_workers: 2,
            parameter.job_size: 8 << 20,
            parameter.overlap_log: 1,
            _RSYNCABLE: 1,
            parameter.checksum_flag: 1,
        }
    )


def job_end(compressor: Any) -> bytes:
    """A compressor's job ends here, whatever the content says."""
    rest: bytes = compressor.compress(b"", mode=compressor.FLUSH_BLOCK)
    return rest


def frame(data: bytes, level: int) -> bytes:
    """One frame with a checksum, by one thread: the same bytes from the same libzstd."""
    parameter = _zstd.CompressionParameter
    done: bytes = _zstd.compress(data, options={parameter.compression_level: level, parameter.checksum_flag: 1})
    return done
