"""Machines as they were recorded, or made up from data sheets: what placement is tested with."""

from __future__ import annotations

from typing import Any

from tabagent_model.hardware import GIB, MIB, Machine

CPU: dict[str, Any] = {
    "name": "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz",
    "logical_cores": 12,
    "physical_cores": 6,
    "usable_cores": 12,
    "affinity": 12,
    "threads": 6,
    "features": ["avx", "avx2", "fma"],
    "module": "haswell",
    "layouts": {"Q4_0": 1.0, "Q4_K": 1.0, "IQ4_NL": 1.0, "MXFP4": 1.0},
}
RAM_16: dict[str, Any] = {"total": 16 * GIB - 300 * MIB, "available": 11 * GIB}


def gpu(number: int, name: str, total: int, free: int, **facts: Any) -> dict[str, Any]:
    place = f"0000:{number + 1:02x}:00.0"
    used = {"index": number, "pci_id": place, "uuid": f"GPU-{number}", "driver": "580.65"}
    sizes = {"total": total, "free": free, "used": total - free}
    return {"name": name, "device": f"CUDA{number}", **used, **sizes, **facts}


def machine(*gpus: dict[str, Any], **facts: Any) -> Machine:
    reason = None if gpus else "no NVML: libnvidia-ml.so.1: cannot open shared object file"
    return Machine.from_dict({"cpu": CPU, "memory": RAM_16, "gpus": gpus, "reason": reason} | facts)


GTX_1650 = gpu(0, "GTX 1650", 4 * GIB, 3800 * MIB, compute_capability=[7, 5])
GTX_1660 = gpu(0, "GTX 1660", 6 * GIB, 5700 * MIB, compute_capability=[7, 5])
RTX_4090 = gpu(0, "RTX 4090", 24 * GIB, 23 * GIB, compute_capability=[8, 9])
SLICE = {"uuid": "MIG-1", "total": 10 * GIB, "free": 10 * GIB - 40 * MIB, "used": 40 * MIB}

NO_GPU = machine()
CARD_4 = machine(GTX_1650)
CARD_6 = machine(GTX_1660)
CARD_24 = machine(RTX_4090)
TWO_CARDS = machine(RTX_4090, gpu(1, "RTX 3060", 12 * GIB, 11 * GIB, compute_capability=[8, 6]))
# llama.cpp sees the part of an A100 that CUDA gave it, and NVML the card with all its parts.
MIG = machine(gpu(0, "A100-SXM4-80GB", 10 * GIB, 10 * GIB - 40 * MIB, instances=[SLICE]))
FULL_GPU = machine(gpu(0, "RTX 4090", 24 * GIB, 200 * MIB))
CONTAINER = machine(
    cpu=CPU | {"usable_cores": 1, "quota": 1.5, "threads": 1},
    memory={"total": 64 * GIB, "available": 700 * MIB, "limit": 2 * GIB},
)
# The driver is there, but no backend that computes on the card.
UNUSED_GPU = machine(GTX_1660 | {"device": None}, reason="GTX 1660 cannot be used: …")
