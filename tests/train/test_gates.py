"""Gates on a whole network: closed is removed, in every kind and architecture; multipliers climb."""

import pytest
import torch

from lissom.export import open_model
from lissom.models import Model
from lissom.models.units import units_of
from lissom.pipeline import structured
from lissom.train import Gates, Network, lagrangian
from tiny import tiny_model

IDS = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(0))


def _set(gates, keep):
    for name, gate in gates.of.items():
        with torch.no_grad():
            gate.log_alpha.fill_(-20.0)
            gate.log_alpha[keep[name.split(":")[0]]] = 20.0


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3", "phi3", "smollm3"])
def test_a_closed_gate_is_the_same_as_removal(kind, tmp_path):
    tiny_model(kind, tmp_path / "dense")
    model = Model(open_model(tmp_path / "dense"))
    network = Network(model)
    plain = network.forward(IDS).logits
    gates = Gates(network, ("heads", "neurons", "blocks", "channels"))
    assert torch.allclose(network.forward(IDS).logits, plain, atol=1e-4)  # they start open
    keep = {
        "heads": torch.tensor([1]), "neurons": torch.tensor([0, 5, 7, 30]), "blocks": torch.tensor([1]),
        "channels": torch.tensor([0, 1, 2, 3, 8, 9, 20, 31]),
    }  # fmt: skip
    _set(gates, keep)
    closed = network.forward(IDS).logits
    network.settle()
    block = network.blocks[1]
    units = {k: (units_of(block.row, block.config, block.linears, k), keep[k]) for k in ("heads", "neurons")}
    chosen = {k: keep[k] for k in ("blocks", "channels")}
    structured._write(model, [(block, 1, units)], chosen, tmp_path / "small", torch.float32, network.outer)
    small = Model(open_model(tmp_path / "small"))
    assert (small.blocks, small.width) == (1, 8)
    assert torch.allclose(small.forward(IDS), closed, atol=5e-3 if kind == "qwen3" else 1e-4)
    assert not torch.allclose(closed, plain, atol=0.1)


def test_noise_is_a_function_of_the_step(tmp_path):
    tiny_model("llama", tmp_path)
    gates = Gates(Network(Model(open_model(tmp_path))), ("heads",))

    def values(step):
        gates.sample(step)
        return torch.cat([g.value() for g in gates.of.values()])

    with torch.no_grad():
        for gate in gates.of.values():
            gate.log_alpha.zero_()
        assert torch.equal(values(3), values(3)) and not torch.equal(values(3), values(4))
        assert gates.problem({"heads": 0.5}, 0.0).open["heads"].shape == gates.scores()["heads"].shape == (2, 2)


def test_multipliers_climb_while_the_rest_descends():
    gaps = torch.tensor([0.2, -0.1], requires_grad=True)
    multipliers = torch.tensor([[3.0, 5.0], [-1.0, 2.0]], requires_grad=True)
    value = lagrangian(gaps, multipliers)
    assert float(value.detach()) == pytest.approx(3 * 0.2 + 5 * 0.04 + 0.1 + 2 * 0.01)
    value.backward()
    assert gaps.grad.tolist() == pytest.approx([3 + 2 * 5 * 0.2, -1 + 2 * 2 * -0.1])
    assert multipliers.grad.flatten().tolist() == pytest.approx([-0.2, -0.04, 0.1, -0.01])


def test_the_lagrangian_finds_the_wanted_sparsity():
    from lissom.train import HardConcrete

    gates, multipliers = HardConcrete.start(50, 0.99), torch.zeros(1, 2, requires_grad=True)
    value = torch.linspace(0, 1, 50)  # what an open gate is worth
    optimiser = torch.optim.Adam([gates.log_alpha, multipliers], lr=0.1)
    for _ in range(400):
        gap = (1 - gates.open().mean() - 0.6)[None]
        loss = (value * (1 - gates.open())).mean() + lagrangian(gap, multipliers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(gates.open().mean().detach()) == pytest.approx(0.4, abs=0.03)
    assert gates.log_alpha.detach().argsort()[-20:].min() >= 28  # the most valuable ones remain
