"""Devices that a step can be planned for: what they hold, how fast they are, how to compile for one that is absent.

XLA compiles ahead of time for a description of a device. The CUDA compiler needs the wheels of the extra `plan`, the
TPU compiler those of `tpu`; neither needs the device.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GB = 10**9
HOIST = "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
# Wheels without which the CUDA compiler does not start; ptxas, libdevice and cuDNN's version are in the last three.
CUDA_WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cudnn-cu13")


class Chip(NamedTuple):
    """What the CUDA compiler wants to know of a GPU, as CUDA's device attributes have it.

    Attributes:
      capability: compute capability.
      cores: streaming multiprocessors.
      lanes: float32 units in each.
      threads: that a core holds at once.
      shared: bytes of shared memory a core, and the most that one block may ask for.
      cache: bytes of the L2 cache.
      clock: GHz, boosted.
    """

    capability: tuple[int, int]
    cores: int
    lanes: int
    threads: int
    shared: tuple[int, int]
    cache: int
    clock: float


class Device(NamedTuple):
    """One accelerator.

    Attributes:
      title: what its maker calls it.
      platform: 'cuda', 'tpu' or 'cpu'.
      memory: bytes that a program sees as the whole.
      reserved: bytes of it that no plan may use: the runtime's context, and workspaces that XLA's plan leaves out.
      bandwidth: bytes a second; None: not known.
      rates: dtype of the activations -> FLOPs a second of matrix products (float32 as JAX multiplies it by default:
        in TF32 on GPUs, in bfloat16 passes on TPUs), as the data sheet has them, without sparsity.
      chip: of a GPU.
      topology: of a TPU, as libtpu names it.
      here: a device of this machine; None: it is absent.
    """

    title: str
    platform: str
    memory: int
    reserved: int = 0
    bandwidth: float | None = None
    rates: Mapping[str, float] = {}
    chip: Chip | None = None
    topology: str = ""
    here: Any = None

    @property
    def room(self) -> int:
        """Bytes that a program may use."""
        return self.memory - self.reserved


def _gpu(title: str, memory: int, bandwidth: float, bf16: float, tf32: float, chip: Chip) -> Device:
    rates: dict[str, float] = {"bfloat16": bf16 * 1e12, "float32": tf32 * 1e12}
    return Device(title, "cuda", memory, _CONTEXT, bandwidth * 1e9, rates, chip)


def _tpu(title: str, memory: int, bandwidth: float, rate: float, topology: str) -> Device:
    rates: dict[str, float] = {"bfloat16": rate * 1e12, "float32": rate * 1e12}
    return Device(title, "tpu", memory, 600 * 10**6, bandwidth * 1e9, rates, topology=topology)


# CUDA's context with the compiled kernels takes 0.5 to 0.6 GB; the rest is for the workspaces of cuBLAS and cuDNN.
_CONTEXT = 800 * 10**6
_HOPPER = Chip((9, 0), 132, 128, 2048, (233472, 232448), 52428800, 1.98)
_AMPERE = Chip((8, 0), 108, 64, 2048, (167936, 166912), 41943040, 1.41)
_ADA = Chip((8, 9), 128, 128, 1536, (102400, 101376), 75497472, 2.52)

# Memory as the driver reports it, which is less than the name promises.
DEVICES: dict[str, Device] = {
    "h200": _gpu("NVIDIA H200", 150100000000, 4800, 989.4, 494.7, _HOPPER),
    "h100": _gpu("NVIDIA H100 SXM 80 GB", 84942979072, 3352, 989.4, 494.7, _HOPPER),
    "a100-80g": _gpu("NVIDIA A100 SXM 80 GB", 85100068864, 2039, 312, 156, _AMPERE),
    "a100-40g": _gpu("NVIDIA A100 SXM 40 GB", 42331013120, 1555, 312, 156, _AMPERE),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 25383000000, 1008, 165.2, 82.6, _ADA),
    "l4": _gpu("NVIDIA L4", 23654000000, 300, 121, 60, _ADA._replace(cores=58, cache=50331648, clock=2.04)),
    "rtx4060": _gpu("NVIDIA GeForce RTX 4060", 8192000000, 272, 30.2, 15.1, _ADA._replace(cores=24, cache=25165824)),
    "v5e": _tpu("TPU v5e", 16911433728, 819, 197, "v5e:1x1"),
    "v5p": _tpu("TPU v5p", 102800000000, 2765, 459, "v5p:2x2x1"),
}


_EXTRA = {"cuda": "plan", "tpu": "tpu"}  # which has a platform's compiler


def find(name: str) -> Device:
    """The device of that name; 'cpu' is this machine's, and 'here' what JAX computes on.

    Raises:
      ValueError: there is none; the message has the list.

    >>> find("a100-80g").title
    'NVIDIA A100 SXM 80 GB'
    """
    keep_to_cpu()
    if name == "cpu":
        return Device("CPU of this machine", "cpu", host_memory(), here=jax.local_devices(backend="cpu")[0])
    if name == "here":
        return present()
    if name not in DEVICES:
        raise ValueError(f"there is no device {name!r}; the devices are {', '.join([*DEVICES, 'cpu', 'here'])}")
    return DEVICES[name]


def present() -> Device:
    """What JAX computes on, with the memory that its allocator may use."""
    one = jax.local_devices()[0]
    if one.platform == "cpu":
        return find("cpu")._replace(here=one)
    statistics = one.memory_stats() or {}
    known = next((d for d in DEVICES.values() if same(d.title, one.device_kind)), None)
    limit = int(statistics.get("bytes_limit", 0)) or (known.room if known else 0)
    platform = "tpu" if one.platform == "tpu" else "cuda"
    facts = known or Device(one.device_kind, platform, limit)
    return facts._replace(title=one.device_kind, memory=limit, reserved=0, here=one)


def same(title: str, kind: str) -> bool:
    """Whether a device that calls itself `kind` is the one of this title.

    >>> same("NVIDIA A100 SXM 80 GB", "NVIDIA A100-SXM4-80GB"), same("NVIDIA L4", "NVIDIA L40S")
    (True, False)
    """
    if title.startswith("TPU"):
        return {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5"}[title] == kind
    words = [word for word in title.split() if word not in ("SXM", "GB")]
    return all(re.search(rf"(?<![A-Za-z0-9]){word}(?![0-9])", kind) for word in words)


def host_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its control group's limit if that is less.

    Where the system does not say (Windows), no limit is known.
    """
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else [sys.maxsize]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(file) as f:
                found.append(int(f.read()))
        except (OSError, ValueError):  # no control group, or one without a limit ("max")
            continue
    return min(found)


# What a machine with an accelerator has in its file system: NVIDIA's, Jetson's, WSL's, AMD's, TPUs'.
_FILES = ("/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvmap", "/dev/dxg", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


def keep_to_cpu() -> None:
    """Has JAX start on the CPU where there is nothing else, before it computes anything.

    It would end up there anyway, but with the wheels of `plan` or `tpu` only after their plugins have failed, aloud,
    and then they cannot plan any more.
    """
    chosen = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue] - made when it runs
    if sys.platform == "linux" and not chosen and not any(map(os.path.exists, _FILES)):
        jax.config.update("jax_platforms", "cpu")


# mallopt(3): where allocations come from, when a program gives memory back; numbers of malloc.h, with what keeps all.
_KEEP = {-8: 1, -4: 0, -1: 2**31 - 1}  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD


def keep_memory() -> bool:
    """Has the process keep what it frees, on Linux with glibc; whether it could.

    XLA's programs on a CPU take their temporaries anew in every call. By default large ones go back to the system each
    time and are mapped again page by page, which takes a tenth to a fifth of a small model's training step
    (experiments/results/speed/log.md). With this the process stays as large as it ever was. It is for programs that
    train and for nothing else; the command line calls it. Where the environment says how to allocate
    (`MALLOC_*`, `GLIBC_TUNABLES`), that stays.
    """
    if platform.libc_ver()[0] != "glibc" or any(x.startswith(("MALLOC_", "GLIBC_TUNABLES")) for x in os.environ):
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(name, value) for name, value in _KEEP.items())


class Target(NamedTuple):
    """What to compile for.

    Attributes:
      device: a JAX device, possibly of a description only.
      options: for the compiler.
      by: whose plan it is.
      exact: whether the compiler is the device's own.
    """

    device: Any
    options: dict[str, Any]
    by: str
    exact: bool


def target(device: Device, estimate: bool = False) -> Target:
    """Where a step for the device is compiled.

    Args:
      estimate: by the CPU's compiler, whatever the device: it shares most of the planner, but lays bfloat16 out as
        float32 in places; moving what does not change out of loops is turned off, as it would copy all weights.

    Raises:
      ValueError: the compiler of that platform is not installed; the message says which extra has it.
    """
    if estimate or device.platform == "cpu":
        cpu = jax.local_devices(backend="cpu")[0]
        exact = device.platform == "cpu"
        return Target(cpu, {} if exact else {"xla_disable_hlo_passes": HOIST}, "XLA's CPU compiler", exact)
    if device.here is not None:
        return Target(device.here, {}, f"XLA's {device.platform.upper()} compiler", True)
    if device.platform == "cuda":
        return Target(_absent_gpu(device), {}, "XLA's CUDA compiler", True)
    return Target(_absent_tpu(device), {}, "XLA's TPU compiler", True)


def compiler_of(device: Device) -> bool:
    """Whether the device's own compiler is here."""
    if device.platform == "cpu" or device.here is not None:
        return True
    return not (_missing_cuda() if device.platform == "cuda" else importlib.util.find_spec("libtpu") is None)


def _missing_cuda() -> list[str]:
    missing = []
    for wheel in CUDA_WHEELS:
        try:
            importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            missing.append(wheel)
    return missing


def _absent_gpu(device: Device) -> Any:
    if missing := _missing_cuda():
        raise ValueError(
            f"planning for {device.title} with its own compiler needs {', '.join(missing)}: "
            "pip install 'peftjax[plan]', or ask for an estimate"
        )
    return _topology(device, "cuda", topology_name="gpu", target_config=describe(device), topology="1x1x1")


def _absent_tpu(device: Device) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"planning for {device.title} with its own compiler needs libtpu: pip install 'peftjax[tpu]', or ask for "
            "an estimate"
        )
    absent = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_HOSTNAMES": "localhost"}
    for name, value in absent.items():  # else libtpu asks a server that only a TPU's host has
        os.environ.setdefault(name, value)
    return _topology(device, "tpu", topology_name=device.topology)


def _topology(device: Device, platform: str, **description: str) -> Any:
    try:
        return topologies.get_topology_desc(platform=platform, **description).devices[0]
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as e:  # jax raises each, by its version
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib"))
        raise ValueError(
            f"the compiler for {device.title} does not start ({e}): set JAX_PLATFORMS=cpu where that device is not, "
            f"and see that its wheels fit {versions} (pip install 'peftjax[{_EXTRA[platform]}]'); or ask for an "
            "estimate"
        ) from e


def describe(device: Device) -> str:
    """A GPU in the text form of XLA's `GpuTargetConfigProto`.

    Raises:
      ValueError: it is no GPU of the table.
    """
    if device.chip is None or device.bandwidth is None:
        raise ValueError(f"{device.title} has no description for the CUDA compiler; choose one of {list(DEVICES)}")
    c = device.chip
    major, minor = c.capability
    info = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": c.shared[0],
        "shared_memory_per_block_optin": c.shared[1],
        "threads_per_core_limit": c.threads,
        "core_count": c.cores,
        "fpus_per_core": c.lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(device.bandwidth),
        "l2_cache_size": c.cache,
        "clock_rate_ghz": c.clock,
        "device_memory_size": device.memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = "".join(f"  {name}: {value}\n" for name, value in info.items())
    return (
        f"gpu_device_info {{\n{lines}  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 10 }}\nruntime_version {{ major: 13 }}\n'
        f'device_description_str: "{device.title}"\n'
    )
