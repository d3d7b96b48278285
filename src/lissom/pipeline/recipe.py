"""Recipes: what to do to a model, as a short list of steps.

    summary: 70% of the weights removed, the rest in INT4
    steps:
      - use: loss-clusters        # an allocation: shares the budget of the step after it over layers
        spread: 0.1
      - use: sparsegpt            # a solver, layer by layer while blocks stream by
        sparsity: 0.7
        bits: 4
    save: {format: packed}

A step names a row of a METHODS table; its other keys are that method's settings, or settings of the
constraint that every solver works under (:data:`CONSTRAINT`). All mistakes are reported together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..core import Method, RecipeError
from ..export import CODECS
from ..export.integer import FORMAT as INTEGER
from ..methods import METHODS
from .constraints import ConstraintSettings, pruning_problems, target_problems, textless_problems
from .overrides import CONSTRAINT, apply, takes
from .sections import NONE, SECTIONS, Calibration, Save
from .settings import build, suggest
from .target import Target, problems_of


@dataclass(frozen=True)
class Step:
    """One step: a method with its settings resolved."""

    method: Method
    config: Any
    constraint: ConstraintSettings

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def rounds_only(self) -> bool:
        """Whether it does nothing at 16 bits."""
        return self.method.kind == "solver" and self.method.makes == {"codes"}


@dataclass(frozen=True)
class Recipe:
    """``name``, one-line ``summary``, ``steps`` in order, how to ``save``, the default ``calibration``, and a ``target``."""

    name: str
    steps: tuple[Step, ...]
    summary: str = ""
    save: Save = field(default_factory=Save)
    calibration: Calibration = field(default_factory=Calibration)
    target: Target | None = None

    def describe(self) -> dict[str, Any]:
        """Plain data from which :func:`read` makes the same recipe again."""
        steps = []
        for step in self.steps:
            entry: dict[str, Any] = {"use": step.name}
            if step.method.kind in ("solver", "fold"):
                entry |= {k: v for k, v in dataclasses.asdict(step.constraint).items() if v not in (None, ())}
            entry |= dataclasses.asdict(step.config)
            steps.append(_plain(entry))
        return {
            "name": self.name,
            "summary": self.summary,
            "steps": steps,
            "save": dataclasses.asdict(self.save),
            "calibration": dataclasses.asdict(self.calibration),
        } | ({"target": _plain(dataclasses.asdict(self.target))} if self.target else {})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def shipped() -> dict[str, Path]:
    """Recipes that come with lissom, by name."""
    folder = Path(__file__).parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def implied(name: str) -> dict[str, Any] | None:
    """The recipe that a method's own name stands for, where no file says more: the method with the field's usual numbers.

    Pruning at 50%, quantization in 4 bits by groups of 128, allocations in front of SparseGPT at 70% (or GPTQ, for bits).
    """
    method = METHODS.get(name)
    if method is None or method.kind not in ("solver", "allocation"):
        return None
    if method.kind == "allocation":
        spender = {"use": "gptq", "bits": 4} if name == "bits" else {"use": "sparsegpt", "sparsity": 0.7}
        if name == "nm-layers":
            spender["pattern"] = "n:16"
        steps, save = [{"use": name}, spender], "packed"
    elif "zeros" in method.makes:
        steps, save = [{"use": name, "sparsity": 0.5}], "dense"
    else:
        steps, save = [{"use": name, "bits": 4, "group_size": 128}], "packed"
    return {"name": name, "summary": f"{method.summary} ({method.source})", "steps": steps, "save": {"format": save}}


def names() -> list[str]:
    """Everything that ``--recipe`` takes by name: the shipped files, and methods that stand for themselves."""
    return [*shipped(), *(name for name in METHODS if name not in shipped() and implied(name))]


def read(source: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a shipped name, a YAML file, a mapping, or a plain list of steps.

    ``overrides``: "key=value" strings. A short key reaches the steps that spell it out; when none does, every step that
    has such a setting. "step.key=value" reaches one step. Raises :class:`RecipeError` with all mistakes.
    """
    name, data = _load(source)
    problems: list[str] = []
    for key in data:
        if key not in ("name", "summary", "steps", "save", "calibration", "target"):
            known = ["summary", "steps", "save", "calibration", "target"]
            problems.append(f"recipe {name}: unknown key {key!r}{suggest(key, known)}")
    raw_steps = data.get("steps") or []
    if not isinstance(raw_steps, Sequence) or isinstance(raw_steps, str):
        raise RecipeError(f"recipe {name}: `steps` must be a list of `use: METHOD` entries")
    entries: list[dict[str, Any]] = []
    for i, raw in enumerate(raw_steps):
        if not isinstance(raw, Mapping) or "use" not in raw:
            problems.append(f"recipe {name}, step {i + 1}: needs `use: METHOD`, got {raw!r}")
        elif raw["use"] not in METHODS:
            problems.append(
                f"recipe {name}, step {i + 1}: unknown method {raw['use']!r}{suggest(raw['use'], list(METHODS))}"
            )
        else:
            entries.append(dict(raw))
    if not raw_steps:
        problems.append(f"recipe {name} has no steps")
    if problems:
        raise RecipeError(problems)
    sections = {key: dict(data.get(key) or {}) for key in ("save", "calibration", "target")}
    for override in overrides:
        apply(override, entries, sections, SECTIONS, problems)
    steps = tuple(_step(entry, i, problems) for i, entry in enumerate(entries))
    steps = _working(_compared_everywhere(steps))
    save = build(Save, sections["save"], "save", problems)
    calibration = build(Calibration, sections["calibration"], "calibration", problems)
    target = build(Target, sections["target"], "target", problems) if sections["target"] else None
    if target:
        problems += target_problems(steps)
        problems += problems_of(target, steps, save.format, overrides)
        steps = _freed([step for step in steps if step.method.kind != "allocation"])
    recipe = Recipe(str(data.get("name") or name), steps, str(data.get("summary") or ""), save, calibration, target)
    problems += _check(recipe)
    if problems:
        raise RecipeError(problems)
    return recipe


def _load(source: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(source, Recipe):
        return source.name, source.describe()
    if isinstance(source, Mapping):
        return str(source.get("name") or "recipe"), source
    if isinstance(source, str | Path):
        path = shipped().get(str(source)) or Path(source)
        if not path.is_file():
            own = implied(str(source))
            if own is not None:
                return str(source), own
            if Path(source).suffix in (".yaml", ".yml"):
                raise RecipeError(f"no recipe file {str(source)!r}")
            raise RecipeError(f"no recipe {str(source)!r}{suggest(str(source), names())}")
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not valid YAML: {error}") from error
        if isinstance(data, Mapping):
            return path.stem, data
        if isinstance(data, list):
            return path.stem, {"steps": data}
        raise RecipeError(f"{path} must hold a mapping with `steps`, or a list of steps")
    return "recipe", {"steps": list(source)}


def _step(entry: dict[str, Any], index: int, problems: list[str]) -> Step:
    method = METHODS[entry.pop("use")]
    where = f"step {index + 1} ({method.name})"
    own = {k: v for k, v in entry.items() if k in method.settings()}
    shared = {k: v for k, v in entry.items() if k in CONSTRAINT and k not in own and method.kind == "solver"}
    for key in entry:
        if key not in own and key not in shared:
            problems.append(f"{where}: unknown setting {key!r}{suggest(key, sorted(takes(method.name)))}")
    config = build(method.config, own, where, problems)
    constraint = build(ConstraintSettings, shared, where, problems)
    if constraint.per is None:
        constraint = replace(constraint, per="layer" if constraint.unit != "element" else method.comparison)
    if method.kind == "solver" and method.fold is not None and constraint.bits == 16:
        method = replace(method, kind="fold")
    return Step(method, config, constraint)


def _compared_everywhere(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """``per: global`` written out: one threshold over all layers is a budget for each, and inside a layer its scores decide."""
    out: list[Step] = []
    for step in steps:
        if step.constraint.per == "global":
            method = METHODS["global-threshold"]
            out.append(Step(method, method.config(), ConstraintSettings(per="layer")))
            step = replace(step, constraint=replace(step.constraint, per="layer"))
        out.append(step)
    return tuple(out)


def _working(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Without steps that only round and are told not to (16 bits), where another step solves."""
    off = [s for s in steps if s.rounds_only and s.constraint.bits == 16 and not s.constraint.prunes]
    alone = len(off) == sum(s.method.kind == "solver" for s in steps)
    return steps if alone else tuple(s for s in steps if s not in off)


def _freed(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps without the settings that a target chooses; half of the weights in 4 bits stand for whatever they will be."""
    solvers = [step for step in steps if step.method.kind == "solver"]
    out = []
    for step in steps:
        if step.method.kind == "solver":
            last = step is solvers[-1]
            free = {"sparsity": None if last else 0.5, "pattern": "unstructured", "bits": 4 if last else 16}
            step = replace(step, constraint=replace(step.constraint, **free))
        out.append(step)
    return tuple(out)


TRAINED = ("gates", "projection")  # kinds of structured steps that train the whole model
STRUCTURED = ("units", "blocks", *TRAINED)  # kinds of steps that make the model smaller
REWRITES = (*STRUCTURED, "permutation")  # … that make another dense checkpoint, from which the rest of the run starts


def _check(recipe: Recipe) -> list[str]:
    """What can be said without a model."""
    out: list[str] = []
    quantized_by, pending = None, None
    for i, step in enumerate(recipe.steps):
        where, c = f"step {i + 1} ({step.name})", step.constraint
        if step.method.kind == "allocation":
            if pending:
                out.append(
                    f"{where}: {pending.name} before it shares the same budget; leave one of them (per: global is one)"
                )
            pending = step
            continue
        if pending and step.method.kind != "solver":
            out.append(
                f"{where}: {pending.name} before it shares the budget of a pruning or quantization step; put it directly before that"
            )
            pending = None
        kinds = {s.method.kind for s in recipe.steps[:i] if s.method.kind != "allocation"}
        if step.method.kind in REWRITES and kinds - set(REWRITES):
            out.append(f"{where}: {step.name} rewrites the dense model; it must come before every other kind of step")
        if step.method.kind in ("fold", "rotation") and kinds & {"solver", "block", "training"}:
            out.append(
                f"{where}: {step.name} rewrites the weights before they are compressed; put it before those steps"
            )
        if step.method.kind == "fold" and (c.prunes or c.pattern != "unstructured"):
            out.append(f"{where}: {step.name} does not prune; put a pruning step after it")
        mendable = {"solver"} if step.method.kind == "block" else {"solver", *STRUCTURED}
        alone = step.method.kind == "training" and bool(getattr(step.config, "teacher", ""))
        if step.method.kind in ("block", "training") and not kinds & mendable and not alone:
            own = (
                ", or name the teacher of a model that is compressed already" if step.method.kind == "training" else ""
            )
            out.append(
                f"{where}: {step.name} works on solved layers; put a pruning or quantization step before it{own}"
            )
        if step.method.kind == "block" and any(s.method.kind == "solver" for s in recipe.steps[i:]):
            out.append(f"{where}: {step.name} works on whole blocks; put it after every pruning and quantization step")
        if step.method.kind == "training" and i + 1 < len(recipe.steps):
            out.append(f"{where}: {step.name} trains the finished model; it must be the last step")
        if step.method.kind != "solver":
            continue
        if c.sparsity is not None and not 0 <= c.sparsity < 1:
            out.append(f"{where}: sparsity must be in [0, 1), not {c.sparsity:g}")
        if c.nm:
            n, m = c.nm
            if not 1 <= n <= m <= 32:
                out.append(f"{where}: pattern {c.pattern} needs 1 ≤ N ≤ M ≤ 32")
            elif c.sparsity is not None and abs(c.sparsity - (1 - n / m)) > 1e-9:
                out.append(
                    f"{where}: pattern {c.pattern} means sparsity {1 - n / m:g}, not {c.sparsity:g}; "
                    "drop one of them, or set pattern=unstructured"
                )
        elif c.free_m or c.row_m:
            if not 2 <= (c.group or 0) <= 32 or not c.sparsity:
                out.append(f"{where}: pattern {c.pattern} needs 2 ≤ M ≤ 32 and a sparsity")
            elif c.free_m and pending is None:
                out.append(
                    f"{where}: pattern {c.pattern} takes N from an allocation; put one before the step, such as uniform or loss-clusters"
                )
        elif c.pattern != "unstructured":
            out.append(
                f"{where}: pattern must be 'unstructured', 'N:M' such as '2:4', 'n:16', or 'n:16 by row', not {c.pattern!r}"
            )
        if c.nm and pending and pending.name != "bits":
            out.append(
                f"{where}: pattern {c.pattern} leaves {pending.name} nothing to share; "
                f"give pattern n:{c.nm[1]} with a sparsity, or drop the allocation"
            )
        out += [f"{where}: {line}" for line in pruning_problems(step, pending, recipe.steps[:i])]
        if c.bits != 16 and not 2 <= c.bits <= 8:
            out.append(f"{where}: bits must be 2 … 8, or 16 for not quantized, not {c.bits}")
        if c.group_size < 0:
            out.append(f"{where}: group_size must be positive, or 0 for one scale per output row, not {c.group_size}")
        for expression in (*c.only, *c.ignore):
            try:
                re.compile(expression)
            except re.error as error:
                out.append(f"{where}: {expression!r} is not a regular expression ({error})")
        if c.prunes and "zeros" not in step.method.makes:
            out.append(f"{where}: {step.name} does not prune; put a pruning step before it")
        if c.bits != 16 and "codes" not in step.method.makes:
            out.append(f"{where}: {step.name} does not quantize; add a quantization step after it")
        first = not any(s.method.kind == "solver" for s in recipe.steps[:i])
        idle = c.sparsity is None and not c.group and c.bits == 16
        if first and idle and "zeros" in step.method.makes:
            out.append(
                f"{where}: changes nothing; give it a sparsity, a pattern or bits, or put it after a pruning step"
            )
        if c.prunes and quantized_by:
            out.append(
                f"{where}: pruning after {quantized_by} would break its codes; prune first, or use one joint step"
            )
        if c.bits != 16:
            quantized_by = step.name
        pending = None
    if pending:
        out.append(f"the allocation {pending.name} is the last step: put it before the step whose budget it shares")
    c = recipe.calibration
    if c.samples < 1 or c.length < 2:
        out.append(f"calibration: samples ≥ 1 and length ≥ 2 are needed, not {c.samples} × {c.length}")
    if c.token_fisher < 0:
        out.append(f"calibration: token_fisher must be at least 0, not {c.token_fisher:g}")
    if not 0 <= c.drift <= 1:
        out.append(f"calibration: drift must be between 0 and 1, not {c.drift:g}")
    if c.drift and any(s.constraint.shots > 1 for s in recipe.steps):
        out.append("calibration: drift looks at the dense model, which later shots have no more; use one shot")
    out += textless_problems(recipe) if c.data == NONE else []
    odd = [t.name for t in recipe.steps if "forms" in t.method.makes and t.constraint.bits != 16]
    if odd and any(s.method.kind == "training" for s in recipe.steps):
        out.append(
            f"step {len(recipe.steps)} ({recipe.steps[-1].name}): trains codes of uniform grids and plain weights; what {odd[0]} "
            "makes would be lost"
        )
    s = recipe.save
    whole = [t.name for t in recipe.steps if t.method.kind == "integer"]
    if whole and len(recipe.steps) > 1:
        out.append(f"step 1 ({whole[0]}): it makes the whole encoder; take out the other steps")
    if bool(whole) != (s.format == INTEGER):
        out.append(
            f"save: format {INTEGER} belongs to ibert, and ibert to it; this is {s.format} with "
            + ", ".join(t.name for t in recipe.steps)
        )
    if s.format not in FORMATS:
        out.append(f"save: unknown format {s.format!r}{suggest(s.format, FORMATS)}")
    if s.dtype not in ("auto", "float16", "bfloat16", "float32"):
        out.append(f"save: dtype must be auto, float16, bfloat16 or float32, not {s.dtype!r}")
    if s.embedding_bits != 16 and not 2 <= s.embedding_bits <= 8:
        out.append(f"save: embedding_bits must be 2 … 8, or 16, not {s.embedding_bits}")
    if s.embedding_bits != 16 and s.format != "packed":
        out.append(f"save: embedding_bits needs the packed format; {s.format} keeps embeddings in full precision")
    return out


FORMATS = (*CODECS, INTEGER)
