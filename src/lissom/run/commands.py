"""The verbs of the runtime: generate, chat, bench, serve. :func:`add_commands` hangs them on the main app."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A checkpoint that `lissom` wrote, a Hugging Face directory, a GGUF file, or 'demo'."
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Threads; all cores when not given.")]
Context = Annotated[int | None, typer.Option("--context", min=32, help="Positions of the key/value cache.")]
CacheBits = Annotated[
    int | None,
    typer.Option("--cache-bits", help="Bits of the key/value cache: 16, 8 or 4; as recorded, or 16, when not given."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-n", help="Tokens to generate at most.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 = greedy.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k most probable tokens; 0 = off.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the smallest set with this probability; 1 = off.")]
MinP = Annotated[float, typer.Option("--min-p", help="Keep tokens with this share of the best one's probability.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: avoid tokens that occurred.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
OuterBits = Annotated[int, typer.Option("--outer-bits", help="Bits of embedding and head, rounded at load: 8 or 6.")]
Draft = Annotated[str | None, typer.Option("--draft", help="A smaller model of the family: same text, sooner.")]
Rounded = Annotated[str | None, typer.Option("--round", help="Round at load, for speed only: int4, '4:16 int4', …")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _runner(
    model: str,
    threads: int | None,
    context: int | None,
    bits: int | None,
    rounded: str | None,
    outer: int,
    slots: int = 1,
) -> Any:
    from .start import open_runner

    return open_runner(
        model, rounded, outer, _packing, threads=threads, context=context, cache_bits=bits, slots=slots
    )  # fmt: skip


def _packing(done: int, total: int) -> None:
    """Tells of the one slow start, on standard error: a line that counts on a terminal, else one line."""
    if not total:
        sys.stderr.write("packing the weights for the first start; later ones take a second\n")
    elif sys.stderr.isatty():
        sys.stderr.write(f"\r{done} of {total} matrices" + ("\n" if done == total else ""))
    sys.stderr.flush()


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; '-' reads standard input.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End before this text; repeatable.")] = None,
    seed: Seed = 0,
    draft: Draft = None,
    threads: Threads = None,
    context: Context = None,
    cache_bits: CacheBits = None,
    rounded: Rounded = None,
    outer_bits: OuterBits = 8,
    as_json: Json = False,
) -> None:
    """Continue a text."""
    from .generation import Generation
    from .sampling import Sampling

    how = Sampling(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, tuple(stop or ()), seed)
    runner = _runner(model, threads, context, cache_bits, rounded, outer_bits)
    helper = _runner(draft, threads, context, cache_bits, None, outer_bits) if draft else None
    result = Generation()
    ids = runner.encode(sys.stdin.read() if prompt == "-" else prompt)
    for piece in runner.pieces(ids, how, result, helper):
        if not as_json:
            _show(piece)
    if as_json:
        typer.echo(json.dumps(vars(result), ensure_ascii=False))
    else:
        typer.echo()


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 0,
    threads: Threads = None,
    context: Context = None,
    cache_bits: CacheBits = None,
    rounded: Rounded = None,
    outer_bits: OuterBits = 8,
) -> None:
    """Talk to a model with its own chat template. Ends with Ctrl-D."""
    from .generation import Generation
    from .sampling import Sampling

    runner = _runner(model, threads, context, cache_bits, rounded, outer_bits)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            break
        messages.append({"role": "user", "content": line})
        how = Sampling(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, (), seed + len(messages))
        result = Generation()
        try:
            for piece in runner.pieces(runner.encode(messages), how, result):
                _show(piece)
        except KeyboardInterrupt:  # ends this answer only
            pass
        typer.echo()
        messages.append({"role": "assistant", "content": result.text})


def bench(
    model: Model,
    threads: Annotated[int, typer.Option("--threads", "-t", min=1, help="Threads of every contender.")] = 1,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1)] = 256,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1)] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Interleaved runs; medians are shown.")] = 5,
    rounded: Rounded = None,
    outer_bits: OuterBits = 8,
    cache_bits: CacheBits = None,
    against: Annotated[
        str | None, typer.Option("--against", help="'llama.cpp': the same model in the same run.")
    ] = None,
    llama_python: Annotated[
        str | None, typer.Option("--llama-python", help="A Python that has llama-cpp-python.")
    ] = None,
    llama_model: Annotated[str | None, typer.Option("--llama-model", help="The GGUF file for llama.cpp.")] = None,
    llama_quantization: Annotated[str, typer.Option("--llama-quantization", help="q4_0, q8_0, … or as-is.")] = "q4_0",
    as_json: Json = False,
) -> None:
    """Measure tokens per second, the time to the first token and the peak of memory."""
    from .bench import bench as run

    result = run(
        model,
        threads,
        prompt_tokens,
        new_tokens,
        repeats,
        against,
        llama_python,
        llama_model,
        llama_quantization,
        rounded,
        outer_bits,
        cache_bits,
    )
    if as_json:
        typer.echo(json.dumps(result))
        return
    rival = result.get("against", {})
    names = ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_s", "peak_rss_bytes")
    typer.echo(f"{'':24}{'lissom':>14}" + (f"{'llama.cpp':>14}{'ratio':>8}" if "ttft_s" in rival else ""))
    for name in names:
        mine = result[name]
        line = f"{name:24}{mine:14,.3f}"
        if name in rival:
            line += f"{rival[name]:14,.3f}{mine / rival[name]:8.2f}"
        typer.echo(line)
    if rival.get("missing"):
        typer.echo(f"no comparison: {rival['missing']}", err=True)


def serve(
    model: Model,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535)] = 8000,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Sequences that run together.")] = 8,
    waiting: Annotated[
        int, typer.Option("--waiting", min=1, help="Requests that may wait; more are answered 429.")
    ] = 64,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="The most that a request may ask for.")] = 1024,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="Seconds of a request.")] = 300.0,
    name: Annotated[str | None, typer.Option("--name", help="The model's name in answers.")] = None,
    threads: Threads = None,
    context: Context = None,
    cache_bits: CacheBits = None,
    rounded: Rounded = None,
    outer_bits: OuterBits = 8,
) -> None:
    """Serve OpenAI's HTTP interface. API keys: the variable LISSOM_API_KEYS, separated by commas."""
    from .serve import ServerSettings
    from .serve import serve as run

    keys = tuple(k.strip() for k in os.environ.get("LISSOM_API_KEYS", "").split(",") if k.strip())
    settings = ServerSettings(name=name or model, keys=keys, max_tokens=max_tokens, waiting=waiting, timeout=timeout)
    runner = _runner(model, threads, context or 1024 * slots, cache_bits, rounded, outer_bits, slots)
    typer.echo(f"{settings.name} on http://{host}:{port}  ({'API keys needed' if keys else 'open to all'})", err=True)
    run(runner, host, port, settings)


def add_commands(app: typer.Typer) -> None:
    """Add the verbs to ``app``; errors are the caller's to print."""
    for function in (generate, chat, bench, serve):
        app.command()(function)


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
