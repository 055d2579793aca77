"""Lets a torchvision of another build than torch's be imported, before anything that imports it.

Lightning's torchmetrics imports torchvision wherever it is installed, and a torchvision built for CUDA does not import
beside a torch built for the CPU unless the operators it registers kernels for are declared. Only the zoo installs it.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch

_kept = []  # a library that is collected takes its operators with it


def declare_torchvision_operators() -> None:
    """Import torchvision, or else declare the operators without which it does not import."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        _kept.append(library)
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


declare_torchvision_operators()
