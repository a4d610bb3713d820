"""Where the run-time compiler and the kernel sources are."""

import importlib.util
import pathlib

_NVRTC = "libnvrtc.so.13"
_NCCL = "libnccl.so.2"
# Folders of NVIDIA's wheels, below site-packages/nvidia; the first is CUDA 13's.
_WHEEL_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")
_TOOLKIT_FOLDERS = ("/usr/local/cuda/lib64", "/usr/local/cuda-13/lib64")


def nvrtc_candidates() -> list[str]:
    """Libraries to try for NVRTC: the wheels' files, a toolkit's, then the loader's search path."""
    folders = [folder / name for folder in _wheels() for name in _WHEEL_FOLDERS]
    folders += [pathlib.Path(folder) for folder in _TOOLKIT_FOLDERS]
    files = [folder / _NVRTC for folder in folders]
    return [str(file) for file in files if file.is_file()] + [_NVRTC]


def nccl_candidates() -> list[str]:
    """Libraries to try for NCCL where the process has not loaded one: the wheel's, as XLA does."""
    files = [folder / "nccl" / "lib" / _NCCL for folder in _wheels()]
    return [str(file) for file in files if file.is_file()]


def _wheels() -> list[pathlib.Path]:
    spec = importlib.util.find_spec("nvidia")
    return [pathlib.Path(root) for root in spec.submodule_search_locations or ()] if spec else []


def kernel_sources() -> pathlib.Path:
    """The folder that mirrors `ffi/`: package data when installed, the checkout's own otherwise."""
    package = pathlib.Path(__file__).resolve().parents[1]
    installed = package / "_kernels"
    return installed if installed.is_dir() else package.parent / "ffi"
