"""Many streaming clients against one server: no error, nothing stuck, flat memory, places of vanished clients free again.

    flock /tmp/lissom.lock .venv/bin/python benchmarks/soak.py --model demo --seconds 60

Starts `lissom serve` and lets ``--clients`` clients ask one request after the other for ``--seconds``; one of ten
goes away in the middle of its answer. Prints one JSON object; the exit code is 1 when ``problems`` is not empty.
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

import psutil

WORDS = [
    "the",
    "river",
    "runs",
    "down",
    "from",
    "old",
    "hills",
    "and",
    "people",
    "who",
    "live",
    "near",
    "it",
    "say",
    "that",
    "water",
    "never",
    "forgets",
    "its",
    "way",
    "home",
]


class Tally:
    def __init__(self):
        self.done, self.vanished, self.refused, self.errors = 0, 0, 0, []
        self.tokens, self.first, self.gaps = 0, [], []


async def ask(port, tally, draw, patience):
    """One streamed completion; raises when the answer is not whole."""
    vanish = draw.randint(1, 6) if draw.random() < 0.1 else None
    body = json.dumps(
        {
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 120))), "max_tokens": draw.randint(4, 64),
            "temperature": 1.0, "seed": draw.randrange(2**31), "stream": True,
        }
    ).encode()  # fmt: skip
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        start = last = time.monotonic()
        status = (await asyncio.wait_for(reader.readline(), patience)).decode()
        if " 429 " in status:
            tally.refused += 1
            await asyncio.sleep(1)
            return
        if " 200 " not in status:
            raise RuntimeError(f"answered {status.strip()!r}")
        events, finished = 0, None
        while True:
            line = await asyncio.wait_for(reader.readline(), patience)
            if not line:
                raise RuntimeError("the connection ended before [DONE]")
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                break
            now = time.monotonic()
            (tally.gaps if events else tally.first).append(now - (last if events else start))
            last = now
            item = json.loads(line[6:])
            if "error" in item:
                raise RuntimeError(item["error"]["message"])
            events += 1
            tally.tokens += 1
            finished = item["choices"][0]["finish_reason"] or finished
            if vanish is not None and events == vanish:
                tally.vanished += 1
                return
        if finished not in ("stop", "length"):
            raise RuntimeError(f"the answer ended with {finished!r}")
        tally.done += 1
    finally:
        writer.close()


async def client(port, tally, number, until, patience):
    draw = random.Random(number)
    while time.monotonic() < until:
        try:
            await ask(port, tally, draw, patience)
        except TimeoutError:
            tally.errors.append(f"stuck: nothing for {patience} s")
        except Exception as error:  # every kind of failure is a result here
            tally.errors.append(f"{type(error).__name__}: {error}")


async def watch(process, port, samples, until):
    while time.monotonic() < until:
        samples.append(process.memory_info().rss)
        await asyncio.sleep(0.5)


def health(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=30) as reply:
        return json.load(reply)


def free_positions(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("lissom_cache_positions_free ")))


def soak(model, clients, seconds, slots, threads, patience):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "lissom.cli.main", "serve", model, "--port", str(port), "--slots", str(slots),
        "--waiting", str(clients), "--threads", str(threads), "--context", str(512 * slots),
    ]  # fmt: skip
    server = subprocess.Popen(command)
    try:
        process = psutil.Process(server.pid)
        while True:
            try:
                health(port)
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit(f"the server ended with {server.returncode}") from None
                time.sleep(0.1)
        room = free_positions(port)
        tally, samples = Tally(), []

        async def all_clients():
            until = time.monotonic() + seconds
            jobs = [client(port, tally, i, until, patience) for i in range(clients)]
            await asyncio.gather(watch(process, port, samples, until), *jobs)

        started = time.monotonic()
        asyncio.run(all_clients())
        took = time.monotonic() - started
        end = time.monotonic() + 10
        while (state := health(port))["running"] and time.monotonic() < end:
            time.sleep(0.2)
        left = free_positions(port)
        server.terminate()
        code = server.wait(60)
    finally:
        server.kill()
    third = len(samples) // 3
    early, late = (statistics.median(part) for part in (samples[third : 2 * third], samples[-third:]))
    problems = list(dict.fromkeys(tally.errors))[:5]
    if late > early * 1.05 + (4 << 20):
        problems.append(f"memory grew from {early / 1e6:.0f} to {late / 1e6:.0f} MB")
    if state["running"] or state["waiting"]:
        problems.append(f"after the end: {state}")
    if left != room:
        problems.append(f"{room - left} positions of the cache were not given back")
    if code not in (0, -15):
        problems.append(f"the server ended with {code}")
    first, gaps = sorted(tally.first), sorted(tally.gaps)
    return {
        "clients": clients, "seconds": round(took, 1), "slots": slots, "threads": threads, "answers": tally.done,
        "vanished": tally.vanished, "refused_429": tally.refused, "errors": len(tally.errors),
        "events_per_s": round(tally.tokens / took, 1), "first_event_s": [round(_at(first, p), 2) for p in (0.5, 0.95, 1)],
        "gap_s": [round(_at(gaps, p), 3) for p in (0.5, 0.95, 1)], "rss_mb": [round(v / 1e6) for v in (early, late)],
        "problems": problems,
    }  # fmt: skip


def _at(values, share):
    return values[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=60, help="Seconds without an event that count as stuck.")
    options = parser.parse_args()
    result = soak(**vars(options))
    print(json.dumps(result, indent=1))
    sys.exit(bool(result["problems"]))


if __name__ == "__main__":
    main()
