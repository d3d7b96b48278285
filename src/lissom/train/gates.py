"""Learned gates on the units of a whole network: one hard-concrete gate a unit, put on what reads or writes it.

    heads, neurons   columns of the layer that reads them                 (blocks, units)
    blocks           outputs of both branches of a block                  (blocks,)
    channels         whatever writes into the hidden state                (width,)

A gate at 0 is the same as the unit's removal (for channels: up to the factor of the norms, see models/channels), so that the
sliced model gives what the gated one gave. The gates' sizes are held by multipliers, which climb while the rest descends.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..core import GateProblem
from ..models.units import units_of
from .forms import Form, Frozen, Gated, HardConcrete
from .student import Network

OPEN = 0.99  # probability that a gate is open when the training begins; its median value is then 1


class Gates:
    """Gates of the given ``kinds`` on ``network``, whose forms they wrap; ``seed`` of their noise."""

    def __init__(self, network: Network, kinds: Collection[str], seed: int = 0):
        self.network, self.seed = network, seed
        self.of: dict[str, HardConcrete] = {}
        self.size: dict[str, int] = {}
        blocks, width = len(network.blocks), network.model.width
        for kind in sorted(kinds):
            if kind in ("blocks", "channels"):
                self.of[kind] = HardConcrete.start(blocks if kind == "blocks" else width, OPEN)
        for block in network.blocks:
            for kind in ("heads", "neurons"):
                if kind not in kinds:
                    continue
                units = units_of(block.row, block.config, block.linears, kind)
                gates = self.of[f"{kind}:{block.number}"] = HardConcrete.start(units.count, OPEN)
                self.size[kind] = units.size
                for name, index in units.columns.items():
                    unit = torch.empty(index.numel(), dtype=torch.long)
                    unit[index] = torch.arange(units.count)[:, None]
                    self._put(f"{name}.weight", gates, unit, "columns", kind)
            for layer in block.linears:
                if layer.role in ("o", "down"):
                    for name in (f"{layer.name}.weight", f"{layer.name}.bias"):
                        if name in block.parameters:
                            self._put_rows(name, layer.rows, block.number)
        if "channels" in kinds:
            self._put(network.model.embed_name, self.of["channels"], torch.arange(width), "columns", "channels")
        self.multipliers: Tensor | None = None

    def _put_rows(self, name: str, rows: int, block: int) -> None:
        if "blocks" in self.of:
            self._put(name, self.of["blocks"], torch.full((rows,), block), "rows", "blocks")
        if "channels" in self.of:
            self._put(name, self.of["channels"], torch.arange(rows), "rows", "channels")

    def _put(self, name: str, gates: HardConcrete, unit: Tensor, side: str, label: str) -> None:
        forms = self.network.forms
        inner: Form = forms.get(name) or Frozen(self.network.tensor(name))
        forms[name] = Gated(inner, gates, unit, side, f"gates:{label}")  # type: ignore[arg-type]

    def leaves(self, constraints: int) -> dict[str, Tensor]:
        """Leaves of gates, and multipliers (constraints, 2) that start at zero, where the network is by now."""
        out = {f"gates:{k}": g.log_alpha for k, g in self.of.items()}
        if constraints:
            self.multipliers = torch.zeros(constraints, 2, device=self.network.device, requires_grad=True)
            out["multipliers"] = self.multipliers
        return out

    def sample(self, step: int) -> None:
        """Draw the noise of one step."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % (1 << 62))
        for gates in self.of.values():
            gates.sample(generator)

    def settle(self) -> None:
        """Deterministic gates, as they will be used."""
        for gates in self.of.values():
            gates.settle()

    def gathered(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One tensor a kind, (blocks, units) for heads and neurons, of ``values`` by gate."""
        out: dict[str, Tensor] = {}
        for kind in dict.fromkeys(k.split(":")[0] for k in values):
            mine = [v for k, v in values.items() if k.split(":")[0] == kind]
            out[kind] = torch.stack(mine) if kind in ("heads", "neurons") else mine[0]
        return out

    def problem(self, keep: Mapping[str, float], progress: float) -> GateProblem:
        return GateProblem(self.gathered({k: g.open() for k, g in self.of.items()}), keep, self.size, progress)

    def scores(self) -> dict[str, Tensor]:
        """log α, by kind."""
        return self.gathered({k: g.log_alpha.detach() for k, g in self.of.items()})


def lagrangian(gaps: Tensor, multipliers: Tensor) -> Tensor:
    """Σ λ₁ g + λ₂ g² with gradients that descend in ``gaps`` (n,) and climb in ``multipliers`` (n, 2)."""
    terms = torch.stack((gaps, gaps.square()), 1)
    value = (multipliers.detach() * terms).sum()
    climb = (multipliers * terms.detach()).sum()
    return value - climb + climb.detach()
