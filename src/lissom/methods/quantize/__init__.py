"""Quantization: which levels weights may take."""

from ...core import Method
from .activations import Activations, round_input
from .autoround import AutoRound, autoround
from .awq import AWQ, awq, awq_fold
from .bcq import BCQ, bcq
from .codebook import Codebook, codebook
from .descent import Descent, descent
from .gobo import GOBO, gobo
from .gptq import GPTQ, gptq
from .hqq import HQQ, hqq
from .ibert import IBert
from .ibert_encoder import prepare
from .kv_cache import KVCache, fake_cache
from .llm_int8 import LLMInt8, llm_int8
from .loftq import LoftQ, loftq
from .omniquant import OmniQuant, omniquant
from .quip import QuIP, quip
from .rotations import QuaRot, turns
from .rtn import RTN, rtn
from .smoothquant import SmoothQuant, smooth, smoothquant
from .spinquant import SpinQuant, spin
from .spqr import SpQR, spqr
from .vs_quant import VSQuant, vs_quant
from .yaqa import YAQA, yaqa
from .zeroquant import ZeroQuant, zeroquant

_CODES = frozenset({"codes"})
_FORMS = frozenset({"codes", "forms"})

METHODS = {
    m.name: m
    for m in (
        Method("rtn", "quantize", "solver", "round to nearest", "baseline", RTN, rtn, makes=_CODES),
        Method(
            "gptq", "quantize", "solver", "rounding with error feedback", "arXiv 2210.17323", GPTQ, gptq,
            needs=frozenset({"gram"}), makes=_CODES,
        ),
        Method(
            "hqq", "quantize", "solver", "zero points that make the error sparse, without data", "Badri & Shaji 2023 (blog)", HQQ, hqq,
            makes=_FORMS,
        ),
        Method(
            "awq", "quantize", "solver", "inputs that matter are scaled up before rounding", "arXiv 2306.00978", AWQ, awq,
            needs=frozenset({"gram"}), makes=_FORMS, fold=awq_fold,
        ),
        Method(
            "autoround", "quantize", "solver", "rounding learned by signed gradients", "arXiv 2309.05516", AutoRound, autoround,
            needs=frozenset({"gram"}), makes=_CODES,
        ),
        Method(
            "gptq-descent", "quantize", "solver", "GPTQ, then coordinate descent and re-fitted scales", "arXiv 2309.01885", Descent, descent,
            needs=frozenset({"gram"}), makes=_CODES,
        ),
        Method(
            "yaqa", "quantize", "solver", "error feedback over inputs and outputs, for the model's loss", "arXiv 2505.22988", YAQA, yaqa,
            needs=frozenset({"gram", "gradients"}), makes=_CODES,
        ),
        Method(
            "quip", "quantize", "solver", "random rotations, then rounding with error feedback", "arXiv 2307.13304", QuIP, quip,
            needs=frozenset({"gram"}), makes=_FORMS,
        ),
        Method(
            "spqr", "quantize", "solver", "tiny groups, quantized scales, outliers kept", "arXiv 2306.03078", SpQR, spqr,
            needs=frozenset({"gram"}), makes=_FORMS,
        ),
        Method(
            "gobo", "quantize", "solver", "outliers kept, the rest share a few values", "arXiv 2005.03842", GOBO, gobo,
            makes=_FORMS,
        ),
        Method(
            "bcq", "quantize", "solver", "sums of scaled sign vectors (LUT-GEMM)", "arXiv 2206.09557", BCQ, bcq,
            makes=_FORMS,
        ),
        Method(
            "codebook", "quantize", "solver", "NF4, FP4, MXFP4, NVFP4, FP8, powers of two, k-means", "arXiv 2305.14314", Codebook, codebook,
            needs=frozenset({"inputs"}), makes=_FORMS,
        ),
        Method(
            "loftq", "quantize", "solver", "quantized base and low-rank correction found together", "arXiv 2310.08659", LoftQ, loftq,
            needs=frozenset({"gram"}), makes=_FORMS,
        ),
        Method(
            "omniquant", "quantize", "solver", "clipping of ranges learned by gradients", "arXiv 2308.13137", OmniQuant, omniquant,
            needs=frozenset({"gram"}), makes=_CODES,
        ),
        Method(
            "smoothquant", "quantize", "solver", "outliers of activations migrate to weights", "arXiv 2211.10438", SmoothQuant, smoothquant,
            needs=frozenset({"inputs", "sample"}), makes=_FORMS, fold=smooth,
        ),
        Method(
            "llm-int8", "quantize", "solver", "outlier inputs in half precision, the rest INT8", "arXiv 2208.07339", LLMInt8, llm_int8,
            needs=frozenset({"inputs"}), makes=_FORMS,
        ),
        Method(
            "vs-quant", "quantize", "solver", "a quantized scale for every short vector", "arXiv 2102.04503", VSQuant, vs_quant,
            makes=_FORMS,
        ),
        Method(
            "zeroquant", "quantize", "block", "each rounded block trained towards the dense one (LKD)", "arXiv 2206.01861", ZeroQuant, zeroquant,
            needs=frozenset({"gradients", "data", "training"}),
        ),
        Method(
            "quarot", "quantize", "rotation", "the hidden states turned so that nothing stands out", "arXiv 2404.00456", QuaRot, turns,
        ),
        Method(
            "spinquant", "quantize", "rotation", "rotations learned on the error that rounding leaves", "arXiv 2405.16406", SpinQuant, turns,
            needs=frozenset({"data"}), fold=spin,
        ),
        Method(
            "ibert", "quantize", "integer", "a BERT encoder in integers, from ids to the pooled output", "arXiv 2101.01321", IBert, prepare,
        ),
        Method(
            "activations", "quantize", "operator", "inputs of linear layers rounded at run time", "arXiv 1712.05877", Activations, round_input,
        ),
        Method(
            "kv-cache", "quantize", "operator", "keys and values rounded when they are written", "arXiv 2402.02750", KVCache, fake_cache,
        ),
    )
}  # fmt: skip
