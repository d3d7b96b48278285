"""The rival of `lissom bench`: llama.cpp through llama-cpp-python, in whatever Python environment has it.

Run as a script, without lissom: ``python llama_worker.py MODEL.gguf QUANTIZATION THREADS CONTEXT``. Then one JSON line in
(``prompt``: token ids, ``new``: tokens to decode) gives one JSON line out (``prefill_s``, ``decode_s``, ``tokens``). The first line
out says that the model is loaded.
"""

import ctypes
import json
import os
import resource
import sys
import tempfile
import time


def quantized(path, kind, out):
    """``path`` requantized by llama.cpp itself; "as-is" returns it unchanged."""
    import llama_cpp as ll  # pyright: ignore[reportMissingImports]

    if kind == "as-is":
        return path
    params = ll.llama_model_quantize_default_params()
    params.ftype = getattr(ll, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.allow_requantize = True
    if ll.llama_model_quantize(path.encode(), out.encode(), ctypes.byref(params)) != 0:
        raise SystemExit(f"llama.cpp could not quantize {path} to {kind}")
    return out


def main():
    path, kind, threads, context = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    import llama_cpp as ll  # pyright: ignore[reportMissingImports]

    silent = ll.llama_log_callback(lambda *_: None)
    ll.llama_log_set(silent, ctypes.c_void_p(0))
    ll.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        # a process of its own, so that quantizing does not count in the peak of memory
        child = os.fork()
        out = os.path.join(folder, "model.gguf")
        if child == 0:
            try:
                quantized(path, kind, out)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        started = time.perf_counter()
        model = ll.llama_model_load_from_file(
            (path if kind == "as-is" else out).encode(), ll.llama_model_default_params()
        )
        if not model:
            raise SystemExit(f"llama.cpp could not load {path}")
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = context, 512, threads, threads
        ctx = ll.llama_init_from_model(model, params)
        sampler = ll.llama_sampler_init_greedy()
        size = os.path.getsize(path if kind == "as-is" else out)
        print(json.dumps({"load_s": time.perf_counter() - started, "file_bytes": size}), flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            ids = (ctypes.c_int32 * len(job["prompt"]))(*job["prompt"])
            ll.llama_memory_clear(ll.llama_get_memory(ctx), True)
            start, cpu = time.perf_counter(), time.process_time()
            ll.llama_decode(ctx, ll.llama_batch_get_one(ids, len(ids)))
            token = ll.llama_sampler_sample(sampler, ctx, -1)
            middle, cpu_middle = time.perf_counter(), time.process_time()
            out_tokens = [token]
            for _ in range(job["new"]):
                one = (ctypes.c_int32 * 1)(token)
                ll.llama_decode(ctx, ll.llama_batch_get_one(one, 1))
                token = ll.llama_sampler_sample(sampler, ctx, -1)
                out_tokens.append(token)
            end = time.perf_counter()
            spent = {"prefill_cpu_s": cpu_middle - cpu, "decode_cpu_s": time.process_time() - cpu_middle}
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            times = {
                "prefill_s": middle - start,
                "decode_s": end - middle,
                "tokens": out_tokens,
                "peak_rss_bytes": peak,
            }
            print(json.dumps(times | spent), flush=True)


if __name__ == "__main__":
    main()
