"""The torch backend: the same seam on PyTorch, for CPU and CUDA. The only place that imports torch.

The network is written out in plain tensor operations over one flat parameter buffer; ``backward`` is ``torch.autograd.backward`` on
the outputs. Log-probabilities agree with the native core to rounding, not to the bit. Dropout masks, initial weights and draws come
from the native core's counter-based numbers, so a seed means the same in both backends; dropout on attention weights therefore
holds whole rows of them, which the fused attention without dropout does not.

Precision: "f32" multiplies in f32, "bf16" in bf16 under autocast with f32 weights, gradients, norms, residual stream and softmax, and
"f64" does everything in f64 (the reference of the tests; its arrays are f64). "auto" is bf16 on a GPU that has it, f32 elsewhere.
"""

from __future__ import annotations

from ingot.models.torch_backend.decoder import TorchDecoder
from ingot.models.torch_backend.model import TorchContext, TorchModel
from ingot.models.torch_backend.optimizer import TorchOptimizer

__all__ = ["TorchContext", "TorchDecoder", "TorchModel", "TorchOptimizer"]
