"""The runtime's C structures (runtime/runtime.h, shim/mh_abi.h), field by field."""

from __future__ import annotations

import ctypes


class BufferArgument(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("element", ctypes.c_uint32),
        ("residue", ctypes.c_uint32),
        ("is_output", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
        ("present", ctypes.c_void_p),
        ("read", ctypes.c_uint64),
        ("written", ctypes.c_uint64),
        ("unwritten", ctypes.c_uint64),
        ("first_unwritten", ctypes.c_uint64),
    )


class LaunchArguments(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("declarations", ctypes.c_void_p),
        ("image", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(BufferArgument)),
        ("buffer_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("schedule", ctypes.c_uint32),
        ("check", ctypes.c_uint32),
        ("workers", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("step_limit", ctypes.c_uint64),
        ("threadgroups", ctypes.c_uint64),
        ("barriers", ctypes.c_uint64),
        ("collectives", ctypes.c_uint64),
        ("fault_address", ctypes.c_uint64),
        ("fault_pc", ctypes.c_uint64),
        ("faulted", ctypes.c_uint32),
        ("ran_away", ctypes.c_uint32),
        ("stack_overflow", ctypes.c_uint32),
    )


class RawFinding(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("region", ctypes.c_int32),
        ("offset", ctypes.c_int64),
        ("bytes", ctypes.c_uint32),
        ("is_write", ctypes.c_uint32),
        ("other_is_write", ctypes.c_uint32),
        ("thread", ctypes.c_uint32),
        ("group", ctypes.c_uint32),
        ("other_thread", ctypes.c_uint32),
        ("other_group", ctypes.c_uint32),
        ("pc", ctypes.c_uint64),
        ("other_pc", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    )


class Declaration(ctypes.Structure):
    pass


Declaration._fields_ = (
    ("id", ctypes.c_uint32),
    ("bytes", ctypes.c_ulong),
    ("granule", ctypes.c_uint32),
    ("next", ctypes.POINTER(Declaration)),
)


class DlInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )
