"""A CUDA device that is not there, with real values, for rehearsals (rehearse.sh).

Tensors say cuda:0 and hold CPU data; they refuse to be mixed with CPU tensors, and every transfer
and synchronisation is counted, with the line of trapo.py that asked for it. CUDA graphs mean what
they mean on a card: a capture computes nothing (what it wrote is put back, what it allocated is
filled with NaN), a replay runs the recorded operations on the same storages, and a synchronisation
or a copy from the CPU during a capture is an error, as is a replay that reads freed memory.
"""
import contextlib
import ctypes
import gc
import os
import traceback
import types
import weakref
from collections import Counter

BUILT = os.environ.get("PRETEND_GPU", "")
assert BUILT and "pre.so" in os.environ.get("LD_PRELOAD", ""), "run by rehearse.sh"
ctypes.CDLL(BUILT + "/fakecuda.so")  # a device guard, before torch looks for one

import torch
import torch.cuda.amp.common
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import (TorchDispatchMode, _disable_current_modes,
                                          return_and_correct_aliasing)
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
TRAFFIC, WHERE, STATS = Counter(), Counter(), Counter()
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default)

class DeviceMismatch(RuntimeError):
    """A CPU tensor met one of the device."""

class CaptureError(RuntimeError):
    """What a capture forbids."""

class UseAfterFree(RuntimeError):
    """A graph that reads memory which is no longer there."""

def caller():
    """The line of trapo.py or eval.py that is running."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if frame.filename.endswith(("trapo.py", "eval.py")):
            return f"{os.path.basename(frame.filename)}:{frame.lineno}"
    return "?"

def note(kind, func):
    """Count a transfer or a synchronisation; an error during a capture."""
    TRAFFIC[kind] += 1
    WHERE[kind, caller(), str(func)] += 1
    if CUDAGraph.capturing:
        raise CaptureError(f"{kind} by {func} during capture at {caller()}")

def show_traffic():
    for (kind, line, func), count in WHERE.most_common():
        print(f"   {count:6} {kind:24} {line:14} {func}")

def tensors(tree):
    return [x for x in tree_flatten(tree)[0] if isinstance(x, Tensor)]

def is_cuda(device):
    return device is not None and torch.device(device).type == "cuda"

def inner(x):
    return x.inner if isinstance(x, DeviceTensor) else x

class DeviceTensor(Tensor):
    """A tensor that says cuda:0 and holds its values in a CPU tensor, `inner`."""
    @staticmethod
    def __new__(cls, values):
        self = Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, layout=values.layout, device="cuda:0", requires_grad=False)
        self.inner = values
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"DeviceTensor({self.inner})"

    def tolist(self):
        return self.detach().to("cpu").tolist()

class World(TorchDispatchMode):
    """Where the device exists."""
    depth = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __enter__(self):
        World.depth += 1
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        result = super().__exit__(*error)
        World.depth -= 1
        if not World.depth:
            torch._C._set_only_lift_cpu_tensors(False)
        return result

def transfer(func, args, kwargs, target):
    """The result of an operation that moves values between CPU and device; None for others."""
    if func is aten._local_scalar_dense.default:
        note("D2H sync (item)", func)
        return args[0].inner.item()
    if func is aten._to_copy.default:
        source = args[0]
        options = {key: value for key, value in kwargs.items() if key != "device"}
        if isinstance(source, DeviceTensor) and target is not None and not is_cuda(target):
            note("D2H copy", func)
            return func(source.inner, **options) if options else source.inner.clone()
        if not isinstance(source, DeviceTensor):
            note("H2D copy", func)
            return DeviceTensor(func(source, **options))
    if func is aten.copy_.default:
        old, new = args[:2]
        if isinstance(old, DeviceTensor) != isinstance(new, DeviceTensor):
            note("H2D copy" if isinstance(old, DeviceTensor) else "D2H copy", func)
            inner(old).copy_(inner(new))
            return old
    return None

def run(func, args, kwargs):
    """One operation, on the values."""
    if func is torch.ops.prim.device.default:
        return torch.device("cuda:0")
    found = tensors((args, kwargs))
    ours = [x for x in found if isinstance(x, DeviceTensor)]
    theirs = [x for x in found if not isinstance(x, DeviceTensor) and x.device.type != "meta"]
    target = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
    if not ours and not is_cuda(target):
        return func(*args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        with World():
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
    result = transfer(func, args, kwargs, target)
    if result is not None:
        return result
    if func in (aten.nonzero.default, aten.masked_select.default):
        note("sync (nonzero)", func)
    if func in INDEXING:
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
            note("sync (bool index)", func)
        if any(not isinstance(i, DeviceTensor) for i in indices):
            note("H2D copy (cpu index)", func)
            theirs = []
    if func is aten.searchsorted.Tensor and theirs or any(x.dim() > 0 for x in theirs):
        shapes = [tuple(x.shape) for x in theirs]
        raise DeviceMismatch(f"{func}: cuda with cpu tensors {shapes} at {caller()}")
    options = dict(kwargs)
    if is_cuda(options.get("device")):
        options["device"] = torch.device("cpu")
    values, options = tree_map(inner, (args, options))
    if CUDAGraph.capturing:
        out = CUDAGraph.capturing.record(func, values, options)
    else:
        out = func(*values, **options)
    wrapped = tree_map(lambda x: DeviceTensor(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours else wrapped

# ---- CUDA graphs

def no_graph(batch):
    """In place of DecodeBatch.record: the same batches, computed plainly."""
    return types.SimpleNamespace(replay=lambda: setattr(batch, "logits", batch.forward()))

def storage_of(tensor):
    return tensor.untyped_storage()._cdata

class Outside:
    """A tensor from before the capture: known by its address, and not kept alive."""
    def __init__(self, tensor):
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset()
        self.size, self.stride = tensor.size(), tensor.stride()

    def tensor(self):
        expired = self.storage.expired()
        storage = None if expired else torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise UseAfterFree(f"graph reads freed memory: {self.dtype} {tuple(self.size)}")
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)

class CUDAGraph:
    capturing = None
    living = weakref.WeakSet()

    def __init__(self):
        self.operations, self.own, self.before = [], {}, {}
        CUDAGraph.living.add(self)

    def written(self, func, args, kwargs):
        """The tensors that an operation writes to in place."""
        found = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                found += tensors(value)
        return found

    def record(self, func, args, kwargs):
        """Run an operation of the capture, and note it for the replays."""
        written = self.written(func, args, kwargs)
        for tensor in written:
            if storage_of(tensor) not in self.own and storage_of(tensor) not in self.before:
                storage = tensor.untyped_storage()
                self.before[storage_of(tensor)] = storage, storage.clone()
        if "rand" in func._schema.name or "dropout" in func._schema.name:
            STATS[f"random numbers in capture: {func}"] += 1

        def handle(x):
            outside = isinstance(x, Tensor) and storage_of(x) not in self.own
            return Outside(x) if outside else x
        inputs = tree_map(handle, (args, kwargs))
        out = func(*args, **kwargs)
        given, new = {storage_of(x) for x in tensors((args, kwargs))}, []
        for tensor in tensors(out):
            allocated = storage_of(tensor) not in given
            if allocated:
                self.own[storage_of(tensor)] = tensor.untyped_storage()
            new.append(tensor if allocated and not written else None)
        if written or any(tensor is not None for tensor in new):
            self.operations.append((func, inputs, new))
        return out

    def end(self):
        for storage, values in self.before.values():
            storage.copy_(values)
        self.before = {}
        for storage in self.own.values():  # a capture computes nothing: NaN, or -1
            torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
        STATS["captures"] += 1
        gc.collect()
        STATS["graphs alive, most"] = max(STATS["graphs alive, most"], len(CUDAGraph.living))

    def replay(self):
        STATS["replays"] += 1
        with _disable_current_modes():
            for func, inputs, new in self.operations:
                args, kwargs = tree_map(lambda x: x.tensor() if isinstance(x, Outside) else x,
                                        inputs, is_leaf=lambda x: isinstance(x, Outside))
                out = func(*args, **kwargs)
                for values, place in zip(tensors(out), new):
                    if place is not None:
                        place.copy_(values)

class graph:
    """torch.cuda.graph."""
    def __init__(self, graph, pool=None, stream=None, **options):
        assert stream is not None, "a stream of its own for each graph: memory would not be reused"
        self.graph = graph

    def __enter__(self):
        CUDAGraph.capturing = self.graph

    def __exit__(self, *error):
        CUDAGraph.capturing = None
        self.graph.end()

class Stream:
    def __init__(self, *args, **kwargs):
        STATS["streams"] += 1

    def wait_stream(self, other):
        STATS["wait_stream"] += 1

    def synchronize(self):
        pass

@contextlib.contextmanager
def stream(stream):
    yield

class Properties:
    major, minor, total_memory, multi_processor_count, name = 9, 0, 80 << 30, 132, "pretended"

DEFAULT = Stream()
PRETENDED = {
    "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
    "is_bf16_supported": True, "_lazy_init": None, "max_memory_allocated": 0, "empty_cache": None,
    "max_memory_reserved": 0, "memory_reserved": 0, "reset_peak_memory_stats": None,
    "manual_seed": None, "manual_seed_all": None, "get_device_properties": Properties(),
    "get_device_capability": (9, 0), "get_device_name": "pretended", "synchronize": None,
    "current_stream": DEFAULT}
for name, result in PRETENDED.items():
    setattr(torch.cuda, name, lambda *args, result=result, **kwargs: result)
for value in CUDAGraph, graph, Stream, stream:
    setattr(torch.cuda, value.__name__, value)
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.__future__.set_swap_module_params_on_conversion(True)
