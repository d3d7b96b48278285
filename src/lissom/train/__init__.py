"""One training loop, the forms that trained weights take, and what they are trained on."""

from ..methods.heal.objective import Objective
from .batches import Batches, Mixture, reweighted
from .forms import Form, Frozen, Gated, HardConcrete, Latent, LoRA, solved_of
from .gates import Gates, lagrangian
from .gradual import Gradual
from .loop import State, Training, train
from .objective import cache_teacher, held_out_loss, loss_against, loss_against_cache
from .ranks import Ranks
from .student import Network, Output, hardware

__all__ = [
    "Batches",
    "Form",
    "Frozen",
    "Gated",
    "Gates",
    "Gradual",
    "HardConcrete",
    "Latent",
    "LoRA",
    "Mixture",
    "Network",
    "Objective",
    "Output",
    "Ranks",
    "State",
    "Training",
    "cache_teacher",
    "hardware",
    "held_out_loss",
    "lagrangian",
    "loss_against",
    "loss_against_cache",
    "reweighted",
    "solved_of",
    "train",
]
