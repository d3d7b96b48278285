"""Allocation: how a budget is shared over layers, whatever method spends it."""

from ...core import Method
from . import alpha_pruning as _alpha
from . import atp as _atp
from . import besa as _besa
from . import bits as _bits
from . import equal_marginal as _marginal
from . import global_threshold as _global
from . import loss_clusters as _clusters
from . import nm_layers as _nm
from . import owl as _owl
from . import predictor_search as _predictor
from . import trace_steps as _trace
from .uniform import Uniform, uniform

METHODS = {
    m.name: m
    for m in (
        Method("uniform", "allocate", "allocation", "the same for every layer", "baseline", Uniform, uniform),
        Method(
            "owl", "allocate", "allocation", "blocks with more outliers keep more", "arXiv 2310.05175",
            _owl.OWL, _owl.owl, needs=frozenset({"inputs"}), summarise=_owl.summarise,
        ),
        Method(
            "atp", "allocate", "allocation", "sparsity rises from block to block in equal steps", "arXiv 2502.14770",
            _atp.ATP, _atp.atp,
        ),
        Method(
            "loss-clusters", "allocate", "allocation", "groups of layers by K-means on the log of their loss",
            "arXiv 2409.20094", _clusters.LossClusters, _clusters.loss_clusters, needs=frozenset({"gram"}),
            summarise=_clusters.summarise,
        ),
        Method(
            "equal-marginal", "allocate", "allocation", "one more zero costs the same in every layer",
            "methods/01 §2.5", _marginal.EqualMarginal, _marginal.equal_marginal, needs=frozenset({"gram"}),
            summarise=_marginal.summarise,
        ),
        Method(
            "global-threshold", "allocate", "allocation", "one threshold over the scores of all layers", "arXiv 1506.02626",
            _global.GlobalThreshold, _global.global_threshold, needs=frozenset({"score"}), summarise=_global.summarise,
        ),
        Method(
            "bits", "allocate", "allocation", "2, 3, 4 or 8 bits by each layer's loss-per-bit curve", "arXiv 1909.05840",
            _bits.Bits, _bits.bits, needs=frozenset({"gram"}), summarise=_bits.summarise,
        ),
        Method(
            "alpha-pruning", "allocate", "allocation", "light-tailed blocks are pruned more", "arXiv 2410.10912",
            _alpha.AlphaPruning, _alpha.alpha_pruning, summarise=_alpha.summarise,
        ),
        Method(
            "trace-steps", "allocate", "allocation", "equal steps by rank of the Hessian's trace (ISC)", "arXiv 2310.09499",
            _trace.TraceSteps, _trace.trace_steps, needs=frozenset({"inputs"}), summarise=_trace.summarise,
        ),
        Method(
            "besa", "allocate", "allocation", "rates learned by gradients through each block", "arXiv 2402.16880",
            _besa.BESA, _besa.besa, needs=frozenset({"blocks"}), learn=_besa.learn,
        ),
        Method(
            "predictor-search", "allocate", "allocation", "measured plans teach trees which plans to try", "arXiv 2309.09507",
            _predictor.PredictorSearch, _predictor.predictor_search, needs=frozenset({"trials"}),
        ),
        Method(
            "nm-layers", "allocate", "allocation", "another plan rounded to N of M per layer", "largest remainder",
            _nm.NMLayers, _nm.nm_layers, needs=frozenset({"gram"}), summarise=_nm.summarise,
        ),
    )
}  # fmt: skip
