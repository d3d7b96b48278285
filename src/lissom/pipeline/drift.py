"""What layers read in the dense model, beside what they read after the compression of everything before them.

Each layer is asked for its dense outputs W y on the inputs x that it has by now (asymmetric calibration: GPTAQ, arXiv 2504.02692):

    minimise ‖W y − Q x‖²  =  ‖(W′ − Q) x‖² + constant,     W′ = W + drift · W E[(y − x) xᵀ] E[x xᵀ]⁻¹   (drift = 1)

so that a solver which is handed W′ in the place of W makes up for what the layers before have lost, whatever it does else.
A ``drift`` below 1 goes part of the way: what is lost on a little text is partly of that text alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..core import Stats, factorise
from ..models import Block
from .waiting import Aside

_DAMPING = 0.01


class DenseRuns:
    """The dense block in the stages of the compressed one, on the hidden states of the dense model, (batch, tokens, width) each."""

    def __init__(self, block: Block, hidden: Sequence[Tensor], spill: Aside | None, offset: int):
        """``spill``: where batches wait between stages, under numbers from ``offset`` on."""
        dense = copy.copy(block)
        dense.parameters, dense.operators = dict(block.parameters), None
        self._runs, self._homes = [], [h.device for h in hidden]
        self._device, self._spill, self._offset = block.device, spill, offset
        for i, h in enumerate(hidden):
            self._runs.append(dense.start(h))
            self._put(i)

    def input(self, i: int, stage: int) -> Tensor:
        """What the layers of ``stage`` read of batch ``i``; stages come in their order."""
        self._get(i)
        if stage:
            self._runs[i].advance()
        y = self._runs[i].input()
        self._put(i)
        return y

    def outputs(self) -> list[Tensor]:
        """What the block gives, after the last stage."""
        out = []
        for i, (run, home) in enumerate(zip(self._runs, self._homes, strict=True)):
            self._get(i)
            run.advance()
            out.append(run.output().to(home))
        return out

    def _put(self, i: int) -> None:
        if self._spill:
            self._spill.put(self._offset + i, self._runs[i].state)

    def _get(self, i: int) -> None:
        if self._spill:
            self._spill.get(self._offset + i, self._runs[i].state, self._device)


def made_up(weights: Mapping[str, Tensor], stats: Stats, drift: float) -> dict[str, Tensor]:
    """W′ of each of the layers of a stage, (out, in); as they are where the dense inputs were not seen."""
    if stats.cross is None or not drift:
        return dict(weights)
    U = factorise(stats.hessian, _DAMPING).U
    lost = (stats.cross * (2 / stats.count) - stats.hessian) @ U.T @ U
    return {name: W + drift * (W @ lost) for name, W in weights.items()}
