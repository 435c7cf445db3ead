"""A CUDA driver and a TensorRT without a GPU: what the runner calls, on host memory.

The driver's functions are real C functions with the prototypes of cuda.h, and it does nothing
before an event is waited for, as late as a GPU may. An engine is an ONNX file in onnxruntime.
"""

from __future__ import annotations

import ctypes
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np

i, u, size, void = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
device_pointer = ctypes.c_ulonglong
ints, voids = ctypes.POINTER(i), ctypes.POINTER(void)
strings = ctypes.POINTER(ctypes.c_char_p)
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (u,),
    "cuGetErrorString": (i, strings),
    "cuDriverGetVersion": (ints,),
    "cuDeviceGetCount": (ints,),
    "cuDeviceGet": (ints, i),
    "cuDeviceGetName": (ctypes.POINTER(ctypes.c_char), i, i),
    "cuDeviceGetAttribute": (ints, i, i),
    "cuDeviceTotalMem_v2": (ctypes.POINTER(size), i),
    "cuDevicePrimaryCtxRetain": (voids, i),
    "cuDevicePrimaryCtxRelease_v2": (i,),
    "cuCtxSetCurrent": (void,),
    "cuMemAlloc_v2": (ctypes.POINTER(device_pointer), size),
    "cuMemFree_v2": (device_pointer,),
    "cuMemHostAlloc": (voids, size, u),
    "cuMemFreeHost": (void,),
    "cuMemcpyHtoDAsync_v2": (device_pointer, void, size, void),
    "cuMemcpyDtoHAsync_v2": (void, device_pointer, size, void),
    "cuStreamCreate": (voids, u),
    "cuStreamDestroy_v2": (void,),
    "cuEventCreate": (voids, u),
    "cuEventRecord": (void, void),
    "cuEventSynchronize": (void,),
    "cuEventDestroy_v2": (void,),
}
CONTEXT, OUT_OF_MEMORY = 0x1234567890AB, 2


class Driver:
    """libcuda: `Driver().cuInit(0)` and so on. `live` is what has not been freed."""

    def __init__(
        self, name: str = "Orin", capability: tuple[int, int] = (8, 7), limit: int = 1 << 30
    ):
        self.name, self.capability, self.limit = name, capability, limit
        self.devices = 1
        self.live: dict[int, Any] = {}
        self.queue: list[Callable[[], Any]] = []
        self._events: dict[int, int] = {}  # event -> number of steps that it waits for
        self._done = self._count = self._retained = 0
        self._handles = itertools.count(0x1000)
        self._functions = []
        for function, types in PROTOTYPES.items():
            own = getattr(self, "_" + function.removesuffix("_v2"))
            pointer = ctypes.CFUNCTYPE(i, *types)(lambda *a, own=own: own(*a) or 0)
            address = ctypes.cast(pointer, void).value
            self._functions.append(pointer)
            # As `ctypes.CDLL` gives it: nothing is known of the arguments.
            setattr(self, function, ctypes.CFUNCTYPE(i)(address))

    def later(self, step: Callable[[], Any]) -> None:
        self.queue.append(step)
        self._count += 1

    def _hold(self, target: Any, count: int) -> int:
        if count > self.limit:
            return OUT_OF_MEMORY
        buffer = ctypes.create_string_buffer(b"\xff" * count, count)  # NaN where nothing is written
        target[0] = ctypes.addressof(buffer)
        self.live[ctypes.addressof(buffer)] = buffer
        return 0

    def _free(self, address: int) -> None:
        del self.live[address]

    def _cuInit(self, flags: int) -> int:
        return flags

    def _cuGetErrorString(self, status: int, text: Any) -> None:
        text[0] = b"out of memory" if status == OUT_OF_MEMORY else b"something else"

    def _cuDriverGetVersion(self, version: Any) -> None:
        version[0] = 12060

    def _cuDeviceGetCount(self, count: Any) -> None:
        count[0] = self.devices

    def _cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device[0] = ordinal

    def _cuDeviceGetName(self, text: Any, length: int, device: int) -> None:
        ctypes.memmove(text, self.name.encode() + b"\0", min(length, len(self.name) + 1))

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        value[0] = dict(zip((75, 76), self.capability, strict=True))[attribute]

    def _cuDeviceTotalMem(self, count: Any, device: int) -> None:
        count[0] = 8 << 30

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context[0] = CONTEXT  # one for all
        self._retained += 1
        self.live[CONTEXT] = None

    def _cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self._retained -= 1
        if device == 0 and not self._retained:
            self._free(CONTEXT)

    def _cuCtxSetCurrent(self, context: int) -> int:
        return 0 if context == CONTEXT else 201

    def _cuMemAlloc(self, address: Any, count: int) -> int:
        return self._hold(address, count)

    def _cuMemFree(self, address: int) -> None:
        self._free(address)

    def _cuMemHostAlloc(self, address: Any, count: int, flags: int) -> int:
        return self._hold(address, count)

    def _cuMemFreeHost(self, address: int) -> None:
        self._free(address)

    def _copy(self, to: int, source: int, count: int, stream: int) -> int:
        self.later(lambda: ctypes.memmove(to, source, count))
        return 0 if {to, source, stream} <= set(self.live) else 1

    _cuMemcpyHtoDAsync = _cuMemcpyDtoHAsync = _copy

    def _cuStreamCreate(self, stream: Any, flags: int) -> int:
        stream[0] = handle = next(self._handles)
        self.live[handle] = None
        return flags

    def _cuStreamDestroy(self, stream: int) -> None:
        self._free(stream)

    def _cuEventCreate(self, event: Any, flags: int) -> None:
        event[0] = handle = next(self._handles)
        self._events[handle] = 0
        self.live[handle] = None

    def _cuEventRecord(self, event: int, stream: int) -> int:
        self._events[event] = self._count
        return 0 if stream in self.live else 1

    def _cuEventSynchronize(self, event: int) -> None:
        while self._done < self._events[event]:
            self.queue.pop(0)()
            self._done += 1

    def _cuEventDestroy(self, event: int) -> None:
        self._free(event)


driver: Any = None  # the `Driver` of the test
built: list[dict[str, Any]] = []  # what was asked of each build
refuses = ""  # an error of TensorRT: whatever is asked next fails with it

# --- the module tensorrt -------------------------------------------------------------------------

__version__ = "10.3.0"


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def log(self, severity: int, message: str) -> None:
        raise NotImplementedError


def _fails(logger: ILogger) -> bool:
    if refuses:
        logger.log(ILogger.ERROR, refuses)
    return bool(refuses)


class NetworkDefinitionCreationFlag:
    STRONGLY_TYPED = 1


class BuilderFlag:
    TF32, REFIT, VERSION_COMPATIBLE = "TF32", "REFIT", "VERSION_COMPATIBLE"


class MemoryPoolType:
    WORKSPACE = 0


class _Profile:
    def set_shape(self, name: str, *shapes: tuple[int, int]) -> None:
        assert name == "audio"
        least, usual, most = shapes
        assert least == usual == most
        self.shape = usual


class _TimingCache:
    def __init__(self, data: bytes):
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"timings "


class _BuilderConfig:
    def __init__(self) -> None:
        self.flags, self.profiles = {"TF32"}, []  # type: ignore[var-annotated]
        self.workspace: int | None = None

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: int, limit: int) -> None:
        self.workspace = limit

    def add_optimization_profile(self, profile: _Profile) -> None:
        self.profiles.append(profile)

    def create_timing_cache(self, data: bytes) -> _TimingCache:
        return _TimingCache(data)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not cache.data.startswith(b"damaged")

    def get_timing_cache(self) -> _TimingCache:
        return self.cache


class _Network:
    model: bytes


class Builder:
    def __init__(self, logger: ILogger):
        self.logger = logger

    def create_network(self, flags: int) -> _Network:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return _Network()

    def create_builder_config(self) -> _BuilderConfig:
        return _BuilderConfig()

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _BuilderConfig) -> Any:
        if _fails(self.logger):
            return None
        shapes = [profile.shape for profile in config.profiles]
        cache = config.cache.data
        asked = {"shapes": shapes, "flags": config.flags, "workspace": config.workspace}
        built.append({**asked, "timings": cache})
        return bytearray(json.dumps(shapes).encode() + b"\n" + network.model)


class OnnxParser:
    def __init__(self, network: _Network, logger: ILogger):
        self.network = network

    def parse(self, model: bytes) -> bool:
        self.network.model = model
        return True


class Runtime:
    engine_host_code_allowed = False

    def __init__(self, logger: ILogger):
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        return None if _fails(self.logger) else _Engine(plan)


class _Engine:
    def __init__(self, plan: bytes):
        shapes, self.model = plan.split(b"\n", 1)
        self.shapes = [tuple(shape) for shape in json.loads(shapes)]

    def serialize(self) -> bytes:
        return json.dumps(self.shapes).encode() + b"\n" + self.model

    def create_execution_context(self) -> _Context:
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine):
        import onnxruntime

        self.engine, self.addresses = engine, {}  # type: ignore[var-annotated]
        self.session = onnxruntime.InferenceSession(
            engine.model, providers=["CPUExecutionProvider"]
        )

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = self.engine.shapes[index]
        return stream in driver.live

    def set_input_shape(self, name: str, shape: tuple[int, int]) -> bool:
        self.shape = shape
        return name == "audio" and shape == self.profile

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address in driver.live

    def execute_async_v3(self, stream: int) -> bool:
        audio, scores = self.addresses["audio"], self.addresses["p_ai"]
        driver.later(lambda: self.run(audio, scores))
        return stream in driver.live

    def run(self, audio: int, scores: int) -> None:
        floats = ctypes.c_float * (self.shape[0] * self.shape[1])
        read = np.frombuffer(floats.from_address(audio), np.float32).reshape(self.shape)
        # Row by row: here a score depends on its own row alone, to the bit.
        found = [self.session.run(None, {"audio": row[None]})[0] for row in read.copy()]
        ctypes.memmove(scores, np.concatenate(found).ctypes.data, 4 * self.shape[0])


class Refitter:
    def __init__(self, engine: _Engine, logger: ILogger):
        self.engine, self.model = engine, b""

    def refit_cuda_engine(self) -> bool:
        self.engine.model = self.model
        return True


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger):
        self.refitter, self.logger = refitter, logger

    def refit_from_bytes(self, model: bytes) -> bool:
        self.refitter.model = model
        return not _fails(self.logger)
