"""The few calls of the CUDA driver that running an engine takes, through ctypes.

The driver's library is there wherever there is a driver, on a Jetson too, and its calls keep their
signatures, so that no CUDA package has to match the toolkit that TensorRT was made with. The
context is the device's primary one, which is what TensorRT uses.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_...

_ints = ctypes.POINTER(ctypes.c_int)
_handles = ctypes.POINTER(ctypes.c_void_p)
_handle, _bytes, _int, _flags = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_flags,),
    "cuGetErrorString": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDriverGetVersion": (_ints,),
    "cuDeviceGetCount": (_ints,),
    "cuDeviceGet": (_ints, _int),
    "cuDeviceGetName": (ctypes.c_char_p, _int, _int),
    "cuDeviceGetAttribute": (_ints, _int, _int),
    "cuDeviceTotalMem_v2": (ctypes.POINTER(_bytes), _int),
    "cuDevicePrimaryCtxRetain": (_handles, _int),
    "cuDevicePrimaryCtxRelease_v2": (_int,),
    "cuCtxSetCurrent": (_handle,),
    "cuMemAlloc_v2": (_handles, _bytes),
    "cuMemFree_v2": (_handle,),
    "cuMemHostAlloc": (_handles, _bytes, _flags),
    "cuMemFreeHost": (_handle,),
    "cuMemcpyHtoDAsync_v2": (_handle, _handle, _bytes, _handle),
    "cuMemcpyDtoHAsync_v2": (_handle, _handle, _bytes, _handle),
    "cuStreamCreate": (_handles, _flags),
    "cuStreamDestroy_v2": (_handle,),
    "cuEventCreate": (_handles, _flags),
    "cuEventRecord": (_handle, _handle),
    "cuEventSynchronize": (_handle,),
    "cuEventDestroy_v2": (_handle,),
}


class CudaError(Exception):
    """A call of the CUDA driver failed, or there is no driver; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What is said of a GPU in the name of an engine and in reports."""

    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    driver: str  # the newest CUDA that the driver knows, "12.6"

    def __str__(self) -> str:
        return f"{self.name} sm{''.join(map(str, self.capability))}"


class Cuda:
    """The first GPU: memory, transfers, one stream. Everything is freed with the object.

    Raises CudaError where there is no driver or no GPU, and from every call that fails.
    """

    def __init__(self) -> None:
        try:
            self._driver = ctypes.CDLL(LIBRARY)
        except OSError:
            raise CudaError(f"there is no NVIDIA driver ({LIBRARY})") from None
        for name, arguments in _SIGNATURES.items():
            getattr(self._driver, name).argtypes = arguments
        self._call("cuInit", 0)
        count, device = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetCount", count)
        if not count.value:
            raise CudaError("the NVIDIA driver finds no GPU")
        self._call("cuDeviceGet", device, 0)
        self.device = self._describe(device)
        self._owned: list[tuple[Callable[[Any], int], Any]] = []
        self._free = weakref.finalize(self, _free, self._owned)
        self._context = self._new("cuDevicePrimaryCtxRetain", device)
        self._owned.append((self._driver.cuDevicePrimaryCtxRelease_v2, device.value))
        self.activate()
        self.stream: int = self._new("cuStreamCreate", 0)
        self._owned.append((self._driver.cuStreamDestroy_v2, self.stream))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, text)
            said = (text.value or b"unknown error").decode(errors="replace")
            raise CudaError(f"{name.split('_')[0]}: {said} ({status})")

    def _new(self, name: str, *arguments: Any) -> Any:
        handle = ctypes.c_void_p()
        self._call(name, handle, *arguments)
        return handle.value

    def _describe(self, device: ctypes.c_int) -> Device:
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        version, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDeviceTotalMem_v2", memory, device)
        self._call("cuDriverGetVersion", version)
        self._call("cuDeviceGetAttribute", major, _MAJOR, device)
        self._call("cuDeviceGetAttribute", minor, _MINOR, device)
        driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
        capability = major.value, minor.value
        return Device(name.value.decode(errors="replace"), capability, memory.value, driver)

    def activate(self) -> None:
        """Make the device current in this thread."""
        self._call("cuCtxSetCurrent", self._context)

    def memory(self, size: int) -> int:
        """Address of `size` bytes on the device."""
        address: int = self._new("cuMemAlloc_v2", size)
        self._owned.append((self._driver.cuMemFree_v2, address))
        return address

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Page-locked host memory, from and to which transfers run beside the processor."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        address = self._new("cuMemHostAlloc", size, 0)
        self._owned.append((self._driver.cuMemFreeHost, address))
        raw = (ctypes.c_byte * size).from_address(address)
        return np.frombuffer(raw, dtype).reshape(shape)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Queue the copy of a pinned array to the device."""
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)

    def download(self, array: np.ndarray, address: int) -> None:
        """Queue the copy from the device to a pinned array."""
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)

    def event(self) -> int:
        """A mark to put into the stream."""
        event: int = self._new("cuEventCreate", 2)  # CU_EVENT_DISABLE_TIMING
        self._owned.append((self._driver.cuEventDestroy_v2, event))
        return event

    def record(self, event: int) -> None:
        """Put a mark behind what is queued."""
        self._call("cuEventRecord", event, self.stream)

    def wait(self, event: int) -> None:
        """Wait until the mark is reached."""
        self._call("cuEventSynchronize", event)

    def close(self) -> None:
        """Free everything now."""
        self._free()


def _free(owned: list[tuple[Callable[[Any], int], Any]]) -> None:
    # The last first, after all that is queued. A driver that is shutting down refuses; so be it.
    with contextlib.suppress(OSError):
        while owned:
            function, handle = owned.pop()
            function(handle)


def find_device() -> Device | str:
    """The first GPU, or one line that says why there is none."""
    try:
        cuda = Cuda()
    except CudaError as error:
        return str(error)
    cuda.close()
    return cuda.device
