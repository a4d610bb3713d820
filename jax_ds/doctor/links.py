"""What joins this host's GPUs with each other and with other hosts, as the machine reports it."""

import pathlib
import re
import subprocess


def describe(
    infiniband: pathlib.Path = pathlib.Path("/sys/class/infiniband"),
    modules: pathlib.Path = pathlib.Path("/proc/modules"),
) -> list[tuple[str, str]]:
    """Rows of a name and a sentence."""
    return [("NVLink", nvlink(_ask_nvidia_smi())), ("RDMA", rdma(infiniband, modules))]


def nvlink(report: str) -> str:
    """Of the output of `nvidia-smi nvlink --status`: links and their rate, each GPU's."""
    gpus: list[list[float]] = []
    for line in report.splitlines():
        if line.startswith("GPU "):
            gpus.append([])
        elif gpus and (rate := re.search(r"Link \d+: ([\d.]+) GB/s", line)):
            gpus[-1].append(float(rate[1]))
    if not gpus:
        return "unknown: nvidia-smi shows none"
    kinds = sorted({(len(links), round(sum(links))) for links in gpus})
    texts = [f"{n} links, {total} GB/s each way" if n else "no active link" for n, total in kinds]
    return f"{len(gpus)} GPUs: {' or '.join(texts)}"


def rdma(infiniband: pathlib.Path, modules: pathlib.Path) -> str:
    """Network cards with RDMA, and whether they can reach GPU memory."""
    rates = [
        f"{port.parents[1].name} {(port / 'rate').read_text().strip()}"
        for port in sorted(infiniband.glob("*/ports/*"))
        if "ACTIVE" in (port / "state").read_text()
    ]
    if not rates:
        return "no active card: NCCL would use sockets between hosts"
    loaded = modules.read_text() if modules.exists() else ""
    direct = "is loaded" if "nvidia_peermem" in loaded else "is not loaded"
    return f"{', '.join(rates)}; nvidia_peermem {direct}"


def _ask_nvidia_smi() -> str:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "nvlink", "--status"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout
