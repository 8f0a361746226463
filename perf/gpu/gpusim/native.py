"""The interface of runtime.c: ctypes structures, flags and error codes that mirror the declarations there."""

import ctypes
from enum import IntEnum, IntFlag

MANY = 2**32 - 1  # in err_other: several parties of a data race


class Flag(IntFlag):
    """Options of a launch."""

    COUNT = 1
    RACES = 2
    SHUFFLE = 4
    FIBERS = 8


class Failure(IntEnum):
    """What ended a launch."""

    NONE = 0
    BOUNDS = 1
    SHARED_BOUNDS = 2
    MISALIGNED = 3
    RACE = 4
    DEADLOCK = 5
    TRAP = 6
    MEMORY = 7
    OTHER = 8


class NativeSite(ctypes.Structure):
    """Mirrors site_t of runtime.c."""

    _fields_ = [(name, ctypes.c_uint8) for name in ("kind", "align", "dropped")]


class NativeCount(ctypes.Structure):
    """Mirrors site_count_t of runtime.c."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("requests", "lanes", "bytes", "units")]


class NativeRegion(ctypes.Structure):
    """Mirrors region_t of runtime.c."""

    _fields_ = [("base", ctypes.c_uint64), ("end", ctypes.c_uint64)]


class NativeLaunch(ctypes.Structure):
    """Mirrors launch_t of runtime.c."""

    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("sites", ctypes.POINTER(NativeSite)),
        ("regions", ctypes.POINTER(NativeRegion)),
        ("site_counts", ctypes.POINTER(NativeCount)),
        ("seed", ctypes.c_uint64),
        ("time_limit", ctypes.c_double),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("num_sites", ctypes.c_uint32),
        ("num_regions", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("arch", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("barriers", ctypes.c_uint64),
        ("shuffles", ctypes.c_uint64),
        ("error", ctypes.c_uint32),
        ("err_cta", ctypes.c_uint32 * 3),
        ("err_thread", ctypes.c_uint32),
        ("err_site", ctypes.c_uint32),
        ("err_bytes", ctypes.c_uint32),
        ("err_other", ctypes.c_uint32),
        ("err_address", ctypes.c_uint64),
        ("err_text", ctypes.c_char * 200),
    ]
