"""The command line: thin argument parsing around :mod:`lissom`'s functions."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..core import FormatError, LissomError, OutputError, RecipeError
from ..run.commands import add_commands
from . import show

app = typer.Typer(
    name="lissom",
    help="Makes large language models smaller and faster, and says honestly what that cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face directory, a hub id, a GGUF file, or 'demo'.")
]
Device = Annotated[
    str, typer.Option("--device", help="Where blocks compute: cpu, cuda, cuda:1; auto: a GPU where there is one.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        help="A shipped recipe (see `lissom recipes`) or a YAML file.",
        show_default="aggressive; budget with a target",
    ),
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: sparsity=0.6, bits=16, sparsegpt.damping=0.02.")
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", help="Calibration text: a file or a name ('builtin').")
]
Samples = Annotated[int | None, typer.Option("--samples", help="Calibration samples.")]
Length = Annotated[int | None, typer.Option("--length", help="Tokens per sample.")]
TargetSize = Annotated[
    str | None,
    typer.Option("--target-size", help="Choose sparsity and bits of every layer to meet a size, such as 60MB."),
]
TargetBits = Annotated[
    float | None, typer.Option("--target-bits", help="The same for 8 · bytes / parameters, such as 2.2.")
]
MaxKL = Annotated[
    float | None, typer.Option("--max-kl", help="The smallest file within this KL, in nats a token on held-out text.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the calibration slices.")]


def _overrides(
    settings: list[str] | None,
    calibration: str | None,
    samples: int | None,
    length: int | None,
    seed: int | None,
    target: dict[str, Any],
) -> list[str]:
    given = {"data": calibration, "samples": samples, "length": length, "seed": seed}
    wished = {f"target.{k}": v for k, v in target.items()}
    sections = {f"calibration.{k}": v for k, v in given.items()} | wished
    return [*(settings or []), *(f"{k}={v}" for k, v in sections.items() if v is not None)]


def _usual(target: dict[str, Any]) -> str:
    """The recipe when none is named."""
    return "aggressive" if all(v is None for v in target.values()) else "budget"


@app.command()
def compress(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write; it must not exist.")],
    recipe: RecipeOption = None,
    settings: Set = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    target_size: TargetSize = None,
    target_bits: TargetBits = None,
    max_kl: MaxKL = None,
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Go on from an interrupted run with the same inputs, or start over."),
    ] = True,
    spill: Annotated[
        bool, typer.Option("--spill", help="Keep waiting activations on disk instead of in memory.")
    ] = False,
    format: Annotated[
        str | None, typer.Option("--format", help="packed, dense, compressed-tensors, int-quantized, gptq or gptq-v2.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compress MODEL into OUT: plan, allocate, solve block by block, save, load back and compare."""
    from ..pipeline import compress as run
    from ..report import write_report

    target = {"size": target_size, "bits": target_bits, "max_kl": max_kl}
    overrides = _overrides(settings, calibration, samples, length, seed, target)
    if format:
        overrides.append(f"save.format={format}")
    command = "lissom " + shlex.join(sys.argv[1:])
    with show.bar(quiet=json) as tick:
        result = run(
            model, out, recipe or _usual(target), overrides=overrides, resume=resume, spill=spill, device=device, tick=tick,
            command=command,
            note=None if json else lambda text: show.err.print(text, style="dim", markup=False, soft_wrap=True),
        )  # fmt: skip
    page = write_report(out)
    if json:
        show.emit({k: v for k, v in result.items() if k != "layers"} | {"report": str(page)}, True)
        return
    show.out.print(
        f"{out}: {show.size(result['bytes'])}, {result['bits_per_weight']:.2f} bits per weight, "
        f"{result['sparsity']:.1%} zeros, in {show.duration(result['seconds'])}, peak memory {show.size(result['peak_rss_bytes'])}"
    )
    show.out.print(f"report: {page}", soft_wrap=True)
    show.out.print(f"next:   lissom evaluate {out} --against {model}", soft_wrap=True)


@app.command()
def plan(
    model: Model,
    recipe: RecipeOption = None,
    settings: Set = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    target_size: TargetSize = None,
    target_bits: TargetBits = None,
    max_kl: MaxKL = None,
    format: Annotated[
        str | None, typer.Option("--format", help="packed, dense, compressed-tensors, int-quantized, gptq or gptq-v2.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a recipe would do to MODEL, and what it would take, without doing it."""
    from ..pipeline import expectation
    from ..pipeline import plan as make

    target = {"size": target_size, "bits": target_bits, "max_kl": max_kl}
    overrides = _overrides(settings, calibration, samples, length, seed, target)
    if format:
        overrides.append(f"save.format={format}")
    with show.bar(quiet=json) as tick:
        made = make(model, recipe or _usual(target), overrides=overrides, tick=tick)
    if json:
        show.emit(made.describe(), True)
        return
    facts, est = made.model, made.estimates
    show.out.print(f"[bold]{made.recipe.name}[/bold]: {made.recipe.summary}")
    show.out.print(
        f"{facts['architecture']}, {facts['blocks']} blocks, {facts['linear_layers']} linear layers, "
        f"{facts['parameters'] / 1e6:.1f} M parameters, planned sparsity {facts['planned_sparsity']:.1%}"
    )
    show.out.print(show.planned(made.layers, made.target is not None))
    if made.target:
        show.out.print(expectation(made.target), soft_wrap=True, markup=False)
    show.out.print(
        f"estimates: {show.duration(est['seconds'])}, memory {show.size(est['memory_bytes'])}, "
        f"disk {show.size(est['disk_bytes'])}, result {show.size(est['size_bytes'])}"
    )
    for warning in made.warnings:
        show.out.print(f"note: {warning}", style="yellow", markup=False, soft_wrap=True)


@app.command()
def inspect(model: Model, json: Json = False) -> None:
    """Show the architecture, layers, shapes and bytes of MODEL, and what is supported."""
    from ..pipeline import inspect as look

    found = look(model)
    if json:
        show.emit(found, True)
        return
    for key in ("model", "format", "architecture", "parameters", "bytes", "bits_per_weight", "blocks", "dtype"):
        show.out.print(f"{key:16} {found[key]}")
    rows = [[r["role"], r["count"], "×".join(map(str, r["shape"])), r["stage"]] for r in found["layers"]]
    show.out.print(show.table("linear layers per block", ["role", "count", "shape", "stage"], rows))
    show.out.print("supported: " + ", ".join(found["supported"]))


@app.command()
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option("--data", help="Evaluation text: a file or a name.")] = "builtin-heldout",
    length: Annotated[int, typer.Option("--length", help="Tokens per window.")] = 1024,
    windows: Annotated[int, typer.Option("--windows", help="Windows; 0 means the whole text.")] = 16,
    against: Annotated[str | None, typer.Option("--against", help="A dense model: adds KL and agreement.")] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure perplexity, bits per byte, bytes and sparsity of a checkpoint on disk; of an encoder, its embeddings and their similarities."""
    from ..evaluate import evaluate as run
    from ..evaluate import is_encoder, similarity

    with show.bar(quiet=json) as tick:
        if is_encoder(model):
            result = similarity(model, against, data, min(length, 64), windows or None, tick)
        else:
            result = run(model, data, length, windows or None, against, tick, device)
    _remember(model, result)
    if json:
        show.emit(result, True)
        return
    show.out.print(show.table("", ["measure", "value"], [[k, _number(v)] for k, v in result.items()]))


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _remember(model: str, result: dict[str, Any]) -> None:
    """Keep an evaluation beside a lissom checkpoint, so that its report shows it."""
    from ..report import remember, write_report

    if (Path(model) / "manifest.json").is_file():
        remember(Path(model), result)
        write_report(Path(model))


@app.command()
def unpack(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory for the dense checkpoint; it must not exist.")],
    dtype: Annotated[str, typer.Option("--dtype", help="float16, bfloat16, float32, or auto.")] = "auto",
    json: Json = False,
) -> None:
    """Restore a packed checkpoint to dense safetensors that every tool loads."""
    from ..export import unpack as run

    if out.exists():
        raise OutputError(f"{out} exists; choose another directory or remove it")
    run(model, out, dtype)
    files = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    if json:
        show.emit({"out": str(out), "bytes": files}, True)
    else:
        show.out.print(f"{out}: {show.size(files)}")


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .gguf or .onnx file, or a directory.")],
    format: Annotated[
        str,
        typer.Option("--format", help="gguf, onnx, gptq, gptq-v2, compressed-tensors, int-quantized, packed or dense."),
    ] = "gguf",
    type: Annotated[
        str, typer.Option("--type", help="GGUF block type: auto, f16, q4_0, q4_1, q5_0, q8_0 or mxfp4.")
    ] = "auto",
    requantize: Annotated[
        bool, typer.Option("--requantize", help="Allow rounding again where the block type cannot hold the codes.")
    ] = False,
    json: Json = False,
) -> None:
    """Write MODEL for another engine, from the codes that it stores: nothing is quantized a second time unless asked for."""
    from ..export import CODECS, export_gguf, export_onnx, unpack
    from ..pipeline import convert

    def note(text: str) -> None:
        if not json:
            show.err.print(text, style="dim", markup=False, soft_wrap=True)

    if format not in ("gguf", "onnx", *CODECS):
        raise FormatError(f"unknown format {format!r}; choose gguf, onnx, {', '.join(CODECS)}")
    if format != "gguf" and (type != "auto" or requantize):
        raise RecipeError("--type and --requantize belong to --format gguf")
    if out.exists():
        raise OutputError(f"{out} exists; choose another name or remove it")
    made: dict[str, Any]
    if format == "gguf":
        made = export_gguf(model, out, type if type == "auto" else type.upper(), requantize, note)
    elif format == "onnx":
        made = export_onnx(model, out, note)
    elif format == "dense":
        unpack(model, out)
        made = {"bytes": sum(p.stat().st_size for p in out.glob("*.safetensors"))}
    else:
        made = convert(model, out, format, note=note)
    if json:
        show.emit({"out": str(out), "format": format, "bytes": made["bytes"], "report": made}, True)
    else:
        show.out.print(f"{out}: {show.size(made['bytes'])}")


@app.command()
def methods(json: Json = False) -> None:
    """List the methods: family, what they need, source."""
    from ..methods import METHODS

    rows = [
        {
            "name": m.name, "family": m.family, "kind": m.kind, "summary": m.summary, "needs": sorted(m.needs),
            "source": m.source, "settings": dict(m.settings()),
        }
        for m in METHODS.values()
    ]  # fmt: skip
    if json:
        show.emit(rows, True)
        return
    cells = [[r["name"], r["family"], r["summary"], ", ".join(r["needs"]) or "nothing", r["source"]] for r in rows]
    show.out.print(show.table("", ["method", "family", "what it does", "needs", "source"], cells))


@app.command()
def recipes(json: Json = False) -> None:
    """List the recipes that have a name: shipped ones, and methods with the usual numbers."""
    from ..pipeline import names, read

    rows = [{"name": name, "summary": read(name).summary} for name in names()]
    if json:
        show.emit(rows, True)
        return
    show.out.print(show.table("", ["recipe", "summary"], [[r["name"], r["summary"]] for r in rows]))


@app.command()
def report(
    model: Annotated[Path, typer.Argument(metavar="OUT", help="A directory that `lissom compress` wrote.")],
    json: Json = False,
) -> None:
    """Write OUT/report.html again from its manifest and its evaluations."""
    from ..report import write_report

    page = write_report(model)
    if json:
        show.emit({"report": str(page)}, True)
    else:
        show.out.print(str(page), soft_wrap=True)


add_commands(app)


def main() -> None:
    """Entry point: errors that a user can mend end with their message and exit code, without a traceback."""
    as_json = "--json" in sys.argv

    def refuse(name: str, message: str, code: int) -> NoReturn:
        if as_json:
            show.emit({"error": name, "message": message}, True)
        show.err.print(f"error: {message}", style="bold red", markup=False, soft_wrap=True)
        sys.exit(code)

    try:
        if as_json:
            sys.exit(app(standalone_mode=False) or 0)  # mistakes in the arguments come here too, to be told in JSON
        app()
    except LissomError as error:
        refuse(type(error).__name__, str(error), error.exit_code)
    except OSError as error:
        refuse(type(error).__name__, str(error), OutputError.exit_code)
    except typer.Abort:
        sys.exit(1)
    except Exception as error:
        if not as_json or not hasattr(error, "format_message"):
            raise
        refuse("UsageError", error.format_message(), error.exit_code)  # type: ignore[attr-defined]
    except SystemExit as ended:  # typer turns Ctrl-C into exit code 130
        if ended.code == 130:
            show.err.print("stopped; the same command goes on from the last finished block", soft_wrap=True)
        raise


if __name__ == "__main__":
    main()
