"""Pruning: which weights become zero."""

from ...core import Method
from .alps import ALPS, alps
from .channel_permutation import ChannelPermutation, channel_permutation
from .dsnot import DSnoT, dsnot
from .e_sparse import ESparse, e_sparse, e_sparse_score
from .gblm import GBLM, gblm, gblm_score
from .isc import ISC, isc, isc_score
from .l_obs import LOBS, l_obs
from .magnitude import Magnitude, magnitude, magnitude_score
from .oats import OATS, oats
from .obd import LOBD, OBD, l_obd, l_obd_score, obd, obd_score
from .obs import OBS, obs, obs_score
from .refit import Refit, refit
from .ria import RIA, ria, ria_scores
from .sparsegpt import SparseGPT, sparsegpt, sparsegpt_score
from .surgeon import Surgeon, surgeon, surgeon_score
from .wanda import Wanda, wanda, wanda_score

_ALL = frozenset({"zeros", "codes"})
_INPUTS, _GRAM = frozenset({"inputs"}), frozenset({"gram"})
_GRADIENTS = frozenset({"gradients"})

METHODS = {
    m.name: m
    for m in (
        Method(
            "magnitude", "prune", "solver", "smallest |w| become zero", "arXiv 2002.08307", Magnitude, magnitude,
            makes=_ALL, score=magnitude_score,
        ),
        Method(
            "wanda", "prune", "solver", "|w| times input norm, compared by row", "arXiv 2306.11695", Wanda, wanda,
            needs=frozenset({"inputs"}), makes=_ALL, comparison="row", score=wanda_score,
        ),
        Method(
            "sparsegpt", "prune", "solver", "second-order choice with error feedback", "arXiv 2301.00774",
            SparseGPT, sparsegpt, needs=frozenset({"gram"}), makes=_ALL, score=sparsegpt_score,
        ),
        Method(
            "refit", "prune", "solver", "best weights under the mask of the step before", "normal equations",
            Refit, refit, needs=frozenset({"gram"}), makes=_ALL,
        ),
        Method(
            "alps", "prune", "solver", "zeros by ADMM, then the best weights", "arXiv 2406.07831", ALPS, alps,
            needs=frozenset({"gram"}), makes=_ALL, score=sparsegpt_score,
        ),
        Method(
            "ria", "prune", "solver", "importance relative to row and column, times input norm", "ICLR 2024 (Plug-and-Play)",
            RIA, ria, needs=_INPUTS, makes=_ALL, score=ria_scores,
        ),
        Method(
            "e-sparse", "prune", "solver", "|w| times entropy and norm of its input", "arXiv 2310.15929",
            ESparse, e_sparse, needs=_INPUTS | {"entropy"}, makes=_ALL, comparison="row", score=e_sparse_score,
        ),
        Method(
            "isc", "prune", "solver", "OBS plus OBD saliency in a SparseGPT sweep", "arXiv 2310.09499", ISC, isc,
            needs=_GRAM, makes=_ALL, score=isc_score,
        ),
        Method(
            "gblm", "prune", "solver", "|w| times input norm and gradient norm", "arXiv 2311.04902", GBLM, gblm,
            needs=_INPUTS | _GRADIENTS, makes=_ALL, comparison="row", score=gblm_score,
        ),
        Method(
            "obd", "prune", "solver", "½ F w², F the diagonal Fisher of the loss", "LeCun et al. 1989", OBD, obd,
            needs=_GRADIENTS, makes=_ALL, score=obd_score,
        ),
        Method(
            "l-obd", "prune", "solver", "½ H w², H the layer's diagonal", "arXiv 1705.07565", LOBD, l_obd,
            needs=_INPUTS, makes=_ALL, score=l_obd_score,
        ),
        Method(
            "obs", "prune", "solver", "block Fisher of the loss, kept weights updated", "arXiv 2203.07259", OBS, obs,
            needs=_GRADIENTS, makes=_ALL, score=obs_score,
        ),
        Method(
            "l-obs", "prune", "solver", "exact greedy removal with the layer's Hessian; small layers", "arXiv 1705.07565",
            LOBS, l_obs, needs=_GRAM, makes=_ALL | {"single"},
        ),
        Method(
            "llm-surgeon", "prune", "solver", "elements, rows or columns by Kronecker factors of the Fisher", "arXiv 2312.17244",
            Surgeon, surgeon, needs=_GRAM | _GRADIENTS, makes=_ALL, score=surgeon_score,
        ),
        Method(
            "dsnot", "prune", "solver", "repairs a mask by exchanges that lower the mean output error", "arXiv 2310.08915",
            DSnoT, dsnot, needs=_INPUTS, makes=_ALL | {"exchanges"}, comparison="row",
        ),
        Method(
            "channel-permutation", "prune", "permutation", "reorders channels so that N:M keeps more", "ICLR 2024 (Plug-and-Play)",
            ChannelPermutation, channel_permutation, needs=_INPUTS | {"entropy"},
        ),
        Method(
            "oats", "prune", "solver", "sparse plus low rank", "arXiv 2409.13652", OATS, oats, needs=_INPUTS,
            makes=frozenset({"zeros", "factors"}), comparison="row",
        ),
    )
}  # fmt: skip
