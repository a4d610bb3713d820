"""Where the run-time compiler and the kernel sources are."""

import importlib.util
import pathlib

_NVRTC = "libnvrtc.so.13"
# Folders of NVIDIA's wheels, below site-packages/nvidia; the first is CUDA 13's.
_WHEEL_FOLDERS = ("cu13/lib", "cuda_nvrtc/lib")
_TOOLKIT_FOLDERS = ("/usr/local/cuda/lib64", "/usr/local/cuda-13/lib64")


def nvrtc_candidates() -> list[str]:
    """Libraries to try for NVRTC: the wheels' files, a toolkit's, then the loader's search path."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    folders = [pathlib.Path(root) / folder for root in roots for folder in _WHEEL_FOLDERS]
    folders += [pathlib.Path(folder) for folder in _TOOLKIT_FOLDERS]
    files = [folder / _NVRTC for folder in folders]
    return [str(file) for file in files if file.is_file()] + [_NVRTC]


def kernel_sources() -> pathlib.Path:
    """The folder that mirrors `ffi/`: package data when installed, the checkout's own otherwise."""
    package = pathlib.Path(__file__).resolve().parents[1]
    installed = package / "_kernels"
    return installed if installed.is_dir() else package.parent / "ffi"
